"""What a benchmark says about itself and the machine, and how it writes its report."""

from collections.abc import Iterator, Mapping
import contextlib
import json
import os
import pathlib
import platform
import queue
import shutil
import subprocess
import sys
import time


def describe_device() -> str:
    """The processor's name and the number of cores this process may use; before it the GPUs'."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                name = line.split(':', 1)[1].strip()
                break
    gpus = []
    if shutil.which('nvidia-smi'):
        ask = ['nvidia-smi', '--query-gpu=name', '--format=csv,noheader']
        gpus = subprocess.run(ask, capture_output=True, text=True).stdout.splitlines()
    return ', '.join([*gpus, name, f'{len(os.sched_getaffinity(0))} cores'])


def about(torch_python: str | None = None) -> dict[str, str]:
    """What a report begins with: how, when and where it was made.

    The path of an interpreter with torch says nothing to anybody else: PYTHON stands for it.
    """
    command = ' '.join(['python', *sys.argv])
    return {
        'command': command.replace(torch_python, 'PYTHON') if torch_python else command,
        'date': time.strftime('%Y-%m-%d'),
        'device': describe_device(),
    }


def compile_once(folder: pathlib.Path) -> dict[str, str]:
    """The environment in which compiled programs are kept in a folder from run to run."""
    return {
        'JAX_COMPILATION_CACHE_DIR': str(folder.absolute()),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1',
    }


@contextlib.contextmanager
def own_cores(free: queue.Queue[list[int]]) -> Iterator[list[int]]:
    """Cores of `shared_cores` for one run, given back at its end."""
    cores = free.get()
    try:
        yield cores
    finally:
        free.put(cores)


def shared_cores(jobs: int) -> queue.Queue[list[int]]:
    """The cores of this process, dealt out to so many runs at a time.

    Where a GPU computes they compile and wait, and each may have them all.
    """
    cores = sorted(os.sched_getaffinity(0))
    free: queue.Queue[list[int]] = queue.Queue()
    for job in range(jobs):
        free.put(cores if shutil.which('nvidia-smi') else cores[job::jobs] or cores)
    return free


def run(command: list[str], cores: list[int], environment: Mapping[str, str]) -> None:
    """Runs a command on these cores.

    Raises:
      RuntimeError: with what it said last, where it fails.
    """
    done = subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f'status {done.returncode}']
        raise RuntimeError(f'{" ".join(command)}: {said[-1]}')


def write_report(path: pathlib.Path, report: dict) -> None:
    """Writes a report aside first, so that a crash leaves the last one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'.{path.name}.{os.getpid()}')
    aside.write_text(json.dumps(report, indent=2) + '\n')
    aside.replace(path)
    print(f'wrote {path}')
