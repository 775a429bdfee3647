"""The card of a result, by huggingface_hub.ModelCard: what was made of what, how, and what it must not be taken for.

Its text is modelcard.md.jinja. All that it says is read from the folder of the run.
"""

import json
import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

import miniature
from plumbing.record import read_metrics, read_run
from plumbing.reward_models import SOURCES

PAPERS = {
    "prdp": ("PRDP", "2402.08714"), "ddpo": ("DDPO", "2305.13301"), "dpok": ("DPOK", "2305.16381"),
    "d3po": ("D3PO", "2311.13231"), "grpo": ("Flow-GRPO", "2505.05470"), "lasro": ("LaSRO", "2411.15247"),
}  # fmt: skip
LICENCES = {
    **dict.fromkeys(miniature.PIPELINES, "mit"),
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}  # of models to start from; others are to be looked up
SETTINGS = (
    "epochs", "updates_per_epoch", "prompts_per_epoch", "images_per_prompt", "num_steps", "guidance_scale", "kl_weight",
    "clip_range", "learning_rate", "lora_rank", "autocast", "anchor_weight", "step_weights", "pretraining_epochs", "seed",
)  # fmt: skip


def write(run: Path, folder: Path) -> None:
    """Writes the card of a run as README.md into the folder of its result, beside the curve and pictures that it shows."""
    settings, lines = read_run(run), read_metrics(run)
    method, paper = PAPERS[settings.get("method", "lasro")]
    base, on_hub = settings["model"], settings["model"].count("/") == 1 and not Path(settings["model"]).exists()
    evaluated = [line for line in lines if line["eval_reward"] is not None]
    shown = {"curve": run / "reward.png"}
    if evaluated:
        shown |= {name: run / "samples" / f"epoch_{line['epoch']:06d}.png" for name, line in
                  (("before", evaluated[0]), ("after", evaluated[-1]))}  # fmt: skip
    shown = {name: file for name, file in shown.items() if file.exists()}
    opened_with, called_with = (
        "".join(f", {name}={value}" for name, value in some.items()) for some in arguments(settings, folder)
    )
    for name, file in shown.items():
        shutil.copy(file, folder / f"{name}.png")
    data = ModelCardData(
        license=LICENCES.get(base, "other"), license_name=None if base in LICENCES else "that-of-the-base-model",
        library_name="diffusers", pipeline_tag="text-to-image", base_model=base if on_hub else None,
        tags=["text-to-image", "reward-finetuning", method.lower()],
    )  # fmt: skip
    card = ModelCard.from_template(
        data, template_path=Path(__file__).with_name("modelcard.md.jinja"), method=method, paper=paper, base=base, run=run.name,
        base_licence=LICENCES.get(base), settings={name: settings[name] for name in SETTINGS if name in settings},
        rewards=rewards_of(settings), prompts=settings["prompts"], eval_prompts=settings["eval_prompts"],
        evaluated=evaluated, shown=list(shown), kl=lines[-1].get("kl_nats"), lora=settings.get("lora_rank"),
        opened_with=opened_with, called_with=called_with, place=settings.get("push_to_hub") or "FOLDER OR HUB ID OF THIS",
    )  # fmt: skip
    card.save(folder / "README.md")


def arguments(settings: dict, folder: Path) -> tuple[dict, dict]:
    """What plain diffusers must be told to open the result as it was trained, and to draw with it: by name."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]}
    told = {"num_inference_steps": settings["num_steps"], "guidance_scale": settings["guidance_scale"]}
    if index["scheduler"][1] == "DDIMScheduler":
        told["eta"] = settings["eta"]
    if size := settings.get("resolution"):
        told |= {"height": size, "width": size}
    if "transformer" in index and settings["max_sequence_length"]:
        told["max_sequence_length"] = settings["max_sequence_length"]
    return absent, told


def rewards_of(settings: dict) -> list[tuple[str, str, str]]:
    """Name, weight and licence of each part of the reward."""
    parts = [spec.partition("=")[::2] for spec in settings["reward"]]
    own = "of the program that trained, or the user's own"
    of = {"clipscore": SOURCES["clip"], **SOURCES}
    return [(name, weight or "1", of[name].licence if name in of else own) for name, weight in parts]
