"""Speed, as ratios to named baselines measured interleaved in the same run."""

from blockdiff.bench.decode import areas, bench_decode

__all__ = ["areas", "bench_decode"]
