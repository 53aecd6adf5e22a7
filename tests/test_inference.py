"""evaluate.py, predict.py and the Python door, on a detector with masks, trained a little."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import evaluate
import predict
from rfdetr.console import UserError
from rfdetr.detr import RFDETR, RFDETRNano
from rfdetr.inference.detections import DetectionRunner
from testkit.datasets import changed_copy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def odd_data(demo, tmp_path_factory) -> Path:
    """The demo with a crowd, an image without objects, images in another order, ids with holes."""

    def change(content: dict) -> None:
        new_id = {c["id"]: 10 * c["id"] + 7 for c in content["categories"]}
        for category in content["categories"]:
            category["id"] = new_id[category["id"]]
        empty, crowded = content["images"][0]["id"], content["images"][1]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != empty]
        for annotation in content["annotations"]:
            annotation["category_id"] = new_id[annotation["category_id"]]
        image = content["images"][1]
        crowd = next(a for a in content["annotations"] if a["image_id"] == crowded)
        region = np.zeros((image["height"], image["width"]), np.uint8, order="F")
        region[: image["height"] // 2] = 1
        counts, values = [], [0, *region.ravel(order="F").tolist()]
        last = 0
        for position in [i for i in range(1, len(values)) if values[i] != values[i - 1]] + [
            len(values)
        ]:
            counts.append(position - 1 - last)
            last = position - 1
        crowd |= {
            "iscrowd": 1,
            "segmentation": {"size": list(region.shape), "counts": counts},
            "bbox": [0, 0, image["width"], image["height"] // 2],
            "area": int(region.sum()),
        }
        content["images"].reverse()

    return changed_copy(demo, tmp_path_factory.mktemp("data") / "odd", change)


def test_plain_pycocotools_gives_the_same_figures_on_the_written_results(
    odd_data, stage2, call, tmp_path
):
    words = ["--checkpoint", stage2.folder / "best.pt", "--dataset", odd_data, "--split", "train"]
    call(evaluate.main, *words, "--results", "results", "--json", "scores.json")
    ours = json.loads((tmp_path / "scores.json").read_text())
    assert ours["bbox"]["mAP"] > 0.2
    truth = COCO(str(odd_data / "train/_annotations.coco.json"))
    names = ["mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large"]
    names += ["AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]
    for kind in ("bbox", "segm"):
        results = json.loads((tmp_path / "results" / f"{kind}.json").read_text())
        assert {r["category_id"] for r in results} <= set(truth.getCatIds())
        assert {r["image_id"] for r in results} == set(truth.getImgIds())
        theirs = COCOeval(truth, truth.loadRes(results), kind)
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
        for name, value in zip(names, theirs.stats):
            assert ours[kind][name] == (None if value == -1 else pytest.approx(value, abs=1e-6)), (
                kind,
                name,
            )


def test_evaluate_repeats_the_scores_of_the_run(demo, stage2, call):
    call(
        evaluate.main,
        "--checkpoint",
        stage2.folder / "best.pt",
        "--dataset",
        demo,
        "--json",
        "scores.json",
    )
    metrics = json.loads((stage2.folder / "metrics.json").read_text())
    best = metrics["best"]
    told = metrics["epochs"][best["epoch"] - 1][
        "valid" if best["weights"] == "regular" else "valid_ema"
    ]
    found = json.loads(Path("scores.json").read_text())
    assert found.keys() == told.keys()
    for kind in ("bbox", "segm"):
        assert found[kind]["mAP"] == pytest.approx(told[kind]["mAP"], abs=2e-3)


def test_evaluation_that_runs_out_of_memory_goes_on_with_smaller_batches(
    demo, stage2, call, capsys, monkeypatch
):
    given, original = [], DetectionRunner._detect

    def detect(self, model, images, *of_images):
        given.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, model, images, *of_images)

    def no_memory(*batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    flags = [
        "--checkpoint",
        stage2.folder / "best.pt",
        "--dataset",
        demo,
        "--batch",
        5,
        "--device",
        "cpu",
    ]
    call(evaluate.main, *flags, "--batch", 2, "--json", "plenty.json")
    monkeypatch.setattr(DetectionRunner, "_detect", detect)
    call(evaluate.main, *flags, "--json", "little.json")
    assert given == [5, 3, 2, 2, 1, 1]  # halved twice, which the second batch remembers
    assert "out of memory: detecting in 2 images at a time" in capsys.readouterr().out
    assert Path("little.json").read_text() == Path("plenty.json").read_text()

    monkeypatch.setattr(DetectionRunner, "_detect", no_memory)
    with pytest.raises(UserError, match="out of memory with a single image"):
        call(evaluate.main, *flags)


def test_a_split_that_is_not_there(odd_data, stage2, call, tmp_path):
    data = tmp_path / "no_test"
    shutil.copytree(odd_data, data, ignore=shutil.ignore_patterns("test"))
    with pytest.raises(UserError, match="no test split, it has train, valid"):
        call(
            evaluate.main,
            "--checkpoint",
            stage2.folder / "best.pt",
            "--dataset",
            data,
            "--split",
            "test",
        )


def test_a_test_split_alone_can_be_scored(demo, stage2, call, tmp_path, capsys):
    shutil.copytree(demo / "valid", tmp_path / "data" / "test")
    words = ["--checkpoint", stage2.folder / "best.pt"]
    call(evaluate.main, *words, "--dataset", demo, "--json", "valid.json")
    words += ["--dataset", tmp_path / "data"]
    call(evaluate.main, *words, "--split", "test", "--json", "test.json")
    assert json.loads(Path("test.json").read_text()) == json.loads(Path("valid.json").read_text())
    with pytest.raises(UserError, match="no valid split, it has test: choose with --split"):
        call(evaluate.main, *words)


def test_a_detector_without_masks_is_scored_on_boxes(demo, stage1, call, capsys):
    call(
        evaluate.main,
        "--checkpoint",
        stage1.folder / "best.pt",
        "--dataset",
        demo,
        "--json",
        "s.json",
    )
    assert json.loads(Path("s.json").read_text()).keys() == {"bbox"}


# ---------------------------------------------------------------- predict.py


@pytest.fixture
def photos(demo, tmp_path) -> Path:
    """Three images of the demo and one that is damaged."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    for path in (
        sorted((demo / "train").glob("*.jpg"))[:3] or sorted((demo / "train").glob("*.png"))[:3]
    ):
        shutil.copy(path, folder)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    return folder


