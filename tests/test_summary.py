"""What a network is made of: the command line, the table and the picture."""

import pathlib
import subprocess
import sys

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd
from jaxkd import picture, summary
from jaxkd.graph import table as tables

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULE = '''
from flax import linen as nn


class Net(nn.Module):
    """
    image [4, 4, 2] ── first ─┬─ second ─ + ── mean ─ + ── head
                              └───────────┘           │
    words [3] ──────────────────────────── embed ─────┘
    """

    classes: int = 5

    @nn.compact
    def __call__(self, image, words, train):
        x = nn.relu(nn.Conv(8, (3, 3), name='first')(image))
        x = x + nn.relu(nn.BatchNorm(not train, name='norm')(nn.Conv(8, (1, 1), name='second')(x)))
        return nn.Dense(self.classes, name='head')(
            x.mean((1, 2)) + nn.Embed(10, 8, name='embed')(words).mean(1)
        )


number = 3


def broken(classes=1):
    raise ValueError('no such net')


def nothing():
    return number
'''
INPUTS = ['--input=1,4,4,2', '--input=1,3:int32']
NET = ['--model=net:Net', *INPUTS]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / 'net.py').write_text(MODULE)
    (tmp_path / 'faulty.py').write_text('1 / 0')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    yield tmp_path
    sys.modules.pop('net', None)


def test_the_command_line(folder):
    done = subprocess.run(
        [sys.executable, '-m', 'jaxkd.summary', *NET, '--plot=net.svg'],
        env={'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr and '\x1b' not in done.stdout
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    # The costs: 16 positions, kernels of 3 · 3 · 2 · 8, 1 · 1 · 8 · 8 and 8 · 5.
    flops = 16 * 144 + 16 * 64 + 40
    assert rows['multiply-adds'][0] == f'{flops:,}'
    assert rows['parameters'] == [f'{144 + 8 + 64 + 8 + 16 + 40 + 5 + 80:,}']
    assert 'float32[1,4,4,2], int32[1,3] → float32[1,5]' in done.stdout
    assert rows['second'][0] == '1,024'  # by block, which is printed after the layers
    assert (folder / 'net.svg').read_text().count('<svg') == 1
    assert not [path.name for path in folder.iterdir() if path.name.startswith('.')]


@pytest.mark.parametrize(
    ('flags', 'status', 'words'),
    [
        ([], 2, ['--model', '--input', '--help']),
        (['--model=mobilenet_v9', *INPUTS], 2, ['mobilenet_v2', 'module:function']),
        (['--model=nowhere:Net', *INPUTS], 2, ['nowhere', 'current directory']),
        (['--model=net:Not', *INPUTS], 2, ["no attribute 'Not'"]),
        (['--model=net:number', *INPUTS], 2, ['neither a function nor a class']),
        (['--model=net:nothing', *INPUTS], 2, ['returns a int', 'Linen module']),
        (['--model=net:broken', *INPUTS], 2, ['--arguments', 'no such net']),
        (['--model=faulty:Net', *INPUTS], 2, ['ZeroDivisionError']),
        ([*NET, "--arguments={'colour': 1}"], 2, ['--arguments', 'colour']),
        ([*NET, '--arguments=classes=1'], 2, ['--arguments', "{'num_classes': 10}"]),
        (['--model=net:Net', '--input=4x4'], 2, ['--input', '1,224,224,3']),
        (['--model=net:Net', '--input=0,4'], 2, ['--input', '1,224,224,3']),
        (['--model=net:Net', '--input=1,4:words'], 2, ['--input', 'int32']),
        ([*NET, '--dtype=float33'], 2, ['--dtype', 'float32']),
        (['--model=net:Net', '--input=1,4,4,2'], 1, ['--input', 'words']),
        ([*NET, "--apply={'depth': 1}"], 1, ['--apply', 'depth']),
        ([*NET, "--blocks=(('third', {}),)"], 2, ['third', 'first']),
        ([*NET, "--blocks=('first',)"], 2, ['tuple of pairs']),
        ([*NET, '--inexact=maybe'], 2, ['maybe', 'freeze', 'allow']),
        ([*NET, '--plot=net.gif'], 2, ['.svg, .png, .pdf']),
        ([*NET, '--plot=nowhere/net.png'], 2, ['no folder nowhere']),
    ],
)
def test_wrong_input_is_one_sentence(folder, capsys, flags, status, words):
    try:
        returned = summary.main(flags)
    except SystemExit as stop:  # argparse
        returned = stop.code
    out, err = capsys.readouterr()
    assert (returned, out, err.count('\n')) == (status, '', 1), err
    assert err.startswith('jaxkd: ') and all(word in err for word in words), err


def test_without_matplotlib(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert summary.main([*NET, '--plot=net.png']) == 2
    assert "pip install 'jaxkd[plot]'" in capsys.readouterr().err


class Residual(nn.Module):
    """image [4, 4, 3] ─ stem ─┬─ expand ─ filter ─ project ─ + ─ head"""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1, 1), name='stem')(x)
        y = nn.Conv(12, (1, 1), name='expand')(x)
        y = nn.Conv(12, (3, 3), feature_group_count=12, name='filter')(y)
        x = x + nn.Conv(4, (1, 1), name='project')(y)
        return nn.Dense(2, name='head')(x.mean((1, 2)))


@pytest.fixture(scope='module')
def graph():
    return summary.trace(Residual(), [jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)], {})


