"""SqueezeNet (Iandola et al. 2016, https://arxiv.org/abs/1602.07360) in plain Flax Linen."""

from collections.abc import Callable, Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd import cpu

# Channels of the 1×1 convolution that each fire module begins with, from the second layer on.
SQUEEZED = (16, 16, 32, 32, 48, 48, 64, 64)


class Fire(nn.Module):
    """A 1×1 convolution to `squeezed` channels, then 1×1 and 3×3 ones to `expanded` channels each.

    Attributes:
      squeezed: channels in between.
      expanded: channels of each half of the output.
      dtype: dtype of the computation; parameters are float32.
    """

    squeezed: int
    expanded: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, kernel_init=nn.initializers.he_normal(), dtype=self.dtype)
        x = nn.relu(conv(self.squeezed, (1, 1), name='squeeze')(x))
        halves = (
            conv(self.expanded, (1, 1), name='expand1x1')(x),
            conv(self.expanded, (3, 3), padding=1, name='expand3x3')(x),
        )
        return nn.relu(jnp.concatenate(halves, axis=-1))


class SqueezeNet(nn.Module):
    """SqueezeNet, which has no BatchNorm.

    Attributes:
      stem_features: channels of the first convolution.
      stem_window: side of its window.
      depths: fire modules of each stage; a max-pooling precedes each stage.
      num_classes: channels of the last convolution.
      small_images: a stem of stride 1 instead of 2.
      dropout_rate: dropout before the last convolution, in training; 0.5 in the paper.
      dtype: dtype of the computation; parameters are float32.
    """

    stem_features: int = 64
    stem_window: int = 3
    depths: Sequence[int] = (2, 2, 4)
    num_classes: int = 1000
    small_images: bool = False
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        x = nn.Conv(
            self.stem_features,
            (self.stem_window, self.stem_window),
            strides=1 if self.small_images else 2,
            padding='VALID',
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            name='stem',
        )(x)
        x = nn.relu(x)
        squeezed = iter(SQUEEZED)
        for stage, depth in enumerate(self.depths):
            # Odd sides are rounded down, even ones halved.
            x = cpu.max_pool(x, (3, 3), strides=(2, 2), padding=((0, 1), (0, 1)))
            for index in range(depth):
                c = next(squeezed)
                x = Fire(c, 4 * c, dtype=self.dtype, name=f'stage{stage + 1}_fire{index}')(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.Conv(self.num_classes, (1, 1), dtype=self.dtype, name='classifier')(x)
        return jnp.mean(nn.relu(x), axis=(1, 2))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    'squeezenet1_0': functools.partial(
        SqueezeNet, stem_features=96, stem_window=7, depths=(3, 4, 1)
    ),
    'squeezenet1_1': functools.partial(
        SqueezeNet, stem_features=64, stem_window=3, depths=(2, 2, 4)
    ),
}
