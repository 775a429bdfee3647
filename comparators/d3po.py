"""D3PO: its loss as a pure function, and its minibatches (Yang et al., CVPR 2024, arXiv 2311.13231).

Direct preference optimisation on single denoising steps: of two trajectories of a prompt, from the same x_T, the one with the
higher reward counts as the winner at every step. Only the order of the rewards enters, never their size.

Tables are those of rdp_loss.py with pairs in neighbouring places: log-probs (N, B, S), rewards (N, B), B even.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from comparators.epoch import Epoch, Update, disjoint_parts
from config import Config


def preferences(rewards: Tensor) -> Tensor:
    """h of each pair, (N, B) -> (N, B/2, 2): (1, -1) where the first is better, (-1, 1) where the second is, (0, 0) for a tie.

    ValueError if B is odd.
    """
    if rewards.shape[-1] % 2:
        raise ValueError(f"images_per_prompt must be even for pairs, not {rewards.shape[-1]}")
    first, second = rewards.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([torch.sign(first - second), torch.sign(second - first)], -1)


def d3po_loss(
    log_probs: Tensor, log_probs_ref: Tensor, rewards: Tensor, *, kl_weight: float, clip_range: float | None = None
) -> Tensor:
    """-mean_t log sigmoid(beta [h_0 Delta_0t + h_1 Delta_1t]), Delta = log pi_theta/pi_ref of a single step -> scalar.

    kl_weight: beta. clip_range: eps of the released code, which clamps the ratio exp(Delta) to [1 - eps, 1 + eps], so that a
    step beyond has no gradient whichever way it moves; None is the paper's formula.
    """
    delta = (log_probs - log_probs_ref).unflatten(1, (-1, 2))  # (N, B/2, 2, S)
    if clip_range is not None:
        delta = delta.clamp(math.log(1 - clip_range), math.log(1 + clip_range))
    margin = kl_weight * (preferences(rewards).unsqueeze(-1) * delta).sum(2)
    return -torch.nn.functional.logsigmoid(margin).mean()


class D3PO:
    """K disjoint minibatches of pairs of trajectories, one update on each."""

    needs_reference = True

    def __init__(self, config: Config):
        self.config = config
        self.remembers = {}

    def entries(self, N: int, B: int, S: int, epoch: int) -> list[Tensor]:
        return disjoint_parts(N * B // 2, N, B, S, self.config, epoch)

    def updates(self, epoch: Epoch) -> Iterator[Update]:
        config = self.config
        for entries in epoch.entries:

            def loss(log_probs: Tensor, some=entries[..., 0]) -> Tensor:  # whole pairs, each a prompt of two pictures
                tables = (table[some].unflatten(0, (-1, 2)) for table in (log_probs, epoch.log_probs_ref, epoch.rewards))
                return d3po_loss(*tables, kl_weight=config.kl_weight, clip_range=config.clip_range)

            yield Update(entries, loss)
