"""LaSRO: its losses have the fixed points and gradients they should, its two learners are apart, and its runs can be trusted."""

import dataclasses
import json
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file
from test_train import EVALUATION

import evaluate
import lasro
import train
from benchmarks import rehearsal
from config import LASRO_PRESETS, LasroConfig, check_lasro
from lasro import Normaliser, consistency_loss, generate, surrogate_loss
from miniature import build
from plumbing import checkpoint
from plumbing.anchor import consistency_scheduler
from plumbing.pipeline import encode_prompts, pipeline_policy
from plumbing.replay import Replay
from plumbing.schedules import ddim_scheduler, lcm_scheduler, noise_schedule
from plumbing.surrogate import accuracy, surrogate_of, surrogate_scores
from plumbing.trainable import open_model
from sampler import Policy, ddim

SCALED_LINEAR = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def test_an_untrained_surrogate_knows_nothing():
    """L_surr is log 2, and pulls winner and loser apart as Bradley and Terry's likelihood does."""
    rewards = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    assert surrogate_loss(torch.zeros(2, 2), rewards).item() == pytest.approx(math.log(2))
    scores = torch.tensor([[0.7, -0.4]], requires_grad=True)
    surrogate_loss(scores, torch.tensor([[1.0, 0.0]])).backward()
    wrong = 1 - torch.tensor(1.1).sigmoid().item()
    assert scores.grad.tolist()[0] == pytest.approx([-wrong, wrong])


def test_pairs_are_of_one_prompt_and_ties_say_nothing():
    scores, rewards = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[1.0, 2, 2, 0]] * 3)
    by_hand = [
        sum(-torch.nn.functional.logsigmoid(row[i] - row[j]) for i, j in ((0, 3), (1, 0), (1, 3), (2, 0), (2, 3))) / 5
        for row in scores
    ]
    assert surrogate_loss(scores, rewards).item() == pytest.approx((sum(by_hand) / 3).item())
    assert surrogate_loss(scores, torch.ones(3, 4)).item() == 0


def test_what_depends_on_the_prompt_alone_changes_nothing():
    """R + b(c): neither the loss nor the gradient by the picture."""
    rewards = torch.rand(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    shift = 10 * torch.randn(5, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    losses = [surrogate_loss(some, rewards) for some in (scores, scores + shift)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, scores)[0] for loss in losses))


def test_the_surrogate_finds_the_reward_behind_noisy_choices():
    """R = psi . z, b better than a with probability sigma(g . (z_b - z_a)): the minimiser is g."""
    g, generator = torch.tensor([1.0, -2.0, 0.5]), torch.Generator().manual_seed(0)
    z = torch.randn(100_000, 2, 3, generator=generator)
    chosen = torch.bernoulli((z[:, 1] @ g - z[:, 0] @ g).sigmoid(), generator=generator)
    rewards, psi = torch.stack([1 - chosen, chosen], 1), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([psi], line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = surrogate_loss(z @ psi, rewards)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    torch.testing.assert_close(psi.detach(), g, rtol=0, atol=0.04)
    assert 0.7 < accuracy(z @ psi, rewards) < 0.9 and accuracy(z @ g, z @ g) == 1


def test_normalised_rewards_do_not_see_scale_and_shift():
    scores = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    plain, changed = Normaliser(2, 0.9), Normaliser(2, 0.9)
    for _ in range(200):  # to the fixed point
        plain.update(scores)
        changed.update(3 * scores + 7)
    assert not plain.mean.requires_grad and not plain.scale.requires_grad
    torch.testing.assert_close(plain(scores), changed(3 * scores + 7), rtol=1e-4, atol=1e-5)
    assert plain(scores).abs().max() <= 1 and plain(scores).std() > 0.1
    far = torch.tensor([[100.0, 0.0]], requires_grad=True)
    assert plain(far)[0, 0] == 1
    plain(far).sum().backward()
    assert far.grad.tolist()[0] == pytest.approx([0, 1 / plain.scale[1].item()])
    other = Normaliser(2, 0.9)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(scores), plain(scores)) and other.begun


