"""Servers: a stub with the ways and faults of real ones."""

import asyncio
import base64
import io
import json
import logging
import pickle
import signal
import socket
import threading
import time

import pytest
from PIL import Image, ImageChops
from stub_server import StubServer, stub_text
from support import make_image

from mpo.data.images import open_image
from mpo.generation.endpoint import retry_after
from mpo.generation.generator import GenerationError, Request
from mpo.generation.server import ServerGenerator

pytest.importorskip("openai")
ASKED = Request.ask("What is it?")
PREFIXED = Request.ask("What is it?", prefix="It is")


def texts(responses):
    return [[response.text for response in several] for several in responses]


def streamed(generator, requests, **settings):
    async def collect():
        return [found async for found in generator.stream(requests, **settings)]

    return asyncio.run(collect())


def encoded(kind, image=None, **how):
    file = io.BytesIO()
    (image or make_image(1)).save(file, format=kind, **how)
    return file.getvalue()


@pytest.fixture(scope="module")
def stub():
    """A server without faults."""
    with StubServer() as stub:
        yield stub


@pytest.mark.parametrize("kind", ["vllm", "sglang", "lmdeploy", "transformers", "other"])
def test_every_kind_gives_n_samples_with_their_own_seeds(kind):
    """Sample i has the seed seed + i, whether the server counts or is asked one by one; so those that are missing are the same."""
    requests = [Request.ask(f"{number}?") for number in range(5)]
    with StubServer(kind=kind) as stub:
        generator = ServerGenerator(stub.url, prices={"prompt": 2.0, "completion": 10.0})
        responses = generator.generate(requests, n=3, seed=7, max_new_tokens=30)
        assert stub.asked == (15 if kind == "transformers" else 5) == generator.usage.requests
        found = streamed(generator, [(requests[4], (2, 0))], n=3, seed=7, max_new_tokens=30)
        assert {number: response.text for _, number, response in found} == {n: texts(responses)[4][n] for n in (0, 2)}
        cut = generator.generate(requests[:1], n=2, max_new_tokens=4)
        expected = [[stub_text({"messages": body["messages"], "seed": 7}, n) for n in range(3)] for body in stub.bodies[:1]]
    assert expected[0] in texts(responses) and len({text for several in texts(responses) for text in several}) == 15
    first = responses[0][0]
    assert (first.finish_reason, first.prompt_tokens, first.logprobs) == ("stop", 9, None)
    alone = 16 if kind == "transformers" else None  # of several samples, servers say the sum
    assert {one.completion_tokens for several in responses for one in several} == {alone}
    assert {one.completion_tokens for _, _, one in found} == {16}  # two requests of one sample
    assert [(one.finish_reason, one.completion_tokens) for one in cut[0]] == [("length", 4)] * 2
    usage = generator.usage
    assert usage.cost == pytest.approx((2 * usage.prompt_tokens + 10 * usage.completion_tokens) / 1e6)
    assert (usage.responses, usage.completion_tokens) == (19, 17 * 16 + 2 * 4)


def test_what_is_sent_overrules_the_checkpoints_generation_config():
    """vLLM and SGLang would take top_k, min_p and the repetition penalty from it, LMDeploy has top_k=40."""
    said = {}
    for kind in ("vllm", "sglang", "lmdeploy", "transformers", "other"):
        with StubServer(kind=kind) as stub:
            ServerGenerator(stub.url, extra={"user": "me"} if kind == "other" else None).generate([ASKED], temperature=0.5)
            ServerGenerator(stub.url).generate([ASKED], temperature=0, stop=["5"])
            said[kind], greedy = stub.bodies
            assert "seed" not in greedy and greedy["temperature"] == 0 and ("stop" in greedy) == (kind != "transformers")
    assert {kind: said[kind].get("top_k") for kind in said} == {
        **{"vllm": -1, "sglang": -1, "lmdeploy": 0, "transformers": None, "other": None}
    }
    assert said["vllm"]["repetition_penalty"] == said["sglang"]["repetition_penalty"] == 1.0 and said["vllm"]["min_p"] == 0.0
    assert json.loads(said["transformers"]["generation_config"]) == {"do_sample": True, "repetition_penalty": 1.0, "top_k": 0}
    assert said["other"]["user"] == "me" and said["vllm"]["temperature"] == 0.5


