"""What the loop and a comparator tell each other: of an epoch's trajectories the tables, and back a number of updates on them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from config import Config
from sampler import Condition, Trajectories


def stream(seed: int, epoch: int) -> torch.Generator:
    """The random stream of an epoch's minibatches, the same in every process."""
    return torch.Generator().manual_seed(seed + 1_000_003 * epoch)


def parts_of_table(parts: Iterable[Tensor], groups: int, N: int, B: int, S: int) -> list[Tensor]:
    """Of an (N, B, S) table that consists of equal groups of neighbouring entries the parts, as masks: some groups each."""
    empty = torch.zeros(groups, N * B * S // groups, dtype=torch.bool)
    return [empty.index_fill(0, some, True).view(N, B, S) for some in parts]


def disjoint_parts(groups: int, N: int, B: int, S: int, config: Config, epoch: int) -> list[Tensor]:
    """K parts of the table that together are all of it: as many of its groups in each, to one, drawn anew in every epoch."""
    parts = torch.randperm(groups, generator=stream(config.seed, epoch)).tensor_split(config.updates_per_epoch)
    return parts_of_table(parts, groups, N, B, S)


class Share(Protocol):
    """Which M of the N * B trajectories this process holds (plumbing/processes.py)."""

    rows: Tensor  # (M,), ascending

    def all_gather(self, produce: Callable[[], Tensor]) -> Tensor:
        """What every process makes of its M, joined in the order of the N * B."""


@dataclass(frozen=True)
class Epoch:
    """Trajectories that have been drawn and scored. Tables and rewards are of all processes, `mine` of this one."""

    prompts: list[str]  # N
    rewards: Tensor  # (N, B)
    log_probs_old: Tensor  # (N, B, S)
    log_probs_ref: Tensor  # (N, B, S); NaN at most entries, where a method does not need it
    entries: list[Tensor]  # (N, B, S), bool, of every update: what the method has said they are
    mine: Trajectories  # the M of the N * B that this process holds
    share: Share  # which they are
    epoch: int


@dataclass(frozen=True)
class Update:
    """One gradient update: the entries of the (N, B, S) table it is over, and its loss as a function of that table.

    The loss reads no other entries, which algorithm_1() asserts. A further term of it may be kl_weight times the sum over these
    entries of a divergence from the reference, kl(x_t, i, cond, mu, sigma) -> (M,), of single steps.
    """

    entries: Tensor  # (N, B, S), bool
    loss: Callable[[Tensor], Tensor]  # of the (N, B, S) log-probs under theta -> scalar
    kl_weight: float = 0.0
    kl: Callable[[Tensor, Tensor, Condition, Tensor, Tensor], Tensor] | None = None

    @property
    def kl_grad(self) -> Tensor:
        """Derivative of the divergence's term by the divergence of every entry, (N, B, S)."""
        return self.entries * self.kl_weight
