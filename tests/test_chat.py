"""`blockdiff chat`: with a model, with a server, through a pipe and at a keyboard."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from rich.console import Console
from serving import serving
from stub import DONE, OTHER, OURS, Stub, chat_chunk
from terminal import Terminal
from test_cli import run

import blockdiff
from blockdiff.chat import Conversation, Session, Settings, Text, client
from blockdiff.chat.client import events
from blockdiff.chat.printable import printable
from blockdiff.chat.screen import LiveDrawing, Screen
from blockdiff.decode import Sampling

TEMPLATE = "<|begin|>{% for m in messages %}{{ m.role }} says {{ m.content }} {% endfor %}the"


@pytest.fixture
def own_template(tmp_path: Path) -> Path:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    return file


@pytest.fixture
def stub() -> Iterator[Stub]:
    yield from Stub(replies=[[chat_chunk("a dog"), chat_chunk(None, "stop"), DONE]]).start()


@pytest.fixture
def chat(monkeypatch, capsys):
    """`blockdiff chat` in this process, with these lines in its pipe: exit code, standard output, standard error."""

    def talk(lines: list[str], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", *arguments, capsys=capsys)

    return talk


@pytest.fixture
def endless(trained, tmp_path: Path) -> Path:
    """An AR model that writes on and on."""
    from blockdiff.loading import load_tokenizer

    tokenizer = load_tokenizer(trained / "checkpoint")
    network = tiny.backbone(dtype=torch.float32, vocab_size=len(tokenizer), max_position_embeddings=1 << 15)
    network.generation_config.eos_token_id = network.config.eos_token_id = tokenizer.eos_token_id
    network.save_pretrained(tmp_path / "endless")
    tokenizer.save_pretrained(tmp_path / "endless")
    return tmp_path / "endless"


# ---- a model of this machine


def test_a_pipe_is_answered_line_by_line(trained, own_template):
    """A process of its own: answers alone on standard output, each the engine's own for the conversation so far."""
    arguments = ["--chat-template", own_template, "--max-new-tokens", "12", "--temperature", "1", "--seed", "3"]
    command = [sys.executable, "-m", "blockdiff", "chat", trained / "checkpoint", *arguments]
    done = subprocess.run(command, input="the cat\na dog\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = blockdiff.load(trained / "checkpoint")

    def answer(prompt: str) -> str:
        return model.generate(prompt, max_new_tokens=12, sampling=Sampling(1.0), seed=3)[0].text

    first = answer("user says the cat the")
    second = answer(f"user says the cat assistant says {first} user says a dog the")
    assert done.stdout == f"{first}\n{second}\n"
    assert answer("user says a dog the") != second
    assert (
        len(re.findall(r"tokens, \d+ forwards, \d\.\d\d tokens per forward with commits, .* tokens/s", done.stderr))
        == 2
    )


def test_what_was_said_counts_until_it_is_cleared(trained, own_template, chat):
    base = [trained / "checkpoint", "--chat-template", own_template, "--max-new-tokens", 12, "--temperature", 1]
    code, out, _ = chat(["the cat", "/clear", "the cat", "the cat"], *base)
    first, again, third = out.splitlines()
    assert code == 0
    assert first == again
    assert first != third
    assert chat(["/system a red mat", "the cat"], *base)[1] == chat(["the cat"], *base, "--system", "a red mat")[1]
    assert chat(["/system a red mat", "the cat"], *base)[1].strip() != first
    assert chat(["/set seed=7", "the cat"], *base)[1] == chat(["the cat"], *base, "--seed", 7)[1]
    assert chat(["/set seed=7", "the cat"], *base)[1].strip() != first


def test_every_setting_reaches_the_model(trained, chat):
    base = [trained / "checkpoint", "--plain", "--max-new-tokens", 24, "--temperature", 2, "--block-size", 4]
    base += ["--policy", "one_step"]
    usual = chat(["the cat"], *base)
    for change in (
        "seed=9",
        "max_new_tokens=5",
        "temperature=0",
        "block_size=1",
        "policy=first_hitting",
        "lossless=true",
    ):
        changed = chat([f"/set {change}", "the cat"], *base)
        assert changed[0] == 0, changed
        assert (changed[1], re.findall(r"\d+ forwards", changed[2])) != (
            usual[1],
            re.findall(r"\d+ forwards", usual[2]),
        )
        key, value = change.split("=")
        option = [f"--{key.replace('_', '-')}", value][: 1 if value == "true" else 2]
        assert chat(["the cat"], *base, *option)[1] == changed[1], change
    assert "threshold=0.5" in chat(["/set threshold=0.5"], *base[:2])[2]
    assert chat(["/set block_size=none", "/set"], *base[:2])[2].count("block_size=none") == 2


def test_plain_text_is_continued(trained, chat):
    arguments = [trained / "checkpoint", "--plain", "--max-new-tokens", 10, "--block-size", 4, "--temperature", 1]
    model = blockdiff.load(trained / "checkpoint")

    def more(text: str) -> str:
        return model.generate(text, max_new_tokens=10, block_size=4, sampling=Sampling(1.0))[0].text

    code, out, _ = chat(["the cat", "", "a dog"], *arguments)
    first = more("the cat")
    second = more("the cat" + first)
    third = more(f"the cat{first}{second}\na dog")
    assert (code, out) == (0, printable(f"{first}\n{second}\n{third}\n"))
    assert more("a dog") != third
    assert chat(["//x"], *arguments)[1] == printable(more("/x")) + "\n"


def test_a_conversation_is_saved_once(trained, own_template, tmp_path, chat):
    target = tmp_path / "new" / "talk.json"
    base = [trained / "checkpoint", "--chat-template", own_template, "--max-new-tokens", 6]
    code, out, said = chat(["/system be brief", "the cat", f"/save {target}"], *base, "--api-key", "s3cret")
    assert code == 0
    saved = json.loads(target.read_text())
    contents = ["be brief", "the cat", out[:-1]]
    assert [message["content"] for message in saved["messages"]] == contents
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]
    assert {"seed", "versions", "settings", "model"} <= set(saved)
    assert "s3cret" not in target.read_text()
    before = target.read_bytes()
    code, _, said = chat(["a dog", f"/save {target}"], *base)
    assert (code, target.read_bytes()) == (2, before)
    assert "exists already" in said


