"""Make preference pairs as in MMPR (arXiv 2411.10442): from questions, and the responses of models to them.

`make` does all of it; the others are its steps. Each works in a folder: after an interruption the same command goes on,
and asks nothing again that was answered.
"""

EXAMPLES = """\
mpo mmpr make mmpr.yaml --output mmpr                                   all of it: mmpr/meta.json, for mpo train data=mmpr
mpo mmpr sample http://localhost:8000/v1 questions.jsonl --output sampled --n 32
mpo mmpr verify sampled --output verified
mpo mmpr pair verified --output pairs --accuracy 0.2 0.8                pairs/mmpr/meta.json
mpo mmpr sample http://localhost:8000/v1 photos.jsonl --output told --prompt plain --n 1
mpo mmpr continue http://localhost:8000/v1 told --output pairs --ratio 0.5
"""
