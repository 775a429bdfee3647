"""diffusers pipelines: loading, saving, and the two ends of them, text to embeddings and latents to pictures."""

import os
import shutil
import warnings
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

import processes
import toy_model

Embeddings = dict[str, Tensor]  # what the UNet is conditioned on; the first dimension counts prompts


def load_pipeline(name: str, device: torch.device) -> DiffusionPipeline:
    """The frozen fp32 pipeline 'toy', of a folder, or of a hub id, without its safety checker; ValueError if there is none."""
    if name == "toy":
        processes.in_first(toy_model.ensure)
        name = str(toy_model.toy_folder())
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    local = Path(name).is_dir()
    if not local and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise ValueError(
            f"no model {name!r}: use toy, the folder of a diffusers pipeline, or a hub id (CompVis/stable-diffusion-v1-4)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=torch.float32, safety_checker=None)
    except Exception as error:  # the libraries raise many kinds for a folder that is no pipeline, or no connection
        where = "folder" if local else "hub id (and no folder of that name)"
        raise ValueError(f"cannot load a pipeline from the {where} {name!r}: {str(error).splitlines()[0]}") from error
    if not isinstance(getattr(pipe, "unet", None), UNet2DConditionModel) or not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"{name!r} is a {type(pipe).__name__}: a text-to-image pipeline with a UNet is needed")
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipe.to(device)


def save_pipeline(pipe: DiffusionPipeline, scheduler: DDIMScheduler, folder: Path) -> None:
    """Saves a pipeline that samples with this DDIM schedule; an older folder of that name is replaced when it is complete."""
    pipe.scheduler = scheduler
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
    pipe.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


@torch.no_grad()
def encode_prompts(pipe: DiffusionPipeline, prompts: list[str] | None) -> Embeddings:
    """Text embeddings of the prompts; of the empty prompt, as guidance uses it, for None."""
    encoded = pipe.encode_prompt(
        prompts if prompts is not None else "", device=pipe.unet.device, num_images_per_prompt=1,
        do_classifier_free_guidance=prompts is None,
    )  # fmt: skip
    encoded = encoded[prompts is None :: 2]  # (prompt, negative) or, of SDXL, (prompt, negative, pooled, negative pooled)
    embeddings = {"encoder_hidden_states": encoded[0]}
    if len(encoded) > 1:
        size = (pipe.unet.config.sample_size * pipe.vae_scale_factor,) * 2
        ids = pipe._get_add_time_ids(size, (0, 0), size, encoded[0].dtype, pipe.text_encoder_2.config.projection_dim)
        embeddings |= {"text_embeds": encoded[1], "time_ids": ids.to(encoded[0].device).repeat(len(encoded[0]), 1)}
    return embeddings


def count_truncated(pipe: DiffusionPipeline, prompts: list[str]) -> int:
    """How many prompts have more tokens than the text encoder reads; the rest of such a prompt is never seen."""
    limit, longer = pipe.tokenizer.model_max_length, 0
    for start in range(0, len(prompts), 10_000):
        tokens = pipe.tokenizer(prompts[start : start + 10_000], truncation=False, verbose=False)["input_ids"]
        longer += sum(len(ids) > limit for ids in tokens)
    return longer


@torch.no_grad()
def decode_latents(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """x_0 latents (M, C, H, W) -> pictures (M, 3, height, width), float in [0, 1]."""
    images = pipe.vae.decode(latents.to(pipe.device, pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
    return (images.float() / 2 + 0.5).clamp(0, 1)
