"Terms: how they are called, named, weighed, connected; and that looking costs nothing"
import copy, random
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.schedule import SchedCos, SchedLin
from torch import nn

from distillbook.core import UserError
from distillbook.losses import attention_transfer, distance, dkd, dml, kd
from distillbook.nets import Nets
from distillbook.terms import Term, Terms, dry_run

torch.set_num_threads(1)
def mlp(h=6, drop=0.5): return nn.Sequential(nn.Linear(4,h), nn.BatchNorm1d(h), nn.ReLU(), nn.Dropout(drop), nn.Linear(h,3))
def state(m): return {k: v.clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.fixture
def xy():
    torch.manual_seed(0)
    return torch.randn(8,4)+2,torch.randint(3,(8,))

def two(h=6, drop=0.): return Nets(dict(Teacher=mlp(16, drop), Student=mlp(h, drop)), ['Teacher'])
def connected(nets, x, y, *terms):
    loss = Terms(nets, terms)
    loss.connect((x,), y if isinstance(y, tuple) else (y,))
    return loss

# ---- how a function is called

class MSE(nn.Module):
    def forward(self, a, b): return (a-b).square().mean()
class OnTargets(nn.Module):
    def forward(self, a, b, targets): return (a-b)[targets].mean()
class Callable:
    def __call__(self, a, b, targets): return (a-b)[targets].mean()

A,B,Y = torch.tensor([1.,2.,3.]),torch.tensor([1.,0.,0.]),torch.tensor([2])
CALLS = dict(function=(distance, (A,B), (Y,), 13/3), partial=(partial(distance, mode='l1'), (A,B), (Y,), 5/3), module=(MSE(), (A,B), (Y,), 13/3), torch_module=(nn.L1Loss(), (A,B), (Y,), 5/3),
             module_targets=(OnTargets(), (A,B), (Y,), 3.), callable=(Callable(), (A,B), (Y,), 3.), partial_of_partial=(partial(partial(lambda a,b,p,q: p*q*(a-b).mean(), p=2), q=3), (A,B), (), 10.),
             builtin=(torch.dist, (A,B), (Y,), 13**.5), builtin_one=(torch.sum, (A,), (), 6.), bound=(A.dot, (B,), (), 1.), lambda_targets=(lambda a,b,targets: a[targets].sum(), (A,B), (Y,), 3.),
             keyword_only=(lambda a,b,*,targets: a[targets].sum(), (A,B), (Y,), 3.), one_with_targets=(F.l1_loss, (A,), (B,), 5/3), one_with_two_targets=(lambda a,b,c: (a*b*c).sum(), (A,), (B,B), 1.),
             several_targets=(lambda a,b,targets: targets[0].sum()+targets[1], (A,B), (Y,5), 7.), three=(lambda a,b,c: (a+b+c).sum(), (A,B,B), (Y,), 8.), three_targets=(lambda a,b,c,targets: c[targets].sum(), (A,B,A), (Y,), 3.))

@pytest.mark.parametrize('fn,outs,targets,want', CALLS.values(), ids=CALLS)
def test_calls(fn, outs, targets, want):
    t = Term(fn, *'ABC'[:len(outs)])
    assert float(t(*outs, targets=targets))==pytest.approx(want)
    assert t.name and repr(t)

def test_targets_bound_by_partial_stay():
    t = Term(partial(lambda a,b,targets: a[targets].sum(), targets=torch.tensor([0])), 'A', 'B')
    assert float(t(A, B, targets=(Y,)))==1.

@pytest.mark.parametrize('args,kw,says', [(('kd','A'), {}, 'must be a function'), ((kd,), {}, 'addresses'), ((kd,'A',None), {}, 'strings'), ((kd,['A','B']), {}, 'strings'),
                                          ((kd,'A','B'), dict(weight='1'), "'1'"), ((kd,'A','B'), dict(weight=None), 'None')])
def test_terms_refused(args, kw, says):
    with pytest.raises(UserError, match=says): Term(*args, **kw)

@pytest.mark.parametrize('w', (2, 2., True, 0, -1.5, np.float64(2), SchedLin(0,1)))
def test_weights_accepted(w, xy):
    x,y = xy
    loss = connected(two(), x, y, Term(F.cross_entropy, 'Student', weight=w))
    loss.pct = 0.25
    outs = loss.nets(x)
    want = (w(0.25) if callable(w) else w)*F.cross_entropy(outs['Student'], y)
    torch.testing.assert_close(loss(outs, y), want)

def test_a_weight_of_numpys(): assert float(Term(kd, 'A', 'B', weight=np.float32(2)).weight_at(0))==2.

# ---- names

def names(*terms): return [t.name for t in Terms(Nets(dict(A=mlp())), terms).terms]
def f(a, *b): return a.mean()

def test_names():
    assert names(Term(f,'A'), Term(f,'A'), Term(f,'A'))==['f_A', 'f_A_1', 'f_A_2']
    assert names(Term(f,'A'), Term(f,'A',name='mine'))==['f_A', 'mine']
    assert names(Term(f,'A'), Term(f,'A',name='f_A'))==['f_A_1', 'f_A']
    assert names(Term(f,'A.1','B.x.y'))==['f_A_B']
    for bad in ([Term(f,'A',name='x'), Term(f,'A',name='x')], [], [f], ['f']):
        with pytest.raises(UserError): names(*bad)

@pytest.mark.parametrize('terms', [pytest.param(lambda: (Term(f,'A'), Term(f,'A_2'), Term(f,'A')), id='net A_2'), pytest.param(lambda: (Term(f,'A',name='f_A_1'), Term(f,'A'), Term(f,'A')), id='named f_A_1'),
                                   pytest.param(lambda: [Term(f,'A')]*2, id='the same object')])
def test_made_up_names_differ(terms): assert len(set(names(*terms())))==len(terms())

def test_a_terms_name_does_not_depend_on_where_it_stood_before():
    t = Term(f,'A')
    names(Term(f,'A'), t)
    assert names(t)==['f_A']

# ---- the sum

def test_the_sum_of_the_parts_is_the_loss(xy):
    x,y = xy
    loss = connected(two(), x, y, Term(F.cross_entropy,'Student'), Term(kd,'Student','Teacher',weight=2.), Term(distance,'Student.2','Teacher.2',weight=-0.1), Term(kd,'Student','Teacher',weight=0), Term(lambda a,b,c: (a+b*c).mean(), 'Student', 'Teacher', 'Teacher', weight=SchedCos(0,1)))
    for pct in (0., 0.3, 1.):
        loss.pct = pct
        total = loss(loss.nets.train()(x), y)
        torch.testing.assert_close(sum(loss.parts.values()), total.detach())
        assert len(loss.parts)==5 and not any(p.requires_grad for p in loss.parts.values()) and loss.parts['kd_Student_Teacher_1']==0
    total.backward()
    assert all(p.grad is not None for p in loss.nets['Student'].parameters()) and all(p.grad is None for p in loss.nets['Teacher'].parameters())

def test_changing_the_total_in_place_leaves_the_parts(xy):
    x,y = xy
    loss = connected(two(), x, y, Term(F.cross_entropy,'Student'))
    total = loss(loss.nets(x), y)
    was = float(loss.parts['cross_entropy_Student'])
    with torch.no_grad(): total /= 2
    assert float(loss.parts['cross_entropy_Student'])==was

def test_no_part_leaves_the_device(fake_cuda, xy):
    "On fake CUDA tensors, which have no numbers, whatever asks for a number raises"
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device('cuda'):
        x,y = torch.empty(8,4,device='cuda'),torch.zeros(8,dtype=torch.long,device='cuda')
        with pytest.raises(DataDependentOutputException): x.sum().item()
        nets = two(drop=0.5)
        nets.tapped += ['Student.2', 'Teacher.2']
        nets.add_projector('hint', (8,6), (8,16))
        loss = Terms(nets, [Term(F.cross_entropy,'Student'), Term(kd,'Student','Teacher',weight=SchedCos(0,1)), Term(distance,'Student.2','Teacher.2',name='hint'), Term(dml,'Student','Teacher')])
        for loss.pct in (0., .3, .7):
            loss(nets.train()(x), y)
            assert all(p.device.type=='cuda' for p in loss.parts.values())

# ---- connecting

def test_projectors_where_shapes_differ_only(xy):
    x,y = xy
    maps = lambda c,s: nn.Sequential(nn.Unflatten(1,(1,2,2)), nn.Conv2d(1,c,1), nn.Upsample(scale_factor=s), nn.Flatten(), nn.Linear(c*4*s*s,3))
    nets = Nets(dict(Teacher=maps(5,2), Student=maps(3,1)), ['Teacher'])
    def same_shape(a, b):
        assert a.shape==b.shape
        return (a-b).square().mean()
    loss = connected(nets, x, y, Term(same_shape,'Student.2','Teacher.2',name='maps'), Term(same_shape,'Student','Teacher',name='logits'), Term(attention_transfer,'Student.2','Teacher.2'))
    assert list(nets._modules['_projectors']._modules)==['maps']
    loss(nets.train()(x), y).backward()
    assert all(p.grad.abs().sum()>0 for p in nets._modules['_projectors'].parameters()) and nets['Student'][1].weight.grad.abs().sum()>0

def test_projectors_follow_batches_of_other_sizes(xy):
    "Lines of text are batched by width: the teacher's features are longer in one batch than in the next"
    nets = Nets(dict(T=nn.Linear(4,8), S=nn.Linear(4,6)), ['T'])
    loss = connected(nets, torch.randn(2,20,4), (), Term(distance,'S','T'))
    for t in (20, 30, 10): loss(nets(torch.randn(2,t,4)))

@pytest.mark.parametrize('term,says', [(Term(kd,'Studnt','Teacher'), "did you mean 'Student'"), (Term(kd,'Student','Teacher.logits'), 'no output or module'), (Term(distance,'Student.22','Teacher.2'), "'Student.2'"),
    (Term(kd,'Student.2','Teacher.2'), r'compares logits.*\[8, 6\].*\[8, 16\]'), (Term(lambda a,b: a-b,'Student','Teacher'), 'must give a scalar'), (Term(lambda a,b: 1.,'Student','Teacher'), 'must give a scalar'),
    (Term(lambda a,y: a.nonsense,'Student'), 'fails on a batch: AttributeError'), (Term(lambda a: a.mean(),'Student'), 'fails on a batch: TypeError')])
def test_mistakes_fail_at_once(term, says, xy):
    x,y = xy
    with pytest.raises(UserError, match=says): connected(two(), x, y, term)

def test_a_shape_that_no_projector_maps_says_what_to_do():
    nets = Nets(dict(T=nn.Flatten(), S=nn.Identity()))
    with pytest.raises(UserError, match='shapes'): connected(nets, torch.randn(2,3,4), (), Term(lambda a,b: a.mean()+b.mean(), 'S', 'T'))

def test_a_tap_on_a_module_that_never_runs_names_it(xy):
    x,y = xy
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.body,self.unused = nn.Linear(4,3),nn.Linear(4,3)
        def forward(self, x): return self.body(x)
    with pytest.raises(UserError, match=r"Student\.unused.*(never|not) (ran|run|called)"): connected(Nets(dict(Student=Skips())), x, y, Term(F.cross_entropy,'Student.unused'))

def test_less_output_in_evaluation(xy):
    x,y = xy
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Linear(4,3),nn.Linear(4,3)
        def forward(self, x): return dict(a=self.a(x), extra=2*self.b(x)) if self.training else dict(a=self.a(x), extra=None)
    loss = connected(Nets(dict(S=Heads())), x, y, Term(F.cross_entropy,'S.a',name='a'), Term(F.cross_entropy,'S.extra',name='extra'))
    loss(loss.nets.train()(x), y)
    assert set(loss.parts)=={'a','extra'}
    loss(loss.nets.eval()(x), y)
    assert set(loss.parts)=={'a'}

def test_an_output_called_like_a_module_stays_the_output(xy):
    "In training the net gives 2*head as 'head'; in evaluation a bare tensor. The term means the output"
    x,y = xy
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4,3)
        def forward(self, x): return dict(head=2*self.head(x)) if self.training else self.head(x)
    loss = connected(Nets(dict(S=Head())), x, y, Term(F.cross_entropy,'S.head'))
    outs = loss.nets.train()(x)
    torch.testing.assert_close(loss(outs, y), F.cross_entropy(outs['S']['head'], y))

