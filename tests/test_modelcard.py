"""The card of a result says what its run's folder says."""

import json

from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from test_train import arguments, metrics

import train
from plumbing import modelcard


def test_a_result_has_a_card_with_what_was_measured(model_folder, tmp_path):
    run = tmp_path / "mine"
    train.main(arguments(model_folder, run, "--updates_per_epoch", "1", "--epochs", "2", "--eval_every", "1"))
    card, (start, _, end) = ModelCard.load(run / "pipeline" / "README.md"), metrics(run)
    assert card.data.library_name == "diffusers" and card.data.license == "other" and card.data.base_model is None
    assert "finetuned by PRDP ([arXiv 2402.08714]" in card.text and "the reward `toy-alignment`." in card.text
    assert f"| 0 | {start['eval_reward']:.4f} |" in card.text and f"| 2 | {end['eval_reward']:.4f} |" in card.text
    assert f"{end['kl_nats']:.3g} nats" in card.text and "Base model: see its own card." in card.text
    settings = json.loads((run / "config.json").read_text())
    assert all(f"| {name} | {settings[name]} |" in card.text for name in ("learning_rate", "num_steps", "kl_weight", "seed"))
    pictures = {"curve": "reward.png", "before": "samples/epoch_000000.png", "after": "samples/epoch_000002.png"}
    for name, source in pictures.items():
        assert f"({name}.png)" in card.text
        assert (run / "pipeline" / f"{name}.png").read_bytes() == (run / source).read_bytes()
    assert f"num_inference_steps={settings['num_steps']}, guidance_scale={settings['guidance_scale']}, eta=1.0)" in card.text
    told = f"On the prompts `{settings['eval_prompts']}`, one picture each"
    assert told in card.text and "load_lora" not in card.text
    assert StableDiffusionPipeline.from_pretrained(run / "pipeline").unet  # what stands beside it does no harm


def test_what_is_known_of_a_base_and_of_rewards_is_said(tmp_path):
    settings = {
        "method": "ddpo", "model": "CompVis/stable-diffusion-v1-4", "reward": ["hpsv2=2", "clipscore", "mine:score"],
        "prompts": "hpdv2-train", "eval_prompts": "", "num_steps": 50, "guidance_scale": 5.0, "resolution": 512, "lora_rank": 4,
        "max_sequence_length": 128,
    }  # fmt: skip
    index = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "transformer": [], "text_encoder_3": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "eval_reward": None, "kl_nats": None}) + "\n")
    modelcard.write(tmp_path, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "CompVis/stable-diffusion-v1-4" and card.data.license == "creativeml-openrail-m"
    assert "`hpsv2` (weight 2), `clipscore` (weight 1), `mine:score` (weight 1)." in card.text
    assert 'from_pretrained("FOLDER OR HUB ID OF THIS", text_encoder_3=None)' in card.text and "adapters of rank 4" in card.text
    assert "guidance_scale=5.0, height=512, width=512, max_sequence_length=128)" in card.text
    assert "Reward `clipscore`: MIT." in card.text
    assert "Reward `hpsv2`: Apache-2.0." in card.text and "Reward `mine:score`: of the program that trained, or the" in card.text
    assert "Not evaluated" in card.text and "nats" not in card.text and "![" not in card.text
