"""MGTTA against loops written by hand, and its statistics from every place they can come from."""

import copy
import os
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.networks import make_batches, make_network
from tests.streams import make_source, make_stream
from tta_lightning.callbacks import AdaptCallback
from tta_lightning.errors import InputError
from tta_lightning.methods import MGTTA, Tent
from tta_lightning.methods.mgtta import BlockOutputs
from tta_lightning.models import weights_hash
from tta_lightning.models.weights import CHECKPOINT_KEY
from tta_lightning.rules import MGG, SGD, Adam, UpdateRule
from tta_lightning.rules.checkpoints import learned_rule_record
from tta_lightning.trainer import Trainer

CLEAN = make_batches(3, seed=9)


class RawGradient(UpdateRule):
    """What is left of MGG when its generator is taken out: one learning rate."""

    def init(self, params):
        return {}

    def update(self, grads, state, params):
        return {name: -0.05 * grad for name, grad in grads.items()}, {}


class NormalisedMomentum(UpdateRule):
    """The first of the two numbers that MGG reads, with the exact bias correction."""

    def init(self, params):
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        return {"m": zeros, "v": zeros, "step": torch.zeros(())}

    def update(self, grads, state, params):
        step = state["step"] + 1
        m = {n: 0.9 * state["m"][n] + 0.1 * g for n, g in grads.items()}
        v = {n: 0.99 * state["v"][n] + 0.01 * g**2 for n, g in grads.items()}
        t = step.item()
        roots = {n: (v[n] / (1 - 0.99**t)).sqrt() + 1e-8 for n in grads}
        updates = {n: -0.01 * m[n] / (1 - 0.9**t) / roots[n] for n in grads}
        return updates, {"m": m, "v": v, "step": step}


def make(kind):
    """A network in evaluation mode, and its weights always the same."""
    if kind != "vit":
        return make_network(kind)
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes).eval()
    nn.init.normal_(network.head.weight, std=0.2)
    return network


