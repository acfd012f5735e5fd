"""Runs a module's own code at other widths.

While the wrapped model is called, every layer that carries its width in a field has that field set
to the width that its parameters have now. Layers that take their shapes from their input (norms, or
somebody's own with `self.param`) need nothing.

The width may be zero, where a whole branch has gone. Its layers are still called: what they compute
has no elements, and the last of them makes zeros of nothing, at no cost. The constant that is left
of the branch comes from the parameters that belong to what the branch is added to, such as the bias
or the BatchNorm of that last layer: they stay, because in general (a ReLU before the sum, a padded
convolution behind it) no other parameter could take the constant over exactly. See
`jaxkd.graph.constants`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import itertools
import math
from typing import Any

from flax import linen as nn
import jax
import numpy as np

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def _conv(module: nn.Conv, now: Shapes, before: Shapes, x: Any) -> dict[str, Any]:
    *_, inputs, features = now['kernel']
    groups = x.shape[-1] // inputs if inputs else module.feature_group_count
    if groups:
        return {'features': features, 'feature_group_count': groups}
    # A depthwise convolution without channels, which has one group of none: none is no number.
    return {
        'features': 0,
        'feature_group_count': 1,
        'conv_general_dilated': _convolve_nothing,
        'conv_general_dilated_cls': None,
    }


def _convolve_nothing(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    kernel = kernel.reshape(*kernel.shape[:-2], 0, 0)
    return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)


def _conv_local(module: nn.ConvLocal, now: Shapes, before: Shapes, x: Any) -> dict[str, Any]:
    return {'features': now['kernel'][-1]}


def _conv_transpose(module: nn.ConvTranspose, now: Shapes, before: Shapes, x: Any) -> dict:
    return {'features': now['kernel'][-2 if module.transpose_kernel else -1]}


def _dense(module: nn.Dense, now: Shapes, before: Shapes, x: Any) -> dict[str, Any]:
    return {'features': now['kernel'][-1]}


def _dense_general(module: nn.DenseGeneral, now: Shapes, before: Shapes, x: Any) -> dict[str, Any]:
    if isinstance(module.features, int):
        return {'features': now['kernel'][-1]}
    return {'features': now['kernel'][-len(module.features) :]}


def _einsum(module: nn.Einsum, now: Shapes, before: Shapes, x: Any) -> dict[str, Any]:
    return {'shape': now['kernel'][-len(module.shape) :]}


def _embed(module: nn.Embed, now: Shapes, before: Shapes, x: Any) -> dict[str, Any]:
    rows, features = now['embedding'][-2:]
    return {'num_embeddings': rows, 'features': features}


def _group_norm(module: nn.GroupNorm, now: Shapes, before: Shapes, x: Any) -> dict[str, Any]:
    """Groups keep their size; there are fewer."""
    name = next(iter(now), None)
    if module.num_groups is None or name is None:
        return {}
    return {'num_groups': max(now[name][-1] * module.num_groups // before[name][-1], 1)}


def _attention(
    module: nn.MultiHeadDotProductAttention, now: Shapes, before: Shapes, x: Any
) -> dict[str, Any]:
    """Fewer heads, or narrower ones; queries are still divided by the root of the full width."""
    heads, width = now['query/kernel'][-2:]
    fields = {  # none is no number: the kernels say it
        'num_heads': max(heads, 1),
        'qkv_features': max(heads, 1) * max(width, 1),
        'out_features': now['out/kernel'][-1],
    }
    full = before['query/kernel'][-1]
    if width != full:
        fields['attention_fn'] = functools.partial(
            _scaled, module.attention_fn, math.sqrt(width / full)
        )
    return fields


def _scaled(attention: Callable[..., Any], factor: float, query: Any, *args: Any, **kwargs: Any):
    return attention(query * factor, *args, **kwargs)


# How to find a layer's new fields from the shapes of its parameters, in the compact and in the full
# network, and its input.
RESIZED: dict[type[nn.Module], Callable[[Any, Shapes, Shapes, Any], dict[str, Any]]] = {
    nn.Conv: _conv,
    nn.ConvLocal: _conv_local,
    nn.ConvTranspose: _conv_transpose,
    nn.Dense: _dense,
    nn.DenseGeneral: _dense_general,
    nn.Einsum: _einsum,
    nn.Embed: _embed,
    nn.GroupNorm: _group_norm,
    nn.MultiHeadDotProductAttention: _attention,
}


def _by_size(module: nn.Module, now: Shapes, before: Shapes, x: Any) -> dict[str, Any]:
    """For layers of other people: the fields that hold the old size of an axis of a parameter.

    The last axes are asked first, because the others come from the layer's input as a rule. What
    is not clear is left alone; parameters get their shapes from `_ask_for`. `verify` says whether
    it was right.
    """
    sizes: dict[int, int] = {}
    for axes in (slice(-1, None), slice(None, -1)):
        pairs = {
            pair for name in now for pair in zip(before[name][axes], now[name][axes], strict=True)
        }
        clear = {old: new for old, new in pairs if len([1 for o, _ in pairs if o == old]) == 1}
        sizes = clear | sizes

    def changed(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(changed, value))
        return sizes.get(int(value), value) if is_size(value) else value

    return {name: changed(value) for name, value in size_fields(module).items()}


def size_fields(module: nn.Module) -> dict[str, Any]:
    """The fields of a module that may hold sizes."""
    values = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.init and field.name not in ('parent', 'name')
    }
    return {n: v for n, v in values.items() if is_size(v) or type(v) in (tuple, list)}


def is_size(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Unbound:
    """A module that Linen shall not take for a submodule of what it is a field of."""

    module: nn.Module


class CompactModule(nn.Module):
    """A module that runs at the widths given, with the same variable tree as the model has.

    Attributes:
      model: the module at its full width.
      widths: for each layer, by its path such as 'stem/conv', the shapes of its parameters.
      full_widths: the same of the full network.
      fields: for modules of the model's own, by path, fields that say a width; see
        `jaxkd.graph.follow`.
    """

    model: Unbound
    widths: Mapping[str, Shapes]
    full_widths: Mapping[str, Shapes]
    fields: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)

    def setup(self):
        # In this module's own scope: as a submodule it would have its variables under a name.
        object.__setattr__(self, '_bound', self.model.module.clone(parent=self.scope))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run('__call__', *args, **kwargs)

    def run(self, method: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the model, by name, or a function whose first argument it is."""
        root = len(self.path)
        resized: set[int] = set()  # modules whose fields are those of the compact network now

        def intercept(call, args, kwargs, context):
            module = context.module
            # One that Linen never bound has no variables; one whose method calls another of its own
            # has its new fields, in which a size may be the old one of something else.
            if module.scope is None or id(module) in resized:
                return call(*args, **kwargs)
            x = None
            if context.method_name == '__call__':
                x = args[0] if args else kwargs.get('inputs', kwargs.get('x'))
            path = module.path[root:]
            layer = '/'.join(path)
            _ask_for(module, self.widths.get(layer, {}), self.full_widths.get(layer, {}))
            own = self.fields.get(layer, {})
            own = {name: own[name] for name in size_fields(module) if name in own}
            fields = own | _new_fields(self, module, path, x)
            if not fields:
                return call(*args, **kwargs)
            resized.add(id(module))
            try:
                with with_fields(module, fields):
                    return call(*args, **kwargs)
            finally:
                resized.discard(id(module))

        with nn.intercept_methods(intercept):
            if isinstance(method, str):
                return getattr(self._bound, method)(*args, **kwargs)
            # A bound method hangs on the unbound model: take its function, as Linen does.
            return getattr(method, '__func__', method)(self._bound, *args, **kwargs)


