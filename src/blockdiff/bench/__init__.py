"""Speed, as ratios to named baselines measured interleaved in the same run."""

from blockdiff.bench.decode import areas, bench_decode
from blockdiff.bench.models import random_model
from blockdiff.bench.schedules import Schedule, bench_schedules
from blockdiff.bench.serving import bench_serve, ragged_requests
from blockdiff.bench.train import Case, bench_train

__all__ = [
    "Case",
    "Schedule",
    "areas",
    "bench_decode",
    "bench_schedules",
    "bench_serve",
    "bench_train",
    "ragged_requests",
    "random_model",
]
