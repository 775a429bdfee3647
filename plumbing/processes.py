"""One process or many: the little of torch.distributed that training and evaluation need.

`torchrun` starts the processes and tells each its place through the environment; without it there is one. RANK is a process's
identity, LOCAL_RANK the GPU it uses on its own machine, so several machines work. What is exchanged travels by gloo, which waits
as long as the work takes; gradients on GPUs travel by NCCL, which has its own, shorter limit. A function whose name begins with
all_ is called by every process, or none of them comes back from it.
"""

import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from plumbing.errors import complain, first_line, told_of
from plumbing.heartbeat import BEAT, SILENCE, Heartbeat

Made = TypeVar("Made")

RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
CONNECTING = 120  # seconds that processes have for finding one another at the start
WORKING = timedelta(days=7)  # that one may wait for another later on: longer than any evaluation
LISTING = 60  # seconds after which a network file system shows what another machine has written
BUCKET = 2**25  # numbers in a message of gradients
SAVING = threading.Lock()  # while this process saves, nothing ends it
HEARTBEAT: Heartbeat | None = None  # of this process, once there are others
GRADIENTS: dist.ProcessGroup | None = None  # by which GPUs sum gradients; None is the group of all, by gloo


def start(tf32: bool = False, deterministic: bool = False) -> torch.device:
    """Sets torch's precision, joins the other processes, if there are any, and returns this process's device.

    A GPU where every process of this machine has one of its own, else the CPU. ConnectionError if the processes cannot reach one
    another, ValueError if they have not the same kind of device; where one never comes, the others exit with a line that says so.
    """
    place, of = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    device = torch.device("cuda", place) if torch.cuda.device_count() >= of else torch.device("cpu")
    if device.type == "cuda":
        with told_of("this process", device):
            torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic with its own choice
    torch.use_deterministic_algorithms(deterministic)
    if WORLD_SIZE > 1 and not dist.is_initialized():
        join(device)
    return device


def join(device: torch.device) -> None:
    """Connects to all others: by gloo, and where all have GPUs by NCCL, which else would put it off to the first gradients."""
    global GRADIENTS, HEARTBEAT
    with or_exit(CONNECTING, f"not all of {WORLD_SIZE} processes were there after {CONNECTING} s"), connected():
        store = of_this_attempt(next(dist.rendezvous("env://"))[0])
        dist.init_process_group("gloo", store=store, rank=RANK, world_size=WORLD_SIZE, timeout=WORKING)
        own = dist.PrefixStore("heartbeat", store.clone())  # a connection of its own, which nothing else may keep busy
        own.set_timeout(timedelta(seconds=SILENCE / 2))
        HEARTBEAT = Heartbeat(own, RANK, WORLD_SIZE, end)
        dist.barrier()
        HEARTBEAT.start()
        kinds = all_gather(lambda: torch.tensor([device.type == "cuda"]))
    if kinds.any() and not kinds.all():
        without = (~kinds).nonzero().flatten().tolist()
        raise ValueError(f"processes {without} have no GPU of their own and the others have: give each one, or none")
    if kinds.all():
        with or_exit(CONNECTING, f"NCCL had not connected the GPUs after {CONNECTING} s"), connected():
            GRADIENTS = dist.new_group(backend="nccl")
            dist.all_reduce(torch.zeros(1, device=device), group=GRADIENTS)
            torch.cuda.synchronize()


def of_this_attempt(store: dist.Store) -> dist.Store:
    """A part of the store that is new. torchrun keeps one through its restarts, with the addresses of those that are dead."""
    mine = os.urandom(8).hex()
    store.set(f"here/{RANK}", mine)
    if RANK > 0:
        first = store.get(f"answer/{mine}").decode()  # waits for it
        store.add(f"{first}/came", 1)
        return dist.PrefixStore(first, store)
    while store.add(f"{mine}/came", 0) < WORLD_SIZE - 1:
        for here in [f"here/{rank}" for rank in range(1, WORLD_SIZE)]:
            if store.check([here]):
                store.set(f"answer/{store.get(here).decode()}", mine)
        time.sleep(0.1)
    return dist.PrefixStore(mine, store)


def run_script(main: Callable[[list[str]], None]) -> None:
    """Runs main(arguments); exit code 130 or 143 after Ctrl-C or SIGTERM.

    Where processes have been joined, this one ends at once with its exit code: on the ordinary way out of a process whose peers
    are gone the libraries' threads abort it now and then, with another code.
    """
    try:
        main(sys.argv[1:])
    except (SystemExit, KeyboardInterrupt) as stopped:
        code = stopped.code if isinstance(stopped, SystemExit) else 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
        if dist.is_initialized():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        HEARTBEAT.leave()
        dist.destroy_process_group()


def end(message: str) -> None:
    """Ends this process, whatever it waits for but a save, with one line and exit code 2."""
    with SAVING:
        complain(ConnectionError(message))
        os._exit(2)


@contextmanager
def or_exit(seconds: float, message: str) -> Iterator[None]:
    """Ends this process with one line and exit code 2 if the block, wherever it hangs, takes longer."""

    timer = threading.Timer(
        seconds, end, [f"{message} (several network interfaces? see docs/stable-diffusion.md, More than one machine)"]
    )
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def connected() -> Iterator[None]:
    """Around a collective: ConnectionError, in one line, for whatever the libraries raise."""
    try:
        yield
    except RuntimeError as error:
        if HEARTBEAT:
            time.sleep(4 * BEAT)  # until it is known who gives no sign
        who = HEARTBEAT.silent_ones() if HEARTBEAT else ""
        raise ConnectionError(f"{who or 'another process'} is gone or cannot be reached: {first_line(error)}") from error


