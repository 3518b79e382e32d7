#!/usr/bin/env bash
# Train a quantized network on CIFAR-10: first without quantizers, then with them, from the weights of the first run.
#     bash vgg_cifar_quant.sh                        # the full recipe, for a GPU
#     bash vgg_cifar_quant.sh fast                   # a night on two cores with bfloat16
#     bash vgg_cifar_quant.sh fast --w_bits 2          # flags are passed on to train.py in every run
#     float_epochs=1 bash vgg_cifar_quant.sh fast    # the variables below belong to single runs and can be set in front
# Started again, it goes on where it was stopped. Flags behind "$@" make a run what it is, and win.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python} # what quickstart.sh made
PYTHON=${PYTHON:-python3}

recipe=full
case ${1:-} in full | fast) recipe=$1 && shift ;; esac

# epochs of the run without quantizers, and of the run with them, which starts from its weights and learns from its answers
case $recipe in
    fast) float_epochs=${float_epochs:-12} epochs=${epochs:-20} ;;
    full) float_epochs=${float_epochs:-100} epochs=${epochs:-100} ;;
esac
float_lr=${float_lr:-0.1}
lr=${lr:-0.05}
alpha_lr=${alpha_lr:-0.01}     # of the clipping levels of the activations, which start at those of least squared error
weight_clip=${weight_clip:-3}  # weights stay within this many times their root mean square
distill=${distill:-0.5}        # share of the loss that asks for the answers of the network without quantizers

# of both runs; the flags in braces are filled in by train.py
common=(
    --model vgg7_quant --dataset cifar10 --data_path ./data --val_split 0.02
    --batch_size 128 --wd 5e-4 --label_smoothing 0.1 --cutout 8
)
quantized=(
    --w_bits 4 --a_bits 4 --wq dorefa --lr "$lr" --alpha_lr "$alpha_lr" --weight_clip "$weight_clip"
    --schedule_type cosine --distill "$distill"
)
float_save=save/{dataset}_{model}_${recipe}_w32a32
save=save/{dataset}_{model}_${recipe}_w{w_bits}a{a_bits}_{wq}

"$PYTHON" train.py "${common[@]}" --lr "$float_lr" --epochs "$float_epochs" "$@" \
    --w_bits 32 --a_bits 32 --wq dorefa --save_path "$float_save" --go_on
"$PYTHON" train.py "${common[@]}" "${quantized[@]}" --epochs "$epochs" "$@" \
    --fine_tune "$float_save/model_best.pth.tar" --save_path "$save" --go_on
