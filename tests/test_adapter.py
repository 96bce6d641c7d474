"""What every method owes: reset, frozen parameters, state, finiteness."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tests.loops.test_adaptation import Logits, quiet
from tests.methods.test_selection import margin_keeping, watch
from tests.networks import (
    are_equal,
    coloured_squares,
    head_of,
    make_batches,
    make_network,
    sharp_network,
)
from tests.streams import CLASSES, make_source
from tta_lightning.adapter import Adapter
from tta_lightning.callbacks import STAG
from tta_lightning.contract import Outputs
from tta_lightning.data import Stream
from tta_lightning.errors import InputError
from tta_lightning.methods import (
    EATA,
    LAME,
    MEMO,
    MGTTA,
    MT3,
    ROID,
    SAR,
    T3A,
    TTT,
    BNStats,
    CoTTA,
    DeYO,
    RoTTA,
    Source,
    Tent,
)
from tta_lightning.models import BYOLHeads, weights_hash
from tta_lightning.models.norms import norm_layers
from tta_lightning.rules import MGG, SGD, Adam

WIDE = 5.0  # a margin in nats that networks with random weights are within


def make_mgtta(network, rule):
    """MGTTA knows no loss before it has seen clean images."""
    adapter = MGTTA(network, rule)
    adapter.prepare(make_batches(3, seed=9))
    return adapter


def make_eata(network):
    """EATA knows no penalty before it has seen clean images."""
    adapter = EATA(network, SGD(lr=0.01, momentum=0.9), e_margin=WIDE, d_margin=2.0)
    adapter.prepare(make_batches(2, seed=9))
    return adapter


def margin_of_few(network):
    """A margin in nats that 5 images of the first batch are within."""
    return margin_keeping(network, make_batches()[0], kept=5)


def make_mt3(network, method=MT3, **options):
    """MT3 steps on a loss of BYOL heads."""
    torch.manual_seed(4)
    return method(BYOLHeads(network, hidden=8, projection=6), copies=2, **options)


def make_mgg():
    torch.manual_seed(3)
    return MGG(lr=0.01)


METHODS = {
    "source": lambda network: Source(network),
    "bn": lambda network: BNStats(network),
    "bn-blend": lambda network: BNStats(network, alpha=0.3),
    "bn-running": lambda network: BNStats(network, alpha=0.3, running=True),
    "tent-sgd": lambda network: Tent(network, SGD(lr=0.01, momentum=0.9)),
    "tent-adam": lambda network: Tent(network, Adam(lr=0.01)),
    "eta-adam": lambda network: EATA(network, Adam(lr=0.01), WIDE, 2.0, fisher_alpha=0),
    "eata-sgd": make_eata,
    "eta-few": lambda network: EATA(
        network, SGD(lr=0.01), margin_of_few(network), 2.0, fisher_alpha=0
    ),
    "sar-sgd": lambda network: SAR(network, SGD(lr=0.01, momentum=0.9), margin_e0=WIDE),
    "sar-adam-legacy": lambda network: SAR(network, Adam(lr=0.01), margin_e0=WIDE, legacy=True),
    "deyo-patch": lambda network: DeYO(network, SGD(lr=0.01), WIDE, plpd_threshold=-1),
    "deyo-pixel": lambda network: DeYO(network, Adam(lr=0.01), WIDE, None, -1, aug_type="pixel"),
    "deyo-few": lambda network: DeYO(
        network, Adam(lr=0.01), margin_of_few(network), plpd_threshold=-1
    ),
    "cotta-views": lambda network: CoTTA(network, SGD(lr=0.01, momentum=0.9), n_augmentations=2),
    "cotta-plain": lambda network: CoTTA(network, Adam(lr=0.01), ap=0.0),
    "rotta-often": lambda network: RoTTA(network, Adam(lr=0.01), 24, update_frequency=8),
    "rotta-sgd": lambda network: RoTTA(network, SGD(lr=0.01), update_frequency=16, alpha=0.3),
    "roid-adam": lambda network: ROID(network, Adam(lr=0.01)),
    "roid-sgd": lambda network: ROID(network, SGD(lr=0.01, momentum=0.9), momentum_src=0.9),
    "lame-knn": lambda network: LAME(network),
    "lame-rbf": lambda network: LAME(network, affinity="rbf", symmetric=True),
    "t3a": lambda network: T3A(network, filter_k=3),
    "memo": lambda network: MEMO(network, SGD(lr=0.05), n_augmentations=2),
    "memo-adam": lambda network: MEMO(network, Adam(lr=0.01), n_augmentations=1, crop="resized"),
    "mgtta-mgg": lambda network: make_mgtta(network, make_mgg()),
    "mgtta-sgd": lambda network: make_mgtta(network, SGD(lr=0.01, momentum=0.9)),
    "mt3-loop": lambda network: make_mt3(network, episodes="loop"),
    "ttt": lambda network: make_mt3(network, TTT, episodes="loop"),
    "mt3-vmap": lambda network: make_mt3(network, episodes="vmap", in_flight=8),
}
NORMS = ("bn", "gn", "ln")
ONLY, NEVER = ("bn",), ("mt3", "ttt")  # on batch normalisation; MT3 refuses it
BY_CLASS = ("eta-adam", "eata", "roid", "rotta", "t3a")  # what they remember is of some classes


def cases(start="", norms=NORMS):
    """Methods by the start of their names, each with every normalisation that it works with."""
    return [
        pytest.param(make, norm, id=f"{name}-{norm}")
        for name, make in METHODS.items()
        for norm in norms
        if name.startswith(start) and not name.startswith(NEVER if norm == "bn" else ONLY)
    ]


CASES = cases()


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.network.state_dict().items()}


def all_of(adapter):
    """Everything that a step may change, copied: weights, state of the rule, memory."""
    own = (adapter.network.state_dict(), adapter.rule_state, adapter.memory)
    return copy.deepcopy(own)


def is_finite(adapter):
    """Whether everything that a step may change is."""
    return all(torch.isfinite(t).all() for t in torch.utils._pytree.tree_leaves(all_of(adapter)))


def averages_of(memory):
    """The tensors of a memory by name, without the images that a method keeps."""
    return {
        name: tensor
        for path, tensor in torch.utils._pytree.tree_flatten_with_path(memory)[0]
        if "images" not in (name := torch.utils._pytree.keystr(path))
    }


def replay(adapter, batches):
    return torch.stack([adapter.adapt_step(images) for images in batches])


def adapt_quietly(adapter, images):
    """A step on images that a method may warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adapter.adapt_step(images)


