"""validate_setup.py as a user runs it.

Every row 13-32 of the list of faults, --fix, --preview, --estimate, memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_validation import ANNOTATION_FAULTS, DATA_FAULTS, anything

import validate_setup
from rfdetr import console
from rfdetr.console import UserError
from rfdetr.data import checks, images, repair
from rfdetr.data import image_cache as seen
from rfdetr.data.coco import inspect_dataset, read_dataset
from rfdetr.data.demo import make_demo
from rfdetr.data.repair import fix_dataset
from rfdetr.device import Precision
from rfdetr.sizes import SIZES
from rfdetr.training import estimate
from testkit.datasets import HEIGHT, SQUARE, WIDTH, coco, rewrite, write
from testkit.forked import Forked, processes

FILE = "_annotations.coco.json"
ANN = {"id": 900, "image_id": 1, "category_id": 1, "bbox": [4, 15, 10, 8], "area": 80, "iscrowd": 0}


def doctor(*words: object, capsys) -> tuple[int, str, str, dict]:
    """(exit status, stdout, stderr, code -> count and places) of validate_setup.py."""
    report, status = Path("report.json"), 0
    report.unlink(missing_ok=True)
    try:
        console.run_script(validate_setup.main, [*map(str, words), "--json", str(report)])
    except SystemExit as left:
        status = left.code or 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err and len(said.err.strip().splitlines()) == (status == 2)
    content = (
        json.loads(report.read_text(encoding="utf-8")) if report.exists() else {"problems": []}
    )
    found = {problem["code"]: problem for problem in content["problems"]}
    assert all(f"[{problem['severity']}] {code}: " in said.out for code, problem in found.items())
    return status, said.out, said.err, found


def change(key: str, index: int = 0, **values):
    """Update one entry of train's file."""
    return lambda root: rewrite(root / "train" / FILE, lambda d: d[key][index].update(values))


def add(*entries: dict, key: str = "annotations"):
    return lambda root: rewrite(root / "train" / FILE, lambda d: d[key].extend(entries))


def text(content: str | bytes):
    raw = content.encode() if isinstance(content, str) else content
    return lambda root: (root / "train" / FILE).write_bytes(raw)


def together(*actions):
    return lambda root: [action(root) for action in actions]


def image(
    name: str = "1.png", size: tuple[int, int] = (WIDTH, HEIGHT), mode: str = "RGB", **options
):
    return lambda root: Image.new(mode, size).save(root / "train" / name, **options)


def both(table) -> None:
    """Change the content of both splits' files."""
    return lambda root: [rewrite(root / split / FILE, table) for split in ("train", "valid")]


def turned(root: Path) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(root / "train/1.jpg", exif=exif)
    change("images", file_name="1.jpg")(root)


def many_missing(root: Path) -> None:
    add(
        *({"id": n, "file_name": f"{n}.png", "width": 9, "height": 9} for n in range(100, 125)),
        key="images",
    )(root)


def linked(root: Path) -> None:
    (root / "train/1.png").rename(root.parent / "outside.png")
    try:
        (root / "train/1.png").symlink_to(root.parent / "outside.png")
    except OSError:
        pytest.skip("this system makes no symbolic links without a privilege")


def far_away(root: Path) -> None:
    folder = "train/" + "/".join(["Ordner mit Umlauten äöü"] * 12)
    (root / folder).mkdir(parents=True)
    name = f"{folder.removeprefix('train/')}/血管 1.png"
    (root / "train/1.png").rename(root / "train" / name)
    change("images", file_name=name)(root)
    raw = (root / "train" / FILE).read_bytes().replace(b", ", b",\r\n")
    (root / "train" / FILE).write_bytes(b"\xef\xbb\xbf" + raw)


def crowded(root: Path) -> None:
    add(
        *(
            {**ANN, "id": 1000 + n, "area": 20, "bbox": [n % 90 / 4, n / 100, 5, 5]}
            for n in range(2000)
        )
    )(root)


def odd_images(root: Path) -> None:
    ramp = Image.fromarray(np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 50)
    ramp.save(root / "train/1.png")
    image("2.png", mode="RGBA")(root)
    image("3.tif", mode="CMYK")(root)
    Image.new("P", (WIDTH, HEIGHT)).save(
        root / "train/4.gif", save_all=True, append_images=[ramp.convert("P")]
    )
    for index, name in ((2, "3.tif"), (3, "4.gif")):
        change("images", index, file_name=name)(root)


def extremes(root: Path) -> None:
    for index, size in enumerate([(1, 1), (1, 50), (20_000, 30)]):
        image(f"{index + 1}.png", size)(root)
        change("images", index, width=size[0], height=size[1])(root)
    boxes = [[0, 0, 1, 1], [0, 0, 1, 50], [4, 5, 19_000, 8], [4, 5, 10, 8], [0, 0, 1, 1]]
    for index, box in enumerate(boxes):
        change("annotations", index, bbox=box, area=box[2] * box[3], segmentation=[])(root)


