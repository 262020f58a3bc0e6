"Parts of somebody else's, each by its dotted path in a YAML: the command finds them in the working folder, trains with all of them, goes on, and tells their mistakes in one line"
import json, os, re, subprocess, sys
from pathlib import Path
import cv2, numpy as np, pytest, torch, yaml
from distillbook.checkpoint import load_file
from distillbook.core import UserError
from test_cli import CMD, ENV, fails, inside

MINE = '''
import numpy as np, torch
from torch import nn
from distillbook.core import UserError
from distillbook.rec.labels import Alphabet

class Columns(nn.Module):
    "A backbone: looks at each column of 8 pixels by itself"
    def __init__(self, width:int=32):
        super().__init__()
        if width%4: raise UserError(f"width: {width} is no multiple of 4")
        self.out_channels = width
        self.conv = nn.Conv2d(3, width, (48,8), stride=(48,8))
    def forward(self, x): return self.conv(x).relu()

class Silent(Columns):
    "A backbone that does not say how many channels it has"
    def __init__(self):
        super().__init__()
        del self.out_channels

class Neighbours(nn.Module):
    "A neck: mixes each column with its neighbours"
    def __init__(self, in_channels:int, reach:int=3):
        super().__init__()
        self.out_channels = in_channels
        self.conv = nn.Conv1d(in_channels, in_channels, 2*reach+1, padding=reach)
    def forward(self, x): return self.conv(x.squeeze(2)).relu().mT

class Classifier(nn.Module):
    "A head, as the only one or one of several"
    classes,output = Alphabet,'mine'
    def __init__(self, in_channels:int, out_channels:int, hidden:int=64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_channels, hidden), nn.ReLU(), nn.Linear(hidden, out_channels))
    def forward(self, x, targets=None, whole=None): return self.layers(x.squeeze(2).mT if x.ndim==4 else x) # As one of several it gets the map

class Upper:
    "A decoder: capital letters"
    classes,head = Alphabet,'mine'
    def __init__(self, alphabet, sure:float=1.): self.alphabet,self.sure = alphabet,sure
    def __call__(self, output, labels=None):
        read = [(self.alphabet.decode(sorted(set(row))).upper(), self.sure) for row in output.argmax(-1).tolist()]
        return read if labels is None else (read, [(self.alphabet.decode(row).upper(), 1.) for row in labels.tolist()])

def amount(logits, length, strength:float=1.):
    "A loss: as many columns that are not blank as there are letters"
    return strength*((1-logits.softmax(-1)[...,0]).sum(1)-length).abs().mean()

class FirstLetter:
    "A metric: how often the first letter is right"
    names = ('first',)
    def __init__(self, plus:float=0.): self.right,self.n,self.plus = 0,0,plus
    def add(self, reads, truths):
        self.right += sum(a[:1]==b[:1] for a,b in zip(reads, truths))
        self.n += len(truths)
    @property
    def value(self): return dict(first=self.plus+self.right/max(self.n, 1))

class Bars:
    "A data set: bars of as many pixels as the digit says"
    def __init__(self, n:int=32): self.n = n
    def __len__(self): return self.n
    def read(self, i, rng=None, picture=True):
        image = np.full((48,80,3), 255, np.uint8)
        image[:,:8*(1+i%9)] = 0
        return dict(where=f'bar {i}', path=f'bar {i}', label=str(1+i%9), image=image)

class Noise:
    "An operation: grey noise"
    def __init__(self, strength:float=8.): self.strength = strength
    def __call__(self, sample, rng):
        noisy = sample['image'] + self.strength*rng.standard_normal(sample['image'].shape)
        return {**sample, 'image': noisy.clip(0, 255).astype(np.uint8)}

class Signs(torch.optim.Optimizer):
    "An optimiser: steps of one length, in the direction of the gradient's sign"
    def __init__(self, params, lr=1e-3, weight_decay=0., scale:float=1.): super().__init__(params, dict(lr=lr, weight_decay=weight_decay, scale=scale))
    @torch.no_grad()
    def step(self, closure=None):
        for h in self.param_groups:
            for p in h['params']:
                if p.grad is not None: p.sub_(p.grad.sign(), alpha=h['lr']*h['scale'])

def halves(step, epochs, per_epoch, learning_rate:float):
    "A schedule: half the rate in the second half"
    return learning_rate if step<epochs*per_epoch/2 else learning_rate/2

def ramp(start:float, end:float):
    "A schedule of a weight"
    return lambda progress: start+(end-start)*progress

number = 5
'''
YAML = '''
Global: {epoch_num: 1, save_model_dir: run, max_text_length: 8, use_gpu: false, print_batch_step: 2, eval_batch_step: [0, 2]}
Architecture:
  model_type: rec
  Models:
    Student:
      return_all_feats: true
      Backbone: {name: mine_parts.Columns, width: 16}
      Neck: {name: mine_parts.Neighbours, reach: 2}
      Head: {name: mine_parts.Classifier, hidden: 32}
    Twin: {init: Student}
    Two:
      return_all_feats: true
      Backbone: {name: PlainBackbone, channels: [8, 8, 8, 8]}
      Head:
        name: MultiHead
        head_list:
        - CTCHead: {Neck: {name: reshape}, Head: {fc_decay: 0}}
        - mine_parts.Classifier: {hidden: 8}
Loss:
  name: CombinedLoss
  loss_config_list:
  - DistillationCTCLoss: {weight: 1.0, model_name_list: [Student, Twin], key: head_out}
  - Term: {loss: mine_parts.amount, on: Student.head_out, strength: 0.5, weight: {name: mine_parts.ramp, start: 1.0, end: 0.0}}
  - Term: {loss: dml, on: [Twin.head_out, Student.head_out]}
  - Term: {loss: ctc_loss, on: Two.head_out.mine, targets: [label, length], name: two}
Optimizer: {name: mine_parts.Signs, scale: 0.5, lr: {name: mine_parts.halves, learning_rate: 0.001}}
PostProcess: {name: mine_parts.Upper, sure: 0.25, model_name: [Student, Twin, Two], key: head_out}
Metric: {name: DistillationMetric, base_metric_name: mine_parts.FirstLetter, plus: 1, key: Student, main_indicator: first}
Train:
  dataset: &set
    name: mine_parts.Bars
    n: 32
    transforms: [mine_parts.Noise: {strength: 4}, CTCLabelEncode: , RecResizeImg: {image_shape: [3, 48, 80]}, KeepKeys: {keep_keys: [image, label, length]}]
  loader: {shuffle: true, batch_size_per_card: 8, num_workers: 1}
Eval:
  dataset: {<<: *set, n: 9}
  loader: {batch_size_per_card: 9}
'''

