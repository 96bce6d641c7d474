"""Pre-training in two processes equals pre-training in one."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.meta.ddp_worker import UNROLL, pretrain
from tests.meta.running import ROOT, run_process
from tta_lightning.models import SmallConvNet

WORKER = Path(__file__).with_name("ddp_worker.py")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch was built without gloo",
)


def call(folder, *command):
    """Run a command that must succeed; return what it printed."""
    done = run_process(folder, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ranks(folder):
    """What two processes with batches of 4 each wrote, one dict of runs a process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    call(folder, sys.executable, *launcher, WORKER, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", UNROLL)
def test_both_processes_hold_the_same_rule_and_network_after_every_step(ranks, name):
    first, second = (runs[name] for runs in ranks)
    assert (first["rank"], second["rank"]) == (0, 1)
    for what in ("rule", "network"):
        assert torch.equal(first[what], second[what])
        assert not torch.equal(first[what][0], first[what][-1])


@pytest.mark.parametrize("name", UNROLL)
def test_two_processes_equal_one_with_twice_the_batch(ranks, name, tmp_path):
    alone = pretrain(name, 8, tmp_path)
    assert len(alone["rule"]) >= 12
    for what in ("rule", "network"):
        torch.testing.assert_close(ranks[0][name][what], alone[what], rtol=0, atol=1e-10)
    if name == "mgtta":
        assert alone["selection"] == pytest.approx(float(ranks[1][name]["selection"]), abs=1e-5)


def test_one_process_makes_the_run_folder(ranks, folder):
    assert ranks[0]["mgtta"]["run_folder"] == str(folder / "mgtta")
    assert ranks[1]["mgtta"]["run_folder"] == "None"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.relative_to(folder).as_posix() for path in files} == {
        "rank0.pt",
        "rank1.pt",
        "mgtta/.lock",
        "mgtta/checkpoints/best.ckpt",
    }


def test_the_shipped_configuration_starts_two_processes(tmp_path):
    pytest.importorskip("mlxtend")
    network = tmp_path / "network.pt"
    torch.save(SmallConvNet(norm="group").state_dict(), network)
    spec = {"class_path": "tta_lightning.models.SmallConvNet", "init_args": {"norm": "group"}}
    configs = ("-c", ROOT / "configs/fit/mgg.yaml", "-c", ROOT / "configs/trainer/ddp.yaml")
    small = ["--data.images=40", "--data.batch_size=5", "--data.val_images=8", "--data.clean=null"]
    small += ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
    printed = call(
        tmp_path,
        *(Path(sys.executable).with_name("tta"), "fit", *configs, *small),
        *("--model.method.network", json.dumps({**spec, "weights": str(network)})),
        *("--trainer.accelerator", "cpu", "--trainer.run_dir", "run"),
    )
    assert "2 processes" in printed
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["trainer"]["devices"] == 2
    logged = (tmp_path / "run" / "logs" / "metrics.csv").read_text().splitlines()
    assert len([line for line in logged[1:] if line.startswith("0,")]) >= 4  # 40 / (2 * 5) batches
