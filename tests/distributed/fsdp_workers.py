"""What the processes of the tests of FSDP through accelerate do."""

from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, ViTForImageClassification

from hf_lookbehind import InputError, LookbehindTrainer
from hf_lookbehind.trainer.resume import last_complete_checkpoint, what_is_missing
from tests.distributed.pretended import ON_PRETENDED, AssertSharded, pretend_gpus, whole_weights
from tests.distributed.workers import EVERY_STEP, METHODS, RUN, Tell
from tests.models import max_difference, weights_of
from tests.training import DROPOUT, PLAIN, images, make_model, make_trainer

LAYERS = dict(transformer_layer_cls_to_wrap="ViTLayer")
ADAPTIVE = METHODS["lookbehind-sam-adaptive"]
EVERY_THIRD = dict(save_strategy="steps", save_steps=3)


def make_sharded(output_dir, config, *, model=None, fsdp=None, dtype=torch.float64, dropout=PLAIN, cls=None, **args):
    """A trainer whose `train()` shards a tiny ViT over the processes, by `TrainingArguments(fsdp=...)`."""
    pretend_gpus()
    batches = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    return make_trainer(
        output_dir, config, model=make_model(dtype, **dropout) if model is None else model, data=images(24, dtype),
        cls=cls, trainer_kwargs=dict(callbacks=[AssertSharded()], eval_dataset=images(16, dtype)),
        **(batches | RUN | dict(fsdp=True, fsdp_config=LAYERS | (fsdp or {})) | ON_PRETENDED | args),
    )  # fmt: skip


def trained(*args, resume=None, **kwargs):
    """A trainer, and its final weights."""
    trainer = make_sharded(*args, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, whole_weights(trainer.model)


def logs_of(trainer):
    return [{key: log.get(key) for key in ("loss", "grad_norm")} for log in trainer.state.log_history[:-1]]


def all_of(output_dir, *cases):
    """The results of several cases, by their names, from one launch."""
    dist.init_process_group("gloo")
    return {case.__name__: case(Path(output_dir, case.__name__)) for case in cases}


# ---- against one process ----


def methods(folder, accumulation=2):
    """Final weights of every method."""
    batches = dict(per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation)
    return {name: trained(folder / name, config, **batches)[1] for name, config in METHODS.items()}


def methods_without_accumulation(folder):
    return methods(folder, accumulation=1)


def in_replicas(folder):
    """The same of four processes: two replicas, each sharded over two (HSDP)."""
    replicas = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, parallelism_config=replicas)
    return {name: trained(folder / name, config, **options)[1] for name, config in METHODS.items()}


# ---- against itself: differences that are to be 0 ----


def neutral(folder, **args):
    """Between the plain Trainer and neutral settings: of weights, and of logs."""
    plain, expected = trained(folder, None, dropout=DROPOUT, **args)
    found = []
    for config in (dict(k=0), dict(k=1, rho=0, alpha=1)):
        trainer, weights = trained(folder, config, dropout=DROPOUT, **args)
        found.append(max_difference(weights, expected))
        assert logs_of(trainer) == logs_of(plain)
    return found


def neutral_in_bf16(folder):
    """The same, where passes compute in bfloat16, and from layers whose activations are computed twice."""
    return neutral(folder, dtype=torch.float32, bf16=True, fsdp=dict(activation_checkpointing=True))


def resumed(folder):
    """Between an uninterrupted run and one that goes on from its third step, for each form of checkpoint."""
    found = {}
    for form in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        options = dict(fsdp=dict(state_dict_type=form), dropout=DROPOUT)
        trainer, expected = trained(folder / form, ADAPTIVE, **options, **EVERY_THIRD)
        checkpoint = folder / form / "checkpoint-3"
        assert what_is_missing(checkpoint) is None
        trainer.save_model()
        dist.barrier()
        saved = ViTForImageClassification.from_pretrained(folder / form, dtype=torch.float64)
        _, weights = trained(folder / "again", ADAPTIVE, resume=str(checkpoint), **options)
        found[form] = max_difference(weights, expected), max_difference(weights_of(saved), expected)
    return found


def other_forms(folder):
    """What is said of a checkpoint of the other form, after `resumed`; and of FSDP1 and m-sharpness."""
    forms = {"FULL_STATE_DICT": "SHARDED_STATE_DICT", "SHARDED_STATE_DICT": "FULL_STATE_DICT"}
    said = []
    for own, other in forms.items():
        trainer = make_sharded(folder, ADAPTIVE, fsdp=dict(state_dict_type=own))
        said.append(_refusal(trainer.train, str(folder.parent / "resumed" / other / "checkpoint-3")))
    said.append(_refusal(make_sharded, folder, dict(k=1), fsdp=dict(version=1, sync_module_states=False)))
    return [*said, _refusal(make_sharded, folder, dict(k=1, sync_ascent=False))]


def _refusal(work, *args, **kwargs):
    try:
        work(*args, **kwargs)
    except InputError as error:
        return str(error)
    return "not refused"


