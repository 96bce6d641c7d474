import copy
import io
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.networks import are_equal, head_of, make_batches, make_network
from tta_lightning import InputError
from tta_lightning.methods import MEMO, T3A, BNStats, CoTTA, RoTTA, Source, Tent
from tta_lightning.rules import SGD
from tta_lightning.serving import OnlineClassifier, ServingStatistics
from tta_lightning.snapshots import capture, restore

CLIENTS, REQUESTS = 8, 50
QUIET = pytest.mark.filterwarnings("ignore:A batch gave a loss")


def make_adapter(lr=0.01, norm="gn", method=Tent) -> Tent:
    return method(make_network(norm), SGD(lr=lr, momentum=0.9))


def serve_from_many_threads(ask):
    """Call ``ask(request)`` for each of 400 requests, from 8 threads; results in their order."""
    requests = make_batches(CLIENTS * REQUESTS, size=2)
    with ThreadPoolExecutor(CLIENTS) as pool:
        return requests, list(pool.map(ask, requests))


class Recorder:
    """A guard that never acts, and remembers what each step led to."""

    def __init__(self, alarms=()):
        self.seen, self.states, self.alarms, self.resets = [], [], list(alarms), 0

    def after_update(self, adapter, images, logits):
        self.seen.append((images.clone(), logits.clone()))
        self.states.append(capture(adapter))
        return self.alarms.pop(0) if self.alarms else None

    def note_reset(self):
        self.resets += 1


class NaNLoss(Tent):
    def loss(self, out, images):
        return super().loss(out, images) * torch.nan


class HalfWay(SGD):
    """Moves a parameter, then fails."""

    def update(self, grads, state, params):
        next(iter(params.values())).data.add_(1)
        raise ArithmeticError("half way")


class ToInfinity(Tent):
    """Learns, and leaves a weight that is not finite."""

    def adapt_step(self, images):
        logits = super().adapt_step(images)
        with torch.no_grad():
            next(iter(self.adapted_parameters.values()))[0] = torch.inf
        return logits


class Gated(Tent):
    """A step begins when the gate is open; whoever opens it knows that one is under way."""

    gate = threading.Event()
    begun = threading.Event()

    def adapt_step(self, images):
        self.begun.set()
        assert self.gate.wait(10)
        return super().adapt_step(images)


@pytest.fixture
def gated():
    Gated.gate.clear()
    Gated.begun.clear()
    yield make_adapter(method=Gated)
    Gated.gate.set()


