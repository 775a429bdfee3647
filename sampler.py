"""Denoising trajectories with per-step log-probabilities (Sec. 2, Eq. 1-4).

A denoising step is a draw from a Gaussian policy,

    pi_theta(x_{t-1} | x_t, c) = N(mu_theta(x_t, c), sigma_t^2 I)                                       (Eq. 2)

whose mean comes from the network and whose sigma_t is fixed by the noise schedule. All the losses need to know of the network is
the table of log pi_theta(x_{t-1} | x_t, c), an entry per trajectory and step. This file draws trajectories, fills that table at
stored latents, and pushes the derivative of any function of it back into the weights. It knows no network: a policy denoises, a
condition can be indexed by rows, and plumbing/networks.py has both.

Letters: M trajectories of one process, T steps, S of them with noise (all, unless the schedule ends without), D = C*H*W.
Units: log-probs are means over the D latent dimensions, as the paper's epsilon (Eq. 20) and beta (Eq. 14) assume, or with
`log_prob_reduction="sum"` in nats. 1e-4 on the mean is 1.64 nats for Stable Diffusion (D = 16384), 0.0768 for the miniature.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

REDUCTIONS = {"mean": torch.mean, "sum": torch.sum}
EVALUATION = 2**32 - 1  # stands in for the epoch where noise is for evaluation, so that no training epoch shares it
Condition = Any  # what the network is conditioned on, a row per trajectory; cond[rows], by tensor or slice, is one again
Weights = tuple[Tensor, Tensor, Tensor]  # of a schedule's steps: of x_0 and of epsilon in mu, and sigma, (T,) each


def ddim(schedule: "Schedule") -> Weights:
    """sigma = eta s' sqrt(1 - (alpha s' / alpha' s)^2), and the rest of s' for epsilon (Eq. 12, 16 of DDIM, arXiv 2010.02502).

    eta = 1 is the DDPM posterior, the paper's sampler: the same mean and the same variance. eta = 0 has no noise.
    """
    alpha, s, alpha_prev, s_prev = schedule.alpha[:-1], schedule.s[:-1], schedule.alpha[1:], schedule.s[1:]
    sigma = schedule.eta * s_prev * (1 - (alpha * s_prev / (alpha_prev * s)) ** 2).clamp(min=0).sqrt()
    return alpha_prev, (s_prev**2 - sigma**2).clamp(min=0).sqrt(), sigma


@dataclass(frozen=True)
class Schedule:
    """The noise levels of T steps: before step i the latent is alpha[i] x_0 + s[i] epsilon, after it alpha[i+1] x_0 + ...

    A variance-preserving diffusion has (alpha, s) = (sqrt(alpha_bar), sqrt(1 - alpha_bar)), a rectified flow (1 - t, t).
    """

    timesteps: Tensor  # (T,) what the network is told, from noise to picture
    alpha: Tensor  # (T+1,) fp64
    s: Tensor  # (T+1,) fp64
    eta: float = 1.0  # noise of a step relative to DDPM's
    prediction_type: str = "epsilon"  # what the network puts out: epsilon, v_prediction or flow
    x_0_limit: float = math.inf  # predicted x_0 are clipped to this
    rule: Callable[["Schedule"], Weights] = ddim  # how a step is made of predicted x_0, predicted epsilon and noise

    @cached_property
    def weights(self) -> Weights:
        return self.rule(self)

    @cached_property
    def noisy(self) -> Tensor:
        """Indices (S,) of the steps with noise, on the CPU. NOT IN PAPER: one with sigma = 0 has no log-prob, and no entry."""
        return self.weights[2].cpu().nonzero().flatten()


@dataclass(frozen=True)
class Policy:
    """pi_theta(x_{t-1} | x_t, c): a network, whatever it is, and the schedule by which it denoises."""

    denoise: Callable[[Tensor, Tensor, Condition], Tensor]  # (x_t, timesteps (M,), cond) -> guided output like x_t, >= fp32
    schedule: Schedule
    latent_shape: tuple[int, int, int]  # C, H, W
    device: torch.device
    dtype: torch.dtype = torch.float32  # of latents
    log_prob_reduction: str = "mean"  # over latent dimensions: "mean" or "sum" (nats)

    @property
    def in_nats(self) -> int:
        """What a log-prob of this policy has to be multiplied by to be in nats."""
        return math.prod(self.latent_shape) if self.log_prob_reduction == "mean" else 1


@dataclass(frozen=True)
class Trajectories:
    """M denoising trajectories x_T, ..., x_0; every latent is stored exactly as its log-prob saw it."""

    cond: Condition  # M rows
    latents: Tensor  # (M, T+1, C, H, W), x_T first, x_0 last
    log_probs: Tensor  # (M, S) under the policy that drew them, on the CPU

    @property
    def x_0(self) -> Tensor:
        return self.latents[:, -1]


def gaussian(policy: Policy, x_t: Tensor, i: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
    """mu (M, C, H, W) and sigma (M, 1, 1, 1) of x_{t-1} given x_t (M, C, H, W), at least fp32 (Eq. 2); i: (M,) their steps."""
    schedule = policy.schedule
    output = policy.denoise(x_t, schedule.timesteps[i], cond)
    x_t = x_t.to(output.dtype)
    of_steps = (levels[i].to(x_t).view(-1, 1, 1, 1) for levels in (schedule.alpha, schedule.s, *schedule.weights))
    alpha_t, s_t, x_0_weight, epsilon_weight, sigma = of_steps
    match schedule.prediction_type:
        case "epsilon":
            x_0 = (x_t - s_t * output) / alpha_t
            epsilon = output
        case "v_prediction":
            x_0 = alpha_t * x_t - s_t * output
            epsilon = alpha_t * output + s_t * x_t
        case "flow":  # the velocity epsilon - x_0
            x_0 = x_t - s_t * output
            epsilon = x_t + alpha_t * output
        case other:
            raise ValueError(f"prediction_type must be epsilon, v_prediction or flow, not {other}")
    x_0 = x_0.clamp(-schedule.x_0_limit, schedule.x_0_limit)
    return x_0_weight * x_0 + epsilon_weight * epsilon, sigma


def gaussian_log_prob(x_prev: Tensor, mu: Tensor, sigma: Tensor, reduction: str) -> Tensor:
    """log N(x_prev; mu, sigma^2 I) of each row, the mean or the sum over latent dimensions -> (M,) in fp64  (Eq. 3, 4)."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"log_prob_reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    log_prob = -((x_prev - mu) ** 2) / (2 * sigma**2) - sigma.log() - math.log(2 * math.pi) / 2
    return REDUCTIONS[reduction](log_prob.flatten(1).double(), 1)  # the paper's epsilon of 1e-6 is within an fp32 sum's rounding


