"""ImageReward's network (Xu et al., NeurIPS 2023, arXiv 2304.05977) in transformers' BLIP classes, from its own file.

    picture    ViT-L/16 at 224: one vector of 1024 for each of 196 patches and one more
    prompt     35 tokens, padded or cut; BERT-base, each layer of which also attends to all of the picture
    reward     an affine head on what has become of the first token, [CLS], standardised by the authors' mean and deviation

After ImageReward/ImageReward.py and train/src/models of github.com/THUDM/ImageReward; its package does not run with transformers
5. Three traps: the text encoder has 12 heads and the vision encoder's epsilon is 1e-6, neither of which is transformers' default;
and the first token stays [CLS], where BLIP's own matching of picture and text would put [ENC].
"""

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipConfig, BlipTextModel, BlipVisionModel

MEAN, STD = 0.16717362830052426, 1.0333394966054072
LENGTH = 35  # tokens of a prompt, with [CLS] and [SEP]
CONFIG = BlipConfig(
    vision_config=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
        layer_norm_eps=1e-6,
        initializer_range=0.02,  # of random weights only, as benchmarks/rehearsal.py makes; 1e-10 would not see the picture
    ),
    text_config=dict(num_attention_heads=12),
)  # fmt: skip
UNUSED = {  # of the file: BLIP's contrastive projections, and a buffer that counts positions
    "blip.vision_proj.weight", "blip.vision_proj.bias", "blip.text_proj.weight", "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
}  # fmt: skip
RENAMED = {  # transformers' part of a name -> the file's; the remaining parts are the same
    "vision.embeddings.class_embedding": "blip.visual_encoder.cls_token",
    "vision.embeddings.position_embedding": "blip.visual_encoder.pos_embed",
    "vision.embeddings.patch_embedding": "blip.visual_encoder.patch_embed.proj",
    "vision.encoder.layers": "blip.visual_encoder.blocks",
    "vision.post_layernorm": "blip.visual_encoder.norm",
    ".layer_norm": ".norm",
    ".self_attn.qkv": ".attn.qkv",
    ".self_attn.projection": ".attn.proj",
    "text.": "blip.text_encoder.",
    "head.": "mlp.layers.",
}


def affine_head(width: int) -> nn.Sequential:
    """(B, width) -> (B, 1). The LAION aesthetic predictor's layers and ImageReward's: without activations."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
        nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip


class ImageReward(nn.Module):
    """Normalised pictures (B, 3, 224, 224), tokens (B, 35) and their mask (B, 35) -> rewards (B,) of a head in fp32."""

    def __init__(self, config: BlipConfig = CONFIG):
        super().__init__()
        self.vision = BlipVisionModel(config.vision_config)
        self.text = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.head = affine_head(config.text_config.hidden_size)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        patches = self.vision(pixels).last_hidden_state
        words = self.text(tokens, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return (self.head(words[:, 0].float()).squeeze(-1) - MEAN) / STD


def original_name(name: str) -> str:
    """The name in ImageReward.pt of a parameter of ImageReward."""
    for part, original in RENAMED.items():
        name = name.replace(part, original)
    return name


def load_original(model: ImageReward, state: dict[str, Tensor]) -> None:
    """Loads the tensors of ImageReward.pt; ValueError naming one that is missing, unexpected or of another shape."""
    names = {name: original_name(name) for name in model.state_dict()}
    wanted = {names[name]: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in state.items() if name not in UNUSED}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(f"{name} is {found.get(name, 'missing')} and should be {wanted.get(name, 'missing')}")
    model.load_state_dict({name: state[original] for name, original in names.items()})


def load_tokenizer(source: str, size: int) -> BertTokenizer:
    """BERT's of a folder or hub id with BLIP's two further tokens; ValueError unless these are `size` together."""
    tokenizer = BertTokenizer.from_pretrained(source)  # one of five tokens, without a word, where there is no vocabulary
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens and should have {size}")
    return tokenizer


def tokenize(tokenizer: BertTokenizer, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask, (B, 35) each."""
    tokens = tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").to(device)
    return tokens["input_ids"], tokens["attention_mask"]
