"""Pictures of a run: curves and labelled grids, as PNG."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor


def reward_curve(metrics: list[dict], path: Path) -> None:
    """Reward of the training samples (mean and one standard deviation) and of the evaluation prompts, against epochs."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    epochs, mean, spread = zip(*((m["epoch"], m["reward_mean"], m["reward_std"]) for m in metrics if m["epoch"]), strict=True)
    low, high = [[m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1)]
    axes.fill_between(epochs, low, high, alpha=0.15, linewidth=0)
    axes.plot(epochs, mean, label="training prompts (mean, standard deviation)")
    evaluated = [(line["epoch"], line["eval_reward"]) for line in metrics if line["eval_reward"] is not None]
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", markersize=3, label="evaluation prompts, fixed seeds")
    axes.set(xlabel="epoch", ylabel="reward")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def training_curves(runs: dict[str, list[dict]], path: Path) -> None:
    """Reward of the training samples of several runs against epochs (Fig. 9). runs: title -> metrics."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for title, metrics in runs.items():
        axes.plot(*zip(*((m["epoch"], m["reward_mean"]) for m in metrics if m["epoch"]), strict=True), label=title)
    axes.set(xlabel="epoch", ylabel="mean reward of the training samples")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def reward_over_epochs(rows: list[dict], path: Path) -> None:
    """Mean and standard error against the epoch of a checkpoint (Fig. 7): a panel for every reward.

    rows: of scores.summarise, with an epoch and the name of the line they are on.
    """
    rewards, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("reward", "line"))
    figure = Figure(figsize=(4.6 * len(rewards), 3.4), layout="constrained")
    panels = figure.subplots(1, len(rewards), squeeze=False)
    for reward, axes in zip(rewards, panels[0], strict=True):
        for name in names:
            line = sorted((r for r in rows if r["reward"] == reward and r["line"] == name), key=lambda r: r["epoch"])
            epoch, mean, error = zip(*((r["epoch"], r["mean"], r["standard_error"]) for r in line), strict=True)
            axes.errorbar(epoch, mean, [e or 0 for e in error], marker="o", markersize=3, capsize=2, label=name)
        axes.set(xlabel="epoch", ylabel=reward)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def pixels(image: Tensor | Path):
    """(H, W, 3) for matplotlib from (3, H, W) in [0, 1] or a file."""
    return np.asarray(Image.open(image)) if isinstance(image, Path) else image.permute(1, 2, 0).clamp(0, 1).cpu().numpy()


def wrapped(prompt: str, width: int) -> str:
    """A prompt or a title in short lines, with nothing that matplotlib takes for mathematics."""
    return textwrap.fill(textwrap.shorten(prompt, 100), width).replace("$", r"\$")


def sheet(width: float, height: float, left: float, picture_inches: float):
    """A figure and its one axes for pictures of size 1, from the left margin -left to width and from 0 down to height.

    One axes for all pictures: matplotlib takes seconds to lay out hundreds of them.
    """
    figure = Figure(figsize=((width + left) * picture_inches, height * picture_inches))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-left, width), ylim=(height, 0), autoscale_on=False)
    axes.set_axis_off()
    return figure, axes


def place(axes, image: Tensor | Path, x: float, y: float) -> None:
    """A picture with its upper left corner near (x, y), and a thin line around it: some are white."""
    axes.imshow(pixels(image), interpolation="nearest", extent=(x + 0.03, x + 0.97, y + 0.97, y + 0.03), aspect="auto")
    axes.add_patch(Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, fill=False, linewidth=0.5, edgecolor="0.6"))


def strips(columns: dict[str, list], prompts: list[str], path: Path) -> None:
    """The same prompts and noise through training (Fig. 6): a row for every prompt, a column for every title."""
    figure, axes = sheet(len(columns), len(prompts) + 0.25, 1.2, 1.3)
    for column, (title, images) in enumerate(columns.items()):
        axes.text(column + 0.5, 0.2, title, fontsize=8, ha="center", va="bottom")
        for row, image in enumerate(images):
            place(axes, image, column, row + 0.25)
    for row, prompt in enumerate(prompts):
        axes.text(-0.05, row + 0.75, wrapped(prompt, 18), fontsize=6, ha="right", va="center")
    figure.savefig(path, dpi=110)


def grid(rows: dict[str, Tensor | list], prompts: list[str], path: Path, across: int = 6) -> None:
    """Pictures of several models below each other, `across` prompts side by side, then the next band of prompts.

    rows: title -> (P, 3, H, W) in [0, 1] or P files, in the order of the P prompts.
    """
    bands, across, title_height = -(-len(prompts) // across), min(across, len(prompts)), 0.5
    figure, axes = sheet(across, bands * (len(rows) + title_height), 0.3, 1.5)
    for n, prompt in enumerate(prompts):
        band, column = divmod(n, across)
        top = band * (len(rows) + title_height) + title_height
        axes.text(column + 0.5, top, wrapped(prompt, 24), fontsize=7, ha="center", va="bottom")
        for below, (title, images) in enumerate(rows.items()):
            place(axes, images[n], column, top + below)
            if column == 0:
                axes.text(-0.05, top + below + 0.5, wrapped(title, 20), fontsize=8, rotation=90, ha="right", va="center")
    figure.savefig(path, dpi=110)


def curves(panels: dict[str, dict[str, list[list[float]]]], ylabel: str, path: Path, epochs: list[int] | None = None) -> None:
    """Mean and range over seeds against epochs, 1, 2, ... if not given. panels: title -> line -> a curve for every seed."""
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axes, (title, lines) in zip(every[0], panels.items(), strict=True):
        for name, seeds in lines.items():
            table = np.array(seeds)
            x = epochs or range(1, table.shape[1] + 1)
            axes.fill_between(x, table.min(0), table.max(0), alpha=0.2, linewidth=0)
            axes.plot(x, table.mean(0), label=name)
        axes.set(title=title, xlabel="epoch")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    every[0][0].set_ylabel(ylabel)
    figure.savefig(path, dpi=110)


def trails(panels: list[tuple[str, str, str, dict[str, list]]], path: Path, symlog: bool = False) -> None:
    """One quantity against another, a line for every seed; what has a colour in the first panel has it in all.

    panels: title, labels of x and y, and name -> [x by epoch, y by epoch] of every seed; symlog: the scale of x.
    """
    columns = min(3, len(panels))
    rows, order = len(panels) // columns, list(panels[0][-1])
    alike = len({ylabel for _, _, ylabel, _ in panels}) == 1
    shared = all(name in order for *_, lines in panels for name in lines)  # one legend for all panels, below them
    size = (4.8 * columns, 3.6 * rows)
    figure = Figure(figsize=size, layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False, sharey=alike)
    for axes, (title, xlabel, ylabel, lines) in zip(every.flat, panels, strict=True):
        for n, (name, seeds) in enumerate(lines.items()):
            colour = f"C{order.index(name) if name in order else n}"
            for seed, (x, y) in enumerate(seeds):
                axes.plot(x, y, color=colour, linewidth=1, alpha=0.8, label=None if seed else name)
                axes.plot(x[-1:], y[-1:], "o", color=colour, markersize=4)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel if axes is every[0][0] or not alike else "")
        if symlog:
            axes.set_xscale("symlog", linthresh=1)
        if not shared:
            axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    if shared:
        figure.legend(*every[0][0].get_legend_handles_labels(), frameon=False, ncols=len(order), loc="outside lower center")
    figure.savefig(path, dpi=110)


def dots(panels: dict[str, dict[str, list[float]]], xlabel: str, path: Path) -> None:
    """A dot for every seed and a line at their mean. panels: title -> row -> a number for every seed."""
    rows = len(next(iter(panels.values())))
    size = (2.2 + 2.6 * len(panels), 0.8 + 0.36 * rows)
    figure = Figure(figsize=size, layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axes, (title, values) in zip(every[0], panels.items(), strict=True):
        for row, numbers in enumerate(values.values()):
            axes.plot(numbers, [row] * len(numbers), "o", markersize=5, alpha=0.7, color=f"C{row}")
            axes.plot([np.mean(numbers)] * 2, [row - 0.3, row + 0.3], color=f"C{row}")
        axes.set(title=title, xlabel=xlabel, yticks=range(rows), yticklabels=list(values))
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    every[0][0].invert_yaxis()
    figure.savefig(path, dpi=110)


def tradeoff(points: dict[str, list[list[float]]], xlabel: str, ylabel: str, path: Path) -> None:
    """Two rewards of several models, a dot for every seed. points: name -> [x of every seed, y of every seed]."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in points.items():
        axes.plot(x, y, "o", alpha=0.8, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def prediction(columns: dict[str, dict], path: Path) -> None:
    """A column for every variant: correlation and slope against epochs (mean and range over seeds), and below all pairs.

    columns: title -> {"curves": {what: {line: (epochs, a curve for every seed)}}, "pairs": {"predicted", "actual"}}, the last two
    (N prompts, B pictures) relative to their prompt.
    """
    size = (2.3 * len(columns) + 0.6, 7)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(3, len(columns), squeeze=False, sharey="row")
    for column, (title, found) in enumerate(columns.items()):
        for row, (what, lines) in enumerate(found["curves"].items()):
            for name, (epochs, seeds) in lines.items():
                table = np.array(seeds)
                axes[row][column].fill_between(epochs, table.min(0), table.max(0), alpha=0.2, linewidth=0)
                axes[row][column].plot(epochs, table.mean(0), marker=".", linewidth=1, label=name)
            axes[row][column].set(xlabel="epoch", title=wrapped(title, 22) if row == 0 else "")
            axes[row][column].axhline(0, color="0.8", linewidth=0.8, zorder=0)
            axes[row][0].set_ylabel(what)
        differences = [
            np.concatenate([(x[:, None] - x[None, :])[np.triu_indices(len(x), 1)] for x in np.array(found["pairs"][what])])
            for what in ("actual", "predicted")
        ]
        axes[2][column].plot(*differences, ".", markersize=2, alpha=0.4, markeredgewidth=0)
        axes[2][column].axline((0, 0), slope=1, color="0.5", linewidth=0.8)
        axes[2][column].set(xlabel="actual difference")
    axes[2][0].set_ylabel("predicted difference")
    axes[0][0].legend(frameon=False, fontsize=8)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
