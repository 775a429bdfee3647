"""Pictures of a run: curves and labelled grids, as PNG."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files; needs no screen

import matplotlib.pyplot as plt
from torch import Tensor


def reward_curve(metrics: list[dict], path: Path) -> None:
    """Reward of the training samples (mean and one standard deviation) and of the evaluation prompts, against epochs."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
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
    plt.close(figure)


def grid(rows: dict[str, Tensor], prompts: list[str], path: Path, across: int = 6) -> None:
    """Pictures of several models below each other, `across` prompts side by side, then the next band of prompts.

    rows: title -> (P, 3, H, W) in [0, 1], in the order of the P prompts.
    """
    bands, across = -(-len(prompts) // across), min(across, len(prompts))
    figure, axes = plt.subplots(
        bands * len(rows),
        across,
        figsize=(1.5 * across + 0.4, bands * (1.5 * len(rows) + 0.6)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for n, prompt in enumerate(prompts):
        band, column = divmod(n, across)
        for below, (title, images) in enumerate(rows.items()):
            axis = axes[band * len(rows) + below][column]
            axis.set_axis_on()
            axis.imshow(images[n].permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if below == 0:
                shortened = textwrap.fill(textwrap.shorten(prompt, 100), 24)
                axis.set_title(shortened.replace("$", r"\$"), fontsize=7)
            if column == 0:
                axis.set_ylabel(title, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
