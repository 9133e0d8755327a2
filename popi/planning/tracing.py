"""Memory of a computation without its numbers: models and tensors that have only shapes, and a count of their bytes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACTIVATIONS, LOGITS, GRADIENTS, ARRIVING = "activations", "logits", "gradients", "arriving"


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that a computation needs at some time, besides the weights of the model.

    Attributes:
        activations: Intermediate results, those that are kept for the backward pass and all others.
        logits: Tensors with a number for each token of the vocabulary.
        gradients: Gradients that weights have.
        arriving: Gradients of weights in a backward pass, before the weights have them. If several passes are computed
            for one gradient, autograd keeps the sums of all weights until the last one.
    """

    activations: float = 0.0
    logits: float = 0.0
    gradients: float = 0.0
    arriving: float = 0.0

    @property
    def total(self) -> float:
        """All bytes."""
        return self.activations + self.logits + self.gradients + self.arriving


def along(shorter: Footprint, longer: Footprint, steps: float) -> Footprint:
    """The footprint on the line through two others: 0 steps give the first one, 1 step gives the second one."""
    return Footprint(
        *(
            max(0.0, here + steps * (there - here))
            for here, there in zip(astuple(shorter), astuple(longer), strict=True)
        )
    )


class Zone(NamedTuple):
    """A part of a computation. Its peak is at the same place of a model with few layers and of one with many.

    Attributes:
        calls: How often a call of the model has started or ended.
        passes: How often a backward pass has come to the last layers.
        layer: The layer that it is in: the ``last`` one or the ``first`` one; empty before it.
        recorded: Whether operations are recorded for a backward pass.
    """

    calls: int
    passes: int
    layer: str
    recorded: bool


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, by storage, without the weights of a model.

    The lifetimes are those of the real computation: a storage is counted until nothing refers to it.

    Between the last and the first layer, a backward pass frees what it kept for each layer and adds a gradient: the
    largest sum is at one of the ends, so the layers between them are left out.

    Args:
        model: The model.

    Attributes:
        peaks: What was alive at the peak of each zone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        weights = list(model.parameters())
        self._vocabulary = model.config.get_text_config().vocab_size
        self._owners = {weight.untyped_storage()._cdata: "weights" for weight in weights}
        self._live = {ACTIVATIONS: 0, LOGITS: 0, GRADIENTS: 0, ARRIVING: 0}
        shapes = {tuple(weight.shape) for weight in weights if weight.requires_grad and weight.dim() > 1}
        self._shapes = shapes | {shape[::-1] for shape in shapes}
        self._calls = self._passes = 0
        self._layer, self._place = "", -1
        self.peaks: dict[Zone, Footprint] = {}
        self._hooks: list[Any] = [
            *(each.register_post_accumulate_grad_hook(self._take_gradient) for each in weights if each.requires_grad),
            model.base_model.register_forward_pre_hook(self._next_turn),
            model.base_model.register_forward_hook(self._next_turn),
            *(layer.register_forward_hook(partial(self._watch, place)) for place, layer in enumerate(_layers(model))),
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts the results of an operation."""
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self._count(value)
        return found

    def close(self) -> None:
        """Removes the hooks from the weights."""
        for hook in self._hooks:
            hook.remove()

    def _next_turn(self, *_: Any) -> None:
        self._calls += 1
        self._layer, self._place = "", -1

    def _watch(self, place: int, module: nn.Module, args: Any, output: Any) -> None:
        for value in tree_leaves(output)[:1]:
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda gradient: self._enter(place))

    def _enter(self, place: int) -> None:
        again = place > self._place
        self._passes += again
        self._layer = "last" if again else "between" if place else "first"
        self._place = place

    def _count(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._owners:
            return
        owner = self._owner_of(value)
        self._owners[key] = owner
        self._live[owner] += size
        weakref.finalize(storage, self._free, key, size)
        self._compare()

    def _owner_of(self, value: Tensor) -> str:
        if tuple(value.shape) in self._shapes and _in_backward() and not torch.is_grad_enabled():
            return ARRIVING
        return LOGITS if value.dim() > 1 and value.shape[-1] == self._vocabulary else ACTIVATIONS

    def _take_gradient(self, weight: Tensor) -> None:
        assert weight.grad is not None, "the hook of a weight is called with its gradient"
        storage = weight.grad.untyped_storage()
        owner = self._owners[storage._cdata]
        if owner != GRADIENTS:
            self._owners[storage._cdata] = GRADIENTS
            self._live[owner] -= storage.nbytes()
            self._live[GRADIENTS] += storage.nbytes()

    def _free(self, key: int, size: int) -> None:
        self._live[self._owners.pop(key)] -= size

    def _compare(self) -> None:
        now = Footprint(**self._live)
        zone = Zone(self._calls, self._passes, self._layer, torch.is_grad_enabled())
        if self._layer == "between":
            return
        if zone not in self.peaks or now.total > self.peaks[zone].total:
            self.peaks[zone] = now


def _layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a model: its longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@contextmanager
def without_numbers(*, gpu: bool) -> Iterator[None]:
    """Within this block tensors have shapes and types, and no memory.

    Args:
        gpu: Whether passes have the sizes of those on a GPU. The tensors are on the CPU, because a build of torch
            without GPUs has no others.
    """
    from popi.engine import packing, slots

    with FakeTensorMode():
        if not gpu:
            yield
            return
        with (
            patch.object(packing, "CPU_OWN_TOKENS", packing.MAX_LOGITS),
            patch.object(slots, "CPU_PREFILL_TOKENS", slots.PREFILL_TOKENS),
        ):
            yield


def blank_model(config: Any, dtype: torch.dtype, *, layers: int) -> PreTrainedModel:
    """A model of this configuration, with fewer layers, on the meta device.

    Args:
        config: The configuration of transformers.
        dtype: Type of the weights.
        layers: Number of layers.
    """
    from transformers import AutoModelForCausalLM

    from popi.engine.attention import group_heads

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(_shortened(config, layers), dtype=dtype)
    group_heads(model)
    model.train(False)
    return model


def forget_numbers(model: PreTrainedModel) -> None:
    """Moves a model from the meta device into the present block of :func:`without_numbers`."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for places in tables:
            for name, value in places.items():
                if value is None:
                    continue
                if id(value) not in moved:
                    blank = torch.empty(value.shape, dtype=value.dtype)
                    is_weight = isinstance(value, nn.Parameter)
                    moved[id(value)] = nn.Parameter(blank, value.requires_grad) if is_weight else blank
                places[name] = moved[id(value)]


def _shortened(config: Any, layers: int) -> Any:
    values = config.to_dict()
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:layers]
    values[getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")] = layers
    return type(config).from_dict(values)
