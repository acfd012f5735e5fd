"""Residual networks in plain Flax Linen.

`ResNet` is for ImageNet, with ResNeXt and the wide ResNets among its settings; `CifarResNet` and
`WideResNet` are for images of 32×32.
"""

from collections.abc import Callable, Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd import cpu
from jaxkd.models.layers import ConvBN


def pad_shortcut(x: jax.Array, y: jax.Array, stride: int) -> jax.Array:
    """Every stride-th pixel of `x`, with as many zero channels around as `y` has more."""
    x = x[:, ::stride, ::stride]
    margin = (y.shape[-1] - x.shape[-1]) // 2
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (margin, margin)))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a residual sum.

    Attributes:
      features: output channels.
      stride: of the first convolution.
      shortcut: 'identity', 'project' (a 1×1 convolution; option B of the paper), or 'pad' (no
        parameters; option A).
      bn_momentum: decay of the running BatchNorm statistics.
      dtype: dtype of the computation; parameters are float32.
    """

    features: int
    stride: int = 1
    shortcut: str = 'identity'
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv_bn = functools.partial(ConvBN, bn_momentum=self.bn_momentum, dtype=self.dtype)
        y = conv_bn(self.features, 3, self.stride, name='conv1')(x, train)
        y = conv_bn(self.features, 3, activation=None, name='conv2')(y, train)
        if self.shortcut == 'project':
            x = conv_bn(self.features, 1, self.stride, activation=None, name='shortcut')(x, train)
        elif self.shortcut == 'pad':
            x = pad_shortcut(x, y, self.stride)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """Reduce (1×1), filter (3×3), expand (1×1), and a residual sum.

    Attributes:
      features: output channels.
      inner: channels of the 3×3 convolution.
      groups: of the 3×3 convolution.
      stride: of the 3×3 convolution.
      shortcut: 'identity' or 'project' (a 1×1 convolution).
      bn_momentum: decay of the running BatchNorm statistics.
      dtype: dtype of the computation; parameters are float32.
    """

    features: int
    inner: int
    groups: int = 1
    stride: int = 1
    shortcut: str = 'identity'
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv_bn = functools.partial(ConvBN, bn_momentum=self.bn_momentum, dtype=self.dtype)
        y = conv_bn(self.inner, name='conv1')(x, train)
        y = conv_bn(self.inner, 3, self.stride, groups=self.groups, name='conv2')(y, train)
        y = conv_bn(self.features, activation=None, name='conv3')(y, train)
        if self.shortcut == 'project':
            x = conv_bn(self.features, 1, self.stride, activation=None, name='shortcut')(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet for ImageNet (He et al. 2015, https://arxiv.org/abs/1512.03385).

    A bottleneck's stride is that of its 3×3 convolution ("v1.5"). Groups make it a ResNeXt (Xie et
    al. 2016, https://arxiv.org/abs/1611.05431), a larger `group_width` alone a wide ResNet
    (Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146).

    Attributes:
      depths: blocks of each stage; the widths double from stage to stage.
      bottleneck: whether blocks are bottlenecks, of four times the width.
      groups: of the bottlenecks' 3×3 convolutions.
      group_width: channels of each group in the first stage.
      num_classes: width of the last layer.
      small_images: a 3×3 stem of stride 1 without max-pooling, as is usual for 32×32.
      bn_momentum: decay of the running BatchNorm statistics.
      dtype: dtype of the computation; parameters are float32.
    """

    depths: Sequence[int] = (3, 4, 6, 3)
    bottleneck: bool = True
    groups: int = 1
    group_width: int = 64
    num_classes: int = 1000
    small_images: bool = False
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        common = {'bn_momentum': self.bn_momentum, 'dtype': self.dtype}
        window, stride = (3, 1) if self.small_images else (7, 2)
        x = ConvBN(64, window, stride, name='stem', **common)(x, train)
        if not self.small_images:
            x = cpu.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, depth in enumerate(self.depths, start=1):
            width = 64 * 2 ** (stage - 1)
            if self.bottleneck:
                inner = self.groups * self.group_width * 2 ** (stage - 1)
                block = functools.partial(Bottleneck, 4 * width, inner, self.groups)
            else:
                block = functools.partial(BasicBlock, width)
            for index in range(depth):
                first = index == 0
                x = block(
                    stride=2 if first and stage > 1 else 1,
                    shortcut='project' if first and (stage > 1 or self.bottleneck) else 'identity',
                    name=f'stage{stage}_block{index}',
                    **common,
                )(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


class CifarResNet(nn.Module):
    """ResNet for CIFAR (section 4.2 of He et al. 2015, https://arxiv.org/abs/1512.03385).

    Three stages of 16, 32 and 64 channels, with shortcuts that have no parameters (option A).

    Attributes:
      depth: layers with weights, 6n + 2 for n blocks in each stage.
      num_classes: width of the last layer.
      bn_momentum: decay of the running BatchNorm statistics.
      dtype: dtype of the computation; parameters are float32.
    """

    depth: int = 20
    num_classes: int = 10
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        common = {'bn_momentum': self.bn_momentum, 'dtype': self.dtype}
        x = ConvBN(16, 3, name='stem', **common)(x, train)
        for stage, width in enumerate((16, 32, 64), start=1):
            for index in range((self.depth - 2) // 6):
                shrink = index == 0 and stage > 1
                x = BasicBlock(
                    width,
                    stride=2 if shrink else 1,
                    shortcut='pad' if shrink else 'identity',
                    name=f'stage{stage}_block{index}',
                    **common,
                )(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3×3 convolutions, and a residual sum.

    Attributes:
      features: output channels.
      stride: of the first convolution.
      project: whether the shortcut is a 1×1 convolution of the activated input.
      dropout_rate: dropout between the convolutions, in training.
      bn_momentum: decay of the running BatchNorm statistics.
      dtype: dtype of the computation; parameters are float32.
    """

    features: int
    stride: int = 1
    project: bool = False
    dropout_rate: float = 0.0
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = functools.partial(nn.Conv, self.features, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.bn_momentum,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        y = nn.relu(norm(name='bn1')(x))
        if self.project:
            x = conv((1, 1), strides=self.stride, name='shortcut')(y)
        y = conv((3, 3), strides=self.stride, padding=1, name='conv1')(y)
        y = nn.relu(norm(name='bn2')(y))
        y = nn.Dropout(self.dropout_rate, deterministic=not train)(y)
        return x + conv((3, 3), padding=1, name='conv2')(y)


class WideResNet(nn.Module):
    """Wide ResNet for CIFAR (Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146).

    Attributes:
      depth: 6n + 4 for n blocks in each of the three stages.
      widening: multiplier of the stages' 16, 32 and 64 channels (the paper's k).
      num_classes: width of the last layer.
      dropout_rate: dropout inside the blocks, in training; 0.3 in the paper, where it is used.
      bn_momentum: decay of the running BatchNorm statistics.
      dtype: dtype of the computation; parameters are float32.
    """

    depth: int = 28
    widening: int = 10
    num_classes: int = 10
    dropout_rate: float = 0.0
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        common = {'bn_momentum': self.bn_momentum, 'dtype': self.dtype}
        x = nn.Conv(16, (3, 3), padding=1, use_bias=False, dtype=self.dtype, name='stem')(x)
        for stage, width in enumerate((16, 32, 64), start=1):
            for index in range((self.depth - 4) // 6):
                first = index == 0
                x = PreActivationBlock(
                    width * self.widening,
                    stride=2 if first and stage > 1 else 1,
                    project=first and (stage > 1 or self.widening > 1),
                    dropout_rate=self.dropout_rate,
                    name=f'stage{stage}_block{index}',
                    **common,
                )(x, train)
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=self.bn_momentum,
            epsilon=1e-5,
            dtype=self.dtype,
            name='bn',
        )(x)
        x = jnp.mean(nn.relu(x), axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    'resnet20': functools.partial(CifarResNet, depth=20),
    'resnet56': functools.partial(CifarResNet, depth=56),
    'resnet110': functools.partial(CifarResNet, depth=110),
    'wide_resnet16_4': functools.partial(WideResNet, depth=16, widening=4),
    'wide_resnet28_10': functools.partial(WideResNet, depth=28, widening=10),
    'resnet18': functools.partial(ResNet, depths=(2, 2, 2, 2), bottleneck=False),
    'resnet34': functools.partial(ResNet, depths=(3, 4, 6, 3), bottleneck=False),
    'resnet50': functools.partial(ResNet, depths=(3, 4, 6, 3)),
    'resnet101': functools.partial(ResNet, depths=(3, 4, 23, 3)),
    'resnet152': functools.partial(ResNet, depths=(3, 8, 36, 3)),
    'resnext50_32x4d': functools.partial(ResNet, groups=32, group_width=4),
    'wide_resnet50_2': functools.partial(ResNet, group_width=128),
}
