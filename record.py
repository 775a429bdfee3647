"""The record of a run: its folder, metrics.jsonl, and TensorBoard or Weights & Biases where asked for."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

import processes
from config import Config
from processes import RANK


def prepare_folder(config: Config) -> Path:
    """The run folder; ValueError if another run is there, OSError if it cannot be written."""
    run = Path(config.output_dir)

    def prepare() -> None:
        if not config.resume and (run / "metrics.jsonl").exists():
            raise ValueError(f"{run} already holds a run: continue it with --resume {run}, or choose another --output_dir")
        (run / "samples").mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))

    processes.in_first(prepare)
    return run


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_metrics(run: Path, metrics: list[dict]) -> None:
    """metrics.jsonl, written whole so that a crash leaves the old or the new one."""
    if RANK == 0:
        unfinished = run / "metrics.jsonl.unfinished"
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in metrics))
        unfinished.replace(run / "metrics.jsonl")


def start_log(config: Config, run: Path, completed: int) -> Callable[[dict], None]:
    """A function that sends one line of metrics.jsonl to --log_to as well; ValueError if its package is not installed."""
    if RANK > 0 or config.log_to == "none":
        return lambda line: None
    try:
        if config.log_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
        else:
            import wandb
    except ImportError as error:
        raise ValueError(f"--log_to {config.log_to} needs a package: pip install {config.log_to} ({error})") from error
    if config.log_to == "tensorboard":
        writer = SummaryWriter(str(run / "tensorboard"), purge_step=completed + 1)
    else:
        identity = run / "wandb_id"  # a resumed run goes on in the same curves
        known = identity.read_text() if completed and identity.exists() else None
        wandb.init(project="prdp", dir=run, id=known, name=run.name, config=dataclasses.asdict(config), resume="allow")
        identity.write_text(wandb.run.id)

    def log(line: dict) -> None:
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        numbers |= {f"seconds/{phase}": value for phase, value in line.get("seconds", {}).items()}
        if config.log_to == "tensorboard":
            for name, value in numbers.items():
                writer.add_scalar(name, value, line["epoch"])
            writer.flush()
        else:
            wandb.log(numbers, step=line["epoch"])

    return log


class Stopwatch:
    """lap("phase") adds the seconds since the last lap to that phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, phase: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now
