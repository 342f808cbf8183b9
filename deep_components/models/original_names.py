"""Parameter names: ours <-> those of the paper's original code, one mapping for reading and writing its checkpoints."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

_TABLES = {
    "user": "uid_emb",
    "device": "did_emb",
    "gender": "gender_emb",
    "age": "age_emb",
    "province": "province_emb",
    "video": "vid_emb",
    "author": "aid_emb",
    "category_two": "cate_two_emb",
    "category_one": "cate_one_emb",
    "upload_type": "up_type_emb",
    "weekday": "wday_emb",
    "hour": "hour_emb",
    "minute": "min_emb",
}
_MODULES = {
    "dssm": {"user_tower": "user_encoder", "item_tower": "photo_encoder"},
    "mlp": {"tower": "mlpx"},
    "din": {"attention": "din_mlp", "tower": "mlp"},
}


def to_original(model: str, parameters: Mapping[str, T]) -> dict[str, T]:
    """Parameters of a dssm, mlp or din under the original's names. KeyError for one that the original does not have."""
    tables = {f"embedding.{table}": f"{original}.weight" for table, original in _TABLES.items()}
    return _renamed(parameters, tables, _MODULES[model])


def from_original(model: str, parameters: Mapping[str, T]) -> dict[str, T]:
    """The reverse of :func:`to_original`. KeyError for a name that the original's dssm, mlp or din does not have."""
    tables = {f"{original}.weight": f"embedding.{table}" for table, original in _TABLES.items()}
    return _renamed(parameters, tables, {original: module for module, original in _MODULES[model].items()})


def _renamed(parameters: Mapping[str, T], tables: Mapping[str, str], modules: Mapping[str, str]) -> dict[str, T]:
    renamed = {}
    for name, value in parameters.items():
        module, _, rest = name.partition(".")
        if name not in tables and module not in modules:
            raise KeyError(name)
        renamed[tables[name] if name in tables else f"{modules[module]}.{rest}"] = value
    return renamed
