"""Tiny vision-language models under TRL's SFT and the mixin: rows of an image, a question and an answer."""

import random
from importlib.util import find_spec

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from hf_lookbehind import LookbehindConfig, LookbehindMixin
from tests.libraries import WORDS
from tests.models import max_difference
from tests.trainer.test_libraries import logs_of

NEUTRAL = dict(k=1, rho=0.0, alpha=1)
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
TEXT = SMALL | dict(
    intermediate_size=32, num_key_value_heads=2, max_position_embeddings=128, attention_dropout=0.1, pad_token_id=0
)
VISION = SMALL | dict(intermediate_size=32, image_size=16, patch_size=8)
CHAT = (
    "{% for m in messages %}{{ m.role }} : {% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
)


def make_tokenizer(special):
    vocabulary = ["[PAD]", "[UNK]", "[EOS]", *special, "user", "assistant", ":", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")
    fast.add_special_tokens({"additional_special_tokens": special})
    return fast, {"vocab_size": len(vocabulary)}, vocabulary.index


def llava():
    tokenizer, size, index = make_tokenizer(["<image>"])
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer,
        patch_size=8, vision_feature_select_strategy="default", chat_template=CHAT.replace("IMAGE", "<image>"),
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT, **size), vision_config=CLIPVisionConfig(**VISION),
        image_token_id=index("<image>"), image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration, config, processor


def idefics3():
    """SmolVLM's architecture."""
    tiles = [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]
    tokenizer, size, index = make_tokenizer(special)
    edge = {"longest_edge": 16}
    processor = Idefics3Processor(
        Idefics3ImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False), tokenizer,
        image_seq_len=1, chat_template=CHAT.replace("IMAGE", "<image>"),
    )  # fmt: skip
    config = Idefics3Config(
        text_config=dict(model_type="llama", **TEXT, **size), vision_config=VISION, image_token_id=index("<image>"),
        scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    return Idefics3ForConditionalGeneration, config, processor


def qwen2_vl():
    special = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    marks = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    tokenizer, size, index = make_tokenizer([*special.values(), *marks.values()])
    tokenizer.image_token, tokenizer.video_token = special.values()
    shown = CHAT.replace("IMAGE", "".join((marks["vision_start"], special["image"], marks["vision_end"])))
    patches = dict(patch_size=4, merge_size=2)
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(min_pixels=256, max_pixels=1024, **patches), tokenizer,
        video_processor=Qwen2VLVideoProcessor(**patches), chat_template=shown,
    )  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = dict(depth=2, embed_dim=16, hidden_size=16, num_heads=2, patch_size=4, spatial_merge_size=2, mlp_ratio=2)
    config = Qwen2VLConfig(
        text_config=dict(TEXT, **size, rope_parameters=rope), vision_config=vision,
        **{f"{name}_token_id": index(word) for name, word in (special | marks).items()},
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration, config, processor


def rows(n=16):
    draw, pixels = random.Random(0), np.random.default_rng(0)

    def turn(role, *parts):
        return {"role": role, "content": [*parts, {"type": "text", "text": " ".join(draw.choices(WORDS, k=3))}]}

    image = {"type": "image", "text": None}
    return Dataset.from_list(
        [
            {
                "images": [Image.fromarray(pixels.integers(0, 255, (16, 16, 3)).astype(np.uint8))],
                "messages": [turn("user", image), turn("assistant")],
            }
            for _ in range(n)
        ]
    )


class LookbehindSFTTrainer(LookbehindMixin, SFTTrainer):
    pass


def train(folder, build, config, before=lambda trainer: None, **kwargs):
    model_class, model_config, processor = build()
    set_seed(0)
    args = SFTConfig(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, logging_steps=1,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", learning_rate=1e-2, bf16=False,
        max_length=None, gradient_checkpointing=False,
    )  # fmt: skip
    kwargs |= dict(model=model_class(model_config), args=args, train_dataset=rows(), processing_class=processor)
    if config is None:
        trainer = SFTTrainer(**kwargs)
    else:
        trainer = LookbehindSFTTrainer(**kwargs, lookbehind_config=LookbehindConfig(**config))
    before(trainer)
    trainer.train()
    return trainer


def slow(build, *marks):
    return pytest.param(build, marks=[pytest.mark.slow, *marks], id=build.__name__)


without_videos = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="its processor of videos wants torchvision"
)


@pytest.mark.parametrize("build", [pytest.param(llava, id="llava"), slow(idefics3), slow(qwen2_vl, without_videos)])
@pytest.mark.parametrize("peft", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_neutral_settings_are_trls_own(tmp_path, build, peft):
    adapters = dict(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)) if peft else {}
    plain, ours = (train(tmp_path, build, config, **adapters) for config in (None, NEUTRAL))
    assert max_difference(plain.model, ours.model) == 0.0
    assert logs_of(plain) == logs_of(ours)
    climbed = train(tmp_path, build, dict(k=2, rho=0.05), **adapters)
    assert all(log["sharpness"] > 0 for log in climbed.state.log_history if "sharpness" in log)


def test_the_language_part_alone_is_perturbed(tmp_path):
    perturbed = set()

    class Look(TrainerCallback):
        def at(self, trainer):
            self.trainer = trainer

        def on_step_end(self, args, state, control, model, **kwargs):
            targets = {id(target) for target in self.trainer._lookbehind.targets}
            perturbed.update(n for n, p in model.named_parameters() if id(p) in targets)

    look = Look()
    config = dict(k=1, rho=0.05, target_parameters=[r"language_model|lm_head"])
    trainer = train(
        tmp_path, llava, config, callbacks=[look], before=lambda trainer: setattr(look, "trainer", trainer)
    )
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert perturbed == {n for n in trained if "language_model" in n or "lm_head" in n}
    assert any("vision_tower" in n for n in trained - perturbed)
