"""What stands in for pydantic where it is not and cannot be fetched, as on a machine lent for its GPU: nothing is checked.

The names are pydantic's, and do what `checked.py` needs of them.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

print("crate-fast: warning: pydantic is not installed: settings are taken unchecked", file=sys.stderr)


class ValidationError(Exception):
    """Never raised."""


class FieldInfo(NamedTuple):
    annotation: Any
    metadata: list
    default: Any
    description: str


class BeforeValidator(NamedTuple):
    func: Any


AfterValidator, ConfigDict = BeforeValidator, dict


def Field(default: Any, *, description: str, **_) -> Any:
    return dataclasses.field(default=default, metadata={"description": description})


def dataclass(cls: type, **_) -> type:
    made: Any = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    hints = get_type_hints(made, include_extras=True)
    made.__pydantic_fields__ = {
        field.name: FieldInfo(*_split(hints[field.name]), field.default, field.metadata["description"])
        for field in dataclasses.fields(made)
    }
    return made


def _split(hint: Any) -> tuple[Any, list]:
    """A type, and what `Annotated` says besides."""
    if get_origin(hint) is not Annotated:
        return hint, []
    kind, *rest = get_args(hint)
    return kind, rest