@pytest.mark.parametrize(
    ("lines", "arguments", "words"),
    [
        (["a"], [], "no chat template.*--chat-template FILE"),
        (["a"], ["--chat-template", "missing.jinja"], "missing.jinja"),
        (["/sett seed=1"], ["--plain"], "/sett is no command"),
        (["/set sed=1"], ["--plain"], "did you mean seed"),
        (["/set seed"], ["--plain"], "give key=value"),
        (["/set seed=x"], ["--plain"], "seed takes a whole number"),
        (["/set seed=none"], ["--plain"], "seed takes a whole number"),
        (["/set lossless=maybe"], ["--plain"], "true or false"),
        (["/set temperature=-1"], ["--plain"], "temperature -1.0 is not possible"),
        (["/set threshold=nan"], ["--plain"], "threshold nan is not possible"),
        (["/set block_size=0"], ["--plain"], "block_size 0 is not possible"),
        (["/set seed=-1"], ["--plain"], "seed -1 is not possible"),
        (["/set policy=treshold"], ["--plain"], "threshold"),
        (["/set block_size=1000"], ["--plain"], "block size 1000"),
        (["/save"], ["--plain"], "give the name of a file"),
        (["/clear all"], ["--plain"], "takes nothing"),
        (["/system x"], ["--plain"], "belongs to a chat"),
        ([], ["--plain", "--system", "x"], "belongs to a chat"),
        ([], ["--plain", "--model", "x"], "--model chooses"),
        (["\udce9"], ["--plain"], "no Unicode"),
    ],
)
def test_what_cannot_be_is_one_line(trained, chat, lines, arguments, words):
    code, out, said = chat(lines, trained / "checkpoint", *arguments)
    assert (code, out) == (2, "")
    assert re.search(words, said), said
    assert said.count("\n") == 1


def test_a_broken_template_is_told_before_the_first_line(trained, own_template, chat):
    own_template.write_text("{% for m in messages %}")
    code, out, said = chat(["the cat"], trained / "checkpoint", "--chat-template", own_template)
    assert (code, out) == (2, "")
    assert "chat template" in said


