"""Every method through the one loop: schedules of updates, gradients with a divergence, processes and resuming."""

import dataclasses
import math
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import make_pipeline, make_policy
from safetensors.torch import load_file
from test_sampler import trajectories
from test_train import metrics, weights

import comparators
import train
from comparators import Comparator
from comparators.epoch import Epoch, Update
from plumbing import checkpoint
from plumbing.flags import parse
from plumbing.networks import pooled
from plumbing.processes import Share, all_sum_gradients
from plumbing.run import kl_samples
from plumbing.trainable import reference_mean
from sampler import REDUCTIONS, Policy, backward_through_table, gaussian, gaussian_log_prob, log_prob_table

N, B = 3, 4
FLAGS = {
    "ddpo": "--method ddpo --updates_per_epoch 3 --statistics_min_count 5",  # from the second epoch on by prompt
    "dpok": "--method dpok --updates_per_epoch 3 --steps_per_update 20 --kl_weight 0.5",
    "d3po": "--method d3po --updates_per_epoch 2 --shared_x_T --kl_weight 0.1 --clip_range 0.1",
    "grpo": "--method grpo --updates_per_epoch 2 --kl_weight 0.5",
}


def an_epoch(pipe, *flags) -> tuple[Epoch, Comparator, Policy]:
    """An epoch's tables on the small pipeline, with method and policy."""
    policy = make_policy(pipe)
    prompts = [f"a {colour} ring on a black background" for colour in ("red", "white", "cyan")]
    drawn = trajectories(policy, pipe, images=B, prompts=prompts)
    rewards = torch.rand(N, B, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log_probs = drawn.log_probs.view(N, B, -1)
    tables = log_probs, log_probs - 0.001 * rewards.unsqueeze(-1)
    method = method_of(parse(["--preset", "toy", "--seed", "3", *flags]), policy)
    epoch = Epoch(prompts, rewards, *tables, method.entries(N, B, 4, 0), drawn, Share([torch.ones(N, B, 4)]), 0)
    return epoch, method, policy


def method_of(settings, policy, mu_ref=None) -> Comparator:
    return comparators.chosen(settings, policy, text_width=16, text_of=pooled, mu_ref=mu_ref, all_sum_gradients=all_sum_gradients)


@pytest.mark.parametrize("name", ["ddpo", "d3po", "grpo"])
def test_minibatches_are_disjoint_and_cover_the_epoch(pipe, name):
    epoch, method, _ = an_epoch(pipe, *FLAGS[name].split())
    updates = list(method.updates(epoch))
    assert len(updates) == method.config.updates_per_epoch
    assert torch.equal(sum(update.entries.int() for update in updates), torch.ones(N, B, 4, dtype=torch.int))
    for update in updates:
        whole = update.entries.all(-1)
        assert torch.equal(whole, update.entries.any(-1))  # whole trajectories
        if name == "d3po":
            assert torch.equal(whole[:, 0::2], whole[:, 1::2])  # and whole pairs
        (grad,) = torch.autograd.grad(update.loss(table := epoch.log_probs_old.clone().requires_grad_()), table)
        assert torch.equal(grad != 0, update.entries)


def test_minibatches_change_with_the_epoch_and_not_with_the_process(pipe):
    _, method, policy = an_epoch(pipe, *FLAGS["ddpo"].split())
    other = method_of(dataclasses.replace(method.config, seed=4), policy)
    first, again = (method.entries(N, B, 4, 0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for changed in (method.entries(N, B, 4, 1), other.entries(N, B, 4, 0)):
        assert not torch.equal(first[0], changed[0])


@pytest.mark.parametrize("name, steps, limit", [("ddpo", 50, 1), ("d3po", 20, 1), ("dpok", 50, 1.5)])
@pytest.mark.parametrize("processes", [2, 7, 8])
def test_updates_are_shared_out_evenly(pipe, name, steps, limit, processes, monkeypatch):
    """With the comparators' own presets no process has more than its share of any epoch's updates, to whole trajectories.

    DPOK draws single steps, which go where their trajectory is: the fullest process has up to half more.
    """
    method = method_of(parse(["--preset", name]), make_policy(pipe))
    shape = method.config.prompts_per_epoch, method.config.images_per_prompt, steps
    monkeypatch.setattr("plumbing.processes.WORLD_SIZE", processes)
    for epoch in range(3):
        entries, shares = method.entries(*shape, epoch), []
        for rank in range(processes):
            monkeypatch.setattr("plumbing.processes.RANK", rank)
            shares.append(Share(entries))
        assert torch.equal(torch.cat([share.rows for share in shares]).sort().values, torch.arange(shape[0] * shape[1]))
        assert {len(share.rows) - shape[0] * shape[1] // processes for share in shares} <= {0, 1}
        unit = 1 if name == "dpok" else steps
        fullest = sum(max(share.of(some).sum().item() for share in shares) for some in entries)
        assert fullest <= limit * sum(math.ceil(some.sum().item() / unit / processes) * unit for some in entries)


@pytest.mark.parametrize("name, needed", [("prdp", True), ("d3po", True), ("ddpo", False), ("dpok", False), ("grpo", False)])
def test_the_reference_is_asked_only_what_is_needed(pipe, name, needed):
    config = parse(["--method", name, "--shared_x_T", "True"])
    method = method_of(config, make_policy(pipe))
    asked = [comparators.asked_of_reference(config, method, (16, 8, 50), epoch) for epoch in range(2)]
    assert [entries.sum().item() for entries in asked] == [6400 if needed else 320] * 2
    assert torch.equal(*asked) == needed  # a few are others in every epoch


def test_the_reference_is_asked_on_random_steps_of_every_trajectory():
    config = parse(["--updates_per_epoch", "1", "--reference_steps", "5"])
    asked = [comparators.asked_of_reference(config, None, (16, 8, 50), epoch) for epoch in range(2)]
    for entries in asked:
        assert entries.shape == (16, 8, 50) and (entries.sum(2) == 5).all()
        assert entries.any(0).any(0).all()  # whichever the step
    assert not torch.equal(*asked)


def test_kl_of_a_few_steps_is_unbiased_and_knows_its_error():
    log_ratio = torch.randn(4, 3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.arange(10) / 5
    whole = kl_samples(log_ratio)
    torch.testing.assert_close(whole, log_ratio.sum(2).flatten())
    estimates, errors = [], []
    for seed in range(2000):
        few = torch.randperm(120, generator=torch.Generator().manual_seed(seed))[:12]
        known = torch.full((120,), math.nan, dtype=torch.float64).scatter(0, few, log_ratio.flatten()[few])
        samples = kl_samples(known.view(4, 3, 10))
        assert len(samples) == 12
        estimates.append(samples.mean())
        errors.append(samples.std() / 12**0.5)
    estimates = torch.stack(estimates)
    assert (estimates.mean() - whole.mean()).abs() < 4 * estimates.std() / 2000**0.5
    assert estimates.std() == pytest.approx(torch.stack(errors).mean().item(), rel=0.1)


@pytest.mark.parametrize("critic", ["True", "False"])
def test_dpok_takes_random_steps_and_subtracts_the_critic(pipe, critic):
    epoch, method, _ = an_epoch(pipe, *FLAGS["dpok"].split(), "--critic", critic, "--reward_scale", "2")
    updates = list(method.updates(epoch))
    assert len(updates) == 3
    for update in updates:
        assert update.entries.sum() == 20 and update.kl_weight == 0.5 / 20
        (grad,) = torch.autograd.grad(update.loss(table := epoch.log_probs_old.clone().requires_grad_()), table)
        value = torch.zeros(N * B, 4)
        if method.config.critic:
            with torch.no_grad():
                value = method.value(epoch.mine, *torch.ones(N * B, 4).nonzero().unbind(1)).view(N * B, 4)
        advantage = epoch.rewards.view(-1, 1) - value.double()
        expected = -2 * advantage.view(N, B, 4) * update.entries / 20
        torch.testing.assert_close(grad, expected)


def test_dpok_critic_learns_the_reward(pipe):
    epoch, method, _ = an_epoch(pipe, "--method", "dpok")
    every = torch.ones(N * B, 4).nonzero().unbind(1)

    def error() -> float:
        with torch.no_grad():
            return (method.value(epoch.mine, *every).view(N * B, 4) - epoch.rewards.view(-1, 1)).square().mean().item()

    before = error()
    for _ in range(40):
        method.train_critic(epoch)
    assert error() < before / 4


def test_part_of_a_table_is_that_part_of_the_whole(pipe):
    policy = make_policy(pipe)
    drawn = trajectories(policy, pipe)
    entries = torch.rand(drawn.log_probs.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    part = log_prob_table(policy, drawn, 5, entries)
    assert part[~entries].isnan().all()
    torch.testing.assert_close(part[entries], drawn.log_probs[entries], rtol=0, atol=2e-5)


DIVERGENCES = ["--method dpok --kl_form exact", "--method dpok --kl_form eps_mse", "--method grpo"]


@pytest.mark.parametrize("flags", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_with_a_divergence_equals_autograd(flags, reduction):
    """Against the formulas written out on the steps or the predicted noises, with a graph over all steps."""
    pipes = [make_pipeline(seed) for seed in (0, 1)]
    for pipe in pipes:
        pipe.unet.double()
        pipe.text_encoder.double()
    pi_ref, policy = (make_policy(pipe, log_prob_reduction=reduction) for pipe in pipes)
    drawn = trajectories(policy, pipes[1])
    generator = torch.Generator().manual_seed(0)
    table_grad, kl_grad = (torch.randn(drawn.log_probs.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    kl_grad[0], table_grad[:2] = 0, 0  # one trajectory without either, one with the divergence only

    method = method_of(parse(flags.split()), policy, reference_mean(policy, lambda _: nullcontext(pi_ref)))
    unet = pipes[1].unet.requires_grad_(True)
    backward_through_table(policy, drawn, table_grad, 4, method.divergence, kl_grad)
    ours = torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])

    unet.zero_grad()
    total = 0.0
    for column, i in enumerate(policy.schedule.noisy):
        t, x_t = policy.schedule.timesteps[i].expand(len(table_grad)), drawn.latents[:, i]
        output = policy.denoise(x_t, t, drawn.cond)
        mu, sigma = gaussian(policy, x_t, i.expand(len(table_grad)), drawn.cond)
        with torch.no_grad():
            output_ref = pi_ref.denoise(x_t, t, drawn.cond)
            mu_ref, _ = gaussian(pi_ref, x_t, i.expand(len(table_grad)), drawn.cond)
        if "eps_mse" not in flags:
            kl = torch.distributions.kl_divergence(
                torch.distributions.Normal(mu, sigma.expand_as(mu)), torch.distributions.Normal(mu_ref, sigma.expand_as(mu))
            ).flatten(1)
            kl = REDUCTIONS[reduction](kl, 1)
        else:  # the miniature predicts v, and eps = sqrt(abar) v + sqrt(1 - abar) x_t
            alpha_bar = pipes[1].scheduler.alphas_cumprod[t[0]].double()
            kl = (alpha_bar * (output - output_ref) ** 2).flatten(1).mean(1)
        log_prob = gaussian_log_prob(drawn.latents[:, i + 1], mu, sigma, reduction)
        total = total + (log_prob * table_grad[:, column]).sum() + (kl * kl_grad[:, column]).sum()
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])
    assert expected.norm() > 0
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def arguments(method, model_folder, run, tmp_path, *more) -> list[str]:
    """Two epochs on four prompts, all drawn in each."""
    prompts = tmp_path / "four.txt"
    prompts.write_text("\n".join(f"a {colour} cross on a white background" for colour in ("red", "blue", "green", "cyan")))
    flags = "--preset toy --prompts_per_epoch 4 --images_per_prompt 4 --learning_rate 1e-3 --clip_range 3e-3 --epochs 2".split()
    places = ["--prompts", str(prompts), "--eval_prompts", "", "--model", str(model_folder), "--output_dir", str(run)]
    return [*flags, *places, *FLAGS[method].split(), *more]


@pytest.mark.parametrize("method", FLAGS)
def test_method_runs_resumes_and_is_the_same_on_two_processes(method, model_folder, on_two_processes, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train.main(arguments(method, model_folder, whole, tmp_path))
    start = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    moved = torch.cat([(weights(whole)[n] - t).flatten() for n, t in start.items()])
    assert moved.norm() > 0
    assert metrics(whole)[2]["grad_norm"] > 0 and metrics(whole)[2]["log_prob_drift"] < 1e-5

    train.main(arguments(method, model_folder, resumed, tmp_path, "--epochs", "1"))
    train.main(["--resume", str(resumed), "--epochs", "2"])
    assert metrics(resumed)[2] == metrics(whole)[2]
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, weights(whole)[name]), name

    two = on_two_processes[method]
    assert two.codes == [0, 0], two.errors
    moved_by_two = torch.cat([(weights(two.folder)[n] - t).flatten() for n, t in start.items()])
    assert (moved_by_two - moved).norm() < 0.1 * moved.norm()  # Adam's first steps on rounding: see test_two_processes_equal_one
    assert metrics(two.folder)[1]["reward_mean"] == pytest.approx(metrics(whole)[1]["reward_mean"], abs=1e-5)


def test_dpok_with_adapters_and_checkpointing_has_the_same_gradient_without(model_folder, tmp_path):
    """The adapters are off for the reference between a step's forward and backward pass; that must not disturb either."""
    norms = {}
    for flags in ((), ("--gradient_checkpointing", "--train_batch_size", "3")):
        run = tmp_path / f"run{len(flags)}"
        train.main(arguments("dpok", model_folder, run, tmp_path, "--lora_rank", "2", "--kl_weight", "100", *flags))
        norms[flags] = [line["grad_norm"] for line in metrics(run)[1:]]
    one, other = norms.values()
    assert one == pytest.approx(other, rel=1e-2) and one[1] > 0


@pytest.mark.parametrize("flags", DIVERGENCES)
def test_divergence_holds_the_weights_back(flags, model_folder, tmp_path):
    """Only the divergence is left of the loss: from a policy that has moved, it leads back towards the reference."""
    left, method = {}, flags.split()[1]
    for name, weight in (("free", "0"), ("held", "10000")):
        train.main(arguments(method, model_folder, tmp_path / name, tmp_path, *flags.split(), "--kl_weight", weight,
                             "--critic", "False", "--updates_per_epoch", "12", "--epochs", "3"))  # fmt: skip
        left[name] = metrics(tmp_path / name)[3]["kl_nats"]
    assert 0 < left["held"] < left["free"] / 2


def test_the_state_of_another_method_is_refused(capsys, model_folder, tmp_path):
    run = tmp_path / "run"
    train.main(arguments("ddpo", model_folder, run, tmp_path, "--epochs", "1"))
    state = run / "checkpoints" / "epoch_000001" / "state.json"
    state.write_text(state.read_text().replace("method.rewards", "method.others"))
    checkpoint.write_sums(state.parent)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--resume", str(run), "--epochs", "2"])
    assert stopped.value.code == 2 and "foreign checkpoint" in capsys.readouterr().err


PAGE = (Path(__file__).parents[1] / "docs" / "paper-in-miniature.md").read_text()
(further,) = re.findall(r"```python\n(class .*?)```", PAGE, re.DOTALL)
exec(further, told := {"torch": torch, "Update": Update})
RewardWeighted = told["RewardWeighted"]  # the page's further method


def test_a_loss_of_other_entries_than_its_own_is_noticed(model_folder, tmp_path, monkeypatch):
    class Careless(RewardWeighted):
        def updates(self, epoch):
            (update,) = super().updates(epoch)
            update.entries[0, 0, 0] = False
            yield update

    monkeypatch.setattr(train.comparators, "chosen", lambda *_, **__: Careless())
    with pytest.raises(AssertionError, match="reads entries that are not among its own"):
        train.main(arguments("ddpo", model_folder, tmp_path / "run", tmp_path, "--epochs", "1"))


def test_a_further_method_is_a_class_and_a_case(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train.comparators, "chosen", lambda *_, **__: RewardWeighted())
    run = tmp_path / "run"
    train.main(arguments("ddpo", model_folder, run, tmp_path))  # the reference is asked in the second epoch
    assert metrics(run)[1]["grad_norm"] > 0
