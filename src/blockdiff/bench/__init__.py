"""Speed, as ratios to named baselines measured interleaved in the same run."""

from blockdiff.bench.decode import areas, bench_decode
from blockdiff.bench.train import Case, bench_train

__all__ = ["Case", "areas", "bench_decode", "bench_train"]
