"""The paper's comparisons in miniature, a command each, and some that it does not have: shared, lasro, prediction, ...

    python reproduce.py fig3              # with and without clipping, small and large scale, PRDP and DDPO: Fig. 3 and Table 5
    python reproduce.py all               # every target; a run that several need is made once
    python reproduce.py all --lengthen 5 --jobs 8 --folder runs/long     # where there is a GPU

Every run is one of train.py or lasro.py and every score one of evaluate.py, on an embedded model, with the settings below. For
every method and scale (but prediction's) the learning rate is chosen first, by the reward at the end of a run with another seed.
After an interruption the same command goes on where it was. Results: results/reproduce/TARGET.json and .png, learning-rates.json,
and time.json, of every invocation, whether it came to its end or not.
"""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config import LASRO_PRESETS, PRESETS, Config, LasroConfig
from plumbing import checkpoint, plots
from plumbing.errors import one_line_errors
from plumbing.figures import TARGETS, Target
from plumbing.flags import OneLineParser, go_on, parse
from plumbing.jobs import Job, file_name, work_off
from plumbing.processes import answer, say
from plumbing.prompts import load_prompts
from plumbing.provenance import provenance, write_result
from plumbing.record import read_metrics, read_run
from plumbing.scores import Results

SEARCH_SEED = 100
LEARNING_RATES = ("3e-6", "1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3")  # the search begins with the three in the middle

