#!/usr/bin/env bash
# A tiny GPT on Megatron-LM, 2 stages, on any CPU, with made-up data: to see the launch route work.  The CPU plays CUDA.
#
#   MEGATRON_LM=~/Megatron-LM launch/megatron_tiny_cpu.sh
#   MEGATRON_LM=~/Megatron-LM launch/megatron_tiny_cpu.sh --pipeline-schedule 1f1b
#   MEGATRON_LM=~/Megatron-LM launch/megatron_tiny_cpu.sh --paci-prediction every
#
# PYTHON is the interpreter that has torch and megatron-core [python3].  Further arguments go to pretrain_gpt.py.
set -euo pipefail
: "${MEGATRON_LM:?names a checkout of Megatron-LM}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore PYTHONPATH="$PWD:$MEGATRON_LM"
exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc-per-node 2 \
  -m testing.megatron_cpu paci_schedule.launch "$MEGATRON_LM/pretrain_gpt.py" \
  --pipeline-schedule paci --pipeline-model-parallel-size 2 --distributed-backend gloo \
  --transformer-impl local --attention-backend unfused --no-persist-layer-norm --no-masked-softmax-fusion \
  --no-gradient-accumulation-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion \
  --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 \
  --attention-dropout 0 --hidden-dropout 0 \
  --micro-batch-size 2 --global-batch-size 8 --train-iters 20 --lr 1e-3 --min-lr 1e-4 \
  --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 1 --num-workers 0 \
  --no-create-attention-mask-in-dataloader \
  --log-interval 5 --eval-interval 10 --eval-iters 2 --split 90,5,5 "$@"
