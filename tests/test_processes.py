"""Processes that wait, fail or never come: real ones by gloo, each told of in one line."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from textwrap import indent
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

from plumbing import errors, heartbeat, processes

BEGINNING = """
import time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from plumbing import processes
from plumbing.errors import one_line_errors
from plumbing.processes import RANK
"""


def two(code: str, **environment) -> list[tuple[int, str, str]]:
    """Runs the code in two processes that know of each other -> exit code, stdout and stderr of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
    script = f"{BEGINNING}\ndef main(argv):{indent(code, '    ')}\n\nprocesses.run_script(main)"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=60) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def error_lines(stderr: str) -> list[str]:
    assert "Traceback" not in stderr, stderr
    return [line for line in stderr.splitlines() if ": error" in line]


def test_slow_work_is_waited_for_and_every_failure_is_told_where_it_happened(tmp_path):
    """With a limit of a second in place of the library's half an hour, as it would hold without one of our own."""
    code = f"""
dist.distributed_c10d.default_pg_timeout = timedelta(seconds=1)
folder = Path({str(tmp_path)!r})
with one_line_errors(ValueError, OSError):
    processes.start()
    processes.all_wait_for_first(lambda: time.sleep(2.5))
    print("waited", processes.all_gather(lambda: torch.tensor([RANK])).tolist(), flush=True)
    processes.all_check_shared(folder)
    processes.LISTING = 1
    (folder / str(RANK)).mkdir()
    try:
        processes.all_check_shared(folder / str(RANK))
    except ValueError as error:
        print("not shared:", error, flush=True)
    try:
        processes.all_fail(ValueError("alone")) if RANK == 1 else processes.all_gather(lambda: torch.zeros(1))
    except ValueError as error:
        print(error, error.shared, flush=True)
    if RANK == 1:
        raise ValueError("no such thing in the second process")
    processes.all_gather(lambda: torch.zeros(1))
"""
    (code_0, out_0, err_0), (code_1, out_1, err_1) = two(code)
    for rank, out in enumerate((out_0, out_1)):
        assert "waited [0, 1]" in out
        assert f"not shared: {tmp_path / str(rank)} is another folder for processes [1]" in out
        assert "alone True" in out
    assert not list(tmp_path.rglob(".shared*"))
    assert (code_0, code_1) == (2, 2)
    first, last = error_lines(err_1)
    assert f"error in process 1 on {socket.gethostname()}: alone" in first
    assert f"error in process 1 on {socket.gethostname()}: no such thing in the second process" in last
    (line,) = error_lines(err_0)
    host = socket.gethostname()
    assert f"error in process 0 on {host}: process 1 on {host} is gone or cannot be reached" in line


def test_who_works_long_is_waited_for_and_who_is_stopped_is_named():
    """Within a silence of 3 seconds in place of 40."""
    (code, out, err), (stopped, _, _) = two("""
import os, signal, subprocess
from plumbing import heartbeat
heartbeat.SILENCE = 3
processes.start()
processes.all_gather(lambda: torch.zeros(1) if RANK == 0 else time.sleep(6) or torch.zeros(1))
print("waited", flush=True)
if RANK == 1:
    subprocess.Popen(["sh", "-c", f"sleep 15; kill -9 {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
began = time.monotonic()
processes.all_gather(lambda: torch.zeros(1))
""")
    (line,) = error_lines(err)
    host = socket.gethostname()
    assert (code, stopped) == (2, -9) and "waited" in out
    assert f"error in process 0 on {host}: no sign of process 1 on {host} for 3 s: killed, stopped, or its machine" in line


