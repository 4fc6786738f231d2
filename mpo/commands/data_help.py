"""What `mpo data --help` and the help of its actions say."""

EXPLANATION = """\
Preference data before it is trained on. PATH is whatever data.path of `mpo train` may be: a JSONL, Parquet or tar
file, a folder of save_to_disk, a data set on the Hub, MMPR's meta.json, in any format that mpo reads (detected;
--format says it); or the YAML of a mixture (see mix). Nothing is edited in place: results are written to new files.
"""

EXAMPLES = """\
examples
  mpo data validate pairs.jsonl --model OpenGVLab/InternVL3-1B-hf    may training start? if not, why not
  mpo data stats pairs.jsonl --html stats.html                       lengths, gaps, overlap, by source
  mpo data show pairs.jsonl --model OpenGVLab/InternVL3-1B-hf        three records as the model sees them
  mpo data convert pairs.jsonl pairs.parquet                         images inside, for TRL or the Hub
  mpo data dedupe pairs.jsonl once.jsonl                             without exact and near duplicates
  mpo data split once.jsonl train.jsonl eval.jsonl --eval-size 0.01   no question or image on both sides
  mpo data mix mixture.yaml mixed.parquet                            several sources as one file
"""

VALIDATE = """\
Read every record as training would, in parallel, and look for what keeps it from training: lines that are no pairs,
images and videos that are missing or cannot be decoded, marks without images, empty or equal answers, records
beyond --max-length or the model's context, image tokens written in texts, questions that --eval has too (of the same
images), lines of --eval that are no pairs. Reported but no obstacle: exact duplicates, images that --eval has too,
answers that refuse or stop half-way, two that differ in white space alone, with --model other control tokens in texts
(<|im_end|>), which become real ones. Every finding goes to --output with its file and line. Exit status 0: training
may start. 1: it may not.
"""
VALIDATE_EXAMPLES = """\
examples
  mpo data validate pairs.jsonl
  mpo data validate pairs.jsonl --image-root /data/images --model OpenGVLab/InternVL3-1B-hf --max-length 8192
  mpo data validate train.jsonl --eval eval.jsonl && mpo train data.path=train.jsonl data.eval_path=eval.jsonl
"""
STATS = """\
Count: words of questions and answers (and with --model tokens and tiles), how much longer chosen answers are than
rejected ones, how many words both share, for all pairs and by source. A chosen answer that is mostly the longer one
teaches length; answers that share nearly no words teach little else than style.
"""
STATS_EXAMPLES = """\
examples
  mpo data stats pairs.jsonl
  mpo data stats pairs.jsonl --model OpenGVLab/InternVL3-1B-hf --html stats.html --workers 8
"""
SHOW = """\
Show a few records. With --model as the model sees them: the rendered prompt with its image tokens, and the answers
with what is scored between angle quotation marks.
"""
SHOW_EXAMPLES = """\
examples
  mpo data show pairs.jsonl                                          the first three
  mpo data show pairs.jsonl --count 10 --random --seed 1             any ten
  mpo data show pairs.jsonl --id m3cot-17 --model OpenGVLab/InternVL3-1B-hf
  mpo data show pairs.jsonl --count 50 --html look.html              with the images, in a browser
"""
CONVERT = """\
Write pairs in another form. The target's name says which: .jsonl is TRL's columns (--to mmpr for MMPR's lines),
.parquet TRL's columns with the images inside, one without ending a folder of save_to_disk. The target is read again
and compared, record by record, image by image; what the form has no place for is named. In MMPR's lines, what else
a record has stands as it did in its file, or in one object, metadata, where its names would mean something else.
"""
CONVERT_EXAMPLES = """\
examples
  mpo data convert mmpr/annotations/m3cot.jsonl m3cot.parquet --image-root mmpr/images
  mpo data convert m3cot.parquet m3cot.jsonl --to mmpr               its images become files in m3cot_images/
  mpo data convert pairs.jsonl portable.jsonl --images copy        with a copy of every image beside it
"""
MIX = """\
Write a mixture of several sources as one file, as training with data.mix=MIXTURE would draw it, and print how much
of each source is in it. MIXTURE is MMPR's meta.json, or YAML or JSON. Paths (and patterns, *.jsonl) are looked for
beside it first:

  sources:
    - {path: m3cot.jsonl, image_root: images/m3cot, repeat_time: 2}
    - {path: charts.jsonl, image_root: images/charts, repeat_time: 0.1, cap: 5000, tiles: {max: 12}}
  sampling: null     # repeat_time; weight: shares by weight; sqrt: shares by the square root of the number of pairs
  size: null         # pairs in all, for shares
  eval_size: null     # a share or number of pairs to keep out, none of whose questions or images is in the mixture
  seed: 0
"""
MIX_EXAMPLES = """\
examples
  mpo data mix mixture.yaml                      only print the table
  mpo data mix mixture.yaml mixed.parquet
  mpo data mix mixture.yaml mixed.parquet eval.parquet     with eval_size in it
  mpo data mix MMPR-v1.2/meta.json                         what each of its sources gives
"""
SPLIT = """\
Split pairs into a file to train on and one to evaluate on, such that no question and no image is in both: pairs
that share one, directly or through others, stay together. A question of very many pairs (Describe this image.)
ties all of these together; --by image then looks at images alone.
"""
SPLIT_EXAMPLES = """\
examples
  mpo data split pairs.jsonl train.jsonl eval.jsonl --eval-size 0.01
  mpo data split pairs.jsonl train.parquet eval.parquet --eval-size 500 --by image --seed 3
"""
DEDUPE = """\
Write pairs without those that are there before. Exact: the same question, images and answers. Near (unless
--exact): all three texts overlap by --threshold in their 5-letter sequences, case and punctuation aside, with the same
numbers and signs, and the images are the same: file by file, or pixel by pixel but for what JPEG or WebP compression
or making an image smaller (to three quarters at least, in proportion) changes everywhere. Another colour, label or bar
is another image; a copy of a drawing often counts as one too, and is then kept. Images are compared where their
64-bit difference hashes are nearly equal. The first of each is kept; REMOVED lists every one that is not, with what it
repeats and why.
"""
DEDUPE_EXAMPLES = """\
examples
  mpo data dedupe pairs.jsonl once.jsonl
  mpo data dedupe pairs.jsonl once.parquet --exact
  mpo data dedupe pairs.jsonl once.jsonl --threshold 0.8 --removed gone.jsonl
"""
