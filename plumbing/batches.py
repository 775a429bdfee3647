"""Batch sizes that fit themselves: `--sample_batch_size auto` and the like.

On a GPU each is doubled, before the first epoch, until a pass of that kind takes more memory than there is, beside what the run
will hold all along: the epoch's latents, gradients and the optimiser's moments. On a CPU they are a fixed number.
"""

import dataclasses
from collections.abc import Callable

import torch

from config import AUTO, Config
from plumbing.pipeline import encode_prompts, score
from plumbing.processes import WORLD_SIZE, all_succeed, say
from plumbing.reward_models import Reward
from plumbing.trainable import Reference
from sampler import Policy, gaussian, gaussian_log_prob

ON_A_CPU = 64
HEADROOM = 0.9  # of the memory: what one pass takes is not what the allocator takes after a thousand


def fits(run: Callable[[int], object], size: int) -> bool:
    """Whether the GPU's memory is enough for run(size)."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        run(size)
    except torch.OutOfMemoryError:
        return False
    return torch.cuda.max_memory_reserved() <= HEADROOM * torch.cuda.mem_get_info()[1]


def largest(name: str, run: Callable[[int], object], limit: int) -> int:
    """The largest of 1, 2, 4, ... and the limit that fits; ValueError if not even one does."""
    size = 0
    while size < limit and fits(run, wanted := min(2 * size or 1, limit)):
        size = wanted
    if not size:
        raise ValueError(f"{name}: memory is not enough for a single one, see docs/stable-diffusion.md, On one GPU")
    return size


def fit_batches(
    config: Config, pipe, policy: Policy, reference: Reference, trained: list[torch.nn.Parameter], reward: Reward, prompt: str
) -> Config:
    """The settings with a number for every batch size that is auto, the same in every process."""
    steps, rows = len(policy.schedule.noisy), -(-config.prompts_per_epoch * config.images_per_prompt // WORLD_SIZE)
    cond = encode_prompts(pipe, [prompt])

    def inputs(size: int):
        x_t = torch.randn(size, *policy.latent_shape, device=policy.device, dtype=policy.dtype)
        first = torch.zeros(size, dtype=torch.long, device=policy.device)
        return x_t, first, cond[first]

    @torch.no_grad()
    def sample(size: int) -> None:
        gaussian(policy, *inputs(size))
        score(pipe, inputs(size)[0], [prompt] * size, reward, size)

    @torch.no_grad()
    def log_prob(size: int) -> None:
        with reference(policy) as pi_ref:
            gaussian(pi_ref, *inputs(size))

    def update(size: int) -> None:
        x_t, i, cond = inputs(size)
        gaussian_log_prob(x_t, *gaussian(policy, x_t, i, cond), policy.log_prob_reduction).sum().backward()

    def found() -> dict[str, int]:
        passes = {"sample": (sample, rows), "log_prob": (log_prob, rows * steps), "train": (update, rows * steps)}
        passes = {f"{name}_batch_size": run for name, run in passes.items()}
        sizes = {name: ON_A_CPU for name in passes if getattr(config, name) == AUTO}
        if policy.device.type == "cuda" and sizes:
            held = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]  # moments, for the time being
            if not config.latents_on_cpu:
                held.append(torch.empty(rows, config.num_steps + 1, *policy.latent_shape, device=policy.device))
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            sizes = {name: largest(name, *passes[name]) for name in sizes}
            for parameter in trained:
                parameter.grad = None
        return sizes

    everywhere = all_succeed(found)
    sizes = {name: min(of_one[name] for of_one in everywhere) for name in everywhere[0]}
    if sizes:
        say("auto: " + ", ".join(f"{name} {size}" for name, size in sizes.items()))
    return dataclasses.replace(config, **sizes)
