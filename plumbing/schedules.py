"""The schedulers of diffusers as the sampler's noise levels."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from diffusers import DDIMScheduler, LCMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from sampler import Schedule, Weights, ddim


def ddim_scheduler(config: Mapping, num_steps: int) -> DDIMScheduler:
    """The pipeline's noise schedule as a DDIMScheduler with T = num_steps; ValueError for a T it has not, or thresholding."""
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
    return scheduler


def lcm_scheduler(config: Mapping, num_steps: int) -> LCMScheduler:
    """The scheduler of a latent consistency model at T = num_steps, of the steps it was distilled on; ValueError for others."""
    scheduler = LCMScheduler.from_config(config)
    limit = scheduler.config.original_inference_steps
    if not 1 <= num_steps <= limit:
        raise ValueError(f"num_steps must be between 1 and {limit} for this consistency model, not {num_steps}")
    scheduler.set_timesteps(num_steps)
    return scheduler


def scheduler_at(scheduler: SchedulerMixin, num_steps: int) -> DDIMScheduler | LCMScheduler:
    """What draws a pipeline's pictures in T = num_steps: LCM for a consistency model, which comes with that, otherwise DDIM."""
    return (lcm_scheduler if isinstance(scheduler, LCMScheduler) else ddim_scheduler)(scheduler.config, num_steps)


def consistency(schedule: Schedule) -> Weights:
    """The rule of consistency models: a step goes to x_0, and all noise is drawn anew; eta is not read."""
    return schedule.alpha[1:], torch.zeros_like(schedule.s[1:]), schedule.s[1:]


def noise_schedule(scheduler: DDIMScheduler | LCMScheduler, eta: float, device: torch.device | str = "cpu") -> Schedule:
    """The levels of a scheduler's steps, each ending where the next begins; ValueError for noise that it has not.

    Where T does not divide the number of training steps DDIMScheduler itself ends a step at t - 1000 // T, another level.
    LCMScheduler's c_skip and c_out are 0 and 1 to five digits at all its timesteps, and are left out.
    """
    lcm = isinstance(scheduler, LCMScheduler)
    if lcm and eta != 1:
        raise ValueError(f"eta must be 1 for a consistency model, whose steps draw all noise anew, not {eta}")
    if eta <= 0:
        raise ValueError(f"eta must be > 0, not {eta}: a deterministic step has no log-prob (eta=1 is the paper's DDPM)")
    last = torch.ones(1) if lcm else scheduler.final_alpha_cumprod.view(1)
    alpha_bar = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], last]).double()
    schedule = Schedule(
        scheduler.timesteps, alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), eta, scheduler.config.prediction_type,
        scheduler.config.clip_sample_range if scheduler.config.clip_sample else math.inf,
        consistency if lcm else ddim,
    )  # fmt: skip
    sigma = schedule.weights[2]
    if (sigma > schedule.s[1:] * (1 + 1e-9)).any():
        most = (schedule.s[1:] / sigma)[schedule.noisy].min().item() * eta
        raise ValueError(
            f"eta={eta} asks for more noise than a step of this schedule leaves: use at most {math.floor(100 * most) / 100:g}"
        )
    on_device = {name: getattr(schedule, name).to(device) for name in ("timesteps", "alpha", "s")}
    return replace(schedule, **on_device)
