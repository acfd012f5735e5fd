"""What was found: the record of a structure, and the compact network that has it."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from flax import linen as nn
import jax
import numpy as np

from jaxkd import cpu
from jaxkd.graph import resize
from jaxkd.graph.trace import Graph, Keep


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a compact network keeps of the full one. `to_json` and `from_json` are inverses.

    Attributes:
      model: {'module', 'class', 'arguments'}: where the full model's class is defined, and its
        fields. `arguments` is None where a field cannot be written as JSON.
      groups: by name, {'size': units of the full network, 'kept': indices of the units kept}. In a
        network that was widened, a unit is there as often as its index.
      widths, full_widths: by layer, the shapes of its parameters in the compact and in the full
        network.
      inputs: shape (with the batch traced) and dtype of each input.
      full, compact: {'flops', 'params', 'activations', 'peak_activations'} of one example, and
        'latency' where it was measured.
      inexact: by group, why the other channels changed when some of it were removed.
      fields: for modules of the model's own, by path, the fields that say a width that was cut.
    """

    model: Mapping[str, Any]
    groups: Mapping[str, Mapping[str, Any]]
    widths: Mapping[str, Mapping[str, tuple[int, ...]]]
    full_widths: Mapping[str, Mapping[str, tuple[int, ...]]]
    inputs: tuple[Mapping[str, Any], ...]
    full: Mapping[str, float]
    compact: Mapping[str, float]
    inexact: Mapping[str, str]
    fields: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def keep(self) -> dict[str, np.ndarray]:
        """Which units there are, bool [size] by group name."""
        return {name: copies > 0 for name, copies in self.copies.items()}

    @property
    def copies(self) -> dict[str, np.ndarray]:
        """How often each unit is there, int [size] by group name: 0 or 1 unless widened."""
        return {
            name: np.bincount(np.asarray(group['kept'], int), minlength=group['size'])
            for name, group in self.groups.items()
        }

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Structure:
        tables = {
            table: {
                layer: {name: tuple(shape) for name, shape in shapes.items()}
                for layer, shapes in record[table].items()
            }
            for table in ('widths', 'full_widths')
        }
        fields = {  # which older records lack
            layer: {name: int(width) for name, width in fields.items()}
            for layer, fields in record.get('fields', {}).items()
        }
        return cls(**{**record, **tables, 'inputs': tuple(record['inputs']), 'fields': fields})


@dataclasses.dataclass(frozen=True, eq=False)
class CompactModel:
    """A network that is physically smaller.

    Attributes:
      module: a Linen module; `init` and `apply` as usual.
      variables: its variables, nested dicts of arrays.
      structure: what it keeps of the full network.
    """

    module: nn.Module
    variables: Any
    structure: Structure

    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """What `model.apply` does, at the compact widths: `mutable=`, `rngs=` and all.

        `method` is a method of the model or its name. On a CPU, convolutions and BatchNorms run in
        the form that is fast there.
        """
        with cpu.fast_layers():
            return resize.apply(self.module, variables, *args, method=method, **kwargs)


def describe(model: nn.Module) -> dict[str, Any]:
    """Class and fields of a Linen module, as far as JSON can hold them."""
    arguments: dict[str, Any] | None = {}
    for field in _fields(model):
        value = getattr(model, field.name)
        if value is field.default:
            continue
        try:
            arguments[field.name] = _plain(value)
        except TypeError:
            arguments = None
            break
    return {
        'module': type(model).__module__,
        'class': type(model).__qualname__,
        'arguments': arguments,
    }


def differing(model: nn.Module, recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields of a module that `describe` recorded otherwise: as (there, now), by name.

    None of another class, nor those that JSON cannot hold: two functions may be the same.
    """
    arguments, own = recorded['arguments'], describe(model)
    if arguments is None or any(own[key] != recorded[key] for key in ('module', 'class')):
        return {}
    found = {}
    for field in _fields(model):
        there, now = arguments.get(field.name, field.default), getattr(model, field.name)
        try:
            there, now = _plain(there), _plain(now)
        except TypeError:
            continue
        if there != now:
            found[field.name] = there, now
    return found


def _fields(model: nn.Module) -> list[dataclasses.Field]:
    """Those that are the model's arguments."""
    fields = dataclasses.fields(model)
    return [field for field in fields if field.init and field.name not in ('parent', 'name')]


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def widths(tree: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of the parameters of each layer: {'stem/conv': {'kernel': (3, 3, 3, 32)}, …}."""
    result: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree.get('params', {}))[0]:
        *layer, name = (str(entry.key) for entry in path)
        result.setdefault('/'.join(layer), {})[name] = tuple(leaf.shape)
    return result


def record(graph: Graph, keep: Keep, shapes: Any) -> Structure:
    """The structure that `keep` gives the traced network, whose variables then have `shapes`."""
    return repeated(graph, graph.complete(keep), shapes)


def repeated(graph: Graph, copies: Mapping[str, np.ndarray], shapes: Any) -> Structure:
    """`record` of a network that has each unit so many times, [size] by the name of every group."""
    full, compact = graph.cost(), graph.polynomial.cost(copies)
    model, full_widths = graph.model, widths(graph.variables)
    if isinstance(model, resize.CompactModule):  # a compact network cut further
        full_widths = {layer: dict(shapes) for layer, shapes in model.full_widths.items()}
    fields: dict[str, dict[str, int]] = {}
    for follow in graph.follows:
        width = int(np.sum(copies[follow.group])) * follow.channels
        fields.setdefault(follow.layer, {})[follow.field] = width
    resources = (*graph.resources, 'peak_activations')
    return Structure(
        model=describe(full_module(model)),
        groups={
            name: {'size': len(number), 'kept': np.repeat(np.arange(len(number)), number).tolist()}
            for name, number in copies.items()
        },
        widths=widths(shapes),
        full_widths=full_widths,
        inputs=tuple(
            {'shape': list(leaf.shape), 'dtype': str(leaf.dtype)}
            for leaf in jax.tree.leaves(graph.inputs)
        ),
        full={resource: getattr(full, resource) for resource in resources},
        compact={resource: getattr(compact, resource) for resource in resources},
        inexact={g.name: g.inexact for g in graph.groups if g.inexact and not copies[g.name].all()},
        fields=fields,
    )


def composed(first: Structure, then: Structure) -> Structure:
    """The structure `then` of a network with the structure `first`, as one of the full network.

    Groups of branches that `first` has lost are none of that network's, and stay empty.
    """
    groups = {
        name: {
            'size': group['size'],
            'kept': [group['kept'][unit] for unit in then.groups[name]['kept']]
            if group['kept']
            else [],
        }
        for name, group in first.groups.items()
    }
    return dataclasses.replace(
        then, groups=groups, full=first.full, inexact={**first.inexact, **then.inexact}
    )


def module(model: nn.Module, structure: Structure) -> nn.Module:
    """The model, or the model of a compact one, at the structure's widths."""
    return resize.CompactModule(
        resize.Unbound(full_module(model)),
        structure.widths,
        structure.full_widths,
        structure.fields,
    )


def full_module(model: nn.Module) -> nn.Module:
    """What a compact network's module was at its full widths; of any other, the module itself."""
    return model.model.module if isinstance(model, resize.CompactModule) else model
