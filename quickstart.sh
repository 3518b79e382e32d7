#!/usr/bin/env bash
# From a fresh checkout to a table: trains a 4-bit VGG7 on scikit-learn's digits and runs it on simulated RRAM crossbars.
# Needs Python 3.10 or newer; takes a few minutes on two CPU cores. A second call goes on where the first stopped.
# Flags are passed on to eval.py: bash quickstart.sh --report
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

save_path=save/quickstart   # checkpoint, log, results.jsonl
cell_bits=(1 2)             # bits of a memory cell
adc_bits=(6)                # bits of the ADC

source environment.sh requirements.txt
python train.py --save_path "$save_path" --go_on
python eval.py --resume "$save_path/model_best.pth.tar" --cell_bits "${cell_bits[@]}" --adc_bits "${adc_bits[@]}" "$@"
