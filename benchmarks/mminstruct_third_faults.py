# ruff: noqa
# fmt: off
"""A third set of faults for the checks of instructions: mechanical edits of good records, by an author who had not read the checks,
the other sets or the tests.

Known were `docs/mminstruct.md`, the good records, and the names of some functions of the other sets. `cases()` gives the edited records,
`good()` the good ones: the 360 of `mminstruct.py` and 24 Chinese ones about four photographs. An edited record stands in the place of its
original, or after it (`mode` add). `raw` is it as a response; of five kinds, only that shows the fault.
"""
import json
import random
import re
from itertools import zip_longest

SEED, LIMIT, LETTERS = 30, 10, "ABCDEFGH"
RULE, JUDGE, EVERY = "rule", "judge", ("judgement", "choice", "short", "long")
LETTER, BLIND, AGAIN, AGAINST, FORM, LANGUAGE = "wrong letter", "no image needed", "repeated", "contradicting", "malformed", "wrong language"
NAMES = {"setosa": ("山鸢尾", "shan yuanwei"), "versicolor": ("变色鸢尾", "bianse yuanwei"), "virginica": ("维吉尼亚鸢尾", "weijiniya yuanwei"),
         "class_0": ("甲类", "jia lei"), "class_1": ("乙类", "yi lei"), "class_2": ("丙类", "bing lei"), "malignant": ("恶性", "exing"), "benign": ("良性", "liangxing")}
# The six sentences about a chart: comparison, value asked with options, value, highest, summary and its answer; then yes and no.
SAID = {
    "en": ("Is the bar of {a} higher than that of {b}?", "What is the value of {a}?", "Which value does the bar of {a} show?", "Which class has the highest bar?", "What does the chart show about {t}?", "It compares {n} classes. {a} has the highest bar with {x}, and {b} the lowest with {y}.", "Yes", "No"),
    "zh": ("{a}的柱子比{b}的高吗？", "{a}的数值是多少？", "{a}的柱子表示的数值是多少？", "哪一类的柱子最高？", "这幅图说明了 {t} 的什么情况？", "图中比较了{n}个类别，{a}的柱子最高，为{x}，而{b}的最低，为{y}。", "是", "否"),
    "pinyin": ("{a} de zhuzi bi {b} de gao ma?", "{a} de shuzhi shi duoshao?", "{a} de zhuzi biaoshi de shuzhi shi duoshao?", "Na yi lei de zhuzi zui gao?", "Zhe fu tu shuoming le {t} de shenme qingkuang?", "Tu zhong bijiao le {n} ge leibie, {a} de zhuzi zui gao, wei {x}, er {b} de zui di, wei {y}.", "shi", "fou"),
    "de": ("Ist der Balken von {a} höher als der von {b}?", "Welchen Wert hat {a}?", "Welchen Wert zeigt der Balken von {a}?", "Welche Klasse hat den höchsten Balken?", "Was zeigt das Diagramm über {t}?", "Es vergleicht {n} Klassen. {a} hat mit {x} den höchsten Balken und {b} mit {y} den niedrigsten.", "Ja", "Nein"),
    "fr": ("La barre de {a} est-elle plus haute que celle de {b} ?", "Quelle est la valeur de {a} ?", "Quelle valeur la barre de {a} montre-t-elle ?", "Quelle classe a la barre la plus haute ?", "Que montre le graphique sur {t} ?", "Il compare {n} classes. {a} a la barre la plus haute avec {x}, et {b} la plus basse avec {y}.", "Oui", "Non"),
    "es": ("¿Es la barra de {a} más alta que la de {b}?", "¿Cuál es el valor de {a}?", "¿Qué valor muestra la barra de {a}?", "¿Qué clase tiene la barra más alta?", "¿Qué muestra el gráfico sobre {t}?", "Compara {n} clases. {a} tiene la barra más alta con {x}, y {b} la más baja con {y}.", "Sí", "No"),
    "ru": ("Столбец {a} выше столбца {b}?", "Каково значение {a}?", "Какое значение показывает столбец {a}?", "У какого класса самый высокий столбец?", "Что показывает диаграмма о {t}?", "Она сравнивает классы ({n}). У {a} самый высокий столбец, {x}, а у {b} самый низкий, {y}.", "Да", "Нет"),
    "ja": ("{a}の棒は{b}の棒より高いですか？", "{a}の値はいくつですか？", "{a}の棒が示す値はいくつですか？", "どのクラスの棒が一番高いですか？", "このグラフは {t} について何を示していますか？", "{n}つのクラスを比べています。{a}の棒が{x}で一番高く、{b}の棒が{y}で一番低いです。", "はい", "いいえ"),
    "ko": ("{a}의 막대가 {b}의 막대보다 높습니까?", "{a}의 값은 얼마입니까?", "{a}의 막대가 나타내는 값은 얼마입니까?", "어느 분류의 막대가 가장 높습니까?", "이 그래프는 {t}에 대해 무엇을 보여 줍니까?", "{n}개의 분류를 비교합니다. {a}의 막대가 {x}(으)로 가장 높고 {b}의 막대가 {y}(으)로 가장 낮습니다.", "예", "아니요")}
THIRD = ("de", "fr", "es", "ru", "ja", "ko")
COLOURS = {"en": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "silver"), "zh": tuple("红橙黄绿蓝紫粉棕黑白")}
GLOSS = {"woman": "女人", "suit": "套装", "orange": "橙色", "a flag": "一面旗", "helmet": "头盔", "camera": "相机", "a lawn": "草坪", "animal": "动物", "white": "白色", "coffee": "咖啡",
         "red": "红色", "spoon": "勺子", "coins": "硬币", "building": "建筑", "flower": "花", "black": "黑色", "right": "右边", "motorcycle": "摩托车", "rocket": "火箭", "dark blue": "深蓝色",
         "a horse": "一匹马", "page": "书页", "blue": "蓝色", "grey": "灰色", "round": "圆形", "silver": "银色", "emblem": "徽章", "bar": "柱子", "value": "数值", "chart": "图表",
         "surface": "表面", "wood": "木头", "glass": "玻璃", "a cat": "猫", "a dog": "狗", "six": "六", "four": "四", "a lake": "湖", "a cap": "帽子", "a snake": "蛇", "眼睛": "eyes",
         "碟子": "saucer", "天空": "sky", "最高": "highest", "类别": "classes", "条纹": "stripes", "塔架": "towers"}
GLOSS |= {z: e for e, z in list(GLOSS.items()) if z > "一"}
KNOWN = {"woman": ("Are women human beings?", "Yes"), "cat": ("How many legs does a cat usually have?", "four"), "coffee": ("Does coffee contain caffeine?", "Yes"),
         "coins": ("What are coins used for?", "paying"), "camera": ("Can a camera take photographs?", "Yes"), "motorcycle": ("How many wheels does a motorcycle have?", "two"),
         "rocket": ("Can rockets fly into space?", "Yes"), "horse": ("What do horses eat?", "grass"), "moon": ("Does the moon move round the earth?", "Yes"),
         "eye": ("Which sense do eyes serve?", "sight"), "flower": ("What do bees collect from flowers?", "nectar"), "snake": ("Do snakes have legs?", "No"),
         "malignant": ("Can malignant tumours spread?", "Yes"), "setosa": ("Are irises plants?", "Yes"), "alcohol": ("Which drink is made from grapes?", "wine"),
         "猫": ("猫通常有几条腿？", "四条"), "硬币": ("硬币是用来做什么的？", "付款"), "火箭": ("火箭能飞进太空吗？", "是"), "咖啡": ("咖啡含有咖啡因吗？", "是"), "鸢尾": ("鸢尾是植物吗？", "是"),
         "恶性": ("恶性肿瘤会扩散吗？", "是")}
