"""Convolutions and pooling in a form that XLA:CPU runs fast.

XLA:CPU has fast code for matrix products and for elementwise loops, and slow code for depthwise
convolutions (10 to 40 times slower than the memory allows), for the weight gradient of 1×1
convolutions (8 times), for convolutions whose output is 2×2 pixels or fewer (60 times) and for the
gradient of max pooling (4 to 10 times). So depthwise convolutions are written here as sums of
shifted products, one for each position of the kernel; 1×1 convolutions and those with strides or
few outputs as matrix products; 3×3 convolutions of many channels, which XLA:CPU runs as fast as
matrix products, by Winograd's algorithm, with 4/9 of the multiplications. Values and gradients are
those of `jax.lax.conv_general_dilated` and `flax.linen.max_pool`, to rounding. On a GPU the first
two serve as well, where images are small, and the pooling.

    with jaxkd.cpu.fast_convolutions():
        logits = model.apply(variables, images)
"""

from jaxkd.cpu.convolution import conv_general_dilated, fast_convolutions
from jaxkd.cpu.memory import hold_memory
from jaxkd.cpu.pooling import max_pool

__all__ = ['conv_general_dilated', 'fast_convolutions', 'hold_memory', 'max_pool']
