"""DDPO by TRL 0.23.1's DDPOTrainer, for benchmarks.beside_trl, which runs this in an environment that has it.

    python -m benchmarks.with_trl FLAGS --output_dir FOLDER [--seconds S]

FLAGS are those of train.py with --method ddpo: the same pipeline, prompts in the same order, pictures, steps, guidance, updates,
rates and batches, in TRL's words. FOLDER/metrics.jsonl has a line for every epoch, its reward_mean and its seconds, and
FOLDER/pipeline what was trained.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from accelerate import PartialState

from config import Config
from plumbing.flags import parse
from plumbing.pipeline import ddim_scheduler, load_pipeline, save_pipeline
from plumbing.prompts import draw_prompts, load_prompts
from rewards import load_rewards

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline


class Pipeline(DefaultDDPOStableDiffusionPipeline):
    """TRL's, around a pipeline that is loaded as ours is."""

    def __init__(self, config: Config):
        self.sd_pipeline = load_pipeline(config.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.sd_pipeline.scheduler = ddim_scheduler(self.sd_pipeline.scheduler.config, config.num_steps)
        self.use_lora = config.lora_rank > 0  # of rank 4 then, whatever is asked for
        self.sd_pipeline.unet.requires_grad_(not self.use_lora)


def settings(config: Config) -> DDPOConfig:
    """The same settings in TRL's words: its updates are of train_batch_size * accumulation pictures, all steps of them."""
    pictures = config.prompts_per_epoch * config.images_per_prompt
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
    trainer = DDPOTrainer(settings(config), score, lambda: next(drawn), pipeline)
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
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main(sys.argv[1:])
