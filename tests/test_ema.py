"Means over time: equal to the plain formula, at rest unless they teach, saved, taken up to the last bit, and as PaddleOCR's files ask for them"
import copy, json
from pathlib import Path
import onnx, pytest, torch, torch.nn.functional as F
from fastai.basics import Callback, DataLoader, DataLoaders, set_seed
from torch import nn
from torch.utils.data import TensorDataset

from distillbook.checkpoint import Checkpoint, frozen_hashes, load_file, without_frozen
from distillbook.config import build_loss, build_terms, experiment, load_config
from distillbook.config.assembly import ready_networks
from distillbook.config.networks import all_names, ema_names
from distillbook.core import UserError
from distillbook.ema import EMA, KINDS, Shares, decay_at, follow, step_mean
from distillbook.learner import distill_learner
from distillbook.losses import distance, kd
from distillbook.nets import Nets
from distillbook.terms import Term, Terms
from distillbook.use.training import evaluate_sets, train
from distillbook.use.weights import read_weights
from test_cli import inside
from test_paddle_det import pages

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')
CONFIGS = Path(__file__).parents[1]/'configs'
def mlp(): return nn.Sequential(nn.Linear(4,6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6,3))
def state(m): return {k: v.clone() for k,v in m.state_dict().items()}

class Dies(Callback):
    "Ends a fit after so many steps"
    order = 90
    def __init__(self, after): self.after = after
    def after_batch(self):
        if self.train_iter==self.after: raise RuntimeError('killed')

class Seen(Callback):
    "The student after every step, and how often its mean ran in training"
    order = 89
    def before_fit(self):
        self.states,self.ran = [],0
        def count(m, args): self.ran += self.learn.model.training
        self.hook = self.learn.net('EMA').register_forward_pre_hook(count)
    def after_batch(self):
        if self.training: self.states.append(state(self.learn.net('Student')))
    def cleanup(self): self.hook.remove()

def learner(folder=None, teaches=False, cbs=(), kind='threshold', decay=.9, resume=None):
    set_seed(0)
    x = torch.randn(64,4)
    ds = TensorDataset(x, (x[:,0]>0).long())
    nets = follow(Nets(dict(Student=mlp())), dict(EMA='Student'))
    terms = [Term(F.cross_entropy, 'Student'), *([Term(kd, 'Student', 'EMA')] if teaches else [])]
    keep = [Checkpoint(folder, every=3, resume=resume)] if folder else []
    learn = distill_learner(DataLoaders(DataLoader(ds, bs=16, shuffle=True), DataLoader(ds, bs=32)), nets, terms, cbs=[EMA(decay, kind), *keep, *cbs])
    learn.logger = lambda *_: None
    return learn

def fit(learn, n=3):
    with learn.no_bar(): learn.fit(n, 1e-2)
    return learn

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('teaches', [False,True])
def test_the_mean_of_all_points(kind, teaches):
    "Weights and running statistics; what counts is copied; the mean runs in training only if somebody reads it"
    learn = fit(learner(teaches=teaches, kind=kind, cbs=[seen := Seen()]))
    total,left = {k: torch.zeros_like(v, dtype=torch.double) for k,v in seen.states[0].items()},1.
    for i,s in enumerate(seen.states):
        d = decay_at(i, .9, kind)
        total,left = {k: d*v + (1-d)*s[k].double() for k,v in total.items()},left*d
    got = learn.net('EMA').state_dict()
    for k,v in total.items():
        if k.endswith('num_batches_tracked'): assert got[k]==seen.states[-1][k]
        else: torch.testing.assert_close(got[k].double(), v/(1-left), rtol=1e-5, atol=1e-6)
    assert seen.ran==(len(seen.states) if teaches else 0) and learn.ema.count==len(seen.states)
    assert all(p.grad is None and not p.requires_grad for p in learn.net('EMA').parameters()) and not learn.net('EMA').training

