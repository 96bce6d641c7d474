"""LAME: the predictions of a batch corrected together, without touching the network."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta_lightning.adapter import Adapter
from tta_lightning.contract import Outputs, writable
from tta_lightning.errors import unknown_name
from tta_lightning.functional import wide
from tta_lightning.methods.features import features_of, report_features
from tta_lightning.rules.base import require_whole

Affinity = Literal["knn", "rbf", "linear"]
_FLOOR = 1e-10  # added to the probabilities before their logarithm
_TOLERANCE = 1e-8  # of the energy, relative: a smaller change ends the iteration
_ROUNDING = 16  # machine precisions that features of unit length may be apart and still be equal
_FIRST_ITERATIONS = 2  # are not asked whether the energy still changes


class LAME(Adapter):
    """Give images with alike features alike predictions.

    Boudiaf, Mueller, Ben Ayed, Bertinetto, "Parameter-free Online Test-time Adaptation", CVPR 2022,
    https://arxiv.org/abs/2201.05718. For each batch, with the softmax ``q_i [C]`` of the network
    and the affinity ``w_ij`` of images i and j, the predictions ``z_i [C]`` start at ``q_i``, and
    iterations from the last ones, ``z'``, to new ones each minimise::

        E(z) = sum_i KL(z_i || q_i) - sum_ij w_ij <z_i, z'_j>

    that is, with a floor for the logarithm::

        z_i <- softmax(log(q_i + 1e-10) + sum_j w_ij z'_j)

    They end after ``max_steps``, or from the third on as soon as E changes by at most 1e-8 of
    itself. ``w`` is made of the features that enter the final linear map, scaled to unit length,
    ``u_i``, with ``d_ij = |u_i - u_j|``:

    * ``knn``: 1 for the ``k`` images j nearest to i (all others, where there are fewer), else 0.
    * ``rbf``: ``exp(-d_ij^2 / (2 sigma^2))``, sigma being the mean over i of the distance to the
      k-th nearest image (the farthest, where there are fewer), i itself counted.
    * ``linear``: ``<u_i, u_j>``.

    ``rbf`` and ``linear`` tie an image to itself as well. With ``symmetric`` w is replaced by
    ``(w + w^T) / 2``.

    The logits returned are the exponent of the last iteration: their softmax is ``z``. Predictions
    are those of a batch together, so they depend on which images share it. An image alone keeps its
    class, and with ``knn`` its probabilities. Nothing is learnt and nothing is carried over; no
    parameter moves, and batch normalisation keeps the statistics of the source data. There is no
    loss, so nothing can be added to it: the STAG callback refuses this method.

    The paper chose ``knn`` with ``k = 5`` by validation, which is the default here; the published
    code, and public benchmarks with it, default to ``rbf`` with ``k = 5``.

    Departs from the published code in:

    * Images whose logits or features are not finite are predicted as the network does and left out
      of the affinity; there one of them makes the whole batch NaN.
    * ``knn`` leaves out the image itself. There it is the nearest image that is left out, which
      may be another one with the same features. Of images equally near, the first ones count.
    * sigma is no smaller than rounding, 16 times the machine precision. So where all features are
      equal, ``rbf`` is 1; there it is NaN.
    * Half precision is brought to float32.

    Args:
        network: Images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``, ending in one linear map;
            see :class:`Adapter`.
        affinity: ``knn``, ``rbf`` or ``linear``.
        k: Neighbours of an image; for ``rbf`` 2 at least, as it counts the image itself; not used
            by ``linear``.
        symmetric: Whether the affinity is made symmetric.
        max_steps: Iterations, at most.

    Raises:
        InputError: A hyper-parameter is out of range, or (when adaptation starts) the network does
            not end in one linear map.
    """

    predicts = "jointly for each batch"

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        affinity: Affinity = "knn",
        k: int = 5,
        symmetric: bool = False,
        max_steps: int = 100,
    ) -> None:
        super().__init__(network)
        if affinity not in get_args(Affinity):
            raise unknown_name("affinity", affinity, get_args(Affinity))
        self.affinity, self.symmetric = affinity, symmetric
        self.k = require_whole("k", k, 2 if affinity == "rbf" else 1)
        self.max_steps = require_whole("max_steps", max_steps, 1)

    def configure(self) -> None:
        """Let nothing move and keep the source statistics."""

    def adapt_step(self, images: Tensor) -> Tensor:
        """Predict the images of a batch together.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits ``[B, C]`` in float32 at least, without graph; their softmax is ``z``.
        """
        self.ready()
        with torch.inference_mode(False), torch.no_grad():
            with self.phase("inference"):
                out = self.outputs(writable(images))
            with self.phase("update"):
                logits, left_out = self._joint(out)
        consequence = "predicted as the network does, apart from the others"
        self.report = report_features(False, left_out, len(logits), consequence)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Predict as :meth:`adapt_step` does, without a report: ``[B, 3, H, W]`` to ``[B, C]``."""
        self.ready()
        with torch.inference_mode(False), torch.no_grad():
            return self._joint(self.outputs(writable(images)))[0]

    def _joint(self, out: Outputs) -> tuple[Tensor, int]:
        """Correct the logits ``[B, C]`` of a batch; returns how many images were left out, too."""
        logits, features = wide(out.logits), features_of(self, out)
        finite = logits.isfinite().all(dim=1) & features.isfinite().all(dim=1)
        kept = int(finite.sum())
        if kept:
            logits = logits.clone()
            with torch.autocast(logits.device.type, enabled=False):
                logits[finite] = self._iterate(logits[finite], features[finite])
        return logits, len(logits) - kept

    def _iterate(self, logits: Tensor, features: Tensor) -> Tensor:
        """Return the last exponent ``[B, C]`` for finite logits ``[B, C]``, features ``[B, D]``."""
        affinity = self._affinity(F.normalize(features, dim=1)).to(logits)
        log_q = (logits.softmax(dim=1) + _FLOOR).log()
        z, before = log_q.softmax(dim=1), 0.0
        for step in range(self.max_steps):
            pairwise = affinity @ z
            exponent = log_q + pairwise
            z = exponent.softmax(dim=1)
            # E at its minimum, which z is; in double precision, where 1e-8 of it can be told.
            energy = -float(exponent.double().logsumexp(dim=1).sum())
            if step >= _FIRST_ITERATIONS and abs(energy - before) <= _TOLERANCE * abs(before):
                break
            before = energy
        return exponent

    def _affinity(self, units: Tensor) -> Tensor:
        """Return ``w [B, B]`` of features of unit length ``[B, D]``."""
        if self.affinity == "knn":
            affinity = _nearest(units, self.k)
        elif self.affinity == "rbf":
            affinity = _gaussian(units, self.k)
        else:
            affinity = units @ units.T
        return (affinity + affinity.T) / 2 if self.symmetric else affinity


def _distances(units: Tensor) -> Tensor:
    """Return Euclidean distances ``[B, B]``, by differences: equal features are exactly 0 apart."""
    return torch.cdist(units, units, compute_mode="donot_use_mm_for_euclid_dist")


def _nearest(units: Tensor, k: int) -> Tensor:
    """Return 1 at the k nearest others of each row ``[D]``, else 0: ``[B, B]``."""
    distances = _distances(units).fill_diagonal_(torch.inf)
    order = distances.argsort(dim=1, stable=True)
    return torch.zeros_like(distances).scatter_(1, order[:, : min(k, len(units) - 1)], 1.0)


def _gaussian(units: Tensor, k: int) -> Tensor:
    """Return the radial basis function ``[B, B]`` of rows ``[D]``."""
    distances = _distances(units)
    sigma = distances.sort(dim=1).values[:, min(k, len(units)) - 1].mean()
    sigma = sigma.clamp(min=_ROUNDING * torch.finfo(units.dtype).eps)
    return (-(distances / sigma).square() / 2).exp()
