"""Image files of any kind: pixels or a sentence, and the run folder whole."""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import CONFIGS, CPU, read_json
from tests.fuzz.profiles import assert_whole, examples, refusal, time_limit, tried
from tta_lightning.data import ImageFolder, Stream, UnlabelledImages
from tta_lightning.data.images import BadImageError, read_image
from tta_lightning.data.source import ImageSource

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
DEEP = ("I;16", "I;16B", "I", "F")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "ICO", "EPS", "PDF", "TGA", "PCX")
HUGE = 60_000  # px a side, in the header alone


def noise(mode, width, height):
    """A picture of noise in a mode of Pillow."""
    rng = np.random.default_rng(0)
    if mode in DEEP:
        types = {"I;16": "<u2", "I;16B": ">u2", "I": np.int32, "F": np.float32}
        pixels = rng.integers(0, 65536, (height, width)).astype(types[mode])
        return Image.frombytes(mode, (width, height), pixels.tobytes())
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode in ("LAB", "RGBX", "PA"):  # nothing converts to some of them
        length = width * height * len(Image.new(mode, (1, 1)).getbands())
        return Image.frombytes(mode, (width, height), rng.bytes(length))
    return image.convert(mode)


def encoded(image, kind, orientation, frames):
    """The bytes of a file; PNG where the format does not hold the mode."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    options = {"save_all": True, "append_images": [image] * frames} if frames else {}
    for format_, picture in ((kind, image), ("PNG", image), ("PNG", Image.new("RGB", (3, 2)))):
        try:
            picture.save(file, format=format_, exif=exif.tobytes(), **options)
        except Exception:  # an encoder raises anything where it cannot hold the mode
            file = io.BytesIO()
            continue
        return file.getvalue()
    raise AssertionError("a small RGB picture can be a PNG")


def bomb(kind):
    """A small file whose header speaks of billions of pixels."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, format=kind)
    data = bytearray(file.getvalue())
    if kind == "PNG":
        data[16:24] = HUGE.to_bytes(4, "big") * 2
    elif kind == "BMP":
        data[18:26] = HUGE.to_bytes(4, "little") * 2
    else:
        data[6:10] = HUGE.to_bytes(2, "little") * 2
    return bytes(data)


