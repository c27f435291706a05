"""The worker process of `executor.ProcessExecutor`: `main` does tasks until nobody wants any more."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from rngdc.memory import peak_memory_bytes

KEPT = 4
"""Buckets whose modules a pipeline builder keeps, in case it gets to compile them as well."""
_kept: dict[str, Any] = {}


def main() -> None:
    """Arguments: the connection's file descriptor, and one that reports the end of the parent."""
    connection, alive = Connection(int(sys.argv[2])), int(sys.argv[3])
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            _do(connection.recv(), connection)


def _end_with_parent(alive: int) -> None:
    """However the parent ends, its end of the pipe is closed."""
    os.read(alive, 1)
    os._exit(1)


def _do(task: Any, connection: Connection) -> None:
    from rngdc.executor import failure_of
    from rngdc.tasks import BuildTask, Built, CompileTask, without_collections

    def listen(step: str) -> None:
        connection.send(("step", step, 0))

    try:
        with without_collections():
            kept = _kept.pop(task.name, None)
            if isinstance(task, CompileTask) and kept is not None and kept.text == task.text:
                outcome: Any = task.run(listen, kept.lowered, kept.module).plain()
            else:
                outcome = task.run(listen)
                if isinstance(task, BuildTask) and isinstance(outcome, Built) and not outcome.refused:
                    _kept[task.name] = outcome
                    while len(_kept) > KEPT:
                        del _kept[next(iter(_kept))]
                outcome = outcome.plain()
    except Exception as error:
        outcome = failure_of(error)
    connection.send(("done", outcome, peak_memory_bytes()))
