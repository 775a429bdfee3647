"""The learned rewards on random weights in the real files' layouts, against their formulas on the reference preprocessing."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from benchmarks import rehearsal
from miniature import WEIGHTS
from plumbing import reward_models
from plumbing.image_reward import ImageReward
from plumbing.pipeline import load_pipeline
from plumbing.reward_models import (
    SOURCES,
    aesthetic,
    cached,
    clip,
    clipscore,
    eight_bit,
    hpsv2,
    imagereward,
    letterbox,
    local_weights,
    pickscore,
)
from rewards import load_reward, load_rewards

CPU, FP32 = torch.device("cpu"), torch.float32
PROMPTS = ["a photo of a cat", "“Curly quotes” &amp; a ﬁne ligature", "a photo of a cat", "a very long prompt " * 40]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rewards")
    return {name: str(path) for name, path in rehearsal.make_rewards(folder, "tiny").items()}


def pictures(height=64, width=48, number=4) -> torch.Tensor:
    """Smooth pictures with sharp edges in [0, 1], whatever their shape."""
    generator = torch.Generator().manual_seed(height * width)
    smooth = torch.nn.functional.interpolate(torch.rand(number, 3, 9, 9, generator=generator), (height, width), mode="bicubic")
    smooth[:, :, height // 3 : height // 2, : width // 2] = 0
    return smooth.clamp(0, 1)


def as_pil(images) -> list[Image.Image]:
    return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in eight_bit(images)]


def reference_letterbox(image: Image.Image) -> torch.Tensor:
    """HPSv2's: to a float tensor, the longest side to 224, zeros around, normalised; one picture at a time."""
    pixels = T.functional.to_tensor(image)
    scale = 224 / max(pixels.shape[1:])
    height, width = round(pixels.shape[1] * scale), round(pixels.shape[2] * scale)
    pixels = torch.nn.functional.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    square = torch.zeros(3, 224, 224)
    top, left = (224 - height) // 2, (224 - width) // 2
    square[:, top : top + height, left : left + width] = pixels
    return T.Normalize(reward_models.CLIP_MEAN, reward_models.CLIP_STD)(square)


def cosines(a, b) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.detach().double(), b.detach().double(), dim=-1).float()


@pytest.mark.parametrize("size", [(64, 64), (64, 48), (40, 97), (512, 384)])
@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1"])
def test_hpsv2_is_the_cosine_on_the_reference_preprocessing(weights, size, name):
    images = pictures(*size)
    folder = Path(weights[name])
    model = open_clip.CLIP(**json.loads((folder / "open_clip_config.json").read_text())["model_cfg"])
    model.load_state_dict(torch.load(folder / SOURCES[name].file, weights_only=True)["state_dict"])
    tokens = open_clip.get_tokenizer("ViT-H-14")(PROMPTS)
    expected = cosines(
        model.encode_image(torch.stack([reference_letterbox(i) for i in as_pil(images)])), model.encode_text(tokens)
    )
    scores = reward_models.LOADERS[name](weights, CPU, FP32)(images, PROMPTS)
    assert scores.dtype == torch.float32 and scores.std() > 1e-4
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (64, 48), (40, 97), (512, 384)])
@pytest.mark.parametrize("reward, name", [(pickscore, "pickscore"), (clipscore, "clip")])
def test_pickscore_and_clipscore_are_the_cosine_on_the_reference_preprocessing(weights, size, reward, name):
    images = pictures(*size)
    model, tokenizer = CLIPModel.from_pretrained(weights[name]), CLIPTokenizer.from_pretrained(weights[name])
    pixels = CLIPImageProcessor()(images=as_pil(images), return_tensors="pt").pixel_values
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    output = model(pixel_values=pixels, **tokens)
    expected = cosines(output.image_embeds, output.text_embeds)
    torch.testing.assert_close(reward(weights, CPU, FP32)(images, PROMPTS), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(512, 512), (512, 384), (300, 517)])
def test_clip_preprocessing_is_pils(size):
    """Resize of the shortest side and centre crop by PIL, rounding and clamping as it does: at most 2 of 255 apart."""
    (image,) = as_pil(pictures(*size, number=1))
    reference = T.CenterCrop(224)(T.Resize(224, T.InterpolationMode.BICUBIC)(image))
    ours = CLIPImageProcessor(do_normalize=False)(images=eight_bit(pictures(*size, number=1)), return_tensors="pt").pixel_values
    difference = ours[0] * 255 - torch.from_numpy(np.array(reference)).permute(2, 0, 1)
    assert difference.abs().max() < 2.01


