"""evaluate.py: numbers that can be recomputed, the same noise for every model, interruption, processes, and wrong input."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_pipeline, make_policy

import evaluate
import train
from plumbing.pipeline import encode_prompts, load_pipeline, sample_images
from plumbing.prompts import draw_prompts, load_prompts
from plumbing.report import chosen
from plumbing.scores import Results
from plumbing.trainable import open_model
from rdp_loss import prediction_quality
from rewards import load_reward
from sampler import EVALUATION, log_prob_table, sample_trajectories

FLAGS = (
    "--prompts toy-small --rewards toy-alignment toy-colourfulness --images_per_prompt 2 --num_steps 2 --guidance_scale 1".split()
)
TRAINING = (
    "--preset toy --prompts toy-small --eval_prompts= --epochs 3 --save_every 1 --keep_every 1 --prompts_per_epoch 1 "
    "--images_per_prompt 2 --num_steps 3 --reward toy-colourfulness=2 --learning_rate 1e-3 --kl_weight 0.1"
).split()
PREDICTED = "--prompts toy-small:5 --images_per_prompt 2 --predicted 3 --num_steps 3".split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def evaluated(two_models, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    evaluate.main([*FLAGS, "--models", f"base={two_models}/base", f"other={two_models}/other", "--output_dir", str(out)])
    return out


@pytest.fixture(scope="module")
def runs(two_models, tmp_path_factory):
    """Two runs of three epochs with all their checkpoints, of the whole UNet and of adapters."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("whole", []), ("lora", ["--lora_rank", "2"])):
        train.main([*TRAINING, "--model", f"{two_models}/base", "--output_dir", str(folder / name), *more])
    return folder


def rows_of(folder: Path) -> dict:
    rows = json.loads((folder / "results.json").read_text())["results"]
    return {(row["model"], row["prompts"], row["reward"]): row for row in rows}


def test_numbers_come_from_the_per_prompt_scores(evaluated):
    result = json.loads((evaluated / "results.json").read_text())
    assert result["versions"]["torch"] and result["machine"]["cpu_cores"] and "--images_per_prompt 2" in result["command"]
    rows = {(row["model"], row["reward"]): row for row in result["results"]}
    assert len(rows) == 4
    table = (evaluated / "table.md").read_text()
    assert table.startswith("| reward | model | toy-small |")
    for (model, reward), row in rows.items():
        values = torch.tensor(row["per_prompt"], dtype=torch.float64)
        base = torch.tensor(rows["base", reward]["per_prompt"], dtype=torch.float64)
        assert len(values) == 45
        assert row["mean"] == pytest.approx(values.mean().item())
        assert row["standard_error"] == pytest.approx((values.var() / 45).sqrt().item())
        assert row["gain"] == pytest.approx((values - base).mean().item())
        assert row["gain_standard_error"] == pytest.approx(((values - base).var() / 45).sqrt().item())
        wins = sum((a > b) + (a == b) / 2 for a, b in zip(values.tolist(), base.tolist(), strict=True)) / 45
        assert row["win_rate"] == pytest.approx(wins)
        assert f"| {reward} | {model} | {row['mean']:.4f} ± {row['standard_error']:.4f}" in table
    assert rows["base", "toy-alignment"]["gain"] == 0 != rows["other", "toy-alignment"]["gain"]
    assert rows["base", "toy-alignment"]["win_rate"] == 0.5
    assert f"wins {100 * rows['other', 'toy-alignment']['win_rate']:.0f} %" in table
    resampled = values[torch.randint(45, (4000, 45), generator=torch.Generator().manual_seed(0))].mean(1).std()
    assert row["standard_error"] == pytest.approx(resampled.item(), rel=0.05)


def test_scores_and_diversity_are_those_of_the_named_noise(evaluated):
    """Prompt 3 by hand: the noise of its pictures is (seed, EVALUATION, 3, b) for every model and any batch."""
    prompt = load_prompts("toy-small")[3]
    pipe = make_pipeline(0)
    policy = make_policy(pipe, num_steps=2, guidance_scale=1.0)
    images = sample_images(policy, pipe, [prompt] * 2, [(0, EVALUATION, 3, b) for b in range(2)], 2)
    line = Results(evaluated).read("base", "toy-small", load_prompts("toy-small"))[3]
    for name, scores in line["scores"].items():
        assert scores == pytest.approx(load_reward(name)(images, [prompt] * 2).tolist(), abs=1e-5)
    spread = images.double().var(0, correction=0).mean().sqrt().item()  # 32 x 32 as they are
    assert line["diversity"] == pytest.approx(spread, rel=1e-4) and spread > 0
    assert Results(evaluated).picture("base", "toy-small", 3).suffix == ".png"


