"""Weights from PyTorch and back, by files that NumPy makes."""

from collections.abc import Callable
import errno
import functools
import hashlib
import json

from flax import linen as nn
from flax import traverse_util
import jax
from jax import lax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import numpy as safetensors

import jaxkd
from jaxkd import checkpoint, convert, export, models, workdir
from jaxkd.convert import command, layouts, names, weights
from jaxkd.models import (
    convnext,
    densenet,
    efficientnet,
    mobilenet,
    mobilenet_v1,
    mobilenet_v3,
    mobilevit,
    regnet,
    resnet,
    vgg,
)

# What the libraries' own networks of 1000 classes have in their state dicts: how many tensors but
# for BatchNorms' counters, and the SHA-256 of their names and shapes, a line each, sorted.
PUBLISHED = [
    ('torchvision', 'mobilenet_v2', 262, '07c1a8796c1aa659'),
    ('torchvision', 'mobilenet_v3_large', 266, '01e1084ad1e703da'),
    ('torchvision', 'mobilenet_v3_small', 210, 'cb6b8a086b0ea7e8'),
    ('torchvision', 'resnet18', 102, 'fc669aac650ab66f'),
    ('torchvision', 'resnet50', 267, '584ee931ad382885'),
    ('torchvision', 'resnext50_32x4d', 267, '379a66ba74321238'),
    ('torchvision', 'vgg11_bn', 54, 'ee867f83a281cbc7'),
    ('torchvision', 'densenet121', 606, 'c4a956e878d257a8'),
    ('torchvision', 'efficientnet_b0', 311, '29f2e4b8ed94097f'),
    ('torchvision', 'efficientnet_b1', 439, '862f9aeff2465d0f'),
    ('torchvision', 'regnet_y_400mf', 331, 'ade00d0c8c654416'),
    ('torchvision', 'convnext_tiny', 182, '76e6adcc617daa3f'),
    ('transformers', 'mobilenet_v1', 137, '690a0cf4ebbcf109'),
    ('transformers', 'mobilenet_v2', 262, '66bbcd0225bb4c42'),
    ('transformers', 'resnet18', 102, 'f47e4cd8d5303da1'),
    ('transformers', 'resnet50', 267, 'e5c5612d6dba3df8'),
    ('transformers', 'regnet_y_400mf', 331, '7b11c1fff868e646'),
    ('transformers', 'convnext_tiny', 182, '34ad74cf8c4cdae3'),
    ('transformers', 'efficientnet_b0', 311, 'f48f83f0e2928521'),
    ('transformers', 'mobilevit_s', 315, 'df8285b5db4a96db'),
    ('timm', 'mobilenet_v1', 137, 'd4969b429bd6340b'),
    ('timm', 'mobilenet_v2', 262, 'fb193ed441ef69d9'),
    ('timm', 'mobilenet_v3_large', 266, '45e47990ea6b1d0c'),
    ('timm', 'resnet50', 267, '584ee931ad382885'),
    ('timm', 'vgg11_bn', 54, '98e6fd5dc46fcc31'),
    ('timm', 'densenet121', 606, 'c4a956e878d257a8'),
    ('timm', 'efficientnet_b0', 311, '62576637d3698c34'),
    ('timm', 'regnet_y_400mf', 331, 'b04921e47fdaed1d'),
    ('timm', 'convnext_tiny', 182, '6a2556c605ee9b4f'),
]

# A small network of each family.
SMALL = [
    mobilenet_v1.MobileNetV1(5, width=0.125),
    mobilenet.MobileNetV2(5, width=0.125),
    mobilenet_v3.MobileNetV3(num_classes=5, width=0.125, hidden=8),
    efficientnet.EfficientNet(5, width=0.125),
    resnet.ResNet(depths=(1, 1), bottleneck=False, num_classes=5),
    resnet.ResNet(depths=(2,), groups=4, group_width=2, num_classes=5),
    vgg.VGG(depths=(1, 1, 1, 1, 1), strides=(2, 2, 2, 2, 1), num_classes=5),
    densenet.DenseNet(depths=(2, 2), growth=4, num_classes=5),
    regnet.RegNetY(depths=(1, 2), widths=(16, 24), num_classes=5),
    convnext.ConvNeXt(5, channels=(8, 16), depths=(1, 2), strides=(2,)),
    mobilevit.MobileViT(5, channels=(8, 8, 16, 16, 16), tokens=(8, 12, 16), expansion=2),
]


