"""The pages as a browser shows them, of a real run. Skipped where there is no Chromium."""

import html
import json
import re
import shutil
import subprocess

from PIL import Image
import pytest

from jaxkd import pipeline, report
from tests import tiny

BROWSER = next(
    filter(
        None, map(shutil.which, ('chromium-headless-shell', 'chromium', 'google-chrome', 'chrome'))
    ),
    None,
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason='needs chromium')

SECTIONS = [
    'Result',
    'Channels kept',
    'Cost by block',
    'The search',
    'Training',
    'Classes',
    'Speed',
    'Do it again',
]
# The page as it is, in a frame as wide as a telephone, is measured from outside: scripts of its own
# are forbidden to it.
FRAME = """<!DOCTYPE html><body><iframe srcdoc="{page}" style="width:390px;height:800px"></iframe>
<script>onload = () => {{
  const inside = document.querySelector('iframe').contentDocument;
  const out = [...inside.querySelectorAll('*')].filter(
    (e) => !e.closest('.scroll') && e.getBoundingClientRect().right > 390.5);
  const found = {{
    width: inside.documentElement.scrollWidth,
    out: out.map((e) => e.outerHTML.slice(0, 80)),
    sections: [...inside.querySelectorAll('h2')].map((e) => e.textContent),
  }};
  document.body.textContent = JSON.stringify(found);
  console.log('measured');
}}</script>"""


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('page') / 'work'
    pipeline.run(tiny.get_config(), folder)
    return folder


def browse(path, *flags):
    """What the browser writes to standard output; whatever the page says on its console fails."""
    done = subprocess.run(
        [
            BROWSER,
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            '--hide-scrollbars',
            '--host-resolver-rules=MAP * ~NOTFOUND',
            '--enable-logging=stderr',
            *flags,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
    return done.stdout, said


def measured(path, tmp_path):
    frame = tmp_path / 'frame.html'
    frame.write_text(FRAME.format(page=html.escape(path.read_text())))
    dom, said = browse(frame, '--dump-dom')
    assert len(said) == 1 and 'measured' in said[0], said
    return json.loads(html.unescape(re.search(r'<body>(.*)</body>', dom, re.S)[1]))


def test_a_run_on_a_telephone(workdir, tmp_path):
    found = measured(workdir / 'report.html', tmp_path)
    assert found == {'width': 390, 'out': [], 'sections': SECTIONS}


def test_runs_beside_each_other_on_a_telephone(workdir, tmp_path):
    other = tmp_path / 'a-run-with-a-long-name-in-which-no-line-can-be-broken'
    shutil.copytree(workdir, other)
    path = tmp_path / 'comparison.html'
    assert report.main([str(workdir), str(other), f'--out={path}']) == 0
    found = measured(path, tmp_path)
    assert found == {'width': 390, 'out': [], 'sections': ['Results', 'Accuracy against cost']}


def test_light_and_dark(workdir, tmp_path):
    papers = []
    for scheme in (1, 0):  # Blink's numbers for light and dark
        picture = tmp_path / f'{scheme}.png'
        _, said = browse(
            workdir / 'report.html',
            '--window-size=1200,1200',
            f'--screenshot={picture}',
            f'--blink-settings=preferredColorScheme={scheme}',
        )
        assert not said
        with Image.open(picture) as image:
            colours = image.convert('RGB').getcolors(1 << 24)
            papers.append(sum(image.convert('RGB').getpixel((2, 2))) / 3)
        assert len(colours) > 50, scheme
    assert papers[0] > 240 and papers[1] < 40


def test_what_is_folded_is_printed(workdir, tmp_path):
    page = (workdir / 'report.html').read_text()
    short = tmp_path / 'short.html'
    short.write_text(re.sub(r'<details>.*</details>', '', page, flags=re.S))
    pages = []
    for path in (workdir / 'report.html', short):
        pdf = tmp_path / f'{path.stem}.pdf'
        browse(path, f'--print-to-pdf={pdf}')
        pages.append(len(re.findall(rb'/Type\s*/Page\b', pdf.read_bytes())))
    assert pages[0] > pages[1] > 1, pages
