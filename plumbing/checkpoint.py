"""Checkpoints: everything that continuing a run bit by bit needs, in safetensors and JSON, written whole or not at all.

    checkpoints/epoch_000020/
        weights.safetensors      the trained parameters, by name
        optimizer.safetensors    the optimiser's tensors, as "parameter index.name"
        method.pt                what a comparator remembers: DDPO's reward statistics, DPOK's critic; read with weights_only
        state.json               epochs completed and the configuration

The newest is for resuming. Of older ones, those that --keep_every asks for stay, without the optimiser, for evaluate.py.

Random numbers need no state: noise and prompt order are functions of (seed, epoch, ...), see sampler.py and plumbing/prompts.py.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


def save(
    run: Path,
    epoch: int,
    config: dict,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    remembers: dict,
) -> None:
    """Saves the state after `epoch` completed epochs under run/checkpoints and thins the older ones; OSError if it cannot.

    remembers: what a comparator remembers, by name: anything with state_dict().
    """
    folder = run / "checkpoints" / f"epoch_{epoch:06d}"
    if folder.exists():
        return
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_tensors({name: parameter.detach() for name, parameter in parameters.items()}, unfinished / "weights.safetensors")
    state = optimizer.state_dict()["state"]
    save_tensors({f"{i}.{k}": v for i, entry in state.items() for k, v in entry.items()}, unfinished / "optimizer.safetensors")
    try:
        torch.save({name: thing.state_dict() for name, thing in remembers.items()}, unfinished / "method.pt")
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"cannot write {unfinished / 'method.pt'}: {error}") from error
    (unfinished / "state.json").write_text(json.dumps({"epoch": epoch, "config": config}, indent=1))
    older = all_checkpoints(run)
    os.replace(unfinished, folder)
    for old in older:
        if config["keep_every"] and epoch_of(old) % config["keep_every"] == 0:
            (old / "optimizer.safetensors").unlink(missing_ok=True)
        else:
            shutil.rmtree(old)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """save_file, with an OSError instead of the library's own error where the disk refuses."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def all_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("epoch_*") if path.suffix != ".unfinished")


def epoch_of(folder: Path) -> int:
    return int(folder.name.removeprefix("epoch_"))


def read_state(run: Path) -> dict:
    """The newest checkpoint's {"epoch", "config", "folder"}; ValueError if there is none or it is damaged."""
    found = all_checkpoints(run)
    if not found:
        raise ValueError(f"nothing to resume: no checkpoint under {run / 'checkpoints'}")
    return read_folder(found[-1])


def read_folder(folder: Path) -> dict:
    """One checkpoint's {"epoch", "config", "folder"}; ValueError if it is damaged."""
    try:
        state = json.loads((folder / "state.json").read_text())
        return {"epoch": int(state["epoch"]), "config": dict(state["config"]), "folder": folder}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"damaged checkpoint {folder}: state.json: {error}") from error


def load_weights(folder: Path, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Restores the weights in place; ValueError if the checkpoint is damaged or belongs to another model."""
    try:
        weights = load_file(folder / "weights.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"damaged checkpoint {folder}: {error}") from error
    shapes, wanted = ({name: tuple(t.shape) for name, t in d.items()} for d in (weights, parameters))
    if shapes != wanted:
        differing = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
        raise ValueError(f"foreign checkpoint {folder}: it does not fit the model, e.g. {differing[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def load(run: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, remembers: dict) -> int:
    """Restores weights, optimiser and what is remembered in place from the newest checkpoint -> completed epochs.

    ValueError if there is none, it is damaged, or it belongs to another model.
    """
    state = read_state(run)
    try:
        flat = load_file(state["folder"] / "optimizer.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"damaged checkpoint {state['folder']}: {error}") from error
    load_weights(state["folder"], parameters)
    restored = optimizer.state_dict()
    for name, tensor in flat.items():
        index, _, key = name.partition(".")
        restored["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(restored)
    try:
        known = torch.load(state["folder"] / "method.pt", map_location="cpu", weights_only=True)
        for name, thing in remembers.items():
            thing.load_state_dict(known[name])
    except Exception as error:  # torch raises many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"damaged checkpoint {state['folder']}: method.pt: {reason}") from error
    return state["epoch"]
