"The container: names, freezing, addresses, taps, projectors, copies; tried where it might break"
import copy, gc, pickle, weakref
from collections import OrderedDict, namedtuple
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.basics import TensorBase

from distillbook.core import UserError
from distillbook.nets import Nets, Projector, addresses, look_up

torch.set_num_threads(1)
ODD = ['type', 'keys', 'items', 'values', 'training', 'forward', 'names', 'frozen', 'taps', 'tapped', 'train', 'eval', 'freeze', 'find', 'project',
       'two words', 'Lehrer-Netz', '1', 'größer', 'a+b', 'self', 'x', 'model', 'parameters', 'pop']

@pytest.mark.parametrize('name', ['a/b', '/abs/x', '..', 'a\\b', '[/red]', '[bold]', '<b>', 'a\x1b[31m', 'a\nb', 'a\tb', '\u202ea', ' a', 'a ', '', 'a`b', 'a|b', 'a*', 'a:b', 'x'*101, None, 5, '_a', 'a.b'])
def test_names_that_would_be_a_path_or_markup(name):
    with pytest.raises(UserError, match='a name is text of letters'): Nets({name: mlp()})

def mlp(h=6, drop=0.5): return nn.Sequential(nn.Linear(4,h), nn.BatchNorm1d(h), nn.ReLU(), nn.Dropout(drop), nn.Linear(h,3))
def state(m): return {k: v.clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

class Returns(nn.Module):
    "Gives what `f` makes of a linear layer's output"
    def __init__(self, f):
        super().__init__()
        self.body,self.f = nn.Linear(4,3),f
    def forward(self, x): return self.f(self.body(x))

@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(8,4)+2

# ---- names

def test_names_that_modules_use_themselves(x):
    nets = Nets({n: mlp() for n in ODD}, frozen=ODD[::2])
    assert list(nets.train()(x))==ODD
    for i,n in enumerate(ODD):
        assert isinstance(nets[n], nn.Sequential) and nets[n].training==(i%2==1)
        assert f'{n}.0.weight' in nets.state_dict()
    nets.eval()
    assert not nets.training and not any(nets[n].training for n in ODD)
    nets.train().unfreeze(*ODD[::2])
    assert all(nets[n].training for n in ODD)

@pytest.mark.parametrize('n', (1, 2, 5))
@pytest.mark.parametrize('frozen', ('none', 'first', 'last', 'all'))
def test_any_number_any_frozen(n, frozen, x):
    names = [f'net {i}' for i in range(n)]
    cold = dict(none=[], first=names[:1], last=names[-1:], all=names)[frozen]
    nets = Nets({o: mlp() for o in names}, cold).train()
    before = {o: state(nets[o]) for o in names}
    outs = nets(x)
    assert [o for o in names if outs[o].requires_grad]==[o for o in names if o not in cold]
    assert [o for o in names if same(state(nets[o]), before[o])]==cold

@pytest.mark.parametrize('name', ('', '_hidden', '_projectors', 'a.b', '.', '_'))
def test_names_refused(name):
    with pytest.raises(UserError): Nets({name: mlp()})

def test_what_is_no_net():
    with pytest.raises(UserError, match="net 'A' is a function"): Nets(dict(A=F.relu))
    with pytest.raises(UserError, match="net 'A' is a NoneType"): Nets(dict(A=None))
    net = mlp()
    with pytest.raises(UserError, match='deepcopy'): Nets(dict(A=net, B=mlp(), C=net))
    with pytest.raises(UserError, match="did you mean 'Teacher'"): Nets(dict(Teacher=net), frozen=['teacher'])
    with pytest.raises(UserError, match="did you mean 'Teacher'"): Nets(dict(Teacher=net)).unfreeze('Teachr')

def test_a_name_that_is_no_string_is_a_user_error():
    with pytest.raises(UserError): Nets({1: mlp()})

def test_state_dict_keys_are_the_nets_names():
    nets = Nets(dict(Student=mlp(), Teacher=mlp()), ['Teacher'])
    assert set(nets.state_dict())=={f'{n}.{k}' for n in ('Student','Teacher') for k in mlp().state_dict()}
    other = Nets(dict(Student=mlp(), Teacher=mlp()))
    other.load_state_dict(nets.state_dict())
    assert same(state(other), state(nets))

# ---- freezing

def test_train_reaches_no_frozen_net(x):
    nets = Nets(dict(A=mlp(), B=mlp()), ['A'])
    for mode in (True, False, True):
        nets.train(mode)
        assert not any(m.training for m in nets['A'].modules())
        assert all(m.training==mode for m in nets['B'].modules())
    assert nets.train() is nets and nets.eval() is nets

def test_a_frozen_net_set_to_training_by_hand_is_set_back(x):
    nets = Nets(dict(A=mlp()), ['A'])
    before = state(nets['A'])
    nets['A'].train()
    nets(x)
    assert same(state(nets['A']), before)

def test_an_inner_module_of_a_frozen_net_set_to_training_is_set_back(x):
    nets = Nets(dict(A=mlp()), ['A'])
    before = state(nets['A'])
    nets['A'][1].train()
    nets(x)
    assert same(state(nets['A']), before)

def test_a_layer_shared_by_a_frozen_and_a_trainable_net_is_refused():
    shared = nn.BatchNorm1d(4)
    nets = dict(Teacher=nn.Sequential(shared, nn.Linear(4,3)), Student=nn.Sequential(shared, nn.Linear(4,2)))
    with pytest.raises(UserError, match="'Student' trains and shares its layer '0'"): Nets(nets, ['Teacher'])
    both = Nets(nets, ['Teacher','Student'])
    with pytest.raises(UserError, match='shares its layer'): both.unfreeze('Student')

def test_unfreezing_gives_back_the_pattern_of_gradients():
    net = mlp()
    net[0].requires_grad_(False)
    wanted = [p.requires_grad for p in net.parameters()]
    nets = Nets(dict(A=net, B=mlp()), ['A'])
    assert not any(p.requires_grad for p in net.parameters())
    nets.freeze('A')
    nets.freeze('A', 'B')
    nets.unfreeze('A')
    assert [p.requires_grad for p in net.parameters()]==wanted
    nets.unfreeze('A', 'B')
    assert [p.requires_grad for p in net.parameters()]==wanted and all(p.requires_grad for p in nets['B'].parameters())

def test_freezing_drops_gradients(x):
    nets = Nets(dict(A=mlp())).train()
    nets(x)['A'].sum().backward()
    nets.freeze('A')
    assert all(p.grad is None for p in nets['A'].parameters())

def test_a_mistyped_name_among_several_freezes_none():
    nets = Nets(dict(A=mlp(), B=mlp()))
    with pytest.raises(UserError): nets.freeze('A', 'C')
    assert not nets.frozen and all(p.requires_grad for p in nets['A'].parameters())

def test_a_net_frozen_in_two_containers_can_be_unfrozen_in_the_second():
    teacher = mlp()
    Nets(dict(T=teacher), ['T'])
    nets = Nets(dict(T=teacher), ['T'])
    nets.unfreeze('T')
    assert all(p.requires_grad for p in teacher.parameters())

def test_a_tied_weight_of_a_frozen_net_does_not_move_and_comes_back():
    a,b = nn.Linear(4,3),nn.Linear(4,3)
    b.weight = a.weight
    nets = Nets(dict(A=a, B=b), ['A'])
    assert [p.requires_grad for p in b.parameters()]==[False, True]
    nets.unfreeze('A')
    assert [p.requires_grad for p in b.parameters()]==[True, True]

def test_a_net_without_parameters(x):
    class Doubles(nn.Module):
        def forward(self, x): return 2*x
    nets = Nets(dict(T=Doubles(), S=mlp()), ['T']).train()
    assert torch.equal(nets(x)['T'], 2*x)

def test_subclasses_of_tensors_stay_outside(x):
    assert type(Nets(dict(A=mlp()))(TensorBase(x))['A']) is torch.Tensor

def test_several_inputs(x):
    class Two(nn.Module):
        def forward(self, a, b): return a+b
    assert torch.equal(Nets(dict(A=Two()))(x, x)['A'], 2*x)

# ---- outputs and addresses

Pair = namedtuple('Pair', 'features logits')
OUTS = dict(bare=(lambda o: o, 'N'), tuple=(lambda o: (None, o), 'N.1'), list=(lambda o: [o, [None, o]], 'N.1.1'), dict=(lambda o: dict(head_out=dict(ctc=o, sar=None), n=3), 'N.head_out.ctc'),
            mixed=(lambda o: dict(heads=[dict(a=(0,o))]), 'N.heads.0.a.1'), ordered=(lambda o: OrderedDict(a=o), 'N.a'), named=(lambda o: Pair(None, o), 'N.1'), spaces=(lambda o: {'the logits': o}, 'N.the logits'))

@pytest.mark.parametrize('f,address', OUTS.values(), ids=OUTS)
@pytest.mark.parametrize('frozen', (False, True))
def test_outputs_of_every_kind(f, address, frozen, x):
    nets = Nets(dict(N=Returns(f)), ['N'] if frozen else [])
    outs = nets(x)
    o = nets.find(address, outs)
    assert torch.equal(o, nets['N'].body(x)) and o.requires_grad==(not frozen)
    assert address in addresses(outs)
    for a in addresses(outs): look_up(outs, a)
    assert not nets.tapped

def test_every_address_listed_can_be_looked_up():
    outs = dict(N={0: 'o', 'a.b': 'no address', 'c': ['p', dict(d='q')]})
    assert addresses(outs)==['N', 'N.0', 'N.c', 'N.c.0', 'N.c.1', 'N.c.1.d']
    assert [look_up(outs, a) for a in addresses(outs)][1]=='o'

@pytest.mark.parametrize('address,near', [('Studnt.head_out', "no net 'Studnt'; did you mean 'Student'"), ('Student.head_out.cct', "'Student.head_out.ctc'"), ('Student.bdy', "'Student.body'"),
                                          ('Student.head_out.ctc.0', "'Student.head_out.ctc'"), ('Student.head_out.', "'Student.head_out'"), ('Student.', 'no output or module'), ('', 'no net')])
def test_wrong_addresses_name_the_near(address, near, x):
    nets = Nets(dict(Student=Returns(lambda o: dict(head_out=dict(ctc=o)))))
    with pytest.raises(UserError, match=near): nets.find(address, nets(x))
    assert not nets.tapped

# ---- taps

@pytest.mark.parametrize('frozen', (False, True))
@pytest.mark.parametrize('mode', (True, False))
def test_taps(frozen, mode, x):
    nets = Nets(dict(A=mlp(drop=0.), B=mlp()), ['A'] if frozen else []).train(mode)
    nets.tap('A.2', nets(x))
    plain = nets(x)
    tap = nets.find('A.2', plain)
    assert tap.requires_grad==(not frozen)
    torch.testing.assert_close(nets['A'][4](tap), plain['A'])
    assert not nets['A'][2]._forward_hooks
    first = tap.clone()
    assert torch.equal(nets.find('A.2', nets(x+1)), nets.taps['A.2']) and not torch.equal(nets.taps['A.2'], first)

def test_taps_are_down_after_an_error():
    nets = Nets(dict(A=mlp()))
    nets.tapped.append('A.0')
    with pytest.raises(RuntimeError): nets(torch.randn(2,5))
    assert not nets['A'][0]._forward_hooks

def test_a_module_called_twice_gives_its_last_output(x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4,4)
        def forward(self, x): return self.inner(self.inner(x)).relu()
    nets = Nets(dict(A=Twice()))
    nets.tap('A.inner', nets(x))
    outs = nets(x)
    assert torch.equal(nets.find('A.inner', outs), nets['A'].inner(nets['A'].inner(x)))

def test_a_tapped_module_that_never_runs_is_a_clear_error(x):
    net = mlp()
    net.unused = nn.Identity()
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.body,self.unused = nn.Linear(4,3),nn.Linear(4,3)
        def forward(self, x): return self.body(x)
    nets = Nets(dict(A=Skips()))
    nets.tap('A.unused', nets(x))
    with pytest.raises(UserError, match='A.unused did not run'): nets.find('A.unused', nets(x))

def test_a_tap_before_an_inplace_relu_keeps_what_the_module_gave(x):
    net = nn.Sequential(nn.Linear(4,3), nn.ReLU(inplace=True))
    nets = Nets(dict(T=net), ['T'])
    nets.tap('T.0', nets(x))
    assert torch.equal(nets.find('T.0', nets(x)), net[0](x))

# ---- copies

@pytest.mark.parametrize('how', (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))), ids=['deepcopy', 'pickle'])
def test_copies_are_whole_and_apart(how, x):
    nets = Nets(dict(T=mlp(), training=mlp()), ['T']).train()
    nets.add_projector('hint', (8,3), (8,5))
    other = how(nets)
    assert same(state(other), state(nets)) and other.names==nets.names and list(other.frozen)==['T']
    other.unfreeze('T')
    assert all(p.requires_grad for p in other['T'].parameters()) and not any(p.requires_grad for p in nets['T'].parameters())
    assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in nets.parameters())

