"""Names in the README exist, and the departures it lists are the ones marked in the code."""

import ast
import json
import re

from conftest import ROOT

from benchmarks.memory import RECIPES
from config import PRESETS
from plumbing.figures import TARGETS
from plumbing.reward_models import SOURCES

README = (ROOT / "README.md").read_text(encoding="utf-8")


def functions(path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_equation_table_names_exist():
    cells = set(re.findall(r"`([\w/]+\.py)::(\w+)`", README))
    assert len(cells) > 20
    for file, name in cells:
        assert (ROOT / file).exists(), file
        assert name in functions(ROOT / file), f"{file}::{name}"


def test_every_metric_is_documented():
    source = (ROOT / "train.py").read_text()
    written = set(re.findall(r'^ {20}"(\w+)": ', source, re.MULTILINE))
    documented = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert len(written) > 10 and written <= documented


def test_departures_are_marked_and_listed():
    marked = [
        (path.name, line.partition("NOT IN PAPER:")[2].strip())
        for path in sorted(ROOT.glob("*.py"))
        for line in path.read_text().splitlines()
        if "NOT IN PAPER:" in line
    ]
    listed = README.split("## Departures from the paper")[1].split("\n## ")[0]
    assert marked
    for file, _ in marked:
        assert f"`{file}`" in listed, file


def test_results_in_the_readme_are_the_committed_ones():
    limits = json.loads((ROOT / "results" / "toy-limits.json").read_text())["heldout_alignment"]
    assert f"({limits['autoencoder']:.3f})" in README and f"Chance is {limits['chance']:.3f}" in README
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in README.splitlines()
        if "|" in line
    }
    for seed in range(3):
        folder = ROOT / "results" / f"toy-seed{seed}"
        result = json.loads((folder / "results.json").read_text())
        assert result["versions"]["torch"] and result["machine"]["cpu_cores"] and result["command"]
        scores = {(r["model"], r["prompts"], r["reward"]): r for r in result["results"]}
        one, two = ("toy-heldout-one", "one object"), ("toy-heldout-two", "two objects")
        for prompts, title in (one, two):
            for model, when in (("base", "(the reward) before" if title == "one object" else "before"), ("tuned", "after")):
                row = scores[model, prompts, "toy-alignment"]
                assert rows[f"{title}, alignment {when}"][seed] == f"{row['mean']:.3f} ± {row['standard_error']:.3f}"
        both = [[scores[model, prompts, "toy-alignment"] for prompts, _ in (one, two)] for model in ("base", "tuned")]
        before, after = (sum(row["mean"] for row in rows_of) / 2 for rows_of in both)
        closed = (after - before) / (limits["autoencoder"] - before)
        assert closed > 0.25
        title = f"of the distance to what the autoencoder can show ({limits['autoencoder']:.3f}) closed"
        assert rows[title][seed] == f"{100 * closed:.0f} %"
        won = ", ".join(f"{100 * row['win_rate']:.0f} %" for row in both[1])
        assert rows["prompts won by the finetuned model, one and two objects"][seed] == won
        for what, reward, key in (("colourfulness (never trained)", "toy-colourfulness", "mean"),
                                  ("diversity within a prompt", "toy-alignment", "diversity")):  # fmt: skip
            numbers = " → ".join(f"{scores[model, two[0], reward][key]:.3f}" for model in ("base", "tuned"))
            assert rows[f"two objects, {what} before → after"][seed] == numbers
        for reward in ("toy-alignment", "toy-colourfulness"):
            small = [scores[model, "toy-small", reward]["mean"] for model in ("base", "tuned")]
            assert f"{small[0]:.3f} to {small[1]:.3f}" in README.replace("\n", " ")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        seconds = sum(sum(line["seconds"].values()) for line in lines[1:])
        assert rows["seconds of finetuning on 2 CPU cores, with evaluation"][seed] == f"{seconds:.0f}" and seconds < 240
    rows = json.loads((ROOT / "results" / "benchmark.json").read_text())["results"]
    least, most = (row["peak_memory_gib"] for row in rows)
    assert f"{least:.3f} GiB" in README and f"{most:.3f} GiB" in README and most < 1.05 * least