def run_by_hand(network, images):
    """Logits [B, C] and block features [B, F]."""
    if isinstance(network, nn.Sequential):
        maps = network[:3](images)
        head_input = network[3:8](maps)
        return network[8](head_input), torch.cat([maps.mean(dim=(2, 3)), head_input], dim=1)
    tokens = network.patch_embed.proj(images).flatten(2).transpose(1, 2)
    tokens = torch.cat([network.cls_token.expand(len(images), -1, -1), tokens], dim=1)
    tokens, features = tokens + network.pos_embed, []
    following = [network.blocks[1].norm1, network.blocks[2].norm1, network.norm]
    for block, norm in zip(network.blocks, following, strict=True):
        tokens = tokens + block.attn(block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
        features.append(norm(tokens[:, 0]))
    return network.head(features[-1]), torch.cat(features, dim=1)


def statistics_by_hand(features):
    mean = features.sum(0) / len(features)
    return ((features - mean).square().sum(0) / (len(features) - 1)).sqrt(), mean


def loss_by_hand(logits, features, source, weight):
    p = logits.softmax(1)
    std, mean = statistics_by_hand(features)
    gap = (std - source[0]).square().sum() + (mean - source[1]).square().sum()
    return -(p * p.log()).sum(1).mean() + weight / 64 * gap


def mgg(seed=3, **options):
    torch.manual_seed(seed)
    return MGG(**{"lr": 0.01, **options})


def prepared(kind="gn", rule=None, **options):
    adapter = MGTTA(make(kind), mgg() if rule is None else rule, **options)
    adapter.prepare(CLEAN)
    return adapter


def replay(adapter, batches):
    return torch.stack([adapter.adapt_step(images) for images in batches])


def tensors_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def are_equal(first, second):
    pairs = zip(*map(torch.utils._pytree.tree_leaves, (first, second)), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def never_read():
    raise AssertionError("clean images were read")
    yield


def write_rule(path, network, *, statistics=True, seed=4):
    """A checkpoint as pre-training on this network writes it; returns (std, mean)."""
    method = MGTTA(make("gn"), mgg(seed))
    if statistics:
        method.source.set(torch.linspace(0, 2, 72), torch.linspace(-1, 1, 72), "the test")
    state = {f"method.{name}": value for name, value in method.state_dict().items()}
    backbone = {"name": "their.Network", "weights_sha256": weights_hash(network)}
    record = learned_rule_record(method.rule.options(), backbone)
    torch.save({"state_dict": state, CHECKPOINT_KEY: record}, path)
    return tensors_of(method.source)


class TestWrapper:
    """The invariants of the specification that do not depend on what the generator has learned."""

    @pytest.mark.parametrize("kind", ["bn", "gn", "vit"])
    @pytest.mark.parametrize(
        ("rule", "optim"),
        [
            (RawGradient, lambda moving: torch.optim.SGD(moving, lr=0.05)),
            (
                NormalisedMomentum,
                lambda moving: torch.optim.Adam(moving, lr=0.01, betas=(0.9, 0.99)),
            ),
        ],
    )
    def test_equals_a_loop_written_by_hand(self, kind, rule, optim):
        network, reference = make(kind).double(), make(kind).double().train()
        kinds = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
        moving = [p for m in reference.modules() if isinstance(m, kinds) for p in m.parameters()]
        with torch.no_grad():
            clean = torch.cat([run_by_hand(reference, images.double())[1] for images in CLEAN])
        source, optimizer = statistics_by_hand(clean), optim(moving)
        adapter = MGTTA(network, rule(), statistics_weight=20.0)
        adapter.prepare(images.double() for images in CLEAN)
        for images in make_batches():
            logits, features = run_by_hand(reference, images.double())
            loss = loss_by_hand(logits, features, source, 20.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ours = adapter.adapt_step(images.double())
            torch.testing.assert_close(ours, logits.detach(), rtol=0, atol=1e-11)
            assert adapter.report.loss.item() == pytest.approx(loss.item(), rel=1e-11)
        for (name, p), q in zip(network.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-11, msg=name)

    @pytest.mark.parametrize("kind", ["bn", "gn", "vit"])
    def test_predictions_are_those_of_the_model_before_the_update(self, kind):
        adapter = prepared(kind)
        source = copy.deepcopy(adapter.network)
        for number, images in enumerate(make_batches()):
            frozen = copy.deepcopy(adapter.network)
            logits = adapter.adapt_step(images)
            assert torch.equal(logits, frozen(images))
            assert torch.equal(logits, source(images)) == (number == 0)

    def test_only_norms_move_and_each_of_their_scalars_has_a_state(self):
        adapter = prepared("vit")
        before = tensors_of(adapter.network)
        replay(adapter, make_batches())
        after = adapter.network.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if "norm" in name}
        assert len(moved) == 14  # weight and bias of two norms a block, and of the final one
        scalars = 14 * 48
        assert sum(p.numel() for p in adapter.adapted_parameters.values()) == scalars
        shapes = {key: tuple(value.shape) for key, value in adapter.rule_state.items()}
        vectors = {"m": (scalars,), "v": (scalars,)}
        assert shapes == {"step": (), **vectors, "W": (scalars, 8, 8), "b": (scalars, 8)}

    def test_a_base_transformer_has_the_published_number_of_scalars(self):
        with torch.device("meta"):  # no memory for its 86 million weights
            adapter = MGTTA(timm.create_model("vit_base_patch16_224"), SGD())
        assert sum(p.numel() for p in adapter.adapted_parameters.values()) == 38_400

    @pytest.mark.parametrize("kind", ["bn", "gn", "vit"])
    def test_reset_and_replay_give_the_same_outputs_and_states(self, kind):
        adapter = prepared(kind)
        source, fresh = tensors_of(adapter.network), copy.deepcopy(adapter.rule_state)
        first = replay(adapter, make_batches())
        network, rule_state = tensors_of(adapter.network), copy.deepcopy(adapter.rule_state)
        assert rule_state["step"] == 4
        assert not torch.equal(rule_state["W"], fresh["W"])
        adapter.reset()
        assert are_equal(tensors_of(adapter.network), source)
        assert are_equal(adapter.rule_state, fresh)
        assert torch.equal(adapter.rule_state["W"][5], adapter.rule.memory.W1[0])
        assert torch.equal(replay(adapter, make_batches()), first)
        assert are_equal(tensors_of(adapter.network), network)
        assert are_equal(adapter.rule_state, rule_state)

    def test_the_learned_rule_learns_nothing_while_it_adapts(self):
        adapter = prepared()
        before = tensors_of(adapter.rule)
        replay(adapter, make_batches())
        assert are_equal(tensors_of(adapter.rule), before)
        assert all(p.grad is None for p in adapter.parameters())
        state = torch.utils._pytree.tree_leaves(adapter.rule_state)
        assert not any(tensor.requires_grad for tensor in state)

    def test_without_a_learning_rate_the_model_stays_and_the_memory_does_not(self):
        adapter = prepared(rule=mgg(lr=0.0))
        source = copy.deepcopy(adapter.network)
        for images in make_batches():
            kept = copy.deepcopy(adapter.rule_state)
            assert torch.equal(adapter.adapt_step(images), source(images))
            for key in ("step", "m", "v", "W", "b"):
                assert not torch.equal(adapter.rule_state[key], kept[key]), key
        assert are_equal(tensors_of(adapter.network), tensors_of(source))


class TestLoss:
    def test_by_hand(self):
        adapter = MGTTA(make("gn"), SGD())
        adapter.ready()
        adapter.source.set(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.5]), "the test")
        blocks = torch.tensor([[1.0, 0.0], [3.0, 4.0]])  # std sqrt(2), sqrt(8); mean 2, 2
        out = BlockOutputs(torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), blocks=blocks)
        entropies = 0.6931472, 0.5623351
        gap = 0.1715729 + 8.0 + 4.0 + 0.25
        expected = sum(entropies) / 2 + 0.4 / 64 * gap
        assert adapter.loss(out, torch.empty(2)).item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("kind", ["bn", "gn", "ln", "vit"])
    def test_no_gap_to_the_statistics_of_the_batch_itself(self, kind):
        images = make_batches(1)[0]
        adapter = MGTTA(make(kind), SGD(), statistics_weight=6400.0)
        adapter.prepare([images])
        p = adapter.adapt_step(images).softmax(1)
        entropy = -(p * p.log()).sum(1).mean().item()
        assert adapter.report.loss.item() == pytest.approx(entropy, abs=2e-6)
        adapter.reset()
        adapter.adapt_step(images.flip(3) ** 2)
        assert adapter.report.loss.item() > entropy + 1e-2

    def test_without_weight_it_is_tent(self):
        ours, theirs = prepared(rule=SGD(0.1), statistics_weight=0.0), Tent(make("gn"), SGD(0.1))
        assert torch.equal(replay(ours, make_batches()), replay(theirs, make_batches()))

    @pytest.mark.parametrize("kind", ["gn", "vit"])
    def test_of_an_image_alone_it_has_the_gap_of_the_means(self, kind):
        adapter, image = prepared(kind, SGD(0.1), statistics_weight=50.0), make_batches(1, 1)[0]
        logits, features = run_by_hand(make(kind), image)
        probabilities = logits.softmax(1)
        entropy = -(probabilities * probabilities.log()).sum()
        gap = (features[0] - adapter.source.mean).square().sum()
        adapter.adapt_step(image)
        expected = (entropy + 50.0 / 64 * gap).item()
        assert adapter.report.loss.item() == pytest.approx(expected, rel=1e-5)
        assert adapter.report.updated

    def test_an_image_alone_leaves_a_finite_memory(self):
        adapter = prepared()
        replay(adapter, [make_batches(1, size=1)[0]])
        assert adapter.report.updated
        logits = replay(adapter, make_batches(2))
        assert torch.isfinite(logits).all()
        leaves = torch.utils._pytree.tree_leaves(adapter.rule_state)
        assert all(torch.isfinite(tensor).all() for tensor in leaves)

    def test_classes_are_restricted_before_the_entropy(self):
        images, classes = make_batches(1)[0], [7, 2, 5]
        logits, features = run_by_hand(make("gn"), images)
        adapter = prepared()
        adapter.restrict_classes(classes)
        source = adapter.source.std, adapter.source.mean
        expected = loss_by_hand(logits[:, classes], features, source, 0.4).item()
        assert torch.equal(adapter.adapt_step(images), logits[:, classes])
        assert adapter.report.loss.item() == pytest.approx(expected, rel=1e-6)
        assert expected < loss_by_hand(logits, features, source, 0.4).item() - 0.5

    def test_a_nan_batch_leaves_memory_moments_and_parameters(self):
        adapter, other = prepared(), prepared()
        batches = make_batches(4)
        replay(adapter, batches[:2])
        network, rule_state = tensors_of(adapter.network), copy.deepcopy(adapter.rule_state)
        with pytest.warns(UserWarning, match="not finite"):
            adapter.adapt_step(torch.full((4, 3, 32, 32), torch.nan))
        assert not adapter.report.finite
        assert are_equal(tensors_of(adapter.network), network)
        assert are_equal(adapter.rule_state, rule_state)
        replay(other, batches[:2])
        assert torch.equal(replay(adapter, batches[2:]), replay(other, batches[2:]))


