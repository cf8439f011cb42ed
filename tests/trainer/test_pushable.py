"""What nobody could load from a push is refused before the training, with what would be missing."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Module, Router, Transformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizer,
    ViTForImageClassification,
)

from hf_lookbehind import InputError, LookbehindConfig, LookbehindMixin, LookbehindTrainer
from hf_lookbehind.trainer.pushable import refuse_unpushable
from tests.hub.conftest import hub
from tests.libraries import SIZES, make_folder, texts
from tests.models import vit_config
from tests.training import make_model, make_trainer

__all__ = ["hub"]
K1 = dict(k=1)
SIZE = SIZES["hidden_size"]


def check(trainer):
    refuse_unpushable(trainer, "push_to_hub=True")


class Words(PreTrainedTokenizer):
    """A vocabulary in a file of its own name."""

    vocab_files_names = {"vocab_file": "words.lst"}

    def __init__(self, **kwargs):
        self.words = {"a": 0}
        super().__init__(**kwargs)

    vocab_size = 1

    def get_vocab(self):
        return self.words

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = f"{save_directory}/words.lst"
        with open(path, "w") as file:
            file.write("a")
        return (path,)


class OwnCode(ViTForImageClassification):
    _auto_class = "AutoModelForImageClassification"


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)


class SavesItself(LookbehindTrainer):
    def _save(self, output_dir=None, state_dict=None):
        pass


def adapters(base):
    model = make_model()
    model.name_or_path = base
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))


@pytest.mark.parametrize("base", ["", "/home/jane/base", "./base"])
def test_adapters_without_a_base_on_the_hub(tmp_path, base):
    prompts = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    text_model = BertForSequenceClassification(BertConfig(**SIZES))
    text_model.name_or_path = base
    with pytest.raises(InputError, match="adapters need a base model on the Hub"):
        check(make_trainer(tmp_path, K1, model=get_peft_model(text_model, prompts)))
    with pytest.raises(InputError, match="adapters need a base model on the Hub"):
        check(make_trainer(tmp_path, K1, model=adapters(base)))
    check(make_trainer(tmp_path, K1, model=adapters("user/base")))


def test_a_tokenizer_whose_vocabulary_has_a_name_of_its_own(tmp_path):
    for beside in (dict(processing_class=Words()), dict(data_collator=SimpleNamespace(tokenizer=Words()))):
        trainer = make_trainer(tmp_path, K1, trainer_kwargs=beside)
        with pytest.raises(InputError, match="Words saves words.lst, which would be left out: no file of a model"):
            check(trainer)


def test_code_of_ones_own(tmp_path):
    with pytest.raises(InputError, match=r"OwnCode is code of its own \(auto_map\), which is never pushed"):
        check(make_trainer(tmp_path, K1, model=OwnCode(vit_config())))


def test_a_model_without_a_config_unless_the_trainer_saves_it(tmp_path):
    with pytest.raises(InputError, match="Plain is no model of transformers: .* without a config.json"):
        check(make_trainer(tmp_path, K1, model=Plain()))
    check(make_trainer(tmp_path, K1, model=Plain(), cls=SavesItself))
    check(make_trainer(tmp_path, K1, model=torch.compile(make_model())))


# ---- sentence-transformers ----


class Own(Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, features):
        return features

    def save(self, output_path, *args, **kwargs):
        with open(f"{output_path}/{self.name}", "w") as file:
            json.dump({}, file)


class OwnInput(Transformer):
    name = "own.json"

    def save(self, output_path, *args, **kwargs):
        super().save(output_path)
        Own.save(self, output_path)


def sentence_trainer(folder, *modules, **args):
    cls = type("Tested", (LookbehindMixin, SentenceTransformerTrainer), {})
    model = SentenceTransformer(modules=list(modules), device="cpu")
    return cls(
        model=model,
        args=SentenceTransformerTrainingArguments(str(folder / "out"), report_to=[], use_cpu=True, **args),
        train_dataset=texts(["anchor", "positive"]),
        loss=losses.MultipleNegativesRankingLoss(model),
        lookbehind_config=LookbehindConfig(k=1),
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("bert"), BertModel)


def test_a_module_of_ones_own_has_a_folder_for_files_of_any_name(tmp_path, bert):
    check(sentence_trainer(tmp_path, Transformer(bert), Pooling(SIZE), Own("any name")))


@pytest.mark.parametrize("name, message", [("own.bin", "a pickle"), ("own.py", "code, which is never pushed")])
def test_a_module_that_saves_what_is_never_pushed(tmp_path, bert, name, message):
    with pytest.raises(InputError, match=f"Own saves {name}, which would be left out: {message}"):
        check(sentence_trainer(tmp_path, Transformer(bert), Pooling(SIZE), Own(name)))
    routed = Router({"query": [Own(name)], "document": [Own("own.json")]}, default_route="document")
    mapping = {"anchor": "query", "positive": "document"}
    with pytest.raises(InputError, match=f"Own saves {name}"):
        check(sentence_trainer(tmp_path, Transformer(bert), Pooling(SIZE), routed, router_mapping=mapping))


def test_a_module_at_the_root_whose_files_have_names_of_their_own(tmp_path, bert):
    with pytest.raises(InputError, match="OwnInput saves own.json, which would be left out: no file of a model"):
        check(sentence_trainer(tmp_path, OwnInput(bert), Pooling(SIZE)))


# ---- at construction ----


def test_it_is_refused_at_construction_and_the_hub_is_not_asked(hub, tmp_path):
    with pytest.raises(InputError, match="^push_to_hub=True: Words saves words.lst"):
        make_trainer(tmp_path / "out", K1, push_to_hub=True, trainer_kwargs=dict(processing_class=Words()))
    assert hub.requests == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, base", [("adapter_config.json", None), ("model.safetensors", "user/base")])
def test_so_is_a_folder_with_what_would_be_loaded_in_the_place_of_the_model(hub, tmp_path, name, base):
    (tmp_path / name).write_text("{}")
    model = None if base is None else adapters(base)
    with pytest.raises(InputError, match=f"^push_to_hub=True: .* holds {name}, of a training of .*: remove it"):
        make_trainer(tmp_path, K1, model=model, push_to_hub=True)
    assert hub.requests == []
