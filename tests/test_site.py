"The site as it is built offline: every chapter has its page, no link is broken, and in a browser search works and maths is drawn"
import ast, functools, html, http.server, os, re, shutil, subprocess, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest, yaml
from fastcore.nbio import read_nb
from nbdev.config import nbpath2html

from distillbook._modidx import d as modidx

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(p.relative_to(NBS) for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


CONTENTS = yaml.safe_load((NBS/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']

def sidebar_entries(contents):
    for o in contents: yield from [o] if isinstance(o, str) else [o['href']] if 'href' in o else sidebar_entries(o['contents'])

def test_sidebar_has_every_notebook_once():
    assert sorted(sidebar_entries(CONTENTS)) == [p.as_posix() for p in NOTEBOOKS]

def test_book_has_one_order():
    "A part is a folder, and the parts stand as the layers do; in a part, reference comes last"
    parts = [o for o in CONTENTS if isinstance(o, dict)]
    folders = [{e.partition('/')[0] for e in sidebar_entries(o['contents'])} for o in parts]
    assert folders == [{o} for o in ('learning', 'rec', 'det', 'data', 'config', 'use', 'experiments')]
    for o in parts:
        sections = [i for i,e in enumerate(o['contents']) if isinstance(e, dict)]
        assert sections in ([], [len(o['contents'])-1])


def markdown(nb): return '\n\n'.join(c.source for c in read_nb(NBS/nb).cells if c.cell_type == 'markdown')

def local_links(md):
    "The links within the book that prose names, outside code"
    prose = re.sub(r'^```.*?^```$|`[^`\n]+`', '', md, flags=re.M | re.S)
    links = re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', prose)
    return [l for l in map(''.join, links) if not re.match(r'\w+:|#', l)]

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=str)
def test_links_work_where_the_notebook_lies(nb):
    "As Jupyter and GitHub follow them; the site's are tested on its pages"
    links = local_links(markdown(nb))
    assert not [l for l in links if l.partition('#')[0].endswith('.html')], 'a link to a chapter ends in .ipynb'
    assert not [l for l in links if not (NBS/nb).parent.joinpath(unquote(l.partition('#')[0])).exists()]

def test_first_chapter_maps_the_book_in_its_order():
    "The end of chapter 0 leads into every part, in the order of the book"
    order = list(sidebar_entries(CONTENTS))
    first = next(e for e in order if '/' in e)
    links = local_links(markdown(first).partition('## Where the book goes from here')[2])
    named = [os.path.normpath(os.path.join(os.path.dirname(first), l.partition('#')[0])).replace(os.sep, '/') for l in links]
    assert set(named) <= set(order)
    parts = list(dict.fromkeys(n.partition('/')[0] for n in named))
    assert parts == list(dict.fromkeys(e.partition('/')[0] for e in order if '/' in e))


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=str)
def test_title_cell_holds_nothing_that_nbdev_drops(nb):
    "nbdev makes front matter of the title's cell: a title, a description of one line. Whatever else stands there is lost on the site."
    lines = next(c for c in read_nb(NBS/nb).cells if c.cell_type == 'markdown').source.split('\n')
    title,description,*lost = filter(str.strip, lines)
    assert title.startswith('# ') and description.startswith('> ')
    assert not lost, f'{nb}: put this into the next cell'

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=str)
def test_imports_stand_in_cells_of_their_own(nb):
    "The build runs every cell that holds an import, so such a cell should do nothing else"
    cells = [{type(o) for o in c.parsed_() or ()} for c in read_nb(NBS/nb).cells if c.cell_type == 'code']
    assert not [c for c in cells if c & {ast.Import, ast.ImportFrom} and c & {ast.Expr, ast.Assign}]