def test_paddles_formula():
    "A constant decay: the same. A growing one: PaddleOCR divides by the last decay's power, which is up to 2% off in the first steps and nothing later"
    def paddle(ws, kind, decay=.9998):
        total,d = 0.,None
        for i,w in enumerate(ws):
            d = decay_at(i, decay, kind)
            total = d*total + (1-d)*w
        return total/(1-d**len(ws)) if kind!='exponential' else total
    def ours(ws, kind):
        mean,shares = 0.,Shares(.9998, kind)
        for i,w in enumerate(ws): mean += shares.at(i)*(w-mean)
        return mean
    for n in (1, 2, 5, 20, 1000):
        ws = [1.+.1*(i%3) for i in range(n)]
        assert ours(ws, 'normal')==pytest.approx(paddle(ws, 'normal'), rel=1e-6)
        assert ours(ws, 'threshold')==pytest.approx(paddle(ws, 'threshold'), rel=2e-2 if n<20 else 2e-3)
        assert ours(ws, 'exponential')==pytest.approx(paddle(ws, 'exponential'), rel=1e-3)
    shares = Shares()
    forward = [shares.at(i) for i in range(50)]
    assert [Shares().at(i) for i in (49, 3)]==[forward[49], forward[3]] # Also after a leap, as of a run that goes on

@pytest.mark.parametrize('teaches', [False,True])
@pytest.mark.parametrize('after', [4,7,9])
def test_killed_and_resumed_equals_never_killed(teaches, after, tmp_path):
    whole = fit(learner(tmp_path/'whole', teaches))
    with pytest.raises(RuntimeError, match='killed'): fit(learner(tmp_path/'cut', teaches, cbs=[Dies(after)]))
    saved = load_file(tmp_path/'cut'/'last.pth')
    assert {k.partition('.')[0] for k in saved['model']}=={'Student','EMA'} and saved['frozen']=={}
    again = fit(learner(tmp_path/'cut', teaches, resume=tmp_path/'cut'/'last'))
    for k,v in whole.model.state_dict().items(): assert torch.equal(v, again.model.state_dict()[k]), k
    assert whole.ema.count==again.ema.count==12

def test_a_frozen_teacher_beside_it_has_only_its_hash():
    nets = follow(Nets(dict(Teacher=mlp(), Student=mlp()), ['Teacher']), dict(EMA='Student'))
    assert list(frozen_hashes(nets))==['Teacher'] and {k.partition('.')[0] for k in without_frozen(nets)}=={'Student','EMA'}
    for means in (dict(Mean='Teacher'), dict(Student='Student')):
        with pytest.raises(UserError, match='cannot be the mean of'): follow(nets, means)
    with pytest.raises(UserError, match='no network here is the mean'):
        ds = TensorDataset(torch.randn(8,4), torch.zeros(8, dtype=torch.long))
        distill_learner(DataLoaders(DataLoader(ds, bs=4), DataLoader(ds, bs=4)), dict(A=mlp()), [Term(F.cross_entropy, 'A')], cbs=EMA()).fit(1)


# %% in a configuration
def at(cfg, side, op): return next(i for i,o in enumerate(cfg[side]['dataset']['transforms']) if op in o)

def small_det(d, out):
    "PP-OCRv6's detector with the tiny backbone on small pages"
    cfg = load_config(CONFIGS/'det/ppocrv6.yml')
    o = ['Global.epoch_num=2', 'Global.use_gpu=false', f'Global.save_model_dir={out}', 'Global.print_batch_step=1', 'Architecture.Backbone.model_size=tiny', 'Architecture.Neck.out_channels=16', 'Architecture.Neck.dilated_kernel_size=5',
        'Architecture.Head.aux_in_channels=16', f'Train.dataset.transforms.{at(cfg,"Train","RandomCrop")}.RandomCrop.size=[64, 64]', 'Train.loader.batch_size_per_card=3', 'Eval.loader.batch_size_per_card=3',
        f'Eval.dataset.transforms.{at(cfg,"Eval","DetResizeForTest")}.DetResizeForTest={{limit_side_len: 96, limit_type: max}}']
    return o + [f'{s}.{k}' for s in ('Train','Eval') for k in (f'dataset.data_dir={d}', f'dataset.label_file_list=[{d}/label.txt]', 'loader.num_workers=0')]

