"""DDIM trajectories with per-step log-probabilities (Sec. 2, Eq. 1-4).

A denoising step is a draw from a Gaussian policy,

    pi_theta(x_{t-1} | x_t, c) = N(mu_theta(x_t, c), sigma_t^2 I)                                       (Eq. 2)

whose mean comes from the guided UNet and whose sigma_t is fixed by the noise schedule. Everything the losses need to know
of the network is the table of log pi_theta(x_{t-1} | x_t, c), one entry per trajectory and step. This file draws
trajectories, fills that table at stored latents, and pushes the derivative of any function of it back into the weights.

Units: log-probs are averaged over the D = C*H*W latent dimensions by default, the convention of DDPO, which the paper's
epsilon (Eq. 20) and beta (Eq. 14) assume; `log_prob_reduction="sum"` is the log-density itself, in nats. The two differ by
the factor D: 1e-4 on the mean is 1.64 nats for Stable Diffusion (D = 16384) and 0.0256 nats for the toy model (D = 256).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dpok_loss import gaussian_kl
from pipeline import Embeddings, decode_latents, encode_prompts

REDUCTIONS = ("mean", "sum")
EVALUATION = 2**32 - 1  # stands in for the epoch where noise is for evaluation, so that no training epoch shares it


@dataclass(frozen=True)
class Policy:
    """pi_theta(x_{t-1} | x_t, c): a UNet, the noise schedule set to T steps, and how the two are used."""

    unet: UNet2DConditionModel
    scheduler: DDIMScheduler  # from ddim_scheduler()
    uncond: Embeddings  # of the empty prompt, first dimension 1
    guidance_scale: float = 5.0  # w of classifier-free guidance; 1 skips the unconditional half
    eta: float = 1.0
    log_prob_reduction: str = "mean"  # over latent dimensions: "mean" or "sum" (nats)
    autocast: torch.dtype | None = None  # for the UNet's forward pass only; None is the weights' own precision

    @property
    def latent_size(self) -> int:
        """D = C * H * W."""
        return self.unet.config.in_channels * self.unet.config.sample_size**2

    @property
    def in_nats(self) -> int:
        """What a log-prob of this policy has to be multiplied by to be in nats."""
        return self.latent_size if self.log_prob_reduction == "mean" else 1


@dataclass
class Trajectories:
    """M denoising trajectories x_T, ..., x_0; every latent is stored exactly as its log-prob saw it."""

    latents: Tensor  # (M, T+1, C, H, W), x_T first, x_0 last
    timesteps: Tensor  # (T,) of the scheduler, from noise to picture
    log_probs: Tensor  # (M, S); S = T less the steps without noise


def ddim_scheduler(config, num_steps: int, eta: float) -> DDIMScheduler:
    """The pipeline's noise schedule as a DDIMScheduler with T = num_steps; ValueError for what has no log-prob."""
    if eta <= 0:
        raise ValueError(f"eta must be > 0, not {eta}: a deterministic step has no log-prob (eta=1 is the paper's DDPM)")
    # A config that does not speak of clipping, as PNDM's, is of latents, which go beyond [-1, 1]. DDIM's default would clip them.
    scheduler = DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))
    limit = scheduler.config.num_train_timesteps
    if not 1 <= num_steps <= limit:
        raise ValueError(f"num_steps must be between 1 and {limit} for this scheduler, not {num_steps}")
    scheduler.set_timesteps(num_steps)
    if scheduler.timesteps.max() >= limit:
        raise ValueError(f"num_steps={num_steps} reaches past the scheduler's last timestep {limit - 1}: use fewer steps")
    if scheduler.config.thresholding:
        raise ValueError("dynamic thresholding is not supported: set thresholding to false in the scheduler's config")
    if not noisy_steps(scheduler, eta).numel():
        raise ValueError(f"num_steps={num_steps}: no step of this scheduler has noise, so there is no log-prob to train")
    return scheduler


