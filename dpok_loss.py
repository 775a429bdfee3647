"""DPOK's loss, divergences and critic as pure functions (Fan et al., NeurIPS 2023, arXiv 2305.16381).

Policy gradient with the Kullback-Leibler divergence to the pretrained model, step by step, as a second term of the loss. The
gradient through earlier actions, which decide where later divergences are measured, is left out. A critic V(x_t, c, t) of the
final reward may be subtracted from it.

Tables are those of rdp_loss.py: log-probs, divergences and values (N, B, T), rewards (N, B).
"""

import torch
from torch import Tensor, nn


def gaussian_kl(mu: Tensor, mu_ref: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(mu_ref, sigma^2)) of every latent dimension, (mu - mu_ref)^2 / (2 sigma^2), in nats."""
    return (mu - mu_ref) ** 2 / (2 * sigma**2)


def dpok_loss(
    log_probs: Tensor, log_probs_old: Tensor, kl: Tensor, rewards: Tensor, values: Tensor | float, *,
    reward_scale: float, kl_weight: float, clip_range: float,
) -> Tensor:  # fmt: skip
    """-alpha mean[(r - V) clip(rho, 1 - eps, 1 + eps)] + beta mean[KL] -> scalar.

    The clip is a plain clamp, as in the released code: outside the range the gradient is zero, whichever way it points.
    kl: of single steps, either exact (gaussian_kl) or as in the released code the squared difference of predicted noises.
    """
    ratio = (log_probs - log_probs_old).exp().clamp(1 - clip_range, 1 + clip_range)
    return -reward_scale * ((rewards.unsqueeze(-1) - values) * ratio).mean() + kl_weight * kl.mean()


class Critic(nn.Module):
    """V(x_t, c, t): three layers of 256, each output scaled by a learned vector of its timestep, then one number."""

    def __init__(self, inputs: int, steps: int, width: int = 256):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in (inputs, width, width))
        self.gates = nn.ModuleList(nn.Embedding(steps, width) for _ in self.layers)
        for gate in self.gates:
            nn.init.ones_(gate.weight)
        self.last = nn.Linear(width, 1)

    def forward(self, x_t: Tensor, text: Tensor, step: Tensor) -> Tensor:
        """Latents (n, C, H, W), pooled text (n, W) and indices of steps (n,) -> (n,)."""
        hidden = torch.cat([x_t.flatten(1), text], 1)
        for layer, gate in zip(self.layers, self.gates, strict=True):
            hidden = torch.relu(layer(hidden) * gate(step))
        return self.last(hidden).squeeze(-1)