BOTH = "--preset toy --eval_prompts= --prompts_per_epoch 8 --images_per_prompt 8 --log_prob_batch_size 160 --train_batch_size 160"
# At a scale the same prompts, pictures and reward queries for all methods, and the same seeds in evaluation.
SCALES = {
    "small": f"{BOTH} --prompts toy-small --save_every 2 --keep_every 2",
    "large": f"{BOTH} --prompts toy-train --save_every 4 --keep_every 0",
    # Where the optimum is within reach: in nats, beta a tenth of the reward's range, and adapters, whose gradients are less noisy
    "prediction": "--preset toy --eval_prompts= --prompts toy-small --prompts_per_epoch 8 --images_per_prompt 16 --lora_rank 8 "
    "--log_prob_reduction sum --step_reduction sum --kl_weight 0.1 --save_every 30 --keep_every 30",
    "few": "--model toy-turbo --num_steps 2 --images_per_prompt 8 --eval_every 5 --save_every 5 --keep_every 0",
    "flow": "--preset toy-flow --eval_prompts= --prompts_per_epoch 8 --images_per_prompt 8 --save_every 10 --keep_every 0",
}
EPOCHS = {"small": 12, "large": 48, "prediction": 30, "few": 30, "flow": 48}
EVALUATIONS = {  # of which scale, and how
    "small": ("small", "toy", "--prompts toy-small --images_per_prompt 16 --num_steps 5"),
    "large": ("large", "toy", "--prompts toy-train:128 toy-heldout-one toy-heldout-two --images_per_prompt 4 --num_steps 5"),
    "two steps": ("few", "toy-turbo", "--prompts toy-heldout --images_per_prompt 2 --num_steps 2"),
    "one step": ("few", "toy-turbo", "--prompts toy-heldout --images_per_prompt 2 --num_steps 1"),
    "flow": ("flow", "toy-flow", "--prompts toy-heldout --images_per_prompt 2 --num_steps 5 --max_sequence_length 0"),
    "by its ODE": (
        "flow",
        "toy-flow",
        "--prompts toy-heldout --images_per_prompt 2 --num_steps 10 --eta 0 --max_sequence_length 0",
    ),
}
# Updates of an epoch are as in each method's paper. Clip ranges are theirs in nats:
# times 64/3, for D = 768 instead of 16384. D3PO's is as wide as it can be: its 0.1 spans over 3000 nats there.
METHODS = {
    ("prdp", "small"): "--method prdp --updates_per_epoch 10 --clip_range 2.13e-5",
    ("prdp", "large"): "--method prdp --updates_per_epoch 1 --clip_range 2.13e-3",
    ("ddpo", "small"): "--method ddpo --updates_per_epoch 4 --clip_range 2.13e-3",
    ("ddpo", "large"): "--method ddpo --updates_per_epoch 4 --clip_range 2.13e-3",
    (
        "dpok",
        "small",
    ): "--method dpok --updates_per_epoch 5 --clip_range 2.13e-3 --kl_weight 1e-3 --max_grad_norm 0.1 --weight_decay 0",
    ("prdp", "prediction"): "--method prdp --updates_per_epoch 1 --shared_x_T",
    # LaSRO scores a picture after each of its two steps, the others one at the end
    ("lasro", "few"): "--preset toy-turbo --prompts_per_epoch 8",
    ("prdp", "few"): "--preset toy --prompts_per_epoch 16",
    ("ddpo", "few"): "--preset toy --prompts_per_epoch 16 --method ddpo --updates_per_epoch 4",
    ("prdp", "flow"): "--method prdp",
    ("ddpo", "flow"): "--method ddpo --updates_per_epoch 4",
    # In nats Flow-GRPO's clip range and beta at D = 65536
    ("grpo", "flow"): "--method grpo --updates_per_epoch 2 --clip_range 8.53e-3 --kl_weight 1.2e-5 --advantage_limit 5 "
    "--reward_statistics batch",
    ("d3po", "small"): "--method d3po --updates_per_epoch 8 --shared_x_T --clip_range 0.9 --kl_weight 4.7e-3",
}
RATES = {("prdp", "prediction"): "1e-3"}  # the others' are searched
COLOUR = "--reward toy-colourfulness --kl_weight"
VARIANTS: dict[str, tuple[str, str, str]] = {  # name: method, scale and what is changed
    "PRDP": ("prdp", "small", ""),
    "PRDP unclipped": ("prdp", "small", "--clip_range 1e9"),
    "PRDP unclipped, a tenth of the rate": ("prdp", "small", "--clip_range 1e9 --learning_rate 1e-5"),
    "PRDP offline": ("prdp", "small", "--offline"),
    "DDPO": ("ddpo", "small", ""),
    "DDPO unclipped": ("ddpo", "small", "--clip_range 1e9"),
    "DDPO batch statistics": ("ddpo", "small", "--reward_statistics batch"),
    "DPOK": ("dpok", "small", ""),
    "DPOK without critic": ("dpok", "small", "--critic False"),
    "D3PO": ("d3po", "small", ""),
    "PRDP large": ("prdp", "large", ""),
    "PRDP large shared x_T": ("prdp", "large", "--shared_x_T"),
    "PRDP large reference on one step": ("prdp", "large", "--reference_steps 1"),
    "DDPO large": ("ddpo", "large", ""),
    "DDPO large unclipped": ("ddpo", "large", "--clip_range 1e9"),
    "DDPO large own statistics": ("ddpo", "large", "--statistics_min_count 8"),
    "PRDP beta 0.1": ("prdp", "small", f"{COLOUR} 0.1"),
    "PRDP beta 10": ("prdp", "small", f"{COLOUR} 10"),
    "T = 5": ("prdp", "prediction", "--epochs 60"),
    "independent x_T": ("prdp", "prediction", "--shared_x_T False"),
    "K = 4, clipped": ("prdp", "prediction", "--updates_per_epoch 4 --clip_range 0.3 --epochs 10"),
    "every weight": ("prdp", "prediction", "--lora_rank 0 --learning_rate 5e-5"),
    # In reward per nat the toy preset's beta is 0.03 / (768 * 4), about 1e-5, and the paper's 3e-5 / (16384 * 50), 4e-11.
    "beta 1e-3, every weight": ("prdp", "prediction", "--kl_weight 1e-3 --lora_rank 0 --learning_rate 2e-4"),
    "reference on one step": ("prdp", "prediction", "--reference_steps 1"),
    "beta 1e-3, reference on one step": (
        "prdp",
        "prediction",
        "--kl_weight 1e-3 --lora_rank 0 --learning_rate 2e-4 --reference_steps 1",
    ),
    "LaSRO": ("lasro", "few", ""),
    "LaSRO frozen": ("lasro", "few", "--surrogate_updates 0"),
    "LaSRO without anchor": ("lasro", "few", "--anchor_weight 0"),
    "anchor alone": ("lasro", "few", "--step_weights 0 0"),
    "PRDP of two steps": ("prdp", "few", ""),
    "DDPO of two steps": ("ddpo", "few", ""),
    "PRDP on a flow": ("prdp", "flow", ""),
    "DDPO on a flow": ("ddpo", "flow", ""),
    "GRPO on a flow": ("grpo", "flow", ""),
    "DDPO colour": ("ddpo", "small", "--reward toy-colourfulness"),
}