def test_a_full_context_loses_nothing(trained, tmp_path, monkeypatch):
    """Told where it happens; what was said can be saved, and a cleared conversation goes on."""
    from blockdiff.chat.local import LocalPartner

    model = blockdiff.load(trained / "checkpoint")
    model.tokenizer.chat_template = TEMPLATE
    partner = LocalPartner(model, "trained", plain=False, drafts=False)
    target = tmp_path / "talk.json"
    lines = ["the cat", "a dog " * 60, f"/save {target}", "/clear", "the cat"]
    said, written = talk(partner, lines, monkeypatch, Settings(max_new_tokens=500))
    assert "the conversation has" in said
    assert said.count("/clear begins anew") >= 2  # the first answer fills the context, the second turn has no room
    saved = [message["content"] for message in json.loads(target.read_text())["messages"]]
    assert saved == ["the cat", written.splitlines()[0]]
    assert written.splitlines()[0] == written.splitlines()[1]


def test_what_was_said_is_read_once(trained, monkeypatch):
    """Keys and values of earlier turns are found again, after a stopped answer too; the text is the same as without."""
    from blockdiff.chat.local import LocalPartner

    model = blockdiff.load(trained / "checkpoint")
    model.tokenizer.chat_template = TEMPLATE
    settings = Settings(max_new_tokens=8, temperature=1.0, block_size=4)

    def answer(partner: LocalPartner, *turns: str) -> str:
        events = partner.answer(Conversation(turns=turns), settings)
        return "".join(event.piece for event in events if isinstance(event, Text))

    kept = LocalPartner(model, "trained", plain=False, drafts=False)
    first = answer(kept, "the cat sat on the mat and the dog ate the hat")
    assert kept.engine.shared_tokens == 0
    stopped = kept.answer(Conversation(turns=("the bird saw the cat",)), settings)
    next(stopped)
    stopped.close()
    assert not kept.engine.busy
    turns = ("the cat sat on the mat and the dog ate the hat", first, "a dog")
    second = answer(kept, *turns)
    assert kept.engine.shared_tokens > 16
    assert second == answer(LocalPartner(model, "trained", plain=False, drafts=False), *turns)
    assert second != answer(kept, "the bird saw the cat")


def talk(partner, lines: list[str], monkeypatch, settings: Settings = Settings()) -> tuple[str, str]:  # noqa: B008
    """A session of somebody who types these lines: what it said, and what the model wrote."""
    keys = iter(lines)

    def typed(_: str) -> str:
        try:
            return next(keys)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    out, err = (Console(file=io.StringIO(), soft_wrap=True) for _ in range(2))
    Session(partner, Conversation(), settings, Screen(out, err), interactive=True).run()
    return err.file.getvalue(), out.file.getvalue()


# ---- at a keyboard


@pytest.fixture
def terminal() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for one in opened:
        one.close()


def test_blocks_are_seen_while_they_fill(trained, own_template, terminal):
    arguments = ["--chat-template", own_template, "--max-new-tokens", 8, "--block-size", 4, "--policy", "fixed_count"]
    at = Terminal("chat", trained / "checkpoint", *arguments)
    terminal.append(at)
    assert "context of 128 tokens" in at.expect("> ")
    at.send("the cat\r")
    shown = at.expect("tokens/s")
    assert "\x1b[2m" in shown  # dim
    assert "░░░" in shown
    at.expect("> ")
    at.send("/help\r")
    assert "/save FILE" in at.expect("\n> ")
    at.send("/nothing\r")
    assert "/nothing is no command" in at.expect("\n> ")
    at.send("\x04")
    assert at.wait() == 0


