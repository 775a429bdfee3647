"""Rectified flows: the step is the sampler's Gaussian on the levels (1 - t, t), held against others' formulas and schedulers."""

import dataclasses
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence

from benchmarks import flow_samplers
from comparators.dpok import exact_kl
from comparators.flow_steps import cps, sde
from sampler import Policy, Schedule, ddim, gaussian, gaussian_log_prob, log_prob_table, sample_trajectories

RULES = {"ddim": ddim, "sde": sde, "cps": cps}
CPU = torch.device("cpu")


def double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def schedule_of(t, eta=1.0, rule=ddim) -> Schedule:
    """Of levels t, from noise to picture."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return Schedule(1000 * t[:-1], 1 - t, t, eta, "flow", rule=rule)


def policy_of(schedule, v, shape=(1, 4, 4)) -> Policy:
    """v(x, t) -> velocity."""
    return Policy(lambda x, told, cond: v(x, told.view(-1, 1, 1, 1) / 1000), schedule, shape, CPU, torch.float64)


def one_step(t, t_prev, x, x_0, eta=1.0, rule=ddim):
    """Mean and standard deviation of the step from x to t', where the network predicts x_0."""
    schedule, x = schedule_of([t, t_prev], eta, rule), torch.full((1, 1, 1, 1), x, dtype=torch.float64)
    mu, sigma = gaussian(policy_of(schedule, lambda x, t: (x - x_0) / t), x, torch.zeros(1, dtype=torch.long), None)
    return mu.item(), sigma.item()


@pytest.mark.parametrize("rule", RULES)
def test_without_noise_every_rule_is_diffusers_euler_step(rule):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy = policy_of(schedule_of(scheduler.sigmas, 0.0, RULES[rule]), lambda x, t: torch.sin(3 * x) + t, (4, 4, 4))
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(policy.denoise(x, t.double().expand(2), None), t, x, return_dict=False)[0]
        x, sigma = gaussian(policy, x, torch.full((2,), i), None)
        torch.testing.assert_close(x, expected.double(), rtol=0, atol=1e-5)  # it reckons in fp32
        assert sigma.max() < 1e-7


def test_eta_one_is_bayes_posterior():
    """q(x' | x, x_0) of x' = (1 - t') x_0 + t' e and x | x' = r x' + noise that makes t of t': by quadrature of Bayes' rule."""
    t, t_prev, x, x_0 = 0.6, 0.4, 0.7, -0.3
    mu, sigma = one_step(t, t_prev, x, x_0)
    assert mu == pytest.approx(0.0629630, abs=1e-7) and sigma**2 == pytest.approx(0.1283951, abs=1e-7)
    grid = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    ratio = (1 - t) / (1 - t_prev)
    forward = Normal(ratio * grid, double(t**2 - (ratio * t_prev) ** 2).sqrt()).log_prob(double(x))
    weight = (Normal(double((1 - t_prev) * x_0), double(t_prev)).log_prob(grid) + forward).exp()
    mean = (weight * grid).sum() / weight.sum()
    assert mu == pytest.approx(mean.item(), abs=1e-9)
    assert sigma**2 == pytest.approx(((weight * (grid - mean) ** 2).sum() / weight.sum()).item(), abs=1e-9)


def test_at_pure_noise_the_step_is_finite_and_forgets_it():
    for x in (-2.0, 0.5):
        mu, sigma = one_step(1.0, 0.9, x, 0.3)
        assert mu == pytest.approx(0.1 * 0.3) and sigma == pytest.approx(0.9)
    assert one_step(0.2, 0.0, 0.5, 0.3) == (pytest.approx(0.3), 0.0)


def variances(rule, eta, levels) -> list[float]:
    """Of a point mass at zero, whose network is exact: the variance after every step, the weights' linear recursion."""
    schedule, variance, found = schedule_of(levels, eta, RULES[rule]), 1.0, []
    for _, epsilon_weight, sigma, t in zip(*schedule.weights, schedule.s[:-1], strict=True):
        variance = (epsilon_weight / t).item() ** 2 * variance + sigma.item() ** 2
        found.append(variance)
    return found


@pytest.mark.parametrize("rule, eta", [("ddim", 1.0), ("ddim", 0.5), ("cps", 0.7)])
def test_the_level_of_noise_is_what_the_network_is_told(rule, eta):
    levels = [1, 0.96, 0.858, 0.602, 0.278, 0.0089, 0]
    assert variances(rule, eta, levels) == pytest.approx([t**2 for t in levels[1:]], abs=1e-12)


