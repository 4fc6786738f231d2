"""Mixtures: how much of each source, evaluation parts, resuming, streams."""

import inspect
import json
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, List
from datasets import Image as ImageFeature
from small_runs import small_run
from support import make_image
from torch.utils.data import DataLoader

from mpo.data import load_preferences
from mpo.data.eval_part import components, split_eval
from mpo.data.load import amounts, draw, mix, shares, stream_mixture
from mpo.data.mixture_file import LOAD_KEYS, OWN, check_sources, read_mixture


def write(path, count, *, name=None, images=0):
    """`count` pairs; with `images`, pair i shows image i % images."""
    name = name or path.stem
    lines = []
    for index in range(count):
        line = {"id": f"{name}-{index}", "question": f"{name}: what is {index}?", "chosen": f"It is {index}.", "rejected": "No."}
        if images:
            shown = path.parent / f"{index % images}.png"
            if not shown.exists():
                make_image(index % images).save(shown)
            line["image"] = shown.name
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def sources(tmp_path):
    """Sources a (100 pairs), b (10), c (7)."""
    return [{"path": write(tmp_path / f"{name}.jsonl", count)} for name, count in (("a", 100), ("b", 10), ("c", 7))]


def taken(mixture):
    return {row.name: row.taken for row in mixture.taken}


def by_source(pairs):
    return Counter(pairs["source"])


def test_repeat_time(sources):
    """0.29 of 100 is 28 pairs, rounded down as in the official code; 2.5 x 10 is each pair twice and 5 of them once more."""
    sources[0]["repeat_time"], sources[1]["repeat_time"] = 0.29, 2.5
    mixture = mix(sources, seed=3)
    assert taken(mixture) == by_source(mixture.train) == {"a": 28, "b": 25, "c": 7}
    times = Counter(mixture.train["id"])
    assert {times[f"a-{i}"] for i in range(100)} == {0, 1}
    assert sorted(times[f"b-{i}"] for i in range(10)) == [2] * 5 + [3] * 5


def test_a_limit_takes_of_all_sources(sources, tmp_path):
    """117 pairs: 23 of them are a fifth of each source, and none is repeated."""
    (tmp_path / "mixture.json").write_text(json.dumps({"sources": sources}))
    (tmp_path / "mixture.yaml").write_text((tmp_path / "mixture.json").read_text())
    pairs = load_preferences(tmp_path / "mixture.yaml", limit=23)
    assert by_source(pairs) == {"a": 20, "b": 2, "c": 1}
    assert len(set(pairs["id"])) == 23
    assert len(load_preferences(tmp_path / "mixture.yaml", limit=1000)) == 117


def test_a_source_of_which_nothing_is_taken_is_named(sources, caplog):
    sources[1]["repeat_time"] = 0.05  # of 10
    assert taken(mix(sources)) == {"a": 100, "b": 0, "c": 7}
    assert "No record of source 'b' is taken" in caplog.text and caplog.text.count("is taken") == 1


def test_the_same_seed_draws_the_same_and_another_does_not(sources):
    sources[0]["repeat_time"] = 0.3
    first = mix(sources, seed=1).train["id"][:]
    assert mix(sources, seed=1).train["id"][:] == first
    assert mix(sources, seed=2).train["id"][:] != first
    # The choice in source a does not depend on the other sources.
    assert mix([sources[2], sources[0]], seed=1).train["id"][7:] == first[:30]


def test_nothing_is_copied(sources):
    """The Arrow table of a mixture refers to the memory of its sources."""
    loaded = load_preferences(sources[0]["path"])
    mixture = mix([{**sources[0], "repeat_time": 50}])
    assert len(mixture.train) == 5000
    assert mixture.train.data.num_rows == len(loaded)


def test_square_root_resampling(sources):
    """sqrt(100) : sqrt(10) : sqrt(7) = 10 : 3.162 : 2.646 of 117 pairs is 74.0, 23.4 and 19.6."""
    mixture = mix(sources, sampling="sqrt")
    assert taken(mixture) == {"a": 74, "b": 23, "c": 20}
    assert max(Counter(mixture.train["id"]).values()) == 3  # 20 of c's 7 pairs
    assert taken(mix(sources, sampling="sqrt", size=1000)) == {"a": 633, "b": 200, "c": 167}


