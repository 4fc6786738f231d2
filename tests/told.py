"""What a captioner and a writer of instructions say about images, by the request alone: for `StubServer`."""

import hashlib
import json
import re

THINGS = "kettle ladder violin anchor basket lantern saddle trumpet bucket compass".split()
COLOURS = "red green blue yellow white black brown orange".split()
ZH = {"red": "红", "green": "绿", "blue": "蓝", "yellow": "黄", "white": "白", "black": "黑", "brown": "棕", "orange": "橙"}


def number_of(text):
    return int.from_bytes(hashlib.sha256(str(text).encode()).digest()[:6], "big")


def caption(seed, chinese=False):
    """A caption of 120 words or 200 characters, or more, of a thing with a colour that follow from the image."""
    thing, colour = THINGS[seed % 10], COLOURS[seed // 10 % 8]
    if chinese:
        parts = "画面左侧有窗户 右侧摆着书架 地板由木板铺成 墙面贴着浅色壁纸 桌上放着瓷杯 天花板挂着吊灯 角落堆着纸箱 门半开着 窗外能看到树枝 光线从上方照下"
        parts += " 椅子靠着墙边 地毯上有条纹 架子上排列着玻璃瓶 柜门带有金属把手 阴影落在地面 花盆里长着绿叶 钟表指向三点 帘子垂到地面 抽屉略微拉开 整体气氛安静"
        return (
            f"图中是一个{ZH[colour]}色的{thing}，编号为{seed % 97}。"
            + "。".join(f"{one}，位置十分清楚" for one in parts.split())
            + "。"
        )
    places = "window shelf floor wall table ceiling corner door garden light chair carpet cupboard shadow plant clock curtain drawer lamp bench"
    adjectives = (
        "tall dusty narrow bright wooden low round heavy quiet soft plain old striped open long thin broad clean faded small"
    )
    lines = [f"Near it, one can see a {a} {p} in its usual place." for a, p in zip(adjectives.split(), places.split(), strict=True)]
    return f"The image shows a {colour} {thing} with the number {seed % 97} on it. " + " ".join(lines)


def items(said, chinese=False):
    """Instructions of each type about a caption, as (question, options, answer)."""
    colour, thing = (
        re.search(r"a (\w+) (\w+) with", said).groups() if not chinese else (None, re.search(r"色的(\w+?)，编号", said)[1])
    )
    if chinese:
        colour = re.search(r"一个(.)色", said)[1]
        others = [one for one in "红绿蓝黄白黑" if one != colour][:3]
        return {
            "judgement": [(f"{thing}是{colour}色的吗？", [], "是"), (f"{thing}是{others[0]}色的吗？", [], "否")],
            "choice": [(f"{thing}是什么颜色？", [f"{one}色" for one in (colour, *others)], f"{colour}色")],
            "long": [
                (f"请描述{thing}及其周围。", [], f"画面中有一个{colour}色的{thing}，左侧有窗户，右侧摆着书架，整体气氛十分安静。")
            ],
            "short": [(f"{thing}的颜色是哪一种？", [], f"{colour}色")],
        }
    others = [one for one in COLOURS if one != colour][:3]
    return {
        "judgement": [(f"Is the {thing} {colour}?", [], "Yes"), (f"Is the {thing} {others[0]}?", [], "No")],
        "choice": [(f"What colour is the {thing}?", [colour, *others], colour)],
        "long": [
            (f"What surrounds the {thing}?", [], f"The {thing} is surrounded by a tall window, a dusty shelf and a narrow floor.")
        ],
        "short": [(f"In which colour is the {thing} painted?", [], colour)],
    }


KINDS = {
    "yes-or-no": "judgement",
    "判断题": "judgement",
    "multiple-choice": "choice",
    "单项": "choice",
    "detailed": "long",
    "详细": "long",
}


def tell(body, number=0):
    """The response to a request of `mpo mminstruct`."""
    content = body["messages"][-1]["content"]
    asked = content if isinstance(content, str) else "".join(one.get("text", "") for one in content)
    if body["max_tokens"] == 1:
        return "A"
    if not isinstance(content, str) and "fits this image best" in asked:
        return "landmark" if number_of(json.dumps(content)) % 2 else "artwork"
    if not isinstance(content, str):
        url = next(one["image_url"]["url"] for one in content if one["type"] == "image_url")
        return caption(number_of(url), "请为" in asked)
    if "cannot see" in asked or "看不到的图片" in asked:
        return "UNKNOWN" if "detailed" not in asked else "NO"
    if "Verdict:" in asked:
        return "It says so.\nVerdict: SUPPORTED"
    chinese = "下面是一张图片的描述" in asked
    head = asked.split("Description:" if not chinese else "描述：\n")[0]
    kind = next((value for word, value in KINDS.items() if word in head), "short")
    said = re.search(r"The image shows.*" if not chinese else "图中是.*", asked)[0]
    return tagged(items(said, chinese)[kind])


def tagged(found):
    lines = []
    for number, (question, options, answer) in enumerate(found, 1):
        listed = "\n".join(f"{chr(64 + place)}. {one}" for place, one in enumerate(options, 1))
        letter = f"{chr(65 + options.index(answer))}. " if options else ""
        lines.append(
            f"<Q{number}>{question}</Q{number}>"
            + (f"<C{number}>{listed}</C{number}>" if options else "")
            + f"<A{number}>{letter}{answer}</A{number}>"
        )
    return "\n".join(lines)
