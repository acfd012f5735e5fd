"""What networks compute on the way to their logits, by the names of the modules that make it.

The name of a feature is the path of its module, such as 'block1/expand'; 'block1/expand:2' is what
the module returns when it is called for the second time. The model's code stays as it is: Linen
keeps the outputs that are asked for. Of a model that returns `(logits, out)`, with a dict `out` of
arrays, these are features, too, by their keys. A compact network has the features of the full one,
of fewer channels, but for those in `out`: outputs of a network keep their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp

from jaxkd import mode

Wanted = Callable[[str], bool]

# The entry of the trained parameters with what makes the teacher's channels of the student's, by
# the name of the feature. It is trained with the network and is no part of it; as that of gates, no
# variable of a model is called so.
ADAPTERS = 'jaxkd_adapters'
_COLLECTION = 'intermediates'


class Outputs(NamedTuple):
    """What a network returns.

    Attributes:
      logits: float32 [batch, classes].
      features: those asked for, by name: float32 [batch, ...].
    """

    logits: jax.Array
    features: Mapping[str, jax.Array]


def outputs(
    model: nn.Module,
    variables: Any,
    inputs: jax.Array,
    wanted: Wanted | None = None,
    *,
    train: bool = False,
    mutable: Sequence[str] = (),
    **kwargs: Any,
) -> tuple[Outputs, Any]:
    """Applies a model, and keeps those features whose names are wanted.

    Args:
      model, variables, inputs: as in `model.apply`.
      wanted: whether to keep what the module of this path returns, or the entry of `out` with this
        key; None keeps nothing, at no cost.
      train: whether the model trains; see `jaxkd.mode`.
      mutable: collections that the model may change.
      **kwargs: further arguments of `model.apply`.

    Returns:
      The outputs, and the collections that may have changed.
    """
    kept = list(mutable)
    kwargs |= mode.arguments(model, train=train)
    if wanted:
        kwargs['capture_intermediates'] = functools.partial(_is_wanted, wanted)
        kept.append(_COLLECTION)
    found = model.apply(variables, inputs, mutable=kept or False, **kwargs)
    result, changed = found if kept else (found, {})
    logits, out = result if isinstance(result, tuple) else (result, {})
    features = {}
    if wanted:
        changed = dict(changed)
        made = _captured(changed.pop(_COLLECTION, {}))
        returned = traverse_util.flatten_dict(dict(out), sep='/')
        made |= {key: feature for key, feature in returned.items() if wanted(key)}
        features = {
            name: feature.astype(jnp.float32)
            for name, feature in made.items()
            if _is_feature(feature)
        }
    return Outputs(logits.astype(jnp.float32), features), changed


def taught(
    model: nn.Module, variables: Any, inputs: jax.Array, wanted: Wanted | None = None
) -> Outputs:
    """What a teacher says in eval mode. Of several, the mean of their logits.

    Args:
      model, inputs, wanted: see `outputs`.
      variables: the teacher's, or a tuple with those of several. The first has the features.
    """
    first, *others = each(variables)
    said, _ = outputs(model, first, inputs, wanted)
    if not others:
        return said
    logits = [outputs(model, other, inputs)[0].logits for other in others]
    return said._replace(logits=sum(logits, start=said.logits) / (1 + len(logits)))


def each(variables: Any) -> tuple[Any, ...]:
    """The variables of each teacher, of those of one or a tuple with those of several."""
    return variables if isinstance(variables, tuple) else (variables,)


def path(name: str) -> str:
    """Of the module that makes the feature of this name."""
    return name.partition(':')[0]


def shapes(model: nn.Module, variables: Any, image: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the features that there are, by name, in the order of the computation.

    Nothing is computed.

    Args:
      model: the network.
      variables: its, or their shapes.
      image: its input, or its shape.
    """
    order: dict[str, int] = {}  # that Linen gives back is another

    def noted(path: str) -> bool:
        order.setdefault(path, len(order))
        return True

    def run(variables: Any, image: Any) -> Outputs:
        return outputs(model, variables, image, noted)[0]

    found = jax.eval_shape(run, variables, image).features
    return {name: found[name].shape for name in sorted(found, key=lambda n: order[path(n)])}


def adapters(
    student: Mapping[str, Sequence[int]], teacher: Mapping[str, Sequence[int]], key: jax.Array
) -> dict[str, dict[str, jax.Array]]:
    """New adapters, for `jaxkd.distill.fitnet`, of the features whose channels differ in number.

    Args:
      student, teacher: shapes by name, see `shapes`.
      key: of the random weights.

    Returns:
      'kernel', float32 [student's channels, teacher's channels], and 'bias', by name.
    """
    made = {}
    for index, (name, (*_, channels)) in enumerate(student.items()):
        wanted = teacher[name][-1]
        if channels != wanted:
            random = jax.random.normal(jax.random.fold_in(key, index), (channels, wanted))
            kernel = random / max(channels, 1) ** 0.5
            made[name] = {'kernel': kernel, 'bias': jnp.zeros(wanted)}
    return made


def without_adapters(params: Any, key: jax.Array | None = None) -> Any:
    """The parameters of the network alone; a `jaxkd.train.Fold`."""
    del key
    return {name: value for name, value in params.items() if name != ADAPTERS}


def _is_wanted(wanted: Wanted, module: nn.Module, method: str) -> bool:
    # What the whole network returns are its logits.
    if method != '__call__' or module.scope is None or not module.path:
        return False
    return wanted('/'.join(module.path))


def _captured(collection: Any) -> dict[str, jax.Array]:
    """By name, what Linen has kept: a tuple for each module, of what its calls returned."""
    found = {}
    for (*module, method), calls in traverse_util.flatten_dict(collection).items():
        if method == '__call__':  # else the model keeps something itself
            for number, feature in enumerate(calls, 1):
                name = '/'.join(module)
                found[name if number == 1 else f'{name}:{number}'] = feature
    return found


def _is_feature(value: Any) -> bool:
    """Whether it is an array of floats with an axis beside that of the batch."""
    return hasattr(value, 'dtype') and jnp.issubdtype(value.dtype, jnp.floating) and value.ndim > 1
