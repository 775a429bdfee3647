"""D3PO: its loss as a pure function, and its minibatches (Yang et al., CVPR 2024, arXiv 2311.13231).

Direct preference optimisation on single denoising steps: of two trajectories of a prompt, from the same x_T, the one with the
higher reward counts as the winner at every step. Only the order of the rewards enters, never their size.

Tables are those of rdp_loss.py with pairs in neighbouring places: log-probs (N, B, S), rewards (N, B), B even.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from comparators.epoch import Epoch, Update
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

    def __init__(self, config: Config):
        self.config = config
        self.remembers = {}

    def updates(self, epoch: Epoch) -> Iterator[Update]:
        config, pairs = self.config, epoch.rewards.numel() // 2
        in_pairs = [table.reshape(pairs, 2, -1) for table in (epoch.log_probs_ref, epoch.rewards)]
        for some in epoch.shuffled(pairs).tensor_split(min(config.updates_per_epoch, pairs)):

            def loss(log_probs: Tensor, some=some) -> Tensor:
                ref, rewards = (table[some] for table in in_pairs)
                log_probs = log_probs.reshape(pairs, 2, -1)[some]
                return d3po_loss(log_probs, ref, rewards.squeeze(-1), kl_weight=config.kl_weight, clip_range=config.clip_range)

            whole = torch.zeros(pairs, dtype=torch.bool).index_fill(0, some, True).repeat_interleave(2).view_as(epoch.rewards)
            yield Update(whole.unsqueeze(-1).expand_as(epoch.log_probs_old), loss)
