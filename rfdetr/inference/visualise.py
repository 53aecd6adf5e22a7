"""Pictures of detections: translucent masks with contours, boxes, names, scores; side by side."""

from __future__ import annotations

import colorsys
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as mask_api

from rfdetr.data.large_images import ImageOnDisk, Pixels
from rfdetr.data.rle import columns_of
from rfdetr.inference.picture_labels import Label, place_labels, write_labels

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]  # xyxy

MIN_SIDE = 512  # pixels: of pictures to look at; on smaller ones hardly any text fits
# pixels: up to here shapes are drawn at twice the size and shrunk, which smooths their edges
SMOOTH_SIDE = 1600
MASK_OPACITY = 0.38  # on white; down to a third of it on black, where a tint hides what there is
LINES = 400  # a line's width times this is the picture's long side, at most,
LINES_OF_OBJECT = 10  # and so is its object's short side,
MIN_LINE = 1.5  # pixels, but it is no thinner
FAR = 1e7  # pixels: farther corners, infinite ones among them, are taken for this far
MAX_LETTERS = 60  # of a class name
MOST_COLOURED = 5000  # objects that get colours by their places, else they take turns
SHRUNK_SIDE = 4096  # pixels: of pictures of large images that are only looked at
BAND_PIXELS = 1 << 21  # of large pictures, that are drawn at once
BACKGROUND = (24, 26, 31)
TITLE_COLOUR = (235, 235, 235)
# Told apart at a glance, on gray microscopy as on photographs, and the first few of them by most
# colour-blind people.
PALETTE: list[Colour] = [
    (255, 176, 0), (0, 158, 255), (255, 64, 129), (0, 200, 140), (160, 100, 255), (255, 110, 40),
    (60, 220, 235), (190, 215, 40), (235, 70, 70), (90, 120, 255), (240, 130, 220), (70, 190, 70),
]  # fmt: skip


@dataclass
class DrawnObject:
    """box (4,) xyxy in pixels of the picture; mask: an RLE of the original's size."""

    box: np.ndarray
    name: str
    score: float | None
    mask: dict | None
    colour: Colour
    track: int | None = None  # its id over the frames of a video or stack

    @property
    def labels(self) -> list[str]:
        """What may be written beside it, the best first."""
        if self.track is not None:
            return [f"{one_line(self.name)} {self.track}  {self.score:.2f}", f"#{self.track}"]
        if self.score is None:
            return [one_line(self.name)]
        score = f"{self.score:.2f}"
        # two spaces: in small letters one is not seen
        return [f"{one_line(self.name)}  {score}".strip(), score]

    @property
    def has_mask(self) -> bool:
        return bool(self.mask) and mask_api.area(self.mask) > 0

    @property
    def rows(self) -> tuple[float, float]:
        """From where to where it is drawn, on a picture of the original's size."""
        if self.has_mask:
            _, top, _, height = mask_api.toBbox(self.mask)
            bottom = top + height
        else:
            _, top, _, bottom = self.box
        return top - 1, bottom + 1


def class_colours(names: list[str]) -> dict[str, Colour]:
    """A colour for each class: the same for the same list, and distinct for any length."""
    return {name: colour_number(index) for index, name in enumerate(names)}


def colour_number(index: int) -> Colour:
    """One of any number of distinct colours."""
    if index < len(PALETTE):
        return PALETTE[index]
    # steps of the golden ratio never land close to each other on the colour circle
    hue = index * 0.618034 % 1
    saturation = 0.6 + 0.35 * (index % 2)
    value = 0.95 - 0.15 * (index % 3)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def picture_colours(names: list[str]) -> dict[str, Colour] | None:
    """What `draw` takes for all classes of a model; of a single one, objects are told apart."""
    return class_colours(names) if len(names) > 1 else None


