"""Annotations as columns, read piece by piece, and the index that later starts map."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rfdetr.data import checked_annotations, checks, flat, index, json_stream
from rfdetr.data import dataset as dataset_module
from rfdetr.data.checks import check_file
from rfdetr.data.coco import inspect_dataset, read_dataset
from rfdetr.data.flat import FlatAnnotations
from rfdetr.data.image_files import ImageEntry
from rfdetr.data.images import ORIENTATION
from rfdetr.data.json_stream import NotStreamable, stream_json
from rfdetr.data.layout import read_json
from rfdetr.data.records import CocoSplit

FILE = "_annotations.coco.json"
FIELDS = ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"]


@pytest.fixture
def dataset(demo, tmp_path, monkeypatch) -> Path:
    """The demo data, old enough and with indices for files of any size."""
    monkeypatch.setenv("RFDETR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "LEAST_BYTES", 0)
    root = tmp_path / "data"
    shutil.copytree(demo, root)
    for file in root.rglob("*.*"):
        os.utime(file, (1e9, 1e9))
    return root


def indices(root: Path) -> list[Path]:
    return sorted((root.parent / "cache" / "indices").glob("*"))


def plain(splits: dict[str, CocoSplit]) -> dict:
    """Everything that is known of splits, as plain values."""
    known = {}
    for name, split in splits.items():
        records = [vars(record) for record in split.images]
        values = [{k: getattr(v, "tolist", lambda v=v: v)() for k, v in r.items()} for r in records]
        others = {k: v for k, v in vars(split).items() if k != "images"}
        known[name] = [values, others, split.ground_truth, split.objects_per_class]
    return known


def rewrite(file: Path, change) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def inspected(root: Path) -> tuple[dict, list]:
    splits, problems = inspect_dataset(root)
    return plain(splits), problems


def spoil(data: dict) -> None:
    """Faults that are warnings, so that an index is kept."""
    first, second, third, fourth = data["annotations"][:4]
    first["bbox"][2] = 1e4
    second["segmentation"] = []
    third["area"] = -1
    third["iscrowd"] = 1
    fourth["segmentation"].append([1, 2, 3, 4])
    data["annotations"].append(data["annotations"][5] | {"id": 10**6})


@pytest.mark.parametrize("change", [lambda data: None, spoil])
def test_a_later_start_gives_what_the_first_one_gave(dataset, change):
    rewrite(dataset / "train" / FILE, change)
    first = inspected(dataset)
    assert len(indices(dataset)) == len(first[0])
    times = [file.stat().st_ino for file in indices(dataset)]
    assert inspected(dataset) == first
    assert [file.stat().st_ino for file in indices(dataset)] == times  # none was written anew
    assert read_dataset(dataset)["train"].images.columns.source[0] in map(str, indices(dataset))


def test_an_edited_annotation_file_is_read_anew(dataset):
    file = dataset / "train" / FILE
    before = inspected(dataset)[0]["train"]
    text = file.read_text(encoding="utf-8")
    status = file.stat()
    file.write_text(text.replace('"category_id": 1,', '"category_id": 2,', 1), encoding="utf-8")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert inspected(dataset)[0]["train"] != before


def test_a_changed_image_is_seen(dataset):
    record = read_dataset(dataset)["train"].images[0]
    record.path.write_bytes(b"no image")
    os.utime(record.path, (1e9, 1e9))
    assert "IMG_CORRUPT" in {problem.code for problem in inspect_dataset(dataset)[1]}
    record.path.unlink()
    assert "IMG_MISSING" in {problem.code for problem in inspect_dataset(dataset)[1]}


@pytest.mark.parametrize("place", [3, 40, 0.2, 0.5, 0.99])
def test_a_damaged_index_is_made_anew(dataset, place):
    first = inspected(dataset)
    for file in indices(dataset):
        raw = bytearray(file.read_bytes())
        at = place if isinstance(place, int) else int(place * len(raw))
        for damaged in (raw[:at], raw[:at] + bytes([raw[at] ^ 5]) + raw[at + 1 :]):
            file.write_bytes(damaged)
            assert inspected(dataset) == first


def test_without_a_place_for_an_index_nothing_is_lost(dataset, monkeypatch):
    first = inspected(dataset)
    no_folder = dataset / "train" / FILE
    monkeypatch.setenv("RFDETR_CACHE", str(no_folder))
    assert inspected(dataset) == first
    assert read_dataset(dataset)["train"].images.columns.source is None


def test_another_process_gets_the_place_of_the_index_not_the_data(dataset):
    split = read_dataset(dataset, val_fraction=0.3)["train"]
    sent = pickle.dumps(split)
    assert len(sent) < 4000 and split.images.columns.bytes > 20_000
    assert plain({"train": pickle.loads(sent)}) == plain({"train": split})
    Path(split.images.columns.source[0]).write_bytes(b"gone")
    with pytest.raises(ValueError):
        pickle.loads(sent)


def test_an_index_says_where_a_large_one_is(dataset, monkeypatch, capsys):
    monkeypatch.setattr(index, "LARGE", 0)
    read_dataset(dataset)
    out = capsys.readouterr().out
    assert all(str(file) in out for file in indices(dataset))


DOCUMENTS = [
    '{"images": [], "annotations": [], "categories": []}',
    ' {"info": {"a": [1]}, "n": -1.5e3, "t": true,\n"annotations" : [ {"id": 1, "s": "\\u00e4é"},\n'
    '{"id": 2}],"images":[{"id":1,"file_name":"é","more":2}]} \n',
    '{"annotations": [{"id": 1}], "annotations": [{"id": 2}, {"id": 3}]}',
]
OTHERS = ["", "[]", '{"a": tr ue}', '{"annotations": [1]}', '{"annotations": [{}],}', "{} {}"]


@pytest.mark.parametrize("text", DOCUMENTS)
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_file_read_in_pieces_is_what_json_reads(tmp_path, monkeypatch, text, block):
    monkeypatch.setattr("rfdetr.data.json_stream.BLOCK", block)
    file = tmp_path / "a.json"
    file.write_text(text, encoding="utf-8")
    data, sha256 = stream_json(file)
    whole = read_json(file)
    assert sha256 == index.file_sha256(file) and data.keys() == whole.keys()
    annotations = data.pop("annotations")
    entries = whole.pop("annotations")
    assert annotations.entries.read(range(len(annotations))) == entries
    assert np.array_equal(annotations.ids, FlatAnnotations.of(entries).ids)
    for entry in whole.get("images", []):
        entry.pop("more", None)
    assert data == whole


@pytest.mark.parametrize("text", OTHERS)
def test_what_is_no_plain_document_is_left_to_the_other_reader(tmp_path, text):
    file = tmp_path / "a.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(NotStreamable):
        stream_json(file)


ODD = [None, True, 0, -1, 1.0, 0.5, 1e8, 1e308, 10**400, math.nan, math.inf, "x", [], {}, [[]]]
ODD += [2**53, 1e-4, -0.0, 64.05, 64.3, -0.05, -0.3, [1, 2, 3, 4]]
ODD += [{"size": [64, 64], "counts": [4096]}, {"size": [64, 64], "counts": "PP4"}]


def odd_document(document: dict, seed: int) -> dict:
    """A COCO document with a few values that are wrong, or rare."""
    rng = random.Random(seed)
    data = json.loads(json.dumps(document))
    for _ in range(rng.choice([1, 2, 5])):
        entry = rng.choice(data["annotations"])
        key = rng.choice(["bbox", "segmentation", *FIELDS])
        value = entry.get(key)
        while isinstance(value, list) and value and rng.random() < 0.7:
            entry, key = value, rng.randrange(len(value))
            value = entry[key]
        entry[key] = rng.choice(ODD)
    twin = dict(rng.choice(data["annotations"]))
    if rng.random() < 0.5:
        data["annotations"].append(twin | rng.choice([{}, {"id": 10**6}, {"area": 5}]))
    return data


@pytest.mark.parametrize("seed", range(60))
def test_what_is_checked_at_once_is_what_is_checked_one_by_one(demo, monkeypatch, seed):
    document = json.loads((demo / "train" / FILE).read_text(encoding="utf-8"))
    monkeypatch.setattr(flat, "ROWS", random.Random(seed).choice([1, 3, 1 << 16]))

    def checked() -> tuple[list, list]:
        split = check_file("x.json", data=odd_document(document, seed))
        columns = split.columns
        entries = [columns.entry(i, 0, 64, 64) for i in range(len(columns.ids))]
        boxes = columns.clipped + 0.0  # -0.0 is 0.0
        return split.faults.problems(), [entries, boxes.tolist(), columns.first.tolist()]

    at_once = checked()

    def all_of_them(sound, extents, sizes, category_ids):
        return np.ones(len(sound.ids), dtype=bool)

    monkeypatch.setattr(checked_annotations, "is_doubtful", all_of_them)
    assert repr(checked()) == repr(at_once)  # as text: NaN is not equal to itself


RAW = ["NaN", "-Infinity", "1e400", "-1E400", "1e99999999999", "1e-400", "5e-324", "-0", "-0.0"]
RAW += ["9" * 400, "9" * 5000]
RAW += ["1E2", "1.", "01", "-", "+1", "tru", "", "0.30000000000000004", "123456789012345678.5e-17"]
RAW += ["9223372036854775808", "-9223372036854775809", "18446744073709551616"]
RAW += ['"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\ud83dx"', '"\\u0000"']
RAW += ['"\\u12"', '"\ud800"', '"\t"', '"\0"', '"\x7f"', '"\\/"', '"\\x"', "é\ufeff", "\xa01"]
RAW += ["1\f", "/**/1", "[1,]"]
RAW += ['"}, {"', '[{"a": 1}, {"b": []}]', '{"id": 1, "id": 2}', '1, "id": 7, "\\u0069d": 9']
RAW += [*("[" * deep + "]" * deep for deep in (450, 498, 499, 500, 501, 1000)), "[" * 5000]
WRITTEN = [{}, {"separators": (",", ":")}, {"indent": 2}, {"indent": 0, "ensure_ascii": False}]


def odd_text(document: dict, seed: int) -> str:
    """The text of a COCO document with a few words that few writers write, or none may."""
    rng = random.Random(seed)
    data = json.loads(json.dumps(document))
    data["annotations"] = rng.sample(data["annotations"], 8)
    data["annotations"][0]["note"] = "é}, {\ud800"
    for word in rng.sample(range(len(RAW)), rng.choice([0, 1, 1, 3])):
        entry = rng.choice(data[rng.choice(["annotations", "annotations", "images"])])
        field = rng.choice([*FIELDS, "file_name", "width", "note"])
        entry[field] = rng.choice([f"word {word}", [f"word {word}"] * 6])
    text = json.dumps(data, **rng.choice(WRITTEN))
    for word, raw in enumerate(RAW):
        text = text.replace(f'"word {word}"', raw)
    at = rng.randrange(len(text))
    broken = text[:at] + rng.choice(',:"{}[]0 x') + text[at + 1 :]
    text = broken if rng.random() < 0.3 else text.replace("}, {", "} ,{", rng.choice([0, 2]))
    return text if rng.random() < 0.95 else "\ufeff" + text


@pytest.mark.parametrize("seed", range(150))
def test_the_faster_parser_changes_nothing(demo, tmp_path, monkeypatch, seed):
    document = json.loads((demo / "train" / FILE).read_text(encoding="utf-8"))
    file = tmp_path / "a.json"
    file.write_bytes(odd_text(document, seed).encode("utf-8", "surrogatepass"))
    monkeypatch.setattr(json_stream, "BLOCK", random.Random(seed).choice([100, 1 << 20]))

    seen = []
    add = FlatAnnotations.add
    monkeypatch.setattr(
        FlatAnnotations, "add", lambda flat, entry: seen.append(repr(entry)) or add(flat, entry)
    )

    def checked() -> tuple[str, list[str]]:
        seen.clear()
        try:
            split = check_file(file, data=stream_json(file)[0])
        except NotStreamable:
            return "another reader's", seen.copy()
        columns = split.columns
        entries = [columns.entry(i, 0, 64, 64) for i in range(len(columns.ids))]
        known = [split.faults.problems(), split.listed, split.categories, entries]
        return repr([*known, columns.clipped.tolist(), columns.first.tolist()]), seen.copy()

    with_it = checked()
    monkeypatch.setattr(json_stream, "MOST_BRACKETS", -1)
    assert checked() == with_it


def test_most_entries_are_left_to_the_faster_parser(demo, monkeypatch):
    slow = []
    closed_value = json_stream.Window.closed_value
    monkeypatch.setattr(
        json_stream.Window, "closed_value", lambda window: slow.append(1) or closed_value(window)
    )
    data, _ = stream_json(demo / "train" / FILE)
    others = len(data["images"]) + 20  # keys, categories, the first and the last annotation
    assert len(data["annotations"]) > 50 and len(slow) < others


@pytest.mark.parametrize("wait", [-1, math.inf])  # a disk that is always slow, or never
def test_image_files_are_told_in_order_from_any_disk(demo, tmp_path, monkeypatch, wait):
    monkeypatch.setenv("RFDETR_CACHE", str(tmp_path))
    monkeypatch.setattr(checks, "MANY_HEADERS", 1)
    monkeypatch.setattr(checks, "UNTIL_NEXT_LOOK", 2)
    monkeypatch.setattr(checks, "LONG_WAIT", wait)
    names = sorted(file.name for file in (demo / "train").glob("*.png"))
    entries = {name: ImageEntry(name, name, 64, 64) for name in names}
    files = checks.inspect_images(entries, demo / "train", decode=False)
    assert [*files] == names
    assert [Path(file.path).name for file in files.values()] == names


def test_guesses_beyond_what_memory_is_for_are_not_kept(demo, monkeypatch):
    split = read_dataset(demo)["train"]
    images = [replace(split.images[i], segmentations=[]) for i in range(6)]
    for image in images:
        image.segmentations = [None] * len(image.labels)
    monkeypatch.setattr(dataset_module, "GUESSES_KEPT", 2 * len(images[0].labels))
    dataset = dataset_module.SplitDataset(replace(split, images=images), 64, None, True, guess=True)
    guesses = [dataset.segmentations(index) for index in range(len(images))]
    assert 0 in dataset.guessed
    assert sum(map(len, dataset.guessed.values())) <= dataset_module.GUESSES_KEPT
    assert [dataset.segmentations(index) for index in range(len(images))] == guesses


def test_another_exif_decision_makes_an_index_anew(dataset):
    record = read_dataset(dataset)["train"].images[0]
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    # a square: its size proves nothing
    Image.new("RGB", (record.width, record.height)).save(record.path, exif=exif)
    os.utime(record.path, (1e9, 1e9))
    for wanted in ("apply", "ignore", "apply"):
        image = read_dataset(dataset, exif=wanted)["train"].images[0]
        assert image.apply_exif == (wanted == "apply")
