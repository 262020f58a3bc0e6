"""Build the site offline, into `_docs`: `python tools/build_site.py`.

The published site is made by Quarto in a GitHub workflow (`nbdev-docs`). Quarto is not on PyPI, so here nbdev processes the notebooks
exactly as it does for Quarto, and smalldocs renders them from the same `_quarto.yml`."""
import html, re, shutil, sys
from pathlib import Path, PurePosixPath

import nbdev.doclinks, nbdev.serve
from math_core import LatexError, LatexToMathML
from nbdev.config import get_config
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from smalldocs.config import BuildError, ConfigError, load
from smalldocs.site import Site

ROOT = Path(__file__).resolve().parents[1]
# What smalldocs says that it does not read in `_quarto.yml` and the notebooks. The first two are done below, the third in styles.css;
# the others ask for Quarto's Markdown output.
KNOWN = 'output-file is not read', 'html-math-method is ignored', 'grid is ignored', 'keep-md is ignored', 'format commonmark', 'format-links'


class BookSite(Site):
    "A smalldocs site that does three more of the things Quarto does for nbdev"
    tex = LatexToMathML(fancy_error=False)

    def read(self, src):
        "Name the page as nbdev's front matter asks: `07_core.ipynb` becomes `core.html`"
        page = super().read(src)
        if name := page.front.get('output-file'): page.out = src.with_name(name)
        return page

    def find_page(self, target):
        "Find a page by what it is built to as well as by what it is built from"
        return super().find_page(target) or next((p for p in self.pages.values() if p.out == target), None)

    def resolve(self, href, page, record=True):
        "Turn a link to the published site, as nbdev writes them for names in backticks, into one within this site"
        url = self.project.website['site-url'].rstrip('/') + '/'
        return super().resolve('/' + href[len(url):] if href.startswith(url) else href, page, record)

    def render_page(self, page):
        "Turn TeX into MathML, which browsers draw without a script, as `html-math-method: mathml` asks"
        super().render_page(page)
        def math(m):
            tex = html.unescape(m['tex'])
            try: return self.tex.convert_with_local_state(tex, displaystyle=m['kind'] == 'display')
            except LatexError as e: raise BuildError(f'{page.src}: {tex}: {e}') from None
        page.html = re.sub(r'<span class="math (?P<kind>inline|display)">\\[(\[](?P<tex>.*?)\\[)\]]</span>', math, page.html, flags=re.S)
        page.env['math'] = False


def process():
    "Process the notebooks as `nbdev-docs` does before it calls Quarto; return the folder they are in"
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    nbdev_sidebar.__wrapped__()
    return nbdev.serve.proc_nbs()


def render(src, dest):
    "Render the processed notebooks in `src` into `dest`; return what smalldocs had to say"
    site = BookSite(load(src))
    site.out = dest
    if dest.exists(): shutil.rmtree(dest)
    site.build()
    for css in (dest/'site_libs/themes').glob('*.css'): # the theme asks the network for a font; the page's second choice does as well
        css.write_text(re.sub(r'@import\s+url\([^)]*\);?', '', css.read_text(encoding='utf-8')), encoding='utf-8')
    return [w for w in site.warnings if not any(k in w for k in KNOWN)]


if __name__ == '__main__':
    import os
    os.chdir(ROOT)
    try: warnings = render(process(), ROOT/'_docs')
    except (BuildError, ConfigError) as e: sys.exit(f'the site was not built: {e}')
    for w in warnings: print('warning:', w, file=sys.stderr)
    sys.exit(bool(warnings))
