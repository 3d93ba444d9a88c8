"""How far each policy's output law is from its source when the denoiser is exact, against the steps it takes.

The source is a hidden Markov chain whose exact conditionals are the denoiser, so whatever distance is left is the
policy's own: filling positions together, or choosing them by what was drawn. The distance is the total variation over
all strings of one block, estimated from samples; what as many draws of the source itself would show is the floor.

    python benchmarks/oracle_policies.py --plot docs/images/oracle.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from blockdiff.decode import named
from blockdiff.evaluate.oracle import HiddenMarkov, decode, outcome_share, sampling_distance, total_variation
from blockdiff.files import write_json
from blockdiff.runtime import record, use_available_threads
from blockdiff.statistics import spread

FAMILIES = {
    "random order, n a step": [f"random + fixed({n})" for n in (1, 2, 3, 6)],
    "ancestral": [f"random + reverse({n})" for n in (2, 4, 8, 16, 32, 64)],
    "remasking (ReMDM, eta 0.1)": [
        f"random + reverse({n}, eta=0.1) + remask({n}, eta=0.1)" for n in (4, 8, 16, 32, 64)
    ],
    "confidence of the draw, n a step": [f"confidence + fixed({n})" for n in (1, 2, 3)],
    "entropy order, n a step": [f"entropy + fixed({n})" for n in (1, 2, 3)],
    "entropy budget": [f"entropy + entropy_budget({g})" for g in (0.0, 0.1, 0.3, 0.6, 1.2)],
    "threshold on the largest probability": [f"top_probability + threshold({t})" for t in (0.99, 0.9, 0.8, 0.7, 0.6)],
    "factor": [f"top_probability + factor({f})" for f in (0.5, 1.0, 2.0)],
    "spaced": ["dilated"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=6)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--sources", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    use_available_threads()
    sources = [HiddenMarkov.random(4, 2, seed=number, sharpness=3.0) for number in range(options.sources)]
    floor = fmean(sampling_distance(source.law(options.length), options.rows) for source in sources)
    print(f"{options.sources} sources of {2**options.length} strings, {options.rows} draws each; floor {floor:.4f}")
    rows = []
    for family, policies in FAMILIES.items():
        for text in policies:
            written = [decode(source, named(text), options.length, options.rows) for source in sources]
            distances = [
                total_variation(outcome_share(out.ids, 2), source.law(options.length))
                for out, source in zip(written, sources, strict=True)
            ]
            row = {
                "family": family,
                "policy": text,
                "steps": fmean(out.steps for out in written),
                "distance": fmean(distances),
                "sd": spread(distances),
            }
            rows.append(row)
            print(f"{text:58} {row['steps']:6.2f} steps   distance {row['distance']:.4f}", flush=True)
    if options.json:
        write_json(options.json, record("oracle policies", 0, floor=floor, draws=options.rows, rows=rows))
    if options.plot:
        draw(rows, floor, options.plot)


def draw(rows: list[dict], floor: float, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for family in FAMILIES:
        points = sorted((row["steps"], row["distance"]) for row in rows if row["family"] == family)
        axes.plot([p[0] for p in points], [p[1] for p in points], "o-", markersize=4, label=family)
    axes.axhline(floor, color="grey", linestyle="--", linewidth=1, label="as many draws of the source")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("steps for a block")
    axes.set_ylabel("total variation from the source")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
