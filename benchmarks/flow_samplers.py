"""Three ways to draw noise on a rectified flow, and its ODE: the noise that each leaves, and what its pictures score.

    python -m benchmarks.flow_samplers --output results/reproduce/samplers.json

On the miniature flow, untrained by any reward, at T = 10: on the levels that diffusers gives Stable Diffusion 3, which Flow-GRPO
trains on (shift 3, the last but one at 0.009), and on those of the sampler here (plumbing/schedules.py::flow_scheduler), which
for the miniature are 1, 0.9, ..., 0.1, 0. Exact noise is that of a distribution which is a single point, where x_0 is known.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from benchmarks.card import encoded
from comparators.flow_steps import cps, sde
from miniature import world
from plumbing import plots
from plumbing.errors import one_line_errors
from plumbing.pipeline import decode_latents, encode_prompts, load_pipeline, pipeline_policy
from plumbing.processes import answer
from plumbing.provenance import write_result
from plumbing.schedules import noise_schedule, scheduler_at
from sampler import EVALUATION, Schedule, Weights, ddim, sample_trajectories

T, GUIDANCE, SEEDS = 10, 2.0, (0, 1, 2)
SAMPLERS: dict[str, tuple[Callable[[Schedule], Weights], float]] = {  # with the noise that its users ask for
    "ODE": (ddim, 0.0),
    "DDIM, eta 1": (ddim, 1.0),
    "SDE, a 0.7": (sde, 0.7),
    "CPS, a 0.8": (cps, 0.8),
}


def noise_of_a_point(schedule: Schedule) -> list[float]:
    """Standard deviation of the noise after each step, where x_0 is a point and known, and the network so exact.

    A network that is told the level s takes x - alpha x_0 for s epsilon, whatever it is.
    """
    noise, after = 1.0, []
    for _, of_epsilon, sigma, s in zip(*(part.tolist() for part in (*schedule.weights, schedule.s[:-1])), strict=True):
        noise = ((of_epsilon * noise / s) ** 2 + sigma**2) ** 0.5
        after.append(noise)
    return after


@torch.no_grad()
def noise_in_latents(pipe, x_0: Tensor, images: Tensor) -> float:
    """Root mean square of what the autoencoder does not give back of latents x_0, when it encodes the pictures made of them.

    Not all of it is noise: compare with what the ODE leaves.
    """
    return (x_0 - encoded(pipe, images)).square().mean().sqrt().item()


def schedulers(pipe) -> dict[str, FlowMatchEulerDiscreteScheduler]:
    stable_diffusion_3 = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stable_diffusion_3.set_timesteps(T)
    return {"Stable Diffusion 3's levels": stable_diffusion_3, "levels here": scheduler_at(pipe.scheduler, T)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128, help="held-out ones, of two objects")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; beside it the pictures of the first eight prompts")
    options = parser.parse_args(argv)
    with one_line_errors(ValueError, OSError):
        pipe = load_pipeline("toy-flow", torch.device("cpu"), max_sequence_length=0)
        prompts, shown, results = world.held_out_set(True)[: options.prompts], {}, {}
        cond = encode_prompts(pipe, prompts)
        usual = pipeline_policy(pipe, T, guidance_scale=GUIDANCE, eta=1.0)
        for levels, scheduler in schedulers(pipe).items():
            results[levels] = {"noise told": noise_schedule(scheduler, 0.0).s[1:].tolist(), "samplers": {}}
            for name, (rule, eta) in SAMPLERS.items():
                schedule = replace(noise_schedule(scheduler, eta), rule=rule)
                policy, of_seeds = replace(usual, schedule=schedule), []
                for seed in SEEDS:
                    names = [(seed, EVALUATION, n, 0) for n in range(len(prompts))]
                    x_0 = sample_trajectories(policy, cond, names, 64).x_0
                    images = decode_latents(pipe, x_0)
                    shown.setdefault(levels, {}).setdefault(name, images[:8])
                    of_seeds.append((noise_in_latents(pipe, x_0, images), world.alignment(images, prompts).mean().item()))
                noise, alignment = (list(values) for values in zip(*of_seeds, strict=True))
                row = {"noise of a point": noise_of_a_point(schedule), "noise in latents": noise, "alignment": alignment}
                results[levels]["samplers"][name] = row
                answer(f"{levels}: {name}: in latents {sum(noise) / len(noise):.3f}, alignment {sum(alignment) / len(noise):.3f}")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        plots.grid(shown["Stable Diffusion 3's levels"], prompts[:8], options.output.with_name("samplers-pictures.png"), across=8)
        result = {"T": T, "guidance_scale": GUIDANCE, "results": results}
        write_result(options.output, "-m benchmarks.flow_samplers", argv, result)


if __name__ == "__main__":
    main(sys.argv[1:])
