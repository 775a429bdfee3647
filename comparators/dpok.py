"""DPOK: its loss, divergences and critic, and its draws of single steps (Fan et al., NeurIPS 2023, arXiv 2305.16381).

Policy gradient with the Kullback-Leibler divergence to the pretrained model, step by step, as a second term of the loss. The
gradient through earlier actions, which decide where later divergences are measured, is left out. A critic V(x_t, c, t) of the
final reward may be subtracted from it.

Tables are those of rdp_loss.py: log-probs and values (N, B, S), rewards (N, B).
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from comparators.epoch import Epoch, Update, parts_of_table, stream
from config import Config
from sampler import REDUCTIONS, Condition, Policy, Trajectories


def gaussian_kl(mu: Tensor, mu_ref: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(mu_ref, sigma^2)) of every latent dimension, (mu - mu_ref)^2 / (2 sigma^2), in nats."""
    return (mu - mu_ref) ** 2 / (2 * sigma**2)


def exact_kl(mu: Tensor, mu_ref: Tensor, sigma: Tensor, reduction: str) -> Tensor:
    """gaussian_kl of each row, (M, C, H, W) -> (M,) in fp64, the mean or the sum over latent dimensions as for log-probs."""
    return REDUCTIONS[reduction](gaussian_kl(mu, mu_ref, sigma).flatten(1).double(), 1)


def noise_difference(mu: Tensor, mu_ref: Tensor, k_t: Tensor) -> Tensor:
    """The released code's divergence, the squared difference of predicted noises, ((mu - mu_ref) / k_t)^2, k_t = d mu / d eps."""
    return ((mu - mu_ref) / k_t) ** 2


def dpok_loss(
    log_probs: Tensor, log_probs_old: Tensor, rewards: Tensor, values: Tensor | float, *, reward_scale: float, clip_range: float
) -> Tensor:
    """-alpha mean[(r - V) clip(rho, 1 - eps, 1 + eps)] -> scalar; beta mean[KL], the other term, needs no log-prob.

    The clip is a plain clamp, as in the released code: outside the range the gradient is zero, whichever way it points.
    """
    ratio = (log_probs - log_probs_old).exp().clamp(1 - clip_range, 1 + clip_range)
    return -reward_scale * ((rewards.unsqueeze(-1) - values) * ratio).mean()


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


