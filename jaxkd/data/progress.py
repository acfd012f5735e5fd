"""Telling how far a long preparation is."""

from __future__ import annotations

import sys
import time


class Progress:
    """A line on stderr about work of more than a few seconds; a silent one is never shown."""

    def __init__(self, what: str, total: int, after: float = 2.0):
        self.what, self.total = what, total
        self.live = sys.stderr.isatty()
        self.start = time.monotonic()
        self.next = self.start + after
        self.shown = False

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now < self.next:
            return
        self.shown = True
        self.next = now + (0.2 if self.live else 10.0)
        line = f'{self.what}: {done:,}/{self.total:,}'
        if now - self.start > 1:  # before, it would be a guess
            line += f', {(now - self.start) * (self.total - done) / done:.0f} s left'
        print(
            f'\r{line:<79}' if self.live else line, end='' if self.live else '\n', file=sys.stderr
        )
        sys.stderr.flush()

    def close(self) -> None:
        if self.shown and self.live:
            print(f'\r{"":<79}\r', end='', file=sys.stderr)
