"""vLLM beside this process: adapters, other weights, and how it ends."""

from __future__ import annotations

import asyncio
import copy
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import active_children
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from popi.assembly import open_backend
from popi.backends.base import Backend, ChatRequest, ScoreRequest
from popi.backends.transformers import TransformersBackend
from popi.engine.chat_tokens import ChatTokens
from popi.engine.checks import verify
from popi.engine.decoding import Draft, decode
from popi.engine.loading import load
from popi.errors import BackendError, ConfigError, ModelError
from popi.models import find
from popi.prompts import Message
from popi.provenance import fingerprint_files
from tests.forks import needs_fork, succeeds_in_child
from tests.servers import SERVED, needs_vllm

if TYPE_CHECKING:
    from popi.backends.vllm import VLLMBackend

pytestmark = pytest.mark.slow

ADAPTERS = "small", "large"


def ask(text: str = "How do I cook rice?", **options: object) -> ChatRequest:
    return ChatRequest([Message("user", text)], **{"max_tokens": 12, **options})


REQUESTS = [ask(), ask("What is a good answer?"), ask("Why?", max_tokens=40)]
RATED = [ScoreRequest([Message("user", "How do I cook rice?")], text) for text in ("Boil it.", "😀", "")]


async def assert_alike(one: Backend, other: Backend) -> None:
    """Greedy texts are equal, and scores to a thousandth of a nat a token."""
    texts = [[result.text for result in await backend.chat(REQUESTS)] for backend in (one, other)]
    assert texts[0] == texts[1]
    for mine, theirs in zip(await one.score(RATED), await other.score(RATED), strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3 * mine.tokens)


