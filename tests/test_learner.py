"The learner over several networks, tried where fastai supposes one; all on random points"
import copy, pickle, random, sys, warnings
from collections import namedtuple
from functools import partial
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.basics import AccumMetric, Callback, DataLoader, DataLoaders, Metric, OptimWrapper, SGD, Adam, set_seed
from fastai.callback.all import EarlyStoppingCallback, GradientAccumulation, GradientClip, ProgressCallback, ReduceLROnPlateau, SaveModelCallback, SchedCos, combine_scheds
from fastai.metrics import F1Score, accuracy, error_rate
from torch import nn
from torch.utils.data import TensorDataset

from distillbook.core import UserError
from distillbook.learner import DistillLearner, NonFiniteLoss, distill_learner, net_metrics, param_groups
from distillbook.losses import distance, dml, kd
from distillbook.nets import Nets
from distillbook.terms import Term

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')
ADAMW = partial(OptimWrapper, opt=torch.optim.AdamW)
OPTS = pytest.mark.parametrize('opt_func', (Adam, ADAMW), ids=['fastai', 'torch'])
ODD = ['type', 'keys', 'items', 'training', 'forward', 'two words', 'Lehrer-Netz', '1', 'model', 'opt', 'dls', 'loss', 'loss_func', 'pred', 'epoch', 'iter', 'x', 'y', 'yb', 'lr', 'wd',
       'names', 'frozen', 'taps', 'self', 'default', 'net', 'parts', 'groups', 'metrics', 'recorder', 'target', 'monitor', 'valid', 'train', 'steps', 'on', 'sums', 'count', 'checked', 'order', 'run', 'terms', 'lossy']
SHADOW = ['gather_preds', 'lr_finder', 'pct_train', 'epochs', 'mixed_precision', 'final_record', 'activation', 'decodes', 'show_results', 'normalize', 'progress', 'logger', 'func', 'n_iter', 'n_epoch', 'train_iter']

def mlp(h=6, drop=0.5, out=3): return nn.Sequential(nn.Linear(4,h), nn.BatchNorm1d(h), nn.ReLU(), nn.Dropout(drop), nn.Linear(h,out))
def state(m): return {k: v.clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

def data(n=64):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x[:,0]>0).long()+(x[:,1]>0).long())

def loaders(bs=16, ds=None, **kw):
    ds = ds or data()
    return DataLoaders(DataLoader(ds, bs=bs, shuffle=True, **kw), DataLoader(ds, bs=24))

CE,KD = Term(F.cross_entropy,'Student'),Term(kd,'Student','Teacher')
def learner(nets=None, terms=(CE, KD), frozen=('Teacher',), dls=None, seed=0, **kw):
    set_seed(seed)
    nets = nets or dict(Teacher=mlp(16), Student=mlp())
    return distill_learner(dls or loaders(), nets, terms, frozen=frozen, **kw)

@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    "No bars, no printed tables"
    real = distill_learner
    def made(*args, **kw):
        learn = real(*args, **kw)
        learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
        learn.logger = lambda *_: None
        return learn
    monkeypatch.setattr(sys.modules[__name__], 'distill_learner', made)

# ---- names and numbers of nets

def test_names_that_fastai_uses_itself(tmp_path):
    nets = {n: mlp() for n in ODD}
    learn = learner(nets, [Term(F.cross_entropy, n) for n in ODD], frozen=ODD[1::2], metrics=accuracy, path=tmp_path, model_dir='.', cbs=SaveModelCallback(monitor='valid_accuracy'), monitor='type_accuracy')
    before = {n: state(net) for n,net in nets.items()}
    learn.fit_one_cycle(1, 1e-2)
    for i,n in enumerate(ODD):
        assert learn.net(n) is nets[n] and same(before[n], state(nets[n]))==(i%2==1)
    assert list(learn.table())==['train_loss', 'valid_loss', *(f'{n}_accuracy' for n in ODD)] and len(learn.parts().columns)==len(ODD)
    assert list(learn.get_preds()[0])==ODD
    learn.validate()
    learn.freeze(ODD[0])
    learn.fit(1, learn.lr_by_net(1e-3, **{'two words': 1e-4} if 'two words' in [n for n,*_ in learn.groups] else {}))

@pytest.mark.parametrize('name', [pytest.param(n) if n in ('gather_preds','lr_finder') else n for n in SHADOW])
def test_names_that_callbacks_look_for(name):
    nets = {name: mlp(), 'Teacher': mlp()}
    learn = learner(nets, [Term(F.cross_entropy, name)], metrics=accuracy)
    learn.fit(2, 1e-2)
    learn.get_preds(), learn.validate(), learn.lr_find(num_it=5, show_plot=False)
    learn.fit(1, 1e-2)
    assert len(learn.parts())==4 and len(learn.table())==1

def test_a_net_called_target_does_not_hide_the_targets():
    nets = dict(target=mlp(), Teacher=mlp())
    assert learner(nets, [Term(F.cross_entropy,'target')]).show_results(shuffle=False).shape[1]==3

