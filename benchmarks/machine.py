"""What a benchmark says about the machine, and how it writes its report."""

import contextlib
import json
import os
import pathlib
import platform


def describe_device() -> str:
    """The processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                name = line.split(':', 1)[1].strip()
                break
    return f'{name}, {len(os.sched_getaffinity(0))} cores'


def write_report(path: pathlib.Path, report: dict) -> None:
    """Writes a report aside first, so that a crash leaves the last one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix('.partial')
    aside.write_text(json.dumps(report, indent=2) + '\n')
    aside.replace(path)
    print(f'wrote {path}')