def object_colours(boxes: np.ndarray) -> list[Colour]:
    """A colour for each box (n, 4) xyxy: where colours repeat, it is far away.

    Of very many boxes they repeat in turn.
    """
    if len(boxes) > MOST_COLOURED:
        return [PALETTE[i % len(PALETTE)] for i in range(len(boxes))]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    nearest = np.full((len(PALETTE), len(boxes)), np.inf)  # of a colour, from each box
    colours = []
    for i, centre in enumerate(centres):
        chosen = int(nearest[:, i].argmax())
        distances = np.hypot(*(centres - centre).T)
        nearest[chosen] = np.minimum(nearest[chosen], distances)
        colours.append(PALETTE[chosen])
    return colours


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    names: list[str],
    scores: list[float] | None = None,
    masks: list[dict | None] | None = None,
    colours: dict[str, Colour] | None = None,
    min_side: int = 1,
    tracks: list[int] | None = None,
) -> Image.Image:
    """Draw n objects on a copy of an image, the large ones first.

    image (H, W, 3) uint8 RGB; boxes (n, 4) xyxy in its pixels, drawn where there is no mask; names
    n class names; scores n, or None for ground truth; masks n compressed RLEs of H x W, or None in
    place of one or of all; colours class name -> RGB, other classes get one by their name; None: a
    colour for each object. tracks: n ids, 1 or more; each is written beside its object and has one
    colour in all pictures, whatever `colours` says; scores are needed, too. Objects whose box has a
    NaN are left out. The picture has the image's size, or is enlarged until its long side is
    min_side.
    """
    scale = max(1.0, min_side / max(image.shape[:2]))
    width = max(1, round(image.shape[1] * scale))
    height = max(1, round(image.shape[0] * scale))
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    objects = _objects(boxes, names, scores, masks, colours, tracks, scale)
    labels = place_labels(objects, picture.size, scale)
    return _draw_on(picture, 0, picture.size, objects, labels, scale)


