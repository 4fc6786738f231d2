"""Make preference pairs as in MMPR (arXiv 2411.10442): from questions, and the responses of models to them.

`make` does all of it from one file; the others are its steps, each a job in a folder: the same command goes on after an
interruption, and asks nothing again that was answered.
"""

EXAMPLES = """\
mpo mmpr make mmpr.yaml --output mmpr                                   all of it: mmpr/meta.json, for mpo train data=mmpr
mpo mmpr sample http://localhost:8000/v1 questions.jsonl --output sampled --n 32
mpo mmpr verify sampled --output verified
mpo mmpr pair verified --output pairs --accuracy 0.2 0.8                pairs/meta.json
mpo mmpr sample http://localhost:8000/v1 photos.jsonl --output told --prompt plain
mpo mmpr continue http://localhost:8000/v1 told --output pairs --ratio 0.5
"""
