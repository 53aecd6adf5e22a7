"""Reading COCO datasets: layouts, classes, pixels, masks, the ground truth of scoring."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import read_split
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import validate_setup
from rfdetr.console import UserError
from rfdetr.data.coco import read_dataset
from rfdetr.data.images import load_image
from rfdetr.data.layout import find_splits, read_json
from rfdetr.masks import rasterise

WIDTH, HEIGHT = 40, 30
CATEGORIES = [{"id": 7, "name": "vessel"}, {"id": 2, "name": "cell"}]


def annotation(number: int, image: int = 1, category: int = 2, **other) -> dict:
    x, y, width, height = box = other.get("bbox", [4, 5, 10, 8])
    right, bottom = x + width, y + height
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": 80,
        "iscrowd": 0,
        "segmentation": [[x, y, right, y, right, bottom, x, bottom]],
    } | other


def write_split(
    folder: Path, annotations: list[dict], images: int = 2, categories=CATEGORIES, **file_options
) -> Path:
    """A split of gray images named 1.png, 2.png ..., all different."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number in range(1, images + 1):
        shade = (len(folder.name) * 20 + number) % 256
        Image.new("RGB", (WIDTH, HEIGHT), (shade, number % 256, 0)).save(folder / f"{number}.png")
        entries.append(
            {"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT}
        )
    file = folder / "_annotations.coco.json"
    data = {"images": entries, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(data), **{"encoding": "utf-8"} | file_options)
    return file


def edit(file: Path, change) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    root = tmp_path / "my dataset é"
    write_split(root / "train", [annotation(1), annotation(2, category=7, bbox=[20, 5, 10, 8])])
    write_split(root / "valid", [annotation(1)], images=1)
    return root


def test_boxes_labels_and_negatives(dataset):
    train = read_dataset(dataset)["train"]
    assert train.class_names == ["cell", "vessel"] and train.category_ids == [2, 7]
    first, second = train.images
    assert first.boxes.dtype == np.float32 and first.boxes.tolist() == [
        [4, 5, 14, 13],
        [20, 5, 30, 13],
    ]
    assert first.labels.tolist() == [0, 1]
    assert (
        second.boxes.shape == (0, 4) and second.labels.dtype == np.int64 and second.path.is_file()
    )
    assert train.object_count == train.mask_count == 2 and train.warnings == []


def test_coco_layout_is_found_and_the_newest_year_wins(tmp_path):
    for name in ("train2014", "train2017", "val2017"):
        file = write_split(tmp_path / name, [annotation(1)])
        (tmp_path / "annotations").mkdir(exist_ok=True)
        file.rename(tmp_path / "annotations" / f"instances_{name}.json")
    splits = read_dataset(tmp_path)
    assert list(splits) == ["train", "valid"]
    assert splits["train"].images[0].path == tmp_path / "train2017" / "1.png"
    assert find_splits(tmp_path)["valid"] == (
        tmp_path / "annotations/instances_val2017.json",
        tmp_path / "val2017",
    )


@pytest.mark.parametrize("root", ["missing", "file", "empty"])
def test_no_dataset_is_a_user_error(tmp_path, root):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=root):
        read_dataset(tmp_path / root)


@pytest.mark.parametrize("ids", [(0, 1), (1, 2), (1000, 2**40), (-3, 5)])
def test_any_category_numbers_become_labels_in_ascending_order(tmp_path, ids):
    categories = [{"id": ids[1], "name": "b"}, {"id": ids[0], "name": "a"}]
    file = write_split(tmp_path / "train", [annotation(1, category=ids[1])], categories=categories)
    split = read_split(file, file.parent, "train")
    assert split.class_names == ["a", "b"] and split.category_ids == list(ids)
    assert split.images[0].labels.tolist() == [1]
    assert split.ground_truth["annotations"][0]["category_id"] == ids[1]


def placeholder(name: str) -> list[dict]:
    return [
        {"id": 0, "name": name, "supercategory": "none"},
        {"id": 2, "name": "cell", "supercategory": name},
        {"id": 7, "name": "vessel", "supercategory": name},
    ]


