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
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers import T5EncoderModel
from transformers.utils import logging as transformers_logging

import miniature
from config import DTYPES
from plumbing.errors import first_line, told_of
from plumbing.networks import NETWORK_NAMES, NETWORKS, Embeddings, guided, network_name, network_of, t5_tokens
from plumbing.reward_models import Reward
from plumbing.schedules import Scheduler, noise_schedule, scheduler_at
from sampler import Policy, sample_trajectories

LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion")  # that parts of a pipeline are of; the last is of diffusers
DECODED = 2**20  # pixels at a time: four pictures of 512 x 512; a decoder takes far more memory for them than a UNet does


def network_policy(
    network: torch.nn.Module, uncond: Embeddings, scheduler: Scheduler, *,
    guidance_scale: float, eta: float, log_prob_reduction: str = "mean", autocast: str = "no", size: int = 0,
) -> Policy:  # fmt: skip
    """The policy of a UNet or transformer on a schedule of T steps; size: of latents, by default the network's own."""
    denoise, size = guided(network)(network, uncond, guidance_scale, DTYPES[autocast]), size or network.config.sample_size
    return Policy(
        denoise, noise_schedule(scheduler, eta, network.device), (denoise.channels, size, size), network.device,
        torch.promote_types(network.dtype, torch.float32), log_prob_reduction,
    )  # fmt: skip


def pipeline_policy(pipe: DiffusionPipeline, num_steps: int, **settings) -> Policy:
    """The policy of a pipeline with its own schedule at T = num_steps; settings: those of network_policy."""
    scheduler = scheduler_at(pipe.scheduler, num_steps, patches=(latent_size(pipe) // 2) ** 2)
    return network_policy(network_of(pipe), encode_prompts(pipe, None), scheduler, size=latent_size(pipe), **settings)


def latent_size(pipe: DiffusionPipeline) -> int:
    """Height and width of its latents: of the resolution that load_pipeline was told, or its own."""
    own = getattr(pipe, "default_sample_size", None) or network_of(pipe).config.sample_size
    return getattr(pipe, "resolution", 0) // pipe.vae_scale_factor or own


def load_pipeline(
    name: str, device: torch.device, *, resolution: int = 0, max_sequence_length: int = 256, frozen_dtype: str = "fp32",
    trains_all: bool = False, text_encoders_on_cpu: bool = False,
) -> DiffusionPipeline:  # fmt: skip
    """The frozen pipeline of miniature.PIPELINES, of a folder or a hub id, without safety checker; ValueError if there is none.

    resolution: of its pictures, in pixels, 0 its own. max_sequence_length: tokens of its T5, if it has one.
    frozen_dtype: of text encoders, and of the network unless trains_all; all else is fp32.
    text_encoders_on_cpu: they stay there and go to the device for the time of an encoding.
    """
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
            absent = check_index(Path(folder))
            full = ["vae", *(NETWORK_NAMES if trains_all else ())]
            dtypes = {"default": DTYPES[frozen_dtype], **{name: torch.float32 for name in full if (Path(folder) / name).is_dir()}}
            pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtypes, use_safetensors=True, **absent)
    except Exception as error:  # the libraries raise many kinds for a folder that is no pipeline, or no connection
        if local:
            raise ValueError(f"cannot load a pipeline from the folder {name!r}: {first_line(error)}") from error
        raise ValueError(
            f"cannot load the hub id {name!r}, and there is no folder of that name ({' '.join(str(error).split())[:100]}...): "
            f"check id and connection, or download it elsewhere (hf download {name} --local-dir FOLDER) and give the folder"
        ) from error
    if not isinstance(network_of(pipe), tuple(NETWORKS)) or not hasattr(pipe, "encode_prompt"):
        raise ValueError(
            f"{name!r} is a {type(pipe).__name__}: a text-to-image pipeline of Stable Diffusion 1, 2, XL, 3 or FLUX.1 is needed"
        )
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    smallest = pipe.vae_scale_factor * 2  # transformers see patches of 2 x 2
    if resolution % smallest or resolution < 0:
        raise ValueError(f"resolution must be a multiple of {smallest} for {name!r} (0 is its own), not {resolution}")
    pipe.resolution, pipe.max_sequence_length = resolution, max_sequence_length
    with told_of(f"the pipeline {name!r}", device):
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module) and not (text_encoders_on_cpu and part in text_encoders(pipe)):
                part.to(device)
    return pipe


