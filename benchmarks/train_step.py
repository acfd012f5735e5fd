"""Training steps of jaxkd against PyTorch's: the same networks, batches and number format.

    python benchmarks/train_step.py --torch-python PYTHON [--cases …] [--repeats 11]

prints a table and writes benchmarks/results/train_step.json. PYTHON has torch; without it the
rest is printed.

Three kinds of steps, as jaxkd's stages make them (`jaxkd.train.make_train_step`, without
augmentation): of the teacher's training, of distillation with the network itself as the teacher,
and of the search, with penalty and control, at full width. PyTorch trains and distils; a search is
held against its distillation. Inference runs on running statistics, in float32. Both train by SGD
with Nesterov momentum and weight decay, and keep a moving average of the variables. PyTorch runs in
channels_last, as it is and by `torch.compile`; in bfloat16 by autocast. Where there is a GPU, both
run on it, for example

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.4 python benchmarks/train_step.py --dtype bfloat16 \
        --batch 256 --steps 20 --cases 'MobileNetV2 224×224×3' 'ResNet-50 224×224×3'

One call of each at a time (of --steps steps, waited for at the end), in turns, so that whatever
else the machine does falls on all of them; medians. Both processes keep the memory that they have
freed, as jaxkd.main does (`jaxkd.cpu.hold_memory`), and may use all cores. PyTorch's process is
idle (waiting for a line) while JAX is measured.

What bounds a step: `of_peak` is the share of the device's matrix products, `of_bandwidth` of its
copies (both measured before), that the step reaches. Its operations are those of the convolutions
and products (forward; twice as many backward); its bytes are those that the compiled program reads
and writes, by XLA's own count.

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
      image: height, width and channels.
      arguments: for both.
      here: for jaxkd's alone.
    """

    name: str
    image: tuple[int, int, int]
    arguments: dict[str, Any]
    here: dict[str, Any]