def best(folder):
    """Between the best model and its checkpoint: the loss of an evaluation, and the weights as they are saved."""
    found = {}
    for form in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        evaluated = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
        wanted = dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
        trainer, weights = trained(folder / form, ADAPTIVE, fsdp=dict(state_dict_type=form), **evaluated, **wanted)
        losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{2 + 2 * losses.index(max(losses))}")
        trainer.save_model()
        dist.barrier()
        saved = ViTForImageClassification.from_pretrained(folder / form, dtype=torch.float64)
        found[form] = abs(trainer.evaluate()["eval_loss"] - max(losses)), max_difference(weights_of(saved), weights)
    return found


def evaluated(folder):
    """Between a training that evaluates at every step, and one that does not."""
    _, expected = trained(folder / "not", ADAPTIVE)
    return max_difference(trained(folder / "so", ADAPTIVE, eval_strategy="steps", eval_steps=1)[1], expected)


# ---- a model that is sharded already ----


def again(folder):
    """Weights after a second `train()`, without and with activation checkpointing; whether a process lacks parts."""
    found = {}
    for name, fsdp in {"plain": {}, "checkpointing": dict(activation_checkpointing=True)}.items():
        trainer, _ = trained(folder / name, ADAPTIVE, fsdp=fsdp, max_steps=3)
        trainer.train()
        stepped = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert stepped == {id(p) for p in trainer.model.parameters()}
        found[name] = whole_weights(trainer.model)
    return found, sum(p.to_local().numel() == 0 for p in trainer.model.parameters())


class OutOfMemory(LookbehindTrainer):
    """With batches of more than two, in the second pass of its first window."""

    passes = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.passes += 1
        if len(inputs["labels"]) > 2 and self.passes % 2 == 0:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(model, inputs, *args, **kwargs)


def smaller_batches(folder):
    """Between a training that has to find its batch size, and one that is given it."""
    config = METHODS["sam"]
    _, expected = trained(folder / "given", config, per_device_train_batch_size=2)
    trainer, weights = trained(folder / "found", config, cls=OutOfMemory, auto_find_batch_size=True)
    return max_difference(weights, expected), trainer._train_batch_size


# ---- failures ----


def failing(folder):
    """An error in pass 2 of the third step: the weights are those of the second; so is a loss afterwards."""

    class Failing(LookbehindTrainer):
        passes = 0

        def compute_loss(self, *args, **kwargs):
            self.passes += 1
            if self.passes == 2 * 4 + 3:
                raise RuntimeError("boom")
            return super().compute_loss(*args, **kwargs)

    _, expected = trained(folder / "whole", ADAPTIVE, max_steps=2, lr_scheduler_type="constant")
    trainer = make_sharded(folder / "failing", ADAPTIVE, cls=Failing, lr_scheduler_type="constant")
    try:
        trainer.train()
    except RuntimeError as error:
        assert "boom" in str(error)
    loss = trainer.evaluate()["eval_loss"]
    whole = make_model(torch.float64, **PLAIN)
    whole.load_state_dict(expected)
    data = images(16, torch.float64)
    with torch.no_grad():
        labels = torch.tensor([image["labels"] for image in data])
        alone = whole.eval()(torch.stack([image["pixel_values"] for image in data]), labels=labels).loss.item()
    return max_difference(whole_weights(trainer.model), expected), abs(loss - alone)


def not_finite(folder):
    """The gradient of one process is infinite in pass 1 of the second step: which steps moved the weights."""

    class Infinite(LookbehindTrainer):
        passes = 0

        def compute_loss(self, *args, **kwargs):
            self.passes += 1
            factor = float("inf") if dist.get_rank() == 1 and self.passes == 4 + 2 else 1.0
            return super().compute_loss(*args, **kwargs) * factor

    trainer = make_sharded(folder, ADAPTIVE, cls=Infinite, max_steps=3)
    seen = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append(whole_weights(model))

    trainer.add_callback(Keep())
    trainer.train()
    return [max_difference(a, b) for a, b in zip(seen, seen[1:], strict=False)]


# ---- communication ----


def collectives(folder):
    """How many of each kind one iteration takes, by k; k=0 is the plain Trainer's step."""
    found = {}
    for k in (0, 1, 2, 3):
        counts = []
        for steps in (1, 2):
            config = dict(k=k) if k == 0 else dict(k=k, rho=0.02)
            trainer = make_sharded(folder, config, max_steps=steps, logging_strategy="no")
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                trainer.train()
            counts.append(
                Counter(e.name.removeprefix("gloo:") for e in recorded.events() if e.name.startswith("gloo:"))
            )
        found[k] = dict(counts[1] - counts[0])
    return found


def without_shards(folder):
    """What is said where accelerate would leave the weights whole: FSDP is asked for, and the device is a CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return _refusal(make_trainer, folder, dict(k=1), fsdp=True, fsdp_config=LAYERS)


# ---- kills ----

KILLED = dict(fsdp=dict(state_dict_type="SHARDED_STATE_DICT"), dropout=DROPOUT) | EVERY_STEP


def to_the_end(folder, steps):
    """Train, from the last complete checkpoint if there is one; the final weights."""
    dist.init_process_group("gloo")
    trainer = make_sharded(folder, ADAPTIVE, **KILLED, max_steps=steps)
    trainer.add_callback(Tell())
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    return whole_weights(trainer.model), trainer.state.global_step
