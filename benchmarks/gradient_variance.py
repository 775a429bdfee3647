"""Variance of each method's gradient at equal samples: many epochs at unchanged weights, each a single update.

    python -m benchmarks.gradient_variance --output results/reproduce/variance.json --epochs 64

The cosine of the gradients of two epochs is what a learning rate can build on: with g = signal + noise its expectation is about
|signal|^2 / (|signal|^2 + |noise|^2).
"""

import argparse
import copy
import functools
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import comparators
from comparators.epoch import Epoch
from config import Config
from plumbing import processes
from plumbing.errors import one_line_errors
from plumbing.flags import parse
from plumbing.networks import pooled
from plumbing.pipeline import encode_prompts, load_pipeline, pipeline_policy, score
from plumbing.processes import Share, answer
from plumbing.prompts import draw_prompts, load_prompts
from plumbing.provenance import write_result
from plumbing.trainable import make_trainable, trained_parameters
from rdp_loss import prdp_loss
from rewards import load_rewards
from sampler import Policy, backward_through_table, log_prob_table, sample_trajectories

ALL = "--preset toy --prompts toy-small --prompts_per_epoch 8 --images_per_prompt 8 --updates_per_epoch 1 --steps_per_update 256"
WARM_UP = 8
VARIANTS = {
    "PRDP": "--method prdp",
    "PRDP, shared x_T": "--method prdp --shared_x_T",
    "D3PO, shared x_T": "--method d3po --shared_x_T --clip_range 0.9",
    "DDPO, statistics of the prompt": "--method ddpo --statistics_min_count 8",
    "DDPO, statistics of the batch": "--method ddpo --reward_statistics batch",
    "DPOK, critic": "--method dpok",
    "DPOK, raw rewards": "--method dpok --critic False",
}


def gradients(config: Config, policy: Policy, pipe, trained: dict, epochs: int, bar: tqdm) -> torch.Tensor:
    """The first update's gradient of several epochs, all at the pretrained weights -> (epochs, number of weights).

    In WARM_UP further epochs DDPO's statistics fill and DPOK's critic learns; every measured epoch starts from that state.
    """
    N, B = config.prompts_per_epoch, config.images_per_prompt
    reward, prompts, collected = load_rewards(config.reward, [], policy.device), load_prompts(config.prompts), []
    method = comparators.chosen(
        config, policy, text_width=pooled(policy.denoise.uncond).shape[1], text_of=pooled, mu_ref=None,
        all_sum_gradients=processes.all_sum_gradients,
    )  # fmt: skip
    if config.method == "dpok":
        method.critic_updates = 200
    for epoch in range(WARM_UP + epochs):
        if epoch == WARM_UP and method:
            warm = copy.deepcopy({name: thing.state_dict() for name, thing in method.remembers.items()})
            if config.method == "dpok":
                method.critic_updates = 0
        if epoch >= WARM_UP and method:
            for name, state in copy.deepcopy(warm).items():
                method.remembers[name].load_state_dict(state)
        drawn = draw_prompts(prompts, N, epoch, config.seed)
        cond = encode_prompts(pipe, drawn)[torch.arange(N).repeat_interleave(B)]
        names = [(config.seed, epoch, n, b) for n in range(N) for b in range(B)]
        trajectories = sample_trajectories(policy, cond, names, N * B, shared_x_T=config.shared_x_T)
        texts = [prompt for prompt in drawn for _ in range(B)]
        rewards = score(pipe, trajectories.x_0, texts, reward, config.sample_batch_size).view(N, B)
        old = log_prob_table(policy, trajectories, config.log_prob_batch_size).view(N, B, -1)
        if method:
            entries = method.entries(N, B, old.shape[-1], epoch)
            update = next(method.updates(Epoch(drawn, rewards, old, old, entries, trajectories, Share(entries), epoch)))
            loss_of = update.loss  # of DPOK's divergence the gradient at the reference is zero
        else:
            loss_of = functools.partial(
                prdp_loss, log_probs_old=old, log_probs_ref=old, rewards=rewards, kl_weight=config.kl_weight,
                clip_range=config.clip_range, step_reduction=config.step_reduction,
            )  # fmt: skip
        bar.update()
        if epoch < WARM_UP:
            continue
        table = old.clone().requires_grad_()
        (table_grad,) = torch.autograd.grad(loss_of(table), table)
        backward_through_table(policy, trajectories, table_grad.flatten(0, 1), config.train_batch_size)
        collected.append(torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None]).cpu())
        pipe.unet.zero_grad()
    return torch.stack(collected)


def mean_cosine(products: torch.Tensor) -> float:
    """Of all pairs of gradients, from their (R, R) products."""
    norms = products.diag().sqrt()
    return ((products / norms.outer(norms)).sum() - len(products)).item() / (len(products) * (len(products) - 1))


def jackknife(left_out: torch.Tensor) -> float:
    """Standard error of an estimate, from its values (R,) without the first, second, ... of R independent epochs."""
    return math.sqrt((len(left_out) - 1) * left_out.var(correction=0).item())


def signal(gradients: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Of (R, P) independent gradients: the mean cosine of two, its standard error, and |noise|^2 / |signal|^2.

    And the mean cosines (R,) without each of them.
    """
    products = gradients.double() @ gradients.double().T
    R = len(products)
    crossed = (products.sum() - products.trace()) / (R * (R - 1))
    left_out = torch.tensor([mean_cosine(products[keep][:, keep]) for keep in ~torch.eye(R, dtype=torch.bool)])
    variance = (products.diag().mean() / crossed - 1).item()
    return {"cosine": mean_cosine(products), "standard_error": jackknife(left_out), "relative_variance": variance}, left_out


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gradient_variance", allow_abbrev=False)
    parser.add_argument("--epochs", type=int, default=64, help="independent epochs of 64 pictures, of each variant")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 3:
        parser.error(f"argument --epochs: must be at least 3, not {arguments.epochs}")
    with one_line_errors(ValueError, OSError):
        device = processes.start()
        rows, left_out = {}, {}
        with tqdm(total=len(VARIANTS) * (WARM_UP + arguments.epochs), desc="gradients", unit="epoch") as bar:
            for name, flags in VARIANTS.items():
                config = parse([*ALL.split(), *flags.split()])
                pipe = load_pipeline(config.model, device)
                policy = pipeline_policy(pipe, config.num_steps, guidance_scale=config.guidance_scale, eta=config.eta)
                make_trainable(pipe, config)
                trained = trained_parameters(pipe)
                row, left_out[name] = signal(gradients(config, policy, pipe, trained, arguments.epochs, bar))
                rows[name] = {"flags": flags} | row
                # All variants draw the same prompts from the same noise, so their difference is known better than each.
                rows[name]["above_prdp"] = row["cosine"] - rows["PRDP"]["cosine"]
                rows[name]["above_prdp_standard_error"] = jackknife(left_out[name] - left_out["PRDP"])
        result = {"epochs": arguments.epochs, "flags": ALL, "results": rows}
        write_result(arguments.output, "-m benchmarks.gradient_variance", argv, result)
        for name, row in rows.items():
            cosine = f"{row['cosine']:+.4f} ± {row['standard_error']:.4f}"
            above = f"{row['above_prdp']:+.4f} ± {row['above_prdp_standard_error']:.4f}"
            answer(f"{name:32} cosine {cosine}, above PRDP's {above}, variance / squared mean {row['relative_variance']:.0f}")


if __name__ == "__main__":
    main(sys.argv[1:])
