"""Prompt sets by name or from a file, and the order in which training draws them."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from huggingface_hub import hf_hub_download

from miniature import world
from plumbing.errors import first_line

ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant
butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama camel bat
gorilla hedgehog kangaroo""".split()  # the common animals of DDPO

BUILT_IN = {
    "animals": lambda: [f"A painting of a {animal}" for animal in ANIMALS],  # Sec. 4.1
    "animals-bare": lambda: ANIMALS,  # Sec. 4.4
    **world.PROMPT_SETS,
}
ON_THE_HUB = {  # name: (data set, file); fetched once, without the pictures
    "hpdv2-train": ("ymhao/HPDv2", "train.json"),
    "hpdv2-animation": ("zhwang/HPDv2", "benchmark/anime.json"),
    "hpdv2-concept-art": ("zhwang/HPDv2", "benchmark/concept-art.json"),
    "hpdv2-painting": ("zhwang/HPDv2", "benchmark/paintings.json"),
    "hpdv2-photo": ("zhwang/HPDv2", "benchmark/photo.json"),
    "pickapic-train": ("yuvalkirstain/pickapic_v1_no_images", "data/train-00000-of-00001-b138676ed2d1f52a.parquet"),
    "pickapic-test": ("yuvalkirstain/pickapic_v1_no_images", "data/test_unique-00000-of-00001-73a51cbb6488571d.parquet"),
}
COLUMNS = ("prompt", "caption")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file as they stand: .txt (one per line), .json (a list of strings or objects), .jsonl, .csv, .parquet.

    Objects and tables have a column `prompt` or `caption`. ValueError if the file is not what its name says.
    """

    def column(row):  # called for every JSON object as it is parsed, so that only its prompt is kept
        return next((row[name] for name in COLUMNS if name in row), None)

    try:
        match path.suffix.lower():
            case ".txt":
                prompts = path.read_text(encoding="utf-8-sig").splitlines()
            case ".json":
                with path.open(encoding="utf-8-sig") as file:
                    prompts = json.load(file, object_hook=column)
            case ".jsonl":
                with path.open(encoding="utf-8-sig") as file:
                    prompts = [json.loads(line, object_hook=column) for line in file if line.strip()]
            case ".csv":
                with path.open(encoding="utf-8-sig", newline="") as file:
                    prompts = [column(row) for row in csv.DictReader(file)]
            case ".parquet":
                names = [name for name in COLUMNS if name in pyarrow.parquet.read_schema(path).names]
                prompts = pyarrow.parquet.read_table(path, columns=names[:1]).column(0).to_pylist() if names else [None]
            case _:
                raise ValueError("must end in .txt, .json, .jsonl, .csv or .parquet")
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"must be a list of prompts, or have a column {' or '.join(COLUMNS)} in every row")
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, pyarrow.ArrowInvalid, ValueError) as error:
        raise ValueError(f"prompt file {str(path)!r}: {error}") from error
    return prompts


def load_prompts(name: str, folder: str = "") -> list[str]:
    """The prompts of a named set or of a file; stripped, without empty lines or repetitions, in order.

    folder: where hub files lie as DATA_SET/FILE, instead of the hub. ValueError if there is no such set or file, or it is empty.
    """
    if name in BUILT_IN:
        prompts = BUILT_IN[name]()
    elif name in ON_THE_HUB:
        data_set, file = ON_THE_HUB[name]
        path = Path(folder, data_set, file)
        try:
            if not folder:
                path = Path(hf_hub_download(data_set, file, repo_type="dataset"))
        except Exception as error:  # the hub's client raises many kinds
            raise ValueError(f"prompt set {name!r} needs {file} of the data set {data_set}: {first_line(error)}") from error
        if not path.is_file():
            raise ValueError(f"prompt set {name!r} needs {file} of the data set {data_set}: there is no {path}")
        prompts = read_prompts(path)
    elif Path(name).is_file():
        prompts = read_prompts(Path(name))
    else:
        raise ValueError(f"no prompt set or file {name!r}: use {', '.join([*BUILT_IN, *ON_THE_HUB])}, or the path of a file")
    prompts = list(dict.fromkeys(prompt.strip() for prompt in prompts if prompt.strip()))
    if not prompts:
        raise ValueError(f"prompt file {name!r} has no prompts")
    return prompts


def draw_prompts(prompts: list[str], number: int, epoch: int, seed: int) -> list[str]:
    """The `number` prompts of an epoch.

    NOT IN PAPER: Algorithm 1 draws each from p(c). Here the set is shuffled, dealt out, and shuffled anew when it is used up, and
    so covered evenly.
    The order depends on (seed, epoch) alone: resuming, or another number of processes, continues the same one.
    """
    places = [divmod(place, len(prompts)) for place in range(epoch * number, (epoch + 1) * number)]
    orders = {dealt: np.random.default_rng((seed, dealt)).permutation(len(prompts)) for dealt in {d for d, _ in places}}
    return [prompts[orders[dealt][place]] for dealt, place in places]
