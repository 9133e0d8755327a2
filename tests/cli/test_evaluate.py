"""``popi eval`` as it is typed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from popi.backends.base import ChatRequest, ScoreRequest
from popi.cli import main
from popi.cli.evaluate import _identity
from popi.data.miniworld import generate
from popi.evaluation.results import Results
from popi.io import write_jsonl
from popi.models import find, fingerprint
from popi.prompts import DEFAULT, INSTRUCT
from popi.signals import PreferencePair
from popi.testing import ScriptedBackend
from popi.trained import TrainingRecord


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> dict[str, ScriptedBackend]:
    """Lets a scripted double run every model; under any context it likes long answers."""
    made: dict[str, ScriptedBackend] = {}

    def answer(request: ChatRequest) -> str:
        return "- bullet points [1]" if "Signals of one user" in request.messages[-1].content else "One thing."

    def score(request: ScoreRequest) -> float:
        return float(len(request.response)) if DEFAULT.open in request.messages[-1].content else 0.0

    def make(model: str) -> ScriptedBackend:
        made[model] = ScriptedBackend(answer, score, model=model)
        return made[model]

    monkeypatch.setattr("popi.registry.backend", lambda name: make)
    return made


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """Two folders that a model could be in."""
    for name in ("writer", "reader"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    return {name: str(tmp_path / name) for name in ("writer", "reader")}


@pytest.fixture
def evaluate(models: dict[str, str], tmp_path: Path) -> Callable[..., int]:
    """Runs the command on eight users of the mini world with both models."""

    def run(*more: str, out: str = "out", users: str = "8") -> int:
        given = ["--writer", models["writer"], "--generator", models["writer"], "--generator", models["reader"]]
        source = [] if "--data" in more else ["--world", "miniworld"]
        return main(["eval", *source, "--users", users, *given, "--out", str(tmp_path / out), *more])

    return run


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_folder_holds_the_figures_and_what_they_rest_on(
    evaluate: Callable[..., int],
    backends: dict[str, ScriptedBackend],
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate("--seeds", "2") == 0
    assert list(backends) == list(models.values())
    results = Results.model_validate_json((tmp_path / "out/results.json").read_text())
    assert len(results.cells) == 7 * 2
    assert results.users == 16
    assert set(results.cells[0].by_seed) == {0, 1}
    assert results.settings["seeds"] == [0, 1]
    longest = next(control for control in results.controls if control.name == "longest-answer")
    told = [cell for cell in results.cells if cell.row == "untrained-summary"]
    assert [cell.accuracy for cell in told] == [longest.accuracy] * 2
    report = (tmp_path / "out/results.md").read_text()
    assert "miniature" in report
    assert (tmp_path / "out/accuracy_vs_context.png").exists() == ("](accuracy_vs_context.png)" in report)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["settings"]["split"] == "unseen-combinations"
    assert set(config["versions"]) >= {"popi", "python"}
    assert config["seconds"] > 0
    lines = printed(capsys)
    assert [line["kind"] for line in lines].count("cell") == 14
    assert any("miniature" in remark for remark in lines[-1]["remarks"])  # type: ignore[attr-defined]


def test_an_evaluation_without_any_accuracy_is_a_failure(
    evaluate: Callable[..., int],
    backends: dict[str, ScriptedBackend],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def make(model: str) -> ScriptedBackend:
        return ScriptedBackend(lambda request: "- lists [1]", lambda request: float("nan"), model=model)

    monkeypatch.setattr("popi.registry.backend", lambda name: make)
    # The second run reads what the first one stored.
    for _ in range(2):
        assert evaluate() == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert re.match(r"popi: no accuracy could be measured: none of its \d+ pairs could be scored \(", last)
    assert (tmp_path / "out/results.json").exists()


def test_the_same_command_measures_nothing_again(
    evaluate: Callable[..., int],
    backends: dict[str, ScriptedBackend],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate() == 0
    first = (tmp_path / "out/results.json").read_bytes()
    assert evaluate() == 0
    assert all(backend.scored == [] and backend.chats == [] for backend in backends.values())
    assert (tmp_path / "out/results.json").read_bytes() == first


def test_other_settings_are_refused_in_one_line(
    evaluate: Callable[..., int],
    backends: dict[str, ScriptedBackend],
    models: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate() == 0
    capsys.readouterr()
    assert evaluate(users="9") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "made with users_of_a_sample 8, not 9" in error
    Path(models["reader"], "model.safetensors").write_text("trained anew")
    assert evaluate() == 2
    assert "was made with models." in capsys.readouterr().err


def test_a_prompt_set_is_that_of_all_models_and_part_of_the_settings(
    evaluate: Callable[..., int],
    backends: dict[str, ScriptedBackend],
    models: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = ("--rows", "untrained-summary")
    assert evaluate("--prompt-set", "instruct", *rows) == 0
    read = [request.messages for backend in backends.values() for request in (*backend.chats, *backend.scored)]
    systems = {messages[0].content.split("\n")[0] for messages in read if messages[0].role == "system"}
    expected = INSTRUCT.inference_messages("")[0], INSTRUCT.answer_messages("", "")[0]
    assert systems == {message.content.split("\n")[0] for message in expected}
    assert not any(DEFAULT.infer.split("\n")[0] in messages[-1].content for messages in read)
    capsys.readouterr()
    assert evaluate(*rows) == 2
    assert f"made with template_hash '{INSTRUCT.hash}'" in capsys.readouterr().err
    assert evaluate("--prompt-set", "instruction", *rows, out="other") == 2
    assert "unknown prompt set 'instruction'" in capsys.readouterr().err


def test_a_base_model_gets_the_prompts_of_the_model_that_was_trained_from_it(
    evaluate: Callable[..., int], backends: dict[str, ScriptedBackend], models: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_text("base")
    trained = TrainingRecord.of(str(tmp_path / "base"), INSTRUCT.hash, INSTRUCT)
    trained.write(Path(models["writer"]))
    assert evaluate("--rows", "untrained-summary,popi-summary", "--generator", models["writer"]) == 0
    requests = [request.messages for request in backends[str(tmp_path / "base")].chats]
    expected = INSTRUCT.inference_messages("")[0]
    assert {messages[0] for messages in requests if messages[0].role == "system"} == {expected}
    assert not any("Signals of one user" in messages[-1].content for messages in requests)


def test_ctrl_c_keeps_what_is_measured(
    evaluate: Callable[..., int],
    backends: dict[str, ScriptedBackend],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = ScriptedBackend.score

    async def interrupted(self: ScriptedBackend, requests: list[ScoreRequest]) -> object:
        if len(self.scored) > 100:
            raise KeyboardInterrupt
        return await real(self, requests)

    monkeypatch.setattr(ScriptedBackend, "score", interrupted)
    assert evaluate() == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert "interrupted; measurements are kept in" in error
    assert list((tmp_path / "out/users").rglob("*.jsonl"))
    assert not (tmp_path / "out/results.json").exists()
    monkeypatch.setattr(ScriptedBackend, "score", real)
    assert evaluate() == 0


def test_a_file_of_users_with_some_rows(
    evaluate: Callable[..., int],
    backends: dict[str, ScriptedBackend],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "users.jsonl"
    examples = [
        example.model_copy(update={"oracles": {}, "facts": {}})
        for example in generate(split="unseen-users", users=6, seed=0)
    ]
    write_jsonl(path, examples)
    rows = "no context, Raw signals,true-taste-oracle"
    assert evaluate("--data", str(path), "--rows", rows, "--json", users="5") == 0
    lines = printed(capsys)
    assert {line["row"] for line in lines if line["kind"] == "cell"} == {"no-context", "raw-signals"}
    assert any("true taste oracle is left out" in remark for remark in lines[-1]["remarks"])  # type: ignore[attr-defined]
    assert not any("miniature" in remark for remark in lines[-1]["remarks"])  # type: ignore[attr-defined]


def test_held_out_pairs_among_the_signals_are_refused_and_their_users_skipped_on_request(
    evaluate: Callable[..., int],
    backends: dict[str, ScriptedBackend],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "users.jsonl"
    examples = list(generate(split="unseen-users", users=6, seed=0))
    for place in (1, 4):
        shown = PreferencePair(**examples[place].tests[2].model_dump())
        examples[place] = examples[place].model_copy(update={"user": examples[place].user.add(shown)})
    write_jsonl(path, examples)
    assert evaluate("--data", str(path), users="3") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"popi: {path}: 2 bad rows; the first: line 2, field tests.2: a signal of the kind pair")
    assert "1 of 4 held-out pairs of user 'unseen-users-0-1' cannot be used (remove them from tests" in lines[0]
    assert [line.split(": ")[1] for line in lines[1:]] == [f"{path}:5, field tests.2"]
    assert not (tmp_path / "out").exists()
    assert evaluate("--data", str(path), "--skip-bad-rows", "--rows", "empty summary", users="4") == 0
    captured = capsys.readouterr()
    assert f"popi: skipped 2 bad rows; the first: {path}:2, field tests.2: " in captured.err
    assert json.loads((tmp_path / "out/config.json").read_text())["settings"]["skipped_bad_rows"] == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--rows", "raw-signal"],
            "unknown row 'raw-signal'; the rows are: no-context, raw-signals, untrained-summary",
        ),
        (["--split", "moon"], "unknown split 'moon'"),
        (["--world", "minworld"], "did you mean miniworld"),
        (["--data", "absent.jsonl", "--world", "miniworld"], "give one of the two"),
        (["--data", "absent.jsonl"], "absent.jsonl: cannot be read"),
        (["--data", "absent.jsonl", "--split", "train"], "a file has no splits"),
        (["--generator", "no-such-model"], "model 'no-such-model' not found"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(
    more: list[str],
    says: str,
    evaluate: Callable[..., int],
    backends: dict[str, ScriptedBackend],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(*more) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert not (tmp_path / "out").exists()


def test_the_base_installation_lacks_numpy(
    evaluate: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert evaluate() == 2
    assert "numpy is not installed; install it with: pip install 'popi[local]'" in capsys.readouterr().err


def test_a_terminal_gets_tables(
    evaluate: Callable[..., int],
    backends: dict[str, ScriptedBackend],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("popi.cli.evaluate.wants_json", lambda flag: False)
    assert evaluate() == 0
    out = capsys.readouterr().out
    assert "±" in out
    assert "The mini world is a miniature" in out


def test_backends_files_are_columns_of_their_own_whose_costs_are_told(
    evaluate: Callable[..., int],
    backends: dict[str, ScriptedBackend],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [tmp_path / "cheap.yaml", tmp_path / "dear.yaml"]
    for file, price in zip(files, (1, 10), strict=True):
        file.write_text(f"{{backend: scripted, model: m, price: {{prompt: {price}, completion: 0}}}}")
    named = [word for file in files for word in ("--generator", str(file))]
    assert evaluate(*named, "--rows", "empty-summary") == 0
    captured = capsys.readouterr()
    columns = [json.loads(line).get("column") for line in captured.out.splitlines()]
    assert {*map(str, files)} < {*columns}
    cheap, dear = (
        re.search(rf"popi: {file}: (\d+) requests read (\S+) tokens and wrote \d+: (\S+)\n", captured.err)
        for file in files
    )
    assert cheap and dear and cheap[1] == dear[1] and cheap[2] == dear[2]
    assert 0 < 10 * float(cheap[3]) == pytest.approx(float(dear[3]), abs=0.001)
    assert captured.err.count(" requests read ") == 2


def test_a_budget_stops_an_evaluation_which_says_what_was_spent(
    evaluate: Callable[..., int],
    backends: dict[str, ScriptedBackend],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "dear.yaml"
    file.write_text("{backend: scripted, model: m, price: {prompt: 1000, completion: 0}, budget: 0.5}")
    assert evaluate("--generator", str(file)) == 1
    *_, told, last = capsys.readouterr().err.splitlines()
    assert re.match(rf"popi: {file}: \d+ requests read .* tokens and wrote \d+: 0\.[0-4]", told)
    assert "of the budget of 0.5 is spent" in last and "measurements are kept in" in last


def test_a_backends_file_may_change_in_how_the_model_is_asked_and_not_in_what_it_is(
    evaluate: Callable[..., int],
    backends: dict[str, ScriptedBackend],
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(**more: object) -> int:
        described = {"backend": "scripted", "model": models["reader"], **more}
        file.write_text(json.dumps(described))
        return evaluate("--generator", str(file), "--rows", "empty-summary")

    file = tmp_path / "reader.yaml"
    assert measured() == 0
    asked = len(backends[models["reader"]].scored)
    assert asked
    assert (
        measured(retry={"attempts": 2}, budget=3, price={"prompt": 1, "completion": 0}, limit={"max_concurrency": 2})
        == 0
    )
    assert not backends[models["reader"]].scored
    capsys.readouterr()
    Path(models["reader"], "model.safetensors").write_text("trained anew")
    assert evaluate("--generator", str(file), "--rows", "empty-summary") == 2
    assert "was made with models." in capsys.readouterr().err
    Path(models["reader"], "model.safetensors").write_text("reader")
    assert measured(model="another") == 2
    assert f"was made with models.{file}" in capsys.readouterr().err


def test_a_model_in_half_precision_is_recorded_with_the_dtype_that_it_computes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("popi.engine.loading.has_bfloat16", lambda device: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = json.loads((Path(find("popi-mini-writer")) / "config.json").read_text())
    for dtype, suffix in (("float32", ""), ("bfloat16", " in bfloat16")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
        assert _identity(str(tmp_path)) == f"{fingerprint(str(tmp_path))}{suffix}"
    (tmp_path / "config.json").write_text("{}")
    assert _identity(str(tmp_path)) == fingerprint(str(tmp_path))
