"""The writer's trainer: TRL's GRPO with other rollouts, and log-probabilities that share the prompt of a group."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from popi.engine.chat_tokens import ChatTokens
from popi.engine.checks import Abilities
from popi.engine.packing import Scored
from popi.errors import InputError, PopiError
from popi.prompts import Message
from popi.reasoning import strip_reasoning
from popi.seeds import seed_of
from popi.training.adapters import exclude_other_adapters
from popi.training.checkpoints import CheckpointedTrainer
from popi.training.engines import through, whole
from popi.training.generator import diverged
from popi.training.likelihood import Within, token_likelihood
from popi.training.ranks import ONE_RANK, Ranks
from popi.training.rollouts import Rollouts
from popi.training.trl import GRPOConfig, GRPOTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Parsed = TypeVar("Parsed")
Rewarded = TypeVar("Rewarded", contravariant=True)

Parse = Callable[[int, str, bool], Parsed]
"""Parses a reply. Arguments: the place of the user, the text without reasoning, and whether it was truncated."""


class RewardFn(Protocol[Rewarded]):
    """Rewards the replies of a step."""

    def __call__(
        self, users: Sequence[int], replies: Sequence[Rewarded], step: int
    ) -> tuple[list[float], dict[str, float]]:
        """Rewards each reply.

        Args:
            users: The place of the user of each reply. The replies of a group are adjacent.
            replies: The parsed replies.
            step: Number of steps of the run so far.

        Returns:
            A reward for each reply, in nats, and the metrics of the step. If it is NaN, the reply was not scored: it
            gets no advantage, and does not count for its group.
        """


class WriterTrainer(CheckpointedTrainer, GRPOTrainer, Generic[Parsed]):
    """GRPO of the writer.

    TRL provides the loop, the groups, the loss and the checkpoints. Three seams are used: the rollout
    (``rollout_func``), the reward (a callable), and the log-probabilities of the completions
    (``_get_per_token_logps_and_entropies``), which compute the prompt of a group once.

    Args:
        model: The writer. Its initial weights are the reference of the KL divergence.
        tokenizer: Its tokenizer.
        args: Arguments of TRL.
        conversations: The prompt of each user.
        names: The name of each user, for errors.
        order: Places of the users, step by step.
        parse: Parses replies.
        reward: Rewards parsed replies.
        rollouts: Samples replies.
        abilities: The layout of a batch and the end tokens.
        batch_tokens: Maximum number of tokens of a forward pass of the update.
        first: Number of steps of the run before this trainer's. Random numbers depend on the step of the run.
        ranks: The ranks of the run.
        adapter: The weights that are trained, by name, if they are not those of the model.
        within: Makes the context that the writer computes in, by default
            :func:`popi.training.likelihood.computing`.
        initial: Makes the context in which the model computes as the initial writer. Without it, the reference of the
            KL divergence is a copy of the initial model.
        callbacks: Callbacks of transformers.

    Raises:
        torch.OutOfMemoryError: If the device has no room for the reference.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: GRPOConfig,
        *,
        conversations: Sequence[Sequence[Message]],
        names: Sequence[str],
        order: Sequence[int],
        parse: Parse[Parsed],
        reward: RewardFn[Parsed],
        rollouts: Rollouts,
        abilities: Abilities,
        batch_tokens: int,
        first: int = 0,
        ranks: Ranks = ONE_RANK,
        adapter: dict[str, nn.Parameter] | None = None,
        within: Within | None = None,
        initial: Within | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        from datasets import Dataset

        self._first, self._batch_tokens, self._ranks = first, batch_tokens, ranks
        self._chat, self._abilities = ChatTokens(tokenizer, str(model.config.name_or_path)), abilities
        self._parse, self._reward_fn, self._rollouts = parse, reward, rollouts
        self._prompts = [[{"role": turn.role, "content": turn.content} for turn in turns] for turns in conversations]
        self._names = names
        self.adapter, self._within, self._initial = adapter, within, initial
        if adapter is not None:
            exclude_other_adapters(model, adapter)
        rows = [{"prompt": self._prompts[place], "user": place} for place in order]
        kl_coef = args.beta
        if initial is not None:
            # TRL would load a second model.
            args.beta = 0.0
        with warnings.catch_warnings():
            # TRL warns that its rollout hook is experimental. Its version is pinned, and tests cover the hook.
            warnings.simplefilter("ignore")
            super().__init__(
                model=model,
                reward_funcs=[self._reward],  # type: ignore[list-item]
                args=args,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=list(callbacks),
                rollout_func=_roll_out,  # type: ignore[arg-type]
            )
        if initial is not None and kl_coef:
            self.beta, self.ref_model = kl_coef, _INITIAL
        elif self.ref_model is not None:
            _copy_buffers(model, self.accelerator.unwrap_model(self.ref_model))
        if rollouts.tolerance is not None:
            # TRL corrects for the log-probabilities of another sampler only where it believes that it runs vLLM. It
            # would synchronize the weights, which the rollouts do themselves.
            self.use_vllm, self._last_loaded_step = True, -1
            self.vllm_generation: Any = SimpleNamespace(sync_weights=lambda: None)
        # If a GPU has no room for the reference, TRL offloads parts of it, and steps take many times longer.
        if {"cpu", "disk"} & set(map(str, getattr(self.ref_model, "hf_device_map", {}).values())):
            raise torch.OutOfMemoryError("no room for the initial writer beside the trained one")

    @property
    def _steps_done(self) -> int:
        """Number of steps of the run so far."""
        return self._first + self.state.global_step

    def roll_out(self, prompts: Sequence[Sequence[dict[str, str]]]) -> dict[str, Any]:
        """Samples one completion of each prompt. The samples depend only on the seed, the step and the place.

        Raises:
            InputError: If the chat template rejects a prompt.
            PopiError: If the writer's logits are not finite.
        """
        began = time.perf_counter()
        rendered = self._render(prompts)
        assert isinstance(self.args, GRPOConfig) and self.args.max_completion_length is not None, "set by TRL"
        first = self.accelerator.process_index * len(rendered)
        places = range(first, first + len(rendered))
        try:
            with whole(self.model_wrapped), self._ranks.alone():
                completions = self._rollouts.sample(
                    rendered,
                    seeds=[seed_of(self.args.seed, "rollout", self._steps_done, place) for place in places],
                    max_tokens=self.args.max_completion_length,
                    temperature=self.temperature,
                    top_p=self.top_p,
                )
        except ArithmeticError as error:
            raise diverged("a logit of the writer", math.nan, self._steps_done) from error
        sampled = [completion.token_ids for completion in completions]
        self._log_metric("seconds/rollout", time.perf_counter() - began)
        self._log_metric("tokens/rollout", self._ranks.total(sum(map(len, sampled))))
        logprobs = None if self._rollouts.tolerance is None else [completion.logprobs for completion in completions]
        return {"prompt_ids": rendered, "completion_ids": sampled, "logprobs": logprobs}

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """The batch of TRL. Compares the log-probabilities of the sampler with those of the policy.

        Raises:
            PopiError: If they differ by more than rounding, so that the sampler has other weights.
        """
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        tolerance = self._rollouts.tolerance
        if tolerance is not None:
            difference = self._metrics["train"]["sampling/sampling_logp_difference/mean"][-1]
            if not difference <= tolerance:
                raise PopiError(
                    f"the log-probabilities of the sampled tokens differ by {difference:.2g} nats from those of the "
                    f"writer after {self._steps_done} steps, more than rounding ({tolerance:g}): the sampler has other "
                    "weights; train with writer.rollouts: engine"
                )
        return batch

    def _render(self, prompts: Sequence[Sequence[dict[str, str]]]) -> list[list[int]]:
        conversations = [[Message(**turn) for turn in prompt] for prompt in prompts]  # type: ignore[arg-type]
        rendered = self._chat.render(conversations)
        for prompt, tokens in zip(prompts, rendered, strict=True):
            if tokens.error is not None:
                name = self._names[self._prompts.index(list(prompt))]
                raise InputError(
                    f"the prompt of user {name!r} cannot be rendered: {tokens.error}", fix="fix the chat template"
                )
        return [prompt.tokens for prompt in rendered]

    def _reward(self, completion_ids: Sequence[Sequence[int]], user: list[int], **_: Any) -> list[float]:
        began = time.perf_counter()
        replies = [self.read(place, tokens) for place, tokens in zip(user, completion_ids, strict=True)]
        rewards, metrics = self._reward_fn(user, replies, self._steps_done)
        for name, value in metrics.items():
            self._log_metric(name, value)
        self._log_metric("seconds/scoring", time.perf_counter() - began)
        return rewards

    def read(self, place: int, completion: Sequence[int]) -> Parsed:
        """Parses a completion of a user's prompt, as a served reply is parsed.

        Args:
            place: The place of the user.
            completion: Token ids. Without an end token, the completion was truncated.
        """
        ended = bool(completion) and completion[-1] in self._abilities.end_tokens
        text = self._chat.decode(completion[:-1] if ended else completion)
        visible = strip_reasoning(text, opened=self._chat.opens_reasoning)
        return self._parse(place, visible or "", not ended or visible is None)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The step of TRL, timed. The update is the rest of its time, without rollout and scoring."""
        began = time.perf_counter()
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call]
        metrics = self._metrics["train"]
        others = metrics["seconds/rollout"][-1:] + metrics["seconds/scoring"][-1:]
        metrics["seconds/update"].append(time.perf_counter() - began - sum(others))
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities of the completions, ``[B, logits_to_keep]``, zero after their ends."""
        split = input_ids.shape[1] - logits_to_keep
        items = [
            Scored(ids[:split][mask[:split].bool()].tolist(), ids[split:][mask[split:].bool()].tolist())
            for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        wrapper: Any = self.model if model is _INITIAL else model
        within = self._initial if model is _INITIAL else self._within
        inner = self.accelerator.unwrap_model(wrapper)

        def compute() -> tuple[Tensor, Tensor, int]:
            found = token_likelihood(
                inner,
                items,
                batch_tokens=self._batch_tokens,
                layout=self._abilities.layout,
                temperature=self.temperature,
                ranks=self._ranks,
                within=within,
            )
            return found.logps_R_T, found.entropies_R_T, found.tokens

        *found_R_T, tokens = through(wrapper, inner, compute)
        if torch.is_grad_enabled():
            self._metrics["train"]["tokens/update"].append(self._ranks.total(tokens))
        logps, entropies = (torch.nn.functional.pad(part, (0, logits_to_keep - part.shape[1])) for part in found_R_T)
        return logps, entropies if compute_entropy else None, None


def _copy_buffers(model: nn.Module, reference: nn.Module) -> None:
    """Copies what a model computes with besides its weights.

    Under ZeRO-3, transformers loads the frequencies of rotary positions in the type of the weights. In bfloat16, they
    are wrong by more with each position.
    """
    buffers = dict(reference.named_buffers())
    for name, value in model.named_buffers():
        buffers[name].data = value.detach().clone()


_INITIAL: Any = object()
"""Stands for the reference model, if the writer's model computes as the initial writer, too."""


def _roll_out(prompts: Sequence[Sequence[dict[str, str]]], trainer: WriterTrainer[Any]) -> dict[str, Any]:
    return trainer.roll_out(prompts)
