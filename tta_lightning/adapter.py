"""What every test-time adaptation method is: a network, an update rule and a few beats."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn

from tta_lightning.adapt_only import AdaptOnly
from tta_lightning.contract import (
    Outputs,
    StepReport,
    Term,
    check_method,
    keep_counter,
    logits_of,
    map_tensors,
    not_finite,
    restricted,
    tensors_in,
    unobserved,
    writable,
)
from tta_lightning.describe import constructor_arguments
from tta_lightning.errors import InputError
from tta_lightning.functional import all_finite, keep_float32
from tta_lightning.models.classifier import describe as model_info
from tta_lightning.models.heads import Head, capture_features, find_head, head_or_none
from tta_lightning.models.loading import load_model
from tta_lightning.models.norms import (
    batch_norm_layers,
    norm_layers,
    use_batch_statistics,
    use_source_statistics,
)
from tta_lightning.rules import SGD, RuleState, UpdateRule


class Adapter(AdaptOnly):
    """A network that learns from the unlabelled images it predicts.

    A method is a subclass that overrides one of these beats, in the order in which they run:

    * :meth:`configure`: what may move, and how normalisation layers behave.
    * :meth:`prepare`: look at clean, unlabelled images once, before the stream.
    * :meth:`loss`: the objective of one batch, or None to learn nothing from it.
    * :meth:`adapt_step`: the whole step, for methods that are more than a loss.

    Everything that adaptation changes is named by :meth:`moving_tensors`, or is ``rule_state`` or
    ``memory``, where a method keeps tensors by name that exist only once a batch was seen.
    :meth:`reset` restores the first bit for bit, makes the second anew and empties the third. All
    are part of the ``state_dict``. The adapter works on the network it was given, in place.

    Args:
        network: Images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``: a module, or what
            :func:`~tta_lightning.models.load_model` accepts, such as
            ``"timm:resnet50_gn.a1h_in1k"``.
        rule: How gradients become updates; None for ``SGD(lr=2.5e-4, momentum=0.9)``.

    Raises:
        InputError: The network cannot be built.
    """

    predicts = "before update"  # what a prediction knows of its batch; see the method
    episodic = False  # whether it learns from each image by itself, and forgets

    def __init__(
        self, network: str | dict[str, Any] | nn.Module, rule: UpdateRule | None = None
    ) -> None:
        super().__init__()
        self.network = load_model(network)
        self.rule = SGD(lr=2.5e-4, momentum=0.9) if rule is None else rule
        self.rule_state: RuleState = {}
        self.memory: RuleState = {}
        self.terms: list[Term] = []
        self.report = StepReport()
        self.phase: Callable[[str], AbstractContextManager[None]] = unobserved
        self._adapted: dict[str, nn.Parameter] = {}
        self._source: dict[str, Tensor] | None = None
        self.classes: Tensor | None = None
        self._head: Head | None = None
        self.register_load_state_dict_pre_hook(_remember_source_first)  # type: ignore[no-untyped-call]

    # The beats -----------------------------------------------------------------------------------

    def configure(self) -> None:
        """Choose what may move and how normalisation behaves.

        Default: the affine parameters of every normalisation layer may move; batch normalisation
        uses the statistics of the batch (Tent's setting).

        Raises:
            InputError: The network has no normalisation layer with affine parameters.
        """
        layers = norm_layers(self.network)
        if not layers:
            raise InputError(
                f"{type(self).__name__} moves the affine parameters of normalisation layers, but "
                f"{model_info(self.network).name} has none. Use a network with batch, group or "
                "layer normalisation, or a method that does not need them."
            )
        for layer in layers.values():
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(True)
        use_batch_statistics(batch_norm_layers(self.network).values())

    def prepare(self, clean: Iterable[Tensor]) -> None:
        """Look at clean images before the stream starts; the default needs none.

        Args:
            clean: Batches of unlabelled images ``[B, 3, H, W]`` in [0, 1].
        """

    def loss(self, out: Outputs, images: Tensor) -> Tensor | None:
        """Compute the objective of one batch; the default learns nothing.

        Args:
            out: The forward pass on ``images``, with its graph.
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            A scalar to be minimised, or None to learn nothing from this batch.
        """
        return None

    def adapt_step(self, images: Tensor) -> Tensor:
        """Predict a batch, then learn from it.

        Works in any loop, whether or not gradients are enabled around it.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits ``[B, C]`` of the network as it was before the update, without graph.
        """
        self.ready()
        with torch.inference_mode(False), torch.enable_grad():
            images = writable(images)
            with self.phase("inference"):
                out = self.outputs(images)
            with self.phase("update"):
                self.report = self.learn(out, images)
        return out.logits.detach()

    def moving_tensors(self) -> dict[str, Tensor]:
        """Name every tensor that adaptation changes, the state of the rule excepted.

        Default: the parameters that :meth:`configure` lets move, and the buffers that a method
        registers on itself. A method with more (running statistics, a teacher) adds it here.

        Returns:
            Name in the ``state_dict`` to the tensor itself.
        """
        own_state = dict(self.named_buffers(recurse=False))
        return {**{f"network.{name}": p for name, p in self._adapted.items()}, **own_state}

    # What methods use ----------------------------------------------------------------------------

    def outputs(self, images: Tensor) -> Outputs:
        """Run the network once.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].

        Returns:
            Logits restricted to the classes of the stream, and the features of the head.
        """
        logits, features = self._logits_and_features(images)
        return Outputs(restricted(logits, self.classes), features)

    def learn(self, out: Outputs, images: Tensor) -> StepReport:
        """Minimise :meth:`loss` and the attached terms by one step of the rule.

        Args:
            out: A forward pass with its graph.
            images: The images it was made from.

        Returns:
            What happened.
        """
        loss = self.loss(out, images)
        if loss is None:
            return StepReport(reason="the method learns nothing from this batch")
        return self.descend(self.with_terms(loss, out))

    def with_terms(self, loss: Tensor, out: Outputs) -> Tensor:
        """Add what is attached to a loss.

        Args:
            loss: The method's own, a scalar.
            out: The forward pass that it was computed from.

        Returns:
            Their sum.
        """
        for term in self.terms:
            loss = loss + term(out, self.head)
        return loss

    def descend(self, loss: Tensor) -> StepReport:
        """Move the adapted parameters by one step of the rule, if loss and gradients are finite.

        Args:
            loss: A scalar with its graph.

        Returns:
            What happened. With a NaN or an infinite number nothing moves, the state of the rule
            included, and a warning says so.
        """
        grads = self.gradients(loss)
        if grads is None or not self.move(grads):
            return not_finite(loss)
        return StepReport(updated=True, loss=loss.detach())

    def gradients(self, loss: Tensor) -> dict[str, Tensor] | None:
        """Differentiate a loss by the adapted parameters.

        Args:
            loss: A scalar with its graph, which is used up.

        Returns:
            Gradients by name, of the parameters that the loss depends on; None if the loss or one
            of them is not finite.

        Raises:
            InputError: The loss depends on none of them.
        """
        names, parameters = list(self._adapted), list(self._adapted.values())
        if not parameters or not loss.requires_grad:
            raise InputError(
                f"The loss of {type(self).__name__} does not depend on any parameter that may "
                "move. Let configure() set requires_grad on some that take part in the forward "
                "pass, and see that the network does not switch gradients off."
            )
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        grads = {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}
        return grads if all_finite(loss.detach(), *grads.values()) else None

    @torch.no_grad()
    def move(self, grads: Mapping[str, Tensor]) -> bool:
        """Take one step of the rule along gradients of adapted parameters, by name.

        Returns:
            Whether it was taken: not where a weight or the state of the rule would overflow.
        """
        updates, state = self.rule.update(dict(grads), self.rule_state, self._adapted)
        moved = {name: (p := self._adapted[name]).add(u).to(p) for name, u in updates.items()}
        if not all_finite(*moved.values(), *tensors_in(state)):
            return False
        for name, tensor in moved.items():
            self._adapted[name].copy_(tensor)
        self.rule_state = state
        return True

    @property
    def head(self) -> Head:
        """The final linear map of the network.

        Raises:
            InputError: The network does not end in one linear map.
        """
        return find_head(self.network) if self._head is None else self._head

    @property
    def adapted_parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that may move, by their name in the network."""
        self.ready()
        return self._adapted

    # Life cycle ----------------------------------------------------------------------------------

    def ready(self) -> None:
        """Configure the network and remember the source model; does nothing the second time.

        Called by everything that adapts, so that weights loaded into the network before count as
        the source model.

        Raises:
            InputError: Another adapter has moved this network and was not reset.
        """
        reference = _OWNERS.get(self.network)
        owner = None if reference is None else reference()
        if owner is self:
            return
        if owner is not None and owner._has_moved():
            raise InputError(
                f"This network is still adapted by another method ({type(owner).__name__}). Call "
                "its reset() first, or give each method its own copy: copy.deepcopy(network)."
            )
        if any(parameter.is_inference() for parameter in self.network.parameters()):
            raise InputError(
                "The network was made under torch.inference_mode(), so its parameters can never "
                "move. Make it outside."
            )
        self.requires_grad_(False)
        super().train(False)  # no dropout; batch normalisation is for configure() to choose
        use_source_statistics(batch_norm_layers(self.network).values())
        self.configure()
        _OWNERS[self.network] = weakref.ref(self)
        if self._source is not None:
            return
        self._adapted = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        self._head = head_or_none(self.network)
        self._source = {name: t.detach().clone() for name, t in self.moving_tensors().items()}
        self.rule_state = self.rule.init(self._adapted)

    def _has_moved(self) -> bool:
        source = self._source or {}
        moving = self.moving_tensors()
        return any(not torch.equal(t.to(moving[name]), moving[name]) for name, t in source.items())

    def reset(self) -> None:
        """Return, bit for bit, to the source model with a fresh state of the rule."""
        self.ready()
        assert self._source is not None
        with torch.no_grad():
            for name, tensor in self.moving_tensors().items():
                tensor.copy_(self._source[name])
            self.rule_state = self.rule.init(self._adapted)
        self.memory = {}
        self.report = StepReport()

    def restrict_classes(self, classes: Sequence[int] | None) -> None:
        """Keep only some of the network's outputs, before any entropy and any prediction.

        For streams that hold a subset of the classes (ImageNet-R, ImageNet-A).

        Args:
            classes: Positions among the network's outputs, in the order of the stream's labels;
                None for all. The attribute ``classes`` holds them, ``[C]`` int64.
        """
        self.classes = None if classes is None else torch.tensor(list(classes), dtype=torch.long)

    def describe(self) -> dict[str, Any]:
        """Say what method this is, as plain values for a manifest."""
        self.ready()
        return {
            "name": type(self).__name__,
            "predicts": self.predicts,
            "episodic": self.episodic,
            "hyper_parameters": constructor_arguments(self, skip=("network", "rule")),
            "rule": self.rule.describe() if self._adapted else None,
        }

    def forward(self, images: Tensor) -> Tensor:
        """Predict without learning: images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``."""
        self.ready()
        return self.outputs(images).logits

    def train(self, mode: bool = True) -> Self:
        """Keep the mode that :meth:`configure` chose: ``eval()`` would switch statistics back."""
        return self if self._source is not None else super().train(mode)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the rule and the memory, for the ``state_dict``."""
        own = {"rule_state": self.rule_state, "memory": self.memory}
        return {"method": type(self).__name__, **own}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`get_extra_state` returned, onto the network's device."""
        check_method(state, type(self).__name__)
        device = next((p.device for p in self.network.parameters()), None)
        self.memory = map_tensors(lambda tensor: tensor.to(device), state["memory"])
        if state["rule_state"]:
            self.rule_state = map_tensors(lambda tensor: tensor.to(device), state["rule_state"])

    def _logits_and_features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._head is None:
            return logits_of(self.network, images), None
        with capture_features(self._head) as captured:
            logits = logits_of(self.network, images)
        if not captured.ran or logits.shape != (len(captured.features), len(self._head.weight)):
            return logits, None  # another layer than the one that looked like the head
        return logits, captured.features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move rule state and memory along; the memory keeps float32 at least, as averages do."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.rule_state = map_tensors(lambda t: keep_counter(fn(t), t), self.rule_state)
            self.memory = map_tensors(keep_float32(fn), self.memory)
            if self._source is not None:  # it moves, but keeps its precision
                self._source = {n: t.to(fn(t).device) for n, t in self._source.items()}
        return self


_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Adapter]] = weakref.WeakKeyDictionary()
"""The adapter that configured each network last: one network serves one method at a time."""


def _remember_source_first(module: nn.Module, *args: Any) -> None:
    """Before a mid-stream state is loaded, remember the source model that reset() returns to."""
    assert isinstance(module, Adapter)
    module.ready()
