"""README and docs: names exist, links lead somewhere, numbers are the committed ones, and the twenty lines of Python run."""

import ast
import json
import re
from itertools import pairwise
from statistics import mean, median

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_house import ROOMS

from benchmarks import faults, memory_few, restarts
from benchmarks.memory import RECIPES, passes
from config import PRESETS, Config
from miniature import FLOW, TURBO, WEIGHTS, build, world
from plumbing.figures import TARGETS, smoothed
from plumbing.reward_models import SOURCES

README, MINIATURE, STABLE_DIFFUSION, METRICS, FLOWS = (
    (ROOT / path).read_text(encoding="utf-8")
    for path in ("README.md", "docs/paper-in-miniature.md", "docs/stable-diffusion.md", "docs/metrics.md", "docs/flows.md")
)
FLOW_SETS = ("toy-heldout", "by its ODE")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def functions(path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_names_in_all_pages_exist():
    for page in PAGES:
        for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / file).exists(), f"{page.name}: {file}"
            assert name in functions(ROOT / file), f"{page.name}: {file}::{name}"
    assert len(set(re.findall(r"`[\w/]+\.py::\w+`", README))) > 40


def test_links_lead_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) + re.findall(r'(?:href|src)="([^"]+)"', text)
        for target in targets:
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
        for file in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|json|md|jinja|toml))`", text):
            places = (ROOT, ROOT / "results", page.parent)
            generated = file in (
                "mine.py",
                "memory.py",
                "gradient_variance.py",
                "config.json",
                "results.json",
                "train.json",
                "table.md",
            )
            assert generated or any((place / file).exists() for place in places), f"{page.name}: {file}"
        for module in re.findall(r"python -m ([a-z_.]+)", text):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), f"{page.name}: {module}"


def test_every_metric_is_documented():
    of_run, of_lasro, page = ((ROOT / path).read_text() for path in ("plumbing/run.py", "plumbing/surrogate.py", "lasro.py"))
    documented, more = (set(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)) for part in METRICS.split("## Of lasro.py"))
    written = set(re.findall(r'^ {12}"(\w+)": ', of_run, re.MULTILINE))
    assert len(written) > 10 and written == documented
    written = set(re.findall(r'^ {8}"(\w+)": ', of_lasro, re.MULTILINE)) | set(re.findall(r'{"(\w+)": one_step}', page))
    assert len(written) > 7 and written == more


def test_the_loop_from_python_runs(model_folder, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    space: dict = {}
    exec(code.replace('"toy"', repr(str(model_folder))), space)
    assert len(code.split("\n\n")[-1].splitlines()) <= 20
    first, *later = capsys.readouterr().out.splitlines()
    assert first.endswith("log-ratios up to 0.0e+00") and len(later) == 3
    before = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    after = space["pipe"].unet.state_dict()
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    assert all(float(line.split("up to ")[1]) > 1e-6 for line in later)


def test_departures_are_marked_and_listed():
    marked = [
        (str(path.relative_to(ROOT)), line.partition("NOT IN PAPER:")[2].strip())
        for path in sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))])
        for line in path.read_text().splitlines()
        if "NOT IN PAPER:" in line
    ]
    listed = README.split("## Departures from the paper")[1].split("\n## ")[0]
    assert len(marked) >= 8
    assert {file for file, _ in marked} == set(re.findall(r"^- `([\w/.]+)`", listed, re.MULTILINE))


def tables(*pages: str) -> dict[str, list[str]]:
    """{first cell: the others} of every row of the pages' tables."""
    rows = [line.split("|")[1:-1] for page in pages for line in page.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in rows}


def result(*path: str) -> dict:
    made = json.loads(ROOT.joinpath("results", *path).read_text())
    assert made["versions"]["torch"] and made["machine"]["cpu_cores"] and made["command"]
    return made


ONE, TWO = ("toy-heldout-one", "one object"), ("toy-heldout-two", "two objects")


def test_results_in_the_readme_are_the_committed_ones():
    rows, base, gains = tables(README, MINIATURE), result("miniature.json")["figures"], {}
    for seed in range(3):
        scores = {}
        for kind, how in (("toy", ""), ("guided", " at guidance 3")):
            found = result(f"{kind}-seed{seed}", "results.json")["results"]
            scores[kind] = {(r["model"], r["prompts"], r["reward"]): r for r in found}
            for prompts, title in (ONE, TWO):
                for model, when in (("base", "before"), ("tuned", "after")):
                    row = scores[kind][model, prompts, "toy-alignment"]
                    assert rows[f"{title}{how}, {when}"][seed] == f"{row['mean']:.3f} ± {row['standard_error']:.3f}"
        for prompts, title in (ONE, TWO):
            before, after = (scores["toy"][model, prompts, "toy-alignment"]["mean"] for model in ("base", "tuned"))
            guided = [scores["guided"][model, prompts, "toy-alignment"]["mean"] for model in ("base", "tuned")]
            for what, gain in (("same", after - before), ("best", after - guided[0]), ("guided", guided[1] - guided[0])):
                gains.setdefault((what, title), []).append(gain)
            assert after - before >= 0.2
        won = ", ".join(f"{100 * scores['toy']['tuned', p, 'toy-alignment']['win_rate']:.0f} %" for p, _ in (ONE, TWO))
        assert rows["prompts won by the finetuned model, one and two objects"][seed] == won
        for prompts, title, reward in (
            ("toy-small", "45 training prompts, alignment", "toy-alignment"),
            *((p, f"{kind}, colourfulness (never trained)", "toy-colourfulness") for p, kind in (ONE, TWO)),
        ):
            numbers = " → ".join(f"{scores['toy'][model, prompts, reward]['mean']:.3f}" for model in ("base", "tuned"))
            assert rows[f"{title} before → after"][seed] == numbers
        card = result(f"toy-seed{seed}", "card.json")["figures"]
        for title, said in base.items():
            for name, value in said["attributes"].items():
                assert rows[f"{title}, {name}"][seed] == f"{value:.3f} → {card[title]['attributes'][name]:.3f}"
            name = f"{title}, diversity within a prompt (drawn pictures: {said['diversity of drawn pictures']:.3f})"
            assert rows[name][seed] == f"{said['diversity']:.3f} → {card[title]['diversity']:.3f}"
        lines = [json.loads(line) for line in (ROOT / "results" / f"toy-seed{seed}" / "metrics.jsonl").read_text().splitlines()]
        seconds = sum(sum(line["seconds"].values()) for line in lines[1:])
        assert rows["seconds of finetuning on 2 CPU cores, with evaluation"][seed] == f"{seconds:.0f}" and seconds < 180
    for what, where in (
        ("same", "over the base at the same guidance"),
        ("best", "over the base at guidance 3, its best,"),
        ("guided", "of finetuning that starts from guidance 3"),
    ):
        one, two = (gains[what, title] for _, title in (ONE, TWO))
        text = f"gain {where} is {min(one):+.3f} to {max(one):+.3f} for one object and {min(two):+.3f} to {max(two):+.3f} for two"
        assert text in README.replace("\n", " "), text
    every = result("benchmark.json")["results"]
    rows = [row for row in every if row["flags"] == "" and row["processes"] == 1]
    seconds = " and ".join(f"{row['seconds_per_epoch']:.3g}" for row in rows)
    assert f"an epoch of {seconds} seconds on 2 CPU cores" in README.replace("\n", " ")
    least, most = (row["peak_memory_gib"] for row in rows)
    assert f"{least:.3f} GiB" in README and f"{most:.3f} GiB" in README and most < 1.05 * least
    measured = [f"{row['seconds_per_epoch']:.2f}" for row in every]
    assert [(row["processes"], row["num_steps"], row["flags"]) for row in every] == [
        (1, 5, ""), (1, 50, ""), (2, 5, ""), (2, 50, ""), (1, 5, "--log_prob_batch_size 128 --train_batch_size 128"),
        (1, 5, "--channels_last True"), (1, 5, "--compile True"),
    ]  # fmt: skip
    for text in (
        "takes {} seconds at T = 5 and {} at T = 50 in one process".format(*measured[:2]),
        "{} and {} in two of one thread each, {} at T = 5 with batches of 128".format(*measured[2:5]),
        "{} with `--channels_last` and {} with `--compile`".format(*measured[5:]),
    ):
        assert text in " ".join(STABLE_DIFFUSION.split()), text
    seconds = result("times.json")["seconds"]
    assert f"`make demo` took {seconds['demo']} seconds and `make test` {seconds['test']}" in README.replace("\n", " ")
    assert seconds["demo"] < 180


def test_the_miniatures_card_is_what_was_measured():
    page, rows = (WEIGHTS / "README.md").read_text(encoding="utf-8"), tables((WEIGHTS / "README.md").read_text(encoding="utf-8"))
    sets = list(result("miniature.json")["figures"].values())
    names = {
        "drawn": "alignment, drawn pictures",
        "autoencoder": "alignment, drawn pictures through the autoencoder",
        "chance": "alignment, drawn pictures of other prompts",
        "diversity": "diversity within a prompt, guidance 1, T = 5",
        "diversity of drawn pictures": "diversity within a prompt, drawn pictures",
    }
    for column, said in enumerate(sets):
        for name, title in names.items():
            assert rows[title][column] == f"{said[name]:.3f}"
        for name, value in said["attributes"].items():
            assert rows[f"{name}, guidance 1, T = 5"][column] == f"{value:.3f}"
        for guidance, by_steps in said["alignment"].items():
            assert rows[f"alignment, {guidance}, T = 5, 10, 50"][column] == ", ".join(f"{v:.3f}" for v in by_steps.values())
    best = max(sets[0]["alignment"], key=lambda guidance: sum(said["alignment"][guidance]["T = 5"] for said in sets))
    assert best == "guidance 3" and "GUIDED := --guidance_scale 3" in (ROOT / "Makefile").read_text()
    made = made_of(WEIGHTS)
    for value in (*made["steps"].values(), *(f"{s:.0f}" for s in made["seconds"].values()), made["torch"], made["transformers"]):
        assert str(value) in page
    assert f"{int(build.MISMATCHED * build.BATCH)} of {build.BATCH} captions" in page
    for other, limit in (("miniature-one-thread.json", 0), ("miniature-no-avx.json", 1e-6)):
        for said, found in zip(sets, result(other)["figures"].values(), strict=True):
            assert found["attributes"] == pytest.approx(said["attributes"], abs=limit, rel=0)
            for guidance, by_steps in found["alignment"].items():
                assert by_steps["T = 5"] == pytest.approx(said["alignment"][guidance]["T = 5"], abs=limit, rel=0)


def over_seeds(values: list[float]) -> str:
    """Mean, lowest and highest."""
    return f"{sum(values) / len(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def assert_begins_as(rows: dict, column: int, found: dict, at: str) -> None:
    """A card's rows of what finetuning begins with."""
    for attribute, value in found["attributes"].items():
        assert rows[f"{attribute}, {at}"][column] == f"{value:.3f}"
    assert rows[f"diversity within a prompt, {at}"][column] == f"{found['diversity']:.3f}"


def searched(row: dict, rates: tuple[str, ...]) -> str:
    """The cells of a search for a learning rate, the chosen one's in bold."""
    best = f"{row['reward'][row['chosen']]:.3f}"
    return " | ".join(f"{row['reward'][rate]:.3f}" if rate in row["reward"] else "" for rate in rates).replace(
        best, f"**{best}**"
    )


def test_the_card_of_two_steps_is_what_was_measured():
    page, rows = (TURBO / "README.md").read_text(encoding="utf-8"), tables((TURBO / "README.md").read_text(encoding="utf-8"))
    teacher, found, made = (*(result(f"{name}.json")["figures"] for name in ("miniature", "turbo")), made_of(TURBO))
    for column, name in enumerate(("one object", "two objects")):
        by_steps = found[name]["alignment"]["guidance 1"]
        assert rows["alignment, T = 2, 1"][column] == f"{by_steps['T = 2']:.3f}, {by_steps['T = 1']:.3f}"
        for w, T in ((2, 10), (1, 5)):
            assert rows[f"alignment, the teacher, guidance {w}, T = {T}"][column] == (
                f"{teacher[name]['alignment'][f'guidance {w}'][f'T = {T}']:.3f}"
            )
        assert_begins_as(rows, column, found[name], "T = 2")
    assert f"{made['steps']} updates of {build.BATCH} latents, {made['pictures']} pictures" in page
    assert f"Seed {made['seed']}, {made['threads']} thread, {made['seconds']:.0f} seconds" in " ".join(page.split())


def test_the_card_of_the_flow_is_what_was_measured():
    page = (FLOW / "README.md").read_text(encoding="utf-8")
    rows, found, made = tables(page), result("flow.json")["figures"], made_of(FLOW)
    for column, name in enumerate(("one object", "two objects")):
        for guidance, by_steps in found[name]["alignment"].items():
            for T, value in by_steps.items():
                assert rows[f"alignment, {guidance}, {T}"][column] == f"{value:.3f}"
        assert_begins_as(rows, column, found[name], "guidance 1, T = 5")
    assert f"{made['steps']} updates of {build.BATCH} latents" in page
    assert f"Seed {made['seed']}, {made['threads']} thread, {made['seconds']:.0f} seconds" in " ".join(page.split())


def test_the_page_of_flows_is_what_was_measured():
    found = result("reproduce/flow.json")
    for name, seeds in found["scores"].items():
        held_out, ode = (over_seeds([sets[of]["toy-alignment"]["mean"] for sets in seeds.values()]) for of in FLOW_SETS)
        diversity = over_seeds([sets["toy-heldout"]["diversity"] for sets in seeds.values()])
        nats = [run["kl_nats"][-1] for run in found["runs"].get(name, {}).values()]
        assert f"| {name} | {held_out} | {ode} | {diversity} | {f'{sum(nats) / len(nats):.0f}' if nats else ''} |" in FLOWS
    for row in [row for row in result("reproduce/learning-rates.json")["results"] if row["scale"] == "flow"]:
        assert f"| {row['method']} | {searched(row, ('3e-5', '1e-4', '3e-4', '1e-3'))} |" in FLOWS
    for levels, at in result("reproduce/samplers.json")["results"].items():
        for name, row in at["samplers"].items():
            numbers = f"{at['noise told'][-2]:.3f} | {row['noise of a point'][-2]:.3f}"
            measured = f"{over_seeds(row['noise in latents'])} | {over_seeds(row['alignment'])}"
            assert f"| {levels} | {name} | {numbers} | {measured} |" in FLOWS
    at = result("reproduce/samplers.json")["results"]["Stable Diffusion 3's levels"]
    times = at["samplers"]["SDE, a 0.7"]["noise of a point"][-2] / at["noise told"][-2]
    assert f"the SDE carries {times:.0f} times the noise" in FLOWS
    rows = {row["name"]: row for row in result("memory.json")["results"]}
    most = {name: max(rows[name][phase] for phase in ("sample", "reward", "reference", "update")) for name in rows}
    assert most["sd3.5-medium"] < 0.9 * 24e9 / 2**30 and most["flux-dev"] < 0.9 * 80e9 / 2**30


def made_of(weights) -> dict:
    return json.loads((weights / "made.json").read_text())


def test_the_papers_comparisons_are_the_committed_ones():
    folder = ROOT / "results" / "reproduce"
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in TARGETS}
    section = MINIATURE.split("## The paper's comparisons")[1]
    assert f'"large scale" of {len(world.PROMPT_SETS["toy-train"]()):,} for' in section
    for name, target in TARGETS.items():
        page = section + FLOWS
        assert f"`{name}`" in page and f"results/reproduce/{name}.png" in page, name
        assert (folder / f"{name}.png").exists() and results[name]["versions"]["torch"] and results[name]["machine"]["cpu_cores"]
        if target.variants and not target.script:
            assert list(results[name]["runs"]) == target.variants
            assert all(set(seeds) == {"0", "1", "2"} for seeds in results[name]["runs"].values())
    for name, sets in (("table1", ["toy-small"]), ("table2", ["toy-train:128", "toy-heldout-one", "toy-heldout-two"])):
        for model, seeds in results[name]["scores"].items():
            cells = [over_seeds([scores[of]["toy-alignment"]["mean"] for scores in seeds.values()]) for of in sets]
            assert f"| {model} | {' | '.join(cells)} |" in section, (name, model)
    for model, seeds in results["fig8"]["scores"].items():
        trained, untrained = (
            over_seeds([scores["toy-small"][reward]["mean"] for scores in seeds.values()])
            for reward in ("toy-colourfulness", "toy-alignment")
        )
        assert f"| {model} | {trained} | {untrained} |" in section, model
    for target in ("fig3", "fig9", "d3po", "shared", "reference"):
        for model, seeds in results[target]["runs"].items():
            end = over_seeds([sum(run["reward_mean"][-5:]) / 5 for run in seeds.values()])
            assert f"| {model} | {end} |" in section, model
    results_of_search = json.loads((folder / "learning-rates.json").read_text())["results"]
    for row in [row for row in results_of_search if row["scale"] not in ("few", "flow")]:
        cells = searched(row, ("3e-5", "1e-4", "3e-4", "1e-3"))
        assert f"| {row['method']} | {row['scale']} | {cells} |" in section and "3e-3" not in row["reward"], row
    for name, row in results["variance"]["results"].items():
        cosine, above = (
            f"{row[v]:.4f} ± {row[e]:.4f}" for v, e in (("cosine", "standard_error"), ("above_prdp", "above_prdp_standard_error"))
        )
        assert f"| {name} | {cosine} | {above} |" in section, name
    for model, seeds in results["kl"]["runs"].items():
        reached = [[reward_at(run, nats) for run in seeds.values()] for nats in (5, 10, 20, 40)]
        cells = [over_seeds(rewards) if None not in rewards else "" for rewards in reached]
        assert f"| {model} | {' | '.join(cells)} |" in section, model
    found = {(row["method"], row["scale"]): row["reward"] for row in results_of_search}
    at_3e_4 = [f"{found[method, 'large']['3e-4']:.3f}" for method in ("prdp", "ddpo")]
    assert "PRDP ends highest, {}, and DDPO falls back, to {} (".format(*at_3e_4) in section
    minutes = {"fig3": 0.0, "prediction": 0.0, "flow": 0.0, "lasro": 0.0}
    for made in json.loads((folder / "time.json").read_text()):
        minutes[made["command"].split()[2]] += made["seconds"] / 60
        assert made["machine"]["cpu_cores"] == 2 and made["finished"]
    assert sum(minutes.values()) <= 160
    took = "`prediction` took {prediction:.0f} minutes, `lasro` {lasro:.0f}, `flow` {flow:.0f} and the rest {fig3:.0f}.".format(
        **minutes
    )
    assert f"On 2 CPU cores {took}" in " ".join(section.split())


def reward_at(run: dict, nats: float) -> float | None:
    """Training reward at the first crossing of a KL, both means over five epochs, between two epochs a straight line."""
    kl, reward = (smoothed(run[key]) for key in ("kl_nats", "reward_mean"))
    for i in range(1, len(kl)):
        if kl[i] >= nats:
            return reward[i - 1] + (nats - kl[i - 1]) / (kl[i] - kl[i - 1]) * (reward[i] - reward[i - 1])
    return None


def test_predicted_differences_in_the_docs_are_the_measured_ones():
    found, rows = result("reproduce", "prediction.json"), tables(MINIATURE)
    assert list(found["runs"]) == TARGETS["prediction"].variants

    def of(name: str, where: str, what: str, at: int = -1) -> list[float]:
        assert len(found["runs"][name]) == 3
        return [run["curves"][where][what][at] for run in found["runs"][name].values()]

    def ranged(values: list[float]) -> str:
        return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    epochs = {name: next(iter(seeds.values()))["epochs"] for name, seeds in found["runs"].items()}
    for name in found["runs"]:
        assert rows[name] == [
            str(epochs[name][-1]),
            ranged(of(name, "seen", "correlation")),
            ranged(of(name, "held out", "correlation")),
            f"{mean(of(name, 'seen', 'slope')):.2g}, {mean(of(name, 'held out', 'slope')):.2g}",
            f"{mean(of(name, 'seen', 'kl_nats')):.2f} nats",
            f"{mean(of(name, 'seen', 'reward', 0)):.3f} → {mean(of(name, 'seen', 'reward')):.3f}",
        ]
    at_30, nats_at_30 = (
        {name: mean(of(name, "seen", what, epochs[name].index(30))) for name in epochs if 30 in epochs[name]}
        for what in ("correlation", "kl_nats")
    )
    first = [run["training"]["correlation"][0] for run in found["runs"]["K = 4, clipped"].values()]
    section, share = " ".join(MINIATURE.split()), found["ceilings"]["toy-alignment, T = 5"]["share"]
    for text in (
        f"from a slope of {mean(of('T = 5', 'seen', 'slope')):.2g} to {share:.2f}, is the data's",
        f"with a correlation of {mean(first):.2f}, and fresh ones after {epochs['K = 4, clipped'][-1]} epochs",
        f"epochs with {mean(of('K = 4, clipped', 'seen', 'correlation')):.2f}. Adapters",
        f"as well, {at_30['T = 5']:.2f} to {at_30['every weight']:.2f} after 30 epochs, at {nats_at_30['T = 5']:.2f} nats",
        f"where these are at {nats_at_30['every weight']:.2f}. More",
        f"after {epochs['T = 5'][-1]} epochs T = 5 has {mean(of('T = 5', 'seen', 'correlation')):.2f}.",
        f"epochs is {at_30['reference on one step']:.2f} where all steps give {at_30['T = 5']:.2f}, and at beta = 1e-3",
        "the reward is {:.3f} where they give {:.3f}: within".format(
            *(mean(of(f"beta 1e-3, {name}", "seen", "reward")) for name in ("reference on one step", "every weight"))
        ),
        f"it goes {mean(of('beta 1e-3, every weight', 'seen', 'kl_nats')):.0f} nats away in 30 epochs",
    ):
        assert text in section, text
    for name, ceiling in found["ceilings"].items():
        assert rows[name] == [f"{ceiling['share']:.2f} ± {ceiling['standard_error']:.2f}", f"{ceiling['share'] ** 0.5:.2f}"]


def at_seconds(run: dict, seconds: float) -> float:
    """Held-out reward of a run at a time, between two evaluations a straight line."""
    marks = run["evaluated"]
    for before, after in pairwise(marks):
        if after["seconds"] >= seconds:
            share = (seconds - before["seconds"]) / (after["seconds"] - before["seconds"])
            return before["eval_reward"] + share * (after["eval_reward"] - before["eval_reward"])
    return marks[-1]["eval_reward"]


def test_the_campaign_of_kills_is_the_committed_one():
    found, page = result("faults.json")["results"], (ROOT / "docs" / "cluster.md").read_text()
    assert list(found) == list(faults.SCENES)
    for scene, count in found.items():
        assert f"| {scene} | {' | '.join(map(str, count.values()))} |" in page
        assert count["finished"] >= 1 and count["equal"] == count["finished"]
    assert sum(count["kills"] for count in found.values()) >= 50
    assert all(sum(count[what] for count in found.values()) >= 10 for what in ("save", "evaluation"))


def test_the_restarts_are_the_committed_ones():
    found, page = result("restarts.json")["results"], (ROOT / "docs" / "cluster.md").read_text()
    assert {(case["agents"], case["signal"], case["rank"]) for case in found} == {
        (agents, name, rank) for agents in (1, 2) for name in restarts.SIGNALS for rank in (0, 1)
    }
    for case in found:
        assert case["equal"] and len(case["went_on_from"]) == 1 and case["seconds_until_the_other_ended"] < 60
        assert restarts.row(case) in page


def test_memory_at_few_steps_is_the_derived_one():
    found, page = result("memory-few.json"), (ROOT / "docs" / "few-steps.md").read_text()
    assert [row["flags"] for row in found["results"]] == [f"--preset {name}" for name in memory_few.PRESETS]
    for row in found["results"]:
        cells = [f"{value:.1f}" for name, value in row.items() if name != "flags"]
        assert f"| `{row['flags']}` | {' | '.join(cells)} |" in page


def test_the_comparison_at_few_steps_is_the_measured_one():
    found, page = result("reproduce", "lasro.json"), (ROOT / "docs" / "few-steps.md").read_text()
    assert list(found["runs"]) == TARGETS["lasro"].variants
    every = [run for seeds in found["runs"].values() for run in seeds.values()]
    assert len(every) == 18 and {run["evaluated"][-1]["queries"] for run in every} == {3840}
    assert "3840 reward queries" in page
    before = [run["surrogate_accuracy"][epoch][1] for run in found["runs"]["LaSRO"].values() for epoch in range(3, 7)]
    assert f"in epochs 4 to 7 it orders {sum(before) / len(before):.2f} of" in page
    shortest = min(run["evaluated"][-1]["seconds"] for run in every)
    assert f"at {shortest:.0f} s" in page
    for model, seeds in found["scores"].items():
        two, one = (over_seeds([s[how]["toy-alignment"]["mean"] for s in seeds.values()]) for how in ("two steps", "one step"))
        diversity = f"{sum(s['two steps']['diversity'] for s in seeds.values()) / len(seeds):.3f}"
        runs = found["runs"].get(model, {}).values()
        timed = over_seeds([at_seconds(run, shortest) for run in runs]) if runs else ""
        ordered = [
            sum(by_step[1] for by_step in run["surrogate_accuracy"][-5:]) / 5 for run in runs if "surrogate_accuracy" in run
        ]
        cells = [model, two, one, timed, over_seeds(ordered) if ordered else "", diversity]
        assert f"| {' | '.join(cells)} |" in page, cells
    for row in result("reproduce", "learning-rates.json")["results"]:
        if row["scale"] == "few":
            tried = ", ".join(
                f"{reward:.3f} at {rate}" for rate, reward in sorted(row["reward"].items(), key=lambda r: float(r[0]))
            )
            assert f"| {row['method']} | {row['chosen']} | {tried} |" in page


def test_figures_beside_trl_are_the_measured_ones():
    section, timed = MINIATURE.split("## Beside TRL")[1], result("beside-trl-time.json")
    assert timed["versions_beside_trl"]["trl"] == "0.23.1" and f"{timed['machine']['cpu_cores']} CPU cores" in section
    for name, row in timed["results"].items():
        (low, high), seconds = row["interval_90"], row["seconds"]
        cells = f"{median(seconds):.1f} | {row['ratio_to_trl']:.2f} | {low:.2f} to {high:.2f} | {row['owed_in_calls']:.2f}"
        assert f"| {name} | {cells} |" in section and len(seconds) == 7, name
    learned = result("beside-trl-reward.json")
    assert f"after {learned['seconds']:.0f} seconds" in section
    for name, row in learned["results"].items():
        assert set(row["seeds"]) == {"0", "1", "2"} and row["learning_rate"] == max(row["search"], key=row["search"].get)
        epochs = [len(found["epochs"]) for found in row["seeds"].values()]
        base, tuned = (
            " | ".join(
                over_seeds([found["held_out"][f"{kind}, toy-heldout-{of}"][0] for found in row["seeds"].values()])
                for of in ("one", "two")
            )
            for kind in ("base", "tuned")
        )
        assert f"| base | | | {base} |" in section
        assert f"| {name} | {row['learning_rate']} | {min(epochs)} to {max(epochs)} | {tuned} |" in section, name


def test_presets_weights_and_recipes_are_the_codes():
    lines = STABLE_DIFFUSION.splitlines()
    for name in PRESETS.keys() - {"toy", "toy-flow"}:
        (row,) = (line for line in lines if line.startswith(f"| `{name}`"))
        *_, epochs, updates, trajectories, _, clip_range, learning_rate, _ = (cell.strip() for cell in row.split("|"))
        c = Config(**PRESETS[name])
        assert [int(epochs), int(updates)] == [c.epochs, c.updates_per_epoch], name
        assert trajectories == f"{c.prompts_per_epoch} × {c.images_per_prompt}", name
        assert [float(clip_range), float(learning_rate)] == [c.clip_range, c.learning_rate], name
    for name, source in SOURCES.items():
        row = next(line for line in lines if line.startswith(f"| `{name}`"))
        hub = source.hub if "://" not in source.hub else "christophschuhmann/improved-aesthetic-predictor"
        assert all(part in row for part in (hub, source.file, source.size, source.licence, source.tokenizer)), row
    commands = STABLE_DIFFUSION.replace("\\\n", " ")
    result = json.loads((ROOT / "results" / "memory.json").read_text())
    assert "not measured" in result["how"] and result["versions"]["torch"]
    rows = {row["name"]: row for row in result["results"]}
    assert {name: row["flags"] for name, row in rows.items()} == RECIPES
    for name, limit in (("every weight, 24 GB", 24e9 / 2**30), ("adapters, 12 GB", 12e9 / 2**30)):
        assert f"python train.py {' '.join(RECIPES[name].split())}\n" in re.sub(" +", " ", commands)
        assert max(rows[name][phase] for phase in ("sample", "reward", "reference", "update")) < 0.9 * limit
    for name, row in rows.items():
        numbers = " | ".join(f"{row[phase]:.1f}" for phase in ("sample", "reward", "reference", "update"))
        assert f"| {name} | {numbers} | {row['exaflop_per_epoch']:.3g} |" in STABLE_DIFFUSION
    small, large = (rows[f"paper, {scale} scale"]["exaflop_per_epoch"] for scale in ("small", "large"))
    a_pass = small / passes(Config())
    prose = " ".join(STABLE_DIFFUSION.split())
    for text in (
        f"is {small:.3g} EFLOP at the small scale, in strict fp32, and {large:.3g} at the large one",
        f"reach 20 and 100 TFLOP/s {small * 1e6 / 8 / 20 / 3600:.1f} hours and {large * 1e6 / 8 / 100 / 60:.1f} minutes",
        f"`evaluate.py` is {(500 + 500 + 4 * 800) * 64 * 50 * 2 * a_pass:.1f} EFLOP for two models",
    ):
        assert text in prose, text


def test_what_a_gpu_has_shown_is_said_as_it_was():
    tests = list(result("gpu/tests.json")["tests"].values())
    assert set(tests) == {"passed", "needs two GPUs"} and result("gpu/tests.json")["machine"]["gpu"] == "NVIDIA H200"
    assert f"On one NVIDIA H200 (torch 2.11) {tests.count('passed')} of the {len(tests) + 1} tests" in STABLE_DIFFUSION
    largest = result("gpu/rounding.json")["largest"]
    expected = f"{largest['fp32']:.2g} from 0 in fp32, {largest['tf32']:.2g} in TF32 and {largest['bf16']:.2g} in bf16"
    assert expected in " ".join(STABLE_DIFFUSION.split())
