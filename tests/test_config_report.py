"What a configuration is before it has run, and who is told of a run: reports made from YAML"
import sys
from pathlib import Path
import matplotlib, numpy as np, pytest, torch
from distillbook.config import experiment, load_config, outline
from distillbook.core import UserError
from distillbook.use.report import draw_summary, lr_find, render_rec, setup, summary
from distillbook.use.training import train

ROOT = Path(__file__).parents[1]
SMALL = [f'Architecture.Models.{n}.{k}' for n in ('Teacher','Student')
    for k in ('Backbone.scale=0.0625', 'Head.head_list.1.SARHead.enc_dim=8', 'Head.head_list.1.SARHead.d_k=8')] + ['Global.character_dict_path=']
ONE = ['Global.character_dict_path=', 'Architecture.Backbone.scale=0.0625']


@pytest.mark.parametrize('name,overrides,roles', [
    ('rec/ppocrv3_distillation.yml', SMALL, ['learns and teaches']*2),
    ('det/plain_cml.yml', [], ['learns and teaches', 'learns and teaches', 'teaches (frozen)']),
    ('rec/ppocrv3.yml', ONE, ['learns'])])
def test_configurations(name, overrides, roles):
    ready = setup(outline(load_config(ROOT/'configs'/name, overrides)))
    found = summary(ready)
    assert sorted(r['role'] for r in found['nets'])==sorted(roles)
    for r in found['nets']:
        assert r['parameters']==sum(p.numel() for p in ready.nets[r['net']].parameters()) and r['MACs']>1e5 and r['outputs']
    assert all(t['learns']!='nobody' for t in found['terms']) and len(found['terms'])>=2
    fig = draw_summary(ready)
    words = {t.get_text().split('\n')[0] for t in fig.axes[0].texts}
    assert {r['net'] for r in found['nets']} | {'labels'} <= words
    matplotlib.pyplot.close(fig)

def test_quickstart_is_outlined():
    found = summary(outline(load_config('quickstart')))
    roles = {r['net']: r['role'] for r in found['nets']}
    assert roles==dict(Teacher='teaches (frozen)', Student='learns', Twin='learns')
    assert {t['loss'] for t in found['terms']}=={'ctc_loss','kd'}

def test_weights_are_new():
    found = summary(outline(load_config(ROOT/'configs/rec/ppocrv3_distillation.yml', SMALL)))
    assert {r['weights'] for r in found['nets']}=={'new (seed 1024)'}


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    "Rendered words, and overrides that put a configuration on them"
    folder = render_rec(tmp_path_factory.mktemp('report')/'words', 16, 8)
    sides = (('Train','train.txt'),('Eval','val.txt'))
    return folder.parent, [f'{s}.{k}' for s,f in sides for k in (f'dataset.data_dir={folder}', f'dataset.label_file_list=[{folder/f}]',
        'loader.batch_size_per_card=4', 'loader.num_workers=0')]

def config(words, name, *more):
    run = ['Global.epoch_num=1', 'Global.print_batch_step=1', 'Global.eval_batch_step=[0, 2]', f'Global.save_model_dir={words[0]/name}']
    return load_config(ROOT/'configs/rec/ppocrv3_distillation.yml', [*SMALL, *words[1], *run, *more])

def test_lr_find_writes_nothing(words):
    found = lr_find(experiment(config(words, 'never')), steps=20)
    assert set(found.rates)=={'valley','steep','minimum'} and all(1e-8<v<=1 for v in found.rates.values())
    assert not (words[0]/'never').exists()

def test_tensorboard(words):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = train(experiment(config(words, 'board', 'Global.use_tensorboard=true')))
    board = EventAccumulator(str(words[0]/'board/tensorboard')).Reload()
    assert [e.step for e in board.Scalars('terms/dml_ctc_0')]==[1,2,3,4] and len(board.Scalars('eval/Teacher_acc'))==2
    np.testing.assert_allclose([e.value for e in board.Scalars('terms/dml_ctc_0')], learn.parts()['dml_ctc_0'], rtol=1e-5)

def test_nobody_asked(words): assert not experiment(config(words, 'x')).run.cbs

@pytest.mark.parametrize('key,package', [('use_tensorboard', 'tensorboard'), ('use_wandb', 'wandb')])
def test_without_the_package(key, package, words, monkeypatch):
    for k in [k for k in sys.modules if k.split('.')[0]==package or k==f'fastai.callback.{package}']: monkeypatch.setitem(sys.modules, k, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'distillbook\[{package}\]'): experiment(config(words, 'x', f'Global.{key}=true'))
