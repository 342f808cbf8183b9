"""The bound that LCRON maximises, prod_i p_i, beside the probability that it bounds and beside the hard cascade.

p_i is an item's share among the first k of stage i, by the run's operator at the run's temperature. What its product
bounds is survival in a cascade with noise: stage i adds t G, with G ~ Gumbel(0, 1) independent for every stage and
item, to its scores, and keeps its best q_i of what the stages before it kept. Let p*_i be the probability that the item
is then among stage i's best q_i of all items. Who is among the best q_i of all is among the best q_i of any part of
them that has it, so that whoever is so in every stage survives; and the stages' noise is independent. For every item

    prod_i p*_i <= P(survives).

LCRON (ICML 2025, arXiv 2503.09492, section 4) has the bound for a cascade whose stages' shares are normalised over what
reached them, and so can only grow. An operator's p_i stand for p*_i: prod_i p_i is a bound as far as they are not
larger. At a cut of K, below q_i, they are smaller, and the bound is looser. Only where a stage keeps one item has p*_i
a closed form, softmax(s / t) (Gumbel-max), which is SoftSort's share among the first 1.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deep_components.cascade import Cascade
from deep_components.dataset.columnar import DayCache
from deep_components.errors import InputError
from deep_components.loss.selection import SELECTION_OPERATORS, select
from deep_components.metrics import survival, survival_by_stage

ITEMS = 5_000  # of a day's own items about so many are looked at: the cost does not grow with the day,
REQUESTS = 50  # but at least so many requests, however long their lists
STANDARD_ERRORS = 3  # by which a product must be above what it bounds to count as a violation

_ENTRIES_PER_CHUNK = 1 << 21  # of requests x stages x samples x items, and of requests x items x items
_MOST_ITEMS = (1 << 31) - 1


def sampled_cascade(
    scores: Sequence[Tensor], mask: Tensor, quotas: Sequence[int], noise: float, samples: int, seeds: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Which items survive the cascade with Gumbel noise, and which every stage alone would keep of all items.

    Each request's noise comes from a generator of its own, and for the items that are there alone: neither the other
    requests nor missing items change a digit.

    Args:
        scores: [R, N] of each stage, in serving order.
        mask: [R, N] bool.
        quotas: q of each stage.
        noise: t, its scale, in the scores' unit; as it tends to 0 every sample is the hard cascade.
        samples: M.
        seeds: [R] int64, of the requests' generators.

    Returns:
        [R, M, N] bool, and the same for each stage alone; False for missing items.
    """
    drawn = _gumbel(mask, len(scores), samples, seeds)
    everything = mask.unsqueeze(1).expand(-1, samples, -1)
    alive, alone = everything, list[Tensor]()
    for stage_scores, gumbel, quota in zip(scores, drawn.unbind(dim=1), quotas, strict=True):
        noisy = stage_scores.double().unsqueeze(1) + noise * gumbel
        alone.append(_best(noisy, everything, quota))
        alive = _best(noisy, alive, quota) if len(alone) > 1 else alone[0]
    return alive, alone


def _gumbel(mask: Tensor, stages: int, samples: int, seeds: Tensor) -> Tensor:
    """Gumbel(0, 1) noise, [R, stages, samples, N] float64; anything for missing items."""
    generator = torch.Generator()
    drawn = torch.full((len(mask), stages, samples, mask.shape[1]), 0.5, dtype=torch.float64)
    for row, present, seed in zip(drawn, mask, seeds.tolist(), strict=True):
        generator.manual_seed(seed)
        row[..., present] = torch.rand(stages, samples, int(present.sum()), dtype=torch.float64, generator=generator)
    smallest = torch.finfo(drawn.dtype).tiny  # instead of 0, which would be noise of -inf
    return drawn.clamp_(min=smallest).log_().neg_().log_().neg_()


def _best(noisy: Tensor, alive: Tensor, quota: int) -> Tensor:
    """The ``quota`` best of those alive, all where there are fewer."""
    if quota >= noisy.shape[-1]:
        return alive
    best = noisy.masked_fill(~alive, -torch.inf).topk(quota, dim=-1, sorted=False).indices
    return torch.zeros_like(alive).scatter(-1, best, True) & alive


def violated(product: Tensor, share: Tensor, samples: int) -> Tensor:
    """Whether a product is above what it should bound, of which ``share`` of so many samples were seen, by more than
    STANDARD_ERRORS of such a share, sqrt(product (1 - product) / samples), and half a sample: counts are whole."""
    product = product.clamp(0, 1)
    error = (product * (1 - product) / samples).sqrt()
    return product - share > STANDARD_ERRORS * error + 0.5 / samples


def keep_some(
    scored: Iterable[Mapping[str, Tensor]], every: int, kept: list[Mapping[str, Tensor]], first: int = 0
) -> Iterator[Mapping[str, Tensor]]:
    """Hand on the batches of :func:`~deep_components.evaluation.day.score_day`; ``kept`` gets the first of every so
    many requests, in file order; ``scored`` begin with the day's request ``first``."""
    passed = first
    for batch in scored:
        index = passed + torch.arange(len(batch["mask"]))
        passed += len(index)
        rows = (index % every == 0).nonzero().squeeze(-1)
        if len(rows):
            kept.append({name: values[rows] for name, values in batch.items()})
        yield batch


