"""docs/companion.md: every block runs, in one interpreter and in order, and prints what the page shows; its names exist."""

import ast
import contextlib
import io
import re

import pytest
import torch
from conftest import ROOT

PAGE = (ROOT / "docs" / "companion.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", PAGE, re.DOTALL)  # (code, what it prints)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def assert_same(printed: str, shown: str) -> None:
    """Equal texts, their numbers to half a unit of the last digit shown and 1 % of a unit for how that was rounded."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        digits, _, exponent = theirs.partition("e")
        unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
        assert float(ours) == pytest.approx(float(theirs), rel=0, abs=0.51 * unit), f"{ours}, not {theirs}"


def test_every_block_prints_what_the_page_shows_and_its_names_exist(monkeypatch):
    assert len(BLOCKS) == PAGE.count("```python") > 20 and sum(bool(shown) for _, shown in BLOCKS) == PAGE.count("```text") > 20
    monkeypatch.chdir(ROOT)
    space: dict = {}
    with torch.random.fork_rng():
        try:
            for code, shown in BLOCKS:
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec(code, space)
                assert_same(printed.getvalue(), shown)
        finally:
            torch.set_default_dtype(torch.float32)
    names = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    assert len(names) > 20
    for file, name in names:
        defined = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        assert name in {node.name for node in defined if isinstance(node, (ast.FunctionDef, ast.ClassDef))}, f"{file}::{name}"


def test_no_shown_digit_can_change_unnoticed():
    """Every number of the page with its last digit one higher or one lower: the comparison above refuses each."""
    for _, shown in BLOCKS:
        for number in NUMBER.finditer(shown):
            last = number.end() - 1 if "e" not in number[0] else number.start() + number[0].index("e") - 1
            for digit in {int(shown[last]) + 1, int(shown[last]) - 1} & set(range(10)):
                with pytest.raises(AssertionError):
                    assert_same(shown, f"{shown[:last]}{digit}{shown[last + 1 :]}")
