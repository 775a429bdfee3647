"""What only a GPU can show: `make test-gpu`. Everywhere else these tests are skipped."""

import gc
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_train import arguments, metrics, weights

import evaluate
import train
from benchmarks import memory, rehearsal
from plumbing import processes
from plumbing.describe import rounding
from plumbing.flags import parse
from plumbing.networks import Embeddings
from plumbing.pipeline import encode_prompts, load_pipeline, network_policy, pipeline_policy
from plumbing.schedules import ddim_scheduler
from plumbing.trainable import make_trainable, trained_parameters
from sampler import gaussian, gaussian_log_prob, log_prob_table, sample_trajectories

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-gpu")]
PROMPTS = ["a red circle on a blue background", "a large white ring on a black background"]
NAMES = [(0, 0, n, b) for n in range(2) for b in range(2)]


def of_miniature(device: str, tf32: bool = False, **settings):
    """The miniature's policy, and four trajectories that it has drawn."""
    processes.start(tf32)
    pipe = load_pipeline("toy", torch.device(device))
    policy = pipeline_policy(pipe, 10, guidance_scale=3.0, eta=1.0, **settings)
    cond = encode_prompts(pipe, [prompt for prompt in PROMPTS for _ in range(2)])
    return policy, sample_trajectories(policy, cond, NAMES, 4)


