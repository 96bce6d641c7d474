"""The loop: order of hooks, labels, resets, stock callbacks and loggers, other dataloaders."""

import csv
import os
import signal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback, Timer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, TensorDataset

from tests.networks import make_batches, make_network
from tests.streams import CLASSES, make_source, make_stream
from tta_lightning import cli
from tta_lightning.callbacks import AdaptCallback, StreamMetrics
from tta_lightning.contract import StepReport
from tta_lightning.data import ArraySource, Stream
from tta_lightning.errors import InputError
from tta_lightning.methods import BNStats, Source, Tent
from tta_lightning.models import Classifier, ModelInfo
from tta_lightning.rules import SGD
from tta_lightning.trainer import Trainer


def quiet(*callbacks, **options):
    given = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "run_dir": False}
    return Trainer(callbacks=list(callbacks), **{**given, **options})


def tent(norm="bn", lr=0.05):
    return Tent(make_network(norm), SGD(lr=lr, momentum=0.9))


class Logits(AdaptCallback):
    """Keeps the logits by position in the plan."""

    def __init__(self):
        self.rows = {}

    def on_adapt_batch_end(self, trainer, adapter, logits, batch, batch_idx):
        self.rows.update(zip(batch.positions.tolist(), logits, strict=True))

    def stacked(self):
        return torch.stack([self.rows[position] for position in sorted(self.rows)])


def logits_of(adapter, stream, **options):
    kept = Logits()
    quiet(kept, **options).adapt(adapter, datamodule=stream)
    return kept.stacked()


def by_hand(adapter, stream):
    """A bare loop over the same stream, which resets where the plan says so."""
    rows, previous = [], None
    for batch in stream.test_dataloader():
        segment = stream.plan.segment_at(int(batch.positions[0]))
        if segment != previous and stream.plan.segments[segment].reset:
            adapter.reset()
        previous = segment
        rows.append(adapter.adapt_step(batch.images))
    return torch.cat(rows)


@pytest.mark.parametrize("scenario", ["reset_each_shift", "continual", "mixed_domains"])
def test_equals_a_bare_loop(scenario):
    stream = make_stream(scenario=scenario)
    assert torch.equal(logits_of(tent(), stream), by_hand(tent(), stream))


def test_scenarios_differ_only_where_the_reset_matters():
    reset = logits_of(tent(), make_stream(scenario="reset_each_shift"))
    continual = logits_of(tent(), make_stream(scenario="continual"))
    assert torch.equal(reset[:12], continual[:12])
    assert not torch.equal(reset[12:], continual[12:])


def test_a_second_adapt_starts_from_the_source_model():
    adapter, trainer = tent(), quiet(kept := Logits())
    trainer.adapt(adapter, datamodule=make_stream())
    first = kept.stacked()
    kept.rows.clear()
    trainer.adapt(adapter, datamodule=make_stream())
    assert torch.equal(kept.stacked(), first)
    assert torch.equal(logits_of(adapter, make_stream()), first)


def test_labels_never_matter():
    source = make_source()
    shuffled = ArraySource(
        np.stack([source.load(i) for i in range(12)]), np.roll(source.labels, 5), CLASSES
    )
    options = {"corruptions": ["contrast"], "severity": 3, "batch_size": 5}
    first, second = (logits_of(tent(), Stream(s, **options)) for s in (source, shuffled))
    assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:You have overridden `transfer_batch_to_device`")
def test_the_adapter_never_sees_labels():
    class Spy(Tent):
        seen: list = []  # noqa: RUF012

        def adapt_step(self, images):
            self.seen.append(images)
            return super().adapt_step(images)

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            self.seen.append(batch)
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_test_batch_start(self, *args):
            raise AssertionError("hooks of the module get batches with labels")

    quiet().adapt(Spy(make_network("gn"), SGD(lr=0.1)), datamodule=make_stream())
    assert Spy.seen
    assert all(isinstance(each, torch.Tensor) and each.dim() == 4 for each in Spy.seen)


def test_order_of_hooks():
    class Recorder(AdaptCallback):
        def __init__(self):
            self.names = []

    hooks = [name for name in vars(AdaptCallback) if name.startswith("on_adapt")]
    stock = ("on_test_start", "on_test_batch_start", "on_test_batch_end", "on_test_end", "setup")
    for name in (*hooks, *stock):
        setattr(Recorder, name, lambda self, *args, _name=name, **kw: self.names.append(_name))
    recorder = Recorder()
    quiet(recorder).adapt(tent(), datamodule=make_stream(images=4))
    batch = [
        "on_test_batch_start",
        "on_adapt_batch_start",
        "on_adapt_batch_end",
        "on_test_batch_end",
        "on_adapt_boundary",
    ]
    segment = ["on_adapt_segment_start", *batch, "on_adapt_segment_end"]
    assert recorder.names == [
        "setup",
        "on_test_start",
        "on_adapt_start",
        "on_adapt_boundary",
        *segment,
        "on_adapt_reset",
        *segment[:-1],
        "on_adapt_boundary",  # before the last segment ends
        segment[-1],
        "on_adapt_end",
        "on_test_end",
    ]


