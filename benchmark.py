"""Seconds per epoch by phase and peak memory, for several numbers of denoising steps T.

    python benchmark.py                                        # the embedded model, T = 5 and T = 50
    python benchmark.py --num_steps 10 50 --model FOLDER --guidance_scale 5 ...    # any flag of train.py

Runs train.py for three epochs per T, each in a process of its own, and takes the last two epochs (the first has no reference
pass and warms up). Prints a table and, with --output, writes it as JSON with command, versions and machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from processes import one_line_errors
from provenance import provenance

EPOCHS = 3


def measure(num_steps: int, flags: list[str]) -> dict:
    """One row of the table; ValueError with train.py's own message if it refuses the flags."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, str(Path(__file__).with_name("train.py")), "--eval_prompts", "", *flags]
        command += ["--num_steps", str(num_steps), "--epochs", str(EPOCHS), "--output_dir", str(run)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise ValueError(done.stderr.strip().splitlines()[-1])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-(EPOCHS - 1) :]
    phases = {phase: sum(line["seconds"][phase] for line in lines) / len(lines) for phase in lines[0]["seconds"]}
    return {
        "num_steps": num_steps,
        "seconds": phases,
        "seconds_per_epoch": sum(phases.values()),
        "images_per_second": sum(line["images_per_second"] for line in lines) / len(lines),
        "peak_memory_gib": max(line["peak_memory_gib"] for line in lines),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, nargs="+", default=[5, 50], help="values of T")
    parser.add_argument("--output", default="", help="JSON file")
    arguments, flags = parser.parse_known_args(argv)
    with one_line_errors(ValueError, OSError):
        rows = [measure(num_steps, flags) for num_steps in arguments.num_steps]
        if arguments.output:
            Path(arguments.output).write_text(json.dumps(provenance("benchmark.py", argv) | {"results": rows}, indent=1) + "\n")
    phases = list(rows[0]["seconds"])
    print(f"| T | {' | '.join(f'{phase} s' for phase in phases)} | epoch s | images/s | peak GiB |")
    print("|---" * (4 + len(phases)) + "|")
    for row in rows:
        seconds = " | ".join(f"{row['seconds'][phase]:.2f}" for phase in phases)
        print(f"| {row['num_steps']} | {seconds} | {row['seconds_per_epoch']:.2f} | {row['images_per_second']:.1f} "
              f"| {row['peak_memory_gib']:.3f} |")  # fmt: skip
    least, most = (pick(row["peak_memory_gib"] for row in rows) for pick in (min, max))
    print(f"peak memory differs by {100 * (most / least - 1):.1f} %")


if __name__ == "__main__":
    main(sys.argv[1:])
