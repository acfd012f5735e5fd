"""Pages of HTML for people: a run, and several runs beside each other.

A page is one file that needs nothing else: no network, no scripts, which its own policy forbids.
Whatever comes from data or a config (names of classes and layers, settings) is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import html
import importlib.resources
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxkd import charts, watch
from jaxkd import workdir as records

if TYPE_CHECKING:
    from jaxkd.report import Curve

Rows = Sequence[Mapping[str, Any]]

# A page that asks for anything from anywhere, or runs a script, has been tampered with.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
RESOURCES = {
    'flops': 'Multiply-adds',
    'params': 'Parameters',
    'activations': 'Activations, bytes',
    'peak_activations': 'Peak activations, bytes',
}
# So many of the classes whose accuracy has changed most.
CHANGED = 20


class Cost(NamedTuple):
    """What a part of the network costs in the teacher and in the compact network."""

    name: str
    flops: tuple[float, float]
    params: tuple[float, float]


class Network(NamedTuple):
    """A point in a comparison of runs.

    Attributes:
      label: which runs it is of.
      kind: 'teacher' or 'compact'.
      accuracy, flops, params: of it.
    """

    label: str
    kind: str
    accuracy: float
    flops: float
    params: float


def run(
    report: Mapping[str, Any],
    rows: Rows,
    searches: Mapping[str, Mapping[str, Curve]],
    command: str | None = None,
) -> str:
    """The page of a run. What its report does not have, since it is of an older one, is left out.

    Args:
      report: as `report.json` has it.
      rows: of its metrics.
      searches: the curves of each budget, by the stage that searched.
      command: that the run was started with.
    """
    config = report['config']
    title = f'{config["model"]["name"]} on {config["data"]["name"]}'
    sections = [
        _result(report),
        _channels(report['blocks']) if report.get('blocks') else '',
        _costs(report['layers']) if report.get('layers') else '',
        *(_search(stage, curves, report) for stage, curves in searches.items() if curves),
        _training(rows, report) if rows else '',
        _classes(report) if 'classes' in report else '',
        _speed(report),
        _repeat(report, command),
    ]
    return _page(title, _lead(report), sections)


def comparison(
    results: Sequence[Sequence[str]],
    settings: Sequence[Sequence[str]],
    networks: Sequence[Network],
    fronts: Mapping[str, Sequence[int]],
    data: Sequence[str],
) -> str:
    """The page of several runs.

    Args:
      results: the rows of their table; the first has the names of the columns.
      settings: those of a table of what differs in their configs; empty where nothing does.
      networks: the points of the charts.
      fronts: by resource, which of the networks none is better than.
      data: the names of the data sets.
    """
    drawn = [
        _figure(
            f'Accuracy against {RESOURCES[resource].lower()}',
            charts.scatter(
                [
                    charts.Point(
                        getattr(network, resource),
                        network.accuracy,
                        network.label,
                        f'{network.kind} of {network.label}: {network.accuracy:.2%}, '
                        f'{watch.count(getattr(network, resource))}',
                        network.kind,
                    )
                    for network in networks
                ],
                front,
                title=f'Accuracy against {RESOURCES[resource].lower()}',
                about='The table above has the numbers.',
                x=RESOURCES[resource].lower(),
            ),
        )
        for resource, front in fronts.items()
    ]
    mixed = ', whose accuracies do not compare' if len(data) > 1 else ''
    lead = f'<p>{len(results) - 1} runs on {_e(", ".join(data))}{mixed}.</p>'
    return _page(
        'Runs beside each other',
        lead,
        [
            _section('Results', _table(results, left=(1, len(results[0]) - 1))),
            _section(
                'Accuracy against cost',
                '<p>Filled points are compact networks, rings their teachers, numbered as in the '
                'table. The dotted line joins the networks that no other is as good as at their '
                'cost or less.</p>' + _columns(drawn),
            ),
            _section('What differs', _table(settings)) if settings else '',
        ],
    )


def by_block(layers: Iterable[Mapping[str, Any]]) -> list[Cost]:
    """The costs of layers added up over the modules that they are in, at the first level that has
    several.

    >>> cost = {'flops': {'teacher': 4, 'compact': 1}, 'params': {'teacher': 4, 'compact': 1}}
    >>> by_block([{'layer': f'net/{name}', **cost} for name in ('a/b', 'a/c', 'd')])
    [Cost(name='a', flops=(8, 2), params=(8, 2)), Cost(name='d', flops=(4, 1), params=(4, 1))]
    """
    paths = [(tuple(row['layer'].split('/')), row) for row in layers]
    level = 0
    while len(paths) > 1 and all(len(path) > level + 1 for path, _ in paths):
        if len({path[level] for path, _ in paths}) > 1:
            break
        level += 1
    blocks: dict[str, Cost] = {}
    for path, row in paths:
        name = path[level]
        sums = blocks.get(name, Cost(name, (0, 0), (0, 0)))
        blocks[name] = Cost(
            name,
            *(
                (before[0] + row[key]['teacher'], before[1] + row[key]['compact'])
                for key, before in (('flops', sums.flops), ('params', sums.params))
            ),
        )
    return list(blocks.values())


def _page(title: str, lead: str, sections: Iterable[str]) -> str:
    style = importlib.resources.files('jaxkd').joinpath('page.css').read_text(encoding='utf-8')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{_e(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n'
        f'<header>\n<h1>{_e(title)}</h1>\n{lead}\n</header>\n<main>\n'
        f'{"".join(sections)}</main>\n</body>\n</html>\n'
    )


def _lead(report: Mapping[str, Any]) -> str:
    teacher, compact = report['teacher'], report['compact']
    points = 100 * (compact['accuracy'] - teacher['accuracy'])
    than = 'as often as the teacher'
    if round(points, 2):
        than = f'{abs(points):.2f} points {"more" if points > 0 else "less"} often than the teacher'
    seconds = sum(report.get('seconds', {}).values())
    facts = [
        f'seed {report["seed"]}' if 'seed' in report else '',
        f'{watch.duration(seconds)} of training' if seconds else '',
        f'on {report["device"]}' if 'device' in report else '',
        f'jaxkd {report["versions"]["jaxkd"]}' if 'versions' in report else '',
    ]
    flops, params = (
        _saving(teacher[key], compact[key], ('fewer', 'more', 'as many'))[0]
        for key in ('flops', 'params')
    )
    return (
        f'<p>A network with {flops} multiply-adds and {params} parameters, made from its teacher. '
        f'It is right on {compact["accuracy"]:.2%} of the test images, {than}.</p>'
        f'<p class="quiet">{_e(" · ".join(filter(None, facts)))}</p>'
    )


def _result(report: Mapping[str, Any]) -> str:
    teacher, compact = report['teacher'], report['compact']
    points = 100 * (compact['accuracy'] - teacher['accuracy'])
    cards = [
        _card(
            'Accuracy',
            f'{compact["accuracy"]:.2%}',
            f'{_signed(points, 2)} points',
            'up' if points > 0 else 'down' if points < 0 else '',
            f'teacher {teacher["accuracy"]:.2%}',
        )
    ]
    for key in ('flops', 'params'):
        cards.append(
            _card(
                RESOURCES[key],
                watch.count(compact[key]),
                *_saving(teacher[key], compact[key], ('smaller', 'larger', 'unchanged')),
                f'teacher {watch.count(teacher[key])}',
            )
        )
    if compact.get('milliseconds') and teacher.get('milliseconds'):
        cards.append(
            _card(
                _inference(report),
                f'{compact["milliseconds"]:.3g} ms',
                *_saving(
                    teacher['milliseconds'],
                    compact['milliseconds'],
                    ('faster', 'slower', 'unchanged'),
                ),
                f'teacher {teacher["milliseconds"]:.3g} ms',
            )
        )
    rows = [('', 'teacher', 'compact', 'compact / teacher')]
    for key, name in RESOURCES.items():
        if key in compact and key in teacher:
            share = f'{compact[key] / teacher[key]:.4f}' if teacher[key] else '–'
            rows.append((name, f'{teacher[key]:,}', f'{compact[key]:,}', share))
    budget = [
        f'{_e(RESOURCES.get(key, key).lower())} at most '
        + (f'{most:g} of the teacher’s' if most <= 1 else f'{most:,g}')
        + (f', reached {report["reached"][key]:.4f}' if key in report.get('reached', {}) else '')
        for key, most in report['budget'].items()
    ]
    notes = f'<p>Budget: {"; ".join(budget)}.</p>' if budget else ''
    if 'ensemble' in report:
        accuracy = report['ensemble']['accuracy']
        notes += f'<p>Several teachers taught; the mean of their logits is at {accuracy:.2%}.</p>'
    for name, why in report.get('inexact', {}).items():
        notes += f'<p>{_e(name)} was cut although other channels then change: {_e(why)}.</p>'
    return _section('Result', f'<div class="cards">{"".join(cards)}</div>{notes}{_table(rows)}')


def _card(name: str, number: str, change: str, style: str, beside: str) -> str:
    return (
        f'<div class="card"><h3>{_e(name)}</h3><p class="number">{_e(number)}</p>'
        f'<p class="change {style}">{_e(change)}</p><p class="quiet">{_e(beside)}</p></div>'
    )


def _saving(teacher: float, compact: float, words: tuple[str, str, str]) -> tuple[str, str]:
    """'2.00× smaller', and the class that colours it; the words are for less, more and as much."""
    if teacher == compact:
        return words[2], ''
    if compact < teacher:
        return f'{teacher / compact:.2f}× {words[0]}', 'up'
    return f'{compact / teacher:.2f}× {words[1]}', 'down'


def _inference(report: Mapping[str, Any]) -> str:
    batch = report.get('inference_batch')
    return f'Inference of {batch} images' if batch else 'Inference'


def _signed(number: float, digits: int) -> str:
    return f'{number:+.{digits}f}'.replace('-', '−')


def _channels(groups: Rows) -> str:
    most = max(max(group['size'], group['kept']) for group in groups)
    whole = sum(group['kept'] == group['size'] for group in groups)
    several = len({group['block'] for group in groups}) > 1
    heads = ['channels', *(['block'] if several else []), '', 'kept', 'of']
    lines = [
        [
            _e(group['group']),
            *([_e(group['block'])] if several else []),
            charts.bar(group['size'], group['kept'], most),
            f'{group["kept"]:,}',
            f'{group["size"]:,}',
        ]
        for group in groups
    ]
    kept, size = (sum(group[key] for group in groups) for key in ('kept', 'size'))
    return _section(
        'Channels kept',
        f'<p>{kept:,} of {size:,} channels. {whole} of {len(groups)} groups of channels, which are '
        'kept or removed together, are as wide as they were.</p>' + _bars(heads, lines),
    )


def _costs(layers: Rows) -> str:
    blocks = by_block(layers)
    tables = []
    for key in ('flops', 'params'):
        costs = {block.name: getattr(block, key) for block in blocks}
        most = max(map(max, costs.values())) or 1
        lines = [
            (
                _e(name),
                charts.bar(teacher, compact, most),
                watch.count(compact),
                watch.count(teacher),
            )
            for name, (teacher, compact) in costs.items()
        ]
        heads = ('block', '', 'now', 'before')
        tables.append(f'<h3>{RESOURCES[key]}</h3>{_bars(heads, lines)}')
    return _section('Cost by block', _columns(tables))


def _search(stage: str, curves: Mapping[str, Curve], report: Mapping[str, Any]) -> str:
    alive, penalties = [], []
    for i, (name, curve) in enumerate(curves.items()):
        colour = f'c{i % charts.COLOURS}'
        steps = curve.steps.tolist()
        alive += [
            charts.Line(f'{name}, alive', steps, curve.alive.tolist(), colour),
            charts.Line(f'{name}, schedule', steps, curve.scheduled.tolist(), f'{colour} dashed'),
        ]
        penalties.append(charts.Line(name, steps, curve.penalty.tolist(), colour))
    about = ' '.join(
        f'{name}: {curve.alive[-1]:.4f} alive at the end, {curve.scheduled[-1]:.4f} scheduled.'
        for name, curve in curves.items()
    )
    error = report.get('search', {}).get('error') if stage == 'search' else None
    told = (
        '<p>Channels pay for what they cost; λ is what is charged, steered so that what is alive '
        'follows the schedule down to the budget.'
    )
    if error is not None:
        told += f' After the first tenth it was never more than {error:.1%} of the network off.'
    return _section(
        'The search' if stage == 'search' else f'The search, {stage.removeprefix("search")}',
        told
        + '</p>'
        + _columns(
            [
                _chart('Cost alive, as a share of the start', alive, about=about),
                _chart('λ', penalties, about='What channels are charged.'),
            ]
        ),
    )


def _training(rows: Rows, report: Mapping[str, Any]) -> str:
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_stage.setdefault(row['stage'], []).append(row)
    bands, start = [], 0
    for stage, own in by_stage.items():
        bands.append(charts.Band(stage, start, start + own[-1]['step']))
        start = bands[-1].stop

    def drawn(measure: str) -> list[charts.Line]:
        found = []
        for band, own in zip(bands, by_stage.values(), strict=True):
            for name, key, style in (
                ('training', measure, 'c0'),
                ('validation', f'validation_{measure}', 'c1'),
            ):
                told = [row for row in own if row.get(key) is not None]
                if told:
                    steps = [band.start + row['step'] for row in told]
                    found.append(charts.Line(name, steps, [row[key] for row in told], style))
        return found

    figures = [
        _chart(name, drawn(measure), about=about, bands=bands, zero=measure == 'loss')
        for name, measure, about in (
            ('Accuracy', 'accuracy', 'Of training and validation images.'),
            ('Loss', 'loss', 'What is minimized, and the cross-entropy of validation.'),
        )
        if drawn(measure)
    ]
    best, seconds = report.get('best', {}), report.get('seconds', {})
    table = [('stage', 'steps', 'time', 'validation', 'best', 'at step')]
    for stage, own in by_stage.items():
        last = [
            row['validation_accuracy'] for row in own if row.get('validation_accuracy') is not None
        ]
        table.append(
            (
                stage,
                f'{own[-1]["step"]:,}',
                watch.duration(seconds.get(stage)),
                f'{last[-1]:.2%}' if last else '–',
                f'{best[stage]["validation_accuracy"]:.2%}' if stage in best else '–',
                f'{best[stage]["step"]:,}' if stage in best else '–',
            )
        )
    told = (
        '<p>The loss of a stage with a teacher is that of its soft targets and the labels, and is '
        'not to be compared with that of the teacher. Validation is always by the labels.</p>'
    )
    for stage, times in report.get('rollbacks', {}).items():
        told += f'<p>{_e(stage)} was rolled back: {_e(json.dumps(times))}.</p>'
    return _section('Training', told + _columns(figures) + _table(table))


def _classes(report: Mapping[str, Any]) -> str:
    classes = report['classes']
    names, images = classes['names'], classes['images']
    shares = [
        (name, number, before / number, after / number)
        for name, number, before, after in zip(
            names, images, classes['teacher'], classes['compact'], strict=True
        )
        if number
    ]
    shares.sort(key=lambda row: -abs(row[3] - row[2]))
    cells = [('class', 'images', 'teacher', 'compact', 'points')]
    for name, number, before, after in shares[:CHANGED]:
        points = _signed(100 * (after - before), 1)
        cells.append((name, f'{number:,}', f'{before:.1%}', f'{after:.1%}', points))
    few = f', the {CHANGED} of {len(shares)} that changed most' if len(shares) > CHANGED else ''
    changed = f'<h3>Accuracy by class{few}</h3>{_table(cells)}'
    if 'confusion' not in report:
        return _section('Classes', changed)
    matrix = charts.matrix(
        report['confusion']['compact'],
        names,
        title='Confusion matrix of the compact network',
        about='Rows are classes, columns answers, both in the order of the names.',
    )
    figure = _figure(
        'What the compact network takes for what',
        f'<div class="scroll matrix">{matrix}</div>',
        'Rows are what images show, columns what was answered; the stronger the colour, the larger '
        'the share of the row.',
    )
    return _section('Classes', _columns([figure, changed]))


def _speed(report: Mapping[str, Any]) -> str:
    cells = [('', 'teacher', 'compact', 'faster')]

    def row(name: str, teacher: float, compact: float) -> None:
        shown = (f'{milliseconds:.3g} ms' for milliseconds in (teacher, compact))
        cells.append((name, *shown, f'{teacher / compact:.2f}×'))

    teacher, compact = report['teacher'], report['compact']
    if compact.get('milliseconds') and teacher.get('milliseconds'):
        row(_inference(report), teacher['milliseconds'], compact['milliseconds'])
    for kind, seconds in report.get('latency', {}).items():
        name = f'Latency of one image, {kind}'
        row(name, 1000 * seconds['teacher'], 1000 * seconds['compact'])
    content = _table(cells) if len(cells) > 1 else ''
    if report.get('export'):
        files = [('file', 'bytes', 'of the full network', 'largest difference')]
        for name, told in report['export'].items():
            if 'error' in told:
                files.append((name, told['error'], '', ''))
            else:
                sizes = (f'{told[key]:,}' for key in ('bytes', 'full_bytes'))
                files.append((name, *sizes, f'{told["difference"]:.0e}'))
        content += '<h3>Exported</h3>' + _table(files)
    return _section('Speed', content) if content else ''


def _repeat(report: Mapping[str, Any], command: str | None) -> str:
    facts = [('', '')]
    for name, value in (
        ('device', report.get('device')),
        ('seed', report.get('seed')),
        ('input', ' × '.join(map(str, report.get('input_shape', ())))),
        *report.get('versions', {}).items(),
    ):
        if value not in (None, ''):
            facts.append((name, str(value)))
    content = f'<p>Started with</p><pre>{_e(command)}</pre>' if command else ''
    if report.get('corrupt_images'):
        content += f'<p>{len(report["corrupt_images"])} images could not be read.</p>'
    content += _table(facts, left=(1,))
    settings = '\n'.join(
        f'{key} = {json.dumps(value, ensure_ascii=False)}'
        for key, value in records.flat(report['config']).items()
    )
    content += f'<details><summary>The whole config</summary><pre>{_e(settings)}</pre></details>'
    return _section('Do it again', content)


def _section(title: str, content: str) -> str:
    return f'<section>\n<h2>{_e(title)}</h2>\n{content}\n</section>\n'


def _columns(parts: Iterable[str]) -> str:
    return f'<div class="columns">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def _figure(title: str, content: str, caption: str = '') -> str:
    caption = f'<figcaption>{_e(caption)}</figcaption>' if caption else ''
    return f'<h3>{_e(title)}</h3><figure>{content}{caption}</figure>'


def _chart(title: str, drawn: Sequence[charts.Line], **how: Any) -> str:
    return _figure(title, charts.legend(drawn) + charts.lines(drawn, title=title, **how))


def _table(rows: Sequence[Sequence[str]], left: Iterable[int] = ()) -> str:
    """A table of texts, which are escaped; those in the columns `left` are flush left."""
    cells = [[_e(text) for text in row] for row in rows]
    return _grid(cells, dict.fromkeys(left, 'left'))


def _bars(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose cells are HTML; the column without a name has bars, and takes the room left."""
    return _grid([heads, *lines], {heads.index(''): 'fill'}, 'bars')


def _grid(rows: Sequence[Sequence[str]], styles: Mapping[int, str], style: str = '') -> str:
    """A table of cells of HTML.

    Args:
      rows: the first has the names of the columns, if they have any. The first cell of each other
        one is its name.
      styles: classes of columns.
      style: class of the table, if it has one.
    """

    def line(row: Sequence[str], scopes: Sequence[str]) -> str:
        cells = []
        for i, (content, scope) in enumerate(zip(row, scopes, strict=True)):
            tag = 'th' if scope else 'td'
            told = f' scope="{scope}"' if scope else ''
            told += f' class="{styles[i]}"' if i in styles else ''
            cells.append(f'<{tag}{told}>{content}</{tag}>')
        return f'<tr>{"".join(cells)}</tr>'

    named = ['col' if name else '' for name in rows[0]]
    head = f'<thead>{line(rows[0], named)}</thead>' if any(named) else ''
    body = ''.join(line(row, ['row', *[''] * (len(row) - 1)]) for row in rows[1:])
    opened = f'<table class="{style}">' if style else '<table>'
    return f'<div class="scroll">{opened}{head}<tbody>{body}</tbody></table></div>'


def _e(value: Any) -> str:
    return html.escape(str(value))
