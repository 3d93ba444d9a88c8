"""Clients that others made, against a real server: OpenAI's own, transformers' chat, and a fuzzer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Server, serving

import blockdiff
from blockdiff.decode import Sampling

EXAMPLES = 320  # of each operation: about 2,100 requests in all
MESSAGES: Any = [{"role": "user", "content": "the cat sat on the mat"}]
KEY = "key-for-the-clients"


@pytest.fixture(scope="module")
def keyed(trained: Path, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--chat-template", str(template), "--name", "tiny", "--running", "1", "--waiting", "1")
    with serving(trained / "checkpoint", tmp_path_factory.mktemp("keyed"), *options, BLOCKDIFF_API_KEY=KEY) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as one:
        yield one


def test_openai_completes(client: openai.OpenAI, trained: Path):
    own = blockdiff.load(trained / "checkpoint").generate(
        "the cat", max_new_tokens=20, sampling=Sampling(0.8), seed=2, stop=["mat"]
    )[0]
    asked: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 20, "temperature": 0.8, "seed": 2}
    answer = client.completions.create(**asked, stop=["mat"], logprobs=0)
    assert answer.choices[0].text == own.text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(own.tokens)
    assert answer.usage.model_extra is not None
    assert answer.usage.model_extra["diffusion"]["forwards"] == own.forwards
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == own.text
    with client.completions.create(**asked, stop=["mat"], stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == own.text
    assert client.completions.create(**{**asked, "seed": 3}).choices[0].text != own.text


def test_openai_chats(client: openai.OpenAI):
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 20, "seed": 2}
    told = client.chat.completions.create(**asked).choices[0].message
    more: Any = [*MESSAGES, told, {"role": "user", "content": "and then"}]  # an answer is sent back as it came
    next_one = client.chat.completions.create(**{**asked, "messages": more})
    assert next_one.usage is not None
    answer = client.chat.completions.create(**asked, logprobs=True)
    text = answer.choices[0].message.content
    assert text == told.content
    assert answer.usage is not None
    assert next_one.usage.prompt_tokens > answer.usage.prompt_tokens
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert "".join(token.token for token in content) == text
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage is not None
    assert answer.usage is not None
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    drafts = {"diffusion": {"stream_drafts": True}}
    with client.chat.completions.create(**asked, stream=True, extra_body=drafts) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert len([chunk for chunk in chunks if not chunk.choices]) > 1  # drafts pass by
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, max_tokens=20, seed=2) as helper:
        deltas = [event.delta for event in helper if event.type == "content.delta"]
    assert "".join(deltas) == text


def test_openai_asynchronously(server: Server):
    import asyncio

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:

            async def one(seed: int) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt="the cat", max_tokens=20, seed=seed, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return list(await asyncio.gather(*(one(seed) for seed in range(8))))

    texts = asyncio.run(run())
    assert texts == [server.text("the cat", max_tokens=20, seed=seed) for seed in range(8)]


def test_openai_lists_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "blockdiff"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_openai_errors(client: openai.OpenAI, keyed: Server):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, frequency_penalty=1.0)
    assert bad.value.param == "frequency_penalty"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.code == "model_not_found"
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="wrong") as other, pytest.raises(openai.AuthenticationError):
        other.models.list()
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=KEY, max_retries=0) as allowed:
        slow = {"diffusion": {"policy": "random + reverse(steps=3000)", "block_size": 8}}
        asked: Any = {"model": "tiny", "prompt": "a", "max_tokens": 60, "stream": True, "extra_body": slow}
        streams = [allowed.completions.create(**asked) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as full:
            allowed.completions.create(model="tiny", prompt="a")
        assert int(full.value.response.headers["retry-after"]) > 0
        for stream in streams:
            stream.close()


def test_transformers_chat(server: Server, tmp_path: Path):
    """`transformers chat` loads the model, streams an answer and ends."""
    program = shutil.which("transformers", path=str(Path(sys.executable).parent))
    assert program is not None
    command = [program, "chat", "tiny", f"{server.url}/v1", "--save-folder", str(tmp_path), "max_new_tokens=12"]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [*command, "do_sample=False"],
        input="the cat sat on the mat\nn\n!exit\n!exit\n",  # n: it is asked whether to go on after a full answer
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    asked = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    text = server.post("/v1/chat/completions", asked)[1]["choices"][0]["message"]["content"]
    assert " ".join(text.split()) in " ".join(done.stdout.split())


def test_nothing_that_the_schema_allows_breaks_it(trained: Path, template: Path, tmp_path: Path):
    """Requests made from our own OpenAPI description, possible and impossible ones: no 5xx, answers as described."""
    options = ("--max-tokens", "8", "--chat-template", str(template), "--timeout", "20", "--name", "tiny")
    program = str(Path(sys.executable).parent / "schemathesis")
    with serving(trained / "checkpoint", tmp_path, *options) as server:
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        command = [program, "run", f"{server.url}/openapi.json", "--checks", checks, "--max-examples", str(EXAMPLES)]
        command += ["--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all", "--seed", "1"]
        command += ["--generation-database", "none", "--request-timeout", "60", "--mode", "all"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert server.metric("requests") > 2000
        assert server.settled("running", 0)
        assert server.settled("pages_in_use", 0)
        assert "Traceback" not in server.log.read_text()
        assert server.text("the cat", max_tokens=4) is not None
