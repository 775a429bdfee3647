"""report.html: one page with the tables, the curves and the paired pictures of an evaluation, that needs no other file.

Its layout is report.html.jinja; every text that goes into it is escaped.
"""

import base64
import dataclasses
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from PIL import Image

from plumbing import plots
from plumbing.provenance import provenance
from plumbing.record import read_metrics
from plumbing.scores import Model, Results, gain_text, markdown_table, mean_text, summarise

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def embedded(path: Path, side: int = 0) -> str:
    """A picture file as a data URI; if it is larger than `side`, made smaller."""
    kind, data = "png" if path.suffix == ".png" else "jpeg", path.read_bytes()
    picture = Image.open(path)
    if side and max(picture.size) > side:
        picture.thumbnail((side, side))
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        data = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def chosen(gains: list[float], number: int) -> dict[int, str]:
    """{n: kind} of the prompts to show: those that gained most and least, and some of the others by chance, in that order."""
    order = sorted(range(len(gains)), key=lambda n: -gains[n])
    best, worst = order[:number], order[number:][-number:][::-1]
    others = [n for n in order if n not in {*best, *worst}]
    lot = random.Random(0).sample(others, min(number, len(others)))
    return {n: "best" for n in best} | {n: "worst" for n in worst} | {n: "random" for n in lot}


def write(
    config,
    results: Results,
    models: list[Model],
    sets: dict[str, list[str]],
    columns: dict[str, dict[str, float]],
    argv: list[str],
) -> list[dict]:
    """table.md, results.json, the figures and the page, from what is on disk -> the rows; columns: see scores.summarise."""
    output, rows = results.output, summarise(results, models, sets, columns)
    source = provenance("evaluate.py", argv)
    (output / "results.json").write_text(json.dumps(source | {"config": dataclasses.asdict(config), "results": rows}, indent=1))
    (output / "table.md").write_text(markdown_table(rows))

    shown, kept = [model for model in models if not model.checkpoint], [model for model in models if model.checkpoint]
    base, last, reward = models[0].name, shown[-1].name, config.rewards[0]
    per_prompt = {(row["model"], row["prompts"]): row["per_prompt"] for row in rows if row["reward"] == reward}
    figures, cards = {}, []
    if config.runs:
        figures["Reward of the training samples"] = output / "training.png"
        plots.training_curves({Path(run).name: read_metrics(Path(run)) for run in config.runs}, output / "training.png")
    if kept:
        figures["Reward against epoch, the same prompts and noise"] = output / "epochs.png"
        lines = [  # every run's begins at the base
            row | {"epoch": row["epoch"] or 0, "line": row["prompts"] if len(config.runs) == 1 else f"{run}, {row['prompts']}"}
            for run in dict.fromkeys(model.name.rpartition("@")[0] for model in kept)
            for row in rows
            if row["model"] in (base, run) or row["model"].rpartition("@")[0] == run
        ]
        plots.reward_over_epochs(lines, output / "epochs.png")
    for set_name, prompts in sets.items():

        def pictures(model: str, numbers, set_name=set_name) -> list[Path]:
            return [results.picture(model, set_name, n) for n in numbers]

        file, first = quote(set_name, safe=""), range(min(len(prompts), 45))
        grid = {model.name: pictures(model.name, first) for model in shown}
        plots.grid(grid, prompts[:45], output / f"pictures-{file}.png", across=8)
        if kept:
            figures[f"The same noise through training, {set_name}"] = output / f"strips-{file}.png"
            strips = {model.name: pictures(model.name, first[:5]) for model in models}
            plots.strips(strips, prompts[:5], output / f"strips-{file}.png")
        gains = [after - before for after, before in zip(per_prompt[last, set_name], per_prompt[base, set_name], strict=True)]
        lines = {model.name: results.read(model.name, set_name, prompts) for model in shown}
        for n, kind in chosen(gains, config.pictures).items():
            pairs = [
                {"model": model, "source": embedded(results.picture(model, set_name, n), 384),
                 "scores": [f"{name} {values[0]:.3f}" for name, values in lines[model][n]["scores"].items()]}
                for model in lines
            ]  # fmt: skip
            cards.append({"set": set_name, "kind": kind, "prompt": prompts[n], "pictures": pairs})
    of = {name: [row for row in rows if row["reward"] == name] for name in dict.fromkeys(row["reward"] for row in rows)}
    tables = [
        report_table(of[name], name, lambda row: (mean_text(row), gain_text(row) if row["model"] != base else "")) for name in of
    ]
    tables.append(report_table(of[reward], "diversity within a prompt", lambda row: (f"{row['diversity']:.4f}", "")))
    compared = [row for row in of[reward] if row["prediction_slope"] is not None]
    if compared:
        title = "predicted against actual reward difference (Eq. 13): correlation, slope"
        tables.append(
            report_table(compared, title, lambda r: (f"{r['prediction_correlation']:.3f}, {r['prediction_slope']:.3g}", ""))
        )
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(TEMPLATE.read_text()).render(
        title=f"{', '.join(model.name for model in shown[1:]) or base} against {base}",
        models=[model.name for model in shown],
        tables=tables,
        figures=[{"title": title, "source": embedded(path)} for title, path in figures.items()],
        sets=list(sets), cards=cards, ranking=f"in {reward} under {last}",
        first_kind="random" if any(card["kind"] == "random" for card in cards) else "", provenance=json.dumps(source, indent=1),
        pixelated=results.picture(base, next(iter(sets)), 0).suffix == ".png",
    )  # fmt: skip
    unfinished = output / "report.html.unfinished"
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(output / "report.html")
    return rows


def report_table(rows: list[dict], title: str, text: Callable[[dict], tuple[str, str]]) -> dict:
    """A table as the page shows it: models down, sets across, and in each cell the two texts made from its row."""
    models, sets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "prompts"))
    cells = {(row["model"], row["prompts"]): dict(zip(("text", "below"), text(row), strict=True)) for row in rows}
    return {"title": title, "sets": sets, "rows": [{"model": m, "cells": [cells[m, s] for s in sets]} for m in models]}
