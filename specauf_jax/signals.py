"""Signals heard at once: a thread reads them also while the main thread imports, compiles or waits."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

INTERRUPTED = 130
_GRACE_S = 3.0
_heard: dict[int, Callable[[], None]] = {}


@contextlib.contextmanager
def hearing(number: signal.Signals, heard: Callable[[], None]) -> Iterator[None]:
    """Call `heard`, in a thread, whenever the signal comes; nothing of it outside the main thread, as Python has it.

    SIGTERM then does nothing else. SIGINT raises KeyboardInterrupt as ever, when the main thread is at Python again; a
    job that a shell put into the background, where it is ignored, goes on ignoring it.
    """
    ignored = number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    ears, mouth = socket.socketpair()
    mouth.setblocking(False)
    handler = signal.default_int_handler if number == signal.SIGINT else lambda *_: None
    before = signal.signal(number, handler), signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    outer, _heard[number] = _heard.get(number), heard
    threading.Thread(target=_listen, args=(ears,), daemon=True).start()
    try:
        yield
    finally:
        del _heard[number]
        if outer is not None:
            _heard[number] = outer
        signal.signal(number, before[0])
        signal.set_wakeup_fd(before[1])
        mouth.close()


def _listen(ears: socket.socket) -> None:
    with ears:
        while received := ears.recv(64):
            for number in received:
                _heard.get(number, lambda: None)()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the process within seconds, wherever it is and whoever swallows the KeyboardInterrupt.

    The first one leaves some time to tidy up, a second one none. What is being written then never appears.
    """
    timer = threading.Timer(_GRACE_S, leave, ("interrupted; the same command goes on from what was saved", INTERRUPTED))
    timer.daemon = True

    def heard():
        if timer.is_alive():
            os._exit(INTERRUPTED)
        timer.start()

    with hearing(signal.SIGINT, heard):
        yield


def leave(reason: str, code: int) -> None:
    """End this process from any thread of it, whatever the others are doing."""
    try:
        print(f"specauf: {reason}", file=sys.stderr, flush=True)
    finally:  # also where nobody reads it
        os._exit(code)
