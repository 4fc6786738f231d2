#!/bin/sh
# From questions to a model trained on pairs of its own responses: serve the model, make MMPR files, train.
#
#     examples/mmpr_chain.sh MODEL QUESTIONS.jsonl FOLDER [WORDS OF mpo train]
#
# MODEL is a folder. A line of QUESTIONS.jsonl: {"image": "a.png", "question": "...", "answer": "..."}
# The same command goes on after any interruption. On a GPU, vllm serve MODEL is the faster server. PORT, N, TOKENS: see below.
set -eu
[ $# -ge 3 ] || { sed -n 's/^#  *//p' "$0" >&2 && exit 2; }
model=$(realpath "$1") questions=$(realpath "$2") folder=$3 port=${PORT:-8123}
shift 3
mkdir -p "$folder"
cat > "$folder/mmpr.yaml" <<END
sources: [{path: "$questions", name: questions}]
models: [{model: "http://localhost:$port/v1", name: "$(basename "$model")", concurrency: 2, template: "$model"}]
sample: {n: ${N:-8}, max_new_tokens: ${TOKENS:-1024}, until: {limit: ${LIMIT:-32}}}
END
if curl -s "http://localhost:$port" > /dev/null; then # its responses would be another model's
    echo "Port $port has a server already. Stop it, or set PORT to another one." >&2 && exit 1
fi
transformers serve "$model" --port "$port" > "$folder/server.log" 2>&1 &
server=$!
trap 'kill $server' EXIT
trap 'exit 130' INT TERM
until curl -sf "http://localhost:$port/health" > /dev/null; do
    kill -0 $server || { cat "$folder/server.log" >&2 && exit 1; }
    sleep 1
done
mpo mmpr make "$folder/mmpr.yaml" --output "$folder/mmpr"
kill $server && trap - EXIT # training needs its memory
mpo train data=mmpr data.meta="$folder/mmpr/meta.json" model.name_or_path="$model" run_dir="$folder/run" resume=auto "$@"
