"""Readers of published data sets, on small files laid out like the real ones."""

import hashlib
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from tests.data.image_files import colours, put_images
from tta_lightning.data.classes import (
    CIFAR10_NAMES,
    CIFAR100_NAMES,
    class_indices,
    imagenet_wnids,
)
from tta_lightning.data.datasets import (
    CIFAR10C,
    CIFAR100C,
    ImageNetC,
    ImageNetVariant,
    TorchvisionDataset,
)
from tta_lightning.errors import InputError

SIDE = 4


def put_cifar_c(
    root: Path, count: int = 3, names: tuple[str, ...] = ("fog", "snow"), side: int = SIDE
) -> Path:
    """Write arrays in which the first pixel tells corruption, severity and index."""
    root.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        images = np.zeros((5 * count, side, side, 3), np.uint8)
        images[:, 0, 0, 0] = number
        images[:, 0, 0, 1] = np.repeat(np.arange(1, 6), count)
        images[:, 0, 0, 2] = np.tile(np.arange(count), 5)
        np.save(root / f"{name}.npy", images)
    np.save(root / "labels.npy", np.tile(np.arange(count)[::-1] % 10, 5).astype(np.uint8))
    return root


class TestCIFARC:
    def test_every_image_of_every_domain(self, tmp_path):
        source = CIFAR10C(str(put_cifar_c(tmp_path)))
        assert len(source) == 3
        assert source.labels.tolist() == [2, 1, 0]
        assert source.labels.dtype == np.int64
        assert source.domains == tuple((n, s) for n in ("fog", "snow") for s in range(1, 6))
        for corruption, severity in source.domains:
            for index in range(3):
                image = source.load(index, corruption, severity)
                number = ("fog", "snow").index(corruption)
                assert image[0, 0].tolist() == [number, severity, index]
                assert type(image) is np.ndarray
                assert image.flags.writeable
        assert source.path(2, "snow", 4) == "snow.npy[11]"
        assert source.path(2) == "labels.npy[2]"

    def test_a_pickle_does_not_hold_the_images(self, tmp_path):
        root = put_cifar_c(tmp_path, count=2)
        np.save(root / "fog.npy", np.zeros((10, 99, 99, 3), np.uint8))
        source = CIFAR10C(root)
        before = source.load(1, "snow", 5)
        source.load(1, "fog", 5)
        pickled = pickle.dumps(source)
        assert len(pickled) < 3000
        np.testing.assert_array_equal(pickle.loads(pickled).load(1, "snow", 5), before)

    def test_class_names(self, tmp_path):
        put_cifar_c(tmp_path)
        assert CIFAR10C(tmp_path).classes == CIFAR10_NAMES
        assert CIFAR100C(tmp_path).classes == CIFAR100_NAMES
        assert len(CIFAR10_NAMES) == len(set(CIFAR10_NAMES)) == 10
        assert len(CIFAR100_NAMES) == len(set(CIFAR100_NAMES)) == 100
        assert list(CIFAR100_NAMES) == sorted(CIFAR100_NAMES)
        # published label numbers
        assert [CIFAR10_NAMES[i] for i in (0, 3, 5, 9)] == ["airplane", "cat", "dog", "truck"]
        some = ["apple", "bus", "maple_tree", "pickup_truck", "tractor", "worm"]
        assert [CIFAR100_NAMES[i] for i in (0, 13, 47, 58, 89, 99)] == some

    @pytest.mark.parametrize(
        ("corruption", "severity", "message"),
        [
            ("none", 0, "holds no clean images. Stored corruptions: fog, snow"),
            ("fogg", 1, "Unknown corruption 'fogg'. Did you mean 'fog'"),
            ("fog", 6, "'fog' is not stored at severity 6 in .*; it is at 1, 2, 3, 4, 5"),
        ],
    )
    def test_domains_that_are_not_there(self, tmp_path, corruption, severity, message):
        source = CIFAR10C(put_cifar_c(tmp_path))
        with pytest.raises(InputError, match=message):
            source.load(0, corruption, severity)

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("labels", np.zeros(3, np.uint8), "labels.npy has 3 labels, but 'fog.npy' has 15"),
            ("labels", np.zeros(15), "labels.npy in .* is float64"),
            ("labels", np.arange(15) % 10, "differs between severities"),
            ("labels", np.full(15, 10), "goes from 10 to 10. Expected 0 to 9 for CIFAR10C"),
            ("snow", np.zeros((15, 4, 4, 3), np.float32), "snow.npy' is float32"),
            ("snow", np.zeros((15, 3, 4, 4), np.uint8), r"is uint8 of shape \[15, 3, 4, 4\]"),
            (
                "snow",
                np.zeros((14, 4, 4, 3), np.uint8),
                "holds 14 images. Expected a multiple of 5",
            ),
            ("snow", np.zeros((0, 4, 4, 3), np.uint8), r"shape \[0, 4, 4, 3\]"),
        ],
    )
    def test_arrays_that_do_not_fit(self, tmp_path, file, content, message):
        np.save(put_cifar_c(tmp_path) / f"{file}.npy", content)
        with pytest.raises(InputError, match=message):
            CIFAR10C(tmp_path)

    @pytest.mark.parametrize("kept", [0, 5, 300])
    def test_a_damaged_file_is_named(self, tmp_path, kept):
        file = put_cifar_c(tmp_path) / "snow.npy"
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(InputError, match=r"Cannot read '.*snow\.npy'.*download"):
            CIFAR10C(tmp_path)

    def test_folders_without_the_arrays(self, tmp_path):
        with pytest.raises(
            InputError, match=r"does not exist. Expected a folder with one <corrupt"
        ):
            CIFAR10C(tmp_path / "nowhere")
        with pytest.raises(
            InputError, match=r"holds nothing. Expected a folder with one <corruptio"
        ):
            CIFAR10C(tmp_path)
        (put_cifar_c(tmp_path) / "labels.npy").unlink()
        with pytest.raises(InputError, match=r"'fog.npy', 'snow.npy' \(2 in all\)"):
            CIFAR10C(tmp_path)
        np.save(tmp_path / "._fog.npy", np.zeros(3))
        np.save(tmp_path / "labels.npy", np.zeros(15, int))
        assert {name for name, _ in CIFAR10C(tmp_path).domains or ()} == {"fog", "snow"}


