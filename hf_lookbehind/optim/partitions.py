"""The float32 partitions in which DeepSpeed's ZeRO holds the weights, and how ZeRO is driven.

ZeRO steps its base optimizer on flat float32 partitions, one part of them in each process, and copies them into the
weights of the model (stages 1 and 2 gather these then, stage 3 in each forward). Here a partition is seen as the parts
of single parameters that lie in it. Nothing of DeepSpeed is imported; its private names stand in this module alone.

Seen in DeepSpeed 0.19.8.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import InputError
from ..tensors.processes import Fragment, local

ZERO_OPTIMIZERS = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")

# Called with the number of a partition, and with what steps the base optimizer on it.
Around = Callable[[int, Callable[[], None]], None]


class _Part(NamedTuple):
    """The part of a parameter that lies in a partition of this process: where it starts there, and a view of it."""

    partition: int
    parameter: nn.Parameter
    start: int
    master: Tensor


class ZeroPartitions:
    """What this process holds of the weights under ZeRO.

    Args:
        engine: a DeepSpeed engine of stage 1, 2 or 3.

    Attributes:
        zero: ZeRO's optimizer, around the base optimizer.
        parameters: of the model, in ZeRO's order.
        fragments: of each, the part that lies in this process's partitions.

    Raises:
        InputError: the engine has no ZeRO, or one of its variants.
    """

    def __init__(self, engine: Any):
        self.zero = engine.optimizer
        name = type(self.zero).__name__
        if name not in ZERO_OPTIMIZERS:
            raise InputError(f"DeepSpeed's optimizer {name} is not supported: ZeRO of stage 1, 2 or 3 is")
        self._is_stage_3 = engine.zero_optimization_stage() == 3
        self._parts = list(self._parts_of_stage_3() if self._is_stage_3 else self._parts_of_stages_1_and_2())
        self.parameters = [part.parameter for part in self._parts]
        device, group = torch.device(engine.device), self.zero.dp_process_group
        self.fragments: list[Tensor] = [Fragment(part.master, group, device) for part in self._parts]
        self._groups: list[tuple[dict[str, Any], list[Tensor]]] | None = None  # of the base optimizer, while it steps

    def _parts_of_stages_1_and_2(self) -> Iterator[_Part]:
        """Not by ZeRO's own map of them, `_hp_mapping`, which is another under `round_robin_gradients`."""
        zero = self.zero
        for i, flat in enumerate(zero.single_partition_of_fp32_groups):
            size, rank = flat.numel(), dist.get_rank(zero.real_dp_process_group[i])
            for p, offset in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
                start, end = max(offset - rank * size, 0), min(offset + p.numel() - rank * size, size)
                if start >= end:
                    start = end = 0
                yield _Part(i, p, start, flat.data[start:end])

    def _parts_of_stage_3(self) -> Iterator[_Part]:
        """Without the padding behind the last element of a parameter, which holds anything."""
        zero = self.zero
        for i, group in enumerate(zero.fp16_groups):
            for p in group:
                _, start, numel = zero.grad_position[zero.get_param_id(p)]
                own = max(0, min(numel, p.ds_numel - zero._get_param_partition_rank(p) * numel))
                yield _Part(i, p, start, self._masters[i].data.narrow(0, start, own))

    @property
    def _masters(self) -> list[Any]:
        zero = self.zero
        return zero.fp32_partitioned_groups_flat if self._is_stage_3 else zero.single_partition_of_fp32_groups

    @property
    def _is_offloaded(self) -> bool:
        return self.zero.offload_optimizer if self._is_stage_3 else self.zero.cpu_offload

    def indices_in(self, partition: int) -> list[int]:
        """Of the fragments that lie in a partition."""
        return [index for index, part in enumerate(self._parts) if part.partition == partition]

    # ---- gradients ----

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Give each fragment, as `.grad`, its part of the averaged gradients of the last backward."""
        found: dict[int, dict[int, Tensor]] = {}
        for part, fragment in zip(self._parts, self.fragments, strict=True):
            numel = fragment.numel()
            if numel == 0:
                gradient = local(fragment).detach().clone()
            elif self._is_offloaded:
                gradient = self._masters[part.partition].grad.narrow(0, part.start, numel)
            else:
                if part.partition not in found:
                    found[part.partition] = self._averaged_gradients(part.partition)
                gradient = found[part.partition][part.start].reshape(-1)[:numel]
            fragment.grad = gradient.to(fragment.dtype)

    def _averaged_gradients(self, partition: int) -> dict[int, Tensor]:
        """By where each starts in its partition."""
        found, start = {}, 0
        for gradient in self.zero.averaged_gradients[partition]:
            found[start] = gradient
            start += gradient.numel()
        return found

    def drop_gradients(self) -> None:
        """Leave nothing of the last backward, as ZeRO does after an overflow."""
        zero = self.zero
        zero.zero_grad(set_to_none=True)
        for fragment in self.fragments:
            fragment.grad = None
        if self._is_stage_3:
            zero._pre_step()
        else:
            zero.micro_step_id = -1
            zero._release_preflattened_grad_buffers()
        if self._is_offloaded:
            if not self._is_stage_3:
                zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
        elif self._is_stage_3:
            zero.averaged_gradients = {}
        else:
            zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))
            zero.all_grad_tensors.update(dict.fromkeys(zero.all_grad_tensors))

    # ---- weights ----

    @torch.no_grad()
    def publish(self) -> None:
        """The weights of the model take the values of the partitions; all processes have to call it."""
        zero = self.zero
        if not self._is_stage_3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for i in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()

    # ---- steps ----

    @contextmanager
    def stepping(self, around: Around) -> Iterator[None]:
        """Within it ZeRO calls `around(i, step)` where it would `step` the base optimizer on partition i.

        After an error call `end_stepping`.
        """
        zero, step = self.zero, self.zero._optimizer_step
        self._groups = [(group, list(group["params"])) for group in zero.optimizer.param_groups]
        zero._optimizer_step = lambda i: around(i, lambda: step(i))
        yield
        self.end_stepping()

    def end_stepping(self) -> None:
        """ZeRO steps as it did; its base optimizer, which an error may have left with one partition, has all again."""
        groups, self._groups = self._groups, None
        if groups is None:
            return
        vars(self.zero).pop("_optimizer_step", None)
        for group, parameters in groups:
            group["params"] = parameters
        self.zero.optimizer.param_groups = [group for group, _ in groups]

    def step(self) -> bool:
        """A step of ZeRO, of which the engine and its scheduler know nothing: clips, steps, publishes.

        Returns:
            Whether it stepped: False after an overflow.
        """
        self.zero.step()
        self.zero.zero_grad(set_to_none=True)
        return not self.zero.overflow
