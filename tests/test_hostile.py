"""A folder from elsewhere: nothing in it runs, is unpickled, or leads what is written out of it."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import train
from plumbing import checkpoint, pipeline
from plumbing.pipeline import load_pipeline

FLAGS = (
    "--preset toy --prompts toy-small --prompts_per_epoch 1 --images_per_prompt 2 --epochs 1 --save_every 1 --eval_prompts"
).split()


class Trap:
    """What marks that it ran, when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    train.main([*FLAGS, "", "--model", str(model_folder), "--output_dir", str(folder)])
    return folder


@pytest.fixture
def foreign(run, tmp_path, monkeypatch):
    """A copy of a run whose settings name code that lies where it would be found."""
    (tmp_path / "trap.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(images, prompts):\n    return [0.0] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = Path(shutil.copytree(run, tmp_path / "foreign"))
    for file in (folder / "config.json", checkpoint.all_checkpoints(folder)[-1] / "state.json"):
        content = json.loads(file.read_text())
        settings = content.get("config", content)
        settings["reward"] = ["trap:f"]
        file.write_text(json.dumps(content))
    checkpoint.write_sums(file.parent)
    return folder


def refused(capsys, main, argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error" in line]
    return line


def test_code_that_a_run_names_is_run_only_if_it_is_typed(foreign, tmp_path, capsys):
    few = ["--images_per_prompt", "1", "--prompts", "toy-small:1"]
    line = refused(capsys, evaluate.main, ["--runs", foreign, *few])
    assert "the reward trap:f is code, which is run only if it is typed: give it by --rewards" in line
    assert "the reward trap:f is code" in refused(capsys, evaluate.main, ["--runs", foreign, *few, "--models", "x=trap:f"])
    line = refused(capsys, train.main, ["--resume", foreign, "--epochs", "2"])
    assert "the reward trap:f is code" in line and "give it by --reward, since" in line
    assert not (tmp_path / "ran").exists() and "trap" not in sys.modules
    train.main(["--resume", str(foreign), "--epochs", "2", "--reward", "trap:f"])
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("inside", ["reward.png", "checkpoints/epoch_000009", "samples", "evaluation"])
def test_links_out_of_a_run_are_refused(inside, run, tmp_path, capsys):
    folder, outside = Path(shutil.copytree(run, tmp_path / "linked")), tmp_path / "outside"
    outside.mkdir()
    place = folder / inside
    shutil.rmtree(place, ignore_errors=True)
    place.unlink(missing_ok=True)
    place.symlink_to(outside)
    expected = f"{place} is a link out of the run folder, to {outside}"
    assert expected in refused(capsys, train.main, ["--resume", folder, "--epochs", "2"])
    assert expected in refused(capsys, evaluate.main, ["--runs", folder])
    assert expected in refused(capsys, evaluate.main, ["--runs", run, "--output_dir", folder])
    model = json.loads((run / "config.json").read_text())["model"]
    assert expected in refused(capsys, train.main, [*FLAGS, "", "--model", model, "--output_dir", folder])
    assert not list(outside.iterdir())
    place.unlink()
    place.symlink_to(folder / "metrics.jsonl")  # within is allowed, as trackers do it
    assert len(evaluate.complete(evaluate.parse(["--runs", str(folder)]))[1]) == 2


def test_a_checkpoint_is_not_unpickled(run, tmp_path, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "pickled"))
    newest = checkpoint.all_checkpoints(folder)[-1]
    for name in ("weights.safetensors", "state.safetensors"):
        (newest / name).write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    checkpoint.write_sums(newest)
    line = refused(capsys, train.main, ["--resume", folder, "--epochs", "2"])
    assert f"damaged checkpoint {newest}: weights.safetensors: " in line and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "part, file", [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")]
)
def test_a_model_is_not_unpickled(part, file, model_folder, tmp_path):
    """Not even where the pickle holds the very weights."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    weights = load_file(folder / part / f"{file}.safetensors")
    (folder / part / f"{file}.safetensors").unlink()
    torch.save(weights, folder / part / f"{'pytorch_model' if file == 'model' else file}.bin")
    with pytest.raises(ValueError, match="cannot load a pipeline from the folder"):
        load_pipeline(str(folder), torch.device("cpu"))


@pytest.mark.parametrize(
    "names, value", [("unet", ["evil", "Evil"]), ("unet", ["model.evil", "Evil"]), ("_class_name", ["evil", "Evil"])]
)
def test_code_in_a_model_is_not_run(names, value, model_folder, tmp_path, monkeypatch):
    """By whatever version of diffusers: it is not even asked."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pipeline.DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("diffusers was asked"))
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom diffusers import UNet2DConditionModel as Evil\n"
    for place in (folder, folder / "unet"):
        (place / "evil.py").write_text(code)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {names: value}))
    with pytest.raises(ValueError, match=f"cannot load a pipeline from the folder .*names code for {names}"):
        load_pipeline(str(folder), torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_what_an_evaluation_writes_stays_in_its_folder(run, model_folder, tmp_path):
    """Names of prompt sets come from the run's settings, and are file names of results."""
    folder = Path(shutil.copytree(run, tmp_path / "a" / "b" / "run"))
    (tmp_path / "<script>.txt").write_text("a red ring on a black background\n")
    settings = json.loads((folder / "config.json").read_text())
    settings["eval_prompts"] = str(folder / ".." / ".." / ".." / "<script>.txt")
    (folder / "config.json").write_text(json.dumps(settings))
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(folder)}
    evaluate.main(["--runs", str(folder), "--images_per_prompt", "1", "--predicted", "0"])
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(folder)} == before
    page = (folder / "evaluation" / "report.html").read_text()
    assert "&lt;script&gt;.txt" in page and "<script>.txt" not in page
