"""What the commands of the documents find when tests/test_docs_run.py runs them, and what is put in the place of which of them."""

import gzip
import json
import re
from pathlib import Path

import yaml
from datasets import Dataset
from official_llava import Parts
from PIL import Image
from small_clip import write_clip
from stub_server import stub_text
from support import TEXTS, make_image

from mpo.commands import main
from mpo.demo.data import make_dataset
from mpo.demo.folder import DemoFolder, DemoSettings
from mpo.models.small import small_internvl, small_processor

ROOT = Path(__file__).parents[1]

EXCEPTIONS = {
    r"git clone |vlmevalkit/|cd VLMEvalKit": "VLMEvalKit, and a clone of this repository, come from the network",
    r"vllm serve": "cannot be installed beside this torch; a stub server answers at its port",
}
"""How commands begin that are not run, and why."""

PARTIAL = {
    "sft": "model=llava1_5_vicuna7b method=mmfuser_stage1 data.path=captions.jsonl",
    "train": "experiment=internvl3_1b_lora data.path=pairs.jsonl",
}
"""What `...` stands for after `mpo sft` and `mpo train`."""

EXTRA = r"from importlib.metadata import metadata; assert '\1' in metadata('mpo-trainer').get_all('Provides-Extra')"
SUBSTITUTIONS = [
    (r"^make (\w+)$", rf"make --dry-run -C {ROOT} \1", "takes minutes; .ci/run does it, the demo a quick one"),
    (r"^source .venv/bin/activate", r"python -m venv --without-pip .venv && \g<0>", "make has made it"),
    (r"^pip install '(?:mpo-trainer|\.)\[(\w+)\]'", rf'python -c "{EXTRA}"', "whether there is the extra"),
    (r"\bmpo (train|sft) \.\.\.", lambda found: f"{found[0][:-3]}{PARTIAL[found[1]]}", "shown in part"),
    (r"^(.*launch.node_rank=.*|srun .*)launch=fsdp2(.*)$", r"\1launch=ddp\2", "shards over GPUs; the nodes are trained on"),
    (r"^(.*) launch=(fsdp2|zero3)\b", r"\g<0> dry_run=true", "shards over GPUs, and is refused without one"),
    (r"^(.*\bmpo (?:train|sft) .*)$", r"\1 trainer.max_steps=1 trainer.warmup_steps=0", "a step, with an effect"),
    (r"^(.*\bmpo (?:train|sft) .*)$", r"\1 trainer.global_batch_size=4", "there are eight pairs"),
    (r"^(?!.*per_device)(.*\bmpo (?:train|sft) .*)$", r"\1 trainer.per_device_train_batch_size=1", "also for four ranks"),
    (r"trainer.fp16=true", "", "float16 needs a GPU"),
    (r"master_addr=node0", "master_addr=localhost", "both nodes are processes here"),
    (r"^(srun .*|.* launch.node_rank=.*)$", r"\1 launch.master_port=FREE_PORT", "several tests run at once"),
    (r"^(mpo (?:generate|evaluate) (?!.*harness).*)$", r"\1 --max-new-tokens 8", "random models do not end by themselves"),
    (r"^(.* --harness lmms-eval .*)$", r"\1 --dry-run", "its environment is 720 MB of the network; this prints its commands"),
    (r"^(mpo mmpr make .*)LOG", r"\1verified/output.jsonl.review.jsonl", "the log that the page has begun"),
    (r"^(mpo mminstruct make .*)LOG", r"\1made/instructions.jsonl.review.jsonl", "a log of such instructions"),
    (r"--eval-size 500", "--eval-size 2", "there are eight pairs"),
    (r"^mpo convert (\S+) .*", r"\g<0> --tower \1/clip", "a tower that is smaller than the one of LLaVA-1.5"),
    (r"^cat mmpr.yaml", r"rm -rf mmpr && \g<0>", "each run of the page is one of its own"),
    (r"^cat mminstruct.yaml", r"rm -rf made && \g<0>", "each run of the page is one of its own"),
    (r"python (benchmarks/\S+ FOLDER)", rf"python {ROOT}/\1 --disagreements first", "leaves the repository's results alone"),
    (r"(?<=[ =])/(?:shared|absolute/path)\b", "$PWD", "no folder of this machine"),
]
"""Each in turn: pattern, replacement and why."""

