"""The embedded world: grammar, held-out combinations, scores, and the model's making."""

import collections
import functools
import json
import random

import pytest
import torch
from conftest import ROOT
from diffusers import LCMScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from benchmarks import card
from miniature import FLOW, TURBO, WEIGHTS, build, distil, rectify, world
from plumbing.pipeline import load_pipeline
from plumbing.prompts import load_prompts

RNG_SEED = 0


def pictures(prompts):
    return world.draw(prompts, random.Random(RNG_SEED))


def test_prompt_sets():
    train, small = load_prompts("toy-train"), load_prompts("toy-small")
    assert len(train) > 100_000 and len(small) == 45
    both_kinds = sum(len(world.scenes(paired, held)) for paired in (False, True) for held in (False, True))
    assert both_kinds == len(set(train)) + sum(len(world.scenes(paired, True)) for paired in (False, True))
    assert set(small) <= set(train)
    one, two, held = (load_prompts(f"toy-heldout{suffix}") for suffix in ("-one", "-two", ""))
    assert len(one) == len(two) == 128 and held[::2] == one and held[1::2] == two
    assert all("relation" in world.parse(p) for p in two) and not any("relation" in world.parse(p) for p in one)


def objects(prompt):
    """The (colour, shape, background) combinations of a prompt."""
    scene = world.parse(prompt)
    return {(scene["colour" + i], scene["shape" + i], scene["background"]) for i in "12" if "shape" + i in scene}


def test_held_out_combinations_occur_in_no_training():
    held = set().union(*map(objects, load_prompts("toy-heldout")))
    trained = set().union(*map(objects, load_prompts("toy-train")))
    captions = build.Captions(0)
    for _ in range(20):
        trained |= set().union(*map(objects, captions.batch()[0]))
    assert held and not held & trained
    assert len(trained) + len(held) == 8 * 7 * 5


def test_parse_reads_what_the_grammar_says():
    scene = world.parse("a small red ring above a blue cross on a white background")
    assert scene == dict(size1=0, colour1=0, shape1=4, relation=1, colour2=4, shape2=3, background=6)
    for wrong in (
        "a red cat on a blue background",
        "a red ring",
        "a red ring at the top left above a red ring on a blue background",
    ):
        with pytest.raises(ValueError, match="not in the toy grammar"):
            world.parse(wrong)


def test_drawn_pictures_score_high_and_noise_zero():
    for name in ("toy-heldout-one", "toy-heldout-two"):
        prompts = load_prompts(name)
        scores = world.alignment(pictures(prompts), prompts)
        assert scores.shape == (128,) and scores.mean() > 0.9 and scores.min() > 0.7
    generator = torch.Generator().manual_seed(0)
    assert world.alignment(torch.rand(8, 3, 32, 32, generator=generator), prompts[:8]).max() < 1e-6
    assert world.alignment(torch.full((8, 3, 32, 32), 0.5), prompts[:8]).max() < 1e-6


def test_wrong_attributes_cost_their_share():
    """Replacing one stated attribute by another costs about 1 / (number of stated attributes), whichever it is."""
    rng = random.Random(1)
    costs = collections.defaultdict(list)
    values = {"size": world.SIZES, "colour": list(world.COLOURS), "shape": world.SHAPES, "position": list(world.POSITIONS)}
    values |= {"background": list(world.COLOURS)}
    for _ in range(300):
        colour, background = rng.sample(values["colour"], 2)
        true = dict(size=rng.choice(world.SIZES), colour=colour, shape=rng.choice(world.SHAPES),
                    position=rng.choice(values["position"]), background=background)  # fmt: skip
        changed = rng.choice(list(true))
        false = true | {changed: rng.choice([v for v in values[changed] if v != true[changed]])}
        if false["colour"] == false["background"]:
            continue
        told, drawn = (f"a {s['size']} {s['colour']} {s['shape']} at the {s['position']} on a {s['background']} background"
                       for s in (true, false))  # fmt: skip
        costs[changed].append(1 - world.alignment(pictures([drawn]), [told]).item())
    assert len(costs) == 5
    for attribute, cost in costs.items():
        assert sum(cost) / len(cost) == pytest.approx(0.2, abs=0.03), attribute


