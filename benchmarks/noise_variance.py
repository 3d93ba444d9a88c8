"""Variance of the bound's estimate: exact-count against Bernoulli(t) noise, on a trained model.

For each block size, every document's bound per token is estimated again and again with each kind of noise; the variance
over repeats, averaged over documents, is compared. Run on any checkpoint of blockdiff:

    python benchmarks/noise_variance.py runs/demo/checkpoint --data runs/demo/data/valid.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import blockdiff
from blockdiff.api import documents_of
from blockdiff.data import collate, cut
from blockdiff.distributions import Fixed
from blockdiff.files import write_json
from blockdiff.layout import Spans, TokenMap
from blockdiff.noise import Bernoulli, ExactCount, Noise
from blockdiff.objectives import block_numbers, maskable, score, token_losses, two_streams
from blockdiff.runtime import quiet_libraries, record, use_available_threads


@torch.inference_mode()
def estimates(model: blockdiff.Model, batch: dict[str, torch.Tensor], size: int, law: Noise, seed: int) -> torch.Tensor:
    """One estimate of every document's bound, in nats per token: [documents]."""
    alignment = model.spec.alignment.scoring()
    spans = Spans.of(batch["doc"], batch["prompt"])
    generator = torch.Generator().manual_seed(seed)
    starts = spans.place(Fixed(size).draw(spans.lengths, generator))
    tokens = TokenMap.build(batch["doc"], batch["prompt"], starts)
    corruption = law.draw(block_numbers(tokens, maskable(tokens, alignment)), generator)
    stream = two_streams(batch["input_ids"], tokens, corruption, alignment, model.spec.mask_id or 0)
    losses = token_losses(model(stream.ids, stream.tokens, read=stream.reads.index), stream.reads)
    terms = score(losses, stream.reads, tokens, len(batch["doc"]))
    return terms.blocks.double() / terms.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=64)
    parser.add_argument("--block-sizes", default="4,8,16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    use_available_threads()
    quiet_libraries()

    model = blockdiff.load(options.model).eval()
    documents, _ = cut(documents_of(model, options.data), model.spec.trained_length)
    batch = collate([[document] for document in documents[: options.documents]])
    print(f"{len(batch['doc'])} documents, {options.repeats} repeats, seed {options.seed}")
    print("   w  mean exact  mean Bern.  var exact  var Bern.   ratio  95 % interval")
    rows = []
    for size in map(int, options.block_sizes.split(",")):
        spread, mean = {}, {}
        for law in (ExactCount(), Bernoulli()):
            runs = [estimates(model, batch, size, law, options.seed + r) for r in range(options.repeats)]
            spread[law.kind], mean[law.kind] = torch.stack(runs).var(0), torch.stack(runs).mean()
        exact, bernoulli = spread["exact_count"], spread["bernoulli"]
        ratio = float(bernoulli.mean() / exact.mean())
        picks = torch.randint(len(exact), (2000, len(exact)), generator=torch.Generator().manual_seed(0))
        boot = (bernoulli[picks].mean(1) / exact[picks].mean(1)).quantile(torch.tensor([0.025, 0.975]).double())
        print(
            f"{size:>4} {mean['exact_count']:>11.4f} {mean['bernoulli']:>11.4f} {exact.mean():>10.5f} "
            f"{bernoulli.mean():>10.5f} {ratio:>7.1f}  {boot[0]:.1f} - {boot[1]:.1f} (bootstrap over documents)"
        )
        rows.append(
            {
                "block_size": size,
                "variance_exact_count": float(exact.mean()),
                "variance_bernoulli": float(bernoulli.mean()),
                "ratio": ratio,
                "ratio_ci": boot.tolist(),
                "documents": len(exact),
                "repeats": options.repeats,
            }
        )
    if options.json:
        write_json(options.json, record("noise variance", options.seed, model=options.model, rows=rows))


if __name__ == "__main__":
    main()
