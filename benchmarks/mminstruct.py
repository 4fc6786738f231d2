r"""Measure what `mpo mminstruct` drops: good instructions about real images, and faults that are mechanical edits of them.

    python benchmarks/mminstruct.py results/mminstruct.json                  # both halves
    python benchmarks/mminstruct.py results/mminstruct.json --half first     # while rules are written, with what was wrong

60 images: 20 photographs and drawings of scikit-image, scikit-learn and matplotlib, described by hand (`mminstruct_photos.yaml`),
and 40 bar charts of scikit-learn's tables (means by class), whose contents are known; a third of the charts in Chinese. Each
instruction goes the way of a response: written with tags, parsed (`read_items`), checked (`check_all`), and asked about without its
image (`Blind`) and with the caption (`Agree`). The models are scripted: the first knows a list of general questions and nothing
else, the second the known answer. So the measurement of kinds that only a model can judge is one of the way, not of a model.

Images are halved by a hash of their name: rules were written on the first half alone, the second half measures them.
"""

import argparse
import hashlib
import json
import logging
import random
from collections import Counter
from datetime import date
from pathlib import Path

import matplotlib
import numpy
import skimage
import sklearn.datasets
import yaml
from PIL import Image

from mpo.generation.generator import Response
from mpo.pipelines.mminstruct.check import YES_NO, Agree, Blind, check_all
from mpo.pipelines.mminstruct.domains import TYPES
from mpo.pipelines.mminstruct.generate import read_items

matplotlib.use("Agg")
HERE = Path(__file__).parent
FOLDERS = [
    Path(skimage.__file__).parent / "data",
    Path(sklearn.datasets.__file__).parent / "images",
    Path(matplotlib.get_data_path()) / "sample_data",
]
TABLES = {"iris": 4, "wine": 13, "breast_cancer": 23}
PLANTS = {
    "setosa": "山鸢尾",
    "versicolor": "变色鸢尾",
    "virginica": "维吉尼亚鸢尾",
    "class_0": "甲类",
    "class_1": "乙类",
    "class_2": "丙类",
    "malignant": "恶性",
    "benign": "良性",
}
GENERAL = [
    ("judgement", "Is water made of hydrogen and oxygen?", [], "Yes"),
    ("judgement", "Is the sun a planet?", [], "No"),
    ("judgement", "Does a triangle have four sides?", [], "No"),
    ("judgement", "Do fish breathe with gills?", [], "Yes"),
    ("judgement", "Is Paris the capital of France?", [], "Yes"),
    ("judgement", "Is ten smaller than three?", [], "No"),
    ("choice", "Which planet is closest to the sun?", ["Mercury", "Venus", "Mars", "Saturn"], "Mercury"),
    ("choice", "How many legs does a spider have?", ["eight", "six", "four", "ten"], "eight"),
    ("choice", "Which gas do plants take in for photosynthesis?", ["carbon dioxide", "helium", "neon", "argon"], "carbon dioxide"),
    ("choice", "In which continent does Egypt lie?", ["Africa", "Europe", "Asia", "Australia"], "Africa"),
    ("short", "What is the capital of Japan?", [], "Tokyo"),
    ("short", "At how many degrees Celsius does water freeze?", [], "0"),
    ("short", "Who wrote Hamlet?", [], "Shakespeare"),
    ("short", "What do bees make from nectar?", [], "honey"),
    (
        "long",
        "Why do leaves look green?",
        [],
        "They contain chlorophyll, which takes in red and blue light and reflects green light.",
    ),
    (
        "long",
        "How does a rainbow come about?",
        [],
        "Drops of water bend the light of the sun, which splits it up into its colours.",
    ),
]
FOREIGN = [
    ("Welche Farbe hat das Objekt ganz links oben?", "Das Objekt ist dunkelblau und hat einen weißen Rand."),
    ("Quel objet se trouve juste derrière la personne?", "Une grande armoire brune se trouve derrière elle."),
    ("¿Cuántas cosas hay encima de aquella mesa grande?", "Hay cinco cosas pequeñas encima de aquella mesa."),
    ("Что находится справа от большого дома?", "Справа стоит высокое зелёное дерево."),
]


