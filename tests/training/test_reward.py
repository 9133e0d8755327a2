"""What summaries earn, and what the generator learns from the same pairs."""

import pytest
import torch

from popi.data.example import HeldOutPair
from popi.engine.chat_tokens import ChatTokens
from popi.errors import PopiError
from popi.summary import Author, PreferenceSummary, Provenance
from popi.testing import tiny_model
from popi.training.objective import dpo_loss
from popi.training.reward import PairReward
from popi.training.scoring import Judged, PairScorer, Reference, reference_key

PAIRS = [
    [
        HeldOutPair(prompt=f"How do I {n}{k}?", chosen=f"Like so, {k} times.", rejected="No idea " * (n + 1))
        for k in "abc"
    ]
    for n in range(2)
]
REFERENCE = Reference(
    {reference_key(pair): 0.1 * place for place, pair in enumerate(pair for pairs in PAIRS for pair in pairs)}
)
USERS = [0, 0, 1, 1]
SUMMARIES = [
    PreferenceSummary(user_id=str(user), text=text, provenance=Provenance(author=Author.INFERRED))
    for user, text in zip(USERS, ["- short", "- long answers", "- emoji", "- no emoji at all"], strict=True)
]
TOKENS = [3, 4, 3, 6]


@pytest.fixture
def model():
    return tiny_model()[0]


def reward_of(model, **options):
    scorer = PairScorer(model, ChatTokens(tiny_model()[1], "tiny"))
    settings = {
        "loss": "dpo",
        "beta": 0.1,
        "reward_beta": 0.3,
        "pairs_per_summary": 3,
        "token_price": 0.0,
        "seed": 0,
        **options,
    }
    return scorer, PairReward(scorer, PAIRS, REFERENCE, **settings)


def judged(earn, step):
    """The items of each summary, in the order in which they judge it."""
    return [
        [Judged(summary.text, pair, REFERENCE[pair]) for pair in earn._judges(user, step)]
        for user, summary in zip(USERS, SUMMARIES, strict=True)
    ]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("learns", [False, True])
def test_a_summary_earns_minus_the_mean_loss_of_its_pairs_and_pays_for_its_tokens(model, count, learns):
    scorer, earn = reward_of(model, pairs_per_summary=count, token_price=0.5, keep_gradient=learns)
    earned, figures = earn(USERS, SUMMARIES, TOKENS, 4)
    expected = [
        -dpo_loss(scorer.margins(items), 0.3).mean().item() - 0.5 * tokens
        for items, tokens in zip(judged(earn, 4), TOKENS, strict=True)
    ]
    assert earned == pytest.approx(expected, abs=1e-4)
    assert 0 <= figures["accuracy"] <= 1


def test_the_generator_learns_from_one_pair_of_each_summary_in_turn(model):
    scorer, earn = reward_of(model, keep_gradient=True)
    earn(USERS, SUMMARIES, TOKENS, 4)
    found = torch.cat([value.grad.flatten() for value in model.parameters()])
    model.zero_grad()
    one, two, three, four = judged(earn, 4)
    lessons = [one[0], two[1], three[0], four[1]]
    for _, margins in scorer.passes(lessons):
        (dpo_loss(margins, 0.1).sum() / len(lessons)).backward()
    expected = torch.cat([value.grad.flatten() for value in model.parameters()])
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_where_nobody_learns_no_gradient_is_collected(model):
    _, earn = reward_of(model)
    earn(USERS, SUMMARIES, TOKENS, 0)
    assert all(value.grad is None for value in model.parameters())


def test_summaries_of_a_user_have_the_same_judges_and_a_step_has_its_own(model):
    _, earn = reward_of(model, pairs_per_summary=2)
    assert earn._judges(0, 1) == earn._judges(0, 1)
    assert len({tuple(pair.prompt for pair in earn._judges(0, step)) for step in range(10)}) > 1


def test_a_loss_that_is_no_number_is_an_error(model):
    _, earn = reward_of(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(PopiError, match="the loss became nan after 7 steps"):
        earn(USERS, SUMMARIES, TOKENS, 7)
