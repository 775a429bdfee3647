"""The queue, the search and the figures of reproduce.py, on the small random-weight pipeline."""

import argparse
import dataclasses
import json
import math
import shutil
import sys

import pytest
import torch
from conftest import ROOT

import evaluate
import lasro
import reproduce
import train
from benchmarks import gradient_variance
from config import LASRO_PRESETS, LasroConfig, check, check_lasro
from plumbing import figures, jobs, plots


def test_smoothed_is_the_mean_of_the_last_epochs():
    assert figures.smoothed([0.0, 2.0, 4.0], 2) == [0.0, 1.0, 3.0]


def test_every_variant_has_its_schedule_and_every_target_its_variants():
    for method, scale, flags in reproduce.VARIANTS.values():
        flags = f"{reproduce.SCALES[scale]} {reproduce.METHODS[method, scale]} {flags}".split()
        if method == "lasro":
            check_lasro(config := reproduce.parse(flags, LasroConfig, LASRO_PRESETS), 1)
            queries = config.prompts_per_epoch * config.images_per_prompt * config.num_steps
        else:
            check(config := reproduce.parse(flags), 1)
            queries = config.prompts_per_epoch * config.images_per_prompt
        if scale == "few":
            assert (config.model, config.num_steps, config.prompts, queries) == ("toy-turbo", 2, "toy-train", 128)
            continue
        large = scale in ("large", "flow")
        assert config.method == method and config.prompts == ("toy-train" if large else "toy-small")
        assert config.model == ("toy-flow" if scale == "flow" else "toy")
        assert queries == (128 if scale == "prediction" else 64)
    used = {name for target in figures.TARGETS.values() for name in target.variants}
    assert used == reproduce.VARIANTS.keys()


def test_signal_of_gradients_made_by_hand():
    torch.manual_seed(0)
    mean, noise = torch.zeros(4000), torch.randn(200, 4000)
    mean[0] = 20.0  # |signal|^2 = 400, |noise|^2 = 4000
    found, left_out = gradient_variance.signal(mean + noise)
    others = [gradient_variance.signal(mean + torch.randn(20, 4000))[0] for _ in range(60)]
    cosines = torch.tensor([row["cosine"] for row in others])
    errors = [row["standard_error"] for row in others[:20]]
    assert sum(errors) / 20 == pytest.approx(cosines.std().item(), rel=0.35)
    assert found["cosine"] == pytest.approx(400 / 4400, rel=0.05)
    assert found["relative_variance"] == pytest.approx(10, rel=0.05)
    # Paired: with the same noise and a slightly weaker signal the difference is known far better than either cosine.
    weaker, left_out_of_weaker = gradient_variance.signal(0.95 * mean + noise)
    paired = gradient_variance.jackknife(left_out_of_weaker - left_out)
    assert found["cosine"] - weaker["cosine"] > 4 * paired and paired < found["standard_error"] / 4


