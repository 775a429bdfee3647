"""What went wrong, in one line, from whichever process it went wrong in: where, what, and what to lower if memory ran out."""

import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

# What a device or its driver refuses, in whatever line of whatever library.
DEVICE_ERRORS = (MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
DEVICE_WORDS = re.compile("CUDA|CUBLAS|cuDNN|NCCL|deterministic")  # and what else is a device's among plain RuntimeErrors

LOWER = {  # what asks for less memory, by the function that asked for too much; the first that was under way counts
    "score_set": "lower --batch_size",
    "rhat_of_share": "lower --batch_size",
    "backward_through_table": "lower --train_batch_size, or use --gradient_checkpointing",
    "log_prob_table": "lower --log_prob_batch_size",
    "sample_trajectories": "lower --sample_batch_size, or use --latents_on_cpu",
    "score": "lower --sample_batch_size",
    "scores": "lower --sample_batch_size",
    "reference": "use --latents_on_cpu",
    "step": "use --reference_on_cpu",  # of the optimiser, which makes its moments
}


def first_line(error: BaseException) -> str:
    """Of what a library says of an error, or what kind of error it is."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def text_of(error: BaseException) -> str:
    """One line about an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        under_way = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        remedy = next((remedy for function, remedy in LOWER.items() if function in under_way), "see what saves memory")
        return f"{'. '.join(text.split('. ')[:3])}: {remedy} (docs/stable-diffusion.md)"
    return text if isinstance(error, ValueError | OSError | RuntimeError) else f"{type(error).__name__}: {text}"


def last_words(said: str) -> str:
    """What a command that failed said of it: its line of error where it has one, else its last."""
    lines = said.strip().splitlines() or ["it said nothing"]
    return next((line for line in lines if ": error" in line), lines[-1])


def complain(error: Exception) -> None:
    """The error in one line on stderr; an error that has come here from another process has been told there."""
    if getattr(error, "told", False):
        return
    where = f" in process {os.environ['RANK']} on {socket.gethostname()}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    tqdm.write(f"{os.path.basename(sys.argv[0])}: error{where}: {text_of(error)}", file=sys.stderr)  # above a progress bar
    sys.stderr.flush()
    error.told = True


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns what a user or a device can cause into one line on stderr and exit code 2; anything else keeps its traceback."""
    try:
        yield
    except Exception as error:
        of_device = isinstance(error, DEVICE_ERRORS) or (isinstance(error, RuntimeError) and DEVICE_WORDS.search(str(error)))
        if not isinstance(error, kinds) and not of_device:
            raise
        complain(error)
        sys.exit(2)


@contextmanager
def told_of(what: str, device: torch.device) -> Iterator[None]:
    """Around what moves weights to a device: ValueError that names both if the device does not take them."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"{device} did not take {what}: {' '.join(str(error).split())}") from error
