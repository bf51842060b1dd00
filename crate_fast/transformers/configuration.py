"""What config.json says of a CRATE, as transformers reads and writes it."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..checkpoint.constructor import ARGUMENTS, NOT_OF_ALPHA, PUBLISHED_MODEL
from ..checkpoint.hub_config import MEMBERS, OF_A_RUN, ON_HUB
from ..checkpoint.read import TRANSFORM
from ..eval_transform import MAIN, Transform, read_transform
from ..files import shown

CLASSES = 1000  # as of the published models
OF_COMPUTATION = ("backend", "stream", "drop_path")  # how a model is computed is for who loads it to say: not written
UNNAMED = "LABEL_{}"  # what transformers calls a class without a name


class FamilyConfig(PreTrainedConfig):
    """What the configurations of the family have in common."""

    member: ClassVar[str]
    keywords: ClassVar[tuple[str, ...]]
    """Of the class that `member` names."""
    attribute_map = {  # noqa: RUF012 (transformers' own, for all its configurations)
        "num_classes": "num_labels",
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "num_channels": "channels",
    }

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    dim: int = 384
    depth: int = 12
    heads: int = 6
    channels: int = 3
    dim_head: int = 64
    dropout: float = 0.0
    emb_dropout: float = 0.0
    ista: float = 0.1
    lambd: float = 0.1
    backend: str = "auto"
    drop_path: float = 0.0
    evaluation: dict[str, Any] | None = None

    def __post_init__(self, **kwargs) -> None:
        model = kwargs.pop("model", self.member)
        if model != self.member:
            raise ValueError(f"model is {shown(model)}; it must be {self.member!r} in a {type(self).__name__}")
        classes = kwargs.pop("num_classes", None)
        names = None if self.evaluation is None else read_transform(self.evaluation).names
        if self.id2label is None and kwargs.get("num_labels") is None:
            if names is not None and classes in (None, len(names)):
                self.id2label = dict(enumerate(names))
            else:
                kwargs["num_labels"] = CLASSES if classes is None else classes
        if self.id2label is not None and self.label2id is None:
            self.label2id = {name: int(label) for label, name in self.id2label.items()}
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As transformers', but the config.json of a training run, which says other things, or of another member of the family
        is refused with a ValueError."""
        if any(name in config_dict for name in OF_A_RUN):
            raise ValueError(
                "this config.json is a run's; crate_fast.load_checkpoint(RUN).save_pretrained(FOLDER) writes a model's"
            )
        member = MEMBERS.get(str(config_dict.get("model_type")), cls.member)
        if member != cls.member:
            raise ValueError(f"this config.json is of a {member}, and no {cls.member}; transformers' Auto classes choose by it")
        return super().from_dict(config_dict, **kwargs)

    def arguments(self) -> dict[str, Any]:
        """The keywords of the class that is configured."""
        return {name: getattr(self, name) for name in self.keywords}

    def transform(self) -> Transform | None:
        """How images are evaluated, with the names in `id2label`; None where neither is known."""
        names = self._names()
        if self.evaluation is None:
            return None if names is None else MAIN._replace(names=names)
        return read_transform(self.evaluation)._replace(names=names)

    def _names(self) -> tuple[str, ...] | None:
        """The names of the classes in the order of the logits, None where they have none."""
        labels = {int(label): name for label, name in (self.id2label or {}).items()}
        names = tuple(labels.get(label) for label in range(len(labels)))
        if not names or all(name == UNNAMED.format(label) for label, name in enumerate(names)):
            return None
        return tuple(str(name) for name in names) if None not in names else None

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it: what `CRATE.save_pretrained` writes is in it."""
        values = super().to_dict() | {"num_classes": self.num_labels}
        values |= {} if self.member == PUBLISHED_MODEL else {"model": self.member}
        transform = self.transform()
        left_out = OF_COMPUTATION if transform else (*OF_COMPUTATION, TRANSFORM)
        if transform:
            values[TRANSFORM] = {name: list(v) if isinstance(v, tuple) else v for name, v in transform._asdict().items()}
        return {name: value for name, value in values.items() if name not in left_out}

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`, without what is as transformers has it anyway: numbers in the place of names too."""
        left_out = ("id2label", "label2id") if self._names() is None else ()
        return {name: value for name, value in super().to_diff_dict().items() if name not in left_out}


class CrateConfig(FamilyConfig):
    """The arguments of `crate_fast.CRATE` under their own names, and transformers' own: `num_labels`, `id2label` and the like.

    `num_classes` and `num_labels` are one, as are `dim` and `hidden_size`, `depth` and `num_hidden_layers`, `heads` and
    `num_attention_heads`, `channels` and `num_channels`. Without arguments it is that of CRATE-tiny.

    Args:
        evaluation: how images are made of photographs where the weights were evaluated, and the names of the classes, as
            CRATE's files have it: {"crop", "mean", "std", "names"}; where `id2label` is given, that has the names.
        backend, stream, drop_path: of `crate_fast.CRATE`; not written to config.json.
        others: of `crate_fast.CRATE`, which checks them when a model is built.

    Raises:
        ValueError: `evaluation` says nothing that can be done to an image; in `from_pretrained`, the file is a run's.
    """

    member = "CRATE"
    model_type = ON_HUB[member].model_type
    keywords = (*ARGUMENTS, *OF_COMPUTATION)

    pool: str = "cls"
    step: str = "ista"
    stream: str = "auto"


class CrateAlphaConfig(FamilyConfig):
    """As `CrateConfig`, of `crate_fast.CRATEAlpha`; without arguments it is that of CRATE-α-Ti/16."""

    member = "CRATEAlpha"
    model_type = ON_HUB[member].model_type
    keywords = (*(name for name in (*ARGUMENTS, *OF_COMPUTATION) if name not in NOT_OF_ALPHA), "init_values")

    dim: int = 192
    heads: int = 3
    init_values: float | None = None
