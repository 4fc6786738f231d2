"""The same completions in packed and in padded rows: random ones, small models for them, and what a model makes of both.

A batch is what `PairCollator` gives. `batches_of` makes one from token ids, for what no record can say.
"""

import copy
import random
from dataclasses import dataclass, replace

import torch
import transformers
from support import completion_mask, make_image, messages, perturbed
from torch.nn.functional import rms_norm
from trl.trainer.utils import add_fused_lm_head

from mpo.batching.attention import packed_attention
from mpo.batching.batch import Batch
from mpo.batching.collator import PairCollator
from mpo.batching.layout import completion_sums, concatenate, lay_out
from mpo.batching.logits_to_keep import LogitsToKeep, add_logits_to_keep, label_padded_rows
from mpo.encoding.labels import Completion
from mpo.losses import Mixture, PairLogps
from mpo.models.small import small_internvl

FAMILIES = ["qwen2", "qwen3", "llama"]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
TEXT_MODELS = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 16}),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
}
WORDS = "what is the sum of two numbers plus or minus not a cat on chair so it final answer: 1 2 3 5 8 13 21".split()
END = "<|im_end|>"


# Models


def internvl(processor, family="qwen2"):
    """Weights with noise, so that attention is far from uniform; four heads on two key-value heads."""
    sizes = {"hidden_size": 64, "heads": 4, "vision_hidden_size": 32}
    return perturbed(small_internvl(processor, text=family, **sizes), scale=0.1)


def text_model(family="qwen2", **changes):
    config, model, sizes = TEXT_MODELS[family]
    torch.manual_seed(0)
    return perturbed(model(config(**{**SIZES, "num_key_value_heads": 2, **sizes, **changes})), scale=0.1).eval()


def in_bfloat16(model):
    """The model with its weights rounded. Rotary frequencies stay in float32, as in a checkpoint that is loaded in bfloat16."""
    frequencies = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    model.to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        buffer.data = frequencies.get(name, buffer.data)
    return model


def in_float64(model):
    """A copy that computes in float64 throughout; transformers' own RMS norms go through float32."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, norm=module: rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    return exact


def with_head(model):
    """The model with the head of a training run: TRL's fused one, at the kept positions only."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    add_fused_lm_head(inner)
    add_logits_to_keep(inner.base_model)
    return model


# Random prompts and completions


@dataclass
class Group:
    """Token ids of a prompt, its tiles or None, and its completions."""

    prompt: list[int]
    tiles: torch.Tensor | None
    completions: list[Completion]


