"""The models of a joint run: writer and generator, with their backends and formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig

from popi.assembly import fingerprint_model, open_backend
from popi.backends.transformers import TransformersBackend
from popi.config import FILES
from popi.engine.chat_tokens import ChatTokens
from popi.engine.loading import load
from popi.models import folder_of
from popi.provenance import fingerprint_weights
from popi.run_folder import save_model
from popi.seeds import seed_of
from popi.trained import TrainingRecord
from popi.training.adapters import Adapter, copy_into, original, trainable
from popi.training.formats import answer_format, summary_format
from popi.training.likelihood import Within, computing
from popi.training.objective import Reduction
from popi.training.precision import FLOAT32, Precision
from popi.training.ranks import ONE_RANK, Ranks
from popi.training.recomputation import check_recomputable, recomputed_layers
from popi.training.scoring import PairScorer, Scorer
from popi.training.served_scorer import ServedScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WRITER, GENERATOR, ADAPTER = "writer", "generator", "adapter"


class LoraOptions(NamedTuple):
    """The options of an adapter; see :class:`popi.training.adapters.Adapter`."""

    rank: int
    alpha: int
    targets: str | Sequence[str]


class _Loaded(NamedTuple):
    """A model in this process."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class Role(NamedTuple):
    """A role by name, with the options of its class.

    Attributes:
        model: Name of a shipped model, path or hub id.
        kind: Registry name or ``module:Class``.
        options: Options of the class.
        lora: Options of its adapter; ``None`` trains all weights.
        trained: Whether it is trained.
    """

    model: str
    kind: str
    options: Mapping[str, Any]
    lora: LoraOptions | None = None
    trained: bool = True

    def dtype(self, precision: Precision) -> torch.dtype:
        """The type of the weights of its model."""
        return precision.trained if self.trained and self.lora is None else precision.frozen


