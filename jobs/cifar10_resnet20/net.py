"""ResNet-20 for CIFAR-10, from He et al. 2015 (arXiv:1512.03385), section 4.2: 6n+2 layers, no weights in shortcuts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Block", "ResNet", "resnet20"]


class Block(nn.Module):
    """Residual block of two 3×3 convolutions. Its shortcut subsamples, and pads new channels with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Compute `[n, outputs, h / stride, w / stride]` from `[n, inputs, h, w]`."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Keep every `stride`-th pixel, and add the new channels as zeros."""
        # The published weights were trained with half of the zero channels before the others, and half behind them.
        before = self.new_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


class ResNet(nn.Module):
    """Residual network of three stages of `n` blocks, with 16, 32 and 64 channels of 32², 16² and 8² pixels."""

    def __init__(self, n: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = make_stage(n, 16, 16, stride=1)
        self.layer2 = make_stage(n, 16, 32, stride=2)
        self.layer3 = make_stage(n, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits `[n, num_classes]` from normalised images `[n, 3, 32, 32]`."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.mean(x, dim=(2, 3)))
        return logits


def make_stage(n: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, outputs, stride), *(Block(outputs, outputs, 1) for _ in range(n - 1)))


def resnet20(num_classes: int = 10) -> ResNet:
    """Build the network of 20 layers: a convolution, three stages of three blocks, and a linear layer."""
    return ResNet(3, num_classes)
