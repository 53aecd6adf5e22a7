"""Ids over frames: on made-up detections, in predict.py, and in what is drawn and written."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from pycocotools import mask as mask_api

import predict
from rfdetr.classes import assign_rows
from rfdetr.console import UserError
from rfdetr.inference import videos
from rfdetr.inference.batches import one_ahead
from rfdetr.inference.originals import Original, pages_of
from rfdetr.inference.prediction import Prediction
from rfdetr.inference.records import as_records
from rfdetr.inference.tracking import KEPT_FRAMES, UNSURE_SCORE, Tracker, lost_at_once, mask_iou
from rfdetr.inference.tracking import Shape as TrackedShape
from rfdetr.inference.visualise import DrawnObject, colour_number, draw
from testkit.moving import moving_scene, write_video

SIDE = 200  # pixels of a frame


def box_at(x: float, y: float, side: float = 20) -> list[float]:
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


def rle_of(box: list[float], round_mask: bool = False) -> dict:
    """The box as a mask, or the ellipse in it."""
    x0, y0, x1, y1 = box
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    if round_mask:
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        inside = ((columns - x) / (x1 - x0)) ** 2 + ((rows - y) / (y1 - y0)) ** 2 < 0.25
    else:
        inside = (columns > x0) & (columns < x1) & (rows > y0) & (rows < y1)
    return mask_api.encode(np.asfortranarray(inside.astype(np.uint8)))


def ids_of(tracker: Tracker, objects: dict, masks: bool = False) -> dict:
    """The next frame's tracks by object; objects: name -> (box, score, label)."""
    boxes = [box for box, _, _ in objects.values()]
    ids = tracker.update(
        np.array(boxes).reshape(-1, 4),
        np.array([score for _, score, _ in objects.values()]),
        np.array([label for _, _, label in objects.values()], dtype=int),
        [rle_of(box, round_mask=True) for box in boxes] if masks else None,
    )
    return dict(zip(objects, ids.tolist()))


# ---------------------------------------------------------------- association


@pytest.mark.parametrize("threshold", [7, -0.1, float("nan"), "0.5"])
def test_a_threshold_that_no_score_reaches_is_refused(threshold):
    with pytest.raises(UserError, match="threshold must be a number in 0..1"):
        Tracker(threshold)


@pytest.mark.parametrize("masks", [False, True])
def test_crossing_hidden_leaving_and_entering_objects_keep_their_ids(masks):
    tracker = Tracker(0.5)
    seen: dict[str, list[int]] = {}
    for t in range(40):
        objects = {
            "right": (box_at(20 + 4 * t, 60 + t), 0.9, 0),
            "left": (box_at(180 - 4 * t, 100 - t), 0.8, 0),  # they meet at t = 20
            "still": (box_at(30, 170), 0.7, 0),
        }
        if not 12 <= t < 20:
            objects["hidden"] = (box_at(40 + 3 * t, 150), 0.9, 0)
        if t < 10:
            objects["leaving"] = (box_at(170 + 3 * t, 30), 0.9, 0)
        if t >= 25:
            objects["entering"] = (box_at(10 + 2 * (t - 25), 20), 0.9, 0)
        for name, track in ids_of(tracker, objects, masks).items():
            seen.setdefault(name, []).append(track)
    assert all(len(set(tracks)) == 1 and tracks[0] > 0 for tracks in seen.values()), seen
    assert sorted(tracks[0] for tracks in seen.values()) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("masks", [False, True])
def test_an_object_that_turns_and_one_that_trembles_keep_their_ids(masks):
    tracker = Tracker(0.5)
    chance = np.random.default_rng(0)
    for t in range(60):
        turned = (100 + 60 * np.cos(t / 12), 100 + 60 * np.sin(t / 12))  # 5 pixels a frame
        objects = {
            "turning": (box_at(*turned), 0.9, 0),
            "trembling": (box_at(*(100, 100) + chance.normal(0, 2, 2)), 0.8, 0),
        }
        assert ids_of(tracker, objects, masks) == {"turning": 1, "trembling": 2}


def test_an_unsure_detection_continues_a_track_and_begins_none():
    tracker = Tracker(0.5)
    first = ids_of(tracker, {"a": (box_at(50, 50), 0.9, 0), "b": (box_at(150, 50), 0.3, 0)})
    assert first == {"a": 1, "b": 0}
    second = ids_of(tracker, {"a": (box_at(52, 50), 0.2, 0), "b": (box_at(150, 50), 0.4, 0)})
    assert second == {"a": 1, "b": 0}
    below = ids_of(tracker, {"a": (box_at(54, 50), UNSURE_SCORE / 2, 0)})
    assert below == {"a": 0}


