"""Pictures of a run: curves and labelled grids, as PNG."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files; needs no screen

import matplotlib.pyplot as plt
from torch import Tensor


def reward_curve(metrics: list[dict], path: Path) -> None:
    """Reward of the training samples (mean and one standard deviation) and of the held-out prompts, against epochs."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    epochs = [line["epoch"] for line in metrics]
    mean = [line["reward_mean"] for line in metrics]
    spread = [line["reward_std"] for line in metrics]
    low, high = [[m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1)]
    axes.fill_between(epochs, low, high, alpha=0.15, linewidth=0)
    axes.plot(epochs, mean, label="training prompts (mean, standard deviation)")
    held_out = [(line["epoch"], line["heldout_reward"]) for line in metrics if line["heldout_reward"] is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", markersize=3, label="held-out prompts, fixed seeds")
    axes.set(xlabel="epoch", ylabel="reward")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def grid(columns: dict[str, Tensor], prompts: list[str], path: Path, notes: dict[str, list[str]] | None = None) -> None:
    """One row per prompt and one column per title, each a (rows, 3, H, W) tensor in [0, 1]; notes are written under pictures."""
    rows = len(prompts)
    figure, axes = plt.subplots(
        rows, len(columns), figsize=(1.5 * len(columns) + 3.2, 1.65 * rows), squeeze=False, layout="constrained"
    )
    for column, (title, images) in enumerate(columns.items()):
        for row in range(rows):
            axis = axes[row][column]
            axis.imshow(images[row].permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(title, fontsize=9)
            if notes:
                axis.set_xlabel(notes[title][row], fontsize=7)
            if column == 0:
                label = prompts[row].replace("$", r"\$")
                axis.set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center", wrap=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
