"""Small image files for the tests of readers."""

from pathlib import Path

from PIL import Image

from tta_lightning.data.source import ImageSource


def put_images(root: Path, *names: str) -> Path:
    """Write an image of one colour for each name; the colour is the position of the name."""
    for value, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2), (value,) * 3).save(file, format="png")
    return root


def colours(source: ImageSource) -> list[int]:
    return [int(source.load(index)[0, 0, 0]) for index in range(len(source))]
