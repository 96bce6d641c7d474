"""The stream: a data module that serves a plan, batch by batch."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from tta_lightning.data import corruptions as corruption_module
from tta_lightning.data.batches import PlanBatches, PlanDataset, collate
from tta_lightning.data.corruptions import CLEAN
from tta_lightning.data.datasets import ImageSource
from tta_lightning.data.geometry import Geometry, ImageSize, geometry
from tta_lightning.data.plan import Domain, Plan, concatenate
from tta_lightning.data.scenarios import SCENARIOS, complete_options
from tta_lightning.describe import constructor_arguments
from tta_lightning.errors import InputError, unknown_name

CORRUPTION_SETS = {
    "common": corruption_module.COMMON,
    "extra": corruption_module.EXTRA,
    "all": corruption_module.ALL,
}
MOST_WORKERS = 256  # each is a process; thousands of them bring a machine down
_DEFAULT_SCENARIO = "reset_each_shift"


class Stream(LightningDataModule):
    """Images in the order of a plan, as a model meets them after deployment.

    Labels of the source may decide the order (``label_shift``, ``correlated``) and otherwise serve
    the metrics alone; they never reach an adapter.

    Args:
        source: Where images come from.
        scenario: ``reset_each_shift``, ``continual``, ``mixed_domains``, ``label_shift``,
            ``correlated``, ``gradual``, ``gradual_correlated``, ``mixed_domains_correlated``,
            ``recurring``, ``single_sample``, ``sliding_window`` or ``episodic``.
        corruptions: Names in the order of the stream, or ``common`` (the 15 of the tables),
            ``extra`` (the 4 for tuning), ``all``; None streams the images as they are (for a source
            with corruptions on disk: all of them).
        severity: 1 to 5, for every corruption; the highest one of the gradual scenarios.
        batch_size: Images a batch; the last batch of a segment may be smaller. ``single_sample``
            and ``sliding_window`` serve one image a batch whatever it is.
        limit: How many images of the source to use; None for all.
        subset: ``sample`` draws those ``limit`` images with the seed, ``first`` takes the first.
        seed: Decides subset, order and the noise of the corruptions.
        table: Severity table of corruptions made on the fly: ``imagenet`` or ``cifar``.
        image_size: Side in px to resize and crop to before corrupting; ``model`` for the size the
            model was made for, ``keep`` to leave images as they are.
        crop_pct: Part of the resized image that the centre crop keeps; None for the model's own.
        on_bad_image: ``stop`` ends the run at an image that cannot be read, ``skip`` leaves it out
            and counts it.
        num_workers: Processes that load and corrupt; the stream does not depend on it.
        clean: Images for methods that look at clean ones before the stream; labels are not used.
        plan: A file written by ``Plan.save`` that replaces corruptions, severity, limit, subset and
            the order. It was made by a scenario, so neither one nor its options can be given.
        scenario_options: Options of the scenario by name; None for its defaults. ``label_shift``
            has ``imbalance_ratio``: how much likelier samples of the current class are than others,
            from 1 (shuffled) to infinity (``.inf`` in YAML: one class after the other); 500,000.
            The correlated ones have ``delta``, how evenly each class is spread over time (small:
            in few places); 0.1. ``recurring`` has ``rounds``, 20; ``sliding_window`` has
            ``window``, in images, 64.

    Raises:
        InputError: An argument is not possible, the source lacks a corruption, the scenario needs
            labels that the source does not have, or a plan would replace the scenario.
    """

    def __init__(
        self,
        source: ImageSource,
        scenario: str = _DEFAULT_SCENARIO,
        corruptions: str | list[str] | None = None,
        severity: int = 5,
        batch_size: int = 64,
        limit: int | None = None,
        subset: Literal["sample", "first"] = "sample",
        seed: int = 0,
        table: Literal["imagenet", "cifar"] = "imagenet",
        image_size: ImageSize = "model",
        crop_pct: float | None = None,
        on_bad_image: Literal["stop", "skip"] = "stop",
        num_workers: int = 0,
        clean: ImageSource | None = None,
        plan: str | None = None,
        scenario_options: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size = {batch_size}: expected 1 or more.")
        if limit is not None and limit < 1:
            raise InputError(f"limit = {limit}: expected 1 or more, or none for all images.")
        check_severity(severity)
        _check_process(seed, num_workers)
        if scenario not in SCENARIOS:
            raise unknown_name("scenario", scenario, SCENARIOS)
        if plan is not None:
            _check_no_scenario(plan, scenario, scenario_options)
        self.source = source
        self.scenario = scenario
        self.scenario_options = complete_options(scenario, scenario_options)
        self.corruptions = corruptions
        self.severity = severity
        self.batch_size = batch_size
        self.limit = limit
        self.subset = subset
        self.seed = seed
        self.table = table
        self.image_size = image_size
        self.crop_pct = crop_pct
        self.on_bad_image = on_bad_image
        self.num_workers = num_workers
        self.clean = clean
        self.start = 0
        """Position in the plan that the stream starts at: where a run that is resumed stood."""
        self._replayed = plan is not None
        self.plan = self._make_plan() if plan is None else Plan.load(plan)
        self._check_plan()
        self.geometry = geometry(image_size, crop_pct, None, 1.0, "bilinear")

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the labels; None when unknown."""
        return self.source.classes

    @property
    def served_batch_size(self) -> int:
        """Images a batch of the stream: the plan's own number where it has one."""
        return self.batch_size if self.plan.batch_size is None else self.plan.batch_size

    def suit(self, input_size: int | None, crop_pct: float, interpolation: str) -> None:
        """Take over what the model was made for, where the user left it to the model.

        Args:
            input_size: Side in px, None if the model takes any.
            crop_pct: Part of the resized image that the model's evaluation crop keeps.
            interpolation: Of the resizing.
        """
        self.geometry = geometry(
            self.image_size, self.crop_pct, input_size, crop_pct, interpolation
        )

    def test_dataloader(self) -> DataLoader[Any]:
        """Serve the plan."""
        return DataLoader(
            self._dataset(),
            batch_sampler=PlanBatches(self.plan, self.served_batch_size, self.start),
            num_workers=self.num_workers,
            worker_init_fn=_outlive_sigterm,
            collate_fn=collate,
            persistent_workers=False,
        )

    def image(self, index: int, corruption: str = CLEAN, severity: int = 0) -> NDArray[np.uint8]:
        """Return one image ``[H, W, 3]`` as the stream shows it: resized, cropped, corrupted.

        Args:
            index: Of the image in its source.
            corruption: Name of the corruption.
            severity: 1 to 5; 0 for the clean image.

        Raises:
            InputError: The image cannot be read or used.
        """
        return self._dataset().image(index, Domain(corruption, severity))

    def clean_batches(self) -> Iterator[Tensor]:
        """Yield the clean images in batches ``[B, 3, H, W]``, in the geometry of the stream.

        Raises:
            InputError: The stream was made without clean images.
        """
        if self.clean is None:
            raise InputError(
                "This method looks at clean, unlabelled images before the stream, and none were "
                "given. Set `clean` of the stream to a source of clean images."
            )
        return clean_batches(self.clean, self.geometry, self.batch_size)

    def describe(self) -> dict[str, Any]:
        """Say what stream this is, as plain values for a manifest."""
        replaced = ("corruptions", "severity", "limit", "subset") if self._replayed else ()
        skip = ("source", "clean", "plan", "num_workers", "scenario_options", *replaced)
        options = {} if self._replayed else {"scenario_options": _for_json(self.scenario_options)}
        return {
            **constructor_arguments(self, skip=skip),
            **options,
            **self._settings(),
            "scenario": self.plan.scenario,
            "source": self.source.describe(),
            "clean": None if self.clean is None else self.clean.describe(),
            "images": len(self.plan),
            "domains": [str(domain) for domain in self.plan.domains],
            "resets": [segment.name for segment in self.plan.segments if segment.reset],
            "geometry": constructor_arguments(self.geometry),
            "plan_sha256": self.plan.digest,
            "subset_sha256": self.plan.subset_digest,
        }

    def _dataset(self) -> PlanDataset:
        return PlanDataset(self.source, self.plan, self.geometry, self.table, self.seed)

    def _settings(self) -> dict[str, Any]:
        """Describe how the plan is served; what it leaves as it always is goes unsaid."""
        settings: dict[str, Any] = {"batch_size": self.served_batch_size}
        if self.clean is not None and self.served_batch_size != self.batch_size:
            settings["clean_batch_size"] = self.batch_size
        if self.plan.window is not None:
            settings["window"] = self.plan.window
        if self.plan.reset_each_batch:
            settings["reset_each_batch"] = True
        return settings

    def _make_plan(self) -> Plan:
        rng = np.random.default_rng(self.seed)
        order = np.arange(len(self.source), dtype=np.int64)
        if self.limit is not None and self.limit < len(order):
            order = rng.permutation(order) if self.subset == "sample" else order
            order = np.sort(order[: self.limit])
        make = SCENARIOS[self.scenario]
        labels = np.asarray(self.source.labels)[order]
        return make(order, labels, self._domains(), rng, **self.scenario_options)

    def _domains(self) -> list[Domain]:
        names = self.corruptions
        if names is None:
            if self.source.domains is None:
                return [Domain(CLEAN, 0)]
            stored = [Domain(*pair) for pair in self.source.domains]
            at_severity = [domain for domain in stored if domain.severity == self.severity]
            if not at_severity:
                raise InputError(
                    f"The source holds no corruption at severity {self.severity}. It holds: "
                    f"{', '.join(map(str, stored))}."
                )
            return at_severity
        return corruption_domains(names, self.severity)

    def _check_plan(self) -> None:
        stored = self.source.domains
        for domain in self.plan.domains:
            if stored is None:
                corruption_module.check(domain.corruption, domain.severity, self.table)
            elif (domain.corruption, domain.severity) not in stored:
                names = [str(Domain(*pair)) for pair in stored]
                raise unknown_name("corruption of this source", str(domain), names)
        if len(self.plan) and int(self.plan.samples.max()) >= len(self.source):
            raise InputError(
                f"The plan asks for image {int(self.plan.samples.max())}, but the source holds "
                f"{len(self.source)}. Use the plan with the source it was made for."
            )


