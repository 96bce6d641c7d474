"""Validation, checkpoints and wrong input of the pre-training of MGG."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from tests.meta.ddp_worker import Trace
from tests.meta.mgg_reference import Problem, State, distinct, generate, leaves, recipe
from tests.meta.pretraining import (
    INNER_LR,
    AtTheEnd,
    Batches,
    fit,
    labelled,
    make_module,
    make_trainer,
    mgtta,
    shifted,
    stop_after,
)
from tests.networks import make_batches, make_network
from tests.streams import make_source
from tta_lightning.adapter import Adapter
from tta_lightning.data import ShiftedImages
from tta_lightning.errors import InputError
from tta_lightning.meta import MGGPretraining
from tta_lightning.meta.window import Window
from tta_lightning.methods import MGTTA, Tent
from tta_lightning.models import weights_hash
from tta_lightning.rules import MGG, SGD

# Validation ---------------------------------------------------------------------------------------


def held_out():
    """Two segments; the batches differ in size."""
    batches = labelled((3, 2), seed=8)
    return [(x[: 4 - i % 2], y[: 4 - i % 2], s) for i, (x, y, s) in enumerate(batches)]


def by_hand(phi, lr, batches):
    """Mean loss and accuracy before each update, from the source network in every segment."""
    problem = Problem()
    losses, right, count, current = 0.0, 0, 0, None
    for images, labels, segment in batches:
        if segment != current:
            theta, state, current = problem.start.clone().requires_grad_(), State(), segment
        loss = problem.loss(theta, images)
        losses += loss.item() * len(images)
        right += (problem.logits(theta, images).argmax(1) == labels).sum().item()
        count += len(images)
        (g,) = torch.autograd.grad(loss, theta)
        u, state = generate(phi, g, state)
        theta, state = (theta - lr * u).detach().requires_grad_(), state.cut()
    return losses / count, right / count


def test_validation_equals_a_loop_by_hand():
    module, val = make_module(), held_out()
    trainer, trace = fit(module, labelled((5,)), val=val)
    metrics = trainer.callback_metrics
    loss, accuracy = by_hand(leaves(module.rule), 0.02, val)
    assert metrics["val/loss"].item() == pytest.approx(loss, abs=1e-7)
    assert metrics["val/accuracy"].item() == pytest.approx(accuracy, abs=1e-6)
    assert metrics["val/selection"] == metrics["val/loss"]
    others = [
        by_hand(leaves(module.rule), INNER_LR, val),  # the learning rate of the training
        by_hand(leaves(make_module().rule), 0.02, val),  # the rule before it
        by_hand(leaves(module.rule), 0.02, [(x, y, 0) for x, y, _ in val]),  # no segments
    ]
    assert all(abs(other - loss) > 1e-5 for other, _ in others)
    assert not torch.equal(trace.network[-1], Problem().start)


def test_validation_without_training():
    module, val = make_module(), held_out()
    loss, accuracy = by_hand(leaves(module.rule), 0.02, val)
    (figures,) = make_trainer().validate(module, datamodule=Batches([], val), verbose=False)
    assert figures["val/loss"] == pytest.approx(loss, abs=1e-7)
    assert figures["val/accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_validation_without_training_looks_at_clean_images():
    module = mgtta()
    (figures,) = make_trainer().validate(module, datamodule=shifted(), verbose=False)
    assert module.method.source.known
    assert figures["val/loss"] > 0


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"num_sanity_val_steps": 2}])
@pytest.mark.parametrize("unroll", [1, 3])
def test_validation_leaves_the_training_as_it_was(options, unroll):
    batches = labelled((4, 4))
    _, without = fit(make_module("gn", unroll=unroll), batches, epochs=2)
    module, end = make_module("gn", unroll=unroll), AtTheEnd()
    _, given = fit(module, batches, end, val=held_out(), epochs=2, **options)
    for what in ("rule", "network"):
        pairs = zip(getattr(without, what), getattr(given, what), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    moved = [end.network[name] for name in module.method.adapted_parameters]
    assert torch.equal(parameters_to_vector(moved), given.network[-1])


def test_labels_do_not_matter():
    def shuffled(batches):
        return [(x, y.roll(1) + s, s) for x, y, s in batches]

    batches, val = labelled((4, 4)), held_out()
    first, one = fit(make_module(), batches, val=val, epochs=2)
    second, two = fit(make_module(), shuffled(batches), val=shuffled(val), epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(one.rule, two.rule, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.network, two.network, strict=True))
    selections = [trainer.callback_metrics["val/selection"] for trainer in (first, second)]
    assert selections[0] == selections[1]


def test_accuracy_selects_where_asked_and_says_that_it_uses_labels():
    with pytest.warns(UserWarning, match="with the labels of the held-out images"):
        module = make_module(select_by="accuracy")
    val = held_out()
    trainer, _ = fit(module, labelled((4,)), val=val)
    _, accuracy = by_hand(leaves(module.rule), 0.02, val)
    assert 0 < accuracy < 1
    assert trainer.callback_metrics["val/selection"].item() == pytest.approx(-accuracy, abs=1e-6)


def test_accuracy_needs_labels():
    with pytest.warns(UserWarning, match="labels"):
        module = make_module(select_by="accuracy")
    val = [(x, torch.full_like(y, -1), s) for x, y, s in held_out()]
    with pytest.raises(InputError, match="select_by = accuracy needs labels"):
        fit(module, labelled((4,)), val=val)
    trainer, _ = fit(make_module(), labelled((4,)), val=val)
    assert "val/accuracy" not in trainer.callback_metrics
    assert "val/selection" in trainer.callback_metrics


# Checkpoints --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint of two epochs."""
    path = tmp_path_factory.mktemp("pretraining") / "rule.ckpt"
    stop_after(2, mgtta(), path)
    return path


