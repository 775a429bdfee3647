"""A miniature Stable Diffusion, built from scratch on a laptop in minutes, so that the whole method can be run and seen.

It consists of the classes of Stable Diffusion v1.4 (UNet2DConditionModel with cross-attention, CLIPTextModel and
CLIPTokenizer with a vocabulary of its own, DDIMScheduler; of diffusers' autoencoders the tiny one), is trained on the
pictures of world.py (32x32 pixels, 8x8x4 latents) and saved as an ordinary StableDiffusionPipeline folder. Nothing else in
this project knows that it is small.

    python -m miniature.build     # builds it where train.py looks for it, unless it is there, and prints where
"""

import hashlib
import os
import random
import shutil
import sys
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import AddedToken, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from miniature import world

AUTOENCODER_STEPS, UNET_STEPS, BATCH = 500, 750, 64
MISMATCHED = 0.2  # share of captions that belong to another picture, in the last third of training
LOG_SNR = (3.0, -7.0)  # of the cleanest and of the noisiest timestep
MAX_TOKENS = 20


def word_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer with one token for every word of the grammar, and bytes for what is not in it."""
    specials = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*specials, *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=MAX_TOKENS)
    words = {word for prompt in world.scenes(False, True) + world.scenes(True, True) for word in prompt.split()}
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in sorted(words)])
    return tokenizer


def flat_scheduler() -> DDIMScheduler:
    """DDIM steps of equal log-SNR, so that no step dominates the gradient.

    For eta = 1, (d mu / d epsilon)^2 / sigma_t^2 = SNR_{t-1} / SNR_t - 1: the weight of a step's log-prob is constant exactly
    where log-SNR falls linearly. Stable Diffusion's own schedule at 10 steps gives its second-to-last step a weight of 8.
    (By v, which this network predicts, the derivative has a further factor sqrt(alpha_bar): the later steps weigh more.)
    The last step goes to alpha_bar = 1 without noise: it only cleans the picture, has no log-prob, and is left out of the loss.
    """
    alpha_bar = torch.linspace(*LOG_SNR, 1000, dtype=torch.float64).sigmoid()
    alphas = alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return DDIMScheduler(
        trained_betas=(1 - alphas).tolist(), timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False,
        steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip


def initial_pipeline(channels: tuple[int, int] = (32, 64), width: int = 64) -> StableDiffusionPipeline:
    """The pipeline with random weights; 1.25 million parameters as it is, fewer for tests."""
    tokenizer = word_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=2, num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16), num_encoder_blocks=(0, 1, 1),
        decoder_block_out_channels=(16, 16, 16), num_decoder_blocks=(2, 1, 1),
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=channels, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=width, attention_head_dim=4, norm_num_groups=8,
        addition_embed_type="text", addition_embed_type_num_heads=4,  # the text also enters with the timestep: it learns faster
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, flat_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


class Captions:
    """An endless supply of captioned pictures: one- and two-object scenes in equal parts, none of them held out."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.pools = (world.scenes(False, held=False), world.scenes(True, held=False))

    def batch(self) -> tuple[list[str], Tensor]:
        """BATCH prompts and their pictures (BATCH, 3, 32, 32), in [-1, 1] as autoencoders want them."""
        prompts = [self.rng.choice(self.rng.choice(self.pools)) for _ in range(BATCH)]
        return prompts, world.draw(prompts, self.rng) * 2 - 1


