"""How the binaries end that did not get to the end: in one sentence, with nothing half-written.

Ctrl-C and SIGTERM: exit status 130 and 143; in the training loop they save first
(`cir_jax.training.loop`). A disk that is full or fails: 2, as for all that a user can mend.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

from cir_jax.storage import faults

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}

_doing, _kept = "starting", "nothing was written"


class Failed(Exception):
    """str() is what a user can mend: exit status 2, for all processes of a run."""


class _Stopped(KeyboardInterrupt):
    """Unwinds the program, so that scratch files go and threads end."""


def phase(doing: str, kept: str) -> None:
    """Says what the program does from now on, and what stays if it is stopped meanwhile."""
    global _doing, _kept
    _doing, _kept = doing, kept


def run(main: Callable[[], None]) -> None:
    """main(), which a signal ends with a sentence. A second Ctrl-C leaves at once."""
    with _leaving_on_the_second():
        status, message = _run(main)
    if not status:
        return
    # here the frames that main left are gone, and with them the generators that hold threads
    with contextlib.suppress(OSError):  # nobody may be reading any more
        sys.stdout.flush()  # what was said before comes before it
    print(f"\n{message}", file=sys.stderr, flush=True)
    if several():
        from cir_jax.sharding import last_words

        last_words.say(message, status)
        # an orderly end would wait for the other processes, which may wait for this one
        os._exit(status)
    sys.exit(status)


def _run(main: Callable[[], None]) -> tuple[int, str]:
    """Exit status and last words of what ended main(); 0 for nothing."""
    before = {number: signal.signal(number, _stop) for number in NAMES}
    try:
        _unless_another_ended(main)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if isinstance(stop, _Stopped) else signal.SIGINT
        message = f"stopped by {NAMES[number]} while {_doing}: {_kept}. The same command continues."
        return 128 + number, message
    except Failed as error:
        return 2, f"error: {error}"
    except Exception as error:
        reason = faults.reason(error) if isinstance(error, OSError) else None
        if reason is None:
            if not several():
                raise
            traceback.print_exc()
            said = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            return 1, f"error: {said}, while {_doing}: {_kept}. The lines above say where."
        where = f"{error.filename}: " if error.filename else ""
        return 2, f"error: {where}{reason}, while {_doing}: {_kept}. Mend it, then run it again."
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0, ""


def _unless_another_ended(main: Callable[[], None]) -> None:
    try:
        main()
    except SystemExit:
        raise
    except BaseException:
        if several():
            from cir_jax.sharding import last_words

            last_words.begin()
        raise


@contextlib.contextmanager
def _leaving_on_the_second() -> Iterator[None]:
    """Ends the program on a second Ctrl-C, even where Python's handlers cannot run.

    They wait for the main thread, which may be inside a compilation for minutes; the wake-up file
    is written to when the signal comes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        count = 0
        while number := os.read(reader, 1):
            count += number[0] == signal.SIGINT
            if count > 1:
                os._exit(128 + signal.SIGINT)
        os.close(reader)

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def _stop(number: int, _: FrameType | None) -> None:
    for each in NAMES:
        signal.signal(each, signal.SIG_DFL)
    raise _Stopped(number)


def several() -> bool:
    """Whether this is one of several processes that have joined."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1