def test_a_checkpoint_holds_the_rule_and_what_moved_but_not_the_network(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    tensors = {n for n, value in content["state_dict"].items() if isinstance(value, Tensor)}
    network = {n for n in tensors if n.startswith("method.network.")}
    assert network == {f"method.network.{n}" for n in ("1.weight", "1.bias", "4.weight", "4.bias")}
    others = {n for n in tensors - network if not n.startswith("method.rule.")}
    assert {n.rpartition(".")[2] for n in others} == {"std", "mean"}
    assert len(others) == 2
    assert content["state_dict"]["method._extra_state"]["rule_state"] == {}


class Interruption(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 2:
            raise OSError("interrupted")


def test_a_training_after_an_interrupted_one_starts_from_the_source_network(tmp_path):
    module, expected = mgtta(), weights_hash(make_network("gn"))
    with pytest.raises(OSError, match="interrupted"):
        make_trainer(Interruption()).fit(module, datamodule=shifted())
    assert weights_hash(module.network) != expected
    stop_after(1, module, tmp_path / "rule.ckpt")
    record = torch.load(tmp_path / "rule.ckpt", weights_only=True)["tta_lightning"]
    assert record["backbone"]["weights_sha256"] == expected


def test_clean_images_get_the_precision_of_the_training():
    module = mgtta()
    make_trainer(precision="64-true").fit(module, datamodule=shifted())
    assert module.method.source.std.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "16-true"}, "does not support precision '16-true'.*Use 32-true"),
        ({"gradient_clip_val": 1.0}, "takes its optimizer steps itself: leave gradient_clip_val"),
        ({"overfit_batches": 2}, "Use limit_train_batches of the trainer"),
        ({"accumulate_grad_batches": 2}, "leave gradient_clip_val and accumulate_grad_batches"),
    ],
)
def test_options_of_the_trainer_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        make_trainer(**options).fit(mgtta(), datamodule=shifted())


def test_a_missing_checkpoint_cannot_be_resumed():
    with pytest.raises(InputError, match=r"There is no checkpoint 'nope.ckpt' to resume"):
        make_trainer().fit(mgtta(), datamodule=shifted(), ckpt_path="nope.ckpt")


def test_a_trained_network_cannot_be_resumed(tmp_path):
    torch.save({"state_dict": {}, "tta_lightning": {"kind": "source"}}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="it is not one of MGGPretraining"):
        mgtta().on_load_checkpoint(torch.load(tmp_path / "a.ckpt"))


