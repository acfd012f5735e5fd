"""MobileNetV2's training step and inference on the CPU: plain Flax, jaxkd's form, PyTorch.

    python benchmarks/train_step.py --torch-python path/to/python-with-torch

prints a table and writes benchmarks/results/train_step.json. The same network, batch, optimizer
(SGD, momentum 0.9) and number format (float32) three times; BatchNorm in training mode in the
step and in inference mode in the other. PyTorch runs in channels_last. One call of each at a time,
in turns, so that whatever else the machine does falls on all of them; medians. Both processes keep
the memory that they have freed, as jaxkd.main does (`jaxkd.cpu.hold_memory`). Each framework may
use all cores that its process may: XLA:CPU does by itself, PyTorch by `torch.set_num_threads`.
PyTorch runs in a process of its own, idle (waiting for a line) while JAX is measured; without it
the rest is printed.

Plain Flax needs some ten seconds for a step of the larger case, so it has few turns.

Wall-clock times want an idle machine: PyTorch's OpenMP threads wait for each other, and suffer far
more than XLA's from a third process. On a busy machine compare processor time on one core instead:

    taskset -c 0 python benchmarks/train_step.py --clock cpu --torch-python ...
"""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import machine

CASES = {
    # name: (image shape, strides of the stages), with a stem of stride 1 and 10 classes
    '32x32x3': ((32, 32, 3), (1, 1, 2, 2, 1, 2, 1)),
    '8x8x1': ((8, 8, 1), (1, 1, 2, 1, 1, 2, 1)),
}
NUM_CLASSES = 10
LEARNING_RATE, MOMENTUM = 0.05, 0.9
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}
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
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument(
        '--clock', choices=CLOCKS, default='wall', help='cpu: processor time of all threads'
    )
    parser.add_argument('--plain-repeats', type=int, default=3, help='0 leaves plain Flax out')
    default = pathlib.Path(__file__).parent / 'results' / 'train_step.json'
    parser.add_argument('--out', type=pathlib.Path, default=default)
    parser.add_argument('--torch-worker', choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.torch_worker:
        serve_torch(arguments.torch_worker, arguments.batch, arguments.clock)
        return

    report = {
        'command': (
            f'python benchmarks/train_step.py --batch {arguments.batch} --clock {arguments.clock}'
            f' --repeats {arguments.repeats} --plain-repeats {arguments.plain_repeats}'
            f' --cases {" ".join(arguments.cases)} --torch-python PYTHON'
        ),
        'date': datetime.date.today().isoformat(),
        'device': machine.describe_device(),
        'environment': {
            name: os.environ[name]
            for name in ('XLA_FLAGS', 'GLIBC_TUNABLES', 'OMP_NUM_THREADS')
            if name in os.environ
        },
        'load_average_before': os.getloadavg()[0],
        'batch': arguments.batch,
        'clock': arguments.clock,
        'cases': {},
    }
    for case in arguments.cases:
        with contextlib.ExitStack() as stack:
            entry = measure_case(case, arguments, stack, report)
        report['cases'][case] = {'strides': CASES[case][1], 'rows': entry}
        print_table(case, arguments, entry)
    report['load_average_after'] = os.getloadavg()[0]
    machine.write_report(arguments.out, report)


def measure_case(
    case: str, arguments: argparse.Namespace, stack: contextlib.ExitStack, report: dict
) -> dict:
    """Builds every contender, then measures them in turns."""
    from jaxkd import cpu

    cpu.hold_memory()
    contenders = {}  # name: ({'train': Measure, 'inference': Measure}, facts)
    if arguments.plain_repeats:
        contenders['plain Flax'] = prepare_jax(case, arguments, contextlib.nullcontext)
    contenders['jaxkd'] = prepare_jax(case, arguments, cpu.fast_convolutions)
    torch = stack.enter_context(torch_process(case, arguments))
    if torch is None:
        print('PyTorch is not importable there (--torch-python): left out.')
    else:
        contenders['PyTorch channels_last'] = torch
    counts = {name: facts['parameters'] for name, (_, facts) in contenders.items()}
    if len(set(counts.values())) != 1:
        raise SystemExit(f'not the same network: parameter counts {counts}')
    report['versions'] = {'python': platform.python_version()}
    for _, facts in contenders.values():
        report['versions'].update(facts.pop('versions'))

    milliseconds = {name: {'train': [], 'inference': []} for name in contenders}
    for turn in range(arguments.repeats):
        for kind in ('train', 'inference'):
            for name, (measures, _) in contenders.items():
                if name != 'plain Flax' or turn < arguments.plain_repeats:
                    milliseconds[name][kind].append(measures[kind]())
    return {
        name: {
            **facts,
            **{
                kind: {
                    'median_ms': round(statistics.median(values), 2),
                    'min_ms': round(min(values), 2),
                    'repeats': len(values),
                }
                for kind, values in milliseconds[name].items()
            },
        }
        for name, (_, facts) in contenders.items()
    }


def print_table(case: str, arguments: argparse.Namespace, entry: dict) -> None:
    reference = entry['jaxkd']
    print(
        f'\nMobileNetV2, width 1, {case}, batch {arguments.batch}, float32: median ms of'
        f' {arguments.clock} time (times jaxkd)'
    )
    print(f'{"":24}{"training step":>22}{"inference":>22}{"compile, s":>14}')
    for name, row in entry.items():
        cells = ''.join(
            f'{row[kind]["median_ms"]:>13.1f}'
            f' ({row[kind]["median_ms"] / reference[kind]["median_ms"]:5.2f})'
            for kind in ('train', 'inference')
        )
        compiling = f'{row["compile_seconds"]:.1f}' if 'compile_seconds' in row else '-'
        print(f'{name:24}{cells:>44}{compiling:>14}')


def prepare_jax(
    case: str,
    arguments: argparse.Namespace,
    form: Callable[[], contextlib.AbstractContextManager],
) -> tuple[dict[str, Measure], dict]:
    """Compiled step and inference of the Flax network, traced inside `form()`."""
    import flax
    import jax
    import jax.numpy as jnp
    import optax

    from jaxkd import models

    image_shape, strides = CASES[case]
    batch, clock = arguments.batch, arguments.clock
    model = models.create('mobilenet_v2', num_classes=NUM_CLASSES, stem_stride=1, strides=strides)
    images = jax.random.normal(jax.random.key(0), (batch, *image_shape))
    labels = jnp.arange(batch) % NUM_CLASSES
    variables = jax.jit(model.init)(jax.random.key(1), images[:1])
    optimizer = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)

    def loss_of(params, batch_stats, images):
        logits, updates = model.apply(
            {'params': params, 'batch_stats': batch_stats},
            images,
            train=True,
            mutable=['batch_stats'],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updates['batch_stats']

    def step(state, images):
        params, batch_stats, optimizer_state = state
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, batch_stats), grads = gradient(params, batch_stats, images)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), batch_stats, optimizer_state), loss

    params = variables['params']
    state = (params, variables['batch_stats'], optimizer.init(params))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    # Inference keeps its own copy: the step takes over the buffers that it is given.
    frozen = jax.tree.map(jnp.copy, variables)
    with form():
        start = time.perf_counter()
        step = jax.jit(step, donate_argnums=0).lower(state, images).compile()
        compile_seconds = time.perf_counter() - start
        infer = jax.jit(model.apply).lower(frozen, images).compile()

    def train() -> None:
        nonlocal state
        state, loss = step(state, images)
        loss.block_until_ready()
        jax.block_until_ready(state)

    measures = {
        'train': timed(train, clock),
        'inference': timed(lambda: infer(frozen, images).block_until_ready(), clock),
    }
    for measure in measures.values():
        measure()  # the first call pays for memory
    versions = {'jax': jax.__version__, 'flax': flax.__version__, 'optax': optax.__version__}
    return measures, {
        'parameters': parameters,
        'compile_seconds': round(compile_seconds, 1),
        'temporary_megabytes': round(step.memory_analysis().temp_size_in_bytes / 1e6),
        'versions': versions,
    }


