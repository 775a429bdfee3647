"""PRDP training: Algorithm 1 of arXiv 2402.08714v2, top to bottom.

    python train.py --preset toy                          # a laptop, minutes: the embedded model of toy_model.py
    torchrun --nproc_per_node=2 train.py --preset toy     # the same run on two processes (or GPUs, or machines)
    python train.py --resume runs/toy                     # goes on where a run stopped, bit by bit
    python train.py --help                                # every setting

A run folder holds config.json, metrics.jsonl (README: "Metrics"), reward.png, samples/, checkpoints/ and, at the end,
pipeline/, which opens with plain StableDiffusionPipeline.from_pretrained.
"""

import copy
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import plots
import processes
from config import Config, check, describe, parse
from pipeline import decode_latents, encode_prompts, load_pipeline, save_pipeline
from processes import RANK, WORLD_SIZE, say, together
from prompts import draw_prompts, load_prompts
from rdp_loss import log_ratio, prdp_loss, prediction_quality
from rewards import Reward, RewardError, load_rewards
from sampler import EVALUATION, Policy, backward_through_table, ddim_scheduler, log_prob_table, sample_images, sample_trajectories

# The loop knows a method only as a function of the (N, B, S) tables of log-probs under theta, theta_old and the reference,
# and of the (N, B) rewards. A method is one more file and one more line here.
METHODS = {
    "prdp": lambda config: lambda log_probs, log_probs_old, log_probs_ref, rewards: prdp_loss(
        log_probs, log_probs_old, log_probs_ref, rewards,
        kl_weight=config.kl_weight, clip_range=config.clip_range, step_reduction=config.step_reduction,
    ),
}  # fmt: skip

AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    config: Config, run: Path, pipe, policy: Policy, reference: Policy, optimizer: torch.optim.Optimizer, completed: int,
    prompts: list[str], heldout: list[str], reward: Reward,
) -> None:  # fmt: skip
    """Algorithm 1, and the record of it in the run folder.

    1  theta <- ref                                       5  score all N * B pictures
    2  for every epoch: theta_old <- theta                6  K times:
    3    draw N prompts                                   7    the loss over all within-prompt pairs
    4    draw B trajectories of each from pi_old          8    one gradient update
    """
    N, B, K = config.prompts_per_epoch, config.images_per_prompt, config.updates_per_epoch
    mine = slice(RANK * N // WORLD_SIZE * B, (RANK + 1) * N // WORLD_SIZE * B)  # this process's rows of the N * B
    method = METHODS[config.method](config)
    parameters = list(policy.unet.parameters())
    if completed:
        metrics = [line for line in read_metrics(run) if line["epoch"] <= completed]
    else:
        metrics = [{"epoch": 0, "heldout_reward": evaluate(config, run, 0, pipe, policy, heldout, reward)}]
    write_metrics(run, metrics)

    def save() -> None:
        if RANK == 0:
            checkpoint.save(run, completed, dataclasses.asdict(config), dict(policy.unet.named_parameters()), optimizer)

    try:
        for epoch in tqdm(range(completed, config.epochs), "epochs", initial=completed, total=config.epochs, disable=RANK > 0):
            # Alg. 1, 2: from here on theta_old is what log_probs_old remembers of it
            lap = Stopwatch()
            drawn = draw_prompts(prompts, N, epoch, config.seed)  # Alg. 1, 3
            rows = [(prompt, (config.seed, epoch, n, b)) for n, prompt in enumerate(drawn) for b in range(B)][mine]
            row_prompts, names = map(list, zip(*rows, strict=True))
            cond = {k: v.repeat_interleave(B, 0) for k, v in encode_prompts(pipe, row_prompts[::B]).items()}
            latents, sampled = [], []
            for batch in sample_trajectories(policy, cond, names, config.shared_x_T, config.sample_batch_size):  # Alg. 1, 4
                latents.append(batch.latents)
                sampled.append(batch.log_probs)
            latents, sampled = torch.cat(latents), together(lambda: torch.cat(sampled)).view(N, B, -1)
            lap("sample")
            rewards = together(lambda: score(pipe, latents[:, -1], row_prompts, reward, config)).view(N, B)  # Alg. 1, 5
            lap("reward")

            def table(of_policy: Policy) -> torch.Tensor:
                """(N, B, S) log-probs of this epoch's trajectories, computed in parts and the same in every process."""
                return together(lambda: log_prob_table(of_policy, latents, cond, config.train_batch_size)).view_as(sampled)

            # With K = 1 nothing has changed since the trajectories were drawn, so the table made on the way serves. NOT IN PAPER:
            # with K > 1 it is made again in the batches of the updates, so that rounding does not pass for a log-ratio.
            log_probs_old = sampled if K == 1 else table(policy)
            lap("update")
            log_probs_ref = log_probs_old if epoch == 0 else table(reference)  # in epoch 0 theta is ref
            lap("reference")

            with uninterrupted():
                for k in range(K):  # Alg. 1, 6
                    log_probs = (log_probs_old if k == 0 else table(policy)).clone().requires_grad_()
                    loss = method(log_probs, log_probs_old, log_probs_ref, rewards)  # Alg. 1, 7
                    # The loss sees the network only through the table: first its derivative by the table, then a backward
                    # pass per micro-batch of entries, weighted by it. That is the exact gradient (sampler.py).
                    (table_grad,) = torch.autograd.grad(loss, log_probs)
                    # fp16 has no small numbers: its backward pass runs on a multiple of the derivative.
                    largest = table_grad.abs().max().item() or 1.0
                    scale = math.sqrt(policy.latent_size) / largest if config.autocast == "fp16" else 1.0
                    optimizer.zero_grad()
                    row_grad = table_grad.flatten(0, 1)[mine] * scale
                    recomputed = backward_through_table(policy, latents, cond, row_grad, config.train_batch_size)
                    processes.sum_gradients(parameters, 1 / scale)
                    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                    if not (loss.isfinite() and grad_norm.isfinite()):  # the same in every process, so all stop here
                        raise FloatingPointError(f"loss {loss.item()}, gradient norm {grad_norm.item()} in epoch {epoch + 1}")
                    optimizer.step()  # Alg. 1, 8
                    if k == 0:
                        drift = (recomputed - sampled.flatten(0, 1)[mine]).abs().nan_to_num().max()
                completed = epoch + 1
                lap("update")
                log_probs = log_probs.detach()
                rhat = log_ratio(log_probs, log_probs_ref, config.step_reduction)
                correlation, slope = prediction_quality(rhat, rewards, config.kl_weight)
                line = {
                    "epoch": completed,
                    "reward_mean": rewards.mean().item(),
                    "reward_std": rewards.std().item(),
                    "loss": loss.item(),
                    "correlation": correlation,
                    "slope": slope,
                    "kl_nats": (log_probs_old - log_probs_ref).sum(-1).mean().item() * policy.in_nats,
                    "clip_fraction": ((log_probs - log_probs_old).abs() > config.clip_range).float().mean().item(),
                    "log_prob_drift": together(lambda: drift.view(1)).max().item(),
                    "grad_norm": grad_norm.item(),
                    "peak_memory_gib": processes.peak_memory_gib(),
                    "images_per_second": N * B / sum(lap.seconds.values()),
                    "heldout_reward": None,
                    "seconds": lap.seconds,
                }
                metrics.append(line)
                write_metrics(run, metrics)
                if completed % config.eval_every == 0 or completed == config.epochs:
                    line["heldout_reward"] = evaluate(config, run, completed, pipe, policy, heldout, reward)
                    lap("evaluate")
                    write_metrics(run, metrics)
                if completed % config.save_every == 0 or completed == config.epochs:
                    save()
    except RewardError:
        save()
        raise
    except KeyboardInterrupt:
        save()
        say(f"\nstopped after epoch {completed} of {config.epochs}; go on with: python train.py --resume {run}")
        sys.exit(130)


def score(pipe, x_0: torch.Tensor, prompts: list[str], reward: Reward, config: Config) -> torch.Tensor:
    """r(x_0, c) of latents (M, C, H, W) -> (M,), a batch at a time."""
    scores = []
    for start in range(0, len(x_0), config.sample_batch_size):
        part = slice(start, start + config.sample_batch_size)
        scores.append(reward(decode_latents(pipe, x_0[part]), prompts[part]))
    return torch.cat(scores)


def evaluate(config: Config, run: Path, completed: int, pipe, policy: Policy, heldout: list[str], reward: Reward) -> float | None:
    """Mean reward of the held-out prompts at fixed seeds; the first pictures of them go to run/samples."""
    if not heldout:
        return None
    share = range(RANK * len(heldout) // WORLD_SIZE, (RANK + 1) * len(heldout) // WORLD_SIZE)
    prompts, names = [heldout[i] for i in share], [(config.seed, EVALUATION, i, 0) for i in share]
    images = sample_images(policy, pipe, prompts, names, config.sample_batch_size)
    rewards = together(lambda: reward(images, prompts))
    if RANK == 0:
        shown = min(12, len(prompts))
        plots.grid({f"epoch {completed}": images[:shown]}, prompts[:shown], run / "samples" / f"epoch_{completed:06d}.png")
    return rewards.mean().item()


class Stopwatch:
    """lap("phase") adds the seconds since the last lap to that phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, phase: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: weights, optimiser and record always belong to a whole number of epochs."""
    waiting = []
    usual = signal.signal(signal.SIGINT, lambda *_: waiting.append("Ctrl-C"))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if waiting:
        raise KeyboardInterrupt


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_metrics(run: Path, metrics: list[dict]) -> None:
    """metrics.jsonl, written whole so that a crash leaves the old or the new one, and the curve drawn from it."""
    if RANK == 0:
        unfinished = run / "metrics.jsonl.unfinished"
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in metrics))
        unfinished.replace(run / "metrics.jsonl")
        if len(metrics) > 1 and metrics[-1]["heldout_reward"] is not None:
            plots.reward_curve(metrics, run / "reward.png")


