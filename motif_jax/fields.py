"""Dataclass fields with a help text and a rule, and the dataclass of a mapping: every mistake is collected, none raised."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any

LARGEST_FLOAT, LARGEST_INT = 2.0**127, 2**31 - 1  # what float32 and int32 hold, to about a factor of two


def described(default: Any, help: str, **rule: Any) -> Any:
    """A field with its help text and rule (`choices`, `low`, `high`); an int goes up to LARGEST_INT unless `high` says otherwise."""
    if type(default) is int:
        rule = {"high": LARGEST_INT, **rule}
    return field(metadata={"help": help, **rule}, default=default)


def field_names(cls: type, prefix: str = "") -> list[str]:
    """The dotted names of all fields of a dataclass, groups included."""
    found = []
    for f in dataclasses.fields(cls):
        found += [prefix + f.name, *(field_names(f.type, f"{prefix}{f.name}.") if dataclasses.is_dataclass(f.type) else ())]
    return found


def _coerce(value: Any, kind: Any, name: str, errors: list[str]) -> Any:
    """`value` as `kind`; int is accepted for float, list for tuple, nothing else is converted. Floats must be finite in float32."""
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, (list, tuple)) and all(isinstance(v, item) and not isinstance(v, bool) for v in value):
            return tuple(value)
        errors.append(f"{name}={value!r}: must be a list of {item.__name__}")
        return None
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) < LARGEST_FLOAT:
            return float(value)
        errors.append(f"{name}={value!r}: must be finite in float32")
        return None
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    errors.append(f"{name}={value!r}: must be {kind.__name__}, not {type(value).__name__}")
    return None


def build(cls: type, given: Mapping[str, Any], prefix: str, errors: list[str]) -> Any:
    """The dataclass `cls` of a mapping; what is wrong with a field is appended to `errors` under `prefix`, and its default stands."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in given:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            errors.append(
                f"{prefix}{key}: no such field" + (f"; did you mean {prefix}{close[0]}?" if close else f"; known: {', '.join(fields)}")
            )
    values = {}
    for name, f in fields.items():
        path = prefix + name
        if name not in given:
            continue
        value = given[name]
        if dataclasses.is_dataclass(f.type):
            if isinstance(value, Mapping):
                values[name] = build(f.type, value, path + ".", errors)
            else:
                errors.append(f"{path}={value!r}: must be a group of fields")
            continue
        before = len(errors)
        value = _coerce(value, f.type, path, errors)
        if len(errors) > before:
            continue
        rule = f.metadata
        if "choices" in rule and value not in rule["choices"]:
            errors.append(f"{path}={value!r}: must be one of {', '.join(map(repr, rule['choices']))}")
        elif ("low" in rule and not value >= rule["low"]) or ("high" in rule and not value <= rule["high"]):
            errors.append(f"{path}={value!r}: must be in [{rule.get('low', '-inf')}, {rule.get('high', 'inf')}]")
        else:
            values[name] = value
    return cls(**values)
