"""Training steps of jaxkd against PyTorch's: the same networks, batches and number format.

    python benchmarks/train_step.py --torch-python PYTHON [--cases …] [--repeats 11]

prints a table and writes benchmarks/results/train_step.json. PYTHON has torch; without it the
rest is printed.

Three kinds of steps, as jaxkd's stages make them (`jaxkd.train.make_train_step`, with the moving
average of the variables, without augmentation): of the teacher's training, of distillation with the
network itself as the teacher, and of the search, with penalty and control, at full width. PyTorch
trains and distils; a search is held against its distillation. Inference runs on running statistics.
SGD with Nesterov momentum and weight decay, float32. PyTorch runs in channels_last, as it is and by
`torch.compile`.

One call of each at a time, in turns, so that whatever else the machine does falls on all of them;
medians. Both processes keep the memory that they have freed, as jaxkd.main does
(`jaxkd.cpu.hold_memory`), and may use all cores. PyTorch's process is idle (waiting for a line)
while JAX is measured.

Wall-clock times want an idle machine: PyTorch's OpenMP threads wait for each other, and suffer far
more than XLA's from a third process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
import contextlib
import functools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

import machine


class Case(NamedTuple):
    """A network as both sides make it.

    Attributes:
      name: in `jaxkd.models`.
      arguments: for jaxkd's.
      image: height, width and channels.
      arguments: for both.
      here: for jaxkd's alone.
    """

    name: str
    image: tuple[int, int, int]
    arguments: dict[str, Any]
    here: dict[str, Any]


CASES = {
    'MobileNetV2 32×32×3': Case(
        'mobilenet_v2', (32, 32, 3), {'stem_stride': 1, 'strides': (1, 1, 2, 2, 1, 2, 1)}, {}
    ),
    'MobileNetV2 8×8×1': Case(
        'mobilenet_v2', (8, 8, 1), {'stem_stride': 1, 'strides': (1, 1, 2, 1, 1, 2, 1)}, {}
    ),
    'ResNet-18 64×64×3': Case('resnet18', (64, 64, 3), {}, {}),
    'ResNet-50 64×64×3': Case('resnet50', (64, 64, 3), {}, {}),
    'VGG-16-BN 32×32×3': Case('vgg16_bn', (32, 32, 3), {}, {'small_images': True}),
    'EfficientNet-B0 64×64×3': Case(
        'efficientnet_b0', (64, 64, 3), {}, {'dropout_rate': 0.0, 'drop_path_rate': 0.0}
    ),
}
NUM_CLASSES = 10
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
ALPHA, TEMPERATURE = 0.5, 2.0
# Which of PyTorch's steps each of jaxkd's is held against.
AGAINST = {'train': 'train', 'distil': 'distil', 'search': 'distil', 'inference': 'inference'}
# What `jaxkd.cpu.hold_memory` does, for a process without jaxkd.
HELD = {
    'MALLOC_ARENA_MAX': '1',
    'MALLOC_MMAP_MAX_': '0',
    'MALLOC_TRIM_THRESHOLD_': str(2**31 - 1),
}
Measure = Callable[[], float]  # one call's milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--torch-python', default=sys.executable, help='a python that has torch')
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES))
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--repeats', type=int, default=11)
    parser.add_argument('--compile', action=argparse.BooleanOptionalAction, default=True)
    default = pathlib.Path(__file__).parent / 'results' / 'train_step.json'
    parser.add_argument('--out', type=pathlib.Path, default=default)
    parser.add_argument('--torch-worker', choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.torch_worker:
        serve_torch(CASES[arguments.torch_worker], arguments.batch, arguments.compile)
        return
    report: dict[str, Any] = {
        **machine.about(),
        'batch': arguments.batch,
        'repeats': arguments.repeats,
        'versions': {'python': platform.python_version()},
        'load_average_before': os.getloadavg()[0],
        'cases': {},
    }
    # The interpreter's path says nothing to anybody else.
    report['command'] = report['command'].replace(arguments.torch_python, 'PYTHON')
    for name in arguments.cases:
        with torch_process(name, arguments) as torch:
            report['cases'][name] = measure_case(CASES[name], torch, arguments, report['versions'])
        machine.write_report(arguments.out, report)
        print_table(name, report['cases'][name])


def measure_case(
    case: Case,
    torch: tuple[dict[str, Measure], dict[str, Any]] | None,
    arguments: argparse.Namespace,
    versions: dict[str, str],
) -> dict[str, Any]:
    """Milliseconds of all contenders, measured in turns, and their ratios."""
    measures, facts = prepare_jax(case, arguments.batch)
    versions.update(facts.pop('versions'))
    entry: dict[str, Any] = {'jaxkd': facts}
    contenders = {('jaxkd', kind): measure for kind, measure in measures.items()}
    if torch is None:
        print('PyTorch is not importable there (--torch-python): left out.')
    else:
        asked, told = torch
        versions.update(told.pop('versions'))
        if told['parameters'] != facts['parameters']:
            raise SystemExit(f'not the same network: {facts} and {told} parameters')
        entry['PyTorch'] = told
        contenders |= {('PyTorch', kind): measure for kind, measure in asked.items()}
    taken: dict[tuple[str, str], list[float]] = {contender: [] for contender in contenders}
    for _ in range(arguments.repeats):
        for contender, measure in contenders.items():
            taken[contender].append(measure())
    medians = {contender: statistics.median(times) for contender, times in taken.items()}
    for (side, kind), median in medians.items():
        entry[side].setdefault('median_ms', {})[kind] = round(median, 2)
        entry[side].setdefault('min_ms', {})[kind] = round(min(taken[side, kind]), 2)
    entry['ratios'] = {
        f'{kind} / {other}': round(medians['jaxkd', kind] / medians['PyTorch', other], 3)
        for kind, counterpart in AGAINST.items()
        for other in (counterpart, f'{counterpart}, compiled')
        if ('PyTorch', other) in medians
    }
    return entry


def print_table(name: str, entry: dict[str, Any]) -> None:
    print(f'\n{name}: median ms')
    for side in ('jaxkd', 'PyTorch'):
        if side in entry:
            cells = ', '.join(f'{kind} {ms:.1f}' for kind, ms in entry[side]['median_ms'].items())
            print(f'  {side}: {cells}')
    print('  jaxkd / PyTorch: ' + ', '.join(f'{k} {v:.2f}' for k, v in entry['ratios'].items()))


def prepare_jax(case: Case, batch: int) -> tuple[dict[str, Measure], dict[str, Any]]:
    """A call of each kind of step, and of inference, that returns its milliseconds."""
    import flax
    import jax
    import numpy as np
    import optax

    import jaxkd
    from jaxkd import cpu, distill, models, train
    from jaxkd import mesh as meshes
    from jaxkd.search import gates as gating
    from jaxkd.search import learn, penalty

    cpu.hold_memory()
    mesh = meshes.make_mesh()
    model = models.create(case.name, num_classes=NUM_CLASSES, **case.arguments, **case.here)
    rng = np.random.default_rng(0)
    fed = meshes.replicate(
        {
            'images': rng.integers(0, 256, (batch, *case.image), np.uint8),
            'labels': np.arange(batch, dtype=np.int32) % NUM_CLASSES,
        },
        mesh,
    )
    image = np.zeros((1, *case.image), np.float32)
    init = jax.jit(model.init, static_argnames='train')
    variables = meshes.replicate(init(jax.random.key(0), image, train=False), mesh)
    views = train.Preprocessing(np.float32(0.5), np.float32(0.25), 0, False)
    graph = jaxkd.trace(model, variables, image, train=False)
    course = learn.course(graph, steps=1000, learning_rate=LEARNING_RATE, flops=0.5)
    body = learn.body(course, graph.keep_all())
    config = {'momentum': MOMENTUM, 'weight_decay': WEIGHT_DECAY}

    def soft(logits, taught, labels):
        return distill.distillation(logits, taught, labels, alpha=ALPHA, temperature=TEMPERATURE)

    kinds = {
        'train': ((), train.hard_loss(0.0), None),
        'distil': ((), soft, model),
        'search': ((penalty.proximal(body.gates, LEARNING_RATE),), soft, model),
    }
    gated = {**variables, 'params': gating.gated(course.gates, variables['params'])}
    measures: dict[str, Measure] = {}
    facts: dict[str, Any] = {
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(variables['params'])),
        'first_call_seconds': {},
        'versions': {'jax': jax.__version__, 'flax': flax.__version__, 'optax': optax.__version__},
    }

    def measured(kind: str, after: tuple[Any, ...], loss: train.Loss, teacher: Any) -> Measure:
        tx = train.optimizer(config, LEARNING_RATE, *after)
        searches = kind == 'search'
        step = train.make_train_step(
            body.module if searches else model,
            tx,
            loss,
            views,
            mesh,
            seed=0,
            ema_decay=0.99,
            teacher=teacher,
            fold=functools.partial(gating.fold, body.gates) if searches else None,
        )
        state = meshes.replicate(train.create_state(gated if searches else variables, tx), mesh)
        memory, number = learn.first(body, gated['params']), 0

        def call() -> None:
            nonlocal state, memory, number
            extra = {}
            if searches:
                memory = learn.press(body, number, state.params, memory)
                extra = {'strength': learn.strength(body, memory)}
            state, metrics = step(state, fed, variables if teacher else {}, extra)
            number += 1
            jax.block_until_ready((state, metrics))

        return timed(call)

    for kind, arguments in kinds.items():
        measures[kind] = measured(kind, *arguments)
    forward = train.make_eval_step(model, views, mesh)
    valid = np.ones(batch, bool)
    measures['inference'] = timed(lambda: jax.block_until_ready(forward(variables, fed, valid)))
    for kind, measure in measures.items():  # the first call compiles, the second pays for memory
        facts['first_call_seconds'][kind] = round(measure() / 1e3, 1)
        measure()
    return measures, facts


def timed(call: Callable[[], object]) -> Measure:
    def measure() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    return measure


@contextlib.contextmanager
def torch_process(
    name: str, arguments: argparse.Namespace
) -> Iterator[tuple[dict[str, Measure], dict[str, Any]] | None]:
    """The PyTorch network in another process; None where torch is not importable."""
    python = arguments.torch_python
    if subprocess.run([python, '-c', 'import torch'], capture_output=True).returncode:
        yield None
        return
    command = [python, os.path.abspath(__file__), '--torch-worker', name]
    command += ['--batch', str(arguments.batch)]
    command += [] if arguments.compile else ['--no-compile']
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | HELD
    ) as process:
        facts = json.loads(process.stdout.readline())

        def ask(kind: str) -> float:
            process.stdin.write(kind + '\n')
            process.stdin.flush()
            return float(process.stdout.readline())

        measures = {kind: lambda kind=kind: ask(kind) for kind in facts.pop('kinds')}
        yield measures, facts
        process.stdin.close()


def serve_torch(case: Case, batch: int, compiling: bool) -> None:
    """Facts on the first line; then, for each line read, the milliseconds of one such call."""
    import torch
    from torch import nn
    from torch.nn import functional
    import torch_networks

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)

    def build() -> nn.Module:
        network = torch_networks.build(case.name, case.image[-1], NUM_CLASSES, **case.arguments)
        return network.to(memory_format=torch.channels_last)

    teacher = build().eval()
    height, width, channels = case.image
    images = torch.randn(batch, channels, height, width).to(memory_format=torch.channels_last)
    labels = torch.arange(batch) % NUM_CLASSES

    def hard(logits: Any) -> Any:
        return functional.cross_entropy(logits, labels)

    def soft(teacher: nn.Module) -> Callable[[Any], Any]:
        def loss(logits: Any) -> Any:
            with torch.no_grad():
                taught = functional.log_softmax(teacher(images) / TEMPERATURE, 1)
            student = functional.log_softmax(logits / TEMPERATURE, 1)
            divergence = functional.kl_div(student, taught, reduction='batchmean', log_target=True)
            return (1 - ALPHA) * hard(logits) + ALPHA * TEMPERATURE**2 * divergence

        return loss

    def training(network: nn.Module, loss: Callable[[Any], Any]) -> Measure:
        optimizer = torch.optim.SGD(
            network.parameters(), LEARNING_RATE, MOMENTUM, 0, WEIGHT_DECAY, nesterov=True
        )
        network.train()

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss(network(images)).backward()
            optimizer.step()

        return timed(step)

    def inference(network: nn.Module) -> Measure:
        network.eval()

        def forward() -> None:
            with torch.inference_mode():
                network(images)

        return timed(forward)

    measures: dict[str, Measure] = {}
    for suffix, form in (('', lambda n: n), (', compiled', torch.compile))[: 1 + compiling]:
        measures[f'train{suffix}'] = training(form(build()), hard)
        measures[f'distil{suffix}'] = training(form(build()), soft(form(teacher)))
        measures[f'inference{suffix}'] = inference(form(build()))
    seconds = {}
    for kind, measure in measures.items():  # the first call compiles, the second pays for memory
        seconds[kind] = round(measure() / 1e3, 1)
        measure()
    facts = {
        'parameters': sum(p.numel() for p in teacher.parameters()),
        'first_call_seconds': seconds,
        'threads': torch.get_num_threads(),
        'versions': {'torch': torch.__version__},
        'kinds': list(measures),
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        print(measures[line.strip()](), flush=True)


if __name__ == '__main__':
    main()
