"""The modules that a network repeats, found by their names."""

from __future__ import annotations

from collections.abc import Sequence
import re

# Where a path can be taken apart: between modules, and within a name after a number that words
# follow, so that 'block1_conv1' and 'block1_conv2' are two parts of 'block1'.
_END = re.compile(r'/|(?<=\d)_(?=\D)|(?<=\d[a-z])_(?=\D)|$')
_NUMBERED = re.compile(r'\d[a-z]?$')
_NUMBER = re.compile(r'\d+[a-z]?(?=[/_]|$)|\d+')


def find(layers: Sequence[str]) -> list[str]:
    """Patterns of the network's building blocks, in the order of their first layers.

    Modules are of one kind if their paths differ in numbers only, such as 'stage1/Block_0' and
    'stage2/Block_3'; 'block3a' ends in a number as well. A kind that exists once is no repetition.
    Of kinds within each other it is the outer one, unless that is but a sequence of blocks, as a
    stage is. Modules with layers in them go before single layers: these are blocks only where a
    network has nothing else that it repeats.

    >>> find(['stem/conv', 'block0/expand', 'block0/project', 'block1/expand', 'block1/project'])
    ['^block0(/|$)', '^block1(/|$)']
    >>> find(['stage1_block0/conv1', 'stage1_block0/conv2', 'stage1_block1/conv1',
    ...       'stage1_block1/conv2', 'stage2_block0/conv1', 'stage2_block0/conv2'])
    ['^stage1_block0(/|$)', '^stage1_block1(/|$)', '^stage2_block0(/|$)']
    >>> find(['block1_depthwise/conv', 'block1_pointwise/conv', 'block2_depthwise/conv'])
    ['^block1_[^0-9]', '^block2_[^0-9]']

    Args:
      layers: paths of what has a kernel, in the order of the computation.

    Returns:
      Regular expressions, each the exact beginning of paths, no two of which match the same path.
    """
    inside: dict[str, list[str]] = {}  # the layers of each module
    ends: dict[str, set[str]] = {}  # what follows its path
    above: dict[str, list[str]] = {}  # the modules around it, the innermost last
    for layer in layers:
        around: list[str] = []
        for end in _END.finditer(layer):
            module = layer[: end.start()]
            inside.setdefault(module, []).append(layer)
            ends.setdefault(module, set()).add(end.group())
            above[module] = list(around)
            around.append(module)

    kinds: dict[str, list[str]] = {}
    for module in inside:
        if _NUMBERED.search(module):
            kinds.setdefault(_kind(module), []).append(module)
    kinds = {kind: modules for kind, modules in kinds.items() if len(modules) > 1}
    within: dict[str | None, list[str]] = {}  # kinds by the kind around them
    for kind, modules in kinds.items():
        around = [_kind(module) for module in above[modules[0]]]
        within.setdefault(next((k for k in reversed(around) if k in kinds), None), []).append(kind)

    def is_sequence(kind: str) -> bool:
        """Whether blocks in a row make up most of every such module."""
        parts = [
            part
            for inner in within.get(kind, ())
            if all(len(inside[module]) > 1 for module in kinds[inner])
            for part in kinds[inner]
        ]
        numbers = [sum(module in above[part] for part in parts) for module in kinds[kind]]
        covered, whole = (sum(len(inside[m]) for m in ms) for ms in (parts, kinds[kind]))
        return min(numbers) > 0 and max(numbers) > 1 and 2 * covered >= whole

    def blocks(around: str | None) -> list[str]:
        found = []
        for kind in within.get(around, ()):
            found += blocks(kind) if is_sequence(kind) else kinds[kind]
        return found

    found = set(blocks(None))
    modules = {module for module in found if inside[module] != [module]} or found
    return [_pattern(module, ends[module]) for module in inside if module in modules]


def _kind(module: str) -> str:
    return _NUMBER.sub('#', module)


def _pattern(module: str, ends: set[str]) -> str:
    # Without backslashes, so that it can be copied into a config or a shell.
    follows = [*(['_[^0-9]'] if '_' in ends else []), *(['/', '$'] if ends - {'_'} else [])]
    return f'^{re.escape(module)}' + (follows[0] if len(follows) == 1 else f'({"|".join(follows)})')
