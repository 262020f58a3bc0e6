"Files that are whole whatever happens: real signals to real processes, full disks, strangers' files, ties and NaN; and runs that go on from them as if nothing had been"
import json, math, multiprocessing, os, pickle, random, signal, subprocess, sys, time
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.basics import SGD, Adam, Callback, DataLoader, DataLoaders, Metric, OptimWrapper, set_seed
from fastai.callback.all import EarlyStoppingCallback, GradientAccumulation, GradientClip, MixedPrecision, ProgressCallback, ReduceLROnPlateau
from fastai.metrics import accuracy, error_rate
from torch import nn
from torch.utils.data import DataLoader as TorchDL, RandomSampler, TensorDataset

from distillbook.cache import CachedNet
from distillbook.checkpoint import Checkpoint, Stopped, frozen_hashes, load_file, plain, save_file, state_hash, without_frozen
from distillbook.config import lr_schedule
from distillbook.core import UserError
from distillbook.learner import NonFiniteLoss, distill_learner
from distillbook.losses import distance, dml, kd
from distillbook.data.loader import SampleDL
from distillbook.data.sets import SampleSet
from distillbook.nets import Nets
from distillbook.schedules import FollowSchedule
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
    assert best['value']==pytest.approx(learn.table()[monitor].min()) and best['net'] is None and {k.split('.')[0] for k in best['model']}=={'Student'} and list(best['frozen'])==['Teacher']

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
    assert list(last['frozen'])==['Teacher'] and not any(k.startswith('Teacher') for k in last['model'])
    fresh.model.load_state_dict(last['model'] | {k: v for k,v in fresh.model.state_dict().items() if k.startswith('Teacher')})
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

# ---- going on: killed and resumed equals never killed, to the last bit

class Early(nn.Module):
    "A branch that is used in the first batches only: afterwards its gradient is zero, which for an optimiser is not the same as none"
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(8,8)
        self.register_buffer('n', torch.tensor(0))
    def forward(self, x):
        if self.n<2: x = x+self.extra(x)
        if self.training: self.n += 1
        return x

class Points(torch.utils.data.Dataset):
    def __init__(self, noise=False): self.x,self.noise = torch.randn(60,4, generator=torch.Generator().manual_seed(1)),noise
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        x = self.x[i]
        return x + (torch.randn(4)+random.random()+np.random.rand() if self.noise else 0.), (self.x[i,0]*self.x[i,1]>0).long()

