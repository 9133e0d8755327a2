"""POPI in one file: joint training of a writer and a generator, without a framework.

    python recipes/bare/popi_loop.py --steps 120 --out curve.jsonl

The writer q_phi reads a user's signals s and writes a summary z. The generator pi_theta responses a prompt x under z.
Both are trained on the same pairs (x, y_w, y_l) of the same user, which the signals do not show:

    h = [log pi_theta(y_w|x,z) - log pi_theta(y_l|x,z)] - [log pi_ref(y_w|x) - log pi_ref(y_l|x)]
    loss = -log sigmoid(beta h) / beta      theta follows its gradient; the reward of z is -loss with another beta

Users are processed one at a time, for readability. ``popi.training`` is the fast implementation.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from popi.claims import as_text, finished_part, parse_claims
from popi.data.example import HeldOutPair, PersonalizationExample
from popi.data.miniworld import generate
from popi.models import find
from popi.prompts import DEFAULT, Message
from popi.render import render_signals

MODEL = "popi-mini-base"
USERS_PER_STEP, NUM_GENERATIONS, PAIRS, MAX_TOKENS, TEMPERATURE = 8, 8, 4, 96, 0.8
WRITER_LR, GENERATOR_LR, WARMUP, WRITER_MAX_NORM, GENERATOR_MAX_NORM = 1.5e-4, 1e-4, 5, 1.0, 10.0
BETA, REWARD_BETA, KL_COEF, LENGTH_PENALTY = 0.5, 0.02, 5e-3, 0.03


class Chat:
    """A model with its tokenizer.

    Args:
        name: Path of the model.
    """

    def __init__(self, name: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

    def prompt(self, messages: list[Message]) -> Tensor:
        """A conversation as token ids, up to the start of the response, ``[T]``."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def response(self, text: str) -> Tensor:
        """A response as token ids, with the end of its turn, ``[S]``."""
        return torch.tensor(self.tokenizer(text + self.tokenizer.eos_token, add_special_tokens=False)["input_ids"])

    def length(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def sample(self, prompt_T: Tensor, count: int, *, greedy: bool = False) -> list[Tensor]:
        """Continues one prompt ``count`` times; the prompt is computed once."""
        end = self.tokenizer.eos_token_id
        out = self.model(prompt_T[None], use_cache=True)
        cache = out.past_key_values
        cache.batch_repeat_interleave(count)
        logits_G_V = out.logits[:, -1].expand(count, -1)
        tokens_G_S = torch.empty((count, 0), dtype=torch.long)
        while tokens_G_S.shape[1] < MAX_TOKENS and not (tokens_G_S == end).any(dim=1).all():
            probs_G_V = (logits_G_V / TEMPERATURE).softmax(dim=-1)
            next_G = probs_G_V.argmax(dim=-1) if greedy else torch.multinomial(probs_G_V, 1)[:, 0]
            tokens_G_S = torch.cat([tokens_G_S, next_G[:, None]], dim=1)
            logits_G_V = self.model(next_G[:, None], past_key_values=cache).logits[:, -1]
        rows = [row.tolist() for row in tokens_G_S]
        return [torch.tensor(row[: row.index(end) + 1] if end in row else row) for row in rows]

    def logps(self, prompt_T: Tensor, responses: list[Tensor], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities of responses to one prompt, and the mask of their tokens, ``[G, S]`` each.

        The prompt is computed once, with gradients. The responses continue its cache.
        """
        ones = [torch.ones(len(response)) for response in responses]
        mask_G_S = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
        tokens_G_S = torch.nn.utils.rnn.pad_sequence(responses, batch_first=True)
        out = self.model(prompt_T[None], use_cache=True)
        cache = out.past_key_values
        cache.batch_repeat_interleave(len(responses))
        first = out.logits[:, -1:].expand(len(responses), -1, -1)
        rest = self.model(tokens_G_S[:, :-1], past_key_values=cache).logits
        logps_G_S_V = (torch.cat([first, rest], dim=1) / temperature).log_softmax(dim=-1)
        return logps_G_S_V.gather(2, tokens_G_S[:, :, None])[:, :, 0] * mask_G_S, mask_G_S

    def preference(self, pair: HeldOutPair, context: str | None) -> Tensor:
        """Log pi(y_w|x,z) - log pi(y_l|x,z), a scalar in nats."""
        responses = [self.response(pair.chosen), self.response(pair.rejected)]
        logps_2_S, _ = self.logps(self.prompt(DEFAULT.answer_messages(pair.prompt, context)), responses)
        chosen, rejected = logps_2_S.sum(dim=1)
        return chosen - rejected


def read_signals(writer: Chat, user: PersonalizationExample) -> Tensor:
    """The prompt of the writer."""
    return writer.prompt(DEFAULT.inference_messages(render_signals(user.user.signals, len).text))


def read_summary(writer: Chat, tokens: Tensor) -> str:
    """The summary that the generator reads: the complete claims of the writer, without citations."""
    text = writer.tokenizer.decode(tokens, skip_special_tokens=True)
    truncated = tokens[-1] != writer.tokenizer.eos_token_id
    return as_text(parse_claims(finished_part(text) if truncated else text))


def loss_of(h: Tensor, beta: float) -> Tensor:
    """The DPO loss of a margin, in nats."""
    return -logsigmoid(beta * h) / beta


def accuracy(h: Tensor) -> float:
    """Share of positive margins. A tie counts one half."""
    return ((h > 0).double() + (h == 0).double() / 2).mean().item()


def share_of_rate(step: int, steps: int) -> float:
    """Learning rate of a step, as a share of its peak: a linear warmup and a cosine decay. Steps start at 0."""
    if step < WARMUP:
        return step / WARMUP
    return (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))) / 2


def compute_gradients(
    writer: Chat, initial: Chat, generator: Chat, reference: Chat, users: list[PersonalizationExample]
) -> dict[str, float]:
    """Computes the gradients of both models on some users, and returns the metrics."""
    rewards, accuracies = [], []
    for user in users:
        prompt_T = read_signals(writer, user)
        samples = writer.sample(prompt_T, NUM_GENERATIONS)
        pairs = random.sample(user.tests, PAIRS)
        with torch.no_grad():
            reference_P = torch.stack([reference.preference(pair, None) for pair in pairs])

        # The generator is trained on one of the pairs. All of them score the summary.
        rewards_G = torch.zeros(NUM_GENERATIONS)
        for place, tokens in enumerate(samples):
            summary = read_summary(writer, tokens)
            with torch.no_grad():
                h_P = torch.stack([generator.preference(pair, summary) for pair in pairs]) - reference_P
            one = place % PAIRS
            h = generator.preference(pairs[one], summary) - reference_P[one]
            (loss_of(h, BETA) / (NUM_GENERATIONS * len(users))).backward()
            rewards_G[place] = -loss_of(h_P, REWARD_BETA).mean() - LENGTH_PENALTY * writer.length(summary)
            accuracies.append(accuracy(h_P))

        # The writer: advantages against the mean of the group, and the KL divergence from the initial writer.
        advantages_G = rewards_G - rewards_G.mean()
        logps_G_S, mask_G_S = writer.logps(prompt_T, samples, TEMPERATURE)
        with torch.no_grad():
            initial_G_S, _ = initial.logps(prompt_T, samples, TEMPERATURE)
        ratio_G_S = (logps_G_S - logps_G_S.detach()).exp()
        log_r_G_S = initial_G_S - logps_G_S
        kl_G_S = log_r_G_S.exp() - log_r_G_S - 1
        loss_G_S = (-ratio_G_S * advantages_G[:, None] + KL_COEF * kl_G_S) * mask_G_S
        ((loss_G_S.sum(dim=1) / mask_G_S.sum(dim=1)).mean() / len(users)).backward()
        rewards.append(rewards_G.mean().item())
    return {"reward": sum(rewards) / len(rewards), "accuracy": sum(accuracies) / len(accuracies)}


@torch.no_grad()
def evaluate(writer: Chat, generator: Chat, reference: Chat, users: list[PersonalizationExample]) -> float:
    """Preference accuracy on held-out users."""
    accuracies = []
    for user in users:
        [tokens] = writer.sample(read_signals(writer, user), 1, greedy=True)
        summary = read_summary(writer, tokens)
        for pair in user.tests:
            accuracies.append(accuracy(generator.preference(pair, summary) - reference.preference(pair, None)))
    return sum(accuracies) / len(accuracies)


def main() -> None:
    """Trains, and prints one line per step."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default=MODEL)
    arguments.add_argument("--steps", type=int, default=120)
    arguments.add_argument("--users-per-step", type=int, default=USERS_PER_STEP)
    arguments.add_argument("--held-out", type=int, default=64)
    arguments.add_argument("--every", type=int, default=25, help="steps between evaluations on held-out users")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, help="also write the metrics to this file")
    given = arguments.parse_args()
    random.seed(given.seed)
    torch.manual_seed(given.seed)

    writer, generator = Chat(find(given.model)), Chat(find(given.model))
    initial, reference = copy.deepcopy(writer), copy.deepcopy(generator)
    trained = [(writer, WRITER_LR, WRITER_MAX_NORM), (generator, GENERATOR_LR, GENERATOR_MAX_NORM)]
    optimizers = [torch.optim.AdamW(chat.model.parameters(), lr=rate, weight_decay=0.0) for chat, rate, _ in trained]

    held_out = list(generate(split="validation", users=given.held_out, seed=given.seed))
    users = generate(split="train", users=given.steps * given.users_per_step, seed=given.seed)
    if given.out:
        given.out.write_text("")
    for step in range(1, given.steps + 1):
        began = time.perf_counter()
        batch = [next(users) for _ in range(given.users_per_step)]
        metrics = compute_gradients(writer, initial, generator, reference, batch)
        for (chat, rate, clip), optimizer in zip(trained, optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(chat.model.parameters(), clip)
            optimizer.param_groups[0]["lr"] = rate * share_of_rate(step - 1, given.steps)
            optimizer.step()
            optimizer.zero_grad()
        line = {"step": step, **metrics, "seconds": time.perf_counter() - began}
        if step % given.every == 0 or step == given.steps:
            line["held_out_accuracy"] = evaluate(writer, generator, reference, held_out)
        print(json.dumps(line), flush=True)
        if given.out:
            with given.out.open("a") as lines:
                lines.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
