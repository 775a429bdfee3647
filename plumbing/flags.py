"""Settings from the command line: defaults, presets, resumed runs, and one line for what is wrong."""

import argparse
import dataclasses
import difflib
from pathlib import Path
from typing import Literal, get_args, get_origin

from transformers import HfArgumentParser

from config import AUTO, MAY_CHANGE_ON_RESUME, PRESETS, Config
from plumbing import checkpoint
from plumbing.record import check_links, read_run


class OneLineParser(argparse.ArgumentParser):
    """Raises ValueError with one line instead of printing the usage of all flags."""

    def error(self, message: str):
        raise ValueError(f"{message} (all settings: --help)")


class Parser(OneLineParser, HfArgumentParser):
    """Of a dataclass's fields."""

    def parse_strictly(self, argv: list[str]):
        """The dataclass; ValueError for an unknown argument, with the flag it resembles."""
        config, unknown = self.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if unknown:
            close = difflib.get_close_matches(unknown[0], [flag for flag in self._option_string_actions if flag[:2] == "--"], 1)
            raise ValueError(f"unknown argument {unknown[0]!r}" + (f": did you mean {close[0]}?" if close else " (see --help)"))
        return config


def parse(
    argv: list[str], kind: type = Config, presets: dict[str, dict] = PRESETS, prog: str = "train.py",
    description: str = "Finetuning by PRDP, DDPO, DPOK, D3PO or Flow-GRPO.",
):  # fmt: skip
    """A `kind` from the command line: defaults, then the preset's or the resumed run's settings, then the flags given.

    ValueError for an unknown preset or flag, a value of the wrong kind, or a resumed setting that may not change or is no more.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", default=kind.preset)
    first.add_argument("--resume", default="")
    try:
        given, _ = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    parser = Parser(kind, prog=prog, description=description, allow_abbrev=False)
    if given.resume:
        check_links(Path(given.resume))
        saved = checkpoint.read_state(Path(given.resume))["config"]
        check_known(given.resume, saved, kind)
        parser.set_defaults(**saved | {"resume": given.resume, "output_dir": given.resume})
    elif given.preset in presets:
        parser.set_defaults(preset=given.preset, **presets[given.preset])
    else:
        raise ValueError(f"unknown preset {given.preset!r}: use {', '.join(presets)}")
    config = parser.parse_strictly(argv)
    if given.resume:
        check_unchanged(config, saved, f"cannot resume {given.resume}")
        if "reward" not in names_given(argv):
            check_no_code(config.reward, f"--reward, since {given.resume} was begun with it")
    return config


def names_given(argv: list[str]) -> set[str]:
    """Of a command line the settings that it gives."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}


def check_no_code(rewards: list[str], how: str) -> None:
    """ValueError for a reward module:function, of rewards that only a run folder names: it would run its code."""
    for name in rewards:
        if ":" in name:
            raise ValueError(f"the reward {name} is code, which is run only if it is typed: give it by {how}")


def go_on(config):
    """The same settings, with `resume` where --output_dir holds a run of theirs that has saved a checkpoint.

    So the command that began a run continues it. ValueError if the folder holds another run.
    """
    run = Path(config.output_dir)
    check_links(run)
    found = checkpoint.all_checkpoints(run)
    if config.resume or not (found or (run / "metrics.jsonl").exists()):
        return config
    saved = checkpoint.read_state(run)["config"] if found else read_run(run)
    check_known(config.output_dir, saved, type(config))
    check_unchanged(config, saved, f"{config.output_dir} already holds a run, choose another --output_dir to begin one")
    found_sizes = {name: saved[name] for name in saved if name.endswith("batch_size") and getattr(config, name) == AUTO}
    return dataclasses.replace(config, resume=config.output_dir, **found_sizes) if found else config


def check_unchanged(config, saved: dict, sentence: str) -> None:
    """ValueError, beginning with the sentence, if a setting is not the saved run's and may not change on the way."""
    now, before = dataclasses.asdict(config), dataclasses.asdict(type(config)()) | saved  # what it did not know was by default
    changed = [name for name in now if now[name] != before[name] and name not in MAY_CHANGE_ON_RESUME]
    if changed:
        name, may = changed[0], sorted(MAY_CHANGE_ON_RESUME & now.keys() - {"resume", "output_dir"})
        raise ValueError(f"{sentence}: {name}={now[name]}, and it ran with {before[name]}; allowed to change: {', '.join(may)}")


def check_known(run: str, saved: dict, kind: type) -> None:
    """ValueError if a run was begun with a setting, or a value of one, that this version no longer has, or another script's."""
    kinds = {field.name: field.type for field in dataclasses.fields(kind)}
    for name, value in saved.items():
        allowed = get_args(kinds[name]) if get_origin(kinds.get(name)) is Literal else None
        if name not in kinds or (allowed and value not in allowed):
            now = f"now it is {' or '.join(allowed)}" if allowed else "this version has no such setting"
            raise ValueError(f"cannot resume {run}: it was begun with {name}={value}; {now}")
