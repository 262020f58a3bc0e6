"What a configuration is and what runs were: roles found by gradients, costs, logs read back, data made"
import shutil
from functools import partial
from pathlib import Path
import cv2, matplotlib, numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.basics import DataLoader, DataLoaders, set_seed
from distillbook.core import UserError
from distillbook.data.lists import label_files
from distillbook.data.operations import DecodeImage
from distillbook.data.sets import SampleSet
from distillbook.det.operations import DetLabelEncode
from distillbook.losses import dml, kd
from distillbook.nets import Nets
from distillbook.terms import Term, Terms
from distillbook.use.report import *
from distillbook.use.training import Experiment, Pictures, Run, learner, train

TERMS = [Term(partial(dml, symmetric=True), 'Teacher', 'Student', name='dml'), Term(F.cross_entropy, 'Teacher', weight=2.), Term(F.cross_entropy, 'Student')]

def nets(frozen=()): return Nets({n: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.1), nn.Linear(4, 3)) for n in ('Teacher','Student')}, frozen)

def pictures(n, seed):
    rng = torch.Generator().manual_seed(seed)
    return list(zip(torch.randn(n, 1, 8, 8, generator=rng), torch.randint(3, (n,), generator=rng)))

def experiment(folder, lr=1e-3, seed=1024, **run):
    "Four steps, measured after the second and the last"
    set_seed(seed)
    dls = DataLoaders(DataLoader(pictures(16, 0), bs=4, shuffle=True), DataLoader(pictures(8, 1), bs=4))
    config = dict(Global=dict(save_model_dir=str(folder), seed=seed), Optimizer=dict(lr=lr))
    return Experiment(nets(), TERMS, dls, lr=lr, run=Run(folder, device='cpu', seed=seed, log_every=1, eval_every=2, config=config, **run))

@pytest.mark.parametrize('net,shape,want', [(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3,2,2), 60), (nn.Conv2d(3, 8, 3, padding=1), (3,4,5), 3*9*8*20), (nn.Conv2d(4, 4, 3, groups=4, padding=1), (4,5,5), 9*4*25), (nn.ReLU(), (3,2,2), None)])
def test_macs(net, shape, want): assert macs(net, shape)==want

def test_who_learns():
    nets = Nets(dict(T=nn.Linear(4, 3), A=nn.Linear(4, 3), B=nn.Linear(4, 3)), ['T'])
    terms = Terms(nets, [Term(kd, 'A', 'T', name='kd'), Term(dml, 'A', 'B', name='one'), Term(partial(dml, symmetric=True), 'A', 'B', name='both'), Term(nn.functional.cross_entropy, 'B', name='labels')])
    got = learners(terms, nets.train()(torch.randn(5, 4)), (torch.zeros(5, dtype=torch.long),))
    assert got==dict(kd=['A'], one=['A'], both=['A','B'], labels=['B'])

def test_roles_and_costs():
    "Without data, on a batch that was made up"
    made_up = (torch.randn(2, 1, 8, 8),),(torch.zeros(2, dtype=torch.long),)
    exp = Experiment(nets(['Teacher']), [*TERMS, Term(F.mse_loss, 'Student.0', 'Teacher.0', name='inner')], example=made_up, sources=dict(Teacher='PP'))
    s = setup(exp)
    found = summary(s)
    assert {r['net']: (r['role'],r['weights'],r['outputs']) for r in found['nets']}==dict(Teacher=('teaches (frozen)','PP',dict(output=[3])), Student=('learns','',dict(output=[3])))
    for r in found['nets']: assert r['parameters']==sum(p.numel() for p in s.nets[r['net']].parameters()) and r['MACs']==9*4*36+12 and r['picture']=='1 x 8 x 8'
    assert [r['trainable'] for r in found['nets']]==[0,55] and [t['learns'] for t in found['terms']]==['Student','nobody','Student','Student'] and found['terms'][1]['weight']==2.
    fig = draw_summary(s)
    words = [t.get_text().split('\n')[0] for t in fig.axes[0].texts]
    assert {'Teacher','Student','labels','cross_entropy  x 2'} <= set(words)
    matplotlib.pyplot.close(fig)
    exp.pictures = Pictures('det', shape=(1,None,None), cost_shape=(1,16,16))
    assert summary(exp)['nets'][0]['picture']=='1 x 16 x 16'
    with pytest.raises(UserError, match='example='): setup(Experiment(nets(), TERMS))

