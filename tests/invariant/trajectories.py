"""Classes of configurations that must give one trajectory, run through the real program.

python -m tests.invariant.trajectories     prints the table of largest differences of the final weights
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from hf_lookbehind.report import format_table
from hf_lookbehind.scripts import run_image_classification
from tests.distributed.pretended import pretend_gpus
from tests.processes import run_group

METHODS = {
    "AdamW": dict(k=0),
    "SAM": dict(k=1, rho=0.02),
    "Lookbehind-SAM": dict(k=3, rho=0.02, alpha=0.5),
    "Lookbehind-SAM, adaptive": dict(k=3, rho=0.02, alpha="adaptive"),
    "Lookbehind-ASAM": dict(k=2, rho=0.05, ascent="asam", alpha=0.5),
    "Lookbehind-ASAM, adaptive": dict(k=3, rho=0.05, ascent="asam", alpha="adaptive-global"),
}

FSDP2 = {
    "fsdp": "full_shard", "fsdp_config": '{"transformer_layer_cls_to_wrap": "ViTLayer"}', "use_cpu": True,
    "accelerator_config": '{"use_configured_state": true}',
}  # fmt: skip
# processes, micro-batch of each, micro-batches per step, other flags; the first is what the others must equal
CLASSES = {
    "1 process x 8": (1, 8, 1, {}),
    "2 accumulated x 4": (1, 4, 2, {}),
    "4 accumulated x 2": (1, 2, 4, {}),
    "2 processes x 4": (2, 4, 1, {}),
    "2 processes x 2 accumulated x 2": (2, 2, 2, {}),
    "activation checkpointing": (1, 8, 1, {"activation_checkpointing": True}),
    "stopped and resumed": (1, 8, 1, {"resume_from_checkpoint": "last"}),
    "2 processes, stopped and resumed": (2, 4, 1, {"resume_from_checkpoint": "last"}),
    "FSDP2, 2 x 4": (2, 4, 1, FSDP2),
    "FSDP2, 2 x 2 accumulated x 2": (2, 2, 2, FSDP2),
    "FSDP2, 2, stopped and resumed": (2, 4, 1, FSDP2 | {"resume_from_checkpoint": "last"}),
}
BASELINE = next(iter(CLASSES))
STEPS, STOPPED_AT = 9, 4


def flags(output_dir, batch, accumulation, **others):
    """48 digits: 6 steps an epoch, so that a run ends in the middle of its second one."""
    settings = dict(
        dataset_name="digits", train_split="train[:48]", train_val_split=0, augmentation="none", dtype="float64",
        config_overrides="hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32",
        learning_rate=1e-3, max_steps=STEPS, save_strategy="steps", save_steps=STOPPED_AT, disable_tqdm=True,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, output_dir=output_dir,
    )  # fmt: skip
    return [f"--{name}={value}" for name, value in (settings | others).items()]


def train(folder, name, methods=METHODS):
    """Train every method in one configuration; the final models are in `folder/method`."""
    processes, batch, accumulation, others = CLASSES[name]
    for method in methods:
        config = METHODS[method]
        output_dir = Path(folder, method)
        if "resume_from_checkpoint" in others:
            _main(flags(output_dir, batch, accumulation, **config, **_without_resume(others)))
            if int(os.environ.get("RANK", 0)) == 0:
                shutil.rmtree(output_dir / f"checkpoint-{2 * STOPPED_AT}")
                (output_dir / "model.safetensors").unlink()
        _main(flags(output_dir, batch, accumulation, **config, **others))


def _without_resume(others):
    return {name: value for name, value in others.items() if name != "resume_from_checkpoint"}


def _main(argv):
    if any(flag.startswith("--fsdp") for flag in argv):
        pretend_gpus()
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        exit_code = run_image_classification.main(argv)
    assert exit_code == 0, said.getvalue()


def final_weights(folder, name, methods=tuple(METHODS)):
    """The final weights of every method, as saved. In several processes each program rehearses its training."""
    if CLASSES[name][0] == 1:
        train(folder, name, methods)
    else:
        run_group(train, folder, name, methods, world=CLASSES[name][0], rehearsed=True)
    return {method: load_file(Path(folder, method, "model.safetensors")) for method in methods}


def largest_differences(weights, expected):
    """By method."""
    return {
        method: max((weights[method][name] - tensor).abs().max().item() for name, tensor in expected[method].items())
        for method in weights
    }


def main():
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        expected = final_weights(Path(folder, "baseline"), BASELINE)
        for name in CLASSES:
            if name != BASELINE:
                differences = largest_differences(final_weights(Path(folder, name), name), expected)
                rows.append({f"against {BASELINE}": name} | {m: f"{d:.0e}" for m, d in differences.items()})
    print(format_table(rows))


if __name__ == "__main__":
    sys.exit(main())
