"""Plain Flax Linen networks, by name."""

from collections.abc import Callable

from flax import linen as nn

from jaxkd.models import mobilenet

REGISTRY: dict[str, Callable[..., nn.Module]] = {
    'mobilenet_v2': mobilenet.MobileNetV2,
}


def create(name: str, **arguments) -> nn.Module:
    """The network `name` of the registry, made with `arguments`.

    Raises:
      KeyError: for a name that the registry lacks.
    """
    return REGISTRY[name](**arguments)
