"""Names in the README exist, and the departures it lists are the ones marked in the code."""

import ast
import re

from conftest import ROOT

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
    written = set(re.findall(r'^ {20}"(\w+)": ', source, re.MULTILINE)) | {"seconds"}
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
