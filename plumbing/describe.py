"""What a run prints of itself at its start, for people to check: the batch arithmetic, the units, and what rounding does."""

import dataclasses
import math

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config, LasroConfig
from plumbing.processes import WORLD_SIZE
from sampler import Policy, Trajectories, log_prob_table


def describe(config: Config, policy: Policy, prompts: list[str], truncated: int, trained: dict[str, torch.nn.Parameter]) -> str:
    """The batch arithmetic and the units, for people to check."""
    n, b, k = config.prompts_per_epoch, config.images_per_prompt, config.updates_per_epoch
    steps, size = len(policy.schedule.noisy), math.prod(policy.latent_shape)
    each, micro = -(-n * b // WORLD_SIZE), config.train_batch_size
    local = each * steps
    batches = f" = {local // micro} micro-batches of {micro}" + (f" and one of {local % micro}" if local % micro else "")
    lines = [
        f"{n} of {len(prompts)} prompts x {b} images = {n * b} trajectories x {steps} steps = {n * b * steps} log-probs an epoch",
        *([f"{n} prompts x {b * (b - 1) // 2} = {n * b * (b - 1) // 2} pairs in the loss"] if config.method == "prdp" else []),
        f"{each} trajectories in each of {WORLD_SIZE} processes{' at most' if n * b % WORLD_SIZE else ''}"
        f" = {local} log-probs each{batches if config.method == 'prdp' else ''}",
        f"{config.epochs} epochs x {k} updates = {config.epochs * k} updates"
        f" of {sum(parameter.numel() for parameter in trained.values()):,} parameters",
        f"{config.epochs} epochs x {n * b} = {config.epochs * n * b} reward queries",
        f"log-probs are {'means over' if config.log_prob_reduction == 'mean' else 'sums over'} D = {size} latent dimensions: "
        f"clip_range {config.clip_range:g} is {config.clip_range * policy.in_nats:.3g} nats a step"
        + ("; with one update per epoch the clip cannot act" if k == 1 and config.method != "d3po" else ""),
    ]
    return "\n".join([*lines, *cut_off(len(prompts), truncated)])


def describe_lasro(
    config: LasroConfig, prompts: list[str], truncated: int, trained: dict[str, torch.nn.Parameter], surrogate: torch.nn.Module
) -> str:
    """The arithmetic of both stages, for people to check."""
    n, b, t, first = config.prompts_per_epoch, config.images_per_prompt, config.num_steps, config.pretraining_epochs
    sizes = [sum(parameter.numel() for parameter in some) for some in (trained.values(), surrogate.parameters())]
    rest = max(0, config.epochs - first)
    lines = [
        f"{n} of {len(prompts)} prompts x {b} images x {t} steps = {n * b * t} pictures an epoch, each a reward query; "
        f"{n * t} x {b * (b - 1) // 2} = {n * t * b * (b - 1) // 2} pairs",
        f"{min(first, config.epochs)} epochs x {config.pretraining_updates} and {rest} x {config.surrogate_updates} updates "
        f"of the surrogate, of {sizes[1]:,} parameters, {config.surrogate_batch} prompts in each",
        f"{rest} epochs x {config.generator_updates} updates of the generator, of {sizes[0]:,} parameters, "
        f"{config.generator_batch} pictures in each",
        f"{config.epochs * n * b * t} reward queries",
    ]
    return "\n".join([*lines, *cut_off(len(prompts), truncated)])


def cut_off(number: int, truncated: int) -> list[str]:
    if not truncated:
        return []
    return [f"{truncated} of {number} prompts are longer than the text encoder reads; it sees their beginning only"]


def describe_epoch(line: dict, epochs: int, left: float) -> str:
    """An epoch's line of progress, from its line of the record; left: seconds."""
    numbers = [("reward", line["reward_mean"], ""), ("held out", line["eval_reward"], ""), ("KL", line.get("kl_nats"), " nats")]
    parts = [f"{name} {value:.4g}{unit}" for name, value, unit in numbers if value is not None]
    parts += [f"{sum(line['seconds'].values()):.3g} s", f"{tqdm.format_interval(left)} left"]
    return f"epoch {line['epoch']} of {epochs}: {', '.join(parts)}"


def rounding(policy: Policy, trajectories: Trajectories, batch_size: int) -> Tensor:
    """How far log-ratios at unchanged weights are from zero -> largest deviation of each step (S,), in the unit of log-probs.

    The policy's own precision and batches are compared with fp32 (where the weights are) and one entry at a time. A clip range
    below this is noise.
    """
    in_fp32 = all(weight.dtype == torch.float32 for weight in policy.denoise.network.parameters())
    autocast = None if in_fp32 else policy.denoise.autocast
    exact = dataclasses.replace(policy, denoise=dataclasses.replace(policy.denoise, autocast=autocast))
    tf32 = torch.backends.cuda.matmul.allow_tf32
    used = log_prob_table(policy, trajectories, batch_size)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    deviation = used - log_prob_table(exact, trajectories, 1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    return deviation.abs().amax(0)


def describe_rounding(config: Config, deviation: Tensor) -> str:
    """The (S,) deviation of log-ratios that should be zero, in units of the clip range."""
    in_clips = deviation / config.clip_range
    return (
        f"rounding: log-ratios at unchanged weights are up to {deviation.max():.2g} = {in_clips.max():.2g} clip ranges off; "
        f"by step, in clip ranges: {' '.join(f'{value:.2g}' for value in in_clips)}"
    )


def warn_of_rounding(config: Config, deviation: Tensor) -> str:
    """The warning where it drowns the clip, else nothing."""
    if deviation.max() <= config.clip_range or config.updates_per_epoch == 1:
        return ""
    return (
        f"warning: clip_range {config.clip_range:g} drowns in rounding, so the clip acts on noise as well: "
        "use a higher precision (--autocast no, --tf32 False) or a larger --clip_range"
    )