REVIEWED = [
    "mpo mmpr sample http://localhost:8000/v1 questions.jsonl --output sampled --n 4",
    "mpo mmpr verify sampled --output verified",
    "mpo mminstruct make mminstruct.yaml --output made",
    "mpo review made/instructions.jsonl",
]
TRAINED = ["mpo train experiment=internvl3_1b_lora data.path=pairs.jsonl run_dir=runs/first"]
BEFORE = {
    "README": ["mpo data split pairs.jsonl train.jsonl val.jsonl --eval-size 500"],
    "review": REVIEWED,
    "serve": TRAINED,
    "evaluation": TRAINED,
    "servers": TRAINED,
}
"""Page -> commands of other pages that it follows."""

BACKGROUND = r"transformers serve|.* launch.node_rank=0"
"""A server, which the commands after it ask; the first of two nodes, which ends with the second."""

NO_COMMANDS = ["-log sigmoid(r_chosen", "beta (w_p + w_q)", "eval-00003 another number"]
"""How indented blocks begin that are a formula or an output."""

NAMES = {
    "model": ["base", "MODEL", "tiny", "warm", "runs/demo/warm", "runs/demo/mpo", "demo_modes/warm"]
    + [f"OpenGVLab/InternVL3-{size}-Instruct" for size in ("1B", "8B", "38B")],
    "clip": ["openai/clip-vit-base-patch32"],
}
"""Small model of the same family -> its names in the documents. A folder comes before what the Hub has under that name."""


def solved(body: dict, number: int) -> str:
    """The response of a stub server: the answer of `questions.jsonl`, every other time a wrong one; else words."""
    asked, words = re.findall(r"What is the sum\? \((\d+)\)", json.dumps(body)), stub_text(body, number)
    return f"{words.partition(' Final')[0]}\nSo:\nFinal answer: {int(asked[-1]) + number % 2}" if asked else words


def lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def prepare(folder: Path) -> None:
    """Write small models and data into a folder under the names that the documents use."""
    _models(folder)
    for number, name in enumerate(("a.png", "b.png", "c.png", "photo.jpg", "china.jpg")):
        make_image(number).save(folder / name)
    pair = {"chosen": "A cat.", "rejected": "A dog."}
    pairs = [pair | {"image": f"{'abc'[one % 3]}.png", "question": f"What is it? ({one})"} for one in range(8)]
    lines(folder / "pairs.jsonl", pairs)
    said = [{"from": "human", "value": "<image>What is it?"}]
    turns = {"conversations": said, "chosen": {"from": "gpt", "value": "A cat."}, "rejected": {"from": "gpt", "value": "A dog."}}
    (folder / "pairs.json").write_text(json.dumps([turns | {"images": ["a.png"]}] * 4))
    lines(folder / "MMPR-v1.2/annotations/some.jsonl", pairs)
    source = {"root": "..", "annotation": "annotations/some.jsonl", "data_augment": False, "repeat_time": 1, "length": 8}
    (folder / "MMPR-v1.2/meta.json").write_text(json.dumps({"some": source}))
    talk = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A cat."}]
    for name in ("captions.jsonl", "chats.jsonl"):
        lines(folder / name, [{"images": ["a.png"], "messages": talk}] * 4)
    _questions(folder)
    _pictures(folder)


