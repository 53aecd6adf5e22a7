"""Words of messages."""

from __future__ import annotations

from rfdetr.text import counted


def test_one_thing_is_told_in_the_singular():
    assert counted(1, "class") == "1 class"
    assert counted(0, "class") == "0 classes"
    assert counted(2, "image") == "2 images"
