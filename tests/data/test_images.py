"""Decoding of picture files: every mode, and every way in which a file can be bad."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tta_lightning.data.images import BadImageError, read_image
from tta_lightning.errors import InputError

COLOURS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [40, 50, 60], [70, 80, 90]]],
    dtype=np.uint8,
)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_colours_come_back_exactly_and_may_be_changed(tmp_path, suffix):
    file = tmp_path / f"x.{suffix}"
    Image.fromarray(COLOURS).save(file, lossless=True)
    pixels = read_image(file)
    np.testing.assert_array_equal(pixels, COLOURS)
    assert pixels.dtype == np.uint8
    pixels[0, 0] = 7  # torch.from_numpy warns about arrays that cannot be written
    np.testing.assert_array_equal(read_image(str(file)), COLOURS)


def test_content_decides_and_not_the_suffix(tmp_path):
    file = tmp_path / "x.jpg"
    Image.fromarray(COLOURS).save(file, format="png")
    np.testing.assert_array_equal(read_image(file), COLOURS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_agrees_with_pillow(tmp_path, orientation):
    file = tmp_path / "x.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS).save(file, exif=exif)
    with Image.open(file) as stored:
        expected = np.array(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(read_image(file), expected)


def test_exif_orientation_6_turns_a_row_into_a_column(tmp_path):
    file = tmp_path / "x.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOURS[:1]).save(file, exif=exif)
    np.testing.assert_array_equal(read_image(file), COLOURS[:1].transpose(1, 0, 2))


@pytest.mark.parametrize("exif", [b"nonsense", b"II*\0\x08"])
def test_damaged_exif_does_not_lose_the_picture(tmp_path, exif):
    file = tmp_path / "x.png"
    Image.fromarray(COLOURS).save(file)
    content = file.read_bytes()
    chunk = b"eXIf" + exif
    chunk = struct.pack(">I", len(exif)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    after_header = 8 + 25  # signature and IHDR chunk
    file.write_bytes(content[:after_header] + chunk + content[after_header:])
    with Image.open(file) as picture:
        picture.load()
        with pytest.raises((SyntaxError, struct.error)):
            picture.getexif()
    np.testing.assert_array_equal(read_image(file), COLOURS)


@pytest.mark.parametrize(
    ("mode", "value"), [("1", 255), ("L", 77), ("P", 77), ("LA", (77, 255)), ("RGB", (77,) * 3)]
)
def test_gray_modes_become_three_equal_channels(tmp_path, mode, value):
    file = tmp_path / "x.png"
    picture = Image.new("L", (3, 2), 77).convert("P") if mode == "P" else None
    (picture or Image.new(mode, (3, 2), value)).save(file)
    np.testing.assert_array_equal(read_image(file), np.full((2, 3, 3), 255 if mode == "1" else 77))


@pytest.mark.parametrize(
    ("dtype", "suffix"),
    [("<u2", "png"), (">u2", "tiff"), ("<u2", "tiff"), ("<i4", "tiff"), ("<u2", "pgm")],
)
def test_16_bit_gray_keeps_the_upper_byte(tmp_path, dtype, suffix):
    file = tmp_path / f"x.{suffix}"
    Image.fromarray(np.array([[0, 255, 256, 0x1234, 0xFFFF]], dtype=dtype)).save(file)
    expected = np.array([0, 0, 1, 0x12, 0xFF])
    np.testing.assert_array_equal(read_image(file)[0, :, 1], expected)


def test_32_bit_gray_is_cut_to_16_bit(tmp_path):
    file = tmp_path / "x.tiff"
    Image.fromarray(np.array([[-300, 512, 70000]], dtype=np.int32)).save(file)
    np.testing.assert_array_equal(read_image(file)[0, :, 0], [0, 2, 255])


def test_transparency_is_laid_on_white(tmp_path):
    pixels = np.array([[[200, 100, 50, 128], [200, 100, 50, 0], [200, 100, 50, 255]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    # by hand: 200 * 128/255 + 255 * 127/255 = 227.4, and 177.2, 152.1 for the other channels
    expected = [[[227, 177, 152], [255, 255, 255], [200, 100, 50]]]
    np.testing.assert_allclose(read_image(tmp_path / "rgba.png"), expected, atol=1)

    Image.fromarray(np.array([[[0, 128], [0, 0]]], np.uint8)).save(tmp_path / "la.png")
    np.testing.assert_allclose(read_image(tmp_path / "la.png")[0, :, 0], [127, 255], atol=1)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_becomes_white(tmp_path, mode):
    file = tmp_path / "x.png"
    picture = Image.new(mode, (2, 1), 0)
    if mode == "P":
        picture.putpalette([0, 0, 0, 9, 9, 9])
    picture.putpixel((1, 0), (9, 9, 9) if mode == "RGB" else (1 if mode == "P" else 9))
    picture.save(file, transparency=(0, 0, 0) if mode == "RGB" else 0)
    np.testing.assert_array_equal(read_image(file), [[[255] * 3, [9] * 3]])


def test_cmyk_is_converted(tmp_path):
    file = tmp_path / "x.jpg"
    Image.new("CMYK", (8, 8), (255, 255, 0, 0)).save(file, quality=100)  # cyan + magenta = blue
    np.testing.assert_allclose(read_image(file)[4, 4], [0, 0, 255], atol=3)


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    file = tmp_path / "x.gif"
    later = [Image.new("RGB", (2, 2), (0, 255, 0))]
    Image.new("RGB", (2, 2), (255, 0, 0)).save(file, save_all=True, append_images=later)
    np.testing.assert_array_equal(read_image(file), np.full((2, 2, 3), [255, 0, 0]))


def encoded(format_name: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format_name)
    return buffer.getvalue()


def bad_file(folder: Path, kind: str) -> Path:
    file = folder / f"{kind}.jpg"
    if kind == "empty":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("<html>404 Not Found</html>")
    elif kind == "cut":
        file.write_bytes(encoded("jpeg")[:-200])
    elif kind == "float":
        Image.fromarray(np.zeros((2, 2), np.float32)).save(file, format="tiff")
    elif kind == "folder":
        file.mkdir()
    return file


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "the file is empty"),
        ("text", "its content is not an image"),
        ("cut", "truncated"),
        ("float", "floats of unknown range"),
        ("missing", "does not exist"),
        ("folder", "directory"),
    ],
)
def test_a_bad_file_is_named_with_the_reason(tmp_path, kind, reason):
    file = bad_file(tmp_path, kind)
    with pytest.raises(BadImageError, match=reason) as caught:
        read_image(file)
    assert str(file) in str(caught.value)
    assert isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    "limit", [600, 300]
)  # 800 px: Pillow warns above 1, refuses above 2 limits
def test_a_decompression_bomb_is_refused_without_a_warning(tmp_path, monkeypatch, limit):
    file = tmp_path / "x.png"
    Image.new("RGB", (40, 20)).save(file)
    assert read_image(file).shape == (20, 40, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BadImageError, match="too many pixels"):
        read_image(file)


@pytest.mark.parametrize("format_name", ["jpeg", "png", "webp", "bmp", "gif"])
def test_damaged_bytes_give_an_image_or_a_bad_image_error(tmp_path, format_name):
    whole = encoded(format_name)
    rng = np.random.default_rng(1)
    file = tmp_path / "x.jpg"
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole[: rng.integers(1, len(whole))])
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = rng.integers(0, 256)
        file.write_bytes(damaged)
        try:
            assert read_image(file).shape[2] == 3
        except BadImageError:
            refused += 1
    assert refused > 30  # most are damaged beyond reading