@pytest.fixture(scope='module')
def mine(tmp_path_factory):
    "A working folder with a module and a configuration; the command as it is installed, whose first place to look for modules is another folder"
    folder = tmp_path_factory.mktemp('mine')
    (folder/'mine_parts.py').write_text(MINE)
    (folder/'mine.yml').write_text(YAML)
    (folder/'bin').mkdir()
    (folder/'bin/distillbook').write_text('from distillbook.cli import app\nif __name__=="__main__": app(prog_name="distillbook")\n')
    return folder

TRUST = ['--trust','mine_parts']

@pytest.fixture(autouse=True)
def nothing_trusted(monkeypatch):
    "What a command in this process trusts, the next does not"
    monkeypatch.setattr('distillbook.config.registry.TRUSTED', set())

def alone(folder, *args, trust=TRUST): return subprocess.run([sys.executable, str(folder/'bin/distillbook'), *map(str, args), *trust], cwd=folder, capture_output=True, text=True, env=ENV, timeout=300)

@pytest.fixture(scope='module')
def run(mine):
    r = alone(mine, 'train', '-c', 'mine.yml')
    assert r.returncode==0, r.stderr
    return mine,r


def test_all_at_once(run):
    folder,_ = run
    got = json.loads((folder/'run/summary.json').read_text())
    assert list(got['networks'])==['Student','Twin','Two'] and got['best']['indicator']=='first' and got['best']['value']>=1
    assert all(set(o['eval'])=={'first'} and 1<=o['eval']['first']<=2 for o in got['networks'].values()) and got['samples']==dict(train=32, eval=9)
    log = (folder/'run/train.log').read_text()
    rates = [float(o) for o in re.findall(r'lr: ([\d.]+)', log)]
    assert rates==[.001, .0005] and all(f'{t}: ' in log for t in ('amount_Student','dml_Twin_Student','two'))
    assert (folder/'run/pictures_eval.png').exists() and (folder/'run/curves.png').exists()
    state = load_file(folder/'run/latest.pth')
    assert state['setup']['the optimiser'].endswith('Signs') and {'Student.backbone.conv.weight','Student.neck.conv.weight','Student.head.layers.0.weight','Two.head.mine_head.layers.0.weight'}<=set(state['model'])

