"""Resuming a run that an earlier version began: what no longer exists is named in one line."""

import dataclasses
import json

import pytest

from config import Config
from plumbing.flags import parse


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
    state.write_text(json.dumps({"epoch": 1, "config": settings | saved}))
    with pytest.raises(ValueError, match=f"cannot resume {tmp_path}: {message}"):
        parse(["--resume", str(tmp_path)])
    state.write_text(json.dumps({"epoch": 1, "config": settings}))
    assert parse(["--resume", str(tmp_path)]).output_dir == str(tmp_path)