def test_a_copy_can_be_made_after_a_batch_with_taps(x):
    nets = Nets(dict(S=mlp())).train()
    nets.tapped.append('S.0')
    nets(x)
    copy.deepcopy(nets)
    pickle.dumps(nets)

# ---- projectors

SHAPES = [((2,8), (2,5)), ((2,20,8), (2,40,5)), ((2,20,8), (2,7,8)), ((2,8,6,20), (2,16,3,10)), ((2,8,3,10), (2,8,6,10)), ((2,8,3,20), (2,4,6,10)), ((2,8,1,1), (2,8,4,4)), ((1,3), (1,3))]
@pytest.mark.parametrize('src,dst', SHAPES)
def test_projectors_reach_every_shape_and_carry_gradients(src, dst):
    p,x = Projector(src, dst),torch.randn(src, requires_grad=True)
    like = torch.empty(dst)
    assert p(x, like).shape==dst
    p(x, like).square().sum().backward()
    assert x.grad.abs().sum()>0 and all(o.grad.abs().sum()>0 for o in p.parameters())
    assert p(torch.randn(5, *src[1:]), like).shape==(5, *dst[1:])

@pytest.mark.parametrize('src,dst', [((2,8), (2,8,3,3)), ((2,), (2,)), ((1,2,3,4,5), (1,2,3,4,6)), ((), ())])
def test_no_projector(src, dst):
    with pytest.raises(UserError, match='no projector'): Projector(src, dst)