def test_ppocrv6_detector_trained_with_its_mean(pages, tmp_path):
    "One network without a name and its mean: both measured, the mean's numbers plain, both saved; evaluated again from the file"
    cfg = load_config(CONFIGS/'det/ppocrv6.yml', small_det(pages, tmp_path/'run'))
    learn = train(experiment(cfg))
    assert [t.name for t in learn.term_recorder.terms.terms]==['loss_shrink_maps','loss_threshold_maps','loss_binary_maps','loss_aux_maps_p4','loss_aux_maps_p3','loss_aux_maps_p2']
    assert torch.stack(list(learn.term_recorder.steps)).isfinite().all() and learn.ema.count==len(learn.term_recorder.steps)==6
    summary = json.loads((tmp_path/'run/summary.json').read_text())
    assert list(summary['networks'])==['Model','EMA'] and summary['networks']['EMA']['weights']=='the mean of Model' and summary['best']['indicator']=='hmean'
    saved = load_file(tmp_path/'run/best_accuracy.pth')
    assert {'hmean','Model_hmean'}<=set(saved['metrics']) and any(k.startswith('EMA.') for k in saved['model'])
    exp = ready_networks(load_config(tmp_path/'run/config.yml', [f'Global.checkpoints={tmp_path}/run/best_accuracy']), evals=True)
    numbers = evaluate_sets(exp)['eval']
    assert numbers['hmean']==pytest.approx(saved['metrics']['hmean']) and numbers['Model_hmean']==pytest.approx(saved['metrics']['Model_hmean'])
    assert not torch.equal(exp.nets['EMA'].head.binarize.conv3.weight, exp.nets['Model'].head.binarize.conv3.weight)

def rec_cfg(rows, **g):
    net = dict(Backbone=dict(name='PlainBackbone', channels=[4,4,8,8]), Neck=dict(name='SequenceEncoder', encoder_type='reshape'), Head=dict(name='CTCHead'), return_all_feats=True)
    models = dict(Teacher=dict(freeze_params=True, pretrained='none', **copy.deepcopy(net)), Student=net)
    return dict(Global=dict(use_ema=True, **g), Architecture=dict(model_type='rec', algorithm='Distillation', Models=models), Loss=dict(name='CombinedLoss', loss_config_list=rows))

def test_rows_may_name_the_mean():
    row = dict(DistillationDMLLoss=dict(weight=1., model_name_pairs=[['Student','Student_EMA']], key='head_out'))
    term = dict(Term=dict(loss='kd', on=['Student.head_out','Student_EMA.head_out'], T=2.))
    cfg = rec_cfg([row, term])
    assert ema_names(cfg)==dict(Student_EMA='Student') and all_names(cfg)==['Teacher','Student','Student_EMA']
    assert [t.addresses for t in build_terms(cfg)]==[('Student.head_out','Student_EMA.head_out')]*2
    with pytest.raises(UserError, match="did you mean 'Student_EMA'"): build_loss(rec_cfg([dict(Term=dict(loss='kd', on=['Student.head_out','Student_EMO.head_out']))]))

@pytest.mark.parametrize('key,value,says', [('ema_decay', 2, 'a number from 0 and below 1'), ('ema_decay_type', 'treshold', "did you mean 'threshold'"), ('use_ema', 'maybe', 'true or false')])
def test_settings_that_are_none(key, value, says):
    from distillbook.config.checker import refusals
    cfg = load_config(CONFIGS/'det/ppocrv6.yml', [f'Global.{key}={value}']) if key!='use_ema' else None
    if cfg is None:
        with pytest.raises(UserError, match='use_ema'): ema_names(dict(Global=dict(use_ema=value), Architecture={}))
    else: assert any(says in str(e) for e in refusals(cfg))

