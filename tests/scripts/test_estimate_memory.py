"""The program that says how much memory a training takes."""

import json
import resource
import time

import pytest
from transformers import GPT2Config, LlamaConfig

from hf_lookbehind.scripts.__main__ import main as console
from hf_lookbehind.scripts.estimate_memory import main
from tests.training import make_model

GIB = 2**30


def table(text):
    """Its rows, by column, of the first cell."""
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def test_a_size_is_enough(capsys):
    assert console(["memory", "7B", "--k", "2", "--processes", "8", "--engine", "ddp", "fsdp2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("7B: 7,000,000,000 parameters\nGiB on each of 8 devices\n")
    rows = table(printed)
    assert rows.keys() == {"ddp", "fsdp2"}
    assert rows["ddp"]["slow"] == rows["ddp"]["fast"] == f"{28e9 / GIB:.2f}"
    assert rows["fsdp2"]["slow"] == f"{3.5e9 / GIB:.2f}"
    assert rows["fsdp2"]["total"] == f"{21e9 / GIB:.2f}" and rows["fsdp2"]["bytes a parameter"] == "24/8"


def test_one_process_has_no_engine_and_several_models_stand_side_by_side(capsys):
    flags = ["--k", "3", "--alpha", "adaptive", "--offload_buffers", "--optimizer", "sgd"]
    assert main(["1B", "2B", *flags]) == 0
    assert table(capsys.readouterr().out) == {"one process": {"1B": "14.9", "2B": "29.8", "bytes a parameter": "16"}}
    assert main(["1B", *flags]) == 0
    [row] = table(capsys.readouterr().out).values()
    assert row["slow (CPU)"] == row["fast"] == row["first"] == "3.73"


def test_of_a_folder_the_config_is_read_and_no_weights(tmp_path, capsys):
    model = make_model()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "model")
    assert main([str(tmp_path / "model")]) == 0
    count = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out.startswith(f"model: {count:,} parameters\n")


def test_tied_weights_count_once_and_a_large_model_takes_no_memory(tmp_path, capsys):
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "gpt2")
    heads = dict(num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80)
    large = LlamaConfig(hidden_size=8192, intermediate_size=28672, vocab_size=128256, **heads)
    large.architectures = ["LlamaForCausalLM"]
    large.save_pretrained(tmp_path / "llama")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert main([str(tmp_path / "gpt2"), str(tmp_path / "llama")]) == 0
    assert "gpt2: 124,439,808 parameters, llama: 70,553,706,496 parameters" in capsys.readouterr().out
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIB / 1024  # KiB
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "the following arguments are required: MODEL_OR_SIZE"),
        (["0M"], "MODEL_OR_SIZE '0M' is not allowed: one parameter or more"),
        (["./nowhere"], "MODEL_OR_SIZE './nowhere': there is no such model folder"),
        (["empty"], "MODEL_OR_SIZE 'empty' is not a model folder: it has no config.json"),
        (["adapter"], "MODEL_OR_SIZE 'adapter' holds adapters only"),
        (["unknown"], "MODEL_OR_SIZE 'unknown' cannot be used: "),
        (["quantised"], "MODEL_OR_SIZE 'quantised' cannot be used: its config says that its weights are quantised"),
        (["7B", "--k", "-1"], "--k=-1 is not allowed: a whole number of ascent steps, 0 or more"),
        (["7B", "--alpha", "often"], "--alpha='often' is not allowed"),
        (["7B", "--engine", "zero4"], "argument --engine: invalid choice: 'zero4'"),
        (["7B", "--processes", "many"], "argument --processes: invalid int value: 'many'"),
        (["7B", "--processes", "0"], "--processes 0 is not allowed: 1 or more"),
        (["7B", "--trainable_share", "2"], "--trainable_share 2.0 is not allowed: a number in (0, 1]"),
        (["7B", "--sync_ascent", "no", "--processes", "2"], "--sync_ascent False is not supported by --engine fsdp2"),
        (["7B", "--proceses", "2"], "unrecognized arguments: --proceses"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    files = {
        "empty/x": {},
        "adapter/adapter_config.json": {},
        "unknown/config.json": {"model_type": "no_such_model"},
        "quantised/config.json": GPT2Config(quantization_config={"quant_method": "bitsandbytes"}).to_dict(),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {message}") and printed.err.count("\n") == 1
