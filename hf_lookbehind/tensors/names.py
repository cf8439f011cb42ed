"""Names of parameters, and the parameters that patterns choose by them."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from ..config import InputError

# What `torch.compile`, FSDP and activation checkpointing put into parameter names.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its id: those of tied weights' aliases too, as the unwrapped model has them."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(_WRAPPERS.sub("", name))
    return names


def select_targets(
    parameters: Iterable[Tensor], names: Mapping[int, Sequence[str]], patterns: Sequence[str] | None
) -> list[Tensor]:
    """The parameters with a name in which a pattern is found (`re.search`); all of them without patterns.

    Raises:
        InputError: there are patterns, and they match none.
    """
    parameters = list(parameters)
    if patterns is None:
        return parameters
    matching = [p for p in parameters if any(re.search(q, name) for q in patterns for name in names.get(id(p), ()))]
    if not matching:
        known = [name for p in parameters for name in names.get(id(p), ())]
        raise InputError(
            f"target_parameters={list(patterns)!r} matches no trainable parameter: allowed is a regular expression "
            f"found in a parameter's name, for instance {', '.join(map(repr, known[:3]))}"
        )
    return matching
