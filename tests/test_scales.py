"Batches of several heights, and a shrink ratio that grows: PaddleOCR's plans and maps, resuming, workers and ranks, and configurations that ask for them"
import json, os, signal
from pathlib import Path
from random import Random
import cv2, numpy as np, pytest, torch, yaml
from fastai.basics import Callback
from torch import nn
from distillbook.checkpoint import load_file
from distillbook.config import experiment, load_config
from distillbook.config.data import build_dl
from distillbook.core import UserError
from distillbook.data.kept import fixed_ops
from distillbook.data.scales import MultiScaleSampler, ScaledDL, batch_numbers, by_width, scale_plan, scale_sizes
from distillbook.data.sets import SampleSet
from distillbook.det.operations import DetLabelEncode
from distillbook.det.targets import MakeBorderMap, MakeShrinkMap, grown_ratio
from distillbook.rec.operations import RecResizeImg, SVTRRecResizeImg, at_size
from distillbook.use import training
from distillbook.use.training import read_metrics, train
from test_experiment import same as same_state

Z = np.load(Path(__file__).parent/'golden'/'targets_v4_data.npz')
CASES = {kind: [k.removesuffix('|meta') for k in Z.files if k.startswith(kind) and k.endswith('|meta')] for kind in ('MultiScaleSampler','shrink_','MultiScaleDataSet','SVTRRecResizeImg')}
def meta(case): return json.loads(str(Z[f'{case}|meta']))


# %% plans
def test_all_cases(): assert {k: len(v) for k,v in CASES.items()}==dict(MultiScaleSampler=8, shrink_=8, MultiScaleDataSet=4, SVTRRecResizeImg=4)

@pytest.mark.parametrize('case', CASES['MultiScaleSampler'])
def test_plan_is_paddles(case):
    "Which lines, at which size, in which order, in two epochs"
    m = meta(case)
    kw,n,seed = dict(m['kwargs']),m['n_samples'],m['dataset_seed']
    max_w = kw.pop('max_w', 480.)
    sampler = MultiScaleSampler(**kw)
    plan = scale_plan(n, sampler.sizes, 0 if seed is None else seed, shuffle=kw['is_training'] and not m['ds_width'], rng=Random(99))
    ratios = Z[f'{case}|out|wh_ratio'] if m['ds_width'] else None
    assert len(plan)==m['length']
    for e,want in enumerate(m['epochs']):
        order = batch_numbers(len(plan), e, seed)
        assert [[plan[i].width, plan[i].height, len(plan[i].lines)] for i in order]==[o[:3] for o in want]
        assert np.array_equal(np.concatenate([plan[i].lines for i in order]), Z[f'{case}|out|indices_{e}'])
        if ratios is None: continue
        fitted = by_width(plan, ratios, max_w)
        assert [fitted[i].width for i in order]==[o[1]*max(1, round(o[3])) for o in want]
        assert np.array_equal(np.concatenate([fitted[i].lines for i in order]), np.argsort(ratios)[Z[f'{case}|out|indices_{e}']])

@pytest.mark.parametrize('n', [1, 7, 100, 1001])
@pytest.mark.parametrize('world', [1, 2, 3])
def test_every_line_has_a_batch_and_all_ranks_the_same_sizes(n, world):
    sampler = MultiScaleSampler([[320,32],[320,48],[320,64]], first_bs=24, fix_bs=False)
    if n<world: return pytest.raises(UserError, sampler.plan, n, 0, (0,world))
    plans = [sampler.plan(n, 5, (r,world)) for r in range(world)]
    for p in plans[1:]: assert [o[:2] for o in p]==[o[:2] for o in plans[0]]
    seen = [set(np.concatenate([b.lines for b in p]).tolist()) for p in plans]
    assert len(set.union(*seen))>=n//world*world and sum(map(len, seen))==len(set.union(*seen))
    if n>=100: assert all(len(b.lines)==dict(zip((32,48,64), (24,16,12)))[b.height] for p in plans for b in p)

@pytest.mark.parametrize('kw,says', [(dict(scales=[]), 'scales'), (dict(scales=[[320]]), 'scales'), (dict(scales=[[320,'a']]), 'scales'), (dict(scales=[[320,8]]), 'divided_factor'), (dict(scales=[[320,32]], first_bs=0), 'first_bs'), (dict(scales=[[320,32]], divided_factor=[0,1]), 'divided_factor')])
def test_settings_that_will_not_do(kw, says):
    with pytest.raises(UserError, match=says): MultiScaleSampler(**kw)


