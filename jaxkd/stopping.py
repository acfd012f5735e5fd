"""Signals that ask a run to stop: the step under way is finished and saved, then the run ends.

    stops = Requests()
    with stops.listening('runs/digits'):
        for step in range(1000):
            ...                # until the first `hold`, a signal ends the process at once
            stops.hold()       # from here on it waits, because there is something to save
            if stops.asked:
                save()
                raise stops.stopped('after step 7')
        stops.release()        # whoever asked meanwhile is heard here

A second signal ends the process at once, and whatever lies on disk then is whole. The process ends
with 128 plus the signal's number, as a shell would say it: 130 for SIGINT, 143 for SIGTERM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import socket
import sys
import threading

from jaxkd import errors

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = '\x1b[?25h'


class Requests:
    """What has been asked for. Outside of `listening` nothing ever is.

    Attributes:
      asked: the signal that asked to stop, or None.
      begun: whether there has been something to save, now or in a run that this one goes on with.
    """

    # A class, because a thread and the training loop share it.

    def __init__(self):
        self.asked: signal.Signals | None = None
        self.begun = False
        self._holding = False
        self._lock = threading.Lock()

    def hold(self) -> None:
        """From now on the first signal waits for `asked` to be looked at."""
        with self._lock:
            self.begun = self._holding = True

    def release(self, anywhere: Callable[[bool], bool] = bool) -> None:
        """From now on a signal ends the process; raises Stopped if one has been waiting.

        `anywhere` tells of several processes whether one has in any of them.
        """
        with self._lock:
            self._holding = False
        if anywhere(self.asked is not None):
            raise self.stopped('at the end of a stage')

    def stopped(self, where: str) -> errors.Stopped:
        """The exception to raise for what was asked."""
        # Of several processes, another one may have been asked.
        asked = self.asked or signal.SIGTERM
        return errors.Stopped(f'stopped by {asked.name} {where}', asked)

    @contextlib.contextmanager
    def listening(self, workdir: str) -> Iterator[None]:
        """Heeds the signals, in the main thread alone; those that are ignored stay ignored."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]
        # Python runs its handlers between two instructions of the main thread, and that may be a
        # minute inside XLA's compiler. So they do nothing, and a thread reads which signals came.
        mine, pythons = socket.socketpair()
        pythons.setblocking(False)
        wakeup = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
        for number in heeded:
            signal.signal(number, lambda *_: None)
        thread = threading.Thread(target=self._listen, args=(mine, workdir), daemon=True)
        thread.start()

        def leave() -> None:
            if signal.set_wakeup_fd(wakeup) == pythons.fileno():
                for number in heeded:
                    signal.signal(number, before[number])

        # What ends a forked worker is no request to its parent.
        os.register_at_fork(after_in_child=lambda: pythons.fileno() >= 0 and leave())
        try:
            yield
        finally:
            leave()
            pythons.close()
            thread.join()
            mine.close()

    def _listen(self, signals: socket.socket, workdir: str) -> None:
        while number := signals.recv(1):
            if number[0] in SIGNALS:
                self._heed(signal.Signals(number[0]), workdir)

    def _heed(self, number: signal.Signals, workdir: str) -> None:
        with self._lock:
            waits = self._holding and self.asked is None
            self.asked = self.asked or number
        if waits:
            print(
                f'jaxkd: {number.name}: this step is finished and saved; once more ends at once',
                file=sys.stderr,
                flush=True,
            )
            return
        if sys.__stderr__.isatty():
            sys.__stderr__.write(_SHOW_CURSOR)
        print(sentence(workdir), file=sys.__stderr__, flush=True)
        os._exit(status(number))


def status(number: int) -> int:
    """What a process ends with that a signal has stopped."""
    return 128 + number


def sentence(workdir: str) -> str:
    return f'jaxkd: stopped; the same command goes on from {workdir}'
