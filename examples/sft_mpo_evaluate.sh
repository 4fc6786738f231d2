#!/bin/sh
# From conversations to a model after SFT and MPO, and what each of them brought, with intervals.
#
#     examples/sft_mpo_evaluate.sh MODEL CHATS.jsonl PAIRS.jsonl QUESTIONS.jsonl FOLDER [WORDS OF mpo sft AND mpo train]
#
# MODEL is a folder or a name on the Hub. A line of CHATS.jsonl has images and messages, one of PAIRS.jsonl image, question, chosen and
# rejected, one of QUESTIONS.jsonl image, question and answer. The same command goes on after any interruption. METHOD and LR: the stage of
# SFT and the learning rate of MPO. The evaluation looks for its questions in the training data; FOLDER/results/report.html shows it.
set -eu
[ $# -ge 5 ] || { sed -n 's/^#  *//p' "$0" >&2 && exit 2; }
model=$1 chats=$2 pairs=$3 questions=$4 folder=$5
shift 5
mpo sft method="${METHOD:-internvl2_5_stage2}" model.name_or_path="$model" data.path="$chats" run_dir="$folder/sft" "$@"
mpo train model.name_or_path="$folder/sft" data.path="$pairs" run_dir="$folder/mpo" trainer.learning_rate="${LR:-5e-6}" "$@"
mpo evaluate start="$model" sft="$folder/sft" mpo="$folder/mpo" "$questions" \
    --train "$chats" --train "$pairs" --max-new-tokens "${TOKENS:-1024}" --output "$folder/results"
