"""Pre-training of a learned rule: an optimizer that is optimised to adapt."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from tta_lightning.adapter import Adapter
from tta_lightning.contract import Outputs
from tta_lightning.errors import InputError, unknown_name
from tta_lightning.functional import all_finite
from tta_lightning.meta.window import Window
from tta_lightning.models.classifier import describe, weights_hash
from tta_lightning.models.norms import batch_norm_layers
from tta_lightning.models.weights import CHECKPOINT_KEY
from tta_lightning.rules import MGG
from tta_lightning.rules.checkpoints import learned_rule_record

Batch: TypeAlias = tuple[Tensor, Tensor, int]  # images, labels, number of the segment


class MGGPretraining(LightningModule):
    """Train the rule of a method such that the updates it gives lower the method's own loss.

    Deng et al., "Learning to Generate Gradients for Test-Time Adaptation via Test-Time Training
    Layers", AAAI 2025, https://arxiv.org/abs/2412.16901. No label is needed: the loss is the one
    that is minimised after deployment, ``L``, on the batch after the update::

        theta_t = theta_(t-1) - inner_lr * u_t(phi)         u_t: what the rule makes of g_t
        d L(x_(t+1); theta_t) / d phi  =  < g_(t+1), d theta_t / d phi >
                                          g_(t+1) = dL(x_(t+1); theta_t) / d theta

    so one backward pass through the network gives both the gradient that trains the rule and the
    gradient that the rule works on next, and one vector-Jacobian product through the rule replaces
    the backward call for each parameter tensor of the published code. Gradients, moments, memory
    and ``theta_(t-1)`` count as constants (no second derivatives); the optimizer is Adam with
    constant ``lr``. ``unroll = 1`` is the published recipe: each update answers for the next batch
    alone, so it learns the sign of the next gradient, and nothing speaks against a large step.

    ``unroll = K > 1`` is an extension: ``theta_t`` is then the sum of the last updates, up to K of
    them, each of which also answers for later batches, and the memory keeps its graph over them;
    phi moves once every K updates. Moments and gradients stay constants.

    The memory starts anew at every segment and every epoch. Each validation adapts the source
    network anew to held-out streams with the rule's own ``lr``, and logs the mean loss before each
    update as ``val/loss``; ``val/accuracy`` where there are labels; and ``val/selection``, which is
    to be minimised and by which checkpoints are chosen.

    A training ends with the source network, so that its method can adapt with the rule at once.
    Checkpoints that ``ModelCheckpoint`` writes at the end of an epoch resume exactly; one from the
    middle of an epoch goes on with a new memory. A batch is (images ``[B, 3, H, W]``, labels
    ``[B]``, number of the segment). Statistics over a batch are those of all processes together,
    but for batch normalisation, which takes those of each process.

    Departs from the published code in: checkpoints are chosen by the loss, not by accuracy, which
    needs labels (``select_by="accuracy"`` does what the paper did); an incomplete last batch is
    left out.

    Args:
        method: The method whose loss is minimised, with the :class:`~tta_lightning.rules.MGG` that
            is trained.
        lr: Of the optimizer that trains the rule.
        inner_lr: Learning rate of the rule while it is trained; None for the rule's own ``lr``,
            with which it adapts later. The paper trains with a tenth of it.
        unroll: Updates K that an update answers for.
        reset_network: Return to the source network at every segment. The published code never
            does: the network drifts over all epochs.
        clip: Largest norm of the gradient of the rule's weights; None for no limit.
        schedule: ``constant``, or ``cosine`` to zero over all epochs.
        select_by: What ``val/selection`` is: ``loss``, or ``accuracy`` (its negative).

    Raises:
        InputError: An argument is not possible.
    """

    chooses_modes = True  # those of the method

    def __init__(
        self,
        method: Adapter,
        lr: float = 1e-2,
        inner_lr: float | None = 1e-4,
        unroll: int = 1,
        reset_network: bool = False,
        clip: float | None = None,
        schedule: Literal["constant", "cosine"] = "constant",
        select_by: Literal["loss", "accuracy"] = "loss",
    ) -> None:
        super().__init__()
        if not isinstance(method.rule, MGG):
            raise InputError(
                f"MGGPretraining trains the rule of a method, but {type(method).__name__} has the "
                f"rule {type(method.rule).__name__}, which has nothing to learn. Give it MGG()."
            )
        inner_lr = method.rule.lr if inner_lr is None else inner_lr
        for name, value in (("lr", lr), ("inner_lr", inner_lr), ("clip", clip)):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} = {value} is out of range: expected a number above 0.")
        if unroll < 1 or unroll != int(unroll):
            raise InputError(
                f"unroll = {unroll} is out of range: expected a whole number from 1 on."
            )
        if schedule not in ("constant", "cosine"):
            raise unknown_name("schedule", schedule, ("constant", "cosine"))
        if select_by not in ("loss", "accuracy"):
            raise unknown_name("select_by", select_by, ("loss", "accuracy"))
        if select_by == "accuracy":
            warnings.warn(
                "select_by = accuracy chooses the checkpoint with the labels of the held-out "
                "images, as the paper did. The loss would need none.",
                stacklevel=2,
            )
        self.automatic_optimization = False
        self.strict_loading = False  # the network's frozen weights are not in the checkpoint
        self.method = method
        self.lr, self.inner_lr = lr, inner_lr
        self.unroll, self.reset_network, self.clip = unroll, reset_network, clip
        self.schedule, self.select_by = schedule, select_by
        self._backbone: dict[str, str] = {}
        self._resumed = False
        self._segment: int | None = None
        self._aside: dict[str, Tensor] = {}  # the network of the training, during validation
        self._window = Window({})

    @property
    def network(self) -> nn.Module:
        """The network that the rule moves."""
        return self.method.network

    @property
    def rule(self) -> MGG:
        """The rule that is trained."""
        assert isinstance(self.method.rule, MGG)
        return self.method.rule

    # Training ------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Start from the source network; only the rule is left to the strategy to train."""
        self._check()
        self._resumed = False
        self.method.reset()  # a training that was interrupted may have left it elsewhere
        self._backbone = {
            "name": describe(self.network).name,
            "weights_sha256": weights_hash(self.network),
        }
        self.method.requires_grad_(False)
        self.rule.requires_grad_(True)

    def _check(self) -> None:
        """Refuse or warn of what this training cannot do."""
        if str(self.trainer.precision).startswith("16"):
            raise InputError(
                f"MGGPretraining does not support precision {self.trainer.precision!r}: its "
                "gradients are not scaled. Use 32-true or bf16-mixed."
            )
        if self.trainer.world_size > 1 and batch_norm_layers(self.network):
            warnings.warn(
                "Batch normalisation takes the statistics of each process's share of a batch, so "
                "the rule is not the one that a single process with the whole batch would learn.",
                stacklevel=2,
            )

    def on_fit_start(self) -> None:
        """Let the adapted parameters move, and show the method clean images if it wants them."""
        self._wake()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build Adam for the weights of the rule."""
        optimizer = torch.optim.Adam(self.rule.parameters(), lr=self.lr)
        epochs = self.trainer.max_epochs
        if self.schedule == "constant":
            return optimizer
        if not epochs or epochs < 1:
            raise InputError(
                "schedule = cosine falls over all epochs: set the trainer's max_epochs."
            )
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)]

    def on_train_epoch_start(self) -> None:
        """Start anew: no memory, no moments, no update that waits for its score."""
        self._segment = None

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Move the network by the rule, and train the rule by what the next loss says of that."""
        images, _, segment = _parts(batch)
        if segment != self._segment:
            self._learn()  # from what is left of the segment before
            self._begin(segment)
        self._move()
        loss, grads = self._gradients(images)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        if all_finite(loss, *grads.values()):
            self._window.score(grads)
        else:
            self._window.pending = None
            warnings.warn(
                "A batch gave a loss or a gradient that is not finite; nothing was learnt from it.",
                stacklevel=2,
            )
        is_last = batch_idx + 1 == self.trainer.num_training_batches
        if self._window.scored == self.unroll or is_last:
            self._learn()

    def on_train_epoch_end(self) -> None:
        """Lower the learning rate where it has a schedule."""
        schedule = self.lr_schedulers()
        if isinstance(schedule, LRScheduler):
            schedule.step()

    def on_fit_end(self) -> None:
        """Leave the source network behind; the rule is what was trained."""
        self.method.reset()

    def _begin(self, segment: int) -> None:
        """Start a segment with a new memory, and where asked with the source network."""
        if self.reset_network:
            self.method.reset()
        self._segment = segment
        self._window = Window(self.rule.init(self.method.adapted_parameters))

    def _move(self) -> None:
        """Apply what the rule, as it is now, makes of the last gradient."""
        window, parameters = self._window, self.method.adapted_parameters
        if window.pending is None:
            return
        directions, window.state = self.rule.generate(window.pending, window.state, parameters)
        for name, direction in directions.items():
            change = -self.inner_lr * direction
            window.add(name, change)
            with torch.no_grad():
                parameters[name].add_(change)

    def _gradients(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the method's loss and its gradients, over the batches of all processes."""
        out = self.method.outputs(images)
        if self.trainer.world_size > 1:
            out = self._gathered(out)
        loss = self._required(self.method.loss(out, images))
        parameters = self.method.adapted_parameters
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        grads = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
        if self.trainer.world_size > 1:
            reduce = self.trainer.strategy.reduce
            grads = {name: reduce(grad, reduce_op="mean") for name, grad in grads.items()}
        return loss.detach(), grads

    def _required(self, loss: Tensor | None) -> Tensor:
        """Return the loss of a batch if there is one, else raise."""
        if loss is None:
            raise InputError(
                f"{type(self.method).__name__} has no loss for a batch; no rule learns from that."
            )
        return loss

    def _gathered(self, out: Outputs) -> Outputs:
        """Join the outputs of all processes, so that statistics are those of the whole batch."""
        tensors = {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
        gather: Any = self.all_gather  # its annotation leaves open what a tensor becomes
        joined = {
            name: gather(value, sync_grads=True).flatten(0, 1)
            for name, value in tensors.items()
            if isinstance(value, Tensor)
        }
        return dataclasses.replace(out, **joined)

    def _learn(self) -> None:
        """Take a step on the rule's weights and cut the graph."""
        if self._window.scored:
            optimizer = self.optimizers()
            assert isinstance(optimizer, LightningOptimizer)
            optimizer.zero_grad()
            self.manual_backward(self._window.surrogate)
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.rule.parameters(), self.clip)
            optimizer.step()
        self._window = self._window.cut()

    def _wake(self) -> None:
        """Let parameters move that the strategy must not know of, and prepare the method."""
        for parameter in self.method.adapted_parameters.values():
            parameter.requires_grad_(True)
        if self._resumed or not is_overridden("prepare", self.method, parent=Adapter):
            return
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(datamodule, "clean_batches"):
            raise InputError(
                f"{type(self.method).__name__} looks at clean images first: give a datamodule "
                "with `clean_batches`, such as ShiftedImages."
            )
        precision = self.trainer.precision_plugin
        with torch.inference_mode(False), torch.enable_grad(), precision.forward_context():
            self.method.prepare(
                precision.convert_input(images).to(self.device)
                for images in datamodule.clean_batches()
            )

    # Validation ----------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Make ready where no training has done it."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._wake()

    def on_validation_epoch_start(self) -> None:
        """Put the network of the training aside."""
        moving = self.method.moving_tensors()
        with torch.inference_mode(False):
            self._aside = {name: tensor.detach().clone() for name, tensor in moving.items()}
        self._segment_validated: int | None = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adapt the source network to the next held-out batch."""
        images, labels, segment = _parts(batch)
        if segment != self._segment_validated:
            with torch.inference_mode(False), torch.no_grad():
                self.method.reset()
            self._segment_validated = segment
        logits = self.method.adapt_step(images)
        loss = self._required(self.method.report.loss)
        figures = {"val/loss": loss}
        if (labels >= 0).all():
            figures["val/accuracy"] = (logits.argmax(dim=1) == labels).float().mean()
        elif self.select_by == "accuracy":
            raise InputError("select_by = accuracy needs labels, and a held-out image has none.")
        selection = loss if self.select_by == "loss" else -figures["val/accuracy"]
        self.log_dict(figures, prog_bar=True, batch_size=len(images), sync_dist=True)
        self.log("val/selection", selection, batch_size=len(images), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Take the network of the training back."""
        moving = self.method.moving_tensors()
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in self._aside.items():
                moving[name].copy_(tensor)
        self._aside = {}

    # Checkpoints ---------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the rule and what moved; the network itself is where it came from."""
        moving = {f"method.{name}" for name in self.method.moving_tensors()}
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith("method.network.")]:
            if name not in moving:
                del state[name]
        state["method._extra_state"]["rule_state"] = {}  # begins anew with the next epoch
        checkpoint[CHECKPOINT_KEY] = learned_rule_record(self.rule.options(), self._backbone)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network or another kind of rule.

        Raises:
            InputError: Says what differs.
        """
        record = checkpoint.get(CHECKPOINT_KEY, {})
        ours = learned_rule_record(self.rule.options(), self._backbone)
        if record.get("kind") != ours["kind"]:
            raise InputError(
                "This checkpoint cannot be resumed: it is not one of MGGPretraining. To start from "
                "a trained network, name it as the network of the method."
            )
        different = [key for key in ours if record.get(key) != ours[key]]
        if different:
            raise InputError(
                "This checkpoint cannot be resumed: its "
                + "; its ".join(f"{k} is {record.get(k)}, not {ours[k]}" for k in different)
                + ". Resume with the configuration that wrote it."
            )
        self._resumed = True

    def test_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a rule is validated, or adapts."""
        raise InputError(
            "MGGPretraining cannot test: use `tta validate` for its held-out streams, or `tta "
            "adapt` with the rule for others."
        )


def _parts(batch: Any) -> Batch:
    """Take a batch apart."""
    if not isinstance(batch, list | tuple) or len(batch) != 3:
        raise InputError(
            "MGGPretraining needs batches (images, labels, number of the segment), as "
            "ShiftedImages gives them; this dataloader gives something else."
        )
    images, labels, segment = batch
    return images, labels, int(segment)
