"""The page in a real Chromium: keys and clicks, hostile texts, two tabs, a phone, the dark, and a server that goes."""

import json
import os
import shutil
import threading
from io import BytesIO

import pytest
from PIL import Image, ImageStat
from review_server import Reviewing, pairs

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
pytest.importorskip("starlette")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium"),
]

HOSTILE = [
    "<script>hit()</script>",
    "<img src=x onerror=hit()>",
    "<svg onload=hit()>",
    "<svg><script>hit()</script></svg>",
    '"><b onclick=hit()>',
    "'-hit()-'",
    "javascript:hit()",
    "[a](javascript:hit())",
    "![a](x onerror=hit())",
    "<iframe srcdoc='<script>parent.hit()</script>'>",
    "</textarea><script>hit()</script>",
    "</title><script>hit()</script>",
    "```<script>hit()</script>```",
    "$<img src=x onerror=hit()>$",
    "$\\text{<script>hit()</script>}$",
    "| <b onmouseover=hit()> | a |\n|--|--|\n| <img src=x onerror=hit()> | b |",
    "{{constructor.constructor('hit()')()}}",
    "<a href='data:text/html,<script>hit()</script>'>x</a>",
    "<math><mtext><img src=x onerror=hit()></mtext></math>",
    "\u202e<style>*{display:none}</style>\x00",
]


NAMES = [text for text in HOSTILE if text.isprintable()]
"""Names of reviewers cannot hold the others."""
CONTRAST = """() => {
    const parts = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((one) => one / 255 <= 0.03928 ? one / 3294.6 : ((one / 255 + 0.055) / 1.055) ** 2.4)
        .reduce((sum, one, at) => sum + one * [0.2126, 0.7152, 0.0722][at], 0);
    const ground = (node) => {
        const color = parts(getComputedStyle(node).backgroundColor);
        return (color[3] ?? 1) > 0.99 || !node.parentElement ? color : ground(node.parentElement);
    };
    const own = (node) => [...node.childNodes].some((one) => one.nodeType === 3 && one.textContent.trim());
    return [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility() && own(node)).map((node) => {
        const [low, high] = [light(parts(getComputedStyle(node).color)), light(ground(node))].sort((one, other) => one - other);
        return [node.tagName, node.textContent.slice(0, 20), (high + 0.05) / (low + 0.05)];
    }).filter(([, , ratio]) => ratio < 4.5);
}"""
"""The texts whose contrast to what is under them is less than 4.5 to 1 (WCAG 2.2, 1.4.3)."""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    path = pairs(folder, 10, f"{HOSTILE[1]}.jsonl")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A **cat**: $\\frac{a_1}{\\sqrt{b}}$"}]
    lines = [{"id": "chat", "image": "0.png", "conversations": turns}]
    responses = [
        {"text": "Final answer: 7", "verdict": "correct", "answer": "7"},
        {"text": "8", "verdict": "wrong_answer", "answer": "8"},
    ]
    lines.append(
        {
            "id": "made",
            "messages": [{"role": "user", "content": "3 + 4?"}],
            "ground_truths": ["7"],
            "responses": responses,
            "accuracy": 0.5,
        }
    )
    lines.append({"id": "asked", "question": "Which?", "choices": ["a", "b"], "answer": "a", "kind": "choice", "image": "1.png"})
    for text in HOSTILE:
        line = {name: text for name in ("id", "question", "chosen", "rejected", "answer_gt", "kind", "source", "other")}
        lines.append({**line, "rejected": text + "!", "choices": [text], "image": text, "chosen_meta": {text: text}})
    for text in HOSTILE:
        answer = {"text": text, "verdict": text, "answer": text, "reason": text, text: text}
        asked = {"messages": [{"role": text, "content": text}, {"role": "user", "content": text}], "system": text, "images": [text]}
        other = {"choices": [text, text], "ground_truths": [text], "type": text, "source": text, "videos": [{"path": text}]}
        lines.append({"id": text, **asked, **other, "responses": [answer, {**answer, "text": text * 2}], text: [text]})
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    with Reviewing(path, reviewers=("anna", *NAMES)) as server, playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1100, "height": 900})
        context.set_offline(False)
        context.set_default_timeout(60_000)
        own = context.new_page()
        own.server, own.problems, own.requests = server, [], []
        context.on("request", lambda request: own.requests.append(request.url))
        own.on("pageerror", lambda error: own.problems.append(str(error)))
        own.on("dialog", lambda dialog: own.problems.append(dialog.message))
        own.on(
            "console",
            lambda message: own.problems.append(message.text) if message.type == "error" and "40" not in message.text else None,
        )
        own.add_init_script("window.hits = 0; window.hit = () => { window.hits++; }")
        own.goto(server.links["anna"])
        own.wait_for_selector("#record section")
        own.wait_for_selector("#facets select")
        yield own
        browser.close()


