"Optimisers against four steps of PaddleOCR 2.10's, through the learner and by hand; groups, clipping, and what is wrong in a config"
import copy, json
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.basics import Callback, DataLoader, DataLoaders, Learner, set_seed
from fastai.callback.fp16 import MixedPrecision
from torch import nn

from distillbook.config import build_optimizer
from distillbook.config.optimizer import decay_of
from distillbook.config.values import Config, Section
from distillbook.core import UserError
from distillbook.learner import distill_learner
from distillbook.losses import distance
from distillbook.nets import Nets
from distillbook.optim import OPTIMISERS, ClipGrad, OwnDecay, RMSProp, clip_grads, l2_groups, own_l2
from distillbook.terms import Term

GOLDEN = np.load(Path(__file__).parent/'golden'/'optimizer.npz')
CASES = [k.removesuffix('|meta') for k in GOLDEN.files if k.endswith('|meta')]
PARAMS = ('fc.weight', 'fc.bias', 'bn.weight', 'bn.bias', 'ctc.weight', 'ctc.bias')
each = lambda name, values: pytest.mark.parametrize(name, values, ids=str)

def meta(case): return json.loads(str(GOLDEN[f'{case}|meta']))
def section(case): return dict(meta(case)['optimizer'], regularizer=meta(case)['regularizer'])
def golden(case, kind, i): return {k: GOLDEN[f'{case}|{kind}|s{i}.{k}'] for k in PARAMS}

class Puppet(nn.Module):
    "The golden file's parameters; their gradients are what it is fed"
    def __init__(self):
        super().__init__()
        for k in [k[2:] for k in GOLDEN.files if k.startswith('w|')]:
            layer,leaf = k.split('.')
            if layer not in self._modules: self.add_module(layer, nn.Module())
            self._modules[layer].register_parameter(leaf, nn.Parameter(torch.tensor(GOLDEN[f'w|{k}'])))
        self.bn.own_l2,self.ctc.own_l2 = 0.,.1
        self.frozen.requires_grad_(False)

    def learning(self): return {k: self.get_parameter(k) for k in PARAMS}
    def forward(self, x): return (x*torch.cat([p.flatten() for p in self.learning().values()])).sum(1)

class Watch(Callback):
    "Keeps the parameters after each step"
    def before_fit(self): self.seen = []
    def after_step(self): self.seen.append({k: p.detach().clone().numpy() for k,p in self.learn.model['Student'].learning().items()})

def four_steps(case, cbs=(), own=True, drop=()):
    puppet,watch = Puppet(),Watch()
    xs = [torch.cat([torch.tensor(g).flatten() for g in golden(case, 'in', i).values()]) for i in range(4)]
    dl,o = DataLoader([(x,0) for x in xs], bs=1),section(case)
    if not own: del puppet.bn.own_l2,puppet.ctc.own_l2
    built = build_optimizer(o)
    ours = [cb for cb in built['cbs'] if type(cb) not in drop]
    learn = distill_learner(DataLoaders(dl, dl), dict(Student=puppet), Term(lambda out, _: out.sum(), 'Student'), **(built | dict(cbs=[watch, *ours, *cbs])))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, meta(case)['lr'])
    return puppet,watch.seen

def off(case, seen): return max(np.abs(got[k]-want[k]).max()/np.abs(want[k]).max() for i,got in enumerate(seen) for want in [golden(case, 'out', i)] for k in PARAMS)

# ---- PaddleOCR 2.10's own steps

@each('case', CASES)
def test_steps_are_paddleocrs(case):
    puppet,seen = four_steps(case)
    assert len(seen) == 4
    assert off(case, seen) < (1e-5 if 'Adam' in case else 1e-6)
    for k in ('frozen.weight','frozen.bias'): np.testing.assert_array_equal(puppet.get_parameter(k).numpy(), GOLDEN[f'w|{k}'])

