"""`generate --input`: what batch generation says while it works, and how it ends."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from blockdiff.cli_options import err, load_writer, out, write_result

if TYPE_CHECKING:
    from blockdiff.batch import Outcome, Progress
    from blockdiff.rays import Cluster
    from blockdiff.shards import Shard

_SECONDS = 10.0  # between two lines of progress


def answer_rows(
    path: str,
    rows: Path,
    output: Path,
    options: dict[str, Any],
    *,
    shard: str | None,
    cluster: Cluster | None,
    chat_template: Path | None,
    json_file: Path | None,
) -> None:
    """Answer a file of rows, over Ray where a cluster is given; exit code 1 where some have errors.

    torchrun ends the other processes when one fails, so there only who finds the work whole says so.
    """
    from blockdiff.runtime import record
    from blockdiff.shards import Shard

    share = Shard.of_process() if shard is None else Shard.parse(shard)
    if cluster is None:
        found = _answered_here(path, rows, output, options, share, chat_template)
    elif share.count > 1:
        raise ValueError("--ray shares the rows itself: start it without torchrun and --shard")
    else:
        from blockdiff.rays import answer_on_ray

        options = {**options, "chat_template": chat_template, "on_progress": _Lines(share)}
        found = answer_on_ray(cluster, path, rows, output, **options)
    _say(found, share, output)
    if found.whole is None and shard is None:  # another process has the last word
        return
    errors = (found.whole or found.share).errors
    contents = {**asdict(found), "shard": str(share), "tokens_per_second": found.tokens_per_second}
    contents["tokens_per_forward"] = (found.whole or found.share).tokens_per_forward
    write_result(json_file, record("generate", options["seed"], model=path, **contents))
    if errors:
        raise typer.Exit(1)


def _answered_here(
    path: str, rows: Path, output: Path, options: dict[str, Any], share: Shard, chat_template: Path | None
) -> Outcome:
    from blockdiff.batch import answer_file

    model = load_writer(path)
    if chat_template is not None:
        model.set_chat_template(chat_template)
    return answer_file(model, rows, output, shard=share, on_progress=_Lines(share), **options)


def _say(found: Outcome, shard: Shard, output: Path) -> None:
    own = found.own
    label = f"shard {shard}: " * (shard.count > 1)
    err.print(
        f"{label}{own.rows} rows answered in {found.seconds:.1f} s, {found.found} found done; {own.tokens} tokens, "
        f"{found.tokens_per_second:.0f} a second, {own.tokens_per_forward:.2f} per forward with commits"
    )
    if found.problem is not None:
        err.print(f"{label}warning: {found.uncovered} rows go beyond training; the first is {found.problem}")
    if found.whole is None:
        out.print(f"{label}done; {output / 'answers.jsonl'} comes when the other shards are")
        return
    wrong = f", {found.whole.errors} of them errors" if found.whole.errors else ""
    out.print(f"{found.whole.rows} rows in {output / 'answers.jsonl'}{wrong}")


class _Lines:
    """Says now and then how far it is."""

    def __init__(self, shard: Shard) -> None:
        self.label = f"shard {shard}: " * (shard.count > 1)
        self.said = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if (now := time.monotonic()) - self.said >= _SECONDS:
            self.said = now
            speed = progress.tokens / max(progress.seconds, 1e-9)
            err.print(f"{self.label}{progress.answered} of {progress.rows} rows, {speed:.0f} tokens a second")
