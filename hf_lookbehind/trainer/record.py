"""What a training has really done, kept with every checkpoint: a run that is resumed knows all of it."""

import functools
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..config import LookbehindConfig
from ..optim.stats import LookbehindStats
from .card import peak_memory

RECORD_NAME = "training_record.json"


@dataclass(frozen=True)
class Part:
    """Steps in a row under the same settings.

    Attributes:
        settings: that bear on the result, by name, as plain data.
        command: that started it; "" where it is not known.
        steps: of the optimizer.
        passes: gradients of a whole window.
        runtime: seconds.
        peak_memory: in GiB; None where it was not measured.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    steps: int = 0
    passes: float = 0
    runtime: float = 0.0
    peak_memory: float | None = None

    def differences(self, settings: Mapping[str, Any]) -> list[str]:
        """Names of those that are known of this part and are others in `settings`."""
        return sorted(name for name, value in self.settings.items() if settings.get(name) != value)


class TrainingRecord:
    """The parts of a training, the last of which goes on.

    Attributes:
        parts: in order; none before `begin`.
        new_steps: how many steps this process has taken.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.restart()

    def begin(self, checkpoint: str | Path | None, settings: Mapping[str, Any], command: str = "") -> None:
        """Go on with what a checkpoint holds, or start anew. Under the same settings it is the same part.

        Args:
            checkpoint: that the training resumes, if it does.
            settings: of this part.
            command: that starts it.
        """
        parts = [] if checkpoint is None else read_record(checkpoint)
        if not parts or parts[-1].differences(settings):
            parts.append(Part(settings, command))
        self.parts = parts
        self.restart()

    def restart(self) -> None:
        """The training begins now; what this process has done so far does not count."""
        self.new_steps, self._passes, self._clock = 0, 0.0, time.perf_counter()

    def count(self, stats: LookbehindStats, fraction: float) -> None:
        """Take in an iteration, as far as it came.

        Args:
            stats: what it measured.
            fraction: the share of the window that its first gradient is from.
        """
        self.new_steps += 1
        self._passes += len(stats.ascent_losses) + (fraction if stats.on_part else 1)

    def now(self, runtime: float | None = None) -> list[Part]:
        """The parts, with what this process has done so far.

        Args:
            runtime: seconds that it took. Default: since the training began.
        """
        *earlier, last = self.parts
        seconds = time.perf_counter() - self._clock if runtime is None else runtime
        last = replace(
            last,
            steps=last.steps + self.new_steps,
            passes=last.passes + self._passes,
            runtime=last.runtime + seconds,
            peak_memory=max(filter(None, (last.peak_memory, peak_memory())), default=None),
        )
        return [*earlier, last]

    def save(self, folder: str | Path) -> None:
        """Write what there is so far into an existing folder; nothing before `begin`."""
        if self.parts:
            text = json.dumps([asdict(part) for part in self.now()], indent=2) + "\n"
            (Path(folder) / RECORD_NAME).write_text(text, encoding="utf-8")

    def end(self, runtime: float) -> None:
        """The training is over."""
        self.parts = self.now(runtime)

    @property
    def passes(self) -> float:
        """Gradients of all parts, in windows."""
        return _whole(sum(part.passes for part in self.parts))

    @property
    def steps(self) -> int:
        return sum(part.steps for part in self.parts)

    @property
    def runtime(self) -> float:
        return sum(part.runtime for part in self.parts)

    @property
    def peak_memory(self) -> float | None:
        return max((part.peak_memory for part in self.parts if part.peak_memory is not None), default=None)


def read_record(checkpoint: str | Path) -> list[Part]:
    """What a checkpoint says of the training so far; where nothing was kept, what follows from its settings."""
    path = Path(checkpoint) / RECORD_NAME
    if not path.is_file():
        return [_estimated(Path(checkpoint))]
    names = {f.name for f in fields(Part)}
    parts = json.loads(path.read_text(encoding="utf-8"))
    return [Part(**{name: value for name, value in part.items() if name in names}) for part in parts]


def _estimated(checkpoint: Path) -> Part:
    steps = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    try:
        config = LookbehindConfig.load(checkpoint)
    except FileNotFoundError:
        config = LookbehindConfig(k=0)  # of the plain Trainer
    return Part(config.resolved().to_dict(), steps=steps, passes=config.gradient_passes(steps))


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


@functools.cache
def recorded(trainer_class: Any) -> Any:
    """The class (with `LookbehindMixin`), whose Trainers keep a `training_record`, once that has begun."""

    class RecordedTrainer(trainer_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.training_record = TrainingRecord()
            super().__init__(*args, **kwargs)

        def _begin_training(self, resume_from_checkpoint: str | None) -> None:
            # once for each batch size that `auto_find_batch_size` tries
            self.training_record.restart()
            super()._begin_training(resume_from_checkpoint)

        def _record(self, stats: LookbehindStats) -> None:
            self.training_record.count(stats, self.lookbehind_config.ascent_fraction)
            super()._record(stats)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            super().save_model(output_dir, _internal_call=_internal_call)
            # of a checkpoint; the Trainer's own state follows, which makes it complete
            if _internal_call and output_dir is not None and self.is_world_process_zero():
                self.training_record.save(output_dir)

    return RecordedTrainer
