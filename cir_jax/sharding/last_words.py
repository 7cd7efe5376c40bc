"""One process's error is everybody's: the others, which may wait in a collective, end with its
words.

They go through the key-value store of JAX's coordination service, which needs no devices.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from typing import Any

import jax
from jax._src import distributed  # no public name tells the others anything

KEY = "cir_jax/last_words"
LEAVING = f"{KEY}/leaving/"
PATIENCE = 5.0
"""Seconds that the others have to hear."""
HEAD_START = 1.0
"""Seconds that process 0 stays longer than the others."""
EVERY = 0.5
"""Seconds between looks."""

_mouth = threading.Lock()
"""Held by the first of this process that ends it."""


def listen() -> None:
    """Ends this process, from a thread, when another one has `say`-ed its last words."""
    client, leaving = distributed.global_state.client, threading.Event()
    if client is None:
        return
    thread = threading.Thread(target=_listen, args=(client, leaving), daemon=True)
    thread.start()

    def stop() -> None:  # a thread that is in JAX's code when Python ends aborts the process
        leaving.set()
        thread.join()

    atexit.register(stop)


def begin() -> None:
    """Before this process ends by an error. Does not return where another one was faster: its
    words end this process, whose own error comes of it."""
    if not _mouth.acquire(blocking=False):
        threading.Event().wait()


def say(message: str, status: int) -> None:
    """After `begin`: the others print `message` and exit with `status`, and so should this one.

    Returns when all have heard it, at the latest after `PATIENCE`.
    """
    client = distributed.global_state.client
    words = {"message": message, "status": status, "process": jax.process_index()}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # somebody was faster
        client.key_value_set(KEY, json.dumps(words))
    _leave(client)


def _leave(client: Any) -> None:
    """Until all know it. Process 0 goes last: JAX aborts those that outlive the service there."""
    index, count = jax.process_index(), jax.process_count()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service has ended
        client.key_value_set(f"{LEAVING}{index}", "")
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if len(client.key_value_dir_get(LEAVING)) == count:
                break
            time.sleep(0.02)
    if index == 0:
        time.sleep(HEAD_START)


def _listen(client: Any, leaving: threading.Event) -> None:
    while not leaving.wait(EVERY):
        try:
            words = json.loads(client.key_value_try_get(KEY))
            break
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):  # the service has ended
                return
    else:
        return
    if words["process"] == jax.process_index() or not _mouth.acquire(blocking=False):
        return
    print(f"\n{words['message']} (process {words['process']})", file=sys.stderr, flush=True)
    _leave(client)
    sys.stdout.flush()
    os._exit(words["status"])
