"""DDPO, DPOK, D3PO and Flow-GRPO: the identities of their papers, on tables small enough to check by hand or by quadrature."""

import dataclasses
import math
from statistics import mean, pstdev

import numpy as np
import pytest
import torch
from conftest import SD_V1_4_SCHEDULER, answering
from torch.distributions import Normal, kl_divergence

from comparators.d3po import d3po_loss, preferences
from comparators.ddpo import DDPO, PromptStatistics, batch_advantages, importance_sampling_loss, score_function_loss
from comparators.dpok import Critic, dpok_loss, gaussian_kl
from comparators.epoch import Epoch, Update
from comparators.grpo import GRPO, group_advantages
from config import preset
from plumbing.schedules import ddim_scheduler, noise_schedule
from sampler import REDUCTIONS, gaussian, gaussian_log_prob


def table(*shape, seed=0, scale=1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss, by: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(loss, by)
    return grad


def hermite(points: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights with sum_i w_i f(z_i) = E[f(z)], z ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return torch.tensor(nodes), torch.tensor(weights / math.sqrt(2 * math.pi))


# ------------------------------------------------------------------------------------------------------------- DDPO


def test_ddpo_on_policy_importance_sampling_is_the_score_function():
    log_probs, advantages = table(3, 4, 5).requires_grad_(), table(3, 4, seed=1)
    by_is = gradient(importance_sampling_loss(log_probs, log_probs.detach(), advantages, 1e-4), log_probs)
    by_sf = gradient(score_function_loss(log_probs, advantages), log_probs)
    torch.testing.assert_close(by_is, by_sf)


@pytest.mark.parametrize("baseline", [0.0, 1.7])
def test_ddpo_score_function_is_the_gradient_of_the_expected_reward(baseline):
    """Two steps over three states, all nine trajectories: E[(R - b) grad log p] is grad J for any b."""
    logits, reward = table(2, 3, 3).requires_grad_(), table(9, seed=1)
    paths = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    log_p = logits.log_softmax(-1)
    log_probs = torch.stack([log_p[0, 0, paths[:, 0]], log_p[1, paths[:, 0], paths[:, 1]]], 1)  # (9, 2), start in state 0
    p = log_probs.sum(1).exp()
    expected = gradient((p * reward).sum(), logits)
    log_probs = logits.log_softmax(-1)
    log_probs = torch.stack([log_probs[0, 0, paths[:, 0]], log_probs[1, paths[:, 0], paths[:, 1]]], 1)
    advantages = (p.detach() * (reward - baseline)).view(1, 9)
    by_loss = gradient(score_function_loss(log_probs.view(1, 9, 2), advantages) * 18, logits)  # its mean over 9 x 2
    torch.testing.assert_close(by_loss, -expected)


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_ddpo_gaussian_gradient(shift):
    """x ~ N(theta, 1), r = -(x - m)^2 + shift: grad E[r] = -2 (theta - m)."""
    theta, m = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), 1.1
    z, w = hermite()
    x = theta.detach() + z
    log_probs = Normal(theta, 1.0).log_prob(x).view(1, -1, 1)
    advantages = (w * (-((x - m) ** 2) + shift)).view(1, -1)
    assert gradient(score_function_loss(log_probs, advantages) * len(z), theta).item() == pytest.approx(-1.6)


def test_ddpo_ratio_of_sums_is_unbiased_and_of_means_is_not():
    """D = 4, r = sum of x, theta_old = .3, theta = .5: E_old[rho r] is 2 with sums (J(theta) exactly), 1.358 with means."""
    z, w = hermite(12)
    grid = torch.cartesian_prod(z, z, z, z)
    weight = torch.cartesian_prod(w, w, w, w).prod(1)
    x = 0.3 + 0.7 * grid
    new, old = (Normal(torch.tensor(t, dtype=torch.float64), 0.7).log_prob(x) for t in (0.5, 0.3))
    advantages = (weight * x.sum(1) * len(x)).view(1, -1)
    for reduction, expected in (("sum", 2.0), ("mean", 1.358)):
        a, b = (REDUCTIONS[reduction](lp, 1).view(1, -1, 1) for lp in (new, old))
        assert -importance_sampling_loss(a, b, advantages, 1e9).item() == pytest.approx(expected, abs=1e-3)


def test_ddpo_mean_log_probs_divide_the_gradient_by_their_number():
    x, theta = table(1, 6, 1, 8), torch.zeros(8, dtype=torch.float64, requires_grad=True)
    advantages = table(1, 6, seed=2)

    def grad(reduction):
        log_probs = REDUCTIONS[reduction](Normal(theta, 1.0).log_prob(x), -1)
        return gradient(importance_sampling_loss(log_probs, log_probs.detach(), advantages, 0.1), theta)

    torch.testing.assert_close(grad("sum"), 8 * grad("mean"))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_ddpo_clip_sides(advantage):
    """Beyond the range in the wanted direction nothing more is gained; on the other side the gradient pulls back."""
    for moved in (0.2, -0.2):
        log_probs = torch.full((1, 1, 1), moved, requires_grad=True)
        loss = importance_sampling_loss(log_probs, torch.zeros(1, 1, 1), torch.full((1, 1), advantage), 0.1)
        wanted = moved * advantage > 0
        assert (gradient(loss, log_probs) == 0) == wanted


def test_ddpo_prompt_statistics_by_hand():
    statistics = PromptStatistics(size=4, min_count=3)
    first = torch.tensor([[1.0, 3.0], [10.0, 20.0]])
    by_batch = (first - 8.5) / (first.std(correction=0) + 1e-6)  # two rewards each are too few
    torch.testing.assert_close(statistics.advantages(["a", "b"], first, 10), by_batch)
    second = torch.tensor([[5.0, 7.0]])  # a now has 1 3 5 7, its current rewards included
    known = torch.tensor([1.0, 3.0, 5.0, 7.0])
    torch.testing.assert_close(statistics.advantages(["a"], second, 10), (second - 4) / (known.std(correction=0) + 1e-6))
    statistics.advantages(["a"], torch.tensor([[9.0, 11.0]]), 10)
    assert statistics.remembered == {"a": [5.0, 7.0, 9.0, 11.0], "b": [10.0, 20.0]}  # the oldest have gone
    assert statistics.advantages(["a"], torch.tensor([[1000.0, 1000.0]]), 0.5).max() == 0.5
    long = "x" * 500
    assert PromptStatistics(4, 2).advantages([long + "1", long + "2"], first, 10)[0].tolist() == pytest.approx([-1, 1], abs=1e-5)


def test_ddpo_batch_statistics():
    rewards = table(3, 4)
    normalised = batch_advantages(rewards, 10)
    assert normalised.mean().abs() < 1e-12 and normalised.std(correction=0) == pytest.approx(1, abs=1e-6)
    assert batch_advantages(torch.full((2, 2), 3.0), 10).abs().max() == 0
    assert batch_advantages(rewards, 0.5).abs().max() == 0.5


# ------------------------------------------------------------------------------------------------------------- DPOK


def test_dpok_kl_is_torchs_and_the_noise_form():
    scheduler = ddim_scheduler(SD_V1_4_SCHEDULER, 50)
    schedule = noise_schedule(scheduler, 1.0)
    x_t, noise, noise_ref = table(2, 4, 8, 8), table(2, 4, 8, 8, seed=1), table(2, 4, 8, 8, seed=2)
    for i in (0, 20, 48):
        t, step = scheduler.timesteps[i], torch.tensor([i, i])
        (mu, sigma), (mu_ref, _) = (gaussian(answering(schedule, output), x_t, step, None) for output in (noise, noise_ref))
        kl = gaussian_kl(mu, mu_ref, sigma).flatten(1).sum(1)
        torch.testing.assert_close(kl, kl_divergence(Normal(mu, sigma), Normal(mu_ref, sigma)).flatten(1).sum(1))
        a_t, a_prev = scheduler.alphas_cumprod[t].double(), scheduler.alphas_cumprod[t - 20].double()
        weight = (1 - a_t / a_prev) / (2 * (a_t / a_prev) * (1 - a_prev))  # beta_t / (2 alpha_t (1 - abar_prev)), eta = 1
        torch.testing.assert_close(kl, weight * ((noise - noise_ref) ** 2).flatten(1).sum(1), rtol=1e-4, atol=0)


def test_dpok_image_kl_is_bounded_by_the_sum_over_steps():
    """x_{t-1} = x_t + delta_t + sigma_t z against delta = 0: the pictures differ by .1091 nats, the steps by 2.1939."""
    delta, sigma = torch.tensor([0.3, -0.1, 0.4], dtype=torch.float64), torch.tensor([0.5, 0.6, 0.2], dtype=torch.float64)
    steps = gaussian_kl(delta, torch.zeros(3), sigma).sum()
    pictures = gaussian_kl(delta.sum(), torch.tensor(0.0), (1 + (sigma**2).sum()).sqrt())
    assert steps.item() == pytest.approx(2.1939, abs=1e-4) and pictures.item() == pytest.approx(0.1091, abs=1e-4)


def test_dpok_stationary_point():
    """One step, r = g x: reward and divergence balance at an offset of alpha / beta sigma^2 g from the pretrained mean."""
    alpha, beta, sigma, g = 2.0, 0.5, 0.7, 1.3
    z, w = hermite()
    for factor, still in ((1.0, True), (0.5, False), (1.5, False)):
        shift = torch.tensor(factor * alpha / beta * sigma**2 * g, dtype=torch.float64, requires_grad=True)
        x = shift.detach() + sigma * z
        log_probs = Normal(shift, sigma).log_prob(x).view(1, -1, 1)
        rewards = (w * g * x * len(z)).view(1, -1)
        kl = gaussian_kl(shift, torch.zeros_like(shift), torch.full_like(shift, sigma)).view(1, 1, 1)
        loss = dpok_loss(log_probs, log_probs.detach(), rewards, 0.0, reward_scale=alpha, clip_range=0.1) + beta * kl.mean()
        assert (abs(gradient(loss, shift).item()) < 1e-9) == still


def test_dpok_a_baseline_of_the_state_changes_nothing_in_the_mean():
    z, w = hermite()
    x_t = 0.4
    theta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    for value in (0.0, 3.0, -7.0):
        log_probs = Normal(theta * x_t, 0.5).log_prob(theta.detach() * x_t + 0.5 * z).view(1, -1, 1)
        values = value * w.view(1, -1, 1)
        loss = dpok_loss(log_probs, log_probs.detach(), torch.zeros(1, len(z)), values, reward_scale=1.0, clip_range=0.1)
        assert gradient(loss, theta).item() == pytest.approx(0, abs=1e-12)


def test_dpok_at_the_pretrained_model_and_without_kl():
    mu, sigma = table(2, 3).requires_grad_(), torch.tensor(0.5)
    kl = gaussian_kl(mu, mu.detach(), sigma)
    assert kl.abs().max() == 0 and gradient(kl.sum(), mu).abs().max() == 0
    log_probs, rewards = table(3, 4, 5).requires_grad_(), table(3, 4, seed=1)
    loss = dpok_loss(log_probs, log_probs.detach(), rewards, 0.0, reward_scale=2.0, clip_range=0.1)
    expected = 2.0 * gradient(score_function_loss(log_probs, rewards), log_probs)
    torch.testing.assert_close(gradient(loss, log_probs), expected)


def test_dpok_loss_by_hand():
    log_probs = torch.tensor([[[0.0, 0.05]]])
    values = torch.tensor([[[1.0, 2.0]]])
    loss = dpok_loss(log_probs, torch.zeros(1, 1, 2), torch.tensor([[3.0]]), values, reward_scale=10.0, clip_range=0.1)
    assert loss.item() == pytest.approx(-10 * (2 * 1 + 1 * math.exp(0.05)) / 2)


def test_dpok_clamp_stops_both_directions():
    for moved in (0.2, -0.2):
        log_probs = torch.full((1, 1, 1), moved, requires_grad=True)
        loss = dpok_loss(log_probs, torch.zeros(1, 1, 1), torch.ones(1, 1), 0.0, reward_scale=1.0, clip_range=0.1)
        assert gradient(loss, log_probs) == 0


def test_dpok_critic_learns_the_expected_reward():
    """Reward = text + step, with noise: squared error is smallest at the conditional mean."""
    torch.manual_seed(0)
    critic = Critic(4 + 1, steps=3)
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    for _ in range(400):
        x_t, text, step = torch.randn(256, 1, 2, 2), torch.randn(256, 1), torch.randint(3, (256,))
        reward = text[:, 0] + step + 0.5 * torch.randn(256)
        optimizer.zero_grad()
        ((critic(x_t, text, step) - reward) ** 2).mean().backward()
        optimizer.step()
    x_t, text, step = torch.zeros(7, 1, 2, 2), torch.linspace(-1, 1, 7).view(-1, 1), torch.arange(7) % 3
    assert (critic(x_t, text, step) - text[:, 0] - step).abs().max() < 0.3


# ------------------------------------------------------------------------------------------------------------- D3PO


def test_d3po_at_the_reference():
    log_probs, rewards = table(3, 2, 5).requires_grad_(), torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0]])
    loss = d3po_loss(log_probs, log_probs.detach(), rewards, kl_weight=0.1)
    assert loss.item() == pytest.approx(math.log(2))
    sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]]).unsqueeze(-1)
    torch.testing.assert_close(gradient(loss, log_probs), (-0.1 / 2 / 15 * sign).expand(3, 2, 5).double())


