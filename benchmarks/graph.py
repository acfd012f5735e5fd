"""Seconds that MobileNetV2 (1000 classes) takes in the structure engine.

    python benchmarks/graph.py [--runs=5] [--out=benchmarks/results/graph.json]

`first` is the first call in a fresh process (imports and model.init not counted), `again` is a
later call in the same process with another keep, so with shapes that were not compiled before.
Prints a table and writes the JSON. Medians over fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import flax
import jax
import jax.numpy as jnp
import numpy as np
import scipy

import jaxkd
from jaxkd import models

SIZES = (224, 32)
STEPS = {
    'trace': 'trace',
    'compact': 'compact, verified',
    'total': 'trace + compact',
    'cut': 'cut the variables',
    'price': 'price of every unit',
    'cost': 'cost',
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--runs', type=int, default=5, help='fresh processes for each image size')
    parser.add_argument('--out', default='benchmarks/results/graph.json')
    parser.add_argument('--once', type=int, help=argparse.SUPPRESS)  # what a fresh process does
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(measure(arguments.once)))
        return

    load = [os.getloadavg()[0]]
    seconds = {}
    print(f'{"image":>5}  {"step":20} {"first":>10} {"again":>10}')
    for size in SIZES:
        command = [sys.executable, __file__, f'--once={size}']
        runs = [json.loads(subprocess.check_output(command)) for _ in range(arguments.runs)]
        load.append(os.getloadavg()[0])
        seconds[str(size)] = {
            step: {
                when: {
                    'median': statistics.median(run[when][step] for run in runs),
                    'runs': [run[when][step] for run in runs],
                }
                for when in ('first', 'again')
            }
            for step in STEPS
        }
        for step, title in STEPS.items():
            first, again = (seconds[str(size)][step][when]['median'] for when in ('first', 'again'))
            print(f'{size:5}  {title:20} {first:10.4f} {again:10.4f}')
    print(f'load averages before and after: {", ".join(f"{value:.1f}" for value in load)}')

    record = {
        'command': f'python benchmarks/graph.py --runs={arguments.runs}',
        'model': 'mobilenet_v2, 1000 classes, one image, half of every group kept at random',
        'seconds': seconds,
        'versions': {
            'python': platform.python_version(),
            **{m.__name__: m.__version__ for m in (jax, flax, np, scipy)},
        },
        'machine': {'processor': _processor(), 'cores': os.cpu_count(), 'load averages': load},
    }
    partial = f'{arguments.out}.partial'
    with open(partial, 'w') as file:
        json.dump(record, file, indent=1)
        file.write('\n')
    os.replace(partial, arguments.out)


def measure(size: int) -> dict[str, dict[str, float]]:
    """{'first' or 'again': {step: seconds}}, in this process."""
    model = models.create('mobilenet_v2', num_classes=1000)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    random = np.random.default_rng(0)

    def once(extra: int) -> dict[str, float]:
        seconds = {}

        def timed(step, function, *args):
            start = time.perf_counter()
            result = function(*args)
            seconds[step] = time.perf_counter() - start
            return result

        graph = timed('trace', jaxkd.trace, model, variables, images)
        keep = {
            group.name: np.isin(
                np.arange(group.size), random.permutation(group.size)[: group.size // 2 + extra]
            )
            for group in graph.groups
            if not group.frozen
        }
        timed('compact', jaxkd.compact, graph, variables, keep)
        seconds['total'] = seconds['trace'] + seconds['compact']
        timed('cut', jaxkd.cut, graph, variables, keep)
        timed('price', graph.price, keep, 'flops')
        timed('cost', graph.cost, keep)
        return seconds

    return {'first': once(0), 'again': once(1)}


def _processor() -> str:
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            for line in file:
                if line.startswith('model name'):
                    return line.split(':', 1)[1].strip()
    return platform.processor()


if __name__ == '__main__':
    main()
