# %% [markdown]
# # Is the new model better? By how much, and how sure is that?
#
# A model answers 83 % of 180 questions, another one 86 %. Is the second one better, or lucky? This notebook
# compares two models on the same questions, with intervals, a paired test, curves of votes over many samples, and
# the answers that changed.
#
# You will see what `mpo evaluate` computes, step by step, on real photographs and two models that are small
# enough to train here in a minute.
#
# To run it yourself: `pip install '.[notebooks]'` in a clone of the repository, and Jupyter or VS Code.

# %%
import json
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from PIL import Image
from scipy.stats import binom
from skimage import data
from transformers.utils.notebook import NotebookProgressCallback

from mpo import MPOConfig, MPOTrainer
from mpo.data import load_preferences, load_questions
from mpo.demo.stages import train_on_examples
from mpo.evaluation.page import changes_plot, curves_plot, scores_plot
from mpo.evaluation.run import DIRECT, evaluate
from mpo.evaluation.statistics import smallest_difference
from mpo.generation.open import open_local
from mpo.models.small import small_internvl, small_processor

plt.rcParams |= {"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
folder = Path("compare-notebook").absolute()
folder.mkdir(exist_ok=True)

# %% [markdown]
# ## Questions
#
# Parts of six photographs of scikit-image; the question is always what it is. A line of `questions.jsonl` is
# `{"image": "0.png", "question": "...", "answer": "cat"}`. The files `mpo.data` reads, published benchmarks among
# them, have that or a similar form.

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


lines = [{"image": cut(NAMES[n % 6], folder / f"{n}.png"), "question": QUESTION, "answer": NAMES[n % 6]} for n in range(180)]
(folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
questions = list(load_questions(folder / "questions.jsonl"))

# %% [markdown]
# ## How many questions are enough?
#
# *Before* anything is asked: which difference would so many questions show, four times out of five? With 180, a
# difference below 9 points is likely to stay unseen; for 2 points one needs thousands.

# %%
counts = np.geomspace(30, 10_000, 50)
figure, axes = plt.subplots(figsize=(6, 3))
for changed, style in ((0.1, ":"), (0.2, "-"), (0.4, "--")):
    least = [100 * smallest_difference(int(count), changed=changed) for count in counts]
    axes.loglog(counts, least, style, color="#2563a8", label=f"{changed:.0%} of the verdicts change")
axes.axvline(len(questions), color="#c2571a", lw=1)
axes.set(xlabel="questions", ylabel="points", title="smallest difference that is likely to show")
axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
axes.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## Two models
#
# The first learns from 200 worked examples (supervised, with TRL's trainer). The second goes on from there with
# MPO, on pairs of a right and a wrong answer.

# %%
asked = f"{QUESTION}\n{DIRECT['']}"  # as mpo evaluate asks in its mode "direct"
processor = small_processor([asked, *NAMES], image_size=64, patch_size=16, max_patches=1)
start = small_internvl(processor, layer_scale_init_value=1.0)
examples = [{"image": cut(NAMES[n % 6], folder / f"example-{n}.png"), "question": asked, "text": NAMES[n % 6]} for n in range(200)]
settings = {"max_steps": 64, "per_device_train_batch_size": 32, "learning_rate": 3e-3, "disable_tqdm": True}
taught = train_on_examples(start, processor, examples, folder / "start", **settings)

# %%
with open(folder / "pairs.jsonl", "w") as file:
    for example in examples:
        wrong = random.choice([name for name in NAMES if name != example["text"]])
        line = {"image": Path(example["image"]).name, "question": asked, "chosen": example["text"], "rejected": str(wrong)}
        file.write(json.dumps(line) + "\n")
trainer = MPOTrainer(
    model=str(folder / "start"),
    args=MPOConfig(
        str(folder / "mpo"), per_device_train_batch_size=32, learning_rate=1e-3, max_steps=16, save_strategy="no", report_to="none"
    ),
    train_dataset=load_preferences(folder / "pairs.jsonl"),
)
trainer.remove_callback(NotebookProgressCallback)
trainer.train()
trainer.save_model()

# %% [markdown]
# ## Ask both
#
# Each question once greedily and eight times at temperature 1. A model may also be a name on the Hub, or the
# address of a server; what was answered is kept in the folder, so that a second call asks nothing again.

# %%
results = evaluate(
    {"start": partial(open_local, str(folder / "start")), "mpo": partial(open_local, str(folder / "mpo"))},
    {"photographs": questions},
    folder / "results",
    k=8,
    max_new_tokens=8,
    progress=False,
)
display(scores_plot(results), changes_plot(results))

# %% [markdown]
# The upper plot has the score of each model, with its interval. The lower one has the *difference*, which is what
# we want to know: where its interval excludes 0 there is evidence. Two intervals that overlap above prove
# nothing, as both models were asked the same questions, which the lower plot takes into account.
#
# ## McNemar's test: only the changes count
#
# Questions that both models get right, or both wrong, say nothing about which is better. Of those that changed,
# how many were gained? If both were equally good, each change would be a toss of a coin: that is the curve. The
# p-value is the chance of a result at least as far from the middle.

# %%
row = next(one for one in results["comparisons"] if one["figure"] == "greedy")
gained, lost = row["gained"], row["lost"]
figure, axes = plt.subplots(figsize=(6, 3))
tosses = np.arange(gained + lost + 1)
axes.bar(tosses, binom.pmf(tosses, gained + lost, 0.5), color="#9aa5b1", width=0.8, label="if both were equally good")
axes.axvline(gained, color="#c2571a", lw=2, label=f"{gained} gained, {lost} lost")
axes.set(xlabel="questions gained, of those that changed", ylabel="probability", title=f"p = {row['p_value']:.2g}")
axes.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# In the run shown here the second model is ahead by three points, and a coin does as well in one of nine cases:
# too few questions to say that its greedy answers are better. The first plot had said so.
#
# ## Many samples: votes, and what would be possible
#
# *majority@k*: the most frequent of k answers. *pass@k*: whether any of k is right. A gap between the two says
# that the model often knows the answer without preferring it, which is what training on preferences can change.

# %%
curves_plot(results)

# %% [markdown]
# ## What changed
#
# The numbers come from answers; look at them. Upper row: gained. Lower row: lost.

# %%
answers = [json.loads(line) for line in (folder / "results" / "answers.jsonl").read_text().splitlines()]
of = {model: {one["id"]: one["greedy"][0] for one in answers if one["model"] == model} for model in ("start", "mpo")}
figure, places = plt.subplots(2, 6, figsize=(10, 4))
for axes in places.flat:
    axes.axis("off")
for line, better in zip(places, (1, -1), strict=True):
    changed = [q for q in questions if of["mpo"][q.id]["score"] - of["start"][q.id]["score"] == better]
    for axes, question in zip(line, changed, strict=False):
        axes.imshow(Image.open(question.images[0]))
        texts = [of[model][question.id]["text"] for model in ("start", "mpo")]
        axes.set_title(f"start: {texts[0]}\nmpo: {texts[1]}", color="#1f7a4d" if better == 1 else "#b3261e", fontsize=9)
plt.show()

# %% [markdown]
# ## Next
#
# * From the command line:
#   `mpo evaluate start=compare-notebook/start mpo=compare-notebook/mpo compare-notebook/questions.jsonl --n 8 --output results`.
# * Several parts of one photograph are not independent questions. Here each part is an image of its own; where
#   questions share an image, intervals and tests count images.
# * The second model has also trained for longer. Whether MPO was the reason, a control tells that goes on with
#   SFT for as many steps (`loss=sft`); `make demo` has one.
# * This is one training run with one seed: the interval covers other *questions*, not other *runs*.
