"""The scorer against plain loops."""

import json
import math

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
from popi.training.scoring import Judged, PairScorer, Reference

PAIRS = [
    HeldOutPair(prompt=f"How do I {n}?", chosen=f"Like so, {n} times.", rejected="No idea " * (n + 1)) for n in range(4)
]
CONTEXTS = [None, "- short answers", "- long answers\n- no emoji"]
ITEMS = [Judged(context, pair, 0.5 * place) for place, pair in enumerate(PAIRS) for context in CONTEXTS]


@pytest.fixture
def tiny():
    model, tokenizer = tiny_model()
    return model, ChatTokens(tokenizer, "tiny"), tokenizer


async def by_hand(tiny, over="sum"):
    """Each response by itself, through the backend."""
    model, _, tokenizer = tiny
    backend = TransformersBackend.from_model(model, tokenizer, "tiny")

    async def logp(item, answer):
        [result] = await backend.score([ScoreRequest(DEFAULT.answer_messages(item.pair.prompt, item.context), answer)])
        return result.logprob / (result.tokens if over == "mean" else 1)

    return [
        await logp(item, item.pair.chosen) - await logp(item, item.pair.rejected) - item.reference for item in ITEMS
    ]


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
@pytest.mark.parametrize("over", ["sum", "mean"])
async def test_margins_are_those_of_single_responses(tiny, batch_tokens, over):
    model, tokens, _ = tiny
    scorer = PairScorer(model, tokens, batch_tokens=batch_tokens, over=over)
    assert scorer.margins(ITEMS).tolist() == pytest.approx(await by_hand(tiny, over), abs=1e-4)


def test_gradients_pass_by_pass_add_up_to_those_of_all_at_once(tiny):
    model, tokens, _ = tiny

    def gradient(batch_tokens, *, apart):
        model.zero_grad()
        scorer = PairScorer(model, tokens, batch_tokens=batch_tokens)
        for margins in (found for _, found in scorer.passes(ITEMS)) if apart else [scorer.margins_for_gradient(ITEMS)]:
            margins.sigmoid().sum().backward()
        return torch.cat([value.grad.flatten() for value in model.parameters()]), scorer.tokens

    together, _ = gradient(100_000, apart=True)
    (apart, read), (recomputed, counted) = gradient(1, apart=True), gradient(1, apart=False)
    # A margin is a small difference of large sums: their rounding weighs more in it.
    for found in (apart, recomputed):
        assert (together - found).abs().max() <= 1e-4 * together.abs().max()
    assert counted == read, "what is computed again is not read again"


def test_a_pair_that_has_no_room_is_bad_input(tiny):
    model, tokens, _ = tiny
    long = Judged("word " * 3000, PAIRS[0], 0.0)
    with pytest.raises(InputError, match=r"the pair of the prompt 'How do I 0\?' takes \d+ tokens .* holds 2048"):
        PairScorer(model, tokens).margins([long])


def test_pairs_without_room_for_a_long_summary_are_known_beforehand(tiny):
    model, tokens, _ = tiny
    scorer = PairScorer(model, tokens)
    users = [PersonalizationExample(user=UserSignals(user_id="Ada"), tests=tuple(PAIRS))]
    scorer.check(users, [""], longest=1000)
    with pytest.raises(InputError, match=r"user 'Ada': the pair of the prompt 'How do I 3\?' takes \d+ tokens, which"):
        # What the longest of them leaves, and one more.
        scorer.check(users, [""], longest=2048 - longest_pair(tokens, "") + 1)
    scorer.check(users, [""], longest=2048 - longest_pair(tokens, ""))


@pytest.mark.parametrize("context", [None, "I like tea."])
def test_pairs_without_room_for_what_is_known_to_be_told_are_known_beforehand(tiny, context):
    model, tokens, _ = tiny
    users = [PersonalizationExample(user=UserSignals(user_id="Ada"), tests=tuple(PAIRS))]
    model.config.max_position_embeddings = longest_pair(tokens, context)
    PairScorer(model, tokens).check(users, [context])
    model.config.max_position_embeddings -= 1
    with pytest.raises(
        InputError, match=r"'How do I 3\?' takes \d+ tokens, which with what the generator is told do not"
    ):
        PairScorer(model, tokens).check(users, [context])


def longest_pair(tokens, context):
    """The tokens of the longest pair under a context."""
    [prompt] = tokens.render([DEFAULT.answer_messages(PAIRS[-1].prompt, context)])
    return len(prompt.tokens) + len(tokens.encode([PAIRS[-1].rejected])[0]) + len(tokens.end_of_turn)


def test_a_score_knows_no_dropout_and_leaves_no_trace(tiny):
    model, tokens, _ = tiny
    scorer = PairScorer(model, tokens)
    expected = scorer.margins(ITEMS)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert torch.equal(scorer.margins(ITEMS), expected)


def test_the_reference_is_scored_once_and_kept(tiny, tmp_path, caplog):
    caplog.set_level("INFO", logger="popi.training.scoring")
    model, tokens, _ = tiny
    scorer = PairScorer(model, tokens)
    file = tmp_path / "reference.json"
    made = Reference.of(PAIRS, scorer, fingerprint="a", file=file, batch=3)
    assert caplog.messages == ["reference: 3 of 4 pairs scored", "reference: 4 of 4 pairs scored"]
    bare = [Judged(None, pair, made[pair]) for pair in PAIRS]
    assert scorer.margins(bare).abs().max() < 1e-4
    read = scorer.tokens
    again = Reference.of(PAIRS, scorer, fingerprint="a", file=file)
    assert scorer.tokens == read
    assert [again[pair] for pair in PAIRS] == [made[pair] for pair in PAIRS]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fingerprint": "b"}, "another model; put the model back, or choose another folder"),
        ({"pairs": PAIRS[:2]}, "another pairs"),
        ({"over": "mean"}, "another over"),
    ],
)
def test_a_stale_reference_is_refused(tiny, tmp_path, change, says):
    model, tokens, _ = tiny

    def make(pairs=PAIRS, fingerprint="a", over="sum"):
        scorer = PairScorer(model, tokens, over=over)
        return Reference.of(pairs, scorer, fingerprint=fingerprint, file=tmp_path / "reference.json")

    make()
    with pytest.raises(InputError, match=says):
        make(**change)


def test_a_reference_of_other_templates_is_refused(tiny, tmp_path):
    model, tokens, _ = tiny
    file = tmp_path / "reference.json"
    Reference.of(PAIRS, PairScorer(model, tokens), fingerprint="a", file=file)
    kept = json.loads(file.read_text())
    kept["made_of"]["template_hash"] = "old"
    file.write_text(json.dumps(kept))
    with pytest.raises(InputError, match="another template hash"):
        Reference.of(PAIRS, PairScorer(model, tokens), fingerprint="a", file=file)


def test_the_mean_over_tokens_does_not_depend_on_length(tiny, tmp_path):
    model, tokens, _ = tiny
    scorer = PairScorer(model, tokens, over="mean")
    made = Reference.of(PAIRS, scorer, fingerprint="a", file=tmp_path / "r.json")
    assert all(math.fabs(made[pair]) < 8 for pair in PAIRS)