# %% the loader
class Noise:
    "Pictures of differing widths: a source, with a broken line"
    def __len__(self): return 57
    def read(self, i, rng=None, picture=True):
        if i==13: raise UserError('line 13 is broken')
        own = np.random.default_rng(i)
        return dict(where=f'line {i}', label='a', image=own.integers(0, 256, (32, 30+i*7%150, 3), dtype=np.uint8))

SCALES = [[160,32],[160,48],[160,64]]
def loader(**kw): return ScaledDL(SampleSet(Noise(), [], ['image','valid_ratio'], seed=3), MultiScaleSampler(SCALES, first_bs=12, fix_bs=False), at_size, **kw)
def same(a, b): return len(a)==len(b) and all(torch.equal(x, y) for p,q in zip(a, b) for x,y in zip(p, q))

def test_batches():
    dl = loader()
    got = list(dl)
    assert len(got)==len(dl) and {tuple(x.shape) for x,_ in got}=={(12,3,32,160),(8,3,48,160),(6,3,64,160)}
    for (x,ratio),i in zip(got, batch_numbers(len(dl), 0, 3)):
        b = dl.plan()[i]
        for row,r,line in zip(x, ratio, b.lines):
            if line==13: continue
            want = RecResizeImg([3,b.height,b.width])(Noise().read(line), None)
            assert np.array_equal(row, want['image']) and r==want['valid_ratio']
    assert dl.faults=={'line 13 is broken': 1+sum(b.lines.tolist().count(13) for b in dl.plan())-1}

@pytest.mark.parametrize('skip,part', [(1, (0,1)), (4, (0,1)), (2, (0,2)), (2, (1,2))], ids=str)
def test_resumed_in_the_middle_of_an_epoch(skip, part):
    dl,again = loader(part=part),loader(part=part, num_workers=2)
    first,second = list(dl),list(dl)
    again.set_epoch(1, skip=skip)
    assert same(list(again), second[skip:]) and not same(first, second)
    assert sorted(len(x) for x,_ in first)==sorted(len(x) for x,_ in second)

def test_ranks():
    whole = loader()
    parts = [whole.new(part=(r,2)) for r in range(2)]
    assert [len(p) for p in parts]==[len(parts[0])]*2
    first = [list(p) for p in parts if p.set_epoch(0) is None]
    for a,b in zip(*first): assert a[0].shape==b[0].shape and not torch.equal(a[0], b[0])
    assert loader(part=(1,2)).new(device=torch.device('cpu')).part==(1,2)

def test_widths_follow_the_lines():
    dl = loader(ds_width=True)
    widths = [x.shape[3]/x.shape[2] for x,_ in dl]
    ratios = (30+np.arange(57)*7%150)/32
    assert all(w==int(w) for w in widths) and min(widths)<=round(ratios.min())+1 and max(widths)>=round(ratios.max())-1


# %% pictures
@pytest.mark.parametrize('i', range(4))
def test_resizing_is_paddles(i):
    im = Z[f'MultiScaleDataSet_resize_{i}|in|img']
    rows = [(o, v, f'MultiScaleDataSet_resize_{i}', [3,*map(int, o.split('_')[0].split('x')[::-1])]) for o,v in meta(f'MultiScaleDataSet_resize_{i}')['results'].items()]
    m = meta(f'SVTRRecResizeImg_{i}')
    rows += [(o, v, f'SVTRRecResizeImg_{i}', m['image_shape']) for o,v in m['results'].items()]
    for name,want,case,shape in rows:
        got = SVTRRecResizeImg(shape, padding=name.endswith('True'))(dict(image=im), None)
        assert list(got['image'].shape)==want['shape'] and got['valid_ratio']==pytest.approx(want['valid_ratio'])
        assert got['image'].mean()==pytest.approx(want['mean'], abs=1e-6)


# %% configurations
def config(**kw):
    data = dict(name='MultiScaleDataSet', data_dir=kw.pop('data_dir', '.'), label_file_list=kw.pop('files', []), transforms=kw.pop('transforms', [dict(DecodeImage=dict(img_mode='BGR')), dict(CTCLabelEncode=None), dict(KeepKeys=dict(keep_keys=['image','label','length','valid_ratio']))]), ds_width=False)
    side = dict(dataset=data, loader=dict(batch_size_per_card=12, shuffle=True, drop_last=True), sampler=dict(name='MultiScaleSampler', scales=SCALES, first_bs=12, fix_bs=False, divided_factor=[8,16], is_training=True))
    for k,v in kw.items():
        if v is None: side.pop(k)
        else: side[k] = {**side[k], **v}
    return dict(Global=dict(max_text_length=25), Train=side)

