"""Every setting of a run, where it is declared; presets by name.

The defaults are the paper's small-scale HPSv2 experiment (Table 4, first column). A preset replaces some of them, the command
line replaces any.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args, get_origin

import torch


def setting(default, help: str):
    """A field with its documentation; a list default is copied for every Config."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


AUTO = 0  # a batch size until plumbing/batches.py has found what memory holds


def BatchSize(value: str) -> int:
    """A batch size from the command line: a type, to the parser."""
    if value == "auto":
        return AUTO
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, or auto, not {value}")
    return int(value)


HELD = ("resolution", "max_sequence_length", "frozen_dtype", "text_encoders_on_cpu")  # how a pipeline is held in memory
DTYPES = {"no": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Common:
    """What train.py and lasro.py both read."""

    preset: str = setting("small-hpsv2", "Named settings to start from.")
    resume: str = setting(
        "", "Run folder to continue, with its own settings. The command that began it goes on without this, too."
    )
    output_dir: str = setting("", "Run folder; by default runs/PRESET.")

    # What is trained, on what, for what
    model: str = setting(
        "CompVis/stable-diffusion-v1-4", "Pipeline: 'toy', a folder, or a hub id; pi_ref, where pi_theta starts."
    )
    prompts: str = setting("animals", "Training prompts p(c): a named set, or a .txt, .json, .jsonl, .csv or .parquet file.")
    prompts_dir: str = setting("", "Folder with the hub's prompt files as DATA_SET/FILE; by default the hub itself.")
    eval_prompts: str = setting("animals", "Prompts scored and drawn at fixed seeds every --eval_every epochs; empty for none.")
    reward: list[str] = setting(["hpsv2"], "Reward r: names or module:function, each with an optional =weight, summed.")
    reward_weights: list[str] = setting([], "NAME=PATH of reward models on this machine; the others come from the hub.")
    lora_rank: int = setting(0, "NOT IN PAPER: adapters of this rank on the attention layers; 0 trains every weight.")
    epochs: int = setting(100, "E.")
    prompts_per_epoch: int = setting(32, "N, over all processes.")
    images_per_prompt: int = setting(16, "B.")
    seed: int = setting(0, "Of noise and prompt order.")

    # Sampler
    num_steps: int = setting(50, "T, denoising steps.")
    guidance_scale: float = setting(5.0, "w of classifier-free guidance, in sampling and training; 1 for none.")
    # Optimiser
    learning_rate: float = setting(1e-5, "Of AdamW.")
    weight_decay: float = setting(1e-4, "Of AdamW.")
    max_grad_norm: float = setting(1.0, "The gradient's global norm is clipped to this.")

    # How it is computed; none of this changes the result by more than rounding
    sample_batch_size: BatchSize = setting(16, "Trajectories sampled, decoded and scored at a time, per process; or auto.")
    train_batch_size: BatchSize = setting(8, "(trajectory, step) entries per backward pass, per process; or auto: what fits.")
    autocast: Literal["no", "bf16"] = setting("no", "Precision of the network's passes; weights and log-probs stay fp32.")
    reward_dtype: Literal["fp32", "bf16", "fp16"] = setting("fp32", "Precision of the reward models; scores stay fp32.")
    tf32: bool = setting(False, "TF32 in fp32 matrix products and convolutions.")
    deterministic: bool = setting(
        False, "Deterministic CUDA kernels, slower: the same command twice, or resumed, gives the same on the same GPUs."
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass: less memory, slower updates.")

    # What is written
    eval_every: int = setting(10, "Epochs between pictures and scores of --eval_prompts.")
    save_every: int = setting(10, "Epochs between checkpoints.")
    save_minutes: float = setting(
        30.0, "Also at the end of an epoch once so many minutes have passed since the last checkpoint; 0: not."
    )
    keep_every: int = setting(
        0, "Checkpoints at multiples of this keep their weights, for evaluate.py --checkpoints; 0: none do."
    )
    log_to: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"] = setting(
        "none", "Tracker that gets metrics and pictures as well."
    )
    push_to_hub: str = setting("", "USER/NAME: publish the result there, with its card, by the login of `hf auth login`.")
    quiet: bool = setting(False, "Only results, warnings and errors: not what a run is made of, nor a line for every epoch.")

    def __post_init__(self):
        self.output_dir = self.output_dir or f"runs/{self.preset}"


@dataclass
class Config(Common):
    """The settings of train.py."""

    # The method
    method: Literal["prdp", "ddpo", "dpok", "d3po", "grpo"] = setting("prdp", "The loss and the schedule of updates.")
    offline: bool = setting(False, "Draw all trajectories from pi_ref instead of pi_old: the ablation of Sec. 4.3.")

    eta: float = setting(1.0, "Noise of a step relative to DDPM's (1, the paper). 0 has no log-prob and is refused.")
    resolution: int = setting(0, "Height and width of pictures, in pixels; 0 is the model's own.")
    max_sequence_length: int = setting(256, "Tokens of T5 (Stable Diffusion 3, FLUX.1); zeros without T5, as diffusers has it.")

    # Algorithm 1
    updates_per_epoch: int = setting(10, "K, gradient updates on each epoch's trajectories. With 1 the clip cannot act.")
    kl_weight: float = setting(3e-5, "beta, in reward per unit of log-ratio (see the two reductions), or the method's own.")
    clip_range: float = setting(1e-6, "epsilon of the stepwise clip, in the unit of log-probs (Eq. 20), or of ratios around 1.")
    log_prob_reduction: Literal["mean", "sum"] = setting("mean", "Log-probs over latent dimensions: mean (paper) or sum (nats).")
    step_reduction: Literal["mean", "sum"] = setting("mean", "Log-ratios over steps: mean (Appendix G) or sum (Eq. 10).")
    reference_steps: int = setting(0, "NOT IN PAPER: ask pi_ref on so many random steps of a trajectory; 0 for all. prdp, K = 1.")
    shared_x_T: bool = setting(False, "The images of a prompt start from the same x_T. NOT IN PAPER: makes Eq. 9 exact.")

    # Of comparators only
    reward_statistics: Literal["prompt", "batch"] = setting("prompt", "ddpo: what normalises a reward; grpo: whose deviation.")
    statistics_size: int = setting(32, "ddpo: rewards remembered for every prompt.")
    statistics_min_count: int = setting(16, "ddpo: a prompt with fewer is normalised by the batch.")
    advantage_limit: float = setting(10.0, "ddpo, grpo (5 in its code): advantages are clamped to this.")
    score_function: bool = setting(False, "ddpo: REINFORCE instead of importance sampling; needs --updates_per_epoch 1.")
    reward_scale: float = setting(10.0, "dpok: alpha, of the reward term.")
    steps_per_update: int = setting(32, "dpok: denoising steps in one update.")
    kl_form: Literal["eps_mse", "exact"] = setting("eps_mse", "dpok: the divergence of its released code, or the exact one.")
    critic: bool = setting(True, "dpok: subtract a learned value from the reward.")

    # How it is computed
    log_prob_batch_size: BatchSize = setting(
        16, "(trajectory, step) entries of the table per forward pass, per process; or auto."
    )
    compile: bool = setting(False, "torch.compile the network: minutes at the start, faster epochs.")
    channels_last: bool = setting(False, "Memory layout of the network; often faster with 16-bit autocast.")
    latents_on_cpu: bool = setting(False, "Keep the epoch's trajectories in CPU memory.")
    frozen_dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "Of text encoders and, with --lora_rank and --autocast, of the network's frozen weights."
    )
    text_encoders_on_cpu: bool = setting(False, "Keep text encoders in CPU memory while nothing is encoded.")
    reference_on_cpu: bool = setting(False, "Keep pi_ref in CPU memory while it is not used; needless with --lora_rank.")