@pytest.mark.parametrize('n', (1, 2, 5))
@pytest.mark.parametrize('cold', (0, 1, -1))
@OPTS
def test_frozen_nets_are_bit_equal(n, cold, opt_func):
    names = [f'N{i}' for i in range(n)]
    frozen = names[:cold] if n>1 else []
    nets = {o: mlp() for o in names}
    hot = [o for o in names if o not in frozen]
    learn = learner(nets, [Term(F.cross_entropy, o) for o in hot]+[Term(kd, hot[0], o) for o in frozen], frozen=frozen, metrics=accuracy, opt_func=opt_func)
    before = {o: state(net) for o,net in nets.items()}
    def check():
        for o in frozen:
            assert same(before[o], state(nets[o])) and all(p.grad is None and not p.requires_grad for p in nets[o].parameters())
    learn.fit(1, 1e-2)
    assert not any(same(before[o], state(nets[o])) for o in hot)
    check()
    for call in (lambda: learn.fit_one_cycle(1, 1e-2), learn.validate, *([learn.get_preds] if n>1 else []), lambda: learn.lr_find(num_it=6, show_plot=False), lambda: learn.fit(1, 1e-2)):
        call()
        check()
    cold_ps = {id(p) for o in frozen for p in nets[o].parameters()}
    state_of = getattr(learn.opt, 'opt', learn.opt).state
    in_opt = {id(p) for ps in learn.opt.param_lists for p in ps} | {id(p) for p in state_of}
    assert in_opt.isdisjoint(cold_ps) and in_opt=={id(p) for o in hot for p in nets[o].parameters()}
    groups = getattr(learn.opt, 'opt', None)
    assert groups is None or {id(p) for g in groups.param_groups for p in g['params']}==in_opt

def test_a_frozen_net_is_out_of_autograd_in_the_step():
    class Look(Callback):
        def after_pred(self): assert not self.pred['Teacher'].requires_grad and self.pred['Student'].requires_grad==self.training
        def before_step(self): assert all(p.grad is None for p in self.learn.net('Teacher').parameters())
    learner(cbs=Look()).fit(1, 1e-2)

def test_every_net_frozen():
    learn = learner(frozen=('Teacher', 'Student'))
    for call in (lambda: learn.fit(1), lambda: learn.fit_one_cycle(1), learn.lr_find):
        with pytest.raises(UserError, match=r'every net is frozen \(Teacher, Student\)'): call()
    learn.unfreeze('Student')
    learn.fit(1, 1e-2)

def test_a_teacher_of_an_earlier_learner_can_be_trained_in_a_later_one():
    teacher = mlp(16)
    learner(dict(Teacher=teacher, Student=mlp()))
    learn = learner(dict(Teacher=teacher, Student=mlp()))
    learn.unfreeze('Teacher')
    assert [n for n,*_ in param_groups(learn.model)]==['Teacher']*2+['Student']*2

def test_a_frozen_net_that_is_no_longer_named_frozen_does_not_drift_untrained():
    "It must be trained, or refused, but not stand in training mode without gradients"
    teacher = mlp(16)
    learner(dict(Teacher=teacher, Student=mlp()))
    before = state(teacher)
    try: learn = learner(dict(Teacher=teacher, Student=mlp()), [CE, KD, Term(F.cross_entropy,'Teacher')], frozen=())
    except UserError: return
    learn.fit(1, 1e-2)
    assert same(before, state(teacher)) or not torch.equal(before['0.weight'], teacher[0].weight)

def test_nets_without_parameters():
    class Rule(nn.Module):
        def forward(self, x): return x[:,:3]*5
    for frozen in (('Teacher',), ()):
        learn = learner(dict(Teacher=Rule(), Student=mlp()), frozen=frozen, metrics=accuracy)
        learn.fit(1, 1e-2)
        assert [n for n,*_ in learn.groups]==['Student']*2

def test_tied_weights_between_nets():
    a,b = mlp(),mlp()
    b[4].weight = a[4].weight
    learn = learner(dict(A=a, B=b), [Term(F.cross_entropy,'A'), Term(F.cross_entropy,'B')], frozen=())
    learn.fit(2, 1e-2)
    ps = [p for *_,ps in learn.groups for p in ps]
    assert len(ps)==len({id(p) for p in ps})==11 and b[4].weight is a[4].weight

def test_data_parallel():
    plain,wrapped = learner(metrics=accuracy),learner(metrics=accuracy)
    wrapped.model = nn.DataParallel(wrapped.model, [0] if torch.cuda.is_available() else None)
    plain.model.to(next(wrapped.model.parameters()).device) # To a GPU, if there is one
    for l in (plain, wrapped):
        set_seed(1)
        l.fit(2, 1e-2)
    assert same(state(plain.net('Student')), state(wrapped.net('Student'))) and plain.table().equals(wrapped.table())
    wrapped.freeze('Student')
    wrapped.unfreeze('Student')
    wrapped.fit(1, wrapped.lr_by_net(Student=1e-3))
    assert wrapped.get_preds()[0].keys()=={'Teacher','Student'}

def test_the_model_can_be_copied_after_a_fit_with_taps():
    learn = learner(terms=[CE, Term(distance,'Student.2','Teacher.2')])
    learn.fit(1, 1e-2)
    copy.deepcopy(learn.model)

# ---- parameter groups

@OPTS
@pytest.mark.parametrize('where', ('fit', 'learner', 'default', 'optimiser', 'zero'))
def test_decay_reaches_what_decays(opt_func, where):
    kw = dict(learner=dict(wd=0.3)).get(where, {})
    if where=='optimiser': opt_func = partial(opt_func, **({'wd': 0.3} if opt_func is Adam else {'weight_decay': 0.3}))
    learn = learner(terms=[CE, Term(distance,'Student.2','Teacher.2')], opt_func=opt_func, **kw)
    wds = []
    class Look(Callback):
        def before_step(self): wds.append([h['wd'] for h in self.opt.hypers])
    learn.fit(1, 1e-3, cbs=Look(), **dict(fit=dict(wd=0.3), zero=dict(wd=0.)).get(where, {}))
    want = dict(default=0.01, zero=0.).get(where, 0.3)
    assert all(w==pytest.approx([want, 0., want, 0.]) for w in wds)
    assert [(n,d) for n,d,_ in learn.groups]==[('Student',True), ('Student',False), ('_projectors',True), ('_projectors',False)]
    assert all((p.ndim>1)==d for _,d,ps in learn.groups for p in ps)
    assert not getattr(learn.opt, 'opt', None) or [g['weight_decay'] for g in learn.opt.opt.param_groups]==wds[-1]

