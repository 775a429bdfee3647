"""Training: Algorithm 1 of PRDP (arXiv 2402.08714v2), top to bottom.

    python train.py --preset toy                                              # a laptop, minutes: the embedded miniature
    torchrun --nproc_per_node=2 train.py --preset toy --output_dir runs/two   # the same on two processes, GPUs or machines
    python train.py --preset toy                                              # again: goes on, on a CPU bit by bit
    python train.py --help                                                    # every setting

From Python the same is train(preset("toy", epochs=10)), also with a reward and prompts of your own (docs/python.md).

A run folder holds config.json, metrics.jsonl (docs/metrics.md), reward.png, samples/, checkpoints/ and, at the end,
pipeline/, which opens with plain DiffusionPipeline.from_pretrained.
"""

import dataclasses
import json
import zlib
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import comparators
from comparators import Comparator
from comparators.epoch import Epoch, Update
from config import DTYPES, HELD, PRESETS, Common, Config, check
from plumbing import processes
from plumbing.batches import fit_batches
from plumbing.describe import describe
from plumbing.errors import one_line_errors
from plumbing.flags import go_on, parse
from plumbing.networks import pooled
from plumbing.pipeline import count_truncated, encode_prompts, load_pipeline, pipeline_policy, score
from plumbing.processes import WORLD_SIZE, Share, all_or_none, all_sum_gradients
from plumbing.prompts import draw_prompts, load_prompts
from plumbing.run import Run
from plumbing.schedules import scheduler_at
from plumbing.trainable import Reference, make_trainable, reference_mean, trained_parameters
from rdp_loss import prdp_loss, spread_over_steps
from rewards import Reward, RewardError, load_rewards, own_reward
from sampler import Policy, backward_through_table, log_prob_table, sample_trajectories


# fmt: off
def algorithm_1(config: Config, run: Run, pipe, policy: Policy, reference: Reference, optimizer, prompts: list[str],
                reward: Reward, comparator: Comparator | None) -> None:
    """Algorithm 1. Numbers at the right are its steps in words (README, "The algorithm").

    Each process draws, scores and differentiates its share of the N * B trajectories; the (N, B, S) tables are of all.
    """
    N, B, S, K = config.prompts_per_epoch, config.images_per_prompt, len(policy.schedule.noisy), config.updates_per_epoch
    for epoch in run.epochs():  # from here on theta_old is what log_probs_old will remember of theta                      # 2
        drawn = draw_prompts(prompts, N, epoch, config.seed)                                                               # 3
        entries = [torch.ones(N, B, S, dtype=torch.bool)] * K if comparator is None else comparator.entries(N, B, S, epoch)
        share = Share(entries)
        names = [(config.seed, epoch, *divmod(row, B)) for row in share.rows.tolist()]
        texts = [drawn[n] for _, _, n, _ in names]
        with reference(policy) if config.offline else nullcontext(policy) as drawing:  # offline (Sec. 4.3): pi_ref draws
            mine = all_or_none(lambda: sample_trajectories(drawing, encode_prompts(pipe, texts), names,                    # 4
                config.sample_batch_size, shared_x_T=config.shared_x_T, keep_on="cpu" if config.latents_on_cpu else None))
        run.lap("sample")
        rewards = share.all_gather(lambda: score(pipe, mine.x_0, texts, reward, config.sample_batch_size)).view(N, B)      # 5
        run.lap("reward")

        def table(pi: Policy, some: torch.Tensor | None = None) -> torch.Tensor:
            """(N, B, S) log pi(x_{t-1} | x_t, c) of the epoch's trajectories, the same in every process."""
            wanted = None if some is None else share.of(some)
            return share.all_gather(lambda: log_prob_table(pi, mine, config.log_prob_batch_size, wanted)).view(N, B, S)

        # NOT IN PAPER: for PRDP's K > 1 theta_old's table is made again in the updates' batches; rounding must be no log-ratio.
        again = config.offline or (comparator is None and K > 1)
        log_probs_old = table(policy) if again else share.all_gather(lambda: mine.log_probs).view(N, B, S)
        log_probs_ref = log_probs_old  # in the first epoch theta is ref: train() has started it there                     # 1
        if epoch > 0:
            with reference(policy) as pi_ref:
                log_probs_ref = table(pi_ref, comparators.asked_of_reference(config, comparator, (N, B, S), epoch))
            if config.reference_steps:
                log_probs_ref = spread_over_steps(log_probs_ref, log_probs_old)
        run.lap("reference")

        def eq_18(log_probs: torch.Tensor) -> torch.Tensor:
            return prdp_loss(log_probs, log_probs_old, log_probs_ref, rewards, kl_weight=config.kl_weight,
                             clip_range=config.clip_range, step_reduction=config.step_reduction)

        updates = [Update(some, eq_18) for some in entries]
        if comparator is not None:  # another method: another loss, on entries of its own choice
            updates = comparator.updates(Epoch(drawn, rewards, log_probs_old, log_probs_ref, entries, mine, share, epoch))
        with run.updating(mine):
            for k, update in enumerate(updates):                                                                           # 6
                log_probs = log_probs_old.clone()
                if k > 0:  # theta has moved
                    log_probs[update.entries] = table(policy, update.entries)[update.entries]
                loss = update.loss(log_probs.requires_grad_())                                                             # 7
                # The network lies behind the table: first the derivative by the table, then on, some steps at a time.
                (table_grad,) = torch.autograd.grad(loss, log_probs)
                assert not table_grad[~update.entries].any(), "the loss of an update reads entries that are not among its own"
                recomputed = all_or_none(lambda: backward_through_table(
                    policy, mine, share.of(table_grad), config.train_batch_size, update.kl, share.of(update.kl_grad)))
                all_sum_gradients(run.trained)
                grad_norm = torch.nn.utils.clip_grad_norm_(run.trained, config.max_grad_norm)
                run.check(k, loss, grad_norm, recomputed, mine)
                optimizer.step()                                                                                           # 8
                optimizer.zero_grad()
            run.all_record(rewards, loss, grad_norm, log_probs, log_probs_old, log_probs_ref, update.entries)
