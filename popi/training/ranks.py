"""The ranks of a run: what its processes exchange, and the forward passes that they have to make together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from popi.engine.packing import Row
from popi.engine.trees import TokenTree
from popi.errors import PopiError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another one. Ranks may differ in speed, so it is much longer than a step."""


class Ranks:
    """The processes of a run, or the only one.

    Every method except :meth:`alone` and :meth:`is_first_to_report` is collective: all ranks call it in the same order.

    Args:
        lockstep: Whether the ranks have to make the same calls of a model, because each of them holds a part of its
            weights (ZeRO-3), or as many backward passes (ZeRO-1 and 2).
    """

    def __init__(self, *, lockstep: bool = False) -> None:
        self._lockstep, self._alone = lockstep, False

    @property
    def count(self) -> int:
        """Number of ranks."""
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def index(self) -> int:
        """Index of this rank, from 0."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files of the run."""
        return self.index == 0

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.count > 1:
            dist.barrier()

    def on_first(self, run: Callable[[], T]) -> T | None:
        """Runs a function on the first rank while the others wait. They return ``None``.

        Raises:
            SystemExit: On the other ranks, if it failed on the first one, with the exit code of the error.
        """
        result: list[T] = []
        self.from_first(lambda: result.append(run()))
        return result[0] if result else None

    def from_first(self, run: Callable[[], T]) -> T:
        """Runs a function on the first rank, and returns its result on every rank.

        Raises:
            SystemExit: As :meth:`on_first`.
        """
        if self.count == 1:
            return run()
        outcome: list[Any] = [1, None]
        try:
            if self.is_first:
                outcome = [0, run()]
        except PopiError as error:
            outcome[0] = error.exit_code
            raise
        finally:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[0]:
            raise SystemExit(outcome[0])
        found: T = outcome[1]
        return found

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The part of the items that this rank works on. :meth:`gather` restores their order."""
        return items[self.index :: self.count]

    def gather(self, found: Sequence[T]) -> list[T]:
        """The results of all ranks in turn, which is the order of the items that :meth:`share` distributed."""
        if self.count == 1:
            return list(found)
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, list(found))
        return [part[place] for place in range(max(map(len, parts))) for part in parts if place < len(part)]

    def is_first_to_report(self) -> bool:
        """Whether no other rank has reported an error. Not collective, because ranks fail at different times."""
        if self.count == 1:
            return True
        try:
            return int(dist.distributed_c10d._get_default_store().add("popi/reported", 1)) == 1
        except dist.DistError:  # the process that holds the store has ended
            return True

    def total(self, value: float) -> float:
        """The sum of a value over the ranks."""
        return self._reduce([value], dist.ReduceOp.SUM, torch.float64)[0] if self.count > 1 else float(value)

    def mean(self, metrics: Mapping[str, float], weight: float = 1.0) -> dict[str, float]:
        """The mean of each metric over the ranks.

        Args:
            metrics: The means of this rank.
            weight: Number of items that they are means of.
        """
        if self.count == 1:
            return dict(metrics)
        values = [weight * value for value in metrics.values()]
        *sums, total = self._reduce([*values, weight], dist.ReduceOp.SUM, torch.float64)
        return {name: value / total for name, value in zip(metrics, sums, strict=True)}

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces tensors by their means over the ranks."""
        if self.count == 1:
            return
        waiting = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for handle in waiting:
            handle.wait()
        torch._foreach_div_(list(tensors), self.count)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within this block each rank works on its own: it holds all weights, and the ranks agree on nothing."""
        self._alone, before = True, self._alone
        try:
            yield
        finally:
            self._alone = before

    def same_passes(self, passes: Sequence[list[Row]]) -> list[list[Row]]:
        """Adds passes without items until every rank has the same calls of the model to make, in the same order.

        A pass with prefixes calls the model twice, any other one once, so the former come first.
        """
        if not self._agrees:
            return list(passes)
        kinds = [[rows for rows in passes if _has_prefix(rows) == prefixed] for prefixed in (True, False)]
        wanted = self._reduce([len(kind) for kind in kinds], dist.ReduceOp.MAX, torch.int64)
        return [
            rows
            for kind, count, filler in zip(kinds, wanted, (_EMPTY_AFTER_PREFIX, _EMPTY), strict=True)
            for rows in (*kind, *[filler] * (int(count) - len(kind)))
        ]

    def smallest(self, value: int) -> int:
        """The smallest value of all ranks in lockstep, else the value itself."""
        return int(self._reduce([value], dist.ReduceOp.MIN, torch.int64)[0]) if self._agrees else value

    @property
    def _agrees(self) -> bool:
        return self._lockstep and self.count > 1 and not self._alone

    def _reduce(self, values: Sequence[float], operation: Any, dtype: torch.dtype) -> list[float]:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        found = torch.tensor(values, dtype=dtype, device=device)
        dist.all_reduce(found, operation)
        return found.tolist()


ONE_RANK = Ranks()
"""A run in one process, or a part of one that needs no agreement."""


def _has_prefix(rows: Sequence[Row]) -> bool:
    return any(row.prefix for row in rows)


_TOKEN = TokenTree([0], depths=[0], ends=[1], paths=[])
_EMPTY_AFTER_PREFIX, _EMPTY = [Row([], [0], _TOKEN)], [Row([], [], _TOKEN)]
