"""MobileNetV2 (Sandler et al. 2018, https://arxiv.org/abs/1801.04381) in plain Flax Linen."""

from collections.abc import Callable, Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd.models.layers import Activation, ConvBN, round_channels

# Table 2 of the paper: expansion t, output channels c, repeats n. Strides are an argument of the
# model, because images of 8 to 32 pixels cannot be halved five times.
STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))


class InvertedResidual(nn.Module):
    """Expand (1×1), filter (depthwise 3×3), project (1×1), with a residual sum if asked for.

    Attributes:
        features: output channels.
        expansion: channels of the filter for each channel of the input; 1 for no expansion.
        stride: of the filter.
        residual: whether the input is added to the output.
        kernel_size: of the filter.
        activation: of the expansion and of the filter.
        squeeze_excite: makes what comes between filter and projection; None for nothing.
        drop_path_rate: how often an example goes without the residual branch, in training.
        bn_momentum: decay of the running BatchNorm statistics.
        bn_epsilon: added to the variance.
        padding: of the convolutions, as `nn.Conv` takes it; by default half the window on each
            side. 'SAME' is TensorFlow's, less at the top and left of strided ones.
        dtype: dtype of the computation; parameters are float32.
    """

    features: int
    expansion: float
    stride: int
    residual: bool
    kernel_size: int = 3
    activation: Activation = nn.relu6
    squeeze_excite: Callable[..., nn.Module] | None = None
    drop_path_rate: float = 0.0
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    padding: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv_bn = functools.partial(
            ConvBN,
            activation=self.activation,
            bn_momentum=self.bn_momentum,
            bn_epsilon=self.bn_epsilon,
            padding=self.padding,
            dtype=self.dtype,
        )
        y = x
        if self.expansion != 1:
            y = conv_bn(round(x.shape[-1] * self.expansion), name='expand')(y, train)
        c = y.shape[-1]
        y = conv_bn(c, self.kernel_size, self.stride, groups=c, name='depthwise')(y, train)
        if self.squeeze_excite is not None:
            y = self.squeeze_excite(dtype=self.dtype, name='squeeze_excite')(y)
        y = conv_bn(self.features, activation=None, name='project')(y, train)
        if not self.residual:
            return y
        per_example = (1, 2, 3)  # the axes that share one draw
        drop_path = nn.Dropout(self.drop_path_rate, per_example, deterministic=not train)
        return x + drop_path(y)


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
        bn_epsilon: added to the variance.
        padding: of the convolutions, as `nn.Conv` takes it; by default half the window on each
            side. 'SAME' is TensorFlow's, less at the top and left of strided ones.
        dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int = 1000
    width: float = 1.0
    stem_stride: int = 2
    strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1)
    dropout_rate: float = 0.0
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
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
        conv_bn = functools.partial(ConvBN, activation=nn.relu6, **common)
        channels = round_channels(32 * self.width)
        x = conv_bn(channels, 3, self.stem_stride, name='stem')(x, train)
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
        x = conv_bn(round_channels(1280 * max(1.0, self.width)), name='head')(x, train)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {'mobilenet_v2': MobileNetV2}
