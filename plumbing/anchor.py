"""What LaSRO holds its generator to: the teacher of many steps.

That a consistency loss anchors it is certain. OURS is all else here: pictures that the teacher draws once, at the start, in the
place of data; its ODE at LCM's levels, under one guidance; prompts drawn from those of training.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, LCMScheduler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from config import LasroConfig
from plumbing import checkpoint
from plumbing.pipeline import encode_prompts, latent_size, load_pipeline, network_policy, pipeline_policy
from plumbing.processes import Share, all_wait_for_first, say
from plumbing.prompts import draw_prompts
from plumbing.schedules import lcm_scheduler
from sampler import EVALUATION, Policy, ddim, sample_trajectories

PICTURES = "pictures.safetensors"


@dataclass(frozen=True)
class Anchor:
    """What L_lcm holds the generator to: the teacher, on pictures of its own."""

    prompts: list[str]  # A
    x_0: Tensor  # (A, C, H, W), on the CPU
    target: AveragedModel  # of the generator
    policies: tuple[Policy, Policy, Policy]  # student, target and teacher at the levels of the teacher's ODE

    @property
    def levels(self) -> int:
        return len(self.policies[0].schedule.timesteps)


def consistency_scheduler(pipe: DiffusionPipeline, num_steps: int = 0) -> LCMScheduler:
    """The pipeline's noise, drawn as consistency models draw it, in T = num_steps or in all steps that one can begin from."""
    config = LCMScheduler.from_config(pipe.scheduler.config).config
    return lcm_scheduler(config, num_steps or config.original_inference_steps)


def few_step_policy(pipe: DiffusionPipeline, num_steps: int, config: LasroConfig) -> Policy:
    """The generator with T = num_steps."""
    return network_policy(
        pipe.unet, encode_prompts(pipe, None), consistency_scheduler(pipe, num_steps), guidance_scale=config.guidance_scale,
        eta=1.0, autocast=config.autocast,
    )  # fmt: skip


def solver_policies(
    pipe: DiffusionPipeline, target: nn.Module, teacher: DiffusionPipeline, guidance_scale: float, of_student: float = 1.0,
    autocast: str = "no",
) -> tuple[Policy, Policy, Policy]:  # fmt: skip
    """The student (pipe's UNet), the target and the guided teacher at the levels of the teacher's ODE, which are LCM's.

    guidance_scale: of the teacher; of_student: of the other two, as the student is drawn.
    """
    uncond, scheduler = encode_prompts(pipe, None), consistency_scheduler(pipe)
    student, of_target, of_teacher = (
        network_policy(unet, uncond, scheduler, guidance_scale=w, eta=1.0, autocast=autocast)
        for unet, w in ((pipe.unet, of_student), (target, of_student), (teacher.unet, guidance_scale))
    )
    predicts = teacher.scheduler.config.prediction_type
    ode = dataclasses.replace(of_teacher.schedule, rule=ddim, eta=0.0, prediction_type=predicts)
    return student, of_target, dataclasses.replace(of_teacher, schedule=ode)


def teachers_pictures(
    teacher: DiffusionPipeline, pipe: DiffusionPipeline, prompts: list[str], num_steps: int, guidance_scale: float,
    batch_size: int, seed: int, autocast: str = "no",
) -> Tensor:  # fmt: skip
    """What the teacher draws of each prompt, by this process's share of them -> latents (A, C, H, W) on the CPU, of all."""
    policy = pipeline_policy(teacher, num_steps, guidance_scale=guidance_scale, eta=1.0, autocast=autocast)
    share = Share([torch.ones(len(prompts), 1, 1)])

    def draw() -> Tensor:
        names, parts = [(seed, EVALUATION, n, 0) for n in share.rows.tolist()], []
        for start in range(0, len(names), batch_size):
            some = names[start : start + batch_size]
            cond = encode_prompts(pipe, [prompts[n] for _, _, n, _ in some])
            parts.append(sample_trajectories(policy, cond, some, batch_size).x_0.cpu())
        return torch.cat(parts)

    return share.all_gather(draw)


def load_anchor(config: LasroConfig, pipe: DiffusionPipeline, target: AveragedModel, prompts: list[str]) -> Anchor:
    """The anchor of a run, whose pictures are drawn once and kept in its folder; ValueError for a teacher that does not fit."""
    size = latent_size(pipe) * pipe.vae_scale_factor  # SDXL-Turbo draws smaller pictures than its teacher
    teacher = load_pipeline(config.teacher, pipe.device, resolution=size)
    for name in ("cross_attention_dim", "in_channels"):
        mine, theirs = (one.unet.config[name] for one in (pipe, teacher))
        if mine != theirs:
            raise ValueError(f"teacher {config.teacher!r} has {name}={theirs}, but {config.model!r}, which it teaches, {mine}")
    drawn = draw_prompts(prompts, config.anchor_pictures, 0, config.seed + 2)
    folder = Path(config.output_dir) / "anchor"
    if not (config.resume and is_whole(folder)):
        x_0 = teachers_pictures(
            teacher, pipe, drawn, config.teacher_steps, config.teacher_guidance, config.sample_batch_size, config.seed,
            config.autocast,
        )  # fmt: skip
        all_wait_for_first(lambda: save_pictures(x_0, folder))
    policies = solver_policies(pipe, target.module, teacher, config.teacher_guidance, config.guidance_scale, config.autocast)
    return Anchor(drawn, checkpoint.load_tensors(folder / PICTURES)["x_0"], target, policies)


def save_pictures(x_0: Tensor, folder: Path) -> None:
    """Written whole, and with its checksum, as checkpoints are."""
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    checkpoint.save_tensors({"x_0": x_0}, unfinished / PICTURES)
    checkpoint.seal(unfinished, PICTURES)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def is_whole(folder: Path) -> bool:
    """False, with a line that says so, where the pictures are not what was written."""
    try:
        checkpoint.check_sums(folder, PICTURES)
    except ValueError as error:
        say(f"{error}; the teacher draws them again")
        return False
    return True