def abstract(model, size=32):
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)


def numbers(variables, seed=0):
    """Other ones in every place."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.random(leaf.shape, np.float32) + 0.5, variables)


def assert_equal(found, right):
    assert jax.tree.structure(found) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, found, right)


@pytest.mark.parametrize(('library', 'name', 'count', 'digest'), PUBLISHED)
def test_names_and_shapes_are_the_librarys(library, name, count, digest):
    model = models.create(name, num_classes=1000)
    shapes = traverse_util.flatten_dict(abstract(model, 224), sep='/')
    arranged = weights.arranged(shapes, model, library)
    lines = sorted(f'{name} {list(order.shape)}' for name, order in arranged.values())
    assert len(lines) == count
    assert hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize('model', SMALL, ids=lambda model: type(model).__name__)
def test_round_trip(tmp_path, model):
    shapes = abstract(model)
    right = numbers(shapes)
    for library, source in names.SOURCES[type(model)].items():
        safetensors.save_file(convert.to_torch(right, model, library), tmp_path / 'f.safetensors')
        fitting = model.clone(**source.settings(model)[0])
        assert_equal(convert.read(tmp_path / 'f.safetensors', fitting, shapes), right)


def theirs(ours, layout, **shapes):
    return layouts.to_theirs(ours, layout(ours.shape, shapes))


def test_layouts_compute_the_same():
    random = np.random.default_rng(0)
    # A convolution in two groups, in PyTorch's layout, pixel by pixel.
    image, kernel = random.random((1, 5, 5, 4)), random.random((3, 3, 2, 6))
    dimensions = ('NHWC', 'HWIO', 'NHWC')
    right = lax.conv_general_dilated(
        image, kernel, (1, 1), 'VALID', dimension_numbers=dimensions, feature_group_count=2
    )
    moved = theirs(kernel, layouts.kernel)
    planes = image[0].transpose(2, 0, 1)
    for out, row, column in np.ndindex(6, 3, 3):
        own = planes[2 * (out // 3) :][:2, row : row + 3, column : column + 3]
        np.testing.assert_allclose((moved[out] * own).sum(), right[0, row, column, out], rtol=1e-6)
    # A Dense of all pixels of 2×3 with 4 channels.
    pixels, kernel = random.random((2, 3, 4)), random.random((24, 5))
    moved = theirs(kernel, layouts.flattened('last'), last=(4,))
    np.testing.assert_allclose(
        moved @ pixels.transpose(2, 0, 1).ravel(), pixels.ravel() @ kernel, rtol=1e-12
    )
    pixels, kernel = random.random((2, 2, 6)), random.random((24, 5))
    moved = theirs(kernel, layouts.flattened('last', window=True), last=(6,))
    np.testing.assert_allclose(
        (moved * pixels.transpose(2, 0, 1)).sum((1, 2, 3)), pixels.ravel() @ kernel, rtol=1e-12
    )
    # Two heads of width 3.
    token, into, out = random.random(4), random.random((4, 2, 3)), random.random((2, 3, 5))
    heads = np.einsum('i,ihw->hw', token, into)
    np.testing.assert_allclose(theirs(into, layouts.into_heads) @ token, heads.ravel(), rtol=1e-12)
    np.testing.assert_allclose(
        theirs(out, layouts.out_of_heads) @ heads.ravel(),
        np.einsum('hw,hwo->o', heads, out),
        rtol=1e-12,
    )


RESNET = resnet.ResNet(depths=(1, 1), bottleneck=False, num_classes=5)
FLAGS = [
    '--model=resnet18',
    "--arguments={'depths': (1, 1), 'num_classes': 5}",
    '--input=1,32,32,3',
]


@pytest.fixture
def resnet_file(tmp_path, monkeypatch):
    """Weights under torchvision's names, as data-parallel modules have them, and the variables."""
    monkeypatch.chdir(tmp_path)
    right = numbers(abstract(RESNET))
    tensors = convert.to_torch(right, RESNET)
    tensors['bn1.num_batches_tracked'] = np.array(7)
    safetensors.save_file(
        {f'_orig_mod.module.{name}': x for name, x in tensors.items()}, 'r.safetensors'
    )
    return right


