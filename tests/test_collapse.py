"""The collapse detector on models whose collapse is known: what it tells, keeps and undoes."""

import io
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.networks import are_equal, make_batches, make_network
from tta_lightning.adapter import Adapter
from tta_lightning.collapse import CollapseDetector, Concentration, Detection
from tta_lightning.collapse.evidence import Probes
from tta_lightning.errors import InputError
from tta_lightning.methods import EATA, SAR, T3A, CoTTA, RoTTA, Source, Tent
from tta_lightning.rules import SGD
from tta_lightning.snapshots import capture

CLASSES = 10
SIZE = 8  # images a batch


class Readable(nn.Module):
    """Predicts the class that is written into the image, unless its bias says otherwise."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.sure = nn.Parameter(torch.tensor(3.0))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.classes = classes

    def forward(self, images):
        labels = images[:, 0, 0, 0].long()
        return self.sure * nn.functional.one_hot(labels, self.classes).float() + self.bias


class Steered(Adapter):
    """Changes by hand only, and counts how often it is asked without learning."""

    asked = 0

    def configure(self):
        self.network.requires_grad_(True)

    def adapt_step(self, images):
        self.ready()
        with torch.no_grad():
            return self.outputs(images).logits

    def forward(self, images):
        self.asked += 1
        return super().forward(images)

    def break_down(self, value=100.0):
        with torch.no_grad():
            self.network.bias[0] = value


def images_of(labels, size=4):
    labels = torch.as_tensor(np.asarray(labels), dtype=torch.float32)
    return labels.view(-1, 1, 1, 1).expand(-1, 3, size, size).clone()


def shuffled(batches, seed=0, size=SIZE):
    rng = np.random.default_rng(seed)
    return [images_of(rng.integers(0, CLASSES, size)) for _ in range(batches)]


def serve(detector, adapter, batches):
    """Serve batches; return the detections with the number of the batch each."""
    found = []
    for number, images in enumerate(batches):
        detection = detector.after_update(adapter, images, adapter.adapt_step(images))
        if detection is not None:
            found.append((number, detection))
    return found


def steered():
    adapter = Steered(Readable())
    adapter.ready()
    return adapter


# The scale ---------------------------------------------------------------------------------------


def test_concentration_of_two_draws_of_two_classes_by_hand():
    scale = Concentration(2)  # (a, a), (b, b): KL = ln 2; (a, b): 0; so chance is ln 2 / 2
    assert scale(np.array([0, 0])) == pytest.approx(1.0)
    assert scale(np.array([0, 1])) == pytest.approx(-1.0)


@pytest.mark.parametrize("prior", [None, [0.5, 0.3, 0.1, 0.06, 0.04]])
def test_draws_of_the_prior_are_at_0_on_average(prior):
    rng = np.random.default_rng(0)
    scale = Concentration(5, prior)
    given = prior or [0.2] * 5
    found = [scale(rng.choice(5, 60, p=given)) for _ in range(4000)]
    spread = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * spread


def test_the_likeliest_class_alone_is_at_1():
    assert Concentration(3, [0.5, 0.3, 0.2])(np.zeros(128, int)) == pytest.approx(1.0)
    assert Concentration(1000)(np.full(64, 7)) == pytest.approx(1.0)


def test_a_prior_of_its_own_is_no_concentration():
    labels = np.random.default_rng(0).choice(2, 128, p=[0.85, 0.15])
    assert Concentration(2, [0.85, 0.15])(labels) < 0.1 < 0.2 < Concentration(2)(labels)


# Suspicion and evidence --------------------------------------------------------------------------


def test_a_healthy_model_on_a_shuffled_stream_costs_no_forward_pass():
    detector, adapter = CollapseDetector(), steered()
    assert serve(detector, adapter, shuffled(60)) == []
    assert detector.summary() == {"alarms": 0, "suspicions": 0, "evidence_passes": 0}
    assert adapter.asked == 0


def test_a_collapse_is_told_with_its_figures():
    detector, adapter = CollapseDetector("warn", drift=100), steered()
    serve(detector, adapter, shuffled(20))
    adapter.break_down()
    [(number, found)] = serve(detector, adapter, shuffled(16, seed=1))
    assert 5 <= number <= 15  # half of the window is of one class after 64 images
    assert found.reason == "concentration"
    assert found.drift in (None, pytest.approx(100 / 3)) or found.drift == 0
    assert found.concentration >= 0.5
    assert (found.probes, found.probes_now, found.action) == (64, 1.0, "warn")
    assert -0.2 < found.probes_before < 0.2
    assert found.images == (20 + number + 1) * SIZE
    assert "probes now 1" in str(found)
    assert adapter.network.bias[0] == 100


def test_one_class_after_the_other_is_no_collapse():
    detector, adapter = CollapseDetector(), steered()
    serve(detector, adapter, shuffled(20))
    stream = [images_of([c] * SIZE) for c in range(CLASSES) for _ in range(40)]
    assert serve(detector, adapter, stream) == []
    assert detector.suspicions > 350
    # at once; 128, 256, ... 2048 images later: 3200 images hold few of them
    assert 3 <= detector.evidence_passes == adapter.asked <= 8


def test_a_collapse_amid_label_shift_is_told():
    detector, adapter = CollapseDetector("warn"), steered()
    serve(detector, adapter, shuffled(20))
    stream = [images_of([c] * SIZE) for c in range(CLASSES) for _ in range(40)]
    assert serve(detector, adapter, stream[:40]) == []
    adapter.break_down()
    found = serve(detector, adapter, stream[40:])
    assert found
    assert found[0][1].probes_now == 1.0


def test_uniform_outputs_are_a_collapse():
    detector, adapter = CollapseDetector("warn", concentration=1.0, drift=100), steered()
    serve(detector, adapter, shuffled(20))
    with torch.no_grad():
        adapter.network.sure.zero_()
    found = serve(detector, adapter, shuffled(60, seed=1))
    assert "entropy" in found[0][1].reason
    assert found[0][1].entropy > 0.99


def test_drift_alone_is_suspicious_and_cleared_by_the_probes():
    detector, adapter = CollapseDetector(drift=0.5), steered()
    with torch.no_grad():
        adapter.network.sure.fill_(6.0)  # as far from 3 as 3 is from nothing
    assert serve(detector, adapter, shuffled(40)) == []
    assert detector._drift == pytest.approx(1.0)
    assert detector.suspicions > 0
    assert detector.evidence_passes == adapter.asked > 0


def test_a_model_that_collapsed_before_its_probes_is_told_by_the_source_model():
    detector, adapter = CollapseDetector("warn"), steered()
    adapter.break_down()
    kept = capture(adapter)
    [(_, found), *_] = serve(detector, adapter, shuffled(20))
    assert found.probes_before == found.probes_now == 1.0
    assert found.probes_behind < 0.3
    assert are_equal(capture(adapter), kept)


def test_a_stream_of_one_class_from_its_start_is_no_collapse():
    detector, adapter = CollapseDetector(), steered()
    assert serve(detector, adapter, [images_of([3] * SIZE)] * 60) == []
    assert detector.evidence_passes > 0


def test_weights_that_are_not_finite_are_told_within_10_batches():
    detector, adapter = CollapseDetector(), steered()
    serve(detector, adapter, shuffled(11))
    adapter.break_down(math.nan)
    [(number, found)] = serve(detector, adapter, shuffled(10, seed=1))
    assert (number, found.reason, found.went_to) == (0, "weights", "source")  # outputs show it
    assert torch.equal(adapter.network.bias, torch.zeros(CLASSES))


def test_weights_that_outputs_do_not_show_are_looked_at_too():
    class Hidden(Readable):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(3))

    adapter = Steered(Hidden())
    adapter.ready()
    with torch.no_grad():
        adapter.network.unused[1] = math.inf
    [(number, found)] = serve(CollapseDetector("reset"), adapter, shuffled(15))
    assert (number, found.reason) == (9, "weights")


def test_a_bad_image_is_left_out_and_is_no_collapse():
    detector, adapter = CollapseDetector(), steered()
    serve(detector, adapter, shuffled(10))
    images = shuffled(1, seed=1)[0]
    logits = adapter.adapt_step(images)
    logits[2] = math.nan
    assert detector.after_update(adapter, images, logits) is None
    assert len(detector._window.labels) == 10 * SIZE + SIZE - 1
    assert detector.evidence_passes == 1


def test_outputs_that_are_never_finite_are_a_collapse():
    detector, adapter = CollapseDetector("warn"), steered()
    serve(detector, adapter, shuffled(10))
    adapter.break_down(math.nan)
    adapter.network.bias.requires_grad_(False)
    detector._look = lambda adapter: None  # as if the weights were large, not NaN
    found = serve(detector, adapter, shuffled(1))
    assert [each.reason for _, each in found] == ["outputs"]


@pytest.mark.parametrize("size", [1, 3, 200])
def test_every_batch_size(size):
    detector, adapter = CollapseDetector(), steered()
    assert serve(detector, adapter, shuffled(1 + 600 // size, size=size)) == []
    adapter.break_down()
    found = serve(detector, adapter, shuffled(1 + 200 // size, size=size, seed=1))
    assert len(found) == 1
    assert torch.equal(adapter.network.bias, torch.zeros(CLASSES))


def test_images_of_another_size_start_new_probes():
    detector, adapter = CollapseDetector("warn"), steered()
    serve(detector, adapter, shuffled(10))
    rng = np.random.default_rng(1)
    serve(detector, adapter, [images_of(rng.integers(0, 10, SIZE), 6) for _ in range(10)])
    assert detector._probes.images.shape == (64, 3, 6, 6)
    assert detector._probes.offered == 80


def test_other_classes_start_anew():
    detector = CollapseDetector()
    adapter = steered()
    serve(detector, adapter, shuffled(10))
    adapter.restrict_classes([0, 1, 2])
    serve(detector, adapter, shuffled(1))
    assert len(detector._window.labels) == detector._probes.offered == SIZE


def test_nothing_is_watched_where_nothing_accumulates():
    class Episodic(Steered):
        episodic = True

    for adapter in (Episodic(Readable()), Source(Readable())):
        detector = CollapseDetector()
        adapter.ready()
        adapter.network.bias.data[0] = 100
        assert serve(detector, adapter, shuffled(40)) == []
        assert detector.batches == 0


def test_a_source_model_that_is_as_concentrated_is_no_reason_to_go_back():
    """A reset to a source model that says one class of everything is not a collapse."""
    network = Readable()
    network.bias.data[0] = 100.0
    adapter = Steered(network)
    adapter.ready()
    adapter.break_down(0.0)  # adaptation has made it better
    detector = CollapseDetector("reset", drift=100)
    serve(detector, adapter, shuffled(20))
    adapter.reset()
    detector.note_reset()
    assert serve(detector, adapter, shuffled(40, seed=1)) == []
    assert detector.evidence_passes > 0


def test_a_rollback_is_compared_with_its_snapshot():
    network = Readable()
    network.bias.data[0] = 100.0
    adapter = Steered(network)
    adapter.ready()
    adapter.break_down(0.0)
    detector = CollapseDetector("rollback", drift=100)
    serve(detector, adapter, shuffled(40))
    adapter.break_down()
    [(_, found)] = serve(detector, adapter, shuffled(16, seed=1))
    assert (found.went_to, found.probes_now) == ("snapshot", 1.0)
    assert found.probes_behind < 0.3
    assert adapter.network.bias[0] == 0.0


@pytest.mark.parametrize(("count", "told"), [(16, False), (64, True)])
def test_fewer_probes_must_rise_further(count, told):
    detector, adapter = CollapseDetector("warn", margin=0.6), steered()  # of 16: 1.2, which is more
    labels = np.arange(count) % CLASSES  # than there is
    detector._probes.offer(images_of(labels), labels)
    adapter.break_down()
    scale = Concentration(CLASSES)
    found, proved = detector._prove(adapter, images_of(labels), scale, Detection("drift", 0))
    assert proved is told
    assert found.probes_now == 1.0


def test_single_images_are_looked_at_in_groups_of_8():
    single, whole = (CollapseDetector("warn", drift=1e9) for _ in range(2))
    adapter, images = steered(), torch.cat(shuffled(40))
    adapter.break_down()
    one = serve(single, adapter, images.split(1))
    other = serve(whole, adapter, images.split(8))
    told = [[replace(each, drift=None) for _, each in found] for found in (one, other)]
    assert told[0] == told[1] != []
    assert [number // 8 for number, _ in one] == [number for number, _ in other]
    assert single.suspicions == whole.suspicions


def test_a_size_that_changes_within_a_group_starts_it_anew():
    detector, adapter = CollapseDetector(), steered()
    serve(detector, adapter, [images_of([1] * 5), images_of([2] * 5, 6), images_of([3] * 3, 6)])
    assert detector._window.labels.tolist() == [2] * 5 + [3] * 3


# Probes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7])
def test_every_image_is_a_probe_with_the_same_probability(size):
    counts = Counter()
    for seed in range(400):
        probes = Probes(16, seed)
        for part in torch.arange(40.0).view(-1, 1, 1, 1).split(size):
            probes.offer(part, part[:, 0, 0, 0].long().numpy())
        assert torch.equal(probes.images[:, 0, 0, 0], torch.from_numpy(probes.labels).float())
        counts.update(probes.labels.tolist())
    found = np.array([counts[i] for i in range(40)]) / 400
    assert np.abs(found - 16 / 40).max() < 4.5 * math.sqrt(0.4 * 0.6 / 400)


def test_images_of_a_suspicious_time_are_no_probes():
    detector, adapter = CollapseDetector("warn", margin=1.0), steered()  # never proved
    serve(detector, adapter, shuffled(20))
    adapter.break_down()
    serve(detector, adapter, shuffled(100, seed=1))
    assert np.bincount(detector._probes.labels, minlength=CLASSES).max() < 32


# Action ------------------------------------------------------------------------------------------


def test_rollback_goes_to_the_last_healthy_snapshot_then_to_the_source():
    detector, adapter = CollapseDetector("rollback"), steered()
    with torch.no_grad():
        adapter.network.sure.fill_(3.1)
    serve(detector, adapter, shuffled(20))  # a window and a look: the first snapshot
    healthy = capture(adapter)
    with torch.no_grad():
        adapter.network.sure.fill_(3.2)
    serve(detector, adapter, shuffled(20, seed=1))  # another one: it is healthy
    adapter.break_down()
    [(_, found)] = serve(detector, adapter, shuffled(16, seed=2))
    assert (found.action, found.went_to) == ("rollback", "snapshot")
    assert are_equal(capture(adapter), healthy)
    adapter.break_down()
    [(_, found)] = serve(detector, adapter, shuffled(16, seed=3))
    assert found.went_to == "source"
    assert adapter.network.sure == 3.0


def test_a_reset_leaves_no_snapshot_of_the_time_before():
    detector, adapter = CollapseDetector(), steered()
    serve(detector, adapter, shuffled(40))
    assert detector._healthy is not None
    detector.note_reset()
    assert detector._healthy is detector._candidate is None
    assert len(detector._window.labels) == 0
    assert len(detector._probes.labels) == 64


def test_two_snapshots_at_most_and_none_unless_rolling_back():
    for action, most in (("rollback", 2), ("reset", 0), ("warn", 0)):
        detector, adapter = CollapseDetector(action), steered()
        serve(detector, adapter, shuffled(80))
        assert sum(s is not None for s in (detector._healthy, detector._candidate)) == most


def test_a_method_that_recovers_by_itself_clears_the_window():
    detector, adapter = CollapseDetector(), steered()
    serve(detector, adapter, shuffled(5))
    adapter.report.reset = True
    serve(detector, adapter, shuffled(1))
    assert len(detector._window.labels) == 0


def test_a_warning_is_repeated_at_longer_and_longer_intervals():
    detector, adapter = CollapseDetector("warn"), steered()
    serve(detector, adapter, shuffled(20))
    adapter.break_down()
    told = [number for number, _ in serve(detector, adapter, shuffled(300, seed=1))]
    gaps = np.diff(told)
    assert len(told) >= 4
    assert (gaps[1:] >= gaps[:-1]).all()


# Real methods ------------------------------------------------------------------------------------

METHODS = {
    "Tent": lambda: Tent(make_network("bn"), SGD(lr=0.01)),
    "EATA": lambda: EATA(make_network("gn"), SGD(lr=0.01), fisher_alpha=0.0),
    "SAR": lambda: SAR(make_network("gn"), SGD(lr=0.01)),
    "CoTTA": lambda: CoTTA(make_network("bn"), SGD(lr=0.01), n_augmentations=2),
    "RoTTA": lambda: RoTTA(make_network("bn"), SGD(lr=0.01)),
    "T3A": lambda: T3A(make_network("gn")),
}


@pytest.mark.parametrize("name", METHODS)
def test_evidence_leaves_no_trace(name):
    adapter, detector = METHODS[name](), CollapseDetector("warn")
    for images in make_batches(3):
        detector.after_update(adapter, images, adapter.adapt_step(images))
    before, report = capture(adapter), adapter.report
    random = torch.get_rng_state()
    probes = detector._probes.of_size(images)
    assert len(detector._ask(adapter, probes)) == len(probes)
    assert len(detector._ask_behind(adapter, probes)) == len(probes)
    assert are_equal(capture(adapter), before)
    assert adapter.report is report
    assert torch.equal(torch.get_rng_state(), random)


def test_source_predictions_are_those_of_the_source_model():
    adapter, detector = METHODS["Tent"](), CollapseDetector()
    images = make_batches(1, size=32)[0]
    expected = Tent(make_network("bn"))(images).argmax(dim=1)
    with torch.no_grad():
        for parameter in adapter.adapted_parameters.values():
            parameter.mul_(-1.0)
    assert not np.array_equal(detector._ask(adapter, images), expected)
    assert np.array_equal(detector._ask_behind(adapter, images), expected)


# State -------------------------------------------------------------------------------------------


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("cut", [0, 3, 21, 42, 54])
def test_a_resumed_detector_decides_alike(cut):
    def story(adapter, number):
        if number in (41, 52):
            adapter.break_down()
        if number == 25:
            adapter.network.sure.data.fill_(3.1)

    def go(detector, adapter, batches, start=0):
        told = []
        for number, images in enumerate(batches, start):
            story(adapter, number)
            told.append(detector.after_update(adapter, images, adapter.adapt_step(images)))
        return told

    batches = [*shuffled(60), *[images_of([4] * SIZE)] * 10]
    batches[2:4] = [images_of([1, 2, 3]), images_of([4] * 3)]  # cut within a group
    whole, adapter = CollapseDetector(), steered()
    expected = go(whole, adapter, batches)
    assert [each.went_to for each in expected if each] == ["snapshot", "source"]

    first, other = CollapseDetector(), steered()
    go(first, other, batches[:cut])
    state = saved(first.state_dict())
    second = CollapseDetector()
    second.load_state_dict(state)
    assert go(second, other, batches[cut:], cut) == expected[cut:]
    assert are_equal(second.state_dict(), whole.state_dict())
    assert are_equal(capture(other), capture(adapter))


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"action": "rolback"},
        {"window": 8},
        {"window": 64.0},
        {"probes": 3},
        {"concentration": 1.5},
        {"margin": math.nan},
        {"low": 0.9, "high": 0.2},
        {"drift": 0},
        {"prior": [0.5, 0.4]},
        {"prior": [1.0, 0.0]},
        {"prior": [0.95, 0.05]},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(InputError, match=r"expected|must|Did you mean|Expected"):
        CollapseDetector(**options)


def test_a_prior_of_other_classes_is_refused():
    with pytest.raises(InputError, match="3 classes, but the model predicts 10"):
        serve(CollapseDetector(prior=[0.5, 0.3, 0.2]), steered(), shuffled(1))


# False alarms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["shuffled", "runs", "one class after the other"])
def test_models_that_never_change_raise_no_alarm(order):
    """A short version of ``benchmarks/collapse_study.py simulate``, which has a million batches."""
    rng = np.random.default_rng(0)
    for accuracy in (0.2, 0.5, 0.9):
        labels = rng.integers(0, CLASSES, 1600)
        if order == "runs":
            labels = np.repeat(rng.integers(0, CLASSES, 40), 40)
        elif order != "shuffled":
            labels = np.repeat(np.arange(CLASSES), 160)
        detector, adapter = CollapseDetector(), Noisy(accuracy)
        assert serve(detector, adapter, images_of(labels).split(4)) == []


class Noisy(Steered):
    """Reads the class with a probability, else says any."""

    def __init__(self, accuracy):
        super().__init__(Readable())
        self.accuracy, self.rng = accuracy, np.random.default_rng(1)

    def outputs(self, images):
        wrong = torch.from_numpy(self.rng.random(len(images)) >= self.accuracy)
        said = torch.from_numpy(self.rng.integers(0, CLASSES, len(images))).float()
        images = torch.where(wrong[:, None, None, None], said[:, None, None, None], images)
        return super().outputs(images)


def test_probes_that_do_not_fit_into_the_memory_end_no_run(monkeypatch):
    def too_much(adapter, images):
        raise torch.OutOfMemoryError("no room")

    detector, adapter = CollapseDetector(window=32, probes=16), steered()
    serve(detector, adapter, shuffled(16, seed=1))
    monkeypatch.setattr(type(adapter), "forward", too_much)
    detector.concentration = 0.0  # from now on everything is suspicious
    with pytest.warns(UserWarning, match="do not fit into the memory .* Set `probes` lower"):
        assert serve(detector, adapter, shuffled(16, seed=1)) == []
