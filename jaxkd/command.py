"""What the package's commands share: flags that name a model, and errors of one sentence."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
import sys
from typing import Any, NoReturn

from flax import linen as nn

from jaxkd import errors, network


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
        'arguments that tell it not to train, such as train=False, are added where it has them',
    )


def model(flags: argparse.Namespace) -> nn.Module | None:
    """The model that the command line names, if it names one."""
    arguments = literal('--arguments', flags.arguments, dict, "{'num_classes': 10}")
    return None if flags.model is None else network.make(flags.model, arguments)


def apply(flags: argparse.Namespace) -> dict[str, Any]:
    """Further arguments of the model."""
    return literal('--apply', flags.apply, dict, "{'deterministic': True}")


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
