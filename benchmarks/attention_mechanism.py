"""How should a two-stream mask reach the model? Measured: a plain AR step, and three ways to run the two-stream step.

    4d mask      transformers' own sdpa attention, a boolean 4D mask handed to the model
    dense        our registered attention function, the same dense mask in it
    tiles        our registered attention function in tiles, each with the keys that somebody sees

The steps are interleaved in one run; the table gives medians as ratios to the AR step of the same tokens.

    python benchmarks/attention_mechanism.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from blockdiff import attention, masks
from blockdiff.files import write_json
from blockdiff.layout import Layout, TokenMap
from blockdiff.masks import Visibility
from blockdiff.runtime import record, use_available_threads

VOCABULARY, BLOCK = 4096, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="256,512,1024")
    parser.add_argument("--tokens", type=int, default=2048, help="clean tokens of a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    threads = use_available_threads()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    model = AutoModelForCausalLM.from_config(config)
    size = model.num_parameters() / 1e6
    print(f"{size:.1f}M-parameter Llama, block {BLOCK}, {options.tokens} tokens, {threads} threads")
    rows = []
    for length in map(int, options.lengths.split(",")):
        times = measure(model, length, options.tokens // length, options.repeats)
        base = median(times["ar"])
        print(f"length {length:>5}: " + ", ".join(f"{name} {median(t) / base:.2f}" for name, t in times.items()))
        rows += [
            {
                "length": length,
                "variant": name,
                "cost_over_ar": median(t) / base,
                "spread": [min(t) / base, max(t) / base],
                "repeats": options.repeats,
            }
            for name, t in times.items()
        ]
    if options.json:
        write_json(options.json, record("attention mechanism", 0, rows=rows))


def measure(model: torch.nn.Module, length: int, rows: int, repeats: int) -> dict[str, list[float]]:
    clean = TokenMap.from_layouts([[Layout(0, (BLOCK,) * (length // BLOCK))] for _ in range(rows)])
    tokens = TokenMap.cat(clean.as_noisy(), clean)
    ids = torch.randint(VOCABULARY, (rows, 2 * length))
    times: dict[str, list[float]] = {"ar": [], "4d mask": [], "dense": [], "tiles": []}
    for repeat in range(repeats + 1):
        for name in times:
            began = time.perf_counter()
            step(model, name, ids, tokens, length)
            if repeat:
                times[name].append(time.perf_counter() - began)
    return times


def step(model: torch.nn.Module, name: str, ids: torch.Tensor, tokens: TokenMap, length: int) -> None:
    """Forward, loss over `length` positions, backward."""
    seen = Visibility(tokens, tokens, "context_causal")
    if name == "ar":
        model.set_attn_implementation("sdpa")
        logits = model(input_ids=ids[:, :length]).logits
    elif name == "4d mask":
        model.set_attn_implementation("sdpa")
        keep = torch.arange(length)
        logits = model(
            input_ids=ids, position_ids=tokens.position, attention_mask=seen.dense(), logits_to_keep=keep
        ).logits
    else:
        masks.TILE = 2 * length if name == "dense" else 128
        model.set_attn_implementation(attention.NAMES["sdpa"])
        keep = torch.arange(length)
        logits = model(input_ids=ids, position_ids=tokens.position, visibility=seen, logits_to_keep=keep).logits
    F.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, :length].reshape(-1)).backward()
    model.zero_grad()


if __name__ == "__main__":
    main()