def test_d3po_ties_say_nothing():
    log_probs = table(2, 4, 3).requires_grad_()
    loss = d3po_loss(log_probs, table(2, 4, 3, seed=1), torch.ones(2, 4), kl_weight=0.1)
    assert loss.item() == pytest.approx(math.log(2)) and gradient(loss, log_probs).abs().max() == 0
    assert preferences(torch.tensor([[1.0, 1.0, 2.0, 3.0]])).tolist() == [[[0, 0], [-1, 1]]]


def test_d3po_antisymmetry():
    log_probs, ref, rewards = table(1, 2, 1), table(1, 2, 1, seed=1), torch.tensor([[1.0, 0.0]])
    loss = d3po_loss(log_probs, ref, rewards, kl_weight=0.7)
    u = 0.7 * ((log_probs - ref)[0, 0] - (log_probs - ref)[0, 1])
    assert (loss - d3po_loss(log_probs, ref, rewards.flip(1), kl_weight=0.7)).item() == pytest.approx(-u.item())
    torch.testing.assert_close(d3po_loss(log_probs.flip(1), ref.flip(1), rewards.flip(1), kl_weight=0.7), loss)


def test_d3po_log_ratio_of_gaussians():
    action, mu, mu_ref, sigma = table(4), table(4, seed=1), table(4, seed=2), 0.6
    log_probs = [gaussian_log_prob(action[None], m[None], torch.tensor(sigma), "sum") for m in (mu, mu_ref)]
    delta = (log_probs[0] - log_probs[1]).squeeze()
    expected = ((mu - mu_ref) * (action - mu_ref)).sum() / sigma**2 - ((mu - mu_ref) ** 2).sum() / (2 * sigma**2)
    torch.testing.assert_close(delta, expected)