# Table 4, second column. K = 1, so the clip cannot act and the rounding of bf16 cannot pass for a log-ratio.
LARGE = dict(
    epochs=1000, updates_per_epoch=1, prompts_per_epoch=64, images_per_prompt=8, kl_weight=3e-6, clip_range=1e-4,
    learning_rate=7e-6, eval_prompts="pickapic-test", eval_every=50, save_every=50, keep_every=100, autocast="bf16",
)  # fmt: skip
# NOT IN PAPER: today's models by adapters, at the large-scale row's epsilon of 1.64 nats a step and its beta per nat of a
# trajectory. There log-ratios are means over D = 16384 dimensions and 50 steps, here over 65536 and 50, and on a flow over T - 1.
ADAPTERS = LARGE | dict(
    prompts="pickapic-train", reward=["pickscore"], lora_rank=32, learning_rate=1e-4, kl_weight=1.2e-5, clip_range=2.5e-5,
    frozen_dtype="bf16", text_encoders_on_cpu=True, gradient_checkpointing=True, latents_on_cpu=True, reward_dtype="fp16",
    sample_batch_size=4, log_prob_batch_size=4, train_batch_size=4,
)  # fmt: skip
FLOW = ADAPTERS | dict(resolution=512, max_sequence_length=128)  # as Flow-GRPO trains them
SD35 = FLOW | dict(model="stabilityai/stable-diffusion-3.5-medium", num_steps=10, guidance_scale=4.5, kl_weight=2.2e-6)
PRESETS: dict[str, dict] = {
    # Sec. 4.1 and Table 1: Table 4, first column, which is the defaults
    "small-hpsv2": dict(reward=["hpsv2"]),
    "small-pickscore": dict(reward=["pickscore"]),
    # Sec. 4.2 and Table 2
    "large-hpsv2": LARGE | dict(prompts="hpdv2-train", reward=["hpsv2"]),
    "large-pickscore": LARGE | dict(prompts="hpdv2-train", reward=["pickscore"]),
    # Table 3: Table 4, third column
    "multi-reward": LARGE | dict(
        prompts="pickapic-train", reward=["pickscore=10", "hpsv2=2", "aesthetic=0.05"], kl_weight=3e-5, learning_rate=1e-5,
    ),
    # Sec. 4.4, Fig. 8 and 10: beta is 0.1, 1 and 10 there
    "aesthetic-kl": dict(
        prompts="animals-bare", eval_prompts="animals-bare", reward=["aesthetic"], epochs=250, kl_weight=1.0,
    ),
    # The comparators, each with its paper's settings (DPOK's for several prompts). DPOK's alpha and beta are chosen for
    # ImageReward: with another reward, scale them to it.
    "ddpo": dict(
        method="ddpo", prompts="animals-bare", eval_prompts="animals-bare", reward=["aesthetic"], epochs=200, updates_per_epoch=4,
        prompts_per_epoch=32, images_per_prompt=8, clip_range=1e-4,
    ),
    "dpok": dict(
        method="dpok", model="stable-diffusion-v1-5/stable-diffusion-v1-5", lora_rank=4, reward=["imagereward"],
        guidance_scale=7.5, epochs=2000, updates_per_epoch=5, prompts_per_epoch=45, images_per_prompt=1, kl_weight=0.001,
        clip_range=1e-4, max_grad_norm=0.1, weight_decay=0.0, eval_every=100, save_every=100,
    ),
    "d3po": dict(
        method="d3po", model="stable-diffusion-v1-5/stable-diffusion-v1-5", lora_rank=4, prompts="animals-bare",
        eval_prompts="animals-bare", reward=["aesthetic"], epochs=400, updates_per_epoch=20, prompts_per_epoch=80,
        images_per_prompt=2, shared_x_T=True, kl_weight=0.1, clip_range=0.1, num_steps=20, learning_rate=3e-5, autocast="bf16",
    ),
    # Flow-GRPO's for PickScore on Stable Diffusion 3.5; its noise a = 0.7 is eta = 0.7 / sqrt(2) of our step (docs/flows.md). The
    # 0.01 of its code lacks the step's length, so that beta is a tenth of it. Its adapters count twice (alpha 64 at rank 32).
    "grpo": SD35 | dict(
        method="grpo", eta=0.495, learning_rate=3e-4, updates_per_epoch=2, prompts_per_epoch=48, images_per_prompt=24,
        kl_weight=0.001, clip_range=1e-4, advantage_limit=5.0, reward_statistics="batch",
    ),
    "sdxl": ADAPTERS | dict(model="stabilityai/stable-diffusion-xl-base-1.0"),
    "sd3.5-medium": SD35,
    "flux-dev": FLOW | dict(
        model="black-forest-labs/FLUX.1-dev", lora_rank=64, num_steps=6, guidance_scale=3.5, kl_weight=1.2e-6,
    ),
    # Sampling in 5 steps of equal log-SNR (miniature/build.py) without guidance, so that an epoch takes seconds. log-probs are
    # means over D = 768 dimensions: the large-scale epsilon of 1e-4 at D = 16384 is 1.64 nats per step, here 2.13e-3.
    "toy": dict(
        model="toy", prompts="toy-train", eval_prompts="toy-heldout", reward=["toy-alignment"],
        epochs=40, updates_per_epoch=1, prompts_per_epoch=16, images_per_prompt=8, kl_weight=0.03, clip_range=2.13e-3,
        num_steps=5, guidance_scale=1.0, learning_rate=2e-4, sample_batch_size=64, log_prob_batch_size=64, train_batch_size=64,
        keep_every=20,
    ),
}  # fmt: skip
PRESETS["toy-flow"] = PRESETS["toy"] | dict(model="toy-flow", max_sequence_length=0)  # the last of its 5 steps has no noise


