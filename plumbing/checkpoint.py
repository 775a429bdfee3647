"""Checkpoints: everything that continuing a run bit by bit needs, in safetensors and JSON, written whole or not at all.

    checkpoints/epoch_000020/
        weights.safetensors   the trained parameters, by name
        state.safetensors     the tensors of all else: optimisers, and what a method remembers (statistics, critics, replay)
        state.json            epochs completed, settings, number of processes, and where those tensors belong
        SHA256SUMS            of the three, as `sha256sum --check` reads it

The two newest are for resuming: where a file of the newest is not what was written, the one before serves. Of older ones, those
that --keep_every asks for stay, without state.safetensors, for evaluate.py.

Random numbers need no state: noise and prompt order are functions of (seed, epoch, ...), see sampler.py and plumbing/prompts.py.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from plumbing.errors import first_line

WEIGHTS, STATE, ABOUT, SUMS = "weights.safetensors", "state.safetensors", "state.json", "SHA256SUMS"
AT_ONCE = 3  # two that are kept, and one that is being written


def save(
    run: Path, epoch: int, config: dict, processes: int, parameters: dict[str, torch.nn.Parameter], states: dict
) -> None:  # fmt: skip
    """Saves the state after `epoch` completed epochs under run/checkpoints and thins the older ones; OSError if it cannot.

    states: the optimiser and what else is remembered, by name: anything with state_dict().
    """
    folder = run / "checkpoints" / f"epoch_{epoch:06d}"
    if folder.exists():
        return
    clear_unfinished(run)
    unfinished = folder.with_suffix(".unfinished")
    tensors: dict[str, torch.Tensor] = {}
    state = {name: take_tensors(thing.state_dict(), name, tensors) for name, thing in states.items()}
    try:
        unfinished.mkdir(parents=True)
        save_tensors({name: parameter.detach() for name, parameter in parameters.items()}, unfinished / WEIGHTS)
        save_tensors(tensors, unfinished / STATE)
        about = {"epoch": epoch, "processes": processes, "config": config, "state": state}
        (unfinished / ABOUT).write_text(json.dumps(about, indent=1))
        seal(unfinished)
        os.replace(unfinished, folder)
        settle(folder.parent)
    except OSError as error:
        clear_unfinished(run)
        whole = [f"; {found[-1]} is whole" for found in [all_checkpoints(run)] if found]
        raise OSError(f"cannot save a checkpoint: {error}{''.join(whole)}") from error
    for old in all_checkpoints(run)[:-2]:
        if config["keep_every"] and epoch_of(old) % config["keep_every"] == 0:
            (old / STATE).unlink(missing_ok=True)
        else:
            shutil.rmtree(old, ignore_errors=True)
    for damaged in (run / "checkpoints").glob("*.damaged"):
        shutil.rmtree(damaged, ignore_errors=True)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """save_file, with an OSError instead of the library's own error where the disk refuses."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """load_file, with a ValueError instead of the library's own, and without holding on to the file."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"damaged checkpoint {path.parent}: {path.name}: {error}") from error


def take_tensors(thing, name: str, tensors: dict[str, torch.Tensor]):
    """The nested state as JSON has it; its tensors go to `tensors`, under names that are left in their places."""
    if isinstance(thing, torch.Tensor):
        tensors[name] = thing
        return {"tensor": name}
    if isinstance(thing, dict):  # of any keys, where JSON has only strings
        return {"items": [[key, take_tensors(value, f"{name}.{key}", tensors)] for key, value in thing.items()]}
    if isinstance(thing, list | tuple):
        return [take_tensors(value, f"{name}.{i}", tensors) for i, value in enumerate(thing)]
    return thing


def put_tensors(thing, tensors: dict[str, torch.Tensor]):
    """The inverse of take_tensors; tuples have become lists."""
    if isinstance(thing, dict):
        return (
            {key: put_tensors(value, tensors) for key, value in thing["items"]} if "items" in thing else tensors[thing["tensor"]]
        )
    return [put_tensors(value, tensors) for value in thing] if isinstance(thing, list) else thing


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, *names: str) -> None:
    """SHA256SUMS of these files of a folder, or of the three other ones of a checkpoint."""
    sums = [f"{checksum(folder / name)}  {name}\n" for name in names or (WEIGHTS, STATE, ABOUT)]
    (folder / SUMS).write_text("".join(sums))


def seal(folder: Path, *names: str) -> None:
    """write_sums(), and the disk has all of the folder, which then may take its place."""
    write_sums(folder, *names)
    for written in (*folder.iterdir(), folder):
        settle(written)


