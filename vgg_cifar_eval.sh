#!/usr/bin/env bash
# Evaluate the VGG7 of vgg_cifar_quant.sh on simulated RRAM crossbars. Flags given to this script are passed on and win
# over the variables below:
#     bash vgg_cifar_eval.sh --limit 500                    # a quick look
#     bash vgg_cifar_eval.sh --adc_prec 7 6 5 4 3           # also plots accuracy over ADC bits
#     bash vgg_cifar_eval.sh --resume save/other/model_best.pth.tar
#     bash vgg_cifar_eval.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python} # what quickstart.sh made
PYTHON=${PYTHON:-python3}

# network: names the folder that vgg_cifar_quant.sh writes; eval.py reads the bits from the checkpoint itself
model=vgg7_quant
wbit=4
abit=4

# data: cifar10, cifar100, imagefolder or digits
dataset=cifar10
data_path=./data

checkpoint=save/${dataset}_${model}_w${wbit}a${abit}/model_best.pth.tar

# hardware: several values, separated by spaces, evaluate every combination
cell_bits="1 2" # bits of a memory cell
adc_bits="6"    # bits of the ADC
rows="128"      # rows of an array
engine=auto     # auto, reference, numba or triton; changes the speed, no result

# The table goes to the screen, and with a plot and results.jsonl into the checkpoint's folder, unless --save_path names
# another; the bit-planes of the weights go to prob/.

# shellcheck disable=SC2086  # lists are split on purpose
exec "$PYTHON" eval.py \
    --resume "$checkpoint" \
    --dataset "$dataset" \
    --data_path "$data_path" \
    --cellBit $cell_bits \
    --adc_prec $adc_bits \
    --subArray $rows \
    --engine "$engine" \
    "$@"
