"""Copies of all that adaptation changes."""

import pytest
import torch

from tests.networks import are_equal, make_batches, make_network
from tests.test_adapter import CASES, METHODS, all_of
from tta_lightning import InputError
from tta_lightning.methods import EATA, Source, Tent
from tta_lightning.rules import SGD, Adam
from tta_lightning.snapshots import capture, restore, size_in_bytes


@pytest.mark.parametrize(("make", "norm"), CASES)
def test_a_restored_method_repeats_itself_bit_for_bit(make, norm):
    adapter, batches = make(make_network(norm)), make_batches(6)
    for images in batches[:3]:
        adapter.adapt_step(images)
    snapshot, there = capture(adapter), all_of(adapter)
    first = [adapter.adapt_step(images) for images in batches[3:]]
    for _ in range(2):  # it can be used again
        restore(adapter, snapshot)
        assert are_equal(all_of(adapter), there)
        assert are_equal([adapter.adapt_step(images) for images in batches[3:]], first)


@pytest.mark.parametrize(("make", "norm"), CASES)
def test_it_fits_an_equal_method_elsewhere(make, norm):
    one, other = make(make_network(norm)), make(make_network(norm))
    batches = make_batches(4)
    one.adapt_step(batches[0])
    one.adapt_step(batches[1])
    restore(other, capture(one))
    assert are_equal(one.adapt_step(batches[2]), other.adapt_step(batches[2]))
    other.reset()
    one.reset()
    assert are_equal(all_of(one), all_of(other))


def test_it_holds_what_moves_and_no_second_model():
    adapter = Tent(make_network("gn"), Adam(lr=0.01))
    snapshot = capture(adapter)
    affine = 4 * 2 * (8 + 16)  # bytes of scale and shift of two layers in float32
    steps = adapter.rule_state["step"].nbytes
    assert size_in_bytes(snapshot) == 3 * affine + steps  # themselves and Adam's two moments
    assert size_in_bytes(capture(Source(make_network("gn")))) == 4  # a counter of steps


def test_what_was_learnt_from_clean_images_is_part_of_it():
    one, other = (EATA(make_network("gn"), e_margin=5.0, d_margin=2.0) for _ in range(2))
    one.prepare(make_batches(2))
    restore(other, capture(one))
    assert are_equal(other.fisher, one.fisher)
    assert other.fisher


def test_one_of_another_method_or_network_is_refused_and_changes_nothing():
    adapter = Tent(make_network("gn"), SGD(lr=0.1, momentum=0.9))
    adapter.adapt_step(make_batches(1)[0])
    before = all_of(adapter)
    wider = make_network("gn")
    wider[4] = torch.nn.GroupNorm(4, 16)
    wider[1] = torch.nn.GroupNorm(8, 8, affine=False)
    cases = {
        "the state of BNStats": METHODS["bn-running"](make_network("bn")),
        "missing network.1.bias": Tent(wider),
        "unexpected network.0": METHODS["cotta-plain"](make_network("gn")),
        "missing network.": Source(make_network("gn")),
    }
    for message, other in cases.items():
        with pytest.raises(InputError, match=message if "BNStats" not in message else "does not"):
            restore(adapter, capture(other))
        assert are_equal(all_of(adapter), before)
    with pytest.raises(InputError, match="does not belong to Tent"):
        restore(adapter, {})


def test_equal_names_of_another_method_are_refused_and_change_nothing():
    adapter, other = (m(make_network("gn"), SGD(lr=0.1)) for m in (Tent, lambda *a: EATA(*a)))
    other.fisher_alpha = 0
    adapter.adapt_step(make_batches(1)[0])
    before = all_of(adapter)
    with pytest.raises(InputError, match="This is the state of EATA, not of Tent"):
        restore(adapter, capture(other))
    assert are_equal(all_of(adapter), before)


def test_a_shape_that_differs_is_named():
    one, other = make_network("gn"), make_network("gn")
    other[4] = torch.nn.GroupNorm(4, 32)
    with pytest.raises(InputError, match=r"shape of network.4.bias is \[32\], not \[16\]"):
        restore(Tent(one), capture(Tent(other)))
