"""What files a compact network makes in each format: how exact, how large, how fast.

    python benchmarks/export.py [--networks NAME …] [--formats NAME …] [--out FILE]

Each network, at random variables, is cut to half its multiply-adds by its kernels' sizes and
written in each form of each format. Told are the largest difference from the network itself, as a
share of its largest output, the file's size beside the full network's in the same form, and the
median time of a batch, all forms taking turns. A format whose packages are missing is left out;
rows in FILE that were measured before, in another environment, say, are kept.
"""

import argparse
from collections.abc import Callable
import functools
import importlib.metadata
import importlib.util
import json
import pathlib
import statistics
import tempfile

import jax
import machine
import numpy as np

import jaxkd
from jaxkd import errors, export, mode, models
from jaxkd.graph import latency
from jaxkd.graph.structure import CompactModel

NETWORKS = {
    'mobilenet_v2': {'width': 1.0, 'num_classes': 10},
    'resnet18': {'num_classes': 10},
    'densenet_bc_100_12': {'num_classes': 10},
}
IMAGE = (32, 32, 3)
FORMS = {
    'stablehlo': {'': {}, 'fold': {'fold': True}, 'bfloat16': {'dtype': 'bfloat16'}},
    'onnx': {'': {}, 'float16': {'dtype': 'float16'}, 'int8': {'int8': None}},
    'tflite': {'': {}, 'float16': {'dtype': 'float16'}, 'int8': {'int8': None}},
}
# Random images that int8 is calibrated on, batches, and turns that each form has at most.
CALIBRATION = 64
BATCHES = (1, 64)
TURNS = 30
SECONDS = 20.0
PACKAGES = ('jax', 'flax', 'jax2onnx', 'onnxruntime', 'tensorflow')


def measure(name: str, formats: list[str]) -> list[dict]:
    """The rows of one network."""
    model = models.create(name, **NETWORKS[name])
    kwargs = mode.arguments(model, train=False)
    image = np.zeros((1, *IMAGE), np.float32)
    variables = jax.jit(functools.partial(model.init, **kwargs))(jax.random.key(0), image)
    small = jaxkd.prune(model, variables, image, flops=0.5, criterion='l1', **kwargs)
    full = CompactModel(model, variables, small.structure)
    calibration = np.random.default_rng(1).random((CALIBRATION, *IMAGE), np.float32)
    rows, calls = [], []
    with tempfile.TemporaryDirectory() as folder:
        for format in formats:
            for form, options in FORMS[format].items():
                if 'int8' in options:
                    options = {'int8': calibration}
                row = {'network': name, 'format': format, 'form': form or 'float32'}
                path = pathlib.Path(folder) / f'{form}.{format}'
                try:
                    done = export.FORMATS[format](small, path, **options)
                    whole = export.FORMATS[format](full, None, **options)
                except errors.ExportError as error:
                    rows.append(row | {'error': error.why})
                    continue
                row |= {'difference': done.difference, 'bytes': done.bytes}
                rows.append(row | {'full_bytes': whole.bytes, 'variables': done.variables})
                calls.append((rows[-1], _called(export.OPENED[format](path))))
        for batch in BATCHES:
            images = np.random.default_rng(0).random((batch, *IMAGE), np.float32)
            turns = [functools.partial(call, images) for _, call in calls]
            times = latency.take_turns(turns, TURNS, SECONDS)
            for (row, _), taken in zip(calls, times, strict=True):
                row[f'milliseconds_{batch}'] = 1e3 * statistics.median(taken)
    return rows


def _called(call: Callable) -> Callable:
    """A function of a file, compiled where it is one of JAX, and waited for."""
    if getattr(call, '__self__', None) is not None:
        call = jax.jit(call)
    return lambda images: jax.block_until_ready(call(images))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--networks', nargs='+', default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument('--formats', nargs='+', default=list(FORMS), choices=FORMS)
    parser.add_argument(
        '--out', type=pathlib.Path, default=pathlib.Path('benchmarks/results/export.json')
    )
    flags = parser.parse_args()
    formats = [name for name in flags.formats if not export.missing(name)]
    versions = {
        package: importlib.metadata.version(package)
        for package in PACKAGES
        if importlib.util.find_spec(package)
    }
    report = json.loads(flags.out.read_text()) if flags.out.exists() else {'rows': []}
    for name in flags.networks:
        rows = measure(name, formats)
        for row in rows:
            print(row)
        made = {(name, format) for format in formats}
        kept = [row for row in report['rows'] if (row['network'], row['format']) not in made]
        versions = report.get('versions', {}) | versions
        report = machine.about() | {'versions': versions, 'rows': [*kept, *rows]}
        machine.write_report(flags.out, report)


if __name__ == '__main__':
    main()
