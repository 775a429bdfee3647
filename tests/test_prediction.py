"""Predicted reward differences of runs on fresh trajectories, and the share of the reward that Gaussian steps can predict."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import answering, make_policy

import train
from benchmarks import prediction
from config import preset
from plumbing import figures, plots
from plumbing.pipeline import decode_latents, encode_prompts, load_pipeline
from plumbing.prompts import draw_prompts, load_prompts
from plumbing.trainable import open_model
from rdp_loss import prediction_quality
from rewards import load_reward
from sampler import EVALUATION, Schedule, log_prob_table, sample_trajectories

CPU = torch.device("cpu")
ALPHA_BAR = torch.tensor([0.2, 0.5, 0.8, 1.0], dtype=torch.float64)


class Rows:
    """A condition that says nothing."""

    def __getitem__(self, rows):
        return self


@pytest.mark.parametrize("reward", ["linear", "square"])
def test_share_on_a_chain_with_a_known_answer(reward):
    """A network that puts out zero: one of 16 coordinates of x_0 is y = m + sum_i c_i z_i, and r = y or r = y^2.

    Few branches, so that what other coordinates and the variance of r would add if they were let in is larger than the answer.
    Of y all can be predicted. Of y^2 a step decides 4 m^2 c^2 + 2 c^2 (c^2 + 2 v), v the variance still to come, and the part
    that is linear in its noise is 4 m^2 c^2.
    """
    schedule = Schedule(torch.tensor([3, 2, 1]), ALPHA_BAR.sqrt(), (1 - ALPHA_BAR).sqrt())
    policy = dataclasses.replace(answering(schedule, torch.zeros(1, 1, 4, 4)), dtype=torch.float64)
    policy = dataclasses.replace(policy, denoise=lambda x, t, cond: torch.zeros_like(x))
    exponent = {"linear": 1, "square": 2}[reward]
    found = [prediction.gaussian_share(policy, Rows(), lambda x_0: x_0[:, 0, 0, 0] ** exponent, 10, seed) for seed in range(2500)]
    variances, explained = (torch.stack(values).mean(0) for values in zip(*found, strict=True))
    c2 = (schedule.weights[2][:2] / schedule.alpha[1:3]) ** 2  # the last step has no noise
    m2 = 1 / schedule.alpha[0] ** 2 + torch.tensor([0.0, c2[0]])  # E m^2 before each step
    v = torch.stack([c2[0] + c2[1], c2[1]])
    expected = (v, c2) if reward == "linear" else (4 * m2 * v + 2 * v**2, 4 * m2 * c2)
    torch.testing.assert_close(variances, expected[0], rtol=0.12, atol=0)
    torch.testing.assert_close(explained, expected[1], rtol=0.12, atol=0)


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """The same run with two seeds."""
    folder = tmp_path_factory.mktemp("prediction")
    flags = (
        "--preset toy --prompts toy-small --eval_prompts= --epochs 2 --save_every 1 --keep_every 1 --num_steps 3 "
        "--prompts_per_epoch 2 --images_per_prompt 2 --learning_rate 1e-3 --log_prob_reduction sum --step_reduction sum "
        "--kl_weight 0.1 --shared_x_T --reward toy-colourfulness"
    ).split()
    for seed in (0, 1):
        train.main([*flags, "--model", str(model_folder), "--seed", str(seed), "--output_dir", str(folder / str(seed))])
    return folder


def test_curves_and_pairs_of_runs(runs, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "PROMPTS", 3)
    monkeypatch.setattr(prediction, "PICTURES", 4)
    output = tmp_path / "prediction.json"
    few = ["--states", "3", "--branches", "4", "--steps", "3", "4"]
    prediction.main(["--output", str(output), *few, "--runs", f"a={runs}/0", f"a={runs}/1"])
    result = json.loads(output.read_text())
    assert result["versions"]["torch"] and list(result["runs"]) == ["a"] and list(result["runs"]["a"]) == ["0", "1"]
    titles = ("toy-colourfulness, T = 3", "toy-colourfulness, T = 4", "toy-colourfulness, T = 3, after a")
    assert tuple(result["ceilings"]) == titles
    ceiling, longer, after = result["ceilings"].values()
    assert len(longer["decided_by_step"]) == len(ceiling["decided_by_step"]) + 1 and ceiling["share"] != after["share"]
    assert sum(ceiling["decided_by_step"]) == pytest.approx(1) and sum(ceiling["predicted_by_step"]) == pytest.approx(
        ceiling["share"]
    )

    of = result["runs"]["a"]["1"]
    assert of["settings"]["num_steps"] == 3 and of["epochs"] == [0, 1, 2]
    assert [len(curve) for curve in of["training"].values()] == [2, 2]
    base = load_pipeline(str(model_folder), CPU)
    reward, reference = load_reward("toy-colourfulness"), make_policy(base, 3, 1.0, log_prob_reduction="sum")
    model = open_model(str(runs / "1"), "", CPU)
    policy = make_policy(model, 3, 1.0, log_prob_reduction="sum")
    for where, prompts in (
        ("seen", draw_prompts(load_prompts("toy-small"), 3, 0, 1)),
        ("held out", load_prompts("toy-heldout")),
    ):
        rhat, rewards = torch.zeros(3, 4), torch.zeros(3, 4)
        for n in range(3):
            cond = encode_prompts(model, [prompts[n]] * 4)
            drawn = sample_trajectories(policy, cond, [(1, EVALUATION, n, b) for b in range(4)], 4, shared_x_T=True)
            rhat[n] = (drawn.log_probs - log_prob_table(reference, drawn, 4)).sum(1)
            rewards[n] = reward(decode_latents(model, drawn.x_0), [prompts[n]] * 4)
        curves = of["curves"][where]
        assert curves["correlation"][0] == curves["slope"][0] == curves["kl_nats"][0] == 0
        assert (curves["correlation"][2], curves["slope"][2]) == pytest.approx(prediction_quality(rhat, rewards, 0.1), abs=2e-3)
        assert curves["variance"][2] == pytest.approx(rewards.var(1).mean().item(), abs=1e-3)
        assert curves["reward"][2] == pytest.approx(rewards.mean().item(), abs=1e-3)
        assert curves["kl_nats"][2] == pytest.approx(rhat.mean().item(), abs=1e-3)
        for title, values in (("predicted", 0.1 * rhat), ("actual", rewards)):
            centred = values - values.mean(1, keepdim=True)
            torch.testing.assert_close(torch.tensor(of["last"][where][title]), centred, atol=1e-3, rtol=0)
    drawing = tmp_path / "prediction.png"
    figures.draw_prediction({"": ["a"]}, result, drawing)
    assert plots.np.asarray(plots.Image.open(drawing)).std() > 5


def test_what_the_output_holds_of_the_same_runs_is_not_measured_again(runs, tmp_path, monkeypatch):
    began = []
    monkeypatch.setattr(prediction, "measure", lambda run, config: began.append(run.name) or prediction.recorded(run, config))
    monkeypatch.setattr(prediction, "ceiling", lambda config, *rest: began.append("ceiling") or {"share": config.seed})
    output, of = tmp_path / "prediction.json", [f"a={runs}/0", f"a={runs}/1"]
    prediction.main(["--output", str(output), "--runs", of[0]])
    assert began == ["0", *3 * ["ceiling"]]
    prediction.main(["--output", str(output), "--runs", *of])
    assert began == ["0", *3 * ["ceiling"], "1"]
    result = json.loads(output.read_text())
    assert list(result["runs"]["a"]) == ["0", "1"] and len(result["ceilings"]) == 3
    result["runs"]["a"]["1"]["training"]["slope"][0] += 1  # another run's
    output.write_text(json.dumps(result))
    prediction.main(["--output", str(output), "--runs", *of])
    assert (
        began[5:] == ["1"]
        and json.loads(output.read_text())["runs"]["a"]["1"]["training"]["slope"][0]
        != result["runs"]["a"]["1"]["training"]["slope"][0]
    )


def test_wrong_input(tmp_path, capsys):
    for run, message in (([f"a={tmp_path}"], "no run folder"), ([str(tmp_path)], "takes name=folder"),
                         (["a=b", "--steps", "1"], "--steps: each must be at least 2")):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            prediction.main(["--output", str(tmp_path / "x.json"), "--runs", *run])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(preset("toy", method="ddpo"))))
    with pytest.raises(SystemExit) as stopped:
        prediction.main(["--output", str(tmp_path / "x.json"), "--runs", f"a={tmp_path}"])
    assert stopped.value.code == 2 and "is no run of --method prdp" in capsys.readouterr().err
    assert not Path(tmp_path / "x.json").exists()
