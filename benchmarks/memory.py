"""How much GPU memory a run will need and how many operations an epoch is, derived on a machine without a GPU.

    python -m benchmarks.memory                                          # the recipes of docs/stable-diffusion.md
    python -m benchmarks.memory --preset large-hpsv2 --lora_rank 16 ...  # any flags of train.py

Stable Diffusion v1.4's shape and full-sized reward models are run as tensors without content (torch's FakeTensorMode) through
the passes of one epoch, and the storages that are alive are added up; normalisations compute in fp32, as under CUDA's autocast.
That is the memory of tensors: the CUDA context, the workspaces of cuDNN and the allocator's fragmentation come on top, and a
kernel on a GPU may need other temporary tensors than the same operation here.

Operations are those of the UNet in an epoch of PRDP: a pass to draw each step, one for the reference, with K > 1 one more for
theta_old and for every further update, and three in every update (two with adapters). Decoding, rewards and what gradient
checkpointing computes again do not count.
"""

import argparse
import dataclasses
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPModel, CLIPTextModel

from benchmarks import rehearsal, speed
from config import AUTO, Config
from plumbing.errors import one_line_errors
from plumbing.flags import parse
from plumbing.image_reward import ImageReward
from plumbing.networks import Embeddings
from plumbing.pipeline import decode_latents, network_policy
from plumbing.provenance import provenance
from plumbing.schedules import ddim_scheduler
from plumbing.trainable import make_trainable, trained_parameters
from sampler import gaussian, gaussian_log_prob

RECIPES = {
    "paper, small scale": "--preset small-hpsv2",
    "paper, large scale": "--preset large-hpsv2",
    "every weight, 24 GB": "--preset large-hpsv2 --gradient_checkpointing --reference_on_cpu --latents_on_cpu "
    "--reward_dtype fp16 --sample_batch_size 4 --log_prob_batch_size 8 --train_batch_size 4",
    "adapters, 12 GB": "--preset large-hpsv2 --lora_rank 16 --learning_rate 1e-4 --gradient_checkpointing --latents_on_cpu "
    "--reward_dtype fp16 --sample_batch_size 2 --log_prob_batch_size 8 --train_batch_size 4",
}
GIB = 2**30


def size_of(*modules: torch.nn.Module, bytes_each: int = 4) -> float:
    """GiB of all parameters."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters()) * bytes_each / GIB


class LiveMemory(TorchDispatchMode):
    """Adds up the storages that operations inside make, until they are freed; `most` is the largest sum there was, in bytes."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self.known:
                size, key = storage.nbytes(), id(storage)
                self.now += size
                self.most = max(self.most, self.now)
                self.known[key] = weakref.ref(storage, lambda _, key=key, size=size: self.freed(key, size))
        return result

    def freed(self, key: int, size: int) -> None:
        self.now -= size
        del self.known[key]


def peak_of(run: Callable[[], object]) -> float:
    """GiB that `run` holds at most, besides what was there before."""
    with LiveMemory() as memory:
        run()
    return memory.most / GIB


def reward_models(config: Config, sizes: dict) -> list[torch.nn.Module]:
    """The models behind config.reward."""
    makers = {
        "hpsv2": lambda: open_clip.CLIP(**sizes["hpsv2"]),
        "hpsv2.1": lambda: open_clip.CLIP(**sizes["hpsv2"]),
        "pickscore": lambda: CLIPModel(rehearsal.clip_config(sizes["pickscore"])),
        "imagereward": lambda: ImageReward(sizes["imagereward"]),
        "aesthetic": lambda: CLIPModel(rehearsal.clip_config(sizes["clip"])),
        "clipscore": lambda: CLIPModel(rehearsal.clip_config(sizes["clip"])),
    }
    names = [spec.partition("=")[0] for spec in config.reward]
    return [makers[name]() for name in names if name in makers]


