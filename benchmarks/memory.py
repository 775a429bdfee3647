"""How much GPU memory a run will need and how many operations an epoch is, derived on a machine without a GPU.

    python -m benchmarks.memory                                          # the recipes of docs/stable-diffusion.md
    python -m benchmarks.memory --preset large-hpsv2 --lora_rank 16 ...  # any flags of train.py

Pipelines of the shapes of benchmarks/rehearsal.py and full-sized reward models are run as tensors without content (torch's
FakeTensorMode) through the passes of one epoch, and the storages that are alive are added up; normalisations compute in fp32,
as under CUDA's autocast. That is the memory of tensors: the CUDA context, the workspaces of cuDNN and the allocator's
fragmentation come on top, and a kernel on a GPU may need other temporary tensors than the same operation here.

Operations are those of the network in an epoch of PRDP: a pass to draw each step, one for the reference, with K > 1 one more for
theta_old and for every further update, and three in every update (two with adapters). Decoding, rewards and what gradient
checkpointing computes again do not count.
"""

import argparse
import dataclasses
import math
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPModel

from benchmarks import rehearsal, speed
from config import AUTO, DTYPES, PRESETS, Config
from plumbing.errors import one_line_errors
from plumbing.flags import parse
from plumbing.image_reward import ImageReward
from plumbing.networks import Embeddings, network_name, network_of
from plumbing.pipeline import decode_latents, latent_size, network_policy, text_encoders
from plumbing.provenance import write_result
from plumbing.schedules import scheduler_at
from plumbing.trainable import add_adapters, trained_parameters
from sampler import gaussian, gaussian_log_prob

RECIPES = {
    "paper, small scale": "--preset small-hpsv2",
    "paper, large scale": "--preset large-hpsv2",
    "every weight, 24 GB": "--preset large-hpsv2 --gradient_checkpointing --reference_on_cpu --latents_on_cpu "
    "--reward_dtype fp16 --sample_batch_size 4 --log_prob_batch_size 8 --train_batch_size 4",
    "adapters, 12 GB": "--preset large-hpsv2 --lora_rank 16 --learning_rate 1e-4 --gradient_checkpointing --latents_on_cpu "
    "--reward_dtype fp16 --sample_batch_size 2 --log_prob_batch_size 8 --train_batch_size 4",
    "sdxl": "--preset sdxl",
    "sd3.5-medium": "--preset sd3.5-medium",
    "flux-dev": "--preset flux-dev",
}
GIB = 2**30


def size_of(*modules: torch.nn.Module) -> float:
    """GiB of all parameters."""
    return sum(parameter.nbytes for module in modules for parameter in module.parameters()) / GIB


