"""Large images: the pixels of any file, a part at a time, and nothing of its size in memory."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

import predict
from rfdetr import masks
from rfdetr.console import UserError
from rfdetr.data import bands, gray, image_files, large_images
from rfdetr.data.coco import read_dataset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.images import ORIENTATION, read_pixels
from rfdetr.data.large_images import ImageOnDisk, read_for_tiles
from rfdetr.data.rle import columns_of
from rfdetr.detr import RFDETR
from rfdetr.inference import visualise
from rfdetr.inference.class_sheet import class_sheet
from rfdetr.inference.picture_files import write_jpeg, write_png
from rfdetr.masks import encode_window, to_rle
from rfdetr.tiling import Tiling

HEIGHT, WIDTH = 61, 83


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch):
    monkeypatch.setattr(large_images, "LARGE", 0)
    monkeypatch.setattr(gray, "LARGE", 0)
    monkeypatch.setattr(bands, "BAND_BYTES", 1000)


def scene(mode: str) -> Image.Image:
    """Smooth colours with some noise, in any of Pillow's modes."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    rgb = np.stack([rows * 4, columns * 3, (rows + columns) % 256], axis=2)
    rgb = (rgb + rng.integers(0, 9, rgb.shape)).clip(0, 255).astype(np.uint8)
    if mode.startswith("I;16"):
        gray = rgb[..., 0].astype(np.uint16) * 37
        return Image.fromarray(gray.astype(">u2" if mode == "I;16B" else "<u2"))
    if mode == "F":
        return Image.fromarray(rgb[..., 0] / np.float32(40))
    image = Image.fromarray(rgb)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(rgb[..., 1]))
        return image
    return image.quantize(40) if mode == "P" else image.convert(mode)


def no_child(*_):
    raise AssertionError("the image is decoded as a whole")


BY_PARTS = {
    "rgb.tif": ("RGB", {}),
    "strips.tif": ("RGB", {"compression": "tiff_lzw", "tiffinfo": {278: 7}}),
    "deflate.tif": ("L", {"compression": "tiff_adobe_deflate", "tiffinfo": {278: 10, 317: 2}}),
    "16.tif": ("I;16", {"compression": "tiff_lzw", "tiffinfo": {278: 10}}),
    "plain16.tif": ("I;16", {}),
    "motorola.tif": ("I;16B", {}),
    "palette.tif": ("P", {"compression": "packbits", "tiffinfo": {278: 10}}),
    "alpha.tif": ("RGBA", {"tiffinfo": {278: 4}}),
    "two.tif": ("1", {"compression": "group4", "tiffinfo": {278: 16}}),
    "jpeg.tif": ("RGB", {"compression": "jpeg", "tiffinfo": {278: 16}}),
    "ycbcr.tif": ("YCbCr", {"compression": "jpeg", "tiffinfo": {278: 16}}),
    "rgb.png": ("RGB", {}),
    "gray.png": ("L", {}),
    "alpha.png": ("RGBA", {}),
    "both.png": ("LA", {}),
    "16.png": ("I;16", {}),
    "rgb.bmp": ("RGB", {}),
    "gray.bmp": ("L", {}),
    "palette.bmp": ("P", {}),
    "alpha.bmp": ("RGBA", {}),
}


@pytest.mark.parametrize("name", BY_PARTS)
def test_parts_of_a_file_have_the_pixels_of_the_whole(name, tmp_path, monkeypatch):
    monkeypatch.setattr(large_images, "write_whole", no_child)
    mode, options = BY_PARTS[name]
    path = tmp_path / name
    scene(mode).save(path, **options)
    for window in (None, (100.0, 4000.0)):
        whole = read_pixels(path, True, window)
        kept = read_for_tiles(path, True, window)
        assert isinstance(kept, ImageOnDisk) and kept.shape == whole.shape
        assert (kept[:] == whole).all()
        part = kept[17:30, 5:44]
        assert type(part) is np.ndarray and (part == whole[17:30, 5:44]).all()


