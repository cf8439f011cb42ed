"""What the processes of test_zero.py do: ZeRO on CPUs over gloo. The folder with DeepSpeed is on PYTHONPATH."""

import contextlib
import os
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hf_lookbehind import InputError, LookbehindTrainer
from hf_lookbehind.trainer.resume import last_complete_checkpoint, what_is_missing
from tests.distributed.workers import EVERY_STEP, METHODS, Tell
from tests.models import max_difference
from tests.training import DROPOUT, PLAIN, images, make_model, make_trainer

STAGES = (1, 2, 3)
ON_CPU = dict(use_cpu=True, accelerator_config={"use_configured_state": True})
# global batch 8 of 24 images, as in workers.py
RUN = dict(max_steps=6, learning_rate=1e-3)
SAVING_WHOLE = dict(stage3_gather_16bit_weights_on_model_save=True)
FLOAT32_SUMS = dict(data_types=dict(grad_accum_dtype="fp32"))
NEUTRAL = {
    "k=0": dict(k=0),
    "k=1": dict(k=1, rho=0.0, alpha=1),
    "last": dict(k=2, rho=0.0, alpha=1, descent="last"),
}


def use_deepspeed():
    """This process, which knows the others by its environment, is one of DeepSpeed's."""
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_DEEPSPEED": "true",
    }  # fmt: skip
    import deepspeed.ops
    from accelerate.state import AcceleratorState, PartialState
    from deepspeed.accelerator import get_accelerator

    # inference alone would use this extension, which takes a minute to compile
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch's CPU kernels have float16, however slow
    type(get_accelerator()).is_fp16_supported = lambda self: True
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(backend="gloo")


def settings(stage, zero=None, **others):
    """A ds_config.json. No tensor of these small models would be cut without the threshold."""
    cut = dict(stage=stage, stage3_param_persistence_threshold=0)
    automatic = "train_micro_batch_size_per_gpu gradient_accumulation_steps train_batch_size gradient_clipping"
    return dict.fromkeys(automatic.split(), "auto") | dict(
        zero_optimization=cut | (zero or {}), bf16=dict(enabled="auto"), fp16=dict(enabled="auto"),
        zero_force_ds_cpu_optimizer=False, steps_per_print=10**9,
    ) | others  # fmt: skip


class AssertPartitioned(TrainerCallback):
    """ZeRO really holds a part of the weights in each process."""

    def on_step_end(self, args, state, control, model, **kwargs):
        lookbehind, world = self.trainer._lookbehind, dist.get_world_size()
        if lookbehind is None or not hasattr(lookbehind, "engine"):
            return
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        held = sum(fragment.numel() for fragment in lookbehind._weights.all)
        assert abs(held - whole / world) <= 0.1 * whole
        # what persists is cut as well, and gathered after each step
        if lookbehind.engine.zero_optimization_stage() == 3:
            assert all(p.ds_persist or p.numel() == 0 for p in model.parameters())
            assert all(p.ds_tensor.numel() < p.ds_numel for p in model.parameters())


def masters(model):
    """The float32 weights, whole."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {n: safe_get_full_fp32_param(p).detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def run(
    output_dir, config, stage, *, ds=None, model=None, batch=2, accumulation=2, callbacks=(), resume=None, **options
):
    """A training under ZeRO; its trainer."""
    use_deepspeed()
    watch = AssertPartitioned()
    kwargs = dict(callbacks=[*callbacks, *([watch] if config is not None else [])])
    kwargs |= options.pop("trainer_kwargs", {})
    watch.trainer = make_trainer(
        output_dir, config, model=make_model(**PLAIN) if model is None else model,
        data=images(24), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        deepspeed=settings(stage, **(ds or {})), trainer_kwargs=kwargs, **(ON_CPU | RUN | options),
    )  # fmt: skip
    watch.trainer.train(resume_from_checkpoint=resume)
    return watch.trainer


def rows(trainer, *names):
    return [[row.get(name) for name in names] for row in trainer.state.log_history if "loss" in row]


def trainings(output_dir, stage, methods, accumulations):
    """By method and accumulation: the final weights, and what was logged."""
    results = {}
    for name, config in methods.items():
        for accumulation in accumulations:
            trainer = run(output_dir, config, stage, batch=4 // accumulation, accumulation=accumulation)
            logged = rows(trainer, "loss", "sharpness", "alpha")
            results[name, accumulation] = masters(trainer.model), logged
    return results


def neutral(output_dir, stage, options):
    """By settings: the difference from plain DeepSpeed, and whether the logs are the same."""
    names = "loss", "grad_norm", "learning_rate"
    plain = run(output_dir, None, stage, model=make_model(**DROPOUT), **options)
    weights, logs = masters(plain.model), rows(plain, *names)
    results = {}
    for name, config in NEUTRAL.items():
        trainer = run(output_dir, config, stage, model=make_model(**DROPOUT), **options)
        results[name] = max_difference(weights, masters(trainer.model)), rows(trainer, *names) == logs
    return results


def resumed(output_dir, stage, options):
    """A run that is resumed in the middle of an epoch: its difference from the whole one, and what it has saved."""
    config = METHODS["lookbehind-sam-adaptive"]
    saving = dict(save_strategy="steps", save_steps=4) | options
    whole, again = (f"{output_dir}/{name}" for name in ("whole", "again"))
    weights = masters(run(whole, config, stage, model=make_model(**DROPOUT), **saving).model)
    checkpoint = f"{whole}/checkpoint-4"
    trainer = run(again, config, stage, model=make_model(**DROPOUT), resume=checkpoint, **saving)
    assert trainer._initial_global_step == 4  # it has gone on, and not begun again
    return max_difference(weights, masters(trainer.model)), what_is_missing(Path(checkpoint))


def to_the_end(folder, steps):
    """Train under ZeRO-3, from the last complete checkpoint if there is one; the final weights."""
    trainer = run(
        folder, METHODS["lookbehind-sam-adaptive"], 3, model=make_model(**DROPOUT), batch=4, accumulation=1,
        callbacks=[Tell()], resume=last_complete_checkpoint(folder), max_steps=steps, **EVERY_STEP,
    )  # fmt: skip
    return masters(trainer.model), trainer.state.global_step


def saved_and_best(output_dir, stage):
    """Of a run whose best checkpoint is loaded: that checkpoint, the masters, and what its partitions give."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    trainer = run(
        output_dir, METHODS["lookbehind-sam-adaptive"], stage, ds=dict(zero=SAVING_WHOLE), save_strategy="steps",
        save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True, trainer_kwargs=dict(eval_dataset=images(8)),
    )  # fmt: skip
    best = trainer.state.best_model_checkpoint
    trainer.save_model()
    dist.barrier()
    weights = masters(trainer.model)
    from_partitions = get_fp32_state_dict_from_zero_checkpoint(best)
    return best, weights, {name: from_partitions[name].clone() for name in weights}


