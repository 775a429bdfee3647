"""The benchmark runs, and its numbers are those of the runs."""

import contextlib
import dataclasses
import io
import json
import subprocess

import pytest
import torch

import train
from benchmarks import speed
from plumbing.flags import parse
from plumbing.pipeline import load_pipeline


def test_table_and_json(capsys, model_folder, tmp_path, monkeypatch):
    def here(command, **_):
        """Instead of a process of its own for every T."""
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(command[2:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(speed.subprocess, "run", here)
    output = tmp_path / "benchmark.json"
    flags = [*"--preset toy --prompts toy-small --prompts_per_epoch 2 --images_per_prompt 2 --model".split(), str(model_folder)]
    speed.main(["--num_steps", "2", "4", "--also", "--channels_last True", "--output", str(output), *flags])
    first, *printed = capsys.readouterr().out.splitlines()
    assert "GFLOP per trajectory and step" in first
    rows = json.loads(output.read_text())["results"]
    assert [(row["num_steps"], row["flags"]) for row in rows] == [(2, ""), (4, ""), (2, "--channels_last True")]
    assert printed[0].startswith("| | processes | T | sample s |")
    assert printed[2].startswith("|  | 1 | 2 |") and printed[3].startswith("|  | 1 | 4 |")
    assert printed[4].startswith("| --channels_last True | 1 | 2 |")
    for row in rows:
        assert row["seconds_per_epoch"] == pytest.approx(sum(row["seconds"].values()))
        assert row["seconds"]["update"] > 0 and all(0 < share < 1.5 for share in row["utilisation"].values())
        assert row["peak_memory_gib"] > 0 and row["seconds"]["reference"] > 0
    assert "peak memory differs by" in printed[-1]


def test_several_processes_are_started_by_torchrun(monkeypatch):
    started = []

    def nothing(command, **_):
        started.append(command)
        return subprocess.CompletedProcess(command, 2, stderr="train.py: error: enough\n=====\nof torchrun\n=====")

    monkeypatch.setattr(speed.subprocess, "run", nothing)
    for processes in (1, 2):
        with pytest.raises(ValueError, match="enough"):
            speed.measure(processes, 5, 4, ["--preset", "toy"], None, 1, 1.0)
    one, two = started
    assert one[1].endswith("train.py") and two[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert one[2:-1] == two[6:-1]  # all but the folder


def test_wrong_flags_are_refused_with_the_trainers_own_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        speed.main(["--num_steps", "5", "--modell", "x"])
    assert stopped.value.code == 2 and "unknown argument '--modell'" in capsys.readouterr().err


def test_operations_are_those_of_the_layers(model_folder):
    """The counter against one layer by hand, and guidance doubling all."""
    config = parse(["--preset", "toy", "--model", str(model_folder)])
    pipe = load_pipeline(str(model_folder), torch.device("cpu"))
    plain = speed.flops_per_entry(config, pipe)
    guided = speed.flops_per_entry(dataclasses.replace(config, guidance_scale=3.0), pipe)
    assert guided == 2 * plain
    unet = pipe.unet
    done = []
    for layer in unet.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda layer, _, out: done.append(2 * out.numel() * layer.weight[0].numel()))
    text = torch.zeros(1, 16, unet.config.cross_attention_dim)
    unet(torch.zeros(1, unet.config.in_channels, *[unet.config.sample_size] * 2), torch.ones(1), text)
    assert 0.3 * plain < sum(done) < plain  # convolutions are the larger part of this small UNet, not all


@pytest.mark.parametrize(
    "flags, passes",
    [
        ("", (5, 4, 12)),
        ("--reference_steps 1", (5, 1, 12)),
        ("--lora_rank 2 --num_steps 10", (10, 9, 18)),
        ("--method ddpo", (5, 0, 12)),
        ("--updates_per_epoch 10", (5, 8, 156)),
    ],
)
def test_passes_of_an_epoch(flags, passes, model_folder):
    """The miniature's last step has no noise, and so no log-prob."""
    scheduler = load_pipeline(str(model_folder), torch.device("cpu")).scheduler
    config = parse(["--preset", "toy", *flags.split()])
    found = speed.passes(config, speed.noisy_steps(config, scheduler))
    assert found == dict(zip(("sample", "reference", "update"), passes, strict=True))
