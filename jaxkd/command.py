"""What the package's commands share: flags that name a model, and errors of one sentence."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Mapping
import importlib
import inspect
import operator
import os
import sys
from typing import Any, NoReturn

from flax import linen as nn

from jaxkd import errors, models


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, without the usage."""
        self.exit(2, f'jaxkd: {message}; --help lists the flags\n')


def add_model(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The flags --model, --arguments and --apply; `model` and `apply` read them."""
    parser.add_argument(
        '--model',
        required=required,
        metavar='NAME',
        help='a network of jaxkd, such as mobilenet_v2, or module:function of your own, where '
        'the function (a class will do) returns a Linen module; the module may lie in the current '
        'directory',
    )
    parser.add_argument(
        '--arguments',
        default='{}',
        metavar='DICT',
        help='of the network or the function: "{\'num_classes\': 10}"',
    )
    parser.add_argument(
        '--apply',
        default='{}',
        metavar='DICT',
        help='what the network is called with beside its inputs: "{\'deterministic\': True}"; '
        "'train': False is added where it has that argument",
    )


def model(flags: argparse.Namespace) -> nn.Module | None:
    """The model that the command line names, if it names one."""
    arguments = literal('--arguments', flags.arguments, dict, "{'num_classes': 10}")
    return None if flags.model is None else make_model(flags.model, arguments)


def apply(flags: argparse.Namespace) -> dict[str, Any]:
    """Further arguments of the model."""
    return literal('--apply', flags.apply, dict, "{'train': False}")


def at_inference(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with `train=False` where the module has such an argument and it isn't given."""
    trains = 'train' in inspect.signature(model.__call__).parameters
    return {'train': False, **given} if trains else dict(given)


def make_model(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model that the command line names.

    Args:
      name: of the registry, or `module:function`; the function returns a Linen module when it is
        called with the arguments, as a Linen class does. The current directory is looked in first.
      arguments: of the function, or of the network of the registry.

    Raises:
      ConfigError: where there is none, with what to change.
    """
    if ':' in name:
        make = _function(name)
    elif name in models.REGISTRY:
        make = models.REGISTRY[name]
    else:
        why = 'your own is named module:function'
        raise errors.ConfigError('--model', name, allowed=models.REGISTRY, why=why)
    try:
        model = make(**arguments)
    except Exception as error:
        raise errors.ConfigError('--arguments', dict(arguments), why=words(error)) from error
    if not isinstance(model, nn.Module):
        why = f'it returns a {type(model).__name__}; a Linen module is needed'
        raise errors.ConfigError('--model', name, why=why)
    return model


def _function(name: str) -> Any:
    module, _, function = name.partition(':')
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = operator.attrgetter(function)(importlib.import_module(module))
    except ModuleNotFoundError as error:
        why = f'there is no module {error.name}, neither installed nor in the current directory'
    except AttributeError as error:
        why = words(error)
    except Exception as error:  # the user's code can raise anything
        why = f'importing {module} raises {words(error)}'
    else:
        if callable(found) and not isinstance(found, nn.Module):
            return found
        why = 'it is neither a function nor a class; name one that makes the Linen module'
    raise errors.ConfigError('--model', name, why=why) from None


def words(error: BaseException) -> str:
    """An exception in one line."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())


def literal(flag: str, text: str, kind: type, example: str) -> Any:
    """A value that is written as Python writes it."""
    try:
        value = ast.literal_eval(text)
        if isinstance(value, kind):
            return value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    raise errors.ConfigError(flag, text, why=f'write a {kind.__name__}, such as "{example}"')


def run(work: Callable[[argparse.Namespace], None], flags: argparse.Namespace) -> int:
    """Does what the flags say; the exit status: 1 failed, 2 a wrong command line."""
    try:
        work(flags)
    except errors.JaxkdError as error:
        print(f'jaxkd: {" ".join(str(error).split())}', file=sys.stderr)
        return 2 if isinstance(error, errors.ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return 0