class WritesToItsInput(nn.Module):
    """Subtracts in place, as some preprocessing does."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images.sub_(0.5))


@pytest.mark.parametrize(("make", "norm"), CASES)
class TestContract:
    def test_reset_is_bit_exact_and_a_replay_is_equal(self, make, norm):
        adapter = make(make_network(norm))
        source = state_of(adapter)
        first = replay(adapter, make_batches())
        moved = state_of(adapter)
        adapter.reset()
        assert all(torch.equal(t, source[n]) for n, t in state_of(adapter).items())
        assert torch.equal(first, replay(adapter, make_batches()))
        assert all(torch.equal(t, moved[n]) for n, t in state_of(adapter).items())

    def test_only_what_is_named_moves(self, make, norm):
        adapter = make(make_network(norm))
        source = state_of(adapter)
        replay(adapter, make_batches())
        moved = {n for n, t in state_of(adapter).items() if not torch.equal(t, source[n])}
        named = {n.removeprefix("network.") for n in adapter.moving_tensors()}
        assert moved <= named
        if isinstance(adapter, Tent | MGTTA | EATA | SAR | DeYO):
            assert moved == named

    def test_state_dict_continues_in_mid_stream(self, make, norm):
        batches = make_batches(6)
        adapter = make(make_network(norm))
        replay(adapter, batches[:3])
        saved = copy.deepcopy(adapter.state_dict())
        expected = replay(adapter, batches[3:])
        other = make(make_network(norm))
        other.load_state_dict(saved)
        assert torch.equal(replay(other, batches[3:]), expected)
        other.reset()  # back to the source model, not to the state that was loaded
        assert torch.equal(
            other.adapt_step(batches[0]), make(make_network(norm)).adapt_step(batches[0])
        )

    def test_a_nan_batch_changes_nothing(self, make, norm):
        adapter = make(make_network(norm))
        replay(adapter, make_batches(2))
        weights, rule, memory = all_of(adapter)
        adapt_quietly(adapter, torch.full((4, 3, 32, 32), torch.nan))
        assert are_equal(adapter.network.state_dict(), weights)
        assert are_equal(adapter.rule_state, rule)
        assert adapter.episodic or are_equal(adapter.memory, memory)  # or it counts the images
        assert not adapter.report.updated

    def test_a_nan_image_among_others_spoils_nothing(self, make, norm):
        adapter = make(make_network(norm))
        first, bad, last = make_batches(3)
        adapter.adapt_step(first)
        bad[5] = torch.nan
        logits = adapt_quietly(adapter, bad)
        assert is_finite(adapter)
        if norm != "bn":  # whose statistics may be those of the batch
            assert torch.isfinite(logits).all(dim=1).tolist() == [i != 5 for i in range(16)]
        assert torch.isfinite(adapter.adapt_step(last)).all()

    def test_some_classes_alone(self, make, norm):
        adapter = make(make_network(norm))
        adapter.restrict_classes([7, 2, 5])
        logits = replay(adapter, make_batches(2))
        assert logits.shape == (2, 16, 3)
        assert torch.isfinite(logits).all()
        adapter.reset()
        assert torch.equal(replay(adapter, make_batches(2)), logits)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "f64"])
    def test_another_precision_in_mid_stream(self, make, norm, dtype):
        adapter = make(make_network(norm))
        first, second = make_batches(2)
        adapter.adapt_step(first)
        before = averages_of(copy.deepcopy(adapter.memory))
        adapter.to(dtype)
        after = averages_of(adapter.memory)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n].double(), t.double()) for n, t in after.items())
        assert torch.isfinite(adapter.adapt_step(second.to(dtype))).all()
        assert is_finite(adapter)
        averages = averages_of(adapter.memory).values()
        assert not {t.dtype for t in averages} & {torch.bfloat16, torch.float16}

    def test_images_of_inference_mode_and_a_network_that_writes_to_its_input(self, make, norm):
        adapter = make(WritesToItsInput(make_network(norm)))
        with torch.inference_mode():
            batches = [images.clone() for images in make_batches(2)]
        if getattr(adapter, "episodes", "") == "vmap":  # torch.func forbids it
            with pytest.raises(InputError, match=r"in-place.*set episodes: loop"):
                replay(adapter, batches)
            return
        logits = replay(adapter, batches)
        assert logits.shape == (2, 16, 10)
        assert torch.isfinite(logits).all()
        assert all(map(torch.equal, batches, make_batches(2)))  # it was a copy that changed

    def test_an_image_alone_and_a_short_batch(self, make, norm):
        adapter = make(make_network(norm))
        short = (*make_batches(1, 1), *make_batches(1, 3))
        logits = [adapt_quietly(adapter, images) for images in short]
        assert [tuple(each.shape) for each in logits] == [(1, 10), (3, 10)]
        assert all(torch.isfinite(each).all() for each in logits)

    def test_forward_predicts_what_the_next_step_returns(self, make, norm):
        adapter = make(make_network(norm))
        for images in make_batches(2):
            expected = copy.deepcopy(adapter)(images).detach()
            logits = adapter.adapt_step(images)
            assert isinstance(adapter, MT3) or torch.equal(logits, expected)  # MT3's is theta

    def test_works_whatever_grad_mode_surrounds_it(self, make, norm):
        expected = replay(make(make_network(norm)), make_batches())
        for mode in (torch.no_grad, torch.inference_mode):
            adapter = make(make_network(norm))
            with mode():
                assert torch.equal(replay(adapter, make_batches()), expected)

    def test_eval_and_train_do_not_switch_statistics(self, make, norm):
        expected = replay(make(make_network(norm)), make_batches())
        adapter = make(make_network(norm))
        adapter.ready()
        adapter.eval()
        assert torch.equal(replay(adapter, make_batches()), expected)
        adapter.reset()
        adapter.train()
        assert torch.equal(replay(adapter, make_batches()), expected)

    def test_bfloat16_autocast_stays_finite(self, make, norm):
        adapter = make(make_network(norm))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = replay(adapter, make_batches())
        assert torch.isfinite(logits).all()
        assert all(torch.isfinite(t).all() for t in adapter.moving_tensors().values())

    def test_what_autocast_remembers_of_parameters_changes_nothing(self, make, norm):
        replayed = []
        for remembers in (True, False):
            adapter = make(make_network(norm))
            with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=remembers):
                replayed.append(replay(adapter, make_batches()))
        assert torch.equal(*replayed)

    def test_without_a_learning_rate_nothing_moves_and_predictions_are_those_of_forward(
        self, make, norm
    ):
        adapter = make(make_network(norm))
        for owner in (adapter, adapter.rule):
            if hasattr(owner, "lr"):
                owner.lr = 0.0
        source = {name: p.clone() for name, p in adapter.network.named_parameters()}
        for images in make_batches():
            expected = copy.deepcopy(adapter)(images).detach()
            tolerance = 1e-5 if adapter.episodic else 0.0  # image by image, sums are made otherwise
            logits = adapter.adapt_step(images)
            torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
        assert all(torch.equal(p, source[n]) for n, p in adapter.network.named_parameters())

    def test_a_stream_of_one_class_stays_finite(self, make, norm):
        adapter = make(make_network(norm))
        images = (
            make_batches(1, 1)[0].expand(16, -1, -1, -1)
            * torch.linspace(0.9, 1, 16)[:, None, None, None]
        )
        logits = replay(adapter, [images] * 6)
        assert torch.isfinite(logits).all()
        assert all(torch.isfinite(t).all() for t in adapter.moving_tensors().values())

    def test_predictions_without_any_preference_stay_finite(self, make, norm):
        network = make_network(norm)
        with torch.no_grad():
            head_of(network).weight.zero_()
            head_of(network).bias.zero_()
        adapter = make(network)
        assert torch.isfinite(replay(adapter, make_batches())).all()
        assert all(torch.isfinite(t).all() for t in adapter.moving_tensors().values())

    def test_neither_labels_nor_stag_of_weight_zero_change_anything(self, make, norm):
        runs = []
        for labels, callbacks in (([0] * 12, []), (range(12), []), ([0] * 12, [STAG(weight=0)])):
            source = make_source()
            source.labels = np.array(labels) % len(CLASSES)
            stream = Stream(source, batch_size=5, clean=make_source(seed=9))
            adapter, kept = make(make_network(norm)), Logits()
            quiet(kept, *callbacks).adapt(adapter, datamodule=stream)
            runs.append((kept.stacked(), adapter.state_dict()))
        assert all(are_equal(runs[0], run) for run in runs[1:])

    def test_a_copy_is_independent(self, make, norm):
        adapter = make(make_network(norm))
        replay(adapter, make_batches(1))
        twin = copy.deepcopy(adapter)
        expected = replay(adapter, make_batches(2, seed=5))
        assert torch.equal(replay(twin, make_batches(2, seed=5)), expected)


@pytest.mark.parametrize(("make", "norm"), cases(BY_CLASS))
@pytest.mark.parametrize("others", [[1, 8, 3], [5, 2, 7]], ids=["others", "another-order"])
def test_other_classes_of_the_same_number_want_a_reset(make, norm, others):
    adapter = make(make_network(norm))
    adapter.restrict_classes([7, 2, 5])
    replay(adapter, make_batches(2))
    adapter.restrict_classes(others)
    with pytest.raises(InputError, match=r"reset\(\)"):
        adapter.adapt_step(make_batches(1)[0])
    adapter.reset()
    assert adapter.adapt_step(make_batches(1)[0]).shape == (16, 3)


@pytest.mark.parametrize(("make", "norm"), cases(("eta-few", "deyo-few"), ("gn", "ln")))
def test_few_are_few_enough_to_be_differentiated_alone(make, norm):
    network = make_network(norm)
    adapter = make(network)
    _, backward = watch(network)
    adapter.adapt_step(make_batches(1)[0])
    assert backward == [5]


def make_prepared_eata(network):
    adapter = EATA(network, SGD(lr=0.01, momentum=0.9))
    adapter.prepare(coloured_squares(2, seed=9))
    return adapter


SELECTIVE = {
    "eta": lambda network: EATA(network, SGD(lr=0.01, momentum=0.9), fisher_alpha=0),
    "eata": make_prepared_eata,
    "sar": lambda network: SAR(network, SGD(lr=0.01, momentum=0.9)),
    "sar-legacy": lambda network: SAR(network, SGD(lr=0.01, momentum=0.9), legacy=True),
    "deyo": lambda network: DeYO(network, SGD(lr=0.01, momentum=0.9), aug_type="pixel"),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", SELECTIVE.values(), ids=SELECTIVE)
class TestNothingReliable:
    """With the default margins, after a batch that was learnt from."""

    def test_without_any_preference_nothing_changes(self, make, norm):
        adapter, (first, second) = make(sharp_network(norm)), coloured_squares(2)
        adapter.adapt_step(first)
        assert adapter.report.updated
        with torch.no_grad():
            head_of(adapter.network).weight.zero_()
            head_of(adapter.network).bias.zero_()
        before = all_of(adapter)
        logits = adapter.adapt_step(second)
        assert are_equal(all_of(adapter), before)
        assert torch.equal(logits, torch.zeros(16, 10, dtype=torch.float64))
        assert (adapter.report.updated, adapter.report.finite) == (False, True)
        assert adapter.report.reason

    def test_at_first_either(self, make, norm):
        network = sharp_network(norm)
        with torch.no_grad():
            head_of(network).weight.zero_()
            head_of(network).bias.zero_()
        adapter = make(network)
        adapter.ready()
        before = all_of(adapter)
        logits = replay(adapter, coloured_squares(2))
        assert are_equal(all_of(adapter), before)
        assert torch.isfinite(logits).all()
        assert not adapter.report.updated
        assert adapter.report.reason


@pytest.mark.parametrize("norm", NORMS)
def test_deyo_counts_draws_that_it_learnt_nothing_from(norm):
    """Of sure images whose prediction does not depend on their shape enough."""
    adapter = DeYO(sharp_network(norm), SGD(lr=0.01, momentum=0.9), plpd_threshold=0.999)
    adapter.ready()
    weights, rule, _ = all_of(adapter)
    replay(adapter, coloured_squares(2))
    assert are_equal(adapter.network.state_dict(), weights)
    assert are_equal(adapter.rule_state, rule)
    assert [int(tensor) for tensor in adapter.memory.values()] == [2]
    assert not adapter.report.updated


def test_the_weights_of_a_learned_rule_are_described():
    rule = MGG()
    assert Tent(make_network("gn"), rule).describe()["rule"]["weights_sha256"] == weights_hash(rule)
    assert "weights_sha256" not in Tent(make_network("gn")).describe()["rule"]


def test_snapshot_holds_only_what_moves():
    adapter = Tent(make_network("gn"))
    adapter.ready()
    held = sum(tensor.numel() for tensor in adapter._source.values())
    assert held == 2 * (8 + 16)


def test_weights_loaded_before_the_first_step_are_the_source():
    adapter = Tent(make_network("gn"), SGD(lr=0.1))
    torch.manual_seed(7)
    weights = {n: torch.randn_like(t) for n, t in adapter.network.state_dict().items()}
    adapter.network.load_state_dict(weights)
    replay(adapter, make_batches())
    adapter.reset()
    assert all(torch.equal(t, weights[n]) for n, t in state_of(adapter).items())


def test_a_network_without_normalisation_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with pytest.raises(InputError, match="Sequential has none"):
        Tent(network).adapt_step(make_batches(1)[0])


def test_features_and_head_give_the_logits():
    network = make_network("gn")
    adapter = Tent(network)
    adapter.ready()
    out = adapter.outputs(make_batches(1)[0])
    rebuilt = out.features @ adapter.head.weight.T + adapter.head.bias
    torch.testing.assert_close(rebuilt, out.logits)
    assert not network[8]._forward_pre_hooks  # nothing stays on the user's module


def test_classes_are_restricted_before_the_entropy():
    images, classes = make_batches(1)[0], [7, 2, 5]
    adapter = Tent(make_network("gn"))
    adapter.restrict_classes(classes)
    full = make_network("gn")(images)
    logits = adapter.adapt_step(images)
    assert torch.equal(logits, full[:, classes])
    p = full[:, classes].softmax(1)
    assert adapter.report.loss.item() == pytest.approx(
        -(p * p.log()).sum(1).mean().item(), rel=1e-6
    )


def test_terms_are_added_to_the_loss():
    def term(out: Outputs, head) -> torch.Tensor:
        return 3.0 * out.features.mean() + head.weight.sum() * 0

    images = make_batches(1)[0]
    with_term, without = Tent(make_network("gn")), Tent(make_network("gn"))
    with_term.terms.append(term)
    with_term.adapt_step(images)
    without.adapt_step(images)
    without.ready()
    source = Tent(make_network("gn"))
    source.ready()
    extra = 3.0 * source.outputs(images).features.mean()
    assert with_term.report.loss.item() == pytest.approx(
        (without.report.loss + extra).item(), rel=1e-5
    )


class Picky(Tent):
    """Learns from every second batch."""

    def __init__(self, network):
        super().__init__(network, SGD(lr=0.1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def loss(self, out, images):
        self.seen += 1
        return super().loss(out, images) if self.seen % 2 else None


def test_none_learns_nothing_and_buffers_are_state():
    adapter = Picky(make_network("gn"))
    batches = make_batches(2)
    adapter.adapt_step(batches[0])
    assert adapter.report.updated
    kept = state_of(adapter)
    adapter.adapt_step(batches[1])
    assert not adapter.report.updated
    assert "nothing" in adapter.report.reason
    assert all(torch.equal(t, kept[n]) for n, t in state_of(adapter).items())
    adapter.reset()
    assert adapter.seen.item() == 0


def test_a_parameter_outside_the_forward_pass_is_left_alone():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = make_network("gn")
            self.idle = nn.LayerNorm(4)

        def forward(self, images):
            return self.used(images)

    adapter = Tent(Unused(), Adam(lr=0.1, weight_decay=0.1))
    adapter.adapt_step(make_batches(1)[0])
    assert torch.equal(adapter.network.idle.weight, torch.ones(4))
    assert not torch.equal(adapter.network.used[1].weight, torch.ones(8))


def test_two_methods_may_share_a_network_one_after_the_other():
    network = make_network("bn")
    expected = Source(make_network("bn")).adapt_step(make_batches(1)[0])
    tent = Tent(network, SGD(lr=0.1))
    first = replay(tent, make_batches())
    other = Source(network)
    with pytest.raises(InputError, match=r"still adapted .*Tent.*reset"):
        other.adapt_step(make_batches(1)[0])
    tent.reset()
    assert torch.equal(other.adapt_step(make_batches(1)[0]), expected)
    assert torch.equal(replay(tent, make_batches()), first)  # its configuration came back


def test_logits_carry_no_graph():
    assert not Tent(make_network("gn")).adapt_step(make_batches(1)[0]).requires_grad


def test_reset_keeps_double_precision():
    network = make_network("gn").double()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    adapter = Tent(network, SGD(lr=0.1))
    adapter.adapt_step(make_batches(1)[0].double())
    adapter.reset()
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


def test_an_infinite_gradient_of_a_finite_loss_moves_nothing():
    class Steep(Tent):
        def loss(self, out, images):
            return (out.logits.sum() * 0).abs().sqrt()  # 0, with an infinite slope

    adapter = Steep(make_network("gn"), SGD(lr=0.1))
    source = state_of(adapter)
    with pytest.warns(UserWarning, match="not finite"):
        adapter.adapt_step(make_batches(1)[0])
    assert torch.isfinite(adapter.report.loss)
    assert all(torch.equal(t, source[n]) for n, t in state_of(adapter).items())


def test_the_state_of_an_adapter_that_has_not_run_can_be_loaded():
    adapter = Tent(make_network("gn"), Adam(lr=0.1))
    adapter.load_state_dict(Tent(make_network("gn"), Adam(lr=0.1)).state_dict())
    adapter.adapt_step(make_batches(1)[0])
    assert adapter.report.updated


def test_a_reset_counts_as_unmoved_in_another_precision():
    network = make_network("gn")
    network[1].weight.data.fill_(1 / 3)  # not a bfloat16 number
    tent = Tent(network, SGD(lr=0.1))
    tent.ready()
    tent.to(torch.bfloat16)
    tent.reset()
    Source(network).ready()  # nobody holds the network any more
    tent.adapt_step(make_batches(1)[0].bfloat16())
    with pytest.raises(InputError, match="still adapted"):
        Source(network).ready()


def test_counters_survive_a_change_of_precision():
    adapter = Tent(make_network("gn"), Adam(lr=1e-3))
    adapter.adapt_step(make_batches(1)[0])
    adapter.to(torch.bfloat16)
    assert adapter.rule_state["step"].dtype == torch.float32
    assert adapter.rule_state["m"]["1.weight"].dtype == torch.bfloat16


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = make_network("gn")

    def forward(self, images):
        return self.network(images), images


class WithoutGradients(Pair):
    @torch.no_grad()
    def forward(self, images):
        return self.network(images)


def made_in_inference_mode():
    with torch.inference_mode():
        return make_network("gn")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Pair, "gave tuple where logits"),
        (WithoutGradients, "does not depend on any parameter"),
        (made_in_inference_mode, "inference_mode"),
    ],
)
def test_networks_that_cannot_be_adapted(make, message):
    with pytest.raises(InputError, match=message):
        Tent(make()).adapt_step(make_batches(1)[0])


def test_more_class_names_than_logits():
    adapter = Tent(make_network("gn"))
    adapter.restrict_classes([3, 12])
    with pytest.raises(InputError, match="10 logits"):
        adapter.adapt_step(make_batches(1)[0])


def test_single_image_statistics_are_warned_of_once():
    adapter = Tent(make_network("bn"))
    with pytest.warns(UserWarning, match="single image") as caught:
        replay(adapter, make_batches(3, size=1))
    assert len(caught) == 1


def test_one_value_a_channel_falls_back_on_source_statistics():
    network = nn.Sequential(nn.Conv2d(3, 4, 32), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    image = make_batches(1, 1)[0]
    expected = copy.deepcopy(network).eval()(image)
    adapter = Tent(network)
    with pytest.warns(UserWarning, match="single image"):
        assert torch.equal(adapter.adapt_step(image), expected)


@pytest.mark.parametrize("verb", ["test_step", "validation_step", "training_step"])
def test_other_verbs_name_adapt(verb):
    with pytest.raises(InputError, match="`tta adapt`"):
        getattr(Tent(make_network("gn")), verb)(None, 0)


def test_base_class_learns_nothing():
    adapter = Adapter(make_network("gn"))
    source = state_of(adapter)
    replay(adapter, make_batches())
    assert all(torch.equal(t, source[n]) for n, t in state_of(adapter).items())


def test_describes_itself():
    described = Tent(make_network("gn"), SGD(lr=0.5, momentum=0.25)).describe()
    assert described["name"] == "Tent"
    assert described["predicts"] == "before update"
    assert described["rule"]["name"] == "SGD"
    assert (described["rule"]["lr"], described["rule"]["momentum"]) == (0.5, 0.25)
    described = BNStats(make_network("bn"), alpha=0.25).describe()
    assert described["hyper_parameters"] == {"alpha": 0.25, "running": False}
    assert described["rule"] is None  # nothing descends


def test_the_state_of_another_method_is_refused():
    state = DeYO(make_network("gn")).state_dict()
    adapter = Tent(make_network("gn"))
    with pytest.raises(InputError, match="state of DeYO, not of Tent"):
        adapter.load_state_dict(state)


def test_the_source_model_moves_along_and_keeps_its_precision():
    network = make_network("gn")
    for layer in norm_layers(network).values():
        layer.weight.data.add_(1 / 3)  # more digits than bfloat16 has
    adapter = Tent(network)
    adapter.ready()
    exact = {name: tensor.clone() for name, tensor in adapter._source.items()}
    adapter.bfloat16()
    assert all(torch.equal(tensor, exact[name]) for name, tensor in adapter._source.items())
    adapter.to("meta")
    assert {tensor.device.type for tensor in adapter._source.values()} == {"meta"}
