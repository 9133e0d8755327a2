"""A role that a user wrote is trained and served with the same messages."""

import asyncio
import json

import pytest
import torch
import yaml

from popi import registry
from popi.backends.transformers import TransformersBackend
from popi.config import load
from popi.data.example import HeldOutPair, PersonalizationExample
from popi.data.reading import read_examples
from popi.engine.chat_tokens import ChatTokens
from popi.errors import ConfigError
from popi.interface import UserEmbedding
from popi.io import write_jsonl
from popi.prompts import Message
from popi.roles import AnswerFormat, Candidate, Conditioned, SummaryFormat, SummaryPrompt, infer_or_nothing
from popi.signals import Statement, UserSignals
from popi.testing import ScriptedBackend
from popi.trained import training_record
from popi.training.formats import answer_format, summary_format
from popi.training.joint import run
from popi_generators import PromptedGenerator
from popi_inference import LLMSummarizer
from popi_inference.format import PromptedSummary
from tests.brief import brief_model


class NotesFormat(AnswerFormat):
    """Puts the summary into a system message."""

    def render(self, prompt, interface):
        if interface is None:
            return [Message("user", prompt)]
        assert not isinstance(interface, UserEmbedding)
        return [Message("system", f"Notes about the reader:\n{interface.text}"), Message("user", prompt)]


class NotesGenerator(PromptedGenerator):
    """A generator with a prompt of its own."""

    def __init__(self, backend, *, max_tokens: int = 256):
        super().__init__(backend, max_tokens=max_tokens, format=NotesFormat())


class ListFormat(SummaryFormat):
    """Asks for a list in few words."""

    def __init__(self, backend, max_tokens):
        self._default = PromptedSummary(backend.count_tokens, budget=200, max_tokens=max_tokens)

    def render(self, user):
        texts = [signal.text for signal in user.signals if signal.kind == "statement"]
        return SummaryPrompt(user, (Message("user", "List their tastes: " + " ".join(texts)),), ())

    def parse(self, prompt, reply, *, truncated=False):
        return self._default.parse(prompt, reply, truncated=truncated)


class ListWriter(LLMSummarizer):
    """An inference with a prompt of its own."""

    def __init__(self, backend, **options):
        options.setdefault("max_tokens", 8)
        super().__init__(backend, format=ListFormat(backend, options["max_tokens"]), **options)


HERE = "tests.training.test_roles"
PAIRS = tuple(HeldOutPair(prompt=f"What about {k}?", chosen=f"This {k}.", rejected="That, I think.") for k in "ab")


