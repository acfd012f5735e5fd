"""PyTorch's networks and the same weights here: how far their logits are apart.

Each network of torchvision, timm or transformers gets random weights and random BatchNorm
statistics, goes through `python -m jaxkd.convert` as a file, and is compared on random images; its
variables, written back, have to be the file's to the bit. Deep networks with random weights may
blow up rounding: where the two differ in float32, float64 decides, and the row says how far PyTorch
is from itself. Compact networks go the other way: they are exported, and PyTorch's own class runs
them at the widths that stand beside the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
import contextlib
import functools
import importlib.metadata
import io
import json
import pathlib
import tempfile
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import machine
import numpy as np
from safetensors import numpy as safetensors
import timm
import torch
import torchvision
import transformers

import jaxkd
from jaxkd import checkpoint, command, convert, export, models
from jaxkd.convert import command as converting

REPORT = pathlib.Path(__file__).parent / 'results' / 'parity.json'
LIMIT = 1e-4
# Compact networks to export, with the side of their images, and what ours need to be torchvision's.
COMPACT = {
    'mobilenet_v2': 96,
    'mobilenet_v3_small': 96,
    'efficientnet_b0': 96,
    'resnet18': 96,
    'resnext50_32x4d': 96,
    'densenet121': 96,
    'vgg11_bn': 224,
}
SETTINGS = {'efficientnet_b0': {'bn_epsilon': 1e-5}}


class Case(NamedTuple):
    """A network in PyTorch, and the one of `jaxkd.models` that is like it.

    Attributes:
      library: where it is from.
      network: what it is called there.
      make: makes it.
      model: our name.
      arguments: of ours, but for what convert adds.
      size: side of the images.
    """

    library: str
    network: str
    make: Callable[[], torch.nn.Module]
    model: str
    arguments: Mapping[str, Any] = {}
    size: int = 96


def torchvision_case(name: str, ours: str | None = None, **fields: Any) -> Case:
    make = functools.partial(getattr(torchvision.models, name), weights=None)
    return Case('torchvision', name, make, ours or name, **fields)


def timm_case(name: str, ours: str, **fields: Any) -> Case:
    return Case('timm', name, functools.partial(timm.create_model, name), ours, **fields)


def transformers_case(
    name: str, ours: str, config: Mapping[str, Any] | None = None, **fields: Any
) -> Case:
    def make() -> torch.nn.Module:
        made = getattr(transformers, f'{name}Config')(num_labels=1000, **(config or {}))
        return getattr(transformers, f'{name}ForImageClassification')(made)

    return Case('transformers', f'{name} ({ours})', make, ours, **fields)


RESNETS = {
    'resnet18': {
        'depths': [2, 2, 2, 2],
        'layer_type': 'basic',
        'hidden_sizes': [64, 128, 256, 512],
    },
    'resnet50': {'depths': [3, 4, 6, 3]},
}
REGNETS = {
    'regnet_y_400mf': {
        'depths': [1, 3, 6, 6],
        'hidden_sizes': [48, 104, 208, 440],
        'groups_width': 8,
    },
    'regnet_y_800mf': {
        'depths': [1, 3, 8, 2],
        'hidden_sizes': [64, 144, 320, 784],
        'groups_width': 16,
    },
}
MOBILEVITS = {
    'mobilevit_xxs': {
        'hidden_sizes': [64, 80, 96],
        'neck_hidden_sizes': [16, 16, 24, 48, 64, 80, 320],
        'expand_ratio': 2.0,
    },
    'mobilevit_xs': {
        'hidden_sizes': [96, 120, 144],
        'neck_hidden_sizes': [16, 32, 48, 64, 80, 96, 384],
    },
    'mobilevit_s': {},
}


def cases() -> list[Case]:
    """Networks of TensorFlow's padding have images of an odd side, where they can."""
    small = {'depths': (3, 3, 27, 3)}
    return [
        torchvision_case('mobilenet_v2'),
        *[torchvision_case(f'resnet{depth}') for depth in (18, 34, 50, 101, 152)],
        torchvision_case('resnext50_32x4d'),
        torchvision_case('wide_resnet50_2'),
        *[torchvision_case(f'vgg{depth}_bn', size=224) for depth in (11, 16, 19)],
        torchvision_case('vgg13_bn', 'vgg11_bn', arguments={'depths': (2, 2, 2, 2, 2)}, size=224),
        torchvision_case('densenet121'),
        torchvision_case('densenet169', 'densenet121', arguments={'depths': (6, 12, 32, 32)}),
        *[torchvision_case(f'efficientnet_b{scale}') for scale in (0, 1, 4, 5, 7)],
        torchvision_case('mobilenet_v3_large'),
        torchvision_case('mobilenet_v3_small'),
        torchvision_case('convnext_tiny'),
        torchvision_case('convnext_small', 'convnext_tiny', arguments=small),
        *[torchvision_case(name) for name in REGNETS],
        transformers_case('MobileNetV1', 'mobilenet_v1', size=97),
        transformers_case('MobileNetV2', 'mobilenet_v2', size=97),
        *[transformers_case('ResNet', name, config) for name, config in RESNETS.items()],
        *[transformers_case('RegNet', name, config) for name, config in REGNETS.items()],
        transformers_case('ConvNext', 'convnext_tiny'),
        transformers_case(
            'EfficientNet',
            'efficientnet_b0',
            {'width_coefficient': 1.0, 'depth_coefficient': 1.0, 'hidden_dim': 1280},
        ),
        transformers_case('EfficientNet', 'efficientnet_b7'),
        *[transformers_case('MobileViT', name, config) for name, config in MOBILEVITS.items()],
        timm_case('mobilenetv1_100', 'mobilenet_v1'),
        timm_case('mobilenetv2_100', 'mobilenet_v2'),
        timm_case('mobilenetv2_140', 'mobilenet_v2', arguments={'width': 1.4}),
        timm_case('mobilenetv3_large_100', 'mobilenet_v3_large'),
        timm_case('mobilenetv3_small_100', 'mobilenet_v3_small'),
        timm_case('tf_mobilenetv3_large_100', 'mobilenet_v3_large', size=97),
        timm_case('efficientnet_b0', 'efficientnet_b0'),
        timm_case('tf_efficientnet_b0', 'efficientnet_b0', size=97),
        timm_case('resnet18', 'resnet18'),
        timm_case('resnet50', 'resnet50'),
        timm_case('resnext50_32x4d', 'resnext50_32x4d'),
        timm_case('vgg11_bn', 'vgg11_bn', size=224),
        timm_case('densenet121', 'densenet121'),
        timm_case('regnety_004', 'regnet_y_400mf'),
        timm_case('convnext_tiny', 'convnext_tiny'),
    ]


