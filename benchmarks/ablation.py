"""What each part of the method is worth: the same budget and epochs, one thing changed at a time.

    python benchmarks/ablation.py [--seeds 3] [--jobs 2] [--workdir DIR] [--out FILE]

Every row is `python -m jaxkd.main` on a part of Fashion-MNIST's training images, with a smaller
MobileNetV2 and fewer epochs than configs/mbv2.py:fashion_mnist has, so that the whole table takes
an hour or two on two CPU cores. The variants of a seed share the teacher of its plain run, 'as it
is'. Rows that FILE has of the same setting are not run again, but for the plain runs. Accuracies
are on the 10,000 test images. The data set has to be prepared (see the README) in $TFDS_DATA_DIR or
its default place.
"""

from __future__ import annotations

import argparse
from concurrent import futures
import functools
import itertools
import json
import pathlib
import re
import shutil
import statistics
import sys

import machine

from jaxkd.search import criteria

SETTING = [
    '--config=configs/mbv2.py:fashion_mnist',
    '--config.data.labels=3000',
    '--config.model.arguments.width=0.5',
    '--config.model.arguments.strides=(2, 2, 2, 1, 1, 1, 1)',
    '--config.budget.flops=0.2',
    '--config.teacher.epochs=60',
    '--config.search.epochs=5',
    '--config.distil.epochs=8',
    '--config.distil.learning_rate=0.05',
    '--config.teacher.ema_decay=0.98',
    '--config.search.ema_decay=0.98',
    '--config.distil.ema_decay=0.98',
    '--config.search.shrink=0.0',
    '--config.checkpoint_seconds=600.0',
]
EVERY_BLOCK = tuple((f'block{i}/', {'budget': {'flops': 0.2}}) for i in range(17))
# In so few steps.
GENTLY = ['--config.distil.learning_rate=0.01']
PLAIN = 'as it is'
VARIANTS = {
    PLAIN: [],
    'search without a teacher': ['--config.search.alpha=0.0'],
    'no teacher at all': ['--config.search.alpha=0.0', '--config.distil.alpha=0.0'],
    'mostly the teacher': ['--config.search.alpha=0.9', '--config.distil.alpha=0.9'],
    'worth by gates': ['--config.search.worth=gates'],
    'morphnet': ['--config.search.method=morphnet'],
    'every block to the budget': [f'--config.blocks={EVERY_BLOCK}'],
    'from scratch': ['--config.distil.init=scratch'],
    'cut while searching': ['--config.search.shrink=0.7'],
    **{name: [f'--config.search.method={name}'] for name in criteria.CRITERIA},
    'groups of any width': ['--config.search.min_keep=0.01'],
    'fisher, groups of any width': [
        '--config.search.method=fisher',
        '--config.search.min_keep=0.0001',
    ],
    'recalibrated': ['--config.distil.recalibrate=100'],
    'distilled gently': GENTLY,
    'distilled gently, group_taylor': [*GENTLY, '--config.search.method=group_taylor'],
    'distilled gently, 0.07 of the FLOPs': [*GENTLY, '--config.budget.flops=0.07'],
    'distilled gently, 0.07 of the FLOPs, group_taylor': [
        *GENTLY,
        '--config.budget.flops=0.07',
        '--config.search.method=group_taylor',
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, each on its cores')
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/ablation'))
    results = pathlib.Path(__file__).parent / 'results' / 'ablation.json'
    parser.add_argument('--out', type=pathlib.Path, default=results)
    arguments = parser.parse_args()

    free = machine.shared_cores(arguments.jobs)
    report = {
        **machine.about(),
        'setting': SETTING,
        'variants': {name: VARIANTS[name] for name in arguments.variants},
        'runs': [],
    }

    def run(name: str, seed: int) -> dict:
        names = ('_'.join(re.findall(r'\w+', variant)) for variant in (name, PLAIN))
        folder, first = (arguments.workdir / f'{words}-{seed}' for words in names)
        if first != folder and not folder.exists() and first.exists():
            shutil.copytree(first / 'teacher', folder / 'teacher')
        flags = [*SETTING, *VARIANTS[name], f'--config.seed={seed}', f'--workdir={folder}']
        with machine.own_cores(free) as cores:
            command = [sys.executable, '-m', 'jaxkd.main', *flags]
            machine.run(command, cores, machine.compile_once(arguments.workdir / 'cache'))
        found = json.loads((folder / 'report.json').read_text())
        return {
            'variant': name,
            'seed': seed,
            'teacher': found['teacher']['accuracy'],
            'compact': found['compact']['accuracy'],
            'flops': found['reached']['flops'],
            'params': found['reached']['params'],
            'removal': found['removal'],
            'seconds': {stage: found['seconds'][stage] for stage in ('search', 'distil')},
        }

    before = known(arguments.out)
    with futures.ThreadPoolExecutor(arguments.jobs) as pool:
        others = [name for name in arguments.variants if name != PLAIN]
        pairs = [(name, seed) for seed in range(arguments.seeds) for name in others]
        report['runs'] += [before[pair] for pair in pairs if pair in before]
        pairs = [pair for pair in pairs if pair not in before]
        plain = list(pool.map(functools.partial(run, PLAIN), range(arguments.seeds)))
        for row in itertools.chain(plain, pool.map(lambda pair: run(*pair), pairs)):
            report['runs'].append(row)
            print(json.dumps(row), flush=True)
            report['table'] = table(report['runs'])
            machine.write_report(arguments.out, report)
    for row in report['table']:
        print(
            f'{row["variant"]:28} {100 * row["compact"]:6.2f} ± {100 * row["spread"]:.2f} %   '
            f'{100 * row["gain"]:+.2f} ± {100 * row["gain_spread"]:.2f} points   '
            f'params {row["params"]:.3f}   {row["seconds"]:.0f} s'
        )


def known(path: pathlib.Path) -> dict[tuple[str, int], dict]:
    """The rows of a report of the same setting, by variant and seed."""
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    same = {name for name, flags in report['variants'].items() if VARIANTS.get(name) == flags}
    return {
        (row['variant'], row['seed']): row
        for row in report['runs']
        if report['setting'] == SETTING and row['variant'] in same
    }


def table(runs: list[dict]) -> list[dict]:
    """Mean and standard deviation over the seeds, best variant first."""
    rows = []
    for name in dict.fromkeys(run['variant'] for run in runs):
        mine = [run for run in runs if run['variant'] == name]
        gains = [run['compact'] - run['teacher'] for run in mine]
        rows.append(
            {
                'variant': name,
                'seeds': len(mine),
                'compact': statistics.mean(run['compact'] for run in mine),
                'spread': _spread([run['compact'] for run in mine]),
                'gain': statistics.mean(gains),
                'gain_spread': _spread(gains),
                'flops': statistics.mean(run['flops'] for run in mine),
                'params': statistics.mean(run['params'] for run in mine),
                'seconds': statistics.mean(sum(run['seconds'].values()) for run in mine),
            }
        )
    return sorted(rows, key=lambda row: -row['gain'])


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == '__main__':
    main()