def test_what_layers_make_and_read(graph):
    assert tables.layers(graph) == (
        tables.Layer('stem', {'stem': 4}, ('stem:kernel[2]',)),
        tables.Layer('expand', {'expand': 12}, ('stem',)),
        tables.Layer('filter', {'expand': 12}, ()),
        tables.Layer('project', {'stem': 4}, ('expand',)),
        tables.Layer('head', {'head': 2}, ('stem',)),
    )


def test_cost_by_block(graph):
    text = summary.describe(graph, [('stem', {'freeze': True}), ('expand', {})])
    rows = [line.split() for line in text.splitlines() if line]
    by_block = rows[[row[0] for row in rows].index('block') + 1 :]
    # A layer is paid for by the block that decides on the channels it makes.
    assert [row[:2] for row in by_block[:4]] == [
        ['stem', str(16 * (3 * 4 + 12 * 4))],
        ['expand', f'{16 * (4 * 12 + 9 * 12):,}'],
        ['(none)', '8'],
        ['total', f'{16 * (12 + 48 + 48 + 108) + 8:,}'],
    ]
    # With stem and head whole, one of twelve channels stays: stem, 1/12 of the rest, head.
    least = 16 * (12 + (48 + 48 + 108) // 12) + 8
    share = 1 - least / graph.cost().flops
    assert f'can be cut        {share:.1%} of the multiply-adds' in text


def test_the_block_of_every_group(folder, capsys):
    """Of what the network repeats, as of patterns; without them by the modules at the top."""
    flags = ['--model=mobilenet_v2', '--input=1,32,32,3']
    for blocks, expected in (
        ([], {'block1/expand/conv': 'block1', 'head/conv': 'head', 'classifier': 'classifier'}),
        (
            ['--blocks=auto'],
            {'block1/expand/conv': '^block1(/|$)', 'head/conv': '(none)', 'classifier': '(none)'},
        ),
        (
            ["--blocks=(('block1/', {}), ('head', {}))"],
            {'block1/expand/conv': 'block1/', 'head/conv': 'head', 'classifier': '(none)'},
        ),
    ):
        assert summary.main([*flags, *blocks]) == 0
        lines = capsys.readouterr().out.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith('group '))
        rows = [line.split() for line in lines[start + 1 : lines.index('', start)]]
        shown = {row[0]: row[2] for row in rows}
        assert len(shown) == 27 and expected.items() <= shown.items()
    assert summary.main([*NET, '--blocks=auto']) == 2
    assert 'no module repeats by name' in capsys.readouterr().err


def test_the_table(graph):
    text = graph.table()
    assert all(line == line.rstrip() for line in text.splitlines())
    assert 'stem/kernel[3], expand/kernel[2], project/kernel[3], … (3 more)' in text
    assert 'network output' in text[text.index('frozen') :]
    keep = graph.keep_all() | {'expand': np.arange(12) < 3}
    assert '3/12' in graph.table(keep)


def test_lines_of_the_picture_do_not_overlap():
    model = jaxkd.models.create('unet')
    graph = summary.trace(model, [jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)], {})
    nodes = picture._nodes(graph)
    lanes = picture._lanes(nodes)
    places = set()
    for group, rows in picture._spans(nodes).items():
        line = {(lanes[group], row) for row in range(rows[0], rows[-1] + 1)}
        assert not places & line
        places |= line
    assert sum(node.flops for node in nodes) == pytest.approx(1)
    assert sum(node.params for node in nodes) == pytest.approx(1)


def test_the_picture(graph, tmp_path):
    picture.save(graph, tmp_path / 'net.png')
    assert (tmp_path / 'net.png').read_bytes().startswith(b'\x89PNG')
    axes = picture.draw(graph, title='mine').axes[0]
    words = [text.get_text() for text in axes.texts]
    assert words[0] == 'mine' and {'stem', 'project', '12'} <= set(words)
    shared = {bar.get_facecolor() for bar in axes.patches if bar.get_width() == picture.BAR / 3}
    assert len(shared) == 1  # stem and project make the same channels
