"""A dress rehearsal without downloads: random weights in the shapes and files of the real models.

    python -m benchmarks.rehearsal FOLDER                     # Stable Diffusion v1.4's exact shape (4.3 GB), tiny reward models
    python -m benchmarks.rehearsal FOLDER --rewards full      # reward models of the real shapes too (12 GB more)
    python -m benchmarks.rehearsal FOLDER --pipeline tiny     # everything tiny: the whole program within a minute on a CPU
    python -m benchmarks.rehearsal FOLDER --pipeline sd-turbo # of few steps, for lasro.py; also sdxl-turbo and lcm
    python -m benchmarks.rehearsal FOLDER --pipeline flux-dev # a flow; also sd3.5-medium
    python -m benchmarks.rehearsal FOLDER --only hpsv2 --device cuda --dtype bf16        # less, sooner, and half the size

Prints the command that trains on them. Pictures and scores mean nothing; memory, speed and file handling are the real ones.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import open_clip
import pyarrow
import pyarrow.parquet
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.utils import logging

from config import DTYPES, LASRO_PRESETS, PRESETS
from plumbing import image_reward
from plumbing.errors import one_line_errors
from plumbing.prompts import ANIMALS, ON_THE_HUB
from plumbing.reward_models import SOURCES

LETTERS = [*map(chr, range(33, 127)), "\N{LOWER ONE EIGHTH BLOCK}"]  # the last is T5's space
NOISE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
PNDM = PNDMScheduler(**NOISE, skip_prk_steps=True)
VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
TEXT = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
TEXT_G = dict(
    hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, hidden_act="gelu", projection_dim=1280
)
T5 = dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
FLOW_VAE = dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
SMALL_VAE = dict(block_out_channels=(16, 16, 16, 16), layers_per_block=1, norm_num_groups=4)
TINY_TEXT = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, projection_dim=32)
TINY_UNET = dict(
    sample_size=8, cross_attention_dim=32, block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=4
)
TINY_FLOW_VAE = SMALL_VAE | FLOW_VAE | dict(sample_size=64, latent_channels=4)
TINY_T5 = dict(d_model=64, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=len(LETTERS) + 3)
XL_BLOCKS = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    addition_embed_type="text_time", use_linear_projection=True,
)  # fmt: skip
XL = XL_BLOCKS | dict(
    sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10), addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
# Only what differs from the libraries' defaults, which are Stable Diffusion's.
PIPELINES = {
    "full": dict(scheduler=PNDM, unet=dict(sample_size=64, cross_attention_dim=768), vae=VAE, text=TEXT),
    "small": dict(  # what benchmarks.beside_trl times
        scheduler=PNDM,
        unet=dict(sample_size=16, cross_attention_dim=32, block_out_channels=(32, 64, 128, 128), layers_per_block=1),
        vae=SMALL_VAE | dict(sample_size=128), text=TINY_TEXT,
    ),
    "tiny": dict(scheduler=PNDM, unet=TINY_UNET, vae=SMALL_VAE | dict(sample_size=64), text=TINY_TEXT),
    "sdxl": dict(
        scheduler=EulerDiscreteScheduler(**NOISE), vae=VAE | dict(sample_size=1024, scaling_factor=0.13025), unet=XL,
        text=TEXT, text_2=TEXT_G,
    ),
    # Models of few steps, for lasro.py
    "sd-turbo": dict(
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing"), vae=VAE,
        unet=dict(sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
        text=dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=23, hidden_act="gelu"),
    ),
    "sdxl-turbo": dict(
        scheduler=EulerAncestralDiscreteScheduler(**NOISE, timestep_spacing="trailing"), vae=VAE | dict(scaling_factor=0.13025),
        unet=XL | dict(sample_size=64),
        text=TEXT, text_2=TEXT_G,
    ),
    "lcm": dict(
        scheduler=LCMScheduler(**NOISE), unet=dict(sample_size=64, cross_attention_dim=768, time_cond_proj_dim=256), vae=VAE,
        text=TEXT,
    ),
    # Flows
    "sd3.5-medium": dict(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text=TEXT, text_2=TEXT_G, t5=T5, vae=VAE | FLOW_VAE,
        transformer=dict(
            sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        ),
    ),
    "flux-dev": dict(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.15), text=TEXT, t5=T5,
        vae=VAE | FLOW_VAE | dict(scaling_factor=0.3611, shift_factor=0.1159), transformer=dict(guidance_embeds=True),
    ),
    "tiny-sd-turbo": dict(
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="trailing"), unet=TINY_UNET,
        vae=SMALL_VAE | dict(sample_size=64), text=TINY_TEXT,
    ),
    "tiny-sdxl-turbo": dict(
        scheduler=EulerAncestralDiscreteScheduler(**NOISE, timestep_spacing="trailing"), vae=SMALL_VAE | dict(sample_size=64),
        unet=XL_BLOCKS | dict(
            sample_size=8, cross_attention_dim=64, block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=4,
            attention_head_dim=4, addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        text=TINY_TEXT, text_2=TINY_TEXT,
    ),
    "tiny-lcm": dict(
        scheduler=LCMScheduler(**NOISE), unet=TINY_UNET | dict(time_cond_proj_dim=32), vae=SMALL_VAE | dict(sample_size=64),
        text=TINY_TEXT,
    ),
    "tiny-sd3.5-medium": dict(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text=TINY_TEXT, text_2=TINY_TEXT, t5=TINY_T5, vae=TINY_FLOW_VAE,
        transformer=dict(
            sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=8,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
    ),
    "tiny-flux-dev": dict(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.15), text=TINY_TEXT,
        t5=TINY_T5 | dict(d_model=32), vae=TINY_FLOW_VAE,
        transformer=dict(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
        ),
    ),
}  # fmt: skip
PIPELINES["sd3.5-medium-no-t5"] = {**PIPELINES["sd3.5-medium"], "t5": None}  # half the size, and as many tokens: zeros
PIPELINES["tiny-sd3.5-medium-no-t5"] = {**PIPELINES["tiny-sd3.5-medium"], "t5": None}
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
        imagereward=image_reward.CONFIG,
    ),
    "tiny": dict(
        hpsv2=dict(
            embed_dim=64,
            vision_cfg=dict(image_size=224, layers=2, width=160, head_width=80, patch_size=14),
            text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=4, layers=2),
        ),
        pickscore=dict(projection_dim=64, text=TINY_TOWER, vision=TINY_TOWER),
        clip=dict(projection_dim=768, text=TINY_TOWER, vision=TINY_TOWER),
        imagereward=BlipConfig(
            vision_config=TINY_TOWER | dict(image_size=224, layer_norm_eps=1e-6, initializer_range=0.2),
            text_config=TINY_TOWER | dict(vocab_size=160, bos_token_id=158, initializer_range=0.2),
        ),
    ),
}  # fmt: skip


VAE_BLOCKS = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)


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


def bert_tokenizer(size: int) -> BertTokenizer:
    """One of so many tokens in BERT's files. Letters are its words: the real vocabulary is in no package."""
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{character}" for character in characters)]
    tokens += [f"[unused{i}]" for i in range(size - len(tokens))]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})


