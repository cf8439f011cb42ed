"""What is pushed of a model loads, and is that model, however its files are laid out and whatever they are called."""

import ast
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.sentence_transformer.modules.tokenizer import PhraseTokenizer, WhitespaceTokenizer
from sentence_transformers.sparse_encoder import modules as sparse
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    PhobertTokenizer,
    ProphetNetTokenizer,
    WhisperTokenizer,
)

from hf_lookbehind.hub import file_names as names
from hf_lookbehind.hub import files_to_push
from hf_lookbehind.hub.files import contents
from tests.libraries import SIZES, WORDS, make_folder, make_tokenizer

SIZE = SIZES["hidden_size"]
TEXTS = ["a big dog", "the red cat sat", "old small mat"]
VOCABULARY = [*WORDS, "big_dog"]


def bert(folder, **overrides):
    return Transformer(make_folder(folder / "bert", BertModel, **overrides))


def words(tokenizer=WhitespaceTokenizer):
    torch.manual_seed(0)
    return modules.WordEmbeddings(tokenizer(VOCABULARY), torch.randn(len(VOCABULARY), SIZE).numpy())


def pooled(*parts):
    return SentenceTransformer(modules=[*parts, modules.Pooling(SIZE)], device="cpu")


def router(folder, inner=False):
    query, document = modules.StaticEmbedding(make_tokenizer(), embedding_dim=SIZE), bert(folder)
    routes = {"query": [query], "document": [document, modules.Pooling(SIZE)]}
    if inner:
        routes["query"] = [Router({"query": [query], "document": [query]}, default_route="query")]
    return Router(routes, default_route="document")


def later_router():
    return Router({"query": [Dense(SIZE, SIZE)], "document": [Dense(SIZE, SIZE)]}, default_route="document")


SENTENCE = {
    "pooling": lambda folder: pooled(bert(folder)),
    "dense and normalised": lambda folder: SentenceTransformer(
        modules=[bert(folder), modules.Pooling(SIZE), Dense(SIZE, 4), Normalize()], device="cpu"
    ),
    "router at the root": lambda folder: SentenceTransformer(modules=[router(folder)], device="cpu"),
    "router in a router": lambda folder: SentenceTransformer(modules=[router(folder, inner=True)], device="cpu"),
    "router later": lambda folder: SentenceTransformer(
        modules=[bert(folder), modules.Pooling(SIZE), later_router()], device="cpu"
    ),
    "lstm": lambda folder: SentenceTransformer(
        modules=[words(), modules.LSTM(SIZE, 4), modules.Pooling(8)], device="cpu"
    ),
    "cnn": lambda folder: SentenceTransformer(
        modules=[words(), modules.CNN(SIZE, 4, kernel_sizes=[1, 3]), modules.Pooling(8)], device="cpu"
    ),
    "words": lambda folder: pooled(words()),
    "phrases": lambda folder: pooled(words(PhraseTokenizer)),
    "weighted words": lambda folder: pooled(words(), modules.WordWeights(VOCABULARY, {"cat": 2.0})),
    "bag of words": lambda folder: SentenceTransformer(
        modules=[modules.BoW(WORDS), Dense(len(WORDS), 4)], device="cpu"
    ),
    "static": lambda folder: SentenceTransformer(
        modules=[modules.StaticEmbedding(make_tokenizer(), embedding_dim=SIZE)], device="cpu"
    ),
    "layer norm": lambda folder: SentenceTransformer(
        modules=[bert(folder), modules.Pooling(SIZE), modules.LayerNorm(SIZE), modules.Dropout(0.1)], device="cpu"
    ),
    "weighted layers": lambda folder: pooled(
        bert(folder, output_hidden_states=True), modules.WeightedLayerPooling(SIZE, 2, layer_start=1)
    ),
    "splade": lambda folder: SparseEncoder(
        modules=[sparse.MLMTransformer(make_folder(folder / "bert", BertForMaskedLM)), sparse.SpladePooling()],
        device="cpu",
    ),
    "sparse static": lambda folder: SparseEncoder(
        modules=[sparse.SparseStaticEmbedding(make_tokenizer())], device="cpu"
    ),
    "sparse autoencoder": lambda folder: SparseEncoder(
        modules=[bert(folder), modules.Pooling(SIZE), sparse.SparseAutoEncoder(SIZE, hidden_dim=8, k=2)], device="cpu"
    ),
    "cross encoder": lambda folder: CrossEncoder(
        make_folder(folder / "m", BertForSequenceClassification, num_labels=1), device="cpu"
    ),
    "multi vector": lambda folder: MultiVectorEncoder(make_folder(folder / "m", BertModel), device="cpu"),
}


def pushed(folder, tmp_path):
    """A copy of what is pushed of a folder."""
    for name in files_to_push(folder):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, tmp_path / name)
    return tmp_path


def outputs(model):
    found = model.predict([(TEXTS[0], t) for t in TEXTS]) if isinstance(model, CrossEncoder) else model.encode(TEXTS)
    found = found if isinstance(found, list) else [found]
    return [torch.as_tensor(f).to_dense() for f in found]


