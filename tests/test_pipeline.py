"""plumbing/pipeline.py: what it does a few at a time, once, or not at all."""

import pytest
import torch
from diffusers.configuration_utils import FrozenDict

from plumbing import pipeline
from plumbing.pipeline import decode_latents, encode_prompts, score
from rewards import load_reward


def test_pictures_are_decoded_a_few_at_a_time(pipe, monkeypatch):
    """DECODED pixels, whatever the batch; pictures and scores are those of all at once."""
    latents = torch.randn(7, *(pipe.unet.config.in_channels, 8, 8), generator=torch.Generator().manual_seed(0))
    whole, batches, decode = decode_latents(pipe, latents), [], pipe.vae.decode
    assert whole.shape == (7, 3, 32, 32)
    monkeypatch.setattr(pipe.vae, "decode", lambda some: batches.append(len(some)) or decode(some))
    monkeypatch.setattr(pipeline, "DECODED", 3 * 32 * 32 + 5)
    torch.testing.assert_close(decode_latents(pipe, latents), whole, rtol=0, atol=1e-5)
    assert batches == [3, 3, 1]
    scores = score(pipe, latents, ["a"] * 7, lambda images, texts: images.mean((1, 2, 3)), 6)
    assert batches == [3, 3, 1, 3, 3, 1]
    torch.testing.assert_close(scores, whole.mean((1, 2, 3)), rtol=0, atol=1e-5)
    monkeypatch.setattr(pipeline, "DECODED", 1)  # a picture larger than that still is one
    assert len(decode_latents(pipe, latents[:2])) == 2 and batches[-2:] == [1, 1]


def test_latents_that_are_normalised_by_channel_are_decoded_so(pipe, monkeypatch):
    latents = torch.randn(2, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.linspace(*ends, latents.shape[1]) for ends in ((-0.1, 0.2), (0.5, 1.5)))
    scaled = latents * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1) * pipe.vae.config.scaling_factor
    expected = decode_latents(pipe, scaled)
    assert (expected - decode_latents(pipe, latents)).abs().max() > 1e-3
    known = pipe.vae.config | {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    monkeypatch.setattr(pipe.vae, "_internal_dict", FrozenDict(known))
    torch.testing.assert_close(decode_latents(pipe, latents), expected, rtol=0, atol=1e-5)


def test_a_prompt_is_encoded_once(pipe, monkeypatch):
    seen, forward = [], type(pipe.text_encoder).forward
    monkeypatch.setattr(
        type(pipe.text_encoder), "forward", lambda self, ids, *a, **k: seen.append(len(ids)) or forward(self, ids, *a, **k)
    )
    prompts = ["a red ring", "a blue disc", "a red ring", "a red ring"]
    states = encode_prompts(pipe, prompts).tensors["encoder_hidden_states"]
    assert seen == [2]
    for prompt, state in zip(prompts, states, strict=True):
        torch.testing.assert_close(encode_prompts(pipe, [prompt]).tensors["encoder_hidden_states"][0], state)


def test_an_unknown_hub_id_is_named_with_what_to_do(monkeypatch):
    """And not with the library's prose of several lines, however long."""

    def unknown(*arguments, **options):
        raise OSError("404 Client Error.\n" + "Repository Not Found for url. " * 20)

    monkeypatch.setattr(pipeline.DiffusionPipeline, "download", unknown)
    with pytest.raises(ValueError) as refused:
        pipeline.load_pipeline("nobody/nothing", torch.device("cpu"))
    line = str(refused.value)
    assert line.startswith("cannot load the hub id 'nobody/nothing'") and "\n" not in line and len(line) < 400
    assert "404 Client Error." in line and "hf download nobody/nothing --local-dir FOLDER" in line


def test_an_own_reward_gets_its_pictures_on_the_cpu(monkeypatch):
    """From wherever they are: here a device without content."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.ones(tensor.shape))
    assert load_reward("test_pipeline:mean")(torch.empty(2, 3, 4, 4, device="meta"), ["a", "b"]).tolist() == [1.0, 1.0]


def mean(images, prompts):
    return images.numpy().mean((1, 2, 3))
