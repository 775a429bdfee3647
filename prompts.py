"""Prompt sets by name or from a file, and the order in which training draws them."""

from pathlib import Path

import numpy as np

import toy

PROMPT_SETS = dict(toy.PROMPT_SETS)


def load_prompts(name: str) -> list[str]:
    """The prompts of a named set or of a text file with one prompt per line; stripped, without empty lines or repetitions.

    ValueError if there is no such set or file, or nothing in it.
    """
    if name in PROMPT_SETS:
        prompts = PROMPT_SETS[name]()
    elif Path(name).is_file():
        try:
            prompts = Path(name).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"prompt file {name!r} is not UTF-8: {error.reason} at byte {error.start}") from error
    else:
        raise ValueError(f"no prompt set or file {name!r}: use {', '.join(PROMPT_SETS)}, or the path of a .txt file")
    prompts = list(dict.fromkeys(prompt.strip() for prompt in prompts if prompt.strip()))
    if not prompts:
        raise ValueError(f"prompt file {name!r} has no prompts: write one per line")
    return prompts


def draw_prompts(prompts: list[str], number: int, epoch: int, seed: int) -> list[str]:
    """The `number` prompts of an epoch: the set is shuffled, dealt out, shuffled anew when used up, and so covered evenly.

    The order depends on (seed, epoch) alone: resuming, or another number of processes, continues the same one.
    """
    places = [divmod(place, len(prompts)) for place in range(epoch * number, (epoch + 1) * number)]
    orders = {dealt: np.random.default_rng((seed, dealt)).permutation(len(prompts)) for dealt in {d for d, _ in places}}
    return [prompts[orders[dealt][place]] for dealt, place in places]