@pytest.fixture(scope='module')
def words(tmp_path_factory):
    d = tmp_path_factory.mktemp('words')
    for i in range(30): cv2.imwrite(f'{d}/{i}.png', Noise().read(i+20)['image'])
    (d/'train.txt').write_text(''.join(f'{i}.png\tabc{i}\n' for i in range(30)))
    return dict(data_dir=str(d), files=[str(d/'train.txt')])

def test_from_a_configuration(words):
    dl = build_dl(config(**words), 'Train')
    assert isinstance(dl, ScaledDL) and {x.shape[2] for x,*_ in dl}=={32,48,64}

class AnyHeight(nn.Module):
    "One convolution, and the mean of its rows"
    out_channels = 8
    def __init__(self, in_channels:int=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(in_channels, 8, 5, (4,8), 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.1))
    def forward(self, x): return self.layers(x).mean(2, keepdim=True)

class Dies(Callback):
    "SIGKILL behind a step"
    order = 100
    def __init__(self, step): self.step = step
    def after_batch(self):
        if self.training and self.train_iter==self.step: os.kill(os.getpid(), signal.SIGKILL)

def whole(words, run, resume=None):
    "A run of three epochs of three batches, one of each height: lines that are joined by chance, two small students of each other"
    run.mkdir(exist_ok=True)
    (run/'lines.txt').write_text(''.join(Path(words['files'][0]).read_text().splitlines(True)[:13]))
    keep = dict(KeepKeys=dict(keep_keys=['image','label','length','valid_ratio']))
    joined = dict(RecConAug=dict(prob=.5, ext_data_num=1, image_shape=[48,96,3], max_text_length=25))
    cfg = config(data_dir=words['data_dir'], files=[str(run/'lines.txt')], transforms=[dict(DecodeImage=dict(img_mode='BGR')), joined, dict(CTCLabelEncode=None), keep], sampler=dict(first_bs=6, scales=[[96,32],[96,48],[96,64]]))
    net = dict(return_all_feats=True, Backbone=dict(name='test_scales.AnyHeight'), Neck=dict(name='SequenceEncoder', encoder_type='reshape'), Head=dict(name='CTCHead'))
    cfg['Global'].update(epoch_num=3, seed=5, use_gpu=False, threads=1, print_batch_step=1, eval_batch_step=[0,2], save_model_dir=str(run), checkpoints=resume)
    rows = [dict(DistillationCTCLoss=dict(weight=1., model_name_list=['Student','Twin'], key='head_out')), dict(Term=dict(loss='kd', on=['Twin.head_out','Student.head_out']))]
    post,metric = dict(name='DistillationCTCLabelDecode', model_name=['Student','Twin'], key='head_out'),dict(name='DistillationMetric', base_metric_name='RecMetric', key='Student', main_indicator='acc')
    cfg.update(Architecture=dict(model_type='rec', Models=dict(Student=net, Twin=net)), Loss=dict(name='CombinedLoss', loss_config_list=rows), Optimizer=dict(name='Adam', lr=dict(name='Cosine', learning_rate=.001)), PostProcess=post, Metric=metric)
    measured = dict(name='SimpleDataSet', data_dir=words['data_dir'], label_file_list=[str(run/'lines.txt')], transforms=[dict(DecodeImage=dict(img_mode='BGR')), dict(CTCLabelEncode=None), dict(RecResizeImg=dict(image_shape=[3,48,96])), keep])
    cfg['Eval'] = dict(dataset=measured, loader=dict(batch_size_per_card=13))
    (run/'asked.yml').write_text(yaml.safe_dump(json.loads(json.dumps(cfg)), sort_keys=False))
    return experiment(load_config(run/'asked.yml'))

