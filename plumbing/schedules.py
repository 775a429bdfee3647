"""The schedulers of diffusers as the sampler's noise levels."""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from sampler import Schedule, Weights, ddim

Scheduler = DDIMScheduler | LCMScheduler | FlowMatchEulerDiscreteScheduler


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


def flow_scheduler(config: Mapping, num_steps: int, patches: int) -> FlowMatchEulerDiscreteScheduler:
    """A rectified flow's scheduler at T = num_steps, with the shift that it has for so many patches of a picture.

    The levels before the shift are 1, 1 - 1/T, ..., 1/T, as FluxPipeline has them. OURS for Stable Diffusion 3, whose pipeline
    ends at 1/1000: the step to that level is all but invisible, and its log-prob would outweigh all others'.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    limit = scheduler.config.num_train_timesteps
    if not 1 <= num_steps <= limit:
        raise ValueError(f"num_steps must be between 1 and {limit} for this scheduler, not {num_steps}")
    shifts = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    shift = calculate_shift(patches, *(scheduler.config.get(name, usual) for name, usual in shifts.items()))
    dynamic = {"mu": shift} if scheduler.config.use_dynamic_shifting else {}
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), **dynamic)
    return scheduler


def scheduler_at(scheduler: SchedulerMixin, num_steps: int, patches: int = 0) -> Scheduler:
    """What draws a pipeline's pictures in T = num_steps: LCM and flows have their own, all others DDIM."""
    match scheduler:
        case LCMScheduler():
            return lcm_scheduler(scheduler.config, num_steps)
        case FlowMatchEulerDiscreteScheduler():
            return flow_scheduler(scheduler.config, num_steps, patches)
    return ddim_scheduler(scheduler.config, num_steps)


def consistency(schedule: Schedule) -> Weights:
    """The rule of consistency models: a step goes to x_0, and all noise is drawn anew; eta is not read."""
    return schedule.alpha[1:], torch.zeros_like(schedule.s[1:]), schedule.s[1:]


def levels(scheduler: Scheduler, eta: float) -> Schedule:
    """The levels of a scheduler's steps, each ending where the next begins."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigmas = scheduler.sigmas.double()
        return Schedule(scheduler.timesteps, 1 - sigmas, sigmas, eta, "flow")
    # Where T does not divide the number of training steps DDIMScheduler itself ends a step at t - 1000 // T, another level.
    # LCMScheduler's c_skip and c_out are 0 and 1 to five digits at all its timesteps, and are left out.
    lcm = isinstance(scheduler, LCMScheduler)
    last = torch.ones(1) if lcm else scheduler.final_alpha_cumprod.view(1)
    alpha_bar = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], last]).double()
    return Schedule(
        scheduler.timesteps, alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), eta, scheduler.config.prediction_type,
        scheduler.config.clip_sample_range if scheduler.config.clip_sample else math.inf,
        consistency if lcm else ddim,
    )  # fmt: skip


def noise_schedule(scheduler: Scheduler, eta: float, device: torch.device | str = "cpu") -> Schedule:
    """The Schedule of a scheduler; ValueError for noise that it has not."""
    if isinstance(scheduler, LCMScheduler) and eta != 1:
        raise ValueError(f"eta must be 1 for a consistency model, whose steps draw all noise anew, not {eta}")
    if eta < 0:
        raise ValueError(f"eta must be at least 0, not {eta} (1 is the paper's DDPM, 0 has no noise)")
    schedule = levels(scheduler, eta)
    sigma = schedule.weights[2]
    if (sigma > schedule.s[1:] * (1 + 1e-9)).any():
        most = (schedule.s[1:] / sigma)[schedule.noisy].min().item() * eta
        raise ValueError(
            f"eta={eta} asks for more noise than a step of this schedule leaves: use at most {math.floor(100 * most) / 100:g}"
        )
    on_device = {name: getattr(schedule, name).to(device) for name in ("timesteps", "alpha", "s")}
    return replace(schedule, **on_device)
