"""Flags: those of runs that an earlier version began, and those that torchrun might take for its own."""

import dataclasses
import json

import pytest
from torch.distributed.run import get_args_parser

from config import Config
from evaluate import EvaluationConfig
from plumbing import checkpoint
from plumbing.flags import go_on, parse


def write_checkpoint(run, settings):
    """One whose weights nobody reads."""
    folder = run / "checkpoints" / "epoch_000001"
    folder.mkdir(parents=True, exist_ok=True)
    for name in (checkpoint.WEIGHTS, checkpoint.STATE):
        (folder / name).touch()
    about = {"epoch": 1, "processes": 1, "state": {}, "config": settings}
    (folder / checkpoint.ABOUT).write_text(json.dumps(about))
    checkpoint.write_sums(folder)


@pytest.mark.parametrize(
    "saved, message",
    [
        ({"quantum": True}, "it was begun with quantum=True; this version has no such setting"),
        ({"autocast": "fp16"}, "it was begun with autocast=fp16; now it is no or bf16"),
        ({"method": "magic"}, "it was begun with method=magic; now it is prdp or ddpo or dpok or d3po or grpo"),
    ],
)
def test_a_run_begun_with_what_has_vanished_is_told_so(tmp_path, saved, message):
    settings = dataclasses.asdict(Config(preset="toy", output_dir=str(tmp_path)))
    write_checkpoint(tmp_path, settings | saved)
    with pytest.raises(ValueError, match=f"cannot resume {tmp_path}: {message}"):
        parse(["--resume", str(tmp_path)])
    write_checkpoint(tmp_path, settings)
    assert parse(["--resume", str(tmp_path)]).output_dir == str(tmp_path)


def test_sizes_that_were_found_at_the_start_stay_when_the_same_command_goes_on(tmp_path):
    argv = ["--preset", "toy", "--output_dir", str(tmp_path), "--train_batch_size", "auto"]
    write_checkpoint(tmp_path, dataclasses.asdict(parse(argv)) | {"train_batch_size": 24})
    config = go_on(parse(argv))
    assert (config.train_batch_size, config.sample_batch_size, config.resume) == (24, 64, str(tmp_path))


def test_torchrun_leaves_every_flag_to_the_script():
    """It takes the beginning of an option of its own for that option, even behind the script's name, and refuses `--run`."""
    for kind in (Config, EvaluationConfig):
        for field in dataclasses.fields(kind):
            flags = [f"--{field.name}", "value"]
            assert get_args_parser().parse_args(["--nproc_per_node=8", "script.py", *flags]).training_script_args == flags
