"""A result is the trained UNet and the schedule beside the very files the other parts were loaded from."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from miniature import build
from plumbing.pipeline import encode_prompts, load_pipeline, save_pipeline
from plumbing.schedules import ddim_scheduler

CPU = torch.device("cpu")


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(model_folder, tmp_path):
    """A pipeline whose text encoder has the key names of transformers 4, which transformers 5 reads but does not write."""
    folder = shutil.copytree(model_folder, tmp_path / "source")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file({f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}, file)
    return folder


def test_the_miniature_has_names_that_older_libraries_read(pipe, tmp_path):
    pipe.text_encoder.half().float()  # as it is saved
    build.save(pipe, tmp_path / "miniature")
    assert all(
        name.startswith("text_model.") for name in load_file(tmp_path / "miniature" / "text_encoder" / "model.safetensors")
    )
    index = json.loads((tmp_path / "miniature" / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "CLIPTokenizerFast"]  # which reads tokenizer.json in version 4 as well
    opened = load_pipeline(str(tmp_path / "miniature"), CPU)
    prompts = ["a small red circle on a blue background", "a cat", ""]
    assert opened.tokenizer(prompts).input_ids == pipe.tokenizer(prompts).input_ids
    for name, tensor in encode_prompts(pipe, prompts).tensors.items():
        assert torch.equal(encode_prompts(opened, prompts).tensors[name], tensor)


def test_what_was_not_trained_arrives_byte_for_byte(source, tmp_path):
    pipe, result = load_pipeline(str(source), CPU), tmp_path / "run" / "pipeline"
    with torch.no_grad():
        pipe.unet.conv_out.weight.add_(1)
    for num_steps in (5, 7):  # the second time over an older result
        save_pipeline(pipe, ddim_scheduler(pipe.scheduler.config, num_steps), result)
    before, after = files(source), files(result)
    untouched = {name for name in before if name.split("/")[0] not in ("unet", "scheduler", "model_index.json")}
    assert len({name.split("/")[0] for name in untouched}) == 3  # vae, text encoder and tokenizer
    assert {name: after[name] for name in untouched} == {name: before[name] for name in untouched}
    assert after.keys() == before.keys()
    assert not list(result.parent.glob("*.unfinished"))

    opened = StableDiffusionPipeline.from_pretrained(result)
    weight = StableDiffusionPipeline.from_pretrained(source).unet.conv_out.weight
    torch.testing.assert_close(opened.unet.conv_out.weight, weight + 1)
    assert type(opened.scheduler).__name__ == "DDIMScheduler" and opened.safety_checker is None


def test_a_safety_checker_that_was_left_out_is_not_asked_for(source, tmp_path):
    index = json.loads((source / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (source / "model_index.json").write_text(json.dumps(index))
    (source / "safety_checker").mkdir()
    (source / "safety_checker" / "model.safetensors").write_bytes(b"1.2 GB that nobody loads")
    pipe = load_pipeline(str(source), CPU)
    save_pipeline(pipe, ddim_scheduler(pipe.scheduler.config, 5), tmp_path / "result")
    assert not (tmp_path / "result" / "safety_checker").exists()
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "result").safety_checker is None
