"""`transformers serve` with a tiny InternVL whose folder says do_sample: images as they are stored, real sampling, greedy texts."""

import io

import pytest
import torch
from real_server import transformers_serve
from support import TEXTS, make_image

from mpo.generation.generator import Request
from mpo.generation.local import LocalGenerator
from mpo.generation.server import ServerGenerator
from mpo.models.small import small_internvl, small_processor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def local():
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.generation_config.do_sample = True
    return LocalGenerator(model.eval(), processor)


@pytest.fixture(scope="module")
def server(local, tmp_path_factory, interpreter):
    folder = tmp_path_factory.mktemp("model")
    local.model.save_pretrained(folder)
    local.processor.save_pretrained(folder)
    with transformers_serve(folder, interpreter) as address:
        yield ServerGenerator(address, template=str(folder), concurrency=1)


def stored(seed):
    file = io.BytesIO()
    make_image(seed, width=96).save(file, format="JPEG")
    return file.getvalue()


REQUESTS = [
    Request.ask("What is the sum?", images=[stored(1)]),
    Request.ask("What is 2 plus 3?", system="Be brief."),
    Request.ask("Which is larger?", images=[make_image(2)]),
]


def whole(text):
    """Without an incomplete last character, which `transformers serve` leaves out."""
    return text.rstrip("\ufffd")


def test_both_generators_respond_alike(local, server):
    here, there = (generator.generate(REQUESTS, temperature=0, max_new_tokens=8) for generator in (local, server))
    for (one,), (other,) in zip(here, there, strict=True):
        assert whole(one.text) == whole(other.text) and other.text
        assert (one.prompt_tokens, one.completion_tokens) == (other.prompt_tokens, other.completion_tokens)
        assert one.finish_reason == other.finish_reason


def test_samples_differ_and_are_repeated_by_their_seeds(server):
    first, again = (server.generate(REQUESTS[:1], n=3, max_new_tokens=8, seed=3) for _ in range(2))
    assert first == again and len({response.text for response in first[0]}) == 3
    assert not any("the same" in notice for notice in server.notices)


def test_a_prefix_is_rendered_here(local, server):
    request = Request.ask("What is 2 plus 3?", prefix="2 plus 3")
    ((one,),), ((other,),) = (generator.generate([request], temperature=0, max_new_tokens=8) for generator in (local, server))
    assert whole(one.text) == whole(other.text) and one.prompt_tokens == other.prompt_tokens
    with pytest.raises(ValueError, match="prefix.*vLLM"):
        server.generate([Request.ask("What?", images=[stored(1)], prefix="It")])


def test_stop_texts(local, server):
    ((free,),) = local.generate(REQUESTS[:1], temperature=0, max_new_tokens=8)
    stop = free.text[len(free.text) // 2 :][:2]
    for generator in (local, server):
        ((response,),) = generator.generate(REQUESTS[:1], temperature=0, max_new_tokens=8, stop=[stop])
        assert response.text == free.text.split(stop)[0] and response.finish_reason == "stop"
