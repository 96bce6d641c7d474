"""CoTTA against its equations written out by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.networks import are_equal, make_batches, make_network, sharp_network
from tta_lightning.errors import InputError
from tta_lightning.methods import cotta
from tta_lightning.methods.cotta import CoTTA
from tta_lightning.rules import SGD, Adam

LR, MOMENTUM = 0.05, 0.9


def network_of(norm):
    """The source model's mean confidence in a batch is 0.4 to 0.8."""
    return sharp_network(norm, 5 if norm == "ln" else 20)


def batches_of(count=4):
    return [images.double() for images in make_batches(count)]


def make_cotta(network, **options):
    return CoTTA(network, SGD(lr=LR, momentum=MOMENTUM), **{"n_augmentations": 3, **options})


def darker_and_darker(monkeypatch):
    """Replace the augmentation: the n-th view of a step is x^(1 + n / 2).

    A plain factor would not do: batch normalisation takes it out again.
    """
    counts = {}

    def view(images, generator):
        step = generator.initial_seed()
        counts[step] = counts.get(step, 0) + 1
        return images ** (1 + counts[step] / 2)

    monkeypatch.setattr(cotta, "augment", view)


class CoTTAByHand:
    """The equations of the paper with three networks and torch's SGD; no entry is restored."""

    def __init__(self, network, mt=0.999, ap=0.92, views=3, term=0.0):
        self.student = network.train()  # no dropout in there: only batch normalisation minds
        self.teacher, self.anchor = copy.deepcopy(network), copy.deepcopy(network)
        self.optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM)
        self.mt, self.ap, self.views, self.term = mt, ap, views, term
        self.averaged = []

    def step(self, images):
        with torch.no_grad():
            p = self.anchor(images).softmax(1)
            confidence = sum(row.max().item() for row in p) / len(p)
            self.averaged.append(confidence < self.ap)
            if confidence < self.ap:
                target = sum(self.teacher(images ** (1.5 + n / 2)) for n in range(self.views))
                target = target / self.views
            else:
                target = self.teacher(images)
        student = self.student(images)
        log_p = student - student.exp().sum(1, keepdim=True).log()
        y = target.exp() / target.exp().sum(1, keepdim=True)
        loss = -(y * log_p).sum() / len(images) + self.term * student.square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for slow, fast in pairs:
            slow.data = self.mt * slow.data + (1 - self.mt) * fast.data
        return target


@pytest.mark.parametrize("norm", ["bn", "gn", "ln"])
@pytest.mark.parametrize(
    ("ap", "averaged", "term"),
    [
        (0.92, [True] * 4, 0.0),
        (0.92, [True] * 4, 0.5),
        (0.0, [False] * 4, 0.5),  # without a term the gradient is zero: see the test below
        ("between", None, 0.0),
        ("between", None, 0.5),
    ],
)
def test_equals_the_equations_written_by_hand(norm, ap, averaged, term, monkeypatch):
    darker_and_darker(monkeypatch)
    if ap == "between":  # some batches are averaged, some are not
        network = network_of(norm).train()
        found = sorted(network(x).softmax(1).amax(1).mean().item() for x in batches_of())
        ap = (found[1] + found[2]) / 2
    by_hand = CoTTAByHand(network_of(norm), mt=0.9, ap=ap, term=term)
    adapter = make_cotta(network_of(norm), mt=0.9, rst=0.0, ap=ap)
    if term:
        adapter.terms.append(lambda out, head: term * out.logits.square().mean())
    for images in batches_of():
        expected = by_hand.step(images)
        torch.testing.assert_close(adapter.adapt_step(images), expected, rtol=0, atol=1e-10)
        assert adapter.report.updated
    pairs = zip(by_hand.student.parameters(), network_of(norm).parameters(), strict=True)
    moved = max((ours - source).abs().max().item() for ours, source in pairs)
    assert moved > 1e-3  # more than rounding
    if averaged is None:
        assert sum(by_hand.averaged) == 2
    else:
        assert by_hand.averaged == averaged
    pairs = zip(by_hand.student.named_parameters(), by_hand.teacher.parameters(), strict=True)
    for (name, student), teacher in pairs:
        torch.testing.assert_close(adapter.network.get_parameter(name), student, rtol=0, atol=1e-10)
        torch.testing.assert_close(adapter.memory["teacher"][name], teacher, rtol=0, atol=1e-10)


def test_nothing_is_learnt_as_long_as_all_batches_are_sure():
    adapter = make_cotta(network_of("gn"), ap=0.0)
    for images in batches_of():
        adapter.adapt_step(images)
    pairs = zip(adapter.network.parameters(), network_of("gn").parameters(), strict=True)
    assert all((ours - source).abs().max() < 1e-11 for ours, source in pairs)


