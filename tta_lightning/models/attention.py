"""Attention whose kernels can be differentiated, and twice."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class PlainAttention:
    """Has attention computed by the plain kernel, as fused ones have no second derivative."""

    def __init__(self) -> None:
        self._watched = False

    @contextmanager
    def used(self) -> Iterator[None]:
        """Use it while the block runs; the first time, warn if the network has any attention."""
        watch = nullcontext() if self._watched else _Watch()
        with sdpa_kernel(SDPBackend.MATH), watch:
            yield
        self._watched = True
        if isinstance(watch, _Watch) and watch.found:
            warnings.warn(
                "The network has attention. Its fused kernels have no second derivative, so the "
                "plain one ('math') is used, which takes more memory. first_order: true would not "
                "need it.",
                stacklevel=4,
            )


class _Watch(TorchFunctionMode):
    """Sees whether attention is computed by a function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= func in (F.scaled_dot_product_attention, F.multi_head_attention_forward)
        return func(*args, **(kwargs or {}))


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Keep ``nn.MultiheadAttention`` from its fast path, which has no derivative.

    In evaluation mode it takes that path where no tensor seems to require gradients, and inside
    ``torch.func`` none does.
    """
    mha: Any = torch.backends.mha
    was_enabled = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(was_enabled)
