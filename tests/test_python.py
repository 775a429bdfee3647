"""What the commands do, by function."""

import json
import re
import subprocess
import sys
import threading

import pytest
from conftest import ROOT
from test_train import metrics

from config import Config, LasroConfig, preset
from evaluate import evaluate
from rewards import RewardError
from train import train

SMALL = dict(epochs=2, prompts_per_epoch=2, images_per_prompt=2, num_steps=3)


def redness(images, prompts):
    red, green, blue = images.mean((2, 3)).T
    return red - (green + blue) / 2


def test_the_page_runs(monkeypatch, tmp_path, capsys):
    (code,) = re.findall("```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(tmp_path)
    exec(code, found := {})
    told = capsys.readouterr()
    base, tuned = found["rows"]
    assert tuned["mean"] > base["mean"] and f"tuned scores {tuned['mean']:.2f}" in told.out
    settings, record = (
        json.loads((tmp_path / "runs" / "redder" / "config.json").read_text()),
        metrics(tmp_path / "runs" / "redder"),
    )
    assert settings["reward"] == ["redness"] and settings["prompts"].startswith("4 of the user's own, ")
    assert record[10]["reward_mean"] > record[1]["reward_mean"]
    lines = [line for line in told.err.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 10 and all("epoch" not in line for line in told.out.splitlines())
    last = f"epoch 10 of 10: reward {record[10]['reward_mean']:.4g}, held out {record[10]['eval_reward']:.4g}, KL "
    assert lines[-1].startswith(f"{last}{record[10]['kl_nats']:.4g} nats, ") and lines[-1].endswith(" s, 00:00 left")


def test_a_run_is_quiet_goes_on_and_works_in_a_thread(model_folder, tmp_path, capsys):
    def run(epochs, prompts=("a cat", "a dog")):
        settings = SMALL | dict(epochs=epochs, model=str(model_folder), output_dir=str(tmp_path), quiet=True)
        train(preset("toy", **settings), reward=redness, prompts=list(prompts), eval_prompts=[])

    run(1)
    with pytest.raises(ValueError, match=r"already holds a run, .*: prompts=2 of the user's own, .* and it ran with 2 of"):
        run(2, ["a cat", "a wolf"])
    thread = threading.Thread(target=run, args=(2,))
    thread.start()
    thread.join()
    told = capsys.readouterr()
    assert [line["epoch"] for line in metrics(tmp_path)] == [0, 1, 2] and metrics(tmp_path)[2]["eval_reward"] is None
    assert told.err.splitlines() == [f"{tmp_path} goes on from epoch_000001"] and told.out.count("the finetuned pipeline") == 2


def test_what_is_wrong_is_an_exception(model_folder, tmp_path):
    config = preset("toy", model=str(model_folder), output_dir=str(tmp_path / "run"), **SMALL)
    for wrong, message in (
        (lambda: preset("tiny"), "unknown preset 'tiny': use small-hpsv2"),
        (lambda: train(Config(preset="mine", prompts="none.txt", output_dir=str(tmp_path))), "preset toy` needs no GPU"),
        (lambda: train(preset("toy", method="prpd")), "method must be prdp or ddpo or dpok or d3po or grpo, not 'prpd'"),
        (lambda: train(preset("toy", train_batch_size=-1)), "train_batch_size must be at least 1, or 0 for auto, not -1"),
        (lambda: train(config, prompts=[]), "prompts is an empty list"),
        (lambda: evaluate(protocol="huge"), "protocol must be none or small or large, not 'huge'"),
        (
            lambda: evaluate(models=["a=toy"], prompts={"mine": []}, rewards=["toy-alignment"]),
            "prompt set 'mine' is an empty list",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(RewardError, match="'broken' raised ZeroDivisionError"):
        train(config, reward=broken, prompts=["a cat"], eval_prompts=[])


def broken(images, prompts):
    raise ZeroDivisionError("nothing")


def test_lasro_is_a_function_too(model_folder, tmp_path):
    import lasro

    few = dict(epochs=1, prompts_per_epoch=2, images_per_prompt=2, surrogate_batch=2, generator_batch=2, anchor_pictures=2,
               pretraining_epochs=0, teacher_steps=2, surrogate_updates=1, generator_updates=1)  # fmt: skip
    places = dict(model=str(model_folder), teacher=str(model_folder), output_dir=str(tmp_path))
    run = lasro.train(LasroConfig(**few, **places), reward=redness, prompts=["a cat", "a dog"], eval_prompts=["a cow"])
    assert metrics(run)[1]["eval_reward"] is not None and (run / "pipeline" / "model_index.json").exists()


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train, evaluate, lasro"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "" and not list(tmp_path.iterdir())