@OPTS
def test_what_does_not_decay_does_not_decay(opt_func):
    "With a loss that has no gradient, only decay moves weights"
    learn = learner(terms=[Term(lambda o,y: 0*o.sum(),'Student')], opt_func=opt_func)
    before = {n: p.detach().clone() for n,p in learn.net('Student').named_parameters()}
    learn.fit(1, 0.1, wd=0.1)
    for n,p in learn.net('Student').named_parameters(): assert torch.equal(p, before[n])==(p.ndim<2)

def test_decay_by_group_and_for_biases_too():
    learn = learner(terms=[Term(F.cross_entropy,'Teacher'), CE], frozen=())
    learn.fit(1, 1e-3, wd=[.1,.2,.3,.4])
    assert [h['wd'] for h in learn.opt.hypers]==[.1, 0., .3, 0.]
    learn = learner(wd_bn_bias=True, wd=0.3)
    learn.fit(1, 1e-3)
    assert [h['wd'] for h in learn.opt.hypers]==[.3, .3]

@OPTS
def test_rates_by_net(opt_func):
    learn = learner(dict(A=mlp(), B=mlp()), [Term(dml,'A','B'), Term(dml,'B','A')], frozen=(), opt_func=opt_func, lr=0.007)
    assert learn.lr_by_net(B=0.)==[0.007, 0.007, 0., 0.] and learn.lr_by_net(1., A=2.)==[2., 2., 1., 1.]
    before = state(learn.net('B'))
    learn.fit(1, learn.lr_by_net(1e-2, B=0.), wd=0.)
    assert all(torch.equal(p, before[n]) for n,p in learn.net('B').named_parameters())
    seen = []
    class Look(Callback):
        def before_step(self): seen.append([h['lr'] for h in self.opt.hypers])
    learn.fit_one_cycle(1, learn.lr_by_net(1e-2, B=1e-3), cbs=Look())
    assert all(s[0]==s[1]==pytest.approx(10*s[2]) for s in seen)
    with pytest.raises(UserError, match="no trainable net 'C'"): learn.lr_by_net(C=1.)

@OPTS
def test_freezing_between_fits_keeps_the_momenta_of_the_rest(opt_func):
    learn = learner(dict(A=mlp(drop=0.), B=mlp(drop=0.)), [Term(F.cross_entropy,'A'), Term(F.cross_entropy,'B')], frozen=(), opt_func=opt_func)
    learn.fit(1, 1e-2)
    st = lambda: getattr(learn.opt, 'opt', learn.opt).state
    key = 'exp_avg' if opt_func is ADAMW else 'grad_avg'
    b = list(learn.net('B').parameters())
    kept,a = [st()[p][key].clone() for p in b],state(learn.net('A'))
    learn.freeze('A')
    assert all(torch.equal(st()[p][key], k) for p,k in zip(b, kept)) and set(map(id, st()))<={id(p) for p in b}
    learn.fit(1, 1e-2)
    assert same(a, state(learn.net('A'))) and not torch.equal(st()[b[0]][key], kept[0])
    learn.unfreeze('A')
    learn.fit(1, 1e-2)
    assert not same(a, state(learn.net('A'))) and len(st())==12

@OPTS
def test_freezing_changes_nothing_for_the_rest(opt_func):
    "B trained beside a net that is frozen half-way equals B trained alone"
    def trained(freeze):
        set_seed(0)
        b = mlp(drop=0.)
        learn = learner(dict(B=b) | (dict(A=mlp(drop=0.)) if freeze else {}), [Term(F.cross_entropy,'B')]+([Term(F.cross_entropy,'A')] if freeze else []), frozen=(), opt_func=opt_func)
        for i in range(2):
            if i and freeze: learn.freeze('A')
            set_seed(i)
            learn.dls.train.rng = random.Random(i)
            learn.fit(1, 1e-2)
        return state(b)
    one,two = trained(True),trained(False)
    for k in one: torch.testing.assert_close(one[k], two[k])

def test_freeze_wants_names_that_are_there():
    learn = learner()
    with pytest.raises(UserError, match='freeze which nets'): learn.freeze()
    with pytest.raises(UserError, match="did you mean 'Student'"): learn.freeze('Studnt')

def test_a_mistyped_name_among_several_changes_nothing():
    learn = learner(dict(A=mlp(), B=mlp()), [Term(dml,'A','B')], frozen=())
    learn.fit(1, 1e-2)
    with pytest.raises(UserError): learn.freeze('A', 'C')
    assert all(p.requires_grad for p in learn.net('A').parameters())

# ---- outputs of every kind

