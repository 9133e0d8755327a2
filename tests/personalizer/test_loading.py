"""Personalizers by the names of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from popi import registry
from popi.backends.base import Capabilities, ChatResult
from popi.errors import ConfigError, InputError, ModelError
from popi.interface import UserEmbedding
from popi.personalizer import Personalizer
from popi.roles import Conditioned, PreferenceInference
from popi.signals import UserSignals
from popi.store import InMemoryStore
from popi.testing import ScriptedBackend
from popi_generators import PromptedGenerator

from .conftest import SHORT, collect, script


class Named(ScriptedBackend):
    """Remembers all that were made, and whether they were closed."""

    made: list[Named]

    def __init__(self, model: str) -> None:
        super().__init__(script, model=model)
        if model == "missing":
            raise ModelError("no model 'missing'")
        self.closed = 0
        self.made.append(self)

    async def close(self) -> None:
        self.closed += 1


class Embedder(PreferenceInference[UserEmbedding]):
    name, kind = "embedder", "embedding"

    async def infer(self, users: Sequence[UserSignals]) -> list[UserEmbedding]:
        return [UserEmbedding(user_id=user.user_id, vectors=((1.0,),), model_fingerprint="f") for user in users]


class Repeating(PromptedGenerator):
    """Takes an option of its own."""

    def __init__(self, backend: ScriptedBackend, *, times: int = 1, **options: Any) -> None:
        super().__init__(backend, **options)
        self.times = times

    async def respond(self, items: Sequence[Conditioned]) -> list[ChatResult]:
        return [replace(result, text=result.text * self.times) for result in await super().respond(items)]


class Vectors(PromptedGenerator):
    """Reads embeddings."""

    def __init__(self, backend: ScriptedBackend) -> None:
        super().__init__(backend)
        self.interfaces = frozenset({"embedding"})

    async def respond(self, items: Sequence[Conditioned]) -> list[ChatResult]:
        return [ChatResult(repr(item.interface.vectors), "stop") for item in items]


class TestLoading:
    @pytest.fixture(autouse=True)
    def named(self, monkeypatch: pytest.MonkeyPatch) -> list[Named]:
        """Every model is a scripted one."""
        Named.made = []
        monkeypatch.setitem(registry.BACKENDS, "transformers", f"{__name__}:Named")
        load = registry.load
        monkeypatch.setattr(registry, "load", lambda target: Named if target.endswith(":Named") else load(target))
        return Named.made

    async def test_one_model_plays_both_roles_or_each_has_its_own(self, named: list[Named]) -> None:
        async with Personalizer.load("one") as personalizer:
            personalizer.observe("ann", SHORT)
            assert (await personalizer.infer("ann")).provenance.model == "one"
        assert [backend.model for backend in named] == ["one"]
        assert named[0].closed

        async with Personalizer.load("one", generator="two") as personalizer:
            assert (await personalizer.respond("ann", "How?")).model == "two"
        assert [len(backend.chats) for backend in named] == [1, 0, 1]
        assert all(backend.closed for backend in named)

    async def test_options_reach_their_role(self, named: list[Named]) -> None:
        personalizer = Personalizer.load(
            "m",
            inference_options={"max_tokens": 30, "temperature": 0.5, "seed": 1, "language": "German"},
            generator_options={"max_tokens": 40, "temperature": 0.7, "seed": 2, "prompts": "default"},
        )
        personalizer.observe("ann", SHORT)
        await personalizer.respond("ann", "How?")
        infers, responds = named[0].chats
        assert (infers.max_tokens, infers.temperature) == (30, 0.5)
        assert "Write the list in German." in infers.messages[0].content
        assert (responds.max_tokens, responds.temperature, responds.seed) == (40, 0.7, 2)

    async def test_classes_of_ones_own_play_the_roles(self) -> None:
        personalizer = Personalizer.load(
            "m",
            inference="popi_inference:Empty",
            generation=f"{__name__}:Repeating",
            generator_options={"times": 2, "max_tokens": 1},
        )
        assert str(await personalizer.respond("ann", "How?")) == "AnsweredAnswered"

    async def test_a_role_may_be_left_out(self, named: list[Named]) -> None:
        writes = Personalizer.load("writer", generator="reader", generation=None)
        reads = Personalizer.load("writer", generator="reader", inference=None)
        assert [backend.model for backend in named] == ["writer", "reader"]
        writes.observe("ann", SHORT)
        assert (await writes.infer("ann")).text == "- Said 1 things"
        assert str(await reads.respond(None, "How?")) == "Answered under"
        reads.edit("ann", "- mine")
        assert str(await reads.respond("ann", "How?")) == "Answered under - mine"
        for call in (writes.respond("ann", "How?"), collect(writes.stream("ann", "How?")), reads.infer("bob")):
            with pytest.raises(ConfigError, match="this personalizer has no"):
                await call

    async def test_a_backend_and_a_store_can_be_given(self) -> None:
        backend, store = Named("mine"), InMemoryStore()
        async with Personalizer.load(backend, store=store) as personalizer:
            personalizer.observe("ann", SHORT)
            assert (await personalizer.respond("ann", "How?")).model == "mine"
        assert store.users() == ["ann"]
        assert backend.closed == 1

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"inference": "lm"}, "unknown inference 'lm'; did you mean llm?"),
            ({"generation": "promted"}, "unknown generator 'promted'; did you mean prompted?"),
            ({"generation": "popi_inference:Empty"}, "is not a subclass of ConditionedGenerator"),
            (
                {"inference_options": {"max_token": 5}},
                "the inference 'llm' has no option 'max_token'; its options: max_tokens, temperature, budget",
            ),
            (
                {"generator_options": {"temprature": 5}},
                "the generator 'prompted' has no option 'temprature'; its options: max_tokens, temperature, seed",
            ),
            ({"generator_options": {"format": None}}, "has no option 'format'"),
            ({"generator_options": {"backend": None}}, "has no option 'backend'"),
            (
                {"generator_options": {"max_tokens": "many"}},
                "field generator_options.max_tokens: input should be a valid integer",
            ),
        ],
    )
    def test_a_wrong_option_is_one_line_before_a_model_is_loaded(
        self, options: dict[str, Any], says: str, named: list[Named]
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            Personalizer.load("m", **options)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert named == []

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"generator_options": {"max_tokens": 0}}, "max_tokens: must be positive"),
            ({"inference_options": {"prompts": "nil"}}, "unknown prompt set 'nil'"),
            ({"generator": "missing"}, "no model 'missing'"),
        ],
    )
    async def test_what_was_opened_is_closed_when_the_rest_fails(
        self, options: dict[str, Any], says: str, named: list[Named]
    ) -> None:
        with pytest.raises(InputError, match=says):
            Personalizer.load("m", **options)
        assert [backend.closed for backend in named] == [1]

    def test_a_generator_that_does_not_accept_what_is_inferred_is_refused(self, named: list[Named]) -> None:
        with pytest.raises(ConfigError) as caught:
            Personalizer.load("m", inference=f"{__name__}:Embedder")
        assert str(caught.value) == (
            "the generator 'm' does not accept the embedding that the inference 'embedder' infers; "
            "it accepts: summary; choose another model or class"
        )
        assert named[0].closed

    def test_a_backend_that_accepts_no_summaries_is_refused(self) -> None:
        backend = ScriptedBackend(script)
        backend.capabilities = Capabilities(interfaces=frozenset({"embedding"}))
        with pytest.raises(ConfigError, match="does not accept the summary"):
            Personalizer.load(backend)

    async def test_an_embedding_reaches_a_generator_that_accepts_it(self) -> None:
        personalizer = Personalizer.load("m", inference=f"{__name__}:Embedder", generation=f"{__name__}:Vectors")
        personalizer.observe("ann", SHORT)
        assert str(await personalizer.respond("ann", "How?")) == "((1.0,),)"
        assert personalizer.history("ann")[0].interface == await personalizer.infer("ann")
        with pytest.raises(ConfigError, match="does not accept summaries"):
            personalizer.edit("ann", "- mine")

    def test_what_was_spent_is_known_by_user(self, tmp_path: Path) -> None:
        file = tmp_path / "api.yaml"
        file.write_text("{backend: transformers, model: m, price: {prompt: 0, completion: 1000000}}")
        personalizer = Personalizer.load(str(file), generator=str(file))
        for name in ("ann", "bob"):
            personalizer.observe(name, SHORT)
            personalizer.infer_sync(name)
        personalizer.respond_sync("ann", "hello?")
        # "- Said 1 things [1]", a coin a word.
        assert personalizer.spent(" bob ").money == 5
        assert personalizer.spent().requests == 3 and personalizer.spent("eve").requests == 0
        assert personalizer.spent().money == personalizer.spent("ann").money + personalizer.spent("bob").money