def all_succeed(produce: Callable[[], object]) -> list:
    """Runs `produce` in every process and returns the results by rank, the same in all.

    If it raises in one process, that one says so, and the same is raised in all, marked as `shared`: none waits for a result that
    never comes.
    """
    if WORLD_SIZE == 1:
        return [produce()]
    parts: list = [None] * WORLD_SIZE
    try:
        mine = produce()
    except Exception as error:
        complain(error)
        mine = error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # some errors do not travel
            kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
            mine = kind(f"{type(error).__name__}: {error}")
            mine.told = True
    with connected():
        dist.all_gather_object(parts, mine)
    failed = [part for part in parts if isinstance(part, Exception)]
    if failed:
        error = mine if isinstance(mine, Exception) else failed[0]
        error.shared = True
        raise error
    return parts


def all_fail(error: Exception) -> None:
    """Where this process alone has an error: raises it in all, at the next collective that the others come to."""

    def fail() -> None:
        raise error

    all_succeed(fail)


def all_or_none(produce: Callable[[], Made]) -> Made:
    """Runs `produce` in every process and returns this one's own result, when all have theirs; see all_succeed."""
    made = []
    all_succeed(lambda: made.append(produce()))
    return made[0]


def all_gather(produce: Callable[[], Tensor]) -> Tensor:
    """The tensors that `produce` makes in every process, on the CPU, joined by rank; see all_succeed."""
    return torch.cat(all_succeed(lambda: produce().cpu()))


def all_wait_for_first(action: Callable[[], object]) -> None:
    """Runs `action` in the first process while the others wait; if it raises there, it raises in all."""

    def part() -> None:
        if RANK == 0:
            action()

    all_succeed(part)


def all_check_shared(folder: Path) -> None:
    """ValueError unless every process finds in `folder` what the first one writes there."""
    sign = folder / f".shared-{all_succeed(lambda: os.urandom(8).hex())[0]}"
    all_wait_for_first(sign.touch)

    def seen() -> bool:
        return folder.is_dir() and sign.name in os.listdir(folder)

    found = all_succeed(lambda: seen() or any(time.sleep(1) or seen() for _ in range(LISTING)))
    all_wait_for_first(sign.unlink)
    if not all(found):
        blind = [rank for rank, there in enumerate(found) if not there]
        raise ValueError(f"{folder} is another folder for processes {blind}: the machines must share one, over the network")


class Share:
    """Which of R = N * B rows of an (N, B, S) table this process works on.

    entries: (N, B, S), bool, of each of several phases of the work, between which the processes wait for one another. Every
    process has equally many rows, up to one, and of every phase about as many entries.
    """

    def __init__(self, entries: Sequence[Tensor]):
        by_row = torch.stack([some.flatten(0, 1).sum(1) for some in entries], 1).tolist()
        every: list[list[int]] = [[] for _ in range(WORLD_SIZE)]
        loads = [[0] * len(entries) for _ in every]
        for row in sorted(range(len(by_row)), key=lambda row: (-max(by_row[row]), by_row[row].index(max(by_row[row])))):
            fewest = min(map(len, every))
            free = [rank for rank, rows in enumerate(every) if len(rows) == fewest]
            rank = min(free, key=lambda rank: sum(load * cost for load, cost in zip(loads[rank], by_row[row], strict=True)))
            every[rank].append(row)
            loads[rank] = [load + cost for load, cost in zip(loads[rank], by_row[row], strict=True)]
        self.rows = torch.tensor(sorted(every[RANK]))
        self.order = torch.tensor([row for rows in every for row in sorted(rows)])

    def of(self, table: Tensor) -> Tensor:
        """This process's rows of a table (N, B, ...) whose first two dimensions are the R."""
        return table.flatten(0, 1)[self.rows]

    def all_gather(self, produce: Callable[[], Tensor]) -> Tensor:
        """The tensors that `produce` makes of every process's rows, joined in the order of the R rows."""
        gathered = all_gather(produce)
        return torch.empty_like(gathered).index_copy_(0, self.order, gathered)


def peak_memory_gib() -> float:
    """The most memory this process has held: of its GPU, as torch allocated it, or else resident in RAM."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def all_sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replaces every gradient by its sum over all processes; what no local step touched counts as zero."""
    bucket, size = [], 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.numel()
        if size >= BUCKET:
            all_sum(bucket)
            bucket, size = [], 0
    all_sum(bucket)


def all_sum(tensors: list[Tensor]) -> None:
    """Replaces the tensors by their sums over all processes, in one message."""
    if WORLD_SIZE > 1 and tensors:
        together = torch.cat([tensor.flatten() for tensor in tensors])
        with connected():
            dist.all_reduce(together, group=GRADIENTS)
        for tensor, part in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def say(message: str) -> None:
    """News, on stderr, once, whatever the number of processes."""
    if RANK == 0 and message:
        tqdm.write(message, file=sys.stderr)  # above the progress bar, if there is one


def answer(message: str) -> None:
    """What a command was asked for, on stdout, once."""
    if RANK == 0:
        print(message)


@contextmanager
def handled_by(handler) -> Iterator[None]:
    """Ctrl-C and SIGTERM, which schedulers send, go to this handler in the block; not in a thread, which gets no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in usual.items():
            signal.signal(number, before)


def interrupt(number: int, frame=None) -> None:
    """A signal handler: KeyboardInterrupt with the signal's number, and no second one."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block: weights, optimiser and record always belong to whole epochs."""
    waiting: list[int] = []
    try:
        with handled_by(lambda number, _: waiting.append(number)):
            yield
    finally:
        if waiting:
            interrupt(waiting[0])
