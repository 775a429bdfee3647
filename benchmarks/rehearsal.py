"""A dress rehearsal without downloads: random weights in the shapes and files of the real models.

    python -m benchmarks.rehearsal FOLDER                     # Stable Diffusion v1.4's exact shape (4.3 GB), tiny reward models
    python -m benchmarks.rehearsal FOLDER --rewards full      # reward models of the real shapes too (12 GB more)
    python -m benchmarks.rehearsal FOLDER --pipeline tiny     # everything tiny: the whole program within a minute on a CPU

Prints the command that trains on them. Pictures and scores mean nothing; memory, speed and file handling are the real ones.
"""

import argparse
import gzip
import json
import sys
from itertools import product
from pathlib import Path

import open_clip
import pyarrow
import pyarrow.parquet
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

from plumbing.errors import one_line_errors
from plumbing.prompts import ANIMALS, ON_THE_HUB
from plumbing.reward_models import SOURCES

# Only what differs from the libraries' defaults, which are Stable Diffusion's.
PIPELINES = {
    "full": dict(
        unet=dict(sample_size=64, cross_attention_dim=768),
        vae=dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512),
        text=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768),
    ),
    "small": dict(  # what benchmarks.beside_trl times
        unet=dict(sample_size=16, cross_attention_dim=32, block_out_channels=(32, 64, 128, 128), layers_per_block=1),
        vae=dict(block_out_channels=(16, 16, 16, 16), layers_per_block=1, sample_size=128, norm_num_groups=4),
        text=dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, projection_dim=32),
    ),
    "tiny": dict(
        unet=dict(
            sample_size=8, cross_attention_dim=32, block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=4
        ),
        vae=dict(block_out_channels=(16, 16, 16, 16), layers_per_block=1, sample_size=64, norm_num_groups=4),
        text=dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, projection_dim=32),
    ),
}
TINY_TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
REWARDS = {
    "full": dict(
        hpsv2=open_clip.get_model_config("ViT-H-14"),
        pickscore=dict(
            projection_dim=1024,
            text=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu"),
            vision=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                        hidden_act="gelu", patch_size=14),
        ),
        clip=dict(
            projection_dim=768,
            text=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
            vision=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14),
        ),
    ),
    "tiny": dict(
        hpsv2=dict(
            embed_dim=64,
            vision_cfg=dict(image_size=224, layers=2, width=160, head_width=80, patch_size=14),
            text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=4, layers=2),
        ),
        pickscore=dict(projection_dim=64, text=TINY_TOWER, vision=TINY_TOWER),
        clip=dict(projection_dim=768, text=TINY_TOWER, vision=TINY_TOWER),
    ),
}  # fmt: skip


VAE_BLOCKS = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4)


def clip_config(shape: dict) -> CLIPConfig:
    return CLIPConfig(
        text_config=shape["text"], vision_config=shape["vision"] | {"image_size": 224}, projection_dim=shape["projection_dim"]
    )


def clip_tokenizer() -> CLIPTokenizer:
    """The tokenizer of every CLIP and of Stable Diffusion, from the vocabulary that open_clip carries."""
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in open_clip.tokenizer.SimpleTokenizer().encoder.items()}
    with gzip.open(Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges], model_max_length=77)


def make_pipeline(folder: Path, size: str) -> None:
    """A StableDiffusionPipeline in the classes and files of CompVis/stable-diffusion-v1-4."""
    shape = PIPELINES[size]
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(**shape["unet"]),
        vae=AutoencoderKL(**VAE_BLOCKS, **shape["vae"]),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=49408, **shape["text"])),
        tokenizer=clip_tokenizer(),
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, skip_prk_steps=True
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def make_rewards(folder: Path, size: str) -> dict[str, Path]:
    """Reward models in the classes and files of the real ones -> where each is, by its name in reward_models.SOURCES."""
    shapes = REWARDS[size]
    for name in ("hpsv2", "hpsv2.1"):
        (folder / name).mkdir(parents=True)
        half = {key: tensor.half() for key, tensor in open_clip.CLIP(**shapes["hpsv2"]).state_dict().items()}
        torch.save({"state_dict": half}, folder / name / SOURCES[name].file)
        (folder / name / "open_clip_config.json").write_text(json.dumps({"model_cfg": shapes["hpsv2"]}))
    for name in ("pickscore", "clip"):
        CLIPModel(clip_config(shapes[name])).save_pretrained(folder / name)
        clip_tokenizer().save_pretrained(folder / name)
    widths = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    head = nn.ModuleDict({"layers": nn.ModuleDict({str(i): nn.Linear(*width) for i, width in widths.items()})})
    torch.save(head.state_dict(), folder / SOURCES["aesthetic"].file)
    return {name: folder / (name if name != "aesthetic" else SOURCES["aesthetic"].file) for name in SOURCES}


def make_prompts(folder: Path) -> None:
    """A few prompts in the files of HPDv2 and Pick-a-Pic, laid out as --prompts_dir expects them."""
    prompts = [f"{style} of a {animal}" for style, animal in product(("A photo", "Concept art", "An anime drawing"), ANIMALS)]
    for name, (data_set, file) in ON_THE_HUB.items():
        path = folder / data_set / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"image_0_uid": prompts, "caption": prompts}), path)
        else:  # the training file repeats a prompt for every pair of pictures
            rows = [{"prompt": prompt, "human_preference": [1, 0]} for prompt in prompts for _ in range(2)]
            path.write_text(json.dumps(rows if name == "hpdv2-train" else prompts))


def make(folder: Path, pipeline: str, rewards: str) -> list[str]:
    """Makes all of it and returns the flags of train.py that use it; ValueError if the folder is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder")
    torch.manual_seed(0)
    logging.disable_progress_bar()
    make_pipeline(folder / "pipeline", pipeline)
    make_prompts(folder / "prompts")
    weights = [f"{name}={path}" for name, path in make_rewards(folder / "rewards", rewards).items()]
    return ["--model", f"{folder / 'pipeline'}", "--prompts_dir", f"{folder / 'prompts'}", "--reward_weights", *weights]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put everything; made if it is not there")
    parser.add_argument("--pipeline", choices=PIPELINES, default="full")
    parser.add_argument("--rewards", choices=REWARDS, default="tiny")
    arguments = parser.parse_args(argv)
    with one_line_errors(ValueError, OSError):
        flags = make(arguments.folder, arguments.pipeline, arguments.rewards)
    print("Train on it with any preset, for example:\n")
    print(f"python train.py --preset multi-reward --output_dir runs/rehearsal {' '.join(flags)}")


if __name__ == "__main__":
    main(sys.argv[1:])
