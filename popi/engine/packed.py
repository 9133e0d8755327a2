"""Linear layers whose weights are in the layout that a CPU multiplies with fastest."""

from __future__ import annotations

import math
import platform
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

ROWS = 16
"""Number of rows for which oneDNN chooses the layout: a batch of decoding. Longer inputs are as fast in this layout."""

LEAST = {torch.float32: 2**18, torch.bfloat16: 2**14}
"""Minimum size of a weight. Calling oneDNN takes ten microseconds, in which a row is multiplied by a smaller one."""

MACHINES = ("x86_64", "AMD64")


class PackedLinear(nn.Linear):
    """A linear layer that only computes: its packed weight is no parameter, and has no gradient.

    Args:
        layer: The layer with the weight.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
        # The overload is called directly: choosing it takes longer than a small product.
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A copy of the weight in the usual layout. Some layers multiply by it themselves."""
        return self._packed.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        """Multiplies by the weight and adds the bias."""
        product: Tensor = self._multiply(input, self._packed, self.bias, "none", [], "")
        return product


def pack(model: nn.Module) -> None:
    """Packs the weights of the linear layers of a frozen model on a CPU with oneDNN; other models are not changed.

    torch converts weights in bfloat16 to such a layout in every call, and multiplies in float32 with MKL, which is slow
    on processors of other makers than Intel. Results in float32 differ by rounding. A head that shares its weight with
    the embeddings gets a copy of its own. Small layers are left as they are.

    Args:
        model: The model. It can no longer be trained or saved.
    """
    if platform.machine() not in MACHINES or not torch.backends.mkldnn.is_available():
        return
    # No reference to a replaced layer is kept, so that a model is never in memory twice.
    packed: WeakKeyDictionary[nn.Module, PackedLinear] = WeakKeyDictionary()
    for parent in [module for module in model.modules() if type(module) is not nn.Linear]:
        for name in list(parent._modules):
            layer = parent._modules[name]
            # Not a subclass, whose forward pass may do more.
            if type(layer) is nn.Linear and _is_fast(layer.weight):
                packed[layer] = packed.get(layer) or PackedLinear(layer)
                setattr(parent, name, packed[layer])


def _is_fast(weight: Tensor) -> bool:
    native = weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.device.type == "cpu" and native and weight.numel() >= LEAST.get(weight.dtype, math.inf)
