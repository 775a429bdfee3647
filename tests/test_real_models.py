"""Stable Diffusion v1.4's classes, the learned rewards and the hub's prompt files, all tiny: presets, LoRA, memory options."""

import copy
import dataclasses
import json
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from conftest import make_pipeline
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import train
from benchmarks import rehearsal
from plumbing import pipeline
from plumbing.describe import rounding
from plumbing.flags import parse
from plumbing.pipeline import count_truncated, encode_prompts, load_pipeline, pipeline_policy
from plumbing.schedules import ddim_scheduler
from plumbing.trainable import make_trainable, trained_parameters
from rewards import load_reward
from sampler import Policy, Trajectories, backward_through_table, log_prob_table, sample_trajectories

SHORT = "--epochs 2 --prompts_per_epoch 2 --images_per_prompt 2 --num_steps 3 --eval_prompts= --learning_rate 1e-3".split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Of a rehearsal in which everything is tiny."""
    return rehearsal.make(tmp_path_factory.mktemp("rehearsal") / "all", "tiny", "tiny")


@pytest.fixture
def pipe(flags):
    return load_pipeline(flags[flags.index("--model") + 1], CPU)


def run_of(flags, folder, *more) -> list[dict]:
    train.main([*flags, *SHORT, "--output_dir", str(folder), *map(str, more)])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def make_policy(pipe, **settings) -> Policy:
    return pipeline_policy(pipe, 3, guidance_scale=5.0, eta=1.0, **settings)


def draw(policy, pipe) -> Trajectories:
    cond = encode_prompts(pipe, ["a photo of a cat", "a painting", ""])
    return sample_trajectories(policy, cond, [(0, 0, n, 0) for n in range(3)], 3)


def test_multi_reward_preset_runs_end_to_end(flags, tmp_path, monkeypatch):
    seen = []
    original = train.score

    def remembering(pipe, x_0, prompts, reward, batch_size):
        scores = original(pipe, x_0, prompts, reward, batch_size)
        seen.append((pipeline.decode_latents(pipe, x_0), prompts, scores))
        return scores

    monkeypatch.setattr(train, "score", remembering)
    lines = run_of(flags, tmp_path / "run", "--preset", "multi-reward", "--eval_prompts", "animals", "--eval_every", 2)
    images, prompts, scores = seen[0]
    assert images.shape == (4, 3, 64, 64) and prompts[0] == prompts[1] != prompts[2]
    assert " of a " in prompts[0]  # of the Pick-a-Pic-like parquet file
    weights = flags[flags.index("--reward_weights") + 1 :]
    parts = {name: load_reward(name, weights)(images, prompts) for name in ("pickscore", "hpsv2", "aesthetic")}
    torch.testing.assert_close(scores, 10 * parts["pickscore"] + 2 * parts["hpsv2"] + 0.05 * parts["aesthetic"])
    assert lines[1]["reward_mean"] == pytest.approx(scores.mean().item(), abs=1e-6)
    assert lines[0]["eval_reward"] != lines[2]["eval_reward"]
    assert len(lines[1]["rounding"]) == 3 and lines[2]["rounding"] is None
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline", safety_checker=None)
    assert type(opened.unet).__name__ == "UNet2DConditionModel"


def test_dpoks_preset_runs_end_to_end_on_imagereward(flags, tmp_path):
    lines = run_of(flags, tmp_path / "run", "--preset", "dpok", "--steps_per_update", "2", "--updates_per_epoch", "1")
    assert len(lines) == 3 and lines[1]["reward_mean"] != lines[2]["reward_mean"]


def test_offline_draws_from_the_reference_for_ever(flags, tmp_path):
    """In the second epoch theta has moved: online its pictures have changed, offline they are still the reference's."""
    reward = "--preset small-hpsv2 --reward jpeg-compressibility --kl_weight 1 --updates_per_epoch 1".split()
    online = run_of(flags, tmp_path / "online", *reward)
    offline = run_of(flags, tmp_path / "offline", *reward, "--offline")
    frozen = run_of(flags, tmp_path / "frozen", *reward, "--learning_rate", "1e-30")
    assert offline[1]["reward_mean"] == online[1]["reward_mean"] == frozen[1]["reward_mean"]
    assert offline[2]["reward_mean"] == pytest.approx(frozen[2]["reward_mean"], abs=1e-6)
    assert abs(online[2]["reward_mean"] - frozen[2]["reward_mean"]) > 1e-4
    assert abs(offline[2]["kl_nats"]) > 0.1  # log_probs_old is theta's, not that of what was drawn
    assert offline[2]["log_prob_drift"] is None