def test_looking_changes_nothing(tmp_path):
    exp = experiment(tmp_path)
    before = {k: v.clone() for k,v in exp.nets.state_dict().items()}
    torch.manual_seed(3); a = torch.rand(1)
    torch.manual_seed(3); summary(exp)
    assert torch.equal(a, torch.rand(1)) and all(torch.equal(v, before[k]) for k,v in exp.nets.state_dict().items()) and exp.nets.training
    assert [r['role'] for r in summary(learner(exp))['nets']]==['learns and teaches']*2

@pytest.fixture(scope='module')
def words(tmp_path_factory):
    "Rendered words"
    folder = tmp_path_factory.mktemp('report')
    render_rec(folder/'words', 16, 8)
    return folder

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    for name,lr,seed in (('a', 1e-3, 1024), ('b', 1e-2, 5)): train(experiment(folder/name, lr, seed))
    return [folder/n for n in 'ab']

def test_runs_read_back(runs):
    run = read_run(runs[0])
    assert [r['step'] for r in run.steps]==[1,2,3,4] and [r['step'] for r in run.evals]==[2,4] and {'loss','lr','dml'}<=set(run.steps[0]) and set(run.evals[0])=={'step','acc','Teacher_acc'}
    assert f"loss: {run.steps[2]['loss']:.6f}" in (runs[0]/'train.log').read_text()

def test_a_log_with_a_step_twice(runs, tmp_path):
    "Killed after step 3 and gone on from step 1; the table is not there"
    shutil.copy(runs[0]/'config.yml', tmp_path)
    lines = (runs[0]/'train.log').read_text().splitlines(keepends=True)
    at = [i for i,l in enumerate(lines) if 'global_step' in l]
    (tmp_path/'train.log').write_text(''.join(lines[:at[2]+1] + lines[at[1]:]))
    run = read_run(tmp_path)
    assert [r['step'] for r in run.steps]==[1,2,3,4] and [r['step'] for r in run.evals]==[2,4]

def test_compare(runs):
    found = compare(runs)
    assert list(found.index)==['a','b'] and found['Global.seed'].tolist()[1]==5 and 'Optimizer.lr' in found and 'Global.save_model_dir' not in found and found['step'].tolist()==[4,4]
    assert list(compare(runs[:1]).columns)==['step','loss','acc','Teacher_acc']
    fig = plot_compare(runs, 'Teacher_acc')
    assert [len(l.get_xdata()) for l in fig.axes[0].lines]==[4,4] and [len(l.get_xdata()) for l in fig.axes[1].lines]==[2,2]
    matplotlib.pyplot.close(fig)

def test_no_runs(runs, tmp_path):
    with pytest.raises(UserError, match='which runs'): compare([])
    with pytest.raises(UserError, match='no config.yml'): compare([tmp_path])
    shutil.copy(runs[0]/'config.yml', tmp_path)
    with pytest.raises(UserError, match='has it run'): compare([tmp_path])
    (tmp_path/'train.log').write_text('nothing that one could read\nepoch: [1/1], global_step: x\n')
    assert read_run(tmp_path).steps==[] and compare([tmp_path, runs[0]])['step'].tolist()[1]==4
    (tmp_path/'metrics.csv').write_text('step,epoch,acc\n1,1,none\n')
    with pytest.raises(UserError, match='not the numbers of a run'): read_run(tmp_path)