def check_index(folder: Path) -> dict[str, None]:
    """The parts that a pipeline does without, by name; diffusers asks to be told of some, as T5 in Stable Diffusion 3.

    ValueError if it is made of other classes than these libraries': some versions of diffusers run their code.
    """
    index = json.loads((folder / "model_index.json").read_text())
    others = [name for name, part in index.items() if isinstance(part, list) and part[0] not in LIBRARIES]
    if others or not isinstance(index["_class_name"], str):
        raise ValueError(f"model_index.json names code for {(others or ['_class_name'])[0]}, and nothing of a model is run")
    absent = [name for name, part in index.items() if part == [None, None]]
    return dict.fromkeys([*absent, *(["safety_checker"] if "safety_checker" in index else [])])


def save_pipeline(pipe: DiffusionPipeline, scheduler: Scheduler, folder: Path) -> None:
    """Saves the network and this schedule beside copies of the other parts' files; an older result is replaced when it is whole.

    What was not trained arrives as it was loaded: a library that saves it anew may write what other versions cannot read.
    """
    source = Path(pipe.name_or_path)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    index = json.loads((source / "model_index.json").read_text())
    network_of(pipe).save_pretrained(unfinished / network_name(pipe))
    scheduler.save_pretrained(unfinished / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    for name, part in pipe.components.items():
        if part is None and name in index:
            index[name] = [None, None]
        elif name not in (network_name(pipe), "scheduler") and (source / name).is_dir():
            shutil.copytree(source / name, unfinished / name)
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    (unfinished / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def text_encoders(pipe: DiffusionPipeline) -> list[torch.nn.Module]:
    return [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]


@torch.no_grad()
def encode_prompts(pipe: DiffusionPipeline, prompts: Sequence[str] | None) -> Embeddings:
    """Text embeddings of the prompts, each encoded once; of the empty prompt, as guidance uses it, for None.

    Text encoders that are kept on the CPU are on the network's device meanwhile.
    """
    different, network = list(dict.fromkeys(prompts or [""])), network_of(pipe)
    homes = [(part, part.device) for part in text_encoders(pipe)]
    for part, _ in homes:
        part.to(network.device)
    size = latent_size(pipe) * pipe.vae_scale_factor
    tensors = guided(network).encode(pipe, None if prompts is None else different, network.device, size)
    for part, home in homes:
        part.to(home)
    places = {prompt: place for place, prompt in enumerate(different)}
    return Embeddings(tensors)[torch.tensor([places[prompt] for prompt in prompts or [""]])]


def count_truncated(pipe: DiffusionPipeline, prompts: list[str]) -> int:
    """How many prompts have more tokens than the text encoder that reads most; the rest of such a prompt is never seen."""
    tokenizer, limit, longer = pipe.tokenizer, pipe.tokenizer.model_max_length, 0
    for name, part in pipe.components.items():
        if isinstance(part, T5EncoderModel):
            tokenizer, limit = pipe.components[name.replace("text_encoder", "tokenizer")], t5_tokens(pipe)
    for start in range(0, len(prompts), 10_000):
        tokens = tokenizer(prompts[start : start + 10_000], truncation=False, verbose=False)["input_ids"]
        longer += sum(len(ids) > limit for ids in tokens)
    return longer


@torch.no_grad()
def decode_latents(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """x_0 latents (M, C, H, W) -> pictures (M, 3, height, width), float in [0, 1]; as many at a time as make DECODED pixels."""
    config = pipe.vae.config
    latents = latents.to(pipe.vae.device, pipe.vae.dtype) / config.scaling_factor + (config.get("shift_factor") or 0.0)
    if config.get("latents_mean") is not None:  # by channel, as some of SDXL's kind have it
        mean, std = (latents.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        latents = latents * std + mean
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
