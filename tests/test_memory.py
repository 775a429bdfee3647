"""Derived memory: the accounting on known tensors, and what each option saves on the tiny shape."""

import copy
import json

import pytest
import torch

from benchmarks import memory, memory_few, speed
from config import LASRO_PRESETS, LasroConfig
from plumbing.flags import parse

FLAGS = ["--preset", "large-hpsv2", "--sample_batch_size", "4", "--train_batch_size", "16"]


def test_peak_counts_what_is_alive_at_once():
    def run():
        a = torch.empty(2**20)  # 4 MiB
        b = a.view(2, -1) + 1  # the view is free, the sum is 4 MiB more
        del a
        torch.empty(2**18)  # 1 MiB beside b alone
        return b

    assert memory.peak_of(run) * 1024 == pytest.approx(8)
    assert memory.peak_of(lambda: [torch.empty(2**20) for _ in range(3)]) * 1024 == pytest.approx(12)
    assert memory.peak_of(lambda: [torch.empty(2**20).sum() for _ in range(3)]) * 1024 == pytest.approx(4, abs=0.01)


@pytest.fixture(autouse=True)
def tinier(monkeypatch):
    """Two blocks instead of four: an operation on tensors without content takes as long, however small they are."""
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4)
    monkeypatch.setattr(memory.rehearsal, "VAE_BLOCKS", blocks)
    shape = copy.deepcopy(memory.rehearsal.PIPELINES["tiny"])
    shape["unet"] |= dict(
        block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    shape["vae"] |= dict(block_out_channels=(16, 16))
    monkeypatch.setitem(memory.rehearsal.PIPELINES, "tiny", shape)
    turbo = memory.rehearsal.PIPELINES["tiny-sd-turbo"] | {part: shape[part] for part in ("unet", "vae")}
    monkeypatch.setitem(memory.rehearsal.PIPELINES, "tiny-sd-turbo", turbo)


def test_options_save_what_they_should(monkeypatch):
    norms, group_norm, layer_norm = set(), torch.nn.functional.group_norm, torch.nn.functional.layer_norm
    with monkeypatch.context() as patch:  # under bf16 autocast, by CUDA's rules: tests/test_fake_cuda.py
        patch.setattr(torch.nn.functional, "group_norm", lambda x, *rest: norms.add(x.dtype) or group_norm(x, *rest))
        patch.setattr(torch.nn.functional, "layer_norm", lambda x, *rest: norms.add(x.dtype) or layer_norm(x, *rest))
        usual = memory.derive(parse(FLAGS), "tiny")
    assert norms == {torch.float32}
    with torch.device("meta"):
        unet = memory.rehearsal.UNet2DConditionModel(**memory.rehearsal.PIPELINES["tiny"]["unet"])
    size = memory.size_of(unet)
    assert usual["update"] > usual["resident"] > 4 * size  # the UNet, the reference and two moments

    with torch.device("meta"):
        hpsv2 = memory.open_clip.CLIP(**memory.rehearsal.REWARDS["tiny"]["hpsv2"])
    trajectories = 64 * 8 * 51 * 4 * 8 * 8 * 4 / 2**30
    waiting = memory.derive(parse([*FLAGS, "--reference_on_cpu", "--latents_on_cpu", "--reward_dtype", "fp16"]), "tiny")
    saved = size + trajectories + memory.size_of(hpsv2) / 2
    for phase in ("resident", "sample", "reward", "update"):
        assert usual[phase] - waiting[phase] == pytest.approx(saved)
    assert usual["reference"] - waiting["reference"] == pytest.approx(saved - size)  # it is there when it is needed

    recomputed = memory.derive(parse([*FLAGS, "--gradient_checkpointing"]), "tiny")
    assert recomputed["update"] < usual["update"] and recomputed["resident"] == usual["resident"]

    adapters = memory.derive(parse([*FLAGS, "--lora_rank", "2"]), "tiny")
    assert adapters["resident"] < usual["resident"] - 2.9 * size  # no reference, hardly any moments


def test_models_of_few_steps_hold_three_networks_and_a_surrogate(monkeypatch):
    flags = ["--preset", "sd-turbo", "--teacher_guidance", "1"]

    def derive(*more: str) -> dict[str, float]:
        return memory_few.derive(parse([*flags, *more], LasroConfig, LASRO_PRESETS), "tiny-sd-turbo")

    with torch.device("meta"):
        unet = memory.rehearsal.UNet2DConditionModel(**memory.rehearsal.PIPELINES["tiny"]["unet"])
    size, usual = memory.size_of(unet), derive()
    assert list(usual) == ["resident", "sample", "reward", "surrogate", "generator"]
    assert usual["resident"] > 5 * size and min(usual["surrogate"], usual["generator"]) > usual["resident"] - 2 * size
    monkeypatch.setattr(memory_few, "peak_of", lambda run: 0.0)  # what is resident is enough, and sooner known
    adapters = derive("--lora_rank", "2", "--reward_dtype", "fp16")
    with torch.device("meta"):
        blip = memory.ImageReward(memory.rehearsal.REWARDS["tiny"]["imagereward"])
    saved = usual["resident"] - adapters["resident"] - memory.size_of(blip) / 2
    assert 1.9 * size < saved < 2 * size  # hardly any moments of the generator


def test_passes_of_an_epoch():
    entries = 32 * 16 * 50
    assert memory.passes(parse([])) == entries * (1 + 1 + 1 + 9 + 10 * 3)  # drawn, reference, old, again, updates
    assert memory.passes(parse(["--updates_per_epoch", "1"])) == entries * (1 + 1 + 3)
    assert memory.passes(parse(["--updates_per_epoch", "1", "--lora_rank", "2"])) == entries * (1 + 1 + 2)
    assert speed.flops_of(lambda: torch.ones(2, 3) @ torch.ones(3, 4)) == 2 * 2 * 3 * 4
    attention = torch.nn.functional.scaled_dot_product_attention
    assert speed.flops_of(lambda: attention(*torch.ones(3, 1, 1, 5, 7))) == 2 * (2 * 5 * 5 * 7)


def test_table_and_json(capsys, tmp_path, monkeypatch):
    """What derive() says of these flags and this shape, tested above, is printed and written."""
    derived = {"exaflop_per_epoch": 1.5, "resident": 1.25, "sample": 2.25, "reward": 3.25, "reference": 4.25, "update": 5.25}
    asked = []
    monkeypatch.setattr(memory, "derive", lambda *how: asked.append(how) or derived)
    memory.main(["--shape", "tiny", "--output", str(tmp_path / "memory.json"), "--preset", "toy"])
    assert asked == [(parse(["--preset", "toy"]), "tiny")]
    assert "| these flags | 1.2 | 2.2 | 3.2 | 4.2 | 5.2 | 1.5 |" in capsys.readouterr().out
    result = json.loads((tmp_path / "memory.json").read_text())
    assert "not measured" in result["how"]
    assert result["results"] == [{"name": "these flags", "flags": "--preset toy"} | derived]
    with pytest.raises(SystemExit) as stopped:
        memory.main(["--presett", "toy"])
    assert stopped.value.code == 2 and "unknown argument '--presett'" in capsys.readouterr().err
