"""Update rules: how gradients become changes of the parameters."""

from tta_lightning.rules.adam import Adam
from tta_lightning.rules.base import RuleState, Tensors, UpdateRule
from tta_lightning.rules.memory import GradientMemoryLayer
from tta_lightning.rules.mgg import MGG
from tta_lightning.rules.sgd import SGD
from tta_lightning.rules.sign import Sign

__all__ = [
    "MGG",
    "SGD",
    "Adam",
    "GradientMemoryLayer",
    "RuleState",
    "Sign",
    "Tensors",
    "UpdateRule",
]