def test_projectors_stay_outside_the_nets():
    nets = Nets(dict(Student=mlp()))
    nets.add_projector('a hint', (2,3), (2,5))
    assert not any('proj' in k for k in nets['Student'].state_dict())
    assert [k for k in nets.state_dict() if not k.startswith('Student.')]==['_projectors.a hint.channels.weight', '_projectors.a hint.channels.bias']
    assert set(nets(torch.randn(2,4)))=={'Student'}


# ---- what a frozen network costs

def test_the_frozen_run_first():
    "Whatever their place, and the answers keep the order of the networks"
    order = []
    nets = Nets({n: nn.Linear(2,2) for n in 'ABCD'}, frozen=['B','D'])
    for n in nets.names: nets[n].register_forward_hook(lambda *_,n=n: order.append(n))
    assert list(nets(torch.zeros(1,2)))==list('ABCD') and order==list('BDAC')
    nets.unfreeze('D')
    order.clear()
    nets(torch.zeros(1,2))
    assert order==list('BACD')

def test_bf16_of_the_frozen():
    "Coarse numbers inside, float32 outside, also under autocast of the others, and nothing of it once the network learns again"
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16,4)
        def forward(self, x):
            y = self.fc(x)
            return dict(y=y, inner=[y, (y, 3)], inside=torch.tensor(float(y.dtype==torch.bfloat16)))
    torch.manual_seed(0)
    nets,x = Nets(dict(A=Several(), T=Several()), frozen=['T'], bf16=['T','A']),torch.randn(64,16)
    out = nets(x)
    assert (out['T']['inside'],out['A']['inside'])==(1,0)
    assert {o.dtype for o in (out['T']['y'], out['T']['inner'][0], out['T']['inner'][1][0], out['A']['y'])}=={torch.float32} and out['T']['inner'][1][1]==3
    exact = nets['T'](x)['y']
    assert 0 < (exact-out['T']['y']).abs().max() < .02*exact.abs().max()
    assert not torch.is_autocast_enabled('cpu') and nets['T'].fc.weight.dtype==torch.float32
    nets.unfreeze('T')
    assert nets(x)['T']['inside']==0 and nets(x)['T']['y'].requires_grad
    with pytest.raises(UserError, match="no net 'B'"): Nets(dict(A=nn.Linear(2,2)), bf16=['B'])

def test_a_frozen_network_keeps_nothing():
    "No graph: what it computed on the way is gone before the others run"
    import gc, weakref
    alive,kept = [],[]
    class Teacher(nn.Module):
        def forward(self, x):
            y = x*2
            kept.append(weakref.ref(y))
            return y.sum(-1)
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4,2)
        def forward(self, x):
            gc.collect()
            alive.append(kept[-1]() is not None)
            return self.fc(x)
    Nets(dict(S=Student(), T=Teacher()), frozen=['T'])(torch.randn(3,4))
    assert alive==[False]
