"""LAME against its equations written out by hand, image by image."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.networks import (
    coloured_squares,
    head_of,
    make_batches,
    make_network,
    sharp_network,
    tensors_of,
)
from tta_lightning.errors import InputError
from tta_lightning.methods.lame import LAME

AFFINITIES = ["knn", "rbf", "linear"]


def distance(u, v):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(u, v, strict=True)))


def affinity_by_hand(units, kind, k):
    """w of unit vectors, as a list of lists."""
    everyone = range(len(units))
    w = [[0.0 for _ in everyone] for _ in everyone]
    if kind == "linear":
        return [[sum(a * b for a, b in zip(u, v, strict=True)) for v in units] for u in units]
    d = [[distance(u, v) for v in units] for u in units]
    if kind == "knn":
        for i in everyone:
            others = sorted((j for j in everyone if j != i), key=lambda j: d[i][j])
            for j in others[:k]:
                w[i][j] = 1.0
        return w
    sigma = sum(sorted(row)[min(k, len(units)) - 1] for row in d) / len(units)
    for i in everyone:
        for j in everyone:
            w[i][j] = math.exp(-(d[i][j] ** 2) / (2 * sigma**2))
    return w


def softmax(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def by_hand(logits, features, kind="knn", k=5, symmetric=False, max_steps=100):
    """The last exponent [B, C] in float64, and after how many iterations."""
    units = [[x / distance(row, [0.0] * len(row)) for x in row] for row in features.tolist()]
    w = affinity_by_hand(units, kind, k)
    everyone, classes = range(len(units)), range(logits.shape[1])
    if symmetric:
        w = [[(w[i][j] + w[j][i]) / 2 for j in everyone] for i in everyone]
    unary = [[-math.log(q + 1e-10) for q in softmax(row)] for row in logits.tolist()]
    z = [softmax([-u for u in row]) for row in unary]
    energies = []
    for _ in range(max_steps):
        pull = [[sum(w[i][j] * z[j][c] for j in everyone) for c in classes] for i in everyone]
        exponent = [[pull[i][c] - unary[i][c] for c in classes] for i in everyone]
        z = [softmax(row) for row in exponent]
        energy = 0.0
        for i in everyone:
            for c in classes:
                entropy = z[i][c] * math.log(max(z[i][c], 1e-20))
                energy += unary[i][c] * z[i][c] - pull[i][c] * z[i][c] + entropy
        energies.append(energy)
        settled = len(energies) > 2 and abs(energy - energies[-2]) <= 1e-8 * abs(energies[-2])
        if settled:
            break
    return torch.tensor(exponent, dtype=torch.float64), len(energies)


def source_outputs(network, images):
    """Logits and features of the network in evaluation mode."""
    network = copy.deepcopy(network).eval()
    seen = []
    head_of(network).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = network(images)
    return logits, seen[0]


def unsure_network(norm):
    """A network in float64 whose head prefers no class, so that its predictions differ."""
    network = sharp_network(norm, 20 if norm == "bn" else 3)
    with torch.no_grad():
        logits, _ = source_outputs(network, torch.cat(coloured_squares(3)))
        head_of(network).bias -= logits.mean(0)
    return network


class Colours(nn.Module):
    """Its features are the mean colours of an image, so tests choose them."""

    def __init__(self, weight, bias=(0.0, 0.0, 0.0)):
        super().__init__()
        self.fc = nn.Linear(3, len(weight)).double()
        self.fc.weight.data = torch.tensor(weight, dtype=torch.float64)
        self.fc.bias.data = torch.tensor(bias, dtype=torch.float64)

    def forward(self, images):
        return self.fc(images.mean((2, 3)))


def plain_images(colours):
    """One image of each colour, [B, 3, 4, 4]."""
    return torch.tensor(colours, dtype=torch.float64)[:, :, None, None].expand(-1, -1, 4, 4)


UNITY = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize("norm", ["bn", "gn", "ln"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("kind", "k"), [("knn", 5), ("knn", 2), ("rbf", 5), ("linear", 5)])
def test_equals_the_equations_written_by_hand(norm, kind, k, symmetric):
    network = unsure_network(norm)
    adapter = LAME(network, kind, k, symmetric)
    source = tensors_of(adapter)
    corrected = 0
    for images in [*coloured_squares(3), coloured_squares(1, size=3)[0]]:  # 3: fewer than k others
        logits, features = source_outputs(network, images)
        expected, steps = by_hand(logits, features, kind, k, symmetric)
        actual = adapter.adapt_step(images)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
        corrected += (actual.argmax(1) != logits.argmax(1)).sum().item()
        assert 3 <= steps < 100
    assert corrected > 0
    assert all(torch.equal(t, source[n]) for n, t in tensors_of(adapter).items())


@pytest.mark.parametrize("max_steps", [1, 2, 5])
def test_ends_after_the_steps_it_may_take(max_steps):
    network, images = unsure_network("gn"), coloured_squares(1)[0]
    expected, steps = by_hand(*source_outputs(network, images), max_steps=max_steps)
    assert steps == max_steps
    actual = LAME(network, max_steps=max_steps).adapt_step(images)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


class CountedProducts(torch.overrides.TorchFunctionMode):
    """How often the affinity is multiplied by predictions; nothing else here uses the operator."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in ("matmul", "__matmul__")
        return function(*args, **(kwargs or {}))


