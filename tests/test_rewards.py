"""Rewards by name, by function and in sums, and what happens when one fails."""

import io
import sys

import pytest
import torch
from PIL import Image

from rewards import RewardError, load_reward, load_rewards

PROMPTS = ["a red circle on a blue background", "a white ring on a black background"]


def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_jpeg_sizes_are_those_of_the_file():
    scores = load_reward("jpeg-incompressibility")(images(), PROMPTS)
    for score, image in zip(scores, images(), strict=True):
        buffer = io.BytesIO()
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
        assert score.item() == pytest.approx(len(buffer.getvalue()) / 1000)
    torch.testing.assert_close(load_reward("jpeg-compressibility")(images(), PROMPTS), -scores)
    flat = load_reward("jpeg-compressibility")(torch.full((1, 3, 32, 32), 0.5), PROMPTS[:1])
    assert flat > -scores.min()  # a flat picture compresses better than noise


def test_sums_are_weighted():
    parts = {name: load_reward(name)(images(), PROMPTS) for name in ("toy-colourfulness", "jpeg-compressibility")}
    total = load_rewards(["toy-colourfulness=2.5", "jpeg-compressibility=-0.1"])(images(), PROMPTS)
    torch.testing.assert_close(total, 2.5 * parts["toy-colourfulness"] - 0.1 * parts["jpeg-compressibility"])
    torch.testing.assert_close(load_rewards(["toy-colourfulness"])(images(), PROMPTS), parts["toy-colourfulness"])


def test_own_function_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def redness(images, prompts):\n    return images[:, 0].mean((1, 2)).tolist()\n")
    monkeypatch.chdir(tmp_path)
    scores = load_rewards(["mine:redness=2"])(images(), PROMPTS)  # a list of floats is fine
    torch.testing.assert_close(scores, 2 * images()[:, 0].mean((1, 2)))
    sys.modules.pop("mine")


@pytest.mark.parametrize(
    "spec", ["nope", "nope=1", "toy-alignment=x", "toy-alignment=nan", "os:nothing", "missing_module:f", "math:pi"]
)
def test_unknown_rewards_are_refused(spec):
    with pytest.raises(ValueError, match=spec.split("=")[0]):
        load_rewards([spec])
    with pytest.raises(ValueError, match="no reward given"):
        load_rewards([])


@pytest.mark.parametrize(
    "body, message",
    [
        ("raise KeyError('x')", "raised KeyError"),
        ("return torch.ones(3)", r"shape \(3,\), not shape \(2,\)"),
        ("return torch.ones(2, 1)", r"shape \(2, 1\)"),
        ("return 1.0", r"shape \(\)"),
        ("return torch.tensor([0.0, float('nan')])", "returned nan for prompt 'a white ring"),
        ("return torch.tensor([0.0, float('inf')])", "returned inf for prompt 'a white ring"),
        ("return ['good', 'bad']", "ValueError|TypeError"),
        ("return None", "RuntimeError|TypeError"),
    ],
)
def test_failing_rewards_are_named_with_their_prompt(tmp_path, monkeypatch, body, message):
    (tmp_path / "failing.py").write_text(f"import torch\ndef f(images, prompts):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("failing", None)
    with pytest.raises(RewardError, match=message) as error:
        load_reward("failing:f")(images(), PROMPTS)
    assert "failing:f" in str(error.value) and "background" in str(error.value)
