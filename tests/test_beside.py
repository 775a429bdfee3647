"""What can be said here of the benchmarks that need a GPU or another library: their settings, and how they keep and resume."""

import json
import math
import random

import pytest

from benchmarks import beside_trl, gpu, memory
from config import check
from plumbing.flags import parse


def test_interval_holds_the_median_in_nine_of_ten_cases():
    assert beside_trl.interval([3, 1, 2, 5, 4, 7, 6]) == (1, 7)
    draw = random.Random(0)
    for n, narrower in ((7, False), (9, True), (20, True)):
        held = 0
        for _ in range(4000):
            values = [math.exp(draw.gauss(0, 1)) for _ in range(n)]  # whose median is 1
            low, high = beside_trl.interval(values)
            held += low <= 1 <= high
            assert ((low, high) != (min(values), max(values))) == narrower
        assert held / 4000 + 0.01 >= 0.9 and (n != 20 or held / 4000 < 0.97)


def test_runs_that_are_timed_have_the_same_pictures_and_known_flags():
    shapes = set()
    for whose, flags, calls in beside_trl.TIMED.values():
        config = parse(f"{flags} {beside_trl.SHAPE} 3".split())
        check(config, 1)
        shapes.add((config.prompts_per_epoch, config.images_per_prompt, config.num_steps, config.guidance_scale))
        assert whose == "ours" or (config.method == "ddpo" and config.prompts_per_epoch * config.images_per_prompt % 8 == 0)
        K, update = config.updates_per_epoch, 2 if config.lora_rank else 3
        reference = 0 if config.method == "ddpo" else (config.reference_steps or config.num_steps) / config.num_steps
        assert calls == pytest.approx(1 + reference + K * update + (K if K > 1 else 0))
    assert shapes == {(2, 4, 10, 5.0)}
    for _, flags in beside_trl.LEARNING.values():
        check(parse(f"{beside_trl.MINIATURE} 3 {flags}".split()), 1)


def test_a_gpu_day_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    done = []

    def part(name, result):
        done.append(name)
        return result

    parts = {
        "tests": lambda: part("tests", {"failure": None, "tests": {"a": "passed", "b": "broken"}}),
        "speed fp32": lambda: part("speed fp32", {"failure": "out of memory"}),
        "rounding": lambda: part("rounding", {"failure": None, "largest": {"fp32": 1e-6}}),
    }
    monkeypatch.setattr(gpu, "parts", lambda options: parts)
    monkeypatch.setattr(gpu.rehearsal, "make", lambda *_: ["--model", "x"])
    argv = ["--output", str(tmp_path / "out"), "--folder", str(tmp_path / "folder"), "--shape", "tiny"]
    gpu.main(argv)
    (tmp_path / "out" / "rounding.json").unlink()
    gpu.main(argv)
    assert done == ["tests", "speed fp32", "rounding", "rounding"]
    kept = json.loads((tmp_path / "out" / "speed-fp32.json").read_text())
    assert kept["part"] == "speed fp32" and kept["failure"] == "out of memory" and "torch" in kept["versions"]
    said = capsys.readouterr().out
    assert "tests: 1 passed, the others: ['broken']" in said and "speed fp32: FAILED: out of memory" in said
    assert "rounding: fp32 1e-06" in said


def test_a_gpu_day_wants_a_gpu_and_known_flags(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--output", str(tmp_path)])
    assert stopped.value.code == 2 and "there is no GPU: --shape tiny" in capsys.readouterr().err
    for flags in gpu.SPEED.values():
        check(parse(["--preset", "large-hpsv2", *flags.split()]), 1)
    for name in gpu.CAPS:
        assert memory.RECIPES[name].startswith("--preset large-hpsv2 ")


def test_a_part_tells_how_it_failed_and_is_not_waited_for_for_ever(monkeypatch):
    assert gpu.call([gpu.sys.executable, "-c", "print('well')"])["failure"] is None
    failed = gpu.call([gpu.sys.executable, "-c", "import sys; print('first\\nlast', file=sys.stderr); sys.exit(3)"])
    assert failed["failure"] == "last"
    monkeypatch.setattr(gpu, "LIMIT", 0.5)
    assert gpu.call([gpu.sys.executable, "-c", "import time; time.sleep(60)"])["failure"] == "not finished after 0.5 seconds"
