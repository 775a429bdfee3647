"""The miniature's card: what its pictures score, before any finetuning, by guidance and number of steps.

    python -m benchmarks.card --output results/miniature.json     # of the committed weights, in minutes
    python -m benchmarks.card --model toy-flow --guidance_scale 1 2 --num_steps 5 10 --output results/flow.json \\
        --pictures results/flow.png
    python -m benchmarks.card --model toy-turbo --guidance_scale 1 --num_steps 2 1 --output results/turbo.json \\
        --pictures results/turbo.png

Held-out prompts, one picture each for alignment and four for diversity, at the noise of evaluate.py with seed 0.
"""

import argparse
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch

from miniature import world
from plumbing import plots
from plumbing.errors import one_line_errors
from plumbing.pipeline import decode_latents, load_pipeline, pipeline_policy, sample_images
from plumbing.provenance import write_result
from sampler import EVALUATION

SETS = {"one object": world.held_out_set(False), "two objects": world.held_out_set(True)}
GUIDANCE, STEPS = (1.0, 2.0, 3.0, 5.0), (5, 10, 50)


def pictures(pipe, prompts: list[str], guidance_scale: float, num_steps: int, each: int = 1) -> torch.Tensor:
    """(P, each, 3, 32, 32)."""
    policy = pipeline_policy(pipe, num_steps, guidance_scale=guidance_scale, eta=1.0)
    names = [(0, EVALUATION, n, b) for n in range(len(prompts)) for b in range(each)]
    texts = [prompt for prompt in prompts for _ in range(each)]
    return sample_images(policy, pipe, texts, names, 64).unflatten(0, (len(prompts), each))


def alignment(pipe, prompts: list[str], guidance_scale: float, num_steps: int) -> float:
    return world.alignment(pictures(pipe, prompts, guidance_scale, num_steps)[:, 0], prompts).mean().item()


def by_attribute(images: torch.Tensor, prompts: list[str]) -> dict[str, float]:
    """Mean probability of every stated attribute, those of the first and second object together."""
    found = defaultdict(list)
    for scores in world.attribute_scores(images, prompts):
        for name, value in scores.items():
            found[name.rstrip("12")].append(value)
    return {name: fmean(values) for name, values in sorted(found.items())}


def diversity(images: torch.Tensor) -> float:
    """Root mean square distance of the pictures (P, B, ...) of a prompt from their mean, as evaluate.py has it."""
    return images.double().var(1, correction=0).flatten(1).mean(1).sqrt().mean().item()


def encoded(pipe, images: torch.Tensor) -> torch.Tensor:
    """Latents x_0 of pictures (M, 3, 32, 32), as the network has them."""
    return pipe.vae.encode(images * 2 - 1).latents * pipe.vae.config.scaling_factor


@torch.no_grad()
def limits(pipe, prompts: list[str]) -> dict[str, float]:
    """What to expect at best and at worst: drawn pictures, the same through the autoencoder, and those of other prompts."""
    rng = random.Random(0)
    drawn = torch.stack([world.draw(prompts, rng) for _ in range(4)], 1)
    through = decode_latents(pipe, encoded(pipe, drawn[:, 0]))
    others = [prompts[n] for n in torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))]
    return {
        "drawn": world.alignment(drawn[:, 0], prompts).mean().item(),
        "autoencoder": world.alignment(through, prompts).mean().item(),
        "chance": world.alignment(drawn[:, 0], others).mean().item(),
        "diversity of drawn pictures": diversity(drawn),
    }


def figures(pipe, guidance: tuple[float, ...], num_steps: tuple[int, ...]) -> dict:
    """Of each set; attributes and diversity are those at the first guidance and T, where finetuning begins."""
    result = {}
    for name, prompts in SETS.items():
        base = pictures(pipe, prompts, guidance[0], num_steps[0], each=4)
        table = {f"guidance {w:g}": {f"T = {T}": alignment(pipe, prompts, w, T) for T in num_steps} for w in guidance}
        result[name] = limits(pipe, prompts) | {
            "attributes": by_attribute(base[:, 0], prompts), "diversity": diversity(base), "alignment": table
        }  # fmt: skip
    return result


def rows(pipe, name: str, guidance_scale: float, num_steps: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The first eight held-out prompts of two objects, from the same noise at every T."""
    drawn = {T: pictures(pipe, SETS["two objects"][:8], guidance_scale, T)[:, 0] for T in num_steps}
    return {f"{name}, T = {T}": images for T, images in drawn.items()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.card", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="toy", help="the committed miniature, or a folder like it")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=GUIDANCE, help="w")
    parser.add_argument("--num_steps", type=int, nargs="+", default=STEPS, help="T")
    parser.add_argument("--output", type=Path, help="a JSON file; otherwise it is printed")
    parser.add_argument("--pictures", type=Path, help="a PNG file: the miniature's own under guidance, and these")
    arguments = parser.parse_args(argv)
    with one_line_errors(ValueError, OSError):
        pipe = load_pipeline(arguments.model, torch.device("cpu"), max_sequence_length=0)  # the miniatures have no T5
        found = figures(pipe, tuple(arguments.guidance_scale), tuple(arguments.num_steps))
        how = {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
        if arguments.pictures:
            shown = rows(load_pipeline("toy", torch.device("cpu")), "toy", 2.0, (10,))
            shown |= rows(pipe, arguments.model, arguments.guidance_scale[0], tuple(arguments.num_steps))
            plots.grid(shown, SETS["two objects"][:8], arguments.pictures, across=8)
        if arguments.output:
            write_result(arguments.output, "-m benchmarks.card", argv, how | {"figures": found})
        else:
            print(json.dumps(how | {"figures": found}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
