r"""Measure the checks of instructions on a third set of faults, by an author who had not seen them (`mminstruct_third.jsonl`).

    python benchmarks/mminstruct_third.py results/mminstruct_third.json --stage untouched

157 kinds of mechanical edits in six families, ten cases of each, labelled before anything was measured: by "rule", what the record,
its caption and the other instructions about its image tell a careful reader, and by "judge", what only the image or understanding
does. A case is the good instructions about an image, of all types, and the edited one after them; it is found if nothing of the
edited one is kept, by rules alone. Of kinds by judge, contradictions and general knowledge are also asked of scripted models, which
measures the way and not a model. Good records are those that the edits begin with: the 360 of `mminstruct.py`, and 24 Chinese ones
about four photographs. They are the first lines; an edit is the good record `of` that line with other fields, in its place or
`beside` it, and with `raw` as a response where that alone shows the fault. The author knew `docs/mminstruct.md`, the good records
and some names of functions.
"""

import json
from collections import Counter
from pathlib import Path

import mminstruct as seen

from mpo.pipelines.mminstruct.check import Agree, Blind, check_all
from mpo.pipelines.mminstruct.generate import read_items
from mpo.pipelines.mminstruct.output import distinct

LINES = [json.loads(line) for line in Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
GOOD = [one for one in LINES if "edit" not in one]


def cases():
    """The edited records: kind, family, by, record, and the neighbours: the good ones about the image that stay."""
    for one in LINES[len(GOOD) :]:
        own = [(at, record) for at, record in enumerate(GOOD) if record["image"] == GOOD[one["of"]]["image"]]
        others = [record for at, record in own if at != one["of"]]
        yield one | {"record": GOOD[one["of"]] | one["edit"], "neighbours": others + [GOOD[one["of"]]] * one.get("beside", False)}


def raw(record):
    """A record as a response."""
    options = "<C1>" + "\n".join(record["options"]) + "</C1>" if record["options"] else ""
    return record.get("raw") or f"<Q1>{record['question']}</Q1>{options}<A1>{record['answer']}</A1>"


def parsed(record, id):
    """What a record is read as, from the form of a response."""
    about = {name: record[name] for name in ("caption", "language", "type", "domain")} | {"images": [record["image"]]}
    found = read_items(raw(record), record["type"])
    return [{"id": f"{id}/{at}", **about, **one} for at, one in enumerate(found)]


def faults_of(records):
    """Why each record about an image is dropped, as one list for each record: of all that it is read as."""
    items = [parsed(record, at) for at, record in enumerate(records)]
    plain = [one for own in items for one in own]
    said = dict(zip((one["id"] for one in plain), check_all(plain), strict=True))
    distinct([one for one in plain if not said[one["id"]]], lost := [])
    said |= {one["id"]: one["reason"] for one in lost}
    return [[said[one["id"]] for one in own] for own in items], items


def scripted(case, item):
    """Whether a model that knows the answer without the image, or a judge that knows it to be wrong, drops it."""
    knows = Blind(seen.Letters("YES" if item["type"] == "long" else "OPTION" if item["type"] == "choice" else item["answer"], item))
    wrong = Agree(seen.Scripted(lambda asked: "Verdict: CONTRADICTED"))
    return not (knows if case["family"] == "no image needed" else wrong)([item])


def measure():
    """Counts by family, label and kind; the misses; the good records that are dropped, alone and beside a fault."""
    kinds, misses, beside, good = {}, [], [], []
    for case in cases():
        said, items = faults_of([*case["neighbours"], case["record"]])
        found = all(said[-1])
        label = {"family": case["family"], "by": case["by"]}
        one = kinds.setdefault(case["kind"], {**label, "faults": 0, "found": 0, "with scripted models": 0})
        one["faults"] += 1
        one["found"] += found
        by_model = (
            not found and case["by"] == "judge" and case["family"] != "repeated" and all(scripted(case, each) for each in items[-1])
        )
        one["with scripted models"] += found or by_model
        if not found:
            misses.append(
                {"kind": case["kind"], "by": case["by"], "image": case["record"]["image"], "response": raw(case["record"])}
            )
        for record, why in zip(case["neighbours"], said, strict=False):
            if any(why):
                beside.append({"kind": case["kind"], "response": raw(record), "said": why[0], "beside": raw(case["record"])})
    for image in dict.fromkeys(one["image"] for one in GOOD):
        own = [one for one in GOOD if one["image"] == image]
        good += [{"response": raw(one), "said": why[0]} for one, why in zip(own, faults_of(own)[0], strict=True) if any(why)]
    return kinds, misses, beside, good, len(GOOD)


def result():
    kinds, misses, beside, dropped, good = measure()
    told = {"good": good, "good dropped": len(dropped), "good dropped beside a fault": len(beside)}
    for label in ("rule", "judge"):
        families = {}
        for one in (one for one in kinds.values() if one["by"] == label):
            families.setdefault(one["family"], Counter()).update(
                {name: one[name] for name in ("faults", "found", "with scripted models")}
            )
        families["all"] = sum(families.values(), Counter())
        told[label] = {name: {**own, "recall": round(own["found"] / own["faults"], 4)} for name, own in families.items()}
    return told, {"kinds": kinds, "misses": misses, "dropped beside": beside, "dropped good ones": dropped}


if __name__ == "__main__":
    seen.add_to_file(result, __doc__)