def test_trajectories_and_log_probs_are_those_of_the_cpu():
    (cpu, expected), (gpu, drawn) = of_miniature("cpu"), of_miniature("cuda")
    assert drawn.latents.device.type == "cuda" and torch.equal(drawn.latents[:, 0].cpu(), expected.latents[:, 0])
    torch.testing.assert_close(drawn.latents.cpu(), expected.latents, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(drawn.log_probs, expected.log_probs, rtol=0, atol=1e-3)
    moved = SimpleNamespace(latents=expected.latents.cuda(), cond=drawn.cond, log_probs=expected.log_probs)
    torch.testing.assert_close(log_prob_table(gpu, moved, 4), log_prob_table(cpu, expected, 4), rtol=0, atol=2e-5)


def test_rounding_grows_with_speed(capsys):
    """Strict fp32, TF32 and bf16, in this order; printed with -s. In fp32 it is that of the CPU, TF32 being really off."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    deviations = {}
    for name, settings in (("fp32", {}), ("tf32", {"tf32": True}), ("bf16", {"autocast": "bf16"})):
        policy, drawn = of_miniature("cuda", **settings)
        deviations[name] = rounding(policy, drawn, 4).max().item()
    print("rounding of log-ratios:", deviations)
    assert deviations["fp32"] < 2e-5 and deviations["fp32"] < deviations["tf32"] < deviations["bf16"] < 0.1


@pytest.mark.parametrize(
    "flags", ["", "--method ddpo", "--method dpok", "--method grpo", "--method d3po --shared_x_T --images_per_prompt 4"]
)
def test_methods_train_as_on_the_cpu(flags, model_folder, tmp_path, monkeypatch):
    """Rewards and the first gradient, before Adam makes even steps of what is rounding."""
    torch.cuda.reset_peak_memory_stats()
    for name, count in (("gpu", torch.cuda.device_count), ("cpu", lambda: 0)):
        monkeypatch.setattr(torch.cuda, "device_count", count)
        more = ["--epochs", "1", "--updates_per_epoch", "1", *flags.split()]
        train.main(arguments(model_folder, tmp_path / name, *more))
    gpu, cpu = (metrics(tmp_path / name)[1] for name in ("gpu", "cpu"))
    assert gpu["reward_mean"] == pytest.approx(cpu["reward_mean"], abs=1e-2)
    assert gpu["grad_norm"] == pytest.approx(cpu["grad_norm"], rel=0.1)
    assert json.loads((tmp_path / "gpu" / "metrics.jsonl").read_text().splitlines()[1])["peak_memory_gib"] < 1


def test_deterministic_runs_resume_bit_by_bit(model_folder, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train.main(arguments(model_folder, whole, "--epochs", "3", "--deterministic", "True"))
    train.main(arguments(model_folder, resumed, "--epochs", "1", "--deterministic", "True"))
    train.main(["--resume", str(resumed), "--epochs", "3"])
    assert metrics(resumed)[3] == metrics(whole)[3]
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(resumed).items())


@pytest.mark.parametrize("flags", ["--compile True", "--autocast bf16", "--channels_last True", "--gradient_checkpointing True"])
def test_options_change_rounding_only(flags, model_folder, tmp_path):
    for name, more in (("usual", []), ("changed", flags.split())):
        train.main(arguments(model_folder, tmp_path / name, "--epochs", "1", *more))
    usual, changed = (metrics(tmp_path / name)[1] for name in ("usual", "changed"))
    bf16 = "bf16" in flags
    assert changed["reward_mean"] == pytest.approx(usual["reward_mean"], abs=0.1 if bf16 else 1e-2)
    assert changed["log_prob_drift"] < (0.05 if bf16 else 1e-4)


def test_memory_is_what_was_derived():
    """Of an update of Stable Diffusion's shape, every weight trained, with random weights: what torch allocates."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB free")
    flags = "--preset large-hpsv2 --train_batch_size 2 --reference_on_cpu --latents_on_cpu --reward jpeg-compressibility"
    config = parse(flags.split())
    shapes = rehearsal.PIPELINES["full"]
    with torch.device("meta"):
        others = [
            rehearsal.AutoencoderKL(**rehearsal.VAE_BLOCKS, **shapes["vae"]),
            rehearsal.CLIPTextModel(rehearsal.CLIPTextConfig(vocab_size=49408, **shapes["text"])),
        ]
    derived = memory.derive(config)["update"] - memory.size_of(*others)
    with torch.device("cuda"):
        unet = rehearsal.UNet2DConditionModel(**shapes["unet"]).eval().requires_grad_(False)
    pipe = SimpleNamespace(unet=unet)
    make_trainable(pipe, config)
    optimizer = torch.optim.AdamW(trained_parameters(pipe).values(), fused=True)
    texts = Embeddings({"encoder_hidden_states": torch.randn(1, 77, 768, device="cuda")})
    scheduler = ddim_scheduler(rehearsal.PNDM.config, 50)
    policy = network_policy(unet, texts, scheduler, guidance_scale=5.0, eta=1.0, autocast="bf16")
    x_t, i = torch.randn(2, 4, 64, 64, device="cuda"), torch.zeros(2, dtype=torch.long, device="cuda")
    before = torch.cuda.memory_allocated() / 2**30 - memory.size_of(unet)  # of other tests
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        for _ in range(2):
            gaussian_log_prob(x_t, *gaussian(policy, x_t, i, texts[torch.zeros_like(i)]), "mean").sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated() / 2**30 - before
    print(f"update: derived {derived:.2f} GiB, measured {measured:.2f} GiB")
    assert measured == pytest.approx(derived, rel=0.15)


def test_nccl_works_on_one_gpu():
    code = """
import torch, torch.distributed as dist
from plumbing import processes
processes.join(torch.device("cuda", 0))
total = torch.ones(3, device="cuda")
dist.all_reduce(total, group=processes.GRADIENTS)
parts = [None]
dist.all_gather_object(parts, torch.ones(2))
print(total.sum().item(), parts[0].sum().item())
"""
    alone = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1"}
    command, environment = [sys.executable, "-c", code], os.environ | alone
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["3.0", "2.0"], done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_one(model_folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train.main(arguments(model_folder, one, "--epochs", "2"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command += arguments(model_folder, two, "--epochs", "2")
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["eval_reward"] == pytest.approx(b["eval_reward"], abs=1e-2)
    start = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    moved = [torch.cat([(weights(run)[n] - t).flatten() for n, t in start.items()]) for run in (one, two)]
    assert (moved[1] - moved[0]).norm() < 0.1 * moved[0].norm()


def test_evaluation_runs_and_predicts(model_folder, tmp_path):
    train.main(arguments(model_folder, tmp_path / "run", "--epochs", "2", "--autocast", "bf16"))
    evaluate.main(["--runs", str(tmp_path / "run"), "--prompts", "toy-small:6", "--images_per_prompt", "2"])
    rows = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())["results"]
    assert [row["model"] for row in rows] == ["base", "tuned"] and rows[1]["prediction_correlation"] is not None
