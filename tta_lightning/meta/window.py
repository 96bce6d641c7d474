"""What a rule has done since the graph was last cut, and what later losses say of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tta_lightning.contract import map_tensors
from tta_lightning.rules import RuleState


@dataclass
class Window:
    """A stretch of updates that keep their graph.

    Attributes:
        state: State of the rule.
        pending: The gradients that the rule works on next; None at the start of a segment.
        travelled: Sum of the updates, with their graph, by parameter.
        surrogate: A scalar whose gradient with respect to the rule is what it learns from.
        scored: How many losses went into it.
    """

    state: RuleState
    pending: dict[str, Tensor] | None = None
    travelled: dict[str, Tensor] = field(default_factory=dict)
    surrogate: Tensor = field(default_factory=lambda: torch.zeros(()))
    scored: int = 0

    def add(self, name: str, change: Tensor) -> None:
        """Note an update of a parameter, with its graph."""
        before = self.travelled.get(name)
        self.travelled[name] = change if before is None else before + change

    def score(self, grads: dict[str, Tensor]) -> None:
        """Add the loss with these gradients, as far as the updates decide it.

        To first order that is the product of its gradients with all they have moved.

        Args:
            grads: Gradients of a later loss, by parameter; what the rule works on next.
        """
        for name, change in self.travelled.items():
            if name in grads:
                self.surrogate = self.surrogate + (grads[name] * change).sum()
        self.scored += self.surrogate.requires_grad
        self.pending = grads

    def cut(self) -> Window:
        """Return the window that follows: the same state without its graph."""
        return Window(map_tensors(Tensor.detach, self.state), self.pending)
