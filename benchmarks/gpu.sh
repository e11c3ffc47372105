#!/usr/bin/env bash
# Everything that only a GPU can show, in one command; see docs/gpu.md.
#
#     bash benchmarks/gpu.sh [-o OUT] [--dry] [--minutes 10] [--only STEP ...]
#     bash benchmarks/gpu.sh studies [-o OUT] [--dry] [--model MODEL] [--data DIR] [--budget full]
#
# It takes the first Python that has PyTorch: $PYTHON, that of .venv, python3.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
for python in ${PYTHON:+"$PYTHON"} "$root/.venv/bin/python" python3; do
    if "$python" -c 'import importlib.util as u; raise SystemExit(u.find_spec("torch") is None)' \
        2>/dev/null; then
        exec "$python" -m benchmarks.gpu "$@"
    fi
done
echo "error: no Python with PyTorch was found: name one in PYTHON" >&2
exit 2
