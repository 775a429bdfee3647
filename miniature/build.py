"""A miniature Stable Diffusion, built from scratch, so that the whole method can be run and seen on a laptop.

It consists of the classes of Stable Diffusion v1.4 (UNet2DConditionModel with cross-attention, CLIPTextModel and
CLIPTokenizer with a vocabulary of its own, DDIMScheduler; of diffusers' autoencoders the tiny one), is trained on the
pictures of world.py (32x32 pixels, 8x8x12 latents) and saved as an ordinary StableDiffusionPipeline folder. Nothing else in
this project knows that it is small. The result lies in weights/, beside this file, with its card.

    python -m miniature.build FOLDER     # makes it again from nothing, in about an hour of one core
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, pre_tokenizers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from miniature import world

STEPS, BATCH = {"autoencoder": 1500, "unet": 8000, "decoder": 2500}, 64
LATENT_CHANNELS = 12
MISMATCHED = 0.45  # share of captions (rounded down) that belong to another picture, in the last quarter of the UNet's training
EMA_DECAY = 0.995  # per step
SAVE_EVERY = 100  # steps, so that an interrupted build can go on
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


def initial_pipeline(channels: tuple[int, ...] = (32, 64), width: int = 64) -> StableDiffusionPipeline:
    """The pipeline with random weights; 1.4 million parameters as it is, fewer for tests."""
    tokenizer = word_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=2, num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    vae = AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32), num_encoder_blocks=(0, 1, 1), latent_channels=LATENT_CHANNELS,
        decoder_block_out_channels=(32, 32, 32), num_decoder_blocks=(2, 1, 1),
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=channels, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels), up_block_types=("CrossAttnUpBlock2D",) * len(channels),
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

    def prompt(self) -> str:
        return self.rng.choice(self.rng.choice(self.pools))

    def batch(self) -> tuple[list[str], Tensor]:
        """BATCH prompts and their pictures (BATCH, 3, 32, 32), in [-1, 1] as autoencoders want them."""
        prompts = [self.prompt() for _ in range(BATCH)]
        return prompts, world.draw(prompts, self.rng) * 2 - 1


def optimise(
    name: str, modules: list[nn.Module], steps: int, peak_lr: float, loss_of_batch: Callable[[int], Tensor], captions: Captions,
    folder: Path,
) -> float:  # fmt: skip
    """AdamW with a one-cycle learning rate on a fresh batch per step; the modules end as the moving average of their weights.

    loss_of_batch(step) draws the batch. The state is kept in folder/name.pt: after an interruption it goes on there. Returns the
    seconds that all of it took.
    """
    together, file = nn.ModuleList(modules), folder / f"{name}.pt"
    average = AveragedModel(together, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimiser = torch.optim.AdamW(together.parameters(), lr=peak_lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak_lr, total_steps=steps, pct_start=0.1)
    stateful, first, seconds = {"weights": together, "average": average, "optimiser": optimiser, "schedule": schedule}, 0, 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        for key, thing in stateful.items():
            thing.load_state_dict(state[key])
        first, seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["noise"])
        captions.rng.setstate(state["captions"])
    began = time.monotonic() - seconds
    for step in (bar := tqdm(range(first, steps), desc=name, initial=first, total=steps)):
        loss = loss_of_batch(step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(together.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(together)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            seconds = time.monotonic() - began
            state = {key: thing.state_dict() for key, thing in stateful.items()} | {"step": step + 1, "seconds": seconds}
            state |= {"noise": torch.get_rng_state(), "captions": captions.rng.getstate()}
            torch.save(state, file.with_suffix(".unfinished"))
            file.with_suffix(".unfinished").replace(file)
    together.load_state_dict(average.module.state_dict())
    return seconds


def decoding_loss(vae: AutoencoderTiny, latents: Tensor, noise: float, images: Tensor) -> Tensor:
    """How far the pictures are from what is decoded from their latents with some noise."""
    error = vae.decode(latents + noise * torch.randn_like(latents)).sample - images
    return error.square().mean() + 0.2 * error.abs().mean()


def train_autoencoder(vae: AutoencoderTiny, captions: Captions, steps: int, folder: Path) -> float:
    """Fits the autoencoder and sets its scaling factor so that latents have unit standard deviation."""

    def loss_of_batch(step: int) -> Tensor:
        _, images = captions.batch()
        latents = vae.encode(images).latents
        return decoding_loss(vae, latents, 0.1, images) + 0.001 * latents.square().mean()

    seconds = optimise("autoencoder", [vae], steps, 3e-3, loss_of_batch, captions, folder)
    with torch.no_grad():
        spread = torch.cat([vae.encode(captions.batch()[1]).latents for _ in range(8)]).std()
    vae.register_to_config(scaling_factor=1 / spread.item())
    return seconds


def latents_of_batch(vae: AutoencoderTiny, captions: Captions, mismatched: bool) -> tuple[list[str], Tensor]:
    """BATCH captions, one in ten left out for guidance, and their pictures' latents."""
    prompts, images = captions.batch()
    if mismatched:
        # As in pictures from the web, some captions are another picture's: the model learns to trust its prompt only so far.
        wrong = int(MISMATCHED * BATCH)
        prompts = prompts[1:wrong] + prompts[:1] + prompts[wrong:]
    with torch.no_grad():
        x_0 = vae.encode(images).latents * vae.config.scaling_factor
    return ["" if captions.rng.random() < 0.1 else prompt for prompt in prompts], x_0