CHINESE = [("coffee_zh", "attribute_recognition", "一只红色的杯子盛着咖啡，放在红色的碟子上。碟子右侧放着一把金属小勺。杯子的内壁是白色的，咖啡呈浅棕色。它们都放在一张深色的木桌上。",
            ("碟子上放着勺子吗？", "杯子的内壁是黑色的吗？", "杯子里装的是什么？", "咖啡", "碟子是什么颜色的？", "红色", "杯子、勺子和碟子是怎样摆放的？", "红色的杯子放在红色的碟子上，勺子放在碟子的右侧，它们都摆在一张木桌上。", "碟子右侧放着什么？", "一把金属小勺", "一块饼干", "一张纸巾", "一朵鲜花")),
           ("chelsea_zh", "species_recognition", "一只猫的脸占满了画面。它的毛是浅棕色的，带有深色条纹，眼睛是黄绿色的，鼻子微微发红。白色的胡须伸向左右两侧。背景是模糊的灰色。",
            ("这只动物的毛上有条纹吗？", "这只动物的眼睛是蓝色的吗？", "胡须是什么颜色的？", "白色", "眼睛是什么颜色的？", "黄绿色", "这只动物看起来是什么样子？", "这只猫的毛是浅棕色的，带有深色条纹，眼睛呈黄绿色，鼻子微微发红，胡须是白色的。", "画面中是哪种动物？", "猫", "狗", "狐狸", "兔子")),
           ("rocket_zh", "future_prediction", "黄昏时分，一枚白色的火箭竖立在发射台上。它的左右两侧立着高高的塔架，地面附近亮着明亮的灯。上方的天空是深蓝色的。",
            ("火箭是竖立着的吗？", "画面中是正午吗？", "天空是什么颜色的？", "深蓝色", "火箭的两侧立着什么？", "塔架", "接下来可能会发生什么？为什么？", "火箭竖立在发射台上，地面附近的灯已经亮起，因此它可能很快就会发射。", "地面附近亮着什么？", "明亮的灯", "篝火", "烟花", "蜡烛")),
           ("coins_zh", "numerical_calculation", "二十四枚古旧的硬币摆在深色的表面上，共四行，每行六枚。它们是圆形的灰色硬币，上面有头像或人物图案。最大的硬币位于各行的右端。这是一张黑白照片。",
            ("硬币排成了四行吗？", "所有硬币都一样大吗？", "一共有多少枚硬币？", "二十四枚", "硬币上有什么图案？", "头像或人物", "不逐一清点，怎样算出硬币的总数？", "硬币排成四行，每行六枚，四乘六等于二十四，所以一共有二十四枚硬币。", "每行有多少枚硬币？", "六枚", "三枚", "八枚", "十枚"))]
KINDS: list[dict] = []
POOL: list[dict] = []

def kind(family, by, why, *types, add=False, language=None):
    """Registers a fault. add: the edited record stands beside its original; otherwise it stands in its place."""
    def register(fault):
        KINDS.append({"name": fault.__name__, "family": family, "by": by, "why": why, "types": types or EVERY, "add": add, "language": language, "fault": fault})
        return fault
    return register

def simple(family, by, why, *types, name, edit, **more):
    """Registers a fault that is one expression."""
    def fault(r, rng, others):
        return edit(r, rng)
    fault.__name__ = name
    kind(family, by, why, *types, **more)(fault)

def put(r, **fields): return {**r, **fields}
def zh(r): return r["language"] == "zh"
def in_(r, english, chinese): return chinese if zh(r) else english
def texts(r): return [o.split(". ", 1)[1] for o in r["options"]]
def right(r): return r["answer"].split(". ", 1)[-1] if r["options"] else r["answer"]
def letter(r): return r["answer"][0]
def bare(r): return re.sub(r"[?？.。]+$", "", r["question"])
def sentences(text): return [s for s in re.split(r"(?<=\.)\s+|(?<=。)", text) if s]
def lettered(options, answer): return {"options": [f"{a}. {t}" for a, t in zip(LETTERS, options)], "answer": f"{LETTERS[options.index(answer)]}. {answer}"}
def flipped(answer): return {"Yes": "No", "No": "Yes", "是": "否", "否": "是"}[answer]
def words(r, text): return list(text) if zh(r) else text.split()
def join(r, parts): return ("" if zh(r) else " ").join(parts)
def another(r, rng): return rng.choice([a for a in LETTERS[:len(r["options"])] if a != letter(r)])
def has(text, word): return re.search(rf"(?<![\w.]){re.escape(word)}(?![\w]|\.\d)" if word.isascii() else re.escape(word), text, re.I) is not None
def told(r, text): return has(r["caption"], re.sub(r"^(an?|the|of an?|on the) ", "", text))
def values(r): return dict(re.findall(r"([^，。、\s]+?)的柱高为(\d[\d.]*)" if zh(r) else r"the bar of (\S+) is ([\d.]+) high", r["caption"]))
def raw(r): return r.get("raw") or f"<Q1>{r['question']}</Q1>" + ("<C1>" + "\n".join(r["options"]) + "</C1>" if r["options"] else "") + f"<A1>{r['answer']}</A1>"

def good():
    """The good records, one dictionary each; the right options' letters are drawn."""
    import mminstruct
    images = [dict(i) for source in (mminstruct.photographs, mminstruct.charts) for i in source()]
    for name, domain, caption, t in CHINESE:
        items = [("judgement", t[0], [], "是"), ("judgement", t[1], [], "否"), ("short", t[2], [], t[3]), ("short", t[4], [], t[5]), ("long", t[6], [], t[7]), ("choice", t[8], list(t[9:]), t[9])]
        images.append({"name": name, "domain": domain, "language": "zh", "caption": caption, "items": items})
    records = []
    for i in images:
        for n, (type, question, options, answer) in enumerate(i["items"]):
            r = {"image": i["name"], "n": n, "domain": i["domain"], "language": i["language"], "caption": i["caption"], "type": type, "question": question, "options": [], "answer": answer}
            options = list(options)
            random.Random(f"{SEED} {i['name']} {n}").shuffle(options)
            records.append(r | (lettered(options, answer) if options else {}))
    return records

def cases(limit=LIMIT):
    """The edited records: kind, family, by (rule or judge), mode, record, original, neighbours (good ones of the image), raw (as a model's reply)."""
    records = good()
    POOL[:] = records
    made = []
    for k in KINDS:
        count, seen, ordered = 0, {}, list(records)
        random.Random(f"{SEED} {k['name']}").shuffle(ordered)
        ordered = [r for pair in zip_longest([r for r in ordered if not values(r)], [r for r in ordered if values(r)]) for r in pair if r]  # photographs and charts by turns
        for r in ordered:
            if count == limit or r["type"] not in k["types"] or k["language"] not in (None, r["language"]) or seen.get(r["image"], 0) == 2:
                continue
            others = [o for o in records if o["image"] == r["image"] and o is not r]
            edited = k["fault"](r, random.Random(f"{SEED} {k['name']} {r['image']} {r['n']}"), others)
            if edited is None or edited == r:
                continue
            count, seen[r["image"]] = count + 1, seen.get(r["image"], 0) + 1
            made.append({"kind": k["name"], "family": k["family"], "by": k["by"], "mode": "add" if k["add"] else "replace", "record": edited, "original": r,
                         "neighbours": others + [r] * k["add"], "raw": raw(edited)})
    return made

def chart(r):
    """(which sentence, its parts) of a record about a chart."""
    for n, form in enumerate(SAID[r["language"]][:5]):
        match = re.fullmatch(re.sub(r"\\{(\w)\\}", r"(?P<\1>.+)", re.escape(form)), r["question"])
        if match and values(r) and len(set(values(r).values())) == len(values(r)) and (n == 1) == (r["type"] == "choice"):
            return n, match.groupdict()

