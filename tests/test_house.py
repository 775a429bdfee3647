"""Where things stand and who may know of whom: the imports of every file, and the page of Algorithm 1."""

import ast
import subprocess
import sys

from conftest import ROOT

# The top level is the reading list.
FIRST = ["sampler", "rewards", "rdp_loss", "train", "evaluate", "config", "reproduce", "lasro"]
ROOMS = ["comparators", "miniature", "plumbing", "benchmarks"]
NOTHING: set[str] = set()
MAY_KNOW = {  # of a file at the top, or of every file of a room; each also its own room
    "sampler": NOTHING,
    "rdp_loss": NOTHING,
    "config": NOTHING,
    "comparators": {"sampler", "config"},
    "miniature": NOTHING,
    "distil": {"lasro", "plumbing"},  # of the miniature, by LaSRO's consistency loss
    "plumbing": {"sampler", "rdp_loss", "config", "miniature"},
    "rewards": {"plumbing", "miniature"},
    "benchmarks": {"plumbing", "miniature", "comparators", "sampler", "rdp_loss", "config", "rewards", "lasro"},
    "train": {*FIRST, *ROOMS},
    "evaluate": {*FIRST, *ROOMS},
    "reproduce": {*FIRST, *ROOMS},
    "lasro": {*FIRST, *ROOMS},
}


def imported(path) -> set[str]:
    """The modules of this project that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in {*FIRST, *ROOMS}}


def test_the_top_level_is_the_reading_list():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FIRST)
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(ROOMS)


def test_nothing_imports_what_it_may_not_know_of():
    files = [(path.stem, path) for path in ROOT.glob("*.py")]
    files += [(room, path) for room in ROOMS for path in (ROOT / room).glob("*.py")]
    assert len(files) > 25
    for place, path in files:
        allowed = MAY_KNOW["distil" if path.stem == "distil" else place] | ({place} if place in ROOMS else NOTHING)
        for name in imported(path):
            known = any(name == one or name.startswith(f"{one}.") for one in allowed)
            assert known, f"{path.relative_to(ROOT)} imports {name}"


def test_the_losses_and_the_sampler_stand_alone():
    """Importing them brings in no other part of the project, and no library of models."""
    code = "import sys, sampler, rdp_loss, config; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    mine = {name.split(".")[0] for name in loaded} & {*FIRST, *ROOMS}
    assert mine == {"sampler", "rdp_loss", "config"}
    assert not {"diffusers", "transformers", "open_clip"} & set(loaded)


def test_algorithm_1_is_one_page():
    source = (ROOT / "train.py").read_text()
    (train,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "algorithm_1"]
    assert train.end_lineno - train.lineno + 1 <= 60
    page = source.splitlines()[train.lineno - 1 : train.end_lineno]
    numbers = [line.rstrip()[-1] for line in page if line.rstrip()[-4:-1] == " # "]
    assert sorted(numbers) == [str(n) for n in range(1, 9)]
    assert any("prdp_loss(" in line for line in page)
