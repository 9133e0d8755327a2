"""The only import of TRL. The trainers use private names of one minor version of it.

If vLLM is installed, TRL imports it, which takes seconds. It is hidden here, because TRL's rollouts are not used.
"""

from __future__ import annotations

import sys
from typing import Any, cast

_modules = cast(dict[str, Any], sys.modules)
_hide = "vllm" not in _modules
if _hide:
    _modules["vllm"] = None
try:
    from trl.models.utils import _ForwardRedirection as ForwardRedirection
    from trl.models.utils import add_hooks, remove_hooks
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
finally:
    if _hide:
        del _modules["vllm"]

__all__ = ["ForwardRedirection", "GRPOConfig", "GRPOTrainer", "add_hooks", "remove_hooks"]