def test_relation_and_order_matter():
    picture = pictures(["a red ring left of a blue cross on a white background"])
    scores = world.alignment(
        picture.expand(3, -1, -1, -1),
        ["a red ring left of a blue cross on a white background", "a blue cross left of a red ring on a white background",
         "a red ring above a blue cross on a white background"],
    )  # fmt: skip
    right, swapped, above = scores.tolist()
    assert right > 0.9
    assert above == pytest.approx(right - 1 / 6, abs=0.03)  # the relation alone is wrong
    assert swapped == pytest.approx(2 / 6, abs=0.03)  # only background and relation are right


def test_scores_do_not_depend_on_the_batch():
    prompts = load_prompts("toy-heldout")[120:136]
    images = pictures(prompts)
    alone = torch.cat([world.alignment(images[i : i + 1], prompts[i : i + 1]) for i in range(16)])
    torch.testing.assert_close(world.alignment(images, prompts), alone, rtol=0, atol=1e-5)


def test_colourfulness_by_hand():
    half = torch.zeros(1, 3, 2, 2)
    half[0, 0, 0] = 1  # two red pixels, two black ones: rg is 1, 1, 0, 0 and yb half of that
    spread, mean = (0.25 + 0.0625) ** 0.5, (0.25 + 0.0625) ** 0.5
    assert world.colourfulness(half, [""]).item() == pytest.approx(spread + 0.3 * mean)
    assert world.colourfulness(torch.full((1, 3, 4, 4), 0.7), [""]).item() == pytest.approx(0)


def test_every_word_is_one_token_and_every_prompt_fits():
    tokenizer = build.word_tokenizer()
    prompt = "a small purple triangle left of a large yellow square on a black background"
    assert len(tokenizer(prompt).input_ids) == len(prompt.split()) + 2
    longest = max(map(len, (prompt.split() for prompt in load_prompts("toy-train"))))
    assert longest + 2 <= build.MAX_TOKENS


STEPS = {"autoencoder": 3, "unet": 4, "decoder": 2}


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_an_interrupted_build_goes_on_to_the_same_stable_diffusion_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BATCH", 4)
    monkeypatch.setattr(build, "SAVE_EVERY", 1)
    build.build(tmp_path / "whole", seed=1, steps=STEPS)
    drawn, batch = [], build.Captions.batch

    def failing(self):
        drawn.append(self)
        if len(drawn) == 14:  # 3 of the autoencoder, 8 of its scaling factor, the third of the UNet
            raise KeyboardInterrupt
        return batch(self)

    with monkeypatch.context() as patch:
        patch.setattr(build.Captions, "batch", failing)
        with pytest.raises(KeyboardInterrupt):
            build.build(tmp_path / "parts", seed=1, steps=STEPS)
        assert not (tmp_path / "parts").exists()
        drawn.clear()
        build.build(tmp_path / "parts", seed=1, steps=STEPS)
    assert len(drawn) == 8 + 2 + 2  # the autoencoder's steps and two of the UNet's were not done again
    assert files(tmp_path / "parts").keys() == files(tmp_path / "whole").keys()
    assert len(files(tmp_path / "whole")) == 3
    assert all(files(tmp_path / "parts")[name] == content for name, content in files(tmp_path / "whole").items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]  # nothing unfinished is left

    with pytest.raises(FileExistsError, match="choose another folder"):
        build.build(tmp_path / "whole", seed=1, steps=STEPS)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert pipe.vae.config.scaling_factor not in (1.0, None)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    made = json.loads((tmp_path / "whole" / "made.json").read_text())
    assert made["steps"] == STEPS and made["seed"] == 1 and made["seconds"].keys() == STEPS.keys() and made["torch"]


