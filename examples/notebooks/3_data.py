# %% [markdown]
# # Look at your data
#
# The most useful hour before a training run is spent on looking at its pairs. This notebook reads preference data
# in three formats, shows the pairs with their images and what differs, plots lengths and tiles, and finds what is
# broken or there twice.
#
# It needs no model: a processor is enough to count tokens and tiles. Put the path of your own file into
# `load_preferences`, and skip the cells that make data.
#
# To run it yourself: `pip install '.[notebooks]'` in a clone of the repository, and Jupyter or VS Code.

# %%
import difflib
import json
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from PIL import Image
from skimage import data

from mpo.curation.dedupe import find_duplicates, without
from mpo.curation.show import png_url
from mpo.curation.stats import compute_stats, stats_data, stats_figures
from mpo.curation.validate import validate
from mpo.data import load_preferences
from mpo.data.eval_part import content_text
from mpo.models.looking import tile_of
from mpo.models.small import small_processor

plt.rcParams |= {"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
folder = Path("data-notebook")
folder.mkdir(exist_ok=True)

# %% [markdown]
# ## Three files, three formats
#
# Photographs of scikit-image with descriptions, written for this notebook. The first file has the plain fields
# `image`, `question`, `chosen`, `rejected`; the second one messages, as TRL; the third the fields of ms-swift.

# %%
PHOTOGRAPHS = {"cat": data.chelsea(), "coffee": data.coffee(), "rocket": data.rocket(), "astronaut": data.astronaut()}
for name, pixels in PHOTOGRAPHS.items():
    Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=85)


def write(name, lines):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


plain = [
    ("cat", "What animal is this?", "A ginger cat with green eyes.", "A ginger dog with green eyes."),
    ("cat", "Describe the eyes.", "They are green, with narrow pupils.", "They are blue, with narrow pupils."),
    ("coffee", "What is on the saucer?", "A cup of coffee and a spoon.", "A cup of tea, a spoon and a slice of lemon."),
    ("coffee", "What is the table made of?", "Of wood, with a visible grain.", "Of glass."),
]
write("plain.jsonl", [{"image": f"{n}.jpg", "question": q, "chosen": c, "rejected": r} for n, q, c, r in plain])

# %%
messages = [
    (
        "rocket",
        "What is happening?",
        "A rocket stands on its pad at night, lit by lamps.",
        "A rocket takes off in bright sunshine.",
    ),
    ("rocket", "Is it day or night?", "It is night: the sky is dark.", "It is day, as the rocket is well lit."),
    ("astronaut", "What does she wear?", "An orange space suit with patches.", "An orange space suit and a helmet."),
]
write(
    "messages.jsonl",
    [
        {
            "images": [f"{name}.jpg"],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": chosen}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": rejected}]}],
        }
        for name, question, chosen, rejected in messages
    ],
)

# %%
random = np.random.default_rng(0)
swift = []
for number in range(240):
    name, other = random.choice([*PHOTOGRAPHS], 2, replace=False)
    width, height = random.integers(60, 260, 2).tolist()
    left, top = random.integers(0, 30, 2).tolist()
    Image.fromarray(PHOTOGRAPHS[name][top : top + height, left : left + width]).save(folder / f"part-{number}.jpg")
    because = ", as its colours show" * int(random.integers(0, 3))
    swift.append(
        {
            "images": [f"part-{number}.jpg"],
            "messages": [
                {"role": "user", "content": "<image>Which photograph was this cut out of?"},
                {"role": "assistant", "content": f"It is a part of the photograph of the {name}{because}."},
            ],
            "rejected_response": f"It is a part of the photograph of the {other}, or of one that looks like it.",
        }
    )
write("swift.jsonl", swift)

# %% [markdown]
# ## Reading them
#
# The format is detected; a line that would be misread is refused by its number. A *mixture* names several files,
# each with its share. All records have the same columns afterwards.

# %%
(folder / "mixture.yaml").write_text("sources: [{path: plain.jsonl}, {path: messages.jsonl}, {path: swift.jsonl}]\n")
pairs = load_preferences(folder / "mixture.yaml")
pairs

# %% [markdown]
# ## The pairs
#
# What the rejected completion has instead of the chosen one is struck out in red; what only the chosen one has is
# green.


# %%
def marked(chosen, rejected):
    """Both texts in one, word by word."""
    old, new = rejected.split(), chosen.split()
    parts = []
    for kind, a, b, c, d in difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes():
        gone, come = escape(" ".join(old[a:b])), escape(" ".join(new[c:d]))
        parts.append(gone if kind == "equal" else "")
        parts.append(f'<del style="color:#b3261e">{gone}</del>' if kind != "equal" and gone else "")
        parts.append(f'<ins style="color:#1f7a4d">{come}</ins>' if kind != "equal" and come else "")
    return " ".join(filter(None, parts))


def show_pairs(pairs):
    rows = ""
    for record in pairs:
        image = record["images"][0].convert("RGB")
        image.thumbnail((150, 110))
        question, *texts = (content_text(record[side][-1]["content"]) for side in ("prompt", "chosen", "rejected"))
        rows += f'<tr><td><img src="{png_url(image.quantize(64).save)}"></td><td style="text-align:left">'
        rows += f"<b>{escape(question.replace('<image>', ''))}</b><br>{marked(*texts)}</td></tr>"
    display(HTML(f"<table>{rows}</table>"))


