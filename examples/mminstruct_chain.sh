#!/bin/sh
# From a folder of images to a model trained with MPO: instructions (MMInstruct), pairs of the model's responses (MMPR), training.
#
#     examples/mminstruct_chain.sh IMAGES SERVER MODEL FOLDER [WORDS OF mpo train]
#
# IMAGES has folders named after domains (landmark, ocr, ...). SERVER is the address of a vision-language model that describes the
# images and writes the instructions, such as http://localhost:8000/v1. MODEL is the folder or name of the model to train.
# The same command goes on after any interruption. N: samples of a question.
set -eu
[ $# -ge 4 ] || { sed -n 's/^#  *//p' "$0" >&2 && exit 2; }
images=$(realpath "$1") server=$2 model=$3 folder=$4
shift 4
mkdir -p "$folder"
cat > "$folder/mminstruct.yaml" <<END
images: [{path: "$images", name: images, domain: folder}]
caption: {model: {model: "$server"}}
generate: {model: {model: "$server"}}
END
mpo mminstruct make "$folder/mminstruct.yaml" --output "$folder/instructions"
cat > "$folder/mmpr.yaml" <<END
sources: [{path: instructions/questions.jsonl, image_root: "$images"}]
models: [{model: "$model", name: "$(basename "$model")"}]
sample: {prompt: plain, n: ${N:-8}, max_new_tokens: ${TOKENS:-512}}
verify: {format: any}
END
mpo mmpr make "$folder/mmpr.yaml" --output "$folder/pairs"
mpo train data=mmpr data.meta="$folder/pairs/meta.json" model.name_or_path="$model" run_dir="$folder/run" resume=auto "$@"