# PyTorch's has no dropout.
CERTAIN = {'dropout_rate': 0.0, 'drop_path_rate': 0.0}
ON_CPU = {
    'MobileNetV2 32×32×3': Case(
        'mobilenet_v2', (32, 32, 3), {'stem_stride': 1, 'strides': (1, 1, 2, 2, 1, 2, 1)}, {}
    ),
    'MobileNetV2 8×8×1': Case(
        'mobilenet_v2', (8, 8, 1), {'stem_stride': 1, 'strides': (1, 1, 2, 1, 1, 2, 1)}, {}
    ),
    'ResNet-18 64×64×3': Case('resnet18', (64, 64, 3), {}, {}),
    'ResNet-50 64×64×3': Case('resnet50', (64, 64, 3), {}, {}),
    'VGG-16-BN 32×32×3': Case('vgg16_bn', (32, 32, 3), {}, {'small_images': True}),
    'EfficientNet-B0 64×64×3': Case('efficientnet_b0', (64, 64, 3), {}, CERTAIN),
}
ON_GPU = {
    'MobileNetV2 224×224×3': Case('mobilenet_v2', (224, 224, 3), {}, {}),
    'ResNet-18 224×224×3': Case('resnet18', (224, 224, 3), {}, {}),
    'ResNet-50 224×224×3': Case('resnet50', (224, 224, 3), {}, {}),
    'VGG-16-BN 224×224×3': Case('vgg16_bn', (224, 224, 3), {}, {'small_images': True}),
    'EfficientNet-B0 224×224×3': Case('efficientnet_b0', (224, 224, 3), {}, CERTAIN),
}
CASES = ON_CPU | ON_GPU
NUM_CLASSES = 10
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, EMA_DECAY = 0.05, 0.9, 5e-4, 0.99
ALPHA, TEMPERATURE = 0.5, 2.0
# Which of PyTorch's steps each of jaxkd's is held against.
AGAINST = {'train': 'train', 'distil': 'distil', 'search': 'distil', 'inference': 'inference'}
# Passes through the network, a backward one counting twice.
PASSES = {'train': 3, 'distil': 4, 'search': 4, 'inference': 1}
# What `jaxkd.cpu.hold_memory` does, for a process without jaxkd.
HELD = {
    'MALLOC_ARENA_MAX': '1',
    'MALLOC_MMAP_MAX_': '0',
    'MALLOC_TRIM_THRESHOLD_': str(2**31 - 1),
}
Measure = Callable[[], float]  # milliseconds a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--torch-python', default=sys.executable, help='a python that has torch')
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(ON_CPU))
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--kinds', nargs='+', choices=PASSES, default=list(PASSES))
    parser.add_argument('--repeats', type=int, default=11)
    parser.add_argument('--steps', type=int, default=1, help='in a measurement')
    parser.add_argument('--compile', action=argparse.BooleanOptionalAction, default=True)
    default = pathlib.Path(__file__).parent / 'results' / 'train_step.json'
    parser.add_argument('--out', type=pathlib.Path, default=default)
    parser.add_argument('--torch-worker', choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.torch_worker:
        serve_torch(CASES[arguments.torch_worker], arguments)
        return
    report: dict[str, Any] = {
        **machine.about(arguments.torch_python),
        'batch': arguments.batch,
        'dtype': arguments.dtype,
        'repeats': arguments.repeats,
        'steps': arguments.steps,
        'versions': {'python': platform.python_version()},
        'load_average_before': os.getloadavg()[0],
        'cases': {},
    }
    for name in arguments.cases:
        with torch_process(name, arguments) as ready:
            report['cases'][name] = measure_case(CASES[name], ready, arguments, report['versions'])
        machine.write_report(arguments.out, report)
        print_table(name, report['cases'][name])


def measure_case(
    case: Case,
    ready: Callable[[], tuple[dict[str, Measure], dict[str, Any]]] | None,
    arguments: argparse.Namespace,
    versions: dict[str, str],
) -> dict[str, Any]:
    """Milliseconds of all contenders, measured in turns, and their ratios."""
    measures, facts = prepare_jax(case, arguments)
    versions.update(facts.pop('versions'))
    entry: dict[str, Any] = {'jaxkd': facts}
    contenders = {('jaxkd', kind): measure for kind, measure in measures.items()}
    if ready is None:
        print('PyTorch is not importable there (--torch-python): left out.')
    else:
        asked, told = ready()
        versions.update(told.pop('versions'))
        if told['parameters'] != facts['parameters']:
            raise SystemExit(f'not the same network: {facts} and {told} parameters')
        entry['PyTorch'] = told
        contenders |= {('PyTorch', kind): measure for kind, measure in asked.items()}
    taken: dict[tuple[str, str], list[float]] = {contender: [] for contender in contenders}
    work = facts.pop('work')
    peak, bandwidth = ceilings(arguments.dtype)
    facts['peak_flop_per_s'], facts['bandwidth_bytes_per_s'] = peak, bandwidth
    for _ in range(arguments.repeats):
        for contender, measure in contenders.items():
            taken[contender].append(measure())
    medians = {contender: statistics.median(times) for contender, times in taken.items()}
    for kind, (operations, moved) in work.items():
        seconds = medians['jaxkd', kind] / 1e3
        facts.setdefault('of_peak', {})[kind] = round(operations / seconds / peak, 3)
        facts.setdefault('of_bandwidth', {})[kind] = round(moved / seconds / bandwidth, 3)
    for (side, kind), median in medians.items():
        entry[side].setdefault('median_ms', {})[kind] = round(median, 2)
        entry[side].setdefault('min_ms', {})[kind] = round(min(taken[side, kind]), 2)
    entry['ratios'] = {
        f'{kind} / {other}': round(medians['jaxkd', kind] / medians['PyTorch', other], 3)
        for kind, counterpart in AGAINST.items()
        for other in (counterpart, f'{counterpart}, compiled')
        if {('jaxkd', kind), ('PyTorch', other)} <= medians.keys()
    }
    return entry


def print_table(name: str, entry: dict[str, Any]) -> None:
    print(f'\n{name}: median ms')
    for side in ('jaxkd', 'PyTorch'):
        if side in entry:
            cells = ', '.join(f'{kind} {ms:.1f}' for kind, ms in entry[side]['median_ms'].items())
            print(f'  {side}: {cells}')
    print('  jaxkd / PyTorch: ' + ', '.join(f'{k} {v:.2f}' for k, v in entry['ratios'].items()))
    for share in ('of_peak', 'of_bandwidth'):
        cells = ', '.join(f'{kind} {value:.2f}' for kind, value in entry['jaxkd'][share].items())
        print(f'  jaxkd {share}: {cells}')


def ceilings(dtype: str) -> tuple[float, float]:
    """Floating-point operations a second of a matrix product, and bytes a second of a copy."""
    import jax
    import jax.numpy as jnp

    big = jax.default_backend() != 'cpu'
    side, size = (8192, 2**30) if big else (2048, 2**26)
    left, right = jax.random.normal(jax.random.key(0), (2, side, side), dtype)
    numbers = jnp.arange(size, dtype=jnp.float32)
    product, copied = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    seconds = []
    for call in (lambda: product(left, right), lambda: copied(numbers)):
        once = timed(call, jax.block_until_ready, 5)
        seconds.append(statistics.median(once() for _ in range(6)) / 1e3)
    return 2 * side**3 / seconds[0], 2 * numbers.nbytes / seconds[1]


def prepare_jax(
    case: Case, arguments: argparse.Namespace
) -> tuple[dict[str, Measure], dict[str, Any]]:
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
    batch = arguments.batch
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
    # An accelerator would take longer to compile this than to train with it.
    with jax.default_device(jax.devices('cpu')[0]):
        init = jax.jit(model.init, static_argnames='train')
        variables = jax.device_get(init(jax.random.key(0), image, train=False))
    variables = meshes.replicate(variables, mesh)
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
        'compile_seconds': {},
        'work': {},
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
            ema_decay=EMA_DECAY,
            teacher=teacher,
            fold=functools.partial(gating.fold, body.gates) if searches else None,
            compute_dtype=arguments.dtype,
        )
        state = meshes.replicate(train.create_state(gated if searches else variables, tx), mesh)
        memory, number = learn.first(body, gated['params']), 0
        taught = variables if teacher else {}

        def call() -> Any:
            nonlocal state, memory, number
            extra = {}
            if searches:
                memory = learn.press(body, number, state.params, memory)
                extra = {'strength': learn.strength(body, memory)}
            state, metrics = step(state, fed, taught, extra)
            number += 1
            return state, metrics

        extra = {'strength': learn.strength(body, memory)} if searches else {}
        step = compiled(kind, step, state, fed, taught, extra)
        return timed(call, jax.block_until_ready, arguments.steps)

    def compiled(kind: str, step: Any, *inputs: Any) -> Callable[..., Any]:
        start = time.perf_counter()
        program = step.lower(*inputs).compile()
        facts['compile_seconds'][kind] = round(time.perf_counter() - start, 1)
        print(f'{kind}: compiled in {facts["compile_seconds"][kind]} s', flush=True)
        operations = 2 * PASSES[kind] * batch * graph.cost().flops
        facts['work'][kind] = operations, program.cost_analysis()['bytes accessed']
        return program

    for kind in arguments.kinds:
        if kind in kinds:
            measures[kind] = measured(kind, *kinds[kind])
    valid = meshes.replicate(np.ones(batch, bool), mesh)
    forward = train.make_eval_step(model, views, mesh)
    if 'inference' in arguments.kinds:
        forward = compiled('inference', forward, variables, fed, valid)
        measures['inference'] = timed(
            lambda: forward(variables, fed, valid), jax.block_until_ready, arguments.steps
        )
    for measure in measures.values():  # the first call pays for memory
        measure()
    return measures, facts


