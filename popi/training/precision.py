"""The precision of a run: of weights that are trained, of those that are not, and of forward passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from popi.engine.loading import has_bfloat16

Name = Literal["float32", "mixed", "bfloat16"]


def resolve(name: Literal["auto"] | Name) -> Name:
    """The precision that ``auto`` selects: mixed where the device computes in bfloat16 natively, else float32."""
    if name != "auto":
        return name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "mixed" if has_bfloat16(device) else "float32"


@dataclass(frozen=True, slots=True)
class Precision:
    """The types that a run computes with.

    Attributes:
        trained: Type of the weights that are trained, and of their gradients.
        frozen: Type of the weights that are not, such as those under an adapter.
        autocast: Whether forward passes compute in bfloat16 with weights in float32.
        deepspeed: Entries of DeepSpeed's configuration.
    """

    trained: torch.dtype
    frozen: torch.dtype
    autocast: bool
    deepspeed: dict[str, Any]

    @classmethod
    def of(cls, name: Name, *, zero: bool) -> Precision:
        """The types of a precision.

        Args:
            name: The precision.
            zero: Whether DeepSpeed trains. In mixed precision, it has the weights in bfloat16, and divides a copy of
                them in float32 among the ranks. Without it, the weights are in float32.
        """
        if name == "float32":
            return FLOAT32
        if name == "bfloat16":
            return cls(torch.bfloat16, torch.bfloat16, autocast=False, deepspeed={})
        if zero:
            # Small gradients would vanish in a sum of bfloat16.
            entries = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
            return cls(torch.bfloat16, torch.bfloat16, autocast=False, deepspeed=entries)
        return cls(torch.float32, torch.bfloat16, autocast=True, deepspeed={})


FLOAT32 = Precision(torch.float32, torch.float32, autocast=False, deepspeed={})
