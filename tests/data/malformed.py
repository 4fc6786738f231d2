"""Malformed lines of every format, each with a part of the reason why it is refused.

Each format has a good line; every field of it is spoilt in the same ways, and cases particular to the format are added by hand.
Lines are the bytes of a line in a file. Images are in a folder that `conftest.images` makes.
"""

import copy
import json

DEEP = "[" * 100_000 + "]" * 100_000
HALF = "\ud83d"  # half of an emoji: JSON can say it, Unicode cannot

PAIR = {"chosen": "A cat.", "rejected": "A dog."}
QUESTION = {"question": "What is it?", **PAIR}
RATINGS = {
    aspect: {"Rating": "4", "Rationale": "Good."} for aspect in ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
}
WORSE = {**RATINGS, "Helpfulness": {"Rating": "1", "Rationale": "Bad."}}

GOOD = {
    "mmpr": {"id": 7, "image": "a.png", **QUESTION, "answer_gt": "cat"},
    "trl": {"id": "7", "images": ["a.png"], "prompt": "What is it?", **PAIR, "margin": 1.5},
    "rlaif_v": {"ds_name": "RLAIF-V", "image": {"path": "a.png", "bytes": None}, **QUESTION, "origin_dataset": "VQAv2", "idx": "7"},
    "rlhf_v": {"ds_name": "RLHF-V", "image": {"path": "a.png", "bytes": None}, "text": QUESTION, "idx": 7},
    "vlfeedback": {
        "id": "7",
        "prompt": "What is it?",
        "img_path": "a.png",
        "completions": [
            {"annotations": RATINGS, "model": "one", "response": "A cat."},
            {"annotations": WORSE, "model": "two", "response": "A dog."},
        ],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<image>What is it?"}],
        "chosen": {"from": "gpt", "value": "A cat."},
        "rejected": {"from": "gpt", "value": "A dog."},
        "images": ["a.png"],
    },
    "swift": {
        "messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A cat."}],
        "rejected_response": "A dog.",
        "images": ["a.png"],
    },
}
# The fields of each format with its texts (and their names in error messages), its images, its id.
TEXTS = {
    "mmpr": {("question",): "the prompt", ("chosen",): "'chosen'", ("rejected",): "'rejected'"},
    "trl": {("prompt",): "the prompt", ("chosen",): "'chosen'", ("rejected",): "'rejected'"},
    "rlaif_v": {("question",): "the prompt", ("chosen",): "'chosen'", ("rejected",): "'rejected'"},
    "rlhf_v": {("text", "question"): "the prompt", ("text", "chosen"): "'chosen'", ("text", "rejected"): "'rejected'"},
    "vlfeedback": {
        ("prompt",): "the prompt",
        ("completions", 0, "response"): "'chosen'",
        ("completions", 1, "response"): "'rejected'",
    },
    "sharegpt": {("chosen",): "'chosen'", ("rejected",): "'rejected'"},
    "swift": {("rejected_response",): "'rejected'"},
}
IMAGES = {"mmpr": "image", "trl": "images", "rlaif_v": "image", "rlhf_v": "image", "vlfeedback": "img_path"}
IMAGES |= {"sharegpt": "images", "swift": "images"}
IDS = {"mmpr": "id", "trl": "id", "rlaif_v": "idx", "rlhf_v": "idx", "sharegpt": "id", "swift": "id"}
MISSING = object()

NOT_JSON = {
    "cut short": (b'{"question": "What', "not JSON"),
    "single quotes": (b"{'question': 'What is it?'}", "not JSON"),
    "a comma too many": (b'{"question": "a", "chosen": "b",}', "not JSON"),
    "no comma": (b'{"question": "a" "chosen": "b"}', "not JSON"),
    "two objects": (b'{"question": "a"} {"chosen": "b"}', "not JSON"),
    "a raw tab in a text": (b'{"question": "a\tb"}', "not JSON"),
    "a wrong escape": (rb'{"question": "\x41"}', "not JSON"),
    "Python": (b'{"question": None}', "not JSON"),
    "a comment": (b'// {"question": "a"}', "not JSON"),
    "zero bytes": (b"\0\0\0\0", "not JSON"),
    "Latin-1": ('{"question": "é"}'.encode("latin-1"), "not UTF-8"),
    "UTF-16": ('{"question": "a"}'.encode("utf-16"), "not UTF-8"),
    "a list": (b"[1, 2]", "a JSON list instead of an object"),
    "text": (b'"question"', "a JSON str instead of an object"),
    "a number": (b"17", "a JSON int instead of an object"),
    "null": (b"null", "a JSON NoneType instead of an object"),
    "NaN": (b"NaN", "a JSON float instead of an object"),
    "too deep": (DEEP.encode(), "nested too deeply"),
    "a number too long": (b'{"question": ' + b"9" * 5000 + b"}", "too long"),
    "an empty object": (b"{}", "the line has nothing"),
    "other fields": (b'{"instruction": "a", "output": "b"}', "rlhf_v: text (JSON with question, chosen, rejected)"),
}

