# %% [markdown]
# # Export, and load in transformers
#
# Training with LoRA leaves a small adapter beside a large model. For serving you want one folder that
# transformers, vLLM and others load without knowing about either adapters or this library, and you want to be
# sure that it is the same model.
#
# You will see: a short LoRA training; `mpo export` in float32 and bfloat16; the folder loaded by transformers
# alone, its answers and logits compared; and the sizes of everything.
#
# To run it yourself: `pip install '.[notebooks]'` in a clone of the repository, and Jupyter or VS Code.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from skimage import data
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.notebook import NotebookProgressCallback

from mpo import MPOConfig, MPOTrainer
from mpo.data import load_preferences
from mpo.demo.stages import train_on_examples
from mpo.models.export.run import export
from mpo.models.small import small_internvl, small_processor
from mpo.training.curves import LiveCurves

plt.rcParams |= {"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False}
folder = Path("export-notebook")
folder.mkdir(exist_ok=True)

# %% [markdown]
# ## A base model
#
# It takes the place of a published one: a small InternVL that has learned for a few seconds what is in parts of
# six photographs.

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


processor = small_processor([QUESTION, "It shows the .", *NAMES], image_size=64, patch_size=16, max_patches=1)
base = small_internvl(processor, layer_scale_init_value=1.0, hidden_size=96, vision_hidden_size=96)
examples = [
    {"image": cut(NAMES[n % 6], folder / f"{n}.png"), "question": QUESTION, "text": f"It shows the {NAMES[n % 6]}."}
    for n in range(200)
]
settings = {"max_steps": 60, "per_device_train_batch_size": 32, "learning_rate": 3e-3, "disable_tqdm": True}
taught = train_on_examples(base, processor, examples, folder / "base", **settings)

# %% [markdown]
# ## LoRA
#
# Low-rank changes of the language model's weights, trained with MPO for 25 steps. `save_model` writes the adapter
# alone.

# %%
with open(folder / "pairs.jsonl", "w") as file:
    for example in examples:
        wrong = random.choice([name for name in NAMES if name not in example["text"]])
        line = {"image": Path(example["image"]).name, "question": QUESTION, "chosen": example["text"]}
        file.write(json.dumps({**line, "rejected": f"It shows the {wrong}."}) + "\n")
trainer = MPOTrainer(
    model=str(folder / "base"),
    args=MPOConfig(
        str(folder / "lora"),
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        max_steps=25,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=load_preferences(folder / "pairs.jsonl"),
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj|gate_proj|up_proj|down_proj)"),
    callbacks=[LiveCurves()],
)
trainer.remove_callback(NotebookProgressCallback)
trainer.train()
trainer.save_model()

# %% [markdown]
# ## Export
#
# In Python, or `mpo export export-notebook/lora export-notebook/float32`. The adapter is merged into the base,
# everything that belongs to a model is put beside it, and the folder is loaded and compared before it appears.
# The result says how far it is from the trained model.

# %%
exports = {dtype: export(folder / "lora", folder / dtype, dtype=dtype, progress=False) for dtype in ("float32", "bfloat16")}
figure, axes = plt.subplots(figsize=(6, 2.4))
checked = exports["bfloat16"].comparison
names = ["what the adapter changes", "rounding to bfloat16", "export in bfloat16", "export in float32"]
values = [checked.moved, checked.rounding, checked.difference, exports["float32"].comparison.difference]
bars = axes.barh(names, np.maximum(values, 1e-8), color=["#2563a8", "#9aa5b1", "#c2571a", "#c2571a"])
axes.bar_label(bars, [f"{value:.1e}" for value in values], padding=3)
axes.set(xscale="log", xlim=(1e-8, 10), xlabel="largest difference of logits, relative to the largest logit")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# ## Load it in transformers
#
# Two lines of transformers; nothing of `mpo` is involved. Below: what it answers about photographs it has not
# been trained on.

# %%
model = AutoModelForImageTextToText.from_pretrained(folder / "float32")
exported_processor = AutoProcessor.from_pretrained(folder / "float32")


def asked(path):
    """The question about an image, encoded by transformers."""
    content = [{"type": "image", "path": str(path)}, {"type": "text", "text": QUESTION}]
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return exported_processor.apply_chat_template([{"role": "user", "content": content}], **template)


figure, places = plt.subplots(1, 6, figsize=(10, 2))
for axes, name in zip(places, NAMES, strict=True):
    path = cut(name, folder / f"new-{name}.png")
    inputs = asked(path)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text = exported_processor.decode(tokens, skip_special_tokens=True)
    axes.imshow(Image.open(path))
    axes.set_title(text, color="#1f7a4d" if name in text else "#b3261e", fontsize=9)
    axes.axis("off")
plt.show()

# %% [markdown]
# ## The same model?
#
# The logits of the next token for a new image, against those of the trained model, whose base and adapter are
# still apart. In float32 they are equal to rounding. bfloat16 rounds more. The base, without the adapter, is
# another model.

# %%
inputs = asked(folder / "new-cat.png")
trained = trainer.model.eval()


@torch.no_grad()
def logits(model):
    return model(**inputs).logits[0, -1].float()


with trained.disable_adapter():
    of_base = logits(trained)
rounded = AutoModelForImageTextToText.from_pretrained(folder / "bfloat16", dtype="bfloat16")
reference = logits(trained)
others = {"base": of_base, "export, bfloat16": logits(rounded), "export, float32": logits(model)}
figure, axes = plt.subplots(figsize=(6, 3))
for (name, found), colour in zip(others.items(), ("#9aa5b1", "#c2571a", "#2563a8"), strict=True):
    axes.semilogy((found - reference).abs().clamp(min=1e-8).sort().values, color=colour, label=name)
axes.set(xlabel="tokens of the vocabulary, by difference", ylabel="difference of the logit", ylim=(1e-8, 10))
axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
assert torch.allclose(others["export, float32"], reference, atol=1e-3)
plt.show()

# %% [markdown]
# ## Sizes
#
# What has to be kept: the adapter for going on, one export for serving.

# %%
sizes = {
    name: sum(file.stat().st_size for file in (folder / name).glob("*.safetensors")) / 1e6
    for name in ("base", "lora", "float32", "bfloat16")
}
figure, axes = plt.subplots(figsize=(6, 2.2))
bars = axes.barh(["base", "adapter", "export, float32", "export, bfloat16"], [*sizes.values()], color="#2563a8")
axes.bar_label(bars, fmt="%.2f MB", padding=3)
axes.set(xlabel="weights in MB", xlim=(0, 1.25 * max(sizes.values())))
axes.invert_yaxis()
plt.show()

# %% [markdown]
# ## Next
#
# * `vllm serve export-notebook/bfloat16` serves the folder; for LMDeploy:
#   `mpo export export-notebook/lora out --output-format official`.
# * Is the exported model better than its base? [5_compare.ipynb](5_compare.ipynb).
