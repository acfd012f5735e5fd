"""Networks of `jaxkd.models` in PyTorch, layer for layer, for the benchmarks to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

# Kernel size, expansion, output channels, repeats of the stages.
MOBILENET_V2 = (
    (3, 1, 16, 1),
    (3, 6, 24, 2),
    (3, 6, 32, 3),
    (3, 6, 64, 4),
    (3, 6, 96, 3),
    (3, 6, 160, 3),
    (3, 6, 320, 1),
)
EFFICIENTNET_B0 = (
    (3, 1, 16, 1),
    (3, 6, 24, 2),
    (5, 6, 40, 2),
    (3, 6, 80, 3),
    (5, 6, 112, 3),
    (5, 6, 192, 4),
    (3, 6, 320, 1),
)


def build(name: str, channels: int, num_classes: int, **arguments: Any) -> nn.Module:
    """The network of that name in `jaxkd.models`, for images of so many channels."""
    builders = {
        'mobilenet_v2': lambda **how: inverted(MOBILENET_V2, nn.ReLU6, False, channels, **how),
        'efficientnet_b0': lambda **how: inverted(EFFICIENTNET_B0, nn.SiLU, True, channels, **how),
        'resnet18': lambda: resnet((2, 2, 2, 2), basic_block, channels),
        'resnet50': lambda: resnet((3, 4, 6, 3), bottleneck, channels),
        'vgg16_bn': lambda: vgg((2, 2, 3, 3, 3), channels),
    }
    layers, width = builders[name](**arguments)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)]
    return nn.Sequential(*layers, *head)


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = nn.ReLU,
    bias: bool = False,
) -> list[nn.Module]:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(outputs),
    ]
    return [*layers, *([activation(inplace=True)] if activation else [])]


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int, activation: type[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            activation(inplace=True),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.layers(x)


class Residual(nn.Module):
    """A sum of two paths, and what comes after it."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        shortcut: Sequence[nn.Module] = (),
        activation: nn.Module | None = None,
    ):
        super().__init__()
        self.layers, self.shortcut = nn.Sequential(*layers), nn.Sequential(*shortcut)
        self.activation = activation or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.layers(x) + self.shortcut(x))


def inverted(
    stages: Sequence[tuple[int, int, int, int]],
    activation: type[nn.Module],
    squeeze_excite: bool,
    channels: int,
    stem_stride: int = 2,
    strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1),
) -> tuple[list[nn.Module], int]:
    """MobileNetV2's and EfficientNet's inverted residuals: layers, and the last width."""
    layers = conv_bn(channels, 32, 3, stem_stride, activation=activation)
    inputs = 32
    for (kernel, expansion, outputs, repeats), stage_stride in zip(stages, strides, strict=True):
        for repeat in range(repeats):
            stride = stage_stride if repeat == 0 else 1
            hidden = inputs * expansion
            block = [
                *(conv_bn(inputs, hidden, activation=activation) if expansion != 1 else []),
                *conv_bn(hidden, hidden, kernel, stride, hidden, activation),
                *([SqueezeExcite(hidden, inputs // 4, activation)] if squeeze_excite else []),
                *conv_bn(hidden, outputs, activation=None),
            ]
            residual = stride == 1 and inputs == outputs
            layers += [Residual(block)] if residual else block
            inputs = outputs
    return [*layers, *conv_bn(inputs, 1280, activation=activation)], 1280


def basic_block(inputs: int, width: int, stride: int) -> tuple[nn.Module, int]:
    layers = [*conv_bn(inputs, width, 3, stride), *conv_bn(width, width, 3, activation=None)]
    return _residual(layers, inputs, width, stride), width


def bottleneck(inputs: int, width: int, stride: int) -> tuple[nn.Module, int]:
    layers = [
        *conv_bn(inputs, width),
        *conv_bn(width, width, 3, stride),
        *conv_bn(width, 4 * width, activation=None),
    ]
    return _residual(layers, inputs, 4 * width, stride), 4 * width


def _residual(layers: list[nn.Module], inputs: int, outputs: int, stride: int) -> nn.Module:
    same = stride == 1 and inputs == outputs
    shortcut = [] if same else conv_bn(inputs, outputs, 1, stride, activation=None)
    return Residual(layers, shortcut, nn.ReLU(inplace=True))


def resnet(depths: Sequence[int], block: Any, channels: int) -> tuple[list[nn.Module], int]:
    layers = [*conv_bn(channels, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, depth in enumerate(depths):
        for index in range(depth):
            stride = 2 if index == 0 and stage > 0 else 1
            layer, inputs = block(inputs, 64 * 2**stage, stride)
            layers.append(layer)
    return layers, inputs


def vgg(depths: Sequence[int], channels: int) -> tuple[list[nn.Module], int]:
    layers: list[nn.Module] = []
    inputs = channels
    for depth, width in zip(depths, (64, 128, 256, 512, 512), strict=True):
        for _ in range(depth):
            layers += conv_bn(inputs, width, 3, bias=True)
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return layers, inputs