def test_everything_learns(run):
    "Signs moves each weight that has a gradient, the second head's too"
    before = subprocess.run([sys.executable, '-c', '''
import sys, torch
from fastai.basics import set_seed
from distillbook.config import build_model, load_config, trust
trust('mine_parts')
set_seed(1024)
torch.save(build_model(load_config('mine.yml')).state_dict(), 'before.pth')'''], cwd=run[0], env=ENV, capture_output=True, text=True)
    assert before.returncode==0, before.stderr
    old,new = torch.load(run[0]/'before.pth'),load_file(run[0]/'run/latest.pth')['model']
    moved = {k for k in new if not torch.equal(old[k], new[k])}
    assert {'Student.backbone.conv.weight','Twin.backbone.conv.weight','Student.neck.conv.bias','Student.head.layers.2.weight','Two.head.mine_head.layers.2.bias'}<=moved

def here(folder, monkeypatch):
    "Commands in this process, as if it had been started in the folder"
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return lambda *args: inside(*args, *TRUST)

def test_the_other_commands_find_them_too(run, monkeypatch):
    folder,_ = run
    cv2.imwrite(str(folder/'bar.png'), np.full((48,80,3), 255, np.uint8))
    rows = json.loads(alone(folder, 'predict', '--run', 'run', 'bar.png', '--json').stdout)
    assert set(rows[0])=={'image','Student','Twin','Two'} and all(rows[0][n]['score']==.25 for n in ('Student','Twin','Two'))
    command = here(folder, monkeypatch)
    got,kept = json.loads(command('eval', '--run', 'run', '--json').stdout),load_file(folder/'run/best_accuracy.pth')['metrics']
    assert all(got[k]==pytest.approx(kept[k]) for k in ('first','Twin_first','Two_first'))
    assert json.loads(command('summary', '-c', 'mine.yml', '--json').stdout)['nets'][0]['net']=='Student'
    assert command('extract', 'run', '--net', 'Twin', '-o', 'twin.safetensors').returncode==0 and (folder/'twin.safetensors').exists()

def test_a_run_with_them_goes_on(run, monkeypatch):
    "A second epoch after the first is as two epochs at once, but for the schedules that know how many there are"
    folder,_ = run
    command = here(folder, monkeypatch)
    fixed = ['Optimizer.lr={learning_rate: 0.001}', 'Loss.loss_config_list.1.Term.weight=1.0']
    for args in (['Global.save_model_dir=one'], ['Global.save_model_dir=one', 'Global.epoch_num=2', 'Global.checkpoints=one/latest'], ['Global.save_model_dir=two', 'Global.epoch_num=2']):
        r = command('train', '-c', 'mine.yml', '-o', *fixed, *args)
        assert r.returncode==0, r.stderr
    a,b = (load_file(folder/f'{n}/latest.pth')['model'] for n in ('one','two'))
    assert all(torch.equal(v, b[k]) for k,v in a.items())


# %% a configuration is data
STRANGER = 'open("was_here", "w")\nfrom os import system, popen\nfrom subprocess import Popen\nfrom mine_parts import *\n'
COMMANDS = dict(train=[], eval=[], summary=[], predict=['bar.png'], **{'lr-find': ['--steps', '10']})

