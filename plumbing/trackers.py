"""Where a run is watched besides its folder: a tracker of accelerate.tracking gets its settings, metrics and pictures."""

import dataclasses
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from matplotlib.image import imread

from plumbing.errors import text_of
from plumbing.processes import say

PROJECT = "prdp"


class Watch:
    """A run at --log_to, which may be none; it goes on in the curves of a run that has completed epochs.

    ValueError if the tracker's package is not installed, or it does not start: not logged in, no connection.
    """

    def __init__(self, config, run: Path, completed: int):
        self.name, self.run, self.tracker = config.log_to, run, None
        if self.name == "none":
            return
        file = run / f"{self.name}_id"
        known = file.read_text() if completed and file.exists() else None
        try:
            settings = dataclasses.asdict(config).items()
            settings = {key: str(value) if isinstance(value, list) else value for key, value in settings}
            self.tracker = self.begin(settings, completed, known)
            if known is None:
                self.tracker.store_init_configuration(settings)
            file.write_text(self.identity())
        except ImportError as error:
            raise ValueError(f"--log_to {self.name} needs a package: pip install {self.name} ({error})") from error
        except Exception as error:  # the libraries raise many kinds
            raise ValueError(f"--log_to {self.name}: {error}") from error

    def begin(self, settings: dict, completed: int, known: str | None) -> GeneralTracker:
        """known: what the tracker calls the run."""
        title = self.run.name
        match self.name:
            case "tensorboard":
                tracker = TensorBoardTracker("tensorboard", self.run, purge_step=completed + 1)
            case "wandb":
                tracker = WandBTracker(PROJECT, dir=self.run, id=known, name=title, resume="allow")
            case "trackio":
                tracker = TrackioTracker(
                    PROJECT, name=known or title, resume="allow" if known else "never", config=settings, embed=False
                )
            case "mlflow":
                tracker = MLflowTracker(PROJECT, run_id=known, run_name=title)
        PartialState(cpu=True)  # accelerate wants it; the processes have been joined before
        tracker.main_process_only = False  # there is one process that has a tracker
        with redirect_stdout(sys.stderr):  # where news go
            tracker.start()
        return tracker

    def identity(self) -> str:
        """What the tracker calls the run, by which it goes on."""
        of_tracker = self.tracker.tracker
        match self.name:
            case "tensorboard":
                return "tensorboard"  # the folder beside
            case "wandb":
                return of_tracker.id
            case "trackio":
                return of_tracker.name
            case "mlflow":
                return of_tracker.info.run_id

    def log(self, line: dict) -> None:
        """What is new in a line of metrics.jsonl, and of an evaluation its pictures, which show their prompts."""
        self.attempt(lambda: self.send(line))

    def attempt(self, action: Callable[[], None]) -> None:
        """A tracker that fails is told of, once, and left out from then on: the run is worth more."""
        try:
            if self.tracker:
                action()
        except Exception as error:  # the libraries raise many kinds
            say(f"warning: --log_to {self.name} failed, and gets no more of this run: {text_of(error)}")
            self.tracker = None

    def send(self, line: dict) -> None:
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        for name in (name for name, value in line.items() if isinstance(value, list)):
            numbers |= {f"{name}/{place}": value for place, value in enumerate(line[name]) if value is not None}
        numbers |= {f"seconds/{phase}": value for phase, value in line.get("seconds", {}).items()}
        self.tracker.log(numbers, line["epoch"])
        pictures = self.run / "samples" / f"epoch_{line['epoch']:06d}.png"
        if line.get("eval_reward") is not None and pictures.exists():
            self.log_pictures(pictures, line["epoch"])

    def log_pictures(self, file: Path, epoch: int) -> None:
        match self.name:
            case "tensorboard":
                self.tracker.log_images({"samples": imread(file)[None, ..., :3]}, epoch, dataformats="NHWC")
            case "wandb":
                self.tracker.log_images({"samples": [str(file)]}, epoch)
            case "trackio":
                import trackio

                self.tracker.log({"samples": trackio.Image(file)}, epoch)
            case "mlflow":
                self.tracker.log_artifact(str(file), "samples")

    def finish(self) -> None:
        """Sends what is left."""
        self.attempt(self.end)

    def end(self) -> None:
        with redirect_stdout(sys.stderr):
            if self.name == "trackio":  # which else finishes the run once more when Python ends, and says so on stdout
                import trackio

                return trackio.finish()
            self.tracker.finish()
