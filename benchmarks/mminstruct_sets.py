"""Measure the checks of instructions on a set in lines: `fourth`, `fifth`, and so on.

    python benchmarks/mminstruct_sets.py results/mminstruct_fifth.json --set fifth --stage untouched

Each is by an author of its own. The first lines are descriptions of images, good records about them follow, then faults: edits of
these by a program. The authors of `fourth` and `fifth` had read `docs/mminstruct.md`; their images are imagined ones in part. The
others had read nothing; theirs are the images and good records of `mminstruct.py`, which the files after `sixth` do not repeat, and
good records of their own. `open` has forms, languages and repeats alone. `rule_can_know` says whether a careful reader of the
description and the record alone can know that one is wrong. Records of a `group` are read together, in their order; a fault stands
in a group of its own, but a repeated one after the good one or ones that it repeats. It is found if nothing of it is kept, or
("undone") what is kept is the good record itself. What rules keep is then asked of scripted models, which know the truth: the row
"with scripted models", which measures the way and not a model. No model looks for repeats, form or languages.
"""

import gzip
import json
from collections import Counter
from pathlib import Path

import mminstruct as seen

from mpo.pipelines.mminstruct.check import Agree, Blind, check_all
from mpo.pipelines.mminstruct.generate import read_items
from mpo.pipelines.mminstruct.output import distinct


def load(name):
    """The images of a set by name, and its records; those of the sixth set where it is about the same ones."""
    with gzip.open(Path(__file__).with_name(f"mminstruct_{name}.jsonl.gz"), "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    records = [one for one in lines if "caption" not in one]
    if len(records) < len(lines):
        return {one["image"]: one for one in lines if "caption" in one}, records
    images, known = load("sixth")
    return images, [one for one in known if one["label"] == "good"] + records


def read(record, image):
    """The instructions that a record is read as, from the form of a response."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCDEFGH", record.get("options", ()), strict=False))
    shown = f"<C1>{options}</C1>" if options else ""
    response = f"<Q1>{record.get('question', '')}</Q1>{shown}<A1>{record.get('answer', '')}</A1>"
    about = {"caption": image["caption"], "language": image["language"], "ocr": "\n".join(image["ocr"]), "images": [image["image"]]}
    items = read_items(response, record["type"])
    return [{"id": f"{record['id']}/{at}", **about, "type": record["type"], **one} for at, one in enumerate(items)]


def restored(records, images):
    """Which faults in a record's form leave the good record itself when it is read: `C. 21"}]` is `C. 21`."""
    good = {one["id"]: one for one in records if one["label"] == "good"}

    def plain(record):
        return [{**one, "id": ""} for one in read(record, images[record["image"]])]

    edited = [one for one in records if one["label"] in ("malformed", "wrong_letter") and one.get("from") in good]
    return {one["id"] for one in edited if plain(one) == plain(good[one["from"]])}


def dropped(records, images):
    """Which records of a group are dropped as a whole."""
    items = [read(record, images[record["image"]]) for record in records]
    plain = [one for own in items for one in own]
    said = dict(zip((one["id"] for one in plain), check_all(plain), strict=True))
    distinct([one for one in plain if not said[one["id"]]], lost := [])
    gone = {id for id, why in said.items() if why} | {one["id"] for one in lost}
    return [record for record, own in zip(records, items, strict=True) if all(one["id"] in gone for one in own)]


def kept_by_models(record, image):
    """What is left of a record after a model without the image that knows general facts, and a judge that knows what is right."""
    truth, items = record["label"] == "good", [one for one in read(record, image) if "fault" not in one]
    said = "SUPPORTED" if truth or record["label"] == "no_image" else "CONTRADICTED"
    judged = Agree(seen.Scripted(lambda asked: f"Verdict: {said}"))(items)
    knows = {"choice": "OPTION", "long": "YES"}
    return [one for one in judged if truth or Blind(seen.Letters(knows.get(one["type"], one["answer"]), one))([one])]


def result(name):
    """By family and label, how many are found; and all that were missed or dropped wrongly."""
    images, records = load(name)
    groups = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    gone = [record["id"] for own in groups.values() for record in dropped(own, images)]
    undone = restored([record for record in records if record["id"] not in gone], images)
    counts = {by: {} for by in ("rule", "judge")}
    for record in (one for one in records if one["label"] != "good"):
        own = counts["rule" if record["rule_can_know"] else "judge"]
        for name in (record["label"], "all"):
            found = record["id"] in gone or record["id"] in undone
            by_model = (
                not found
                and record["label"] in ("no_image", "wrong_letter", "contradicting")
                and not kept_by_models(record, images[record["image"]])
            )
            plain = {"faults": 1, "found": found, "undone": record["id"] in undone, "with scripted models": found or by_model}
            own.setdefault(name, Counter()).update(plain)
    good = [one["id"] for one in records if one["label"] == "good"]
    lost = sum(not kept_by_models(one, images[one["image"]]) for one in records if one["label"] == "good" and one["id"] not in gone)
    told = {"good": len(good), "good dropped": len({*good} & {*gone}), "good dropped by scripted models": lost, **counts}
    missed = [one["id"] for one in records if one.get("rule_can_know") and one["id"] not in {*gone, *undone}]
    return told, {"missed": missed, "dropped": [id for id in good if id in gone]}


if __name__ == "__main__":
    names = [
        path.name.split(".")[0].removeprefix("mminstruct_") for path in sorted(Path(__file__).parent.glob("mminstruct_*.jsonl.gz"))
    ]
    seen.add_to_file(result, __doc__, sets=names)
