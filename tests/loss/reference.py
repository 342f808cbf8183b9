"""Every loss once more, slow and obvious: one request at a time, from the formulas of the specification alone.

A request is the list of its present items; a missing item does not exist here. "Mean over the batch" pools the items
(pairs, entries, requests: whatever the formula averages) of all requests of the batch. ``still`` repeats the scores for
everything behind a stop-gradient: a numerical derivative moves ``scores`` and leaves ``still`` alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

EPSILON = 1e-6
KEPT = {
    "two_stage": {"retrieval": 30, "rank": 20},
    "three_stage": {"retrieval": 40, "prerank": 30, "rank": 20},
    "four_stage": {"retrieval": 40, "prerank": 30, "rank": 20, "rerank": 15},
}
STAGES = {setting: tuple(kept) for setting, kept in KEPT.items()}
GROUPS_SEEN = {  # bce; retrieval sees all
    "two_stage": {"rank": 2},
    "three_stage": {"rank": 2, "prerank": 4},
    "four_stage": {"rerank": 2, "rank": 3, "prerank": 4},
}
ICC_WEIGHTS = {"two_stage": (1, 1), "three_stage": (1, 2, 4), "four_stage": (1, 2, 4, 8)}
ICC_CUTS = {"two_stage": (30, 30), "three_stage": (40, 30, 30), "four_stage": (40, 30, 20, 20)}
NUM_RELEVANT = 10


@dataclass(frozen=True)
class Request:
    """The present items of one request; one entry an item in every list."""

    scores: Mapping[str, Sequence[float]]  # by stage
    still: Mapping[str, Sequence[float]]  # equal to the scores; constant to the gradient
    labels: Sequence[int]
    group: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_ground_truth(self) -> int:
        """K."""
        return min(NUM_RELEVANT, sum(group == 0 for group in self.group))


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def bce_of_logit(x: float, target: bool) -> float:
    return softplus(-x) if target else softplus(x)


# ---- sorting ---------------------------------------------------------------------------------------------------------


def softmax(row: np.ndarray) -> np.ndarray:
    exponential = np.exp(row - row.max())
    return exponential / exponential.sum()


def neural_sort(scores: Sequence[float], tau: float) -> np.ndarray:
    s, n = np.array(scores, dtype=np.float64), len(scores)
    spread = np.array([np.abs(s - value).sum() for value in s])
    return np.array([softmax(((n + 1 - 2 * j) * s - spread) / tau) for j in range(1, n + 1)])


def soft_sort(scores: Sequence[float], tau: float) -> np.ndarray:
    s = np.array(scores, dtype=np.float64)
    return np.array([softmax(-np.abs(jth_largest - s) / tau) for jth_largest in sorted(s, reverse=True)])


SORTS = {"neural_sort": neural_sort, "soft_sort": soft_sort}


def label_matrix(labels: Sequence[int]) -> np.ndarray:
    return neural_sort(labels, 1e-4)


def mean_of_entries(permutations: Iterable[np.ndarray], label_matrices: Iterable[np.ndarray]) -> float:
    """Mean of -log(P + eps) Y over all N * N entries."""
    return mean(
        value
        for p, y in zip(permutations, label_matrices, strict=True)
        for value in (-np.log(p + EPSILON) * y).ravel().tolist()
    )


@dataclass(frozen=True)
class Selection:
    """top_k and rest_k, and what is added to both inside a logarithm."""

    top: np.ndarray
    rest: np.ndarray
    epsilon: float = EPSILON

    @property
    def log_top(self) -> np.ndarray:
        return log(self.top + self.epsilon)

    @property
    def log_rest(self) -> np.ndarray:
        return log(self.rest + self.epsilon)


def log(x: np.ndarray) -> np.ndarray:
    """log EPSILON stands for log 0."""
    return np.log(np.where(x == 0, EPSILON, x))


def selection(request: Request, stage: str, operator: str, tau: float, k: int) -> Selection:
    if operator not in SORTS:
        return by_threshold(operator, request.scores[stage], tau, k)
    permutation = SORTS[operator](request.scores[stage], tau)
    total = SORTS[operator](request.still[stage], tau).sum(axis=0) + EPSILON
    return Selection(permutation[:k].sum(axis=0) / total, permutation[k:].sum(axis=0) / total)


def logistic(x: np.ndarray) -> np.ndarray:
    return np.array([sigmoid(value) for value in x])


def laplace(x: np.ndarray) -> np.ndarray:
    return np.array([math.exp(value) / 2 if value <= 0 else 1 - math.exp(-value) / 2 for value in x])


def clip(x: np.ndarray) -> np.ndarray:
    return np.clip(x, 0, 1)


SHARES = {"dftopk": logistic, "lml": logistic, "lapsum": laplace, "sparse_topk": clip}


def by_threshold(operator: str, scores: Sequence[float], tau: float, k: int) -> Selection:
    """F((s - b) / tau): b by its formula (dftopk), the others' by halving an interval until sum p = k."""
    s, n, share = np.array(scores, dtype=np.float64), len(scores), SHARES[operator]
    epsilon = EPSILON if operator == "sparse_topk" else 0.0
    if not 0 < k < n:
        return Selection(np.full(n, float(k > 0)), np.full(n, float(k <= 0)), epsilon)
    ordered = sorted(scores, reverse=True)
    if operator == "dftopk":
        x = (s - (ordered[k - 1] + ordered[k]) / 2) / tau
        return Selection(share(x), share(-x), epsilon)
    centre = (ordered[k - 1] + ordered[k]) / 2
    x, low, high = (s - centre) / tau, -abs(s - centre).max() / tau - 50, abs(s - centre).max() / tau + 50
    for _ in range(200):
        b = (low + high) / 2
        low, high = (b, high) if share(x - b).sum() > k else (low, b)
    return Selection(share(x - b), 1 - share(x - b) if operator == "sparse_topk" else share(b - x), epsilon)


