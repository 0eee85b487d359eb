"""Layers of a classifier that turn features into class scores, by the conventions of its library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["find_huggingface_layers", "find_timm_layers", "find_torchvision_layers"]

_TORCHVISION_HEADS = ("fc", "classifier", "heads", "head")
_HUGGINGFACE_HEADS = ("classifier", "cls_classifier", "distillation_classifier", "classifier_distill")

_PROJECTION_WIDTHS = {384, 512, 640, 768, 1024, 1152, 1280}  # `num_classes` of all such models that timm publishes


def find_torchvision_layers(module: nn.Module) -> tuple[str, ...]:
    """Find the last linear layer of a torchvision classifier; none in other models, such as detectors.

    Example: `fc` of a ResNet, `classifier.6` of a VGG, `heads.head` of a ViT; nothing of a SqueezeNet, whose last layer
    is a convolution.
    """
    from torch import nn

    head = next((name for name in _TORCHVISION_HEADS if getattr(module, name, None) is not None), None)
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    in_head = [name for name in linear if name.split(".")[0] == head]
    return tuple(in_head[-1:])


def find_timm_layers(module: nn.Module) -> tuple[str, ...]:
    """Find the classifier of a timm model, of two heads both; none if it was built without, or projects features."""
    from torch import nn

    config: Any = getattr(module, "pretrained_cfg", None) or {}
    published = config.get("num_classes")
    # The last layer of the image towers of CLIP and its like is a projection to the space of their texts.
    if published in _PROJECTION_WIDTHS and published == getattr(module, "num_classes", None):
        return ()
    get_classifier: Any = getattr(module, "get_classifier", None)
    classifier = None if get_classifier is None else get_classifier()
    heads = classifier if isinstance(classifier, tuple | list) else (classifier,)
    names = {id(layer): name for name, layer in module.named_modules()}
    return tuple(names[id(head)] for head in heads if id(head) in names and not isinstance(head, nn.Identity))


def find_huggingface_layers(module: nn.Module) -> tuple[str, ...]:
    """Find the classifiers of a model of transformers for image classification; none if they have another name."""
    from torch import nn

    children = [(name, layer) for name, layer in module.named_children() if name in _HUGGINGFACE_HEADS]
    return tuple(name for name, layer in children if not isinstance(layer, nn.Identity))
