"""The rewards of summaries, and the training of the generator on the same pairs."""

import pytest
import torch

from popi.data.example import HeldOutPair
from popi.errors import PopiError
from popi.roles import Failure, SummaryPrompt
from popi.signals import Statement, UserSignals
from popi.testing import tiny_model
from popi.training.objective import dpo_loss
from popi.training.reference import Reference, reference_key
from popi.training.reward import PairReward
from popi.training.scoring import ConditionedPair, PairLogps
from popi.training.updates import SharedUpdate
from popi_inference.format import PromptedSummary
from tests.training.helpers import scorer_of, summary

PAIRS = [
    [
        HeldOutPair(prompt=f"How do I {n}{k}?", chosen=f"Like so, {k} times.", rejected="No idea " * (n + 1))
        for k in "abc"
    ]
    for n in range(2)
]
REFERENCE = Reference(
    {
        reference_key(pair): PairLogps(0.1 * place, -0.2)
        for place, pair in enumerate(pair for pairs in PAIRS for pair in pairs)
    }
)
USERS = [0, 0, 1, 1]
SUMMARIES = [
    summary(text, str(user))
    for user, text in zip(USERS, ["- short", "- long answers", "- emoji", "- no emoji at all"], strict=True)
]


@pytest.fixture
def model():
    return tiny_model()[0]


def reward_of(model, **options):
    scorer = scorer_of(model, tiny_model()[1])
    settings = {
        "loss": "dpo",
        "beta": 0.1,
        "reward_beta": 0.3,
        "pairs_per_summary": 3,
        "length_penalty": 0.0,
        "count_tokens": lambda text: len(text.split()),
        "seed": 0,
        **options,
    }
    return scorer, PairReward(scorer, PAIRS, REFERENCE, **settings)


def left(model):
    """An update that leaves the gradient in the model."""
    return SharedUpdate(model, lambda: model)


def items_of(reward, step):
    """The items of each summary, in order."""
    return [
        [ConditionedPair(summary, pair, REFERENCE[pair]) for pair in reward._choose(user, step)]
        for user, summary in zip(USERS, SUMMARIES, strict=True)
    ]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("learns", [False, True])
def test_a_reward_is_minus_the_mean_loss_and_the_length_penalty(model, count, learns):
    scorer, reward = reward_of(
        model, pairs_per_summary=count, length_penalty=0.5, update=left(model) if learns else None
    )
    earned, metrics = reward(USERS, SUMMARIES, 4)
    expected = [
        -dpo_loss(scorer.ratios(items).margins_N, 0.3).mean().item() - 0.5 * len(summary.text.split())
        for items, summary in zip(items_of(reward, 4), SUMMARIES, strict=True)
    ]
    assert earned == pytest.approx(expected, abs=1e-4)
    assert 0 <= metrics["rewards/accuracies"] <= 1


def test_the_generator_is_trained_on_one_pair_of_each_summary_in_turn(model):
    scorer, reward = reward_of(model, update=left(model))
    reward(USERS, SUMMARIES, 4)
    found = torch.cat([value.grad.flatten() for value in model.parameters()])
    model.zero_grad()
    one, two, three, four = items_of(reward, 4)
    trained = [one[0], two[1], three[0], four[1]]
    for compute in scorer.passes(trained):
        _, ratios = compute()
        (dpo_loss(ratios.margins_N, 0.1).sum() / len(trained)).backward()
    expected = torch.cat([value.grad.flatten() for value in model.parameters()])
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_without_training_there_is_no_gradient(model):
    _, reward = reward_of(model)
    reward(USERS, SUMMARIES, 0)
    assert all(value.grad is None for value in model.parameters())


def test_all_summaries_of_a_user_in_a_step_have_the_same_pairs(model):
    _, reward = reward_of(model, pairs_per_summary=2)
    assert reward._choose(0, 1) == reward._choose(0, 1)
    assert len({tuple(pair.prompt for pair in reward._choose(0, step)) for step in range(10)}) > 1


def test_a_loss_that_is_not_finite_is_an_error(model):
    _, reward = reward_of(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(PopiError, match="the loss became nan after 7 steps"):
        reward(USERS, SUMMARIES, 7)


def test_a_reply_that_is_not_a_summary_is_rewarded_as_not_enough_evidence(model):
    _, reward = reward_of(model, length_penalty=0.5)
    nothing = summary("", "0").edit("")
    (of_failure, metrics), (of_nothing, others) = (
        reward([0], [reply], 4) for reply in (Failure("0", "the reply repeats itself"), nothing)
    )
    assert of_failure == pytest.approx(of_nothing)
    assert (metrics["summaries/failed"], metrics["summaries/not_enough_evidence"]) == (1.0, 1.0)
    assert (others["summaries/failed"], others["summaries/not_enough_evidence"]) == (0.0, 1.0)


def test_citations_cost_nothing(model):
    _, reward = reward_of(model, length_penalty=0.5)
    prompt = SummaryPrompt(UserSignals(user_id="0", signals=(Statement(id="a", text="I like lists."),)), (), ("a",))
    parse = PromptedSummary(len, budget=100, max_tokens=100).parse
    plain, cited = (reward([0], [parse(prompt, reply)], 4)[0] for reply in ("- likes lists", "- likes lists [1]"))
    assert plain == cited
