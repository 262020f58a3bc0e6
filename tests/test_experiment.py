"A run of two small networks that read nothing: log, evaluations, best state, a kill and what comes after, summary, pictures"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.basics import DataLoader, DataLoaders, set_seed
from distillbook.checkpoint import load_file
from distillbook.core import UserError
from distillbook.losses import kd
from distillbook.nets import Nets
from distillbook.terms import Term
from distillbook.use.evaluation import NetMetrics, evaluate
from distillbook.use.training import *

def points(n, seed):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return list(zip(x, (x[:,0]>0).long() + (x[:,3]>0)))

def net(width): return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(.1), nn.Linear(width, 3))

def experiment(folder, n=72, frozen=(), nets=None, **run):
    "Three classes of points; an epoch has nine steps"
    set_seed(3)
    nets = nets or dict(Teacher=net(32), Student=net(8))
    train,valid,far = (DataLoader(points(k, seed), bs=8, shuffle=seed==0) for seed,k in enumerate((n, 20, 12)))
    terms = [Term(F.cross_entropy, n) for n in nets if n not in frozen]
    if 'Teacher' in nets: terms.append(Term(kd, 'Student', 'Teacher'))
    return Experiment(Nets(nets, frozen), terms, DataLoaders(train, valid), evals=dict(near=valid, far=far), lr=2e-2,
        run=Run(**{**dict(folder=folder, epochs=3, log_every=2, eval_every=4, device='cpu'), **run}))

def numbers(folder): return [{k: v for k,v in row.items() if k!='seconds'} for row in read_metrics(folder/'metrics.csv')]

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    exp = experiment(folder, config=dict(Global=dict(epoch_num=3)), seconds=dict(data=1.5))
    return exp,train(exp),folder

def test_files(run):
    assert {p.name for p in run[2].iterdir()}=={'config.yml','train.log','metrics.csv','summary.json','curves.png','pictures_near.png','pictures_far.png','latest.pth','best_accuracy.pth'}

def test_log_lines(run):
    lines = (run[2]/'train.log').read_text().splitlines()
    steps = [l for l in lines if 'global_step' in l]
    assert len(steps)==3*5 and 'epoch: [1/3], global_step: 2,' in steps[0] and 'kd_Student_Teacher: ' in steps[0]
    assert sum('cur metric, acc: ' in l for l in lines)==7 and sum('best metric, acc: ' in l for l in lines)==7

def test_evaluations(run):
    exp,learn,folder = run
    rows = numbers(folder)
    assert [r['step'] for r in rows]==[4,8,12,16,20,24,27] and [r['epoch'] for r in rows]==[1,1,2,2,3,3,3]
    assert list(rows[0])==['step','epoch','loss','acc','Teacher_acc'] and [r['step'] for r in learn.eval_every.rows]==[r['step'] for r in rows]
    assert rows[1]['loss']==pytest.approx(learn.parts()[4:8].sum(axis=1).mean(), rel=1e-5)

def test_the_best_state_is_loaded(run):
    exp,learn,folder = run
    best = load_file(folder/'best_accuracy.pth')
    rows = numbers(folder)
    assert best['metrics']['acc']==max(r['acc'] for r in rows) and best['step']==max(r['step'] for r in rows if r['acc']==best['metrics']['acc'])
    assert all(torch.equal(v, best['model'][k]) for k,v in exp.nets.state_dict().items())
    again = evaluate_sets(exp)
    assert again['near']['acc']==best['metrics']['acc'] and set(again)=={'near','far'}

def test_summary(run):
    exp,learn,folder = run
    got = json.loads((folder/'summary.json').read_text())
    assert got==json.loads(json.dumps(learn.summary)) and set(got)=={'networks','best','seconds','samples','given','machine'}
    assert got['samples']==dict(train=72, near=20, far=12) and set(got['seconds'])=={'data','train','evaluate','pictures'}
    assert set(got['networks']['Student'])=={'parameters','ms_per_image','frozen','weights','near','far'} and got['networks']['Teacher']['parameters']==sum(p.numel() for p in exp.nets['Teacher'].parameters())
    assert got['networks']['Student']['near']['acc']==got['best']['value'] and got['best']['indicator']=='acc' and set(got['machine'])=={'device','threads','torch','distillbook'}
    table = show_summary(got)
    assert [c.header for c in table.columns]==['network','parameters','ms an image','set','acc'] and list(table.columns[3].cells)==['near','far']*2

def test_config_is_written(run): assert (run[2]/'config.yml').read_text()=='Global:\n  epoch_num: 3\n'

def same(a, b, where=''):
    "Two states are equal to the last bit, but for what tells the time"
    if isinstance(a, dict):
        assert a.keys()==b.keys(), where
        return [same(a[k], b[k], f'{where}.{k}') for k in a]
    if isinstance(a, (list,tuple)):
        assert len(a)==len(b), where
        return [same(x, y, f'{where}.{i}') for i,(x,y) in enumerate(zip(a, b))]
    assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a==b or a!=a and b!=b, f'{where}: {a} {b}'