def test_arguments_of_hooks():
    seen = {}

    class Check(Callback):  # a stock callback with two of our hooks
        def on_adapt_segment_start(self, trainer, adapter, segment):
            seen.setdefault("segments", []).append((segment.name, segment.start, segment.stop))

        def on_adapt_reset(self, trainer, adapter, reason):
            seen["reason"] = reason

    quiet(Check()).adapt(tent(), datamodule=make_stream())
    assert seen["segments"] == [("contrast-3", 0, 12), ("gaussian_noise-3", 12, 24)]
    assert "gaussian_noise-3" in seen["reason"]


def test_stock_callbacks_and_loggers_work(tmp_path):
    ends = []
    loggers = [
        CSVLogger(tmp_path, name="csv", version=""),
        TensorBoardLogger(tmp_path, name="tb", version=""),
    ]
    callbacks = [
        LambdaCallback(on_test_batch_end=lambda *args: ends.append(args)),
        Timer(),
    ]
    quiet(*callbacks, logger=loggers, log_every_n_steps=1).adapt(tent(), datamodule=make_stream())
    assert len(ends) == 6
    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").read_text().splitlines()))
    accuracies = [row["stream/accuracy"] for row in rows if row.get("stream/accuracy")]
    assert len(accuracies) == 1
    assert sum(bool(row.get("contrast-3/accuracy")) for row in rows) == 1
    assert 0 <= float(accuracies[0]) <= 1
    assert any((tmp_path / "tb").glob("events*"))


def test_self_log_works_inside_a_method():
    class Logs(Tent):
        def loss(self, out, images):
            loss = super().loss(out, images)
            self.log("entropy", loss.detach())
            return loss

    trainer = quiet()
    trainer.adapt(Logs(make_network("gn"), SGD(lr=0.1)), datamodule=make_stream())
    assert float(trainer.callback_metrics["entropy"]) > 0


def test_the_trainer_is_left_as_it_was():
    trainer = quiet()
    loop, callbacks = trainer.test_loop, list(trainer.callbacks)
    trainer.adapt(tent(), datamodule=make_stream())
    assert trainer.test_loop is loop
    assert trainer.callbacks == callbacks
    with pytest.raises(InputError, match="clean images"):
        trainer.adapt(NeedsClean(make_network("gn")), datamodule=make_stream())
    assert trainer.test_loop is loop
    assert trainer.callbacks == callbacks


class NeedsClean(Tent):
    def prepare(self, clean):
        self.ready()
        self.clean = torch.cat(list(clean))
        assert torch.is_grad_enabled()


def test_prepare_gets_the_clean_images():
    adapter = NeedsClean(make_network("gn"), SGD(lr=0.1))
    clean = make_source(seed=9)
    quiet().adapt(adapter, datamodule=make_stream(clean=clean))
    expected = {clean.load(i).tobytes() for i in range(12)}
    pixels = (adapter.clean * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert {image.tobytes() for image in pixels} == expected


@pytest.mark.parametrize("labelled", [True, False])
def test_plain_dataloaders(labelled):
    images = torch.cat(make_batches())
    labels = torch.arange(64) % 10
    data = TensorDataset(images, labels) if labelled else images
    kept = Logits()
    results = quiet(kept).adapt(tent(), dataloaders=DataLoader(data, batch_size=16))
    adapter = tent()
    expected = torch.cat([adapter.adapt_step(batch) for batch in images.split(16)])
    assert torch.equal(kept.stacked(), expected)
    accuracy = (expected.argmax(1) == labels).float().mean().item() if labelled else None
    assert results["overall"]["accuracy"] == pytest.approx(accuracy)


def test_a_dataset_of_images_alone():
    loader = DataLoader(TensorDataset(torch.cat(make_batches())), batch_size=16)  # gives [images]
    assert quiet().adapt(tent(), dataloaders=loader)["overall"]["images"] == 64


IMAGES = torch.rand(4, 3, 32, 32)


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TensorDataset(torch.zeros(4, 7)), r"\[B, 3, H, W\]"),
        (TensorDataset((255 * IMAGES).byte()), "floating-point"),
        (TensorDataset(IMAGES, torch.eye(4)), "class indices"),
        (TensorDataset(IMAGES, torch.tensor([0, 1, 2, 10])), "label 10"),
        ([], "no image"),
    ],
)
def test_batches_that_do_not_fit(data, message):
    with pytest.raises(InputError, match=message):
        quiet().adapt(tent(), dataloaders=DataLoader(data, batch_size=4))


@pytest.mark.parametrize("method", [Source, BNStats, tent])
def test_a_batch_that_is_not_finite_is_counted_and_said(method):
    adapter = method() if method is tent else method(make_network("bn"))
    images = torch.cat(make_batches())
    images[20] = torch.nan
    with pytest.warns(UserWarning, match="not finite"):
        results = quiet().adapt(adapter, dataloaders=DataLoader(images, batch_size=16))
    assert results["nonfinite_batches"] == 1
    assert results["batches"] == 4