def preset(name: str, **settings) -> Config:
    """The settings of a preset of train.py, with others in place of some; ValueError for an unknown preset."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: use {', '.join(PRESETS)}")
    return Config(**{"preset": name} | PRESETS[name] | settings)


@dataclass
class LasroConfig(Common):
    """The settings of lasro.py. The paper's are not known, but for 1 to 10 updates of the generator to 1 to 50 of the surrogate.

    OURS: all defaults, chosen and not searched; for the miniature `reproduce.py lasro` searches the generator's learning rate.
    """

    preset: str = setting("toy-turbo", "Named settings to start from.")
    model: str = setting("toy-turbo", "Pipeline of few steps: 'toy-turbo', a folder, or a hub id; where the generator starts.")
    num_steps: int = setting(2, "T, steps of the generator: 1, 2 or a few.")
    guidance_scale: float = setting(1.0, "Of the generator; 1 for none, as Turbo models are made. An LCM is told it.")
    sample_batch_size: int = setting(16, "Pictures sampled, decoded and scored at a time, per process.")
    train_batch_size: int = setting(16, "Pictures per backward pass, per process.")
    surrogate_learning_rate: float = setting(1e-4, "Of AdamW, for psi.")

    # What the generator is held to
    teacher: str = setting("toy", "Pipeline of many steps, from which the generator was distilled: 'toy', a folder, or a hub id.")
    teacher_guidance: float = setting(2.0, "w of the teacher's guidance.")
    teacher_steps: int = setting(10, "Steps of the pictures that it draws at the start.")
    anchor_pictures: int = setting(1024, "So many; L_lcm is of them.")
    target_decay: float = setting(0.95, "Per update, of the moving average that the generator is compared with in L_lcm.")

    # The two losses
    anchor_weight: float = setting(1.0, "c_0, of L_lcm; 0 leaves it out.")
    step_weights: list[float] = setting([0.1, 0.1], "c_j, of the surrogate's reward after each of the T steps.")
    normaliser_decay: float = setting(0.99, "Per update, of the moving averages that normalise the surrogate's reward.")

    # The two stages
    pretraining_epochs: int = setting(10, "Of --epochs the first so many, in which only the surrogate learns.")
    pretraining_updates: int = setting(50, "Of the surrogate in each of them.")
    surrogate_updates: int = setting(10, "Of the surrogate in each epoch thereafter; 0 freezes it.")
    surrogate_batch: int = setting(8, "Prompts in one of them, over all processes, all images of each.")
    replay_size: int = setting(512, "Prompts whose newest pictures are remembered.")
    generator_updates: int = setting(5, "Of the generator in each epoch.")
    generator_batch: int = setting(64, "Pictures in one of them, over all processes.")


TURBO = dict(
    prompts="hpdv2-train", eval_prompts="pickapic-test", reward=["imagereward"], epochs=200, autocast="bf16",
    gradient_checkpointing=True, sample_batch_size=8, train_batch_size=4, eval_every=20, save_every=20, teacher_steps=25,
    teacher_guidance=7.5,
)  # fmt: skip
LASRO_PRESETS: dict[str, dict] = {
    "toy-turbo": dict(
        prompts="toy-train", eval_prompts="toy-heldout", reward=["toy-alignment"], epochs=30, prompts_per_epoch=8,
        images_per_prompt=8, learning_rate=1e-4, surrogate_learning_rate=5e-4, sample_batch_size=64, train_batch_size=64,
        keep_every=20, anchor_pictures=256, pretraining_epochs=6, pretraining_updates=5, surrogate_updates=5, generator_updates=3,
        generator_batch=32,
    ),
    "sd-turbo": TURBO | dict(model="stabilityai/sd-turbo", teacher="stabilityai/stable-diffusion-2-1-base"),
    "sdxl-turbo": TURBO | dict(model="stabilityai/sdxl-turbo", teacher="stabilityai/stable-diffusion-xl-base-1.0", lora_rank=64),
    "lcm": TURBO | dict(model="SimianLuo/LCM_Dreamshaper_v7", teacher="Lykon/dreamshaper-7", guidance_scale=7.5),
}  # fmt: skip

MAY_CHANGE_ON_RESUME = {
    "resume", "output_dir", "prompts_dir", "reward_weights", "epochs", "eval_every", "save_every", "save_minutes", "keep_every",
    "log_to", "sample_batch_size", "log_prob_batch_size", "train_batch_size", "compile", "gradient_checkpointing",
    "latents_on_cpu", "reference_on_cpu", "text_encoders_on_cpu", "push_to_hub", "quiet",
}  # fmt: skip


def check_kinds(config) -> None:
    """ValueError naming a setting that has none of its few values, or is no batch size: from Python nothing is parsed."""
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), get_args(field.type)
        if get_origin(field.type) is Literal and value not in allowed:
            raise ValueError(f"{field.name} must be {' or '.join(allowed)}, not {value!r}")
        if field.type is BatchSize and not (isinstance(value, int) and value >= AUTO):
            raise ValueError(f"{field.name} must be at least 1, or {AUTO} for auto, not {value!r}")


def at_least(least: int, config: Common, *names: str) -> None:
    """ValueError naming the first of these settings that is less."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, not {getattr(config, name)}")