def shifting(theta: torch.Tensor, num_steps: int = 2) -> Policy:
    """A generator with f_theta(z) = z + theta at every step."""
    schedule = noise_schedule(lcm_scheduler(LCMScheduler(**SCALED_LINEAR).config, num_steps), 1.0)

    def denoise(x_t, t, cond):
        i = torch.stack([(schedule.timesteps == one).nonzero()[0, 0] for one in t])
        alpha, s = (levels[i].view(-1, 1, 1, 1).to(x_t) for levels in (schedule.alpha, schedule.s))
        return (x_t - alpha * (x_t + theta)) / s  # the epsilon whose x_0 is x_t + theta

    return Policy(denoise, schedule, (2, 4, 4), torch.device("cpu"))


def test_the_generator_climbs_the_surrogate_and_each_step_only_its_own():
    theta, psi = (
        torch.zeros(2, 4, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    policy, c = shifting(theta), torch.tensor([0.3, 0.2], dtype=torch.float64)
    noise = torch.randn(64, 2, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    normaliser = Normaliser(2, 0.9)
    normaliser.mean, normaliser.scale = torch.zeros(2), torch.tensor([200.0, 300.0])  # nothing is clipped
    scores = (generate(policy, noise, None) * psi).flatten(2).sum(-1)
    loss = -(c * normaliser(scores).mean(0)).sum()
    (gradient,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(gradient, -(0.3 / 200 + 0.2 / 300) * psi, rtol=1e-6, atol=1e-9)


def gaussian_policies(variance: float, solver_steps: int) -> tuple[Policy, Policy, Policy]:
    """Student, target and teacher of data N(0, variance), all exact."""
    scheduler = lcm_scheduler(LCMScheduler(**SCALED_LINEAR, original_inference_steps=solver_steps).config, solver_steps)
    schedule = noise_schedule(scheduler, 1.0)

    def of(x_0_of):
        def denoise(x_t, t, cond):
            alpha_bar = scheduler.alphas_cumprod[t].double().view(-1, 1, 1, 1)
            return (x_t - alpha_bar.sqrt() * x_0_of(x_t, alpha_bar)) / (1 - alpha_bar).sqrt()

        return Policy(denoise, schedule, (1, 8, 8), torch.device("cpu"))

    student = of(lambda x, alpha_bar: variance**0.5 * x / (variance * alpha_bar + 1 - alpha_bar).sqrt())
    teacher = of(lambda x, alpha_bar: alpha_bar.sqrt() * variance * x / (variance * alpha_bar + 1 - alpha_bar))
    return student, student, dataclasses.replace(teacher, schedule=dataclasses.replace(schedule, rule=ddim, eta=0.0))


@pytest.mark.parametrize(
    "variance, solver_steps, about", [(1, 50, 1.9e-6), (1, 10, 4.0e-4), (0.25, 50, 6.3e-6), (0.25, 10, 7.9e-4)]
)
def test_the_consistency_function_of_gaussian_data_has_only_the_solvers_error(variance, solver_steps, about):
    """For N(0, I) the probability-flow ODE stands still, so f is the identity; what is left of L_lcm is that steps are finite."""
    policies = gaussian_policies(variance, solver_steps)
    x_0 = (
        torch.randn(200 * solver_steps, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * variance**0.5
    )
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    i = torch.arange(solver_steps).repeat(200)
    alpha_bar = policies[0].schedule.alpha ** 2
    spread = variance * alpha_bar + 1 - alpha_bar
    (a, b), (spread_a, spread_b) = ((values[:-1], values[1:]) for values in (alpha_bar, spread))
    cosine = ((a * b).sqrt() * variance + ((1 - a) * (1 - b)).sqrt()) / (spread_a * spread_b).sqrt()
    expected = (variance * (1 - cosine) ** 2).mean().item()
    assert expected == pytest.approx(about, rel=0.02)
    assert consistency_loss(*policies, x_0, noise, i, None).item() == pytest.approx(expected, rel=0.02)


def test_the_clean_picture_is_its_own():
    """At the last level of the solver the goal is where the teacher's step ends, whatever the target says."""
    student, _, teacher = gaussian_policies(0.25, 10)
    wrong = dataclasses.replace(student, denoise=lambda x_t, t, cond: torch.full_like(x_t, torch.nan))
    x_0, noise = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    last = torch.full((3,), 9)
    assert consistency_loss(student, wrong, teacher, x_0, noise, last, None).isfinite()
    assert not consistency_loss(student, wrong, teacher, x_0, noise, last - 1, None).isfinite()


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_what_is_generated_equals_the_diffusers_scheduler(pipe, num_steps):
    """The pictures after one step, two, ... are what LCMScheduler calls denoised, to what its c_skip still adds."""
    pipe.scheduler = consistency_scheduler(pipe, num_steps)
    policy, scheduler = pipeline_policy(pipe, num_steps, guidance_scale=1.0, eta=1.0), consistency_scheduler(pipe, num_steps)
    cond = encode_prompts(pipe, ["a red circle on a blue background"] * 3)
    noise = torch.randn(3, num_steps, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    z, x = generate(policy, noise, cond), noise[:, 0]
    for step, t in enumerate(scheduler.timesteps):
        output = pipe.unet(x, t, cond.tensors["encoder_hidden_states"]).sample
        denoised = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(step)).denoised
        torch.testing.assert_close(z[:, step], denoised, rtol=1e-4, atol=1e-4)
        if step + 1 < num_steps:
            alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps[step + 1]]
            x = alpha_bar.sqrt() * denoised + (1 - alpha_bar).sqrt() * noise[:, step + 1]


FLAT = dict(trained_betas=build.flat_scheduler().config.trained_betas)


@pytest.mark.parametrize("noise, share", [(FLAT, 0.993), (SCALED_LINEAR, 0.988)])
def test_ddim_in_two_steps_is_nearly_the_consistency_step(noise, share):
    """The same timesteps, and of its variance what is said here."""
    config = DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing").config
    of_ddim = noise_schedule(ddim_scheduler(config, 2), 1.0)
    lcm = noise_schedule(lcm_scheduler(LCMScheduler(**noise).config, 2), 1.0)
    assert of_ddim.timesteps.tolist() == lcm.timesteps.tolist() == [999, 499]
    assert of_ddim.noisy.tolist() == lcm.noisy.tolist() == [0]
    assert (of_ddim.weights[2][0] / lcm.weights[2][0]).item() ** 2 == pytest.approx(share, abs=5e-4)


def test_the_surrogate_is_the_unets_lower_half(pipe):
    """It computes what a hook on the mid block of the whole UNet sees, and begins by saying nothing."""
    surrogate, seen = surrogate_of(pipe.unet, 2), []
    pipe.unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    surrogate.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    cond = encode_prompts(pipe, ["a red circle on a blue background"] * 2)
    policy = pipeline_policy(pipe, 5, guidance_scale=1.0, eta=1.0)
    z, clean = (
        torch.randn(2, 2, *policy.latent_shape, generator=torch.Generator().manual_seed(0)),
        torch.zeros(2, dtype=torch.long),
    )
    policy.denoise(z[:, 0], clean, cond)
    critic = dataclasses.replace(policy.denoise, network=surrogate)
    assert critic(z[:, 0], clean, cond).tolist() == [[0, 0], [0, 0]]
    assert torch.equal(*seen)
    assert sum(p.numel() for p in surrogate.parameters()) < sum(p.numel() for p in pipe.unet.parameters())
    with torch.no_grad():
        surrogate.conv_out[-1].weight.normal_(generator=torch.Generator().manual_seed(1))
    scores = surrogate_scores(critic, z, cond)
    assert torch.equal(scores[:, 0], critic(z[:, 0], clean, cond)[:, 0]) and torch.equal(
        scores[:, 1], critic(z[:, 1], clean, cond)[:, 1]
    )


def test_replay_forgets_the_oldest_and_half_of_what_it_draws_is_new():
    replay = Replay(6, (3, 1))
    for epoch in range(4):
        replay.push([f"{epoch} {n}" for n in range(2)], torch.full((2, 3, 1), epoch), torch.full((2, 3, 1), 10 * epoch))
    assert replay.prompts == ["1 0", "1 1", "2 0", "2 1", "3 0", "3 1"] and [z[0, 0].item() for z in replay.z] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    drawn = [replay.draw(4, 2, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(sum(place >= 4 for place in places) == 2 for places in drawn) and {p for places in drawn for p in places} == set(
        range(6)
    )
    other = Replay(6, (3, 1))
    other.load_state_dict(replay.state_dict())
    assert other.draw(4, 2, torch.Generator().manual_seed(0)) == drawn[0] and other.prompts == replay.prompts
    assert checkpoint.size_of({}, {"replay": replay}) == checkpoint.size_of({}, {"replay": Replay(6, (3, 1))}) == 6 * 3 * 4
    replay = Replay(6, (3, 1))
    replay.push(["a", "b"], torch.zeros(2, 3, 1), torch.zeros(2, 3, 1))
    drawn = [n for seed in range(20) for n in replay.draw(8, 2, torch.Generator().manual_seed(seed))]
    assert 0.35 < drawn.count(0) / len(drawn) < 0.65  # there are no others yet


TINY = (
    "--preset toy-turbo --prompts toy-small --epochs 4 --pretraining_epochs 2 --prompts_per_epoch 3 "
    "--images_per_prompt 4 --pretraining_updates 3 --surrogate_updates 2 --surrogate_batch 2 --generator_updates 2 "
    "--generator_batch 6 --anchor_pictures 8 --replay_size 7 --learning_rate 1e-3 --eval_every 2 --save_every 3"
).split()
CLOCK_AND_MEMORY = ("seconds", "images_per_second", "peak_memory_gib")


def arguments(model_folder, run, *more):
    return [
        *TINY,
        "--eval_prompts",
        EVALUATION,
        "--model",
        str(model_folder),
        "--teacher",
        str(model_folder),
        "--output_dir",
        str(run),
        *more,
    ]


def metrics(run) -> list[dict]:
    """The record without what the machine decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK_AND_MEMORY} for line in lines]


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "finished"
    lasro.main(arguments(model_folder, run))
    return run


def test_the_generator_rests_while_the_surrogate_is_pretrained(finished, model_folder):
    start, *_, last = lines = metrics(finished)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[2]["eval_reward"] == start["eval_reward"] != last["eval_reward"]
    assert lines[2]["eval_reward_one_step"] == start["eval_reward_one_step"] != start["eval_reward"]
    assert [line["anchor_loss"] is None for line in lines[1:]] == [True, True, False, False]
    assert lines[1]["surrogate_by_step"] == [0, 0] and lines[1]["surrogate_accuracy"] == [
        0.5,
        0.5,
    ]  # an untrained one says nothing
    assert all(len(line["surrogate_accuracy"]) == 2 and line["surrogate_loss"] < 0.75 for line in lines[1:])
    before = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(not torch.equal(tensor, before[name]) for name, tensor in weights(finished).items() if "attn" in name)


def test_the_result_opens_with_plain_diffusers_and_draws_in_two_steps(finished):
    pipe = StableDiffusionPipeline.from_pretrained(finished / "pipeline")
    assert isinstance(pipe.scheduler, LCMScheduler)
    opened = open_model(str(checkpoint.all_checkpoints(finished)[-1]), "", torch.device("cpu"))  # also so without the result
    assert isinstance(opened.scheduler, LCMScheduler)
    assert opened.scheduler.config.original_inference_steps == pipe.scheduler.config.original_inference_steps
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a red ring on a black background", num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()


def test_resumed_equals_uninterrupted_bit_for_bit(finished, model_folder, tmp_path, capsys):
    """Generator, surrogate, target, replay buffer and all; of damaged pictures of the teacher no one learns."""
    run = tmp_path / "resumed"
    lasro.main(arguments(model_folder, run, "--epochs", "3"))  # the last epoch saved is in the middle of stage B
    pictures = run / "anchor" / "pictures.safetensors"
    drawn = pictures.read_bytes()
    pictures.write_bytes(drawn[:-1] + bytes([drawn[-1] ^ 1]))
    lasro.main(["--resume", str(run), "--epochs", "4"])
    said = f"{pictures.name} is not what was written, by its SHA-256; the teacher draws them again"
    assert said in capsys.readouterr().err and pictures.read_bytes() == drawn
    assert metrics(run)[-1] == metrics(finished)[-1]
    for file in (checkpoint.WEIGHTS, checkpoint.STATE):
        of_both = [load_file(checkpoint.all_checkpoints(folder)[-1] / file) for folder in (run, finished)]
        assert of_both[0].keys() == of_both[1].keys()
        assert all(torch.equal(tensor, of_both[1][name]) for name, tensor in of_both[0].items())


def test_two_processes_equal_one(finished, model_folder, on_two_processes):
    two = on_two_processes["lasro"]
    assert two.codes == [0, 0], two.errors
    start = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    mine, theirs = (torch.cat([(weights(run)[n] - t).flatten() for n, t in start.items()]) for run in (finished, two.folder))
    # A surrogate that has hardly begun says little, and Adam's steps enlarge the rounding of it; without sharing it is 1.4.
    assert (theirs - mine).norm() < 1.1 * mine.norm()
    for a, b in zip(metrics(two.folder)[1:], metrics(finished)[1:], strict=True):
        assert a["reward_by_step"] == pytest.approx(b["reward_by_step"], abs=1e-3)
        # While the surrogate learns alone; the first step of the generator is of the rounding enlarged.
        assert a["epoch"] > 3 or a["surrogate_accuracy"] == b["surrogate_accuracy"]
        assert a["surrogate_loss"] == pytest.approx(b["surrogate_loss"], rel=1e-2)


def test_each_step_moves_its_own_learner_alone(model_folder, tmp_path, monkeypatch):
    """While the generator steps the surrogate has no gradient, and the other way round."""
    stepped, step = [], torch.optim.AdamW.step

    def watching(self, *arguments):
        stepped.append([any(p.grad is not None for p in group["params"]) for group in self.param_groups])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watching)
    lasro.main(arguments(model_folder, tmp_path / "run"))
    generator, surrogate = [True, False], [False, True]
    assert stepped == 6 * [surrogate] + 2 * (2 * [surrogate] + 2 * [generator])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_steps", "3"], "step_weights must be one for each of num_steps=3, not 2"),
        (["--images_per_prompt", "1"], "images_per_prompt must be at least 2, not 1"),
        (["--replay_size", "2"], "replay_size must be at least prompts_per_epoch=3, not 2"),
        (["--target_decay", "1"], "target_decay must be at least 0 and below 1, not 1.0"),
        (["--surrogate_learning_rate", "0"], "surrogate_learning_rate must be a positive number, not 0.0"),
        (["--anchor_weight", "-1"], "anchor_weight must be at least 0, not -1.0"),
        (["--kl_weight", "1"], "unknown argument '--kl_weight'"),
        (["--preset", "toy"], "unknown preset 'toy': use toy-turbo, sd-turbo, sdxl-turbo"),
        (["--preset", "sd-turbo", "--model", "stabilityai/sd-turbo"], "for which a CUDA GPU is missing"),
    ],
)
def test_wrong_settings(flags, message, capsys, model_folder, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        lasro.main(arguments(model_folder, tmp_path / "run", *flags))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and not (tmp_path / "run").exists()


def test_every_process_needs_something_to_do():
    few = LasroConfig(**LASRO_PRESETS["toy-turbo"] | dict(prompts_per_epoch=1, images_per_prompt=2))
    with pytest.raises(ValueError, match="prompts_per_epoch=1 x images_per_prompt=2 are fewer trajectories than the 3 processes"):
        check_lasro(few, 3)
    with pytest.raises(ValueError, match="anchor_pictures=2 is fewer than the 3 processes"):
        check_lasro(dataclasses.replace(few, images_per_prompt=8, anchor_pictures=2), 3)


def test_a_run_of_the_other_loop_is_not_resumed(capsys, model_folder, tmp_path, finished):
    with pytest.raises(SystemExit):
        train.main(["--resume", str(finished)])
    assert "this version has no such setting" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["prdp", "ddpo", "d3po"])
def test_the_other_methods_train_the_noisy_step_of_a_consistency_model(method, finished, tmp_path):
    run = tmp_path / method
    flags = "--prompts toy-small --prompts_per_epoch 2 --images_per_prompt 4 --epochs 1 --num_steps 2 --eval_prompts=".split()
    more = ["--shared_x_T", "True", "--clip_range", "0.1"] if method == "d3po" else []
    command = ["--preset", "toy", "--model", str(finished / "pipeline"), *flags, "--method", method, *more]
    train.main([*command, "--output_dir", str(run)])
    (line,) = [line for line in metrics(run) if line["epoch"]]
    assert len(line["rounding"]) == 1 and line["log_prob_drift"] < 1e-5  # one column: the last step draws no noise
    assert json.loads((run / "pipeline" / "model_index.json").read_text())["scheduler"][1] == "LCMScheduler"


def test_a_single_step_has_nothing_to_train(finished, tmp_path, capsys):
    with pytest.raises(SystemExit):
        flags = ["--preset", "toy", "--model", str(finished / "pipeline"), "--num_steps", "1"]
        train.main([*flags, "--output_dir", str(tmp_path / "run")])
    assert "num_steps=1: no step of this model has noise, so there is no log-prob to train" in capsys.readouterr().err


def test_a_run_is_evaluated_like_any_other(finished, tmp_path):
    evaluate.main(
        ["--runs", str(finished), "--prompts", "toy-small:4", "--images_per_prompt", "1", "--output_dir", str(tmp_path / "found")]
    )
    rows = json.loads((tmp_path / "found" / "results.json").read_text())["results"]
    assert [row["model"] for row in rows] == ["base", "tuned"] and rows[0]["mean"] != rows[1]["mean"]


@pytest.mark.parametrize("shape, kind", [("sd-turbo", StableDiffusionPipeline), ("sdxl-turbo", StableDiffusionXLPipeline),
                                         ("lcm", LatentConsistencyModelPipeline)])  # fmt: skip
def test_the_rehearsed_presets_train_and_open_with_plain_diffusers(shape, kind, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    rehearsal.main([str(tmp_path / "all"), "--pipeline", f"tiny-{shape}"])
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[:4] == ["python", "lasro.py", "--preset", shape]
    little = (
        "--epochs 2 --pretraining_epochs 1 --prompts_per_epoch 1 --images_per_prompt 2 --pretraining_updates 1 "
        "--surrogate_updates 1 --surrogate_batch 1 --generator_updates 1 --generator_batch 2 --anchor_pictures 2 "
        "--teacher_steps 2 --learning_rate 1e-2"
    ).split()
    lasro.main([*command[2:], *little, "--eval_prompts", str(tmp_path / "two.txt"), "--output_dir", str(tmp_path / "run")])
    before, after = (kind.from_pretrained(folder) for folder in (tmp_path / "all" / "pipeline", tmp_path / "run" / "pipeline"))
    after.set_progress_bar_config(disable=True)
    (image,) = after("a cat", num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    assert image.shape == (3, 64, 64) and image.isfinite().all()
    one, other = before.unet.state_dict(), after.unet.state_dict()
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())