class Heads(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.body,self.f = mlp(),f
    def forward(self, x): return self.f(self.body(x), x)

Pair = namedtuple('Pair', 'x logits')
OUTS = dict(bare=(lambda o,x: o, ''), tuple=(lambda o,x: (x,o), '.1'), list=(lambda o,x: [x,o], '.1'), nested=(lambda o,x: dict(head_out=dict(ctc=o, pair=(x,[x])), neck=x), '.head_out.ctc'), none=(lambda o,x: dict(ctc=o, sar=None), '.ctc'),
            named=(lambda o,x: Pair(x,o), '.1'), number=(lambda o,x: dict(ctc=o, width=20), '.ctc'), scalar=(lambda o,x: dict(ctc=o, temperature=o.detach().mean()), '.ctc'))

@pytest.mark.parametrize('f,path', OUTS.values(), ids=OUTS)
def test_outputs_of_every_kind(f, path):
    s,t = 'Student'+path,'Teacher'+path
    learn = learner(dict(Teacher=Heads(f), Student=Heads(f)), [Term(F.cross_entropy,s), Term(kd,s,t)], metrics={s: accuracy, t: accuracy}, monitor='Student_accuracy')
    learn.fit(1, 1e-2)
    learn.validate()
    assert list(learn.table())==['train_loss','valid_loss','Student_accuracy','Teacher_accuracy']

@pytest.mark.parametrize('f,path', [pytest.param(*v, id=k) for k,v in OUTS.items()])
def test_predictions_of_every_kind(f, path):
    from distillbook.nets import look_up
    learn = learner(dict(Teacher=Heads(f), Student=Heads(f)), [Term(F.cross_entropy,'Student'+path)])
    x = data().tensors[0]
    want = learn.model.eval()(x)
    for kw in (dict(), dict(dl=learn.dls.train)):
        preds,targs = learn.get_preds(**kw)
        assert torch.equal(targs, data().tensors[1])
        torch.testing.assert_close(look_up(preds, 'Student'+path), look_up(want, 'Student'+path))

# ---- projectors

FEATURES = {2: (nn.Linear(4,5), nn.Linear(4,7)), 3: (nn.Sequential(nn.Unflatten(1,(2,2)), nn.Linear(2,5)), nn.Sequential(nn.Unflatten(1,(2,2)), nn.Linear(2,7))),
            4: (nn.Sequential(nn.Unflatten(1,(1,2,2)), nn.Conv2d(1,5,1)), nn.Sequential(nn.Unflatten(1,(1,2,2)), nn.Conv2d(1,7,1), nn.Upsample(scale_factor=2)))}

@OPTS
@pytest.mark.parametrize('ndim', FEATURES)
def test_projectors_are_trained_and_saved(ndim, opt_func, tmp_path):
    class Net(nn.Module):
        def __init__(self, features):
            super().__init__()
            self.features,self.head = copy.deepcopy(features),nn.LazyLinear(3)
            self.head(self.features(torch.zeros(1,4)).flatten(1))
        def forward(self, x): return self.head(self.features(x).flatten(1))
    def made(seed): return learner(dict(Teacher=Net(FEATURES[ndim][1]), Student=Net(FEATURES[ndim][0])), [Term(distance,'Student.features','Teacher.features',name='hint')], opt_func=opt_func, path=tmp_path, model_dir='.', seed=seed)
    learn = made(0)
    proj = learn.model._modules['_projectors']
    before,student = state(proj),state(learn.net('Student').features)
    assert len(before)==2
    learn.fit(1, 1e-2)
    assert not any(torch.equal(v, before[k]) for k,v in proj.state_dict().items()) and not any(torch.equal(v, student[k]) for k,v in learn.net('Student').features.state_dict().items())
    assert not any('proj' in n or 'hint' in n for n,_ in [*learn.net('Student').named_modules(), *learn.net('Student').named_parameters()])
    learn.save('m')
    other = made(1)
    other.create_opt()
    other.load('m')
    assert same(state(other.model), state(learn.model))
    other.fit(1, 1e-3)
    learn.freeze('Student')
    assert {n for n,*_ in learn.groups}=={'_projectors'}

# ---- metrics

class Several(Metric):
    "Two values from one pass, and how often it was asked to count"
    names = ('acc','top')
    calls = []
    def reset(self): self.hits = self.n = 0
    def accumulate(self, learn):
        Several.calls.append(1)
        self.hits += (learn.pred.argmax(-1)==learn.y).sum().item()
        self.n += len(learn.y)
    @property
    def value(self): return dict(acc=self.hits/self.n, top=1.)

def test_metrics_are_columns_from_one_forward():
    class Counting(nn.Sequential):
        n = 0
        def forward(self, x):
            self.n += not self.training
            return super().forward(x)
    nets = dict(Teacher=Counting(*mlp()), Student=Counting(*mlp()), Third=Counting(*mlp()))
    learn = learner(nets, metrics=[accuracy, error_rate, F1Score(average='macro'), Several(), AccumMetric(lambda p,t: float((p.argmax(1)==t).float().mean()), name='whole', flatten=False)])
    Several.calls.clear()
    asked = {n: net.n for n,net in nets.items()}
    learn.fit(1, 1e-2)
    steps,valid = len(learn.dls.train),len(learn.dls.valid)
    assert {n: net.n-asked[n] for n,net in nets.items()}==dict(Teacher=steps+valid, Student=valid, Third=valid)
    assert len(Several.calls)==3*valid
    row = learn.table().iloc[0]
    preds,targs = learn.get_preds()
    for n in nets:
        acc = accuracy(preds[n], targs).item()
        assert [row[f'{n}_{m}'] for m in ('accuracy','acc','whole','top')]==pytest.approx([acc, acc, acc, 1.]) and row[f'{n}_error_rate']==pytest.approx(1-acc)
        from sklearn.metrics import f1_score
        assert row[f'{n}_f1_score']==pytest.approx(f1_score(targs, preds[n].argmax(1), average='macro'))

def test_metrics_of_the_nets_are_apart():
    m = Several()
    cols = net_metrics(Nets(dict(A=mlp(), B=mlp())), m)
    assert [c.name for c in cols]==['A_acc','A_top','B_acc','B_top'] and cols[0].metric is cols[1].metric and cols[0].metric is not cols[2].metric is not m

def test_metrics_by_address():
    f = lambda o,x: dict(a=o, b=(x, -o))
    learn = learner(dict(Teacher=Heads(f), Student=Heads(f)), [Term(F.cross_entropy,'Student.a')], metrics={'Student.a': accuracy, 'Teacher.b.1': [accuracy, error_rate], 'Student.body.4': Several()})
    learn.fit(1, 1e-2)
    row = learn.table().iloc[0]
    assert list(row.index)[2:]==['Student_accuracy','Teacher_accuracy','Teacher_error_rate','Student_acc','Student_top'] and row.Student_accuracy==row.Student_acc

def test_two_outputs_of_one_net_by_the_same_metric():
    f = lambda o,x: dict(a=o, b=-o)
    assert len(learner(dict(Teacher=Heads(f), Student=Heads(f)), [Term(F.cross_entropy,'Student.a')], metrics={'Student.a': accuracy, 'Student.b': accuracy}).metrics)==2

def test_a_metric_that_cannot_measure_the_output_fails_when_the_learner_is_made():
    f = lambda o,x: dict(a=o)
    with pytest.raises(UserError): learner(dict(Teacher=Heads(f), Student=Heads(f)), [Term(F.cross_entropy,'Student.a')], metrics=accuracy)

def test_columns_of_the_same_name():
    with pytest.raises(UserError, match='same name'): learner(metrics=[accuracy, accuracy])

# ---- fastai's callbacks

def test_save_and_stop_on_a_nets_column(tmp_path):
    class Scripted(Metric):
        name,vals = 'acc',[]
        def reset(self): pass
        def accumulate(self, learn): pass
        @property
        def value(self): return Scripted.vals.pop(0)
    Scripted.vals[:] = [.1, .5, .3, .4, .2, .9]
    nets = dict(Teacher=mlp(16), Student=mlp())
    states = []
    class Keep(Callback):
        def after_epoch(self): states.append(state(nets['Student']))
    learn = learner(nets, metrics={'Student': Scripted()}, path=tmp_path, model_dir='.', cbs=[SaveModelCallback(monitor='Student_acc', fname='best'), EarlyStoppingCallback(monitor='Student_acc', patience=2), ReduceLROnPlateau(monitor='Student_acc', patience=1), Keep()])
    learn.fit(6, 1e-2)
    assert learn.table().Student_acc.tolist()==[.1, .5, .3, .4]
    best = torch.load(tmp_path/'best.pth')
    assert same({k[8:]: v for k,v in best.items() if k.startswith('Student.')}, states[1])
    assert same(state(nets['Student']), states[1])

@pytest.mark.parametrize('opt_func', (SGD,))
def test_accumulated_gradients_equal_a_larger_batch(opt_func):
    def trained(bs, cbs):
        set_seed(0)
        nets = dict(Teacher=nn.Linear(4,3), Student=nn.Linear(4,3))
        ds = data(64)
        learn = learner(nets, [CE, KD], dls=DataLoaders(DataLoader(ds, bs=bs), DataLoader(ds, bs=64)), opt_func=opt_func, cbs=cbs)
        learn.fit(2, 0.1)
        return nets['Student'].weight.detach(),learn.parts()
    (a,parts),(b,whole) = trained(16, GradientAccumulation(32)),trained(32, None)
    torch.testing.assert_close(a, b)
    np.testing.assert_allclose(parts.values.reshape(4,2,2).mean(1), whole.values, rtol=1e-5)

def test_gradient_clip():
    norms = []
    class Look(Callback):
        order = 100
        def before_step(self): norms.append(sum(p.grad.square().sum() for p in self.learn.net('Student').parameters()).sqrt())
    learner(cbs=[GradientClip(0.01), Look()]).fit(1, 1e-2)
    assert max(norms)<=0.0101

@OPTS
def test_lr_find_leaves_everything(opt_func, tmp_path):
    learn = learner(metrics=accuracy, opt_func=opt_func, path=tmp_path)
    learn.fit(2, 1e-2)
    table,parts,before = learn.table(),learn.parts(),state(learn.model)
    opt = copy.deepcopy(learn.opt.state_dict()['state'])
    learn.lr_find(num_it=20, show_plot=False)
    assert same(before, state(learn.model)) and learn.table().equals(table) and learn.parts().equals(parts)
    flat = lambda o: [x for v in (o.values() if isinstance(o, dict) else o) for x in flat(v)] if isinstance(o, (dict,list,tuple)) else [o]
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a==b for a,b in zip(flat(opt), flat(learn.opt.state_dict()['state'])))
    assert not list(tmp_path.rglob('_tmp*'))

