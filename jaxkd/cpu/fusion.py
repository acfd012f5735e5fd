"""Where XLA:CPU has to stop fusing."""

import jax
from jax import lax
import jax.numpy as jnp


def materialize(x: jax.Array, other: jax.Array) -> jax.Array:
    """x, computed once, whoever reads it.

    XLA:CPU fuses what is elementwise, a sum of shifted products too, into each of its readers, and
    so computes it as often; its passes see through `lax.optimization_barrier`. What a conditional
    is given they do not look into, as long as the condition is not known to them: that nothing is
    above infinity. Elsewhere, where this would be waited for, a barrier.

    Args:
      x: of any shape.
      other: floats; best on all devices, where x is divided among them.
    """
    if jax.default_backend() != 'cpu' or 0 in other.shape:
        return lax.optimization_barrier(x)
    return lax.cond(other.reshape(-1)[0] > jnp.inf, lambda x: -x, lambda x: x, x)
