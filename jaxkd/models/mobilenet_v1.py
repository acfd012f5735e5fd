"""MobileNetV1 (Howard et al. 2017, https://arxiv.org/abs/1704.04861) in plain Flax Linen."""

from collections.abc import Callable, Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd.models.layers import ConvBN, round_channels

# Table 1 of the paper: output channels, and how many blocks have them.
STAGES = ((64, 1), (128, 2), (256, 2), (512, 6), (1024, 2))


class MobileNetV1(nn.Module):
    """MobileNetV1: thirteen times a depthwise 3×3 and a 1×1 convolution.

    Attributes:
        num_classes: width of the last layer.
        width: multiplier of all widths (the paper's alpha).
        stem_stride: stride of the first convolution.
        strides: stride of the first block of each of the five stages. The paper's values, with a
            stem of stride 2, divide the image's sides by 32.
        dropout_rate: dropout before the last layer, in training.
        activation: of all layers but the last, by its name in `flax.linen`.
        bn_momentum: decay of the running BatchNorm statistics.
        bn_epsilon: added to the variance.
        padding: of the convolutions, as `nn.Conv` takes it; by default half the window on each
            side. 'SAME' is TensorFlow's, less at the top and left of strided ones.
        dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int = 1000
    width: float = 1.0
    stem_stride: int = 2
    strides: Sequence[int] = (1, 2, 2, 2, 2)
    dropout_rate: float = 0.0
    activation: str = 'relu'
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    padding: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        conv_bn = functools.partial(
            ConvBN,
            activation=getattr(nn, self.activation),
            bn_momentum=self.bn_momentum,
            bn_epsilon=self.bn_epsilon,
            padding=self.padding,
            dtype=self.dtype,
        )
        x = conv_bn(round_channels(32 * self.width), 3, self.stem_stride, name='stem')(x, train)
        index = 0
        for (channels, repeats), stage_stride in zip(STAGES, self.strides, strict=True):
            for repeat in range(repeats):
                c, stride = x.shape[-1], stage_stride if repeat == 0 else 1
                x = conv_bn(c, 3, stride, groups=c, name=f'block{index}_depthwise')(x, train)
                features = round_channels(channels * self.width)
                x = conv_bn(features, name=f'block{index}_pointwise')(x, train)
                index += 1
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {'mobilenet_v1': MobileNetV1}
