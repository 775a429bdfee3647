"""evaluate.py: numbers that can be recomputed, the same noise for every model, and wrong input."""

import json

import pytest
import torch
from conftest import make_pipeline, make_policy

import evaluate
import train
from prompts import load_prompts
from rewards import load_reward
from sampler import EVALUATION, sample_images

FLAGS = (
    "--prompts toy-small --rewards toy-alignment toy-colourfulness --images_per_prompt 2 --num_steps 2 --guidance_scale 1".split()
)


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "other")):
        make_pipeline(seed).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def evaluated(two_models, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    evaluate.main([*FLAGS, "--models", f"base={two_models}/base", f"other={two_models}/other", "--output_dir", str(out)])
    return out


def test_numbers_come_from_the_per_prompt_scores(evaluated):
    result = json.loads((evaluated / "results.json").read_text())
    assert result["versions"]["torch"] and result["machine"]["cpu_cores"] and "--images_per_prompt 2" in result["command"]
    rows = {(row["model"], row["reward"]): row for row in result["results"]}
    assert len(rows) == 4
    table = (evaluated / "table.md").read_text()
    for (_, reward), row in rows.items():
        values = torch.tensor(row["per_prompt"], dtype=torch.float64)
        base = torch.tensor(rows["base", reward]["per_prompt"], dtype=torch.float64)
        assert len(values) == 45
        assert row["mean"] == pytest.approx(values.mean().item())
        assert row["standard_error"] == pytest.approx((values.var() / 45).sqrt().item())
        assert row["gain"] == pytest.approx((values - base).mean().item())
        assert f"{row['mean']:.4f} ± {row['standard_error']:.4f}" in table
    assert rows["base", "toy-alignment"]["gain"] == 0 != rows["other", "toy-alignment"]["gain"]
    resampled = values[torch.randint(45, (4000, 45), generator=torch.Generator().manual_seed(0))].mean(1).std()
    assert row["standard_error"] == pytest.approx(resampled.item(), rel=0.05)
    assert (evaluated / "pictures-toy-small.png").stat().st_size > 1000


def test_scores_are_those_of_the_named_noise(evaluated):
    """Prompt 3, picture 1 by hand: its noise is (seed, EVALUATION, 3, 1) for every model and any batch."""
    prompt = load_prompts("toy-small")[3]
    pipe = make_pipeline(0)
    policy = make_policy(pipe, num_steps=2, guidance_scale=1.0)
    names = [(0, EVALUATION, 3, b) for b in range(2)]
    score = load_reward("toy-colourfulness")(sample_images(policy, pipe, [prompt] * 2, names, 2), [prompt] * 2).mean()
    rows = json.loads((evaluated / "results.json").read_text())["results"]
    saved = next(row for row in rows if row["model"] == "base" and row["reward"] == "toy-colourfulness")
    assert saved["per_prompt"][3] == pytest.approx(score.item(), abs=1e-5)


def test_batch_size_does_not_matter(two_models, evaluated, tmp_path):
    evaluate.main([*FLAGS, "--models", f"base={two_models}/base", "--batch_size", "7", "--output_dir", str(tmp_path)])
    whole, parts = (json.loads((path / "results.json").read_text())["results"] for path in (evaluated, tmp_path))
    for row, expected in zip(parts, whole, strict=False):
        assert row["per_prompt"] == pytest.approx(expected["per_prompt"], abs=1e-4)


def test_run_supplies_what_is_not_given(two_models, tmp_path):
    run = tmp_path / "run"
    train.main(
        ["--preset", "toy", "--model", f"{two_models}/base", "--prompts", "toy-small", "--eval_prompts", "", "--epochs", "1",
         "--prompts_per_epoch", "1", "--images_per_prompt", "2", "--num_steps", "2", "--reward", "toy-colourfulness=2",
         "--output_dir", str(run)]
    )  # fmt: skip
    config = evaluate.parse(["--run", str(run), "--images_per_prompt", "1"])
    assert (config.num_steps, config.guidance_scale, config.prompts) == (2, 1.0, ["toy-small"])
    assert config.rewards == ["toy-colourfulness"] and config.models[1] == f"tuned={run}/pipeline"
    evaluate.main(["--run", str(run), "--images_per_prompt", "1"])
    assert (run / "evaluation" / "table.md").read_text().startswith("| prompts | reward | base | tuned |")


def test_wrong_input(capsys, two_models, tmp_path):
    good = [*FLAGS, "--models", f"base={two_models}/base", "--output_dir", str(tmp_path / "out")]
    (tmp_path / "file").write_text("")
    for argv, message in [
        ([], "--models is missing"),
        (["--run", str(tmp_path)], "no run folder"),
        ([*good, "--models", "base"], "name=pipeline"),
        ([*good, "--models", "base=/no/where"], "no model '/no/where'"),
        ([*good, "--prompts", "no-such-set"], "no prompt set or file 'no-such-set'"),
        ([*good, "--rewards", "no-such-reward"], "unknown reward 'no-such-reward'"),
        ([*good, "--images_per_prompt", "0"], "images_per_prompt must be at least 1"),
        ([*good, "--images_per_promp", "1"], "did you mean --images_per_prompt?"),
        ([*good, "--output_dir", str(tmp_path / "file" / "out")], "Not a directory"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(argv)
        assert stopped.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(errors) == 1 and message in errors[0], (argv, errors)