class Page(HTMLParser):
    "The ids, links and files that a page names"
    def __init__(self, text):
        super().__init__()
        self.ids,self.links,self.files = set(),[],[]
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.add(a['id'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag == 'link' and a.get('rel') in ('stylesheet', 'icon'): self.files.append(a['href'])
        if tag in ('img', 'script', 'source') and a.get('src'): self.files.append(a['src'])


@pytest.fixture(scope='module')
def site():
    "The folder of the built site; a warning of the build, such as a broken link, fails here"
    res = subprocess.run([sys.executable, 'tools/build_site.py'], cwd=ROOT, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    return ROOT/'_docs'

@pytest.fixture(scope='module')
def pages(site): return {p.relative_to(site).as_posix(): Page(p.read_text(encoding='utf-8')) for p in site.rglob('*.html')}

def test_every_notebook_has_its_page(pages): assert set(pages) == {nbpath2html(p).as_posix() for p in NOTEBOOKS}


def target(page, href):
    "The page and the id that `href` leads to from `page`"
    u = urlsplit(href)
    path = os.path.normpath(os.path.join(os.path.dirname(page), unquote(u.path))) if u.path else page
    return ('index.html' if path == '.' else path), unquote(u.fragment)

def test_no_link_within_the_site_is_broken(site, pages):
    bad,n = [],0
    for name,page in pages.items():
        for href in page.links:
            if re.match(r'[\w+.-]+:', href): continue
            path,anchor = target(name, href)
            n += 1
            if not (site/path).exists() or anchor and path in pages and anchor not in pages[path].ids: bad.append((name, href))
    assert not bad
    assert n > len(pages)**2 # each page's sidebar links to all the others

def test_pages_use_only_files_of_the_site(site, pages):
    bad = [(name, f) for name,page in pages.items() for f in page.files
           if not f.startswith('data:') and not (site/target(name, f)[0]).exists()]
    assert not bad

def test_links_to_the_published_site_stay_within_this_one(pages):
    host = modidx['settings']['doc_host']
    assert not [(name, l) for name,page in pages.items() for l in page.links if l.startswith(host)]

def test_every_public_name_is_documented_where_the_index_says(pages):
    syms = {s: where for mod in modidx['syms'].values() for s,(where,_) in mod.items()}
    names = {s: mod for mod,d in modidx['syms'].items() for s in d}
    public = [s for s in syms if '.' not in (n := s.removeprefix(names[s]+'.')) and not n.startswith('_')]
    assert public
    assert not [s for s in public if (t := target('', syms[s]))[0] not in pages or t[1] not in pages[t[0]].ids]

def test_readme_links_to_files_that_exist():
    local = local_links((ROOT/'README.md').read_text(encoding='utf-8'))
    assert local
    assert not [l for l in local if not (ROOT/l.partition('#')[0]).exists()]

def test_no_signature_stands_above_the_source_that_begins_with_it(site):
    "`def f(` of an exported cell is on its page once"
    text = (site/'learning/losses.html').read_text(encoding='utf-8')
    text = html.unescape(re.sub(r'<[^>]+>', '', text))
    assert len(re.findall(r'^\s*def kd\(', text, re.M)) == 1


FLAGS = '''--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --window-size=1400,1000'''.split()

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    "Headless Chromium; without it these tests are skipped, but not in CI"
    from selenium import webdriver
    chrome = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    driver = shutil.which('chromedriver', path=os.pathsep.join(filter(None, [os.environ.get('CHROMEWEBDRIVER'), os.environ['PATH']])))
    if not (chrome and driver):
        why = 'no Chromium with its chromedriver (Debian: apt-get install chromium chromium-driver)'
        pytest.fail(why) if os.environ.get('CI') else pytest.skip(why)
    opts = webdriver.ChromeOptions()
    opts.binary_location = chrome
    for f in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]: opts.add_argument(f)
    b = webdriver.Chrome(options=opts, service=webdriver.ChromeService(driver))
    b.implicitly_wait(10)
    yield b
    b.quit()

@pytest.fixture(scope='module')
def url(site):
    "The built site, served on this machine"
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()


def test_search_finds_a_name_and_leads_to_it(browser, url):
    browser.get(url)
    browser.find_element('css selector', '#quarto-search input').send_keys('UserError')
    found = browser.find_elements('css selector', '.smalldocs-search-results a')
    hit = next(a for a in found if a.get_attribute('href') == url + 'learning/core.html#usererror')
    assert hit.is_displayed()
    hit.click()
    assert browser.find_element('id', 'usererror').is_displayed()
    assert browser.current_url == url + 'learning/core.html#usererror'

def test_search_says_when_it_finds_nothing(browser, url):
    browser.get(url)
    browser.find_element('css selector', '#quarto-search input').send_keys('zzqqxxjj')
    assert browser.find_element('css selector', '.smalldocs-search-results .search-none').is_displayed()


# For each page: its formulas; those of no size; fractions whose halves do not lie one above the other; TeX and links that were left as text;
# pictures that did not load; what came from elsewhere; and what sticks out of the column of text and cannot be scrolled.
LOOK = r'''
const all = s => [...document.querySelectorAll(s)], box = e => e.getBoundingClientRect(), math = all('main math'), main = document.querySelector('main');
const scrolls = e => e !== main && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
return {
    math: math.length,
    flat: math.filter(e => box(e).width < 2 || box(e).height < 4).map(e => e.textContent),
    fractions: all('main mfrac').length,
    fallen: all('main mfrac').filter(f => box(f.children[0]).bottom > box(f.children[1]).top + 1).map(e => e.textContent),
    text: all('main p, main li').map(e => e.cloneNode(true)).map(e => (e.querySelectorAll('code, math').forEach(c => c.remove()), e.textContent))
        .filter(t => /\$[^$]+\$|\\[(\[]|\\frac|\\sum|\]\(/.test(t)),
    unseen: all('img').filter(e => !(e.complete && e.naturalWidth)).map(e => e.src.slice(0, 80)),
    foreign: performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith(location.origin) && !n.startsWith('data:')),
    wide: all('main *').filter(e => box(e).right > box(main).right + 2 && !scrolls(e)).map(e => e.tagName + ' ' + e.textContent.slice(0, 80)),
}'''

WIDTHS = 1300, 400 # A laptop and a phone

@pytest.fixture(scope='module')
def looks(browser, url, pages):
    "What is to be seen on each page; `wide` at each width"
    def resize(width): browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=900, deviceScaleFactor=1, mobile=False))
    def look(name):
        resize(WIDTHS[0])
        browser.get(url + name)
        o = browser.execute_script(LOOK)
        resize(WIDTHS[1])
        return o | {'wide': [o['wide'], browser.execute_script(LOOK)['wide']], 'page': browser.execute_script('return document.documentElement.scrollWidth')}
    yield {name: look(name) for name in pages}
    browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})

def test_maths_is_drawn_and_links_are_links(looks):
    assert not {n: (o['flat'], o['fallen'], o['text']) for n,o in looks.items() if o['flat'] or o['fallen'] or o['text']}
    assert looks['learning/losses.html']['math'] > 3
    assert sum(o['fractions'] for o in looks.values()) > 0

def test_pictures_load_and_nothing_comes_from_elsewhere(looks):
    assert not {n: (o['unseen'], o['foreign']) for n,o in looks.items() if o['unseen'] or o['foreign']}

def test_nothing_sticks_out_of_the_page(looks):
    assert not {n: o['wide'] for n,o in looks.items() if any(o['wide'])}
    assert not {n: o['page'] for n,o in looks.items() if o['page'] > WIDTHS[1]}