def test_ends_when_the_energy_has_settled_but_not_before_the_third_step():
    network, images = unsure_network("gn"), coloured_squares(1)[0]
    needed = []
    for batch in (images, images[:4], images[:1]):
        needed.append(by_hand(*source_outputs(network, batch))[1])
        with CountedProducts() as products:
            LAME(network).adapt_step(batch)
        assert products.count == needed[-1]
    assert needed[0] > needed[1] > needed[2] == 3


def test_one_step_in_numbers():
    # The nearest of the first is the second and the other way round; of the third, the second.
    network, images = Colours(UNITY), plain_images([[1.0, 0, 0], [1.0, 0.1, 0], [0, 1.0, 0]])
    e = math.e
    q = torch.tensor([[e, 1, 1], [e, math.exp(0.1), 1], [1, e, 1]], dtype=torch.float64)
    q = q / q.sum(1, keepdim=True)
    expected = (q + 1e-10).log() + q[[1, 0, 1]]
    actual = LAME(network, k=1, max_steps=1).adapt_step(images)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", AFFINITIES)
def test_the_length_of_the_features_does_not_matter(kind):
    images = plain_images([[0.9, 0.2, 0.1], [0.3, 0.5, 0.1], [0.1, 0.2, 0.3], [0.2, 0.4, 0.1]])
    small, large = Colours(UNITY), Colours([[5.0 * x for x in row] for row in UNITY])
    logits = [LAME(net, kind, 2).adapt_step(x) for net, x in ((small, images), (large, images / 5))]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-12)


