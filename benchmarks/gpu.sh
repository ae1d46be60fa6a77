#!/usr/bin/env bash
# Everything that a CUDA GPU can say of the kernels: `make gpu`, or  [OUT=folder] benchmarks/gpu.sh PYTHON
# Needs nvcc, a torch built for CUDA, and a GPU. Writes into $OUT: checks.json, a log of each check, and what
# `fastgpt bench kernels`, `fastgpt bench train` and benchmarks/lora.py (where PEFT is there to compare with) write. Every check runs, whatever the ones before it found; exits with 1 if one failed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out"
: >"$out/checks.tsv"

check() {  # check NAME COMMAND...: runs it into a log and notes whether it ended well, its seconds and its last line
    local name=$1 start=$SECONDS state=ok last
    shift
    echo "$name ..."
    "$@" >"$out/$name.log" 2>&1 || state=FAILED
    last=$(tail -n 1 "$out/$name.log" | tr '\t' ' ')
    printf '%s\t%s\t%s\t%s\n' "$name" "$state" $((SECONDS - start)) "$last" >>"$out/checks.tsv"
}

has_cuda_kernels() {
    "$python" - <<'EOF'
import torch
from fastgpt.ops import registry

assert torch.cuda.is_available(), "torch sees no GPU"
print(registry.extension_line())
assert " on cuda" in registry.extension_line(), "the extension has no CUDA kernel"
EOF
}

# The tests of the ops that are CUDA C++; compiled graphs and the 100 repeats add time under a sanitizer, and no kernel.
tests=$(for source in csrc/cuda/*.cu; do echo "tests/ops/test_$(basename "$source" .cu).py"; done)
sanitizer() {  # sanitizer TOOL; each tensor is an allocation of its own, so that the byte after it is nobody's
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all \
        "$python" -m pytest -x -m gpu -k "not compiles and not every_time" $tests
}

check build "$python" setup.py -q build_ext --inplace
check extension has_cuda_kernels
check tests "$python" -m pytest -m gpu tests
if command -v compute-sanitizer >/dev/null; then
    check memcheck sanitizer memcheck
    check racecheck sanitizer racecheck
    check synccheck sanitizer synccheck
else
    check memcheck sh -c 'echo "compute-sanitizer is not here: it comes with the CUDA toolkit"; exit 1'
fi
check benchmarks "$python" -m fastgpt bench kernels --device cuda --out "$out"
check train "$python" -m fastgpt bench train --device cuda --precision bf16 --batch-size 16 --block-size 1024 \
    --vs nanogpt nanogpt-compile torch-compile --out "$out"
check loaders "$python" benchmarks/data.py --parts loaders --out "$out"
if "$python" -c "import peft, transformers" 2>/dev/null; then
    check lora "$python" benchmarks/lora.py --device cuda --precision bf16 --batch-size 8 --block-size 1024 --out "$out"
fi

"$python" - "$out" <<'EOF'
import json
import platform
import sys
import time
from pathlib import Path

import torch

out = Path(sys.argv[1])
rows = [line.split("\t") for line in (out / "checks.tsv").read_text().splitlines()]
report = {
    "date": time.strftime("%Y-%m-%d", time.gmtime()),
    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "python": platform.python_version(),
    "checks": [{"name": n, "ok": s == "ok", "seconds": int(t), "last_line": last} for n, s, t, last in rows],
}
(out / "checks.json").write_text(json.dumps(report, indent=2) + "\n")
(out / "checks.tsv").unlink()
print(f"\n{report['gpu']}, torch {report['torch']}, CUDA {report['cuda']}; logs in {out}")
for name, state, seconds, last in rows:
    print(f"{name:<12}{state:<8}{seconds:>5} s  {last[:90]}")
sys.exit(any(not c["ok"] for c in report["checks"]))
EOF
