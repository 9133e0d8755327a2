"""The plan of a joint run: the memory of a rank in each phase, and the time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from popi.config import JointRecipe
from popi.config.joint import Lora
from popi.engine.gguf import located
from popi.errors import ConfigError, ModelError, one_line
from popi.planning.lengths import Lengths
from popi.planning.memory import MAX_LIVE, Engine, Held, Parts, in_training, reference, sizes_of
from popi.planning.steps import Blank, Sizes, trace
from popi.training.engines import stage_of
from popi.training.models import GENERATOR, WRITER, LoraOptions, Role, is_served
from popi.training.precision import Precision, resolve
from popi.training.schedule import Kind, phases_of

GB = 10**9
CONTEXT = 1.5 * GB
"""What a process takes on a GPU besides tensors: the context of CUDA, its kernels, workspaces and the buffers of NCCL.
It was not measured here; it depends on the driver and on the number of ranks."""

SMALL = 0.1
"""Parts with a smaller share of the peak are not worth a change of the recipe."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine of a run.

    Attributes:
        ranks: Number of GPUs, or of processes on CPUs.
        memory: Memory of each in bytes.
        gpu: Whether they are GPUs.
        process: Bytes that a process takes besides tensors.
    """

    ranks: int
    memory: float
    gpu: bool = True
    process: float = CONTEXT


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """The memory of a rank in a phase.

    Attributes:
        phase: Name of the phase.
        peaks: The bytes of each moment of the phase, by part, without what is kept in the memory of the host.
        host: Bytes in the memory of the host.
    """

    phase: str
    peaks: dict[str, Parts]
    host: int = 0

    @property
    def moment(self) -> str:
        """The moment with the largest sum."""
        return max(self.peaks, key=lambda name: self.peaks[name].total())

    @property
    def peak(self) -> Parts:
        """The bytes at this moment, by part."""
        return self.peaks[self.moment]


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory of a rank.

    Attributes:
        phases: The phases, in order.
        machine: The machine.
    """

    phases: list[PhasePlan]
    machine: Machine

    @property
    def peak(self) -> PhasePlan:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.peak.total())

    @property
    def fits(self) -> bool:
        """Whether every phase fits into the memory."""
        return self.peak.peak.total() <= self.machine.memory


