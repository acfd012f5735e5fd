"""MobileNetV2 (Sandler et al. 2018, https://arxiv.org/abs/1801.04381) in plain Flax Linen."""

from collections.abc import Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp

# Table 2 of the paper: expansion t, output channels c, repeats n. Strides are an argument of the
# model, because images of 8 to 32 pixels cannot be halved five times.
STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))


def round_channels(channels: float, divisor: int = 8) -> int:
    """Nearest multiple of `divisor` that is not more than a tenth below `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


class ConvBN(nn.Module):
    """Convolution, BatchNorm and, where asked for, ReLU6."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    depthwise: bool = False
    activation: bool = True
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            strides=self.stride,
            padding=self.kernel_size // 2,
            feature_group_count=x.shape[-1] if self.depthwise else 1,
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
            dtype=self.dtype,
            name='conv',
        )(x)
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=self.bn_momentum,
            epsilon=1e-5,
            dtype=self.dtype,
            name='bn',
        )(x)
        return nn.relu6(x) if self.activation else x


class InvertedResidual(nn.Module):
    """Expand (1×1), filter (depthwise 3×3), project (1×1), with a residual sum if asked for."""

    features: int
    expansion: int
    stride: int
    residual: bool
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        common = {'bn_momentum': self.bn_momentum, 'dtype': self.dtype}
        y = x
        if self.expansion != 1:
            y = ConvBN(x.shape[-1] * self.expansion, name='expand', **common)(y, train)
        y = ConvBN(y.shape[-1], 3, self.stride, depthwise=True, name='depthwise', **common)(
            y, train
        )
        y = ConvBN(self.features, activation=False, name='project', **common)(y, train)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """MobileNetV2.

    Attributes:
        num_classes: width of the last layer.
        width: multiplier of all widths (the paper's alpha).
        stem_stride: stride of the first convolution.
        strides: stride of the first block of each of the seven stages. The paper's values, with a
            stem of stride 2, divide the image's sides by 32.
        dropout_rate: dropout before the last layer, in training.
        bn_momentum: decay of the running BatchNorm statistics.
        dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int = 1000
    width: float = 1.0
    stem_stride: int = 2
    strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1)
    dropout_rate: float = 0.0
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        common = {'bn_momentum': self.bn_momentum, 'dtype': self.dtype}
        channels = round_channels(32 * self.width)
        x = ConvBN(channels, 3, self.stem_stride, name='stem', **common)(x, train)
        index = 0
        for (expansion, stage_channels, repeats), stage_stride in zip(
            STAGES, self.strides, strict=True
        ):
            features = round_channels(stage_channels * self.width)
            for repeat in range(repeats):
                stride = stage_stride if repeat == 0 else 1
                x = InvertedResidual(
                    features,
                    expansion,
                    stride,
                    residual=stride == 1 and channels == features,
                    name=f'block{index}',
                    **common,
                )(x, train)
                channels = features
                index += 1
        x = ConvBN(round_channels(1280 * max(1.0, self.width)), name='head', **common)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)
