"""Two processes for all tests that need them: every case of a file in turn, in the same two interpreters.

    python -m torch.distributed.run --nnodes=2 --nproc_per_node=1 ... tests/two_processes.py CASES.json

CASES.json: {name: [script, argv]}. Each process leaves CASES.RANK.json: {name: {"code": exit code, "errors": its stderr}}.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import evaluate  # noqa: E402
import lasro  # noqa: E402
import train  # noqa: E402
from plumbing import processes  # noqa: E402

MAINS = {"train": train.main, "evaluate": evaluate.main, "lasro": lasro.main}


def main(file: Path) -> None:
    stop, processes.stop = processes.stop, lambda: None  # between cases the group stays together
    outcomes = {}
    for name, (script, argv) in json.loads(file.read_text()).items():
        errors, code = io.StringIO(), 0
        with contextlib.redirect_stderr(errors):
            try:
                MAINS[script](argv)
            except SystemExit as stopped:
                code = stopped.code
        outcomes[name] = {"code": code, "errors": errors.getvalue()}
    file.with_suffix(f".{processes.RANK}.json").write_text(json.dumps(outcomes))
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