@dataclass
class Planner:
    """Estimates the memory of a recipe's run.

    Args:
        recipe: The recipe.
        machine: The machine.
        lengths: The longest signals, prompts, summaries and answers.

    Raises:
        ConfigError: If the recipe does not fit the number of ranks.
        ModelError: If the configuration of a model cannot be read.
    """

    recipe: JointRecipe
    machine: Machine
    lengths: Lengths
    _traced: dict[tuple[str, str], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ranks(self.recipe, self.machine.ranks)
        recipe = self.recipe
        name = resolve(recipe.precision)
        if recipe.precision == "auto" and self.machine.gpu:
            name = "mixed"
        kind = recipe.engine.kind
        self._precision = Precision.of(name, zero=stage_of(kind) > 0)
        self._engine = Engine(stage_of(kind), self.machine.ranks, recipe.engine.offload, self.machine.gpu)
        self._roles = {
            WRITER: _role(recipe.writer.model, recipe.writer.lora, trained=recipe.train != "generator"),
        }
        if not is_served(recipe.generator.model):
            trained = recipe.train != "writer"
            self._roles[GENERATOR] = _role(recipe.generator.model, recipe.generator.lora, trained=trained)
        self._configs = {role: config_of(each.model) for role, each in self._roles.items()}
        self._held = {role: self._hold(role) for role in self._roles}

    def _hold(self, role: str) -> Held:
        of = self._roles[role]
        base, adapter = sizes_of(self._configs[role], of.lora)
        return Held(base, adapter, of.dtype(self._precision), self._precision.trained)

    @cached_property
    def _one_base(self) -> bool:
        """Whether both roles compute with the same weights."""
        loras = [role.lora for role in self._roles.values()]
        same = len({role.model for role in self._roles.values()}) == 1 and None not in loras
        return self.recipe.shared or (same and self._engine.stage == 0)

    def plan(self) -> Plan:
        """The plan of the run."""
        recipe = self.recipe
        phases = phases_of(recipe.train, interleaved=recipe.schedule == "interleaved", rounds=recipe.steps_of_rounds())
        return Plan([self._phase(phase.name, phase.kind, place) for place, phase in enumerate(phases)], self.machine)

    def _phase(self, name: str, kind: Kind, place: int) -> PhasePlan:
        peaks = {moment: parts for moment, parts in self._moments(kind, place)}
        host = max(parts.pop("host memory", 0) for parts in peaks.values())
        for parts in peaks.values():
            parts["process"] = int(self.machine.process)
        return PhasePlan(name, peaks, host)

    def _moments(self, kind: Kind, place: int) -> Iterator[tuple[str, Parts]]:
        """What a rank holds at the moments of a phase, one of which is the peak."""
        recipe, engine = self.recipe, self._engine
        writes = kind != "generator"
        both = kind == "both" and recipe.train == "both" and not recipe.shared
        lead = WRITER if writes else GENERATOR
        other = GENERATOR if writes else WRITER
        always, backward, step = in_training(self._held[lead], engine, by_trainer=True)
        if writes and recipe.writer.kl_coef and recipe.train != "generator":
            always += reference(self._held[WRITER], engine)
        more_backward, more_step = Parts(), Parts()
        if both:
            more, more_backward, more_step = in_training(self._held[GENERATOR], engine, by_trainer=False)
            if self._one_base:
                more["weights"] -= self._held[GENERATOR].base * self._held[GENERATOR].dtype.itemsize
            always += more
        elif not self._one_base and other in self._held:
            always["other model"] += self._held[other].whole // (engine.ranks if self._is_sharded(kind) else 1)
        if place == 0 or engine.stage:
            yield "loading", self._loading(again=place > 0)
        if writes:
            whole = self._gathered(WRITER)
            sampled = self._traced_parts("rollouts", WRITER, "KV cache")
            yield "rollouts", always + whole + (sampled if recipe.writer.rollouts == "engine" else Parts())
            if GENERATOR in self._held:
                divided = (engine.stage == 3 and (both or recipe.shared)) or self._is_sharded(kind)
                scored = self._gathered_layers(GENERATOR) if divided else Parts()
                yield "scoring", always + scored + self._traced_parts("scoring", GENERATOR)
            if kind == "both":
                extra = more_backward if both else backward
                yield "generator update", always + extra + self._traced_parts("joint update", GENERATOR)
                yield "generator step", always + more_step
            # Shared weights have the gradient of the generator by then.
            before = self._held[WRITER].gradient_bytes if recipe.shared and kind == "both" else 0
            yield "writer update", always + backward + self._traced_parts("writer update", WRITER, before=before)
        else:
            yield "generator update", always + backward + self._traced_parts("generator update", GENERATOR)
        yield "optimizer step", always + step
        gathered = self._gathered(lead) + (self._gathered(GENERATOR) if both else Parts())
        if self._is_sharded(kind):
            gathered += Parts({"gathered weights": self._held[GENERATOR].whole})
        if gathered:
            yield "evaluation", always + gathered

    def _is_sharded(self, kind: Kind) -> bool:
        """Whether a generator that only scores in a phase is divided."""
        return kind == "writer" and self.recipe.engine.scorer == "sharded"

    def _loading(self, *, again: bool) -> Parts:
        """The whole models before an engine divides them; and, after a phase, those of the phase."""
        roles = [WRITER] if self._one_base else list(self._roles)
        parts = Parts({"weights": sum(self._held[role].whole for role in roles)})
        if again:
            # The models of the last phase are freed when the new ones have been loaded.
            trained, *others = roles
            divided = self._engine.ranks if self._engine.stage == 3 else 1
            left = sum(self._held[role].whole for role in others)
            parts["other model"] = self._held[trained].whole // divided + left
        return parts

    def _gathered(self, role: str) -> Parts:
        return Parts({"gathered weights": self._held[role].whole}) if self._engine.stage == 3 else Parts()

    def _gathered_layers(self, role: str) -> Parts:
        held = self._held[role]
        return Parts({"gathered weights": min(held.base, MAX_LIVE) * held.dtype.itemsize})

    def _traced_parts(self, part: str, role: str, own: str = "", before: int = 0) -> Parts:
        """The activations, logits and gradients of a part of a step, or its ``own`` result, in bytes."""
        footprints, result = self._trace(part, role)
        # DeepSpeed takes the gradients from the weights as soon as they have them.
        taken = self._engine.stage > 0
        peak = max(footprints, key=lambda each: each.total - taken * each.gradients)
        parts = Parts({"activations": round(peak.activations), "logits": round(peak.logits)})
        if own:
            parts[own] = result
            parts["activations"] = max(0, parts["activations"] - result)
        gradients = peak.arriving if taken else max(peak.gradients + peak.arriving, before)
        parts["gradients"] = round(gradients)
        return parts

    def _trace(self, part: str, role: str) -> Any:
        of = self._roles[role]
        # The same model in both roles is computed once.
        key = part, repr((of, self._configs[role].to_dict()))
        if key not in self._traced:
            self._traced[key] = trace(part, self.blank(role), self.sizes, self.lengths)
        return self._traced[key]

    def blank(self, role: str) -> Blank:
        """The model of a role without numbers."""
        of, held = self._roles[role], self._held[role]
        return Blank(
            self._configs[role],
            held.dtype,
            held.adapter_dtype,
            of.lora,
            autocast=self._precision.autocast,
            recompute=self.recipe.gradient_checkpointing,
            trained=of.trained,
            gpu=self.machine.gpu,
        )

    @property
    def sizes(self) -> Sizes:
        """The size of a step on one rank."""
        recipe = self.recipe
        return Sizes(
            recipe.users_per_step // self.machine.ranks,
            recipe.writer.num_generations,
            recipe.pairs_per_summary,
            recipe.batch_tokens,
        )

    def advice(self, plan: Plan) -> list[str]:
        """Fields that lower the largest parts of the peak, the largest first."""
        peak = plan.peak.peak
        found = (self._against(part) for part, size in peak.most_common() if size > SMALL * peak.total())
        return list(dict.fromkeys(each for each in found if each))[:3]

    def _against(self, part: str) -> str:
        recipe, stage = self.recipe, self._engine.stage
        if part in ("activations", "logits"):
            more = "gradient_checkpointing: true"
            return "lower batch_tokens" if recipe.gradient_checkpointing or part == "logits" else more
        if part == "KV cache":
            return "lower writer.max_tokens or users_per_step"
        if part in ("optimizer state", "master weights", "gradients", "KL reference"):
            if recipe.writer.lora is None or recipe.generator.lora is None:
                return "engine.kind: zero3" if stage < 3 else "lora in both roles, or more GPUs"
            return ""
        if part == "weights" and stage < 3 and self.machine.ranks > 1:
            return "engine.kind: zero3"
        if part == "gradient buffers":
            return ""
        return "a smaller model, or GPUs with more memory: whole models are on each of them"


def _role(name: str, lora: Lora | None, *, trained: bool) -> Role:
    options = None if lora is None else LoraOptions(lora.rank, lora.alpha, lora.targets)
    return Role(name, "", {}, options, trained)


def check_ranks(recipe: JointRecipe, ranks: int) -> None:
    """Checks that a recipe can be run in this number of ranks.

    Raises:
        ConfigError: If it cannot.
    """
    if recipe.engine.kind == "single" and ranks > 1:
        raise ConfigError(
            f"is single, but there are {ranks} GPUs", field="engine.kind", fix="plan one, or use another engine"
        )
    if recipe.users_per_step % ranks:
        raise ConfigError(
            f"{recipe.users_per_step} users cannot be divided among {ranks} GPUs",
            field="users_per_step",
            fix="use a multiple of the number of GPUs",
        )


def config_of(name: str) -> Any:
    """Reads the configuration of a model. Its weights are not needed.

    Raises:
        ModelError: If it is not on this machine, or not of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = located(name)
    try:
        config = AutoConfig.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    # A missing file, damaged JSON and an unknown type raise different errors.
    except Exception as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        fix = "give a folder with its config.json, or download the model"
        raise ModelError(f"the configuration of {name!r} cannot be read: {one_line(why)}", fix=fix) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(f"the model {name!r} does not generate text", fix="use a causal language model")
    return config
