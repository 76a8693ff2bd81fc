#!/usr/bin/env bash
# What CI runs: the same environment as quickstart.sh, ruff, pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
# The GPU's kernels are tested in Triton's interpreter and compiler; without a GPU nothing else wants it (0.6 GB).
# torchao is for --optimizer-states 8bit alone.
for package in triton==3.6.0 torchao==0.18.0; do
  .venv/bin/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('${package%%=*}') is None)" ||
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$package"
done
# A browser opens the page of a run (tests/test_run_report.py). Without one those tests skip, and say so.
if ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null &&
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  { timeout 120 apt-get update && timeout 600 apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 || true
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
