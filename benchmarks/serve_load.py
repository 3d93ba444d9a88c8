"""Many streams at once against a server in a process of its own, with clients that leave.

Rounds of one stream at a time and of many streams take turns; ratios are those of one round, and their median is told.
Every text is compared with the one that the same request got alone, before the load: whole, or as far as a client that
left had read it.

    python benchmarks/serve_load.py runs/demo/checkpoint --seconds 120 --json load.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil

from blockdiff.files import write_json
from blockdiff.runtime import record

WORDS = "the and for with from list object class value call name type string number file error key set test path"
POLICIES = ("threshold", "threshold(0.5)", "fixed_count", "entropy_bounded", "first_hitting")


@dataclass
class Phase:
    """What one phase of a round saw."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)  # seconds to the first block of each stream
    whole: int = 0
    left: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)  # streams that ended without their end
    different: list[dict[str, Any]] = field(default_factory=list)


def catalogue(count: int, sizes: list[int], context: int, seed: int) -> list[dict[str, Any]]:
    """Requests of many kinds, which a context of so many tokens holds."""
    words, tokens = min(40, context // 12), min(97, context // 2)
    draw = random.Random(seed)
    found = []
    for number in range(count):
        options: dict[str, Any] = {"block_size": draw.choice(sizes), "policy": draw.choice(POLICIES)}
        if draw.random() < 0.2:
            options = {"block_size": max(sizes), "lossless": True}
        prompt = " ".join(draw.choice(WORDS.split()) for _ in range(draw.randrange(2, words)))
        sampled = {
            "temperature": draw.choice([0.0, 0.7, 1.0]),
            "seed": number,
            "max_tokens": draw.randrange(16, tokens),
        }
        found.append({"prompt": prompt, **sampled, "diffusion": options, "stream_options": {"include_usage": True}})
    return found


async def stream(port: int, body: dict[str, Any]) -> AsyncIterator[tuple[int, str, Any]]:
    """A stream's events: (status, text, usage)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps({**body, "stream": True}).encode()
        head = "POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if status != 200:
            yield status, "", None
            return
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                yield status, "", "done"
                return
            chunk = json.loads(line[6:])
            if "error" in chunk:
                yield 500, "", None
                return
            choices = chunk["choices"]
            yield status, choices[0]["text"] if choices else "", chunk.get("usage")
    finally:
        writer.close()


async def follow(port: int, body: dict[str, Any], phase: Phase, leave_after: int | None, alone: str | None) -> str:
    """Read a stream, or leave after so many pieces of text; what it brought goes to the phase."""
    began, text, pieces, usage, ended, told = time.perf_counter(), "", 0, None, False, False
    async for status, piece, extra in stream(port, body):
        if not text and piece:
            phase.first.append(time.perf_counter() - began)
        phase.statuses[status] += not told
        told = True
        text += piece
        ended = ended or extra == "done"
        usage = extra if isinstance(extra, dict) else usage
        pieces += bool(piece)
        if leave_after is not None and pieces >= leave_after:
            phase.left += not ended
            break
        if status != 200:
            return ""
    if ended:
        phase.whole += 1
        phase.tokens += usage["completion_tokens"]
    elif leave_after is None or pieces < leave_after:
        phase.broken.append(text[-40:])
    if alone is not None and (text != alone if ended else not alone.startswith(text)):
        at = next((i for i, (a, b) in enumerate(zip(text, alone, strict=False)) if a != b), min(len(text), len(alone)))
        phase.different.append({**body, "at": at, "of": len(alone)})
    return text


async def load(
    port: int, bodies: list[dict[str, Any]], alone: list[str], streams: int, seconds: float, leaving: float, seed: int
) -> Phase:
    """So many streams at once, each beginning another as it ends, until the time is over; then all finish."""
    phase, began, draw = Phase(), time.perf_counter(), random.Random(seed)

    async def client() -> None:
        while time.perf_counter() - began < seconds:
            number = draw.randrange(len(bodies))
            leave_after = draw.randrange(0, 4) if draw.random() < leaving else None
            await follow(port, bodies[number], phase, leave_after, alone[number])

    await asyncio.gather(*(client() for _ in range(streams)))
    phase.seconds = time.perf_counter() - began
    return phase


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        found = re.search(rf"^blockdiff_{name} (\S+)$", answer.read().decode(), re.M)
    assert found is not None
    return float(found.group(1))


def settled(port: int, seconds: float = 10.0) -> bool:
    """Whether nothing runs and no page is held, soon."""
    deadline = time.monotonic() + seconds
    while metric(port, "running") or metric(port, "waiting") or metric(port, "pages_in_use"):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def measure(port: int, process: psutil.Process, args: argparse.Namespace) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as answer:
        about = json.load(answer)["data"][0]["blockdiff"]
    bodies = catalogue(args.requests, about["block_sizes"], about["context_length"], args.seed)
    warm = Phase()
    alone = [asyncio.run(follow(port, body, warm, None, None)) for body in bodies]
    rows, memory = [], []
    for number in range(args.rounds):
        many_seconds = args.seconds / args.rounds
        one = asyncio.run(load(port, bodies, alone, 1, many_seconds / 4, 0.0, args.seed + 2 * number))
        many = asyncio.run(
            load(port, bodies, alone, args.streams, many_seconds, args.leaving, args.seed + 2 * number + 1)
        )
        memory.append(process.memory_info().rss / 2**20)
        rows += [row_of(number, "one stream", one), row_of(number, f"{args.streams} streams", many)]
        print(f"round {number + 1}: {rows[-1]['tokens_per_second']:.0f} tokens/s with {args.streams} streams, "
              f"{rows[-2]['tokens_per_second']:.0f} with one", flush=True)  # fmt: skip
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    many_rows = rows[1::2]
    return {
        "rows": rows,
        "streams": args.streams,
        "leaving": args.leaving,
        "texts": sum(row["whole"] + row["left"] for row in many_rows),
        "left": sum(row["left"] for row in many_rows),
        "different": [one for row in rows for one in row["different"]],
        "broken": sum(row["broken"] for row in rows),
        "statuses": dict(sum((Counter(row["statuses"]) for row in rows), Counter())),
        "throughput_ratio": median(many["tokens_per_second"] / one["tokens_per_second"] for one, many in pairs),
        "first_p50_ratio": median(many["first_p50"] / one["first_p50"] for one, many in pairs),
        "first_p95_ratio": median(many["first_p95"] / one["first_p95"] for one, many in pairs),
        "memory_mib": memory,
        "returned": settled(port),
    }


def row_of(number: int, name: str, phase: Phase) -> dict[str, Any]:
    cuts = quantiles(phase.first, n=20) if len(phase.first) > 1 else [float("nan")] * 19
    return {
        "round": number,
        "phase": name,
        "seconds": phase.seconds,
        "tokens": phase.tokens,
        "tokens_per_second": phase.tokens / phase.seconds,
        "first_p50": cuts[9],
        "first_p95": cuts[18],
        "whole": phase.whole,
        "left": phase.left,
        "broken": len(phase.broken),
        "statuses": {str(status): count for status, count in phase.statuses.items()},
        "different": phase.different,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=120.0, help="of many streams, in all rounds together")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--leaving", type=float, default=0.2, help="share of clients that leave early")
    parser.add_argument("--requests", type=int, default=96, help="different ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    command = [sys.executable, "-m", "blockdiff", "serve", args.model, "--port", "0", "--running", str(args.streams)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        found = re.search(r":(\d+) ", said)
        if found is None:
            print(f"the server did not start: {said}")
            return 1
        result = measure(int(found.group(1)), psutil.Process(server.pid), args)
    finally:
        server.terminate()
        server.wait(60)
    if args.json is not None:
        write_json(args.json, record("serve_load", args.seed, model=args.model, **result))
    memory = result["memory_mib"]
    print(
        f"{result['texts']} texts, {result['left']} left early, {len(result['different'])} differ from their solo run, "
        f"{result['broken']} lost, statuses {result['statuses']}\n"
        f"against one stream: throughput {result['throughput_ratio']:.2f} x, time to first block p50 "
        f"{result['first_p50_ratio']:.1f} x, p95 {result['first_p95_ratio']:.1f} x\n"
        f"memory after each round {', '.join(f'{value:.0f}' for value in memory)} MiB; pages and texts returned: "
        f"{result['returned']}"
    )
    bad = result["different"] or result["broken"] or not result["returned"]
    return int(bool(bad) or any(int(status) >= 500 for status in result["statuses"]))


if __name__ == "__main__":
    sys.exit(main())
