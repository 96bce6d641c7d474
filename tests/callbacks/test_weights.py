"""Adapted weights as a file: loaded by plain timm and torch, compared with the method itself."""

import copy
import json

import pytest
import timm
import torch
from lightning.pytorch import Callback
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.loops.test_adaptation import quiet, tent
from tests.networks import make_batches, make_network
from tests.streams import make_stream
from tests.test_adapter import METHODS
from tta_lightning.callbacks import AdaptationCheckpoint, AdaptedWeights
from tta_lightning.errors import InputError
from tta_lightning.methods import SAR, BNStats, CoTTA, RoTTA, Tent
from tta_lightning.models import BYOLHeads, load_model, weights_hash
from tta_lightning.rules import SGD, Adam

FILE = "adapted.safetensors"


def loader(count=3, size=8, seed=1):
    """Batches of random images, without labels."""
    images = torch.cat(make_batches(count, size, seed))
    return DataLoader(TensorDataset(images), batch_size=size)


def adapt(adapter, folder, *callbacks, **data):
    data = data or {"dataloaders": loader()}
    resumes = "resume_from" in data
    trainer = quiet(AdaptedWeights(), *callbacks, run_dir=None if resumes else folder)
    trainer.adapt(adapter, **data)
    return folder / FILE


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def loaded(path, network):
    """A network of one's own with the file in it, in evaluation mode."""
    network.load_state_dict(load_file(path))
    return network.eval()


class Batches(Callback):
    """Keeps the images of each batch and the segment that they belong to."""

    def __init__(self):
        self.kept = []

    def on_adapt_batch_end(self, trainer, adapter, logits, batch, batch_idx):
        self.kept.append((trainer.test_loop.segment.name, batch.images))

    def of_segment(self, name):
        return [images for segment, images in self.kept if segment == name]


class At(Callback):
    """Does something after one batch; 0 is the first."""

    def __init__(self, batch, action):
        self.batch, self.action = batch, action

    def on_adapt_batch_end(self, trainer, adapter, logits, batch, batch_idx):
        if batch_idx == self.batch:
            self.action(trainer, adapter)


# Plain timm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_efficientnet_gn", "test_vit"])
def test_plain_timm_gives_the_logits_of_the_adapted_model(name, tmp_path):
    torch.manual_seed(0)
    own = timm.create_model(name, num_classes=7).eval()
    save_file(own.state_dict(), tmp_path / "own.safetensors")
    spec = {"spec": f"timm:{name}", "weights": str(tmp_path / "own.safetensors"), "num_classes": 7}
    adapter = Tent(spec, SGD(lr=0.5))
    size = adapter.network.info.input_size
    images = torch.rand(6, 3, size, size)
    data = DataLoader(TensorDataset(images), batch_size=3)
    path = adapt(adapter, tmp_path / "run", dataloaders=data)

    said = metadata(path)
    mean, std = (torch.tensor(json.loads(said[key])).view(1, 3, 1, 1) for key in ("mean", "std"))
    normalised = (images - mean) / std
    model = timm.create_model(name, num_classes=7)
    timm.models.load_checkpoint(model, str(path))
    other = timm.create_model(name, num_classes=7, checkpoint_path=str(path))
    with torch.no_grad():
        expected = adapter(images)
        assert torch.equal(model.eval()(normalised), expected)
        assert torch.equal(other.eval()(normalised), expected)
        assert (own(normalised) - expected).abs().max() > 1e-3
    assert list(load_file(path)) == sorted(own.state_dict())


