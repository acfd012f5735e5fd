"""What the rows of the headline say: means and spreads, tables, pictures, and pages with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import functools
import json
import os
import pathlib
import re
import statistics
from typing import Any

COLUMNS = (
    'budget',
    'method',
    'accuracy, %',
    'beside the baseline',
    'FLOPs',
    'params',
    'epochs',
    'seeds',
)
# Between a line and another with the same name, pages have what the rows say.
MARKED = re.compile(
    r'(<!-- (\S+): made by benchmarks/headline\.py -->\n).*?(<!-- \2: end -->)', re.DOTALL
)


def words(row: Mapping[str, Any]) -> str:
    """What is compared: a network, a data set and so many labels."""
    return f'{row["network"]}-{row["data"]}-{row["labels"] or "all"}'


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds, and the gain over the baselines of the same seeds."""
    summary = []
    keys = ('network', 'data', 'labels', 'budget', 'method')
    groups = dict.fromkeys(tuple(row[key] for key in keys) for row in rows)
    for group in groups:
        mine = {row['seed']: row for row in rows if tuple(row[key] for key in keys) == group}
        base = {
            row['seed']: row['accuracy']
            for row in rows
            if tuple(row[key] for key in keys) == (*group[:3], '', 'baseline')
        }
        gains = [row['accuracy'] - base[seed] for seed, row in mine.items() if seed in base]
        accuracies = [row['accuracy'] for row in mine.values()]
        summary.append(
            {
                **dict(zip(keys, group, strict=True)),
                'seeds': len(mine),
                'accuracy': statistics.mean(accuracies),
                'spread': statistics.stdev(accuracies) if len(mine) > 1 else None,
                'gain': statistics.mean(gains) if gains else None,
                'interval': _interval(gains),
                **{
                    name: statistics.mean(row[name] for row in mine.values())
                    for name in ('flops', 'params', 'epochs', 'seconds')
                },
                'device': ' / '.join(sorted({row['device'] for row in mine.values()})),
            }
        )
    return summary


def comparisons(
    summary: list[dict[str, Any]],
) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Name; what there is of a network, a data set and so many labels; and their baseline."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in summary:
        groups.setdefault(f'headline-{words(row)}', []).append(row)
    for name, mine in groups.items():
        yield name, mine, next(row for row in mine if row['method'] == 'baseline')