def test_a_store_that_never_answers_is_told(monkeypatch):
    """As when the process, or agent, that holds it is frozen: whoever asks it is stuck in the question."""
    monkeypatch.setattr(heartbeat, "BEAT", 0.02)
    monkeypatch.setattr(heartbeat, "SILENCE", 0.2)
    frozen, said, told = threading.Event(), [], threading.Event()
    answers = iter([1])  # to the first question alone, before the thread begins

    def add(*_):
        return next(answers, None) or frozen.wait()

    store = SimpleNamespace(set=lambda *_: None, add=add, multi_get=lambda _: [1, 1])
    beat = heartbeat.Heartbeat(store, 1, 2, lambda message: said.append(message) or told.set())
    beat.start()
    assert told.wait(20)
    beat.left.set()
    frozen.set()
    (message,) = said
    assert message == f"no answer for 0 s from {heartbeat.MEETING}, where the processes find one another"


def test_the_addresses_of_an_attempt_before_are_not_used():
    """torchrun's store outlives its workers: a second attempt meets in it, though the first has left its keys there."""
    (_, out_0, err_0), (_, out_1, err_1) = two(
        """
at = dict(host_name="localhost", port=int(os.environ["MASTER_PORT"]), multi_tenant=True, wait_for_workers=False)
kept = dist.TCPStore(is_master=RANK == 0, **at)
meet = processes.of_this_attempt
found = []
for attempt in range(2):
    time.sleep(2 * attempt * (RANK == 0))  # the second time the first process comes late
    found.append(meet(kept))
    found[-1].set(f"address of {RANK}", str(attempt))
    time.sleep(1)
    print(found[-1].get(f"address of {1 - RANK}").decode(), flush=True)
""".replace("\nat =", "\nimport os\nat =")
    )
    assert (out_0.split(), out_1.split()) == (["0", "1"], ["0", "1"]), err_0 + err_1


def test_a_process_that_never_comes_is_not_waited_for_long():
    began = time.monotonic()
    (code, _, err), _ = two("""
processes.CONNECTING = 2
if RANK == 0:
    processes.start()
""")
    (line,) = error_lines(err)
    assert code == 2 and "error in process 0" in line and "not all of 2 processes were there after 2 s" in line
    assert time.monotonic() - began < 50


def test_a_wrong_network_interface_shows_at_the_start():
    outcomes = two(
        """
with one_line_errors(ValueError, OSError):
    processes.start()
""",
        GLOO_SOCKET_IFNAME="nowhere",
    )
    for rank, (code, _, err) in enumerate(outcomes):
        (line,) = error_lines(err)
        assert code == 2 and f"error in process {rank}" in line and "nowhere" in line


class Recorder:
    """Stands in for torch.distributed: what start() asks of it, in order."""

    def __init__(self, monkeypatch, gpus: int, others_have_gpus: bool):
        self.calls = []
        monkeypatch.setattr(processes, "WORLD_SIZE", 2)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: self.calls.append(("set_device", device)))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.calls.append(("synchronize",)))
        monkeypatch.setattr(torch, "zeros", lambda *_, device: device)  # no such device here
        monkeypatch.setattr(dist, "is_initialized", lambda: False)
        store = dist.HashStore()
        monkeypatch.setattr(dist, "rendezvous", lambda where: iter([(store, 1, 2)]))
        monkeypatch.setattr(processes, "of_this_attempt", lambda store: store)
        monkeypatch.setattr(processes, "Heartbeat", lambda *_: SimpleNamespace(start=lambda: self.calls.append(("beat",))))
        monkeypatch.setattr(dist, "barrier", lambda: None)
        monkeypatch.setattr(
            dist, "init_process_group", lambda backend, timeout, **_: self.calls.append(("init", backend, timeout))
        )
        monkeypatch.setattr(dist, "new_group", lambda backend: f"group of {backend}")
        monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: self.calls.append(("all_reduce", tensor, group)))
        monkeypatch.setattr(processes, "GRADIENTS", None)
        monkeypatch.setattr(processes, "HEARTBEAT", None)

        def gathered(parts, mine):
            parts[:] = [torch.tensor([others_have_gpus]), mine]

        monkeypatch.setattr(dist, "all_gather_object", gathered)