def test_ctrl_c_stops_the_answer_and_then_the_session(endless, tmp_path, terminal):
    target = tmp_path / "talk.json"
    at = Terminal("chat", endless, "--plain", "--max-new-tokens", 30000)
    terminal.append(at)
    at.expect("> ")
    at.send("the\r")
    at.expect("\n")
    at.expect("\n")  # rows of the answer
    at.send("\x03")
    assert "tokens/s" not in at.expect("stopped\x1b[0m\r\n> ")
    at.send(f"/set max_new_tokens=3\r/save {target}\r")
    at.expect("saved to")
    role, text = json.loads(target.read_text())["messages"][-1].values()
    assert (role, len(text) > 20) == ("assistant", True)
    at.expect("> ")
    at.send("\r")  # and it goes on from there
    assert "3 tokens, " in at.expect("\n> ")
    at.interrupt()  # meant for the answer, a moment too late
    at.expect("\n> ")
    time.sleep(1.2)
    at.interrupt()
    assert at.wait() == 0


def test_ctrl_c_lets_go_of_the_server(stub, terminal):
    stub.slow, stub.replies = 0.05, [[chat_chunk(f"word{number} ") for number in range(400)]]
    at = Terminal("chat", stub.url)
    terminal.append(at)
    at.expect("> ")
    at.send("hello\r")
    at.expect("word5")
    assert not stub.hung_up.is_set()
    at.send("\x03")
    at.expect("stopped")
    assert stub.hung_up.wait(10)
    at.expect("> ")
    stub.slow, stub.replies = 0.0, [[chat_chunk("fine"), chat_chunk(None, "stop"), DONE]]
    at.send("again\r")
    at.expect("fine")
    turns = [message["content"] for message in stub.bodies[-1]["messages"]]
    assert turns[0::2] == ["hello", "again"]
    assert turns[1].startswith("word0 word1 ")
    assert "word399" not in turns[1]


@pytest.mark.parametrize("width", [7, 20, 33])
def test_rows_hold_the_whole_text(width):
    """However narrow the terminal and however the text came, what is left on it is the text; no row is cut."""
    text = "One day, a girl\tsaw 東京タワー and a\nverylongwordthatdoesnotfitanywhere.\n\n  :smile: [red]x[/red] home."
    for size in (1, 5, 1000):
        console = Console(file=io.StringIO(), force_terminal=True, width=width, soft_wrap=True)
        with LiveDrawing(console) as drawing:
            drawing.draft(("░", None, "x\ny"))
            for start in range(0, len(text), size):
                drawing.text(text[start : start + size])
        shown = seen(console.file.getvalue())
        assert re.sub(r"\s", "", "".join(shown)) == re.sub(r"\s", "", text)
        assert all(len(row) <= width for row in shown)
        assert any(row.startswith("One") for row in shown)


def seen(written: str) -> list[str]:
    """The rows that stay on a terminal: erased ones are gone."""
    rows, at = [""], 0
    for part in re.findall(r"\x1b\[[?\d;]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            at += 1
            rows += [""] * (at == len(rows))
        elif part.endswith("A") and part.startswith("\x1b"):
            at -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            rows[at] = ""
        elif not part.startswith("\x1b") and part != "\r":
            rows[at] += part
    return rows


def test_a_model_cannot_write_to_the_terminal_itself(stub, chat):
    bad = "\x1b[31mred\x1b]0;title\x07 [bold]b[/bold] :smile: \x9b2J \u202eabc \ud800 \x08\r\n\tend"
    assert (
        printable(bad)
        == "\\x1b[31mred\\x1b]0;title\\x07 [bold]b[/bold] :smile: \\x9b2J \\u202eabc \\ud800 \\x08\n\tend"
    )
    assert printable("naïve 東京 👍🏽\n\tok") == "naïve 東京 👍🏽\n\tok"
    stub.replies = [[chat_chunk(bad), chat_chunk(None, "stop"), DONE]]
    code, out, _ = chat(["hello"], stub.url)
    assert (code, out) == (0, printable(bad) + "\n")
    stub.replies = [(400, {"error": {"message": bad}})]
    code, _, said = chat(["hello"], stub.url)
    assert code == 2
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said)
    stub.models = [{"id": bad}, {"id": "b"}]
    code, _, said = chat(["hello"], stub.url)
    assert code == 2
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said)


# ---- a server