@pytest.mark.parametrize('what', ('to_fp16', 'to_bf16'))
@pytest.mark.skipif(torch.cuda.is_available(), reason='what happens without CUDA')
def test_mixed_precision_without_cuda(what, monkeypatch):
    monkeypatch.setattr('distillbook.learner.has_bf16', lambda: False)
    plain,mixed = learner(),learner()
    with pytest.warns(UserWarning, match=f'{what} does nothing here'): assert getattr(mixed, what)() is mixed
    assert [cb.name for cb in mixed.cbs]==[cb.name for cb in plain.cbs]
    for l in (plain, mixed):
        set_seed(0)
        l.dls.train.rng = random.Random(0)
        l.fit(1, 1e-2)
    assert same(state(plain.model), state(mixed.model))

@pytest.mark.skipif(torch.cuda.is_available(), reason='what happens without CUDA')
def test_bf16_on_a_cpu(monkeypatch):
    "Networks compute in bfloat16, losses and weights stay in float32, and nothing of it is left after a fit, an error or a look"
    monkeypatch.setattr('distillbook.learner.has_bf16', lambda: True)
    seen,losses = set(),set()
    def loss(a, y):
        losses.add((a.dtype, torch.is_autocast_enabled('cpu')))
        return F.cross_entropy(a, y)
    nets = dict(Student=nn.Sequential(nn.Unflatten(1, (1,8,8)), nn.Conv2d(1,4,3), nn.Conv2d(4,4,3,groups=4), nn.Flatten(), nn.Linear(64,10)))
    x,y = torch.randn(32,64),torch.randint(10, (32,))
    ds = torch.utils.data.TensorDataset(x, y)
    dls = DataLoaders(DataLoader(ds, bs=8), DataLoader(ds, bs=8))
    learn = distill_learner(dls, nets, [Term(loss, 'Student')]).to_bf16()
    net = learn.net('Student')
    for i,m in enumerate(net): m.register_forward_hook(lambda m,a,o,i=i: seen.add((i, o.dtype)))
    losses.clear(), seen.clear()
    learn.fit(2, 1e-3)
    assert losses=={(torch.float32, False)}
    assert {(1,torch.bfloat16), (2,torch.float32), (4,torch.bfloat16)} <= seen and (2,torch.bfloat16) not in seen
    assert type(net[2]) is nn.Conv2d and {p.dtype for p in net.parameters()}=={torch.float32}
    learn.validate()
    assert type(net[2]) is nn.Conv2d and not torch.is_autocast_enabled('cpu')
    handle = net[4].register_forward_hook(lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    handle.remove()
    assert type(net[2]) is nn.Conv2d and not torch.is_autocast_enabled('cpu')

# ---- predictions

def torch_loaders(): return DataLoaders(torch.utils.data.DataLoader(data(), batch_size=16, shuffle=True), torch.utils.data.DataLoader(data(), batch_size=24))

def test_predictions():
    learn = learner(metrics=accuracy)
    x,y = data().tensors
    want = learn.model.eval()(x)
    for kw in ({}, dict(ds_idx=0), dict(dl=learn.dls.train), dict(dl=DataLoader(data(), bs=7, shuffle=True, drop_last=True))):
        preds,targs = learn.get_preds(**kw)
        assert torch.equal(targs, y) and all(torch.allclose(preds[n], want[n], atol=1e-6) for n in want)
        inp,preds,targs = learn.get_preds(with_input=True, **kw)
        assert torch.equal(inp, x) and torch.equal(targs, y)
    preds,targs = learn.get_preds(dl=DataLoader(TensorDataset(x), bs=10))
    assert targs is None and torch.allclose(preds['Student'], want['Student'], atol=1e-6)
    preds,targs = learn.get_preds(dl=torch.utils.data.DataLoader(data(), batch_size=10))
    assert torch.equal(targs, y) and torch.allclose(preds['Student'], want['Student'], atol=1e-6)
    _,targs,losses = learn.get_preds(with_loss=True)
    assert losses.keys()=={'Student'} and losses['Student'].mean().item()==pytest.approx(learn.validate()[0], rel=1e-5)

def test_predictions_and_results_of_a_single_net():
    learn = learner(dict(Student=mlp()), [CE], frozen=())
    preds,targs = learn.get_preds()
    assert preds.keys()=={'Student'} and torch.equal(targs, data().tensors[1])
    learn.show_results()

def test_before_any_fit():
    learn = learner(metrics=accuracy)
    a = learn.validate()
    assert len(a)==3 and a[2]==pytest.approx(accuracy(*(o['Student'] if isinstance(o, dict) else o for o in learn.get_preds())).item())
    learn.show_results(), learn.lr_find(num_it=5, show_plot=False)

@pytest.mark.parametrize('what', ('table', 'parts', 'plot_terms'))
def test_there_is_nothing_to_show_before_a_fit(what):
    with pytest.raises(UserError): getattr(learner(), what)()

def test_plain_torch_loaders():
    learn = learner(dls=torch_loaders(), metrics=accuracy, monitor='Student_accuracy')
    learn.fit_one_cycle(2, 1e-2)
    assert len(learn.parts())==8
    learn.validate(), learn.lr_find(num_it=5, show_plot=False), learn.show_results(), learn.get_preds(dl=learn.dls.valid)

def test_predictions_from_plain_torch_loaders(): learner(dls=torch_loaders()).get_preds()

def test_validate_leaves_the_fit_as_it_was(tmp_path):
    learn = learner(metrics=accuracy, cbs=[SaveModelCallback(monitor='Student_accuracy', fname='b'), EarlyStoppingCallback(monitor='valid_loss')], path=tmp_path, model_dir='.')
    learn.fit(2, 1e-2)
    table,parts,when = learn.table(),learn.parts(),(tmp_path/'b.pth').stat().st_mtime_ns
    n = [cb.name for cb in learn.cbs]
    learn.validate(), learn.get_preds(), learn.show_results()
    assert learn.table().equals(table) and (tmp_path/'b.pth').stat().st_mtime_ns==when and sorted(n)==sorted(cb.name for cb in learn.cbs)
    assert learn.parts().equals(parts)

def test_one_term_needs_no_list(): assert len(learner(terms=CE).loss_func.terms)==1

def test_validate_equals_the_last_epochs_row():
    learn = learner(terms=[CE, Term(kd,'Student','Teacher',weight=SchedCos(0.,1.))], metrics=accuracy)
    learn.fit(2, 1e-2)
    assert list(learn.validate())==pytest.approx(learn.table().iloc[-1].tolist()[1:], rel=1e-5)

def test_show_results_tables_and_pictures():
    learn = learner()
    shown = learn.show_results(max_n=5, shuffle=False)
    assert isinstance(shown, pd.DataFrame) and list(shown)==['target','Teacher','Student'] and len(shown)==5
    assert shown.target.tolist()==data().tensors[1][:5].tolist()
    shown = learn.show_results(shuffle=False, decode=lambda o: [f'{v:.1f}' for v in o.max(1).values], decode_targets=lambda y: [f't{i}' for i in y.tolist()])
    assert shown.target[0].startswith('t') and '.' in shown.Student[0]
    import matplotlib.pyplot as plt
    pics = TensorDataset(data().tensors[0].view(-1,1,2,2), data().tensors[1])
    net = lambda: nn.Sequential(nn.Flatten(), *mlp())
    fig = learner(dict(Teacher=net(), Student=net()), dls=loaders(ds=pics)).show_results(max_n=3)
    assert len(fig.axes)>=3 and fig.axes[0].images and fig.axes[0].texts[0].get_text().startswith('target: ') and not plt.get_fignums()

def test_show_results_of_dicts_lengths_and_vocab():
    f = lambda o,x: dict(a=o)
    x,y = data().tensors
    dls = loaders(ds=TensorDataset(x, y, torch.ones(64)))
    dls.n_inp = 1
    learn = learner(dict(Teacher=Heads(f), Student=Heads(f)), [Term(lambda o,y,w: F.cross_entropy(o,y),'Student.a')], dls=dls)
    shown = learn.show_results(shuffle=False, decode=lambda o: o['a'].argmax(1).tolist(), decode_targets=lambda t: t[0].tolist())
    assert shown.target.tolist()==y[:9].tolist()

def test_two_inputs_and_two_targets():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
        def forward(self, a, b): return self.net(a+b)
    x,y = data().tensors
    dls = loaders(ds=TensorDataset(x, 2*x, y, torch.ones(64)))
    dls.n_inp = 2
    loss = lambda o,y,w: (F.cross_entropy(o, y, reduction='none')*w).mean()
    learn = learner(dict(Teacher=Two(), Student=Two()), [Term(loss,'Student',name='w'), KD, Term(lambda a,b,targets: (a-b).square().mean()*targets[1].mean(),'Student','Teacher',name='mse')], dls=dls)
    learn.fit(1, 1e-2)
    inp,preds,targs = learn.get_preds(with_input=True, dl=learn.dls.train)
    assert torch.equal(inp[1], 2*x) and torch.equal(targs[0], y) and len(targs)==2
    torch.testing.assert_close(preds['Student'], learn.model.eval()(x, 2*x)['Student'])

# ---- the parts of the loss

def test_parts_and_schedules():
    sched = combine_scheds([.5,.5], [SchedCos(0,1), SchedCos(1,.2)])
    used,losses = [],[]
    class Look(Callback):
        def after_loss(self):
            if self.training: losses.append((float(self.loss), {k: float(v) for k,v in self.loss_func.parts.items()}))
    def weight(p):
        used.append(p)
        return float(sched(p))
    learn = learner(terms=[CE, Term(lambda a,b: (a*0).mean()+1,'Student','Teacher',weight=weight,name='one'), Term(kd,'Student','Teacher',weight=-.5)], cbs=Look())
    used.clear()
    learn.fit(3, 1e-2)
    parts,n = learn.parts(),3*len(learn.dls.train)
    assert len(parts)==n and list(parts)==['cross_entropy_Student','one','kd_Student_Teacher']
    np.testing.assert_allclose(parts.one, [sched(i/n) for i in range(n)], atol=1e-6)
    np.testing.assert_allclose(parts.sum(1), [l for l,_ in losses], rtol=1e-5)
    np.testing.assert_allclose(parts.values, [list(p.values()) for _,p in losses], rtol=1e-6)
    ax = learn.plot_terms()
    assert [l.get_label() for l in ax.lines]==list(parts)
    learn.fit(1, 1e-2)
    assert len(learn.parts())==n/3

def test_the_recorder_asks_for_no_number_on_a_device(fake_cuda):
    "The recorder's part of a step on fake CUDA tensors, which raise when asked for a number"
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    learn = learner()
    rec = learn.term_recorder
    learn.training,rec.on,rec.steps,rec.where,rec.valid,rec.checked = True,True,[],[],[],0
    learn.epoch = learn.iter = 0
    with FakeTensorMode():
        rec.terms.parts = {t.name: torch.zeros((), device='cuda') for t in rec.terms.terms}
        for _ in range(rec.look_every-1): rec.after_loss()
        assert len(rec.steps)==rec.look_every-1 and rec.steps[0].device.type=='cuda'
        with pytest.raises(DataDependentOutputException): rec.check()
        learn.training = False
        rec.before_validate()
        for _ in range(3): rec.after_loss()

def test_a_whole_step_asks_for_no_number_on_a_device(fake_cuda):
    "fastai's own recorder and loop are part of a step"
    from torch._subclasses.fake_tensor import FakeTensorMode
    learn = learner()
    rec = learn.recorder
    with FakeTensorMode():
        learn.loss = torch.zeros((), device='cuda')
        learn.yb = (torch.zeros(16, device='cuda'),)
        rec.smooth_loss.reset()
        rec.smooth_loss.accumulate(learn)
        assert rec.smooth_loss.val.device.type=='cuda'

class TurnsNaN(nn.Module):
    def __init__(self, at, value=float('nan')):
        super().__init__()
        self.at,self.value,self.n = at,value,0
    def forward(self, o, y):
        self.n += o.requires_grad
        return F.cross_entropy(o, y)*(self.value if self.n>self.at else 1.)

@pytest.mark.parametrize('value,says', [(float('nan'), 'nan'), (float('inf'), 'inf')])
def test_nan_stops_with_term_and_step_and_leaves_the_weights(value, says):
    fn = TurnsNaN(6, value)
    weights = {}
    class Keep(Callback):
        def before_batch(self):
            if self.training: weights['before'] = [p.detach().clone() for p in self.model.parameters()]
    learn = learner(terms=[KD, Term(fn,'Student',name='bad')], cbs=Keep())
    with pytest.raises(NonFiniteLoss, match=rf"term 'bad' gave {says} at step 7 \(epoch 2 of 3, batch 3 of 4\)"): learn.fit(3, 1e-2)
    assert all(torch.equal(a, b) for a,b in zip(weights['before'], learn.model.parameters()))
    assert all(p.isfinite().all() for p in learn.model.parameters()) and len(learn.table())==1
    assert isinstance(NonFiniteLoss('x'), UserError)
    fn.at = 1000
    learn.fit(1, 1e-2)

def test_nan_names_the_right_epoch_after_a_start_in_the_middle():
    fn = TurnsNaN(2)
    learn = learner(terms=[KD, Term(fn,'Student',name='bad')])
    with pytest.raises(NonFiniteLoss, match='epoch 3 of 4, batch 3 of 4'): learn.fit(4, 1e-2, start_epoch=2)

def test_an_error_before_training_is_not_hidden():
    with pytest.raises(AssertionError, match='5 values'): learner().fit(1, [1,2,3,4,5])

# ---- mistakes

@pytest.mark.parametrize('kw,says', [(dict(terms=[Term(kd,'Student','Teachr')]), "did you mean 'Teacher'"), (dict(terms=[Term(kd,'Student.5','Teacher')]), 'Student.4'), (dict(frozen='teacher'), "'Teacher'"), (dict(frozen=['Teacher','Studen']), "'Student'"),
    (dict(monitor='Student_acc'), "'Student_accuracy'"), (dict(monitor='valid_los'), "'valid_loss'"), (dict(cbs=SaveModelCallback(monitor='student_accuracy')), "'Student_accuracy'"), (dict(cbs=[EarlyStoppingCallback(monitor='vlid_loss')]), "'valid_loss'"),
    (dict(metrics={'Studen': accuracy}), "'Student'"), (dict(metrics={'Student.44': accuracy}), "'Student.4'"), (dict(terms=[]), 'nothing to learn'), (dict(terms=[kd]), 'must be Term'), (dict(nets=dict(Student=F.relu)), 'not an nn.Module')])
def test_mistakes_fail_when_the_learner_is_made(kw, says):
    with pytest.raises(UserError, match=says): learner(**{'metrics': accuracy, **kw})

@pytest.mark.parametrize('kw', [dict(nets=[mlp()]), dict(terms=[Term(kd,'Teacher','Teacher')])], ids=['a list of nets', 'only frozen nets'])
def test_other_mistakes_fail_when_the_learner_is_made(kw):
    with pytest.raises(UserError): learner(**kw)

# ---- making a learner costs nothing

def test_training_is_what_fastai_alone_would_do():
    "distill_learner with one net equals a plain fastai Learner with the same seed: weights, batches, dropout and all"
    from fastai.basics import Learner
    def trained(make):
        set_seed(3)
        net = mlp()
        learn = make(loaders(), net)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
        return state(net),torch.get_rng_state(),np.random.get_state()[1].tolist(),random.getstate()
    a = trained(lambda dls,net: Learner(dls, net, F.cross_entropy, opt_func=partial(Adam, decouple_wd=True)))
    b = trained(lambda dls,net: distill_learner(dls, dict(N=net), [Term(F.cross_entropy,'N')]))
    assert torch.equal(a[1], b[1]) and a[2:]==b[2:]
    drop_bias_decay = [k for k in a[0] if not torch.allclose(a[0][k].float(), b[0][k].float(), atol=1e-6)]
    assert not drop_bias_decay

@pytest.mark.parametrize('kind', ('fastai', 'torch', pytest.param('torch with generator')))
def test_making_a_learner_leaves_no_trace(kind):
    g = torch.Generator().manual_seed(5)
    dls = loaders() if kind=='fastai' else DataLoaders(torch.utils.data.DataLoader(data(), batch_size=16, shuffle=True, generator=g if 'generator' in kind else None), DataLoader(data(), bs=24))
    nets = dict(Teacher=mlp(16), Student=mlp())
    before,gen = {n: state(v) for n,v in nets.items()},g.get_state()
    set_seed(0)
    rngs = torch.get_rng_state(),np.random.get_state()[1].tolist(),random.getstate(),dls.train.rng.getstate() if kind=='fastai' else None
    distill_learner(dls, nets, [CE, KD, Term(distance,'Student.2','Teacher.2')], frozen='Teacher', metrics=accuracy)
    assert torch.equal(rngs[0], torch.get_rng_state()) and rngs[1:3]==(np.random.get_state()[1].tolist(), random.getstate())
    assert kind!='fastai' or rngs[3]==dls.train.rng.getstate()
    assert all(same(before[n], state(v)) for n,v in nets.items()) and not nets['Teacher'].training and nets['Student'].training
    assert torch.equal(gen, g.get_state())

def test_training_twice_from_the_same_seed_is_the_same():
    def trained(twice):
        set_seed(0)
        dls,nets = loaders(),dict(Teacher=mlp(16), Student=mlp())
        rng = torch.get_rng_state()
        for _ in range(1+twice): learn = distill_learner(dls, nets, [CE, KD], frozen='Teacher')
        assert torch.equal(rng, torch.get_rng_state())
        learn.fit(1, 1e-2)
        return state(nets['Student'])
    assert same(trained(False), trained(True))

def test_projectors_start_otherwise_under_another_seed():
    def start(seed): return learner(terms=[Term(distance,'Student.2','Teacher.2',name='h')], seed=seed).model._modules['_projectors'].h.channels.weight.detach()
    assert torch.equal(start(0), start(0)) and not torch.equal(start(0), start(1))
