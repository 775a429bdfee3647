"""Publishing a result: --push_to_hub."""

from pathlib import Path

from huggingface_hub import HfApi

from plumbing.errors import first_line


def check(name: str) -> None:
    """ValueError if the name is not one, the hub does not know who asks, or cannot be reached: not after the training."""
    try:
        if name.count("/") != 1:
            raise ValueError("must be USER/NAME or ORGANISATION/NAME")
        HfApi().whoami()
    except Exception as error:  # the hub's client raises many kinds
        raise ValueError(f"--push_to_hub {name}: {first_line(error)}") from error


def publish(run: Path, name: str) -> str:
    """The run's pipeline with its card, and its adapters, if there are any, as a repository of the hub -> its address.

    OSError if it cannot.
    """
    hub = HfApi()
    try:
        repository = hub.create_repo(name, exist_ok=True)
        for folder, place in ((run / "pipeline", "."), (run / "lora", "lora")):
            if folder.exists():
                hub.upload_folder(repo_id=name, folder_path=folder, path_in_repo=place, commit_message=f"Add {folder.name}")
    except Exception as error:
        raise OSError(
            f"cannot publish {name}: {first_line(error)}; the result is in {run}, the same command publishes it"
        ) from error
    return str(repository)
