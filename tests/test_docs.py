"""README and docs: links lead somewhere, examples run, commands and names are those that there are.

The Python blocks of a page share a namespace and a folder. These are empty but for what the page
says its reader has, small networks and a little data in the place of theirs: see `READERS`. A block
for a package that is not installed is left out.
"""

import argparse
import ast
import copy
import importlib
import importlib.util
import pathlib
import re
import runpy
import shlex
import sys
import warnings

from absl import flags
from flax import linen as nn
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np
import pytest

import jaxkd
from jaxkd import checkpoint, export, main, models
from jaxkd.graph import rules
from jaxkd.search import criteria

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in (*ROOT.glob('*.md'), *sorted((ROOT / 'docs').glob('*.md')))
]
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def text_of(page):
    return (ROOT / page).read_text()


def blocks(page, language):
    return [code for kind, code in BLOCK.findall(text_of(page)) if kind == language]


def prose(page):
    return BLOCK.sub('', text_of(page))


def spans(page):
    """What stands in backticks, outside of blocks."""
    return re.findall(r'`([^`\n]+)`', prose(page))


def anchors(page):
    """Those that GitHub makes of a page's headings."""
    headings = re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    targets = re.findall(r'\]\(([^)\s]+)\)', re.sub(r'`[^`\n]*`', '', prose(page)))
    for target in targets:
        if '://' in target:
            continue
        name, _, anchor = target.partition('#')
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.resolve().relative_to(ROOT)), target


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(4)(jnp.mean(x, axis=(1, 2)))


def a_network():
    """A network and data."""
    random = np.random.default_rng(0)
    images = random.standard_normal((4, 8, 8, 3), np.float32)
    model = Net()
    variables = model.init(jax.random.key(0), images)
    graph = jaxkd.trace(model, variables, images)
    return {
        'model': model,
        'variables': variables,
        'teacher': variables,
        'images': images,
        'scores': criteria.l1(graph, variables),
        'batches': [{'image': images, 'label': np.arange(4)}] * 60,
    }


def exported_files():
    """Files of a compact network, and images for it."""
    has = a_network()
    small = jaxkd.prune(has['model'], has['variables'], has['images'], flops=0.5)
    for name, path, package in (
        ('stablehlo', 'small.hlo', 'jax'),
        ('onnx', 'small.onnx', 'onnxruntime'),
        ('tflite', 'small.tflite', 'tensorflow'),
    ):
        if is_there(package):
            export.FORMATS[name](small, path)
    return {'images': has['images']}


def weights():
    """What `jaxkd.convert` has written, and a compact network for PyTorch."""
    model, image = models.create('mobilenet_v2'), jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    checkpoint.write('weights/mobilenet_v2', zeros, {'kind': 'jaxkd variables', 'settings': {}})
    if is_there('torchvision'):
        model = models.create('mobilenet_v2', num_classes=10)
        variables = jax.jit(model.init)(jax.random.key(0), image)
        small = jaxkd.prune(model, variables, image, flops=0.5)
        export.FORMATS['safetensors'](small, 'small.safetensors')
    return {}


READERS = {
    'docs/library.md': a_network,
    'docs/export.md': exported_files,
    'docs/weights.md': weights,
}


# Who runs a file and who writes it: parts of one extra, of which an environment may have one alone.
WRITES = {'onnxruntime': 'jax2onnx'}


def is_there(package):
    return all(map(importlib.util.find_spec, {package, WRITES.get(package, package)}))


def can_run(code):
    """Whether all is there that a block imports."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return all(is_there(name.split('.')[0]) for name in names)


@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'python')])
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rules, 'RULES', dict(rules.RULES))
    namespace = {'__name__': 'page', **READERS.get(page, dict)()}
    for code in filter(can_run, blocks(page, 'python')):
        exec(compile(code, page, 'exec'), namespace)


def commands(page):
    """The command lines of a page that run a part of this repository: lists of words."""
    found = []
    for block in blocks(page, 'sh'):
        for line in block.replace('\\\n', '').splitlines():
            inner = re.search(r"--command='([^']*)'", line)
            for part in re.split(r'&&|;', inner[1] if inner else line):
                words = shlex.split(part, comments=True)
                if words and re.search(r'(^|/)python3?$', words[0]):
                    found.append(words[1:])
    return found


def parse_main(words, monkeypatch):
    """Parses flags as `python -m jaxkd.main` does, the config file and its fields included."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values)
    for flag in main.FLAGS.get_flags_for_module(main):
        if flag.name != 'config':
            values[flag.name] = copy.deepcopy(flag)
    monkeypatch.setattr(sys, 'argv', ['jaxkd.main', *words])
    assert values(sys.argv) == ['jaxkd.main']
    assert values['config'].value.to_dict()


class Parsed(Exception):
    """The command line is right, and nothing of what it asks for has been done."""


def parse_command(words, monkeypatch):
    """Lets `python -m` of a command of the package come as far as its flags."""
    parse = argparse.ArgumentParser.parse_args

    def stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed), warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # the module has been imported before
        patch.setattr(argparse.ArgumentParser, 'parse_args', stop)
        patch.setattr(sys, 'argv', words)
        runpy.run_module(words[0], run_name='__main__', alter_sys=True)


@pytest.mark.parametrize('page', [page for page in PAGES if commands(page)])
def test_commands_are_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        if words[0] != '-m':
            assert pathlib.Path(words[0]).exists(), words
        elif words[1] == 'jaxkd.main':
            parse_main(words[2:], monkeypatch)
        elif words[1].startswith('jaxkd'):
            parse_command(words[1:], monkeypatch)


@pytest.mark.parametrize('page', PAGES)
def test_names_are_there(page):
    fields = set(_flat(runpy.run_path(str(ROOT / 'configs' / 'mbv2.py'))['get_config']().to_dict()))
    for span in spans(page):
        if re.fullmatch(r'jaxkd(\.\w+)+', span):
            _look_up(span)
        elif re.fullmatch(r'(benchmarks|configs|docs|jaxkd|tests)/[\w/.]+', span):
            assert (ROOT / span).exists(), span
        elif found := re.match(
            r'(?:config\.)?((?:budget|data|distil|search|teacher)\.[\w.]+)=', span
        ):
            assert found[1] in fields, span


def _flat(tree, above=''):
    for key, value in tree.items():
        yield above + key
        if isinstance(value, dict):
            yield from _flat(value, f'{above}{key}.')


def _look_up(name):
    """A module, or what is in one."""
    module, _, attribute = name.rpartition('.')
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(_look_up(module), attribute)


def test_configs_page_is_what_the_command_makes():
    made = runpy.run_path(str(ROOT / 'docs' / 'make_configs.py'))['make']()
    assert text_of('docs/configs.md') == made, 'run python docs/make_configs.py'
