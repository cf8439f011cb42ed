"""DeepSpeed's settings, and what of them is refused; what Accelerate calls its engine by, without the step."""

from collections.abc import Iterator, Mapping
from typing import Any

_OFFLOADS = ("offload_optimizer", "offload_param")
_OFFLOAD_SETTINGS = {
    "device": (("none", "cpu"), "leaves no tensors in memory to perturb"),
    "ratio": ((1,), "steps two optimizers"),
    "super_offload": ((False,), "steps while the backward runs (SuperOffload)"),
}
_NO_MASTERS = (("bf16", "bf16_master_weights_and_grads"), ("fp16", "fp16_master_weights_and_grads"))

# Settings of `zero_optimization`, the values that change nothing, and what others would do.
_ZERO_SETTINGS = {
    "zero_hpz_partition_size": ((0, 1), "keeps second copies of the weights in each node (hpZ)"),
    "mics_shard_size": ((-1,), "cuts weights within groups of processes (MiCS)"),
    "zero_quantized_weights": ((False,), "rounds the weights that are gathered (ZeRO++)"),
    "zero_quantized_nontrainable_weights": ((False,), "rounds the weights that are gathered (ZeRO++)"),
    "zero_quantized_gradients": ((False,), "rounds the gradients that are reduced (ZeRO++)"),
    "zenflow": ((None,), "steps on a part of the weights at a time (ZenFlow)"),
}

# Other sections, those of their values that change nothing, and what others would do.
_SECTIONS = {
    ("torch_autocast", "enabled"): ((False,), "has a gradient scaler of its own; use bf16 or fp16"),
    ("tensor_parallel", "autotp_size"): ((0, 1), "is tensor parallelism"),
    ("compile", "deepcompile"): ((False,), "rewrites the backward"),
    ("data_efficiency", "enabled"): ((False,), "draws anew in each pass"),
    ("curriculum_learning", "enabled"): ((False,), "changes the batch in each forward"),
    ("progressive_layer_drop", "enabled"): ((False,), "draws layers anew in each pass"),
}


def refused_settings(config: Mapping[str, Any], stage: int) -> Iterator[str]:
    """What Lookbehind cannot serve in a DeepSpeed config, one sentence or two each.

    Args:
        config: as DeepSpeed reads it; values may be "auto".
        stage: of ZeRO.
    """
    if stage not in (1, 2, 3):
        yield f"DeepSpeed's zero_optimization.stage={stage} is not supported: 1, 2 or 3 is; or use DDP"
    zero = _section(config, "zero_optimization")
    for name, (neutral, why) in _ZERO_SETTINGS.items():
        yield from _refusal("zero_optimization", name, zero.get(name, neutral[0]), neutral, why)
    for (section, name), (neutral, why) in _SECTIONS.items():
        yield from _refusal(section, name, _section(config, section).get(name, neutral[0]), neutral, why)
    for name in _OFFLOADS:
        offload = _section(zero, name)
        where = f"zero_optimization.{name}"
        for key, (neutral, why) in _OFFLOAD_SETTINGS.items():
            yield from _refusal(where, key, offload.get(key, neutral[0]), neutral, why)
    yield from _precision(config, stage)
    sequence = config.get("sequence_parallel_size", 1)
    if sequence != 1:
        yield f"DeepSpeed's sequence_parallel_size={sequence!r} is not supported. Leave it out"
    if config.get("sparse_gradients", False):
        yield "DeepSpeed's sparse_gradients=True is not supported: build the embedding with sparse=False"
    optimizer = str(_section(config, "optimizer").get("type", ""))
    if optimizer.lower().startswith(("muon", "onebit", "zeroone")):
        yield f"DeepSpeed's optimizer.type={optimizer!r} is not supported: it changes the gradient. Use AdamW"


def _precision(config: Mapping[str, Any], stage: int) -> Iterator[str]:
    """No float32 weights to perturb, or ZeRO-1's optimizer of another kind."""
    for section, name in _NO_MASTERS:
        why = "leaves no float32 weights to perturb"
        yield from _refusal(section, name, _section(config, section).get(name, False), (False,), why)
    dtype = _section(config, "data_types").get("grad_accum_dtype")
    if stage == 1 and dtype in ("fp32", "float32") and _section(config, "bf16").get("enabled") in (True, "auto"):
        yield (
            f"DeepSpeed's data_types.grad_accum_dtype={dtype!r} is not supported with bf16 and stage 1, for which it "
            "has an optimizer of another kind (BF16_Optimizer). Use stage 2 or 3"
        )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return config.get(name) or {}


def _refusal(section: str, name: str, value: Any, neutral: tuple[Any, ...], why: str) -> Iterator[str]:
    if value not in neutral:
        allowed = " or ".join(repr(v) for v in neutral if v is not None) or "leave it out"
        yield f"DeepSpeed's {section}.{name}={value!r} is not supported: it {why}. Allowed: {allowed}"


class BackwardOnly:
    """In the place of Accelerate's wrapper, which steps at the end of a window's last backward: the iteration does.

    Args:
        accelerator: whose wrapper it stands for, until `remove`.
    """

    def __init__(self, accelerator: Any):
        self._accelerator, self._replaced = accelerator, accelerator.deepspeed_engine_wrapped
        self.engine, self.get_global_grad_norm = self._replaced.engine, self._replaced.get_global_grad_norm
        accelerator.deepspeed_engine_wrapped = self

    def backward(self, loss: Any, sync_gradients: bool = True, **kwargs: Any) -> None:
        """The engine's backward of a micro-batch, the last of its window or not."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)

    def remove(self) -> None:
        """Let Accelerate's own be there again."""
        self._accelerator.deepspeed_engine_wrapped = self._replaced
