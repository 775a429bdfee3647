"""Training: Algorithm 1 of PRDP (arXiv 2402.08714v2), top to bottom, or with the updates of another --method in its lines 6-8.

    python train.py --preset toy                          # a laptop, minutes: the embedded model of toy_model.py
    torchrun --nproc_per_node=2 train.py --preset toy     # the same run on two processes (or GPUs, or machines)
    python train.py --resume runs/toy                     # goes on where a run stopped, bit by bit
    python train.py --help                                # every setting

A run folder holds config.json, metrics.jsonl (README: "Metrics"), reward.png, samples/, checkpoints/ and, at the end,
pipeline/, which opens with plain StableDiffusionPipeline.from_pretrained.
"""

import dataclasses
import math
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from pydoc import locate

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

import checkpoint
import plots
import processes
from config import METHODS, PRESETS, Config, check, describe, describe_rounding, parse
from methods import Epoch
from pipeline import count_truncated, decode_latents, encode_prompts, load_pipeline
from processes import RANK, WORLD_SIZE, say, together, uninterrupted
from prompts import draw_prompts, load_prompts
from rdp_loss import log_ratio, prediction_quality
from record import Stopwatch, prepare_folder, read_metrics, start_log, write_metrics
from rewards import Reward, RewardError, load_rewards
from sampler import (
    EVALUATION,
    Policy,
    backward_through_table,
    ddim_scheduler,
    log_prob_table,
    rounding,
    sample_images,
    sample_trajectories,
    step_divergence,
)  # fmt: skip
from trainable import Reference, make_trainable, save_result, trained_parameters

