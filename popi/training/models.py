"""The models of a joint run: writer and generator, with their backends and formats."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import GenerationConfig

from popi.backends.transformers import TransformersBackend
from popi.engine.chat_tokens import ChatTokens
from popi.engine.loading import load
from popi.models import folder_of
from popi.run_folder import save_model
from popi.trained import TrainingRecord
from popi.training.formats import answer_format, summary_format
from popi.training.likelihood import computing
from popi.training.objective import Reduction
from popi.training.ranks import ONE_RANK, Ranks
from popi.training.scoring import PairScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WRITER, GENERATOR = "writer", "generator"


class Role(NamedTuple):
    """A role by name, with the options of its class.

    Attributes:
        model: Name of a shipped model, path or hub id.
        kind: Registry name or ``module:Class``.
        options: Options of the class.
    """

    model: str
    kind: str
    options: Mapping[str, Any]


class JointModels:
    """Two models that are trained, or one that plays both roles, with float32 weights on every device.

    Args:
        writer: The preference-inference role.
        generator: The conditioned generator.
        shared: Whether one set of weights plays both roles.
        max_tokens: Maximum number of tokens of a summary.
        batch_tokens: Maximum number of tokens of a forward pass.
        reduction: How the log-probabilities of a response's tokens are reduced.
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
        ranks: Ranks = ONE_RANK,
    ) -> None:
        self._names = {WRITER: writer.model, GENERATOR: generator.model}
        self._shared = shared
        self.writer, self.writer_tokenizer = _load(writer.model)
        self.generator, self._generator_tokenizer = (
            (self.writer, self.writer_tokenizer) if shared else _load(generator.model)
        )
        self.writer_backend, self.generator_backend = (
            TransformersBackend.from_model(
                model, tokenizer, name, batch_tokens=batch_tokens, within=partial(computing, model)
            )
            for model, tokenizer, name in (
                (self.writer, self.writer_tokenizer, writer.model),
                (self.generator, self._generator_tokenizer, generator.model),
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
        )

    def template_hashes(self) -> dict[str, str]:
        """The hash of the templates of each role."""
        return {WRITER: self.summary_format.template_hash, GENERATOR: self.answer_format.template_hash}

    def weights(self) -> dict[str, Any]:
        """The weights of each model, by role."""
        weights = {WRITER: self.writer.state_dict()}
        return weights if self._shared else {**weights, GENERATOR: self.generator.state_dict()}

    def restore(self, weights: dict[str, Any]) -> None:
        """Restores what :meth:`weights` returned."""
        self.writer.load_state_dict(weights[WRITER])
        if not self._shared:
            self.generator.load_state_dict(weights[GENERATOR])

    def save(self, role: str, card: str, folder: str) -> None:
        """Writes the model of a role with its card and its training record."""
        model, tokenizer = (
            (self.writer, self.writer_tokenizer) if role == WRITER else (self.generator, self._generator_tokenizer)
        )
        save_model(model, tokenizer, card, folder)
        TrainingRecord(self._names[role], self.template_hashes()[role]).write(Path(folder))


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
