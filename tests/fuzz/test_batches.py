"""Batches of any shape, type and device: predicted or refused in a sentence, and nothing broken."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.fuzz.profiles import assert_whole, examples, refusal
from tests.networks import are_equal, make_batches, make_network
from tta_lightning import methods
from tta_lightning.snapshots import capture
from tta_lightning.trainer import Trainer

METHODS = {
    "Source": {},
    "BNStats": {},
    "BNStats running": {"running": True, "alpha": 0.5},
    "Tent": {},
    "EATA": {"fisher_alpha": 0},
    "SAR": {},
    "DeYO": {},
    "DeYO pixel": {"aug_type": "pixel"},
    "CoTTA": {"n_augmentations": 2},
    "RoTTA": {"memory_size": 4, "update_frequency": 2},
    "ROID": {},
    "LAME": {},
    "T3A": {"filter_k": 3},
    "MEMO": {"n_augmentations": 2},
}
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.uint8, torch.int64, torch.bool, torch.complex64),
)
GOOD = make_batches(count=1, size=4)[0]


def adapter_of(name):
    method = getattr(methods, name.split()[0])
    return method(make_network("bn"), **METHODS[name])


@st.composite
def shapes(draw):
    """Most are [B, 3, H, W]."""
    side = st.integers(1, 40) | st.just(32)
    images = draw(st.sampled_from([0, 1, 2, 3, 5, 7]))
    channels = draw(st.sampled_from([3, 3, 3, 3, 1, 4, 0]))
    shape = [images, channels, draw(side), draw(side)]
    match draw(st.sampled_from(["whole", "whole", "whole", "cut", "longer", "empty"])):
        case "cut":
            return shape[draw(st.integers(1, 4)) :]
        case "longer":
            return [*shape, 2]
        case "empty":
            return [*shape[:3], 0]
    return shape


@st.composite
def tensors(draw, dtypes=DTYPES):
    """Tensors of noise in most shapes and types, laid out in most ways."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 3)))
    shape, dtype = draw(shapes()), draw(st.sampled_from([torch.float32, *dtypes]))
    tensor = torch.rand(shape, generator=generator)
    odd = draw(st.sampled_from([None, None, None, 0.0, torch.nan, torch.inf, 1e38, -1e6]))
    if odd is not None and tensor.numel():
        tensor.view(-1)[:: draw(st.sampled_from([1, 7]))] = odd
    finite = tensor.nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
    tensor = (tensor if dtype.is_floating_point or dtype.is_complex else finite).to(dtype)
    match draw(st.sampled_from(["plain", "plain", "flipped", "expanded", "graph", "meta", "mode"])):
        case "flipped" if tensor.dim() > 1:
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        case "expanded" if tensor.dim() and len(tensor):
            return tensor[:1].expand(tensor.shape)
        case "graph" if dtype.is_floating_point:
            return tensor.requires_grad_(True)
        case "meta":
            return tensor.to("meta")
        case "mode":
            with torch.inference_mode():
                return tensor.clone()
    return tensor


THINGS = tensors() | st.sampled_from([None, "images", [[0.5]], GOOD.numpy()])


@examples(2)
@given(st.sampled_from(sorted(METHODS)), THINGS, st.booleans())
@example("Tent", torch.zeros(0, 3, 32, 32), False)
@example("Tent", torch.zeros(2, 1, 32, 32), False)
@example("T3A", torch.zeros(2, 3, 32, 32, dtype=torch.uint8), True)
@example("RoTTA", torch.zeros(2, 3, 32, 32, device="meta"), True)
@example("BNStats running", torch.rand(2, 3, 3, 3), False)
@example("DeYO", torch.rand(2, 3, 7, 7), False)
@example("MEMO", torch.zeros(1, 3, 32, 0), False)
@example("RoTTA", torch.rand(3, 3, 5, 32), False)
def test_a_step_is_taken_or_refused(name, batch, used):
    adapter = adapter_of(name)
    if used:  # state of a method exists only after its first batch
        refusal(lambda: adapter.adapt_step(GOOD))
    before, found = capture(adapter), []
    if refusal(lambda: found.append(adapter.adapt_step(batch))) is not None:
        assert are_equal(capture(adapter), before)
    else:
        assert found[0].shape == (len(batch), 10)
        assert not found[0].requires_grad
        if name == "RoTTA" and batch.shape[1:] != GOOD.shape[1:]:
            adapter.reset()  # it keeps images, all of one size, and says so of the next ones
    assert all(tensor.isfinite().all() for tensor in adapter.moving_tensors().values())
    assert refusal(lambda: found.append(adapter.adapt_step(GOOD))) is None
    assert found[-1].shape == (4, 10)
    assert found[-1].isfinite().all()


@st.composite
def labels(draw, images):
    """Labels that fit the images, or do not."""
    count = len(images) if isinstance(images, torch.Tensor) and images.dim() else 1
    number = st.sampled_from([0, 0, 1, 9, -1, -5, 10, 2**40, -(2**63)])
    values = torch.tensor(draw(st.lists(number, min_size=count, max_size=count)), dtype=torch.int64)
    match draw(st.sampled_from(["whole", "whole", "longer", "type", "meta", "deep", "other"])):
        case "longer":
            return torch.cat([values, values[:1], values[:1]])
        case "type":
            with_nan = values.double().where(values < 9, torch.nan)
            types = [torch.float32, torch.bool, torch.int8, torch.complex64]
            return with_nan.nan_to_num(0.5).to(draw(st.sampled_from(types)))
        case "meta":
            return values.to("meta")
        case "deep":
            return values[:, None]
        case "other":
            return draw(st.sampled_from([None, "cat", 3, [0.5], ()]))
    return values


@st.composite
def batches(draw):
    """What a dataloader may give."""
    images = draw(tensors() | st.just(GOOD))
    match draw(st.sampled_from(["alone", "pair", "pair", "list", "dict", "nothing"])):
        case "pair":
            return (images, draw(labels(images)))
        case "list":
            return [images]
        case "dict":
            return {"images": images}
        case "nothing":
            return draw(st.sampled_from([None, (), [], "images", 3]))
    return images


def as_it_is(batches_):
    return DataLoader(batches_, batch_size=None, collate_fn=lambda batch: batch)


@examples(0.3)
@given(st.sampled_from(sorted(METHODS)), st.lists(batches(), min_size=1, max_size=3), st.booleans())
@example("Tent", [(GOOD, torch.full((4,), 0.5))], False)
@example("Tent", [GOOD, torch.zeros(2, 3, 32, 32, device="meta")], True)
@example("Tent", [GOOD, (GOOD, torch.zeros(4, dtype=torch.int64, device="meta"))], True)
@example("Tent", [GOOD, torch.rand(2, 3, 1, 1)], True)
@example("Tent", [torch.full((2, 3, 32, 32), torch.nan)], True)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_stream_of_batches_is_adapted_to_or_refused(name, given, starts_well):
    adapter = adapter_of(name)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        trainer = Trainer(accelerator="cpu", enable_progress_bar=False, logger=False, run_dir=run)
        loader = as_it_is([GOOD, *given] if starts_well else given)
        refused = refusal(lambda: trainer.adapt(adapter, dataloaders=loader))
        assert_whole(run)
        assert run.exists() or refused is not None
        assert not (starts_well and not run.exists())  # what was predicted is kept
    adapter.reset()
    assert adapter.adapt_step(GOOD).isfinite().all()
