"""What many networks are built of."""

from collections.abc import Callable, Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


def round_channels(channels: float, divisor: int = 8) -> int:
    """Nearest multiple of `divisor` that is not more than a tenth below `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


class ConvBN(nn.Module):
    """Convolution, BatchNorm, and an activation where there is one.

    Attributes:
      features: output channels.
      kernel_size: one number for a square window, or (height, width).
      stride: of both sides.
      padding: pixels on each side, or as `nn.Conv` takes it; by default half the window.
      groups: `feature_group_count` of the convolution; the number of input channels for a
        depthwise one.
      use_bias: whether the convolution has a bias; BatchNorm makes it superfluous.
      activation: applied last; None for none.
      bn_momentum: decay of the running BatchNorm statistics.
      bn_epsilon: added to the variance.
      dtype: dtype of the computation; parameters are float32.
    """

    features: int
    kernel_size: int | tuple[int, int] = 1
    stride: int = 1
    padding: int | str | Sequence[int] | None = None
    groups: int = 1
    use_bias: bool = False
    activation: Activation | None = nn.relu
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        window = self.kernel_size
        window = (window, window) if isinstance(window, int) else window
        x = nn.Conv(
            self.features,
            window,
            strides=self.stride,
            padding=[n // 2 for n in window] if self.padding is None else self.padding,
            feature_group_count=self.groups,
            use_bias=self.use_bias,
            kernel_init=nn.initializers.variance_scaling(2.0, 'fan_out', 'normal'),
            dtype=self.dtype,
            name='conv',
        )(x)
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            dtype=self.dtype,
            name='bn',
        )(x)
        return self.activation(x) if self.activation else x


class SqueezeExcite(nn.Module):
    """Scales the channels by what their means say (https://arxiv.org/abs/1709.01507).

    Attributes:
      squeezed: channels of the bottleneck.
      activation: of the bottleneck.
      gate: turns its output into factors.
      dtype: dtype of the computation; parameters are float32.
    """

    squeezed: int
    activation: Activation = nn.relu
    gate: Activation = nn.sigmoid
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.mean(x, axis=(1, 2), keepdims=True)
        y = nn.Conv(self.squeezed, (1, 1), dtype=self.dtype, name='squeeze')(y)
        y = nn.Conv(x.shape[-1], (1, 1), dtype=self.dtype, name='excite')(self.activation(y))
        return x * self.gate(y)
