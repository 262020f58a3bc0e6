"Several ranks: each part alone, then real jobs that torchrun starts on the CPU"
import json, os, re, signal, subprocess, sys, time
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.basics import DataLoader, DataLoaders, OptimWrapper, accuracy, set_seed
from torch import distributed as dist, nn
from torch.utils.data import TensorDataset
from distillbook import devices
from distillbook.checkpoint import check_same, load_file
from distillbook.cli import app
from distillbook.core import UserError
from distillbook.det.metric import DetMetric
from distillbook.learner import distill_learner
from distillbook.losses import distance, dml
from distillbook.nets import Nets
from distillbook.rec.decode import RecMetric
from distillbook.rec.labels import Alphabet
from distillbook.terms import Term
from test_cli import fails
from test_cli_io import NETS, ROOT, distillbook, overrides

CONFIG = ROOT/'configs/rec/ppocrv3_distillation.yml'

# ---- parts

@pytest.mark.parametrize('bs', (1, 3, 4))
@pytest.mark.parametrize('n', (1, 5, 12, 25))
@pytest.mark.parametrize('world', (1, 2, 3, 7))
def test_own_idxs(n, bs, world):
    idxs = np.random.default_rng(0).permutation(n).tolist()
    parts = [devices.own_idxs(idxs, bs, r, world, fill=False) for r in range(world)]
    assert sorted(sum(parts, []))==sorted(idxs)
    filled = [devices.own_idxs(idxs, bs, r, world) for r in range(world)]
    assert len({len(o) for o in filled})==1 and set(sum(filled, []))==set(idxs) and len(sum(filled, []))<n+world
    for k in range(n//(bs*world)): assert sum((o[k*bs:(k+1)*bs] for o in filled), [])==idxs[k*bs*world:(k+1)*bs*world]

def test_part_of_a_loader():
    for drop in (False, True):
        dl = DataLoader(list(range(23)), bs=2, shuffle=True, drop_last=drop)
        state = dl.rng.getstate()
        for train in (True, False):
            got = []
            for part in [devices.part_of(dl, r, 3, train) for r in range(3)]:
                dl.rng.setstate(state)
                got.append([o.tolist() for o in part])
                assert len(got[-1])==len(part)
            if train: assert len({len(o) for o in got})==1
            read = [i for g in got for b in g for i in b]
            assert len(set(read))==(18 if drop else 23) and (len(read)==len(set(read)) or train and not drop)
    with pytest.raises(UserError, match='a list cannot be shared among 2 ranks'): devices.part_of([1,2], 0, 2, True)

def net(h): return nn.Sequential(nn.Conv2d(1,h,3), nn.BatchNorm2d(h), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9*h,5))

class Idle(nn.Module):
    "A student with a layer that no term reaches"
    def __init__(self):
        super().__init__()
        self.used,self.idle = net(6),nn.Linear(5,5)
    def forward(self, x): return dict(y=self.used(x), z=self.idle(self.used(x).detach()))

def learner(**kw):
    set_seed(0)
    data = TensorDataset(torch.randn(40,1,8,8), torch.randint(5, (40,)))
    dls = DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8))
    return distill_learner(dls, dict(Teacher=net(12), A=Idle(), B=net(6)), [Term(F.cross_entropy, 'A.y'), Term(F.cross_entropy, 'B'), Term(dml, 'A.y', 'B'), Term(distance, 'B.2', 'Teacher.2')],
        frozen=['Teacher'], metrics={'B': accuracy}, opt_func=partial(OptimWrapper, opt=torch.optim.SGD), lr=.05, **kw)

@pytest.fixture
def alone():
    "A group of one rank"
    dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()

def test_frozen_nets_stand_outside(alone):
    learn = learner()
    nets,before = learn.model,{k: v.clone() for k,v in learn.model.state_dict().items()}
    got = devices.reached(learn, learn.dls.train)
    assert {k for k,v in got.items() if not v}=={'A.idle.weight','A.idle.bias'} and any(k.startswith('_projectors') for k,v in got.items() if v)
    assert all(torch.equal(v, before[k]) for k,v in nets.state_dict().items()) and all(p.grad is None for p in nets.parameters())
    left = devices.outside(nets, got)
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(nets, left)
    ddp = nn.parallel.DistributedDataParallel(nets)
    inside = {id(p) for p in ddp._build_params_for_reducer()[0]}
    names = {k for k,p in nets.named_parameters() if id(p) in inside}
    assert names=={k for k,v in got.items() if v}
    frozen = {id(b) for b in nets['Teacher'].buffers()}
    assert frozen and not frozen & {id(b) for b in ddp.modules_buffers} and {id(b) for b in nets['B'].buffers()} <= {id(b) for b in ddp.modules_buffers}

