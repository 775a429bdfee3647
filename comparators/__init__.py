"""The methods that PRDP is compared with, a file each: the loss as a pure function, and its schedule of updates in an epoch.

A further method is one more file, a name in config.py's `method`, and a case here. It has

    entries(N, B, S, epoch)   the entries of the (N, B, S) table that each update of an epoch is over, before anything is drawn,
                              so that the processes can share the work out
    updates(epoch)            from an Epoch to Updates on these entries
    needs_reference           whether a loss reads log_probs_ref
    remembers                 by name what outlives an epoch: anything with state_dict() and load_state_dict(), for checkpoints
"""

import torch

from comparators.d3po import D3PO
from comparators.ddpo import DDPO
from comparators.dpok import DPOK
from comparators.epoch import parts_of_table, stream
from config import Config
from sampler import Policy

Comparator = DDPO | DPOK | D3PO


def chosen(config: Config, policy: Policy, **of_dpok) -> Comparator | None:
    """The comparator of config.method, None for PRDP itself; of_dpok: what its critic and divergence need, see DPOK."""
    match config.method:
        case "prdp":
            return None
        case "ddpo":
            return DDPO(config)
        case "dpok":
            return DPOK(config, policy, **of_dpok)
        case "d3po":
            return D3PO(config)


def asked_of_reference(comparator: Comparator | None, N: int, B: int, S: int, seed: int, epoch: int) -> torch.Tensor:
    """The entries (N, B, S), bool, at which pi_ref is evaluated: all if the loss reads them, else one in 20 for kl_nats."""
    if comparator is None or comparator.needs_reference:
        return torch.ones(N, B, S, dtype=torch.bool)
    few = torch.randperm(N * B * S, generator=stream(seed, epoch))[: max(32, N * B * S // 20)]
    return parts_of_table([few], N * B * S, N, B, S)[0]