@pytest.mark.parametrize('name', COMMANDS)
def test_nothing_runs_that_nobody_trusts(run, name, monkeypatch):
    "Neither the module of the configuration nor a command of the system, in any command"
    folder = run[0]
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    (folder/'stranger.py').write_text(STRANGER)
    cv2.imwrite('bar.png', np.full((48,80,3), 255, np.uint8))
    last = ['Global.pretrained_model=run/best_accuracy'] if name in ('eval','predict') else []
    changes = ['PostProcess.name=stranger.Upper', 'Train.dataset.transforms.0={os.system: {command: touch was_here}}', 'Eval.dataset.transforms.0={os.system: {command: touch was_here}}', 'Eval.dataset.transforms.0={subprocess.Popen: {args: [touch, was_here]}}', 'Train.dataset.name=stranger.Bars', f'{NET}Backbone.name=stranger.Columns']
    (folder/'was_here').unlink(missing_ok=True)
    for change in changes:
        side = change.split('.')[0]
        if name in ('eval','predict','summary') and side=='Train': continue
        if name=='summary' and side in ('Eval','PostProcess'): continue
        r = inside(name, *COMMANDS[name], '-c', 'mine.yml', *TRUST, '-o', 'Global.save_model_dir=never', 'Train.loader.num_workers=0', *last, change)
        fails(r, 'stranger' if 'stranger' in change else "a module of Python's own", after_log=True)
        assert not (folder/'was_here').exists(), change

@pytest.mark.parametrize('change,says', [('Train.dataset.transforms.0={stranger.system: {command: touch was_run}}', 'stranger.system is no class and no function'), ('Train.dataset.transforms.0={stranger.popen: {cmd: touch was_run}}', 'stranger.popen is os.popen, and os is not trusted'),
    ('Train.dataset.transforms.0={stranger.Popen: {args: [touch, was_run]}}', 'stranger.Popen is subprocess.Popen'), ('Loss.loss_config_list.1.Term.loss=stranger.popen', 'stranger.popen is os.popen'), ('Train.dataset.transforms.0={mine_parts.amount: {}}', 'mine_parts.amount is no operation'), ('Train.dataset.name=mine_parts.Upper', 'mine_parts.Upper is no dataset'), ('PostProcess.name=mine_parts.amount', 'mine_parts.amount is no decoder'), ('Metric.base_metric_name=mine_parts.Noise', 'mine_parts.Noise is no metric'), ('Optimizer.lr.name=mine_parts.amount', 'mine_parts.amount is no schedule'), ('Loss.loss_config_list.1.Term.loss=mine_parts.Noise', 'mine_parts.Noise is no loss'),
    ('Train.dataset.transforms.0={distillbook.use.weights.save_weights: {path: was_run}}', 'distillbook.use.weights.save_weights is no operation'), ('Train.dataset.transforms.0={distillbook.data.shards.write_shards: {folder: was_run}}', 'is no operation')])
def test_what_is_trusted_may_still_be_in_the_wrong_place(mine, monkeypatch, change, says):
    monkeypatch.chdir(mine)
    monkeypatch.syspath_prepend(mine)
    (mine/'stranger.py').write_text(STRANGER)
    fails(inside('train', '-c', 'mine.yml', *TRUST, '--trust', 'stranger', '-o', 'Global.save_model_dir=never', 'Train.loader.num_workers=0', change), says, after_log=True)
    assert not (mine/'was_run').exists()

@pytest.mark.parametrize('module,says', [('os', "Python's own"), ('os.path', "Python's own"), ('my module', 'the name of a module'), ('../mine', 'the name of a module'), ('', 'the name of a module')])
def test_what_cannot_be_trusted(module, says): fails(inside('train', '-c', 'mine.yml', '--trust', module), says)

def test_a_function_is_marked(mine, monkeypatch):
    monkeypatch.syspath_prepend(mine)
    (mine/'marked.py').write_text("from distillbook.config import made_for\n@made_for('operation')\ndef nothing(): return lambda sample, rng: sample\ndef unmarked(): return lambda sample, rng: sample\n")
    from distillbook.config import trust
    from distillbook.config.registry import METRICS, OPERATIONS
    from distillbook.config.values import Section
    trust('marked')
    assert OPERATIONS.find('marked.nothing', Section({}))()(5, None)==5
    for table,name in ((OPERATIONS, 'unmarked'), (METRICS, 'nothing')):
        with pytest.raises(UserError, match='made_for'): table.find(f'marked.{name}', Section({}))