def _outlive_sigterm(worker: int) -> None:
    """Let a worker go on when the whole job is told to end: the main process ends it in time."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _for_json(options: dict[str, float]) -> dict[str, float | str]:
    """Write infinity out as text, which JSON has no number for."""
    return {name: v if math.isfinite(v) else str(v) for name, v in options.items()}


def _check_process(seed: int, num_workers: int) -> None:
    if seed < 0:
        raise InputError(f"seed = {seed}: expected 0 or more.")
    if not 0 <= num_workers <= MOST_WORKERS:
        raise InputError(f"num_workers = {num_workers}: expected 0 to {MOST_WORKERS} processes.")


def _check_no_scenario(plan: str, scenario: str, options: dict[str, float] | None) -> None:
    """Refuse a scenario or options that a plan would replace without a word."""
    ignored = [] if scenario == _DEFAULT_SCENARIO else [f"scenario = {scenario}"]
    if options:
        ignored.append(f"scenario_options = {options}")
    if ignored:
        raise InputError(
            f"The plan {plan} holds the order that its own scenario made, so "
            f"{' and '.join(ignored)} would be ignored. Leave out the scenario (or set scenario: "
            f"{_DEFAULT_SCENARIO} and scenario_options: null), or leave out the plan."
        )


def check_severity(severity: int) -> None:
    """Refuse a severity that is not one of 1 to 5.

    Raises:
        InputError: Names it.
    """
    if not 1 <= severity <= 5:
        raise InputError(f"severity {severity} is out of range, expected 1 to 5.")


def corruption_domains(names: str | Sequence[str], severity: int) -> list[Domain]:
    """Return the domains that a data module's ``corruptions`` and ``severity`` ask for.

    Args:
        names: ``common``, ``extra`` or ``all``, one corruption, or a list of them.
        severity: For each of them; the clean image has none.

    Raises:
        InputError: The list is empty or names one twice.
    """
    listed = CORRUPTION_SETS.get(names, [names]) if isinstance(names, str) else names
    if not listed:
        raise InputError("corruptions is an empty list: name at least one, or leave it out.")
    if len(set(listed)) < len(listed):
        raise InputError(f"corruptions names one twice: {', '.join(listed)}.")
    return [Domain(name, 0 if name == CLEAN else severity) for name in listed]


def clean_batches(source: ImageSource, size: Geometry, batch_size: int) -> Iterator[Tensor]:
    """Yield all images of a source, uncorrupted, in an order that is shuffled but always the same.

    A folder lists its classes one after the other, and batch normalisation wants batches of all.

    Args:
        source: The images.
        size: What they are resized and cropped to.
        batch_size: Images a batch.

    Yields:
        ``[B, 3, H, W]`` float32 in [0, 1].

    Raises:
        InputError: An image cannot be used.
    """
    everything = np.random.default_rng(0).permutation(len(source))
    plan = concatenate("clean", [everything], [Domain(CLEAN, 0)], reset=False)
    dataset = PlanDataset(source, plan, size, table="imagenet", seed=0)
    for positions in plan.batches(batch_size):
        batch = collate([dataset[position] for position in positions])
        if batch.bad:
            raise InputError(f"A clean image cannot be used: {batch.bad[0][1]}")
        yield batch.images