def apply(
    module: nn.Module, variables: Any, /, *args: Any, method: Any = None, **kwargs: Any
) -> Any:
    """`module.apply`, in which `method` of a compact module is one of the model's methods."""
    if method is not None and isinstance(module, CompactModule):
        args, method = (method, *args), 'run'
    return module.apply(variables, *args, method=method, **kwargs)


def _rule(module: nn.Module) -> Callable[[Any, Shapes, Shapes, Any], dict[str, Any]]:
    return next((RESIZED[c] for c in type(module).__mro__ if c in RESIZED), _by_size)


def _new_fields(
    compact: CompactModule, module: nn.Module, path: tuple[str, ...], x: Any
) -> dict[str, Any]:
    """The fields of a layer that have to change while it is called with `x`."""
    rule = _rule(module)
    now, before = (
        _below(table, '/'.join(path), ('query', 'out') if rule is _attention else ())
        for table in (compact.widths, compact.full_widths)
    )
    # A layer whose parameters are as before may have been made for its input's new width, and a
    # convolution may have lost groups, which its input says.
    if not now or (rule is _by_size and now == before) or (rule is _conv and x is None):
        return {}
    fields = rule(module, now, before, x)
    fields = {name: value for name, value in fields.items() if getattr(module, name) != value}
    if fields and hasattr(module, 'kernel_init') and module.has_variable('params', 'kernel'):
        # Linen traces the initializer of a kernel that exists, to compare the shapes: half the time
        # of tracing a compact network, if random numbers were drawn.
        fields['kernel_init'] = nn.initializers.zeros_init()
    return fields


def _ask_for(module: nn.Module, now: Shapes, before: Shapes) -> None:
    """Makes a layer ask initializers for the shapes that it has now, where its code does not.

    A layer of other people's may have a size in a field, and one number may stand for several axes
    that have become different, such as a square kernel's inputs and outputs. It may have a size as
    a number in its code: that is the full width of this axis. And a layer that has lost all of its
    inputs or outputs gets parameters without elements, for which most initializers would divide by
    zero.
    """
    in_fields = True
    if _rule(module) is _by_size:
        known = set(filter(is_size, jax.tree.leaves(list(size_fields(module).values()))))
        changed = {old for name in now for old, new in zip(before[name], now[name]) if old != new}
        in_fields = bool(known & changed)
    elif all(map(math.prod, now.values())):
        return
    ask = module.scope.param

    def param(name, init_fn, *args, **kwargs):
        if name in now and args and isinstance(args[0], tuple | list):
            sizes = itertools.zip_longest(args[0], before[name], now[name])
            if in_fields or all(asked in (old, new) for asked, old, new in sizes):
                args = (now[name], *args[1:])
                init_fn = init_fn if math.prod(now[name]) else nn.initializers.zeros
        return ask(name, init_fn, *args, **kwargs)

    module.scope.param = param


def _below(widths: Mapping[str, Shapes], layer: str, children: tuple[str, ...]) -> Shapes:
    """The shapes of a layer's own parameters, or of its children's kernels."""
    if not children:
        return widths.get(layer, {})
    return {f'{name}/kernel': widths[f'{layer}/{name}'.lstrip('/')]['kernel'] for name in children}


@contextlib.contextmanager
def with_fields(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Sets fields of a module for the length of a call.

    Not on a clone: names, scope and what `setup` has made stay as they are.
    """
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            object.__setattr__(module, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)
