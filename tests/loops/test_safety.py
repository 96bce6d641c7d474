"""A number that is not finite never reaches the weights, whatever method runs."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from tests.conftest import read_json
from tests.loops.test_adaptation import Logits, quiet
from tests.networks import are_equal, make_batches, make_network
from tests.streams import make_stream
from tests.test_adapter import CASES, all_of, is_finite
from tta_lightning.adapter import Adapter
from tta_lightning.callbacks import AdaptCallback
from tta_lightning.methods import Tent
from tta_lightning.rules import MGG, SGD, Adam, Sign

POISON = {
    "nan": lambda images: torch.full_like(images, torch.nan),
    "infinity": lambda images: torch.full_like(images, torch.inf),
    "huge": lambda images: torch.full_like(images, 1e38),
    "one pixel": lambda images: images.index_fill(0, torch.tensor([2]), torch.nan),
}


class Watch(AdaptCallback):
    """Notes after each batch whether everything that a step may change is finite."""

    def __init__(self):
        self.finite = []

    def on_adapt_batch_end(self, trainer, adapter, logits, batch, batch_idx):
        self.finite.append(is_finite(adapter))


class Batches(LightningDataModule):
    """Batches as they are, and clean images for methods that look at some."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def test_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    def clean_batches(self):
        return make_batches(2, seed=9)


def adapt_quietly(adapter, batches, *callbacks, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quiet(*callbacks, **options).adapt(adapter, datamodule=Batches(batches))


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize(("make", "norm"), CASES)
def test_weights_stay_finite_and_every_batch_is_predicted_counted_and_named(make, norm, poison):
    if poison == "one pixel" and norm == "bn":
        pytest.skip("batch normalisation spreads a NaN over the batch: that is the case 'nan'")
    batches = make_batches(4, size=8)
    batches[1] = POISON[poison](batches[1])
    watch, logits = Watch(), Logits()
    results = adapt_quietly(make(make_network(norm)), batches, watch, logits)
    assert watch.finite == 4 * [True]
    assert len(logits.rows) == results["overall"]["images"] == 32
    assert results["nonfinite_batches"] == len(results["nonfinite"])
    finite = torch.isfinite(logits.stacked()).all(dim=1).view(4, 8).all(dim=1).tolist()
    named = {each["batch"] for each in results["nonfinite"]}
    assert {number for number, is_so in enumerate(finite) if not is_so} <= named
    assert finite[0]
    if poison != "huge":  # a number that is finite is remembered like any other
        assert finite[2:] == [True, True]
        assert named <= {1}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_moves_nothing(value):
    adapter = Tent(make_network("gn"), Adam(lr=0.1))
    (images,) = make_batches(1)
    adapter.adapt_step(images)
    before = all_of(adapter)
    adapter.terms.append(lambda out, head: out.logits.sum() * 0 + value)
    results = adapt_quietly_in_place(adapter, images)
    assert results.shape == (16, 10)
    assert are_equal(all_of(adapter), before)
    assert (adapter.report.updated, adapter.report.finite) == (False, False)


def adapt_quietly_in_place(adapter, images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adapter.adapt_step(images)


@pytest.mark.parametrize("rule", [SGD(lr=1e39, momentum=0.9), Sign(lr=1e39), MGG(lr=1e39)])
def test_a_step_that_overflows_is_not_taken(rule):
    adapter = Tent(make_network("gn"), rule)
    adapter.ready()
    before = all_of(adapter)
    with pytest.warns(UserWarning, match="a loss, a gradient or a step that is not finite"):
        adapter.adapt_step(make_batches(1)[0])
    assert are_equal(all_of(adapter), before)
    assert "step is not finite" in adapter.report.reason


def test_a_state_of_the_rule_that_overflows_is_not_kept():
    """The square of 1e25 is more than float32 holds: Adam would divide by infinity for good."""
    adapter = Tent(make_network("gn"), Adam(lr=0.1))
    adapter.ready()
    before = all_of(adapter)
    grads = {name: torch.full_like(p, 1e25) for name, p in adapter.adapted_parameters.items()}
    assert adapter.move(grads) is False
    assert are_equal(all_of(adapter), before)
    assert adapter.move({name: grad / 1e10 for name, grad in grads.items()}) is True
    assert not are_equal(all_of(adapter), before)


class Careless(Adapter):
    """A method of somebody else's, whose second step leaves a NaN in the weights."""

    def __init__(self, network):
        super().__init__(network)
        self.steps = 0

    def adapt_step(self, images):
        self.ready()
        logits = self.outputs(images).logits.detach()
        self.steps += 1
        with torch.no_grad():
            for parameter in self.adapted_parameters.values():
                parameter.mul_(torch.nan if self.steps == 2 else 0.9)
        return logits


def test_a_careless_method_is_sent_back_to_its_source_before_a_prediction_is_lost(tmp_path):
    reasons = []

    class Reasons(AdaptCallback):
        def on_adapt_reset(self, trainer, adapter, reason):
            reasons.append(reason)

    batches = make_batches(4)
    network = make_network("gn")
    with torch.no_grad():
        at_source = network(batches[2])
    logits = Logits()
    with pytest.warns(UserWarning, match="a weight is not finite: reset to the source model"):
        quiet(logits, Reasons(), run_dir=tmp_path / "run").adapt(
            Careless(network), datamodule=Batches(batches)
        )
    assert torch.isfinite(logits.stacked()).all()
    assert torch.equal(logits.stacked()[32:48], at_source)
    assert reasons == ["a weight is not finite: reset to the source model"]
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert (metrics["recoveries"], metrics["nonfinite_batches"]) == (1, 0)


def test_in_a_window_an_image_comes_once_though_it_is_predicted_twice():
    arrived = []

    class Arrived(AdaptCallback):
        def on_adapt_batch_end(self, trainer, adapter, logits, batch, batch_idx):
            arrived.append(trainer.test_loop.window.arrived)

    stream = make_stream(12, scenario="sliding_window", scenario_options={"window": 4})
    with pytest.warns(UserWarning, match="a weight is not finite"):
        quiet(Arrived()).adapt(Careless(make_network("gn")), datamodule=stream)
    assert arrived == 2 * [*range(1, 13)]  # a window a segment


def test_metrics_name_the_first_hundred_batches(tmp_path):
    batches = [torch.full((2, 3, 32, 32), torch.nan)] * 103
    adapt_quietly(Tent(make_network("gn")), batches, run_dir=tmp_path / "run")
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["nonfinite_batches"] == 103
    assert [each["batch"] for each in metrics["nonfinite"]] == list(range(100))
    assert metrics["nonfinite"][0] == {
        "batch": 0,
        "segment": "stream",
        "what": "loss, gradient or step is not finite",
    }
