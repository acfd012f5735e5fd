"""Seconds to find the channel groups of a network and to cut half of each: jaxkd, Torch-Pruning.

    python benchmarks/graph.py --torch-python path/to/python-with-torch

prints a table and writes benchmarks/results/graph.json. That python needs torch, torchvision and
torch-pruning; without them jaxkd is measured alone. The same architectures (the parameter counts
are compared), one image, one core unless the row says otherwise. What is timed:

    graph    jaxkd.trace, which also prices every unit. Torch-Pruning's build_dependency, which runs
             the network once on zeros (`forward` in the report is such a run by itself).
    groups   Torch-Pruning lists its groups only when asked: list(graph.get_all_groups()).
    cut      jaxkd.cut of the variables. Torch-Pruning's pruner.step() at ratio 0.5, each group by
             itself, by random scores; it lists the groups once more, group by group.
    compact  jaxkd.compact: the cut, and the proof that the result computes what the masked network
             does. Torch-Pruning proves nothing; here it only has to run afterwards.

Each side has a process of its own, and one call of each is made at a time, in turns, so that
whatever else the machine does falls on both; who waits sleeps. `first` is the first call in a fresh
process (imports and making the network not counted), `again` a later one, of a new network and
another choice of channels. Medians.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import copy
import datetime
from importlib import metadata
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple
import warnings

import machine


class Case(NamedTuple):
    network: str  # its name in jaxkd.models and in torchvision.models
    size: int = 224
    cores: int = 1  # 0: all


CASES = (
    Case('mobilenet_v2', 224, cores=0),
    Case('mobilenet_v2', 32, cores=0),
    Case('mobilenet_v2'),
    Case('mobilenet_v3_large'),
    Case('resnet18'),
    Case('resnet50'),
    Case('resnet152'),
    Case('resnext50_32x4d'),
    Case('regnet_y_400mf'),
    Case('vgg16_bn'),
    Case('densenet121'),
    Case('googlenet'),
    Case('inception_v3', 299),
    Case('squeezenet1_1'),
    Case('shufflenet_v2_x1_0'),
    Case('efficientnet_b0'),
    Case('efficientnet_b7'),
    Case('convnext_tiny'),
)
NUM_CLASSES = 1000
TARGETS = {  # of jaxkd, for the first call: (case, steps): seconds
    (Case('mobilenet_v2', 224, cores=0), ('graph', 'compact')): 2,
    (Case('resnet152'), ('graph',)): 5,
    (Case('efficientnet_b7'), ('graph',)): 5,
}
COLUMNS = (  # of the table: (side, step, when)
    ('jaxkd', 'graph', 'first'),
    ('torch_pruning', 'graph', 'first'),
    ('jaxkd', 'graph', 'again'),
    ('torch_pruning', 'graph', 'again'),
    ('torch_pruning', 'groups', 'again'),
    ('jaxkd', 'cut', 'again'),
    ('torch_pruning', 'cut', 'again'),
    ('jaxkd', 'compact', 'first'),
    ('jaxkd', 'compact', 'again'),
)
SHORT = {'jaxkd': 'jaxkd', 'torch_pruning': 'Torch-P.'}
Timed = Callable[..., Any]  # timed(step, function, *args): what function(*args) returns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--torch-python', default=sys.executable, help='a python that has torch')
    names = list(dict.fromkeys(case.network for case in CASES))
    parser.add_argument('--networks', nargs='+', choices=names, default=names, metavar='NAME')
    parser.add_argument('--processes', type=int, default=3, help='fresh ones, for each case')
    parser.add_argument('--repeats', type=int, default=3, help='calls in each process')
    default = pathlib.Path(__file__).parent / 'results' / 'graph.json'
    parser.add_argument('--out', type=pathlib.Path, default=default)
    parser.add_argument('--serve', nargs=4, help=argparse.SUPPRESS)  # what the processes do
    arguments = parser.parse_args()
    if arguments.serve:
        side, network, size, cores = arguments.serve
        serve(SIDES[side], Case(network, int(size), int(cores)))
        return

    pythons = {'jaxkd': sys.executable}
    if can_import(arguments.torch_python, 'torch', 'torchvision', 'torch_pruning'):
        pythons['torch_pruning'] = arguments.torch_python
    else:
        print('torch, torchvision or torch-pruning is missing there (--torch-python): left out.')
    report = {
        'command': (
            f'python benchmarks/graph.py --processes {arguments.processes}'
            f' --repeats {arguments.repeats}'
            + (f' --networks {" ".join(arguments.networks)}' if arguments.networks != names else '')
            + (' --torch-python PYTHON' if 'torch_pruning' in pythons else '')
        ),
        'date': datetime.date.today().isoformat(),
        'device': machine.describe_device(),
        'versions': {},
        'load_average_before': os.getloadavg()[0],
        'rows': [],
    }
    columns = [column for column in COLUMNS if column[0] in pythons]
    print_head(columns, pythons)
    results = {}
    for case in CASES:
        if case.network in arguments.networks:
            results[case] = measure(case, pythons, arguments, report['versions'])
            report['rows'].append({**case._asdict(), **results[case]})
            print_row(case, results[case], columns)
    report['load_average_after'] = os.getloadavg()[0]
    report['targets'] = list(check_targets(results))
    machine.write_report(arguments.out, report)


def measure(case: Case, pythons: dict[str, str], arguments: argparse.Namespace, versions: dict):
    """{side: {'seconds': {step: {when: …}}, facts, 'errors'}} of fresh processes, in turns."""
    samples = {side: {'first': [], 'again': []} for side in pythons}
    for _ in range(arguments.processes):
        with contextlib.ExitStack() as stack:
            asks = {}
            for side, python in pythons.items():
                asks[side] = stack.enter_context(process(python, side, case))
                versions.update(asks[side]())
            for turn in range(arguments.repeats):
                for side, ask in asks.items():
                    samples[side]['again' if turn else 'first'].append(ask())
    result = {side: summary(found) for side, found in samples.items()}
    counts = {side: entry['parameters'] for side, entry in result.items()}
    if len(set(counts.values())) != 1:
        raise SystemExit(f'{case.network} is not the same network: parameter counts {counts}')
    return result


def summary(samples: dict[str, list[dict]]) -> dict:
    everything = [*samples['first'], *samples['again']]
    steps = dict.fromkeys(step for sample in everything for step in sample['seconds'])
    seconds = {step: {} for step in steps}
    for step, (when, found) in itertools.product(steps, samples.items()):
        values = [sample['seconds'][step] for sample in found if step in sample['seconds']]
        if values:
            seconds[step][when] = {
                'median': round(statistics.median(values), 5),
                'min': round(min(values), 5),
                'repeats': len(values),
            }
    errors = list(dict.fromkeys(sample['error'] for sample in everything if 'error' in sample))
    return {**everything[-1]['facts'], 'seconds': seconds, **({'errors': errors} if errors else {})}


def print_head(columns: Sequence[tuple], sides: Iterable[str]) -> None:
    names, steps, calls = zip(*columns, strict=True)
    left = ''.join(f'{SHORT[side]:>9}' for side in sides)
    for title, cells, last in (
        ('', (SHORT[name] for name in names), left),
        ('median seconds', steps, f'{"params":>9}' * len(left.split())),
        ('', calls, f'{"left":>9}' * len(left.split())),
    ):
        print(f'{title:30}' + ''.join(f'{cell:>9}' for cell in cells) + last)


def print_row(case: Case, result: dict, columns: Sequence[tuple]) -> None:
    title = f'{case.network}, {case.size}²' + ('' if case.cores else ', all cores')
    cells = ''
    for side, step, when in columns:
        found = result[side]['seconds'].get(step, {}).get(when)
        cells += f'{found["median"]:9.3f}' if found else f'{"-":>9}'
    left = [
        f'{entry["parameters_left"] / entry["parameters"]:9.1%}'
        if 'parameters_left' in entry
        else f'{"-":>9}'
        for entry in result.values()
    ]
    print(f'{title:30}{cells}{"".join(left)}', flush=True)
    for side, entry in result.items():
        for error in entry.get('errors', ()):
            print(f'    {side} failed at {error.splitlines()[0]:.100}', flush=True)


def check_targets(results: dict[Case, dict]) -> Iterator[dict]:
    for (case, steps), allowed in TARGETS.items():
        if case in results:
            found = [results[case]['jaxkd']['seconds'].get(s, {}).get('first') for s in steps]
            seconds = sum(entry['median'] for entry in found) if all(found) else None
            met = seconds is not None and seconds < allowed
            cores = 'all cores' if not case.cores else 'one core'
            print(
                f'{" + ".join(steps)} of {case.network} on {cores}, first call: {seconds} s,'
                f' {"under" if met else "NOT under"} {allowed} s'
            )
            yield {**case._asdict(), 'steps': steps, 'seconds': seconds, 'target': allowed}


def can_import(python: str, *modules: str) -> bool:
    look = 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, {})))'
    return subprocess.run([python, '-c', look.format(modules)]).returncode == 0


@contextlib.contextmanager
def process(python: str, side: str, case: Case) -> Iterator[Callable[[], dict]]:
    """A process of a side; each call of what it yields is the next answer."""
    command = [python, os.path.abspath(__file__), '--serve', side, *map(str, case)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:

        def ask() -> dict:
            worker.stdin.write('\n')
            worker.stdin.flush()
            return json.loads(worker.stdout.readline())

        yield ask
        worker.stdin.close()


def serve(side: Callable[[Case], Iterator[dict]], case: Case) -> None:
    """The next answer of `side` for each line read."""
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter('ignore')
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-case.cores :])
    for _, answer in zip(sys.stdin, side(case), strict=False):
        print(json.dumps(answer), file=answers, flush=True)


def sample(steps: Callable[[Timed], dict], facts: dict) -> dict:
    """The seconds of every step, and what is known about the network; with the error, if any."""
    seconds = {}
    current = ''

    def timed(step: str, function: Callable, *args: Any) -> Any:
        nonlocal current
        current = step
        start = time.perf_counter()
        result = function(*args)
        seconds[step] = time.perf_counter() - start
        return result

    try:
        return {'seconds': seconds, 'facts': {**facts, **steps(timed)}}
    except Exception as error:
        message = f'{current}: {type(error).__name__}: {error}'
        return {'seconds': seconds, 'facts': facts, 'error': message}


def serve_jaxkd(case: Case) -> Iterator[dict]:
    """The versions, then a sample each time."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxkd
    from jaxkd import models

    packages = ('jax', 'jaxlib', 'flax', 'numpy', 'scipy')
    yield {
        'python': platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }

    images = jax.ShapeDtypeStruct((1, case.size, case.size, 3), jnp.float32)
    model = models.create(case.network, num_classes=NUM_CLASSES)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, leaf.dtype)), shapes)
    random = np.random.default_rng(0)

    def count(variables: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(variables['params']))

    def half(group: Any) -> np.ndarray:
        return random.permutation(group.size) < (group.size + 1) // 2

    def steps(timed: Timed) -> dict:
        model = models.create(case.network, num_classes=NUM_CLASSES)
        graph = timed('graph', jaxkd.trace, model, variables, images)
        keep = {group.name: half(group) for group in graph.groups if not group.frozen}
        small = timed('cut', lambda: jax.block_until_ready(jaxkd.cut(graph, variables, keep)))
        timed('price', graph.price, keep, 'flops')
        timed('cost', graph.cost, keep)
        timed('compact', jaxkd.compact, graph, variables, keep)
        return {'groups': len(keep), 'parameters_left': count(small)}

    while True:
        yield sample(steps, {'parameters': count(variables)})


