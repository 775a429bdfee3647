"""Side by side with TRL's DDPOTrainer, which most people used until it was dropped: seconds of an epoch, reward for seconds.

    python -m benchmarks.beside_trl time --output results/beside-trl-time.json         # both on a machine that does nothing else
    python -m benchmarks.beside_trl reward --output results/beside-trl-reward.json

Makes an environment in --folder with TRL 0.23.1, the last to have it, that sees everything else of this one, the same torch. Runs
are kept there: the same command goes on where it was. What TRL is helped with is in benchmarks/with_trl.py.

time: an epoch on a pipeline of random weights (benchmarks.rehearsal, small: 16 x 16 latents; 32 pictures of 10 steps, guidance 5,
batches of 8). All have their turn --rounds times, in the opposite order every second time. An epoch's seconds are the median of
those after the first, a ratio is to TRL's of the same round. Printed is the median ratio with an interval that holds the true one
in 90 of 100 cases or more (from five rounds on), and the ratio owed in calls of the network: sampling is one, an update three
(two with adapters), PRDP's reference one more, and with K > 1 theta_old's table and one before every further update.

reward: on the miniature at guidance 2 (at 1 TRL cannot sample), each method at the best of the rates below, three seeds: the
reward in training, and held-out alignment when training has taken --seconds.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import venv
from pathlib import Path

import torch

from benchmarks import rehearsal
from plumbing import checkpoint
from plumbing.errors import last_words, one_line_errors
from plumbing.jobs import file_name
from plumbing.provenance import write_result
from plumbing.record import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TRL = "trl==0.23.1"
SHAPE = (
    "--prompts_per_epoch 4 --images_per_prompt 8 --num_steps 10 --guidance_scale 5 --sample_batch_size 8 --log_prob_batch_size 8 "
    "--train_batch_size 8 --reward jpeg-compressibility --prompts animals --eval_prompts= --save_every 99 --epochs"
)
DDPO, PRDP, ONE_STEP = "--method ddpo --clip_range 1e-4", "--method prdp", "--reference_steps 1"
# name: whose, flags, and calls of the network in an epoch for one (trajectory, step); backward is two, with adapters one. DDPO's
# tenth is of kl_nats, which TRL does not have: 32 of 320 entries, the least there is.
TIMED = {
    "TRL": ("trl", f"{DDPO} --updates_per_epoch 1", 4),
    "DDPO": ("ours", f"{DDPO} --updates_per_epoch 1", 4.1),
    "PRDP": ("ours", f"{PRDP} --updates_per_epoch 1", 5),
    "PRDP, reference on a tenth": ("ours", f"{PRDP} --updates_per_epoch 1 {ONE_STEP}", 4.1),
    "PRDP, K = 10": ("ours", f"{PRDP} --updates_per_epoch 10", 3 + 10 * 3 + 9),
    "TRL, adapters": ("trl", f"{DDPO} --updates_per_epoch 1 --lora_rank 4", 3),
    "DDPO, adapters": ("ours", f"{DDPO} --updates_per_epoch 1 --lora_rank 4", 3.1),
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


def finished(run: Path, whose: str, flags: str, python: str, seconds: float | None = None) -> Path:
    """The run, made now if it is not there; ValueError if it fails or if another is in its place."""
    command = [python, "-m", "benchmarks.with_trl"] if whose == "trl" else [sys.executable, "train.py"]
    command += [*flags.split(), "--output_dir", str(run)]
    if whose == "trl" and seconds:
        command += ["--seconds", f"{seconds:g}"]
    noted = run.with_name(f"{run.name}.command.json")
    if noted.exists():
        if json.loads(noted.read_text()) != command:
            raise ValueError(f"{run} was made by another command: choose another --folder, or remove it")
        return run
    shutil.rmtree(run, ignore_errors=True)
    succeed(command)
    noted.write_text(json.dumps(command))
    return run


def succeed(command: list[str]) -> None:
    """Runs it in the project's root; ValueError with what it said if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {last_words(done.stderr)}")


def epochs_of(run: Path) -> list[dict]:
    return [line for line in read_metrics(run) if line["epoch"]]


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
        rehearsal.pipeline_of("small").save_pretrained(model)
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    for n in range(options.rounds):
        for name in list(TIMED)[:: -1 if n % 2 else 1]:
            whose, flags, _ = TIMED[name]
            run = options.folder / file_name("round", n, name)
            finished(run, whose, f"{flags} --model {model} {SHAPE} {options.epochs}", python)
            seconds[name].append(statistics.median(seconds_of(line) for line in epochs_of(run)[1:]))
        print(f"round {n + 1}:", ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items()), flush=True)
    rows = {}
    for name, (_, flags, calls) in TIMED.items():
        base = "TRL, adapters" if "adapters" in name else "TRL"
        ratios = [mine / theirs for mine, theirs in zip(seconds[name], seconds[base], strict=True)]
        rows[name] = {
            "flags": flags,
            "seconds": seconds[name],
            "ratio_to_trl": statistics.median(ratios),
            "interval_90": interval(ratios),
            "owed_in_calls": calls / TIMED[base][2],
        }
    versions = json.loads((options.folder / file_name("round", 0, "TRL") / "versions.json").read_text())
    return {"shape": SHAPE, "threads": torch.get_num_threads(), "versions_beside_trl": versions, "results": rows}


