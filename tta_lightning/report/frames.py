"""Tidy frames over several runs: what the figures and the page are made of.

Runs that share a name are repetitions of one another (other seeds), and are averaged. The names
are those of :func:`tta_lightning.report.groups.group`, or any given ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from tta_lightning.errors import InputError
from tta_lightning.report.collapses import collapses
from tta_lightning.report.protocol import source_of
from tta_lightning.report.run import Run, labels

MEAN = "mean"
"""Name of the row that is the mean over the domains."""
LEAST_IN_STRETCH = 10  # shares of fewer images are noise
MOST_DOMAINS = 40  # of more, the severities of a corruption are averaged


def accuracies(runs: Sequence[Run], names: Sequence[str] | None = None) -> pd.DataFrame:
    """Say how well each run predicts each domain (a corruption at a severity).

    Visits of a domain are taken together, and of more than 40 domains the severities of a
    corruption. A stream without corruptions is split by its segments.

    Args:
        runs: Runs.
        names: A name a run; None for those of their folders.

    Returns:
        A row a run and domain: ``name``, ``run`` (its number, from 0), ``domain``, ``images``,
        ``accuracy`` (a fraction; NaN without labels), ``entropy`` (nats), ``confidence``,
        ``source`` (accuracy of the source model of the same weights under the same protocol; NaN
        where that run is not among these), ``gain`` over it, ``collapsed`` (see
            :func:`~tta_lightning.report.collapses.collapses`).
        The domain ``mean`` is the mean over the others.
    """
    names = _names(runs, names)
    for run in runs:
        if run.predictions.empty:
            raise InputError(f"{run.folder}: the run predicted nothing. Leave it out.")
    rows = [_domain_rows(run, runs) for run in runs]
    for number, (name, frame) in enumerate(zip(names, rows, strict=True)):
        frame.insert(0, "name", name)
        frame.insert(1, "run", number)
    return pd.concat(rows, ignore_index=True)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Average repetitions.

    Args:
        frame: What :func:`accuracies` returns.

    Returns:
        A row a name and domain, both in their order of appearance: ``name``, ``domain``, ``runs``
        (how many), mean and standard deviation of ``accuracy``, ``gain`` and ``entropy``
        (``accuracy``, ``accuracy_sd``, ...; the deviation is that of a sample, NaN for one run; the
        gain is NaN unless each of the runs has one), ``collapsed`` (whether any of them did).
    """
    groups = frame.groupby(["name", "domain"], sort=False)
    parts = {"runs": groups["run"].count()}
    for column in ("accuracy", "gain", "entropy"):
        parts[column] = groups[column].mean()
        parts[f"{column}_sd"] = groups[column].std(ddof=1)
    whole = groups["gain"].count() == parts["runs"]
    parts["gain"], parts["gain_sd"] = parts["gain"].where(whole), parts["gain_sd"].where(whole)
    parts["collapsed"] = groups["collapsed"].any()
    return pd.DataFrame(parts).reset_index()


def curves(
    runs: Sequence[Run], names: Sequence[str] | None = None, points: int = 800
) -> pd.DataFrame:
    """Say how each run goes along its stream.

    Args:
        runs: Runs; repetitions are averaged where they have the same batches, else the first one
            speaks for them.
        names: A name a run; None for those of their folders.
        points: Most rows a name; each segment keeps its first and its last batch.

    Returns:
        A row a name and batch: ``name``, ``segment``, ``visit`` (number of the segment, from 0),
        ``seen`` (images so far), ``running_accuracy`` and ``running_entropy`` within the segment,
        ``sd`` of the former over the repetitions (NaN for one).
    """
    parts = []
    for name, members in _by_name(runs, _names(runs, names)).items():
        frame = _averaged([run.curve for run in members])
        frame = frame[_kept(frame["visit"].to_numpy(), points)]
        frame.insert(0, "name", name)
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


