"""The presets are the paper's settings, and the bare command is its first experiment or one clear line."""

import pytest
import torch

import train
from config import PRESETS, check
from plumbing.flags import parse

# Appendix E, Table 4: small-scale, large-scale, large-scale multi-reward
TABLE_4 = {
    "epochs": (100, 1000, 1000),
    "updates_per_epoch": (10, 1, 1),
    "prompts_per_epoch": (32, 64, 64),
    "images_per_prompt": (16, 8, 8),
    "kl_weight": (3e-5, 3e-6, 3e-5),
    "num_steps": (50, 50, 50),
    "clip_range": (1e-6, 1e-4, 1e-4),
    "guidance_scale": (5.0, 5.0, 5.0),
    "max_grad_norm": (1.0, 1.0, 1.0),
    "learning_rate": (1e-5, 7e-6, 1e-5),
    "weight_decay": (1e-4, 1e-4, 1e-4),
}
ALWAYS = dict(
    model="CompVis/stable-diffusion-v1-4", method="prdp", eta=1.0, lora_rank=0, offline=False, shared_x_T=False,
    log_prob_reduction="mean", step_reduction="mean",
)  # fmt: skip


@pytest.mark.parametrize(
    "preset, column, prompts, reward, more",
    [
        ("small-hpsv2", 0, "animals", ["hpsv2"], {}),
        ("small-pickscore", 0, "animals", ["pickscore"], {}),
        ("large-hpsv2", 1, "hpdv2-train", ["hpsv2"], {}),
        ("large-pickscore", 1, "hpdv2-train", ["pickscore"], {}),
        ("multi-reward", 2, "pickapic-train", ["pickscore=10", "hpsv2=2", "aesthetic=0.05"], {}),
        ("aesthetic-kl", 0, "animals-bare", ["aesthetic"], {"epochs": 250, "kl_weight": 1.0}),  # Sec. 4.4
    ],
)
def test_presets_are_table_4(preset, column, prompts, reward, more):
    config = parse(["--preset", preset])
    expected = {name: row[column] for name, row in TABLE_4.items()} | ALWAYS | more
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.prompts, config.reward, config.output_dir) == (prompts, reward, f"runs/{preset}")