def test_a_sure_detection_comes_before_an_unsure_one_that_overlaps_more():
    tracker = Tracker(0.5)
    ids_of(tracker, {"a": (box_at(50, 50), 0.9, 0)})
    objects = {"unsure": (box_at(50, 50), 0.4, 0), "sure": (box_at(54, 50), 0.6, 0)}
    assert ids_of(tracker, objects) == {"unsure": 0, "sure": 1}


def test_an_object_is_forgotten_after_so_many_frames_and_its_id_not_used_again():
    for missed, expected in ((KEPT_FRAMES, 1), (KEPT_FRAMES + 1, 2)):
        tracker = Tracker(0.5)
        here = {"a": (box_at(50, 50), 0.9, 0)}
        assert ids_of(tracker, here) == {"a": 1}
        for i in range(missed):
            tracker.skip() if i % 2 else ids_of(tracker, {})
        assert ids_of(tracker, here) == {"a": expected}
        assert len(tracker.tracks) == 1


def test_a_track_does_not_change_its_class():
    tracker = Tracker(0.5)
    assert ids_of(tracker, {"a": (box_at(50, 50), 0.9, 0)}) == {"a": 1}
    assert ids_of(tracker, {"a": (box_at(50, 50), 0.9, 1)}) == {"a": 2}
    assert ids_of(tracker, {"a": (box_at(50, 50), 0.9, 0)}) == {"a": 1}


def test_masks_tell_objects_apart_whose_boxes_do_not():
    """Two diagonals of one square: their boxes are the same."""
    line = np.eye(40, dtype=bool)
    thick = line | np.roll(line, 1, axis=1) | np.roll(line, -1, axis=1)
    masks = np.zeros((2, SIDE, SIDE), dtype=np.uint8)
    masks[0, 50:90, 50:90] = thick
    masks[1, 50:90, 50:90] = thick[:, ::-1]
    rles = [mask_api.encode(np.asfortranarray(mask)) for mask in masks]
    boxes = np.array([[50, 50, 90, 90]] * 2)
    tracker = Tracker(0.5)
    scores, labels = np.array([0.9, 0.8]), np.zeros(2, dtype=int)
    assert tracker.update(boxes, scores, labels, rles).tolist() == [1, 2]
    assert tracker.update(boxes, scores, labels, rles[::-1]).tolist() == [2, 1]


def test_mask_iou_of_windows_is_that_of_whole_masks():
    chance = np.random.default_rng(0)
    for _ in range(50):
        x, y = chance.uniform(20, 60, 2)
        boxes = [box_at(x, y, 30), box_at(*(x, y) + chance.uniform(-25, 25, 2), 24)]
        rles = [rle_of(box, round_mask=True) for box in boxes]
        shapes = [TrackedShape.of(np.array(box), rle) for box, rle in zip(boxes, rles)]
        assert mask_iou(*shapes) == pytest.approx(mask_api.iou([rles[0]], [rles[1]], [0])[0, 0])


def test_an_empty_mask_leaves_the_box():
    tracker = Tracker(0.5)
    empty = mask_api.encode(np.zeros((SIDE, SIDE), dtype=np.uint8, order="F"))
    box = np.array([box_at(50, 50)])
    for _ in range(3):
        assert tracker.update(box, np.ones(1), np.zeros(1, dtype=int), [empty]).tolist() == [1]


def test_without_motion_and_noise_ids_stay():
    for seed in range(30):
        chance = np.random.default_rng(seed)
        count = int(chance.integers(0, 25))
        corners = chance.uniform(0, SIDE, (count, 2))
        boxes = np.hstack([corners, corners + chance.uniform(2, 60, (count, 2))])
        scores = chance.uniform(0, 1, count)
        labels = chance.integers(0, 3, count)
        tracker = Tracker(0.4)
        first = tracker.update(boxes, scores, labels)
        assert ((first > 0) == (scores >= 0.4)).all()
        for _ in range(5):
            order = chance.permutation(count)
            ids = tracker.update(boxes[order], scores[order], labels[order])
            assert (ids == first[order]).all()


