"""One process or many: the little of torch.distributed that training and evaluation need.

`torchrun` starts the processes and tells each its place through the environment; without it there is one. RANK is a process's
identity, LOCAL_RANK the GPU it uses on its own machine, so several machines work. Tensors on the CPU travel by gloo, those on
GPUs by NCCL. A function whose name begins with all_ is called by every process, or none of them comes back from it.
"""

import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def start() -> torch.device:
    """Joins the process group, if there is one, and returns this process's device."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_gather(produce: Callable[[], Tensor]) -> Tensor:
    """Runs `produce` in every process and returns the results (on the CPU) joined by rank, the same in all.

    If it raises in one process, the same is raised in all, so that none waits for a result that never comes.
    """
    if WORLD_SIZE == 1:
        return produce().cpu()
    parts: list = [None] * WORLD_SIZE
    try:
        mine = produce().cpu()
    except Exception as error:
        mine = error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # some errors do not travel
            mine = RuntimeError(f"{type(error).__name__}: {error}")
    dist.all_gather_object(parts, mine)
    for part in parts:
        if isinstance(part, Exception):
            raise part
    return torch.cat(parts)


def all_wait_for_first(action: Callable[[], object]) -> None:
    """Runs `action` in the first process while the others wait; if it raises there, it raises in all."""

    def part() -> Tensor:
        if RANK == 0:
            action()
        return torch.empty(0)

    all_gather(part)


def peak_memory_gib() -> float:
    """The most memory this process has held: of its GPU, as torch allocated it, or else resident in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def all_sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replaces every gradient by its sum over all processes; what no local step touched counts as zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if WORLD_SIZE > 1:
            dist.all_reduce(parameter.grad)


def say(message: str, error: bool = False) -> None:
    """Prints once, whatever the number of processes."""
    if RANK == 0:
        tqdm.write(message, file=sys.stderr if error else sys.stdout)  # above the progress bar, if there is one


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: weights, optimiser and record always belong to a whole number of epochs."""
    waiting = []
    usual = signal.signal(signal.SIGINT, lambda *_: waiting.append("Ctrl-C"))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if waiting:
        raise KeyboardInterrupt


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns what a user can cause into one line on stderr and exit code 2; anything else keeps its traceback."""
    try:
        yield
    except kinds as error:
        say(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}", error=True)
        sys.exit(2)
