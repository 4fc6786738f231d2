#!/bin/sh
# From questions to a model trained on pairs of its own responses: serve the model, make MMPR files, train.
#
#     examples/mmpr_chain.sh MODEL QUESTIONS.jsonl FOLDER [WORDS OF mpo train]
#
# MODEL is the absolute path of a folder. A line of QUESTIONS.jsonl: {"image": "a.png", "question": "...", "answer": "..."}
# The same command goes on after any interruption. On a GPU, vllm serve MODEL is the faster server. PORT, N, TOKENS: see below.
set -eu
model=$1 questions=$2 folder=$3
shift 3
mkdir -p "$folder"
cat > "$folder/mmpr.yaml" <<END
sources: [{path: "$(realpath "$questions")", name: questions}]
models: [{model: "http://localhost:${PORT:-8123}/v1", name: "$(basename "$model")", concurrency: 2, template: "$model"}]
sample: {n: ${N:-8}, max_new_tokens: ${TOKENS:-1024}, until: {limit: ${LIMIT:-32}}}
END
transformers serve "$model" --port "${PORT:-8123}" > "$folder/server.log" 2>&1 &
server=$!
trap 'kill $server' EXIT
until curl -sf "http://localhost:${PORT:-8123}/health" > /dev/null; do
    kill -0 $server || { cat "$folder/server.log" >&2 && exit 1; }
    sleep 1
done
mpo mmpr make "$folder/mmpr.yaml" --output "$folder/mmpr"
mpo train data=mmpr data.meta="$folder/mmpr/meta.json" model.name_or_path="$model" run_dir="$folder/run" resume=auto "$@"
