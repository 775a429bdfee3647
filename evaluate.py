"""Base against finetuned, on any prompts, by any rewards, at the same seeds.

    python evaluate.py --run runs/toy --prompts toy-heldout toy-small --rewards toy-alignment toy-colourfulness
    python evaluate.py --models base=toy tuned=runs/toy/pipeline --prompts my_prompts.txt --rewards toy-alignment ...

Writes into --output_dir: table.md (mean and standard error over prompts), results.json (the same and every prompt's mean,
with command, versions and machine) and, of every prompt set, pictures-SET.png with the models side by side.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import plots
import processes
from config import Parser, setting
from pipeline import encode_prompts, load_pipeline
from prompts import load_prompts
from provenance import provenance
from rewards import RewardError, load_reward
from sampler import EVALUATION, Policy, ddim_scheduler, sample_images


@dataclass
class EvaluationConfig:
    run: str = setting("", "Run folder of train.py: compares its start and its result, with its sampler.")
    models: list[str] = setting([], "name=pipeline, the first is the base; by default those of --run.")
    prompts: list[str] = setting([], "Named sets or files; by default the evaluation prompts of --run.")
    prompts_dir: str = setting("", "Folder with the hub's prompt files as DATA_SET/FILE; by default the hub itself.")
    rewards: list[str] = setting([], "Names or module:function, each its own column; by default those of --run.")
    reward_weights: list[str] = setting([], "NAME=PATH of reward models on this machine; by default those of --run, or the hub.")
    images_per_prompt: int = setting(4, "Pictures of every prompt by every model.")
    num_steps: int = setting(50, "T; with --run its own, unless given.")
    guidance_scale: float = setting(5.0, "w; with --run its own, unless given.")
    eta: float = setting(1.0, "Noise of a step relative to DDPM's; with --run its own, unless given.")
    seed: int = setting(0, "Of the noise.")
    batch_size: int = setting(64, "Pictures at a time; does not change the result by more than rounding.")
    pictures: int = setting(12, "Prompts of each set whose first picture is shown.")
    output_dir: str = setting("", "By default evaluation/ in --run.")


def parse(argv: list[str]) -> EvaluationConfig:
    """The settings; what is not given comes from the run's config.json. ValueError naming what is missing or wrong."""
    parser = Parser(EvaluationConfig, prog="evaluate.py", allow_abbrev=False)
    (first, _) = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if first.run:
        run = Path(first.run)
        try:
            trained = json.loads((run / "config.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{run} is no run folder of train.py: {error}") from error
        parser.set_defaults(
            models=[f"base={trained['model']}", f"tuned={run / 'pipeline'}"],
            prompts=[trained["eval_prompts"] or trained["prompts"]],
            rewards=[reward.rpartition("=")[0] or reward for reward in trained["reward"]],
            output_dir=str(run / "evaluation"),
            **{name: trained[name] for name in ("num_steps", "guidance_scale", "eta", "prompts_dir", "reward_weights")},
        )
    config = parser.parse_strictly(argv)
    for name in ("models", "prompts", "rewards", "output_dir"):
        if not getattr(config, name):
            raise ValueError(f"--{name} is missing (or give --run)")
    for name in ("images_per_prompt", "batch_size", "pictures"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
    if any("=" not in model for model in config.models):
        raise ValueError(f"--models takes name=pipeline, not {next(m for m in config.models if '=' not in m)!r}")
    return config


def score_model(config: EvaluationConfig, folder: str, prompt_sets: dict, rewards: dict, device) -> tuple[dict, dict]:
    """Scores {set: {reward: (prompts, images)}} and the first pictures {set: (pictures, 3, H, W)} of one model."""
    pipe = load_pipeline(folder, device)
    scheduler = ddim_scheduler(pipe.scheduler.config, config.num_steps, config.eta)
    policy = Policy(pipe.unet, scheduler, encode_prompts(pipe, None), config.guidance_scale, config.eta)
    scores, pictures = {}, {}
    for set_name, prompts in prompt_sets.items():
        # First picture of every prompt first: the shown ones are then the first of the batch.
        todo = [
            (prompt, (config.seed, EVALUATION, n, b)) for b in range(config.images_per_prompt) for n, prompt in enumerate(prompts)
        ]
        parts = {name: [] for name in rewards}
        shown = []
        for start in tqdm(range(0, len(todo), config.batch_size), f"{folder}: {set_name}", leave=False):
            batch, names = map(list, zip(*todo[start : start + config.batch_size], strict=True))
            images = sample_images(policy, pipe, batch, names, config.batch_size)
            shown += images[: config.pictures - len(shown)] if len(shown) < config.pictures else []
            for name, reward in rewards.items():
                parts[name].append(reward(images, batch))
        scores[set_name] = {name: torch.cat(p).view(config.images_per_prompt, len(prompts)).T for name, p in parts.items()}
        pictures[set_name] = torch.stack(shown[: len(prompts)])
    return scores, pictures


def mean_and_error(per_prompt: torch.Tensor) -> tuple[float, float]:
    """Mean and standard error over prompts (P,) -> two floats; the error of a single prompt is undefined (NaN)."""
    return per_prompt.mean().item(), (per_prompt.std() / math.sqrt(len(per_prompt))).item() if len(per_prompt) > 1 else math.nan


def summarise(all_scores: dict[str, dict], prompt_sets: dict) -> list[dict]:
    """One entry per set, reward and model: mean, standard error, and the paired difference to the first model."""
    base, rows = next(iter(all_scores)), []
    for model, scores in all_scores.items():
        for set_name in prompt_sets:
            for reward, values in scores[set_name].items():
                per_prompt = values.double().mean(1)
                mean, error = mean_and_error(per_prompt)
                gain, gain_error = mean_and_error(per_prompt - all_scores[base][set_name][reward].double().mean(1))
                rows.append(
                    {"model": model, "prompts": set_name, "reward": reward, "mean": mean, "standard_error": error,
                     "gain": gain, "gain_standard_error": gain_error, "per_prompt": per_prompt.tolist()}
                )  # fmt: skip
    return rows


def markdown_table(rows: list[dict]) -> str:
    """Prompt sets and rewards down, models across: mean ± standard error."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells = {(r["prompts"], r["reward"], r["model"]): f"{r['mean']:.4f} ± {r['standard_error']:.4f}" for r in rows}
    lines = [f"| prompts | reward | {' | '.join(models)} |", "|---" * (2 + len(models)) + "|"]
    for prompts, reward in dict.fromkeys(key[:2] for key in cells):
        lines.append(f"| {prompts} | {reward} | {' | '.join(cells[prompts, reward, model] for model in models)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    with processes.one_line_errors(ValueError, OSError, RewardError):
        config = parse(argv)
        device = processes.start()
        prompt_sets = {name: load_prompts(name, config.prompts_dir) for name in config.prompts}
        rewards = {name: load_reward(name, config.reward_weights, device) for name in config.rewards}
        output = Path(config.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        all_scores, pictures = {}, {}
        for name, _, folder in (model.partition("=") for model in config.models):
            all_scores[name], pictures[name] = score_model(config, folder, prompt_sets, rewards, device)
        rows = summarise(all_scores, prompt_sets)
        result = provenance("evaluate.py", argv) | {"config": dataclasses.asdict(config), "results": rows}
        (output / "results.json").write_text(json.dumps(result, indent=1))
        (output / "table.md").write_text(markdown_table(rows))
        for set_name, prompts in prompt_sets.items():
            rows_of_pictures = {model: pictures[model][set_name] for model in pictures}
            file = f"pictures-{Path(set_name).stem}.png"
            plots.grid(rows_of_pictures, prompts[: config.pictures], output / file)
    print(markdown_table(rows))
    print(f"details in {output / 'results.json'}, pictures in {output}/pictures-*.png")


if __name__ == "__main__":
    main(sys.argv[1:])
