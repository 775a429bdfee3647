"""Small random-weight models of Stable Diffusion's classes, made here: no test downloads anything."""

import copy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from miniature import build  # noqa: E402
from plumbing.pipeline import pipeline_policy  # noqa: E402
from sampler import Policy, Schedule  # noqa: E402

SD_V1_4_SCHEDULER = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    set_alpha_to_one=False,
    steps_offset=1,
    clip_sample=False,
    timestep_spacing="leading",
    prediction_type="epsilon",
)


def make_pipeline(seed: int = 0):
    """A StableDiffusionPipeline with a small untrained UNet whose output is of the size of the noise, as a trained one's is."""
    torch.manual_seed(seed)
    pipe = build.initial_pipeline(channels=(8, 16), width=16)
    torch.nn.init.normal_(pipe.unet.conv_out.weight, std=0.1)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_policy(pipe, num_steps=5, guidance_scale=3.0, scheduler=None, **settings) -> Policy:
    """The pipeline's policy, on its own schedule with changes to its config."""
    changed = copy.copy(pipe)
    changed.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config | (scheduler or {}))
    return pipeline_policy(changed, num_steps, guidance_scale=guidance_scale, **{"eta": 1.0} | settings)


def answering(schedule: Schedule, output: torch.Tensor) -> Policy:
    """A policy whose network puts out this, (M, C, H, W), whatever it is asked."""
    return Policy(lambda x_t, t, cond: output, schedule, tuple(output.shape[1:]), torch.device("cpu"))


@pytest.fixture
def pipe():
    return make_pipeline()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The small pipeline as a folder, for the scripts."""
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    make_pipeline().save_pretrained(folder)
    return folder