def train_unet(pipe: StableDiffusionPipeline, captions: Captions, steps: int, folder: Path) -> float:
    """Fits UNet and text encoder to v = sqrt(abar) noise - sqrt(1 - abar) x_0."""
    tokenizer, scheduler = word_tokenizer(), pipe.scheduler  # the pipeline's would be saved with the padding that is asked here

    def loss_of_batch(step: int) -> Tensor:
        prompts, x_0 = latents_of_batch(pipe.vae, captions, mismatched=step >= 3 * steps // 4)
        ids = tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        # Twice as many of the noisiest timesteps as on average, where the layout is decided, and none of the cleanest.
        t = (torch.rand(len(x_0)).sqrt() * scheduler.config.num_train_timesteps).long()
        noise = torch.randn_like(x_0)
        prediction = pipe.unet(scheduler.add_noise(x_0, noise, t), t, pipe.text_encoder(ids)[0]).sample
        return F.mse_loss(prediction, scheduler.get_velocity(x_0, noise, t))

    return optimise("unet", [pipe.unet, pipe.text_encoder], steps, 2e-3, loss_of_batch, captions, folder)


def train_decoder(vae: AutoencoderTiny, captions: Captions, steps: int, folder: Path) -> float:
    """Fits the decoder further, to the latents as they are now."""

    def loss_of_batch(step: int) -> Tensor:
        _, images = captions.batch()
        with torch.no_grad():
            latents = vae.encode(images).latents
        return decoding_loss(vae, latents, 0.05, images)

    return optimise("decoder", [vae.decoder], steps, 2e-3, loss_of_batch, captions, folder)


def save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Saves the pipeline in fp16, opened as fp32; diffusers 0.35 with transformers 4 opens it too, with the same token ids."""
    # Of transformers 4 only this class reads tokenizer.json; for transformers 5 the name is another one of CLIPTokenizer.
    pipe.register_to_config(tokenizer=("transformers", "CLIPTokenizerFast"))
    pipe.save_pretrained(folder)
    # transformers 5 reads the keys with or without this prefix, and writes them without; transformers 4 needs it.
    weights = {f"text_model.{name}": weight for name, weight in pipe.text_encoder.state_dict().items()}
    pipe.text_encoder.save_pretrained(folder / "text_encoder", state_dict=weights)
    halve(folder)


def halve(folder: Path) -> None:
    """Rounds weights to fp16 here and not with pipe.half(), after which the configs would have them opened as fp16."""
    for file in folder.glob("*/*.safetensors"):
        save_file({name: weight.half() for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})


@contextmanager
def made_whole(folder: Path, seed: int) -> Iterator[Path]:
    """Lends FOLDER.state, with torch's seed set; what is made in its folder `pipeline` becomes FOLDER when it is complete.

    What is interrupted goes on from FOLDER.state, which is removed at the end. FileExistsError if the folder is there already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: choose another folder, or remove it")
    state = folder.with_name(f"{folder.name}.state")
    state.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(state / "pipeline", ignore_errors=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield state
    (state / "pipeline").rename(folder)
    shutil.rmtree(state)


def build(folder: Path, seed: int = 0, steps: dict[str, int] = STEPS) -> None:
    """Trains the miniature and saves it, with made.json, which says how; as in made_whole.

    On another processor, or with another number of threads, the weights come out differently.
    """
    with made_whole(folder, seed) as state:
        pipe, captions = initial_pipeline(), Captions(seed)
        seconds = {
            "autoencoder": train_autoencoder(pipe.vae, captions, steps["autoencoder"], state),
            "unet": train_unet(pipe, captions, steps["unet"], state),
        }
        torch.manual_seed(seed + 1)
        seconds["decoder"] = train_decoder(pipe.vae, Captions(seed + 1), steps["decoder"], state)
        save(pipe, state / "pipeline")
        write_made(state / "pipeline", {"seed": seed, "steps": steps, "batch": BATCH, "seconds": seconds})


def write_made(folder: Path, how: dict) -> None:
    """made.json: how a pipeline was made, on how many threads and by which versions."""
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    made = how | {"threads": torch.get_num_threads()} | versions
    (folder / "made.json").write_text(json.dumps(made, indent=1) + "\n")


def command(make: Callable[[Path], None], prog: str, doc: str) -> None:
    """The command line of what makes a pipeline in a folder."""
    parser = argparse.ArgumentParser(prog=prog, description=doc.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help=f"where the pipeline goes; an interrupted {prog} goes on from FOLDER.state")
    try:
        make(parser.parse_args().folder)
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    command(build, "miniature.build", __doc__)
