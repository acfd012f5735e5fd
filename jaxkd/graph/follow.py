"""Fields of a model's own modules that say how wide something is that is cut.

`x + y if x.shape[-1] == self.features else y` is at home in many models. At other widths the field
has to say the new one, or the sum is left out.
"""

from __future__ import annotations

from flax import linen as nn
import jax

from jaxkd.graph import resize
from jaxkd.graph.trace import ChannelGroup, Follow, Graph, outputs_of


def candidates(graph: Graph) -> tuple[Follow, ...]:
    """The fields that are as wide as what their module makes, and hands on to others."""
    found = []
    for layer, fields in _fields(graph).items():
        for field, size in fields.items():
            made = [group for group in graph.groups if _makes(graph, group, layer, size)]
            beyond = [group for group in made if not all(_inside(graph, group, layer))]
            groups = beyond or made
            if len(groups) == 1:
                found.append(Follow('/'.join(layer), field, groups[0].name, size // groups[0].size))
    return tuple(found)


def _makes(graph: Graph, group: ChannelGroup, layer: tuple[str, ...], size: int) -> bool:
    """Whether the module makes this group, and nothing else beside it, at this size."""
    return any(
        makes and within and graph.shapes[member.path][member.axis] == size == positions.size
        for member, positions, makes, within in zip(
            group.members, group.positions, group.made, _inside(graph, group, layer), strict=True
        )
    )


def _inside(graph: Graph, group: ChannelGroup, layer: tuple[str, ...]) -> list[bool]:
    """Of each member, whether it belongs to the module."""
    return [graph.keys_of[m.path][1 : 1 + len(layer)] == layer for m in group.members]


def _fields(graph: Graph) -> dict[tuple[str, ...], dict[str, int]]:
    """The fields of modules that may be widths, as they are while the module is called."""
    found: dict[tuple[str, ...], dict[str, int]] = {}
    compact = isinstance(graph.model, resize.CompactModule)
    narrower = graph.model.fields if compact else {}

    def look(call, args, kwargs, context):
        module = context.module
        if module.scope is not None and not isinstance(module, resize.CompactModule):
            fields = resize.size_fields(module) | dict(narrower.get('/'.join(module.path), {}))
            sizes = {name: int(value) for name, value in fields.items() if resize.is_size(value)}
            if sizes and type(module) not in resize.RESIZED:
                found[module.path] = sizes
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        jax.eval_shape(outputs_of(graph.model, graph.apply_kwargs), graph.variables, graph.inputs)
    return found
