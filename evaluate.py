"""The paper's evaluation: any models on any prompts by any rewards, from the same noise, and a page to look at.

    python evaluate.py --runs runs/toy --prompts toy-heldout toy-small --rewards toy-alignment toy-colourfulness
    torchrun --nproc_per_node=8 evaluate.py --runs runs/large-hpsv2 --protocol large    # Tables 2 and 3
    python evaluate.py --models base=toy lora=runs/a/lora step10=runs/b/checkpoints/epoch_000010 --prompts my.txt --rewards hpsv2

Every picture is made once and scored by every reward. What is finished is kept in --output_dir: after an interruption the same
command goes on, with any number of processes. At the end the folder holds table.md, results.json (every prompt's numbers, with
command, versions and machine), PNGs of curves, grids and strips, and report.html, which shows all of it and needs nothing else.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from config import HELD, check_kinds, setting
from plumbing import checkpoint, processes, report
from plumbing.errors import one_line_errors
from plumbing.flags import Parser, check_no_code, names_given
from plumbing.pipeline import encode_prompts, pipeline_policy, sample_images
from plumbing.processes import RANK, WORLD_SIZE, all_gather, answer
from plumbing.prompts import draw_prompts, load_prompts
from plumbing.record import check_links, read_run
from plumbing.scores import Model, Results, claim, summary_lines
from plumbing.trainable import open_model
from rdp_loss import log_ratio, prediction_quality
from rewards import Reward, RewardError, load_reward, own_reward, parse_weighted
from sampler import EVALUATION, Policy, log_prob_table, sample_trajectories


@dataclass
class EvaluationConfig:
    runs: list[str] = setting([], "Run folders of train.py: compares their base and their results, with the first one's sampler.")
    checkpoints: bool = setting(
        False, "Also the checkpoints that the runs have kept on the way (--keep_every), for reward against epoch."
    )
    models: list[str] = setting([], "name=pipeline, run, checkpoint or LoRA folder, or hub id; the first is the base.")
    protocol: Literal["none", "small", "large"] = setting("none", "Prompts and pictures of Sec. 4.1 or Sec. 4.2, unless given.")
    prompts: list[str] = setting([], "Named sets or files; SET:500 is what training draws first. By default those of --runs.")
    prompts_dir: str = setting("", "Folder with the hub's prompt files as DATA_SET/FILE; by default the hub itself.")
    rewards: list[str] = setting([], "Names or module:function, each its own column; by default those of --runs.")
    reward_weights: list[str] = setting([], "NAME=PATH of reward models on this machine; by default those of --runs, or the hub.")
    images_per_prompt: int = setting(4, "Pictures of every prompt by every model.")
    num_steps: int = setting(50, "T; with --runs its own, unless given.")
    guidance_scale: float = setting(5.0, "w; with --runs its own, unless given.")
    eta: float = setting(
        1.0, "Noise of a step relative to DDPM's, 0 for none (of a flow its ODE); with --runs its own, unless given."
    )
    resolution: int = setting(0, "Height and width of pictures; 0 is the model's. With --runs its own, unless given.")
    max_sequence_length: int = setting(256, "Tokens of T5, if the model has one; with --runs its own, unless given.")
    autocast: Literal["no", "bf16"] = setting("no", "Precision of the network's passes; with --runs its own, unless given.")
    frozen_dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "Of text encoders and, unless --runs trained every weight, of the network; with --runs its own, unless given."
    )
    text_encoders_on_cpu: bool = setting(False, "Keep text encoders in CPU memory while nothing is encoded; likewise.")
    tf32: bool = setting(False, "TF32 in fp32 matrix products and convolutions; with --runs its own, unless given.")
    seed: int = setting(0, "Of the noise, and of what SET:500 draws.")
    batch_size: int = setting(64, "Pictures at a time; does not change the result by more than rounding.")
    predicted: int = setting(16, "Prompts of each set on which a run's predicted and actual reward differences are compared.")
    pictures: int = setting(4, "Best, worst and random prompts of each set on the page, of each kind.")
    output_dir: str = setting("", "By default evaluation/ in the first --runs.")


# Sec. 4.1, Table 1, and Sec. 4.2 and 4.3, Tables 2 and 3. TRAINED stands for the prompts the run was trained on.
PROTOCOLS = {
    "none": dict(),
    "small": dict(prompts=["TRAINED"], images_per_prompt=256),
    "large": dict(
        prompts=["TRAINED:500", "pickapic-test:500", "hpdv2-animation", "hpdv2-concept-art", "hpdv2-painting", "hpdv2-photo"],
        images_per_prompt=64,
    ),
}
OF_THE_RUN = (  # unless given
    "num_steps", "guidance_scale", "eta", "resolution", "max_sequence_length", "autocast", "frozen_dtype", "text_encoders_on_cpu",
    "tf32", "prompts_dir", "reward_weights",
)  # fmt: skip
MAY_CHANGE = {
    "batch_size", "prompts_dir", "reward_weights", "text_encoders_on_cpu", "pictures", "models", "prompts", "runs", "checkpoints",
    "output_dir",
}  # fmt: skip


def parse(argv: list[str]) -> dict:
    """The settings that a command line gives, and no others; ValueError for wrong ones."""
    config = Parser(EvaluationConfig, prog="evaluate.py", allow_abbrev=False).parse_strictly(argv)
    return {name: value for name, value in dataclasses.asdict(config).items() if name in names_given(argv)}


def complete(given: dict) -> tuple[EvaluationConfig, list[Model]]:
    """Settings and models; what is not given comes from the run's config.json. ValueError naming what is missing or wrong."""
    first = EvaluationConfig(**given)
    check_kinds(first)
    trained, usual = [read_run(Path(run)) for run in first.runs], dict(PROTOCOLS[first.protocol])
    if trained:
        usual |= {name: trained[0][name] for name in OF_THE_RUN if name in trained[0]}
        usual["rewards"] = [name for name, _ in parse_weighted(trained[0]["reward"])]
        usual["output_dir"] = str(Path(first.runs[0], "evaluation"))
        if first.protocol == "none":
            usual["prompts"] = [trained[0]["eval_prompts"] or trained[0]["prompts"]]
    config = EvaluationConfig(**usual | given)
    if "rewards" not in given:
        check_no_code(config.rewards, "--rewards, or others there")
    if trained:
        config.prompts = [name.replace("TRAINED", trained[0]["prompts"]) for name in config.prompts]
    if len({settings["model"] for settings in trained}) > 1:
        raise ValueError(f"the runs start from different models, {trained[0]['model']} and others: evaluate them apart")
    models = [Model("base", trained[0]["model"])] if trained else []
    for run, settings in zip(config.runs, trained, strict=True):
        name = "tuned" if len(trained) == 1 else Path(run).name
        for folder in checkpoint.kept_on_the_way(Path(run)) if config.checkpoints else ():
            epoch = checkpoint.epoch_of(folder)
            models.append(Model(f"{name}@{epoch}", str(folder), settings, epoch, checkpoint=True))
        ended = [checkpoint.epoch_of(folder) for folder in checkpoint.all_checkpoints(Path(run))[-1:]]
        models.append(Model(name, run, settings, *ended))
    for spec in config.models:
        name, equals, folder = spec.partition("=")
        if not equals:
            raise ValueError(f"--models takes name=pipeline, not {spec!r}")
        models.append(Model(name, folder))
    for name, value in (("models", models), *((n, getattr(config, n)) for n in ("prompts", "rewards", "output_dir"))):
        if not value:
            raise ValueError(f"--{name} is missing (or give --runs)")
    if any("TRAINED" in name for name in config.prompts):
        raise ValueError(f"--protocol {config.protocol} needs --runs, whose prompts are part of it, or --prompts")
    if config.frozen_dtype != "fp32" and config.autocast == "no" and not trains_all(models):
        raise ValueError(f"frozen_dtype={config.frozen_dtype} needs autocast={config.frozen_dtype}")
    for name in ("images_per_prompt", "batch_size", "pictures"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
    repeated = [model.name for i, model in enumerate(models) if model.name in [m.name for m in models[:i]]]
    if repeated:
        raise ValueError(f"two models are called {repeated[0]!r}: give each a name of its own with --models name=...")
    return config, models


def trains_all(models: list[Model]) -> bool:
    """Whether a run among them has trained every weight, so that networks are held as it held its own."""
    return any(model.run and not model.run["lora_rank"] for model in models)


def load_set(name: str, config: EvaluationConfig) -> list[str]:
    """The prompts of a set; of SET:500 the first 500 that training with this seed draws."""
    whole, colon, number = name.rpartition(":")
    if not (colon and number.isdigit()):
        return load_prompts(name, config.prompts_dir)
    prompts = load_prompts(whole, config.prompts_dir)
    if not 1 <= int(number) <= len(prompts):
        raise ValueError(f"prompt set {name!r}: {whole} has {len(prompts)} prompts, so the number must be 1 to {len(prompts)}")
    return draw_prompts(prompts, int(number), 0, config.seed)


def policy_of(pipe, config: EvaluationConfig) -> Policy:
    return pipeline_policy(pipe, config.num_steps, guidance_scale=config.guidance_scale, eta=config.eta, autocast=config.autocast)


def score_set(
    config: EvaluationConfig, results: Results, model: str, opened: Callable, set_name: str, prompts: list[str],
    rewards: dict[str, Reward],
) -> None:  # fmt: skip
    """Draws and scores what of this process's share of a set is not done yet; holds one batch of pictures at a time.

    opened: a function that opens the model's pipeline, if there is anything left to do.
    """
    B, done = config.images_per_prompt, results.read(model, set_name, prompts)
    # The share is of all prompts: the others' scores may appear in `done` before this process asks for it.
    missing = [n for n in range(RANK, len(prompts), WORLD_SIZE) if n not in done]
    if not missing:
        return
    pipe = opened()
    policy = policy_of(pipe, config)
    at_once = max(1, config.batch_size // B)  # prompts finished together
    bar = tqdm(
        total=len(missing) * B, desc=f"{model}: {set_name}", unit="pictures", leave=False, disable=True if RANK > 0 else None
    )
    for first in range(0, len(missing), at_once):
        block = missing[first : first + at_once]
        rows = [(n, b) for n in block for b in range(B)]
        scores = {name: [] for name in rewards}
        moments = torch.zeros(2, len(block), 3, 32, 32, dtype=torch.float64)
        for start in range(0, len(rows), config.batch_size):
            part = rows[start : start + config.batch_size]
            texts = [prompts[n] for n, _ in part]
            images = sample_images(policy, pipe, texts, [(config.seed, EVALUATION, n, b) for n, b in part], config.batch_size)
            for name, reward in rewards.items():
                scores[name] += reward(images, texts).tolist()
            small = torch.nn.functional.adaptive_avg_pool2d(images.double(), 32)
            which = torch.tensor([block.index(n) for n, _ in part])
            moments.index_add_(1, which, torch.stack([small, small**2]))
            for (n, b), image in zip(part, images, strict=True):
                if b == 0:
                    results.save_picture(model, set_name, n, image)
            bar.update(len(part))
        mean, square = moments / B
        spread = (square - mean**2).clamp(min=0).mean((1, 2, 3)).sqrt().tolist()
        results.append(model, set_name, [
            {"n": n, "prompt": prompts[n], "scores": {name: s[i * B : (i + 1) * B] for name, s in scores.items()}, "diversity": d}
            for i, (n, d) in enumerate(zip(block, spread, strict=True))
        ])  # fmt: skip


def all_predict(
    config: EvaluationConfig, results: Results, model: Model, opened: Callable, base: Callable, set_name: str, prompts: list[str]
) -> None:
    """Of PRDP, predicted (beta log pi_theta/pi_ref) and actual reward of some of the pictures scored (Eq. 10-13), to disk.

    The trajectories are drawn once more, by their names the same; every process does its share of the prompts. Leaves out
    checkpoints, models not trained here, and those whose training reward was not evaluated. opened, base: functions that open the
    model's and the reference's pipeline.
    """
    parts = parse_weighted(model.run["reward"]) if model.run else []
    number, B = min(config.predicted, len(prompts)), min(config.images_per_prompt, 8)
    known = (
        parts and model.run.get("method") == "prdp" and not model.checkpoint and all(name in config.rewards for name, _ in parts)
    )
    possible = config.eta > 0 and B > 1 and number > 0  # without noise there is no log-prob
    # As the first process sees it
    done = processes.all_succeed(lambda: bool(results.predicted(model.name, set_name, prompts)))[0]
    if not (known and possible) or done:
        return

    def rhat_of_share() -> torch.Tensor:
        share, rhat = range(RANK * number // WORLD_SIZE, (RANK + 1) * number // WORLD_SIZE), []
        if not share:
            return torch.empty(0, B, dtype=torch.float64)
        policy, reference = policy_of(opened(), config), policy_of(base(), config)
        for n in share:
            cond = encode_prompts(opened(), [prompts[n]] * B)
            drawn = sample_trajectories(policy, cond, [(config.seed, EVALUATION, n, b) for b in range(B)], B)
            log_probs_ref = log_prob_table(reference, drawn, config.batch_size)
            rhat.append(log_ratio(drawn.log_probs, log_probs_ref, model.run["step_reduction"]))
        return torch.stack(rhat) * (policy.in_nats if model.run["log_prob_reduction"] == "sum" else 1)

    rhat, beta = all_gather(rhat_of_share), model.run["kl_weight"]

    def write() -> None:
        done = results.read(model.name, set_name, prompts)
        rewards = [[sum(w * done[n]["scores"][name][b] for name, w in parts) for b in range(B)] for n in range(number)]
        correlation, slope = prediction_quality(rhat, torch.tensor(rewards), beta)
        file, of = results.prediction(model.name, set_name), {"prompts": prompts[:number]}
        unfinished = file.with_suffix(".unfinished")
        values = {"correlation": correlation, "slope": slope, "predicted": (beta * rhat).tolist(), "actual": rewards}
        unfinished.write_text(json.dumps(of | values))
        unfinished.replace(file)

    processes.all_wait_for_first(write)


def columns(config: EvaluationConfig, models: list[Model]) -> dict[str, dict[str, float]]:
    """{title: {reward: weight}} of every reward, and of the sum that the first run was trained on, if it was one."""
    trained = next((parse_weighted(model.run["reward"]) for model in models if model.run), [])
    total = {"training reward": dict(trained)} if len(trained) > 1 and all(name in config.rewards for name, _ in trained) else {}
    return {name: {name: 1.0} for name in config.rewards} | total


def evaluate(rewards: list[str] | dict[str, Reward] = (), prompts: list[str] | dict[str, list[str]] = (), **given) -> list[dict]:
    """What the command does, by function -> results.json's rows. On several processes all call it.

    rewards and prompts: their names, or your own by the names that they shall have; given: the other settings that are given.
    ValueError for what cannot be, OSError and RewardError on the way; what is scored is kept then.
    """
    own_rewards, own_prompts = (dict(some) if isinstance(some, dict) else {} for some in (rewards, prompts))
    given |= {name: list(some) for name, some in (("rewards", rewards), ("prompts", prompts)) if some}
    for name, some in own_prompts.items():
        if not some:
            raise ValueError(f"prompt set {name!r} is an empty list: give at least one prompt")
    config, models = complete(given)
    device = processes.start(config.tf32)
    sets = {name: own_prompts.get(name) or load_set(name, config) for name in config.prompts}
    scorers = {
        name: own_reward(name, own_rewards[name]) if name in own_rewards else load_reward(name, config.reward_weights, device)
        for name in config.rewards
    }
    check_links(Path(config.output_dir))
    results = Results(Path(config.output_dir))
    fixed = {name: value for name, value in dataclasses.asdict(config).items() if name not in MAY_CHANGE}
    processes.all_wait_for_first(lambda: claim(results, fixed, models))
    processes.all_check_shared(results.output)
    held = {name: getattr(config, name) for name in HELD} | {"trains_all": trains_all(models)}
    base = functools.cache(lambda: open_model(models[0].folder, models[0].folder, device, **held))
    for model in models:
        opened = functools.cache(lambda model=model: open_model(model.folder, models[0].folder, device, **held))
        for set_name, some in sets.items():
            processes.all_succeed(lambda: score_set(config, results, model.name, opened, set_name, some, scorers))
            processes.all_wait_for_first(lambda: results.wait_for(model.name, set_name, some))
            all_predict(config, results, model, opened, base, set_name, some)
    rows: list[dict] = []

    def conclude() -> None:
        rows.extend(report.write(config, results, models, sets, columns(config, models), flags_of(given)))
        answer("\n".join(summary_lines(rows, models)))

    processes.all_wait_for_first(conclude)
    answer(f"Look at {results.output / 'report.html'}; the numbers with errors are in table.md and results.json beside it.")
    processes.stop()
    return rows


def flags_of(given: dict) -> list[str]:
    """The command line that gives these settings."""
    words = [(f"--{name}", *map(str, value if isinstance(value, list) else [value])) for name, value in given.items()]
    return [word for some in words for word in some]


def main(argv: list[str]) -> None:
    with one_line_errors(ValueError, OSError, RewardError):
        evaluate(**parse(argv))


if __name__ == "__main__":
    processes.run_script(main)
