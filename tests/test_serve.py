"""The server's answers: standard fields with their standard meaning, block diffusion's own, and nothing ignored."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import Server, streamed
from starlette.testclient import TestClient

import blockdiff
from blockdiff.decode import Sampling
from blockdiff.engine import Limits

PROMPT = "the cat sat on"
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 5, "max_tokens": 24}


@contextmanager
def client_of(checkpoint: Path, *, raise_faults: bool = True, **settings: Any) -> Iterator[TestClient]:
    """The application with other settings, in this process."""
    from blockdiff.serve.app import Application
    from blockdiff.serve.settings import Settings

    app = Application(blockdiff.load(checkpoint), Settings(name="other", **settings), Limits(pages=256))
    with TestClient(app, raise_server_exceptions=raise_faults) as client:
        yield client


@pytest.fixture(scope="module")
def model(trained: Path) -> blockdiff.Model:
    return blockdiff.load(trained / "checkpoint")


def test_a_completion_is_what_generate_writes(server: Server, model: blockdiff.Model):
    for size, policy in ((1, "threshold"), (4, "threshold"), (8, "first_hitting")):
        own = model.generate(PROMPT, max_new_tokens=24, block_size=size, policy=policy, sampling=Sampling(0.8), seed=5)[
            0
        ]
        answer = server.complete(PROMPT, **SAMPLED, diffusion={"block_size": size, "policy": policy})
        assert answer["choices"][0]["text"] == own.text
        usage = answer["usage"]
        assert usage["completion_tokens"] == len(own.tokens)
        assert usage["prompt_tokens"] == len(model.encode(PROMPT))
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        for count in ("forwards", "denoise_forwards", "commit_forwards", "verify_forwards", "tokens_per_forward"):
            assert usage["diffusion"][count] == getattr(own, count)
        assert usage["diffusion"]["steps_per_block"] == own.steps_per_block
        assert answer["choices"][0]["finish_reason"] == {"end": "stop"}.get(own.finish_reason, own.finish_reason)
    assert server.text(PROMPT, **{**SAMPLED, "seed": 6}) != server.text(PROMPT, **SAMPLED)


def test_lossless_text_is_that_of_block_size_1(server: Server):
    plain = server.complete(PROMPT, **SAMPLED, diffusion={"block_size": 1})
    for options in ({"block_size": 8}, {"block_size": 4, "policy": "one_step"}, {"block_size": 8, "threshold": 0.5}):
        lossless = server.complete(PROMPT, **SAMPLED, diffusion={**options, "lossless": True})
        assert lossless["choices"][0]["text"] == plain["choices"][0]["text"]
        assert lossless["usage"]["diffusion"]["verify_forwards"] > 0
    other = server.text(PROMPT, **SAMPLED, diffusion={"block_size": 8, "policy": "one_step"})
    assert other != plain["choices"][0]["text"]


def test_the_same_seed_gives_the_same_text_whatever_else_runs(server: Server):
    bodies = [
        {"prompt": f"{PROMPT} {word}", "temperature": 1.0, "seed": seed, "max_tokens": 8 + seed}
        for seed, word in enumerate(("the mat", "a dog", "red", "one bird", "cats", "we all") * 4)
    ]
    for number, body in enumerate(bodies):
        body["diffusion"] = {"block_size": (1, 4, 8)[number % 3], "lossless": number % 2 == 0}
    alone = [server.text(**body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: server.text(**body), bodies))
    assert together == alone
    assert len(set(alone)) > len(alone) // 2


def test_without_a_seed_texts_differ_and_the_seed_is_told(server: Server):
    body = {"temperature": 1.0, "max_tokens": 24}
    answers = [server.complete(PROMPT, **body) for _ in range(3)]
    assert len({answer["choices"][0]["text"] for answer in answers}) > 1
    told = answers[0]["usage"]["diffusion"]["seed"]
    assert server.text(PROMPT, **body, seed=told) == answers[0]["choices"][0]["text"]


def test_temperature_is_1_unless_told(server: Server):
    told = {"seed": 3, "max_tokens": 24}
    assert server.text(PROMPT, **told) == server.text(PROMPT, **told, temperature=1)
    assert server.text(PROMPT, **told) != server.text(PROMPT, **told, temperature=0)
    greedy = server.text(PROMPT, max_tokens=24, temperature=0)
    assert greedy == server.text(PROMPT, max_tokens=24, temperature=0, seed=9)
    assert greedy == server.text(PROMPT, max_tokens=24, temperature=1, seed=9, diffusion={"top_k": 1})
    assert greedy == server.text(PROMPT, max_tokens=24, temperature=1, seed=9, top_p=1e-9)


def test_n_and_several_prompts(server: Server, model: blockdiff.Model):
    answer = server.complete([PROMPT, "a dog"], n=2, temperature=1, seed=10, max_tokens=12)
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    wanted = [(PROMPT, 10), (PROMPT, 11), ("a dog", 12), ("a dog", 13)]
    assert texts == [server.text(prompt, temperature=1, seed=seed, max_tokens=12) for prompt, seed in wanted]
    assert len(set(texts)) == 4
    assert answer["usage"]["prompt_tokens"] == len(model.encode(PROMPT)) + len(model.encode("a dog"))
    ids = model.encode(PROMPT)
    assert server.text(ids, **SAMPLED) == server.text(PROMPT, **SAMPLED) == server.text([ids], **SAMPLED)


def test_stop_ends_the_text_before_it(server: Server):
    whole = server.text(PROMPT, **SAMPLED)
    stop = whole[6:9]
    answer = server.complete(PROMPT, **SAMPLED, stop=["never there", stop])
    assert answer["choices"][0]["text"] == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert server.complete(PROMPT, **SAMPLED, stop="never there")["choices"][0]["text"] == whole


def test_max_tokens_cut_inside_a_block(server: Server):
    options = {"diffusion": {"block_size": 8}, "temperature": 0}
    for count in (1, 5, 11):
        answer = server.complete(PROMPT, max_tokens=count, **options)
        assert answer["usage"]["completion_tokens"] <= count
        if answer["choices"][0]["finish_reason"] == "length":
            assert answer["usage"]["completion_tokens"] == count
    assert server.complete(PROMPT, temperature=0)["usage"]["completion_tokens"] <= 16


def test_max_forwards_ends_with_what_is_final(server: Server):
    whole = server.text(PROMPT, **SAMPLED, diffusion={"block_size": 4, "policy": "first_hitting"})
    for most in (1, 3, 5, 9):
        options = {"block_size": 4, "policy": "first_hitting", "max_forwards": most}
        answer = server.complete(PROMPT, **SAMPLED, diffusion=options)
        assert answer["usage"]["diffusion"]["forwards"] <= most
        assert answer["choices"][0]["finish_reason"] == "length"
        assert whole.startswith(answer["choices"][0]["text"])
        assert answer["choices"][0]["text"] != whole


def test_max_forwards_of_lossless_text_is_no_matter_of_the_clock(server: Server):
    whole = server.text(PROMPT, **SAMPLED, diffusion={"block_size": 1})
    options = {"block_size": 8, "lossless": True, "max_forwards": 9}
    texts = {server.text(PROMPT, **SAMPLED, diffusion=options) for _ in range(4)}
    assert len(texts) == 1
    assert whole.startswith(texts.pop())


def test_a_fault_of_ours_is_counted_as_one(trained: Path, monkeypatch: pytest.MonkeyPatch):
    from blockdiff.serve.replies import Reply

    def fault(reply: Reply) -> Any:
        raise ArithmeticError

    monkeypatch.setattr(Reply, "whole", fault)
    with client_of(trained / "checkpoint", raise_faults=False) as client:
        answer = client.post("/v1/completions", json={"prompt": PROMPT})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert 'route="/v1/completions",status="500"' in client.get("/metrics").text


def test_echo_puts_the_prompt_before_the_text(server: Server):
    plain, echoed = (server.text(PROMPT, **SAMPLED, echo=echo) for echo in (False, True))
    assert echoed == PROMPT + plain
    events = streamed(server, "/v1/completions", {"prompt": PROMPT, **SAMPLED, "echo": True})
    assert "".join(data["choices"][0]["text"] for _, data in events[:-1]) == echoed


@pytest.mark.parametrize("size", [1, 4])
def test_log_probabilities_say_what_they_are(server: Server, model: blockdiff.Model, size: int):
    options = {"block_size": size, "policy": "first_hitting"}
    own = model.generate(
        PROMPT, max_new_tokens=24, block_size=size, policy="first_hitting", sampling=Sampling(0.8), seed=5
    )[0]
    answer = server.complete(PROMPT, **SAMPLED, logprobs=0, diffusion=options)
    found = answer["choices"][0]["logprobs"]
    assert found["kind"] == ("ar" if size == 1 else "reveal")
    assert found["token_logprobs"] == pytest.approx(own.log_probabilities, abs=1e-4)
    assert "".join(found["tokens"]) == answer["choices"][0]["text"]
    text = answer["choices"][0]["text"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert text[offset:].startswith(token)
    events = streamed(server, "/v1/completions", {"prompt": PROMPT, **SAMPLED, "logprobs": 0, "diffusion": options})
    pieces = [data["choices"][0]["logprobs"] for _, data in events[:-1] if data["choices"][0]["logprobs"]]
    for key in ("tokens", "text_offset"):
        assert [value for piece in pieces for value in piece[key]] == found[key]
    values = [value for piece in pieces for value in piece["token_logprobs"]]
    assert values == pytest.approx(found["token_logprobs"], abs=1e-4)


def test_chat_answers_a_conversation(server: Server, model: blockdiff.Model):
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "the cat"}]
    answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": messages, **SAMPLED, "logprobs": True})[
        1
    ]
    rendered = "<|system|> be short <|user|> the cat <|assistant|>"
    ids = model.tokenizer(rendered, add_special_tokens=False)["input_ids"]  # type: ignore[misc]
    text = server.text(ids, **SAMPLED)
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["prompt_tokens"] == len(ids)
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == text
    assert all(bytes(token["bytes"]).decode() == token["token"] and token["logprob"] <= 0 for token in tokens)
    parts = [{"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "short"}]}]
    same = server.post("/v1/chat/completions", {"messages": [*parts, messages[1]], **SAMPLED})[1]
    assert same["choices"][0]["message"]["content"] == text
    other = server.post("/v1/chat/completions", {"messages": messages[1:], **SAMPLED})[1]
    assert other["choices"][0]["message"]["content"] != text


def test_generation_config_is_another_way_to_say_it(server: Server):
    body = {"messages": [{"role": "user", "content": "the cat"}], "seed": 4}
    wanted = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "num_beams": None}
    theirs = {**body, "generation_config": json.dumps(wanted), "max_tokens": None}
    ours = {**body, "max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "diffusion": {"top_k": 20}}
    path = "/v1/chat/completions"
    text = server.post(path, ours)[1]["choices"][0]["message"]["content"]
    assert server.post(path, theirs)[1]["choices"][0]["message"]["content"] == text
    greedy = {**body, "generation_config": json.dumps({**wanted, "do_sample": False})}
    other = server.post(path, greedy)[1]["choices"][0]["message"]["content"]
    assert (
        other == server.post(path, {**body, "max_tokens": 12, "temperature": 0})[1]["choices"][0]["message"]["content"]
    )
    assert other != text


@pytest.mark.parametrize("options", [{}, {"block_size": 8}, {"lossless": True}, {"policy": "self_rewarding_smc"}])
def test_streamed_text_is_the_whole_text(server: Server, options: dict[str, Any]):
    body = {"prompt": PROMPT, **SAMPLED, "n": 2, "diffusion": options}
    whole = server.post("/v1/completions", body)[1]
    for extra in ({}, {"stream_drafts": True}):
        sent = {**body, "diffusion": {**options, **extra}, "stream_options": {"include_usage": True}}
        events = streamed(server, "/v1/completions", sent)
        assert events[-1] == ("", "[DONE]")
        usage = events[-2][1]
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
        chunks = [data for name, data in events[:-2] if not name]
        assert all(chunk["usage"] is None for chunk in chunks)
        for index in (0, 1):
            own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert "".join(choice["text"] for choice in own) == whole["choices"][index]["text"]
            reasons = [choice["finish_reason"] for choice in own]
            assert reasons == [None] * (len(own) - 1) + [whole["choices"][index]["finish_reason"]]


def test_the_first_chunk_comes_before_any_text(server: Server):
    body = {"messages": [{"role": "user", "content": "the cat"}], **SAMPLED}
    events = [data for _, data in streamed(server, "/v1/chat/completions", body)[:-1]]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in event["choices"][0]["delta"] for event in events[1:])
    assert events[-1]["choices"][0]["delta"] == {}
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_drafts_are_apart_from_the_text(server: Server):
    options = {"block_size": 8, "policy": "first_hitting", "stream_drafts": True}
    events = streamed(server, "/v1/completions", {"prompt": PROMPT, **SAMPLED, "diffusion": options})
    drafts = [data for name, data in events if name == "draft"]
    chunks = [data for name, data in events[:-1] if not name and "diffusion" in data]
    assert drafts
    assert all(draft["choices"] == [] and draft["object"] == "blockdiff.draft" for draft in drafts)
    tokens = [token for chunk in chunks for token in chunk["diffusion"]["tokens"]]
    assert [chunk["diffusion"]["start"] for chunk in chunks] == [0, 8, 16][: len(chunks)]
    assert "".join(token["text"] for token in tokens) == server.text(
        PROMPT, **SAMPLED, diffusion=options | {"stream_drafts": False}
    )
    first = [draft for draft in drafts if draft["start"] == 0]
    masked = [sum(token is None for token in draft["tokens"]) for draft in first]
    assert masked == sorted(masked, reverse=True)
    assert masked[-1] == 0
    for slot, token in enumerate(tokens[:8]):  # a token's step is that of the draft in which it appeared
        appeared = next(draft for draft in first if draft["tokens"][slot] is not None)
        assert appeared["step"] == token["step"]
    plain = streamed(server, "/v1/completions", {"prompt": PROMPT, **SAMPLED})
    assert not any(name for name, _ in plain)
    assert not any("diffusion" in data for _, data in plain[:-1])


def test_bytes_of_one_character_are_never_split(server: Server, model: blockdiff.Model):
    prompt, split = "é漢字🙂 ñ é漢字🙂 ñ", 0
    assert model.tokenizer is not None
    for seed in range(8):
        body = {"prompt": prompt, "temperature": 10.0, "seed": seed, "max_tokens": 40, "diffusion": {"block_size": 4}}
        whole = server.text(**body)
        texts = [data["choices"][0]["text"] for _, data in streamed(server, "/v1/completions", body)[:-1]]
        assert "".join(texts) == whole
        own = model.generate(prompt, max_new_tokens=40, block_size=4, sampling=Sampling(10.0), seed=seed)[0]
        assert own.text == whole
        ends = [sum(own.blocks[: n + 1]) for n in range(len(own.blocks) - 1)]
        naive = [model.tokenizer.decode(own.tokens[:end]) for end in ends]
        split += sum(text.endswith("\ufffd") and not whole.startswith(text) for text in naive)
    assert split  # a block did end inside a character


REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "x"]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**20]}, "prompt"),
    ({"prompt": ["a"] * 17}, "prompt"),
    ({"prompt": "a " * 500}, "prompt"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 127}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 2.5}, "max_tokens"),
    ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens"),
    ({"prompt": "a", "temperature": -0.1}, "temperature"),
    ({"prompt": "a", "temperature": 1e9}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": 17}, "n"),
    ({"prompt": ["a"] * 9, "n": 2}, "n"),
    ({"prompt": "a", "stop": ""}, "stop"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
    ({"prompt": "a", "seed": 2**64}, "seed"),
    ({"prompt": "a", "logprobs": 2}, "logprobs"),
    ({"prompt": "a", "logprobs": 0, "echo": True}, "echo"),
    ({"prompt": [5], "echo": True}, "echo"),
    ({"prompt": "a", "best_of": 2}, "best_of"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty"),
    ({"prompt": "a", "presence_penalty": -1}, "presence_penalty"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "a", "stream": True, "stream_options": {"nonsense": True}}, "stream_options.nonsense"),
    ({"prompt": "a", "top_k": 5}, "top_k"),
    ({"prompt": "a", "diffusion": []}, "diffusion"),
    ({"prompt": "a", "diffusion": {"nonsense": 1}}, "diffusion.nonsense"),
    ({"prompt": "a", "diffusion": {"policy": "nonsense"}}, "diffusion.policy"),
    ({"prompt": "a", "diffusion": {"policy": "(" * 400}}, "diffusion.policy"),
    ({"prompt": "a", "diffusion": {"policy": "__import__('os').system('true')"}}, "diffusion.policy"),
    ({"prompt": "a", "diffusion": {"policy": "diffusion_gemma"}}, "diffusion.policy"),
    ({"prompt": "a", "diffusion": {"policy": "threshold(0.9) + guidance(1e308)"}}, "diffusion.policy"),
    ({"prompt": "a", "diffusion": {"policy": "threshold(0.9) + credit(1e999)"}}, "diffusion.policy"),
    ({"prompt": "a", "temperature": 0, "diffusion": {"policy": "self_rewarding_smc"}}, "diffusion.policy"),
    ({"prompt": "a", "diffusion": {"policy": "fixed_count", "threshold": 0.5}}, "diffusion.threshold"),
    ({"prompt": "a", "diffusion": {"threshold": 1.5}}, "diffusion.threshold"),
    ({"prompt": "a", "diffusion": {"block_size": 0}}, "diffusion.block_size"),
    ({"prompt": "a", "diffusion": {"block_size": 64}}, "diffusion.block_size"),
    ({"prompt": "a", "diffusion": {"max_forwards": 0}}, "diffusion.max_forwards"),
    ({"prompt": "a", "diffusion": {"max_forwards": 9, "policy": "draft_then_refine"}}, "diffusion.max_forwards"),
    ({"prompt": "a", "diffusion": {"stream_drafts": True}}, "diffusion.stream_drafts"),
    ({"prompt": "a", "logprobs": 0, "diffusion": {"lossless": True}}, "logprobs"),
]
CHAT: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "assistant", "content": "hi", "refusal": "no"}]}, "messages[0].refusal"),
    ({"messages": [{"role": "assistant", "content": "hi", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"top_logprobs": 3, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 0}, "top_logprobs"),
    ({"store": True}, "store"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"generation_config": "{"}, "generation_config"),
    ({"generation_config": '{"num_beams": 4}'}, "generation_config"),
    ({"generation_config": '{"temperature": -4}'}, "generation_config"),
    ({"generation_config": '{"temperature": NaN}', "temperature": None}, "generation_config"),
    ({"generation_config": '{"max_new_tokens": "3"}', "max_tokens": None}, "generation_config"),
    ({"generation_config": '{"max_new_tokens": 3}', "max_tokens": 9}, "generation_config"),
    ({"generation_config": '{"max_new_tokens": 3}', "max_completion_tokens": 9}, "max_completion_tokens"),
    ({"generation_config": '{"do_sample": false}', "temperature": 1.5}, "generation_config"),
    ({"generation_config": '{"do_sample": "no"}'}, "generation_config"),
    ({"generation_config": '{"top_k": 3}', "diffusion": {"top_k": 5}}, "generation_config"),
    ({"messages": [{"role": "user", "content": "hi " * 900}]}, "messages"),
    ({"prompt": "a"}, "prompt"),
]
ASKED = [("/v1/completions", body, param) for body, param in REFUSED] + [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **body}, param) for body, param in CHAT
]


@pytest.mark.parametrize(("path", "body", "param"), ASKED, ids=lambda value: json.dumps(value)[:60])
def test_what_cannot_be_honoured_is_refused_by_name(server: Server, path: str, body: Any, param: str | None):
    status, answer, headers = server.post(path, body)
    assert status == 400, answer
    error = answer["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    named = (param or "").rpartition(".")[2].split("[")[0]
    assert named in error["message"] or (named == "prompt" and "token" in error["message"])
    assert "\n" not in error["message"]
    assert len(error["message"]) <= 400
    assert headers["x-should-retry"] == "false"


def test_numbers_that_json_does_not_know_stay_out(trained: Path, monkeypatch: pytest.MonkeyPatch):
    """A model that breaks down gives no NaN and no infinity to a client."""
    from blockdiff.engine.entry import Entry

    deliver = Entry.deliver

    def broken(entry: Entry, ids: Any, steps: Any, log_probability: list[float], edits: Any) -> bool:
        values = [math.nan, -math.inf] * len(log_probability)
        return deliver(entry, ids, steps, values[: len(log_probability)], edits)

    monkeypatch.setattr(Entry, "deliver", broken)
    with client_of(trained / "checkpoint") as client:
        body = {"prompt": PROMPT, "max_tokens": 8, "logprobs": 0}
        found = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["token_logprobs"]
        assert set(found) == {-9999.0}
        text = client.post("/v1/completions", json={**body, "stream": True}).text
        assert "NaN" not in text
        assert "-9999.0" in text


NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "suffix": None, "n": 1}


def test_fields_that_ask_for_nothing_are_taken(server: Server):
    plain = server.text(PROMPT, **SAMPLED)
    extra = {**NEUTRAL, "user": "me", "stop": [], "echo": False, "stream": False, "logprobs": None, "diffusion": {}}
    assert server.text(PROMPT, **SAMPLED, **extra) == plain


def test_a_prompt_of_masks_is_refused(server: Server, model: blockdiff.Model):
    status, answer, _ = server.post("/v1/completions", {"prompt": [model.spec.mask_id] * 4})
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert "[MASK]" in answer["error"]["message"]


def test_what_training_does_not_cover_is_told_or_refused(server: Server, trained: Path):
    long = {"prompt": PROMPT, "max_tokens": 100, "temperature": 0}  # training had 64 tokens
    assert "not covered by training" in server.complete(**long)["usage"]["diffusion"]["warnings"][0]
    assert server.complete(PROMPT, max_tokens=8)["usage"]["diffusion"]["warnings"] == []
    with client_of(trained / "checkpoint", strict_coverage=True) as strict:
        answer = strict.post("/v1/completions", json=long)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_covered")
        assert strict.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 8}).status_code == 200


def test_the_model_says_what_it_can(server: Server):
    status, answer, _ = server.call("GET", "/v1/models")
    assert status == 200
    (entry,) = answer["data"]
    about = entry["blockdiff"]
    assert (entry["id"], about["context_length"], about["chat"], about["lossless"]) == ("tiny", 128, True, True)
    assert about["block_sizes"][:3] == [1, 2, 4]
    assert about["default_block_size"] in about["block_sizes"]
    names = {policy["name"] for policy in about["policies"]}
    assert {"threshold", "first_hitting"} <= names
    assert "diffusion_gemma" not in names
    for policy in about["policies"]:
        options = {"policy": policy["name"], **({"threshold": 0.7} if policy["threshold"] else {})}
        assert server.text(PROMPT, max_tokens=8, seed=1, diffusion=options) is not None
    assert server.call("GET", "/v1/models/tiny")[1] == entry
    assert server.call("GET", "/v1/models/other")[0] == 404
    assert server.post("/v1/completions", {"prompt": "a", "model": "other"})[0] == 404


def test_a_model_that_only_decodes_one_by_one(tmp_path: Path, trained: Path):
    """An AR checkpoint is served too, at block size 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    loaded = blockdiff.load(trained / "checkpoint")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=300
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "ar")
    assert loaded.tokenizer is not None
    loaded.tokenizer.save_pretrained(tmp_path / "ar")
    with client_of(tmp_path / "ar") as client:
        about = client.get("/v1/models").json()["data"][0]["blockdiff"]
        assert (about["diffusion"], about["block_sizes"]) == (False, [1])
        written = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 4}).json()
        assert written["usage"]["diffusion"]["block_size"] == 1
        answer = client.post("/v1/completions", json={"prompt": "a", "diffusion": {"block_size": 4}})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "diffusion.block_size")
        assert not {"draft_then_refine", "guided"} & {policy["name"] for policy in about["policies"]}
        answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        assert (answer.status_code, "chat template" in answer.json()["error"]["message"]) == (400, True)


