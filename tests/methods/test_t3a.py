"""T3A against its equations written out by hand, support by support."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.networks import (
    are_equal,
    coloured_squares,
    head_of,
    make_batches,
    make_network,
    sharp_network,
    tensors_of,
)
from tta_lightning.errors import InputError
from tta_lightning.methods.t3a import T3A

NORMS = ["bn", "gn", "ln"]


def unsure_network(norm):
    """A network in float64 whose head prefers no class, so that its predictions differ."""
    network = sharp_network(norm, 20 if norm == "bn" else 3)
    with torch.no_grad():
        logits = copy.deepcopy(network).eval()(torch.cat(coloured_squares(3)))
        head_of(network).bias -= logits.mean(0)
    return network


class ByHand:
    """The equations; a support is a triple of a feature vector, a class and an entropy."""

    def __init__(self, network, filter_k, classes=None):
        self.network = copy.deepcopy(network).eval()
        head = head_of(self.network)
        self.classes = list(range(len(head.weight))) if classes is None else classes
        self.filter_k = filter_k
        self.features = []
        head.register_forward_pre_hook(lambda module, inputs: self.features.append(inputs[0]))
        with torch.no_grad():
            rows = head.weight[self.classes]
            self.supports = [self.support(w, head.weight @ w + head.bias) for w in rows]
        self.dropped = 0

    def support(self, feature, logits):
        chosen = [logits[c].item() for c in self.classes]
        total = sum(math.exp(value) for value in chosen)
        p = [math.exp(value) / total for value in chosen]
        return feature, p.index(max(p)), -sum(each * math.log(each) for each in p)

    def surest(self, c):
        own = sorted((s for s in self.supports if s[1] == c), key=lambda s: s[2])
        return own if self.filter_k == -1 else own[: self.filter_k]

    @torch.no_grad()
    def step(self, images):
        logits = self.network(images)
        features = self.features.pop()
        self.supports += [self.support(*pair) for pair in zip(features, logits, strict=True)]
        before = len(self.supports)
        by_class = [self.surest(c) for c in range(len(self.classes))]
        self.supports = [support for own in by_class for support in own]
        self.dropped += before - len(self.supports)
        predicted = torch.zeros(len(images), len(by_class), dtype=torch.float64)
        for c, own in enumerate(by_class):
            total = torch.zeros(features.shape[1], dtype=torch.float64)
            for feature, _, _ in own:
                total = total + feature / feature.norm()
            centroid = total / total.norm() if own else total
            for i, feature in enumerate(features):
                predicted[i, c] = feature @ centroid
        return predicted, logits[:, self.classes]


class Colours(nn.Module):
    """Its features are the mean colours of an image, so tests choose them."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.fc = nn.Linear(3, len(weight)).double()
        self.fc.weight.data = torch.tensor(weight, dtype=torch.float64)
        self.fc.bias.data = torch.tensor(bias or [0.0] * len(weight), dtype=torch.float64)

    def forward(self, images):
        return self.fc(images.mean((2, 3)))


def plain_images(colours):
    """One image of each colour, [B, 3, 4, 4]."""
    return torch.tensor(colours, dtype=torch.float64)[:, :, None, None].expand(-1, -1, 4, 4)


UNITY = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


def replay(adapter, batches):
    return [adapter.adapt_step(images) for images in batches]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("filter_k", [1, 4, 100, -1])
def test_equals_the_equations_written_by_hand(norm, filter_k):
    network = unsure_network(norm)
    by_hand, adapter = ByHand(network, filter_k), T3A(network, filter_k)
    source = tensors_of(adapter)
    changed = 0
    for images in [*coloured_squares(4), coloured_squares(1, size=3)[0]]:
        expected, logits = by_hand.step(images)
        actual = adapter.adapt_step(images)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
        changed += (actual.argmax(1) != logits.argmax(1)).sum().item()
        assert adapter.report.updated
    assert (by_hand.dropped > 0) == (filter_k in (1, 4))
    assert changed > 0
    assert all(torch.equal(t, source[n]) for n, t in tensors_of(adapter).items())
    labels = torch.tensor([label for _, label, _ in by_hand.supports])
    assert torch.equal(adapter.memory["labels"], labels)
    entropies = torch.tensor([each for _, _, each in by_hand.supports], dtype=torch.float64)
    torch.testing.assert_close(adapter.memory["entropies"], entropies, rtol=0, atol=1e-10)
    directions = torch.stack([z / z.norm() for z, _, _ in by_hand.supports])
    torch.testing.assert_close(adapter.memory["supports"], directions, rtol=0, atol=1e-10)