def test_whatever_is_detected_ids_are_unique_in_a_frame_and_of_one_class():
    for seed in range(20):
        chance = np.random.default_rng(seed)
        tracker = Tracker(0.5)
        class_of: dict[int, int] = {}
        last_seen: dict[int, int] = {}
        for frame in range(60):
            count = int(chance.integers(0, 15)) if frame % 7 else 0
            corners = chance.uniform(0, 80, (count, 2))
            boxes = np.hstack([corners, corners + chance.uniform(0, 60, (count, 2))])
            scores = chance.uniform(0, 1, count)
            labels = chance.integers(0, 2, count)
            ids = tracker.update(boxes, scores, labels)
            given = ids[ids > 0].tolist()
            assert len(set(given)) == len(given)
            assert (ids[scores >= 0.5] > 0).all() and (ids[scores < UNSURE_SCORE] == 0).all()
            for track, label in zip(ids, labels):
                if track:
                    assert class_of.setdefault(track, label) == label
                    assert frame - last_seen.get(track, frame) <= KEPT_FRAMES + 1
                    last_seen[track] = frame
        assert set(class_of) == set(range(1, len(class_of) + 1))


def test_tracks_that_end_at_once_are_told():
    assert lost_at_once([], 0.5) == lost_at_once([1, 1, 2, 2, 3, 4], 0.5) == ""
    said = lost_at_once([1, 1, 2, 3], 0.5)
    assert "2 of 3 tracks have one frame alone" in said and "--threshold (it is 0.5)" in said
    assert "1 of 1 track has one frame alone" in lost_at_once([1], 0.5)


def test_tracking_does_without_torch():
    code = "import sys, rfdetr.inference.tracking; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# ---------------------------------------------------------------- predict.py


@pytest.fixture(scope="module")
def scene():
    return moving_scene(frames=12, side=96, cells=5, seed=1)


@pytest.fixture
def follow(call, stage2):
    """follow(*flags) -> the records of predict.py; a threshold that splits what it finds."""

    def run(output: str, *words: object) -> list[dict]:
        weights = ["--checkpoint", stage2.folder / "best.pt", "--device", "cpu", "--threshold", 0.3]
        call(predict.main, *weights, "--output", output, *words)
        return json.loads((Path(output) / "predictions.json").read_text())

    return run


def places(records: list[dict]) -> list[tuple]:
    return [(one["frame"], one["class"], np.round(one["bbox"], 1).tolist()) for one in records]


@pytest.mark.slow
def test_a_video_is_followed_and_batches_change_nothing(scene, follow, tmp_path, capsys):
    write_video(tmp_path / "clip.mp4", scene.frames)
    one = follow("one", "--input", "clip.mp4", "--track", 1, "--batch", 1)
    said = capsys.readouterr().out
    five = follow("five", "--input", "clip.mp4", "--track", 1, "--batch", 5)
    plain = follow("plain", "--input", "clip.mp4", "--batch", 5)
    count = len({record["track"] for record in one})
    assert one and f"{len(one)} objects on {count} track" in said
    assert places(one) == places(five)
    assert [record["track"] for record in one] == [record["track"] for record in five]
    assert all("track" not in record for record in plain)
    sure = [record for record in five if record["score"] >= 0.3]
    assert places(sure) == places(plain)
    begun = set()
    for frame in range(len(scene.frames)):
        here = [record for record in one if record["frame"] == frame]
        tracks = [record["track"] for record in here]
        assert len(set(tracks)) == len(tracks)
        new = {record["track"] for record in here if record["score"] >= 0.3}
        assert set(tracks) - new <= begun  # an unsure object has been sure before
        begun |= new
    classes = {(record["track"], record["class"]) for record in one}
    assert len(classes) == count
    made = cv2.VideoCapture("one/clip.mp4")
    assert made.get(cv2.CAP_PROP_FRAME_COUNT) == len(scene.frames)


