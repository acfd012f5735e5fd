"""EfficientNet (Tan and Le 2019, https://arxiv.org/abs/1905.11946) in plain Flax Linen."""

from collections.abc import Callable, Sequence
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd.models.layers import ConvBN, SqueezeExcite, round_channels
from jaxkd.models.mobilenet import InvertedResidual

# Table 1 of the paper: kernel size, expansion, output channels, repeats. Strides are an argument.
STAGES = (
    (3, 1, 16, 1),
    (3, 6, 24, 2),
    (5, 6, 40, 2),
    (3, 6, 80, 3),
    (5, 6, 112, 3),
    (5, 6, 192, 4),
    (3, 6, 320, 1),
)

# Width, depth and dropout of B0 to B7; made for images of 224, 240, 260, 300, 380, 456, 528 and
# 600 pixels.
SCALES = (
    (1.0, 1.0, 0.2),
    (1.0, 1.1, 0.2),
    (1.1, 1.2, 0.3),
    (1.2, 1.4, 0.3),
    (1.4, 1.8, 0.4),
    (1.6, 2.2, 0.4),
    (1.8, 2.6, 0.5),
    (2.0, 3.1, 0.5),
)


class EfficientNet(nn.Module):
    """EfficientNet; B0 by default.

    Attributes:
        num_classes: width of the last layer.
        width: multiplier of all widths.
        depth: multiplier of the numbers of blocks.
        stem_stride: stride of the first convolution.
        strides: stride of the first block of each of the seven stages. The paper's values, with a
            stem of stride 2, divide the image's sides by 32.
        dropout_rate: dropout before the last layer, in training.
        drop_path_rate: how often an example goes without a block's residual branch, in training
            (stochastic depth, https://arxiv.org/abs/1603.09382): the rate that the last block
            would have, rising evenly from none at the first.
        bn_momentum: decay of the running BatchNorm statistics.
        bn_epsilon: added to the variance.
        padding: of the convolutions, as `nn.Conv` takes it; by default half the window on each
            side. 'SAME' is TensorFlow's, less at the top and left of strided ones.
        dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int = 1000
    width: float = 1.0
    depth: float = 1.0
    stem_stride: int = 2
    strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1)
    dropout_rate: float = 0.2
    drop_path_rate: float = 0.2
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-3
    padding: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        common = {
            'activation': nn.silu,
            'bn_momentum': self.bn_momentum,
            'bn_epsilon': self.bn_epsilon,
            'padding': self.padding,
            'dtype': self.dtype,
        }
        channels = round_channels(32 * self.width)
        x = ConvBN(channels, 3, self.stem_stride, name='stem', **common)(x, train)
        repeats = [math.ceil(stage[-1] * self.depth) for stage in STAGES]
        index = 0
        for (kernel_size, expansion, stage_channels, _), stage_stride, number in zip(
            STAGES, self.strides, repeats, strict=True
        ):
            features = round_channels(stage_channels * self.width)
            for repeat in range(number):
                stride = stage_stride if repeat == 0 else 1
                x = InvertedResidual(
                    features,
                    expansion,
                    stride,
                    residual=stride == 1 and channels == features,
                    kernel_size=kernel_size,
                    squeeze_excite=functools.partial(
                        SqueezeExcite, channels // 4, activation=nn.silu
                    ),
                    drop_path_rate=self.drop_path_rate * index / sum(repeats),
                    name=f'block{index}',
                    **common,
                )(x, train)
                channels = features
                index += 1
        x = ConvBN(round_channels(1280 * self.width), name='head', **common)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    f'efficientnet_b{i}': functools.partial(
        EfficientNet, width=width, depth=depth, dropout_rate=dropout_rate
    )
    for i, (width, depth, dropout_rate) in enumerate(SCALES)
}
