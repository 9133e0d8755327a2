"""The writer's trainer: TRL's GRPO with our rollouts, our log-probabilities and the pairs' margins as the reward."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from popi.claims import finished_part
from popi.engine.chat_tokens import ChatTokens
from popi.engine.checks import verify
from popi.engine.decoding import Draft, decode
from popi.engine.packing import Scored
from popi.errors import InputError
from popi.prompts import Message
from popi.seeds import seed_of
from popi.summary import Author, PreferenceSummary, Provenance, read_reply
from popi.training.checkpoints import Saves
from popi.training.generator import diverged
from popi.training.likelihood import computing, token_likelihood
from popi.training.trl import GRPOConfig, GRPOTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAINED = Provenance(author=Author.INFERRED)

Earn = Callable[[list[int], list[PreferenceSummary], list[int], int], tuple[list[float], dict[str, float]]]
"""Users by their places, a summary of each, the tokens of its text and how many steps the run has done, to rewards in
nats, and to what else was measured."""


class WriterTrainer(Saves, GRPOTrainer):
    """GRPO of the writer.

    TRL keeps the loop, the groups, the loss and the checkpoints. Ours are three things behind its seams: the rollout
    (``rollout_func``), the reward (a callable), and the log-probabilities of what was sampled, which compute the
    signals of a user once for all of their summaries (``_get_per_token_logps_and_entropies``).

    Args:
        model: The writer; its initial weights are the reference of the KL divergence.
        tokenizer: Its tokenizer.
        args: TRL's arguments.
        conversations: What the writer reads of each user.
        order: Places of the users, step after step.
        names: Of the users, for an error.
        earn: Rewards summaries.
        first: Steps of the run before its own; what is drawn at random goes by the steps of the run.
        batch_tokens: The most tokens of one forward pass; the summaries of one user are sampled together even where
            they take more.
        callbacks: Of transformers.

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
        order: Sequence[int],
        names: Sequence[str],
        earn: Earn,
        batch_tokens: int,
        first: int = 0,
        callbacks: Sequence[Any] = (),
    ) -> None:
        from datasets import Dataset

        self._first = first
        self._chat = ChatTokens(tokenizer, str(model.config.name_or_path))
        self._batch_tokens = batch_tokens
        self._abilities = verify(model, self._chat, str(model.config.name_or_path))
        self._earn = earn
        assert args.max_completion_length is not None and args.num_generations is not None, "TRL's defaults are numbers"
        self._max_tokens, self._samples = args.max_completion_length, args.num_generations
        prompts = [[{"role": turn.role, "content": turn.content} for turn in messages] for messages in conversations]
        self._prompts, self._names = prompts, names
        rows = [{"prompt": prompts[place], "user": place} for place in order]
        with warnings.catch_warnings():
            # TRL calls its rollout hook experimental; the version is pinned and a test holds us to it.
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
        # Where a GPU has no room for the reference, TRL leaves parts of it elsewhere, and steps take many times longer.
        if {"cpu", "disk"} & set(map(str, getattr(self.ref_model, "hf_device_map", {}).values())):
            raise torch.OutOfMemoryError("no room for the initial writer beside the one that learns")

    @property
    def _steps_done(self) -> int:
        """Steps of the run so far."""
        return self._first + self.state.global_step

    def roll_out(self, prompts: Sequence[Sequence[dict[str, str]]]) -> dict[str, Any]:
        """Samples one summary for each prompt; the same step samples the same, whatever went before.

        Raises:
            InputError: If the chat template refuses what the writer reads.
            PopiError: If the writer's logits are no numbers.
        """
        began = time.perf_counter()
        rendered = self._chat.render([[Message(**turn) for turn in prompt] for prompt in prompts])  # type: ignore[arg-type]
        for prompt, read in zip(prompts, rendered, strict=True):
            if read.error is not None:
                name = self._names[self._prompts.index(list(prompt))]
                raise InputError(
                    f"the signals of user {name!r} cannot be read: {read.error}", fix="mend the chat template"
                )
        first = self.accelerator.process_index * len(rendered)
        drafts = [
            Draft(
                prompt.tokens,
                limit=self._max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=seed_of(self.args.seed, "rollout", self._steps_done, place),
            )
            for place, prompt in enumerate(rendered, start=first)
        ]
        # A group that has no room in one batch would have its prompt computed in each of several.
        group = max(len(prompt.tokens) for prompt in rendered) + self._samples * self._max_tokens
        model = self.accelerator.unwrap_model(self.model)
        try:
            with computing(model):
                completions = decode(
                    model,
                    drafts,
                    end_tokens=self._abilities.end_tokens,
                    batch_tokens=max(self._batch_tokens, group),
                    layout=self._abilities.layout,
                )
        except ArithmeticError as error:
            raise diverged("a logit of the writer", math.nan, self._steps_done) from error
        sampled = [completion.token_ids for completion in completions]
        self._log_metric("seconds/rollout", time.perf_counter() - began)
        self._log_metric("tokens/rollout", float(sum(map(len, sampled))))
        return {"prompt_ids": [prompt.tokens for prompt in rendered], "completion_ids": sampled, "logprobs": None}

    def _reward(self, completion_ids: Sequence[Sequence[int]], user: list[int], **_: Any) -> list[float]:
        began = time.perf_counter()
        summaries = [self.read(ids) for ids in completion_ids]
        # Citations are for the user to check, and not for the generator to read: they cost nothing.
        tokens = list(map(len, self._chat.encode([summary.text for summary in summaries])))
        rewards, figures = self._earn(user, summaries, tokens, self._steps_done)
        for name, value in figures.items():
            self._log_metric(name, value)
        silent = sum(summary.status == "not_enough_evidence" for summary in summaries)
        self._log_metric("not_enough_evidence", silent / len(summaries))
        self._log_metric("seconds/scoring", time.perf_counter() - began)
        return rewards

    def read(self, completion: Sequence[int]) -> PreferenceSummary:
        """The summary that was sampled; without its end, without what was unfinished."""
        ended = bool(completion) and completion[-1] in self._abilities.end_tokens
        text = self._chat.decode(completion[:-1] if ended else completion)
        return read_reply("", text if ended else finished_part(text) or text, (), TRAINED)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's, timed: what is neither rollout nor scoring is the update."""
        began = time.perf_counter()
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call]
        metrics = self._metrics["train"]
        spent = metrics["seconds/rollout"][-1:] + metrics["seconds/scoring"][-1:]
        self._metrics["train"]["seconds/update"].append(time.perf_counter() - began - sum(spent))
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
        """Log-probabilities of the completions: (B, ``logits_to_keep``), zero behind their ends."""
        split = input_ids.shape[1] - logits_to_keep
        items = [
            Scored(ids[:split][mask[:split].bool()].tolist(), ids[split:][mask[split:].bool()].tolist())
            for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        found = token_likelihood(
            self.accelerator.unwrap_model(model),
            items,
            batch_tokens=self._batch_tokens,
            layout=self._abilities.layout,
            temperature=self.temperature,
        )
        if torch.is_grad_enabled():
            self._metrics["train"]["tokens/update"].append(float(found.tokens))
        room = logits_to_keep - found.logps_R_T.shape[1]
        logps, entropies = (torch.nn.functional.pad(part, (0, room)) for part in (found.logps_R_T, found.entropies_R_T))
        return logps, entropies if compute_entropy else None, None


def _roll_out(prompts: Sequence[Sequence[dict[str, str]]], trainer: WriterTrainer) -> dict[str, Any]:
    return trainer.roll_out(prompts)
