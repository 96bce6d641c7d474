"""The plan of a stream: which image comes when, under which corruption."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_lightning.errors import InputError


@dataclass(frozen=True)
class Domain:
    """A corruption at a severity; ``Domain("none", 0)`` is the image as it is."""

    corruption: str
    severity: int

    def __str__(self) -> str:
        return self.corruption if self.severity == 0 else f"{self.corruption}-{self.severity}"


@dataclass(frozen=True)
class Segment:
    """A stretch of the stream that batches do not cross.

    Attributes:
        name: What it is called in tables, e.g. ``"fog-5"``.
        start: Position of its first sample.
        stop: Position after its last sample.
        reset: Whether the model returns to the source before it.
    """

    name: str
    start: int
    stop: int
    reset: bool


@dataclass(frozen=True)
class Plan:
    """An ordered list of samples; the same plan gives the same stream.

    Attributes:
        scenario: The scenario it was made by.
        samples: Index of each sample in its source, ``[N]`` int64.
        domain_ids: Position of each sample's domain in ``domains``, ``[N]`` int64.
        domains: The domains that occur.
        segments: Consecutive and covering; see :class:`Segment`.
        batch_size: Images a batch, where that is part of the setting; None leaves it to the stream.
        window: Images come one by one, each is predicted together with the last ones before it,
            this many in all, and the model learns once every so many; None for whole batches.
        reset_each_batch: Whether the model returns to the source before every batch.
    """

    scenario: str
    samples: NDArray[np.int64]
    domain_ids: NDArray[np.int64]
    domains: tuple[Domain, ...]
    segments: tuple[Segment, ...]
    batch_size: int | None = None
    window: int | None = None
    reset_each_batch: bool = False

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.domain_ids):
            raise InputError(
                f"A plan needs one domain a sample, got {len(self.samples)} samples and "
                f"{len(self.domain_ids)} domains."
            )
        if len(self) and (self.samples.min() < 0 or self.domain_ids.min() < 0):
            raise InputError("A plan holds a negative index. Expected indices from 0 on.")
        if len(self) and self.domain_ids.max() >= len(self.domains):
            raise InputError(
                f"A plan refers to domain {self.domain_ids.max()} of {len(self.domains)}."
            )
        edges = [0, *(segment.stop for segment in self.segments)]
        starts = [segment.start for segment in self.segments]
        if starts != edges[:-1] or edges != sorted(edges) or edges[-1] != len(self.samples):
            raise InputError("The segments of a plan must follow each other and cover all samples.")
        self._check_settings()

    def _check_settings(self) -> None:
        for name, value in (("batch_size", self.batch_size), ("window", self.window)):
            if value is not None and value < 1:
                raise InputError(f"A plan has {name} = {value}. Expected 1 or more, or none.")
        if self.window is not None and (self.batch_size != 1 or self.reset_each_batch):
            raise InputError(
                "A plan with a window serves its images one by one and keeps what was learnt: "
                "expected batch_size = 1 and no reset before every batch."
            )

    def __len__(self) -> int:
        return len(self.samples)

    def domain(self, position: int) -> Domain:
        """Return the domain of the sample at a position of the stream."""
        return self.domains[int(self.domain_ids[position])]

    def segment_at(self, position: int) -> int:
        """Return the number of the segment that holds a position of the stream."""
        stops = [segment.stop for segment in self.segments]
        return int(np.searchsorted(stops, position, side="right"))

    def batches(self, batch_size: int) -> Iterator[range]:
        """Yield the positions of each batch; the last one of a segment may be short."""
        for segment in self.segments:
            for start in range(segment.start, segment.stop, batch_size):
                yield range(start, min(start + batch_size, segment.stop))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values; settings that are not set are left out."""
        settings = {
            "batch_size": self.batch_size,
            "window": self.window,
            "reset_each_batch": self.reset_each_batch,
        }
        return {
            "scenario": self.scenario,
            "samples": self.samples.tolist(),
            "domain_ids": self.domain_ids.tolist(),
            "domains": [[d.corruption, d.severity] for d in self.domains],
            "segments": [[s.name, s.start, s.stop, s.reset] for s in self.segments],
            **{name: value for name, value in settings.items() if value},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """Build a plan from what :meth:`to_dict` returned.

        Raises:
            InputError: A field is missing or does not fit.
        """
        try:
            return cls(
                scenario=_text(values["scenario"]),
                samples=_indices(values["samples"]),
                domain_ids=_indices(values["domain_ids"]),
                domains=tuple(Domain(_text(c), int(s)) for c, s in values["domains"]),
                segments=tuple(
                    Segment(_text(n), int(a), int(b), bool(r)) for n, a, b, r in values["segments"]
                ),
                batch_size=_int_or_none(values.get("batch_size")),
                window=_int_or_none(values.get("window")),
                reset_each_batch=bool(values.get("reset_each_batch", False)),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"Not a plan: {error!r}. Expected what Plan.save wrote, with the fields scenario, "
                "samples, domain_ids, domains and segments."
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            InputError: The file is missing or holds no plan.
        """
        try:
            values = json.loads(Path(path).read_text())
        except OSError as error:
            raise InputError(
                f"No plan at {path}: {error.strerror}. Give an existing file."
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path} is not JSON: {error}. Expected what Plan.save wrote."
            ) from error
        return cls.from_dict(values)

    @property
    def digest(self) -> str:
        """SHA-256 of the plan: equal digests, equal streams."""
        return _sha256(self.to_dict())

    @property
    def subset_digest(self) -> str:
        """SHA-256 of which samples of the source occur: as a sorted JSON list of their indices."""
        return _sha256(np.unique(self.samples).tolist())


def concatenate(
    scenario: str,
    orders: Sequence[NDArray[np.int64]],
    domains: Sequence[Domain],
    *,
    reset: bool,
) -> Plan:
    """Make a plan with one segment a visit to a domain.

    A segment is named after its domain; later visits to the same one are counted: ``fog-1``,
    ``fog-1 (2)``.

    Args:
        scenario: Name of the scenario.
        orders: For each visit the sample indices in their order.
        domains: The domain of each visit, in the order of the stream.
        reset: Whether the model returns to the source before each segment.

    Returns:
        The plan; it holds each domain once, in the order of their first visits.
    """
    stops = np.cumsum([len(order) for order in orders]).tolist()
    segments = tuple(
        Segment(name, stop - len(order), stop, reset)
        for name, order, stop in zip(_names_of_visits(domains), orders, stops, strict=True)
    )
    numbers = {domain: number for number, domain in enumerate(dict.fromkeys(domains))}
    ids = np.repeat([numbers[domain] for domain in domains], [len(order) for order in orders])
    return Plan(scenario, np.concatenate(orders), ids, tuple(numbers), segments)


def _names_of_visits(domains: Sequence[Domain]) -> Iterator[str]:
    visits: Counter[Domain] = Counter()
    for domain in domains:
        visits[domain] += 1
        yield str(domain) if visits[domain] == 1 else f"{domain} ({visits[domain]})"


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _indices(values: Any) -> NDArray[np.int64]:
    indices = np.asarray(values, dtype=np.int64)
    if indices.ndim != 1:
        raise ValueError(f"indices of shape {list(indices.shape)} instead of a list of numbers")
    return indices


def _text(value: Any) -> str:
    text = str(value)
    text.encode()  # half a character of UTF-16 could not be written to any file: a ValueError
    return text


def _int_or_none(value: Any) -> int | None:
    return None if value is None else int(value)
