"""Parameter names: ours <-> those of the paper's original code, one mapping for reading and writing its checkpoints."""

from collections.abc import Mapping

from torch import Tensor

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
_TOWERS = {
    "retrieval": {"user_tower": "user_encoder", "item_tower": "photo_encoder"},
    "prerank": {"tower": "mlpx"},
    "rank": {"attention": "din_mlp", "tower": "mlp"},
}


def original_name(stage: str, name: str) -> str:
    """The original code's name of our parameter ``name`` in the model of ``stage``."""
    module, rest = name.split(".", 1)
    return f"{_TABLES[rest]}.weight" if module == "embedding" else f"{_TOWERS[stage][module]}.{rest}"


def from_original(stage: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in our names from one in the original's names.

    Raises KeyError for a name the model of ``stage`` does not have.
    """
    ours = {original: f"embedding.{field}" for field, original in _TABLES.items()}
    ours |= {original: module for module, original in _TOWERS[stage].items()}
    renamed = {}
    for name, value in state.items():
        module, _, rest = name.partition(".")
        renamed[ours[module] if ours[module].startswith("embedding.") else f"{ours[module]}.{rest}"] = value
    return renamed
