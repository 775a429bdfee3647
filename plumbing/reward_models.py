"""Learned rewards: HPSv2, PickScore, ImageReward, the LAION aesthetic predictor, CLIPScore: (images, prompts) -> raw scores.

    hpsv2, hpsv2.1     cosine of picture and prompt, about 0.27 (arXiv 2306.09341); the paper's is 2.0
    pickscore          cosine of picture and prompt, about 0.21 (arXiv 2305.01569); its authors' 21 is 100 times this
    imagereward        standardised by its authors (arXiv 2304.05977), about 0.2 for Stable Diffusion v1.5 in DPOK's paper
    aesthetic          the LAION predictor V2, about 5.5; ignores the prompt
    clipscore          cosine under CLIP ViT-L/14 (arXiv 2104.08718, without its factor 2.5); for evaluation

Scores are raw, as the paper's tables are: 10 pickscore + 2 hpsv2 + 0.05 aesthetic is 2.89 for Stable Diffusion v1.4 (Table 3).
Pictures are rounded to 8 bits first, so a score is that of the picture as a PNG file holds it. Embeddings are normalised and
multiplied in fp32 whatever the model's precision: near 0.27 bf16 has steps of 0.002, as much as many epochs gain.
"""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision.transforms.v2.functional as F
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from transformers import BlipConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.utils import logging

from plumbing import image_reward
from plumbing.errors import first_line, told_of

Reward = Callable[[Tensor, list[str]], Tensor]
Embed = Callable[[Tensor], Tensor] | Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Source:
    """Where a model's weights come from, for loading and for people who have to fetch them by hand."""

    hub: str
    file: str
    size: str
    licence: str
    tokenizer: str = ""  # hub id, where it is not the model's own


