"""Folders of shards on many machines, with Ray Data: each worker loads the model once and takes one shard at a time."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from popi.cli.output import Progress, note, progress
from popi.cli.ray_worker import Tally, Worker
from popi.cli.shards import Shard, Totals
from popi.cli.summaries import SummaryWriter
from popi.errors import ConfigError, MissingExtra, PopiError

try:
    import ray
    import ray.data
except ModuleNotFoundError as error:
    raise MissingExtra("ray", "ray") from error

LOCAL = "local"
"""The address that starts Ray on this machine."""

SECONDS_BETWEEN_NEWS, SECONDS_TO_CONNECT = 1.0, 10.0

QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_USAGE_STATS_ENABLED": "0"}
"""Ray's processes would write errors that they recover from to standard error, and report the usage to its makers."""

STORE = 100 * 2**20
"""Bytes of memory for objects that a local Ray shares between its processes: here, a few numbers for each shard."""


def write_shards(
    load: Callable[[], SummaryWriter],
    settings: Mapping[str, Any],
    skip_bad_rows: bool,
    shards: Sequence[Shard],
    *,
    address: str,
    workers: int | None,
    gpus_per_worker: float | None,
) -> Totals:
    """Writes the summaries of each shard, and its manifest, with the workers of a Ray cluster.

    If a worker dies, another one continues its shard. The first error ends the work of all.

    Args:
        load: Loads the model, in a worker.
        settings: The settings that the summaries depend on.
        skip_bad_rows: Whether to continue without bad rows.
        shards: The shards. All machines must find them under the same absolute paths.
        address: Address of the cluster: ``local`` starts one, ``auto`` finds one.
        workers: Number of workers; ``None`` is the number of GPUs of the cluster, at least 1.
        gpus_per_worker: GPUs of a worker; ``None`` is one if the cluster has any.

    Raises:
        ConfigError: If there is no cluster at the address.
        InputError: If a shard or the model cannot be used, or a shard has bad rows that are not to be skipped.
        PopiError: If the backend is not available, a file cannot be written, or workers die again and again.
    """
    found = [Shard(*(path.resolve() for path in shard)) for shard in shards]
    totals = Totals()
    with _connected(address, workers):
        count, gpus = _divide(workers, gpus_per_worker, len(found))
        # Two shards in the queue of a worker would wait for each other while other workers are idle.
        pool = ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1)
        tally = ray.remote(num_cpus=0)(Tally).remote()
        arguments = (tally, found, load, dict(settings), skip_bad_rows)
        places = ray.data.from_items([{"place": place} for place in range(len(found))], override_num_blocks=len(found))
        done = places.map(Worker, fn_constructor_args=arguments, compute=pool, num_cpus=1, num_gpus=gpus)
        with progress("shards", len(found), "shards") as shown, _news(tally, shown) as advance:
            for batch in done.iter_batches(batch_size=1, prefetch_batches=0, batch_format="pyarrow"):
                [outcome] = map(pickle.loads, batch["outcome"].to_pylist())
                if isinstance(outcome, PopiError):
                    raise outcome
                totals.add(outcome)
                advance()
    return totals


@contextmanager
def _connected(address: str, workers: int | None) -> Iterator[None]:
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    # Ray prints a paragraph on standard output when a worker dies. The worker that continues says it in one line.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        try:
            _connect(address, workers)
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = context.print_on_execution_start = False
            context.raise_original_map_exception = True
            yield
        except ray.exceptions.RayError as error:
            raise PopiError(f"Ray: {error}") from error
        finally:
            ray.shutdown()


def _connect(address: str, workers: int | None) -> None:
    started: dict[str, Any] = {}
    if address == LOCAL:
        cpus = max(workers or 1, os.cpu_count() or 1)
        started = {"num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False}
    try:
        if address not in (LOCAL, "auto"):
            # Ray itself would try for minutes.
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=SECONDS_TO_CONNECT).close()
        # Its libraries print the level of their log.
        with _silent():
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **started)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cannot connect to {address!r} ({str(error).rstrip('.')})",
            field="--ray",
            fix="start a cluster with `ray start --head`, or give --ray local",
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Discards what libraries in C++ print on standard error, inside the block."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _divide(workers: int | None, gpus_per_worker: float | None, shards: int) -> tuple[int, float]:
    """The number of workers, and the GPUs of each."""
    there = ray.cluster_resources()
    total = there.get("GPU", 0.0)
    gpus = float(total > 0) if gpus_per_worker is None else gpus_per_worker
    count = min(workers or (int(total / gpus) if gpus else 0) or 1, shards)
    for name, needed in (("GPU", count * gpus), ("CPU", float(count))):
        if needed > there.get(name, 0.0):
            note(
                f"{count} workers need {needed:g} {name}s, but the cluster has {there.get(name, 0.0):g}: the others "
                "start when there are more"
            )
    return count, gpus


@contextmanager
def _news(tally: Any, shown: Progress) -> Iterator[Callable[[], None]]:
    """Shows what the workers report, inside the block. Yields a function that counts a shard as done."""
    # The progress is not safe for two threads.
    ended, turn, written = threading.Event(), threading.Lock(), 0

    def take() -> None:
        nonlocal written
        with suppress(ray.exceptions.RayError):
            more, notes = ray.get(tally.take.remote(), timeout=10)
            written += more
            with turn:
                for text in notes:
                    shown.note(text)
                shown.advance(0, f"{written:,} summaries" if written else "")

    def repeat() -> None:
        while not ended.wait(SECONDS_BETWEEN_NEWS):
            take()

    def advance() -> None:
        with turn:
            shown.advance()

    thread = threading.Thread(target=repeat, name="popi-ray", daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        ended.set()
        thread.join()
        take()
