"""How the site documents a name whose source it shows: heading, link and what it is for, then the source.

nbdev calls this when it builds the site (`doc_procs` in pyproject.toml); nothing of the library does. By itself it
would put the signature and all of the docstring above the source that begins with the same signature and docstring."""
import ast, re

SIGNATURE = re.compile(r'^```python\n(?:@.*\n|(?:async )?def |class ).*?^```\n*', re.M | re.S)


def shorten(cell):
    "Of what `show_doc` printed, leave the heading and the first paragraph of the docstring"
    for out in cell.get('outputs', []):
        data = out.get('data', {})
        heading,*docs = SIGNATURE.split(''.join(data.get('text/markdown', '')), maxsplit=1)
        if docs: data['text/markdown'] = heading + docs[0].split('\n\n')[0]

def documented(cell):
    "The name, without that of its class, that a `show_doc` cell documents"
    call = re.search(r'^show_doc\((?:\w+\.)*(\w+)\)', cell.source, re.M)
    return call[1] if call else None


class show_once:
    "A processor of nbdev: put what documents the names of an `exports` cell before it, without their signatures"
    def __init__(self, nb): self.nb = nb

    def begin(self):
        cells = self.nb.cells
        for source in [c for c in cells if c.cell_type == 'code' and 'exports' in c.directives_]:
            names = [o.name for o in ast.parse(source.source).body if hasattr(o, 'name')]
            start = end = cells.index(source)
            while end+1 < len(cells) and documented(cells[end+1]) in names: end += 1
            docs = sorted(cells[start+1:end+1], key=lambda c: names.index(documented(c)))
            for doc in docs: shorten(doc)
            cells[start:end+1] = [*docs, source]
