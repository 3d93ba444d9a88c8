"""Many streams at once against a real server in a process of its own (the two minutes of docs/serve.md, shortened)."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import Server

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import serve_load  # noqa: E402


def test_many_streams_lose_and_mix_nothing(trained: Path, tmp_path: Path):
    command = [sys.executable, str(ROOT / "benchmarks" / "serve_load.py"), str(trained / "checkpoint")]
    options = ["--seconds", "6", "--streams", "64", "--requests", "24", "--rounds", "1", "--json"]
    done = subprocess.run(
        [*command, *options, str(tmp_path / "l.json")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "l.json").read_text())
    assert result["different"] == []
    assert (result["broken"], result["returned"]) == (0, True)
    assert set(result["statuses"]) == {"200"}
    assert result["texts"] > 64
    assert result["left"] > 0
    assert result["throughput_ratio"] > 0


BODY: dict[str, Any] = {"prompt": "the cat", "max_tokens": 16, "seed": 1, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("leave_after", [None, 2])
def test_the_load_notices_another_text(server: Server, leave_after: int | None):
    """The twin: what differs from its solo run is found, of streams that are read whole or in part."""
    body = {**BODY, "diffusion": {"block_size": 4}}
    alone = asyncio.run(serve_load.follow(server.port, body, serve_load.Phase(), None, None))
    for told, count in ((alone, 0), ("?" + alone[1:], 1), (alone + "?", int(leave_after is None))):
        phase = serve_load.Phase()
        asyncio.run(serve_load.follow(server.port, body, phase, leave_after, told))
        assert len(phase.different) == count
        assert phase.broken == []
    refused = serve_load.Phase()
    asyncio.run(serve_load.follow(server.port, {**body, "n": 0}, refused, None, alone))
    assert refused.statuses == {400: 1}
