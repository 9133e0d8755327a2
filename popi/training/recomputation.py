"""Gradient checkpointing (arXiv 1604.06174) of a model's layers, also where they read or write a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from popi.errors import ConfigError

FIELD = "gradient_checkpointing"


def check_recomputable(model: PreTrainedModel, name: str) -> None:
    """Checks that a model has layers that can be recomputed.

    Raises:
        ConfigError: If it has none.
    """
    if not any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
        raise ConfigError(f"the model {name!r} has no layers that can be recomputed", field=FIELD, fix="turn it off")


@contextmanager
def recomputed_layers(model: PreTrainedModel, within: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Within this block, a model keeps only the inputs of its layers for the backward pass, which recomputes the rest.

    A layer that appends to a cache is recomputed without it: the keys and values of a prefix are results of the layer,
    and those that it reads are arguments. transformers turns the cache off instead.

    Args:
        model: The model. Its cache has to be a ``DynamicCache``.
        within: Makes the context in which a layer is recomputed. The backward pass is outside of this block.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward, _place(layer), within)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _place(layer: nn.Module) -> int:
    """The place of a layer in the cache."""
    places: list[int] = [vars(module)["layer_idx"] for module in layer.modules() if "layer_idx" in vars(module)]
    return places[0] if places else 0


def _recomputed(
    forward: Callable[..., Any],
    place: int,
    within: Callable[[], AbstractContextManager[None]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    again = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), within())
    )
    # Its name, and whether it has one in the call, differ between models.
    given: Any = next((value for value in (*args, *kwargs.values()) if isinstance(value, DynamicCache)), None)
    if given is None:
        return again(partial(forward, *args, **kwargs))
    cached = given.layers[place]
    keys, values = (cached.keys, cached.values) if cached.get_seq_length() else (None, None)

    def compute() -> tuple[Any, Tensor | None, Tensor | None]:
        layer = _layer_of(keys, values)
        # Some models ask the first layer for the length.
        cache = DynamicCache()
        cache.layers = [layer] * (place + 1)
        output = forward(
            *(cache if value is given else value for value in args),
            **{name: cache if value is given else value for name, value in kwargs.items()},
        )
        return (output, layer.keys, layer.values) if keys is None else (output, None, None)

    output, new_keys, new_values = again(compute)
    if keys is None:
        _fill(cached, new_keys, new_values)
    return output


def _layer_of(keys: Tensor | None, values: Tensor | None) -> DynamicLayer:
    layer = DynamicLayer()
    if keys is not None and values is not None:
        _fill(layer, keys, values)
    return layer


def _fill(layer: Any, keys: Tensor, values: Tensor) -> None:
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
