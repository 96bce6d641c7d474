"""What people get wrong: one sentence on standard error, no traceback, nothing lost."""

import json
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.conftest import CONFIGS, CPU, read_csv, read_json
from tests.networks import make_network
from tests.streams import make_stream
from tta_lightning.callbacks import AdaptCallback
from tta_lightning.methods import Tent
from tta_lightning.models import checkpoint_record, load_model
from tta_lightning.rules import SGD
from tta_lightning.trainer import Trainer

NETWORK = {
    "class_path": "tta_lightning.models.SmallConvNet",
    "init_args": {"width": 8, "num_classes": 2},
    "class_names": ["cat", "dog"],
}
EPISODIC = "tta_lightning.methods.MT3"


def heads_on(norm):
    """A small network with BYOL heads, to be given by name."""
    backbone = {"spec": NETWORK["class_path"], "width": 8, "norm": norm, "num_classes": 2}
    heads = {"spec": "tta_lightning.models.BYOLHeads", "backbone": backbone}
    return {**heads, "class_names": NETWORK["class_names"]}


def without_batch_norm():
    """The small network, with group normalisation."""
    return {**NETWORK, "init_args": {**NETWORK["init_args"], "norm": "group"}}


def method(name):
    """Options that take another method and leave the network as it is."""
    return ("--model", name, "--model.network", "model.ckpt")


WIDER = {"class_path": "tta_lightning.models.SmallConvNet", "init_args": {"num_classes": 5}}


@pytest.fixture(scope="module")
def place(tmp_path_factory, noise_images):
    """A folder with good and bad images, a checkpoint and misspelt configurations."""
    root = tmp_path_factory.mktemp("place")
    noise_images(root / "images", "cat", "dog")
    noise_images(root / "unknown", "cat", "zebra")
    noise_images(root / "sizes", "cat", "dog")
    Image.new("RGB", (40, 50)).save(root / "sizes" / "dog" / "1.png")
    noise_images(root / "damaged", "cat", "dog", count=5)
    file = root / "damaged" / "cat" / "1.png"
    file.write_bytes(file.read_bytes()[:200])
    (root / "empty").mkdir()
    (root / "cifar").mkdir()
    np.save(root / "cifar" / "fog.npy", np.zeros((10, 8, 8, 3), np.uint8))
    np.save(root / "cifar" / "labels.npy", np.zeros(15, np.int64))
    network = load_model(NETWORK)
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save(
        {"tta_lightning": checkpoint_record(network), "state_dict": state}, root / "model.ckpt"
    )
    torch.save((torch.tensor([-1.0, 1.0]), torch.ones(2)), root / "mean_std.pt")
    torch.save((torch.ones(3), torch.ones(3)), root / "narrow.pt")
    for name, text in MISSPELT.items():
        (root / f"{name}.yaml").write_text(text)
    return root


MISSPELT = {
    "argument": "model: {init_args: {netwrok: model.ckpt}}",
    "section": "modle: {class_path: Tent}",
    "trainer": "trainer: {max_epoch: 3}",
    "class": "model: {class_path: Tnet}",
    "type": "data: {init_args: {severity: strong}}",
    "no_yaml": "data: {init_args: {severity: 3",
}


def adapt(*options, method="source"):
    """Arguments that adapt to the good images, and whatever replaces some of them."""
    return (
        "adapt",
        *("-c", CONFIGS / "adapt" / f"{method}.yaml", "--model.network", "model.ckpt"),
        *("--data", "Stream", "--data.source", "ImageFolder", "--data.source.root", "images"),
        *("--data.batch_size", "2", *CPU, *options),
    )


