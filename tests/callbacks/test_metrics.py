"""Figures of a stream against torchmetrics and against the predictions themselves."""

import math

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from tests.loops.test_adaptation import Logits, quiet, tent
from tests.networks import make_network
from tests.streams import make_stream
from tta_lightning.callbacks import PredictionStatistics, StreamMetrics
from tta_lightning.functional import entropy
from tta_lightning.methods import Source


def draw(samples=2000, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, generator=generator)
    return logits, torch.randint(classes, (samples,), generator=generator)


def measured(logits, labels, bins=15, size=64):
    statistics = PredictionStatistics(bins)
    for a, b in zip(logits.split(size), labels.split(size), strict=True):
        statistics.update(a, b)
    return statistics.compute()


@pytest.mark.parametrize("bins", [10, 15])
def test_equal_torchmetrics(bins):
    logits, labels = draw()
    figures = measured(logits, labels, bins)
    accuracy = MulticlassAccuracy(7, average="micro")(logits, labels).item()
    ece = MulticlassCalibrationError(7, n_bins=bins, norm="l1")(logits, labels).item()
    assert figures["accuracy"] == pytest.approx(accuracy, abs=1e-7)
    assert figures["error"] == pytest.approx(1 - accuracy, abs=1e-7)
    assert figures["ece"] == pytest.approx(ece, abs=1e-6)
    nll = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert figures["nll"] == pytest.approx(nll, abs=1e-6)
    assert figures["entropy"] == pytest.approx(entropy(logits).mean().item(), abs=1e-6)
    confidence = logits.softmax(1).amax(1).mean().item()
    assert figures["confidence"] == pytest.approx(confidence, abs=1e-6)


def test_unknown_labels_do_not_count():
    logits, labels = draw()
    hidden = torch.where(torch.arange(len(labels)) % 3 == 0, -1, labels)
    known = hidden >= 0
    figures, expected = measured(logits, hidden), measured(logits[known], labels[known])
    for name in ("accuracy", "nll", "ece"):
        assert figures[name] == pytest.approx(expected[name], abs=1e-12)
    assert figures["images"] == 2000
    nothing = measured(logits, torch.full_like(labels, -1))
    assert nothing["accuracy"] is None
    assert nothing["nll"] is None
    assert nothing["entropy"] is not None


def test_logits_that_are_not_finite_count_as_wrong():
    logits, labels = draw(samples=100)
    logits[:10] = torch.nan
    figures, finite = measured(logits, labels), measured(logits[10:], labels[10:])
    assert figures["accuracy"] == pytest.approx(0.9 * finite["accuracy"])
    assert figures["nll"] == pytest.approx(finite["nll"])
    assert math.isfinite(figures["ece"])


def test_state_survives_and_merges():
    logits, labels = draw()
    whole = PredictionStatistics()
    whole.update(logits, labels)
    half = PredictionStatistics()
    half.update(logits[:700], labels[:700])
    restored = PredictionStatistics()
    restored.load_state_dict(half.state_dict())
    restored.update(logits[700:], labels[700:])
    assert restored.compute() == pytest.approx(whole.compute())


@pytest.mark.parametrize("scenario", ["reset_each_shift", "mixed_domains"])
def test_segments_domains_and_curve(scenario):
    stream, kept = make_stream(scenario=scenario), Logits()
    results = quiet(kept).adapt(tent(), datamodule=stream)
    plan = stream.plan
    labels = torch.from_numpy(stream.source.labels[plan.samples])
    correct = kept.stacked().argmax(1) == labels
    assert results["overall"]["accuracy"] == pytest.approx(correct.float().mean().item())
    for segment, figures in zip(plan.segments, results["segments"], strict=True):
        expected = correct[segment.start : segment.stop].float().mean().item()
        assert figures["segment"] == segment.name
        assert figures["accuracy"] == pytest.approx(expected)
    found = {each["domain"]: each["accuracy"] for each in results["domains"]}
    if scenario == "mixed_domains":
        ids = torch.from_numpy(plan.domain_ids)
        assert found == {
            str(domain): pytest.approx(correct[ids == number].float().mean().item())
            for number, domain in enumerate(plan.domains)
        }
    else:
        assert found == {}  # the segments are the domains
    curve = results["curve"]
    sizes = [len(batch) for batch in plan.batches(5)]
    assert curve["images"] == sizes
    assert curve["correct"] == [int(part.sum()) for part in correct.split(sizes)]


def test_a_second_run_starts_at_zero():
    metrics = StreamMetrics()
    trainer = quiet(metrics)
    first = trainer.adapt(Source(make_network("gn")), datamodule=make_stream())
    second = trainer.adapt(Source(make_network("gn")), datamodule=make_stream())
    assert first["overall"] == second["overall"]
    assert first["curve"] == second["curve"]