def test_training_ends_at_the_average_and_doubts_captions_only_late(tmp_path, monkeypatch):
    """Of 8 steps the last two have captions of other pictures; the weights are the moving average, not the last ones."""
    monkeypatch.setattr(build, "BATCH", 8)
    pipe, captions, told, drawn = build.initial_pipeline(channels=(8, 16), width=16), build.Captions(0), [], []
    tokenizer, batch = build.word_tokenizer(), captions.batch

    def keeping():
        drawn.append(batch())
        return drawn[-1]

    monkeypatch.setattr(captions, "batch", keeping)

    def tell(prompts, **settings):
        told.append(prompts)
        return tokenizer(prompts, **settings)

    monkeypatch.setattr(build, "word_tokenizer", lambda: tell)
    build.train_unet(pipe, captions, 8, tmp_path)
    wrong = [
        sum(p not in ("", own) for p, own in zip(prompts, owns, strict=True))
        for prompts, (owns, _) in zip(told, drawn, strict=True)
    ]
    assert wrong[:6] == [0] * 6 and all(0 < number <= int(build.MISMATCHED * 8) for number in wrong[6:])
    state = torch.load(tmp_path / "unet.pt", weights_only=True)
    average, last = state["average"]["module.0.conv_out.weight"], state["weights"]["0.conv_out.weight"]
    assert torch.equal(pipe.unet.conv_out.weight, average) and not torch.equal(average, last)


CARD = json.loads((ROOT / "results" / "miniature.json").read_text())


@pytest.fixture(scope="module")
def miniature():
    return load_pipeline("toy", torch.device("cpu"))


