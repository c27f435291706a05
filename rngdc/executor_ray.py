"""Tasks on a Ray cluster. Its nodes need Python and this project's dependencies; the source of the compiler is sent."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ir.errors import Problem, UserError
from rngdc.cache import compiler_digest
from rngdc.executor import Failure, Finished, Listeners, failure_of
from rngdc.memory import peak_memory_bytes
from rngdc.tasks import Task

PACKAGES = ("ir", "passes", "backend_rngd", "frontend", "runtime_sim", "rngdc")
CONNECT_SECONDS = 20


class RayExecutor:
    """Tasks run as tasks of a Ray cluster, at most as many at a time as workers were asked for."""

    def __init__(self, address: str | None = None) -> None:
        """`address`: as `ray.init` takes it; without, `RAY_ADDRESS`, else a cluster that is begun on this machine.

        Raises UserError if Ray is missing or there is no cluster at the address.
        """
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            fix = "pip install 'rngdc[ray]', or use --executor local"
            raise UserError([Problem("--executor ray", f"Ray cannot be imported: {error}", fix)]) from error
        self._stopped = False
        self._address = address
        self._running: list[Any] = []
        self._own = False

    def __enter__(self) -> RayExecutor:
        ray = self._ray
        if ray.is_initialized():
            return self
        root = Path(__file__).resolve().parent.parent
        environment = {
            "py_modules": [str(root / name) for name in PACKAGES],
            "env_vars": {"OMP_NUM_THREADS": "1"},
            "excludes": ["**/__pycache__"],
        }
        try:
            ray.init(
                address=self._address, runtime_env=environment, log_to_driver=False, logging_level="ERROR",
                configure_logging=True, include_dashboard=False if self._address is None else None,
            )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            fix = "begin one with `ray start --head`, and give its address with --ray-address HOST:6379"
            what = f"no Ray cluster at {self._address or 'RAY_ADDRESS'}"
            raise UserError([Problem(what, why, fix)]) from error
        self._own = True
        return self

    def __exit__(self, kind: Any, error: Any, tb: Any) -> None:
        for reference in self._running:
            with contextlib.suppress(Exception):  # it may have ended, or its node is gone
                self._ray.cancel(reference, force=True)
        if self._own:
            self._ray.shutdown()

    def stop(self) -> None:
        """Begin no further task."""
        self._stopped = True

    def run(self, tasks: Sequence[Task], workers: int, listeners: Listeners) -> Iterator[Finished]:
        """Do the tasks, the longest first; several nodes take their share."""
        ray = self._ray
        remote = ray.remote(_do).options(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")
        digest = compiler_digest()
        waiting = sorted(range(len(tasks)), key=lambda i: tasks[i].weight)
        running: dict[Any, int] = {}
        self._stopped = False
        while True:
            while waiting and len(running) < workers and not self._stopped:
                index = waiting.pop()
                listeners.start(tasks[index])
                running[remote.remote(tasks[index], digest)] = index
                self._running = list(running)
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1)
            for reference in ready:
                index = running.pop(reference)
                self._running = list(running)
                try:
                    outcome, memory = ray.get(reference)
                except ray.exceptions.RayError as error:
                    text = " ".join(str(error).split())[:300]
                    outcome, memory = Failure(f"the worker process died: {text}", str(error)), 0
                yield Finished(index, outcome, memory)


def _do(task: Task, digest: str) -> tuple[Any, int]:
    """On a node: do a task. A node whose compiler is another one refuses."""
    from rngdc.tasks import without_collections

    if (own := compiler_digest()) != digest:
        text = f"this node has another compiler ({own[:12]}, not {digest[:12]}): install the same version everywhere"
        return Failure(text, text), 0
    try:
        with without_collections():
            outcome: Any = task.run(lambda _: None).plain()
    except Exception as error:
        outcome = failure_of(error)
    return outcome, peak_memory_bytes()
