"""Whether searches end within their budgets: random ones, for four networks, on digits.

    python benchmarks/budgets.py [--number 20] [--jobs 2] [--workdir DIR] [--out FILE]

A run's budgets are one or two of FLOPs, parameters and activations, at random shares, and in every
second run a block of the network with a budget or limits of its own. It is about the structure: the
searches are short ones, from a common teacher, and what a compact network costs is what a trace of
it says. A run is good if every budget holds and one of them is used to at least 99 %.
"""

from __future__ import annotations

import argparse
from concurrent import futures
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
from typing import Any

import machine
import numpy as np

NETWORKS = {
    'MobileNetV2': (
        'mobilenet_v2',
        {'width': 0.35, 'stem_stride': 1, 'strides': (1, 1, 2, 1, 1, 2, 1)},
    ),
    'ResNet-20': ('resnet20', {}),
    'VGG': (
        'vgg11_bn',
        {'depths': (1, 1, 2, 0, 0), 'strides': (2, 2, 2, 1, 1), 'small_images': True},
    ),
    'DenseNet': ('densenet_bc_100_12', {'depths': (4, 4, 4)}),
}
SHARES = {'flops': (0.15, 0.9), 'params': (0.15, 0.9), 'activations': (0.3, 0.95)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--number', type=int, default=20, help='random budgets for each network')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time')
    parser.add_argument('--networks', nargs='+', choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/budgets'))
    results = pathlib.Path(__file__).parent / 'results' / 'budgets.json'
    parser.add_argument('--out', type=pathlib.Path, default=results)
    arguments = parser.parse_args()
    os.environ.update(machine.compile_once(arguments.workdir / 'cache'))

    report: dict[str, Any] = {
        **machine.about(),
        'networks': {name: NETWORKS[name] for name in arguments.networks},
        'runs': [],
    }
    spawn = multiprocessing.get_context('spawn')
    with futures.ProcessPoolExecutor(arguments.jobs, mp_context=spawn) as pool:
        # The first run of a network trains the teacher of the others.
        list(pool.map(functools.partial(run, None, arguments.workdir), arguments.networks))
        pairs = [(seed, name) for seed in range(arguments.number) for name in arguments.networks]
        waiting = [pool.submit(run, seed, arguments.workdir, name) for seed, name in pairs]
        for done in waiting:
            report['runs'].append(done.result())
            print(json.dumps(report['runs'][-1]), flush=True)
            report['good'] = sum(row['good'] for row in report['runs'])
            report['of'] = len(report['runs'])
            machine.write_report(arguments.out, report)
    print(f'{report["good"]} of {report["of"]} runs are within [0.99, 1] of their budget')


def run(seed: int | None, workdir: pathlib.Path, name: str) -> dict[str, Any]:
    """A run with the random budgets of a seed, or the one that trains the teacher."""
    from configs import mbv2
    from jaxkd import pipeline
    from jaxkd import plan as planning

    config = mbv2.get_config()
    config.model.name, arguments = NETWORKS[name]
    with config.unlocked():
        config.model.arguments = arguments
    config.teacher.epochs, config.search.epochs = 10.0, 6.0
    config.search.shrink = 0.0  # no time for compilation
    config.checkpoint_seconds = 600.0
    folder = workdir / f'{name}-{"teacher" if seed is None else seed}'
    first = workdir / f'{name}-teacher'
    if first.exists() and not folder.exists():
        shutil.copytree(first / 'teacher', folder / 'teacher')
    plan = planning.make_plan(config)
    if seed is not None:
        draw(config, plan.graph, seed)
        plan = planning.make_plan(config)
    with pipeline.prepared(config, folder, plan) as setup:
        teacher = pipeline.learn_teacher(setup, plan)
        if seed is None:
            return {}
        small, _ = pipeline.find_structure(setup, plan, teacher)
    used = use(plan, small)
    return {
        'network': name,
        'seed': seed,
        'budget': {r: share for r, share in config.budget.items() if share != 1.0},
        'blocks': config.blocks,
        'used': {name: round(share, 5) for name, share in used.items()},
        'good': 0.99 <= max(used.values()) <= 1.0,
    }


def draw(config: Any, graph: Any, seed: int) -> None:
    """Random budgets and blocks that can be met."""
    from jaxkd import errors
    from jaxkd.search import select

    random = np.random.default_rng(seed)
    groups = [group.name for group in graph.groups if not group.frozen]
    while True:
        resources = random.permutation(list(SHARES))[: random.integers(1, 3)]
        asked = {str(r): round(float(random.uniform(*SHARES[r])), 3) for r in resources}
        config.budget.update({'flops': 1.0, 'params': 1.0, 'activations': 1.0} | asked)
        block = str(random.choice(groups)).split('/')[0].split('#')[0]
        settings = (
            {'budget': {'params': round(float(random.uniform(0.3, 0.9)), 3)}},
            {'min_keep': round(float(random.uniform(0.2, 0.8)), 3)},
            {'strength': round(float(random.uniform(0.2, 5.0)), 3)},
        )
        chosen = settings[random.integers(len(settings))]
        config.blocks = ((f'^{block}(/|$)', chosen),) if seed % 2 else ()
        try:
            select.floor(graph, blocks=config.blocks, **config.budget)
        except errors.BudgetError:
            continue
        return


def use(plan: Any, small: Any) -> dict[str, float]:
    """The share that is used of each budget, of blocks and of the network."""
    import jaxkd

    cost = jaxkd.trace(small.module, small.variables, *plan.graph.inputs, train=False).cost()
    return {
        f'{b.block} {b.resource}'.strip(): b.share(cost) * b.full / b.most for b in plan.budgets
    }


if __name__ == '__main__':
    main()
