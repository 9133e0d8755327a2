"""The writer and the generator of a joint run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from popi.backends.transformers import TransformersBackend
from popi.engine.chat_tokens import ChatTokens
from popi.engine.loading import load
from popi.models import folder_of
from popi.prompts import DEFAULT
from popi.run_folder import save_model
from popi.trained import TrainingRecord
from popi.training.likelihood import computing
from popi.training.objective import Over
from popi.training.scoring import PairScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WRITER, GENERATOR = "writer", "generator"


class Pair:
    """Two models that learn, or one that plays both roles, in full precision whatever device computes with them.

    Args:
        writer: Name of a shipped model, path or hub id.
        generator: Likewise.
        shared: Whether one set of weights plays both roles.
        batch_tokens: The most tokens of one forward pass.
        over: Whether the scorer sums or averages the tokens of a response.

    Attributes:
        writer: The preference-inference model.
        generator: The conditioned generator.
        writer_tokenizer: The writer's.
        writer_backend: Writes with the writer's present weights.
        generator_backend: Reads with the generator's.
        scorer: Scores with the generator.
    """

    def __init__(self, writer: str, generator: str, *, shared: bool, batch_tokens: int, over: Over) -> None:
        self._names = {WRITER: writer, GENERATOR: generator}
        self._shared = shared
        self.writer, self.writer_tokenizer = _loaded(writer)
        self.generator, self._generator_tokenizer = (
            (self.writer, self.writer_tokenizer) if shared else _loaded(generator)
        )
        self.writer_backend, self.generator_backend = (
            TransformersBackend.from_model(
                model, tokenizer, name, batch_tokens=batch_tokens, within=partial(computing, model)
            )
            for model, tokenizer, name in (
                (self.writer, self.writer_tokenizer, writer),
                (self.generator, self._generator_tokenizer, generator),
            )
        )
        self.scorer = PairScorer(
            self.generator, ChatTokens(self._generator_tokenizer, generator), batch_tokens=batch_tokens, over=over
        )

    def weights(self) -> dict[str, Any]:
        """Those of each model, by its role."""
        weights = {WRITER: self.writer.state_dict()}
        return weights if self._shared else {**weights, GENERATOR: self.generator.state_dict()}

    def restore(self, weights: dict[str, Any]) -> None:
        """Undoes :meth:`weights`."""
        self.writer.load_state_dict(weights[WRITER])
        if not self._shared:
            self.generator.load_state_dict(weights[GENERATOR])

    def save(self, role: str, card: str, folder: str) -> None:
        """Writes the model of a role with its card, and what it was made from."""
        model, tokenizer = (
            (self.writer, self.writer_tokenizer) if role == WRITER else (self.generator, self._generator_tokenizer)
        )
        save_model(model, tokenizer, card, folder)
        TrainingRecord(self._names[role], DEFAULT.hash).write(Path(folder))


def _loaded(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that can be trained: it can be saved, and read anew from the very files that it was read from."""
    model, tokenizer = load(name, None, "float32")
    # The hub may have another model of that name by the time that TRL asks for the reference of the KL divergence.
    model.config.name_or_path = str(folder_of(name) or name)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        # Some models come with settings of sampling that stay unused, and such a file cannot be written.
        ends = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=ends)
    return model, tokenizer