def test_weights_and_caps(sources):
    """Weights 1 : 1 : 2 of 40 pairs; if c is capped at 8, the others get the rest."""
    weighted = [{**source, "weight": weight} for source, weight in zip(sources, (1, 1, 2), strict=True)]
    assert taken(mix(weighted, size=40)) == {"a": 10, "b": 10, "c": 20}
    weighted[2]["cap"] = 8
    assert taken(mix(weighted, size=40)) == {"a": 16, "b": 16, "c": 8}
    sources[0]["cap"] = 12
    assert taken(mix(sources)) == {"a": 12, "b": 10, "c": 7}


@pytest.mark.parametrize("seed", range(20))
def test_shares_sum_to_the_total_within_their_caps(seed):
    rng = np.random.default_rng(seed)
    weights, caps = rng.random(6) + 0.01, rng.integers(1, 40, 6)
    total = int(rng.integers(0, caps.sum() + 1))
    found = shares(total, weights, caps)
    assert sum(found) == total and all(0 <= count <= cap for count, cap in zip(found, caps, strict=True))


def test_drawing_takes_every_pair_before_any_twice():
    for count in (0, 3, 7, 20):
        times = np.bincount(draw(7, count, np.random.default_rng(count)), minlength=7)
        assert times.sum() == count and times.max() - times.min() <= 1


def test_tiles_and_augment_of_a_source(sources, tmp_path):
    sources[0] |= {"tiles": {"max": 12}, "augment": True, "name": "charts"}
    train = mix(sources).train
    assert train[0]["tiles"] == {"min": None, "max": 12, "thumbnail": None} and train[0]["augment"] is True
    assert train[100]["tiles"] is None and train[100]["augment"] is None
    assert by_source(train) == {"charts": 100, "b": 10, "c": 7}


def test_describe(sources):
    sources[0]["repeat_time"] = 0.5
    lines = mix(sources).describe().split("\n")
    assert [line.split() for line in lines] == [
        ["source", "records", "taken", "fraction"],
        ["a", "100", "50", "74.6%"],
        ["b", "10", "10", "14.9%"],
        ["c", "7", "7", "10.4%"],
        ["in", "all", "117", "67", "100.0%"],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeat_tiem": 2}, "'repeat_tiem'.*repeat_time"),
        ({"repeat_time": 0}, "'a': 'repeat_time' .*got 0"),
        ({"weight": -1}, "'a': 'weight' .*got -1"),
        ({"cap": True}, "'a': 'cap' .*got True"),
        ({"cap": 2.9}, "'a': 'cap' .*got 2.9"),
        ({"limit": "5"}, "'a': 'limit' .*got '5'"),
        ({"limit": 1.5}, "'a': 'limit' .*got 1.5"),
        ({"augment": "yes"}, "'a': 'augment' .*got 'yes'"),
        ({"format": ["trl"]}, r"'a': 'format' .*got \['trl'\]"),
        ({"frames": 5}, "'a': frames .*got a number: 5"),
        ({"streaming": True}, "'a' .*'streaming'"),
        ({"weight": 2, "repeat_time": 2}, "'a' .*weight and a repeat_time"),
        ({"weight": 2}, "'b' has no weight"),
        ({"tiles": {"most": 3}}, "'a': 'tiles' .*got 'most'"),
        ({"tiles": {"maxx": 3}}, "'a': 'tiles' .*got 'maxx'.*max"),
        ({"tiles": 12}, "'a': 'tiles' .*got a number"),
        ({"path": None}, "path.*'path': None"),
        ({"path": 5}, "path.*'path': 5"),
        ({"name": "b"}, "Two sources .*'b'"),
    ],
)
def test_refusals(sources, change, message):
    sources[0] |= change
    with pytest.raises(ValueError, match=message):
        mix(sources)