def test_letterbox_pads_with_zeros_and_keeps_everything():
    white = letterbox(torch.ones(1, 3, 64, 32), 224)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (reward_models.CLIP_MEAN, reward_models.CLIP_STD))
    pixels = white[0] * std + mean
    assert pixels[:, :, :56].abs().max() < 1e-6 and pixels[:, :, 168:].abs().max() < 1e-6
    torch.testing.assert_close(pixels[:, :, 56:168], torch.ones(3, 224, 112), atol=1e-6, rtol=0)


def test_aesthetic_is_affine_in_the_normalised_embedding(weights):
    state = torch.load(weights["aesthetic"], weights_only=True)
    w, b = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for layer in (0, 2, 4, 6, 7):  # no activations: five layers make one affine map
        weight, bias = state[f"layers.{layer}.weight"].double(), state[f"layers.{layer}.bias"].double()
        w, b = weight @ w, weight @ b + bias
    model = CLIPModel.from_pretrained(weights["clip"])
    pixels = CLIPImageProcessor()(images=as_pil(pictures()), return_tensors="pt").pixel_values
    embeddings = torch.nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output.double(), dim=-1)
    expected = (embeddings @ w.T + b).squeeze(-1).float()
    scores = aesthetic(weights, CPU, FP32)(pictures(), PROMPTS)
    torch.testing.assert_close(scores, expected.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(aesthetic(weights, CPU, FP32)(pictures(), PROMPTS[::-1]), scores)  # blind to the prompt


@pytest.mark.parametrize("name", list(reward_models.LOADERS))
def test_pairing_batching_and_caching_do_not_change_a_score(weights, name):
    reward, images = load_reward(name, [f"{n}={p}" for n, p in weights.items()]), pictures()
    together = reward(images, PROMPTS)
    assert together.shape == (4,)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    order = [2, 0, 3, 1]
    shuffled = reward(images[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=0)
    torch.testing.assert_close(shuffled, together[order], atol=1e-6, rtol=0)
    again = reward_models.LOADERS[name](weights, CPU, FP32)(images, PROMPTS)
    torch.testing.assert_close(again, together, atol=1e-6, rtol=0)


def test_prompts_are_embedded_once_and_forgotten_in_the_end():
    calls = []

    def embed(prompts):
        calls.append(list(prompts))
        return torch.tensor([[float(len(prompt))] for prompt in prompts])

    remembered = cached(embed, limit=3)
    assert remembered(["a", "bb", "a", "a"]).flatten().tolist() == [1, 2, 1, 1]
    assert remembered(["bb", "a"]).flatten().tolist() == [2, 1]
    assert calls == [["a", "bb"]]
    assert remembered(["ccc", "dddd", "a"]).flatten().tolist() == [3, 4, 1]
    assert remembered(["a"]).tolist() == [[1]] and calls[1:] == [["ccc", "dddd"], ["a"]]


@pytest.mark.parametrize("name, tolerance", [("hpsv2", 0.02), ("pickscore", 0.02), ("aesthetic", 0.01), ("imagereward", 0.02)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_give_fp32_scores(weights, name, tolerance, dtype):
    scores = reward_models.LOADERS[name](weights, CPU, dtype)(pictures(), PROMPTS)
    exact = reward_models.LOADERS[name](weights, CPU, FP32)(pictures(), PROMPTS)
    assert scores.dtype == torch.float32
    assert (scores != scores.to(dtype).float()).any()  # not merely rounded scores in fp32 clothing
    assert 0 < (scores - exact).abs().max() < tolerance


def test_the_papers_arithmetic():
    """10 PickScore + 2 HPSv2 + 0.05 aesthetic of Table 2's and Sec. 4.4's raw scores is Table 3's 2.888 for SD v1.4."""

    def constant(value):
        return lambda images, prompts: torch.full((len(prompts),), value)

    loaders = {name: lambda *_, v=v: constant(v) for name, v in dict(pickscore=0.2082, hpsv2=0.2665, aesthetic=5.46).items()}
    with pytest.MonkeyPatch.context() as patch:
        for name, loader in loaders.items():
            patch.setitem(reward_models.LOADERS, name, loader)
        total = load_rewards(["pickscore=10", "hpsv2=2", "aesthetic=0.05"])(pictures(), PROMPTS)
    torch.testing.assert_close(total, torch.full((4,), 2.888), atol=1e-4, rtol=0)


def test_tensors_saved_on_a_gpu_load(weights, tmp_path, monkeypatch):
    for name, load in (("aesthetic", aesthetic), ("hpsv2", hpsv2), ("imagereward", imagereward)):
        source = Path(weights[name])
        file = source / SOURCES[name].file if source.is_dir() else source
        state = torch.load(file, weights_only=True)
        folder = shutil.copytree(source, tmp_path / name) if source.is_dir() else tmp_path
        moved = folder / file.name
        with monkeypatch.context() as patch:
            patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
            torch.save(state, moved)
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(moved, weights_only=True)
        local = weights | {name: str(folder if source.is_dir() else moved)}
        expected = load(weights, CPU, FP32)(pictures(), PROMPTS)
        torch.testing.assert_close(load(local, CPU, FP32)(pictures(), PROMPTS), expected)


def test_real_architectures():
    """Without weights of that size: the shapes of ViT-H-14 (HPSv2, PickScore), ViT-L/14 and Stable Diffusion v1.4."""
    with torch.device("meta"):
        hps = open_clip.CLIP(**rehearsal.REWARDS["full"]["hpsv2"])
        shapes = {name: rehearsal.REWARDS["full"][name] for name in ("pickscore", "clip")}
        blip = ImageReward(rehearsal.REWARDS["full"]["imagereward"])
        clips = {name: CLIPModel(rehearsal.clip_config(shape)) for name, shape in shapes.items()}
        unet = rehearsal.UNet2DConditionModel(**rehearsal.PIPELINES["full"]["unet"])
        text = rehearsal.CLIPTextModel(rehearsal.CLIPTextConfig(**rehearsal.PIPELINES["full"]["text"]))

    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())

    assert count(unet) == 859_520_964 and count(text) == 123_060_480
    assert count(hps) == count(clips["pickscore"]) == 986_109_441
    assert count(clips["clip"]) == 427_616_513
    assert count(blip) == 446_206_689


def test_missing_and_wrong_weights_say_what_belongs_where(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(reward_models, "hf_hub_download", offline)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(CLIPModel, "from_pretrained", offline)
    for name in ("hpsv2", "hpsv2.1", "pickscore", "imagereward", "aesthetic", "clipscore"):
        source = SOURCES["clip" if name == "clipscore" else name]
        with pytest.raises(ValueError) as error:
            load_reward(name)
        message = str(error.value)
        assert all(part in message for part in (source.hub, source.file, source.size, source.licence)), message
        assert "--reward_weights " in message and "\n" not in message
    with pytest.raises(ValueError, match="use NAME=PATH with a name of hpsv2, "):
        local_weights(["hps=x"])
    with pytest.raises(ValueError, match="there is no /nowhere"):
        local_weights(["hpsv2=/nowhere"])
    (tmp_path / "text.pt").write_text("not weights")
    torch.save({"state_dict": {"other": torch.ones(1)}}, tmp_path / "foreign.pt")
    torch.save({"state_dict": Path("code")}, tmp_path / "unsafe.pt")
    for file in ("text.pt", "foreign.pt", "unsafe.pt"):
        local = Path(shutil.copytree(weights["hpsv2"], tmp_path / Path(file).stem))
        shutil.copy(tmp_path / file, local / SOURCES["hpsv2"].file)
        with pytest.raises(ValueError, match="reward weights 'hpsv2': no HPS_v2_compressed.pt.*in .*" + Path(file).stem):
            load_reward("hpsv2", [f"hpsv2={local}"])


def offline(*_, **__):
    raise OSError("no connection")


def test_a_device_that_does_not_take_weights_is_named_and_no_file_is_missed(weights):
    gpu = torch.device("cuda", 0)  # conftest.py hides it, if there is one
    for what, load in (
        ("the reward model 'hpsv2'", lambda: hpsv2(weights, gpu, torch.float32)),
        ("the reward model 'clip'", lambda: clip("clip", weights["clip"], gpu, torch.float32)),
        ("the reward model 'imagereward'", lambda: imagereward(weights, gpu, torch.float32)),
        ("the reward model 'aesthetic'", lambda: load_reward("aesthetic", [f"{n}={p}" for n, p in weights.items()], gpu)),
        (f"the pipeline '{WEIGHTS}'", lambda: load_pipeline("toy", gpu)),
    ):
        with pytest.raises(ValueError, match=f"cuda:0 did not take {what}: ") as error:
            load()
        assert "reward weights" not in str(error.value)
