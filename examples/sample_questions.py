"""Sample responses to questions from a server, as a job that goes on where it was interrupted.

    python examples/sample_questions.py http://localhost:8000/v1 QUESTIONS.jsonl FOLDER

A line of QUESTIONS.jsonl: {"image": "a.png", "question": "...", "answer": "..."}
"""

import sys

from mpo.data import load_questions
from mpo.generation.server import ServerGenerator
from mpo.pipelines.job import Job
from mpo.pipelines.report import summarize
from mpo.pipelines.sample import Sample

url, path, folder = sys.argv[1:] if len(sys.argv) == 4 else sys.exit(__doc__)
questions, sample = load_questions(path), Sample(ServerGenerator(url), n=4, max_new_tokens=256)
print(sample(load_questions(path, limit=2))[0]["responses"])  # on a few questions, in memory
print(summarize(Job([sample], questions, folder).run()))
