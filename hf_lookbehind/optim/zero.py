"""The iteration over DeepSpeed's ZeRO: the same core, on the fragments of the float32 partitions of this process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..config import ADAPTIVE_ALPHAS, InputError, LookbehindConfig
from ..tensors.names import parameter_names
from ..tensors.processes import locals_of
from .buffers import Buffers
from .interpolation import interpolate_
from .lookbehind import Closure, Lookbehind
from .partitions import ZeroPartitions


class PartitionBuffers(Buffers):
    """Copies of the fragments, which are exchanged partition by partition while ZeRO steps."""

    def __init__(self, partitions: ZeroPartitions, offloaded: list[str]):
        super().__init__(partitions.fragments, offloaded)
        self._partitions = partitions

    @contextmanager
    def exchanged(self, name: str) -> Iterator[None]:
        """Within it the base optimizer meets the values of the copy; what it leaves goes into the copy."""

        def around(partition: int, step: Callable[[], None]) -> None:
            indices = self._partitions.indices_in(partition)
            self._swap(name, indices)
            step()
            self._swap(name, indices)

        with self._partitions.stepping(around):
            yield

    def end_exchange(self) -> None:
        self._partitions.end_stepping()


class ZeroLookbehind(Lookbehind):
    """`Lookbehind` over a DeepSpeed engine with ZeRO of stage 1, 2 or 3.

    The iteration works on the float32 partitions that ZeRO steps on; the weights of the model, which may be stored in
    bfloat16 or float16, are made from them before each pass. ZeRO clips, looks for overflows and scales losses, as it
    does on its own, and the engine counts an iteration as one step. After an exception the partitions hold the slow
    weights, and the model those of the pass that failed: `publish`, in all processes, brings it up to date.

    Args:
        engine: as `deepspeed.initialize` returns it.
        config: the settings.
        counting: as of `Lookbehind`.

    Raises:
        InputError: `sync_ascent=False`, an engine without ZeRO, or what `Lookbehind` raises it for.

    Example:
        lookbehind = ZeroLookbehind(engine, LookbehindConfig(k=2))

        def closure():
            lookbehind.zero_grad()
            loss = engine(**batch).loss
            engine.backward(loss)  # and no engine.step()
            return loss

        loss = lookbehind.step(closure)
    """

    def __init__(self, engine: Any, config: LookbehindConfig, *, counting: Any = ()):
        self.engine = engine
        self._partitions = ZeroPartitions(engine)
        self._is_stale = False  # the model's weights are not those of the partitions
        zero = self._partitions.zero
        super().__init__(
            engine.module,
            engine.basic_optimizer,
            config,
            counting=counting,
            gradient_scale=lambda: float(zero.loss_scale),
        )

    def step(
        self,
        closure: Closure,
        descend: Closure | None = None,
        *,
        ascent_closure: Closure | None = None,
        full: bool = True,
    ) -> Any:
        """As `Lookbehind.step`. The closure runs `engine.backward`, at the boundary of its last micro-batch, no step.

        Raises:
            InputError: there is a `descend`: ZeRO clips and steps by itself.
        """
        if descend is not None:
            raise InputError("descend is not allowed under DeepSpeed, which clips and steps by itself. Leave it out")
        return super().step(closure, self._descend_fast, ascent_closure=ascent_closure, full=full)

    def begin(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError("begin is not allowed under DeepSpeed, whose engine does the last descent. Use step")

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the weights of the model up to date, if they are not; all processes have to call it."""
        if self._is_stale:
            self._partitions.publish()
            self._is_stale = False

    def zero_grad(self) -> None:
        """Leave no gradient, in the model or in ZeRO's buffers."""
        self._partitions.drop_gradients()

    # ---- what the core asks for ----

    def _weight_names(self) -> dict[int, list[str]]:
        names = parameter_names(self.model)
        pairs = zip(self._partitions.parameters, self._partitions.fragments, strict=True)
        return {id(fragment): names.get(id(parameter), []) for parameter, fragment in pairs}

    def _trainable(self) -> list[Tensor]:
        return self._partitions.fragments

    def _devices(self) -> set[torch.device]:
        return {p.device for p in self.model.parameters()}

    def _make_buffers(self, weights: list[Tensor], offloaded: list[str]) -> Buffers:
        return PartitionBuffers(self._partitions, offloaded)

    def _passes(self, closure: Closure, descend: Closure, ascent_closure: Closure) -> Any:
        return super()._passes(self._with_gradients(closure), descend, self._with_gradients(ascent_closure))

    def _with_gradients(self, closure: Closure) -> Closure:
        """The closure, at the weights of the partitions, with its gradients on the fragments."""

        def run() -> Any:
            self.publish()
            loss = closure()
            self._partitions.collect_gradients()
            return loss

        return run

    def _ascend(self) -> None:
        self._is_stale = True
        super()._ascend()

    def _descend_fast(self) -> None:
        """An inner descent. ZeRO ends it by publishing the partitions, which hold perturbed weights again by then."""
        self._is_stale = not self._partitions.step()

    def _spoil_gradients(self) -> None:
        """ZeRO looks for what is not finite itself, in all processes together."""

    def _return_to_slow_weights(self) -> None:
        self._is_stale = self._is_stale or self._now.is_open
        super()._return_to_slow_weights()

    def _end(self, descend: Closure) -> None:
        if self.stats.skipped:
            with self._partitions.stepping(lambda partition, step: None):
                self.engine.step()  # a loss scale sees the overflow
            self._is_stale = True
        else:
            self.enter_fast_weights()
            self._is_stale = True
            with self._partitions.stepping(self._last_step):
                self.engine.step()
            self._is_stale = self._now.plan.alpha in ADAPTIVE_ALPHAS
            self.finish()
        self.publish()

    def _last_step(self, partition: int, step: Callable[[], None]) -> None:
        """With a static alpha the slow weights step here too: before ZeRO publishes, which is then done once."""
        step()
        alpha = self._now.plan.alpha
        if alpha in ADAPTIVE_ALPHAS or alpha == 1:
            return
        indices = self._partitions.indices_in(partition)
        slow, fast = self._buffers["slow"], locals_of(self._weights.all)
        interpolate_([fast[i] for i in indices], [slow[i] for i in indices], float(alpha or 1))

    def _step_slow_weights(self) -> float:
        alpha = self._now.plan.alpha
        return super()._step_slow_weights() if alpha in ADAPTIVE_ALPHAS else float(alpha or 1)
