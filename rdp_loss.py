"""The reward difference prediction loss and its proximal form, as pure functions (Sec. 3, Eq. 10-21, Appendix G).

Let two trajectories a, b of one prompt have rewards r(a), r(b). The optimum of KL-regularised reward maximisation (Eq. 7)
makes the log-ratio to the reference predict the reward, up to a constant that cancels in the difference (Eq. 13):

    log pi(a)/pi_ref(a) - log pi(b)/pi_ref(b) = (r(a) - r(b)) / beta

so PRDP regresses the left side onto the right. No model, configuration or process group is needed: every function takes
the table of log-probs, (N, B, S) for N prompts, B images each and S denoising steps, and the rewards (N, B). S is the paper's T,
less the steps of a schedule that draw no noise.

    python rdp_loss.py      # the theory on a Gaussian chain whose optimum is known in closed form
"""

from dataclasses import dataclass

import torch
from torch import Tensor

STEP_REDUCTIONS = {"mean": torch.mean, "sum": torch.sum}


def log_ratio(log_probs: Tensor, log_probs_ref: Tensor, step_reduction: str = "mean") -> Tensor:
    """rhat = log pi_theta(xbar|c) / pi_ref(xbar|c), (N, B, S) -> (N, B)  (Eq. 10).

    Eq. 10 is the sum over steps; the paper's code (Appendix G) takes the mean, which divides the effective beta by T.
    """
    if step_reduction not in STEP_REDUCTIONS:
        raise ValueError(f"step_reduction must be one of {', '.join(STEP_REDUCTIONS)}, not {step_reduction!r}")
    return STEP_REDUCTIONS[step_reduction](log_probs - log_probs_ref, -1)


def spread_over_steps(log_probs_ref: Tensor, log_probs_old: Tensor) -> Tensor:
    """log_probs_ref (N, B, S) with what is not known (NaN) estimated: each trajectory's mean of log pi_old/pi_ref at all steps.

    NOT IN PAPER (--reference_steps). Drawn at random, the known steps leave rhat of Eq. 10 unbiased, and with K = 1 the gradient
    too: it is linear in rhat. The loss itself, a square, is larger by the estimate's variance, and by the maximum of Eq. 18 later
    updates would have a biased gradient.
    """
    return log_probs_old - (log_probs_old - log_probs_ref).nanmean(-1, keepdim=True)


def pairwise_differences(values: Tensor) -> Tensor:
    """Delta_ij = values_i - values_j within each prompt, (N, B) -> (N, B, B)  (Eq. 11, 12)."""
    return values.unsqueeze(-1) - values.unsqueeze(-2)


def prediction_errors(rhat: Tensor, rewards: Tensor, kl_weight: float) -> Tensor:
    """(Delta rhat - Delta r / beta)^2 of every ordered pair, (N, B) and (N, B) -> (N, B, B)  (inside Eq. 14)."""
    return (pairwise_differences(rhat) - pairwise_differences(rewards) / kl_weight) ** 2


def mean_over_pairs(errors: Tensor, rewards: Tensor) -> Tensor:
    """Mean over the pairs of each prompt with r_i > r_j, then over prompts; errors (N, B, B) -> scalar  (Appendix G).

    Each unordered pair counts once and ties in reward drop out.
    NOT IN PAPER: Algorithm 1 takes the mean over all pairs of all prompts. With ties prompts have different numbers of pairs;
    here each prompt weighs the same, as in the authors' code, which is of one prompt. Without ties the two are equal.
    NOT IN PAPER: a prompt whose rewards are all equal says nothing about what to prefer. Its mean is over an empty set (NaN in
    the authors' code) and is defined as zero loss, zero gradient.
    """
    counted = pairwise_differences(rewards) > 0
    per_prompt = torch.where(counted, errors, 0).sum((-2, -1)) / counted.sum((-2, -1)).clamp(min=1)
    return per_prompt.mean()


def rdp_loss(log_probs: Tensor, log_probs_ref: Tensor, rewards: Tensor, kl_weight: float, step_reduction: str = "mean") -> Tensor:
    """L(theta) = E[(Delta rhat - Delta r / beta)^2] without proximal updates -> scalar  (Eq. 14)."""
    rhat = log_ratio(log_probs, log_probs_ref, step_reduction)
    return mean_over_pairs(prediction_errors(rhat, rewards, kl_weight), rewards)


def clip_around(value: Tensor, value_old: Tensor, clip_range: float) -> Tensor:
    """clip(value, old - eps, old + eps): the proximal step of Eq. 16 on trajectories (N, B), of Eq. 20 on steps (N, B, S)."""
    return torch.clamp(value, value_old - clip_range, value_old + clip_range)