def positive(config: Common, *names: str) -> None:
    """ValueError naming the first of these settings that is not above 0 or is infinite."""
    for name in names:
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"{name} must be a positive number, not {getattr(config, name)}")


def check_trajectories(config: Common, world_size: int) -> None:
    """ValueError if there are fewer than processes."""
    if config.prompts_per_epoch * config.images_per_prompt < world_size:
        trajectories = f"prompts_per_epoch={config.prompts_per_epoch} x images_per_prompt={config.images_per_prompt}"
        raise ValueError(f"{trajectories} are fewer trajectories than the {world_size} processes, each of which draws some")


def check(config: Config, world_size: int) -> None:
    """ValueError naming the setting if the numbers cannot work together."""
    check_kinds(config)
    at_least(1, config, "epochs", "updates_per_epoch", "prompts_per_epoch", "num_steps", "eval_every", "save_every")
    at_least(1, config, "statistics_size", "statistics_min_count", "steps_per_update")
    at_least(0, config, "lora_rank", "keep_every", "save_minutes", "seed", "max_sequence_length")
    beside = config.method in ("dpok", "grpo")  # a divergence from the reference stands beside the loss, and 0 leaves it out
    if config.eta <= 0:
        raise ValueError(f"eta must be > 0, not {config.eta:g}: a deterministic step has no log-prob (1 is the paper's DDPM)")
    positive(config, "clip_range", "learning_rate", "max_grad_norm", "advantage_limit", "reward_scale")
    if config.kl_weight or not beside:
        positive(config, "kl_weight")
    if not 0 <= config.reference_steps <= config.num_steps:
        raise ValueError(f"reference_steps must be between 0 and num_steps={config.num_steps}, not {config.reference_steps}")
    if config.reference_steps and (config.method != "prdp" or config.updates_per_epoch > 1):
        raise ValueError(
            "reference_steps is for --method prdp and --updates_per_epoch 1 (the maximum of Eq. 18 makes the gradient of later "
            f"updates biased), not {config.method} and {config.updates_per_epoch}"
        )
    if config.score_function and config.updates_per_epoch > 1:
        raise ValueError(f"score_function is for updates_per_epoch=1, not {config.updates_per_epoch}: it knows no theta_old")
    if config.method == "d3po" and (config.images_per_prompt % 2 or not config.shared_x_T):
        raise ValueError("d3po compares pairs from the same x_T: use --shared_x_T and an even --images_per_prompt")
    if config.method == "d3po" and config.clip_range >= 1:
        raise ValueError(f"clip_range must be below 1 for d3po, which clips a ratio, not {config.clip_range}")
    if config.images_per_prompt < (2 if config.method in ("prdp", "d3po", "grpo") else 1):
        raise ValueError(f"images_per_prompt must be at least 2, not {config.images_per_prompt}: the loss compares them")
    parts = config.prompts_per_epoch * config.images_per_prompt // (2 if config.method == "d3po" else 1)
    if config.method in ("ddpo", "d3po", "grpo") and config.updates_per_epoch > parts:
        raise ValueError(
            f"updates_per_epoch={config.updates_per_epoch}: {config.method} has only {parts} disjoint parts of an epoch"
        )
    if config.method in ("ddpo", "dpok", "grpo") and config.offline:
        raise ValueError(f"offline: {config.method} is for pictures that theta_old has drawn; use prdp or d3po")
    if beside and config.kl_weight and config.reference_on_cpu:
        needed = "use lora_rank, which needs no second UNet"
        raise ValueError(f"reference_on_cpu: {config.method} asks the reference at every step; {needed}")
    check_trajectories(config, world_size)
    if config.lora_rank and config.frozen_dtype != "fp32" and config.autocast == "no":
        raise ValueError(f"frozen_dtype={config.frozen_dtype} with lora_rank needs autocast={config.frozen_dtype}")
    if config.lora_rank and config.reference_on_cpu:
        raise ValueError("reference_on_cpu: with lora_rank there is no second UNet to keep anywhere")