def one_image(root: Path) -> None:
    (root / "valid" / FILE).unlink()
    rewrite(
        root / "train" / FILE,
        lambda d: d.update(images=d["images"][:1], annotations=d["annotations"][:1]),
    )


def without_masks(keep: int):
    def strip(data: dict) -> None:
        for entry in data["annotations"][keep:]:
            entry.pop("segmentation")

    return both(strip)


GOOD, BAD = 0, 2
RLE = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
TWIN = {"id": 77, "image_id": 1, "category_id": 1, "bbox": [4, 5, 10, 8], "area": 80, "iscrowd": 0}
ODD_NAMES = ("", "血" * 500)
ROWS = [
    ("12 corrupt", lambda root: (root / "train/1.png").write_bytes(b"no image"),
     BAD, {"IMG_CORRUPT"}),
    ("13 missing", many_missing, BAD, {"IMG_MISSING"}),
    ("14 truncated", text('{"images": [{"id": 1,\n'), BAD, {"JSON_INVALID"}),
    ("14 empty", text(""), BAD, {"JSON_INVALID"}),
    ("14 no json", text("a,b\n1,2\n"), BAD, {"JSON_INVALID"}),
    ("14 a list", text("[]"), BAD, {"JSON_INVALID"}),
    ("15 size", change("images", width=41), BAD, {"IMG_SIZE"}),
    ("15 exif", turned, GOOD, set()),
    ("16 partly", change("annotations", bbox=[-4, 5, 10, 8]), GOOD, {"ANN_BBOX_CLIPPED"}),
    ("16 wholly", change("annotations", bbox=[41, 5, 10, 8]), GOOD, {"ANN_BBOX_OUTSIDE"}),
    ("17 width", change("annotations", bbox=[4, 5, 0, 8]), GOOD, {"ANN_BBOX_EMPTY"}),
    ("17 negative", change("annotations", bbox=[4, 5, 10, -8]), GOOD, {"ANN_BBOX_EMPTY"}),
    ("17 area", change("annotations", area=0), GOOD, {"ANN_AREA_INVALID"}),
    ("18 nan", change("annotations", bbox=[math.nan, 5, 10, 8]), BAD, {"ANN_BBOX_NAN"}),
    ("18 infinite", change("annotations", bbox=[4, 5, math.inf, 8]), BAD, {"ANN_BBOX_NAN"}),
    ("18 absurd", change("annotations", bbox=[4, 5, 1e8, 8]), BAD, {"ANN_BBOX_NAN"}),
    ("18 polygon", change("annotations", segmentation=[[4, 5, 14, math.nan, 14, 13]]),
     BAD, {"ANN_SEG_NAN"}),
    ("19 short", change("annotations", segmentation=[[4, 5, 14, 5]]),
     GOOD, {"ANN_POLYGON_SHORT", "ANN_NO_MASK"}),
    ("19 odd", change("annotations", segmentation=[SQUARE[0][:7]]),
     GOOD, {"ANN_POLYGON_ODD", "ANN_NO_MASK"}),
    ("19 empty", change("annotations", segmentation=[]), GOOD, {"ANN_NO_MASK"}),
    ("19 crossing", change("annotations", segmentation=[[4, 5, 14, 13, 14, 5, 4, 13]]),
     GOOD, set()),
    ("20 size", change("annotations", segmentation=RLE | {"size": [9, 9]}), BAD, {"ANN_RLE_SIZE"}),
    ("20 sum", change("annotations", segmentation=RLE | {"counts": [7]}), BAD, {"ANN_RLE_COUNTS"}),
    ("20 type", change("annotations", segmentation=RLE | {"counts": 7.5}), BAD, {"ANN_RLE_TYPE"}),
    ("21 images", change("images", 1, id=1), BAD, {"IMG_ID_DUPLICATE", "ANN_IMAGE_UNKNOWN"}),
    ("21 annotations", add(ANN | {"id": 1}), BAD, {"ANN_ID_DUPLICATE"}),
    ("21 identical", add(TWIN | {"segmentation": SQUARE}), GOOD, {"ANN_DUPLICATE"}),
    ("22 zero", both(lambda d: _renumber(d, {1: 0, 2: 1})), GOOD, set()),
    ("22 huge", both(lambda d: _renumber(d, {1: 2**40, 2: 7})), GOOD, set()),
    ("22 text", both(lambda d: _renumber(d, {1: "1", 2: "2"})),
     BAD, {"CAT_ID_TYPE", "ANN_CATEGORY_TYPE"}),
    ("22 nameless", both(lambda d: d["categories"][0].pop("name")),
     BAD, {"CAT_INVALID"}),
    ("23 twice", both(lambda d: d["categories"][1].update(name="cell")),
     BAD, {"CAT_NAME_DUPLICATE"}),
    ("23 any", both(lambda d: [c.update(name=n) for c, n in zip(d["categories"], ODD_NAMES)]),
     GOOD, set()),
    ("24 placeholder", both(lambda d: _placeholder(d)), GOOD, set()),
    ("25 image", change("annotations", image_id=99), BAD, {"ANN_IMAGE_UNKNOWN"}),
    ("25 category", change("annotations", category_id=99), BAD, {"ANN_CATEGORY_UNKNOWN"}),
    *((f"26 {name}", change("images", file_name=name), BAD, {"IMG_PATH"})
      for name in ("../1.png", "/etc/1.png", "\\\\host\\1.png", "C:\\1.png")),
    ("26 link", linked, GOOD, {"IMG_LINK"}),
    ("27 paths", far_away, GOOD, set()),
    ("28 kinds", odd_images, GOOD, {"IMG_PAGES", "IMG_ALPHA"}),
    ("28 bomb", image(size=(20_000, 10_000), mode="1"), BAD, {"IMG_BOMB"}),
    ("29 train", lambda root: rewrite(root / "train" / FILE, lambda d: d.update(annotations=[])),
     BAD, {"SPLIT_EMPTY"}),
    ("29 valid", lambda root: write(root / "valid", coco(0) | {"annotations": []}),
     GOOD, {"SPLIT_EMPTY"}),
    ("29 negative", lambda root: rewrite(root / "train" / FILE, lambda d: d["annotations"].pop(1)),
     GOOD, set()),
    ("30 classes", lambda root: rewrite(root / "train" / FILE, lambda d: d["annotations"].pop()),
     GOOD, {"CLASS_NOT_IN_TRAIN"}),
    ("30 shared",
     lambda root: (root / "valid/2.png").write_bytes((root / "train/3.png").read_bytes()),
     GOOD, {"IMG_SHARED"}),
    ("30 queries", crowded, GOOD, {"IMG_MANY_OBJECTS", "ANN_NO_MASK"}),
    ("31 some", without_masks(1), GOOD, {"ANN_NO_MASK"}),
    ("31 all", without_masks(0), BAD, {"MASKS_NONE"}),
    ("32 shapes", extremes, GOOD, {"IMG_SHRUNK"}),
    ("32 one", one_image, GOOD, {"SPLIT_EMPTY", "CLASS_NOT_IN_TRAIN"}),
]  # fmt: skip


