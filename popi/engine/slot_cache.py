"""The key/value buffer of the rows of a batch. Each row is written at its own column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class Cursor:
    """The places at which the next tokens are written, for all layers.

    Attributes:
        rows_N: Row of each draft.
        columns_N: Its place among the branches of the row.
        writes_N: Column of the buffer in which its next token is written.
        rows: Number of rows.
        width: Number of columns that are attended to.
        capacity: Rows and columns of the buffer.
    """

    def __init__(self, device: torch.device) -> None:
        self.rows_N = self.columns_N = self.writes_N = torch.empty(0, dtype=torch.long, device=device)
        self.rows = self.width = 0
        self.capacity = 0, 0


class SlotLayer(DynamicLayer):
    """The keys and values of one layer: two buffers ``[rows, heads, columns, D]``."""

    def __init__(self, cursor: Cursor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cursor = cursor
        self._buffers_S_H_L_D: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Size of the buffers in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers_S_H_L_D)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the states of the next token of each draft, and returns the keys and values to attend to."""
        at = self._cursor
        keys, values = self._allocated(key_states, value_states)
        for buffer, states in ((keys, key_states), (values, value_states)):
            buffer[at.rows_N, :, at.writes_N] = states[at.rows_N, :, at.columns_N].to(buffer.dtype)
        return keys[: at.rows, :, : at.width], values[: at.rows, :, : at.width]

    def fill(self, first: int, keys_P_H_W_D: Tensor, values_P_H_W_D: Tensor) -> None:
        """Writes the states of prompts, from this row on."""
        states_P_H_W_D = keys_P_H_W_D, values_P_H_W_D
        for buffer, states in zip(self._allocated(*states_P_H_W_D), states_P_H_W_D, strict=True):
            buffer[first : first + len(states), :, : states.shape[2]] = states

    def copy(self, source: int, first: int, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Copies the start of a row to the ``count`` rows from ``first`` on, and returns their keys and values."""
        for buffer in self._buffers_S_H_L_D:
            buffer[first : first + count, :, :length] = buffer[source, :, :length]
        keys, values = (buffer[first : first + count, :, :length] for buffer in self._buffers_S_H_L_D)
        return keys, values

    def erase(self, row: int) -> None:
        """Overwrites a row with zeros."""
        for buffer in self._buffers_S_H_L_D:
            buffer[row] = 0

    def resize(self) -> None:
        """Moves the states to buffers of the capacity."""
        self._buffers_S_H_L_D = [self._resized(buffer) for buffer in self._buffers_S_H_L_D]

    def get_seq_length(self) -> int:
        """Number of columns that are attended to."""
        return self._cursor.width

    def _allocated(self, *like_R_H_T_D: Tensor) -> list[Tensor]:
        """The buffers of keys and values. They are created with the shape of the first states."""
        self._buffers_S_H_L_D = self._buffers_S_H_L_D or [self._blank(states) for states in like_R_H_T_D]
        return self._buffers_S_H_L_D

    def _blank(self, like_R_H_T_D: Tensor) -> Tensor:
        # Zeros: what is masked is multiplied with a weight of zero, and must be finite.
        rows, columns = self._cursor.capacity
        kind = like_R_H_T_D.device.type
        # Under autocast, attention would convert the whole buffer in each step.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like_R_H_T_D.dtype
        return like_R_H_T_D.new_zeros((rows, like_R_H_T_D.shape[1], columns, like_R_H_T_D.shape[3]), dtype=dtype)

    def _resized(self, old_S_H_L_D: Tensor) -> Tensor:
        new_S_H_L_D = self._blank(old_S_H_L_D)
        rows, columns = self._cursor.rows, min(old_S_H_L_D.shape[2], new_S_H_L_D.shape[2])
        new_S_H_L_D[:rows, :, :columns] = old_S_H_L_D[:rows, :, :columns]
        return new_S_H_L_D