def test_d3po_with_soft_labels_finds_the_tilted_reference():
    """Five actions, every pair weighted by sigmoid(r_a - r_b) as by noisy judges: the minimiser is pi_ref e^(r/beta)/Z."""
    beta, reward, ref = 0.5, table(5), table(5, seed=1).log_softmax(0)
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    weight = torch.sigmoid(reward[pairs[:, 0]] - reward[pairs[:, 1]])
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        log_probs = logits.log_softmax(0)[pairs].view(-1, 2, 1)
        won = torch.tensor([[1.0, 0.0]])
        total = sum(
            w * d3po_loss(row[None], ref[pair].view(1, 2, 1), won, kl_weight=beta)
            for w, row, pair in zip(weight, log_probs, pairs, strict=True)
        )
        total.backward()
        return total

    optimizer.step(loss)
    torch.testing.assert_close(logits.log_softmax(0), (ref + reward / beta).log_softmax(0), atol=1e-5, rtol=0)


def test_d3po_clamp_floor():
    far = torch.tensor([[[5.0], [-5.0]]], requires_grad=True)
    loss = d3po_loss(far, torch.zeros(1, 2, 1), torch.tensor([[1.0, 0.0]]), kl_weight=0.1, clip_range=0.1)
    assert loss.item() == pytest.approx(0.683164, abs=1e-6) and gradient(loss, far).abs().max() == 0