NET = 'Architecture.Models.Student.'
MISTAKES = [ # A change, and what is said of it
    (f'{NET}Backbone.name=mine_parts.Column', ['mine.yml:8', f'{NET}Backbone.name', "'Columns'"]),
    (f'{NET}Backbone.name=mine_part.Columns', [f'{NET}Backbone.name', 'mine_part.Columns is code outside of distillbook', '--trust mine_part']),
    (f'{NET}Backbone.name=mine_parts.number', [f'{NET}Backbone.name', 'mine_parts.number is no class']),
    (f'{NET}Backbone.name=mine_parts.Upper', ['mine_parts.Upper is no class made from torch.nn']),
    (f'{NET}Backbone.name=mine_parts.Silent', [f'{NET}Backbone', '']),
    (f'{NET}Backbone.width=wide', ['mine.yml:8', f'{NET}Backbone.width', "a whole number is wanted, not 'wide'"]),
    (f'{NET}Backbone.width=10', [f'{NET}Backbone', 'width: 10 is no multiple of 4']),
    (f'{NET}Backbone.wdith=8', [f'{NET}Backbone.wdith', "no key of Columns 'wdith'; did you mean 'width'?"]),
    (f'{NET}Neck.reach=-3', ['mine.yml:9', f'{NET}Neck', 'Neighbours cannot be made of']),
    (f'{NET}Neck.in_channels=3', [f'{NET}Neck.in_channels', "no key of Neighbours 'in_channels'"]),
    (f'{NET}Head.hidden=1.5', [f'{NET}Head.hidden', 'a whole number']),
    (f'{NET}Head.name=mine_parts.amount', ['mine_parts.amount is no class made from torch.nn']),
    ('Architecture.Models.Two.Head.head_list.1={mine_parts.Columns: {}}', ['head_list.1', '']),
    ('PostProcess.name=mine_parts.Uper', ['PostProcess.name', "'Upper'"]),
    ('PostProcess.shure=1', ['PostProcess.shure', "'sure'"]),
    ('PostProcess.sure=very', ['PostProcess.sure', 'a number is wanted']),
    ('Loss.loss_config_list.1.Term.loss=mine_parts.amonut', ['Loss.loss_config_list.1.Term.loss', "'amount'"]),
    ('Loss.loss_config_list.1.Term.strenth=1', ['Loss.loss_config_list.1.Term.strenth', "'strength'"]),
    ('Loss.loss_config_list.1.Term.strength=[]', ['Loss.loss_config_list.1.Term.strength', 'a number is wanted']),
    ('Loss.loss_config_list.1.Term.weight.start=[]', ['Term.weight.start', 'a number is wanted']),
    ('Loss.loss_config_list.1.Term.on=Student.head_uot', ["'Student.head_out'"]),
    ('Metric.base_metric_name=mine_parts.FirstLeter', ["'FirstLetter'"]),
    ('Metric.plus=x', ['Metric.plus', 'a number']),
    ('Metric.main_indicator=fisrt', ['Metric.main_indicator', "'first'"]),
    ('Train.dataset.name=mine_parts.Bar', ['Train.dataset.name', "'Bars'"]),
    ('Train.dataset.n=many', ['Train.dataset.n', 'a whole number']),
    ('Train.dataset.m=3', ['Train.dataset.m', 'm']),
    ('Train.dataset.transforms.0={mine_parts.Nosie: {}}', ['transforms.0', "'Noise'"]),
    ('Train.dataset.transforms.0={mine_parts.Noise: {strong: 1}}', ['transforms.0', "'strength'"]),
    ('Train.dataset.transforms.0={mine_parts.Noise: {strength: loud}}', ['strength', 'a number']),
    ('Optimizer.name=mine_parts.Sings', ['Optimizer.name', "'Signs'"]),
    ('Optimizer.name=mine_parts.Bars', ['mine_parts.Bars is no class made from torch.optim']),
    ('Optimizer.scales=1', ['Optimizer.scales', "'scale'"]),
    ('Optimizer.scale=x', ['Optimizer.scale', 'a number']),
    ('Optimizer.lr.name=mine_parts.halve', ['Optimizer.lr.name', "'halves'"]),
    ('Optimizer.lr.learning_rate=-1', ['Optimizer.lr.learning_rate']),
]

