"""Is the exported code easy on the eye? `python tools/density.py` exits with 1, and names file, cell and line, where it is not.

Short code is good because it is clear, not the other way round. So no exported line is longer than 120 characters, no exported cell
longer than 40 lines, no statement holds eight or more calls, comprehensions and ternaries together, no ternary stands in a ternary,
and comprehensions are not three deep. `--table` prints the figures of every module; `--baseline` complains without failing."""
import ast, re, sys
from collections import namedtuple
from pathlib import Path

from fastcore.script import call_parse

ROOT = Path(__file__).resolve().parents[1]
LINE,CELL,IDEAS,DEPTH = 120,40,8,2
COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
IDEA = ast.Call, ast.IfExp, ast.comprehension # A comprehension with two `for` counts twice
HEADER = re.compile(r'# %% (\S+) #(\w+)')
COLUMNS = dict(code='lines of code', line='longest line', long='lines > 120', cell='longest cell', cells='cells', over20='cells > 20',
    over40='cells > 40', dense='dense statements', nested='nested ternaries, comprehensions', triples='triple assignments')

Cell = namedtuple('Cell', 'notebook id first lines') # `first` is the number in the module of the first of its `lines`
Broken = namedtuple('Broken', 'line rule why')


def read_cells(text):
    "The exported cells of a module"
    lines,cells = text.split('\n'),[]
    starts = [i for i,l in enumerate(lines) if l.startswith('# %% ')]
    for a,b in zip(starts, [*starts[1:], len(lines)]):
        notebook,cell_id = HEADER.match(lines[a]).groups()
        code = '\n'.join(lines[a+1:b]).rstrip().split('\n')
        if notebook != 'auto': cells.append(Cell(notebook, cell_id, a+2, code))
    return cells


def in_one_line(stmt): return isinstance(getattr(stmt, 'body', None), list) and stmt.body[0].lineno == stmt.lineno

def own(stmt):
    "The nodes of a statement: all of a simple one, the header of one that holds others, and what stands in the header's line, as in `if a: f(a)`"
    inner = () if in_one_line(stmt) else (ast.stmt, ast.ExceptHandler, ast.match_case)
    todo,nodes = [stmt],[]
    while todo:
        nodes.append(todo.pop())
        todo += [o for o in ast.iter_child_nodes(nodes[-1]) if not isinstance(o, inner)]
    return nodes

def depth(node, kinds):
    "How deep nodes of `kinds` stand in one another"
    return isinstance(node, kinds) + max((depth(o, kinds) for o in ast.iter_child_nodes(node) if not isinstance(o, ast.stmt)), default=0)

def is_triple(stmt):
    "Three or more names that get as many values in one assignment"
    return isinstance(stmt, ast.Assign) and isinstance(stmt.value, ast.Tuple) and len(stmt.value.elts) > 2 and isinstance(stmt.targets[0], ast.Tuple)


def broken_by(stmt):
    "What a statement breaks"
    n = sum(isinstance(o, IDEA) for o in own(stmt))
    if n >= IDEAS: yield Broken(stmt.lineno, 'dense', f'{IDEAS} or more calls, comprehensions and ternaries in one statement')
    if depth(stmt, ast.IfExp) > 1: yield Broken(stmt.lineno, 'nested', 'a ternary in a ternary')
    if depth(stmt, COMPREHENSIONS) > DEPTH: yield Broken(stmt.lineno, 'nested', f'comprehensions more than {DEPTH} deep')

def check(text):
    "The figures of a module, and what it breaks"
    cells,lines = read_cells(text),text.split('\n')
    stmts = [o for o in ast.walk(ast.parse(text)) if isinstance(o, ast.stmt)]
    code = [(c.first+i, l) for c in cells for i,l in enumerate(c.lines)]
    summary = (1, lines[0]) # The chapter's sentence, as the module's docstring
    broken = [Broken(i, 'long', f'{len(l)} characters') for i,l in [summary, *code] if len(l) > LINE]
    broken += [Broken(c.first, 'cell', f'a cell of {len(c.lines)} lines') for c in cells if len(c.lines) > CELL]
    broken = sorted({*broken, *(b for s in stmts for b in broken_by(s))})
    sizes = [len(c.lines) for c in cells] or [0]
    figures = dict(code=sum(bool(l.strip()) for _,l in code), line=max(len(l) for _,l in [summary, *code]), cell=max(sizes), cells=len(cells),
        over20=sum(n > 20 for n in sizes), over40=sum(n > 40 for n in sizes), triples=sum(map(is_triple, stmts)))
    figures |= {k: sum(b.rule == k for b in broken) for k in ('long', 'dense', 'nested')}
    return figures, broken


def where(module, text, line):
    "A place in a module, and the cell of the notebook that it comes from"
    cell = next((c for c in reversed(read_cells(text)) if c.first <= line), None)
    name = f'{module}:{line}'
    if cell is None: return name
    notebook = (ROOT/module).parent.joinpath(cell.notebook).resolve()
    return f'{name} ({notebook.relative_to(ROOT).as_posix()} #{cell.id}, line {line-cell.first+1})'

def total(rows):
    "The figures of all modules: the longest of what is longest, the sum of the rest"
    return {k: (max if k in ('line', 'cell') else sum)(r[k] for r in rows) for k in COLUMNS}


@call_parse
def main(
    table:bool=False, # Print the figures of every module
    baseline:bool=False, # Complain, but do not fail
):
    "Check the length and density of the exported code"
    texts = {p.relative_to(ROOT).as_posix(): p.read_text(encoding='utf-8') for p in sorted(ROOT.glob('distillbook/**/*.py')) if p.name != '_modidx.py'}
    checked = {name: check(text) for name,text in texts.items()}
    if table:
        rows = {name: figures for name,(figures,_) in checked.items() if figures['cells']}
        rows['all'] = total(rows.values())
        print(f"{'':32}", *COLUMNS)
        for name,row in rows.items(): print(f'{name:32}', *(f'{row[k]:{len(k)}}' for k in COLUMNS))
        print('', *(f'{k:8} {v}' for k,v in COLUMNS.items()), sep='\n')
    complaints = [f'{where(name, texts[name], b.line)}: {b.why}' for name,(_,broken) in checked.items() for b in broken]
    for c in complaints: print(c, file=sys.stderr)
    if complaints and not baseline: sys.exit(f'{len(complaints)} places are too long or too dense (python tools/density.py)')