def test_d3po_sees_only_the_order_of_rewards():
    log_probs, ref, rewards = table(4, 6, 3), table(4, 6, 3, seed=1), table(4, 6, seed=2)
    torch.testing.assert_close(
        d3po_loss(log_probs, ref, rewards, kl_weight=0.3), d3po_loss(log_probs, ref, rewards.exp(), kl_weight=0.3), atol=0, rtol=0
    )
    with pytest.raises(ValueError, match="must be even"):
        preferences(torch.ones(2, 3))


# -------------------------------------------------------------------------------------------------------- Flow-GRPO


def updates_of(method: GRPO | DDPO, rewards: torch.Tensor, log_probs_old: torch.Tensor) -> list[Update]:
    """Those of an epoch of which there are only tables."""
    prompts = [f"prompt {n}" for n in range(len(rewards))]
    entries = method.entries(*log_probs_old.shape, 0)
    return list(method.updates(Epoch(prompts, rewards, log_probs_old, log_probs_old, entries, None, None, 0)))


def grpo(**settings) -> GRPO:
    return GRPO(preset("toy", method="grpo", **{"kl_weight": 0} | settings), None, None)


def test_grpo_advantages_by_hand():
    """Deviations 1 and 10 of the prompts; 131.5 is the variance of all four."""
    rewards = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    of_group, of_epoch = (group_advantages(rewards, 5, of_epoch=of_epoch) for of_epoch in (False, True))
    one, ten = 1 / 1.0001, 10 / 10.0001
    assert of_group.flatten().tolist() == pytest.approx([-one, one, -ten, ten], rel=1e-12)
    all_four = math.sqrt(131.5) + 1e-4
    assert of_epoch.flatten().tolist() == pytest.approx([x / all_four for x in (-1, 1, -10, 10)], rel=1e-12)
    assert group_advantages(rewards, 0.5, of_epoch=True).flatten().tolist() == pytest.approx([*of_epoch[0].tolist(), -0.5, 0.5])
    for statistics, advantages in (("prompt", of_group), ("batch", of_epoch)):
        log_probs = torch.zeros(2, 2, 1, dtype=torch.float64, requires_grad=True)
        (update,) = updates_of(grpo(reward_statistics=statistics), rewards, log_probs.detach())
        torch.testing.assert_close(gradient(update.loss(log_probs), log_probs), -advantages.unsqueeze(-1) / 4)


