"""Runs a module's own code at other widths.

While the wrapped model is called, every layer that carries its width in a field is replaced by its
clone with the width that its parameters have now. Layers that take their shapes from their input
(BatchNorm, or somebody's own with `self.param`) need nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

Shapes = Mapping[str, tuple[int, ...]]


def _conv(module: nn.Conv, shapes: Shapes, x: Any) -> dict[str, Any]:
    *_, inputs, features = shapes['kernel']
    return {'features': features, 'feature_group_count': x.shape[-1] // inputs}


def _conv_transpose(module: nn.ConvTranspose, shapes: Shapes, x: Any) -> dict[str, Any]:
    del x
    return {'features': shapes['kernel'][-2 if module.transpose_kernel else -1]}


def _dense(module: nn.Dense, shapes: Shapes, x: Any) -> dict[str, Any]:
    del module, x
    return {'features': shapes['kernel'][-1]}


# How to find a layer's new fields from the shapes of its parameters and its input.
RESIZED: dict[type[nn.Module], Callable[[Any, Shapes, Any], dict[str, Any]]] = {
    nn.Conv: _conv,
    nn.ConvTranspose: _conv_transpose,
    nn.Dense: _dense,
}


class CompactModule(nn.Module):
    """A module that runs at the widths given, with the same variable tree as `model` has.

    Attributes:
      model: the module at its full width.
      widths: for each layer, by its path such as 'stem/conv', the shapes of its parameters.
    """

    model: nn.Module
    widths: Mapping[str, Shapes]

    def setup(self):
        nn.share_scope(self, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run('__call__', *args, **kwargs)

    def run(self, method: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the model, by name, or a function whose first argument it is."""
        root = len(self.path)

        def intercept(call, args, kwargs, context):
            module = context.module
            rule = next((RESIZED[c] for c in type(module).__mro__ if c in RESIZED), None)
            shapes = self.widths.get('/'.join(module.path[root:]))
            if rule is None or shapes is None or context.method_name != '__call__':
                return call(*args, **kwargs)
            fields = rule(module, shapes, args[0] if args else kwargs['inputs'])
            if all(getattr(module, field) == value for field, value in fields.items()):
                return call(*args, **kwargs)
            if module.has_variable('params', 'kernel'):
                # Linen traces the initializer of a kernel that exists, to compare the shapes:
                # half the time of tracing a compact network, if random numbers were drawn.
                fields['kernel_init'] = nn.initializers.zeros_init()
            return module.clone(parent=module.scope, **fields)(*args, **kwargs)

        with nn.intercept_methods(intercept):
            if isinstance(method, str):
                return getattr(self.model, method)(*args, **kwargs)
            # A bound method hangs on the unbound model: take its function, as Linen does.
            return getattr(method, '__func__', method)(self.model, *args, **kwargs)