def test_command(resnet_file, capsys):
    assert command.main(['r.safetensors', *FLAGS, '--out=out']) == 0
    said = capsys.readouterr().out
    assert said.startswith('out: ') and 'torchvision' in said and '--model=resnet18' in said
    assert_equal(convert.read('out', RESNET, abstract(RESNET)), resnet_file)
    _, metadata = checkpoint.read('out')
    assert metadata['kind'] == 'jaxkd variables'
    assert metadata['from'] == {'file': 'r.safetensors', 'names': 'torchvision'}


@pytest.mark.parametrize(
    ('file', 'settings'),
    [
        ('b0.safetensors', {'bn_epsilon': 1e-5}),
        ('tf_b0.safetensors', {'bn_epsilon': 1e-3, 'padding': 'SAME'}),
    ],
)
def test_settings_that_no_weights_tell(tmp_path, monkeypatch, capsys, file, settings):
    monkeypatch.chdir(tmp_path)
    model = efficientnet.EfficientNet(5, width=0.125)
    shapes = abstract(model)
    safetensors.save_file(convert.to_torch(numbers(shapes), model, 'timm'), file)
    arguments = {'num_classes': 5, 'width': 0.125}
    flags = ['--model=efficientnet_b0', '--input=1,32,32,3', '--out=out']
    assert command.main([file, *flags, f'--arguments={arguments}']) == 0
    assert f'--arguments="{arguments | settings}"' in capsys.readouterr().out
    with pytest.raises(jaxkd.CheckpointError, match='bn_epsilon=.*make the model so'):
        convert.read('out', model, shapes)
    assert_equal(convert.read('out', model.clone(**settings), shapes), numbers(shapes))


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (lambda t: t.pop('layer1.0.conv1.weight'), r'1 are missing \(layer1.0.conv1.weight\)'),
        (
            lambda t: t.update({'layer9.0.conv1.weight': np.ones((2, 3), np.float32)}),
            r'1 are left over \(layer9.0.conv1.weight \[2, 3\]\)',
        ),
        (
            lambda t: t.update({'conv1.weight': np.ones((64, 1, 7, 7), np.float32)}),
            r'conv1.weight is \[64, 1, 7, 7\] and has to be \[64, 3, 7, 7\]',
        ),
        (
            lambda t: t.update(
                {'fc.weight': np.ones((9, 128), np.float32), 'fc.bias': np.ones(9, np.float32)}
            ),
            r"9 classes, and the ResNet 5: .*--arguments=\"\{'num_classes': 9\}\"",
        ),
        (lambda t: t.update({'fc.bias': np.ones(5, np.int8)}), 'fc.bias is int8'),
        (lambda t: t.update({'fc.bias': np.full(5, np.nan, np.float32)}), 'fc.bias has .* finite'),
        (lambda t: t.update({'fc.bias': np.full(5, 1e300)}), 'fc.bias has .* finite .* float32'),
        (lambda t: [t.pop(name) for name in list(t)], 'none at all'),
    ],
)
def test_bad_weights(tmp_path, change, said):
    tensors = convert.to_torch(numbers(abstract(RESNET)), RESNET)
    change(tensors)
    safetensors.save_file(tensors, tmp_path / 'bad.safetensors')
    with pytest.raises(jaxkd.CheckpointError, match=f'bad.safetensors: .*{said}'):
        convert.read(tmp_path / 'bad.safetensors', RESNET, abstract(RESNET))