TOO_SMALL = {"CLASS_FEW", "CLASS_NOT_SCORED"}


def _renumber(data: dict, ids: dict) -> None:
    for entry in data["categories"]:
        entry["id"] = ids[entry["id"]]
    for entry in data["annotations"]:
        entry["category_id"] = ids[entry["category_id"]]


def _placeholder(data: dict) -> None:
    for entry in data["categories"]:
        entry["supercategory"] = "tissue"
    data["categories"].append({"id": 0, "name": "tissue"})


@pytest.mark.parametrize(("row", "spoil", "status", "codes"), ROWS, ids=[row[0] for row in ROWS])
def test_every_fault_of_a_dataset_is_told_by_its_code(
    dataset, tmp_path, monkeypatch, capsys, row, spoil, status, codes
):
    monkeypatch.chdir(tmp_path)
    spoil(dataset)
    before = contents(dataset)
    flags = ["--size", "tiny", "--need_masks", int(row == "31 all")] + ["--val_fraction", 0.2] * (
        row == "32 one"
    )
    left, said, error, found = doctor("--dataset", dataset, *flags, capsys=capsys)
    # beside what is told of any dataset as small as these
    assert (left, set(found) - TOO_SMALL) == (status, codes), (said, error)
    assert contents(dataset) == before
    if row == "13 missing":
        assert found["IMG_MISSING"]["count"] == 25 and len(found["IMG_MISSING"]["places"]) == 20
        assert "--json" not in said and "The first 20 places of each: report.json" in said
    if row == "14 truncated":
        assert "line 2, column 1" in error
    if row == "24 placeholder":
        assert "Left out (placeholder, parent of other classes): tissue" in said
    if status == BAD:
        assert all(code in error for code in codes if found[code]["severity"] == "error")


@pytest.mark.slow
def test_the_script_itself_leaves_with_2_and_one_paragraph(dataset, tmp_path):
    change("annotations", bbox=[math.nan, 5, 10, 8])(dataset)
    done = Forked(["validate_setup", "--dataset", dataset], cwd=tmp_path)
    assert (
        done.wait() == 2
        and "[error] ANN_BBOX_NAN: " in done.stdout
        and "annotation 1 of image 1" in done.stdout
    )
    told, left = done.stderr.splitlines()
    assert "ANN_BBOX_NAN" in told and left == "validate_setup left with 2"


def contents(root: Path) -> dict[Path, bytes]:
    return {
        path: hashlib.sha256(path.read_bytes()).digest()
        for path in root.rglob("*")
        if path.is_file()
    }


def codes_of(root: Path, **options) -> dict[str, str]:
    return {
        problem.code: problem.severity
        for problem in inspect_dataset(root, decode=True, **options)[1]
    }


