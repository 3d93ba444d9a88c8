"""Bounds against the truth: a hidden Markov source in the place of a model, whose entropy is known.

The source's own conditionals are the denoiser, so every bound and every exact mode must give the source's entropy, and
95 % intervals over repeats (new documents and new draws each) must hold it in about 95 % of them. The seeded boundary is
left out: its noisy block has no slot for the block's last token, so its sampler knows less and its bound lies higher.

    python benchmarks/oracle_bounds.py --repeats 200
"""

from __future__ import annotations

import argparse
from typing import Any, cast

import torch

from blockdiff.evaluate import bound
from blockdiff.evaluate.oracle import HiddenMarkov, OracleModel, entropy, sample
from blockdiff.objectives import Alignment
from blockdiff.statistics import wilson

LENGTH = 8
WAYS: dict[str, dict[str, Any]] = {
    "exact count, 2 draws": {"draws": 2},
    "exact": {"exact": True},
    "orders, 2 draws": {"orders": 2},
    "exact count, left bias 1": {"draws": 2, "left_bias": 1.0},
}
ALIGNMENTS = (Alignment("same"), Alignment("shift", "clean"))


def measure(repeats: int, documents: int, sizes: list[int], seed: int) -> list[dict[str, Any]]:
    """A row for every alignment, way and block size: mean over repeats, and how many intervals hold the truth."""
    source = HiddenMarkov.random(3, 3, seed)
    truth = entropy(source, LENGTH) / LENGTH
    rows = []
    for alignment in ALIGNMENTS:
        model = OracleModel(source, LENGTH, alignment)
        for way, options in WAYS.items():
            for size in sizes:
                found = []
                for repeat in range(repeats):
                    strings = sample(source, LENGTH, documents, seed * 1000 + repeat)
                    texts = [model.document(ids, f"d{number}") for number, ids in enumerate(strings)]
                    (row,) = bound(cast(Any, model), texts, [size], seed=repeat, **options)
                    found.append(row)
                held = sum(abs(row.nats_per_token - truth) <= 1.96 * (row.se or 0.0) for row in found)
                rows.append(
                    {
                        "alignment": " ".join((alignment.prediction, alignment.boundary)),
                        "way": way,
                        "block_size": size,
                        "mean": sum(row.nats_per_token for row in found) / repeats,
                        "truth": truth,
                        "held": held / repeats,
                        "interval": wilson(held, repeats),
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--block-sizes", default="1,4,8")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [int(size) for size in given.block_sizes.split(",")]
    print(f"{'alignment':<12} {'way':<25} block   mean     truth    intervals that hold it")
    for row in measure(given.repeats, given.documents, sizes, given.seed):
        low, high = row["interval"]
        print(
            f"{row['alignment']:<12} {row['way']:<25} {row['block_size']:>5}  {row['mean']:.5f}  {row['truth']:.5f}  "
            f"{row['held']:.1%} ({low:.1%} - {high:.1%})"
        )


if __name__ == "__main__":
    main()
