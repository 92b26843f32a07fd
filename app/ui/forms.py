"""A method's options as a form, and the form's answers as options. No method is named here: a new one gets its form too.

What a field is follows from its type: yes or no is a checkbox, a choice a dropdown, a number with a short range a slider,
another number a box, text a line, anything else a line of JSON. `T | None` is such a line that may be left empty.
"""

import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import gradio as gr
from gradio.components import Component

from composition import Refused, untrusted
from composition.methods import Method

SLIDER_STEPS = 100  # an integer range longer than this is typed, not slid


def form(method: Method) -> list[Component]:
    """One component per option, in order, at its default. Call it where the components shall stand."""
    hints = get_type_hints(method.options, include_extras=False)
    return [_component(item, hints[item.name], f"option-{method.name}-{item.name}") for item in fields(method.options)]


def options(method: Method, answers: Sequence[Any]) -> dict[str, Any]:
    """The options that differ from their defaults, from the values of the components of `form`, in its order.

    Raises Refused, as the method does, for a value that is wrong or missing.
    """
    hints = get_type_hints(method.options, include_extras=False)
    values = {item.name: _value(item.name, hints[item.name], answer)
             for item, answer in zip(fields(method.options), answers, strict=True)}
    read = method.read(values)
    return {item.name: values[item.name] for item in fields(method.options)
            if getattr(read, item.name) != _default(item)}


def answers(method: Method, values: Mapping[str, Any]) -> list[Any]:
    """The values of the components of `form` that say these options, the others at their defaults."""
    hints = get_type_hints(method.options, include_extras=False)
    return [_answer(hints[item.name], values.get(item.name, _default(item))) for item in fields(method.options)]


def _answer(hint: Any, value: Any) -> Any:
    """An option's value as its component has it."""
    kind, optional = _bare(hint)
    if value is None:
        return ""
    plain = kind in (str, bool, int, float) or bool(_choices(kind))
    return value if plain and not optional or kind is str or _choices(kind) else json.dumps(value)


def _component(item: Field, hint: Any, name: str) -> Component:
    kind, optional = _bare(hint)
    default = _default(item)
    low, high = item.metadata.get("ge"), item.metadata.get("le")
    about = {"label": item.name.replace("_", " ").capitalize(), "info": item.metadata.get("help"), "elem_id": name}
    if kind is bool and not optional:
        return gr.Checkbox(default, **about)
    if choices := _choices(kind):
        return gr.Dropdown([(str(choice), choice) for choice in choices], value=default, **about)
    if kind in (int, float) and not optional:  # an empty gr.Number would answer 0
        if low is not None and high is not None and (step := _step(kind, low, high, default)):
            return gr.Slider(low, high, default, step=step, **about)
        return gr.Number(default, precision=0 if kind is int else None, **about)
    if kind is str:
        return gr.Textbox("" if default is None else default, **about)
    return gr.Textbox("" if default is None else json.dumps(default), **about)


def _value(name: str, hint: Any, answer: Any) -> Any:
    """A component's value as the option's type wants it; None for an optional one left empty."""
    kind, optional = _bare(hint)
    if answer is None or answer == "" and (optional or kind is not str):
        if optional:
            return None
        raise Refused(f"option {name} is empty")
    if kind is float and isinstance(answer, int) and not isinstance(answer, bool):
        return float(answer)
    if kind is int and isinstance(answer, float) and answer.is_integer():
        return int(answer)
    if kind is str or _choices(kind) or kind in (bool, int, float) and not isinstance(answer, str):
        return answer
    try:
        return untrusted.parse(str(answer))
    except ValueError as error:
        wanted = "a number" if kind in (int, float) else "JSON"
        raise Refused(f"option {name}: {answer!r} is not {wanted} ({error})") from None


def _bare(hint: Any) -> tuple[Any, bool]:
    """The type without `| None` and Annotated, and whether None was allowed."""
    if get_origin(hint) is Annotated:
        return _bare(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        rest = [part for part in get_args(hint) if part is not type(None)]
        if len(rest) < len(get_args(hint)) and len(rest) == 1:
            return _bare(rest[0])[0], True
    return hint, False


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _default(item: Field) -> Any:
    """The option's default; None for one without, which must then be filled in."""
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else None


def _step(kind: type, low: float, high: float, default: float | None) -> float | None:
    """The step of a slider over low..high on which the default lies; None when a slider would not serve."""
    if default is None or not high > low or not math.isfinite(high - low):
        return None
    if kind is int:
        return 1 if high - low <= SLIDER_STEPS else None
    step = 10.0 ** (math.floor(math.log10(high - low)) - 2)
    places = (default - low) / step
    return step if abs(places - round(places)) < 1e-6 else None