@pytest.mark.parametrize(
    "name", ["tissue", "cell"]
)  # tools name it after the project, which may be a class's name too
def test_placeholder_category_is_left_out(tmp_path, name):
    file = write_split(tmp_path / "train", [annotation(1)], categories=placeholder(name))
    split = read_split(file, file.parent, "train")
    assert (
        split.class_names == ["cell", "vessel"]
        and split.category_ids == [2, 7]
        and split.left_out == [name]
    )


def test_a_split_that_names_no_parents_changes_nothing_of_a_placeholder(tmp_path):
    write_split(tmp_path / "train", [annotation(1)], categories=placeholder("tissue"))
    bare = [{"id": 2, "name": "cell"}, {"id": 7, "name": "vessel"}]
    write_split(tmp_path / "valid", [annotation(1)], categories=bare)
    for split in read_dataset(tmp_path).values():
        assert split.class_names == ["cell", "vessel"] and split.left_out == ["tissue"]


def test_parent_with_annotations_and_class_named_like_its_own_parent_stay(tmp_path):
    file = write_split(
        tmp_path / "a/train", [annotation(1, category=0)], categories=placeholder("tissue")
    )
    assert read_split(file, file.parent, "train").class_names == ["tissue", "cell", "vessel"]
    categories = [{"id": 2, "name": "cell", "supercategory": "cell"}, {"id": 7, "name": "vessel"}]
    file = write_split(tmp_path / "b/train", [annotation(1, category=7)], categories=categories)
    assert read_split(file, file.parent, "train").left_out == []


def test_labels_agree_between_splits_that_number_categories_differently(tmp_path):
    write_split(
        tmp_path / "train",
        [annotation(1), annotation(2, category=0)],
        categories=placeholder("tissue"),
    )
    write_split(
        tmp_path / "valid", [annotation(1, category=5)], categories=[{"id": 5, "name": "vessel"}]
    )
    valid = read_dataset(tmp_path)["valid"]
    assert valid.class_names == ["tissue", "cell", "vessel"] and valid.category_ids[2] == 5
    assert len(set(valid.category_ids)) == 3 and valid.images[0].labels.tolist() == [2]


def test_missing_valid_names_val_fraction_which_splits_by_name(tmp_path):
    annotations = [annotation(n, image=n) for n in range(1, 21)]
    file = write_split(tmp_path / "train", annotations, images=20)
    with pytest.raises(UserError, match=r"--val_fraction 0\.1"):
        read_dataset(tmp_path)
    with pytest.raises(UserError, match="val_fraction"):
        read_dataset(tmp_path, 1.5)
    splits = read_dataset(tmp_path, 0.25)
    train, valid = (
        {image.path.name for image in splits[name].images} for name in ("train", "valid")
    )
    assert len(valid) == 5 and len(train) == 15 and not train & valid
    ground_truth = splits["valid"].ground_truth
    assert {entry["file_name"] for entry in ground_truth["images"]} == valid and len(
        ground_truth["annotations"]
    ) == 5
    edit(file, lambda data: data["images"].reverse())
    assert {image.path.name for image in read_dataset(tmp_path, 0.25)["valid"].images} == valid


def test_the_parts_of_a_divided_train_split_are_checked_too(tmp_path):
    write_split(tmp_path / "train", [annotation(1, image=2)], images=20)
    with pytest.raises(UserError, match="without a usable object") as error:
        for fraction in (0.05, 0.9):  # the one object is in one part or the other
            read_dataset(tmp_path, fraction)
    assert "validate_setup.py" in str(error.value)


def test_dataset_of_one_image_keeps_it_for_training(tmp_path):
    write_split(tmp_path / "train", [annotation(1)], images=1)
    splits = read_dataset(tmp_path, 0.5)
    assert (
        len(splits["train"].images) == 1
        and len(splits["valid"].images) == 0
        and splits["valid"].warnings
    )


def jittered_results(truth: dict) -> list[dict]:
    rng = np.random.default_rng(0)
    results = []
    for entry in truth["annotations"]:
        bbox = (np.array(entry["bbox"], float) + rng.normal(0, 0.7, 4)).tolist()
        results.append(
            {key: entry[key] for key in ("image_id", "category_id")}
            | {"bbox": bbox, "score": rng.random()}
        )
    return results


