"""`python -m jaxkd.summary`: what a network is made of, before anything is trained.

Shapes are all it takes: no parameter is allocated and nothing is computed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import operator
import pathlib
import re
import sys
from typing import Any
import warnings

from flax import linen as nn
import jax
import jax.numpy as jnp
import rich.console

from jaxkd import command, errors, mode, picture
from jaxkd.graph import table as tables
from jaxkd.graph import trace as tracing
from jaxkd.graph.cost import Row
from jaxkd.search import blocks as blocking

OUTSIDE = '(none)'  # the block of what no pattern matches


def describe(graph: tracing.Graph, blocks: blocking.Blocks = ()) -> str:
    """Layers, channel groups, cost by block and totals, as text.

    Args:
      graph: the traced network.
      blocks: 'auto' or `[(pattern, settings), …]`, as everywhere. Without them, the modules at the
        network's top level are its blocks.

    Raises:
      ConfigError: for blocks that cannot be.
    """
    blocks = blocking.pairs(graph, blocks)
    limits = blocking.resolve(graph, blocks)
    if blocks:
        of_group = {name: limit.block or OUTSIDE for name, limit in limits.items()}
    else:
        of_group = {name: re.split('[/:#]', name)[0] for name in limits}
    cost, least = graph.cost(), graph.cost(blocking.least(graph, limits))
    inputs = ', '.join(str(leaf) for leaf in _avals(graph.inputs))
    outputs = ', '.join(str(aval) for aval in graph.program.out_avals[: graph.outputs])
    cut = ', '.join(
        f'{(whole - rest) / max(whole, 1):.1%} of the {word}'
        for whole, rest, word in (
            (cost.flops, least.flops, 'multiply-adds'),
            (cost.params, least.params, 'parameters'),
        )
    )
    totals = [
        ('network', f'{type(graph.model).__name__}, {inputs} → {outputs}'),
        ('multiply-adds', f'{cost.flops:,} for one example'),
        ('parameters', f'{cost.params:,}'),
        ('activations', f'{cost.activations:,} bytes out of convolutions and dots for one example'),
        ('peak activations', f'{cost.peak_activations:,} bytes at one time'),
        ('groups', f'{len(graph.groups)}, of which {len(graph.frozen)} frozen'),
        ('can be cut', f'{cut}, with the fewest channels in each group'),
    ]
    return '\n\n'.join(
        (
            tables.table(graph, blocks=of_group),
            tables.costs_table('block', _by_block(graph, blocks, of_group), cost),
            tables.grid(totals, left=(0, 1)),
        )
    )


def _avals(tree: Any) -> list[jax.core.ShapedArray]:
    return [jax.core.ShapedArray(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def _by_block(
    graph: tracing.Graph, blocks: Sequence[tuple[str, Any]], of_group: Mapping[str, str]
) -> list[Row]:
    """The cost of every block, in their order.

    With patterns, a layer belongs to the block of the channels that it makes: whoever decides on
    them decides on what the layer costs.
    """
    rows = {pattern: Row(pattern, 0, 0, 0) for pattern, _ in blocks}
    for layer, row in zip(tables.layers(graph), graph.cost().rows, strict=True):
        if not blocks:
            block = row.layer.split('/')[0]
        elif layer.makes:
            block = of_group[next(iter(layer.makes))]
        else:  # such as the product of queries and keys, which makes no channels
            matching = (pattern for pattern, _ in blocks if re.search(pattern, row.layer))
            block = next(matching, OUTSIDE)
        before = rows.get(block, Row(block, 0, 0, 0))
        rows[block] = Row(block, *map(operator.add, before[1:], row[1:]))
    return list(rows.values())


def abstract(text: str, dtype: str) -> jax.ShapeDtypeStruct:
    """An input from the command line.

    >>> abstract('1,16:int32', 'float32')
    ShapeDtypeStruct(shape=(1, 16), dtype=int32)

    Args:
      text: the shape, with the batch as its first number, and the dtype if it is not `dtype`.
      dtype: of an input that does not say its own.
    """
    shape, _, own = text.partition(':')
    if not re.fullmatch(r'\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*', shape):
        why = 'a shape is whole numbers from 1 on, such as 1,224,224,3'
        raise errors.ConfigError('--input', text, why=why)
    try:
        kind = jnp.dtype(own or dtype)
        if not any(jnp.issubdtype(kind, numbers) for numbers in (jnp.number, jnp.bool_)):
            raise TypeError
    except (TypeError, ValueError, SyntaxError):
        field, value = ('--input', text) if own else ('--dtype', dtype)
        why = 'the dtype must be one of numbers, such as float32, bfloat16 or int32'
        raise errors.ConfigError(field, value, why=why) from None
    return jax.ShapeDtypeStruct(tuple(map(int, shape.split(','))), kind)


def trace(
    model: nn.Module,
    inputs: Sequence[jax.ShapeDtypeStruct],
    apply: Mapping[str, Any],
    inexact: str = 'freeze',
) -> tracing.Graph:
    """The graph of a model that has no variables yet.

    Args:
      model: the Linen module.
      inputs: shapes and dtypes.
      apply: further arguments of the module. Those that tell it not to train are added; see
        `jaxkd.mode`.
      inexact: as `jaxkd.trace` takes it.

    Raises:
      GraphError: where the module cannot be called so.
    """
    apply = mode.evaluating(model, apply)
    variables = initial(model, inputs, apply)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # what is frozen stands in the table
        return tracing.trace(model, variables, *inputs, inexact=inexact, **apply)


def initial(
    model: nn.Module, inputs: Sequence[jax.ShapeDtypeStruct], apply: Mapping[str, Any]
) -> Any:
    """Shapes and dtypes of the model's variables; arguments and errors as those of `trace`."""
    apply = mode.evaluating(model, apply)
    called = mode.initializing(apply)
    try:
        return jax.eval_shape(
            lambda *inputs: model.init(jax.random.key(0), *inputs, **called), *inputs
        )
    except Exception as error:
        shapes = ', '.join(map(str, _avals(inputs)))
        raise errors.GraphError(
            f'{type(model).__name__} cannot be called with {shapes} and {dict(called)}; '
            f'change --input, --arguments or --apply: {errors.words(error)}'
        ) from error


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog='python -m jaxkd.summary',
        description='Prints what a network is made of: its layers and what they cost, the channels '
        'that must be removed together, what cannot be removed and why. Nothing is trained, and no '
        'parameter is allocated.',
        epilog='exit status: 0 done, 1 the network cannot be traced, 2 a wrong command line',
    )
    command.add_model(parser, required=True)
    parser.add_argument(
        '--input',
        required=True,
        action='append',
        metavar='SHAPE',
        help='shape of an input, the batch first, with its dtype after a colon if it has another '
        'than --dtype: 1,224,224,3 or 1,16:int32. Given again for each further input',
    )
    parser.add_argument('--dtype', default='float32', help='of the inputs (default: %(default)s)')
    parser.add_argument(
        '--blocks',
        default='()',
        metavar='BLOCKS',
        help='auto, which makes a block of every module that the network repeats, or patterns over '
        'parameter paths with their settings, as a config has them: '
        "\"(('block1/', {'strength': 2.0}),)\" (default: the modules at the top level)",
    )
    parser.add_argument(
        '--inexact',
        default='freeze',
        choices=tracing.INEXACT,
        help='what becomes of channels over which a mean or the like is taken, as LayerNorm does: '
        'freeze keeps them, allow lets them be removed although the others then change '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--plot',
        metavar='FILE',
        help=f'draw the network, too, into a file that ends in .{", .".join(picture.FORMATS)}',
    )
    return parser.parse_args(arguments)


def _run(flags: argparse.Namespace) -> None:
    inputs = [abstract(text, flags.dtype) for text in flags.input]
    example = "(('block1/', {'strength': 2.0}),)"
    blocks = flags.blocks
    if blocks != blocking.AUTO:
        blocks = command.literal('--blocks', blocks, tuple, example)
    if flags.plot:
        picture.check(pathlib.Path(flags.plot))
    graph = trace(command.model(flags), inputs, command.apply(flags), flags.inexact)
    text = describe(graph, blocks)
    if flags.plot:
        picture.save(graph, flags.plot, title=flags.model)
        text += f'\n\npicture in {flags.plot}'
    _print(text)


def _print(text: str) -> None:
    """On a terminal, headings are bold; elsewhere the text is plain."""
    console = rich.console.Console(highlight=False)
    heading = True
    for line in text.split('\n'):
        style = 'bold' if heading else None
        console.print(line, style=style, markup=False, emoji=False, soft_wrap=True)
        heading = not line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m jaxkd.summary`; returns its exit status."""
    return command.run(_run, _parse(arguments))


if __name__ == '__main__':
    sys.exit(main())