@pytest.mark.parametrize("statistics", ["prompt", "batch"])
@pytest.mark.parametrize("size", [2, 3, 7, 24, 100])
def test_grpo_equal_rewards_say_nothing(size, statistics):
    """To the bit: of an epoch without differences Adam would make steps of what is left of them by rounding."""
    rewards = torch.stack([torch.full((size,), 0.1), torch.full((size,), 1 / 3), torch.linspace(-1, 1, size)])
    log_probs = table(3, size, 2).requires_grad_()
    for some, differing in ((rewards, 1), (rewards[:2], 0)):
        (update,) = updates_of(grpo(reward_statistics=statistics), some, log_probs[: len(some)].detach())
        grad = gradient(update.loss(log_probs[: len(some)]), log_probs)
        assert grad[:2].abs().max() == 0 and grad.isfinite().all() and grad[2].abs().max().sign() == differing


def test_grpo_on_policy_is_reinforce_with_the_groups_advantage():
    """In every minibatch the gradient by its log-probs is -A over their number."""
    rewards, log_probs = table(3, 4, seed=1), table(3, 4, 5).requires_grad_()
    by_hand = [[(r - mean(row)) / (pstdev(row) + 1e-4) for r in row] for row in rewards.tolist()]
    expected = -torch.tensor(by_hand, dtype=torch.float64).unsqueeze(-1)
    for number in (1, 4):
        updates = updates_of(grpo(updates_per_epoch=number), rewards, log_probs.detach())
        assert len(updates) == number
        for update in updates:
            assert update.entries.sum() == 60 // number
            found = gradient(update.loss(log_probs), log_probs)
            torch.testing.assert_close(found, expected * update.entries / update.entries.sum())
    torch.testing.assert_close(found, gradient(score_function_loss(log_probs, -expected[..., 0]), log_probs) * 4 * update.entries)


