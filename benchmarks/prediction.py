"""How well PRDP's runs predict reward differences, and how well a Gaussian step can.

    python -m benchmarks.prediction --output prediction.json --runs "T = 5=runs/a" "beta 1e-3=runs/b"      # of any seeds

Of every run and every checkpoint it kept: predicted (beta log pi_theta/pi_ref) against actual reward of fresh trajectories, of
prompts that it was trained on and of held-out ones (Eq. 13). And for some numbers T of steps the share of the reward's variance
that steps with a Gaussian's freedom can predict at all. What the output already holds of the same runs is not measured again.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from plumbing import checkpoint
from plumbing.errors import one_line_errors
from plumbing.pipeline import encode_prompts, pipeline_policy, score
from plumbing.prompts import draw_prompts, load_prompts
from plumbing.provenance import write_result
from plumbing.record import read_metrics, read_run
from plumbing.trainable import open_model
from rdp_loss import log_ratio, prediction_quality
from rewards import Reward, load_rewards
from sampler import EVALUATION, Policy, gaussian, log_prob_table, sample_trajectories

PROMPTS, PICTURES = 16, 16  # of every set, fresh
HELD_OUT = "toy-heldout"
CPU = torch.device("cpu")


def policy_of(pipe, config: Config) -> Policy:
    return pipeline_policy(
        pipe, config.num_steps, guidance_scale=config.guidance_scale, eta=config.eta, log_prob_reduction=config.log_prob_reduction
    )


def opened(model: str, config: Config):
    """The pipeline of a model or checkpoint, held as the run held its own, but in fp32."""
    return open_model(model, config.model, CPU, resolution=config.resolution, max_sequence_length=config.max_sequence_length)


def predicted_and_actual(model, base, config: Config, prompts: list[str], reward: Reward) -> tuple[Tensor, Tensor, float]:
    """rhat (Eq. 10) and reward of fresh trajectories that the model draws, both (N, B), and their mean log-ratio in nats."""
    policy, texts = policy_of(model, config), [prompt for prompt in prompts for _ in range(PICTURES)]
    names = [(config.seed, EVALUATION, n, b) for n in range(len(prompts)) for b in range(PICTURES)]
    drawn = sample_trajectories(policy, encode_prompts(model, texts), names, 64, shared_x_T=config.shared_x_T)
    log_probs_ref = drawn.log_probs if model is base else log_prob_table(policy_of(base, config), drawn, 64)
    rhat = log_ratio(drawn.log_probs, log_probs_ref, config.step_reduction)
    kl_nats = (drawn.log_probs - log_probs_ref).sum(1).mean().item() * policy.in_nats
    return rhat.view(-1, PICTURES), score(model, drawn.x_0, texts, reward, 64).view(-1, PICTURES).double(), kl_nats


def measure(run: Path, config: Config) -> dict:
    """Of each set of prompts correlation, slope and more by epoch, and what was predicted for the last one's pictures.

    These are relative to the mean of their prompt: only differences mean something. "training" is of the pictures of every epoch
    at its last update: with K = 1 fresh ones, with K > 1 those that the updates before have seen.
    """
    reward, base = load_rewards(config.reward, config.reward_weights, CPU), opened(config.model, config)
    kept = [*checkpoint.kept_on_the_way(run), checkpoint.all_checkpoints(run)[-1]]
    folders = {checkpoint.epoch_of(folder): str(folder) for folder in kept}
    sets = {
        "seen": draw_prompts(load_prompts(config.prompts), PROMPTS, 0, config.seed),
        "held out": load_prompts(HELD_OUT)[:PROMPTS],
    }
    result = {name: {"correlation": [], "slope": [], "kl_nats": [], "reward": [], "variance": []} for name in sets}
    ended: dict[str, dict[str, Tensor]] = {}
    for epoch in tqdm([0, *folders], desc=run.name):
        model = opened(folders[epoch], config) if epoch else base
        for name, prompts in sets.items():
            rhat, rewards, kl_nats = predicted_and_actual(model, base, config, prompts, reward)
            quality = prediction_quality(rhat, rewards, config.kl_weight)
            values = *quality, kl_nats, rewards.mean().item(), rewards.var(1).mean().item()
            for row, value in zip(result[name].values(), values, strict=True):
                row.append(round(value, 6))
            ended[name] = {"predicted": config.kl_weight * rhat, "actual": rewards}
    last = {
        name: {title: (x - x.mean(1, keepdim=True)).round(decimals=6).tolist() for title, x in pairs.items()}
        for name, pairs in ended.items()
    }
    return recorded(run, config) | {"epochs": [0, *folders], "curves": result, "last": last}


def recorded(run: Path, config: Config) -> dict:
    """A run's settings, and what it noted itself of the pictures that it was trained on."""
    training = {name: [round(line[name], 6) for line in read_metrics(run)[1:]] for name in ("correlation", "slope")}
    return {"settings": dataclasses.asdict(config), "training": training}