WNIDS = ("n01440764", "n01443537")


def put_imagenet_c(root: Path) -> Path:
    shared = [f"{wnid}/{file}.JPEG" for wnid in WNIDS for file in "ba"]
    domains = [f"{name}/{severity}" for name in ("fog", "snow") for severity in (3, 5)]
    return put_images(root, *(f"{domain}/{file}" for domain in domains for file in shared))


class TestImageNetC:
    def test_every_image_of_every_domain(self, tmp_path):
        put_images(put_imagenet_c(tmp_path), "README.txt", "fog/notes/x.png")
        source = ImageNetC(tmp_path)
        assert source.domains == (("fog", 3), ("fog", 5), ("snow", 3), ("snow", 5))
        assert source.classes == WNIDS
        assert source.labels.tolist() == [0, 0, 1, 1]
        values = [source.load(i, *domain)[0, 0, 0] for domain in source.domains for i in range(4)]
        # put_images wrote b before a, four images a domain
        assert values == [base + k for base in (0, 4, 8, 12) for k in (1, 0, 3, 2)]
        assert source.path(2, "snow", 5) == "snow/5/n01443537/a.JPEG"
        assert source.path(2) == "n01443537/a.JPEG"
        listing = "".join(f"{source.path(i)}\t{source.labels[i]}\n" for i in range(4))
        assert source.digest() == hashlib.sha256(listing.encode()).hexdigest()

    def test_a_domain_with_other_files_is_refused_when_first_read(self, tmp_path):
        put_imagenet_c(tmp_path)
        (tmp_path / "snow/5/n01440764/b.JPEG").unlink()
        put_images(tmp_path, "snow/5/n01440764/c.JPEG")
        source = ImageNetC(tmp_path)
        source.load(0, "snow", 3)
        message = (
            r"The files in snow/5 of .* differ from those in fog/3; 1 missing: "
            r"'n01440764/b.JPEG'; 1 that fog/3 lacks: 'n01440764/c.JPEG'"
        )
        for _ in range(2):
            with pytest.raises(InputError, match=message):
                source.load(0, "snow", 5)
        put_images(tmp_path, "fog/5/n01443537/d.JPEG")
        with pytest.raises(InputError, match=r"from those in fog/3; 1 that fog/3 lacks: .*/d"):
            source.load(0, "fog", 5)

    def test_domains_that_are_not_there(self, tmp_path):
        source = ImageNetC(put_imagenet_c(tmp_path))
        with pytest.raises(InputError, match=r"severity 4 in .*; it is at 3, 5"):
            source.load(0, "fog", 4)
        with pytest.raises(InputError, match=r"holds no clean images"):
            source.load(0)

    def test_other_layouts(self, tmp_path):
        put_images(tmp_path, "weather/fog/1/n01440764/a.png", "flat/snow/1/a.png")
        with pytest.raises(
            InputError, match=r"'flat/', 'weather/' \(2 in all\). Expected folders <"
        ):
            ImageNetC(tmp_path)
        with pytest.raises(
            InputError, match=r"snow/1' holds 'a.png' \(1 in all\). Expected one fo"
        ):
            ImageNetC(tmp_path / "flat")