def test_a_fit_leaves_the_learner_as_it_was():
    "A group of one rank trains as nobody in a group does, and its learner can go on without one"
    plain,ranked = learner(),learner()
    with plain.no_bar(), plain.no_logging(): plain.fit(2)
    model,loaders = ranked.model,list(ranked.dls.loaders)
    ranked.to_distributed()
    with ranked.no_bar(), ranked.no_logging(): ranked.fit(2)
    assert ranked.model is model and ranked.dls.loaders==loaders
    assert all(torch.allclose(a, b, atol=1e-6) for a,b in zip(plain.model.state_dict().values(), model.state_dict().values()))
    assert not any(k.startswith('module.') for k in model.state_dict())

def test_sync_bn_spares_the_frozen():
    learn = learner()
    learn.to_distributed(sync_bn=True)
    class Look(devices.DistributedTrainer.__mro__[1]):
        order = 12
        def before_train(self):
            self.kinds = {n: {type(m).__name__ for m in devices.get_model(self.learn.model)[n].modules()} for n in ('Teacher','B')}
            raise RuntimeError('seen')
    look = Look()
    with pytest.raises(RuntimeError, match='seen'), learn.no_bar(): learn.fit(1, cbs=look)
    assert 'SyncBatchNorm' in look.kinds['B'] and 'SyncBatchNorm' not in look.kinds['Teacher'] and 'BatchNorm2d' in look.kinds['Teacher']

def test_counts(monkeypatch):
    "Metrics of two halves added up are the metric of the whole"
    rng = np.random.default_rng(0)
    words = [''.join(rng.choice(list('ab'), 4)) for _ in range(11)]
    read = [w if rng.random()<.6 else w[::-1]+'a' for w in words]
    metric = lambda: RecMetric(Alphabet('ab'))
    whole,a,b = metric(),metric(),metric()
    whole.add(read, words), a.add(read[:4], words[:4]), b.add(read[4:], words[4:])
    state = lambda m: {k: vars(m)[k] for k in devices.counts(m)}
    monkeypatch.setattr(devices, 'gathered', lambda o: [[state(a)], [state(b)]])
    devices.add_up([a])
    assert a.value==pytest.approx(whole.value, abs=1e-12) and a.n==11
    assert devices.counts(DetMetric())==['matched','n_boxes','n_words','blind']
    class Odd:
        def __init__(self): self.size = 3
        def reset(self): self.n = [0]*self.size
    with pytest.raises(UserError, match='counts of Odd cannot be added up'): devices.counts(Odd())

def test_another_number_of_ranks():
    "May go on between two epochs; within one only if a step has as many pictures"
    was = {'the number of ranks': 2, 'the number of batches in an epoch': 5, 'x': '1'}
    state = dict(model={}, frozen={}, opt={}, random={}, start={}, batch=None, epoch=1, setup=was)
    check_same(state, {**was, 'the number of ranks': 1, 'the number of batches in an epoch': 10}, 4, 'f')
    check_same({**state, 'batch': 3}, {**was, 'the number of ranks': 1}, 4, 'f')
    with pytest.raises(UserError, match='number of batches'): check_same({**state, 'batch': 3}, {**was, 'the number of ranks': 1, 'the number of batches in an epoch': 10}, 4, 'f')
    with pytest.raises(UserError, match='number of batches'): check_same(state, {**was, 'the number of batches in an epoch': 10}, 4, 'f')
    with pytest.raises(UserError, match='x was 1 and is now 2'): check_same(state, {**was, 'the number of ranks': 1, 'x': '2'}, 4, 'f')

def test_lost(monkeypatch):
    gone = RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2000')
    assert devices.lost(gone, 'a/latest.pth') is gone
    monkeypatch.setenv('WORLD_SIZE', '2')
    said = devices.lost(gone, 'a/latest.pth')
    assert isinstance(said, UserError) and 'another rank has ended' in str(said) and 'Global.checkpoints=a/latest.pth' in str(said)
    other = RuntimeError('shapes')
    assert devices.lost(other, 'a') is other

