"""Words of messages."""

from __future__ import annotations

import pytest

from rfdetr.text import counted, rounded_down


def test_one_thing_is_told_in_the_singular():
    assert counted(1, "class") == "1 class"
    assert counted(0, "class") == "0 classes"
    assert counted(2, "image") == "2 images"


@pytest.mark.parametrize(
    "score, text", [(0.97, "0.9"), (0.3, "0.3"), (0.0519, "0.05"), (0.00099, "0.0009"), (1, "1.0")]
)
def test_a_threshold_is_rounded_down_to_one_digit(score, text):
    assert rounded_down(score) == text
    assert float(rounded_down(score)) <= score
