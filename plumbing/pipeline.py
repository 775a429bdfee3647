"""diffusers pipelines as the sampler wants them: a policy, conditions from texts, pictures from latents; loading and saving.

A policy is a network of plumbing/networks.py on a schedule of plumbing/schedules.py.
"""

import json
import math
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

import miniature
from config import DTYPES
from plumbing.errors import told_of
from plumbing.networks import Embeddings, GuidedUNet
from plumbing.reward_models import Reward
from plumbing.schedules import noise_schedule, scheduler_at
from sampler import Policy, sample_trajectories

LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion")  # that parts of a pipeline are of; the last is of diffusers
DECODED = 2**20  # pixels at a time: four pictures of 512 x 512; a decoder takes far more memory for them than a UNet does


def unet_policy(
    unet: UNet2DConditionModel, uncond: Embeddings, scheduler: DDIMScheduler | LCMScheduler, *,
    guidance_scale: float, eta: float, log_prob_reduction: str = "mean", autocast: str = "no",
) -> Policy:  # fmt: skip
    """The policy of a UNet on a schedule of T steps."""
    return Policy(
        GuidedUNet(unet, uncond, guidance_scale, DTYPES[autocast]), noise_schedule(scheduler, eta, unet.device),
        (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size), unet.device,
        torch.promote_types(unet.dtype, torch.float32), log_prob_reduction,
    )  # fmt: skip


def pipeline_policy(pipe: DiffusionPipeline, num_steps: int, **settings) -> Policy:
    """The policy of a pipeline with its own schedule at T = num_steps; settings: those of unet_policy."""
    return unet_policy(pipe.unet, encode_prompts(pipe, None), scheduler_at(pipe.scheduler, num_steps), **settings)


def load_pipeline(name: str, device: torch.device) -> DiffusionPipeline:
    """The frozen fp32 pipeline toy or toy-turbo, of a folder or a hub id, without safety checker; ValueError if there is none."""
    name = str(miniature.PIPELINES.get(name, name))
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    local = Path(name).is_dir()
    if not local and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise ValueError(
            f"no model {name!r}: use {', '.join(miniature.PIPELINES)}, the folder of a diffusers pipeline, or a hub id "
            "(CompVis/stable-diffusion-v1-4)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Weights in safetensors only: nothing is unpickled.
            folder = name if local else DiffusionPipeline.download(name, safety_checker=None, use_safetensors=True)
            check_index(Path(folder))
            pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None, use_safetensors=True)
    except Exception as error:  # the libraries raise many kinds for a folder that is no pipeline, or no connection
        if local:
            raise ValueError(f"cannot load a pipeline from the folder {name!r}: {str(error).splitlines()[0]}") from error
        raise ValueError(
            f"cannot load the hub id {name!r}, and there is no folder of that name ({' '.join(str(error).split())[:100]}...): "
            f"check id and connection, or download it elsewhere (hf download {name} --local-dir FOLDER) and give the folder"
        ) from error
    if not isinstance(getattr(pipe, "unet", None), UNet2DConditionModel) or not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"{name!r} is a {type(pipe).__name__}: a text-to-image pipeline with a UNet is needed")
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    with told_of(f"the pipeline {name!r}", device):
        return pipe.to(device)


def check_index(folder: Path) -> None:
    """ValueError if a pipeline is made of other classes than these libraries': some versions of diffusers run their code."""
    index = json.loads((folder / "model_index.json").read_text())
    others = [name for name, part in index.items() if isinstance(part, list) and part[0] not in LIBRARIES]
    if others or not isinstance(index["_class_name"], str):
        raise ValueError(f"model_index.json names code for {(others or ['_class_name'])[0]}, and nothing of a model is run")


def save_pipeline(pipe: DiffusionPipeline, scheduler: DDIMScheduler | LCMScheduler, folder: Path) -> None:
    """Saves the UNet and this schedule beside copies of the other parts' files; an older result is replaced when it is whole.

    What was not trained arrives as it was loaded: a library that saves it anew may write what other versions cannot read.
    """
    source = Path(pipe.name_or_path)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    index = json.loads((source / "model_index.json").read_text())
    pipe.unet.save_pretrained(unfinished / "unet")
    scheduler.save_pretrained(unfinished / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    for name, part in pipe.components.items():
        if part is None and name in index:
            index[name] = [None, None]
        elif name not in ("unet", "scheduler") and (source / name).is_dir():
            shutil.copytree(source / name, unfinished / name)
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    (unfinished / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


@torch.no_grad()
def encode_prompts(pipe: DiffusionPipeline, prompts: Sequence[str] | None) -> Embeddings:
    """Text embeddings of the prompts, each encoded once; of the empty prompt, as guidance uses it, for None."""
    different = list(dict.fromkeys(prompts or [""]))
    encoded = pipe.encode_prompt(
        different, device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=prompts is None
    )
    # (prompt, negative) or, of SDXL, (prompt, negative, pooled, negative pooled)
    states, *pooled = encoded[1::2] if prompts is None else encoded[0::2]
    tensors = {"encoder_hidden_states": states}
    if pooled:
        size = (pipe.unet.config.sample_size * pipe.vae_scale_factor,) * 2
        ids = pipe._get_add_time_ids(size, (0, 0), size, states.dtype, pipe.text_encoder_2.config.projection_dim)
        tensors |= {"text_embeds": pooled[0], "time_ids": ids.to(states.device).repeat(len(states), 1)}
    places = {prompt: place for place, prompt in enumerate(different)}
    return Embeddings(tensors)[torch.tensor([places[prompt] for prompt in prompts or [""]])]


def count_truncated(pipe: DiffusionPipeline, prompts: list[str]) -> int:
    """How many prompts have more tokens than the text encoder reads; the rest of such a prompt is never seen."""
    limit, longer = pipe.tokenizer.model_max_length, 0
    for start in range(0, len(prompts), 10_000):
        tokens = pipe.tokenizer(prompts[start : start + 10_000], truncation=False, verbose=False)["input_ids"]
        longer += sum(len(ids) > limit for ids in tokens)
    return longer


@torch.no_grad()
def decode_latents(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """x_0 latents (M, C, H, W) -> pictures (M, 3, height, width), float in [0, 1]; as many at a time as make DECODED pixels."""
    latents = latents.to(pipe.device, pipe.vae.dtype) / pipe.vae.config.scaling_factor
    at_once = max(1, DECODED // (math.prod(latents.shape[-2:]) * pipe.vae_scale_factor**2))
    images = torch.cat([pipe.vae.decode(some).sample for some in latents.split(at_once)])
    return (images.float() / 2 + 0.5).clamp(0, 1)


def score(pipe: DiffusionPipeline, x_0: Tensor, prompts: list[str], reward: Reward, batch_size: int) -> Tensor:
    """r(x_0, c) of latents (M, C, H, W) -> (M,), a batch at a time."""
    batches = [slice(start, start + batch_size) for start in range(0, len(x_0), batch_size)]
    return torch.cat([reward(decode_latents(pipe, x_0[rows]), prompts[rows]) for rows in batches])


def sample_images(policy: Policy, pipe: DiffusionPipeline, prompts: list[str], names: Sequence[tuple], batch_size: int) -> Tensor:
    """Pictures of the prompts, one each, without keeping trajectories -> (M, 3, height, width) on the CPU, float in [0, 1]."""
    images = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        drawn = sample_trajectories(policy, encode_prompts(pipe, prompts[rows]), names[rows], batch_size)
        images.append(decode_latents(pipe, drawn.x_0).cpu())
    return torch.cat(images)