@pytest.fixture
def recipe(tmp_path):
    for name in ("one", "two"):
        model, tokenizer = brief_model(seed=name == "two")
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    users = [
        PersonalizationExample(
            user=UserSignals(user_id=f"user {n}", signals=(Statement(text=f"I like answer {n}."),)), tests=PAIRS
        )
        for n in range(8)
    ]
    write_jsonl(tmp_path / "users.jsonl", users)
    tree = {
        "task": "joint",
        "name": "tiny",
        "data": {"file": str(tmp_path / "users.jsonl")},
        "writer": {
            "model": str(tmp_path / "one"),
            "inference": f"{HERE}:ListWriter",
            "learning_rate": 0.01,
            "num_generations": 2,
            "max_tokens": 8,
        },
        "generator": {"model": str(tmp_path / "two"), "generation": f"{HERE}:NotesGenerator", "learning_rate": 0.01},
        "steps": 10,
        "users_per_step": 2,
        "warmup": 1,
        "evaluate_every": 10,
        "evaluate_users": 2,
        "checkpoint_every": 10,
        "precision": "float32",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return load(tmp_path / "recipe.yaml", {})


@pytest.fixture
def rendered(monkeypatch):
    """All conversations that any model of this process reads."""
    conversations = []
    render = ChatTokens.render

    def recorded(self, given, **options):
        conversations.extend(tuple(conversation) for conversation in given)
        return render(self, given, **options)

    monkeypatch.setattr(ChatTokens, "render", recorded)
    return conversations


@pytest.mark.slow
def test_a_role_of_ones_own_is_trained_and_served_with_the_same_messages(recipe, rendered, tmp_path):
    run(recipe, tmp_path / "run", source="a test", report=lambda metrics: None)
    trained = list(rendered)
    rendered.clear()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 10

    writer, generator = (TransformersBackend(str(tmp_path / "run" / role)) for role in ("writer", "generator"))
    sample = json.loads(sorted((tmp_path / "run" / "samples").iterdir())[-1].read_text().splitlines()[0])
    [user] = [each.user for each in read_examples(tmp_path / "users.jsonl") if each.user.user_id == sample["user_id"]]
    inference = registry.make_inference(f"{HERE}:ListWriter", writer)
    [[summary], _] = asyncio.run(infer_or_nothing(inference, [user]))
    assert summary.text == sample["text"]
    served = registry.make_generator(f"{HERE}:NotesGenerator", generator)
    items = [Conditioned("What about a?", summary), Conditioned("What about a?")]
    asyncio.run(served.score([Candidate(item, "This a.") for item in items]))
    # Loading a model renders other probes, and a reply that is not a summary is requested twice.
    texts = "List their", "What about a?"
    own = [each for each in dict.fromkeys(rendered) if any(text in each[-1].content for text in texts)]
    assert [[message.role for message in each] for each in own] == [["user"], ["system", "user"], ["user"]]
    assert own[1][0].content == f"Notes about the reader:\n{sample['text']}"
    assert all(conversation in trained for conversation in own)


@pytest.mark.slow
def test_the_record_of_a_trained_model_has_the_hash_of_its_own_templates(recipe, tmp_path, caplog):
    recipe = recipe.model_copy(update={"steps": 1})
    run(recipe, tmp_path / "run", source="a test", report=lambda metrics: None)
    writer, generator = (training_record(str(tmp_path / "run" / role)) for role in ("writer", "generator"))
    assert generator.template_hash == NotesFormat().template_hash != writer.template_hash
    weights = torch.load(tmp_path / "run" / "phases" / "1-both" / "weights.pt", weights_only=True)
    assert set(weights) == {"writer", "generator"}
    # Another class is used with a warning, its own without one.
    backend = TransformersBackend(str(tmp_path / "run" / "generator"))
    caplog.clear()
    NotesGenerator(backend)
    assert "templates" not in caplog.text
    PromptedGenerator(backend, format=OtherFormat())
    assert "was trained with prompt templates" in caplog.text


class OtherFormat(NotesFormat):
    """Says it in another way."""

    def render(self, prompt, interface):
        return [Message("user", f"{prompt} {getattr(interface, 'text', '')}")]


BACKEND = ScriptedBackend(lambda request: "- short", context_length=400)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("raw", {}, "field writer.inference: raw has no format and cannot be trained; use llm, or a class with a"),
        ("nobody", {}, "unknown inference 'nobody'"),
        ("llm", {"bugdet": 3}, "field writer.options: the inference 'llm' has no option 'bugdet'; its options: "),
        ("llm", {"budget": "x"}, "field writer.options.budget: "),
        ("llm", {"max_tokens": 3}, "field writer.options.max_tokens: is set by the recipe; set writer.max_tokens or "),
        ("llm", {"seed": 3}, "field writer.options.seed: is set by the recipe; remove it"),
    ],
)
def test_an_inference_that_cannot_be_trained_is_refused(name, options, says):
    with pytest.raises(ConfigError) as caught:
        summary_format(name, BACKEND, max_tokens=8, options=options)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("nobody", {}, "unknown generator 'nobody'"),
        ("nowhere:Nobody", {}, "the generator 'nowhere:Nobody' cannot be imported"),
        ("prompted", {"summary_tokens": 1000}, "field generator.options.summary_tokens: 1000 tokens do not fit"),
        (f"{HERE}:NotesGenerator", {"colour": "red"}, "field generator.options: the generator 'tests.training.test_r"),
    ],
)
def test_a_generator_that_cannot_be_trained_is_refused(name, options, says):
    with pytest.raises(ConfigError) as caught:
        answer_format(name, BACKEND, options=options)
    assert str(caught.value).startswith(says)