def test_equal_pictures_have_no_diversity(two_models, tmp_path, monkeypatch):
    """Mode collapse shows: with the same noise for all pictures of a prompt there is none."""
    original = evaluate.sample_images
    monkeypatch.setattr(evaluate, "sample_images", lambda *a: original(*a[:3], [(s, e, n, 0) for s, e, n, _ in a[3]], *a[4:]))
    evaluate.main([*FLAGS, "--models", f"base={two_models}/base", "--output_dir", str(tmp_path)])
    assert rows_of(tmp_path)["base", "toy-small", "toy-alignment"]["diversity"] < 1e-6


def test_batch_size_and_processes_do_not_matter(two_models, evaluated, on_two_processes, tmp_path):
    expected, two = rows_of(evaluated), on_two_processes["evaluate"]
    models = ["--models", f"base={two_models}/base", f"other={two_models}/other"]
    evaluate.main([*FLAGS, *models, "--batch_size", "7", "--output_dir", str(tmp_path)])
    assert two.codes == [0, 0], two.errors
    assert len(list((two.folder / "scores" / "base").iterdir())) == 2  # both worked
    for folder in (tmp_path, two.folder):
        for key, row in rows_of(folder).items():
            assert row["per_prompt"] == pytest.approx(expected[key]["per_prompt"], abs=1e-4)
            assert row["diversity"] == pytest.approx(expected[key]["diversity"], abs=1e-5)


def test_a_process_that_starts_late_does_its_own_share(two_models, tmp_path, monkeypatch):
    """The second of three processes begins when the first has finished, the third when both have: nothing is left or doubled."""
    config, _ = evaluate.complete(evaluate.parse([*FLAGS, "--models", f"base={two_models}/base", "--output_dir", str(tmp_path)]))
    results, pipe, prompts = Results(tmp_path), make_pipeline(0), load_prompts("toy-small")[:10]
    rewards = {"toy-alignment": load_reward("toy-alignment")}
    monkeypatch.setattr(evaluate, "WORLD_SIZE", 3)
    for rank, share in enumerate(((0, 3, 6, 9), (1, 4, 7), (2, 5, 8))):
        before = set(results.read("base", "toy-small", prompts))
        monkeypatch.setattr(evaluate, "RANK", rank)
        evaluate.score_set(config, results, "base", lambda: pipe, "toy-small", prompts, rewards)
        assert set(results.read("base", "toy-small", prompts)) - before == set(share)


def test_scores_that_a_file_system_shows_late_are_waited_for(tmp_path, monkeypatch):
    results, late = Results(tmp_path), [{"n": 1, "prompt": "b"}]
    results.append("base", "set", [{"n": 0, "prompt": "a"}])
    monkeypatch.setattr("time.sleep", lambda seconds: results.append("base", "set", late) if late else None)
    results.wait_for("base", "set", ["a", "b"])
    late.clear()
    with pytest.raises(ValueError, match="lacks scores of 1 prompts of set by base: run the command again"):
        results.wait_for("base", "set", ["a", "b", "c"])


def test_killed_and_restarted_equals_uninterrupted(two_models, evaluated, tmp_path, monkeypatch):
    """The disk fills up in the middle; the same command then goes on, and nothing finished is made again."""
    flags = [*FLAGS, "--models", f"base={two_models}/base", f"other={two_models}/other", "--output_dir", str(tmp_path)]
    drawn, room = [], 2
    original, append = evaluate.sample_images, Results.append

    def counting(policy, pipe, prompts, names, batch_size):
        drawn.extend((id(pipe), name) for name in names)
        return original(policy, pipe, prompts, names, batch_size)

    def disk(self, model, set_name, lines):
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(28, "No space left on device")
        append(self, model, set_name, lines)

    monkeypatch.setattr(evaluate, "sample_images", counting)
    with monkeypatch.context() as patch:
        patch.setattr(Results, "append", disk)
        with pytest.raises(SystemExit) as stopped:
            evaluate.main([*flags, "--batch_size", "20"])
        assert stopped.value.code == 2
    assert len(drawn) == 60  # three blocks of ten prompts, the last one lost
    (file,) = (tmp_path / "scores" / "base").glob("*.jsonl")
    file.write_text(file.read_text() + '\n{"n": 20, "prompt": "torn')
    drawn.clear()
    evaluate.main(flags)
    assert len(drawn) == 2 * (25 + 45)
    for key, row in rows_of(tmp_path).items():
        assert row["per_prompt"] == pytest.approx(rows_of(evaluated)[key]["per_prompt"], abs=1e-4)
    drawn.clear()
    evaluate.main(flags)
    assert not drawn


