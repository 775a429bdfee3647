"""What can be said here of the benchmarks that need a GPU or another library: their settings, and how they keep and resume."""

import importlib
import json
import math
import random
import sys
import types

import pytest
import torch

import comparators
from benchmarks import beside_trl, gpu, memory
from comparators import asked_of_reference
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
        assert whose == "ours" or (config.method == "ddpo" and config.lora_rank in (0, 4))
        K, update, shape = config.updates_per_epoch, 2 if config.lora_rank else 3, (4, 8, 10)
        comparator = comparators.chosen(config, None)
        reference = asked_of_reference(config, comparator, shape, 1).double().mean().item() if whose == "ours" else 0
        assert calls == pytest.approx(1 + reference + K * update + (K if K > 1 else 0))
    assert shapes == {(4, 8, 10, 5.0)}
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
    monkeypatch.setattr(gpu, "make", lambda *made: done.append("models") or {"failure": None})
    argv = ["--output", str(tmp_path / "out"), "--folder", str(tmp_path / "folder"), "--shape", "tiny"]
    gpu.main(argv)
    (tmp_path / "out" / "rounding.json").unlink()
    gpu.main(argv)
    assert done == ["tests", "models", "speed fp32", "rounding", "speed fp32", "rounding"]  # what failed is done again
    elsewhere = json.loads((tmp_path / "out" / "tests.json").read_text())
    elsewhere["machine"]["gpu"] = "another"
    (tmp_path / "out" / "tests.json").write_text(json.dumps(elsewhere))
    gpu.main([*argv, "--parts", "tests", "rounding"])
    assert done[6:] == ["tests"]
    kept = json.loads((tmp_path / "out" / "speed-fp32.json").read_text())
    assert kept["part"] == "speed fp32" and kept["failure"] == "out of memory" and "torch" in kept["versions"]
    said = capsys.readouterr().out
    assert "tests: 1 passed, the others: ['broken']" in said and "speed fp32: FAILED: out of memory" in said
    assert "rounding: fp32 1e-06" in said


def test_a_gpu_day_wants_a_gpu_and_known_flags(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--output", str(tmp_path)])
    assert stopped.value.code == 2 and "there is no GPU: --shape tiny" in capsys.readouterr().err
    for steps, flags in gpu.SPEED.values():
        check(parse(["--preset", "large-hpsv2", "--num_steps", str(steps), *flags.split()]), 1)
    for preset, shape in gpu.FLOWS.items():
        check(parse(["--preset", preset]), 1)
        assert shape in gpu.memory.rehearsal.PIPELINES and f"tiny-{shape}" in gpu.memory.rehearsal.PIPELINES
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--output", str(tmp_path), "--parts", "rounding", "spead"])
    assert stopped.value.code == 2 and "no part 'spead': use tests, rounding, speed bf16, " in capsys.readouterr().err
    for name in gpu.CAPS:
        assert memory.RECIPES[name].startswith("--preset large-hpsv2 ")


def test_a_part_tells_how_it_failed_and_is_not_waited_for_for_ever():
    assert gpu.call([gpu.sys.executable, "-c", "print('well')"])["failure"] is None
    failed = gpu.call([gpu.sys.executable, "-c", "import sys; print('first\\nlast', file=sys.stderr); sys.exit(3)"])
    assert failed["failure"] == "last"
    began = gpu.time.monotonic()  # what a part has started ends with it: it holds the pipe, too
    hangs = "import subprocess, time; subprocess.Popen(['sleep', '50']); time.sleep(60)"
    assert gpu.call([gpu.sys.executable, "-c", hangs], 0.5)["failure"] == "not finished after 0.5 seconds"
    assert gpu.time.monotonic() - began < 40


def test_another_command_is_not_taken_for_what_was_made(monkeypatch, tmp_path):
    made = []

    def succeed(command):
        made.append(command)
        (tmp_path / "run").mkdir()

    monkeypatch.setattr(beside_trl, "succeed", succeed)
    for _ in range(2):
        assert beside_trl.finished(tmp_path / "run", "trl", "--epochs 3", "python", 9.0) == tmp_path / "run"
    with pytest.raises(ValueError, match="was made by another command"):
        beside_trl.finished(tmp_path / "run", "trl", "--epochs 4", "python", 9.0)
    command = ["python", "-m", "benchmarks.with_trl", "--epochs", "3", "--output_dir", str(tmp_path / "run"), "--seconds", "9"]
    assert made == [command]


def test_rewards_are_compared_when_the_seconds_are_over(tmp_path):
    lines = [
        {"epoch": 0},
        *({"epoch": n, "reward_mean": n / 10, "seconds": {"sample": 2.0, "evaluate": 50.0}} for n in range(1, 6)),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["epoch"] for line in beside_trl.until(tmp_path, 5.0)] == [1, 2, 3]
    assert beside_trl.until(tmp_path, 9.0)[-1] == {"epoch": 5, "reward": 0.5, "seconds": 10.0}
    with pytest.raises(ValueError, match="only 10 of 10 seconds"):
        beside_trl.until(tmp_path, 10.0)


@pytest.fixture
def with_trl(monkeypatch):
    """The module, with a TRL that only keeps what it is told."""
    trl = types.ModuleType("trl")
    trl.DDPOConfig = types.SimpleNamespace
    trl.DefaultDDPOStableDiffusionPipeline = type("Theirs", (), {"scheduler": property(lambda self: self.sd_pipeline.scheduler)})

    class DDPOTrainer:
        def calculate_loss(self, *rows):
            return rows[0].sum(), *rows

    trl.DDPOTrainer = DDPOTrainer
    monkeypatch.setitem(sys.modules, "trl", trl)
    yield importlib.import_module("benchmarks.with_trl")
    del sys.modules["benchmarks.with_trl"]


def test_trl_is_told_the_same(with_trl):
    of_trl = next(flags for whose, flags in beside_trl.LEARNING.values() if whose == "trl")
    flags = f"--preset toy {of_trl} --guidance_scale 2 --learning_rate 3e-4"
    config = parse(flags.split())
    told = with_trl.settings(config)
    assert told.sample_batch_size * told.sample_num_batches_per_epoch == 128
    assert told.train_batch_size * told.train_gradient_accumulation_steps == 128 / 4
    assert (told.sample_num_steps, told.sample_guidance_scale, told.train_learning_rate) == (5, 2.0, 3e-4)
    assert (told.train_clip_range, told.per_prompt_stat_tracking_min_count) == (2.13e-3, 16)
    with pytest.raises(ValueError, match="whole batches: 128 pictures are not"):
        with_trl.settings(parse([*flags.split(), "--updates_per_epoch", "3"]))


def test_trl_ends_where_we_do_and_does_not_train_the_step_without_noise(with_trl, model_folder):
    config = parse(["--preset", "toy", "--model", str(model_folder)])
    pipeline = with_trl.Pipeline(config)
    assert pipeline.ends_clean and pipeline.scheduler.alphas_cumprod[0] == 1 and 0 not in pipeline.scheduler.timesteps
    trainer = with_trl.Trainer()
    trainer.sd_pipeline = pipeline
    last = pipeline.scheduler.timesteps[-1].item()
    numbers = torch.arange(4.0)
    rows = trainer.calculate_loss(numbers, torch.tensor([999, last, 599, last]), *(numbers,) * 3, torch.arange(8))
    assert rows[0] == 2 * 0.5 and rows[1].tolist() == [0, 2] and rows[6].tolist() == [0, 2, 4, 6]
