"""Prompt sets, every kind of file, and the order of drawing."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from plumbing import prompts
from plumbing.prompts import draw_prompts, load_prompts

WANTED = ["a cat, sitting", "ein Bär"]
MESSY = ["a cat, sitting", "  ein Bär ", "", "a cat, sitting"]


def write(path, rows):
    match path.suffix:
        case ".txt":
            path.write_text("\n".join(rows), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        case ".csv":
            path.write_text("id,prompt\n" + "\n".join(f'1,"{row}"' for row in rows), encoding="utf-8")
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"id": range(len(rows)), "caption": rows}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file(tmp_path, suffix):
    assert load_prompts(str(write(tmp_path / f"mine{suffix}", MESSY))) == WANTED


@pytest.mark.parametrize("key", ["prompt", "caption"])
def test_json_objects_like_hpdv2(tmp_path, key):
    rows = [{"id": i, key: text, "raw_annotations": [{"rank": 1}]} for i, text in enumerate(MESSY)]
    assert load_prompts(str(write(tmp_path / "rows.json", rows))) == WANTED
    assert load_prompts(str(write(tmp_path / "rows.jsonl", rows))) == WANTED


def test_hub_sets_from_a_folder_of_the_same_layout(tmp_path, monkeypatch):
    for name, (data_set, file) in prompts.ON_THE_HUB.items():
        path = tmp_path / data_set / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, [f"{name} {i}" for i in range(3)])
        assert load_prompts(name, str(tmp_path)) == [f"{name} {i}" for i in range(3)]
    with pytest.raises(ValueError, match=r"'pickapic-test' needs .*parquet of the data set yuvalkirstain"):
        load_prompts("pickapic-test", str(tmp_path / "elsewhere"))

    def unreachable(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(prompts, "hf_hub_download", unreachable)
    with pytest.raises(ValueError, match=r"'hpdv2-photo' needs benchmark/photo.json of the data set zhwang/HPDv2: no route$"):
        load_prompts("hpdv2-photo")


def test_the_byte_order_mark_of_a_windows_editor_is_no_part_of_a_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\n", encoding="utf-8-sig")
    assert load_prompts(str(file)) == ["a cat", "a dog"]


def test_animals():
    animals = load_prompts("animals")
    assert len(animals) == 45 and animals[0] == "A painting of a cat" and animals[-1] == "A painting of a kangaroo"
    assert load_prompts("animals-bare")[:3] == ["cat", "dog", "horse"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.txt", b" \n\n", "has no prompts"),
        ("latin.txt", "café".encode("latin-1"), "utf-8"),
        ("broken.json", b'["a cat"', "delimiter"),
        ("object.json", b'{"prompts": []}', "must be a list"),
        ("missing.json", b'[{"text": "a cat"}]', "column prompt or caption"),
        ("missing.csv", b"text\na cat\n", "column prompt or caption"),
        ("numbers.jsonl", b"1\n2\n", "must be a list of prompts"),
        ("not.parquet", b"PAR?", "Parquet"),
        ("picture.png", b"", "must end in .txt, .json, .jsonl, .csv or .parquet"),
    ],
)
def test_wrong_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(str(tmp_path / name))
    assert name in str(error.value)
    with pytest.raises(ValueError, match=r"no prompt set or file 'nowhere\.txt': use animals"):
        load_prompts("nowhere.txt")


def test_order_covers_the_set_evenly_and_needs_no_state():
    some = [str(i) for i in range(10)]
    drawn = [prompt for epoch in range(5) for prompt in draw_prompts(some, 4, epoch, seed=3)]
    assert sorted(drawn) == sorted(some * 2)
    assert drawn[:10] != some and drawn[:10] != drawn[10:]
    assert draw_prompts(some, 4, 3, seed=3) == drawn[12:16] != draw_prompts(some, 4, 3, seed=4)
    assert len(draw_prompts(some, 25, 0, seed=0)) == 25
