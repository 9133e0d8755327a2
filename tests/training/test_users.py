import asyncio

import pytest

from popi import registry
from popi.data.miniworld import generate
from popi.testing import ScriptedBackend
from popi.training.users import conversations, in_turn


@pytest.mark.parametrize("context_length", [None, 400])
def test_a_writer_reads_in_training_what_it_reads_in_use(context_length):
    users = list(generate(split="train", users=6, seed=3))
    backend = ScriptedBackend(context_length=context_length)
    asyncio.run(registry.make_inference("llm", backend, max_tokens=40).infer([example.user for example in users]))
    assert [list(chat.messages) for chat in backend.chats] == conversations(users, backend, 40)
    assert len({str(chat.messages) for chat in backend.chats}) == 6


def test_everybody_comes_in_turn_before_anybody_comes_again():
    order = in_turn(5, 12, seed=3)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and len(order) == 12
    assert order[:5] != order[5:10]
    assert in_turn(5, 7, seed=3) == order[:7]
