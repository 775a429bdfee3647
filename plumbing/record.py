"""What a run folder says of its run, to whoever opens it."""

import json
from pathlib import Path


def check_links(run: Path) -> None:
    """ValueError if something in a run folder leads out of it: what is written there would land elsewhere."""
    for path in run.rglob("*"):
        of_wandb = run / "wandb" in path.parents  # which keeps its logs elsewhere
        if path.is_symlink() and not of_wandb and not path.resolve().is_relative_to(run.resolve()):
            raise ValueError(f"{path} is a link out of the run folder, to {path.readlink()}: remove it")


def read_run(run: Path) -> dict:
    """The settings of a run; ValueError if the folder is not one's, or leads elsewhere."""
    check_links(run)
    try:
        settings = json.loads((run / "config.json").read_text())
        return settings | {name: settings[name] for name in ("model", "reward", "prompts", "eval_prompts")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run} is no run folder: {error}") from error


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
