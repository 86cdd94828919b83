#!/usr/bin/env bash
# What only a GPU shows, in under 13 minutes: tests (1.5 minutes), benchmarks/gpu.py (2), a model of CIFAR-10 from nothing
# (8), and its samples at one and two calls (1), with a judge where there is one.
#
#   benchmarks/on_gpu.sh [tests] [measure] [train] [judge]        # default: all four, in this order
#
#   OUT          folder of the results (default: runs/on_gpu)
#   PYTHON       the interpreter (default: python)
#   CIFAR_DATA   CIFAR-10: a Hub id, or a folder of parquet files (default: uoft-cs/cifar10)
#   CIFAR_JUDGE  a script that takes a folder of PNGs and prints a line about them (default: none)
#   TINY=1       small sizes, to try these commands on a CPU
#
# A part that fails is named in failures.txt, and the next one begins. It has not been run on a GPU yet.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD python=${PYTHON:-python} out=${OUT:-runs/on_gpu} data=${CIFAR_DATA:-uoft-cs/cifar10} tiny=${TINY:-}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false
mkdir -p "$out"

# Run a command for at most $1 seconds, with its output in $out/$2.txt; name it in failures.txt if it fails.
part() {
    local seconds=$1 name=$2 code=0
    shift 2
    timeout --signal=INT --kill-after=20 "$seconds" "$@" >"$out/$name.txt" 2>&1 || code=$?
    [ "$code" = 0 ] || echo "$name: exit code $code after $SECONDS s" | tee -a "$out/failures.txt"
    tail -n 3 "$out/$name.txt"
}

tests() {
    part 90 tests "$python" -m pytest -q -p no:cacheprovider --tb=short -m gpu tests/gpu
}

measure() {
    local budget=100
    [ -z "$tiny" ] || budget=600 # a CPU can be slow
    part "$((budget + 30))" gpu "$python" benchmarks/gpu.py --budget "$budget" ${tiny:+--tiny} --out "$out/gpu.json"
}

train() {
    local small=()
    [ -z "$tiny" ] || small=(--model_preset tiny --compile false --train_batch_size 8 --max_train_samples 200)
    part 495 train "$python" training/train_consistency.py --config training/configs/cifar10_8_minutes.yaml \
        --dataset_name "$data" --minutes "${tiny:+0.}8" --output_dir "$out/cifar10" "${small[@]}"
}

judge() {
    local count=10000 steps
    [ -z "$tiny" ] || count=20
    for steps in 1 2; do
        part 60 "sample_$steps" "$python" training/sample.py --pretrained_model_name_or_path "$out/cifar10/pipeline" \
            --num_samples "$count" --num_inference_steps "$steps" --batch_size 1000 --output_dir "$out/samples_$steps" \
            --overwrite
        [ -z "${CIFAR_JUDGE:-}" ] || part 60 "judge_$steps" "$python" "$CIFAR_JUDGE" "$out/samples_$steps/images"
    done
}

rm -f "$out/failures.txt"
for name in "${@:-tests measure train judge}"; do
    for one in $name; do
        case $one in
            tests | measure | train | judge) "$one" ;;
            *) echo "unknown part $one; the parts are tests, measure, train and judge" >&2 && exit 2 ;;
        esac
    done
done
[ ! -e "$out/failures.txt" ]
