"What a configuration is and what runs were: roles found by gradients, costs, logs read back, data made"
import json, shutil
from functools import partial
from pathlib import Path
import cv2, matplotlib, numpy as np, pandas as pd, pytest, torch, yaml
from torch import nn
from distillbook.config.files import load_config, save_config
from distillbook.core import UserError
from distillbook.det.operations import DetLabelEncode
from distillbook.losses import dml, kd
from distillbook.nets import Nets
from distillbook.use.report import *
from distillbook.data.sets import DecodeImage, SampleSet, label_files
from distillbook.terms import Term, Terms
from distillbook.use.training import train

ROOT = Path(__file__).parents[1]
SMALL = [f'Architecture.Models.{n}.{k}' for n in ('Teacher','Student') for k in ('Backbone.scale=0.0625', 'Head.head_list.1.SARHead.enc_dim=8', 'Head.head_list.1.SARHead.d_k=8')] + ['Global.character_dict_path=']

@pytest.mark.parametrize('net,shape,want', [(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3,2,2), 60), (nn.Conv2d(3, 8, 3, padding=1), (3,4,5), 3*9*8*20), (nn.Conv2d(4, 4, 3, groups=4, padding=1), (4,5,5), 9*4*25), (nn.ReLU(), (3,2,2), None)])
def test_macs(net, shape, want): assert macs(net, shape)==want

def test_who_learns():
    nets = Nets(dict(T=nn.Linear(4, 3), A=nn.Linear(4, 3), B=nn.Linear(4, 3)), ['T'])
    terms = Terms(nets, [Term(kd, 'A', 'T', name='kd'), Term(dml, 'A', 'B', name='one'), Term(partial(dml, symmetric=True), 'A', 'B', name='both'), Term(nn.functional.cross_entropy, 'B', name='labels')])
    got = learners(terms, nets.train()(torch.randn(5, 4)), (torch.zeros(5, dtype=torch.long),))
    assert got==dict(kd=['A'], one=['A'], both=['A','B'], labels=['B'])

@pytest.mark.parametrize('name,roles', [('rec/ppocrv3_distillation.yml', ['learns and teaches']*2), ('det/plain_cml.yml', ['learns and teaches', 'learns and teaches', 'teaches (frozen)']), ('rec/ppocrv3.yml', ['learns'])])
def test_configurations(name, roles):
    cfg = load_config(ROOT/'configs'/name, SMALL if 'distillation' in name else ['Global.character_dict_path=', 'Architecture.Backbone.scale=0.0625'] if 'rec' in name else [])
    s = setup(cfg)
    found = summary(s)
    assert sorted(r['role'] for r in found['nets'])==sorted(roles)
    for r in found['nets']: assert r['parameters']==sum(p.numel() for p in s.nets[r['net']].parameters()) and r['MACs']>1e5 and r['outputs']
    assert all(t['learns']!='nobody' for t in found['terms']) and len(found['terms'])>=2
    fig = draw_summary(s)
    words = {t.get_text().split('\n')[0] for t in fig.axes[0].texts}
    assert {r['net'] for r in found['nets']} | {'labels'} <= words
    matplotlib.pyplot.close(fig)

def test_looking_changes_nothing():
    cfg = load_config(ROOT/'configs/rec/ppocrv3_distillation.yml', SMALL)
    torch.manual_seed(3); a = torch.rand(1)
    torch.manual_seed(3); summary(cfg)
    assert {r['weights'] for r in summary(cfg)['nets']}=={'new (seed 1024)'}

@pytest.fixture(scope='module')
def words(tmp_path_factory):
    "Rendered words, and overrides that put a configuration on them"
    folder = render_rec(tmp_path_factory.mktemp('report')/'words', 16, 8)
    return folder.parent, [f'{s}.{k}' for s,f in (('Train','train.txt'),('Eval','val.txt')) for k in (f'dataset.data_dir={folder}', f'dataset.label_file_list=[{folder/f}]', 'loader.batch_size_per_card=4', 'loader.num_workers=0')]

def config(words, name, *more): return load_config(ROOT/'configs/rec/ppocrv3_distillation.yml', [*SMALL, *words[1], 'Global.epoch_num=1', 'Global.print_batch_step=1', 'Global.eval_batch_step=[0, 2]', f'Global.save_model_dir={words[0]/name}', *more])

@pytest.fixture(scope='module')
def runs(words):
    for name,*more in (('a',), ('b', 'Optimizer.lr.values=[0.001, 0.0001]', 'Global.seed=5')): train(config(words, name, *more), save_config)
    return [words[0]/n for n in 'ab']