def test_sigterm_stops_and_the_command_line_says_so(monkeypatch, capsys):
    class Kill(AdaptCallback):
        def on_adapt_batch_end(self, trainer, adapter, logits, batch, batch_idx):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SIGTERMException):
        quiet(kept := Logits(), Kill()).adapt(tent(), datamodule=make_stream())
    assert len(kept.rows) == 5

    def stop(self, **options):
        raise SIGTERMException

    monkeypatch.setattr(cli.TTACLI, "__init__", stop)
    assert cli.main(["adapt"]) == 143
    assert "SIGTERM" in capsys.readouterr().err


def test_a_callback_of_yours_takes_the_place_of_the_default():
    metrics = StreamMetrics(bins=7)
    results = quiet(metrics).adapt(tent(), datamodule=make_stream())
    assert results["overall"] == metrics.overall.compute()
    assert metrics.overall.calibration.shape == (3, 7)


def named(network, names):
    return Classifier(network, ModelInfo(name="toy", num_classes=len(names), class_names=names))


def test_classes_are_aligned_by_name():
    network = named(make_network("gn"), tuple("jihgfedcba"))
    classes = ("b", "i")
    source = ArraySource(
        np.stack([make_source().load(i) for i in range(12)]), np.arange(12) % 2, classes
    )
    stream = Stream(source, batch_size=12)
    logits = logits_of(Source(network), stream)
    batch = next(iter(stream.test_dataloader()))
    assert torch.equal(logits, make_network("gn")(batch.images)[:, [8, 1]].detach())


def test_another_stream_lifts_the_restriction():
    adapter = Source(named(make_network("gn"), CLASSES))
    two = ArraySource(np.zeros((2, 32, 32, 3), np.uint8), np.arange(2), ("b", "i"))
    assert logits_of(adapter, Stream(two)).shape[1] == 2
    assert logits_of(adapter, make_stream()).shape[1] == 10


def test_a_restriction_of_yours_stays_where_the_stream_names_no_classes():
    adapter = Source(make_network("gn"))
    adapter.restrict_classes([3, 4])
    kept = Logits()
    quiet(kept).adapt(adapter, dataloaders=DataLoader(torch.cat(make_batches()), batch_size=16))
    assert kept.stacked().shape[1] == 2


def test_stop_ends_cleanly():
    class Stop(AdaptCallback):
        ended = False

        def on_adapt_batch_end(self, trainer, adapter, logits, batch, batch_idx):
            trainer.should_stop = batch_idx == 1

        def on_adapt_end(self, trainer, adapter):
            Stop.ended = True

    results = quiet(Stop()).adapt(tent(), datamodule=make_stream())
    assert results["batches"] == 2
    assert Stop.ended
    assert results["completed"] is False
    assert "10 of 24 images" in results["stopped"]


def test_a_stopped_trainer_runs_again():
    trainer = quiet()
    trainer.should_stop = True
    assert trainer.adapt(tent(), datamodule=make_stream())["completed"] is True


def test_limit_test_batches():
    results = quiet(limit_test_batches=4).adapt(tent(), datamodule=make_stream())
    assert results["batches"] == 4
    assert results["overall"]["images"] == 17  # batches of 5, 5, 2 and 5
    assert results["completed"] is False


@pytest.mark.filterwarnings("ignore:bf16-true keeps 8 bits")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision):
    adapter = tent("gn")
    results = quiet(precision=precision).adapt(adapter, datamodule=make_stream())
    assert results["nonfinite_batches"] == 0
    logits = logits_of(tent("gn"), make_stream(), precision=precision)
    assert logits.dtype == (torch.float64 if precision == "64-true" else torch.bfloat16)
    wanted = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert adapter.network[1].weight.dtype == wanted


def test_what_adapt_refuses():
    with pytest.raises(InputError, match="needs a test-time adaptation method"):
        quiet().adapt(pl.LightningModule(), datamodule=make_stream())
    with pytest.raises(InputError, match="needs a stream"):
        quiet().adapt(tent())


def test_bn_stats_on_the_loop_equals_batch_statistics():
    stream = make_stream(scenario="continual")
    network = make_network("bn").train()
    with torch.no_grad():
        expected = torch.cat([network(batch.images) for batch in stream.test_dataloader()])
    assert torch.equal(logits_of(BNStats(make_network("bn")), stream), expected)


def test_a_recovery_of_the_method_itself_is_told_and_counted(tmp_path):
    class Recovers(Tent):
        """Returns to the source after every third batch."""

        steps = 0

        def learn(self, out, images):
            report = super().learn(out, images)
            self.steps += 1
            if self.steps % 3:
                return report
            self.reset()
            return StepReport(reason="collapsed", reset=True)

    reasons = []

    class Resets(AdaptCallback):
        def on_adapt_reset(self, trainer, adapter, reason):
            reasons.append(reason)

    with pytest.warns(UserWarning, match="Recovers: collapsed") as told:
        results = quiet(Resets()).adapt(
            Recovers(make_network("gn"), SGD(lr=0.1)), datamodule=make_stream(scenario="continual")
        )
    assert (results["recoveries"], len(told)) == (2, 1)
    assert reasons == ["collapsed", "collapsed"]
