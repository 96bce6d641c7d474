"""The training stream of a learned rule: which images, under what, in which order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule

from tests.streams import CLASSES, make_source
from tta_lightning.data import CIFAR10C, ArraySource, BadImageError, ShiftedImages
from tta_lightning.data.corruptions import EXTRA, corrupt
from tta_lightning.data.geometry import Geometry
from tta_lightning.errors import InputError
from tta_lightning.trainer import Trainer

NAMES = ("contrast", "speckle_noise")


def make_data(count=20, source=None, **options):
    """By default 12 pairs out of 16 images and 2 corruptions; 4 images are held out."""
    given = {
        "corruptions": list(NAMES),
        "severity": 3,
        "images": 12,
        "batch_size": 2,
        "val_images": 8,
        "val_batch_size": 3,
    }
    return ShiftedImages(make_source(count) if source is None else source, **{**given, **options})


def pixels(image):
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def book(data, size=None, **options):
    """Pixels to (index, corruption), for every pair that there could be."""
    geometry = Geometry(size)
    return {
        corrupt(geometry(data.source.load(index)), name, 3, index=index, **options).tobytes(): (
            index,
            name,
        )
        for index in range(len(data.source))
        for name in NAMES
    }


def served(data, loader, **options):
    """Each batch as its segment and its list of (index, corruption)."""
    pairs = book(data, **options)
    found = []
    for images, labels, segment in loader:
        batch = [pairs[pixels(image).tobytes()] for image in images]
        assert labels.tolist() == [data.source.labels[index] for index, _ in batch]
        found.append((segment, batch))
    return found


def epoch(data, number=0):
    """What one epoch of training serves."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return served(data, loader)


def flat(batches):
    return [pair for _, batch in batches for pair in batch]


def on_rank(rank, world, **options):
    data = make_data(**options)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return data


@pytest.mark.parametrize("order", ["mixed", "separate"])
def test_every_epoch_serves_the_same_pairs_once_each(order):
    data = make_data(order=order, batch_size=3, images=30)
    drawn = {
        (int(data.train_plan.samples[p]), data.train_plan.domain(p).corruption) for p in range(30)
    }
    assert len(drawn) == 30
    for number in range(3):
        pairs = flat(epoch(data, number))
        assert len(pairs) == len(set(pairs)) >= 27  # up to 2 images of a segment fill no batch
        assert set(pairs) <= drawn


def test_no_image_is_both_trained_on_and_held_out():
    data = make_data(val_images=8)
    held_out = served(data, data.val_dataloader())
    train = {index for index, _ in flat(epoch(data))}
    by_name = {name: {i for i, n in flat(held_out) if n == name} for name in NAMES}
    assert by_name[NAMES[0]] == by_name[NAMES[1]]
    assert len(by_name[NAMES[0]]) == 4
    assert not train & by_name[NAMES[0]]
    assert [(segment, len(batch)) for segment, batch in held_out] == [
        (0, 3),
        (0, 1),
        (1, 3),
        (1, 1),
    ]
    assert [name for _, name in flat(held_out)] == [NAMES[0]] * 4 + [NAMES[1]] * 4


def test_held_out_images_come_in_the_same_order_every_time():
    data = make_data()
    first, second = (served(data, data.val_dataloader()) for _ in range(2))
    assert first == second == served(on_rank(1, 2), on_rank(1, 2).val_dataloader())


def test_mixed_is_one_segment_of_all_corruptions():
    batches = epoch(make_data(order="mixed"))
    assert {segment for segment, _ in batches} == {0}
    assert any({name for _, name in batch} == set(NAMES) for _, batch in batches)


def test_separate_is_one_segment_a_corruption():
    orders = set()
    for number in range(6):
        batches = epoch(make_data(order="separate"), number)
        names = {
            segment: {name for s, batch in batches if s == segment for _, name in batch}
            for segment, _ in batches
        }
        assert [segment for segment, _ in batches] == sorted(segment for segment, _ in batches)
        assert sorted(names) == [0, 1]
        assert all(len(inside) == 1 for inside in names.values())
        orders.add(names[0].pop())
    assert orders == set(NAMES)  # which corruption comes first changes from epoch to epoch


@pytest.mark.parametrize("order", ["mixed", "separate"])
def test_the_order_is_a_function_of_seed_and_epoch_alone(order):
    torch.manual_seed(1)
    first = [epoch(make_data(order=order), number) for number in range(3)]
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    data = make_data(order=order)
    assert [epoch(data, number) for number in (2, 0, 1)] == [first[2], first[0], first[1]]
    assert flat(first[0]) != flat(first[1]) != flat(first[2])


