"""The headline: accuracy at a fraction of the cost, against what people would do instead.

    python benchmarks/headline.py [--data fashion_mnist] [--labels 5000] [--seeds 3] [--jobs 2]
        [--methods jaxkd l1 …] [--budgets flops:0.5 flops:0.5,params:0.192 …]
        [--torch-python PYTHON]
    python benchmarks/headline.py --pages README.md docs/headline.md
    python benchmarks/headline.py --unseen WORKDIR

The first makes the rows that benchmarks/results/headline.json lacks, and goes on where it was
stopped; the second fills tables and pictures into pages of Markdown, of the rows that there are.
PYTHON has torch and torch-pruning; without it their rows are left out. All data sets but digits
have to be prepared (see docs/data.md) in $TFDS_DATA_DIR or its default place. The third is for
trying recipes: the accuracy of a run with few labels on the training images that it has not drawn.

All methods of a seed see the same images, varied in the same way, in the same batches, with the
same optimizer and moving average, and altogether for as many epochs: those of jaxkd's teachers,
search and distillation. The epochs of a second teacher go into training on where there is none.

Accuracies are on the test part, which no run looks at before its end. The first recipes were chosen
by that of seed 0, though, the later ones by unseen training images: what was tried is in
benchmarks/results/tried.json. What each method spends its epochs on is in docs/headline.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from concurrent import futures
import functools
import hashlib
import json
import pathlib
import re
import runpy
import shutil
import sys
import threading
from typing import Any, NamedTuple

import comparison
import machine

RESULTS = pathlib.Path(__file__).parent / 'results'
CONFIG = runpy.run_path(str(pathlib.Path(__file__).parents[1] / 'configs' / 'mbv2.py'))
NETWORKS = {
    'mobilenet_v2': [],  # as the data set's preset has it
    'resnet20': ['--config.model.name=resnet20', '--config.model.arguments={}'],
    'vgg16_bn': [
        '--config.model.name=vgg16_bn',
        "--config.model.arguments={'small_images': True}",
    ],
    'densenet_bc_100_12': ['--config.model.name=densenet_bc_100_12', '--config.model.arguments={}'],
}
BUDGETS = ('flops:0.5', 'params:0.192', 'flops:0.5,params:0.192', 'flops:0.25')
# Of the search where there is nothing to search: one step.
NONE = 0.001


class Recipe(NamedTuple):
    """How long the stages are, in epochs, and what all methods have in common.

    Attributes:
      teacher: of each teacher.
      search, distil: of jaxkd.
      learning_rate: of new weights.
      teachers: how many teach, where one does.
      flags: of all.
      taught: of the methods whose network has a teacher to the end.
    """

    teacher: float
    search: float
    distil: float
    learning_rate: float
    teachers: int = 1
    flags: tuple[str, ...] = ()
    taught: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """What each method may spend."""
        return self.teachers * self.teacher + self.search + self.distil


SHORT = (
    '--config.data.validation=0.02',  # of 60,000; a look at them takes its time, too
    # Both cost more time here than they are worth: compiling anew for a few steps, and files.
    '--config.search.shrink=0.0',
    '--config.export=()',
)
VARIED = (
    '--config.data.augment.erasing=0.25',
    # After the cut. The full network has the rate already, and images varied so do not help it
    # (tried.json).
    '--config.distil.augment.trivial_augment=True',
    '--config.distil.learning_rate=0.05',
)
# The teacher counts less and less.
FADING = ("--config.distil.losses=(('labels',{}),('hinton',{'temperature':2.0,'decay':1.0}))",)


def recipe(data: str, labels: int | None) -> Recipe:
    """The preset's lengths, and what was found for Fashion-MNIST, with few labels and with all."""
    if data == 'fashion_mnist' and labels is None:
        return Recipe(16, 4, 28, 0.05, 1, SHORT + VARIED, FADING)
    if labels is None or data == 'digits':
        preset = CONFIG['get_config'](data)
        epochs = [preset[stage].epochs for stage in ('teacher', 'search', 'distil')]
        # As flags have them, by which rows are compared: 30 and not 30.0.
        whole = [int(number) if number.is_integer() else number for number in epochs]
        return Recipe(*whole, preset.teacher.learning_rate)
    shared = {'weight_decay': 2e-3, 'ema_decay': 0.99, 'warmup_epochs': 2.0}
    flags = [
        f'--config.{stage}.{field}={value}'
        for stage in ('teacher', 'search', 'distil')
        for field, value in shared.items()
    ]
    return Recipe(40, 10, 60, 0.05, 2, (*flags, *SHORT, *VARIED))