def _models(folder: Path) -> None:
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    (folder / "clip").mkdir()
    write_clip(folder / "clip")
    for model, names in NAMES.items():
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to("../" * name.count("/") + model)
    for fused, name in ((False, "plain"), (True, "fused")):
        (folder / name).mkdir()
        Parts(folder / name, layers=24, fused=fused)
        (folder / name / "clip").rename(folder / name / "with" / "clip")
    (folder / "fused/with").rename(folder / "llava-mmfuser-7b")
    assert (
        main(
            [
                "convert",
                str(folder / "plain/with"),
                str(folder / "llava-hf/llava-1.5-7b-hf"),
                "--tower",
                str(folder / "plain/with/clip"),
            ]
        )
        == 0
    )


def _questions(folder: Path) -> None:
    asked = [{"image": "b.png", "question": f"What is the sum? ({one})", "answer": one} for one in range(4)]
    for name in ("questions.jsonl", "chartqa.jsonl", "digits.jsonl", "q.jsonl"):
        lines(folder / name, asked)
    lines(folder / "photos.jsonl", [{"image": "china.jpg", "question": f"Describe the photograph. ({one})"} for one in range(6)])
    row = {
        "pid": "1",
        "id": "1",
        "question": "What is the sum?",
        "answer": "5",
        "question_type": "free_form",
        "answer_type": "integer",
    }
    for name in ("AI4Math/MathVista/data/testmini", "LightChen2333/M3CoT/data/test"):
        path = folder / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        choices = {} if "Vista" in name else {"choices": ["5", "6"], "answer": "A"}
        Dataset.from_list([row | {"image": None, "decoded_image": make_image(3)} | choices]).to_parquet(path)
    lines(folder / "pope.jsonl", [{"question_id": 1, "image": "b.png", "text": "Is there a cat?", "label": "yes"}])
    demo = DemoFolder(folder / "runs/demo")
    make_dataset(demo, DemoSettings(worked_sources=50, question_sources=200, worked_examples=4, questions=4, eval_questions=8))
    assert demo.warm.is_dir() and demo.mpo.is_dir()
    lines(demo.pairs, [{"image": "data/eval/00000.png", "question": "What is it?", "chosen": "7", "rejected": "8"}] * 4)
    given = {"id": "1", "question": "2 + 3?", "choices": None, "unit": None, "ground_truth": "5", "answer_type": "integer"}
    (folder / "FOLDER").mkdir()
    with gzip.open(folder / "FOLDER/some.jsonl.gz", "wt") as file:
        file.write(
            "".join(json.dumps(given | {"id": str(one), "response": "It is 5.", "is_right": True}) + "\n" for one in range(9))
        )


def _pictures(folder: Path) -> None:
    """Images of two domains, and what `mpo mminstruct` expands."""
    for place in ("photos/landmark/0", "photos/artwork/1", "photos/landmark/2", "archive/3", "train1/png/0"):
        path = folder / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(int(place[-1]), 6, 5).resize((96, 80), Image.Resampling.BICUBIC).save(path)
    Dataset.from_list([{"image": make_image(5, 6, 5).resize((96, 80))}]).to_parquet(folder / "mixed.parquet")
    Dataset.from_list([{"image": make_image(4), "question": "Describe the photograph."}]).to_parquet(folder / "photos.parquet")
    asked = {"question_string": "Is Teal the minimum?", "question_id": 0, "answer": 1, "image_index": 0}
    asked |= {"color1_name": "Teal", "color1_id": 4, "color1_rgb": [0, 128, 128]}
    asked |= {"color2_name": "--None--", "color2_id": -1, "color2_rgb": [-1, -1, -1]}
    figures = {"qa_pairs": [asked], "total_distinct_questions": 1, "total_distinct_colors": 1}
    (folder / "train1/qa_pairs.json").write_text(json.dumps(figures))
    lines(folder / "cells.jsonl", [{"q": "What is it?", "a": "a cell", "file": "b.png"}])
    ours = yaml.safe_load((ROOT / "mpo/pipelines/mminstruct/domains.yaml").read_text())
    (folder / "kitchen.yaml").write_text(yaml.safe_dump(ours["ocr"]))
    (folder / "tasks").mkdir()
    (folder / "server.log").write_text("POST /v1/chat/completions\n")
