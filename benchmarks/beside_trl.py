"""Side by side with TRL's DDPOTrainer, which most people have used until it was dropped: seconds of an epoch, reward for seconds.

    python -m benchmarks.beside_trl time --output results/beside-trl-time.json         # on a machine that does nothing else
    python -m benchmarks.beside_trl reward --output results/beside-trl-reward.json

Makes an environment in --folder with TRL 0.23.1, the last to have it, that sees everything else of this one: the same torch.

time: an epoch on a pipeline of random weights (benchmarks.rehearsal, small: 16 x 16 latents, 8 pictures of 10 steps, guidance 5,
batches of 8), all in turn --rounds times. An epoch's seconds are the median of those after the first; a ratio is to TRL's of the
same round. Printed is the median of the ratios with an interval that holds the true one in 90 of 100 cases or more, and what is
owed in network calls: sampling is one, an update three (two with adapters), PRDP's reference one more, and with K > 1 theta_old's
table and one before every further update.

reward: on the miniature at guidance 2, below which TRL cannot sample; each method at the rate that is best for it, three seeds,
held-out alignment when training has taken --seconds. Two runs at a time, of one thread each.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path

import torch

from benchmarks import rehearsal
from plumbing import checkpoint
from plumbing.errors import one_line_errors
from plumbing.jobs import Job, work_off
from plumbing.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
TRL = "trl==0.23.1"
SHAPE = (
    "--prompts_per_epoch 2 --images_per_prompt 4 --num_steps 10 --guidance_scale 5 --sample_batch_size 8 --log_prob_batch_size 8 "
    "--train_batch_size 8 --reward jpeg-compressibility --prompts animals --eval_prompts= --save_every 99 --epochs"
)
DDPO, PRDP, ONE_STEP = "--method ddpo --clip_range 1e-4", "--method prdp", "--reference_steps 1"
# name: whose, flags, and calls of the network in an epoch for one (trajectory, step); backward is two, with adapters one
TIMED = {
    "TRL": ("trl", f"{DDPO} --updates_per_epoch 1", 4),
    "DDPO": ("ours", f"{DDPO} --updates_per_epoch 1", 4),
    "PRDP": ("ours", f"{PRDP} --updates_per_epoch 1", 5),
    "PRDP, reference on a tenth": ("ours", f"{PRDP} --updates_per_epoch 1 {ONE_STEP}", 4.1),
    "PRDP, K = 10": ("ours", f"{PRDP} --updates_per_epoch 10", 3 + 10 * 3 + 9),
    "TRL, adapters": ("trl", f"{DDPO} --updates_per_epoch 1 --lora_rank 4", 3),
    "DDPO, adapters": ("ours", f"{DDPO} --updates_per_epoch 1 --lora_rank 4", 3),
    "PRDP, adapters": ("ours", f"{PRDP} --updates_per_epoch 1 --lora_rank 4", 4),
    "PRDP, adapters, reference on a tenth": ("ours", f"{PRDP} --updates_per_epoch 1 --lora_rank 4 {ONE_STEP}", 3.1),
}

MINIATURE = "--preset toy --guidance_scale 2 --eval_prompts= --save_every 1 --keep_every 1 --epochs"
LEARNING = {
    "TRL's DDPO": ("trl", f"{DDPO} --clip_range 2.13e-3 --updates_per_epoch 4 --train_batch_size 32"),
    "DDPO": ("ours", f"{DDPO} --clip_range 2.13e-3 --updates_per_epoch 4"),
    "PRDP": ("ours", "--method prdp --updates_per_epoch 1"),
}
RATES, SEARCH_SEED, SEEDS = ("1e-4", "2e-4", "4e-4"), 100, (0, 1, 2)


def environment(folder: Path) -> str:
    """The Python of an environment that has TRL and sees ours."""
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        venv.create(folder, with_pip=True, clear=True)
        paths = [path for path in sys.path if path.endswith("site-packages")]
        (next((folder / "lib").iterdir()) / "site-packages" / "ours.pth").write_text("\n".join(paths) + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", TRL], check=True)
        (folder / "made").touch()
    return str(python)


def command(whose: str, flags: str, run: Path, python: str) -> list[str]:
    start = [python, "-m", "benchmarks.with_trl"] if whose == "trl" else [sys.executable, "train.py"]
    return [*start, *flags.split(), "--output_dir", str(run)]


def epochs_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["epoch"]]


def seconds_of(line: dict) -> float:
    return sum(seconds for phase, seconds in line["seconds"].items() if phase != "evaluate")


def interval(values: list[float]) -> tuple[float, float]:
    """Order statistics between which the true median lies with probability 0.9 or more, whatever the distribution (n >= 5)."""
    n, cut = len(values), 1
    while 2 * sum(math.comb(n, i) for i in range(cut + 1)) / 2**n <= 0.1:
        cut += 1
    return sorted(values)[cut - 1], sorted(values)[-cut]


def time_all(options, python: str) -> dict:
    model = options.folder / "pipeline"
    if not (model / "model_index.json").exists():
        torch.manual_seed(0)
        rehearsal.make_pipeline(model, "small")
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    for n in range(options.rounds):
        for name, (whose, flags, _) in TIMED.items():
            run = options.folder / f"round-{n}" / name.replace(", ", "-").replace(" ", "-")
            if not (run / "metrics.jsonl").exists() or len(epochs_of(run)) < options.epochs:
                subprocess.run(["rm", "-rf", str(run)], check=True)
                call = command(whose, f"{flags} --model {model} {SHAPE} {options.epochs}", run, python)
                done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
                if done.returncode:
                    raise ValueError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            seconds[name].append(statistics.median(seconds_of(line) for line in epochs_of(run)[1:]))
        print(f"round {n + 1}:", ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items()), flush=True)
    rows = {}
    for name, (_, _, calls) in TIMED.items():
        base = "TRL, adapters" if "adapters" in name else "TRL"
        ratios = [mine / theirs for mine, theirs in zip(seconds[name], seconds[base], strict=True)]
        rows[name] = {
            "flags": TIMED[name][1],
            "seconds": seconds[name],
            "ratio_to_trl": statistics.median(ratios),
            "interval_90": interval(ratios),
            "owed_in_calls": calls / TIMED[base][2],
        }
    return {"shape": SHAPE, "threads": torch.get_num_threads(), "rounds": options.rounds, "results": rows}


def learn_all(options, python: str) -> dict:
    """Searches each method's rate with a seed of its own, then trains three seeds and scores what they are after --seconds."""
    logs = options.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def folder(name: str, rate: str, seed: int) -> Path:
        return options.folder / f"{name} {rate} {seed}".replace(" ", "-").replace("'", "")

    def train(wanted: list[tuple[str, str, int]]) -> None:
        jobs = []
        for name, rate, seed in wanted:
            run, (whose, flags) = folder(name, rate, seed), LEARNING[name]
            if not (run / "pipeline" / "model_index.json").exists():
                subprocess.run(["rm", "-rf", str(run)], check=True)
                limit = ["--seconds", str(options.seconds)] if whose == "trl" else []
                flags = f"{MINIATURE} {options.epochs} {flags} --learning_rate {rate} --seed {seed}"
                jobs.append(Job(run.name, [*command(whose, flags, run, python), *limit]))
        work_off(jobs, "runs", options.jobs, logs)

    def within(run: Path) -> list[dict]:
        """The epochs that began before the seconds were over."""
        lines, total = [], 0.0
        for line in epochs_of(run):
            if total > options.seconds:
                break
            total += seconds_of(line)
            lines.append(line | {"at": total})
        if lines[-1]["at"] <= options.seconds:
            raise ValueError(f"{run} has taken only {lines[-1]['at']:.0f} of {options.seconds:g} seconds: raise --epochs")
        return lines

    train([(name, rate, SEARCH_SEED) for name in LEARNING for rate in RATES])
    searched = {
        name: {
            rate: statistics.fmean(line["reward_mean"] for line in within(folder(name, rate, SEARCH_SEED))[-5:]) for rate in RATES
        }
        for name in LEARNING
    }
    chosen = {name: max(rates, key=rates.get) for name, rates in searched.items()}
    train([(name, chosen[name], seed) for name in LEARNING for seed in SEEDS])
    rows = {}
    for name, (whose, flags) in LEARNING.items():
        rows[name] = {"flags": f"{MINIATURE} {options.epochs} {flags}", "search": searched[name], "learning_rate": chosen[name]}
        for seed in SEEDS:
            run = folder(name, chosen[name], seed)
            lines = within(run)
            kept = {checkpoint.epoch_of(path): path for path in checkpoint.all_checkpoints(run)} if whose == "ours" else {}
            model = kept.get(lines[-1]["epoch"], run / "pipeline")
            scored = run / "held-out"
            if not (scored / "results.json").exists():
                call = f"evaluate.py --models base=toy tuned={model} --prompts toy-heldout-one toy-heldout-two"
                call += " --rewards toy-alignment --images_per_prompt 1 --num_steps 5 --guidance_scale 2"
                call += f" --seed {seed} --output_dir {scored}"
                subprocess.run([sys.executable, *call.split()], cwd=ROOT, check=True, capture_output=True)
            results = json.loads((scored / "results.json").read_text())["results"]
            rows[name][f"seed {seed}"] = {
                "epochs": lines[-1]["epoch"],
                "seconds": [round(line["at"], 1) for line in lines],
                "reward": [round(line["reward_mean"], 4) for line in lines],
                "held_out": {f"{row['model']}, {row['prompts']}": [row["mean"], row["standard_error"]] for row in results},
            }
    return {"seconds": options.seconds, "jobs": options.jobs, "search_seed": SEARCH_SEED, "results": rows}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.beside_trl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["time", "reward"])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/beside-trl"), help="environment and runs; what is there is kept"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--rounds", type=int, default=7, help="time: pairs of every ratio")
    parser.add_argument("--epochs", type=int, default=0, help="of a run; 3 for time, 60 for reward")
    parser.add_argument("--seconds", type=float, default=100.0, help="reward: of training")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="reward: runs at a time")
    options = parser.parse_args(argv)
    options.folder = options.folder.absolute()
    options.epochs = options.epochs or {"time": 3, "reward": 60}[options.what]
    with one_line_errors(ValueError, OSError):
        options.folder.mkdir(parents=True, exist_ok=True)
        python = environment(options.folder / "environment")
        result = (time_all if options.what == "time" else learn_all)(options, python)
        source = provenance("-m benchmarks.beside_trl", argv)
        source["versions"]["trl"] = TRL.partition("==")[2]
        options.output.write_text(json.dumps(source | result, indent=1) + "\n")
    if options.what == "time":
        print("| | seconds | to TRL | 90 % interval | owed in calls |\n|---|---|---|---|---|")
        for name, row in result["results"].items():
            low, high = row["interval_90"]
            print(f"| {name} | {statistics.median(row['seconds']):.2f} | {row['ratio_to_trl']:.3f} | {low:.3f} to {high:.3f} "
                  f"| {row['owed_in_calls']:.2f} |")  # fmt: skip
    else:
        for name, row in result["results"].items():
            held_out = [row[f"seed {seed}"]["held_out"] for seed in SEEDS]
            print(name, row["learning_rate"], *({key: round(value[0], 3) for key, value in each.items()} for each in held_out))


if __name__ == "__main__":
    main(sys.argv[1:])