# Without a teacher.
ALONE = ['--config.search.alpha=0.0', '--config.distil.alpha=0.0']


def _alone(recipe: Recipe) -> list[str]:
    """After the search, all epochs that there are: no further teachers are needed."""
    return [
        f'--config.distil.epochs={recipe.total - recipe.teacher - recipe.search}',
        '--config.distil.alpha=0.0',
    ]


def _teachers(recipe: Recipe) -> list[str]:
    return [f'--config.teacher.number={recipe.teachers}'] if recipe.teachers > 1 else []


def _taught(recipe: Recipe) -> list[str]:
    return [*_teachers(recipe), *recipe.taught]


def _at_once(criterion: str) -> Callable[[Recipe], list[str]]:
    return lambda recipe: [
        f'--config.search.method={criterion}',
        f'--config.search.epochs={NONE}',
        f'--config.distil.epochs={recipe.total - recipe.teacher}',
        *ALONE,
    ]


def _from_new_weights(recipe: Recipe, epochs: float) -> list[str]:
    return [
        '--config.distil.init=scratch',
        f'--config.distil.epochs={epochs}',
        f'--config.distil.learning_rate={recipe.learning_rate}',
    ]


def _uniform(recipe: Recipe, epochs: float) -> list[str]:
    narrow = ['--config.search.method=uniform', f'--config.search.epochs={NONE}']
    return [*narrow, *_from_new_weights(recipe, epochs)]


# What a method changes of jaxkd's run; and of the full network's.
CUT: dict[str, Callable[[Recipe], list[str]]] = {
    'jaxkd': _taught,
    'uniform': lambda recipe: [*_uniform(recipe, recipe.total), *ALONE],
    'uniform_kd': lambda recipe: [
        *_uniform(recipe, recipe.search + recipe.distil),
        *_taught(recipe),
    ],
    'l1': _at_once('l1'),
    'fpgm': _at_once('fpgm'),
    'group_taylor': _at_once('group_taylor'),
    'morphnet': lambda recipe: ['--config.search.method=morphnet', *_alone(recipe)],
    'scratch': lambda recipe: [
        *_from_new_weights(recipe, recipe.total),
        '--config.distil.alpha=0.0',
        *_teachers(recipe),  # of the search that the structure is from
    ],
}
FULL = {
    'baseline': lambda recipe: [],
    'baseline_long': lambda recipe: [f'--config.teacher.epochs={recipe.total}'],
}
TORCH = ('torch_pruning', 'network_slimming')
TORCH_NETWORKS = ('mobilenet_v2',)
STREAMED = ('imagenet',)
METHODS = (*FULL, *CUT, *TORCH)


