"""Flow-GRPO: its advantages as a pure function, and its minibatches (Liu et al., 2025, arXiv 2505.05470).

A reward counts by how far it is above the mean of its group, the B pictures of a prompt in this epoch, so that nothing has to be
remembered or learned beside the policy. The loss, a mean over (trajectory, step), is

    -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + beta KL,    rho = pi_theta / pi_old,    KL = ||mu - mu_ref||^2 / (2 sigma^2)

with DDPO's clipped ratios of single steps (comparators/ddpo.py::importance_sampling_loss) and beside them, at every step, the
divergence from the pretrained model (comparators/dpok.py::exact_kl). Both ask of a step only that it is a Gaussian, not whether a
flow or a diffusion has given its mean.

Of the released code, github.com/yifan123/flow_grpo, these are followed: log-probs and KL are means over the latent dimensions
(--log_prob_reduction sum makes both sums); 1e-4 in the denominator of advantages, and their limit; minibatches of whole
trajectories, each used once. --reward_statistics batch follows its usual deviation. These are not: its KL takes s^2 for the
variance s^2 |dt|, so that beta here is about its beta over the number of steps; trajectories with an advantage of zero are
dropped, and its mean is over the others; its last step is not trained; the weights' moving average is kept.

Tables are those of rdp_loss.py: log-probs (N, B, S), rewards and advantages (N, B).
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from comparators.ddpo import importance_sampling_loss
from comparators.dpok import exact_kl
from comparators.epoch import Epoch, Update, disjoint_parts
from config import Config
from sampler import Condition, Policy


def group_advantages(rewards: Tensor, limit: float, *, of_epoch: bool = False) -> Tensor:
    """(r - mean of its prompt) / (std + 1e-4), clamped to +-limit; (N, B) -> (N, B) in fp64.

    of_epoch: the deviation is that of all N * B rewards (released code), not of the prompt's B (paper); the mean is the prompt's.
    """
    rewards = rewards.double()  # in which the mean of equal fp32 rewards is exact, and their advantages are exactly zero
    std = rewards.std(correction=0) if of_epoch else rewards.std(-1, correction=0, keepdim=True)
    return ((rewards - rewards.mean(-1, keepdim=True)) / (std + 1e-4)).clamp(-limit, limit)


class GRPO:
    """K disjoint minibatches of trajectories, one update on each.

    mu_ref(x_t, i, cond): the reference's means, which only the KL asks for.
    """

    needs_reference = False  # its divergence asks for means, step by step

    def __init__(self, config: Config, policy: Policy, mu_ref: Callable[[Tensor, Tensor, Condition], Tensor] | None):
        self.config, self.policy, self.mu_ref = config, policy, mu_ref
        self.remembers = {}

    def divergence(self, x_t: Tensor, i: Tensor, cond: Condition, mu: Tensor, sigma: Tensor) -> Tensor:
        """KL of single steps from the reference's, (M, C, H, W) -> (M,), with gradient through mu."""
        return exact_kl(mu, self.mu_ref(x_t, i, cond), sigma, self.policy.log_prob_reduction)

    def entries(self, N: int, B: int, S: int, epoch: int) -> list[Tensor]:
        return disjoint_parts(N * B, N, B, S, self.config, epoch)

    def updates(self, epoch: Epoch) -> Iterator[Update]:
        config = self.config
        advantages = group_advantages(epoch.rewards, config.advantage_limit, of_epoch=config.reward_statistics == "batch")
        for entries in epoch.entries:

            def loss(log_probs: Tensor, whole=entries[..., 0]) -> Tensor:  # trajectories
                log_probs_old = epoch.log_probs_old[whole]
                return importance_sampling_loss(log_probs[whole], log_probs_old, advantages[whole], config.clip_range)

            yield Update(entries, loss, config.kl_weight / entries.sum().item(), self.divergence if config.kl_weight else None)