def test_plain_timm_with_the_statistics_of_the_stream(tmp_path):
    """Of a single batch they are those that the method itself used, up to rounding."""
    torch.manual_seed(0)
    own = timm.create_model("test_resnet", num_classes=7)
    adapter = BNStats(load_model(copy.deepcopy(own), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)))
    images = torch.rand(8, 3, 64, 64)
    data = DataLoader(TensorDataset(images), batch_size=8)
    path = adapt(adapter, tmp_path / "run", dataloaders=data)
    own.eval()
    normalised = (images - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(1, 3, 1, 1)
    with torch.no_grad():
        expected, before = adapter(images), own(normalised)
        timm.models.load_checkpoint(own, str(path))
        assert torch.allclose(own(normalised), expected, rtol=1e-4, atol=1e-4)
    assert (before - expected).abs().max() > 0.01


# Batch normalisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_statistics_are_those_of_all_images_since_the_reset(rate, tmp_path):
    adapter, kept = tent(lr=rate), Batches()
    source = copy.deepcopy(adapter.network)
    path = adapt(adapter, tmp_path / "run", kept, datamodule=make_stream())
    batches = kept.of_segment("gaussian_noise-3")
    assert [len(images) for images in batches] == [5, 5, 2]  # and as many before the reset

    # In training mode torch's own layers use statistics of the batch.
    layers = {name: m for name, m in source.named_modules() if isinstance(m, nn.BatchNorm2d)}
    seen = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    with torch.no_grad():
        for images in batches:
            source.train()(images)
    written = load_file(path)
    # With a rate the weights move between batches, which the first layer does not see.
    for name in layers if rate == 0 else list(layers)[:1]:
        together = torch.cat(seen[name])
        mean, var = together.mean((0, 2, 3)), together.var((0, 2, 3), correction=0)
        assert torch.allclose(written[f"{name}.running_mean"], mean, atol=1e-6)
        assert torch.allclose(written[f"{name}.running_var"], var, rtol=1e-5)
    live = adapter.network.state_dict()
    assert all(torch.equal(written[n], t) for n, t in live.items() if ".running_" not in n)


@pytest.mark.parametrize("mean", [0.0, 10.0, 3000.0])
def test_statistics_far_from_zero(mean, tmp_path):
    """The spread of inputs far from zero is not lost to rounding."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    batches = [images + mean for images in make_batches(2, 8)]
    data = DataLoader(TensorDataset(torch.cat(batches)), batch_size=8)
    written = load_file(adapt(BNStats(network), tmp_path / "run", dataloaders=data))
    together = torch.cat(batches).double()
    for name, expected in {
        "0.running_mean": together.mean((0, 2, 3)),
        "0.running_var": together.var((0, 2, 3), correction=0),
    }.items():
        assert torch.allclose(written[name].double(), expected, rtol=1e-4)


def test_only_the_pass_that_predicts_counts(tmp_path):
    """Not the second one of SAR, at other weights."""
    first = adapt(Tent(make_network("bn"), SGD(lr=0.0)), tmp_path / "tent")
    rule = SGD(lr=0.0)
    second = adapt(SAR(make_network("bn"), rule, margin_e0=9.0, rho=0.5), tmp_path / "sar")
    one, other = load_file(first), load_file(second)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_that_is_not_finite_is_left_out(tmp_path):
    first, second = make_batches(2, 8)
    lost = torch.full_like(first, torch.nan)
    for name, batches in {"with": (lost, first, lost, second), "without": (first, second)}.items():
        data = DataLoader(TensorDataset(torch.cat(batches)), batch_size=8)
        if name == "with":
            with pytest.warns(UserWarning, match="not finite"):
                adapt(BNStats(make_network("bn")), tmp_path / name, dataloaders=data)
        else:
            adapt(BNStats(make_network("bn")), tmp_path / name, dataloaders=data)
    one, other = (load_file(tmp_path / name / FILE) for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_running_statistics_of_a_method_are_written_as_they_are(tmp_path):
    adapter = BNStats(make_network("bn"), alpha=0.3, running=True)
    path = adapt(adapter, tmp_path / "run")
    live, written = adapter.network.state_dict(), load_file(path)
    assert all(torch.equal(written[name], live[name]) for name in live)
    source = make_network("bn").state_dict()
    assert not torch.equal(written["1.running_mean"], source["1.running_mean"])


def test_blended_statistics_are_averaged(tmp_path):
    """Of the first layer: 0.7 of the source's and 0.3 of the mean of what it saw."""
    network = make_network("bn")
    path = adapt(BNStats(make_network("bn"), alpha=0.3), tmp_path / "run")
    with torch.no_grad():
        seen = network[0](torch.cat(make_batches(3, 8)))
    expected = 0.7 * network[1].running_mean + 0.3 * seen.mean((0, 2, 3))
    assert torch.allclose(load_file(path)["1.running_mean"], expected, atol=1e-6)


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_the_run_is_the_same_without_it(norm, tmp_path):
    adapters = [tent(norm), tent(norm)]
    adapt(adapters[0], tmp_path / "with", datamodule=make_stream())
    quiet(run_dir=tmp_path / "without").adapt(adapters[1], datamodule=make_stream())
    one, other = ((tmp_path / n / "predictions.csv").read_bytes() for n in ("with", "without"))
    assert one == other
    assert weights_hash(adapters[0].network) == weights_hash(adapters[1].network)
    assert not any(m._forward_hooks for m in adapters[0].network.modules())


# Who predicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "norm"),
    [
        (lambda network: CoTTA(network, Adam(lr=0.05), mt=0.5, ap=0.0), "gn"),
        (lambda network: RoTTA(network, Adam(lr=0.05), 16, update_frequency=8, nu=0.5), "gn"),
        (lambda network: RoTTA(network, Adam(lr=0.05), 16, update_frequency=8, nu=0.5), "bn"),
    ],
    ids=["cotta-gn", "rotta-gn", "rotta-bn"],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_teacher_is_written_where_it_predicts(make, norm, wrapped, tmp_path):
    network = make_network(norm)
    adapter = make(load_model(network, mean=(0, 0, 0), std=(1, 1, 1)) if wrapped else network)
    images = torch.rand(4, 3, 32, 32)
    model = loaded(adapt(adapter, tmp_path / "run"), make_network(norm))
    with torch.no_grad():
        assert torch.equal(model(images), adapter(images))
        assert (adapter.network.eval()(images) - adapter(images)).abs().max() > 1e-3  # the student


def test_statistics_of_cotta_are_those_of_its_teacher(tmp_path):
    """Its source model sees the images before the teacher does, and the student after it."""
    networks, batches = [make_network("bn"), make_network("bn")], make_batches(2, 8)
    adapter = CoTTA(make_network("bn"), Adam(lr=0.05), mt=0.0, rst=0.0, ap=0.0)

    def keep_teacher(trainer, adapter):
        networks[1].load_state_dict(adapter.memory["teacher"], strict=False)

    path = adapt(adapter, tmp_path / "run", At(0, keep_teacher), dataloaders=loader(2, 8))
    seen = []
    for network, images in zip(networks, batches, strict=True):
        with torch.no_grad():
            seen.append(network[:4].train()(images))
    together = torch.cat(seen)
    written = load_file(path)
    assert torch.allclose(written["4.running_mean"], together.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(written["4.running_var"], together.var((0, 2, 3), correction=0))
    with torch.no_grad():  # of the source model alone they would be others
        alone = networks[0][:4](torch.cat(batches)).mean((0, 2, 3))
    assert (written["4.running_mean"] - alone).abs().max() > 1e-4


# Nothing to write --------------------------------------------------------------------------------

FORGETS, LEAVES = "forgets each image", "left every weight as it was"


@pytest.mark.parametrize(
    ("method", "norm", "reason"),
    [
        ("mt3-loop", "gn", FORGETS),
        ("ttt", "gn", FORGETS),
        ("memo", "bn", FORGETS),
        ("source", "bn", LEAVES),
        ("lame-knn", "bn", LEAVES),
        ("t3a", "gn", LEAVES),
    ],
)
def test_methods_that_adapt_no_weight_write_nothing(method, norm, reason, tmp_path):
    adapter = METHODS[method](make_network(norm))
    with pytest.warns(UserWarning, match=f"{type(adapter).__name__} {reason}"):
        path = adapt(adapter, tmp_path / "run", dataloaders=loader(1, 4))
    assert not path.exists()


def test_before_its_first_update_a_teacher_is_the_source(tmp_path):
    adapter = RoTTA(make_network("bn"), update_frequency=64)
    with pytest.warns(UserWarning, match=f"RoTTA {LEAVES}"):
        assert not adapt(adapter, tmp_path / "run").exists()


def test_resets_before_each_batch(tmp_path):
    stream = make_stream(scenario="episodic")
    with pytest.warns(UserWarning, match="resets the model before each batch"):
        assert not adapt(tent("gn"), tmp_path / "run", datamodule=stream).exists()


def go_back(trainer, adapter):
    adapter.reset()
    trainer.test_loop.announce_reset("test")


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_a_reset_after_the_last_batch(norm, tmp_path):
    with pytest.warns(UserWarning, match="reset after the last batch"):
        assert not adapt(tent(norm), tmp_path / "run", At(2, go_back)).exists()


def test_a_reset_in_between_starts_anew(tmp_path):
    """After it, the run is one on the images that are left."""
    adapt(tent(), tmp_path / "reset", At(0, go_back))
    rest = torch.cat(make_batches(3, 8)[1:])
    data = DataLoader(TensorDataset(rest), batch_size=8)
    adapt(tent(), tmp_path / "rest", dataloaders=data)
    one, other = ((tmp_path / name / FILE).read_bytes() for name in ("reset", "rest"))
    assert one == other
    assert metadata(tmp_path / "reset" / FILE)["images"] == "16"


class Blind(nn.Module):
    """Keeps statistics that no pass ever uses, as hooks would see it of a compiled network."""

    def __init__(self):
        super().__init__()
        self.inner, self.unused = make_network("gn"), nn.BatchNorm2d(3)

    def forward(self, images):
        return self.inner(images)


def test_statistics_that_nobody_saw(tmp_path):
    with pytest.warns(UserWarning, match="showed the statistics"):
        assert not adapt(Tent(Blind(), SGD(lr=0.1)), tmp_path / "run").exists()


# Ends of a run -----------------------------------------------------------------------------------


def fail(trainer, adapter):
    raise RuntimeError("cut")


@pytest.mark.parametrize("batch", [1, 4])
def test_resumed_is_equal_to_the_bit(batch, tmp_path):
    """Batch 1 is in the first segment, batch 4 in the middle of the last."""
    whole = adapt(tent(), tmp_path / "whole", datamodule=make_stream())
    often, part = AdaptationCheckpoint(every_n_batches=1), tmp_path / "part"
    with pytest.raises(RuntimeError, match="cut"):
        adapt(tent(), part, often, At(batch, fail), datamodule=make_stream())
    assert not (part / FILE).exists()
    path = adapt(tent(), part, datamodule=make_stream(), resume_from=part)
    assert path.read_bytes() == whole.read_bytes()


def test_a_stopped_run_has_its_file(tmp_path):
    stop = At(0, lambda trainer, adapter: trainer.test_loop.stop("enough"))
    adapter = tent("gn")
    path = adapt(adapter, tmp_path / "run", stop)
    assert metadata(path)["images"] == "8"
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(path, make_network("gn"))(images), adapter(images))


def test_a_file_that_cannot_be_written(tmp_path):
    folder = tmp_path / "run"
    blocked = At(0, lambda trainer, adapter: (folder / FILE / "in_the_way").mkdir(parents=True))
    with pytest.raises(InputError, match="cannot be written"):
        adapt(tent(), folder, blocked, datamodule=make_stream())
    (folder / FILE / "in_the_way").rmdir()
    (folder / FILE).rmdir()
    # what the message says to do
    adapt(tent(), folder, datamodule=make_stream(), resume_from=folder)
    whole = adapt(tent(), tmp_path / "whole", datamodule=make_stream())
    assert (folder / FILE).read_bytes() == whole.read_bytes()


def test_without_a_folder_nothing_is_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet(AdaptedWeights()).adapt(tent(), dataloaders=loader())
    assert list(tmp_path.iterdir()) == []


# Names and values --------------------------------------------------------------------------------


def test_networks_of_our_own_keep_their_names(tmp_path):
    spec = {"class_path": "tta_lightning.models.SmallConvNet", "init_args": {"norm": "group"}}
    plain = load_model(spec).network.state_dict().keys()
    for name, network in {
        "plain": load_model(spec),
        "byol": BYOLHeads(spec),
        "wrapped": load_model("tta_lightning.models.BYOLHeads", backbone=spec),
        "package": load_model("package:efficientnet_lite0", pretrained=False, num_classes=3),
    }.items():
        path = adapt(Tent(network, SGD(lr=0.1)), tmp_path / name, dataloaders=loader(1, 4))
        if name == "package":
            other = timm.create_model("tf_efficientnet_lite0", num_classes=3)
            assert load_file(path).keys() == other.state_dict().keys()
            assert metadata(path)["model"] == "package:efficientnet_lite0"
        else:
            assert load_file(path).keys() == plain


def test_what_the_metadata_says(tmp_path):
    names = tuple("abcdefghij")
    network = load_model(make_network("gn"), mean=(0.5, 0.25, 0.1), std=(0.5, 1, 2), num_classes=10)
    adapter = Tent(network, SGD(lr=0.1))
    adapter.restrict_classes([1, 3])
    before = weights_hash(network)
    path = adapt(adapter, tmp_path / "run")
    assert metadata(path) == {
        "format": "pt",
        "model": "torch.nn.modules.container.Sequential",
        "num_classes": str(len(names)),
        "classes": "[1, 3]",
        "mean": "[0.5, 0.25, 0.1]",
        "std": "[0.5, 1.0, 2.0]",
        "method": "Tent",
        "images": "24",
        "source_weights_sha256": before,
    }
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["model"]["weights_sha256"] == before
    assert weights_hash(network) != before


class Tied(nn.Module):
    """Two names for one tensor, and one that is not contiguous."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.second.weight = self.first.weight
        self.norm, self.head = nn.GroupNorm(1, 3), nn.Linear(3, 5)
        self.head.weight = nn.Parameter(torch.randn(3, 5).T)

    def forward(self, images):
        return self.head(self.norm(self.second(self.first(images))).square().mean((2, 3)))


def test_tensors_that_share_memory_are_written_each(tmp_path):
    torch.manual_seed(0)
    adapter = Tent(Tied(), SGD(lr=0.5))
    model = loaded(adapt(adapter, tmp_path / "run"), Tied())  # strict: both names are there
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), adapter(images))


@pytest.mark.parametrize("name", ["adapted.pth", "folder/adapted.safetensors", ".safetensors", ""])
def test_names_that_are_refused(name):
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        AdaptedWeights(name)
