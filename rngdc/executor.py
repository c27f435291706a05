"""Who does the tasks of a build: this process, worker processes, or a Ray cluster (`executor_ray`).

A worker gets a task, does it and sends the result; it holds no weights. One that fails or dies costs its own task only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from types import TracebackType

    from rngdc.tasks import Result, Task

WORKER = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from rngdc.executor_worker import main; main()"
STOP_SECONDS = 5.0
"""How long a worker that was told to stop may take."""


@dataclass(frozen=True)
class Failure:
    """A task that ended with a bug or with the death of its process. `what`: one line; `details`: all there is."""

    what: str
    details: str


@dataclass(frozen=True)
class Finished:
    """What became of task number `index`. `memory`: bytes at the peak of the process that did it, 0 if it was this."""

    index: int
    outcome: Result | Failure
    memory: int = 0


@dataclass
class Listeners:
    """Called as (task, ...) when a task is started, and before each of its steps."""

    start: Callable[[Task], None] = field(default=lambda _: None)
    step: Callable[[Task, str], None] = field(default=lambda _task, _step: None)


class Executor(Protocol):
    """Does tasks in any order. Used as a context manager: leaving it ends what is still running."""

    def run(self, tasks: Sequence[Task], workers: int, listeners: Listeners) -> Iterator[Finished]:
        """Do the tasks with so many at a time, and yield what became of each as soon as it is known."""
        ...

    def stop(self) -> None:
        """Begin no further task of the current run; those that have begun are finished."""
        ...

    def __enter__(self) -> Executor: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def failure_of(error: BaseException) -> Failure:
    """What is told about an exception."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return Failure(f"{type(error).__name__}: {text}", "".join(traceback.format_exception(error)))


class InlineExecutor:
    """Does the tasks one after another in this process."""

    def __init__(self) -> None:
        self._stopped = False

    def __enter__(self) -> InlineExecutor:
        return self

    def __exit__(self, kind: Any, error: Any, tb: Any) -> None:
        pass

    def stop(self) -> None:
        """Begin no further task."""
        self._stopped = True

    def run(
        self,
        tasks: Sequence[Task],
        workers: int,
        listeners: Listeners,
        do: Callable[[Task, Callable[[str], None]], Result] | None = None,
    ) -> Iterator[Finished]:
        """Do the tasks; `do` may do them with objects that this process has."""
        from rngdc.tasks import without_collections

        self._stopped = False
        for index, task in enumerate(tasks):
            if self._stopped:
                return
            listeners.start(task)

            def listen(step: str, task: Task = task) -> None:
                listeners.step(task, step)

            try:
                with without_collections():
                    outcome: Result | Failure = task.run(listen) if do is None else do(task, listen)
            except Exception as error:
                outcome = failure_of(error)
            yield Finished(index, outcome)


class _Worker:
    """A process, the connection to it, and what it is doing."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        alive, self._life = os.pipe()  # the worker ends when nobody holds the other end
        self._errors: IO[bytes] = tempfile.TemporaryFile(prefix="rngdc-worker-")  # noqa: SIM115
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORKER, json.dumps(sys.path), str(theirs.fileno()), str(alive)],
                pass_fds=(theirs.fileno(), alive), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=self._errors, env=environment, start_new_session=True,  # Ctrl-C is ours to handle
            )  # fmt: skip
        except BaseException:
            ours.close()
            os.close(self._life)
            raise
        finally:
            theirs.close()
            os.close(alive)
        self.connection = Connection(ours.detach())
        self.task: int | None = None

    def death(self) -> Failure:
        """Why the process ended."""
        status = self.process.wait()
        if status < 0:
            name = signal.Signals(-status).name
            what = f"the worker process was killed by {name}"
            if name == "SIGKILL":
                what += " (the system does this when memory runs out)"
        else:
            what = f"the worker process ended with status {status}"
        self._errors.seek(0)
        return Failure(what, self._errors.read().decode("utf-8", "replace") or what)

    def close(self) -> None:
        """End the process, if it has not ended, and forget it."""
        with contextlib.suppress(OSError):
            self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.connection.close()
        self._errors.close()
        with contextlib.suppress(OSError):
            os.close(self._life)


class ProcessExecutor:
    """Worker processes on this machine, started when there is work for them and kept for the next run."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._stopped = False
        self._did: dict[str, _Worker] = {}  # by the name of the last task

    def __enter__(self) -> ProcessExecutor:
        return self

    def __exit__(self, kind: Any, error: Any, tb: Any) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.process.terminate()
        while self._workers:
            self._workers.pop().close()

    def stop(self) -> None:
        """Begin no further task."""
        self._stopped = True

    @property
    def pids(self) -> list[int]:
        """The processes there are now."""
        return [w.process.pid for w in self._workers]

    def run(self, tasks: Sequence[Task], workers: int, listeners: Listeners) -> Iterator[Finished]:
        """Do the tasks, the longest first."""
        self._stopped = False
        waiting = sorted(range(len(tasks)), key=lambda i: tasks[i].weight)  # the longest is taken first, from the end
        for worker in self._workers[workers:]:
            worker.close()
        del self._workers[workers:]
        while True:
            for worker in [w for w in self._workers if w.task is None]:
                if waiting and not self._stopped:
                    yield from self._begin(worker, waiting, tasks, listeners)
            while waiting and not self._stopped and len(self._workers) < workers:
                self._workers.append(_Worker())
                yield from self._begin(self._workers[-1], waiting, tasks, listeners)
            busy = {w.connection: w for w in self._workers if w.task is not None}
            if not busy:
                if not waiting or self._stopped:
                    return
                continue
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                yield from self._receive(busy[connection], tasks, listeners)

    def _begin(
        self, worker: _Worker, waiting: list[int], tasks: Sequence[Task], listeners: Listeners
    ) -> Iterator[Finished]:
        # A worker may have kept what it needs for the next task of the same name.
        own = next((i for i in reversed(waiting) if self._did.get(tasks[i].name) is worker), waiting[-1])
        waiting.remove(own)
        index = worker.task = own
        listeners.start(tasks[index])
        try:
            worker.connection.send(tasks[index])
        except OSError:
            yield self._lost(worker)

    def _receive(self, worker: _Worker, tasks: Sequence[Task], listeners: Listeners) -> Iterator[Finished]:
        index = worker.task
        assert index is not None
        try:
            kind, value, memory = worker.connection.recv()
        except (EOFError, OSError):
            yield self._lost(worker)
            return
        if kind == "step":
            listeners.step(tasks[index], value)
            return
        worker.task = None
        self._did[tasks[index].name] = worker
        yield Finished(index, value, memory)

    def _lost(self, worker: _Worker) -> Finished:
        index = worker.task
        assert index is not None
        failure = worker.death()
        worker.close()
        self._workers.remove(worker)
        return Finished(index, failure)
