"""The table of the programs: what it says of each is so."""

import importlib

import pytest

from hf_lookbehind.programs.registry import PROGRAMS, module_name, program_of


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_there_and_knows_its_name(name):
    module = importlib.import_module(module_name(name))
    assert callable(module.main) and hasattr(module, "PROGRAM") == PROGRAMS[name].trains
    assert not PROGRAMS[name].trains or module.PROGRAM.name == name


@pytest.mark.parametrize(
    "class_name, name",
    [
        ("ViTForImageClassification", "image-classification"),
        ("BertForSequenceClassification", "text-classification"),
        ("GPT2LMHeadModel", "clm"),
        ("LlamaForCausalLM", "clm"),
        ("T5ForConditionalGeneration", "seq2seq"),
        ("MarianMTModel", "seq2seq"),
        ("BertModel", None),
    ],
)
def test_a_model_is_of_the_program_that_trains_its_kind(class_name, name):
    assert program_of(class_name) == name