ROOT = "--data.source.root"
SHIFT = ("--data.scenario", "label_shift")
OPTION = "--data.scenario_options."
RATIO = f"{OPTION}imbalance_ratio"
CORRELATED, RECURRING = ("--data.scenario", "correlated"), ("--data.scenario", "recurring")
WINDOW = ("--data.scenario", "sliding_window", f"{OPTION}window")
UNLABELLED = ("--data.source", "UnlabelledImages", ROOT, "images")
MGTTA = ("--model", "MGTTA", "--model.network", "model.ckpt", "--model.rule")
# what is given: the words that the sentence must hold
STAG = "--trainer.callbacks+=STAG"
CASES = {
    "missing folder": ((ROOT, "pictures"), ["'pictures' does not exist", "Expected a folder"]),
    "empty folder": ((ROOT, "empty"), ["No class folders in 'empty'", "Expected"]),
    "file as folder": ((ROOT, "model.ckpt"), ["is a file, not a folder"]),
    "empty folder without labels": (
        ("--data.source", "UnlabelledImages", ROOT, "empty"),
        ["No images in 'empty'", ".png"],
    ),
    "labels of another length": (
        ("--data.source", "CIFAR10C", ROOT, "cifar"),
        ["labels.npy has 15 labels", "fog.npy", "has 10 images"],
    ),
    "unknown class folder": ((ROOT, "unknown"), ["'zebra'", "'cat', 'dog'", "Rename"]),
    "logits of another width": (
        ("--model.network", json.dumps(WIDER)),
        ["gives 5 logits", "2 classes (cat, dog"],
    ),
    "images of several sizes": (
        (ROOT, "sizes", "--data.batch_size", "6"),
        ["32 x 32", "40 x 50 px", "image_size"],
    ),
    "missing checkpoint": (("--model.network", "best.ckpt"), ["no weight file 'best.ckpt'"]),
    "unknown model": (("--model.network", "timm:resnet81"), ["'resnet81'", "Nearest: resnet18"]),
    "unknown method": (("--model", "Tant"), ["Unknown class 'Tant'", "Did you mean 'Tent'?"]),
    "unknown source": (("--data.source", "ImageFoldr"), ["Did you mean 'ImageFolder'?"]),
    "unknown callback": (
        ("--trainer.callbacks+=StreamMetric",),
        ["Unknown class 'StreamMetric'", "Did you mean 'StreamMetrics'?"],
    ),
    "no BYOL heads": (
        ("--model", EPISODIC, "--model.network", "model.ckpt"),
        ["has no BYOL heads", "checkpoint of MT3 or of JointTraining", "BYOLHeads"],
    ),
    "batch normalisation under BYOL heads": (
        ("--model", EPISODIC, "--model.network", json.dumps(heads_on("batch"))),
        ["SmallConvNet has", "batch normalisation layers", "batch_norm: group"],
    ),
    "images smaller than the crop": (
        (
            *("--model", EPISODIC, "--model.network", json.dumps(heads_on("group"))),
            *("--model.crop", "[40, 48]"),
        ),
        ["crops of 40 to 48 px", "32 x 32 px", "`crop`"],
    ),
    "unknown space of STAG": (
        (STAG, "--trainer.callbacks.space=rows"),
        ["Unknown space 'rows'", "Did you mean 'row'?", "feature"],
    ),
    "unknown anchors of STAG": (
        (STAG, "--trainer.callbacks.anchors=ful"),
        ["Unknown anchors 'ful'", "Did you mean 'full'?"],
    ),
    "anchors of another space": (
        (STAG, "--trainer.callbacks.space=row", "--trainer.callbacks.anchors=full"),
        ["'row'", "'full'", "do not fit"],
    ),
    "negative weight of STAG": (
        (STAG, "--trainer.callbacks.weight=-1"),
        ["weight = -1.0", "0 <= weight"],
    ),
    "weight of STAG that is no number": (
        (STAG, "--trainer.callbacks.weight=nan"),
        ["weight", "Expected a number", "nan"],
    ),
    "STAG twice": ((STAG, STAG, "--model", "Tent"), ["STAG", "given twice", "Keep one"]),
    "STAG on a method that learns nothing": ((STAG,), ["Source moves no parameter", "Tent"]),
    "EATA without clean images": (
        ("--model", "EATA"),
        ["Set `clean` of the stream", "fisher_alpha=0"],
    ),
    "unknown corruption": (
        ("--data.corruptions", "[fog, snwo]"),
        ["Unknown corruption 'snwo'", "Did you mean 'snow'?", "zoom_blur"],
    ),
    "unknown scenario": (("--data.scenario", "continuall"), ["Did you mean 'continual'?"]),
    "imbalance below 1": ((*SHIFT, RATIO, "0.5"), ["imbalance_ratio = 0.5", "expected 1", "inf"]),
    "imbalance that is no number": ((*SHIFT, RATIO, ".nan"), ["imbalance_ratio = nan"]),
    "unknown option of the scenario": (
        (*SHIFT, "--data.scenario_options.imbalance_ratoi", "3"),
        ["option of label_shift 'imbalance_ratoi'", "Did you mean 'imbalance_ratio'?"],
    ),
    "option of another scenario": (
        ("--data.scenario", "continual", RATIO, "3"),
        ["continual has no options", "'imbalance_ratio'", "Leave it out"],
    ),
    "label shift without labels": (
        (*SHIFT, *UNLABELLED),
        ["label_shift", "6 of 6 have no label", "source with labels"],
    ),
    "correlated without labels": (
        (*CORRELATED, *UNLABELLED),
        ["correlated", "6 of 6 have no label", "source with labels"],
    ),
    "delta 0": ((*CORRELATED, f"{OPTION}delta", "0"), ["delta = 0:", "above 0", "1,000,000"]),
    "window 0": ((*WINDOW, "0"), ["window = 0:", "a whole number from 1 on"]),
    "rounds 1.5": (
        (*RECURRING, f"{OPTION}rounds", "1.5"),
        ["rounds = 1.5:", "a whole number from 1 on"],
    ),
    "rounds that are no number": (
        (*RECURRING, f"{OPTION}rounds", "ten"),
        ["scenario_options.rounds = ten", "expected a number"],
    ),
    "rounds that are no number, among others": (
        (*RECURRING, "--data.scenario_options", "{delta: 10, rounds: ten}"),
        ["scenario_options.rounds = ten", "expected a number"],
    ),
    "gradual without a corruption": (
        ("--data.scenario", "gradual", "--data.corruptions", "[fog, none]"),
        ["gradual", "'none' is the image as it is", "Give corruptions without it"],
    ),
    "plan with a scenario": (
        ("--data.plan", "plan.json", *CORRELATED),
        ["plan.json", "scenario = correlated would be ignored", "Leave out the scenario"],
    ),
    "plan with options of a scenario": (
        ("--data.plan", "plan.json", f"{OPTION}window", "8"),
        ["plan.json", "scenario_options = {'window': 8", "would be ignored", "or leave out the"],
    ),
    "severity 6": (("--data.corruptions", "fog", "--data.severity", "6"), ["severity 6", "1 to 5"]),
    "batch size 0": (("--data.batch_size", "0"), ["batch_size = 0", "expected 1 or more"]),
    "limit 0": (("--data.limit", "0"), ["limit = 0", "expected 1 or more"]),
    "image size below 1": (("--data.image_size", "-3"), ["image_size = -3", "side in px"]),
    "crop of nothing": (("--data.crop_pct", "0"), ["crop_pct = 0", "above 0"]),
    "missing plan": (("--data.plan", "plan.json"), ["No plan at plan.json"]),
    "unknown option of the data": (("--data.sevrity", "3"), ["'sevrity'", "mean 'severity'?"]),
    "unknown option of the trainer": (
        ("--trainer.precison", "32"),
        ["'trainer.precison'", "Did you mean 'trainer.precision'?"],
    ),
    "option of another class": (("--model.alpha", "1"), ["Unknown option 'alpha'. See --help"]),
    "nearly an option, and one of another class": (
        ("--data.corruption", "fog"),
        ["Unknown option 'corruption'. Did you mean 'corruptions'?"],
    ),
    "unknown option": (("--frobnicate", "1"), ["Unknown option 'frobnicate'", "--help"]),
    "text for a number": (("--data.batch_size", "many"), ["batch_size", "int", "many"]),
    "unknown choice": (("--data.on_bad_image", "ignore"), ["on_bad_image", "skip, stop"]),
    "missing YAML": (("-c", "nothing.yaml"), ["does not exist", "nothing.yaml"]),
    "misspelt argument in YAML": (("-c", "argument.yaml"), ["'netwrok'", "mean 'network'?"]),
    "misspelt section in YAML": (("-c", "section.yaml"), ["'modle'", "Did you mean 'model'?"]),
    "misspelt trainer in YAML": (("-c", "trainer.yaml"), ["max_epoch'", "max_epochs'?"]),
    "unknown class in YAML": (("-c", "class.yaml"), ["'Tnet'", "Did you mean 'Tent'?"]),
    "wrong type in YAML": (("-c", "type.yaml"), ["severity", "int", "strong"]),
    "broken YAML": (("-c", "no_yaml.yaml"), ["config", "line 1"]),
    "MGTTA without a rule": (("--model", "MGTTA"), ["required", "rule"]),
    "a network as a rule": (
        (*MGTTA, "MGG", "--model.rule.checkpoint", "model.ckpt"),
        ["'model.ckpt' holds no learned rule", "kind 'source'", "MGGPretraining"],
    ),
    "missing rule": (
        (*MGTTA, "MGG", "--model.rule.checkpoint", "rule.ckpt"),
        ["no weight file 'rule.ckpt'"],
    ),
    "no clean images": ((*MGTTA, "SGD"), ["clean, unlabelled images", "Set `clean`"]),
    "mean before standard deviation": (
        (*MGTTA, "SGD", "--model.statistics", "mean_std.pt"),
        ["mean_std.pt", "negative", "(std, mean)"],
    ),
    "statistics of another width": (
        (*MGTTA, "SGD", "--model.statistics", "narrow.pt"),
        ["narrow.pt are those of 3 features", "gives 112"],
    ),
    "LAME without neighbours": ((*method("LAME"), "--model.k", "0"), ["k = 0 ", "1 <= k"]),
    "T3A without supports": (
        (*method("T3A"), "--model.filter_k", "0"),
        ["filter_k = 0", "expected", "-1"],
    ),
    "RoTTA whose teacher overtakes": (
        (*method("RoTTA"), "--model.nu", "2"),
        ["nu = 2", "0 <= nu <= 1"],
    ),
    "ROID at temperature 0": (
        (*method("ROID"), "--model.temperature", "0"),
        ["temperature = 0", "0 < temperature"],
    ),
    "MEMO without a step": ((*method("MEMO"), "--model.steps", "0"), ["steps = 0", "1 <= steps"]),
    "BNStats without batch normalisation": (
        (*method("BNStats"), "--model.network", json.dumps(without_batch_norm())),
        ["BNStats re-estimates batch normalisation", "has no such layer", "Use a batch-normalised"],
    ),
    "TTT without BYOL heads": (
        method("TTT"),
        ["has no BYOL heads", "checkpoint of MT3 or of JointTraining", "BYOLHeads"],
    ),
    "half precision": (("--trainer.precision", "16-true"), ["'16-true'", "bf16-mixed"]),
    "two devices": (("--trainer.devices", "2"), ["one device", "devices: 1"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sentence_and_no_folder(case, tta, place, tmp_path):
    options, words = CASES[case]
    outcome = tta(place, *adapt("--trainer.run_dir", tmp_path / "run", *options))
    assert_one_sentence(outcome, *words)
    assert list(tmp_path.iterdir()) == []  # nothing was predicted, so nothing is left behind


def assert_one_sentence(outcome, *words):
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert "Traceback" not in outcome.err + outcome.out


STREAM, SETTING = (CONFIGS / "stream" / name for name in ("digits.yaml", "sliding_window.yaml"))


@pytest.mark.parametrize(
    ("options", "option"),
    [
        pytest.param(("-c", SETTING, "-c", STREAM), "scenario", id="before its stream"),
        pytest.param(("-c", SETTING), "scenario", id="without a stream"),
        pytest.param(("--data.scenario", "gradual"), "scenario", id="as an option"),
        pytest.param((f"{OPTION}delta", "1"), "scenario_options.delta", id="an option of it"),
    ],
)
def test_a_setting_goes_after_a_stream(options, option, tta, place, tmp_path):
    tent = ("adapt", "-c", CONFIGS / "adapt" / "tent.yaml")
    outcome = tta(place, *tent, *options, "--trainer.run_dir", tmp_path / "run", *CPU)
    assert_one_sentence(
        outcome,
        f"Option '{option}' has no stream to belong to",
        "A setting goes after a stream: -c configs/stream/digits.yaml -c configs/stream/gradual",
    )
    assert list(tmp_path.iterdir()) == []


def test_after_a_stream_a_setting_is_taken(tta, place, tmp_path):
    """And a whole number stays one in the manifest."""
    stream = tmp_path / "stream.yaml"
    stream.write_text(
        "data: {class_path: Stream, init_args: {source: {class_path: ImageFolder, init_args: "
        f"{{root: {place / 'images'}}}}}}}}}"
    )
    network = ("--model.network", place / "model.ckpt", "--trainer.run_dir", tmp_path / "run")
    tent = ("adapt", "-c", CONFIGS / "adapt" / "tent.yaml", "-c", stream, "-c", SETTING)
    outcome = tta(place, *tent, f"{OPTION}window", "3", *network, *CPU)
    assert (outcome.code, outcome.err) == (0, "")
    manifest = read_json(tmp_path / "run" / "manifest.json")
    assert manifest["stream"]["scenario"] == "sliding_window"
    assert repr(manifest["stream"]["scenario_options"]) == "{'window': 3}"  # no 3.0


def test_a_training_whose_checkpoints_nobody_could_use(tta, place, tmp_path):
    """A class path inside another one is made into an object, which leaves no trace in a file."""
    inner = {"class_path": NETWORK["class_path"], "init_args": {"norm": "group", "num_classes": 2}}
    network = {"class_path": "tta_lightning.models.BYOLHeads", "init_args": {"backbone": inner}}
    outcome = tta(
        place,
        *("fit", "-c", CONFIGS / "fit" / "jt_cifar10_short.yaml", *CPU),
        *("--data.train.root", "images", "--model.network", json.dumps(network)),
        *("--trainer.run_dir", tmp_path / "run"),
    )
    assert_one_sentence(outcome, "Checkpoints of this training could not be used", "{spec: ")


def test_the_good_images_are_good(tta, place, tmp_path):
    outcome = tta(place, *adapt("--trainer.run_dir", tmp_path / "run"))
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
def test_mixed_half_precision_is_refused(tta, place, tmp_path):
    options = ("--trainer.run_dir", tmp_path / "run", "--trainer.precision", "16-mixed")
    assert_one_sentence(tta(place, *adapt(*options)), "'16-mixed'", "bf16-mixed")


def test_a_run_that_writes_nothing(tta, place, tmp_path):
    given = ("--model.network", place / "model.ckpt", ROOT, place / "images")
    assert tta(tmp_path, *adapt(*given, "--trainer.run_dir", "false")).code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["fit,validate,test,adapt"]),
        (("adept",), ["'adept'", "'adapt'"]),
        (("adapt",), ["required", "model", "data"]),
        (("fit", "-c", CONFIGS / "adapt" / "tent.yaml"), ["required", "data"]),
    ],
)
def test_incomplete_commands(arguments, words, tta, place):
    assert_one_sentence(tta(place, *arguments), *words)