class LiveMemory(TorchDispatchMode):
    """Adds up the storages that operations inside make, until they are freed; `most` is the largest sum there was, in bytes."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self.watch(tensor, is_new=False)  # what was there before, of which the result may be a view
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self.watch(tensor, is_new=True)
        return result

    def watch(self, tensor: object, is_new: bool) -> None:
        if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self.known:
            size, key = storage.nbytes() if is_new else 0, id(storage)
            self.now += size
            self.most = max(self.most, self.now)
            self.known[key] = weakref.ref(storage, lambda _: self.freed(key, size))

    def freed(self, key: int, size: int) -> None:
        self.now -= size
        del self.known[key]


def peak_of(run: Callable[[], object]) -> float:
    """GiB that `run` holds at most, besides what was there before."""
    with LiveMemory() as memory:
        run()
    return memory.most / GIB


def reward_models(config: Config, sizes: dict) -> list[torch.nn.Module]:
    """The models behind config.reward, in its precision."""
    makers = {
        "hpsv2": lambda: open_clip.CLIP(**sizes["hpsv2"]),
        "hpsv2.1": lambda: open_clip.CLIP(**sizes["hpsv2"]),
        "pickscore": lambda: CLIPModel(rehearsal.clip_config(sizes["pickscore"])),
        "imagereward": lambda: ImageReward(sizes["imagereward"]),
        "aesthetic": lambda: CLIPModel(rehearsal.clip_config(sizes["clip"])),
        "clipscore": lambda: CLIPModel(rehearsal.clip_config(sizes["clip"])),
    }
    names = [spec.partition("=")[0] for spec in config.reward]
    return [makers[name]().to(DTYPES[config.reward_dtype]) for name in names if name in makers]


def normalise_in_fp32(*networks: torch.nn.Module) -> None:
    """As CUDA's autocast has it; the CPU's, which is at work here, leaves normalisations as they come."""
    for module in [module for network in networks for module in network.modules()]:
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    decode_latents(SimpleNamespace(vae=vae, vae_scale_factor=8), latents)


def conditions(network: torch.nn.Module, number: int, t5_tokens: int) -> Embeddings:
    """The tensors of so many encoded prompts, without content."""
    shape = network.config
    if "joint_attention_dim" in shape:  # FLUX.1's texts are T5's alone
        tokens = t5_tokens + (0 if "guidance_embeds" in shape else 77)
        sizes = {
            "encoder_hidden_states": (tokens, shape.joint_attention_dim),
            "pooled_projections": (shape.pooled_projection_dim,),
        }
    else:
        second = (shape.projection_class_embeddings_input_dim or 7) - 6 * (shape.addition_time_embed_dim or 1)
        sizes = {"encoder_hidden_states": (77, shape.cross_attention_dim), "text_embeds": (second,), "time_ids": (6,)}
    return Embeddings({name: torch.empty(number, *size) for name, size in sizes.items()})


def update(parameters: list[torch.nn.Parameter], loss_of: Callable[[], torch.Tensor]) -> None:
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for _ in range(2):  # the second update meets the moments that the first has made
        for _ in range(2):  # and a second backward pass the gradients of the one before
            loss_of().backward()
        optimizer.step()
        optimizer.zero_grad()


def tell(script: str, argv: list[str], output: str, rows: list[dict], head: list[str], cells: list[list[str]]) -> None:
    """Prints a table of what was derived, and writes the rows to a JSON file, if one is wanted."""
    if output:
        how = "derived from tensors without content, not measured"
        write_result(Path(output), f"-m benchmarks.{script}", argv, {"how": how, "unit": "GiB", "results": rows})
    print(f"| GiB, derived | {' | '.join(head)} |")
    print("|---" * (1 + len(head)) + "|")
    for line in cells:
        print(f"| {' | '.join(line)} |")


def passes(config: Config) -> int:
    """Passes of single steps through the UNet in an epoch of PRDP; a backward pass is two, or one of adapters."""
    of_each = sum(speed.passes(dataclasses.replace(config, method="prdp"), config.num_steps).values())
    return config.prompts_per_epoch * config.images_per_prompt * of_each


def derive(config: Config, shape: str = "full") -> dict[str, float]:
    """Peak GiB of every phase of an epoch on one GPU, what of it is resident throughout, and an epoch's operations.

    ValueError for a batch size that is auto.
    """
    if AUTO in (config.sample_batch_size, config.log_prob_batch_size, config.train_batch_size):
        raise ValueError("a batch size of auto is found on a GPU: give numbers here")
    with torch.device("meta"):
        rewards = reward_models(config, rehearsal.REWARDS["tiny" if shape.startswith("tiny") else "full"])
    with FakeTensorMode(allow_non_fake_inputs=True) as without_content:
        pipe = rehearsal.pipeline_of(shape)
        network, texts = network_of(pipe).eval(), text_encoders(pipe)
        for part in (network, pipe.vae):
            part.requires_grad_(False)
        for part in (*texts, *([network] if config.lora_rank else [])):
            for parameter in part.parameters():  # Module.to cannot swap tensors without content
                parameter.data = parameter.data.to(DTYPES[config.frozen_dtype])
        normalise_in_fp32(network)
    trained_in = SimpleNamespace(**{network_name(pipe): network})
    add_adapters(trained_in, config.lora_rank) if config.lora_rank else network.requires_grad_(True)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    trained = list(trained_parameters(trained_in).values())
    pipe.resolution = config.resolution
    side = latent_size(pipe)
    scheduler = scheduler_at(pipe.scheduler, config.num_steps, patches=(side // 2) ** 2)
    policy = network_policy(
        network, conditions(network, 1, config.max_sequence_length), scheduler, size=side,
        guidance_scale=config.guidance_scale, eta=config.eta, autocast=config.autocast,
    )  # fmt: skip
    latent_shape = policy.latent_shape
    with without_content:

        def inputs(batch: int):
            steps = torch.zeros(batch, dtype=torch.long)
            return torch.empty(batch, *latent_shape), steps, conditions(network, batch, config.max_sequence_length)

        @torch.no_grad()
        def sample() -> None:
            policy.denoise(*inputs(config.sample_batch_size))

        @torch.no_grad()
        def log_probs() -> None:
            policy.denoise(*inputs(config.log_prob_batch_size))

        def loss() -> torch.Tensor:
            x_t, i, cond = inputs(config.train_batch_size)
            return gaussian_log_prob(x_t, *gaussian(policy, x_t, i, cond), "mean").sum()

        latents = config.prompts_per_epoch * config.images_per_prompt * (config.num_steps + 1) * math.prod(latent_shape)
        waiting = size_of(network, pipe.vae, *rewards)  # whatever happens
        waiting += 0 if config.text_encoders_on_cpu else size_of(*texts)
        waiting += 0 if config.latents_on_cpu else latents * 4 / GIB
        waiting += 0 if config.lora_rank or config.reference_on_cpu else size_of(network)
        moments = 2 * 4 * sum(parameter.numel() for parameter in trained) / GIB
        encoding = size_of(*texts) if config.text_encoders_on_cpu else 0
        reference = size_of(network) if config.reference_on_cpu else 0
        decoding = peak_of(lambda: decode(pipe.vae, torch.empty(config.sample_batch_size, *latent_shape)))
        return {
            "exaflop_per_epoch": passes(config) * speed.flops_of(lambda: policy.denoise(*inputs(1))) / 1e18,
            "resident": waiting + moments,
            "sample": waiting + moments + max(encoding, peak_of(sample)),
            "reward": waiting + moments + decoding,
            "reference": waiting + moments + reference + peak_of(log_probs),
            "update": waiting + peak_of(lambda: update(trained, loss)),
        }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=rehearsal.PIPELINES, help="tiny for a quick try; by default the preset's")
    parser.add_argument("--output", default="", help="JSON file")
    arguments, flags = parser.parse_known_args(argv)
    with one_line_errors(ValueError, OSError):
        recipes = {"these flags": " ".join(flags)} if flags else RECIPES
        rows = []
        for name, line in recipes.items():
            config = parse(line.split())
            of_model = {PRESETS[shape]["model"]: shape for shape in rehearsal.PIPELINES if shape in PRESETS}
            shape = arguments.shape or of_model.get(config.model, "full")
            rows.append({"name": name, "flags": line} | derive(config, shape))
        phases = ["resident", "sample", "reward", "reference", "update"]
        cells = [[row["name"], *(f"{row[phase]:.1f}" for phase in phases), f"{row['exaflop_per_epoch']:.3g}"] for row in rows]
        tell("memory", argv, arguments.output, rows, [*phases, "EFLOP an epoch"], cells)


if __name__ == "__main__":
    main(sys.argv[1:])