def test_every_parameter_moves_and_no_statistics():
    network = network_of("bn")
    adapter = make_cotta(network)
    source = copy.deepcopy(network.state_dict())
    adapter.adapt_step(batches_of(1)[0])
    changed = {n for n, t in network.state_dict().items() if not torch.equal(t, source[n])}
    # A bias before batch normalisation has no effect: its gradient is rounding alone.
    assert changed | {"0.bias", "3.bias"} == set(dict(network.named_parameters()))
    assert list(adapter.adapted_parameters) == [name for name, _ in network.named_parameters()]


def test_a_network_without_normalisation_is_adapted():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)).double()
    adapter = make_cotta(network)
    adapter.adapt_step(batches_of(1)[0])
    assert adapter.report.updated


def test_dropout_is_off():
    network = nn.Sequential(make_network("gn"), nn.Dropout(0.9))
    network.train()
    adapter = CoTTA(network, SGD(lr=0.0), ap=0.0)
    images = make_batches(1)[0]
    assert torch.equal(adapter.adapt_step(images), adapter.adapt_step(images))


class TestRestore:
    def test_a_share_of_the_entries_returns_and_the_others_stay_as_they_were(self):
        images = batches_of(1)[0]
        adapters = [make_cotta(network_of("gn"), ap=1.0, rst=rst) for rst in (0.0, 0.3)]
        for adapter in adapters:
            adapter.adapt_step(images)
        free, restored = (
            torch.cat([p.detach().flatten() for p in a.adapted_parameters.values()])
            for a in adapters
        )
        source = torch.cat([p.detach().flatten() for p in network_of("gn").parameters()])
        moved = free != source
        count = moved.sum().item()
        assert count > 1900  # of 2,088
        assert (free - source).abs().median() > 1e-4  # learnt, and not rounded
        back = moved & (restored == source)
        assert torch.equal(restored[~back], free[~back])
        # The bounds are four standard deviations away.
        assert back.sum().item() == pytest.approx(0.3 * count, abs=4 * math.sqrt(0.21 * count))

    def test_all_of_it(self):
        adapter = make_cotta(network_of("gn"), ap=1.0, rst=1.0, mt=0.5)
        adapter.adapt_step(batches_of(1)[0])
        pairs = zip(adapter.network.parameters(), network_of("gn").parameters(), strict=True)
        assert all(torch.equal(ours, source) for ours, source in pairs)
        teacher = adapter.memory["teacher"]["8.weight"]  # met the student before the restore
        assert not torch.equal(teacher, network_of("gn")[8].weight)

    def test_other_entries_at_each_step(self):
        adapter = make_cotta(network_of("gn"), ap=1.0, rst=0.5)
        source, masks = network_of("gn")[8].weight, []
        for images in batches_of(2):
            adapter.adapt_step(images)
            masks.append(adapter.network[8].weight == source)
            assert 200 < masks[-1].sum() < 440  # of 640
        assert not torch.equal(*masks)


class TestRandomness:
    def test_the_seed_decides(self):
        images = batches_of(1)[0]
        logits = [make_cotta(network_of("gn"), seed=s).adapt_step(images) for s in (4, 4, 5)]
        assert torch.equal(logits[0], logits[1])
        assert not torch.equal(logits[0], logits[2])

    def test_each_step_has_its_own_views(self):
        adapter = make_cotta(network_of("gn"), mt=1.0)  # the teacher stays as it is
        images = batches_of(1)[0]
        assert not torch.equal(adapter.adapt_step(images), adapter.adapt_step(images))

    def test_the_global_generator_is_left_alone(self):
        adapter = make_cotta(network_of("gn"))
        torch.manual_seed(3)
        state = torch.get_rng_state()
        adapter.adapt_step(batches_of(1)[0])
        assert torch.equal(torch.get_rng_state(), state)

    def test_reset_and_a_loaded_state_replay(self):
        batches = batches_of()
        adapter = make_cotta(network_of("bn"), mt=0.5, rst=0.2)
        adapter.adapt_step(batches[0])
        adapter.adapt_step(batches[1])
        saved = copy.deepcopy(adapter.state_dict())
        expected = [adapter.adapt_step(images) for images in batches[2:]]
        other = make_cotta(network_of("bn"), mt=0.5, rst=0.2)
        other.load_state_dict(saved)
        assert all(map(torch.equal, expected, [other.adapt_step(x) for x in batches[2:]]))
        for each in (adapter, other):
            each.reset()
            assert each.memory == {}
        replayed = [[each.adapt_step(x) for x in batches[:3]] for each in (adapter, other)]
        assert torch.equal(replayed[0][2], expected[0])
        assert all(map(torch.equal, *replayed))


def test_forward_predicts_what_the_next_step_returns():
    adapter = make_cotta(network_of("bn"), mt=0.5)
    for images in batches_of(3):
        expected = adapter(images)
        assert torch.equal(adapter.adapt_step(images), expected)


