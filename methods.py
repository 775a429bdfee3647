"""The methods as the training loop knows them: a number of updates on the tables of an epoch.

When the trajectories of an epoch are drawn and scored, a method yields its updates one after the other. Each names the entries of
the (N, B, S) table of log-probs it is over, and gives the loss as a function of that table; the loop does the rest. A further
method is one more file, with its loss and a class like these, and one line in config.METHODS.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Config
from d3po_loss import d3po_loss
from ddpo_loss import PromptStatistics, batch_advantages, importance_sampling_loss, score_function_loss
from dpok_loss import Critic, dpok_loss
from pipeline import Embeddings
from processes import RANK, sum_gradients, together
from rdp_loss import prdp_loss
from sampler import Policy, noisy_steps


@dataclass(frozen=True)
class Epoch:
    """What a method may know of an epoch. Tables and rewards are of all processes, latents and cond of this one."""

    prompts: list[str]  # N
    rewards: Tensor  # (N, B)
    log_probs_old: Tensor  # (N, B, S)
    log_probs_ref: Tensor  # (N, B, S)
    latents: Tensor  # (M, T+1, C, H, W) of this process's M trajectories
    cond: Embeddings  # of the same
    seed: int  # of this epoch, the same in every process

    def shuffled(self, number: int) -> Tensor:
        """A random order of `number` things, the same in every process."""
        return torch.randperm(number, generator=torch.Generator().manual_seed(self.seed))


@dataclass(frozen=True)
class Update:
    """One gradient update: the entries it is over, its loss, and the weight in it of the divergence of every such entry."""

    entries: Tensor  # (N, B, S), bool
    loss: Callable[[Tensor], Tensor]  # of the (N, B, S) log-probs under theta -> scalar
    kl_weight: float = 0.0


class Method:
    """What all have in common beside updates(epoch), which yields the Updates of an epoch.

    One that remembers something beyond an epoch returns it from state(), which checkpoints keep.
    """

    def __init__(self, config: Config, policy: Policy):
        self.config = config

    def state(self) -> dict:
        return {}

    def load_state(self, state: dict) -> None:
        pass


class PRDP(Method):
    """K updates on all pairs (Algorithm 1)."""

    def updates(self, epoch: Epoch) -> Iterator[Update]:
        def loss(log_probs: Tensor) -> Tensor:
            return prdp_loss(
                log_probs, epoch.log_probs_old, epoch.log_probs_ref, epoch.rewards, kl_weight=self.config.kl_weight,
                clip_range=self.config.clip_range, step_reduction=self.config.step_reduction,
            )  # fmt: skip

        for _ in range(self.config.updates_per_epoch):
            yield Update(torch.ones_like(epoch.log_probs_old, dtype=torch.bool), loss)


class DDPO(Method):
    """K disjoint minibatches of trajectories, one update on each; with --score_function one update on all."""

    def __init__(self, config: Config, policy: Policy):
        super().__init__(config, policy)
        self.statistics = PromptStatistics(config.statistics_size, config.statistics_min_count)

    def updates(self, epoch: Epoch) -> Iterator[Update]:
        config, rows = self.config, epoch.rewards.numel()
        if config.reward_statistics == "prompt":
            advantages = self.statistics.advantages(epoch.prompts, epoch.rewards, config.advantage_limit)
        else:
            advantages = batch_advantages(epoch.rewards, config.advantage_limit)
        for some in epoch.shuffled(rows).tensor_split(min(config.updates_per_epoch, rows)):
            entries = torch.zeros(rows, dtype=torch.bool).index_fill(0, some, True).view_as(epoch.rewards)

            def loss(log_probs: Tensor, entries=entries) -> Tensor:
                if config.score_function:
                    return score_function_loss(log_probs[entries], advantages[entries])
                old = epoch.log_probs_old[entries]
                return importance_sampling_loss(log_probs[entries], old, advantages[entries], config.clip_range)

            yield Update(entries.unsqueeze(-1).expand_as(epoch.log_probs_old), loss)

    def state(self) -> dict:
        return {"rewards": self.statistics.remembered}

    def load_state(self, state: dict) -> None:
        self.statistics.remembered = state["rewards"]


class D3PO(Method):
    """K disjoint minibatches of pairs of trajectories, one update on each."""

    def updates(self, epoch: Epoch) -> Iterator[Update]:
        config, pairs = self.config, epoch.rewards.numel() // 2
        in_pairs = [table.reshape(pairs, 2, -1) for table in (epoch.log_probs_ref, epoch.rewards)]
        for some in epoch.shuffled(pairs).tensor_split(min(config.updates_per_epoch, pairs)):
            entries = torch.zeros(pairs, dtype=torch.bool).index_fill(0, some, True)

            def loss(log_probs: Tensor, some=some) -> Tensor:
                ref, rewards = (table[some] for table in in_pairs)
                chosen = log_probs.reshape(pairs, 2, -1)[some]
                return d3po_loss(chosen, ref, rewards.squeeze(-1), kl_weight=config.kl_weight, clip_range=config.clip_range)

            rows = entries.repeat_interleave(2).view_as(epoch.rewards)
            yield Update(rows.unsqueeze(-1).expand_as(epoch.log_probs_old), loss)


class DPOK(Method):
    """K updates, each on steps drawn at random from all trajectories of the epoch; the critic is trained first.

    NOT IN PAPER: the released code draws from the last 1000 steps, those of about two rounds, with replacement; here it is from
    the last round, without. The critic's text is the mean of the token states.
    """

    CRITIC_UPDATES, CRITIC_BATCH, CRITIC_LEARNING_RATE = 5, 256, 1e-4

    def __init__(self, config: Config, policy: Policy):
        super().__init__(config, policy)
        self.device = policy.unet.device
        self.steps = noisy_steps(policy.scheduler, policy.eta)
        torch.manual_seed(config.seed)
        inputs = policy.latent_size + policy.uncond["encoder_hidden_states"].shape[-1]
        self.critic = Critic(inputs, len(self.steps)).to(self.device)
        self.optimizer = torch.optim.Adam(self.critic.parameters(), self.CRITIC_LEARNING_RATE)

    def value(self, epoch: Epoch, entries: Tensor) -> Tensor:
        """V(x_t, c, t) of (row, column) entries (n, 2) of this process -> (n,)."""
        rows, columns = entries.unbind(1)
        text = epoch.cond["encoder_hidden_states"].mean(1)
        x_t = epoch.latents[rows, self.steps[columns]].to(self.device, torch.float32)
        return self.critic(x_t, text[rows.to(text.device)].to(self.device, torch.float32), columns.to(self.device))

    def train_critic(self, epoch: Epoch) -> None:
        """Squared error of V to the final reward, on random steps of all trajectories; every process takes those it holds."""
        generator, held = torch.Generator().manual_seed(epoch.seed), len(epoch.latents)
        for _ in range(self.CRITIC_UPDATES):
            rows = torch.randint(epoch.rewards.numel(), (self.CRITIC_BATCH,), generator=generator)
            columns = torch.randint(len(self.steps), (self.CRITIC_BATCH,), generator=generator)
            mine = rows // held == RANK
            self.optimizer.zero_grad()
            values = self.value(epoch, torch.stack([rows[mine] % held, columns[mine]], 1))
            error = values - epoch.rewards.flatten()[rows[mine]].to(values)
            ((error**2).sum() / self.CRITIC_BATCH).backward()
            sum_gradients(self.critic.parameters())
            self.optimizer.step()

    def updates(self, epoch: Epoch) -> Iterator[Update]:
        config, old = self.config, epoch.log_probs_old
        values = torch.zeros_like(old)
        if config.critic:
            self.train_critic(epoch)
            every = torch.ones(len(epoch.latents), len(self.steps)).nonzero().split(self.CRITIC_BATCH)
            with torch.no_grad():
                values = together(lambda: torch.cat([self.value(epoch, part) for part in every])).view_as(old).to(old)
        order = epoch.shuffled(old.numel())
        number = min(config.steps_per_update, len(order))
        for k in range(config.updates_per_epoch):
            some = order.roll(-k * number)[:number]
            entries = torch.zeros(old.numel(), dtype=torch.bool).index_fill(0, some, True).view_as(old)

            def loss(log_probs: Tensor, entries=entries) -> Tensor:
                rewards = epoch.rewards.unsqueeze(-1).expand_as(old)[entries]
                now, before, value = (table[entries].unsqueeze(-1) for table in (log_probs, old, values))
                return dpok_loss(
                    now, before, torch.zeros(1), rewards, value,
                    reward_scale=config.reward_scale, kl_weight=0.0, clip_range=config.clip_range,
                )  # fmt: skip

            yield Update(entries, loss, config.kl_weight / number)

    def state(self) -> dict:
        return {"critic": self.critic.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict) -> None:
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
