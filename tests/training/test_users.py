import asyncio

import pytest

from popi import registry
from popi.data.example import HeldOutPair, PersonalizationExample
from popi.data.miniworld import generate
from popi.errors import InputError
from popi.io import write_jsonl
from popi.signals import PreferencePair, Statement, UserSignals
from popi.testing import ScriptedBackend
from popi.training.formats import summary_format
from popi.training.users import epoch_order, read_users, summary_prompts


@pytest.mark.parametrize("context_length", [None, 400])
def test_a_writer_reads_the_same_prompt_in_training_and_in_serving(context_length):
    users = list(generate(split="train", users=6, seed=3))
    backend = ScriptedBackend(lambda request: "- short", context_length=context_length)
    served = registry.make_inference("llm", backend, max_tokens=40)
    asyncio.run(served.infer([example.user for example in users]))
    trained = summary_format("llm", backend, max_tokens=40, options={})
    assert [chat.messages for chat in backend.chats] == [each.messages for each in summary_prompts(users, trained)]
    assert len({str(chat.messages) for chat in backend.chats}) == 6


def test_everybody_comes_epoch_order_before_anybody_comes_again():
    order = epoch_order(5, 12, seed=3)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and len(order) == 12
    assert order[:5] != order[5:10]
    assert epoch_order(5, 7, seed=3) == order[:7]


def test_held_out_pairs_among_the_signals_are_refused(tmp_path):
    pair = {"prompt": "How?", "chosen": "So.", "rejected": "No."}
    user = UserSignals(user_id="ann", signals=(PreferencePair(**pair),))
    write_jsonl(tmp_path / "users.jsonl", [PersonalizationExample(user=user, tests=(HeldOutPair(**pair),))])
    with pytest.raises(InputError, match=r"users\.jsonl:1, field tests\.0: .* 1 of 1 held-out pairs of user 'ann'"):
        read_users(tmp_path / "users.jsonl", users=None, held_out=1, seed=0)


def test_users_who_share_their_pairs_with_held_out_ones_are_counted(tmp_path):
    made = [
        PersonalizationExample(
            user=UserSignals(user_id=f"user {n}", signals=(Statement(text="I like tea."),)),
            tests=(HeldOutPair(prompt="How?", chosen="So.", rejected="No."),),
            facts={"cluster": f"cluster {n % 3}"},
        )
        for n in range(30)
    ]
    write_jsonl(tmp_path / "users.jsonl", made)
    people = read_users(tmp_path / "users.jsonl", users=None, held_out=3, seed=0)
    assert (len(people.train), len(people.held_out)) == (20, 3)
    assert people.left_out == {"users who share their pairs with held-out users": 7}
