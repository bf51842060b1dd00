"""Settings that pydantic checks as they are made, and that say in a line which one is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args

from typing_extensions import dataclass_transform  # which PyTorch brings; Python 3.10's typing has it not

from ..errors import ConfigError
from ..files import names_something, shown

if TYPE_CHECKING or find_spec("pydantic"):
    from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
    from pydantic.dataclasses import dataclass as checked_dataclass
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails, PydanticCustomError, core_schema
else:
    from .unchecked import AfterValidator, BeforeValidator, ConfigDict, Field, FieldInfo, ValidationError
    from .unchecked import dataclass as checked_dataclass

LARGEST = 1_000_000  # of any size; memory ends long before
SWITCHES = {"no": False, "yes": True}
"""How the command line, and recipes and runs of before, say a switch."""
BOUNDS = {
    **{"greater_than_equal": ("ge", "at least"), "less_than_equal": ("le", "at most")},
    **{"greater_than": ("gt", "above"), "less_than": ("lt", "below")},
}
STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid", defer_build=True)  # `--help` needs none built
Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class OneOf:
    """The names that a text may be; in `Annotated`. For those of a table; what code compares with is a Literal."""

    names: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str | None) -> str | None:
        if value is not None and value not in self.names:
            raise PydanticCustomError("one_of", "no such name")
        return value


def _names_something(value: str) -> str:
    if not names_something(value):
        raise PydanticCustomError("names_nothing", "names nothing")
    return value


def read_switch(value: Any) -> Any:
    """True and False for the words "yes" and "no"; anything else is left as it is."""
    return SWITCHES.get(value, value) if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_names_something)]
Switch = Annotated[bool, BeforeValidator(read_switch)]


class _Told(type):
    """Makes an instance, or says in a line why not. (An `__init__` of ours would be replaced as pydantic builds its own.)"""

    if not TYPE_CHECKING:  # which takes the settings from the class

        def __call__(cls, **settings):
            fields = fields_of(cls)
            for name in settings:
                if name not in fields:
                    raise ConfigError(f"unknown setting {shown(name)}")
            settings = {
                name: read_switch(value) if kind_of(fields[name]) is bool else value for name, value in settings.items()
            }
            try:
                return super().__call__(**settings)
            except ValidationError as error:
                raise ConfigError(_explain(error.errors(include_url=False)[0], fields_of(cls))) from None


class Part(metaclass=_Told):
    """A part of the settings; its classes are `checked`."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def checked(cls: Class) -> Class:
    """A frozen dataclass of `cls`, a `Part`, whose settings are checked as it is made.

    Raises (as it is made):
        ConfigError: a value of the wrong type or out of its bounds, or a name that is no setting's.
    """
    return cast("Class", checked_dataclass(cls, frozen=True, kw_only=True, config=STRICT))


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """The settings of a `checked` class, by name."""
    return cast("Any", cls).__pydantic_fields__


def flag(name: str) -> str:
    """The command line's name of a setting: "batch_size" to "--batch-size"."""
    return f"--{name.replace('_', '-')}"


def listed(words: Iterable[str]) -> str:
    """Words as a sentence has them: a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def as_flag(value: Any) -> Any:
    """`value` as a flag takes it: "yes" and "no" for True and False."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def kind_of(field: FieldInfo) -> type:
    """Of what type a setting is, if it is set: bool, int, float or str."""
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if kind in (bool, int, float)]
    return kinds[0] if kinds else str


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The names that a setting may have, () where there are too many to tell."""
    tables: Iterable[tuple[str, ...]] = (known.names for known in field.metadata if isinstance(known, OneOf))
    return next(iter(tables), tuple(name for name in get_args(field.annotation) if isinstance(name, str)))


def _explain(error: ErrorDetails, fields: dict[str, FieldInfo]) -> str:
    """The error in our words: flag, value, what is allowed."""
    told = error.get("ctx", {}).get("error")
    if isinstance(told, ConfigError):  # of settings that do not fit each other
        return str(told)
    name, value, problem = str(error["loc"][0]), error["input"], error["type"]
    field, word = fields[name], flag(name)
    choices, kind = choices_of(field), kind_of(field)
    if problem == "names_nothing":
        return f"{word} is {shown(value)}, which names nothing"
    if isinstance(value, str) and (choices or kind is bool):
        return f"{word} is {shown(value)}; allowed are {', '.join(choices or SWITCHES)}"
    if problem in BOUNDS:
        bound, words = BOUNDS[problem]
        limit = next(getattr(known, bound) for known in field.metadata if hasattr(known, bound))
        return f"{word} is {shown(value)}; it must be {words} {limit}"
    huge = kind is float and type(value) is int  # beyond any float, else it would have been taken
    if problem == "finite_number" or huge:
        return f"{word} is {'beyond any float' if huge else value}; it must be finite"
    return f"{word} is {shown(value)}; it must be of type {kind.__name__}"
