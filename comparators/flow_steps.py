"""Other ways to draw noise on the way of a rectified flow, for comparison with the sampler's own DDIM (Schedule.rule).

At eta = 0 all are Euler's step. DDIM keeps the level of noise that the network is told; the SDE leaves more, most of all near its
end, where the level falls by a large factor in one step; CPS keeps the level of noise and shrinks the variance of broad data.
"""

import math

import torch

from sampler import Schedule, Weights


def sde(schedule: Schedule) -> Weights:
    """Flow-GRPO's, dx = [v + (g^2 / 2t) epsilon] dt + g dw, g = eta sqrt(t / (1 - t)), by Euler-Maruyama (arXiv 2505.05470).

    As in its code 1 - t is the second level's where t is 1. OURS: the last step, which it draws and never trains, has no noise.
    """
    t, t_prev = schedule.s[:-1], schedule.s[1:]
    dt, g2 = t_prev - t, schedule.eta**2 * t / (1 - torch.where(t < 1, t, t_prev)) * (t_prev > 0)
    # The mean is of_x x_t + of_v v; and x_t = (1 - t) x_0 + t epsilon, v = epsilon - x_0.
    of_x, of_v = 1 + g2 * dt / (2 * t), dt + g2 * (1 - t) * dt / (2 * t)
    return (1 - t) * of_x - of_v, t * of_x + of_v, (g2 * -dt).sqrt()


def cps(schedule: Schedule) -> Weights:
    """Coefficients-preserving sampling, sigma = t' sin(eta pi / 2), the rest of t' for epsilon (arXiv 2509.05952)."""
    t_prev, angle = schedule.s[1:], schedule.eta * math.pi / 2
    return schedule.alpha[1:], t_prev * math.cos(angle), t_prev * math.sin(angle)
