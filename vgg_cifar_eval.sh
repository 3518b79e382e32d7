#!/usr/bin/env bash
# Evaluate the VGG7 in pretrained/ on simulated RRAM crossbars: the first tables of docs/results.md and the picture of the README.
#     bash vgg_cifar_eval.sh --limit 500                                        # a quick look
#     bash vgg_cifar_eval.sh --cell_bits 2 --adc_bits 5 --report                  # one setting, and where it loses
#     bash vgg_cifar_eval.sh --resume save/other/model_best.pth.tar             # another network of train.py
#     bash vgg_cifar_eval.sh --dataset imagefolder --data_path path/to/images   # train/<class>/, test/<class>/
# Flags are passed on to eval.py and win over the variables below; flags of the hardware replace the whole table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python} # what quickstart.sh made
PYTHON=${PYTHON:-python3}

network=pretrained/vgg7_w4a4_cifar10.pt

# groups of hardware flags: all combinations of each
table=(
    "--cell_bits 1 2 4 --adc_bits 3 4 5 6 7 8"
    "--cell_bits 1 --adc_plan significance --adc_bits 3 2 1.5 1"
    "--cell_bits 2 --adc_plan significance --adc_bits 3 2"
    "--cell_bits 1 --adc_plan significance --adc_idle skip --adc_bits 3 2 1.5 1.4 1"
    "--cell_bits 2 --adc_plan significance --adc_idle skip --adc_bits 3 2 1"
    "--cell_bits 1 --adc_plan ones --adc_bits 3 2 1.4 1 0.75 0.5"
    "--cell_bits 2 --adc_plan ones --adc_bits 2 1"
    "--cell_bits 1 2 4 --adc_range dynamic"
    "--cell_bits 1 2 --adc_bits 4 5 --crossbar_layers conv"
    "--cell_bits 1 --adc_bits 4 --mapping im2col" # 128 rows divide all of its channels: the same arrays as tap
    "--cell_bits 1 2 --adc_bits 5 --mapping tap im2col --rows 256"
)

"$PYTHON" eval.py --resume "$network" --table "${table[@]}" "$@"
