"""What the files of a model are called, and those that a training leaves beside it."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from ..config import CONFIG_NAME as LOOKBEHIND_CONFIG

CARD_NAME = "README.md"
CONFIG_NAME, ADAPTER_CONFIG_NAME = "config.json", "adapter_config.json"
WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME = "model.safetensors", "adapter_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
SHARDS = "model-*-of-*.safetensors"
MODULES_NAME, ROUTER_NAME = "modules.json", "router_config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

WEIGHTS = (WEIGHTS_NAME, INDEX_NAME, SHARDS)
ADAPTER = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)
# `vocab_files_names` of every tokenizer of transformers (a test holds it), and of mistral-common
VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v*", "tekken.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "spm.model", "spm_char.model", "sentencepiece.model", "sentencepiece.bpe.model", "source.spm",
    "target.spm", "target_vocab.json", "vocab-src.json", "vocab-tgt.json", "bpe.codes", "dict.txt", "byte_maps.json",
    "emoji.json", "entity_vocab.json", "normalizer.json", "prophetnet.tokenizer", "word_shape.json",
    "word_pronunciation.json",
)  # fmt: skip
# Tokenizers of bytes and characters.
WITHOUT_VOCABULARY = ("ByT5Tokenizer", "CanineTokenizer", "DiaTokenizer", "PerceiverTokenizer")
TOKENIZER = (
    *VOCABULARIES, TOKENIZER_CONFIG_NAME, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
PROCESSOR = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    # a second tokenizer of a processor has a folder of its own
    *(f"*_tokenizer/{name}" for name in TOKENIZER),
    # the language model of wav2vec2's decoder, the voices of Bark
    "alphabet.json", "language_model/attrs.json", "language_model/unigrams.txt", "language_model/*.arpa",
    "speaker_embeddings_path.json", "speaker_embeddings/*.npy", "speaker_embeddings/v2/*.npy",
)  # fmt: skip
# What sentence-transformers keeps at the root of a model; its other modules have folders, which `modules.json` names.
SENTENCE_TRANSFORMERS = (
    MODULES_NAME, ROUTER_NAME, "config_sentence_transformers.json", "sentence_*_config.json",
    "wordembedding_config.json", "whitespacetokenizer_config.json", "phrasetokenizer_config.json",
)  # fmt: skip
RESULTS = (
    LOOKBEHIND_CONFIG, CARD_NAME, "*_results.json", "accuracy_matrix.json", "rho_search.json", "flatness.json",
    "*.png", "figures/*.png", "LICENSE", "LICENSE.*", "NOTICE", "NOTICE.*",
)  # fmt: skip
# Shards are those that the index names.
SHARED = (
    WEIGHTS_NAME, INDEX_NAME, CONFIG_NAME, "generation_config.json", *ADAPTER, "adapter.*.safetensors", *TOKENIZER,
    *PROCESSOR, *SENTENCE_TRANSFORMERS, *RESULTS,
)  # fmt: skip

# What a training, or a tool beside it, leaves for itself, at any depth: never uploaded, and not worth a word.
PRIVATE = (
    ".*", "checkpoint-*", "training_args.bin", "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*",
    "trainer_state.json", "training_record.json", "run_status.json", "card.json", "flatness.csv", "README.backup*.md",
    # of streams of tasks
    "task-*", "stream.json", "baseline.json", "memory.safetensors",
    # of DeepSpeed and FSDP
    "global_step*", "latest", "zero_to_fp32.py", "pytorch_model_fsdp*",
    # of loggers and Python
    "runs", "wandb", "mlruns", "events.out.*", "*.log", "__pycache__",
)  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")
IMAGES = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp")


def is_one_of(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name in a folder is as one of the patterns says, part by part; `**` at the end is all below.

    Example:
        >>> is_one_of("figures/a.png", ["*.png"]), is_one_of("1_Dense/a/b.json", ["1_Dense/**"])
        (False, True)
    """
    parts = name.split("/")
    return any(_is_as(parts, pattern.split("/")) for pattern in patterns)


def may_hold_one_of(folder: str, patterns: Iterable[str]) -> bool:
    """Whether a folder is on the way to what one of the patterns says."""
    depth, patterns = folder.count("/") + 1, list(patterns)
    ways = ["/".join(pattern.split("/")[:depth]) for pattern in patterns if pattern.count("/") >= depth]
    return is_one_of(folder, [*ways, *(pattern for pattern in patterns if pattern.endswith("/**"))])


def is_private(name: str) -> bool:
    """Whether a file, or a folder on the way to it, is none to be shared."""
    return any(fnmatchcase(part, pattern) for part in name.split("/") for pattern in PRIVATE)


def _is_as(parts: list[str], wanted: list[str]) -> bool:
    if wanted[-1] == "**":
        parts, wanted = parts[: len(wanted) - 1], wanted[:-1]
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