def timed(call: Callable[[], Any], finish: Callable[[Any], object], steps: int) -> Measure:
    def measure() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            result = call()
        finish(result)
        return (time.perf_counter() - start) * 1e3 / steps

    return measure


@contextlib.contextmanager
def torch_process(
    name: str, arguments: argparse.Namespace
) -> Iterator[Callable[[], tuple[dict[str, Measure], dict[str, Any]]] | None]:
    """The PyTorch network in another process, to be waited for; None without torch.

    It compiles while JAX does.
    """
    python = arguments.torch_python
    if subprocess.run([python, '-c', 'import torch'], capture_output=True).returncode:
        yield None
        return
    command = [python, os.path.abspath(__file__), '--torch-worker', name]
    command += [f'--{name}={getattr(arguments, name)}' for name in ('batch', 'dtype', 'steps')]
    command += ['--kinds', *arguments.kinds, *([] if arguments.compile else ['--no-compile'])]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | HELD
    ) as process:

        def ask(kind: str) -> float:
            process.stdin.write(kind + '\n')
            process.stdin.flush()
            return float(process.stdout.readline())

        def ready() -> tuple[dict[str, Measure], dict[str, Any]]:
            facts = json.loads(process.stdout.readline())
            return {kind: functools.partial(ask, kind) for kind in facts.pop('kinds')}, facts

        yield ready
        process.stdin.close()


