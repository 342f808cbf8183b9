"""What a batch promises wherever it goes."""

import torch

from deep_components.tables.lookup import TableLookup
from tests.schemas import OWN, random_batch


def test_apply_and_tensors_see_every_tensor_in_one_order() -> None:
    lookup = TableLookup(OWN, {}, {name: table.size for name, table in OWN.tables.items()})
    for batch in (random_batch(OWN), lookup(random_batch(OWN))):
        doubled = batch.apply(lambda tensor: tensor * 2)
        rows = len(getattr(batch.features, "rows", {}))
        assert len(batch.tensors()) == 1 + len(OWN.fields) + 1 + rows + 3
        for one, two in zip(batch.tensors(), doubled.tensors(), strict=True):
            assert torch.equal(one * 2, two)
        assert type(doubled.features) is type(batch.features)


def test_the_rows_of_slots_stay_where_the_tables_are() -> None:
    batch = TableLookup(OWN, {}, {"city": OWN.tables["city"].size})(random_batch(OWN))
    moved = batch.to(torch.device("meta"))
    assert moved.features.rows["city"].device.type == "cpu"
    others = (moved.request_id, *moved.features.item.values(), moved.features.history_mask, moved.targets.mask)
    assert {tensor.device.type for tensor in others} == {"meta"}