class DPOK:
    """K updates, each on steps drawn at random from all trajectories of the epoch; the critic is trained first.

    NOT IN PAPER: the released code draws from the last 1000 steps, those of about two rounds, with replacement; here it is from
    the last round, without. The critic's text is the mean of the token states.

    text_of(cond): a vector of text_width for each of its rows.
    mu_ref(x_t, i, cond): the reference's means. all_sum_gradients: that of plumbing/processes.py.
    """

    CRITIC_BATCH, CRITIC_LEARNING_RATE = 256, 1e-4

    needs_reference = False  # its divergence asks for means, step by step

    def __init__(
        self, config: Config, policy: Policy, *, text_width: int, text_of: Callable[[Condition], Tensor],
        mu_ref: Callable[[Tensor, Tensor, Condition], Tensor], all_sum_gradients: Callable[[Iterable[nn.Parameter]], None],
    ):  # fmt: skip
        self.config, self.policy, self.text_of, self.mu_ref = config, policy, text_of, mu_ref
        self.all_sum_gradients = all_sum_gradients
        if config.kl_form == "eps_mse" and policy.schedule.alpha.min() == 0:
            raise ValueError("kl_form=eps_mse divides by alpha, which is 0 where this schedule begins: use --kl_form exact")
        self.critic_updates = 5
        torch.manual_seed(config.seed)
        inputs, steps = torch.Size(policy.latent_shape).numel() + text_width, len(policy.schedule.noisy)
        self.critic = Critic(inputs, steps).to(policy.device)
        self.optimizer = torch.optim.Adam(self.critic.parameters(), self.CRITIC_LEARNING_RATE)
        self.remembers = {"critic": self.critic, "optimizer": self.optimizer}

    def value(self, trajectories: Trajectories, rows: Tensor, columns: Tensor) -> Tensor:
        """V(x_t, c, t) of the entries (row, column), (n,) each, of this process's table -> (n,)."""
        x_t = trajectories.latents[rows, self.policy.schedule.noisy[columns]].to(self.policy.device, torch.float32)
        text = self.text_of(trajectories.cond)
        text = text[rows.to(text.device)].to(self.policy.device, torch.float32)
        return self.critic(x_t, text, columns.to(self.policy.device))

    def train_critic(self, epoch: Epoch) -> None:
        """Squared error of V to the final reward, on random steps of all trajectories; every process takes those it holds."""
        generator = stream(self.config.seed, epoch.epoch)
        for _ in range(self.critic_updates):
            rows = torch.randint(epoch.rewards.numel(), (self.CRITIC_BATCH,), generator=generator)
            columns = torch.randint(epoch.log_probs_old.shape[-1], (self.CRITIC_BATCH,), generator=generator)
            here = torch.isin(rows, epoch.share.rows)
            self.optimizer.zero_grad()
            values = self.value(epoch.mine, torch.searchsorted(epoch.share.rows, rows[here]), columns[here])
            error = values - epoch.rewards.flatten()[rows[here]].to(values)
            ((error**2).sum() / self.CRITIC_BATCH).backward()
            self.all_sum_gradients(self.critic.parameters())
            self.optimizer.step()

    @torch.no_grad()
    def values(self, epoch: Epoch) -> Tensor:
        """V of every entry of the table of all processes, (N, B, S)."""
        mine = epoch.mine.log_probs.shape
        every = torch.ones(mine).nonzero().split(self.CRITIC_BATCH)
        values = epoch.share.all_gather(lambda: torch.cat([self.value(epoch.mine, *some.unbind(1)) for some in every]).view(mine))
        return values.view_as(epoch.log_probs_old).to(epoch.log_probs_old)

    def divergence(self, x_t: Tensor, i: Tensor, cond: Condition, mu: Tensor, sigma: Tensor) -> Tensor:
        """How far single steps are from the reference's, (M, C, H, W) -> (M,), with gradient through mu; --kl_form."""
        mu_ref, schedule = self.mu_ref(x_t, i, cond), self.policy.schedule
        if self.config.kl_form == "exact":
            return exact_kl(mu, mu_ref, sigma, self.policy.log_prob_reduction)
        k = schedule.weights[1] - schedule.alpha[1:] * schedule.s[:-1] / schedule.alpha[:-1]
        return noise_difference(mu, mu_ref, k[i].to(mu).view(-1, 1, 1, 1)).flatten(1).double().mean(1)

    def entries(self, N: int, B: int, S: int, epoch: int) -> list[Tensor]:
        config, order = self.config, torch.randperm(N * B * S, generator=stream(self.config.seed, epoch))
        parts = (order.roll(-k * config.steps_per_update)[: config.steps_per_update] for k in range(config.updates_per_epoch))
        return parts_of_table(parts, N * B * S, N, B, S)

    def updates(self, epoch: Epoch) -> Iterator[Update]:
        config, log_probs_old = self.config, epoch.log_probs_old
        values = torch.zeros_like(log_probs_old)
        if config.critic:
            self.train_critic(epoch)
            values = self.values(epoch)
        rewards = epoch.rewards.unsqueeze(-1).expand_as(log_probs_old)
        for entries in epoch.entries:

            def loss(log_probs: Tensor, entries=entries) -> Tensor:  # of these entries as trajectories of one step each
                tables = (table[entries].unsqueeze(-1) for table in (log_probs, log_probs_old))
                return dpok_loss(
                    *tables, rewards[entries], values[entries].unsqueeze(-1),
                    reward_scale=config.reward_scale, clip_range=config.clip_range,
                )  # fmt: skip

            yield Update(entries, loss, config.kl_weight / entries.sum().item(), self.divergence if config.kl_weight else None)
