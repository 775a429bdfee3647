"""The theory of Sec. 3 on Gaussian chains in fp64, and the behaviour of the paper's own code (Appendix G)."""

import itertools
import math

import numpy as np
import pytest
import torch

from rdp_loss import (
    GaussianChain,
    clip_around,
    demo,
    log_ratio,
    mean_over_pairs,
    pairwise_differences,
    prdp_loss,
    prediction_errors,
    prediction_quality,
    rdp_loss,
    spread_over_steps,
    toy_chain,
)

BETA = 0.5


def draw(chain, theta, prompts=16, images=8, shared=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(prompts, 1 if shared else images, chain.g.numel(), generator=generator, dtype=torch.float64)
    return chain.sample(theta, x_T.expand(prompts, images, -1), generator)


def loss_at(chain, theta, theta_ref, x, beta=BETA):
    return rdp_loss(chain.log_probs(theta, x), chain.log_probs(theta_ref, x), chain.reward(x), beta, "sum")


def tables(seed=0, n=3, b=4, t=5):
    """Random log_probs, old, ref (N, B, T) and rewards (N, B), fp64."""
    generator = torch.Generator().manual_seed(seed)
    return (*torch.randn(3, n, b, t, generator=generator, dtype=torch.float64), torch.randn(n, b, generator=generator).double())


# ------------------------------------------------------------------------------------------------------ the theory


def test_loss_is_zero_at_the_optimum_and_only_there():
    chain, theta_ref = toy_chain()
    theta_star = chain.optimum(theta_ref, BETA)
    for policy in (theta_ref, theta_star, torch.zeros_like(theta_ref)):  # whoever drew the trajectories (Eq. 15)
        x = draw(chain, policy)
        assert loss_at(chain, theta_star, theta_ref, x) < 1e-20
        for index in torch.ones_like(theta_ref).nonzero():
            elsewhere = theta_star.clone()
            elsewhere[tuple(index)] += 0.01
            assert loss_at(chain, elsewhere, theta_ref, x) > 1e-6


def test_optimum_has_the_density_of_eq_7():
    """log pi*(x) = log pi_ref(x) + r(x) / beta - log Z for every trajectory, with Z the mean of exp(r / beta)  (Eq. 7, 8)."""
    chain, theta_ref = toy_chain()
    x = draw(chain, theta_ref)
    log_pi_star = chain.log_probs(chain.optimum(theta_ref, BETA), x).sum(-1)
    log_pi_ref = chain.log_probs(theta_ref, x).sum(-1)
    torch.testing.assert_close(log_pi_star - log_pi_ref, chain.reward(x) / BETA - chain.log_partition(theta_ref, BETA))
    mild = 4.0  # a beta at which the mean of exp(r / beta) converges
    x = draw(chain, theta_ref, prompts=2000, images=200)
    monte_carlo = (chain.reward(x) / mild).exp().mean().log()
    assert monte_carlo.item() == pytest.approx(chain.log_partition(theta_ref, mild).item(), abs=2e-3)


def objective(chain, theta, theta_ref, beta):
    """J of Eq. 6 in closed form: E[r] - beta KL, for chains whose first step forgets x_T."""
    kl = ((theta - theta_ref) ** 2 / (2 * chain.sigma[:, None] ** 2)).sum()
    return (chain.influence() @ theta) @ chain.g - beta * kl


def test_online_descent_from_the_reference_reaches_the_optimum_and_its_value():
    chain, theta_ref = toy_chain()
    theta = theta_ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for step in range(300):
        x = draw(chain, theta, 4, 4, seed=step)
        optimizer.zero_grad()
        loss_at(chain, theta, theta_ref, x).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(theta.detach(), chain.optimum(theta_ref, BETA), rtol=0, atol=1e-5)
    best = BETA * chain.log_partition(theta_ref, BETA)  # max J = beta log Z
    assert objective(chain, theta.detach(), theta_ref, BETA).item() == pytest.approx(best.item(), abs=1e-8)
    assert objective(chain, theta_ref, theta_ref, BETA) < best - 1


def test_on_policy_gradient_is_that_of_the_rl_objective():
    """grad L = -(4 / beta) grad J for a nonlinear reward, both by Gauss-Hermite quadrature, J by reparametrisation."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    z = torch.tensor(nodes)
    p = torch.tensor(weights / weights.sum())
    a, sigma = torch.tensor([0.0, 0.8], dtype=torch.float64), torch.tensor([0.9, 0.6], dtype=torch.float64)
    chain = GaussianChain(a, sigma, torch.ones(1, dtype=torch.float64))
    theta = torch.tensor([[0.7], [-0.4]], dtype=torch.float64, requires_grad=True)
    theta_ref = torch.tensor([[0.0], [0.2]], dtype=torch.float64)

    def trajectories(shift):
        """Every pair of nodes: (24 * 24, T+1, 1), differentiable in the shifts."""
        x1 = (shift[0] + sigma[0] * z)[:, None].expand(-1, len(z))
        x0 = a[1] * x1 + shift[1] + sigma[1] * z
        return torch.stack([torch.zeros_like(x1), x1, x0], -1).flatten(0, 1).unsqueeze(-1)

    probability = (p[:, None] * p).flatten()
    reward = lambda x: torch.sin(2 * x[:, -1, 0]) + 0.3 * x[:, -1, 0] ** 2  # noqa: E731

    x = trajectories(theta)
    kl_integrand = chain.log_probs(theta, x).sum(-1) - chain.log_probs(theta_ref, x).sum(-1)
    (grad_objective,) = torch.autograd.grad((probability * (reward(x) - BETA * kl_integrand)).sum(), theta)

    x = trajectories(theta.detach())
    rhat = log_ratio(chain.log_probs(theta, x), chain.log_probs(theta_ref, x), "sum")
    errors = prediction_errors(rhat, reward(x), BETA)
    (grad_loss,) = torch.autograd.grad((probability[:, None] * probability * errors).sum(), theta)
    torch.testing.assert_close(grad_loss, -4 / BETA * grad_objective, rtol=1e-9, atol=1e-9)
    assert grad_objective.abs().min() > 0.01


def test_fixed_prior_costs_what_it_should_and_sharing_x_T_removes_it():
    chain, theta_ref = toy_chain(first_a=0.7)
    theta_star = chain.optimum(theta_ref, BETA)
    predicted = 2 * chain.a.prod() ** 2 * chain.g.square().sum() / BETA**2  # 2 Var(log E[exp(r / beta) | x_T])
    independent = loss_at(chain, theta_star, theta_ref, draw(chain, theta_star, 4000, 8))
    assert independent.item() == pytest.approx(predicted.item(), rel=0.03)
    assert loss_at(chain, theta_star, theta_ref, draw(chain, theta_star, 100, 8, shared=True)) < 1e-20


# ------------------------------------------------------------------------------------------- Appendix G and the clip


def appendix_g(log_probs, log_probs_old, log_probs_ref, rewards, clip_range, kl_weight):
    """The paper's description for one prompt, entry by entry: tables (B, T), rewards (B,)."""
    b = len(rewards)
    ratio, ratio_old = log_probs - log_probs_ref, log_probs_old - log_probs_ref
    clipped = torch.minimum(torch.maximum(ratio, ratio_old - clip_range), ratio_old + clip_range)
    ratio, clipped = ratio.mean(1), clipped.mean(1)
    kept = []
    for i in range(b):
        for j in range(b):
            if rewards[i] - rewards[j] > 0:
                target = (rewards[i] - rewards[j]) / kl_weight
                kept.append(max((ratio[i] - ratio[j] - target) ** 2, (clipped[i] - clipped[j] - target) ** 2))
    return torch.stack(kept).mean()


def test_loss_equals_appendix_g():
    log_probs, old, ref, rewards = tables()
    rewards[1, 0] = rewards[1, 2]  # a tie
    for eps in (0.01, 0.5, 5.0):
        expected = torch.stack([appendix_g(*(x[n] for x in (log_probs, old, ref, rewards)), eps, 0.3) for n in range(3)]).mean()
        assert prdp_loss(log_probs, old, ref, rewards, kl_weight=0.3, clip_range=eps).item() == pytest.approx(expected.item())


def test_one_pair_by_hand():
    log_probs = torch.tensor([[[1.0, 3.0], [0.5, 0.5]]])
    ref, rewards = torch.zeros(1, 2, 2), torch.tensor([[0.2, 0.8]])
    # rhat = 2 and 0.5 by mean; the winner is the second: (0.5 - 2 - 0.6 / 0.1)^2
    assert rdp_loss(log_probs, ref, rewards, 0.1).item() == pytest.approx(7.5**2)
    assert rdp_loss(log_probs, ref, rewards, 0.1, "sum").item() == pytest.approx(9.0**2)
    assert pairwise_differences(rewards)[0, 1, 0].item() == pytest.approx(0.6)


def test_mean_over_steps_only_rescales_beta():
    log_probs, _, ref, rewards = tables(t=5)
    assert rdp_loss(log_probs, ref, rewards, 0.3, "sum").item() == pytest.approx(
        25 * rdp_loss(log_probs, ref, rewards, 1.5).item()
    )
    with pytest.raises(ValueError, match="mean, sum"):
        rdp_loss(log_probs, ref, rewards, 0.3, "max")


def test_all_prompts_weigh_the_same():
    log_probs, old, ref, rewards = tables(n=3)
    each = [prdp_loss(*(x[n : n + 1] for x in (log_probs, old, ref, rewards)), kl_weight=1.0, clip_range=0.1) for n in range(3)]
    whole = prdp_loss(log_probs, old, ref, rewards, kl_weight=1.0, clip_range=0.1)
    assert whole.item() == pytest.approx(sum(each).item() / 3)


def test_equal_rewards_are_no_signal():
    log_probs, old, ref, rewards = tables(n=2)
    rewards[0] = 0.7
    log_probs.requires_grad_()
    loss = prdp_loss(log_probs, old, ref, rewards, kl_weight=1.0, clip_range=0.1)
    (grad,) = torch.autograd.grad(loss, log_probs)
    assert loss.isfinite() and grad.isfinite().all()
    assert (grad[0] == 0).all() and (grad[1] != 0).any()
    assert mean_over_pairs(torch.ones(1, 4, 4), torch.ones(1, 4)) == 0


def test_final_loss_is_an_upper_bound():
    log_probs, old, ref, rewards = tables()
    clipped = rdp_loss(clip_around(log_probs, old, 0.2), ref, rewards, 0.3)
    final = prdp_loss(log_probs, old, ref, rewards, kl_weight=0.3, clip_range=0.2)
    assert final > max(rdp_loss(log_probs, ref, rewards, 0.3), clipped)


def test_first_update_is_the_same_with_and_without_clip():
    _, old, ref, rewards = tables()
    gradients = []
    for loss_of in (
        lambda lp: rdp_loss(lp, ref, rewards, 0.3),
        lambda lp: prdp_loss(lp, old, ref, rewards, kl_weight=0.3, clip_range=1e-6),
    ):
        leaf = old.clone().requires_grad_()
        loss = loss_of(leaf)
        gradients.append((loss, *torch.autograd.grad(loss, leaf)))
    assert gradients[0][0] == gradients[1][0]
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("side", [0, 1])  # the winner's and the loser's log-prob
def test_clip_stops_the_right_way_only(side):
    right = 1.0 if side == 0 else -1.0  # towards a target of Delta rhat = 1

    def gradient(moved, loss_of):
        table = torch.zeros(1, 2, 3, dtype=torch.float64)
        table[0, side] = moved
        leaf, rewards = table.requires_grad_(), torch.tensor([[1.0, 0.0]])
        return torch.autograd.grad(loss_of(leaf, torch.zeros(1, 2, 3), rewards), leaf)[0][0, side]

    eq_18 = lambda lp, zero, r: prdp_loss(lp, zero, zero, r, kl_weight=1.0, clip_range=0.1)  # noqa: E731
    eq_17 = lambda lp, zero, r: rdp_loss(clip_around(lp, zero, 0.1), zero, r, 1.0)  # noqa: E731
    assert (gradient(right * 0.2, eq_18) == 0).all()  # too far the right way: stopped
    assert (gradient(right * 0.05, eq_18) * right < 0).all()  # within the range: on
    assert (gradient(-right * 0.2, eq_18) * right < 0).all()  # too far the wrong way: pulled back
    assert (gradient(-right * 0.2, eq_17) == 0).all()  # which Eq. 17 alone would not do


def test_undecomposed_clip_is_the_same_function_of_trajectories():
    """Eq. 16 clips rhat (N, B) within eps' of rhat_old; with one step it is Eq. 20."""
    log_probs, old, ref, _ = tables(t=1)
    on_trajectories = clip_around(log_ratio(log_probs, ref), log_ratio(old, ref), 0.3)
    torch.testing.assert_close(on_trajectories, log_ratio(clip_around(log_probs, old, 0.3), ref))
    assert (on_trajectories - log_ratio(old, ref)).abs().max().item() == pytest.approx(0.3)


def test_prediction_quality():
    _, _, _, rewards = tables()
    assert prediction_quality(rewards / 0.3 + 5, rewards, 0.3) == pytest.approx((1.0, 1.0))
    assert prediction_quality(-2 * rewards / 0.3, rewards, 0.3) == pytest.approx((-1.0, -2.0))
    assert prediction_quality(torch.zeros_like(rewards), rewards, 0.3) == (0.0, 0.0)
    assert prediction_quality(rewards, torch.ones_like(rewards), 0.3) == (0.0, 0.0)


def test_demonstration_prints_what_it_promises(capsys):
    demo()
    printed = capsys.readouterr().out
    at_optimum = float(printed.split("L(pi*) = ")[1].split(",")[0])
    assert at_optimum < 1e-20
    reached = float(printed.split("|theta - theta*| = ")[1].split()[0])
    assert reached < 1e-3
    assert math.isclose(float(printed.split("+0.2: ")[1].split()[0]), 0.0)
    assert len(printed.splitlines()) < 20


@pytest.mark.parametrize("n", [1, 2])
def test_reference_on_random_steps_has_the_full_gradient_on_average(n):
    """Over every choice of n of three steps of each of three trajectories; the estimate is the same number at all steps."""
    old, ref = (torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1))
    rewards = torch.tensor([[0.3, 0.1, 0.7]], dtype=torch.float64)

    def gradient(log_probs_ref: torch.Tensor) -> torch.Tensor:
        log_probs = old.clone().requires_grad_()
        loss = prdp_loss(log_probs, old, log_probs_ref, rewards, kl_weight=0.5, clip_range=0.1, step_reduction="sum")
        return torch.autograd.grad(loss, log_probs)[0]

    chosen = [torch.zeros(3).index_fill(0, torch.tensor(steps), 1).bool() for steps in itertools.combinations(range(3), n)]
    found = []
    for masks in itertools.product(chosen, repeat=3):
        known = ref.masked_fill(~torch.stack(masks), float("nan"))
        log_ratios = old - spread_over_steps(known, old)
        torch.testing.assert_close(log_ratios, (old - known).nanmean(-1, keepdim=True).expand(1, 3, 3))
        found.append(gradient(old - log_ratios))
    torch.testing.assert_close(torch.stack(found).mean(0), gradient(ref))
    assert all((one - gradient(ref)).abs().max() > 1e-3 for one in found)
    everything = spread_over_steps(ref, old)
    torch.testing.assert_close(log_ratio(old, everything), log_ratio(old, ref))
