"""What an image file tells without its pixels: its kind, size, orientation and content."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from rfdetr.data.bands import bands_of
from rfdetr.data.image_cache import ImageCache, stamp_of
from rfdetr.data.images import FORMATS, LARGE, ORIENTATION, open_image
from rfdetr.files import file_sha256

TIFF_SIDES = (256, 257)  # tags: width and height as they are stored
HASHED_PARTS = 4  # of a file, spread from its beginning to its end
HASHED_PART = 8192  # bytes of each

# Errors that say nothing of the file and may be over the next time; systems lack some of them.
REFUSALS = """
EACCES EPERM EIO ESTALE ETIMEDOUT EAGAIN EINTR EBUSY EMFILE ENFILE ENOMEM ENOBUFS ENOLCK ENXIO
ENODEV ENONET ENETDOWN ENETUNREACH ENETRESET ECONNABORTED ECONNRESET ECONNREFUSED ENOTCONN
ESHUTDOWN EHOSTDOWN EHOSTUNREACH EREMOTEIO ECOMM EPROTO EKEYEXPIRED EKEYREVOKED ENOKEY EDEADLK
""".split()
REFUSED = {getattr(errno, name) for name in REFUSALS if hasattr(errno, name)}
NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """An entry of "images" with a sound id.  Width and height are infinite until the file tells."""

    id: int | str
    file_name: str  # empty where it is no plain path inside the folder
    width: float
    height: float

    @property
    def size(self) -> tuple[float, float]:
        return self.width, self.height

    @property
    def has_size(self) -> bool:
        return self.width < inf


@dataclass(frozen=True, slots=True)
class ImageFile:
    """What the file of an entry tells, whatever the annotations say."""

    path: str = "."  # a Path takes four times the memory
    faults: dict[str, str] = field(default_factory=dict)  # code -> what to add to the path
    orientation: int = 1  # the EXIF tag, 1..8
    stored_size: tuple[int, int] | None = None  # (width, height); None where it is not known
    file_sha256: bytes = b""  # of the whole file where it was decoded
    content_hash: int | None = None  # None where the file cannot be read


NOT_INSPECTED = ImageFile()
NO_FAULTS: dict[str, str] = {}  # one for all files without any


class ImageHeader(NamedTuple):
    """What a file tells when it is opened."""

    size: tuple[int, int]  # (width, height) in pixels
    pages: int


def stays_inside(name: object) -> bool:
    """Whether a file_name is a text without `..` that no system reads as an absolute path.

    Absolute are UNC paths and drive letters, too.
    """
    if type(name) is not str or not name or "\0" in name:
        return False
    if ".." in re.split(r"[\\/]", name):
        return False
    return not re.match(r"[\\/]|[A-Za-z]:", name)


def find_image(folder: Path, name: str) -> Path:
    """The file that a file_name means: with backslashes, also what Windows would read."""
    if "\\" in name and not os.path.exists(folder / name):
        return folder / name.replace("\\", "/")
    return folder / name


def is_regular_file(path: str | Path) -> bool:
    """Whether a path leads to a plain file: to open a pipe, socket or device may never end."""
    return os.path.isfile(path)


def kind_of_file(mode: int) -> str:
    """In words, what a `stat` mode says that something is."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFREG: "a plain file",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def is_refusal(error: BaseException) -> bool:
    """Whether the system refused to read a file for the moment, whatever is in it."""
    return isinstance(error, OSError) and error.errno in REFUSED


