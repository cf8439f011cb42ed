"""Every private name of transformers, accelerate and TRL that is touched, and what it is: all there are.

Seen in transformers 5.5.4 to 5.23.0, accelerate 1.10.1 to 1.15.0 and TRL 1.16.0, but for what says since when. What a
later version renames breaks here, and nowhere else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

# Methods of `Trainer` that the classes of `LookbehindMixin` override, and what each is for.
OVERRIDDEN = {
    "_inner_training_loop": "the training, inside the retry of auto_find_batch_size: after it the weights are slow",
    "_clip_grad_norm": "clips, before each descent",
    "_prepare_inputs": "makes of a batch what goes into the loss; where a trainer generates, scores and draws",
    "_get_grad_norm": "measures what was clipped, just before the last descent",
    "_maybe_log_save_evaluate": "writes the Trainer's own row of the logs, if one is due",
    "_finalize_training": "divides the sum of all losses by the number of steps",
    "_init_training_state": "reads the state of the checkpoint that is resumed, and says where to begin",
    "_load_callback_state": "gives callbacks what the checkpoint says of them",
    "_load_from_checkpoint": "loads the weights that a training resumes from",
    "_load_best_model": "loads the weights of load_best_model_at_end",
    "_save": "writes a model, and training_args.bin beside it",
    "_push_from_checkpoint": "pushes a checkpoint while the training goes on",
    "_hp_search_setup": "takes over the values that a trial has drawn",
}

# Methods of TRL's trainers, in the same way.
LOGPS_OF_LOSS = "_get_per_token_logps_and_entropies"
OVERRIDDEN_OF_TRL = {
    LOGPS_OF_LOSS: "GRPO's log-probabilities: with gradients those of its loss",
    "_compute_policy_loss": "SDPO's part of the loss that takes old log-probabilities",
}
# In what TRL prepares: log-probabilities of the weights that have generated, by token; of RLOO, by sequence.
OLD_LOGPS = "old_per_token_logps"
OLD_LOGPS_OF_SEQUENCES = "old_logps"

# A file that HF's just-in-time checkpointing leaves in a folder until it is complete.
INCOMPLETE_NAME = "checkpoint-is-incomplete.txt"
# Of a class of tokenizers, processors or models, after `register_for_auto_class`: its code is saved beside it.
AUTO_CLASS = "_auto_class"


# ---- the Trainer ----


def items_in(trainer: Any, batches: Sequence[Any]) -> Any:
    """What the Trainer divides the loss of these micro-batches by, or None: `num_items_in_batch`."""
    return trainer._get_num_items_in_batch(batches, trainer.args.device)


def prepare_inputs(trainer: Any, batch: Any) -> Any:
    """A batch on the device of the training, as the model gets it."""
    return trainer._prepare_inputs(batch)


def without_unused_columns(trainer: Any, dataset: Any, of: str) -> Any:
    """A dataset with the columns alone that the model's forward takes."""
    return trainer._remove_unused_columns(dataset, description=of)


def collator_of_used_columns(trainer: Any) -> Callable[..., Any]:
    """The Trainer's collator, which is given the columns alone that the model's forward takes."""
    return trainer._get_collator_with_removed_columns(trainer.data_collator)


def batch_size_in_use(trainer: Any) -> int:
    """Of one device, as `auto_find_batch_size` has found it."""
    return trainer._train_batch_size


def warn_of_missing_weights(trainer: Any, loaded: Any) -> None:
    """What the Trainer says of the keys that `load_state_dict` missed, or had left over."""
    trainer._issue_warnings_after_load(loaded)


# ---- its losses ----


def steps_since_log(trainer: Any) -> range:
    """The steps that no row of the logs has told of."""
    return range(trainer._globalstep_last_logged, trainer.state.global_step)


def steps_of_this_process(trainer: Any) -> range:
    """The steps that the Trainer divides the sum of all losses by: of this process, in earlier versions of all."""
    return range(getattr(trainer, "_initial_global_step", 0), trainer.state.global_step)


def summed_loss(trainer: Any) -> Tensor:
    """The sum of the losses since the last row; what is added in place is in the Trainer's sum."""
    return trainer._tr_loss


def scale_total_loss(trainer: Any, factor: float) -> None:
    """Multiply the sum of all losses, of which the Trainer makes `train_loss`."""
    trainer._total_loss_scalar = (trainer._total_loss_scalar + trainer._tr_loss.item()) * factor
    trainer._tr_loss.zero_()


# ---- accelerate ----


def set_sync_gradients(accelerator: Accelerator, value: bool) -> None:
    """Whether the coming backward reduces gradients, and the coming `optimizer.step` is more than a no-op."""
    accelerator.gradient_state._set_sync_gradients(value)


def is_sharded_by_transformers(trainer: Any) -> bool:
    """Whether `from_pretrained(distributed_config=...)` has sharded the model, and the Trainer knows: since 5.19."""
    return getattr(trainer, "is_distributed_loading_by_transformers", False)


@contextmanager
def deferred_reduction(trainer: Any) -> Iterator[None]:
    """Within it, a model that transformers has sharded reduces no gradients. Since 5.23 the Trainer has its own."""
    trainer.model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        trainer.model.set_requires_gradient_sync(True)


def forget_accelerator_settings() -> None:
    """Let the next Trainer of this process choose its precision, and how it compiles, anew."""
    AcceleratorState._reset_state()


# ---- arguments ----


def dict_fields(arguments: Any) -> Sequence[str]:
    """The fields of `TrainingArguments` that may be given as JSON."""
    return arguments._VALID_DICT_FIELDS


# ---- models ----


def name_of(config: Any) -> str:
    """The id or folder that a model's config was loaded from; "" where there was none."""
    return getattr(config, "_name_or_path", "") or ""


def commit_of(config: Any) -> str | None:
    """The commit on the Hub that it was loaded from."""
    return getattr(config, "_commit_hash", None)


def names_not_saved(model: Any) -> Sequence[str]:
    """Of weights that a saved model leaves out."""
    return getattr(model, "_keys_to_ignore_on_save", None) or ()


def patterns_left_over(model: Any) -> Sequence[str]:
    """Of names that a file may have, and the model not."""
    return getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()


def saves_adapters_only(model: Any) -> bool:
    """Of a model of transformers: whether it has been given adapters by its own `add_adapter`."""
    return getattr(model, "_hf_peft_config_loaded", False)


def conversions_of(model: Any) -> Any:
    """How a model's weights were renamed and put together when it was loaded; None where it was not."""
    return getattr(model, "_weight_conversions", None)


# ---- TRL ----


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of tokens, to the bit as TRL's losses compute them. Not in the list of what TRL exports."""
    from trl.trainer.utils import selective_log_softmax

    with torch.no_grad():
        return selective_log_softmax(logits, tokens)