def test_the_seed_decides_the_order():
    orders = [
        [positions for _, positions in make_data(images=32, seed=seed).train_dataloader().sampler]
        for seed in (0, 1, 0)
    ]
    assert orders[0] == orders[2] != orders[1]


def test_the_seed_decides_the_subsets_too():
    first, second = make_data(), make_data(seed=1)
    assert first.train_plan.digest != second.train_plan.digest
    assert first.train_plan.digest == make_data().train_plan.digest
    held_out = {tuple(data.val_plan.samples) for data in (first, second)}
    assert len(held_out) == 2


class Recorder(LightningModule):
    """Learns nothing and keeps what it was shown."""

    def __init__(self, data):
        super().__init__()
        self.data, self.epochs = data, []
        self.automatic_optimization = False
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_train_epoch_start(self):
        self.epochs.append([])

    def training_step(self, batch):
        self.epochs[-1] += served(self.data, [batch])

    def validation_step(self, batch):
        pass


def test_the_trainer_sets_the_epoch():
    data = make_data()
    recorder = Recorder(data)
    Trainer(
        run_dir=False,
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    ).fit(recorder, datamodule=data)
    assert recorder.epochs == [epoch(data, number) for number in range(3)]


@pytest.mark.parametrize("order", ["mixed", "separate"])
def test_two_processes_see_what_one_sees_with_twice_the_batch(order):
    options = {"order": order, "images": 30}
    for number in range(2):
        alone = epoch(make_data(batch_size=6, **options), number)
        first, second = (epoch(on_rank(r, 2, batch_size=3, **options), number) for r in range(2))
        joined = [(segment, a + b) for (segment, a), (_, b) in zip(first, second, strict=True)]
        assert joined == alone
        assert [s for s, _ in first] == [s for s, _ in second]
        assert len(alone) >= 4


@pytest.mark.parametrize("order", ["mixed", "separate"])
@pytest.mark.parametrize("world", [1, 2])
def test_what_fills_no_batch_is_left_out(order, world):
    data = on_rank(0, world, order=order, images=23, batch_size=4)
    sizes = [segment.stop - segment.start for segment in data.train_plan.segments]
    assert sum(sizes) == 23
    expected = 23 // (4 * world) if order == "mixed" else sum(n // (4 * world) for n in sizes)
    loader = data.train_dataloader()
    assert len(loader) == expected
    assert [len(batch) for _, batch in epoch(data)] == [4] * expected


def test_held_out_images_are_all_served():
    data = make_data(val_images=10, val_batch_size=4)
    assert len(data.val_dataloader()) == 4
    assert [len(images) for images, _, _ in data.val_dataloader()] == [4, 1, 4, 1]


def test_images_are_those_that_corrupt_makes():
    data = make_data(seed=7, table="cifar", corruptions=list(NAMES))
    batches = served(data, data.train_dataloader(), seed=7, table="cifar")
    assert len(flat(batches)) == 12
    images = next(iter(data.train_dataloader())).images
    assert images.shape == (2, 3, 32, 32)
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) < float(images.max()) <= 1


class Counting(ArraySource):
    """Counts how often an image is read."""

    reads = 0

    def load(self, index, corruption="none", severity=0):
        self.reads += 1
        return super().load(index, corruption, severity)


@pytest.mark.parametrize(("keep", "reads"), [(True, 12), (False, 36)])
def test_images_are_the_same_in_every_epoch_kept_or_not(keep, reads):
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    source = Counting(noise)
    data = make_data(source=source, keep_in_memory=keep)
    loader, seen = data.train_dataloader(), set()
    for number in range(3):
        loader.sampler.set_epoch(number)
        seen |= {pixels(image).tobytes() for images, _, _ in loader for image in images}
    assert len(seen) == 12
    assert source.reads == reads


def test_the_default_is_the_paper():
    data = ShiftedImages(make_source(200))
    assert tuple(domain.corruption for domain in data.train_plan.domains) == EXTRA
    assert {domain.severity for domain in data.train_plan.domains} == {5}
    assert len(data.train_plan) == 128
    assert len(data.train_dataloader()) == 64
    assert len(data.val_plan) == 512
    assert data.classes == CLASSES


def large_source():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 50, 3), dtype=np.uint8)
    return ArraySource(pixels, np.zeros(20, int))


