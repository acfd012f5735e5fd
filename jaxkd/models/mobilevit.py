"""MobileViT (Mehta and Rastegari 2021, https://arxiv.org/abs/2110.02178) in plain Flax Linen."""

from collections.abc import Callable, Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd.models.layers import ConvBN
from jaxkd.models.mobilenet import InvertedResidual

# Inverted residuals of each of the five stages, and transformers after them.
REPEATS = (1, 3, 1, 1, 1)
DEPTHS = (0, 0, 2, 4, 3)


def unfold(x: jax.Array, patch: int) -> jax.Array:
    """[batch, height, width, c] to [batch, pixels of a patch, patches, c], row by row."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(b, patch * patch, -1, c)


def fold(x: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """[batch, pixels of a patch, patches, c] to [batch, height, width, c]: undoes `unfold`."""
    b, _, _, c = x.shape
    x = x.reshape(b, patch, patch, height // patch, width // patch, c)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(b, height, width, c)


def resize(x: jax.Array, height: int, width: int) -> jax.Array:
    """[batch, h, w, c] to [batch, height, width, c], bilinearly; x itself if it has that size."""
    if x.shape[1:3] == (height, width):
        return x
    shape = (x.shape[0], height, width, x.shape[-1])
    return jax.image.resize(x, shape, 'bilinear', antialias=False)


class Transformer(nn.Module):
    """Attention among the tokens, then two layers on each token; both added to their input.

    Attributes:
        num_heads: of the attention.
        dtype: dtype of the computation; parameters are float32.
    """

    num_heads: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., tokens, channels] to the same shape."""
        norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=self.dtype)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        y = norm(name='attention_norm')(x)
        x = x + nn.MultiHeadDotProductAttention(self.num_heads, self.dtype, name='attention')(y)
        y = norm(name='norm')(x)
        c = x.shape[-1]
        return x + dense(c, name='project')(nn.silu(dense(2 * c, name='expand')(y)))


class MobileViTBlock(nn.Module):
    """Convolutions, transformers over pixels of equal place in their patches, and a fusion.

    Attributes:
        features: channels of the tokens.
        depth: number of transformers.
        patch: side of a patch in pixels.
        bn_momentum: decay of the running BatchNorm statistics.
        dtype: dtype of the computation; parameters are float32.
    """

    features: int
    depth: int
    patch: int = 2
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv_bn = functools.partial(
            ConvBN, activation=nn.silu, bn_momentum=self.bn_momentum, dtype=self.dtype
        )
        _, h, w, c = x.shape
        y = conv_bn(c, 3, name='local')(x, train)
        y = nn.Conv(self.features, (1, 1), use_bias=False, dtype=self.dtype, name='embed')(y)
        # Stretched to whole patches and back where the sides are no multiples, as the authors do.
        height, width = (-(-n // self.patch) * self.patch for n in (h, w))
        y = unfold(resize(y, height, width), self.patch)
        for i in range(self.depth):
            y = Transformer(dtype=self.dtype, name=f'transformer{i}')(y)
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name='norm')(y)
        y = resize(fold(y, self.patch, height, width), h, w)
        y = conv_bn(c, name='project')(y, train)
        return conv_bn(c, 3, name='fuse')(jnp.concatenate([x, y], axis=-1), train)


class MobileViT(nn.Module):
    """MobileViT; S by default.

    Attributes:
        num_classes: width of the last layer.
        channels: widths of the five stages; the head has four times the last.
        tokens: channels of the tokens of the last three stages.
        expansion: of the inverted residuals.
        stem_stride: stride of the first convolution.
        strides: stride of the first block of each stage. The paper's values, with a stem of
            stride 2, divide the image's sides by 32.
        patch: side of a patch in pixels; the images of the last three stages are made of patches.
        dropout_rate: dropout before the last layer, in training.
        bn_momentum: decay of the running BatchNorm statistics.
        dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int = 1000
    channels: Sequence[int] = (32, 64, 96, 128, 160)
    tokens: Sequence[int] = (144, 192, 240)
    expansion: int = 4
    stem_stride: int = 2
    strides: Sequence[int] = (1, 2, 2, 2, 2)
    patch: int = 2
    dropout_rate: float = 0.1
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        common = {'bn_momentum': self.bn_momentum, 'dtype': self.dtype}
        conv_bn = functools.partial(ConvBN, activation=nn.silu, **common)
        channels = 16
        x = conv_bn(channels, 3, self.stem_stride, name='stem')(x, train)
        index = 0
        for stage, (features, tokens, stage_stride) in enumerate(
            zip(self.channels, (0, 0, *self.tokens), self.strides, strict=True)
        ):
            for repeat in range(REPEATS[stage]):
                stride = stage_stride if repeat == 0 else 1
                x = InvertedResidual(
                    features,
                    self.expansion,
                    stride,
                    residual=stride == 1 and channels == features,
                    activation=nn.silu,
                    name=f'block{index}',
                    **common,
                )(x, train)
                channels = features
                index += 1
            if DEPTHS[stage]:
                block = MobileViTBlock(
                    tokens, DEPTHS[stage], self.patch, name=f'block{index}', **common
                )
                x = block(x, train)
                index += 1
        x = conv_bn(4 * channels, name='head')(x, train)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    'mobilevit_xxs': functools.partial(
        MobileViT, channels=(16, 24, 48, 64, 80), tokens=(64, 80, 96), expansion=2
    ),
    'mobilevit_xs': functools.partial(
        MobileViT, channels=(32, 48, 64, 80, 96), tokens=(96, 120, 144)
    ),
    'mobilevit_s': MobileViT,
}