def test_a_palette_png_with_transparency_and_notes_has_the_same_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(large_images, "write_whole", no_child)
    image = scene("RGB").quantize(200)
    image.save(tmp_path / "p.png", transparency=bytes(range(200)), dpi=(72, 72))
    kept = read_for_tiles(tmp_path / "p.png", True)
    assert (kept[:] == read_pixels(tmp_path / "p.png", True)).all()


def test_a_blank_png_whose_few_bytes_hold_many_rows(tmp_path):
    blank = Image.new("L", (1000, 999))
    blank.save(tmp_path / "blank.png", compress_level=9)
    assert not read_for_tiles(tmp_path / "blank.png", True)[:].any()


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_a_tiff_in_tiles_has_the_same_pixels(byte_order, tmp_path, monkeypatch):
    """Pillow writes no tiles, so the file is made by hand: deflated, the last ones cut off."""
    monkeypatch.setattr(large_images, "write_whole", no_child)
    pixels = np.asarray(scene("RGB"))
    side = 32
    tiles = []
    for top in range(0, HEIGHT, side):
        for left in range(0, WIDTH, side):
            tile = np.zeros((side, side, 3), np.uint8)
            part = pixels[top : top + side, left : left + side]
            tile[: part.shape[0], : part.shape[1]] = part
            tiles.append(zlib.compress(tile.tobytes()))
    tags = {256: WIDTH, 257: HEIGHT, 259: 8, 262: 2, 277: 3, 284: 1, 322: side, 323: side}
    count = len(tags) + 3
    lists = 8 + 2 + 12 * count + 4  # where values of more than four bytes lie
    data = lists + 6 + 8 * len(tiles)
    sizes = [len(tile) for tile in tiles]
    offsets = [data + sum(sizes[:i]) for i in range(len(tiles))]
    entries = {tag: (4, 1, value) for tag, value in tags.items()}
    entries |= {258: (3, 3, lists), 324: (4, len(tiles), lists + 6)}
    entries |= {325: (4, len(tiles), lists + 6 + 4 * len(tiles))}
    content = b"II" if byte_order == "<" else b"MM"
    content += struct.pack(f"{byte_order}HIH", 42, 8, count)
    for tag, (kind, number, value) in sorted(entries.items()):
        content += struct.pack(f"{byte_order}HHII", tag, kind, number, value)
    content += struct.pack(f"{byte_order}I3H{2 * len(tiles)}I", 0, 8, 8, 8, *offsets, *sizes)
    (tmp_path / "tiles.tif").write_bytes(content + b"".join(tiles))
    assert (read_pixels(tmp_path / "tiles.tif", True) == pixels).all()
    assert (read_for_tiles(tmp_path / "tiles.tif", True)[:] == pixels).all()


def test_pages_of_a_tiff_and_its_stored_orientation(tmp_path, monkeypatch):
    monkeypatch.setattr(large_images, "write_whole", no_child)
    pages = [scene("RGB"), scene("L").resize((40, 30))]
    path = tmp_path / "pages.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:], compression="tiff_lzw")
    for page in (0, 1):
        kept = read_for_tiles(path, True, page=page)
        assert (kept[:] == read_pixels(path, True, page=page)).all()
    turned = tmp_path / "turned.tif"
    scene("RGB").save(turned, compression="tiff_lzw", tiffinfo={ORIENTATION: 6, 278: 10})
    assert (read_for_tiles(turned, False)[:] == np.asarray(scene("RGB"))).all()


