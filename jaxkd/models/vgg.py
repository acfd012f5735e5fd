"""VGG with BatchNorm (Simonyan and Zisserman 2014, https://arxiv.org/abs/1409.1556)."""

from collections.abc import Callable, Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxkd import cpu
from jaxkd.models.layers import ConvBN


class VGG(nn.Module):
    """VGG with a BatchNorm after each convolution.

    Attributes:
      depths: convolutions of each of the five stages.
      strides: of the max-pooling after each stage; 1 is none, for small images.
      num_classes: width of the last layer.
      small_images: a single dense layer on the mean of each channel, as is usual for 32×32,
        instead of three dense layers on all pixels.
      dropout_rate: dropout after each hidden dense layer, or before the single one, in training;
        0.5 in the paper.
      bn_momentum: decay of the running BatchNorm statistics.
      dtype: dtype of the computation; parameters are float32.
    """

    depths: Sequence[int] = (2, 2, 3, 3, 3)
    strides: Sequence[int] = (2, 2, 2, 2, 2)
    num_classes: int = 1000
    small_images: bool = False
    dropout_rate: float = 0.0
    bn_momentum: float = 0.9
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images, float [batch, height, width, channels], to logits [batch, num_classes]."""
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        for stage, (depth, stride, width) in enumerate(
            zip(self.depths, self.strides, (64, 128, 256, 512, 512), strict=True)
        ):
            for index in range(depth):
                x = ConvBN(
                    width,
                    3,
                    use_bias=True,
                    bn_momentum=self.bn_momentum,
                    dtype=self.dtype,
                    name=f'stage{stage + 1}_conv{index}',
                )(x, train)
            if stride > 1:
                x = cpu.max_pool(x, (stride, stride), strides=(stride, stride))
        if self.small_images:
            x = dropout(jnp.mean(x, axis=(1, 2)))
        else:
            x = x.reshape(x.shape[0], -1)
            for name in ('hidden1', 'hidden2'):
                x = dropout(nn.relu(nn.Dense(4096, dtype=self.dtype, name=name)(x)))
        return nn.Dense(self.num_classes, dtype=self.dtype, name='classifier')(x)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    'vgg11_bn': functools.partial(VGG, depths=(1, 1, 2, 2, 2)),
    'vgg16_bn': functools.partial(VGG, depths=(2, 2, 3, 3, 3)),
    'vgg19_bn': functools.partial(VGG, depths=(2, 2, 4, 4, 4)),
}
