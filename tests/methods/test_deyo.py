"""DeYO against the published implementation, a loop written by hand, and slices of images."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from tests.networks import (
    are_equal,
    coloured_squares,
    golden_network,
    make_batches,
    make_network,
    sharp_network,
    tensors_of,
)
from tta_lightning.errors import InputError
from tta_lightning.methods.deyo import DeYO, occlude, shuffle_patches, shuffle_pixels
from tta_lightning.rules import SGD, Adam

GOLDEN = Path(__file__).parents[1] / "golden" / "reference_methods.pt"
KEY = "deyo_occlusion16at8_sgd1e-3_m0.9_margin0.5lnK_e0_0.4lnK_plpd0_bn"
WINDOW = {"aug_type": "occ", "occlusion_size": 16, "row_start": 4, "column_start": 10}
MARGIN = 0.6 * math.log(10)  # nats; about half of the samples below are surer
E0 = 0.4 * math.log(10)


def occluded_by_hand(images, draw):
    result = images.clone()
    for image in result:
        means = [channel.sum() / channel.numel() for channel in image]
        for channel, mean in zip(image, means, strict=True):
            channel[4:20, 10:26] = mean
    return result


def patches_by_hand(images, draw):
    """Put 8 x 8 patches into the order of random numbers, the smallest first."""
    numbers = np.random.default_rng([5, draw]).random((len(images), 16))
    result = torch.empty_like(images)
    for image, target, row in zip(images, result, numbers, strict=True):
        for place, patch in enumerate(sorted(range(16), key=lambda i: row[i])):
            top, left, y, x = *divmod(place, 4), *divmod(patch, 4)
            target[:, 8 * top : 8 * top + 8, 8 * left : 8 * left + 8] = image[
                :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8
            ]
    return result


def pixels_by_hand(images, draw):
    order = np.random.default_rng([5, draw]).permutation(32 * 32)
    result = torch.empty_like(images)
    for place, pixel in enumerate(order):
        result[:, :, place // 32, place % 32] = images[:, :, pixel // 32, pixel % 32]
    return result


class ByHand:
    """The equations, one sample at a time. Counts what the filters did."""

    def __init__(self, network, destroy, threshold, margin=MARGIN, e0=E0):
        network.train()  # no dropout in there: this only affects batch normalisation
        self.network, self.destroy = network, destroy
        self.threshold, self.margin, self.e0 = threshold, margin, e0
        kinds = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
        moving = [p for m in network.modules() if isinstance(m, kinds) for p in m.parameters()]
        self.optimizer = torch.optim.SGD(moving, lr=0.01, momentum=0.9)
        self.draws, self.unsure, self.unmoved = 0, 0, 0

    def step(self, images, term=None):
        logits = self.network(images)
        p = logits.softmax(1)
        entropies = [-(row * row.log()).sum() for row in p]
        sure = [i for i, entropy in enumerate(entropies) if entropy < self.margin]
        self.unsure += len(images) - len(sure)
        self.kept = []
        if not sure:
            return logits.detach(), None
        destroyed = self.destroy(images[sure], self.draws)
        self.draws += 1
        q = self.network(destroyed).softmax(1).detach()
        loss = 0.0
        for i, broken in zip(sure, q, strict=True):
            label = p[i].argmax()
            plpd = (p[i][label] - broken[label]).item()
            if plpd <= self.threshold:
                self.unmoved += 1
                continue
            self.kept.append(i)
            weight = math.exp(self.e0 - entropies[i].item()) + math.exp(plpd)
            loss = loss + weight * entropies[i]
        if not self.kept:
            return logits.detach(), None
        loss = loss / len(self.kept)
        if term is not None:
            loss = loss + term(self.network, images, self.kept)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return logits.detach(), loss.detach()


def test_equals_the_published_implementation():
    golden = torch.load(GOLDEN, weights_only=True)
    network = golden_network()
    network.load_state_dict(golden[KEY]["init"])
    adapter = DeYO(
        network,
        SGD(lr=1e-3, momentum=0.9),
        plpd_threshold=0,
        aug_type="occ",
        occlusion_size=16,
        row_start=8,
        column_start=8,
    )
    # See the test of Tent for the tolerance.
    tolerance = 1e-6 * golden[KEY]["logits"].abs().max().item()
    for images, logits in zip(golden["batches"], golden[KEY]["logits"], strict=True):
        torch.testing.assert_close(adapter.adapt_step(images), logits, rtol=0, atol=tolerance)
    final = network.state_dict()
    for name, tensor in golden[KEY]["final"].items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "threshold", "destroy", "options"),
    [
        ("bn", 0.1, occluded_by_hand, WINDOW),
        ("gn", 0.1, occluded_by_hand, WINDOW),
        ("ln", 0.0, occluded_by_hand, WINDOW),
        ("bn", 0.2, patches_by_hand, {"aug_type": "patch"}),
        ("gn", 0.2, patches_by_hand, {}),
        ("gn", 0.1, pixels_by_hand, {"aug_type": "pixel"}),
    ],
)
def test_equals_a_loop_written_by_hand(norm, threshold, destroy, options):
    margin = (0.3 if norm == "ln" else 0.6) * math.log(10)
    reference = ByHand(sharp_network(norm), destroy, threshold, margin)
    rule = SGD(lr=0.01, momentum=0.9)
    adapter = DeYO(
        sharp_network(norm), rule, margin, None, threshold, **options, skip_top=False, seed=5
    )
    kept = []
    for images in coloured_squares(4):
        logits, loss = reference.step(images)
        torch.testing.assert_close(adapter.adapt_step(images), logits, rtol=0, atol=1e-11)
        kept.append(len(reference.kept))
        assert adapter.report.updated == (kept[-1] > 0)
        if kept[-1]:
            assert adapter.report.loss.item() == pytest.approx(loss.item(), abs=1e-11)
    assert sum(kept[1:]) > 0
    assert norm != "ln" or 0 in kept
    assert reference.unsure > 5  # both filters had work to do
    assert reference.unmoved > 5
    other = reference.network.state_dict()
    for name, tensor in adapter.network.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-11, msg=name)


def test_margins_are_arguments():
    reference = ByHand(sharp_network("gn"), occluded_by_hand, -0.5, margin=1.2, e0=0.3)
    adapter = DeYO(sharp_network("gn"), SGD(lr=0.01), 1.2, 0.3, -0.5, **WINDOW)
    images = coloured_squares(1)[0]
    _, loss = reference.step(images)
    adapter.adapt_step(images)
    assert adapter.report.loss.item() == pytest.approx(loss.item(), abs=1e-11)


def test_the_default_margins_follow_the_classes_of_the_stream():
    classes, images = [7, 2, 5], coloured_squares(1)[0]
    network = sharp_network("gn")
    reference = sharp_network("gn")
    reference[8] = nn.Linear(64, 3).double()
    with torch.no_grad():
        reference[8].weight.copy_(network[8].weight[classes])
        reference[8].bias.copy_(network[8].bias[classes])
    margins = 0.5 * math.log(3), 0.4 * math.log(3)
    reference = ByHand(reference, occluded_by_hand, -0.1, *margins)
    adapter = DeYO(network, SGD(lr=0.01), plpd_threshold=-0.1, **WINDOW)
    adapter.restrict_classes(classes)
    logits, loss = reference.step(images)
    torch.testing.assert_close(adapter.adapt_step(images), logits, rtol=0, atol=1e-12)
    assert adapter.report.loss.item() == pytest.approx(loss.item(), abs=1e-11)
    assert reference.unsure > 0


def test_only_affine_parameters_move():
    network = sharp_network("bn")
    before = copy.deepcopy(network.state_dict())
    DeYO(network, SGD(lr=0.1), MARGIN, plpd_threshold=-1).adapt_step(coloured_squares(1)[0])
    moved = {n for n, t in network.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"1.weight", "1.bias", "4.weight", "4.bias"}


@pytest.mark.parametrize("skip_top", [True, False])
def test_the_top_of_a_resnet_stays_fixed(skip_top):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    before = copy.deepcopy(network.state_dict())
    adapter = DeYO(network, SGD(lr=0.1), 10.0, plpd_threshold=-1, skip_top=skip_top)
    adapter.adapt_step(torch.rand(4, 3, 64, 64))
    moved = {n for n, t in network.state_dict().items() if not torch.equal(t, before[n])}
    assert {"bn1.weight", "layer3.1.bn2.bias"} <= moved
    assert any(name.startswith("layer4") for name in moved) != skip_top
    assert not any("running" in name for name in moved)  # batch statistics up there as well


class TestFilters:
    def test_nothing_is_destroyed_where_no_sample_is_sure(self):
        adapter = DeYO(sharp_network("gn"), Adam(lr=0.1), deyo_margin=1e-6)
        calls = []
        adapter.network.register_forward_hook(lambda *args: calls.append(1))
        before = tensors_of(adapter)
        adapter.adapt_step(coloured_squares(1)[0])
        assert len(calls) == 1
        assert are_equal(tensors_of(adapter), before)
        assert adapter.memory == {}
        assert not adapter.report.updated
        assert adapter.rule_state["step"] == 0

    def test_nothing_moves_where_no_prediction_falls(self):
        adapter = DeYO(sharp_network("gn"), Adam(lr=0.1), MARGIN, plpd_threshold=0.99)
        adapter.terms.append(lambda out, head: pytest.fail("a term without samples"))
        before = tensors_of(adapter)
        adapter.adapt_step(coloured_squares(1)[0])
        assert are_equal(tensors_of(adapter), before)
        assert not adapter.report.updated
        assert adapter.memory["draws"] == 1  # the same image is not destroyed alike next time

    def test_only_sure_samples_are_destroyed(self):
        reference = ByHand(sharp_network("gn"), occluded_by_hand, 0.1)
        adapter = DeYO(sharp_network("gn"), SGD(lr=0.1), MARGIN, plpd_threshold=0.1, **WINDOW)
        seen = []
        adapter.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        images = coloured_squares(1)[0]
        kept = images.clone()
        reference.step(images)
        adapter.adapt_step(images)
        assert [len(each) for each in seen[:2]] == [16, 16 - reference.unsure]
        assert torch.equal(images, kept)  # the user's tensor is not written to

    def test_a_lone_sure_sample_has_batch_statistics_of_its_own(self):
        images = coloured_squares(1)[0]
        p = sharp_network("bn").train()(images).softmax(1)
        surest = (-(p * p.log()).sum(1)).sort().values
        margin = (surest[0] + surest[1]).item() / 2
        adapter = DeYO(sharp_network("bn"), SGD(lr=0.1), margin, plpd_threshold=-1, **WINDOW)
        reference = ByHand(sharp_network("bn"), occluded_by_hand, -1, margin)
        _, loss = reference.step(images)
        adapter.adapt_step(images)  # no advice to take larger batches
        assert len(reference.kept) == 1
        assert adapter.report.loss.item() == pytest.approx(loss.item(), abs=1e-11)

    def test_a_lone_sure_sample_does_not_use_up_the_warning(self):
        images = coloured_squares(1)[0]
        p = sharp_network("bn").train()(images).softmax(1)
        surest = (-(p * p.log()).sum(1)).sort().values
        adapter = DeYO(sharp_network("bn"), SGD(lr=0.0), surest[:2].mean().item(), **WINDOW)
        adapter.adapt_step(images)
        with pytest.warns(UserWarning, match="single image"):
            adapter.adapt_step(images[:1])
        adapter.adapt_step(images[:1])  # once is enough

    def test_an_image_alone_is_warned_of(self):
        adapter = DeYO(sharp_network("bn"), SGD(lr=0.1), 10.0, plpd_threshold=-1)
        with pytest.warns(UserWarning, match="single image"):
            adapter.adapt_step(coloured_squares(1)[0][:1])

    @pytest.mark.parametrize("all_of_them", [False, True])
    def test_nan_changes_nothing_the_draws_included(self, all_of_them):
        adapter = DeYO(sharp_network("gn"), SGD(lr=0.01), MARGIN, plpd_threshold=0)
        first, second = coloured_squares(2)
        adapter.adapt_step(first)
        before = [tensors_of(adapter), adapter.memory]
        assert adapter.memory["draws"] == 1
        if all_of_them:
            adapter.adapt_step(torch.full_like(second, torch.nan))
        else:
            second[3] = torch.nan
            with pytest.warns(UserWarning, match="not finite"):
                adapter.adapt_step(second)
        assert are_equal([tensors_of(adapter), adapter.memory], before)


@pytest.mark.parametrize("culprit", ["second forward", "term"])
def test_a_step_that_fails_is_no_draw(culprit):
    adapter = DeYO(sharp_network("gn"), SGD(lr=0.01), MARGIN, plpd_threshold=0)
    first, second = coloured_squares(2)
    adapter.adapt_step(first)
    calls = []

    def fail_the_second_time(*args):
        calls.append(1)
        if len(calls) == 2 or culprit == "term":
            raise RuntimeError("out of memory")

    if culprit == "term":
        adapter.terms.append(fail_the_second_time)
    else:
        adapter.network.register_forward_pre_hook(fail_the_second_time)
    before = [tensors_of(adapter), adapter.memory]
    with pytest.raises(RuntimeError, match="out of memory"):
        adapter.adapt_step(second)
    assert are_equal([tensors_of(adapter), adapter.memory], before)
    assert adapter.memory["draws"] == 1


def test_a_term_sees_the_original_images_of_what_both_filters_kept():
    def by_hand(network, images, kept):
        features = network[:8](images)[kept]
        return 0.3 * features.square().mean() + 0.1 * network(images)[kept].square().mean()

    seen = []

    def term(out, head):
        seen.append(out.selected.nonzero().flatten().tolist())
        rebuilt = out.features @ head.weight.T + head.bias
        kept = out.selected
        return 0.3 * out.features[kept].square().mean() + 0.1 * rebuilt[kept].square().mean()

    reference = ByHand(sharp_network("gn"), occluded_by_hand, 0.1)
    adapter = DeYO(
        sharp_network("gn"), SGD(lr=0.01, momentum=0.9), MARGIN, plpd_threshold=0.1, **WINDOW
    )
    adapter.terms.append(term)
    for step, images in enumerate(coloured_squares(4)):
        logits, loss = reference.step(images, by_hand)
        torch.testing.assert_close(adapter.adapt_step(images), logits, rtol=0, atol=1e-11)
        assert seen[step] == reference.kept
        assert adapter.report.loss.item() == pytest.approx(loss.item(), abs=1e-11)
    assert reference.unmoved > 5


class TestDestruction:
    def test_patches(self):
        image = torch.arange(16.0).reshape(1, 1, 4, 4)
        orders = torch.tensor([[3, 0, 1, 2], [0, 1, 2, 3]])
        shuffled = shuffle_patches(image.repeat(2, 3, 1, 1), orders)
        expected = torch.tensor([[10.0, 11, 0, 1], [14, 15, 4, 5], [2, 3, 8, 9], [6, 7, 12, 13]])
        for channel in shuffled[0]:
            assert torch.equal(channel, expected)
        assert torch.equal(shuffled[1], image[0].repeat(3, 1, 1))

    def test_patches_of_an_oblong(self):
        image = torch.arange(8.0).reshape(1, 1, 2, 4)
        shuffled = shuffle_patches(image, torch.tensor([[2, 3, 0, 1]]))
        assert torch.equal(shuffled, torch.tensor([[[[4.0, 5, 6, 7], [0, 1, 2, 3]]]]))

    @pytest.mark.parametrize("size", [(30, 33), (32, 35), (7, 7)])
    def test_patches_where_the_side_does_not_divide(self, size):
        resize = torchvision.transforms.functional.resize
        images = torch.rand(2, 3, *size)
        small = [side // 4 * 4 for side in size]
        unshuffled = shuffle_patches(images, torch.arange(16).repeat(2, 1))
        torch.testing.assert_close(unshuffled, resize(resize(images, small), list(size)))
        last_row_first = torch.arange(16).roll(4).repeat(2, 1)
        turned = shuffle_patches(images, last_row_first)
        rolled = resize(images, small).roll(small[0] // 4, dims=2)
        torch.testing.assert_close(turned, resize(rolled, list(size)))

    def test_patches_in_half_precision(self):
        images = torch.rand(2, 3, 30, 30)
        orders = torch.arange(16).repeat(2, 1)
        half = shuffle_patches(images.bfloat16(), orders)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), shuffle_patches(images, orders), rtol=0, atol=0.01)

    def test_pixels(self):
        images = torch.arange(12.0).reshape(2, 1, 2, 3)
        shuffled = shuffle_pixels(images, torch.tensor([5, 0, 1, 2, 3, 4]))
        assert torch.equal(shuffled[0, 0], torch.tensor([[5.0, 0, 1], [2, 3, 4]]))
        assert torch.equal(shuffled[1, 0], torch.tensor([[11.0, 6, 7], [8, 9, 10]]))

    def test_occlusion(self):
        images = torch.arange(18.0).reshape(2, 1, 3, 3)
        occluded = occlude(images, 1, 0, 2)
        assert torch.equal(occluded[0, 0], torch.tensor([[0.0, 1, 2], [4, 4, 5], [4, 4, 8]]))
        assert torch.equal(
            occluded[1, 0], torch.tensor([[9.0, 10, 11], [13, 13, 14], [13, 13, 17]])
        )
        assert images[0, 0, 1, 0] == 3

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"patch_len": 40}, "patch_len = 40 .* 32 x 32"),
            ({"aug_type": "occ"}, "112 x 112 .* 32 x 32"),
            ({**WINDOW, "row_start": 17}, "row 17 .* 32 x 32"),
            ({**WINDOW, "column_start": 17}, "column 17 .* 32 x 32"),
        ],
    )
    def test_images_that_are_too_small(self, options, message):
        with pytest.raises(InputError, match=message):
            DeYO(make_network("gn"), deyo_margin=10.0, **options).adapt_step(make_batches(1)[0])


@pytest.mark.parametrize("kind", ["patch", "pixel"])
class TestRandomOrders:
    def watched(self, kind, **options):
        """An adapter that learns from all, and the destroyed images that it makes."""
        adapter = DeYO(
            make_network("gn"), SGD(lr=0.01), 10.0, plpd_threshold=-1, aug_type=kind, **options
        )
        seen = []
        adapter.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        return adapter, seen

    def test_reset_replays_them(self, kind):
        adapter, seen = self.watched(kind)
        for _ in range(2):
            for images in make_batches(3):
                adapter.adapt_step(images)
            adapter.reset()
        assert are_equal(seen[:6], seen[6:])

    def test_they_differ_from_batch_to_batch_and_by_seed(self, kind):
        images = make_batches(1)[0]
        adapter, seen = self.watched(kind)
        other, others = self.watched(kind, seed=1)
        for _ in range(2):
            adapter.adapt_step(images)
            other.adapt_step(images)
        destroyed = [seen[1], seen[3], others[1], others[3]]
        for number, one in enumerate(destroyed):
            assert torch.equal(one.flatten(1).sort().values, images.flatten(1).sort().values)
            assert not any(torch.equal(one, another) for another in destroyed[:number])

    def test_a_state_dict_continues_them(self, kind):
        batches = make_batches(4)
        adapter, seen = self.watched(kind)
        for images in batches[:2]:
            adapter.adapt_step(images)
        saved = copy.deepcopy(adapter.state_dict())
        del seen[:]
        expected = [adapter.adapt_step(images) for images in batches[2:]]
        other, others = self.watched(kind)
        other.load_state_dict(saved)
        assert are_equal([other.adapt_step(images) for images in batches[2:]], expected)
        assert are_equal(seen, others)

    def test_they_leave_other_random_numbers_alone(self, kind):
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        adapter, _ = self.watched(kind)
        torch.manual_seed(3)
        adapter.adapt_step(make_batches(1)[0])
        assert torch.equal(torch.rand(4), expected)

    def test_images_share_them_or_not_as_published(self, kind):
        images = make_batches(1)[0][:1].repeat(8, 1, 1, 1)
        adapter, seen = self.watched(kind)
        adapter.adapt_step(images)
        same = [torch.equal(image, seen[1][0]) for image in seen[1]]
        assert sum(same) == (8 if kind == "pixel" else 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deyo_margin", -0.1),
        ("margin_e0", -0.1),
        ("margin_e0", math.inf),
        ("plpd_threshold", -1.5),
        ("plpd_threshold", 1.0),
        ("plpd_threshold", math.nan),
        ("patch_len", 1),
        ("occlusion_size", 0),
        ("row_start", -1),
        ("column_start", -1),
        ("seed", -1),
    ],
)
def test_hyper_parameters_out_of_range(name, value):
    with pytest.raises(InputError, match=f"{name} = .* out of range"):
        DeYO(make_network("gn"), **{name: value})


def test_an_unknown_way_to_destroy():
    with pytest.raises(InputError, match=r"aug_type of DeYO 'patches'.*'patch'"):
        DeYO(make_network("gn"), aug_type="patches")


def test_describes_its_hyper_parameters():
    described = DeYO(make_network("gn"), plpd_threshold=0.3, seed=4).describe()
    assert described["hyper_parameters"] == {
        "deyo_margin": None,
        "margin_e0": None,
        "plpd_threshold": 0.3,
        "aug_type": "patch",
        "patch_len": 4,
        "occlusion_size": 112,
        "row_start": 56,
        "column_start": 56,
        "skip_top": True,
        "seed": 4,
    }