@each('case', [c for c in CASES if 'Adam' in c])
def test_what_adam_is_off_by_is_paddles_rounding_of_powers(case):
    "With the powers of beta multiplied up in float32 the same formulas agree ten times better"
    f,o = np.float32,section(case)
    b1,b2,lr,eps = f(.9),f(.999),f(meta(case)['lr']),f(1e-8)
    w,m,v = ({k: a.copy() for k,a in d.items()} for d in ({k: GOLDEN[f'w|{k}'] for k in PARAMS}, *[{k: np.zeros_like(GOLDEN[f'w|{k}']) for k in PARAMS}]*2))
    p1,p2,seen = b1,b2,[]
    for i in range(4):
        grads = {k: torch.tensor(g) for k,g in golden(case, 'in', i).items()}
        for cb in build_optimizer(o)['cbs']:
            if isinstance(cb, ClipGrad): clip_grads([*grads.values()], cb.norm, cb.per_param)
        for k in PARAMS:
            own = {'bn': 0., 'ctc': .1}.get(k.split('.')[0], 0. if o['name']=='AdamW' else o['regularizer']['factor'] if o['regularizer'] else 0.)
            g = grads[k].numpy() + f(own)*w[k]
            if o['name']=='AdamW' and w[k].ndim>1: w[k] = w[k]*(1-lr*f(o['weight_decay']))
            m[k],v[k] = b1*m[k]+(1-b1)*g, b2*v[k]+(1-b2)*g*g
            w[k] = w[k] - lr*np.sqrt(1-p2)/(1-p1)*m[k]/(np.sqrt(v[k])+eps*np.sqrt(1-p2))
        p1,p2 = p1*b1,p2*b2
        seen.append(dict(w))
    assert off(case, seen) < 1e-6

@each('case', CASES)
def test_every_rule_shows_in_the_goldens(case):
    "Leave one out, and the numbers are others"
    assert off(case, four_steps(case, own=False)[1]) > 1e-4
    if 'clip' in case: assert off(case, four_steps(case, drop=[ClipGrad])[1]) > 1e-4
    if case=='AdamW': assert off(case, four_steps(case, drop=[OwnDecay])[1]) > 1e-4

# ---- mixed precision

class ScaledOnCPU(MixedPrecision):
    "fastai's, but the scaling alone, and on a CPU"
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', enabled=False),torch.amp.GradScaler('cpu', init_scale=1024.),[]

@each('case', ['Momentum', 'Adam_clip', 'Adam_clip_global', 'AdamW'])
def test_scaled_gradients_are_clipped_and_decay_after_they_are_unscaled(case):
    plain,scaled = four_steps(case)[1],four_steps(case, cbs=[ScaledOnCPU()])[1]
    for a,b in zip(plain, scaled):
        for k in PARAMS: np.testing.assert_allclose(a[k], b[k], rtol=1e-6, atol=1e-7)

# ---- groups

def conv_net():
    res = nn.Sequential(nn.Linear(4,4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4,4), nn.Linear(4,2)))
    res[1].own_l2 = 0.
    return res

def names(nets, groups):
    by_id = {id(p): k for k,p in nets.named_parameters()}
    return [(n, c, [by_id[id(p)] for p in ps]) for n,c,ps in groups]

def test_own_coefficients_replace_the_factor_and_the_innermost_holds():
    net = conv_net()
    net[2].own_l2,net[2][1].own_l2 = .5,'1e-5'
    nets = Nets(dict(A=net))
    assert names(nets, l2_groups(nets, .1)) == [('A', .1, ['A.0.weight','A.0.bias']), ('A', 0., ['A.1.weight','A.1.bias']), ('A', .5, ['A.2.0.weight','A.2.0.bias']), ('A', 1e-5, ['A.2.1.weight','A.2.1.bias'])]

def test_an_own_coefficient_of_none_is_none():
    net = conv_net()
    net[1].own_l2 = None
    assert own_l2(net) == {}

