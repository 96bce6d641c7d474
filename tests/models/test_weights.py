import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tta_lightning.errors import InputError
from tta_lightning.models.weights import load_strictly, read_file, read_weights


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".ckpt", ".bin"])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
def test_state_dicts_of_other_scripts_are_read(tmp_path, layer, suffix, key):
    path = tmp_path / f"weights{suffix}"
    content = layer.state_dict()
    torch.save(content if key is None else {key: content, "epoch": 3}, path)
    file = read_weights(path)
    assert same(file.tensors, layer.state_dict())
    assert (file.mean, file.std) == (None, None)


def test_safetensors_are_read(tmp_path, layer):
    path = tmp_path / "weights.safetensors"
    save_file(layer.state_dict(), path)
    assert same(read_weights(path).tensors, {k: layer.state_dict()[k] for k in ("bias", "weight")})


def test_prefix_of_data_parallel_is_dropped_only_when_common(tmp_path):
    one = torch.ones(1)
    torch.save({"module.a": one, "module.b.module.c": one}, tmp_path / "all.pt")
    torch.save({"module.a": one, "b": one}, tmp_path / "some.pt")
    assert list(read_weights(tmp_path / "all.pt").tensors) == ["a", "b.module.c"]
    assert list(read_weights(tmp_path / "some.pt").tensors) == ["module.a", "b"]


def test_constants_of_a_classifier_are_taken_apart(tmp_path):
    state = {
        "mean": torch.tensor([0.25, 0.5, 0.75]).view(1, 3, 1, 1),
        "std": torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1),
        "network.weight": torch.ones(2),
    }
    torch.save(state, tmp_path / "classifier.pt")
    file = read_weights(tmp_path / "classifier.pt")
    assert list(file.tensors) == ["weight"]
    assert file.mean == (0.25, 0.5, 0.75)
    assert file.std == (1.0, 2.0, 4.0)


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, capsys):
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(InputError, match="carries Python code, which is not run"):
        read_file(path)
    assert capsys.readouterr().out == ""


def test_a_whole_pickled_module_is_refused(tmp_path, layer):
    torch.save(layer, tmp_path / "module.pt")
    with pytest.raises(InputError, match=r"save `model\.state_dict\(\)` instead of the model"):
        read_file(tmp_path / "module.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04rest"])
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.\w+' cannot be read .* damaged"):
        read_file(tmp_path / name)


def test_missing_files_and_other_kinds_are_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no weight file .*nowhere.pt"):
        read_file(tmp_path / "nowhere.pt")
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(InputError, match=r"suffix '\.npz'; expected one of \.pt, \.pth"):
        read_file(tmp_path / "weights.npz")


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"state_dict": {"a": 1}}])
def test_files_without_a_state_dict_are_named(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match="holds no state dict"):
        read_weights(tmp_path / "other.pt")


def test_every_difference_is_listed_and_nothing_is_loaded(layer):
    before = layer.weight.clone()
    weights = {"weight": torch.zeros(2, 4), "extra": torch.zeros(1)}
    with pytest.raises(InputError) as caught:
        load_strictly(layer, weights, "here.pt")
    assert (
        "The weights here.pt do not fit the network torch.nn.modules.linear.Linear: 3 differences: "
        "missing bias; unexpected extra; shape of weight is [2, 4], not [2, 3]."
    ) in str(caught.value)
    with pytest.raises(InputError):
        load_strictly(layer, {"weight": torch.zeros(2, 3)}, "here.pt")
    assert torch.equal(layer.weight, before)


def test_ten_differences_are_shown_and_all_are_counted(layer):
    weights = layer.state_dict() | {f"extra{i}": torch.zeros(1) for i in range(12)}
    with pytest.raises(InputError) as caught:
        load_strictly(layer, weights, "here.pt")
    assert "12 differences" in str(caught.value)
    assert str(caught.value).count("unexpected") == 10
    assert "extra9; ...." in str(caught.value)


def test_old_files_without_batch_norm_counters_load():
    weights = {k: torch.full((2,), 3.0) for k in ("weight", "bias", "running_mean", "running_var")}
    norm = nn.BatchNorm2d(2)
    load_strictly(norm, weights, "old.pth")
    assert norm.running_var.tolist() == [3.0, 3.0]
    assert norm.weight.tolist() == [3.0, 3.0]