class TestImageNetVariant:
    def test_wnids_agree_with_timm(self):
        info = pytest.importorskip("timm.data").ImageNetInfo("imagenet-1k")
        assert list(imagenet_wnids()) == info.label_names()
        assert len(set(imagenet_wnids("r"))) == len(set(imagenet_wnids("a"))) == 200
        assert set(imagenet_wnids("r") + imagenet_wnids("a")) < set(imagenet_wnids())
        assert imagenet_wnids("r") != imagenet_wnids("a")

    @pytest.mark.parametrize("name", ["r", "a", "sketch"])
    def test_classes_are_the_wnids_found(self, tmp_path, name):
        # tench is in ImageNet-1k only, goldfish in R, and both R and A have n01498041 (stingray)
        some = {"r": "n01443537", "a": "n01498041", "sketch": "n01440764"}[name]
        put_images(tmp_path, "n01498041/a.jpg", f"{some}/b.png", "README.txt")
        source = ImageNetVariant(tmp_path, name)
        assert source.classes == tuple(sorted({"n01498041", some}))
        assert source.describe()["name"] == name
        assert class_indices(source.classes, imagenet_wnids())[-1] == 6  # stingray

    @pytest.mark.parametrize("name", ["r", "a"])
    def test_unknown_wnids_are_named(self, tmp_path, name):
        put_images(tmp_path, "n01498041/a.jpg", "n01440764/b.jpg")
        message = f"not look like ImageNet-{name.upper()}.* found 1 unknown folders: 'n01440764'"
        with pytest.raises(InputError, match=message):
            ImageNetVariant(tmp_path, name)

    def test_v2_folders_are_numbers(self, tmp_path):
        put_images(tmp_path, "10/a.jpeg", "2/a.jpeg", "0/a.jpeg")
        source = ImageNetVariant(tmp_path, "v2")
        # tench, great white shark, brambling: labels 0, 2 and 10
        assert source.classes == ("n01440764", "n01484850", "n01530575")
        assert colours(source) == [2, 1, 0]
        assert class_indices(source.classes, imagenet_wnids()) == [0, 2, 10]
        put_images(tmp_path, "1000/a.jpeg")
        with pytest.raises(InputError, match=r"unknown folders: '1000'"):
            ImageNetVariant(tmp_path, "v2")

    def test_folders_one_level_off(self, tmp_path):
        put_images(tmp_path, "imagenet-r/n01498041/a.jpg")
        with pytest.raises(InputError, match=r"'imagenet-r'. Give the folder that directly holds"):
            ImageNetVariant(tmp_path, "r")
        with pytest.raises(InputError, match=r"found none"):
            ImageNetVariant(tmp_path / "imagenet-r" / "n01498041", "r")
        with pytest.raises(InputError, match=r"Unknown ImageNet variant 'sketsch'"):
            ImageNetVariant(tmp_path, "sketsch")


