# %% [markdown]
# # From questions to pairs, with a server
#
# You have questions with known answers, and no pairs. Let the model itself answer each question many times, check
# the answers, and pair right responses with wrong ones: that is how the data of the MPO paper were made, and it
# teaches a model about its *own* mistakes.
#
# You will see: a server that answers; responses with their verdicts beside the image; the whole set made by one
# call that goes on after any interruption; and the pairs that come out.
#
# The server is `transformers serve` with a small model that is trained here for a few seconds. For a real one,
# set `ADDRESS` to that of vLLM, LMDeploy, SGLang or a paid API.
#
# To run it yourself: `pip install '.[notebooks]'` in a clone of the repository, and Jupyter or VS Code.

# %%
import json
from contextlib import ExitStack
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from skimage import data

from mpo.data import load_preferences, load_questions
from mpo.data.eval_part import content_text
from mpo.demo.stages import train_on_examples
from mpo.evaluation.harness import served
from mpo.generation.server import ServerGenerator
from mpo.models.small import small_internvl, small_processor
from mpo.pipelines.mmpr.config import read_config
from mpo.pipelines.mmpr.make import make
from mpo.pipelines.mmpr.sample import Sample
from mpo.pipelines.mmpr.verify import Verify

plt.rcParams |= {"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
GREEN, RED, GREY = "#1f7a4d", "#b3261e", "#9aa5b1"
COLOURS = {"correct": GREEN, "wrong_answer": RED, "wrong_format": GREY}
folder = Path("pairs-notebook").absolute()
folder.mkdir(exist_ok=True)

# %% [markdown]
# ## A questions file
#
# One line for each question: `{"image": "0.png", "question": "What is in the photograph?", "answer": "cat"}`. The
# images are parts of six photographs of scikit-image.

# %%
PHOTOGRAPHS = {
    name: getattr(data, where)()
    for name, where in {
        "cat": "chelsea",
        "coffee": "coffee",
        "rocket": "rocket",
        "astronaut": "astronaut",
        "eye": "retina",
        "galaxies": "hubble_deep_field",
    }.items()
}
NAMES, QUESTION = [*PHOTOGRAPHS], "What is in the photograph?"
random = np.random.default_rng(0)


def cut(name, path):
    """A random part of a photograph, 64 by 64 pixels, as a file."""
    photograph = Image.fromarray(PHOTOGRAPHS[name])
    side = min(photograph.size) // 2
    left, top = random.integers(0, photograph.width - side), random.integers(0, photograph.height - side)
    photograph.crop((left, top, left + side, top + side)).resize((64, 64)).save(path)
    return str(path)


with open(folder / "questions.jsonl", "w") as file:
    for number in range(24):
        name = NAMES[number % 6]
        cut(name, folder / f"{number}.png")
        file.write(json.dumps({"image": f"{number}.png", "question": QUESTION, "answer": name}) + "\n")

# %% [markdown]
# ## A model that is sometimes right
#
# It has seen 200 worked examples, for 100 steps: enough to answer in the right form, which is some reasoning and a
# last line with the answer; too little to be right always. Pairs come from questions that a model answers
# *sometimes* rightly.

# %%
texts = [f"I look at the colours.\nI look at the shapes.\nFinal answer: {name}" for name in NAMES]
processor = small_processor([QUESTION, *texts], image_size=64, patch_size=16, max_patches=1)
model = small_internvl(processor, layer_scale_init_value=1.0)
examples = [
    {"image": cut(NAMES[n % 6], folder / f"example-{n}.png"), "question": QUESTION, "text": texts[n % 6]} for n in range(200)
]
settings = {"max_steps": 100, "per_device_train_batch_size": 32, "learning_rate": 3e-3, "disable_tqdm": True}
taught = train_on_examples(model, processor, examples, folder / "model", **settings)

# %% [markdown]
# ## A server
#
# In a terminal you would run `transformers serve /absolute/path/of/the/model`, or `vllm serve` on a GPU. Here the
# notebook starts it, and ends it in its last cell.

# %%
closing = ExitStack()
ADDRESS, _ = closing.enter_context(served(str(folder / "model"), "cpu", folder / "server.log"))  # or "http://localhost:8000/v1"
generator = ServerGenerator(ADDRESS, concurrency=2)

# %% [markdown]
# ## Three questions, step by step
#
# `Sample` asks, `Verify` judges. Each is a function from records to records, so that you can look before you pay
# for thousands. Green responses are right, red ones wrong, and grey ones have no last line with an answer.
# `mpo.pipelines.mmpr.pair.Pair` would now pair each green one with each red one.

# %%
questions = list(load_questions(folder / "questions.jsonl", limit=3))
judged = Verify(format="line")(Sample(generator, prompt="plain", n=6, temperature=0.8, max_new_tokens=32)(questions))

figure, places = plt.subplots(3, 2, figsize=(9, 5.4), width_ratios=[1, 4])
for (left, right), record in zip(places, judged, strict=True):
    left.imshow(Image.open(record["images"][0]))
    left.set_title(f"answer: {record['ground_truths'][0]}", fontsize=9)
    for place, response in enumerate(record["responses"]):
        text = response["text"].replace("\n", " | ")
        right.text(0, 0.9 - place / 6, text[:90], color=COLOURS[response["verdict"]], fontsize=9, family="monospace")
    left.axis("off")
    right.axis("off")
plt.show()

# %% [markdown]
# ## All of them
#
# One call, or `mpo mmpr make mmpr.yaml --output mmpr`. `until` asks again where all responses were right, or all
# wrong. Every response is kept in a ledger: run the cell again, or after a crash, and nothing is asked twice.

# %%
(folder / "mmpr.yaml").write_text(f"""
sources: [{{path: questions.jsonl, name: photographs}}]
models: [{{model: "{ADDRESS}", name: small, concurrency: 2}}]
sample: {{prompt: plain, n: 4, temperature: 0.8, max_new_tokens: 32, until: {{limit: 8}}}}
verify: {{format: line}}
pair: {{max_pairs: 4}}
""")
report = make(read_config(folder / "mmpr.yaml"), folder / "mmpr")

# %% [markdown]
# The report is also a page, `mmpr/report.html`. Left: the verdicts on all responses. Right: the questions that have
# pairs, which are those that were answered both rightly and wrongly.

# %%
source = report["sources"][0]
kinds = source["responses by kind"]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
bars = left.bar([kind.replace("_", " ") for kind in kinds], [*kinds.values()], color=[COLOURS[kind] for kind in kinds])
left.bar_label(bars)
left.set(title=f"{source['responses']} responses to {source['questions']} questions", ylabel="responses")
counts = {"with pairs": source["with pairs"], "without": source["without pairs"]}
right.pie([*counts.values()], labels=[f"{name}: {count}" for name, count in counts.items()], colors=[GREEN, GREY], startangle=90)
right.set_title(f"{report['pairs']} pairs")
plt.show()

# %% [markdown]
# ## The pairs
#
# They are in MMPR's form, which `mpo train` and `load_preferences` read.

# %%
made = load_preferences(folder / "mmpr" / "meta.json")
shown = made.select(range(0, len(made), max(1, len(made) // 4))).select(range(min(4, len(made))))
figure, places = plt.subplots(len(shown), 2, figsize=(8, 1.6 * len(shown)), width_ratios=[1, 4], squeeze=False)
for (left, right), record in zip(places, shown, strict=True):
    left.imshow(record["images"][0])
    right.text(
        0, 0.7, content_text(record["chosen"][0]["content"]).replace("\n", " | "), color=GREEN, family="monospace", fontsize=9
    )
    right.text(
        0, 0.3, content_text(record["rejected"][0]["content"]).replace("\n", " | "), color=RED, family="monospace", fontsize=9
    )
    left.axis("off")
    right.axis("off")
plt.show()

# %%
closing.close()  # ends the server

# %% [markdown]
# ## Next
#
# * Train on them:
# `mpo train data=mmpr data.meta=pairs-notebook/mmpr/meta.json model.name_or_path=pairs-notebook/model trainer.global_batch_size=8`
#   or [2_train.ipynb](2_train.ipynb).
# * Questions without a known answer have a route of their own (`mpo mmpr continue`), and reading pairs before
#   training is [3_data.ipynb](3_data.ipynb).
