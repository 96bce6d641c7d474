"""Labelled images in tasks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.meta.mt3_worker import make_module, make_trainer, source, tasks
from tta_lightning.data import ArraySource, LabelledTasks, TaskBatch
from tta_lightning.errors import InputError


def numbered(images=50):
    """Images of one colour, which is their number; so are the labels."""
    pixels = np.arange(images, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
    return ArraySource(pixels, np.arange(images), tuple(map(str, range(50))))


def make(rank=0, world=1, **options):
    """Forty training images; tasks as one process of several serves them."""
    given = {"val_fraction": 0.2, "tasks": 4, "images_per_task": 2, "seed": 3}
    data = LabelledTasks(numbered(), **{**given, **options})
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, overfit_batches=0.0)
    return data


def epoch_of(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    assert len(loader) == len(batches)
    return batches


def together(batches):
    """Join meta-steps: labels and keys of all tasks."""
    return torch.cat([b.labels for b in batches]), torch.cat([b.keys for b in batches])


def test_a_batch_holds_images_labels_and_keys():
    batch = epoch_of(make())[0]
    assert isinstance(batch, TaskBatch)
    assert (batch.images.shape, batch.images.dtype) == ((4, 2, 3, 8, 8), torch.float32)
    assert (batch.labels.shape, batch.labels.dtype) == ((4, 2), torch.int64)
    assert (batch.keys.shape, batch.keys.dtype) == ((4, 3), torch.int64)


@pytest.mark.parametrize(("per_task", "steps"), [(2, 5), (3, 3)])
def test_every_image_once_an_epoch_up_to_the_remainder(per_task, steps):
    data = make(images_per_task=per_task)
    labels, _ = together(epoch_of(data))
    assert labels.shape == (steps * 4, per_task)
    seen = labels.flatten().tolist()
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(data._train_indices.tolist())


def test_what_remains_is_not_the_same_every_epoch():
    data = make(images_per_task=3)
    first, second = (set(together(epoch_of(data, e))[0].flatten().tolist()) for e in (0, 1))
    assert first != second


@pytest.mark.parametrize("epoch", [0, 3])
def test_images_are_never_augmented(epoch):
    for loader in (epoch_of(make(), epoch), make().val_dataloader()):
        for batch in loader:
            colours = (batch.labels / 255)[..., None, None, None].expand_as(batch.images)
            torch.testing.assert_close(batch.images, colours, rtol=0, atol=1e-7)


def test_the_order_is_that_of_seed_and_epoch():
    orders = {
        (seed, epoch): together(epoch_of(make(seed=seed, val_fraction=0.2), epoch))[0]
        for seed in (3, 4)
        for epoch in (0, 1)
    }
    torch.manual_seed(99)  # no global state decides
    np.random.seed(99)  # noqa: NPY002
    assert torch.equal(together(epoch_of(make(), 1))[0], orders[3, 1])
    distinct = {tuple(order.flatten().tolist()) for order in orders.values()}
    assert len(distinct) == 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_and_workers_share_the_tasks_of_one(world, workers):
    if world == 4 and workers:
        pytest.skip("two processes with workers say as much")
    alone = epoch_of(make(), 1)
    shares = [epoch_of(make(rank, world, num_workers=workers), 1) for rank in range(world)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert all(len(part.keys) == 4 // world for part in parts)
        for name in TaskBatch._fields:
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name))


def test_no_two_tasks_have_the_same_key():
    data = make()
    batches = [*epoch_of(data, 0), *epoch_of(data, 1), *epoch_of(data, 2), *data.val_dataloader()]
    _, keys = together(batches)
    assert len(keys) == 65
    assert len({tuple(key) for key in keys.tolist()}) == 65
    assert set(keys[:, 0].tolist()) == {3}
    assert (keys >= 0).all()


@pytest.mark.parametrize("val", [None, 20])
def test_validation_has_the_same_tasks_every_time_in_every_process(val):
    options = {} if val is None else {"val": numbered(val)}
    data = make(**options)
    first = list(data.val_dataloader())
    loader = make(1, 2, **options).val_dataloader()
    loader.sampler.set_epoch(5)
    second = list(loader)
    assert [len(batch.keys) for batch in first] == ([4, 1] if val is None else [4, 4, 2])
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    labels, _ = together(first)
    if val is None:
        assert not set(labels.flatten().tolist()) & set(data._train_indices.tolist())
        assert len(set(labels.flatten().tolist())) == 10


def test_limit_takes_some_images():
    data = make(limit=30)
    labels, _ = together(epoch_of(data))
    assert labels.numel() == 24  # 24 of 30 remain after the validation split
    assert len(epoch_of(data)) == 3


def test_test_images_come_in_plain_batches():
    data = LabelledTasks(numbered(), test=numbered(), tasks=4, images_per_task=2)
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (8, 3, 8, 8)
    assert labels.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 0}, "tasks = 0: expected 1 or more"),
        ({"images_per_task": -1}, "images_per_task = -1: expected 1 or more"),
        ({"limit": 0}, "limit = 0"),
        ({"val_fraction": 0.0}, "val_fraction = 0.0: expected a number between 0 and 1"),
    ],
)
def test_numbers_that_are_not_possible(options, message):
    with pytest.raises(InputError, match=message):
        tasks(**options)


def test_images_without_labels_are_refused():
    with pytest.raises(InputError, match="train holds images without labels"):
        LabelledTasks(ArraySource(np.zeros((30, 8, 8, 3), np.uint8)))


def test_too_few_images():
    with pytest.raises(InputError, match="40 training images fill no meta-step of 7 tasks with 6"):
        make(tasks=7, images_per_task=6).train_dataloader()
    with pytest.raises(InputError, match=r"10 validation images fill no task of 11 .* Raise val"):
        make(tasks=1, images_per_task=11).val_dataloader()


def test_tasks_that_cannot_be_shared_out():
    with pytest.raises(InputError, match=r"4 tasks cannot .* 3 processes.*a multiple of 3"):
        make(0, 3).train_dataloader()


def test_overfit_batches_are_refused():
    with pytest.raises(InputError, match=r"overfit_batches .*Use limit_train_batches"):
        make_trainer(overfit_batches=2).fit(make_module(), datamodule=tasks())


def test_a_resumed_training_starts_with_the_next_task():
    data = make()
    whole = [together(epoch_of(data, epoch))[1] for epoch in range(3)]
    data.load_state_dict({"epoch": 1, "meta_steps": 2, **data._order()})
    for asked in (0, 1):  # Lightning may ask before it knows the epoch
        rest = list(_loader(data, asked))
        assert torch.equal(together(rest)[1], whole[1][8:])
        assert len(_loader(data, asked)) == 5  # of all: Lightning counts those that are done
    assert torch.equal(together(epoch_of(data, 2))[1], whole[2])
    data.setup("fit")  # another training
    assert torch.equal(together(epoch_of(data, 1))[1], whole[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 2}, "tasks was 4, not 2"),
        ({"images_per_task": 1}, "images_per_task was 2, not 1"),
        ({"seed": 4}, "seed was 3, not 4"),
        ({"val_fraction": 0.5}, "images was 40, not 25"),
    ],
)
def test_other_tasks_cannot_be_resumed(options, message):
    saved = {"epoch": 0, "meta_steps": 3, **make()._order()}
    with pytest.raises(InputError, match=rf"cannot be resumed.* {message}"):
        make(**options).load_state_dict(saved)


def _loader(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return loader


def test_there_is_no_state_without_a_trainer():
    data = LabelledTasks(source())
    assert data.state_dict() == {}
    data.load_state_dict({})
    assert data.start(2) == (2, 0)
