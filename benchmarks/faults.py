"""Runs that are killed: kill -9 again and again, each time the same command anew, and the end must equal a run never killed.

    python -m benchmarks.faults --kills 50 --output results/faults.json

One process, two, and LaSRO take turns. Of three kills one waits for a save to be under way, one for an evaluation, and one comes
at any moment. All processes of a run die at once, as with their machine. What a kill has interrupted is read from the folder that
it leaves: an unfinished checkpoint, or an epoch that is saved and recorded and whose evaluation, which is due, is missing.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from plumbing import checkpoint
from plumbing.errors import last_words, one_line_errors
from plumbing.flags import OneLineParser
from plumbing.jobs import file_name
from plumbing.provenance import write_result
from plumbing.record import read_metrics

COMMON = "--prompts toy-small --eval_prompts toy-small --prompts_per_epoch 2 --epochs 6 --eval_every 1 --save_every 1"
SCENES = {
    "train.py": f"train.py --preset toy --images_per_prompt 2 {COMMON}",
    "train.py --method ddpo, two processes": (
        "-m torch.distributed.run --standalone --nproc_per_node=2 train.py --preset toy --method ddpo "
        f"--images_per_prompt 2 {COMMON}"
    ),
    "lasro.py": (
        f"lasro.py --preset toy-turbo {COMMON} --images_per_prompt 2 --pretraining_epochs 2 --pretraining_updates 1 "
        "--surrogate_updates 1 --surrogate_batch 2 --generator_updates 1 --generator_batch 2 --anchor_pictures 2"
    ),
}  # fmt: skip
AIMS = ("save", "evaluation", "any moment")
WITHIN = {"save": 0.05, "evaluation": 0.3, "any moment": 0.0}  # seconds of it that pass, at most, before the kill
CLOCK_AND_MEMORY = ("seconds", "images_per_second", "peak_memory_gib")


def begin(scene: str, run: Path) -> subprocess.Popen:
    command = [sys.executable, *SCENES[scene].split(), "--output_dir", str(run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def kill_all(run: Path) -> None:
    """SIGKILL to every process whose command line names the run, until there is none that lives."""
    alive = True
    while alive:
        alive = False
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended meanwhile
                if str(run).encode() in process.read_bytes().split(b"\0"):
                    os.kill(int(process.parent.name), signal.SIGKILL)
                    alive = True


def under_way(run: Path, since: float) -> tuple[str, int] | None:
    """What has begun since that time and is not finished, and of which epoch: a save, an evaluation, or neither."""
    for folder in (run / "checkpoints").glob("*.unfinished"):
        if folder.stat().st_mtime >= since:
            return "save", checkpoint.epoch_of(folder.with_suffix(""))
    record = run / "metrics.jsonl"
    if record.exists() and record.stat().st_mtime >= since:
        last = read_metrics(run)[-1]
        if last["eval_reward"] is None and (run / "checkpoints" / f"epoch_{last['epoch']:06d}").exists():
            return "evaluation", last["epoch"]
    return None


def kill_once(scene: str, run: Path, aim: str, length: float, chance: random.Random) -> str | None:
    """Runs until the kill -> what it interrupted; None if the run came to its end before. ValueError if it fails by itself."""
    found = checkpoint.all_checkpoints(run)
    wanted = (checkpoint.epoch_of(found[-1]) if found else 0) + chance.randint(1, 2)
    since, moment = time.time(), chance.uniform(0, length)
    process = begin(scene, run)
    while process.poll() is None:
        try:
            now = under_way(run, since)
        except OSError:  # what was there a moment before
            now = None
        in_aim = now is not None and now[0] == aim and now[1] >= wanted
        if in_aim or (aim == "any moment" and time.time() > since + moment):
            time.sleep(chance.uniform(0, WITHIN[aim]))
            kill_all(run)
            process.communicate()
            interrupted = under_way(run, since)
            return interrupted[0] if interrupted else "neither"
        time.sleep(0.005)
    said = process.communicate()[1]
    if process.returncode:
        raise ValueError(f"{scene} ended by itself with exit code {process.returncode}: {last_words(said)}")
    return None


def result(run: Path) -> tuple[list[dict], bytes]:
    """Record and weights, without what the machine decides."""
    lines = [{name: value for name, value in line.items() if name not in CLOCK_AND_MEMORY} for line in read_metrics(run)]
    return lines, (run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def campaign(kills: int, folder: Path, seed: int) -> dict[str, dict[str, int]]:
    """Kills that often, and lets every run that was killed come to its end -> counts by scene."""
    chance, uninterrupted, length = random.Random(seed), {}, {}
    for scene in tqdm(SCENES, "uninterrupted"):
        run, began = folder / file_name(scene) / "uninterrupted", time.time()
        if kill_once(scene, run, "nothing", 0, chance) is None:
            uninterrupted[scene], length[scene] = result(run), time.time() - began
    counts = {scene: dict.fromkeys(("kills", "save", "evaluation", "neither", "finished", "equal"), 0) for scene in SCENES}
    bar = tqdm(total=kills, desc="kills")

    def once(scene: str, aim: str) -> None:
        count = counts[scene]
        run = folder / file_name(scene) / f"killed-{count['finished']}"
        interrupted = kill_once(scene, run, aim, length[scene], chance)
        if interrupted:
            count["kills"] += 1
            count[interrupted] += 1
            bar.update()
        else:
            count["finished"] += 1
            count["equal"] += result(run) == uninterrupted[scene]

    while bar.n < kills:
        for number, scene in enumerate(SCENES):
            once(scene, AIMS[(counts[scene]["kills"] + number) % len(AIMS)])
    for scene in tqdm(SCENES, "what was killed last comes to its end"):
        once(scene, "nothing")
    return counts


def main(argv: list[str]) -> None:
    parser = OneLineParser(prog="benchmarks.faults", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="for the runs; emptied first")
    parser.add_argument("--output", type=Path, help="a JSON file")
    with one_line_errors(ValueError, OSError):
        options = parser.parse_args(argv)
        there = {path.name for path in options.folder.glob("*")} - {file_name(scene) for scene in SCENES}
        if there:
            raise ValueError(f"{options.folder} holds other things, as {min(there)}: choose another --folder")
        shutil.rmtree(options.folder, ignore_errors=True)
        counts = campaign(options.kills, options.folder, options.seed)
        if options.output:
            write_result(options.output, "-m benchmarks.faults", argv, {"results": counts})
    print("| | kills | in a save | in an evaluation | elsewhere | runs finished | equal to the uninterrupted |\n|" + "---|" * 7)
    for scene, count in counts.items():
        print(f"| {scene} | {' | '.join(map(str, count.values()))} |")
    if any(count["equal"] < count["finished"] for count in counts.values()):
        sys.exit("a run that was killed has ended otherwise than the uninterrupted one")


if __name__ == "__main__":
    main(sys.argv[1:])