def prdp_loss(
    log_probs: Tensor,
    log_probs_old: Tensor,
    log_probs_ref: Tensor,
    rewards: Tensor,
    *,
    kl_weight: float,
    clip_range: float,
    step_reduction: str = "mean",
) -> Tensor:
    """E[max(unclipped, clipped error)], the final objective -> scalar  (Eq. 18, with the stepwise clip of Eq. 19-21).

    log_probs, log_probs_old, log_probs_ref: (N, B, S) under theta, theta_old (which drew the trajectories) and the reference.
    kl_weight: beta. clip_range: eps, in the unit of the log-probs; it bounds log pi_theta/pi_old of every single step.
    """
    clipped_log_probs = clip_around(log_probs, log_probs_old, clip_range)  # Eq. 20: the reference cancels on both sides
    rhat = log_ratio(log_probs, log_probs_ref, step_reduction)  # Eq. 19, over all steps
    rhat_clip = log_ratio(clipped_log_probs, log_probs_ref, step_reduction)  # Eq. 21
    errors = prediction_errors(rhat, rewards, kl_weight)  # Eq. 14
    errors_clip = prediction_errors(rhat_clip, rewards, kl_weight)  # Eq. 17
    return mean_over_pairs(torch.maximum(errors, errors_clip), rewards)  # Eq. 18


def prediction_quality(rhat: Tensor, rewards: Tensor, kl_weight: float) -> tuple[float, float]:
    """Correlation and slope of predicted (beta * Delta rhat) on actual (Delta r) differences; 1 and 1 at the optimum (Eq. 13)."""
    above = torch.ones(rewards.shape[-1], rewards.shape[-1], dtype=torch.bool).triu(1)
    predicted, actual = kl_weight * pairwise_differences(rhat)[..., above], pairwise_differences(rewards)[..., above]
    covariance, variance = (predicted * actual).mean(), (actual**2).mean()
    spread = (variance * (predicted**2).mean()).sqrt()
    return (covariance / spread).item() if spread > 0 else 0.0, (covariance / variance).item() if variance > 0 else 0.0


@dataclass(frozen=True)
class GaussianChain:
    """x_T ~ N(0, I), x_{t-1} ~ N(a_t x_t + theta_t, sigma_t^2 I), r = g . x_0: a denoising chain with a known optimum.

    The tilt of Eq. 7 by a linear reward shifts every mean and leaves every variance, so pi* is a member of the family.
    Arrays run in sampling order, t = T first: a, sigma (T,), reward direction g (D,), parameters theta (T, D).
    """

    a: Tensor
    sigma: Tensor
    g: Tensor

    def influence(self) -> Tensor:
        """d x_0 / d x_{t-1} of each step, (T,): the product of the later a's."""
        return torch.cat([self.a.flip(0).cumprod(0).flip(0)[1:], self.a.new_ones(1)])

    def sample(self, theta: Tensor, x_T: Tensor, generator: torch.Generator) -> Tensor:
        """Trajectories (..., T+1, D) from x_T (..., D)."""
        x = [x_T]
        for a, sigma, shift in zip(self.a, self.sigma, theta.detach(), strict=True):
            x.append(a * x[-1] + shift + sigma * torch.randn(x_T.shape, generator=generator, dtype=x_T.dtype))
        return torch.stack(x, -2)

    def log_probs(self, theta: Tensor, x: Tensor) -> Tensor:
        """log pi_theta(x_{t-1} | x_t) of stored trajectories, (..., T+1, D) -> (..., T), in nats (Eq. 4)."""
        mu = self.a[:, None] * x[..., :-1, :] + theta
        return torch.distributions.Normal(mu, self.sigma[:, None]).log_prob(x[..., 1:, :]).sum(-1)

    def reward(self, x: Tensor) -> Tensor:
        return x[..., -1, :] @ self.g

    def optimum(self, theta_ref: Tensor, kl_weight: float) -> Tensor:
        """Parameters of pi*(xbar) = pi_ref(xbar) exp(r / beta) / Z given x_T  (Eq. 7, Lemma A.2)."""
        return theta_ref + (self.sigma**2 * self.influence())[:, None] * self.g / kl_weight

    def log_partition(self, theta_ref: Tensor, kl_weight: float) -> Tensor:
        """log Z = log E_ref[exp(r / beta)]; r is Gaussian under the reference."""
        mean = (self.influence() @ theta_ref) @ self.g
        variance = ((self.sigma * self.influence()).square().sum() + self.a.prod() ** 2) * self.g.square().sum()
        return mean / kl_weight + variance / (2 * kl_weight**2)


