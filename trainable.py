"""What is trained, what stays the reference, and how both are held in memory.

Full finetuning trains every weight of the UNet beside a frozen copy of it, pi_ref. With --lora_rank the weights stay and low-rank
adapters of the attention layers are trained; pi_ref is then the same UNet with the adapters off, and there is no second one.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from config import Config
from pipeline import save_pipeline
from sampler import Policy

Reference = Callable[[Policy], AbstractContextManager[Policy]]


def make_trainable(pipe: DiffusionPipeline, config: Config) -> Reference:
    """Readies pipe.unet in place -> a function that lends pi_ref: `with reference(policy) as pi_ref: ...`.

    Afterwards the parameters that require a gradient are those to train. ValueError for adapters that fit no layer.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    unet, device = pipe.unet, pipe.unet.device
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    frozen = None
    if config.lora_rank:
        torch.manual_seed(config.seed)  # of the adapters' first layer; the second starts at zero, so theta starts at ref
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=layers))
    else:
        frozen = copy.deepcopy(unet)
        unet.requires_grad_(True)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    for compiled in [unet, frozen] if frozen is not None else [unet]:
        if config.compile:
            compiled.compile()
    if frozen is not None and config.reference_on_cpu:
        frozen.to("cpu")

    @contextmanager
    def reference(policy: Policy) -> Iterator[Policy]:
        if frozen is None:
            unet.disable_lora()
            try:
                yield policy
            finally:
                unet.enable_lora()
        else:
            frozen.to(device)
            yield dataclasses.replace(policy, unet=frozen)
            if config.reference_on_cpu:
                frozen.to("cpu")

    return reference


def trained_parameters(pipe: DiffusionPipeline) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in pipe.unet.named_parameters() if parameter.requires_grad}


def save_result(pipe: DiffusionPipeline, scheduler: DDIMScheduler, run: Path) -> None:
    """run/pipeline for plain from_pretrained, adapters merged in; of adapters also run/lora for load_lora_weights."""
    if getattr(pipe.unet, "peft_config", None):
        pipe.save_lora_weights(run / "lora", unet_lora_layers=get_peft_model_state_dict(pipe.unet))
        pipe.unet.fuse_lora()
        pipe.unet.unload_lora()
    save_pipeline(pipe, scheduler, run / "pipeline")
