"""The embedded world: a grammar of captioned pictures, its prompt sets, and two black-box rewards on pictures.

    a [small|large] COLOUR SHAPE [at the POSITION] on a COLOUR background
    a [small|large] COLOUR SHAPE (left of|above) a [small|large] COLOUR SHAPE on a COLOUR background

With 8 colours, 5 shapes and 5 positions that is 181,440 prompts for pictures of 32x32 pixels. What a prompt does not state
(size, position) is free, and every object is shifted by up to one pixel. One in ten combinations of (colour, shape,
background) is held out: no prompt with it occurs in pretraining (build.py) or in any set for finetuning.
"""

import itertools
import math
import random
import re
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

PIXELS = 32
COLOURS = {
    "red": (0.9, 0.1, 0.1), "yellow": (1.0, 0.9, 0.1), "green": (0.1, 0.65, 0.15), "cyan": (0.2, 0.85, 0.95),
    "blue": (0.15, 0.2, 0.9), "purple": (0.65, 0.1, 0.7), "white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = ("small", "large")
POSITIONS = {"centre": (16, 16), "top left": (10, 10), "top right": (10, 22), "bottom left": (22, 10), "bottom right": (22, 22)}
RELATIONS = {"left of": ((16, 8), (16, 24)), "above": ((8, 16), (24, 16))}  # centres (y, x) of the first and second object
RADII_ALONE, RADII_PAIRED = (6.0, 9.5), (5.0, 7.0)  # pixels, of small and large
SHIFTS = tuple(itertools.product((-1, 0, 1), (-1, 0, 1)))
PALETTE = torch.tensor(list(COLOURS.values()))

_COLOUR, _SHAPE, _SIZE = "|".join(COLOURS), "|".join(SHAPES), "|".join(SIZES)
_PROMPT = re.compile(
    rf"a (?:(?P<size1>{_SIZE}) )?(?P<colour1>{_COLOUR}) (?P<shape1>{_SHAPE})"
    rf"(?: at the (?P<position>{'|'.join(POSITIONS)})"
    rf"| (?P<relation>{'|'.join(RELATIONS)}) a (?:(?P<size2>{_SIZE}) )?(?P<colour2>{_COLOUR}) (?P<shape2>{_SHAPE}))?"
    rf" on a (?P<background>{_COLOUR}) background"
)


# ---------------------------------------------------------------------------------------------------------- prompts


def parse(prompt: str) -> dict[str, int]:
    """The stated attributes as indices, e.g. {"colour1": 0, "shape1": 4, "background": 7}; ValueError if not in the grammar."""
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"{prompt!r} is not in the toy grammar, e.g. 'a small red circle at the centre on a blue background'")
    values = {"size": SIZES, "colour": COLOURS, "shape": SHAPES}
    values |= {"position": POSITIONS, "relation": RELATIONS, "background": COLOURS}
    return {k: list(values[k.rstrip("12")]).index(v) for k, v in match.groupdict().items() if v is not None}


def held_out(colour: str, shape: str, background: str) -> bool:
    """Whether this combination is kept from all training: one in ten, by a checksum."""
    return zlib.crc32(f"{colour} {shape} {background}".encode()) % 10 == 0


def scenes(paired: bool, held: bool) -> list[str]:
    """All one-object or two-object prompts with no held-out combination, or with held-out ones only, in grammar order."""
    prompts = []
    for background in COLOURS:
        objects = [
            f"{size}{colour} {shape}"
            for size, colour, shape in itertools.product(("", "small ", "large "), COLOURS, SHAPES)
            if colour != background and held_out(colour, shape, background) == held
        ]
        if paired:
            bodies = (f"a {a} {relation} a {b}" for a, relation, b in itertools.product(objects, RELATIONS, objects))
        else:
            bodies = (f"a {a}{place}" for a, place in itertools.product(objects, ("", *(f" at the {p}" for p in POSITIONS))))
        prompts += [f"{body} on a {background} background" for body in bodies]
    return prompts