# Many threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", ["inline", "background"])
def test_with_adaptation_off_each_thread_gets_the_answer_of_a_single_one(updates):
    alone = make_adapter()
    with OnlineClassifier(make_adapter(), updates) as classifier:
        classifier.adapting = False
        requests, answers = serve_from_many_threads(classifier.predict)
        statistics = classifier.statistics
    for images, answer in zip(requests, answers, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(answer, alone(images).softmax(1), atol=1e-6, rtol=0)
    assert statistics == ServingStatistics(images=800, predictions=400)


def test_inline_each_answer_is_of_the_version_that_it_names():
    guard = Recorder()
    classifier = OnlineClassifier(make_adapter(), guard=guard)
    replay = make_adapter()
    states = [capture(replay)]
    requests, answers = serve_from_many_threads(classifier.answer)
    states += guard.states
    assert sorted(answer.version for answer in answers) == list(range(400))
    for images, answer in zip(requests, answers, strict=True):
        restore(replay, states[answer.version])
        with torch.no_grad():
            expected = replay(images).softmax(1)
        torch.testing.assert_close(answer.probabilities, expected, atol=1e-6, rtol=0)
    assert classifier.statistics == ServingStatistics(800, 400, updates=400, version=400)


def test_reset_and_the_like_may_come_at_any_time():
    adapter = make_adapter()
    source = capture(adapter)
    with OnlineClassifier(adapter, "background", update_size=3) as classifier:
        stop = threading.Event()

        def disturb():
            while not stop.is_set():
                classifier.snapshot()
                classifier.rollback()
                classifier.reset()
                classifier.adapting = not classifier.adapting
                classifier.load_state_dict(classifier.state_dict())

        other = threading.Thread(target=disturb)
        other.start()
        _, answers = serve_from_many_threads(classifier.predict)
        stop.set()
        other.join(10)
        assert all(torch.allclose(answer.sum(1), torch.ones(2)) for answer in answers)
        assert classifier.statistics.failed_updates == 0
        classifier.reset()
        assert classifier.flush(10)
        assert are_equal(capture(adapter), source)
        assert are_equal(classifier.state_dict()["adapter"], source)


# Learning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Source, BNStats, Tent, CoTTA, RoTTA, T3A, MEMO])
def test_inline_is_adapt_step(method):
    bare = method(make_network("bn"))
    classifier = OnlineClassifier(method(make_network("bn")))
    for images in make_batches(3, size=4):
        expected = bare.adapt_step(images).softmax(1)
        torch.testing.assert_close(classifier.predict(images), expected, atol=1e-6, rtol=0)
    assert are_equal(classifier.state_dict()["adapter"], capture(bare))
    assert classifier.statistics.failed_updates == 0


def test_a_method_that_predicts_after_its_update_names_the_version_after_it():
    classifier = OnlineClassifier(T3A(make_network("gn")))
    versions = [classifier.answer(images).version for images in make_batches(3, size=4)]
    assert versions == [1, 2, 3]


@pytest.mark.parametrize("updates", ["inline", "background"])
@pytest.mark.parametrize("size", [6, 2])
def test_chunks_of_gathered_images_are_learnt_from_as_in_a_bare_loop(updates, size):
    requests, bare = make_batches(10, size=4), make_adapter()
    source = capture(bare)
    adapter = make_adapter()
    with OnlineClassifier(adapter, updates, update_size=size, queue_size=100) as classifier:
        for number, images in enumerate(requests):
            classifier.predict(images)
            images.fill_(0.5)  # the caller's to use again
            requests[number] = make_batches(10, size=4)[number]
        assert classifier.flush(10)
        for chunk in torch.cat(requests).split(size):
            if len(chunk) == size:
                bare.adapt_step(chunk)
        assert are_equal(capture(adapter), capture(bare))  # what predicts
        assert are_equal(classifier.state_dict()["adapter"], capture(bare))  # what learns
        assert not are_equal(capture(bare), source)
        assert classifier.statistics.updates == 40 // size


def test_background_requests_are_updates_where_no_size_is_given():
    requests, bare = make_batches(5, size=4), make_adapter()
    with OnlineClassifier(make_adapter(), "background") as classifier:
        for images in requests:
            classifier.predict(images)
            classifier.flush()
            bare.adapt_step(images)
        assert are_equal(classifier.snapshot(), capture(bare))
        assert classifier.answer(requests[0]).version == 5


def test_the_background_goes_on_from_where_the_adapter_stands():
    first, second = make_batches(2, size=4)
    bare, adapter = make_adapter(), make_adapter()
    for each in (bare, adapter):
        each.adapt_step(first)
    with OnlineClassifier(adapter, "background") as classifier:
        classifier.predict(second)
        assert classifier.flush(10)
        bare.adapt_step(second)
        assert are_equal(capture(adapter), capture(bare))
        classifier.reset()
        bare.reset()
        assert are_equal(capture(adapter), capture(bare))


def test_images_of_several_sizes_are_gathered_apart():
    guard = Recorder()
    classifier = OnlineClassifier(make_adapter(), update_size=2, guard=guard)
    for side in (16, 24, 16, 24):
        classifier.predict(torch.rand(1, 3, side, side))
    assert [list(images.shape) for images, _ in guard.seen] == [[2, 3, 16, 16], [2, 3, 24, 24]]
    for side in range(16, 26):  # ten sizes, of which eight are held
        classifier.predict(torch.rand(1, 3, side, side))
    assert classifier.statistics.dropped_images == 2


def test_the_queue_is_bounded_and_predictions_do_not_wait_for_it(gated):
    with OnlineClassifier(gated, "background", queue_size=2) as classifier:
        first, *others = make_batches(6, size=4)
        classifier.predict(first)
        assert Gated.begun.wait(10)  # one under way, places for two
        start = time.perf_counter()
        for images in others:
            classifier.predict(images)
        assert time.perf_counter() - start < 5  # the step waits for 10
        assert classifier.statistics.dropped_images == 3 * 4
        assert not classifier.flush(0.01)
        Gated.gate.set()
        assert classifier.flush(10)
        assert classifier.statistics.updates == 3
        bare = make_adapter()
        for images in (first, *others[:2]):  # the newest were dropped
            bare.adapt_step(images)
        moved = classifier.state_dict()["adapter"]
        assert all(torch.equal(moved[name], t) for name, t in bare.moving_tensors().items())


def test_after_a_reset_nothing_older_is_learnt(gated):
    source = capture(gated)
    with OnlineClassifier(gated, "background", queue_size=8) as classifier:
        for images in make_batches(5, size=4):
            classifier.predict(images)
        assert Gated.begun.wait(10)
        other = threading.Thread(target=classifier.reset)
        other.start()
        Gated.gate.set()
        other.join(10)
        assert classifier.flush(10)
        assert are_equal(classifier.snapshot(), source)
        assert are_equal(capture(gated), source)
        statistics = classifier.statistics
        assert statistics.updates * 4 + statistics.dropped_images == 20


@pytest.mark.parametrize("updates", ["inline", "background"])
def test_adaptation_can_be_switched_off_and_on(updates):
    images, adapter = make_batches(1, size=4)[0], make_adapter()
    with OnlineClassifier(adapter, updates) as classifier:
        assert classifier.adapting
        classifier.adapting = False
        before = capture(adapter)
        classifier.predict(images)
        assert classifier.flush(10)
        assert are_equal(classifier.snapshot(), before)
        classifier.adapting = True
        classifier.predict(images)
        assert classifier.flush(10)
        assert not are_equal(classifier.snapshot(), before)


def test_switching_off_drops_what_was_gathered():
    classifier = OnlineClassifier(make_adapter(), update_size=5)
    classifier.predict(make_batches(1, size=4)[0])
    classifier.adapting = False
    classifier.adapting = True
    classifier.predict(make_batches(1, size=4)[0])
    assert classifier.statistics == ServingStatistics(8, 2, dropped_images=4)


# Failures ---------------------------------------------------------------------------------------

FAILURES = {
    "raises half way": (Tent, HalfWay, "failed_updates"),
    "infinite weight": (ToInfinity, SGD, "failed_updates"),
    "NaN loss": (NaNLoss, SGD, "skipped_updates"),
}


@QUIET
@pytest.mark.parametrize("updates", ["inline", "background"])
@pytest.mark.parametrize("name", FAILURES)
def test_an_update_that_fails_fails_no_prediction_and_leaves_no_trace(updates, name, caplog):
    method, rule, counter = FAILURES[name]
    adapter = method(make_network("gn"), rule(lr=0.01, momentum=0.9))
    alone, before = make_adapter(), capture(adapter)
    with OnlineClassifier(adapter, updates) as classifier:
        for images in make_batches(4, size=4):
            with torch.no_grad():
                expected = alone(images).softmax(1)
            torch.testing.assert_close(classifier.predict(images), expected, atol=1e-6, rtol=0)
        assert classifier.flush(10)
        assert are_equal(capture(adapter), before)
        assert are_equal(classifier.snapshot(), before)
        statistics = classifier.statistics
    assert getattr(statistics, counter) == 4
    assert statistics.updates == statistics.version == 0
    traces = [bool(record.exc_info) for record in caplog.records]
    assert traces == ([True, False, False, False] if counter == "failed_updates" else [])


def test_a_guard_that_fails_undoes_the_update(caplog):
    class Broken:
        def after_update(self, adapter, images, logits):
            raise ValueError("out of order")

    adapter = make_adapter()
    before = capture(adapter)
    classifier = OnlineClassifier(adapter, guard=Broken())
    assert classifier.predict(make_batches(1, size=4)[0]).shape == (4, 10)
    assert are_equal(capture(adapter), before)
    assert classifier.statistics.failed_updates == 1
    assert "out of order" in caplog.text


def test_an_interrupted_update_is_undone():
    class Interrupted(SGD):
        def update(self, grads, state, params):
            next(iter(params.values())).data.add_(1)
            raise KeyboardInterrupt

    adapter = Tent(make_network("gn"), Interrupted(lr=0.01))
    before = capture(adapter)
    with pytest.raises(KeyboardInterrupt):
        OnlineClassifier(adapter).predict(make_batches(1)[0])
    assert are_equal(capture(adapter), before)


def test_a_network_that_fails_is_the_callers_to_know():
    network = make_network("gn")
    classifier = OnlineClassifier(Tent(network))
    head_of(network).weight.data = torch.zeros(10, 7)
    with pytest.raises(RuntimeError, match="shapes"):
        classifier.predict(make_batches(1)[0])
    assert classifier.statistics.predictions == 0


@QUIET
def test_a_network_that_gives_nan_is_answered_with_nan():
    network = make_network("gn")
    head_of(network).bias.data[:] = torch.nan
    classifier = OnlineClassifier(Tent(network))
    before = capture(classifier._adapter)
    assert classifier.predict(make_batches(1, size=4)[0]).isnan().all()
    for name, tensor in classifier._adapter.moving_tensors().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([[0.5]], "list"),
        (torch.rand(3, 32, 32), r"images\[None\]"),
        (torch.rand(0, 3, 32, 32), r"shape \[0, 3"),
        (torch.rand(2, 1, 32, 32), r"shape \[2, 1"),
        (torch.rand(2, 3, 32, 0), "one image or more"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "float.. / 255"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.complex64), "complex64"),
        (torch.empty(2, 3, 32, 32, device="meta"), "float32"),
        (torch.full((2, 3, 32, 32), torch.nan), "nan"),
        (torch.full((2, 3, 32, 32), torch.inf), "inf"),
        (torch.full((2, 3, 32, 32), -0.01), "-0.01"),
        (torch.full((2, 3, 32, 32), 255.0), "255"),
    ],
)
def test_what_is_no_image_is_refused_and_changes_nothing(images, message):
    classifier = OnlineClassifier(make_adapter())
    before = classifier.state_dict()
    with pytest.raises(InputError, match=message):
        classifier.predict(images)
    assert are_equal(classifier.state_dict(), before)