def status(page, text):
    page.wait_for_function("text => document.getElementById('status').textContent.startsWith(text)", arg=text)


def at(page, place, kind=None):
    """Go to a record."""
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.type(str(place + 1))
    page.keyboard.press("Enter")
    page.wait_for_function("place => document.querySelector('.meta strong')?.textContent.endsWith(':' + (place + 1))", arg=place)
    page.keyboard.press("Escape")


def decision(page, place, by="anna"):
    found = page.server.ask(f"/api/records/{place}", by=by)[1]["decision"]
    return found and (found["action"], [edit["value"] for edit in found["edits"]], found.get("reason", ""))


def test_keys_decide_edit_undo_and_find(page):
    page.keyboard.press("a")
    status(page, "Saved: accept")
    page.keyboard.press("s")
    status(page, "Saved: swap")
    page.keyboard.press("r")
    page.keyboard.type("wrong image")
    page.keyboard.press("Enter")
    status(page, "Saved: reject")
    page.keyboard.press("k")
    status(page, "Saved: skip")
    page.keyboard.press("e")
    page.get_by_label("Prompt, user 1.1").fill("How many, really?")
    page.get_by_label("answer_gt").fill("44")
    page.keyboard.press("Control+Enter")
    status(page, "Saved: accept")
    left = page.server.ask("/api/records/5")[1]["left"]
    page.wait_for_function("() => document.querySelector('.meta strong').textContent.endsWith(':6')")
    page.keyboard.press("1")
    page.wait_for_function("() => document.querySelector('.meta strong').textContent.endsWith(':7')")
    assert [decision(page, place) for place in range(6)] == [
        ("accept", [], ""),
        ("swap", [], ""),
        ("reject", [], "wrong image"),
        ("skip", [], ""),
        ("accept", ["How many, really?", "44"], ""),
        ("accept" if left == "chosen" else "swap", [], ""),
    ]
    for place in (5, 4, 3):
        page.keyboard.press("u")
        page.wait_for_function("place => document.querySelector('.meta strong').textContent.endsWith(':' + (place + 1))", arg=place)
    assert [decision(page, place) for place in (3, 4, 5)] == [None] * 3
    page.keyboard.press("/")
    page.keyboard.type("how many in 7")
    status(page, "1 records")
    assert page.locator(".meta").inner_text().count("p7") == 1
    page.locator("#search").fill("")
    status(page, "53 records")


def test_clicks_do_the_same(page):
    at(page, 6)
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Left, assistant 1.1").fill("Edited by hand.")
    page.get_by_role("button", name="Save and accept").click()
    status(page, "Saved: accept")
    page.get_by_role("button", name="Reject").click()
    page.get_by_role("button", name="no difference").click()
    page.locator("#reject").click()
    status(page, "Saved: reject")
    assert decision(page, 6)[1] == ["Edited by hand."] and decision(page, 7)[2] == "no difference"
    page.get_by_role("button", name="Undo").click()
    status(page, "Undone")
    page.get_by_label("Show").select_option("edit")
    status(page, "1 records")
    page.get_by_label("Show").select_option("all")
    page.get_by_label("Source").select_option("=s1")
    status(page, "5 records")
    page.get_by_label("Source").select_option("")
    page.get_by_label("Order").select_option("longest")
    status(page, "53 records")
    page.get_by_label("Order").select_option("file")
    page.get_by_role("button", name="Report").click()
    page.wait_for_selector("#told-body dl")
    assert "anna" in page.locator("#told-body").inner_text()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Keys").click()
    assert "Accept" in page.locator("#told-body").inner_text()
    page.keyboard.press("Escape")


