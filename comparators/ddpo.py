"""DDPO: its losses and reward statistics as pure functions, and its minibatches (Black et al., ICLR 2024, arXiv 2305.13301).

Denoising is a Markov decision process with a reward at its end only, and every step is credited with the same advantage A: the
reward, normalised by the mean and standard deviation of its own prompt. A step's likelihood ratio to the policy that drew it,
rho = pi_theta / pi_old, is clipped as in PPO. There is no reference model and no KL.

Tables are those of rdp_loss.py: log-probs (N, B, S), rewards and advantages (N, B). With log-probs that are means over D latent
dimensions, rho is the true ratio to the power 1/D, so that a clip_range of 1e-4 at D = 16384 is 1.64 nats a step.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from comparators.epoch import Epoch, Update, disjoint_parts
from config import Config


def score_function_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """-mean[A log pi_theta], REINFORCE; one update on what theta itself drew -> scalar."""
    return -(advantages.unsqueeze(-1) * log_probs).mean()


def importance_sampling_loss(log_probs: Tensor, log_probs_old: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """mean[max(-A rho, -A clip(rho, 1 - eps, 1 + eps))], for several updates on the same trajectories -> scalar.

    The ratio is of single steps and is never multiplied over them. At theta = theta_old the gradient is that of
    score_function_loss.
    """
    ratio, advantages = (log_probs - log_probs_old).exp(), advantages.unsqueeze(-1)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean()


def batch_advantages(rewards: Tensor, limit: float) -> Tensor:
    """(r - mean) / (std + 1e-8) over all N * B rewards, clamped to +-limit; (N, B) -> (N, B)."""
    return ((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-8)).clamp(-limit, limit)


class PromptStatistics:
    """The last rewards of every prompt, by which its new ones are normalised.

    size: rewards remembered for each prompt; min_count: a prompt with fewer is normalised by the batch instead.
    """

    def __init__(self, size: int, min_count: int):
        self.size, self.min_count = size, min_count
        self.remembered: dict[str, list[float]] = {}

    def advantages(self, prompts: list[str], rewards: Tensor, limit: float) -> Tensor:
        """Remembers rewards (N, B) of N prompts, then (r - mean) / (std + 1e-6) by prompt, clamped to +-limit -> (N, B)."""
        for prompt, row in zip(prompts, rewards.tolist(), strict=True):
            self.remembered[prompt] = [*self.remembered.get(prompt, []), *row][-self.size :]
        advantages = torch.empty_like(rewards)
        for n, prompt in enumerate(prompts):
            known = rewards.new_tensor(self.remembered[prompt])
            source = known if len(known) >= self.min_count else rewards
            advantages[n] = (rewards[n] - source.mean()) / (source.std(correction=0) + 1e-6)
        return advantages.clamp(-limit, limit)

    def state_dict(self) -> dict[str, list[float]]:
        return self.remembered

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.remembered = state


class DDPO:
    """K disjoint minibatches of trajectories, one update on each; with --score_function one update on all."""

    needs_reference = False

    def __init__(self, config: Config):
        self.config = config
        self.statistics = PromptStatistics(config.statistics_size, config.statistics_min_count)
        self.remembers = {"rewards": self.statistics}

    def entries(self, N: int, B: int, S: int, epoch: int) -> list[Tensor]:
        return disjoint_parts(N * B, N, B, S, self.config, epoch)

    def updates(self, epoch: Epoch) -> Iterator[Update]:
        config = self.config
        if config.reward_statistics == "prompt":
            advantages = self.statistics.advantages(epoch.prompts, epoch.rewards, config.advantage_limit)
        else:
            advantages = batch_advantages(epoch.rewards, config.advantage_limit)
        for entries in epoch.entries:
            whole = entries[..., 0]  # trajectories

            def loss(log_probs: Tensor, whole=whole) -> Tensor:
                if config.score_function:
                    return score_function_loss(log_probs[whole], advantages[whole])
                log_probs_old = epoch.log_probs_old[whole]
                return importance_sampling_loss(log_probs[whole], log_probs_old, advantages[whole], config.clip_range)

            yield Update(entries, loss)
