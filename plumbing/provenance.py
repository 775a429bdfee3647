"""Where a committed number comes from."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def provenance(script: str, argv: list[str]) -> dict:
    """The command, the versions and the kind of machine of a result."""
    packages = ("torch", "diffusers", "transformers")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join(["python", script, *argv]),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "machine": {"cpu_cores": os.cpu_count(), "processor": platform.machine(), "gpu": gpu},
    }


def write_result(path: Path, script: str, argv: list[str], result: dict) -> None:
    """A result with where it comes from, as JSON; the folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(provenance(script, argv) | result, indent=1) + "\n")
