"""Learns a smaller structure for a CNN: teacher, search, compact network, distillation, report.

    python -m jaxkd.main --config=configs/mbv2.py [--workdir=DIR] [--config.FIELD=VALUE …]

The same command goes on with a run that was stopped, killed or failed. Exit status: 0 done, 1
failed on the way, 2 refused at the start, 130 stopped by SIGINT (Ctrl-C), 143 stopped by SIGTERM.
"""

from __future__ import annotations

import os
import re
import sys
import traceback

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
    'config',
    None,
    'What to do: a file such as configs/mbv2.py, with its argument after a colon '
    '(configs/mbv2.py:fashion_mnist). Any field: --config.budget.flops=0.25.',
)
_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'Where checkpoints, metrics and the report go. A stopped run goes on with the same command. '
    'Default: runs/NAME-OF-THE-DATA.',
)

_DISTRIBUTED = flags.DEFINE_bool(
    'distributed',
    False,
    'One of several processes that run together, each with the same command; process 0 writes the '
    'workdir. On Cloud TPU and under Slurm they find one another.',
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0, where processes do not find one another.'
)
_PROCESSES = flags.DEFINE_integer('processes', None, 'How many there are, with --coordinator.')
_PROCESS = flags.DEFINE_integer('process', None, 'Which of them this is, from 0 on.')
_PROFILE = flags.DEFINE_bool(
    'profile',
    False,
    "Write a profiler's trace of a few steps of each stage to profile/ in the workdir, for "
    'TensorBoard or https://ui.perfetto.dev.',
)

# Of flags whose values can be wrong, by the type that absl tells of them.
_WANTED = {
    'int': 'a whole number',
    'float': 'a number',
    'bool': 'True or False',
    'multi tuple': 'a tuple',
    'string': 'a dict, such as "{\'width\': 0.5}",',
}


def main(arguments: list[str]) -> int:
    """Runs the pipeline; the exit status, see the top."""
    if len(arguments) > 1:
        print(f'jaxkd: unexpected argument {arguments[1]!r}; flags start with --', file=sys.stderr)
        return 2
    if _CONFIG.value is None:
        print('jaxkd: say what to do, such as --config=configs/mbv2.py', file=sys.stderr)
        return 2
    absl_logging.set_verbosity(absl_logging.WARNING)
    # JAX is slow to import: not for --help.
    from jaxkd import cpu, device, errors, hosts, pipeline, stopping, watch

    cpu.hold_memory()
    device.keep_compiled()
    config = _CONFIG.value
    folder = os.path.basename(os.path.normpath(config.data.name))
    # A shell leaves the ~ of --workdir=~/run as it is.
    workdir = os.path.expanduser(_WORKDIR.value or os.path.join('runs', folder))
    whole = f'what is in {workdir} is whole, and the same command goes on from there'
    stops = stopping.Requests()
    try:
        if _DISTRIBUTED.value:
            hosts.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        for flag in (_COORDINATOR, _PROCESSES, _PROCESS):
            if flag.value is not None and not _DISTRIBUTED.value:
                why = 'it is for processes that run together: add --distributed'
                raise errors.ConfigError(f'--{flag.name}', flag.value, why=why)
        with stops.listening(workdir), hosts.one_voice():
            report = pipeline.finished(config, workdir, _say)
            if report:
                print(f'{workdir} holds a finished run:')
            else:
                report = pipeline.run(config, workdir, stops=stops, profile=_PROFILE.value)
            print(watch.compare(report))
            print(f'compact network: {os.path.join(workdir, "compact")}')
            return 0
    except errors.Stopped as error:
        status = stopping.status(error.signal)
        return hosts.leave(status, f'jaxkd: {error}; the same command goes on from {workdir}')
    except (errors.ConfigError, errors.BudgetError) as error:
        return hosts.leave(1 if stops.begun else 2, f'jaxkd: {error}')
    except errors.JaxkdError as error:
        return hosts.leave(1, f'jaxkd: {error}')
    except OSError as error:
        return hosts.leave(1, f'jaxkd: {error}; {whole}')
    except Exception:
        if sentence := device.missing():
            return hosts.leave(2, f'jaxkd: {sentence}')
        if not hosts.several():
            raise
        gone = 'one of the processes has failed, this one or one that it waits for'
        return hosts.leave(1, f'{traceback.format_exc()}jaxkd: {gone}; {whole}')


def _say(sentence: object) -> None:
    print(f'jaxkd: {sentence}', file=sys.stderr)


def _parse(arguments: list[str]) -> list[str]:
    """Parses the flags, which runs the config file; whatever is wrong with them is one sentence."""
    try:
        rest = FLAGS(arguments)
        if _CONFIG.value is not None:
            _CONFIG.value.to_dict()  # a missing file is an error only when it is used
        return rest
    except SystemExit as error:
        # After --help absl ends with 1, which is for what failed.
        asked = any(re.fullmatch(r'--?(help\w*|\?)', argument) for argument in arguments)
        sys.exit(0 if asked else error.code)
    except Exception as error:  # a config file is a program: it can raise anything
        print(f'jaxkd: {_explain(error, arguments)}', file=sys.stderr)
        sys.exit(2)


def _explain(error: BaseException, arguments: list[str]) -> str:
    """One sentence from a chain of errors."""
    chain = [error]
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
        chain.append(error)
    words = [' '.join(str(e.args[0] if len(e.args) == 1 else e).split()) for e in chain]
    if isinstance(error, KeyError | AttributeError):  # an override of a field that is not there
        field = words[-1].strip("'")
        advice = next((w[w.index('Did you mean') :] for w in words if 'Did you mean' in w), '')
        for argument in arguments:
            path = argument.lstrip('-').partition('=')[0]
            if field in path.split('.'):
                return f'--{path}: there is no field {field!r}. {advice}'.rstrip()
    refused = next((e for e in chain if isinstance(e, flags.Error)), None)
    if refused and not str(refused).startswith('flag --config='):  # which the file's error ends
        return _refused(refused)
    config = ' '.join(a for a in arguments if a.startswith('--config'))
    return f'{config}: {words[-1] or type(error).__name__}'


def _refused(error: flags.Error) -> str:
    """What absl refuses of a flag; of a value, what is wanted in its place."""
    found = re.match('flag --([^=]+)=', str(error))
    if not found:
        return str(error)
    cause = error.__cause__ or error.__context__
    given = str(error).removeprefix('flag ').removesuffix(f': {cause}')
    wanted = _WANTED.get(FLAGS[found[1]].flag_type(), 'another value')
    return f'{given}: {wanted} is wanted'


if __name__ == '__main__':
    app.run(main, flags_parser=_parse)
