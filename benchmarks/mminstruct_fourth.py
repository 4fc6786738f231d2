"""Measure the checks of instructions on a fourth set, by an author who had read `docs/mminstruct.md` alone.

    python benchmarks/mminstruct_fourth.py results/mminstruct_fourth.json --stage untouched

The first 64 lines of `mminstruct_fourth.jsonl` are captions of imagined images, 16 of them Chinese. 320 good records follow, five
of each image, then 482 faults: edits of these by a program, of 54 kinds in six families. `rule_can_know` says whether a careful
reader of caption and record alone can know that one is wrong. Records of a `group` are read together, in their order; a fault
stands in a group of its own, but a repeated one after the five good ones of its image. It is found if nothing of it is kept.
"""

import json
from collections import Counter
from pathlib import Path

import mminstruct as seen

from mpo.pipelines.mminstruct.check import check_all
from mpo.pipelines.mminstruct.generate import read_items
from mpo.pipelines.mminstruct.output import distinct

LINES = [json.loads(line) for line in Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
IMAGES = {one["image"]: one for one in LINES if "caption" in one}
RECORDS = [one for one in LINES if "caption" not in one]


def read(record):
    """The instructions that a record is read as, from the form of a response."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCDEFGH", record.get("options", ()), strict=False))
    shown = f"<C1>{options}</C1>" if options else ""
    response = f"<Q1>{record.get('question', '')}</Q1>{shown}<A1>{record.get('answer', '')}</A1>"
    image = IMAGES[record["image"]]
    about = {"caption": image["caption"], "language": image["language"], "ocr": "\n".join(image["ocr"]), "images": [image["image"]]}
    items = read_items(response, record["type"])
    return [{"id": f"{record['id']}/{at}", **about, "type": record["type"], **one} for at, one in enumerate(items)]


def dropped(records):
    """Which records of a group are dropped as a whole."""
    items = [read(record) for record in records]
    plain = [one for own in items for one in own]
    said = dict(zip((one["id"] for one in plain), check_all(plain), strict=True))
    distinct([one for one in plain if not said[one["id"]]], lost := [])
    gone = {id for id, why in said.items() if why} | {one["id"] for one in lost}
    return [record for record, own in zip(records, items, strict=True) if all(one["id"] in gone for one in own)]


def result():
    """By family and label, how many are found; and all that were missed or dropped wrongly."""
    groups = {}
    for record in RECORDS:
        groups.setdefault(record["group"], []).append(record)
    gone = [record["id"] for records in groups.values() for record in dropped(records)]
    counts = {by: {} for by in ("rule", "judge")}
    for record in (one for one in RECORDS if one["label"] != "good"):
        own = counts["rule" if record["rule_can_know"] else "judge"]
        for name in (record["label"], "all"):
            own.setdefault(name, Counter(faults=0, found=0)).update(faults=1, found=record["id"] in gone)
    good = [one["id"] for one in RECORDS if one["label"] == "good"]
    told = {"good": len(good), "good dropped": len({*good} & {*gone}), **counts}
    missed = [one["id"] for one in RECORDS if one.get("rule_can_know") and one["id"] not in gone]
    return told, {"missed": missed, "dropped": [id for id in good if id in gone]}


if __name__ == "__main__":
    seen.add_to_file(result, __doc__)