def test_batches_of_another_form():
    images = torch.rand(8, 3, 32, 32)
    loader = DataLoader(TensorDataset(images, torch.zeros(8).long()), batch_size=4)
    module = make_module()
    with pytest.raises(
        InputError, match=r"needs batches \(images, labels, number of the segment\)"
    ):
        make_trainer().fit(module, loader, loader)


def test_it_cannot_test():
    with pytest.raises(InputError, match="cannot test: use `tta validate`"):
        make_trainer().test(mgtta(), DataLoader(TensorDataset(torch.rand(2, 3, 32, 32))))


def test_a_window_counts_a_loss_only_where_an_update_decides_it():
    weight = torch.ones((), requires_grad=True)
    window = Window({"m": weight * 2})
    window.score({"a": torch.ones(2)})
    assert window.scored == 0
    window.add("a", weight * torch.tensor([1.0, 2.0]))
    window.add("a", weight * torch.tensor([3.0, 0.0]))
    window.score({"b": torch.ones(2)})
    assert window.scored == 0
    window.score({"a": torch.tensor([10.0, 1.0]), "b": torch.ones(2)})
    assert (window.scored, window.surrogate.item()) == (1, 42.0)
    after = window.cut()
    assert not after.state["m"].requires_grad
    assert (after.scored, after.travelled) == (0, {})
    assert set(after.pending) == {"a", "b"}


def test_the_same_module_can_go_on(tmp_path):
    module, path = mgtta(), tmp_path / "rule.ckpt"
    stop_after(1, module, path)
    stop_after(2, module, resume=path)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("monitor", [None, "val/selection"])
