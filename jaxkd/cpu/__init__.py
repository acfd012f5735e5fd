"""Convolutions, batch normalization and pooling in a form that XLA:CPU runs fast.

XLA:CPU has fast code for matrix products and for elementwise loops, and slow code for depthwise
convolutions (10 to 40 times slower than the memory allows), for the weight gradients of 1×1
convolutions (8 times) and of those of an image, for convolutions whose output is 2×2 pixels or
fewer (60 times) and for the sums of BatchNorm and the gradient of max pooling (2 to 4 times). So
depthwise convolutions are written here as sums of shifted products, one for each position of the
kernel; 3×3 convolutions by Winograd's algorithm, with a quarter of the multiplications; most others
as matrix products; batch normalization with its gradient in two passes, and max pooling along one
axis after the other. Values and gradients are those of `jax.lax.conv_general_dilated`,
`flax.linen.BatchNorm` and `flax.linen.max_pool`, to rounding. On a GPU depthwise and 1×1
convolutions of small images have these forms as well, and the pooling.

    with jaxkd.cpu.fast_layers():
        logits = model.apply(variables, images)
"""

from jaxkd.cpu.convolution import conv_general_dilated
from jaxkd.cpu.layers import fast_layers
from jaxkd.cpu.memory import hold_memory
from jaxkd.cpu.pooling import max_pool

__all__ = ['conv_general_dilated', 'fast_layers', 'hold_memory', 'max_pool']
