"""What is added to vLLM's worker, in the process where the model is."""

from __future__ import annotations

from typing import Any

NAME = f"{__name__}.NewWeights"
"""How vLLM is told of it."""


class NewWeights:
    """Takes weights as training saves them."""

    model_runner: Any

    def take_weights(self, folder: str) -> None:
        """Replaces the model's weights by those of a folder."""
        self.model_runner.reload_weights(weights_path=folder)
        model = self.model_runner.get_model()
        head = getattr(model, "lm_head", None)
        if head is not None and model.config.tie_word_embeddings:
            # On a CPU the head multiplies by a packed copy, which vLLM makes anew for a layer that it has loaded, and
            # this one's weights it has loaded as the embeddings'.
            head.quant_method.process_weights_after_loading(head)
