#!/usr/bin/env bash
# The C++ kernels for CPUs under AddressSanitizer and UndefinedBehaviorSanitizer: `make test-asan`, or
#   tests/asan.sh PYTHON [pytest's arguments]
# Builds the extension in a copy of the tree, so that the one in use stays as it is, and runs the tests of the ops on it.
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
nm -D fastgpt/_C.abi3.so | grep __asan_report >/dev/null || { echo "the extension is not instrumented"; cat build.log; exit 1; }

# The loops do not vectorize with checks in them, so sums run in another order: the bound on errors is for the other build.
cat >tests/ops/conftest.py <<'EOF'
import oracle

strict = oracle.assert_within_bound


def loose(ours, torchs, exact, roundings=1, smallest=1.0):
    strict(ours, torchs, exact, 16 * roundings, smallest)


oracle.assert_within_bound = loose
EOF

# Python is not instrumented, so the runtimes come first by hand; it also keeps what it allocates, so leaks are not asked for.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1
"$python" -c 'from fastgpt.ops import registry as r; line = r.extension_line(); assert "loaded" in line[:17], line'
# --capture=sys lets reports through. Out: what compiles or starts processes of its own, and the emulated CUDA kernels, which have checks of their own.
exec "$python" -m pytest -x -p no:cacheprovider -p no:faulthandler --capture=sys tests/ops -k "not inductor and not gpu" \
    --ignore tests/ops/test_registry.py --ignore tests/ops/test_cuda_sources.py --ignore tests/ops/test_cuda_emulated.py "$@"