SPOILT_TEXTS = {
    "missing": (MISSING, "{} is missing"),
    "null": (None, "{} is missing"),
    "empty": ("", "{} is empty"),
    "blank": (" \n\t", "{} is empty"),
    "a number": (5, "{} is a number"),
    "a fraction": (0.5, "{} is a number"),
    "NaN": (float("nan"), "{} is a number"),
    "a boolean": (True, "{} is a boolean"),
    "an empty list": ([], "{} is empty"),
    "a list of numbers": ([5], "{} has a number where a message"),
    "a list of texts": (["A cat."], "{} has text where a message"),
    "no role": ([{"content": "A cat."}], "{} has a message of role None"),
    "another role": ([{"role": "narrator", "content": "A cat."}], "{} has a message of role 'narrator'"),
    "no content": ([{"role": "assistant"}, {"role": "user"}], "{} has a message whose content is null"),
    "half a character": (f"A cat {HALF}", "{} has half of a character (\\ud83d)"),
}
SPOILT_IMAGES = {
    "a number": (5, "got a number"),
    "a boolean": (True, "got a boolean"),
    "in a list, a number": ([5], "image 1 of 1 is a number"),
    "in a list, null": (["a.png", None], "image 2 of 2 is null"),
    "in a list, a list": ([["a.png"]], "image 1 of 1 is a list"),
    "in a list, empty": ([""], "is not a path"),
    "no path and no bytes": ({"path": None, "bytes": None}, "image 1 of 1 is null"),
    "bytes that are text": ({"path": "a.png", "bytes": "iVBORw0KGgo="}, "image 1 of 1 is text"),
    "a path that is none": ({"path": 5, "bytes": None}, "image 1 of 1 is a number instead of a path"),
    "not there": ("d.png", "there is no image 'd.png'"),
    "in no folder": ("none/a.png", "there is no image 'none/a.png'"),
    "outside": ("../outside.png", "lies outside"),
    "outside, the long way": ("sub/../../outside.png", "lies outside"),
    "outside, after a link": ("link_out.png", "lies outside"),
    "outside, in a linked folder": ("out/outside.png", "lies outside"),
    "absolute": ("/etc/hostname", "lies outside"),
    "a device": ("/dev/zero", "lies outside"),
    "a folder": ("sub", "is a folder"),
    "an address": ("https://example.org/a.png", "is a URL"),
    "an address of a file": ("file:///etc/hostname", "is a URL"),
    "an address of a bucket": ("s3://bucket/a.png", "is a URL"),
    "in the line": ("data:image/png;base64,iVBORw0KGgo=", "is a URL"),
    "a zero byte": ("a\0.png", "is not a path"),
    "too long a name": ("a" * 5000, "cannot be reached"),
    "half a character": (f"{HALF}.png", "has half of a character"),
}
SPOILT_IDS = {
    "a list": ([7], "a list instead of text"),
    "an object": ({"a": 7}, "an object instead of text"),
    "a boolean": (True, "a boolean instead of text"),
    "a fraction": (7.5, "a number instead of text"),
    "too large": (2**70, "a number instead of text"),
    "half a character": (HALF, "has half of a character"),
}


def changed(line, path, value):
    """A copy of a line with another value in one place."""
    line = copy.deepcopy(line)
    inner = line
    for step in path[:-1]:
        inner = inner[step]
    if value is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return line


def spoilt(format):
    """Every field of a format, spoilt."""
    good = GOOD[format]
    for path, called in TEXTS[format].items():
        for how, (value, reason) in SPOILT_TEXTS.items():
            if value is MISSING and (path in (("question",), ("rejected_response",)) or (format, path) == ("trl", ("prompt",))):
                reason = "in any known format"  # the field by which the format is detected
            yield f"{'.'.join(map(str, path))}: {how}", changed(good, path, value), reason.format(called)
    for how, (value, reason) in SPOILT_IMAGES.items():
        yield f"{IMAGES[format]}: {how}", changed(good, (IMAGES[format],), value), reason
    for how, (value, reason) in SPOILT_IDS.items() if format in IDS else ():
        yield f"{IDS[format]}: {how}", changed(good, (IDS[format],), value), reason


