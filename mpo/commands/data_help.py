"""Help texts of `mpo data` and its actions."""

EXPLANATION = """\
Validate, inspect, convert, mix, split and deduplicate preference data.

PATH is anything that data.path of `mpo train` accepts: a JSONL, Parquet or tar file, a folder of save_to_disk, a data
set on the Hub, MMPR's meta.json, or the YAML of a mixture (see mix). The format is detected; --format sets it. Nothing
is edited in place: results are written to new files.
"""

EXAMPLES = """\
examples
  mpo data validate pairs.jsonl --model OpenGVLab/InternVL3-1B-hf    find problems that stop training
  mpo data stats pairs.jsonl --html stats.html                       show lengths, length gaps and word overlap, by source
  mpo data show pairs.jsonl --model OpenGVLab/InternVL3-1B-hf        show three records as the model sees them
  mpo data convert pairs.jsonl pairs.parquet                         write Parquet with the images inside
  mpo data dedupe pairs.jsonl unique.jsonl                           remove exact and near duplicates
  mpo data split unique.jsonl train.jsonl eval.jsonl                 split off 1 % of the pairs for evaluation
  mpo data mix mixture.yaml mixed.parquet                            write several sources as one data set
"""

VALIDATE = """\
Validate a data set before training: read every record as training would, in parallel.

Problems stop training: lines that are not pairs, images and videos that are missing or cannot be decoded, placeholders
that do not match the images, empty or equal completions, records longer than --max-length or the model's context, image
tokens written in texts, questions that --eval has too (with the same images), lines of --eval that are not pairs.

Notes do not stop training: exact duplicates, images that --eval has too, completions that refuse or look unfinished,
completions that differ only in white space and, with --model, other control tokens written in texts (<|im_end|>), which
the tokenizer reads as control tokens.

Every finding is written to --output with its file and line. Exit status: 0 without problems, 1 with problems.
"""
VALIDATE_EXAMPLES = """\
examples
  mpo data validate pairs.jsonl
  mpo data validate pairs.jsonl --image-root /data/images --model OpenGVLab/InternVL3-1B-hf --max-length 8192
  mpo data validate train.jsonl --eval eval.jsonl && mpo train data.path=train.jsonl data.eval_path=eval.jsonl
"""
STATS = """\
Print statistics for all pairs and by source: words of questions and completions (with --model also tokens and tiles),
how much longer chosen completions are than rejected ones, and how many words both share. If most chosen completions
are the longer ones, the model learns length; if the two share almost no words, it learns little but style.
"""
STATS_EXAMPLES = """\
examples
  mpo data stats pairs.jsonl
  mpo data stats pairs.jsonl --model OpenGVLab/InternVL3-1B-hf --html stats.html --workers 8
"""
SHOW = """\
Print a few records. With --model, as the model sees them: the rendered prompt with its image tokens, and the
completions with the labelled tokens (those of the loss) between angle quotation marks.
"""
SHOW_EXAMPLES = """\
examples
  mpo data show pairs.jsonl                                          show the first three
  mpo data show pairs.jsonl --count 10 --random --seed 1             show ten at random
  mpo data show pairs.jsonl --id m3cot-17 --model OpenGVLab/InternVL3-1B-hf
  mpo data show pairs.jsonl --count 50 --html show.html              write an HTML page with the images
"""
CONVERT = """\
Convert a data set to another form. The name of the target decides which: .jsonl has TRL's columns (--to mmpr: MMPR's
fields), .parquet has TRL's columns with the images inside, a name without an ending is a folder of save_to_disk. The
target is read again and compared, record by record and image by image. Columns that the form cannot hold are listed.
MMPR's lines keep other fields of a record at the top level as in its file, or in one object `metadata` where their
names would mean something else.
"""
CONVERT_EXAMPLES = """\
examples
  mpo data convert mmpr/annotations/m3cot.jsonl m3cot.parquet --image-root mmpr/images
  mpo data convert m3cot.parquet m3cot.jsonl --to mmpr             write the images to m3cot_images/
  mpo data convert pairs.jsonl portable.jsonl --images copy        copy every image next to the file
"""
MIX = """\
Write a mixture of several sources as one data set, as training with data.mix=MIXTURE would draw it, and print how many
pairs of each source it has. MIXTURE is MMPR's meta.json, or a YAML or JSON file. Paths and patterns (*.jsonl) are
relative to its folder if they exist there:

  sources:
    - {path: m3cot.jsonl, image_root: images/m3cot, repeat_time: 2}
    - {path: charts.jsonl, image_root: images/charts, repeat_time: 0.1, cap: 5000, tiles: {max: 12}}
  sampling: null     # null: weight if sources have one, else repeat_time; sqrt: by the square root of the sizes
  size: null         # total number of pairs, with sampling weight or sqrt
  eval_size: null    # size of the evaluation part (shares no question or image with the rest): fraction or number of pairs
  seed: 0
"""
MIX_EXAMPLES = """\
examples
  mpo data mix mixture.yaml                      print only the table
  mpo data mix mixture.yaml mixed.parquet
  mpo data mix mixture.yaml mixed.parquet eval.parquet     for a mixture with an eval_size
  mpo data mix MMPR-v1.2/meta.json                         print the pairs of each source of MMPR
"""
SPLIT = """\
Split a data set into a training and an evaluation part that share no question and no image. Pairs that share one,
directly or through other pairs, are a connected component and stay in one part. A question that many pairs have
(Describe this image.) connects all of them; use --by image to compare only images.
"""
SPLIT_EXAMPLES = """\
examples
  mpo data split pairs.jsonl train.jsonl eval.jsonl --eval-size 0.01
  mpo data split pairs.jsonl train.parquet eval.parquet --eval-size 500 --by image --seed 3
"""
DEDUPE = """\
Remove duplicate pairs; the first pair of each group is kept. Exact duplicates have the same question, images and
completions. Near duplicates (unless --exact) have texts whose 5-character sequences overlap by --threshold, case and
punctuation aside, with the same numbers and signs, and the same images: equal files, or pixels that differ only by
JPEG or WebP compression or by downscaling (to at least three quarters of the size, in proportion). An image with
another colour, label or bar is a different image. Duplicates of drawings are often not recognised, and are then kept.
Images are compared if their 64-bit difference hashes are nearly equal. The file of --removed lists every removed pair,
the pair that it repeats, and the reason.
"""
DEDUPE_EXAMPLES = """\
examples
  mpo data dedupe pairs.jsonl unique.jsonl
  mpo data dedupe pairs.jsonl unique.parquet --exact
  mpo data dedupe pairs.jsonl unique.jsonl --threshold 0.8 --removed duplicates.jsonl
"""