def run_folder(name: str, seed: int, options) -> Path:
    return options.folder / file_name(name, seed)


def settings(method: str, scale: str, flags: str, rate: str, options) -> str:
    """A training run's flags, but for its seed and folder; those of the variant last, so that it may change any.

    A variant's own number of epochs is not lengthened.
    """
    epochs = round(EPOCHS[scale] * options.lengthen)
    return f"{SCALES[scale]} {METHODS[method, scale]} --learning_rate {rate} --epochs {epochs} {flags}".rstrip()


def training(name: str, method: str, scale: str, flags: str, rate: str, seed: int, options) -> Job | None:
    """The job of a training run, to begin or to go on with; None if it is finished. ValueError if another run is in its place."""
    run = run_folder(name, seed, options)
    argv = settings(method, scale, flags, rate, options).split()
    argv += ["--seed", str(seed), "--output_dir", str(run)]
    script, kind = ("lasro.py", LasroConfig) if method == "lasro" else ("train.py", Config)
    wanted = go_on(parse(argv, kind, LASRO_PRESETS if kind is LasroConfig else PRESETS))
    if (run / "config.json").exists() and read_run(run)["epochs"] != wanted.epochs:
        raise ValueError(f"{run} holds a run with other settings: choose another --folder, or remove it")
    if (run / "pipeline" / "model_index.json").exists():
        return None
    return Job(run.name, [sys.executable, script, *argv], run, wanted.epochs)