@torch.no_grad()
def gaussian_share(policy: Policy, cond, reward_of, branches: int, seed: int) -> tuple[Tensor, Tensor]:
    """What the steps of one trajectory decide of the reward, and what a Gaussian can predict of that.

    From every x_t of the trajectory many go on. Returns (S,) estimates of Var(r | x_t), and of |E[r z | x_t]|^2, where z is the
    noise of the step. Let M_t = E[r | x_t]. To first order in 1/beta, the optimum of Eq. 7 has the log-ratio
    (M_{t-1} - M_t) / beta in a step, any function of z. A Gaussian of which only the mean can move has u(x_t) . z, and the u of
    least squared error is E[r z | x_t] / beta. So of the variance of the reward from one x_T it predicts the share
    sum_t E|E[r z | x_t]|^2 / E Var(r | x_T), under the policy that draws: this is its slope, and the root of it its correlation,
    which no other u exceeds.

    cond: a condition of `branches` equal rows; reward_of: x_0 (M, C, H, W) -> (M,).
    """
    schedule, generator = policy.schedule, torch.Generator().manual_seed(seed)
    noisy, steps = set(schedule.noisy.tolist()), range(len(schedule.timesteps))

    def noise(number: int) -> Tensor:
        return torch.randn(number, *policy.latent_shape, generator=generator, dtype=policy.dtype)

    x_t, variances, explained = noise(1), [], []
    for i in steps:
        mu, sigma = gaussian(policy, x_t, torch.tensor([i]), cond[:1])
        if i in noisy:
            z = noise(branches)
            x = mu + sigma * z
            for j in steps[i + 1 :]:
                mu_j, sigma_j = gaussian(policy, x, torch.full((branches,), j), cond)
                x = mu_j + sigma_j * noise(branches) if j in noisy else mu_j
            r = reward_of(x).double()
            products = (r - r.mean())[:, None] * z.flatten(1).double()
            # Over pairs of different branches, so that no variance enters; with the mean of r taken out the expectation of a pair
            # is |E[r z]|^2 (1 - 2/n + 2/n^2), n the number of branches.
            over_pairs = products.sum(0).square().sum() - products.square().sum()
            explained.append(over_pairs / ((branches - 1) * (branches - 2 + 2 / branches)))
            variances.append(r.var())
        x_t = mu + sigma * noise(1)
    return torch.stack(variances), torch.stack(explained)


def ceiling(config: Config, pipe, states: int, branches: int) -> dict:
    """gaussian_share over trajectories of held-out prompts, from one x_T; errors are standard errors over them."""
    reward = load_rewards(config.reward, config.reward_weights, CPU)
    policy = policy_of(pipe, config)
    found = []
    for n, prompt in enumerate(tqdm(load_prompts(HELD_OUT)[:states], desc=f"ceiling, T = {config.num_steps}")):
        texts = [prompt] * branches
        found.append(
            gaussian_share(policy, encode_prompts(pipe, texts), lambda x_0, t=texts: score(pipe, x_0, t, reward, 64), branches, n)
        )
    variances, explained = (torch.stack(values) for values in zip(*found, strict=True))
    total = variances[:, 0].mean()
    left = torch.cat([variances.mean(0) / total, torch.zeros(1)])
    share = explained.sum(1) / total
    return {
        "variance": total.item(), "share": share.mean().item(),
        "standard_error": (share.std() / len(share) ** 0.5).item(),
        "decided_by_step": (left[:-1] - left[1:]).tolist(), "predicted_by_step": (explained.mean(0) / total).tolist(),
    }  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.prediction", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--runs",
        nargs="+",
        required=True,
        metavar="NAME=FOLDER",
        help="of train.py, with --keep_every; a name may come again with another seed",
    )
    parser.add_argument("--states", type=int, default=12, help="trajectories of the ceiling")
    parser.add_argument("--branches", type=int, default=192, help="that go on from each of their latents")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10], help="each T of a ceiling; its cost grows with T^2")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    options = parser.parse_args(argv)
    if min(options.steps) < 2:
        parser.error(f"argument --steps: each must be at least 2, for the last is without noise, not {min(options.steps)}")
    with one_line_errors(ValueError, OSError):
        before = json.loads(options.output.read_text()) if options.output.exists() else {"runs": {}, "ceilings": {}}
        runs: dict[str, dict[str, Path]] = {}
        for spec in options.runs:
            name, equals, folder = spec.rpartition("=")
            if not equals:
                raise ValueError(f"--runs takes name=folder, not {spec!r}")
            settings = read_run(Path(folder))
            if settings.get("method") != "prdp":
                raise ValueError(f"{folder} is no run of --method prdp, which alone predicts rewards")
            if any(":" in reward for reward in settings["reward"]):
                raise ValueError(f"{folder}: its reward {' '.join(settings['reward'])} is code, which is not run here")
            runs.setdefault(name, {})[str(settings["seed"])] = Path(folder)

        every = [(name, seed) for name, seeds in runs.items() for seed in seeds]
        measured = {(name, seed): row for name, seeds in before["runs"].items() for seed, row in seeds.items()}
        ceilings = {}

        def write(ceilings: dict) -> None:
            found = {name: {seed: measured[name, seed] for seed in runs[name] if (name, seed) in measured} for name in runs}
            write_result(options.output, "-m benchmarks.prediction", argv, {"runs": found, "ceilings": ceilings})

        for name, seed in every:
            folder = runs[name][seed]
            config, row = Config(**read_run(folder)), measured.get((name, seed), {})
            known = row | recorded(folder, config) == row
            measured[name, seed] = row if known else measure(folder, config)
            wanted = [(f"{', '.join(config.reward)}, T = {T}", config.model, T) for T in options.steps]
            if (name, seed) == every[0]:  # of the first run also where it has ended
                wanted.append((f"{wanted[0][0]}, after {name}", str(folder), options.steps[0]))
            for title, model, T in wanted:
                if known and title in before["ceilings"]:
                    ceilings[title] = before["ceilings"][title]
                elif title not in ceilings:
                    of_T = dataclasses.replace(config, num_steps=T)
                    ceilings[title] = ceiling(of_T, opened(model, config), options.states, options.branches)
            write(before["ceilings"] | ceilings)
        write(ceilings)


if __name__ == "__main__":
    main(sys.argv[1:])