def number(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def half(name):
    return ("first", "second")[number(name) % 2]


def photographs():
    """The images described by hand, each with its caption and its instructions as (type, question, options, answer)."""
    for name, about in yaml.safe_load((HERE / "mminstruct_photos.yaml").read_text()).items():
        found = [(type, question, [], answer) for type in ("judgement", "short", "long") for question, answer in about[type]]
        found += [("choice", question, options, options[0]) for question, *options in about["choice"]]
        path = next(folder / name for folder in FOLDERS if (folder / name).is_file())
        yield {"name": name, "path": path, "domain": about["domain"], "language": "en", "caption": about["caption"], "items": found}


def charts(folder=None):
    """Bar charts of tables: the mean of a column for each class. With a folder, they are drawn into it."""
    for table, columns in TABLES.items():
        data = getattr(sklearn.datasets, f"load_{table}")()
        names = [str(name) for name in data.target_names]
        for column in range(columns):
            title = str(data.feature_names[column]).replace("_", " ").replace("/", " over ")
            means = [float(f"{data.data[data.target == at, column].mean():.3g}") for at in range(len(names))]
            path = Path(folder or ".") / "structuralized_image_text_understanding" / f"{table}_{column:02d}.png"
            if folder:
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(path, title, names, means)
            chinese = number(path.name) % 3 == 0
            caption, found = (in_chinese if chinese else in_english)(table, title, names, means)
            language = "zh" if chinese else "en"
            domain = "structuralized_image_text_understanding"
            yield {"name": path.name, "path": path, "domain": domain, "language": language, "caption": caption, "items": found}


def draw(path, title, names, means):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4, 3), dpi=100)
    axes.bar_label(axes.bar(names, means), fmt="%.3g")
    axes.set_title(title)
    figure.savefig(path)
    plt.close(figure)


def near(mean):
    """Three other numbers of the same kind."""
    return [f"{mean * factor:.3g}" for factor in (0.5, 1.5, 2.25)]


def in_english(table, title, names, means):
    high, low = (names[means.index(edge(means))] for edge in (max, min))
    bars = "; ".join(f"the bar of {name} is {mean:.3g} high" for name, mean in zip(names, means, strict=True))
    caption = f"A bar chart with the title {title} has {len(names)} blue bars on a white ground. From left to right, {bars}."
    first, last = names[0], names[-1]
    told = f"It compares {len(names)} classes. {high} has the highest bar with {max(means):.3g}"
    told += f", and {low} the lowest with {min(means):.3g}."
    yes = means[0] > means[-1]
    return caption, [
        ("judgement", f"Is the bar of {first} higher than that of {last}?", [], "Yes" if yes else "No"),
        ("judgement", f"Is the bar of {last} higher than that of {first}?", [], "No" if yes else "Yes"),
        ("choice", f"What is the value of {first}?", [f"{means[0]:.3g}", *near(means[0])], f"{means[0]:.3g}"),
        ("short", f"Which value does the bar of {last} show?", [], f"{means[-1]:.3g}"),
        ("short", "Which class has the highest bar?", [], high),
        ("long", f"What does the chart show about {title}?", [], told),
    ]


def in_chinese(table, title, names, means):
    said = [PLANTS[name] for name in names]
    high, low = (said[means.index(edge(means))] for edge in (max, min))
    bars = "，".join(f"{name}的柱高为{mean:.3g}" for name, mean in zip(said, means, strict=True))
    caption = f"这是一幅标题为 {title} 的柱状图，白色背景上有{len(names)}根蓝色的柱子。从左到右，{bars}。"
    told = f"图中比较了{len(names)}个类别，{high}的柱子最高，为{max(means):.3g}，而{low}的最低，为{min(means):.3g}。"
    yes = means[0] > means[-1]
    return caption, [
        ("judgement", f"{said[0]}的柱子比{said[-1]}的高吗？", [], "是" if yes else "否"),
        ("judgement", f"{said[-1]}的柱子比{said[0]}的高吗？", [], "否" if yes else "是"),
        ("choice", f"{said[0]}的数值是多少？", [f"{means[0]:.3g}", *near(means[0])], f"{means[0]:.3g}"),
        ("short", f"{said[-1]}的柱子表示的数值是多少？", [], f"{means[-1]:.3g}"),
        ("short", "哪一类的柱子最高？", [], high),
        ("long", f"这幅图说明了 {title} 的什么情况？", [], told),
    ]


# Faults: an edit of an instruction gives (type, question, options, answer, letter) or the text of the response, or None.


def wrong_letter(random, item, image):
    type, question, options, answer = item
    if type != "choice":
        return None
    letter = random.choice([one for one in "ABCD" if options["ABCD".index(one)] != answer] + ["F", "H"])
    return tagged([(type, question, options, answer)], letter=letter)