def test_the_search_ends_between_two_worse_rates(monkeypatch, tmp_path):
    made: list[str] = []
    best = {"rising": 0.9, "falling": -0.9, "peak": 0.0, "always": 9.0, "tie": 0.24}  # the last is about as good at 3e-4
    monkeypatch.setattr(reproduce, "METHODS", {(name, "small"): "" for name in best})
    monkeypatch.setattr(reproduce, "training", lambda name, *_: made.append(name))
    monkeypatch.setattr(reproduce, "work_off", lambda *_: None)

    def read_metrics(run):
        """Rewards that fall with the distance, in powers of ten from 1e-4, to the method's best rate; only the end counts.

        There they go up and down by 0.04 in the last two of eight epochs, which is a standard error of 0.04.
        """
        _, name, _, rate = run.name.removesuffix("-100").split("-", 3)
        distance = abs(math.log10(float(rate) / 1e-4) - best[name])
        return [{"epoch": 0}, *({"reward_mean": 5.0} for _ in range(6)), *({"reward_mean": d - distance} for d in (-0.04, 0.04))]

    monkeypatch.setattr(reproduce, "read_metrics", read_metrics)
    options = argparse.Namespace(folder=tmp_path, results=tmp_path, argv=[], jobs=1)
    chosen = reproduce.learning_rates([(name, "small") for name in best], options)
    assert [chosen[name, "small"] for name in best] == ["1e-3", "1e-5", "1e-4", "3e-3", "1e-4"]
    tried = {name: [m.split()[3] for m in made if m.split()[1] == name] for name in best}
    assert tried["peak"] == ["3e-5", "1e-4", "3e-4"]
    assert tried["tie"] == ["3e-5", "1e-4", "3e-4", "1e-3"]  # also above the best, 3e-4, which is 0.003 better
    assert tried["rising"] == ["3e-5", "1e-4", "3e-4", "1e-3", "3e-3"] == tried["always"]
    assert tried["falling"] == ["3e-5", "1e-4", "3e-4", "1e-5", "3e-6"]
    reproduce.learning_rates([("peak", "small")], options)
    rows = json.loads((tmp_path / "learning-rates.json").read_text())["results"]
    assert sorted(row["method"] for row in rows) == sorted(best)  # the others' are kept


@pytest.fixture
def began(monkeypatch) -> list[list[str]]:
    """Makes the queue work here and now, one job after the other, and collects their commands."""
    commands: list[list[str]] = []
    mains = {"train.py": train.main, "evaluate.py": evaluate.main, "lasro.py": lasro.main}

    def here(queue, title, at_once, logs):
        for job in queue:
            script, *argv = job.command[1:]
            commands.append([script, *argv])
            mains[script](argv)

    monkeypatch.setattr(reproduce, "work_off", here)
    return commands


@pytest.fixture
def tiny(monkeypatch, model_folder, tmp_path):
    """Runs of two epochs at one learning rate, on four prompts."""
    shorter = "--prompts_per_epoch 2 --images_per_prompt 4 --save_every 1 --keep_every 1"
    monkeypatch.setattr(reproduce, "SCALES", {"small": f"{reproduce.SCALES['small']} {shorter} --model {model_folder}"})
    monkeypatch.setattr(reproduce, "EPOCHS", {"small": 2})
    evaluation = ("small", str(model_folder), "--prompts toy-small --images_per_prompt 2 --num_steps 5")
    monkeypatch.setattr(reproduce, "EVALUATIONS", {"small": evaluation})
    monkeypatch.setattr(reproduce, "LEARNING_RATES", ("1e-3", "1e-3", "0.5"))  # it begins with the last
    monkeypatch.chdir(ROOT)
    return ["fig7", "--seeds", "3", "--jobs", "2", "--folder", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]