def put_idx(file: Path, values: np.ndarray) -> None:
    """Write the format of MNIST: two zero bytes, 8 for uint8, the number of axes, the sizes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    file.write_bytes(header + values.tobytes())


class TestTorchvisionDataset:
    def test_fashion_mnist_is_padded_and_gray(self, tmp_path):
        raw = tmp_path / "FashionMNIST" / "raw"
        images = np.arange(2 * 28 * 28, dtype=np.uint32).reshape(2, 28, 28).astype(np.uint8)
        for part, pixels in (("train", images), ("t10k", images[::-1].copy())):
            put_idx(raw / f"{part}-images-idx3-ubyte", pixels)
            put_idx(raw / f"{part}-labels-idx1-ubyte", np.array([9, 2], np.uint8))
        source = TorchvisionDataset("FashionMNIST", str(tmp_path))
        assert source.labels.tolist() == [9, 2]
        assert source.classes is not None
        assert source.classes[9] == "Ankle boot"
        image = source.load(0)
        assert image.shape == (32, 32, 3)
        np.testing.assert_array_equal(image[2:30, 2:30, 1], images[1])
        assert int(image.sum()) == 3 * int(images[1].sum())
        assert source.path(1) == "FashionMNIST/test[1]"
        described = source.describe()
        assert (described["name"], described["split"]) == ("FashionMNIST", "test")
        assert described["root"] == str(tmp_path)

    def test_cifar10_keeps_rows_and_columns_in_place(self, tmp_path, monkeypatch):
        cifar = pytest.importorskip("torchvision.datasets.cifar")
        monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)  # not the published bytes
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        planes = np.arange(2 * 3072).reshape(2, 3072) % 251  # red plane, green plane, blue plane
        batch = {"data": planes.astype(np.uint8), "labels": [3, 8]}
        (folder / "test_batch").write_bytes(pickle.dumps(batch))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_NAMES)}))
        source = TorchvisionDataset("CIFAR10", tmp_path, split="test")
        assert source.classes == CIFAR10_NAMES
        assert source.labels.tolist() == [3, 8]
        row, column = 5, 7
        expected = [planes[1, channel * 1024 + row * 32 + column] for channel in range(3)]
        assert source.load(1)[row, column].tolist() == expected

    def test_svhn_puts_the_channels_last(self, tmp_path, monkeypatch):
        io = pytest.importorskip("scipy.io")
        svhn = pytest.importorskip("torchvision.datasets.svhn")
        monkeypatch.setattr(svhn, "check_integrity", lambda *_: True)  # not the published bytes
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 2), dtype=np.uint8)
        io.savemat(tmp_path / "test_32x32.mat", {"X": pixels, "y": np.array([[10], [4]])})
        source = TorchvisionDataset("SVHN", tmp_path)
        assert source.labels.tolist() == [0, 4]
        assert source.classes == tuple("0123456789")
        np.testing.assert_array_equal(source.load(1), pixels[..., 1])

    @pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "KMNIST", "SVHN", "STL10"])
    def test_offline_the_folder_and_the_files_are_named(self, tmp_path, monkeypatch, name):
        datasets = pytest.importorskip("torchvision.datasets")

        def offline(self: object) -> None:
            raise URLError("no internet")

        monkeypatch.setattr(getattr(datasets, name), "download", offline)
        folder, file = {
            "CIFAR10": ("cifar-10-batches-py", "data_batch_5"),
            "CIFAR100": ("cifar-100-python", "meta"),
            "KMNIST": ("KMNIST/raw", "t10k-labels-idx1-ubyte"),
            "SVHN": ("", "test_32x32.mat"),
            "STL10": ("stl10_binary", "test_y.bin"),
        }[name]
        message = rf"{tmp_path / folder}' and could not be downloaded: .*no internet.*{file}"
        with pytest.raises(InputError, match=message):
            TorchvisionDataset(name, tmp_path)
        with pytest.raises(InputError, match=r"`download` is false.*Set `download` to true, or"):
            TorchvisionDataset(name, tmp_path, download=False)

    def test_unknown_names(self, tmp_path):
        with pytest.raises(InputError, match=r"Did you mean 'CIFAR10'"):
            TorchvisionDataset("CIFAR-10", tmp_path)
        with pytest.raises(InputError, match=r"Unknown split 'val'"):
            TorchvisionDataset("CIFAR10", tmp_path, split="val")
