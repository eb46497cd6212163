#!/usr/bin/env bash
# Qwen2.5-VL-7B on the GPUs of this machine, with the paper's 25 heads and 1% of neurons:
#
#     examples/scaling/qwen2.5-vl-7b.sh vqa captions-and-questions.json coco/ runs/qwen-vqa [more of hones attribute]
#
# A task, its data, its images, a run folder. Give the same command again to resume. LAUNCH says how it is started:
# LAUNCH="torchrun --nproc-per-node 4", or the accelerate command that stands in 64_gpus.yaml.
set -euo pipefail
task=$1 data=$2 images=$3 out=$4
shift 4
here=$(dirname "$0")
${LAUNCH:-accelerate launch --config_file "$here/8_gpus.yaml"} -m hones_steer attribute \
    "${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}" --task "$task" --data "$data" --images "$images" --out "$out" \
    --dtype bfloat16 --method hones --top-heads 25 --top-fraction 0.01 --batch-size 16 --memory-gb 4 "$@"
