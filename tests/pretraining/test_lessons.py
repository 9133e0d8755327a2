import numpy as np
import pytest
import torch

from popi.data.miniworld.curriculum import Dilution, lesson
from popi.data.miniworld.language import as_vector, claimed_tastes, style_of
from popi.data.miniworld.phrases import VAGUE
from popi.pretraining.lessons import SignalHeads, batches, collate, encode, losses
from popi.testing import tiny_model

TASKS = ("write", "raw", "summary", "bare")


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama")


def some(count=8, signals=3):
    return [lesson(TASKS[place % 4], 5, place, signals=signals) for place in range(count)]


def test_lessons_are_rendered_by_the_templates_and_ends_of_signals_are_located(tiny):
    _, tokenizer = tiny
    for original, item in zip(some(), encode(tokenizer, some()), strict=True):
        text = tokenizer.decode(item.ids[: item.prompt])
        assert original.messages[-1].content in text
        assert tokenizer.decode(item.ids[item.prompt :]) == original.response + tokenizer.eos_token
        last = original.messages[-1].content
        for end, token in zip(original.ends, item.signal_ends, strict=True):
            assert tokenizer.decode(item.ids[: token + 1]).endswith(last[max(0, end - 5) : end + 1])


def test_styles_are_those_of_the_answers_in_the_text(tiny):
    made = lesson("write", 5, 0, signals=6)
    content = made.messages[-1].content
    assert len(made.answer_ends) == len(made.styles) > 0
    for end, style in zip(made.answer_ends, made.styles, strict=True):
        head = content[: end + 1]
        answer = max(
            (
                head.split(label)[-1]
                for label in ("read: ", "preferred: ", "over: ", "rewrote: ", "on: ", "assistant: ")
            ),
            key=lambda part: -len(part),
        )
        assert (as_vector(style_of(answer)) == style).all()


def test_packing_keeps_every_lesson_and_the_bound(tiny):
    _, tokenizer = tiny
    items = encode(tokenizer, some(16))
    longest = max(len(item.ids) for item in items)
    packed = list(batches(items, tokenizer.pad_token_id, longest * 2))
    assert sum(len(batch.ids) for batch in packed) == len(items)
    assert all(batch.ids.numel() <= longest * 2 for batch in packed)
    assert sum(len(batch.targets) for batch in packed) == sum(len(item.ids) - item.prompt for item in items)


def test_losses_equal_those_of_a_plain_forward_of_each_lesson(tiny):
    model, tokenizer = tiny
    items = encode(tokenizer, some(6))
    torch.manual_seed(0)
    heads = SignalHeads(model.config.hidden_size)
    with torch.no_grad():
        computed = losses(model, heads, collate(items, tokenizer.pad_token_id))
        expected = []
        for item in items:
            logprobs = model(torch.tensor([item.ids])).logits[0].log_softmax(-1)
            expected += [-logprobs[place - 1, item.ids[place]] for place in range(item.prompt, len(item.ids))]
    assert computed.response == pytest.approx(torch.stack(expected), abs=1e-4)
    assert len(computed.shown) == len(computed.beliefs) == sum(len(item.signal_ends) for item in items)
    assert len(computed.styles) == sum(len(item.answer_ends) for item in items)


def test_an_uninformed_reader_has_the_losses_of_chance(tiny):
    model, tokenizer = tiny
    heads = SignalHeads(model.config.hidden_size)
    for parameter in heads.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        computed = losses(model, heads, collate(encode(tokenizer, some(4)), tokenizer.pad_token_id))
    assert computed.styles == pytest.approx(np.full(len(computed.styles), 10 * np.log(2)), rel=1e-5)
    assert computed.shown == pytest.approx(np.full(len(computed.shown), 10 * np.log(3)), rel=1e-5)


def test_answers_follow_the_claims_of_their_context():
    for place in range(50):
        made = lesson("summary", 6, place, signals=0)
        claimed, style = claimed_tastes(made.messages[-1].content), style_of(made.response)
        assert all(style[name] == side for name, side in claimed.items())


def test_a_diluted_writer_has_its_habits_and_slips():
    def texts(dilution):
        return [lesson("write", 8, place, signals=8, dilution=dilution).response for place in range(160)]

    blurred, overlooked, slip = ("stance", "level", "examples"), ("opening", "units", "closing"), 0.4
    best = [claimed_tastes(text) for text in texts(None)]
    diluted = texts(Dilution(blurred, overlooked, slip))
    fates = {"seen": [], "blurred": [], "overlooked": []}
    for before, text in zip(best, diluted, strict=True):
        after = claimed_tastes(text)
        for name, side in before.items():
            habit = "blurred" if name in blurred else "overlooked" if name in overlooked else "seen"
            fate = "gone" if name not in after else "kept" if after[name] == side else "turned"
            fates[habit].append("vague" if VAGUE[name] in text else fate)
    for habit, usual in (("seen", "kept"), ("blurred", "vague"), ("overlooked", "gone")):
        for fate in ("kept", "vague", "gone", "turned"):
            expected = slip / 4 + (1 - slip) * (fate == usual)
            share = fates[habit].count(fate) / len(fates[habit])
            assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / len(fates[habit])) ** 0.5)


def test_a_lesson_depends_on_seed_and_place_alone():
    first, second = (lesson("write", 3, 4, signals=5) for _ in range(2))
    assert (first.messages, first.response, first.ends) == (second.messages, second.response, second.ends)
    assert (first.beliefs == second.beliefs).all()