# Table 4's rows of the comparators' papers, and what else they fix
COMPARATORS = {
    "ddpo": dict(
        epochs=200, updates_per_epoch=4, prompts_per_epoch=32, images_per_prompt=8, num_steps=50, clip_range=1e-4,
        guidance_scale=5.0, max_grad_norm=1.0, learning_rate=1e-5, weight_decay=1e-4, reward_statistics="prompt",
        statistics_size=32, statistics_min_count=16, advantage_limit=10.0, lora_rank=0, model="CompVis/stable-diffusion-v1-4",
    ),
    "dpok": dict(
        epochs=2000, updates_per_epoch=5, prompts_per_epoch=45, images_per_prompt=1, num_steps=50, clip_range=1e-4,
        guidance_scale=7.5, max_grad_norm=0.1, learning_rate=1e-5, weight_decay=0.0, kl_weight=0.001, reward_scale=10.0,
        steps_per_update=32, kl_form="eps_mse", critic=True, lora_rank=4, model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        reward=["imagereward"],
    ),
    "d3po": dict(
        epochs=400, updates_per_epoch=20, prompts_per_epoch=80, images_per_prompt=2, num_steps=20, clip_range=0.1,
        guidance_scale=5.0, max_grad_norm=1.0, learning_rate=3e-5, weight_decay=1e-4, kl_weight=0.1, shared_x_T=True,
        lora_rank=4, model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("preset", COMPARATORS)
def test_presets_of_comparators_are_their_papers(preset):
    config = parse(["--preset", preset])
    check(config, 1)
    always = dict(method=preset, eta=1.0, log_prob_reduction="mean", offline=False)
    expected = COMPARATORS[preset] | always
    assert {name: getattr(config, name) for name in expected} == expected


# What is no paper's but ours, by the dimensions and steps that log-ratios are means over; what Flow-GRPO's authors published
TODAYS = {
    "sdxl": (4 * 128**2, 50, dict(num_steps=50, guidance_scale=5.0, resolution=0, lora_rank=32)),
    "sd3.5-medium": (16 * 64**2, 9, dict(num_steps=10, guidance_scale=4.5, resolution=512, lora_rank=32)),
    "flux-dev": (16 * 64**2, 5, dict(num_steps=6, guidance_scale=3.5, resolution=512, lora_rank=64)),
}
FLOW_GRPO = dict(
    model="stabilityai/stable-diffusion-3.5-medium", method="grpo", num_steps=10, eta=0.495, guidance_scale=4.5, resolution=512,
    max_sequence_length=128, lora_rank=32, learning_rate=3e-4, weight_decay=1e-4, max_grad_norm=1.0, clip_range=1e-4,
    updates_per_epoch=2, prompts_per_epoch=48, images_per_prompt=24, advantage_limit=5.0, reward_statistics="batch",
    reward=["pickscore"],
)  # fmt: skip


@pytest.mark.parametrize("preset", TODAYS)
def test_presets_of_todays_models_keep_the_papers_nats(preset):
    (D, S, expected), config, large = TODAYS[preset], parse(["--preset", preset]), parse(["--preset", "large-pickscore"])
    check(config, 1)
    assert {name: getattr(config, name) for name in expected} == expected and config.frozen_dtype == config.autocast == "bf16"
    assert config.clip_range * D == pytest.approx(large.clip_range * 4 * 64**2)
    assert config.kl_weight / (D * S) == pytest.approx(large.kl_weight / (4 * 64**2 * large.num_steps), rel=0.02)


def test_the_preset_of_flow_grpo_is_its_authors():
    check(config := parse(["--preset", "grpo"]), 1)
    assert {name: getattr(config, name) for name in FLOW_GRPO} == FLOW_GRPO


def test_every_preset_but_the_miniatures_is_tested():
    tested = {"small-hpsv2", "small-pickscore", "large-hpsv2", "large-pickscore", "multi-reward", "aesthetic-kl", *COMPARATORS}
    assert PRESETS.keys() - {"toy", "toy-flow"} == tested | TODAYS.keys() | {"grpo"}
    assert parse([]) == parse(["--preset", "small-hpsv2"])
    assert parse(["--preset", "toy", "--epochs", "3"]).epochs == 3


def test_training_without_noise_is_refused():
    for eta in ("0", "-1"):
        with pytest.raises(ValueError, match=f"eta must be > 0, not {eta}: a deterministic step has no log-prob"):
            check(parse(["--preset", "toy", "--eta", eta]), 1)


@pytest.mark.parametrize("method", ["dpok", "grpo"])
def test_without_a_divergence_the_reference_may_wait_on_the_cpu(method):
    check(parse(["--method", method, "--kl_weight", "0", "--reference_on_cpu"]), 1)


def bare_command(capsys, *more) -> str:
    with pytest.raises(SystemExit) as stopped:
        train.main(list(more))
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


def test_bare_command_without_a_gpu_names_the_miniature(capsys):
    line = bare_command(capsys)
    assert "small-hpsv2" in line and "CUDA GPU is missing" in line and "--preset toy" in line


def test_bare_command_without_weights_names_them_and_the_miniature(capsys, monkeypatch):
    def offline(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr(train.processes, "start", lambda *_: torch.device("cuda"))
    monkeypatch.setattr("plumbing.reward_models.hf_hub_download", offline)
    line = bare_command(capsys)
    assert "HPS_v2_compressed.pt" in line and "xswu/HPSv2" in line and "1.97 GB" in line and "--preset toy" in line
    monkeypatch.setattr("plumbing.pipeline.DiffusionPipeline.download", offline)
    line = bare_command(capsys, "--reward", "jpeg-compressibility")
    assert "CompVis/stable-diffusion-v1-4" in line and "no connection" in line and "--preset toy" in line
    monkeypatch.setattr("plumbing.prompts.hf_hub_download", offline)
    line = bare_command(capsys, "--preset", "large-hpsv2")
    assert "train.json" in line and "ymhao/HPDv2" in line and "--preset toy" in line
