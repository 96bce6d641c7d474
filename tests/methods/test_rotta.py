"""RoTTA against its equations written out by hand."""

import copy
import math
import random
import warnings
from contextlib import contextmanager

import pytest
import torch
from timm.layers import BatchNormAct2d
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
from tta_lightning.methods import rotta
from tta_lightning.methods.augment import augment
from tta_lightning.methods.memory_bank import MemoryBank
from tta_lightning.methods.rotta import RoTTA
from tta_lightning.models.norms import norm_layers
from tta_lightning.rules import SGD, Adam

NORMS = ("bn", "gn", "ln")
SMALL = {"memory_size": 8, "update_frequency": 5}  # of 10 classes: one place each


def network_of(norm):
    """A float64 network that takes coloured squares for seven classes or more."""
    if norm == "bn1d":
        torch.manual_seed(0)
        conv = [nn.Conv2d(3, 8, 8, stride=8), nn.Flatten(), nn.BatchNorm1d(128), nn.ReLU()]
        network = nn.Sequential(*conv, nn.Linear(128, 10)).double()
    else:
        network = sharp_network(norm, 20)
    with torch.no_grad():
        head_of(network).weight.mul_(10 if norm == "bn1d" else 1)
        typical = network.eval()(coloured_squares(1, size=64, seed=2)[0]).mean(0)
        head_of(network).bias.sub_(typical)
    return network.train()


def make_rotta(network, rule=None, **options):
    return RoTTA(network, rule or SGD(lr=0.05, momentum=0.9), **{**SMALL, **options})


def gamma(images, generator):
    """Stand in for the augmentation; a plain factor batch normalisation would take out again."""
    return images**1.5


# Written by hand ---------------------------------------------------------------------------------


class RobustBN(nn.Module):
    """Batch normalisation whose training forward blends, and differentiates, the batch's."""

    def __init__(self, layer, alpha):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.mean, self.var = layer.running_mean.clone(), layer.running_var.clone()
        self.alpha, self.eps = alpha, layer.eps

    def forward(self, x):
        mean, var = self.mean, self.var
        shape = [1, -1] + [1] * (x.dim() - 2)
        if self.training:
            values = x.transpose(0, 1).flatten(1)  # of each channel
            batch_mean = values.sum(1) / values.shape[1]
            batch_var = (values - batch_mean[:, None]).pow(2).sum(1) / values.shape[1]
            mean = (1 - self.alpha) * mean + self.alpha * batch_mean
            var = (1 - self.alpha) * var + self.alpha * batch_var
            self.mean, self.var = mean.detach(), var.detach()
        x = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + self.eps)
        return x * self.weight.view(shape) + self.bias.view(shape)


class BankByHand:
    """One list of [data, uncertainty, age] a class."""

    def __init__(self, capacity, classes, lambda_t=1.0, lambda_u=1.0):
        self.capacity, self.lambda_t, self.lambda_u = capacity, lambda_t, lambda_u
        self.lists = [[] for _ in range(classes)]

    def score(self, uncertainty, age):
        timeliness = 1 / (1 + math.exp(-age / self.capacity))
        return self.lambda_t * timeliness + self.lambda_u * uncertainty / math.log(len(self.lists))

    def find_room(self, label, score):
        sizes = [len(items) for items in self.lists]
        if sizes[label] >= self.capacity / len(self.lists):
            candidates = [label]
        elif sum(sizes) < self.capacity:
            return True
        else:
            candidates = [c for c, size in enumerate(sizes) if size == max(sizes)]
        worst, worst_score = None, -math.inf
        for c in candidates:
            for i, (_, uncertainty, age) in enumerate(self.lists[c]):
                if self.score(uncertainty, age) >= worst_score:
                    worst, worst_score = (c, i), self.score(uncertainty, age)
        if worst_score <= score:
            return False
        del self.lists[worst[0]][worst[1]]
        return True

    def add(self, data, label, uncertainty):
        if self.find_room(label, self.score(uncertainty, 0)):
            self.lists[label].append([data, uncertainty, 0])
        for items in self.lists:
            for item in items:
                item[2] += 1


