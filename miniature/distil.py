"""The miniature distilled to one and two steps, by latent consistency (arXiv 2310.04378): what lasro.py finetunes.

    python -m miniature.distil FOLDER     # makes it again, in about 20 minutes of one core

The student begins as the miniature's UNet and learns on the teacher's own pictures, under guidance of GUIDANCE, for which it
needs no second call thereafter. All else, text encoder and autoencoder, is the miniature's. The result lies in turbo/.
"""

import copy
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from lasro import consistency_loss
from miniature import build
from plumbing.anchor import consistency_scheduler, solver_policies, teachers_pictures
from plumbing.pipeline import encode_prompts, load_pipeline, save_pipeline

# All OURS, as lasro.py has it.
STEPS, PEAK_LR = 1200, 5e-4
GUIDANCE = 2.0
PICTURES, PICTURE_STEPS = 2048, 10  # of the teacher's own, to learn on
TARGET_DECAY = 0.95  # per step, of the average that the student is compared with


def train_student(pipe: StableDiffusionPipeline, student, steps: int, pictures: int, folder: Path) -> float:
    """Distils the teacher, pipe.unet, into `student`, which begins as its copy -> seconds."""
    target, captions, file = copy.deepcopy(student).requires_grad_(False), build.Captions(0), folder / "pictures.pt"
    prompts = [captions.prompt() for _ in range(pictures)]
    if not file.exists():
        torch.save(teachers_pictures(pipe, pipe, prompts, PICTURE_STEPS, GUIDANCE, 128, seed=0), file)
    x_0, cond = torch.load(file, weights_only=True), encode_prompts(pipe, prompts)
    distilled = copy.copy(pipe)
    distilled.unet = student
    policies = solver_policies(distilled, target, pipe, GUIDANCE)

    def loss_of_batch(step: int) -> Tensor:
        with torch.no_grad():
            for average, weight in zip(target.parameters(), student.parameters(), strict=True):
                average.lerp_(weight, 1 - TARGET_DECAY)
        rows, i = torch.randint(len(x_0), (build.BATCH,)), torch.randint(len(policies[0].schedule.timesteps), (build.BATCH,))
        return consistency_loss(*policies, x_0[rows], torch.randn_like(x_0[rows]), i, cond[rows])

    return build.optimise("student", [student, target], steps, PEAK_LR, loss_of_batch, captions, folder)


def distil(folder: Path, seed: int = 0, steps: int = STEPS, pictures: int = PICTURES) -> None:
    """Distils the miniature and saves it, with made.json, which says how; as in build.made_whole."""
    with build.made_whole(folder, seed) as state:
        pipe = load_pipeline("toy", torch.device("cpu"))
        student = copy.deepcopy(pipe.unet).requires_grad_(True)
        seconds = train_student(pipe, student, steps, pictures, state)
        pipe.unet = student
        save_pipeline(pipe, consistency_scheduler(pipe, 2), state / "pipeline")
        build.halve(state / "pipeline")
        how = {"seed": seed, "steps": steps, "pictures": pictures, "guidance_scale": GUIDANCE, "seconds": seconds}
        build.write_made(state / "pipeline", how)


if __name__ == "__main__":
    build.command(distil, "miniature.distil", __doc__)
