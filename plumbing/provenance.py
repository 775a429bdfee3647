"""Where a committed number comes from."""

import os
import platform
from importlib.metadata import version

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