# Images that cannot be read -----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_stops_the_run_and_keeps_what_was_predicted(workers, tta, place, tmp_path):
    options = (ROOT, "damaged", "--data.num_workers", workers, "--trainer.run_dir", tmp_path / "r")
    outcome = tta(place, *adapt(*options))
    assert_one_sentence(outcome, "damaged/cat/1.png", "truncated", "on_bad_image: skip")
    rows = read_csv(tmp_path / "r" / "predictions.csv")
    metrics = read_json(tmp_path / "r" / "metrics.json")
    order = [row["path"] for row in read_csv(skipping(tta, place, tmp_path) / "predictions.csv")]
    assert 0 < len(rows) < 9
    assert len(rows) % 2 == 0  # whole batches
    assert [row["path"] for row in rows] == order[: len(rows)]  # those before the image
    assert metrics["completed"] is False
    assert "damaged/cat/1.png" in metrics["stopped"]
    assert metrics["batches"] == len(rows) // 2
    assert metrics["overall"]["images"] == len(rows)
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert metrics["overall"]["accuracy"] == pytest.approx(right / len(rows))


def skipping(tta, place, folder, workers=0):
    options = (ROOT, "damaged", "--data.on_bad_image", "skip", "--data.num_workers", workers)
    with pytest.warns(UserWarning, match="Left out: .*damaged/cat/1.png"):
        outcome = tta(place, *adapt(*options, "--trainer.run_dir", folder / "skip"))
    assert (outcome.code, outcome.err) == (0, "")
    return folder / "skip"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_left_out_and_counted(workers, tta, place, tmp_path):
    folder = skipping(tta, place, tmp_path, workers)
    paths = [row["path"] for row in read_csv(folder / "predictions.csv")]
    good = {f"{name}/{number}.png" for name in ("cat", "dog") for number in range(5)}
    assert len(paths) == 9
    assert set(paths) == good - {"cat/1.png"}
    metrics = read_json(folder / "metrics.json")
    assert metrics["completed"] is True
    assert metrics["overall"]["images"] == 9
    assert metrics["bad_images"]["count"] == 1
    assert "damaged/cat/1.png" in metrics["bad_images"]["files"][0]