show_pairs(pairs.select([0, 2, 4, 6]))

# %% [markdown]
# To go through many, and to correct them: `mpo review data-notebook/mixture.yaml` opens a page in the browser
# with the images, keys for next and previous, and a log of every correction. `mpo data show` writes the first
# ones as a page.
#
# ## Lengths, overlap, tiles
#
# The second plot is the one to look at: where chosen completions are longer than rejected ones throughout, a
# model learns to write longer texts. The third: pairs that share most words teach a detail, pairs that share none
# teach a style.

# %%
texts = [line["messages"][1]["content"] for line in swift]
processor = small_processor(texts, image_size=64, patch_size=16, max_patches=6)  # or AutoProcessor.from_pretrained(your model)
stats = compute_stats(pairs, processor)
for title, figure in stats_figures(stats).items():
    figure.suptitle(title, fontsize=10)
    display(figure)

# %% [markdown]
# By source: in `swift`, which was made by a rule, the chosen completion is never the longer one. A model could
# learn that short is good, without a look at the image.

# %%
sources = stats_data(stats)["sources"]
figure, axes = plt.subplots(figsize=(6, 2.2))
bars = axes.barh([one["source"] for one in sources], [100 * one["chosen longer"] for one in sources], color="#2563a8")
axes.bar_label(bars, fmt="%.0f %%", padding=3)
axes.axvline(50, color="#9aa5b1", lw=0.8)
axes.set(xlabel="pairs whose chosen completion is longer, in percent", xlim=(0, 110))
plt.show()

# %% [markdown]
# ## What the model sees
#
# InternVL cuts an image into square tiles and adds a small view of the whole. Few tiles lose details; many cost
# tokens.

# %%
image = Image.fromarray(PHOTOGRAPHS["rocket"])
count = processor.image_processor(images=image, return_tensors="pt")["pixel_values"].flatten(0, -4).shape[0]
figure, places = plt.subplots(1, count + 1, figsize=(10, 1.9), width_ratios=[1.5] + [1] * count)
for number, axes in enumerate(places):
    axes.imshow(image if number == 0 else tile_of(image, processor, number - 1)[1])
    axes.set_title("the image" if number == 0 else "all of it" if number == count else f"tile {number}", fontsize=9)
    axes.axis("off")
plt.show()

# %% [markdown]
# ## What is wrong with it
#
# A copy of the first file with typical damage: an image that is missing, a pair without a difference, a refusal
# as the chosen completion, the same pair twice. `validate` reads everything and lists every finding with its
# line; red ones prevent training.

# %%
good = [json.loads(line) for line in (folder / "plain.jsonl").read_text().splitlines()]
write(
    "damaged.jsonl",
    [
        *good,
        {**good[0], "image": "dog.jpg"},
        {**good[1], "rejected": good[1]["chosen"]},
        {**good[2], "chosen": "I'm sorry, but I cannot see the image."},
        good[3],
    ],
)
report = validate(folder / "damaged.jsonl", processor=processor, output=folder / "findings.jsonl")
found = [json.loads(line) for line in (folder / "findings.jsonl").read_text().splitlines()]

figure, axes = plt.subplots(figsize=(10, 2.2))
for place, one in enumerate(found):
    colour = "#b3261e" if one["problem"] else "#52606d"
    where, reason = Path(one["where"]).name, one["reason"].replace(str(folder.absolute()), "...")
    axes.text(0, -place, f"{where}   {one['finding']}: {reason:.95}", color=colour, family="monospace", fontsize=9)
axes.set(ylim=(-len(found), 1), xlim=(0, 1), title="Training may start." if report.may_start else "Training may not start.")
axes.axis("off")
plt.show()

# %% [markdown]
# ## What is there twice
#
# Near duplicates too: texts in other letters, images that were compressed again. Here 8 pairs are added a second
# time, as worse JPEG files and with capital letters.

# %%
again = []
for number in range(8):
    Image.open(folder / f"part-{number}.jpg").save(folder / f"again-{number}.jpg", quality=60)
    user, assistant = swift[number]["messages"]
    shouted = [user, {**assistant, "content": assistant["content"].upper()}]
    again.append({**swift[number], "images": [f"again-{number}.jpg"], "messages": shouted})
write("twice.jsonl", [*swift[:40], *again])
twice = load_preferences(folder / "twice.jsonl")
duplicates = find_duplicates(twice)

figure, places = plt.subplots(2, len(duplicates), figsize=(10, 2.8))
for column, one in zip(places.T, duplicates, strict=True):
    for axes, index in zip(column, (one.same_as, one.index), strict=True):
        axes.imshow(twice[index]["images"][0])
        axes.set_title(f"record {index}", fontsize=8)
        axes.axis("off")
figure.suptitle(f"{len(duplicates)} duplicates; {len(without(twice, duplicates))} of {len(twice)} pairs remain", fontsize=10)
plt.show()

# %% [markdown]
# ## Next
#
# * The same on the command line: `mpo data validate`, `stats`, `show`, `dedupe`, `filter`, `mix`, `split`,
#   `convert`.
# * No pairs yet? Make them from a model's own responses: [4_pairs.ipynb](4_pairs.ipynb).
