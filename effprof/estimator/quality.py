"""Perplexity of a plan's run: what was published of it, or what published runs around it say.

Runs of different lineages differ by more than methods do, so an answer comes from one of them and
names it. Where no run says anything the answer is None, and ``unknown`` has the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from effprof import published
from effprof.estimator import evidence
from effprof.plan import Plan
from effprof.published import Published
from effprof.units import quantity

if TYPE_CHECKING:
    from effprof.estimator.scaling import Series

BILLION = 10**9
# Beyond the published sizes: the ends that leave-one-out predicts are 2.3 to 5 times off.
SIZE_FACTOR = 2.3
TOKENS_FACTOR = 2  # more or fewer tokens than published: the slope was measured over 1.5


class Quality(NamedTuple):
    """Validation perplexity on C4 after ``tokens`` tokens, as the lineage's own code reports it.

    ``low`` and ``high`` span what a lineage's sources say of a published run, or 90 % of its
    leave-one-out errors. ``unbiased`` is the range that an evaluation without the lineage's
    factor K/(K+1) would report, None where it has none. ``others`` are other lineages' published
    numbers of this plan.
    """

    perplexity: float
    low: float
    high: float
    kind: str
    source: str
    lineage: str
    tokens: int
    unbiased: tuple[float, float] | None
    note: str
    others: tuple[Mapping[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of DESIGN section 4, with what is needed to judge it."""
        pair = None if self.unbiased is None else [round(one, 3) for one in self.unbiased]
        numbers = {key: round(getattr(self, key), 3) for key in ("perplexity", "low", "high")}
        return {**self._asdict(), **numbers, "unbiased": pair, "others": list(self.others)}

    def __str__(self) -> str:
        size = f"C4, {quantity(self.tokens)} tokens"
        if self.kind == "interpolated":
            return f"Expected perplexity {_span(self.low, self.high, 1)} ({size}; {self.source})"
        where = " ".join(self.source.split()[: 2 if self.source.startswith("arXiv") else 1])
        line = f"Published perplexity {_span(self.low, self.high, 2)} ({size}; {where})"
        return line + (f"; unbiased {_span(*self.unbiased, 1)}" if self.unbiased else "")


def _span(low: float, high: float, digits: int) -> str:
    first, last = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return first if first == last else f"{first} to {last}"


def quality(plan: Plan, lineage: str = "") -> Quality | None:
    """The perplexity of a plan's run, from one ``lineage`` if named; None where nothing is known.

    Published numbers first, then interpolated ones, lineages in the order of lineages.toml. Without
    ``plan.tokens`` the published run's. Sources: ``presets/published.csv``.
    """
    found = _answer(plan, lineage)
    return None if isinstance(found, str) else found


def unknown(plan: Plan, lineage: str = "") -> str:
    """Why ``quality`` is None; empty where it is not."""
    found = _answer(plan, lineage)
    return found if isinstance(found, str) else ""


def _answer(plan: Plan, lineage: str) -> Quality | str:
    reason = evidence.outside(plan)
    if reason:
        return reason
    rows = [one for one in published.of(plan.method) if lineage in ("", one.lineage)]
    if not rows:
        return f"no published C4 run of {plan.method}" + (f" in {lineage}" if lineage else "")
    changed, usual_rank = evidence.changed_settings(plan)
    exact: dict[str, list[Published]] = {}
    same = [one for one in rows if evidence.is_run(one, plan, changed, usual_rank)]
    for key in published.lineages():
        own = evidence.of_tokens([one for one in same if one.lineage == key], plan.tokens)
        if own:
            exact[key] = own
    if exact:
        return _published(plan, exact)
    if changed:
        given = ", ".join(f"{key} {value}" for key, value in changed.items())
        return f"no published run of {plan.method} with {given}"
    found = _interpolated(plan, rows)
    here = [one for one in rows if one.model == plan.architecture.name and not one.differs]
    if isinstance(found, str) and here and all(one.settings for one in here):
        return f"published at {plan.model} only with {here[0].settings}"
    return found


def _published(plan: Plan, exact: Mapping[str, list[Published]]) -> Quality:
    key, rows = next(iter(exact.items()))
    first, numbers = rows[0], [one.perplexity or math.nan for one in rows]
    others = [
        {
            "perplexity": one.perplexity,
            "tokens": round(float(one.tokens) * BILLION),
            "lineage": one.lineage,
            "source": _source(one),
        }
        for name, found in exact.items()
        for one in found[:1]
        if name != key
    ]
    return Quality(
        numbers[0],
        min(numbers),
        max(numbers),
        "published",
        _source(first),
        key,
        round(float(first.tokens) * BILLION),
        _unbiased(key, numbers[0]),
        "; ".join([*_remarks(plan, first), *_batch(plan, key)]),
        tuple(others),
    )