@pytest.mark.slow
def test_a_folder_of_numbered_images_is_a_stack(scene, follow, tmp_path):
    """Frames 2 and 10 in their order, one of them broken; another folder has other ids."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i, frame in enumerate(scene.frames):
            Image.fromarray(frame).save(tmp_path / folder / f"z{i}.png")
    (tmp_path / "b/z3.png").write_bytes(b"no image")
    write_video(tmp_path / "clip.avi", scene.frames, codec="png ")
    records = follow("stacks", "--input", "a", "b", "--track", 1, "--batch", 4)
    files = list(dict.fromkeys(record["file"] for record in records))
    names = [str(Path("a") / f"z{i}.png") for i in range(12)]
    names += [str(Path("b") / f"z{i}.png") for i in range(12) if i != 3]
    assert files == [name for name in names if name in files] and len(files) > 15
    a, b = ({r["track"] for r in records if r["file"].startswith(f)} for f in ("a", "b"))
    assert a and b and not a & b
    video = follow("video", "--input", "clip.avi", "--track", 1)
    stack = [record for record in records if record["file"].startswith("a")]
    assert [r["track"] for r in video] == [r["track"] for r in stack]


def test_each_file_of_several_pages_is_a_stack_of_its_own(tmp_path, monkeypatch):
    page = Image.new("L", (8, 8))
    for name in ("a.tif", "b.tif"):
        page.save(tmp_path / name, save_all=True, append_images=[page, page])
    for name in ("1.png", "2.png"):
        page.save(tmp_path / name)
    images = [single for file in sorted(tmp_path.iterdir()) for single in pages_of(file)]
    followed = []

    class Seen:
        def tracked(self, tracker: list) -> Seen:
            tracker.append(self)
            return self

    def new_tracker() -> list:
        followed.append([])
        return followed[-1]

    monkeypatch.setattr(predict, "as_records", lambda *_, **__: [])
    predictor = SimpleNamespace(
        predict=lambda arrays: [Seen() for _ in arrays],
        model=SimpleNamespace(exif="apply"),
        images_at_once=2,
        in_tiles=False,
    )
    results = predict.Results()
    predict.predict_images(predictor, images, None, tmp_path, None, set(), results, new_tracker)
    assert sorted(map(len, followed)) == [2, 3, 3]


def test_frames_are_made_in_a_thread_while_the_last_are_worked_on():
    second_made = threading.Event()
    makers = set()

    def batches():
        makers.add(threading.get_ident())
        yield [1]
        second_made.set()
        yield [2, 3]

    coming = one_ahead(batches())
    assert next(coming) == [1] and second_made.wait(10)
    assert list(coming) == [[2, 3]] and threading.get_ident() not in makers


def test_what_goes_wrong_with_a_frame_is_raised():
    def batches():
        yield [1]
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        list(one_ahead(batches()))


# ---------------------------------------------------------------- a Prediction, drawing


def test_a_prediction_keeps_the_objects_that_have_a_track():
    boxes = np.array([box_at(50, 50), box_at(150, 50), box_at(100, 150)])
    prediction = Prediction(
        original=Original(SIDE, SIDE, pixels=np.zeros((SIDE, SIDE, 3), dtype=np.uint8)),
        table=assign_rows(["cell", "vessel"], [1, 2], "dataset"),
        boxes=boxes,
        scores=np.array([0.9, 0.7, 0.3]),
        labels=np.array([0, 1, 0]),
        rles=None,
    )
    assert prediction.tracks is None and prediction[0].track is None
    tracked = prediction.tracked(Tracker(0.5))
    assert len(tracked) == 2 and tracked.tracks.tolist() == [1, 2]
    assert tracked[1].track == 2 and tracked[1:].tracks.tolist() == [2]
    records = as_records(Path("a.png"), None, tracked)
    assert [(one["track"], one["class"]) for one in records] == [(1, "cell"), (2, "vessel")]
    assert tracked.picture().size == (SIDE, SIDE)


def test_labels_of_tracks():
    box = np.array(box_at(50, 50))
    one = DrawnObject(box, "cell", 0.934, None, (0, 0, 0), track=12)
    assert one.labels == ["cell 12  0.93", "#12"]


@pytest.mark.parametrize("fails", ["drawing", "model"])
def test_what_goes_wrong_in_a_video_is_raised(fails, scene, tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", scene.frames)

    def broken(*_: object) -> None:
        raise UserError("broken")

    class Drawn:
        def __init__(self, image: np.ndarray):
            self.image = image
            self.picture = broken

        def __len__(self) -> int:
            return 0

    def model(frames: list[np.ndarray]) -> list[Drawn]:
        return broken() if fails == "model" else [Drawn(frame) for frame in frames]

    monkeypatch.setattr(videos, "as_records", lambda *_: [])
    with pytest.raises(UserError, match="broken"):
        videos.predict_video(model, 5, tmp_path / "clip.mp4", tmp_path, "out.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_track_has_one_colour_whatever_else_is_drawn():
    gray = np.full((200, 200, 3), 128, dtype=np.uint8)
    boxes = np.array([[20, 60, 90, 130], [110, 60, 180, 130]])
    alone = draw(gray, boxes[1:], ["cell"], [0.9], tracks=[12])
    both = draw(gray, boxes, ["cell", "cell"], [0.8, 0.9], tracks=[3, 12])
    for picture in (alone, both):
        assert colour_number(11) in [colour for _, colour in picture.getcolors(1 << 16)]
    assert colour_number(2) in [colour for _, colour in both.getcolors(1 << 16)]
    other = draw(gray, boxes[1:], ["cell"], [0.9], tracks=[13])
    assert np.asarray(other).tobytes() != np.asarray(alone).tobytes()