def test_frozen_nets_have_no_group_and_projectors_come_last():
    x = [(torch.randn(4),0) for _ in range(8)]
    dl = DataLoader(x, bs=4)
    term = Term(distance, 'A.2.0', 'T.2')
    learn = distill_learner(DataLoaders(dl, dl), dict(T=conv_net(), A=conv_net()), term, frozen='T', groups=partial(l2_groups, factor=.1), opt_func=build_optimizer(dict(name='Adam'))['opt_func'])
    learn.create_opt()
    assert [(n,c) for n,c,_ in learn.groups] == [('A',.1), ('A',0.), ('_projectors',.1)]
    assert [h['wd'] for h in learn.opt.hypers] == [.1, 0., .1]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, wd=7.)
    assert [h['wd'] for h in learn.opt.hypers] == [.1, 0., .1]

def test_a_parameter_is_in_one_group_only():
    net = nn.Sequential(nn.Linear(4,4), nn.Linear(4,4))
    net[1].weight = net[0].weight
    groups = l2_groups(Nets(dict(A=net)), .1)
    assert sum(len(ps) for *_,ps in groups) == 3

def test_adamw_spares_what_it_is_told_to():
    nets = Nets(dict(A=conv_net()))
    flat = build_optimizer(dict(name='AdamW', weight_decay=.05, one_dim_param_no_weight_decay=True))['groups']
    assert names(nets, flat(nets)) == [('A', .05, ['A.0.weight','A.2.0.weight','A.2.1.weight']), ('A', 0., ['A.0.bias','A.1.weight','A.1.bias','A.2.0.bias','A.2.1.bias'])]
    words = build_optimizer(dict(name='AdamW', weight_decay=.05, no_weight_decay_name='.1.w nothing'))['groups']
    assert names(nets, words(nets))[1] == ('A', 0., ['A.1.weight','A.2.1.weight'])

def test_l1_pulls_with_its_factor_and_own_l2_replaces_it():
    o = dict(name='SGD', regularizer=dict(name='L1', factor=.1))
    net = nn.Sequential(nn.Linear(3,1,bias=False), nn.Linear(1,1,bias=False))
    net[1].own_l2 = .5
    before = copy.deepcopy(net.state_dict())
    dl = DataLoader([(torch.zeros(3),0)], bs=1)
    learn = distill_learner(DataLoaders(dl, dl), dict(A=net), Term(lambda out, _: out.sum(), 'A'), **build_optimizer(o))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
    torch.testing.assert_close(net[0].weight.detach(), before['0.weight']-.1*.1*before['0.weight'].sign())
    torch.testing.assert_close(net[1].weight.detach(), before['1.weight']*(1-.1*.5))

# ---- clipping

def test_clipping_by_parameter_and_together():
    grads = [torch.tensor([3.,4.]), torch.tensor([[.3],[.4]]), torch.zeros(2)]
    one,all_ = [[g.clone() for g in grads] for _ in range(2)]
    clip_grads(one, 1.)
    clip_grads(all_, 1., per_param=False)
    torch.testing.assert_close(one, [torch.tensor([.6,.8]), grads[1], grads[2]])
    length = (25+.25)**.5
    torch.testing.assert_close(all_, [g/length for g in grads])
    clip_grads([], 1.)

def test_what_is_within_the_limit_stays_to_the_bit():
    g = torch.randn(50, generator=torch.Generator().manual_seed(0))
    same = g.clone()
    clip_grads([same], 100.)
    clip_grads([same], 100., per_param=False)
    assert torch.equal(g, same)

@each('norm', [0, -1, None, 'x'])
def test_a_limit_is_a_positive_number(norm):
    with pytest.raises(UserError): ClipGrad(norm)

# ---- RMSProp

def test_rmsprop_keeps_the_rate_inside_the_momentum():
    w = nn.Parameter(torch.zeros(1))
    opt = RMSProp([w], lr=1., rho=.9, eps=1e-6, momentum=.5)
    w.grad = torch.ones(1)
    opt.step()
    first = 1/np.sqrt(.1+1e-6)
    np.testing.assert_allclose(w.item(), -first, rtol=1e-6)
    opt.param_groups[0]['lr'] = 0.
    opt.step()
    np.testing.assert_allclose(w.item(), -1.5*first, rtol=1e-6)  # at a rate of 0 the momentum goes on with the old one