def test_the_sde_leaves_more_noise_than_it_tells():
    """Of shared figures: from exactly .278 to .0089, where .24 is left, and second order in a step's length on N(0, 1)."""
    mu, sigma = one_step(0.278, 0.0089, 0.278, 0.0, 0.7, sde)
    assert mu**2 + sigma**2 == pytest.approx(0.0576, abs=5e-4) and math.sqrt(mu**2 + sigma**2) > 25 * 0.0089
    t = 0.6
    level = (1 - t) ** 2 + t**2
    for dt, expected in ((-0.05, -0.00345), (-0.005, -3.45e-5)):
        x = 1.0
        v = x * (2 * t - 1) / level
        mu, sigma = one_step(t, t + dt, x, x - t * v, 0.7, sde)
        missing = mu**2 * level + sigma**2 - ((1 - t - dt) ** 2 + (t + dt) ** 2)
        assert missing == pytest.approx(expected, rel=0.01)


def test_small_steps_of_ddim_are_the_sdes():
    """a = sqrt(2) eta."""
    for dt in (1e-3, 1e-4):
        ours, theirs = (one_step(0.5, 0.5 - dt, 0.4, -0.2, eta, rule) for eta, rule in ((0.5, ddim), (0.5 * 2**0.5, sde)))
        assert ours[1] == pytest.approx(theirs[1], rel=5 * dt) and ours[0] == pytest.approx(theirs[0], abs=5 * dt**2)


def test_step_divergence_is_torchs():
    """Flow-GRPO's KL per element, |dt| / 2 (g (1 - t) / 2t + 1 / g)^2 |dv|^2, at its figure, and torch's."""
    t, t_prev, x, dv = 0.6, 0.5, 0.7, 0.13
    ours, theirs = (one_step(t, t_prev, x, x - t * v, 0.7, sde) for v in (1.0, 1.0 + dv))
    kl = kl_divergence(*(Normal(double(mu), double(sigma)) for mu, sigma in (ours, theirs))).item()
    assert kl == pytest.approx(0.00178200, abs=1e-8)
    as_tensors = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (ours[0], theirs[0], ours[1]))
    assert exact_kl(*as_tensors, "sum").item() == pytest.approx(kl, abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_log_probs_are_normals_and_on_policy_ratios_are_one(rule):
    schedule = schedule_of([1, 0.9, 0.6, 0.2, 0], 0.6, RULES[rule])
    policy = policy_of(schedule, lambda x, t: torch.cos(x) * t)
    drawn = sample_trajectories(policy, torch.zeros(5), [(0, 0, n, 0) for n in range(5)], 2)
    assert schedule.noisy.tolist() == [0, 1, 2] and drawn.latents.isfinite().all()
    assert torch.equal(log_prob_table(policy, drawn, 15), drawn.log_probs)  # fp64: exp of the difference is exactly 1
    for i in schedule.noisy.tolist():
        mu, sigma = gaussian(policy, drawn.latents[:, i], torch.full((5,), i), None)
        normal = Normal(mu, sigma).log_prob(drawn.latents[:, i + 1]).mean((1, 2, 3))
        torch.testing.assert_close(drawn.log_probs[:, i], normal)
    summed = dataclasses.replace(policy, log_prob_reduction="sum")
    torch.testing.assert_close(log_prob_table(summed, drawn, 15), 16 * drawn.log_probs)
    assert gaussian_log_prob(mu, mu, sigma, "mean")[0].item() == pytest.approx(
        -math.log(sigma[0].item() * math.sqrt(2 * math.pi))
    )


def test_noise_of_a_point_is_that_of_drawn_samples():
    """What benchmarks.flow_samplers computes, against trajectories of a network that knows the point; the SDE carries more."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    told, carried = scheduler.sigmas.double(), {}
    for name, (rule, eta) in flow_samplers.SAMPLERS.items():
        schedule = schedule_of(told, eta, rule)
        policy = policy_of(schedule, lambda x, t: x / t, (4, 8, 8))
        drawn = sample_trajectories(policy, torch.zeros(64), [(0, 0, 0, b) for b in range(64)], 64)
        carried[name] = flow_samplers.noise_of_a_point(schedule)
        found = drawn.latents[:, 1:].std(dim=(0, 2, 3, 4))
        torch.testing.assert_close(found, torch.tensor(carried[name], dtype=torch.float64), rtol=0.03, atol=1e-6)
    for name in ("ODE", "DDIM, eta 1", "CPS, a 0.8"):
        assert carried[name] == pytest.approx(told[1:].tolist(), abs=1e-9)
    assert carried["SDE, a 0.7"][-2] > 20 * told[-2]
