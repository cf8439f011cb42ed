"""What of a command line bears on the trained model: what tells one training from another, or a part of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...hub.redact import redact
from .flags import Arguments
from .paths import exists

# Of the Trainer's flags, and those of ours besides them.
_TRAINING = (
    "adam_beta1 adam_beta2 adam_epsilon average_tokens_across_devices bf16 data_seed dataloader_drop_last "
    "early_stopping_patience early_stopping_threshold fp16 label_smoothing_factor learning_rate lookahead_alpha "
    "lookahead_steps lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps neftune_noise_alpha "
    "num_train_epochs optim optim_args optim_target_modules seed sortish_sampler train_sampling_strategy warmup_steps "
    "weight_decay"
).split()
# Of the flags of data and model, and of the method, those that do not.
_NO_EFFECT = ("cache_dir", "token", "num_beams", "offload_buffers")
_OF_EVALUATION = ("validation_", "test_", "max_eval_", "val_max_")
BATCH = "batch"


def settings_of(args: Arguments) -> dict[str, Any]:
    """By flag, as plain data, without secrets and machine's paths. The batch is the whole one, however divided."""
    training = args.training
    found = {name: getattr(training, name) for name in _TRAINING if hasattr(training, name)}
    found[BATCH] = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    for group in (vars(args.data), vars(args.model), args.lookbehind.resolved().to_dict()):
        found |= {
            name: value
            for name, value in group.items()
            if name not in _NO_EFFECT and not name.startswith(_OF_EVALUATION)
        }
    return json.loads(json.dumps({name: _plain(value) for name, value in found.items()}, default=str))


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if not isinstance(value, str):
        return value
    # an enum of the Trainer's is a text too
    text = getattr(value, "value", value)
    return Path(text).expanduser().resolve().name if exists(text) else redact(text)


def in_words(names: list[str], now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Settings that are others than before, as flags."""
    return ", ".join(
        f"{name if name == BATCH else f'--{name}'} {now.get(name)} (it was {before.get(name)})" for name in names
    )
