#!/usr/bin/env bash
# What takes too long for every change: the tests marked `slow`.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 MPLBACKEND=agg OMP_NUM_THREADS=1
pytest -n 2 -m slow
