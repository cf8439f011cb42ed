"""`LookbehindConfig`: the settings of the method, validated when they are made. Standard library only."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeGuard

CONFIG_NAME = "lookbehind_config.json"
# Beside the settings in that file: what rho="auto" has found.
CALIBRATION = "calibration"


class AscentRow(NamedTuple):
    """What is known of a rule of perturbation, as plain data; `optim/ascent.py` has its formula.

    Attributes:
        title: as the literature calls it.
        rho: the default, for fine-tuning: the papers train from scratch, with 0.05 and more.
        radii: to search among, a factor of two or so apart.
        citation: BibTeX.
        has_eta: its T has the constant eta in it.
    """

    title: str
    rho: float
    radii: tuple[float, ...]
    citation: str
    has_eta: bool = True


ASCENTS = {
    "sam": AscentRow(
        "SAM",
        0.02,
        (0.005, 0.01, 0.02, 0.05, 0.1),
        """@inproceedings{foret2021sharpness,
  title={Sharpness-aware Minimization for Efficiently Improving Generalization},
  author={Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam},
  booktitle={International Conference on Learning Representations},
  year={2021},
  url={https://arxiv.org/abs/2010.01412}
}""",
        has_eta=False,
    ),
    "asam": AscentRow(
        "ASAM",
        0.5,
        (0.1, 0.25, 0.5, 1.0, 2.0),
        """@inproceedings{kwon2021asam,
  title={{ASAM}: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks},
  author={Kwon, Jungmin and Kim, Jeongseop and Park, Hyunseo and Choi, In Kwon},
  booktitle={International Conference on Machine Learning},
  year={2021},
  url={https://arxiv.org/abs/2102.11600}
}""",
    ),
    "fisher": AscentRow(
        "Fisher SAM",
        0.02,
        (0.005, 0.01, 0.02, 0.05, 0.1),
        """@inproceedings{kim2022fisher,
  title={{Fisher SAM}: Information Geometry and Sharpness Aware Minimisation},
  author={Kim, Minyoung and Li, Da and Hu, Shell X. and Hospedales, Timothy M.},
  booktitle={International Conference on Machine Learning},
  year={2022},
  url={https://arxiv.org/abs/2206.04920}
}""",
    ),
}
DESCENTS = ("every", "last")
ADAPTIVE_ALPHAS = ("adaptive", "adaptive-global")


class InputError(ValueError):
    """What a user gave cannot be used; the message names the argument, its value and what is allowed.

    The programs of `scripts/` end with exit code 2 on it.
    """


def _refuse(name: str, value: Any, allowed: str) -> NoReturn:
    raise InputError(f"{name}={value!r} is not allowed: {allowed}")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


class MatchedSAM(NamedTuple):
    """What `LookbehindConfig.matched_sam` gives.

    Attributes:
        config: the settings, with k=1.
        learning_rate: what the learning rate is to be multiplied by.
        betas: the power that the betas of the optimizer, or its momentum, are to be raised to.
    """

    config: "LookbehindConfig"
    learning_rate: float
    betas: int


class LookbehindWarning(UserWarning):
    """Settings that run, and probably do not do what was meant."""


@dataclass(frozen=True)
class LookbehindConfig:
    """Settings of one Lookbehind iteration (Mordido et al., ICML 2024, arXiv 2307.16704, Algorithm 1).

    `None` is stored as it is, and `resolved` gives the value that it stands for: `replace(config, k=5)` then does not
    keep the alpha of another k. Every field is validated, also at `k=0`, where all fields but `k` are ignored.

    The family of methods is a table of settings:

    | method | k | descent | alpha |
    |---|---|---|---|
    | base optimizer | 0 | | |
    | SAM, ASAM | 1 | "every" | 1 |
    | multistep SAM, ASAM | k | "last" | 1 |
    | Lookbehind-SAM, -ASAM | k | "every" | in (0, 1], "adaptive" or "adaptive-global" |

    Raises:
        InputError: a `ValueError` that names the field, its value and what is allowed.

    Example:
        >>> LookbehindConfig(k=5).resolved().alpha
        0.2
        >>> LookbehindConfig(k=-1)
        Traceback (most recent call last):
        ...
        hf_lookbehind.config.InputError: k=-1 is not allowed: a whole number of ascent steps, 0 or more
    """

    k: int = field(
        default=2,
        metadata={
            "help": "Ascent steps per iteration; k+1 gradients are computed. 0: off. For small radii k > 1 is nearly "
            "SAM of radius (k+1) rho / 2, at 2 gradients: --method matched."
        },
    )
    rho: float | str | None = field(
        default=None,
        metadata={
            "help": "L2 length of one ascent step, over all perturbed parameters together, or 'auto': chosen in the "
            "first 10 iterations from losses and gradient norms, for fine-tuning. Default: "
            + ", ".join(f"{ascent.rho} ({name})" for name, ascent in ASCENTS.items())
            + "."
        },
    )
    rho_scale: float = field(
        default=0.03,
        metadata={"help": "For rho='auto': by which fraction of itself, over sqrt(k), a step lifts the loss."},
    )
    alpha: float | str | None = field(
        default=None,
        metadata={
            "help": "Fraction in (0, 1] that the slow weights move towards the fast ones, or 'adaptive' (one per "
            "tensor) or 'adaptive-global'. A number is a factor of the learning rate: tune that, and leave alpha at "
            "its default. Default: 1/k (1 for --descent last)."
        },
    )
    ascent: str = field(
        default="sam", metadata={"help": f"Rule of the perturbation: {' or '.join(map(repr, ASCENTS))}."}
    )
    eta: float = field(
        default=0.01,
        metadata={"help": "Constant in the rule's T, 0 or more. asam: |w| + eta; fisher: 1 / sqrt(1 + eta g^2)."},
    )
    descent: str = field(
        default="every",
        metadata={"help": "'every': each ascent point drives a descent step; 'last': only the k-th (multistep SAM)."},
    )
    target_parameters: str | Sequence[str] | None = field(
        default=None,
        metadata={
            "help": "Regular expression(s), searched in parameter names: which trainable parameters are perturbed. "
            "All of them still descend. Default: all."
        },
    )
    sync_ascent: bool = field(
        default=True,
        metadata={"help": "Climb the gradient of the global batch; False: each process climbs its own (m-sharpness)."},
    )
    ascent_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Fraction in (0, 1] of the window's examples (of its micro-batches under accumulation) that gives "
            "the first ascent gradient. Below 1 it is cheaper, and another, noisier method; 1/4 with k=1 is a start."
        },
    )
    ascent_every: int = field(
        default=1,
        metadata={"help": "Run the full iteration every n-th step, and plain steps of the base optimizer between."},
    )
    offload_buffers: bool = field(
        default=False,
        metadata={"help": "Keep the slow weights in CPU memory while the fast ones train: one copy less on the GPU."},
    )

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choices()
        self._check_target_parameters()

    def _check_numbers(self) -> None:
        if not isinstance(self.k, Integral) or isinstance(self.k, bool) or self.k < 0:
            _refuse("k", self.k, "a whole number of ascent steps, 0 or more")
        if self.rho is not None and self.rho != "auto" and not (_is_number(self.rho) and self.rho >= 0):
            _refuse("rho", self.rho, "a finite number, 0 or more, 'auto', or None for the default of the ascent")
        if not (_is_number(self.rho_scale) and self.rho_scale > 0):
            _refuse("rho_scale", self.rho_scale, "a finite number above 0")
        if self.alpha is not None and self.alpha not in ADAPTIVE_ALPHAS:
            if not (_is_number(self.alpha) and 0 < self.alpha <= 1):
                _refuse("alpha", self.alpha, "a number in (0, 1], 'adaptive', 'adaptive-global', or None for 1/k")
        if not (_is_number(self.eta) and self.eta >= 0):
            _refuse("eta", self.eta, "a finite number, 0 or more")
        if not (_is_number(self.ascent_fraction) and 0 < self.ascent_fraction <= 1):
            _refuse("ascent_fraction", self.ascent_fraction, "a number in (0, 1]")
        if not isinstance(self.ascent_every, Integral) or isinstance(self.ascent_every, bool) or self.ascent_every < 1:
            _refuse("ascent_every", self.ascent_every, "a whole number, 1 or more")
        # numpy's numbers pass the checks above and would not pass json
        object.__setattr__(self, "k", int(self.k))
        object.__setattr__(self, "ascent_every", int(self.ascent_every))
        for name in ("rho", "rho_scale", "alpha", "eta", "ascent_fraction"):
            if _is_number(getattr(self, name)):
                object.__setattr__(self, name, float(getattr(self, name)))

    def _check_choices(self) -> None:
        if self.ascent not in ASCENTS:
            _refuse("ascent", self.ascent, "one of " + ", ".join(map(repr, ASCENTS)))
        if self.descent not in DESCENTS:
            _refuse("descent", self.descent, "one of " + ", ".join(repr(name) for name in DESCENTS))
        if self.descent == "last" and self.alpha not in (None, 1):
            _refuse("alpha", self.alpha, "descent='last' takes one descent step, with alpha=1 (or None)")
        for name in ("sync_ascent", "offload_buffers"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "True or False")

    def _check_target_parameters(self) -> None:
        if self.target_parameters is None:
            return
        given = self.target_parameters
        patterns = (given,) if isinstance(given, str) else given
        if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(p, str) and p for p in patterns):
            _refuse("target_parameters", given, "a regular expression, a list of them, or None for all parameters")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                _refuse("target_parameters", pattern, f"it is not a regular expression ({error})")
        # a tuple, so that the frozen config stays hashable
        object.__setattr__(self, "target_parameters", tuple(patterns))

    def resolved(self) -> "LookbehindConfig":
        """The same settings with every None default replaced by its value."""
        alpha = self.alpha
        if self.k == 0:
            alpha = 1.0  # ignored: there is one step, on g_0
        elif self.k == 1 and alpha in ADAPTIVE_ALPHAS:
            alpha = 1.0  # phi_1 is phi_k: the two displacements coincide
        elif alpha is None:
            # With 1/k the weights move about as far per iteration as under the base optimizer: its lr stays valid.
            alpha = 1.0 if self.descent == "last" else 1 / self.k
        return replace(self, rho=ASCENTS[self.ascent].rho if self.rho is None else self.rho, alpha=alpha)

    def gradient_passes(self, steps: int) -> float:
        """Gradients of the whole window that so many optimizer steps take: the cost, in forwards and backwards.

        k+1 per iteration, k + f with `ascent_fraction=f`; one per plain step between those of `ascent_every`.

        Example:
            >>> LookbehindConfig(k=5).gradient_passes(10), LookbehindConfig(k=1, ascent_every=4).gradient_passes(10)
            (60, 13)
        """
        if self.k == 0:
            return steps
        full = math.ceil(steps / self.ascent_every)
        passes = full * (self.k + self.ascent_fraction) + (steps - full)
        return int(passes) if passes == int(passes) else passes

    def matched_sam(self) -> MatchedSAM:
        """SAM at two gradients an iteration that makes, to first order in rho, the updates of this method at k+1.

        The ascent points lie at rho, 2 rho, ..., k rho, to first order along one direction, so that the mean of their
        gradients is that at (k+1) rho / 2; k descents with it, of which alpha is kept, are one with k alpha times the
        learning rate. What an optimizer's state forgets in k descents it has to forget in one: betas to the power k.
        With `descent="last"` the gradient is that at k rho, and the descent is one.

        The difference of an update falls with rho squared: with SGD on the small network of
        `tests/optim/test_matched.py` 0.03% (k=2) and 0.2% (k=5) at rho 0.005, 0.4% and 2.7% at 0.02. Where it is large
        the methods differ; that is where Lookbehind has to earn its gradients. All other settings are kept.

        Returns:
            The config, with k=1, the radius above and alpha=1; the factor of the learning rate; the power of the
            betas. An optimizer that sums its momentum, as torch's SGD, also wants (1 - mu^k) / (1 - mu) times the
            learning rate for its momentum mu^k; `--method matched` of the programs does all of that.

        Raises:
            InputError: k=0; an alpha that depends on the gradients, or a rho that does; plain steps between
                (`ascent_every`), whose learning rate would have to stay.

        Example:
            >>> config, learning_rate, betas = LookbehindConfig(k=5, rho=0.02, alpha=0.5).matched_sam()
            >>> config.k, config.rho, config.alpha, learning_rate, betas
            (1, 0.06, 1.0, 2.5, 5)
        """
        given = self.resolved()
        alpha, rho = given.alpha, given.rho
        if given.k == 0:
            _refuse("k", self.k, "1 or more ascent steps, for SAM to match")
        if not _is_number(alpha):
            _refuse("alpha", self.alpha, "a number, for SAM to match: an adaptive one is another in each iteration")
        if not _is_number(rho):
            _refuse("rho", self.rho, "a number, for SAM to match")
        if given.ascent_every > 1:
            _refuse("ascent_every", self.ascent_every, "1, for SAM to match")
        radii, descents = ((given.k + 1) / 2, given.k) if given.descent == "every" else (given.k, 1)
        return MatchedSAM(replace(given, k=1, rho=radii * rho, alpha=1.0, descent="every"), descents * alpha, descents)

    def differences(self, other: "LookbehindConfig") -> list[str]:
        """Names of the fields in which two configs, resolved, differ."""
        mine, theirs = self.resolved(), other.resolved()
        return [f.name for f in fields(self) if getattr(mine, f.name) != getattr(theirs, f.name)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as given (None kept): what `to_json` writes."""
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LookbehindConfig":
        """Raises `InputError` naming every key that is not a field."""
        values = {name: value for name, value in values.items() if name != CALIBRATION}
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"unknown settings {', '.join(map(repr, unknown))}: allowed: {', '.join(sorted(known))}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> "LookbehindConfig":
        """Raises `InputError` for what is not one JSON object with the names of fields."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"the settings are not JSON: {error}") from error
        if not isinstance(values, dict):
            raise InputError(f"the settings must be one JSON object, not {type(values).__name__}")
        return cls.from_dict(values)

    def save(self, directory: str | Path, calibration: Mapping[str, float] | None = None) -> Path:
        """Write `lookbehind_config.json` into an existing directory and return its path.

        Args:
            directory: a checkpoint's, or a model's.
            calibration: what `rho="auto"` has found so far, kept beside the settings under this name.
        """
        path = Path(directory) / CONFIG_NAME
        content = self.to_dict() | ({CALIBRATION: dict(calibration)} if calibration else {})
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, directory: str | Path) -> "LookbehindConfig":
        """Read `lookbehind_config.json` from a directory; `FileNotFoundError` where there is none."""
        return cls.from_json((Path(directory) / CONFIG_NAME).read_text(encoding="utf-8"))


def load_calibration(directory: str | Path) -> dict[str, float] | None:
    """What `rho="auto"` had found when the settings in a directory were saved, if anything and if they were."""
    path = Path(directory) / CONFIG_NAME
    return json.loads(path.read_text(encoding="utf-8")).get(CALIBRATION) if path.is_file() else None
