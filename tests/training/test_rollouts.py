"""Rollouts of the engine."""

import pytest
import torch

from popi.engine.chat_tokens import ChatTokens
from popi.engine.checks import verify
from popi.testing import tiny_model
from popi.training.rollouts import EngineRollouts, largest_group

PROMPTS = [[7, 8, 9, 10, 11, 12, 13, 14]] * 3 + [[20, 21, 22, 23, 24, 25]] * 3
SETTINGS = {"max_tokens": 5, "temperature": 0.7, "top_p": 1.0}


@pytest.fixture
def tiny():
    model, tokenizer = tiny_model()
    return model, verify(model, ChatTokens(tokenizer, "tiny"), "tiny")


def rollouts(tiny, batch_tokens=4096):
    return EngineRollouts(tiny[0], abilities=tiny[1], batch_tokens=batch_tokens)


def test_log_probabilities_are_those_of_whole_sequences_at_the_temperature(tiny):
    model, abilities = tiny
    for prompt, completion in zip(PROMPTS, rollouts(tiny).sample(PROMPTS, seeds=range(6), **SETTINGS), strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        logps_T_V = (model(input_ids=ids).logits[0] / 0.7).log_softmax(dim=-1)
        expected = [logps_T_V[len(prompt) - 1 + n, token].item() for n, token in enumerate(completion.token_ids)]
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
        ended = completion.token_ids[-1] in abilities.end_tokens
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.token_ids) == 5


def test_a_completion_depends_on_its_seed_only(tiny):
    all_of_them = rollouts(tiny).sample(PROMPTS, seeds=range(6), **SETTINGS)
    [alone] = rollouts(tiny).sample(PROMPTS[4:5], seeds=[4], **SETTINGS)
    assert alone.token_ids == all_of_them[4].token_ids
    assert len({tuple(each.token_ids) for each in all_of_them[:3]}) > 1


def test_a_group_is_sampled_in_one_batch_even_if_it_exceeds_the_limit(tiny):
    expected = rollouts(tiny).sample(PROMPTS, seeds=range(6), **SETTINGS)
    passes = []
    tiny[0].get_input_embeddings().register_forward_hook(lambda module, args, out: passes.append(args[0].shape))
    found = rollouts(tiny, batch_tokens=1).sample(PROMPTS, seeds=range(6), **SETTINGS)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    # Each prompt is read once, and its three completions are branches of its row.
    assert [rows for rows, columns in passes if columns > 3] == [1, 1]
    assert (1, 3) in passes


def test_the_largest_group_by_hand():
    # 8 + 3 * 5 and 6 + 3 * 5; 1 + 3 and 1 + 2 * 3
    assert largest_group(PROMPTS, 5) == 23
    assert largest_group([[1], [2], [2]], 3) == 7


def test_logits_that_are_not_finite_are_an_error(tiny):
    with torch.no_grad():
        tiny[0].get_output_embeddings().weight.fill_(float("inf"))
    with pytest.raises(ArithmeticError):
        rollouts(tiny).sample(PROMPTS[:1], seeds=[0], **SETTINGS)
