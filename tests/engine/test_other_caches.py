"""Models of many families are batched as exactly as they run one sequence at a time."""

from __future__ import annotations

import pytest
import torch
import transformers

from popi.engine.cache import Layout, fixed_length, has_plain_cache, layout_of, outdated
from popi.engine.decoding import Decoder, Draft, Job, decode
from popi.engine.packing import Scored
from popi.engine.scoring import score
from popi.testing import tiny_model
from popi.testing.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
COMMON = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
ATTENTION = {**HEADS, "head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
SWITCH = 32

CONFIGS = {
    "sliding window": lambda: transformers.MistralConfig(**COMMON, **ATTENTION, sliding_window=8),
    "soft caps": lambda: transformers.Gemma2Config(
        **COMMON, **ATTENTION, sliding_window=8, final_logit_softcapping=1.0
    ),
    "sinks": lambda: transformers.GptOssConfig(
        **COMMON, **ATTENTION, sliding_window=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "chunks": lambda: transformers.Llama4TextConfig(
        **{**COMMON, "num_hidden_layers": 4},
        **ATTENTION,
        intermediate_size_mlp=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=8,
    ),
    "states": lambda: transformers.MambaConfig(**COMMON, state_size=4),
    "states and attention": lambda: transformers.BambaConfig(**COMMON, **HEADS, attn_layer_indices=[1], **MAMBA),
    "both in one layer": lambda: transformers.FalconH1Config(**COMMON, **HEADS, **MAMBA, mamba_d_ssm=64),
    "convolutions": lambda: transformers.Lfm2Config(**COMMON, **HEADS, layer_types=["conv", "full_attention"]),
    "biases by distance": lambda: transformers.BloomConfig(**COMMON, n_head=4),
    "local attention": lambda: transformers.GPTNeoConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        initializer_range=0.2,
        max_position_embeddings=512,
    ),
    "no cache": lambda: transformers.RwkvConfig(**COMMON, attention_hidden_size=32),
    "learned positions": lambda: transformers.GPT2Config(
        vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2
    ),
    "scaled logits": lambda: transformers.GraniteConfig(**COMMON, **HEADS, logits_scaling=3.0),
    "experts": lambda: transformers.MixtralConfig(**COMMON, **ATTENTION, num_local_experts=4, num_experts_per_tok=2),
    "long positions": lambda: transformers.Phi3Config(
        **COMMON,
        **HEADS,
        max_position_embeddings=512,
        original_max_position_embeddings=SWITCH,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
    ),
    "dynamic positions": lambda: transformers.LlamaConfig(
        **COMMON,
        **ATTENTION,
        max_position_embeddings=SWITCH,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
}
SHARED = {"learned positions", "scaled logits", "experts", "long positions", "dynamic positions"}
PROMPTS = [[*range(10, 10 + length)] for length in (3, 30, 1, 12, 12, 40, 5, 25)] + [[7, 8, 9] * 4] * 2


def model_of(kind: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()


def logits_of(model, tokens: list[int]) -> torch.Tensor:
    """Logits of a whole sequence without a cache, ``[T, V]``."""
    with torch.inference_mode():
        model(input_ids=torch.tensor([[0]]), use_cache=False)  # some models remember the longest sequence
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def plain_tokens(model, draft: Draft) -> list[int]:
    new: list[int] = []
    while len(new) < draft.limit:
        new.append(int(logits_of(model, draft.prompt + new)[-1].argmax()))
    return new


def plain_score(model, item: Scored) -> float:
    logprobs = logits_of(model, item.prompt + item.response).log_softmax(dim=-1)[len(item.prompt) - 1 :]
    return sum(logprobs[place, token].item() for place, token in enumerate(item.response))


def layouts(kind: str) -> list[Layout]:
    if kind == "no cache":
        return ["single"]
    return ["shared", "padded", "single"] if kind in SHARED else ["padded", "single"]


# A family in the layout of its check is in test_families, which is not slow.
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), [(kind, layout) for kind in CONFIGS for layout in layouts(kind)])
def test_as_exact_as_a_plain_loop(kind: str, layout: Layout) -> None:
    model = model_of(kind)
    drafts = [Draft(prompt, limit=4 + 5 * (place % 4)) for place, prompt in enumerate(PROMPTS)]
    # Small enough that drafts have to wait for others to end.
    completions = decode(model, drafts, end_tokens=frozenset(), batch_tokens=200, layout=layout)
    assert [completion.token_ids for completion in completions] == [plain_tokens(model, draft) for draft in drafts]

    items = [Scored(prompt, response) for prompt in PROMPTS for response in ([3, 4], [3, 5, 6, 9] * 4)]
    expected = [plain_score(model, item) for item in items]
    assert score(model, items, batch_tokens=400, layout=layout) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if "padded" in layouts(kind)])
def test_padded_drafts_run_together_and_join_while_others_run(kind: str) -> None:
    model = model_of(kind)
    rows: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    decoder = Decoder(model, end_tokens=frozenset(), batch_tokens=10_000, layout="padded")
    outcomes: dict[int, list[int]] = {}

    def job(place: int) -> Job:
        draft = Draft([5, 6, *range(20, 23 + place)], limit=6 + place)
        return Job(draft, lambda completion: outcomes.__setitem__(place, completion.token_ids))

    jobs = [job(place) for place in range(4)]
    decoder.add(jobs[:2])
    decoder.step()
    decoder.add(jobs[2:])
    while decoder.busy:
        decoder.step()
    assert max(rows) == 4
    assert outcomes == {place: plain_tokens(model, job.draft) for place, job in enumerate(jobs)}


@pytest.mark.parametrize(("attention", "plain"), [("sdpa", True), ("eager", True), ("flash_attention_2", False)])
def test_attention_that_follows_no_mask_of_single_positions_shares_nothing(monkeypatch, attention, plain):
    model, _ = tiny_model()
    monkeypatch.setattr(model.config, "_attn_implementation_internal", attention)
    assert has_plain_cache(model) is plain
    assert layout_of(model) == ("shared" if plain else "padded")


def test_lengths_at_which_positions_change() -> None:
    long, dynamic, plain = (model_of(kind) for kind in ("long positions", "dynamic positions", "scaled logits"))
    assert (fixed_length(long), fixed_length(dynamic), fixed_length(plain)) == (SWITCH, SWITCH - 1, None)
    assert [outdated(long, cached, SWITCH + 1) for cached in (SWITCH, SWITCH + 1)] == [True, False]
    assert not outdated(long, SWITCH - 1, SWITCH)
    assert [outdated(dynamic, length, length + 1) for length in (SWITCH - 2, SWITCH - 1, SWITCH)] == [False, True, True]
    assert not outdated(plain, 100, 101)
