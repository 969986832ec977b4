#!/usr/bin/env bash
# GPT-2 Medium on Megatron-LM as in the PACI paper (arXiv 2606.07881): 8 stages on the GPUs of one node, batch 128 as 8
# micro-batches of 16, 1,024 tokens, 49.8 billion tokens, AdamW at 3e-4 scaled by sqrt(128 / 256), 1% warm-up, cosine to
# a tenth, no clipping, bf16, untied embeddings.
#
#   MEGATRON_LM=~/Megatron-LM DATA=~/openwebtext_text_document TOKENIZER=~/gpt2 launch/megatron_gpt2_medium.sh
#   ... launch/megatron_gpt2_medium.sh --pipeline-schedule 1f1b        the baseline
#   ... launch/megatron_gpt2_medium.sh --paci-prediction window        stale forwards on predicted weights
#
# DATA is what Megatron-LM's tools/preprocess_data.py wrote, without .bin; TOKENIZER is a folder with vocab.json and
# merges.txt.  Further arguments go to pretrain_gpt.py.
set -euo pipefail
: "${MEGATRON_LM:?names a checkout of Megatron-LM}" "${DATA:?names the data}" "${TOKENIZER:?names the tokenizer}"

export CUDA_DEVICE_MAX_CONNECTIONS=1
exec torchrun --standalone --nproc-per-node 8 -m paci_schedule.launch "$MEGATRON_LM/pretrain_gpt.py" \
  --pipeline-schedule paci \
  --pipeline-model-parallel-size 8 --tensor-model-parallel-size 1 \
  --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --ffn-hidden-size 4096 \
  --seq-length 1024 --max-position-embeddings 1024 --untie-embeddings-and-output-weights \
  --micro-batch-size 16 --global-batch-size 128 --train-iters 380000 \
  --lr 2.1213e-4 --min-lr 2.1213e-5 --lr-decay-style cosine --lr-warmup-fraction 0.01 \
  --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 0 --bf16 \
  --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02 \
  --tokenizer-type GPT2BPETokenizer --vocab-file "$TOKENIZER/vocab.json" --merge-file "$TOKENIZER/merges.txt" \
  --data-path "$DATA" --split 989,10,1 \
  --no-check-for-nan-in-loss-and-grad --log-interval 50 --eval-interval 2000 --eval-iters 40 \
  --save runs/megatron-medium --save-interval 10000 "$@"