class TestPrepare:
    @pytest.mark.parametrize("sizes", [(16, 16, 16), (48,), (1, 30, 17), (47, 1)])
    def test_statistics_are_those_of_all_images_whatever_the_batches(self, sizes):
        clean = torch.cat(CLEAN)
        adapter = MGTTA(make("gn"), mgg())
        adapter.prepare(clean.split(sizes))
        std, mean = statistics_by_hand(run_by_hand(make("gn"), clean)[1].detach().double())
        torch.testing.assert_close(adapter.source.std.double(), std, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(adapter.source.mean.double(), mean, rtol=1e-5, atol=1e-7)

    def test_reset_leaves_them_and_preparing_again_gives_the_same(self):
        adapter = prepared()
        before = tensors_of(adapter.source)
        replay(adapter, make_batches())
        adapter.reset()
        assert are_equal(tensors_of(adapter.source), before)
        adapter.prepare(CLEAN)
        assert are_equal(tensors_of(adapter.source), before)

    def test_other_clean_images_replace_them(self):
        adapter = prepared()
        adapter.prepare(make_batches(2, seed=10))
        other = MGTTA(make("gn"), mgg())
        other.prepare(make_batches(2, seed=10))
        assert are_equal(tensors_of(adapter.source), tensors_of(other.source))

    @pytest.mark.parametrize(
        ("clean", "count"), [([], 0), (make_batches(1, 1), 1)], ids=["none", "one"]
    )
    def test_too_few_clean_images(self, clean, count):
        adapter = MGTTA(make("gn"), mgg())
        with pytest.raises(InputError, match=rf"two images or more, got {count}.* clean"):
            adapter.prepare(clean)
        with pytest.raises(InputError, match="has seen none"):
            adapter.adapt_step(make_batches(1)[0])
        adapter.prepare(CLEAN)
        assert torch.equal(adapter.adapt_step(CLEAN[0]), prepared().adapt_step(CLEAN[0]))

    def test_adapting_before(self):
        with pytest.raises(InputError, match=r"has seen none. Call prepare\(clean\) .* first"):
            MGTTA(make("gn"), mgg()).adapt_step(make_batches(1)[0])

    def test_the_state_dict_carries_them_into_a_fresh_adapter(self):
        batches = make_batches(6)
        adapter = prepared()
        replay(adapter, batches[:3])
        saved = copy.deepcopy(adapter.state_dict())
        other = MGTTA(make("gn"), mgg(seed=8))  # the weights of the rule come along
        other.load_state_dict(saved)
        assert are_equal(tensors_of(other.source), tensors_of(adapter.source))
        assert torch.equal(replay(other, batches[3:]), replay(adapter, batches[3:]))
        assert other.describe() == adapter.describe()


class TestFile:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "statistics.pt"
        torch.save((torch.full((72,), 0.5), torch.linspace(-1, 1, 72)), path)
        return str(path)

    def test_clean_images_are_not_looked_at(self, path):
        adapter = MGTTA(make("gn"), mgg(), statistics=path)
        adapter.prepare(never_read())
        images = make_batches(1)[0]
        adapter.adapt_step(images)
        source = torch.full((72,), 0.5), torch.linspace(-1, 1, 72)
        expected = loss_by_hand(*run_by_hand(make("gn"), images), source, 0.4).item()
        assert adapter.report.loss.item() == pytest.approx(expected, rel=1e-6)

    def test_of_another_width(self, path):
        adapter = MGTTA(make("ln"), mgg(), statistics=path)
        expected = r"from .*statistics.pt are those of 72 features, but .*LayerNormNet gives 16"
        with pytest.raises(InputError, match=expected):
            adapter.adapt_step(make_batches(1)[0])

    def test_mean_and_standard_deviation_exchanged(self, path):
        std, mean = torch.load(path)
        torch.save((mean, std), path)
        with pytest.raises(InputError, match=r"statistics.pt .*Expected \(std, mean\).* exchanged"):
            MGTTA(make("gn"), mgg(), statistics=path)

    @pytest.mark.parametrize(
        "content",
        [torch.ones(72), (torch.ones(72),), [1.0, 2.0], {"std": torch.ones(72)}],
        ids=["tensor", "single", "numbers", "dict"],
    )
    def test_that_holds_something_else(self, path, content):
        torch.save(content, path)
        with pytest.raises(InputError, match=r"statistics.pt' holds no feature statistics"):
            MGTTA(make("gn"), mgg(), statistics=path)

    def test_that_does_not_exist(self):
        with pytest.raises(InputError, match=r"no weight file 'nowhere\.pt'"):
            MGTTA(make("gn"), mgg(), statistics="nowhere.pt")

    def test_of_pre_training(self, tmp_path):
        written = write_rule(tmp_path / "rule.ckpt", make("gn"))
        adapter = MGTTA(make("gn"), SGD(), statistics=str(tmp_path / "rule.ckpt"))
        adapter.prepare(never_read())
        assert are_equal(tensors_of(adapter.source), written)


class TestCheckpointOfTheRule:
    def test_of_this_network_gives_its_statistics(self, tmp_path):
        written = write_rule(tmp_path / "rule.ckpt", make("gn"))
        adapter = MGTTA(make("gn"), MGG(str(tmp_path / "rule.ckpt")))
        adapter.prepare(never_read())
        adapter.adapt_step(make_batches(1)[0])
        assert adapter.report.updated
        assert are_equal(tensors_of(adapter.source), written)

    def test_of_another_network_warns_and_needs_clean_images(self, tmp_path):
        theirs = make("gn")
        nn.init.ones_(theirs[8].bias)
        write_rule(tmp_path / "rule.ckpt", theirs)
        adapter = MGTTA(make("gn"), MGG(str(tmp_path / "rule.ckpt"), lr=0.01))
        with pytest.warns(UserWarning, match=r"The rule of .*rule.ckpt was trained on") as caught:
            adapter.ready()
        message = str(caught[0].message)
        ours = weights_hash(make("gn"))[:12]
        assert f"their.Network with the weights {weights_hash(theirs)[:12]}" in message
        assert f"Sequential with the weights {ours}" in message
        with pytest.raises(InputError, match="has seen none"):
            adapter.adapt_step(make_batches(1)[0])
        adapter.prepare(CLEAN)
        expected = replay(prepared(rule=mgg(seed=4)), make_batches())
        assert torch.equal(replay(adapter, make_batches()), expected)

    def test_a_copy_in_mid_stream_does_not_warn(self, tmp_path):
        write_rule(tmp_path / "rule.ckpt", make("gn"))
        adapter = MGTTA(make("gn"), MGG(str(tmp_path / "rule.ckpt"), lr=0.01))
        replay(adapter, make_batches(2))
        images = make_batches(1, seed=5)[0]
        assert torch.equal(copy.deepcopy(adapter).adapt_step(images), adapter.adapt_step(images))

    def test_of_the_network_in_another_precision_says_so(self, tmp_path):
        write_rule(tmp_path / "rule.ckpt", make("gn"))
        adapter = MGTTA(make("gn"), MGG(str(tmp_path / "rule.ckpt"))).double()
        with pytest.warns(UserWarning, match=r"this network is .*Sequential in torch.float64"):
            adapter.ready()

    def test_without_statistics_needs_clean_images(self, tmp_path):
        write_rule(tmp_path / "rule.ckpt", make("gn"), statistics=False)
        adapter = MGTTA(make("gn"), MGG(str(tmp_path / "rule.ckpt")))
        with pytest.raises(InputError, match="has seen none"):
            adapter.adapt_step(make_batches(1)[0])

    def test_gives_way_to_a_file(self, tmp_path):
        write_rule(tmp_path / "rule.ckpt", make("gn"))
        torch.save((torch.ones(72), torch.zeros(72)), tmp_path / "other.pt")
        rule = MGG(str(tmp_path / "rule.ckpt"))
        adapter = MGTTA(make("gn"), rule, statistics=str(tmp_path / "other.pt"))
        adapter.adapt_step(make_batches(1)[0])
        assert torch.equal(adapter.source.std, torch.ones(72))

    def test_published_ones_name_no_network(self, tmp_path):
        weights = {f"seq_modeling_block.{n}": t for n, t in mgg().memory.state_dict().items()}
        torch.save({"model_state_dict": weights}, tmp_path / "mgg_ckpt.pth")
        adapter = MGTTA(make("gn"), MGG(str(tmp_path / "mgg_ckpt.pth"), lr=0.01))
        adapter.prepare(CLEAN)
        assert torch.equal(replay(adapter, make_batches()), replay(prepared(), make_batches()))

    @pytest.mark.skipif("TTA_SHARED" not in os.environ, reason="TTA_SHARED names no folder")
    def test_the_published_files(self):
        folder = Path(os.environ["TTA_SHARED"]) / "weights"
        rule = MGG(str(folder / "mgg_ckpt.pth"))
        adapter = MGTTA(make("gn"), rule, statistics=str(folder / "train_info.pt"))
        assert adapter.source.std.shape == adapter.source.mean.shape == (9216,)
        assert adapter.source.std.min() > 0 > adapter.source.mean.min()
        with pytest.raises(InputError, match=r"those of 9216 features, but .* gives 72"):
            adapter.adapt_step(make_batches(1)[0])
        other = MGTTA(make("gn"), rule)
        other.prepare(CLEAN)
        assert torch.isfinite(replay(other, make_batches())).all()


class TestDescription:
    def test_of_the_rule(self):
        described = prepared().describe()
        assert described["name"] == "MGTTA"
        assert described["rule"]["name"] == "MGG"
        assert described["rule"]["lr"] == 0.01
        assert described["rule"]["weights_sha256"] == weights_hash(mgg())
        assert described["rule"]["weights_sha256"] != weights_hash(mgg(seed=4))
        assert "weights_sha256" not in prepared(rule=Adam()).describe()["rule"]

    def test_of_where_the_statistics_come_from(self, tmp_path):
        def origin(adapter):
            return adapter.describe()["hyper_parameters"]

        path, rule = str(tmp_path / "statistics.pt"), str(tmp_path / "rule.ckpt")
        torch.save((torch.ones(72), torch.zeros(72)), path)
        write_rule(rule, make("gn"))
        weight = {"statistics_weight": 0.4}
        assert origin(MGTTA(make("gn"), SGD())) == {**weight, "statistics": None}
        assert origin(prepared()) == {**weight, "statistics": "clean images"}
        assert origin(MGTTA(make("gn"), SGD(), 2.0, path)) == {
            "statistics_weight": 2.0,
            "statistics": path,
        }
        ours = origin(MGTTA(make("gn"), MGG(rule)))
        assert ours == {**weight, "statistics": f"the checkpoint of the rule, {rule}"}


class TestTrainer:
    def adapt(self, adapter, **data):
        """Logits by position in the plan."""
        rows = {}

        class Keep(AdaptCallback):
            def on_adapt_batch_end(self, trainer, adapter, logits, batch, batch_idx):
                rows.update(zip(batch.positions.tolist(), logits, strict=True))

        quiet = {"logger": False, "enable_progress_bar": False, "run_dir": False}
        Trainer(accelerator="cpu", callbacks=[Keep()], **quiet).adapt(adapter, **data)
        return torch.stack([rows[position] for position in sorted(rows)])

    def test_equals_a_bare_loop(self):
        stream = make_stream(clean=make_source(9, seed=5))
        adapter = MGTTA(make("gn"), mgg())
        found = self.adapt(adapter, datamodule=stream)
        clean = torch.stack([image_of(stream.clean, index) for index in range(9)])
        other, rows, previous = MGTTA(make("gn"), mgg()), [], 0
        other.prepare([clean])
        for batch in stream.test_dataloader():
            segment = stream.plan.segment_at(int(batch.positions[0]))
            if segment != previous:
                other.reset()
            previous = segment
            rows.append(other.adapt_step(batch.images))
        assert previous == 1
        torch.testing.assert_close(found, torch.cat(rows))

    def test_clean_images_get_the_precision_of_the_run(self):
        adapter = MGTTA(make("gn"), SGD(0.01))
        trainer = Trainer(run_dir=False, accelerator="cpu", precision="64-true")
        trainer.adapt(adapter, datamodule=make_stream(clean=make_source(7, seed=3)))
        assert adapter.source.std.dtype == torch.float64

    def test_a_stream_without_clean_images(self):
        with pytest.raises(InputError, match="Set `clean` of the stream"):
            self.adapt(MGTTA(make("gn"), mgg()), datamodule=make_stream())

    def test_a_dataloader_has_no_clean_images(self):
        with pytest.raises(InputError, match=r"MGTTA looks at clean images .*Stream\(clean="):
            self.adapt(MGTTA(make("gn"), mgg()), dataloaders=DataLoader(CLEAN[0]))

    def test_known_statistics_need_none(self, tmp_path):
        write_rule(tmp_path / "rule.ckpt", make("gn"))
        found = self.adapt(
            MGTTA(make("gn"), MGG(str(tmp_path / "rule.ckpt"))), datamodule=make_stream()
        )
        assert found.shape == (24, 10)


def image_of(source, index):
    return torch.from_numpy(source.load(index)).permute(2, 0, 1) / 255


def test_a_network_without_normalisation_layers():
    network = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(InputError, match=r"MGTTA moves .* but .*Sequential has none"):
        MGTTA(network, mgg()).prepare(CLEAN)


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_a_weight_below_zero(weight):
    with pytest.raises(InputError, match=f"statistics_weight = {weight}: expected 0 or more"):
        MGTTA(make("gn"), mgg(), statistics_weight=weight)
