"""Inception networks in plain Flax Linen: GoogLeNet and Inception-v3."""

from collections.abc import Callable, Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd import cpu
from jaxkd.models.layers import ConvBN

# What the published weights were trained with, instead of 1e-5.
BN_EPSILON = 1e-3

# Channels and window, (64, '3x3'); the last layer of a chain may have several, side by side.
Layer = tuple[int | str, ...]

# Table 1 of the GoogLeNet paper: each block's 1×1, reduced and full 3×3, reduced and full 5×5, and
# the projection after its max-pooling.
GOOGLENET = {
    '3a': (64, 96, 128, 16, 32, 32),
    '3b': (128, 128, 192, 32, 96, 64),
    '4a': (192, 96, 208, 16, 48, 64),
    '4b': (160, 112, 224, 24, 64, 64),
    '4c': (128, 128, 256, 24, 64, 64),
    '4d': (112, 144, 288, 32, 64, 64),
    '4e': (256, 160, 320, 32, 128, 128),
    '5a': (256, 160, 320, 32, 128, 128),
    '5b': (384, 192, 384, 48, 128, 128),
}


class InceptionBlock(nn.Module):
    """Chains of convolutions and a pooling, side by side, concatenated.

    Attributes:
      branches: the layers of each chain.
      pool: `cpu.max_pool` or `nn.avg_pool`, over windows of 3×3.
      pool_features: channels of the 1×1 convolution after the pooling; 0 for none.
      stride: of the last layer of each chain and of the pooling; 2 goes without padding.
      bn_momentum: decay of the running BatchNorm statistics.
      dtype: dtype of the computation; parameters are float32.
    """

    branches: Sequence[Sequence[Layer]]
    pool: Callable[..., jax.Array] = cpu.max_pool
    pool_features: int = 0
    stride: int = 1
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv_bn = functools.partial(
            ConvBN, bn_momentum=self.bn_momentum, bn_epsilon=BN_EPSILON, dtype=self.dtype
        )
        outputs = []
        for branch, layers in enumerate(self.branches):
            side_by_side = [x]
            for index, (features, *windows) in enumerate(layers):
                stride = self.stride if index == len(layers) - 1 else 1
                side_by_side = [
                    conv_bn(
                        features,
                        tuple(map(int, window.split('x'))),
                        stride,
                        padding=None if stride == 1 else 0,
                        name=f'branch{branch}_conv{index}_{window}',
                    )(side_by_side[0], train)
                    for window in windows
                ]
            outputs += side_by_side
        padding = ((1, 1), (1, 1)) if self.stride == 1 else 'VALID'
        y = self.pool(x, (3, 3), strides=(self.stride, self.stride), padding=padding)
        if self.pool_features:
            y = conv_bn(self.pool_features, name='pool_conv')(y, train)
        return jnp.concatenate([*outputs, y], axis=-1)


class GoogLeNet(nn.Module):
    """GoogLeNet (Szegedy et al. 2014, https://arxiv.org/abs/1409.4842) with BatchNorm.

    Without auxiliary classifiers, and with windows of 3×3 where the paper has 5×5, as in the
    published weights that have BatchNorm.

    Attributes:
      num_classes: width of the last layer.
      small_images: a 3×3 stem of stride 1, and no pooling before the first block.
      dropout_rate: dropout before the last layer, in training; 0.4 in the paper.
      bn_momentum: decay of the running BatchNorm statistics.
      dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int = 1000
    small_images: bool = False
    dropout_rate: float = 0.0
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        common = {'bn_momentum': self.bn_momentum, 'dtype': self.dtype}
        conv_bn = functools.partial(ConvBN, bn_epsilon=BN_EPSILON, **common)

        def pool(x, window=3):  # halves even sides
            return cpu.max_pool(x, (window, window), strides=(2, 2), padding=((0, 1), (0, 1)))

        window, stride = (3, 1) if self.small_images else (7, 2)
        x = conv_bn(64, window, stride, name='stem1')(x, train)
        x = x if self.small_images else pool(x)
        x = conv_bn(64, name='stem2')(x, train)
        x = conv_bn(192, 3, name='stem3')(x, train)
        x = x if self.small_images else pool(x)
        for name, (one, reduced3, full3, reduced5, full5, projected) in GOOGLENET.items():
            if name in ('4a', '5a'):
                x = pool(x, window=3 if name == '4a' else 2)
            x = InceptionBlock(
                (
                    [(one, '1x1')],
                    [(reduced3, '1x1'), (full3, '3x3')],
                    [(reduced5, '1x1'), (full5, '3x3')],
                ),
                pool_features=projected,
                name=f'block{name}',
                **common,
            )(x, train)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


class InceptionV3(nn.Module):
    """Inception-v3 (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567).

    Without the auxiliary classifier.

    Attributes:
      num_classes: width of the last layer.
      small_images: a stem of stride 1 without pooling: 32 pixels become 5.
      dropout_rate: dropout before the last layer, in training.
      bn_momentum: decay of the running BatchNorm statistics.
      dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int = 1000
    small_images: bool = False
    dropout_rate: float = 0.0
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        common = {'bn_momentum': self.bn_momentum, 'dtype': self.dtype}
        conv_bn = functools.partial(ConvBN, bn_epsilon=BN_EPSILON, **common)

        def pool(x):
            return x if self.small_images else cpu.max_pool(x, (3, 3), strides=(2, 2))

        x = conv_bn(32, 3, 1 if self.small_images else 2, padding=0, name='stem1')(x, train)
        x = conv_bn(32, 3, padding=0, name='stem2')(x, train)
        x = pool(conv_bn(64, 3, name='stem3')(x, train))
        x = conv_bn(80, name='stem4')(x, train)
        x = pool(conv_bn(192, 3, padding=0, name='stem5')(x, train))

        mixed = functools.partial(InceptionBlock, **common)
        for name, pool_features in (('5b', 32), ('5c', 64), ('5d', 64)):
            branches = (
                [(64, '1x1')],
                [(48, '1x1'), (64, '5x5')],
                [(64, '1x1'), (96, '3x3'), (96, '3x3')],
            )
            x = mixed(branches, nn.avg_pool, pool_features, name=f'block{name}')(x, train)
        branches = ([(384, '3x3')], [(64, '1x1'), (96, '3x3'), (96, '3x3')])
        x = mixed(branches, stride=2, name='block6a')(x, train)
        for name, c in (('6b', 128), ('6c', 160), ('6d', 160), ('6e', 192)):
            branches = (
                [(192, '1x1')],
                [(c, '1x1'), (c, '1x7'), (192, '7x1')],
                [(c, '1x1'), (c, '7x1'), (c, '1x7'), (c, '7x1'), (192, '1x7')],
            )
            x = mixed(branches, nn.avg_pool, 192, name=f'block{name}')(x, train)
        branches = (
            [(192, '1x1'), (320, '3x3')],
            [(192, '1x1'), (192, '1x7'), (192, '7x1'), (192, '3x3')],
        )
        x = mixed(branches, stride=2, name='block7a')(x, train)
        for name in ('7b', '7c'):
            branches = (
                [(320, '1x1')],
                [(384, '1x1'), (384, '1x3', '3x1')],
                [(448, '1x1'), (384, '3x3'), (384, '1x3', '3x1')],
            )
            x = mixed(branches, nn.avg_pool, 192, name=f'block{name}')(x, train)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    'googlenet': GoogLeNet,
    'inception_v3': InceptionV3,
}