class ByEpoch:
    "A loader whose order depends on (seed, epoch) alone, and which need not load what it skips"
    def __init__(self, ds, bs): self.ds,self.bs,self.epoch,self.skip,self.loaded,self.device = ds,bs,0,0,0,None
    def __len__(self): return -(-len(self.ds)//self.bs)
    def set_epoch(self, epoch, skip=0): self.epoch,self.skip = epoch,skip
    def one_batch(self): return next(iter(self))
    def __iter__(self):
        torch.empty((), dtype=torch.int64).random_() # as PyTorch's loaders do
        order = np.random.default_rng([7, self.epoch]).permutation(len(self.ds))
        for i in range(self.skip*self.bs, len(self.ds), self.bs):
            self.loaded += 1
            xs,ys = zip(*(self.ds[j] for j in order[i:i+self.bs]))
            yield torch.stack(xs),torch.stack(ys)

def flat(b): return b[0].flatten(1),b[1]
def noisy(sample, rng): return {**sample, 'image': sample['image'] + rng.normal(size=4).astype('float32')}

def loader(kind):
    gen = torch.Generator().manual_seed(5)
    if kind=='a': return DataLoader(Points(), bs=8, shuffle=True)
    if kind=='a-noise': return DataLoader(Points(True), bs=8, shuffle=True)
    if kind=='b': return ByEpoch(Points(), 8)
    if kind=='b-lines': return SampleDL(SampleSet([dict(path=str(i), image=x.numpy()[None,None], label=int(y)) for i,(x,y) in enumerate(Points()[j] for j in range(60))], [noisy], ['image','label'], seed=3), bs=8, shuffle=True, num_workers=2, after_batch=flat)
    if kind=='c': return TorchDL(Points(), 8, shuffle=True, generator=gen)
    if kind=='c-noise': return TorchDL(Points(True), 8, shuffle=True)
    if kind=='c-sampler': return TorchDL(Points(), 8, sampler=RandomSampler(Points(), replacement=True, generator=gen))
    if kind=='c-workers': return TorchDL(Points(True), 8, shuffle=True, generator=gen, num_workers=2, multiprocessing_context='fork')

def deep(): return nn.Sequential(nn.Linear(4,8), nn.BatchNorm1d(8), Early(), nn.ReLU(), nn.Dropout(.3), nn.Linear(8,2))
def half(pct): return 1-pct/2
OPTS = dict(adam=Adam, sgd=partial(SGD, mom=.9), adamw=partial(OptimWrapper, opt=torch.optim.AdamW))
FITS = dict(const=lambda l, n=3: l.fit(n, 1e-2), one=lambda l, n=3: l.fit_one_cycle(n, 1e-2), flat=lambda l, n=3: l.fit_flat_cos(n, 1e-2),
            follow=lambda l, n=3: l.fit(n, cbs=FollowSchedule(lr_schedule(dict(name='Cosine', learning_rate=.02, warmup_epoch=1), 3, 8))))

class NoTensors(nn.Module):
    "A teacher that runs elsewhere, as one in ONNX does"
    def forward(self, x): return x[:,:2]*3
def a_teacher(seed=9, drop=.3, **kw):
    set_seed(seed)
    return nn.Sequential(nn.Linear(4,32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(drop), nn.Linear(32,2))
TEACHERS = dict(plain=lambda folder: a_teacher(), cached=lambda folder: CachedNet(a_teacher(), folder/'answers.bin'), none=lambda folder: NoTensors(), cached_none=lambda folder: CachedNet(NoTensors(), folder/'answers.bin'))

def two(folder, kind='a', opt='adam', cbs=(), h=None, monitor='A_accuracy', terms=None, bar=False, net=deep, metrics=accuracy, teacher=None, **kw):
    teachers = dict(T=TEACHERS[teacher](Path(folder))) if teacher else {}
    set_seed(0)
    terms = terms or [Term(F.cross_entropy,'A'), Term(F.cross_entropy,'B', weight=1.), Term(dml,'A','B'), Term(dml,'B','A'), *(Term(kd,'A',t) for t in teachers)]
    dls = DataLoaders(loader(kind), DataLoader(Points(), bs=32))
    learn = distill_learner(dls, dict(A=net(), **teachers, B=net()), terms, frozen=list(teachers), metrics=metrics, monitor=monitor, opt_func=OPTS[opt], wd=.1, cbs=[Checkpoint(folder, **kw), *cbs])
    if not bar: learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = lambda *_: None
    return learn

class Kill(Callback):
    "A real signal to this process, at one event of one batch"
    order = 70
    def __init__(self, at, sig, event='before_step'): self.at,self.sig,self.when = at,sig,event
    def hit(self, event):
        if event==self.when and (self.epoch,self.iter)==self.at: os.kill(os.getpid(), self.sig)
    def before_step(self): self.hit('before_step')
    def after_batch(self): self.hit('after_batch' if self.training else 'validating')

def process(folder, kind, fit, opt, kill=None, **kw):
    "What runs in the other process"
    torch.set_num_threads(1)
    if kill: os.dup2(os.open(os.devnull, os.O_WRONLY), 2) # the loader's workers, left alone, complain
    learn = two(folder, kind, opt, cbs=[Kill(*kill)] if kill else [], **kw)
    try: FITS[fit](learn)
    except Stopped: os._exit(3)
    learn.table().to_csv(Path(folder)/'table.csv')

@pytest.fixture(scope='module')
def run():
    "Start `process` in a process of its own; the server that forks them has done the imports"
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['pytest', 'fastai.callback.all', 'distillbook.checkpoint', 'distillbook.schedules', 'distillbook.data.sets', 'torch._dynamo']) # the last: a PyTorch optimiser imports it
    def start(*args, **kw):
        p = ctx.Process(target=process, args=args, kwargs=kw)
        p.start()
        return p
    return start

def ended(p, code):
    p.join(60)
    assert p.exitcode==code

def equal(a, b, where=''):
    "Nested states, to the last bit"
    if isinstance(a, dict):
        assert a.keys()==b.keys(), where
        for k in a: equal(a[k], b[k], f'{where}.{k}')
    elif isinstance(a, list):
        assert len(a)==len(b), where
        for i,(x,y) in enumerate(zip(a, b)): equal(x, y, f'{where}.{i}')
    elif isinstance(a, torch.Tensor): assert a.dtype==b.dtype and torch.equal(a, b), where
    else: assert a==b, (where, a, b)

def same_files(a, b):
    for f in ('best.pth', 'last.pth'): equal(load_file(a/f), load_file(b/f), f)

KILL,TERM = signal.SIGKILL,signal.SIGTERM
@pytest.mark.parametrize('kind,fit,opt,every,kill,at', [
    ('a', 'const', 'adam', 5, ((1,4), KILL), (1,1)), ('a', 'one', 'adam', 3, ((1,5), KILL), (1,3)), ('a', 'one', 'adamw', None, ((1,4), KILL), (0,None)), ('a', 'flat', 'adam', None, ((1,4), TERM), (1,4)),
    ('a', 'const', 'sgd', 3, ((2,7), KILL, 'after_batch'), (2,7)), ('a', 'one', 'adam', 8, ((1,1), KILL, 'validating'), (1,7)), ('a', 'one', 'adam', None, ((0,0), TERM), (0,0)),
    ('a-noise', 'follow', 'adam', 3, ((1,5), KILL), (1,3)), ('b', 'follow', 'adamw', 3, ((1,5), KILL), (1,3)), ('b', 'one', 'adam', None, ((1,4), KILL), (0,None)), ('b', 'const', 'adam', 8, ((1,1), KILL, 'validating'), (1,7)),
    ('b-lines', 'one', 'adam', 3, ((1,5), KILL), (1,3)), ('b-lines', 'follow', 'adamw', None, ((1,4), TERM), (1,4)),
    ('c', 'one', 'adamw', 3, ((1,5), KILL), (1,3)), ('c', 'const', 'adam', None, ((2,2), KILL), (1,None)), ('c-noise', 'const', 'adam', None, ((1,4), TERM), (1,4)),
    ('c-sampler', 'flat', 'adam', 3, ((1,5), KILL), (1,3)), ('c-workers', 'const', 'adam', 3, ((1,5), KILL), (1,3))])
def test_killed_and_resumed_equals_never_killed(kind, fit, opt, every, kill, at, run, tmp_path):
    whole,cut = tmp_path/'whole',tmp_path/'cut'
    never,killed = run(whole, kind, fit, opt),run(cut, kind, fit, opt, kill=kill, every=every)
    ended(killed, -KILL if kill[1]==KILL else 3)
    last = load_file(cut/'last.pth')
    assert (last['epoch'], last['batch'])==at
    ended(run(cut, kind, fit, opt, resume=str(cut/'last'), every=every), 0)
    ended(never, 0)
    same_files(whole, cut)
    assert (whole/'table.csv').read_text()==(cut/'table.csv').read_text() and len((cut/'table.csv').read_text().splitlines())==4

@pytest.mark.parametrize('teacher,kill,at', [('plain', ((1,5), KILL), (1,3)), ('cached', ((1,4), TERM), (1,4)), ('cached_none', ((1,5), KILL), (1,3))])
def test_killed_and_resumed_with_a_teacher_that_is_in_no_file(teacher, kill, at, run, tmp_path):
    whole,cut = tmp_path/'whole',tmp_path/'cut'
    never,killed = run(whole, 'a', 'one', 'adam', teacher=teacher),run(cut, 'a', 'one', 'adam', kill=kill, every=3, teacher=teacher)
    ended(killed, -KILL if kill[1]==KILL else 3)
    last = load_file(cut/'last.pth')
    assert (last['epoch'], last['batch'])==at and not any(k.startswith('T.') for k in last['model']) and list(last['frozen'])==['T']
    ended(run(cut, 'a', 'one', 'adam', resume=str(cut/'last'), every=3, teacher=teacher), 0)
    ended(never, 0)
    same_files(whole, cut)

@pytest.mark.parametrize('pause', (.02, .07))
def test_killed_from_outside_at_any_moment_twice(pause, run, tmp_path):
    whole,cut = tmp_path/'whole',tmp_path/'cut'
    never = run(whole, 'a', 'one', 'adam')
    for resume in (None, str(cut/'last')):
        p = run(cut, 'a', 'one', 'adam', every=2, resume=resume)
        before = (cut/'last.pth').stat().st_mtime_ns if resume else None
        while p.is_alive() and not ((cut/'last.pth').exists() and (cut/'last.pth').stat().st_mtime_ns!=before): time.sleep(.001)
        time.sleep(pause)
        p.kill()
        p.join()
    ended(run(cut, 'a', 'one', 'adam', every=2, resume=str(cut/'last')), 0)
    ended(never, 0)
    same_files(whole, cut)

# ---- the same within this process, where an exception will do for a kill

class Gone(Exception): pass
class Die(Callback):
    order = 70
    def __init__(self, epoch, batch): self.at = epoch,batch
    def after_loss(self):
        if self.training and (self.epoch,self.iter)==self.at: raise Gone('gone')

def interrupted(folder, fit, at=(1,5), cbs=list, **kw):
    "A learner that ran to the end, and one that died, was resumed in `folder/cut` and ran to the end"
    kw = dict(every=3) | kw
    never = two(folder/'whole', cbs=cbs(), **kw)
    fit(never)
    with pytest.raises(Gone): fit(two(folder/'cut', cbs=[*cbs(), Die(*at)], **kw))
    cut = two(folder/'cut', cbs=cbs(), resume=folder/'cut'/kw.get('last', 'last'), **kw)
    fit(cut)
    return never,cut

def test_all_that_was_recorded_is_there(tmp_path):
    never,cut = interrupted(tmp_path, FITS['one'])
    assert never.table().equals(cut.table()) and len(cut.table())==3 and never.parts().equals(cut.parts()) and len(cut.parts())==24
    a,b = never.recorder,cut.recorder
    assert a.lrs==b.lrs and a.iters==b.iters and a.losses==b.losses and never.term_recorder.where==cut.term_recorder.where and never.term_recorder.valid==cut.term_recorder.valid
    assert (never.train_iter, never.pct_train)==(cut.train_iter, cut.pct_train)
    equal(plain(never.opt.hypers), plain(cut.opt.hypers))

def test_a_loader_that_can_skip_loads_only_what_is_left(tmp_path):
    never,cut = interrupted(tmp_path, FITS['const'], kind='b')
    assert (never.dls[0].loaded, cut.dls[0].loaded)==(24+1, 12+1) # one batch by the front door; epoch 1 goes on at its batch 4
    same_files(tmp_path/'whole', tmp_path/'cut')

def test_a_loader_that_cannot_skip_shows_what_is_left(tmp_path):
    seen = []
    class See(Callback):
        def before_batch(self): self.training and seen.append((self.epoch, self.iter, self.pct_train, self.xb[0].clone()))
    interrupted(tmp_path, FITS['const'], at=(1,7), cbs=lambda: [See()])
    whole,resumed = seen[15:24],seen[-9:]
    assert [o[:3] for o in resumed]==[o[:3] for o in whole] and all(torch.equal(a[3], b[3]) for a,b in zip(whole, resumed))

def test_with_a_progress_bar(tmp_path, capsys):
    never,cut = interrupted(tmp_path, FITS['one'], bar=True)
    assert never.table().equals(cut.table())

def test_names_and_epochs_kept_as_a_paddleocr_run_calls_them(tmp_path):
    kw = dict(best='best_accuracy', last='latest', keep_epochs=2)
    never,cut = interrupted(tmp_path, lambda l: l.fit(5, 1e-2), at=(3,5), **kw)
    for f in ('whole','cut'): assert {o.name for o in (tmp_path/f).iterdir()}=={'best_accuracy.pth', 'latest.pth', 'iter_epoch_2.pth', 'iter_epoch_4.pth'}
    again = two(tmp_path/'again', resume=str(tmp_path/'whole'/'iter_epoch_2'), every=3, **kw)
    again.fit(5, 1e-2)
    assert load_file(tmp_path/'whole'/'iter_epoch_2.pth')['epoch']==1
    for f in ('cut','again'): equal(load_file(tmp_path/'whole'/'latest.pth'), load_file(tmp_path/f/'latest.pth'))

def test_the_best_score_goes_on_and_the_best_network_stays(tmp_path):
    "PaddleOCR 2.10 begins again at 0 and overwrites the best network by a worse one"
    def acc(): return {'A': Scripted([.9,.2,.3])}
    with pytest.raises(Gone): two(tmp_path, cbs=[Die(1,5)], metrics=acc(), monitor='A_acc').fit(3, 1e-2)
    best = (tmp_path/'best.pth').read_bytes()
    two(tmp_path, resume=tmp_path/'last', metrics={'A': Scripted([.2,.3])}, monitor='A_acc').fit(3, 1e-2)
    assert (tmp_path/'best.pth').read_bytes()==best and load_file(tmp_path/'last.pth')['best']==.9
    two(tmp_path/'new', resume=tmp_path/'last', metrics={'A': Scripted([.4,.95])}, monitor='A_acc').fit(4, 1e-2)
    assert load_file(tmp_path/'new/best.pth')['value']==.9
    two(tmp_path/'new', resume=tmp_path/'last', metrics={'A': Scripted([.95])}, monitor='A_acc').fit(4, 1e-2)
    assert load_file(tmp_path/'new/best.pth')['value']==.95

TRACKERS = dict(plateau=(None, lambda: [ReduceLROnPlateau('A_acc', patience=2)]), stopping=(None, lambda: [EarlyStoppingCallback('A_acc', patience=3)]),
                accumulation=(3, lambda: [GradientAccumulation(24)]), clip=(3, lambda: [GradientClip(.1)]))
@pytest.mark.parametrize('what', TRACKERS)
def test_fastais_own_callbacks_go_on_counting(what, tmp_path, capsys):
    every,cbs = TRACKERS[what]
    never,cut = interrupted(tmp_path, lambda l: l.fit(5, 1e-2), at=(3,5), cbs=cbs, metrics={'A': Scripted([0.])}, monitor=None, every=every)
    last = load_file(tmp_path/'cut/last.pth')
    equal(load_file(tmp_path/'whole/last.pth'), last)
    assert never.table().equals(cut.table()) and last['epoch']+1==len(cut.table())==(4 if what=='stopping' else 5)

class HalfOnCPU(MixedPrecision):
    "fastai's mixed precision, on the processor that is there"
    def before_fit(self):
        super().before_fit()
        self.autocast,self.learn.scaler = torch.amp.autocast('cpu', dtype=torch.bfloat16),torch.amp.GradScaler('cpu', init_scale=8., growth_interval=3)
def test_mixed_precision_keeps_its_scale(tmp_path):
    never,cut = interrupted(tmp_path, FITS['one'], cbs=lambda: [HalfOnCPU()])
    scale = load_file(tmp_path/'cut/last.pth')['scaler']
    assert scale['scale']==8*2**8
    equal(load_file(tmp_path/'whole/last.pth'), load_file(tmp_path/'cut/last.pth'))

def test_projectors_are_in_the_state(tmp_path):
    def terms(): return [Term(F.cross_entropy,'A'), Term(F.cross_entropy,'B'), Term(distance, 'A.0', 'B.0')]
    sizes = iter([6,8]*3)
    def net(): return (lambda h: nn.Sequential(nn.Linear(4,h), nn.BatchNorm1d(h), nn.Linear(h,2)))(next(sizes))
    never = two(tmp_path/'whole', terms=terms(), net=net)
    never.fit(2, 1e-2)
    with pytest.raises(Gone): two(tmp_path/'cut', terms=terms(), net=net, every=3, cbs=[Die(1,5)]).fit(2, 1e-2)
    two(tmp_path/'cut', terms=terms(), net=net, resume=tmp_path/'cut/last').fit(2, 1e-2)
    assert any('_projectors' in k for k in load_file(tmp_path/'cut/last.pth')['model'])
    same_files(tmp_path/'whole', tmp_path/'cut')

def test_more_epochs_where_nothing_follows_their_number(tmp_path):
    whole,cut = two(tmp_path/'whole', every=3),tmp_path/'cut'
    whole.fit(4, 1e-2)
    with pytest.raises(Gone): two(cut, every=3, cbs=[Die(1,5)]).fit(2, 1e-2)
    again = two(cut, resume=cut/'last', every=3)
    again.fit(4, 1e-2)
    same_files(tmp_path/'whole', cut)
    assert again.table().equals(whole.table()) and again.pct_train==whole.pct_train

def test_a_fit_that_is_done_has_nothing_left(tmp_path):
    done = two(tmp_path)
    done.fit_one_cycle(2, 1e-2)
    before = (tmp_path/'last.pth').read_bytes()
    again = two(tmp_path, resume=tmp_path/'last')
    again.fit_one_cycle(2, 1e-2)
    assert same(again.model.state_dict(), done.model.state_dict()) and again.table().equals(done.table()) and (tmp_path/'last.pth').read_bytes()==before

def test_only_the_next_fit_goes_on(tmp_path):
    two(tmp_path).fit(2, 1e-2)
    learn = two(tmp_path/'new', resume=tmp_path/'last')
    learn.lr_find(num_it=5, show_plot=False)
    learn.fit(3, 1e-2)
    assert len(learn.parts())==24 and len(learn.table())==3 and learn.resumed is None
    learn.fit(1, 1e-2)
    assert len(learn.parts())==8 and len(learn.table())==1

# ---- what cannot be gone on from

def wider(): return nn.Sequential(nn.Linear(4,9), nn.Linear(9,2))
OTHERS = dict(nets=(dict(net=wider), 'the tensor A.0.weight was [8, 4]'), optimiser=(dict(opt='sgd'), 'the optimiser was'), epochs=(dict(n=4), 'the number of epochs'), terms=(dict(terms=[Term(F.cross_entropy,'A'), Term(F.cross_entropy,'B')]), 'the terms'),
    metrics=(dict(metrics=error_rate, monitor='A_error_rate'), 'the columns'), monitor=(dict(monitor='B_accuracy'), 'the monitor'), precision=(dict(cbs=[HalfOnCPU()]), 'the precision'),
    batches=(dict(kind='half'), 'the number of batches in an epoch was 8 and is now 4'), constant=(dict(fit='const'), 'the schedule of lr'), flat=(dict(fit='flat'), 'the schedule of lr'))
@pytest.mark.parametrize('what', OTHERS)
def test_another_run_is_refused_and_nothing_is_touched(what, cycle, tmp_path, monkeypatch):
    kw,message = OTHERS[what]
    kw = dict(kw)
    if kw.get('kind')=='half': monkeypatch.setattr(Points, '__len__', lambda self: 30)
    fit,n = FITS[kw.pop('fit', 'one')],kw.pop('n', 3)
    learn = two(tmp_path, resume=cycle/'last', **{k: v for k,v in kw.items() if k!='kind'})
    before,opt = state(learn.model),signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError) as e: fit(learn, n)
    assert message in str(e.value) and str(cycle/'last.pth') in str(e.value) and len(str(e.value).splitlines())==1
    assert same(before, learn.model.state_dict()) and not any(learn.opt.state.values()) and signal.getsignal(signal.SIGINT) is opt and not list(tmp_path.iterdir())