def random_ids(seed, count):
    return torch.randint(3, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _random_texts(draw, count):
    """Completions of 1 to 14 tokens, or with an earlier one before them; some are an earlier one, or its start."""
    texts = []
    for _ in range(count):
        new = random_ids(draw.getrandbits(30), draw.choice([1, draw.randint(1, 14)]))
        earlier = draw.choice(texts) if texts else new
        half = earlier[: max(1, len(earlier) // 2)]
        texts.append(draw.choice([new, new, half + new, earlier + new, earlier, half]))
    return texts


def random_group(draw, completions, image_count=0, processor=None):
    """A prompt of 1 to 11 tokens and its images. Every completion's last token is labelled, of the others nine in ten."""
    ids, tiles = random_ids(draw.getrandbits(30), draw.randint(1, 11)), None
    if image_count:
        text = "<IMG_CONTEXT>\n" * image_count + " ".join(draw.choices(WORDS, k=len(ids)))
        images = [make_image(draw.getrandbits(30), width=draw.choice([32, 64])) for _ in range(image_count)]
        inputs = processor(text=text, images=images, return_tensors="pt")
        ids, tiles = inputs["input_ids"][0].tolist(), inputs["pixel_values"]
    texts = _random_texts(draw, completions)
    loss_masks = [[draw.random() < 0.9 for _ in text[1:]] + [True] for text in texts]
    return Group(ids, tiles, [Completion(*both) for both in zip(texts, loss_masks, strict=True)])


def random_pairs(groups, draw):
    """Every completion is the chosen one of a pair, and any completion of any prompt the rejected one."""
    count = sum(len(group.completions) for group in groups)
    return [(place, draw.randrange(count)) for place in range(count)]


def random_records(draw, questions, plain_share=0.4):
    """Pairs among 2 to 8 completions a question with 0 to 3 images, in messages or plain text; most completions are in two pairs.

    A completion may begin like an earlier one, or go on after it after another turn; in plain text it may be the token that
    ends it and nothing else.
    """
    records = []
    for number in range(questions):
        plain = draw.random() < plain_share
        images = [make_image(draw.getrandbits(30), width=draw.choice([32, 64])) for _ in range(draw.randint(0, 3))]
        question = f"{number}: " + " ".join(draw.choices(WORDS, k=draw.randint(1, 8)))
        completions = [("",)] if plain else []
        for _ in range(draw.randint(2, 8) - len(completions)):
            new = " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))
            earlier = draw.choice(completions) if completions else (new,)
            completion = draw.choice([(new,), (new,), (*earlier[:-1], earlier[-1][:8] + new), (*earlier, "why?", new)])
            completions.append(completion if completion not in completions else (new, "so?", f"so {len(completions)}"))
        for place, chosen in enumerate(completions):
            rejected = completions[(place + draw.randint(1, len(completions) - 1)) % len(completions)]
            if plain:
                record = {"prompt": "<IMG_CONTEXT>\n" * len(images) + question}
                record |= {"chosen": END.join(chosen) + END, "rejected": END.join(rejected) + END}
            else:
                record = {"prompt": messages(question, "user"), "chosen": _turns(chosen), "rejected": _turns(rejected)}
            records.append({**record, "images": images})
    return records


def _turns(texts):
    return [message for place, text in enumerate(texts) for message in messages(text, ("assistant", "user")[place % 2])]


# Batches


def collated(processor, records):
    """The packed and the padded batch of records."""
    return tuple(PairCollator(processor, layout=layout)(records) for layout in ("packed", "padded"))


def batches_of(groups, pairs):
    """The packed and the padded batch of pairs of completions, which are numbered through, group after group.

    As `PairCollator` makes them: of padded rows the chosen ones come first, each with the tiles of its prompt.
    """
    order = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    rows = concatenate([lay_out(group.prompt, group.completions) for group in groups])
    labelled = rows.labelled.select(order)
    packed = Batch(
        {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "segments": rows.segments},
        LogitsToKeep(rows.labelled_positions, rows.input_ids.size(1), rows.labelled_segments),
        rows.shift_labels[:, rows.labelled_positions],
        replace(labelled, node=torch.searchsorted(rows.labelled_positions, labelled.node)),
        tokens=rows.input_ids.numel(),
    )
    texts = [(group, completion) for group in groups for completion in group.completions]
    texts = [texts[place] for place in order]
    shape = len(texts), max(len(group.prompt) + len(completion.ids) for group, completion in texts)
    input_ids, attention_mask, completion_mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for row, (group, completion) in enumerate(texts):
        begin, end = len(group.prompt), len(group.prompt) + len(completion.ids)
        input_ids[row, :end] = torch.tensor(group.prompt + completion.ids)
        attention_mask[row, :end] = 1
        completion_mask[row, begin:end] = torch.tensor(completion.loss_mask)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    padded = Batch(inputs, *label_padded_rows(input_ids, completion_mask), tokens=int(attention_mask.sum()))
    for batch, of_groups in ((packed, groups), (padded, [group for group, _ in texts])):
        tiles = [group.tiles for group in of_groups if group.tiles is not None]
        batch.model_inputs.update({"pixel_values": torch.cat(tiles)} if tiles else {})
    return packed, padded


def random_batches(processor, seed):
    """A packed and a padded batch of one to three prompts: of records, or (odd seeds) of token ids."""
    draw = random.Random(seed)
    questions = draw.randint(1, 3)
    if seed % 2 == 0:
        return collated(processor, random_records(draw, questions))
    groups = [random_group(draw, draw.randint(1, 8), draw.randint(0, 3), processor) for _ in range(questions)]
    return batches_of(groups, random_pairs(groups, draw))


# What a model makes of a batch


def trained_sums(model, batch):
    """Log-prob sums of the 2P completions, shape (2P,), as a training run has them (`with_head`)."""
    labels = {"positions_to_keep": batch.positions_to_keep, "shift_labels": batch.shift_labels}
    output = model(**batch.model_inputs, **labels, use_cache=False, fused_lm_head=True)
    return completion_sums(output.log_probs, batch.labelled)


def exact_sums(exact, padded, dtype=torch.float64):
    """The same from padded rows in float64 by nothing of ours: all logits, masked. A model of `dtype` would round its images."""
    inputs = {name: padded[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in padded}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype).double()
    logps = exact(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    assert logps.dtype == torch.float64
    return (logps.gather(-1, padded["input_ids"][:, 1:, None])[..., 0] * completion_mask(padded)[:, 1:].bool()).sum(1)


@dataclass
class Result:
    """Log-prob sums (2P,), the loss of each pair (P,), and the gradient of their mean by parameter."""

    sums: torch.Tensor
    losses: torch.Tensor
    gradients: dict[str, torch.Tensor]


def backward(model, sums, reference_sums, lengths):
    """MPO's loss of the policy's and the reference's sums, and its gradients."""
    model.zero_grad()
    mixture = Mixture.from_trl(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])
    mixed = mixture(PairLogps(*sums.chunk(2), *reference_sums.chunk(2), *lengths.chunk(2)))
    mixed.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Result(sums.detach(), mixed.per_pair.detach(), gradients)


class Models:
    """A policy and its reference, with the heads of a training run, and both in float64.

    Args:
        policy: in the dtype of the run.
        reference: likewise, with other weights.
        autocast: whether forward passes run under autocast to bfloat16.
    """

    def __init__(self, policy, reference, autocast=False):
        self.exact = in_float64(policy), in_float64(reference)
        self.trained = with_head(policy), with_head(reference)
        self.autocast = autocast

    def results(self, packed, padded):
        """What packed rows, padded rows, and padded rows in float64 give."""
        with packed_attention(*self.trained):  # until after the backward pass, where checkpointing computes the layers again
            first = self._result(packed)
        second = self._result(padded)
        policy, reference = self.exact
        dtype = self.trained[1].dtype
        with torch.no_grad():
            reference_sums = exact_sums(reference, padded, dtype)
        return first, second, backward(policy, exact_sums(policy, padded, dtype), reference_sums, padded.labelled.lengths)

    def _result(self, batch):
        policy, reference = self.trained
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                reference_sums = trained_sums(reference, batch)
            sums = trained_sums(policy, batch)
        return backward(policy, sums, reference_sums, batch.labelled.lengths)
