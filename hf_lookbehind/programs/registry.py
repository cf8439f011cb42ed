"""The programs by name: what `hf-lookbehind` lists, and which of them trains the models of a class.

Stdlib only, and so not in the programs themselves: a wrong name must not wait for torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A program.

    Attributes:
        module: in `scripts/`; its `main(argv)` is called, and the `PROGRAM` of one that trains is there.
        what: it does, in a line.
        heads: what the names of the classes of the models end with that it trains, unless another program does first.
        trains: whether it makes a model of data.
    """

    module: str
    what: str
    heads: tuple[str, ...] = ()
    trains: bool = True


PROGRAMS = {
    "image-classification": Entry(
        "run_image_classification", "fine-tune an image classifier", heads=("ForImageClassification",)
    ),
    "text-classification": Entry(
        "run_text_classification",
        "fine-tune a classifier of texts or of pairs of texts, or a regression",
        heads=("ForSequenceClassification",),
    ),
    "token-classification": Entry(
        "run_token_classification",
        "fine-tune a tagger of words: named entities, parts of speech",
        heads=("ForTokenClassification",),
    ),
    "masked-lm": Entry(
        "run_masked_lm", "go on with the pretraining of an encoder, or train a new one", heads=("ForMaskedLM",)
    ),
    "clm": Entry(
        "run_clm", "fine-tune a causal language model, or train a new one", heads=("LMHeadModel", "ForCausalLM")
    ),
    "sft": Entry("run_sft", "fine-tune a language model on conversations or completions, with TRL"),
    "seq2seq": Entry(
        "run_seq2seq",
        "fine-tune an encoder-decoder model: summaries, translations, any texts to texts",
        heads=("ForConditionalGeneration", "MTModel"),  # the latter is Marian's
    ),
    "lifelong": Entry("run_lifelong", "train an image classifier on a stream of tasks, and measure what it forgets"),
    "lifelong-text": Entry("run_lifelong_text", "the same with a classifier of texts"),
    "flatness": Entry(
        "evaluate_flatness",
        "measure sharpness, and robustness to noisy or compressed weights, of trained models",
        trains=False,
    ),
    "compare": Entry(
        "compare_methods", "train with several methods on your data, and say which is worth its cost", trains=False
    ),
    "memory": Entry("estimate_memory", "say how much memory a training takes on each device", trains=False),
    "recipes": Entry("show_recipes", "list the files of settings that come with the programs", trains=False),
    "completion": Entry("print_completion", "print what a shell completes of this command", trains=False),
    "push": Entry("push", "push a trained model to the Hub", trains=False),
}


def program_of(class_name: str) -> str | None:
    """The program that trains models of a class; None where none does."""
    for name, entry in PROGRAMS.items():
        if class_name.endswith(entry.heads):
            return name
    return None


def module_name(program: str) -> str:
    """The module of a program, whose `main(argv)` is called."""
    return f"hf_lookbehind.scripts.{PROGRAMS[program].module}"
