"""What of DeepSpeed's settings is refused; the package itself is not needed for it."""

import pytest

from hf_lookbehind.trainer.deepspeed import refused_settings

# as people have them: nothing of these is refused
USUAL = {
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu"},
        "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True, "round_robin_gradients": True,
    },
    "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0}, "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "scheduler": {"type": "WarmupLR", "params": {}},
    "data_types": {"grad_accum_dtype": "fp32"}, "wall_clock_breakdown": False,
}  # fmt: skip


def zero(**settings):
    return {"zero_optimization": settings}


@pytest.mark.parametrize(
    ("config", "stage", "named"),
    [
        ({}, 0, "zero_optimization.stage=0"),
        (zero(zero_hpz_partition_size=2), 3, "zero_optimization.zero_hpz_partition_size=2"),
        (zero(mics_shard_size=2), 3, "zero_optimization.mics_shard_size=2"),
        (zero(zero_quantized_weights=True), 3, "zero_optimization.zero_quantized_weights=True"),
        (zero(zero_quantized_gradients=True), 3, "zero_optimization.zero_quantized_gradients=True"),
        (zero(zenflow={"topk_ratio": 0.1}), 2, "zero_optimization.zenflow="),
        (zero(offload_optimizer={"device": "nvme"}), 3, "zero_optimization.offload_optimizer.device='nvme'"),
        (zero(offload_param={"device": "nvme"}), 3, "zero_optimization.offload_param.device='nvme'"),
        (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), 3, "offload_optimizer.ratio=0.5"),
        (zero(offload_optimizer={"super_offload": True}), 3, "offload_optimizer.super_offload=True"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, 2, "bf16.bf16_master_weights_and_grads=True"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, 1, "grad_accum_dtype='fp32'"),
        ({"torch_autocast": {"enabled": True}}, 2, "torch_autocast.enabled=True"),
        ({"tensor_parallel": {"autotp_size": 2}}, 1, "tensor_parallel.autotp_size=2"),
        ({"sequence_parallel_size": 2}, 2, "sequence_parallel_size=2"),
        ({"compile": {"deepcompile": True}}, 3, "compile.deepcompile=True"),
        ({"data_efficiency": {"enabled": True}}, 2, "data_efficiency.enabled=True"),
        ({"curriculum_learning": {"enabled": True}}, 2, "curriculum_learning.enabled=True"),
        ({"progressive_layer_drop": {"enabled": True}}, 2, "progressive_layer_drop.enabled=True"),
        ({"sparse_gradients": True}, 2, "sparse_gradients=True"),
        ({"optimizer": {"type": "Muon"}}, 2, "optimizer.type='Muon'"),
    ],
    ids=str,
)
def test_a_setting_that_is_not_supported_is_named(config, stage, named):
    (refusal,) = refused_settings(config, stage)
    assert named in refusal and "not supported" in refusal


@pytest.mark.parametrize("stage", [2, 3])
def test_usual_settings_are_not_refused(stage):
    assert list(refused_settings(USUAL, stage)) == []