@pytest.mark.parametrize('change,says', MISTAKES, ids=[o[0] for o in MISTAKES])
def test_mistakes(mine, monkeypatch, change, says):
    monkeypatch.chdir(mine)
    monkeypatch.syspath_prepend(mine)
    fails(inside('train', '-c', 'mine.yml', *TRUST, '-o', 'Global.save_model_dir=never', 'Train.loader.num_workers=0', change), *says, after_log=True)
    assert not (mine/'never/latest.pth').exists()

FAULTY = dict( # A part that fails when it is used, put in the place of another
    backbone=('class Columns2(Columns):\n    def forward(self, x): return self.conv(x).flatten(1)', f'{NET}Backbone.name', 'Columns2', "Student"),
    head=('class Classifier2(Classifier):\n    def forward(self, x): return dict(other=self.layers(x))', f'{NET}Head.name', 'Classifier2', ''),
    decoder=('class Upper2(Upper):\n    def __call__(self, output, labels=None): return output.no_such_thing', 'PostProcess.name', 'Upper2', 'no_such_thing'),
    loss=('def amount2(logits, length, strength:float=1.): return logits.mean((0,1))', 'Loss.loss_config_list.1.Term.loss', 'amount2', 'amount2_Student'),
    metric=('class FirstLetter2(FirstLetter):\n    def add(self, reads, truths): raise KeyError("letters")', 'Metric.base_metric_name', 'FirstLetter2', 'letters'),
    missing=('class Bars3(Bars):\n    def read(self, i, rng=None, picture=True): raise OSError("the disk is gone")', 'Train.dataset.name', 'Bars3', 'the disk is gone'))

@pytest.mark.parametrize('kind', FAULTY)
def test_parts_that_fail_when_used(kind, mine, monkeypatch):
    code,spot,name,says = FAULTY[kind]
    module = f'faulty_{kind}'
    (mine/f'{module}.py').write_text(f'from mine_parts import *\n{code}\n')
    monkeypatch.chdir(mine)
    monkeypatch.syspath_prepend(mine)
    fails(inside('train', '-c', 'mine.yml', *TRUST, '--trust', module, '-o', f'Global.save_model_dir=never', 'Train.loader.num_workers=0', f'{spot}={module}.{name}'), says, after_log=True)
    assert not (mine/'never/latest.pth').exists()

def test_an_error_inside_an_own_operation_is_its_own(mine, monkeypatch):
    "It ends the run as errors do, and says where it happened"
    (mine/'faulty_operation.py').write_text('from mine_parts import *\nclass Noise2(Noise):\n    def __call__(self, sample, rng): return sample["nothing"]\n')
    monkeypatch.chdir(mine)
    monkeypatch.syspath_prepend(mine)
    with pytest.raises(KeyError, match='nothing'): inside('train', '-c', 'mine.yml', *TRUST, '--trust', 'faulty_operation', '-o', 'Global.save_model_dir=never', 'Train.loader.num_workers=0', 'Train.dataset.transforms.0={faulty_operation.Noise2: {}}')

def test_own_modules_do_not_hide_installed_ones(tmp_path):
    "A file called random.py beside a configuration is nobody's random numbers"
    (tmp_path/'random.py').write_text('raise SystemExit("hidden")')
    (tmp_path/'bin').mkdir()
    (tmp_path/'bin/distillbook').write_text('from distillbook.cli import app\napp(prog_name="distillbook")\n')
    r = alone(tmp_path, 'summary', '-c', 'quickstart', '--json', trust=['--trust','mine'])
    assert r.returncode==0 and json.loads(r.stdout)['nets'], r.stderr
