"""Meta-training in two processes equals meta-training in one (T19)."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.meta.mt3_worker import RUNS, make_module, make_trainer, tasks, train
from tests.meta.running import ROOT, run_process

WORKER = Path(__file__).with_name("mt3_worker.py")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch was built without gloo",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes with two of the four tasks each wrote, one dict of runs a process."""
    folder = tmp_path_factory.mktemp("mt3_ddp")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run_process(folder, sys.executable, *launcher, WORKER, folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_hold_the_same_weights_after_every_step(ranks, name):
    first, second = (runs[name] for runs in ranks)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert torch.equal(first["weights"], second["weights"])
    assert not torch.equal(first["keys"], second["keys"])
    assert first["figures"] == second["figures"]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one_with_all_tasks(ranks, name):
    alone = train(name)
    joined = torch.cat([runs[name]["keys"] for runs in ranks], dim=1)
    assert torch.equal(joined, alone["keys"])
    assert len(alone["weights"]) == 10
    torch.testing.assert_close(ranks[0][name]["weights"], alone["weights"], rtol=0, atol=1e-10)
    assert (alone["weights"][1:] - alone["weights"][:-1]).abs().amax(dim=1).min() > 1e-4
    figures = ranks[1][name]["figures"]
    assert figures == pytest.approx(alone["figures"], abs=1e-6)  # metrics are kept in float32
    assert {"train/loss_before", "train/ssl_after", "val/accuracy_after"} <= set(figures)


def test_the_clip_acts_on_the_averaged_gradient(ranks):
    """It bites, and would act otherwise on the gradients of each process."""
    shipped, loop = (ranks[0][name]["weights"] for name in ("shipped", "loop"))
    assert (shipped[0] - loop[0]).abs().max() > 1e-3
    module, clip = make_module(clip=None).double(), RUNS["shipped"][1]["clip"]
    batch = next(iter(tasks().train_dataloader()))
    batch = batch._replace(images=batch.images.double())
    drawn = module.draw(batch)
    halves = [
        module.meta_gradients(type(drawn)(*(part[some] for part in drawn)))[0]
        for some in (slice(2), slice(2, 4))
    ]
    before = torch.nn.utils.parameters_to_vector(module.network.parameters()).detach()
    steps = {"after": [], "before": []}
    for name, _ in module.embedder.named_parameters():
        pair = [half[name] for half in halves]
        steps["after"].append(_clipped(sum(pair) / 2, clip))
        steps["before"].append(sum(_clipped(each, clip) for each in pair) / 2)
    after, early = (before - 0.1 * torch.cat([g.flatten() for g in s]) for s in steps.values())
    torch.testing.assert_close(shipped[0], after, rtol=0, atol=1e-10)
    assert (early - after).abs().max() > 1e-4


def _clipped(gradient, largest):
    return gradient * min(1.0, largest / float(gradient.norm()))


def test_unequal_shares_are_refused(ranks):
    for runs in ranks:
        assert runs["refusal"].startswith("5 tasks cannot be shared out evenly over 2 processes")
        assert runs["refusal"].endswith("a multiple of 2.")


def test_the_shipped_strategy_is_among_those_tested():
    config = yaml.safe_load((ROOT / "configs" / "trainer" / "ddp.yaml").read_text())
    assert config["trainer"]["strategy"] in {strategy for strategy, _ in RUNS.values()}


def test_one_process_takes_any_number_of_tasks():
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_module(), datamodule=tasks(tasks=5, limit=None))
    assert trainer.global_step == 1