def segments(runs: Sequence[Run], names: Sequence[str] | None = None) -> pd.DataFrame:
    """Say how each segment went as a whole.

    Args:
        runs: Runs; repetitions are averaged.
        names: A name a run; None for those of their folders.

    Returns:
        A row a name and segment, in their order: ``name``, ``segment``, ``accuracy`` (NaN without
        labels), ``entropy`` (nats).
    """
    parts = [
        run.metrics[["segment", "accuracy", "entropy"]].assign(name=name)
        for name, run in zip(_names(runs, names), runs, strict=True)
    ]
    groups = pd.concat(parts).groupby(["name", "segment"], sort=False)
    return groups.mean().reset_index()


def over_time(run: Run, bins: int = 60, classes: int = 20) -> pd.DataFrame:
    """Say what a run predicts as its stream goes on.

    Args:
        run: A run.
        bins: About how many stretches to cut the stream into, of 10 images or more. None goes over
            the end of a segment, unless there are more segments than that.
        classes: Most classes that are told apart: those that are predicted most in some stretch.
            The others are ``other``.

    Returns:
        A row a stretch and class: ``segment``, ``start`` and ``stop`` (images seen), ``class`` (its
        number as text, or ``other``), ``share`` of the predictions in the stretch, ``entropy``
        (mean of the stretch, nats), ``accuracy`` (of the stretch; NaN without labels). No rows
        where no prediction is finite.
    """
    predictions = run.predictions
    bins = min(bins, max(1, len(predictions) // LEAST_IN_STRETCH))
    edges = _edges(predictions["segment"].to_numpy(), bins)
    stretch = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    shares = pd.crosstab(stretch, predictions["prediction"], normalize="index")
    shares = _most_predicted(shares.drop(columns=-1, errors="ignore"), classes)
    table = pd.DataFrame(
        {
            "segment": predictions["segment"].to_numpy()[edges[:-1]],
            "start": edges[:-1],
            "stop": edges[1:],
            "entropy": predictions["entropy"].groupby(stretch).mean(),
            "accuracy": _fraction(predictions["correct"]).groupby(stretch).mean(),
        }
    )
    long = shares.rename_axis("stretch").reset_index()
    long = long.melt(id_vars="stretch", var_name="class", value_name="share")
    return long.join(table, on="stretch").drop(columns="stretch")


def per_class(run: Run, source: Run | None) -> pd.DataFrame:
    """Say which classes gained and which died.

    Args:
        run: A run.
        source: The run of the source model under the same protocol, if there is one.

    Returns:
        A row a class: ``class`` (its number), ``images`` with that label (0 without labels),
        ``predicted`` (how often, by the run), ``before`` and ``after`` (accuracy on the images of
        the class by the source model and by the run; without labels the share of the predictions),
        ``change``. Means over all segments; NaN where it is not known.
    """
    labelled = run.predictions["label"].notna().any()
    after = _of_classes(run.predictions, labelled)
    before = None if source is None else _of_classes(source.predictions, labelled)
    frame = after if before is None else after.join(before.add_suffix("_source"), how="outer")
    result = pd.DataFrame(
        {
            "class": frame.index.astype("int64"),
            "images": frame["images"].fillna(0).astype("int64").to_numpy(),
            "predicted": frame["predicted"].fillna(0).astype("int64").to_numpy(),
            "before": np.nan if before is None else frame["figure_source"].to_numpy(),
            "after": frame["figure"].to_numpy(),
        }
    )
    if not labelled:
        result = result.fillna({"after": 0.0, **({} if before is None else {"before": 0.0})})
    result["change"] = result["after"] - result["before"]
    return result


def reliability(
    runs: Sequence[Run], names: Sequence[str] | None = None, bins: int = 15
) -> pd.DataFrame:
    """Say how often predictions of a confidence are right, over equally wide bins.

    Args:
        runs: Runs of labelled streams; repetitions are put together.
        names: A name a run; None for those of their folders.
        bins: Number of bins of the confidence, from 0 to 1.

    Returns:
        A row a name and bin that has images: ``name``, ``bin`` (from 0), ``confidence`` (its mean),
        ``accuracy``, ``images``, and ``ece``, the calibration error over all bins of the name (Guo
        et al., ICML 2017). No rows where nothing is labelled.
    """
    parts = []
    for name, members in _by_name(runs, _names(runs, names)).items():
        frame = pd.concat([run.predictions[["confidence", "correct"]] for run in members])
        frame = frame.dropna()
        place = (frame["confidence"] * bins).astype("int64").clip(upper=bins - 1)
        groups = frame.astype({"correct": "float64"}).groupby(place.rename("bin"))
        found = groups.mean().rename(columns={"correct": "accuracy"})
        found["images"] = groups.size()
        gaps = (found["confidence"] - found["accuracy"]).abs() * found["images"]
        found["ece"] = gaps.sum() / max(len(frame), 1)
        found.insert(0, "name", name)
        parts.append(found.reset_index())
    return pd.concat(parts, ignore_index=True)


def cost(
    runs: Sequence[Run], names: Sequence[str] | None = None, known: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Say what each run costs, beside what it is worth.

    Args:
        runs: Runs with the callback CostMonitor, which is on by default.
        names: A name a run; None for those of their folders.
        known: What :func:`accuracies` returns of them, if that is there already.

    Returns:
        A row a name, means over its runs: ``name``, ``accuracy`` (mean over the domains),
        ``forwards`` and ``backwards`` a batch, ``images_per_second`` (without loading),
        ``milliseconds`` an image, ``memory`` (bytes, the highest peak of inference and update).
        NaN where it was not measured.
    """
    rows = []
    frame = accuracies(runs, names) if known is None else known
    means = frame[frame["domain"] == MEAN].set_index("run")["accuracy"]
    for number, (run, name) in enumerate(zip(runs, _names(runs, names), strict=True)):
        measured = run.results.get("cost", {})
        speed = measured.get("images_per_second")
        phases = [v for v in measured.values() if isinstance(v, dict)]
        peaks = [phase["peak_memory_bytes"] for phase in phases if phase["peak_memory_bytes"]]
        rows.append(
            {
                "name": name,
                "accuracy": means[number],
                "forwards": measured.get("forwards_per_batch", np.nan),
                "backwards": measured.get("backwards_per_batch", np.nan),
                "images_per_second": speed or np.nan,
                "milliseconds": 1000 / speed if speed else np.nan,
                "memory": max(peaks, default=np.nan),
            }
        )
    return pd.DataFrame(rows).groupby("name", sort=False).mean().reset_index()


# Parts --------------------------------------------------------------------------------------------


def _names(runs: Sequence[Run], names: Sequence[str] | None) -> list[str]:
    if not runs:
        raise InputError("There are no runs. Give one or more.")
    if names is not None and len(names) != len(runs):
        raise InputError(f"{len(names)} names for {len(runs)} runs: expected one for each.")
    return labels(runs) if names is None else list(names)


def _by_name(runs: Sequence[Run], names: Iterable[str]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for name, run in zip(names, runs, strict=True):
        groups.setdefault(name, []).append(run)
    return groups


def _domain_rows(run: Run, runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row a domain, and the mean, of one run."""
    source = source_of(run, runs)
    predictions = run.predictions
    domain = _domains(predictions)
    collapsed = predictions["segment"].isin(collapses(run, source))
    frame = pd.DataFrame(
        {
            "domain": domain,
            "accuracy": _fraction(predictions["correct"]),
            "entropy": predictions["entropy"],
            "confidence": predictions["confidence"],
            "collapsed": collapsed,
        }
    )
    groups = frame.groupby("domain", sort=False)
    rows = groups[["accuracy", "entropy", "confidence"]].mean()
    rows.insert(0, "images", groups.size())
    rows["source"] = np.nan
    if source is not None:
        right = _fraction(source.predictions["correct"])
        rows["source"] = right.groupby(_domains(source.predictions)).mean()
    rows["gain"] = rows["accuracy"] - rows["source"]
    rows["collapsed"] = groups["collapsed"].any()
    mean = rows.drop(columns=["images", "collapsed"]).mean()
    rows.loc[MEAN] = {**mean, "images": rows["images"].sum(), "collapsed": rows["collapsed"].any()}
    return rows.astype({"images": "int64", "collapsed": bool}).reset_index()


def _domains(predictions: pd.DataFrame) -> pd.Series:
    """Name the domain of each image: ``fog-5``, ``fog`` where there are many, or its segment."""
    names = predictions["corruption"]
    if not names.ne("").all():
        return predictions["segment"]
    severities = predictions["severity"].astype("str")
    full = names.where(predictions["severity"].fillna(0) == 0, names + "-" + severities)
    return names if full.nunique() > MOST_DOMAINS else full


def _fraction(correct: pd.Series) -> pd.Series:
    return correct.astype("float64")


def _averaged(repetitions: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Average the curves of repetitions, a row a batch."""
    first = repetitions[0]
    alike = [curve for curve in repetitions if curve["seen"].equals(first["seen"])]
    running = np.stack([curve["running_accuracy"].to_numpy() for curve in alike])
    segment = first["segment"].to_numpy()
    return pd.DataFrame(
        {
            "segment": segment,
            "visit": np.cumsum(np.append(False, segment[1:] != segment[:-1]))[: len(segment)],
            "seen": first["seen"],
            "running_accuracy": running.mean(axis=0),
            "running_entropy": np.mean([curve["running_entropy"] for curve in alike], axis=0),
            "sd": running.std(axis=0, ddof=1) if len(alike) > 1 else np.nan,
        }
    )


def _kept(visit: np.ndarray, points: int) -> np.ndarray:
    """Say which batches of a long stream are drawn: about `points`, and the ends of segments."""
    edges = np.flatnonzero(np.diff(visit, prepend=-1, append=-1))  # starts, and the end
    step = max(1, -(-len(visit) // points))
    keep = np.zeros(len(visit), dtype=bool)
    for start, stop in itertools.pairwise(edges):
        keep[start:stop:step] = keep[stop - 1] = True
    return keep


def _edges(segments: np.ndarray, bins: int) -> np.ndarray:
    """Cut a stream into about as many stretches, at the ends of its segments where these are few.

    Returns:
        Positions ``[stretches + 1]`` from 0 to the number of images.
    """
    total = len(segments)
    starts = np.flatnonzero(np.append(True, segments[1:] != segments[:-1]))
    if len(starts) > bins:
        return np.unique(np.linspace(0, total, min(bins, total) + 1).astype(np.int64))
    edges = [np.array([0])]
    for start, stop in zip(starts, [*starts[1:], total], strict=True):
        count = min(max(1, round(bins * (stop - start) / total)), stop - start)
        edges.append(np.linspace(start, stop, count + 1).astype(np.int64)[1:])
    return np.concatenate(edges)


def _most_predicted(shares: pd.DataFrame, classes: int) -> pd.DataFrame:
    """Keep the columns with the highest shares, by number, and add the others up."""
    if len(shares.columns) > classes:
        kept = sorted(shares.max().nlargest(classes - 1).index)
        rest = shares.drop(columns=kept).sum(axis=1)
        shares = shares[kept].rename(columns=str)
        shares["other"] = rest
    return shares.rename(columns=str)


def _of_classes(predictions: pd.DataFrame, labelled: bool) -> pd.DataFrame:
    """Return of each class how many images it has, how often it is predicted, and its figure."""
    counts = predictions["prediction"].value_counts().drop(-1, errors="ignore")
    if not labelled:
        figure = counts / len(predictions)
        images = pd.Series(0, index=counts.index)
    else:
        known = predictions[predictions["label"].notna()]
        groups = _fraction(known["correct"]).groupby(known["label"].astype("int64"))
        figure, images = groups.mean(), groups.size()
    frame = pd.DataFrame({"images": images, "predicted": counts, "figure": figure})
    return frame.sort_index()