def toy_chain(first_a: float = 0.0) -> tuple[GaussianChain, Tensor]:
    """A four-step chain in two dimensions and its reference; first_a = 0 makes x_0 independent of x_T."""
    chain = GaussianChain(
        a=torch.tensor([first_a, 0.9, 0.8, 1.1], dtype=torch.float64),
        sigma=torch.tensor([1.0, 0.7, 0.5, 0.3], dtype=torch.float64),
        g=torch.tensor([1.0, -0.5], dtype=torch.float64),
    )
    theta_ref = torch.tensor([[0.1, 0.0], [0.0, 0.2], [-0.1, 0.0], [0.0, 0.1]], dtype=torch.float64)
    return chain, theta_ref


def demo() -> None:
    """Prints what Sec. 3 claims and what follows from it, each with the number that shows it."""
    beta, generator = 0.5, torch.Generator().manual_seed(0)
    chain, theta_ref = toy_chain()
    theta_star = chain.optimum(theta_ref, beta)

    def draw(c, theta, prompts, images, shared_x_T=False):
        x_T = torch.randn(prompts, 1 if shared_x_T else images, 2, generator=generator, dtype=torch.float64)
        return c.sample(theta, x_T.expand(prompts, images, 2), generator)

    def loss_at(c, theta, x):
        return rdp_loss(c.log_probs(theta, x), c.log_probs(theta_ref, x), c.reward(x), beta, "sum")

    x = draw(chain, theta_ref, 64, 16)
    print(f"A chain of {len(chain.a)} Gaussian steps, linear reward, beta = {beta}, fp64.")
    print(f"1. Eq. 15   L(pi*) = {loss_at(chain, theta_star, x):.1e}, L(pi_ref) = {loss_at(chain, theta_ref, x):.2f}, ", end="")
    print(f"L(halfway) = {loss_at(chain, (theta_ref + theta_star) / 2, x):.2f}")

    theta = theta_ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):  # Algorithm 1 with K = 1: fresh trajectories from the current policy for every update
        optimizer.zero_grad()
        loss_at(chain, theta, draw(chain, theta, 8, 8)).backward()
        optimizer.step()
        schedule.step()
    print(f"2. Alg. 1   400 online updates from pi_ref: |theta - theta*| = {(theta - theta_star).norm().detach():.1e} ", end="")
    print(f"(started at {(theta_ref - theta_star).norm():.2f})")

    x = draw(chain, theta_ref * 0, 4096, 16)  # on-policy at theta = 0; KL to pi_ref in closed form
    theta = torch.zeros_like(theta_ref, requires_grad=True)
    (grad_loss,) = torch.autograd.grad(loss_at(chain, theta, x), theta)
    mean_reward = (chain.influence() @ theta) @ chain.g
    kl = ((theta - theta_ref) ** 2 / (2 * chain.sigma[:, None] ** 2)).sum()
    (grad_objective,) = torch.autograd.grad(mean_reward - beta * kl, theta)
    print("3. Identity on-policy, grad L = -(4/beta) grad J of Eq. 6; first coordinates of every step:")
    print(f"     grad L          {[round(v, 2) for v in grad_loss[:, 0].tolist()]}   (65,536 trajectories)")
    print(f"     -(4/beta) grad J {[round(v, 2) for v in (-4 / beta * grad_objective[:, 0]).tolist()]}   (closed form)")

    print("4. Clip     one pair, target Delta rhat = 1, eps = 0.1; derivative by the winner's log-prob after it has moved by")
    for moved in (0.0, 0.2, -0.2):
        winner = torch.tensor(moved, dtype=torch.float64, requires_grad=True)
        table = torch.stack([winner, torch.zeros_like(winner)]).view(1, 2, 1)
        old, rewards = torch.zeros(1, 2, 1), torch.tensor([[1.0, 0.0]])
        loss = prdp_loss(table, old, old, rewards, kl_weight=1.0, clip_range=0.1)
        (grad,) = torch.autograd.grad(loss, winner)
        verdict = {0.0: "inside: Eq. 14", 0.2: "too far, right way: stopped", -0.2: "too far, wrong way: pulled back"}[moved]
        print(f"     {moved:+.1f}: {grad:+.2f}   ({verdict})")

    coupled, _ = toy_chain(first_a=0.7)
    theta_star = coupled.optimum(theta_ref, beta)
    predicted = 2 * (coupled.a.prod() ** 2 * coupled.g.square().sum()) / beta**2
    independent = loss_at(coupled, theta_star, draw(coupled, theta_star, 4096, 16))
    shared = loss_at(coupled, theta_star, draw(coupled, theta_star, 4096, 16, shared_x_T=True))
    print("5. Prior    where x_0 depends on x_T, Eq. 7 would tilt p(x_T) too, which no denoiser can do. At the best policy:")
    print(f"     pairs with independent x_T: L = {independent:.3f} (predicted {predicted:.3f}); sharing x_T: L = {shared:.0e}")


if __name__ == "__main__":
    demo()