def pycocotools_figures(truth: dict, results: list[dict]) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_ground_truth_scores_as_the_original_file_does(tmp_path):
    boxes = np.random.default_rng(1).uniform(2, 14, (40, 4)).round(2).tolist()
    annotations = [
        annotation(n, 1 + n % 4, (2, 7)[n % 2], bbox=b, area=b[2] * b[3], iscrowd=int(n == 9))
        for n, b in enumerate(boxes)
    ]
    # what training drops or clips counts in the scores all the same
    annotations += [
        annotation(50, bbox=[5, 5, 0, 0], area=0),
        annotation(51, bbox=[30, 20, 30, 30]),
    ]
    file = write_split(tmp_path / "train", annotations, images=4, categories=placeholder("tissue"))
    split = read_split(file, tmp_path / "train", "train")
    results = jittered_results(split.ground_truth)
    mine, original = (
        pycocotools_figures(truth, results)
        for truth in (split.ground_truth, json.loads(file.read_text()))
    )
    assert mine.tolist() == original.tolist() and 0 < mine[0] < 1
    annotations = [split.images.annotations(number) for number in range(len(split.images))]
    crowds = [sum(entry["iscrowd"] for entry in entries) for entries in annotations]
    assert crowds == [0, 1, 0, 0] and split.objects_per_image == [11, 9, 10, 10], (
        "a crowd region is no object to learn"
    )


def test_missing_area_is_computed_from_the_mask_else_the_box(tmp_path):
    half = [[4, 5, 14, 5, 4, 13]]
    annotations = [
        annotation(1, segmentation=half),
        annotation(2, bbox=[1, 1, 6, 7], segmentation=None),
    ]
    for entry in annotations:
        del entry["area"], entry["iscrowd"]
    file = write_split(tmp_path / "train", annotations)
    first, second = read_split(file, file.parent, "train").ground_truth["annotations"]
    assert first["area"] == pytest.approx(40, abs=6) and second["area"] == 42
    assert first["iscrowd"] == 0 and second["segmentation"] is None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_bom_and_crlf(tmp_path, encoding):
    file = write_split(tmp_path / "train", [annotation(1)], encoding=encoding, newline="\r\n")
    assert read_split(file, file.parent, "train").object_count == 1


@pytest.mark.parametrize(
    ("text", "position"),
    [
        (b"", "line 1, column 1"),
        (b"  \n", "line 2, column 1"),
        (b'{"images": [\n{"id": 1', "line 2, column 9"),
        (b"\xff\xd8\xff\xe0 a jpeg", "line 1, column 1"),
        (b'{\n"a": "\xe9"}', "line 2, column 7"),
        (b"[1, 2]", "line 1, column 1"),
        (b"[" * 100_000, "line 1, column 1"),
        (b"hello", "line 1, column 1"),
    ],
)
def test_broken_json_is_told_with_line_and_column(tmp_path, text, position):
    file = tmp_path / "x.json"
    file.write_bytes(text)
    with pytest.raises(UserError, match=position) as caught:
        read_json(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "../out.png",
        "a/../../out.png",
        "..\\out.png",
        "/etc/x.png",
        "C:\\x.png",
        "c:x.png",
        "\\\\host\\x.png",
        "\0",
    ],
)
def test_file_names_never_lead_outside(dataset, name):
    file = dataset / "train/_annotations.coco.json"
    Image.new("RGB", (WIDTH, HEIGHT)).save(dataset / "out.png")
    edit(file, lambda data: data["images"][0].update(file_name=name))
    with pytest.raises(UserError, match="file_name"):
        read_dataset(dataset)


def test_links_subfolders_and_backslashes_work(dataset):
    outside = dataset.parent / "elsewhere.png"
    (dataset / "train/1.png").rename(outside)
    try:
        (dataset / "train/1.png").symlink_to(outside)
    except OSError:
        pytest.skip("this system makes no symbolic links without a privilege")
    (dataset / "train/sub").mkdir()
    (dataset / "train/2.png").rename(dataset / "train/sub/2.png")
    edit(
        dataset / "train/_annotations.coco.json",
        lambda d: d["images"][1].update(file_name="sub\\2.png"),
    )
    train = read_dataset(dataset)["train"]
    assert [load_image(image).shape for image in train.images] == [(HEIGHT, WIDTH, 3)] * 2
    assert ["1 image behind symbolic links" in message for message in train.warnings] == [True]
    (dataset / "train/sub").rename(dataset.parent / "sub")
    (dataset / "train/sub").symlink_to(dataset.parent / "sub")  # a linked folder below the split's
    assert "2 images behind symbolic links" in read_dataset(dataset)["train"].warnings[0]


