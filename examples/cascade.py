"""InternVL 3.5's cascade after MPO: GSPO (TRL's GRPO with ratios of whole sequences), rewarded by the verifier of MMPR.

    python examples/cascade.py RUN QUESTIONS.jsonl OUTPUT [NAME=VALUE of GRPOConfig ...]

RUN is a folder of `mpo train` or train_mpo.py. A line of QUESTIONS.jsonl: {"image": "a.png", "question": "...", "answer": "..."}
"""

import json
import sys

from datasets import Dataset, Image, List
from trl import GRPOConfig, GRPOTrainer

from mpo.data import load_questions
from mpo.models.loading import load_model
from mpo.pipelines.mmpr.sample import Sample, asked_of
from mpo.pipelines.mmpr.verify import judge
from mpo.pipelines.step import to_record
from mpo.schema import Question


def row(question):  # as GRPO reads it, with the prompt of MMPR's responses
    (request,) = Sample(None, prompt="en").requests(to_record(question))
    prompt = [{"role": "user", "content": asked_of(request)["question"].replace("<image>\n", "")}]
    return {"prompt": prompt, "images": list(request.images), "known": json.dumps(to_record(question))}


def reward(completions, known, **_):  # 1 for a right answer in the format that the prompt asks for, otherwise 0
    judged = [judge(said[0]["content"], Question(**json.loads(one))) for said, one in zip(completions, known, strict=True)]
    return [float(one.verdict == "correct") for one in judged]


run, path, output, *words = sys.argv[1:] if len(sys.argv) >= 4 else sys.exit(__doc__)
settings = {name: json.loads(value) for name, _, value in (word.partition("=") for word in words)}
args, loaded = GRPOConfig(output, importance_sampling_level="sequence", report_to="none", **settings), load_model(run)
data = Dataset.from_list([row(question) for question in load_questions(path)]).cast_column("images", List(Image()))
trainer = GRPOTrainer(loaded.model, reward, args=args, train_dataset=data, processing_class=loaded.processor)
trainer.train()
trainer.save_model()