class RoTTAByHand:
    """Two networks, torch's optimizer and plain lists; every image by itself."""

    def __init__(self, network, optimizer, nu=0.2, alpha=0.3, term=0.0, view=gamma):
        for name, layer in list(network.named_modules()):
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(network, name, RobustBN(layer, alpha))
        self.student, self.teacher = network, copy.deepcopy(network)
        self.norms = [m for m in network.modules() if isinstance(m, NORM_CLASSES)]
        self.optimizer = optimizer([p for m in self.norms for p in m.parameters()])
        self.bank, self.nu, self.term, self.view = BankByHand(8, 10, 0.3, 2.0), nu, term, view
        self.count, self.losses, self.sizes = 0, [], []

    def step(self, images):
        self.teacher.eval()
        logits = torch.cat([self.teacher(image[None]) for image in images]).detach()
        for image, z in zip(images, logits, strict=True):
            p = [math.exp(each) for each in (z - z.max()).tolist()]
            p = [each / sum(p) for each in p]
            entropy = -sum(each * math.log(each + 1e-6) for each in p)
            self.bank.add(image, p.index(max(p)), entropy)
            self.count += 1
            if self.count % 5 == 0:
                self.update()
        return logits

    def update(self):
        items = [item for items in self.bank.lists for item in items]
        images = torch.stack([data for data, _, _ in items])
        self.sizes.append(len(items))
        self.teacher.train()
        self.student.train()
        with torch.no_grad():
            target = self.teacher(images).softmax(1)
        student = self.student(self.view(images, None))
        loss = 0.0
        for p, z, (_, _, age) in zip(target, student, items, strict=True):
            a = age / 8
            weight = math.exp(-a) / (1 + math.exp(-a))
            loss = loss - weight * (p * (z - z.exp().sum().log())).sum() / len(items)
        loss = loss + self.term * student.square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for slow, fast in pairs:
            slow.data = (1 - self.nu) * slow.data + self.nu * fast.data


NORM_CLASSES = (RobustBN, nn.GroupNorm, nn.LayerNorm)


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def assert_holds(adapter, by_hand):
    """Compare student, teacher, both statistics and the bank."""
    teacher = adapter.memory["teacher"]
    for name, student in by_hand.student.named_parameters():
        assert_close(adapter.network.get_parameter(name), student)
    for name in adapter.adapted_parameters:
        assert_close(teacher[f"network.{name}"], by_hand.teacher.get_parameter(name))
    for name, module in by_hand.teacher.named_modules():
        if isinstance(module, RobustBN):
            ours, student = (n.get_submodule(name) for n in (adapter.network, by_hand.student))
            assert_close(teacher[f"network.{name}.running_mean"], module.mean)
            assert_close(teacher[f"network.{name}.running_var"], module.var)
            assert_close(ours.running_mean, student.mean)
            assert_close(ours.running_var, student.var)
            assert not torch.allclose(student.mean, module.mean, atol=1e-3)
    bank = adapter.memory["bank"]
    rows = sorted(zip(*(bank[n] for n in FIELDS), strict=True), key=lambda row: int(row[1]))
    expected = [(x, c, u, a) for c, items in enumerate(by_hand.bank.lists) for x, u, a in items]
    assert len(rows) == len(expected)
    for row, (image, label, uncertainty, age) in zip(rows, expected, strict=True):
        assert torch.equal(row[0], image)
        assert (int(row[1]), int(row[3])) == (label, age)
        assert row[2].item() == pytest.approx(uncertainty, abs=1e-12)


FIELDS = ("images", "labels", "uncertainties", "ages")


@pytest.mark.parametrize("norm", ["bn", "gn", "ln", "bn1d"])
@pytest.mark.parametrize("term", [0.0, 0.5])
def test_equals_the_equations_written_by_hand(norm, term, monkeypatch):
    monkeypatch.setattr(rotta, "augment", gamma)
    by_hand = RoTTAByHand(
        network_of(norm), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), term=term
    )
    adapter = make_rotta(network_of(norm), nu=0.2, alpha=0.3, lambda_t=0.3, lambda_u=2.0)
    if term:
        adapter.terms.append(lambda out, head: term * out.logits.square().mean())
    due = []
    for size, images in zip((16, 3, 16, 1, 16), coloured_squares(), strict=True):
        before = len(by_hand.losses)
        expected = by_hand.step(images[:size])
        assert_close(adapter.adapt_step(images[:size]), expected)
        due.append(len(by_hand.losses) - before)
        assert adapter.report.updated == (due[-1] > 0)
        if due[-1]:
            assert adapter.report.loss.item() == pytest.approx(by_hand.losses[-1], abs=1e-10)
        else:
            assert adapter.report.reason == "no update is due"
            assert adapter.report.loss is None
    assert due == [3, 0, 4, 0, 3]  # at the images 5, 10, ..., 50
    assert adapter.memory["count"] == 52
    assert adapter.memory["steps"] == 10
    assert 2 <= by_hand.sizes[0] < 6 <= by_hand.sizes[-1]  # the bank grew
    assert_holds(adapter, by_hand)
    source = network_of(norm)
    for name in adapter.adapted_parameters:  # more than rounding
        moved = adapter.network.get_parameter(name) - source.get_parameter(name)
        assert moved.abs().max() > 1e-3, name