def selection_terms(chosen: Selection, truth: np.ndarray, k: int) -> list[float]:
    """-log(top + eps) gt - log(rest + eps) rest of every item."""
    gt, rest = truth[:k].sum(axis=0), truth[k:].sum(axis=0)
    return list(-chosen.log_top * gt - chosen.log_rest * rest)


# ---- the methods: requests (none of them empty), setting, weights, options -> terms and "loss" ----------------------

Requests = Sequence[Request]
Weights = Mapping[str, float]
Terms = dict[str, float]


def bce(requests: Requests, setting: str, weights: Weights) -> Terms:
    terms = {}
    for stage in STAGES[setting]:
        groups_seen = GROUPS_SEEN[setting].get(stage, math.inf)
        terms[stage] = mean(
            bce_of_logit(score, group == 0)
            for request in requests
            for score, group in zip(request.scores[stage], request.group, strict=True)
            if group < groups_seen
        )
    return terms | {"loss": sum(terms.values())}


def icc(requests: Requests, setting: str, weights: Weights) -> Terms:
    def inside(scores: Sequence[float], k: int) -> np.ndarray:
        threshold = sorted(scores, reverse=True)[min(k, len(scores)) - 1]
        return np.array([sigmoid((score - threshold) / 1e-3) for score in scores])

    values = []
    for request in requests:
        s = [np.array(request.scores[stage]) for stage in STAGES[setting]]
        kept = [inside(scores.tolist(), cut) for scores, cut in zip(s, ICC_CUTS[setting], strict=True)]
        # (1-a) s_retrieval + w_2 a (1-b) s_prerank + ... + w_T a b c ... s_last
        leaves = [1 - share for share in kept[:-1]] + [kept[-1]]
        reaches = [math.prod(kept[:i], start=np.ones(len(request))) for i in range(len(s))]
        parts = zip(ICC_WEIGHTS[setting], reaches, leaves, s, strict=True)
        e, y = sum(weight * reach * leave * scores for weight, reach, leave, scores in parts).tolist(), request.labels
        for m in range(len(request)):
            for n in range(len(request)):
                values.append(bce_of_logit(e[m] - e[n], y[m] > y[n]) if m < n else 0.0)
    return {"loss": mean(values)}