def test_a_folder_of_other_settings_or_models_is_not_mixed_up(two_models, evaluated, tmp_path, capsys):
    out = shutil.copytree(evaluated, tmp_path / "out")
    moved = shutil.copytree(two_models / "other", tmp_path / "other")
    base = [*FLAGS, "--output_dir", str(out)]
    for more, message in (
        (["--models", f"base={two_models}/base", "--num_steps", "3"], "was made with num_steps=2, not 3"),
        (["--models", f"base={two_models}/base", "--rewards", "toy-alignment"], "was made with rewards="),
        (["--models", f"base={two_models}/base", f"other={moved}"], "is of another 'other'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main([*base, *more])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    evaluate.main([*base, "--models", f"base={two_models}/base", f"third={moved}", "--prompts", "toy-small:5"])  # more is fine
    assert ("third", "toy-small:5", "toy-alignment") in rows_of(out)


def test_run_supplies_what_is_not_given_and_its_checkpoints_are_models(runs, capsys):
    run = runs / "whole"
    config, models = evaluate.complete(evaluate.parse(["--runs", str(run), "--images_per_prompt", "1"]))
    assert (config.num_steps, config.guidance_scale, config.prompts) == (3, 1.0, ["toy-small"])
    assert config.rewards == ["toy-colourfulness"] and [model.name for model in models] == ["base", "tuned"]
    evaluate.main(["--runs", str(run), "--checkpoints", "--images_per_prompt", "2"])
    last_lines = capsys.readouterr().out.splitlines()[-2:]
    assert "| toy-colourfulness | tuned@2 |" in (run / "evaluation" / "table.md").read_text()
    rows = rows_of(run / "evaluation")
    assert [model for model, _, _ in rows] == ["base", "tuned@1", "tuned@2", "tuned"]  # the third checkpoint is the result
    base, first, tuned = (rows[name, "toy-small", "toy-colourfulness"] for name in ("base", "tuned@1", "tuned"))
    assert first["per_prompt"] != tuned["per_prompt"] and tuned["epoch"] == 3
    assert last_lines[0] == (
        f"toy-small, toy-colourfulness: base {base['mean']:.3f}, tuned {tuned['mean']:.3f}, "
        f"gain {tuned['gain']:+.3f}, {100 * tuned['win_rate']:.0f} % of prompts won"
    )
    assert f"{run / 'evaluation' / 'report.html'}" in last_lines[1]
    for name in ("training", "epochs", "strips-toy-small", "pictures-toy-small"):
        assert (run / "evaluation" / f"{name}.png").stat().st_size > 1000


def test_several_runs_and_the_sum_they_were_trained_on(runs, two_models, tmp_path):
    flags = [*TRAINING, "--model", f"{two_models}/base", "--epochs", "1", "--reward", "toy-colourfulness=2", "toy-alignment=-0.5"]
    train.main([*flags, "--output_dir", str(tmp_path / "sum")])
    out = tmp_path / "out"
    evaluate.main(["--runs", str(tmp_path / "sum"), str(runs / "lora"), "--checkpoints", "--prompts", "toy-small:6",
                   "--images_per_prompt", "2", "--output_dir", str(out)])  # fmt: skip
    rows = rows_of(out)
    assert {model for model, _, _ in rows} == {"base", "sum", "lora@1", "lora@2", "lora"}
    total, colour, alignment = (rows["sum", "toy-small:6", r] for r in ("training reward", "toy-colourfulness", "toy-alignment"))
    assert total["mean"] == pytest.approx(2 * colour["mean"] - 0.5 * alignment["mean"])
    assert "| training reward | lora |" in (out / "table.md").read_text()
    other = shutil.copytree(runs / "lora", tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"model": "toy"}))
    with pytest.raises(ValueError, match="start from different models"):
        evaluate.complete(evaluate.parse(["--runs", str(tmp_path / "sum"), str(other)]))


