"""How much GPU memory a run of lasro.py will need, derived on a machine without a GPU as benchmarks.memory does it.

    python -m benchmarks.memory_few                                       # the presets for models of few steps
    python -m benchmarks.memory_few --preset sd-turbo --lora_rank 16 ...  # any flags of lasro.py

Generator, surrogate, the generator's moving average and the teacher lie on the GPU throughout, and so do the reward models.
"""

import argparse
import dataclasses
import sys
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from benchmarks import rehearsal
from benchmarks.memory import GIB, conditions, decode, normalise_in_fp32, peak_of, reward_models, size_of, tell, update
from config import LASRO_PRESETS, LasroConfig
from lasro import consistency_loss, generate, surrogate_loss
from plumbing.anchor import consistency_scheduler
from plumbing.errors import one_line_errors
from plumbing.flags import parse
from plumbing.networks import Embeddings
from plumbing.pipeline import network_policy
from plumbing.surrogate import surrogate_of, surrogate_scores
from plumbing.trainable import add_adapters, trained_parameters
from sampler import ddim

PRESETS = ("sd-turbo", "sdxl-turbo", "lcm")


def derive(config: LasroConfig, shape: str) -> dict[str, float]:
    """Peak GiB of every phase of an epoch on one GPU, and what of it is resident throughout."""
    sizes = rehearsal.PIPELINES[shape]
    with torch.device("meta"):
        texts = [CLIPTextModel(rehearsal.CLIPTextConfig(vocab_size=49408, **sizes["text"]))]
        if "text_2" in sizes:
            texts.append(CLIPTextModelWithProjection(rehearsal.CLIPTextConfig(vocab_size=49408, **sizes["text_2"])))
        rewards = reward_models(config, rehearsal.REWARDS["tiny" if shape.startswith("tiny") else "full"])
    channels, side = 4, sizes["unet"]["sample_size"]
    T, M, B = config.num_steps, config.train_batch_size, config.images_per_prompt

    def cond(number: int) -> Embeddings:
        return conditions(unet, number, 0)

    def noise(number: int, count: int) -> torch.Tensor:
        return torch.empty(number, count, channels, side, side)

    with FakeTensorMode(allow_non_fake_inputs=True) as without_content:
        unet, target, teacher = (UNet2DConditionModel(**sizes["unet"]).eval().requires_grad_(False) for _ in range(3))
        vae = AutoencoderKL(**rehearsal.VAE_BLOCKS, **sizes["vae"]).requires_grad_(False)
        uncond, critic = cond(1), surrogate_of(unet, T)
        normalise_in_fp32(unet, target, teacher, critic)
        resident = size_of(unet, target, teacher, critic, vae, *texts, *rewards)
    pipe = SimpleNamespace(unet=unet, scheduler=sizes["scheduler"])
    add_adapters(pipe, config.lora_rank) if config.lora_rank else unet.requires_grad_(True)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        critic.enable_gradient_checkpointing()
    trained, psi = list(trained_parameters(pipe).values()), list(critic.parameters())

    def policy(network, num_steps: int, guidance_scale: float):
        scheduler = consistency_scheduler(pipe, num_steps)
        return network_policy(network, uncond, scheduler, guidance_scale=guidance_scale, eta=1.0, autocast=config.autocast)

    generator, student, of_target = (policy(n, t, config.guidance_scale) for n, t in ((unet, T), (unet, 0), (target, 0)))
    of_teacher = policy(teacher, 0, config.teacher_guidance)
    ode = dataclasses.replace(of_teacher.schedule, rule=ddim, eta=0.0)
    of_teacher = dataclasses.replace(of_teacher, schedule=ode)
    scored = dataclasses.replace(generator.denoise, network=critic, guidance_scale=1.0)

    @torch.no_grad()
    def draw() -> None:
        some = cond(config.sample_batch_size)
        surrogate_scores(scored, generate(generator, noise(config.sample_batch_size, T), some), some)

    def l_surr() -> torch.Tensor:
        prompts = max(1, M // B)
        found = surrogate_scores(scored, noise(prompts * B, T), cond(prompts * B)).unflatten(0, (prompts, B)).mT
        return surrogate_loss(found, torch.empty_like(found))

    def l_gen() -> torch.Tensor:
        some, (x_0, epsilon) = cond(M), noise(M, 2).unbind(1)
        found = surrogate_scores(scored, generate(generator, noise(M, T), some), some)
        steps = torch.zeros(M, dtype=torch.long)
        return consistency_loss(student, of_target, of_teacher, x_0, epsilon, steps, some) - found.mean()

    with without_content:
        moments = [2 * 4 * sum(parameter.numel() for parameter in some) / GIB for some in (trained, psi)]
        phases = {"resident": sum(moments), "sample": sum(moments) + peak_of(draw)}
        phases["reward"] = sum(moments) + peak_of(lambda: decode(vae, noise(config.sample_batch_size, 1)[:, 0]))
        phases["surrogate"] = moments[0] + peak_of(lambda: update(psi, l_surr))
        critic.requires_grad_(False)
        phases["generator"] = moments[1] + peak_of(lambda: update(trained, l_gen))
    return {name: resident + more for name, more in phases.items()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the tiny shapes, for a quick try")
    parser.add_argument("--output", default="", help="JSON file")
    arguments, flags = parser.parse_known_args(argv)
    with one_line_errors(ValueError, OSError):
        rows = []
        for line in [" ".join(flags)] if flags else [f"--preset {name}" for name in PRESETS]:
            config = parse(line.split(), LasroConfig, LASRO_PRESETS, "benchmarks.memory_few")
            if config.preset not in PRESETS:
                raise ValueError(f"no shape is known of preset {config.preset}: use {', '.join(PRESETS)}")
            rows.append({"flags": line} | derive(config, f"tiny-{config.preset}" if arguments.tiny else config.preset))
        phases = [name for name in rows[0] if name != "flags"]
        cells = [[row["flags"], *(f"{row[phase]:.1f}" for phase in phases)] for row in rows]
        tell("memory_few", argv, arguments.output, rows, phases, cells)


if __name__ == "__main__":
    main(sys.argv[1:])
