"""The embedded world: grammar, held-out combinations, scores, and the model's making."""

import collections
import random

import pytest
import torch
from diffusers import StableDiffusionPipeline

from miniature import build, world
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


def test_build_makes_a_stable_diffusion_folder_deterministically(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BATCH", 4)
    for name in ("first", "second"):
        build.build(tmp_path / name, seed=1, autoencoder_steps=2, unet_steps=2)
    first, second = (StableDiffusionPipeline.from_pretrained(tmp_path / name) for name in ("first", "second"))
    for part in ("unet", "vae", "text_encoder"):
        a, b = (getattr(pipe, part).state_dict() for pipe in (first, second))
        assert a and all(torch.equal(a[name], b[name]) for name in a), part
    assert first.vae.config.scaling_factor not in (1.0, None)
    assert first.scheduler.config.prediction_type == "v_prediction"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]  # nothing unfinished is left


def test_folder_is_named_after_the_code():
    assert build.toy_folder().name.startswith("toy-")
