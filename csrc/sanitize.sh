#!/bin/sh
# Builds the extension for ASan and UBSan in a scratch copy and runs the op tests on it: sh csrc/sanitize.sh [PYTHON [PYTEST ARGUMENTS]]
set -e
python=${1:-python}
shift || true
root=$(cd "$(dirname "$0")/.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
mkdir "$copy/tests"
cp -r "$root/csrc" "$root/setup.py" "$root/pyproject.toml" "$root/README.md" "$root/steerkern" "$copy"
cp -r "$root/tests/ops" "$copy/tests"
cp -r "$root/benchmarks" "$copy" # one test reads the compiled kernels with it
rm -f "$copy"/steerkern/_C*.so
cd "$copy"
STEERKERN_BUILD=cpu STEERKERN_SANITIZE=address,undefined "$python" setup.py -q build_ext --inplace
# torch leaks by design; libstdc++ must be loaded before torch for the sanitizer to see its exceptions
export ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)"
"$python" -m pytest tests/ops -q -p no:cacheprovider -k "not compiled and not opcheck" "$@"
