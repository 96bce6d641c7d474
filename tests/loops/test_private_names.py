"""The private names of Lightning that the loop relies on, checked against the installed release."""

import inspect

import lightning.pytorch as pl
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector import logger_connector

from tta_lightning.loops import AdaptationLoop


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_constructor():
    names = ["self", "trainer", "trainer_fn", "stage", "verbose", "inference_mode"]
    assert parameters(_EvaluationLoop.__init__) == names


def test_methods_that_are_overridden_exist_with_their_signature():
    for name in ("on_run_start", "on_run_end", "_evaluation_step"):
        assert parameters(getattr(AdaptationLoop, name)) == parameters(
            getattr(_EvaluationLoop, name)
        ), name
    step = ["self", "batch", "batch_idx", "dataloader_idx", "dataloader_iter"]
    assert parameters(_EvaluationLoop._evaluation_step) == step


def test_run_calls_what_is_overridden_and_ends_on_stop_iteration():
    source = inspect.getsource(inspect.getmodule(_EvaluationLoop))
    for fragment in ("self.on_run_start()", "self._evaluation_step(", "return self.on_run_end()"):
        assert fragment in source
    assert "except StopIteration" in source


def test_hook_callers():
    assert parameters(call._call_callback_hooks)[:2] == ["trainer", "hook_name"]
    assert parameters(call._call_strategy_hook)[:2] == ["trainer", "hook_name"]


def test_the_trainer_has_what_the_loop_uses():
    connector = logger_connector._LoggerConnector
    assert parameters(connector.on_batch_start) == ["self", "batch", "dataloader_idx"]
    assert parameters(connector.on_batch_end) == ["self"]
    assert parameters(connector.update_eval_step_metrics) == ["self", "step"]
    assert parameters(pl.LightningModule._on_before_batch_transfer) == [
        "self",
        "batch",
        "dataloader_idx",
    ]
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, barebones=False)
    assert isinstance(trainer.test_loop, _EvaluationLoop)
    for name in ("should_stop", "received_sigterm", "precision_plugin", "profiler", "callbacks"):
        assert hasattr(trainer, name), name
    loop = AdaptationLoop(trainer)
    for name in ("batch_progress", "_seen_batches_per_dataloader", "_has_run"):
        assert hasattr(loop, name), name