def test_rmsprop_goes_on_from_its_state():
    def steps(opt, w, n):
        for i in range(n):
            w.grad = torch.full((3,), float(i+1))
            opt.step()
    make = partial(RMSProp, lr=.1, momentum=.9, weight_decay=.1)
    a,b = nn.Parameter(torch.ones(3)),nn.Parameter(torch.ones(3))
    opt_a,opt_b = make([a]),make([b])
    steps(opt_a, a, 2)
    steps(opt_b, b, 2)
    c = nn.Parameter(b.detach().clone())
    opt_c = make([c])
    opt_c.load_state_dict(copy.deepcopy(opt_b.state_dict()))
    steps(opt_a, a, 3)
    steps(opt_c, c, 3)
    assert torch.equal(a, c)

# ---- what configs hold

@each('name', OPTIMISERS)
def test_every_optimiser_trains_a_plain_fastai_learner(name):
    set_seed(0)
    x = torch.randn(32, 4)
    dl = DataLoader([(o, o[:1]*2) for o in x], bs=8)
    o = dict(name=name, regularizer=dict(name='L2', factor='1e-4'), **(dict(momentum=.9) if name=='Momentum' else {}))
    learn = Learner(DataLoaders(dl, dl), nn.Linear(4,1), loss_func=F.mse_loss, opt_func=build_optimizer(o)['opt_func'])
    with learn.no_bar(), learn.no_logging():
        before = learn.validate()[0]
        learn.fit_one_cycle(3, 1e-2)
        assert learn.validate()[0] < before
    assert {h['wd'] for h in learn.opt.hypers} == {1e-4}

@each('o,want', [
    (dict(name='Adam'), ('L2', 0.)), (dict(name='Adam', regularizer=None), ('L2', 0.)), (dict(name='Adam', weight_decay=.1), ('L2', .1)),
    (dict(name='Adam', regularizer=dict(name='L2', factor='1e-6')), ('L2', 1e-6)), (dict(name='Adam', regularizer=dict(name='L2Decay', factor=0)), ('L2', 0.)),
    (dict(name='Adam', regularizer=dict(name='L1', factor=.1)), ('L1', .1)),
    (dict(name='AdamW'), ('decoupled', .01)), (dict(name='AdamW', weight_decay=0.), ('decoupled', 0.)), (dict(name='AdamW', regularizer=dict(name='L2', factor=.1)), ('decoupled', .1))])
def test_decay_of(o, want): assert decay_of(Section(dict(Optimizer=o), 'Optimizer')) == want

def test_clip_norm_comes_before_clip_norm_global():
    cb, = build_optimizer(dict(name='Adam', clip_norm='5', clip_norm_global=1.))['cbs']
    assert cb.per_param and cb.norm == 5.
    assert build_optimizer(dict(name='Adam', clip_norm=None))['cbs'] == []

def test_settings_reach_the_optimiser():
    opt = build_optimizer(dict(name='Adam', beta1='0.8', beta2=.9, epsilon='1e-6', lr={}, lazy_mode=True))['opt_func']([nn.Parameter(torch.zeros(1))], lr=.1)
    assert (opt.hypers[0]['mom'], opt.hypers[0]['sqr_mom'], opt.hypers[0]['eps']) == (.8, .9, 1e-6)

def test_a_key_of_another_optimiser_is_warned_of():
    with pytest.warns(UserWarning, match='Optimizer.momentum has no effect'): build_optimizer(dict(name='Adam', momentum=.9))

BAD_RATES = [(-.1,'-0.1'), ('-1','-1.0'), ('small',"'small'"), (True,'True'), ('nan','nan'), (float('nan'),'nan'), (float('inf'),'inf'), ([1],r'\[1\]')]

