"""What a captioner, a writer of instructions and judges say, by the request alone: the `text` of a `StubServer`."""

import hashlib
import json
import re

from mpo.generation.generator import Response

THINGS = "kettle ladder violin anchor basket lantern saddle trumpet bucket compass".split()
COLOURS = {"red": "红", "green": "绿", "blue": "蓝", "yellow": "黄", "white": "白", "black": "黑", "brown": "棕", "pink": "粉"}
PLACES = "window shelf floor wall table ceiling corner door garden light chair carpet cupboard plant clock".split()
ADJECTIVES = "tall dusty narrow bright wooden low round heavy quiet soft plain old striped open broad".split()
ORTE = "窗户 书架 地板 墙壁 桌子 天花板 墙角 房门 花园 灯光 椅子 地毯 柜子 盆栽 时钟".split()
WIE = "高大 积灰 狭长 明亮 木制 低矮 圆形 沉重 幽静 柔和 素净 陈旧 条纹 敞开 宽阔".split()
KINDS = {"yes-or-no": "judgement", "判断题": "judgement", "multiple-choice": "choice", "单项": "choice"}
KINDS |= {"dialogue": "dialogue", "对话": "dialogue", "detailed": "long", "详细": "long"}


def caption(seed, chinese=False):
    """A caption that is long enough, of a thing with a colour that follow from a number."""
    thing, (colour, zh) = THINGS[seed % 10], [*COLOURS.items()][seed // 10 % 8]
    pairs = list(zip(WIE, ORTE, strict=True) if chinese else zip(ADJECTIVES, PLACES, strict=True))
    if chinese:
        return f"图中是一个{zh}色的{thing}。" + "".join(f"旁边能够看到{how}的{what}，位置清楚。" for how, what in pairs)
    return f"The image shows a {colour} {thing}. " + " ".join(
        f"Near it one can see a {how} {what} in its place." for how, what in pairs
    )


def items(said, chinese=False):
    """Instructions about a caption by type, as (question, options, answer)."""
    if chinese:
        colour, thing = re.search(r"图中是一个(.)色的(\w+?)。", said).groups()
        others = [one for one in COLOURS.values() if one != colour][:3]
        return {
            "judgement": [(f"{thing}是{one}色的吗？", [], "是" if one == colour else "否") for one in (colour, others[0])],
            "choice": [(f"{thing}是什么颜色？", [f"{one}色" for one in (others[0], colour, *others[1:])], f"{colour}色")],
            "long": [(f"请描述{thing}及其周围。", [], f"画面中有一个{colour}色的{thing}，旁边有高大的窗户和积灰的书架。")],
            "short": [(f"{thing}的颜色是哪一种？", [], f"{colour}色")],
            "dialogue": [
                ("图中画的是哪种物品？", [], thing),
                ("它是什么颜色？", [], f"{colour}色"),
                ("它旁边的书架积灰吗？", [], "是"),
            ],
        }
    colour, thing = re.search(r"shows a (\w+) (\w+)\.", said).groups()
    others = [one for one in COLOURS if one != colour][:3]
    return {
        "judgement": [(f"Is the {thing} {one}?", [], "Yes" if one == colour else "No") for one in (colour, others[0])],
        "choice": [(f"What colour is the {thing}?", [others[0], colour, *others[1:]], colour)],
        "long": [(f"What surrounds the {thing}?", [], f"The {thing} is surrounded by a tall window and a dusty shelf.")],
        "short": [(f"In which colour is the {thing} painted?", [], colour)],
        "dialogue": [
            ("Which object does the image show?", [], thing),
            ("What colour is it?", [], colour),
            ("And is the shelf near it dusty?", [], "Yes"),
        ],
    }


def tagged(found):
    """Instructions as `mpo mminstruct generate` asks for them."""
    lines = []
    for at, (question, options, answer) in enumerate(found, 1):
        listed = "\n".join(f"{chr(64 + place)}. {one}" for place, one in enumerate(options, 1))
        said = f"{chr(65 + options.index(answer))}. {answer}" if options else answer
        lines.append(f"<Q{at}>{question}</Q{at}>" + f"<C{at}>{listed}</C{at}>" * bool(options) + f"<A{at}>{said}</A{at}>")
    return "\n".join(lines)


def tell(body, number=0):
    """The response to a request."""
    content = body["messages"][-1]["content"]
    sees = not isinstance(content, str)
    asked = "".join(one.get("text", "") for one in content) if sees else content
    if body["max_tokens"] == 1:
        return "A"
    if sees:
        seed = int.from_bytes(hashlib.sha256(json.dumps(content[0]).encode()).digest()[:6], "big")
        return ["landmark", "artwork"][seed % 2] if "fits this image best" in asked else caption(seed, "请为" in asked)
    if "cannot see" in asked or "你看不到的图片" in asked:
        return "NO" if "YES" in asked else "UNKNOWN"
    if "Verdict:" in asked:
        return "It says so.\nVerdict: SUPPORTED"
    chinese = "下面是一张图片的描述" in asked
    head, _, rest = asked.partition("描述：" if chinese else "Description:")
    found = items(rest, chinese)[next((kind for word, kind in KINDS.items() if word in head), "short")]
    if "response_format" in body:
        listed = [[f"{chr(65 + at)}. {one}" for at, one in enumerate(options)] for _, options, _ in found]
        given = [
            dict(zip(("question", "choices", "answer"), (one[0], own, one[2]), strict=True))
            for one, own in zip(found, listed, strict=True)
        ]
        return json.dumps({"items": given}, ensure_ascii=False)
    return tagged(found)


class Says:
    """A model that says what a function of the prompt says."""

    def __init__(self, say):
        self.say = say

    def identity(self):
        return {"model": "says"}

    async def stream(self, requests, *, n=1, concurrency=None, **settings):
        place = 0
        async for item in requests:
            request, samples = item if isinstance(item, tuple) else (item, range(n))
            for sample in samples:
                said = self.say("".join(one.get("text", "") for one in request.messages[-1]["content"]))
                yield place, sample, Response(said, "stop", 1, 1)
            place += 1