@dataclass(frozen=True)
class Bound:
    """Measures how tight the bound of a run is.

    Args:
        operator, temperature: the run's, of ``SELECTION_OPERATORS``.
        cuts: k of each stage in the loss's end-to-end term; None: K, the ground-truth items of a request.
        noise: t.
        samples: M.
        every: of so many requests of the day one is looked at.
    """

    cascade: Cascade
    operator: str
    temperature: float
    cuts: Sequence[int] | None
    noise: float
    samples: int
    every: int

    @torch.inference_mode()
    def measure(self, requests: Mapping[str, Tensor]) -> dict[str, Any]:
        """What metrics.json says: means over the ground-truth items of ``requests``, :func:`keep_some`'s as one batch;
        None where there are none.

        The digits do not depend on how the day was divided into batches; those of the samples not on the threads."""
        width = 1 + int(requests["mask"].any(dim=0).nonzero().amax()) if requests["mask"].any() else 1
        requests = {name: v[:, :width] if v.dim() > 1 else v for name, v in requests.items()}
        entries = max(len(self.cascade.stages) * self.samples, width) * width  # of a request: samples, permutation
        chunk = max(1, _ENTRIES_PER_CHUNK // entries)
        divided = zip(*(values.split(chunk) for values in requests.values()), strict=True)
        parts = [self._columns(dict(zip(requests, part, strict=True))) for part in divided]
        weight, variance = (torch.cat([part.pop(name) for part in parts]) for name in ("weight", "variance"))
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        means = {name: (values * weight).sum() / weight.sum() for name, values in columns.items()}
        means["sampled_error"] = variance.sum().sqrt() / weight.sum()
        found = {f"bound_{name}": mean.item() if mean.isfinite() else None for name, mean in means.items()}
        about = {"bound_noise": self.noise, "bound_samples": self.samples}
        return found | about | {"bound_requests": len(variance), "bound_items": len(weight)}

    def _columns(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The numbers of every ground-truth item, [items] each, and "variance" [R], that of a request's mean number of
        survivors over the samples."""
        mask, quotas = batch["mask"], list(self.cascade.quotas.values())
        scores, relevant = [batch[stage] for stage in self.cascade.stage_names], (batch["group"] == 0) & mask
        weight = survival(batch["labels"].double(), relevant.double(), self.cascade.num_relevant)
        alive, alone = sampled_cascade(scores, mask, quotas, self.noise, self.samples, batch["request_id"])
        sampled = alive.double().mean(dim=1)
        product, at_quotas = self._products(scores, mask, relevant)
        columns = {
            "weight": weight,
            "product": product,
            "product_at_quotas": at_quotas,
            "sampled_product": torch.stack([kept.double().mean(dim=1) for kept in alone]).prod(dim=0),
            "sampled": sampled,
            "hard": survival_by_stage(scores, mask, quotas)[-1],
            "violated": violated(product, sampled, self.samples).double(),
            "violated_at_quotas": violated(at_quotas, sampled, self.samples).double(),
        }
        survivors = (alive * weight.unsqueeze(1)).sum(dim=-1)  # [R, M]
        squares = (survivors - survivors.mean(dim=-1, keepdim=True)).square().sum(dim=-1)
        variance = squares / (self.samples * (self.samples - 1))  # NaN for one sample
        return {name: values[weight > 0] for name, values in columns.items()} | {"variance": variance}

    def _products(self, scores: Sequence[Tensor], mask: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor]:
        """prod_i p_i at the cuts of the loss, and at the quotas. [R, N] each."""
        k = relevant.sum(dim=-1).clamp(max=self.cascade.num_relevant)
        cuts: Sequence[int | None] = self.cuts or [None] * len(scores)
        products = torch.ones(2, *mask.shape, dtype=torch.float64)
        for stage_scores, cut, quota in zip(scores, cuts, self.cascade.quotas.values(), strict=True):
            both = [k if cut is None else torch.full_like(k, cut), torch.full_like(k, quota)]
            chosen = select(self.operator, stage_scores.double(), mask, both, self.temperature)
            products *= torch.stack([selection.top for selection in chosen])
        return products[0], products[1]


def bound_of_run(
    config_file: Path, config: Mapping[str, Any], cascade: Cascade, day: DayCache, samples: int, noise: float | None
) -> Bound | None:
    """The measure of a run, from its config.json; None for one whose loss has no selection operator, or ``samples`` 0.

    ``noise`` None is the run's temperature. InputError for a damaged config.json, and for a ``noise`` of no use."""
    arguments = config["arguments"]
    known = {name: arguments.get(name) for name in _ARGUMENTS}
    if known["topk_op"] is None or known["tau"] is None or not samples:
        if noise is not None:
            raise InputError(f"--bound_noise={noise}: {config_file} is of a loss without selection operator, or "
                             "--bound_samples is 0; leave it out")  # fmt: skip
        return None
    for name, value in known.items():
        if not _ARGUMENTS[name](value, len(cascade.stages)):
            raise InputError(f"{config_file}: field arguments: {name} is damaged; train again")
    every = max(1, min(round(day.num_item_rows / ITEMS), len(day) // REQUESTS))
    cuts = known["end_to_end_quotas"]
    return Bound(cascade, known["topk_op"], known["tau"], cuts, noise or known["tau"], samples, every)


# What the measure needs of a training's arguments: whether a value can be one, in a cascade of so many stages.
_ARGUMENTS: dict[str, Callable[[Any, int], bool]] = {
    "topk_op": lambda value, _: isinstance(value, str) and value in SELECTION_OPERATORS,
    "tau": lambda value, _: type(value) in (int, float) and 0 < value <= sys.float_info.max,
    "end_to_end_quotas": lambda value, stages: value is None or (
        isinstance(value, list) and len(value) == stages
        and all(type(quota) is int and 0 < quota <= _MOST_ITEMS for quota in value)
    ),
}  # fmt: skip