def test_kept_checkpoints_have_no_optimizer_but_the_two_newest(runs):
    folders = sorted((runs / "whole" / "checkpoints").iterdir())
    assert [f.name for f in folders] == ["epoch_000001", "epoch_000002", "epoch_000003"]
    assert [(f / "state.safetensors").exists() for f in folders] == [False, True, True]


def test_predicted_differences_are_those_of_the_log_ratio(runs, two_models, tmp_path):
    """beta log pi_theta/pi_ref of the pictures that were scored, from scratch, against their rewards."""
    out = tmp_path / "out"
    evaluate.main(["--runs", str(runs / "whole"), "--images_per_prompt", "3", "--predicted", "2", "--output_dir", str(out)])
    saved = json.loads(Results(out).prediction("tuned", "toy-small").read_text())
    prompts = load_prompts("toy-small")
    tuned, base = (load_pipeline(str(folder), CPU) for folder in (runs / "whole" / "pipeline", two_models / "base"))
    policy = make_policy(tuned, num_steps=3, guidance_scale=1.0)
    reference = dataclasses.replace(policy, denoise=dataclasses.replace(policy.denoise, network=base.unet))
    for n in range(2):
        cond = encode_prompts(tuned, [prompts[n]] * 3)
        names = [(0, EVALUATION, n, b) for b in range(3)]
        drawn = sample_trajectories(policy, cond, names, 3)
        rhat = (drawn.log_probs - log_prob_table(reference, drawn, 3)).mean(1)
        assert saved["predicted"][n] == pytest.approx((0.1 * rhat).tolist(), rel=1e-3, abs=1e-7)
        scores = Results(out).read("tuned", "toy-small", prompts)[n]["scores"]["toy-colourfulness"]
        assert saved["actual"][n] == pytest.approx([2 * score for score in scores])
    predicted, actual = torch.tensor(saved["predicted"]), torch.tensor(saved["actual"])
    correlation, slope = prediction_quality(predicted / 0.1, actual, 0.1)
    assert (saved["correlation"], saved["slope"]) == pytest.approx((correlation, slope), rel=1e-3)
    assert Results(out).predicted("tuned", "toy-small", prompts)["slope"] == saved["slope"]
    assert Results(out).predicted("tuned", "toy-small", prompts[::-1]) == {}  # a file of other prompts by the same name
    row = rows_of(out)["tuned", "toy-small", "toy-colourfulness"]
    assert row["prediction_correlation"] == saved["correlation"] and row["prediction_slope"] == saved["slope"]
    assert rows_of(out)["base", "toy-small", "toy-colourfulness"]["prediction_slope"] is None


def test_comparison_is_shared_by_the_processes(on_two_processes, tmp_path, monkeypatch):
    two = on_two_processes["predicted"]
    assert two.codes == [0, 0], two.errors
    flags = ["--runs", str(on_two_processes["prdp"].folder), *PREDICTED, "--output_dir", str(tmp_path)]
    evaluate.main(flags)
    one, other = (Results(folder).prediction("tuned", "toy-small:5") for folder in (tmp_path, two.folder))
    saved, of_two = json.loads(one.read_text()), json.loads(other.read_text())
    assert saved.pop("prompts") == of_two.pop("prompts")
    for key, value in of_two.items():
        torch.testing.assert_close(torch.tensor(value), torch.tensor(saved[key]), rtol=1e-2, atol=1e-5)

    one.unlink()
    shares = []
    monkeypatch.setattr(evaluate, "WORLD_SIZE", 2)
    monkeypatch.setattr(evaluate, "all_gather", lambda produce: shares.append(produce()) or torch.zeros(3, 2))
    for rank in range(2):
        monkeypatch.setattr(evaluate, "RANK", rank)
        evaluate.main(flags)
        one.unlink(missing_ok=True)
    beta = json.loads((on_two_processes["prdp"].folder / "config.json").read_text())["kl_weight"]
    assert [len(share) for share in shares] == [1, 2]
    torch.testing.assert_close(beta * torch.cat(shares), torch.tensor(saved["predicted"], dtype=torch.float64))


def test_precision_is_that_of_the_run_unless_given(runs, pipe, tmp_path, monkeypatch):
    run = shutil.copytree(runs / "whole", tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"autocast": "bf16", "tf32": True}))
    config, _ = evaluate.complete(evaluate.parse(["--runs", str(run)]))
    assert (config.autocast, config.tf32) == ("bf16", True)
    assert evaluate.policy_of(pipe, config).denoise.autocast == torch.bfloat16
    given, _ = evaluate.complete(evaluate.parse(["--runs", str(run), "--autocast", "no"]))
    assert evaluate.policy_of(pipe, given).denoise.autocast is None
    monkeypatch.setattr(evaluate, "load_set", lambda *_: (_ for _ in ()).throw(ValueError("enough")))
    for more, tf32 in (([], True), (["--tf32", "False"], False)):
        with pytest.raises(SystemExit):
            evaluate.main(["--runs", str(run), *more])
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


