"""`--lookahead_steps`: any method over Lookahead as its base optimizer."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ...config import InputError, LookbehindConfig
from ...optim.base_optimizer import unwrap_accelerate
from .arguments import FinetuningArguments

DEFAULT_ALPHA = 0.5


def check_lookahead(training: FinetuningArguments, lookbehind: LookbehindConfig) -> None:
    """Refuse Lookahead where it cannot be had, and under slow weights that it would not follow.

    Raises:
        InputError: names the flags.
    """
    if not training.lookahead_steps:
        return
    if find_spec("pytorch_optimizer") is None:
        raise InputError(
            "--lookahead_steps needs the package pytorch-optimizer: pip install 'hf_lookbehind[lookahead]'"
        )
    alpha = lookbehind.resolved().alpha
    if alpha != 1:
        raise InputError(
            f"--lookahead_steps {training.lookahead_steps} is not allowed with --k {lookbehind.k} and alpha {alpha}: "
            "Lookahead keeps weights of its own, which the slow weights would leave behind. --k 0, --k 1 or --alpha 1"
        )


@cache
def over_lookahead(trainer_class: type[Trainer]) -> Any:
    """The class, whose Trainers put Lookahead around the optimizer that they make, as their arguments say.

    Parameter groups, learning rates and state stay those of the optimizer inside. Between two of Lookahead's own steps
    the model holds its fast weights, as evaluations and checkpoints do then; a training ends with the slow ones.

    Reference: Zhang, Lucas, Ba, Hinton, "Lookahead Optimizer: k steps forward, 1 step back", NeurIPS 2019,
    arXiv 1907.08610.
    """

    class LookaheadTrainer(trainer_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(_SlowWeightsAtTheEnd())

        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                from pytorch_optimizer import Lookahead

                args: Any = self.args
                alpha = DEFAULT_ALPHA if args.lookahead_alpha is None else args.lookahead_alpha
                self.optimizer = Lookahead(super().create_optimizer(model), k=args.lookahead_steps, alpha=alpha)
            return self.optimizer

    return LookaheadTrainer


class _SlowWeightsAtTheEnd(TrainerCallback):
    """The last steps may be fewer than Lookahead's own step takes."""

    @torch.no_grad()
    def on_train_end(self, args, state, control, *, optimizer: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            return
        lookahead = unwrap_accelerate(optimizer)
        for group in lookahead.param_groups:
            for parameter in group["params"]:
                parameter.copy_(lookahead.state[parameter]["slow_params"])
