"""Progress: a bar on a terminal, whole lines elsewhere, nothing for what is short."""

from __future__ import annotations

import itertools
import sys

import pytest

from rfdetr import progress
from rfdetr.data.checks import check_file
from rfdetr.progress import ProgressBar


def clock(seconds: float):
    """A clock that goes on by `seconds` each time it is looked at."""
    times = itertools.count()
    return lambda: next(times) * seconds


def test_a_pipe_gets_whole_lines_now_and_then(capsys):
    bar = ProgressBar(range(12), "epoch 1", "steps", clock=clock(10))
    for step in bar:
        bar.note(f"loss {step}.50")
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err
    assert err.splitlines() == [
        "epoch 1: 3/12 steps (25%), loss 2.50, 0:00:30 elapsed, 0:01:30 left",
        "epoch 1: 6/12 steps (50%), loss 5.50, 0:01:00 elapsed, 0:01:00 left",
        "epoch 1: 9/12 steps (75%), loss 8.50, 0:01:30 elapsed, 0:00:30 left",
        "epoch 1: 12/12 steps (100%), loss 11.50, 0:02:00 elapsed, 0:00:00 left",
    ]


def test_what_was_done_before_a_resume_counts_as_done(capsys, monkeypatch):
    bar = ProgressBar(range(6), "epoch 3", "steps", before=6, clock=clock(10))
    list(bar)
    assert capsys.readouterr().err.splitlines() == [
        "epoch 3: 9/12 steps (75%), 0:00:30 elapsed, 0:00:30 left",
        "epoch 3: 12/12 steps (100%), 0:01:00 elapsed, 0:00:00 left",
    ]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(ProgressBar(range(6), "epoch 3", "steps", at_once=True, before=6))
    assert "epoch 3:  50%" in capsys.readouterr().err


def test_the_last_line_tells_of_all(capsys):
    items = iter("abcd")  # whose number nobody knows
    assert list(ProgressBar(items, "clip.mp4", "batches", clock=clock(10))) == list("abcd")
    assert capsys.readouterr().err.splitlines() == [
        "clip.mp4: 3 batches, 0:00:30 elapsed",
        "clip.mp4: 4 batches, 0:00:50 elapsed",
    ]


def test_nothing_is_said_of_what_is_short(capsys):
    assert list(ProgressBar(range(100), "short", clock=clock(0.2))) == list(range(100))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_terminal_gets_a_bar_that_leaves_nothing(capsys, monkeypatch, at_once):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = ProgressBar(range(3), "epoch 1", "steps", at_once=at_once)
    for _ in bar:
        bar.note("loss 1.00")
    err = capsys.readouterr().err
    assert ("epoch 1:   0%" in err) == at_once and "\n" not in err
    assert err.split("\r")[-2].strip() == "" if at_once else err == ""


def test_large_sets_are_told_of_while_they_are_checked(capsys, monkeypatch, demo):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    check_file(demo / "train/_annotations.coco.json", demo / "train")
    err = capsys.readouterr().err
    assert f"reading the images of {demo / 'train'}: 12/12 images (100%)" in err
    assert "checking annotations: " in err