def test_a_target_from_search_to_figure_and_nothing_twice(tiny, began, tmp_path, monkeypatch, capsys):
    reproduce.main(tiny)
    search = json.loads((tmp_path / "results" / "learning-rates.json").read_text())
    (found,) = search["results"]
    assert search["seed"] == 100 and set(found["reward"]) == {"1e-3", "0.5"}
    assert found["chosen"] == max(found["reward"], key=found["reward"].get)
    result = json.loads((tmp_path / "results" / "fig7.json").read_text())
    assert result["versions"]["torch"] and result["command"].startswith("python reproduce.py fig7")
    assert list(result["runs"]) == ["PRDP", "PRDP offline"]
    assert len(result["runs"]["PRDP"]["3"]["reward_mean"]) == 2
    assert set(result["scores"]) == {"base", "PRDP@1", "PRDP", "PRDP offline@1", "PRDP offline"}
    scores = {name: seeds["3"]["toy-small"]["toy-alignment"]["mean"] for name, seeds in result["scores"].items()}
    assert len({scores[name] for name in ("base", "PRDP@1", "PRDP")}) == 3
    assert f"--learning_rate {found['chosen']} --epochs 2" in result["settings"]["PRDP offline"]
    (made,) = json.loads((tmp_path / "results" / "time.json").read_text())
    assert made["command"] == result["command"] and made["machine"] == result["machine"] and made["seconds"] > 0
    assert plots.np.asarray(plots.Image.open(tmp_path / "results" / "fig7.png")).std() > 5

    shutil.rmtree(tmp_path / "runs" / "evaluation-small-seed3")
    shutil.rmtree(tmp_path / "runs" / "PRDP-3" / "pipeline")  # as if stopped before the end: this run only is taken up
    began.clear()
    before = (tmp_path / "results" / "fig7.json").read_text()
    reproduce.main(tiny)
    (again,) = [c for c in began if c[0] == "train.py"]
    assert again[-1] == str(tmp_path / "runs" / "PRDP-3")
    assert (tmp_path / "results" / "fig7.json").read_text() == before
    assert len(json.loads((tmp_path / "results" / "time.json").read_text())) == 2
    began.clear()
    reproduce.main(tiny)
    assert not [c for c in began if c[0] == "train.py"]

    monkeypatch.setattr(reproduce, "EPOCHS", {"small": 3})
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(tiny)
    assert stopped.value.code == 2 and "holds a run with other settings" in capsys.readouterr().err


def test_models_of_few_steps(tiny, began, model_folder, tmp_path, monkeypatch):
    """Two programs behind one target; reward by queries and seconds, in two steps and in one."""
    small = "--prompts toy-small --eval_prompts tests/prompts.txt --prompts_per_epoch 2 --images_per_prompt 4 --eval_every 1"
    flags = "--preset toy-turbo --pretraining_epochs 1 --pretraining_updates 1 --surrogate_updates 1 --generator_updates 1 "
    flags += f"--surrogate_batch 2 --generator_batch 4 --anchor_pictures 4 --teacher {model_folder}"
    monkeypatch.setattr(reproduce, "SCALES", {"few": f"--model {model_folder} --num_steps 2"})
    monkeypatch.setattr(reproduce, "EPOCHS", {"few": 2})
    monkeypatch.setattr(reproduce, "LEARNING_RATES", ("1e-3", "1e-3", "1e-3"))
    monkeypatch.setattr(reproduce, "RATES", {("prdp", "few"): "1e-3"})  # another test searches for train.py
    methods = {"lasro": flags, "prdp": "--preset toy"}
    monkeypatch.setattr(reproduce, "METHODS", {(name, "few"): f"{flags} {small}" for name, flags in methods.items()})
    flags = "--prompts toy-small --images_per_prompt 2 --num_steps"
    evaluations = {how: ("few", str(model_folder), f"{flags} {n}") for how, n in (("two steps", 2), ("one step", 1))}
    monkeypatch.setattr(reproduce, "EVALUATIONS", evaluations)
    fewer = dataclasses.replace(figures.TARGETS["lasro"], panels={"": ["LaSRO frozen", "PRDP of two steps"]})
    monkeypatch.setitem(figures.TARGETS, "lasro", fewer)
    reproduce.main(["lasro", *tiny[1:]])
    result = json.loads((tmp_path / "results" / "lasro.json").read_text())
    runs = {name: seeds["3"] for name, seeds in result["runs"].items()}
    assert list(runs) == fewer.variants and {command[0] for command in began} == {"train.py", "lasro.py", "evaluate.py"}
    frozen, prdp = runs.values()
    assert [at["queries"] for at in frozen["evaluated"]] == [0, 16, 32]
    assert [at["queries"] for at in prdp["evaluated"]] == [0, 8, 16]
    for run in (frozen, prdp):
        start, middle, end = (at["seconds"] for at in run["evaluated"])
        assert start == 0 < middle < end
        assert run["evaluated"][0]["eval_reward"] == pytest.approx(prdp["evaluated"][0]["eval_reward"], abs=1e-4)
    assert [len(by_step) for by_step in frozen["surrogate_accuracy"]] == [2, 2] and "surrogate_accuracy" not in prdp
    assert set(result["scores"]) == {"base", *runs}
    for seeds in result["scores"].values():
        assert set(seeds["3"]) == {"two steps", "one step"}
        two, one = (seeds["3"][how]["toy-alignment"]["mean"] for how in ("two steps", "one step"))
        assert two != one
    assert len({seeds["3"]["two steps"]["toy-alignment"]["mean"] for seeds in result["scores"].values()}) == 3
    for name in ("lasro", "lasro-pictures"):
        assert plots.np.asarray(plots.Image.open(tmp_path / "results" / f"{name}.png")).std() > 5