@pytest.mark.parametrize("case", SENTENCE)
def test_a_pushed_model_of_sentence_transformers_is_the_model(tmp_path, case):
    model = SENTENCE[case](tmp_path).eval()
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = type(model)(str(pushed(tmp_path / "saved", tmp_path / "back")), device="cpu", local_files_only=True)
    for one, other in zip(outputs(model), outputs(loaded), strict=True):
        assert torch.equal(one, other)


def phobert(folder):
    (folder / "v.txt").write_text("low 1\ner 1\nl@@ 1\no@@ 1\n")
    (folder / "b.codes").write_text("l o 1\nlo w 1\n")
    return PhobertTokenizer(str(folder / "v.txt"), str(folder / "b.codes"))


def prophetnet(folder):
    (folder / "v").write_text("\n".join(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "low", "er"]))
    return ProphetNetTokenizer(str(folder / "v"))


def whisper(folder):
    return WhisperTokenizer(vocab={"l": 0, "o": 1, "w": 2, "lo": 3, "<|endoftext|>": 4}, merges=[("l", "o")])


def chatting(folder):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    return tokenizer


@pytest.mark.parametrize("make", [phobert, prophetnet, whisper, chatting])
def test_a_pushed_tokenizer_is_the_tokenizer(tmp_path, make):
    tokenizer = make(tmp_path)
    saved = Path(make_folder(tmp_path / "saved", BertModel))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (saved / name).unlink()
    tokenizer.save_pretrained(saved)
    loaded = type(tokenizer).from_pretrained(pushed(saved, tmp_path / "back"))
    assert loaded("low lo a cat").input_ids == tokenizer("low lo a cat").input_ids
    assert loaded.chat_template == tokenizer.chat_template and contents(saved).left_out == {}


def test_a_second_tokenizer_has_a_folder_of_its_own(tmp_path):
    saved = Path(make_folder(tmp_path / "saved", BertModel))
    make_tokenizer().save_pretrained(saved / "qformer_tokenizer")
    assert {f"qformer_tokenizer/{p.name}" for p in (saved / "qformer_tokenizer").iterdir()} <= {*files_to_push(saved)}


def vocabulary_files(path):
    """The values of `VOCAB_FILES_NAMES` in a module of transformers, which may need packages that are not here."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).lower() == "vocab_files_names":
            values = node.value.values if isinstance(node.value, ast.Dict) else ()
            yield from (value.value for value in values if isinstance(value, ast.Constant))


def test_the_vocabulary_of_every_tokenizer_of_transformers_is_pushed():
    modules = Path(transformers.__path__[0]).rglob("tokenization_*.py")
    found = {name for path in modules for name in vocabulary_files(path)}
    assert len(found) > 20 and {name for name in found if not names.is_one_of(name, names.SHARED)} == set()


def adapters(*adapter_names, base="user/base"):
    torch.manual_seed(0)
    model = LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | {"num_key_value_heads": 2})))
    model.name_or_path = base
    for i, name in enumerate(adapter_names):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = (
            model.add_adapter(name, config) or model if i else peft.get_peft_model(model, config, adapter_name=name)
        )
    return model


@pytest.mark.parametrize("adapter_names", [["default"], ["mine"], ["default", "other"], ["one", "two"]])
def test_adapters_of_any_name_are_pushed(tmp_path, adapter_names):
    model = adapters(*adapter_names).eval()
    model.save_pretrained(tmp_path / "saved")
    back, ids = pushed(tmp_path / "saved", tmp_path / "back"), torch.tensor([[1, 2, 3]])
    for name in adapter_names:
        base = adapters("unused").unload()
        subfolder = "" if name == "default" else name
        loaded = peft.PeftModel.from_pretrained(base, back, subfolder=subfolder).eval()
        model.set_adapter(name)
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_weights_in_parts_of_any_name_are_pushed_and_no_parts_of_another_model(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | {"num_key_value_heads": 2}))).eval()
    model.save_pretrained(tmp_path / "saved", max_shard_size="4kB")
    left = tmp_path / "saved" / "model-00001-of-00099.safetensors"
    shutil.copy(tmp_path / "saved" / min(n for n in files_to_push(tmp_path / "saved") if "-of-" in n), left)
    assert contents(tmp_path / "saved").left_out == {
        left.name: "a part of a model that no model.safetensors.index.json names"
    }
    index = tmp_path / "saved" / names.INDEX_NAME
    for i, part in enumerate(sorted((tmp_path / "saved").glob("model-*"))):
        part.rename(part.with_name(f"part{i}.safetensors"))
        index.write_text(index.read_text().replace(part.name, f"part{i}.safetensors"))
    loaded, ids = (
        AutoModelForCausalLM.from_pretrained(pushed(tmp_path / "saved", tmp_path / "back")),
        torch.ones(1, 2).long(),
    )
    assert torch.equal(loaded(ids).logits, model(ids).logits)