def small_set() -> list[str]:
    """45 prompts that leave size and position free, like the paper's 45 "A painting of a <animal>"."""
    combinations = [c for c in itertools.product(COLOURS, SHAPES, COLOURS) if c[0] != c[2] and not held_out(*c)]
    return [f"a {c} {s} on a {b} background" for c, s, b in random.Random(0).sample(combinations, 45)]


def held_out_set(paired: bool) -> list[str]:
    """128 prompts of combinations never seen in any training."""
    return random.Random(0).sample(scenes(paired, held=True), 128)


PROMPT_SETS = {
    "toy-train": lambda: scenes(False, held=False) + scenes(True, held=False),
    "toy-small": small_set,
    "toy-heldout-one": lambda: held_out_set(False),
    "toy-heldout-two": lambda: held_out_set(True),
    "toy-heldout": lambda: [prompt for both in zip(held_out_set(False), held_out_set(True), strict=True) for prompt in both],
}


# --------------------------------------------------------------------------------------------------------- pictures


def _inside(shape: str, y: Tensor, x: Tensor) -> Tensor:
    """Whether the points (y, x) lie in the shape of radius 1 around the origin; y points down."""
    match shape:
        case "circle":
            return y**2 + x**2 <= 1
        case "square":
            return (y.abs() <= 0.88) & (x.abs() <= 0.88)
        case "triangle":
            return (y <= 0.8) & (2 * x.abs() - 1.1 <= y)
        case "cross":
            return (torch.minimum(y.abs(), x.abs()) <= 0.33) & (torch.maximum(y.abs(), x.abs()) <= 1)
        case "ring":
            return (y**2 + x**2 <= 1) & (y**2 + x**2 >= 0.25)


def _draw_masks() -> Tensor:
    """Coverage in [0, 1] of every possible object: (9 places, 5 shapes, 2 sizes, 9 shifts, 32, 32)."""
    grid = (torch.arange(PIXELS * 4) + 0.5) / 4  # 4 x 4 points per pixel
    places = [(centre, RADII_ALONE) for centre in POSITIONS.values()]
    places += [(centre, RADII_PAIRED) for pair in RELATIONS.values() for centre in pair]
    masks = [
        _inside(shape, ((grid - cy - dy) / radius)[:, None].expand(-1, len(grid)), ((grid - cx - dx) / radius)[None])
        for ((cy, cx), radii) in places for shape in SHAPES for radius in radii for dy, dx in SHIFTS
    ]  # fmt: skip
    masks = F.avg_pool2d(torch.stack(masks).float(), 4)
    return masks.view(len(places), len(SHAPES), len(SIZES), len(SHIFTS), PIXELS, PIXELS)


MASKS = _draw_masks()


def draw(prompts: list[str], rng: random.Random) -> Tensor:
    """One picture of each prompt, (B, 3, 32, 32) in [0, 1]; rng decides what the prompt leaves free."""
    images = []
    for scene in map(parse, prompts):
        image = PALETTE[scene["background"]][:, None, None].expand(3, PIXELS, PIXELS)
        if "relation" in scene:
            placed = [(5 + 2 * scene["relation"], "1"), (6 + 2 * scene["relation"], "2")]
        else:
            placed = [(scene.get("position", rng.randrange(5)), "1")]
        for place, which in placed:
            size = scene.get("size" + which, rng.randrange(2))
            mask = MASKS[place, scene["shape" + which], size, rng.randrange(len(SHIFTS))]
            image = torch.lerp(image, PALETTE[scene["colour" + which]][:, None, None], mask)
        images.append(image)
    return torch.stack(images)


# ---------------------------------------------------------------------------------------------------------- rewards

# The alignment score asks which scene drew the picture, by Bayes' rule over all scenes of the prompt's kind with the
# likelihood exp(-squared error / TEMPERATURE). A picture further than NO_SCENE (sum over pixels of the squared RGB distance)
# from all of them counts as none. Both were set so that drawn pictures score near 1, noise scores 0, and the score is smooth.
TEMPERATURE, NO_SCENE = 6.0, 70.0
_PAIRS = torch.cdist(PALETTE, PALETTE) ** 2  # squared distance between any two colours
_SEEN_THROUGH = (MASKS * (1 - MASKS)).sum((-2, -1))  # half-covered edge pixels, where object and background mix