def wrong_option(random, item, image):
    """The letter and the text of another option."""
    type, question, options, answer = item
    return tagged([(type, question, options, random.choice([one for one in options if one != answer]))]) if options else None


def no_image(random, item, image):
    if image["language"] != "en":
        return None
    own = [one for one in GENERAL if one[0] == item[0]]
    return tagged([random.choice(own)])


def repeated(random, item, image):
    type, question, options, answer = item
    if image["language"] == "zh":
        again = random.choice([question, question.rstrip("？") + "?", f"请问{question}", f"图中{question}"])
    else:
        lower = question[0].lower() + question[1:]
        again = random.choice([question, question.upper(), f"Please tell me, {lower}", question.rstrip("?") + " in the image?"])
    return tagged([item, (type, again, options, answer)])


def contradicting(random, item, image):
    """Another answer: that of no image, or with another number or word."""
    type, question, options, answer = item
    if type == "judgement":
        yes, no = YES_NO[image["language"]]
        return tagged([(type, question, options, no if answer == yes else yes)])
    if type == "choice":
        return None  # as `wrong_option`
    if type == "short":
        swap = {"en": ["seventeen", "a purple elephant", "at the top", "3.99"], "zh": ["紫色的大象", "十七", "右上方", "3.99"]}
        return tagged([(type, question, options, random.choice(swap[image["language"]]))])
    denied = {
        "en": "The opposite is true: none of this is so, and nothing of the kind is there.",
        "zh": "事实正好相反，图中完全没有这些内容，也看不到类似的东西。",
    }
    return tagged([(type, question, options, denied[image["language"]])])


def contradicting_itself(random, item, image):
    type, question, options, answer = item
    if type != "judgement":
        return None
    yes, no = YES_NO[image["language"]]
    return tagged([item, (type, question, options, no if answer == yes else yes)])


def malformed(random, item, image):
    type, question, options, answer = item
    good = tagged([item])
    edits = [
        good.replace("</A1>", ""),
        good.replace("</Q1>", ""),
        good.replace("<A1>", "<A2>"),
        good.replace("<Q1>", "<Q1><Q1>"),
        good.replace("<A1>", "Answer: ").replace("</A1>", ""),
        f"Question: {question}\nAnswer: {answer}",
        tagged([(type, "", options, answer)]),
        tagged([(type, question.replace(question.split()[-1], "<object>?"), options, answer)]),
        good[: good.rfind("<A1>") + 6],
    ]
    if type == "judgement":
        edits += [tagged([(type, question, options, one)]) for one in ("Maybe", "It depends.", "42")]
    if type == "choice":
        edits += [
            tagged([(type, question, options[:1], options[0])]),
            tagged([(type, question, [options[0], *options[:1] * 2, options[1]], options[0])]),
        ]
        edits += [tagged([(type, question, [*options[:3], "All of the above"], options[0])])]
    return random.choice(edits)


def wrong_language(random, item, image):
    type, question, options, answer = item
    if image["language"] == "zh":
        asked, said = "What does the bar of the first class show?", "It shows a high value."
    else:
        asked, said = random.choice([*FOREIGN, ("图中最显眼的物体是什么？", "是一个放在中间的红色盒子。")])
    if type == "long" and random.random() < 0.5:
        return tagged([(type, question, options, said * 2)])
    return tagged([(type, asked, options, answer)])


def leaking(random, item, image):
    type, question, options, answer = item
    if image["language"] == "zh":
        extra = [f"（答案是{answer}）{question}", f"{question}答案为{answer}。"]
    else:
        extra = [f"{question} The answer is {answer}.", f"Given that the answer is {answer}: {question}"]
        if type == "short":
            extra += [f"{question} It is {answer}, is it not?", f"Seeing {answer} here, {question[0].lower()}{question[1:]}"]
    return tagged([(type, random.choice(extra), options, answer)])


def of_caption(random, item, image):
    type, question, options, answer = item
    texts = ["According to the description, {}", "Based on the caption, {}", "In the given description, {}"]
    if image["language"] == "zh":
        texts = ["根据描述，{}", "描述中提到，{}"]
    return tagged([(type, random.choice(texts).format(question), options, answer)])


def refusing(random, item, image):
    type, question, options, answer = item
    if type not in ("short", "long"):
        return None
    texts = ["I'm sorry, I cannot tell from here what this would be.", "This cannot be determined from the given text."]
    if image["language"] == "zh":
        texts = ["抱歉，我无法确定。", "无法判断，图中没有说明。"]
    return tagged([(type, question, options, random.choice(texts))])


