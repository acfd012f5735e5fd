"""ShuffleNet in plain Flax Linen.

Version 1: Zhang et al. 2017, https://arxiv.org/abs/1707.01083.
Version 2: Ma et al. 2018, https://arxiv.org/abs/1807.11164.
"""

from collections.abc import Callable, Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd import cpu
from jaxkd.models.layers import ConvBN

# Units of the three stages, in both versions.
REPEATS = (4, 8, 4)


def shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Deals the channels of each group out to all groups."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, groups, c // groups).swapaxes(3, 4).reshape(b, h, w, c)


def max_pool(x: jax.Array, stride: int) -> jax.Array:
    """The largest of each 3×3 window; the image itself for a stride of 1."""
    if stride == 1:
        return x
    return cpu.max_pool(x, (3, 3), (stride, stride), padding=((1, 1), (1, 1)))


class UnitV1(nn.Module):
    """Reduce (grouped 1×1), shuffle, filter (depthwise 3×3), widen (grouped 1×1).

    Attributes:
        features: output channels.
        stride: of the filter.
        join: whether the pooled input is joined to the result, rather than added.
        groups: of the 1×1 convolutions.
        reduce_groups: of the first of them.
        bn_momentum: decay of the running BatchNorm statistics.
        dtype: dtype of the computation; parameters are float32.
    """

    features: int
    stride: int
    join: bool
    groups: int
    reduce_groups: int
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv_bn = functools.partial(ConvBN, bn_momentum=self.bn_momentum, dtype=self.dtype)
        linear = functools.partial(conv_bn, activation=None)
        y = conv_bn(self.features // 4, groups=self.reduce_groups, name='reduce')(x, train)
        y = shuffle(y, self.groups)
        c = y.shape[-1]
        y = linear(c, 3, self.stride, groups=c, name='depthwise')(y, train)
        if not self.join:
            return nn.relu(x + linear(x.shape[-1], groups=self.groups, name='widen')(y, train))
        y = linear(self.features - x.shape[-1], groups=self.groups, name='widen')(y, train)
        x = nn.avg_pool(x, (3, 3), (self.stride, self.stride), padding=((1, 1), (1, 1)))
        return nn.relu(jnp.concatenate([x, y], axis=-1))


class ShuffleNetV1(nn.Module):
    """ShuffleNetV1, 1.0x with three groups by default.

    Attributes:
        num_classes: width of the last layer.
        groups: of the 1×1 convolutions.
        channels: widths of the three stages; the paper's table 1 has them for other groups.
        stem_stride: stride of the first convolution.
        pool_stride: stride of the max pooling after it; 1 for no pooling.
        strides: stride of the first unit of each stage. The paper's values divide the image's
            sides by 32.
        bn_momentum: decay of the running BatchNorm statistics.
        dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int = 1000
    groups: int = 3
    channels: Sequence[int] = (240, 480, 960)
    stem_stride: int = 2
    pool_stride: int = 2
    strides: Sequence[int] = (2, 2, 2)
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        common = {'bn_momentum': self.bn_momentum, 'dtype': self.dtype}
        x = ConvBN(24, 3, self.stem_stride, name='stem', **common)(x, train)
        x = max_pool(x, self.pool_stride)
        index = 0
        for features, repeats, stride in zip(self.channels, REPEATS, self.strides, strict=True):
            for repeat in range(repeats):
                x = UnitV1(
                    features,
                    stride if repeat == 0 else 1,
                    join=repeat == 0,
                    groups=self.groups,
                    # The stem is too narrow to be split.
                    reduce_groups=1 if index == 0 else self.groups,
                    name=f'block{index}',
                    **common,
                )(x, train)
                index += 1
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


class UnitV2(nn.Module):
    """Filters one half of the channels, joins it to the other half, and shuffles the two.

    Attributes:
        features: output channels.
        stride: of the filters.
        widen: whether both halves are made of the whole input, each by filters of its own.
        bn_momentum: decay of the running BatchNorm statistics.
        dtype: dtype of the computation; parameters are float32.
    """

    features: int
    stride: int
    widen: bool
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv_bn = functools.partial(ConvBN, bn_momentum=self.bn_momentum, dtype=self.dtype)
        linear = functools.partial(conv_bn, activation=None)
        if self.widen:
            half, c = self.features // 2, x.shape[-1]
            y = x
            x = linear(c, 3, self.stride, groups=c, name='shortcut_depthwise')(x, train)
            x = conv_bn(half, name='shortcut_pointwise')(x, train)
        else:
            x, y = jnp.split(x, 2, axis=-1)
            half = y.shape[-1]
        y = conv_bn(half, name='reduce')(y, train)
        c = y.shape[-1]
        y = linear(c, 3, self.stride, groups=c, name='depthwise')(y, train)
        y = conv_bn(half, name='pointwise')(y, train)
        return shuffle(jnp.concatenate([x, y], axis=-1), 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2, 1.0x by default.

    Attributes:
        num_classes: width of the last layer.
        channels: widths of the three stages; the paper's table 5 has them for other complexities.
        head: width of the last convolution.
        stem_stride: stride of the first convolution.
        pool_stride: stride of the max pooling after it; 1 for no pooling.
        strides: stride of the first unit of each stage. The paper's values divide the image's
            sides by 32.
        bn_momentum: decay of the running BatchNorm statistics.
        dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int = 1000
    channels: Sequence[int] = (116, 232, 464)
    head: int = 1024
    stem_stride: int = 2
    pool_stride: int = 2
    strides: Sequence[int] = (2, 2, 2)
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        common = {'bn_momentum': self.bn_momentum, 'dtype': self.dtype}
        x = ConvBN(24, 3, self.stem_stride, name='stem', **common)(x, train)
        x = max_pool(x, self.pool_stride)
        index = 0
        for features, repeats, stride in zip(self.channels, REPEATS, self.strides, strict=True):
            for repeat in range(repeats):
                x = UnitV2(
                    features,
                    stride if repeat == 0 else 1,
                    widen=repeat == 0,
                    name=f'block{index}',
                    **common,
                )(x, train)
                index += 1
        x = ConvBN(self.head, name='head', **common)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    'shufflenet_v1': ShuffleNetV1,
    'shufflenet_v2_x0_5': functools.partial(ShuffleNetV2, channels=(48, 96, 192)),
    'shufflenet_v2_x1_0': ShuffleNetV2,
}
