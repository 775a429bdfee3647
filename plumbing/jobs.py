"""A queue of commands: several at a time, each with its log, on the cores or GPUs at hand."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.record import read_metrics


@dataclass
class Job:
    """A command, and where it is a training run its folder and number of epochs."""

    name: str
    command: list[str]
    run: Path | None = None
    epochs: int = 1

    def progress(self) -> int:
        """Epochs completed."""
        return read_metrics(self.run)[-1]["epoch"] if self.run and (self.run / "metrics.jsonl").exists() else 0


def file_name(*parts) -> str:
    """A name for files and folders of what is called so: words with dashes between them."""
    return " ".join(map(str, parts)).replace(",", "").replace("'", "").replace("= ", "").replace(" ", "-")


def work_off(jobs: list[Job], title: str, at_once: int, logs: Path) -> None:
    """Runs commands, at_once at a time; ValueError with the last line of the first that fails, once the others have stopped."""
    waiting, running, free, gpus = list(jobs), {}, list(range(at_once)), torch.cuda.device_count()
    finished = 0
    with tqdm(total=sum(job.epochs for job in jobs), desc=title, unit="epoch") as bar:
        try:
            while waiting or running:
                while waiting and free:
                    job, slot = waiting.pop(0), free.pop()
                    environment = os.environ | {"OMP_NUM_THREADS": "1"}
                    if gpus:
                        environment["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
                    log = (logs / f"{job.name}.log").open("w")
                    process = subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                    running[slot] = job, log, process
                time.sleep(1)
                for slot, (job, log, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[slot]
                    free.append(slot)
                    log.close()
                    finished += job.epochs
                    if process.returncode:
                        last = Path(log.name).read_text().strip().splitlines()[-1:]
                        raise ValueError(f"{job.name} failed, see {log.name}: {' '.join(last)}")
                bar.n = finished + sum(job.progress() for job, _, _ in running.values())
                bar.set_postfix_str(", ".join(job.name for job, _, _ in running.values()))
        except ValueError:
            for _, _, process in running.values():
                process.send_signal(signal.SIGINT)  # Ctrl-C reaches them without this
            raise
        finally:
            for _, log, process in running.values():
                process.wait()
                log.close()
