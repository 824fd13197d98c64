"""The pieces of a job on a Ray cluster: one actor a core, or a GPU where there are any, each with the model.

What comes of a piece follows from the model and the piece alone, so a worker that dies changes nothing: Ray starts
another one, which loads the model and does the piece again. Results come in the order of the pieces, as they do here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from types import TracebackType
from typing import Any

from sipit.errors import OptionError
from sipit.models import LanguageModel
from sipit.workers.here import Result, Work

_AHEAD = 2  # pieces that a worker has at once: the next one is there when one is done
# What a cluster started here is told: to report to nobody, to warn of nothing, and to give its workers a fair share of
# the machine; by itself Ray runs them at a niceness of 15, which starves them beside anything else.
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_worker_niceness": "0"}


class OnRay:
    """Workers of a Ray cluster, for as long as the context is open.

    Args:
        loader: makes the model in each worker; a function of a module, or a partial of one.
        address: of a cluster that this machine is in ("auto", "HOST:PORT"); None: one of this machine's own is started.
        n_workers: None: as many as the cluster has GPUs, or cores where it has none.

    Raises:
        OptionError: Ray is not installed, or there is no such cluster.
    """

    def __init__(
        self, loader: Callable[[], LanguageModel], address: str | None = None, *, n_workers: int | None = None
    ) -> None:
        self._loader = loader
        self._address = address or "local"
        self._n_workers = n_workers
        self._actors: list[Any] = []
        self._is_ours = False  # whether the connection is to end with the context

    def __enter__(self) -> OnRay:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            ray = _ray()
        except ImportError as error:
            raise OptionError("--ray needs the package ray; install it with pip install 'sipit[ray]'") from error
        if ray.is_initialized():  # this process is connected already: then that cluster is asked, and left as it is
            return self
        self._is_ours = True
        try:
            ray.init(
                address=self._address,
                include_dashboard=False if self._address == "local" else None,
                logging_level="ERROR",
                log_to_driver=False,
                namespace="sipit",
            )
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise OptionError(
                f"no Ray cluster answers at {self._address!r} ({first}); leave the address out to start one here"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._actors = []
        if self._is_ours:
            _ray().shutdown()

    def results(self, work: Work[Any, Result], pieces: Iterable[Any]) -> Iterator[Result]:
        ray = _ray()
        numbered = enumerate(pieces)
        under_way: dict[Any, tuple[int, int]] = {}  # answer to come → number of the piece, of who does it
        done: dict[int, Any] = {}
        n_given = 0

        def give(worker: int) -> None:
            nonlocal n_given
            for number, piece in islice(numbered, 1):
                under_way[self._actor(worker).do.remote(work, piece)] = (number, worker)
                n_given = number + 1

        for worker in [*range(self._n_there())] * _AHEAD:
            give(worker)
        number = 0
        while number < n_given:
            while number not in done:
                (ready,), _ = ray.wait(list(under_way), num_returns=1)
                finished, worker = under_way.pop(ready)
                done[finished] = ready
                give(worker)
            yield _answer(done.pop(number))
            number += 1

    def _needs(self) -> dict[str, float]:
        return {"num_gpus": 1.0} if _ray().cluster_resources().get("GPU", 0) >= 1 else {"num_cpus": 1.0}

    def _n_there(self) -> int:
        n_there = int(_ray().cluster_resources().get("GPU" if "num_gpus" in self._needs() else "CPU", 1))
        return max(1, min(self._n_workers or n_there, n_there))

    def _actor(self, worker: int) -> Any:
        """Return a worker by its number, started where there was no piece for it before."""
        if worker == len(self._actors):
            made = _ray().remote(max_restarts=-1, max_task_retries=-1, **self._needs())(_Worker)
            self._actors.append(made.remote(self._loader))
        return self._actors[worker]


class _Worker:
    """One process with the model."""

    def __init__(self, loader: Callable[[], LanguageModel]) -> None:
        self._lm = loader()

    def do(self, work: Work[Any, Result], piece: Any) -> Result:
        return work(self._lm, piece)


def _ray() -> Any:
    import ray

    return ray


def _answer(ready: Any) -> Any:
    """Return what a worker answered, or raise what it raised as it would be raised here."""
    ray = _ray()
    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Exception):
            raise cause from None
        raise
