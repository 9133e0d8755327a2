"""The scorer against plain loops."""

from dataclasses import replace

import pytest
import torch

from popi.backends.base import ScoreRequest
from popi.backends.transformers import TransformersBackend
from popi.data.example import HeldOutPair, PersonalizationExample
from popi.engine.chat_tokens import ChatTokens
from popi.errors import InputError
from popi.prompts import DEFAULT
from popi.signals import UserSignals
from popi.testing import tiny_model
from popi.training.reference import Reference
from popi.training.scoring import NO_REFERENCE, ConditionedPair, PairLogps
from tests.training.helpers import answer_format, scorer_of, summary

PAIRS = [
    HeldOutPair(prompt=f"How do I {n}?", chosen=f"Like so, {n} times.", rejected="No idea " * (n + 1)) for n in range(4)
]
CONTEXTS = [None, "- short answers", "- long answers\n- no emoji"]
ITEMS = [
    ConditionedPair(context and summary(context), pair, PairLogps(0.5 * place, 0.25))
    for place, pair in enumerate(PAIRS)
    for context in CONTEXTS
]


@pytest.fixture
def tiny():
    return tiny_model()


async def by_hand(tiny, reduction="sum"):
    """Each response by itself, through the backend."""
    backend = TransformersBackend.from_model(*tiny, "tiny")

    async def logp(item, answer):
        messages = DEFAULT.answer_messages(item.pair.prompt, item.interface and item.interface.text)
        [result] = await backend.score([ScoreRequest(messages, answer)])
        return result.logprob / (result.tokens if reduction == "mean" else 1)

    return [
        [
            await logp(item, item.pair.chosen) - item.reference.chosen,
            await logp(item, item.pair.rejected) - item.reference.rejected,
        ]
        for item in ITEMS
    ]


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
async def test_ratios_are_those_of_single_responses(tiny, batch_tokens, reduction):
    ratios = scorer_of(*tiny, batch_tokens=batch_tokens, reduction=reduction).ratios(ITEMS)
    for found, expected in zip(
        zip(ratios.chosen_N.tolist(), ratios.rejected_N.tolist(), strict=True),
        await by_hand(tiny, reduction),
        strict=True,
    ):
        assert list(found) == pytest.approx(expected, abs=1e-4)


def test_gradients_pass_by_pass_add_up_to_those_of_all_at_once(tiny):
    model, tokenizer = tiny

    def gradient(batch_tokens, *, apart):
        model.zero_grad()
        scorer = scorer_of(model, tokenizer, batch_tokens=batch_tokens)
        before = scorer.tokens_read
        passes = (compute()[1] for compute in scorer.passes(ITEMS)) if apart else [scorer.ratios_for_gradient(ITEMS)]
        for ratios in passes:
            ratios.margins_N.sigmoid().sum().backward()
        return torch.cat([value.grad.flatten() for value in model.parameters()]), scorer.tokens_read - before

    together, _ = gradient(100_000, apart=True)
    (apart, read), (recomputed, counted) = gradient(1, apart=True), gradient(1, apart=False)
    # A margin is a small difference of large sums, so their rounding has a larger share in it.
    for found in (apart, recomputed):
        assert (together - found).abs().max() <= 1e-4 * together.abs().max()
    assert counted == read, "recomputed activations are not read again"


def longest_pair(tokenizer, context):
    """The tokens of the longest pair under a context."""
    tokens = ChatTokens(tokenizer, "tiny")
    [prompt] = tokens.render([DEFAULT.answer_messages(PAIRS[-1].prompt, context)], answered=True)
    return len(prompt.tokens) + len(tokens.encode_responses([PAIRS[-1].rejected])[0])


def test_a_pair_that_does_not_fit_by_itself_is_an_error(tiny):
    long = HeldOutPair(prompt="word " * 3000, chosen="yes", rejected="no")
    with pytest.raises(
        InputError, match=r"the pair with the prompt '(word )+' needs \d+ tokens .* has a context of 2048; remove"
    ):
        scorer_of(*tiny).ratios([ConditionedPair(summary("- short"), long, NO_REFERENCE)])


