"""Cards and pushes of the trainers of other libraries, under the mixin."""

import pytest
from huggingface_hub import ModelCard

from hf_lookbehind import InputError
from tests.libraries import make_library_trainer


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sft", "sft-lora", "reward", "sentence", "cross-encoder"])
def test_the_cards_of_other_libraries_get_the_section_too(hub, tmp_path, case):
    trainer = make_library_trainer(case, tmp_path, dict(k=2), max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.create_model_card()
    out = tmp_path / "out"
    card = ModelCard.load(out / "README.md")
    assert card.text.count("## How it was trained") == 1 and "lookbehind" in card.data.tags
    assert str(tmp_path) not in card.content
    if case == "sft-lora":
        with pytest.raises(InputError, match="adapters need a base model on the Hub"):
            trainer.push_to_hub()
    else:
        trainer.push_to_hub()
        pushed = {name for name in hub.repos["user/out"].files if name.endswith((".safetensors", ".json"))}
        own = {"lookbehind_config.json"}
        saved = {str(path.relative_to(out)) for path in out.rglob("*") if "checkpoint-" not in str(path)}
        assert {n for n in saved if n.endswith((".safetensors", ".json"))} | own == pushed