def test_diff_zoom_and_what_is_hidden(page):
    at(page, 1)
    page.keyboard.press("d")
    assert page.locator("mark.chosen").all_inner_texts() == ["1"] and page.locator("mark.rejected").all_inner_texts() == ["2"]
    page.keyboard.press("b")
    assert page.locator(".side-title").get_by_text("chosen").count() == 0 and page.locator("mark.rejected").count() == 0
    page.keyboard.press("b")
    page.keyboard.press("d")
    page.keyboard.press("z")
    page.wait_for_function("() => document.querySelector('#stage img')?.width > 64")
    width = page.evaluate("document.querySelector('#stage img').width")
    page.keyboard.press("-")
    assert page.evaluate("document.querySelector('#stage img').width") < width
    page.keyboard.press("Escape")


def test_conversations_responses_and_questions(page):
    at(page, 10)
    assert page.locator("#record strong").last.inner_text() == "cat" and page.locator("math mfrac msqrt").count() == 1
    at(page, 11)
    page.keyboard.press("e")
    page.get_by_label("response 2: verdict").select_option("correct")
    page.keyboard.press("Control+Enter")
    status(page, "Saved: accept")
    at(page, 12)
    page.keyboard.press("e")
    page.get_by_label("choices, one a line").fill("a\nb\nc")
    page.get_by_label("kind").fill("text")
    page.keyboard.press("Control+Enter")
    status(page, "Saved: accept")
    assert (decision(page, 11)[1], decision(page, 12)[1]) == (["correct"], [["a", "b", "c"], "text"])


def test_no_text_is_ever_run(page):
    """In every field, rendered, as written, as a diff, and in the fields that edit it."""
    for name, reason in zip(NAMES, reversed(HOSTILE), strict=False):
        assert page.server.decide(9, "reject", by=name, reason=reason)[0] == 200
    at(page, 9)
    page.keyboard.press("a")
    status(page, "Saved: accept")
    at(page, 9)
    told = page.locator(".other").all_inner_texts()
    assert len(told) == len(NAMES) > 15 and all(any(name in one for one in told) for name in NAMES) and NAMES[1] in page.title()
    page.keyboard.press("i")
    page.wait_for_selector("#told-body dl")
    assert all(name in page.locator("#told-body").inner_text() for name in NAMES)
    page.keyboard.press("Escape")
    for text in HOSTILE:
        page.locator("#search").fill(text)
    assert page.locator("#facets option").count() > 2 * len(HOSTILE)
    page.locator("#search").fill("")
    status(page, "53 records")
    at(page, 9)
    page.keyboard.press("u")
    status(page, "Undone")
    at(page, 13)
    for place in range(13, 13 + 2 * len(HOSTILE)):
        page.wait_for_function("place => document.querySelector('.meta strong').textContent.endsWith(':' + (place + 1))", arg=place)
        for key in "mddme":
            page.keyboard.press(key)
        assert page.locator("#record textarea").first.input_value().replace("\ufffd", "\0") == HOSTILE[(place - 13) % len(HOSTILE)]
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        page.keyboard.press("n")
    page.evaluate(
        "document.querySelectorAll('#record *').forEach((one) => { one.click(); one.dispatchEvent(new Event('mouseover')); })"
    )
    inside = "document.querySelectorAll('#record script, #record iframe, #record svg, #record style, #record a').length"
    assert (page.evaluate("hits"), page.evaluate(inside)) == (0, 0)
    for dialog in ("rejecting", "told", "zoomed"):
        page.evaluate(f"document.getElementById('{dialog}').close()")


def test_what_is_written_is_not_lost_with_another_decision(page):
    at(page, 4)
    for key, saved in (("k", "Saved: skip"), ("r", "Saved: reject")):
        page.keyboard.press("e")
        page.get_by_label("Prompt, user 1.1").fill("Written first.")
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        page.keyboard.press(key)
        if key == "r":
            page.keyboard.press("Enter")
        status(page, saved)
        page.keyboard.press("u")
        status(page, "Undone")
        at(page, 4)
        assert "Written first." in page.locator("#record").inner_text() and decision(page, 4) is None
    page.keyboard.press("e")
    page.get_by_label("Prompt, user 1.1").fill("How many in 4?")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")


def test_a_second_tab_is_told_that_it_is_stale(page):
    at(page, 8)
    other = page.context.new_page()
    other.goto(page.server.links["anna"])
    other.wait_for_selector("#record section")
    at(other, 8)
    page.keyboard.press("r")
    page.keyboard.press("Enter")
    status(page, "Saved")
    other.keyboard.press("a")
    other.wait_for_selector("#problem:not([hidden])")
    assert "another tab" in other.locator("#problem").inner_text() and "reject" in other.locator("#decision").inner_text()
    assert decision(page, 8)[0] == "reject"
    other.close()