# ---- no trace

class Buffers(nn.Module):
    "Buffers that are replaced and made on the way"
    def __init__(self, new=False):
        super().__init__()
        self.new,self.lin = new,nn.Linear(4,3)
        self.register_buffer('centre', torch.zeros(3))
        self.bn = nn.BatchNorm1d(3)
    def forward(self, x):
        o = self.lin(x)
        self.centre = 0.9*self.centre+0.1*o.mean(0).detach()
        if self.new and not hasattr(self, 'mask'): self.register_buffer('mask', torch.full((3,), 7.))
        return self.bn(o)

@pytest.mark.parametrize('new', (False, pytest.param(True)))
def test_buffers_replaced_or_made_in_the_dry_run(new, xy):
    x,y = xy
    nets = Nets(dict(A=Buffers(new), B=mlp()))
    before = state(nets)
    connected(nets, x, y, Term(F.cross_entropy,'A'))
    after = state(nets)
    assert all(torch.equal(v, after[k]) for k,v in before.items())
    assert not new or torch.equal(nets['A'].mask, torch.full((3,), 7.))

@pytest.mark.parametrize('fails', (False, True))
def test_connecting_leaves_no_trace(fails, xy):
    x,y = xy
    nets = Nets(dict(Teacher=mlp(16), Student=mlp()), ['Teacher']).train(not fails)
    before,modes = state(nets),[m.training for m in nets.modules()]
    rngs = torch.get_rng_state(),np.random.get_state()[1].copy(),random.getstate()
    def noisy(a, y):
        np.random.rand(), random.random(), torch.rand(1)
        if fails: raise RuntimeError('no')
        return F.cross_entropy(a, y)
    try: connected(nets, x, y, Term(noisy,'Student'))
    except UserError: assert fails
    assert same(before, state(nets)) and modes==[m.training for m in nets.modules()] and all(p.grad is None for p in nets.parameters())
    assert torch.equal(rngs[0], torch.get_rng_state()) and (rngs[1]==np.random.get_state()[1]).all() and rngs[2]==random.getstate()