def test_classes_are_restricted_in_teacher_source_and_student(monkeypatch):
    images, classes = batches_of(1)[0], [7, 2, 5]
    full = network_of("gn")(images)[:, classes]
    confidence = full.softmax(1).amax(1).mean().item()
    seen = []
    monkeypatch.setattr(cotta, "augment", lambda images, generator: seen.append(1) or images)
    for ap, views in ((confidence - 0.01, 0), (confidence + 0.01, 3)):
        seen.clear()
        adapter = make_cotta(network_of("gn"), ap=ap)
        adapter.restrict_classes(classes)
        torch.testing.assert_close(adapter.adapt_step(images), full, rtol=0, atol=1e-12)
        assert len(seen) == views
        p = full.softmax(1)
        assert adapter.report.loss.item() == pytest.approx(-(p * p.log()).sum(1).mean().item())


def test_a_batch_that_is_not_finite_changes_nothing():
    adapter = CoTTA(make_network("bn"), Adam(lr=0.01), n_augmentations=2)
    batches = make_batches(3)
    adapter.adapt_step(batches[0])
    kept = copy.deepcopy(adapter.state_dict())
    batches[1][3] = torch.nan
    with pytest.warns(UserWarning, match="not finite"):
        adapter.adapt_step(batches[1])
    assert not adapter.report.finite
    assert are_equal(kept, adapter.state_dict())
    other = CoTTA(make_network("bn"), Adam(lr=0.01), n_augmentations=2)
    other.adapt_step(batches[0])
    assert torch.equal(adapter.adapt_step(batches[2]), other.adapt_step(batches[2]))


def test_the_network_gets_its_weights_back_when_a_view_fails(monkeypatch):
    adapter = make_cotta(network_of("gn"))
    adapter.adapt_step(batches_of(1)[0])
    kept = copy.deepcopy(adapter.network.state_dict())
    pointers = [p.data_ptr() for p in adapter.network.parameters()]

    def broken(images, generator):
        raise RuntimeError("of the user's")

    monkeypatch.setattr(cotta, "augment", broken)
    with pytest.raises(RuntimeError, match="of the user's"):
        adapter.adapt_step(batches_of(1)[0])
    assert all(torch.equal(t, kept[n]) for n, t in adapter.network.state_dict().items())
    assert [p.data_ptr() for p in adapter.network.parameters()] == pointers


def test_three_sets_of_weights_are_held():
    adapter = make_cotta(network_of("gn"))
    adapter.adapt_step(batches_of(1)[0])
    size = sum(p.numel() for p in adapter.network.parameters())
    source = sum(t.numel() for t in adapter._source.values())
    teacher = sum(t.numel() for t in adapter.memory["teacher"].values())
    assert (source, teacher) == (size, size)
    assert set(adapter.memory) == {"teacher", "step"}


class TestHalfPrecision:
    @pytest.fixture
    def stepped(self):
        """Adapters of the same weights in two precisions, after three steps."""
        torch.manual_seed(0)
        rounded = make_network("gn").bfloat16()
        adapters = []
        for dtype in (torch.bfloat16, torch.float32):
            network = copy.deepcopy(rounded).to(dtype)
            adapter = CoTTA(network, SGD(lr=0.5), rst=0.0, ap=1.0, n_augmentations=2)
            for images in make_batches(3):
                adapter.adapt_step(images.to(dtype))
            adapters.append(adapter)
        return adapters

    def test_the_teacher_moves_where_the_student_does(self, stepped):
        def moved(adapter, weights):
            return sum((t != adapter._source[f"network.{n}"]).sum() for n, t in weights.items())

        for adapter in stepped:  # in half precision steps of the student are lost as well
            student = moved(adapter, adapter.adapted_parameters)
            assert student > 1000
            assert moved(adapter, adapter.memory["teacher"]) > 0.95 * student

    def test_the_teacher_keeps_its_precision_when_the_module_is_cast(self, stepped):
        full = stepped[1]
        kept, step = copy.deepcopy(full.memory["teacher"]), full.memory["step"]
        full.bfloat16()
        assert are_equal(full.memory, {"teacher": kept, "step": step})
        full.adapt_step(make_batches(1)[0].bfloat16())
        full.double()
        assert {t.dtype for t in full.memory["teacher"].values()} == {torch.float64}
        full.adapt_step(batches_of(1)[0])
        assert full.memory["step"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mt": 1.1}, "mt = 1.1"),
        ({"rst": -0.1}, "rst = -0.1"),
        ({"ap": math.nan}, "ap = nan"),
        ({"n_augmentations": 0}, "n_augmentations = 0"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_wrong_hyper_parameters(options, message):
    with pytest.raises(InputError, match=message):
        CoTTA(make_network("gn"), **options)


def test_describes_itself():
    described = CoTTA(make_network("gn")).describe()
    assert described["predicts"] == "before update"
    assert described["hyper_parameters"] == {
        "mt": 0.999,
        "rst": 0.01,
        "ap": 0.92,
        "n_augmentations": 32,
        "seed": 0,
    }
