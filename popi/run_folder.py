"""The run folder: the configuration, metrics, checkpoint and models of a training run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from pydantic import BaseModel
from safetensors import SafetensorError

from popi.errors import InputError, PopiError
from popi.io import UNFINISHED, lock, read_json, replacing, write_text
from popi.provenance import LIBRARIES, check_unchanged, machine, now, versions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG, METRICS, CHECKPOINT, LOCK = "config.json", "metrics.jsonl", "checkpoint.pt", ".lock"


class RunFolder:
    """A folder with ``config.json`` (recipe, versions, template hashes), ``metrics.jsonl``, checkpoint and models.

    Only one process at a time can use it. It is a context manager; leaving the block releases its lock.

    Args:
        path: The folder.
        config: The content of ``config.json``.
        held: The lock of the folder.
    """

    def __init__(self, path: Path, config: dict[str, Any], held: IO[bytes]) -> None:
        self.path, self.config = path, config
        self._held = held

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    @classmethod
    def open(cls, path: Path, recipe: BaseModel, *, libraries: Sequence[str] = LIBRARIES) -> Self:
        """Creates the folder, or opens the folder of a run of the same recipe, and removes its temporary files.

        Args:
            path: The folder.
            recipe: The recipe of the run.
            libraries: The libraries whose versions are recorded and compared.

        Raises:
            InputError: If the folder contains other files, or a run with another recipe, other templates or versions.
            PopiError: If another process uses the folder, or it cannot be written.
        """
        config = {
            "recipe": recipe.model_dump(mode="json"),
            "versions": versions(libraries),
        }
        if path.exists() and not path.is_dir():
            raise InputError("is a file", file=path, fix="name a folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            held = lock(path)
        except OSError as error:
            raise PopiError(f"cannot write in {path}: {error.strerror or error}") from error
        folder = cls(path, config, held)
        try:
            folder._compare(config)
        except InputError:
            (path / LOCK).unlink(missing_ok=True)
            folder._leave()
            raise
        folder._sweep()
        return folder

    def _compare(self, wanted: dict[str, Any], *, fix: str = "choose another folder, or remove this one") -> None:
        file = self.path / CONFIG
        if not file.exists():
            others = [found.name for found in self.path.iterdir() if found.name != LOCK and not found.match(UNFINISHED)]
            if others:
                raise InputError(
                    f"contains {min(others)}, which does not belong to a run",
                    file=self.path,
                    fix="choose another folder",
                )
            return
        known = read_json(file)
        if not isinstance(known, dict):
            raise InputError("is not the configuration of a run", file=file, fix="choose another folder")
        check_unchanged({key: known.get(key) for key in wanted}, wanted, file=file, fix=fix)
        self.config = known

    def _sweep(self) -> None:
        for left in list(self.path.rglob(UNFINISHED)):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()

    def begin(self, facts: dict[str, Any]) -> None:
        """Starts the run: writes the configuration, or compares it with that of the interrupted run.

        Args:
            facts: Fingerprints of the files and models that the recipe names. They must not change during the run.

        Raises:
            InputError: If the run was started with other facts.
            PopiError: If it cannot be written.
        """
        if (self.path / CONFIG).exists():
            for name, value in facts.items():
                self._compare({name: value}, fix=f"put the {name.replace('_', ' ')} back, or choose another folder")
            return
        self.config = {**self.config, **facts, "machine": machine(), "started": now()}
        write_text(self.path / CONFIG, json.dumps(self.config, indent=2) + "\n")

    def _leave(self) -> None:
        """Releases the lock. A folder in which no run was started is removed if it is empty."""
        if not (self.path / CONFIG).exists():
            (self.path / LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                self.path.rmdir()
        self._held.close()

    def log(self, measured: dict[str, Any]) -> None:
        """Appends one line to the metrics.

        Raises:
            PopiError: If it cannot be written.
        """
        file = self.path / METRICS
        with writing(file), file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(measured) + "\n")

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint atomically.

        Raises:
            PopiError: If it cannot be written. The earlier checkpoint is unchanged.
        """
        save_state(self.path / CHECKPOINT, state)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Loads the last checkpoint, if any, and drops the metrics of later steps.

        Raises:
            InputError: If the checkpoint cannot be read.
        """
        file = self.path / CHECKPOINT
        if not file.exists():
            (self.path / METRICS).unlink(missing_ok=True)
            return None
        state = load_state(file)
        self.forget_after(state["step"])
        return state

    def forget_after(self, step: int) -> None:
        """Drops the metrics of later steps, which will be repeated."""
        file = self.path / METRICS
        if not file.exists():
            return
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:  # the last line of a killed run may be cut
                continue
        write_text(file, "".join(f"{line}\n" for line in kept))

    def save(self, name: str, write: Callable[[str], object]) -> None:
        """Creates or replaces the folder ``path/name`` atomically.

        Args:
            name: Name of the folder.
            write: Writes the files into the folder that it gets as its argument.

        Raises:
            PopiError: If the disk is full.
        """
        before, _, behind = UNFINISHED.partition("*")
        with (
            writing(self.path / name),
            tempfile.TemporaryDirectory(dir=self.path, prefix=before, suffix=behind) as hidden,
        ):
            temporary = Path(hidden) / name
            temporary.mkdir(mode=0o755)
            write(str(temporary))
            for path in temporary.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            shutil.rmtree(self.path / name, ignore_errors=True)
            os.replace(temporary, self.path / name)


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turns the exceptions that libraries raise on a full disk into one error.

    Args:
        what: The file or folder that is written.

    Raises:
        PopiError: If it cannot be written.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if "inline_container" in reason:
            # All that torch says of a failed write is a line of its source.
            reason = "the disk may be full"
        raise PopiError(f"cannot write {what}: {reason}; fix this and run the same command to resume") from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and numbers atomically.

    Raises:
        PopiError: If they cannot be written. An existing file is unchanged.
    """
    import torch

    with writing(path), replacing(path, binary=True) as stream:
        torch.save(state, stream)