# fmt: on


def train(
    config: Config, *, reward: Reward | None = None, prompts: list[str] | None = None, eval_prompts: list[str] | None = None
) -> Path:
    """What the command does, by function -> the run folder, all of whose files are written. On several processes all call it.

    reward, prompts, eval_prompts: your own, instead of those that config names; their names in the record are then of these.
    ValueError for what cannot be, OSError, RewardError and FloatingPointError on the way; completed epochs are saved then.
    """
    own = {"reward": reward, "prompts": prompts, "eval_prompts": eval_prompts}
    config = go_on(with_names(config, **own))
    check(config, WORLD_SIZE)
    held = {name: getattr(config, name) for name in HELD}
    device = processes.start(config.tf32, config.deterministic)
    prompts, eval_prompts, reward, pipe = load(config, device, **own, trains_all=not config.lora_rank, **held)
    policy = pipeline_policy(
        pipe, config.num_steps, guidance_scale=config.guidance_scale, eta=config.eta,
        log_prob_reduction=config.log_prob_reduction, autocast=config.autocast,
    )  # fmt: skip
    if not policy.schedule.noisy.numel():
        raise ValueError(f"num_steps={config.num_steps}: no step of this model has noise, so there is no log-prob to train")
    reference = make_trainable(pipe, config)  # Algorithm 1, step 1: theta <- ref
    trained = trained_parameters(pipe)
    optimizer = torch.optim.AdamW(trained.values(), config.learning_rate, weight_decay=config.weight_decay, fused=True)
    comparator = comparators.chosen(
        config, policy, text_width=pooled(policy.denoise.uncond).shape[1], text_of=pooled,
        mu_ref=reference_mean(policy, reference), all_sum_gradients=all_sum_gradients,
    )  # fmt: skip
    config = fit_batches(config, pipe, policy, reference, list(trained.values()))
    run = Run(config, pipe, policy, trained, optimizer, comparator.remembers if comparator else {}, eval_prompts, reward)
    run.tell(describe(config, policy, prompts, count_truncated(pipe, prompts), trained))
    with run.saved_when_stopped():
        algorithm_1(config, run, pipe, policy, reference, optimizer, prompts, reward, comparator)
    return run.all_conclude(scheduler_at(pipe.scheduler, config.num_steps))


def with_names(
    config: Common, reward: Reward | None = None, prompts: list[str] | None = None, eval_prompts: list[str] | None = None
) -> Common:
    """The settings with names, for the record, of the user's own reward and prompts, where there are any. ValueError for none.

    Other prompts have another name; a reward is known by its function's.
    """
    if prompts is not None and not prompts:
        raise ValueError("prompts is an empty list: give at least one, or leave it out")
    own = {"prompts": prompts, "eval_prompts": eval_prompts}
    names = {
        name: f"{len(some)} of the user's own, {zlib.crc32(json.dumps(some).encode()):08x}" if some else ""
        for name, some in own.items()
        if some is not None
    }
    if reward is not None:
        names["reward"] = [getattr(reward, "__name__", type(reward).__name__)]
    return dataclasses.replace(config, **names)


def load(
    config: Common, device: torch.device, presets: dict[str, dict] = PRESETS, reward: Reward | None = None,
    prompts: list[str] | None = None, eval_prompts: list[str] | None = None, **held,
) -> tuple[list[str], list[str], Reward, DiffusionPipeline]:  # fmt: skip
    """Prompts, evaluation prompts, reward and pipeline, those that config names where they are not given.

    held: how the pipeline is held, as in load_pipeline. ValueError saying what is missing and what would need no download.
    """
    usual, laptop = type(config)(**presets.get(config.preset, {})).model, next(name for name in presets if name.startswith("toy"))
    try:
        if device.type == "cpu" and config.model == usual and not config.preset.startswith("toy"):
            needed = "for which a CUDA GPU is missing (one for every process)"
            raise ValueError(f"preset {config.preset} finetunes {config.model}, {needed}")
        if prompts is None:
            prompts = load_prompts(config.prompts, config.prompts_dir)
        if eval_prompts is None:
            eval_prompts = load_prompts(config.eval_prompts, config.prompts_dir) if config.eval_prompts else []
        if reward is None:
            reward = load_rewards(config.reward, config.reward_weights, device, DTYPES[config.reward_dtype])
        else:
            reward = own_reward(config.reward[0], reward)
        return prompts, eval_prompts, reward, load_pipeline(config.model, device, **held)
    except ValueError as error:
        if config.preset.startswith("toy"):
            raise
        raise ValueError(f"{error} -- `--preset {laptop}` needs no GPU and no download") from error


def main(argv: list[str]) -> None:
    with one_line_errors(ValueError, OSError, RewardError, FloatingPointError):
        train(parse(argv))


if __name__ == "__main__":
    processes.run_script(main)
