"""docs/companion.md: every block runs, in one interpreter and in order, and prints what the page shows."""

import contextlib
import io
import re

import pytest
import torch
from conftest import ROOT

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def blocks(page: str) -> list[tuple[str, str]]:
    """(code, what it prints) of every block of Python; what it prints stands directly below."""
    return re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", page, re.DOTALL)


def assert_same(printed: str, shown: str) -> None:
    """Equal texts, but for the last digit shown of a number: another processor rounds otherwise."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        digits = theirs.partition("e")[0].partition(".")[2]
        last = 10.0 ** -len(digits) * (10.0 ** int(theirs.partition("e")[2] or 0))
        assert float(ours) == pytest.approx(float(theirs), rel=0, abs=1.01 * last if digits else 0), f"{ours}, not {theirs}"


def test_every_block_prints_what_the_page_shows(monkeypatch):
    page = (ROOT / "docs" / "companion.md").read_text(encoding="utf-8")
    found, space = blocks(page), {}
    assert len(found) == page.count("```python") > 15 and sum(bool(shown) for _, shown in found) == page.count("```text") > 15
    monkeypatch.chdir(ROOT)
    try:
        for code, shown in found:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, space)
            assert_same(printed.getvalue(), shown)
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(AssertionError, match="not 0\\.45"):
        assert_same("loss 0.43\n", "loss 0.45\n")