def test_events_may_be_cut_anywhere():
    stream = (
        "\ufeff: hello\n\ndata: één\n\nevent: draft\r\ndata: {\r\ndata:  1}\r\n\r\nid: 3\rretry: 5\rdata:x\r\r"
        "event: nothing\n\ndata\n\ndata: lost"
    ).encode()
    expected = [("", "één"), ("draft", "{\n 1}"), ("", "x"), ("", "")]
    for size in range(1, len(stream) + 1):
        assert list(events(stream[at : at + size] for at in range(0, len(stream), size))) == expected
    assert list(events([stream + b"\n\n"])) == [*expected, ("", "lost")]


def test_a_stream_that_never_says_anything_is_left(stub, chat, monkeypatch):
    monkeypatch.setattr(client, "_QUIET", 0.2)
    stub.slow = 1.0
    code, _, said = chat(["hello"], stub.url)
    assert (code, said) == (1, f"blockdiff: {stub.url}/v1: the connection broke off (timed out)\n")
    monkeypatch.setattr(client, "_LONGEST", 100)
    assert list(events([b"data: " + b"x" * 90, b"\n\n"])) == [("", "x" * 90)]
    with pytest.raises(ConnectionError, match="a line without an end"):
        list(events([b"data: " + b"x" * 99, b"\n\n"]))


def test_chunks_may_be_cut_anywhere(stub, chat):
    whole = chat_chunk("één ") + b": keep-alive\n\n" + chat_chunk("東京") + chat_chunk(None, "stop") + DONE
    for size in (1, 7, len(whole)):
        stub.replies = [[whole[at : at + size] for at in range(0, len(whole), size)]]
        assert chat(["hello"], stub.url)[:2] == (0, "één 東京\n")


