"""InternVL 3.5's cascade: MPO on pairs, then GSPO (TRL's GRPO with ratios of whole sequences) with the same verifier as reward.

    python examples/cascade.py MODEL DIR/meta.json QUESTIONS.jsonl RUNS [NAME=VALUE of both trainers' arguments ...]

`mpo mmpr make` writes DIR/meta.json; a line of QUESTIONS.jsonl: {"image": "a.png", "question": "...", "answer": "..."}
"""

import json
import sys

from datasets import Dataset, Features, Image, List, Value
from trl import GRPOConfig, GRPOTrainer

from mpo import MPOConfig, MPOTrainer
from mpo.data import load_preferences, load_questions
from mpo.data.images import open_image
from mpo.models.loading import load_model
from mpo.pipelines.mmpr.sample import Sample, asked_of
from mpo.pipelines.mmpr.verify import judge
from mpo.pipelines.step import to_record
from mpo.schema import Question

model, meta, path, runs, *words = sys.argv[1:]
common = {name: json.loads(value) for name, _, value in (word.partition("=") for word in words)} | {"report_to": "none"}
first = MPOTrainer(model=model, args=MPOConfig(f"{runs}/mpo", **common), train_dataset=load_preferences(meta))
first.train()
first.save_model()


def rows():
    """The questions, with the prompt of MMPR's responses."""
    for question in map(to_record, load_questions(path)):
        (request,) = Sample(None, prompt="en").requests(question)
        text = asked_of(request)["question"].replace("<image>\n", "")
        known = json.dumps({name: value for name, value in question.items() if name not in ("messages", "images")})
        yield {"prompt": [{"role": "user", "content": text}], "images": list(map(open_image, request.images)), "known": known}


def reward(completions, known, **_):
    """1 for a right answer in the format that the prompt asks for, otherwise 0."""
    judged = [judge(said[0]["content"], Question([], **json.loads(one))) for said, one in zip(completions, known, strict=True)]
    return [float(one.verdict == "correct") for one in judged]


messages = List({"role": Value("string"), "content": Value("string")})
data = Dataset.from_list([*rows()], Features({"prompt": messages, "images": List(Image()), "known": Value("string")}))
args, loaded = GRPOConfig(f"{runs}/gspo", importance_sampling_level="sequence", **common), load_model(f"{runs}/mpo")
second = GRPOTrainer(loaded.model, reward, args=args, train_dataset=data, processing_class=loaded.processor)
second.train()
second.save_model()
