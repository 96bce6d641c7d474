"""Plans and scenarios of any kind: a stream or a sentence."""

import json
import math
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.profiles import assert_whole, examples, refusal
from tests.networks import make_network
from tta_lightning.data import ArraySource, Plan, Stream
from tta_lightning.data.scenarios import SCENARIOS
from tta_lightning.methods import Source, Tent
from tta_lightning.trainer import Trainer

IMAGES = 6
ODD_NUMBERS = st.sampled_from([0, -1, 1.5, 2**31, 2**63, -(2**70), 10**400, math.nan, math.inf])
NAMES = st.text(max_size=8) | st.sampled_from(["$\\frac$", "a\nb", "\0", "a,\"b'", "_x"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | ODD_NUMBERS
    | NAMES
    | st.just("\ud800")
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
DOMAINS = st.sampled_from([["none", 0], ["contrast", 3], ["gaussian_noise", 5], ["fog", 1]]).map(
    list
)


@st.composite
def plans(draw):
    """The fields of a plan that is right."""
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    stops = np.cumsum(lengths).tolist()
    domains = draw(st.lists(DOMAINS, min_size=1, max_size=3))
    number = st.integers(0, len(domains) - 1)
    fields = {
        "scenario": draw(NAMES),
        "samples": draw(_as_long(st.integers(0, IMAGES - 1), stops[-1])),
        "domain_ids": draw(_as_long(number, stops[-1])),
        "domains": domains,
        "segments": [
            [draw(NAMES), stop - length, stop, draw(st.booleans())]
            for length, stop in zip(lengths, stops, strict=True)
        ],
    }
    sizes = st.integers(1, 4) | st.just(10**30)
    setting = draw(st.sampled_from(["none", "batch", "window", "reset"]))
    if setting == "batch":
        fields["batch_size"] = draw(sizes)
    elif setting == "window":
        fields |= {"batch_size": 1, "window": draw(sizes)}
    elif setting == "reset":
        fields["reset_each_batch"] = True
    return fields


def _as_long(values, length):
    return st.lists(values, min_size=length, max_size=length)


@st.composite
def wrong_plans(draw):
    """A plan with one or two places changed into something else."""
    fields = draw(plans())
    for _ in range(draw(st.integers(1, 2))):
        _change(draw, fields)
    return fields


def _change(draw, fields):
    """Replace or remove something in nested lists and dicts, at any depth."""
    keys = list(fields) if isinstance(fields, dict) else list(range(len(fields)))
    if not keys:
        return
    key = draw(st.sampled_from(keys))
    if isinstance(fields[key], list) and draw(st.booleans()):
        _change(draw, fields[key])
    elif draw(st.booleans()):
        fields[key] = draw(JUNK)
    else:
        del fields[key]


def made_of(samples, segments, **others):
    ids = [0] * len(samples)
    fields = {"scenario": "s", "samples": samples, "domain_ids": ids, "domains": [["none", 0]]}
    return {**fields, "segments": segments, **others}


@examples()
@given(plans() | wrong_plans() | JUNK)
@example(made_of([0, 1, 2], [["a", 0, 3, False], ["b", 3, 1, False], ["c", 1, 3, False]]))
@example(made_of([2**63], [["a", 0, 1, False]]))
@example(made_of([0], [["\ud800", 0, 1, False]]))
@example(made_of([0], [["a", 0, math.inf, False]]))
@example({**made_of([[0], [1]], [["a", 0, 2, False]]), "domain_ids": [[0], [0]]})
def test_values_are_a_plan_or_a_sentence(values):
    found = []
    if refusal(lambda: found.append(Plan.from_dict(values))) is not None:
        return
    (plan,) = found
    assert all(segment.name.encode() for segment in plan.segments if segment.name)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).digest == plan.digest
    for size in (1, 3):  # each position is served once, within its segment
        batches = list(plan.batches(size))
        assert [position for batch in batches for position in batch] == list(range(len(plan)))
        for batch in batches:
            segment = plan.segments[plan.segment_at(batch[0])]
            assert segment.start <= batch[0] <= batch[-1] < segment.stop


@st.composite
def plan_files(draw):
    """Bytes that are nearly the file of a plan."""
    text = json.dumps(draw(plans() | wrong_plans()))
    data = text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"])))
    place = draw(st.integers(0, len(data)))
    more = st.sampled_from([b"", b"\xff", b"\0", b'"samples": [0],', b"[" * 100_000, b"9" * 5_000])
    match draw(st.sampled_from(["cut", "insert", "front", "keep"])):
        case "cut":
            return data[:place]
        case "insert":
            return data[:place] + draw(more) + data[place:]
        case "front":
            return draw(more) + data
    return data


@examples()
@given(plan_files() | st.binary(max_size=40))
@example(b"[" * 100_000)
@example(b"9" * 5_000)
def test_a_file_is_a_plan_or_a_sentence(data):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "plan.json")
        file.write_bytes(data)
        refusal(lambda: Plan.load(file))


