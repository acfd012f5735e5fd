"""The exceptions of jaxkd: one sentence each, written for the person who has to act on it."""

from __future__ import annotations

from collections.abc import Iterable
import difflib
import math
import numbers
import os
from typing import Any


class JaxkdError(Exception):
    """Parent of every error that jaxkd raises on purpose; `str(error)` is one sentence."""


class GraphError(JaxkdError):
    """A network that cannot be traced or cut as asked; names the primitive and the layer."""


class BudgetError(JaxkdError, ValueError):
    """A budget that cannot be met; says what was asked, what is reachable, and what stands in the
    way."""


class ConfigError(JaxkdError, ValueError):
    """A setting or an argument that cannot be used; says which one and what would be right.

    >>> print(ConfigError('data.name', 'mnist3', allowed=['digits', 'fashion_mnist']))
    data.name is 'mnist3', which is not one of digits, fashion_mnist; did you mean fashion_mnist?
    >>> print(ConfigError('data.validation', 1.5, why='it must lie between 0 and 1'))
    data.validation is 1.5: it must lie between 0 and 1

    Args:
      field: name of the setting as its user writes it, such as `'data.name'`.
      value: the value it has.
      allowed: all values it may have, where they can be listed. The closest one is suggested.
      why: otherwise, what is wrong with the value and what to do.
    """

    def __init__(
        self,
        field: str,
        value: Any,
        *,
        allowed: Iterable[Any] | None = None,
        why: str | None = None,
    ):
        # `args` holds (field, value) and the rest lives in the instance's dict, which is all that
        # pickling an exception (from a worker process, say) carries over.
        super().__init__(field, value)
        self.field = field
        self.value = value
        self.allowed = None if allowed is None else tuple(allowed)
        self.why = why

    def __str__(self) -> str:
        sentence = f'{self.field} is {self.value!r}'
        names = [str(name) for name in self.allowed or ()]
        if self.allowed is not None:
            sentence += f', which is not one of {", ".join(names)}'
        if self.why is not None:
            sentence += f': {self.why}'
        close = difflib.get_close_matches(str(self.value), names, n=1, cutoff=0.5)
        if close:
            sentence += f'; did you mean {close[0]}?'
        return sentence


class CheckpointError(JaxkdError):
    """A saved state or model that cannot be used; says where it lies and what is damaged.

    Args:
      path: the file or folder.
      what: what is wrong with it and what to do, such as `'params/Conv_0/kernel is damaged'`.
    """

    def __init__(self, path: str | os.PathLike, what: str):
        super().__init__(path, what)
        self.path = path
        self.what = what

    def __str__(self) -> str:
        return f'{os.fspath(self.path)}: {self.what}'


class ExportError(JaxkdError):
    """A network that cannot be written in a format.

    Args:
      format: such as `'onnx'`.
      why: what stands in the way.
    """

    def __init__(self, format: str, why: str):
        super().__init__(format, why)
        self.format = format
        self.why = why

    def __str__(self) -> str:
        return f'{self.format}: {self.why}'


class TrainingError(JaxkdError):
    """A training that cannot go on, such as one whose loss is no number; says where its last good
    state lies."""


class Stopped(JaxkdError):
    """A run that was asked to stop and has saved what it had reached.

    Args:
      what: where it stopped.
      signal: the number of the signal that asked.
    """

    def __init__(self, what: str, signal: int):
        super().__init__(what, signal)
        self.what = what
        self.signal = signal

    def __str__(self) -> str:
        return self.what


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number, of Python or of NumPy."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether a setting is a whole number, an int of Python or of NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def words(error: BaseException) -> str:
    """Any exception in one line.

    >>> words(ValueError('two   words'))
    'ValueError: two words'
    """
    return ' '.join(f'{type(error).__name__}: {error}'.split())
