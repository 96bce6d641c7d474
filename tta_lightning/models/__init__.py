"""Networks: images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, C]``, normalisation inside."""

from tta_lightning.models.byol import BYOLHeads, Embedder, Embedding
from tta_lightning.models.classifier import Classifier, ModelInfo, describe, weights_hash
from tta_lightning.models.convnet import SmallConvNet
from tta_lightning.models.heads import FeatureCapture, Head, capture_features, find_head
from tta_lightning.models.loading import checkpoint_record, load_model
from tta_lightning.models.resnet26_gn import ResNet26GN
from tta_lightning.models.resnet_cifar import CIFARResNet

__all__ = [
    "BYOLHeads",
    "CIFARResNet",
    "Classifier",
    "Embedder",
    "Embedding",
    "FeatureCapture",
    "Head",
    "ModelInfo",
    "ResNet26GN",
    "SmallConvNet",
    "capture_features",
    "checkpoint_record",
    "describe",
    "find_head",
    "load_model",
    "weights_hash",
]
