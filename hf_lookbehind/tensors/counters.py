"""State that is no buffer: the attributes that a class declares in `lookbehind_counters`."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..config import InputError
from .copies import Memo, fresh

DECLARATION = "lookbehind_counters"
# What an attribute that is not there yet has for a value.
_ABSENT = object()


class Counter(NamedTuple):
    """An attribute, with its value at some time."""

    holder: Any
    name: str
    value: Any

    def now(self) -> "Counter":
        """The attribute with the value that it has by now."""
        return self._replace(value=vars(self.holder).get(self.name, _ABSENT))

    def before_a_pass(self, memo: Memo) -> "Counter":
        """The attribute with a copy of its value; a value that its class holds is written to as well."""
        value = vars(self.holder).get(self.name, getattr(type(self.holder), self.name, _ABSENT))
        return self._replace(value=value if value is _ABSENT else fresh(value, memo))

    def restore(self, memo: Memo | None = None) -> None:
        """Give the attribute this value; with a memo of copies, a copy of it, to be written into."""
        if self.value is _ABSENT:
            vars(self.holder).pop(self.name, None)
        else:
            vars(self.holder)[self.name] = self.value if memo is None else fresh(self.value, memo)


def counters(holders: Iterable[Any]) -> list[Counter]:
    """The declared attributes, with copies of their values.

    Args:
        holders: modules, trainers, ...; those without a declaration are passed over.

    Raises:
        InputError: a declaration is no list of names, or names what is no plain attribute, or cannot be copied.
    """
    memo = Memo()
    return [
        Counter(holder, name, _ABSENT).before_a_pass(memo) for holder in holders for name in declared_names(holder)
    ]


def restore(found: Sequence[Counter], *, as_copies: bool) -> None:
    """Give each attribute the value that it has here.

    Args:
        found: as `counters` gave them, or what `Counter.now` made of those.
        as_copies: whether the values will be wanted again, and must not be written into.
    """
    memo = Memo() if as_copies else None
    for counter in found:
        counter.restore(memo)


def declared_names(holder: Any) -> list[str]:
    """What a holder declares, on its class or in the instance."""
    # asked of a wrapper itself, `getattr` would answer for what it wraps
    declared = vars(holder).get(DECLARATION) or getattr(type(holder), DECLARATION, ())
    if not isinstance(declared, Sequence | set | frozenset) or isinstance(declared, str):
        raise InputError(
            f"{type(holder).__name__}.{DECLARATION}={declared!r} is not allowed: names of attributes, as in ('seen',)"
        )
    for name in declared:
        _check_name(holder, name)
    return list(declared)


def _check_name(holder: Any, name: str) -> None:
    is_module = isinstance(holder, nn.Module) and (name in holder._modules or name in holder._parameters)
    if is_module or isinstance(vars(holder).get(name), nn.Module | nn.Parameter):
        what = "a module or a parameter: a module declares in its own class what it counts"
    elif hasattr(getattr(type(holder), name, None), "__get__"):
        what = "computed by its class: name the attribute that it is computed from"
    else:
        return
    raise InputError(f"{type(holder).__name__}.{DECLARATION} names {name!r}, which is {what}")