@pytest.mark.parametrize("reason", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_run_keeps_what_was_predicted(reason, tmp_path):
    on_disk = []

    class Interrupt(AdaptCallback):
        def on_adapt_batch_start(self, trainer, adapter, batch, batch_idx):
            if batch_idx == 3:  # the first batch of the second segment
                on_disk.extend(read_csv(tmp_path / "run" / "predictions.csv"))
                raise reason

    trainer = Trainer(
        accelerator="cpu",
        callbacks=[Interrupt()],
        enable_progress_bar=False,
        logger=False,
        run_dir=tmp_path / "run",
    )
    with pytest.raises((reason, SystemExit)):  # Lightning ends the process after Ctrl-C
        trainer.adapt(Tent(make_network("gn")), datamodule=make_stream())
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert (metrics["completed"], metrics["batches"]) == (False, 3)
    assert reason.__name__ in metrics["stopped"]
    assert [s["segment"] for s in metrics["segments"]] == ["contrast-3"]
    assert len(on_disk) == 12  # what a killed process would leave
    assert read_csv(tmp_path / "run" / "predictions.csv") == on_disk


# Batches that are hard to learn from --------------------------------------------------------------


@pytest.mark.parametrize("method", ["bnstats", "tent"])
def test_batches_of_one_image_are_allowed_and_warned_of_once(method, tta, place, tmp_path):
    options = ("--data.batch_size", "1", "--trainer.run_dir", tmp_path / "run")
    with pytest.warns(UserWarning, match="Batch statistics of a single image") as caught:
        outcome = tta(place, *adapt(*options, method=method))
    assert (outcome.code, outcome.err) == (0, "")
    assert sum("single image" in str(warning.message) for warning in caught) == 1
    assert len(read_csv(tmp_path / "run" / "predictions.csv")) == 6


def adapt_to_a_bad_batch(folder, norm, lost):
    """Three batches of four images; `lost` is the part of the second one that is NaN."""
    batches = list(torch.rand(3, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    batches[1][lost] = math.nan
    adapter = Tent(make_network(norm), SGD(lr=0.1))
    trainer = Trainer(
        accelerator="cpu", enable_progress_bar=False, logger=False, run_dir=folder / "run"
    )
    with pytest.warns(UserWarning, match=r"not finite.*nothing was learnt") as caught:
        results = trainer.adapt(adapter, dataloaders=DataLoader(torch.cat(batches), batch_size=4))
    assert sum("not finite" in str(warning.message) for warning in caught) == 1
    return adapter, batches, results


def test_a_batch_with_nan_is_predicted_but_not_learnt_from(tmp_path):
    adapter, batches, results = adapt_to_a_bad_batch(tmp_path, "gn", lost=2)
    assert results["nonfinite_batches"] == 1
    rows = read_csv(tmp_path / "run" / "predictions.csv")
    assert "".join(row["updated"] for row in rows) == "111100001111"
    assert [number for number, row in enumerate(rows) if row["prediction"] == "-1"] == [6]
    without = Tent(make_network("gn"), SGD(lr=0.1))
    for images in (batches[0], batches[2]):
        without.adapt_step(images)
    for name, tensor in adapter.network.state_dict().items():
        assert torch.equal(tensor, without.network.state_dict()[name]), name


def test_metrics_are_json_whatever_happens(tmp_path):
    adapt_to_a_bad_batch(tmp_path, "bn", lost=slice(None))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "run" / "metrics.json").read_text()
    assert json.loads(text, parse_constant=refuse)["nonfinite_batches"] == 1


# Verbs that are not for adapters, folders that exist ----------------------------------------------


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_other_verbs_name_adapt(verb, tta, place, tmp_path):
    arguments = adapt("--trainer.run_dir", tmp_path / "run", method="tent")
    assert_one_sentence(tta(place, verb, *arguments[1:]), "Tent", f"tta {verb}", "Use `tta adapt`")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("verb", ["test", "validate"])
def test_a_stock_trainer_names_adapt(verb):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    loader = DataLoader(torch.rand(4, 3, 32, 32), batch_size=2)
    with pytest.raises(RuntimeError, match=rf"Tent .* cannot {verb}\. Use `adapt`.*`tta adapt`"):
        getattr(trainer, verb)(Tent(make_network("gn")), loader)


def test_training_data_for_adapt(tta, place, tmp_path):
    fit = ("--model", "SourceTraining", "--model.network", json.dumps(NETWORK))
    outcome = tta(place, *adapt(*fit, "--trainer.run_dir", tmp_path / "run"))
    assert_one_sentence(outcome, "test-time adaptation method", "SourceTraining", "fit")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_what_exists_is_never_overwritten(taken, tta, place, tmp_path):
    run = tmp_path / "run"
    kept = run / "predictions.csv" if taken == "folder" else run
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("of an earlier run")
    outcome = tta(place, *adapt("--trainer.run_dir", run))
    assert_one_sentence(outcome, str(run), "never overwritten", "run_dir")
    assert kept.read_text() == "of an earlier run"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


def test_a_folder_that_cannot_be_made(tta, place, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = tta(place, *adapt("--trainer.run_dir", tmp_path / "file" / "run"))
    assert_one_sentence(outcome, "cannot be made", "run_dir")