@st.composite
def files(draw):
    """Bytes of pictures, whole and damaged, and of other things."""
    kind = draw(st.sampled_from(["picture"] * 6 + ["bomb", "text", "bytes"]))
    if kind == "bomb":
        return bomb(draw(st.sampled_from(["PNG", "BMP", "GIF"])))
    if kind == "text":
        return draw(st.sampled_from([b"", b"\n", b"hello", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0"]))
    if kind == "bytes":
        start = draw(st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"RIFF"]))
        return start + draw(st.binary(max_size=60))
    side = st.integers(1, 40)
    image = noise(draw(st.sampled_from([*MODES, *DEEP])), draw(side), draw(side))
    orientation = draw(st.integers(0, 9))
    data = encoded(image, draw(st.sampled_from(FORMATS)), orientation, draw(st.integers(0, 2)))
    match draw(st.sampled_from(["whole", "cut", "flip", "flip", "zero", "longer"])):
        case "cut":
            return data[: draw(st.integers(0, len(data)))]
        case "flip":
            changed = bytearray(data)
            for _ in range(draw(st.integers(1, 4))):
                place = draw(
                    st.integers(0, min(len(data), 200) - 1) | st.integers(0, len(data) - 1)
                )
                changed[place] = draw(st.integers(0, 255))
            return bytes(changed)
        case "zero":
            place = draw(st.integers(0, len(data)))
            return data[:place] + bytes(len(data) - place)
        case "longer":
            return data + b"more"
    return data


@examples(4)
@given(files())
@example(b"")
@example(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
@example(bomb("PNG"))
def test_bytes_are_pixels_or_a_sentence(data):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "1.jpg")
        file.write_bytes(data)
        found = []
        error = refusal(lambda: found.append(read_image(file)))
    if error is not None:
        assert isinstance(error, BadImageError)
        assert str(file) in str(error)
        assert len(str(error).splitlines()) == 1
        return
    assert found[0].dtype == np.uint8
    assert found[0].shape[2] == 3
    assert found[0].size > 0
    assert found[0].flags.writeable


def test_every_mode_that_a_png_or_a_tiff_holds():
    for mode in (*MODES, *DEEP):
        for kind in ("PNG", "TIFF"):
            data = encoded(noise(mode, 5, 4), kind, 6, 0)
            file = io.BytesIO(data)
            refusal(lambda file=file: read_image(file))


# Names that files have, and things that are not files ---------------------------------------------

ODD_NAMES = ("a\nb.png", "é.png", "名.png", "$x_1$.png", "a,b'\".png", os.fsdecode(b"\xff\xfe.png"))
NAMES = st.sampled_from(["1.jpg", "2.PNG", "3.jpeg", ".hidden.png", "x.txt", "-.bmp", *ODD_NAMES])


@st.composite
def trees(draw):
    """What stands in a folder: names of entries to their kind or content."""
    entry = st.sampled_from(["good", "folder", "loop", "dangling", "link", "pipe", "up"]) | files()
    return draw(st.dictionaries(NAMES, entry, min_size=1, max_size=4))


def plant(folder, entries):
    """Write the entries, among them links to each other and to where they stand."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, entry in entries.items():
        place = folder / name
        match entry:
            case bytes():
                place.write_bytes(entry)
            case "good":
                Image.new("RGB", (32, 32), "red").save(place, format="png")
            case "folder":
                place.mkdir()
                Image.new("RGB", (32, 32), "blue").save(place / "in.png")
            case "loop":
                place.symlink_to(name)
            case "dangling":
                place.symlink_to("nowhere.png")
            case "link":
                place.symlink_to(folder.resolve(), target_is_directory=True)
            case "up":
                place.symlink_to("..", target_is_directory=True)
            case "pipe":
                os.mkfifo(place)


def read_all(source: ImageSource):
    for index in range(len(source)):
        source.digest()
        with contextlib.suppress(BadImageError):
            source.load(index)


@examples(1.5)
@given(trees(), trees())
@example({"1.jpg": "pipe"}, {"1.jpg": "loop"})
@example({"1.jpg": "folder", "2.PNG": "link"}, {"1.jpg": "up", "2.PNG": "good"})
def test_a_folder_is_read_or_refused(cats, dogs):
    with tempfile.TemporaryDirectory() as folder:
        plant(Path(folder, "cat"), cats)
        plant(Path(folder, "dog"), dogs)
        refusal(lambda: read_all(UnlabelledImages(folder)))
        refusal(lambda: read_all(ImageFolder(folder)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path):
    plant(tmp_path / "cat", {"1.jpg": "good", "2.jpg": "good"})
    (tmp_path / "cat" / "1.jpg").chmod(0)
    read_all(UnlabelledImages(tmp_path))
    assert isinstance(refusal(lambda: read_image(tmp_path / "cat" / "1.jpg")), BadImageError)
    (tmp_path / "cat").chmod(0)
    assert refusal(lambda: UnlabelledImages(tmp_path)) is not None
    (tmp_path / "cat").chmod(0o700)


@examples(0.1)
@given(st.integers(1, 3), st.integers(1, 3000), st.booleans(), st.sampled_from([1, 32, 224]))
def test_long_and_narrow_images_are_cropped_or_bad(short, long, upright, size):
    width, height = (short, long) if upright else (long, short)
    pixels = np.zeros((height, width, 3), np.uint8)

    class One(ImageSource):
        labels = np.zeros(1, np.int64)

        def load(self, index, corruption="none", severity=0):
            return pixels

        def path(self, index, corruption="none", severity=0):
            return "one"

    def serve():
        (batch,) = Stream(One(), image_size=size).test_dataloader()
        assert len(batch.labels) + len(batch.bad) == 1
        assert batch.bad or batch.images.shape == (1, 3, size, size)

    assert refusal(serve) is None


# From the command line ----------------------------------------------------------------------------


@examples(0.12)
@given(trees(), st.sampled_from(["stop", "skip"]))
@example({"1.jpg": "good", os.fsdecode(b"\xff\xfe.png"): "good"}, "stop")
@example({"1.jpg": "good", "a\nb.png": b"damaged"}, "stop")
@example({"1.jpg": "good", "a\nb.png": b"damaged"}, "skip")
@example({"1.jpg": "pipe"}, "skip")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_over_any_folder_ends_in_results_or_a_sentence(tta, entries, on_bad_image):
    with tempfile.TemporaryDirectory() as place:
        plant(Path(place, "images"), entries)
        with time_limit():
            outcome = tta(
                Path(place),
                *("adapt", "-c", CONFIGS / "adapt" / "source.yaml", *CPU),
                *("--model.network", '{"class_path": "tta_lightning.models.SmallConvNet"}'),
                *("--data", "Stream", "--data.source", "UnlabelledImages"),
                *("--data.source.root", "images", "--data.image_size", "32"),
                *("--data.batch_size", "1", "--data.on_bad_image", on_bad_image),
                *("--trainer.run_dir", "run"),
            )
        tried["runs"] += 1
        assert outcome.code in (0, 2)
        assert "Traceback" not in outcome.err + outcome.out
        if outcome.code == 2:
            (line,) = outcome.err.splitlines()
            assert line.startswith("error: ")
        run = Path(place, "run")
        assert_whole(run)
        if run.exists():
            metrics = read_json(run / "metrics.json")
            assert metrics["completed"] == (outcome.code == 0)
