"""Linear layers for inference on a CPU, with weights in the blocked layout of oneDNN."""

from __future__ import annotations

import math
import platform
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

ROWS = 16
"""Number of rows that the layout is chosen for: a decoding batch. Prefill is as fast in this layout."""

LEAST = {torch.float32: 2**18, torch.bfloat16: 2**14}
"""Minimum number of elements of a packed weight. For a smaller one, the overhead of oneDNN (about 10 µs a call) exceeds
the gain of one row."""

MACHINES = ("x86_64", "AMD64")


class PackedLinear(nn.Linear):
    """A linear layer for inference, ``[..., in_features]`` to ``[..., out_features]``. Its weight is not a parameter.

    Args:
        layer: The layer whose weight is packed, in float32 or bfloat16.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
        # Resolving the overload in each call takes longer than a small product.
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A dense copy of the weight, ``[out_features, in_features]``, for models that read it themselves (Mamba)."""
        return self._packed.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        """Multiplies by the weight and adds the bias."""
        product: Tensor = self._multiply(input, self._packed, self.bias, "none", [], "")
        return product


def pack(model: nn.Module) -> None:
    """Packs the weights of the linear layers of a model on an x86 CPU with oneDNN. On other devices it does nothing.

    torch packs bfloat16 weights again in every call, and multiplies float32 matrices with MKL, which is slow on
    processors that are not made by Intel. Results in float32 differ by rounding. A head that is tied to the embeddings
    gets a weight of its own. Small layers are not packed.

    Args:
        model: The model, for inference. It can no longer be trained or saved.
    """
    if platform.machine() not in MACHINES or not torch.backends.mkldnn.is_available():
        return
    # No reference to a replaced layer is kept, so that the model is never in memory twice.
    packed: WeakKeyDictionary[nn.Module, PackedLinear] = WeakKeyDictionary()
    for parent in [module for module in model.modules() if type(module) is not nn.Linear]:
        for name in list(parent._modules):
            layer = parent._modules[name]
            # Not a subclass, whose forward pass may do more.
            if type(layer) is nn.Linear and _can_be_packed(layer.weight):
                packed[layer] = packed.get(layer) or PackedLinear(layer)
                setattr(parent, name, packed[layer])


def _can_be_packed(weight: Tensor) -> bool:
    native = weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.device.type == "cpu" and native and weight.numel() >= LEAST.get(weight.dtype, math.inf)