def test_bad_files(folder, tmp_path, capsys):
    shapes = abstract(RESNET)
    damaged, other = tmp_path / 'damaged.safetensors', tmp_path / 'weights.h5'
    damaged.write_bytes(b'no weights')
    other.write_bytes(b'')
    for path, said in (
        (damaged, 'damaged, or no .safetensors'),
        (other, r'read from directories and from \.safetensors'),
        (tmp_path / 'absent', 'there is no such file'),
        (tmp_path, 'orbax cannot read it'),
        (folder / 'known', 'compact network, which jaxkd.load reads'),
    ):
        with pytest.raises(jaxkd.CheckpointError, match=said):
            convert.read(path, RESNET, shapes)
    assert command.main([str(damaged), *FLAGS, f'--out={tmp_path}/out']) == 1
    assert command.main([str(damaged), '--model=resnet1', '--out=out']) == 2
    assert 'did you mean' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_directories_of_orbax(tmp_path):
    shapes = abstract(RESNET)
    right = numbers(shapes)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / 'plain', {**right, 'step': 7, 'opt_state': {'m': np.ones(3)}})
        checkpointer.save(tmp_path / 'bare', {'weights': right['params']})
    assert_equal(convert.read(tmp_path / 'plain', RESNET, shapes), right)
    with pytest.raises(jaxkd.CheckpointError, match='none of the variables'):
        convert.read(tmp_path / 'bare', RESNET, shapes)
    (tmp_path / 'manager').mkdir()
    (tmp_path / 'plain').rename(tmp_path / 'manager' / '12')
    with pytest.raises(jaxkd.CheckpointError, match='name one of them, such as .*manager/12'):
        convert.read(tmp_path / 'manager', RESNET, shapes)
    assert_equal(convert.read(tmp_path / 'manager' / '12', RESNET, shapes), right)
    (tmp_path / 'manager' / '12').rename(tmp_path / 'plain')
    with pytest.raises(jaxkd.CheckpointError, match='5 classes, and the ResNet 6'):
        other = RESNET.clone(num_classes=6)
        convert.read(tmp_path / 'plain', other, abstract(other))


@pytest.mark.parametrize('separator', ['/', '.'])
def test_files_with_names_of_flax(tmp_path, separator):
    shapes = abstract(RESNET)
    right = numbers(shapes)
    flat = traverse_util.flatten_dict(right, sep=separator)
    safetensors.save_file(flat, tmp_path / 'flax.safetensors')
    assert_equal(convert.read(tmp_path / 'flax.safetensors', RESNET, shapes), right)


class Inner(nn.Module):
    """A layer with a kernel and a scale, which have one name in PyTorch, in one called module."""

    twice: bool

    @nn.compact
    def __call__(self, x):
        x = x @ self.param('kernel', nn.initializers.ones, (3, 3))
        return x * self.param('scale', nn.initializers.ones, (3,)) if self.twice else x


class Outer(nn.Module):
    twice: bool

    @nn.compact
    def __call__(self, x):
        return Inner(self.twice, name='module')(x)


@pytest.mark.parametrize('twice', [False, True])
def test_names_of_ones_own(tmp_path, twice):
    model = Outer(twice)
    right = numbers(model.init(jax.random.key(0), np.ones((1, 3), np.float32)))
    path = tmp_path / 'own.safetensors'
    safetensors.save_file(traverse_util.flatten_dict(right, sep='/'), path)
    assert_equal(convert.read(path, model, right), right)
    if twice:
        with pytest.raises(jaxkd.ConfigError, match='one name in PyTorch'):
            convert.to_torch(right, model)
    else:
        safetensors.save_file(convert.to_torch(right, model), path)
        assert_equal(convert.read(path, model, right), right)
    with pytest.raises(jaxkd.ConfigError, match='nothing is left to read'):
        convert.read(path, model, right, fresh='.')