def over_seeds(values: list[float]) -> str:
    """Mean, lowest and highest."""
    return f"{sum(values) / len(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def test_the_papers_comparisons_in_the_readme_are_the_committed_ones():
    folder = ROOT / "results" / "reproduce"
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in TARGETS}
    section = README.split("## The paper in miniature")[1].split("\n## ")[0]
    for name, target in TARGETS.items():
        assert f"`{name}`" in section and f"results/reproduce/{name}.png" in section, name
        assert (folder / f"{name}.png").exists() and results[name]["versions"]["torch"] and results[name]["machine"]["cpu_cores"]
        if target.variants:
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
    for model, seeds in results["fig3"]["runs"].items():
        end = over_seeds([sum(run["reward_mean"][-5:]) / 5 for run in seeds.values()])
        assert f"| {model} | {end} |" in section, model
    for row in json.loads((folder / "learning-rates.json").read_text())["results"]:
        cells = [
            f"{row['reward'][rate]:.3f}" if rate in row["reward"] else "" for rate in ("1e-5", "3e-5", "1e-4", "3e-4", "1e-3")
        ]
        line = f"| {row['method']} | {row['scale']} | {' | '.join(cells)} |"
        best = f"{row['reward'][row['chosen']]:.3f}"
        assert line.replace(best, f"**{best}**") in section and set(row["reward"]) < {"1e-5", "3e-5", "1e-4", "3e-4", "1e-3"}, row
    for name, row in results["variance"]["results"].items():
        cosine, above = (
            f"{row[v]:.4f} ± {row[e]:.4f}" for v, e in (("cosine", "standard_error"), ("above_prdp", "above_prdp_standard_error"))
        )
        assert f"| {name} | {cosine} | {above} |" in section, name
    longer = ROOT / "results" / "reproduce-long"
    for model, seeds in json.loads((longer / "table2.json").read_text())["scores"].items():
        (sets,) = seeds.values()
        cells = [f"{scores['toy-alignment']['mean']:.3f}" for scores in sets.values()]
        assert f"| {model} | {' | '.join(cells)} |" in section, model
    found = {row["method"]: row["reward"] for row in json.loads((longer / "learning-rates.json").read_text())["results"]}
    for rate in ("3e-5", "1e-4", "3e-4"):
        assert f"{found['prdp'][rate]:.3f} to {found['ddpo'][rate]:.3f} at {rate}" in section.replace("\n", " "), rate
    (whole,) = (made for made in json.loads((folder / "time.json").read_text()) if made["command"] == "python reproduce.py all")
    assert whole["seconds"] < 90 * 60
    assert f"{whole['seconds'] / 60:.0f} minutes on {whole['machine']['cpu_cores']} CPU cores" in section


def test_presets_weights_and_recipes_are_the_codes():
    lines = README.splitlines()
    for name in PRESETS.keys() - {"toy"}:
        assert any(line.startswith(f"| `{name}`") for line in lines), name
    for name, source in SOURCES.items():
        row = next(line for line in lines if line.startswith(f"| `{name}`"))
        hub = source.hub if "://" not in source.hub else "christophschuhmann/improved-aesthetic-predictor"
        assert all(part in row for part in (hub, source.file, source.size, source.licence, source.tokenizer)), row
    commands = README.replace("\\\n", " ")
    result = json.loads((ROOT / "results" / "memory.json").read_text())
    assert "not measured" in result["how"] and result["versions"]["torch"]
    rows = {row["name"]: row for row in result["results"]}
    assert {name: row["flags"] for name, row in rows.items()} == RECIPES
    for name, limit in (("every weight, 24 GB", 24e9 / 2**30), ("adapters, 12 GB", 12e9 / 2**30)):
        assert f"python train.py {' '.join(RECIPES[name].split())}\n" in re.sub(" +", " ", commands)
        assert max(rows[name][phase] for phase in ("sample", "reward", "reference", "update")) < 0.9 * limit
    for name, row in rows.items():
        numbers = " | ".join(f"{row[phase]:.1f}" for phase in ("sample", "reward", "reference", "update"))
        assert f"| {name} | {numbers} |" in README