@pytest.fixture(scope='module')
def cycle(tmp_path_factory):
    "A run of three epochs under one-cycle that died in the second"
    folder = tmp_path_factory.mktemp('cycle')
    with pytest.raises(Gone): two(folder, every=3, cbs=[Die(1,5)]).fit_one_cycle(3, 1e-2)
    return folder

def test_another_rate_frozen_net_or_fewer_epochs(cycle, tmp_path):
    with pytest.raises(UserError, match='the schedule of lr'): two(tmp_path, resume=cycle/'last').fit_one_cycle(3, 2e-2)
    learn = two(tmp_path, resume=cycle/'last')
    learn.freeze('B')
    with pytest.raises(UserError, match=r"the list of frozen networks was \[\] and is now \['B'\]"): learn.fit_one_cycle(3, 1e-2)
    two(tmp_path).fit(2, 1e-2)
    with pytest.raises(UserError, match='the lr given to fit was 0.01 and is now 0.02'): two(tmp_path, resume=tmp_path/'last').fit(2, 2e-2)
    with pytest.raises(UserError, match='in epoch 2 already, and this fit has 1'): two(tmp_path, resume=tmp_path/'last').fit(1, 1e-2)

def test_a_weight_that_follows_progress_counts_the_epochs(tmp_path):
    def terms(): return [Term(F.cross_entropy,'A'), Term(F.cross_entropy,'B', weight=half)]
    two(tmp_path, terms=terms()).fit(2, 1e-2)
    with pytest.raises(UserError, match='the number of epochs'): two(tmp_path, terms=terms(), resume=tmp_path/'last').fit(3, 1e-2)