def test_dry_run_restores_after_an_error(xy):
    nets = two(drop=.5)
    before = state(nets)
    with pytest.raises(ZeroDivisionError), dry_run(nets):
        nets.train()(xy[0])
        1/0
    assert same(before, state(nets))

def test_targets_of_several_tensors(xy):
    x,y = xy
    loss = connected(two(), x, (y, torch.ones(8)), Term(lambda o,y,w: (F.cross_entropy(o, y, reduction='none')*w).mean(), 'Student', name='weighted'), Term(lambda a,b,targets: kd(a,b)+targets[1].mean()-1, 'Student','Teacher', name='kd'),
                     Term(lambda a,b,targets: dkd(a,b,targets[0]), 'Student','Teacher',name='dkd'))
    outs = loss.nets(x)
    torch.testing.assert_close(loss(outs, y, torch.ones(8)), F.cross_entropy(outs['Student'],y)+kd(outs['Student'],outs['Teacher'])+dkd(outs['Student'],outs['Teacher'],y))

def test_a_function_that_is_for_training_only():
    "Its term is left out of the validation loss, through any number of partials; alone, it makes that NaN"
    def scaled(x, y, by=1.): return (x*by - y).square().mean()
    scaled.train_only = True
    nets = Nets(dict(A=nn.Linear(3, 3)))
    xb,yb = (torch.ones(2, 3),),(torch.zeros(2, 3),)
    twice = partial(partial(scaled, by=2.), by=3.)
    terms = Terms(nets, [Term(twice, 'A', name='twice'), Term(F.mse_loss, 'A', name='mse')])
    terms.connect(xb, yb)
    assert terms.train_only=={'twice'}
    outs = nets.eval()(*xb)
    terms(outs, *yb)
    assert list(terms.parts)==['mse']
    terms(nets.train()(*xb), *yb)
    assert list(terms.parts)==['twice','mse']
    alone = Terms(nets, Term(scaled, 'A'))
    alone.connect(xb, yb)
    assert alone(nets.eval()(*xb), *yb).isnan()