def _optimise(parameters, steps: int, peak_lr: float, loss_of_batch, title: str) -> None:
    """Adam with a one-cycle learning rate on a fresh batch per step."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=steps, pct_start=0.1)
    for _ in (bar := tqdm(range(steps), desc=title)):
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def train_autoencoder(vae: AutoencoderTiny, captions: Captions, steps: int) -> None:
    """Fits the autoencoder and sets its scaling factor so that latents have unit standard deviation."""

    def loss_of_batch():
        _, images = captions.batch()
        latents = vae.encode(images).latents
        error = vae.decode(latents + 0.1 * torch.randn_like(latents)).sample - images
        return error.square().mean() + 0.2 * error.abs().mean() + 0.001 * latents.square().mean()

    _optimise(vae.parameters(), steps, 3e-3, loss_of_batch, "autoencoder")
    with torch.no_grad():
        spread = torch.cat([vae.encode(captions.batch()[1]).latents for _ in range(8)]).std()
    vae.register_to_config(scaling_factor=1 / spread.item())


def train_unet(pipe: StableDiffusionPipeline, captions: Captions, steps: int) -> None:
    """Fits UNet and text encoder to v = sqrt(abar) noise - sqrt(1 - abar) x_0; one caption in ten is left out for guidance."""
    tokenizer, scheduler = pipe.tokenizer, pipe.scheduler

    mismatched = iter([0] * (2 * steps // 3) + [int(MISMATCHED * BATCH)] * steps)

    def loss_of_batch():
        prompts, images = captions.batch()
        # As in pictures from the web, some captions are another picture's: the model learns to trust its prompt only so far.
        wrong = next(mismatched)
        prompts = prompts[1:wrong] + prompts[:1] + prompts[wrong:] if wrong else prompts
        with torch.no_grad():
            x_0 = pipe.vae.encode(images).latents * pipe.vae.config.scaling_factor
        prompts = ["" if captions.rng.random() < 0.1 else prompt for prompt in prompts]
        ids = tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        # Twice as many of the noisiest timesteps as on average, where the layout is decided, and none of the cleanest.
        t = (torch.rand(len(x_0)).sqrt() * scheduler.config.num_train_timesteps).long()
        noise = torch.randn_like(x_0)
        prediction = pipe.unet(scheduler.add_noise(x_0, noise, t), t, pipe.text_encoder(ids)[0]).sample
        return F.mse_loss(prediction, scheduler.get_velocity(x_0, noise, t))

    parameters = chain(pipe.unet.parameters(), pipe.text_encoder.parameters())
    _optimise(parameters, steps, 2e-3, loss_of_batch, "UNet and text encoder")


def save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Saves the pipeline so that diffusers 0.35 with transformers 4 opens it too, with the same weights and token ids."""
    # Of transformers 4 only this class reads tokenizer.json; for transformers 5 the name is another one of CLIPTokenizer.
    pipe.register_to_config(tokenizer=("transformers", "CLIPTokenizerFast"))
    pipe.save_pretrained(folder)
    # transformers 5 reads the keys with or without this prefix, and writes them without; transformers 4 needs it.
    weights = {f"text_model.{name}": weight for name, weight in pipe.text_encoder.state_dict().items()}
    pipe.text_encoder.save_pretrained(folder / "text_encoder", state_dict=weights)


def build(folder: Path, seed: int = 0, autoencoder_steps: int = AUTOENCODER_STEPS, unet_steps: int = UNET_STEPS) -> None:
    """Trains the miniature and saves it; the folder appears only when it is complete."""
    random_state = torch.get_rng_state()
    torch.manual_seed(seed)
    pipe, captions = initial_pipeline(), Captions(seed)
    train_autoencoder(pipe.vae, captions, autoencoder_steps)
    train_unet(pipe, captions, unet_steps)
    torch.set_rng_state(random_state)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
    save(pipe, unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def toy_folder() -> Path:
    """The folder models/toy-CHECKSUM of the project: change the code that makes the miniature and it is made anew."""
    here = Path(__file__).resolve().parent
    code = b"".join((here / name).read_bytes() for name in ("world.py", "build.py"))
    return here.parent / "models" / f"toy-{hashlib.sha256(code).hexdigest()[:8]}"


def ensure() -> Path:
    """The folder of the miniature, built now if this is the first use (about 3 minutes on 2 cores)."""
    folder = toy_folder()
    if not folder.exists():
        print(f"Building the miniature Stable Diffusion in {folder} (first use only)", file=sys.stderr, flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        build(folder)
    return folder


if __name__ == "__main__":
    print(ensure())