def test_runs_read_back(runs):
    run = read_run(runs[0])
    assert [r['step'] for r in run.steps]==[1,2,3,4] and [r['step'] for r in run.looks]==[2,4] and {'loss','lr','dml_ctc_0'}<=set(run.steps[0]) and {'acc','Teacher_acc'}<=set(run.looks[0])
    log = (runs[0]/'train.log').read_text()
    assert f"loss: {run.steps[2]['loss']:.6f}" in log

def test_compare(runs):
    found = compare(runs)
    assert list(found.index)==['a','b'] and found['Global.seed'].tolist()[1]==5 and 'Optimizer.lr.values' in found and 'Global.save_model_dir' not in found and found['step'].tolist()==[4,4]
    assert list(compare(runs[:1]).columns)[:2]==['step','loss']
    fig = plot_compare(runs, 'norm_edit_dis')
    assert [len(l.get_xdata()) for l in fig.axes[0].lines]==[4,4] and [len(l.get_xdata()) for l in fig.axes[1].lines]==[2,2]
    matplotlib.pyplot.close(fig)

def test_no_runs(runs, tmp_path):
    with pytest.raises(UserError, match='which runs'): compare([])
    with pytest.raises(UserError, match='no config.yml'): compare([tmp_path])
    shutil.copy(runs[0]/'config.yml', tmp_path)
    with pytest.raises(UserError, match='has it run'): compare([tmp_path])
    (tmp_path/'train.log').write_text('nothing that one could read\nepoch: [1/1], global_step: x\n')
    assert read_run(tmp_path).steps==[] and compare([tmp_path, runs[0]])['step'].tolist()[1]==4

def test_lr_find(words):
    cfg = config(words, 'never')
    found = lr_find(cfg, steps=20)
    assert set(found.rates)=={'valley','steep','minimum'} and all(1e-8<v<=1 for v in found.rates.values()) and len(found.lrs)==len(found.losses)>=10 and found.lrs==sorted(found.lrs)
    assert not (words[0]/'never').exists()
    matplotlib.pyplot.close(found.plot())

def test_lr_find_puts_the_weights_back(words):
    from distillbook.use.training import build_learner
    learn = build_learner(config(words, 'never'))
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    lr_find(learn, steps=20)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and learn.follow_schedule is not None

def test_tensorboard(words):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    cfg = config(words, 'board', 'Global.use_tensorboard=true')
    learn = train(cfg, save_config, logging_cbs(cfg))
    board = EventAccumulator(str(words[0]/'board/tensorboard')).Reload()
    assert [e.step for e in board.Scalars('terms/dml_ctc_0')]==[1,2,3,4] and len(board.Scalars('eval/Teacher_acc'))==2
    np.testing.assert_allclose([e.value for e in board.Scalars('terms/dml_ctc_0')], learn.parts()['dml_ctc_0'], rtol=1e-5)

def test_wandb_offline(words, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline'); monkeypatch.setenv('WANDB_SILENT', 'true')
    import wandb
    cfg = config(words, 'wb', 'Global.use_wandb=true', 'wandb={project: p}')
    (words[0]/'wb').mkdir()
    sent = []
    cbs = logging_cbs(cfg)
    log = wandb.log
    monkeypatch.setattr(wandb, 'log', lambda d, **kw: (sent.append(d), log(d, **kw))[1])
    try: train(cfg, save_config, cbs)
    finally: wandb.finish()
    assert any('terms/dml_ctc_0' in d for d in sent) and any('eval/acc' in d for d in sent) and any('train_loss' in d for d in sent)

def test_nobody_asked(words): assert logging_cbs(config(words, 'x'))==[]

@pytest.mark.parametrize('key,package', [('use_tensorboard', 'tensorboard'), ('use_wandb', 'wandb')])
def test_without_the_package(key, package, words, monkeypatch):
    import sys
    for k in [k for k in sys.modules if k.split('.')[0]==package or k==f'fastai.callback.{package}']: monkeypatch.setitem(sys.modules, k, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'distillbook\[{package}\]'): logging_cbs(config(words, 'x', f'Global.{key}=true'))

def test_rendered_lines(words):
    data = SampleSet(label_files([words[0]/'words/train.txt'], words[0]/'words'), [DecodeImage('BGR')], ['image'], 0)
    assert len(data)==16 and data[0][0].ndim==3
    again = render_rec(words[0]/'again', 16, 8)
    assert (again/'train.txt').read_bytes()==(words[0]/'words/train.txt').read_bytes() and (again/'images/000003.png').read_bytes()==(words[0]/'words/images/000003.png').read_bytes()
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
