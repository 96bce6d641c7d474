"""Update rules: how gradients become changes of the parameters."""

from tta_lightning.rules.adam import Adam
from tta_lightning.rules.base import RuleState, Tensors, UpdateRule
from tta_lightning.rules.sgd import SGD

__all__ = ["SGD", "Adam", "RuleState", "Tensors", "UpdateRule"]