def load_state(path: Path, *, fix: str = "remove it to start again") -> dict[str, Any]:
    """Reads a file that :func:`save_state` wrote.

    Args:
        path: The file.
        fix: What to do if the file is not a checkpoint.

    Raises:
        InputError: If the file is not a checkpoint.
    """
    import torch

    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise InputError("is not a checkpoint of this version", file=path, fix=fix) from error
    return state


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    folder: str,
    *,
    weights: dict[str, Tensor] | None = None,
    half: bool = False,
) -> None:
    """Writes a model, its tokenizer and its card into a folder. Tied weights are written once.

    Args:
        model: The model. Its weights are written in their own precision, because rounding would lose small updates.
        tokenizer: Its tokenizer.
        card: Text of ``README.md``.
        folder: An existing folder.
        weights: Weights to write in place of the model's own.
        half: Whether to round the weights to bfloat16, for a model that ships with the package. The configuration says
            float32, the precision in which such a model computes on any CPU.
    """
    import torch

    from popi.engine.quiet import quiet

    with quiet():
        if half:
            weights = {name: value.to(torch.bfloat16) for name, value in (weights or model.state_dict()).items()}
        save_weights(model, folder, weights)
    tokenizer.save_pretrained(folder)
    if half:
        _declare_float32(Path(folder) / "config.json")
    write_text(Path(folder) / "README.md", card)


def save_weights(model: PreTrainedModel, folder: str, weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes the configuration and the weights of a model into a folder. Tied weights are written once.

    Args:
        model: The model.
        folder: An existing folder.
        weights: Weights to write in place of the model's own.
    """
    if weights is None:
        model.save_pretrained(folder)
    else:
        tied = set(getattr(model, "all_tied_weights_keys", {}))
        model.save_pretrained(folder, state_dict={name: value for name, value in weights.items() if name not in tied})


def _declare_float32(config: Path) -> None:
    content = json.loads(config.read_text(encoding="utf-8"))
    write_text(config, json.dumps({**content, "dtype": "float32"}, indent=2) + "\n")


def spent(metrics: Path) -> dict[str, float]:
    """The cost of a joint run: the sum of each ``tokens/...`` and ``seconds/...`` over its steps."""
    total: dict[str, float] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        for name, value in json.loads(line).items():
            if name.startswith(("tokens/", "seconds/")):
                total[name] = total.get(name, 0.0) + value
    return total
