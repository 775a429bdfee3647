"""SDXL, Stable Diffusion 3 and FLUX.1 in their own classes and files, all tiny: from conditions to results."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import evaluate
import train
from benchmarks import rehearsal
from plumbing.flags import parse
from plumbing.networks import network_name, network_of
from plumbing.pipeline import count_truncated, decode_latents, encode_prompts, load_pipeline, pipeline_policy
from plumbing.schedules import ddim_scheduler, noise_schedule, scheduler_at
from plumbing.trainable import make_trainable, open_model, trained_parameters
from sampler import backward_through_table, gaussian, gaussian_log_prob, sample_trajectories

CPU = torch.device("cpu")
SHAPES = {"sdxl": "tiny-sdxl-turbo", "sd3": "tiny-sd3.5-medium", "flux": "tiny-flux-dev"}
TEXTS = ["a photo of a cat", "a painting"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        rehearsal.pipeline_of(shape).save_pretrained(folder / name)
    return {name: str(folder / name) for name in SHAPES}


def opened(folders, name, **held):
    return load_pipeline(folders[name], CPU, **{"resolution": 64, "max_sequence_length": 16} | held)


def noiseless(policy):
    return dataclasses.replace(policy, schedule=dataclasses.replace(policy.schedule, eta=0.0))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("name", SHAPES)
def test_without_noise_trajectories_are_the_pipelines_own(folders, name, guidance_scale):
    """From the same x_T the pipeline's own call gives the same latents, and our decoding its pictures."""
    pipe, theirs = opened(folders, name), DiffusionPipeline.from_pretrained(folders[name])
    policy = noiseless(pipeline_policy(pipe, 4, guidance_scale=guidance_scale, eta=1.0))
    ours = sample_trajectories(policy, encode_prompts(pipe, TEXTS), [(0, 0, 0, 0), (0, 0, 1, 0)], 2)
    x_T, settings = ours.latents[:, 0], dict(height=64, width=64, guidance_scale=guidance_scale, num_inference_steps=4)
    theirs.set_progress_bar_config(disable=True)
    if name == "sdxl":
        theirs.scheduler = ddim_scheduler(theirs.scheduler.config, 4)
    else:
        settings |= dict(sigmas=np.linspace(1, 1 / 4, 4), max_sequence_length=16)
    if name == "flux":
        x_T = theirs._pack_latents(x_T, 2, 4, 8, 8)
    latents = theirs(TEXTS, latents=x_T, output_type="latent", **settings).images
    if name == "flux":
        latents = theirs._unpack_latents(latents, 64, 64, theirs.vae_scale_factor)
    torch.testing.assert_close(ours.x_0, latents, rtol=1e-4, atol=1e-4)
    pictures = theirs(TEXTS, latents=x_T, output_type="pt", **settings).images
    torch.testing.assert_close(decode_latents(pipe, ours.x_0), pictures, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_levels_are_the_schedulers(folders, name):
    """With the static shift of Stable Diffusion 3, with FLUX's by the number of patches, and timesteps of a thousandth each."""
    pipe = opened(folders, name)
    scheduler, patches = copy.deepcopy(pipe.scheduler), 16
    # mu is linear from 0.5 at 256 patches to 1.15 at 4096
    scheduler.set_timesteps(
        sigmas=np.linspace(1, 1 / 7, 7), **({"mu": 0.5 + 0.65 * (patches - 256) / 3840} if name == "flux" else {})
    )
    schedule = pipeline_policy(pipe, 7, guidance_scale=1.0, eta=1.0).schedule
    torch.testing.assert_close(schedule.s, scheduler.sigmas.double())
    torch.testing.assert_close(schedule.alpha, 1 - scheduler.sigmas.double())
    torch.testing.assert_close(schedule.timesteps, scheduler.timesteps)
    assert schedule.s[0] == 1 and schedule.s[-1] == 0 and schedule.prediction_type == "flow"
    assert schedule.noisy.tolist() == list(range(6))  # the last step is without noise
    other = noise_schedule(scheduler_at(pipe.scheduler, 7, 4096), 1.0)
    assert torch.equal(other.s, schedule.s) == (name == "sd3")


def test_without_t5_there_are_as_many_zeros(folders):
    pipe = opened(folders, "sd3", max_sequence_length=5)
    with_t5 = encode_prompts(pipe, TEXTS).tensors["encoder_hidden_states"]
    pipe.text_encoder_3 = None
    without = encode_prompts(pipe, TEXTS).tensors["encoder_hidden_states"]
    assert with_t5.shape == without.shape == (2, 77 + 5, 64)
    assert torch.equal(with_t5[:, :77], without[:, :77])
    assert without[:, 77:].abs().max() == 0 < with_t5[:, 77:].abs().max()


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_gradient_is_that_of_the_whole_graph(folders, name, lora_rank):
    """Some steps at a time, under guidance, against autograd through a sum over all of them; the ratio starts at exactly 1."""
    pipe = opened(folders, name)
    make_trainable(pipe, dataclasses.replace(parse([]), lora_rank=lora_rank))
    parameters = list(trained_parameters(pipe).values())
    policy = pipeline_policy(pipe, 3, guidance_scale=2.0, eta=1.0)
    drawn = sample_trajectories(policy, encode_prompts(pipe, TEXTS), [(0, 0, 0, 0), (0, 0, 1, 0)], 2)
    weights = torch.randn(drawn.log_probs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    recomputed = backward_through_table(policy, drawn, weights, 2)
    torch.testing.assert_close(recomputed, drawn.log_probs, rtol=0, atol=1e-5)
    ours = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    loss = 0
    for column, i in enumerate(policy.schedule.noisy.tolist()):
        mu, sigma = gaussian(policy, drawn.latents[:, i], torch.full((2,), i), drawn.cond)
        loss = loss + (weights[:, column] * gaussian_log_prob(drawn.latents[:, i + 1], mu, sigma, "mean")).sum()
    whole = torch.autograd.grad(loss, parameters, allow_unused=True)
    whole = torch.cat([gradient.flatten() for gradient in whole if gradient is not None])
    assert ours.norm() > 0 and (ours - whole).norm() < 1e-4 * whole.norm()


def run(folders, name, output, *more) -> list[dict]:
    flags = (
        "--preset small-hpsv2 --reward jpeg-compressibility --epochs 2 --prompts_per_epoch 2 --images_per_prompt 2 --num_steps 3 "
        "--updates_per_epoch 1 --clip_range 1 --learning_rate 1e-2 --resolution 64 --max_sequence_length 8 --eval_prompts="
    )
    train.main([*flags.split(), "--quiet", "--model", folders[name], "--output_dir", str(output), *more])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


ADAPTERS = "--lora_rank 4 --frozen_dtype bf16 --autocast bf16 --text_encoders_on_cpu"


@pytest.mark.parametrize("more", ["", ADAPTERS])
@pytest.mark.parametrize("name", SHAPES)
def test_runs_resume_and_results_open_in_plain_diffusers(folders, name, more, tmp_path):
    whole = run(folders, name, tmp_path / "whole", *more.split())
    assert all(line["grad_norm"] > 0 for line in whole[1:]) and whole[1]["reward_mean"] != whole[2]["reward_mean"]
    part = run(folders, name, tmp_path / "part", *more.split(), "--epochs", "1")
    train.main(["--resume", str(tmp_path / "part"), "--epochs", "2"])
    resumed = [json.loads(line) for line in (tmp_path / "part" / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "grad_norm", "reward_mean", "kl_nats"):
        assert part[1][key] == whole[1][key] and resumed[2][key] == whole[2][key]
    result, base = map(DiffusionPipeline.from_pretrained, (str(tmp_path / "whole" / "pipeline"), folders[name]))
    assert type(result) is type(base) and network_name(result) == network_name(base)
    old, new = network_of(base).state_dict(), network_of(result).state_dict()
    assert old.keys() == new.keys()
    changed = [key for key in old if not torch.equal(old[key].bfloat16(), new[key].bfloat16())]
    assert changed and (not more or all("attn" in key for key in changed))
    if more:
        opened = open_model(str(tmp_path / "whole"), "", CPU, frozen_dtype="bf16")  # to evaluate: not rounded by merging
        kept = load_file(tmp_path / "whole" / "checkpoints" / "epoch_000002" / "weights.safetensors")
        assert all(torch.equal(tensor, network_of(opened).state_dict()[key]) for key, tensor in kept.items())
        base.load_lora_weights(tmp_path / "whole" / "lora")
        base.scheduler = result.scheduler
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        latents = base._pack_latents(latents, 1, 4, 8, 8) if name == "flux" else latents
        for pipe in (base, result):
            pipe.set_progress_bar_config(disable=True)
        same = dict(latents=latents, height=64, width=64, num_inference_steps=2, output_type="latent")
        torch.testing.assert_close(base("a cat", **same).images, result("a cat", **same).images, rtol=0.1, atol=0.1)


def test_prompts_that_t5_reads_to_their_end_are_not_called_cut_off(folders):
    long = "very " * 100 + "long"
    for tokens, cut in ((16, 1), (4096, 0)):
        assert count_truncated(opened(folders, "flux", max_sequence_length=tokens), [long, "a cat"]) == cut
    assert count_truncated(opened(folders, "sdxl"), [long, "a cat"]) == 1


def test_frozen_weights_are_held_as_asked(folders):
    """bf16 for text encoders and a network with adapters, which themselves, autoencoder and latents stay fp32."""
    for trains_all in (False, True):
        pipe = opened(folders, "sd3", frozen_dtype="bf16", trains_all=trains_all, text_encoders_on_cpu=True)
        assert pipe.text_encoder_3.dtype == pipe.text_encoder.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
        assert pipe.transformer.dtype == (torch.float32 if trains_all else torch.bfloat16)
    pipe = opened(folders, "sd3", frozen_dtype="bf16")
    make_trainable(pipe, dataclasses.replace(parse([]), lora_rank=2))
    assert {parameter.dtype for parameter in trained_parameters(pipe).values()} == {torch.float32}
    policy = pipeline_policy(pipe, 2, guidance_scale=2.0, eta=1.0, autocast="bf16")
    assert policy.dtype == torch.float32


def test_adapters_are_on_the_attention_of_pictures_and_texts(folders):
    pipe = opened(folders, "sd3")
    make_trainable(pipe, dataclasses.replace(parse([]), lora_rank=2))
    layers = {name.split(".lora_")[0].rsplit("attn", 1)[1] for name in trained_parameters(pipe)}
    assert {".to_q", ".to_k", ".to_v", ".to_out.0", ".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out"} <= layers


@pytest.mark.parametrize("held", ["", ADAPTERS])
def test_evaluation_of_a_flow(held, folders, tmp_path, capsys):
    run(folders, "flux", tmp_path / "run", *held.split())
    config, _ = evaluate.complete({"runs": [str(tmp_path / "run")]})
    assert (config.frozen_dtype, config.text_encoders_on_cpu) == (("bf16", True) if held else ("fp32", False))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--images_per_prompt", "2", "--predicted", "1"]
    for more in ([], ["--eta", "0", "--output_dir", str(tmp_path / "ode")]):
        evaluate.main(["--runs", str(tmp_path / "run"), *prompts, *more])
        assert "tuned" in capsys.readouterr().out
    by_noise, by_ode = (
        json.loads((folder / "results.json").read_text())["results"]
        for folder in (tmp_path / "run" / "evaluation", tmp_path / "ode")
    )
    assert [row["prediction_correlation"] is None for row in by_noise] != [
        row["prediction_correlation"] is None for row in by_ode
    ]
    assert (tmp_path / "run" / "evaluation" / "report.html").exists()


@pytest.mark.parametrize("flags, words", [
    (["--resolution", "60"], "resolution must be a multiple of 16"),
    (["--lora_rank", "2", "--frozen_dtype", "bf16"], "frozen_dtype=bf16 with lora_rank needs autocast=bf16"),
    (["--method", "dpok"], "kl_form=eps_mse divides by alpha, which is 0 where this schedule begins: use --kl_form exact"),
    (["--max_sequence_length", "-1"], "max_sequence_length must be at least 0, not -1"),
])  # fmt: skip
def test_wrong_settings_are_told_in_one_line(folders, flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(folders, "sd3", tmp_path / "run", *flags)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ": error: " in line and words in line
