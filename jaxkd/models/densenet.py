"""DenseNet (Huang et al. 2016, https://arxiv.org/abs/1608.06993) in plain Flax Linen."""

from collections.abc import Callable, Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd import cpu


class NormConv(nn.Module):
    """BatchNorm, ReLU, and a convolution without bias.

    Attributes:
      features: output channels.
      kernel_size: side of the window.
      bn_momentum: decay of the running BatchNorm statistics.
      dtype: dtype of the computation; parameters are float32.
    """

    features: int
    kernel_size: int = 1
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=self.bn_momentum,
            epsilon=1e-5,
            dtype=self.dtype,
            name='bn',
        )(x)
        return nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            padding=self.kernel_size // 2,
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            name='conv',
        )(nn.relu(x))


class DenseNet(nn.Module):
    """DenseNet-BC: layers with bottlenecks, transitions that halve the channels.

    Attributes:
      depths: layers of each block.
      growth: channels that each layer adds (the paper's k); the stem has twice as many.
      num_classes: width of the last layer.
      small_images: the paper's stem for CIFAR, a 3×3 convolution of stride 1, instead of a 7×7 one
        of stride 2 with BatchNorm, ReLU and max-pooling.
      bn_momentum: decay of the running BatchNorm statistics.
      dtype: dtype of the computation; parameters are float32.
    """

    depths: Sequence[int] = (6, 12, 24, 16)
    growth: int = 32
    num_classes: int = 1000
    small_images: bool = False
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.bn_momentum,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        norm_conv = functools.partial(NormConv, bn_momentum=self.bn_momentum, dtype=self.dtype)
        window, stride = (3, 1) if self.small_images else (7, 2)
        x = nn.Conv(
            2 * self.growth,
            (window, window),
            strides=stride,
            padding=window // 2,
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            name='stem',
        )(x)
        if not self.small_images:
            x = nn.relu(norm(name='stem_bn')(x))
            x = cpu.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block, depth in enumerate(self.depths, start=1):
            if block > 1:
                x = norm_conv(x.shape[-1] // 2, name=f'transition{block - 1}')(x, train)
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            for layer in range(depth):
                y = norm_conv(4 * self.growth, name=f'block{block}_layer{layer}_conv1')(x, train)
                y = norm_conv(self.growth, 3, name=f'block{block}_layer{layer}_conv2')(y, train)
                x = jnp.concatenate([x, y], axis=-1)
        x = jnp.mean(nn.relu(norm(name='bn')(x)), axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    'densenet121': functools.partial(DenseNet, depths=(6, 12, 24, 16), growth=32),
    'densenet_bc_100_12': functools.partial(
        DenseNet, depths=(16, 16, 16), growth=12, num_classes=10, small_images=True
    ),
}
