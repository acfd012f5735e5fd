"""The command `python -m jaxkd.convert`: a file of PyTorch's weights as Flax variables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from flax import linen as nn
import jax

from jaxkd import checkpoint, command, summary
from jaxkd.convert import weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the command line says; returns its exit status."""
    return command.run(_run, _parse(arguments))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog='python -m jaxkd.convert',
        description='Turns weights of torchvision, timm or transformers into a directory of Flax '
        'variables for a network of jaxkd. Every variable is filled, and everything in the file '
        'used, or it is refused.',
        epilog='exit status: 0 done, 1 the file does not fit the network, 2 a wrong command line',
    )
    parser.add_argument(
        'file', metavar='FILE', help='.safetensors, or .pt and .pth of a state dict'
    )
    parser.add_argument('--out', required=True, metavar='DIR')
    parser.add_argument(
        '--input',
        default='1,224,224,3',
        metavar='SHAPE',
        help='of the images that the network is made for, the batch first (default: %(default)s)',
    )
    command.add_model(parser, required=True)
    return parser.parse_args(arguments)


def _run(flags: argparse.Namespace) -> None:
    model = command.model(flags)
    image = summary.abstract(flags.input, 'float32')
    variables = summary.initial(model, [image], command.apply(flags))
    file = pathlib.Path(flags.file)
    found = weights.find(file, model, variables)
    settings = _settings(file, model, found)
    arguments = command.arguments(flags) | (settings or {})
    metadata = {
        'kind': weights.KIND,
        'model': flags.model,
        'arguments': str(arguments),
        'settings': settings,
        'from': {'file': file.name, 'names': found.source},
    }
    checkpoint.write(flags.out, found.variables, metadata)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(found.variables['params']))
    print(
        f'{flags.out}: {parameters:,} parameters by the names of {found.source}, for '
        f'--model={flags.model} --arguments="{arguments}"'
    )


def _settings(
    file: pathlib.Path, model: nn.Module, found: weights.Found
) -> Mapping[str, Any] | None:
    """The fields that the model needs: as it has them, where it can; else as the file's name says.

    timm's networks of one family have the same names, whether they are TensorFlow's or not.
    """
    if not found.settings:
        return None
    fitting = weights.fitting(model, found.settings)
    if fitting is not None:
        return fitting
    return found.settings[-1 if file.name.startswith('tf_') else 0]