@each('o,message', [
    (dict(name='Adm'), "Optimizer.name: no optimizer 'Adm'; did you mean 'Adam'"),
    (dict(name=['Adam']), r"Optimizer.name: no optimizer \['Adam'\]"),
    (dict(beta1=.9), 'Optimizer: a section with a name is wanted, such as {name: Adam'),
    ('Adam', "Optimizer: a section such as {name: ...} is wanted, not 'Adam'"),
    (None, 'Optimizer: a section such as {name: ...} is wanted, not None'),
    (dict(name='Adam', beta_1=.9), "Optimizer.beta_1: no key .*'beta_1'; did you mean 'beta1'"),
    *((dict(name='Adam', beta1=v), f'Optimizer.beta1: a number.* is wanted, not {v!r}') for v in ('big', None, True, -1, float('nan'))),
    (dict(name='Momentum'), 'Optimizer: momentum needs momentum'),
    (dict(name='Adam', regularizer='L2'), "Optimizer.regularizer: names and values are wanted, not 'L2'"),
    (dict(name='Adam', regularizer=dict(factor=.1)), 'Optimizer.regularizer.name: no regularizer None; there are: L1, L2'),
    (dict(name='Adam', regularizer=dict(name='L3', factor=.1)), "Optimizer.regularizer.name: no regularizer 'L3'; there are: L1, L2"),
    (dict(name='Adam', regularizer=dict(name='L2', factr=.1)), "Optimizer.regularizer.factr: no key 'factr'; did you mean 'factor'"),
    *((dict(name=n, regularizer=dict(name='L2', factor=v)), f'Optimizer.regularizer.factor: a number.* is wanted, not {said}') for n in ('Adam','AdamW') for v,said in BAD_RATES+[(None,'None')]),
    *((dict(name=n, weight_decay=v), f'Optimizer.weight_decay: a number.* is wanted, not {said}') for n in ('Adam','AdamW') for v,said in BAD_RATES),
    (dict(name='Adam', regularizer=dict(name='L2', factor=.1), weight_decay=.1), 'Optimizer: .*takes one of them'),
    (dict(name='AdamW', regularizer=dict(name='L1', factor=.1)), 'Optimizer.*: AdamW has no L1'),
    *((dict([('name','Adam'), (k,v)]), f'Optimizer.{k}: a number.* is wanted, not {said}') for k in ('clip_norm','clip_norm_global') for v,said in BAD_RATES),
    (dict(name='Adam', clip_norm_global=0), 'Optimizer.clip_norm_global: .*above 0, not 0')])
def test_what_is_wrong_is_said(o, message):
    with pytest.raises(UserError, match=message): build_optimizer(o)

def test_an_optimiser_of_ones_own():
    opt = build_optimizer(dict(name='torch.optim.NAdam', betas=[.8,.99], weight_decay=.1))['opt_func']([nn.Parameter(torch.zeros(1))], lr=.2)
    assert type(opt.opt) is torch.optim.NAdam and [opt.opt.param_groups[0][k] for k in ('lr','betas','weight_decay')] == [.2, [.8,.99], .1]
    for own,message in ((dict(betas=3), r"Optimizer: NAdam cannot be made of {'betas': 3}"), (dict(eps=-1), 'Optimizer: NAdam cannot be made of .*Invalid epsilon'), (dict(beta=3), "Optimizer.beta: no key of NAdam 'beta'; did you mean 'betas'"), (dict(weight_decay=-1), 'Optimizer.weight_decay: a number from 0 is wanted, not -1')):
        with pytest.raises(UserError, match=message): build_optimizer(dict(own, name='torch.optim.NAdam'))
    with pytest.raises(UserError, match='Optimizer.name: torch.nn.Linear is code outside of distillbook'): build_optimizer(dict(name='torch.nn.Linear'))

def test_a_section_of_a_file_does_as_a_dict_does_and_knows_its_line():
    cfg = Config(dict(Optimizer=dict(name='Adam', regularizer=dict(name='L2', factor=-1))))
    cfg.path,cfg.lines = 'a.yml',{('Optimizer',): 3, ('Optimizer','regularizer'): 5}
    with pytest.raises(UserError, match='^a.yml:5: Optimizer.regularizer.factor: a number from 0 is wanted, not -1$'): build_optimizer(Section(cfg, 'Optimizer'))
    cfg['Optimizer']['regularizer']['factor'] = '1e-4'
    assert build_optimizer(Section(cfg, 'Optimizer'))['opt_func'].keywords['weight_decay'] == 1e-4
