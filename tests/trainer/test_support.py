"""What is refused is refused by name, at construction."""

import re
from types import SimpleNamespace

import pytest
import pytorch_optimizer
import torch
from transformers import Trainer
from transformers.training_args import ParallelMode

from hf_lookbehind import InputError, LookbehindConfig, LookbehindMixin, LookbehindTrainer
from hf_lookbehind.trainer import support
from tests import every_trainer
from tests.training import arguments, images, make_model, make_trainer, train


@pytest.mark.parametrize("config", [None, {"k": 2}, 3])
def test_config_is_required(tmp_path, config):
    with pytest.raises(InputError, match="lookbehind_config=.*LookbehindConfig"):
        LookbehindTrainer(model=make_model(), args=arguments(tmp_path), lookbehind_config=config)
    with pytest.raises(InputError, match="lookbehind_config=None"):
        type("Mixed", (LookbehindMixin, Trainer), {})(model=make_model(), args=arguments(tmp_path))


@pytest.mark.parametrize("pattern", ["nothing-like-this", r"embeddings\.cls"])
def test_target_parameters_must_match_a_trainable_parameter(tmp_path, pattern):
    model = make_model()
    model.vit.embeddings.requires_grad_(False)
    with pytest.raises(InputError, match="target_parameters.*matches no trainable parameter"):
        make_trainer(tmp_path, dict(target_parameters=pattern), model=model)


class Logic(Trainer):
    def training_step(self, *args, **kwargs):
        self.step_counter = getattr(self, "step_counter", 0) + 1
        return super().training_step(*args, **kwargs)


def test_a_training_step_under_the_mixin_is_refused_unless_marked(tmp_path):
    with pytest.raises(InputError, match=r"Logic\.training_step is not supported.*lookbehind_repeatable"):
        make_trainer(tmp_path, dict(k=2), cls=type("Mixed", (LookbehindMixin, Logic), {}))
    marked = type("Marked", (Logic,), {"training_step": Logic.training_step, "lookbehind_repeatable": True})
    with pytest.raises(InputError, match=r"Logic\.training_step"):  # the mark speaks for its own class only
        make_trainer(tmp_path, dict(k=2), cls=type("Mixed", (LookbehindMixin, marked), {}))
    alone = type("Alone", (Trainer,), {"training_step": lambda self, *a: Trainer.training_step(self, *a)})
    alone.lookbehind_repeatable = True
    train(tmp_path, dict(k=2), cls=type("Mixed", (LookbehindMixin, alone), {}), max_steps=2)


def test_a_training_step_above_the_mixin_runs_once_per_micro_batch(tmp_path):
    above = type("Above", (Logic, LookbehindTrainer), {})
    trainer = train(tmp_path, dict(k=4), cls=above, max_steps=2, gradient_accumulation_steps=3)
    assert trainer.step_counter == 6


def refusals(*classes, **attributes):
    """Of a class of trainers that derives from these, without making one."""
    return list(support.class_refusals(type("Mixed", classes, attributes), LookbehindMixin))


class Preparing(Trainer):
    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs(inputs)


