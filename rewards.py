"""Rewards: black-box scores of pictures.

A reward is any callable (images, prompts) -> scores with images (B, 3, H, W) float in [0, 1], prompts a list of B strings and
scores (B,), higher is better. It is never differentiated. `load_reward` makes one from its name:

    jpeg-compressibility          minus the size of the picture as a JPEG of quality 95, in kB (DDPO)
    jpeg-incompressibility        the opposite
    toy-alignment                 share of the prompt's attributes the picture shows, in [0, 1] (miniature/world.py)
    toy-colourfulness             Hasler and Suesstrunk's measure; ignores the prompt, so it can be hacked (miniature/world.py)
    hpsv2, hpsv2.1, pickscore, imagereward, aesthetic, clipscore    learned rewards (plumbing/reward_models.py)
    my_file:my_function           your own function, from a module on the Python path or in the working directory; it always gets
                                  its pictures on the CPU

and `load_rewards(["toy-alignment=1", "toy-colourfulness=0.5"])` makes the weighted sum of several.
"""

import importlib
import io
import math
import os
import sys

import torch
from PIL import Image
from torch import Tensor

from miniature import world
from plumbing import reward_models
from plumbing.reward_models import Reward, eight_bit, local_weights

CPU = torch.device("cpu")


class RewardError(RuntimeError):
    """A reward raised, or did not return one finite number for every picture."""


def jpeg_incompressibility(images: Tensor, prompts: list[str]) -> Tensor:
    """Size in kB (1000 bytes) of each picture as a JPEG of quality 95 (DDPO, Sec. 5)."""
    sizes = []
    for pixels in eight_bit(images).permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


def jpeg_compressibility(images: Tensor, prompts: list[str]) -> Tensor:
    """Minus the JPEG size in kB (DDPO, Sec. 5)."""
    return -jpeg_incompressibility(images, prompts)


# The place for further rewards: a name and a function. Those with weights are in reward_models.LOADERS.
FUNCTIONS: dict[str, Reward] = {
    "jpeg-compressibility": jpeg_compressibility,
    "jpeg-incompressibility": jpeg_incompressibility,
    "toy-alignment": world.alignment,
    "toy-colourfulness": world.colourfulness,
}


def load_function(name: str) -> Reward:
    """The user's own reward `module:function`; ValueError if there is no such thing."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:  # `torchrun train.py` and `python /path/train.py` put only the script's folder there
        sys.path.append(os.getcwd())
    try:
        reward = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a file of the user's raises when it is read
        raise ValueError(f"reward {name!r}: {type(error).__name__}: {error}") from error
    if not callable(reward):
        raise ValueError(f"reward {name!r} is not a function (images, prompts) -> scores")
    return reward


def own_reward(name: str, reward: Reward) -> Reward:
    """A function of the user's own: it gets its pictures on the CPU, and is checked at every call."""
    return checked(name, lambda images, prompts: reward(images.cpu(), prompts))


def known_rewards() -> str:
    return f"use {', '.join([*FUNCTIONS, *reward_models.LOADERS])}, or module:function for your own"


def load_reward(name: str, weights: list[str] = (), device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Reward:
    """The reward of that name, checked at every call; ValueError naming the known ones for anything else.

    weights: `name=path` of reward models that lie on this machine; the others come from the hub. dtype: theirs, not the scores'.
    """
    local = local_weights(weights)
    if name in FUNCTIONS:
        return checked(name, FUNCTIONS[name])
    if name in reward_models.LOADERS:
        return checked(name, reward_models.LOADERS[name](local, device, dtype))
    if ":" in name:
        return own_reward(name, load_function(name))
    raise ValueError(f"unknown reward {name!r}: {known_rewards()}")


def checked(name: str, reward: Reward) -> Reward:
    """The same reward, with a RewardError naming reward and prompt where it fails or returns nonsense."""

    def checked_reward(images: Tensor, prompts: list[str]) -> Tensor:
        try:
            scores = torch.as_tensor(reward(images, prompts), dtype=torch.float32).cpu()
        except Exception as error:
            which = f"for prompt {prompts[0]!r}" + (f" or one of the {len(prompts) - 1} after it" if len(prompts) > 1 else "")
            raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error} ({which})") from error
        if scores.shape != (len(prompts),):
            wanted = f"shape ({len(prompts)},)"
            raise RewardError(f"reward {name!r} returned shape {tuple(scores.shape)}, not {wanted}, for prompt {prompts[0]!r}")
        if not scores.isfinite().all():
            bad = int((~scores.isfinite()).nonzero()[0])
            raise RewardError(f"reward {name!r} returned {scores[bad].item()} for prompt {prompts[bad]!r}")
        return scores

    return checked_reward


def parse_weighted(specs: list[str]) -> list[tuple[str, float]]:
    """(name, weight) of rewards given as `name` or `name=weight`; ValueError for a weight that is no number."""
    weighted = []
    for spec in specs:
        name, _, weight = spec.rpartition("=") if "=" in spec else (spec, "", "1")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"reward {spec!r}: the weight {weight!r} is not a number (write name=weight)")
        weighted.append((name, value))
    return weighted


def load_rewards(
    specs: list[str], weights: list[str] = (), device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> Reward:
    """The weighted sum of rewards given as `name` or `name=weight`; ValueError for an unknown name or a weight that is no number.

    The other arguments are load_reward's.
    """
    weighted = [(weight, load_reward(name, weights, device, dtype)) for name, weight in parse_weighted(specs)]
    if not weighted:
        raise ValueError(f"no reward given: {known_rewards()}")
    return lambda images, prompts: sum(weight * reward(images, prompts) for weight, reward in weighted)