def test_nccl_connects_before_any_work(monkeypatch):
    recorder, gpu = Recorder(monkeypatch, gpus=2, others_have_gpus=True), torch.device("cuda", 1)
    assert processes.start() == gpu
    joined = [("init", "gloo", processes.WORKING), ("beat",), ("all_reduce", gpu, "group of nccl"), ("synchronize",)]
    assert recorder.calls == [("set_device", gpu), *joined]
    parameter = torch.nn.Parameter(torch.empty(1))
    parameter.grad = torch.ones(1)
    processes.all_sum_gradients([parameter])
    assert recorder.calls[-1] == ("all_reduce", parameter.grad, "group of nccl")


def test_gradients_travel_in_few_messages(monkeypatch):
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (1, 1, 5), (7,), (2,))]
    grads = [torch.randn(parameter.shape) for parameter in parameters]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    parameters[3].grad = None  # what no local step touched
    messages = []
    monkeypatch.setattr(processes, "WORLD_SIZE", 2)
    monkeypatch.setattr(processes, "BUCKET", 9)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: messages.append(len(tensor)) or tensor.mul_(2).add_(1))
    processes.all_sum_gradients(parameters)
    assert messages == [6 + 4, 5 + 7, 2]
    for n, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
        torch.testing.assert_close(parameter.grad, torch.ones_like(grad) if n == 3 else 2 * grad + 1)
    assert timedelta(days=1) < processes.WORKING < timedelta(days=24)  # in milliseconds it has to fit 31 bits


def test_a_gpu_is_used_only_where_every_process_of_the_machine_has_one(monkeypatch):
    recorder = Recorder(monkeypatch, gpus=1, others_have_gpus=False)
    assert processes.start() == torch.device("cpu")
    assert recorder.calls == [("init", "gloo", processes.WORKING), ("beat",)] and processes.GRADIENTS is None
    Recorder(monkeypatch, gpus=1, others_have_gpus=True)
    with pytest.raises(ValueError, match=re.escape("processes [1] have no GPU of their own and the others have")):
        processes.start()


def test_precision_is_set_at_the_start(monkeypatch):
    for tf32, deterministic in ((True, True), (False, False)):
        processes.start(tf32, deterministic)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
        assert torch.are_deterministic_algorithms_enabled() == deterministic


def backward_through_table(what):
    raise what


@pytest.mark.parametrize(
    "what", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has. And. More."), MemoryError()]
)
def test_out_of_memory_names_the_flag_that_lowers_it(capsys, what):
    with pytest.raises(SystemExit) as stopped, errors.one_line_errors():
        backward_through_table(what)
    (line,) = error_lines(capsys.readouterr().err)
    assert stopped.value.code == 2 and "lower --train_batch_size" in line and "--gradient_checkpointing" in line
    assert "More" not in line and ("Tried to allocate 2.00 GiB" in line or isinstance(what, MemoryError))


def test_what_a_device_says_is_one_line_and_a_mistake_in_the_code_is_not(capsys):
    with pytest.raises(SystemExit), errors.one_line_errors(ValueError):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`\nand more")
    (line,) = error_lines(capsys.readouterr().err)
    assert "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)` and more" in line
    with pytest.raises(RuntimeError, match="mat1 and mat2"), errors.one_line_errors(ValueError):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_flags_to_lower_are_of_functions_and_settings_that_exist():
    """errors.LOWER names functions and flags by their names."""
    from config import Config
    from evaluate import EvaluationConfig

    code = "".join(path.read_text() for path in (ROOT / "sampler.py", ROOT / "evaluate.py", *(ROOT / "plumbing").glob("*.py")))
    settings = {f"--{name}" for kind in (Config, EvaluationConfig) for name in kind.__dataclass_fields__}
    for function, flags in errors.LOWER.items():
        assert f"def {function}(" in code or hasattr(torch.optim.AdamW, function)
        assert set(re.findall(r"--\w+", flags)) <= settings