def _source(one: Published) -> str:
    return f"{one.citation} ({one.evidence}; {published.lineages()[one.lineage].title})"


def _remarks(plan: Plan, one: Published) -> Iterator[str]:
    """What has to be said beside a published number."""
    if one.remark:
        yield one.remark
    if one.inferred:
        yield f"{' and '.join(one.inferred.split())} inferred from the group's other tables"
    if plan.rank and not one.rank:
        yield "rank not stated"
    if not one.seq_len:
        yield "sequence length not stated"
    if one.counted == "text":
        positions = quantity(round(evidence.counts(one)[-1]))
        yield f"its tokens are text without padding, {positions} positions with it"
    elif one.counted == "positions":
        yield "its tokens are positions, padding included"


def _batch(plan: Plan, lineage: str) -> Iterator[str]:
    batch = published.lineages()[lineage].batch
    if batch and batch != plan.global_batch:
        yield f"published at {batch} rows per update, this plan has {plan.global_batch}"


def _unbiased(lineage: str, perplexity: float) -> tuple[float, float] | None:
    """The reported loss is the mean × K/(K+1): what the mean itself would be."""
    k = published.lineages()[lineage].k
    if k is None:
        return None
    loss = math.log(perplexity)
    return perplexity * math.exp(loss / k[1]), perplexity * math.exp(loss / k[0])


def _interpolated(plan: Plan, rows: list[Published]) -> Quality | str:
    """From the first lineage whose fit reaches this plan, or why none does."""
    reasons = []
    for key in published.lineages():
        own = [one for one in rows if one.lineage == key]
        if own:
            found = _of_lineage(plan, key, own)
            if isinstance(found, Quality):
                return found
            reasons.append(found)
    return reasons[0]


def _of_lineage(plan: Plan, key: str, rows: list[Published]) -> Quality | str:
    from effprof.estimator import scaling  # most plans that are asked about were published

    shared, fits = scaling.fitted()
    series = fits.get(key, {}).get(plan.method)
    if series is None:
        return f"published runs of {plan.method} are too few or too uneven between sizes"
    shape = plan.architecture
    usual = scaling.budget(series, shape.parameters)
    tokens, ratio = plan.tokens or round(usual), plan.rank / shape.hidden if plan.rank else None
    reason = _beyond(plan, series, tokens / usual)
    if reason:
        return reason
    loss = scaling.loss(shared, series, shape.parameters, tokens, ratio)
    half = scaling.half_width(shared, series, shape.parameters, tokens)
    error = f"leave-one-out ±{100 * math.expm1(series.half_width):.1f} %"
    plain = (one for one in rows if one.tokens and not one.differs and not one.settings)
    cited = dict.fromkeys(one.citation for one in plain)
    parts = [f"fitted to {', '.join(cited)}", *_batch(plan, key)]
    if plan.tokens is None:
        parts.insert(0, f"without --tokens {quantity(tokens)}, as published around this size")
    return Quality(
        math.exp(loss),
        math.exp(loss - half),
        math.exp(loss + half),
        "interpolated",
        f"from {published.lineages()[key].title}, {error}",
        key,
        tokens,
        _unbiased(key, math.exp(loss)),
        "; ".join(parts),
        (),
    )


def _beyond(plan: Plan, series: Series, share: float) -> str:
    """Why the fit does not reach a plan of that share of the usual tokens; empty where it does."""
    parameters, sizes = plan.architecture.parameters, [cell[0] for cell in series.cells]
    if plan.seq_len != Plan.seq_len:
        return f"no published run of {plan.method} at {plan.seq_len} positions"
    if not sizes[0] / SIZE_FACTOR <= parameters <= sizes[-1] * SIZE_FACTOR:
        span = f"{quantity(int(sizes[0]))} to {quantity(int(sizes[-1]))} parameters"
        return f"published runs of {plan.method} have {span}"
    if plan.tokens and not 1 / TOKENS_FACTOR <= share <= TOKENS_FACTOR:
        usual = quantity(round(plan.tokens / share))
        return f"published runs near this size saw {usual} tokens"
    if series.fixed is not None and plan.rank != series.fixed:
        return f"published runs of {plan.method} have rank {series.fixed}"
    if series.ratios and plan.rank:
        low, high = (round(one * plan.architecture.hidden) for one in series.ratios)
        if not low <= plan.rank <= high:
            return f"published ranks would be {low} to {high} at this width"
    return ""