class Task(NamedTuple):
    """A row to be made."""

    method: str
    budget: str  # '' of the full network
    seed: int

    def shares(self) -> dict[str, str]:
        """The budget by resource."""
        return dict(part.split(':') for part in self.budget.split(','))

    def name(self) -> str:
        return '-'.join(re.sub(r'\W+', '_', str(part)) for part in self if part != '')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--network', choices=NETWORKS, default='mobilenet_v2')
    parser.add_argument('--data', choices=CONFIG['PRESETS'], default='fashion_mnist')
    parser.add_argument('--labels', type=int, help='training images; default: all')
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS))
    parser.add_argument('--budgets', nargs='+', default=list(BUDGETS))
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, each on its cores')
    parser.add_argument('--torch-python', help='a python that has torch and torch-pruning')
    parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/headline'))
    parser.add_argument('--out', type=pathlib.Path, default=RESULTS / 'headline.json')
    parser.add_argument(
        '--pages', nargs='+', type=pathlib.Path, help='fill in tables and pictures, run nothing'
    )
    parser.add_argument('--unseen', type=pathlib.Path, help='a workdir of python -m jaxkd.main')
    parser.add_argument('--full', type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument('--views', type=pathlib.Path, help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    if arguments.full:
        train_full(arguments.full, flags)
    elif arguments.views:
        write_views(arguments.views, flags)
    elif arguments.unseen:
        print(json.dumps(unseen(arguments.unseen)))
    elif flags:
        parser.error(f'unknown arguments {flags}')
    elif arguments.torch_python and arguments.network not in TORCH_NETWORKS:
        parser.error(
            f'--torch-python: there is no {arguments.network} in benchmarks/torch_networks.py'
        )
    elif arguments.torch_python and arguments.data in STREAMED:
        parser.error(f'--torch-python: {arguments.data} is too large to be written view by view')
    elif arguments.pages:
        rows = current(json.loads(arguments.out.read_text())['rows'])
        comparison.write_pages(arguments.pages, rows, RESULTS)
    else:
        make_rows(arguments)


def make_rows(arguments: argparse.Namespace) -> None:
    """Runs what is missing, each row as soon as what it needs is there."""
    report: dict[str, Any] = {'commands': {}, 'rows': []}
    if arguments.out.exists():
        report = json.loads(arguments.out.read_text())
    about = machine.about(arguments.torch_python)
    free, lock = machine.shared_cores(arguments.jobs), threading.Lock()
    one = functools.partial(make_row, arguments, free, about['device'])

    def keep(task: Task, needed: list[futures.Future]) -> None:
        for other in needed:
            other.result()
        if any(_same(row, arguments, task) for row in report['rows']):
            return
        try:
            row = one(task)
        except Exception as error:
            print(f'{task.name()}: {error}', file=sys.stderr, flush=True)
            raise
        with lock:
            report['rows'] = [old for old in report['rows'] if _key(old) != _key(row)] + [row]
            report['commands'][comparison.words(vars(arguments))] = about['command']
            machine.write_report(arguments.out, report)
            print(json.dumps(row), flush=True)

    running: dict[Task, futures.Future] = {}
    with futures.ThreadPoolExecutor(arguments.jobs) as pool:
        # What a task needs was handed in before it, so that nothing waits for what cannot begin.
        for task in tasks(arguments):
            needed = [running[other] for other in needs(task, running)]
            running[task] = pool.submit(keep, task, needed)
    for lines in comparison.tables(current(report['rows'])).values():
        print(*lines, sep='\n')
    for row in running.values():
        row.result()  # raises what went wrong


def tasks(arguments: argparse.Namespace) -> list[Task]:
    """Baselines, what others need, and the rest in the order that was asked for."""
    wanted = [name for name in arguments.methods if arguments.torch_python or name not in TORCH]
    wanted.sort(key=lambda name: name != 'jaxkd')
    found = [Task('baseline', '', seed) for seed in range(arguments.seeds)]
    for name in wanted:
        budgets = [''] if name in FULL else arguments.budgets
        found += [Task(name, budget, seed) for budget in budgets for seed in range(arguments.seeds)]
    return list(dict.fromkeys(found))


def needs(task: Task, there: Collection[Task]) -> list[Task]:
    """Which of the tasks before it make what a task begins with, or shares."""
    found = [Task('baseline', '', task.seed)]

    def first(*methods: str) -> list[Task]:
        return [other for other in there if other.method in methods and other.seed == task.seed][:1]

    if task.method == 'scratch':
        found.append(task._replace(method='jaxkd'))
    if task.method == 'uniform_kd':  # its second teacher is that of any budget
        found += first('jaxkd')
    if task.method in TORCH:  # one trains the network of all
        found += first(*TORCH)
    return [other for other in found if other in there]


def make_row(arguments: argparse.Namespace, free: Any, device: str, task: Task) -> dict[str, Any]:
    """Runs a task to its end."""
    how = recipe(arguments.data, arguments.labels)
    runs = arguments.workdir / comparison.words(vars(arguments))
    folder = runs / task.name()
    share(runs, task)
    environment = machine.compile_once(arguments.workdir / 'cache')
    flags = flags_of(arguments, task, how)
    with machine.own_cores(free) as cores:
        if task.method in FULL:
            command = [sys.executable, __file__, f'--full={folder}', *flags]
            machine.run(command, cores, environment)
            found = json.loads((folder / 'full.json').read_text())
        elif task.method in TORCH:
            found = run_torch(arguments, task, how, cores, runs)
        else:
            command = [sys.executable, '-m', 'jaxkd.main', f'--workdir={folder}', *flags]
            machine.run(command, cores, environment)
            said = json.loads((folder / 'report.json').read_text())
            found = {name: said['compact'][name] for name in ('accuracy', 'flops', 'params')}
            found['seconds'] = sum(said['seconds'].values())
    return {
        'network': arguments.network,
        'data': arguments.data,
        'labels': arguments.labels,
        'method': task.method,
        'budget': task.budget,
        'seed': task.seed,
        'epochs': how.teacher if task.method == 'baseline' else how.total,
        **found,
        'seconds': round(found['seconds']),
        'device': f'{device}, {len(cores)} of them used',
        'flags': flags,
    }


def flags_of(arguments: argparse.Namespace, task: Task, how: Recipe) -> list[str]:
    """Of `python -m jaxkd.main`. Those of a teacher are the same for all that share it."""
    flags = [f'--config=configs/mbv2.py:{arguments.data}', *NETWORKS[arguments.network]]
    if arguments.labels is not None:
        flags.append(f'--config.data.labels={arguments.labels}')
    for stage in ('teacher', 'search', 'distil'):
        flags.append(f'--config.{stage}.epochs={getattr(how, stage)}')
    flags += [f'--config.teacher.learning_rate={how.learning_rate}', *how.flags]
    flags.append(f'--config.seed={task.seed}')
    if task.method in FULL:
        later = ('--config.search.', '--config.distil.')
        return [flag for flag in flags if not flag.startswith(later)] + FULL[task.method](how)
    budget = {'flops': '1.0'} | task.shares()
    flags += [f'--config.budget.{resource}={share}' for resource, share in budget.items()]
    return flags + CUT.get(task.method, _alone)(how)


def share(runs: pathlib.Path, task: Task) -> None:
    """Gives a run the teachers of its seed, and the search that its structure is from."""
    if task.method not in CUT:
        return
    given = {'teacher': runs / task._replace(method='baseline', budget='').name()}
    for path in sorted(runs.glob(f'jaxkd-*-{task.seed}/teacher[2-9]')):
        if (path / 'result').exists():
            given[path.name] = path.parent
    if task.method == 'scratch':
        given['search'] = runs / task._replace(method='jaxkd').name()
    for stage, folder in given.items():
        source, target = folder / stage, runs / task.name() / stage
        if source.exists() and not target.exists():
            shutil.copytree(source, target)


def train_full(folder: pathlib.Path, flags: list[str]) -> None:
    """The full network alone, trained and tested, by the flags of `python -m jaxkd.main`."""
    import time

    from absl import flags as absl_flags

    from jaxkd import cpu, main, pipeline, train
    from jaxkd import plan as planning

    del main  # it defines the flags
    cpu.hold_memory()
    absl_flags.FLAGS(['headline', *flags])
    config = absl_flags.FLAGS.config
    plan = planning.make_plan(config)
    start = time.monotonic()
    with pipeline.prepared(config, folder, plan) as setup:
        variables = pipeline.learn_teacher(setup, plan)
        seconds = time.monotonic() - start
        test = train.put(setup.load('test'), setup.mesh)
        step = train.make_eval_step(plan.model, setup.preprocessing, setup.mesh)
        size = config.teacher.batch_size
        accuracy = train.evaluate(step, variables, test, size, setup.mesh)['accuracy']
    cost = plan.graph.cost()
    found = {'accuracy': accuracy, 'flops': cost.flops, 'params': cost.params, 'seconds': seconds}
    (folder / 'full.json').write_text(json.dumps(found))


def unseen(workdir: pathlib.Path) -> float:
    """Accuracy of a run's compact network on the training images that the run has not drawn."""
    import numpy as np

    import jaxkd
    from jaxkd import data, saved, train
    from jaxkd import mesh as meshes
    from jaxkd.data import split

    config = json.loads((workdir / 'config.json').read_text())['config']
    load = data.loader(config['data'], config['seed'])
    learning = load('train')
    drawn = {image.tobytes() for part in (learning, load('validation')) for image in part.images}
    every = data.load(config['data']['name'], 'train', data_dir=config['data']['dir'])
    left = [place for place, image in enumerate(every.images) if image.tobytes() not in drawn]
    mesh = meshes.make_mesh()
    found = jaxkd.load(saved.within(workdir))
    views = train.Preprocessing(*data.statistics(learning), padding=0, flip=False)
    step = train.make_eval_step(found.module, views, mesh)
    examples = train.put(split.subset(every, np.array(left)), mesh)
    return train.evaluate(step, found.variables, examples, 500, mesh)['accuracy']


def run_torch(
    arguments: argparse.Namespace,
    task: Task,
    how: Recipe,
    cores: list[int],
    runs: pathlib.Path,
) -> dict[str, Any]:
    """One of Torch-Pruning's pruners, in a process that has no JAX."""
    asked = runs / f'{task.name()}.json'
    flags = flags_of(arguments, task, how)
    # Whatever the budget is.
    origin = [flag for flag in flags if not flag.startswith('--config.budget.')]
    images = runs / f'views-{task.seed}-{_digest(origin)}'
    if not images.exists():
        command = [sys.executable, __file__, f'--views={images}', *flags]
        machine.run(command, cores, machine.compile_once(arguments.workdir / 'cache'))
    config = json.loads((images / 'config.json').read_text())
    settings = {
        'method': task.method,
        'network': arguments.network,
        'arguments': {
            # The other networks have one width.
            name: value
            for name, value in config['model']['arguments'].items()
            if (name, value) != ('width', 1.0)
        },
        'images': str(images),
        'budget': task.shares(),
        'seed': task.seed,
        'stages': {stage: config[stage] for stage in ('teacher', 'search', 'distil')},
        'trained': str(images / 'trained.pt'),
    }
    asked.write_text(json.dumps(settings))
    worker = str(pathlib.Path(__file__).parent / 'torch_pruners.py')
    answer = asked.with_suffix('.answer.json')
    command = [arguments.torch_python, worker, str(asked), str(answer)]
    machine.run(command, cores, {'OMP_NUM_THREADS': str(len(cores))})
    return json.loads(answer.read_text())


def write_views(folder: pathlib.Path, flags: list[str]) -> None:
    """What jaxkd's stages see in each of their steps, and the test images, for others.

    Writes to the folder, for each of the three stages, uint8 `STAGE-images.npy` [steps, batch,
    height, width, channels] and int32 `STAGE-labels.npy` [steps, batch]; `test.npz`; and the config
    that the flags make, with the number of steps.
    """
    from absl import flags as absl_flags
    import jax
    import numpy as np

    from jaxkd import data, loop, main, train, workdir
    from jaxkd import plan as planning

    del main  # it defines the flags
    absl_flags.FLAGS(['headline', *flags])
    config = absl_flags.FLAGS.config
    load = data.loader(config.data, config.seed)
    learning, test = load('train'), load('test')
    mean, std = data.statistics(learning)
    flip = data.info(config.data.name).flip and config.data.flip
    views = dict.fromkeys(('teacher', 'search'), data.make_augmentation(config.data.augment))
    views['distil'] = planning.distil_augmentation(config)
    aside = folder.with_name(f'{folder.name}.part')
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    record = workdir.record(config)
    for stage, augmentation in views.items():
        steps = loop.length(config, stage, learning.size)
        batches = data.Steps(learning.size, config[stage].batch_size, config.seed, 0, steps)
        how = train.Preprocessing(mean, std, config.data.padding, flip, augmentation)
        see = jax.jit(functools.partial(train.training_views, config.seed, preprocessing=how))
        shape = (steps, config[stage].batch_size)
        labels = np.empty(shape, np.int32)
        images = np.lib.format.open_memmap(
            aside / f'{stage}-images.npy',
            'w+',
            np.uint8,
            (*shape, *learning.images.shape[1:]),
        )
        for step, (_, chosen) in enumerate(batches):
            seen, share = see(step, learning.images[chosen])
            if share is not None:
                raise SystemExit(f'{stage}: mixed images have no label that others could learn')
            images[step], labels[step] = np.asarray(seen), learning.labels[chosen]
        images.flush()
        np.save(aside / f'{stage}-labels.npy', labels)
        record[stage]['steps'] = steps
        record[stage]['steps_per_epoch'] = train.steps_per_epoch(learning.size, shape[1])
    np.savez(aside / 'test.npz', images=test.images, labels=test.labels, mean=mean, std=std)
    (aside / 'config.json').write_text(json.dumps(record))
    aside.replace(folder)


def _digest(flags: list[str]) -> str:
    """Tells what was made with other flags apart."""
    return hashlib.sha256('\n'.join(flags).encode()).hexdigest()[:12]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ('network', 'data', 'labels', 'method', 'budget', 'seed'))


def _same(row: dict[str, Any], arguments: argparse.Namespace, task: Task) -> bool:
    """Whether a row is that of a task, made as it would be made now."""
    if _key(row) != (arguments.network, arguments.data, arguments.labels, *task):
        return False
    made = flags_of(arguments, task, recipe(arguments.data, arguments.labels))
    return _settled(row['flags']) == _settled(made)


def _settled(flags: list[str]) -> dict[str, str]:
    """By field: of a flag that is said twice the last holds."""
    return dict(flag.split('=', 1) for flag in flags)


def current(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those made as they would be made now: of two recipes there is no comparison."""

    def made_now(row: dict[str, Any]) -> bool:
        task = Task(row['method'], row['budget'], row['seed'])
        return _same(row, argparse.Namespace(**row), task)

    return [row for row in rows if made_now(row)]


if __name__ == '__main__':
    main()
