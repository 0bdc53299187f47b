#!/usr/bin/env bash
# What can only be shown on a GPU: the engines' tests on it, and tokens/s and MFU of `elite-112m` and `mtlm2-40m`.
#
#   tests/benchmarks/gpu.sh [OUT]          logs and throughput.jsonl go to OUT (default: build/gpu)
#
# ENGINES="torch jax" limits the engines; those that are not installed are left out and named. PYTHON names the
# interpreter, WHEELS a folder of wheels that the machine lacks (pydantic, PyYAML, pytest, …), which go to OUT/site.
# What fails does not stop the rest; the exit status is 1 then.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$out/site" "$WHEELS"/*.whl || exit 1
fi
export PYTHONPATH="$PWD:$out/site" PYTHONUNBUFFERED=1
# JAX would take three quarters of the memory at once, and three engines share the device in the tests, which would
# not optimise what they compile.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS="${XLA_FLAGS-}"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/device.txt"
failed=0
: > "$out/throughput.jsonl"
for engine in ${ENGINES:-torch jax mlx}; do
  if ! "$python" -c "from models.engine import check_engine; check_engine('$engine')" 2> "$out/$engine.log"; then
    echo "$engine: left out: $(tail -n 1 "$out/$engine.log")"
    continue
  fi
  echo "== $engine"
  timeout 240 "$python" -m tests.benchmarks.throughput --engine "$engine" --json >> "$out/throughput.jsonl" 2>> "$out/$engine.log" \
    || { failed=1; tail -n 5 "$out/$engine.log"; }
done
cat "$out/throughput.jsonl"
timeout 480 "$python" -m pytest -q -p no:cacheprovider tests/models/test_engines.py tests/models/test_engine_documents.py \
  tests/models/test_agreement*.py 2>&1 | tee "$out/tests.log" || failed=1
exit "$failed"
