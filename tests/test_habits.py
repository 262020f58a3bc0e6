"What fastai's users bring: layers and rates, predictions of every kind, one network by itself, mixed pictures, batches and outputs of every form; numbers that were wrong in silence"
import copy, pickle, warnings
from collections import UserDict
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.basics import (Adam, CategoryMap, Callback, Categorize, DataLoader, DataLoaders, Datasets, Learner, Metric, OptimWrapper, Recorder, Transform, load_learner, params, set_seed)
from fastai.callback.all import CutMix, EarlyStoppingCallback, MixUp, SaveModelCallback, SchedCos
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.metrics import accuracy, accuracy_multi, exp_rmspe, mae, mse, rmse
from torch import nn
from torch.utils.data import TensorDataset

from distillbook.core import UserError
from distillbook.habits import kind_of
from distillbook.learner import distill_learner
from distillbook.losses import attention_transfer, cosine, cross_entropy, dist, distance, dkd, dml, dml_paddle, kd, kl_paddle, kljs
from distillbook.metrics import less_is_better
from distillbook.nets import Nets, Projector, look_up, mapped
from distillbook.terms import Term, Terms

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')
ADAMW = partial(OptimWrapper, opt=torch.optim.AdamW)
CE,KD = Term(F.cross_entropy, 'Student'),Term(kd, 'Student', 'Teacher')
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)

class Net(nn.Module):
    def __init__(self, h=6, out=3, drop=0.):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4,h), nn.BatchNorm1d(h), nn.ReLU(), nn.Dropout(drop))
        self.mid,self.head = nn.Linear(h,h),nn.Linear(h,out)
    def forward(self, x): return self.head(self.mid(self.body(x)))