def test_export(folder, capsys):
    """Of a network without a table: its own names, PyTorch's layouts."""
    assert export.main(['known', '--format=safetensors', '--out=known.safetensors']) == 0
    assert 'of the largest output' in capsys.readouterr().out
    small = jaxkd.load('known')
    stored = safetensors.load_file('known.safetensors')
    described = json.loads((folder / 'known.json').read_text())
    assert described['names'] == "Flax's names with dots, PyTorch's layouts"
    assert described['model']['class'] == 'CifarResNet'
    kernel = small.variables['params']['stem']['conv']['kernel']
    np.testing.assert_array_equal(stored['stem.conv.weight'], kernel.transpose(3, 2, 0, 1))
    # Every tensor belongs to a layer whose widths are said.
    assert {name.rpartition('.')[0] for name in stored} == set(described['layers'])
    for name, layer in described['layers'].items():
        if 'in_channels' in layer:
            sizes = (layer['out_channels'], layer['in_channels'], *layer['kernel_size'])
            assert stored[f'{name}.weight'].shape == sizes and layer['groups'] == 1


def test_export_keeps_to_its_two_files(folder, capsys):
    flags = ['known', '--format=safetensors', '--out=widths.json']
    assert export.main(flags) == 2
    assert 'has to end in .safetensors' in capsys.readouterr().err
    assert not (folder / 'widths.json').exists()
    (folder / 'report.json').write_text('{"layers": []}')
    flags = ['known', '--format=safetensors', '--out=report.safetensors']
    assert export.main(flags) == 2
    assert 'would replace report.json' in capsys.readouterr().err
    assert (folder / 'report.json').read_text() == '{"layers": []}'


def test_no_weights_without_their_widths(folder, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(workdir, 'write_text', full)
    with pytest.raises(jaxkd.ExportError, match='cannot be written: No space left'):
        export.safetensors(jaxkd.load('known'), 'lonely.safetensors')
    assert not [path for path in folder.iterdir() if 'lonely' in path.name]


class Activated(nn.Module):
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(self.activation(x))


def test_description_of_a_network_of_ones_own():
    """One whose field is a function, which JSON cannot hold."""
    x = jax.ShapeDtypeStruct((1, 3), np.float32)
    model = Activated(nn.gelu)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    described = json.loads(json.dumps(convert.describe(model.apply, variables, [x], model)))
    assert described['settings'] == {} and described['model']['arguments'] is None
    assert described['layers'] == {'Dense_0': {'in_features': 3, 'out_features': 2}}


class Scale(nn.Module):
    """No convolution, although its parameter is called as theirs."""

    @nn.compact
    def __call__(self):
        return self.param('kernel', nn.initializers.ones, (4,))


class Branch(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(4, (3, 3), name='inner')(x))
        x = nn.relu(x + nn.Conv(4, (3, 3), name='last')(y)) * Scale(name='scale')()
        return nn.ConvTranspose(3, (2, 2), transpose_kernel=True, name='up')(x)


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, name='attention')(x)
        return nn.DenseGeneral((2, 5), name='general')(nn.Conv(4, (3,), name='conv')(x))


def test_layouts_of_kernels_with_three_axes():
    x = jax.ShapeDtypeStruct((1, 7, 4), np.float32)
    model = Heads()
    right = numbers(jax.eval_shape(model.init, jax.random.key(0), x))
    tensors, params = convert.to_torch(right, model), right['params']
    for part in ('query', 'key', 'value'):
        kernel = params['attention'][part]['kernel'].reshape(4, 6)
        np.testing.assert_array_equal(tensors[f'attention.{part}.weight'], kernel.T)
        assert tensors[f'attention.{part}.bias'].shape == (6,)
    kernel = params['attention']['out']['kernel'].reshape(6, 4)
    np.testing.assert_array_equal(tensors['attention.out.weight'], kernel.T)
    for leaf, name in (('kernel', 'weight'), ('bias', 'bias')):
        np.testing.assert_array_equal(tensors[f'general.{name}'], params['general'][leaf])
    np.testing.assert_array_equal(tensors['conv.weight'], params['conv']['kernel'].transpose())
    layers = convert.describe(model.apply, right, [x], model)['layers']
    assert layers['attention.query'] == layers['attention.key']
    assert layers['attention.query'] == {'in_features': 4, 'out_features': 6}
    assert layers['attention.out'] == {'in_features': 6, 'out_features': 4}
    assert layers['conv']['kernel_size'] == [3] and 'general' not in layers