def t5_tokenizer() -> T5Tokenizer:
    """In T5's files. Letters are its words: the real vocabulary is in no package."""
    specials = ["<pad>", "</s>", "<unk>"]
    return T5Tokenizer(vocab=[(token, 0.0) for token in specials] + [(token, -1.0) for token in LETTERS], extra_ids=0)


def pipeline_of(size: str) -> DiffusionPipeline:
    """A pipeline in the classes of the model of that shape, CompVis/stable-diffusion-v1-4 for full."""
    shape = PIPELINES[size]
    projected = "transformer" in shape and "text_2" in shape  # what Stable Diffusion 3 asks of its first text encoder too
    texts = {
        "text_encoder": (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**shape["text"])),
        "tokenizer": clip_tokenizer(),
    }
    if "text_2" in shape:
        second = CLIPTextModelWithProjection(CLIPTextConfig(**shape["text_2"]))
        texts |= {"text_encoder_2": second, "tokenizer_2": clip_tokenizer()}
    if shape.get("t5"):
        place = 3 if "text_2" in shape else 2
        texts |= {f"text_encoder_{place}": T5EncoderModel(T5Config(**shape["t5"])), f"tokenizer_{place}": t5_tokenizer()}
    elif projected:
        texts |= {"text_encoder_3": None, "tokenizer_3": None}
    parts = texts | {"vae": AutoencoderKL(**VAE_BLOCKS, **shape["vae"]), "scheduler": shape["scheduler"]}
    match shape:
        case {"transformer": transformer, "text_2": _}:
            return StableDiffusion3Pipeline(**parts, transformer=SD3Transformer2DModel(**transformer))
        case {"transformer": transformer}:
            return FluxPipeline(**parts, transformer=FluxTransformer2DModel(**transformer))
        case {"unet": unet, "text_2": _}:
            return StableDiffusionXLPipeline(**parts, unet=UNet2DConditionModel(**unet), add_watermarker=False)
        case {"unet": unet, "scheduler": scheduler}:
            kind = LatentConsistencyModelPipeline if isinstance(scheduler, LCMScheduler) else StableDiffusionPipeline
            nothing = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
            return kind(**parts, unet=UNet2DConditionModel(**unet), **nothing)


