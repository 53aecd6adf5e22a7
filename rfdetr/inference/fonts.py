"""Fonts that can write whatever a class is called."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from PIL import ImageFont

# Tried in turn where Pillow's own font lacks a letter; installed with Linux, Windows, macOS.
SYSTEM_FONTS = (
    "DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf", "Arial.ttf",
    "arial.ttf", "Helvetica.ttc", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc",
    "malgun.ttf",
)  # fmt: skip
NO_LETTER = "\U0010fffd"  # a private one, which no font has
ANY_SIZE = 24  # pixels, at which letters are looked for
NEAREST = str.maketrans(
    {
        "ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O",
        "ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ð": "d", "Ð": "D", "þ": "th", "Þ": "Th",
        "ı": "i", "µ": "u", "μ": "u", "×": "x", "–": "-", "—": "-",
    }
)  # fmt: skip


def font_for(text: str, size: float) -> tuple[ImageFont.FreeTypeFont, str]:
    """The installed font that has most letters of a text, `size` pixels high, and what to write
    with it: those that it lacks become the nearest plain letters, or "?".
    """
    if text.isascii():
        return _load(None, size), text
    names = (None, *SYSTEM_FONTS)
    name = max(names, key=lambda name: sum(_has(name, letter) for letter in text))
    return _load(name, size), "".join(_nearest(name, letter) for letter in text)


def _nearest(name: str | None, letter: str) -> str:
    """A letter, or plain ones in its place, which a font has."""
    if _has(name, letter):
        return letter
    parts = unicodedata.normalize("NFKD", letter.translate(NEAREST))
    plain = "".join(part for part in parts if not unicodedata.combining(part))
    return plain if all(_has(name, part) for part in plain) else "?"


@lru_cache(maxsize=4096)
def _has(name: str | None, letter: str) -> bool:
    """Whether a font is installed and has a letter; None: Pillow's own font."""
    font = _load(name, ANY_SIZE)
    return font is not None and _drawn(font, letter) != _drawn(font, NO_LETTER)


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> tuple[bytes, tuple[int, int]]:
    mask = font.getmask(letter)
    return bytes(mask), mask.size


@lru_cache(maxsize=256)
def _load(name: str | None, size: float) -> ImageFont.FreeTypeFont | None:
    """None for a font that is not installed."""
    if name is None:
        return ImageFont.load_default(size=size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None
