"""What a training holds on each device, in copies of the parameters: a formula. Nothing is loaded or run."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..config import ADAPTIVE_ALPHAS, InputError, LookbehindConfig

# "ddp" with one process is no engine at all.
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
# Bytes of a number.
WIDTHS = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
HALF, SINGLE = 2, 4
# By optimizer, the numbers that it keeps of each parameter.
OPTIMIZERS = {"adamw": 2, "momentum": 1, "sgd": 0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Sizes:
    """How large a model is.

    Attributes:
        name: to be shown.
        shapes: of each parameter, the length of its first dimension, and how many numbers lie under each index of it.
        buffers: bytes of all module buffers, which each process holds whole.
    """

    name: str
    shapes: Sequence[tuple[int, int]]
    buffers: int = 0

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return sum(rows * row for rows, row in self.shapes)

    def part(self, engine: str, processes: int) -> int:
        """How many of them the process has that holds the most, where they are divided."""
        if engine == "fsdp2":  # by rows
            return sum(math.ceil(rows / processes) * row for rows, row in self.shapes)
        if engine == "zero3":
            return sum(math.ceil(rows * row / processes) for rows, row in self.shapes)
        return math.ceil(self.parameters / processes)


def size_of(name: str) -> Sizes | None:
    """A number of parameters such as 7B, 350M or 124439808; None for what is none.

    Raises:
        InputError: it is less than one.

    Example:
        >>> size_of("0.35B").parameters, size_of("user/model-7B")
        (350000000, None)
    """
    found = _SIZE.fullmatch(name)
    if found is None:
        return None
    number = round(float(found[1]) * _UNITS[found[2].upper()])
    if number < 1:
        raise InputError(f"MODEL_OR_SIZE {name!r} is not allowed: one parameter or more")
    return Sizes(name, [(number, 1)])


@dataclass(frozen=True)
class Setup:
    """How a training is run, as far as its memory depends on it.

    Raises:
        InputError: names the flag, its value and what is allowed.
    """

    processes: int = field(default=1, metadata={"help": "Devices in all, each with a process of its own."})
    dtype: str = field(
        default="float32", metadata={"help": "Precision that the model is loaded in.", "choices": [*WIDTHS]}
    )
    mixed_precision: str = field(
        default="no",
        metadata={
            "help": "--bf16 or --fp16 of the Trainer: autocast (one process, ddp), half-precision passes over float32 "
            "weights (fsdp2), or half-precision weights beside float32 masters (zero1, zero2, zero3).",
            "choices": ["no", "bf16", "fp16"],
        },
    )
    optimizer: str = field(
        default="adamw",
        metadata={"help": "The base optimizer: 'adamw', 'momentum' (SGD with it), 'sgd'.", "choices": [*OPTIMIZERS]},
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={
            "help": "Micro-batches of a step. With several fsdp2 adds up whole gradients, zero2 its own, twice."
        },
    )
    trainable_share: float = field(
        default=1.0, metadata={"help": "Share of the parameters that is trained; the rest is frozen (LoRA: 0.01)."}
    )

    def __post_init__(self) -> None:
        for name in ("processes", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} is not allowed: 1 or more")
        if not 0 < self.trainable_share <= 1:
            raise InputError(f"--trainable_share {self.trainable_share} is not allowed: a number in (0, 1]")


@dataclass(frozen=True)
class Held:
    """A kind of tensors that there are numbers in for each trained parameter.

    Attributes:
        name: weights, gradients, masters, optimizer, slow, fast or first; or frozen, the weights that are not trained.
        width: bytes for each parameter.
        is_whole: each process holds all of it; else its part.
        on_cpu: in CPU memory.
    """

    name: str
    width: int
    is_whole: bool
    on_cpu: bool = False


def copies_of(config: LookbehindConfig) -> list[str]:
    """The copies of the trained weights that an iteration makes, and keeps for the next one.

    Example:
        >>> copies_of(LookbehindConfig(k=1)), copies_of(LookbehindConfig(k=2, alpha="adaptive"))
        (['slow'], ['slow', 'fast'])
    """
    settings = config.resolved()
    if settings.k == 0:
        return []
    has_fast = settings.k > 1 and settings.descent == "every"
    # at k=2 the fast weights are still those after the first descent, when the iteration ends with the second
    has_first = has_fast and settings.k > 2 and settings.alpha in ADAPTIVE_ALPHAS
    return ["slow", *["fast"] * has_fast, *["first"] * has_first]


@dataclass(frozen=True)
class Footprint:
    """What each process holds when a backward has ended, which is when all of it is there.

    Beside it come activations, buffers of communication, the layers that a pass gathers from other processes, and what
    a step of the optimizer makes for a moment.

    Args:
        engine: one of `ENGINES`.
        setup: how it is run.
        config: the method.

    Raises:
        InputError: the engine refuses the setup.

    Example:
        >>> adamw = Footprint("ddp", Setup(), LookbehindConfig(k=0))
        >>> adamw.formula, adamw.on_device(Sizes("7B", [(7_000_000_000, 1)]))
        ('16', 112000000000)
        >>> Footprint("zero2", Setup(processes=8, mixed_precision="bf16"), LookbehindConfig(k=1)).formula
        '2 + 22/8'
    """

    engine: str
    setup: Setup
    config: LookbehindConfig

    def __post_init__(self) -> None:
        if self.engine != "ddp" and not self.config.sync_ascent:
            raise InputError(f"--sync_ascent False is not supported by --engine {self.engine}: give --engine ddp")
        if self._is_zero and self.setup.mixed_precision == "no" and self.setup.dtype != "float32":
            raise InputError(
                f"--dtype {self.setup.dtype} under --engine {self.engine} needs --mixed_precision bf16 or fp16"
            )

    @property
    def kinds(self) -> list[Held]:
        """All that there is one number or more in for each parameter."""
        parts = self._under_zero() if self._is_zero else self._under_torch()
        are_whole = self.engine == "ddp"
        parts += [Held("optimizer", OPTIMIZERS[self.setup.optimizer] * self._stepped, are_whole)]
        for name in copies_of(self.config):
            parts.append(Held(name, self._stepped, are_whole, on_cpu=name == "slow" and self.config.offload_buffers))
        if self.setup.trainable_share < 1:
            width = self._passed if self._is_zero else WIDTHS[self.setup.dtype]
            parts.insert(0, Held("frozen", width, parts[0].is_whole))
        return parts

    @property
    def formula(self) -> str:
        """Bytes on the device for each trained parameter: what each process holds, and what N share: `a + b/N`."""
        here = [kind for kind in self.kinds if not kind.on_cpu and kind.name != "frozen"]
        whole, shared = (sum(kind.width for kind in here if kind.is_whole == is_whole) for is_whole in (True, False))
        terms = [f"{whole}"] * (whole > 0) + [f"{shared}/{self.setup.processes}"] * (shared > 0)
        return " + ".join(terms)

    def bytes_of(self, kind: Held, sizes: Sizes) -> int:
        """Of one kind, in the process that holds the most."""
        numbers = sizes.parameters if kind.is_whole else sizes.part(self.engine, self.setup.processes)
        trained = self.setup.trainable_share
        return round(numbers * (1 - trained if kind.name == "frozen" else trained)) * kind.width

    def on_device(self, sizes: Sizes) -> int:
        """Bytes of all kinds, and of the module buffers."""
        return sizes.buffers + sum(self.bytes_of(kind, sizes) for kind in self.kinds if not kind.on_cpu)

    def _under_torch(self) -> list[Held]:
        """DDP holds everything whole, the gradients once more in its buckets; FSDP2 parts of everything."""
        is_whole, width = self.engine == "ddp", self._stepped
        weights = Held("weights", width, is_whole)
        if is_whole:
            return [weights, Held("gradients", width * (2 if self.setup.processes > 1 else 1), is_whole=True)]
        if self.setup.gradient_accumulation_steps > 1:  # not reduced before the last micro-batch
            return [weights, Held("gradients", self._passed, is_whole=True)]
        return [weights, Held("gradients", width, is_whole=False)]

    def _under_zero(self) -> list[Held]:
        """The weights of the passes beside float32 partitions, on which optimizer and Lookbehind work."""
        width = self._passed
        weights = Held("weights", width, is_whole=self.engine != "zero3")
        return [weights, self._gradients_of_zero(width), Held("masters", SINGLE, is_whole=False)]

    def _gradients_of_zero(self, width: int) -> Held:
        """Those of its own partition, in float32 too; stage 1 has all of them in a backward, which can be more."""
        own = width if width == SINGLE else width + SINGLE
        if self.engine == "zero1" and width * self.setup.processes >= own:
            return Held("gradients", width, is_whole=True)
        if self.engine == "zero2" and self.setup.gradient_accumulation_steps > 1:  # what was added up, and what is
            own = max(own, 2 * width)
        return Held("gradients", own, is_whole=False)

    @property
    def _is_zero(self) -> bool:
        return self.engine.startswith("zero")

    @property
    def _passed(self) -> int:
        """Bytes of a weight in a pass, where the engine casts weights."""
        return WIDTHS[self.setup.dtype] if self.setup.mixed_precision == "no" else HALF

    @property
    def _stepped(self) -> int:
        """Bytes of a weight that the optimizer steps on."""
        is_upcast = self.engine == "fsdp2" and self.setup.mixed_precision != "no"
        return SINGLE if self._is_zero or is_upcast else WIDTHS[self.setup.dtype]
