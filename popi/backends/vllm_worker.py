"""An extension of vLLM's worker, in the process of the model."""

from __future__ import annotations

from typing import Any

NAME = f"{__name__}.NewWeights"
"""The class below, as vLLM imports it."""


class NewWeights:
    """Loads weights as training saves them."""

    model_runner: Any

    def take_weights(self, folder: str) -> None:
        """Replaces the model's weights by those in a folder."""
        self.model_runner.reload_weights(weights_path=folder)
        model = self.model_runner.get_model()
        head = getattr(model, "lm_head", None)
        if head is not None and model.config.tie_word_embeddings:
            # On a CPU the head uses a packed copy of its weights. vLLM renews the copy only for layers whose weights it
            # loads, and it loads tied weights as those of the embeddings.
            head.quant_method.process_weights_after_loading(head)
