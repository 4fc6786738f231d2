"""Validate, inspect, convert, mix, split, deduplicate and filter preference data.

PATH is anything that data.path of `mpo train` accepts: a JSONL, Parquet or tar file, a folder of save_to_disk, a data
set on the Hub, MMPR's meta.json, or the YAML of a mixture (see mix). The format is detected; --format sets it. Nothing
is edited in place: results are written to new files.
"""

EXAMPLES = """\
mpo data validate pairs.jsonl --model OpenGVLab/InternVL3-1B-Instruct    find problems that stop training
mpo data stats pairs.jsonl --html stats.html                       show lengths, length gaps and word overlap, by source
mpo data show pairs.jsonl --model OpenGVLab/InternVL3-1B-Instruct        show three records as the model sees them
mpo data convert pairs.jsonl pairs.parquet                         write Parquet with the images inside
mpo data dedupe pairs.jsonl unique.jsonl                           remove exact and near duplicates
mpo data filter unique.jsonl --output filtered                     drop completions that degenerate, into files with reasons
mpo data split unique.jsonl train.jsonl eval.jsonl                 split off 1 % of the pairs for evaluation
mpo data mix mixture.yaml mixed.parquet                            write several sources as one data set
"""
