"""torchrun's restarts: one process is killed or stopped, torchrun starts all anew, and the end must equal a run left alone.

    python -m benchmarks.restarts --output results/restarts.json

Two processes, of one agent and of two (--nnodes=2, both on this machine), where either of them is hit by SIGKILL or SIGSTOP.
"""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from benchmarks.faults import kill_all, result
from plumbing import checkpoint
from plumbing.errors import last_words, one_line_errors
from plumbing.flags import OneLineParser
from plumbing.provenance import write_result

RUN = "train.py --preset toy --prompts toy-small --eval_prompts= --epochs 12 --prompts_per_epoch 2 --images_per_prompt 4"
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}
HIT_AFTER = 3  # epochs


def begin(agents: int, run: Path) -> list[subprocess.Popen]:
    """torchrun once for each agent, of two processes in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meet = (
        f"--max-restarts=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:{port} --nnodes={agents} --nproc_per_node={2 // agents}"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *meet.split(),
        *RUN.split(),
        "--save_every",
        "1",
        "--output_dir",
        str(run),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        for _ in range(agents)
    ]  # fmt: skip


def workers(run: Path) -> dict[int, int]:
    """The process id of each rank of the run."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            said = dict(word.split("=", 1) for word in (process / "environ").read_text().split("\0") if "=" in word)
            if "RANK" in said and str(run) in (process / "cmdline").read_text().split("\0"):
                found[int(said["RANK"])] = int(process.name)
    return found


def hit(agents: int, name: str, rank: int, run: Path) -> dict:
    """One run of which one process is hit -> what the others did, and where the run went on; ValueError if it did not end."""
    started = begin(agents, run)
    try:
        while not any(checkpoint.epoch_of(folder) >= HIT_AFTER for folder in checkpoint.all_checkpoints(run)):
            if started[0].poll() is not None:
                raise ValueError(f"torchrun has ended before: {last_words(started[0].stdout.read())}")
            time.sleep(0.05)
        ranks = workers(run)
        os.kill(ranks[rank], SIGNALS[name])
        since = time.monotonic()
        while Path(f"/proc/{ranks[1 - rank]}/environ").exists():
            time.sleep(0.05)
        seconds = time.monotonic() - since
        said = "".join(process.communicate(timeout=600)[0] for process in started)
        if any(process.returncode for process in started):
            raise ValueError(f"torchrun did not bring the run to its end: {last_words(said)}")
    finally:
        kill_all(run)
    return {
        "agents": agents,
        "signal": name,
        "rank": rank,
        "seconds_until_the_other_ended": seconds,
        "went_on_from": [line.rpartition(" ")[2] for line in said.splitlines() if f"{run} goes on from" in line],
    }


def row(case: dict) -> str:
    """Of the table."""
    shown = [str(case[name]) for name in ("agents", "signal", "rank")]
    shown += [f"{case['seconds_until_the_other_ended']:.0f} s", ", ".join(case["went_on_from"]), str(case["equal"])]
    return f"| {' | '.join(shown)} |"


def main(argv: list[str]) -> None:
    parser = OneLineParser(prog="benchmarks.restarts", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, help="a JSON file")
    with one_line_errors(ValueError, OSError):
        options, folder, cases = parser.parse_args(argv), Path(tempfile.mkdtemp()), []
        if any(process.wait() for process in begin(1, folder / "alone")):
            raise ValueError("the run that is left alone did not come to its end")
        for number, (agents, name, rank) in enumerate(tqdm(list(itertools.product((1, 2), SIGNALS, (0, 1))), "restarts")):
            run = folder / str(number)
            cases.append(hit(agents, name, rank, run) | {"equal": result(run) == result(folder / "alone")})
        if options.output:
            write_result(options.output, "-m benchmarks.restarts", argv, {"results": cases})
        shutil.rmtree(folder)
    print("| agents | signal | rank | the other ended after | went on from | equal |\n|" + "---|" * 6)
    print("\n".join(map(row, cases)))
    if any(case["seconds_until_the_other_ended"] > 60 for case in cases):
        sys.exit("a process outlived another by more than 60 s")
    if not all(case["equal"] for case in cases):
        sys.exit("a run that was started anew has ended otherwise than the one left alone")


if __name__ == "__main__":
    main(sys.argv[1:])
