"""All settings in a row, as the command line, recipes and run directories know them."""

from __future__ import annotations

from typing import Any, NamedTuple

from .checked import choices_of, fields_of, kind_of, read_switch
from .parts import PARTS_BY_SECTION, TrainConfig


class Setting(NamedTuple):
    """A setting: `section` and `text` of the help, the default, its `kind` (bool, int, float or str), its `choices`, if any."""

    name: str
    section: str
    text: str
    default: Any
    kind: type
    choices: tuple[str, ...]


def _section_of(name: str) -> str:
    """What the class that declares a setting is called in the help."""
    declares = next(part for part in reversed(TrainConfig.__mro__) if name in getattr(part, "__pydantic_fields__", ()))
    return next(section for section, parts in PARTS_BY_SECTION.items() if declares in parts)


def _make_table() -> dict[str, Setting]:
    found = [
        Setting(name, _section_of(name), field.description or "", field.default, kind_of(field), choices_of(field))
        for name, field in fields_of(TrainConfig).items()
    ]
    order = list(PARTS_BY_SECTION)
    return {setting.name: setting for setting in sorted(found, key=lambda setting: order.index(setting.section))}


SETTINGS = _make_table()
"""By name, in the order of the help."""


def read_stored(name: str, value: Any) -> Any:
    """The value of a setting as a file or a caller gives it, as `TrainConfig` has it: "yes" of before is True."""
    return read_switch(value) if name in SETTINGS and SETTINGS[name].kind is bool else value
