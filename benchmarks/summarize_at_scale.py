"""Summaries of many users: the speed of ``popi summarize`` compared with vLLM alone, and what a SIGKILL does to them.

    python benchmarks/summarize_at_scale.py --users 400 --shards 4 --kills 2 --out runs/scale

The script writes users of the mini world into a folder of shards, and summarizes the folder with a vLLM backend. It
kills the command with SIGKILL at random moments and starts it again. With ``--ray N`` it kills one of N workers of a
local Ray, and the command goes on. At the end it reads all summaries and checks that each user has exactly one.

vLLM alone is ``vllm.LLM.chat`` in a process of its own, with the options that popi chooses for its engine. It gets the
same conversations and the same maximum number of new tokens, all at once. It neither makes prompts of signals, nor
checks the replies, nor writes anything. It runs before and after popi, on the first ``--alone`` users. The time for
loading the model counts for neither side: popi's time is that of the shards that no kill interrupted, from their
manifests. "all" is the time from the first start to the last end, with all restarts.

vLLM alone uses one process, and popi two. On a CPU, pin the script to one core (``taskset -c 0``), so that popi's own
process does not get a core of its own.

With ``--ray N`` the rate is that of one worker. The peak of memory is
that of the command itself, without vLLM's process and Ray's workers; it is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import yaml

from popi.data.miniworld import generate
from popi.data.reading import read_users
from popi.io import write_jsonl
from popi.signals import UserSignals

MODEL, SPLIT, SECONDS = "popi-mini-writer", "unseen-combinations", 0.1


def main() -> int:
    """Prints the figures, and returns 1 if a user has no summary or two."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default=MODEL)
    options.add_argument("--users", type=int, default=400)
    options.add_argument("--shards", type=int, default=4)
    options.add_argument("--kills", type=int, default=2)
    options.add_argument("--ray", type=int, default=0, help="number of workers of Ray; 0 is without Ray")
    options.add_argument("--alone", type=int, default=2000, help="maximum number of users for vLLM alone")
    options.add_argument("--max-tokens", type=int, default=256)
    options.add_argument("--max-concurrency", type=int, default=64)
    options.add_argument("--cache-gib", type=float, default=1.0)
    options.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of both sides")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=Path("runs/scale"))
    options.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.bare:
        print(json.dumps(alone(given)))
        return 0
    write_users(given.out / "signals", given.users, given.shards, given.seed)
    config = {"backend": "vllm", "model": given.model, "options": {"cache_gib": given.cache_gib, "dtype": given.dtype}}
    (given.out / "backend.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    before = run_alone()
    ran = run_popi(given)
    after = run_alone()
    show(given, ran, [before, after])
    return check(given.out, given.users)


def write_users(folder: Path, users: int, shards: int, seed: int) -> None:
    """Writes the shards, unless all exist."""
    sizes = {folder / f"part-{shard:05d}.jsonl": len(range(shard, users, shards)) for shard in range(shards)}
    if all(path.exists() for path in sizes):
        found = {path: sum(1 for _ in path.open()) for path in folder.glob("*.jsonl")}
        assert found == sizes, f"{folder} was made with other options"
        return
    people = (example.user for example in generate(split=SPLIT, users=users, seed=seed, tests=1))
    for path, size in sizes.items():
        write_jsonl(path, islice(people, size))


@dataclass
class Ran:
    """The runs of the command.

    Attributes:
        seconds: From the first start to the last end.
        peak: Maximum resident memory in MiB.
        kills: Number of summaries at each kill.
    """

    seconds: float = 0.0
    peak: float = 0.0
    kills: list[int] = field(default_factory=list)


def run_popi(given: argparse.Namespace) -> Ran:
    """Runs the command until it ends by itself after the last kill."""
    words = ["summarize", "--signals", given.out / "signals", "--model", given.out / "backend.yaml"]
    words += ["--out", given.out / "summaries", "--max-tokens", given.max_tokens]
    words += ["--max-concurrency", given.max_concurrency]
    words += ["--ray", "local", "--workers", given.ray] if given.ray else []
    moments = sorted(random.Random(given.seed).sample(range(1, given.users), given.kills))
    ran, began, written = Ran(), time.monotonic(), Written(given.out / "summaries")
    process: subprocess.Popen[bytes] | None = None
    for moment in [*moments, None]:
        if process is None or process.returncode is not None:
            process = subprocess.Popen([sys.executable, "-m", "popi", *map(str, words)], stdout=subprocess.DEVNULL)
        while process.poll() is None and (moment is None or written.count() < moment):
            ran.peak = max(ran.peak, peak(process.pid))
            time.sleep(SECONDS)
        if process.returncode is not None:
            # The last users were written before the next look, or some have failed.
            break
        ran.kills.append(written.count())
        if given.ray:
            worker_of(process.pid).kill()
        else:
            process.kill()
            process.wait()
    ran.seconds = time.monotonic() - began
    return ran


def worker_of(process: int) -> psutil.Process:
    """Returns a worker of the local Ray of a command."""
    below = psutil.Process(process).children(recursive=True)
    return next(each for each in below if each.name().startswith("ray::MapWorker"))


class Written:
    """Counts the lines of growing files without reading a byte twice."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._sizes, self._lines = folder, Counter[Path](), Counter[Path]()

    def count(self) -> int:
        """Returns the number of lines so far."""
        for path in self._folder.glob("*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._sizes[path])
                new = file.read()
            self._sizes[path] += len(new)
            self._lines[path] += new.count(b"\n")
        return self._lines.total()


def peak(process: int) -> float:
    """Returns the maximum resident memory of a process so far, in MiB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def run_alone() -> dict[str, Any]:
    """Runs vLLM alone in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--bare"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def alone(given: argparse.Namespace) -> dict[str, Any]:
    """Continues the conversations of the first users with vLLM alone."""
    from popi.backends.vllm import GIB
    from popi.backends.vllm_engine import DEFAULTS, ON_A_CPU, OPTIONS_ON_A_CPU, QUIET, environment
    from popi.models import find

    with environment({**QUIET, **ON_A_CPU}):
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind

        arguments = {**(OPTIONS_ON_A_CPU if current_platform.is_cpu() else {}), **DEFAULTS, "dtype": given.dtype}
        arguments |= {"skip_tokenizer_init": False, "kv_cache_memory_bytes": int(given.cache_gib * GIB)}
        llm = LLM(find(given.model), enable_prefix_caching=True, **arguments)
        conversations, ends = render(first_users(given.out / "signals", min(given.alone, given.users)), given)
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=given.max_tokens,
            stop_token_ids=ends,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        began = time.perf_counter()
        outputs = llm.chat(conversations, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
    return {
        "users": len(outputs),
        "seconds": seconds,
        "prompt tokens": sum(len(output.prompt_token_ids) for output in outputs) / len(outputs),
        "new tokens": sum(len(output.outputs[0].token_ids) for output in outputs) / len(outputs),
    }


def first_users(folder: Path, users: int) -> Iterable[UserSignals]:
    """Yields the first users of the shards."""
    return islice((user for path in sorted(folder.glob("*.jsonl")) for user in read_users(path)), users)


def render(users: Iterable[UserSignals], given: argparse.Namespace) -> tuple[list[list[dict[str, str]]], list[int]]:
    """Returns the conversations as popi renders them, and the tokens that end a response."""
    from popi.engine.chat_tokens import ChatTokens
    from popi.engine.loading import load_tokenizer
    from popi.models import find
    from popi.registry import make_inference
    from popi.testing import ScriptedBackend

    tokens = ChatTokens(load_tokenizer(given.model), given.model)

    class Tokenizer(ScriptedBackend):
        def count_tokens(self, text: str) -> int:
            return len(tokens.encode([text])[0])

    context = json.loads((Path(find(given.model)) / "config.json").read_text())["max_position_embeddings"]
    backend = Tokenizer("", model=given.model, context_length=context)
    form = make_inference("llm", backend, max_tokens=given.max_tokens).format
    assert form is not None
    prompts = [prompt for user in users if (prompt := form.render(user)) is not None]
    return [list(map(asdict, prompt.messages)) for prompt in prompts], sorted(tokens.end_tokens)


def show(given: argparse.Namespace, ran: Ran, bare: list[dict[str, Any]]) -> None:
    """Prints the rates, the moments of the kills, and the memory."""
    shards = [json.loads(path.read_text()) for path in sorted((given.out / "summaries").glob("*.manifest.json"))]
    whole = [shard for shard in shards if not shard["report"]["already done"]]
    print(f"{'':22s} {'users':>7s} {'seconds':>9s} {'users/s':>8s}  of vLLM alone")
    rates = [each["users"] / each["seconds"] for each in bare]
    for each, rate in zip(bare, rates, strict=True):
        print(f"{'vLLM alone':22s} {each['users']:7d} {each['seconds']:9.1f} {rate:8.1f}")
    users, seconds = sum(each["report"]["users"] for each in whole), sum(each["seconds"] for each in whole)
    if whole:
        rate = users / seconds
        share = 100 * rate * len(rates) / sum(rates)
        print(f"{f'popi, {len(whole)} whole shards':22s} {users:7d} {seconds:9.1f} {rate:8.1f}  {share:.0f} %")
    print(f"{'popi, all':22s} {given.users:7d} {ran.seconds:9.1f} {given.users / ran.seconds:8.1f}")
    print(f"{bare[0]['prompt tokens']:.0f} prompt tokens and {bare[0]['new tokens']:.0f} new tokens per user")
    print(f"killed after {', '.join(map(str, ran.kills)) or 'no'} summaries; peak of memory {ran.peak:.0f} MiB")


def check(folder: Path, users: int) -> int:
    """Checks that each user has exactly one summary."""
    wanted = {user.user_id for user in first_users(folder / "signals", users)}
    found: Counter[str] = Counter()
    for path in (folder / "summaries").glob("*.jsonl"):
        with path.open(encoding="utf-8") as lines:
            found.update(json.loads(line)["user_id"] for line in lines)
    twice = sum(times > 1 for times in found.values())
    missing, unknown = len(wanted - found.keys()), len(found.keys() - wanted)
    print(f"{found.total()} summaries of {users} users: {missing} missing, {twice} twice, {unknown} of unknown users")
    return int(found != dict.fromkeys(wanted, 1))


if __name__ == "__main__":
    sys.exit(main())
