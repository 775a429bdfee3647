"""The miniature as a rectified flow: a small StableDiffusion3Pipeline of the same world and the same autoencoder.

    python -m miniature.rectify FOLDER     # makes it again, in about half an hour of one core

SD3Transformer2DModel and two CLIPTextModelWithProjection, trained together as miniature/build.py trains its UNet; there is no T5,
so it is drawn with max_sequence_length=0. The result lies in flow/.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from miniature import WEIGHTS, build

STEPS, PEAK_LR = 9000, 1.5e-3
LAYERS, HEADS = 3, 8
WIDTHS = (64, 32)  # of the two text encoders


def text_encoder(vocabulary: int, width: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=vocabulary, max_position_embeddings=build.MAX_TOKENS, hidden_size=width, intermediate_size=2 * width,
        projection_dim=width, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    ))  # fmt: skip


def initial_pipeline() -> StableDiffusion3Pipeline:
    """The pipeline with random weights, 1.8 million parameters, beside the miniature's trained autoencoder."""
    tokenizer, vae = build.word_tokenizer(), AutoencoderTiny.from_pretrained(WEIGHTS / "vae").requires_grad_(False)
    encoders = [text_encoder(len(tokenizer), width) for width in WIDTHS]
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=build.LATENT_CHANNELS, out_channels=build.LATENT_CHANNELS, num_layers=LAYERS,
        attention_head_dim=16, num_attention_heads=HEADS, joint_attention_dim=sum(WIDTHS), caption_projection_dim=16 * HEADS,
        pooled_projection_dim=sum(WIDTHS), pos_embed_max_size=4, qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), vae, encoders[0], tokenizer, encoders[1], tokenizer, None, None
    )


def train_transformer(pipe: StableDiffusion3Pipeline, captions: build.Captions, steps: int, folder: Path) -> float:
    """Fits transformer and text encoders to the velocity, noise - x_0 -> seconds."""

    def loss_of_batch(step: int) -> Tensor:
        prompts, x_0 = build.latents_of_batch(pipe.vae, captions, mismatched=step >= 3 * steps // 4)
        states, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=0)
        t = torch.rand(len(x_0), 1, 1, 1).sqrt()  # twice as much of the noisiest as on average, where the layout is decided
        noise = torch.randn_like(x_0)
        prediction = pipe.transformer((1 - t) * x_0 + t * noise, states, pooled, 1000 * t.flatten()).sample
        return F.mse_loss(prediction, noise - x_0)

    parts = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    return build.optimise("transformer", parts, steps, PEAK_LR, loss_of_batch, captions, folder)


def rectify(folder: Path, seed: int = 0, steps: int = STEPS) -> None:
    """Trains it and saves it in fp16, with made.json, which says how; as in build.made_whole."""
    with build.made_whole(folder, seed) as state:
        pipe = initial_pipeline()
        seconds = train_transformer(pipe, build.Captions(seed), steps, state)
        pipe.vae.register_to_config(_name_or_path="")  # a machine's
        pipe.register_to_config(
            tokenizer=("transformers", "CLIPTokenizerFast"), tokenizer_2=("transformers", "CLIPTokenizerFast")
        )
        pipe.save_pretrained(state / "pipeline")
        build.halve(state / "pipeline")
        build.write_made(state / "pipeline", {"seed": seed, "steps": steps, "batch": build.BATCH, "seconds": seconds})


if __name__ == "__main__":
    build.command(rectify, "miniature.rectify", __doc__)