def serve_torch(case: Case, arguments: argparse.Namespace) -> None:
    """Facts on the first line; then, for each line read, the milliseconds of one such call."""
    import torch
    from torch import nn
    from torch.nn import functional
    import torch_networks

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    # As XLA does by default on such a device.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    batch = arguments.batch
    reduced = torch.autocast(device, torch.bfloat16, enabled=arguments.dtype == 'bfloat16')

    def build() -> nn.Module:
        network = torch_networks.build(case.name, case.image[-1], NUM_CLASSES, **case.arguments)
        return network.to(device, memory_format=torch.channels_last)

    teacher = build().eval()
    height, width, channels = case.image
    images = torch.randn(batch, channels, height, width, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % NUM_CLASSES

    def finish(_: None) -> None:
        if device == 'cuda':
            torch.cuda.synchronize()

    def hard(logits: Any) -> Any:
        return functional.cross_entropy(logits, labels)

    def soft(teacher: nn.Module) -> Callable[[Any], Any]:
        def loss(logits: Any) -> Any:
            with torch.no_grad():
                taught = functional.log_softmax(teacher(images).float() / TEMPERATURE, 1)
            student = functional.log_softmax(logits / TEMPERATURE, 1)
            divergence = functional.kl_div(student, taught, reduction='batchmean', log_target=True)
            return (1 - ALPHA) * hard(logits) + ALPHA * TEMPERATURE**2 * divergence

        return loss

    def training(form: Callable[[Any], Any], loss: Callable[[Any], Any]) -> Measure:
        network = build()
        # torch.optim.swa_utils.AveragedModel waits for the GPU in every step.
        variables = [
            v for v in (*network.parameters(), *network.buffers()) if v.is_floating_point()
        ]
        averages = [variable.detach().clone() for variable in variables]
        optimizer = torch.optim.SGD(
            network.parameters(), LEARNING_RATE, MOMENTUM, 0, WEIGHT_DECAY, nesterov=True
        )
        network.train()
        forward = form(network)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with reduced:
                value = loss(forward(images).float())
            value.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, variables, 1 - EMA_DECAY)

        return timed(step, finish, arguments.steps)

    def inference(network: nn.Module) -> Measure:
        network.eval()

        def forward() -> None:
            with torch.inference_mode():
                network(images)

        return timed(forward, finish, arguments.steps)

    measures: dict[str, Measure] = {}
    for suffix, form in (('', lambda n: n), (', compiled', torch.compile))[: 1 + arguments.compile]:
        kinds = {
            'train': lambda form=form: training(form, hard),
            'distil': lambda form=form: training(form, soft(form(teacher))),
            'inference': lambda form=form: inference(form(build())),
        }
        for kind in kinds:
            if kind in map(AGAINST.get, arguments.kinds):
                measures[f'{kind}{suffix}'] = kinds[kind]()
    seconds = {}
    for kind, measure in measures.items():  # the first call compiles, the second pays for memory
        seconds[kind] = round(measure() * arguments.steps / 1e3, 1)
        measure()
        print(f'PyTorch, {kind}: first call in {seconds[kind]} s', file=sys.stderr, flush=True)
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
