"""GhostNet (Han et al. 2020, https://arxiv.org/abs/1911.11907) in plain Flax Linen."""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd.models.layers import Activation, ConvBN, SqueezeExcite, round_channels


class Stage(NamedTuple):
    """Blocks alike, one for each entry of `expanded` and `excite`.

    Attributes:
        kernel_size: of the depthwise filters.
        channels: that each block puts out.
        expanded: channels in the middle of each block.
        excite: which blocks have a squeeze-excite.
    """

    kernel_size: int
    channels: int
    expanded: tuple[int, ...]
    excite: tuple[bool, ...]


# Table 1 of the paper. Strides are an argument of the model.
STAGES = (
    Stage(3, 16, (16,), (False,)),
    Stage(3, 24, (48, 72), (False, False)),
    Stage(5, 40, (72, 120), (True, True)),
    Stage(3, 80, (240, 200, 184, 184), (False, False, False, False)),
    Stage(3, 112, (480, 672), (True, True)),
    Stage(5, 160, (672, 960, 960, 960, 960), (True, False, True, False, True)),
)


class Ghost(nn.Module):
    """Half of the channels by a 1×1 convolution, the other half by filtering the first (3×3).

    Attributes:
        features: output channels, an even number.
        activation: of both halves; None for none.
        bn_momentum: decay of the running BatchNorm statistics.
        dtype: dtype of the computation; parameters are float32.
    """

    features: int
    activation: Activation | None = nn.relu
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv_bn = functools.partial(
            ConvBN, activation=self.activation, bn_momentum=self.bn_momentum, dtype=self.dtype
        )
        x = conv_bn(self.features // 2, name='primary')(x, train)
        c = x.shape[-1]
        return jnp.concatenate([x, conv_bn(c, 3, groups=c, name='cheap')(x, train)], axis=-1)


class GhostBottleneck(nn.Module):
    """Expand and project by ghosts, with a residual sum.

    Attributes:
        features: output channels.
        expanded: channels in the middle.
        stride: of the filter in the middle, which is there only if this is not 1.
        kernel_size: of that filter.
        excite: whether there is a squeeze-excite in the middle.
        identity: whether the input is added as it is; otherwise by filters of its own.
        bn_momentum: decay of the running BatchNorm statistics.
        dtype: dtype of the computation; parameters are float32.
    """

    features: int
    expanded: int
    stride: int
    kernel_size: int
    excite: bool
    identity: bool
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        common = {'bn_momentum': self.bn_momentum, 'dtype': self.dtype}
        linear = functools.partial(ConvBN, activation=None, **common)
        filtered = self.kernel_size, self.stride
        y = Ghost(self.expanded, name='expand', **common)(x, train)
        if self.stride > 1:
            c = y.shape[-1]
            y = linear(c, *filtered, groups=c, name='depthwise')(y, train)
        if self.excite:
            squeezed = round_channels(self.expanded / 4, 4)
            y = SqueezeExcite(
                squeezed, gate=nn.hard_sigmoid, dtype=self.dtype, name='squeeze_excite'
            )(y)
        y = Ghost(self.features, activation=None, name='project', **common)(y, train)
        if not self.identity:
            c = x.shape[-1]
            x = linear(c, *filtered, groups=c, name='shortcut_depthwise')(x, train)
            x = linear(y.shape[-1], name='shortcut_pointwise')(x, train)
        return x + y


class GhostNet(nn.Module):
    """GhostNet.

    Attributes:
        num_classes: width of the last layer.
        width: multiplier of all widths but that of the layer before the last.
        stem_stride: stride of the first convolution.
        strides: stride of the first block of each of the six stages. The paper's values, with a
            stem of stride 2, divide the image's sides by 32.
        dropout_rate: dropout before the last layer, in training.
        bn_momentum: decay of the running BatchNorm statistics.
        dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int = 1000
    width: float = 1.0
    stem_stride: int = 2
    strides: Sequence[int] = (1, 2, 2, 2, 1, 2)
    dropout_rate: float = 0.2
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        common = {'bn_momentum': self.bn_momentum, 'dtype': self.dtype}
        channels = round_channels(16 * self.width, 4)
        x = ConvBN(channels, 3, self.stem_stride, name='stem', **common)(x, train)
        index = 0
        for stage, stage_stride in zip(STAGES, self.strides, strict=True):
            features = round_channels(stage.channels * self.width, 4)
            for repeat, (expanded, excite) in enumerate(
                zip(stage.expanded, stage.excite, strict=True)
            ):
                stride = stage_stride if repeat == 0 else 1
                x = GhostBottleneck(
                    features,
                    round_channels(expanded * self.width, 4),
                    stride,
                    kernel_size=stage.kernel_size,
                    excite=excite,
                    identity=stride == 1 and channels == features,
                    name=f'block{index}',
                    **common,
                )(x, train)
                channels = features
                index += 1
        x = ConvBN(round_channels(960 * self.width, 4), name='head', **common)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.relu(nn.Dense(1280, dtype=self.dtype, name='hidden')(x))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {'ghostnet': GhostNet}
