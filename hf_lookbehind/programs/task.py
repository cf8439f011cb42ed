"""What a program prepares from its flags, and the Trainer of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, set_seed

from ..config import InputError, LookbehindConfig
from ..trainer import LookbehindTrainer
from ..trainer.record import recorded
from .cli.arguments import FinetuningArguments, ModelArguments
from .cli.blame import UnexplainedError, said
from .cli.lookahead import over_lookahead
from .cli.running import no_empty_folder, one_line
from .evaluation import Metrics
from .models.loading import try_out

# What settings that fit no optimizer or scheduler, or a missing package, make the library raise.
_BUILDING_ERRORS = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Task:
    """A model to be trained, its data, and how it is rated.

    Attributes:
        datasets: "train" and, where there are such, "validation" and "test"; preprocessed.
        load_model: gives the model; weights that are not loaded are drawn from the global random state.
        processing_class: image processor or tokenizer; saved beside the model.
        make_collator: called with the model; gives what makes a batch of examples.
        metrics: of the evaluation.
        trainer_class: with `LookbehindMixin`.
        callbacks: of the training.
        classes: their names, in the order of the model's head, where every example has one label.
    """

    datasets: Mapping[str, Any]
    load_model: Callable[[], PreTrainedModel]
    processing_class: Any
    make_collator: Callable[[PreTrainedModel], Callable[[Any], Any]]
    metrics: Metrics
    trainer_class: type[Trainer] = LookbehindTrainer
    callbacks: Sequence[TrainerCallback] = ()
    classes: Sequence[str] = ()

    def make_model(self, seed: int, args: ModelArguments) -> PreTrainedModel:
        """The model, tried out on one example of the training data.

        Raises:
            InputError: it cannot be loaded, or cannot take such examples.
        """
        set_seed(seed)
        model = self.load_model()
        try_out(model, self.make_collator(model)([self.datasets["train"][0]]), args)
        return model

    def make_trainer(
        self, model: PreTrainedModel, training: FinetuningArguments, lookbehind: LookbehindConfig, **others: Any
    ) -> Any:
        """The Trainer; it has built its optimizer and scheduler once, as it will again after files have been written.

        Args:
            model, training, lookbehind: as they are.
            others: further arguments of the Trainer, or other values of those that the task has; callbacks are added.

        Raises:
            InputError: what the Trainer, its optimizer or scheduler refuse.
        """
        callbacks = [*self.callbacks, *others.pop("callbacks", ())]
        if training.early_stopping_patience is not None:
            threshold = training.early_stopping_threshold or 0.0
            callbacks.append(EarlyStoppingCallback(training.early_stopping_patience, threshold))
        settings: dict[str, Any] = {
            "train_dataset": self.datasets["train"],
            "eval_dataset": self.datasets.get("validation"),
            "data_collator": self.make_collator(model),
            "processing_class": self.processing_class,
            "compute_metrics": self.metrics,
            "preprocess_logits_for_metrics": self.metrics.preprocess_logits,
            "lookbehind_config": lookbehind,
            "callbacks": callbacks,
        }
        trainer_class = over_lookahead(self.trainer_class) if training.lookahead_steps else self.trainer_class
        trainer_class = recorded(trainer_class)
        try:
            # the Trainer makes its folder before everything that it refuses is refused
            with no_empty_folder(Path(training.output_dir or "")):
                trainer = trainer_class(model=model, args=training, **settings | others)
                _try_optimizer_and_scheduler(trainer)
        except InputError:
            raise
        except (ValueError, RuntimeError, ImportError) as error:
            raise UnexplainedError(one_line(error)) from error
        return trainer


def _try_optimizer_and_scheduler(trainer: Trainer) -> None:
    """Build both once.

    Raises:
        InputError: names the flags that say how.
    """
    steps = ("optim", "optim_args"), ("lr_scheduler_type", "lr_scheduler_kwargs")
    builds = trainer.create_optimizer, lambda: trainer.create_scheduler(num_training_steps=1000)
    try:
        for flags, build in zip(steps, builds, strict=True):
            try:
                build()
            except _BUILDING_ERRORS as error:
                given = said(trainer.args, [flag for flag in flags if getattr(trainer.args, flag)])
                raise InputError(f"{given} cannot be used: {type(error).__name__}: {one_line(error)}") from error
    finally:
        trainer.optimizer = trainer.lr_scheduler = None