def test_tied_weights_take_one_step():
    class Tied(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)
            self.b = self.a
            nn.init.constant_(self.a.weight, value)
    nets = follow(Nets(dict(S=Tied(0.))), dict(E='S'))
    nn.init.constant_(nets['S'].a.weight, 1.)
    step_mean(nets['E'], nets['S'], .5)
    assert nets['E'].b.weight.unique().tolist()==[.5]

def test_the_mean_is_what_goes_out(tmp_path, monkeypatch):
    "`export` and `extract` take the network that was measured, and each card has its own network's numbers"
    monkeypatch.chdir(tmp_path)
    cfg = dict(Global=dict(save_model_dir='run', epoch_num=2, use_ema=True, ema_decay=.9, use_gpu=False, character_dict_path=str(CONFIGS/'rec/digits_and_letters.txt'), max_text_length=8, eval_batch_step=[0, 2]),
        Architecture=dict(model_type='rec', algorithm='X', Backbone=dict(name='PlainBackbone', channels=[8,8,8,8]), Neck=dict(name='SequenceEncoder', encoder_type='reshape'), Head=dict(name='CTCHead', fc_decay=0)),
        Loss=dict(name='CTCLoss'), Optimizer=dict(name='Adam', lr=dict(learning_rate=.001)), PostProcess=dict(name='CTCLabelDecode'), Metric=dict(name='RecMetric', main_indicator='acc'),
        **{s: dict(dataset=dict(name='RenderedLines', words=16, skip=k, fonts='dejavu', transforms=[dict(CTCLabelEncode=None), dict(RecResizeImg=dict(image_shape=[3,48,96])), dict(KeepKeys=dict(keep_keys=['image','label','length']))]),
            loader=dict(batch_size_per_card=8, num_workers=0, shuffle=s=='Train')) for s,k in (('Train',0), ('Eval',16))})
    Path('ema.yml').write_text(json.dumps(cfg))
    assert inside('train', '-c', 'ema.yml').returncode==0
    made, = json.loads(inside('export', '--run', 'run', '--json').stdout)
    assert Path(made).name=='EMA.onnx'
    inside('export', '--run', 'run', '--net', 'all')
    numbers = load_file('run/best_accuracy.pth')['metrics']
    about = {n: json.loads({p.key: p.value for p in onnx.load(f'run/inference/{n}.onnx').metadata_props}['metrics']) for n in ('EMA','Model')}
    assert about['EMA']['norm_edit_dis']==pytest.approx(numbers['norm_edit_dis']) and about['Model']=={k: pytest.approx(v) for k,v in numbers.items() if k.startswith('Model_') and 'fps' not in k}
    assert inside('extract', 'run', '-o', 'mean.safetensors').returncode==0
    state = load_file('run/best_accuracy.pth')['model']
    assert all(torch.equal(v, state[f'EMA.{k}']) for k,v in read_weights('mean.safetensors').items())

def test_networks_that_are_connected_keep_their_projectors():
    teacher,student,x = nn.Linear(4,8),nn.Linear(4,3),torch.randn(5,4)
    nets = Nets(dict(Teacher=teacher, Student=student), frozen=['Teacher'])
    loss = Terms(nets, [Term(distance, 'Student', 'Teacher', name='hint')])
    loss.connect((x,))
    more = follow(nets, dict(EMA='Student'))
    assert set(nets.state_dict())<set(more.state_dict()) and more._modules['_projectors'] is nets._modules['_projectors']
    want,loss.nets = loss(nets(x)),more
    assert torch.equal(loss(more(x)), want)
