"""Orders of samples by their class, for the scenarios that have labels decide what comes when.

Classes are numbers from 0 to C - 1 here; what is returned are positions among the samples given.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MOST_SLOTS = 100


def label_shift_order(
    own: NDArray[np.intp], classes: int, ratio: float, rng: np.random.Generator
) -> NDArray[np.intp]:
    """Give each class a time, in which most of its samples come.

    Args:
        own: ``[N]``, the class of each sample.
        classes: C.
        ratio: How much likelier a sample comes in the time of its own class than in another.
        rng: Decides the order of the times, who strays, and the order within a time.

    Returns:
        ``[N]``, every position once.
    """
    q_min = 1 / (ratio + classes - 1)
    # Any time, the own one included, with C q_min and else the own: q_min each, q_max the own.
    strays = rng.random(len(own)) < classes * q_min
    own_time = rng.permutation(classes)[own]
    time = np.where(strays, rng.integers(classes, size=len(own)), own_time)
    return np.lexsort((rng.permutation(len(own)), time))  # by time, at random within one


def dirichlet_order(
    own: NDArray[np.intp], classes: int, delta: float, rng: np.random.Generator
) -> NDArray[np.intp]:
    """Play the slots of :func:`dirichlet_slots`, in each its classes one by one in a random order.

    Args:
        own: ``[N]``, the class of each sample.
        classes: C.
        delta: Concentration. Small: a class falls into few slots; large: evenly into all.
        rng: Decides the shares and every order.

    Returns:
        ``[N]``, every position once.
    """
    slot = dirichlet_slots(own, classes, delta, rng)
    turn = rng.permuted(np.tile(np.arange(classes), (_slots(classes), 1)), axis=1)
    return np.lexsort((rng.permutation(len(own)), turn[slot, own], slot))  # by slot, then by turn


def dirichlet_slots(
    own: NDArray[np.intp], classes: int, delta: float, rng: np.random.Generator
) -> NDArray[np.intp]:
    """Share each class out over slots of time by a Dirichlet draw.

    With S = min(C, 100) slots, class c draws shares ``p_c ~ Dirichlet(delta, ..., delta)`` ``[S]``.
    Its n_c samples, shuffled, are cut at ``floor(n_c (p_c1 + ... + p_cs))``, s = 1 to S - 1, and
    piece s goes to slot s.

    Args:
        own: ``[N]``, the class of each sample.
        classes: C.
        delta: Concentration.
        rng: Decides the shares, and who is in which piece.

    Returns:
        ``[N]``, the slot of each sample, from 0 to S - 1.
    """
    slots = _slots(classes)
    slot = np.empty(len(own), dtype=np.intp)
    for label in range(classes):
        members = rng.permutation(np.flatnonzero(own == label))
        shares = rng.dirichlet(np.full(slots, delta))
        cuts = np.floor(len(members) * np.cumsum(shares)[:-1])
        slot[members] = np.searchsorted(cuts, np.arange(len(members)), side="right")
    return slot


def _slots(classes: int) -> int:
    return min(classes, MOST_SLOTS)