def check_lasro(config: LasroConfig, world_size: int) -> None:
    """ValueError naming the setting if the numbers cannot work together."""
    check_kinds(config)
    at_least(1, config, "epochs", "prompts_per_epoch", "num_steps", "sample_batch_size", "train_batch_size", "teacher_steps")
    at_least(
        1, config, "anchor_pictures", "surrogate_batch", "generator_batch", "eval_every", "save_every", "pretraining_updates"
    )
    at_least(0, config, "pretraining_epochs", "surrogate_updates", "generator_updates", "anchor_weight")
    at_least(0, config, "lora_rank", "keep_every", "save_minutes", "seed")
    positive(config, "learning_rate", "surrogate_learning_rate", "max_grad_norm")
    for name in ("target_decay", "normaliser_decay"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(config, name)}")
    if len(config.step_weights) != config.num_steps:
        raise ValueError(f"step_weights must be one for each of num_steps={config.num_steps}, not {len(config.step_weights)}")
    if config.images_per_prompt < 2:
        raise ValueError(f"images_per_prompt must be at least 2, not {config.images_per_prompt}: the surrogate learns from pairs")
    if config.replay_size < config.prompts_per_epoch:
        raise ValueError(f"replay_size must be at least prompts_per_epoch={config.prompts_per_epoch}, not {config.replay_size}")
    for name in ("surrogate_batch", "generator_batch", "anchor_pictures"):
        if getattr(config, name) < world_size:
            raise ValueError(f"{name}={getattr(config, name)} is fewer than the {world_size} processes, which share them")
    check_trajectories(config, world_size)
