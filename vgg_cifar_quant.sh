#!/usr/bin/env bash
# Train a quantized VGG7 on CIFAR-10: first without quantizers, then with them, from the weights of the first run.
#     bash vgg_cifar_quant.sh                   # the full recipe, for a GPU
#     bash vgg_cifar_quant.sh fast              # with few epochs: two hours and a half on two cores with bfloat16. A third
#                                               # run goes on, on nearly all images and with a part of each covered
# Started again, the script goes on where it was stopped. The variables below can be given as flags; other flags are passed
# on to all runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

[ -x .venv/bin/python ] && PYTHON=${PYTHON:-.venv/bin/python} # what quickstart.sh made
PYTHON=${PYTHON:-python3}

recipe=full
case "${1:-}" in full | fast) recipe=$1 && shift ;; esac
case " $* " in *" -h "* | *" --help "*)
    sed -n '2,/^set/s/^# \{0,1\}//p' vgg_cifar_quant.sh && sed -n '/^# network/,/^alpha_lr/p' vgg_cifar_quant.sh
    echo "Other flags, of train.py (but the script itself chooses folders and goes on):" && exec "$PYTHON" train.py --help ;;
esac

# network: bits 1 to 8
model=vgg7_quant
wbit=4
abit=4
wq=dorefa # weight quantizer: dorefa or sawb

# data: cifar10, cifar100, imagefolder or digits
dataset=cifar10
data_path=./data

# optimizer
if [ "$recipe" = full ]; then
    float_epochs=100
    epochs=100
    last_epochs=0 # no third run
else
    float_epochs=8
    epochs=8
    last_epochs=16
fi
batch_size=128
float_lr=0.1
lr=0.05
wd=5e-4
label_smoothing=0.1
weight_clip=3  # weights stay within this many times their root mean square
alpha_lr=0.01  # of the clipping levels of the activations, which start at those of least squared error

more=() # other flags
while [ $# -gt 0 ]; do
    case "$1" in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    case "$1" in
    --model | --wbit | --abit | --wq | --dataset | --data_path | --float_epochs | --epochs | --last_epochs | --batch_size | \
        --float_lr | --lr | --wd | --label_smoothing | --weight_clip | --alpha_lr)
        printf -v "${1#--}" %s "${2:?a value is missing behind $1}" && shift 2 ;;
    --save_path | --resume | --fine_tune | --evaluate | --overwrite)
        echo "error: this script chooses the folders and goes on by itself; for $1 call train.py" >&2 && exit 2 ;;
    *) more+=("$1") && shift ;;
    esac
done

# The runs are kept in these folders.
save=save/${dataset}_${model}_${recipe}
float_save=${save}_w32a32
quant_save=${save}_w${wbit}a${abit}_${wq}

# run FOLDER START FLAGS...: go on with the run that is kept in FOLDER, or begin it with the flags START
run() {
    local folder=$1 start=$2
    shift 2
    [ -f "$folder/checkpoint.pth.tar" ] && start=--resume
    # shellcheck disable=SC2086  # split on purpose
    "$PYTHON" train.py $start --save_path "$folder" --model "$model" --dataset "$dataset" --data_path "$data_path" \
        --batch_size "$batch_size" --wd "$wd" --label_smoothing "$label_smoothing" "$@" ${more[@]+"${more[@]}"}
}

run "$float_save" "" --wbit 32 --abit 32 --epochs "$float_epochs" --lr "$float_lr"
quantized=(--wbit "$wbit" --abit "$abit" --wq "$wq" --lr "$lr" --alpha_lr "$alpha_lr" --weight_clip "$weight_clip")
run "$quant_save" "--fine_tune $float_save/model_best.pth.tar" "${quantized[@]}" --epochs "$epochs"
[ "$last_epochs" = 0 ] || run "${quant_save}_last" "--fine_tune $quant_save/model_best.pth.tar" "${quantized[@]}" \
    --epochs "$last_epochs" --schedule_type cosine --cutout 8 --val_split 0.02
