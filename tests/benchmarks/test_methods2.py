"""benchmarks/methods2.py and smollm2.py: their loop computes MPOTrainer's loss; pairs, rates and problems by hand."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpo import MPOConfig, MPOTrainer
from mpo.data import load_preferences
from mpo.losses import PairLogps

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from preference import plan, problems, start, tasks  # noqa: E402
from preference.jobs import Job, Pair, make_pairs, pair_logps, run  # noqa: E402

sys.path.pop(0)

TINY = replace(tasks.TASKS["reason"], worked=32, worked_epochs=1, reading=32, reading_epochs=1, questions=6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A start with next to no warm-up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "reason", TINY)
        patch.setattr(start, "EVAL", 12)
        return start.prepare(tmp_path_factory.mktemp("starts"), "reason", 5)


def pairs_of(begun):
    """Two examples of each question's form: the right one and one with other digits."""
    found = []
    for image, line in enumerate(begun.questions.lines):
        texts = [TINY.kinds[line["kind"]].worked_example(digits) for digits in (line["digits"], [1, 2, 3])]
        sides = [[*begun.processor.tokenizer(text, add_special_tokens=False)["input_ids"], begun.ends] for text in texts]
        found.append((Pair(image, begun.questions.prompts[line["kind"]], *sides), line, texts))
    return found


def test_the_loss_is_that_of_the_trainer(tiny, tmp_path):
    """The policy is the start with its head moved, so that log-ratios are not 0."""
    found = pairs_of(tiny)
    records = []
    for number, (_, line, (chosen, rejected)) in enumerate(found):
        line["image"].save(tmp_path / f"{number}.png")
        question = TINY.kinds[line["kind"]].text
        records.append({"image": f"{number}.png", "question": question, "chosen": chosen, "rejected": rejected})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    kept = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    reference = pair_logps(tiny.model, tiny.questions, [pair for pair, *_ in found])[0].sum(-1).detach()
    torch.manual_seed(0)
    with torch.no_grad():
        tiny.model.lm_head.weight += 0.05 * torch.randn_like(tiny.model.lm_head.weight)
    tokens, mask = pair_logps(tiny.model, tiny.questions, [pair for pair, *_ in found])
    sums, counts = tokens.sum(-1).detach(), mask.sum(-1)
    ours = Job(shift=False).mixture()(PairLogps(sums[0], sums[1], reference[0], reference[1], counts[0], counts[1]))
    policy = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    tiny.model.load_state_dict(kept)
    data = load_preferences(tmp_path / "pairs.jsonl", image_root=tmp_path)
    config = MPOConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", reward_shift="none")
    trainer = MPOTrainer(
        tiny.model, args=config, train_dataset=data, eval_dataset=data, processing_class=tiny.processor
    )  # the reference is a copy of the start
    tiny.model.load_state_dict(policy)
    theirs = trainer.evaluate()
    tiny.model.load_state_dict(kept)
    assert theirs["eval_loss"] == pytest.approx(ours.loss.item(), abs=2e-5)
    assert theirs["eval_logps/chosen"] == pytest.approx(sums[0].mean().item(), rel=1e-5)


def test_a_job_leaves_the_start_as_it_was(tiny):
    kept = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    questions, evaluated = (
        [tiny.processor.tokenizer(f"Final answer: {line['truth']}", add_special_tokens=False)["input_ids"] for line in split.lines]
        for split in (tiny.questions, tiny.eval)
    )
    tiny.samples = [[[*one, tiny.ends], [*one[:-1], tiny.ends], [*one, tiny.ends]] for one in questions]
    tiny.probe = [[[*one, tiny.ends], [tiny.ends]] for one in evaluated]
    result = run(tiny, Job(steps=3, batch=2, rate=1e-2), 5, count=12)
    assert result["pairs"][0]["pairs"] == len(tiny.questions) == 6
    assert len(result["correct"]) == 12 and result["probe"][0]["sum"] == [0.0, 0.0] != result["probe"][-1]["sum"]
    assert all(torch.equal(value, kept[name]) for name, value in tiny.model.state_dict().items())


def test_pairs_are_right_with_wrong_and_know_what_they_share(tiny):
    one = tiny.processor.tokenizer(f"Final answer: {tiny.questions.lines[0]['truth']}", add_special_tokens=False)["input_ids"]
    samples = {0: [[*one, tiny.ends], [*one], [*one[:-1], tiny.ends], [*one, tiny.ends]]}
    pairs = make_pairs(tiny, tiny.questions, samples, Job(), 0)
    assert {(tuple(pair.chosen), tuple(pair.rejected)) for pair in pairs} == {
        ((*one, tiny.ends), tuple(one)),
        ((*one, tiny.ends), (*one[:-1], tiny.ends)),
    }
    assert {pair.shared for pair in pairs} == {len(one), len(one) - 1}
    assert make_pairs(tiny, tiny.questions, samples, Job(accuracy=(0.6, 1.0)), 0) == []  # 2 of 4 are right


def test_rates_are_tried_until_the_best_is_inside(tmp_path):
    """3e-5 is the best of the first three, so 1e-5 is tried; it is worse, so 3e-5 is chosen."""

    def save(rate, right):
        job = plan.registered_job("reason", "sft", rate, 0)
        (tmp_path / f"{job.name}.json").write_text(json.dumps({"correct": "1" * right + "0" * (20 - right)}))

    tried, chosen = plan.tried_rates(tmp_path, "reason", "sft")
    assert ([job.job.rate for job in tried], chosen) == ([3e-5, 1e-4, 3e-4], None)
    for rate, right in ((3e-5, 8), (1e-4, 7), (3e-4, 1)):
        save(rate, right)
    tried, chosen = plan.tried_rates(tmp_path, "reason", "sft")
    assert ([job.job.rate for job in tried], chosen) == ([1e-5, 3e-5, 1e-4, 3e-4], None)
    save(1e-5, 6)
    assert plan.tried_rates(tmp_path, "reason", "sft")[1] == 3e-5


def test_problems_of_the_test_have_templates_of_their_own():
    known, test = problems.draw_problems(400, 0, test=False), problems.draw_problems(300, 0, test=True)
    assert not {(one.kind, one.template) for one in known} & {(one.kind, one.template) for one in test}
    assert {kind: len({one.template for one in test if one.kind == kind}) for kind in problems.KINDS} == dict.fromkeys(
        problems.KINDS, 3
    )
    assert len({one.question for one in known + test}) == 700
    assert all(problems.is_right(one.worked, one.answer) and not problems.is_right("none", one.answer) for one in known + test)


@pytest.mark.parametrize(
    ("work", "answer"), [("60 - 7 + 2", "55"), ("1987 - 9", "1978"), ("3 * 7 + 4", "25"), ("Sunday + 9 days", "Tuesday")]
)
def test_answers_by_hand(work, answer):
    assert problems.answer_of(work) == answer