PRECISIONS = {"no": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    config: Config, run: Path, pipe, policy: Policy, reference: Reference, optimizer: torch.optim.Optimizer, completed: int,
    prompts: list[str], eval_prompts: list[str], reward: Reward, method,
) -> None:  # fmt: skip
    """Algorithm 1, and the record of it in the run folder.

    1  theta <- ref                                       5  score all N * B pictures
    2  for every epoch: theta_old <- theta                6  K times:
    3    draw N prompts                                   7    the loss over all within-prompt pairs
    4    draw B trajectories of each from pi_old          8    one gradient update
    """
    N, B, K = config.prompts_per_epoch, config.images_per_prompt, config.updates_per_epoch
    mine = slice(RANK * N // WORLD_SIZE * B, (RANK + 1) * N // WORLD_SIZE * B)  # this process's rows of the N * B
    trained = trained_parameters(pipe)
    log = start_log(config, run, completed)
    if completed:
        metrics = [line for line in read_metrics(run) if line["epoch"] <= completed]
    else:
        metrics = [{"epoch": 0, "eval_reward": evaluate(config, run, 0, pipe, policy, eval_prompts, reward)}]
        log(metrics[0])
    write_metrics(run, metrics)

    def save() -> None:
        if RANK == 0:
            checkpoint.save(run, completed, dataclasses.asdict(config), trained, optimizer, method.state())

    try:
        for epoch in tqdm(range(completed, config.epochs), "epochs", initial=completed, total=config.epochs, disable=RANK > 0):
            # Alg. 1, 2: from here on theta_old is what log_probs_old remembers of it
            lap = Stopwatch()
            drawn = draw_prompts(prompts, N, epoch, config.seed)  # Alg. 1, 3
            rows = [(prompt, (config.seed, epoch, n, b)) for n, prompt in enumerate(drawn) for b in range(B)][mine]
            row_prompts, names = map(list, zip(*rows, strict=True))
            cond = {k: v.repeat_interleave(B, 0) for k, v in encode_prompts(pipe, row_prompts[::B]).items()}
            latents, sampled = [], []
            # The offline ablation (Sec. 4.3) draws from pi_ref instead. A trajectory depends on its name only, so drawing it in
            # its epoch is drawing all of them before the first.
            with reference(policy) if config.offline else nullcontext(policy) as drawing:
                for batch in sample_trajectories(drawing, cond, names, config.shared_x_T, config.sample_batch_size):  # Alg. 1, 4
                    latents.append(batch.latents.cpu() if config.latents_on_cpu else batch.latents)
                    sampled.append(batch.log_probs)
            latents, sampled = torch.cat(latents), together(lambda: torch.cat(sampled)).view(N, B, -1)
            lap("sample")
            rewards = together(lambda: score(pipe, latents[:, -1], row_prompts, reward, config)).view(N, B)  # Alg. 1, 5
            lap("reward")

            def table(of_policy: Policy, entries: torch.Tensor | None = None) -> torch.Tensor:
                """(N, B, S) log-probs of this epoch's trajectories, computed in parts and the same in every process."""
                wanted = None if entries is None else entries.flatten(0, 1)[mine]
                part = lambda: log_prob_table(of_policy, latents, cond, config.log_prob_batch_size, wanted)  # noqa: E731
                return together(part).view_as(sampled)

            # With K = 1 nothing has changed since the trajectories were drawn, so the table made on the way serves. NOT IN PAPER:
            # with K > 1 it is made again in the batches of the later ones, so that rounding does not pass for a log-ratio.
            log_probs_old = sampled if K == 1 and not config.offline else table(policy)
            lap("update")
            if epoch == 0:  # theta is ref
                log_probs_ref = log_probs_old
                rounding_by_step = rounding(policy, latents[:4], {k: v[:4] for k, v in cond.items()}, config.log_prob_batch_size)
                say(describe_rounding(config, policy, rounding_by_step))
            else:
                with reference(policy) as pi_ref:
                    log_probs_ref = table(pi_ref)
            lap("reference")

            # A method (methods.py) knows the network only by these tables.
            tables = Epoch(drawn, rewards, log_probs_old, log_probs_ref, latents, cond, seed=config.seed + 1_000_003 * epoch)
            divergence = partial(step_divergence, policy, reference, config.kl_form)
            with uninterrupted():
                for k, update in enumerate(method.updates(tables)):  # Alg. 1, 6
                    log_probs = log_probs_old.clone()
                    if k > 0:
                        log_probs[update.entries] = table(policy, update.entries)[update.entries]
                    loss = update.loss(log_probs.requires_grad_())  # Alg. 1, 7
                    # The loss sees the network only through the table: first its derivative by the table, then a backward
                    # pass per micro-batch of entries, weighted by it. That is the exact gradient (sampler.py).
                    (table_grad,) = torch.autograd.grad(loss, log_probs)
                    # fp16 has no small numbers: its backward pass runs on a multiple of the derivative.
                    largest = max(table_grad.abs().max().item(), update.kl_weight) or 1.0
                    scale = math.sqrt(policy.latent_size) / largest if config.autocast == "fp16" else 1.0
                    row_grad = table_grad.flatten(0, 1)[mine] * scale
                    kl_grad = update.entries.flatten(0, 1)[mine] * update.kl_weight * scale if update.kl_weight else None
                    recomputed = backward_through_table(
                        policy, latents, cond, row_grad, config.train_batch_size, kl_grad, divergence
                    )
                    processes.sum_gradients(trained.values(), 1 / scale)
                    grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
                    if not (loss.isfinite() and grad_norm.isfinite()):  # the same in every process, so all stop here
                        raise FloatingPointError(f"loss {loss.item()}, gradient norm {grad_norm.item()} in epoch {epoch + 1}")
                    optimizer.step()  # Alg. 1, 8
                    optimizer.zero_grad()
                    if k == 0:
                        sampled_by_theta = log_probs_old if config.offline else sampled
                        drift = (recomputed - sampled_by_theta.flatten(0, 1)[mine]).abs().nan_to_num().max()
                completed = epoch + 1
                lap("update")
                log_probs = log_probs.detach()
                rhat = log_ratio(log_probs, log_probs_ref, config.step_reduction)
                correlation, slope = (
                    prediction_quality(rhat, rewards, config.kl_weight) if config.method == "prdp" else (None, None)
                )
                line = {
                    "epoch": completed,
                    "reward_mean": rewards.mean().item(),
                    "reward_std": rewards.std().item(),
                    "loss": loss.item(),
                    "correlation": correlation,
                    "slope": slope,
                    "kl_nats": (log_probs_old - log_probs_ref).sum(-1).mean().item() * policy.in_nats,
                    "clip_fraction": ((log_probs - log_probs_old)[update.entries].abs() > config.clip_range)
                    .float()
                    .mean()
                    .item(),
                    "log_prob_drift": together(lambda: drift.view(1)).max().item(),
                    "rounding": rounding_by_step.tolist() if epoch == 0 else None,
                    "grad_norm": grad_norm.item(),
                    "peak_memory_gib": processes.peak_memory_gib(),
                    "images_per_second": N * B / sum(lap.seconds.values()),
                    "eval_reward": None,
                    "seconds": lap.seconds,
                }
                metrics.append(line)
                write_metrics(run, metrics)
                if completed % config.eval_every == 0 or completed == config.epochs:
                    line["eval_reward"] = evaluate(config, run, completed, pipe, policy, eval_prompts, reward)
                    lap("evaluate")
                    write_metrics(run, metrics)
                    if RANK == 0:
                        plots.reward_curve(metrics, run / "reward.png")
                log(line)
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


def evaluate(config: Config, run: Path, completed: int, pipe, policy: Policy, prompts: list[str], reward: Reward) -> float | None:
    """Mean reward of the evaluation prompts at fixed seeds; the first pictures of them go to run/samples."""
    if not prompts:
        return None
    share = range(RANK * len(prompts) // WORLD_SIZE, (RANK + 1) * len(prompts) // WORLD_SIZE)
    shown = []

    def scores() -> torch.Tensor:
        parts = [torch.empty(0)]
        for start in range(0, len(share), config.sample_batch_size):
            batch = share[start : start + config.sample_batch_size]
            batch_prompts, names = [prompts[i] for i in batch], [(config.seed, EVALUATION, i, 0) for i in batch]
            images = sample_images(policy, pipe, batch_prompts, names, len(batch))
            parts.append(reward(images, batch_prompts))
            shown.extend(images[: max(0, 12 - len(shown))])
        return torch.cat(parts)

    rewards = together(scores)
    if RANK == 0:
        title = f"epoch {completed}"
        plots.grid({title: torch.stack(shown)}, prompts[: len(shown)], run / "samples" / f"epoch_{completed:06d}.png")
    return rewards.mean().item()


def load(config: Config, device: torch.device) -> tuple[list[str], list[str], Reward, DiffusionPipeline]:
    """Prompts, evaluation prompts, reward and pipeline; ValueError saying what is missing and what would need no download."""
    try:
        if device.type == "cpu" and config.model == Config(**PRESETS[config.preset]).model != "toy":
            raise ValueError(f"preset {config.preset} finetunes {config.model}, for which a CUDA GPU is missing")
        prompts = load_prompts(config.prompts, config.prompts_dir)
        eval_prompts = load_prompts(config.eval_prompts, config.prompts_dir) if config.eval_prompts else []
        reward = load_rewards(config.reward, config.reward_weights, device, PRECISIONS[config.reward_dtype])
        return prompts, eval_prompts, reward, load_pipeline(config.model, device)
    except ValueError as error:
        raise (
            error if config.preset == "toy" else ValueError(f"{error} -- `--preset toy` needs no GPU and no download")
        ) from error


def main(argv: list[str]) -> None:
    with processes.one_line_errors(ValueError, OSError):
        config = parse(argv)
        check(config, WORLD_SIZE)
        device = processes.start()
        prompts, eval_prompts, reward, pipe = load(config, device)
        policy = Policy(
            pipe.unet, ddim_scheduler(pipe.scheduler.config, config.num_steps, config.eta), encode_prompts(pipe, None),
            config.guidance_scale, config.eta, config.log_prob_reduction, PRECISIONS[config.autocast],
        )  # fmt: skip
        reference = make_trainable(pipe, config)  # Alg. 1, 1: theta <- ref
        trained = trained_parameters(pipe)
        optimizer = torch.optim.AdamW(trained.values(), config.learning_rate, weight_decay=config.weight_decay, fused=True)
        method = locate(METHODS[config.method])(config, policy)
        completed = 0
        if config.resume:
            completed = checkpoint.load(Path(config.resume), trained, optimizer)
            method.load_state(checkpoint.load_method(Path(config.resume)))
        run = prepare_folder(config)
        say(describe(config, WORLD_SIZE, policy, prompts, count_truncated(pipe, prompts), trained))
    with processes.one_line_errors(OSError, ValueError, RewardError, FloatingPointError):
        train(config, run, pipe, policy, reference, optimizer, completed, prompts, eval_prompts, reward, method)
        if RANK == 0:
            save_result(pipe, policy.scheduler, run)
    say(f"the finetuned pipeline is in {run / 'pipeline'}, the curve in {run / 'reward.png'}")
    processes.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