def test_a_named_input_that_is_missing_in_evaluation(xy):
    "Such a term is left out of the validation loss, as one is whose address is missing"
    class Twofold(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(4, 3)
        def forward(self, x): return dict(out=self.lin(x), sure=x[:,0]) if self.training else dict(out=self.lin(x))
    x,y = xy
    def weighed(out, y, w): return (F.cross_entropy(out, y, reduction='none')*w).mean()
    nets = Nets(dict(A=Twofold()))
    loss = connected(nets, x, y, Term(weighed, 'A.out', w='A.sure', targets=[0], name='weighed'), Term(F.cross_entropy, 'A.out', name='plain'))
    assert loss.train_only=={'weighed'}
    loss(nets.eval()(x), y)
    assert list(loss.parts)==['plain']

# ---- which targets of a batch

PICKED = [(['A'], [0,2], (1., 2., 3.), (A, 1., 3.)), (['A','B'], [1], (1., 2.), (A, B, 2.)), (['A'], [], (1., 2.), (A,)), (['A'], 1, (1., 2.), (A, 2.)), (['A'], (1,0), (1., 2.), (A, 2., 1.))]
@pytest.mark.parametrize('addresses,targets,batch,want', PICKED)
def test_targets_by_position(addresses, targets, batch, want):
    got = []
    Term(lambda *args: got.extend(args), *addresses, targets=targets)(*(A,B)[:len(addresses)], targets=batch)
    assert len(got)==len(want) and all(g is w for g,w in zip(got, want))

def test_positions_go_before_the_keyword_called_targets():
    assert float(Term(lambda a,b,targets: a[targets].sum(), 'A', 'B', targets=[1])(A, B, targets=(None,Y)))==3.

@pytest.mark.parametrize('bad', ('0', ['label'], [-1], [True], [0.], {0: 1}, [[0]]))
def test_positions_that_are_none(bad):
    with pytest.raises(UserError, match='positions counted from 0'): Term(f, 'A', targets=bad)

@pytest.mark.parametrize('n', (0, 1, 2))
def test_a_position_that_the_batch_does_not_have(n, xy):
    x,y = xy
    with pytest.raises(UserError, match=rf'the batch has {n}$') as e: connected(two(), x, (y,)*n, Term(F.cross_entropy, 'Student', targets=[2]))
    assert "'cross_entropy_Student'" in str(e.value) and '[2]' in str(e.value)

def test_a_term_trains_on_the_targets_it_chose(xy):
    x,y = xy
    nets = two()
    loss = connected(nets, x, ('no label', y), Term(F.cross_entropy, 'Student', targets=[1]))
    outs = nets(x)
    torch.testing.assert_close(loss(outs, 'no label', y), F.cross_entropy(outs['Student'], y))
