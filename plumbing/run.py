"""A run while Algorithm 1 works on it: its folder, epochs, record, evaluation, checkpoints and how it stops.

    RUN/config.json, metrics.jsonl (docs/metrics.md), reward.png, samples/, checkpoints/, and at the end pipeline/

What train.py and lasro.py call here says nothing of the method; the method's page is there.
"""

import dataclasses
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from config import Config
from plumbing import checkpoint, hub, plots, processes
from plumbing.describe import describe_epoch, describe_rounding, rounding, warn_of_rounding
from plumbing.errors import complain
from plumbing.pipeline import sample_images
from plumbing.processes import RANK, WORLD_SIZE, all_gather, all_wait_for_first, answer, say
from plumbing.record import read_metrics
from plumbing.reward_models import Reward
from plumbing.schedules import Scheduler
from plumbing.scores import mean_and_error
from plumbing.trackers import Watch
from plumbing.trainable import save_result
from rdp_loss import log_ratio, prediction_quality
from sampler import EVALUATION, Policy, Trajectories


class Run:
    """The epochs of a run and all that is kept of them. Every process has one; the first writes.

    optimizer: of the trained parameters, which are given by name; remembers: what else checkpoints keep (comparators); also: by
    the name that it has in the record, how else the evaluation prompts are drawn and scored.
    """

    def __init__(
        self, config: Config, pipe, policy: Policy, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer,
        remembers: dict, eval_prompts: list[str], reward: Reward, also: dict[str, Policy] | None = None,
    ):  # fmt: skip
        self.config, self.pipe, self.policy, self.eval_prompts, self.reward = config, pipe, policy, eval_prompts, reward
        self.parameters, self.states, self.also = parameters, {"optimizer": optimizer}, also or {}
        self.states |= {f"method.{name}": thing for name, thing in remembers.items()}
        self.trained = list(parameters.values())
        self.folder, self.completed = Path(config.output_dir), 0
        self.whole, self.in_updates = True, False  # whole: weights, optimiser and memory are those of the completed epochs
        self.watch: Watch | None = None  # of the first process
        if len(set(processes.all_succeed(lambda: config.resume))) > 1:
            raise ValueError(f"{self.folder} holds a run for some processes and none for others: the machines must share it")
        if config.resume:
            self.all_continue()
        self.prepare_folder()
        self.saved_at = time.monotonic()

    def all_continue(self) -> None:
        """From the newest checkpoint that is whole, with a line for what is otherwise than when it was saved."""

        def newest() -> Path | None:
            if RANK > 0:
                return None
            folder, wrong = checkpoint.newest_whole(self.folder)
            for error in wrong:
                say(f"{error}; the one before serves")
            say(f"{self.folder} goes on from {folder.name}")
            return folder

        folder = processes.all_succeed(newest)[0]
        about = processes.all_or_none(lambda: checkpoint.load(folder, self.parameters, self.states))
        self.completed = about["epoch"]
        if about["processes"] != WORLD_SIZE:
            say(
                f"saved by {about['processes']} processes, continued by {WORLD_SIZE}: sums are now made in another order, so "
                "from here on the run equals an uninterrupted one up to rounding, not bit for bit"
            )

    def prepare_folder(self) -> None:
        """ValueError if not all processes see the folder, OSError if it cannot be written or the disk is too small."""

        def prepare() -> None:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            checkpoint.clear_unfinished(self.folder)
            if not self.config.resume and (self.folder / "metrics.jsonl").exists():
                say(f"{self.folder} holds no checkpoint yet: its run begins again")
            self.tell(checkpoint.check_room(self.folder, checkpoint.size_of(self.parameters, self.states)))
            unfinished = self.folder / "config.json.unfinished"
            unfinished.write_text(json.dumps(dataclasses.asdict(self.config), indent=1))
            unfinished.replace(self.folder / "config.json")
            if self.config.push_to_hub:
                hub.check(self.config.push_to_hub)
            self.watch = Watch(self.config, self.folder, self.completed)

        all_wait_for_first(prepare)
        processes.all_check_shared(self.folder)

    def epochs(self) -> Iterator[int]:
        """The epochs that are still to be done; before the first of all the untouched model is evaluated."""
        if self.completed:
            self.metrics = [line for line in read_metrics(self.folder) if line["epoch"] <= self.completed]
        else:
            self.metrics = [{"epoch": 0} | self.all_evaluate()]
            self.log(self.metrics[0])
        self.write_metrics()
        if self.completed:
            self.lap = Stopwatch()
            self.all_evaluate_if_due()  # what was stopped in it
        begun, before = time.monotonic(), self.completed
        for epoch in range(self.completed, self.config.epochs):
            self.lap, self.rounding, self.drift = Stopwatch(), None, None
            yield epoch
            self.all_evaluate_if_due()
            an_epoch = (time.monotonic() - begun) / (self.completed - before)
            self.tell(describe_epoch(self.metrics[-1], self.config.epochs, an_epoch * (self.config.epochs - self.completed)))

    def tell(self, news: str) -> None:
        """What nobody need know, once and unless --quiet."""
        if not self.config.quiet:
            say(news)

    def log(self, line: dict) -> None:
        """What is new in a line of the record, for whoever watches the run."""
        if self.watch:
            self.watch.log(line)

    @contextmanager
    def updating(self, mine: Trajectories | None = None) -> Iterator[None]:
        """Around the updates of an epoch: Ctrl-C waits for their end, and what they have begun to change is not saved.

        Before the first of all rounding is measured, on four of this process's trajectories, if there are any.
        """
        if self.completed == 0 and mine is not None:
            self.measure_rounding(mine)
        # Methods with a memory change it from the beginning; weights change after check().
        self.whole, self.in_updates = self.states.keys() == {"optimizer"}, True
        with processes.uninterrupted():
            yield  # all_finish() ends it

    def check(self, k: int, loss: Tensor, grad_norm: Tensor, recomputed: Tensor, mine: Trajectories) -> None:
        """check_finite() of update k. At the first one theta is still theta_old: the log-probs (M, S) recomputed on the way, NaN
        where they were not, should be those of sampling; the largest difference goes into the record.
        """
        self.check_finite(loss, grad_norm)
        if k == 0:
            self.drift = (recomputed - mine.log_probs).abs().nan_to_num().max()

    def check_finite(self, loss: Tensor, grad_norm: Tensor) -> None:
        """FloatingPointError if the update that is made next is not finite, in every process alike."""
        if not (loss.isfinite() and grad_norm.isfinite()):
            error = FloatingPointError(f"loss {loss.item()}, gradient norm {grad_norm.item()} in epoch {self.completed + 1}")
            error.shared, error.told = True, RANK > 0
            raise error
        self.whole = False

    def all_record(
        self, rewards: Tensor, loss: Tensor, grad_norm: Tensor,
        log_probs: Tensor, log_probs_old: Tensor, log_probs_ref: Tensor, entries: Tensor,
    ) -> None:  # fmt: skip
        """The end of an epoch's updates: its line of metrics (docs/metrics.md), and a checkpoint where one is due.

        Of the last update: loss, grad_norm, log_probs (N, B, S) before it and its entries.
        """
        config = self.config
        self.lap("update")
        correlation, slope = None, None
        if config.method == "prdp":
            rhat = log_ratio(log_probs.detach(), log_probs_ref, config.step_reduction)
            correlation, slope = prediction_quality(rhat, rewards, config.kl_weight)
        kl_nats, kl_nats_error = mean_and_error(kl_samples((log_probs_old - log_probs_ref) * self.policy.in_nats))
        beyond = (log_probs.detach() - log_probs_old)[entries].abs() > config.clip_range
        self.all_finish({
            "reward_mean": rewards.mean().item(),
            "reward_std": rewards.std().item(),
            "loss": loss.item(),
            "correlation": correlation,
            "slope": slope,
            "kl_nats": kl_nats,
            "kl_nats_error": kl_nats_error,
            "clip_fraction": beyond.float().mean().item(),
            "log_prob_drift": None if config.offline else all_gather(lambda: self.drift.view(1)).max().item(),
            "rounding": self.rounding,
            "grad_norm": grad_norm.item(),
            "images_per_second": rewards.numel() / sum(self.lap.seconds.values()),
        })  # fmt: skip

    def all_finish(self, found: dict) -> None:
        """The updates of the epoch end with this in the record, and a checkpoint where one is due."""
        config = self.config
        self.metrics.append({
            "epoch": self.completed + 1,
            **found,
            "peak_memory_gib": processes.peak_memory_gib(),
            "eval_reward": None,
            "seconds": self.lap.seconds,
            **dict.fromkeys(self.also),
        })  # fmt: skip
        self.completed, self.whole, self.in_updates = self.completed + 1, True, False
        self.write_metrics()
        if self.completed % config.save_every == 0 or self.is_late() or self.completed == config.epochs:
            self.save()
        self.log(self.metrics[-1])  # here, where no signal comes between

    def is_late(self) -> bool:
        return 0 < 60 * self.config.save_minutes <= time.monotonic() - self.saved_at

    def all_evaluate_if_due(self) -> None:
        """The end of an epoch: evaluation where it is due and not done, after the checkpoint, so that no stop costs both."""
        line, last = self.metrics[-1], self.completed == self.config.epochs
        due = line["eval_reward"] is None and self.eval_prompts and (self.completed % self.config.eval_every == 0 or last)
        if due:
            found = self.all_evaluate()
            line |= found
            self.lap("evaluate")
            with processes.uninterrupted():  # what is in the record the trackers have seen
                self.write_metrics()
                self.log({"epoch": self.completed, **found, "seconds": {"evaluate": self.lap.seconds["evaluate"]}})
                if RANK == 0:
                    plots.reward_curve(self.metrics, self.folder / "reward.png")
            if self.is_late():
                self.save()

    def write_metrics(self) -> None:
        """metrics.jsonl, written whole so that a crash leaves the old or the new one."""
        if RANK == 0:
            unfinished = self.folder / "metrics.jsonl.unfinished"
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in self.metrics))
            checkpoint.settle(unfinished)
            unfinished.replace(self.folder / "metrics.jsonl")

    def all_evaluate(self) -> dict[str, float | None]:
        """Mean reward of the evaluation prompts at fixed seeds, for the record; the first pictures of them go to samples/."""
        policies = {"eval_reward": self.policy} | self.also
        if not self.eval_prompts:
            return dict.fromkeys(policies)
        return {name: self.all_score(policy, pictures=policy is self.policy) for name, policy in policies.items()}

    def all_score(self, policy: Policy, pictures: bool) -> float:
        config, prompts, shown = self.config, self.eval_prompts, []
        share = range(len(prompts))[RANK::WORLD_SIZE]  # none, where there are fewer prompts than processes

        def scores() -> Tensor:
            parts = [torch.empty(0)]
            for start in range(0, len(share), config.sample_batch_size):
                batch = share[start : start + config.sample_batch_size]
                batch_prompts, names = [prompts[i] for i in batch], [(config.seed, EVALUATION, i, 0) for i in batch]
                images = sample_images(policy, self.pipe, batch_prompts, names, len(batch))
                parts.append(self.reward(images, batch_prompts))
                shown.extend((i, image) for i, image in zip(batch, images, strict=True) if i < 12)
            return torch.cat(parts)

        rewards = all_gather(scores)
        drawn = dict(picture for some in processes.all_succeed(lambda: shown) for picture in some)
        if pictures and RANK == 0:
            first = torch.stack([drawn[i] for i in sorted(drawn)])
            file = self.folder / "samples" / f"epoch_{self.completed:06d}.png"
            plots.grid({f"epoch {self.completed}": first}, prompts[: len(first)], file)
        return rewards.mean().item()

    def measure_rounding(self, mine: Trajectories) -> None:
        """Of four trajectories, for the record of the first epoch; printed with a warning where it drowns the clip."""
        four = Trajectories(mine.cond[:4], mine.latents[:4], mine.log_probs[:4])
        deviation = rounding(self.policy, four, self.config.log_prob_batch_size)
        self.rounding = deviation.tolist()
        self.tell(describe_rounding(self.config, deviation))
        say(warn_of_rounding(self.config, deviation))

    def all_conclude(self, scheduler: Scheduler) -> Path:
        """The end of a run: its result is saved with this scheduler, and published where that was asked for -> the run folder."""
        all_wait_for_first(lambda: save_result(self.pipe, scheduler, self.folder))
        curve = f", the curve in {self.folder / 'reward.png'}" if self.eval_prompts else ""
        answer(f"the finetuned pipeline is in {self.folder / 'pipeline'}{curve}")
        if self.config.push_to_hub:
            all_wait_for_first(lambda: answer(f"it is published at {hub.publish(self.folder, self.config.push_to_hub)}"))
        processes.stop()
        return self.folder

    def save(self) -> None:
        self.saved_at = time.monotonic()
        if RANK == 0:
            settings = dataclasses.asdict(self.config)
            try:
                with processes.SAVING:
                    checkpoint.save(self.folder, self.completed, settings, WORLD_SIZE, self.parameters, self.states)
            except OSError:
                self.whole = False  # there is no use in trying again at once
                raise

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Around the epochs: Ctrl-C, SIGTERM, and errors that leave the weights as an epoch has left them, save these first.

        The two are a KeyboardInterrupt, with the signal's number.
        """
        with processes.handled_by(processes.interrupt):
            try:
                yield
            except KeyboardInterrupt:
                self.save_what_is_whole()
                raise
            except Exception as error:
                if not self.in_updates and not isinstance(error, ConnectionError) and not hasattr(error, "shared"):
                    with suppress(Exception):
                        processes.all_fail(error)  # the others know nothing of it yet, and now wait for this process
                self.save_what_is_whole(error, together=hasattr(error, "shared"))
                raise
            finally:
                if self.watch:
                    self.watch.finish()

    def save_what_is_whole(self, stopped_by: Exception | None = None, together: bool = False) -> None:
        """together: no process goes on before the first has saved, since torchrun ends all as soon as one has ended."""

        def save() -> None:
            if self.whole:
                self.save()
                say(f"\nstopped after epoch {self.completed} of {self.config.epochs}; the same command goes on")

        with processes.handled_by(signal.SIG_IGN):
            try:
                processes.all_wait_for_first(save) if together else save()
            except Exception as error:  # of a broken device not even the weights come back
                if isinstance(stopped_by, OSError) and isinstance(error, OSError):
                    raise  # one disk, one line
                complain(error)


def kl_samples(log_ratio: Tensor) -> Tensor:
    """Of log pi_old/pi_ref in nats (N, B, S) unbiased samples of the trajectories' KL: their sums over steps.

    Where some are NaN (comparators.asked_of_reference), each of the others, which were drawn at random, stands for S like it.
    """
    known = ~log_ratio.isnan()
    return log_ratio.sum(-1).flatten() if known.all() else log_ratio[known] * log_ratio.shape[-1]


class Stopwatch:
    """lap("phase") adds the seconds since the last lap to that phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, phase: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now