def test_arguments_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="Did you mean 'inline'"):
        OnlineClassifier(make_adapter(), "inlien")
    with pytest.raises(InputError, match="update_size = 0"):
        OnlineClassifier(make_adapter(), update_size=0)
    with pytest.raises(InputError, match="queue_size = 0"):
        OnlineClassifier(make_adapter(), queue_size=0)
    for options in ({"updates": "background"}, {"update_size": 8}):
        with pytest.raises(InputError, match="MEMO learns from the image that it predicts"):
            OnlineClassifier(MEMO(make_network("gn")), **options)


# Going back, and on -----------------------------------------------------------------------------


@pytest.mark.parametrize("updates", ["inline", "background"])
def test_snapshot_rollback_and_reset_are_exact(updates):
    requests, adapter = make_batches(6, size=4), make_adapter()
    source = capture(adapter)

    def learn(batches):
        for images in batches:
            classifier.predict(images)
            assert classifier.flush(10)

    def check(expected):
        assert are_equal(capture(adapter), expected)
        assert are_equal(classifier.state_dict()["adapter"], expected)

    with OnlineClassifier(adapter, updates) as classifier:
        learn(requests[:2])
        classifier.rollback()  # no snapshot: to the source
        check(source)
        learn(requests[:2])
        early = classifier.snapshot()
        learn(requests[2:4])
        late = classifier.snapshot()
        assert not are_equal(early, late)
        learn(requests[4:])
        classifier.rollback(early)
        check(early)
        early_answer = classifier.predict(requests[5])
        classifier.rollback()  # to the last one
        check(late)
        classifier.rollback(early)
        assert torch.equal(classifier.predict(requests[5]), early_answer)
        classifier.reset()
        check(source)
        with pytest.raises(InputError, match="does not belong to Tent"):
            classifier.rollback({"network.head": torch.zeros(3)})
        check(source)


