"""The engines of a run: one process, DDP, or ZeRO of DeepSpeed, and forward passes through their wrappers."""

from __future__ import annotations

import atexit
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import nn

from popi.errors import ConfigError, MissingExtra
from popi.training import launcher, ranks
from popi.training.precision import Precision
from popi.training.ranks import Ranks

T = TypeVar("T")

Kind = Literal["single", "ddp", "zero1", "zero2", "zero3"]
Offload = Literal["none", "optimizer", "parameters"]

SEVERAL_GPUS = "make one visible (CUDA_VISIBLE_DEVICES=0 popi train ...), or set engine.kind and use torchrun"
SEVERAL_PROCESSES = "set engine.kind to ddp, zero1, zero2 or zero3, or start popi train without torchrun"


def stage_of(kind: Kind) -> int:
    """The stage of ZeRO, 0 for an engine without it."""
    return int(kind[-1]) if kind.startswith("zero") else 0


def start(kind: Kind) -> Ranks:
    """Joins the processes of a run, before the first model is loaded.

    Args:
        kind: The engine.

    Raises:
        ConfigError: If the engine is for one process and there are several, or several GPUs.
        MissingExtra: If DeepSpeed is not installed.
    """
    on_gpu = torch.cuda.is_available()
    if kind == "single":
        if (gpus := torch.cuda.device_count()) > 1:
            raise ConfigError(f"{gpus} GPUs are visible, but the engine is single", fix=SEVERAL_GPUS)
        # On a CPU, accelerate takes each of several processes for the only one.
        if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise ConfigError(f"{processes} processes were started, but the engine is single", fix=SEVERAL_PROCESSES)
        return Ranks()
    # The threads of a process group must end before the libraries that they use.
    atexit.register(_leave)
    if "LOCAL_RANK" in os.environ:
        launcher.follow()
    if stage_of(kind):
        _start_deepspeed(on_gpu=on_gpu)
    elif on_gpu:
        PartialState(timeout=ranks.TIMEOUT)
    else:
        # accelerate calls the device cpu:0, which torch.load refuses as the place of an optimizer's state.
        PartialState(cpu=True, timeout=ranks.TIMEOUT).device = torch.device("cpu")
    return Ranks(lockstep=stage_of(kind) > 0)


def _start_deepspeed(*, on_gpu: bool) -> None:
    try:
        import deepspeed.ops
        from deepspeed.runtime import bf16_optimizer
    except ImportError as error:
        raise MissingExtra("DeepSpeed", "train") from error
    # Without a launcher, there is one rank.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    # It prints the use of memory, without being asked.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # DeepSpeed calls functions of torch by their former names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # On a CPU, accelerate reads these variables when it creates its state. Without them, it silently uses DDP.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ.pop("ACCELERATE_USE_CPU", None)
    if on_gpu:
        PartialState(timeout=ranks.TIMEOUT)
    else:
        # An operator for inference. DeepSpeed would compile it for half a minute, and a rank whose peer ends while it
        # is set up would wait in it for ever, without a way to be interrupted.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        PartialState(backend="gloo", timeout=ranks.TIMEOUT)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def deepspeed_config(
    kind: Kind,
    offload: Offload,
    precision: Precision,
    *,
    max_grad_norm: float,
    batch: int,
    accumulate: int,
    ranks: int,
) -> dict[str, Any]:
    """DeepSpeed's configuration of a model that is trained.

    Args:
        kind: The engine.
        offload: What is kept in the memory of the host.
        precision: The types of its weights.
        max_grad_norm: Maximum norm of the gradient.
        batch: Number of sequences in a batch of a rank.
        accumulate: Number of batches of a step.
        ranks: Number of ranks.
    """
    zero: dict[str, Any] = {"stage": stage_of(kind), "overlap_comm": False}
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    if stage_of(kind) == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": accumulate,
        "train_batch_size": batch * accumulate * ranks,
        "gradient_clipping": max_grad_norm,
        # The optimizers are those of torch, so that every engine computes the same update.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **precision.deepspeed,
    }


def divide(model: nn.Module, precision: Precision) -> nn.Module:
    """Divides the weights of a model that is not trained among the ranks, which compute its passes together (ZeRO-3).

    Returns:
        Its engine. The model computes as before.
    """
    import deepspeed

    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, **precision.deepspeed}
    engine: nn.Module = deepspeed.initialize(model=model, config=config)[0]
    return engine


def trainer_arguments(kind: Kind, deepspeed: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of a trainer of transformers that depend on the engine.

    Args:
        kind: The engine.
        deepspeed: DeepSpeed's configuration, with ZeRO.
    """
    if kind == "single":
        return {}
    shared = {"accelerator_config": {"use_configured_state": True}, "ddp_find_unused_parameters": False}
    if deepspeed is None:
        return shared
    return {**shared, "deepspeed": dict(deepspeed), "bf16": "bf16" in deepspeed}


def forget_trainer() -> None:
    """Resets the state of accelerate and transformers, which accept one configuration of DeepSpeed in a process."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()


def through(wrapper: nn.Module, model: nn.Module, compute: Callable[[], T]) -> T:
    """Computes within the forward pass of a model's wrapper, where DDP and DeepSpeed prepare the backward pass.

    Args:
        wrapper: The wrapper, or the model itself.
        model: The model that it wraps.
        compute: Calls the model any number of times. The wrapper finds tensors in a tuple, and not in other classes.
    """
    from popi.training.trl import ForwardRedirection

    if wrapper is model or not torch.is_grad_enabled():
        return compute()
    found: T = ForwardRedirection()(wrapper, model, lambda: compute())
    return found


@contextmanager
def whole(*engines: nn.Module) -> Iterator[None]:
    """Within this block every rank has all weights of these engines, and can compute alone. Collective under ZeRO-3.

    Args:
        engines: Engines of DeepSpeed. Any other wrapper has all weights anyway.
    """
    sharded = [engine for engine in engines if _is_sharded(engine)]
    if not sharded:
        yield
        return
    import deepspeed

    from popi.training.trl import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters([value for engine in sharded for value in engine.parameters()]):
        # A hook would gather the weights of a layer for its forward pass, and release them after it.
        for engine in sharded:
            remove_hooks(engine)
        with ExitStack() as stack:
            for engine in sharded:
                stack.callback(add_hooks, engine)
                stack.enter_context(_without_start_hook(engine))
            yield


@contextmanager
def _without_start_hook(engine: Any) -> Iterator[None]:
    """Removes a hook of the whole model, in which each rank would wait for the forward passes of all others."""
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    hooks, number = offload.module._forward_pre_hooks, offload.fwd_pre_hook.id
    hook = hooks.pop(number)
    try:
        yield
    finally:
        hooks[number] = hook


def _is_sharded(engine: nn.Module) -> bool:
    return any(hasattr(value, "ds_id") for value in engine.parameters())
