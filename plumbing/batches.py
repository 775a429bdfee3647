"""Batch sizes that fit themselves: `--sample_batch_size auto` and the like.

On a GPU each is doubled, before the first epoch, until a pass of that kind takes more memory than there is, beside what the run
holds at that time: the epoch's latents, the optimiser's moments, and in the backward pass gradients. Reward models are not asked:
users' may count their calls. On a CPU the sizes are a fixed number.
"""

import dataclasses
from collections.abc import Callable

import torch

from config import AUTO, Config
from plumbing.pipeline import encode_prompts
from plumbing.processes import WORLD_SIZE, all_succeed, say
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
        return torch.cuda.max_memory_reserved() <= HEADROOM * torch.cuda.mem_get_info()[1]
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def largest(name: str, run: Callable[[int], object], limit: int) -> int:
    """The largest of 1, 2, 4, ... and the limit that fits; ValueError if not even one does."""
    size = 0
    while size < limit and fits(run, wanted := min(2 * size or 1, limit)):
        size = wanted
    if not size:
        raise ValueError(f"{name}: memory is not enough for a single one, see docs/stable-diffusion.md, On one GPU")
    return size


def fit_batches(config: Config, pipe, policy: Policy, reference: Reference, trained: list[torch.nn.Parameter]) -> Config:
    """The settings with a number for every batch size that is auto, the same in every process."""
    wanted = [name for name in ("sample", "log_prob", "train") if getattr(config, f"{name}_batch_size") == AUTO]
    if not wanted:
        return config
    steps, rows = len(policy.schedule.noisy), -(-config.prompts_per_epoch * config.images_per_prompt // WORLD_SIZE)
    cond = encode_prompts(pipe, ["a prompt"])

    def latents(*size: int) -> torch.Tensor:
        return torch.randn(*size, *policy.latent_shape, device=policy.device, dtype=policy.dtype)

    def inputs(size: int):
        first = torch.zeros(size, dtype=torch.long, device=policy.device)
        return latents(size), first, cond[first]

    @torch.no_grad()
    def sample(size: int) -> None:
        held = latents(3, size, config.num_steps + 1)  # the batch's noise, its latents, and these as one tensor
        gaussian(policy, *inputs(size))
        del held

    @torch.no_grad()
    def log_prob(size: int) -> None:
        with reference(policy) as pi_ref:
            gaussian(pi_ref, *inputs(size))

    def train(size: int) -> None:
        x_t, i, cond = inputs(size)
        try:
            for _ in range(2):  # the second pass meets the first one's gradients
                gaussian_log_prob(x_t, *gaussian(policy, x_t, i, cond), policy.log_prob_reduction).sum().backward()
        finally:
            for parameter in trained:
                parameter.grad = None

    def found() -> list[int]:
        if policy.device.type == "cpu":
            return [ON_A_CPU] * len(wanted)
        held = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]
        held.append(latents(1 if config.latents_on_cpu else 2 * rows, config.num_steps + 1))  # twice while they are joined
        sizes = [largest(f"{run.__name__}_batch_size", run, limit) for run, limit in
                 ((sample, rows), (log_prob, rows * steps), (train, rows * steps)) if run.__name__ in wanted]  # fmt: skip
        del held
        return sizes

    sizes = [min(of_all) for of_all in zip(*all_succeed(found), strict=True)]
    if not config.quiet:
        say("auto: " + ", ".join(f"--{name}_batch_size {size}" for name, size in zip(wanted, sizes, strict=True)))
    return dataclasses.replace(config, **{f"{name}_batch_size": size for name, size in zip(wanted, sizes, strict=True)})