def draw_in_bands(
    image: Pixels,
    boxes: np.ndarray,
    names: list[str],
    scores: list[float] | None = None,
    masks: list[dict | None] | None = None,
    colours: dict[str, Colour] | None = None,
    tracks: list[int] | None = None,
    step: int = 1,
) -> Iterator[np.ndarray]:
    """As `draw`, of an image that is larger than SMOOTH_SIDE: (h, W, 3) uint8 rows from its top on,
    h a multiple of `step`; memory does not grow with the image.
    """
    height, width = image.shape[:2]
    objects = _objects(boxes, names, scores, masks, colours, tracks, scale=1)
    objects.sort(key=lambda one: -_area(one.box))
    spans = np.array([one.rows for one in objects]).reshape(-1, 2)
    labels = place_labels(objects, (width, height), scale=1)
    rows = max(BAND_PIXELS // width // step, 1) * step
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        seen = np.flatnonzero((spans[:, 0] < bottom) & (spans[:, 1] > top))
        picture = Image.fromarray(image[top:bottom])
        drawn = [objects[i] for i in seen]
        yield np.asarray(_draw_on(picture, top, (width, height), drawn, labels, scale=1))


def draw_shrunk(
    image: ImageOnDisk,
    boxes: np.ndarray,
    names: list[str],
    scores: list[float] | None = None,
    masks: list[dict | None] | None = None,
    colours: dict[str, Colour] | None = None,
) -> Image.Image:
    """As `draw`, of a large image, and then shrunk to a side of SHRUNK_SIDE or less."""
    factor = math.ceil(max(image.shape[:2]) / SHRUNK_SIDE)
    bands = draw_in_bands(image, boxes, names, scores, masks, colours, step=factor)
    shrunk = [np.asarray(Image.fromarray(band).reduce(factor)) for band in bands]
    return Image.fromarray(np.concatenate(shrunk))


def _objects(
    boxes: np.ndarray,
    names: list[str],
    scores: list[float] | None,
    masks: list[dict | None] | None,
    colours: dict[str, Colour] | None,
    tracks: list[int] | None,
    scale: float,
) -> list[DrawnObject]:
    """What `draw` draws, on a picture that is `scale` times the image."""
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    drawable = np.flatnonzero(~np.isnan(boxes).any(axis=1))
    boxes = boxes.clip(-FAR, FAR) * scale
    if tracks is not None:
        chosen_colours = [colour_number(tracks[i] - 1) for i in drawable]
    elif colours is None:
        chosen_colours = object_colours(boxes[drawable])
    else:
        chosen_colours = [colours.get(names[i]) or _colour_of(names[i]) for i in drawable]
    return [
        DrawnObject(
            box=boxes[i],
            name=names[i],
            score=None if scores is None else scores[i],
            mask=masks[i] if masks else None,
            colour=colour,
            track=None if tracks is None else tracks[i],
        )
        for i, colour in zip(drawable, chosen_colours)
    ]


def _draw_on(
    picture: Image.Image,
    top: int,
    whole: tuple[int, int],
    objects: list[DrawnObject],
    labels: list[Label],
    scale: float,
) -> Image.Image:
    """Objects and labels on a picture, or on its rows from `top` on; whole: its (width, height)."""
    shapes = _draw_shapes(objects, picture.size, top, whole, scale)
    shapes.putalpha(_clearer_on_dark(shapes, picture))
    picture = Image.alpha_composite(picture.convert("RGBA"), shapes).convert("RGB")
    write_labels(picture, top, labels)
    return picture


def _clearer_on_dark(shapes: Image.Image, picture: Image.Image) -> Image.Image:
    """The alpha channel of shapes on a picture, lower where both are: translucent and dark."""
    alpha = np.asarray(shapes.getchannel("A"), dtype=np.float32) / 255
    darkness = 1 - np.asarray(picture.convert("L"), dtype=np.float32) / 255
    return Image.fromarray((255 * alpha * (1 - darkness * (1 - alpha))).round().astype(np.uint8))


def _draw_shapes(
    objects: list[DrawnObject],
    size: tuple[int, int],
    top: int,
    whole: tuple[int, int],
    scale: float,
) -> Image.Image:
    """Boxes and masks on a transparent picture of (width, height), `scale` times the image.

    top, whole: as in _draw_on.
    """
    smooth = 2 if max(whole) <= SMOOTH_SIDE else 1
    large_first = sorted(objects, key=lambda one: -_area(one.box))
    canvas = Image.new("RGBA", (size[0] * smooth, size[1] * smooth), (0, 0, 0, 0))
    pen = ImageDraw.Draw(canvas)
    last_pixel = np.tile(whole, 2) * smooth - 1
    for one in large_first:
        x1, y1, x2, y2 = np.clip(one.box * smooth, 0, last_pixel)
        if x2 > x1 and y2 > y1 and not one.has_mask:
            box = (x1, y1 - top * smooth, x2, y2 - top * smooth)
            _outline(pen, box, round(smooth * _line_width(one, whole)), (*one.colour, 255))
    pixels = np.array(canvas)
    for one in large_first:
        if one.has_mask:
            line = round(smooth * _line_width(one, whole))
            _paint_mask(pixels, one.mask, one.colour, scale * smooth, line, top * smooth)
    return Image.fromarray(pixels).reduce(smooth)


def _line_width(one: DrawnObject, whole: tuple[int, int]) -> float:
    """Of an object's outline, in pixels of a picture of (width, height): thinner round a small one,
    of which a line that is seen in the picture as a whole would leave nothing.
    """
    x1, y1, x2, y2 = one.box
    by_object = min(x2 - x1, y2 - y1) / LINES_OF_OBJECT
    return max(MIN_LINE, min(by_object, max(whole) / LINES))


def _area(box: np.ndarray) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _colour_of(name: str) -> Colour:
    return PALETTE[zlib.crc32(name.encode("utf-8", "surrogatepass")) % len(PALETTE)]


def _outline(pen: ImageDraw.ImageDraw, box: Box, line: int, ink: tuple[int, ...]) -> None:
    """A box's outline, `line` pixels wide; thinner and with sharp corners where the box is small.

    box: xyxy in the pen's pixels; ink: RGBA.
    """
    corners = [round(float(value)) for value in box]
    x1, y1, x2, y2 = corners
    short = min(x2 - x1, y2 - y1)
    line = max(1, min(line, short // 4))  # a line that is wider than the box would lie outside
    radius = min(3 * line, short // 3)
    # Pillow needs room between the corners for what it draws there
    if short > 2 * max(radius, line) + 2:
        pen.rounded_rectangle(corners, radius, outline=ink, width=line)
    else:
        pen.rectangle(corners, outline=ink, width=line)


def one_line(name: str) -> str:
    """A class name as one short line that a font can write."""
    letters = name[: 2 * MAX_LETTERS]
    printable = "".join(letter if letter.isprintable() else " " for letter in letters)
    line = " ".join(printable.split())
    if len(line) <= MAX_LETTERS:
        return line
    return line[: MAX_LETTERS - 3] + "..."


def _paint_mask(
    pixels: np.ndarray, rle: dict, colour: Colour, scale: float, line: int, first_row: int
) -> None:
    """Fill a mask into pixels (H * scale, W * scale, 4) RGBA, opaque along its border.

    rle: a mask of H x W, not empty, which reaches into these pixels; line: the border's width in
    `pixels`, which are the picture's rows from first_row on.
    """
    left, top, width, height = mask_api.toBbox(rle).astype(int)
    line = max(1, min(line, int(min(width, height) * scale) // 4))  # an inside is left
    bottom = top + height
    if scale == 1:  # of a mask that is much higher than these rows, a part is enough
        top = max(top, first_row - line - 2)
        bottom = min(bottom, first_row + len(pixels) + line + 2)
    mask = columns_of(rle, left, left + width)[top:bottom]
    # one empty pixel around: masks that touch the picture's edge get a border there too
    mask = np.pad(mask, 1)
    x = round((left - 1) * scale)
    y = round((top - 1) * scale) - first_row
    size = [max(1, round(side * scale)) for side in mask.shape[::-1]]
    soft = Image.fromarray(mask * np.uint8(255)).resize(size, Image.Resampling.BILINEAR)
    if scale > 1:  # round the steps of enlarged pixels
        soft = soft.filter(ImageFilter.GaussianBlur(0.45 * scale))
    filled = soft.point(lambda value: 255 * (value > 110))
    # 255 where everything within `line` pixels is inside
    core = filled.filter(ImageFilter.BoxBlur(line))
    # of the padding, the part that lies in the picture
    cut = np.s_[max(0, -y) : pixels.shape[0] - y, max(0, -x) : pixels.shape[1] - x]
    is_filled = np.array(filled)[cut] > 0
    is_core = np.array(core)[cut] == 255
    target = pixels[max(0, y) :, max(0, x) :][: is_filled.shape[0], : is_filled.shape[1]]
    target[is_filled] = (*colour, 255)
    target[is_core, 3] = round(255 * MASK_OPACITY)


def side_by_side(left: Image.Image, right: Image.Image, titles: tuple[str, str]) -> Image.Image:
    """Two pictures with a title over each; the right one is resized to the left one's height."""
    right_width = max(1, round(right.width * left.height / right.height))
    right = right.resize((right_width, left.height))
    font = ImageFont.load_default(size=max(12, left.height / 28))
    gap = max(4, left.height // 64)
    top = round(font.size * 2)
    sheet = Image.new("RGB", (left.width + gap + right.width, top + left.height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    x = 0
    for picture, title in zip((left, right), titles):
        sheet.paste(picture, (x, top))
        pen.text((x + picture.width / 2, top / 2), title, TITLE_COLOUR, font, anchor="mm")
        x += picture.width + gap
    return sheet