def timed(call: Callable[[], object], clock: str) -> Measure:
    now = CLOCKS[clock]

    def measure() -> float:
        start = now()
        call()
        return (now() - start) * 1e3

    return measure


@contextlib.contextmanager
def torch_process(
    case: str, arguments: argparse.Namespace
) -> Iterator[tuple[dict[str, Measure], dict] | None]:
    """The PyTorch network in another process; None where torch is not importable."""
    python = arguments.torch_python
    probe = subprocess.run([python, '-c', 'import torch'], capture_output=True)
    if probe.returncode:
        yield None
        return
    command = [python, os.path.abspath(__file__), '--torch-worker', case]
    command += ['--batch', str(arguments.batch), '--clock', arguments.clock]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | HELD
    ) as process:
        facts = json.loads(process.stdout.readline())

        def ask(kind: str) -> float:
            process.stdin.write(kind + '\n')
            process.stdin.flush()
            return float(process.stdout.readline())

        yield {kind: lambda kind=kind: ask(kind) for kind in ('train', 'inference')}, facts
        process.stdin.close()


def serve_torch(case: str, batch: int, clock: str) -> None:
    """Facts on the first line; then, for each line read, the milliseconds of one such call."""
    import torch
    from torch import nn

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    image_shape, strides = CASES[case]
    network = build_torch(nn, image_shape[-1], strides).to(memory_format=torch.channels_last)
    height, width, channels = image_shape
    images = torch.randn(batch, channels, height, width)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(batch) % NUM_CLASSES
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    cross_entropy = nn.CrossEntropyLoss()

    def train() -> None:
        network.train()
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(network(images), labels).backward()
        optimizer.step()

    def infer() -> None:
        network.eval()
        with torch.inference_mode():
            network(images)

    measures = {'train': timed(train, clock), 'inference': timed(infer, clock)}
    for measure in measures.values():
        measure()
        measure()
    facts = {
        'parameters': sum(p.numel() for p in network.parameters()),
        'threads': torch.get_num_threads(),
        'versions': {'torch': torch.__version__},
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        print(measures[line.strip()](), flush=True)


def build_torch(nn, channels: int, strides: tuple[int, ...]):
    """The network of jaxkd.models.mobilenet at width 1, layer for layer."""
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))

    def conv_bn(inputs, outputs, kernel=1, stride=1, groups=1, activation=True):
        layers = [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-5, momentum=0.1),
        ]
        return layers + [nn.ReLU6(inplace=True)] * activation

    class InvertedResidual(nn.Module):
        def __init__(self, inputs, outputs, expansion, stride):
            super().__init__()
            hidden = inputs * expansion
            self.residual = stride == 1 and inputs == outputs
            self.layers = nn.Sequential(
                *(conv_bn(inputs, hidden) if expansion != 1 else []),
                *conv_bn(hidden, hidden, 3, stride, groups=hidden),
                *conv_bn(hidden, outputs, activation=False),
            )

        def forward(self, x):
            y = self.layers(x)
            return x + y if self.residual else y

    layers = conv_bn(channels, 32, 3)
    inputs = 32
    for (expansion, outputs, repeats), stage_stride in zip(stages, strides, strict=True):
        for repeat in range(repeats):
            stride = stage_stride if repeat == 0 else 1
            layers.append(InvertedResidual(inputs, outputs, expansion, stride))
            inputs = outputs
    layers += conv_bn(inputs, 1280)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, NUM_CLASSES)]
    return nn.Sequential(*layers)


if __name__ == '__main__':
    main()
