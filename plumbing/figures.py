"""What each figure or table of reproduce.py compares, and how it is drawn from the numbers in its JSON file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plumbing import plots


@dataclass(frozen=True)
class Target:
    """A figure or table: the variants it compares, panel by panel, and how it is drawn from the numbers in its JSON file."""

    title: str
    panels: dict[str, list[str]]
    draw: Callable[[dict[str, list[str]], dict, Path], None]
    checkpoints: bool = False  # evaluate those that were kept on the way as well
    pictures: str = ""  # of this evaluation draw the first prompts' pictures, too
    script: str = ""  # of benchmarks, which writes the JSON file itself

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(name for names in self.panels.values() for name in names))


def smoothed(curve: list[float], width: int = 5) -> list[float]:
    """Mean over the last `width` epochs at each."""
    return [sum(part) / len(part) for part in (curve[max(0, i + 1 - width) : i + 1] for i in range(len(curve)))]


def draw_curves(panels: dict[str, list[str]], result: dict, path: Path) -> None:
    """Training reward against epochs."""
    runs = {name: [smoothed(run["reward_mean"]) for run in seeds.values()] for name, seeds in result["runs"].items()}
    lines = {title: {name: runs[name] for name in names} for title, names in panels.items()}
    plots.curves(lines, "reward, mean over 5 epochs", path)


OF_KL = "KL from the reference, nats", "reward, both means over 5 epochs"


def over_kl(result: dict) -> dict[str, list]:
    """Name -> [KL of theta_old from the reference in nats, training reward] of every seed, a point an epoch; smoothed alike."""
    return {
        name: [[smoothed(run[key]) for key in ("kl_nats", "reward_mean")] for run in seeds.values()]
        for name, seeds in result["runs"].items()
    }


def draw_over_kl(panels: dict[str, list[str]], result: dict, path: Path) -> None:
    """Training reward at equal KL, a seed a line."""
    points = over_kl(result)
    plots.trails([(title, *OF_KL, {name: points[name] for name in names}) for title, names in panels.items()], path, symlog=True)


def means(result: dict, model: str, prompts: str, reward: str = "toy-alignment") -> list[float]:
    """A model's scores, one for every seed."""
    return [sets[prompts][reward]["mean"] for sets in result["scores"][model].values()]


def draw_scores(panels: dict[str, list[str]], result: dict, path: Path) -> None:
    """The trained reward of every variant and seed, a panel for each prompt set."""
    sets = next(iter(result["scores"]["base"].values()))
    plots.dots({name: {model: means(result, model, name) for model in result["scores"]} for name in sets}, "alignment", path)


def draw_over_checkpoints(panels: dict[str, list[str]], result: dict, path: Path) -> None:
    """The reward of the evaluation's pictures against the epoch of a checkpoint; the first is the base, the last the result."""
    lines, epochs = {}, [0]
    for name, runs in result["runs"].items():
        on_the_way = [model for model in result["scores"] if model.startswith(f"{name}@")]
        last = len(next(iter(runs.values()))["reward_mean"])
        epochs = [0, *(int(model.rpartition("@")[2]) for model in on_the_way), last]
        lines[name] = list(zip(*(means(result, model, "toy-small") for model in ["base", *on_the_way, name]), strict=True))
    plots.curves({title: lines for title in panels}, "alignment", path, epochs)


def draw_tradeoff(panels: dict[str, list[str]], result: dict, path: Path) -> None:
    """The reward that was trained against the one that was not."""
    rewards = ("toy-colourfulness", "toy-alignment")
    points = {model: [means(result, model, "toy-small", reward) for reward in rewards] for model in result["scores"]}
    plots.tradeoff(points, "colourfulness (trained)", "alignment (never trained)", path)


def draw_signal(panels: dict[str, list[str]], result: dict, path: Path) -> None:
    """The mean cosine of two gradients of every method, and how far it is above PRDP's; a standard error to either side."""
    columns = {"mean cosine": ("cosine", "standard_error"), "above PRDP's": ("above_prdp", "above_prdp_standard_error")}
    rows = result["results"]
    around = {
        title: {name: [row[value] + sign * row[error] for sign in (-1, 0, 1)] for name, row in rows.items()}
        for title, (value, error) in columns.items()
    }
    plots.dots(around, "± standard error", path)


def draw_prediction(panels: dict[str, list[str]], result: dict, path: Path) -> None:
    """Correlation and slope of every variant against epochs, and a dot for every pair of the first seed's last pictures."""
    columns = {}
    for name in panels[""]:
        runs, curves = list(result["runs"][name].values()), {}
        for what in ("correlation", "slope"):
            training = [smoothed(run["training"][what]) for run in runs]
            curves[what] = {"training pictures": (list(range(1, len(training[0]) + 1)), training)}
            curves[what] |= {
                where: (runs[0]["epochs"], [run["curves"][where][what] for run in runs]) for where in runs[0]["curves"]
            }
        columns[name] = {"curves": curves, "pairs": runs[0]["last"]["held out"]}
    plots.prediction(columns, path)