@torch.no_grad()
def randomize(network: torch.nn.Module) -> None:
    """Other numbers everywhere: those of a new network would hide what is exchanged or lost."""
    random = torch.Generator().manual_seed(0)
    for name, leaf in network.state_dict().items():
        if not leaf.is_floating_point():
            continue
        if leaf.numel() > leaf.shape[0]:  # kernels, by their inputs
            leaf.normal_(0, (2 / leaf[0].numel()) ** 0.5, generator=random)
        elif name.endswith(('bias', 'running_mean')):
            leaf.normal_(0, 0.1, generator=random)
        else:
            leaf.uniform_(0.5, 1.5, generator=random)


@torch.no_grad()
def logits(network: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """Of images, float32 [batch, height, width, 3]."""
    found = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    return getattr(found, 'logits', found).numpy()


def random_images(size: int) -> np.ndarray:
    return np.random.default_rng(0).random((2, size, size, 3), np.float32)


def state(network: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: leaf.numpy() for name, leaf in network.state_dict().items()}


def shapes(model: nn.Module, images: np.ndarray) -> Any:
    return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)


def parameters(variables: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables['params']))


def applied(model: nn.Module, variables: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(functools.partial(model.apply, train=False))(variables, images))


def apart(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(found - right).max() / np.abs(right).max())


