"""The program for supervised fine-tuning: conversations, completions and texts, through TRL."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from trl import SFTTrainer

from hf_lookbehind.programs.data.conversations import IGNORED
from hf_lookbehind.programs.models.tokenization import train_tokenizer
from hf_lookbehind.scripts import run_sft
from hf_lookbehind.scripts.run_sft import main, train
from tests.caches import set_caches
from tests.libraries import WORDS, make_folder

QUICK = "--disable_tqdm true --per_device_train_batch_size 4 --learning_rate 1e-2 --max_steps 3 --train_val_split 0.2"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
# what the first turn looks like depends on the others
LATE = "{% if messages | length > 2 %}many{% endif %}" + TEMPLATE


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    set_caches(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_folder(folder, LlamaForCausalLM, vocab_size=300, attention_dropout=0.0)
    save_tokenizer(folder)
    return str(folder)


def save_tokenizer(folder, template=TEMPLATE):
    tokenizer = train_tokenizer([" ".join(WORDS)] * 9, 300, frame=False)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def turn(role, content):
    return {"role": role, "content": content}


CHAT = [turn("user", "a cat sat"), turn("assistant", "a dog ran"), turn("user", "who"), turn("assistant", "a cat")]
KINDS = {
    "messages": ({"messages": CHAT}, "a dog ran</s>a cat</s>"),
    "completions": ({"prompt": "a cat", "completion": " sat on a mat"}, " sat on a mat</s>"),
    "prompts of messages": ({"prompt": CHAT[:3], "completion": CHAT[3:]}, "a cat</s>"),
    "texts": ({"text": "a red road"}, "a red road</s>"),
}


def written(folder, *rows, name="train"):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [f"--{name}_file", str(path)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned(tmp_path, model, kind):
    row, learned = KINDS[kind]
    flags = [*written(tmp_path, *[row] * 10), "--model_name_or_path", model, *QUICK.split(), "--save_strategy", "no"]
    results = train([*flags, "--k", "2", "--rho", "0.02", "--output_dir", str(tmp_path / "out")])
    assert isinstance(results.trainer, SFTTrainer)
    example, tokenizer = results.datasets["train"][0], AutoTokenizer.from_pretrained(model)
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    found = [token for token, label in pairs if label != IGNORED]
    assert tokenizer.decode(found) == learned
    assert found == [label for label in example["labels"] if label != IGNORED]
    assert "sharpness" in json.dumps(results.trainer.state.log_history)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # the loss of what is learned, by hand
    batch = [results.datasets["validation"][i] for i in range(2)]
    ids, labels = (torch.tensor([row[name] for row in batch]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        logits = saved(input_ids=ids).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)
    assert loss.item() == pytest.approx(results.metrics["eval_loss"], rel=1e-5)


def test_adapters_all_of_it_and_a_resumed_run(tmp_path, model):
    rows = [{"prompt": "a cat", "completion": word} for word in ("sat", "ran", "saw a dog", "on a mat", "lay") * 4]
    flags = [*written(tmp_path, *rows), "--model_name_or_path", model, *QUICK.split(), "--use_peft", "--learn", "all"]
    flags += "--k 2 --rho 0.02 --alpha adaptive --save_steps 1 --lora_dropout 0.1".split()
    whole = train([*flags, "--output_dir", str(tmp_path / "whole")])
    assert IGNORED not in whole.datasets["train"][0]["labels"]
    assert {"lora" in n for n, p in whole.trainer.model.named_parameters() if p.requires_grad} == {True}
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = train([*flags, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", "last"])
    pairs = zip(whole.trainer.model.parameters(), again.trainer.model.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) == 0.0
    assert (tmp_path / "whole" / "README.md").is_file()


ROW = {"prompt": "a", "completion": "b"}
BAD_INPUT = {
    "no metric": ([ROW], ["--metric", "accuracy"], TEMPLATE, "--metric accuracy is not supported by sft"),
    "too short": ([ROW], ["--max_length", "1"], TEMPLATE, "--max_length 1 is not allowed"),
    "nothing left": (
        [{"prompt": "a cat sat on", "completion": "b"}], ["--max_length", "3"], TEMPLATE, "teaches nothing within",
    ),
    "no column": ([{"words": "a"}], [], TEMPLATE, "no column is called 'messages' or 'prompt'"),
    "no completion": ([ROW, {"prompt": "a", "completion": None}], [], TEMPLATE, "row 1 of"),
    "no content": ([{"messages": [{"role": "user"}]}], [], TEMPLATE, "a list of messages with role and content"),
    "no template": ([{"messages": CHAT}], [], None, "the tokenizer has no chat template"),
    "late": ([{"messages": CHAT}], [], LATE, "the chat template writes a message differently when others follow"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named(tmp_path, capsys, model, name):
    rows, flags, template, message = BAD_INPUT[name]
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    save_tokenizer(tmp_path / "model", template)
    given = [*written(tmp_path, *rows), "--model_name_or_path", str(tmp_path / "model"), "--train_val_split", "0"]
    assert main([*given, *flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_is_needed(tmp_path, capsys):
    assert main([*written(tmp_path, ROW), "--output_dir", str(tmp_path / "out")]) == 2
    assert "--model_name_or_path is needed" in capsys.readouterr().err


def test_without_trl_it_helps_and_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_sft, "find_spec", lambda name: None)
    assert "--max_length" in run_sft.make_parser().format_help()
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    assert run_sft.main(["--train_file", str(rows), "--output_dir", str(out)]) == 2
    assert "pip install 'hf_lookbehind[trl]'" in capsys.readouterr().err
    assert not out.exists()