class TestEqualFeatures:
    def test_an_image_is_not_its_own_neighbour(self):
        # Of the twins each is the other's; of two at the same distance the first one counts.
        network = Colours(UNITY)
        images = plain_images([[1.0, 0, 0], [0, 0.5, 0], [0, 0, 2.0], [0, 0, 4.0]])
        q = source_outputs(network, images)[0].softmax(1)
        expected = (q + 1e-10).log() + q[[1, 0, 3, 2]]
        actual = LAME(network, k=1, max_steps=1).adapt_step(images)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)

    def test_of_many_equally_near_the_first_ones_count(self):
        network = Colours(UNITY)
        images = plain_images([[i / 16, 0.0, 0.0] for i in range(1, 65)])  # of one direction
        q = source_outputs(network, images)[0].softmax(1)
        first = [[j for j in range(4) if j != i][:3] for i in range(64)]
        expected = (q + 1e-10).log() + q[first].sum(1)
        actual = LAME(network, k=3, max_steps=1).adapt_step(images)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)

    def test_a_wide_batch_of_one_image(self):
        network = Colours(UNITY)
        images = plain_images([[0.5, 0.25, 0.125]] * 6)
        q = source_outputs(network, images)[0].softmax(1)
        for kind, others in (("knn", 5), ("rbf", 6), ("linear", 6)):
            actual = LAME(network, kind, max_steps=1).adapt_step(images)
            expected = (q + 1e-10).log() + others * q
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)

    def test_rbf_of_width_0_ties_equal_images_alone(self):
        network = Colours(UNITY)
        images = plain_images([[0.5, 0.25, 0.125]] * 2 + [[0.125, 0.5, 0.25]] * 2)
        q = source_outputs(network, images)[0].softmax(1)
        actual = LAME(network, "rbf", k=2, max_steps=1).adapt_step(images)
        torch.testing.assert_close(actual, (q + 1e-10).log() + 2 * q, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", AFFINITIES)
@pytest.mark.parametrize("norm", ["bn", "gn", "ln"])
def test_an_image_alone_keeps_its_class(kind, norm):
    network = unsure_network(norm)
    adapter = LAME(network, kind)
    for image in coloured_squares(1, size=8)[0].split(1):
        logits = source_outputs(network, image)[0]
        actual = adapter.adapt_step(image)
        assert torch.equal(actual.argmax(1), logits.argmax(1))
        if kind == "knn":
            torch.testing.assert_close(actual.softmax(1), logits.softmax(1), rtol=0, atol=1e-9)


def test_nothing_is_carried_over():
    first, second = coloured_squares(2)
    adapter = LAME(unsure_network("bn"))
    expected = adapter.adapt_step(first)
    adapter.adapt_step(second)
    assert torch.equal(adapter.adapt_step(first), expected)
    assert adapter.memory == {}
    assert adapter.moving_tensors() == {}
    assert (adapter.report.updated, adapter.report.finite) == (False, True)
    assert "learns nothing" in adapter.report.reason


def test_predictions_depend_on_the_company():
    images = coloured_squares(1)[0]
    adapter = LAME(unsure_network("gn"))
    assert not torch.allclose(adapter.adapt_step(images)[:8], adapter.adapt_step(images[:8]))


def test_forward_predicts_what_a_step_returns():
    adapter = LAME(unsure_network("bn"), "rbf")
    images = coloured_squares(1)[0]
    expected = adapter.adapt_step(images)
    report = adapter.report
    assert torch.equal(adapter(images), expected)
    assert adapter.report is report
    assert not expected.requires_grad


def test_what_the_network_returned_is_left_as_it_was():
    network, seen = unsure_network("gn"), []
    network.register_forward_hook(lambda module, args, logits: seen.append((logits, logits + 0)))
    LAME(network).adapt_step(coloured_squares(1)[0])
    assert torch.equal(*seen[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_whatever_grad_mode_surrounds_it(mode):
    expected = LAME(unsure_network("bn")).adapt_step(coloured_squares(1)[0])
    adapter = LAME(unsure_network("bn"))
    with mode():
        images = coloured_squares(1)[0]  # of that mode as well
        found = [adapter.adapt_step(images), adapter(images)]
    assert all(torch.equal(logits, expected) for logits in found)
    assert not any(logits.is_inference() for logits in found)


def test_classes_are_restricted_before_the_softmax():
    network, images, classes = unsure_network("gn"), coloured_squares(1)[0], [7, 2, 5]
    adapter = LAME(network)
    adapter.restrict_classes(classes)
    logits, features = source_outputs(network, images)
    expected, _ = by_hand(logits[:, classes], features)
    torch.testing.assert_close(adapter.adapt_step(images), expected, rtol=0, atol=1e-10)


class TestNotFinite:
    @pytest.mark.parametrize("kind", AFFINITIES)
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_some_images_are_left_out(self, kind, bad):
        images = coloured_squares(1)[0]
        keep = torch.ones(16, dtype=torch.bool)
        keep[[3, 9]] = False
        images[~keep] = bad
        adapter = LAME(unsure_network("gn"), kind)
        expected = adapter.adapt_step(images[keep])
        with pytest.warns(UserWarning, match="2 of 16 images gave .* not finite; .* apart") as seen:
            actual = adapter.adapt_step(images)
        assert seen[0].filename == __file__
        assert torch.equal(actual[keep], expected)
        assert actual[~keep].isnan().all()
        assert (adapter.report.updated, adapter.report.finite) == (False, False)
        assert adapter.report.reason.startswith("2 of 16 images")

    @pytest.mark.parametrize("kind", AFFINITIES)
    def test_a_whole_batch(self, kind):
        adapter = LAME(make_network("bn"), kind)
        with pytest.warns(UserWarning, match="4 of 4"):
            assert adapter.adapt_step(torch.full((4, 3, 32, 32), torch.nan)).isnan().all()
        assert not adapter.report.finite

    def test_logits_overflow(self):
        network = Colours([[1e308, 1e308, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        images = plain_images([[0.5, 0.1, 0.2], [1.5, 1.5, 0.0], [0.1, 0.1, 0.2]])
        with pytest.warns(UserWarning, match="1 of 3"):
            actual = LAME(network, k=1).adapt_step(images)
        assert torch.equal(actual[1], network(images)[1])  # as the network said, inf and all
        assert actual[[0, 2]].isfinite().all()

    def test_features_that_the_network_hides(self):
        class Hiding(Colours):
            def forward(self, images):
                return super().forward(images).nan_to_num()

        images = plain_images([[0.5, 0.1, 0.2], [torch.nan, 1.5, 0.0], [0.1, 0.1, 0.2]])
        with pytest.warns(UserWarning, match="1 of 3"):
            actual = LAME(Hiding(UNITY)).adapt_step(images)
        assert actual[1].tolist() == [0, 0, 0]
        assert actual.isfinite().all()

    def test_no_image_at_all(self):
        adapter = LAME(make_network("gn"))
        assert adapter.adapt_step(torch.empty(0, 3, 32, 32)).shape == (0, 10)


@pytest.mark.parametrize("kind", AFFINITIES)
def test_autocast_reaches_the_network_alone(kind):
    images = coloured_squares(1)[0].float()
    adapter = LAME(unsure_network("gn").float(), kind)
    adapter.ready()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = adapter.outputs(images)
        actual = adapter.adapt_step(images)
    assert out.logits.dtype == torch.bfloat16
    assert actual.dtype == torch.float32
    expected, _ = by_hand(out.logits, out.features, kind)
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=1e-3)


def test_a_network_in_half_precision():
    adapter = LAME(make_network("ln").bfloat16())
    logits = adapter.adapt_step(make_batches(1)[0].bfloat16())
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_a_network_without_a_final_linear_map():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="no single linear head"):
        LAME(network).adapt_step(make_batches(1)[0])


def test_a_linear_map_that_is_not_the_final_one():
    class Rewired(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 5)
            self.last = nn.Linear(5, 3)

        def forward(self, images):
            return self.last(self.fc(images.flatten(1)[:, :4]))

    with pytest.raises(InputError, match="'fc' looks like it, but did not run once"):
        LAME(Rewired()).adapt_step(make_batches(1)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"affinity": "kn"}, r"(?s)affinity.*'kn'.*knn"),
        ({"k": 0}, "k = 0 is out of range: expected 1 <= k"),
        ({"affinity": "rbf", "k": 1}, "k = 1 is out of range: expected 2 <= k"),
        ({"k": 2.5}, "k = 2.5 is out of range: expected a whole number"),
        ({"max_steps": 0}, "max_steps = 0 is out of range"),
        ({"max_steps": math.nan}, "max_steps = nan is out of range"),
        ({"max_steps": 1.5}, "max_steps = 1.5 is out of range: expected a whole number"),
    ],
)
def test_wrong_hyper_parameters(options, message):
    with pytest.raises(InputError, match=message):
        LAME(make_network("gn"), **options)


def test_describes_itself():
    described = LAME(make_network("gn")).describe()
    assert described["predicts"] == "jointly for each batch"
    assert described["rule"] is None
    assert described["hyper_parameters"] == {
        "affinity": "knn",
        "k": 5,
        "symmetric": False,
        "max_steps": 100,
    }
