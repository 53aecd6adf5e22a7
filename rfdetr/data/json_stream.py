"""Annotation files read piece by piece: one entry is in memory at a time, not all of them.

What is not written as COCO files are (another encoding, other values than objects in the lists,
broken JSON) is `NotStreamable`: `layout.read_json` reads or refuses it as a whole.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import stat
from array import array
from collections.abc import Iterator, Sequence
from json.decoder import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import BinaryIO

import msgspec

from rfdetr.data.flat import FlatAnnotations
from rfdetr.progress import ProgressBar

BLOCK = 1 << 20  # bytes that are read at once
FAR = 1 << 16  # characters: the end of a longer entry is not looked for
MOST_BRACKETS = 500  # of an entry that is not left to Python's json: that bounds the nesting
GAP = re.compile(r"[ \t\n\r]*,[ \t\n\r]*\{")  # between an entry and the inside of the next one
IMAGE_FIELDS = ("id", "file_name", "width", "height")
BLANKS = " \t\n\r"


class NotStreamable(Exception):
    """The file is no plain COCO document; whether it is any other is not known."""


class Window:
    """The part of a file that is in memory as text, with a place in it."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.digest = hashlib.sha256()  # of what was read
        self.text = ""
        self.at = 0  # the place, a character of `text`
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
        self._decode_value = JSONDecoder().raw_decode
        self._decode_entry = msgspec.json.Decoder().decode
        self._is_done = False  # the file is read
        self._known = (0, 0)  # a character of `text`, and the byte of the file where it begins
        self._border = "}, {"  # of two entries, as the file has it

    @property
    def byte(self) -> int:
        """Where in the file the place is."""
        character, byte = self._known
        passed = self.at - character
        if not self.text.isascii():
            passed = len(self.text[character : self.at].encode("utf-8", "surrogatepass"))
        self._known = (self.at, byte + passed)
        return byte + passed

    def read_on(self, size: int = 0) -> bool:
        """Forget what lies before the place and read on, `size` or more; False at the end."""
        if self._is_done:
            return False
        block = self.file.read(max(size, BLOCK))
        self.digest.update(block)
        self._is_done = not block
        self._known = (0, self.byte)
        self.text = self.text[self.at :] + self._decoder.decode(block, final=self._is_done)
        self.at = 0
        return True

    def character(self) -> str:
        """The next one that is no blank, "" at the end of the file; the place is set there."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in BLANKS:
                    return self.text[self.at]
                self.at += 1
            if not self.read_on():
                return ""

    def expect(self, wanted: str) -> str:
        """The next character, which must be one of `wanted`; the place is set behind it."""
        found = self.character()
        if not found or found not in wanted:
            raise NotStreamable
        self.at += 1
        return found

    def closed_value(self) -> object:
        """The next value, which must begin with a bracket or a quotation mark and so has an end."""
        if self.character() not in ("{", "[", '"'):
            raise NotStreamable
        while True:
            try:
                value, self.at = self._decode_value(self.text, self.at)
                return value
            except JSONDecodeError as error:
                # as much as there is: a long value is not tried again for each block
                if not self.read_on(len(self.text) - self.at):
                    raise NotStreamable from error

    def value(self) -> object:
        """The next value, of whatever kind."""
        if self.character() in ("{", "[", '"'):
            return self.closed_value()
        word = ""
        while self.at < len(self.text) or self.read_on():
            if self.text[self.at : self.at + 1] in (*BLANKS, *",]}"):
                break
            word += self.text[self.at : self.at + 1]
            self.at += 1
        return json.loads(word)

    def entry(self) -> dict:
        """The next value, an object of a list: as closed_value, at a third of its time.

        Up to where the next object seems to begin, msgspec reads it. If that is a whole object, it
        is this one; if not, or if it has NaN or other things that only Python's json takes, that
        reads it.
        """
        end = self.text.find(self._border, self.at, self.at + FAR) + 1
        text = self.text[self.at : end]
        if text and text.count("[") + text.count("{") <= MOST_BRACKETS:
            try:
                value = self._decode_entry(text)
                self.at = end
                return value
            except (msgspec.DecodeError, UnicodeEncodeError):
                pass
        value = self.closed_value()
        gap = GAP.match(self.text, self.at)
        if gap:
            self._border = "}" + gap[0]
        return value

    def objects(self) -> Iterator[dict]:
        """The entries of a list of objects; where the next one begins is `byte` before it."""
        self.expect("[")
        if self.character() == "]":
            self.at += 1
            return
        while True:
            if self.character() != "{":
                raise NotStreamable
            yield self.entry()
            if self.expect(",]") == "]":
                return

    def keys(self) -> Iterator[str]:
        """The keys of an object; behind each, its value is to be read."""
        self.expect("{")
        if self.character() == "}":
            self.at += 1
            return
        while True:
            if self.character() != '"':
                raise NotStreamable
            key = self.closed_value()
            self.expect(":")
            yield key
            if self.expect(",}") == "}":
                return


class FileEntries:
    """The annotations of a file, read again where they are needed."""

    in_memory = False

    def __init__(self, path: Path, begins: array):
        self.path = path
        self.begins = begins  # byte behind the entry before; one more: behind the last entry

    def read(self, indices: Sequence[int]) -> list[dict]:
        entries = []
        with open(self.path, "rb") as file:
            for index in indices:
                begin = self.begins[index]
                file.seek(begin)
                raw = file.read(self.begins[index + 1] - begin)
                text = raw.decode("utf-8", "surrogatepass")
                entries.append(json.loads(text[text.index("{") :]))
        return entries


def stream_json(path: Path) -> tuple[dict, str]:
    """(what an annotation file holds, sha256 of it in hex); "annotations" is FlatAnnotations.

    Entries of "images" have the fields alone that are looked at.  Raises NotStreamable and OSError.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise NotStreamable
    data: dict = {}
    with open(path, "rb") as file:
        window = Window(file)
        try:
            window.read_on()
            for key in window.keys():
                data[key] = read_table(window, key, path)
            if window.character():  # something behind the end
                raise NotStreamable
        except (ValueError, RecursionError) as error:
            raise NotStreamable from error
    return data, window.digest.hexdigest()


def read_table(window: Window, key: str, path: Path) -> object:
    """The value of a key of the document."""
    if key not in ("annotations", "images") or window.character() != "[":
        return window.value()
    if key == "annotations":
        return read_annotations(window, path)
    return [
        {name: entry[name] for name in IMAGE_FIELDS if name in entry} for entry in window.objects()
    ]


def read_annotations(window: Window, path: Path) -> FlatAnnotations:
    flat = FlatAnnotations()
    begins = array("q")

    def noting_begins() -> Iterator[dict]:
        last = window.byte
        for entry in window.objects():
            begins.append(last)
            yield entry
            last = window.byte
        begins.append(last)

    for entry in ProgressBar(noting_begins(), "checking annotations", "annotations"):
        flat.add(entry)
    flat.finish(FileEntries(path, begins))
    return flat