@pytest.mark.parametrize("updates", ["inline", "background"])
def test_the_state_survives_a_file_and_goes_on_alike(updates):
    requests = make_batches(6, size=4)
    first = OnlineClassifier(make_adapter())
    for images in requests[:2]:
        first.predict(images)
    first.snapshot()
    first.predict(requests[2])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with OnlineClassifier(make_adapter(), updates) as second:
        second.load_state_dict(state)
        assert are_equal(second.state_dict(), first.state_dict())
        assert second.statistics.version == 3
        for images in requests[3:]:
            answers = [first.answer(images), second.answer(images)]
            assert second.flush(10)
            assert torch.equal(answers[0].probabilities, answers[1].probabilities)
            assert answers[0].version == answers[1].version
        first.rollback()
        second.rollback()
        assert are_equal(second.state_dict(), first.state_dict())


def test_a_version_never_stands_for_two_models():
    classifier = OnlineClassifier(make_adapter())
    images = make_batches(1, size=4)[0]
    state = classifier.state_dict()
    assert classifier.answer(images).version == 0
    assert classifier.answer(images).version == 1
    classifier.load_state_dict(state)
    assert classifier.answer(images).version == 3


@pytest.mark.parametrize("state", [None, [], {}, {"format": 1, "statistics": {}}])
def test_the_state_of_something_else_is_refused(state):
    with pytest.raises(InputError, match="not the state of an OnlineClassifier"):
        OnlineClassifier(make_adapter()).load_state_dict(state)