def learning_rates(pairs: list[tuple[str, str]], options) -> dict[tuple[str, str], str]:
    """For each (method, scale) the learning rate, by the mean reward over the last quarter of a run; the search is recorded.

    It is the lowest rate within a standard error (over those epochs) of the best: a tie must not be broken towards instability.
    From three rates on, the neighbours of both are tried until they lie between two worse ones.
    """
    rewards: dict[tuple[str, str], dict[str, float]] = {pair: {} for pair in pairs}
    errors: dict[tuple[str, str], dict[str, float]] = {pair: {} for pair in pairs}
    chosen: dict[tuple[str, str], str] = {}
    wanted = [(*pair, rate) for pair in pairs for rate in LEARNING_RATES[2:5]]
    while wanted:
        jobs = [training(f"search {m} {scale} {rate}", m, scale, "", rate, SEARCH_SEED, options) for m, scale, rate in wanted]
        work_off([job for job in jobs if job], "learning rates", options.jobs, options.folder / "logs")
        for method, scale, rate in wanted:
            lines = read_metrics(run_folder(f"search {method} {scale} {rate}", SEARCH_SEED, options))[1:]
            last = [line["reward_mean"] for line in lines[-max(1, len(lines) // 4) :]]
            rewards[method, scale][rate] = statistics.fmean(last)
            errors[method, scale][rate] = statistics.pstdev(last) / math.sqrt(max(1, len(last) - 1))
        wanted = []
        for pair, by_rate in rewards.items():
            best = max(by_rate, key=by_rate.get)
            as_good = [rate for rate in by_rate if by_rate[rate] >= by_rate[best] - errors[pair][best]]
            chosen[pair] = min(as_good, key=float)
            low, high = LEARNING_RATES.index(chosen[pair]), LEARNING_RATES.index(best)
            wanted += [(*pair, rate) for rate in LEARNING_RATES[max(0, low - 1) : high + 2] if rate not in by_rate]
    file = options.results / "learning-rates.json"
    others = json.loads(file.read_text())["results"] if file.exists() else []
    record = [row for row in others if (row["method"], row["scale"]) not in pairs] + [
        {
            "method": m,
            "scale": s,
            "flags": f"{SCALES[s]} {METHODS[m, s]}",
            "reward": by_rate,
            "standard_error": errors[m, s],
            "chosen": chosen[m, s],
        }
        for (m, s), by_rate in rewards.items()
    ]
    write_result(file, "reproduce.py", options.argv, {"seed": SEARCH_SEED, "results": record})
    return chosen


def evaluation_folder(name: str, seed: int, options) -> Path:
    return options.folder / file_name("evaluation", name, f"seed{seed}")


def evaluation(name: str, seed: int, models: dict[str, Path], options) -> Job:
    """The job of scoring all models of a scale and seed; what is finished is not done again."""
    _, base, flags = EVALUATIONS[name]
    named = [f"base={base}", *(f"{model}={folder}" for model, folder in models.items())]
    argv = [*flags.split(), "--rewards", "toy-alignment", "toy-colourfulness", "--seed", str(seed)]
    argv += "--guidance_scale 1 --pictures 1".split()
    argv += ["--output_dir", str(evaluation_folder(name, seed, options))]
    return Job(f"evaluation-{file_name(name)}-{seed}", [sys.executable, "evaluate.py", "--models", *named, *argv])


def models_of(name: str, seed: int, with_checkpoints: bool, options) -> dict[str, Path]:
    """A variant's result and, where asked for, the checkpoints it kept before that."""
    run = run_folder(name, seed, options)
    earlier = checkpoint.kept_on_the_way(run) if with_checkpoints else []
    return {f"{name}@{checkpoint.epoch_of(folder)}": folder for folder in earlier} | {name: run}


def measurement(name: str, target: Target, options) -> Job:
    """The job of a script that writes a target's JSON itself, of the target's runs if it has any."""
    runs = [f"{variant}={run_folder(variant, seed, options)}" for variant in target.variants for seed in options.seeds]
    output = ["--output", str(options.results / f"{name}.json")]
    return Job(name, [sys.executable, "-m", f"benchmarks.{target.script}", *output, *(["--runs", *runs] if runs else [])])


def of_run(folder: Path, scale: str) -> dict:
    """What a target's JSON keeps of a run's record, by epoch; of models of few steps also how it was evaluated on the way."""
    lines = read_metrics(folder)

    def rounded(value):
        return [rounded(one) for one in value] if isinstance(value, list) else value if value is None else round(value, 5)

    def column(key: str) -> list:
        return [rounded(line[key]) for line in lines[1:]]

    seconds = [sum(v for phase, v in line["seconds"].items() if phase != "evaluate") for line in lines[1:]]
    if scale != "few":
        kept = ("reward_mean", "kl_nats", "kl_nats_error", "clip_fraction")
        return {key: column(key) for key in kept} | {"seconds": sum(sum(line["seconds"].values()) for line in lines[1:])}
    config = json.loads((folder / "config.json").read_text())
    kept = [key for key in ("reward_mean", "reward_by_step", "surrogate_by_step", "surrogate_accuracy") if key in lines[1]]
    queries = config["prompts_per_epoch"] * config["images_per_prompt"] * len(lines[1].get("reward_by_step", [None]))
    evaluated = [
        {"queries": queries * line["epoch"], "seconds": round(sum(seconds[: line["epoch"]]), 3)}
        | {key: rounded(line[key]) for key in ("eval_reward", "eval_reward_one_step") if key in line}
        for line in lines if line["eval_reward"] is not None
    ]  # fmt: skip
    return {key: column(key) for key in kept} | {"evaluated": evaluated}


def numbers(target: Target, seeds: list[int], chosen: dict, options) -> dict:
    """A target's JSON: settings, the record of every run, and the scores of every model."""
    runs, scores, flags_of = {}, {}, {}
    for name in target.variants:
        method, scale, flags = VARIANTS[name]
        flags_of[name] = settings(method, scale, flags, chosen[method, scale], options)
        runs[name] = {seed: of_run(run_folder(name, seed, options), scale) for seed in seeds}
    scales = {VARIANTS[name][1] for name in target.variants}
    for how in (how for how, (scale, _, _) in EVALUATIONS.items() if scale in scales):
        for seed in seeds:
            rows = json.loads((evaluation_folder(how, seed, options) / "results.json").read_text())["results"]
            for row in rows:
                name, at, _ = row["model"].partition("@")
                if name == "base" or (name in target.variants and (target.checkpoints or not at)):
                    prompts = row["prompts"] if how in scales else how
                    of_set = scores.setdefault(row["model"], {}).setdefault(seed, {}).setdefault(prompts, {})
                    of_set[row["reward"]] = {"mean": row["mean"], "standard_error": row["standard_error"]}
                    of_set["diversity"] = row["diversity"]
    return {"title": target.title, "settings": flags_of, "runs": runs, "scores": scores}


def draw_pictures(target: Target, path: Path, options) -> None:
    """The first seed's pictures of the first prompts of an evaluation, from the same noise."""
    scale, _, flags = EVALUATIONS[target.pictures]
    set_name, results = flags.split()[1], Results(evaluation_folder(target.pictures, options.seeds[0], options))
    shown = ["base", *(name for name in target.variants if VARIANTS[name][1] == scale)]
    prompts = load_prompts(set_name)[:8]
    plots.grid({name: [results.picture(name, set_name, n) for n in range(8)] for name in shown}, prompts, path, across=8)


def reproduce(names: list[str], options) -> None:
    (options.folder / "logs").mkdir(parents=True, exist_ok=True)
    targets = {name: TARGETS[name] for name in names}
    variants = list(dict.fromkeys(name for target in targets.values() for name in target.variants))
    pairs = list(dict.fromkeys(VARIANTS[name][:2] for name in variants))
    searched = [pair for pair in pairs if pair not in RATES]
    chosen = RATES | (learning_rates(searched, options) if searched else {})
    wanted = [(name, seed) for seed in options.seeds for name in variants]
    jobs = []
    for name, seed in wanted:
        method, scale, flags = VARIANTS[name]
        jobs.append(training(name, method, scale, flags, chosen[method, scale], seed, options))
    work_off([job for job in jobs if job], "runs", options.jobs, options.folder / "logs")
    jobs = [measurement(name, target, options) for name, target in targets.items() if target.script]
    for seed in options.seeds:
        for how, (scale, _, _) in EVALUATIONS.items():
            models = {}
            for target in targets.values():
                for name in target.variants:
                    if VARIANTS[name][1] == scale:
                        models |= models_of(name, seed, target.checkpoints, options)
            if models:
                jobs.append(evaluation(how, seed, models, options))
    work_off(jobs, "evaluation", options.jobs, options.folder / "logs")
    for name, target in targets.items():
        path = options.results / f"{name}.json"
        if not target.script:
            write_result(path, "reproduce.py", options.argv, numbers(target, options.seeds, chosen, options))
        target.draw(target.panels, json.loads(path.read_text()), path.with_suffix(".png"))
        if target.pictures:
            draw_pictures(target, options.results / f"{name}-pictures.png", options)
        answer(f"{target.title}: {path} and {path.with_suffix('.png')}")


@contextmanager
def timed(options) -> Iterator[None]:
    """Around the work: its seconds go into time.json."""
    began, finished = time.monotonic(), False
    try:
        yield
        finished = True
    finally:
        seconds, file = round(time.monotonic() - began), options.results / "time.json"
        earlier = json.loads(file.read_text()) if file.exists() else []
        this = provenance("reproduce.py", options.argv) | {"seconds": seconds, "finished": finished}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([*earlier, this], indent=1) + "\n")
        say(f"{seconds / 60:.0f} minutes")


def main(argv: list[str]) -> None:
    parser = OneLineParser(prog="reproduce.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    described = "; ".join(f"{name} ({target.title})" for name, target in TARGETS.items())
    parser.add_argument("targets", nargs="+", choices=[*TARGETS, "all"], metavar="target", help=f"all, or of {described}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs and their evaluation")
    parser.add_argument("--lengthen", type=float, default=1.0, help="epochs times this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/reproduce"), help="where runs and evaluations lie")
    parser.add_argument("--results", type=Path, default=Path("results/reproduce"), help="where JSON files and pictures go")
    with one_line_errors(ValueError, OSError):
        options = parser.parse_args(argv)
        options.argv, options.seeds = argv, list(dict.fromkeys(options.seeds))
        if options.jobs < 1 or options.lengthen <= 0 or min(options.seeds) < 0:
            parser.error("--jobs must be at least 1, --lengthen above 0 and --seeds at least 0")
        try:
            with timed(options):
                reproduce(list(TARGETS) if "all" in options.targets else options.targets, options)
        except KeyboardInterrupt:
            say("stopped; the same command goes on where it was")
            sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