KILL = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from fastai.basics import Callback
from test_experiment import experiment, train
class Kill(Callback):
    order = 100
    def after_batch(self):
        if self.training and self.train_iter==14: os.kill(os.getpid(), signal.SIGKILL)
train(experiment(Path(sys.argv[1]), cbs=[Kill()]))
"""

def test_killed_and_resumed_is_never_killed(run, tmp_path):
    p = subprocess.run([sys.executable, '-c', KILL, str(tmp_path), str(Path(__file__).parent)], capture_output=True, text=True)
    assert p.returncode==-signal.SIGKILL, p.stderr
    assert not [o.name for o in tmp_path.iterdir() if o.name.startswith('.')] and [r['step'] for r in numbers(tmp_path)]==[4,8,12]
    assert load_file(tmp_path/'latest.pth')['train_iter']==12
    write_metrics([*read_metrics(tmp_path/'metrics.csv'), dict(step=13, epoch=2, loss=9., acc=1., Teacher_acc=1., seconds=9.)], tmp_path/'metrics.csv')  # As if killed between an evaluation and its checkpoint
    learn = train(experiment(tmp_path, resume=tmp_path/'latest.pth'))
    whole,resumed = (load_file(o/'latest.pth') for o in (run[2], tmp_path))
    same(whole, resumed)
    same(load_file(run[2]/'best_accuracy.pth')['model'], load_file(tmp_path/'best_accuracy.pth')['model'])
    assert numbers(tmp_path)==numbers(run[2]) and learn.summary['networks']['Student']['far']==run[1].summary['networks']['Student']['far']

def test_a_finished_run_is_finished_again(run, tmp_path):
    "Killed while it was measured at the end: nothing is left to train"
    for name in ('latest.pth','best_accuracy.pth','metrics.csv'): (tmp_path/name).write_bytes((run[2]/name).read_bytes())
    learn = train(experiment(tmp_path, resume=tmp_path/'latest.pth'))
    assert learn.summary['best']==run[1].summary['best'] and (tmp_path/'curves.png').exists() and numbers(tmp_path)==numbers(run[2])

def test_going_on_elsewhere(run, tmp_path):
    learn = train(experiment(tmp_path, epochs=4, resume=run[2]/'latest.pth'))
    assert [r['step'] for r in numbers(tmp_path)][-3:]==[28,32,36] and numbers(tmp_path)[:7]==numbers(run[2])

def test_a_state_at_step_0(tmp_path):
    "Networks that are spoilt by training: the state that they began with is the best one, in every file, also after a restart"
    learned = train(experiment(tmp_path/'good', nets=dict(Student=net(32)), epochs=10)).net('Student').state_dict()
    learned = {f'Student.{k}': v.clone() for k,v in learned.items()}
    def spoil(folder, **settings):
        exp = experiment(folder, nets=dict(Student=net(32)), **{**dict(epochs=2, eval_first=True), **settings})
        exp.nets.load_state_dict(learned)
        exp.lr = 3.
        return exp
    spoilt = train(spoil(tmp_path))
    rows,best = read_metrics(tmp_path/'metrics.csv'),load_file(tmp_path/'best_accuracy.pth')
    assert [r['step'] for r in rows]==[0,4,8,12,16,18] and rows[0]['epoch']==0 and 'loss' not in rows[0] and all(r['loss']>0 for r in rows[1:])
    assert rows[0]['acc']==load_file(tmp_path/'good/best_accuracy.pth')['metrics']['acc']>max(r['acc'] for r in rows[1:])
    assert (best['step'],best['epoch'])==(0,-1) and all(torch.equal(v, best['model'][k]) for k,v in learned.items())
    assert spoilt.summary['best']==dict(indicator='acc', value=rows[0]['acc'], epoch=0, step=0)
    assert (tmp_path/'metrics.csv').read_text().splitlines()[0].startswith('step,epoch,loss,acc') and 'first metric, acc: ' in (tmp_path/'train.log').read_text()
    train(spoil(tmp_path, epochs=3, resume=tmp_path/'latest.pth'))
    again = read_metrics(tmp_path/'metrics.csv')
    assert again[:6]==rows and [r['step'] for r in again[6:]]==[20,24,27] and load_file(tmp_path/'best_accuracy.pth')['step']==0
    assert (tmp_path/'metrics.csv').read_text().splitlines()[0].startswith('step,epoch,loss,acc')

def test_a_frozen_teacher(tmp_path):
    "Is in no checkpoint, and another one in its place is noticed"
    exp = experiment(tmp_path, frozen=['Teacher'], epochs=1)
    before = {k: v.clone() for k,v in exp.nets['Teacher'].state_dict().items()}
    learn = train(exp)
    for name in ('latest.pth','best_accuracy.pth'):
        kept = load_file(tmp_path/name)
        assert {k.partition('.')[0] for k in kept['model']}=={'Student'} and list(kept['frozen'])==['Teacher']
    assert all(torch.equal(v, before[k]) for k,v in exp.nets['Teacher'].state_dict().items()) and learn.summary['networks']['Teacher']['frozen'] is True
    other = experiment(tmp_path, frozen=['Teacher'])
    load_state(other.nets, tmp_path/'best_accuracy.pth')
    with torch.no_grad(): other.nets['Teacher'][0].weight.add_(1)
    with pytest.raises(UserError, match='Teacher is not the network of that run'): load_state(other.nets, tmp_path/'best_accuracy.pth')
    other.run.resume = tmp_path/'latest.pth'
    with pytest.raises(UserError, match='Teacher'): train(other)

def test_a_state_of_other_networks(run, tmp_path):
    with pytest.raises(UserError, match='is missing'): load_state(Nets(dict(Teacher=net(32), Pupil=net(8))), run[2]/'best_accuracy.pth')
    with pytest.raises(UserError, match='size mismatch'): load_state(Nets(dict(Teacher=net(32), Student=net(9))), run[2]/'best_accuracy.pth')
    torch.save([1], tmp_path/'x.pth')
    with pytest.raises(UserError, match='does not hold the state of a run'): load_state(Nets(dict(Student=net(8))), tmp_path/'x.pth')

def test_one_network_without_a_name(tmp_path):
    exp = experiment(tmp_path, nets=dict(Model=net(8)), epochs=1)
    learn = train(exp)
    assert list(learn.summary['networks'])==['Model'] and set(learn.summary['networks']['Model']['near'])=={'acc'} and list(numbers(tmp_path)[0])==['step','epoch','loss','acc']

def test_mistakes_show_at_once(tmp_path):
    exp = experiment(tmp_path/'x')
    exp.decoder = lambda outputs, second: {'Student': outputs['Student'].argmax(-1).unknown}
    with pytest.raises(UserError, match='an evaluation of one sample .near. fails.*unknown'): learner(exp)
    exp = experiment(tmp_path/'x')
    exp.metric.main_indicator = 'hmean'
    with pytest.raises(UserError, match='whose hmean.*Teacher, Student'): learner(exp)
    exp = experiment(tmp_path/'x')
    exp.dls = None
    with pytest.raises(UserError, match='no data to train on'): learner(exp)
    assert not (tmp_path/'x').exists()

class NoNumbers(nn.Module):
    "A teacher whose numbers are elsewhere, as those of an ONNX file are"
    def __init__(self): super().__init__(); self.w = [torch.randn(6, 3)]
    def forward(self, x): return x@self.w[0]

def test_networks_without_parameters(tmp_path):
    "Issue 14: they are measured, alone and beside others"
    dl = DataLoader(points(12, 1), bs=8)
    assert 0<=evaluate(NoNumbers().eval(), dl)['acc']<=1
    learn = train(experiment(tmp_path, nets=dict(Teacher=NoNumbers(), Student=net(8)), frozen=['Teacher'], epochs=1))
    assert learn.summary['networks']['Teacher']['parameters']==0 and 'acc' in learn.summary['networks']['Teacher']['far']

def test_scores_on_training_batches(tmp_path):
    train(experiment(tmp_path, epochs=1, score_batches=True))
    line = next(l for l in (tmp_path/'train.log').read_text().splitlines() if 'global_step' in l)
    assert ', acc: ' in line and 'Teacher_acc: ' in line

def test_a_schedule_sets_the_rate(tmp_path):
    exp = experiment(tmp_path, epochs=1)
    exp.schedule = lambda step: 1e-3/(step+1)
    assert train(exp).opt.hypers[-1]['lr']==pytest.approx(1e-3/9)

def test_a_table_on_the_console(tmp_path):
    from io import StringIO
    from rich.console import Console
    text = StringIO()
    train(experiment(tmp_path, epochs=1, cbs=[ShowEvals(Console(file=text, width=100)), ShowProgress(Console(file=text, force_terminal=False))]))
    lines = text.getvalue().splitlines()
    assert lines[0].split()==['epoch','step','loss','acc','Teacher_acc','seconds'] and [l.split()[1] for l in lines[1:]]==['4','8','9']

def test_pictures_are_drawn_by_whoever_knows_how(tmp_path):
    import matplotlib.pyplot as plt
    seen = []
    def draw(batch, said, n):
        seen.append((len(batch[0]), {k: len(v) for k,v in said.items()}, n))
        return plt.figure()
    exp = experiment(tmp_path, epochs=1)
    exp.pictures = Pictures(draw=draw, show=5)
    train(exp)
    assert seen==[(5, dict(Teacher=5, Student=5), 5)]*2

def test_no_text_is_known():
    code = "import sys, distillbook.use.training; print([m for m in ('cv2','shapely','pyclipper','onnxruntime','distillbook.rec.labels','distillbook.data.sets','distillbook.det.boxes','distillbook.config.files') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip()=='[]'
