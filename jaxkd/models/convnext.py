"""ConvNeXt (Liu et al. 2022, https://arxiv.org/abs/2201.03545) in plain Flax Linen."""

from collections.abc import Callable, Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

INITIALIZER = nn.initializers.truncated_normal(0.02)
Conv = functools.partial(nn.Conv, kernel_init=INITIALIZER)
Dense = functools.partial(nn.Dense, kernel_init=INITIALIZER)


class Block(nn.Module):
    """Filter (depthwise 7×7), expand fourfold, project, scale; added to the input.

    Attributes:
        drop_path_rate: how often an example goes without the residual branch, in training.
        layer_scale: first value of the factors of the residual branch's channels.
        dtype: dtype of the computation; parameters are float32.
    """

    drop_path_rate: float = 0.0
    layer_scale: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        c = x.shape[-1]
        y = Conv(c, (7, 7), feature_group_count=c, dtype=self.dtype, name='depthwise')(x)
        y = nn.LayerNorm(dtype=self.dtype, name='norm')(y)
        y = Dense(4 * c, dtype=self.dtype, name='expand')(y)
        y = Dense(c, dtype=self.dtype, name='project')(nn.gelu(y, approximate=False))
        scale = self.param('layer_scale', nn.initializers.constant(self.layer_scale), (c,))
        y = y * scale.astype(y.dtype)
        per_example = (1, 2, 3)  # the axes that share one draw
        return x + nn.Dropout(self.drop_path_rate, per_example, deterministic=not train)(y)


class ConvNeXt(nn.Module):
    """ConvNeXt, the tiny one by default.

    Attributes:
        num_classes: width of the last layer.
        channels: widths of the stages.
        depths: blocks of the stages.
        stem_stride: side of the patches that the first convolution turns into pixels.
        strides: the same at the beginning of each stage after the first.
        drop_path_rate: how often an example goes without a block's residual branch, in training
            (stochastic depth, https://arxiv.org/abs/1603.09382): the last block's rate, rising
            evenly from none at the first.
        norm_epsilon: added to the variance by the last LayerNorm; elsewhere it is 1e-6.
        dtype: dtype of the computation; parameters are float32.
    """

    num_classes: int = 1000
    channels: Sequence[int] = (96, 192, 384, 768)
    depths: Sequence[int] = (3, 3, 9, 3)
    stem_stride: int = 4
    strides: Sequence[int] = (2, 2, 2)
    drop_path_rate: float = 0.1
    norm_epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        conv = functools.partial(Conv, padding='VALID', dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        patch = (self.stem_stride, self.stem_stride)
        x = conv(self.channels[0], patch, patch, name='stem')(x)
        x = norm(name='stem_norm')(x)
        index, last = 0, max(1, sum(self.depths) - 1)
        for stage, (features, depth, stride) in enumerate(
            zip(self.channels, self.depths, (1, *self.strides), strict=True)
        ):
            if stage > 0:
                x = norm(name=f'downsample{stage}_norm')(x)
                patch = (stride, stride)
                x = conv(features, patch, patch, name=f'downsample{stage}')(x)
            for _ in range(depth):
                rate = self.drop_path_rate * index / last
                x = Block(rate, dtype=self.dtype, name=f'block{index}')(x, train)
                index += 1
        x = norm(epsilon=self.norm_epsilon, name='norm')(jnp.mean(x, axis=(1, 2)))
        return Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {'convnext_tiny': ConvNeXt}
