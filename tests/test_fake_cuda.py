"""Training and evaluation with fake CUDA tensors (fake_cuda/run.py), without a GPU: what is on the wrong device raises."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_pipeline

FOLDER = ROOT / "tests" / "fake_cuda"
SAMPLING = ("sampler.py", "plumbing/networks.py", "plumbing/pipeline.py")
UNET, GUIDANCE = "plumbing/networks.py:GuidedUNet.predict", "plumbing/networks.py:Guided.__call__"
LOG_PROB = "sampler.py:gaussian_log_prob"
TRAINING = (
    "--preset toy --eval_prompts= --prompts_per_epoch 1 --images_per_prompt 2 --num_steps 2 --guidance_scale 3 --autocast bf16 "
    "--reward test_fake_cuda:brightness"
).split()
METHODS = {
    "prdp": "--epochs 2 --num_steps 3 --updates_per_epoch 2",
    "adapters": "--epochs 2 --lora_rank 2 --latents_on_cpu --gradient_checkpointing --train_batch_size auto "
    "--sample_batch_size auto --log_prob_batch_size auto --reference_steps 1",
    "offline": "--epochs 2 --offline --reference_on_cpu",
    "ddpo": "--epochs 1 --method ddpo --updates_per_epoch 2",
    "dpok": "--epochs 1 --method dpok --kl_form exact",
    "d3po": "--epochs 1 --method d3po --shared_x_T --clip_range 0.1",
    "grpo": "--epochs 1 --method grpo --updates_per_epoch 2",
}


def brightness(images, prompts):
    """A reward that goes by numpy, as users' own may: it must get its pictures on the CPU."""
    return torch.from_numpy(images.numpy().mean((1, 2, 3)))


def all_cases(model, folder) -> dict[str, tuple[str, list[str]]]:
    """{name: (script, argv)}; a later one may go on from the run of an earlier one."""
    prompts = folder / "two.txt"
    prompts.write_text("a red circle on a blue background\na cyan ring on a black background\n")
    of_training = [*TRAINING, "--model", str(model), "--prompts", str(prompts)]
    cases = {
        name: ("train", [*of_training, *flags.split(), "--output_dir", f"{folder}/{name}"]) for name, flags in METHODS.items()
    }
    cases["prdp"][1].extend(["--eval_prompts", str(prompts)])
    cases["resumed"] = ("train", ["--resume", f"{folder}/prdp", "--epochs", "3", "--reward", "test_fake_cuda:brightness"])
    cases["evaluate"] = (
        "evaluate",
        ["--runs", f"{folder}/prdp", "--images_per_prompt", "2", "--rewards", "test_fake_cuda:brightness"],
    )
    of_model = [
        "--models",
        f"base={model}",
        "--prompts",
        str(prompts),
        "--rewards",
        "toy-colourfulness",
        "--images_per_prompt",
        "1",
    ]
    for steps in (2, 4):
        name = f"{steps} steps"
        cases[name] = ("evaluate", [*of_model, "--num_steps", str(steps), "--output_dir", f"{folder}/{name}"])
    return cases


CASES = [*METHODS, "resumed", "evaluate", "2 steps", "4 steps"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    """What fake_cuda/run.py says of every case, on a UNet of one level: what a fake tensor costs is by the operation."""
    if torch.version.cuda is None or shutil.which("gcc") is None:
        pytest.skip("needs gcc and a CUDA build of torch")
    folder = tmp_path_factory.mktemp("fake_cuda")
    count, cases = folder / "libdevice_count.so", folder / "cases.json"
    for source, library in (("device_count.c", count), ("libcuda.c", folder / "libcuda.so.1")):
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(FOLDER / source)], check=True)
    make_pipeline(channels=(8,)).save_pretrained(folder / "model")
    cases.write_text(json.dumps(all_cases(folder / "model", folder)))
    environment = os.environ | {
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}", "LD_PRELOAD": str(count),
        "PYTHONPATH": f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, str(FOLDER / "run.py"), str(cases)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(cases.with_suffix(".out.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_on_the_wrong_device(outcomes, name):
    assert outcomes[name]["error"] is None, outcomes[name]["error"]


def test_evaluation_predicts(outcomes):
    """Else the case above would not have been of the prediction."""
    assert outcomes["evaluate"]["synchronisations"]["sampler.py:_table"] > 0


def test_autocast_of_the_unet(outcomes):
    """By CUDA's rules. The resumed run alone does not measure rounding, for which the UNet is also run in fp32."""
    dtypes = outcomes["resumed"]["dtypes"][UNET]
    for operation in ("convolution", "addmm", "mm", "bmm"):
        assert dtypes[operation] == ["cuda bfloat16"], operation
    for operation in ("native_group_norm", "native_layer_norm", "_softmax"):
        assert dtypes[operation] == ["cuda float32"], operation
    # The fp32 one is its second output, of log-sum-exps.
    assert dtypes["_scaled_dot_product_efficient_attention"] == ["cuda bfloat16", "cuda float32"]
    assert outcomes["resumed"]["dtypes"][GUIDANCE]["sub"] == ["cuda float32"]


@pytest.mark.parametrize("name", CASES)
def test_log_probs_are_of_full_precision(outcomes, name):
    dtypes = outcomes[name]["dtypes"]
    assert dtypes[LOG_PROB]["mean"] == ["cuda float64"]
    for place in (LOG_PROB, "sampler.py:gaussian", "sampler.py:sample_trajectories"):
        for operation, found in dtypes[place].items():
            assert set(found) <= {"cuda float32", "cuda float64"}, (place, operation)


def test_no_step_of_sampling_waits_for_the_device(outcomes):
    """Once a batch is drawn, the CPU neither copies to the device nor waits for it, so that the GPU never waits for the CPU."""
    two, four = (
        {place: number for place, number in outcomes[f"{steps} steps"]["synchronisations"].items() if place.startswith(SAMPLING)}
        for steps in (2, 4)
    )
    assert two == four
