"""Flags: those of runs that an earlier version began, and those that torchrun might take for its own."""

import dataclasses
import json

import pytest
from torch.distributed.run import get_args_parser

from config import Config
from evaluate import EvaluationConfig
from plumbing.flags import go_on, parse


@pytest.mark.parametrize(
    "saved, message",
    [
        ({"quantum": True}, "it was begun with quantum=True; this version has no such setting"),
        ({"autocast": "fp16"}, "it was begun with autocast=fp16; now it is no or bf16"),
        ({"method": "magic"}, "it was begun with method=magic; now it is prdp or ddpo or dpok or d3po"),
    ],
)
def test_a_run_begun_with_what_has_vanished_is_told_so(tmp_path, saved, message):
    folder = tmp_path / "checkpoints" / "epoch_000001"
    folder.mkdir(parents=True)
    settings = dataclasses.asdict(Config(preset="toy", output_dir=str(tmp_path)))
    state = folder / "state.json"
    state.write_text(json.dumps({"epoch": 1, "processes": 1, "state": {}, "config": settings | saved}))
    with pytest.raises(ValueError, match=f"cannot resume {tmp_path}: {message}"):
        parse(["--resume", str(tmp_path)])
    state.write_text(json.dumps({"epoch": 1, "processes": 1, "state": {}, "config": settings}))
    assert parse(["--resume", str(tmp_path)]).output_dir == str(tmp_path)


def test_sizes_that_were_found_at_the_start_stay_when_the_same_command_goes_on(tmp_path):
    argv = ["--preset", "toy", "--output_dir", str(tmp_path), "--train_batch_size", "auto"]
    folder = tmp_path / "checkpoints" / "epoch_000001"
    folder.mkdir(parents=True)
    settings = dataclasses.asdict(parse(argv)) | {"train_batch_size": 24}
    (folder / "state.json").write_text(json.dumps({"epoch": 1, "processes": 1, "state": {}, "config": settings}))
    config = go_on(parse(argv))
    assert (config.train_batch_size, config.sample_batch_size, config.resume) == (24, 64, str(tmp_path))


def test_torchrun_leaves_every_flag_to_the_script():
    """It takes the beginning of an option of its own for that option, even behind the script's name, and refuses `--run`."""
    for kind in (Config, EvaluationConfig):
        for field in dataclasses.fields(kind):
            flags = [f"--{field.name}", "value"]
            assert get_args_parser().parse_args(["--nproc_per_node=8", "script.py", *flags]).training_script_args == flags