def make_hps(folder: Path, name: str, shape: dict) -> None:
    (folder / name).mkdir(parents=True)
    half = {key: tensor.half().cpu() for key, tensor in open_clip.CLIP(**shape).state_dict().items()}
    torch.save({"state_dict": half}, folder / name / SOURCES[name].file)
    (folder / name / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape}))


def make_clip(folder: Path, name: str, shape: dict) -> None:
    CLIPModel(clip_config(shape)).save_pretrained(folder / name)
    clip_tokenizer().save_pretrained(folder / name)


def make_image_reward(folder: Path, name: str, blip: BlipConfig) -> None:
    place = folder / name
    place.mkdir(parents=True)
    state = {image_reward.original_name(name): t for name, t in image_reward.ImageReward(blip).state_dict().items()}
    torch.save(state, place / SOURCES[name].file)
    blip.to_json_file(place / "blip_config.json")
    bert_tokenizer(blip.text_config.vocab_size - 2).save_pretrained(place)  # but for [DEC] and [ENC], which BLIP adds


def make_aesthetic(folder: Path, name: str, shape: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    widths = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    head = nn.ModuleDict({"layers": nn.ModuleDict({str(i): nn.Linear(*width) for i, width in widths.items()})})
    torch.save(head.state_dict(), folder / SOURCES[name].file)


MAKERS = {  # of the rewards in reward_models.SOURCES: how each is made, and its shape in REWARDS
    "hpsv2": (make_hps, "hpsv2"), "hpsv2.1": (make_hps, "hpsv2"), "pickscore": (make_clip, "pickscore"),
    "clip": (make_clip, "clip"), "imagereward": (make_image_reward, "imagereward"), "aesthetic": (make_aesthetic, "clip"),
}  # fmt: skip


def make_rewards(folder: Path, size: str, names: Iterable[str] = MAKERS) -> dict[str, Path]:
    """Reward models in the classes and files of the real ones -> where each is, by its name in reward_models.SOURCES."""
    for name in names:
        make, shape = MAKERS[name]
        make(folder, name, REWARDS[size][shape])
    return {name: folder / (name if name != "aesthetic" else SOURCES["aesthetic"].file) for name in names}


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


def make(
    folder: Path, pipeline: str, rewards: str, names: Iterable[str] = MAKERS, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Makes all of it and returns the flags of train.py that use it; ValueError if the folder is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder")
    torch.manual_seed(0)
    logging.disable_progress_bar()
    pipeline_of(pipeline).to(dtype).save_pretrained(folder / "pipeline")
    make_prompts(folder / "prompts")
    weights = [f"{name}={path}" for name, path in make_rewards(folder / "rewards", rewards, names).items()]
    return ["--model", f"{folder / 'pipeline'}", "--prompts_dir", f"{folder / 'prompts'}", "--reward_weights", *weights]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to put everything; made if it is not there")
    parser.add_argument("--pipeline", choices=PIPELINES, default="full")
    parser.add_argument("--rewards", choices=REWARDS, default="tiny")
    parser.add_argument("--only", nargs="*", choices=MAKERS, default=list(MAKERS), help="of the reward models")
    parser.add_argument("--device", default="cpu", help="where random weights are drawn")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the pipeline's weights")
    arguments = parser.parse_args(argv)
    with one_line_errors(ValueError, OSError), torch.device(arguments.device):
        flags = make(arguments.folder, arguments.pipeline, arguments.rewards, arguments.only, DTYPES[arguments.dtype])
    print("Train on it with any preset, for example:\n")
    preset = arguments.pipeline.removeprefix("tiny-")
    if preset in LASRO_PRESETS:
        run = f"lasro.py --preset {preset} --teacher {arguments.folder / 'pipeline'}"
    else:
        run = f"train.py --preset {preset if preset in PRESETS else 'multi-reward'}"
    print(f"python {run} --output_dir runs/rehearsal {' '.join(flags)}")


if __name__ == "__main__":
    main(sys.argv[1:])