def save_turned(path: Path, orientation: int, size: tuple[int, int]) -> None:
    """A JPEG whose upper left corner, as stored, is white."""
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, quality=95)


@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (2, 2)), (3, (-3, -3)), (6, (2, -3)), (8, (-3, 2))]
)
def test_exif_is_applied_when_the_annotated_size_agrees(dataset, orientation, corner):
    stored = (HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT)
    save_turned(dataset / "train/1.jpg", orientation, stored)
    edit(
        dataset / "train/_annotations.coco.json", lambda d: d["images"][0].update(file_name="1.jpg")
    )
    record = read_dataset(dataset)["train"].images[0]
    pixels = load_image(record)
    assert pixels.shape == (HEIGHT, WIDTH, 3) and (record.width, record.height) == (WIDTH, HEIGHT)
    assert record.apply_exif == (orientation > 1) and pixels[corner].min() > 200


def test_exif_is_not_applied_when_the_annotated_size_is_the_stored_one(dataset):
    save_turned(dataset / "train/1.jpg", 6, (WIDTH, HEIGHT))
    edit(
        dataset / "train/_annotations.coco.json", lambda d: d["images"][0].update(file_name="1.jpg")
    )
    record = read_dataset(dataset)["train"].images[0]
    assert not record.apply_exif and load_image(record)[2, 2].min() > 200


def test_missing_sizes_come_from_the_file(dataset):
    edit(
        dataset / "train/_annotations.coco.json",
        lambda d: [d["images"][0].pop(side) for side in ("width", "height")],
    )
    record = read_dataset(dataset)["train"].images[0]
    assert (record.width, record.height) == (WIDTH, HEIGHT)


def unusual_images() -> dict[str, tuple[Image.Image, str]]:
    ramp = np.linspace(0, 255, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
    gray = Image.fromarray(ramp.astype(np.uint8))
    colour = Image.merge("RGB", [gray, gray, gray])
    return {
        "gray": (gray, "png"),
        "gray_alpha": (gray.convert("LA"), "png"),
        "16_bit": (Image.fromarray((ramp * 257).astype(np.uint16)), "png"),
        "16_bit_tiff": (Image.fromarray((ramp * 257).astype(np.uint16)), "tif"),
        "float": (Image.fromarray((ramp / 255).astype(np.float32)), "tif"),
        "rgba": (colour.convert("RGBA"), "png"),
        "cmyk": (colour.convert("CMYK"), "tif"),
        "palette": (gray.convert("P"), "png"),
        "gif": (gray.convert("P"), "gif"),
    }


@pytest.mark.parametrize("kind", unusual_images())
def test_every_kind_of_image_becomes_rgb(dataset, kind):
    image, suffix = unusual_images()[kind]
    options = (
        {"save_all": True, "append_images": [Image.new("P", image.size)]} if kind == "gif" else {}
    )
    image.save(dataset / f"train/x.{suffix}", **options)
    edit(
        dataset / "train/_annotations.coco.json",
        lambda d: d["images"][0].update(file_name=f"x.{suffix}"),
    )
    pixels = load_image(read_dataset(dataset)["train"].images[0])
    assert (
        pixels.dtype == np.uint8 and pixels.shape == (HEIGHT, WIDTH, 3) and pixels.flags.writeable
    )
    ramp = np.linspace(0, 255, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
    assert np.abs(pixels - ramp[:, :, None]).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (20_000, 20)])