def measure(case: Case, folder: pathlib.Path) -> dict[str, Any]:
    network = case.make().eval()
    randomize(network)
    images = random_images(case.size)
    right = logits(network, images)
    file, out = folder / f'{case.network.split(" ")[0]}.safetensors', folder / 'out'
    written = state(network)
    safetensors.save_file(written, file)
    flags = [str(file), f'--model={case.model}', f'--arguments={dict(case.arguments)}']
    with contextlib.redirect_stdout(io.StringIO()):
        status = converting.main([*flags, f'--out={out}', f'--input=1,{case.size},{case.size},3'])
    if status:
        raise RuntimeError(f'{case.network} of {case.library} is not converted')
    _, metadata = checkpoint.read(out)
    arguments = command.literal('arguments', metadata['arguments'], dict, '{}')
    model = models.create(case.model, **arguments)
    variables = convert.read(out, model, shapes(model, images))
    difference = apart(applied(model, variables, images), right)
    precise = {}
    if not difference <= LIMIT:
        double = logits(network.double(), images.astype(np.float64))
        with jax.enable_x64(True):
            exact = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
            found = applied(model.clone(dtype=np.float64), exact, images.astype(np.float64))
        precise = {'rounding': apart(right, double), 'difference_float64': apart(found, double)}
    back = convert.to_torch(variables, model, metadata['from']['names'])
    counters = {name for name in written if name.endswith('num_batches_tracked')}
    same = back.keys() == written.keys() - counters and all(
        np.array_equal(leaf, written[name]) for name, leaf in back.items()
    )
    return {
        'library': case.library,
        'network': case.network,
        'model': case.model,
        'arguments': metadata['arguments'],
        'images': list(images.shape),
        'parameters': parameters(variables),
        'largest_logit': float(np.abs(right).max()),
        'difference': difference,
        'back_to_the_bit': same,
        **precise,
    }


@torch.no_grad()
def rebuild(network: torch.nn.Module, file: pathlib.Path) -> None:
    """Gives a network the widths and the weights of an export."""
    described = json.loads(file.with_suffix('.json').read_text())
    for name, widths in described['layers'].items():
        for attribute, value in widths.items():
            setattr(network.get_submodule(name), attribute, value)
    for name, array in safetensors.load_file(file).items():
        layer, _, leaf = name.rpartition('.')
        tensor, layer = torch.from_numpy(array), network.get_submodule(layer)
        trained = leaf in layer._parameters
        setattr(layer, leaf, torch.nn.Parameter(tensor) if trained else tensor)


def measure_compact(name: str, size: int, folder: pathlib.Path) -> dict[str, Any]:
    network = getattr(torchvision.models, name)(weights=None).eval()
    randomize(network)
    file = folder / f'{name}.safetensors'
    safetensors.save_file(state(network), file)
    model = models.create(name, **SETTINGS.get(name, {}))
    images = random_images(size)
    variables = convert.read(file, model, shapes(model, images))
    small = jaxkd.prune(model, variables, images, flops=0.5, criterion='l1', train=False)
    export.FORMATS['safetensors'](small, file)
    rebuild(network, file)
    right = np.asarray(small.apply(small.variables, images, train=False))
    return {
        'network': name,
        'images': list(images.shape),
        'parameters': parameters(small.variables),
        'full_parameters': parameters(variables),
        'largest_logit': float(np.abs(right).max()),
        'difference': apart(logits(network, images), right),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--only', default='', help='in the names of the rows to make; the report keeps its others'
    )
    parser.add_argument('--out', type=pathlib.Path, default=REPORT)
    flags = parser.parse_args()
    report = {'converted': [], 'exported': []}
    if flags.out.exists():
        report = json.loads(flags.out.read_text())
    made = [
        *(('converted', case.network, functools.partial(measure, case)) for case in cases()),
        *(
            ('exported', name, functools.partial(measure_compact, name, size))
            for name, size in COMPACT.items()
        ),
    ]
    far = []
    for kind, name, make in made:
        if flags.only not in f'{kind} {name}':
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = make(pathlib.Path(folder))
        print(*row.values(), flush=True)
        difference = row.get('difference_float64', row['difference'])
        if not (difference <= LIMIT and row.get('back_to_the_bit', True)):
            far.append(name)
        kept = [other for other in report[kind] if key(other) != key(row)]
        # The command of all rows; `--only` makes some of them.
        report |= {**machine.about(), 'command': 'python benchmarks/parity.py'}
        report |= {'versions': versions(), 'limit': LIMIT}
        report[kind] = [*kept, row]
        machine.write_report(flags.out, report)
        jax.clear_caches()
    if far:
        raise SystemExit(f'not alike: {", ".join(far)}')


def key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row.get('library', ''), row['network']


def versions() -> dict[str, str]:
    packages = ('jax', 'flax', 'torch', 'torchvision', 'timm', 'transformers', 'safetensors')
    return {name: importlib.metadata.version(name) for name in packages}


if __name__ == '__main__':
    main()
