"""DDPO by TRL 0.23.1's DDPOTrainer, for benchmarks.beside_trl, which runs this in an environment that has it.

    python -m benchmarks.with_trl FLAGS --output_dir FOLDER [--seconds S]

FLAGS are those of train.py with --method ddpo: the same pipeline, prompts in the same order, pictures, steps, guidance, updates,
rates and batches, in TRL's words. FOLDER/metrics.jsonl has a line for every epoch, its reward_mean and its seconds,
FOLDER/pipeline what was trained and FOLDER/versions.json the versions at work.

Help that TRL gets where a schedule ends without noise, as the miniature's does: by itself it would end at the lowest noise level
instead and be scored on pictures that are still noisy. Here its last step ends where ours does; since that step has no finite
log-prob there, it is not trained, as it is not with us, and no call of the network is made for it.
"""

import argparse
import json
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState

from config import Config
from plumbing.flags import parse
from plumbing.pipeline import load_pipeline, save_pipeline
from plumbing.prompts import draw_prompts, load_prompts
from plumbing.provenance import provenance
from plumbing.schedules import ddim_scheduler
from rewards import load_rewards

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline


class Pipeline(DefaultDDPOStableDiffusionPipeline):
    """TRL's, around a pipeline that is loaded as ours is."""

    def __init__(self, config: Config):
        self.sd_pipeline = load_pipeline(config.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.sd_pipeline.scheduler = ddim_scheduler(self.sd_pipeline.scheduler.config, config.num_steps)
        self.use_lora = config.lora_rank > 0
        if self.use_lora and config.lora_rank != 4:
            raise ValueError(f"TRL's adapters have rank 4, not {config.lora_rank}")
        self.sd_pipeline.unet.requires_grad_(not self.use_lora)
        self.ends_clean = bool(self.scheduler.final_alpha_cumprod == 1)
        if self.ends_clean:
            self.scheduler.alphas_cumprod[0] = 1  # where TRL takes its last step to end; no step begins there

    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        if self.ends_clean:
            output.log_probs[-1] = torch.zeros_like(output.log_probs[-1])
        return output


class Trainer(DDPOTrainer):
    """TRL's, without the last step where it draws no noise."""

    def calculate_loss(self, latents, timesteps, next_latents, log_probs, advantages, embeds):
        kept = (timesteps != self.sd_pipeline.scheduler.timesteps[-1]) | (not self.sd_pipeline.ends_clean)
        rows = latents[kept], timesteps[kept], next_latents[kept], log_probs[kept], advantages[kept], embeds[kept.repeat(2)]
        loss, *rest = super().calculate_loss(*rows)
        return loss * kept.float().mean(), *rest


def settings(config: Config) -> DDPOConfig:
    """The same settings in TRL's words; ValueError where it has none: an update is of whole batches of pictures."""
    pictures = config.prompts_per_epoch * config.images_per_prompt
    if pictures % (config.updates_per_epoch * config.train_batch_size) or pictures % config.sample_batch_size:
        raise ValueError(f"TRL's updates are of whole batches: {pictures} pictures are not")
    return DDPOConfig(
        seed=config.seed,
        sample_num_steps=config.num_steps, sample_eta=config.eta, sample_guidance_scale=config.guidance_scale,
        sample_batch_size=config.sample_batch_size, sample_num_batches_per_epoch=pictures // config.sample_batch_size,
        train_batch_size=config.train_batch_size,
        train_gradient_accumulation_steps=pictures // config.updates_per_epoch // config.train_batch_size,
        train_learning_rate=config.learning_rate, train_adam_weight_decay=config.weight_decay,
        train_max_grad_norm=config.max_grad_norm, train_clip_range=config.clip_range, train_adv_clip_max=config.advantage_limit,
        per_prompt_stat_tracking=config.reward_statistics == "prompt",
        per_prompt_stat_tracking_buffer_size=config.statistics_size,
        per_prompt_stat_tracking_min_count=config.statistics_min_count,
        mixed_precision=config.autocast, allow_tf32=config.tf32, log_with=None,
        save_freq=10**9,
    )  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further epoch after these")
    arguments, flags = parser.parse_known_args(argv)
    config = parse(flags)
    prompts, reward = load_prompts(config.prompts), load_rewards(config.reward, [], torch.device("cpu"), torch.float32)
    drawn = ((p, {}) for e in range(config.epochs) for p in draw_prompts(prompts, config.prompts_per_epoch, e, config.seed)
             for _ in range(config.images_per_prompt))  # fmt: skip
    rewards = []

    def score(images, texts, _):
        rewards.append(reward(images, list(texts)))
        return rewards[-1], {}

    PartialState()  # accelerate's logger, which TRL uses, asks for it
    pipeline = Pipeline(config)
    trainer = Trainer(settings(config), score, lambda: next(drawn), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    lines, step = [], 0
    for epoch in range(config.epochs):
        began = time.perf_counter()
        step = trainer.step(epoch, step)
        seconds = time.perf_counter() - began
        lines.append({"epoch": epoch + 1, "reward_mean": torch.cat(rewards).mean().item(), "seconds": {"epoch": seconds}})
        rewards.clear()
        if sum(line["seconds"]["epoch"] for line in lines) > arguments.seconds:
            break
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not pipeline.use_lora:
        save_pipeline(pipeline.sd_pipeline, pipeline.scheduler, folder / "pipeline")
    versions = provenance("-m benchmarks.with_trl", argv)["versions"] | {name: version(name) for name in ("accelerate", "trl")}
    (folder / "versions.json").write_text(json.dumps(versions))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main(sys.argv[1:])