def told_in(r, to, question=True, answer=True):
    """A chart's record in another language, in whole or in part."""
    found = chart(r)
    if not found:
        return None
    def named(text):
        for english, (chinese, pinyin) in NAMES.items():
            if text in (english, chinese):
                return chinese if to == "zh" else pinyin if to == "pinyin" else english
        return text
    fields = {}
    if question:
        fields["question"] = SAID[to][found[0]].format(**{k: named(v) for k, v in found[1].items()})
    if answer and r["type"] == "judgement":
        fields["answer"] = SAID[to][6 if r["answer"] in ("Yes", "是") else 7]
    elif answer and r["type"] == "long":
        match = re.fullmatch(re.sub(r"\\{(\w)\\}", r"(?P<\1>.+?)", re.escape(SAID[r["language"]][5])), r["answer"])
        fields["answer"] = SAID[to][5].format(**{k: named(v) for k, v in match.groupdict().items()})
    elif answer:
        fields["answer"] = named(r["answer"])
    return put(r, **fields)

def changed(r, change, where="answer"):
    """The record with its answer (and the right option) changed."""
    new = change(right(r) if where == "answer" else r[where])
    if not new or new in (right(r), r[where]):
        return None
    if where == "answer" and r["options"]:
        options = texts(r)
        return None if new in options else put(r, **lettered([new if t == right(r) else t for t in options], new))
    return put(r, **{where: new})
def swapped(text, pairs):
    table = {a: b for a, b in pairs} | {b: a for a, b in pairs}
    return re.sub("|".join(rf"\b{k}\b" if k.isascii() else k for k in table), lambda m: table[m[0]], text)
def recoloured(r, text, rng):
    """The text with one of its colours changed for one that the caption does not have."""
    found = [c for c in COLOURS[r["language"]] if has(text, c)]
    free = [c for c in COLOURS[r["language"]] if c not in r["caption"]]
    return text.replace(rng.choice(found), rng.choice(free)) if found and free else None

# --- wrong letter
simple(LETTER, RULE, "the right text behind another option's letter", "choice", name="letter_of_another", edit=lambda r, g: put(r, answer=f"{another(r, g)}. {right(r)}"))
simple(LETTER, RULE, "the right letter before another option's text", "choice", name="text_of_another", edit=lambda r, g: put(r, answer=f"{letter(r)}. {g.choice([t for t in texts(r) if t != right(r)])}"))
simple(LETTER, RULE, "the right text, another letter in brackets behind it", "choice", name="letter_behind", edit=lambda r, g: put(r, answer=f"{right(r)} ({another(r, g)})"))
simple(LETTER, RULE, "another letter in another form: (b), Ｂ．, B), B:", "choice", name="letter_in_another_form", edit=lambda r, g: put(r, answer=g.choice(["({0}) ", "{1}．", "{2}) ", "{2}: "]).format((a := another(r, g)).lower(), chr(ord(a) + 0xFEE0), a) + right(r)))
simple(LETTER, RULE, "a sentence that names another letter and the right text", "choice", name="letter_in_a_sentence", edit=lambda r, g: put(r, answer=in_(r, "The correct answer is {}: {}", "正确答案是{}：{}").format(another(r, g), right(r))))
simple(LETTER, RULE, "two letters where one is asked for", "choice", name="two_letters", edit=lambda r, g: put(r, answer=in_(r, " and ", "、").join(sorted([letter(r), another(r, g)]))))
simple(LETTER, RULE, "all letters", "choice", name="all_letters", edit=lambda r, g: put(r, answer=in_(r, ", ", "、").join(o[0] for o in r["options"])))
simple(LETTER, RULE, "the answer takes its letter back for another", "choice", name="letter_taken_back", edit=lambda r, g: put(r, answer=r["answer"] + in_(r, ". Correction: the right answer is {}.", "。更正：正确答案是{}。").format(another(r, g))))
simple(LETTER, RULE, "a number of another place than the right option's", "choice", name="number_of_another", edit=lambda r, g: put(r, answer=f"{LETTERS.index(another(r, g)) + 1}. {right(r)}"))
simple(LETTER, RULE, "options that begin with B, the answer lettered as from A", "choice", name="letters_from_b", edit=lambda r, g: put(r, options=[f"{b}. {t}" for b, t in zip(LETTERS[1:], texts(r))]))
simple(LETTER, JUDGE, "asked for the option that is not right, answered with the right one", "choice", name="asked_for_the_wrong_one", edit=lambda r, g: put(r, question=r["question"] + in_(r, " Choose the option that is not correct.", "请选出不正确的一项。")))
@kind(LETTER, RULE, "another letter alone, whose option the caption lacks while it has the right one", "choice")
def other_letter_alone(r, rng, others):
    wrong = [o[0] for o in r["options"] if not told(r, o[3:])]
    return put(r, answer=rng.choice(wrong)) if wrong and told(r, right(r)) else None
@kind(LETTER, RULE, "another option with its letter, which the caption lacks while it has the right one", "choice")
def other_option(r, rng, others):
    wrong = [o for o in r["options"] if not told(r, o[3:])]
    return put(r, answer=rng.choice(wrong)) if wrong and told(r, right(r)) else None
@kind(LETTER, RULE, "'the third option', which the caption lacks while it has the right one", "choice")
def other_place(r, rng, others):
    wrong = [n for n, t in enumerate(texts(r)) if not told(r, t)]
    if wrong and told(r, right(r)):
        n = rng.choice(wrong)
        return put(r, answer=in_(r, f"the {('first', 'second', 'third', 'fourth')[n]} option", f"第{'一二三四'[n]}个选项"))

# --- no image needed
def blind(name, by, why, *types, **more):
    def register(ask):
        def fault(r, rng, others):
            made = ask(r, rng)
            return put(r, type=made[2] if len(made) > 2 else r["type"], question=made[0], answer=made[1], options=[]) if made else None
        fault.__name__ = name
        kind(BLIND, by, why, *types, **more)(fault)
    return register
def two(r, rng):
    return rng.sample(list(values(r).values()), 2) if len(set(values(r).values())) > 1 else None