class JointModels:
    """Two models that are trained, or one that plays both roles.

    If both roles train adapters of the same model, they share its weights. A generator that is described by a backend
    file is served: its backend scores, and it is not trained.

    Args:
        writer: The preference-inference role.
        generator: The conditioned generator.
        shared: Whether one set of trained weights plays both roles.
        max_tokens: Maximum number of tokens of a summary.
        batch_tokens: Maximum number of tokens of a forward pass.
        reduction: How the log-probabilities of a response's tokens are reduced.
        seed: Seed of adapters.
        one_base: Whether adapters of both roles can be in one model.
        precision: The types of the weights and of forward passes.
        recompute: Whether backward passes recompute the layers of a model (gradient checkpointing).
        ranks: The ranks of the run.

    Attributes:
        writer_backend: A backend of the writer's current weights.
        generator_backend: A backend of the generator's current weights, or of the served generator.
        summary_format: Renders the writer's prompts and parses its replies.
        answer_format: Renders the generator's prompts.
        scorer: Scores with the generator.

    Raises:
        ConfigError: If a role is unknown or cannot be trained, or the served generator does not score responses.
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
        precision: Precision = FLOAT32,
        recompute: bool = False,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        self._names = {WRITER: writer.model, GENERATOR: generator.model}
        self._shared, self._autocast, self._recompute = shared, precision.autocast, recompute
        one_base = one_base and writer.model == generator.model and None not in (writer.lora, generator.lora)
        self._loaded = {WRITER: _load(writer.model, writer.dtype(precision))}
        if shared or one_base:
            self._loaded[GENERATOR] = self._loaded[WRITER]
        elif not is_served(generator.model):
            self._loaded[GENERATOR] = _load(generator.model, generator.dtype(precision))
        if recompute:
            for role, (model, _) in self._loaded.items():
                check_recomputable(model, self._names[role])
        self._adapters: dict[str, Adapter | None] = {}
        for role, given in ((WRITER, writer), (GENERATOR, generator)):
            shares = shared and role == GENERATOR
            self._adapters[role] = (
                self._adapters[WRITER] if shares else self._adapter(role, given.lora, precision.trained, seed)
            )
        backend = partial(self._backend, batch_tokens)
        self.writer_backend = backend(WRITER)
        self.generator_backend = backend(GENERATOR) if GENERATOR in self._loaded else open_backend(generator.model)[0]
        self.summary_format = summary_format(
            writer.kind, self.writer_backend, max_tokens=max_tokens, options=writer.options
        )
        self.answer_format = answer_format(generator.kind, self.generator_backend, options=generator.options)
        self.scorer: Scorer = (
            PairScorer(
                self.generator,
                ChatTokens(self._loaded[GENERATOR].tokenizer, generator.model),
                self.answer_format,
                abilities=self.generator_backend.abilities,
                batch_tokens=batch_tokens,
                reduction=reduction,
                ranks=ranks,
                within=self.computing(GENERATOR),
            )
            if isinstance(self.generator_backend, TransformersBackend)
            else ServedScorer(self.generator_backend, self.answer_format, reduction=reduction)
        )

    def _adapter(self, role: str, lora: LoraOptions | None, dtype: torch.dtype, seed: int) -> Adapter | None:
        if lora is None:
            return None
        return Adapter(self._model(role), role, **lora._asdict(), dtype=dtype, seed=seed_of(seed, "adapter", role))

    def _backend(self, batch_tokens: int, role: str) -> TransformersBackend:
        return TransformersBackend.from_model(
            *self._loaded[role], self._names[role], batch_tokens=batch_tokens, within=self.computing(role)
        )

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that have weights of their own in this process."""
        return (WRITER,) if self._shared else tuple(self._loaded)

    @property
    def writer(self) -> PreTrainedModel:
        """The writer's model."""
        return self._loaded[WRITER].model

    @property
    def generator(self) -> PreTrainedModel:
        """The generator's model, which is in this process unless it is served."""
        return self._loaded[GENERATOR].model

    @property
    def writer_tokenizer(self) -> PreTrainedTokenizerBase:
        """The writer's tokenizer."""
        return self._loaded[WRITER].tokenizer

    def fingerprint(self) -> str:
        """Identifies the generator, by its weights or by its backend file."""
        if GENERATOR in self._loaded:
            return fingerprint_weights(self.generator.state_dict())
        return str(fingerprint_model(self._names[GENERATOR]))

    def close(self) -> None:
        """Closes the scorer."""
        self.scorer.close()

    def template_hashes(self) -> dict[str, str]:
        """The hash of the templates of each role."""
        return {WRITER: self.summary_format.template_hash, GENERATOR: self.answer_format.template_hash}

    def computing(self, role: str) -> Within:
        """Makes the context in which the model of a role computes with the weights of this role."""
        adapter = self._adapters[role]
        return self._computing(role, nullcontext if adapter is None else adapter.active)

    def initial(self) -> Within | None:
        """Makes the context in which the writer's model computes with its initial weights; ``None`` if it cannot."""
        if self._adapters[WRITER] is None:
            return None
        return self._computing(WRITER, partial(original, self.writer))

    def _computing(self, role: str, adapted: Within) -> Within:
        return computing_as(self._model(role), adapted, autocast=self._autocast, recompute=self._recompute)

    def trained(self, role: str) -> dict[str, nn.Parameter]:
        """The weights of a role that are trained, by name."""
        adapter = self._adapters[role]
        return trainable(self._model(role)) if adapter is None else adapter.parameters()

    def weights(self) -> dict[str, Any]:
        """The weights of each model, or of its adapter, by role."""
        return {
            role: self._model(role).state_dict()
            if self._adapters[role] is None
            else {name: value.detach() for name, value in self.trained(role).items()}
            for role in self.roles
        }

    def restore(self, weights: dict[str, Any]) -> None:
        """Restores what :meth:`weights` returned."""
        for role, values in weights.items():
            if self._adapters[role] is None:
                self._model(role).load_state_dict(values)
            else:
                copy_into(self.trained(role), values)

    def merged(self, role: str) -> dict[str, torch.Tensor] | None:
        """The weights of a role with its adapter merged; ``None`` if they are those of its model."""
        adapter = self._adapters[role]
        return None if adapter is None else adapter.merged()

    def save(self, role: str, card: str, folder: str) -> None:
        """Writes the model of a role with its card and its training record. An adapter is merged, and also written."""
        adapter = self._adapters[role]
        save_model(*self._loaded[role], card, folder, weights=self.merged(role))
        if adapter is not None:
            adapter.save(Path(folder) / ADAPTER)
        format = self.summary_format if role == WRITER else self.answer_format
        TrainingRecord.of(self._names[role], format.template_hash, format.prompts).write(Path(folder))

    def _model(self, role: str) -> PreTrainedModel:
        return self._loaded[role].model


def computing_as(model: PreTrainedModel, adapted: Within, *, autocast: bool, recompute: bool) -> Within:
    """Makes the context in which a model computes in joint training.

    Args:
        model: The model.
        adapted: Makes the context in which its adapter is active.
        autocast: Whether it computes in bfloat16 with weights in float32.
        recompute: Whether backward passes recompute its layers.
    """
    plain = partial(_computing, model, adapted, autocast)
    return partial(_computing_again, model, plain) if recompute else plain


@contextmanager
def _computing(model: PreTrainedModel, adapted: Within, autocast: bool) -> Iterator[None]:
    with computing(model, autocast=autocast), adapted():
        yield


@contextmanager
def _computing_again(model: PreTrainedModel, within: Within) -> Iterator[None]:
    with within(), recomputed_layers(model, within) if torch.is_grad_enabled() else nullcontext():
        yield


def is_served(model: str) -> bool:
    """Whether the name of a model is that of a file that describes a backend."""
    return model.endswith(FILES)


def _load(name: str, dtype: torch.dtype) -> _Loaded:
    """Loads a model that can be trained: it can be saved, and its files can be read again."""
    model, tokenizer = load(name, None, str(dtype).removeprefix("torch."))
    # TRL reads the reference of the KL divergence by this name. A hub id can point to other weights by then.
    model.config.name_or_path = str(folder_of(name) or name)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        # Some models ship sampling settings without do_sample, which transformers loads but refuses to save.
        ends = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=ends)
    return _Loaded(model, tokenizer)