def saved(folder: Path, *, seed: int, tied: bool = False) -> Path:
    """The shipped model with other weights, in a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(find(SERVED), dtype=torch.float32)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * weights.std() * 0.3)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(find(SERVED)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Adapters of two ranks whose weights do something."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = {}
    for rank, name in enumerate(ADAPTERS, start=4):
        torch.manual_seed(rank)
        config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(find(SERVED), dtype=torch.float32), config)
        folders[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def with_adapters(adapters: dict[str, str]) -> Iterator[Backend]:
    needs_vllm()
    from popi.backends.vllm import VLLMBackend

    backend = VLLMBackend(SERVED, context_length=256, cache_gib=0.25, adapters=adapters)
    yield backend
    asyncio.run(backend.close())


async def test_adapters_by_name_answer_side_by_side(with_adapters: Backend, adapters: dict[str, str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(find(SERVED))
    views = {name: with_adapters.adapted(name) for name in ADAPTERS}
    answers = await asyncio.gather(*(view.chat(REQUESTS) for view in (with_adapters, *views.values())))
    assert len({tuple(result.text for result in results) for results in answers}) == 3
    assert [results[0].model for results in answers] == [SERVED, f"{SERVED}:small", f"{SERVED}:large"]
    for name, view in views.items():
        base = AutoModelForCausalLM.from_pretrained(find(SERVED), dtype=torch.float32)
        merged = PeftModel.from_pretrained(base, adapters[name]).merge_and_unload()
        await assert_alike(view, TransformersBackend.from_model(merged, tokenizer, name))
    await assert_alike(with_adapters, TransformersBackend(SERVED))
    with pytest.raises(ConfigError, match="has no adapter 'smal'; did you mean small"):
        with_adapters.adapted("smal")


async def test_a_file_names_the_adapter_under_which_its_backend_answers(
    with_adapters: Backend, adapters: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "large.yaml"
    options = {"context_length": 256, "cache_gib": 0.25, "adapters": adapters, "adapter": "large"}
    file.write_text(json.dumps({"backend": "vllm", "model": SERVED, "options": options}))
    backend, _ = open_backend(str(file))
    async with backend:
        assert await backend.chat(REQUESTS) == await with_adapters.adapted("large").chat(REQUESTS)
    file.write_text(file.read_text().replace('"adapter": "large"', '"adapter": "lage"'))
    with pytest.raises(ConfigError, match=r"field options\.adapter: .* has no adapter 'lage'; did you mean large"):
        open_backend(str(file))


async def test_closing_a_view_leaves_the_engine(with_adapters: Backend) -> None:
    view = with_adapters.adapted("small")
    await view.close()
    with pytest.raises(BackendError, match="the backend is closed"):
        await view.chat(REQUESTS)
    assert (await with_adapters.chat(REQUESTS))[0].text


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
async def test_other_weights_show_at_once(tmp_path: Path, tied: bool) -> None:
    needs_vllm()
    from popi.backends.vllm import VLLMBackend

    before, after = (saved(tmp_path / str(seed), seed=seed, tied=tied) for seed in (1, 2))
    async with VLLMBackend(str(before), context_length=256, cache_gib=0.25) as backend:
        await assert_alike(backend, TransformersBackend(str(before)))
        # What is under way is finished under the old weights; what the cache holds of them is forgotten.
        old, identity = (await backend.chat([ask(max_tokens=100)]))[0].text, backend.identity
        under_way = asyncio.create_task(backend.chat([ask(max_tokens=100)] * 4))
        await asyncio.sleep(0.05)
        await backend.update_weights(after)
        assert {result.text for result in await under_way} == {old}
        assert (await backend.chat([ask(max_tokens=100)]))[0].text != old
        await assert_alike(backend, TransformersBackend(str(after)))
        # A cache must not answer with the responses of the weights before.
        assert (
            backend.identity
            != identity
            == backend.identity.replace(str(fingerprint_files(after)), str(fingerprint_files(before)))
        )
        with pytest.raises(ModelError, match="contains no safetensors"):
            await backend.update_weights(tmp_path)


async def test_weights_that_do_not_fit_are_an_error_until_others_do(tmp_path: Path) -> None:
    needs_vllm()
    from popi.backends.vllm import VLLMBackend

    before = saved(tmp_path / "before", seed=1, tied=True)
    (strange := tmp_path / "strange").mkdir()
    (strange / "model.safetensors").write_bytes(b"no weights at all")
    async with VLLMBackend(str(before), context_length=256, cache_gib=0.25) as backend:
        with pytest.raises(ModelError, match=f"cannot load the weights in {strange}"):
            await backend.update_weights(strange)
        with pytest.raises(BackendError, match="the previous ones are lost") as caught:
            await backend.chat([ask()])
        assert caught.value.failure == "unreachable"
        await backend.update_weights(before)
        await assert_alike(backend, TransformersBackend(str(before)))


async def test_an_engine_that_dies_is_a_dead_backend(tmp_path: Path) -> None:
    needs_vllm()
    from popi.backends.vllm import VLLMBackend

    before = set(active_children())
    backend = VLLMBackend(SERVED, context_length=256, cache_gib=0.25)
    [process] = set(active_children()) - before
    waiting = asyncio.create_task(backend.chat([ask(max_tokens=200)] * 50))
    await asyncio.sleep(0.2)
    process.kill()
    for call in (waiting, backend.score(RATED), anext(backend.stream(ask()))):
        with pytest.raises(BackendError) as caught:
            await asyncio.wait_for(call, timeout=30)
        assert caught.value.failure == "unreachable" and "\n" not in str(caught.value)
    await backend.close()


async def test_closing_drops_what_waits(tmp_path: Path) -> None:
    needs_vllm()
    from popi.backends.vllm import VLLMBackend

    before = set(active_children())
    backend = VLLMBackend(SERVED, context_length=256, cache_gib=0.25)
    waiting = asyncio.create_task(backend.chat([ask(max_tokens=200)] * 200))
    elsewhere = asyncio.create_task(
        copy.copy(backend).chat([ask(max_tokens=200)] * 200)
    )  # as through an adapter's view
    await asyncio.sleep(0.1)
    await backend.close()
    for call in (waiting, elsewhere):
        with pytest.raises(BackendError, match="the backend is closed"):
            await asyncio.wait_for(call, timeout=10)
    assert set(active_children()) <= before


SCRIPT = """
import os, sys
from popi.backends.vllm import VLLMBackend
if __name__ == "__main__":
    backend = VLLMBackend("popi-mini-base", context_length=256, cache_gib=0.25)
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_no_process_is_left_behind_when_this_one_is_killed_while_it_loads(tmp_path: Path) -> None:
    needs_vllm()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (left := [pid for pid in children(process.pid) if b"spawn_main" in command_of(pid)]):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.kill()
    assert process.communicate()[0] == b""  # it had not said that it is ready
    while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in left if Path(f"/proc/{pid}").exists()] == []


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_no_process_is_left_behind(tmp_path: Path, end: str) -> None:
    needs_vllm()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout and process.stderr
    assert process.stdout.readline() == "ready\n"
    left = children(process.pid)
    assert left
    if end == "kill":
        process.kill()
    printed, said = process.communicate("\n", timeout=60)
    assert printed == ""
    assert end == "kill" or (process.returncode == 0 and "Traceback" not in said)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in left if Path(f"/proc/{pid}").exists()] == []


def test_a_model_that_vllm_cannot_run_is_told_in_one_line(tmp_path: Path) -> None:
    needs_vllm()
    from popi.backends.vllm import VLLMBackend

    with pytest.raises(ModelError, match="vLLM cannot run 'popi-mini-base'") as caught:
        VLLMBackend(SERVED, context_length=100_000)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="the adapter 'mine' cannot be read"):
        VLLMBackend(SERVED, adapters={"mine": str(tmp_path)})
    with pytest.raises(ConfigError, match="field cache_gib: must be positive, got 0"):
        VLLMBackend(SERVED, cache_gib=0)