def content_hash(file: BinaryIO) -> int:
    """64 bits, as a signed number, that tell an image file again under any name, time or place.

    They are of the sha256 of the file's size and of four parts of it, 32 KB in all, so that large
    sets cost little. Checkpoints keep these numbers as `trained_on`: what is hashed must not
    change.  Raises OSError.
    """
    size = os.fstat(file.fileno()).st_size
    hashed = [size.to_bytes(8, "little")]
    for part in range(HASHED_PARTS):
        file.seek(max(size - HASHED_PART, 0) * part // (HASHED_PARTS - 1))
        hashed.append(file.read(HASHED_PART))
    digest = hashlib.sha256(b"".join(hashed)).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def inspect_image_file(
    entry: ImageEntry, folder: Path, decode: bool, cache: ImageCache
) -> ImageFile:
    """Find an entry's file and read its header, or all of it where `decode` is set.

    What `cache` knows of the same file is not read again.
    """
    path = find_image(folder, entry.file_name)
    stamp = stamp_of(path)
    name = f"{entry.file_name} {entry.width}x{entry.height}"
    decoded_name = f"{name} decoded"
    finding = cache.get(decoded_name, stamp)
    # where the pixels are damaged, the header may be sound
    if not decode and (finding is None or "IMG_CORRUPT" in finding[0]):
        finding = cache.get(name, stamp)
    if finding is None:
        finding = read_image_file(path, entry.size, decode)
        if "IMG_UNREADABLE" not in finding[0]:
            cache.put(decoded_name if decode else name, stamp, finding)
    faults, orientation, stored_size, whole_sha256, hashed = finding
    if not decode:  # as if no earlier check had decoded the file
        faults = {code: more for code, more in faults.items() if code != "IMG_ALPHA"}
    if "IMG_MISSING" in faults:
        faults = {"IMG_MISSING": words_on_near_file(path)}
    if is_behind_link(path, folder):
        faults = {"IMG_LINK": ""} | faults
    return ImageFile(
        path=str(path),
        faults=faults or NO_FAULTS,
        orientation=orientation,
        stored_size=shared(tuple(stored_size)) if stored_size else None,
        file_sha256=bytes.fromhex(whole_sha256),
        content_hash=hashed,
    )


def words_on_near_file(path: Path) -> str:
    """Names the file that near_file finds; "" where there is none."""
    near = near_file(path)
    return f" (there is {near!r})" if near else ""


def near_file(path: Path) -> str | None:
    """The name of a file beside a missing one that is called alike but for case, blanks or the form
    of its umlauts, which Windows and macOS take for the same.
    """
    try:
        listed = folded_names(path.parent, path.parent.stat().st_mtime_ns)
    except OSError:
        return None
    return listed.get(folded(path.name))


@functools.lru_cache(maxsize=100)
def folded_names(folder: Path, changed: int) -> dict[str, str]:
    """Folded name -> name of a folder's files; changed: its time, so that it is listed anew."""
    return {folded(name): name for name in os.listdir(folder)}


def folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip()


@functools.lru_cache(maxsize=1000)
def shared(size: tuple[int, int]) -> tuple[int, int]:
    """The same object for equal sizes: of many images, most have one of a few sizes."""
    return size


def is_behind_link(path: Path, folder: Path) -> bool:
    """Whether a file, or a folder on the way to it from `folder` on, is a symbolic link."""
    part = str(path)
    while not os.path.islink(part):
        if part == str(folder):
            return False
        part = os.path.dirname(part) or "."
    return True


def read_image_file(path: Path, annotated_size: tuple[float, float], decode: bool) -> list:
    """What the cache keeps of a file: [faults, orientation, stored size, sha256 in hex, hash].

    As in ImageFile. Everything after the first fault keeps its default.
    """
    orientation = 1
    whole_sha256 = ""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            return [{"IMG_TYPE": f": {kind_of_file(mode)}"}, 1, None, "", None]
        with open(path, "rb") as file:
            with open_image(path, file) as image:
                orientation, stored_size = read_orientation(image, annotated_size)
                pages = count_pages(image)
                notes = {"IMG_PAGES": f": {pages}"} if pages > 1 else {}
                if decode:
                    decode_pixels(image, path)
                    whole_sha256 = file_sha256(path)
                    share = transparent_share(image)
                    if share:
                        notes["IMG_ALPHA"] = f": {max(share, 0.01):.0%} of it"
            hashed = content_hash(file)
        return [notes, orientation, stored_size, whole_sha256, hashed]
    except Exception as error:  # on damaged files Pillow raises OSError, struct.error and others
        return [fault_of(error), orientation, None, whole_sha256, None]


def decode_pixels(image: Image.Image, path: Path) -> None:
    """Decode all of an opened image, a large one a part at a time.  Raises what Pillow raises."""
    if image.width * image.height > LARGE:
        with open(path, "rb") as file:
            bands = bands_of(image, file, np.asarray, apply_exif=False)
            if bands is not None:
                for _ in bands:
                    pass
                return
    image.load()


def transparent_share(image: Image.Image) -> float:
    """The share of a decoded image that is not opaque, 0..1.

    0 of one that was read in parts, and of colours other than a palette's that mean transparency.
    """
    pixels = image.width * image.height
    if pixels > LARGE:
        return 0
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode not in ("RGBA", "LA", "PA"):
        return 0
    return 1 - image.getchannel("A").histogram()[255] / pixels


def read_header(path: Path) -> ImageHeader | None:
    """The header of an image file; None where it cannot be read."""
    try:
        if not is_regular_file(path):
            return None
        with Image.open(path, formats=FORMATS) as image:
            return ImageHeader(image.size, count_pages(image))
    except Exception:  # on damaged files Pillow raises OSError, struct.error and others
        return None


def headers_of(files: Iterable[Path]) -> dict[Path, ImageHeader]:
    """The headers of those image files that can be read."""
    headers = {file: read_header(file) for file in files}
    return {file: header for file, header in headers.items() if header}


def count_pages(image: Image.Image) -> int:
    """Pages or frames of an opened image, of which only the first is read.

    The second picture in cameras' JPEGs (MPO: a preview, a depth or a gain map) is no page.
    """
    if image.format == "MPO":
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception as error:  # what follows the first page is damaged
        if is_refusal(error):
            raise
        return 1


def fault_of(error: Exception) -> dict[str, str]:
    """The code for an error of opening or decoding an image, with what to add to its path."""
    if isinstance(error, Image.DecompressionBombError):
        return {"IMG_BOMB": ""}
    if getattr(error, "errno", None) in NO_FILE:
        return {"IMG_MISSING": ""}
    if is_refusal(error):
        return {"IMG_UNREADABLE": f": {error.strerror}"}
    if isinstance(error, UnidentifiedImageError):  # its text has the whole path again
        return {"IMG_CORRUPT": ": no image, or of a kind that is not read"}
    return {"IMG_CORRUPT": f": {error}"}


def read_orientation(
    image: Image.Image, annotated_size: tuple[float, float]
) -> tuple[int, tuple[int, int]]:
    """(EXIF orientation 1..8, (width, height) as stored) of an opened image."""
    if image.format == "TIFF":  # Pillow turns it upright while it loads
        orientation = image.tag_v2.get(ORIENTATION, 1)
        stored_size = tuple(image.tag_v2[tag] for tag in TIFF_SIDES)
    else:
        orientation = 1
        stored_size = image.size
        packets = str(image.info.get("xmp", "")) + str(image.info.get("XML:com.adobe.xmp", ""))
        has_exif = "exif" in image.info or "tiff:Orientation" in packets
        # For a PNG without EXIF in front of its pixels getexif() decodes them all.
        if has_exif or annotated_size != stored_size:
            try:
                orientation = image.getexif().get(ORIENTATION, 1)
            except Exception as error:  # damaged EXIF in a sound image
                if is_refusal(error):
                    raise
    if orientation not in range(2, 9):
        orientation = 1
    return orientation, stored_size
