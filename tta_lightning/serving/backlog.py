"""Images on their way to an update."""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

_SIZES = 8  # sizes of images that are gathered side by side


class Backlog:
    """A bounded queue of chunks that knows when all of its work is done.

    Args:
        size: How many chunks it holds.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._chunks: deque[Tensor] = deque()
        self._busy, self._closed = False, False
        self._changed = threading.Condition()

    def offer(self, chunk: Tensor) -> bool:
        """Add a chunk; False where there is no place, or it is closed."""
        with self._changed:
            accepted = len(self._chunks) < self._size and not self._closed
            if accepted:
                self._chunks.append(chunk)
                self._changed.notify_all()
            return accepted

    def wait_for_work(self) -> bool:
        """Wait until there is a chunk; False once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self._closed)
            return not self._closed

    def take(self) -> Tensor | None:
        """Take the oldest chunk out, if there still is one; :meth:`done` must follow."""
        with self._changed:
            self._busy = True
            return self._chunks.popleft() if self._chunks else None

    def done(self) -> None:
        """Say that the work on what was taken out is over."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def clear(self) -> int:
        """Forget all chunks; returns how many images they had."""
        with self._changed:
            images = sum(map(len, self._chunks))
            self._chunks.clear()
            self._changed.notify_all()
            return images

    def close(self) -> None:
        """Take no more, and let nobody wait for work."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait_until_done(self, timeout: float | None) -> bool:
        """Wait until it is empty and idle; False where that took longer, in seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._chunks and not self._busy, timeout)


class Gatherer:
    """Collects images of requests until there are enough of one size for an update.

    It holds images of at most eight sizes at a time.

    Args:
        update_size: Images a chunk; None for one chunk a request.
    """

    def __init__(self, update_size: int | None) -> None:
        self.update_size = update_size
        self._waiting: dict[tuple[int, ...], list[Tensor]] = {}

    def add(self, images: Tensor) -> tuple[list[Tensor], int]:
        """Keep a copy of images ``[B, 3, H, W]``.

        Returns:
            The chunks that are complete now, oldest first, and how many images were dropped.
        """
        if self.update_size is None:
            return [images.clone()], 0
        size = tuple(images.shape[1:])
        waiting = [*self._waiting.pop(size, []), *images.clone().unbind()]
        whole = len(waiting) - len(waiting) % self.update_size
        starts = range(0, whole, self.update_size)
        chunks = [torch.stack(waiting[start : start + self.update_size]) for start in starts]
        if waiting[whole:]:
            self._waiting[size] = [image.clone() for image in waiting[whole:]]
        dropped = len(self._waiting.pop(next(iter(self._waiting)))) if self._is_full() else 0
        return chunks, dropped

    def clear(self) -> int:
        """Forget all images; returns how many they were."""
        images = sum(map(len, self._waiting.values()))
        self._waiting.clear()
        return images

    def _is_full(self) -> bool:
        return len(self._waiting) > _SIZES