@pytest.mark.parametrize(
    ("image_size", "suited", "size"),
    [(32, 36, 32), ("model", 36, 36), ("model", None, None), ("keep", 36, None)],
)
def test_images_have_the_size_that_was_asked_for(image_size, suited, size):
    data = make_data(source=large_source(), image_size=image_size)
    data.suit(suited, 1.0, "bilinear")
    batches = served(data, data.train_dataloader(), size=size)
    assert len(flat(batches)) == 12
    side = (40, 50) if size is None else (size, size)
    for batch in (*data.train_dataloader(), *data.val_dataloader()):
        assert tuple(batch[0].shape[2:]) == side
    assert tuple(next(data.clean_batches()).shape[2:]) == side


def test_the_crop_is_the_models_unless_given():
    own, given = make_data(source=large_source()), make_data(source=large_source(), crop_pct=0.5)
    for data in (own, given):
        data.suit(32, 0.8, "bicubic")
    assert own.geometry == Geometry(32, 0.8, "bicubic")
    assert given.geometry == Geometry(32, 0.5, "bicubic")


def test_workers_do_not_matter():
    data, workers = make_data(), make_data(num_workers=1)
    loader = workers.train_dataloader()
    for number in range(2):
        loader.sampler.set_epoch(number)
        assert served(workers, loader) == epoch(data, number)
    del loader


@pytest.mark.parametrize("given", [False, True])
def test_clean_images_are_all_of_them_uncorrupted(given):
    source, other = make_source(20), make_source(7, seed=5)
    data = make_data(source=source, clean=other if given else None)
    expected = other if given else source
    batches = list(data.clean_batches())
    assert [len(batch) for batch in batches[:-1]] == [3] * (len(expected) // 3)
    seen = sorted(pixels(image).tobytes() for batch in batches for image in batch)
    assert seen == sorted(expected.load(index).tobytes() for index in range(len(expected)))


class Damaged(ArraySource):
    def load(self, index, corruption="none", severity=0):
        raise BadImageError(f"image {index} is damaged")


def test_an_image_that_cannot_be_read_ends_it():
    source = Damaged(np.zeros((20, 32, 32, 3), np.uint8))
    with pytest.raises(InputError, match=r"training image cannot be used: image \d+ is damaged"):
        next(iter(make_data(source=source).train_dataloader()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 1}, "images = 1: expected 2 or more"),
        ({"batch_size": 1}, "batch_size = 1: expected 2 or more"),
        ({"val_images": 0}, "val_images = 0: expected 2 or more"),
        ({"val_batch_size": 1}, "val_batch_size = 1: expected 2 or more"),
        ({"order": "mixd"}, "Did you mean 'mixed'?"),
        ({"severity": 6}, "severity 6 is out of range, expected 1 to 5"),
        ({"severity": 0}, "severity 0 is out of range"),
        ({"corruptions": ["contrsat"]}, "contrast"),
        ({"corruptions": ["fog", "fog"]}, "names one twice: fog, fog"),
        ({"corruptions": []}, "empty list"),
        ({"table": "imagnet"}, "imagenet"),
        ({"image_size": 0}, "image_size = 0"),
        ({"crop_pct": 1.5}, "crop_pct = 1.5"),
        (
            {"images": 33},
            "holds 20 images: 4 are held out for validation, which leaves 32 pairs of an image and "
            "a corruption, but images = 33. Lower",
        ),
        ({"val_images": 512}, "holds 20 images: 256 are held out for validation, which leaves 0"),
    ],
)
def test_arguments_that_are_not_possible(options, message):
    with pytest.raises(InputError, match=message):
        make_data(**options)


def test_all_pairs_can_be_used():
    assert len(set(flat(epoch(make_data(images=32))))) == 32


def test_corrupted_images_are_refused(tmp_path):
    np.save(tmp_path / "fog.npy", np.zeros((50, 32, 32, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(50, np.int64))
    with pytest.raises(InputError, match="this source holds corrupted ones"):
        make_data(source=CIFAR10C(str(tmp_path)))


@pytest.mark.parametrize(
    ("world", "options"),
    [(1, {"batch_size": 13}), (2, {"batch_size": 7}), (1, {"batch_size": 12, "order": "separate"})],
)
def test_too_few_images_for_one_batch(world, options):
    with pytest.raises(InputError, match=f"12 training images fill no batch .* {world} process"):
        on_rank(0, world, **options).train_dataloader()
