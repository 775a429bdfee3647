"""The networks of diffusers as the sampler wants them: a condition of named tensors, and guided outputs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
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
class GuidedUNet:
    """Policy.denoise of a UNet under classifier-free guidance, eps_u + w (eps_c - eps_u), combined in at least fp32."""

    unet: UNet2DConditionModel
    uncond: Embeddings  # of the empty prompt, one row
    guidance_scale: float  # w; 1 skips the unconditional half, and so does a UNet that is told w
    autocast: torch.dtype | None = None  # of the UNet's forward pass; None is the weights' own precision

    def __call__(self, x_t: Tensor, t: Tensor, cond: Embeddings) -> Tensor:
        told, tensors, timestep_cond = self.unet.config.time_cond_proj_dim, cond.tensors, None
        guided = self.guidance_scale != 1 and not told
        if told:  # a latent consistency model that was distilled for many w (arXiv 2310.04378): w - 1 like a timestep
            at = torch.full((len(x_t),), 1000.0 * (self.guidance_scale - 1), device=x_t.device)
            timestep_cond = get_timestep_embedding(at, told, downscale_freq_shift=1)
        if guided:
            tensors = {k: torch.cat([self.uncond.tensors[k].expand_as(v), v]) for k, v in tensors.items()}
            x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
        with torch.autocast(x_t.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            # SDXL finds its pooled text and sizes in added_cond_kwargs; Stable Diffusion 1 and 2 ignore that argument.
            states = tensors["encoder_hidden_states"]
            output = self.unet(x_t, t, states, timestep_cond=timestep_cond, added_cond_kwargs=tensors).sample
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)
