"""What `benchmarks/gpu.sh` runs: does blockdiff compute on a GPU what it computes on a CPU, and how fast.

Equalities, each with its tolerance: the training loss and its gradient in tiles and with FlexAttention against the
textbook step (dense mask, full logits). Greedy texts of blocks, together against alone and against the CPU's: all of
them must be equal in float32, their share is reported in bfloat16, where rounding turns near ties.

Speed, interleaved: a training step over the AR step of the same network, and decoding over transformers' `generate`.
Random weights throughout.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from blockdiff.attention import Implementation
from blockdiff.bench.models import random_model
from blockdiff.decode import parse
from blockdiff.distributions import Fixed
from blockdiff.engine import Request, generate
from blockdiff.files import write_json
from blockdiff.loading import attach, from_architecture
from blockdiff.model import BlockDiffusionModel, Spec
from blockdiff.noise import ExactCount
from blockdiff.objectives import Alignment
from blockdiff.passes import Objective
from blockdiff.reference import textbook
from blockdiff.runtime import record

VOCABULARY, BLOCK = 8192, 16
SIZES = {
    "1M": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "30M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
    "350M": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 16},
}
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="30M,350M")
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself, with --sizes 1M")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was checked or measured", file=sys.stderr)
        return 2
    unknown = [size for size in options.sizes.split(",") if size not in SIZES]
    if unknown:
        print(f"--sizes: {unknown[0]} is unknown; known: {', '.join(SIZES)}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += equalities(options.device, dtype)
    for size in options.sizes.split(","):
        rows += training(size, options) + decoding(size, options)
    print(table(rows))
    if options.json:
        write_json(options.json, record("gpu", 0, rows=rows))
    return 0 if all(row.get("ok", True) for row in rows) else 1


def network_of(size: str, device: str, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    shape = {"type": "llama", **SIZES[size], "max_position_embeddings": 4096, "tie_word_embeddings": False}
    network = from_architecture(shape, VOCABULARY, seed=0).to(device=device, dtype=dtype)
    network.set_attn_implementation(attention)
    return network


def model_of(size: str, device: str, dtype: torch.dtype, kind: Implementation = "sdpa") -> BlockDiffusionModel:
    spec = Spec(mask_id=VOCABULARY - 1, alignment=Alignment("shift", "seed"), layout=Fixed(BLOCK), trained_length=1024)
    model = attach(network_of(size, device, dtype), spec=spec, implementation=kind)
    model.tokenizer = random_model().tokenizer
    return model


def batch_of(device: str, rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY - 1, (rows, length), generator=Generator().manual_seed(0))
    doc = torch.arange(rows)[:, None].expand(rows, length).contiguous()
    prompt = (torch.arange(length) == 0).expand(rows, length).contiguous()
    return {name: tensor.to(device) for name, tensor in (("input_ids", ids), ("doc", doc), ("prompt", prompt))}


def implementations(device: str) -> list[Implementation]:
    return ["sdpa", "flex"] if device == "cuda" else ["sdpa"]


# ---- equalities


def equalities(device: str, dtype: torch.dtype) -> list[Row]:
    """Rows of relative differences with their tolerances."""
    tolerance = 2e-3 if dtype is torch.float32 else 0.1
    name = str(dtype).removeprefix("torch.")
    batch, objective = batch_of(device, 2, 160), Objective(Fixed(BLOCK), ExactCount(), ar_weight=0.5)
    slow = network_of("1M", device, dtype)
    reference = textbook(slow, "context_causal", VOCABULARY - 1)
    expected = loss_and_gradient(objective, reference, slow, batch)
    rows = []
    for kind in implementations(device):
        model = model_of("1M", device, dtype, kind)
        found = loss_and_gradient(objective, model, model.backbone, batch)
        for what, a, b in zip(("training loss", "its gradient"), found, expected, strict=True):
            rows.append(equality(f"{what}, {kind} = textbook, {name}", a, b, tolerance))
    model = model_of("1M", device, dtype).eval()
    requests = [Request((5, 9, n), 40, BLOCK, parse("fixed(4)"), seed=n) for n in range(4)]
    together = [output.tokens for output in generate(model, requests)]
    alone = [generate(model, [request])[0].tokens for request in requests]
    rows.append(share(f"greedy texts together = alone, {name}", together, alone))
    if dtype is torch.float32:
        on_cpu = [output.tokens for output in generate(model_of("1M", "cpu", dtype).eval(), requests)]
        rows.append(share(f"greedy texts on {device} = on cpu, {name}", together, on_cpu))
    return rows


def loss_and_gradient(objective: Objective, model: Any, network: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    network.zero_grad()
    alignment = Alignment("shift", "seed")
    terms = objective.terms(model, batch, alignment, VOCABULARY - 1, 1)
    loss = terms.loss(terms.tokens.sum(), 0.5)
    torch.autograd.backward(loss)
    gradient = torch.cat([p.grad.flatten().float() for p in network.parameters() if p.grad is not None])
    return loss.detach().float(), gradient


def equality(what: str, found: Tensor, expected: Tensor, tolerance: float) -> Row:
    difference = float((found - expected).norm() / expected.norm())
    return {"what": what, "value": f"{difference:.1e} (at most {tolerance:g})", "ok": difference <= tolerance}


def share(what: str, found: list[list[int]], expected: list[list[int]]) -> Row:
    """Judged in float32; in bfloat16 rounding may turn a near tie, and a text then goes another way."""
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    return {"what": what, "value": f"{same} of {len(found)}", "ok": same == len(found) or "bfloat16" in what}


# ---- speed


def training(size: str, options: argparse.Namespace) -> list[Row]:
    """Steps of every way over the AR step of the same tokens."""
    device, dtype = options.device, torch.bfloat16
    batch, objective = batch_of(device, options.rows, options.length), Objective(Fixed(BLOCK), ExactCount())
    network = network_of(size, device, dtype)
    ways: dict[str, Callable[[int], None]] = {"ar": stepper(network, lambda seed: ar_loss(network, batch))}
    dense = network_of(size, device, dtype)
    reference = textbook(dense, "context_causal", VOCABULARY - 1)
    ways["textbook"] = stepper(dense, lambda seed: two_stream_loss(reference, objective, batch, seed))
    for kind in implementations(device):
        ways[f"ours, {kind}"] = two_streams(model_of(size, device, dtype, kind), objective, batch)
    times = interleaved(ways, options.rounds)
    head = f"training, {size} bf16, {options.rows} x {options.length}, block {BLOCK}"
    return [{"what": f"{head}: {way}", "value": ratios(times[way], times["ar"], invert=True)} for way in ways]


def ar_loss(network: Any, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    logits = network(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def two_stream_loss(model: Any, objective: Objective, batch: dict[str, Tensor], seed: int) -> Tensor:
    alignment = Alignment("shift", "seed")
    terms = objective.terms(model, batch, alignment, VOCABULARY - 1, seed)
    return terms.loss(terms.tokens.sum(), 0.0)


def two_streams(model: BlockDiffusionModel, objective: Objective, batch: dict[str, Tensor]) -> Callable[[int], None]:
    return stepper(model.backbone, lambda seed: two_stream_loss(model, objective, batch, seed))


def stepper(network: Any, loss: Callable[[int], Tensor]) -> Callable[[int], None]:
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-4)

    def step(seed: int) -> None:
        torch.autograd.backward(loss(seed))
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(size: str, options: argparse.Namespace) -> list[Row]:
    """Texts of every way over transformers' own greedy decoding."""
    device, dtype, new = options.device, torch.bfloat16, options.new_tokens
    network = network_of(size, device, dtype).eval()
    model = model_of(size, device, dtype).eval()
    rows: list[Row] = []
    for batch in (1, 8):
        prompts = torch.randint(VOCABULARY - 1, (batch, 16), generator=Generator().manual_seed(0))

        def hugging_face(_: int, prompts: Tensor = prompts) -> None:
            with torch.inference_mode():
                network.generate(
                    prompts.to(device), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
                )

        def ours(block_size: int, prompts: Tensor = prompts) -> Callable[[int], None]:
            requests = [Request(tuple(row.tolist()), new, block_size, parse("fixed(4)")) for row in prompts]
            return lambda _: void(generate(model, requests))

        ways = {"hf generate": hugging_face, "ours, AR": ours(1), "ours, 4 a step": ours(BLOCK)}
        times = interleaved(ways, options.rounds)
        head = f"decoding, {size} bf16, batch {batch}, {new} tokens"
        rows += [
            {"what": f"{head}: {way}", "value": ratios(times[way], times["hf generate"], invert=False)} for way in ways
        ]
    return rows


def void(_: object) -> None:
    pass


def interleaved(ways: dict[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, run in ways.items():
            wait()
            began = time.perf_counter()
            run(turn)
            wait()
            if turn:
                times[way].append(time.perf_counter() - began)
    return times


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(own: list[float], base: list[float], *, invert: bool) -> str:
    """Cost (invert) or speed over the baseline, with the range over the rounds, and seconds."""
    found = [a / b if invert else b / a for a, b in zip(own, base, strict=True)]
    return f"{median(found):.2f} ({min(found):.2f}–{max(found):.2f}) x, {1e3 * median(own):.1f} ms"


def table(rows: list[Row]) -> str:
    wide = max(len(row["what"]) for row in rows)
    marks = {True: "", False: "  WRONG"}
    return "\n".join(f"{row['what'].ljust(wide)}  {row['value']}{marks[row.get('ok', True)]}" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
