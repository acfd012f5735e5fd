"""What learning a structure costs in training time.

    python benchmarks/overhead.py [--repeats 60] [--images 15000] [--out FILE]

Steps, on digits with configs/mbv2.py's network: of distillation, of the search (penalty, controller
and all, nothing cut), of plain training, and of the teacher's forward pass alone, taking turns, as
medians. A turn is as many steps as the config's search makes from one round of control to the next.

Stages, with configs/mbv2.py:fashion_mnist on a part of its training images: search and distillation
at half of the multiply-adds against training the teacher once more for as many epochs. They are
processes of their own that take turns of some seconds, one stopped while the other runs, so that a
machine whose speed changes is as fast for both. All that a stage does counts: compilation,
validation, checkpoints, the teacher's forward pass. The data set has to be prepared (see the
README).
"""

from __future__ import annotations

import argparse
import multiprocessing
from multiprocessing import connection
import os
import pathlib
import shutil
import signal
import statistics
import tempfile
import time
from typing import Any

import jax
import machine
import numpy as np

from configs import mbv2
from jaxkd import cpu, data, loop, pipeline, train
from jaxkd import mesh as meshes
from jaxkd import plan as planning
from jaxkd.search import learn, penalty

# Seconds of a turn.
TURN = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=60)
    parser.add_argument('--stages', action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument('--images', type=int, default=15_000, help='that the stages train on')
    results = pathlib.Path(__file__).parent / 'results' / 'overhead.json'
    parser.add_argument('--out', type=pathlib.Path, default=results)
    arguments = parser.parse_args()
    cpu.hold_memory()
    report: dict[str, Any] = {
        **machine.about(),
        'milliseconds': steps(mbv2.get_config(), arguments.repeats),
    }
    medians = report['milliseconds']
    report['search step / distillation step'] = round(medians['search'] / medians['distil'], 3)
    if arguments.stages:
        config = mbv2.get_config('fashion_mnist')
        config.data.labels = report['images'] = arguments.images
        report['seconds'] = seconds = stages(config)
        ratio = (seconds['search'] + seconds['distil']) / seconds['plain']
        report['search + distillation / plain'] = round(ratio, 3)
    machine.write_report(arguments.out, report)
    for name, value in report.items():
        print(f'{name}: {value}')


def steps(config: Any, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step of each kind, at full width."""
    plan = planning.make_plan(config)
    mesh = meshes.make_mesh()
    learning = data.load(config.data.name, 'train', seed=0)
    examples = train.put(learning, mesh)
    mean, std = data.statistics(learning)
    views = train.Preprocessing(mean, std, config.data.padding, False)
    batch = next(iter(train.batches(examples, 64, mesh, seed=0, start=0, stop=1)))
    image = np.zeros(plan.graph.inputs[0].shape, np.float32)
    variables = meshes.replicate(
        jax.jit(plan.model.init, static_argnames='train')(jax.random.key(0), image, train=False),
        mesh,
    )
    length = loop.length(config, 'search', learning.size)
    course = learn.course(plan.graph, steps=length, learning_rate=0.02, **config.budget)
    body = learn.body(course, plan.graph.keep_all())
    paid = penalty.proximal(body.gates, 0.02)
    memory = learn.first(body, variables['params'])
    soft = pipeline._soft_loss(0.9, 4.0)
    kinds = {
        'distil': ((), soft, plan.model),
        'search': ((paid,), soft, plan.model),
        'plain': ((), train.hard_loss(0.0), None),
    }
    runs = {}
    for name, (after, loss, teacher) in kinds.items():
        tx = train.optimizer(config.search, 0.02, *after)
        step = train.make_train_step(
            plan.model, tx, loss, views, mesh, seed=0, ema_decay=0.95, teacher=teacher
        )
        state = meshes.replicate(train.create_state(variables, tx), mesh)
        runs[name] = [step, state, variables if teacher else {}]
    forward = train.make_eval_step(plan.model, views, mesh)
    valid = np.ones(64, bool)
    taken: dict[str, list[float]] = {name: [] for name in (*runs, "teacher's forward pass")}
    for number in range(repeats + 2):
        turn = range(number * course.period, (number + 1) * course.period)
        for name, (step, _, taught) in runs.items():
            start = time.perf_counter()
            for i in turn:
                extra, state = {}, runs[name][1]
                if name == 'search':
                    memory = learn.press(body, i, state.params, memory)
                    extra = {'strength': learn.strength(body, memory)}
                runs[name][1], metrics = step(state, batch, taught, extra)
            jax.block_until_ready((runs[name][1], metrics))
            taken[name].append((time.perf_counter() - start) / len(turn))
        start = time.perf_counter()
        jax.block_until_ready(forward(variables, batch, valid))
        taken["teacher's forward pass"].append(time.perf_counter() - start)
    return {name: round(1000 * statistics.median(times[2:]), 2) for name, times in taken.items()}


def stages(config: Any) -> dict[str, float]:
    """Seconds of plain training, search and distillation; see the top."""
    config.teacher.epochs = config.search.epochs + config.distil.epochs
    with tempfile.TemporaryDirectory() as name:
        first, again, compact = (
            pathlib.Path(name) / part for part in ('first', 'again', 'compact')
        )
        _in_turns(config, {first: ['plain']})
        shutil.copytree(first / 'teacher', compact / 'teacher')
        return _in_turns(config, {again: ['plain'], compact: ['search', 'distil']})


def _in_turns(config: Any, works: dict[pathlib.Path, list[str]]) -> dict[str, float]:
    """Trains in several workdirs, one process at a time; the seconds that each stage had."""
    context = multiprocessing.get_context('spawn')
    processes, left = {}, {}
    seconds = dict.fromkeys((name for names in works.values() for name in names), 0.0)
    try:
        for folder, names in works.items():
            here, there = context.Pipe(duplex=False)
            processes[here] = context.Process(target=_train, args=(config, folder, names, there))
            processes[here].start()
            there.close()
            left[here] = list(names)
            here.recv()  # it is ready, and will stop
            os.waitpid(processes[here].pid, os.WUNTRACED)
        while left:
            for here, names in list(left.items()):
                os.kill(processes[here].pid, signal.SIGCONT)
                began = time.perf_counter()
                end = began + TURN
                while names and began < end:
                    done = here.poll(end - began)
                    now = time.perf_counter()
                    seconds[names[0]] += now - began
                    began = now
                    if done and here.recv() == names[0]:
                        del names[0]
                if names:
                    os.kill(processes[here].pid, signal.SIGSTOP)
                else:
                    processes[here].join()
                    del left[here]
    finally:
        for here in left:
            processes[here].kill()
    return {name: round(taken, 1) for name, taken in seconds.items()}


def _train(
    config: Any, workdir: pathlib.Path, names: list[str], there: connection.Connection
) -> None:
    """Plain training, or search and distillation; says so when one of them is done."""
    plan = planning.make_plan(config)
    with pipeline.prepared(config, workdir, plan) as setup:
        teacher = None if names == ['plain'] else pipeline.learn_teacher(setup, plan)
        there.send('ready')
        os.kill(os.getpid(), signal.SIGSTOP)
        if teacher is None:
            pipeline.learn_teacher(setup, plan)
            there.send('plain')
            return
        found, _ = pipeline.find_structure(setup, plan, teacher)
        there.send('search')
        pipeline.distil(setup, plan, teacher, found)
        there.send('distil')


if __name__ == '__main__':
    main()