@pytest.mark.parametrize("form", ["path", "bytes", "datasets"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_stored_images_are_sent_as_they_are(tmp_path, stub, form, kind):
    content = encoded(kind)
    (tmp_path / "a.jpg").write_bytes(content)  # whatever its name says
    image = {"path": tmp_path / "a.jpg", "bytes": content, "datasets": {"bytes": content, "path": "elsewhere.png"}}[form]
    ServerGenerator(stub.url).generate([Request.ask("What?", images=[image])])
    url = stub.bodies[-1]["messages"][0]["content"][0]["image_url"]["url"]
    head, _, sent = url.partition(",")
    assert head == f"data:image/{kind.lower()};base64"
    assert base64.b64decode(sent) == content


def turned(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(kind, make_image(2), exif=exif)


see_through = make_image(2).convert("RGBA")
see_through.putalpha(100)
OTHER_IMAGES = {
    "opened": make_image(2),
    "bmp": encoded("BMP", make_image(2)),
    "alpha": encoded("PNG", see_through),
    "alpha, webp": encoded("WEBP", see_through),
    "grey alpha": encoded("PNG", make_image(2).convert("LA")),
    "a transparent colour": encoded("PNG", make_image(2), transparency=(0, 0, 0)),
    "a transparent colour, gif": encoded(
        "GIF", make_image(2).convert("P"), transparency=make_image(2).convert("P").getpixel((0, 0))
    ),
    "16 bits": encoded("PNG", Image.new("I;16", (9, 7), 300)),
    "cmyk": encoded("JPEG", make_image(2).convert("CMYK")),
    "turned, png": turned("PNG"),
    "turned, webp": turned("WEBP"),
    **{kind: encoded(kind, make_image(2), save_all=True, append_images=[make_image(3)]) for kind in ("GIF", "PNG", "WEBP")},
}


@pytest.mark.parametrize("name", OTHER_IMAGES)
def test_images_that_a_server_may_read_otherwise_are_sent_as_training_sees_them(stub, name):
    ServerGenerator(stub.url).generate([Request.ask("What?", images=[OTHER_IMAGES[name]])])
    head, _, sent = stub.bodies[-1]["messages"][0]["content"][0]["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(sent))) as image:
        assert (image.mode, getattr(image, "is_animated", False), dict(image.getexif())) == ("RGB", False, {})
        assert ImageChops.difference(image, open_image(OTHER_IMAGES[name])).getbbox() is None


def test_a_jpeg_is_sent_as_it_is_if_training_reads_it(stub):
    """Turned, and with an end that is missing or followed by more."""
    for content in (turned("JPEG"), encoded("JPEG") + b"more"):
        ServerGenerator(stub.url).generate([Request.ask("What?", images=[content])])
        url = stub.bodies[-1]["messages"][0]["content"][0]["image_url"]["url"]
        assert base64.b64decode(url.partition(",")[2]) == content


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_an_image_that_is_cut_short_is_named_before_it_is_sent(stub, tmp_path, kind):
    content = encoded(kind, make_image(1, width=200))
    before = stub.asked
    for size in (20, len(content) // 2, len(content) - 40):
        (tmp_path / "cut.jpg").write_bytes(content[:size])
        for image, name in ((content[:size], "image 1 of 1"), (tmp_path / "cut.jpg", "image 1 of 1.*cut.jpg")):
            with pytest.raises(ValueError, match=name):
                ServerGenerator(stub.url).generate([Request.ask("What?", images=[image])])
    assert stub.asked == before


@pytest.mark.parametrize("url", ["https://host/a.png", "data:image/png;base64," + "A" * 9999, {"path": "s3://a/b.png"}])
def test_a_url_is_no_image(url):
    with pytest.raises(ValueError, match="image 1 of 1 is a URL") as refused:
        Request.ask("What?", images=[url])
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("image", ["gone.png", "", b"", b"<html>", b"version https://git-lfs.github.com", 5])
def test_an_image_that_is_gone_or_none_is_named_and_nothing_is_sent(stub, image):
    before = stub.asked
    with pytest.raises(ValueError, match="request 1.*image"):
        ServerGenerator(stub.url, concurrency=1).generate([ASKED, Request.ask("What?", images=[image])])
    found = streamed(ServerGenerator(stub.url), [Request.ask("What?", images=[image]), ASKED], n=2)
    assert {place: isinstance(response, GenerationError) for place, _, response in found} == {0: True, 1: False} and len(found) == 4
    assert stub.asked - before <= 2


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("vllm", lambda body: body["mm_processor_kwargs"]["max_dynamic_patch"]),
        ("sglang", lambda body: body["max_dynamic_patch"]),
        ("lmdeploy", lambda body: body["messages"][0]["content"][0]["image_url"]["max_dynamic_patch"]),
    ],
)
def test_tile_limits(kind, where):
    with StubServer(kind=kind) as stub:
        ServerGenerator(stub.url, max_tiles=6).generate([Request.ask("What?", images=[make_image(1)])])
        assert where(stub.bodies[-1]) == 6


@pytest.mark.parametrize(
    ("kind", "given", "settings", "name"),
    [
        ("other", {}, {"top_k": 5}, "top_k=5"),
        ("other", {"max_tiles": 2}, {}, "max_tiles=2"),
        ("transformers", {"max_tiles": 2}, {}, "max_tiles=2"),
        ("transformers", {}, {"logprobs": True}, "logprobs=True"),
    ],
)
def test_settings_that_a_server_would_ignore_are_refused(kind, given, settings, name):
    with StubServer(kind=kind) as stub:
        with pytest.raises(ValueError, match=name):
            ServerGenerator(stub.url, **given).generate([ASKED], **settings)
        assert stub.asked == 0
        if kind == "other":
            assert ServerGenerator(stub.url, kind="vllm").generate([ASKED], top_k=5, logprobs=True)


def test_fields_that_a_server_refuses_are_settings():
    with StubServer(kind="transformers") as stub, pytest.raises(ValueError, match=r"422.*unheard_of"):
        ServerGenerator(stub.url, extra={"unheard_of": 1}).generate([ASKED] * 3)


def test_logprobs(stub):
    ((response,),) = ServerGenerator(stub.url).generate([ASKED], logprobs=True, max_new_tokens=4)
    assert response.logprobs == (-0.5,) * 4


FAULTS = [429, 500, 503, "reset", "half", "empty", "garbage", "no choices"]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_succeed_later_is_repeated(fault):
    requests = [Request.ask(f"{number}?") for number in range(3)]
    with StubServer(faults=[fault], retry_after=0.01) as stub:
        responses = ServerGenerator(stub.url).generate(requests, n=2)
        assert stub.asked == 4 and sorted({len(several) for several in responses}) == [2]


@pytest.mark.parametrize("fault", [400, 413, 422])
def test_what_is_refused_is_not_repeated(fault):
    """One of three requests is refused: it is asked once, and a plain request tells that it is its own fault."""

    def poison(body):
        return fault if "bad" in body["messages"][0]["content"] else None

    with StubServer(poison=poison) as stub:
        found = streamed(ServerGenerator(stub.url, concurrency=1), [Request.ask("bad"), ASKED, Request.ask("bad")], n=2)
        errors = [(place, number) for place, number, response in found if isinstance(response, GenerationError)]
        assert errors == [(0, 0), (0, 1), (2, 0), (2, 1)] and len(found) == 6
        assert stub.asked == 4 and str(fault) in next(one.reason for _, _, one in found if isinstance(one, GenerationError))
        with pytest.raises(GenerationError, match=f"request 1.*{fault}"):
            ServerGenerator(stub.url, concurrency=1).generate([ASKED, Request.ask("bad")])


@pytest.mark.parametrize("fault", [500, "reset", "garbage"])
def test_a_request_that_always_fails_is_given_up_and_the_others_go_on(fault):
    def poison(body):
        return fault if "bad" in body["messages"][0]["content"] else None

    with StubServer(poison=poison) as stub:
        found = streamed(ServerGenerator(stub.url, attempts=2), [Request.ask("bad"), ASKED, ASKED])
        assert [isinstance(response, GenerationError) for _, _, response in sorted(found, key=lambda one: one[0])] == [
            True,
            False,
            False,
        ]
        assert stub.asked == 2 + 2 + 1


@pytest.mark.parametrize("fault", [400, 500, "reset"])
def test_a_server_that_fails_at_everything_stops_the_stream(fault):
    with (
        StubServer(poison=lambda body: fault) as stub,
        pytest.raises((ConnectionError, ValueError), match="every request|No other"),
    ):
        streamed(ServerGenerator(stub.url, attempts=1, concurrency=2), [ASKED] * 20)
    assert stub.asked <= 5


def test_a_rate_limit_is_waited_for():
    """Three of three are turned away for 0.4 s: the next attempt is no sooner, and attempts=1 does not count them."""
    with StubServer(faults=[429, 429, 429], retry_after=0.4) as stub:
        begun = time.monotonic()
        assert len(ServerGenerator(stub.url, attempts=1).generate([ASKED] * 3)) == 3
        assert time.monotonic() - begun >= 0.4 and stub.asked == 6
    with StubServer(poison=lambda body: 429, retry_after=60) as stub, pytest.raises(ConnectionError, match="429"):
        ServerGenerator(stub.url, total_timeout=1).generate([ASKED])
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and retry_after("120") == 120 and retry_after("x") is None


def test_time_limits():
    with StubServer(faults=["slow"]) as stub:
        assert ServerGenerator(stub.url, timeout=2).generate([ASKED])
        assert stub.asked == 2
    with StubServer(poison=lambda body: "slow") as stub, pytest.raises(ConnectionError, match="no response"):
        ServerGenerator(stub.url, timeout=0.2, total_timeout=0.6).generate([ASKED])

    async def dripping():
        for _ in range(100):
            yield PART
            await asyncio.sleep(0.05)

    with StubServer(poison=lambda body: dripping()) as stub, pytest.raises(ConnectionError, match="0.4 s"):
        ServerGenerator(stub.url, total_timeout=0.4).ask(ASKED)


def test_a_request_that_breaks_connections_does_not_hold_the_others_up():
    """Others are asked while it waits for its second attempt, more than the one that is asked together with its first."""

    def poison(body):
        return "reset" if "bad" in body["messages"][0]["content"] else None

    with StubServer(poison=poison) as stub:
        found = streamed(ServerGenerator(stub.url, concurrency=2, attempts=2), [Request.ask("bad"), *[ASKED] * 40])
        bad = [place for place, body in enumerate(stub.bodies) if body["messages"][0]["content"] == "bad"]
    assert len(found) == 41 and len(bad) == 2 and bad[1] - bad[0] > 3


def test_the_key_is_of_the_environment_and_nowhere_else(monkeypatch, caplog):
    secret = "sk-very-secret"
    with StubServer(key=secret) as stub:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-quite-wrong")
        with pytest.raises(ConnectionError, match="401.*OPENAI_API_KEY") as refused:
            ServerGenerator(stub.url).generate([ASKED])
        assert "sk-quite-wrong" not in str(refused.value)
        monkeypatch.setenv("MY_KEY", secret)
        generator = ServerGenerator(stub.url, key_variable="MY_KEY")
        assert generator.generate([ASKED])
    with pytest.raises(ConnectionError) as gone:
        ServerGenerator(stub.url, key_variable="MY_KEY").generate([ASKED])
    said = [repr(generator), repr(vars(generator)), str(generator.identity()), str(gone.value), caplog.text]
    assert not any(secret in text for text in said)
    with pytest.raises(ValueError, match="environment variable") as given:
        ServerGenerator(stub.url, key_variable=secret)
    assert secret not in str(given.value)


@pytest.mark.parametrize("key", ["sk-hidden\n", "sk-hidden\r", "sk-\x01hidden", "sk-hidd\u00e9n", "  ", "sk hidden"])
def test_a_key_that_no_header_can_hold_is_refused_by_the_name_of_its_variable(monkeypatch, stub, key):
    generator = ServerGenerator(stub.url, key_variable="MY_KEY")
    monkeypatch.setenv("MY_KEY", key)
    before = stub.asked
    for ask in (lambda: ServerGenerator(stub.url, key_variable="MY_KEY"), lambda: generator.generate([ASKED])):
        with pytest.raises(ValueError, match="MY_KEY") as refused:
            ask()
        assert "hid" not in str(refused.value)
    assert stub.asked == before


PART = b'data: {"model": "tiny", "choices": [{"index": 0, "delta": {"content": "It"}, "finish_reason": null}]}\n\n'


BEFORE_TEXT = {"empty": "sent none", "garbage": "sent none", "no choices": "sent none", "half": "broke|failed", "slow": "0.3 s"}
AFTER_TEXT = {
    PART: "ended its response early",
    PART + b"data: [DONE]\n\n": "ended its response early",
    PART + b'data: {"object": "error", "message": "OOM", "code": 500}\n\n': "OOM",
    PART + b'data: {"error": {"message": "OOM"}}\n\n': "OOM",
    PART + b'data: {"model": "ti\n\n': "JSON",
    PART + b'data: {"choices": [5]}\n\n': "broken",
    PART + b"data: 5\n\n": "5",
    PART.replace(b"null", b'"abort"'): "abort",
}


@pytest.mark.parametrize(("fault", "said"), [*BEFORE_TEXT.items(), *AFTER_TEXT.items()])
def test_a_stream_that_is_broken_is_no_response(fault, said):
    """It is repeated if no text has come; the last attempt is followed by a plain request."""
    settings = {"timeout": 0.3 if fault == "slow" else 20}
    with StubServer(faults=[fault]) as stub:
        generator = ServerGenerator(stub.url, attempts=1, **settings)
        with pytest.raises(ConnectionError, match=said):
            generator.ask(ASKED)
        assert stub.asked == (2 if fault in BEFORE_TEXT else 1) and generator.usage.lost == 1
        stub.faults = [fault] if fault in BEFORE_TEXT else []
        assert ServerGenerator(stub.url, **settings).ask(ASKED).text


def test_json_of_any_depth_is_a_broken_response():
    with StubServer(poison=lambda body: b"[" * 100_000) as stub, pytest.raises(ConnectionError, match="JSON"):
        ServerGenerator(stub.url, attempts=1).generate([ASKED])


def test_a_password_of_the_address_is_not_shown():
    with StubServer() as stub:
        generator = ServerGenerator(stub.url.replace("//", "//me:hidden@"), attempts=1)
        assert generator.generate([ASKED])
    with pytest.raises(ConnectionError) as gone:
        generator.generate([ASKED])
    assert not any("hidden" in text for text in (str(gone.value), repr(generator.endpoints), str(generator.identity())))
    with pytest.raises(ValueError) as wrong:
        ServerGenerator("ftp://me:hidden@host/v1")
    assert "hidden" not in str(wrong.value)


def test_several_servers_share_the_work_and_stand_in_for_each_other():
    requests = [Request.ask(f"{number}?") for number in range(24)]
    with StubServer(delay=0.02) as first, StubServer(delay=0.02) as second:
        expected = texts(ServerGenerator(first.url).generate(requests, temperature=0))
        before = first.asked
        generator = ServerGenerator([first.url, second.url], concurrency=8)
        assert texts(generator.generate(requests, temperature=0)) == expected
        assert 8 <= first.asked - before <= 16 and first.asked - before + second.asked == 24
        first.poison = lambda body: "reset"
        assert texts(generator.generate(requests, temperature=0)) == expected
    with StubServer() as third:
        generator = ServerGenerator([first.url, third.url])  # the first is gone
        assert texts(generator.generate(requests, temperature=0)) == expected
        assert any(first.url in notice for notice in generator.notices)


@pytest.mark.parametrize("fault", ["slow", "reset", 500])
def test_a_server_that_fails_is_asked_after_the_others_until_it_answers(fault):
    """Single questions do not pay for it one by one."""
    with StubServer(poison=lambda body: fault) as failing, StubServer() as right:
        generator = ServerGenerator([failing.url, right.url], timeout=2)
        for number in range(4):
            assert generator.generate([Request.ask(f"{number}?")]) and generator.ask(ASKED).text
        assert (failing.asked, right.asked) == (1, 8)
        failing.poison, right.poison = None, lambda body: 500
        for _ in range(3):
            assert generator.ask(ASKED).text
        assert failing.asked == 4


@pytest.mark.parametrize("fault", [400, 401, 403, 404])
def test_a_server_that_refuses_what_others_serve_is_left_out_and_reported_once(fault):
    with StubServer(poison=lambda body: fault) as wrong, StubServer() as right:
        generator = ServerGenerator([wrong.url, right.url], concurrency=4)
        assert len(generator.generate([ASKED] * 20)) == 20 and right.asked == 20 and wrong.asked <= 5
        assert len(generator.generate([ASKED] * 2)) == 2 and generator.ask(ASKED).text
        assert [wrong.url in notice for notice in generator.notices] == [True]
        wrong.poison = lambda body: fault if body.get("n", 1) > 2 else None
        assert fault == 401 or len(generator.generate([ASKED] * 4, n=3)) == 4
        wrong.poison = right.poison = lambda body: fault
        for ask in (lambda: generator.generate([ASKED] * 20), lambda: generator.ask(ASKED)):
            with pytest.raises((ConnectionError, ValueError), match=f"{fault}.*{fault}|endpoint.*endpoint") as refused:
                ask()
            assert wrong.url in str(refused.value) and right.url in str(refused.value)


@pytest.mark.parametrize("first", [True, False])
def test_a_request_that_a_server_refuses_which_answers_others_is_at_fault(first):
    """It is asked once, whichever server it comes to; a server that begins to refuse everything is left out."""

    def poison(body):
        return 400 if "bad" in str(body["messages"]) else None

    with StubServer(poison=poison) as one, StubServer(poison=poison) as other:
        generator = ServerGenerator([one.url, other.url], concurrency=2)
        requests = [Request.ask("bad" if number % 3 == (not first) else f"{number}?") for number in range(12)]
        found = streamed(generator, requests)
        assert {number for number, _, response in found if isinstance(response, GenerationError)} == {*range(not first, 12, 3)}
        assert sum("bad" in str(body["messages"]) for body in one.bodies + other.bodies) == 4 and not generator.notices
        with pytest.raises(ConnectionError, match="400"):
            generator.ask(requests[int(not first)])
        one.poison = lambda body: 400 if one.asked > 12 else None
        found = streamed(generator, [Request.ask(f"{number}?") for number in range(40)])
        assert len(found) == 40 and not any(isinstance(response, GenerationError) for *_, response in found)
        assert [one.url in notice for notice in generator.notices] == [True]


def test_a_start_fails_only_if_no_server_can_be_used(monkeypatch):
    """Where nobody listens, for another key, another path, no list of models, and one that cannot go on from a prefix."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with StubServer(key="sk-other") as locked, StubServer(kind="other") as closes, StubServer() as right:
        wrong = ["http://127.0.0.1:1/v1", locked.url, f"{right.url}/nowhere"]
        for model in (None, "tiny"):
            generator = ServerGenerator([*wrong, right.url], model, concurrency=4)
            assert len(generator.generate([ASKED] * 8)) == 8 and generator.ask(ASKED).text
            assert generator.identity()["model"] == "tiny"
            assert [sum(url in notice for notice in generator.notices) for url in wrong] == [1, 1, 1]
        with pytest.raises(ConnectionError) as refused:
            ServerGenerator(wrong).generate([ASKED])
        assert all(url in str(refused.value) for url in wrong) and "OPENAI_API_KEY" in str(refused.value)
        generator = ServerGenerator([closes.url, right.url])
        assert len(generator.generate([PREFIXED] * 6)) == 6 and generator.ask(PREFIXED).text
        assert all(body["max_tokens"] == 1 for body in closes.bodies)


def test_a_call_where_a_stream_is_read():
    """It does not wait for requests of the event loop that waits for it."""

    async def nested(generator):
        return [generator.generate([ASKED])[0][0].text async for _ in generator.stream([ASKED] * 4)]

    with StubServer() as stub:
        assert len(asyncio.run(nested(ServerGenerator(stub.url, concurrency=2)))) == 4


def test_calls_at_the_same_time_share_the_concurrency():
    with StubServer(delay=0.02) as stub:
        generator = ServerGenerator(stub.url, concurrency=3)
        calls = [lambda: generator.generate([ASKED] * 12), lambda: streamed(generator, [ASKED] * 12), lambda: generator.ask(ASKED)]
        threads = [threading.Thread(target=call) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert stub.answered == generator.usage.requests == 25 and stub.most_at_once == 3
        assert len(streamed(generator, [ASKED] * 8, concurrency=1)) == 8  # and an interrupted one has given its own back
        assert len(pickle.loads(pickle.dumps(generator)).generate([ASKED])) == 1


def test_what_is_paid_for_without_a_response_is_counted():
    """Two requests find out about the prefix and one about the second that is refused; two attempts are lost."""
    faults = [None, None, "half", None, "slow"]
    with StubServer(faults=faults, poison=lambda body: 400 if "bad" in str(body["messages"]) else None) as stub:
        generator = ServerGenerator(stub.url, timeout=2, concurrency=1, prices=(1.0, 1.0))
        found = streamed(generator, [PREFIXED, ASKED, *[Request.ask("bad")] * 2])
    usage = generator.usage
    assert [isinstance(response, GenerationError) for *_, response in found] == [False, False, True, True]
    assert (usage.responses, usage.lost, usage.requests, stub.asked) == (2, 2, 2 + 2 + 1, 2 + 2 + 2 + 2 + 1)
    assert usage.cost == (usage.prompt_tokens + usage.completion_tokens) / 1e6 and usage.prompt_tokens == 12 + 17 + 13 + 11 + 10


def test_another_model_is_named(stub):
    with pytest.raises(ConnectionError, match="'large'.*tiny"):
        ServerGenerator(stub.url, "large").generate([ASKED])
    with StubServer("small") as other, pytest.raises(ConnectionError, match="'tiny'.*small"):
        ServerGenerator([stub.url, other.url]).generate([ASKED])
    with StubServer(said_model="other-7b") as wrong, pytest.raises(ConnectionError, match="'tiny'.*'other-7b'"):
        ServerGenerator(wrong.url).generate([ASKED])


def test_no_server(stub):
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionError, match="cannot be reached"):
            ServerGenerator(f"http://127.0.0.1:{taken.getsockname()[1]}/v1").generate([ASKED])
    with pytest.raises(ConnectionError, match="/v1"):
        ServerGenerator(stub.url.removesuffix("/v1")).generate([ASKED])


def test_a_context_that_is_too_long_names_the_request():
    with StubServer(context=300) as stub:
        requests = [ASKED, Request.ask("What?", images=[make_image(1), make_image(2)])]
        with pytest.raises(GenerationError, match="request 1.*300 tokens.*max_new_tokens"):
            ServerGenerator(stub.url).generate(requests)


def test_samples_that_are_all_the_same_are_reported_once(caplog):
    with StubServer(same=True) as stub, caplog.at_level(logging.WARNING):
        generator = ServerGenerator(stub.url)
        generator.generate([ASKED, ASKED], n=3)
    assert len(generator.notices) == 1 and "do_sample" in caplog.text and "temperature=1.0" in generator.notices[0]
    with StubServer() as stub:
        generator = ServerGenerator(stub.url)
        generator.generate([ASKED, ASKED], n=3)
        assert generator.notices == []


def test_an_ignored_n_is_made_up_for():
    with StubServer(ignores_n=True) as stub:
        generator = ServerGenerator(stub.url)
        (several,) = texts(generator.generate([ASKED], n=4, seed=2))
        assert several == [stub_text({"messages": stub.bodies[0]["messages"], "seed": 2}, n) for n in range(4)]
        assert stub.asked == 4 and len(generator.notices) == 1 and "ignores n" in generator.notices[0]
        generator.generate([ASKED], n=4)
        assert [body.get("n", 1) for body in stub.bodies[4:]] == [1] * 4


@pytest.mark.parametrize("kind", ["vllm", "sglang", "lmdeploy"])
def test_a_prefix_is_gone_on_from_in_the_servers_way(kind):
    with StubServer(kind=kind) as stub:
        generator = ServerGenerator(stub.url)
        generator.generate([PREFIXED] * 3)
        body = stub.bodies[-1]
        assert body["messages"][-1] == {"role": "assistant", "content": "It is"}
        flags = [body.get("continue_final_message"), body.get("add_generation_prompt")]
        assert flags == ([None, None] if kind == "lmdeploy" else [True, False])
        assert len(generator.notices) == 1 and "prefix" in generator.notices[0]
        probes = stub.asked - 3
        generator.generate([PREFIXED])
        assert stub.asked == probes + 4  # it was probed once
        ServerGenerator(stub.url).generate([Request.ask("What?", images=[make_image(1)], prefix="It is")])


@pytest.mark.parametrize("kind", ["transformers", "other"])
def test_a_prefix_that_the_server_closes_is_refused_or_rendered_here(kind, processor):
    """Nothing but the probes is asked. With the template, a prompt without an image ends in the prefix."""
    with StubServer(kind=kind) as stub:
        shown = Request.ask("What?", images=[make_image(1)], prefix="It is")
        for request, given in ((PREFIXED, {}), (shown, {"template": processor})):
            with pytest.raises(ValueError, match="closes a prefix.*vLLM"):
                ServerGenerator(stub.url, **given).generate([request])
        assert all(body["max_tokens"] == 1 for body in stub.bodies)
        generator = ServerGenerator(stub.url, template=processor)
        ((response,),) = generator.generate([PREFIXED])
        prompt = stub.bodies[-1]["prompt"]
        assert prompt.endswith("assistant\nIt is") and "What is it?" in prompt and response.text
        assert generator.ask(PREFIXED).text == response.text


def test_requests_are_taken_as_they_are_needed():
    """Of endless requests no more are taken than are running, have waited for the reader, or are yielded."""
    taken = []

    async def endless():
        while True:
            taken.append(len(taken))
            yield Request.ask(f"{len(taken)}?")

    async def some(generator):
        stream = generator.stream(endless(), concurrency=4)
        found = [await anext(stream) for _ in range(10)]
        await asyncio.sleep(0.3)
        await stream.aclose()
        return found

    with StubServer() as stub:
        assert len(asyncio.run(some(ServerGenerator(stub.url)))) == 10
        assert len(taken) <= 10 + 4 + 2 * 4 + 4 and stub.most_at_once <= 4


def test_an_error_of_the_requests_is_raised(stub):
    def broken():
        yield ASKED
        raise KeyError("row")

    with pytest.raises(KeyError, match="row"):
        streamed(ServerGenerator(stub.url), broken())
    with pytest.raises(ValueError, match="Request"):
        streamed(ServerGenerator(stub.url), ["What?"])


def test_in_a_running_event_loop(stub):
    async def notebook():
        return ServerGenerator(stub.url).generate([ASKED], temperature=0)

    assert texts(asyncio.run(notebook())) == texts(ServerGenerator(stub.url).generate([ASKED], temperature=0))
    assert ServerGenerator(stub.url).generate([]) == []
    assert len(ServerGenerator(stub.url).generate(ASKED for _ in range(2))) == 2
    for wrong in (ASKED, ["What?"], "What?", None, [(ASKED, (1,))]):
        with pytest.raises(ValueError, match="list of requests"):
            ServerGenerator(stub.url).generate(wrong)


@pytest.mark.parametrize("cancels", [False, True])
def test_an_interrupt_in_a_running_event_loop_ends_what_runs_behind_it(cancels):
    """A notebook's loop raises KeyboardInterrupt; `asyncio.run` cancels its task instead."""
    with StubServer(delay=0.05) as stub:

        async def notebook():
            task, thread = asyncio.current_task(), threading.get_ident()
            interrupt = task.cancel if cancels else lambda: signal.pthread_kill(thread, signal.SIGINT)
            if not cancels:
                signal.signal(signal.SIGINT, signal.default_int_handler)

            def interrupt_when_asked():
                while not stub.asked:
                    time.sleep(0.01)
                interrupt()

            threading.Thread(target=interrupt_when_asked, daemon=True).start()
            ServerGenerator(stub.url, concurrency=2).generate([ASKED] * 5000)

        with pytest.raises(asyncio.CancelledError if cancels else KeyboardInterrupt):
            asyncio.run(notebook())
        time.sleep(0.3)  # for what was sent before
        asked = stub.asked
        time.sleep(0.3)
        assert 0 < asked == stub.asked < 5000


def test_one_question_is_streamed(stub):
    pieces = []
    response = ServerGenerator(stub.url).ask(ASKED, temperature=0, on_text=pieces.append)
    assert "".join(pieces) == response.text and len(pieces) > 3 and response.completion_tokens == 16
    assert response.text == texts(ServerGenerator(stub.url).generate([ASKED], temperature=0))[0][0]
    stop = response.text.split()[3]
    pieces = []
    cut = ServerGenerator(stub.url, kind="transformers").ask(ASKED, temperature=0, stop=[stop], on_text=pieces.append)
    assert cut.text == "".join(pieces) == response.text.split(stop)[0] and cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"urls": []}, "address"),
        ({"urls": "localhost:8000"}, "'localhost:8000'"),
        ({"urls": ["http://a/v1", "http://a/v1"]}, "different"),
        ({"kind": "ollama"}, "'ollama'"),
        ({"timeout": 0}, "timeout=0"),
        ({"total_timeout": "1"}, "total_timeout='1'"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"concurrency": None}, "concurrency=None"),
        ({"attempts": 1.5}, "attempts=1.5"),
        ({"max_tiles": 0}, "max_tiles=0"),
        ({"prices": {"prompt": 1}}, "prices="),
        ({"prices": (1, -1)}, "prices="),
        ({"prices": {"prompt": 1, "completion": 2, "image": 3}}, "prices="),
        ({"urls": None}, "None"),
        ({"model": ""}, "model=''"),
        ({"extra": {"model": "x"}}, "model"),
        ({"extra": ["a"]}, "extra"),
        ({"key_variable": None}, "key_variable"),
    ],
)
def test_invalid_arguments_are_refused(given, name):
    with pytest.raises(ValueError, match=name):
        ServerGenerator(**{"urls": "http://localhost:1/v1", **given})