blind("numbers_compared", RULE, "two bare numbers are compared", "judgement")(lambda r, g: (v := two(r, g)) and (in_(r, "Is {} greater than {}?", "{}大于{}吗？").format(*v), in_(r, *(("Yes", "是") if float(v[0]) > float(v[1]) else ("No", "否")))))
blind("sum_asked", RULE, "a sum of two bare numbers", "short")(lambda r, g: (v := two(r, g)) and (in_(r, "What is {} plus {}?", "{}加{}等于多少？").format(*v), f"{float(v[0]) + float(v[1]):.5g}"))
blind("letters_counted", RULE, "how many letters a quoted word has", "short")(lambda r, g: (w := right(r).split()[-1]) and w.isalpha() and (in_(r, f'How many letters does the word "{w}" have?', f"“{w}”这个词有几个字？"), str(len(w))))
blind("translation_asked", RULE, "how a quoted word is said in the other language", "short")(lambda r, g: r["answer"] in GLOSS and (in_(r, f'How is "{r["answer"]}" said in Chinese?', f"“{r['answer']}”用英语怎么说？"), GLOSS[r["answer"]]))
blind("is_it_an_image", RULE, "whether the image is an image or can be seen", "judgement")(lambda r, g: (in_(r, *g.choice([("Is this an image?", "这是一张图片吗？"), ("Is there something in the image?", "图片里有东西吗？"), ("Can the image be looked at?", "这张图片可以看吗？"), ("Does the image show what it shows?", "这张图片显示的是它所显示的内容吗？")])), in_(r, "Yes", "是")))
blind("say_it", RULE, "asked to repeat what the instruction says", "short")(lambda r, g: (in_(r, f'Repeat the following: "{r["answer"]}"', f"请重复下面的话：“{r['answer']}”"), r["answer"]))
blind("or_not", RULE, "a question that is yes whatever the image shows", "judgement")(lambda r, g: (in_(r, f"{bare(r)}, or is that not so?", f"{bare(r)}，还是不是这样？"), in_(r, "Yes", "是")))
blind("general_knowledge", JUDGE, "general knowledge about a thing of the caption", "judgement", "short")(lambda r, g: next((q for w, q in KNOWN.items() if has(r["caption"], w) and (q[1] in ("Yes", "No", "是")) == (r["type"] == "judgement")), None))
blind("about_the_reader", JUDGE, "asks about the reader and not the image", "judgement")(lambda r, g: (w := next((w for w in KNOWN if has(r["caption"], w)), None)) and (in_(r, f'Do you know the word "{w}"?', f"你听说过“{w}”吗？"), in_(r, "Yes", "是")))
@blind("is_red_red", RULE, "a red thing: is it red?", "judgement")
def _(r, rng):
    if zh(r):
        found = re.findall(r"([红蓝白灰黑]色|深蓝色)的(柱子|杯子|碟子|胡须|火箭|硬币)", r["caption"])
        return found and ("{0}的{1}是{0}的吗？".format(*rng.choice(found)), "是")
    found = re.findall(r"\b(red|blue|green|orange|white|black|silver|grey|brown)( \w+)? (cup|saucer|bars|trees|suit|flag|box|rocket|motorcycle|silhouette|background|sky|ribbon|hair|whiskers|dahlia|vessels|ground)\b", r["caption"])
    if found:
        colour, between, thing = rng.choice(found)
        return f"{'Are' if thing in ('bars', 'trees', 'whiskers', 'vessels') else 'Is'} the {colour}{between} {thing} {colour}?", "Yes"
@kind(BLIND, RULE, "the sentence of the caption that has the answer stands before the question", "short", "choice")
def caption_in_the_question(r, rng, others):
    found = [s for s in sentences(r["caption"]) if told({**r, "caption": s}, right(r))]
    return put(r, question=f"{found[0]} {r['question']}") if found else None
simple(BLIND, RULE, "the answer in brackets behind the question", "short", name="answer_in_brackets", edit=lambda r, g: put(r, question=f"{r['question']} ({right(r)})"))
simple(BLIND, RULE, "the question says what to answer: 'Answer with yes.'", "judgement", name="told_what_to_answer", edit=lambda r, g: put(r, question=r["question"] + in_(r, f" Answer with {r['answer'].lower()}.", f"请回答“{r['answer']}”。")))
simple(BLIND, RULE, "the right option is marked as such", "choice", name="right_option_marked", edit=lambda r, g: (m := g.choice(in_(r, [" (correct)", " ✓", " <- right answer"], ["（正确）", " ✓", "（答案）"]))) and put(r, options=[o + m * (o == r["answer"]) for o in r["options"]]))
simple(BLIND, RULE, "which letter stands before an option", "choice", name="asked_for_a_letter", edit=lambda r, g: put(r, question=in_(r, f'Which letter stands before "{right(r)}" in the options?', f"选项中“{right(r)}”前面的字母是什么？")))
simple(BLIND, RULE, "the other options say that they are no answers", "choice", name="other_options_out", edit=lambda r, g: put(r, **lettered([t if t == right(r) else w for t, w in zip(texts(r), in_(r, ["not this one", "a wrong answer", "incorrect option", "false"], ["不是这个", "错误答案", "错误选项", "不对"]))], right(r))))

