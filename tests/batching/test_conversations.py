"""Many conversations in one row give what one conversation a row gives: loss, log-probs, and every gradient, the tower's too.

In float64 to rounding; in float32 and bfloat16 packed rows may be at most twice as far from float64 as single rows are.
"""

import copy

import pytest
import torch
from conversations import KINDS, conversations
from support import TEXTS, perturbed

from mpo.batching.attention import packed_attention
from mpo.batching.collator import ConversationCollator
from mpo.encoding.images import add_tile_order
from mpo.models.small import small_internvl, small_processor

KINDS_OF_ROWS = {"mixed": tuple(KINDS), "text": ("text", "several turns"), "images": ("one image", "images in later turns")}


@pytest.fixture(scope="module")
def processor():
    return small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)


@pytest.fixture(scope="module")
def model(processor):
    model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)
    add_tile_order(model.base_model)
    return perturbed(model)


def results(model, batches) -> dict[str, torch.Tensor]:
    """Log-prob sums of all conversations, InternVL 2.5's loss, and its gradients by name."""
    model.zero_grad()
    sums, lengths = [], []
    for batch in batches:
        inputs = dict(batch.model_inputs)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[batch.positions_to_keep.index]
        logits = logits.double() if model.dtype == torch.float64 else logits.float()
        sums.append(batch.sums(logits.log_softmax(-1).gather(1, batch.shift_labels[0, :, None])[None, :, 0])[0])
        lengths.append(batch.lengths[0])
    sums, lengths = torch.cat(sums), torch.cat(lengths)
    loss = -(sums / lengths.sqrt()).sum() / lengths.sqrt().sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"log-probs": sums.detach(), "loss": loss.detach(), **gradients}


def packed_and_single(model, processor, rows) -> tuple[dict, dict]:
    records = conversations(7, KINDS_OF_ROWS[rows])
    records.append({**records[-1], "id": "the same images again"})
    collator = ConversationCollator(processor, layout="packed")
    padded = ConversationCollator(processor, layout="padded")
    with packed_attention(model, backend="segments"):
        packed = results(model, [collator(records)])
    return packed, results(model, [padded([record]) for record in records])


@pytest.mark.parametrize("rows", KINDS_OF_ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_packed_rows_equal_single_rows(model, processor, rows, dtype, record_property):
    exact = packed_and_single(copy.deepcopy(model).to(dtype).double(), processor, rows)[1]
    packed, single = packed_and_single(copy.deepcopy(model).to(dtype), processor, rows)
    assert packed.keys() == single.keys() == exact.keys()
    assert any("vision_tower" in name for name in packed) == (rows != "text")
    gradients = [name for name in packed if name not in ("log-probs", "loss")]
    for what, names in {"log-probs": ["log-probs"], "loss": ["loss"], "gradients": gradients}.items():
        first, second, third = (torch.cat([found[name].double().flatten() for name in names]) for found in (packed, single, exact))
        apart, error, least = (
            (x.norm() / third.norm()).item() for x in (first - third, second - third, third * torch.finfo(dtype).eps)
        )
        for layout, value in (("packed", apart), ("single", error)):
            record_property("difference", (f"{layout} rows against float64, {str(dtype)[6:]}, {rows}: {what}", value))
        assert apart <= (1e-14 if dtype == torch.float64 else 2 * max(error, least)), (what, apart, error)


def test_the_row(processor):
    """Positions begin at 0 in each conversation, no segment has another's keys, and labels are shifted."""
    records = [*conversations(6), conversations(6)[0]]  # the first one twice: it is not shared
    collator = ConversationCollator(processor, layout="packed")
    batch, alone = collator(records), [collator([record]) for record in records]
    assert batch["position_ids"][0].tolist() == [place for one in alone for place in range(one["input_ids"].shape[1])]
    assert batch["segments"].lengths == tuple((one["input_ids"].shape[1],) * 2 for one in alone)
    assert batch["segments"].key_index is None
    assert torch.equal(batch.shift_labels, torch.cat([one.shift_labels for one in alone], dim=1))
    assert (batch.sides, batch.size, batch.lengths.shape) == (1, 7, (1, 7))
    assert batch.lengths[0].tolist() == [one.lengths.item() for one in alone]


def test_a_bad_conversation_is_left_out(processor):
    records = conversations(3)
    records[1]["messages"] = records[1]["messages"][:1]
    batch = ConversationCollator(processor, layout="packed", on_bad_record="skip")(records)
    assert batch.counted == 2 and batch.kept == (0, 2) and [bad["id"] for bad in batch.bad] == ["conversation-1"]
