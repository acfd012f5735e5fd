"""Makes docs/configs.md of configs/mbv2.py: every field, its type, its default and its comment.

python docs/make_configs.py
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
import io
import pathlib
import runpy
import tokenize
from typing import Any, NamedTuple

import ml_collections

DOCS = pathlib.Path(__file__).resolve().parent
SOURCE = DOCS.parent / 'configs' / 'mbv2.py'
PAGE = DOCS / 'configs.md'

HEAD = """\
# Every field of a config

<!-- made by docs/make_configs.py from configs/mbv2.py -->

Set by `--config.FIELD=VALUE` after `--config=configs/mbv2.py`. Defaults are those of the preset
`digits`; what the other presets set is [at the end](#what-presets-change). A default of `None` sets
nothing. What the fields do together: [a run](running.md), [data](data.md), [devices](tpu.md).
"""


class Comments(NamedTuple):
    """The comments of a file, by line.

    Attributes:
      alone: of lines that hold nothing else.
      trailing: behind code.
    """

    alone: Mapping[int, str]
    trailing: Mapping[int, str]

    def above(self, line: int) -> str:
        """The block of comments that ends right above a line."""
        block: list[str] = []
        while (line := line - 1) in self.alone:
            block.insert(0, self.alone[line])
        return ' '.join(block)


def read_comments(source: str) -> Comments:
    alone, trailing = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            where = trailing if token.line[:column].strip() else alone
            where[line] = token.string.removeprefix('#').strip()
    return Comments(alone, trailing)


def meanings(source: str) -> dict[str, str]:
    """What the comments of a config's file say of each field, and of the dicts that fields are in.

    A field is a key of a dict that is the config, or a part of it, or merged into one by `|`. A
    dict on one line is a field itself. Comments stand above the key, behind it, or both.
    """
    comments = read_comments(source)
    function = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == 'get_config'
    )
    parts: dict[str, dict[str, str]] = {}  # what each name stands for

    def fields(node: ast.expr) -> dict[str, str]:
        match node:
            case ast.Call(args=[inner]):  # ConfigDict({…})
                return fields(inner)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                merged = fields(left)
                # Another default needs no other words.
                merged.update((k, v) for k, v in fields(right).items() if v or k not in merged)
                return merged
            case ast.Name(id=name):
                return dict(parts[name])
            case ast.Dict(keys=keys, values=values):
                return dict(inside(keys, values))
        raise ValueError(f'line {node.lineno}: neither a dict nor made of dicts')

    def inside(keys: list[ast.expr], values: list[ast.expr]) -> Iterator[tuple[str, str]]:
        for key, value in zip(keys, values, strict=True):
            name = ast.literal_eval(key)
            trailing = comments.trailing.get(value.end_lineno, '')
            yield name, ' '.join(filter(None, (comments.above(key.lineno), trailing)))
            if isinstance(value, ast.Dict) and value.end_lineno > value.lineno:
                yield from ((f'{name}.{k}', v) for k, v in fields(value).items())

    found: dict[str, str] = {}
    for node in function.body:
        match node:
            case ast.Assign(targets=[ast.Name(id='config')], value=value):
                found.update(fields(value))
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                parts[name] = fields(value)
            case ast.Assign(targets=[ast.Attribute(attr=name)], value=value):
                found[name] = comments.above(node.lineno)
                found.update((f'{name}.{k}', v) for k, v in fields(value).items())
    return found


def make() -> str:
    """The page.

    Raises:
      ValueError: for fields without a comment.
    """
    module = runpy.run_path(str(SOURCE))
    config, told = module['get_config'](), meanings(SOURCE.read_text())
    sections = {name.rpartition('.')[0] for name in told}
    rows: dict[str, list[str]] = {}
    for name, words in told.items():
        if name in sections:
            continue
        if not words:
            raise ValueError(f'{SOURCE.name} has no comment on {name}')
        section, _, key = name.rpartition('.')
        holder = _at(config, section)
        kind = 'dict' if isinstance(holder[key], ml_collections.ConfigDict) else None
        cells = f'`{name}`', kind or holder.get_type(key).__name__, _code(holder[key]), words
        rows.setdefault(section, []).append(_row(cells))
    lines = [HEAD]
    for section, table in rows.items():
        lines += [f'## {section or "The run"}', '']
        if told.get(section):
            lines += [told[section][0].upper() + told[section][1:].rstrip('.') + '.', '']
        lines += [_row(('field', 'type', 'default', 'meaning')), _row(['---'] * 4), *table, '']
    return '\n'.join([*lines, *_presets(module['PRESETS'], module['get_config'])])


def _presets(
    names: Sequence[str], get_config: Callable[[str], ml_collections.ConfigDict]
) -> Iterator[str]:
    """The fields that are not the same in all presets."""
    configs = [_flat(get_config(name).to_dict()) for name in names]
    yield from ('## What presets change', '')
    yield _row(('field', *names))
    yield _row(['---'] * (1 + len(names)))
    for field in configs[0]:
        values = [config[field] for config in configs]
        if any(value != values[0] for value in values):
            yield _row((f'`{field}`', *map(_code, values)))
    yield ''


def _at(config: ml_collections.ConfigDict, path: str) -> ml_collections.ConfigDict:
    for key in path.split('.') if path else ():
        config = config[key]
    return config


def _flat(tree: Mapping[str, Any], above: str = '') -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found.update(_flat(value, f'{above}{key}.'))
        else:
            found[above + key] = value
    return found


def _code(value: Any) -> str:
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    return f'`{value!r}`'


def _row(cells: Sequence[str]) -> str:
    escaped = (cell.replace('|', r'\|') for cell in cells)
    return f'| {" | ".join(escaped)} |'


if __name__ == '__main__':
    PAGE.write_text(make())
    print(f'wrote {PAGE}')