def rankflow(requests: Requests, setting: str, weights: Weights) -> Terms:
    def best(scores: Sequence[float], items: Sequence[int], k: int) -> list[int]:
        return sorted(items, key=lambda item: -scores[item])[:k]

    def worst(scores: Sequence[float], items: Sequence[int], k: int) -> list[int]:
        return sorted(items, key=lambda item: scores[item])[:k]

    values: dict[str, list[float]] = {}

    def add(name: str, more: Iterable[float]) -> None:
        values.setdefault(name, []).extend(more)

    def add_bce(request: Request, stage: str, items: Iterable[int]) -> None:
        add(f"bce.{stage}", (bce_of_logit(request.scores[stage][item], request.group[item] == 0) for item in items))

    def add_mse(request: Request, teacher: str, student: str, items: Iterable[int]) -> None:
        t, s = request.still[teacher], request.scores[student]
        add(f"distill.{student}", ((t[item] - s[item]) ** 2 for item in items))

    def add_order(request: Request, teacher: str, student: str, items: Sequence[int], p: int) -> None:
        t, s = request.still[teacher], request.scores[student]
        margin = mean(s[item] for item in best(t, items, p)) - mean(s[item] for item in worst(t, items, 10))
        add(f"order.{student}", [-math.log(sigmoid(margin))])

    for request in requests:
        reached, before = list(range(len(request))), None
        for stage, quota in KEPT[setting].items():
            add_bce(request, stage, reached)
            if before is not None:
                add_mse(request, stage, before, reached)
                if setting != "two_stage":
                    add_order(request, stage, before, reached, quota)
            reached, before = sorted(best(request.still[stage], reached, quota)), stage
    terms = {name: mean(of_name) for name, of_name in values.items()}
    return terms | {"loss": sum(terms.values())}


def fs_ranknet(requests: Requests, setting: str, weights: Weights) -> Terms:
    def penalties(stage: str, group: int) -> Iterable[float]:
        for request in requests:
            s = request.scores[stage]
            for m in range(len(request)):
                for n in range(len(request)):
                    if request.group[m] == group and request.group[n] > group:
                        yield softplus(-(s[m] - s[n]))

    groups = sorted({group for request in requests for group in request.group})
    terms = {stage: sum(mean(penalties(stage, group)) for group in groups) for stage in STAGES[setting]}
    return terms | {"loss": sum(terms.values())}


def fs_lambdaloss(requests: Requests, setting: str, weights: Weights) -> Terms:
    def discount(x: float) -> float:
        return 1 / math.log(x + 1)

    def of_request(request: Request, stage: str) -> float:
        s, y, n_items = request.scores[stage], request.labels, len(request)
        by_score = sorted(range(n_items), key=lambda item: -request.still[stage][item])
        rank = [by_score.index(item) + 1 for item in range(n_items)]
        ideal = sum(discount(j) * label for j, label in enumerate(sorted(y, reverse=True), start=1))
        gain = [label / ideal if ideal else 0.0 for label in y]
        d = [discount(r) if r <= 30 else 0.0 for r in rank]
        total = 0.0
        for m in range(n_items):
            for n in range(n_items):
                distance = abs(rank[m] - rank[n])
                near = distance > 0 and min(rank[m], rank[n]) <= 30
                u = abs(discount(distance) - discount(distance + 1)) if near else 0.0
                w = abs(gain[m] - gain[n]) * (0.2 * u + 0.8 * abs(d[m] - d[n]))
                total += w * bce_of_logit(s[m] - s[n], y[m] > y[n])
        return total

    terms = {stage: mean(of_request(request, stage) for request in requests) for stage in STAGES[setting]}
    return terms | {"loss": sum(terms.values())}


def arf(requests: Requests, setting: str, weights: Weights, tau: float = 200.0, topk_op: str | None = None) -> Terms:
    """ARF, with an operator ARF-v2."""
    order, order_tau = (SORTS[topk_op], tau) if topk_op in SORTS else (neural_sort, tau if topk_op is None else 200.0)
    truths = [label_matrix(request.labels) for request in requests]
    terms, loss = Terms(), 0.0
    for stage in STAGES[setting] if requests else ():
        m, w = KEPT[setting][stage], weights[stage]
        permutations = [order(request.scores[stage], order_tau) for request in requests]
        kept: list[float] = []
        for request, truth, permutation in zip(requests, truths, permutations, strict=True):
            gt = truth[: request.num_ground_truth].sum(axis=0)
            if topk_op is not None:
                kept += selection_terms(selection(request, stage, topk_op, tau, m), truth, request.num_ground_truth)
            else:
                kept += list(-np.log(permutation[:m].mean(axis=0) + EPSILON) * gt)
        terms |= {f"order.{stage}": mean_of_entries(permutations, truths), f"top.{stage}": mean(kept)}
        loss += math.log(w) + terms[f"order.{stage}"] / (2 * w**2) + terms[f"top.{stage}"]
    return terms | {"loss": loss}