def until(run: Path, seconds: float) -> list[dict]:
    """The epochs that began before the seconds were over, each with the seconds at its end; ValueError if they never were."""
    lines, total = [], 0.0
    for line in epochs_of(run):
        total += seconds_of(line)
        lines.append({"epoch": line["epoch"], "reward": round(line["reward_mean"], 4), "seconds": round(total, 2)})
        if total > seconds:
            return lines
    raise ValueError(f"{run} has taken only {total:.0f} of {seconds:g} seconds: raise --epochs")


def learn_all(options, python: str) -> dict:
    """Searches each method's rate with a seed of its own, then trains three seeds and scores what they are after --seconds."""

    def trained(name: str, rate: str, seed: int) -> tuple[Path, list[dict]]:
        whose, flags = LEARNING[name]
        flags = f"{MINIATURE} {options.epochs} {flags} --learning_rate {rate} --seed {seed}"
        run = finished(options.folder / file_name(name, rate, seed), whose, flags, python, options.seconds)
        return run, until(run, options.seconds)

    searched: dict[str, dict[str, float]] = {name: {} for name in LEARNING}
    for rate in RATES:
        for name in LEARNING:
            searched[name][rate] = statistics.fmean(line["reward"] for line in trained(name, rate, SEARCH_SEED)[1][-5:])
    rows = {}
    for name, (whose, flags) in LEARNING.items():
        rate = max(searched[name], key=searched[name].get)
        rows[name] = {"flags": flags, "search": searched[name], "learning_rate": rate, "seeds": {}}
        for seed in SEEDS:
            run, lines = trained(name, rate, seed)
            model, scored = run / "pipeline", options.folder / file_name("held out", name, rate, seed)
            if whose == "ours":  # which goes on to the last epoch
                kept = {checkpoint.epoch_of(path): path for path in checkpoint.all_checkpoints(run)}
                model = kept[lines[-1]["epoch"]]
            call = (
                f"evaluate.py --models base=toy tuned={model} --prompts toy-heldout-one toy-heldout-two --rewards toy-alignment"
            )
            call += f" --images_per_prompt 1 --num_steps 5 --guidance_scale 2 --seed {seed} --output_dir {scored}"
            succeed([sys.executable, *call.split()])  # what is finished is not done again
            results = json.loads((scored / "results.json").read_text())["results"]
            held_out = {f"{row['model']}, {row['prompts']}": [row["mean"], row["standard_error"]] for row in results}
            rows[name]["seeds"][seed] = {"epochs": lines, "held_out": held_out}
    return {"shape": f"{MINIATURE} {options.epochs}", "seconds": options.seconds, "search_seed": SEARCH_SEED, "results": rows}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.beside_trl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["time", "reward"])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/beside-trl"), help="environment and runs; what is there is kept"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--rounds", type=int, default=7, help="time: ratios of each")
    parser.add_argument("--epochs", type=int, default=0, help="of a run; by default 2 for time, 40 for reward")
    parser.add_argument("--seconds", type=float, default=80.0, help="reward: of training")
    options = parser.parse_args(argv)
    options.folder = options.folder.absolute()
    options.epochs = options.epochs or {"time": 2, "reward": 40}[options.what]
    with one_line_errors(ValueError, OSError, subprocess.CalledProcessError):
        options.folder.mkdir(parents=True, exist_ok=True)
        python = environment(options.folder / "environment")
        result = (time_all if options.what == "time" else learn_all)(options, python)
        write_result(options.output, "-m benchmarks.beside_trl", argv, result)
    if options.what == "time":
        print("| | seconds | to TRL | 90 % interval | owed in calls |\n|---|---|---|---|---|")
        for name, row in result["results"].items():
            low, high = row["interval_90"]
            print(f"| {name} | {statistics.median(row['seconds']):.2f} | {row['ratio_to_trl']:.3f} | {low:.3f} to {high:.3f} "
                  f"| {row['owed_in_calls']:.2f} |")  # fmt: skip
    else:
        for name, row in result["results"].items():
            for seed, found in row["seeds"].items():
                print(name, row["learning_rate"], seed, {key: round(mean, 3) for key, (mean, _) in found["held_out"].items()})


if __name__ == "__main__":
    main(sys.argv[1:])
