"""Collect images, and find them by text with a tiny CLIP that has learned four colours."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from small_clip import COLOURS, write_clip
from stub_server import StubServer
from support import make_image

from mpo.generation.generator import Response
from mpo.generation.server import ServerGenerator
from mpo.io import BadRecord, read_json_lines
from mpo.pipelines.job import Job
from mpo.pipelines.mminstruct.caption import Caption
from mpo.pipelines.mminstruct.collect import Classify, Images, Look, duplicates
from mpo.pipelines.mminstruct.make import collect
from mpo.pipelines.mminstruct.retrieve import Index, Retrieved


def soft(seed, size=(160, 120)):
    return make_image(seed, 6, 5).resize(size, Image.Resampling.BICUBIC)


def chart(label, size=(320, 240)):
    image = Image.new("RGB", size, "white")
    drawing = ImageDraw.Draw(image)
    for place, height in enumerate((40, 90, 140, 60)):
        drawing.rectangle((40 + 60 * place, 200 - height, 80 + 60 * place, 200), fill="steelblue")
    drawing.text((150, 215), label, fill="black")
    return image


def looked(folder):
    return Look()(Images(folder))


def test_copies_are_duplicates_and_others_are_not(tmp_path):
    soft(1, (320, 240)).save(tmp_path / "a.png")
    soft(1, (320, 240)).save(tmp_path / "b.jpg", quality=80)
    soft(1, (320, 240)).resize((160, 120)).save(tmp_path / "small.png")
    (tmp_path / "same.png").write_bytes((tmp_path / "a.png").read_bytes())
    soft(2, (320, 240)).save(tmp_path / "other.png")
    chart("2019").save(tmp_path / "chart1.png")
    chart("2018").save(tmp_path / "chart2.png")
    ImageDraw.Draw(changed := soft(1, (320, 240))).rectangle((100, 100, 140, 140), fill="black")
    changed.save(tmp_path / "changed.png")
    name = tmp_path.name
    found = duplicates(looked(tmp_path))
    assert {one.removeprefix(f"{name}/") for one in found} == {"b.jpg", "small.png", "same.png"}
    assert "same file" in found[f"{name}/same.png"] and "a.png" in found[f"{name}/small.png"]
    assert {*duplicates(looked(tmp_path), near=False)} == {f"{name}/same.png"}


def test_the_largest_copy_is_kept(tmp_path):
    soft(3, (96, 72)).save(tmp_path / "a.png")
    soft(3, (96, 72)).resize((192, 144)).save(tmp_path / "b.png")
    assert [*duplicates(looked(tmp_path))] == [f"{tmp_path.name}/a.png"]


def test_more_images_later(tmp_path):
    """They come after those of before, of which none makes room for a larger copy; one that is gone does."""
    (tmp_path / "in").mkdir()
    for number in (2, 5):
        soft(number).save(tmp_path / "in" / f"{number}.png")
    kept = lambda: [one["id"] for one in read_json_lines(tmp_path / "out" / "output.jsonl")]  # noqa: E731
    collect([Images(tmp_path / "in")], tmp_path / "out")
    assert kept() == ["in/2.png", "in/5.png"]
    soft(3).save(tmp_path / "in" / "1.png")
    soft(2).resize((320, 240)).save(tmp_path / "in" / "3.png")
    collect([Images(tmp_path / "in")], tmp_path / "out")
    assert kept() == ["in/2.png", "in/5.png", "in/1.png"]
    (tmp_path / "in" / "2.png").unlink()
    collect([Images(tmp_path / "in")], tmp_path / "out")
    assert kept() == ["in/5.png", "in/1.png", "in/3.png"]


def test_an_image_that_is_replaced(tmp_path):
    """It is looked at again, and asked about again, also where a smaller picture of it is shown; captions are kept."""
    (tmp_path / "in").mkdir()
    soft(1, (800, 600)).save(tmp_path / "in" / "1.png")
    soft(2, (800, 600)).save(tmp_path / "in" / "2.png")

    def run():
        before = server.asked
        collect([Images(tmp_path / "in")], tmp_path / "out", progress=False)
        seen = [*read_json_lines(tmp_path / "out" / "output.jsonl")]
        step = Caption(ServerGenerator(server.url, "tiny"), max_side=512)
        Job([step], [{**one, "content": ""} for one in seen], tmp_path / "captions").run(progress=False)
        return [one["width"] for one in seen], server.asked - before

    with StubServer() as server:
        assert run() == ([800, 800], 2) and run() == ([800, 800], 0)
        soft(3, (900, 700)).save(tmp_path / "in" / "1.png")
        assert run() == ([900, 800], 1)
        soft(4, (900, 700)).save(tmp_path / "in" / "1.png")  # what is known of it is the same
        assert run() == ([900, 800], 1)
        soft(1, (800, 600)).save(tmp_path / "in" / "1.png")
        assert run() == ([800, 800], 0)


def test_an_output_among_the_images_and_a_name_that_is_no_text(tmp_path):
    soft(1).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="output folder outside"):
        collect([Images(tmp_path)], tmp_path / "jobs" / "collect")
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"), "wb") as file:
        file.write((tmp_path / "a.png").read_bytes())
    with pytest.raises(ValueError, match=r"caf\\xe9\.png is not valid UTF-8"):
        collect([Images(tmp_path, limit=5)], tmp_path.with_name("other"))


def test_fields_of_a_folder_and_of_a_data_set(tmp_path):
    (tmp_path / "in" / "Image Style").mkdir(parents=True)
    soft(1).save(tmp_path / "in" / "Image Style" / "a.png")
    soft(2).save(tmp_path / "in" / "Image Style" / "b.PNG")
    (tmp_path / "in" / ".hidden.png").write_bytes(b"")
    line = {"file_name": "Image Style/a.png", "license": "CC-BY", "url": "https://a.b", "ocr": ["x", "y"], "tags": "cat, dog"}
    (tmp_path / "in" / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    first, second = Images(tmp_path / "in", domain="folder", licence="CC0")
    assert first["id"] == "in/Image Style/a.png" and first["domain"] == "image_style" and first["licence"] == "CC-BY"
    assert (first["origin"], first["ocr"], first["tags"]) == ("https://a.b", "x\ny", ["cat", "dog"])
    assert second["licence"] == "CC0" and "origin" not in second
    lines = [{"image": "in/Image Style/a.png", "domain": "ocr", "id": "one"}, {"image": "in/Image Style/b.PNG"}]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    first, second = Images(tmp_path / "set.jsonl", domain="landmark")
    assert (first["id"], first["domain"], second["domain"]) == ("set/one", "ocr", "landmark")
    assert len([*Images(tmp_path / "set.jsonl", limit=1)]) == 1


def test_images_in_parquet(tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as Feature

    rows = {"image": [soft(number) for number in range(3)], "domain": ["ocr", "ocr", "posters"]}
    Dataset.from_dict(rows, features=Features({"image": Feature(), "domain": Value("string")})).to_parquet(tmp_path / "a.parquet")
    report = collect([Images(tmp_path / "a.parquet")], tmp_path / "out", progress=False)
    assert report["kept"] == 3 and report["domains"] == {"ocr": 2, "posters": 1}
    assert all(Image.open(one["images"][0]).size == (160, 120) for one in read_json_lines(tmp_path / "out" / "output.jsonl"))


@pytest.mark.parametrize(
    ("line", "error", "name"),
    [
        ({"file_name": "none.png"}, ValueError, "none.png"),
        ({"image": "a.png"}, BadRecord, "file_name"),
        ({"file_name": "a.png", "domain": "lndmark"}, ValueError, "'landmark'"),
    ],
)
def test_wrong_metadata(tmp_path, line, error, name):
    soft(1).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(error, match=name):
        [*Images(tmp_path)]


def test_what_is_no_collection(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="1 files of other types"):
        Images(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        Images(tmp_path / "nowhere")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(BadRecord, match="image"):
        [*Images(tmp_path / "a.jsonl")]
    (tmp_path / "a.jsonl").write_text('{"image": "../../etc/passwd"}\n')
    with pytest.raises(ValueError, match="passwd"):
        [*Images(tmp_path / "a.jsonl")]
    soft(1).save(tmp_path / "top.png")
    with pytest.raises(ValueError, match=r"top\.png is in no folder"):
        [*Images(tmp_path, domain="folder")]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="No image is left of 1"):
        collect([Images(tmp_path / "bad")], tmp_path / "out", progress=False)
    assert read_json_lines(tmp_path / "out" / "dropped.jsonl")[0]["kind"] == "broken"
    with pytest.raises(ValueError, match="'bad'"):
        collect([Images(tmp_path / "bad"), Images(tmp_path / "bad")], tmp_path / "two", progress=False)


@pytest.mark.parametrize(
    ("said", "domain"),
    [("Landmark.", "landmark"), ("**image scene**", "image_scene"), ("a castle", None), ("ocr or posters", None), ("", None)],
)
def test_the_domain_that_a_model_names(said, domain):
    class One:
        identity = dict

    step = Classify(One())
    record = {"id": "a", "images": [soft(1)]}
    (asked,) = step.requests(record)
    assert "species_recognition: animals and plants" in str(asked.messages)
    if domain:
        assert step.finish(record, [[Response(said, "stop", 1, 1)]])["domain"] == domain
    else:
        with pytest.raises(Exception, match="the model names"):
            step.finish(record, [[Response(said, "stop", 1, 1)]])
    assert step.requests({**record, "domain": "ocr"}) == []


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def coloured(tmp_path):
    (tmp_path / "in").mkdir()
    for number, colour in enumerate((*COLOURS, *COLOURS)):
        image = Image.new("RGB", (64 + number, 64), colour)
        image.save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG broken")
    return tmp_path


def test_images_are_found_by_text(clip, coloured):
    index = Index(coloured / "index", clip)
    files = [one["images"][0] for one in Images(coloured / "in")]
    index.add(files)
    known = {one["content"]: one["file"] for one in read_json_lines(coloured / "index" / "images.jsonl")}
    assert len(known) == 8
    for place, colour in enumerate(COLOURS):
        found = index.search(colour, 2)
        assert {known[content][-5] for content, _ in found} == {f"{place}", f"{place + 4}"}
        assert found[0][1] >= found[1][1] > 0.5
    before = (coloured / "index" / "vectors.f32").read_bytes()
    assert np.allclose(np.linalg.norm(np.frombuffer(before, np.float32).reshape(8, -1), axis=1), 1, atol=1e-5)
    with open(coloured / "index" / "images.jsonl", "ab") as file:  # as a kill leaves it
        file.write(b'{"content": "x", "fi')
    with open(coloured / "index" / "vectors.f32", "ab") as file:
        file.write(b"12345")
    again = Index(coloured / "index", clip)
    again.add(files)
    assert (coloured / "index" / "vectors.f32").read_bytes() == before
    assert again.search("red", 2) == index.search("red", 2)
    with pytest.raises(ValueError, match="index of"):
        (coloured / "index" / "index.json").write_text('{"model": "other", "size": 8}')
        Index(coloured / "index", clip)
    with pytest.raises(ValueError, match="nowhere"):
        Index(coloured / "new", str(coloured / "nowhere"))


def test_an_index_of_other_weights_or_without_a_part(clip, coloured):
    """A model that was trained further in its folder finds nothing among vectors of before; moved, it is the same model."""
    own = shutil.copytree(clip, coloured / "clip")
    files = [one["images"][0] for one in Images(coloured / "in")]
    Index(coloured / "index", str(own)).add(files)
    Index(coloured / "index", str(own.rename(coloured / "moved")))
    weights = load_file(coloured / "moved" / "model.safetensors")
    weights["visual_projection.weight"] *= -1
    save_file(weights, coloured / "moved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights have changed"):
        Index(coloured / "index", str(coloured / "moved"))
    index = Index(coloured / "index", clip)
    os.truncate(coloured / "index" / "vectors.f32", 40)
    with pytest.raises(ValueError, match="lacks vectors"):
        index.search("red")
    (coloured / "index" / "index.json").unlink()
    with pytest.raises(ValueError, match="without its index.json"):
        Index(coloured / "index", clip)


def test_what_is_retrieved(clip, coloured):
    source = Images(coloured / "in")
    records = [*Retrieved(source, coloured / "index", clip, most=2, queries=["red", "blue"])]
    assert [one["id"] for one in records] == ["in/0.png", "in/2.png", "in/4.png", "in/6.png"]
    assert {one["query"] for one in records} == {"red", "blue"} and all(one["score"] > 0.5 for one in records)
    domains = {name: type("Domain", (), {"queries": [name]})() for name in ("red", "white")}
    source = Images(coloured / "in", domains=domains)
    records = [*Retrieved(source, coloured / "index", clip, most=2, by_query=True)]
    assert {one["id"][3]: one["domain"] for one in records} == {"0": "red", "4": "red", "3": "white", "7": "white"}


def test_a_collection_by_query(clip, coloured, capsys):
    from mpo.commands import main

    words = ["--clip", clip, "--retrieve", "2", "--query", "green", "--image-domain", "landmark"]
    assert main(["mminstruct", "collect", str(coloured / "in"), "--output", str(coloured / "out"), *words]) == 0
    kept = read_json_lines(coloured / "out" / "output.jsonl")
    assert [one["id"] for one in kept] == ["in/1.png", "in/5.png"] and {one["domain"] for one in kept} == {"landmark"}
    assert main(["mminstruct", "collect", str(coloured / "in"), "--output", str(coloured / "no"), "--image-domain", "query"]) == 2
    assert "--clip" in capsys.readouterr().err
