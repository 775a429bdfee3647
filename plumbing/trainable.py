"""What is trained, what stays the reference, how both are held in memory, and how a result is saved and opened.

Full finetuning trains every weight of the network beside a frozen copy of it, pi_ref. With --lora_rank the weights stay and
low-rank adapters of the attention layers are trained; pi_ref is then the same network, its adapters off.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor

from config import Config
from plumbing import checkpoint, modelcard
from plumbing.anchor import consistency_scheduler
from plumbing.errors import first_line
from plumbing.networks import network_name, network_of
from plumbing.pipeline import load_pipeline, save_pipeline
from plumbing.record import read_run
from plumbing.schedules import Scheduler
from sampler import Condition, Policy, gaussian

Reference = Callable[[Policy], AbstractContextManager[Policy]]


def make_trainable(pipe: DiffusionPipeline, config: Config) -> Reference:
    """Readies the network in place -> a function that lends pi_ref: `with reference(policy) as pi_ref: ...`.

    Afterwards the parameters that require a gradient are those to train. ValueError for adapters that fit no layer.
    """
    network = network_of(pipe)
    device = network.device
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    frozen = None
    if config.lora_rank:
        torch.manual_seed(config.seed)  # of the adapters' first layer; the second starts at zero, so theta starts at ref
        add_adapters(pipe, config.lora_rank)
    else:
        frozen = copy.deepcopy(network)
        network.requires_grad_(True)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    for compiled in [network, frozen] if frozen is not None else [network]:
        if config.compile:
            compiled.compile()
    if frozen is not None and config.reference_on_cpu:
        frozen.to("cpu")

    @contextmanager
    def reference(policy: Policy) -> Iterator[Policy]:
        if frozen is None:
            network.disable_lora()
            try:
                yield policy
            finally:
                network.enable_lora()
        else:
            frozen.to(device)
            try:
                yield dataclasses.replace(policy, denoise=dataclasses.replace(policy.denoise, network=frozen))
            finally:
                if config.reference_on_cpu:
                    frozen.to("cpu")

    return reference


def reference_mean(policy: Policy, reference: Reference) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """mu_ref(x_t, c) of single steps, without gradient, as a function of (x_t, i, cond): those of sampler.gaussian."""

    @torch.no_grad()
    def mean(x_t: Tensor, i: Tensor, cond: Condition) -> Tensor:
        with reference(policy) as pi_ref:
            return gaussian(pi_ref, x_t, i, cond)[0]

    return mean


def add_adapters(pipe: DiffusionPipeline, rank: int) -> None:
    """To the attention layers; those of texts beside pictures (add_, to_add_) are transformers' alone. In fp32."""
    layers = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    network_of(pipe).add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    for parameter in trained_parameters(pipe).values():
        parameter.data = parameter.data.float()


def trained_parameters(pipe: DiffusionPipeline) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in network_of(pipe).named_parameters() if parameter.requires_grad}


def save_result(pipe: DiffusionPipeline, scheduler: Scheduler, run: Path) -> None:
    """run/pipeline for plain from_pretrained, adapters merged in; of adapters also run/lora for load_lora_weights. With its card.

    OSError if it cannot.
    """
    try:
        network = network_of(pipe)
        if getattr(network, "peft_config", None):
            pipe.save_lora_weights(run / "lora", **{f"{network_name(pipe)}_lora_layers": get_peft_model_state_dict(network)})
            network.fuse_lora()
            network.unload_lora()
        save_pipeline(pipe, scheduler, run / "pipeline")
        modelcard.write(run, run / "pipeline")
    except (OSError, SafetensorError) as error:
        whole = checkpoint.all_checkpoints(run)[-1]
        raise OSError(
            f"cannot save the result: {error}; {whole} is whole, and the same command saves the result again"
        ) from error


def open_model(name: str, base: str, device: torch.device, **held) -> DiffusionPipeline:
    """The pipeline of a run folder, of a checkpoint of a run, of adapters (on `base`), of a pipeline folder, or of a hub id.

    held: as in load_pipeline. ValueError if it is none of these, or is damaged.
    """
    folder = Path(name)
    if (folder / "metrics.jsonl").exists():  # a run: its result, or as far as it is
        adapters = read_run(folder)["lora_rank"] and checkpoint.all_checkpoints(folder)  # which merging into bf16 rounds
        result = folder / "pipeline"
        folder = result if result.exists() and not adapters else checkpoint.read_state(folder)["folder"]
    if (folder / "state.json").exists():
        settings = checkpoint.read_folder(folder)["config"]
        pipe = load_pipeline(settings["model"], device, **held)
        if settings["lora_rank"]:
            add_adapters(pipe, settings["lora_rank"])
        else:
            network_of(pipe).requires_grad_(True)
        checkpoint.load_weights(folder, trained_parameters(pipe))
        network_of(pipe).requires_grad_(False)
        if "method" not in settings:  # LaSRO's, which draws as the result does that it saves
            pipe.scheduler = consistency_scheduler(pipe, settings["num_steps"])
        return pipe
    file = folder / "pytorch_lora_weights.safetensors"
    if file.exists():
        pipe = load_pipeline(base, device, **held)
        try:
            pipe.load_lora_weights(folder, weight_name=file.name, use_safetensors=True)
        except Exception as error:  # the libraries raise many kinds
            raise ValueError(f"cannot load adapters from {folder} onto {base}: {first_line(error)}") from error
        return pipe
    return load_pipeline(str(folder) if folder.exists() else name, device, **held)