def draw_few_steps(panels: dict[str, list[str]], result: dict, path: Path) -> None:
    """Held-out reward against queries and seconds; of the second step the surrogate's accuracy, its scores, and the reward."""
    names, runs = panels[""], result["runs"]
    learned = [name for name in names if "surrogate_accuracy" in next(iter(runs[name].values()))]
    reward = {
        x: {name: [[[at[key] for at in run["evaluated"]] for key in (x, "eval_reward")] for run in runs[name].values()]
            for name in names}
        for x in ("queries", "seconds")
    }  # fmt: skip
    standing = [name for name in names if all(y[-1] > y[0] - 0.1 for _, y in reward["queries"][name])]
    of_second_step = {
        key: {
            name: [[range(1, len(run[key]) + 1), smoothed([value[-1] for value in run[key]])] for run in runs[name].values()]
            for name in learned
        }
        for key in ("surrogate_accuracy", "surrogate_by_step", "reward_by_step")
    }
    shown = [("At equal reward queries", "reward queries", "held-out reward", reward["queries"])]
    for title, x, label in (
        ("The same, without those that fall by 0.1", "queries", "reward queries"),
        ("At equal seconds", "seconds", "seconds on one core"),
    ):
        shown.append((title, label, "held-out reward", {name: reward[x][name] for name in standing}))
    shown += [
        (title, "epoch", f"{label}, of five epochs", of_second_step[key])
        for title, label, key in (
            ("Fresh pairs that the surrogate orders rightly", "share of pairs", "surrogate_accuracy"),
            ("What the surrogate says of fresh pictures", "mean score", "surrogate_by_step"),
            ("What the reward says of the same pictures", "mean reward", "reward_by_step"),
        )
    ]
    plots.trails(shown, path)


def draw_flow(panels: dict[str, list[str]], result: dict, path: Path) -> None:
    """Training reward at equal pictures, which are as many reward queries, and at equal KL; a seed a line."""
    of_kl = over_kl(result)
    of_epochs = {name: [[range(1, len(y) + 1), y] for _, y in seeds] for name, seeds in of_kl.items()}
    plots.trails([("At equal pictures", "epoch", OF_KL[1], of_epochs), ("At equal KL", *OF_KL, of_kl)], path)


def draw_samplers(panels: dict[str, list[str]], result: dict, path: Path) -> None:
    """The noise that each sampler leaves in latents and what its pictures score, on each list of levels; a seed a dot."""
    columns = {}
    for levels, found in result["results"].items():
        for what in ("noise in latents", "alignment"):
            columns[f"{levels}:\n{what}"] = {name: row[what] for name, row in found["samplers"].items()}
    plots.dots(columns, "", path)


SMALL, LARGE = "small scale", "large scale"
TARGETS = {
    "fig3": Target(
        "Fig. 3, Table 5: clipping",
        {
            "PRDP, small scale": ["PRDP", "PRDP unclipped", "PRDP unclipped, a tenth of the rate"],
            "DDPO, small scale": ["DDPO", "DDPO unclipped"],
            LARGE: ["PRDP large", "DDPO large", "DDPO large unclipped"],
        },
        draw_curves, pictures="small",
    ),
    "table1": Target("Table 1: small scale", {SMALL: ["PRDP", "DDPO", "DPOK", "DPOK without critic", "D3PO"]}, draw_scores),
    "table2": Target("Table 2: large scale", {LARGE: ["PRDP large", "DDPO large", "DDPO large own statistics"]}, draw_scores),
    "fig7": Target("Fig. 7: online and offline", {SMALL: ["PRDP", "PRDP offline"]}, draw_over_checkpoints, checkpoints=True),
    "fig8": Target(
        "Fig. 8, 10: a reward that ignores the prompt",
        {SMALL: ["PRDP beta 0.1", "PRDP beta 10", "DDPO colour"]},
        draw_tradeoff, pictures="small",
    ),
    "fig9": Target(
        "Fig. 9: training curves",
        {
            SMALL: ["PRDP", "DDPO", "DDPO batch statistics"],
            LARGE: ["PRDP large", "DDPO large", "DDPO large own statistics"],
        },
        draw_curves,
    ),
    "d3po": Target("D3PO: order and values", {SMALL: ["PRDP", "DDPO", "D3PO"]}, draw_curves),
    "shared": Target("Independent and shared x_T", {LARGE: ["PRDP large", "PRDP large shared x_T"]}, draw_curves),
    "reference": Target(
        "The reference on one step of four", {LARGE: ["PRDP large", "PRDP large reference on one step"]}, draw_curves
    ),
    "kl": Target(
        "Reward at equal KL from the reference",
        {SMALL: ["PRDP", "DDPO", "DPOK", "D3PO"], LARGE: ["PRDP large", "DDPO large"]},
        draw_over_kl,
    ),
    "lasro": Target(
        "LaSRO and the others on a model of two steps",
        {"": ["LaSRO", "LaSRO frozen", "LaSRO without anchor", "anchor alone", "PRDP of two steps", "DDPO of two steps"]},
        draw_few_steps, pictures="two steps",
    ),
    "flow": Target(
        "PRDP, DDPO and Flow-GRPO on a rectified flow",
        {"": ["PRDP on a flow", "DDPO on a flow", "GRPO on a flow"]}, draw_flow, pictures="flow",
    ),
    "samplers": Target("Ways to draw noise on a rectified flow", {}, draw_samplers, script="flow_samplers"),
    "variance": Target("Gradient variance", {}, draw_signal, script="gradient_variance"),
    "prediction": Target(
        "Predicted and actual reward differences",
        {
            "": [
                "T = 5", "independent x_T", "K = 4, clipped", "every weight", "beta 1e-3, every weight",
                "reference on one step", "beta 1e-3, reference on one step",
            ]
        },
        draw_prediction, script="prediction",
    ),
}  # fmt: skip
