"""Signals that end a run: finish the update, save, leave with 128 + n.

Where it fits: `SavingTrainer.train` enters `StopSignals` for as long as it runs; what may be cut short stands in
`interruptible`, as everything in `rewards.failing_together` does. SIGTERM is how clusters take a machine back, SIGINT
is Ctrl-C.

What happens: the first signal lets the update end. After `GRACE_SECONDS`, or at a second signal, `Stopped` is raised
within the next interruptible block: the rollout or the waiting for rewards ends there, and what the last whole update
left is saved. Where the main thread comes to no such place, as it hangs in a collective operation or a driver, the
process ends `HANG_SECONDS` later. Gotchas: Python runs handlers in the main thread only, so in another one nothing is
installed; handlers that the user has set, and ignored signals, stay as they are.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

GRACE_SECONDS = 10.0
"""Clusters kill 30 seconds after SIGTERM, and saving takes some of them."""
HANG_SECONDS = 60.0
EXIT_SECONDS = 5.0
"""For threads of rewards that still wait for somebody when the interpreter leaves."""
SAME_SECONDS = 0.5
"""A launcher hands on the signal that the terminal or the cluster has sent to every process."""


class Stopped(SystemExit):
    """A signal ended the run; uncaught, the process leaves with 128 + its number and without a traceback."""

    def __init__(self, name: str) -> None:
        self.signal = signal.Signals[name]
        super().__init__(128 + self.signal)

    def __str__(self) -> str:
        return self.signal.name


class Interrupted(Stopped, KeyboardInterrupt):
    """The same for SIGINT, which `except KeyboardInterrupt` catches."""


def stopped(number: int) -> Stopped:
    """The exception of a signal."""
    return (Interrupted if number == signal.SIGINT else Stopped)(signal.Signals(number).name)


class StopSignals:
    """Takes SIGTERM and SIGINT while it is entered.

    Attributes:
        number: the signal that came first; 0 until then.
        overdue: whether to stop wherever it is possible, rather than after the update.
    """

    active: "StopSignals | None" = None

    def __init__(self) -> None:
        self.number, self.overdue = 0, False
        self._since, self._interruptible, self._raised = 0.0, False, False
        self._reacted = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = signal.getsignal(number)
                if previous in (signal.SIG_DFL, signal.default_int_handler):
                    self._previous[number] = signal.signal(number, self._receive)
        self._outer, StopSignals.active = StopSignals.active, self
        return self

    def __exit__(self, *error: object) -> None:
        StopSignals.active = self._outer
        self._reacted.set()
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def reacted(self) -> None:
        """The run is on its way out: no deadline any more, as saving takes what it takes."""
        self._interruptible, self._raised = False, True
        self._reacted.set()

    def check(self) -> None:
        """Stop here if it is time to.

        Raises:
            Stopped: once.
        """
        if self.overdue and self._interruptible and not self._raised:
            self._raised = True
            raise stopped(self.number)

    def _receive(self, number: int, frame: Any) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
            threading.Thread(target=self._watch, daemon=True).start()
        elif time.monotonic() - self._since > SAME_SECONDS:
            self.overdue = True
        self.check()

    def _watch(self) -> None:
        if self._reacted.wait(GRACE_SECONDS):
            return
        self.overdue = True
        main = threading.main_thread().ident
        if main is not None and hasattr(signal, "pthread_kill"):
            signal.pthread_kill(main, self.number)  # ends a wait for a lock, so that the handler runs
        if not self._reacted.wait(HANG_SECONDS):
            name = signal.Signals(self.number).name
            print(f"\n{name}: the update hangs; left without a new checkpoint, earlier ones are whole", file=sys.stderr)
            _leave(128 + self.number)


@contextmanager
def interruptible() -> Iterator[None]:
    """What stands in it ends with `Stopped` when a run must stop at once; it must leave weights and optimizer alone."""
    active = StopSignals.active
    if active is None:
        yield
        return
    before, active._interruptible = active._interruptible, True
    try:
        active.check()
        yield
    finally:
        active._interruptible = before


def leave_in_time(code: int) -> None:
    """Let the interpreter end in `EXIT_SECONDS`, once it ends, also where a thread of a pool hangs.

    Without it Python waits for such threads as long as they take, whatever the exit status was to be.
    """
    ending = threading.Event()

    def watch() -> None:
        ending.wait()
        time.sleep(EXIT_SECONDS)
        _leave(code)

    register = getattr(threading, "_register_atexit", None)  # called before the threads are waited for, unlike atexit
    if register is not None:
        threading.Thread(target=watch, daemon=True).start()
        register(ending.set)


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
