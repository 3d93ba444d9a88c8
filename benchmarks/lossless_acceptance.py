"""How much of a draft lossless decoding keeps, for every block size and way of drafting, and what it saves.

Texts are continued from their first words, once as AR text (block size 1) and once losslessly; the two must be equal. A
verification lets through at least one token; tokens per forward counts denoise and verify forwards, and AR has 1. The
interval is Student's over prompts.

    python benchmarks/lossless_acceptance.py runs/demo/checkpoint --data runs/demo/data/valid.jsonl
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import blockdiff
from blockdiff.api import documents_of
from blockdiff.decode import Sampling, parse
from blockdiff.engine import Request, generate
from blockdiff.files import write_json
from blockdiff.runtime import quiet_libraries, record, use_available_threads
from blockdiff.statistics import spread, t_quantile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--block-sizes", default="2,4,8,16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    use_available_threads()
    quiet_libraries()

    model = blockdiff.load(options.model)
    documents = documents_of(model, options.data)[: options.prompts]
    prompts = [tuple(document.ids[: options.prompt_tokens].tolist()) for document in documents]
    print(
        f"{len(prompts)} prompts of {options.prompt_tokens} tokens, {options.new_tokens} new tokens, "
        f"seed {options.seed}"
    )
    print("temperature   b  drafted in    tokens a verification   tokens a forward   equal to AR")
    rows = []
    for temperature in (0.0, 1.0):
        base = [
            Request(
                prompt,
                options.new_tokens,
                1,
                sampling=Sampling(temperature),
                seed=options.seed + number,
                end_ids=model.end_ids,
            )
            for number, prompt in enumerate(prompts)
        ]
        expected = [output.tokens for output in generate(model, base)]
        for size in map(int, options.block_sizes.split(",")):
            for steps in (1, 2):
                policy = parse(f"fixed({max(1, math.ceil((size - 1) / steps))})")
                requests = [replace(request, block_size=size, policy=policy, lossless=True) for request in base]
                outputs = generate(model, requests)
                kept = [output.tokens_per_verify or 0.0 for output in outputs]
                half = t_quantile(0.975, len(kept) - 1) * (spread(kept) or 0.0) / math.sqrt(len(kept))
                tokens = sum(len(output.tokens) for output in outputs)
                row = {
                    "temperature": temperature,
                    "block_size": size,
                    "steps": steps,
                    "tokens_per_verify": fmean(kept),
                    "tokens_per_verify_ci": (fmean(kept) - half, fmean(kept) + half),
                    "tokens_per_forward": tokens / sum(output.forwards for output in outputs),
                    "equal": fmean(output.tokens == own for output, own in zip(outputs, expected, strict=True)),
                    "prompts": len(prompts),
                }
                rows.append(row)
                print(
                    f"{temperature:11g} {size:3d}  {steps} step{'s' if steps > 1 else ' '}"
                    f"{row['tokens_per_verify']:13.2f} ± {half:.2f} {row['tokens_per_forward']:18.2f}"
                    f"{row['equal']:14.0%}"
                )
    if options.json:
        write_json(options.json, record("lossless acceptance", options.seed, model=options.model, rows=rows))


if __name__ == "__main__":
    main()
