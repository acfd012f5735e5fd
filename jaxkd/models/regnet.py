"""RegNetY (Radosavovic et al. 2020, https://arxiv.org/abs/2003.13678) in plain Flax Linen."""

from collections.abc import Callable, Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd.models.layers import ConvBN, SqueezeExcite


class YBlock(nn.Module):
    """1×1, grouped 3×3, squeeze and excite, 1×1, all of one width, and a residual sum.

    Attributes:
      features: channels of each convolution.
      group_width: channels of each group of the 3×3 convolution.
      stride: of the 3×3 convolution.
      project: whether the shortcut is a 1×1 convolution.
      bn_momentum: decay of the running BatchNorm statistics.
      dtype: dtype of the computation; parameters are float32.
    """

    features: int
    group_width: int
    stride: int = 1
    project: bool = False
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv_bn = functools.partial(
            ConvBN, self.features, bn_momentum=self.bn_momentum, dtype=self.dtype
        )
        groups = self.features // self.group_width
        y = conv_bn(name='conv1')(x, train)
        y = conv_bn(3, self.stride, groups=groups, name='conv2')(y, train)
        y = SqueezeExcite(x.shape[-1] // 4, dtype=self.dtype, name='squeeze_excite')(y)
        y = conv_bn(activation=None, name='conv3')(y, train)
        if self.project:
            x = conv_bn(1, self.stride, activation=None, name='shortcut')(x, train)
        return nn.relu(x + y)


class RegNetY(nn.Module):
    """RegNetY. The paper's rule for depths and widths is not repeated here, only what it gives.

    Attributes:
      depths: blocks of each stage.
      widths: channels of each stage.
      group_width: channels of each group of the 3×3 convolutions.
      num_classes: width of the last layer.
      small_images: a stem of stride 1 instead of 2.
      bn_momentum: decay of the running BatchNorm statistics.
      dtype: dtype of the computation; parameters are float32.
    """

    depths: Sequence[int] = (1, 3, 6, 6)
    widths: Sequence[int] = (48, 104, 208, 440)
    group_width: int = 8
    num_classes: int = 1000
    small_images: bool = False
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        common = {'bn_momentum': self.bn_momentum, 'dtype': self.dtype}
        x = ConvBN(32, 3, 1 if self.small_images else 2, name='stem', **common)(x, train)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True), start=1):
            for index in range(depth):
                x = YBlock(
                    width,
                    self.group_width,
                    stride=2 if index == 0 else 1,
                    project=index == 0,
                    name=f'stage{stage}_block{index}',
                    **common,
                )(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    'regnet_y_400mf': functools.partial(
        RegNetY, depths=(1, 3, 6, 6), widths=(48, 104, 208, 440), group_width=8
    ),
    'regnet_y_800mf': functools.partial(
        RegNetY, depths=(1, 3, 8, 2), widths=(64, 144, 320, 784), group_width=16
    ),
}
