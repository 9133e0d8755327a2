"""Adapters of low rank (LoRA, arXiv 2106.09685) on frozen weights, several on one model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from popi.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Adapter:
    """An adapter in a model. The weights of the model itself are frozen.

    It is a part of the model, so a model can have an adapter for each role. Outside of :meth:`active` blocks, it is not
    defined which of them computes.

    Args:
        model: The model. The adapter is added to it.
        name: Name of the adapter.
        rank: Rank of the matrices.
        alpha: The product of the matrices is multiplied by ``alpha / rank``.
        targets: Names of the linear layers that get matrices, or ``all-linear``: all of them but the head.
        dtype: Type of the matrices.
        seed: Seed of the initial matrices, whose product is zero.

    Raises:
        ConfigError: If the model has no such layers.
        MissingExtra: If peft is not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        *,
        rank: int,
        alpha: int,
        targets: str | Sequence[str],
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise MissingExtra("peft", "train") from error
        self._model, self.name = model, name
        modules = targets if isinstance(targets, str) else list(targets)
        self._config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, task_type="CAUSAL_LM")
        try:
            with torch.random.fork_rng(), warnings.catch_warnings():
                # peft warns that the model gets several adapters.
                warnings.simplefilter("ignore")
                torch.manual_seed(seed)
                inject_adapter_in_model(self._config, model, adapter_name=name)
        except ValueError as error:
            fix = "name linear layers of the model, or use all-linear"
            raise ConfigError(f"no layer of the model matches {targets}", field="lora.targets", fix=fix) from error
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(_is_of_adapter(parameter_name))
        for parameter in self.parameters().values():
            parameter.data = parameter.data.to(dtype)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The weights of the adapter, by their names in the model."""
        part = f".{self.name}."
        return {name: value for name, value in self._model.named_parameters() if _is_of_adapter(name) and part in name}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within this block, the model computes with this adapter and no other one."""
        with _switched(self._model, self.name):
            yield

    def merged(self) -> dict[str, Tensor]:
        """The weights of a model without adapters that computes the same, by their names in the original model."""
        deltas = {
            f"{name}.weight": layer.get_delta_weight(self.name)
            for name, layer in _layers(self._model)
            if self.name in layer.lora_A
        }
        return {
            name: (value + deltas[name]).to(value.dtype) if name in deltas else value
            for name, value in original_weights(self._model).items()
        }

    def save(self, folder: Path) -> None:
        """Writes the adapter in the format of peft."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        weights: dict[str, Tensor] = get_peft_model_state_dict(self._model, adapter_name=self.name)
        # peft names weights from the wrapper that it loads them into.
        named = {f"base_model.model.{name}": value.contiguous() for name, value in weights.items()}
        save_file(named, folder / "adapter_model.safetensors")
        self._config.base_model_name_or_path = str(self._model.config.name_or_path)
        self._config.save_pretrained(str(folder))


@contextmanager
def original(model: nn.Module) -> Iterator[None]:
    """Within this block, a model computes without its adapters."""
    with _switched(model, None):
        yield


def original_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model without its adapters, by their original names."""
    return {
        name.replace(".base_layer.", "."): value
        for name, value in model.state_dict().items()
        if not _is_of_adapter(name)
    }


def _is_of_adapter(parameter: str) -> bool:
    return ".lora_" in parameter


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


@contextmanager
def _switched(model: nn.Module, name: str | None) -> Iterator[None]:
    # The methods of peft that switch adapters also freeze those that are off, whose gradients may still be computed.
    layers = [layer for _, layer in _layers(model)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = name is None
            layer._active_adapter = [] if name is None else [name]
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model without adapters that are trained, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def exclude_other_adapters(model: nn.Module, adapter: dict[str, nn.Parameter]) -> None:
    """Excludes the other adapters of a model from DDP, which would wait for their gradients before it averages any."""
    others = [name for name, value in model.named_parameters() if value.requires_grad and name not in adapter]
    model._ddp_params_and_buffers_to_ignore = others  # type: ignore[assignment]


def copy_into(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Sets parameters to stored values.

    Raises:
        KeyError: If a value is missing.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
