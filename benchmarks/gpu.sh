#!/usr/bin/env bash
# Equalities and speed on a GPU, in one table. Installs nothing: run it where torch (2.11 or later), transformers (5.17
# or later) and blockdiff are at hand.
#
#     bash benchmarks/gpu.sh [--sizes 30M,350M] [--json FILE]
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" benchmarks/gpu.py "$@"
