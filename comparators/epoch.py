"""What the loop and a comparator tell each other: of an epoch's trajectories the tables, and back a number of updates on them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sampler import Condition, Trajectories


@dataclass(frozen=True)
class Epoch:
    """Trajectories that have been drawn and scored. Tables and rewards are of all processes, `mine` of this one."""

    prompts: list[str]  # N
    rewards: Tensor  # (N, B)
    log_probs_old: Tensor  # (N, B, S)
    log_probs_ref: Tensor  # (N, B, S)
    mine: Trajectories  # the M of the N * B that this process holds
    rows: slice  # their places among the N * B
    seed: int  # of the run
    epoch: int

    @property
    def generator(self) -> torch.Generator:
        """The random stream of this epoch's minibatches, the same in every process."""
        return torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)

    def shuffled(self, number: int) -> Tensor:
        """A random order of `number` things."""
        return torch.randperm(number, generator=self.generator)


@dataclass(frozen=True)
class Update:
    """One gradient update: the entries of the (N, B, S) table it is over, and its loss as a function of that table.

    The loss reads no other entries, which train() asserts. A further term of it may be kl_weight times the sum over these entries
    of a divergence from the reference, kl(x_t, i, cond, mu, sigma) -> (M,), of single steps.
    """

    entries: Tensor  # (N, B, S), bool
    loss: Callable[[Tensor], Tensor]  # of the (N, B, S) log-probs under theta -> scalar
    kl_weight: float = 0.0
    kl: Callable[[Tensor, Tensor, Condition, Tensor, Tensor], Tensor] | None = None

    @property
    def kl_grad(self) -> Tensor:
        """Derivative of the divergence's term by the divergence of every entry, (N, B, S)."""
        return self.entries * self.kl_weight