def test_lr_find(tmp_path):
    found = lr_find(experiment(tmp_path/'never'), steps=20)
    assert set(found.rates)=={'valley','steep','minimum'} and all(1e-8<v<=1 for v in found.rates.values()) and len(found.lrs)==len(found.losses)>=10 and found.lrs==sorted(found.lrs)
    assert not (tmp_path/'never').exists()
    matplotlib.pyplot.close(found.plot())

def test_lr_find_puts_the_weights_back(tmp_path):
    exp = experiment(tmp_path)
    exp.schedule = lambda step: 1e-3
    learn = learner(exp)
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    lr_find(learn, steps=20)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and learn.follow_schedule is not None

def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = train(experiment(tmp_path/'board', cbs=tracker_cbs(tensorboard=True, folder=tmp_path/'board')))
    board = EventAccumulator(str(tmp_path/'board/tensorboard')).Reload()
    assert [e.step for e in board.Scalars('terms/dml')]==[1,2,3,4] and len(board.Scalars('eval/Teacher_acc'))==2
    np.testing.assert_allclose([e.value for e in board.Scalars('terms/dml')], learn.parts()['dml'], rtol=1e-5)

def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline'); monkeypatch.setenv('WANDB_SILENT', 'true')
    import wandb
    sent = []
    cbs = tracker_cbs(wandb=dict(project='p'), folder=tmp_path, config=dict(a=1))
    log = wandb.log
    monkeypatch.setattr(wandb, 'log', lambda d, **kw: (sent.append(d), log(d, **kw))[1])
    try: train(experiment(tmp_path, cbs=cbs))
    finally: wandb.finish()
    assert any('terms/dml' in d for d in sent) and any('eval/acc' in d for d in sent) and any('train_loss' in d for d in sent)
    with pytest.raises(UserError, match='a section with project'): tracker_cbs(wandb=['p'])

def test_nobody_asked(): assert tracker_cbs()==[]

@pytest.mark.parametrize('package', ['tensorboard', 'wandb'])
def test_without_the_package(package, monkeypatch):
    import sys
    for k in [k for k in sys.modules if k.split('.')[0]==package or k==f'fastai.callback.{package}']: monkeypatch.setitem(sys.modules, k, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'distillbook\[{package}\]'): tracker_cbs(**{package: True})

def test_rendered_lines(words):
    data = SampleSet(label_files([words/'words/train.txt'], words/'words'), [DecodeImage('BGR')], ['image'], 0)
    assert len(data)==16 and data[0][0].ndim==3
    again = render_rec(words/'again', 16, 8)
    assert (again/'train.txt').read_bytes()==(words/'words/train.txt').read_bytes() and (again/'images/000003.png').read_bytes()==(words/'words/images/000003.png').read_bytes()
    a,b = ({l.split('\t')[1] for l in (again/f).read_text().splitlines()} for f in ('train.txt','val.txt'))
    assert not a & b

def test_rendered_pages(tmp_path):
    folder = render_det(tmp_path/'p', 2, 1, height=96, width=128)
    rows = [l.split('\t') for f in ('train.txt','val.txt') for l in (folder/f).read_text().splitlines()]
    assert len(rows)==3 and all(cv2.imread(str(folder/p)).shape==(96,128,3) for p,_ in rows)
    assert all(DetLabelEncode()(dict(label=t), None)['polys'].shape[1:]==(4,2) for _,t in rows)

def test_render_refuses(tmp_path):
    (tmp_path/'x').mkdir()
    assert render_rec(tmp_path/'x', 1, 1).exists()
    with pytest.raises(UserError, match='is there already'): render_rec(tmp_path/'x', 1, 1)
    with pytest.raises(UserError, match='comic'): render_rec(tmp_path/'y', 1, 1, fonts='comic')
    (tmp_path/'f').write_text('')
    with pytest.raises(UserError, match='is there already'): render_det(tmp_path/'f')
    assert sorted(p.name for p in tmp_path.iterdir())==['f','x']
