"""From scores to a keep that meets the budget.

Units of one group cost the same, so the best ones of each group are kept and the question is how
many. That is a knapsack whose cost is a polynomial of the counts. Going down from the full network,
the units with the least score per price go first, prices taken anew as the network shrinks; small
networks are then improved by exchanges between the groups, from several starts. Residual branches
that may go whole are a second choice around that one: a branch has units or it is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
from scipy import sparse

from jaxkd import errors
from jaxkd.graph.trace import ChannelGroup, Graph, Keep
from jaxkd.search import blocks as blocking

# Share of the surplus that is removed at today's prices before prices are taken anew.
STRIDE = 0.1
# Who asks for a budget wants it used up: below the first share, worth counts only the second.
FULL, DISCOUNT = 0.99, 0.985
# Sums of floats are exact to about this share.
RESOLUTION = 1e-13
# So many solutions are simply all tried; exchanges, with at most so many groups, in so many sweeps.
TRIED, EXCHANGED, SWEEPS = 20_000, 64, 4
# With at most so many branches all choices of them are looked at.
BRANCHES = 8


class Problem(NamedTuple):
    """Which counts are allowed, what they are worth, and what they use of every budget.

    A level is an index into the counts that a group may have, from the fewest to the most.

    Attributes:
      counts: int [levels] of each group, ascending.
      gains: float [levels] of each group: the sum of the scores of the units that a level has more
        than the level below it.
      constant, weights: axes' positions alive are `constant + weights @ counts`: float [axes],
        sparse [axes, groups].
      factors: int [terms, arity], the axes that a term multiplies; `axes` stands for a factor 1.
      shares: float [budgets, terms], what a term uses of each budget, times its factors.
      branches: sets of groups that go together: where one of a set has no unit, none of them has,
        as far as it is in no smaller set. Only groups in them have 0 among their counts, and those
        that have no unit left, as their only one.
    """

    counts: list[np.ndarray]
    gains: list[np.ndarray]
    constant: np.ndarray
    weights: sparse.csr_array
    factors: np.ndarray
    shares: np.ndarray
    branches: tuple[frozenset[int], ...] = ()


def select(
    graph: Graph,
    scores: Mapping[str, np.ndarray],
    *,
    flops: float | None = None,
    params: float | None = None,
    activations: float | None = None,
    latency: float | None = None,
    blocks: blocking.Blocks = (),
    round_to: int = 1,
    min_keep: float = 1,
    held: Keep | None = None,
    avoided: Mapping[str, Collection[int]] | None = None,
    among: Keep | None = None,
) -> dict[str, np.ndarray]:
    """Keeps the units with the best score for their price, within all budgets at once.

    Args:
      graph: the traced network.
      scores: float [size] by group name, ≥ 0. Groups without scores are kept whole.
      flops, params, activations, latency: budgets: shares of the full network in (0, 1], or
        absolute numbers above 1 (of latency: milliseconds); None or 1 sets no limit. A budget in
        latency needs a graph from `jaxkd.with_latency`.
      blocks: 'auto' or pairs of a pattern and settings; see `jaxkd.search.blocks.resolve`. A
        block's own budget holds for its layers; `strength`, `resource`, `start` and `end` are for a
        search, and set nothing here.
      round_to: every group keeps a multiple of so many channels, or all; 8 suits the lanes of TPUs
        and GPUs.
      min_keep: of the groups to which no block gives another: a float is a share.
      held: groups keep at least as many units as here, or the next number below that the rounding
        allows: whatever is within the budgets can be held.
      avoided: numbers of units that a group does not keep, by its name.
      among: the units that there are, of every group; others are not kept.

    Returns:
      The keep: at most the budget, and near it: within the cost of a few units. Of a residual
      branch that goes whole no group keeps any.

    Raises:
      BudgetError: where the limits of groups and blocks, or the rounding, leave more than the
        budget.
      ConfigError: for scores, budgets, a rounding or a `min_keep` that cannot be.
    """
    budgets = blocking.budgets(
        graph, blocks, flops=flops, params=params, activations=activations, latency=latency
    )
    problem, best = _pose(graph, scores, budgets, blocks, round_to, min_keep, held, avoided, among)
    return graph.complete(_kept(graph, problem, best, solve(problem)))


def floor(
    graph: Graph,
    asked: float | None = None,
    *,
    scores: Mapping[str, np.ndarray] | None = None,
    blocks: blocking.Blocks = (),
    round_to: int = 1,
    among: Keep | None = None,
    **budget: float | None,
) -> float:
    """What is kept of every group: a `min_keep` for `select` that the budgets allow.

    It is what was `asked` for. By default it is an eighth of the width at which a network that is
    as narrow everywhere meets the budgets, with FLOPs and parameters going as the square of the
    width: so much that layers far narrower than the others still let something through, and little
    enough that a stage of no use can go almost whole (benchmarks/results/ablation.json). One unit
    where the budgets cannot be met with that. Groups without `scores` are kept whole; without any,
    those that are frozen are. `among`: see `select`.

    Raises:
      BudgetError: where they cannot be met at all, or not with what was asked for.
    """
    budgets = blocking.budgets(graph, blocks, **budget)
    squares = ('flops', 'params')
    widths = [(b.most / b.full) ** (0.5 if b.resource in squares else 1.0) for b in budgets]
    if scores is None:
        scores = {group.name: np.ones(group.size) for group in graph.groups if not group.frozen}
    pose = functools.partial(_pose, graph, scores, budgets, blocks, round_to, among=among)
    if asked is None:
        least = min(widths, default=0.0) / 8
        try:
            pose(least)
        except errors.BudgetError:
            asked = 1
        else:
            return least
    pose(asked)
    return asked


def check_round_to(round_to: int) -> None:
    if not errors.is_whole(round_to) or round_to < 1:
        raise errors.ConfigError('round_to', round_to, why='it must be an int of at least 1')


def step(group: ChannelGroup, round_to: int) -> int:
    """Of how many units a group keeps a multiple, for its channels to be one of `round_to`."""
    return round_to // math.gcd(round_to, group.channels)


def _ranked(
    name: str, size: int, scores: Mapping[str, np.ndarray], among: Keep | None
) -> np.ndarray:
    """The units of a group that there are, best first; equal ones in their order."""
    score = checked(f'scores[{name!r}]', scores.get(name, np.zeros(size)), size)
    order = np.argsort(-score, kind='stable')
    return order if among is None else order[among[name][order]]


def checked(field: str, score: np.ndarray, size: int) -> np.ndarray:
    """What a user says that each unit of a group of this size is worth, as float64 [size].

    Raises:
      ConfigError: for another shape, and for what is not finite or less than 0.
    """
    try:
        found = np.asarray(score, float)
    except (TypeError, ValueError):  # words, or rows of different lengths
        found = np.full(0, np.nan)
    if found.shape != (size,) or not np.isfinite(found).all() or (found < 0).any():
        why = f'it must be {size} finite numbers ≥ 0, one for each unit of the group'
        raise errors.ConfigError(field, score, why=why)
    return found


def check_names(field: str, names: Iterable[str], groups: Collection[str]) -> None:
    """Refuses what no group is called."""
    for name in names:
        if name not in groups:
            raise errors.ConfigError(field, name, allowed=groups)


def rounded(
    graph: Graph, limits: Mapping[str, blocking.Limits], round_to: int
) -> dict[str, blocking.Limits]:
    """Limits whose least numbers are such as a group may keep."""
    return {
        name: dataclasses.replace(
            limit, least=int(_allowed(graph.by_name[name], limit, round_to)[0])
        )
        if limit.least
        else limit
        for name, limit in limits.items()
    }


def _allowed(group: ChannelGroup, limit: blocking.Limits, round_to: int) -> np.ndarray:
    """How many units the group may keep, unless it goes whole: int [levels], rising."""
    numbers = np.arange(limit.least or limit.some, limit.most + 1)
    free = numbers[~np.isin(numbers, list(limit.avoided))]
    numbers = free if len(free) else numbers
    multiples = numbers[(numbers % step(group, round_to) == 0) | (numbers == group.size)]
    return multiples if len(multiples) else numbers[-1:]  # limits between two multiples


def _pose(
    graph: Graph,
    scores: Mapping[str, np.ndarray],
    budgets: Sequence[blocking.Budget],
    blocks: blocking.Blocks,
    round_to: int,
    min_keep: float,
    held: Keep | None = None,
    avoided: Mapping[str, Collection[int]] | None = None,
    among: Keep | None = None,
) -> tuple[Problem, dict[str, np.ndarray]]:
    """The problem that these limits make, and the units of each group, best first.

    Raises:
      BudgetError: if it has no solution.
    """
    check_round_to(round_to)
    check_names('scores', scores, graph.by_name)
    check_names('held', held or (), graph.by_name)
    check_names('avoided', avoided or (), graph.by_name)
    limits = blocking.resolve(graph, blocks, min_keep)
    best = {group.name: _ranked(group.name, group.size, scores, among) for group in graph.groups}
    for name, limit in limits.items():
        most = min(limit.most, len(best[name]))
        least, some = min(limit.least, most), min(limit.some, most)
        limits[name] = dataclasses.replace(limit, least=least, some=some, most=most)
    for name, numbers in (avoided or {}).items():
        limits[name] = dataclasses.replace(limits[name], avoided=frozenset(numbers))
    for name, units in (held or {}).items():
        # The multiple below, so that what is held costs no more than it does.
        numbers = _allowed(graph.by_name[name], limits[name], round_to)
        below = numbers[numbers <= units.sum()]
        if len(below):
            limits[name] = dataclasses.replace(limits[name], least=int(below[-1]))
    problem = _problem(graph, scores, best, limits, budgets, round_to)
    least_levels = np.zeros(len(best), int)
    blocking.check_reachable(
        graph,
        budgets,
        _kept(graph, problem, best, least_levels),
        lambda: _obstacles(graph, scores, blocks, round_to, min_keep, held),
    )
    return problem, best


def _obstacles(
    graph: Graph,
    scores: Mapping[str, np.ndarray],
    blocks: blocking.Blocks,
    round_to: int,
    min_keep: float,
    held: Keep | None,
) -> str:
    """What raises the least that groups keep, in words; else the groups that are frozen."""
    by_blocks = blocking.resolve(graph, blocks)
    asked = blocking.resolve(graph, blocks, min_keep)
    multiples = rounded(graph, asked, round_to)
    free = [group.name for group in graph.groups if not group.frozen and group.name in scores]
    named = sorted({by_blocks[name].block for name in free if by_blocks[name].least > 1})
    whole = [g.name for g in graph.groups if not g.frozen and g.name not in scores]
    found = [
        f'blocks {", ".join(named)}' if named else '',
        f'min_keep={min_keep}' if any(asked[n].least > by_blocks[n].least for n in free) else '',
        f'round_to={round_to}' if any(multiples[n].least > asked[n].least for n in free) else '',
        f'groups without a score {", ".join(whole)}' if whole else '',
        'what is held' if held else '',
    ]
    frozen = sorted(group.name for group in graph.groups if group.frozen)
    return ', '.join(filter(None, found)) or f'frozen groups {", ".join(frozen)}'


def _kept(
    graph: Graph, problem: Problem, best: Mapping[str, np.ndarray], levels: np.ndarray
) -> dict[str, np.ndarray]:
    """The keep that a level of each group makes."""
    keep = {}
    for (name, order), counts, level in zip(best.items(), problem.counts, levels, strict=True):
        keep[name] = np.zeros(graph.sizes[name], bool)
        keep[name][order[: counts[level]]] = True
    return keep


def _problem(
    graph: Graph,
    scores: Mapping[str, np.ndarray],
    best: Mapping[str, np.ndarray],
    limits: Mapping[str, blocking.Limits],
    budgets: Sequence[blocking.Budget],
    round_to: int,
) -> Problem:
    names = [group.name for group in graph.groups]
    # Where nothing is known of what a branch is worth, it stays.
    there = {name for name, order in best.items() if len(order)}
    branches = {
        frozenset(map(names.index, branch & there))
        for name, limit in limits.items()
        if limit.least == 0 and name in there and scores.keys() & (branch := graph.emptied([name]))
    }
    going = {names[i] for branch in branches for i in branch}
    counts, gains = [], []
    for group in graph.groups:
        limit = limits[group.name]
        number = len(best[group.name])
        if group.frozen or group.name not in scores or not number:
            allowed = np.array([number])
        else:
            allowed = _allowed(group, limit, round_to)
        score = np.asarray(scores.get(group.name, np.zeros(group.size)), float)
        score = score[best[group.name]][: allowed[-1]]
        gain = np.add.reduceat(score, [0, *allowed[:-1]]) if number else [0.0]
        none = [0] * (group.name in going)  # with no unit, nothing is gained
        counts.append(np.array([*none, *allowed]))
        gains.append(np.array([*none, *gain], float))

    index = {name: i for i, name in enumerate(names)}
    polynomial = graph.polynomial
    entries = [
        (row, index[name], weight.mean())
        for row, form in enumerate(polynomial.forms)
        for name, weight in form.weights.items()
    ]
    rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
    axes = len(polynomial.forms)
    weights = sparse.csr_array((values, (rows, columns)), shape=(axes, len(counts)), dtype=float)
    terms = [term for term in polynomial.terms if any(term.resource == b.resource for b in budgets)]
    factors = np.full((len(terms), max((len(t.forms) for t in terms), default=0)), axes)
    for row, term in enumerate(terms):
        factors[row, : len(term.forms)] = term.forms
    shares = np.array(
        [
            [
                term.coefficient / budget.most
                if term.resource == budget.resource
                and (budget.layers is None or term.layer in budget.layers)
                else 0.0
                for term in terms
            ]
            for budget in budgets
        ]
    ).reshape(len(budgets), len(terms))
    constant = np.array([float(form.constant) for form in polynomial.forms])
    branches = tuple(sorted(branches, key=sorted))
    return Problem(counts, gains, constant, weights, factors, shares, branches)


def solve(problem: Problem) -> np.ndarray:
    """The level of each group with the most worth within all budgets: int [groups]."""
    if not len(problem.shares):
        return np.array([len(counts) - 1 for counts in problem.counts])
    return _solve_branches(problem) if problem.branches else _solve_units(problem)


def _solve_branches(problem: Problem) -> np.ndarray:
    """Decides which branches go whole, and solves for the units of the others.

    Every choice is tried where there are few. Otherwise branches are removed and put back one at a
    time as long as that is better, with the units settled quickly, from none and from all removed.
    """
    number = len(problem.branches)
    # By sums of what is only an order, the best unit of all would decide alone, and other branches
    # go for another unit beside it, however much of the budget is left.
    judged = _by_place(problem) if _Solver(problem).ordinal else problem

    @functools.cache
    def merit(removed: frozenset[int], solve_units: Callable[[Problem], np.ndarray]) -> float:
        levels = solve_units(_without(problem, removed))
        solver = _Solver(_without(judged, removed))
        usage = solver.usage(levels).max()
        return solver.merit(levels) if usage <= 1 else -usage

    def union(chosen: Iterable[int]) -> frozenset[int]:
        return frozenset[int]().union(*(problem.branches[i] for i in chosen))

    def climb(chosen: frozenset[int]) -> frozenset[int]:
        for _ in range(SWEEPS):
            before = chosen
            for i in range(number):
                chosen = max(
                    chosen, chosen ^ {i}, key=lambda branches: merit(union(branches), _settled)
                )
            if chosen == before:
                break
        return union(chosen)

    choices = range(2**number) if number <= BRANCHES else ()
    every = {union(i for i in range(number) if bits >> i & 1) for bits in choices}
    sizes = [math.prod(map(len, _without(problem, removed).counts)) for removed in every]
    if not every or sum(sizes) > TRIED:
        every = {climb(frozenset()), climb(frozenset(range(number)))}
    # Of what is worth the same, the one without more branches.
    removed = max(
        sorted(every, key=sorted), key=lambda removed: (merit(removed, _solve_units), len(removed))
    )
    levels = _solve_units(_without(problem, removed))
    # Where a group is not removed, its lowest level in the rest is the second one here.
    above = [int(i not in removed and _may_go(counts)) for i, counts in enumerate(problem.counts)]
    return levels + above


def _may_go(counts: np.ndarray) -> bool:
    """Whether a group with these counts can keep units or none."""
    return len(counts) > 1 and counts[0] == 0


def _without(problem: Problem, removed: frozenset[int]) -> Problem:
    """The problem that is left once these groups are removed, and the others are not."""
    counts, gains = [], []
    for i, (numbers, gain) in enumerate(zip(problem.counts, problem.gains, strict=True)):
        levels = slice(0, 1) if i in removed else slice(int(_may_go(numbers)), None)
        counts.append(numbers[levels])
        gains.append(gain[levels])
    return problem._replace(counts=counts, gains=gains, branches=())


def _by_place(problem: Problem) -> Problem:
    """The problem in which units are worth their place in the order of the scores, 0 for none."""
    solver = _Solver(problem)
    per_unit = solver.gain / np.maximum(solver.units, 1)
    _, places = np.unique([0.0, *per_unit], return_inverse=True)
    return problem._replace(gains=np.split(places[1:] * solver.units, solver.first[1:]))


def _settled(problem: Problem) -> np.ndarray:
    """A quick solution for the units."""
    solver = _Solver(problem)
    return solver.settle(solver.top)


def _solve_units(problem: Problem) -> np.ndarray:
    """The level of each group, where no branch goes."""
    solver = _Solver(problem)
    if not solver.comparable or len(problem.counts) > EXCHANGED:
        return solver.settle(solver.top)
    if math.prod(map(len, problem.counts)) <= TRIED:
        return solver.best_of_all()
    return solver.exchange(max(map(solver.settle, solver.starts()), key=solver.merit))


class _Solver:
    """A problem with its levels in one vector, group after group, and the moves on it."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.top = np.array([len(counts) - 1 for counts in problem.counts])
        self.counts = np.concatenate(problem.counts).astype(float)
        self.worth = np.concatenate([np.cumsum(gains) for gains in problem.gains])
        self.first = np.cumsum([0, *(self.top + 1)])[:-1]  # of each group's levels
        # The step from the level below to each level: what it brings, and how many units.
        self.group = np.repeat(np.arange(len(self.top)), self.top + 1)
        self.level = np.arange(len(self.group)) - self.first[self.group]
        self.gain = np.concatenate(problem.gains)
        self.units = np.diff(self.counts, prepend=0.0)
        # Worth per unit, for the way down: within a group no step goes before those above it.
        self.value = np.empty(len(self.group))
        for first, top in zip(self.first, self.top, strict=True):
            inside = slice(first + 1, first + top + 1)
            per_unit = self.gain[inside] / self.units[inside]
            self.value[inside] = np.maximum.accumulate(per_unit[::-1])[::-1]

    @property
    def comparable(self) -> bool:
        """Whether sums of worth tell solutions apart, or scores are so far apart that they only
        make an order."""
        gains = self.gain[(self.level > 0) & (self.gain > 0)]
        return not len(gains) or gains.min() > RESOLUTION * self.worth.max()

    @property
    def ordinal(self) -> bool:
        """Whether most scores are nothing in a sum with the largest."""
        gains = self.gain[(self.level > 0) & (self.gain > 0)]
        return len(gains) > 0 and np.median(gains) <= RESOLUTION * self.worth.max()

    def usage(self, levels: np.ndarray) -> np.ndarray:
        """What the network uses of every budget: float [budgets], 1 where it is used up."""
        return self.problem.shares @ self._alive(levels)[self.problem.factors].prod(1)

    def prices(self, levels: np.ndarray) -> np.ndarray:
        """∂usage/∂counts: float [budgets, groups]."""
        factors = self.problem.factors
        values = self._alive(levels)[factors]
        axes = len(self.problem.constant)
        slopes = np.zeros((len(self.problem.shares), axes + 1))
        for place in range(factors.shape[1]):
            others = np.delete(values, place, axis=1).prod(1)
            for row, share in zip(slopes, self.problem.shares, strict=True):
                row += np.bincount(factors[:, place], share * others, minlength=axes + 1)
        return slopes[:, :-1] @ self.problem.weights

    def _alive(self, levels: np.ndarray) -> np.ndarray:
        """The positions alive on every axis, and a 1 for the factors that are none."""
        counts = self.counts[self.first + levels]
        return np.append(self.problem.constant + self.problem.weights @ counts, 1.0)

    def merit(self, levels: np.ndarray) -> float:
        """The worth, discounted where no budget is used up."""
        worth = float(self.worth[self.first + levels].sum())
        return worth if self.usage(levels).max() >= FULL else DISCOUNT * worth

    def best_of_all(self) -> np.ndarray:
        """The solution with the most merit; of equal ones that which uses the most."""
        levels = np.indices(self.top + 1).reshape(len(self.top), -1).T
        counts = self.counts[self.first + levels]
        alive = np.pad(counts @ self.problem.weights.T, ((0, 0), (0, 1)))
        alive += np.append(self.problem.constant, 1.0)
        usage = (alive[:, self.problem.factors].prod(2) @ self.problem.shares.T).max(1)
        worth = self.worth[self.first + levels].sum(1)
        merit = np.where(usage >= FULL, worth, DISCOUNT * worth)
        return levels[np.lexsort((usage, np.where(usage <= 1, merit, -1.0)))[-1]]

    def starts(self) -> Iterator[np.ndarray]:
        """The full network; and with each group at its middle or its least."""
        yield self.top
        for group in np.flatnonzero(self.top):
            for level in (self.top[group] // 2, 0):
                start = self.top.copy()
                start[group] = level
                yield start

    def settle(self, levels: np.ndarray, hold: int | None = None) -> np.ndarray:
        """Down to the budgets, then up again as far as they allow; `hold` is not lowered."""
        return self._up(self._down(levels, hold))

    def _down(self, levels: np.ndarray, hold: int | None) -> np.ndarray:
        levels = levels.copy()
        movable = self.level > 0
        if hold is not None:
            movable &= self.group != hold
        while (over := np.maximum(self.usage(levels) - 1, 0)).any():
            steps = np.flatnonzero(movable & (self.level <= levels[self.group]))
            if not len(steps):  # the group that is held takes it all
                return np.zeros_like(levels)
            price = (over @ self.prices(levels))[self.group[steps]]
            ratio = self.value[steps] / np.maximum(price, 1e-300)
            saving, goal = price * self.units[steps], STRIDE * float(over @ over)
            order = _smallest(ratio, max(1000, len(ratio) // 8))
            saved = np.cumsum(saving[order])
            if saved[-1] < goal:
                order = np.argsort(ratio)
                saved = np.cumsum(saving[order])
            number = 1 + np.searchsorted(saved, goal)
            levels -= np.bincount(self.group[steps[order[:number]]], minlength=len(levels))
        return levels

    def _up(self, levels: np.ndarray, stay: int | None = None) -> np.ndarray:
        levels = levels.copy()
        open_ = levels < self.top
        if stay is not None:
            open_[stay] = False
        while True:
            usage = self.usage(levels)
            groups = np.flatnonzero(open_ & (levels < self.top))
            steps = self.first[groups] + levels[groups] + 1
            # A price never exceeds what a unit adds, so a step whose price does not fit cannot.
            price = self.prices(levels)[:, groups] * self.units[steps]
            fits = (price <= (1 - usage)[:, None]).all(0)
            if usage.max() >= FULL:  # what is worth nothing only serves to use the budget up
                fits &= self.gain[steps] > 0
            if not fits.any():
                return levels
            ratio = np.where(fits, self.gain[steps] / np.maximum(usage @ price, 1e-300), -1.0)
            chosen = groups[np.argmax(ratio)]
            levels[chosen] += 1
            if self.usage(levels).max() > 1:
                levels[chosen] -= 1
                open_[chosen] = False

    def exchange(self, levels: np.ndarray) -> np.ndarray:
        """Moves one group up or down and lets the others settle, as long as that is better."""
        for _ in range(SWEEPS):
            before = levels
            for group, step in [(g, s) for g in np.flatnonzero(self.top) for s in (1, -1)]:
                moved = levels.copy()
                moved[group] += step
                if not 0 <= moved[group] <= self.top[group]:
                    continue
                moved = self.settle(moved, hold=group) if step > 0 else self._up(moved, stay=group)
                if self.usage(moved).max() <= 1:
                    levels = max(levels, moved, key=self.merit)
            if levels is before:
                break
        return levels


def _smallest(values: np.ndarray, number: int) -> np.ndarray:
    """The indices of the `number` smallest values, ascending."""
    if number < len(values):
        chosen = np.argpartition(values, number)[:number]
        return chosen[np.argsort(values[chosen])]
    return np.argsort(values)