HARMLESS = TOO_SMALL | {
    "IMG_LINK",
    "IMG_PAGES",
    "IMG_ALPHA",
    "ANN_NO_MASK",
    "IMG_SHARED",
    "IMG_TWICE",
    "CLASS_NOT_IN_TRAIN",
    "IMG_MANY_OBJECTS",
    "SPLIT_EMPTY",
}
ODD_PATHS = [row[0] for row in ROWS if row[3] == {"IMG_PATH"}]
ODD_PATHS += [f"table {n} {code}" for n, (_, code) in enumerate(DATA_FAULTS) if code == "IMG_PATH"]
FOR_THE_USER = {  # row -> the error that a guess would be needed for
    "15 size": "IMG_SIZE", "21 images": "IMG_ID_DUPLICATE", "22 nameless": "CAT_INVALID",
    "23 twice": "CAT_NAME_DUPLICATE", "table 4 IMG_ID_DUPLICATE": "IMG_ID_DUPLICATE",
    "29 train": "SPLIT_EMPTY", "32 one": "SPLIT_VALID_MISSING",
    **dict.fromkeys(ODD_PATHS, "IMG_PATH"),
}  # fmt: skip
FIXABLE = [row[:2] for row in ROWS if row[0][:2] != "14"]
FIXABLE += [
    (f"annotation {n}", change("annotations", **fault))
    for n, (fault, _, _) in enumerate(ANNOTATION_FAULTS)
]
FIXABLE += [
    (f"table {n} {code}", lambda root, spoil=spoil: rewrite(root / "train" / FILE, spoil))
    for n, (spoil, code) in enumerate(DATA_FAULTS)
    if code not in ("CAT_INVALID", "CAT_NAME_DUPLICATE", "CAT_ID_DUPLICATE") and n > 1
]


@pytest.mark.parametrize(("row", "spoil"), FIXABLE, ids=[row for row, _ in FIXABLE])
def test_a_fixed_copy_is_sound_and_the_original_untouched(dataset, row, spoil):
    spoil(dataset)
    before = contents(dataset)
    faults = codes_of(dataset).keys() - HARMLESS
    done = fix_dataset(dataset, dataset.parent / "fixed", decode=True)
    left = codes_of(dataset.parent / "fixed")
    errors = {code for code, severity in left.items() if severity == "error"}
    assert (
        FOR_THE_USER[row] in errors
        if row in FOR_THE_USER
        else left.keys() <= HARMLESS and not errors
    )
    assert contents(dataset) == before
    assert bool(faults) <= (bool(done["train"]) or row in FOR_THE_USER), done


def test_a_fixed_copy_names_files_as_they_are_called(dataset):
    """On Linux a name in another case is another file; the image is not lost for that."""
    folder = dataset / "train"
    content = json.loads((folder / FILE).read_text())
    names = [entry["file_name"] for entry in content["images"]]
    (folder / names[0]).rename(folder / names[0].upper())
    content["images"][1]["file_name"] = f" {names[2].upper()}"  # that file is listed already
    (folder / FILE).write_text(json.dumps(content))
    done = fix_dataset(dataset, dataset.parent / "fixed", decode=True)["train"]
    assert done["IMG_MISSING: the name of the file that is there is written"] == 1
    assert done["IMG_MISSING: dropped"] == 1
    fixed = json.loads((dataset.parent / "fixed" / "train" / FILE).read_text())
    kept = {entry["file_name"] for entry in fixed["images"]}
    assert kept == {names[0].upper(), *names[2:]}


def test_a_fixed_copy_writes_names_with_slashes_and_says_so(dataset):
    folder = dataset / "train"
    (folder / "sub").mkdir()
    (folder / "1.png").rename(folder / "sub/1.png")
    change("images", file_name="sub\\1.png")(dataset)
    done = fix_dataset(dataset, dataset.parent / "fixed", decode=False)["train"]
    assert done == {"File names: written plainly, with /": 1}
    fixed = json.loads((dataset.parent / "fixed/train" / FILE).read_text())
    assert fixed["images"][0]["file_name"] == "sub/1.png"


@pytest.mark.parametrize(
    ("codes", "can"),
    [
        ({"ANN_CATEGORY_TYPE"}, True),
        ({"ANN_CATEGORY_TYPE", "CAT_INVALID"}, False),
        ({"ANN_CATEGORY_UNKNOWN", "CAT_ID_DUPLICATE"}, False),
        ({"ANN_CATEGORY_UNKNOWN", "CAT_INVALID", "ANN_DUPLICATE"}, True),
        ({"CAT_NAME_DUPLICATE"}, False),
    ],
)
def test_a_repair_is_advised_where_it_changes_something(codes, can):
    assert repair.can_repair(codes) == can


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("any") / "train", coco(4)).parent


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_in_the_file_only_what_needs_a_guess_is_left(folder, data):
    content = coco(4)
    for _ in range(data.draw(st.integers(1, 4))):
        table = data.draw(st.sampled_from(["images", "annotations", "categories"]))
        entry = data.draw(st.sampled_from(content[table]))
        key = data.draw(st.sampled_from([*entry, "supercategory"]))
        others = st.sampled_from(
            [other.get(key) for other in content[table]]
        )  # twice the same id, for one
        entry[key] = data.draw(anything | others)
    (folder / FILE).write_text(json.dumps(content), encoding="utf-8")
    repaired, _ = repair.clean(content, folder / FILE, folder, decode=False)
    left = checks.check_file(folder / FILE, folder, data=json.loads(json.dumps(repaired)))
    errors = {problem.code for problem in left.faults.problems() if problem.severity == "error"}
    # images of one id hide each other's faults
    if "IMG_ID_DUPLICATE" in errors:
        return
    guesses = {
        "IMG_ID_INVALID",
        "IMG_SIZE",
        "IMG_PATH",
        "ANN_IMAGE_UNKNOWN",
        "ANN_CATEGORY_UNKNOWN",
    }
    if "IMG_PATH" in errors:  # then no file tells the size
        guesses.add("IMG_SIZE_INVALID")
    unused = {
        "ANN_BBOX_EMPTY",
        "ANN_BBOX_OUTSIDE",
        "ANN_BBOX_CLIPPED",
        "ANN_DUPLICATE",
        "ANN_AREA_INVALID",
    }
    assert not {code for code in errors if not code.startswith("CAT_")} - guesses
    assert errors or not unused & {problem.code for problem in left.faults.problems()}