def predicted(folder: str) -> list[dict]:
    return json.loads((Path(folder) / "predictions.json").read_text())


def test_predict_on_image_folder_and_glob_gives_the_same(photos, stage2, call, capsys):
    weights = ["--checkpoint", stage2.folder / "best.pt", "--threshold", "0.3"]
    call(predict.main, *weights, "--input", photos, "--output", "a")
    said = capsys.readouterr().out
    assert "broken.jpg" in said and "boxes alone" not in said  # warned, and went on
    images = sorted(p for p in photos.iterdir() if p.name != "broken.jpg")
    call(predict.main, *weights, "--input", *images, "--output", "b")
    call(predict.main, *weights, "--input", str(photos / "d*"), "--output", "c", "--batch", 1)
    a, b, c = predicted("a"), predicted("b"), predicted("c")
    for other in (b, c):
        assert a and [(r["file"], r["class"]) for r in a] == [
            (r["file"], r["class"]) for r in other
        ]
        np.testing.assert_allclose([r["bbox"] for r in a], [r["bbox"] for r in other], atol=1e-2)
        np.testing.assert_allclose([r["score"] for r in a], [r["score"] for r in other], atol=1e-4)
    assert sorted(p.stem for p in Path("a").glob("*.png")) == [p.stem for p in images]
    for record in a:
        with Image.open(record["file"]) as image:
            width, height = image.size
        x, y, w, h = record["bbox"]
        assert record["score"] >= 0.3 and w > 0 and h > 0 and x < width and y < height
        assert record["mask"]["size"] == [height, width]
        assert 0 <= record["mask_score"] <= record["score"]
        mx, my, mw, mh = mask_utils.toBbox(record["mask"])
        assert mw == 0 or (abs(mx + mw / 2 - x - w / 2) < w and abs(my + mh / 2 - y - h / 2) < h)


def test_a_higher_threshold_keeps_the_surer_ones(photos, stage2, call):
    for threshold in ("0.2", "0.5"):
        weights = ["--checkpoint", stage2.folder / "best.pt", "--threshold", threshold]
        call(predict.main, *weights, "--input", photos, "--output", threshold)
    low, high = predicted("0.2"), predicted("0.5")
    assert len(high) < len(low) and all(r["score"] >= 0.5 for r in high)
    assert [r["bbox"] for r in high] == [r["bbox"] for r in low if r["score"] >= 0.5]


def test_nothing_but_unreadable_images_is_an_error(photos, stage2, call):
    flags = ["--checkpoint", stage2.folder / "best.pt", "--output", "out"]
    with pytest.raises(UserError, match="the file could not be read"):
        call(predict.main, *flags, "--input", photos / "broken.jpg")
    assert not Path("out").exists()
    with pytest.raises(UserError, match="no images or videos"):
        call(predict.main, *flags, "--input", "nowhere/*.jpg")


