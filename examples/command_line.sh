#!/usr/bin/env bash
# The same from a shell: quantize the bundled model, look at the result, ask it something.
#     bash examples/command_line.sh OUTPUT
set -euo pipefail

examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-quantized}

optimum-cli export qvlm --model "${examples}/tiny_vlm" --scheme w4a8 --num-samples 16 "${out}"
optimum-cli qvlm info "${out}"
optimum-cli qvlm chat "${out}" --image "${examples}/../optimum_qvlm/data/default/images/text_stop_button.jpg" \
    "how many digits are there?"

# To upload it too, log in with `hf auth login` and add: --push-to-hub me/tiny-qvlm --private
