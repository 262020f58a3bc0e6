"The front door is light: who trains networks of their own needs nothing of OCR, neither installed nor imported"
import ast, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ['onnxruntime', 'onnx', 'cv2', 'shapely', 'pyclipper', 'torchvision', 'fastai.vision', 'fastai.text', 'safetensors', 'rapidfuzz', 'typer', 'accelerate']
FRAMEWORK = ['learner', 'losses', 'nets', 'terms', 'metrics', 'precision', 'checkpoint', 'cache', 'schedules', 'optim', 'layers', 'core']
BLOCK = f'''
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if any(name==h or name.startswith(h+'.') for h in {HEAVY!r}): raise ImportError(name+' is not installed')
sys.meta_path.insert(0, Block())
'''

def python(code):
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode==0, r.stderr
    return r.stdout.split()

def loaded(line): return set(python(f'import sys\n{line}\nprint(*sys.modules)'))

@pytest.mark.parametrize('line', ['from distillbook.learner import distill_learner', 'from distillbook.losses import kd', '; '.join(f'import distillbook.{m}' for m in FRAMEWORK)], ids=['learner', 'losses', 'framework'])
def test_what_is_imported(line):
    mods = loaded(line)
    assert not mods & set(HEAVY)
    assert not [m for m in mods if m.split('.')[:2] in [['distillbook', k] for k in ('rec', 'det', 'data', 'config', 'use', 'cli')]]

@pytest.mark.parametrize('given,says', [({}, ['passive','10000']), (dict(OMP_WAIT_POLICY='active'), ['active','None']), (dict(GOMP_SPINCOUNT='7'), ['None','7'])])
def test_the_commands_say_how_threads_wait_before_torch_is_there(given, says, monkeypatch):
    for k in ('OMP_WAIT_POLICY','GOMP_SPINCOUNT'): monkeypatch.delenv(k, raising=False)
    for k,v in given.items(): monkeypatch.setenv(k, v)
    assert python('import os, sys, distillbook.cli; print(*map(os.environ.get, ["OMP_WAIT_POLICY","GOMP_SPINCOUNT"]), "torch" in sys.modules)')==[*says,'False']

def test_the_losses_need_no_fastai(): assert not [m for m in loaded('from distillbook.losses import kd') if m.split('.')[0] in ('fastai', 'matplotlib', 'pandas')]

def test_a_fit_where_nothing_of_ocr_is_installed():
    assert python(BLOCK+'''
import torch, torch.nn.functional as F
from torch import nn
from fastai.basics import DataLoader, DataLoaders
from distillbook.learner import distill_learner
from distillbook.losses import kd
from distillbook.terms import Term
from distillbook.checkpoint import Checkpoint
import tempfile
x = torch.randn(32,4)
ds = torch.utils.data.TensorDataset(x, (x[:,0]>0).long())
learn = distill_learner(DataLoaders(DataLoader(ds, bs=8), DataLoader(ds, bs=8)), dict(T=nn.Linear(4,2), S=nn.Linear(4,2)), [Term(kd,'S','T'), Term(F.cross_entropy,'S')], frozen='T', cbs=Checkpoint(tempfile.mkdtemp()))
with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
print(len(learn.table()))
''')==['2']

@pytest.mark.parametrize('module', FRAMEWORK)
def test_the_framework_imports_nothing_that_stands_above_it(module):
    "Imports point one way, those inside functions too"
    tree = ast.parse((ROOT/f'distillbook/{module}.py').read_text())
    names = [o.module or '' for o in ast.walk(tree) if isinstance(o, ast.ImportFrom)]+[a.name for o in ast.walk(tree) if isinstance(o, ast.Import) for a in o.names]
    names = [n.removeprefix('distillbook.') for n in names]
    assert not [n for n in names if n.split('.')[0] in ('rec', 'det', 'data', 'config', 'use', 'cli', 'cv2', 'onnx', 'onnxruntime', 'shapely', 'pyclipper', 'torchvision') or n.startswith('fastai.vision')]

MAPPED = '''
import ctypes
import numpy as np
from distillbook.core import keep_memory
class MallInfo(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in 'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'.split()]
mallinfo = getattr(ctypes.CDLL(None), 'mallinfo2', None)
if mallinfo is None: print('glibc does not say')
else:
    mallinfo.restype = MallInfo
    def blocks():
        before,array = mallinfo().hblks,np.ones(8_000_000)
        return mallinfo().hblks-before
    print(blocks(), keep_memory(), blocks())
'''

def test_memory_is_kept():
    "In a process of its own, since no process can be told to forget it: a large array is a block from the kernel before, and not after"
    assert ' '.join(python(MAPPED)) in ('1 True 0', 'glibc does not say')