def settle(path: Path) -> None:
    """Waits until the disk has a file, or a folder's entries: a machine may lose its power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def clear_unfinished(run: Path) -> None:
    """Removes what a save that was interrupted has left."""
    for folder in (run / "checkpoints").glob("*.unfinished"):
        shutil.rmtree(folder)


def size_of(parameters: dict[str, torch.nn.Parameter], states: dict) -> int:
    """Bytes of a checkpoint after the first update of AdamW, which keeps two moments of every parameter it is given.

    Of what grows, as a replay buffer does, `size_when_full` counts.
    """
    groups = [group for thing in states.values() for group in getattr(thing, "param_groups", [])]
    moments = [parameter for group in groups for parameter in group["params"]]
    remembered: dict[str, torch.Tensor] = {}
    growing = sum(getattr(thing, "size_when_full", 0) for thing in states.values())
    others = {
        name: thing.state_dict()
        for name, thing in states.items()
        if not hasattr(thing, "param_groups") and not hasattr(thing, "size_when_full")
    }
    take_tensors(others, "", remembered)
    every = [*parameters.values(), *moments, *moments, *remembered.values()]
    return growing + sum(tensor.numel() * tensor.element_size() for tensor in every)


def check_room(run: Path, size: int) -> str:
    """What the checkpoints of a run may take, for people to read; OSError if the disk has less.

    size: bytes of one.
    """
    there = sum(file.stat().st_size for folder in all_checkpoints(run)[-2:] for file in folder.iterdir())
    free = shutil.disk_usage(run).free + there
    needed, has = (f"{number / 1e9:.3g} GB" for number in (AT_ONCE * size, free))
    if free < AT_ONCE * size:
        raise OSError(f"the disk of {run} has {has} left, and checkpoints need {needed}: two that are kept and one being written")
    return f"checkpoints: up to {needed} of the {has} that the disk has left, two that are kept and one being written"


def all_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("epoch_*") if not path.suffix)


def kept_on_the_way(run: Path) -> list[Path]:
    """Those that --keep_every asked for, without the newest, which is as far as the run is."""
    older = all_checkpoints(run)[:-1]
    every = read_state(run)["config"]["keep_every"] if older else 0
    return [folder for folder in older if every and epoch_of(folder) % every == 0]


def epoch_of(folder: Path) -> int:
    return int(folder.name.removeprefix("epoch_"))


def read_state(run: Path) -> dict:
    """read_folder() of the newest checkpoint whose state.json is what was written; ValueError if there is none."""
    found = all_checkpoints(run)
    if not found:
        raise ValueError(f"nothing to resume: no checkpoint under {run / 'checkpoints'}")
    errors = []
    for folder in reversed(found):
        try:
            check_sums(folder, ABOUT)
            return read_folder(folder)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def read_folder(folder: Path) -> dict:
    """One checkpoint's {"epoch", "processes", "config", "state", "folder"}; ValueError if it is damaged."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        kinds = {"epoch": int, "processes": int, "config": dict, "state": dict}
        return {name: kind(about[name]) for name, kind in kinds.items()} | {"folder": folder}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"damaged checkpoint {folder}: state.json: {error}") from error


def check_sums(folder: Path, *names: str) -> None:
    """ValueError unless these files of a folder are what was written."""
    try:
        sums = dict(reversed(line.split()) for line in (folder / SUMS).read_text().splitlines())
        wrong = [name for name in names if checksum(folder / name) != sums.get(name)]
    except (OSError, ValueError) as error:
        raise ValueError(f"damaged checkpoint {folder}: {SUMS}: {error}") from error
    if wrong:
        raise ValueError(f"damaged checkpoint {folder}: {wrong[0]} is not what was written, by its SHA-256")


def newest_whole(run: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint whose files are what was written, and what is wrong with each newer one, which is set aside.

    ValueError if there is none.
    """
    wrong = []
    for folder in reversed(all_checkpoints(run)):
        try:
            check_sums(folder, WEIGHTS, STATE, ABOUT)
            read_folder(folder)
        except ValueError as error:
            wrong.append((folder, str(error)))
            continue
        for damaged, _ in wrong:  # so that the epoch can be saved again
            shutil.rmtree(damaged.with_suffix(".damaged"), ignore_errors=True)
            damaged.rename(damaged.with_suffix(".damaged"))
        return folder, [error for _, error in wrong]
    raise ValueError(wrong[0][1] if wrong else f"nothing to resume: no checkpoint under {run / 'checkpoints'}")


def load_weights(folder: Path, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Restores the weights in place; ValueError if the checkpoint is damaged or belongs to another model."""
    check_sums(folder, WEIGHTS)
    weights = load_tensors(folder / WEIGHTS)
    shapes, wanted = ({name: tuple(t.shape) for name, t in d.items()} for d in (weights, parameters))
    if shapes != wanted:
        differing = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
        raise ValueError(f"foreign checkpoint {folder}: it does not fit the model, e.g. {differing[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def load(folder: Path, parameters: dict[str, torch.nn.Parameter], states: dict) -> dict:
    """Restores weights and states in place from one checkpoint, whose files have been checked -> what read_folder() says of it.

    ValueError if it belongs to another model or method.
    """
    about = read_folder(folder)
    load_weights(folder, parameters)
    try:
        known = put_tensors({"items": list(about["state"].items())}, load_tensors(folder / STATE))
        for name, thing in states.items():
            thing.load_state_dict(known[name])
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"foreign checkpoint {folder}: state.json: {first_line(error)}") from error
    return about
