"""Tiny trainings with the trainers of other libraries: a model, a tokenizer and texts of twenty words each."""

import importlib
import random

import sentence_transformers
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hf_lookbehind import LookbehindConfig, LookbehindMixin

WORDS = "a and big blue cat dog lay mat old on ran red road sat saw small the then who".split()
SPECIAL = ["[PAD]", "[UNK]", "[EOS]", "[CLS]", "[SEP]", "user", "assistant", ":"]
SIZES = dict(
    vocab_size=len(WORDS) + len(SPECIAL), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, attn_implementation="sdpa",
)  # fmt: skip
LABELS = {"label": lambda i: i % 2, "score": lambda i: float(i % 2), "preferred": lambda i: i % 2 == 0}
CHAT = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"


def make_tokenizer():
    words = models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", cls_token="[CLS]", sep_token="[SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **names)


def make_folder(folder, cls, **overrides):
    """A model and its tokenizer as the Hub has them: TRL's and sentence-transformers' trainers load by name."""
    torch.manual_seed(0)
    is_decoder = cls.__name__.startswith("Llama")
    dropout = {name: 0.1 for name in ("attention_dropout", "hidden_dropout_prob")}
    ends = dict(eos_token_id=2, bos_token_id=2, num_key_value_heads=2) if is_decoder else {}
    config = LlamaConfig if is_decoder else BertConfig
    cls(config(**(SIZES | dropout | ends | overrides))).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def texts(columns, n=24):
    """Rows of random sentences, with labels where the library wants them."""
    draw = random.Random(0)

    def value(column, i):
        if column in LABELS:
            return LABELS[column](i)
        return " " + " ".join(draw.choices(WORDS, k=3 + draw.randrange(3)))

    return Dataset.from_list([{column: value(column, i) for column in columns} for i in range(n)])


def _of_trl(name, columns, cls=LlamaForCausalLM, peft=False, path="trl", **config):
    module = importlib.import_module(path)

    def build(folder, **arguments):
        model = cls.from_pretrained(make_folder(folder / "model", cls, **config))
        data = texts(columns)
        if name == "KTO":
            data = data.rename_column("preferred", "label")
        kwargs = dict(model=model, train_dataset=data, processing_class=make_tokenizer())
        if peft:
            kwargs["peft_config"] = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
        args = getattr(module, f"{name}Config", trl.DPOConfig)(str(folder / "out"), **arguments)
        return getattr(module, f"{name}Trainer"), dict(kwargs, args=args)

    build.trainer = f"{path}.{name}Trainer"
    return build


def _of_sentence_transformers(make_loss, columns, kind="SentenceTransformer", cls=BertModel):
    library = sentence_transformers

    def build(folder, **arguments):
        model = getattr(library, kind)(make_folder(folder / "model", cls), device="cpu")
        args = getattr(library, f"{kind}TrainingArguments")(str(folder / "out"), **arguments)
        torch.manual_seed(0)  # some losses draw weights of their own
        return getattr(library, f"{kind}Trainer"), dict(
            model=model, args=args, train_dataset=texts(columns), loss=make_loss(model)
        )

    build.trainer = f"sentence_transformers.{kind}Trainer"
    return build


def _cross_encoder(folder, **arguments):
    model = CrossEncoder(make_folder(folder / "model", BertForSequenceClassification, num_labels=1), device="cpu")
    args = CrossEncoderTrainingArguments(str(folder / "out"), **arguments)
    data = texts(["query", "answer", "score"])
    return CrossEncoderTrainer, dict(model=model, args=args, train_dataset=data, loss=BinaryCrossEntropyLoss(model))


_cross_encoder.trainer = "sentence_transformers.CrossEncoderTrainer"

PAIRS = ["prompt", "chosen", "rejected"]
CASES = {
    "sft": _of_trl("SFT", ["prompt", "completion"]),
    "sft-lora": _of_trl("SFT", ["prompt", "completion"], peft=True),
    "dpo": _of_trl("DPO", PAIRS),
    "dpo-lora": _of_trl("DPO", PAIRS, peft=True),
    "dpo-bema": _of_trl("DPO", PAIRS, path="trl.experimental.bema_for_ref_model"),
    "kto": _of_trl("KTO", ["prompt", "completion", "preferred"]),
    "kto-experimental": _of_trl("KTO", ["prompt", "completion", "preferred"], path="trl.experimental.kto"),
    "reward": _of_trl("Reward", PAIRS, LlamaForSequenceClassification, num_labels=1),
    "orpo": _of_trl("ORPO", PAIRS, path="trl.experimental.orpo"),
    "sentence": _of_sentence_transformers(losses.MultipleNegativesRankingLoss, ["anchor", "positive"]),
    "sentence-cached": _of_sentence_transformers(
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2), ["anchor", "positive"]
    ),
    "sentence-components": _of_sentence_transformers(
        lambda model: losses.GlobalOrthogonalRegularizationLoss(model), ["anchor", "positive"]
    ),
    "sentence-classifier": _of_sentence_transformers(
        lambda model: losses.SoftmaxLoss(model, SIZES["hidden_size"], 2), ["first", "second", "label"]
    ),
    "cross-encoder": _cross_encoder,
    "sparse": _of_sentence_transformers(
        lambda model: SpladeLoss(model, SparseMultipleNegativesRankingLoss(model), document_regularizer_weight=1e-3),
        ["anchor", "positive"],
        "SparseEncoder",
        BertForMaskedLM,
    ),
    "multi-vector": _of_sentence_transformers(
        lambda model: MultiVectorMultipleNegativesRankingLoss(model), ["anchor", "positive"], "MultiVectorEncoder"
    ),
}


def make_library_trainer(case, folder, config=None, **overrides):
    """The library's own trainer without a config; with one, the same under the mixin."""
    arguments = dict(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3, logging_steps=1, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", dataloader_pin_memory=False, seed=0, learning_rate=1e-2,
    )  # fmt: skip
    cls, kwargs = CASES[case](folder, **(arguments | overrides))
    if config is not None:
        cls = type(f"Lookbehind{cls.__name__}", (LookbehindMixin, cls), {})
        kwargs["lookbehind_config"] = LookbehindConfig(**config)
    return cls(**kwargs)
