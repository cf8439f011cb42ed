"""Tiny trainings with TRL's trainers that generate, and how often they do."""

import importlib
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_lookbehind import LookbehindConfig, LookbehindMixin
from tests.libraries import CHAT, WORDS, make_folder, make_tokenizer, texts

calls = Counter()
OURS = ("sharpness", "alpha", "ascent_loss", "ascent_norm")


def reward(completions, **kwargs):
    """More for longer words, and for cats."""
    calls["rewards"] += 1
    return [sum(map(len, text.split())) / 10 + 0.1 * text.split().count("cat") for text in completions]


def is_right(completions, **kwargs):
    """0 or 1: whether it begins with an early word."""
    calls["rewards"] += 1
    return [float(text.split()[:1] < [WORDS[9]]) for text in completions]


@contextmanager
def counted():
    """Within it, generations of any model and calls of the rewards are counted: yields the counts."""
    generate = GenerationMixin.generate

    def counting(self, *args, **kwargs):
        calls["generations"] += 1
        return generate(self, *args, **kwargs)

    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", counting)
        yield calls


def model_of(folder, seed=0, **config):
    where = make_folder(folder, LlamaForCausalLM, initializer_range=0.5, **config)
    model = LlamaForCausalLM.from_pretrained(where, dtype=torch.float32)
    if seed:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def make_byte_tokenizer():
    """A token for each byte, as GOLD wants them."""
    specials = ["[PAD]", "[UNK]", "[EOS]"]
    letters = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **names)


def _chats(columns):
    roles = dict(zip(columns, ("user", "assistant"), strict=True))
    return Dataset.from_list(
        [{"messages": [{"role": role, "content": row[c]} for c, role in roles.items()]} for row in texts(columns)]
    )


PROMPTS = lambda: texts(["prompt"])  # noqa: E731
CHATS = lambda: _chats(["prompt", "completion"])  # noqa: E731
GENERATES = dict(num_generations=4, max_completion_length=6)


def _case(name, module="trl", data=PROMPTS, rewards=None, teacher=False, tokenizer=make_tokenizer, **settings):
    def build(folder, *, peft=False, model=None, **arguments):
        library, names = importlib.import_module(module), tokenizer()
        sizes = dict(vocab_size=len(names)) | (model or {})
        kwargs = dict(model=model_of(folder / "model", **sizes), train_dataset=data(), processing_class=names)
        if rewards is not None:
            kwargs["reward_funcs"] = rewards
        if teacher:
            kwargs["teacher_model"] = model_of(folder / "teacher", seed=1, **sizes)
        if peft:
            kwargs["peft_config"] = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
        args = getattr(library, f"{name}Config")(str(folder / "out"), **(settings | arguments))
        return getattr(library, f"{name}Trainer"), kwargs | dict(args=args)

    build.trainer = f"{module}.{name}Trainer"
    return build


def _told():
    return texts(["prompt", "privileged_context"])


CASES = {
    "grpo": _case("GRPO", rewards=reward, **GENERATES),
    "rloo": _case("RLOO", rewards=reward, **GENERATES),
    "gmpo": _case("GMPO", "trl.experimental.gmpo", rewards=reward, **GENERATES),
    "a2po": _case("A2PO", "trl.experimental.a2po", rewards=is_right, max_completion_length=6, num_value_samples=3),
    "sdpo": _case(
        "SDPO", "trl.experimental.sdpo", rewards=reward, distillation_weight=0.5, success_reward_threshold=1.0,
        distillation_mode="full_logits", distillation_alpha=0.5, **GENERATES,
    ),
    "sdft": _case("SDFT", "trl.experimental.sdft", data=_told, distillation_topk=5, **GENERATES),
    "distillation": _case("Distillation", teacher=True, max_completion_length=6),
    "distillation, old path": _case(
        "Distillation", "trl.experimental.distillation", teacher=True, max_completion_length=6
    ),
    "gkd": _case("GKD", "trl.experimental.gkd", data=CHATS, teacher=True, max_new_tokens=6, lmbda=0.7),
    "gold": _case(
        "GOLD", "trl.experimental.gold", data=CHATS, teacher=True, tokenizer=make_byte_tokenizer,
        max_completion_length=6, lmbda=0.7,
    ),
    "iw_opd": _case("IWOPD", "trl.experimental.iw_opd", data=CHATS, teacher=True, max_completion_length=6),
    "cpo": _case("CPO", "trl.experimental.cpo", data=lambda: texts(["prompt", "chosen", "rejected"])),
    "tpo": _case("TPO", "trl.experimental.tpo", data=lambda: texts(["prompt", "chosen", "rejected", "reference"])),
}  # fmt: skip


def make_generating_trainer(case, folder, config=None, *, base=lambda cls: cls, **overrides):
    """The library's own trainer without a config; with one, the same under the mixin."""
    arguments = dict(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3, logging_steps=1, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", dataloader_pin_memory=False, seed=0, learning_rate=1e-2,
        bf16=False,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    cls, kwargs = CASES[case](folder, **(arguments | overrides))
    cls = base(cls)
    if config is not None:
        cls = type(f"Lookbehind{cls.__name__}", (LookbehindMixin, cls), {})
        kwargs["lookbehind_config"] = LookbehindConfig(**config)
    return cls(**kwargs)


def logs_of(trainer):
    """What was logged, to be compared: without clocks and what Lookbehind adds; nan is nan."""
    left_out = ("runtime", "per_second", "step_time", *OURS)
    return [
        {name: repr(value) for name, value in log.items() if not any(part in name for part in left_out)}
        for log in trainer.state.log_history
    ]


def train(case, folder, config=None, **overrides):
    """A trainer that has trained, with the counts of its `generations` and `rewards` in `calls`."""
    trainer = make_generating_trainer(case, folder, config, **overrides)
    with counted() as counts:
        trainer.train()
    trainer.calls = dict(counts)
    return trainer