# --- repeated
simple(AGAIN, RULE, "the question again in small letters, without or with other marks", name="again_other_marks", add=True, edit=lambda r, g: put(r, question=in_(r, bare(r).lower(), bare(r)) + g.choice(["", "??", " ?", "...?"])))
simple(AGAIN, RULE, "the question again with a polite opening", name="again_politely", add=True, edit=lambda r, g: put(r, question=g.choice(in_(r, ["Could you tell me: ", "Please answer this: ", "I would like to know: "], ["请问，", "你能告诉我", "我想知道，"])) + r["question"]))
simple(AGAIN, RULE, "the question again with 'in the picture'", name="again_in_the_picture", add=True, edit=lambda r, g: put(r, question=in_(r, "In this picture, " + r["question"][0].lower() + r["question"][1:], "在这张图片中，" + r["question"])))
simple(AGAIN, RULE, "the question again with two letters of a word exchanged", add=True, language="en", name="again_misspelt", edit=lambda r, g: changed(r, lambda q: (w := max(re.findall(r"[a-z]{5,}", q), key=len, default="")) and q.replace(w, w[:2] + w[3] + w[2] + w[4:]), "question"))
simple(AGAIN, RULE, "the question again with a word spelt or chosen otherwise", add=True, name="again_other_word", edit=lambda r, g: changed(r, lambda q: next((q.replace(a, b, 1) for a, b in (("colour", "color"), ("Which value", "What value"), ("lies", "is lying"), ("higher", "taller"), ("highest", "tallest"), ("grey", "gray"), ("show about", "tell about"), ("stands", "is standing"), ("Which animal", "What animal"), ("数值", "值"), ("哪一类", "哪个类别"), ("说明了", "表明了"), ("什么颜色", "哪种颜色")) if a in q), None), "question"))
simple(AGAIN, RULE, "a question with options again as one without", "choice", name="again_without_options", add=True, edit=lambda r, g: put(r, type="short", options=[], answer=right(r)))
simple(AGAIN, RULE, "a question of yes and no again with yes and no as options", "judgement", name="again_with_options", add=True, edit=lambda r, g: put(r, type="choice", **lettered(in_(r, ["Yes", "No"], ["是", "否"]), r["answer"])))
simple(AGAIN, RULE, "another question, the same long answer word for word", "long", name="long_answer_again", add=True, edit=lambda r, g: put(r, question=g.choice(in_(r, ["What else is worth noticing?", "What would change if it were seen from behind?", "What is in the foreground?"], ["还有什么值得注意的？", "从背面看会有什么不同？", "前景里有什么？"]))))
simple(AGAIN, RULE, "the right option twice", "choice", name="right_option_twice", edit=lambda r, g: (w := another(r, g)) and put(r, options=[f"{w}. {right(r)}" if o[0] == w else o for o in r["options"]]))
simple(AGAIN, RULE, "a wrong option twice", "choice", name="wrong_option_twice", edit=lambda r, g: (w := [o for o in r["options"] if o != r["answer"]]) and put(r, options=[f"{o[0]}. {w[0][3:]}" if o == w[1] else o for o in r["options"]]))
simple(AGAIN, RULE, "an option again in another form: a final stop, capitals, 3.430", "choice", name="option_twice_in_another_form", edit=lambda r, g: (w := another(r, g)) and put(r, options=[f"{w}. " + (right(r) + ("0" if "." in right(r) else ".0") if right(r)[0].isdigit() and "e" not in right(r) else right(r) + "。" if zh(r) else g.choice([right(r).upper(), right(r) + ".", "“" + right(r) + "”"])) if o[0] == w else o for o in r["options"]]))
simple(AGAIN, RULE, "the question as the answer", "short", "long", name="question_as_answer", edit=lambda r, g: put(r, answer=r["question"]))
simple(AGAIN, RULE, "the answer says only what was asked", "short", "long", name="answer_only_restates", edit=lambda r, g: put(r, answer=in_(r, "The question is: {0} The answer to this is the answer to: {0}", "问题是：{0}这个问题的答案就是“{0}”的答案。").format(r["question"])))
simple(AGAIN, RULE, "the last sentence four times", "long", name="sentence_loop", edit=lambda r, g: put(r, answer=r["answer"] + (in_(r, " ", "") + sentences(r["answer"])[-1]) * 3))
simple(AGAIN, RULE, "a few words again and again, to the end", "long", name="phrase_loop", edit=lambda r, g: put(r, answer=join(r, (w := words(r, r["answer"]))[:(n := g.randrange(len(w) // 2, len(w) - 4))] + w[n - 4:n] * 6)))
simple(AGAIN, RULE, "a word again and again", "short", name="word_loop", edit=lambda r, g: put(r, answer=in_(r, " ", "").join([r["answer"]] * g.randrange(4, 9))))
simple(AGAIN, RULE, "the question twice in one", name="question_twice_in_one", edit=lambda r, g: put(r, question=r["question"] + in_(r, " ", "") + r["question"]))
simple(AGAIN, RULE, "every word twice", language="en", name="every_word_twice", edit=lambda r, g: put(r, question=" ".join(w + " " + w for w in bare(r).split()) + "?"))
simple(AGAIN, RULE, "a numbered list of one sentence", "long", name="list_of_one_sentence", edit=lambda r, g: put(r, answer="\n".join(f"{n}. {sentences(r['answer'])[-1]}" for n in range(1, 5))))
simple(AGAIN, RULE, "the first sentence again at the end", "long", name="first_sentence_again", edit=lambda r, g: put(r, answer=r["answer"] + in_(r, " ", "") + sentences(r["answer"])[0]))
simple(AGAIN, RULE, "all options as the answer", "choice", name="all_options_as_answer", edit=lambda r, g: put(r, answer=" ".join(r["options"])))
simple(AGAIN, JUDGE, "the same comparison from the other side", "judgement", name="again_from_the_other_side", add=True, edit=lambda r, g: (c := chart(r)) and put(r, question=in_(r, "Is the bar of {b} lower than that of {a}?", "{b}的柱子比{a}的低吗？").format(**c[1])))
simple(AGAIN, JUDGE, "the same in quite other words", "choice", "short", "long", name="again_in_other_words", add=True, edit=lambda r, g: (c := chart(r)) and put(r, question=in_(r, ["", "How much does {a} amount to?", "How far up does the column for {a} reach?", "Whose column tops all others?", "How would you sum up the data on {t}?"], ["", "{a}对应多大的数？", "代表{a}的那根柱子有多高？", "最大的数值属于哪一类？", "请概括图中关于 {t} 的信息。"])[c[0]].format(**c[1])))

# --- contradicting
simple(AGAINST, RULE, "yes for no about two numbers of the caption", "judgement", name="comparison_flipped", edit=lambda r, g: put(r, answer=flipped(r["answer"])) if chart(r) else None)
simple(AGAINST, JUDGE, "yes for no about a photograph", "judgement", name="photo_flipped", edit=lambda r, g: None if values(r) else put(r, answer=flipped(r["answer"])))
simple(AGAINST, RULE, "lower for higher in the question", "judgement", name="comparison_turned", edit=lambda r, g: chart(r) and put(r, question=r["question"].replace("higher", "lower").replace("的高吗", "的低吗")))
simple(AGAINST, RULE, "yes, so the answer is no", "judgement", name="yes_so_no", edit=lambda r, g: put(r, answer=r["answer"] + in_(r, f", so the answer is {flipped(r['answer']).lower()}.", f"，所以答案是“{flipped(r['answer'])}”。")))
simple(AGAINST, RULE, "both yes and no", "judgement", name="yes_and_no", edit=lambda r, g: put(r, answer=r["answer"] + in_(r, " / ", "/") + flipped(r["answer"])))
simple(AGAINST, RULE, "the same question again, the other answer", "judgement", name="again_other_answer", add=True, edit=lambda r, g: put(r, answer=flipped(r["answer"])))
simple(AGAINST, RULE, "the same question again with 'in the picture', another colour", "short", name="again_other_colour", add=True, edit=lambda r, g: (a := recoloured(r, r["answer"], g)) and put(r, answer=a, question=in_(r, "In the picture, " + r["question"][0].lower() + r["question"][1:], "图片中，" + r["question"])))
simple(AGAINST, RULE, "a number with a digit changed; the caption has the right one", "short", "choice", "long", name="digit_changed", edit=lambda r, g: changed(r, lambda a: re.sub(r"\d(?=\D*$)", lambda m: str((int(m[0]) + g.randrange(2, 8)) % 10), a, count=1)) if values(r) else None)
simple(AGAINST, RULE, "a number with two digits exchanged", "short", "choice", "long", name="digits_exchanged", edit=lambda r, g: changed(r, lambda a: re.sub(r"(\d)(\.?)([1-9])(?![\d.]*\d)", lambda m: m[3] + m[2] + m[1], a, count=1)) if values(r) else None)
simple(AGAINST, RULE, "a number with its point moved", "short", "choice", "long", name="point_moved", edit=lambda r, g: changed(r, lambda a: re.sub(r"(\d+)\.(\d)(\d*)", lambda m: (m[1] + m[2]).lstrip("0") + ("." + m[3] if m[3] else "") if m[1] != "0" else f"0.0{m[2]}{m[3]}", a, count=1)) if values(r) else None)
simple(AGAINST, RULE, "the value of another class", "short", name="value_of_another_class", edit=lambda r, g: (c := chart(r)) and c[0] == 2 and put(r, answer=g.choice([v for k, v in values(r).items() if v != r["answer"]])) or None)
simple(AGAINST, RULE, "the lowest for the highest", "short", name="lowest_for_highest", edit=lambda r, g: (c := chart(r)) and c[0] == 3 and put(r, answer=min(values(r), key=lambda k: float(values(r)[k]))) or None)
simple(AGAINST, RULE, "highest and lowest exchanged, with their numbers left", "long", name="highest_and_lowest_exchanged", edit=lambda r, g: chart(r) and changed(r, lambda a: swapped(a, [("highest", "lowest"), ("最高", "最低")])))
simple(AGAINST, RULE, "yes or no, with a comparison of numbers that is false", "judgement", name="false_reason", edit=lambda r, g: chart(r) and (v := sorted(values(r).values(), key=float)) and v[0] != v[-1] and put(r, answer=r["answer"] + in_(r, f", because {v[0]} is greater than {v[-1]}.", f"，因为{v[0]}大于{v[-1]}。")) or None)
simple(AGAINST, RULE, "a colour that the caption lacks, in a short answer", "short", "choice", name="other_colour", edit=lambda r, g: changed(r, lambda a: recoloured(r, a, g)))
simple(AGAINST, RULE, "a colour that the caption lacks, in a long answer", "long", name="other_colour_in_a_long_answer", edit=lambda r, g: changed(r, lambda a: recoloured(r, a, g)))
simple(AGAINST, RULE, "the question gives a thing another colour than the caption", name="other_colour_in_the_question", edit=lambda r, g: (m := re.search(r"([红蓝白深])色的(柱子|碟子|杯子|胡须|火箭|表面)" if zh(r) else r"\b(blue|red|white|orange)(?: space)? (bars?|saucer|cup|background|suit|box|motorcycle|rocket|dahlia|ground)\b", r["caption"])) and (thing := m[2].rstrip("s")) in r["question"] and put(r, question=r["question"].replace(thing, (c := g.choice([c for c in COLOURS[r["language"]] if c not in r["caption"]])) + in_(r, " ", "色") + thing, 1)) or None)
simple(AGAINST, JUDGE, "left for right, top for bottom", "short", "long", name="sides_exchanged", edit=lambda r, g: changed(r, lambda a: swapped(a, [("left", "right"), ("top", "bottom"), ("upper", "lower"), ("左", "右")])))
simple(AGAINST, RULE, "another count than the caption's", "short", "long", "choice", name="other_count", edit=lambda r, g: changed(r, lambda a: re.sub(r"\b(four|six|24)\b|\b[23](?= classes)|[23](?=个类别)|[四六](?=[枚行])|二十四(?=枚)", lambda m: "七" if m[0] in "四六" else "三十五" if m[0] == "二十四" else "35" if m[0] == "24" else "nine" if m[0].isalpha() else "7", a, count=1)))
simple(AGAINST, JUDGE, "'not' put into a long answer", "long", name="not_put_in", edit=lambda r, g: changed(r, lambda a: next((re.sub(p, t, a, count=1) for p, t in ((r"\b(is|are|was|has)\b(?! not| no\b)", r"\1 not"), (r"wears", "does not wear"), (r"最高", "不是最高"), (r"带有", "没有"), (r"放在", "没有放在"), (r"竖立", "没有竖立"), (r"排成", "没有排成")) if re.search(p, a)), None)))
simple(AGAINST, RULE, "denies at its end what it has named", "long", name="denied_at_the_end", edit=lambda r, g: (found := [w for w in in_(r, ("suit", "helmet", "camera", "tripod", "cat", "cup", "spoon", "coins", "roofs", "columns", "bench", "shelves", "rocket", "silhouette", "crater", "ribbon", "snake", "bar"), ("柱子", "杯子", "碟子", "条纹", "胡须", "火箭", "硬币")) if has(r["answer"], w)]) and put(r, answer=r["answer"] + in_(r, " However, there is no {} in the picture.", "不过，图中没有{}。").format(g.choice(found))))
simple(AGAINST, RULE, "opposites of the caption's words in a long answer", "long", name="opposite_words", edit=lambda r, g: changed(r, lambda a: next((re.sub(rf"\b{w}\b" if w.isascii() else w, o, a) for w, o in (("round", "square"), ("curved", "straight"), ("black", "white"), ("by hand", "by machine"), ("creased", "smooth"), ("light brown", "pale pink"), ("smaller", "larger"), ("upright", "upside down"), ("large", "tiny"), ("printed", "handwritten"), ("dark", "bright"), ("behind", "in front of"), ("竖立", "横躺"), ("浅棕色", "深紫色"), ("木桌", "玻璃桌"), ("亮起", "熄灭")) if has(a, w) and has(r["caption"], w) and not has(r["caption"], o)), None)))
simple(AGAINST, RULE, "the title of another chart", "long", name="title_of_another", edit=lambda r, g: (c := chart(r)) and put(r, question=r["question"].replace(c[1]["t"], g.choice([t for o in POOL if (d := chart(o)) and d[0] == 4 and (t := d[1]["t"]) not in r["caption"] and c[1]["t"] not in t]))))
@kind(AGAINST, RULE, "the right option gives way to a thing of another image", "choice")
def right_option_of_another(r, rng, others):
    found = [right(o) for o in POOL if o["type"] == "choice" and o["language"] == r["language"] and bool(values(o)) == bool(values(r)) and not told(r, right(o))]
    return changed(r, lambda a: rng.choice(found)) if told(r, right(r)) else None
@kind(AGAINST, RULE, "the answer of a like question about another image, which the caption lacks", "short")
def answer_of_another_image(r, rng, others):
    def like(q): return bool(re.search("colour|颜色", q)), bool(re.search("value|数值", q)), q.split()[0]
    found = [o["answer"] for o in POOL if o["type"] == "short" and o["language"] == r["language"] and like(o["question"]) == like(r["question"]) and not told(r, o["answer"])]
    return put(r, answer=rng.choice(found)) if found and told(r, r["answer"]) else None
@kind(AGAINST, RULE, "question and answer about another image, of whose things the caption has none", "short", "choice")
def about_another_image(r, rng, others):
    def nouns(o): return {w for w in re.findall(r"[a-z_\d]{4,}", (o["question"] + " " + o["caption"]).lower())} if not zh(o) else set(NAMES_ZH) & set(re.findall("|".join(NAMES_ZH), o["caption"]))
    def asked(o): return [w for w in re.findall(r"[a-z_\d]{4,}", o["question"].lower()) if w not in COMMON] if not zh(o) else re.findall("|".join(NAMES_ZH), o["question"])
    found = [o for o in POOL if o["type"] == r["type"] and o["language"] == r["language"] and asked(o) and not set(asked(o)) & nouns(r)
             and not told(r, right(o)) and (zh(r) or any(has(o["caption"], w) for w in asked(o)))]
    return put(r, **{k: (o := rng.choice(found) if k == "question" else o)[k] for k in ("question", "options", "answer")}) if found else None

COMMON = {"what", "which", "colour", "does", "have", "lies", "show", "value", "class", "stands", "where", "many", "there", "most", "highest"}
NAMES_ZH = [z for z, _ in NAMES.values()] + ["柱子", "碟子", "杯子", "胡须", "眼睛", "火箭", "硬币"]

# --- malformed
def form(name, why, edit, *types, **more):
    simple(FORM, RULE, why, *types, name=name, edit=edit, **more)
def part(r, g): return g.choice(["question", "answer"])
def around(r, g, first, last="", where=None): return put(r, **{(w := where or part(r, g)): first + r[w] + last})
form("answer_not_closed", "no </A1>", lambda r, g: put(r, raw=raw(r)[:-5]))
form("question_not_closed", "no </Q1>", lambda r, g: put(r, raw=raw(r).replace("</Q1>", "")))
form("numbers_of_tags_differ", "<Q1> and <A2>", lambda r, g: put(r, raw=raw(r).replace("A1>", "A2>")))
form("no_answer_at_all", "the reply stops behind the question", lambda r, g: put(r, raw=raw(r).split("<A1>")[0]))
form("answer_tag_twice", "two answers in one instruction", lambda r, g: put(r, raw=raw(r) + f"<A1>{r['answer']}</A1>"))
form("tag_left_in", "a tag within a text", lambda r, g: around(r, g, *g.choice([("<Q1>", ""), ("", "</A1>"), ("<answer>", "</answer>"), ("<question>", ""), ("", "<C1>"), ("", "<br/>")])))
form("label_left_in", "Question: or Answer: within the text", lambda r, g: (w := part(r, g)) and around(r, g, in_(r, {"question": "Question: ", "answer": "Answer: "}, {"question": "问题：", "answer": "答案："})[w], "", w))
form("number_left_in", "the number in the list before the question", lambda r, g: around(r, g, g.choice(["1. ", "Q3: ", "(2) ", "- ", "3) "]), "", "question"))
form("option_missing", "A, B and D, the answer's among them", lambda r, g: (w := another(r, g)) != "D" and put(r, options=[o for o in r["options"] if o[0] != w]) or None, "choice")
form("right_option_missing", "the answer's option is not among the options", lambda r, g: put(r, options=[o for o in r["options"] if o != r["answer"]]), "choice")
form("one_option", "a single option", lambda r, g: put(r, options=["A. " + right(r)], answer="A. " + right(r)), "choice")
form("no_options", "no options, the answer with its letter", lambda r, g: put(r, options=[]), "choice")
form("letter_outside", "a letter that no option has", lambda r, g: put(r, answer=g.choice("EFGX") + g.choice(["", ". " + right(r)])), "choice")
form("same_letter_twice", "two options with one letter", lambda r, g: put(r, options=[o.replace("C.", "B.", 1) if o[:2] == "C." else o for o in r["options"]]), "choice")
form("option_empty", "a letter without a text", lambda r, g: (w := another(r, g)) and put(r, options=[o[:2] if o[0] == w else o for o in r["options"]]), "choice")
form("option_placeholder", "an option that stands for one", lambda r, g: (w := another(r, g)) and put(r, options=[f"{w}. " + g.choice(in_(r, ["option " + w, "[option]", "N/A", "...", "wrong answer 2", "TBD"], ["选项" + w, "[选项]", "无内容", "……", "待补充"])) if o[0] == w else o for o in r["options"]]), "choice")
form("options_in_one", "all options in one", lambda r, g: put(r, options=["A. " + in_(r, ", ", "、").join(texts(r))]), "choice")
form("letter_twice", "the letter before the option twice", lambda r, g: put(r, options=[f"{o[0]}. {o}" for o in r["options"]]), "choice")
form("answer_empty", "an empty answer", lambda r, g: put(r, answer=g.choice(["", " ", "\n"])))
form("question_empty", "an empty question", lambda r, g: put(r, question=g.choice(["", "?", "？"])))
form("marks_only", "an answer of marks alone", lambda r, g: put(r, answer=g.choice(["...", "—", "……", "**", "?", "()", "。"])))
form("nothing_value", "null, None, undefined, NaN", lambda r, g: put(r, **{part(r, g): g.choice(["null", "None", "undefined", "NaN", "nil"])}))
form("cut_in_a_word", "a long answer that stops within a word, in Chinese after 为", lambda r, g: put(r, answer=(m := list(re.finditer(r"，.(?=.)" if zh(r) else r"[a-z]{3}(?=[a-z]{3})", r["answer"]))) and r["answer"][:m[-1].end()]), "long")
form("cut_after_a_small_word", "a long answer that stops after and, of, the; 和, 的", lambda r, g: (m := list(re.finditer(r"而|，因此|，所以|的(?=.*，)" if zh(r) else r"\b(and|of|the|with|a|in)\b(?= )", r["answer"]))) and put(r, answer=r["answer"][:m[-1].end()]) or None, "long")
form("question_cut", "the question stops after a word that cannot be its last", lambda r, g: (m := list(re.finditer(r"(的|比|了)(?=.{2})" if zh(r) else r"\b(is|are|the|does|do|a|of|that|to|has|would)\b(?= )", r["question"]))) and put(r, question=r["question"][:g.choice(m).end()]) or None)
form("marked_up", "Markdown", lambda r, g: around(r, g, *g.choice([("**", "**"), ("## ", ""), ("`", "`"), ("> ", ""), ("***", "***"), ("[", "](#)")])))
form("html", "HTML tags or entities", lambda r, g: around(r, g, *g.choice([("<p>", "</p>"), ("<b>", "</b>"), ("&quot;", "&quot;"), ("", "&nbsp;"), ("<span style='color:red'>", "</span>"), ("&lt;", "&gt;")])))
form("latex_around_text", "words in commands of LaTeX", lambda r, g: around(r, g, *g.choice([(r"\text{", "}"), (r"$\mathrm{", "}$"), (r"\boxed{", "}"), (r"\textbf{", "}"), (r"\begin{answer}", "")])))
form("placeholder_in_question", "[object] for a thing of the question", lambda r, g: (w := "柱子" if zh(r) and "柱子" in r["question"] else max(re.findall(r"[a-z]{4,}|[\u4e00-\u9fff]{2}(?=的|是|上)", bare(r)), key=len, default="")) and put(r, question=r["question"].replace(w, g.choice(in_(r, ["[object]", "<object>", "{thing}", "{{name}}", "XXX", "[insert object here]"], ["[物体]", "<物体>", "{名称}", "某某某", "XXX"])), 1)) or None)
form("placeholder_as_answer", "[answer], TODO", lambda r, g: put(r, answer=g.choice(in_(r, ["[answer]", "TODO", "<your answer>", "{answer}", "XX", "(answer here)", "to be filled in"], ["[答案]", "TODO", "<答案>", "{答案}", "待填", "（此处填写答案）"]))))
form("role_named", "User:, Assistant: or 用户：", lambda r, g: (w := part(r, g)) and around(r, g, g.choice(in_(r, {"question": ["User: ", "Human: ", "USER: "], "answer": ["Assistant: ", "AI: ", "ASSISTANT: ", "GPT: "]}, {"question": ["用户：", "问："], "answer": ["助手：", "答：", "Assistant: "]})[w]), "", w))
form("special_token", "tokens of a chat template", lambda r, g: around(r, g, *g.choice([("", "<|im_end|>"), ("<|im_start|>assistant\n", ""), ("[INST] ", " [/INST]"), ("", "</s>"), ("", "<|eot_id|>"), ("<image>\n", ""), ("", "<|endoftext|>"), ("<s>", "")])))
form("json_remains", "remains of JSON around the text", lambda r, g: (w := part(r, g)) and around(r, g, *g.choice([(f'"{w}": "', '"'), ("", '"},'), ("", '"}]'), ("{", ""), (f'{{"{w}": "', '"}')]), w))
form("json_whole", "the whole record as JSON in a text", lambda r, g: put(r, **{part(r, g): json.dumps({k: r[k] for k in ("question", "answer")}, ensure_ascii=False)}))
form("python_list", "options or answer as Python would print them", lambda r, g: put(r, options=[str(texts(r))], answer=str([right(r)])), "choice")
form("escapes", "written escapes", lambda r, g: (w := part(r, g)) and put(r, **{w: json.dumps(r[w])[1:-1] if zh(r) and not r[w].isascii() else g.choice([r"{}\n", r"\"{}\"", r"{}\t", r"\u0020{}"]).format(r[w])}))
form("wrong_encoding", "UTF-8 read as Latin-1", lambda r, g: (w := "question" if zh(r) else part(r, g)) and put(r, **{w: r[w].encode().decode("latin-1") if zh(r) else "â€œ" + r[w] + "â€\x9d"}))
form("gbk_read_as_utf8", "UTF-8 read as GBK", lambda r, g: put(r, question=r["question"].encode().decode("gbk", "replace")), language="zh")
form("replacement_signs", "� for some letters", lambda r, g: (w := part(r, g)) and put(r, **{w: r[w][:(n := g.randrange(len(r[w])))] + "��" + r[w][n + 1:]}))
form("control_signs", "invisible and control characters", lambda r, g: (w := part(r, g)) and put(r, **{w: r[w][:1] + g.choice("\x00\x08\x1b\x7f\x03") + r[w][1:]}))
form("preamble", "the writer's opening before the question", lambda r, g: around(r, g, g.choice(in_(r, ["Sure! Here are the questions:\n", "Here is a question about the image: ", "Certainly, here you go: "], ["好的，以下是问题：\n", "当然可以！下面是根据要求生成的问题：", "以下是一个判断题："])), "", "question"))
form("note_of_the_writer", "the writer's note behind the answer", lambda r, g: around(r, g, "", g.choice(in_(r, [" (Note: I kept the answer short as requested.)", " Let me know if you need more questions!", " [end of question 1]", " I hope this helps."], ["（注：已按要求保持简短）", "如果需要更多问题，请告诉我！", "【第1题完】", "希望对您有帮助。"])), "answer"))
form("thinking", "a thinking model's thoughts", lambda r, g: around(r, g, g.choice(in_(r, ["<think>The user wants an instruction.</think>", "Okay, let me think about what to ask. ", "</think>\n"], ["<think>用户想要一条指令。</think>", "好的，我先想一想该怎么写。", "</think>\n"]))))
form("fence", "a fence of code", lambda r, g: around(r, g, *g.choice([("```\n", "\n```"), ("```json\n", "\n```"), ("", "\n```"), ("```", "```")])))
form("fields_exchanged", "the question for the answer and the other way round", lambda r, g: put(r, question=r["answer"], answer=r["question"]))
form("statement_for_question", "a sentence that asks nothing", lambda r, g: put(r, question=sentences(r["caption"])[0]), "judgement", "short", "choice")
form("answer_in_the_question_field", "question and answer in one, the answer again", lambda r, g: around(r, g, "", in_(r, " ", "") + r["answer"], "question"))
form("setting_left_in", "a setting of the prompt within the question", lambda r, g: around(r, g, "", g.choice([" [type: {}]", " (difficulty: easy)", " #{}", " | domain={}", " (20-50 words, no yes/no)"]).format(g.choice([r["type"], r["domain"]])), "question"))
form("citation", "citations of nothing", lambda r, g: around(r, g, "", g.choice([" [1]", "【3†source】", " [citation needed]", " (https://example.com/image.png)", " [^2]"]), "answer"))
form("boxes", "tokens of boxes and places", lambda r, g: around(r, g, "", g.choice(["<box>[[112,40,388,512]]</box>", " <loc_112><loc_388>", "<ref>", " <|box_start|>(12,40),(388,512)<|box_end|>"])))
form("no_spaces", "all words in one", lambda r, g: put(r, question=r["question"].replace(" ", "")), language="en")
form("spaced_letters", "a space behind every letter", lambda r, g: put(r, question=" ".join(r["question"].replace(" ", ""))), language="en")
form("wide_or_foreign_letters", "full-width letters, or Cyrillic ones that look the same", lambda r, g: put(r, question=g.choice([lambda q: "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in q), lambda q: q.translate(str.maketrans("aeopc", "аеорс"))])(r["question"])), language="en")
form("not_yes_or_no", "a question of yes and no answered with a thing of the caption", lambda r, g: put(r, answer=g.choice(list(values(r).values()) or [w for w in in_(r, ("red", "blue", "grey", "white", "black", "orange", "brown", "green"), ("红色", "白色", "灰色")) if w in r["caption"]])), "judgement")
form("reversed", "the letters from the last to the first", lambda r, g: put(r, question=r["question"][::-1]))
form("words_shuffled", "the words in no order", lambda r, g: (w := words(r, bare(r).lower())) and (g.shuffle(w) or put(r, question=join(r, w) + "?")))

# --- wrong language
def tongue(name, why, edit, *types, by=RULE, **more):
    simple(LANGUAGE, by, why, *types, name=name, edit=edit, **more)
def other(r): return in_(r, "zh", "en")
def cyrillic(text): return text.lower().translate(str.maketrans("abcdefghijklmnopqrstuvwxyz", "абцдефгхийклмнопкрстувшхыз"))
def known(r, text): return [w for w in GLOSS if len(w) > 1 and w.isascii() != zh(r) and has(text, w)]
tongue("all_in_the_other", "question and answer in the other language", lambda r, g: told_in(r, other(r)))
tongue("question_in_the_other", "the question in the other language", lambda r, g: told_in(r, other(r), answer=False))
tongue("answer_in_the_other", "the answer in the other language", lambda r, g: put(r, answer=GLOSS[r["answer"]]) if r["answer"] in GLOSS else None if zh(r) and r["type"] == "short" else told_in(r, other(r), question=False), "judgement", "short", "long")
tongue("yes_in_a_third", "oui, ja, はい", lambda r, g: put(r, answer=SAID[g.choice(THIRD[:2] + THIRD[3:])][6 if r["answer"] in ("Yes", "是") else 7]), "judgement")
tongue("all_in_a_third", "question and answer in a third language", lambda r, g: told_in(r, g.choice(THIRD)), "short", "long", "judgement")
tongue("question_in_a_third", "the question in a third language", lambda r, g: told_in(r, g.choice(THIRD), answer=False))
tongue("long_answer_in_a_third", "the long answer in a third language", lambda r, g: told_in(r, g.choice(THIRD), question=False), "long")
tongue("pinyin", "Chinese in Latin letters", lambda r, g: told_in(r, "pinyin"), "judgement", "short", "long", language="zh")
tongue("pinyin_in_english", "the question in pinyin in an English record", lambda r, g: told_in(r, "pinyin", answer=False), language="en")
tongue("pinyin_name", "a name in Latin letters in a Chinese question", lambda r, g: changed(r, lambda q: next((q.replace(z, p) for z, p in sorted(NAMES.values(), reverse=True) if z in q), None), "question"), language="zh")
tongue("cyrillic", "English in Cyrillic letters", lambda r, g: put(r, **{(w := "question" if r["type"] != "long" else part(r, g)): cyrillic(r[w])}), language="en")
tongue("word_in_the_other", "one word of the question in the other language", lambda r, g: (w := known(r, r["question"])) and (v := max(w, key=len)) and put(r, question=re.sub(rf"\b{v}\b" if v.isascii() else v, in_(r, GLOSS[v], " " + GLOSS[v] + " "), r["question"], count=1)) or None)
tongue("word_in_a_long_answer", "one word of a long answer in the other language", lambda r, g: (w := known(r, r["answer"])) and (v := g.choice(w)) and put(r, answer=re.sub(rf"\b{v}\b" if v.isascii() else v, in_(r, GLOSS[v], " " + GLOSS[v] + " "), r["answer"], count=1)) or None, "long")
tongue("option_in_the_other", "some options in the other language", lambda r, g: (w := [t for t in texts(r) if t in GLOSS]) and put(r, **lettered([GLOSS.get(t, t) for t in texts(r)], GLOSS.get(right(r), right(r)))) or None, "choice")
tongue("in_both", "the question in both languages", lambda r, g: (t := told_in(r, other(r))) and put(r, question=r["question"] + in_(r, " ", "") + t["question"]))
tongue("answer_in_both", "the answer with its translation in brackets", lambda r, g: r["answer"] in GLOSS and put(r, answer=f"{r['answer']} ({GLOSS[r['answer']]})") or None, "short")
tongue("half_in_the_other", "a long answer that changes its language", lambda r, g: (t := told_in(r, other(r))) and put(r, answer=r["answer"][:(m := re.search(r"with [\d.]+, |为[\d.]+，", r["answer"])).end()] + t["answer"][re.search(r"with [\d.]+, |为[\d.]+，", t["answer"]).end():]), "long")
tongue("third_at_the_end", "a long answer that ends in a third language", lambda r, g: around(r, g, "", in_(r, " ", "") + g.choice(["Das ist alles, was man sehen kann.", "C'est tout ce que l'on peut voir.", "Это всё, что можно увидеть.", "これが見えるすべてです。", "이것이 볼 수 있는 전부입니다.", "Eso es todo lo que se puede ver."]), "answer"), "long")
tongue("kana", "Japanese particles in Chinese", lambda r, g: changed(r, lambda q: q.replace("的", "の").replace("是", "は").replace("比", "より").replace("吗", "か"), "question"), language="zh")
tongue("english_grammar_words", "English small words in Chinese", lambda r, g: changed(r, lambda q: q.replace("的", " of ", 1).replace("是", " is ", 1).replace("比", " than ", 1).replace("吗", ", right").replace("了", " has "), "question"), language="zh")
tongue("chinese_grammar_words", "Chinese small words in English", lambda r, g: changed(r, lambda q: re.sub(r"^(Which|What)\b", "什么", re.sub(r"\bof\b", "的", re.sub(r"\b(is|are)\b", "是", q, count=1, flags=re.I), count=1)), "question"), language="en")
tongue("told_in_the_other", "an order in the other language behind the question", lambda r, g: around(r, g, "", in_(r, g.choice(["请用一个词或短语回答。", "请直接回答。", "请根据图片作答。"]), g.choice([" Answer the question briefly.", " Please answer in a word or phrase.", " Look at the image and answer."])), "question"))
