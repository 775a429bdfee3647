"""The finished part of an evaluation on disk, and the numbers made from it."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from torchvision.transforms.functional import to_pil_image

from plumbing.processes import LISTING, RANK


@dataclass(frozen=True)
class Model:
    name: str
    folder: str  # or hub id
    run: dict | None = None  # the settings it was trained with, if known
    epoch: int | None = None  # how long it was trained, if known
    checkpoint: bool = False  # on the way to a run's result


class Results:
    """What an evaluation has finished, on disk: a line per prompt and model, and the first picture of each.

    OUTPUT/scores/MODEL/SET.RANK.jsonl holds {"n", "prompt", "scores": {reward: [one per picture]}, "diversity"}. A line is
    written when its prompt is done; a torn one, left by a crash, is not read.
    """

    def __init__(self, output: Path):
        self.output = output

    def path(self, kind: str, model: str, set_name: str) -> Path:
        return self.output / kind / quote(model, safe="") / quote(set_name, safe="")

    def read(self, model: str, set_name: str, prompts: list[str]) -> dict[int, dict]:
        """{n: line} of those of the prompts that are done."""
        lines = {}
        path = self.path("scores", model, set_name)
        for file in sorted(path.parent.glob(f"{path.name}.*.jsonl")):
            for text in file.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text or "null")
                except json.JSONDecodeError:
                    continue
                if line and prompts[line["n"] : line["n"] + 1] == [line["prompt"]]:
                    lines[line["n"]] = line
        return lines

    def wait_for(self, model: str, set_name: str, prompts: list[str]) -> None:
        """Until all is there to be read that other machines have written; ValueError if it does not come."""
        for _ in range(LISTING):
            missing = len(prompts) - len(self.read(model, set_name, prompts))
            if not missing:
                return
            time.sleep(1)
        raise ValueError(f"{self.output} lacks scores of {missing} prompts of {set_name} by {model}: run the command again")

    def prediction(self, model: str, set_name: str) -> Path:
        return Path(f"{self.path('scores', model, set_name)}.predicted.json")

    def predicted(self, model: str, set_name: str, prompts: list[str]) -> dict:
        """What a run has predicted of the first of these prompts; {} if that is not there."""
        file = self.prediction(model, set_name)
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        of = found.get("prompts", [])
        return found if of and of == prompts[: len(of)] else {}

    def append(self, model: str, set_name: str, lines: list[dict]) -> None:
        path = self.path("scores", model, set_name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.{RANK}.jsonl", "a", encoding="utf-8") as file:
            for line in lines:
                file.write("\n" + json.dumps(line))  # first the end of the line before, which may be torn

    def picture(self, model: str, set_name: str, n: int) -> Path:
        return next(self.path("pictures", model, set_name).glob(f"{n}.*"))

    def save_picture(self, model: str, set_name: str, n: int, image: torch.Tensor) -> None:
        folder = self.path("pictures", model, set_name)
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(folder / (f"{n}.png" if image.shape[-1] <= 128 else f"{n}.jpg"), quality=92)


def claim(results: Results, settings: dict, models: list[Model]) -> None:
    """Notes the settings in the output folder; ValueError if what it already holds was made with others or of other models."""
    file = results.output / "settings.json"
    known = {model.name: [model.folder, last_change(model.folder)] for model in models}
    if file.exists():
        before = json.loads(file.read_text())
        changed = [name for name, value in settings.items() if before["settings"].get(name) != value]
        if changed:
            raise ValueError(
                f"{results.output} was made with {changed[0]}={before['settings'].get(changed[0])}, not {settings[changed[0]]}: "
                "choose another --output_dir, or remove it"
            )
        other = [name for name in known if name in before["models"] and before["models"][name] != known[name]]
        if other:
            raise ValueError(f"{results.output} is of another {other[0]!r} (or it changed since): choose another --output_dir")
        known = before["models"] | known
    results.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"settings": settings, "models": known}, indent=1))


def last_change(folder: str) -> float | None:
    """When the newest weights of a local model were written."""
    return max((file.stat().st_mtime for file in Path(folder).rglob("*.safetensors")), default=None)


def mean_and_error(values: torch.Tensor) -> tuple[float, float | None]:
    """Mean and standard error over prompts (P,) -> two floats; a single prompt has no error."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None