def killed(exp, step):
    "Train in another process until it is killed; its status"
    if not (pid := os.fork()):
        try:
            exp.run.cbs = [*exp.run.cbs, Dies(step)]
            train(exp)
        finally: os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def lasting(o): return {k: lasting(v) for k,v in o.items() if k not in ('seconds','fps')} if isinstance(o, dict) else o

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='processes are forked here')
def test_a_run_killed_in_the_middle_of_its_plan_is_the_run_that_was_not(words, tmp_path, monkeypatch):
    "A state every other step; killed in the middle of the first epoch, and of the second"
    monkeypatch.setattr('distillbook.config.registry.TRUSTED', {'test_scales'})
    monkeypatch.setattr(training, 'finish', lambda *a: None) # Speed and pictures
    one,run = tmp_path/'one',tmp_path/'cut'
    learn = train(whole(words, one))
    assert {x.shape[2] for x,*_ in learn.dls.train}=={32,48,64} and len(learn.dls.train)==3
    assert killed(whole(words, run), 3)==-signal.SIGKILL and load_file(run/'latest.pth')['train_iter']==2
    assert killed(whole(words, run, str(run/'latest')), 5)==-signal.SIGKILL and load_file(run/'latest.pth')['train_iter']==4
    train(whole(words, run, str(run/'latest')))
    for name in ('latest.pth','best_accuracy.pth'): same_state(*(lasting(load_file(d/name)) for d in (one,run)))
    a,b = ([*map(lasting, read_metrics(d/'metrics.csv'))] for d in (one,run))
    assert a==b and [r['step'] for r in a]==[2,4,6,8,9]

@pytest.mark.parametrize('kw,says', [
    (dict(sampler=None), 'Train: MultiScaleDataSet wants a section sampler beside it'),
    (dict(sampler=dict(name='MultiScaleSample')), "Train.sampler.name: no sampler 'MultiScaleSample'; did you mean 'MultiScaleSampler'?"),
    (dict(sampler=dict(scale=[1])), "Train.sampler.scale: no key of MultiScaleSampler 'scale'; did you mean 'scales'?"),
    (dict(dataset=dict(name='SimpleDataSet')), 'Train.sampler: this is for MultiScaleDataSet, not SimpleDataSet'),
    (dict(transforms=[dict(RecResizeImg=dict(image_shape=[3,48,320]))]), 'RecResizeImg: the sampler says how large lines become')])
def test_mistakes(words, kw, says):
    with pytest.raises(UserError) as e: build_dl(config(**{**words, **kw}), 'Train')
    assert says in str(e.value)


# %% a shrink ratio that grows
@pytest.mark.parametrize('case', CASES['shrink_'])
def test_maps_of_an_epoch_are_paddles(case):
    m = meta(case)
    total,epoch = (None if o=='None' else int(o) for o in case.removeprefix('shrink_total=').split('_epoch='))
    sample = DetLabelEncode()(dict(image=np.zeros((96,128,3), np.uint8), label=m['label']))
    if epoch is not None: sample['epoch'] = epoch
    for op in (MakeBorderMap(.4, .3, .7, total), MakeShrinkMap(8, .4, total)): sample = op(sample)
    for k in ('threshold_map','threshold_mask','shrink_map','shrink_mask'): np.testing.assert_allclose(sample[k], Z[f'{case}|out|{k}'], rtol=0, atol=1e-5, err_msg=k)
    assert sample['ignore_tags'].tolist()==Z[f'{case}|out|ignore_after'].tolist()

def test_ratio():
    assert [grown_ratio(.4, e, 500) for e in (0, 250, 500)]==pytest.approx([.4, .5, .6]) and grown_ratio(.4, 250)==.4
    assert grown_ratio(.8, 10**6, 500)<1
    for bad in (0, -1, 2.5, True, 'many'):
        with pytest.raises(UserError, match='total_epoch'): MakeShrinkMap(total_epoch=bad)

class Pages:
    def __len__(self): return 3
    def read(self, i, rng=None, picture=True):
        label = json.dumps([dict(transcription='a', points=[[10,12],[70,10],[72,40],[9,38]])])
        return dict(where=f'page {i}', label=label, image=np.zeros((96,128,3), np.uint8))

def test_it_grows_from_epoch_to_epoch_and_not_in_evaluation():
    def text(train, epoch):
        data = SampleSet(Pages(), [DetLabelEncode(), MakeBorderMap(total_epoch=10), MakeShrinkMap(total_epoch=10)], ['image','shrink_map','threshold_map'], train=train)
        data.set_epoch(epoch)
        return data[0][1].sum()
    sizes = [text(True, e) for e in (0, 5, 9)]
    assert sizes==sorted(set(sizes)) and text(False, 9)==sizes[0]==text(True, 0)

def test_growing_maps_are_not_kept():
    "Pictures after the first operations may be kept on disk; what changes from epoch to epoch is not among them"
    source = [dict(image=np.zeros((96,128,3), np.uint8), label=Pages().read(0)['label'], path='a')]
    assert [type(o).__name__ for o in fixed_ops(source, [DetLabelEncode(), MakeBorderMap(total_epoch=10)])]==[]
    assert [type(o).__name__ for o in fixed_ops(source, [DetLabelEncode(), MakeBorderMap()])]==['MakeBorderMap']