@pytest.mark.parametrize("path", [".", "no/such", "a\0b", "x" * 300, "~", ""])
def test_a_path_that_leads_to_no_plan(path):
    assert refusal(lambda: Plan.load(path)) is not None


@st.composite
def sources(draw):
    """Six images: of one class, of some, of none, or partly without labels; some are small."""
    side = draw(st.sampled_from([32, 32, 32, 28, 20, 1]))
    kind = draw(st.sampled_from(["one", "some", "unknown", "partly"]))
    low, high = {"one": (3, 3), "some": (0, 9), "unknown": (-1, -1), "partly": (-1, 9)}[kind]
    labels = draw(_as_long(st.integers(low, high), IMAGES))
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, side, side, 3), np.uint8)
    classes = draw(st.sampled_from([None, tuple("abcdefghij")]))
    return ArraySource(pixels, labels, classes)


NUMBERS = st.integers(-2, 30) | st.floats() | ODD_NUMBERS
INTEGERS = st.integers(1, 9) | st.integers() | st.sampled_from([0, 2**63, 10**30])
STREAMS = st.fixed_dictionaries(
    {"source": sources(), "scenario": st.sampled_from([*SCENARIOS, "other"])},
    optional={
        "scenario_options": st.dictionaries(
            st.sampled_from(["imbalance_ratio", "delta", "rounds", "window", "other"]),
            NUMBERS,
            max_size=2,
        ),
        "corruptions": st.none()
        | st.lists(st.sampled_from(["contrast", "fog", "none", "snwo"]), max_size=2),
        "severity": st.integers(1, 5) | INTEGERS,
        "batch_size": INTEGERS,
        "limit": INTEGERS,
        "seed": INTEGERS,
        "subset": st.sampled_from(["sample", "first"]),
        "table": st.sampled_from(["imagenet", "cifar", "other"]),
        "image_size": st.sampled_from(["keep", "model", 32, 0, -3, 8, 10**6, 10**20]),
        "crop_pct": st.none() | st.floats(),
        "num_workers": st.sampled_from([0, 0, -1, 10**9]),
    },
)


def serve(given):
    """Serve a stream; return how often each position came, and how many positions there are."""
    stream = Stream(**given)
    batches = list(stream.test_dataloader()) if len(stream.plan) < 2_000 else []
    served = Counter(p for batch in batches for p in batch.positions.tolist())
    served.update(position for batch in batches for position, _ in batch.bad)
    assert not batches or served == Counter(range(len(stream.plan)))


def source_of(side):
    return ArraySource(np.zeros((IMAGES, side, side, 3), np.uint8), [0] * IMAGES)


def stream_of(scenario="continual", side=32, **options):
    return {"source": source_of(side), "scenario": scenario, **options}


@examples(0.5)
@given(STREAMS)
@example(stream_of(seed=-1))
@example(stream_of("recurring", scenario_options={"rounds": 2**63}))
@example(stream_of("recurring", scenario_options={"rounds": 10**400}))
@example(stream_of("correlated", scenario_options={"delta": 5e-324}))
@example(stream_of("label_shift", scenario_options={"imbalance_ratio": 10**400}))
@example(stream_of(num_workers=-1))
@example(stream_of(num_workers=10**9))
@example(stream_of(image_size=16, crop_pct=1e-6))
@example(stream_of(image_size=16, crop_pct=5e-324))
@example(stream_of(image_size=10**6))
def test_a_scenario_gives_a_stream_or_a_sentence(given):
    refusal(lambda: serve(given))


@examples(0.15)
@given(plans(), st.sampled_from([Tent, Source]))
@example(made_of([0], [["$\\frac$", 0, 1, False]]), Tent)
@example(made_of([0, 1], [["a", 0, 2, False]], batch_size=1, window=10**30), Tent)
def test_a_plan_is_adapted_to(fields, method):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "plan.json").write_text(json.dumps(fields))
        run = Path(folder, "run")

        def adapt():
            stream = Stream(source_of(32), plan=str(Path(folder, "plan.json")), batch_size=3)
            trainer = Trainer(accelerator="cpu", enable_progress_bar=False, run_dir=run)
            trainer.adapt(method(make_network("gn")), datamodule=stream)

        refused = refusal(adapt)
        assert_whole(run)
        assert run.exists() == (refused is None) == bool(fields["samples"])
