"""The benchmark runs, and its numbers are those of the runs."""

import json
import os

import pytest

import benchmark


def test_table_and_json(capsys, model_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    output = tmp_path / "benchmark.json"
    flags = [
        "--preset",
        "toy",
        "--prompts",
        "toy-small",
        "--prompts_per_epoch",
        "2",
        "--images_per_prompt",
        "2",
        "--model",
        str(model_folder),
    ]
    benchmark.main(["--num_steps", "2", "4", "--output", str(output), *flags])
    printed = capsys.readouterr().out.splitlines()
    rows = json.loads(output.read_text())["results"]
    assert [row["num_steps"] for row in rows] == [2, 4]
    assert printed[0].startswith("| T | sample s |") and printed[2].startswith("| 2 |") and printed[3].startswith("| 4 |")
    for row in rows:
        assert row["seconds_per_epoch"] == pytest.approx(sum(row["seconds"].values()))
        assert row["peak_memory_gib"] > 0 and row["seconds"]["reference"] > 0
    assert "peak memory differs by" in printed[-1]


def test_wrong_flags_are_refused_with_the_trainers_own_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--num_steps", "5", "--modell", "x"])
    assert stopped.value.code == 2 and "unknown argument '--modell'" in capsys.readouterr().err
