"""TTT: the step of MT3 on a network of joint training."""

from __future__ import annotations

from typing import Any

from torch import nn

from tta_lightning.inner_loop import Target
from tta_lightning.methods.mt3 import MT3, Episodes


class TTT(MT3):
    """Adapt to each image by itself with the auxiliary task that the network was trained with too.

    Sun, Wang, Liu, Miller, Efros, Hardt, "Test-Time Training with Self-Supervision for
    Generalization under Distribution Shifts", ICML 2020, https://arxiv.org/abs/1909.13231, in the
    form in which MT3 (https://arxiv.org/abs/2103.16201) compares with it, "TTT (ours)": training
    minimises the loss of the labels and that of an auxiliary task together, without a meta-step,
    and each test image is predicted after one step on the auxiliary task alone.

    The step is that of :class:`MT3` with a rate of 0.01: the equations, the views, the order of
    things and what terms see are written there. The network is one of
    :class:`tta_lightning.meta.JointTraining`; ``Source`` on the same checkpoint is "JT".

    Departs from the paper in:

    * The auxiliary task is that of BYOL, to which two views of an image are alike, and not the
      prediction by how much an image was rotated.
    * Everything moves but the classifier's head; in the paper, the part of the network that both
      tasks share.
    * It is the paper's standard version: each image starts from the trained network. The online
      version, which carries the weights on, is not here.

    Args:
        network: Has :class:`~tta_lightning.models.BYOLHeads`: a checkpoint of JointTraining.
        steps: See :class:`MT3`, as for all others.
        copies: See there.
        lr: Of the steps.
        target: See there.
        episodes: See there.
        in_flight: See there.
        crop: See there.
        flips: See there.
        seed: Of the views.

    Raises:
        InputError: A hyper-parameter is out of range; or, at the first step, the network has no
            BYOL heads.
    """

    def __init__(
        self,
        network: str | dict[str, Any] | nn.Module,
        steps: int = 1,
        copies: int = 32,
        lr: float = 0.01,
        target: Target = "meta",
        episodes: Episodes = "auto",
        in_flight: int = 16,
        crop: tuple[int, int] | None = None,
        flips: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(network, steps, copies, lr, target, episodes, in_flight, crop, flips, seed)