def test_every_control_has_a_name(page):
    client = page.context.new_cdp_session(page)
    roles = {"button", "textbox", "combobox", "searchbox", "spinbutton", "image", "img", "dialog", "link", "checkbox", "toolbar"}
    assert page.server.decide(5, "reject", by=HOSTILE[1])[0] == 200 and page.server.decide(5, "accept")[0] == 200
    views = ((0, "e"), (11, "e"), (12, "e"), (2, "r"), (1, "z"), (0, "?"), (1, "d"), (0, "i"), (32, "m"), (1, "b"), (5, "e"))
    for place, keys in views:
        if place == 5:  # the view of a disagreement
            page.get_by_label("Show").select_option("disagreeing")
            status(page, "1 records")
            assert page.locator("#disagreeing, .other").count() == 2
        at(page, place)
        page.keyboard.press(keys)
        page.wait_for_timeout(50)
        nodes = client.send("Accessibility.getFullAXTree")["nodes"]
        found = [node for node in nodes if not node.get("ignored") and node.get("role", {}).get("value") in roles]
        assert len(found) > 1
        unnamed = [node["role"]["value"] for node in found if not node.get("name", {}).get("value")]
        assert not unnamed
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        if keys in "dmb":
            page.keyboard.press(keys)
    page.get_by_label("Show").select_option("all")
    status(page, "53 records")
    undo = page.server.ask("/api/state")[1]["undo"]
    assert page.server.ask("/api/undo", {"undoes": undo})[0] == 200


def test_a_field_that_was_entered_keeps_the_keys(page):
    """Neither a record that comes late nor the late end of a dialog takes the focus, and what was typed, away."""
    at(page, 0)
    page.keyboard.press("r")
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.evaluate("document.getElementById('rejecting').dispatchEvent(new Event('close'))")
    assert page.evaluate("document.activeElement.id") == "jump"
    page.keyboard.press("Escape")
    fresh, held = page.context.new_page(), []
    fresh.goto(page.server.links["anna"])
    fresh.wait_for_selector(".meta strong")
    fresh.route("**/api/records/9", lambda route: held.append(route))
    fresh.keyboard.press("g")
    fresh.keyboard.type("10")
    with fresh.expect_request("**/api/records/9"):
        fresh.keyboard.press("Enter")
    fresh.keyboard.press("Escape")
    fresh.keyboard.press("g")
    fresh.keyboard.type("12")
    held[0].continue_()
    fresh.wait_for_function("() => document.querySelector('.meta strong')?.textContent.endsWith(':10')")
    fresh.keyboard.press("Enter")
    fresh.wait_for_function("() => document.querySelector('.meta strong')?.textContent.endsWith(':12')")
    fresh.close()


def brightness(page):
    """The mean of a screenshot's pixels, from 0 to 255."""
    return ImageStat.Stat(Image.open(BytesIO(page.screenshot())).convert("L")).mean[0]


def test_what_comes_next_is_there_before_it_is_asked_for(page, tmp_path):
    with Reviewing(pairs(tmp_path, 6)) as server:
        own, asked = page.context.browser.new_page(), []
        own.on("requestfinished", lambda request: asked.append(request.url.rpartition("/api/")[2]))
        own.goto(server.links["anna"])
        wanted = {f"records/{place}" for place in range(4)} | {f"images/{place}/image/0" for place in range(4)}
        for _ in range(1000):
            if not wanted <= {*asked}:
                own.wait_for_timeout(20)
        assert wanted <= {*asked} and not {"records/4", "images/4/image/0"} & {*asked}
        before = len(asked)
        own.locator("#record").press("n")
        own.wait_for_function("() => document.querySelector('.meta strong').textContent.endsWith(':2')")
        assert own.locator(".gallery img").evaluate("one => one.decode().then(() => one.naturalWidth)") > 0
        assert not {"records/1", "images/1/image/0"} & {*asked[before:]}
        own.close()