def test_a_server_is_sent_what_it_understands(stub, chat):
    usual = {
        "model": "other",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 512,
        "temperature": 0.0,
        "seed": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    chat(["hello"], stub.url)
    assert [path for path, _, _ in stub.seen] == ["/v1/models", "/v1/chat/completions"]
    assert stub.bodies == [usual]
    chat(["hello"], f"{stub.url}/v1/", "--block-size", 4, "--lossless", "--policy", "fastest", "--threshold", 0.5)
    asked = {"policy": "fastest", "threshold": 0.5, "block_size": 4, "lossless": True}
    assert stub.bodies[-1] == usual | {"diffusion": asked}
    stub.models = [OTHER, OURS]
    chat(["hello"], stub.url, "--model", "ours", "--seed", 5, "--max-new-tokens", 9, "--temperature", 0.5)
    assert stub.bodies[-1] == usual | {"model": "ours", "seed": 5, "max_tokens": 9, "temperature": 0.5}
    chat(["hello"], stub.url, "--model", "unlisted")
    assert stub.bodies[-1] == usual | {"model": "unlisted"}
    stub.models = (500, b"")
    chat(["hello"], stub.url, "--model", "unlisted")
    assert stub.bodies[-1] == usual | {"model": "unlisted"}
    stub.models = [OTHER, OURS]
    stub.replies = [[b'data: {"choices": [{"text": "a dog", "finish_reason": "stop"}]}\n\n']]
    chat(["hello", "you"], stub.url, "--model", "other", "--plain")
    assert [body.get("prompt") for body in stub.bodies[-2:]] == ["hello", "helloa dog\nyou"]
    assert "messages" not in stub.bodies[-1]


def test_drafts_are_asked_of_our_server_and_seen(stub, terminal):
    draft = b'event: draft\ndata: {"object": "blockdiff.draft", "choices": [], "tokens": ["one", null, null]}\n\n'
    usage = {"completion_tokens": 6, "total_tokens": 64, "diffusion": {"forwards": 4, "warnings": ["not covered"]}}
    end = [chat_chunk(None, "length"), f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode(), DONE]
    stub.slow, stub.models, stub.replies = 0.05, [OURS], [[draft, chat_chunk("one dog ran"), *end]]
    at = Terminal("chat", stub.url)
    terminal.append(at)
    assert "ours, context of 64 tokens" in at.expect("> ")
    at.send("hello\r")
    shown = at.expect("\n> ")
    assert "\x1b[2mone░░" in shown
    assert "6 tokens, 4 forwards, 1.50 tokens per forward with commits" in shown
    assert "not covered" in shown
    assert "/clear begins anew" in shown
    assert stub.bodies[0]["diffusion"] == {"stream_drafts": True}
    assert "max_tokens" not in stub.bodies[0]  # 512 are more than its context holds: as many as there is room for


def test_keys_go_to_the_server_alone(stub, chat, monkeypatch):
    monkeypatch.setenv("BLOCKDIFF_API_KEY", "from-environment")
    chat(["hello"], stub.url)
    assert {headers["Authorization"] for _, headers, _ in stub.seen} == {"Bearer from-environment"}
    stub.seen.clear()
    chat(["hello"], stub.url, "--api-key", "given")
    assert {headers["Authorization"] for _, headers, _ in stub.seen} == {"Bearer given"}
    stub.seen.clear()
    stub.headers = {"Location": f"{stub.url}/elsewhere"}
    stub.models = (302, {})
    code, _, said = chat(["hello"], stub.url)
    assert (code, len(stub.seen)) == (2, 1)
    assert "/elsewhere (302); give that address itself" in said
    code, _, said = chat(["hello"], stub.url, "--api-key", "a\nb")
    assert code == 2
    assert "a\nb" not in said
    monkeypatch.delenv("BLOCKDIFF_API_KEY")
    stub.headers, stub.models = {}, [OTHER]
    chat(["hello"], stub.url)
    assert "Authorization" not in stub.seen[-1][1]


TOO_LONG = {"error": {"message": "the context holds 64 tokens", "code": "context_length_exceeded"}}


@pytest.mark.parametrize(
    ("reply", "code", "words"),
    [
        (
            (400, {"error": {"message": "policy: no such\nthing", "type": "invalid_request_error"}}),
            2,
            "policy: no such thing",
        ),
        ((400, {"detail": "odd"}), 2, r"refuses this \(400: odd\)"),
        ((404, b"<html>not here</html>"), 2, "404: <html>not here"),
        ((401, {"error": {"message": "who are you"}}), 2, "401: who are you.*--api-key or BLOCKDIFF_API_KEY"),
        ((429, {"error": {"message": "full"}}), 1, r"busy \(429: full\); try again in 7 s"),
        ((500, b""), 1, r"failed \(500\)"),
        ((400, TOO_LONG), 2, "does not fit.*/clear begins anew"),
        ([b'data: {"error": {"message": "it broke"}}\n\n'], 1, "broke the answer off: it broke"),
        ([b"data: [1]\n\n"], 1, r"no chunk of an answer: \[1\]"),
        ([b"data: {not json\n\n"], 1, "no chunk of an answer"),
        ([chat_chunk("half an ans")], 1, "broke off before the end"),
        ((200, {"choices": []}), 2, "not with a stream"),
    ],
)
def test_what_a_server_says_is_one_line(stub, chat, reply, code, words):
    stub.headers, stub.replies = {"Retry-After": "7"}, [reply]
    found, _, said = chat(["hello"], stub.url)
    assert (found, said.count("\n")) == (code, 1)
    assert re.search(words, said), said


def test_who_types_goes_on_after_an_error(stub, monkeypatch):
    """The message that failed is not part of the conversation; text that came before a break is."""
    from blockdiff.chat.client import Client
    from blockdiff.chat.remote import RemotePartner

    fine = [chat_chunk("fine"), chat_chunk(None, "stop")]
    stub.replies = [(429, {}), fine, [chat_chunk("half an ans")], fine]
    partner = RemotePartner(Client(stub.url), None, plain=False, drafts=False)
    said, written = talk(partner, ["one", "two", "three", "four"], monkeypatch)
    turns = ["two", "fine", "three", "half an ans", "four"]
    assert [message["content"] for message in stub.bodies[-1]["messages"]] == turns
    assert "busy (429)" in said
    assert "broke off" in said
    assert written == "fine\nhalf an ans\nfine\n"


def test_an_answer_takes_what_room_there_is(stub, chat):
    """Of a chat the server knows it; a text is asked for in halves."""
    stub.replies = [(400, TOO_LONG), [chat_chunk("a dog"), chat_chunk(None, "length")]]
    assert chat(["hello"], stub.url, "--max-new-tokens", 40)[:2] == (0, "a dog\n")
    assert [body.get("max_tokens") for body in stub.bodies] == [40, None]
    text = [b'data: {"choices": [{"text": "a dog", "finish_reason": "length"}]}\n\n']
    stub.replies = [(400, TOO_LONG), (400, TOO_LONG), text]
    assert chat(["hello"], stub.url, "--max-new-tokens", 40, "--plain")[:2] == (0, "a dog\n")
    assert [body.get("max_tokens") for body in stub.bodies[2:]] == [40, 20, 10]


def test_our_own_server_writes_what_the_model_here_writes(trained, template, server, chat, terminal):
    """Same model, same seed: chat and plain text, in small and in lossless blocks; another seed differs."""
    options, lines = ["--temperature", 1, "--seed", 3, "--block-size", 4], ["the cat", "a dog"]
    here = [trained / "checkpoint", "--chat-template", template, *options]
    for extra in ([], ["--lossless"], ["--threshold", 0.3], ["--max-new-tokens", 9]):
        code, written, said = chat(lines, *here, *extra)
        there = chat(lines, server.url, *options, *extra)
        assert (code, there[:2]) == (0, (0, written))
        counted = r"^\d+ tokens" if "--lossless" in extra else r"^\d+ tokens, \d+ forwards"
        assert re.findall(counted, there[2], re.M) == re.findall(counted, said, re.M)
        assert chat(lines, server.url, *options, *extra, "--seed", 4)[1] != written
    plain = ["--plain", "--max-new-tokens", 9]
    assert chat(["the cat", ""], server.url, *options, *plain)[1] == chat(["the cat", ""], *here, *plain)[1]
    code, _, said = chat(["a dog " * 60], server.url)
    assert (code, "/clear begins anew" in said) == (2, True)
    at = Terminal("chat", server.url, "--block-size", 4, "--policy", "fixed_count")
    terminal.append(at)
    at.expect("> ")
    at.send("the cat\r")
    assert "░░░" in at.expect("tokens/s")


def test_our_own_server_asks_for_its_key(trained, tmp_path, chat):
    with serving(trained / "checkpoint", tmp_path, BLOCKDIFF_API_KEY="right") as server:
        assert chat(["the"], server.url, "--plain", "--api-key", "right")[0] == 0
        for wrong in ([], ["--api-key", "wrong"]):
            code, out, said = chat(["the"], server.url, "--plain", *wrong)
            assert (code, out, said.count("\n")) == (2, "", 1)
            assert "wants an API key" in said
        code, _, said = chat(["the"], server.url, "--api-key", "right")
        assert code == 2
        assert "no chat template" in said


@pytest.mark.parametrize(
    ("models", "arguments", "code", "words"),
    [
        ([OTHER, OURS], [], 2, "has 2 models; choose one with --model: other, ours"),
        ([], [], 2, "has 0 models"),
        ((200, b"<html>"), [], 2, "no JSON; is this an OpenAI-compatible server"),
        ((200, ["x"]), [], 2, "lists no models"),
        ((401, {}), [], 2, "wants an API key"),
        ((403, {}), [], 2, "refuses this"),
        ((404, b""), [], 2, "does not list its models; name one with --model"),
        ((503, {}), [], 1, "is busy"),
        ([OURS | {"blockdiff": {"chat": False}}], [], 2, "no chat template.*--plain"),
        ([OTHER], ["--chat-template", "x"], 2, "the template is the server's"),
    ],
)
def test_a_server_that_cannot_be_talked_to_is_one_line(stub, chat, models, arguments, code, words):
    stub.models = models
    found, out, said = chat(["hello"], stub.url, *arguments)
    assert (found, out, said.count("\n")) == (code, "", 1)
    assert re.search(words, said), said


def test_addresses_where_nobody_answers(chat):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    code, _, said = chat(["hello"], url)
    assert (code, said) == (1, f"blockdiff: {url}/v1: no server answers there (Connection refused)\n")
    for bad in ("http://", "http://host:port", "http://me@host", "http://host/?x=1", "http://ho st"):
        code, _, said = chat(["hello"], bad)
        assert (code, said.count("\n")) == (2, 1)
        assert "no address of a server" in said
