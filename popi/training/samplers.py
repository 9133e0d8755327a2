"""The choice of the sampler of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from popi.config import JointRecipe
from popi.errors import MissingExtra
from popi.training.models import WRITER, JointModels
from popi.training.precision import resolve
from popi.training.ranks import Ranks
from popi.training.rollouts import EngineRollouts, Rollouts


def make_rollouts(recipe: JointRecipe, models: JointModels, folder: Path, ranks: Ranks) -> Rollouts:
    """Makes the sampler that a recipe names.

    Args:
        recipe: The recipe.
        models: The models.
        folder: The run folder.
        ranks: The ranks of the run.

    Raises:
        MissingExtra: If vLLM is not installed.
        ModelError: If vLLM cannot run the model.
        PopiError: If the server does not respond.
    """
    writer, abilities = recipe.writer, models.writer_backend.abilities
    if writer.rollouts == "engine":
        within = models.computing(WRITER)
        return EngineRollouts(models.writer, abilities=abilities, batch_tokens=recipe.batch_tokens, within=within)
    half, weights = resolve(recipe.precision) != "float32", partial(models.merged, WRITER)
    if writer.server is not None:
        from popi.training.server_rollouts import ServerRollouts

        return ServerRollouts(
            writer.server.url,
            models.writer,
            models.writer_tokenizer,
            key=writer.server.key,
            end_tokens=abilities.end_tokens,
            shared=folder,
            half=half,
            weights=weights,
            ranks=ranks,
        )
    try:
        from popi.training.vllm_rollouts import VLLMRollouts
    except ImportError as error:
        raise MissingExtra("vllm", "vllm") from error
    return VLLMRollouts(models.writer, models.writer_tokenizer, half=half, weights=weights, cache_gib=writer.cache_gib)
