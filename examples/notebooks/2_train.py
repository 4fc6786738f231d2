# %% [markdown]
# # MPO on your own pairs, with live curves
#
# You have a JSONL file: a question about an image, a better and a worse completion on every line. This notebook
# trains a vision-language model on it with Mixed Preference Optimization and draws what happens *while* it
# happens.
#
# You will see: the pairs with their images; curves of loss, rewards and accuracy that grow during training; and
# what the model prefers afterwards, on images that it has not seen.
#
# It runs on a laptop's CPU in a minute: the images are parts of six photographs, the model is an InternVL of 0.3
# million parameters, built here. For a real run, change `MODEL`, `PAIRS` and `VALIDATION`.
#
# To run it yourself: `pip install '.[notebooks]'` in a clone of the repository, and Jupyter or VS Code.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from skimage import data
from transformers.utils.notebook import NotebookProgressCallback

from mpo import MPOConfig, MPOTrainer
from mpo.batching.logprobs import completion_logprobs
from mpo.data import load_preferences
from mpo.data.eval_part import content_text
from mpo.generation.generator import Request
from mpo.models.small import small_internvl, small_processor
from mpo.training.curves import LiveCurves

plt.rcParams |= {"figure.dpi": 80, "figure.constrained_layout.use": True}
folder = Path("train-notebook")
folder.mkdir(exist_ok=True)

# %% [markdown]
# ## The file
#
# A line of `pairs.jsonl` is as simple as this; paths of images are relative to the file:
#
# ```json
# {"image": "7.png", "question": "What is in the photograph?", "chosen": "It shows the cat.", "rejected": "It shows the coffee."}
# ```
#
# The images are cut out of six photographs of scikit-image, at random places; 300 are for training and 60 others
# for validation.

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


def cut(name):
    """A random part of a photograph, 64 by 64 pixels."""
    photograph = Image.fromarray(PHOTOGRAPHS[name])
    side = min(photograph.size) // 2
    left, top = random.integers(0, photograph.width - side), random.integers(0, photograph.height - side)
    return photograph.crop((left, top, left + side, top + side)).resize((64, 64))


def write_pairs(name, count):
    lines = []
    for number in range(count):
        right = NAMES[number % 6]
        wrong = random.choice([other for other in NAMES if other != right])
        cut(right).save(folder / f"{name}-{number}.png")
        line = {"image": f"{name}-{number}.png", "question": QUESTION}
        lines.append({**line, "chosen": f"It shows the {right}.", "rejected": f"It shows the {wrong}."})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


write_pairs("pairs", 300)
write_pairs("validation", 60)

# %%
PAIRS, VALIDATION = folder / "pairs.jsonl", folder / "validation.jsonl"  # or yours
train, validation = load_preferences(PAIRS), load_preferences(VALIDATION)

figure, places = plt.subplots(1, 6, figsize=(10, 2.3))
for axes, record in zip(places, train.select(range(6)), strict=True):
    axes.imshow(record["images"][0])
    axes.axis("off")
    axes.set_title(content_text(record["chosen"][0]["content"]), color="#1f7a4d", fontsize=9)
    axes.text(
        0.5,
        -0.16,
        content_text(record["rejected"][0]["content"]),
        color="#b3261e",
        fontsize=9,
        ha="center",
        transform=axes.transAxes,
    )
plt.show()

# %% [markdown]
# ## The model
#
# A small InternVL: the same classes as the published checkpoints, with its own small tokenizer and random
# weights. With a GPU, give the name of a published one instead and leave the processor out.

# %%
responses = [f"It shows the {name}." for name in NAMES]
processor = small_processor([QUESTION, *responses], image_size=64, patch_size=16, max_patches=1)
MODEL = small_internvl(processor, layer_scale_init_value=1.0)  # or "OpenGVLab/InternVL3-1B-Instruct"

# %% [markdown]
# ## Training
#
# `MPOTrainer` takes the arguments of TRL's `DPOTrainer`. `LiveCurves` is an ordinary callback: run the cell and
# watch. (It takes the place of transformers' table, which shows the loss alone.)
#
# * **loss** begins near 0.83 plus the SFT term, as long as model and reference are equal.
# * **terms**: preference (`sigmoid`), quality (`bco_pair`) and generation (`sft`), each unweighted.
# * **rewards**: how much more likely than at the start the chosen and the rejected completions have become. What
#   counts is the gap.
# * **pairs ranked rightly**: the fraction of pairs whose chosen completion has the higher reward; the curve
#   `eval_` is on the validation pairs.

# %%
trainer = MPOTrainer(
    model=MODEL,
    args=MPOConfig(
        str(folder / "run"),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=60,
        learning_rate=3e-3,  # for a model this small; published models take 5e-6
        max_steps=100,
        logging_steps=4,
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=train,
    eval_dataset=validation,
    processing_class=processor,
    callbacks=[LiveCurves()],
)
trainer.remove_callback(NotebookProgressCallback)
result = trainer.train()

# %% [markdown]
# ## What does it prefer now?
#
# For every validation image, the log-probability of each of the six possible responses. A row is a photograph, a
# column a response. Before training, all columns of a row were almost equal; a bright diagonal means that the
# model prefers what is in the image.

# %%
requests = [Request(record["prompt"], record["images"]) for record in validation]
logprobs = completion_logprobs(trainer.model, processor, requests, [responses] * len(requests))
table = np.array([[tokens.sum().item() for tokens in of_image] for of_image in logprobs])
truth = np.arange(60) % 6
means = np.array([table[truth == name].mean(0) for name in range(6)])

figure, axes = plt.subplots(figsize=(5.4, 3.8))
drawn = axes.imshow(means - means.max(1, keepdims=True), cmap="viridis", vmin=-5)
axes.set(xlabel="response", ylabel="photograph", yticks=range(6), yticklabels=NAMES)
axes.set_xticks(range(6), NAMES, rotation=30)
axes.set_title(f"the truth is the favourite for {(table.argmax(1) == truth).mean():.0%} of the images")
figure.colorbar(drawn, ax=axes, label="log-prob, relative to the row's largest")
plt.show()

# %% [markdown]
# The images where it is most mistaken, or least sure, with its favourite response:

# %%
others = np.where(np.eye(6, dtype=bool)[truth], -np.inf, table).max(1)
lead = table[np.arange(60), truth] - others
figure, places = plt.subplots(1, 6, figsize=(10, 2))
for axes, place in zip(places, lead.argsort()[:6], strict=True):
    axes.imshow(validation[int(place)]["images"][0])
    axes.set_title(responses[table[place].argmax()], color="#1f7a4d" if lead[place] > 0 else "#b3261e", fontsize=9)
    axes.axis("off")
plt.show()

# %% [markdown]
# ## Next
#
# * `trainer.save_model()` writes the model; [7_export.ipynb](7_export.ipynb) loads one in plain transformers.
# * On the command line: `mpo train experiment=internvl3_1b_lora data.path=pairs.jsonl`.
# * Look at your pairs before you train on them: [3_data.ipynb](3_data.ipynb).
