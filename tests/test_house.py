"What keeps the house in order: the check of density, and what README says, which is made from one list and one file of figures"
import importlib.util, json, re, subprocess, sys
from pathlib import Path

import pytest
from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parents[1]

def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT/f'tools/{name}.py')
    mod = importlib.util.module_from_spec(spec)
    sys.modules[name] = mod
    spec.loader.exec_module(mod)
    return mod

density,readme = tool('density'),tool('readme')

def module(*cells): return '\n\n'.join(['# %% auto #0\n__all__ = []', *(f'# %% ../nbs/part/00_name.ipynb #{i:x}\n{c}' for i,c in enumerate(cells))]) + '\n'

def broken(code): return {(b.rule, b.line) for b in density.check(module(code))[1]}


def test_plain_code_passes():
    assert broken('import os\n\ndef f(x):\n    "Twice"\n    return [2*o for o in x] if x else None') == set()

@pytest.mark.parametrize('code,rule,line', [
    (f'x = "{"a"*120}"', 'long', 5),
    ('x = 1\n'*41, 'cell', 5),
    ('y = 1\nx = f(f(f(f(f(f(f(f(1))))))))', 'dense', 6),
    ('for a in f(f(f(f(f(f(f(f(1)))))))):\n    a()', 'dense', 5),
    ('def g(x): return f(f(f(f(f(f(f(f(x))))))))', 'dense', 5),
    ('if f(f(f(f(1)))): f(f(f(f(1))))', 'dense', 5),
    ('x = [f(f(f(f(a)))) if g(a) else h(a) for a in b]', 'dense', 5),
    ('x = 1 if a else 2 if b else 3', 'nested', 5),
    ('x = [[[a for a in b] for b in c] for c in d]', 'nested', 5)])
def test_what_is_long_or_dense_is_named(code, rule, line): assert broken(code) == {(rule, line)}

def test_statements_in_a_body_count_by_themselves():
    assert broken('if f(f(f(f(1)))):\n    f(f(f(f(1))))') == set()
    assert broken('def g(x):\n' + '    f(f(f(f(f(f(1))))))\n'*3) == set()
    assert broken('x = [[a for a in b] for b in c]') == set()

def test_a_place_names_the_cell_of_the_notebook():
    text = module('x = 1', 'y = 2\nz = 3')
    line = text.split('\n').index('z = 3') + 1
    assert density.where('distillbook/part.py', text, line) == f'distillbook/part.py:{line} (nbs/part/00_name.ipynb #1, line 2)'

def test_figures_of_a_module():
    figures,_ = density.check(module('x = 1\ny = 22', 'a,b,c = 1,2,3'))
    assert figures == dict(code=3, line=len('a,b,c = 1,2,3'), long=0, cell=2, cells=2, over20=0, over40=0, dense=0, nested=0, triples=1)

def test_command_prints_a_row_for_every_module():
    res = subprocess.run([sys.executable, 'tools/density.py', '--table', '--baseline'], cwd=ROOT, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    rows = {l.split()[0]: l.split()[1:] for l in res.stdout.splitlines() if l.startswith('distillbook/')}
    with_cells = {p.relative_to(ROOT).as_posix() for p in ROOT.glob('distillbook/**/*.py') if '# %% ../' in p.read_text(encoding='utf-8')}
    assert set(rows) == with_cells


def test_list_of_chapters_is_that_of_the_sidebar():
    nb = read_nb(ROOT/'nbs/index.ipynb')
    assert sum(bool(readme.LIST.search(c.source)) for c in nb.cells) == 1
    assert not readme.with_chapters(nb), 'run python tools/readme.py'

def test_list_of_chapters_names_sections_within_a_part():
    text = readme.chapters()
    assert text.startswith('- **Learning from one another**: [Learning from one another](learning/00_mutual.ipynb) · ')
    assert re.search(r' · \*Reference\*: \[[^]]+\]\(learning/', text)

def test_table_in_readme_is_that_of_the_figures():
    "Whoever measures anew runs `nbdev-test --save nbs/index.ipynb`, which makes table and picture, and tools/readme.py"
    res = json.loads((ROOT/'benchmarks/results/quickstart.json').read_text(encoding='utf-8'))
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    for net in ('teacher', 'student', 'twin'):
        row = next(l for l in text.splitlines() if re.match(rf'\| [^|]*\b{net}\b', l))
        held,unseen,ms = (res['table'][f'{net}, {o}'] for o in ('held out', 'unseen font', 'ms an image'))
        assert row.split('|')[2:-1] == [f" {o['mean']:.3f} ({o['lowest']:.3f} to {o['highest']:.3f}) " for o in (held, unseen)] + [f" {ms['mean']:.2f} ", f" {res['parameters'][net]:,} "]

def test_readme_has_the_commands_and_the_sentence_about_the_twin():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    lines = text.splitlines()
    assert 'pip install -e . && distillbook train -c configs/quickstart.yml' in lines
    assert "pip install -e '.[dev]' && nbdev-test && pytest" in lines
    assert 'git clone https://github.com/distillbook/distillbook' in text
    table = text.index('| twin, labels alone')
    assert table < text.index('is not ahead for ever') < table + 600


MACHINE = re.compile(r'(?<![\w.])/(tmp|work|root|home)/')

def written(output):
    "The texts of a saved output; pictures are left out"
    data = output.get('data', {})
    return [''.join(o) for k,o in (*data.items(), ('text', output.get('text', ''))) if not k.startswith(('image/','application/'))]

@pytest.mark.parametrize('nb', [p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob('nbs/**/*.ipynb'))])
def test_saved_outputs_name_no_folder_of_a_machine(nb):
    found = [(c.id, o) for c in read_nb(ROOT/nb).cells for out in c.get('outputs', []) for o in written(out) if MACHINE.search(o)]
    assert not found

def test_folders_of_a_machine_are_found():
    for text in ("['/tmp/x/a.png']", 'at /home/me/a.py', '/work/x', 'file:///root/x'): assert any(map(MACHINE.search, written(dict(text=[text])))) and MACHINE.search(written(dict(data={'text/plain': text, 'image/png': 'a/tmp/b'}))[0])
    assert not any(map(MACHINE.search, written(dict(data={'image/png': '=/tmp/', 'text/html': 'a/work/b output/tmp/ at ./tmp/x'}))))
