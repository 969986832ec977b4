#!/usr/bin/env bash
# GPT-2 Medium as in the PACI paper (arXiv 2606.07881): 8 stages on the GPUs of one node, batch 128 as 8 micro-batches of
# 16, sequences of 1,024 tokens of OpenWebText, 49.8 billion tokens, AdamW at 3e-4 scaled by sqrt(128 / 256), 1% warm-up,
# cosine to a tenth, no clipping, bf16.  Unlike the paper's, the parameters are bf16 themselves (no autocast), and the
# optimizer keeps fp32 copies.  Needs the hub for text and tokenizer.
#
#   launch/gpt2_medium.sh                                                        PACI
#   launch/gpt2_medium.sh --pipeline-schedule 1f1b --output runs/medium-1f1b     the baseline
#   .venv/bin/python launch/compare.py runs/medium-1f1b runs/medium-paci
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec .venv/bin/torchrun --standalone --nproc-per-node 8 launch/train_gpt.py \
  --deepspeed-config launch/configs/gpt2_medium.json \
  --model medium --sequence-length 1024 \
  --data hub:Skylion007/openwebtext --tokenizer hub:openai-community/gpt2 \
  --updates 380000 --warm-up 3800 \
  --validate-every 2000 --validation-batches 40 --save-every 10000 --log-every 50 \
  --output runs/medium-paci "$@"
