"""The models of a joint run: writer and generator, with their backends and formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from transformers import GenerationConfig

from popi.backends.transformers import TransformersBackend
from popi.engine.chat_tokens import ChatTokens
from popi.engine.loading import load
from popi.models import folder_of
from popi.run_folder import save_model
from popi.seeds import seed_of
from popi.trained import TrainingRecord
from popi.training.adapters import Adapter, copy_into, original, trainable
from popi.training.formats import answer_format, summary_format
from popi.training.likelihood import Within, computing
from popi.training.objective import Reduction
from popi.training.ranks import ONE_RANK, Ranks
from popi.training.scoring import PairScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WRITER, GENERATOR, ADAPTER = "writer", "generator", "adapter"


class LoraOptions(NamedTuple):
    """The options of an adapter; see :class:`popi.training.adapters.Adapter`."""

    rank: int
    alpha: int
    targets: str | Sequence[str]


class Role(NamedTuple):
    """A role by name, with the options of its class.

    Attributes:
        model: Name of a shipped model, path or hub id.
        kind: Registry name or ``module:Class``.
        options: Options of the class.
        lora: Options of its adapter; ``None`` trains all weights.
    """

    model: str
    kind: str
    options: Mapping[str, Any]
    lora: LoraOptions | None = None


class JointModels:
    """Two models that are trained, or one that plays both roles, with float32 weights on every device.

    If both roles train adapters of the same model, they share its weights.

    Args:
        writer: The preference-inference role.
        generator: The conditioned generator.
        shared: Whether one set of trained weights plays both roles.
        max_tokens: Maximum number of tokens of a summary.
        batch_tokens: Maximum number of tokens of a forward pass.
        reduction: How the log-probabilities of a response's tokens are reduced.
        seed: Seed of adapters.
        one_base: Whether adapters of both roles can be in one model.
        ranks: The ranks of the run.

    Attributes:
        writer: The writer's model.
        generator: The generator's model.
        writer_tokenizer: The writer's tokenizer.
        writer_backend: A backend of the writer's current weights.
        generator_backend: A backend of the generator's current weights.
        summary_format: Renders the writer's prompts and parses its replies.
        answer_format: Renders the generator's prompts.
        scorer: Scores with the generator.

    Raises:
        ConfigError: If a role is unknown or cannot be trained.
        ModelError: If a model cannot be loaded.
    """

    def __init__(
        self,
        writer: Role,
        generator: Role,
        *,
        shared: bool,
        max_tokens: int,
        batch_tokens: int,
        reduction: Reduction,
        seed: int = 0,
        one_base: bool = True,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        self._names = {WRITER: writer.model, GENERATOR: generator.model}
        self._shared = shared
        one_base = one_base and writer.model == generator.model and None not in (writer.lora, generator.lora)
        self.writer, self.writer_tokenizer = _load(writer.model)
        self.generator, self._generator_tokenizer = (
            (self.writer, self.writer_tokenizer) if shared or one_base else _load(generator.model)
        )
        self._adapters = {WRITER: _adapter(self.writer, WRITER, writer.lora, seed)}
        self._adapters[GENERATOR] = (
            self._adapters[WRITER] if shared else _adapter(self.generator, GENERATOR, generator.lora, seed)
        )
        self.writer_backend, self.generator_backend = (
            TransformersBackend.from_model(
                model, tokenizer, name, batch_tokens=batch_tokens, within=self.computing(role)
            )
            for role, model, tokenizer, name in (
                (WRITER, self.writer, self.writer_tokenizer, writer.model),
                (GENERATOR, self.generator, self._generator_tokenizer, generator.model),
            )
        )
        self.summary_format = summary_format(
            writer.kind, self.writer_backend, max_tokens=max_tokens, options=writer.options
        )
        self.answer_format = answer_format(generator.kind, self.generator_backend, options=generator.options)
        self.scorer = PairScorer(
            self.generator,
            ChatTokens(self._generator_tokenizer, generator.model),
            self.answer_format,
            abilities=self.generator_backend.abilities,
            batch_tokens=batch_tokens,
            reduction=reduction,
            ranks=ranks,
            within=self.computing(GENERATOR),
        )

    def template_hashes(self) -> dict[str, str]:
        """The hash of the templates of each role."""
        return {WRITER: self.summary_format.template_hash, GENERATOR: self.answer_format.template_hash}

    def computing(self, role: str) -> Within:
        """Makes the context in which the model of a role computes with the weights of this role."""
        model, adapter = self._model(role), self._adapters[role]
        return partial(computing, model) if adapter is None else partial(_computing_with, model, adapter)

    def initial(self) -> Within | None:
        """Makes the context in which the writer's model computes with its initial weights; ``None`` if it cannot."""
        return None if self._adapters[WRITER] is None else partial(_computing_without, self.writer)

    def trained(self, role: str) -> dict[str, nn.Parameter]:
        """The weights of a role that are trained, by name."""
        adapter = self._adapters[role]
        return trainable(self._model(role)) if adapter is None else adapter.parameters()

    def weights(self) -> dict[str, Any]:
        """The weights of each model, or of its adapter, by role."""
        roles = (WRITER,) if self._shared else (WRITER, GENERATOR)
        return {
            role: self._model(role).state_dict()
            if self._adapters[role] is None
            else {name: value.detach() for name, value in self.trained(role).items()}
            for role in roles
        }

    def restore(self, weights: dict[str, Any]) -> None:
        """Restores what :meth:`weights` returned."""
        for role, values in weights.items():
            if self._adapters[role] is None:
                self._model(role).load_state_dict(values)
            else:
                copy_into(self.trained(role), values)

    def save(self, role: str, card: str, folder: str) -> None:
        """Writes the model of a role with its card and its training record. An adapter is merged, and also written."""
        tokenizer = self.writer_tokenizer if role == WRITER else self._generator_tokenizer
        adapter = self._adapters[role]
        save_model(self._model(role), tokenizer, card, folder, weights=None if adapter is None else adapter.merged())
        if adapter is not None:
            adapter.save(Path(folder) / ADAPTER)
        TrainingRecord(self._names[role], self.template_hashes()[role]).write(Path(folder))

    def _model(self, role: str) -> PreTrainedModel:
        return self.writer if role == WRITER else self.generator


@contextmanager
def _computing_with(model: PreTrainedModel, adapter: Adapter) -> Iterator[None]:
    with computing(model), adapter.active():
        yield


@contextmanager
def _computing_without(model: PreTrainedModel) -> Iterator[None]:
    with computing(model), original(model):
        yield


def _adapter(model: PreTrainedModel, role: str, lora: LoraOptions | None, seed: int) -> Adapter | None:
    return None if lora is None else Adapter(model, role, **lora._asdict(), seed=seed_of(seed, "adapter", role))


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model that can be trained: it can be saved, and its files can be read again."""
    model, tokenizer = load(name, None, "float32")
    # TRL reads the reference of the KL divergence by this name. A hub id can point to other weights by then.
    model.config.name_or_path = str(folder_of(name) or name)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        # Some models ship sampling settings without do_sample, which transformers loads but refuses to save.
        ends = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=ends)
    return model, tokenizer