def test_crowd_regions_are_counted_beside_the_objects(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change("annotations", iscrowd=1)(dataset)
    status, said, _, _ = doctor("--dataset", dataset, "--size", "tiny", capsys=capsys)
    assert status == 0 and "4 objects" in said
    assert said.count("and 1 crowd region (iscrowd), which training and scores ignore") == 1
    splits = json.loads(Path("report.json").read_text())["splits"]
    assert [splits[name]["crowds"] for name in ("train", "valid")] == [1, 0]


def test_fix_keeps_all_the_rest_and_says_what_it_did(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    extra = {"info": {"year": 2026}, "licenses": [{"id": 1}], "more": [math.inf]}
    rewrite(dataset / "train" / FILE, lambda data: data.update(extra))
    change("annotations", bbox=[-4, 5, 10, 8], note="mine")(dataset)
    change("annotations", 1, area="80")(dataset)
    change("annotations", 2, id=1)(dataset)
    add(ANN | {"bbox": [math.nan] * 4}, ANN | {"id": 901, "iscrowd": "1"})(dataset)
    (dataset / "train/4.png").unlink()
    status, said, _, found = doctor(
        "--dataset", dataset, "--fix", "my copy", "--size", "tiny", capsys=capsys
    )
    assert status == 0 and set(found) <= HARMLESS
    for what in ("ANN_BBOX_CLIPPED: clipped", "ANN_AREA_INVALID: computed",
                 "ANN_ID_DUPLICATE: renumbered", "ANN_BBOX_NAN: dropped", "IMG_MISSING: dropped",
                 "Annotations of dropped images: dropped",
                 "ANN_CROWD_INVALID: written as a number"):  # fmt: skip
        assert f"        1  {what}" in said
    assert "Next: python train_detector_stage1.py --size tiny --dataset 'my copy'" in said
    data = json.loads(Path("my copy/train", FILE).read_text(encoding="utf-8"))
    assert {key: data[key] for key in extra} == extra and len(data["images"]) == 3
    first = data["annotations"][0]
    assert (
        first["bbox"] == [0, 5, 6, 8]
        and first["note"] == "mine"
        and first["segmentation"] == SQUARE
    )
    assert data["annotations"][1]["area"] == 80 and data["annotations"][2]["id"] == 902
    assert [Path("my copy/train", f"{n}.png").read_bytes() for n in (1, 2, 3)] == [
        (dataset / f"train/{n}.png").read_bytes() for n in (1, 2, 3)
    ]
    train = read_dataset(tmp_path / "my copy")["train"]
    assert train.object_count == 4 and len(train.images) == 3


def test_a_preview_that_is_no_picture_is_refused_and_leaves_nothing(
    dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    status, _, error, _ = doctor(
        "--dataset", dataset, "--preview", tmp_path / "x.txt", capsys=capsys
    )
    assert status == 2 and "x.txt: a picture ends in .webp, .png, .jpg, .jpeg" in error
    assert not (tmp_path / "x.txt").exists()


def test_without_valid_the_error_is_said_once_with_the_command(
    dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(dataset / "valid")
    flags = ["--dataset", dataset, "--size", "tiny", "--resolution", 64]
    status, output, error, _ = doctor(*flags, capsys=capsys)
    assert status == 2 and output.count("has no valid split") == 1
    assert error.startswith("error: there is no valid split")
    command = shlex.split(error.split("as one: python ")[1])
    assert command[0] == "validate_setup.py"
    assert doctor(*command[1:], capsys=capsys)[0] == 0


def test_without_train_nothing_is_said_of_dividing_what_is_not_there(
    dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(dataset / "valid")
    (dataset / "train").rename(dataset / "test")
    status, output, _, _ = doctor("--dataset", dataset, capsys=capsys)
    assert status == 2 and "has no train split, only test: training needs one" in output
    assert "has no valid split: --val_fraction 0.1 will split train/" in output


def test_fix_never_writes_over_anything(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = contents(dataset)
    for place in (dataset, dataset / "train", dataset / "train/1.png"):
        status, _, error, _ = doctor("--dataset", dataset, "--fix", place, capsys=capsys)
        assert status == 2 and "--fix" in error
    with pytest.raises(UserError, match="is a file in the dataset's folder"):
        validate_setup.main(["--dataset", str(dataset), "--preview", str(dataset / "train/1.png")])
    with pytest.raises(UserError, match="is a file in the dataset's folder"):
        validate_setup.main(["--dataset", str(dataset), "--json", str(dataset / "train" / FILE)])
    assert before == contents(dataset)
    shutil.copy(dataset / "train/1.png", dataset / "train/preview.webp")
    with pytest.raises(UserError, match="preview.webp is a file in the dataset's folder"):
        validate_setup.main(["--dataset", str(dataset), "--preview", str(dataset / "train")])
    (dataset / "train/preview.webp").unlink()
    text("{")(dataset)
    status, _, error, _ = doctor("--dataset", dataset, "--fix", "copy", capsys=capsys)
    assert status == 2 and "line 1, column 2" in error and not Path("copy").exists()
    assert before.keys() == contents(dataset).keys()


@pytest.mark.parametrize("form", [str, float])
def test_ids_in_another_form_are_written_as_numbers(dataset, tmp_path, form):
    before = json.loads((dataset / "train" / FILE).read_text())

    def change_ids(data: dict) -> None:
        for entry in data["categories"]:
            entry["id"] = form(entry["id"])
        for entry in data["annotations"]:
            entry["category_id"] = form(entry["category_id"])
            entry["image_id"] = form(entry["image_id"])
        if form is float:
            for entry in data["images"]:
                entry["id"] = form(entry["id"])

    rewrite(dataset / "train" / FILE, change_ids)
    fix_dataset(dataset, tmp_path / "fixed", decode=False)
    after = json.loads((tmp_path / "fixed/train" / FILE).read_text())
    assert after == before and type(after["images"][0]["id"]) is int


def test_a_number_and_its_text_are_never_taken_for_one_class(dataset, tmp_path):
    change("categories", 1, id="1")(dataset)
    change("annotations", 1, category_id="1")(dataset)
    fix_dataset(dataset, tmp_path / "fixed", decode=False)
    after = json.loads((tmp_path / "fixed/train" / FILE).read_text())
    assert [entry["id"] for entry in after["categories"]] == [1, "1"]
    assert after["annotations"][1]["category_id"] == "1"


def test_no_object_is_dropped_for_an_id_that_is_left_to_the_user(dataset, tmp_path):
    """Mended in the copy, too, the image has its objects."""
    change("images", 1, id=1)(dataset)
    objects = len(json.loads((dataset / "train" / FILE).read_text())["annotations"])
    fix_dataset(dataset, tmp_path / "fixed", decode=False)
    fixed = tmp_path / "fixed/train" / FILE
    content = json.loads(fixed.read_text())
    assert len(content["annotations"]) == objects
    content["images"][1]["id"] = 2
    fixed.write_text(json.dumps(content))
    assert not any(severity == "error" for severity in codes_of(tmp_path / "fixed").values())


@pytest.mark.parametrize("form", [str, float])
def test_images_of_one_id_are_left_to_the_user_in_whatever_form_it_is_used(dataset, tmp_path, form):
    change("images", 1, id=1)(dataset)
    used = form(1)
    rewrite(
        dataset / "train" / FILE,
        lambda data: [entry.update(image_id=used) for entry in data["annotations"]],
    )
    fix_dataset(dataset, tmp_path / "fixed", decode=False)
    after = json.loads((tmp_path / "fixed/train" / FILE).read_text())
    assert [entry["id"] for entry in after["images"][:2]] == [1, 1]


@pytest.mark.parametrize("form", [int, str, float])
def test_a_renamed_class_keeps_its_objects_in_whatever_form_its_id_is_used(dataset, tmp_path, form):
    before = json.loads((dataset / "train" / FILE).read_text())
    old, new = (entry["name"] for entry in before["categories"][:2])
    rewrite(
        dataset / "train" / FILE,
        lambda data: [
            entry.update(category_id=form(entry["category_id"])) for entry in data["annotations"]
        ],
    )
    fix_dataset(dataset, tmp_path / "fixed", decode=False, rename=[f"{old}={new}"])
    after = json.loads((tmp_path / "fixed/train" / FILE).read_text())
    assert len(after["annotations"]) == len(before["annotations"])
    assert len(after["categories"]) == 1
    kept_id = after["categories"][0]["id"]
    assert all(entry["category_id"] == kept_id for entry in after["annotations"])


def test_what_cannot_be_fixed_is_left_to_the_user(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change("images", width=41)(dataset)
    status, _, error, found = doctor("--dataset", dataset, "--fix", "copy", capsys=capsys)
    assert (
        status == 2
        and "IMG_SIZE" in found
        and "All errors (see above): IMG_SIZE. This is left to you" in error
        and f"mend it in {dataset}, and write another copy" in error
    )


@pytest.mark.parametrize("allowed", ["link", "copy"])
def test_where_symbolic_links_are_not_allowed_images_are_linked_hard_or_copied(
    dataset, monkeypatch, allowed
):
    def refuse(*_):
        raise OSError("not here")

    monkeypatch.setattr(repair.os, "symlink", refuse)
    if allowed == "copy":
        monkeypatch.setattr(repair.os, "link", refuse)
    fix_dataset(dataset, dataset.parent / "fixed", decode=False)
    copy = dataset.parent / "fixed/train/1.png"
    assert not copy.is_symlink() and copy.samefile(dataset / "train/1.png") == (allowed == "link")
    assert codes_of(dataset.parent / "fixed") == {}


def test_the_standard_coco_layout_is_fixed_too(tmp_path):
    for split in ("train", "val"):
        file = write(tmp_path / f"coco/{split}2017", coco(2))
        (tmp_path / "coco/annotations").mkdir(exist_ok=True)
        file.rename(tmp_path / f"coco/annotations/instances_{split}2017.json")
    fix_dataset(tmp_path / "coco", tmp_path / "fixed", decode=False)
    assert set(read_dataset(tmp_path / "fixed")) == {"train", "valid"}


def age(root: Path) -> None:
    """Files of yesterday: younger ones are looked at again."""
    for path in root.rglob("*.png"):
        os.utime(path, (time.time() - 86400,) * 2)


@pytest.fixture
def opened(monkeypatch, tmp_path) -> list[str]:
    """Names of the images that were opened; nothing is remembered at first."""
    names = []
    usual = Image.open

    def note(opened, **options):
        names.append(Path(getattr(opened, "name", opened)).name)
        return usual(opened, **options)

    monkeypatch.setenv("RFDETR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Image, "open", note)
    return names


def test_an_image_is_checked_once(dataset, opened):
    (dataset / "valid/1.png").write_bytes(b"no image")
    Image.new("RGB", (50, 50)).save(dataset / "train/4.png")
    (dataset / "valid/2.png").write_bytes((dataset / "train/3.png").read_bytes())
    age(dataset)
    first = inspect_dataset(dataset, decode=True)
    assert len(opened) == 6 and {"IMG_SHARED", "IMG_SIZE", "IMG_CORRUPT"} == {
        problem.code for problem in first[1]
    }
    again = inspect_dataset(dataset, decode=True)
    assert len(opened) == 6 and again[1] == first[1]
    assert [vars(r)["width"] for r in again[0]["train"].images] == [
        r.width for r in first[0]["train"].images
    ]
    inspect_dataset(dataset)  # training looks at the headers alone
    assert opened[6:] == ["1.png"]  # which may be sound where the pixels are not
    with Image.open(dataset / "train/2.png") as whole:
        pixels = whole.copy()
    opened.clear()
    pixels.save(dataset / "train/2.png")  # the same bytes, another time
    os.utime(dataset / "train/2.png", (time.time() + 3600,) * 2)
    inspect_dataset(dataset, decode=True)
    inspect_dataset(dataset, decode=True)
    assert opened == ["2.png", "2.png"]  # too young to be remembered
    os.utime(dataset / "train/2.png", (1, 1))
    rewrite(dataset / "train" / FILE, lambda data: data["images"][2].update(width=41))
    inspect_dataset(dataset, decode=True)
    assert sorted(opened[2:]) == ["2.png", "3.png"]


def test_a_file_name_is_judged_whatever_is_remembered(dataset, opened):
    age(dataset)
    inspect_dataset(dataset)
    change("images", file_name="../valid/1.png")(dataset)
    assert "IMG_PATH" in codes_of(dataset)


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "other"])
def test_a_damaged_memory_is_none(dataset, opened, tmp_path, damage):
    age(dataset)
    sound = inspect_dataset(dataset, decode=True)
    for file in (tmp_path / "cache/checks").iterdir():
        raw = file.read_bytes()
        flipped = raw.replace(b"decoded", b"dec0ded", 1)
        file.write_bytes(
            {"empty": b"", "half": raw[: len(raw) // 2], "flipped": flipped, "other": b"\xff\n[]"}[
                damage
            ]
        )
    opened.clear()
    assert inspect_dataset(dataset, decode=True)[1] == sound[1] and len(opened) == 6
    inspect_dataset(dataset, decode=True)
    assert len(opened) == 6


def test_checks_work_where_nothing_can_be_remembered(dataset, opened, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RFDETR_CACHE", str(tmp_path / "file"))
    age(dataset)
    assert codes_of(dataset) == codes_of(dataset) == {} and len(opened) == 12


def test_who_writes_last_leaves_a_whole_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("RFDETR_CACHE", str(tmp_path / "cache"))
    with seen.ImageCache(tmp_path) as one, seen.ImageCache(tmp_path) as other:
        one.put("a", (1, 2), ["x"])
        other.put("b", (1, 2), ["y"])
    last = seen.ImageCache(tmp_path)
    assert (
        last.get("a", (1, 2)) == ["x"]
        and last.get("a", (1, 3)) is None
        and last.get("b", None) is None
    )
    assert len(list((tmp_path / "cache/checks").iterdir())) == 1


def test_preview_shows_every_class(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rle = {"size": [HEIGHT, WIDTH], "counts": [90, 20, HEIGHT * WIDTH - 110]}
    change("annotations", 1, segmentation=rle)(dataset)
    change("annotations", 2, segmentation=None)(dataset)
    add({"id": 3, "name": "never"}, key="categories")(dataset)
    for path in ("sheet.png", "sheets"):
        assert (
            doctor("--dataset", dataset, "--size", "tiny", "--preview", path, capsys=capsys)[0] == 0
        )
    sheet = np.asarray(Image.open("sheet.png").convert("RGB")).astype(int)
    assert Image.open("sheets/preview.webp").size == sheet.shape[1::-1]
    rows = np.split(sheet, 3)
    drawn = [(abs(row[30:] - row[-1, -1]) > 40).any(axis=2).mean() for row in rows]
    assert (
        drawn[0] > 0.1 and 0 < drawn[1] < drawn[0] and drawn[2] == 0
    )  # four images have cells, one a vessel
    (dataset / "train/1.png").write_bytes(b"no image")
    assert doctor("--dataset", dataset, "--preview", "damaged.jpg", capsys=capsys)[0] == 2
    assert Path("damaged.jpg").exists()
    assert (
        "--preview"
        in doctor("--dataset", dataset, "--preview", dataset / "train/2.png/x.png", capsys=capsys)[
            2
        ]
    )


def test_small_objects_are_told_with_the_resolution_that_helps(
    dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = "--dataset", dataset, "--size", "tiny"
    both(lambda data: [entry.update(bbox=[4, 5, 2, 2]) for entry in data["annotations"]])(dataset)
    _, said, _, found = doctor(*flags, "--resolution", 64, capsys=capsys)
    assert found["ANN_SMALL"]["count"] == 5 and found["ANN_SMALL"]["places"][0].endswith(
        "image 1 (1.png): 3.7 px"
    )
    better = int(found["ANN_SMALL"]["message"].split("--resolution ")[1].split()[0])
    assert "(5 small, 0 medium, 0 large;" in said and 64 < better < 300
    assert "ANN_SMALL" not in doctor(*flags, "--resolution", better, capsys=capsys)[3]
    assert "ANN_SMALL" in doctor(*flags, "--resolution", better - 32, capsys=capsys)[3]


@pytest.mark.slow
def test_a_step_is_measured_and_the_other_sizes_follow(monkeypatch, dataset, tmp_path, capsys):
    seconds, before, peak = estimate.measure("tiny", 64, Precision(estimate.torch.device("cpu")))
    assert seconds > 0 and peak >= before
    steps = {"tiny": (0.2, 700.0, 800.0), "nano": (3.0, 700.0, 1900.0)}
    some = {name: SIZES[name] for name in ("tiny", "nano", "small", "large")}
    monkeypatch.setattr(estimate, "SIZES", some)
    monkeypatch.setattr(estimate, "measure_apart", lambda name, side, precision: steps[name])
    monkeypatch.chdir(tmp_path)
    status, said, _, _ = doctor("--dataset", dataset, "--estimate", 1, capsys=capsys)
    rows = {
        row["size"]: row
        for row in json.loads(Path("report.json").read_text(encoding="utf-8"))["estimate"]
    }
    assert status == 0 and rows.keys() == some.keys()
    assert said.count("  measured") == 2 and said.count("  from the measured ones") == len(rows) - 2
    assert {name for name in rows if rows[name]["measured"]} == {"tiny", "nano"}
    assert (
        rows["nano"]["memory_mb"]["1"]
        == 1900
        < rows["nano"]["memory_mb"]["4"]
        < rows["small"]["memory_mb"]["4"]
    )
    images = 16 * 20  # an epoch of few images has twenty steps of 4 x 4
    assert (
        rows["nano"]["epoch_s"]
        == 3.0 * images
        < rows["small"]["epoch_s"]
        < rows["large"]["epoch_s"]
    )
    assert rows["nano"]["parameters"] == 30_467_298


def die(*_) -> None:
    os._exit(9)


@pytest.mark.slow
def test_a_step_that_ends_its_process_ends_nothing_else(monkeypatch):
    monkeypatch.setattr(estimate, "measure", die)
    monkeypatch.setattr(estimate, "get_context", lambda kind: processes())
    with pytest.raises(UserError, match="nano at 384 px runs out of memory"):
        estimate.measure_apart("nano", 384, Precision(estimate.torch.device("cpu")))


def test_the_demo_needs_no_repair(tmp_path):
    make_demo(tmp_path / "demo", train=3, valid=2, test=1, size=64, seed=0)
    assert fix_dataset(tmp_path / "demo", tmp_path / "fixed", decode=True) == {
        "train": {},
        "valid": {},
        "test": {},
    }