RULES = (wrong_letter, wrong_option, repeated, contradicting_itself, malformed, wrong_language, leaking, of_caption, refusing)
MODELS = (no_image, contradicting)


def tagged(items, letter=None):
    lines = []
    for at, (type, question, options, answer) in enumerate(items, 1):
        listed = "\n".join(f"{'ABCDEFGH'[place]}. {one}" for place, one in enumerate(options))
        right = f"{letter or 'ABCDEFGH'[options.index(answer)]}. {answer}" if options else answer
        lines.append(f"<Q{at}>{question}</Q{at}>" + f"<C{at}>{listed}</C{at}>" * (type == "choice") + f"<A{at}>{right}</A{at}>")
    return "\n".join(lines)


class Scripted:
    """A model that says what a function of the question says."""

    def __init__(self, say):
        self.say = say

    def identity(self):  # noqa: D102
        return {"model": "scripted"}

    async def stream(self, requests, *, n=1, concurrency=None, **settings):  # noqa: D102
        place = 0
        async for item in requests:
            request, samples = item if isinstance(item, tuple) else (item, range(n))
            text = self.say(request.messages[-1]["content"][0]["text"])
            for sample in samples:
                yield place, sample, Response(text, "stop", 1, 1)
            place += 1


def not_seeing(asked):
    found = next((one for one in GENERAL if one[1] in asked), None)
    if found is None:
        return "NO" if "YES or NO" in asked or "YES 或 NO" in asked else "UNKNOWN"
    return "YES" if found[0] == "long" else found[3]


def judging(known):
    """Knows the right answers to the questions of all images, each by its caption and its question."""

    def say(asked):
        caption, question, answer = (asked.partition(start)[2] for start in ("Description:\n", "Question: ", "Answer: "))
        if not question:
            caption, question, answer = (asked.partition(start)[2] for start in ("描述：\n", "问题：", "答案："))
        truth = known.get((caption.split("\n")[0], question.split("\n")[0]))
        verdict = "UNKNOWN" if truth is None else "SUPPORTED" if truth == answer.split("\n")[0] else "CONTRADICTED"
        return f"As known.\nVerdict: {verdict}"

    return say


def dropped(text, type, image, models):
    """Why the last instruction of a response is dropped, "" if it is kept; and how many others are."""
    about = {"caption": image["caption"], "language": image["language"], "type": type, "domain": image["domain"]}
    items = [{"id": f"{at}", **about, **one} for at, one in enumerate(read_items(text, type))]
    faults = [fault or "" for fault in check_all(items)]
    if not faults[-1]:
        for step in models:
            if not step([items[-1]]):
                return f"{step.verb} drops it", sum(map(bool, faults[:-1]))
    return faults[-1], sum(map(bool, faults[:-1]))


def measure(images):
    known = {(one["caption"], item[1]): item[3] for one in images for item in one["items"]}
    models = [Blind(Scripted(not_seeing), n=2), Agree(Scripted(judging(known)))]
    good, false, recall, misses = 0, [], {}, []
    for image in images:
        for type in TYPES:
            own = [item for item in image["items"] if item[0] == type]
            text = tagged(own)
            about = {"caption": image["caption"], "language": image["language"], "type": type, "domain": image["domain"]}
            items = [{"id": f"{image['name']}/{at}", **about, **one} for at, one in enumerate(read_items(text, type))]
            for item, fault in zip(items, check_all(items), strict=True):
                good += 1
                said = fault or next((f"{step.verb} drops it" for step in models if not step([item])), None)
                if said:
                    false.append(
                        {"image": image["name"], "question": item.get("question"), "answer": item.get("answer"), "said": said}
                    )
        for item in image["items"]:
            for edit in (*RULES, *MODELS):
                made = edit(random.Random(number(f"{edit.__name__} {image['name']} {item}")), item, image)
                if made is None:
                    continue
                counts = recall.setdefault(edit.__name__, Counter())
                said, others = dropped(made, item[0], image, models)
                counts["faults"] += 1
                counts["found"] += bool(said)
                counts["others dropped"] += others
                if not said:
                    misses.append({"fault": edit.__name__, "image": image["name"], "response": made})
    kinds = {name: {**own, "recall": round(own["found"] / own["faults"], 4)} for name, own in sorted(recall.items())}
    ruled = [kinds[edit.__name__] for edit in RULES]
    total = sum(one["found"] for one in ruled) / sum(one["faults"] for one in ruled)
    return {
        "images": len(images),
        "good": good,
        "good dropped": len(false),
        "false drops": round(len(false) / good, 4),
        "recall of rules": round(total, 4),
        "kinds": kinds,
        "dropped good ones": false,
        "misses": misses,
    }