# ---- what goes wrong ----


class Failure(Exception):
    """Of a pass."""


def failed(output_dir, stage, where):
    """A failure in all processes: how far the masters moved, what they were, the loss of the model then, an error."""
    use_deepspeed()
    passes, seen = [], []

    class See(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            if where == "step":
                self.trainer.deepspeed.basic_optimizer.register_step_pre_hook(fail)

        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append(masters(model))

    def fail(*_):
        if len(seen) == 1 and len(passes) == 3:
            raise Failure

    class Trainer(LookbehindTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(seen) == 1:
                passes.append(1)
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if where == "loss":
                fail()
            if where == "backward" and len(seen) == 1 and model.training:
                loss.register_hook(fail)
            return loss

        def train(self, *args, **kwargs):
            see.trainer = self
            with contextlib.suppress(Failure):
                return super().train(*args, **kwargs)

    see, model = See(), make_model(**PLAIN)
    if where == "layer":
        model.vit.layers[1].register_forward_pre_hook(fail)
    trainer = run(
        output_dir, METHODS["lookbehind-sam-adaptive"], stage, model=model, batch=4, accumulation=1,
        ds=dict(zero=SAVING_WHOLE), callbacks=[see], trainer_kwargs=dict(eval_dataset=images(8)), cls=Trainer,
    )  # fmt: skip
    assert len(passes) >= 3 and len(seen) == 1, (where, passes, len(seen))
    left = masters(trainer.model)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    dist.barrier()
    try:
        trainer.train()
        again = ""
    except InputError as error:
        again = str(error)
    return max_difference(left, seen[0]), seen[0], loss, again


def non_finite(output_dir, stage, options):
    """Rank 1 meets inf in pass 2 of the second iteration: how far each step moved the masters, and what is logged."""
    use_deepspeed()
    seen, passes = [], []

    class See(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append(masters(model))

    class Trainer(LookbehindTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            passes.append(1)
            return loss * float("inf") if dist.get_rank() == 1 and len(passes) == 4 + 3 else loss

    trainer = run(
        output_dir, METHODS["lookbehind-sam-adaptive"], stage, batch=4, accumulation=1, callbacks=[See()],
        cls=Trainer, **options,
    )  # fmt: skip
    moved = [max_difference(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    return moved, [skipped for (skipped,) in rows(trainer, "skipped_iterations")], trainer.evaluate(images(8))


def searching_its_scale(output_dir, stage):
    """float16 from a loss scale that is too large: logs and weights of plain DeepSpeed, of k=0, of an iteration."""
    ds = dict(fp16=dict(enabled=True, initial_scale_power=40, hysteresis=1, loss_scale_window=2))
    found = []
    for config in (None, dict(k=0), METHODS["lookbehind-sam-adaptive"]):
        trainer = run(output_dir, config, stage, ds=ds, fp16=True, max_steps=30)
        assert next(iter(trainer.deepspeed.module.parameters())).dtype == torch.float16
        skipped = trainer.deepspeed.skipped_steps
        scale = trainer.deepspeed.optimizer.loss_scale
        found.append((rows(trainer, "loss", "learning_rate"), masters(trainer.model), skipped, scale, trainer))
    return [(*result[:-1], getattr(result[-1], "skipped_iterations", None)) for result in found]


BY_THE_CONFIG = "all by the config"


def variants(output_dir, stage):
    """What else people set: by name, the final weights."""
    adam = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto") | dict(torch_adam=True)
    optimizer = dict(optimizer=dict(type="AdamW", params=adam))
    rates = dict(lr_range_test_min_lr=1e-3, lr_range_test_step_size=100, lr_range_test_step_rate=0.0)
    on_cpu = dict(device="cpu", pin_memory=False)
    cases = {
        BY_THE_CONFIG: optimizer | dict(scheduler=dict(type="LRRangeTest", params=rates)),  # a constant rate
        "optimizer": optimizer,
        "offloaded": dict(zero=dict(offload_optimizer=on_cpu)),
        "overlap": dict(zero=dict(overlap_comm=True)),
    }
    if stage == 3:
        cases["weights offloaded"] = dict(zero=dict(offload_optimizer=on_cpu, offload_param=on_cpu))
        cases["persistent"] = dict(zero=dict(stage3_param_persistence_threshold=30))
    else:
        cases["buckets"] = dict(zero=dict(reduce_bucket_size=100, allgather_bucket_size=100))
        cases["round robin"] = dict(zero=dict(round_robin_gradients=True))
    results = {}
    for name, ds in cases.items():
        constant = dict(lr_scheduler_type="constant") if name == BY_THE_CONFIG else {}
        trainer = run(output_dir, METHODS["lookbehind-sam-adaptive"], stage, ds=ds, **constant)
        # DeepSpeed's function for the masters is wrong under round_robin_gradients
        own = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        results[name] = own if name == "round robin" else masters(trainer.model)
    return results


SETTINGS = {
    "multistep": dict(k=2, rho=0.02, descent="last"),
    "rho auto": dict(k=2, rho="auto"),
    "targets": dict(k=2, rho=0.05, target_parameters=["attention"]),
    "every": dict(k=2, rho=0.02, ascent_every=2),
    "fisher": dict(k=2, rho=0.02, ascent="fisher"),
}


def adapted():
    """A small model with LoRA adapters; both are seeded."""
    from peft import LoraConfig, get_peft_model

    model = make_model(**PLAIN)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def adapters(output_dir, stage):
    """The final ones."""
    return masters(run(output_dir, METHODS["lookbehind-sam-adaptive"], stage, model=adapted()).model)


def collectives(output_dir, stage):
    """By k and alpha, and of plain DeepSpeed, how many collectives of each kind one iteration takes."""
    counts, results = Counter(), {}
    kinds = "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce", "broadcast", "all_gather"

    def counted(name, real):
        def call(*args, **kwargs):
            counts[name] += 1
            return real(*args, **kwargs)

        return call

    for name in kinds:
        setattr(torch.distributed, name, counted(name, getattr(torch.distributed, name)))

    class Count(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            counts.clear()

        def on_step_end(self, *args, **kwargs):
            results[case] = dict(counts)

    for config in (None, dict(k=1, rho=0.02), dict(k=3, rho=0.02), dict(k=3, rho=0.02, alpha="adaptive")):
        case = "plain" if config is None else (config["k"], config.get("alpha", "static"))
        run(output_dir, config, stage, batch=4, accumulation=1, callbacks=[Count()], max_steps=3)
    return results


def refusals(output_dir):
    """What is said to each of the settings that are not supported."""
    use_deepspeed()
    cases = {
        "stage=0": (dict(stage=0), {}, {}, {}),
        "zero_hpz_partition_size=2": (dict(stage=3, zero_hpz_partition_size=2), {}, {}, {}),
        "zenflow": (dict(stage=2, zenflow={}), {}, {}, {}),
        "device='nvme'": (dict(stage=3, offload_optimizer=dict(device="nvme", nvme_path="x")), {}, {}, {}),
        "super_offload=True": (dict(stage=3, offload_optimizer=dict(device="cpu", super_offload=True)), {}, {}, {}),
        "grad_accum_dtype='fp32'": (dict(stage=1), FLOAT32_SUMS, {}, dict(bf16=True)),
        "autotp_size=2": (dict(stage=1), dict(tensor_parallel=dict(autotp_size=2)), {}, {}),
        "sequence_parallel_size=2": (dict(stage=1), dict(sequence_parallel_size=2), {}, {}),
        "deepcompile=True": (dict(stage=3), dict(compile=dict(deepcompile=True)), {}, {}),
        "optimizer.type='Muon'": (dict(stage=2), dict(optimizer=dict(type="Muon", params=dict(lr=1e-3))), {}, {}),
        "sync_ascent=False": (dict(stage=2), {}, dict(sync_ascent=False), {}),
        "auto_find_batch_size": (dict(stage=2), {}, {}, dict(auto_find_batch_size=True)),
    }
    said = {}
    for name, (zero, others, config, options) in cases.items():
        use_deepspeed()
        try:
            make_trainer(
                output_dir, config, model=make_model(), deepspeed=settings(zero=zero, stage=zero["stage"], **others),
                **ON_CPU, **options,
            )  # fmt: skip
            said[name] = "not refused"
        except InputError as error:
            said[name] = str(error)
    return said
