"""The backward pass of methods that learn from some samples of a batch: over those alone."""

from __future__ import annotations

from torch import Tensor

from tta_lightning.adapter import Adapter
from tta_lightning.contract import Outputs
from tta_lightning.functional import all_finite
from tta_lightning.models.norms import batch_norm_layers

_FORWARD, _BOTH = 1, 3  # what an image costs forward, and forward and backward, in forwards


def logits_of_kept(adapter: Adapter, out: Outputs, images: Tensor) -> Tensor:
    """Return the logits of the kept samples, with a graph that costs little to differentiate.

    A backward pass costs about two forward passes of all samples in the graph, kept or not. Where
    few are kept it is cheaper to send these through the network once more: then a sample that is
    left out costs one forward pass, as EATA's paper counts it (section 3.1). This gives the same
    only where no sample depends on the others, so a network with batch normalisation keeps its
    graph, as does a run with attached terms, which see the whole batch.

    Args:
        adapter: The method.
        out: The forward pass on ``images`` with its graph, and ``selected``, at least one.
        images: ``[B, 3, H, W]`` in [0, 1].

    Returns:
        ``[K, C]``, K being the number of selected samples, in their order.
    """
    assert out.selected is not None
    all_images, kept = len(images), int(out.selected.sum())
    is_cheaper = kept * _BOTH < all_images * (_BOTH - _FORWARD)
    if not is_cheaper or adapter.terms or batch_norm_layers(adapter.network):
        return out.logits[out.selected]
    if not all_finite(out.logits):  # then nothing is learnt, whatever the number of kept samples
        return out.logits[out.selected]
    return adapter.outputs(images[out.selected]).logits
