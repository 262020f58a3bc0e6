#!/usr/bin/env bash
# What waits for the day on which a GPU is at hand, in one command: the tests on it, the benchmark, and a distillation of five minutes. Twelve minutes in all.
#
#   tools/on_a_gpu.sh wheels            here, with a network: all that a bare machine with PyTorch and Python 3.12 lacks goes into .whl/ (not in git, some 45 MB)
#   tools/on_a_gpu.sh [FOLDER] [PARTS]  there: results in FOLDER, default $OUT or runs/gpu; PARTS in this order, default "tests benchmark run"
#   tools/on_a_gpu.sh "" methods        there, in a command of its own: all methods on made-up pictures in CIFAR-100's format, in $MINUTES (default 8)
#
# A part that fails does not stop the next one; the status at the end says whether all went well.
set -uo pipefail
cd "$(dirname "$0")/.."

# PyTorch and its company are there. Each package here in one version, none of its needs: what they need stands here, too.
WHEELS="fastai fastcore fastprogress fasttransform fastdownload plum-dispatch<2.10 beartype python-fasthtml starlette oauthlib itsdangerous python-multipart beautifulsoup4 soupsieve httpx2 httpcore2 uvicorn truststore \
  pydantic pydantic-core annotated-types annotated-doc typing-inspection typer pyclipper shapely rapidfuzz platformdirs"
TEACHERS="PP-OCRv3_rec PP-OCRv3_det PP-OCRv4_rec PP-OCRv4_det"
# Tests that need a browser, a network, an environment of their own or nbdev
NOT_THERE="site package readme house light_door"

if [ "${1:-}" = wheels ]; then
    set -e
    rm -rf .whl && mkdir -p .whl/distillbook/teachers
    platforms=$(for n in 39 35 34 31 28 27 24 17; do echo "--platform manylinux_2_${n}_x86_64"; done)
    python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d .whl $WHEELS
    python3 -m pip wheel -q --disable-pip-version-check --no-deps -w .whl font-roboto # No wheel of it is published
    python3 - $TEACHERS <<'PY'
import shutil, sys
from distillbook.use.released import teacher_file
for name in sys.argv[1:]: shutil.copy(teacher_file(name), f'.whl/distillbook/teachers/{name}.onnx')
PY
    du -sh .whl
    exit
fi

out=${1:-${OUT:-runs/gpu}}
parts=${2:-tests benchmark run}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
if ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit
    export PYTHONPATH=$PYTHONPATH:/tmp/site DISTILLBOOK_CACHE=$PWD/.whl/distillbook
fi
distillbook() { python3 -m distillbook.cli "$@"; }
failed=
part() { # its name, and what it does; the words go to a file and to the screen
    local name=$1; shift
    case " $parts " in *" $name "*) ;; *) return 0 ;; esac
    printf '\n== %s (%s s)\n' "$name" "$SECONDS"
    "$@" 2>&1 | tee "$out/$name.log" || failed="$failed $name"
}

tests() {
    local ignored=$(for t in $NOT_THERE; do echo "--ignore tests/test_$t.py"; done)
    python3 -m pytest -q --device cuda -n "$(( $(nproc) < 8 ? $(nproc) : 8 ))" --durations 10 tests/test_gpu.py tests $ignored
}

run() {
    timeout --signal INT 300 python3 -m distillbook.cli train -c benchmarks/five_minutes.yml -o Global.save_model_dir="$out/run"  # the state is saved when the time is up
    distillbook compare "$out/run" --draw "$out/curve.png" && distillbook eval --run "$out/run" -o Train.loader.num_workers=0
    local status=$?
    cp "$out/run/metrics.csv" "$out/run_metrics.csv"; rm -f "$out"/run/*.pth
    return $status
}

methods() {
    python3 -c "from benchmarks.methods.cifar import make_cifar; make_cifar('$out/cifar', 50000, 10000)" || return
    python3 -m benchmarks.methods --full --data "$out/cifar" --device cuda --minutes "${MINUTES:-8}" --out "$out/methods"
    local status=$?
    rm -rf "$out/cifar" "$out"/methods/*.pth
    return $status
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
part tests tests
part benchmark python3 -m benchmarks.gpu --json "$out/gpu.json"
part run run
part methods methods
printf '\n== done (%s s)%s\n' "$SECONDS" "${failed:+, failed:$failed}"
[ -z "$failed" ]
