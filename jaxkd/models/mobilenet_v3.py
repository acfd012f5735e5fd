"""MobileNetV3 (Howard et al. 2019, https://arxiv.org/abs/1905.02244) in plain Flax Linen."""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd.models.layers import ConvBN, SqueezeExcite, round_channels
from jaxkd.models.mobilenet import InvertedResidual


class Stage(NamedTuple):
    """Blocks alike, one for each entry of `expanded`.

    Attributes:
        kernel_size: of the depthwise filters.
        expanded: channels that each block filters.
        channels: that each block puts out.
        excite: whether the blocks have a squeeze-excite.
        activation: of the blocks, by its name in `flax.linen`.
    """

    kernel_size: int
    expanded: tuple[int, ...]
    channels: int
    excite: bool
    activation: str


# Tables 1 and 2 of the paper. Strides are an argument of the model.
LARGE = (
    Stage(3, (16,), 16, False, 'relu'),
    Stage(3, (64, 72), 24, False, 'relu'),
    Stage(5, (72, 120, 120), 40, True, 'relu'),
    Stage(3, (240, 200, 184, 184), 80, False, 'hard_swish'),
    Stage(3, (480, 672), 112, True, 'hard_swish'),
    Stage(5, (672, 960, 960), 160, True, 'hard_swish'),
)
SMALL = (
    Stage(3, (16,), 16, True, 'relu'),
    Stage(3, (72, 88), 24, False, 'relu'),
    Stage(5, (96, 240, 240), 40, True, 'hard_swish'),
    Stage(5, (120, 144), 48, True, 'hard_swish'),
    Stage(5, (288, 576, 576), 96, True, 'hard_swish'),
)


class MobileNetV3(nn.Module):
    """MobileNetV3; the large one by default.

    Attributes:
        stages: what the network is built of.
        strides: stride of the first block of each stage.
        hidden: width of the layer before the last.
        num_classes: width of the last layer.
        width: multiplier of all other widths.
        stem_stride: stride of the first convolution.
        dropout_rate: dropout before the last layer, in training.
        bn_momentum: decay of the running BatchNorm statistics.
        bn_epsilon: added to the variance.
        padding: of the convolutions, as `nn.Conv` takes it; by default half the window on each
            side. 'SAME' is TensorFlow's, less at the top and left of strided ones.
        dtype: dtype of the computation; parameters are float32.
    """

    stages: Sequence[Stage] = LARGE
    strides: Sequence[int] = (1, 2, 2, 2, 1, 2)
    hidden: int = 1280
    num_classes: int = 1000
    width: float = 1.0
    stem_stride: int = 2
    dropout_rate: float = 0.2
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-3
    padding: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        common = {
            'bn_momentum': self.bn_momentum,
            'bn_epsilon': self.bn_epsilon,
            'padding': self.padding,
            'dtype': self.dtype,
        }
        conv_bn = functools.partial(ConvBN, activation=nn.hard_swish, **common)
        channels = round_channels(16 * self.width)
        x = conv_bn(channels, 3, self.stem_stride, name='stem')(x, train)
        index = 0
        for stage, stage_stride in zip(self.stages, self.strides, strict=True):
            features = round_channels(stage.channels * self.width)
            for repeat, expanded in enumerate(stage.expanded):
                expanded = round_channels(expanded * self.width)
                stride = stage_stride if repeat == 0 else 1
                squeeze_excite = functools.partial(
                    SqueezeExcite, round_channels(expanded / 4), gate=nn.hard_sigmoid
                )
                x = InvertedResidual(
                    features,
                    expanded / channels,
                    stride,
                    residual=stride == 1 and channels == features,
                    kernel_size=stage.kernel_size,
                    activation=getattr(nn, stage.activation),
                    squeeze_excite=squeeze_excite if stage.excite else None,
                    name=f'block{index}',
                    **common,
                )(x, train)
                channels = features
                index += 1
        x = conv_bn(6 * channels, name='head')(x, train)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.hard_swish(nn.Dense(self.hidden, dtype=self.dtype, name='hidden')(x))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    'mobilenet_v3_small': functools.partial(
        MobileNetV3, stages=SMALL, strides=(2, 2, 2, 1, 2), hidden=1024
    ),
    'mobilenet_v3_large': MobileNetV3,
}
