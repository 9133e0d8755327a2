"""Continues many prompts in one key/value buffer, whose rows are reused when they become free.

Each row of the buffer holds one prompt. Drafts with the same prompt are branches of its row, which a mask hides from
each other: the prompt is computed and kept once. A prompt that starts like another one in the buffer copies that part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from popi.engine.cache import head_at, lowest, pad
from popi.engine.slot_cache import Cursor, SlotLayer
from popi.engine.trees import common_prefix

# On a CPU, longer prefill passes are not more efficient, and they delay the running drafts.
CPU_PREFILL_TOKENS, PREFILL_TOKENS = 512, 8192

# Copying fewer tokens than this saves less than the additional pass costs.
MIN_SHARED = 32

# All rows are padded to the one with the most branches. This is the maximum number of cells for each draft.
MAX_CELLS = 2


# The width of the buffer is a multiple of this number, if the buffer is much larger.
COLUMNS = 64


# A row reserves at least this many columns for its drafts, if their limits allow it.
ROOM = 512


@dataclass(eq=False, slots=True)
class _Row:
    """A prompt in the buffer.

    Attributes:
        prompt: Its token ids.
        reserved: Maximum number of columns that it will take, its drafts included.
        used: Number of columns that are written.
        branches: Number of drafts that are running.
    """

    prompt: list[int]
    reserved: int
    used: int = 0
    branches: int = 0

    @property
    def needed(self) -> int:
        """Number of columns to allocate now, less than reserved: few drafts reach a high limit."""
        return min(self.reserved, 2 * max(self.used, len(self.prompt)) + ROOM)


@dataclass(eq=False, slots=True)
class _Branch:
    """A draft that is running.

    Attributes:
        row: Its row.
        start: Number of steps that were done when it joined.
        end: Number of steps after which it has reached its limit.
        place: Its row in the buffer and its place among the branches of the row; ``None`` before its first step.
    """

    row: _Row
    start: int
    end: int
    place: tuple[int, int] | None = None


def prefill_tokens(model: PreTrainedModel) -> int:
    """Maximum number of tokens of a prefill pass of several prompts."""
    return CPU_PREFILL_TOKENS if model.device.type == "cpu" else PREFILL_TOKENS


class SharedSlots:
    """Drafts of a model whose cache can be shared.

    Args:
        model: The model.
        batch_tokens: Maximum size of the buffer in tokens: prompts and room for new tokens. A draft that does not fit
            runs in its own batch.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int) -> None:
        self._model, self._batch_tokens, self._device = model, batch_tokens, model.device
        self._prefill_tokens = prefill_tokens(model)
        self._unit = max(1, min(COLUMNS, batch_tokens // 512))
        self._clear()

    def _clear(self) -> None:
        """Starts with an empty buffer."""
        self._rows: list[_Row] = []
        self._new: list[_Row] = []
        self._source: tuple[_Row | None, int] = None, 0
        self._branches: list[_Branch] = []
        self._columns, self._steps = 1, 0
        self._cursor = Cursor(self._device)
        self._layers = [SlotLayer(self._cursor) for _ in DynamicCache(config=self._model.config).layers]
        self._cache = Cache(layers=list(self._layers))
        self._mask_S_C_L = torch.empty(0, 0, 0, dtype=self._model.dtype, device=self._device)

    @property
    def nbytes(self) -> int:
        """Size of the buffer in bytes."""
        return sum(layer.nbytes for layer in self._layers)

    def plan(self, candidates: Iterable[tuple[list[int], int]]) -> int:
        """Adds drafts to the running ones, as many as fit into the buffer and into one prefill pass.

        Args:
            candidates: Prompt and maximum number of new tokens of each draft, in the order in which they should run.

        Returns:
            The number of drafts that were added.
        """
        before = len(self._branches)
        for prompt, limit in candidates:
            row = self._row_for(prompt, limit)
            if row is None:
                break
            row.reserved += limit
            row.branches += 1
            self._branches.append(_Branch(row, self._steps, self._steps + limit))
        return len(self._branches) - before

    def _row_for(self, prompt: list[int], limit: int) -> _Row | None:
        """A row for a draft: one that has its prompt, or a new one. ``None`` if the draft has to wait."""
        rows, own = [*self._rows, *self._new], len(prompt) - 1
        columns = max((row.branches for row in rows), default=1)
        for row in rows:
            # A branch widens all rows where the others have fewer: a copy of the prompt may be cheaper.
            cheaper = len(rows) * max(columns, row.branches + 1) <= (len(rows) + 1) * columns
            if row.prompt == prompt and cheaper and self._fits(rows, len(rows), row.reserved + limit):
                return row
        if rows and (len(rows) + 1) * columns > MAX_CELLS * (len(self._branches) + 1):
            return None
        if rows and not self._fits(rows, len(rows) + 1, own + limit):
            return None
        source, shared = self._longest_shared(prompt)
        if self._new:
            width = max(own, *(len(row.prompt) - 1 for row in self._new)) - shared
            if (source, shared) != self._source or (len(self._new) + 1) * width > self._prefill_tokens:
                return None
            # A prefix that it shares with a row of this pass can be copied after the pass.
            if max(common_prefix(prompt, row.prompt) for row in self._new) >= max(MIN_SHARED + shared, own // 2):
                return None
        self._source = source, shared
        self._new.append(_Row(prompt, own))
        return self._new[-1]

    def _fits(self, rows: Sequence[_Row], count: int, reserved: int) -> bool:
        return count * self._columns_for(max(reserved, *(row.reserved for row in rows))) <= self._batch_tokens

    def _columns_for(self, width: int) -> int:
        """Columns of a buffer for rows of this width: rounded up, so that it rarely has to be copied."""
        return -(-width // self._unit) * self._unit

    def _longest_shared(self, prompt: list[int]) -> tuple[_Row | None, int]:
        """The row of the buffer whose prompt starts most like this one, and for how many tokens."""
        shared = [(min(common_prefix(prompt, row.prompt), len(prompt) - 1), row) for row in self._rows]
        length, row = max(shared, key=lambda pair: pair[0], default=(0, None))
        return (row, length) if length >= max(1, min(MIN_SHARED, len(prompt) - 1)) else (None, 0)

    def prefill(self, waiting: int) -> None:
        """Computes the prompts of the drafts that :meth:`plan` added, except their last tokens.

        Args:
            waiting: Number of drafts that still wait.
        """
        first = len(self._rows)
        self._rows += self._new
        self._reserve(waiting)
        if self._new:
            self._compute(first, [row.prompt[self._source[1] : -1] for row in self._new])
        for row in self._new:
            row.used = len(row.prompt) - 1
        self._new = []
        self._place()

    def _compute(self, first: int, rests: Sequence[list[int]]) -> None:
        """Fills the new rows from ``first`` on: copies the prefix of another row, and computes the remaining tokens."""
        source, shared = self._source
        past = DynamicCache(config=self._model.config)
        if source is not None:
            for place, layer in enumerate(self._layers):
                past.update(*layer.copy(self._rows.index(source), first, len(rests), shared), place)
        if any(rests):
            # Padding is on the right, where a causal model needs no mask.
            self._model.base_model(input_ids=pad(rests, self._device), past_key_values=past, use_cache=True)
            for layer, (keys, values, _) in zip(self._layers, past, strict=True):
                layer.fill(first, keys, values)

    def step(self, last_N: Tensor) -> Tensor:
        """Reads the last token of each draft, and returns the logits of the next one, ``[N, V]``."""
        at = self._cursor
        if max(row.used + row.branches for row in self._rows) > at.capacity[1]:
            self._reserve(0)
            self._place()
        self._tokens_R_C[at.rows_N, at.columns_N] = last_N
        self._mask_S_C_L[at.rows_N, at.columns_N, at.writes_N] = 0
        for row in self._rows:
            row.used += row.branches
        at.width = max(row.used for row in self._rows)
        with head_at(self._model, at.rows_N, at.columns_N):
            logits_1_N_V: Tensor = self._model(
                input_ids=self._tokens_R_C,
                attention_mask=self._mask_S_C_L[: at.rows, None, : self._columns, : at.width],
                position_ids=self._positions_R_C,
                past_key_values=self._cache,
                use_cache=True,
            ).logits
        self._steps += 1
        at.writes_N += self._strides_N
        self._positions_R_C += self._live_R_C
        return logits_1_N_V[0]

    def skip(self, steps: int) -> int:
        """Counts tokens of each draft as read without reading them, as many as fit into the buffer.

        For estimates of memory, where tensors have no values.

        Args:
            steps: Maximum number of tokens of each draft.

        Returns:
            The number of tokens of each draft.
        """
        width = self._cursor.capacity[1]
        skipped = min([steps, *((width - row.used) // row.branches for row in self._rows if row.branches)])
        for row in self._rows:
            row.used += skipped * row.branches
        self._steps += skipped
        return skipped

    def keep(self, places: Sequence[int]) -> None:
        """Keeps these drafts, drops all others, and frees the rows without drafts."""
        kept = [self._branches[place] for place in places]
        for branch in set(self._branches) - set(kept):
            branch.row.branches -= 1
            branch.row.reserved -= branch.end - self._steps
        self._branches = kept
        if not kept:
            self._clear()
            return
        self._close_gaps()
        self._place()

    def erase(self, places: Sequence[int]) -> None:
        """Overwrites the rows of drafts that failed: a value that is not finite would spoil the next prompt there.

        The branches of a row fail together, because attention multiplies masked values with zero, and zero times
        infinity is not finite.
        """
        failed = Counter(self._branches[place].row for place in places)
        for index, row in enumerate(self._rows):
            if failed[row] == row.branches:
                for layer in self._layers:
                    layer.erase(index)

    def _close_gaps(self) -> None:
        """Moves the last rows into the free ones."""
        for index, row in enumerate(self._rows):
            while self._rows[-1].branches == 0:
                self._rows.pop()
            if index >= len(self._rows):
                return
            if row.branches == 0:
                last = self._rows.pop()
                for layer in self._layers:
                    layer.copy(len(self._rows), index, 1, last.used)
                self._rows[index] = last

    def _reserve(self, waiting: int) -> None:
        """Enlarges the buffer for its rows and, if possible, for the waiting drafts, because copying it is slow."""
        at, rows, width = self._cursor, len(self._rows), max(row.needed for row in self._rows)
        if rows <= at.capacity[0] and width <= at.capacity[1]:
            return
        columns = max(width, min(self._columns_for(width), self._batch_tokens // rows))
        at.capacity = max(rows, min(rows + waiting, self._batch_tokens // columns)), columns
        for layer in self._layers:
            layer.resize()

    def _place(self) -> None:
        """Assigns a row and a column to each draft, and rebuilds positions and mask."""
        at, index, taken = self._cursor, {row: place for place, row in enumerate(self._rows)}, Counter[_Row]()
        table: list[tuple[int, ...]] = []
        for branch in self._branches:
            row, old, column = branch.row, branch.place, taken[branch.row]
            taken[row] += 1
            branch.place = index[row], column
            own = len(row.prompt) - 1
            position = own + self._steps - branch.start
            table.append((*branch.place, row.used + column, row.branches, position, own, *(old or (-1, -1))))
        at.rows, self._columns = len(self._rows), max(taken.values())
        numbers = torch.tensor(table, device=self._device).unbind(dim=1)
        at.rows_N, at.columns_N, at.writes_N, self._strides_N, positions_N, own_N, old_rows_N, old_columns_N = numbers
        self._tokens_R_C = torch.zeros(at.rows, self._columns, dtype=torch.long, device=self._device)
        self._positions_R_C, self._live_R_C = self._tokens_R_C.clone(), self._tokens_R_C.clone()
        self._positions_R_C[at.rows_N, at.columns_N] = positions_N
        self._live_R_C[at.rows_N, at.columns_N] = 1
        self._show(own_N, old_rows_N, old_columns_N, [place for place, numbers in enumerate(table) if numbers[-1] >= 0])

    def _show(self, own_N: Tensor, old_rows_N: Tensor, old_columns_N: Tensor, there: Sequence[int]) -> None:
        """Rebuilds the mask: running drafts keep the columns that they see, and new ones see their prompts."""
        at, old_S_C_L = self._cursor, self._mask_S_C_L
        hidden = lowest(self._model.dtype)
        seen_N_L = torch.arange(at.capacity[1], device=self._device) < own_N[:, None]
        mask_N_L = torch.zeros_like(seen_N_L, dtype=self._model.dtype).masked_fill_(~seen_N_L, hidden)
        if there:
            there_M = torch.tensor(there, device=self._device)
            length = min(old_S_C_L.shape[2], at.capacity[1])
            mask_N_L[there_M, :length] = old_S_C_L[old_rows_N[there_M], old_columns_N[there_M], :length]
        self._mask_S_C_L = mask_N_L.new_full((at.rows, self._columns, at.capacity[1]), hidden)
        self._mask_S_C_L[at.rows_N, at.columns_N] = mask_N_L