def test_grpo_clip_sides():
    """Beyond the range in the wanted direction the gradient is zero; on the other side it is -rho A of the whole."""
    rewards, old = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 2, dtype=torch.float64)
    (update,) = updates_of(grpo(clip_range=0.1), rewards, old)
    moved = torch.tensor([[[0.2, -0.2], [0.2, -0.2]]], dtype=torch.float64, requires_grad=True)
    one = 0.5 / (0.5 + 1e-4)  # the advantages are this and minus this
    expected = [0, -one * math.exp(-0.2) / 4, one * math.exp(0.2) / 4, 0]
    assert gradient(update.loss(moved), moved).flatten().tolist() == pytest.approx(expected, abs=1e-12)
    value = -one * (1.1 + math.exp(-0.2) - math.exp(0.2) - 0.9) / 4
    assert update.loss(moved).item() == pytest.approx(value)


def test_grpo_is_ddpo_where_a_prompts_statistics_are_of_its_group():
    """Only the deviation's summands differ, 1e-4 and 1e-6: nothing beside rewards this large."""
    rewards, old, moved = 1e4 * table(3, 4, seed=1), table(3, 4, 5), table(3, 4, 5, seed=2, scale=0.1)
    settings = dict(updates_per_epoch=3, clip_range=0.05, advantage_limit=1.2)
    ddpo = DDPO(preset("toy", method="ddpo", statistics_size=4, statistics_min_count=4, **settings))
    for ours, ddpos in zip(updates_of(grpo(**settings), rewards, old), updates_of(ddpo, rewards, old), strict=True):
        assert torch.equal(ours.entries, ddpos.entries)
        log_probs = (old + moved).requires_grad_()
        found, expected = (gradient(update.loss(log_probs), log_probs) for update in (ours, ddpos))
        torch.testing.assert_close(ours.loss(log_probs), ddpos.loss(log_probs), rtol=1e-7, atol=0)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
        assert (found == 0).sum() > (~ours.entries).sum()  # the clip acts


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_grpo_kl_is_torchs(reduction):
    schedule = noise_schedule(ddim_scheduler(SD_V1_4_SCHEDULER, 50), 1.0)
    x_t, noise, noise_ref = table(2, 4, 8, 8), table(2, 4, 8, 8, seed=1), table(2, 4, 8, 8, seed=2)
    policy, step = dataclasses.replace(answering(schedule, noise), log_prob_reduction=reduction), torch.tensor([0, 20])
    (mu, sigma), (mu_ref, _) = (gaussian(pi, x_t, step, None) for pi in (policy, answering(schedule, noise_ref)))
    method = GRPO(preset("toy", method="grpo", updates_per_epoch=2, kl_weight=0.5), policy, lambda *_: mu_ref)
    first, _ = updates_of(method, table(3, 4), table(3, 4, 5))
    assert first.kl_weight == 0.5 / 30  # of a mean over the entries
    kl = first.kl(x_t, step, None, mu.requires_grad_(), sigma)
    expected = REDUCTIONS[reduction](kl_divergence(Normal(mu, sigma), Normal(mu_ref, sigma)).flatten(1), 1)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(gradient(kl.sum(), mu), gradient(expected.sum(), mu))


def test_grpo_without_kl_asks_for_no_reference():
    assert all(update.kl is None and update.kl_weight == 0 for update in updates_of(grpo(), table(3, 4), table(3, 4, 5)))