def test_adapters_off_is_the_base_model_exactly(pipe):
    base = copy.deepcopy(pipe.unet)
    reference = make_trainable(pipe, parse(["--lora_rank", "4"]))
    trained = trained_parameters(pipe)
    again = copy.copy(pipe)
    again.unet = copy.deepcopy(base)
    make_trainable(again, parse(["--lora_rank", "4"]))  # the same in every process: from the run's seed
    assert all(torch.equal(parameter, trained[name]) for name, parameter in trained_parameters(again).items())
    assert trained and all("lora_" in name for name in trained)
    policy = make_policy(pipe)
    drawn = draw(policy, pipe)
    of_base = dataclasses.replace(policy, denoise=dataclasses.replace(policy.denoise, network=base))
    expected = log_prob_table(of_base, drawn, 4)
    assert torch.equal(log_prob_table(policy, drawn, 4), expected)  # theta starts at ref
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(log_prob_table(policy, drawn, 4), expected)
    with reference(policy) as pi_ref:
        assert torch.equal(log_prob_table(pi_ref, drawn, 4), expected)
    assert all(parameter.requires_grad for parameter in trained.values())
    assert not torch.equal(log_prob_table(policy, drawn, 4), expected)


def test_lora_trains_resumes_and_opens_in_plain_diffusers(flags, tmp_path):
    lora = ["--preset", "small-hpsv2", "--lora_rank", "4", "--updates_per_epoch", "2", "--clip_range", "1"]
    whole = run_of(flags, tmp_path / "whole", *lora)
    run_of(flags, tmp_path / "part", *lora, "--epochs", 1)
    train.main(["--resume", str(tmp_path / "part"), "--epochs", "2"])
    resumed = [json.loads(line) for line in (tmp_path / "part" / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "images_per_second", "peak_memory_gib")
    assert {k: v for k, v in resumed[2].items() if k not in clock} == {k: v for k, v in whole[2].items() if k not in clock}
    adapters = tmp_path / "whole" / "lora" / "pytorch_lora_weights.safetensors"
    assert any(tensor.abs().max() > 0 for name, tensor in load_file(adapters).items() if "lora_B" in name or "lora.up" in name)

    def picture(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe("a photo of a cat", num_inference_steps=3, generator=generator, output_type="latent").images

    def base():
        return StableDiffusionPipeline.from_pretrained(flags[flags.index("--model") + 1], safety_checker=None)

    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "whole" / "pipeline", safety_checker=None)
    with_adapters = base()
    with_adapters.scheduler = merged.scheduler
    plain = base()
    plain.scheduler = merged.scheduler
    with_adapters.load_lora_weights(tmp_path / "whole" / "lora")
    torch.testing.assert_close(picture(with_adapters), picture(merged), rtol=1e-3, atol=1e-3)
    assert (picture(plain) - picture(merged)).abs().max() > 0.01
    assert set(merged.unet.state_dict()) == set(plain.unet.state_dict())


def test_rounding_is_reported_per_step_and_a_drowned_clip_is_told(flags, tmp_path, capsys):
    """bf16 against fp32 at unchanged weights: the deviation of the log-ratio, by step, in units of the clip range."""
    small = ["--preset", "small-hpsv2", "--reward", "jpeg-compressibility", "--epochs", "1"]
    exact = run_of(flags, tmp_path / "fp32", *small, "--guidance_scale", "1", "--clip_range", "0.1")[1]
    printed = capsys.readouterr().err
    assert "rounding: log-ratios at unchanged weights" in printed and "warning" not in printed
    coarse = run_of(flags, tmp_path / "bf16", *small, "--guidance_scale", "1", "--autocast", "bf16")[1]
    printed = capsys.readouterr().err
    assert len(coarse["rounding"]) == len(exact["rounding"]) == 3
    assert all(b > 10 * e for b, e in zip(coarse["rounding"], exact["rounding"], strict=True))
    worst = max(coarse["rounding"])
    assert f"up to {worst:.2g} = {worst / 1e-6:.2g} clip ranges" in printed and "drowns in rounding" in printed


def test_rounding_compares_with_fp32(pipe):
    policy = make_policy(pipe)
    drawn = draw(policy, pipe)
    used, exact = (log_prob_table(make_policy(pipe, autocast=autocast), drawn, 9) for autocast in ("bf16", "no"))
    deviation = rounding(make_policy(pipe, autocast="bf16"), drawn, 9)
    torch.testing.assert_close(deviation, (used - exact).abs().amax(0), rtol=1e-2, atol=1e-6)


def test_latents_are_not_clipped_where_the_schedule_does_not_say_so(pipe):
    assert "clip_sample" not in pipe.scheduler.config  # of PNDM, as Stable Diffusion v1.4 comes
    assert make_policy(pipe).schedule.x_0_limit == float("inf")
    pipe.scheduler = ddim_scheduler(dict(pipe.scheduler.config) | {"clip_sample": True}, 3)
    assert make_policy(pipe).schedule.x_0_limit == 1


def gradient(pipe, drawn, table_grad, **changes) -> torch.Tensor:
    """Of a weighted sum of log-probs by the UNet, made trainable with these settings."""
    pipe = copy.copy(pipe)
    pipe.unet = copy.deepcopy(pipe.unet)
    config = dataclasses.replace(parse([]), **changes)
    make_trainable(pipe, config)
    backward_through_table(make_policy(pipe), drawn, table_grad, 3)  # 3 x 2 entries: batches of one size, compiled once
    return torch.cat([parameter.grad.flatten() for parameter in trained_parameters(pipe).values()])


@pytest.mark.parametrize("option", ["gradient_checkpointing", "channels_last", "compile"])
def test_options_leave_the_gradient_as_it_is(option, monkeypatch):
    """To 1e-4 of its norm. The compiler's tracing is used, its code generator (minutes on a CPU) is not."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    pipe = make_pipeline()
    drawn = draw(make_policy(pipe), pipe)
    table_grad = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    plain = gradient(pipe, drawn, table_grad)
    changed = gradient(pipe, drawn, table_grad, **{option: True})
    assert (changed - plain).norm() < 1e-4 * plain.norm()


def test_gradient_checkpointing_recomputes(pipe):
    """The option has an effect: the inner blocks run again in the backward pass."""
    calls = []
    pipe.unet.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    drawn = draw(make_policy(pipe), pipe)
    for option, runs in ((False, 1), (True, 2)):
        changed = copy.copy(pipe)
        make_trainable(changed, dataclasses.replace(parse([]), gradient_checkpointing=option))
        calls.clear()
        backward_through_table(make_policy(pipe), drawn, torch.ones(3, 3), 9)
        assert len(calls) == runs


def test_where_things_wait_changes_nothing(flags, tmp_path):
    same = [*"--preset small-hpsv2 --reward jpeg-compressibility --updates_per_epoch 2 --clip_range 1".split()]
    usual = run_of(flags, tmp_path / "usual", *same)
    moved = run_of(flags, tmp_path / "moved", *same, "--latents_on_cpu", "--reference_on_cpu")
    for name in ("loss", "grad_norm", "reward_mean", "kl_nats"):
        assert moved[2][name] == usual[2][name]


def test_long_prompts_are_counted_and_reported_once(flags, pipe, tmp_path, capsys):
    long, short = "very " * 100 + "long", "short"
    assert count_truncated(pipe, [short, long, "x " * 75, "x " * 76]) == 2  # 77 with the two marks; one more is cut
    (tmp_path / "prompts.txt").write_text(f"{long}\n{short}\n")
    run_of(flags, tmp_path / "run", "--preset", "small-hpsv2", "--reward", "jpeg-compressibility", "--prompts",
           tmp_path / "prompts.txt", "--epochs", "1")  # fmt: skip
    captured = capsys.readouterr()
    assert captured.err.count("1 of 2 prompts are longer than the text encoder reads") == 1
    assert "truncated" not in captured.err


def test_rehearsal_prints_a_command_that_fits(tmp_path, capsys):
    rehearsal.main([str(tmp_path / "all"), "--pipeline", "tiny"])
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[:2] == ["python", "train.py"]
    config = parse(command[2:])
    assert config.preset == "multi-reward" and Path(config.model, "model_index.json").exists()
    with pytest.raises(SystemExit) as stopped:
        rehearsal.main([str(tmp_path / "all"), "--pipeline", "tiny"])
    assert stopped.value.code == 2 and "is not empty" in capsys.readouterr().err
