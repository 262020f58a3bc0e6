"Files that are whole whatever happens: real signals to real processes, full disks, strangers' files, ties and NaN"
import json, math, os, pickle, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from fastai.basics import Callback, DataLoader, DataLoaders, Metric, set_seed
from fastai.callback.all import ProgressCallback
from fastai.metrics import accuracy, error_rate
from torch import nn
from torch.utils.data import TensorDataset

from distillbook.checkpoint import Checkpoint, Stopped, load_file, save_file
from distillbook.core import UserError
from distillbook.learner import NonFiniteLoss, distill_learner
from distillbook.losses import kd
from distillbook.terms import Term

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')
def mlp(): return nn.Sequential(nn.Linear(4,6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6,3))
def state(m): return {k: v.clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

class Scripted(Metric):
    "A metric that gives what it was told, epoch by epoch"
    name = 'acc'
    def __init__(self, vals): self.vals,self.i = vals,-1
    def reset(self): self.i += 1
    def accumulate(self, learn): pass
    @property
    def value(self): return self.vals[self.i%len(self.vals)]

def learner(folder, vals=(.1,), monitor='Student_acc', names=('Teacher','Student'), metrics=None, cbs=(), frozen=True):
    set_seed(0)
    x = torch.randn(64,4)
    ds = TensorDataset(x, (x[:,0]>0).long())
    teacher,student = names
    learn = distill_learner(DataLoaders(DataLoader(ds, bs=16, shuffle=True), DataLoader(ds, bs=32)), {teacher: mlp(), student: mlp()}, [Term(F.cross_entropy,student), Term(kd,student,teacher)], frozen=[teacher] if frozen else [],
                            metrics=metrics or {student: Scripted(list(vals))}, monitor=monitor, cbs=[Checkpoint(folder), *cbs])
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = lambda *_: None
    return learn

# ---- which is best

NAN = math.nan
@pytest.mark.parametrize('vals,epoch', [([.1,.5,.3],1), ([.5,.5,.5],2), ([.5,.2,.5],2), ([NAN,.2,.1],1), ([.3,NAN,.2],0), ([0.,0.,NAN],1), ([-1.,-2.,-3.],0)])
def test_best(vals, epoch, tmp_path):
    states = []
    class Keep(Callback):
        def after_epoch(self): states.append(state(self.learn.net('Student')))
    learner(tmp_path, vals, cbs=[Keep()]).fit(len(vals), 1e-2)
    best,last = load_file(tmp_path/'best.pth'),load_file(tmp_path/'last.pth')
    assert (best['net'], best['monitor'], best['epoch'], best['value'])==('Student', 'Student_acc', epoch, vals[epoch])
    assert same(best['model'], states[epoch])
    assert last['epoch']==len(vals)-1 and last['best']==vals[epoch] and same({k[8:]: v for k,v in last['model'].items() if k.startswith('Student.')}, states[-1])
    mlp().load_state_dict(best['model'])

def test_no_monitor_no_best(tmp_path):
    learner(tmp_path, monitor=None).fit(2, 1e-2)
    assert not (tmp_path/'best.pth').exists() and load_file(tmp_path/'last.pth')['epoch']==1

def test_never_a_number(tmp_path):
    learner(tmp_path, [NAN]).fit(2, 1e-2)
    assert not (tmp_path/'best.pth').exists() and load_file(tmp_path/'last.pth')['best'] is None

@pytest.mark.parametrize('monitor', ('valid_loss', 'train_loss'))
def test_losses_are_minimised_over_all_nets(monitor, tmp_path):
    learn = learner(tmp_path, monitor=monitor)
    learn.fit(4, 1e-2)
    best = load_file(tmp_path/'best.pth')
    assert best['value']==pytest.approx(learn.table()[monitor].min()) and best['net'] is None and {k.split('.')[0] for k in best['model']}=={'Teacher','Student'}

def test_errors_are_minimised_as_fastai_does(tmp_path):
    learn = learner(tmp_path, metrics=error_rate, monitor='Student_error_rate')
    learn.fit(6, 3e-2)
    errs = learn.table().Student_error_rate
    assert errs.nunique()>1 and load_file(tmp_path/'best.pth')['value']==errs.min()

def test_a_net_whose_name_has_loss_in_it_is_not_minimised(tmp_path):
    learner(tmp_path, [.1,.9,.5], monitor='lossy_acc', names=('T','lossy')).fit(3, 1e-2)
    assert load_file(tmp_path/'best.pth')['value']==.9

@pytest.mark.parametrize('names,monitor,net', [(('A','A_b'),'A_b_acc','A_b'), (('A_b','A'),'A_acc','A'), (('T','two words'),'two words_acc','two words'), *(pytest.param((n,'S'), f'{n}_loss', None) for n in ('valid','train'))])
def test_which_net_the_monitor_is_of(names, monitor, net, tmp_path):
    learner(tmp_path, monitor=monitor, names=names).fit(1, 1e-2)
    assert load_file(tmp_path/'best.pth')['net']==net

@pytest.mark.parametrize('what', (pytest.param('validate'), 'get_preds', 'lr_find', 'show_results'))
def test_looking_writes_nothing(what, tmp_path):
    learn = learner(tmp_path, [.1,.9,.5], metrics=accuracy, monitor='Student_accuracy')
    learn.fit(2, 1e-2)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    getattr(learn, what)(**dict(lr_find=dict(num_it=5, show_plot=False)).get(what, {}))
    assert before=={f.name: f.read_bytes() for f in tmp_path.iterdir()}

def test_where_a_finished_epoch_ends_can_be_told(tmp_path):
    "`batch` of an epoch that is over must not look like a place in the middle of it"
    learn = learner(tmp_path)
    learn.fit(1, 1e-2)
    assert load_file(tmp_path/'last.pth')['batch'] in (None, len(learn.dls.train), len(learn.dls.train)-1)

def test_nan_keeps_the_last_good_state(tmp_path):
    class Poison(Callback):
        def before_batch(self):
            if self.training and (self.epoch,self.iter)==(1,1): self.learn.xb = (self.xb[0]*float('nan'),)
    learn = learner(tmp_path, cbs=[Poison()])
    with pytest.raises(NonFiniteLoss, match=r'epoch 2 of 3, batch 2 of 4'): learn.fit(3, 1e-2)
    last = load_file(tmp_path/'last.pth')
    assert last['epoch']==0 and all(v.isfinite().all() for v in last['model'].values())

@pytest.mark.parametrize('why', ('nan', 'error'))
def test_the_signals_come_back_after_an_error(why, tmp_path):
    class Fails(Callback):
        def before_batch(self):
            if why=='error': raise ZeroDivisionError('no')
            self.learn.xb = (self.xb[0]*float('nan'),)
    old = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((NonFiniteLoss, ZeroDivisionError)): learner(tmp_path, cbs=[Fails()]).fit(1, 1e-2)
        assert signal.getsignal(signal.SIGINT) is old
    finally:
        signal.signal(signal.SIGINT, old)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

def test_the_signals_come_back_after_a_fit(tmp_path):
    old = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    learner(tmp_path).fit(1, 1e-2)
    assert old==[signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

class Press(Callback):
    def __init__(self, training=True): self.when,self.n = training,0
    def after_loss(self):
        if self.training==self.when and (self.epoch,self.iter)==(1,1) and not self.n:
            self.n += 1
            os.kill(os.getpid(), signal.SIGINT)

def test_stopped_and_fitted_again(tmp_path):
    learn = learner(tmp_path, cbs=[Press()])
    with pytest.raises(Stopped, match='SIGINT in epoch 2 of 3, after batch 2 of 4'): learn.fit(3, 1e-2)
    assert (load_file(tmp_path/'last.pth')['epoch'], load_file(tmp_path/'last.pth')['batch'])==(1,1)
    learn.fit(1, 1e-2)

def test_a_stop_asked_for_in_the_last_validation_is_heard(tmp_path):
    with pytest.raises(Stopped): learner(tmp_path, cbs=[Press(training=False)]).fit(2, 1e-2)

# ---- files

@pytest.mark.parametrize('content', [pytest.param(b'', id='empty'), *(pytest.param(v, id=k) for k,v in dict(text=b'not a zip', head=b'PK\x03\x04', function=pickle.dumps(print), stack=b'\x80\x04.', zeros=b'\x00'*1000, json=b'{"a": 1}').items())])
def test_files_that_are_no_checkpoints(content, tmp_path):
    (tmp_path/'f.pth').write_bytes(content)
    with pytest.raises(UserError, match='f.pth is not a readable checkpoint') as e: load_file(tmp_path/'f.pth')
    assert '\n' not in str(e.value)

def test_a_checkpoint_cut_anywhere(tmp_path):
    save_file(dict(w=torch.arange(1000.), n=[1,'a',None]), tmp_path/'f.pth')
    whole = (tmp_path/'f.pth').read_bytes()
    for n in range(0, len(whole), 97):
        (tmp_path/'f.pth').write_bytes(whole[:n])
        with pytest.raises(UserError): load_file(tmp_path/'f.pth')

def test_a_file_that_is_not_there_or_a_folder(tmp_path):
    with pytest.raises(UserError, match='there is no'): load_file(tmp_path/'none.pth')
    with pytest.raises(UserError): load_file(tmp_path)
    (tmp_path/'d').mkdir()
    with pytest.raises(UserError, match='could not be written'): save_file(dict(i=1), tmp_path/'d')
    (tmp_path/'plain').write_text('')
    with pytest.raises(UserError, match='could not be written'): save_file(dict(i=1), tmp_path/'plain'/'f.pth')

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (Path.touch, (self.path,))

@pytest.mark.parametrize('how', (torch.save, lambda o,p: p.write_bytes(pickle.dumps(o))), ids=['torch', 'pickle'])
def test_a_file_that_would_run_code_is_refused(how, tmp_path):
    how(dict(model={}, evil=Evil(tmp_path/'ran')), tmp_path/'f.pth')
    with pytest.raises(UserError, match='not a readable checkpoint'): load_file(tmp_path/'f.pth')
    assert not (tmp_path/'ran').exists()

def test_the_state_is_read_weights_only_with_both_optimisers(tmp_path):
    from functools import partial
    from fastai.basics import OptimWrapper
    learn = learner(tmp_path)
    learn.fit_one_cycle(1, 1e-2)
    last = load_file(tmp_path/'last.pth')
    learn.opt.load_state_dict(last['opt'])
    learn.opt_func = partial(OptimWrapper, opt=torch.optim.AdamW)
    learn.fit_one_cycle(1, 1e-2, reset_opt=True)
    last = load_file(tmp_path/'last.pth')
    learn.opt.load_state_dict(last['opt'])
    assert torch.equal(last['random']['torch'], torch.get_rng_state())

# ---- other processes

TRAIN = '''
import sys, os, time, torch
sys.path.insert(0, {tests!r})
from test_checkpoint import learner
from distillbook.core import UserError
from fastai.basics import Callback
class Slow(Callback):
    def after_batch(self):
        time.sleep(.02)
        if self.epoch==1 and self.iter==0 and self.training: print('go', flush=True)
try: learner({folder!r}, [.1,.2,.3], cbs=[Slow()]).fit(100, 1e-2)
except UserError as e:
    print(type(e).__name__, e, flush=True)
    sys.exit(2)
'''
ENV = dict(os.environ, OMP_NUM_THREADS='1')

@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    "Two trainings at once, each stopped by its own signal: (folder, output, exit status)"
    ps = {}
    for sig in (signal.SIGINT, signal.SIGTERM):
        d = tmp_path_factory.mktemp(sig.name)
        ps[sig.name] = d,subprocess.Popen([sys.executable, '-W', 'ignore', '-c', TRAIN.format(tests=str(Path(__file__).parent), folder=str(d))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    res = {}
    for name,(d,p) in ps.items():
        assert p.stdout.readline().strip()=='go', p.stderr.read()
        p.send_signal(getattr(signal, name))
        out,err = p.communicate(timeout=60)
        res[name] = d,out,err,p.returncode
    return res

@pytest.mark.parametrize('name', ('SIGINT', 'SIGTERM'))
def test_signals(name, stopped):
    folder,out,err,code = stopped[name]
    assert code==2 and out.startswith(f'Stopped stopped by {name} ') and not err and str(folder/'last.pth') in out
    last = load_file(folder/'last.pth')
    when = f"in epoch {last['epoch']+1} of 100" + (f", after batch {last['batch']+1} of 4;" if last['batch'] is not None else '')
    assert (when in out or f"after epoch {last['epoch']+1} of 100" in out) and last['epoch']>=1
    fresh = learner(folder)
    fresh.model.load_state_dict(last['model'])
    assert load_file(folder/'best.pth')['net']=='Student' and sorted(f.name for f in folder.iterdir())==['best.pth', 'last.pth']

SAVE = '''
import torch
from distillbook.checkpoint import save_file
for i in range(100000):
    save_file(dict(i=i, w=torch.full((500_000,), float(i))), {path!r})
    if not i: print('go', flush=True)
'''
def test_killed_while_saving(tmp_path):
    path,held = tmp_path/'w.pth',[]
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', SAVE.format(path=str(path))], stdout=subprocess.PIPE, text=True, env=ENV)
    assert p.stdout.readline().strip()=='go'
    try:
        for i in range(20):
            time.sleep(0.011)
            s = load_file(path)
            assert (s['w']==s['i']).all()
            held.append(s['i'])
    finally:
        p.kill()
        p.wait()
    s = load_file(path)
    assert (s['w']==s['i']).all() and held==sorted(held) and len(set(held))>1
    save_file(dict(i='new'), path)
    assert load_file(path)==dict(i='new')

FULL = '''
import resource, signal, sys
sys.path.insert(0, {tests!r})
from test_checkpoint import learner
from distillbook.core import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try: learner({folder!r}).fit(1, 1e-2)
except UserError as e:
    print(e)
    sys.exit(2)
'''
def test_a_full_disk_while_training(tmp_path):
    save_file(dict(i='old'), tmp_path/'best.pth')
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', FULL.format(tests=str(Path(__file__).parent), folder=str(tmp_path))], capture_output=True, text=True, env=ENV)
    assert p.returncode==2, p.stderr
    assert 'best.pth could not be written, what was there before is unchanged' in p.stdout and len(p.stdout.strip().splitlines())==1
    assert load_file(tmp_path/'best.pth')==dict(i='old') and [f.name for f in tmp_path.iterdir()]==['best.pth']
