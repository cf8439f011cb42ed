"""`compression`: how well a model works when its weights are quantised or pruned."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import InputError, LookbehindConfig
from ..tensors.foreach import accumulation_dtype, tensor_norms
from ..tensors.names import parameter_names, select_targets
from ..tensors.processes import check_layout, drop_whole_copies, gathered, local, norms_over_shards, part_of
from ._forms import ALLOWED as ALLOWED
from ._forms import Form, form_of
from ._intact import Weight
from ._rating import rating


def compression(
    model: nn.Module,
    evaluate: Callable[[Any], float],
    forms: Sequence[str],
    *,
    target_parameters: str | Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate a model whose weights have been quantised or pruned, without calibration or further training.

    The weights keep their dtype and take the values that the form can hold: the loss of precision is that of the
    deployed model, its size and speed are not. Forms:

        int8, int4, int3, int2  round to the nearest of symmetric levels, one scale per output channel
        int4:tensor (any int)   the same with one scale for the tensor
        nf4                     QLoRA's NormalFloat4 in blocks of 64 weights, scales not quantised in their turn
        fp8                     float8 e4m3fn, one scale for the tensor
        bf16                    cast
        prune:0.7               70% of each tensor become 0, the smallest |w|

    int8, fp8 and bf16 are here to be checked off: they cost hardly any model anything, and tell none apart. What
    does is int4 and below, int4:tensor, nf4, and pruning of more than half.

    What is compressed is what quantisers compress: the weights of linear and convolution layers, `Conv1D` of
    transformers among them. Biases, norm layers, embeddings, what is tied to an embedding (as many heads of language
    models are), and parameters that no such layer holds stay as they are. Adapters are layers of their own: merge them
    first. Frozen weights are compressed too, tied ones once.

    All evaluations start from the same random states and buffers. Afterwards, also when `evaluate` raises or is
    interrupted, weights, buffers, gradients, modes (train or eval), flags and random states are those before, bit for
    bit.

    Several processes: all call it, and each gets the result of its own `evaluate`; parameters may be sharded by FSDP2,
    and are gathered one by one.

    Args:
        model: any module, on any device, in floating point. Cost: one copy of the compressed parameters, and a few of
            the largest.
        evaluate: called as `evaluate(model)` with the model in eval mode; returns a number, say an accuracy or a loss.
        forms: of the list above.
        target_parameters: regular expression(s), searched in the parameter names (all names of a tied one): which
            parameters are compressed instead, of all that have two or more dimensions; embeddings and others have
            their output channels in the first. Default: those of the layers above.

    Returns:
        One record per form, in the given order, with `form`; `value`, the result; `change`, how far the weights
        moved, ||w' - w|| / ||w|| over all compressed parameters.

    Raises:
        InputError: an argument is not as described, the model is quantised already or has nothing to compress, or
            `evaluate` gives no number.

    Example:
        >>> model = nn.Linear(4, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.1, -0.2, 0.3, -0.4]]))
        >>> for record in compression(model, lambda m: m.weight.abs().sum().item(), ["bf16", "prune:0.5"]):
        ...     print(record["form"], f"{record['value']:.1f} {record['change']:.2f}")
        bf16 1.0 0.00
        prune:0.5 0.7 0.41

    Source: flat minima bear quantisation and pruning better, for instance Liu et al., "Sharpness-aware Quantization
    for Deep Neural Networks" (arXiv 2111.12273), and Na et al., "Train Flat, Then Compress" (arXiv 2205.12694).
    """
    made = checked_forms("forms", forms)
    drop_whole_copies(model)  # which FSDP2's modules hold after a forward without a backward
    chosen, records = _select(model, target_parameters), []
    with rating(model, [parameter for parameter, _ in chosen], evaluate) as (weights, rate):
        for word, form in made.items():
            for weight, (_, axis) in zip(weights, chosen, strict=True):
                _compress(weight, axis, form)
            records.append({"form": word, "value": rate(f"form {word}"), "change": _change(weights)})
    return records


def checked_forms(name: str, words: Any) -> dict[str, Form]:
    """What each word stands for.

    Raises:
        InputError: they are not a list of one or more different words, or one is unknown; `name` is the argument.
    """
    if isinstance(words, str) or not isinstance(words, Iterable) or not (words := list(words)):
        raise InputError(f"{name}={words!r} is not allowed: a list of one or more of {ALLOWED}")
    made: dict[str, Form] = {}
    for word in words:
        form = form_of(word, name)
        if word in made:
            raise InputError(f"{name} contains {word!r} twice")
        made[word] = form
    return made


def _select(model: nn.Module, target_parameters: str | Sequence[str] | None) -> list[tuple[Tensor, int]]:
    """The parameters to compress, each once, and the dimension of their output channels."""
    names, axes, embeddings = parameter_names(model), dict[int, int](), set[int]()
    for module in model.modules():
        weight, axis = module._parameters.get("weight"), _output_axis(module)
        if weight is not None and axis is not None:
            axes.setdefault(id(weight), axis)
        if weight is not None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            embeddings.add(id(weight))
    # The config knows what valid expressions are; it returns a tuple of them.
    patterns = LookbehindConfig(target_parameters=target_parameters).target_parameters
    parameters = [p for p in model.parameters() if p.numel() > 0]
    if patterns is None:
        chosen = [p for p in parameters if id(p) in axes and id(p) not in embeddings]
    else:
        parameters = [p for p in parameters if p.ndim > 1 and p.is_floating_point()]
        chosen = select_targets(parameters, names, patterns)
    if not chosen:
        raise InputError(
            "the model has no weight of a linear or convolution layer to compress; target_parameters may name others"
        )
    for p in chosen:
        stored = local(p.detach())
        if type(stored) is not Tensor or not stored.is_floating_point():
            held = f"{type(stored).__name__} of {stored.dtype}"
            raise InputError(
                f"{names[id(p)][0]!r} is quantised already ({held}): load the model in floating point to compress it"
            )
    check_layout(chosen)
    return [(p, axes.get(id(p), 0)) for p in chosen]


def _output_axis(module: nn.Module) -> int | None:
    """The dimension of the weight along which a layer's output channels lie; None: it is no such layer."""
    if isinstance(module, nn.Linear):
        return 0
    if isinstance(module, nn.modules.conv._ConvNd):
        return 1 if module.transposed else 0
    # a linear layer with its weight the other way round, in GPT-2 and its kin; this room does not import transformers
    kinds = {(kind.__module__, kind.__name__) for kind in type(module).__mro__}
    return 1 if ("transformers.pytorch_utils", "Conv1D") in kinds else None


def _compress(weight: Weight, axis: int, form: Form) -> None:
    weight.put_home()
    turned = _precise(gathered(weight.parameter.detach())).movedim(axis, 0)
    held = form(turned.flatten(1)).view(turned.shape).movedim(0, axis)
    weight.moved.copy_(part_of(held.contiguous(), weight.parameter))


def _change(weights: list[Weight]) -> float:
    """||w' - w|| / ||w||; 0 where all weights are 0."""
    move, home = (
        _length(weights, part) for part in (lambda w: _precise(w.moved) - _precise(w.home), lambda w: _precise(w.home))
    )
    return move / home if home else move


def _length(weights: list[Weight], part: Callable[[Weight], Tensor]) -> float:
    """L2 norm over all weights together of a part of each; one at a time, as memory goes."""
    device = weights[0].home.device
    norms = torch.cat([tensor_norms([part(weight)]).to(device) for weight in weights])
    return torch.linalg.vector_norm(norms_over_shards(norms, [w.parameter for w in weights])).item()


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))