def serve_torch_pruning(case: Case) -> Iterator[dict]:
    """The versions, then a sample each time."""
    import torch

    try:
        import torchvision
    except RuntimeError:
        # torchvision's compiled operators are for another build of torch (such as PyPI's for CUDA
        # beside one for the CPU). Classifiers do not need them; the import only wants their names.
        for name in ('nms', 'qnms'):
            signature = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
            torch.library.define(f'torchvision::{name}', signature)
        import torchvision
    import torch_pruning

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield {name: metadata.version(name) for name in ('torch', 'torchvision', 'torch-pruning')}

    whole = case.network in ('googlenet', 'inception_v3')
    options = {'aux_logits': False, 'init_weights': False} if whole else {}
    full = torchvision.models.get_model(case.network, num_classes=NUM_CLASSES, **options).eval()
    images = torch.zeros(1, 3, case.size, case.size)

    def count(network: Any) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    def steps(timed: Timed) -> dict:
        network = copy.deepcopy(full)
        graph = timed('graph', torch_pruning.DependencyGraph().build_dependency, network, images)
        timed('forward', network, images)
        widths = ('out_features', 'out_channels')
        classifier = [
            layer
            for layer in network.modules()
            if any(getattr(layer, width, 0) == NUM_CLASSES for width in widths)
        ]
        groups = timed('groups', lambda: list(graph.get_all_groups(ignored_layers=classifier)))
        pruner = torch_pruning.pruner.BasePruner(
            network,
            images,
            torch_pruning.importance.RandomImportance(),
            pruning_ratio=0.5,
            ignored_layers=classifier,
            in_channel_groups={},  # the defaults are shared by all pruners, and would hold on to
            out_channel_groups={},  # the networks before
        )
        timed('cut', pruner.step)
        timed('run', network, images)
        return {'groups': len(groups), 'parameters_left': count(network)}

    while True:
        yield sample(steps, {'parameters': count(full)})


SIDES = {'jaxkd': serve_jaxkd, 'torch_pruning': serve_torch_pruning}


if __name__ == '__main__':
    main()
