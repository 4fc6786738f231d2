# %% [markdown]
# # Where MMFuser looks
#
# A vision-language model reads the last layers of its vision tower, which know *what* is in an image, and have
# forgotten much of *how it looks*. MMFuser ([arXiv 2410.11829](https://arxiv.org/abs/2410.11829)) gives them back
# the details of earlier layers: each patch asks a few places of the shallow layers, by deformable attention, and
# adds what it finds.
#
# You will see: the places that a patch asks, before and after a short training; which layers it listens to; and
# how much it adds, where in the image.
#
# The model is small and built here; the functions are the same for InternVL and LLaVA-1.5 of any size.
#
# To run it yourself: `pip install '.[notebooks]'` in a clone of the repository, and Jupyter or VS Code.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from skimage import data
from transformers.utils.notebook import NotebookProgressCallback

from mpo import MPOConfig, MPOTrainer
from mpo.data import load_preferences
from mpo.models import add_fuser
from mpo.models.looking import look, show, tile_of
from mpo.models.small import small_internvl, small_processor
from mpo.training.curves import LiveCurves

plt.rcParams |= {"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
folder = Path("mmfuser-notebook")
folder.mkdir(exist_ok=True)

# %% [markdown]
# ## Add a fuser to a model
#
# `add_fuser` takes an InternVL or LLaVA and gives one whose projector reads several layers. Nothing changes until
# it is trained: the new part starts with a factor of 0.

# %%
PHOTOGRAPHS = {"cat": data.chelsea(), "coffee": data.coffee(), "rocket": data.rocket(), "astronaut": data.astronaut()}
NAMES, QUESTION = [*PHOTOGRAPHS], "What is in the photograph?"
responses = [f"It shows the {name}." for name in NAMES]

processor = small_processor([QUESTION, *responses], image_size=96, patch_size=12, max_patches=1)
model = small_internvl(processor, vision_layers=6, layer_scale_init_value=1.0)
cat = Image.fromarray(PHOTOGRAPHS["cat"])
inputs = processor(text="<IMG_CONTEXT>\n" + QUESTION, images=cat, return_tensors="pt")
with torch.no_grad():
    before = model(**inputs).logits

model = add_fuser(model, layers=3, num_heads=4)
with torch.no_grad():
    after = model(**inputs).logits
figure, axes = plt.subplots(figsize=(3.2, 3))
axes.plot(before.flatten(), after.flatten(), ",", color="#2563a8")
axes.set(xlabel="logits without the fuser", ylabel="logits with it", title="the same, so far", aspect="equal")
plt.show()

# %% [markdown]
# ## Where it looks before training
#
# One panel for each shallow layer. A cross is a patch that asks; dots of its colour are the places it asks,
# larger for more weight. As in Deformable-DETR, each of the four heads begins in one direction, and looks one to
# four patches away. Below: the share of every layer, and what is added (nothing yet).

# %%
show(model, cat, processor, points=[(0.3, 0.3), (0.7, 0.6)])

# %% [markdown]
# ## A short training
#
# Parts of four photographs, a right and a wrong description for each: 50 steps of MPO, with a learning rate of
# its own for the fuser.

# %%
random = np.random.default_rng(0)
with open(folder / "pairs.jsonl", "w") as file:
    for number in range(240):
        right = NAMES[number % 4]
        photograph = Image.fromarray(PHOTOGRAPHS[right])
        side = min(photograph.size) // 2
        left, top = random.integers(0, photograph.width - side), random.integers(0, photograph.height - side)
        photograph.crop((left, top, left + side, top + side)).resize((96, 96)).save(folder / f"{number}.png")
        wrong = random.choice([name for name in NAMES if name != right])
        line = {
            "image": f"{number}.png",
            "question": QUESTION,
            "chosen": f"It shows the {right}.",
            "rejected": f"It shows the {wrong}.",
        }
        file.write(json.dumps(line) + "\n")

looked = {"before": {name: look(model, tile_of(image, processor)[0]) for name, image in PHOTOGRAPHS.items()}}
args = MPOConfig(
    str(folder / "run"),
    per_device_train_batch_size=16,
    learning_rate=2e-3,  # for a model this small
    fuser_learning_rate=4e-3,
    max_steps=50,
    logging_steps=2,
    save_strategy="no",
    report_to="none",
)
trainer = MPOTrainer(
    model=model,
    args=args,
    train_dataset=load_preferences(folder / "pairs.jsonl"),
    processing_class=processor,
    callbacks=[LiveCurves()],
)
trainer.remove_callback(NotebookProgressCallback)
result = trainer.train()

# %% [markdown]
# ## Where it looks now
#
# The places have moved, and they differ from patch to patch: what a patch asks depends on what it has seen
# itself. Some are outside of the image; there a head finds nothing, which is a way to say nothing.

# %%
model = trainer.model.eval()
show(model, cat, processor, points=[(0.3, 0.3), (0.7, 0.6)])

# %% [markdown]
# ## What it adds, and where
#
# Over each photograph, how strong the addition is at each patch, relative to the patch's own feature.

# %%
figure, places = plt.subplots(2, 4, figsize=(10, 5))
for (over, under), (name, pixels) in zip(places.T, PHOTOGRAPHS.items(), strict=True):
    tile, visible = tile_of(pixels, processor)
    looks = look(model, tile)
    over.imshow(visible)
    over.set_title(name)
    drawn = under.imshow(looks.added / looks.query, cmap="magma", vmin=0)
    figure.colorbar(drawn, ax=under, shrink=0.8)
    over.axis("off")
    under.axis("off")
plt.show()

# %% [markdown]
# ## Which layers it listens to
#
# The mean attention over all patches and heads, for each photograph. At the start all layers had an equal share
# (the dashed line).

# %%
looked["after"] = {name: look(model, tile_of(image, processor)[0]) for name, image in PHOTOGRAPHS.items()}
layers = looked["after"]["cat"].layers
figure, axes = plt.subplots(figsize=(6, 3))
for place, (name, looks) in enumerate(looked["after"].items()):
    axes.bar(np.arange(3) + 0.2 * place - 0.3, looks.attention, 0.18, label=name)
axes.axhline(looked["before"]["cat"].attention.mean(), ls="--", color="#52606d", lw=0.8)
axes.set(xticks=range(3), xticklabels=[f"hidden state {layer}" for layer in layers], ylabel="share of attention")
axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.2))
plt.show()

# %% [markdown]
# ## Next
#
# * For a trained model of yours: `mpo inspect fuser RUN a.png --output looks` draws the same from the command
#   line.
# * `trainer.save_model()` saves model and fuser together; `mpo.models.fused` registers the classes, so that
#   `from_pretrained` loads them.
# * Fifty steps on four photographs show how it works, not that it helps. Compare models as in
#   [5_compare.ipynb](5_compare.ipynb).