def test_equals_them_with_the_rule_of_the_paper_and_its_views(monkeypatch):
    def view(images, generator):
        if generator is None:
            generator = torch.Generator().manual_seed(7 + 1_000_003 * len(by_hand.losses))
        return augment(images, generator)

    monkeypatch.setattr(rotta, "augment", view)
    by_hand = RoTTAByHand(network_of("bn"), lambda p: torch.optim.Adam(p, lr=1e-3), view=view)
    options = {"nu": 0.2, "alpha": 0.3, "lambda_t": 0.3, "lambda_u": 2.0, "seed": 7}
    adapter = make_rotta(network_of("bn"), Adam(lr=1e-3), **options)
    for images in coloured_squares(3):
        assert_close(adapter.adapt_step(images), by_hand.step(images))
    assert_holds(adapter, by_hand)


# The bank ----------------------------------------------------------------------------------------


def held(bank):
    return [(each.image, each.label, each.uncertainty, each.age) for each in bank.by_class()]


class TestBank:
    @pytest.mark.parametrize(
        ("capacity", "classes", "lambdas"),
        [
            (8, 4, (1.0, 1.0)),
            (7, 3, (1.0, 1.0)),  # 2.33 places a class
            (5, 9, (1.0, 1.0)),  # less than one
            (12, 4, (0.0, 1.0)),  # many are equally bad
            (7, 3, (0.0, 1.0)),  # of several classes, too
            (12, 4, (1.0, 0.0)),
            (12, 4, (0.0, 0.0)),  # nothing is ever worse
            (12, 4, (0.3, 2.0)),
            (1, 2, (1.0, 1.0)),
        ],
    )
    def test_equals_lists_on_random_streams(self, capacity, classes, lambdas):
        draw = random.Random(capacity)
        ours = MemoryBank(capacity, classes, *lambdas)
        by_hand = BankByHand(capacity, classes, *lambdas)
        sizes = set()
        for number in range(400):
            # Runs of one class, and few values of the uncertainty: for ties.
            label = draw.randrange(classes) if number % 3 else min(number // 100, classes - 1)
            uncertainty = draw.choice([0.1, 0.2, 0.5, 0.9]) * math.log(classes)
            ours.add(number, label, uncertainty)
            by_hand.add(number, label, uncertainty)
            expected = [
                (x, c, u, age) for c, items in enumerate(by_hand.lists) for x, u, age in items
            ]
            assert held(ours) == expected
            sizes.add(len(ours.kept))
            labels = [each.label for each in ours.kept]
            assert max(map(labels.count, labels)) <= math.ceil(capacity / classes)
            assert all(each.age == number + 1 - each.image for each in ours.kept)
        assert max(sizes) == capacity

    def test_a_correlated_stream_stays_balanced(self):
        bank = MemoryBank(64, 10, 1.0, 1.0)
        for number in range(2000):
            bank.add(number, number // 200, 0.5)
        counts = [[each.label for each in bank.kept].count(c) for c in range(10)]
        assert sum(counts) == 64
        assert set(counts) == {6, 7}

    def test_a_young_sure_image_takes_the_place_of_an_old_unsure_one(self):
        bank = MemoryBank(4, 2, 1.0, 1.0)  # two places a class
        bank.add("old", 0, 0.1)
        bank.add("unsure", 0, 0.6)
        # Scores: 1 / (1 + exp(-2/4)) + 0.1 / ln 2 = .767, 1 / (1 + exp(-1/4)) + 0.6 / ln 2 = 1.428;
        # of a new one 0.5 + 0.1 / ln 2 = .644.
        bank.add("new", 0, 0.1)
        assert held(bank) == [("old", 0, 0.1, 3), ("new", 0, 0.1, 1)]
        bank.add("unsure", 0, 0.5)  # 1.221, worse than .823
        assert held(bank) == [("old", 0, 0.1, 4), ("new", 0, 0.1, 2)]
        bank.add("other", 1, 0.69)
        assert [row[0] for row in held(bank)] == ["old", "new", "other"]

    def test_a_full_bank_makes_room_in_the_largest_classes(self):
        bank = MemoryBank(4, 3, 0.0, 1.0)  # 1.33 places a class: up to two
        for image, label, uncertainty in [("a", 0, 0.3), ("b", 0, 0.4), ("c", 1, 0.9)]:
            bank.add(image, label, uncertainty)
        bank.add("d", 1, 0.2)
        bank.add("e", 2, 0.5)  # c is the worst of the classes 0 and 1
        assert [row[0] for row in held(bank)] == ["a", "b", "d", "e"]
        bank.add("f", 1, 0.1)  # now 0 alone is the largest, and its worst is b
        assert [row[0] for row in held(bank)] == ["a", "d", "f", "e"]

    def test_of_equally_bad_ones_the_last_goes(self):
        bank = MemoryBank(4, 2, 0.0, 1.0)
        for image, label in [("a", 1), ("b", 0), ("c", 1)]:
            bank.add(image, label, 0.5)
        bank.add("d", 1, 0.1)
        assert [row[0] for row in held(bank)] == ["b", "a", "d"]
        bank.add("e", 1, 0.1)
        assert [row[0] for row in held(bank)] == ["b", "d", "e"]
        bank = MemoryBank(2, 3, 0.0, 1.0)
        for image, label in [("a", 1), ("b", 0), ("c", 2)]:
            bank.add(image, label, 0.5 if label < 2 else 0.1)
        assert [row[0] for row in held(bank)] == ["b", "c"]  # by class, not by arrival

    def test_an_equally_bad_one_is_dropped(self):
        bank = MemoryBank(1, 2, 0.0, 1.0)
        bank.add("a", 0, 0.5)
        bank.add("b", 0, 0.5)
        bank.add("c", 1, 0.5)
        assert held(bank) == [("a", 0, 0.5, 3)]

    def test_of_a_single_class(self):
        bank = MemoryBank(2, 1, 1.0, 1.0)
        for image in "abc":
            bank.add(image, 0, -1e-6)  # log(1 + 1e-6)
        assert [row[0] for row in held(bank)] == ["b", "c"]

    def test_a_stream_of_one_class_leaves_the_other_places_free(self):
        network = network_of("gn")
        with torch.no_grad():
            head_of(network).bias[3] += 1000
        adapter = make_rotta(network, memory_size=25)
        for images in coloured_squares(3):
            assert torch.isfinite(adapter.adapt_step(images)).all()
            assert adapter.report.updated
        assert adapter.memory["bank"]["labels"].tolist() == [3, 3, 3]  # 2.5 places
        assert all(torch.isfinite(t).all() for t in adapter.moving_tensors().values())

    def test_holds_copies(self):
        images = coloured_squares(1)[0]
        adapter, kept = make_rotta(network_of("gn")), images.clone()
        adapter.adapt_step(images)
        bank = copy.deepcopy(adapter.memory["bank"])
        images.zero_()
        assert are_equal(adapter.memory["bank"], bank)
        assert all((kept == image).flatten(1).all(1).any() for image in bank["images"])


# Robust batch normalisation ----------------------------------------------------------------------


class TestStatistics:
    def test_weights_and_statistics_of_the_student_move(self):
        adapter = make_rotta(network_of("bn"))
        before = tensors_of(adapter)
        adapter.adapt_step(coloured_squares(1)[0])
        moved = {n for n, t in tensors_of(adapter).items() if not torch.equal(t, before[n])}
        kinds = ("weight", "bias", "running_mean", "running_var")
        assert moved == {f"{layer}.{kind}" for layer in (1, 4) for kind in kinds}
        assert {f"network.{name}" for name in moved} == set(adapter.moving_tensors())
        assert set(adapter.memory["teacher"]) == set(adapter.moving_tensors())

    def test_with_a_learning_rate_of_0_they_still_move(self):
        adapter = make_rotta(network_of("bn"), SGD(lr=0.0), nu=0.5)
        source = network_of("bn").eval()
        first, second = coloured_squares(2)
        assert_close(adapter.adapt_step(first), source(first))
        assert not torch.allclose(adapter.adapt_step(second), source(second), atol=1e-3)
        assert torch.equal(adapter.network[1].weight, source[1].weight)

    @pytest.mark.parametrize(("norm", "alpha"), [("gn", 0.05), ("ln", 0.05), ("bn", 0.0)])
    def test_without_them_a_learning_rate_of_0_is_the_source(self, norm, alpha):
        adapter, source = make_rotta(network_of(norm), SGD(lr=0.0), alpha=alpha), network_of(norm)
        for images in coloured_squares(3):
            assert_close(adapter.adapt_step(images), source.eval()(images).detach())
            assert adapter.report.updated

    def test_what_follows_the_normalisation_in_a_layer_is_kept(self):
        fused, plain = network_of("bn"), network_of("bn")
        for network in (fused, plain):
            network[1].eps = network[4].eps = 0.1
        for i in (1, 4):
            layer = BatchNormAct2d(fused[i].num_features, eps=0.1, act_layer=nn.ReLU).double()
            layer.load_state_dict(fused[i].state_dict())
            fused[i], fused[i + 1] = layer, nn.Identity()
        adapters = [make_rotta(network, alpha=0.3) for network in (fused, plain)]
        for images in coloured_squares(3):
            assert_close(*(adapter.adapt_step(images) for adapter in adapters))

    def test_a_layer_without_running_statistics_uses_those_of_the_batch(self):
        network = network_of("bn")
        network[4] = nn.BatchNorm2d(16, track_running_stats=False).double()
        adapter = make_rotta(network)
        images = coloured_squares(1)[0]
        expected = copy.deepcopy(network)
        expected[1].eval()
        assert_close(adapter.adapt_step(images), expected(images).detach())
        assert adapter.report.updated
        assert "network.4.running_mean" not in adapter.moving_tensors()

    def test_one_image_at_a_time_needs_no_advice(self):
        adapter = make_rotta(network_of("bn"))
        for image in coloured_squares(1)[0]:
            assert torch.isfinite(adapter.adapt_step(image[None])).all()
        assert adapter.memory["steps"] == 3

    def test_nothing_stays_on_the_layers(self, monkeypatch):
        network = network_of("bn")
        adapter = make_rotta(network)
        adapter.ready()
        hooks = [len(m._forward_pre_hooks) for m in network.modules()]
        buffers = [id(t) for t in network.buffers()]
        adapter.adapt_step(coloured_squares(1)[0])
        kept = copy.deepcopy(adapter.state_dict())

        def broken(out, head):
            raise RuntimeError("of the user's")

        monkeypatch.setattr(network[8], "forward", lambda x: broken(x, None))
        with pytest.raises(RuntimeError, match="of the user's"):
            adapter._update(adapter._bank(coloured_squares(1)[0], torch.arange(10)))
        monkeypatch.undo()
        assert are_equal(kept, adapter.state_dict())
        assert hooks == [len(m._forward_pre_hooks) for m in network.modules()]
        assert buffers == [id(t) for t in network.buffers()]


# Life cycle --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
class TestLifeCycle:
    def test_reset_and_a_loaded_state_replay(self, norm):
        batches = coloured_squares(6)
        adapter = make_rotta(network_of(norm), nu=0.5)
        source = tensors_of(adapter)
        first = [adapter.adapt_step(images[:13]) for images in batches[:3]]
        saved = copy.deepcopy(adapter.state_dict())
        assert saved["_extra_state"]["memory"]["count"] == 39  # in the middle of a period
        expected = [adapter.adapt_step(images) for images in batches[3:]]
        end = copy.deepcopy(adapter.state_dict())
        other = make_rotta(network_of(norm), nu=0.5)
        other.load_state_dict(saved)
        assert are_equal([other.adapt_step(images) for images in batches[3:]], expected)
        assert are_equal(other.state_dict(), end)
        for each in (adapter, other):
            each.reset()
            assert each.memory == {}
            assert are_equal(tensors_of(each), source)
        assert are_equal([other.adapt_step(images[:13]) for images in batches[:3]], first)

    def test_a_saved_state_does_not_move_along(self, norm):
        adapter = make_rotta(network_of(norm))
        adapter.adapt_step(coloured_squares(1)[0])
        saved = adapter.get_extra_state()
        kept = copy.deepcopy(saved)
        adapter.adapt_step(coloured_squares(2)[1])
        assert are_equal(saved, kept)

    def test_forward_predicts_what_the_next_step_returns(self, norm):
        adapter = make_rotta(network_of(norm), nu=0.5, alpha=0.5)
        adapter.ready()
        for images in coloured_squares(3):
            kept = copy.deepcopy(adapter.state_dict())
            expected = adapter(images)
            assert are_equal(adapter.state_dict(), kept)
            assert torch.equal(adapter.adapt_step(images), expected)

    def test_a_nan_batch_changes_nothing(self, norm):
        adapter = make_rotta(network_of(norm), Adam(lr=0.01))
        for images in coloured_squares(2):
            adapter.adapt_step(images[:13])
        kept = copy.deepcopy(adapter.state_dict())
        with pytest.warns(UserWarning, match="16 of 16 images gave logits") as caught:
            adapter.adapt_step(torch.full((16, 3, 32, 32), torch.nan, dtype=torch.float64))
        assert len(caught) == 1
        report = adapter.report
        assert (report.updated, report.finite, report.failed) == (False, False, 16)
        assert "not finite" in report.reason
        assert are_equal(kept, adapter.state_dict())

    def test_a_nan_batch_at_first(self, norm):
        adapter = make_rotta(network_of(norm), update_frequency=1)
        with pytest.warns(UserWarning, match="not finite"):
            adapter.adapt_step(torch.full((3, 3, 32, 32), torch.inf, dtype=torch.float64))
        assert adapter.memory == {}

    def test_images_that_are_not_finite_are_left_out(self, norm):
        images = coloured_squares(1)[0]
        broken = images.clone()
        broken[4], broken[9] = torch.nan, torch.inf
        ours, other = make_rotta(network_of(norm)), make_rotta(network_of(norm))
        with pytest.warns(UserWarning, match="2 of 16 images") as caught:
            ours.adapt_step(broken)
        assert len(caught) == 1
        other.adapt_step(images[[i for i in range(16) if i not in (4, 9)]])
        assert are_equal(ours.memory["count"], torch.tensor(14))
        bank, expected = ours.memory["bank"], other.memory["bank"]
        assert all(torch.equal(bank[n], expected[n]) for n in ("images", "labels", "ages"))
        for name, tensor in other.moving_tensors().items():
            assert_close(ours.moving_tensors()[name], tensor)
        report = ours.report
        assert (report.updated, report.finite, report.failed) == (True, False, 2)
        assert "2 of 16 images" in report.reason

    def test_an_update_that_is_not_finite_moves_nothing_but_the_bank(self, norm):
        adapter = make_rotta(network_of(norm), Adam(lr=0.01))
        batches = coloured_squares(3)
        adapter.adapt_step(batches[0])
        weights, before = tensors_of(adapter), copy.deepcopy(adapter.get_extra_state())
        adapter.terms.append(lambda out, head: out.logits.sum() * torch.inf)
        with pytest.warns(UserWarning, match="a loss, a gradient or a step"):
            adapter.adapt_step(batches[1])
        assert (adapter.report.updated, adapter.report.finite) == (False, False)
        assert "not finite" in adapter.report.reason
        assert are_equal(tensors_of(adapter), weights)
        after = adapter.get_extra_state()
        assert are_equal(after["rule_state"], before["rule_state"])
        for name in ("teacher", "steps"):
            assert are_equal(after["memory"][name], before["memory"][name])
        assert after["memory"]["count"] == 32
        adapter.terms.clear()
        adapter.adapt_step(batches[2])
        assert adapter.report.updated

    def test_one_update_of_several_may_fail(self, norm):
        adapter, seen = make_rotta(network_of(norm)), []

        def second_only(out, head):
            seen.append(len(out.logits))
            return out.logits.sum() * (torch.nan if len(seen) == 2 else 0.0)

        adapter.terms.append(second_only)
        with pytest.warns(UserWarning, match="a loss, a gradient or a step"):
            adapter.adapt_step(coloured_squares(1)[0])
        assert len(seen) == 3
        assert (adapter.report.updated, adapter.report.finite) == (True, False)
        assert adapter.report.reason == ""
        assert adapter.memory["steps"] == 2

    def test_works_whatever_grad_mode_surrounds_it(self, norm):
        expected = make_rotta(network_of(norm))
        logits = [expected.adapt_step(images) for images in coloured_squares(3)]
        for mode in (torch.no_grad, torch.inference_mode):
            adapter = make_rotta(network_of(norm))
            with mode():
                found = [adapter.adapt_step(images.clone()) for images in coloured_squares(3)]
                assert not adapter.memory["bank"]["images"].is_inference()
                assert torch.equal(
                    adapter(coloured_squares(1)[0]), expected(coloured_squares(1)[0])
                )
            assert are_equal(found, logits)
            assert are_equal(adapter.state_dict(), expected.state_dict())

    def test_bfloat16_autocast_stays_finite_and_sees_what_moved(self, norm):
        replayed = []
        for remembers in (True, False):
            adapter = make_rotta(make_network(norm), Adam(lr=0.05), nu=0.5, alpha=0.5)
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=remembers):
                replayed.append(torch.stack([adapter.adapt_step(x) for x in make_batches()]))
            assert all(torch.isfinite(t).all() for t in adapter.moving_tensors().values())
            assert {t.dtype for t in adapter.memory["teacher"].values()} == {torch.float32}
        assert torch.isfinite(replayed[0]).all()
        assert torch.equal(*replayed)

    def test_a_copy_is_independent(self, norm):
        adapter = make_rotta(network_of(norm))
        batches = coloured_squares(3)
        adapter.adapt_step(batches[0])
        twin = copy.deepcopy(adapter)
        expected = [adapter.adapt_step(images) for images in batches[1:]]
        assert are_equal([twin.adapt_step(images) for images in batches[1:]], expected)

    def test_half_precision_keeps_a_fine_teacher(self, norm):
        adapter = make_rotta(make_network(norm), SGD(lr=0.05))
        batches = make_batches(3)
        adapter.adapt_step(batches[0])
        kept = copy.deepcopy(adapter.memory)
        adapter.bfloat16()
        assert are_equal(adapter.memory["teacher"], kept["teacher"])
        assert are_equal(adapter.memory["bank"]["uncertainties"], kept["bank"]["uncertainties"])
        assert adapter.memory["bank"]["images"].dtype == torch.bfloat16
        logits = adapter.adapt_step(batches[1].bfloat16())
        assert adapter.report.updated
        assert logits.dtype == torch.bfloat16
        assert {t.dtype for t in adapter.memory["teacher"].values()} == {torch.float32}
        assert adapter.memory["bank"]["uncertainties"].dtype == torch.float32
        adapter.double()
        assert {t.dtype for t in adapter.memory["teacher"].values()} == {torch.float64}
        adapter.adapt_step(batches[2].double())
        assert adapter.memory["count"] == 48


def test_half_precision_statistics_of_the_teacher_are_not_rounded():
    network = make_network("bn").bfloat16()
    adapter = make_rotta(network, SGD(lr=0.0), alpha=0.01)
    expected = {name: t.float() for name, t in network[1].named_buffers() if t.dim()}
    for images in make_batches(2, 5):  # one update each
        adapter.adapt_step(images.bfloat16())
        held = network[0](adapter.memory["bank"]["images"]).detach().float()
        for name, batch in (
            ("running_mean", held.mean((0, 2, 3))),
            ("running_var", held.var((0, 2, 3), correction=0)),
        ):
            expected[name] = 0.99 * expected[name] + 0.01 * batch
            teacher = adapter.memory["teacher"][f"network.1.{name}"]
            # A bfloat16 would be wrong by up to 4e-3.
            torch.testing.assert_close(teacher, expected[name], rtol=0, atol=1e-6)


def test_phases_are_told_apart():
    @contextmanager
    def phase(name):
        running.append(name)
        yield
        running.pop()

    running, passes = [], []
    network = make_network("gn")
    network.register_forward_pre_hook(lambda module, args: passes.append(*running))
    adapter = make_rotta(network)
    adapter.phase = phase
    adapter.adapt_step(make_batches(1, 5)[0])
    assert passes == ["inference", "update", "update"]


def test_statistics_that_are_not_finite_move_nothing():
    images = make_batches(1, 5)[0]
    images[2] *= 1e25  # its square is infinite in float32
    adapter = make_rotta(make_network("bn"))
    before = tensors_of(adapter)
    with pytest.warns(UserWarning, match="not finite"):
        logits = adapter.adapt_step(images)
    assert torch.isfinite(logits).all()
    assert torch.isfinite(adapter.report.loss)
    assert (adapter.report.updated, adapter.report.finite) == (False, False)
    assert adapter.report.failed == 0
    assert are_equal(tensors_of(adapter), before)
    assert "teacher" not in adapter.memory


def test_casting_before_the_first_image():
    adapter = make_rotta(make_network("bn"))
    adapter.ready()
    adapter.double()
    adapter.adapt_step(coloured_squares(1)[0][:3])  # a bank and no teacher yet
    adapter.float()
    adapter.adapt_step(make_batches(1)[0])
    assert adapter.report.updated


def test_autocast_does_not_mix_up_student_and_teacher():
    class GainNorm(nn.Module):
        """Autocast would remember the weight of this product."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10))

        def forward(self, x):
            return x * (x @ self.weight)[:, None].sigmoid()

    replayed = []
    for remembers in (True, False):
        adapter = make_rotta(nn.Sequential(make_network("gn"), GainNorm()), Adam(lr=0.1), nu=0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=remembers):
            for images in make_batches():
                replayed.append([adapter.adapt_step(images), adapter(images)])
        assert adapter.report.updated
    assert are_equal(replayed[:4], replayed[4:])


def test_one_logit_that_is_not_finite_is_enough_to_leave_an_image_out():
    class Masked(nn.Module):
        def forward(self, logits):
            bright = logits.argmax(1, keepdim=True) == 2
            return logits.masked_fill(bright & (torch.arange(10) == 4), -torch.inf)

    network = nn.Sequential(network_of("gn"), Masked())
    masked = int((network_of("gn")(coloured_squares(1)[0]).argmax(1) == 2).sum())
    assert 0 < masked < 16
    adapter = make_rotta(network, update_frequency=100)
    with pytest.warns(UserWarning, match=f"{masked} of 16 images"):
        adapter.adapt_step(coloured_squares(1)[0])
    assert 2 not in adapter.memory["bank"]["labels"]


def test_images_with_a_graph_are_kept_without_it():
    adapter = make_rotta(network_of("gn"))
    logits = adapter.adapt_step(coloured_squares(1)[0].requires_grad_())
    assert not logits.requires_grad
    assert not adapter.memory["bank"]["images"].requires_grad
    assert not any(t.requires_grad for t in adapter.memory["teacher"].values())


class TestRandomness:
    def drawn(self, monkeypatch, **options):
        seeds = []

        def spy(images, generator):
            seeds.append(generator.initial_seed())
            return augment(images, generator)

        monkeypatch.setattr(rotta, "augment", spy)
        adapter = make_rotta(network_of("gn"), **options)
        logits = [adapter.adapt_step(images) for images in coloured_squares(2)]
        return seeds, logits[1]

    def test_each_update_has_its_own_view(self, monkeypatch):
        seeds, logits = self.drawn(monkeypatch, seed=4)
        assert len(set(seeds)) == len(seeds) == 6
        again, other = self.drawn(monkeypatch, seed=4), self.drawn(monkeypatch, seed=5)
        assert again[0] == seeds
        assert torch.equal(again[1], logits)
        assert not set(other[0]) & set(seeds)
        assert not torch.equal(other[1], logits)

    def test_the_global_generator_is_left_alone(self):
        torch.manual_seed(3)
        adapter = make_rotta(network_of("bn"))
        state = torch.get_rng_state()
        adapter.adapt_step(coloured_squares(1)[0])
        assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_off():
    network = nn.Sequential(make_network("gn"), nn.Dropout(0.9)).train()
    adapter = make_rotta(network, SGD(lr=0.0))
    images = make_batches(1)[0]
    assert torch.equal(adapter.adapt_step(images), adapter.adapt_step(images))


def test_classes_are_restricted_in_teacher_student_and_bank():
    images, classes = coloured_squares(1)[0], [7, 2, 5]
    adapter = make_rotta(network_of("gn"), update_frequency=16)
    adapter.restrict_classes(classes)
    seen = []
    adapter.terms.append(lambda out, head: seen.append(out) or 0.0)
    expected = network_of("gn")(images)[:, classes].detach()
    assert_close(adapter.adapt_step(images), expected)
    size = len(adapter.memory["bank"]["ages"])
    assert seen[0].logits.shape == seen[0].teacher.shape == (size, 3)
    assert set(adapter.memory["bank"]["labels"].tolist()) == {0, 1, 2}


def test_a_single_class_is_no_error():
    adapter = make_rotta(network_of("gn"))
    adapter.restrict_classes([4])
    assert adapter.adapt_step(coloured_squares(1)[0]).shape == (16, 1)
    assert adapter.report.loss == 0


def test_other_classes_need_a_reset():
    adapter, images = make_rotta(network_of("gn")), coloured_squares(1)[0]
    adapter.adapt_step(images)
    kept = copy.deepcopy(adapter.state_dict())
    adapter.restrict_classes([1, 2, 3])
    with pytest.raises(InputError, match=r"10 classes then and are 3 now.*reset"):
        adapter.adapt_step(images)
    assert are_equal(adapter.state_dict(), kept)
    adapter.reset()
    assert adapter.adapt_step(images).shape == (16, 3)


def test_images_of_another_size_need_a_reset():
    adapter, images = make_rotta(network_of("gn")), coloured_squares(1)[0]
    adapter.adapt_step(images)
    with pytest.raises(InputError, match=r"\[3, 32, 32\] while the new ones are \[3, 32, 24\]"):
        adapter.adapt_step(images[..., :24])
    adapter.reset()
    adapter.adapt_step(images[..., :24])


def test_an_empty_batch():
    adapter = make_rotta(network_of("gn"))
    adapter.adapt_step(coloured_squares(1)[0])
    kept = copy.deepcopy(adapter.state_dict())
    assert adapter.adapt_step(coloured_squares(1)[0][:0]).shape == (0, 10)
    assert (adapter.report.updated, adapter.report.reason) == (False, "no update is due")
    assert are_equal(adapter.state_dict(), kept)


def test_a_network_without_normalisation_is_refused():
    with pytest.raises(InputError, match="Sequential has none"):
        RoTTA(nn.Sequential(nn.Flatten(), nn.Linear(3, 2))).ready()


def test_no_warning_is_given_without_need():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_rotta(make_network("bn")).adapt_step(make_batches(1)[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_size", 0),
        ("memory_size", 2.5),
        ("update_frequency", 0),
        ("update_frequency", 1.5),
        ("nu", -0.1),
        ("nu", 1.1),
        ("alpha", 1.1),
        ("alpha", math.nan),
        ("lambda_t", -1.0),
        ("lambda_u", math.inf),
        ("seed", -1),
        ("seed", 0.5),
    ],
)
def test_hyper_parameters_out_of_range(name, value):
    with pytest.raises(InputError, match=f"{name} = {value} is out of range"):
        RoTTA(make_network("gn"), **{name: value})


def test_describes_itself():
    described = RoTTA(make_network("gn")).describe()
    assert described["predicts"] == "before update"
    assert described["hyper_parameters"] == {
        "memory_size": 64,
        "update_frequency": 64,
        "nu": 0.001,
        "alpha": 0.05,
        "lambda_t": 1.0,
        "lambda_u": 1.0,
        "seed": 0,
    }


def test_all_kinds_of_normalisation_are_adapted():
    for norm in NORMS:
        adapter = make_rotta(make_network(norm))
        expected = {
            f"{name}.{kind}" for name in norm_layers(adapter.network) for kind in ("weight", "bias")
        }
        assert set(adapter.adapted_parameters) == expected