def _object_evidence(images: Tensor) -> tuple[Tensor, Tensor]:
    """Log-evidence of every object, relative to plain background, and of every background alone.

    images (B, 3, 32, 32) -> (B, 9 places, 5 shapes, 2 sizes, 8 colours, 8 backgrounds) and (B, 8 backgrounds).
    For coverage m, |x - (m c + (1-m) b)|^2 = m |x-c|^2 + (1-m) |x-b|^2 - m (1-m) |c-b|^2: one matrix product serves all scenes.
    """
    distance = ((images[:, None] - PALETTE[None, :, :, None, None]) ** 2).sum(2).flatten(2)  # (B, colour, pixel)
    covered = torch.einsum("bcp,oszjp->boszjc", distance, MASKS.flatten(-2))
    error = covered[..., :, None] - covered[..., None, :] - _SEEN_THROUGH[..., None, None] * _PAIRS
    error = error.masked_fill(torch.eye(len(COLOURS), dtype=torch.bool), math.inf)  # an object has not its background's colour
    evidence = torch.logsumexp(-error / TEMPERATURE, 4) - math.log(len(SHIFTS))
    return evidence, -distance.sum(-1) / TEMPERATURE


def _posterior(log_evidence: Tensor) -> Tensor:
    """Probability of every scene, with "none of them" among the hypotheses; the same shape, sum at most 1."""
    none = log_evidence.new_tensor([-NO_SCENE / TEMPERATURE])
    return torch.cat([log_evidence.flatten(), none]).softmax(0)[:-1].view_as(log_evidence)


def attribute_scores(images: Tensor, prompts: list[str]) -> list[dict[str, float]]:
    """For each picture the probability of every attribute its prompt states, e.g. {"colour1": 0.98, "shape1": 0.4, ...}."""
    scores = []
    for scene, evidence, background in zip(map(parse, prompts), *_object_evidence(images.float().cpu()), strict=True):
        score = {}
        if "relation" in scene:
            first, second = evidence[[5, 7]], evidence[[6, 8]]  # (relation, shape, size, colour, background)
            total = [half.flatten(1, 3).logsumexp(1) for half in (first, second)]  # (relation, background)
            layout = _posterior(total[0] + total[1] + background)
            score["relation"] = layout[scene["relation"]].sum()
            score["background"] = layout[:, scene["background"]].sum()
            objects = [((h - t[:, None, None, None]).exp() * layout[:, None, None, None]).sum((0, 4))
                       for h, t in zip((first, second), total, strict=True)]  # fmt: skip
        else:
            one = _posterior(evidence[:5] + background)  # (position, shape, size, colour, background)
            score["background"] = one[..., scene["background"]].sum()
            if "position" in scene:
                score["position"] = one[scene["position"]].sum()
            objects = [one.sum((0, 4))]
        for which, joint in zip("12", objects, strict=False):  # (shape, size, colour)
            for name, axis in (("shape", 0), ("size", 1), ("colour", 2)):
                if name + which in scene:
                    score[name + which] = joint.select(axis, scene[name + which]).sum()
        scores.append({name: value.item() for name, value in score.items()})
    return scores


def alignment(images: Tensor, prompts: list[str]) -> Tensor:
    """Reward: the mean probability of the attributes that the prompt states, (B,) in [0, 1]; every attribute weighs the same."""
    return torch.tensor([sum(score.values()) / len(score) for score in attribute_scores(images, prompts)])


def colourfulness(images: Tensor, prompts: list[str]) -> Tensor:
    """Reward: Hasler and Suesstrunk's colourfulness (2003) of pictures in [0, 1], (B,); it ignores the prompt."""
    r, g, b = images.float().flatten(2).unbind(1)
    rg, yb = r - g, (r + g) / 2 - b
    spread = (rg.var(1, correction=0) + yb.var(1, correction=0)).sqrt()
    return spread + 0.3 * (rg.mean(1) ** 2 + yb.mean(1) ** 2).sqrt()