GITHUB = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
SOURCES = {
    "hpsv2": Source("xswu/HPSv2", "HPS_v2_compressed.pt", "1.97 GB", "Apache-2.0"),
    "hpsv2.1": Source("xswu/HPSv2", "HPS_v2.1_compressed.pt", "1.97 GB", "Apache-2.0"),
    "pickscore": Source(
        "yuvalkirstain/PickScore_v1", "model.safetensors", "3.94 GB", "MIT", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    ),
    "imagereward": Source(  # the organisation was THUDM
        "zai-org/ImageReward", "ImageReward.pt", "1.79 GB", "Apache-2.0", "google-bert/bert-base-uncased"
    ),
    "aesthetic": Source(GITHUB, "sac+logos+ava1-l14-linearMSE.pth", "3.7 MB", "Apache-2.0"),
    "clip": Source("openai/clip-vit-large-patch14", "model.safetensors", "1.71 GB", "MIT"),  # of aesthetic and clipscore
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def local_weights(specs: list[str]) -> dict[str, str]:
    """{name: path} from `name=path`; ValueError for an unknown name or a path where nothing is."""
    paths = {}
    for spec in specs:
        name, _, path = spec.partition("=")
        if name not in SOURCES:
            raise ValueError(f"reward weights {spec!r}: use NAME=PATH with a name of {', '.join(SOURCES)}")
        if not Path(path).exists():
            raise ValueError(f"reward weights {spec!r}: there is no {path}")
        paths[name] = path
    return paths


@contextmanager
def explained(name: str, local: dict[str, str]) -> Iterator[None]:
    """Makes whatever the libraries raise while loading `name` a ValueError that says what is missing and where it goes."""
    try:
        yield
    except Exception as error:
        source = SOURCES[name]
        wanted = f"{source.file} ({source.size}, {source.licence}) of {source.hub}"
        if source.tokenizer:
            wanted += f" with the tokenizer of {source.tokenizer} beside it"
        remedy = "" if name in local else f" (download it elsewhere and give --reward_weights {name}=PATH)"
        raise ValueError(
            f"reward weights {name!r}: no {wanted} in {local.get(name, 'reach')}{remedy}: {first_line(error)}"
        ) from error


def eight_bit(images: Tensor) -> Tensor:
    """Float pictures in [0, 1] as a file holds them, uint8."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def letterbox(images: Tensor, size: int) -> Tensor:
    """HPSv2's preprocessing: the longest side to `size`, zeros around to a square, then CLIP's mean and standard deviation.

    (B, 3, H, W) in [0, 1] -> (B, 3, size, size). Bicubic with antialiasing on floats, not clamped. open_clip's own transform
    crops instead.
    """
    images = eight_bit(images).float() / 255
    height, width = (round(side * size / max(images.shape[-2:])) for side in images.shape[-2:])
    images = F.resize(images, [height, width], InterpolationMode.BICUBIC, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return F.normalize(F.pad(images, [left, top, size - width - left, size - height - top]), CLIP_MEAN, CLIP_STD)


def cropped(images: Tensor, size: int) -> Tensor:
    """CLIP's preprocessing, and ImageReward's: the shortest side to `size`, the centre, CLIP's mean and standard deviation.

    (B, 3, H, W) in [0, 1] -> (B, 3, size, size). Bicubic with antialiasing, rounded and clamped.
    """
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size)
    return processor(images=eight_bit(images), return_tensors="pt")["pixel_values"]


def cached(embed: Callable[[list[str]], Tensor], limit: int = 4096) -> Callable[[list[str]], Tensor]:
    """The same embedding of prompts, computed once for each of the last `limit`; a prompt comes back for every picture of it."""
    known: dict[str, Tensor] = {}

    def remembered(prompts: list[str]) -> Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        known.update(zip(new, embed(new) if new else [], strict=True))
        embeddings = torch.stack([known[prompt] for prompt in prompts])
        for oldest in list(known)[: max(0, len(known) - limit)]:
            del known[oldest]
        return embeddings

    return remembered


def normalised(embeddings: Tensor) -> Tensor:
    return nn.functional.normalize(embeddings.float(), dim=-1)


def cosine_reward(embed_images: Embed, embed_prompts: Embed, device: torch.device) -> Reward:
    """The cosine of each picture with its own prompt, in fp32."""
    embed_prompts = cached(embed_prompts)

    @torch.no_grad()
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        return (normalised(embed_images(images.to(device))) * normalised(embed_prompts(prompts))).sum(-1)

    return reward


def hpsv2(local: dict[str, str], device: torch.device, dtype: torch.dtype, name: str = "hpsv2") -> Reward:
    """HPSv2. Local path: the file, or a folder with it and, for another architecture than ViT-H-14, open_clip_config.json."""
    import open_clip  # which takes half a second that no other reward needs

    with explained(name, local):
        source, path = SOURCES[name], Path(local.get(name, ""))
        if name not in local:
            path = Path(hf_hub_download(source.hub, source.file))
        config, file = path / "open_clip_config.json", path / source.file if path.is_dir() else path
        architecture = json.loads(config.read_text())["model_cfg"] if config.exists() else open_clip.get_model_config("ViT-H-14")
        model = open_clip.CLIP(**architecture)
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
    with told_of(f"the reward model {name!r}", device):
        model.requires_grad_(False).to(device, dtype).eval()
    tokenizer = open_clip.get_tokenizer("ViT-H-14")
    size = model.visual.image_size[0]
    return cosine_reward(
        lambda images: model.encode_image(letterbox(images, size).to(dtype)),
        lambda prompts: model.encode_text(tokenizer(prompts).to(device)),
        device,
    )


@functools.cache
def clip(name: str, path: str | None, device: torch.device, dtype: torch.dtype) -> tuple[Embed, Embed]:
    """Functions to the projected embeddings of pictures and of prompts under a CLIP in transformers' layout."""
    source = SOURCES[name]
    logging.disable_progress_bar()
    with explained(name, {name: path} if path else {}):
        model = CLIPModel.from_pretrained(path or source.hub, dtype=torch.float32, use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(path or source.tokenizer or source.hub)
    with told_of(f"the reward model {name!r}", device):
        model.requires_grad_(False).to(device, dtype).eval()
    length = model.config.text_config.max_position_embeddings
    size = model.config.vision_config.image_size

    def embed_images(images: Tensor) -> Tensor:
        return model.get_image_features(pixel_values=cropped(images, size).to(device, dtype)).pooler_output

    def embed_prompts(prompts: list[str]) -> Tensor:
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").to(device)
        return model.get_text_features(**tokens).pooler_output

    return embed_images, embed_prompts


def pickscore(local: dict[str, str], device: torch.device, dtype: torch.dtype) -> Reward:
    """PickScore v1. Local path: a folder with the model and the tokenizer."""
    return cosine_reward(*clip("pickscore", local.get("pickscore"), device, dtype), device)


def clipscore(local: dict[str, str], device: torch.device, dtype: torch.dtype) -> Reward:
    """CLIP ViT-L/14. Local path: a folder with the model and the tokenizer, under the name clip."""
    return cosine_reward(*clip("clip", local.get("clip"), device, dtype), device)


def aesthetic(local: dict[str, str], device: torch.device, dtype: torch.dtype) -> Reward:
    """The LAION aesthetic predictor V2 on CLIP ViT-L/14. Local paths: its file, and the folder of clip."""
    head = image_reward.affine_head(768)
    with explained("aesthetic", local):
        if "aesthetic" in local:
            state = torch.load(local["aesthetic"], map_location="cpu", weights_only=True)  # its tensors were saved on a GPU
        else:
            state = torch.hub.load_state_dict_from_url(GITHUB, map_location="cpu", weights_only=True, progress=False)
        head.load_state_dict({key.removeprefix("layers."): tensor for key, tensor in state.items()})
    with told_of("the reward model 'aesthetic'", device):
        head.requires_grad_(False).to(device).eval()
    embed_images, _ = clip("clip", local.get("clip"), device, dtype)

    @torch.no_grad()
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        return head(normalised(embed_images(images.to(device)))).squeeze(-1)

    return reward


def imagereward(local: dict[str, str], device: torch.device, dtype: torch.dtype) -> Reward:
    """ImageReward. Local path: a folder with the file, the tokenizer and, for another size than its own, blip_config.json."""
    with explained("imagereward", local):
        source, folder = SOURCES["imagereward"], local.get("imagereward")
        file = Path(folder, source.file) if folder else Path(hf_hub_download(source.hub, source.file))
        size = file.with_name("blip_config.json")
        config = BlipConfig.from_json_file(size) if size.exists() else image_reward.CONFIG
        model = image_reward.ImageReward(config)
        image_reward.load_original(model, torch.load(file, map_location="cpu", weights_only=True))
        tokenizer = image_reward.load_tokenizer(folder or source.tokenizer, config.text_config.vocab_size)
    with told_of("the reward model 'imagereward'", device):
        model.requires_grad_(False).to(device, dtype).eval().head.float()

    @torch.no_grad()
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        pixels = cropped(images.to(device), config.vision_config.image_size).to(device, dtype)
        return model(pixels, *image_reward.tokenize(tokenizer, prompts, device))

    return reward


LOADERS = {
    "hpsv2": hpsv2,
    "hpsv2.1": functools.partial(hpsv2, name="hpsv2.1"),
    "pickscore": pickscore,
    "imagereward": imagereward,
    "aesthetic": aesthetic,
    "clipscore": clipscore,
}
