#!/usr/bin/env bash
# Train a quantized VGG7 on CIFAR-10. Flags given to this script are passed on and win over the variables below:
#     bash vgg_cifar_quant.sh --epochs 30 --seed 1
#     bash vgg_cifar_quant.sh --resume          # go on where the last checkpoint was made
#     bash vgg_cifar_quant.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python} # what quickstart.sh made
PYTHON=${PYTHON:-python3}

# network: bits 1 to 8, or 32 to switch a quantizer off
model=vgg7_quant
wbit=4
abit=4
alpha_init=6.0 # first clipping level of the activations

# data: cifar10, cifar100, imagefolder or digits
dataset=cifar10
data_path=./data

# optimizer
epochs=100
batch_size=128
lr=0.05
wd=1e-4
a_lambda=0.01 # factor of the penalty on the clipping levels; add --clp below to switch it on

# The run is kept in save/<dataset>_<model>_w<wbit>a<abit>, unless --save_path names another folder.

exec "$PYTHON" train.py \
    --model "$model" \
    --wbit "$wbit" \
    --abit "$abit" \
    --alpha_init "$alpha_init" \
    --dataset "$dataset" \
    --data_path "$data_path" \
    --epochs "$epochs" \
    --batch_size "$batch_size" \
    --lr "$lr" \
    --wd "$wd" \
    --a_lambda "$a_lambda" \
    "$@"