def _interval(gains: list[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean, by Student's t."""
    from scipy import stats

    if len(gains) < 2:
        return None
    quantile = stats.t.ppf(0.975, len(gains) - 1)
    return float(quantile * statistics.stdev(gains) / len(gains) ** 0.5)


def caption(full: dict[str, Any]) -> str:
    """Of a comparison, by its baseline."""
    images = 'all' if full['labels'] is None else f'{full["labels"]:,}'
    return f'{full["network"]}, {full["data"]}, {images} training images'


def tables(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Markdown for each comparison, by name; best first at each budget."""
    found = {}
    for name, mine, full in comparisons(summarize(rows)):
        lines = [
            f'{caption(full)}:',
            '',
            f'| {" | ".join(COLUMNS)} |',
            '| --- ' * len(COLUMNS) + '|',
        ]
        for budget in sorted({row['budget'] for row in mine}):
            there = [row for row in mine if row['budget'] == budget]
            for row in sorted(there, key=lambda row: -row['accuracy']):
                spread = '' if row['spread'] is None else f' ± {100 * row["spread"]:.2f}'
                gain = ''
                if row is not full and row['gain'] is not None:
                    gain = f'{100 * row["gain"]:+.2f}'
                    if row['interval'] is not None:
                        gain += f' ± {100 * row["interval"]:.2f}'
                shares = [f'{row[cost] / full[cost]:.3f}' for cost in ('flops', 'params')]
                cells = [
                    budget or 'none',
                    row['method'],
                    f'{100 * row["accuracy"]:.2f}{spread}',
                    gain,
                    *shares,
                    f'{row["epochs"]:g}',
                    str(row['seeds']),
                ]
                lines.append(f'| {" | ".join(cells)} |')
        found[name] = [*lines, '']
    return found


def draw(rows: list[dict[str, Any]], folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Accuracy against FLOPs and against parameters: a picture for each comparison, by name."""
    import matplotlib

    matplotlib.use('svg')
    matplotlib.rcParams['svg.hashsalt'] = 'headline'  # the same rows make the same file
    from matplotlib import pyplot

    summary, paths = summarize(rows), {}
    # The same colour in all pictures; red is jaxkd's, and grey the baseline's.
    peers = sorted({row['method'] for row in summary if row['budget']} - {'jaxkd'})
    shades = [n for n in (*range(0, 20, 2), *range(1, 20, 2)) if n // 2 not in (3, 7)]
    colors = dict(zip(peers, pyplot.get_cmap('tab20')(shades), strict=False)) | {'jaxkd': '#d1495b'}
    for title, mine, full in comparisons(summary):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout='constrained')
        names = sorted({(row['budget'] != '', row['method']) for row in mine})
        for index, (cut, name) in enumerate(names):
            own = name == 'jaxkd'
            # At the same cost they would hide one another.
            aside = 0.006 * (index - len(names) / 2)
            points = [row for row in mine if row['method'] == name]
            for axis, cost in zip(axes, ('flops', 'params'), strict=True):
                axis.errorbar(
                    [row[cost] / full[cost] + aside for row in points],
                    [100 * row['accuracy'] for row in points],
                    [100 * (row['spread'] or 0) for row in points],
                    fmt='.' if cut and not own else 'o',
                    color=colors.get(name, '#2b2b2b'),
                    mfc='white' if name == 'baseline_long' else None,
                    zorder=3 if own else 2,
                    capsize=2,
                    label=name,
                )
        for axis, cost in zip(axes, ('multiply-adds', 'parameters'), strict=True):
            axis.axhline(100 * full['accuracy'], color='#b9b9b9', lw=1, zorder=1)
            axis.set_xlabel(f'{cost}, share of the full network')
            axis.spines[['top', 'right']].set_visible(False)
        axes[0].set_ylabel('test accuracy, %')
        figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right', frameon=False)
        figure.suptitle(caption(full))
        paths[title] = folder / f'{title}.svg'
        figure.savefig(paths[title], metadata={'Date': None})
        pyplot.close(figure)
    return paths


def tried_table(tried: dict[str, Any]) -> list[str]:
    """Markdown: what was tried for jaxkd's row, beside the same seed as it was."""
    as_it_was = {row['seed']: row['compact'] for row in tried['rows'] if not row['changed']}
    lines = [
        'Tried at half of the multiply-adds with 5,000 images, one seed each',
        '(`benchmarks/results/tried.json`):',
        '',
        '| what | flags | epochs | accuracy, % | beside it as it was | unseen training images, % |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    for row in sorted(tried['rows'], key=lambda row: -row['compact']):
        flags = ' '.join(flag.removeprefix('--config.') for flag in row['changed'])
        gain = 100 * (row['compact'] - as_it_was[row['seed']])
        cells = [
            row['what'],
            f'`{flags}`' if flags else '',
            f'{row["epochs"]:g}',
            f'{100 * row["compact"]:.2f}',
            f'{gain:+.2f}' if row['changed'] else '',
            f'{100 * row["unseen"]:.2f}' if 'unseen' in row else '',
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return [*lines, '']


def write_pages(
    pages: list[pathlib.Path], rows: list[dict[str, Any]], results: pathlib.Path
) -> None:
    """Fills what the rows say between the marks in the pages, each of which names what it has.

    `results` is where tried.json is and the pictures go.
    """
    pictures = draw(rows, results)
    blocks = tables(rows) | {'tried': tried_table(json.loads((results / 'tried.json').read_text()))}
    for page in pages:
        fill = functools.partial(_fill, page, pictures, blocks)
        text, marks = MARKED.subn(fill, page.read_text())
        if not marks:
            raise SystemExit(
                f'{page} needs the lines <!-- NAME: made by benchmarks/headline.py --> and '
                f'<!-- NAME: end -->, NAME one of {", ".join(blocks)}'
            )
        page.write_text(text)
        print(f'wrote {page}')


def _fill(
    page: pathlib.Path,
    pictures: dict[str, pathlib.Path],
    blocks: dict[str, list[str]],
    mark: re.Match[str],
) -> str:
    begin, name, end = mark.groups()
    if name not in blocks:
        raise SystemExit(f'{page}: there is no {name}, but {", ".join(blocks)}')
    lines = blocks[name]
    if name in pictures:
        picture = os.path.relpath(pictures[name], page.parent)
        lines = [f'![accuracy against cost]({picture})', '', *lines]
    return '\n'.join([begin, *lines, end])
