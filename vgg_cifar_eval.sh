#!/usr/bin/env bash
# Evaluate the VGG7 in pretrained/ on simulated RRAM crossbars: the table and the plot of the README. Flags given to this
# script are passed on and win over the variables below; those that describe the hardware replace the whole table.
#     bash vgg_cifar_eval.sh --limit 500                                        # a quick look
#     bash vgg_cifar_eval.sh --cellBit 2 --adc_prec 5 --report                  # one setting, and where it loses
#     bash vgg_cifar_eval.sh --resume save/other/model_best.pth.tar             # a network of your own
#     bash vgg_cifar_eval.sh --dataset imagefolder --data_path path/to/images   # train/<class>/, test/<class>/
#     bash vgg_cifar_eval.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python} # what quickstart.sh made
PYTHON=${PYTHON:-python3}

# the network, where its table, plot, results.jsonl and calibrated ADC ranges go, and data: cifar10, cifar100, imagefolder
# or digits. With --resume, eval.py takes bits and data from the checkpoint and writes into its folder; those of the original
# code do not say their data: add --dataset cifar10
network=(
    --resume pretrained/vgg7_w4a4_cifar10.pt --save_path save/eval_vgg7_w4a4
    --dataset cifar10 --data_path ./data
)
batch_size=64 # changes the results of dynamic ADC ranges only

# hardware: every combination of bits of a cell and of the ADC, and some settings for comparison
table=(
    --cellBit 1 2 4 --adc_prec 3 4 5 6 7 8
    --also "--cellBit 1 2 4 --adc_range dynamic"
    "--cellBit 1 2 --adc_prec 4 5 --map conv"
    "--cellBit 1 --adc_prec 4 --mapping im2col" # 128 rows divide all of its channels: the same arrays as tap
    "--cellBit 1 2 --adc_prec 5 --mapping tap im2col --subArray 256"
)
for flag in "$@"; do
    case "$flag" in
    --cellBit* | --adc_prec* | --adc_range | --adc_range=* | --subArray* | --map* | --reference* | --dac_bits* | --also*)
        table=() ;;
    --resume | --resume=*) network=() ;;
    esac
done

exec "$PYTHON" eval.py ${network[@]+"${network[@]}"} --batch_size "$batch_size" ${table[@]+"${table[@]}"} "$@"