@pytest.mark.parametrize('what,message', [('none','there is no'), ('best','does not hold the state of a run'), ('cut','not a readable checkpoint'), ('turned','not a readable checkpoint'), ('list','does not hold')])
def test_a_file_that_cannot_be_gone_on_from(what, message, cycle, tmp_path):
    whole = (cycle/'last.pth').read_bytes()
    if what=='best': (tmp_path/'best.pth').write_bytes((cycle/'best.pth').read_bytes())
    if what=='cut': (tmp_path/'cut.pth').write_bytes(whole[:-100])
    if what=='turned':
        w = load_file(cycle/'last.pth')['model']['A.0.weight'].numpy().tobytes()
        (tmp_path/'turned.pth').write_bytes(whole.replace(w, bytes([w[0]^1])+w[1:]))
    if what=='list': torch.save([1], tmp_path/'list.pth')
    learn = two(tmp_path/'new', resume=tmp_path/what)
    with pytest.raises(UserError, match=message): learn.fit_one_cycle(3, 1e-2)
    with pytest.raises(UserError, match=message): learn.fit_one_cycle(3, 1e-2)

# ---- frozen networks: name and hash suffice

@pytest.mark.parametrize('teacher', TEACHERS)
def test_no_file_holds_a_frozen_network(teacher, tmp_path):
    learn = two(tmp_path, teacher=teacher, monitor='valid_loss')
    before = state(learn.net('T'))
    learn.fit(2, 1e-2)
    best,last = load_file(tmp_path/'best.pth'),load_file(tmp_path/'last.pth')
    for f in (best,last):
        assert {k.split('.')[0] for k in f['model']}=={'A','B'} and f['frozen']==dict(T=state_hash(learn.net('T')))==frozen_hashes(learn.model)
        assert f['model'].keys()==without_frozen(learn.model).keys()
    again = two(tmp_path, teacher=teacher, monitor='valid_loss', resume=tmp_path/'last')
    again.fit(3, 1e-2)
    assert same(before, state(again.net('T'))) and len(again.table())==3

