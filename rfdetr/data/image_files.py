"""What an image file tells without its pixels: its kind, size, orientation and content."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from math import inf
from pathlib import Path

from PIL import Image

from rfdetr.data.image_cache import ImageCache, stamp_of
from rfdetr.data.images import FORMATS, ORIENTATION
from rfdetr.data.records import ImageRecord

TIFF_SIDES = 256, 257  # tags: width and height as they are stored


PARTS, PART = (
    4,
    8192,
)  # what is read of a file to know it again: the number of parts, and the bytes of each


_PASSING = (
    "EACCES EPERM EIO ESTALE ETIMEDOUT EAGAIN EINTR EBUSY EMFILE ENFILE ENOMEM ENOBUFS ENOLCK ENXIO ENODEV ENONET "
    "ENETDOWN ENETUNREACH ENETRESET ECONNABORTED ECONNRESET ECONNREFUSED ENOTCONN ESHUTDOWN EHOSTDOWN EHOSTUNREACH "
    "EREMOTEIO ECOMM EPROTO EKEYEXPIRED EKEYREVOKED ENOKEY EDEADLK"
)


PASSING = {
    getattr(errno, name) for name in _PASSING.split() if hasattr(errno, name)
}  # each system has its own


def stays_inside(name: object) -> bool:
    """False for `..`, absolute and UNC paths and drive letters, as any system would read them, and for no text."""
    if type(name) is not str or not name or "\0" in name:
        return False
    return ".." not in re.split(r"[\\/]", name) and not re.match(r"[\\/]|[A-Za-z]:", name)


def find_image(folder: Path, name: str) -> Path:
    """The file that a file_name means: with backslashes, also what Windows would read."""
    windows = folder / name.replace("\\", "/")
    return windows if "\\" in name and not os.path.exists(folder / name) else folder / name


def is_regular_file(path: str | Path) -> bool:
    """Whether a path leads to a plain file. Pipes, sockets and devices are not to be opened: that may never end."""
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


def is_passing(error: BaseException) -> bool:
    """Whether the system refused to read a file: that says nothing of what is in it, and may be over the next time."""
    return isinstance(error, OSError) and error.errno in PASSING


def content_hash(path: Path) -> int:
    """64 bits of the sha256 of a file's size and of four parts of it, 32 KB in all, as a signed number."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        for part in range(PARTS):
            file.seek(max(size - PART, 0) * part // (PARTS - 1))
            digest.update(file.read(PART))
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def _look(
    image: ImageRecord, folder: Path, decode: bool, seen: ImageCache, exif: str
) -> dict[str, str]:
    """Find the image's file and fill in what it tells, as it was seen before where it is still the same file.

    `decode`: as a whole, not the header alone.  exif: as for CocoSplit.  Returns {code: place} of the faults.
    """
    image.path = find_image(folder, image.file_name)
    way = [image.path, *image.path.parents][
        : len(image.path.relative_to(folder).parts) + 1
    ]  # up to the split's folder
    links = {"IMG_LINK": str(image.path)} if any(map(os.path.islink, way)) else {}
    name, stamp = f"{image.file_name} {image.width}x{image.height}", stamp_of(image.path)
    known = seen.get(f"{name} decoded", stamp)
    if not decode and (known is None or "IMG_CORRUPT" in known[0]):  # its header may be sound
        known = seen.get(name, stamp)
    if known is None:
        faults, stored = _open(image, decode)
        known = [faults, image.orientation, stored, image.digest.hex(), image.sample]
        if "IMG_UNREADABLE" not in faults:
            seen.put(name + " decoded" * decode, stamp, known)
    faults, image.orientation, stored, digest, image.sample = known
    image.digest = bytes.fromhex(digest)
    faults = faults | (_settle_size(image, tuple(stored), exif == "apply") if stored else {})
    return links | {code: f"{image.path}{more}" for code, more in faults.items()}


def _open(image: ImageRecord, decode: bool) -> tuple[dict[str, str], tuple[int, int] | None]:
    """Read the image's header, or all of it, and fill in what does not depend on the annotations.

    Returns ({code: what to add to the path} of the faults, (width, height) as stored or None where that is unknown).
    """
    try:
        mode = os.stat(image.path).st_mode
        if not stat.S_ISREG(mode):
            return {"IMG_TYPE": f": {kind_of_file(mode)}"}, None
        with Image.open(image.path, formats=FORMATS) as picture:
            image.orientation, stored = _orientation(picture, (image.width, image.height))
            if decode:
                picture.load()
                image.digest = hashlib.sha256(image.path.read_bytes()).digest()
        image.sample = content_hash(image.path)
        return {}, stored
    except Image.DecompressionBombError:
        return {"IMG_BOMB": ""}, None
    except (
        Exception
    ) as error:  # Pillow's readers raise anything from OSError to struct.error on damaged files
        if getattr(error, "errno", None) in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return {"IMG_MISSING": ""}, None
        if is_passing(error):
            return {"IMG_UNREADABLE": f": {error.strerror}"}, None
        return {"IMG_CORRUPT": f": {error}"}, None


def _orientation(picture: Image.Image, said: tuple[float, float]) -> tuple[int, tuple[int, int]]:
    """(EXIF orientation, 1..8, (width, height) as stored) of an opened image whose annotated size is `said`."""
    if picture.format == "TIFF":  # Pillow turns it while it loads
        orientation, stored = (
            picture.tag_v2.get(ORIENTATION, 1),
            tuple(picture.tag_v2[tag] for tag in TIFF_SIDES),
        )
    else:
        orientation, stored = 1, picture.size
        packets = str(picture.info.get("xmp", "")) + str(picture.info.get("XML:com.adobe.xmp", ""))
        # For a PNG without EXIF in front of its pixels getexif() decodes them all.
        if "exif" in picture.info or "tiff:Orientation" in packets or said != stored:
            try:
                orientation = picture.getexif().get(ORIENTATION, 1)
            except Exception as error:  # damaged EXIF in a sound image
                if is_passing(error):
                    raise
    return orientation if orientation in range(2, 9) else 1, stored


def _settle_size(image: ImageRecord, stored: tuple[int, int], apply: bool) -> dict[str, str]:
    """Set an image's size, and whether its orientation counts; `apply`: what holds where its size does not tell."""
    said = image.width, image.height
    turned = stored[::-1] if image.orientation >= 5 else stored
    if image.orientation > 1 and turned != stored and said in (stored, turned):
        image.exif_proof = said == turned
    image.exif = image.orientation > 1 and (apply if image.exif_proof is None else image.exif_proof)
    image.width, image.height = turned if image.exif else stored
    if said in (stored, turned, (inf, inf)):
        return {}
    return {"IMG_SIZE": f": {said[0]}x{said[1]}, the file has {image.width}x{image.height}"}