@pytest.mark.parametrize("options", [{}, {"unroll": 3}, {"schedule": "cosine"}])
@pytest.mark.parametrize("method", [MGTTA, Tent])
def test_a_resumed_training_ends_as_one_without_interruption(method, options, monitor, tmp_path):
    def run(folder, resume=None):
        every = ModelCheckpoint(tmp_path / folder, "{epoch}", monitor=monitor, save_top_k=-1)
        trace = Trace()
        trainer = make_trainer(trace, every, epochs=4, enable_checkpointing=True)
        trainer.fit(mgtta(method=method, **options), datamodule=shifted(), ckpt_path=resume)
        return trainer, trace

    uninterrupted, whole = run("first")
    resumed, rest = run("second", resume=tmp_path / "first" / "epoch=1.ckpt")
    half = len(whole.rule) // 2
    assert 4 <= half == len(rest.rule)
    for what in ("rule", "network"):
        pairs = zip(getattr(whole, what)[half:], getattr(rest, what), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    states = [trainer.optimizers[0].state_dict() for trainer in (uninterrupted, resumed)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    for name in ("val/loss", "val/accuracy"):
        assert uninterrupted.callback_metrics[name] == resumed.callback_metrics[name]


def test_a_resumed_training_does_not_look_at_clean_images_again(checkpoint):
    class Blind(ShiftedImages):
        def clean_batches(self):
            raise AssertionError

    data = shifted()
    data.__class__ = Blind
    stop_after(3, mgtta(), resume=checkpoint, data=data)


def test_a_training_after_a_resumed_one_looks_at_its_own_clean_images(checkpoint):
    module = mgtta()
    stop_after(3, module, resume=checkpoint)
    before = module.method.source.mean.clone()
    stop_after(1, module, data=shifted(clean=make_source(9, seed=5)))
    assert not torch.equal(module.method.source.mean, before)


def test_another_network_cannot_resume(checkpoint):
    torch.manual_seed(3)
    other = mgtta()
    with torch.no_grad():
        other.network[0].weight[0, 0, 0, 0] += 1
    with pytest.raises(InputError, match=r"cannot be resumed: its backbone is .* Resume with"):
        stop_after(3, other, resume=checkpoint)


def test_another_form_cannot_resume(checkpoint):
    with pytest.raises(InputError, match=r"its rule is .*published.*, not .*extended"):
        stop_after(3, mgtta("extended"), resume=checkpoint)


def test_the_checkpoint_is_what_mgtta_takes(checkpoint):
    trained = mgtta()
    stop_after(2, trained)
    rule = MGG.from_checkpoint(str(checkpoint))
    for name, parameter in trained.rule.named_parameters():
        assert torch.equal(rule.state_dict()[name], parameter)
    assert rule.lr == 0.02
    adapter = MGTTA(make_network("gn"), rule)
    adapter.prepare(batch for batch in ())  # statistics are known, so none are measured
    images = make_batches(1, size=8)[0]
    own = MGTTA(make_network("gn"), MGG(lr=0.02))
    own.prepare(shifted().clean_batches())
    adapter.adapt_step(images)
    own.adapt_step(images)
    assert adapter.report.loss == own.report.loss


def test_another_network_takes_the_rule_but_not_the_statistics(checkpoint):
    network = make_network("gn")
    nn.init.zeros_(network[-1].bias)
    adapter = MGTTA(network, MGG.from_checkpoint(str(checkpoint)))
    with pytest.warns(UserWarning, match="was trained on"):
        adapter.ready()
    with pytest.raises(InputError, match="clean images"):
        adapter.adapt_step(make_batches(1, size=8)[0])


# What people get wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("unroll", [1, 3])
@pytest.mark.parametrize("bad", [0, 2, 5])
def test_a_batch_that_is_not_finite_is_passed_over(unroll, bad):
    batches = labelled((6,))
    batches[bad][0][0, 0, 0, 0] = float("nan")
    module = make_module(unroll=unroll)
    reference = recipe(Problem(), module.rule, batches, unroll=unroll)
    with pytest.warns(UserWarning, match="not finite; nothing was learnt from it"):
        _, trace = fit(module, batches)
    assert torch.stack(trace.network).isfinite().all()
    if unroll == 1 and bad:
        assert torch.equal(trace.rule[bad], trace.rule[bad - 1])
    ours = distinct(reference.phi[0], trace.rule)
    assert len(ours) >= 2
    torch.testing.assert_close(ours[-1], reference.phi[-1], rtol=0, atol=1e-10)
    theirs = torch.stack(reference.theta)
    torch.testing.assert_close(torch.stack(trace.network), theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": SGD()}, "has the rule SGD, which has nothing to learn. Give it MGG()"),
        ({"unroll": 0}, "unroll = 0 is out of range: expected a whole number from 1 on"),
        ({"unroll": 1.5}, "unroll = 1.5 is out of range"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'?"),
        ({"select_by": "acuracy"}, "Did you mean 'accuracy'?"),
        ({"lr": 0.0}, "lr = 0.0 is out of range: expected a number above 0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"inner_lr": 0.0}, "inner_lr = 0.0 is out of range"),
        ({"clip": -1.0}, "clip = -1.0 is out of range"),
    ],
)
def test_arguments_that_are_not_possible(options, message):
    with pytest.raises(InputError) as error:
        make_module(**options)
    assert message in str(error.value)


def test_the_cosine_needs_an_end():
    with pytest.raises(InputError, match="set the trainer's max_epochs"):
        fit(make_module(schedule="cosine"), labelled((2,)), epochs=-1)


def test_a_method_without_a_loss_is_refused():
    module = MGGPretraining(Adapter(make_network("gn"), MGG()))
    with pytest.raises(InputError, match="Adapter has no loss for a batch"):
        fit(module, labelled((2,), dtype=torch.float32))


def test_a_method_without_a_loss_is_refused_in_validation_too():
    module = MGGPretraining(Adapter(make_network("gn"), MGG()))
    batches = labelled((2,), dtype=torch.float32)
    with pytest.raises(InputError, match="Adapter has no loss for a batch"):
        make_trainer(num_sanity_val_steps=1).fit(module, datamodule=Batches(batches, batches))


def test_a_method_that_wants_clean_images_needs_a_source_of_them():
    module = MGGPretraining(MGTTA(make_network("gn"), MGG()))
    with pytest.raises(InputError, match="MGTTA looks at clean images first"):
        fit(module, labelled((2,), dtype=torch.float32))
