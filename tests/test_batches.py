"""Batch sizes that are found: with a memory that the tests make up, since the real passes run here on a CPU."""

import dataclasses
import json

import pytest
import torch
from test_train import arguments, metrics

import train
from plumbing import batches
from plumbing.flags import parse

SIZES = ("sample_batch_size", "log_prob_batch_size", "train_batch_size")
ALL_AUTO = [word for name in SIZES for word in (f"--{name}", "auto")]


def test_largest_is_what_fits_or_the_limit():
    tried = []

    def fits(run, size):
        tried.append(size)
        return size <= 12

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batches, "fits", fits)
        assert batches.largest("x", None, 100) == 8 and tried == [1, 2, 4, 8, 16]
        assert batches.largest("x", None, 11) == 11
        patched.setattr(batches, "fits", lambda run, size: False)
        with pytest.raises(ValueError, match="train_batch_size: memory is not enough for a single one"):
            batches.largest("train_batch_size", None, 100)


def test_fits_knows_a_full_memory_from_a_fault(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1000))
    done = []
    for used, enough in ((900, True), (901, False)):
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda used=used: used)
        assert batches.fits(done.append, 3) == enough
    assert done == [3, 3]

    def full(size):
        raise torch.OutOfMemoryError("full")

    def wrong(size):
        raise RuntimeError("wrong")

    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 0)
    assert not batches.fits(full, 3)
    with pytest.raises(RuntimeError, match="wrong"):
        batches.fits(wrong, 3)


@pytest.mark.parametrize("more", [[], ["--latents_on_cpu", "True"], ["--lora_rank", "2"]])
def test_every_pass_is_tried_beside_what_the_run_holds(more, model_folder, monkeypatch, capsys):
    """On the CPU, which is taken for a GPU: the passes themselves run, and leave neither gradients nor other sizes behind."""
    seen, held = [], []

    def fits(run, size):
        run(size)
        seen.append((run.__name__, size))
        return size <= {"sample": 2, "log_prob": 5, "train": 9}[run.__name__]

    monkeypatch.setattr(batches, "fits", fits)
    flags = "--preset toy --prompts_per_epoch 2 --images_per_prompt 3 --eval_prompts= --model".split()
    config = parse([*flags, str(model_folder), *more, *ALL_AUTO])
    assert [getattr(config, name) for name in SIZES] == [0, 0, 0]
    *_, pipe = train.load(config, torch.device("cpu"))
    policy = train.pipeline_policy(pipe, config.num_steps, guidance_scale=1.0, eta=1.0)
    reference = train.make_trainable(pipe, config)
    trained = list(train.trained_parameters(pipe).values())
    on_gpu = dataclasses.replace(policy, device=type("Device", (), {"type": "cuda"})())

    def noted(make):
        def here(*size, **rest):
            made = make(*size, **{name: value for name, value in rest.items() if name != "device"})
            held.append(made.numel())
            return made

        return here

    for maker in ("randn", "zeros", "empty_like"):
        monkeypatch.setattr(batches.torch, maker, noted(getattr(torch, maker)))
    found = batches.fit_batches(config, pipe, on_gpu, reference, trained)
    assert [getattr(found, name) for name in SIZES] == [2, 4, 8]
    sizes = {"sample": (1, 2, 4), "log_prob": (1, 2, 4, 8), "train": (1, 2, 4, 8, 16)}
    assert seen == [(name, size) for name, tried in sizes.items() for size in tried]
    assert all(parameter.grad is None for parameter in trained)
    D, T = 768, config.num_steps
    assert sum(held[: 2 * len(trained)]) == 2 * sum(parameter.numel() for parameter in trained)  # moments
    assert held[2 * len(trained)] == (1 if "--latents_on_cpu" in more else 2 * 6) * (T + 1) * D
    assert held[2 * len(trained) + 1] == 3 * 1 * (T + 1) * D  # of sampling one picture
    assert dataclasses.replace(found, **dict.fromkeys(SIZES, 0)) == config
    assert "auto: --sample_batch_size 2, --log_prob_batch_size 4, --train_batch_size 8" in capsys.readouterr().err


def test_a_reference_that_ran_out_of_memory_goes_back_to_the_cpu(model_folder, monkeypatch):
    config = parse(["--preset", "toy", "--model", str(model_folder), "--reference_on_cpu", "True"])
    *_, pipe = train.load(config, torch.device("cpu"))
    policy = train.pipeline_policy(pipe, 5, guidance_scale=1.0, eta=1.0)
    reference, moved = train.make_trainable(pipe, config), []
    to = type(pipe.unet).to
    monkeypatch.setattr(type(pipe.unet), "to", lambda unet, where: moved.append(str(where)) or to(unet, where))
    with pytest.raises(torch.OutOfMemoryError), reference(policy):
        raise torch.OutOfMemoryError("full")
    assert len(moved) == 2 and moved[1] == "cpu"


def test_a_run_keeps_what_was_found(model_folder, tmp_path):
    """On a CPU a fixed number, in the run's settings, and the result is that of the number."""
    train.main(arguments(model_folder, tmp_path / "auto", "--epochs", "1", *ALL_AUTO))
    numbers = [word if word != "auto" else "64" for word in ALL_AUTO]
    train.main(arguments(model_folder, tmp_path / "number", "--epochs", "1", *numbers))
    kept = json.loads((tmp_path / "auto" / "config.json").read_text())
    assert [kept[name] for name in SIZES] == [64, 64, 64]
    assert metrics(tmp_path / "auto")[1] == metrics(tmp_path / "number")[1]
    assert [getattr(parse(["--resume", str(tmp_path / "auto")]), name) for name in SIZES] == [64, 64, 64]


@pytest.mark.parametrize("wrong", ["0", "-1", "many", "1.5"])
def test_what_is_no_size_is_refused(wrong):
    with pytest.raises(ValueError, match=f"train_batch_size.*must be at least 1, or auto, not {wrong}"):
        parse(["--preset", "toy", "--train_batch_size", wrong])
