"""Write README.md from `nbs/index.ipynb`: `python tools/readme.py`. With `--check`, write nothing and fail if README.md is not current.

First the notebook's list of chapters is made from `nbs/sidebar.yml`, the one list that there is, and the chapters' own titles. The rest
is what `nbdev-readme` does, without Quarto. Pictures that a cell printed are saved in `nbs/images`, so that they show on GitHub."""
import base64, os, re, sys
from pathlib import Path

import yaml
from fastcore.nbio import read_nb, write_nb
from fastcore.script import call_parse
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, hide_, hide_line, populate_language, rm_export, strip_ansi

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
INDEX = NBS/'index.ipynb'
NOTE = '<!-- Written by tools/readme.py from nbs/index.ipynb; edit that notebook. -->'
LIST = re.compile(r'(<!-- chapters: tools/readme.py makes this list from sidebar.yml -->\n).*?(<!-- end of chapters -->)', re.S)


def title(notebook):
    "A chapter's title, which is its first heading"
    cell = next(c for c in read_nb(NBS/notebook).cells if c.cell_type == 'markdown')
    return cell.source.split('\n')[0].removeprefix('# ')

def links_to(contents):
    "Links to the chapters of one part, those of a section in it after its name"
    items = [f"*{o['section']}*: {links_to(o['contents'])}" if isinstance(o, dict) else f'[{title(o)}]({o})' for o in contents]
    return ' · '.join(items)

def chapters():
    "The list of the book's parts and chapters"
    contents = yaml.safe_load((NBS/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    return ''.join(f"- **{o['section']}**: {links_to(o['contents'])}\n" for o in contents if isinstance(o, dict))

def with_chapters(nb):
    "Bring the list of chapters in a notebook up to date; is it another than before?"
    old = [c.source for c in nb.cells]
    for c in nb.cells: c['source'] = LIST.sub(lambda m: f'{m[1]}{chapters()}{m[2]}', c.source)
    return old != [c.source for c in nb.cells]


def links(md):
    "Point the links of a notebook in `nbs` from the top folder, outside code"
    parts = re.split(r'(^```.*?^```$|`[^`\n]+`)', md, flags=re.M | re.S)
    def fix(m): return m[0] if re.match(r'\w+:|#', m[2]) else m[1] + os.path.normpath(f'nbs/{m[2]}').replace(os.sep, '/')
    parts[::2] = [re.sub(r'(\]\(|<img [^>]*?src="|<a [^>]*?href=")([^)"\s]+)', fix, p) for p in parts[::2]]
    return ''.join(parts)


def fence(text, lang=''): return f'```{lang}\n{text.strip()}\n```'


def output(out, pictures, alt):
    "Markdown for one output of a cell; a picture's bytes go into `pictures`"
    if out.output_type == 'stream': return fence(''.join(out.text)) if out.name == 'stdout' else ''
    data = {k: ''.join(v) for k,v in out.get('data', {}).items() if isinstance(v, (str, list))}
    if 'image/png' in data:
        name = f'nbs/images/index_{len(pictures)}.png'
        pictures[name] = base64.b64decode(data['image/png'])
        return f'![{alt}]({name})'
    if 'text/markdown' in data: return links(data['text/markdown'])
    if 'text/html' in data: return re.sub(r'\n\s*\n', '\n', re.sub(r'<style.*?</style>', '', data['text/html'], flags=re.S))
    return fence(data['text/plain']) if 'text/plain' in data else ''


def readme(nb):
    "README's text and its `{path: bytes}` of pictures for a processed notebook"
    pictures,parts = {},[]
    for c in nb.cells:
        if not (src := (c.get('source') or '').strip()): continue
        if c.cell_type == 'markdown': parts.append(links(src))
        if c.cell_type != 'code': continue
        d = c.directives_
        if d.get('include') == 'false': continue
        if d.get('echo') != 'false': parts.append(fence(src, c.metadata.language))
        if d.get('output') != 'false': parts += [output(o, pictures, d.get('fig-alt', '').strip('"')) for o in c.get('outputs', [])]
    return '\n\n'.join([NOTE, *filter(None, parts)]) + '\n', pictures


@call_parse
def main(check:bool=False): # Write nothing, and fail if README.md, a picture or the list of chapters is not current
    "Write the list of chapters in nbs/index.ipynb, and README.md from that notebook"
    nb = read_nb(INDEX)
    changed = with_chapters(nb)
    if changed and not check: write_nb(nb, INDEX)
    procs = [populate_language, strip_ansi, hide_line, rm_export, clean_magics, hide_]
    p = NBProcessor(INDEX, procs, rm_directives=True)
    p.process()
    text,pictures = readme(p.nb)
    files = {'README.md': text.encode(), **pictures}
    old = {f.relative_to(ROOT).as_posix() for f in (ROOT/'nbs/images').glob('index_*.png')}
    stale = [f for f,b in files.items() if not (ROOT/f).exists() or (ROOT/f).read_bytes() != b] + sorted(old - set(files))
    if check:
        stale += ['the list of chapters']*changed
        sys.exit(f"not current, run python tools/readme.py: {', '.join(stale)}" if stale else 0)
    for f in stale:
        if f not in files: (ROOT/f).unlink(); continue
        (ROOT/f).parent.mkdir(exist_ok=True)
        (ROOT/f).write_bytes(files[f])