class Generating(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        return self.loss_of(inputs)

    def loss_of(self, inputs):
        return sum(self.score(model.generate(**inputs)) for model in (self.model,))


class Evaluating(Trainer):
    """Generates, but not in its loss."""

    def prediction_step(self, model, inputs, *args, **kwargs):
        return self.loss_of(inputs)

    loss_of = Generating.loss_of


@pytest.mark.parametrize(
    ("cls", "refusal"),
    [
        (Logic, r"Logic\.training_step is not supported: it would run k\+1 times .*lookbehind_once = True"),
        (Preparing, r"Preparing\._prepare_inputs is not supported: it would run .*Preparing\.lookbehind_once = True"),
        (
            Generating,
            r"Generating\.loss_of is not supported: the loss would generate anew .*Generate in _prepare_inputs",
        ),
    ],
)
def test_what_passes_would_repeat_is_refused_unless_declared(cls, refusal):
    (found,) = refusals(LookbehindMixin, cls)
    assert re.search(refusal, found)
    declared = type(cls.__name__, (Trainer,), dict(vars(cls)) | {"lookbehind_repeatable": True})
    assert refusals(LookbehindMixin, declared) == []
    if cls is not Generating:  # who generates in the loss does not prepare once, whatever it says
        declared = type(cls.__name__, (Trainer,), dict(vars(cls)) | {"lookbehind_once": True})
        assert refusals(LookbehindMixin, declared) == []
    assert refusals(LookbehindMixin, Evaluating) == refusals(LookbehindMixin, Trainer) == []


def test_above_the_mixin_a_training_step_runs_once_and_a_preparation_would_not():
    assert refusals(Logic, LookbehindMixin, Trainer) == []
    (found,) = refusals(Preparing, LookbehindMixin, Trainer)
    assert "Let the mixin come first: class Mixed(LookbehindMixin, Preparing)" in found


def test_a_step_that_may_be_repeated_does_not_stand_before_one_that_runs_once():
    once = type("Once", (Trainer,), {"training_step": Logic.training_step, "lookbehind_once": True})
    marked = type("Marked", (once,), {"training_step": Logic.training_step, "lookbehind_repeatable": True})
    (found,) = refusals(LookbehindMixin, marked)
    assert re.search(
        r"Marked\.training_step is not supported before that of Once.*Marked\.lookbehind_once = True", found
    )


@pytest.mark.parametrize("config", [dict(k=2), dict(k=0)])
def test_a_class_is_refused_before_anything_of_it_is_made(config):
    from trl.experimental.online_dpo import OnlineDPOTrainer

    with pytest.raises(
        InputError, match="OnlineDPOTrainer is not supported: .*calls backward itself.*Use GRPOTrainer"
    ):
        type("Mixed", (LookbehindMixin, OnlineDPOTrainer), {})(lookbehind_config=LookbehindConfig(**config))


def test_what_is_said_of_the_libraries_is_said_of_all_their_trainers():
    assert every_trainer.documented() == every_trainer.table()
    assert set(every_trainer.tested()) <= set(every_trainer.every_trainer())
    assert "not tried" not in every_trainer.table()


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimizers_without_a_step_are_refused(tmp_path, optim):
    with pytest.raises(InputError, match=f"optim='{optim}'.*adamw_torch"):
        make_trainer(tmp_path, dict(k=2), optim=optim)


def test_schedule_free_is_refused(tmp_path):
    with pytest.raises(InputError, match="schedule_free_adamw.*not supported"):
        make_trainer(tmp_path, dict(k=2), optim="schedule_free_adamw")
    model = make_model()
    given = pytorch_optimizer.ScheduleFreeAdamW(model.parameters())
    with pytest.raises(InputError, match="ScheduleFreeAdamW.*not supported"):
        make_trainer(tmp_path, dict(k=2), model=model, trainer_kwargs=dict(optimizers=(given, None)))
    with pytest.raises(InputError, match="ScheduleFreeAdamW.*not supported"):
        kwargs = dict(optimizer_cls_and_kwargs=(pytorch_optimizer.ScheduleFreeAdamW, {}))
        make_trainer(tmp_path, dict(k=2), trainer_kwargs=kwargs)


def test_a_sam_wrapper_as_optimizer_is_refused(tmp_path):
    model = make_model()
    given = pytorch_optimizer.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(InputError, match="optimizer=SAM.*LookbehindConfig"):
        make_trainer(tmp_path, dict(k=2), model=model, trainer_kwargs=dict(optimizers=(given, None)))


def fake_trainer(**changes):
    """What `_parallelism` reads of a trainer, on one plain process; devices that are not here can only be faked."""
    settings = dict(
        is_deepspeed_enabled=False, is_fsdp_enabled=False, is_fsdp_xla_enabled=False,
        is_distributed_loading_by_transformers=False, sharding={}, distributed_type="NO", n_gpu=0,
        fsdp_version=2, non_data_parallel_size=1, ddp_static_graph=None, gradient_accumulation_steps=1, world_size=1,
    ) | changes  # fmt: skip
    args = SimpleNamespace(
        n_gpu=settings["n_gpu"], parallel_mode=ParallelMode.NOT_DISTRIBUTED, world_size=settings["world_size"],
        ddp_static_graph=settings["ddp_static_graph"],
        gradient_accumulation_steps=settings["gradient_accumulation_steps"], auto_find_batch_size=False,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        distributed_type=SimpleNamespace(value=settings["distributed_type"]),
        state=SimpleNamespace(
            fsdp_plugin=SimpleNamespace(fsdp_version=settings["fsdp_version"]),
            deepspeed_plugin=SimpleNamespace(zero_stage=0, deepspeed_config={}),
        ),
        parallelism_config=SimpleNamespace(non_data_parallel_size=settings["non_data_parallel_size"]),
    )
    sizes = dict(fsdp_size=2, tp_size=1, dp_replicate_size=1, pp_size=1, ep_size=1) | settings["sharding"]
    sharding = SimpleNamespace(**({"fsdp_cpu_offload": False, "fsdp_mixed_precision": False} | sizes))
    config = SimpleNamespace(distributed_config=sharding)
    model = SimpleNamespace(config=config, modules=lambda: (), parameters=lambda: ())
    return SimpleNamespace(args=args, accelerator=accelerator, model=model, transform_gradient=None, **settings)


SHARDED = dict(is_distributed_loading_by_transformers=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(is_deepspeed_enabled=True), "zero_optimization.stage=0.*or use DDP"),
        (dict(distributed_type="XLA"), "XLA.*Use"),
        (dict(is_fsdp_enabled=True, fsdp_version=1), "FSDP1.*Use fsdp_version=2"),
        (dict(is_fsdp_enabled=True, is_fsdp_xla_enabled=True), "FSDP on XLA.*Use CPU or GPU"),
        (dict(is_fsdp_enabled=True, sync_ascent=False), "sync_ascent=False.*Use sync_ascent=True"),
        (SHARDED | dict(sharding={"tp_size": 2}), "HSDP, tensor.*Use fsdp_size alone, or DDP"),
        (SHARDED | dict(sharding={"dp_replicate_size": 2}), "HSDP, tensor.*Use fsdp_size alone, or DDP"),
        (SHARDED | dict(sharding={"fsdp_cpu_offload": True}), "fsdp_cpu_offload.*Leave them out"),
        (SHARDED | dict(sync_ascent=False), "sync_ascent=False.*Use sync_ascent=True"),
        (dict(non_data_parallel_size=2), "tensor, context and sequence parallelism.*Use DDP"),
        (dict(n_gpu=2), "nn.DataParallel over 2 GPUs.*torchrun"),
        (dict(ddp_static_graph=True, gradient_accumulation_steps=2), "ddp_static_graph.*Leave it out"),
    ],
    ids=str,
)
def test_parallelism_that_is_not_supported_is_refused(changes, named):

    config = LookbehindConfig(sync_ascent=changes.get("sync_ascent", True))
    assert list(support._parallelism(fake_trainer(), config)) == []
    assert list(support._parallelism(fake_trainer(**SHARDED), LookbehindConfig())) == []
    (refusal,) = support._parallelism(fake_trainer(**changes), config)
    assert re.search(named, refusal)


def test_what_arguments_with_fsdp_left_in_the_environment_refuses_no_other_training(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # TrainingArguments(fsdp=...) does so, for the whole process
    make_trainer(tmp_path, dict(k=1))
    (refusal,) = support._parallelism(fake_trainer(world_size=2), LookbehindConfig())
    assert "accelerate would train with DDP" in refusal


def test_training_step_outside_train_says_so(tmp_path):
    trainer = make_trainer(tmp_path, dict(k=1))
    with pytest.raises(RuntimeError, match="inside train"):
        trainer.training_step(trainer.model, images(1)[0])
