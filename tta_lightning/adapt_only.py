"""A LightningModule that only ``adapt`` drives."""

from __future__ import annotations

from typing import Any, NoReturn

from lightning.pytorch import LightningModule

from tta_lightning.errors import InputError


class AdaptOnly(LightningModule):
    """Refuses Lightning's other verbs in a sentence that names ``adapt``."""

    def on_test_model_eval(self) -> None:
        """Keep the mode while Lightning's loop starts."""

    def on_test_model_train(self) -> None:
        """Keep the mode when Lightning's loop ends."""

    def test_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a stream is adapted to, not tested on."""
        self._refuse("test")

    def validation_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a stream is adapted to, not validated on."""
        self._refuse("validate")

    def training_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: an adapter is not trained on labels."""
        self._refuse("fit")

    def configure_optimizers(self) -> NoReturn:
        """Refuse: the rule takes the place of an optimizer."""
        self._refuse("fit")

    def _refuse(self, verb: str) -> NoReturn:
        raise InputError(
            f"{type(self).__name__} is a test-time adaptation method: it cannot {verb}. Use "
            "`adapt`: Trainer.adapt(...) of tta_lightning, or `tta adapt` on the command line "
            "(the method Source gives the accuracy without adaptation)."
        )
