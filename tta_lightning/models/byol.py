"""Projector and predictor of BYOL beside a classifier's head, as MT3 has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from tta_lightning.errors import InputError, unknown_name
from tta_lightning.models.classifier import ModelInfo, describe
from tta_lightning.models.heads import Head, capture_features, find_head
from tta_lightning.models.loading import load_model
from tta_lightning.models.norms import batch_norm_layers, use_group_norm
from tta_lightning.models.resnet26_gn import initialise


class Embedding(NamedTuple):
    """What a network with :class:`BYOLHeads` says of images.

    Attributes:
        logits: ``[B, C]``, of the classifier.
        features: ``[B, D]``, what enters its head and the projector.
        projections: ``[B, P]``, of the projector: what a prediction aims at.
        predictions: ``[B, P]``, of the predictor, which reads the projections.
    """

    logits: Tensor
    features: Tensor
    projections: Tensor
    predictions: Tensor


class BYOLHeads(nn.Module):
    """A classifier with a projector and a predictor on the features that enter its head.

    Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, https://arxiv.org/abs/2006.07733, in
    the sizes of MT3 (https://arxiv.org/abs/2103.16201): two layers with a ReLU between them each,
    no normalisation. On :class:`~tta_lightning.models.ResNet26GN` this is the published network:
    110 tensors, 1,662,378 parameters. As a module it maps images to the backbone's logits, so it
    stands wherever a classifier does.

    Args:
        backbone: What :func:`~tta_lightning.models.load_model` accepts, ending in a linear head.
        num_classes: Number of logits, as in ``load_model``.
        hidden: Width of the layer inside projector and predictor.
        projection: Width P of what they give.
        batch_norm: A step on views of one image cannot use statistics of the batch. ``refuse``
            networks with batch normalisation, or put a ``group`` normalisation in the place of
            each: its affine parameters are kept, the running statistics are lost, so that the
            network has to be trained anew.

    Raises:
        InputError: The backbone has batch normalisation, BYOL heads already, or no linear head.
    """

    def __init__(
        self,
        backbone: str | dict[str, Any] | nn.Module,
        num_classes: int | None = None,
        hidden: int = 256,
        projection: int = 128,
        batch_norm: Literal["refuse", "group"] = "refuse",
    ) -> None:
        super().__init__()
        for name, width in (("hidden", hidden), ("projection", projection)):
            if width < 1:
                raise InputError(f"{name} = {width} is out of range: expected 1 or more.")
        if batch_norm not in ("refuse", "group"):
            raise unknown_name("batch_norm", batch_norm, ("refuse", "group"))
        self.backbone = load_model(backbone, num_classes=num_classes)
        if any(isinstance(module, BYOLHeads) for module in self.backbone.modules()):
            raise InputError(
                f"{describe(self.backbone).name} has BYOL heads already, which new ones would "
                "hide. Give it as the network itself."
            )
        if batch_norm == "group":
            use_group_norm(self.backbone)
        _refuse_batch_norm(self.backbone)
        self._options = {"hidden": hidden, "projection": projection, "batch_norm": batch_norm}
        width = find_head(self.backbone).weight.shape[1]
        self.projector = _perceptron(width, hidden, projection)
        self.predictor = _perceptron(projection, hidden, projection)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``."""
        logits: Tensor = self.backbone(images)
        return logits

    def get_classifier(self) -> nn.Module:
        """Return the head of the classifier."""
        return find_head(self.backbone).module

    @property
    def info(self) -> ModelInfo:
        """What is known of the backbone, which normalises images itself."""
        info = describe(self.backbone)
        spec = None
        if info.spec is not None:
            options = {"backbone": dict(info.spec), **self._options}
            spec = {"class_path": "tta_lightning.models.BYOLHeads", "init_args": options}
        unnormalised = ModelInfo(name="")
        return replace(
            info,
            name=f"BYOLHeads({info.name})",
            mean=unnormalised.mean,
            std=unnormalised.std,
            spec=spec,
        )


class Embedder(nn.Module):
    """Run a network for everything that its heads give.

    A module of its own so that ``torch.func.functional_call`` can exchange all parameters, which
    are named as in a module that keeps the network as ``network``.

    Args:
        network: Has :class:`BYOLHeads` inside.

    Raises:
        InputError: It has none.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._heads = [find_byol_heads(network)]  # a list: they are part of the network already
        self._head = find_head(network)

    def forward(self, images: Tensor) -> Embedding:
        """Embed images ``[B, 3, H, W]`` in [0, 1]."""
        heads = self._heads[0]
        with capture_features(self._head) as captured:
            logits = self.network(images)
        projections = heads.projector(captured.features)
        return Embedding(logits, captured.features, projections, heads.predictor(projections))

    @property
    def head(self) -> Head:
        """The head of the classifier."""
        return self._head

    def adapted(self) -> list[str]:
        """Name the parameters that self-supervision moves: all but those of the classifier."""
        fixed = {id(parameter) for parameter in self._head.module.parameters()}
        return [
            name
            for name, parameter in self.named_parameters()
            if id(parameter) not in fixed and parameter.is_floating_point()
        ]


def find_byol_heads(network: nn.Module) -> BYOLHeads:
    """Find the projector and the predictor of a network.

    Raises:
        InputError: It has none.
    """
    for module in network.modules():
        if isinstance(module, BYOLHeads):
            return module
    raise InputError(
        f"The network {describe(network).name} has no BYOL heads, and self-supervision needs "
        "projector and predictor. Give a checkpoint of MT3 or of JointTraining; or, to train one, "
        "wrap it: {spec: tta_lightning.models.BYOLHeads, backbone: {spec: NETWORK}}."
    )


def _refuse_batch_norm(backbone: nn.Module) -> None:
    layers = batch_norm_layers(backbone)
    if layers:
        raise InputError(
            f"{describe(backbone).name} has {len(layers)} batch normalisation layers, the first of "
            f"them {next(iter(layers))!r}. The step is on views of one image, and statistics of "
            "such a batch say nothing. Take a network with group or layer normalisation, such "
            "as ResNet26GN, or set batch_norm: group to exchange them and train the network anew."
        )


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    return layers.apply(initialise)