def summarise(
    results: Results, models: list[Model], sets: dict[str, list[str]], rewards: dict[str, dict[str, float]]
) -> list[dict]:
    """One entry per set, reward and model: mean and standard error over prompts, and the same of what differs from the base.

    rewards: title -> {name: weight}, of a single reward {name: 1}.
    """
    rows = []
    for set_name in sets:
        base: dict[str, torch.Tensor] = {}
        for model in models:
            done = results.read(model.name, set_name, sets[set_name])
            lines = [done[n] for n in range(len(sets[set_name]))]
            predicted = results.predicted(model.name, set_name, sets[set_name])
            for reward, parts in rewards.items():
                weighted = [
                    w * torch.tensor([line["scores"][p] for line in lines], dtype=torch.float64) for p, w in parts.items()
                ]
                per_prompt = torch.stack(weighted).sum(0).mean(1)
                mean, error = mean_and_error(per_prompt)
                gains = per_prompt - base.setdefault(reward, per_prompt)
                gain, gain_error = mean_and_error(gains)
                rows.append({
                    "model": model.name, "epoch": model.epoch, "prompts": set_name, "reward": reward,
                    "mean": mean, "standard_error": error, "gain": gain, "gain_standard_error": gain_error,
                    "win_rate": ((gains > 0).double() + (gains == 0).double() / 2).mean().item(),
                    "diversity": math.fsum(line["diversity"] for line in lines) / len(lines),
                    "prediction_correlation": predicted.get("correlation"), "prediction_slope": predicted.get("slope"),
                    "per_prompt": per_prompt.tolist(),
                })  # fmt: skip
    return rows


def number(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def mean_text(row: dict) -> str:
    return number(row["mean"], row["standard_error"])


def gain_text(row: dict) -> str:
    """The difference to the base, and the share of prompts whose mean is higher."""
    return f"{number(row['gain'], row['gain_standard_error'], '+')}, wins {100 * row['win_rate']:.0f} %"


def summary_lines(rows: list[dict], models: list[Model]) -> list[str]:
    """A line to read in a terminal for every set and reward and every model but the base and checkpoints."""
    base, shown = models[0].name, {model.name for model in models[1:] if not model.checkpoint}
    before = {(row["prompts"], row["reward"]): row["mean"] for row in rows if row["model"] == base}
    return [
        f"{row['prompts']}, {row['reward']}: {base} {before[row['prompts'], row['reward']]:.3f}, "
        f"{row['model']} {row['mean']:.3f}, gain {row['gain']:+.3f}, {100 * row['win_rate']:.0f} % of prompts won"
        for row in rows
        if row["model"] in shown
    ]


def markdown_table(rows: list[dict]) -> str:
    """The layout of Tables 1-3: rewards and models down, prompt sets across; mean ± standard error, gain and prompts won."""
    models, sets, rewards = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "prompts", "reward"))
    cells = {(row["reward"], row["model"], row["prompts"]): row for row in rows}

    def cell(row: dict) -> str:
        return mean_text(row) + (f" ({gain_text(row)})" if row["model"] != models[0] else "")

    lines = [f"| reward | model | {' | '.join(sets)} |", "|---" * (2 + len(sets)) + "|"]
    for reward in rewards:
        for model in models:
            lines.append(f"| {reward} | {model} | {' | '.join(cell(cells[reward, model, s]) for s in sets)} |")
    for model in models:
        spread = " | ".join(f"{cells[rewards[0], model, s]['diversity']:.4f}" for s in sets)
        lines.append(f"| diversity within a prompt | {model} | {spread} |")
    return "\n".join(lines) + "\n"
