"""What the package's commands share: flags that name a model, and errors of one sentence."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Mapping
import os
import sys
from typing import Any, NoReturn

from flax import linen as nn

from jaxkd import device, errors, network, saved
from jaxkd.graph.structure import CompactModel


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
        metavar='DICT',
        help='of the network or the function: "{\'num_classes\': 10}"'
        + ('' if required else ' (default: those that it was made with, as far as it takes them)'),
    )
    parser.add_argument(
        '--apply',
        default='{}',
        metavar='DICT',
        help='what the network is called with beside its inputs: "{\'deterministic\': True}"; '
        'arguments that tell it not to train, such as train=False, are added where it has them',
    )


def model(flags: argparse.Namespace) -> nn.Module:
    """The model that the command line names."""
    return network.make(flags.model, arguments(flags))


def arguments(flags: argparse.Namespace) -> dict[str, Any]:
    """Of the model, where the command line has them."""
    return literal(
        '--arguments',
        '{}' if flags.arguments is None else flags.arguments,
        dict,
        "{'num_classes': 10}",
    )


def load(flags: argparse.Namespace, folder: str) -> CompactModel:
    """The compact network in a folder, with the model that the command line names, if it does.

    Without --arguments that model is made with those that are recorded, as far as it takes them.
    """
    path, given = saved.within(folder), arguments(flags)
    if os.path.isfile(path):
        why = 'is a file; name the folder of a finished run, or one that jaxkd.save wrote'
        raise errors.CheckpointError(folder, why)

    def full(recorded: Mapping[str, Any]) -> nn.Module:
        if flags.model:
            there = saved.arguments(recorded) if flags.arguments is None else None
            return network.make(flags.model, given, defaults=there)
        known = saved.registered(recorded)
        if known is None:
            why = (
                f'{saved.made_from(recorded)}; name what makes the full-width module, as '
                '--model=package.module:function, and its --arguments'
            )
            raise errors.CheckpointError(path, why)
        return known

    return saved.read(path, full)


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
        print('jaxkd: stopped', file=sys.stderr)
        return 130
    except Exception:
        if not (sentence := device.missing()):
            raise
        print(f'jaxkd: {sentence}', file=sys.stderr)
        return 2
    return 0