def test_a_summary_that_does_not_fit_with_its_pair_is_cut_after_a_line(tiny):
    """The writer's tokenizer may count fewer tokens than that of the generator."""
    model, tokenizer = tiny
    kept = "- likes tea\n- likes short answers"
    model.config.max_position_embeddings = longest_pair(tokenizer, kept) + 3
    scorer = scorer_of(model, tokenizer)
    found, expected = (
        scorer.ratios([ConditionedPair(summary(text), PAIRS[-1], NO_REFERENCE)]).chosen_N.item()
        for text in (f"{kept}\n- wants {'very ' * 500}long answers", kept)
    )
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("context", "reserve"), [("", 1000), (None, 0), ("I like tea.", 0)])
def test_pairs_that_do_not_fit_are_found_before_training(tiny, context, reserve):
    model, tokenizer = tiny
    users = [PersonalizationExample(user=UserSignals(user_id="Ada"), tests=tuple(PAIRS))]
    interfaces = [None if context is None else summary(context)]
    model.config.max_position_embeddings = longest_pair(tokenizer, context) + reserve
    scorer_of(model, tokenizer).check(users, interfaces, reserve=reserve)
    model.config.max_position_embeddings -= 1
    with pytest.raises(
        InputError, match=r"user 'Ada': the pair with the prompt 'How do I 3\?' needs \d+ tokens with its"
    ):
        scorer_of(model, tokenizer).check(users, interfaces, reserve=reserve)


def test_scoring_disables_dropout_and_restores_the_mode(tiny):
    model, _ = tiny
    scorer = scorer_of(*tiny)
    expected = scorer.ratios(ITEMS).margins_N
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert torch.equal(scorer.ratios(ITEMS).margins_N, expected) and model.training


def test_the_reference_is_scored_once_and_stored(tiny, tmp_path, caplog):
    caplog.set_level("INFO", logger="popi.training.reference")
    scorer = scorer_of(*tiny)
    file = tmp_path / "reference.json"
    made = Reference.of(PAIRS, scorer, fingerprint="a", file=file, batch=3)
    first, *scored = caplog.messages
    assert first == "reference: scoring 4 pairs"
    assert scored == ["reference: scored 3 of 4 pairs", "reference: scored 4 of 4 pairs"]
    plain = scorer.ratios([ConditionedPair(None, pair, made[pair]) for pair in PAIRS])
    assert max(plain.chosen_N.abs().max(), plain.rejected_N.abs().max()) < 1e-4
    read = scorer.tokens_read
    again = Reference.of(PAIRS, scorer, fingerprint="a", file=file)
    assert scorer.tokens_read == read
    assert [again[pair] for pair in PAIRS] == [made[pair] for pair in PAIRS]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fingerprint": "b"}, "another model; restore the model, or choose another folder"),
        ({"pairs": PAIRS[:2]}, "another pairs; remove it"),
        ({"reduction": "mean"}, "another reduction; remove it"),
        ({"format": answer_format(prompts=replace(DEFAULT, answer="{context} {prompt}"))}, "another template hash"),
    ],
)
def test_a_reference_of_something_else_is_refused(tiny, tmp_path, change, says):
    def make(pairs=PAIRS, fingerprint="a", reduction="sum", format=None):
        scorer = scorer_of(*tiny, reduction=reduction, format=format)
        return Reference.of(pairs, scorer, fingerprint=fingerprint, file=tmp_path / "reference.json")

    make()
    with pytest.raises(InputError, match=says):
        make(**change)


def test_the_mean_over_tokens_does_not_depend_on_length(tiny, tmp_path):
    made = Reference.of(PAIRS, scorer_of(*tiny, reduction="mean"), fingerprint="a", file=tmp_path / "r.json")
    assert all(-8 < value < 0 for pair in PAIRS for value in made[pair])
