"""Who may ask the server what, and that nothing of a request reaches a file, a header or another site."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from serving import Server, serving

KEY = "a-key-of-24-characters-01"
PROMPT = {"prompt": "the cat sat on", "max_tokens": 4}
OPEN = ("/", "/page.css", "/page.js", "/health")
SECRET = "zebra-crossing-prompt"


@pytest.fixture(scope="module")
def guarded(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    options = ("--cors-origin", "https://friend.example", "--name", "tiny", "--allow-host", "llm.example.org")
    with serving(trained / "checkpoint", folder, *options, BLOCKDIFF_API_KEY=KEY) as running:
        yield running


def raw(server: Server, data: bytes) -> bytes:
    """The first bytes of what the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(data)
        return connection.recv(65536)


@pytest.mark.parametrize("given", [None, "wrong", KEY + "x", KEY[:-1], "", "a b", "ключ"])
def test_without_the_key_nothing_is_answered(guarded: Server, given: str | None):
    headers = {} if given is None else {"Authorization": f"Bearer {given}".encode().decode("latin-1")}
    for method, path in (
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("POST", "/load_model"),
        ("GET", "/nothing"),
    ):
        status, answer, found = guarded.call(method, path, PROMPT if method == "POST" else None, **headers)
        assert status == 401, path
        assert answer["error"]["code"] == "invalid_api_key"
        assert found["www-authenticate"] == "Bearer"
        assert KEY not in str(answer)


def test_with_the_key_it_is(guarded: Server):
    for value in (f"Bearer {KEY}", f"bearer  {KEY}"):
        assert guarded.post("/v1/completions", PROMPT, Authorization=value)[0] == 200
    assert guarded.post("/v1/completions", PROMPT, Authorization=KEY)[0] == 401
    assert guarded.post("/v1/completions", PROMPT, Authorization=f"Basic {KEY}")[0] == 401
    for path in OPEN:
        assert guarded.call("GET", path)[0] == 200
        assert guarded.call("HEAD", path)[0] == 200
    assert guarded.call("GET", "/v1/models/", Authorization=f"Bearer {KEY}")[0] == 404  # no redirect that leaks the key


PATHS = [
    "../../../etc/passwd",
    "/etc/passwd",
    "..\\..\\windows",
    "file:///etc/passwd",
    "tiny/../tiny",
    "tiny\x00",
    "~",
    "",
]


@pytest.mark.parametrize("name", PATHS)
def test_a_model_name_is_never_a_path(server: Server, name: str):
    status, answer, _ = server.post("/v1/completions", {**PROMPT, "model": name})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    status, answer, _ = server.post("/load_model", {"model": name})
    assert status == 404
    assert "root:" not in str(answer)


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/page.js/../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/app.py", "/docs"],
)
def test_no_path_reaches_the_file_system(server: Server, path: str):
    status, answer, _ = server.call("GET", path)
    assert status in (400, 404)
    assert "root:" not in str(answer)
    assert server.call("GET", f"/v1/models{path}")[0] in (400, 404)


def test_headers_cannot_be_injected(server: Server):
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n"
    answer = raw(server, (head + "X-Request-Id: a\r\n evil: b\r\n\r\n").encode())
    assert b"evil" not in answer
    assert raw(server, (head + "X-Bad\nSet-Cookie: a=b: c\r\n\r\n").encode()).startswith(b"HTTP/1.1 400")
    for name in ("a\r\nSet-Cookie: evil=1", "a\nevil: 1"):
        status, _, headers = server.post("/v1/completions", {**PROMPT, "model": name, "user": name})
        assert status == 404
        assert "set-cookie" not in headers
        assert "evil" not in headers
    answer = raw(server, b"GET /%0d%0aSet-Cookie:evil=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"\r\nSet-Cookie" not in answer
    log = server.log.read_text()
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in log.splitlines() if "POST" in line or "GET" in line)