def of_file(path):
    """Measure good records and faults of a YAML file, whose author did not know the rules: as responses, in forms that models give.

    ``images`` has language, domain and caption by name; ``good`` [image, type, response, number of instructions in it], and
    ``faults`` by kind the same, of which the last instruction is the fault. A fifth value is what a model says without the image.
    """
    given = yaml.safe_load(path.read_text())

    def faults_of(name, type, text, count, said=None):
        about = {**given["images"][name], "type": type, "images": [name]}
        items = [{"id": f"{name}/{at}", **about, **one} for at, one in enumerate(read_items(text, type))]
        found = [*check_all(items), *["malformed: missing"] * (count - len(items))]
        if said is not None and not found[-1] and not Blind(Letters(said, items[-1]), n=2)([items[-1]]):
            found[-1] = "no image needed"
        return found

    good = [(one, fault) for one in given["good"] for fault in faults_of(*one)]
    kinds = {kind: [(one, faults_of(*one)[-1]) for one in own] for kind, own in given["faults"].items()}
    counts = {kind: {"faults": len(own), "found": sum(bool(fault) for _, fault in own)} for kind, own in kinds.items()}
    return {
        "good": len(good),
        "good dropped": sum(bool(fault) for _, fault in good),
        "recall of rules": round(sum(one["found"] for one in counts.values()) / sum(one["faults"] for one in counts.values()), 4),
        "kinds": {kind: {**one, "others dropped": 0} for kind, one in counts.items()},
        "dropped good ones": [{"response": one, "said": fault} for one, fault in good if fault],
        "misses": [{"fault": kind, "response": one} for kind, own in kinds.items() for one, fault in own if not fault],
    }


class Letters(Scripted):
    """Says a text, in which OPTION is the letter of an instruction's right option, wherever it is among the lines asked about."""

    def __init__(self, said, item):
        def say(asked):
            line = next((line for line in asked.splitlines() if line[1:] == f". {item['answer']}"), "?")
            return said.replace("OPTION", line[0])

        super().__init__(say)


def add_to_file(measure, about, sets=()):
    """The command of another set, or of one of several: add what it measures, (what is printed, the rest), to a file as a stage."""
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file, to which the measurement is added")
    parser.add_argument("--stage", default="now", help="name of the measurement")
    parser.add_argument("--set", choices=sets, required=bool(sets), help="which set")
    args = parser.parse_args()
    told, rest = measure(args.set) if sets else measure()
    print(json.dumps(told, ensure_ascii=False).replace("}, ", "},\n"))
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.write_text(json.dumps({**known, args.stage: told | rest}, indent=1, ensure_ascii=False) + "\n")


def main():
    logging.disable(logging.WARNING)  # the steps log what they drop
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--half", choices=("first", "second"))
    parser.add_argument("--images", type=Path, help="folder to write the images to, in folders named after their domains")
    parser.add_argument("--faults", type=Path, help="YAML file of good records and faults, instead (mminstruct_faults.yaml)")
    args = parser.parse_args()
    images = [*photographs(), *charts(args.images)]
    if args.images:
        write(images, args.images)
    halves = [args.half] if args.half else ["first", "second"]
    if args.faults:
        found = {args.faults.name: of_file(args.faults)}
    else:
        found = {name: measure([one for one in images if half(one["name"]) == name]) for name in halves}
    args.out.write_text(
        json.dumps({"date": f"{date.today()}", "numpy": numpy.__version__, **found}, indent=1, ensure_ascii=False) + "\n"
    )
    for name, own in found.items():
        print(f"{name}: {own['good']} good, {own['good dropped']} dropped; recall of rules {own['recall of rules']:.1%}")
        for kind, counts in own["kinds"].items():
            print(f"  {kind}: {counts['found']} of {counts['faults']}, {counts['others dropped']} others dropped")


def write(images, folder):
    """Write the photographs into a folder, each in one named after its domain, as the charts are."""
    for image in images:
        target = folder / image["domain"] / f"{Path(image['name']).stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            Image.open(image["path"]).convert("RGB").save(target)


if __name__ == "__main__":
    main()
