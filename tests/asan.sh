#!/usr/bin/env bash
# The C++ kernels for CPUs and the BPE trainer under AddressSanitizer and UndefinedBehaviorSanitizer:
# `make test-asan`, or
#   tests/asan.sh PYTHON [pytest's arguments]
# Builds them in a copy of the tree, so that those in use stay as they are, and runs the ops' and the trainer's tests.
# A report of a sanitizer ends the run with an error. Needs GCC.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-python3}")
shift || true

copy=build/asan
rm -rf $copy
mkdir -p $copy
cp -r csrc fastgpt tests setup.py pyproject.toml README.md LICENSE $copy
find $copy -name '*.so' -delete
cd $copy
sed -i 's/"-g0"/"-g1"/' setup.py  # lines in the reports

# No clones per instruction set: the loader picks one before AddressSanitizer is up.
sanitize="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
CC=gcc CXX=g++ CFLAGS="$sanitize -fno-omit-frame-pointer -DFASTGPT_CLONES=" LDFLAGS="$sanitize" \
    "$python" setup.py -q build_ext --inplace >build.log 2>&1 || { cat build.log; exit 1; }
for part in _C _bpe; do
    nm -D fastgpt/$part.*.so | grep __asan_report >/dev/null ||
        { echo "$part is not instrumented"; cat build.log; exit 1; }
done

# Loops with checks in them do not vectorize, so sums run in another order: the bound on errors is the other build's.
cat >tests/ops/conftest.py <<'EOF'
import oracle

strict = oracle.assert_within_bound


def loose(ours, torchs, exact, roundings=1, smallest=1.0):
    strict(ours, torchs, exact, 16 * roundings, smallest)


oracle.assert_within_bound = loose
EOF

# Python is not instrumented, so the runtimes come first by hand; it frees little at its end, so leaks do not count.
LD_PRELOAD=$(for name in asan ubsan stdc++; do g++ -print-file-name=lib$name.so; done | tr '\n' ' ')
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
"$python" -c 'from fastgpt.ops import registry as r; line = r.extension_line(); assert "loaded" in line[:17], line
from fastgpt import bpe; line = bpe.trainer_line(); assert "loaded" in line, line'
# --capture=sys lets reports through. Out: what compiles or starts processes, and kernels for GPUs.
exec "$python" -m pytest -x -p no:cacheprovider -p no:faulthandler --capture=sys tests/ops tests/test_bpe.py \
    -k "not inductor and not ctrl_c and not memory" \
    --ignore tests/ops/test_registry.py --ignore-glob "tests/ops/test_cuda_*" \
    --ignore-glob "tests/ops/test_triton_*" "$@"