def test_other_files_are_decoded_as_a_whole_in_a_process_of_their_own(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    options = {
        "turned.jpg": ("RGB", {"exif": exif}),
        "turned.png": ("L", {"exif": exif}),
        "float.tif": ("F", {}),
    }
    for name, (mode, more) in options.items():
        scene(mode).save(tmp_path / name, **more)
        kept = read_for_tiles(tmp_path / name, True)
        whole = read_pixels(tmp_path / name, True)
        assert kept.shape == whole.shape and (kept[:] == whole).all()


@pytest.mark.parametrize("name", ["rgb.png", "strips.tif", "rgb.tif", "rgb.bmp", "photo.jpg"])
def test_a_large_file_that_is_cut_off_is_refused(name, tmp_path):
    mode, options = BY_PARTS.get(name, ("RGB", {}))
    scene(mode).save(tmp_path / name, **options)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_for_tiles(tmp_path / name, True)


@pytest.mark.parametrize("name", ["16.tif", "motorola.tif", "16.png", "float.tif"])
def test_a_large_image_has_the_gray_levels_that_the_whole_has(name, tmp_path, monkeypatch):
    mode, options = BY_PARTS.get(name, ("F", {}))
    scene(mode).save(tmp_path / name, **options)
    monkeypatch.setattr(gray, "PIXELS", 100)
    large = gray.some_of(gray.deep_pixels(tmp_path / name))
    monkeypatch.setattr(gray, "LARGE", HEIGHT * WIDTH)
    whole = gray.some_of(gray.deep_pixels(tmp_path / name))
    assert len(large) == 100 and (np.sort(large) == np.sort(whole)).all()


def drawn_objects() -> dict:
    """Objects as `draw` takes them: some with masks, one of them cut by each edge of a band."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, [WIDTH - 20, HEIGHT - 20], (12, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(6, 20, (12, 2))], axis=1)
    masks = []
    for left, top, right, bottom in boxes.astype(int).tolist():
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        pixels[top + 4 : bottom, left:right] = 1  # a mask may be much smaller than its box
        masks.append(mask_api.encode(pixels))
    masks[::3] = [None] * 4
    names = ["cell"] * 12
    return {
        "boxes": boxes,
        "names": names,
        "scores": rng.uniform(0, 1, 12).tolist(),
        "masks": masks,
    }


def test_a_picture_in_bands_is_the_picture(monkeypatch):
    monkeypatch.setattr(visualise, "SMOOTH_SIDE", 0)
    monkeypatch.setattr(visualise, "BAND_PIXELS", 7 * WIDTH)
    image = np.asarray(scene("RGB"))
    objects = drawn_objects()
    picture = np.asarray(visualise.draw(image, **objects))
    bands = list(visualise.draw_in_bands(image, **objects))
    assert len(bands) > 5 and (np.concatenate(bands) == picture).mean() > 0.999
    bands = list(visualise.draw_in_bands(image, **objects, step=16))
    assert [len(band) for band in bands] == [16, 16, 16, 13]


def test_a_large_image_and_its_true_objects_are_shown_shrunk(demo, monkeypatch):
    monkeypatch.setattr(visualise, "SHRUNK_SIDE", 40)
    record = read_dataset(demo)["valid"].images[0]
    image = large_images.load_for_tiles(record)
    names = ["cell"] * len(record.labels)
    masks = [to_rle(one, record.height, record.width) for one in record.segmentations]
    shown = visualise.draw_shrunk(image, record.boxes, names, None, masks)
    assert shown.size == (record.width // 3, record.height // 3)
    whole = visualise.draw(image[:], record.boxes, names, None, masks).reduce(3)
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(whole)).mean() < 10
    assert class_sheet(read_dataset(demo)["valid"]).width > 0


def test_pictures_written_in_bands_are_plain_files(tmp_path):
    image = np.asarray(scene("RGB").resize((333, 300)))
    parts = [image[top : top + 128] for top in range(0, 300, 128)]
    write_png(tmp_path / "a.png", iter(parts), 300, 333)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == image).all()
    write_jpeg(tmp_path / "a.jpg", iter(parts), 300, 333, 92)
    Image.fromarray(image).save(tmp_path / "b.jpg", quality=92, subsampling="4:2:0")
    assert (
        np.asarray(Image.open(tmp_path / "a.jpg")) == np.asarray(Image.open(tmp_path / "b.jpg"))
    ).all()
    with pytest.raises(UserError, match="at most 65,500 pixels a side"):
        write_jpeg(tmp_path / "c.jpg", iter(parts), 300, 70_000, 92)


def test_a_large_mask_is_encoded_in_parts(monkeypatch):
    pixels = np.random.default_rng(0).random((40, 30)) < 0.7
    whole = encode_window(3, 5, pixels, 50, 60)
    monkeypatch.setattr(masks, "PIXELS_AT_ONCE", 100)
    assert encode_window(3, 5, pixels, 50, 60) == whole


def test_columns_of_a_mask():
    pixels = np.asfortranarray(np.random.default_rng(0).random((40, 30)) < 0.3)
    for mask in (pixels, pixels & False, pixels | True):
        rle = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert (columns_of(rle, 0, 30) == mask).all()
        assert (columns_of(rle, 7, 19) == mask[:, 7:19]).all()


@pytest.mark.parametrize("pictures", ["png", "jpg"])
def test_a_large_image_is_predicted_as_an_array_is(stage2, tmp_path, call, pictures):
    file = tmp_path / "scene.tif"
    scene("RGB").save(file)
    words = ["--checkpoint", stage2.folder, "--input", file, "--device", "cpu", "--output", "found"]
    call(predict.main, *words, "--tile", 48, "--threshold", 0.1, "--pictures", pictures)
    records = json.loads((tmp_path / "found/predictions.json").read_text())
    model = RFDETR(stage2.folder / "best.pt", device="cpu")
    expected = model.predict(np.asarray(scene("RGB")), 0.1, tile=48)
    assert len(expected) and [record["mask"] for record in records] == expected.rles
    assert Image.open(tmp_path / "found" / records[0]["picture"]).size == (WIDTH, HEIGHT)
    found = model.predict(file, 0.1, tile=48)
    found.save_picture(tmp_path / "again.png")
    assert (found.image == np.asarray(scene("RGB"))).all() and found.rles == expected.rles


def test_a_split_in_tiles_reads_large_images_alike(demo, monkeypatch):
    split = read_dataset(demo)["valid"]
    tiling = Tiling(40, 0.2)
    large = SplitDataset(split, 32, None, True, tiling=tiling)
    samples = [large[index, None] for index in range(len(large))]
    assert isinstance(large.last_read[1], ImageOnDisk)
    monkeypatch.setattr(large_images, "LARGE", 1 << 25)
    small = SplitDataset(split, 32, None, True, tiling=tiling)
    for index, sample in enumerate(samples):
        assert torch.equal(sample["image"], small[index, None]["image"])
    large.prepare_for_workers(2)
    assert large.last_read == (None, None)  # an open file goes to no other process


def test_small_images_stay_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(large_images, "LARGE", HEIGHT * WIDTH)
    scene("RGB").save(tmp_path / "a.png")
    assert type(read_for_tiles(tmp_path / "a.png", True)) is np.ndarray


@pytest.mark.parametrize("name", ["rgb.png", "strips.tif", "rgb.bmp"])
def test_large_images_are_checked_in_parts(name, tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "LARGE", 0)
    mode, options = BY_PARTS[name]
    path = tmp_path / name
    scene(mode).save(path, **options)
    faults, _, _, checksum, _ = image_files.read_image_file(path, (WIDTH, HEIGHT), True)
    assert faults == {} and checksum == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes()[:-2000])
    faults = image_files.read_image_file(path, (WIDTH, HEIGHT), True)[0]
    assert list(faults) == ["IMG_CORRUPT"]


def test_a_disk_without_room_for_the_pixels_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(large_images, "free_disk", lambda folder: 1000)
    scene("RGB").save(tmp_path / "a.png")
    with pytest.raises(UserError, match="environment variable TMPDIR"):
        read_for_tiles(tmp_path / "a.png", True)


def test_many_pixels_are_a_bomb_only_in_a_file_of_a_few_bytes(tmp_path):
    """A blank image of 14,000 x 14,000 pixels, as PNG and as a TIFF of that many bytes."""
    side = 14_000
    blank = tmp_path / "blank.png"
    size = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side * (1 + side // 8)), 1)
    chunks = [(b"IHDR", size), (b"IDAT", rows), (b"IEND", b"")]
    blank.write_bytes(bands.PNG_SIGNATURE + b"".join(bands.png_chunk(*one) for one in chunks))
    with pytest.raises(UserError, match="196,000,000 pixels in a file of a few bytes"):
        read_for_tiles(blank, True)
    with open(blank, "ab") as file:
        file.truncate(1 << 20)  # after its end: what a true image would hold
    assert large_images.count_pixels(blank) == side**2
