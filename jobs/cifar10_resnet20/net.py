"""ResNet-20 for CIFAR (He et al. 2015, section 4.2): 6n+2 layers, no parameters in the shortcuts (option A)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Block", "ResNet", "resnet20"]


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut, which drops every other pixel and fills new channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """`[n, inputs, h, w]` to `[n, outputs, h / stride, w / stride]`."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        # Half of the zeros before and half behind, as the published weights were trained.
        before = self.new_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


class ResNet(nn.Module):
    """Three stages of `n` blocks, of 16, 32 and 64 channels at 32, 16 and 8 pixels."""

    def __init__(self, n: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(n, 16, 16, stride=1)
        self.layer2 = stage(n, 16, 32, stride=2)
        self.layer3 = stage(n, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `[n, 3, 32, 32]` to logits `[n, num_classes]`."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.mean(x, dim=(2, 3)))
        return logits


def stage(n: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, outputs, stride), *(Block(outputs, outputs, 1) for _ in range(n - 1)))


def resnet20(num_classes: int = 10) -> ResNet:
    """20 layers: a convolution, three stages of three blocks, a linear layer."""
    return ResNet(3, num_classes)