def test_the_committed_weights_are_small_and_open_as_fp32(miniature):
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 4e6
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (WEIGHTS / part).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
        plain = getattr(StableDiffusionPipeline.from_pretrained(WEIGHTS), part)
        assert plain.dtype == getattr(miniature, part).dtype == torch.float32
    assert json.loads((WEIGHTS / "text_encoder" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("name", card.SETS)
def test_the_committed_weights_score_what_their_card_says(miniature, name):
    """At fixed noise, to .005, on every machine; longer trajectories are left to the card's own script."""
    prompts, said = card.SETS[name], CARD["figures"][name]
    for guidance, at in said["alignment"].items():
        w = float(guidance.split()[1])
        for steps, value in at.items():
            T = int(steps.split()[2])
            if (w, T) in ((1, 10), (2, 5), (3, 5)):
                assert card.alignment(miniature, prompts, w, T) == pytest.approx(value, abs=0.005), (guidance, steps)
    for what, value in card.limits(miniature, prompts).items():
        assert said[what] == pytest.approx(value, abs=0.005), what
    base = card.pictures(miniature, prompts, 1.0, 5, each=4)
    assert said["alignment"]["guidance 1"]["T = 5"] == pytest.approx(
        world.alignment(base[:, 0], prompts).mean().item(), abs=0.005
    )
    assert said["diversity"] == pytest.approx(card.diversity(base), abs=0.005)
    attributes = card.by_attribute(base[:, 0], prompts)
    assert said["attributes"] == pytest.approx(attributes, abs=0.005) and len(attributes) == 5


def test_the_miniature_is_as_it_should_be():
    """Its autoencoder shows what was drawn; it is half right without guidance, and better with some."""
    for said in CARD["figures"].values():
        assert said["autoencoder"] > 0.98 * said["drawn"]
        assert 0.4 < said["alignment"]["guidance 1"]["T = 5"] < 0.65 < said["alignment"]["guidance 3"]["T = 5"]
    made = json.loads((WEIGHTS / "made.json").read_text())
    assert made["steps"] == build.STEPS and made["batch"] == build.BATCH and made["seed"] == 0


def make_whole_and_interrupted(make, module, loss: str, folder, monkeypatch) -> None:
    """Makes of three steps, folder/whole at once and folder/parts in two goes, the first of which ends in its third loss."""
    monkeypatch.setattr(build, "BATCH", 4)
    monkeypatch.setattr(build, "SAVE_EVERY", 1)
    make(folder / "whole")
    losses, compute = [], getattr(module, loss)

    def failing(*arguments):
        losses.append(0)
        if len(losses) == 3:
            raise KeyboardInterrupt
        return compute(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, loss, failing)
        with pytest.raises(KeyboardInterrupt):
            make(folder / "parts")
        losses.clear()
        make(folder / "parts")
    assert len(losses) == 1 and sorted(path.name for path in folder.iterdir()) == ["parts", "whole"]


def test_an_interrupted_distillation_goes_on_to_the_same(tmp_path, monkeypatch):
    make = functools.partial(distil.distil, seed=1, steps=3, pictures=6)
    make_whole_and_interrupted(make, distil, "consistency_loss", tmp_path, monkeypatch)
    whole, parts, before = files(tmp_path / "whole"), files(tmp_path / "parts"), files(WEIGHTS)
    assert whole == parts and whole.keys() == before.keys()
    assert [name for name in before if before[name] != whole[name]] == ["unet/diffusion_pytorch_model.safetensors"]
    with pytest.raises(FileExistsError, match="choose another folder"):
        distil.distil(tmp_path / "whole")


def test_the_miniature_in_two_steps_scores_what_its_card_says():
    """It opens as it is, in half the space, and draws in one and in two steps what results/turbo.json says, to .005."""
    assert sum(path.stat().st_size for path in TURBO.rglob("*") if path.is_file()) < 4e6
    weights = load_file(TURBO / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    plain = StableDiffusionPipeline.from_pretrained(TURBO)
    assert plain.unet.dtype == torch.float32 and isinstance(plain.scheduler, LCMScheduler)
    pipe, found = load_pipeline("toy-turbo", torch.device("cpu")), json.loads((ROOT / "results" / "turbo.json").read_text())
    for name, prompts in card.SETS.items():
        for T, value in found["figures"][name]["alignment"]["guidance 1"].items():
            assert card.alignment(pipe, prompts, 1.0, int(T.split()[-1])) == pytest.approx(value, abs=0.005), (name, T)
    made = json.loads((TURBO / "made.json").read_text())
    assert [made[key] for key in ("steps", "pictures", "guidance_scale")] == [distil.STEPS, distil.PICTURES, distil.GUIDANCE]


def test_the_miniature_flow_scores_what_its_card_says():
    """It opens as it is, in half the space, draws what results/flow.json says, to .005, and is drawn by plain diffusers."""
    assert sum(path.stat().st_size for path in FLOW.rglob("*") if path.is_file()) < 4.5e6
    weights = load_file(FLOW / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    pipe = load_pipeline("toy-flow", torch.device("cpu"), max_sequence_length=0)
    found = json.loads((ROOT / "results" / "flow.json").read_text())["figures"]
    for name, prompts in card.SETS.items():
        for guidance, by_steps in found[name]["alignment"].items():
            value = card.alignment(pipe, prompts, float(guidance.split()[1]), 5)
            assert value == pytest.approx(by_steps["T = 5"], abs=0.005), (name, guidance)
    made = json.loads((FLOW / "made.json").read_text())
    assert [made[key] for key in ("steps", "batch", "seed")] == [rectify.STEPS, build.BATCH, 0]

    plain = StableDiffusion3Pipeline.from_pretrained(FLOW, text_encoder_3=None, tokenizer_3=None)
    plain.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    prompts = ["a large white circle at the centre on a black background"] * 4
    drawn = plain(
        prompts, height=32, width=32, num_inference_steps=10, guidance_scale=3.0, max_sequence_length=0, output_type="pt"
    )
    assert world.alignment(drawn.images, prompts).mean() > 0.8


def test_an_interrupted_flow_goes_on_to_the_same(tmp_path, monkeypatch):
    make = functools.partial(rectify.rectify, seed=1, steps=3)
    make_whole_and_interrupted(make, rectify.F, "mse_loss", tmp_path, monkeypatch)
    whole = files(tmp_path / "whole")
    assert whole == files(tmp_path / "parts") and whole.keys() == files(FLOW).keys()
