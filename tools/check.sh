#!/usr/bin/env bash
# The quick checks, some seconds: style in numbers, unused imports and long lines, import contracts, docstrings, the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check
lint-imports
interrogate --quiet homelab_ft
python tools/measure_style.py
python tools/check_repo.py
