"""Threads for big instructions, with the BLAS library held to one thread each.

The library's own threads meet at barriers and lose an order of magnitude when another process takes a core; blocks of
an instruction handed to a pool do not.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

_inside = threading.local()


def cpus() -> int:
    """Processors this process may use; the variable OMP_NUM_THREADS lowers it."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(available, int(wanted)) if wanted.isdigit() and int(wanted) > 0 else available


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cpus(), "rngd-sim")


@cache
def _blas_controls() -> tuple[Callable[[int], Any], Callable[[], int]] | None:
    """(set, get) of the number of threads of numpy's OpenBLAS; None for another BLAS library."""
    folder = Path(np.__file__).parent
    for file in sorted([*folder.parent.glob("numpy.libs/*openblas*"), *folder.glob(".dylibs/*openblas*")]):
        try:
            library = ctypes.CDLL(str(file))
        except OSError:
            continue
        for prefix, suffix in (
            ("scipy_openblas", "64_"),
            ("openblas", "64_"),
            ("scipy_openblas", ""),
            ("openblas", ""),
        ):
            try:
                return (
                    getattr(library, f"{prefix}_set_num_threads{suffix}"),
                    getattr(library, f"{prefix}_get_num_threads{suffix}"),
                )
            except AttributeError:
                continue
    return None


@contextmanager
def single_threaded_blas() -> Generator[None]:
    """Hold BLAS to one thread inside the block, if numpy's BLAS can be controlled."""
    controls = _blas_controls()
    if controls is None:
        yield
        return
    change, get = controls
    before = get()
    change(1)
    try:
        yield
    finally:
        change(before)


def parallel() -> bool:
    """Whether splitting work pays: several processors, a controllable BLAS, and not already in a worker."""
    return cpus() > 1 and _blas_controls() is not None and not getattr(_inside, "worker", False)


def run_all(task: Callable[[Any], None], parts: Sequence[Any]) -> None:
    """`task(part)` for every part, on the pool; raises the first exception."""

    def work(part: Any) -> None:
        _inside.worker = True
        with np.errstate(all="ignore"):
            task(part)

    for _ in _pool().map(work, parts):
        pass