class Stages(nn.Module):
    """A convolution and what reads it, several times over, and one of them alone."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Conv(6, (3, 1), feature_group_count=2, name='conv')(x)
        y = nn.GroupNorm(3, name='norm')(nn.Dense(6, name='dense')(y))
        return nn.ConvTranspose(4, (2, 2), transpose_kernel=True, name='up')(y), None


class Stacked(nn.Module):
    lift: Callable

    @nn.compact
    def __call__(self, x):
        stages = self.lift(Stages, variable_axes={'params': 1}, split_rngs={'params': True})
        return Stages(name='alone')(stages(name='many')(x, None)[0])[0]


@pytest.mark.parametrize(
    'lift',
    [
        functools.partial(nn.scan, length=5),
        functools.partial(nn.vmap, in_axes=None, out_axes=(0, None), axis_size=5),
    ],
)
def test_description_of_stacked_layers_is_that_of_each(lift):
    model, x = Stacked(lift), jax.ShapeDtypeStruct((1, 4, 4, 4), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert variables['params']['many']['conv']['kernel'].shape == (3, 5, 1, 2, 6)
    # Whatever was traced before.
    jax.eval_shape(model.apply, variables, x)
    layers = convert.describe(model.apply, variables, [x], model)['layers']
    assert layers['many.conv'] == {
        'in_channels': 4,
        'out_channels': 6,
        'groups': 2,
        'kernel_size': [3, 1],
        'stacked': 5,
    }
    assert set(layers) == {
        f'{stage}.{layer}'
        for stage in ('many', 'alone')
        for layer in ('conv', 'dense', 'norm', 'up')
    }
    for name in ('conv', 'dense', 'norm', 'up'):
        assert layers[f'many.{name}'] == layers[f'alone.{name}'] | {'stacked': 5}


def test_description_of_a_branch_that_has_gone():
    model, image = Branch(), np.ones((1, 4, 4, 4), np.float32)
    graph = jaxkd.trace(model, model.init(jax.random.key(0), image), image)
    small = jaxkd.compact(graph, graph.variables, {'inner': np.zeros(4, bool)})
    layers = convert.describe(small.module.apply, small.variables, [image], model)['layers']
    assert layers.keys() == {'inner', 'last', 'up'}
    assert [layers['last'][key] for key in ('in_channels', 'out_channels', 'groups')] == [0, 4, 1]
    assert [layers['up'][key] for key in ('in_channels', 'out_channels')] == [4, 3]


def test_description_counts_groups():
    model = resnet.ResNet(depths=(1,), groups=4, group_width=2, num_classes=5)
    variables = abstract(model)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    run = functools.partial(model.apply, train=False)
    layers = convert.describe(run, variables, [image], model)['layers']
    assert layers['layer1.0.conv2'] == {
        'in_channels': 8,
        'out_channels': 8,
        'groups': 4,
        'kernel_size': [3, 3],
    }
    assert layers['bn1'] == {'num_features': 64, 'eps': 1e-5}
    assert layers['fc'] == {'in_features': 256, 'out_features': 5}


def test_pickles(tmp_path):
    torch = pytest.importorskip('torch')
    shapes = abstract(RESNET)
    right = numbers(shapes)
    tensors = {name: torch.from_numpy(x) for name, x in convert.to_torch(right, RESNET).items()}
    torch.save({'epoch': 3, 'state_dict': tensors}, tmp_path / 'state.pth')
    assert_equal(convert.read(tmp_path / 'state.pth', RESNET, shapes), right)
    torch.save({'fc': torch.nn.Linear(2, 2)}, tmp_path / 'module.pt')
    with pytest.raises(jaxkd.CheckpointError, match='more than weights in it'):
        convert.read(tmp_path / 'module.pt', RESNET, shapes)