def prepare_folder(config: Config) -> Path:
    """The run folder; ValueError if another run is there, OSError if it cannot be written."""
    run = Path(config.output_dir)

    def prepare() -> None:
        if not config.resume and (run / "metrics.jsonl").exists():
            raise ValueError(f"{run} already holds a run: continue it with --resume {run}, or choose another --output_dir")
        (run / "samples").mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))

    processes.in_first(prepare)
    return run


def main(argv: list[str]) -> None:
    with processes.one_line_errors(ValueError, OSError):
        config = parse(argv)
        check(config, METHODS, WORLD_SIZE)
        device = processes.start()
        prompts = load_prompts(config.prompts, config.prompts_dir)
        heldout = load_prompts(config.heldout_prompts, config.prompts_dir) if config.heldout_prompts else []
        reward = load_rewards(config.reward)
        pipe = load_pipeline(config.model, device)
        policy = Policy(
            pipe.unet, ddim_scheduler(pipe.scheduler.config, config.num_steps, config.eta), encode_prompts(pipe, None),
            config.guidance_scale, config.eta, config.log_prob_reduction, AUTOCAST[config.autocast],
        )  # fmt: skip
        reference = dataclasses.replace(policy, unet=copy.deepcopy(policy.unet))  # Alg. 1, 1: theta <- ref
        pipe.unet.requires_grad_(True)
        optimizer = torch.optim.AdamW(pipe.unet.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        completed = 0
        if config.resume:
            completed = checkpoint.load(Path(config.resume), dict(pipe.unet.named_parameters()), optimizer)
        run = prepare_folder(config)
        say(describe(config, WORLD_SIZE, policy, len(prompts)))
    with processes.one_line_errors(OSError, RewardError, FloatingPointError):
        train(config, run, pipe, policy, reference, optimizer, completed, prompts, heldout, reward)
        if RANK == 0:
            save_pipeline(pipe, policy.scheduler, run / "pipeline")
    say(f"the finetuned pipeline is in {run / 'pipeline'}, the curve in {run / 'reward.png'}")
    processes.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