def particular(format):
    """Errors that are particular to this format, and errors with placeholders and completions of any format."""
    good = GOOD[format]
    if format == "mmpr":
        yield "equal completions", {**good, "rejected": good["chosen"]}, "the same completion"
        yield "two placeholders", {**good, "question": "<image><image>?"}, "2 <image> placeholders for 1 images"
        one = {**good, "image": ["a.png", "b.png"], "question": "<image>?"}
        yield "one placeholder for two", one, "1 <image> placeholders for 2 images"
        yield "a placeholder and no image", {**QUESTION, "question": "<image>?"}, "1 <image> placeholders for 0 images"
        yield "a video's placeholder and no video", {**QUESTION, "question": "<video>?"}, "1 <video> placeholders for 0 videos"
        completion = {**good, "question": "?", "rejected": "An <image> of a dog."}
        yield "a placeholder in a completion", completion, "<image> in 'rejected'"
        yield "a placeholder in the system field", {**good, "system": "See <image>."}, "<image> in 'system'"
        yield "system", {**good, "system": ["a"]}, "'system' has a list"
        yield "two names", {**good, "images": ["a.png"]}, "both 'image' and 'images'"
        yield "a part of a video", {**QUESTION, "video": "clip.mp4", "clip": [0, 5]}, "the line has 'clip'"
        yield "a video that is not there", {**QUESTION, "video": "none.mp4"}, "there is no video"
        yield "a video outside", {**QUESTION, "video": "../outside.png"}, "lies outside"
        yield "a video as a number", {**QUESTION, "video": [5]}, "the video is a number"
        yield "twice chosen", json.dumps(good)[:-1] + ', "chosen": "x"}', "'chosen' is given twice"
        yield "twice an image", json.dumps(good)[:-1] + ', "image": "b.png"}', "'image' is given twice"
    if format == "trl":
        text, image = {"type": "text", "text": "A cat."}, {"type": "image"}
        yield "equal completions", {**good, "rejected": good["chosen"]}, "the same completion"
        yield "no prompt", {"chosen": "It is a cat.", "rejected": "It is a dog."}, "in any known format"
        yield "no prompt, two types", {"chosen": "A", "rejected": [5]}, "in any known format"
        yield (
            "no prompt, nothing in common",
            {"chosen": [_said("assistant", "A")], "rejected": [5]},
            "there is no prompt",
        )
        whole = [_said("user", "?"), _said("assistant", "A")]
        yield "no prompt, equal", {"chosen": whole, "rejected": whole}, "the same completion"
        yield "no prompt, one turn", {"chosen": whole[:1], "rejected": whole[:1]}, "there is no prompt"
        yield "no prompt, no completion", {"chosen": whole[:1], "rejected": whole}, "there is no prompt"
        yield "the prompt repeated", {**good, "chosen": [_said("user", "?"), _said("assistant", "A")]}, "message of role 'user'"
        yield "ends with the user", {**good, "chosen": [_said("assistant", "A"), _said("user", "?")]}, "role 'user'"
        yield "no user", {**good, "prompt": [_said("system", "Be brief.")]}, "no message of the user"
        yield "an image in a completion", {**good, "chosen": [_said("assistant", [text, image])]}, "'chosen' has an image"
        yield "a part of another type", {**good, "chosen": [_said("assistant", [{"type": "audio"}])]}, "not text, image or video"
        yield "a part that is text", {**good, "chosen": [_said("assistant", ["A cat."])]}, "not text, image or video"
        yield "text without text", {**good, "chosen": [_said("assistant", [{"type": "text"}])]}, "null where text is expected"
        yield (
            "an image in its place",
            {**good, "prompt": [_said("user", [{"type": "image", "image": "a.png"}])]},
            "'images'",
        )
        yield "two image parts", {**good, "prompt": [_said("user", [image, image, text])]}, "2 <image> placeholders for 1 images"
        asked = [_said("system", "You see <image>."), _said("user", "?")]
        yield "a placeholder in the system turn", {**good, "prompt": asked}, "<image> in turn 1 (system)"
        asked = [_said("user", "Draw."), _said("assistant", "<image>"), _said("user", "<image>?")]
        yield "a placeholder in an earlier reply", {**good, "prompt": asked, "images": ["a.png", "b.png"]}, "in turn 2 (assistant)"
        yield "which turn has a placeholder", {**good, "prompt": asked, "images": ["a.png", "b.png"]}, "2 images (in turn 3 (user))"
        asked = [_said("user", [{"type": "text", "text": "<image>, <image>"}])]
        yield "two placeholders in a part", {**good, "prompt": asked}, "2 <image> placeholders for 1 images"
        asked = [_said("user", [image, text]), _said("assistant", "So?"), _said("user", "And <image>?")]
        reason = "2 <image> placeholders for 1 images (in turn 1 (user), turn 3 (user))"
        yield "an image part and a placeholder", {**good, "prompt": asked}, reason
        asked = [_said("system", "Be brief."), _said("user", "?")]
        yield "system twice", {**good, "prompt": asked, "system": "Be long."}, "system message in 'system'"
        calls = [{"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}]
        yield "tool calls", {**good, "chosen": calls}, "tool_calls"
        yield "tools", {**good, "tools": "[]x"}, "the line has 'tools'"
        yield "a template", {**good, "chat_template_kwargs": {"a": 1}}, "the line has 'chat_template_kwargs'"
        for value in ("much", True, [], float("nan"), float("inf"), -float("inf"), 10**400):
            yield f"margin {value!r:.9}", {**good, "margin": value}, "instead of a finite number"
        for value in ({"most": 5}, 5, [6]):
            yield f"tiles {value!r}", {**good, "tiles": value}, "with min, max, thumbnail"
        for value in (0, -1, 1.5, True, "6", 2**31):
            reason = f"max of 'tiles' must be a whole number of 1 or more; got {value!r}"
            yield f"at most {value!r} tiles", {**good, "tiles": {"max": value}}, reason
        yield "a thumbnail", {**good, "tiles": {"thumbnail": 1}}, "thumbnail of 'tiles' must be true or false; got 1"
        yield "augment", {**good, "augment": "yes"}, "'augment' is text instead of true or false"
        yield "a source", {**good, "source": ["a"]}, "'source' is a list"
        yield "a prompt's id", {**good, "prompt_id": 0.5}, "'prompt_id' is a number"
        yield "metadata", {**good, "metadata": "{"}, "'metadata'"
        yield "deep metadata", {**good, "metadata": DEEP}, "nested too deeply"
    if format == "rlaif_v":
        yield "equal completions", {**good, "rejected": good["chosen"]}, "the same completion"
        yield "a placeholder for none", {**good, "image": None, "question": "<image>?"}, "1 <image> placeholders for 0 images"
        yield "another path", {**good, "image": None, "image_path": "../outside.png"}, "lies outside"
    if format == "rlhf_v":
        for value, reason in (
            (5, "a number"),
            (None, "null"),
            ([], "a list"),
            ("[]", "a list"),
            ('"a"', "text"),
            ("3", "a number"),
        ):
            yield f"text {value!r}", {**good, "text": value}, f"'text' holds {reason}"
        for value in ("", "{", "What is it?", "{'question': 'a'}"):
            yield f"text {value!r}", {**good, "text": value}, "not JSON"
        yield "deep text", {**good, "text": DEEP}, "nested too deeply"
        yield "a long number", {**good, "text": "9" * 5000}, "too long"
        yield "equal completions", {**good, "text": {**QUESTION, "rejected": "A cat."}}, "the same completion"
    if format == "vlfeedback":
        completions = good["completions"]
        for value in (None, 5, "A cat.", True, [5, 5], ["a", "b"], [[], []]):
            yield f"completions {value!r}", {**good, "completions": value}, "each an object"
        yield "no completions", {**good, "completions": []}, "has 0 entries"
        yield "one completion", {**good, "completions": completions[:1]}, "has 1 entries"
        yield "too many completions", {**good, "completions": completions * 40}, "has 80 entries"
        yield "columns of different lengths", {**good, "completions": {"response": ["a"], "annotations": []}}, "lists of one length"
        yield "columns that are not lists", {**good, "completions": {"response": "a"}}, "lists of one length"
        yield "no columns", {**good, "completions": {}}, "lists of one length"
        for value in (None, 5, [], "good"):
            yield (
                f"annotations {value!r}",
                changed(good, ("completions", 1, "annotations"), value),
                "entry 2 of 'completions' has no object 'annotations'",
            )
        for value in (None, "", "N/A", "nan", "inf", [], {}, True, float("nan"), 10**400):
            line = changed(good, ("completions", 0, "annotations", "Helpfulness", "Rating"), value)
            yield f"rating {value!r:.9}", line, "entry 1 of 'completions' has no number as its rating of 'Helpfulness'"
        line = changed(good, ("completions", 0, "annotations", "Visual Faithfulness"), MISSING)
        yield "no rating", line, "rating of 'Visual Faithfulness'"
        yield "two images", {**good, "image": "b.png"}, "both 'img_path' and 'image'"
    if format == "sharegpt":
        for value, reason in ((None, "null"), (5, "a number"), ("a", "text"), ({}, "an object"), ([], "an empty one")):
            yield f"conversations {value!r}", {**good, "conversations": value}, f"got {reason}"
        for value in (None, 5, "a", []):
            yield f"a turn {value!r}", {**good, "conversations": [value]}, "turn 1 is"
        for value in (None, 5, "narrator", ["human"], "function_call"):
            yield f"from {value!r}", changed(good, ("conversations", 0, "from"), value), "turn 1 is from"
        for value in (None, 5, {}):
            yield f"says {value!r}", changed(good, ("conversations", 0, "value"), value), "a message whose content is"
        yield (
            "the last turn",
            {**good, "conversations": [*good["conversations"], good["chosen"]]},
            "the last turn is the assistant's",
        )
        yield "chosen from", changed(good, ("chosen", "from"), "narrator"), "'chosen' is from 'narrator'"
        yield "chosen from a human", changed(good, ("chosen", "from"), "human"), "message of role 'user'"
        yield "equal completions", {**good, "rejected": good["chosen"]}, "the same completion"
        yield (
            "system twice",
            {**good, "system": "a", "conversations": [_turn("system"), *good["conversations"]]},
            "system message in 'system'",
        )
        yield "system", {**good, "system": 5}, "'system' has a number"
        yield "tools", {**good, "tools": "[{}]"}, "the line has 'tools'"
        yield "sound", {**good, "audios": ["a.wav"]}, "the line has 'audios'"
        yield "both names", {**good, "messages": good["conversations"]}, "both 'conversations' and 'messages'"
        yield "no image for the placeholder", {**good, "images": []}, "1 <image> placeholders for 0 images"
    if format == "swift":
        user, cat = good["messages"]
        for value, reason in ((None, "null"), (5, "a number"), ("a", "text"), ({}, "an object"), ([], "of 0"), ([user], "of 1")):
            yield f"messages {value!r:.9}", {**good, "messages": value}, reason
        for value in (5, None, "a", user, []):
            yield f"the last {value!r:.9}", {**good, "messages": [user, value]}, "the last of 'messages'"
        for value in (5, None, "a", []):
            yield f"the first {value!r}", {**good, "messages": [value, cat]}, "where a message"
        yield "no user", {**good, "messages": [cat, cat]}, "no message of the user"
        yield "equal completions", {**good, "rejected_response": "A cat."}, "the same completion"
        yield "both", {**good, "rejected_messages": good["messages"]}, "both 'rejected_response' and 'rejected_messages'"
        other = {key: value for key, value in good.items() if key != "rejected_response"}
        asked = [{**user, "content": "<image>Why?"}, {**cat, "content": "A dog."}]
        yield "another question", {**other, "rejected_messages": asked}, "'rejected_messages' differ from 'messages'"
        yield "no messages", {**other, "rejected_messages": []}, "'rejected_messages' must be a list"
        yield "other images", {**good, "rejected_images": ["b.png"]}, "'rejected_images' differ"
        yield "other videos", {**good, "rejected_videos": ["b.mp4"]}, "'rejected_videos' differ"
        yield "only other images", {**other, "rejected_images": ["a.png"]}, "'rejected' is missing"
        for name in ("tools", "objects", "audios", "rejected_tools", "rejected_audios"):
            yield name, {**good, name: ["x"]}, f"the line has {name!r}"
        yield "a margin", {**good, "margin": "much"}, "instead of a finite number"
        yield "system", {**good, "system": ["a"]}, "'system' has a list"
        yield "no image for the placeholder", {**good, "images": None}, "1 <image> placeholders for 0 images"


def _said(role, content):
    return {"role": role, "content": content}


def _turn(role):
    return {"from": role, "value": "Be brief."}


def _bytes(line):
    return line.encode() if isinstance(line, str) else json.dumps(line).encode()


def cases(format):
    """All cases of a format: what is wrong, the line, a part of the reason."""
    made = [(name, line, reason) for name, (line, reason) in NOT_JSON.items()]
    return made + [(name, _bytes(line), reason) for name, line, reason in (*spoilt(format), *particular(format))]