def test_classes_are_restricted_in_predictions_and_in_the_first_supports():
    network, classes = unsure_network("gn"), [7, 2, 5, 1]
    by_hand, adapter = ByHand(network, 4, classes), T3A(network, 4)
    adapter.restrict_classes(classes)
    for images in coloured_squares(3):
        expected, _ = by_hand.step(images)
        torch.testing.assert_close(adapter.adapt_step(images), expected, rtol=0, atol=1e-10)
    assert len(adapter.memory["labels"]) == len(by_hand.supports)


def test_one_step_in_numbers():
    adapter = T3A(Colours(UNITY))
    logits = adapter.adapt_step(plain_images([[3.0, 4.0, 0.0]]))
    # Class 1 has its row (0, 1, 0) and the image (0.6, 0.8, 0): together (1, 3, 0) / sqrt 10.
    expected = torch.tensor([[3.0, 15 / math.sqrt(10), 0.0]], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_the_bias_counts_for_the_first_supports():
    # With it, the row of class 0 is predicted as class 1: class 0 has no support and the logit 0.
    network = Colours(UNITY, [-1.5, 0.0, -0.25])
    logits = T3A(network).adapt_step(plain_images([[0.0, 0.0, 2.0]]))
    expected = torch.tensor([[0.0, 0.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert T3A(network)(plain_images([[4.0, 0.0, 0.0]]))[0, 0] == pytest.approx(4.0)  # now it has
    logits = T3A(network)(plain_images([[1.0, 0.0, 0.0]]))  # of class 1, as the row of class 0 is
    assert logits[0].tolist() == pytest.approx([0.0, 2 / math.sqrt(5), 0.0])


def test_a_head_without_bias():
    network = Colours(UNITY)
    expected = T3A(copy.deepcopy(network)).adapt_step(plain_images([[3.0, 4.0, 0.0]]))
    network.fc.bias = None
    assert torch.equal(T3A(network).adapt_step(plain_images([[3.0, 4.0, 0.0]])), expected)


def test_of_supports_equally_sure_the_older_ones_are_kept():
    network = Colours([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # blue makes no difference to it
    adapter = T3A(network, filter_k=2)
    blues = [k / 32 for k in range(32)]
    adapter.adapt_step(plain_images([[8.0, 0.0, blue] for blue in blues]))
    adapter.adapt_step(plain_images([[8.0, 0.0, blue] for blue in reversed(blues)]))
    kept = adapter.memory["supports"][adapter.memory["labels"] == 0]
    expected = torch.tensor([[8.0, 0.0, blue] for blue in blues[:2]], dtype=torch.float64)
    torch.testing.assert_close(kept, expected / expected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("norm", NORMS)
def test_forward_predicts_what_the_next_step_returns(norm):
    adapter = T3A(unsure_network(norm), filter_k=3)
    for images in coloured_squares(3):
        kept, report = copy.deepcopy(adapter.memory), adapter.report
        expected = adapter(images)
        assert are_equal(adapter.memory, kept)
        assert adapter.report is report
        assert torch.equal(adapter.adapt_step(images), expected)
        assert not expected.requires_grad


def test_the_prediction_is_made_after_the_update():
    adapter = T3A(unsure_network("gn"))
    images = coloured_squares(1)[0]
    first = adapter.adapt_step(images)
    assert not torch.allclose(first, adapter.adapt_step(images))  # twice among the supports


@pytest.mark.parametrize(("filter_k", "held"), [(2, 20), (-1, 10 + 6 * 16)])
def test_how_much_is_held(filter_k, held):
    adapter = T3A(unsure_network("gn"), filter_k)
    replay(adapter, coloured_squares(6))
    found = {name: len(tensor) for name, tensor in adapter.memory.items()}
    assert found == {"supports": held, "labels": held, "entropies": held, "classes": 10}
    assert adapter.memory["labels"].bincount().max() <= (filter_k if filter_k > 0 else held)


@pytest.mark.parametrize("norm", NORMS)
def test_reset_and_a_loaded_state_replay(norm):
    batches = coloured_squares(5)
    adapter = T3A(unsure_network(norm), filter_k=3)
    replay(adapter, batches[:2])
    saved = copy.deepcopy(adapter.state_dict())
    twin = copy.deepcopy(adapter)
    expected = replay(adapter, batches[2:])
    assert are_equal(expected, replay(twin, batches[2:]))
    other = T3A(unsure_network(norm), filter_k=3)
    other.load_state_dict(saved)
    assert are_equal(expected, replay(other, batches[2:]))
    for each in (adapter, other):
        each.reset()
        assert each.memory == {}
    assert are_equal(replay(adapter, batches), replay(other, batches))
    assert are_equal(replay(T3A(unsure_network(norm), 3), batches)[2:], expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_whatever_grad_mode_surrounds_it(mode):
    expected = replay(T3A(unsure_network("bn")), coloured_squares(2))
    adapter = T3A(unsure_network("bn"))
    with mode():
        assert are_equal(replay(adapter, coloured_squares(2)), expected)
        forward = adapter(coloured_squares(1)[0])
    assert not any(tensor.is_inference() for tensor in (forward, *adapter.memory.values()))


def test_a_stream_of_one_class_and_images_alone():
    image = coloured_squares(1, size=1)[0]
    adapter = T3A(unsure_network("ln"), filter_k=2)
    for _ in range(5):
        assert adapter.adapt_step(image).isfinite().all()
    assert len(adapter.memory["labels"]) <= 10 + 2


class TestNotFinite:
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_some_images_are_not_kept(self, bad):
        before, images, after = coloured_squares(3)
        keep = torch.ones(16, dtype=torch.bool)
        keep[[3, 9]] = False
        images[~keep] = bad
        adapter, other = T3A(unsure_network("gn"), 4), T3A(unsure_network("gn"), 4)
        assert torch.equal(adapter.adapt_step(before), other.adapt_step(before))
        with pytest.warns(
            UserWarning, match="2 of 16 images gave .* not finite; .* not add"
        ) as got:
            actual = adapter.adapt_step(images)
        assert got[0].filename == __file__
        assert torch.equal(actual[keep], other.adapt_step(images[keep]))
        assert actual[~keep].isnan().all()
        assert are_equal(adapter.memory, other.memory)
        report = adapter.report
        assert (report.updated, report.finite, report.failed) == (True, False, 2)
        assert report.reason.startswith("2 of 16 images")
        assert torch.equal(adapter.adapt_step(after), other.adapt_step(after))

    def test_a_whole_batch_changes_nothing(self):
        adapter = T3A(make_network("bn"))
        bad = torch.full((4, 3, 32, 32), torch.nan)
        with pytest.warns(UserWarning, match="4 of 4"):
            assert adapter.adapt_step(bad).isnan().all()
        assert adapter.memory == {}
        adapter.adapt_step(make_batches(1)[0])
        kept = copy.deepcopy(adapter.state_dict())
        with pytest.warns(UserWarning, match="4 of 4"):
            adapter.adapt_step(bad)
        assert are_equal(adapter.state_dict(), kept)
        assert (adapter.report.updated, adapter.report.finite) == (False, False)

    def test_features_that_the_network_hides(self):
        class Hiding(Colours):
            def forward(self, images):
                return super().forward(images).nan_to_num()

        adapter = T3A(Hiding(UNITY))
        adapter.adapt_step(plain_images([[0.5, 0.1, 0.2]]))
        with pytest.warns(UserWarning, match="1 of 2"):
            logits = adapter.adapt_step(plain_images([[0.5, 0.1, 0.2], [torch.nan, 1.5, 0.0]]))
        assert logits.isnan().all(1).tolist() == [False, True]
        assert len(adapter.memory["labels"]) == 3 + 2

    def test_logits_overflow(self):
        adapter = T3A(Colours([[1e308, 1e308, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        with pytest.warns(UserWarning, match="1 of 2"):
            adapter.adapt_step(plain_images([[1.5, 1.5, 0.0], [0.0, 0.1, 0.2]]))
        assert len(adapter.memory["labels"]) == 3 + 1

    def test_no_image_at_all(self):
        adapter = T3A(make_network("gn"))
        assert adapter.adapt_step(torch.empty(0, 3, 32, 32)).shape == (0, 10)
        assert not adapter.report.updated
        assert adapter.memory == {}


class TestPrecision:
    def test_autocast_reaches_the_network_alone(self):
        adapter = T3A(unsure_network("gn").float(), filter_k=4)
        adapter.ready()
        for images in coloured_squares(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                features = adapter.outputs(images.float()).features
                actual = adapter.adapt_step(images.float())
            assert actual.dtype == torch.float32
            supports, labels = adapter.memory["supports"].double(), adapter.memory["labels"]
            sums = torch.stack([supports[labels == c].sum(0) for c in range(10)])
            expected = features.double() @ nn.functional.normalize(sums, dim=1).T
            torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)
        assert adapter.memory["entropies"].dtype == torch.float32

    def test_the_first_supports_are_predicted_in_full_precision(self):
        network = make_network("gn")
        adapter, images = T3A(network), make_batches(1)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            adapter.adapt_step(images)
        head = head_of(network)
        p = (head.weight @ head.weight.T + head.bias).softmax(1).double()
        expected = -(p * p.log()).sum(1)
        for entropy in expected:
            assert (adapter.memory["entropies"] - entropy).abs().min() < 1e-6

    def test_supports_keep_their_precision_when_the_module_is_cast(self):
        adapter = T3A(make_network("gn"))
        batches = make_batches(3)
        adapter.adapt_step(batches[0])
        kept = copy.deepcopy(adapter.memory)
        adapter.bfloat16()
        assert are_equal(adapter.memory, kept)
        assert adapter.adapt_step(batches[1].bfloat16()).dtype == torch.float32
        adapter.double()
        assert adapter.memory["supports"].dtype == torch.float64
        assert adapter.memory["labels"].dtype == torch.int64
        adapter.adapt_step(batches[2].double())
        adapter.bfloat16()
        assert adapter.adapt_step(batches[2].bfloat16()).isfinite().all()
        assert len(adapter.memory["labels"]) == 10 + 4 * 16

    def test_a_network_in_half_precision(self):
        adapter = T3A(make_network("ln").bfloat16())
        assert adapter.adapt_step(make_batches(1)[0].bfloat16()).isfinite().all()
        assert adapter.memory["supports"].dtype == torch.float32
        lengths = adapter.memory["supports"].norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6)


@pytest.mark.parametrize("classes", [[7, 2], [2, 7, 5]])
def test_the_classes_may_change_after_a_reset_only(classes):
    images = make_batches(1)[0]
    adapter = T3A(make_network("gn"))
    adapter.restrict_classes([7, 2, 5])
    adapter.adapt_step(images)
    adapter.restrict_classes(classes)
    with pytest.raises(InputError, match=r"there were 3 classes.*reset"):
        adapter.adapt_step(images)
    adapter.reset()
    assert adapter.adapt_step(images).shape == (16, len(classes))


class TestHeads:
    def test_none(self):
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        with pytest.raises(InputError, match="no single linear head"):
            T3A(network).adapt_step(make_batches(1)[0])

    def test_one_that_is_not_final(self):
        class Rewired(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 5)
                self.last = nn.Linear(5, 3)

            def forward(self, images):
                return self.last(self.fc(images.flatten(1)[:, :4]))

        with pytest.raises(InputError, match="'fc' looks like it, but did not run once"):
            T3A(Rewired()).adapt_step(make_batches(1)[0])

    def test_one_whose_output_is_scaled(self):
        class Scaled(Colours):
            def forward(self, images):
                return 3 * super().forward(images)

        with pytest.raises(InputError, match="away from its output"):
            T3A(Scaled(UNITY)).adapt_step(plain_images([[0.5, 0.1, 0.2]]))


@pytest.mark.parametrize("filter_k", [0, -2, 2.5, math.nan])
def test_wrong_hyper_parameters(filter_k):
    with pytest.raises(InputError, match=f"filter_k = {filter_k} is out of range"):
        T3A(make_network("gn"), filter_k)


def test_describes_itself():
    described = T3A(make_network("gn")).describe()
    assert described["predicts"] == "after update"
    assert described["rule"] is None
    assert described["hyper_parameters"] == {"filter_k": 100}
