"""The weights of a policy in a folder, from which a sampler in another process reads them after each update."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from popi.errors import LockedError
from popi.io import lock
from popi.run_folder import save_weights

SHARED_MEMORY, PREFIX = Path("/dev/shm"), "popi-weights-"

SECONDS_TO_LOCK = 60.0
"""Age from which a folder without a lock is abandoned."""

# A float32 engine differs from the policy by the order of its sums. bfloat16 has eight bits of precision.
TOLERANCE, TOLERANCE_OF_HALF = 1e-3, 5e-2

Weights = Callable[[], Mapping[str, Tensor] | None]
"""Returns the weights of a policy; ``None`` if they are those of its model."""


def shared_memory(size: int) -> Path | None:
    """The folder of shared memory, or ``None`` if it has no room for two copies of ``size`` bytes.

    A container often has 64 MiB of it. While weights are replaced, the earlier ones may still be there.
    """
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= 2 * size else None


def remove_abandoned(folder: Path) -> None:
    """Removes the snapshots of killed processes: those whose lock is free."""
    for path in folder.glob(f"{PREFIX}*"):
        # A younger one may be about to be locked.
        with suppress(OSError, LockedError):
            if time.time() - path.stat().st_mtime > SECONDS_TO_LOCK:
                lock(path).close()
                shutil.rmtree(path)


class Snapshot:
    """A folder with the model of a policy. It is removed when it is closed, or when the next one is made.

    Args:
        model: The model of the policy.
        tokenizer: Its tokenizer.
        weights: The weights of the policy.
        near: A folder that all readers see; ``None`` is for readers on this machine: shared memory, or the temporary
            folder if there is no room in it.

    Attributes:
        path: The folder.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: Weights, *, near: Path | None = None
    ) -> None:
        self._model, self._weights = model, weights
        size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        self._folder = TemporaryDirectory(prefix=PREFIX, dir=near or shared_memory(size))
        self.path = Path(self._folder.name)
        self._held = lock(self.path)
        remove_abandoned(self.path.parent)
        tokenizer.save_pretrained(self._folder.name)

    def write(self) -> None:
        """Writes the current weights."""
        # transformers writes on the first rank only, and every rank may have a sampler of its own.
        self._model.should_save_on_this_rank = lambda is_main_process: True  # type: ignore[method-assign]
        try:
            save_weights(self._model, self._folder.name, self._weights())
        finally:
            del self._model.should_save_on_this_rank

    def close(self) -> None:
        """Removes the folder."""
        self._folder.cleanup()
        self._held.close()