def test_metrics_count(server: Server):
    names = ("requests", "tokens", "forwards", "texts")
    before = {name: server.metric(name) for name in names}
    usage = server.complete(PROMPT, **SAMPLED)["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    grown = {name: server.metric(name) - before[name] for name in names}
    assert grown["tokens"] == usage["total_tokens"] + cached
    assert grown["forwards"] == usage["diffusion"]["forwards"]
    assert grown["texts"] == 1
    assert grown["requests"] >= 2  # reading the metrics is one as well
    assert server.settled("pages_in_use", 0)
    assert math.isfinite(server.metric("pages"))


def test_limits_of_the_server(trained: Path):
    with client_of(trained / "checkpoint", max_tokens=10, largest_block=4) as client:
        about = client.get("/v1/models").json()["data"][0]["blockdiff"]
        assert (about["max_tokens"], about["block_sizes"]) == (10, [1, 2, 4])
        for body, param in (
            ({"max_tokens": 11}, "max_tokens"),
            ({"max_tokens": 5, "diffusion": {"block_size": 5}}, "diffusion.block_size"),
            ({"max_tokens": 10, "diffusion": {"block_size": 4}}, None),
        ):
            answer = client.post("/v1/completions", json={"prompt": "a", **body}).json()
            assert answer.get("error", {}).get("param") == param


def test_pieces_of_an_answer_do_not_wait_for_each_other():
    """A connection that is kept, and a stream, would else stand still for 40 ms at a time (Nagle's algorithm)."""
    from blockdiff.serve.listen import listen_on

    with listen_on("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
