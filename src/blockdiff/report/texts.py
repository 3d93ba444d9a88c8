"""Decoded texts: traces that can be stepped through, samples coloured by step, and how fast decoding was."""

from __future__ import annotations

from typing import Any

from blockdiff.report.exhibits import Caption, DataTable, Exhibit, Section, command_of, each, origin
from blockdiff.report.sources import Source


def traces(sources: list[Source]) -> Section | None:
    """The traces of results/traces.json and results/traces-*.json."""
    exhibits: list[Exhibit] = []
    for source in sources:
        names = sorted(name for name in source.results if name == "traces" or name.startswith("traces-"))
        found = [source.results[name] for name in names]
        rows = tuple(_titled(row) for result in found for row in result["rows"])
        if rows:
            seeds = ", ".join(str(seed) for seed in dict.fromkeys(row.get("seed", "unknown") for row in rows))
            commands = tuple(dict.fromkeys(command_of(result) for result in found))
            errors = "none: single texts, chosen by whoever ran the command"
            caption = Caption(_TRACES, f"{len(rows)} texts", f"seed {seeds}", errors, commands)
            title = source.label if len(sources) > 1 else ""
            exhibits.append(Exhibit(f"traces-{len(exhibits)}", caption, title, traces=rows))
    return Section("Decoding, step by step", tuple(exhibits)) if exhibits else None


_TRACES = (
    "How texts were filled in: boxes are masks, colour and small numbers say at which step of its block a token was "
    "filled (0: known before denoising began), bars where blocks end. Step with the buttons, the slider or "
    "the arrow keys"
)


def _titled(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its measures in words."""
    forwards = f"{row['forwards']} forwards"
    parts = [f"{row[key]} {word}" for key, word in (("denoise_forwards", "denoise"), ("commit_forwards", "commit"))]
    words = [f"{len(row['tokens'])} tokens", f"{forwards} ({', '.join(parts)})"]
    words += [f"{len(row['tokens']) / max(row['forwards'], 1):.2f} tokens per forward with commits"]
    settings = ("block_size", "policy", "temperature", "seed")
    return {**row, "words": "; ".join(words), "settings": [f"{s.replace('_', ' ')} {row[s]}" for s in settings]}


def samples(sources: list[Source]) -> Section | None:
    exhibits: list[Exhibit] = []
    for source in sources:
        rows = source.results.get("samples", {}).get("rows", [])
        if rows:
            texts = tuple({**row, "tokens": _tokens(row)} for row in rows)
            caption = Caption(_SAMPLES, f"{len(rows)} texts", errors="none", **origin([source], "samples"))
            title = source.label if len(sources) > 1 else ""
            exhibits.append(Exhibit(f"samples-{len(exhibits)}", caption, title, samples=texts))
    return Section("Samples", tuple(exhibits)) if exhibits else None


_SAMPLES = (
    "Colour: the step of its block at which a token was filled (pale: known before denoising began; darker: later)"
)


def _tokens(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"text": piece, "step": step} for piece, step in zip(row["pieces"], row["steps"], strict=True)]


def speed(sources: list[Source]) -> Section | None:
    measured = [source for source in sources if source.results.get("speed", {}).get("rows")]
    if not measured:
        return None
    lines = [
        (
            f"{source.label}: {row['name']}" if len(measured) > 1 else row["name"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['speed_over_ar']:.2f}",
            f"{row['tokens_per_forward']:.2f}",
        )
        for source in measured
        for row in source.results["speed"]["rows"]
    ]
    results = [source.results["speed"] for source in measured]
    counts = [f"median of {r['rows'][0]['repeats']} interleaved runs, {r.get('threads')} threads" for r in results]
    what = "Speed of decoding one text at a time, the same weights in every way"
    caption = Caption(what, each(measured, counts), errors="none: medians", **origin(measured, "speed"))
    header = ("", "tokens/s", "over AR", "tokens per forward (with commits)")
    return Section("Speed", (Exhibit("speed", caption, table=DataTable(header, tuple(lines))),))
