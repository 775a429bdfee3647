"""How long the demo and the tests take, beside the installation.

    python -m benchmarks.times --output results/times.json

Both run in an empty folder, on a clone of what is committed, with the environment of this one.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plumbing.provenance import write_result

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.times", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    output, seconds = parser.parse_args(argv).output, {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        Path(folder, ".venv").symlink_to(ROOT / ".venv")
        for target in ("demo", "test"):
            began = time.monotonic()
            subprocess.run(["make", "--assume-old=.venv/installed", target], cwd=folder, check=True)
            seconds[target] = round(time.monotonic() - began)
    write_result(output, "-m benchmarks.times", argv, {"seconds": seconds})


if __name__ == "__main__":
    main(sys.argv[1:])
