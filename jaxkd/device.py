"""The machine that computations run on: its name, what is kept of it, what it has used."""

from __future__ import annotations

from collections.abc import Callable
import functools
import os
import pathlib
import platform
import re
import time
from typing import Any

import jax
import psutil

# Compiled programs that are kept on disk at most, in bytes; the longest unused go first.
COMPILED_BYTES = 2 * 1024**3
# What JAX reports of a program: lowering it, and compiling it or reading it from disk.
_COMPILING = (
    '/jax/core/compile/jaxpr_to_mlir_module_duration',
    '/jax/core/compile/backend_compile_duration',
)


@functools.cache
def processor() -> str:
    """The processor's name."""
    try:
        found = re.search(r'model name\s*:\s*(.*)', pathlib.Path('/proc/cpuinfo').read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def cache_folder() -> pathlib.Path:
    """Where things that take long to find out are kept: `$JAXKD_CACHE`, or `~/.cache/jaxkd`."""
    return pathlib.Path(os.environ.get('JAXKD_CACHE') or pathlib.Path.home() / '.cache' / 'jaxkd')


def keep_compiled() -> None:
    """Keeps compiled programs from one run to the next, in `cache_folder()`.

    Call it before the first computation. `$JAX_COMPILATION_CACHE_DIR` names another folder, and
    `JAX_ENABLE_COMPILATION_CACHE=false` keeps none.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    # JAX does not tell processors apart, and programs use the instructions of theirs.
    folder = cache_folder() / re.sub(r'[^\w.]+', '-', f'compiled {processor()}')
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: nothing but time is lost
        return
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_compilation_cache_max_size', COMPILED_BYTES)


def missing() -> str | None:
    """What to do where JAX has no device to compute on; None where it has one."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that it found one
        asked = os.environ.get('JAX_PLATFORMS', '')
        return (
            f'JAX has no device for JAX_PLATFORMS={asked!r}'
            + (f': {" ".join(str(error).split())}' if str(error) else '')
            + '; unset it, or install JAX for that device, such as jax[cuda13] or jax[tpu]'
        )
    return None


def jit_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` of what runs once: compiled in a third of the time on a CPU, to run slower there.

    The results are those of `jax.jit`, to rounding.
    """
    fast = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
    return jax.jit(function, compiler_options=fast)


def memory() -> int:
    """The most bytes that a device has used at a time, or where it does not say so (a CPU does
    not), the bytes of main memory that this process has now."""
    used = [(d.memory_stats() or {}).get('peak_bytes_in_use') for d in jax.local_devices()]
    known = [count for count in used if count is not None]
    return max(known) if known else psutil.Process().memory_info().rss


def seconds_running() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


def compile_seconds() -> float:
    """Seconds that this process has spent on compiling (or on reading what was compiled before),
    since this was first asked for."""
    return _compiling()[0]


@functools.cache
def _compiling() -> list[float]:
    total = [0.0]

    def add(event: str, seconds: float, **_) -> None:
        if event in _COMPILING:
            total[0] += seconds

    jax.monitoring.register_event_duration_secs_listener(add)
    return total