def test_refusals_of_settings(sources):
    for settings, message in (
        ({"sampling": "square"}, "sampling .*repeat_time, weight, sqrt.*got 'square'"),
        ({"size": 10}, "size=10 with sampling=repeat_time"),
        ({"size": "100", "sampling": "sqrt"}, "size='100'"),
        ({"size": 10.5, "sampling": "sqrt"}, "size=10.5"),
        ({"seed": "x"}, "seed .*got 'x'"),
        ({"eval_size": "0.1"}, "eval_size .*got '0.1'"),
        ({"eval_size": [1]}, r"eval_size .*got \[1\]"),
        ({"eval_size": True}, "eval_size .*got True"),
        ({"eval_size": 1.5}, "eval_size .*got 1.5"),
        ({"eval_size": 200}, "eval_size=200 of 117 records is 200"),
        ({"eval_size": 0.001}, "eval_size=0.001 of 117 records is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            mix(sources, **settings)
    with pytest.raises(ValueError, match="at least one source"):
        mix([])
    with pytest.raises(ValueError, match="size=6, .*5 records"):
        mix([{**sources[0], "cap": 5}], sampling="sqrt", size=6)
    with pytest.raises(ValueError, match="repeat_time and cap .*no record"):
        mix([{**sources[2], "repeat_time": 0.1}])


def test_amounts_by_weight_of_an_empty_source():
    checked = check_sources([{"path": "a", "weight": 1}, {"path": "b", "weight": 1}])
    with pytest.raises(ValueError, match="'b' has no records"):
        amounts(checked, [3, 0], "weight")


# Evaluation parts


def test_no_question_and_no_image_is_on_both_sides(tmp_path):
    """60 pairs over 20 images, each in three pairs; 6 evaluation pairs are the pairs of two images."""
    pairs = load_preferences(write(tmp_path / "p.jsonl", 60, images=20)).cast_column("images", List(ImageFeature(decode=False)))
    train, evaluation = split_eval(pairs, 6, seed=1)
    assert len(train) == 54 and len(evaluation) == 6
    for column in (lambda row: row["images"][0]["path"], lambda row: row["prompt"][0]["content"][1]["text"]):
        assert not set(map(column, train)) & set(map(column, evaluation))
    assert split_eval(pairs, 0.1, seed=1)[1]["id"][:] == evaluation["id"][:]
    assert split_eval(pairs, 6, seed=2)[1]["id"][:] != evaluation["id"][:]


@pytest.mark.parametrize("other", [[{"role": "system", "content": "Be brief."}], []])
def test_a_question_is_what_the_user_asks(tmp_path, other):
    """Twenty questions, each there twice: the second time with a system message and different white space."""
    lines = []
    for index in range(20):
        for before, asked in ([], f"What is {index}?"), (other, f" What is\n{index}?"):
            lines.append({"prompt": [*before, {"role": "user", "content": asked}], "chosen": "Yes.", "rejected": "No."})
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def questions(pairs):
        return {" ".join(row["prompt"][-1]["content"][0]["text"].split()) for row in pairs}

    train, evaluation = split_eval(load_preferences(tmp_path / "p.jsonl"), 10)
    assert len(evaluation) == 10 and len(questions(evaluation)) == 5 and not questions(evaluation) & questions(train)


def test_the_same_image_in_two_files_is_one_image(tmp_path):
    """Pairs 0 and 1 have two copies of one image, pair 2 has another: one evaluation pair can only be pair 2."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_image(seed).save(tmp_path / f"{name}.png")
    lines = [
        {"id": name, "image": f"{name}.png", "question": f"{name}?", "chosen": "Yes.", "rejected": "No."}
        for name in ("a", "b", "c")
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for seed in range(5):
        assert split_eval(load_preferences(tmp_path / "p.jsonl"), 1, seed=seed)[1]["id"][:] == ["c"]


def test_pairs_are_connected_through_others():
    """0 - 1 by an image, 1 - 2 by a question, 3 alone."""
    assert components([["p1", "q1"], ["p1", "q2"], ["p2", "q2"], ["p3", "q3"]]).tolist() == [0, 0, 0, 1]
    assert components([["a"], ["b"], ["c"], ["b", "c"], ["a", "c"]]).tolist() == [0] * 5


def test_a_question_of_all_pairs_cannot_be_split(tmp_path):
    lines = []
    for index in range(6):
        make_image(index).save(tmp_path / f"{index}.png")
        lines.append({"image": f"{index}.png", "question": "Describe it.", "chosen": f"It is {index}.", "rejected": "No."})
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = load_preferences(tmp_path / "p.jsonl")
    with pytest.raises(ValueError, match=r"'<image>Describe it.' is in 6 records.*by='image'"):
        split_eval(pairs, 2)
    assert len(split_eval(pairs, 2, by="image")[1]) == 2


def test_a_mixture_has_evaluation_pairs_of_all_sources_once(sources):
    sources[1]["repeat_time"] = 3
    mixture = mix(sources, eval_size=12, seed=5)
    assert len(mixture.eval) == 12 and max(Counter(mixture.eval["id"]).values()) == 1
    assert not set(mixture.eval["id"]) & set(mixture.train["id"])
    in_eval = Counter(mixture.eval["source"])
    assert {row.name: (row.pairs, row.eval) for row in mixture.taken} == {
        name: (count - in_eval[name], in_eval[name]) for name, count in (("a", 100), ("b", 10), ("c", 7))
    }
    assert mixture.describe().split("\n")[0].split()[-1] == "eval"


# Files of mixtures


def test_a_mixture_file(sources, tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text("sources:\n  - {path: a.jsonl, repeat_time: 0.5}\n  - {path: b.jsonl}\nseed: 4\n")
    assert taken(mix(**read_mixture(path))) == {"a": 50, "b": 10}
    (tmp_path / "mixture.json").write_text(json.dumps([{"path": "a.jsonl"}]))
    assert read_mixture(tmp_path / "mixture.json") == {"sources": [{"path": str(tmp_path / "a.jsonl")}]}


def test_patterns_and_nulls_in_a_mixture_file(sources, tmp_path, monkeypatch):
    """Patterns are relative to the file's folder too, wherever the command runs; settings that are null are left out."""
    (tmp_path / "sub" / "shards").mkdir(parents=True)
    for name, count in (("a", 3), ("b", 4)):
        write(tmp_path / "sub" / "shards" / f"{name}.jsonl", count)
    path = tmp_path / "sub" / "mixture.yaml"
    path.write_text("sources:\n  - {path: shards/*.jsonl, name: shards}\n  - {path: ../c.jsonl}\nseed: null\nsize: null\n")
    monkeypatch.chdir(tmp_path)
    assert set(read_mixture("sub/mixture.yaml")) == {"sources"}
    assert by_source(load_preferences("sub/mixture.yaml")) == {"shards": 7, "c": 7}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [", "neither YAML nor JSON"),
        ("3", "list of sources.*int"),
        ("{sources: [], seeds: 1}", "unknown keys .*'seeds'"),
    ]
    + [
        ("sources: [a.jsonl]", "mixture.yaml: .*path.*got 'a.jsonl'"),
        ("sources: [{path: a, tiles: 12}]", "mixture.yaml: Source 'a': 'tiles' .*got a number"),
        ("{sources: [{path: a}], eval_size: yes}", "mixture.yaml: eval_size .*got True"),
        ("{sources: [{path: a}], seed: x}", "mixture.yaml: seed .*got 'x'"),
    ],
)
def test_refusals_of_mixture_files(tmp_path, text, message):
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mixture(path)
    with pytest.raises(ValueError, match="There is no file"):
        read_mixture(tmp_path / "none.yaml")


def test_a_mixture_file_executes_nothing(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text("sources: !!python/object/apply:os.system ['touch bad']")
    with pytest.raises(ValueError, match="neither YAML nor JSON"):
        read_mixture(path)


# Streams


def stream(sources, **settings):
    return [(row["source"], row["id"]) for row in stream_mixture(sources, **settings)]


def test_a_stream_follows_the_weights_and_reads_everything(sources):
    weighted = [{**source, "weight": weight} for source, weight in zip(sources, (8, 1, 1), strict=True)]
    rows = stream(weighted, seed=1)
    assert {name for _, name in rows} == {row["id"] for source in sources for row in load_preferences(source["path"])}
    assert 0.7 < sum(source == "a" for source, _ in rows) / len(rows) < 0.9
    assert stream(weighted, seed=1) == rows != stream(weighted, seed=2)


@pytest.mark.parametrize("weights", [None, (3, 1, 1)])
def test_a_stream_resumes(sources, weights):
    given = [{**source, **({} if weights is None else {"weight": weights[i]})} for i, source in enumerate(sources)]
    whole = stream(given)
    for place in (0, 1, 17, len(whole) - 1):
        first = stream_mixture(given)
        iterator = iter(first)
        for _ in range(place):
            next(iterator)
        second = stream_mixture(given)
        second.load_state_dict(first.state_dict())
        assert [(row["source"], row["id"]) for row in second] == whole[place:]


def test_columns_of_a_stream(sources):
    sources[0] |= {"tiles": {"max": 6}, "augment": True}
    rows = list(stream_mixture(sources[:2]))
    assert {row["source"]: row["tiles"] for row in rows} == {"a": {"min": None, "max": 6, "thumbnail": None}, "b": None}


def test_streams_are_not_counted(sources):
    with pytest.raises(ValueError, match="'a' has a repeat_time"):
        stream_mixture([{**sources[0], "repeat_time": 2}])


# Training


def test_a_mixture_resumed_in_mid_epoch_delivers_what_an_uninterrupted_run_does(sources, tmp_path):
    """Two epochs of 21 pairs, batches of 2; a run stopped after 5 of 22 steps and resumed gets the pairs of the other 17 steps."""
    given = [{**sources[0], "repeat_time": 0.04}, sources[1], sources[2]]
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 5, "dataloader_num_workers": 0, "kind": "text"}

    def run(folder, **more):
        trainer = small_run(folder, **settings, **more)
        seen = []
        trainer.train_dataset = mix(given, seed=7).train
        collate = trainer.data_collator
        trainer.data_collator = lambda records: seen.append([record["id"] for record in records]) or collate(records)
        return trainer, seen

    whole, expected = run(tmp_path / "whole")
    whole.train()
    assert len(expected) == 22 and sorted(sum(expected[:11], [])) == sorted(mix(given, seed=7).train["id"])
    assert expected[:11] != expected[11:]

    stopped, before = run(tmp_path / "stopped", max_steps=5)
    stopped.train()
    resumed, after = run(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-5"))
    assert before[:5] + after == expected  # the loader collates one batch ahead of the step
    assert before == expected[: len(before)]


def test_a_mixture_of_different_columns(tmp_path):
    """A missing column is filled with nulls; a column of another type is refused by name."""
    write(tmp_path / "a.jsonl", 2)
    pairs = load_preferences(tmp_path / "a.jsonl")
    other = Dataset.from_list([{**row, "margin": "much"} for row in pairs], features=None)
    from mpo.data.load import joined

    checked = check_sources([{"path": "a"}, {"path": "b"}])
    with_margin = pairs.add_column("margin", [0.5, 1.0])
    assert joined(checked, [with_margin, pairs.remove_columns([n for n in ("margin",) if n in pairs.column_names])])["margin"][
        :
    ] == [
        0.5,
        1.0,
        None,
        None,
    ]
    with pytest.raises(ValueError, match="column 'margin' is .* in source 'b'"):
        joined(checked, [with_margin, other.select_columns(["margin"])])


def test_workers_read_a_mixture(sources):
    loader = DataLoader(mix(sources).train, batch_size=None, num_workers=2)
    assert len([row["id"] for row in loader]) == 117


@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_a_mixture_cannot_contain_itself(tmp_path, names):
    """Directly, or through others."""
    for name, other in zip(names, names[1:] + names[0], strict=True):
        (tmp_path / f"{name}.yaml").write_text(f"sources: [{{path: {other}.yaml}}]\n")
    with pytest.raises(ValueError, match=rf"{names[-1]}\.yaml .*a\.yaml as a source"):
        load_preferences(tmp_path / "a.yaml")


def test_a_source_takes_every_argument_of_load_preferences():
    """All but `streaming`, which a mixture cannot have; `tiles` is checked as the source's own."""
    known = set(inspect.signature(load_preferences).parameters)
    assert set(LOAD_KEYS) | {"tiles", "streaming"} == known and not set(LOAD_KEYS) & set(OWN)


def test_null_in_a_mixture_is_not_set(tmp_path):
    """`on_bad_record: null` leaves the caller's setting, as a missing key does."""
    pair = {"question": "What?", "chosen": "This.", "rejected": "That."}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({**pair, "chosen": text}) + "\n" for text in ("This.", "", "These.")))
    (tmp_path / "mixture.yaml").write_text("sources:\n- path: a.jsonl\n  on_bad_record: null\n  bad_records: null\n")
    listed = tmp_path / "lists" / "bad.jsonl"
    settings = {"on_bad_record": "skip", "max_bad_fraction": 0.5, "bad_records": listed}
    assert len(load_preferences(tmp_path / "mixture.yaml", **settings)) == 2
    assert len(listed.read_text().splitlines()) == 1