def arf_v2(
    requests: Requests, setting: str, weights: Weights, tau: float = 200.0, topk_op: str = "neural_sort"
) -> Terms:
    return arf(requests, setting, weights, tau, topk_op)


def lcron(
    requests: Requests,
    setting: str,
    weights: Weights,
    tau: float = 50.0,
    topk_op: str = "neural_sort",
    terms: str = "both",
    single_weight: float | None = None,
    weighting: str = "original",
    label_ties: str | None = None,
    end_to_end_quotas: Sequence[int] | None = None,
    single_quotas: Sequence[int] | None = None,
) -> Terms:
    label_ties = label_ties or ("shared" if setting == "two_stage" else "repeated")
    end_to_end: list[float] = []
    single: dict[str, list[float]] = {stage: [] for stage in STAGES[setting]}
    for request in requests:
        k, truth = request.num_ground_truth, label_matrix(request.labels)
        if label_ties == "repeated":
            truth = (truth > 1e-3).astype(np.float64)
        gt = truth[:k].sum(axis=0)
        survives, never_dropped, dropped = np.ones(len(request)), np.ones(len(request)), np.zeros(len(request))
        at_k = [k] * len(single)
        for stage, m, q in zip(STAGES[setting], single_quotas or at_k, end_to_end_quotas or at_k, strict=True):
            single[stage] += selection_terms(selection(request, stage, topk_op, tau, m), truth, k)
            inside = selection(request, stage, topk_op, tau, q)
            dropped = dropped + survives * inside.rest  # 1 - prod top, without cancellation
            survives, never_dropped = survives * inside.top, never_dropped * (1 - inside.rest)
        outcome = Selection(survives, dropped, 0.0) if inside.epsilon == 0 else Selection(survives, 1 - never_dropped)
        end_to_end += list(-outcome.log_top * gt - outcome.log_rest * np.clip(1 - gt, 0, 1))
    e, s = mean(end_to_end), {stage: mean(values) for stage, values in single.items()}
    named = ({} if terms == "single" else {"end_to_end": e}) | ({} if terms == "end_to_end" else s)
    if not requests:
        return named | {"loss": 0.0}
    weighted = {name: value / (2 * weights[name] ** 2) for name, value in named.items() if name in weights}
    log = math.log2 if weighting == "paper" else math.log
    fixed = {name: value * (single_weight or 1 if name in s else 1) for name, value in named.items()}
    return named | {"loss": sum((fixed | weighted).values()) + log(math.prod(weights.values()))}


def sorting(
    requests: Requests, setting: str, weights: Weights, tau: float = 50.0, topk_op: str = "neural_sort"
) -> Terms:
    truths = [label_matrix(request.labels) for request in requests]
    terms = {
        stage: mean_of_entries((SORTS[topk_op](request.scores[stage], tau) for request in requests), truths)
        for stage in STAGES[setting]
    }
    return terms | {"loss": sum(terms.values())}


METHODS: dict[str, Callable[..., Terms]] = {
    function.__name__: function
    for function in (bce, icc, rankflow, fs_ranknet, fs_lambdaloss, arf, arf_v2, lcron, sorting)
}


def weight_names(method: str, setting: str, options: Mapping[str, Any]) -> set[str]:
    """Which trainable weights a method has."""
    if method in ("arf", "arf_v2"):
        return set(STAGES[setting])
    if method != "lcron":
        return set()
    alpha = options.get("weighting") == "paper" and options.get("terms") != "single"
    stages = options.get("single_weight") is None and options.get("terms") != "end_to_end"
    return ({"end_to_end"} if alpha else set()) | (set(STAGES[setting]) if stages else set())