def test_predict_on_a_video_numbers_the_frames(photos, stage2, call, tmp_path):
    frames = [cv2.imread(str(p)) for p in sorted(photos.iterdir()) if p.name != "broken.jpg"]
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(
        str(tmp_path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5.0, (width, height)
    )
    for frame in frames * 2:
        writer.write(frame)
    writer.release()
    weights = ["--checkpoint", stage2.folder / "best.pt", "--threshold", "0.2"]
    call(predict.main, *weights, "--input", "clip.mp4", "--output", "out", "--batch", 4)
    assert {record["frame"] for record in predicted("out")} == set(range(6))
    made = cv2.VideoCapture("out/clip.mp4")
    assert made.get(cv2.CAP_PROP_FRAME_COUNT) == 6 and made.get(cv2.CAP_PROP_FPS) == 5


def test_a_file_that_is_no_video_costs_no_result(photos, stage2, call, capsys, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    weights = ["--checkpoint", stage2.folder / "best.pt", "--threshold", "0.2"]
    with pytest.raises(SystemExit, match="1"):
        call(predict.main, *weights, "--input", photos, "bad.mp4", "--output", "out")
    assert predicted("out") and "bad.mp4 cannot be read" in capsys.readouterr().out


def test_names_that_differ_in_case_alone_are_one_file_on_some_disks():
    taken = {"img_1.png"}  # of the input IMG_1.PNG
    assert [predict.free_name("IMG_1", ".png", taken) for _ in range(2)] == [
        "IMG_1_2.png",
        "IMG_1_3.png",
    ]
    assert predict.free_name("img_1_2", ".png", taken) == "img_1_2_2.png"


def test_the_input_is_never_overwritten(photos, stage2, call):
    source = photos / "one.png"
    Image.open(next(photos.glob("demo*"))).save(source)
    before = source.read_bytes()
    try:
        call(
            predict.main,
            "--checkpoint",
            stage2.folder / "best.pt",
            "--input",
            source,
            "--output",
            photos,
        )
    except UserError:
        pass  # refusing is fine
    assert source.read_bytes() == before


# ---------------------------------------------------------------- from Python


@pytest.fixture(scope="module")
def model(stage2) -> RFDETR:
    return RFDETR.from_checkpoint(stage2.folder / "best.pt", device="cpu")


def test_predict_takes_paths_images_arrays_and_lists(model, photos):
    path = next(photos.glob("demo*"))
    image = Image.open(path).convert("RGB")
    results = [model.predict(x, threshold=0.3) for x in (path, str(path), image, np.asarray(image))]
    results += model.predict([path, image], threshold=0.3)
    assert len(results[0].boxes) > 0
    for prediction in results:
        assert prediction.boxes.shape == (len(prediction.scores), 4)
        assert len(prediction.masks) == len(prediction.names) == len(prediction.labels)
        np.testing.assert_allclose(prediction.boxes, results[0].boxes, atol=1e-3)
        assert prediction.names == results[0].names
        assert prediction.names == [model.class_names[label] for label in prediction.labels]
    assert (np.diff(results[0].scores) <= 0).all() and (results[0].scores >= 0.3).all()


def test_a_batch_equals_its_images(model, photos):
    paths = sorted(photos.glob("demo*"))
    for alone, together in zip([model.predict(p, 0.3) for p in paths], model.predict(paths, 0.3)):
        assert alone.names == together.names
        np.testing.assert_allclose(alone.boxes, together.boxes, atol=1e-2)
        np.testing.assert_allclose(alone.scores, together.scores, atol=1e-4)
        assert (alone.masks != together.masks).mean() < 1e-3


def test_the_module_gives_logits_and_boxes(model):
    with torch.inference_mode():
        outputs = model.model(torch.randn(2, 3, 64, 64))
    assert outputs["pred_logits"].shape == (2, 100, 4) and outputs["pred_boxes"].shape == (
        2,
        100,
        4,
    )


def test_bad_inputs_of_the_python_door(model, stage2, tmp_path):
    with pytest.raises(UserError, match="H, W, 3"):
        model.predict(np.zeros((8, 8, 2), np.uint8))
    with pytest.raises(UserError, match="cannot be read as an image"):
        model.predict(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match="is a tiny checkpoint, .*RFDETR.from_checkpoint\\("):
        RFDETRNano(checkpoint=stage2.folder / "best.pt", device="cpu")
    with pytest.raises(UserError, match="needs a checkpoint"):
        RFDETR()
    assert model.predict([]) == []