async def test_a_request_that_the_engine_refuses_is_an_error_in_its_result(with_adapters: Backend) -> None:
    refused, fine = await with_adapters.chat([ask(temperature=3.0), ask()])
    assert refused.failure == "request" and "temperature" in str(refused.error) and fine.error is None


def children(parent: int) -> list[int]:
    """The processes that run the engines of a process."""
    told = Path(f"/proc/{parent}/task").glob("*/children")
    found = [int(pid) for file in told for pid in file.read_text().split()]
    return [pid for pid in found if b"resource_tracker" not in command_of(pid)]


def command_of(process: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


async def test_seeded_requests_with_long_prompts_leave_the_engine_alive(with_adapters: Backend) -> None:
    requests = [ask("what " * 200 + f"{n}?", temperature=1.0, seed=n) for n in range(8)]
    together = await with_adapters.chat(requests)
    assert [result.error for result in together] == [None] * 8
    assert [(await with_adapters.chat([request]))[0] for request in requests] == together


SAMPLING = {"temperature": 1.0, "top_p": 1.0}


async def test_samples_and_their_log_probabilities_are_those_of_the_engine(vllm_backend: VLLMBackend) -> None:
    model, tokenizer = load(SERVED, None, "float32")
    tokens = ChatTokens(tokenizer, SERVED)
    questions = ["How do I cook rice?", "what " * 200 + "is it?", "Why?"]
    rendered = tokens.render([[Message("user", text)] for text in questions])
    prompts = [prompt.tokens for prompt in rendered for _ in range(4)]
    abilities = verify(model, tokens, SERVED)
    drafts = [Draft(prompt, 24, seed=seed, **SAMPLING) for seed, prompt in enumerate(prompts)]
    with torch.inference_mode():
        expected = decode(
            model,
            drafts,
            end_tokens=abilities.end_tokens,
            batch_tokens=8192,
            layout=abilities.layout,
            logprobs=True,
        )
    found = await vllm_backend.sample(prompts, seeds=range(12), max_tokens=24, **SAMPLING)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert [each.finish_reason for each in found] == [each.finish_reason for each in expected]
    assert {each.finish_reason for each in found} == {"stop", "length"}
    assert len({tuple(each.token_ids) for each in found}) == 12
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)


async def test_a_prompt_without_room_fails_and_the_engine_goes_on(vllm_backend: VLLMBackend) -> None:
    with pytest.raises(BackendError, match=r"popi-mini-base: a prompt of 600 tokens was rejected: .*512"):
        await vllm_backend.sample([[7] * 600], seeds=[0], max_tokens=4, **SAMPLING)
    [completion] = await vllm_backend.sample([[7] * 500], seeds=[0], max_tokens=4, **SAMPLING)
    assert 1 <= len(completion.token_ids) == len(completion.logprobs) <= 4


async def test_identities_differ_by_adapter(with_adapters: Backend) -> None:
    identities = {with_adapters.identity, *(with_adapters.adapted(name).identity for name in ADAPTERS)}
    assert len(identities) == 3 and with_adapters.adapted("small").identity in identities


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
async def test_a_forked_process_is_told_that_it_has_no_engine(with_adapters: Backend) -> None:
    def child() -> bool:
        with pytest.raises(BackendError, match="cannot be used in a forked process; open the model after the fork"):
            asyncio.run(with_adapters.chat(REQUESTS))
        # Ends nothing that belongs to the parent.
        with_adapters._engine.shut_down()
        return True

    assert await asyncio.to_thread(succeeds_in_child, child)
    assert (await with_adapters.chat(REQUESTS))[0].error is None


async def test_a_thousand_at_once(with_adapters: Backend) -> None:
    results = await with_adapters.chat([ask(f"Question {n}?", max_tokens=4) for n in range(1000)])
    assert [result.error for result in results] == [None] * 1000
    assert len({result.text for result in results}) > 10


@pytest.mark.parametrize(
    ("declared", "dtype", "expected"),
    [("float32", "auto", "float32"), ("bfloat16", "auto", "bfloat16"), ("bfloat16", "float16", "float16")],
)
async def test_auto_on_a_cpu_is_the_dtype_of_the_other_backend(
    declared: str, dtype: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_vllm()
    from popi.backends import vllm_engine

    config = json.loads((Path(find(SERVED)) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": declared}))
    monkeypatch.setattr("popi.engine.loading.has_bfloat16", lambda device: True)
    monkeypatch.setattr(vllm_engine.current_platform, "is_cpu", lambda: True)
    monkeypatch.setattr(vllm_engine, "AsyncEngineArgs", lambda **chosen: chosen)
    monkeypatch.setattr(vllm_engine.AsyncLLM, "from_engine_args", lambda chosen: chosen)
    assert (await vllm_engine._started({"model": str(tmp_path), "dtype": dtype}))["dtype"] == expected