class Points(TensorDataset): vocab = CategoryMap(['nine','one','two'])
def three(net): return [params(net.body), params(net.mid), params(net.head)]
def state(m): return {k: v.clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

def data(n=48):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    return x,(x[:,0]>0).long()+(x[:,1]>0).long()

def loaders(*tensors, bs=16, cls=Points):
    ds = cls(*(tensors or data()))
    return DataLoaders(DataLoader(ds, bs=bs, shuffle=True), DataLoader(ds, bs=24))

def quiet(learn):
    learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
    learn.logger = lambda *_: None
    return learn

def learner(terms=(CE, KD), dls=None, nets=None, frozen='Teacher', **kw):
    set_seed(0)
    nets = nets or dict(Teacher=Net(12), Student=Net())
    return quiet(distill_learner(dls or loaders(), nets, terms, frozen=frozen, **kw))

# ---- rates and freezing by layers

class Rates(Callback):
    def __init__(self): self.seen = []
    def before_step(self): self.seen.append([h['lr'] for h in self.opt.hypers])

@pytest.mark.parametrize('opt_func', (Adam, ADAMW))
@pytest.mark.parametrize('lr,want', [(slice(1e-4,1e-2), (1e-4,1e-3,1e-2)), (slice(1e-2), (1e-3,1e-3,1e-2)), ([1e-4,1e-3,1e-2], (1e-4,1e-3,1e-2)), (np.array([1.,2.,3.]), (1.,2.,3.))])
def test_a_slice_goes_over_layers_and_never_over_weights_and_biases(lr, want, opt_func):
    learn,rates = learner(splitter=three, opt_func=opt_func),Rates()
    learn.fit(1, lr, cbs=rates)
    assert [(n,d) for n,d,_ in learn.groups]==[('Student',True)]*3+[('Student',False)]*3
    assert rates.seen[0]==pytest.approx([*want, *want])
    learn.fit_one_cycle(1, lr, cbs=rates)
    assert rates.seen[-1]==pytest.approx([r/rates.seen[-1][2]*want[2]*rates.seen[-1][2]/want[2] for r in rates.seen[-1]]) and rates.seen[-1][2]>rates.seen[-1][0]>0
    assert rates.seen[-1][:3]==pytest.approx(rates.seen[-1][3:])

@pytest.mark.parametrize('fit', ('fit', 'fit_one_cycle', 'fit_flat_cos'))
def test_without_layers_a_slice_is_its_end_as_in_fastai(fit):
    def trained(lr):
        set_seed(0)
        learn = learner(frozen=(), nets=dict(Student=Net()), terms=CE)
        getattr(learn, fit)(2, lr)
        return state(learn.model)
    assert same(trained(slice(1e-5,1e-2)), trained(1e-2))

def test_rates_of_the_learner_itself_and_by_net():
    learn,rates = learner(lr=slice(1e-4,1e-2), splitter=three),Rates()
    learn.fit(1, cbs=rates)
    assert rates.seen[0]==pytest.approx([1e-4,1e-3,1e-2]*2)
    nets = dict(A=Net(), B=Net())
    learn = learner([Term(dml,'A','B'), Term(dml,'B','A')], nets=nets, frozen=(), splitter=dict(A=three))
    assert learn.lr_by_net(1e-3, A=slice(1e-4,1e-2))==pytest.approx([1e-4,1e-3,1e-2]*2+[1e-3]*2)
    with pytest.raises(UserError, match='slice'): learn.fit(1, slice(None))

def test_projectors_and_peers_beside_layers():
    learn,rates = learner([CE, Term(distance,'Student.mid','Teacher.mid')], splitter=three),Rates()
    learn.fit(1, slice(1e-4,1e-2), cbs=rates)
    by = {n: {lr for (m,*_),lr in zip(learn.groups, rates.seen[0]) if m==n} for n,*_ in learn.groups}
    assert sorted(by['Student'])==pytest.approx([1e-4,1e-3,1e-2]) and by['_projectors']=={1e-2}

def test_splitter_beside_groups_with_decays_of_their_own():
    groups = lambda nets: [('Student', .3, list(nets['Student'].parameters()))]
    learn = learner(groups=groups, splitter=three)
    learn.fit(1, slice(1e-4,1e-2), wd=.1)
    assert [(d,h['wd']) for (_,d,_),h in zip(learn.groups, learn.opt.hypers)]==[(.3,.3)]*3 and [i for i,_ in learn.depths]==[0,1,2]

@pytest.mark.parametrize('splitter,says', [(lambda n: [params(n.body), params(n.head)], 'mid.weight'), (lambda n: [params(n.body), *three(n)], 'two layer groups'), (lambda n: n.backbone, 'backbone.*called with one network'), (dict(Studnt=three), "'Student'")])
def test_splitters_that_lose_something_are_refused(splitter, says):
    with pytest.raises(UserError, match=says): learner(splitter=splitter)

@pytest.mark.parametrize('train_bn', (True, False))
def test_freeze_to_is_fastais(train_bn):
    learn = learner(splitter=three, train_bn=train_bn)
    net = learn.net('Student')
    learn.fit(1, 1e-2)
    learn.freeze()
    trains = [k for k,p in net.named_parameters() if p.requires_grad]
    assert trains==[*(['body.1.weight','body.1.bias'] if train_bn else []), 'head.weight','head.bias']
    before = state(net)
    learn.fit(1, 1e-2)
    moved = [k for k,v in before.items() if not torch.equal(v, net.state_dict()[k]) and 'running' not in k and 'num' not in k]
    assert moved==trains
    learn.freeze_to(1)
    assert net.mid.weight.requires_grad and not net.body[0].weight.requires_grad
    learn.freeze_to(-2)
    assert net.mid.weight.requires_grad and not net.body[0].weight.requires_grad
    learn.unfreeze()
    assert all(p.requires_grad for p in net.parameters()) and not any(p.requires_grad for p in learn.net('Teacher').parameters())

def test_layers_and_whole_networks_are_frozen_apart():
    learn = learner(splitter=three)
    learn.freeze()
    learn.freeze('Student')
    with pytest.raises(UserError, match='every net is frozen'): learn.fit(1)
    learn.unfreeze('Student')
    assert not learn.net('Student').mid.weight.requires_grad
    learn.unfreeze('Teacher')
    learn.unfreeze()
    assert learn.net('Student').mid.weight.requires_grad and {n for n,*_ in learn.groups}=={'Teacher','Student'} and {n for _,n in learn.depths}=={3}

def test_what_its_owner_froze_stays_frozen():
    net = Net()
    net.body[0].weight.requires_grad_(False)
    learn = learner(nets=dict(Teacher=Net(), Student=net), splitter=three)
    learn.freeze(), learn.unfreeze()
    assert not net.body[0].weight.requires_grad and net.body[0].bias.requires_grad

@pytest.mark.parametrize('opt_func', (partial(Adam, decouple_wd=True), ADAMW))
def test_fine_tune_gives_fastais_weights(opt_func):
    def tuned(make):
        set_seed(3)
        net,dls = Net(drop=.2),loaders()
        quiet(make(dls, net)).fine_tune(2, 1e-2, freeze_epochs=2)
        return state(net)
    a = tuned(lambda dls,net: Learner(dls, net, F.cross_entropy, opt_func=opt_func, splitter=three, wd=0.))
    b = tuned(lambda dls,net: distill_learner(dls, dict(N=net), Term(F.cross_entropy,'N'), opt_func=opt_func, splitter=three, wd=0.))
    for k in a: close(a[k], b[k])

@pytest.mark.parametrize('call', [lambda l: l.fine_tune(1), lambda l: l.freeze_to(1), lambda l: l.freeze(), lambda l: l.unfreeze()])
def test_without_a_splitter_there_are_no_layers(call):
    with pytest.raises(UserError, match='splitter='): call(learner())

# ---- the best epoch, and what it is measured by

class Scripted(Metric):
    name,vals = 'acc',[]
    def reset(self): pass
    def accumulate(self, learn): pass
    @property
    def value(self): return Scripted.vals.pop(0)

class Keep(Callback):
    def __init__(self): self.states = []
    def after_epoch(self): self.states.append(state(self.model))

@pytest.mark.parametrize('name,vals,best', [('acc', [.1,.5,.5,.4], 1), ('rmse', [3.,1.,2.,1.], 1), ('error_rate', [.3,.1,.2,float('nan')], 1), ('acc', [float('nan')]*4, None)])
def test_monitor_keeps_the_best_network_by_itself(name, vals, best, monkeypatch):
    monkeypatch.setattr(Scripted, 'name', name)
    Scripted.vals[:] = list(vals)
    keep = Keep()
    learn = learner(metrics={'Student': Scripted()}, monitor=f'Student_{name}', cbs=keep)
    learn.fit(4, 1e-2)
    assert same(state(learn.net('Student')), {k[8:]: v for k,v in keep.states[3 if best is None else best].items() if k.startswith('Student.')})
    assert learn.best is None if best is None else (learn.best.epoch,learn.best.value,learn.best.net)==(best,vals[best],'Student')

def test_the_best_of_all_by_valid_loss():
    keep = Keep()
    learn = learner([CE, Term(distance,'Student.mid','Teacher.mid')], monitor='valid_loss', cbs=keep)
    learn.fit(4, .5)
    best = learn.table().valid_loss.argmin()
    assert learn.best.epoch==best and same(state(learn.model), keep.states[best]) and any('_projectors' in k for k in learn.best.state) and not any(k.startswith('Teacher') for k in learn.best.state)
    learn.lr_find(num_it=5, show_plot=False)
    assert learn.best.epoch==best

def test_a_checkpoint_keeps_the_best_itself(tmp_path):
    from distillbook.checkpoint import Checkpoint
    Scripted.vals[:] = [.1,.5,.4]
    keep = Keep()
    learn = learner(metrics={'Student': Scripted()}, monitor='Student_acc', cbs=keep)
    learn.fit(3, 1e-2, cbs=Checkpoint(tmp_path))
    assert learn.best is None and same(state(learn.model), keep.states[-1])

def test_valid_loss_is_measured_with_the_weights_of_the_end():
    "A term that does not change, with a weight that falls: what was measured does not fall with it"
    one = Term(lambda a,y: 0*a.sum()+1, 'Student', weight=SchedCos(1.,.25), name='one')
    learn = learner([one])
    learn.fit(4, 1e-2)
    assert learn.table().valid_loss.tolist()==pytest.approx([.25]*4) and learn.validate()[0]==pytest.approx(.25) and learn.table().train_loss.iloc[0]>.9
    assert learn.term_recorder.valid==[dict(one=pytest.approx(.25))]*4
    assert learner([one]).validate()[0]==pytest.approx(.25)

def test_early_stopping_is_not_fooled_by_a_growing_weight():
    learn = learner([CE, Term(kd,'Student','Teacher',weight=SchedCos(0.,5.))], cbs=EarlyStoppingCallback(monitor='valid_loss', patience=2))
    learn.fit(5, 1e-3)
    assert len(learn.table())==5

@pytest.mark.parametrize('add', [lambda l,cb: l.add_cb(cb), lambda l,cb: l.add_cbs([Rates(), cb]), lambda l,cb: l.fit(1, cbs=[Rates(), cb]), lambda l,cb: l.fit_one_cycle(1, cbs=cb)])
def test_a_mistyped_monitor_names_the_near_and_adds_nothing(add):
    learn = learner(metrics=accuracy)
    names = [cb.name for cb in learn.cbs]
    with pytest.raises(UserError, match="no monitor 'Student_acuracy'; did you mean 'Student_accuracy'"): add(learn, SaveModelCallback(monitor='Student_acuracy'))
    assert [cb.name for cb in learn.cbs]==names

def test_columns_of_both_sets_may_be_watched():
    learn = learner(metrics=accuracy)
    learn.remove_cb(Recorder)
    learn.add_cb(Recorder(train_metrics=True))
    learn.fit(1, cbs=EarlyStoppingCallback(monitor='valid_Student_accuracy'))
    with pytest.raises(UserError, match='train_Student_accuracy'): learn.add_cb(EarlyStoppingCallback(monitor='train_Student_acc'))

def test_a_callback_that_takes_the_largest_error_for_the_best_is_warned_of():
    learn = learner([Term(F.mse_loss,'Student')], loaders(data()[0], data()[0][:,:3], cls=TensorDataset), metrics=rmse)
    with pytest.warns(UserWarning, match='comp=np.less'): learn.add_cb(SaveModelCallback(monitor='Student_rmse'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.add_cb(EarlyStoppingCallback(monitor='Student_rmse', comp=np.less))

def test_names_of_columns():
    dls = loaders(data()[0], data()[0][:,:3], cls=TensorDataset)
    assert [m.name for m in learner([Term(F.mse_loss,'Student')], dls, metrics={'Student': [rmse, exp_rmspe, mae]}).metrics]==['Student_rmse','Student_exp_rmspe','Student_mae']
    assert [c for c in ('A_acc','A_rmse','A_error_rate','valid_loss','A_norm_edit_dis','A_mae','A_hmean','A_perplexity') if less_is_better(c)]==['A_rmse','A_error_rate','valid_loss','A_mae','A_perplexity']

# ---- predictions

def test_predict_in_the_items_own_form():
    learn = learner()
    x,y = data()
    want = learn.model.eval()(x[:1])
    for item in (x[0], (x[0],), (x[0],y[0])):
        got = learn.predict(item)
        assert list(got)==['Teacher','Student']
        for n,(name,number,probs) in got.items():
            close(probs, want[n][0].softmax(-1))
            assert number==want[n][0].argmax() and name==Points.vocab[number]
    inp,got = learn.predict(x[0], with_input=True)
    assert torch.equal(inp[0], x[0])

@pytest.mark.parametrize('kind', ('torch', 'transforms'))
def test_predict_through_loaders_of_other_kinds(kind):
    x,y = data()
    if kind=='torch':
        ds = TensorDataset(x, y)
        dls = DataLoaders(torch.utils.data.DataLoader(ds, batch_size=16), torch.utils.data.DataLoader(ds, batch_size=16))
        item = x[5]
    else:
        items = list(range(48))
        dls = Datasets(items, [[lambda i: 2*data()[0][i]], [lambda i: 'abc'[y[i]], Categorize()]], splits=[items,items]).dataloaders(bs=16)
        item,x = 5,2*x
    learn = learner(dls=dls)
    name,number,probs = learn.predict(item)['Student']
    close(probs, learn.model.eval()(x[5:6])['Student'][0].softmax(-1))
    assert name==('abc'[number] if kind=='transforms' else number.item())

@pytest.mark.parametrize('kind', ('classes', 'values'))
def test_predict_of_a_row_of_a_table(kind):
    "It goes through what the table went through, with or without the column that is asked for; fastai's own answer is the same"
    from fastai.basics import CategoryBlock, RegressionBlock
    from fastai.tabular.core import Categorify, FillMissing, Normalize, TabularPandas
    from fastai.tabular.data import TabularDataLoaders
    from fastai.tabular.learner import TabularLearner
    from fastai.tabular.model import TabularModel, get_emb_sz
    g = np.random.default_rng(0)
    df = __import__('pandas').DataFrame(dict(colour=g.choice(['green','red'], 80), size=g.normal(size=80), weight=g.normal(size=80)))
    df.loc[3,'weight'] = float('nan')
    df['y'] = np.where(df.colour=='red', 'yes', 'no') if kind=='classes' else df['size'].astype('float32')
    table = TabularPandas(df, [Categorify, FillMissing, Normalize], ['colour'], ['size','weight'], 'y', CategoryBlock() if kind=='classes' else RegressionBlock(), splits=([*range(60)], [*range(60,80)]))
    net = lambda: TabularModel(get_emb_sz(table), 2, 2 if kind=='classes' else 1, [8])
    nets = dict(Teacher=net(), Student=net())
    learn = learner([Term(cross_entropy if kind=='classes' else F.mse_loss, 'Student'), Term(distance, 'Student', 'Teacher')], table.dataloaders(bs=20), nets)
    learn.fit(2, 1e-2)
    theirs = quiet(TabularLearner(table.dataloaders(bs=20), nets['Student'], CrossEntropyLossFlat() if kind=='classes' else MSELossFlat()))
    for i in (3, 70):
        with theirs.no_bar(): _,number,probs = theirs.predict(df.iloc[i].drop('y')) # fastai's fails on a number as target
        for row in (df.iloc[i], df.iloc[i].drop('y')):
            name,got,all_ = learn.predict(row)['Student']
            close(all_, probs)
            assert kind=='values' or (got==number and name==('no','yes')[number])

def test_get_preds_in_fastais_order(tmp_path):
    learn = learner([CE, KD, Term(distance,'Student.mid','Teacher.mid',weight=SchedCos(1.,.5))], metrics=accuracy)
    learn.fit(1, 1e-2)
    x,y = data()
    for dl in (None, learn.dls.train):
        inp,preds,targs,decoded,losses = learn.get_preds(dl=dl, with_input=True, with_decoded=True, with_loss=True)
        assert torch.equal(inp, x) and torch.equal(targs, y) and torch.equal(decoded['Teacher'], preds['Teacher'].argmax(-1)) and list(losses)==['Student']
    out = learn.model.eval()(x)
    taps = learn.model.taps
    with torch.no_grad(): hint = (learn.model.project('distance_Student_Teacher', taps['Student.mid'], taps['Teacher.mid'])-taps['Teacher.mid']).square().mean(1)
    close(losses['Student'], F.cross_entropy(out['Student'], y, reduction='none') + 16*F.kl_div((out['Student']/4).log_softmax(-1), (out['Teacher']/4).softmax(-1), reduction='none').sum(1) + .5*hint)
    assert losses['Student'].mean().item()==pytest.approx(learn.validate()[0], rel=1e-4)
    probs,_ = learn.get_preds(act=partial(torch.softmax, dim=-1))
    close(probs['Student'], out['Student'].softmax(-1))
    res = learn.get_preds(save_preds=tmp_path/'p', save_targs=tmp_path/'t', with_preds=False)
    assert res[0] is None and torch.equal(res[1], y)
    close(torch.cat([torch.load(tmp_path/'p'/str(i))['Student'] for i in range(2)]), out['Student'])
    assert torch.equal(torch.cat([torch.load(tmp_path/'t'/str(i)) for i in range(2)]), y)
    with pytest.raises(UserError, match='no targets'): learn.get_preds(dl=DataLoader(TensorDataset(x), bs=8), with_loss=True)

KINDS = dict(classes=(F.cross_entropy, data()[1], 3, lambda o,y: [Points.vocab[i] for i in o.argmax(1)], lambda y: [Points.vocab[i] for i in y]),
    column=(cross_entropy, data()[1][:,None], 3, lambda o,y: [Points.vocab[i] for i in o.argmax(1)], lambda y: [Points.vocab[i] for i in y[:,0]]),
    labels=(F.binary_cross_entropy_with_logits, (data()[0][:,:3]>0).float(), 3, lambda o,y: [';'.join(Points.vocab[i] for i in range(3) if r[i]>0) for r in o], lambda y: [';'.join(Points.vocab[i] for i in range(3) if r[i]) for r in y]),
    flat_labels=(BCEWithLogitsLossFlat(), (data()[0][:,:3]>0).float(), 3, lambda o,y: [';'.join(Points.vocab[i] for i in range(3) if r[i]>0) for r in o], lambda y: [';'.join(Points.vocab[i] for i in range(3) if r[i]) for r in y]),
    one_label=(F.binary_cross_entropy_with_logits, (data()[0][:,:1]>0).float(), 1, lambda o,y: [int(v>0) for v in o[:,0]], lambda y: y[:,0].int().tolist()),
    values=(F.mse_loss, data()[0][:,:3], 3, lambda o,y: [[float(f'{v:.4g}') for v in r] for r in o], lambda y: [[float(f'{v:.4g}') for v in r] for r in y]),
    one_value=(MSELossFlat(), data()[0][:,:1], 1, lambda o,y: [float(f'{v:.4g}') for v in o[:,0]], lambda y: [float(f'{v:.4g}') for v in y[:,0]]))
@pytest.mark.parametrize('loss,y,out,says,right', KINDS.values(), ids=KINDS)
def test_show_results_and_predict_of_each_kind(loss, y, out, says, right):
    x = data()[0]
    learn = learner([Term(loss,'Student')], loaders(x, y), dict(Teacher=Net(out=out), Student=Net(out=out)))
    shown = learn.show_results(shuffle=False, max_n=5)
    outs = learn.model.eval()(x)
    assert shown.target.tolist()==right(y)[:5] and all(shown[n].tolist()==says(outs[n], y)[:5] for n in ('Teacher','Student'))
    assert learn.predict(x[2])['Student'][0]==shown.Student[2]
    learn.fit(1), learn.get_preds(with_decoded=True)

def test_mistakes_in_red_only_where_there_can_be_some():
    pics = data()[0].view(-1,1,2,2)
    flat = lambda: nn.Sequential(nn.Flatten(), *Net(out=1).body, nn.Linear(6,1))
    fig = learner([Term(F.mse_loss,'Student')], loaders(pics, data()[0][:,:1]), dict(Teacher=flat(), Student=flat())).show_results(max_n=2)
    assert {t.get_color() for ax in fig.axes for t in ax.texts}=={'black'}

def test_outputs_that_are_probabilities_already():
    x = data()[0]
    net = lambda: nn.Sequential(Net(out=2), nn.Sigmoid())
    learn = learner([Term(F.binary_cross_entropy,'Student')], loaders(x, (x[:,:2]>0).float(), cls=TensorDataset), dict(Teacher=net(), Student=net()))
    _,on,probs = learn.predict(x[0])['Student']
    close(probs, learn.model.eval()(x[:1])['Student'][0])
    assert torch.equal(on, probs>.5)

# ---- one network by itself

def test_interpretation_of_one_network():
    learn = learner(metrics=accuracy)
    learn.fit(1, 1e-2)
    x,y = data()
    for n in ('Student','Teacher'):
        out = learn.model.eval()(x)[n]
        interp = ClassificationInterpretation.from_learner(learn.of(n))
        cm = interp.confusion_matrix()
        assert cm.sum()==48 and cm.diagonal().sum()==(out.argmax(1)==y).sum()
        losses,idx = interp.top_losses(3)
        close(losses, F.cross_entropy(out, y, reduction='none').topk(3).values)
        assert interp.most_confused() or cm.diagonal().sum()==48
        assert learn.of(n).validate()[1]==pytest.approx(accuracy(out, y).item())
    for cls in (Interpretation, ClassificationInterpretation):
        with pytest.raises(UserError, match=r"learn.of\('Student'\)"): cls.from_learner(learn)
    with pytest.raises(UserError, match=r"learn.of\('Student'\)"): learn.tta()
    with pytest.raises(UserError, match="'Student'"): learn.of('Studnt')

def test_one_networks_loss_is_its_own_terms_at_the_end():
    learn = learner([Term(F.cross_entropy,'Student',weight=SchedCos(1.,.5)), KD, Term(partial(F.cross_entropy, label_smoothing=.1),'Student',name='smooth')])
    x,y = data()
    out = learn.model.eval()(x)['Student']
    loss = learn.of('Student').validate()[0]
    assert loss==pytest.approx((.5*F.cross_entropy(out, y)+F.cross_entropy(out, y, label_smoothing=.1)).item(), rel=1e-4)

@pytest.mark.parametrize('kind', ('tensors', 'torch', 'transforms'))
@pytest.mark.parametrize('net', ('Student', 'Teacher'))
def test_export_and_load_a_network(net, kind, tmp_path):
    x,y = data()
    dls = loaders()
    if kind=='torch': dls = DataLoaders(*[torch.utils.data.DataLoader(TensorDataset(x, y), batch_size=16)]*2)
    if kind=='transforms': dls = Datasets(list(range(48)), [[Double()], [First(), Categorize()]], splits=[range(48)]*2).dataloaders(bs=16)
    learn = learner(dls=dls, path=tmp_path, monitor='valid_loss')
    learn.fit(1, 1e-2)
    learn.export('one.pkl', net=net)
    assert learn.net('Teacher').body[0].weight.requires_grad is False and learn.dls is dls
    loaded = quiet(load_learner(tmp_path/'one.pkl'))
    xs = torch.stack([Double()(i) for i in range(5)]) if kind=='transforms' else x[:5]
    want = learn.model.eval()(xs)[net]
    close(loaded.model(xs), want)
    if kind=='transforms':
        name,number,probs = loaded.predict(0)
        assert name=='abc'[number] and torch.allclose(probs, want[0].softmax(-1), atol=1e-5)
    learn.fit(1, 1e-2)
    with pytest.raises(UserError, match='net='): learn.export()

class Double(Transform):
    def encodes(self, i:int): return torch.arange(4.)+i/10
class First(Transform):
    def encodes(self, i:int): return 'abc'[i%3]

# ---- MixUp, CutMix, label smoothing

def lf_by_hand(mix, term, outs, yb):
    "What fastai's MixHandler means, item by item"
    each = lambda y: torch.stack([term(*[o[i:i+1] for o in outs], targets=(y[i:i+1],)) for i in range(len(y))])
    return torch.lerp(each(mix.yb1[0]), each(yb[0]), mix.lam).mean()

@pytest.mark.parametrize('mix', (MixUp, CutMix))
def test_mixing_is_item_by_item_and_the_parts_sum_to_the_loss(mix):
    pics = torch.randn(48,1,4,4)
    net = lambda h: nn.Sequential(nn.Flatten(), nn.Linear(16,h), nn.ReLU(), nn.Linear(h,3))
    terms = [CE, Term(dkd,'Student','Teacher',weight=.1), KD, Term(lambda o,y: F.cross_entropy(o, y)**2,'Student',name='square')]
    seen = []
    class Look(Callback):
        order = 45
        def after_loss(self):
            if not self.training: return
            parts,cb = self.learn.term_recorder.steps[-1],getattr(self.learn, 'mix_up' if mix is MixUp else 'cut_mix')
            seen.append((self.loss.item(), parts.sum().item(), parts[[0,3]].tolist(), [lf_by_hand(cb, terms[i], [self.pred['Student']], self.yb).item() for i in (0,3)]))
            assert 'Teacher' in self.pred and len(self.learn.xb)==1
    learn = learner(terms, loaders(pics, data()[1]), dict(Teacher=net(12), Student=net(6)), cbs=[mix(), Look()], metrics=accuracy)
    learn.fit(2, 1e-2)
    assert len(seen)==6
    for loss,parts,got,want in seen:
        assert loss==pytest.approx(parts, rel=1e-4) and got==pytest.approx(want, rel=1e-4)
    assert isinstance(learn.loss_func, Terms) and learn.loss_func.reduction=='mean'
    assert learn.table().valid_loss.iloc[-1]==pytest.approx(learn.validate()[0], rel=1e-4)

def test_mixup_with_one_network_is_fastais():
    def trained(make):
        set_seed(5)
        net = nn.Sequential(*Net().body, nn.Linear(6,3))
        learn = quiet(make(loaders(), net, cbs=MixUp(), opt_func=partial(Adam, decouple_wd=True), wd=0.))
        learn.fit(2, 1e-2)
        return state(net)
    a = trained(lambda dls,net,**kw: Learner(dls, net, CrossEntropyLossFlat(), **kw))
    b = trained(lambda dls,net,**kw: distill_learner(dls, dict(N=net), Term(F.cross_entropy,'N'), **kw))
    for k in a: close(a[k], b[k])

def test_mixup_of_values_mixes_the_values():
    x = data()[0]
    learn = learner([Term(F.mse_loss,'Student')], loaders(x, x[:,:3]), cbs=MixUp())
    learn.fit(1, 1e-2)

def test_mixing_a_dictionary_is_refused():
    nets = lambda: dict(Teacher=Tokens(8), Student=Tokens())
    learn = learner([Term(cross_entropy,'Student.logits')], word_loaders(), nets())
    with pytest.raises(UserError, match='CutMix mixes one input and one target, and a batch here is a dictionary'): learn.fit(1, cbs=CutMix())
    with pytest.raises(UserError, match='is a dictionary'): learner([Term(cross_entropy,'Student.logits')], word_loaders(), nets(), cbs=MixUp())

def test_mixing_what_cannot_be_mixed_is_refused():
    x,y = data()
    dls = loaders(x, y, y)
    dls.n_inp = 1
    with pytest.raises(UserError, match='MixUp mixes one input and one target.* 1 and 2'): learner([Term(F.cross_entropy,'Student',targets=[0])], dls, cbs=MixUp())

@pytest.mark.parametrize('loss', (LabelSmoothingCrossEntropy(), LabelSmoothingCrossEntropyFlat(), partial(F.cross_entropy, label_smoothing=.1), nn.CrossEntropyLoss(label_smoothing=.1), partial(cross_entropy, label_smoothing=.1)), ids=lambda f: getattr(f, '__name__', type(f).__name__))
def test_label_smoothing(loss):
    learn = learner([Term(loss,'Student',name='smooth')], cbs=MixUp())
    x,y = data()
    out = learn.model.eval()(x)['Student']
    close(learn.loss_func(learn.model(x), y), F.cross_entropy(out, y, label_smoothing=.1))
    assert type(learn.loss_func(learn.model(x), y)) is torch.Tensor
    learn.fit(1, 1e-2)

# ---- outputs and batches of every form

@dataclass
class Out: logits:torch.Tensor; states:tuple=(); loss:object=None
@dataclass(frozen=True)
class Still: logits:torch.Tensor; name:str='still'
@dataclass(slots=True)
class Slots: logits:torch.Tensor
class Attributes:
    def __init__(self, o): self._o,self.logits = o,o
    @property
    def scores(self): return self.logits
class ModelOutput(dict):
    "As Hugging Face's: a dictionary whose keys are attributes too"
    __getattr__ = dict.__getitem__
FORMS = dict(dataclass=(lambda o: Out(o, (o,)), 'logits'), frozen=(Still, 'logits'), slots=(Slots, 'logits'), attributes=(Attributes, 'logits'), property=(Attributes, 'scores'), namespace=(lambda o: SimpleNamespace(logits=o), 'logits'),
             inside=(lambda o: Out(None, (o, dict(a=Out(o)))), 'states.1.a.logits'), mapping=(lambda o: ModelOutput(logits=o), 'logits'), user=(lambda o: UserDict(logits=o), 'logits'))

class Returns(nn.Module):
    def __init__(self, f, **kw):
        super().__init__()
        self.net,self.f = Net(**kw),f
    def forward(self, x): return self.f(self.net(x))

@pytest.mark.parametrize('f,path', FORMS.values(), ids=FORMS)
def test_outputs_of_every_form(f, path, monkeypatch):
    s,t = f'Student.{path}',f'Teacher.{path}'
    nets = dict(Teacher=Returns(f), Student=Returns(f))
    learn = learner([Term(F.cross_entropy,s), Term(kd,s,t)], nets=nets, metrics={s: accuracy}, monitor='Student_accuracy')
    learn.fit(1, 1e-2), learn.validate()
    x,y = data()
    want = nets['Student'].net(x)
    preds,targs,decoded = learn.get_preds(dl=learn.dls.train, with_decoded=True)
    close(look_up(preds, s), want)
    assert torch.equal(decoded['Student'], want.argmax(1)) and isinstance(preds['Student'], type(nets['Student'](x)))
    assert learn.predict(x[0])['Student'][1]==want[0].argmax() and list(learn.show_results())==['target','Teacher','Student']
    assert Interpretation.from_learner(learn.of('Student')).top_losses(2)[0].shape==(2,)
    if path!='scores':
        with pytest.raises(UserError, match=f"did you mean.*'Student.{path}'"): learner([Term(F.cross_entropy, s[:-1])], nets=nets)
    monkeypatch.setattr('distillbook.learner.has_bf16', lambda: True)
    if not torch.cuda.is_available(): learn.to_bf16().fit(1, 1e-2)

def test_a_teacher_in_bfloat16_of_any_form():
    nets = Nets(dict(T=Returns(Out)), ['T'], bf16=['T'])
    out = nets(data()[0])['T']
    assert isinstance(out, Out) and out.logits.dtype==torch.float32

def test_what_a_tapped_module_returns_is_addressed_further():
    class Layer(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(4,4)
        def forward(self, x): return self.lin(x),dict(kept=2*self.lin(x))
    class Deep(nn.Module):
        def __init__(self): super().__init__(); self.layers,self.head = nn.ModuleList([Layer(), Layer()]),nn.Linear(4,3)
        def forward(self, x):
            for l in self.layers: x,_ = l(x)
            return self.head(x)
    nets = dict(Teacher=Deep(), Student=Deep())
    learn = learner([CE, Term(distance,'Student.layers.1.0','Teacher.layers.0.1.kept',name='hint')], nets=nets)
    learn.fit(1, 1e-2)
    out = learn.model.eval()(data()[0])
    close(learn.model.find('Teacher.layers.0.1.kept', out), 2*nets['Teacher'].layers[0].lin(data()[0]))
    with pytest.raises(UserError, match=r"did you mean 'Teacher.layers.0.1.kept'"): learner([Term(distance,'Student.layers.1.0','Teacher.layers.0.1.kep')], nets=nets)

class Tokens(nn.Module):
    def __init__(self, d=6, out=3): super().__init__(); self.emb,self.head = nn.Embedding(12,d),nn.Linear(d,out)
    def forward(self, input_ids, attention_mask=None): return Out(self.head(self.emb(input_ids)))
class TokensOfTwo(Tokens):
    def forward(self, input_ids, attention_mask, token_type_ids, labels=None):
        assert labels is None and token_type_ids.shape==input_ids.shape
        return super().forward(input_ids)
class TokensOfAll(Tokens):
    def forward(self, input_ids, **kwargs):
        assert 'attention_mask' in kwargs and 'labels' not in kwargs
        return super().forward(input_ids)
class TokensOfDict(Tokens):
    def forward(self, batch): return super().forward(batch['input_ids'])

def words(n=24, T=6):
    ids = torch.randint(1, 12, (n,T), generator=torch.Generator().manual_seed(0))
    ids[:,4:] = 0
    return [dict(input_ids=i, token_type_ids=0*i, attention_mask=(i>0).long(), labels=torch.where(i>0, i%3, -100)) for i in ids]

def word_loaders(kind='torch'):
    if kind=='fastai': return DataLoaders(DataLoader(words(), bs=8, shuffle=True), DataLoader(words(), bs=8))
    collate = torch.utils.data.default_collate
    if kind=='user': collate = lambda b: UserDict(torch.utils.data.default_collate(b))
    return DataLoaders(*[torch.utils.data.DataLoader(words(), batch_size=8, collate_fn=collate) for _ in range(2)])

@pytest.mark.parametrize('kind', ('torch', 'fastai', 'user'))
@pytest.mark.parametrize('teacher', (Tokens, TokensOfTwo, TokensOfAll, TokensOfDict))
def test_a_batch_that_is_one_dictionary(teacher, kind):
    terms = [Term(cross_entropy,'Student.logits'), Term(kd,'Student.logits','Teacher.logits',mask='batch.attention_mask'), Term(partial(kd, ignore_index=-100),'Student.logits','Teacher.logits',mask='batch.labels')]
    learn = learner(terms, word_loaders(kind), dict(Teacher=teacher(8), Student=Tokens()), metrics={'Student.logits': lambda o,y: accuracy(o, y)})
    learn.fit(1, 1e-2)
    learn.validate()
    batch = torch.utils.data.default_collate(words())
    out = learn.model.eval()(batch)
    learn.loss_func(out, batch['labels'])
    got,there = learn.loss_func.parts,batch['labels']>=0
    s,t = [out[n].logits[there] for n in ('Student','Teacher')]
    close(got['cross_entropy_Student'], F.cross_entropy(s, batch['labels'][there]).detach())
    close(got['kd_Student_Teacher'], kd(s, t).detach())
    close(got['kd_Student_Teacher_1'], kd(s, t).detach())
    inp,preds,targs,losses = learn.get_preds(with_input=True, with_loss=True)
    assert torch.equal(targs, batch['labels']) and torch.equal(inp['input_ids'], batch['input_ids']) and losses['Student'].shape==(24,)
    assert torch.equal(learn.predict(words()[3])['Student'][1], out['Student'].logits[3].argmax(-1))
    learn.show_results()

def test_a_batch_without_targets_says_so_where_they_are_wanted():
    x = data()[0]
    dls = DataLoaders(*[torch.utils.data.DataLoader([dict(input_ids=w['input_ids']) for w in words()], batch_size=8)]*2)
    with pytest.raises(UserError, match='no targets'): learner([Term(cross_entropy,'Student.logits')], dls, dict(Teacher=Tokens(), Student=Tokens()))

@pytest.mark.parametrize('kind', ('tuple', 'tensor', 'dict'))
def test_data_without_labels_are_enough_for_a_teacher(kind):
    x = data()[0]
    ds = dict(tuple=TensorDataset(x), tensor=x, dict=[dict(x=o) for o in x])[kind]
    learn = learner([KD], DataLoaders(*[torch.utils.data.DataLoader(ds, batch_size=16)]*2), monitor='valid_loss')
    before = state(learn.net('Student'))
    learn.fit(3, 1e-2)
    assert not same(before, state(learn.net('Student'))) and learn.table().valid_loss.notna().all() and len(learn.parts())==9
    preds,targs,losses = learn.get_preds(with_loss=True)
    assert targs is None and losses['Student'].mean().item()==pytest.approx(learn.validate()[0], rel=1e-4) and preds['Student'].shape==(48,3)
    learn.show_results(), learn.predict(dict(x=x[0]) if kind=='dict' else x[0])

@pytest.mark.parametrize('f', (kd, dml, dist, cosine, distance, partial(distance, mode='l1'), partial(dml, symmetric=True)), ids=['kd','dml','dist','cosine','distance','l1','symmetric'])
def test_masking_is_leaving_out(f):
    g = torch.Generator().manual_seed(1)
    s,t = [torch.randn(3,5,4, generator=g, dtype=torch.double) for _ in range(2)]
    labels = torch.randint(4, (3,5), generator=g)
    labels[:,3:] = -100
    there = labels>=0
    want = f(s[there], t[there])
    bad = torch.where(there[...,None], s, float('nan'))
    for a in (s, bad):
        a = a.clone().requires_grad_()
        for loss in (f(a, t, mask=there), f(a, t, mask=there.long()), f(a, t, mask=there.float()), f(a, t, mask=there[...,None]), f(a, t, mask=labels, ignore_index=-100)):
            torch.testing.assert_close(loss, want)
        loss.backward()
        assert a.grad[there].isfinite().all() and (a.grad[~there]==0).all() or f in (cosine, distance) or isinstance(f, partial)
    assert f(s, t, mask=torch.zeros(3,5))==0
    for m,says in ((torch.ones(3,4), 'wants a mask for each position'), (labels, 'neither|0 or 1')):
        with pytest.raises(UserError, match=says): f(s, t, mask=m)
    with pytest.raises(UserError, match='give the labels'): f(s, t, ignore_index=-100)

@pytest.mark.parametrize('f', (kl_paddle, lambda a,b,**kw: kljs(a.sigmoid(), b.sigmoid(), **kw), lambda a,b,**kw: kljs(a.sigmoid(), b.sigmoid(), 'js', **kw), partial(dml_paddle, act='sigmoid', use_log=False), partial(dml_paddle, use_log=False)), ids=['kl_paddle','kl','js','sigmoid','softmax'])
def test_masking_is_leaving_out_in_paddleocrs_forms(f):
    "Means over what counts; numbers that are none stand in the padding"
    g = torch.Generator().manual_seed(1)
    s,t = [torch.randn(3,5,4, generator=g, dtype=torch.double) for _ in range(2)]
    there = torch.arange(5)<torch.tensor([[5],[3],[2]])
    labels = torch.where(there, 1, -100)
    bad = torch.where(there[...,None], s, float('nan')).requires_grad_()
    want = f(s[there][None], t[there][None], **(dict(mask=torch.ones(1,10)) if f is kl_paddle else {}))
    for loss in (f(bad, t, mask=there), f(bad, t, mask=there.float()), f(bad, t, mask=labels, ignore_index=-100)): torch.testing.assert_close(loss, want)
    loss.backward()
    assert bad.grad[there].isfinite().all() and bad.grad[there].abs().sum()>0
    assert f(s, t, mask=torch.zeros(3,5))==0
    for m,says in ((torch.ones(3,4), 'wants a mask for each position'), (labels, '0 or 1')):
        with pytest.raises(UserError, match=says): f(s, t, mask=m)

def test_a_sum_is_divided_by_the_batch_whatever_the_mask():
    s,t = torch.randn(2,3,6,4, dtype=torch.double)
    there = torch.arange(6).expand(3,6)<4
    torch.testing.assert_close(dml_paddle(s, t, mask=there), dml_paddle(s[:,:4], t[:,:4]))
    torch.testing.assert_close(dml_paddle(s, t, mask=torch.ones(3,6)), dml_paddle(s, t))
    maps = [o.sigmoid() for o in (s, t)]
    pixels = torch.rand(3,6,4)<.5
    torch.testing.assert_close(kljs(*maps, reduction='sum', mask=pixels), kljs(*maps, reduction='none')[pixels].sum()/3)
    assert (kljs(*maps, reduction='none', mask=pixels)[~pixels]==0).all()
    torch.testing.assert_close(kljs(*maps, mask=pixels), kljs(*maps, reduction='none')[pixels].mean())

@pytest.mark.parametrize('size', ((6,8), (12,16), (3,4)))
def test_attention_without_the_padding(size):
    "Whatever stands in the padding, at whatever size the mask comes; channels and sizes of the features differ"
    g = torch.Generator().manual_seed(2)
    a,b = torch.randn(2,5,6,8, generator=g, dtype=torch.double),torch.randn(2,3,3,4, generator=g, dtype=torch.double)
    h,w = size
    mask = (torch.arange(w)<w//2).expand(2,h,w)
    want = attention_transfer(a[...,:4], b[...,:2])
    x = a.clone()
    x[...,4:] = float('nan')
    x.requires_grad_()
    for m in (mask, mask.float(), mask[:,None].long()): torch.testing.assert_close(attention_transfer(x, b, mask=m), want)
    torch.testing.assert_close(attention_transfer(x, b, mask=torch.where(mask, 7, -1), ignore_index=-1), want)
    attention_transfer(x, b, mask=mask).backward()
    assert x.grad.isfinite().all() and (x.grad[...,4:]==0).all()
    one = torch.stack([mask[0], torch.zeros(h, w, dtype=torch.bool)])
    torch.testing.assert_close(attention_transfer(x, b, mask=one), attention_transfer(a[:1,:,:,:4], b[:1,:,:,:2])) # A picture of which nothing counts is not in the mean
    for m in (torch.ones(3,h,w), torch.ones(h,w), torch.full((2,h,w), 5)):
        with pytest.raises(UserError, match='attention_transfer'): attention_transfer(a, b, mask=m)

def test_where_a_detectors_labels_do_not_count():
    from distillbook.det.losses import dkd_maps, dml_maps
    a,b = torch.rand(2,2,3,8,8, dtype=torch.double)
    there = torch.rand(2,8,8)<.5
    p,q = a[:,0],b[:,0]
    torch.testing.assert_close(dml_maps(a, b, mask=there.float()), kljs(p[there][None], q[there][None]))
    kl = q*(q/p).log() + (1-q)*((1-q)/(1-p)).log()
    torch.testing.assert_close(dkd_maps(a, b, mask=there.float()), kl[there].mean())

def test_dkd_and_cross_entropy_of_tables_and_tokens():
    s,t = torch.randn(6,4),torch.randn(6,4)
    y = torch.tensor([0,1,2,3,0,1])
    close(dkd(s, t, y[:,None]), dkd(s, t, y))
    close(cross_entropy(s, y[:,None]), F.cross_entropy(s, y))
    holes = torch.where(torch.arange(6)>3, -100, y)
    close(dkd(s, t, holes), dkd(s[:4], t[:4], y[:4]))
    close(dkd(s.view(2,3,4), t.view(2,3,4), holes.view(2,3)), dkd(s[:4], t[:4], y[:4]))
    close(dkd(s, t, torch.where(holes<0, 7, holes), ignore_index=7), dkd(s[:4], t[:4], y[:4]))
    close(cross_entropy(s.view(2,3,4), holes.view(2,3)), F.cross_entropy(s[:4], y[:4]))
    assert cross_entropy(s, torch.full((6,), -100))==0 and dkd(s, t, torch.full((6,), -100))==0

@pytest.mark.parametrize('f', (kd, dml, dist, lambda s,t,**kw: dkd(s, t, torch.zeros(s.shape[0],*s.shape[2:], dtype=torch.long) if kw.get('dim')==1 or s.ndim==2 and 0 else torch.zeros(s.shape[:-1], dtype=torch.long), **kw)), ids=['kd','dml','dist','dkd'])
def test_pictures_say_where_their_classes_are(f):
    "[N,C,H,W] was a softmax over the width"
    s,t = [torch.randn(2,5,3,4, dtype=torch.double) for _ in range(2)]
    rows = [o.movedim(1,-1).reshape(-1,5) for o in (s, t)]
    with pytest.raises(UserError, match=r'which axis of \[2, 5, 3, 4\]'): f(s, t)
    torch.testing.assert_close(f(s, t, dim=1), f(*rows))
    torch.testing.assert_close(f(s.movedim(1,-1), t.movedim(1,-1), dim=-1), f(*rows))
    with pytest.raises(UserError, match='no axis 4'): f(s, t, dim=4)
    torch.testing.assert_close(f(s.flatten(2), t.flatten(2), dim=1), f(*rows))

def test_a_segmenting_network_is_asked_when_the_learner_is_made():
    pics,y = torch.randn(16,1,4,6),torch.randint(3, (16,4,6))
    dls,nets = loaders(pics, y, bs=8, cls=TensorDataset),lambda: dict(Teacher=nn.Conv2d(1,3,1), Student=nn.Conv2d(1,3,1))
    with pytest.raises(UserError, match='dim=1'): learner(dls=dls, nets=nets())
    learn = learner([CE, Term(partial(kd, dim=1),'Student','Teacher')], dls, nets())
    learn.fit(1)
    assert learn.answers['Student'].axis==1 and learn.get_preds(with_decoded=True)[2]['Student'].shape==(16,4,6)

def test_pytorchs_refusals_name_what_helps():
    x,y = data()
    for dls,nets in ((loaders(x, y[:,None]), None), (word_loaders(), dict(Teacher=Tokens(), Student=Tokens()))):
        path = '.logits' if nets else ''
        with pytest.raises(UserError, match='distillbook.losses.cross_entropy takes'): learner([Term(F.cross_entropy,f'Student{path}')], dls, nets)

# ---- terms on the batch, and of three

def test_a_term_on_anything_of_the_batch():
    x,y = data()
    dls = loaders(x, y, torch.arange(48.))
    dls.n_inp = 1
    seen = {}
    def on_input(out, x): seen['x'] = x; return (out.mean(1)-x.mean(1)).square().mean()
    def on_third(a, b, c, y): return (a-b).square().mean()+0*c.sum()+y.float().mean()
    learn = learner([Term(on_input,'Student','batch.0'), Term(F.cross_entropy,'Student',targets=[0]), Term(on_third,'Student','Teacher','batch.2',y='batch.1',name='third')], dls)
    learn.fit(1, 1e-2)
    out = learn.model.eval()(x)
    learn.loss_func(out, y, torch.arange(48.))
    close(learn.loss_func.parts['on_input_Student_batch'], on_input(out['Student'], x).detach())
    close(learn.loss_func.parts['third'], (out['Student']-out['Teacher']).square().mean().detach()+y.float().mean())
    assert '_projectors' not in learn.model._modules
    with pytest.raises(UserError, match=r"no part of the batch 'batch.3'.*batch"): learner([Term(on_input,'Student','batch.3')], dls)
    assert len(learn.parts())==3

def test_a_network_called_batch_is_a_network():
    learn = learner([Term(F.cross_entropy,'Student'), Term(kd,'Student','batch')], nets=dict(batch=Net(), Student=Net()), frozen='batch')
    learn.fit(1)
    assert not learn.model.keeps_batch

def test_terms_of_three_addresses_get_them_as_they_are():
    "A projector between logits and features was a guess, and a wrong one"
    shapes = []
    def three_way(logits, mine, other): shapes.append([tuple(o.shape[1:]) for o in (logits, mine, other)]); return mine.mean()+logits.mean()+other.mean()
    learn = learner([CE, Term(three_way,'Student','Student.mid','Teacher.mid')])
    learn.fit(1)
    assert set(map(str, shapes))=={'[(3,), (6,), (12,)]'} and '_projectors' not in learn.model._modules
    with pytest.raises(UserError, match='fails on a batch'): learner([Term(lambda a,b,c: (a+b+c).mean(),'Student','Student.mid','Teacher.mid')])
    learn = learner([CE, Term(lambda a,b,c: (a-b).square().mean()+0*c.mean(),'Student.mid','Teacher.mid','Student',projector=Projector,name='chosen')])
    assert list(learn.model._modules['_projectors']._modules)==['chosen']

def test_projectors_by_choice():
    mlp = learner([CE, Term(distance,'Student.mid','Teacher.mid',projector=partial(Projector, hidden=5),name='h')])
    assert [type(m).__name__ for m in mlp.model._modules['_projectors'].h.channels]==['Linear','ReLU','Linear']
    mlp.fit(1)
    same_shape = learner([CE, Term(distance,'Student.mid','Teacher.mid',projector=partial(Projector, hidden=5),name='h')], nets=dict(Teacher=Net(), Student=Net()))
    assert '_projectors' in same_shape.model._modules
    with pytest.raises(UserError, match='same shape'): learner([CE, Term(distance,'Student.mid','Teacher.mid',projector=False)])
    logits = learner([CE, Term(kd,'Student','Teacher',projector=Projector)], nets=dict(Teacher=Net(out=5), Student=Net()))
    logits.fit(1)

@pytest.mark.parametrize('call,says', [(lambda: Term(kd,'A','B',maks='batch.0'), "did you mean 'mask'"), (lambda: Term(kd,'A','B',T=2.), r'partial\(kd, T=2.0\)'), (lambda: Term(F.mse_loss,'A',nonsense='batch.0'), 'no parameter')])
def test_parameters_by_name_are_checked(call, says):
    with pytest.raises(UserError, match=says): call()

# ---- tokens beside maps

SHAPES = [((2,196,8),(2,16,7,7)), ((2,197,8),(2,16,7,7)), ((2,198,8),(2,16,14,14)), ((2,16,7,7),(2,197,8)), ((2,16,14,14),(2,196,8)), ((2,16,14,14),(2,201,8)), ((2,33,8),(2,4,2,4)), ((2,197,8),(2,50,5)), ((2,50,8),(2,197,8)), ((2,16,1,80),(2,40,5)), ((2,40,5),(2,6,1,80)), ((2,197,8),(2,145,8)),
          ((2,20,8),(2,40,5)), ((2,21,8),(2,20,8)), ((2,40,8),(2,80,8))]
@pytest.mark.parametrize('hidden', (None, 3))
@pytest.mark.parametrize('src,dst', SHAPES)
def test_tokens_and_maps_become_each_other(src, dst, hidden):
    p = Projector(src, dst, hidden)
    x = torch.randn(src, requires_grad=True)
    out = p(x, torch.empty(dst))
    assert out.shape==dst
    out.sum().backward()
    assert x.grad.abs().sum()>0 and (hidden is None or len(p.channels)==3)
    copy.deepcopy(p), pickle.dumps(p)

def test_each_token_comes_to_its_place():
    tags = torch.arange(1.,17.).view(1,16,1)
    with_class = torch.cat([torch.full((1,1,1), 99.), tags], 1)
    grid = torch.empty(1,1,4,4)
    for tokens in (tags, with_class): assert torch.equal(Projector(tokens.shape, grid.shape)(tokens, grid).flatten(), tags.flatten())
    back = Projector(grid.shape, with_class.shape)(tags.view(1,1,4,4), with_class)
    assert back[0,0].item()==8.5 and torch.equal(back[0,1:], tags[0])
    wide = torch.arange(8.).view(1,8,1)
    assert torch.equal(Projector((1,8,1), (1,1,2,4))(wide, torch.empty(1,1,2,4)).flatten(), wide.flatten())
    big = torch.cat([torch.full((1,1,1), 7.), torch.arange(64.).view(1,64,1)], 1)
    small = Projector((1,65,1), (1,17,1), grid=True)(big, torch.empty(1,17,1))
    assert small[0,0].item()==7. and small[0,1].item()==pytest.approx((0+1+8+9)/4)
    dropped = Projector((1,17,1), (1,16,1), special=(1,0))(with_class, tags)
    assert torch.equal(dropped, tags)

def test_what_could_be_a_line_or_a_picture_is_asked():
    for src,dst in (((2,64,8),(2,16,8)), ((2,50,8),(2,25,8))):
        with pytest.raises(UserError, match='grid=True'): Projector(src, dst)
        for grid in (True, False): assert Projector(src, dst, grid=grid)(torch.randn(src), torch.empty(dst)).shape==dst
    with pytest.raises(UserError, match='no grid of the form'): Projector((2,23,8), (2,8,7,7))
    assert Projector((2,24,8), (2,8,7,7), grid=(4,6))(torch.randn(2,24,8), torch.empty(2,8,7,7)).shape==(2,8,7,7)
    assert Projector((2,40,8), (2,8,3,40), grid=False)(torch.randn(2,40,8), torch.empty(2,8,3,40)).shape==(2,8,3,40)
    for src,dst in (((2,8),(2,8,3,3)), ((2,8),(2,5,8)), ((2,8,3,3,3),(2,8,3,3,3))):
        with pytest.raises(UserError, match='no projector'): Projector(src, dst)

def test_lines_of_other_widths_still_share_a_projector():
    p = Projector((2,20,8), (2,40,5))
    for a,b in ((30,60), (64,16), (17,65)): assert p(torch.randn(2,a,8), torch.empty(2,b,5)).shape==(2,b,5)

def test_a_transformer_teaches_a_convolutional_network():
    class ViT(nn.Module):
        def __init__(self): super().__init__(); self.tokens,self.head = nn.Linear(4,10),nn.Linear(10,3)
        def forward(self, x):
            t = self.tokens(F.unfold(x, 2, stride=2).mT)
            t = torch.cat([t.mean(1, keepdim=True), t], 1)
            return dict(tokens=t, y=self.head(t[:,0]))
    class CNN(nn.Module):
        def __init__(self): super().__init__(); self.conv,self.head = nn.Conv2d(1,6,3,padding=1,stride=4),nn.Linear(6,3)
        def forward(self, x): m = self.conv(x); return dict(map=m, y=self.head(m.mean((2,3))))
    learn = learner([Term(F.cross_entropy,'Student.y'), Term(cosine,'Student.map','Teacher.tokens')], loaders(torch.randn(48,1,8,8), data()[1]), dict(Teacher=ViT(), Student=CNN()))
    learn.fit(1)
    assert learn.model._modules['_projectors'].cosine_Student_Teacher.tokens.before==[0,1]

# ---- Terms by hand

def test_terms_that_were_not_connected_say_so():
    x,y = data()
    nets = Nets(dict(Teacher=Net(12), Student=Net()), ['Teacher'])
    outs = nets(x)
    def plain(a, b): return (a-b.mean()).square().mean()
    for t in (Term(distance,'Student.mid','Teacher.mid'), Term(plain,'Student','batch.0')):
        with pytest.raises(UserError, match='connect'): Terms(nets, t)(outs, y)
    class Two(nn.Module):
        def __init__(self, n): super().__init__(); self.lin = nn.Linear(4,n)
        def forward(self, x): return self.lin(x)
    wide = Nets(dict(A=Two(1), B=Two(16)))
    with pytest.raises(UserError, match=r'connect'): Terms(wide, Term(lambda a,b: (a-b).mean(),'A','B'))(wide(x))
    close(Terms(nets, CE)(outs, y), F.cross_entropy(outs['Student'], y))

def test_losses_item_by_item():
    x,y = data()
    nets = Nets(dict(Teacher=Net(12), Student=Net()), ['Teacher']).eval()
    loss = Terms(nets, [CE, KD, Term(dkd,'Student','Teacher'), Term(lambda o,y: F.cross_entropy(o, y)*2,'Student',name='own')])
    loss.connect((x,), (y,))
    outs = nets(x)
    items = loss.losses(outs, y)
    assert all(v.shape==(48,) for v in items.values())
    close(items['own'], 2*items['cross_entropy_Student'])
    close(items['dkd_Student_Teacher'].mean(), dkd(outs['Student'], outs['Teacher'], y))

# ---- what fastai's users call besides

def test_the_rest_works(tmp_path):
    from fastai.callback.all import CSVLogger, ShowGraphCallback, TerminateOnNaNCallback
    learn = learner(metrics=accuracy, path=tmp_path, cbs=[CSVLogger(), TerminateOnNaNCallback()])
    learn.fit_flat_cos(1, 1e-2), learn.fit_sgdr(1, 1, 1e-2)
    learn.recorder.plot_loss(), learn.recorder.plot_sched()
    learn.save('x'), learn.load('x')
    assert 'Student' in str(learn.model) and (tmp_path/'history.csv').exists()

def test_outputs_in_which_tensors_are_not_found_are_not_recorded():
    "A recorded dataclass would have no gradient"
    from distillbook.graphs import Graphed, Tape
    net,x = nn.Linear(4,3),data()[0]
    with pytest.raises(ValueError, match='a Out, in which'): Graphed(lambda: Out(net(x)), net.parameters(), Tape)
    assert Graphed(lambda: dict(y=net(x)), net.parameters(), Tape)()['y'].requires_grad
