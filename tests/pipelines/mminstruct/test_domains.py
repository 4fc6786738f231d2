"""The data files: seed questions of all domains, placeholders, suffixes, prompts."""

import re

import pytest
import yaml

from mpo.pipelines.mminstruct.domains import LANGUAGES, OURS, PLACEHOLDER, TYPES, check_domain, load_domains, prompts
from mpo.pipelines.mminstruct.language import CJK

DOMAINS = load_domains()


def test_there_are_24_domains():
    assert len(DOMAINS) == 24 and all(len(one.queries) >= 3 for one in DOMAINS.values())


@pytest.mark.parametrize("name", DOMAINS)
def test_seeds(name):
    domain = DOMAINS[name]
    for type in TYPES:
        for language in LANGUAGES:
            seeds = domain.questions(type, language)
            assert len({*seeds}) == len(seeds) >= 5
            for seed in seeds:
                bare = PLACEHOLDER.sub("", seed)
                assert "<" not in bare and ">" not in bare and re.search(r"[.?。？]$", seed), seed
                assert bool(CJK.search(bare)) == (language == "zh"), seed
                assert language == "en" or not re.search("[A-Za-z]{3}", bare), seed
        both = [
            sorted({one for seed in domain.questions(type, language) for one in PLACEHOLDER.findall(seed)})
            for language in LANGUAGES
        ]
        assert both[0] == both[1], (type, both)


def test_every_placeholder_is_used():
    used = {*PLACEHOLDER.findall(OURS.read_text())}
    assert used == {*prompts()["placeholders"]}


def test_suffixes():
    for type in TYPES:
        for language in LANGUAGES:
            assert len({*prompts()["suffixes"][type][language]}) == 10
    assert all("caption" not in one.lower() for own in prompts()["suffixes"].values() for texts in own.values() for one in texts)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seeds": {}}, "judgement: en"),
        ({"about": {"en": "x"}}, "zh"),
        ({"more": 1}, "unknown key 'more'"),
        ({"seed": {}, "seeds": None}, "unknown key 'seed'. Did you mean 'seeds'"),
        ({"short": ["  "]}, "seeds.short.en.0"),
        ({"short": ["What is on the <dish>?"]}, "<dish>"),
        ({"short": []}, "seeds.short.en"),
    ],
)
def test_what_is_no_domain(tmp_path, change, name):
    given = yaml.safe_load(OURS.read_text())["ocr"]
    if "short" in change:
        given["seeds"]["short"]["en"] = change.pop("short")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(given | change))
    with pytest.raises(ValueError, match=re.escape(name)):
        load_domains([tmp_path])


def test_two_domains_called_the_same(tmp_path):
    text = yaml.safe_dump(yaml.safe_load(OURS.read_text())["ocr"])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kitchen.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"'kitchen': .*a/kitchen.yaml and .*b/kitchen.yaml"):
        load_domains([tmp_path / "a", tmp_path / "b"])
    load_domains([tmp_path / "a", tmp_path / "a" / "kitchen.yaml"])


def test_names_of_domains(tmp_path):
    assert check_domain("Image Style", DOMAINS, "here") == "image_style"
    for name in ("landmarks", "", None, 3):
        with pytest.raises(ValueError, match="here"):
            check_domain(name, DOMAINS, "here")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        load_domains([tmp_path / "bad.yaml"])
    with pytest.raises(ValueError, match=r"none\.yaml"):
        load_domains([tmp_path / "none.yaml"])