def test_runs_checkpoints_and_adapters_open_as_what_was_trained(runs, two_models):
    base = str(two_models / "base")
    cond_of, latents = None, torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def output(name: str) -> torch.Tensor:
        pipe = open_model(name, base, CPU)
        nonlocal cond_of
        cond_of = encode_prompts(pipe, ["a red circle on a blue background"]).tensors["encoder_hidden_states"]
        shape = (1, pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
        x = latents.flatten().repeat(100)[: torch.Size(shape).numel()].view(shape)
        with torch.no_grad():
            return pipe.unet(x, torch.tensor([500]), cond_of).sample

    start = output(base)
    for run in ("whole", "lora"):
        result = output(str(runs / run))
        assert (result - start).abs().max() > 1e-4
        torch.testing.assert_close(output(str(runs / run / "checkpoints" / "epoch_000003")), result, atol=1e-5, rtol=1e-5)
        assert (output(str(runs / run / "checkpoints" / "epoch_000001")) - result).abs().max() > 1e-5
    torch.testing.assert_close(output(str(runs / "lora" / "lora")), output(str(runs / "lora")), atol=1e-5, rtol=1e-5)


def test_protocols_are_the_papers(runs, tmp_path, monkeypatch):
    small, _ = evaluate.complete(evaluate.parse(["--runs", str(runs / "whole"), "--protocol", "small"]))
    assert (small.prompts, small.images_per_prompt) == (["toy-small"], 256)  # the training prompts; Sec. 4.1
    large, _ = evaluate.complete(evaluate.parse(["--runs", str(runs / "whole"), "--protocol", "large"]))
    categories = [f"hpdv2-{category}" for category in ("animation", "concept-art", "painting", "photo")]
    assert (large.prompts, large.images_per_prompt) == (["toy-small:500", "pickapic-test:500", *categories], 64)  # Sec. 4.2
    fewer, _ = evaluate.complete(
        evaluate.parse(["--runs", str(runs / "whole"), "--protocol", "large", "--images_per_prompt", "2"])
    )
    assert fewer.images_per_prompt == 2
    seen = evaluate.load_set("toy-train:20", small)
    trained_on = [prompt for epoch in range(5) for prompt in draw_prompts(load_prompts("toy-train"), 4, epoch, 0)]
    assert seen == trained_on


def test_best_worst_and_random_do_not_overlap():
    gains = [0.1 * n for n in range(20)]
    kinds = chosen(gains, 3)
    assert [n for n, kind in kinds.items() if kind == "best"] == [19, 18, 17]
    assert [n for n, kind in kinds.items() if kind == "worst"] == [0, 1, 2]
    assert sum(kind == "random" for kind in kinds.values()) == 3 and len(kinds) == 9
    assert chosen([1.0, 2.0], 3) == {1: "best", 0: "best"}


def test_wrong_input(capsys, two_models, runs, tmp_path):
    good = [*FLAGS, "--models", f"base={two_models}/base", "--output_dir", str(tmp_path / "out")]
    (tmp_path / "file").write_text("")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "pytorch_lora_weights.safetensors").write_text("none")
    for argv, message in [
        ([], "--models is missing"),
        (["--runs", str(tmp_path)], "no run folder"),
        ([*"--protocol large --rewards toy-alignment --models a=b --output_dir x".split()], "needs --runs"),
        ([*good, "--models", "base"], "name=pipeline"),
        ([*good, "--models", "base=/no/where"], "no model '/no/where'"),
        ([*good, "--models", f"base={tmp_path}"], "cannot load a pipeline from the folder"),
        ([*good, "--models", f"a={two_models}/base", f"a={two_models}/other"], "two models are called 'a'"),
        ([*good, "--models", f"a={two_models}/base", f"b={tmp_path}/adapters"], "cannot load adapters"),
        ([*good, "--prompts", "no-such-set"], "no prompt set or file 'no-such-set'"),
        ([*good, "--prompts", "toy-small:46"], "toy-small has 45 prompts"),
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
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
