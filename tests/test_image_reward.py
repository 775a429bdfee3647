"""ImageReward against its network written again, in plain torch under the original repository's names: the oracle.

The oracle's state dict has the layout of ImageReward.pt, so the keys come from it too; its sizes are small.
"""

import math
from pathlib import Path

import pytest
import torch
import torchvision.transforms as T
from test_reward_models import CPU, FP32, as_pil, pictures
from torch import nn
from transformers import BertTokenizer, BlipConfig

from benchmarks.rehearsal import bert_tokenizer
from plumbing.image_reward import CONFIG, UNUSED, ImageReward, load_tokenizer, tokenize
from plumbing.reward_models import CLIP_MEAN, CLIP_STD, imagereward
from rewards import load_reward

VISION, TEXT, SIZE, VOCABULARY = 48, 36, 64, 160  # widths; 4 x 4 patches of 16
PROMPTS = ["a photo of a cat", "[ENC] A Photo, of: a CAT! [DEC]", "cat", "long prompts are cut " * 5]


class Oracle(nn.Module):
    """ImageReward/ImageReward.py, models/BLIP/vit.py and med.py as they are read: names, order of operations, constants."""

    def __init__(self):
        super().__init__()
        self.blip, self.mlp = nn.Module(), nn.Module()
        self.mlp.layers = nn.ModuleDict(
            {
                str(i): nn.Linear(*sizes)
                for i, sizes in {0: (TEXT, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}.items()
            }
        )
        self.blip.vision_proj, self.blip.text_proj = nn.Linear(VISION, 8), nn.Linear(TEXT, 8)
        vit = self.blip.visual_encoder = nn.Module()
        vit.cls_token = nn.Parameter(torch.randn(1, 1, VISION))
        vit.pos_embed = nn.Parameter(torch.randn(1, 1 + (SIZE // 16) ** 2, VISION))
        vit.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, VISION, 16, 16)})
        vit.blocks = nn.ModuleList(self.block() for _ in range(3))
        vit.norm = nn.LayerNorm(VISION, eps=1e-6)
        bert = self.blip.text_encoder = nn.Module()
        bert.embeddings = nn.Module()
        bert.embeddings.register_buffer("position_ids", torch.arange(40).expand(1, -1))
        bert.embeddings.word_embeddings = nn.Embedding(VOCABULARY, TEXT)
        bert.embeddings.position_embeddings = nn.Embedding(40, TEXT)
        bert.embeddings.LayerNorm = nn.LayerNorm(TEXT, eps=1e-12)
        bert.encoder = nn.ModuleDict({"layer": nn.ModuleList(self.layer() for _ in range(2))})
        for parameter in self.blip.parameters():  # norms and biases too, so that none can be left out or exchanged
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
        for parameter in self.mlp.parameters():  # so that scores are of the size of one
            parameter.data.mul_(1.7)

    def block(self) -> nn.Module:
        return nn.ModuleDict(
            {
                "norm1": nn.LayerNorm(VISION, eps=1e-6), "norm2": nn.LayerNorm(VISION, eps=1e-6),
                "attn": nn.ModuleDict({"qkv": nn.Linear(VISION, 3 * VISION), "proj": nn.Linear(VISION, VISION)}),
                "mlp": nn.ModuleDict({"fc1": nn.Linear(VISION, 80), "fc2": nn.Linear(80, VISION)}),
            }
        )  # fmt: skip

    def layer(self) -> nn.Module:
        def output(width: int) -> nn.Module:
            return nn.ModuleDict({"dense": nn.Linear(width, TEXT), "LayerNorm": nn.LayerNorm(TEXT, eps=1e-12)})

        def attention(width: int) -> nn.Module:
            linears = {"query": nn.Linear(TEXT, TEXT), "key": nn.Linear(width, TEXT), "value": nn.Linear(width, TEXT)}
            return nn.ModuleDict({"self": nn.ModuleDict(linears), "output": output(TEXT)})

        return nn.ModuleDict(
            {
                "attention": attention(TEXT), "crossattention": attention(VISION),
                "intermediate": nn.ModuleDict({"dense": nn.Linear(TEXT, 100)}), "output": output(100),
            }
        )  # fmt: skip

    @staticmethod
    def attend(q, k, v, heads: int, added=0.0):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + added).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def forward(self, pixels, ids, mask):
        vit, bert, gelu = self.blip.visual_encoder, self.blip.text_encoder, nn.functional.gelu
        x = vit.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1) + vit.pos_embed
        for block in vit.blocks:
            q, k, v = block["attn"]["qkv"](block["norm1"](x)).chunk(3, -1)
            x = x + block["attn"]["proj"](self.attend(q, k, v, heads=4))
            x = x + block["mlp"]["fc2"](gelu(block["mlp"]["fc1"](block["norm2"](x))))
        x = vit.norm(x)
        y = bert.embeddings.word_embeddings(ids) + bert.embeddings.position_embeddings(
            bert.embeddings.position_ids[:, : ids.shape[1]]
        )
        y, padding = bert.embeddings.LayerNorm(y), (1.0 - mask[:, None, None, :].float()) * -10000.0
        for layer in bert.encoder["layer"]:
            for part, added in (("attention", padding), ("crossattention", 0.0)):
                seen = y if part == "attention" else x
                of, output = layer[part]["self"], layer[part]["output"]
                attended = self.attend(of["query"](y), of["key"](seen), of["value"](seen), 3, added)
                y = output["LayerNorm"](output["dense"](attended) + y)
            output = layer["output"]
            y = output["LayerNorm"](output["dense"](gelu(layer["intermediate"]["dense"](y))) + y)
        reward = y[:, 0, :].float()
        for linear in self.mlp.layers.values():
            reward = linear(reward)
        return (reward.squeeze(1) - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    torch.manual_seed(0)
    return Oracle().eval().requires_grad_(False)


def folder_of(folder: Path, state: dict) -> str:
    """The files of ImageReward with these tensors -> the folder."""
    folder.mkdir()
    torch.save(state, folder / "ImageReward.pt")
    BlipConfig(
        vision_config=dict(
            hidden_size=VISION, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE,
            layer_norm_eps=1e-6,
        ),
        text_config=dict(
            hidden_size=TEXT, intermediate_size=100, num_hidden_layers=2, num_attention_heads=3, vocab_size=VOCABULARY,
            max_position_embeddings=40, bos_token_id=VOCABULARY - 2,
        ),
    ).to_json_file(folder / "blip_config.json")  # fmt: skip
    bert_tokenizer(VOCABULARY - 2).save_pretrained(folder)
    return str(folder)


def reference_inputs(images, prompts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures by PIL as ImageReward prepares them, tokens as its tokenizer gives them: set up as in its init_tokenizer."""
    steps = [T.Resize(SIZE, T.InterpolationMode.BICUBIC), T.CenterCrop(SIZE), T.ToTensor(), T.Normalize(CLIP_MEAN, CLIP_STD)]
    tokenizer = BertTokenizer(vocab=bert_tokenizer(VOCABULARY - 2).get_vocab())
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    return torch.stack([T.Compose(steps)(image) for image in as_pil(images)]), tokens.input_ids, tokens.attention_mask


@pytest.fixture(scope="module")
def folder(oracle, tmp_path_factory) -> str:
    return folder_of(tmp_path_factory.mktemp("imagereward") / "model", oracle.state_dict())


@pytest.mark.parametrize("size, tolerance", [((64, 64), 1e-5), ((80, 64), 1e-5), ((96, 200), 0.01)])
def test_scores_are_the_originals(oracle, folder, size, tolerance):
    """To rounding, but where PIL resizes: that is at most 2 of 255 apart (test_clip_preprocessing_is_pils)."""
    reward, images = imagereward({"imagereward": folder}, CPU, FP32), pictures(*size)
    scores, expected = reward(images, PROMPTS), oracle(*reference_inputs(images, PROMPTS))
    assert scores.dtype == torch.float32 and scores.shape == (4,) and 0.1 < scores.abs().max() < 10
    torch.testing.assert_close(scores, expected, atol=tolerance, rtol=0)
    for changed in (reward(images, PROMPTS[::-1]), reward(images.flip(0), PROMPTS)):
        assert (changed - scores).abs().min() > 0.01  # both of a pair count


def test_a_prompt_is_35_tokens_from_cls_on(folder):
    tokenizer = load_tokenizer(folder, VOCABULARY)
    tokens, mask = tokenize(tokenizer, PROMPTS, CPU)
    assert tokens.shape == mask.shape == (4, 35)
    assert (tokens[:, 0] == tokenizer.cls_token_id).all() and mask.sum(1).tolist() == [14, 19, 5, 35]
    assert tokens[1, 1] == VOCABULARY - 1 and tokens[3, 34] == tokenizer.sep_token_id
    assert torch.equal(mask == 0, tokens == tokenizer.pad_token_id)
    _, expected, _ = reference_inputs(pictures(64, 64), PROMPTS)
    assert torch.equal(tokens, expected)


def test_the_real_sizes():
    with torch.device("meta"):
        model = ImageReward(CONFIG)
    vision, text = CONFIG.vision_config, CONFIG.text_config
    assert (vision.image_size, vision.patch_size, vision.num_attention_heads, vision.layer_norm_eps) == (224, 16, 16, 1e-6)
    assert (text.num_attention_heads, text.layer_norm_eps, text.vocab_size, text.hidden_act) == (12, 1e-12, 30524, "gelu")
    published = 1_786_880_927  # bytes of ImageReward.pt; a tensor in it costs some 330 beside its numbers
    numbers = sum(parameter.numel() for parameter in model.parameters()) + 256 * (1024 + 1) + 256 * (768 + 1)
    tensors = len(model.state_dict()) + len(UNUSED)
    assert 300 < (published - 4 * numbers - 8 * 512) / tensors < 350


BLOCK, LAYER = "blip.visual_encoder.blocks.1", "blip.text_encoder.encoder.layer.0"


@pytest.mark.parametrize(
    "change, key",
    [
        (lambda state: state.pop(f"{BLOCK}.attn.qkv.bias"), f"{BLOCK}.attn.qkv.bias is missing and should be"),
        (lambda state: state.pop("mlp.layers.7.weight"), "mlp.layers.7.weight is missing and should be"),
        (lambda state: state.update({f"{BLOCK}.gamma": torch.ones(1)}), f"{BLOCK}.gamma is [1] and should be missing"),
        (lambda state: state.update({"mlp.layers.6.bias": torch.ones(3)}), "mlp.layers.6.bias is [3] and should be [16]"),
        (lambda state: state.update({f"{LAYER}.crossattention.self.key.weight": state[f"{LAYER}.attention.self.key.weight"]}),
         f"{LAYER}.crossattention.self.key.weight is [{TEXT}, {TEXT}] and should be [{TEXT}, {VISION}]"),
    ],
)  # fmt: skip
def test_another_layout_is_told_in_one_line_naming_the_key(oracle, tmp_path, change, key):
    state = dict(oracle.state_dict())
    change(state)
    folder = folder_of(tmp_path / "model", state)
    with pytest.raises(ValueError) as error:
        load_reward("imagereward", [f"imagereward={folder}"])
    message = str(error.value)
    assert key in message and folder in message and "ImageReward.pt" in message and "\n" not in message


def test_exchanged_tensors_change_the_score(oracle, folder, tmp_path):
    """Of the same shape, so that nothing but the score can tell: each of a kind is where it belongs."""
    images = pictures(64, 64)
    scores = imagereward({"imagereward": folder}, CPU, FP32)(images, PROMPTS)
    kinds = [
        (f"{BLOCK}.norm1.weight", f"{BLOCK}.norm2.weight"),
        ("blip.visual_encoder.blocks.0.attn.proj.weight", "blip.visual_encoder.blocks.2.attn.proj.weight"),
        (f"{LAYER}.attention.self.query.weight", f"{LAYER}.attention.self.key.weight"),
        (f"{LAYER}.attention.output.LayerNorm.bias", f"{LAYER}.crossattention.output.LayerNorm.bias"),
    ]
    for i, (one, other) in enumerate(kinds):
        state = dict(oracle.state_dict())
        state[one], state[other] = state[other], state[one]
        exchanged = imagereward({"imagereward": folder_of(tmp_path / str(i), state)}, CPU, FP32)(images, PROMPTS)
        assert (exchanged - scores).abs().max() > 1e-3, one


def test_without_its_tokenizer_nothing_is_scored(oracle, tmp_path):
    """BertTokenizer makes one of five tokens of a folder without a vocabulary, and says nothing."""
    folder = Path(folder_of(tmp_path / "model", oracle.state_dict()))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"google-bert/bert-base-uncased beside it .* has 7 tokens and should have 160"):
        load_reward("imagereward", [f"imagereward={folder}"])


def test_what_the_file_has_beside_the_network_may_be_missing(oracle, folder, tmp_path):
    state = {name: tensor for name, tensor in oracle.state_dict().items() if name not in UNUSED}
    assert len(state) == len(oracle.state_dict()) - len(UNUSED)
    lean = imagereward({"imagereward": folder_of(tmp_path / "model", state)}, CPU, FP32)
    whole = imagereward({"imagereward": folder}, CPU, FP32)
    assert torch.equal(lean(pictures(), PROMPTS), whole(pictures(), PROMPTS))