def python(name: str, code: str) -> jobs.Job:
    return jobs.Job(name, [sys.executable, "-c", code])


def test_a_failing_run_is_named(tiny, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "training", lambda name, *_: python(name.replace(" ", "-"), "raise SystemExit('too hot')"))
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(tiny)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stopped.value.code == 2 and "search-prdp-small-0.5 failed" in errors[-1] and errors[-1].endswith("too hot")


def waits(mine, other=None, then="") -> str:
    """Python that leaves the file `mine`, waits for `other`, which ends in an error after half a minute, and goes on."""
    return f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
pathlib.Path({str(mine)!r}).touch()
for _ in range(3000):
    if pathlib.Path({str(other)!r}).exists():
        break
    time.sleep(0.01)
else:
    sys.exit("alone")
{then}
"""


def test_the_queue_works_side_by_side_and_stops_what_runs_when_one_fails(tmp_path):
    """Two that wait for each other's file end only if both run at once; then one fails while the other would go on waiting."""
    a, b, begun = tmp_path / "a", tmp_path / "b", tmp_path / "begun"
    meeting = [python("one", waits(a, b)), python("two", waits(b, a))]
    jobs.work_off([*meeting, python("three", "print('later')")], "queue", 2, tmp_path)
    assert (tmp_path / "three.log").read_text() == "later\n"
    endless = python("endless", waits(begun, tmp_path / "never"))
    failing = python("failing", waits(tmp_path / "c", begun, "print('first'); sys.exit('worse')"))
    with pytest.raises(ValueError, match=r"failing failed, see .*failing\.log: worse"):
        jobs.work_off([endless, failing, python("waiting", "")], "queue", 2, tmp_path)
    assert "KeyboardInterrupt" in (tmp_path / "endless.log").read_text()
    assert not (tmp_path / "waiting.log").exists()


def test_wrong_arguments(capsys):
    for argv, message in (
        (["fig4"], "invalid choice: 'fig4'"),
        (["fig3", "--jobs", "0"], "--jobs must be at least 1"),
        ([], "required: target"),
    ):
        with pytest.raises(SystemExit) as stopped:
            reproduce.main(argv)
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and message in line


def test_gradient_variance_runs_every_method(monkeypatch, model_folder, tmp_path):
    monkeypatch.setattr(gradient_variance, "ALL", f"{gradient_variance.ALL} --model {model_folder} --prompts_per_epoch 2")
    monkeypatch.setattr(gradient_variance, "WARM_UP", 2)
    output = tmp_path / "variance.json"
    gradient_variance.main(["--epochs", "3", "--output", str(output)])
    rows = json.loads(output.read_text())["results"]
    assert set(rows) == set(gradient_variance.VARIANTS)
    assert all(row["above_prdp"] == row["cosine"] - rows["PRDP"]["cosine"] for row in rows.values())
    assert [name for name, row in rows.items() if row["above_prdp_standard_error"] == 0] == ["PRDP"]
    values = [row["cosine"] for row in rows.values()]
    assert len(set(values)) == len(values)  # every variant is its own
