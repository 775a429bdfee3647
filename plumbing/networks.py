"""The networks of diffusers as the sampler wants them: a condition of named tensors, and guided outputs.

A further kind of network is one more class here: how its texts are encoded, and how it is called.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor


@dataclass(frozen=True)
class Embeddings:
    """A condition of the sampler's: encoded texts as named tensors, whose first dimension counts them."""

    tensors: Mapping[str, Tensor]

    def __getitem__(self, rows: Tensor | slice) -> "Embeddings":
        return Embeddings({k: v[rows.to(v.device) if isinstance(rows, Tensor) else rows] for k, v in self.tensors.items()})


def pooled(cond: Embeddings) -> Tensor:
    """One vector for each text, the mean of its token states, (M, width)."""
    return cond.tensors["encoder_hidden_states"].mean(1)


@dataclass(frozen=True)
class Guided:
    """Policy.denoise of a network under classifier-free guidance, out_u + w (out_c - out_u), combined in at least fp32."""

    network: UNet2DConditionModel | SD3Transformer2DModel | FluxTransformer2DModel
    uncond: Embeddings  # of the empty prompt, one row
    guidance_scale: float  # w; 1 skips the unconditional half, and so does a network that is told w
    autocast: torch.dtype | None = None  # of the network's forward pass; None is the weights' own precision

    def __call__(self, x_t: Tensor, t: Tensor, cond: Embeddings) -> Tensor:
        tensors, guided = cond.tensors, self.guidance_scale != 1 and not self.is_told
        if guided:
            tensors = {k: torch.cat([self.uncond.tensors[k].expand_as(v), v]) for k, v in tensors.items()}
            x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
        with torch.autocast(x_t.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            output = self.predict(x_t, t, tensors)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    @property
    def is_told(self) -> bool:
        """Whether w is an input of the network."""
        return False

    @property
    def channels(self) -> int:
        return self.network.config.in_channels

    def predict(self, x_t: Tensor, t: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The network's output at timesteps t (M,) under the condition's tensors, like x_t."""
        raise NotImplementedError

    @staticmethod
    def encode(pipe: DiffusionPipeline, prompts: list[str] | None, device: torch.device, size: int) -> dict[str, Tensor]:
        """The condition's tensors of prompts, or of the empty one as guidance uses it (None); size: of pictures, in pixels."""
        raise NotImplementedError


class GuidedUNet(Guided):
    """Of Stable Diffusion 1, 2 and XL, and of latent consistency models."""

    @property
    def is_told(self) -> bool:
        return bool(self.network.config.time_cond_proj_dim)

    def predict(self, x_t: Tensor, t: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        timestep_cond = None
        if self.is_told:  # a latent consistency model that was distilled for many w (arXiv 2310.04378): w - 1 like a timestep
            at = torch.full((len(x_t),), 1000.0 * (self.guidance_scale - 1), device=x_t.device)
            timestep_cond = get_timestep_embedding(at, self.network.config.time_cond_proj_dim, downscale_freq_shift=1)
        # SDXL finds its pooled text and sizes in added_cond_kwargs; Stable Diffusion 1 and 2 ignore that argument.
        states = tensors["encoder_hidden_states"]
        return self.network(x_t, t, states, timestep_cond=timestep_cond, added_cond_kwargs=tensors).sample

    @staticmethod
    def encode(pipe: DiffusionPipeline, prompts: list[str] | None, device: torch.device, size: int) -> dict[str, Tensor]:
        encoded = pipe.encode_prompt(
            prompts or [""], device=device, num_images_per_prompt=1, do_classifier_free_guidance=prompts is None
        )
        # (prompt, negative) or, of SDXL, (prompt, negative, pooled, negative pooled)
        states, *pooled_texts = encoded[1::2] if prompts is None else encoded[0::2]
        if not pooled_texts:
            return {"encoder_hidden_states": states}
        ids = pipe._get_add_time_ids((size, size), (0, 0), (size, size), states.dtype, pipe.text_encoder_2.config.projection_dim)
        times = ids.to(states.device).repeat(len(states), 1)
        return {"encoder_hidden_states": states, "text_embeds": pooled_texts[0], "time_ids": times}


class GuidedSD3(Guided):
    """Of Stable Diffusion 3 and 3.5."""

    def predict(self, x_t: Tensor, t: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.network(x_t, timestep=t, **tensors).sample

    @staticmethod
    def encode(pipe: DiffusionPipeline, prompts: list[str] | None, device: torch.device, size: int) -> dict[str, Tensor]:
        states, _, pooled_texts, _ = pipe.encode_prompt(
            prompts or [""], None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=t5_tokens(pipe)
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled_texts}


class GuidedFlux(Guided):
    """Of FLUX.1, whose transformer sees latents in packs of 2 x 2, and is told w or has no guidance (schnell)."""

    is_told = True

    @property
    def channels(self) -> int:
        return self.network.config.in_channels // 4

    def predict(self, x_t: Tensor, t: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        rows, columns = x_t.shape[-2] // 2, x_t.shape[-1] // 2
        told = self.network.config.guidance_embeds
        guidance = torch.full((len(x_t),), self.guidance_scale, device=x_t.device) if told else None
        output = self.network(
            F.pixel_unshuffle(x_t, 2).flatten(2).mT, timestep=t / 1000, guidance=guidance, **tensors,
            img_ids=FluxPipeline._prepare_latent_image_ids(len(x_t), rows, columns, x_t.device, x_t.dtype),
            txt_ids=torch.zeros(tensors["encoder_hidden_states"].shape[1], 3, device=x_t.device),
        ).sample  # fmt: skip
        return F.pixel_shuffle(output.mT.unflatten(2, (rows, columns)), 2)

    @staticmethod
    def encode(pipe: DiffusionPipeline, prompts: list[str] | None, device: torch.device, size: int) -> dict[str, Tensor]:
        states, pooled_texts, _ = pipe.encode_prompt(prompts or [""], None, device=device, max_sequence_length=t5_tokens(pipe))
        return {"encoder_hidden_states": states, "pooled_projections": pooled_texts}


NETWORK_NAMES = ("unet", "transformer")
NETWORKS = {UNet2DConditionModel: GuidedUNet, SD3Transformer2DModel: GuidedSD3, FluxTransformer2DModel: GuidedFlux}


def guided(network: torch.nn.Module) -> type[Guided]:
    """The class here of a network; ValueError for one that has none."""
    for kind, guided_kind in NETWORKS.items():
        if isinstance(network, kind):
            return guided_kind
    raise ValueError(f"{type(network).__name__} is not one of {', '.join(kind.__name__ for kind in NETWORKS)}")


def network_name(pipe: DiffusionPipeline) -> str:
    """What a pipeline calls the part that it denoises with."""
    return next((name for name in NETWORK_NAMES if getattr(pipe, name, None) is not None), "")


def network_of(pipe: DiffusionPipeline) -> torch.nn.Module | None:
    """What a pipeline denoises with; None where it is called otherwise than here."""
    return getattr(pipe, network_name(pipe), None)


def t5_tokens(pipe: DiffusionPipeline) -> int:
    """Tokens of T5, as load_pipeline was told; by default those of StableDiffusion3Pipeline."""
    return getattr(pipe, "max_sequence_length", 256)
