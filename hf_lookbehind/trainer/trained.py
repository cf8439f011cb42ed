"""What a Trainer trains: its model and, in some libraries, modules beside it."""

# The Trainer annotates as optional what it sets before training.
# pyright: reportReturnType=false, reportArgumentType=false

from collections.abc import Iterator

from torch import nn
from transformers import Trainer

from ..config import InputError

# the model itself, under other names
_MODEL = {"model", "model_wrapped", "deepspeed"}


def trained_module(trainer: Trainer) -> nn.Module:
    """The trainer's model, together with what it trains beside it, under the name of the trainer's attribute.

    sentence-transformers keeps its loss in `trainer.loss`; it can hold parameters, buffers, and the model itself.

    Raises:
        InputError: there are parameters beside the model and several processes, of which each would train its own.
    """
    beside = dict(_modules_beside(trainer))
    if not beside:
        return trainer.model
    trained = _Trained(trainer.model, beside)
    own = [name for name, _ in trained.named_parameters_beside()]
    if own and trainer.args.world_size > 1:
        raise InputError(
            f"parameters beside the model ({own[0]}) are not supported in {trainer.args.world_size} processes: "
            "nothing reduces their gradients. Make them part of the model, or use one process"
        )
    return trained


def _modules_beside(trainer: Trainer) -> Iterator[tuple[str, nn.Module]]:
    for name, value in vars(trainer).items():
        modules = value.items() if isinstance(value, dict) else [(None, value)]
        for key, module in modules:
            # in evaluation mode are references and teachers
            if name not in _MODEL and isinstance(module, nn.Module) and module.training:
                yield (name if key is None else f"{name}.{key}"), module


class _Trained(nn.Module):
    """A model, whose parameters keep their names, and modules beside it, which may hold the model too."""

    def __init__(self, model: nn.Module, beside: dict[str, nn.Module]):
        super().__init__()
        self.model = model
        self.beside = nn.ModuleList(beside.values())
        self._names = list(beside)

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.model.named_parameters(*args, **kwargs)
        yield from self.named_parameters_beside()

    def named_parameters_beside(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that require grad and are not the model's, under the names that the modules have in the trainer."""
        seen = {id(p) for p in self.model.parameters()}
        for name, module in zip(self._names, self.beside, strict=True):
            for inner, parameter in module.named_parameters():
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{name}.{inner}", parameter
