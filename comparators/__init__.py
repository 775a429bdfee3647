"""The methods that PRDP is compared with, a file each: the loss as a pure function, and its schedule of updates in an epoch.

A further method is one more file, a name in config.py's `method`, and a case here. It has

    entries(N, B, S, epoch)   the entries of the (N, B, S) table that each update of an epoch is over, before anything is drawn,
                              so that the processes can share the work out
    updates(epoch)            from an Epoch to Updates on these entries
    needs_reference           whether a loss reads log_probs_ref
    remembers                 by name what outlives an epoch: anything with state_dict() and load_state_dict(), for checkpoints
"""

import math
from collections.abc import Callable

import torch

from comparators.d3po import D3PO
from comparators.ddpo import DDPO
from comparators.dpok import DPOK
from comparators.epoch import stream
from comparators.grpo import GRPO
from config import Config
from sampler import Policy

Comparator = DDPO | DPOK | D3PO | GRPO


def chosen(config: Config, policy: Policy, *, mu_ref: Callable | None = None, **of_dpok) -> Comparator | None:
    """The comparator of config.method, None for PRDP itself. mu_ref: for divergences; of_dpok: for its critic (DPOK)."""
    match config.method:
        case "prdp":
            return None
        case "ddpo":
            return DDPO(config)
        case "dpok":
            return DPOK(config, policy, mu_ref=mu_ref, **of_dpok)
        case "d3po":
            return D3PO(config)
        case "grpo":
            return GRPO(config, policy, mu_ref)


def asked_of_reference(config: Config, comparator: Comparator | None, shape: tuple[int, int, int], epoch: int) -> torch.Tensor:
    """The entries (N, B, S), bool, at which pi_ref is evaluated: those that the loss reads, else one in 20 for kl_nats.

    At least 32, that is. With --reference_steps n they are n of every trajectory. All are drawn anew in every epoch.
    """
    generator, size = stream(config.seed, epoch), math.prod(shape)
    if comparator is not None and not comparator.needs_reference:
        return (torch.rand(size, generator=generator).argsort() < max(32, size // 20)).view(shape)
    return torch.rand(shape, generator=generator).argsort(-1) < (config.reference_steps or shape[-1])