def test_a_phone_and_the_dark(page):
    at(page, 0)
    page.set_viewport_size({"width": 375, "height": 700})
    for place in (0, 10, 11, 18, 28):
        at(page, place)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(CONTRAST) == []
    at(page, 0)
    page.keyboard.press("z")
    page.wait_for_function("() => document.querySelector('#stage img')?.width > 64")
    dialog = "(({ scrollHeight, clientHeight }) => scrollHeight - clientHeight)(document.getElementById('zoomed'))"
    assert page.evaluate(dialog) == 0  # its buttons stay in sight
    page.keyboard.press("Escape")
    luminance = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b)"
    assert page.evaluate(luminance) < 120 and brightness(page) < 80
    page.emulate_media(color_scheme="light")
    assert page.evaluate(luminance) > 600 and page.evaluate(CONTRAST) == [] and brightness(page) > 200
    page.set_viewport_size({"width": 1100, "height": 900})


def test_the_last_filter_holds_however_late_others_are_answered(page, tmp_path, monkeypatch):
    """While records are still being read, an order waits; what is chosen after it is shown at once, and stays when that comes."""
    from mpo.review import facets

    go, own = threading.Event(), facets.facets
    monkeypatch.setattr(facets, "facets", lambda line: (go.wait(20), own(line))[1])
    with Reviewing(pairs(tmp_path, 12)) as server:
        late, answers = page.context.browser.new_page(), []
        late.on("response", lambda response: answers.append(response.url) if "/api/queue" in response.url else None)
        late.goto(server.links["anna"])
        late.wait_for_selector("#record section")
        with late.expect_request(lambda request: "order=longest" in request.url):
            late.get_by_label("Order").select_option("longest")
        with late.expect_request(lambda request: "order=hardest" in request.url):
            late.get_by_label("Order").select_option("hardest")
        late.get_by_label("Order").select_option("file")
        late.locator("#search").fill("how many in 7")
        status(late, "1 records")
        assert len(answers) <= 2 and "source" not in late.locator("#facets").inner_text().lower()
        go.set()
        late.wait_for_selector("#facets select")
        while not {"order=longest", "order=hardest"} <= {one.rpartition("&")[2] for one in answers}:
            late.wait_for_timeout(20)
        late.wait_for_timeout(100)
        assert late.locator("#status").inner_text() == "1 records" and late.locator(".meta").inner_text().count("p7") == 1
        late.close()


def test_a_draft_follows_its_record_when_the_file_changes(page, tmp_path):
    path = pairs(tmp_path)
    with Reviewing(path) as server:
        own = page.context.browser.new_page()
        own.goto(f"{server.links['anna']}")
        own.wait_for_selector("#facets select")
        own.locator("#jump").fill("2")
        own.locator("#jump").press("Enter")
        own.wait_for_selector("text=How many in 1")
        own.locator("#record").press("e")
        own.get_by_label("Prompt, user 1.1").fill("A draft of p1.")
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
        own.get_by_label("Prompt, user 1.1").press("Control+Enter")
        own.get_by_text("Open the file anew").click()
        status(own, "5 records")
        assert "p1" in own.locator(".meta").inner_text() and "A draft of p1." in own.locator("#record").inner_text()
        own.wait_for_selector("#facets option:has-text('s0 (2)')", state="attached")
        own.locator("#record").press("n")
        own.wait_for_selector("text=How many in 2")
        assert "A draft" not in own.locator("#record").inner_text()
        own.close()


def test_a_server_that_is_gone_loses_no_draft(page):
    """Last: nothing came from elsewhere, nothing was reported, and what was written stays on the page."""
    at(page, 9)
    page.keyboard.press("e")
    page.get_by_label("Prompt, user 1.1").fill("A draft.")
    page.context.set_offline(True)
    page.keyboard.press("Control+Enter")
    status(page, "Not saved")
    red, green, blue = page.evaluate("getComputedStyle(document.getElementById('status')).color.match(/\\d+/g).map(Number)")
    assert red > 2 * max(green, blue)  # not as what is saved
    assert page.get_by_label("Prompt, user 1.1").input_value() == "A draft." and decision(page, 9) is None
    page.context.set_offline(False)
    page.get_by_label("Prompt, user 1.1").focus()
    page.keyboard.press("Control+Enter")
    status(page, "Saved")
    assert decision(page, 9) == ("accept", ["A draft."], "")
    address = page.server.links["anna"].split("#")[0]
    assert not [url for url in page.requests if not url.startswith((address, f"blob:{address}"))]
    assert not [text for text in page.problems if "ERR_INTERNET_DISCONNECTED" not in text]
