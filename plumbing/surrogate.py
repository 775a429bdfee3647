"""LaSRO's surrogate of the reward: the network, and how it and the generator it leads are watched."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rdp_loss import pairwise_differences
from sampler import Condition


def surrogate_of(unet: nn.Module, num_steps: int) -> nn.Module:
    """R_psi: reads latents with the down and mid blocks of a UNet2DConditionModel, copied, and puts out R of each step, (M, T).

    OURS: one network with an output for every step of the generator, told that the latents are clean (timestep 0); the head.
    """
    surrogate, width = copy.deepcopy(unet), unet.config.block_out_channels[-1]
    surrogate.up_blocks, surrogate.conv_norm_out = nn.ModuleList(), None
    with unet.device:
        surrogate.conv_out = nn.Sequential(
            nn.GroupNorm(unet.config.norm_num_groups, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_steps),
        )  # fmt: skip
    nn.init.zeros_(surrogate.conv_out[-1].weight)
    nn.init.zeros_(surrogate.conv_out[-1].bias)
    return surrogate.requires_grad_(True)


def surrogate_scores(critic: Callable[[Tensor, Tensor, Condition], Tensor], z: Tensor, cond: Condition) -> Tensor:
    """R_psi(z_j, c) of pictures (M, T, C, H, W), each by the output of its step -> (M, T)."""
    clean = torch.zeros(len(z), dtype=torch.long, device=z.device)
    return torch.stack([critic(z[:, step], clean, cond)[:, step] for step in range(z.shape[1])], 1)


def accuracy(scores: Tensor, rewards: Tensor) -> float:
    """Share of the pairs with different rewards that the surrogate orders as the reward does, a tie being half; both (..., B)."""
    ordered = torch.heaviside(pairwise_differences(scores), torch.tensor(0.5, dtype=scores.dtype))
    return ordered[pairwise_differences(rewards) > 0].mean().item()


def record(
    rewards: Tensor,
    scores: Tensor,
    learned: list[Tensor],
    made: list[Tensor],
    seconds: dict[str, float],
    normaliser: Callable[[Tensor], Tensor],
) -> dict:
    """What an epoch has found (docs/metrics.md); by step, from the first.

    rewards, scores: (N, B, T), true and by the surrogate as it was before it learned from them; learned, made: of every update of
    the surrogate its loss (P,), of the generator R_psi and L_lcm (G, T + 1); normaliser: S of (M, T).
    """
    by_step = list(zip(scores.unbind(-1), rewards.unbind(-1), strict=True))
    generated = torch.stack(made).flatten(0, 1) if made else None
    return {
        "reward_mean": rewards[..., -1].mean().item(),
        "reward_std": rewards[..., -1].std().item(),
        "reward_by_step": rewards.mean((0, 1)).tolist(),
        "surrogate_accuracy": [accuracy(*pair) for pair in by_step],
        "surrogate_by_step": scores.mean((0, 1)).tolist(),
        "surrogate_loss": torch.stack(learned).mean().item() if learned else None,
        "normalised_reward": None if generated is None else normaliser(generated[:, :-1]).mean(0).tolist(),
        "anchor_loss": None if generated is None else generated[:, -1].mean().item(),
        "images_per_second": rewards.numel() / sum(seconds.values()),
    }
