"""Networks by the names that commands and configs give them: of the registry, or of one's own."""

from __future__ import annotations

from collections.abc import Mapping
import importlib
import inspect
import operator
import os
import sys
from typing import Any

from flax import linen as nn

from jaxkd import errors, models


def make(
    name: str,
    arguments: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any] | None = None,
    fields: tuple[str, str] = ('--model', '--arguments'),
) -> nn.Module:
    """The network of a name.

    Args:
      name: of the registry, or `package.module:function`; the function returns a Linen module when
        it is called with the arguments, as a Linen class does. The current directory is looked in
        first.
      arguments: of the function, or of the network of the registry.
      defaults: further ones, where the function takes them and they are not among the arguments.
      fields: what the user calls name and arguments.

    Raises:
      ConfigError: where there is none, with what to change.
    """
    if ':' in name:
        function = _function(name, fields[0])
    elif name in models.REGISTRY:
        function = models.REGISTRY[name]
    else:
        why = 'your own is named package.module:function'
        raise errors.ConfigError(fields[0], name, allowed=models.REGISTRY, why=why)
    further = {key: value for key, value in (defaults or {}).items() if _takes(function, key)}
    try:
        model = function(**{**further, **arguments})
    except Exception as error:  # the user's code can raise anything
        hint = '; {} for none' if arguments else ''
        why = errors.words(error) + hint
        raise errors.ConfigError(fields[1], dict(arguments), why=why) from error
    if not isinstance(model, nn.Module):
        why = f'it returns a {type(model).__name__}; a Linen module is needed'
        raise errors.ConfigError(fields[0], name, why=why)
    return model


def _takes(function: Any, argument: str) -> bool:
    try:
        has = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of something that is not written in Python
        return False
    return argument in has


def _function(name: str, field: str) -> Any:
    module, _, function = name.partition(':')
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = operator.attrgetter(function)(importlib.import_module(module))
    except ModuleNotFoundError as error:
        why = f'there is no module {error.name}, neither installed nor in the current directory'
    except AttributeError as error:
        why = errors.words(error)
    except (Exception, SystemExit) as error:  # the user's code can raise anything
        why = f'importing {module} raises {errors.words(error)}'
    else:
        if callable(found) and not isinstance(found, nn.Module):
            return found
        why = 'it is neither a function nor a class; name one that makes the Linen module'
    raise errors.ConfigError(field, name, why=why) from None