def test_words_about_mistakes(monkeypatch, tmp_path):
    fails(distillbook('train', '-c', CONFIG, '--amp', 'bf32'), "there are: bf16, fp16, no")
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setitem(sys.modules, 'distillbook.devices', None)
    monkeypatch.delattr('distillbook.devices', raising=False)
    from distillbook.use.training import _devices
    with pytest.raises(UserError, match=re.escape('pip install distillbook[devices]')): _devices()

# ---- jobs

ENV = {k: v for k,v in os.environ.items() if k not in ('RANK','WORLD_SIZE')} | {'OMP_NUM_THREADS': '1'}

def torchrun(*args, restarts=0): return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--max-restarts', str(restarts), '--nproc-per-node', '2', *map(str, args)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    assert distillbook('render', 'rec', '-o', folder/'words', '-n', 21, '--val', 7).returncode==0
    return folder

def args(data, out, *more): return ['train', '-c', str(CONFIG), '-o', *NETS, *overrides(data, f'Global.save_model_dir={out}', 'Train.loader.batch_size_per_card=4', 'Eval.loader.batch_size_per_card=2', 'Global.print_batch_step=1', *more)]

def test_two_ranks_train_and_one_goes_on(data):
    "A run of two ranks: one writes, the numbers are those of one rank, and one rank goes on with it"
    out = data/'two'
    p = torchrun('-m', 'distillbook.cli', *args(data, out, 'Global.epoch_num=2'))
    said,errors = p.communicate(timeout=120)
    assert p.returncode==0, errors
    assert said.count('Everything is in')==1 and errors.count('train with 2 networks')==1 and 'and 1 other ranks' in errors and errors.count('cur metric')==1
    assert sorted(o.name for o in out.iterdir())==['best_accuracy.pth','config.yml','curves.png','latest.pth','metrics.csv','pictures_eval.png','summary.json','train.log']
    assert len((out/'metrics.csv').read_text().splitlines())==2 and json.loads((out/'summary.json').read_text())['samples']==dict(train=21, eval=7)
    state = load_file(out/'latest.pth')
    assert not any('module' in k for k in state['model']) and state['setup']['the number of ranks']==2
    kept = load_file(out/'best_accuracy.pth')['metrics']
    r = distillbook('eval', '--run', out, '--json')
    got = json.loads(r.stdout)
    assert {k: v for k,v in got.items() if k!='fps'}==pytest.approx({k: v for k,v in kept.items() if k!='fps'}, abs=1e-12)
    r = distillbook(*args(data, data/'one', 'Global.epoch_num=3', f'Global.checkpoints={out}/latest'))
    assert r.returncode==0, r.stderr
    assert load_file(data/'one/latest.pth')['epoch']==2 and 'epoch: [3/3]' in (data/'one/train.log').read_text() and 'epoch: [2/3]' not in (data/'one/train.log').read_text()

def killed_rank(data, out):
    "Status and error stream of a job of two ranks, the second of which is killed after the first epoch"
    p = torchrun('-m', 'distillbook.cli', *args(data, out, 'Global.epoch_num=500', 'Global.eval_batch_step=[0, 100000]'))
    try:
        end = time.time()+90
        while not (out/'latest.pth').exists():
            assert p.poll() is None and time.time()<end, p.communicate()[1]
            time.sleep(.2)
        child = next(c for c in subprocess.run(['pgrep','-P',str(p.pid)], capture_output=True, text=True).stdout.split() if b'\0RANK=1\0' in b'\0'+Path(f'/proc/{c}/environ').read_bytes())
        os.kill(int(child), signal.SIGKILL)
        _,errors = p.communicate(timeout=60)
    finally: p.kill()
    return p.returncode,errors

def test_a_killed_rank_ends_the_job(data):
    "On a busy machine torchrun ends the other rank, once in a while, before it can say why: then the job is tried again"
    for i in range(2):
        out = data/f'killed{i}'
        status,errors = killed_rank(data, out)
        assert status!=0 and 'exitcode  : -9' in errors and load_file(out/'latest.pth')['epoch']>=0
        if 'because another rank has ended' in errors: break
    assert 'because another rank has ended' in errors and str(out/'latest.pth') in errors
