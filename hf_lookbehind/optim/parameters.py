"""The parameters that an iteration works on: all of them descend, some of them are perturbed."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from ..config import InputError, LookbehindConfig
from ..tensors.foreach import tensor_norms
from ..tensors.names import select_targets
from ..tensors.processes import check_layout, is_sharded, local, locals_of, norms_over_shards
from .ascent import PLAIN, RULES, Ascent
from .rounding import Moved
from .steps import Step


class Parameters:
    """The trainable parameters of an optimizer, and which of them which rule perturbs.

    Args:
        parameters: each once.
        names: of them, by id.
        settings: resolved.
        gradient_scale: what a gradient scaler has multiplied the gradients by.

    Attributes:
        all: the parameters.
        ascents: pairs of a rule and of the parameters that it perturbs: T = 1, then the rule's own T.

    Raises:
        InputError: `target_parameters` matches none, or they lie on devices in a way that is not supported.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Mapping[int, Sequence[str]],
        settings: LookbehindConfig,
        gradient_scale: Callable[[], float],
    ):
        self.all = list(parameters)
        check_layout(self.all)
        if not settings.sync_ascent and any(map(is_sharded, self.all)):
            raise InputError("sync_ascent=False is not allowed with sharded parameters. Use sync_ascent=True, or DDP")
        targets = select_targets(self.all, names, settings.target_parameters)
        rule = RULES[settings.ascent]
        scaled = {id(p) for p in targets if rule.scales(names.get(id(p), ()))}
        self.ascents = [
            (PLAIN, [p for p in targets if id(p) not in scaled]),
            (Ascent(rule, settings.eta, gradient_scale), [p for p in targets if id(p) in scaled]),
        ]
        perturbed = set(map(id, targets))
        self._unperturbed = [p for p in self.all if id(p) not in perturbed]
        self._is_plain = len(self.ascents[0][1]) == len(self.all)

    @property
    def targets(self) -> list[Tensor]:
        """The perturbed ones."""
        return [p for _, parameters in self.ascents for p in parameters]

    @property
    def is_scaled(self) -> bool:
        """Whether T is other than 1 on any."""
        return bool(self.ascents[1][1])

    @property
    def devices(self) -> set[torch.device]:
        return {p.device for p in self.all}

    def has_sparse_gradients(self) -> bool:
        return any(p.grad is not None and p.grad.is_sparse for p in self.all)

    def gradient_norms(self, *, for_ascent: bool) -> tuple[Tensor, Tensor]:
        """A norm that is finite where every gradient is, and the denominator of an ascent step: ||T g||.

        Each gradient is read once: ||T g|| tells of what is not finite too. Where no ascent follows, both are ||g||.
        """
        if self._is_plain or not for_ascent:
            used, gradients = with_gradients(self.all)
            norm = torch.linalg.vector_norm(norms_over_shards(tensor_norms(gradients), used))
            return norm, norm
        norms, tensors = [], []
        for ascent, parameters in (*self.ascents, (PLAIN, self._unperturbed)):
            used, gradients = with_gradients(parameters)
            norms.append(ascent.norms(locals_of(used), gradients))
            tensors.append(used)
        joined = norms_over_shards(_joined(norms, self.all[0].device), list(chain(*tensors)))
        return torch.linalg.vector_norm(joined), torch.linalg.vector_norm(joined[: sum(map(len, tensors[:-1]))])

    def ascend(self, step: Step) -> None:
        """p <- p + step T^2 g."""
        for ascent, parameters in self.ascents:
            used, gradients = with_gradients(parameters)
            ascent.step_(locals_of(used), gradients, step)

    def steps_from(self, before: Sequence[Tensor]) -> list[Moved]:
        """Of each rule: the local parts of its weights as they were, and these weights as they are.

        Args:
            before: the local parts of all weights.
        """
        copies = dict(zip(map(id, self.all), before, strict=True))
        used = [(ascent, with_gradients(parameters)[0]) for ascent, parameters in self.ascents]
        return [(ascent, [copies[id(p)] for p in moved], moved) for ascent, moved in used]

    def size(self) -> float:
        """||p / T|| of all perturbed parameters together: a rule measures weights as it measures its steps."""
        norms = []
        for ascent, parameters in self.ascents:
            parts = locals_of(parameters)
            # no gradient is a gradient of zeros, which take no memory
            found = [part.new_zeros(()).expand_as(part) for part in parts]
            found = [z if p.grad is None else local(p.grad) for p, z in zip(parameters, found, strict=True)]
            norms.append(ascent.lengths(parts, parts, found))
        joined = _joined(norms, self.all[0].device)
        return torch.linalg.vector_norm(norms_over_shards(joined, self.targets)).item()


def with_gradients(parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that have a gradient, and the local parts of the gradients."""
    found = [(p, gradient) for p in parameters if (gradient := p.grad) is not None]
    return [p for p, _ in found], locals_of([gradient for _, gradient in found])


def _joined(norms: Sequence[Tensor], device: torch.device) -> Tensor:
    # those of no tensor are on the CPU
    return torch.cat([n.to(device, non_blocking=True) for n in norms])