def noise_levels(scheduler: DDIMScheduler, t: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """alpha_bar_t, alpha_bar_{t-1} and sigma_t of the steps from timesteps (M,), each (M, 1, 1, 1) in fp64.

    Their differences are small where steps are: what is made of them is rounded once, at the end.
    """
    t_prev = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha_bars = scheduler.alphas_cumprod.to(t.device).double()
    alpha_bar_t = alpha_bars[t].view(-1, 1, 1, 1)
    # The last step leads to final_alpha_cumprod: ask whether t_prev is negative before clamping it to an index.
    final = scheduler.final_alpha_cumprod.to(t.device).double()
    alpha_bar_prev = torch.where(t_prev < 0, final, alpha_bars[t_prev.clamp(min=0)]).view(-1, 1, 1, 1)
    sigma_t = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)).sqrt()
    return alpha_bar_t, alpha_bar_prev, sigma_t


def ddim_gaussian(scheduler: DDIMScheduler, model_output: Tensor, x_t: Tensor, t: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_{t-1} given x_t (Eq. 2; Eq. 12 and 16 of DDIM, arXiv 2010.02502).

    model_output, x_t: (M, C, H, W); t: (M,) timesteps. Returns mu (M, C, H, W) and sigma (M, 1, 1, 1), at least fp32.
    eta = 1 is the DDPM posterior, the paper's sampler: the same mean and the same variance.
    """
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    model_output, x_t = model_output.to(dtype), x_t.to(dtype)
    alpha_bar_t, alpha_bar_prev, sigma_t = noise_levels(scheduler, t, eta)
    epsilon_weight = (1 - alpha_bar_prev - sigma_t**2).clamp(min=0).sqrt()
    alpha_t, s_t, alpha_prev, epsilon_weight, sigma_t = (
        level.to(dtype)
        for level in (alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt(), alpha_bar_prev.sqrt(), epsilon_weight, sigma_t)
    )
    match scheduler.config.prediction_type:
        case "epsilon":
            x_0 = (x_t - s_t * model_output) / alpha_t
            epsilon = model_output
        case "v_prediction":
            x_0 = alpha_t * x_t - s_t * model_output
            epsilon = alpha_t * model_output + s_t * x_t
        case other:
            raise ValueError(f"prediction_type must be epsilon or v_prediction, not {other}")
    if scheduler.config.clip_sample:
        x_0 = x_0.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)

    return alpha_prev * x_0 + epsilon_weight * epsilon, sigma_t


def noisy_steps(scheduler: DDIMScheduler, eta: float) -> Tensor:
    """Indices (S,) into the T steps of those that draw noise.

    NOT IN PAPER: a step with sigma = 0, which some schedules end with, has no log-prob and is left out of the table.
    """
    nothing = torch.zeros(len(scheduler.timesteps), 1, 1, 1)
    _, sigma = ddim_gaussian(scheduler, nothing, nothing, scheduler.timesteps.cpu(), eta)
    return (sigma.flatten() > 0).nonzero().flatten()


def gaussian_log_prob(x_prev: Tensor, mu: Tensor, sigma: Tensor, reduction: str) -> Tensor:
    """log N(x_prev; mu, sigma^2 I) of each row, the mean or the sum over latent dimensions -> (M,) in fp64  (Eq. 3, 4)."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"log_prob_reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    log_prob = -((x_prev - mu) ** 2) / (2 * sigma**2) - sigma.log() - math.log(2 * math.pi) / 2
    # In fp64: the paper's small-scale epsilon, 1e-6, is within the rounding of an fp32 sum.
    return getattr(log_prob.flatten(1).double(), reduction)(1)


def guided_output(policy: Policy, x_t: Tensor, t: Tensor, cond: Embeddings) -> Tensor:
    """UNet output under classifier-free guidance, eps_u + w (eps_c - eps_u), combined in at least fp32 -> like x_t."""
    guided = policy.guidance_scale != 1
    if guided:
        cond = {k: torch.cat([policy.uncond[k].expand_as(v), v]) for k, v in cond.items()}
        x_in, t_in = torch.cat([x_t, x_t]), torch.cat([t, t])
    else:
        x_in, t_in = x_t, t
    with torch.autocast(x_t.device.type, policy.autocast or torch.bfloat16, enabled=policy.autocast is not None):
        # SDXL finds its pooled text and sizes in added_cond_kwargs; Stable Diffusion 1 and 2 ignore that argument.
        output = policy.unet(x_in, t_in, cond["encoder_hidden_states"], added_cond_kwargs=cond).sample
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    if not guided:
        return output
    unconditional, conditional = output.chunk(2)
    return unconditional + policy.guidance_scale * (conditional - unconditional)


def step_log_prob(policy: Policy, x_t: Tensor, x_prev: Tensor, t: Tensor, cond: Embeddings) -> Tensor:
    """log pi_theta(x_prev | x_t, c) at stored latents (M, C, H, W), timesteps (M,) -> (M,), with gradient if enabled."""
    mu, sigma = ddim_gaussian(policy.scheduler, guided_output(policy, x_t, t, cond), x_t, t, policy.eta)
    return gaussian_log_prob(x_prev, mu, sigma, policy.log_prob_reduction)


def noise_generator(seed: int, epoch: int, prompt: int, image: int, stream: int) -> torch.Generator:
    """The random stream of one trajectory: a function of its name alone, whatever the batch or the process."""
    state = np.random.SeedSequence((seed, epoch, prompt, image, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


@torch.no_grad()
def sample_trajectories(
    policy: Policy, cond: Embeddings, names: Sequence[tuple[int, int, int, int]], shared_x_T: bool, batch_size: int
) -> Iterator[Trajectories]:
    """Draws the trajectory of every row of cond (M prompts), batch_size at a time, and yields them in order.

    names: (seed, epoch, prompt index, image index) of each trajectory; its noise depends on nothing else.
    shared_x_T: the images of a prompt start from the same x_T, so that Z(c, x_T) cancels exactly in Eq. 9.
    """
    config, device = policy.unet.config, policy.unet.device
    noisy = set(noisy_steps(policy.scheduler, policy.eta).tolist())
    for start in range(0, len(names), batch_size):
        rows = slice(start, start + batch_size)
        batch, c = names[rows], {k: v[rows] for k, v in cond.items()}
        shape = (len(batch), config.in_channels, config.sample_size, config.sample_size)
        dtype = torch.promote_types(policy.unet.dtype, torch.float32)
        first = [noise_generator(s, e, n, 0 if shared_x_T else b, stream=0) for s, e, n, b in batch]
        later = [noise_generator(s, e, n, b, stream=1) for s, e, n, b in batch]
        latents, log_probs = [randn_tensor(shape, first, device, dtype)], []
        for i, t in enumerate(policy.scheduler.timesteps.to(device)):
            x_t, t = latents[-1], t.expand(len(batch))
            mu, sigma = ddim_gaussian(policy.scheduler, guided_output(policy, x_t, t, c), x_t, t, policy.eta)
            x_prev = mu
            if i in noisy:
                x_prev = mu + sigma * randn_tensor(shape, later, device, dtype)
                log_probs.append(gaussian_log_prob(x_prev, mu, sigma, policy.log_prob_reduction))
            latents.append(x_prev)
        yield Trajectories(torch.stack(latents, 1), policy.scheduler.timesteps, torch.stack(log_probs, 1))


def step_divergence(policy: Policy, reference, form: str, x_t: Tensor, t: Tensor, cond: Embeddings, mu: Tensor) -> Tensor:
    """How far single steps are from the reference's, (M, C, H, W) -> (M,), with gradient through mu.

    "exact": KL(pi_theta || pi_ref), its latent dimensions reduced as those of log-probs. "eps_mse": DPOK's released code, the
    mean squared difference of the predicted noises, (mu - mu_ref) / k_t with k_t = d mu / d eps. reference(policy) lends pi_ref.
    """
    with torch.no_grad(), reference(policy) as pi_ref:
        mu_ref, sigma = ddim_gaussian(policy.scheduler, guided_output(pi_ref, x_t, t, cond), x_t, t, policy.eta)
    if form == "exact":
        return getattr(gaussian_kl(mu, mu_ref, sigma).flatten(1).double(), policy.log_prob_reduction)(1)
    alpha_bar_t, alpha_bar_prev, sigma = noise_levels(policy.scheduler, t, policy.eta)
    k_t = (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt() - (alpha_bar_prev * (1 - alpha_bar_t) / alpha_bar_t).sqrt()
    return (((mu - mu_ref) / k_t.to(mu)) ** 2).flatten(1).double().mean(1)


def _entries(policy: Policy, latents: Tensor, cond: Embeddings, entries: Tensor, batch_size: int):
    """Yields (rows, columns, x_t, x_prev, t, cond) for the (row, column) entries (K, 2) of the table, batch_size at a time."""
    steps = noisy_steps(policy.scheduler, policy.eta)
    device = policy.unet.device
    for start in range(0, len(entries), batch_size):
        rows, columns = entries[start : start + batch_size].unbind(1)
        i = steps[columns]
        x_t, x_prev = latents[rows, i].to(device), latents[rows, i + 1].to(device)
        t = policy.scheduler.timesteps[i].to(device)
        yield rows, columns, x_t, x_prev, t, {k: v[rows.to(v.device)] for k, v in cond.items()}


@torch.no_grad()
def log_prob_table(policy: Policy, latents: Tensor, cond: Embeddings, batch_size: int, entries: Tensor | None = None) -> Tensor:
    """log pi_theta(x_{t-1} | x_t, c) of every stored step, without gradient: latents (M, T+1, ...) -> (M, S) on the CPU.

    entries: (M, S) bool, those that are wanted; the others are zero.
    """
    table = torch.zeros(len(latents), len(noisy_steps(policy.scheduler, policy.eta)), dtype=torch.float64)
    wanted = (torch.ones_like(table) if entries is None else entries).nonzero()
    for rows, columns, x_t, x_prev, t, c in _entries(policy, latents, cond, wanted, batch_size):
        table[rows, columns] = step_log_prob(policy, x_t, x_prev, t, c).cpu()
    return table


def rounding(policy: Policy, latents: Tensor, cond: Embeddings, batch_size: int) -> Tensor:
    """How far log-ratios at unchanged weights are from zero -> largest deviation of each step (S,), in the unit of log-probs.

    The policy's own precision and batches are compared with fp32 and one entry at a time. A clip range below this is noise.
    """
    exact = dataclasses.replace(policy, autocast=None)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    used = log_prob_table(policy, latents, cond, batch_size)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    deviation = used - log_prob_table(exact, latents, cond, 1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    return deviation.abs().amax(0)


def backward_through_table(
    policy: Policy, latents: Tensor, cond: Embeddings, table_grad: Tensor, batch_size: int,
    kl_grad: Tensor | None = None, divergence: Callable | None = None,
) -> Tensor:  # fmt: skip
    """Adds sum_{m,t} (d loss / d log_prob_{m,t}) * (d log_prob_{m,t} / d theta) to the gradients of the UNet.

    A loss sees the network only through the (M, S) table, so by the chain rule this is its exact gradient, while only
    batch_size single steps are ever held in memory, whatever T and B. Entries with zero derivative (clipped) cost nothing.
    The same for a loss with a (M, S) table of divergences: kl_grad is its derivative by it, divergence(x_t, t, cond, mu) -> (M,).
    Returns the recomputed log-probs (M, S), NaN where skipped: at unchanged weights they must equal the table's.
    """
    recomputed = torch.full_like(table_grad, math.nan)
    used = table_grad != 0 if kl_grad is None else (table_grad != 0) | (kl_grad != 0)
    for rows, columns, x_t, x_prev, t, c in _entries(policy, latents, cond, used.nonzero(), batch_size):
        mu, sigma = ddim_gaussian(policy.scheduler, guided_output(policy, x_t, t, c), x_t, t, policy.eta)
        log_prob = gaussian_log_prob(x_prev, mu, sigma, policy.log_prob_reduction)
        total = (log_prob * table_grad[rows, columns].to(log_prob)).sum()
        if kl_grad is not None:
            total = total + (divergence(x_t, t, c, mu) * kl_grad[rows, columns].to(log_prob)).sum()
        total.backward()
        recomputed[rows, columns] = log_prob.detach().cpu().to(recomputed.dtype)
    return recomputed


def sample_images(policy: Policy, pipe, prompts: list[str], names: Sequence[tuple], batch_size: int) -> Tensor:
    """Pictures of the prompts, one each, without keeping trajectories -> (M, 3, height, width) on the CPU, float in [0, 1]."""
    images = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        (batch,) = sample_trajectories(policy, encode_prompts(pipe, prompts[rows]), names[rows], False, batch_size)
        images.append(decode_latents(pipe, batch.latents[:, -1]).cpu())
    return torch.cat(images)
