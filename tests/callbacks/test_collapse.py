"""CollapseGuard on the loop: what it does to a run, tells, logs, announces and leaves behind."""

import csv
import io
import json
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from tests.loops.test_adaptation import Logits, quiet
from tests.networks import are_equal, head_of, make_network, tensors_of
from tests.streams import make_stream
from tta_lightning.callbacks import AdaptCallback
from tta_lightning.callbacks.collapse import CollapseGuard
from tta_lightning.errors import InputError
from tta_lightning.methods import T3A, Source, Tent
from tta_lightning.rules import SGD

IMAGES = 120  # of each of two corruptions: 30 batches of 8 in all


class Collapsing(Tent):
    """Tent, of which one weight runs away at some batches, so that one class is predicted."""

    at = (8,)
    step = 0

    def adapt_step(self, images):
        logits = super().adapt_step(images)
        if self.step in self.at:
            with torch.no_grad():
                self.adapted_parameters[self.last].data[0] = 1e4
        self.step += 1
        return logits

    last = "8.bias"

    def configure(self):
        super().configure()
        head_of(self.network).bias.requires_grad_(True)


def collapsing(at=(8,), **options):
    torch.manual_seed(0)
    network = make_network("gn")
    with torch.no_grad():  # a random network says one class of all images; this one does not
        head_of(network).weight.mul_(20)
        images = torch.cat([b.images for b in stream(**options).test_dataloader()])
        head_of(network).bias.sub_(network(images).mean(dim=0))
    adapter = Collapsing(network, SGD(lr=1e-5))
    adapter.at = at
    return adapter


def stream(scenario="continual", **options):
    noise = ["gaussian_noise", "shot_noise"]
    return make_stream(IMAGES, scenario=scenario, batch_size=8, corruptions=noise, **options)


