"""U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597) in plain Flax Linen.

Unlike the paper's, its convolutions are padded, so that the output has the size of the image, and
followed by BatchNorm.
"""

from collections.abc import Callable
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd import cpu
from jaxkd.models.layers import ConvBN


class DoubleConv(nn.Module):
    """Two 3×3 convolutions.

    Attributes:
        features: output channels of both.
        bn_momentum: decay of the running BatchNorm statistics.
        dtype: dtype of the computation; parameters are float32.
    """

    features: int
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv_bn = functools.partial(
            ConvBN, self.features, 3, bn_momentum=self.bn_momentum, dtype=self.dtype
        )
        return conv_bn(name='conv1')(conv_bn(name='conv0')(x, train), train)


class UNet(nn.Module):
    """U-Net: down to a small image of many channels, and up again, seeing what was on the way.

    Attributes:
        num_classes: width of the last layer.
        base_width: channels at the size of the image; each level below has twice as many.
        depth: how often the image is halved.
        bn_momentum: decay of the running BatchNorm statistics.
        dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int = 2
    base_width: int = 64
    depth: int = 4
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to [batch, height, width, num_classes].

        Raises:
            ValueError: unless height and width are multiples of 2**depth.
        """
        if any(side % 2**self.depth for side in x.shape[1:3]):
            raise ValueError(
                f'U-Net of depth {self.depth} needs images with sides that are multiples of '
                f'{2**self.depth}, not {x.shape[1]}×{x.shape[2]}'
            )
        double_conv = functools.partial(DoubleConv, bn_momentum=self.bn_momentum, dtype=self.dtype)
        widths = [self.base_width * 2**level for level in range(self.depth + 1)]
        skips = []
        for level, features in enumerate(widths[:-1]):
            x = double_conv(features, name=f'down{level}')(x, train)
            skips.append(x)
            x = cpu.max_pool(x, (2, 2), (2, 2))
        x = double_conv(widths[-1], name='bottom')(x, train)
        for level in reversed(range(self.depth)):
            features = widths[level]
            x = nn.ConvTranspose(
                features, (2, 2), (2, 2), dtype=self.dtype, name=f'upsample{level}'
            )(x)
            x = jnp.concatenate([skips[level], x], axis=-1)
            x = double_conv(features, name=f'up{level}')(x, train)
        return nn.Conv(self.num_classes, (1, 1), dtype=self.dtype, name='classifier')(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {'unet': UNet}