def test_oversized_headers_and_lines_are_refused(server: Server):
    for data in (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Large: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-Many: a\r\n" * 10_000 + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 40 + b"\r\n\r\n",
    ):
        with suppress(ConnectionError):  # it was closed while we still sent
            assert raw(server, data).startswith(b"HTTP/1.1 4")
    assert server.call("GET", "/health")[0] == 200


def test_requests_cannot_be_smuggled(server: Server):
    """Two lengths that differ, or a length beside chunks."""
    chunked = b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert raw(server, head + chunked).startswith(b"HTTP/1.1 400")
    both = head + b"Content-Length: 4\r\nContent-Length: 9\r\n\r\n{}{}{}{}{"
    assert raw(server, both).startswith(b"HTTP/1.1 400")


def test_other_hosts_and_sites_are_kept_out(server: Server, guarded: Server):
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost@evil.example"):
        status, answer, _ = server.call("GET", "/v1/models", Host=host)
        assert (status, answer["error"]["code"]) == (400, "unknown_host")
    for host in ("localhost", f"127.0.0.1:{server.port}", "[::1]:80", "LOCALHOST"):
        assert server.call("GET", "/v1/models", Host=host)[0] == 200
    key = {"Authorization": f"Bearer {KEY}"}
    assert guarded.call("GET", "/v1/models", Host="llm.example.org", **key)[0] == 200
    for origin, allowed in (("https://friend.example", True), ("https://evil.example", False)):
        _, _, headers = guarded.call("GET", "/v1/models", Origin=origin, **key)
        assert ("access-control-allow-origin" in headers) is allowed
        _, _, headers = server.call("GET", "/v1/models", Origin=origin)
        assert "access-control-allow-origin" not in headers  # off unless asked


@pytest.mark.parametrize(
    ("host", "allowed", "names"),
    [
        ("127.0.0.1", (), {"localhost", "127.0.0.1", "[::1]"}),
        ("127.0.0.2", (), {"127.0.0.2"}),
        ("::1", (), {"localhost", "[::1]"}),
        ("localhost", ("LLM.example.org",), {"localhost", "llm.example.org"}),
        ("0.0.0.0", ("llm.example.org",), {"localhost", "llm.example.org"}),
    ],
)
def test_whoever_serves_this_machine_alone_checks_the_host(host: str, allowed: tuple[str, ...], names: set[str]):
    from blockdiff.cli_serve import _hosts

    assert names <= set(_hosts(host, allowed))
    assert "evil.example" not in _hosts(host, allowed)
    assert _hosts("0.0.0.0", ()) == ()  # everyone is served, by whatever name


def test_the_page_allows_itself_only(server: Server):
    for path in ("/", "/page.css", "/page.js"):
        status, text, headers = server.call("GET", path)
        assert status == 200
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://(?!www\.w3\.org)", str(text))


def test_prompts_and_keys_stay_out_of_the_log(server: Server, guarded: Server, trained: Path, tmp_path: Path):
    body = {"prompt": SECRET, "max_tokens": 4}
    server.complete(**body)
    guarded.post("/v1/completions", body, Authorization=f"Bearer {KEY}")
    server.post("/v1/completions", {**body, "nonsense": SECRET})
    for one in (server, guarded):
        log = one.log.read_text()
        assert "/v1/completions" in log
        assert SECRET not in log
        assert KEY not in log
    with serving(trained / "checkpoint", tmp_path, "--log-prompts") as telling:
        telling.complete(**body)
        assert SECRET in telling.log.read_text()


def test_only_safe_weights_are_loaded(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Pickled weights and code beside a checkpoint are refused before anything of them runs."""
    import shutil

    import torch
    from test_cli import run

    pickled = tmp_path / "pickled"
    shutil.copytree(trained / "checkpoint", pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    coded = tmp_path / "coded"
    shutil.copytree(trained / "checkpoint", coded)
    config = json.loads((coded / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (coded / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    (coded / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for checkpoint, says in ((pickled, "safetensors"), (coded, "custom code")):
        code, _, error = run("serve", checkpoint, "--port", 0, capsys=capsys)
        assert code == 2
        assert says in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "ran").exists()