def adapt(guard, adapter, *callbacks, data=None, **options):
    trainer = quiet(guard, *callbacks, **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.adapt(adapter, datamodule=data or stream())
    return trainer, [str(each.message) for each in told if "collapsed" in str(each.message)]


class Resets(AdaptCallback):
    def __init__(self):
        self.reasons = []

    def on_adapt_reset(self, trainer, adapter, reason):
        self.reasons.append(reason)


class LaterResets(Resets):
    """Another one: a trainer takes each callback once."""


def test_warn_tells_and_changes_nothing():
    guard, kept, alone = (
        CollapseGuard("warn", window=32, concentration=0.8, low=0.0),
        Logits(),
        Logits(),
    )
    _, told = adapt(guard, collapsing(), kept)
    quiet(alone).adapt(collapsing(), datamodule=stream())
    assert torch.equal(kept.stacked(), alone.stacked())
    assert "nothing was done" in told[0]
    figures = guard.summary()["collapse"]
    assert figures["alarms"] == len(figures["detections"]) >= 1
    first = figures["detections"][0]
    assert 9 <= first["batch"] <= 14
    assert (first["action"], first["probes_now"]) == ("warn", 1.0)
    assert first["segment"] == guard_segment(first["batch"])
    assert f"Batch {first['batch']}" in told[0]


def guard_segment(batch):
    return stream().plan.segments[0 if batch < 15 else -1].name


@pytest.mark.parametrize("action", ["reset", "rollback"])
def test_going_back_is_announced_once_to_all(action):
    guard, before, after = (
        CollapseGuard(action, window=32, concentration=0.8, low=0.0),
        Resets(),
        LaterResets(),
    )
    adapter = collapsing(at=(21,))  # after two looks at the weights
    trainer = quiet(before, guard, after)
    with pytest.warns(UserWarning, match="collapsed after"):
        trainer.adapt(adapter, datamodule=stream())
    assert len(before.reasons) == len(after.reasons) == 1
    assert "collapsed" in before.reasons[0]
    assert float(adapter.network[-1].bias.detach().abs().max()) < 1e3
    [found] = guard.summary()["collapse"]["detections"]
    assert found["went_to"] == ("source" if action == "reset" else "snapshot")


def test_reset_continues_as_from_the_source_model():
    guard, adapter = CollapseGuard("reset", window=32, concentration=0.8, low=0.0), collapsing()
    adapt(guard, adapter)
    [found] = guard.summary()["collapse"]["detections"]
    twin = collapsing(at=())
    batches = list(stream().test_dataloader())
    for batch in batches[found["batch"] + 1 :]:
        twin.adapt_step(batch.images)
    assert are_equal(tensors_of(adapter), tensors_of(twin))


def test_stop_ends_the_run():
    guard, kept = CollapseGuard("stop", window=32, concentration=0.8, low=0.0), Logits()
    trainer, told = adapt(guard, collapsing(), kept)
    [found] = guard.summary()["collapse"]["detections"]
    assert len(kept.rows) == 8 * (found["batch"] + 1) < 2 * IMAGES
    assert "the run stops" in told[0]
    assert trainer.should_stop


def test_the_figures_are_in_the_metrics_and_the_loggers(tmp_path):
    guard, logger = (
        CollapseGuard("reset", window=32, concentration=0.8, low=0.0),
        CSVLogger(tmp_path),
    )
    adapt(guard, collapsing(), logger=logger)
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:  # noqa: PTH123
        rows = [row for row in csv.DictReader(file) if row.get("collapse/concentration")]
    [found] = guard.summary()["collapse"]["detections"]
    assert len(rows) == 1
    assert float(rows[0]["collapse/concentration"]) == pytest.approx(found["concentration"])
    assert int(rows[0]["step"]) == found["batch"]


def test_at_most_three_are_told_in_full():
    guard = CollapseGuard("reset", window=32, concentration=0.8, low=0.0)
    _, told = adapt(guard, collapsing(at=range(4, 20)))
    assert guard.detector.alarms > 3
    assert len(told) == 3
    assert "only counted" in told[2]
    assert "only counted" not in told[1]


@pytest.mark.parametrize("make", [Source, lambda network: T3A(network)])
def test_a_healthy_run_is_not_disturbed(make):
    guard, kept, alone = CollapseGuard(), Logits(), Logits()
    adapt(guard, make(make_network("gn")), kept)
    quiet(alone).adapt(make(make_network("gn")), datamodule=stream())
    assert torch.equal(kept.stacked(), alone.stacked())
    assert guard.summary()["collapse"]["alarms"] == 0


def test_it_idles_where_the_plan_resets_every_batch():
    guard = CollapseGuard("stop")
    data = stream("episodic")
    adapt(guard, collapsing(at=range(200)), data=data)
    assert guard.detector.batches == 0


def test_it_lets_go_at_the_end_and_starts_anew():
    guard, adapter = CollapseGuard(window=32, concentration=0.8, low=0.0), collapsing()
    adapt(guard, adapter)
    assert guard.detector._adapter is guard.detector._healthy is guard.detector._probes.images
    assert guard.detector._healthy is None
    adapt(guard, collapsing(at=()))
    assert guard.summary()["collapse"] == {
        **{"alarms": 0, "suspicions": 0, "evidence_passes": 0},
        "detections": [],
    }


def test_it_lets_go_when_the_run_breaks_off():
    class Breaking(AdaptCallback):
        def on_adapt_batch_end(self, trainer, adapter, logits, batch, batch_idx):
            if batch_idx == 5:
                raise InputError("enough")

    guard = CollapseGuard(window=32, concentration=0.8, low=0.0)
    with pytest.raises(InputError, match="enough"):
        quiet(guard, Breaking()).adapt(collapsing(), datamodule=stream())
    assert guard.detector._adapter is None


def test_the_state_survives_a_file():
    guard = CollapseGuard("warn", window=32, concentration=0.8, low=0.0)
    states = []

    class Saver(AdaptCallback):
        def on_adapt_batch_end(self, *args):
            states.append(guard.state_dict())

    adapt(guard, collapsing(), Saver())
    file = io.BytesIO()
    torch.save(states[15], file)
    file.seek(0)
    other = CollapseGuard("warn", window=32, concentration=0.8, low=0.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert are_equal(other.state_dict(), states[15])
    assert other.summary()["collapse"]["detections"] == states[15]["detections"] != []


def test_its_options_are_described():
    given = {"action": "reset", "window": 64, "prior": [0.1] * 10}
    described = CollapseGuard(**given).describe()
    assert {name: described[name] for name in given} == given
    assert described["margin"] == CollapseGuard().detector.margin


def test_an_unknown_action_is_refused():
    with pytest.raises(InputError, match="Did you mean 'rollback'"):
        CollapseGuard("rolback")


def test_weights_that_explode_are_told_of_in_a_file_that_is_json(tmp_path):
    """Lengths overflow before the weights do, and JSON has no infinity."""

    class Explodes(Callback):
        def on_test_batch_end(self, trainer, adapter, *args):
            with torch.no_grad():
                adapter.network[1].weight.fill_(1e25)

    guard = CollapseGuard(action="warn", window=32, probes=16)
    adapter = Tent(make_network("gn"), SGD(lr=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet(guard, Explodes(), run_dir=tmp_path / "run").adapt(
            adapter, datamodule=make_stream(200)
        )
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["completed"] is True
    assert metrics["collapse"]["suspicions"] > 0
