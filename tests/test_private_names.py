"""The private names of other libraries that the package uses, each with the files that use it. A new use belongs in the table.

Checked on TRL 1.16.0, transformers 5.17.0, 5.23.0 and 5.24.0, accelerate, peft and torch as installed. (Undocumented names without
an underscore: `trl.trainer.dpo_trainer.get_peft_model`, `trl.models.utils.disable_gradient_checkpointing`, helpers of
`trl.data_utils`, `aux_loss_enabled`, `ld_alpha`, `use_weighting`, `neftune_hook_handle`.)
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from trl import DPOTrainer

PACKAGE = Path(__file__).parents[1] / "mpo"
TRAINER = {  # overridden or called on TRL's and transformers' trainers
    "_finalize_training": {"training/loop.py"},
    "_get_collator_with_removed_columns": {"training/policy.py"},
    "_get_dataloader": {"training/loading.py"},
    "_get_eval_sampler": {"training/loading.py"},
    "_get_grad_norm": {"training/loop.py"},
    "_get_num_items_in_batch": {"training/loading.py"},
    "_get_output_dir": {"training/resuming.py"},
    "_load_best_model": {"training/resuming.py"},
    "_load_callback_state": {"training/resuming.py"},
    "_load_from_checkpoint": {"training/features/use.py", "training/mpo.py", "training/resuming.py"},
    "_load_optimizer_and_scheduler": {"training/resuming.py"},
    "_maybe_log_save_evaluate": {"training/loop.py"},
    "_name": {"training/mpo.py"},
    "_paper": {"training/mpo.py", "training/sft.py"},
    "_prepare_dataset": {"training/policy.py"},
    "_prepare_inputs": {"training/evaluating.py", "training/loading.py", "training/policy.py", "training/reference/use.py"},
    "_remove_unused_columns": {"training/loading.py", "training/policy.py"},
    "_run_epoch": {"training/loading.py"},
    "_save_checkpoint": {"training/resuming.py"},
    "_save_rng_state": {"training/resuming.py"},
    "_set_signature_columns_if_needed": {"training/policy.py"},
    "_signature_columns": {"training/policy.py"},
    "_tag_names": {"training/mpo.py", "training/sft.py"},
    "_total_train_tokens": {"training/loop.py", "training/resuming.py"},
    "_tp_size": {"training/loop.py"},
    "_train_batch_size": {"training/loading.py"},
}
OTHERS = {
    "_attn_implementation": {"batching/attention.py", "models/fused.py"},  # configurations of transformers
    "_can_set_attn_implementation": {"models/packable.py"},
    "_CHUNKED_LOGPROB_CHUNK_SIZE": {"preflight/trace.py"},  # TRL's head
    "_cdata": {"preflight/trace.py"},  # torch
    "_scaled_dot_product_flash_attention_for_cpu": {"preflight/trace.py"},  # torch
    "_DropoutNd": {"batching/randomness.py"},  # torch
    "_forward_pre_hooks": {"batching/attention.py"},  # torch
    "_from_config": {"training/start.py"},
    "_get_num_multimodal_tokens": {"encoding/tiles.py", "training/record_checks.py"},  # processors
    "_hf_hook": {"training/start.py"},  # accelerate
    "_info": {"data/encoded.py"},  # datasets
    "_is_view": {"models/official/tensors.py"},  # torch
    "_merge_kwargs": {"encoding/tiles.py"},  # processors
    "_modules": {"models/lazily.py"},  # transformers' table of configs
    "_models": {"training/reference/use.py"},  # accelerate
    "_n_gpu": {"preflight/trial.py", "training/start.py"},  # transformers' arguments
    "_BatchNorm": {"models/features.py"},  # torch
    "_name_or_path": {"models/loading.py", "training/features/use.py", "training/reference/fingerprint.py", "training/start.py"},
    "_option_string_actions": {"commands/__init__.py"},  # argparse
    "_subparsers": {"commands/__init__.py"},  # argparse
    "_orig_mod": {"models/packable.py", "training/features/use.py"},  # torch
    "_preprocess": {"models/tiles.py"},  # image processors
    "_target_": {"commands/train.py"},  # Hydra
    "_weight_conversions": {"models/export/trained.py", "models/official/names.py"},
}
PYTHON = ("__", "_replace")  # Python's own, and its named tuples
LOOKUPS = ("getattr", "hasattr", "setattr", "delattr")


def looked_up(tree: ast.AST) -> Iterator[str]:
    """Names that a file looks up on objects, or imports from other packages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("mpo"):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in LOOKUPS:
            yield from (argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant))


def defined(tree: ast.AST) -> Iterator[str]:
    """Names of functions, classes, variables and attributes that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def members(tree: ast.AST) -> set[str]:
    """Names of the methods and attributes in the bodies of a file's classes."""
    return {name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for part in node.body for name in defined(part)}


def test_every_private_name_of_another_library_is_in_the_table():
    table = TRAINER | OTHERS
    trees = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    names = {file: set(defined(tree)) for file, tree in trees.items()}
    overridden = {name for name in dir(DPOTrainer) if name.startswith("_") and not name.startswith(PYTHON)}
    own = set().union(*names.values()) - overridden - set(table)
    found = defaultdict(set)
    for file, tree in trees.items():
        private = {name for name in looked_up(tree) if name.startswith("_") and not name.startswith(PYTHON)} - own
        for name in private | (members(tree) & overridden):
            found[name].add(file)
    assert dict(found) == table