@pytest.mark.parametrize('was,now', [('plain','cached'), ('cached','plain'), ('none','cached_none')])
def test_a_cache_makes_no_other_teacher(was, now, tmp_path):
    "To the last bit where the teacher does not round by the size of its batch"
    never = two(tmp_path/'whole', teacher=was)
    never.fit(3, 1e-2)
    two(tmp_path/'cut', teacher=was).fit(2, 1e-2)
    cut = two(tmp_path/'cut', teacher=now, resume=tmp_path/'cut/last')
    cut.fit(3, 1e-2)
    if was=='none': return same_files(tmp_path/'whole', tmp_path/'cut')
    torch.testing.assert_close(without_frozen(cut.model), without_frozen(never.model), atol=1e-3, rtol=1e-3)
    assert load_file(tmp_path/'cut/last.pth')['frozen']==load_file(tmp_path/'whole/last.pth')['frozen']

def nudged(folder):
    net = a_teacher()
    with torch.no_grad(): net[1].running_mean[3] += 1e-7
    return net
ANOTHER = dict(seed=lambda folder: a_teacher(10), one_bit=nudged, wider=lambda folder: nn.Sequential(nn.Linear(4,40), nn.Linear(40,2)), none=TEACHERS['none'], cached=lambda folder: CachedNet(a_teacher(10), folder/'a.bin'))
@pytest.mark.parametrize('other', ANOTHER)
def test_another_teacher_is_refused_and_nothing_is_touched(other, tmp_path, monkeypatch):
    two(tmp_path, teacher='plain', every=3).fit(2, 1e-2)
    monkeypatch.setitem(TEACHERS, 'plain', ANOTHER[other])
    learn = two(tmp_path/'new', teacher='plain', resume=tmp_path/'last')
    before = state(learn.model)
    with pytest.raises(UserError, match='T, which is frozen, is not the network of that run') as e: learn.fit(3, 1e-2)
    assert str(tmp_path/'last.pth') in str(e.value) and same(before, state(learn.model)) and not any(learn.opt.state.values()) and not list((tmp_path/'new').glob('*.pth'))

