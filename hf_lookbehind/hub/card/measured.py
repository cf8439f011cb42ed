"""`flatness.json`: what was measured of a model's flatness, in the model's folder and in its card."""

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...config import LookbehindWarning
from ...report import format_number, format_plus_minus, format_table
from ..file_names import ADAPTER_WEIGHTS_NAME, SHARDS, WEIGHTS_NAME

FLATNESS_NAME = "flatness.json"
# What is text in a record, whatever it says.
TEXTS = ("model", "metric", "split", "flags")
# of `measures.sharpness`, in words
KINDS = {
    "worst": "worst case, {steps} ascent steps",
    "average": "mean of {steps} draws",
    "one_step": "one ascent step on each batch",
}


def write_flatness(
    folder: str | Path,
    records: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    figures: Mapping[str, str] | None = None,
) -> Path:
    """Write `flatness.json` into an existing folder.

    In the folder of a model it also says of which weights it speaks: those of a later training have another digest.

    Args:
        folder: of the model, or of several models' results.
        records: of a model each: `metric`, `value`, `examples`, `split`, and what was measured: `weight_noise`
            and `compression` (records of the `measures` of that name), `sharpness` (records of `rho` and `rise` of the
            loss), `hessian_eigenvalues`; and `not_measured`, the reason by the name of what could not be.
        settings: how: `noise_kind`, `draws`, `sharpness_kind`, `sharpness_steps`, `adaptive`, `max_examples`.
        figures: alternative text by path in the folder. Default: none.
    """
    content = {"settings": dict(settings), "models": list(records), "figures": dict(figures or {})}
    digest = weights_digest(folder)
    path = Path(folder) / FLATNESS_NAME
    text = json.dumps(json_values(content | ({"weights": digest} if digest else {})), indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read_flatness(folder: str | Path) -> dict[str, Any]:
    """What `flatness.json` in a folder says of the model there: nothing where there is none, or one of other weights.

    One that cannot be read is warned of.
    """
    path = Path(folder) / FLATNESS_NAME
    if not path.is_file():
        return {}
    try:
        content = _from_json(json.loads(path.read_text(encoding="utf-8")))
        is_of_one, digest = len(content["models"]) == 1, content.get("weights")
    except (ValueError, LookupError, TypeError) as error:
        problem = f"{path} cannot be read ({type(error).__name__}): the card says that nothing was measured"
        warnings.warn(problem, LookbehindWarning, stacklevel=2)
        return {}
    return content if is_of_one and weights_digest(folder) in (None, digest) else {}


def weights_digest(folder: str | Path) -> str | None:
    """SHA-256 of the weights of the model or adapters in a folder; None where it holds none."""
    digest = hashlib.sha256()
    names = sorted(path.name for path in Path(folder).iterdir() if _are_weights(path.name))
    for name in names:
        with (Path(folder) / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if names else None


def flatness_table(content: Mapping[str, Any]) -> str:
    """A row per number, or "" where nothing was measured."""
    rows = []
    for record in content.get("models", ()):
        rows += [
            {"measure": f"rise of the loss within rho {point['rho']:g}", "value": f"{point['rise']:.4g}"}
            for point in record.get("sharpness", ())
        ]
        rows += [
            {"measure": f"eigenvalue {i} of the Hessian", "value": f"{value:.4g}"}
            for i, value in enumerate(record.get("hessian_eigenvalues", ()), 1)
        ]
        rows += [
            {
                "measure": f"{record['metric']} under weight noise {noise['sigma']:g}",
                "value": format_plus_minus(noise["mean"], noise["sd"], digits=3),
            }
            for noise in record.get("weight_noise", ())
            if noise["sigma"]
        ]
        rows += [
            {"measure": f"{record['metric']} with {_in_words(made['form'])}", "value": format_number(made["value"], 3)}
            for made in record.get("compression", ())
        ]
    return format_table(rows) if rows else ""


def how_measured(content: Mapping[str, Any]) -> list[str]:
    """Sentences: on what, how, and what was not."""
    settings = content.get("settings", {})
    record = next(iter(content.get("models", ())), {})
    said = []
    if record:
        said.append(
            f"On {record['examples']} examples (`{record['split']}`): without noise the {record['metric']} is "
            f"{format_number(record['value'], 3)}."
        )
    if "weight_noise" in record:
        said.append(f"Weight noise: {settings['noise_kind']}, mean +- sd over {settings['draws']} draws.")
    if "compression" in record:
        said.append(
            "Compression: the weights of linear and convolution layers are rounded to nearest, or the smallest of "
            "each tensor pruned, without calibration or further training."
        )
    if "sharpness" in record:
        kind = KINDS[settings["sharpness_kind"]].format(steps=settings["sharpness_steps"])
        scaled = ", scaled by the weights" if settings["adaptive"] else ""
        examples = min(settings["max_examples"], record["examples"])
        said.append(f"Sharpness: the rise of the loss within a radius rho ({kind}{scaled}; {examples} examples).")
    names = {"sharpness": "sharpness", "weight_noise": "robustness to noisy weights"}
    failed = record.get("not_measured", {})
    said += [f"{name.replace('_', ' ').capitalize()}: not measured ({why})." for name, why in failed.items()]
    missing = [words for name, words in names.items() if name not in record and name not in failed]
    if missing:
        said.append(f"{' and '.join(missing).capitalize()}: not measured; see `hf-lookbehind flatness`.")
    return said


def _in_words(form: str) -> str:
    """
    >>> _in_words("int4"), _in_words("int4:tensor"), _in_words("prune:0.7")
    ('int4 weights', 'int4 weights of one scale per tensor', '70% of the weights pruned')
    """
    kind, _, detail = form.partition(":")
    if kind == "prune":
        return f"{100 * float(detail):g}% of the weights pruned"
    return f"{kind} weights{f' of one scale per {detail}' if detail else ''}"


def _are_weights(name: str) -> bool:
    return name in (WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME) or fnmatchcase(name, SHARDS)


def json_values(value: Any) -> Any:
    """JSON has no infinity and no nan: they become the words that `float` reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: json_values(inner) for name, inner in value.items()}
    return [json_values(inner) for inner in value] if isinstance(value, list | tuple) else value


def _from_json(value: Any, name: str = "") -> Any:
    """A model may be called nan."""
    if isinstance(value, dict):
        return {name: _from_json(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_from_json(inner, name) for inner in value]
    return float(value) if value in ("inf", "-inf", "nan") and name not in TEXTS else value