def noise_generator(seed: int, epoch: int, prompt: int, image: int, stream: int) -> torch.Generator:
    """The random stream of one trajectory: a function of its name alone, whatever the batch or the process."""
    state = np.random.SeedSequence((seed, epoch, prompt, image, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw_noise(policy: Policy, names: Sequence[tuple[int, ...]], count: int) -> Tensor:
    """(M, count, C, H, W); that of a picture depends on its name (seed, epoch, prompt, image, stream) alone."""
    generators = [noise_generator(*name) for name in names]
    noise = [torch.randn(count, *policy.latent_shape, generator=g, dtype=policy.dtype) for g in generators]
    return torch.stack(noise).to(policy.device)


@torch.no_grad()
def sample_trajectories(
    policy: Policy, cond: Condition, names: Sequence[tuple[int, int, int, int]], batch_size: int, *,
    shared_x_T: bool = False, keep_on: torch.device | str | None = None,
) -> Trajectories:  # fmt: skip
    """Draws the trajectory of every row of cond, batch_size at a time.

    names: (seed, epoch, prompt index, image index) of each of the M trajectories; its noise depends on nothing else.
    shared_x_T: the images of a prompt start from the same x_T, so that Z(c, x_T) cancels exactly in Eq. 9.
    keep_on: where the latents are kept; by default where they are drawn.
    """
    noisy, latents, log_probs = policy.schedule.noisy.tolist(), [], []
    for start in range(0, len(names), batch_size):
        batch, c = names[start : start + batch_size], cond[start : start + batch_size]
        first = [(seed, epoch, n, 0 if shared_x_T else b, 0) for seed, epoch, n, b in batch]
        # The CPU's noise, the same whatever the device, and all of it before the steps: between them a GPU never waits.
        x, noise = [draw_noise(policy, first, 1)[:, 0]], draw_noise(policy, [(*name, 1) for name in batch], len(noisy))
        log_prob = torch.empty(len(batch), len(noisy), dtype=torch.float64, device=policy.device)
        for i in range(len(policy.schedule.timesteps)):
            mu, sigma = gaussian(policy, x[-1], torch.full((len(batch),), i, device=policy.device), c)
            x.append(mu)
            if i in noisy:
                x[-1] = mu + sigma * noise[:, noisy.index(i)]
                log_prob[:, noisy.index(i)] = gaussian_log_prob(x[-1], mu, sigma, policy.log_prob_reduction)
        latents.append(torch.stack(x, 1).to(keep_on or policy.device))
        log_probs.append(log_prob)
    return Trajectories(cond, torch.cat(latents), torch.cat(log_probs).cpu())


def _batches(policy: Policy, trajectories: Trajectories, entries: Tensor, batch_size: int) -> Iterator[tuple]:
    """Yields (which, x_t, x_{t-1}, i, cond) of the wanted entries (M, S) of the table in their order, batch_size at a time."""
    latents = trajectories.latents
    wanted, noisy = (places.to(latents.device) for places in (entries.nonzero(), policy.schedule.noisy))
    for start in range(0, len(wanted), batch_size):
        which = slice(start, start + batch_size)
        rows, columns = wanted[which].unbind(1)
        i = noisy[columns]
        x_t, x_prev = (latents[rows, at].to(policy.device) for at in (i, i + 1))
        yield which, x_t, x_prev, i.to(policy.device), trajectories.cond[rows]


def _table(wanted: Tensor, log_probs: list[Tensor]) -> Tensor:
    """(M, S) in fp64 on the CPU of the wanted entries' log-probs, given in their order by batch; NaN elsewhere."""
    table = torch.full(wanted.shape, math.nan, dtype=torch.float64)
    return table.masked_scatter(wanted, torch.cat(log_probs).cpu()) if log_probs else table


@torch.no_grad()
def log_prob_table(policy: Policy, trajectories: Trajectories, batch_size: int, entries: Tensor | None = None) -> Tensor:
    """log pi_theta(x_{t-1} | x_t, c) of every stored step, or of `entries` (M, S) alone, without gradient -> as in _table."""
    wanted = torch.ones(trajectories.log_probs.shape, dtype=torch.bool) if entries is None else entries
    return _table(wanted, [
        gaussian_log_prob(x_prev, *gaussian(policy, x_t, i, cond), policy.log_prob_reduction)
        for _, x_t, x_prev, i, cond in _batches(policy, trajectories, wanted, batch_size)
    ])  # fmt: skip


def backward_through_table(
    policy: Policy, trajectories: Trajectories, table_grad: Tensor, batch_size: int,
    kl: Callable[[Tensor, Tensor, Condition, Tensor, Tensor], Tensor] | None = None, kl_grad: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Adds sum_{m,t} (d loss / d log_prob_{m,t}) * (d log_prob_{m,t} / d theta) to the gradients of the network.

    A loss sees the network only through the (M, S) table, so by the chain rule this is its exact gradient, while only batch_size
    single steps are ever held in memory, whatever T and B. Entries with zero derivative (clipped) cost nothing. The same for a
    (M, S) table of divergences of single steps: kl(x_t, i, cond, mu, sigma) -> (M,) makes its entries, kl_grad is the derivative
    by it. Returns the recomputed log-probs (M, S), NaN where skipped: at unchanged weights they must equal the table's.
    """
    log_probs = []
    used = table_grad != 0 if kl is None else (table_grad != 0) | (kl_grad != 0)
    weights, kl_weights = (None if grad is None else grad[used].to(policy.device) for grad in (table_grad, kl_grad))
    for which, x_t, x_prev, i, cond in _batches(policy, trajectories, used, batch_size):
        mu, sigma = gaussian(policy, x_t, i, cond)
        log_prob = gaussian_log_prob(x_prev, mu, sigma, policy.log_prob_reduction)
        of_kl = 0 if kl is None else (kl(x_t, i, cond, mu, sigma) * kl_weights[which]).sum()
        ((log_prob * weights[which]).sum() + of_kl).backward()
        log_probs.append(log_prob.detach())
    return _table(used, log_probs)
