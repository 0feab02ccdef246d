#!/bin/sh
# The first minutes on a GPU: what opens, whether it is right, how fast it is. Ten minutes at the most, in steps that do
# not need one another; each has a log in OUT and a bound in seconds, and one that fails or takes too long stops none.
#
#   PYTHON=python3 sh benchmarks/gpu_first.sh OUT [STEP ...]
#
# PYTHON has gpu-byoc installed (pip install -e .), beside torch or cupy or both, and pytest and hypothesis for the tests.
# Without STEPs: the ones below up to "figures", which has the time that is left. SECONDS_IN_ALL=1700 gives more.
#
#   facts                       GPU, driver and packages
#   doctor                      what opens here, and why the rest does not
#   verify-cupy verify-torch    the short form of: do they do what numpy does
#   tests                       those that need a GPU; warnings are told, and fail nothing
#   quick                       copies, kernels and the engine, few and short windows: quick.json
#   figures                     the engine at every size and batch against its ceilings: figures.json
#   kernels copies              the same of these: kernels.json, copies.json
#   whole-verify                every check of every backend at its full length
#
# summary.txt has a line for each step. Exit status 0 if every step that was begun ended well, and all were.
set -u
python=${PYTHON:-python3}
in_all=${SECONDS_IN_ALL:-570}
[ $# -gt 0 ] || { echo "usage: $0 OUT [STEP ...]" >&2; exit 2; }
out=$1
shift
[ $# -gt 0 ] || set -- facts doctor verify-cupy verify-torch tests quick figures

mkdir -p "$out" || exit 2
cd "$(dirname "$0")/.." || exit 2
began=$(date +%s)
failed=0

tell() {
    echo "$1" | tee -a "$out/summary.txt"
}

# run NAME BOUND COMMAND...: SIGTERM when the time is over, at which a benchmark writes down what it has measured.
run() {
    name=$1 bound=$2
    shift 2
    left=$((began + in_all - $(date +%s)))
    [ "$left" -ge "$bound" ] || bound=$left
    if [ "$bound" -lt 3 ]; then
        tell "$name: not begun, the time is over"
        failed=1
        return
    fi
    start=$(date +%s)
    timeout --kill-after=20 "$bound" "$@" >"$out/$name.log" 2>&1
    status=$?
    took=$(($(date +%s) - start))
    case $status in
    0) tell "$name: well, $took s" ;;
    124 | 137 | 130) tell "$name: stopped after $took s, the log has what there is" ;;
    *) tell "$name: exit status $status, $took s: $(tail -n 1 "$out/$name.log")" ;;
    esac
    [ "$status" = 0 ] || failed=1
}

facts() {
    nvidia-smi
    seen=$?
    "$python" -V
    "$python" -m pip list | grep -iE '^(gpu|torch|triton|cupy|numpy|nvidia|cuda|array-api|av |aiohttp)'
    return "$seen"
}

case $out in /*) ;; *) out=$OLDPWD/$out ;; esac
for step; do
    case $step in
    facts)
        if facts >"$out/facts.log" 2>&1; then
            tell "facts: well"
        else
            tell "facts: nvidia-smi does not answer"
            failed=1
        fi
        ;;
    doctor) run doctor 60 "$python" -m gpu_byoc doctor ;;
    verify-cupy | verify-torch)
        backend=${step#verify-}
        run "$step" 100 "$python" -m gpu_byoc verify --quick --backend "$backend" --json "$out/$step.json"
        ;;
    tests)
        GPU_BYOC_REQUIRE_CUDA=1 run tests 150 "$python" -m pytest tests/backends tests/checks \
            -m needs_cuda -W default -p no:cacheprovider --durations=10
        ;;
    quick) run quick 150 "$python" -m benchmarks --quick --only copies,kernels,engine --output "$out/quick.json" ;;
    figures) run figures "$in_all" "$python" -m benchmarks --only engine --output "$out/figures.json" ;;
    kernels | copies) run "$step" "$in_all" "$python" -m benchmarks --only "$step" --output "$out/$step.json" ;;
    whole-verify) run whole-verify "$in_all" "$python" -m gpu_byoc verify --json "$out/whole-verify.json" ;;
    *)
        tell "$step: there is no such step"
        failed=1
        ;;
    esac
done
exit "$failed"
