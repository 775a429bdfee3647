"""What trackers have of a run: read back from where they keep it, or from a module that stands for theirs."""

import json
import signal
import sqlite3
import sys
import types
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from conftest import TRACKIO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import arguments, metrics

import train
from plumbing import trackers

FLAGS = ["--updates_per_epoch", "1", "--eval_every", "2", "--save_every", "1"]


def run_and_go_on(model_folder, run, name) -> list[dict]:
    """A run of two epochs that goes on to the third -> its record."""
    for epochs in ("2", "3"):
        train.main(arguments(model_folder, run, *FLAGS, "--log_to", name, "--epochs", epochs))
    return metrics(run)


def test_tensorboard_gets_settings_metrics_and_pictures(model_folder, tmp_path):
    lines = run_and_go_on(model_folder, tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    for name in ("reward_mean", "kl_nats", "loss"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(line["epoch"], pytest.approx(line[name])) for line in lines[1:]], name
    assert len(events.Scalars("seconds/sample")) == 3 and events.Scalars("seconds/sample")[0].value > 0
    pictures = {event.step: event for event in events.Images("samples")}
    assert list(pictures) == [0, 2, 3]  # where there was an evaluation
    height, width, _ = plt.imread(tmp_path / "run" / "samples" / "epoch_000000.png").shape
    assert (pictures[0].height, pictures[0].width) == (height, width)
    (settings,) = (tmp_path / "run" / "tensorboard").glob("*/hparams.yml")
    assert "preset: toy" in settings.read_text()


def test_of_two_processes_one_logs(on_two_processes):
    (folder,) = on_two_processes["prdp"].folder.glob("tensorboard")
    events = EventAccumulator(str(folder))
    events.Reload()
    lines = metrics(on_two_processes["prdp"].folder)
    assert [event.step for event in events.Scalars("loss")] == [1, 2] and len(list(folder.glob("events*"))) == 1
    assert events.Scalars("reward_mean")[-1].value == pytest.approx(lines[-1]["reward_mean"])


def test_trackio_gets_settings_metrics_and_pictures(model_folder, tmp_path):
    lines, store = run_and_go_on(model_folder, tmp_path / "mine", "trackio"), Path(TRACKIO.name)
    with sqlite3.connect(store / f"{trackers.PROJECT}.db") as database:
        (settings,) = database.execute("SELECT config FROM configs").fetchone()
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _, _ in rows} == {"mine"}
    logged = [(step, json.loads(found)) for _, step, found in rows]
    assert [(step, found["loss"]) for step, found in logged if "loss" in found] == [
        (line["epoch"], pytest.approx(line["loss"])) for line in lines[1:]
    ]
    assert [step for step, found in logged if "samples" in found] == [0, 2, 3]
    assert len(list(store.rglob("*.png"))) == 3 and json.loads(settings)["preset"] == "toy"


def test_wandb_goes_on_in_the_same_curves(model_folder, tmp_path, monkeypatch):
    calls, begun = [], []
    run = types.SimpleNamespace(id="abc", log=lambda values, step: calls.append((step, values)), finish=lambda: None)
    fake = types.SimpleNamespace(
        init=lambda **settings: begun.append(settings) or run, Image=lambda file: file,
        config=types.SimpleNamespace(update=lambda values, allow_val_change: begun.append(values)),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", fake)
    lines = run_and_go_on(model_folder, tmp_path / "run", "wandb")
    first, settings, second = begun
    assert first["id"] is None and first["name"] == "run" and settings["preset"] == "toy" and second["id"] == "abc"
    assert [(step, values["loss"]) for step, values in calls if "loss" in values] == [(n, lines[n]["loss"]) for n in (1, 2, 3)]
    pictures = {step: values["samples"] for step, values in calls if "samples" in values}
    assert pictures == {n: [str(tmp_path / "run" / "samples" / f"epoch_{n:06d}.png")] for n in (0, 2, 3)}


def test_a_tracker_that_fails_does_not_end_the_run(model_folder, tmp_path, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr(trackers.TensorBoardTracker, "log", lambda self, values, step: sent.append(step) or 1 / 0)
    train.main(arguments(model_folder, tmp_path / "run", *FLAGS, "--log_to", "tensorboard", "--epochs", "2"))
    told = capsys.readouterr().err
    assert told.count("warning: --log_to tensorboard failed, and gets no more of this run: ZeroDivisionError") == 1
    assert sent == [0] and len(metrics(tmp_path / "run")) == 3 and (tmp_path / "run" / "pipeline").exists()


def test_a_tracker_that_fails_at_the_end_does_not_lose_the_result(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers.TensorBoardTracker, "finish", lambda self: 1 / 0)
    train.main(arguments(model_folder, tmp_path / "run", *FLAGS, "--log_to", "tensorboard", "--epochs", "1"))
    assert "warning: --log_to tensorboard failed" in capsys.readouterr().err and (tmp_path / "run" / "pipeline").exists()


def test_an_epoch_in_whose_updates_a_signal_came_is_logged(model_folder, tmp_path, monkeypatch):
    flags, check = arguments(model_folder, tmp_path / "run", *FLAGS, "--log_to", "tensorboard", "--epochs", "2"), train.Run.check
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Run, "check", lambda *all: check(*all) or signal.raise_signal(signal.SIGTERM))
        train.main(flags)
    train.main(flags)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    lines = metrics(tmp_path / "run")
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (line["epoch"], pytest.approx(line["loss"])) for line in lines[1:]
    ]
    assert [event.step for event in events.Scalars("eval_reward")] == [0, 2]
    assert events.Scalars("rounding/0")[0].value == pytest.approx(lines[1]["rounding"][0])


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(name, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(model_folder, tmp_path / "run", "--log_to", name))
    assert stopped.value.code == 2 and f"--log_to {name} needs a package: pip install {name}" in capsys.readouterr().err
