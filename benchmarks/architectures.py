"""Models of the benchmarks. A job file in this folder can name them: `architectures:mobilenet`."""

from __future__ import annotations

from torch import nn

__all__ = ["few_layers", "mobilenet", "resnet50"]


def mobilenet() -> nn.Module:
    """Build MobileNetV3-small: float `[n, 3, h, w]` to logits `[n, 1000]`."""
    from torchvision.models import mobilenet_v3_small

    module: nn.Module = mobilenet_v3_small()
    return module


def resnet50() -> nn.Module:
    """Build ResNet-50, with so much arithmetic that decoding hardly counts on a CPU."""
    from torchvision.models import resnet50

    module: nn.Module = resnet50()
    return module


def few_layers() -> nn.Module:
    """Build three layers, with so little arithmetic that only decoding counts."""
    return nn.Sequential(
        nn.Conv2d(3, 16, kernel_size=7, stride=8),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * 16, 1000),
    )