def test_a_hash_of_names_and_numbers():
    a,b = a_teacher(),a_teacher()
    assert state_hash(a)==state_hash(b)==state_hash(a.double().float()) and len(state_hash(a))==32
    assert len({state_hash(m) for m in (a, a_teacher(8), b.double(), nn.Linear(4,4), nn.Conv1d(4,4,1), NoTensors())})==6
    assert state_hash(nn.ModuleDict(dict(a=nn.Linear(2,2).requires_grad_(False)))) != state_hash(nn.ModuleDict(dict(b=nn.Linear(2,2))))
    assert state_hash(nn.Identity())==state_hash(NoTensors())

def test_a_hash_does_not_depend_on_memory_layout():
    a = nn.Conv2d(3,4,3)
    h = state_hash(a)
    assert state_hash(a.to(memory_format=torch.channels_last))==h
    half = nn.Linear(3,3).bfloat16()
    assert state_hash(half)==state_hash(half)

def test_the_file_of_a_small_student_is_small(tmp_path):
    def size(h):
        set_seed(0)
        x = torch.randn(64,4)
        ds = TensorDataset(x, (x[:,0]>0).long())
        learn = distill_learner(DataLoaders(DataLoader(ds, bs=16), DataLoader(ds, bs=32)), dict(T=nn.Sequential(nn.Linear(4,h), nn.Linear(h,3)), S=mlp()), [Term(kd,'S','T')], frozen='T', metrics=accuracy, monitor='S_accuracy', cbs=Checkpoint(tmp_path))
        learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
        learn.logger = lambda *_: None
        learn.fit(1, 1e-2)
        return (tmp_path/'last.pth').stat().st_size
    assert abs(size(20000)-size(2))<200

def test_frozen_between_two_fits(tmp_path):
    "What is frozen when the fit begins is in no file, whatever it was before"
    learn = two(tmp_path)
    learn.fit(1, 1e-2)
    assert load_file(tmp_path/'last.pth')['frozen']=={} and any(k.startswith('B.') for k in load_file(tmp_path/'last.pth')['model'])
    learn.freeze('B')
    learn.fit(1, 1e-2)
    last = load_file(tmp_path/'last.pth')
    assert list(last['frozen'])==['B'] and not any(k.startswith('B.') for k in last['model'])