def test_the_state_of_another_method_is_refused():
    classifier = OnlineClassifier(make_adapter())
    before = classifier.state_dict()
    with pytest.raises(InputError):
        classifier.load_state_dict(OnlineClassifier(T3A(make_network("gn"))).state_dict())
    assert are_equal(classifier.state_dict(), before)


# The guard, the end, and the rest ---------------------------------------------------------------


@pytest.mark.parametrize("updates", ["inline", "background"])
def test_the_guard_sees_each_step_and_its_alarms_are_counted(updates, caplog):
    guard = Recorder(alarms=[None, "far from home"])
    requests = make_batches(3, size=4)
    with OnlineClassifier(make_adapter(), updates, guard=guard) as classifier:
        bare = make_adapter()
        for images in requests:
            classifier.predict(images)
            assert classifier.flush(10)
        for images, (seen, logits) in zip(requests, guard.seen, strict=True):
            assert torch.equal(seen, images)
            assert torch.equal(logits, bare.adapt_step(images))
        classifier.reset()
        assert guard.resets == 1
        assert classifier.statistics.alarms == 1
        assert classifier.statistics.version == 3 + 1 + 1
    assert [record.message for record in caplog.records] == [
        "The guard raised an alarm: far from home"
    ]


def test_what_the_guard_does_reaches_the_model_that_predicts():
    class Resetting(Recorder):
        def after_update(self, adapter, images, logits):
            adapter.reset()
            return "reset"

    adapter = make_adapter()
    source = capture(adapter)
    with OnlineClassifier(adapter, "background", guard=Resetting()) as classifier:
        classifier.predict(make_batches(1, size=4)[0])
        assert classifier.flush(10)
        assert are_equal(capture(adapter), source)


@pytest.mark.parametrize("updates", ["inline", "background"])
def test_a_closed_classifier_predicts_no_more(updates):
    threads = threading.active_count()
    classifier = OnlineClassifier(make_adapter(), updates)
    classifier.predict(make_batches(1, size=4)[0])
    classifier.close()
    classifier.close()
    assert threading.active_count() == threads
    before = classifier.statistics
    with pytest.raises(InputError, match="closed"):
        classifier.predict(make_batches(1, size=4)[0])
    assert classifier.statistics == before


def test_probabilities_have_no_graph_and_the_callers_mode_does_not_matter():
    images = make_batches(1, size=4)[0]
    expected = OnlineClassifier(make_adapter()).predict(images)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        classifier = OnlineClassifier(make_adapter())
        with mode():
            answer = classifier.predict(images.double().requires_grad_())
            classifier.snapshot()
            classifier.rollback()
        classifier.predict(images)
        classifier.load_state_dict(classifier.state_dict())
        assert classifier.statistics.failed_updates == 0
        assert answer.dtype == torch.float32
        assert not answer.requires_grad
        assert torch.equal(answer, expected)


def test_logging_is_quiet_when_all_is_well(caplog):
    caplog.set_level(logging.DEBUG)
    with OnlineClassifier(copy.deepcopy(make_adapter()), "background") as classifier:
        classifier.predict(make_batches(1)[0])
        classifier.flush(10)
    assert not caplog.records


@QUIET
def test_a_method_that_ends_the_program_ends_no_learning_without_a_word():
    """A thread that dies of it would leave a queue that nobody empties."""

    class Exits(Tent):
        exits = True

        def loss(self, out, images):
            if self.exits:
                type(self).exits = False
                raise SystemExit
            return super().loss(out, images)

    with OnlineClassifier(make_adapter(method=Exits), "background") as classifier:
        for images in make_batches(2):
            classifier.predict(images)
            assert classifier.flush(20)
        assert classifier.statistics.failed_updates == 1
        assert classifier.statistics.updates == 1