def test_extreme_shapes(tmp_path, size):
    file = write_split(
        tmp_path / "train", [annotation(1, bbox=[0, 0, *size], area=1, segmentation=None)], images=1
    )
    Image.new("L", size, 9).save(tmp_path / "train/1.png")
    edit(file, lambda data: data["images"][0].update(width=size[0], height=size[1]))
    record = read_split(file, file.parent, "train").images[0]
    assert load_image(record).shape == (size[1], size[0], 3) and record.boxes.tolist() == [
        [0, 0, *size]
    ]


def test_damaged_image_names_the_file(dataset):
    record = read_dataset(dataset)["train"].images[0]
    record.path.write_bytes(record.path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"1\.png"):
        load_image(record)
    Image.new("RGB", (5, 5)).save(record.path)
    with pytest.raises(UserError, match="5x5"):
        load_image(record)


def disc() -> np.ndarray:
    y, x = np.mgrid[:60, :80]
    return ((x - 40) ** 2 + (y - 30) ** 2 < 20**2).astype(np.uint8)


def drawn(
    segmentation: list | dict, height: int = 60, width: int = 80, place: np.ndarray | None = None
) -> np.ndarray:
    """A segmentation of a 60x80 image, rasterised at another size, or where `place` takes it."""
    out = np.zeros((height, width), np.uint8)
    place = np.array([[width / 80, 0, 0], [0, height / 60, 0]]) if place is None else place
    rasterise(segmentation, 60, 80, place, out)
    return out


def test_all_segmentation_formats_give_the_same_mask():
    mask = disc()
    compressed = mask_utils.encode(np.asfortranarray(mask))
    runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=2, append=2))).tolist()
    runs = runs if mask[0, 0] == 0 else [0, *runs]
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    polygon = (
        np.stack([40.5 + 20 * np.cos(angle), 30.5 + 20 * np.sin(angle)], axis=1).ravel().tolist()
    )
    size = {"size": [60, 80]}
    assert np.array_equal(drawn(size | {"counts": runs}), mask)
    assert np.array_equal(drawn(size | {"counts": compressed["counts"].decode()}), mask)
    assert np.abs(drawn([polygon]).astype(int) - mask).sum() < 0.05 * mask.sum()


@pytest.mark.parametrize(("height", "width"), [(30, 40), (120, 160), (33, 91)])
def test_rasterise_at_another_size_keeps_place_and_share(height, width):
    mask = disc()
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    polygon = (
        np.stack([40.5 + 20 * np.cos(angle), 30.5 + 20 * np.sin(angle)], axis=1).ravel().tolist()
    )
    rle = {
        "size": [60, 80],
        "counts": mask_utils.encode(np.asfortranarray(mask))["counts"].decode(),
    }
    for segmentation in ([polygon], rle):
        scaled = drawn(segmentation, height, width)
        assert scaled.shape == (height, width) and scaled.dtype == np.uint8 and scaled.max() == 1
        assert scaled.mean() == pytest.approx(mask.mean(), rel=0.06)
        assert scaled[height // 2, width // 2] == 1 and scaled[:2].sum() == 0


def test_a_placed_polygon_is_drawn_as_on_the_whole_canvas():
    rng = np.random.default_rng(0)
    for _ in range(50):
        polygons = [
            (rng.uniform(-0.1, 1.1, (rng.integers(3, 9), 2)) * [80, 60]).ravel().tolist()
            for _ in range(2)
        ]
        place = np.array([[2, 0, -rng.uniform(0, 80)], [0, 3, -rng.uniform(0, 60)]])[
            :: rng.choice([1, -1])
        ]
        placed = [
            (np.reshape(p, (-1, 2)) @ place[:, :2].T + place[:, 2]).ravel().tolist()
            for p in polygons
        ]
        whole = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(placed, 90, 90)))
        assert np.abs(drawn(polygons, 90, 90, place).astype(int) - whole).sum() <= 1  # rounding


def test_a_valid_split_called_val_is_named(dataset):
    (dataset / "valid").rename(dataset / "val")
    with pytest.raises(UserError, match="no valid split, but val/: call that folder valid/"):
        read_dataset(dataset)
    with pytest.raises(UserError, match="no valid split, but val/") as error:
        validate_setup.main(["--dataset", str(dataset), "--device", "cpu", "--check_images", "0"])
    assert "--val_fraction" not in str(error.value)  # which would leave it aside
