"""LaSRO's memory: pictures that the generator has drawn, and what the reward said of them."""

import math

import torch
from torch import Tensor


class Replay:
    """The newest pictures and their rewards, by prompt: z (B, T, C, H, W) and rewards (B, T), first in, first out.

    OURS: that whole prompts are kept, with all their pictures.
    Old ones stay true: a reward depends on the picture and its prompt alone, not on who drew it.
    """

    def __init__(self, size: int, shape: tuple[int, ...]):
        """size: of how many prompts; shape: of z."""
        self.size, self.prompts, self.z, self.rewards = size, [], [], []
        self.size_when_full = size * math.prod(shape) * 4  # bytes, for the disk; rewards are next to nothing

    def push(self, prompts: list[str], z: Tensor, rewards: Tensor) -> None:
        """Of N prompts z (N, B, T, C, H, W) and rewards (N, B, T)."""
        for name, new in (("prompts", prompts), ("z", z.unbind()), ("rewards", rewards.unbind())):
            setattr(self, name, [*getattr(self, name), *new][-self.size :])

    def draw(self, number: int, newest: int, generator: torch.Generator) -> list[int]:
        """Places of `number` prompts: half of them among the newest ones, half among all others, if there are any (OURS)."""
        older = len(self.prompts) - newest
        of_older = number // 2 if older else 0
        places = torch.randint(newest, (number - of_older,), generator=generator) + older
        if older:
            places = torch.cat([places, torch.randint(older, (of_older,), generator=generator)])
        return places.tolist()

    def state_dict(self) -> dict:
        return {"prompts": self.prompts, "z": self.z, "rewards": self.rewards}

    def load_state_dict(self, state: dict) -> None:
        self.prompts, self.z, self.rewards = state["prompts"], state["z"], state["rewards"]