def normalise_in_fp32(*networks: torch.nn.Module) -> None:
    """As CUDA's autocast has it; the CPU's, which is at work here, leaves normalisations as they come."""
    for module in [module for network in networks for module in network.modules()]:
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    decode_latents(SimpleNamespace(vae=vae, vae_scale_factor=8, device=latents.device), latents)


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
        result = provenance(f"-m benchmarks.{script}", argv) | {"how": how, "unit": "GiB", "results": rows}
        Path(output).write_text(json.dumps(result, indent=1) + "\n")
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
    sizes, scheduler = rehearsal.PIPELINES[shape], ddim_scheduler(DDIMScheduler().config, config.num_steps)
    with torch.device("meta"):
        text = CLIPTextModel(rehearsal.CLIPTextConfig(vocab_size=49408, **sizes["text"]))
        rewards = reward_models(config, rehearsal.REWARDS[shape])
    unet, vae = UNet2DConditionModel(**sizes["unet"]).eval(), AutoencoderKL(**rehearsal.VAE_BLOCKS, **sizes["vae"])
    for module in (unet, vae):
        module.requires_grad_(False)
    normalise_in_fp32(unet)
    pipe = SimpleNamespace(unet=unet)
    make_trainable(pipe, dataclasses.replace(config, compile=False))
    trained = list(trained_parameters(pipe).values())
    width, channels, side = unet.config.cross_attention_dim, unet.config.in_channels, unet.config.sample_size

    def texts(number: int) -> Embeddings:
        return Embeddings({"encoder_hidden_states": torch.empty(number, 77, width)})

    policy = network_policy(
        unet, texts(1), scheduler, guidance_scale=config.guidance_scale, eta=config.eta, autocast=config.autocast
    )
    with FakeTensorMode(allow_non_fake_inputs=True):

        def inputs(batch: int):
            return torch.empty(batch, channels, side, side), torch.zeros(batch, dtype=torch.long), texts(batch)

        @torch.no_grad()
        def sample() -> None:
            policy.denoise(*inputs(config.sample_batch_size))

        @torch.no_grad()
        def log_probs() -> None:
            policy.denoise(*inputs(config.log_prob_batch_size))

        def loss() -> torch.Tensor:
            x_t, i, cond = inputs(config.train_batch_size)
            return gaussian_log_prob(x_t, *gaussian(policy, x_t, i, cond), "mean").sum()

        trajectories = config.prompts_per_epoch * config.images_per_prompt * (config.num_steps + 1) * channels * side**2 * 4 / GIB
        bytes_each = 4 if config.reward_dtype == "fp32" else 2
        waiting = size_of(unet, vae, text) + size_of(*rewards, bytes_each=bytes_each)  # whatever happens
        waiting += 0 if config.latents_on_cpu else trajectories
        waiting += 0 if config.lora_rank or config.reference_on_cpu else size_of(unet)
        moments = 2 * 4 * sum(parameter.numel() for parameter in trained) / GIB
        visiting = size_of(unet) if config.reference_on_cpu else 0
        return {
            "exaflop_per_epoch": passes(config) * speed.flops_of(lambda: policy.denoise(*inputs(1))) / 1e18,
            "resident": waiting + moments,
            "sample": waiting + moments + peak_of(sample),
            "reward": waiting
            + moments
            + peak_of(lambda: decode(vae, torch.empty(config.sample_batch_size, channels, side, side))),
            "reference": waiting + moments + visiting + peak_of(log_probs),
            "update": waiting + peak_of(lambda: update(trained, loss)),
        }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=rehearsal.PIPELINES, default="full", help="tiny for a quick try")
    parser.add_argument("--output", default="", help="JSON file")
    arguments, flags = parser.parse_known_args(argv)
    with one_line_errors(ValueError, OSError):
        recipes = {"these flags": " ".join(flags)} if flags else RECIPES
        rows = [{"name": name, "flags": line} | derive(parse(line.split()), arguments.shape) for name, line in recipes.items()]
        phases = ["resident", "sample", "reward", "reference", "update"]
        cells = [[row["name"], *(f"{row[phase]:.1f}" for phase in phases), f"{row['exaflop_per_epoch']:.3g}"] for row in rows]
        tell("memory", argv, arguments.output, rows, [*phases, "EFLOP an epoch"], cells)


if __name__ == "__main__":
    main(sys.argv[1:])
