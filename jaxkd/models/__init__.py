"""Plain Flax Linen networks, by name."""

from collections.abc import Callable

from flax import linen as nn

from jaxkd.models import (
    convnext,
    densenet,
    efficientnet,
    ghostnet,
    inception,
    mobilenet,
    mobilenet_v1,
    mobilenet_v3,
    mobilevit,
    regnet,
    resnet,
    shufflenet,
    squeezenet,
    unet,
    vgg,
)

REGISTRY: dict[str, Callable[..., nn.Module]] = {
    **mobilenet_v1.NETWORKS,
    **mobilenet.NETWORKS,
    **mobilenet_v3.NETWORKS,
    **resnet.NETWORKS,
    **vgg.NETWORKS,
    **densenet.NETWORKS,
    **inception.NETWORKS,
    **squeezenet.NETWORKS,
    **efficientnet.NETWORKS,
    **shufflenet.NETWORKS,
    **regnet.NETWORKS,
    **ghostnet.NETWORKS,
    **convnext.NETWORKS,
    **mobilevit.NETWORKS,
    **unet.NETWORKS,
}


def create(name: str, **arguments) -> nn.Module:
    """The network `name` of the registry, made with `arguments`.

    Raises:
      KeyError: for a name that the registry lacks.
    """
    return REGISTRY[name](**arguments)
