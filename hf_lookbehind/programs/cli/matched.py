"""`--method matched`: the optimizer of the SAM that matches; see `LookbehindConfig.matched_sam` for its settings."""

from ...config import InputError, LookbehindConfig
from .arguments import FinetuningArguments


def match_optimizer(training: FinetuningArguments, given: LookbehindConfig) -> None:
    """Learning rate and betas of Adam, or learning rate and momentum of SGD, for one descent instead of k.

    k steps of Adam on one gradient are, but for its epsilon and the order of the steps, one with betas to the power k
    and k times the learning rate, bias correction included. SGD sums its momentum: mu lets a gradient move the weights
    1 / (1 - mu) times the learning rate in the long run, and mu^k has to come to the same.

    Raises:
        InputError: another optimizer, Lookahead around it, or what has no such form (dampening, Nesterov's momentum);
            a search of rho.
    """
    _, factor, power = given.matched_sam()
    name = str(getattr(training.optim, "value", training.optim))
    if training.lookahead_steps:
        raise InputError("--lookahead_steps is not allowed with --method matched: Lookahead counts the descents")
    if name == "sgd":
        factor *= _match_momentum(training, power)
    elif name.startswith("adam"):
        training.adam_beta1, training.adam_beta2 = training.adam_beta1**power, training.adam_beta2**power
    else:
        raise InputError(
            f"--optim {name} is not allowed with --method matched: sgd, or one of Adam's (adamw_torch, ...)"
        )
    training.learning_rate *= factor


def _match_momentum(training: FinetuningArguments, power: int) -> float:
    """Sets the momentum; returns by what the learning rate is to be multiplied for that."""
    parts = (part for part in (training.optim_args or "").replace(" ", "").split(",") if part)
    settings: dict[str, str] = {name: value for name, _, value in (part.partition("=") for part in parts)}
    for refused in ("dampening", "nesterov"):
        if settings.get(refused, "0").lower() not in ("0", "0.0", "false", "no"):
            raise InputError(f"--optim_args {refused}={settings[refused]} is not allowed with --method matched")
    mu = float(settings.get("momentum", 0))
    if mu == 0:
        return 1.0
    training.optim_args = ",".join(f"{n}={v}" for n, v in (settings | {"momentum": repr(mu**power)}).items())
    return (1 - mu**power) / (1 - mu)


def in_words(given: LookbehindConfig) -> str:
    """For a card: what the settings match."""
    _, factor, power = given.matched_sam()
    settings = given.resolved()
    said = [f"{name}={getattr(settings, name):g}" for name in ("k", "rho", "alpha")]
    said += [f"{factor:g} times its learning rate", f"betas to the power {power}"]
    return ", ".join(said if settings.descent == "every" else ["multistep", *said])
