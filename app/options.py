"""Text of a flag or a field as values: sizes, and a method's options with the types that the method gives them."""

import re
from collections.abc import Sequence
from typing import Any

from composition import Refused, untrusted


def size(text: str) -> tuple[int, int]:
    """WxH or one number for a square."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:[xX×*]\s*(\d+))?\s*", text)
    if not match:
        raise Refused(f"--size {text:.200}: write WIDTHxHEIGHT in pixels, as in 512x768")
    return int(match[1]), int(match[2] or match[1])


def options(pairs: Sequence[str], method: str) -> dict[str, Any]:
    """key=value pairs, each with the type that the method's options give it. Raises Refused as the method does."""
    from composition import methods

    target, read = methods.find(method), {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise Refused(f"--option {pair:.200}: write key=value; {_known(target)}")
        read[key] = _typed(target, key, value)
    return read


def options_of_each(pairs: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Method to its options: every pair goes to those of the methods that have it. Raises Refused when none has."""
    read: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for pair in pairs:
        refusals, taken = [], False
        for name in methods:
            try:
                read[name] |= options([pair], name)
                taken = True
            except Refused as error:
                refusals.append(error)
        if not taken:
            raise refusals[-1]
    return read


def _typed(method: Any, key: str, value: str) -> Any:
    """The text as the option's type; a list or the like as JSON."""
    try:
        return getattr(method.read({key: value}), key)
    except Refused as refused:
        try:
            loaded = untrusted.parse(value)
        except ValueError:
            raise refused from None
        return getattr(method.read({key: loaded}), key)


def _known(method: Any) -> str:
    from dataclasses import fields

    names = ", ".join(item.name for item in fields(method.options))
    return f"method {method.name!r} has {names or 'no options'}"
