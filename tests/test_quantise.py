"Eight bits: rounding and its gradients against numpy, functions that stay the same, files against onnx's own reference"
import copy
import numpy as np, onnx, pytest, torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from distillbook.core import UserError
from distillbook.learner import distill_learner
from distillbook.rec.labels import Alphabet
from distillbook.use.export import open_onnx
from distillbook.use.quantise import Steps, StepConv, WeightSteps, equalise, export_int8, fold_norms, harms, in_steps, places, quantisable, switch
from small_nets import small_rec

torch.set_num_threads(1)

class Small(nn.Module):
    "A stem, a depthwise and a grouped convolution, squares between, and a linear layer; channels of very different size"
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.dw = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.5))
        self.grouped,self.alone = nn.Conv2d(8, 12, 3, 2, 1, groups=4),nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)
    def forward(self, x): return self.fc(self.alone(self.grouped(self.dw(self.stem(x))).relu()).mean((2,3)))

def pictures(n=3, seed=0): return list(torch.randn(n, 4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    net = Small()
    for x in pictures(8): net(x) # Batch norms with statistics
    with torch.no_grad():
        net.stem[1].weight.mul_(torch.logspace(0, 2, 8))
        net.alone.weight.mul_(torch.logspace(0, 1.5, 12))
    return net.eval()

@pytest.mark.parametrize('low,high', [(-1.,3.), (-.1,2.), (-7.,.1), (-.3,.2)])
def test_stairs_and_their_gradients_written_out(low, high):
    x = np.random.default_rng(0).normal(0, 4, 400).astype(np.float32)
    s = (np.float32(high)-np.float32(low))/np.float32(255)
    z = np.rint(-np.float32(low)/s)
    q = np.rint(x/s)+z
    inside = (q>=0)&(q<=255)
    steps,t = Steps(),torch.tensor(x, requires_grad=True)
    steps.on,steps.low.data,steps.high.data = True,torch.tensor(low),torch.tensor(high)
    y = steps(t)
    by = np.random.default_rng(1).normal(size=400).astype(np.float32)
    (y*torch.tensor(by)).sum().backward()
    np.testing.assert_allclose(y.detach(), (q.clip(0, 255)-z)*s, atol=1e-5)
    np.testing.assert_allclose(t.grad, by*inside, atol=1e-6)
    off = np.where(inside, np.rint(x/s)-x/s, np.where(q>255, 255-z, -z)) # Of the step
    zero = np.where(inside, 0, -s) # Of the number of the step that is zero
    np.testing.assert_allclose(steps.high.grad, (by*(off/255 + zero*low/s**2/255)).sum(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(steps.low.grad, (by*(-off/255 + zero*(-1/s-low/s**2/255))).sum(), rtol=1e-3, atol=1e-3)
    with torch.no_grad(): np.testing.assert_allclose(steps(t), y.detach(), atol=1e-5)

@pytest.mark.parametrize('low,high', [(0.,2.), (1.,2.), (-3.,0.), (-3.,-1.), (-.7,1.9), (0.,0.)])
def test_zero_is_a_step_whatever_the_range(low, high):
    steps = Steps()
    steps.on,steps.low.data,steps.high.data = True,torch.tensor(low),torch.tensor(high)
    y = steps(torch.tensor([0.,1e9,-1e9]))
    assert y[0]==0 and y.isfinite().all() and y[1]>=0>=y[2]

@pytest.mark.parametrize('axis', (0,1))
def test_weights_have_a_scale_for_each_channel_out(axis):
    w = torch.randn(6, 7, 3, generator=torch.Generator().manual_seed(0))*torch.logspace(-1, 1, 6 if axis==0 else 7).view([-1,1,1] if axis==0 else [1,-1,1])
    rounds = WeightSteps(axis)
    assert torch.equal(rounds(w), w)
    rounds.on = True
    for i,(mine,theirs) in enumerate(zip(rounds(w).movedim(axis, 0).numpy(), w.movedim(axis, 0).numpy())):
        s = np.abs(theirs).max()/127
        np.testing.assert_allclose(mine, np.rint(theirs/s)*s, atol=1e-6)

def test_a_silent_channel_takes_its_bias_along(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    with torch.no_grad(): net[0].weight[2] = 0.
    net[0].bias.data = torch.tensor([.5,-1.,30.,2.])
    xs = pictures()
    q = quantisable(net, xs, equal=False)
    y = open_onnx(export_int8(q, tmp_path/'a.onnx', xs, shape=(3,16,16)))[0].run(None, {'x': xs[0].numpy()})[0]
    with torch.no_grad(): np.testing.assert_allclose(y[:,2], net(xs[0])[:,2], atol=.2)

@pytest.mark.parametrize('scale', (1., .01, .001))
def test_a_silent_layer(tmp_path, scale):
    "Weights that are all zero, of a branch that has nothing to say yet"
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        net[2].weight.zero_()
        net[0].weight *= scale
        net[2].bias += .5
    xs = pictures()
    y = open_onnx(export_int8(quantisable(net, xs), tmp_path/'a.onnx', xs, shape=(3,16,16)))[0].run(None, {'x': xs[0].numpy()})[0]
    with torch.no_grad(): np.testing.assert_allclose(y, net(xs[0]), atol=.02)

def test_norms_become_part_of_their_convolution_and_others_stay(net):
    x = pictures()[0]
    folded = fold_norms(copy.deepcopy(net), x)
    assert [type(m).__name__ for m in (folded.stem[1],folded.dw[1],folded.alone)]==['Identity','Identity','BatchNorm2d']
    with torch.no_grad(): torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-4)

def test_equal_channels_are_the_same_function(net):
    xs = pictures()
    q = fold_norms(copy.deepcopy(net), xs[0])
    for m in list(q.modules()): in_steps(m)
    equalise(q, xs, least=1.01)
    sized = {n for n,m in places(q).items() if isinstance(m, Steps) and m.size is not None}
    assert sized=={'stem.0.taken','stem.0.given','dw.0.taken','dw.0.given','grouped.taken','grouped.given','fc.taken'}
    with torch.no_grad(): torch.testing.assert_close(q(xs[1]), net(xs[1]), rtol=1e-4, atol=1e-4)
    peaks = {}
    hook = q.dw[0].given.register_forward_pre_hook(lambda m, args: peaks.update(dw=args[0].abs().amax((0,2,3))))
    with torch.no_grad():
        for x in xs: q(x)
    hook.remove()
    assert (peaks['dw']<1.001).all()

def test_the_student_is_a_copy_that_drops_nothing_and_keeps_statistics(net):
    before,xs = copy.deepcopy(net.state_dict()),pictures()
    q = quantisable(net, xs)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    stats = q.alone.running_mean.clone()
    q.train()
    assert torch.equal(q(xs[0]), q(xs[0])) and torch.equal(q.alone.running_mean, stats)

def test_it_learns_from_its_float_self_without_labels(net):
    from distillbook.losses import distance
    from distillbook.terms import Term
    from fastai.basics import DataLoader, DataLoaders
    xs = torch.cat(pictures(10))
    dls = DataLoaders(DataLoader([(x,0) for x in xs], bs=8), DataLoader([(x,0) for x in xs], bs=40))
    q = quantisable(net.requires_grad_(False), pictures(), equal=False) # Of a frozen teacher too
    for m in q.modules():
        if isinstance(m, Steps): m.most = 15 # Four bits
    with torch.no_grad(): was = distance(q(xs), net(xs)).item()
    learn = distill_learner(dls, dict(Teacher=net, Student=q), [Term(distance, 'Student', 'Teacher')], frozen=['Teacher'])
    with learn.no_bar(), learn.no_logging(): learn.fit(6, 1e-3)
    with torch.no_grad(): assert distance(q.eval()(xs), net(xs)).item() < .6*was
    net.requires_grad_()

@pytest.mark.parametrize('equal', (False,True), ids=['as it is','equal'])
def test_the_file_is_what_pytorch_computes(net, tmp_path, equal):
    xs = pictures()
    q = quantisable(net, xs, equal)
    file = export_int8(q, tmp_path/'a.onnx', xs, shape=(3,16,16), about=dict(net='Small'))
    made = onnx.load(file)
    kinds = {t.name: t.data_type for t in made.graph.initializer}
    weights = [n for n in made.graph.node if n.op_type=='DequantizeLinear' and n.input[0] in kinds]
    assert sorted(kinds[n.input[0]] for n in weights)==[onnx.TensorProto.INT8]*4+[onnx.TensorProto.INT32]*3
    made.opset_import[0].version = 21 # The reference has no older rounding; it means the same
    theirs, = ReferenceEvaluator(made).run(None, {'x': xs[0].numpy()})
    with torch.no_grad(): ours,floats = q.eval()(xs[0]),net(xs[0])
    session,about = open_onnx(file)
    runs = session.run(None, {'x': xs[0].numpy()})[0]
    away = (ours-floats).square().mean()
    for y in (theirs, runs): assert (torch.tensor(y)-ours).square().mean() < .1*away
    assert about['quantised']=='int8' and about['net']=='Small'

def test_a_wrong_file_is_refused(net, tmp_path, monkeypatch):
    import distillbook.use.quantise as module
    def spoilt(graph, values): values.update({k: v*1.5 for k,v in values.items() if v.dtype==np.float32 and v.ndim==4})
    rounded = module._round_weights
    monkeypatch.setattr(module, '_round_weights', lambda graph, values: (spoilt(graph, values), rounded(graph, values)))
    with pytest.raises(UserError, match='times as far'): export_int8(quantisable(net, pictures()), tmp_path/'a.onnx', pictures(), shape=(3,16,16))
    assert not (tmp_path/'a.onnx').exists()

def test_layers_may_stay_and_mistakes_have_a_line(net):
    q = quantisable(net, pictures(), leave=['stem','fc'])
    assert type(q.stem[0]) is nn.Conv2d and type(q.fc) is nn.Linear and isinstance(q.dw[0], StepConv)
    with pytest.raises(UserError, match='without pictures'): quantisable(net, [])
    with pytest.raises(UserError, match='nothing to round'): quantisable(net, pictures(), leave=[''])
    with pytest.raises(UserError, match='nowhere rounds'): export_int8(net, 'a.onnx', pictures())

def test_harm_is_that_of_one_place(net):
    q = quantisable(net, pictures(), equal=False)
    found = harms(q, net, pictures(1))
    assert list(found)==list(places(q)) and all(m.on for m in places(q).values())
    switch(q, False)
    places(q)['dw.0.taken'].on = True
    from distillbook.losses import kd
    with torch.no_grad(): assert found['dw.0.taken']==pytest.approx(kd(q(pictures()[0]), net(pictures()[0]), T=1.).item())

def test_a_reader_of_paddles_kind(tmp_path):
    alphabet = Alphabet('0123456789')
    lines = list(torch.randn(2, 2, 3, 48, 96, generator=torch.Generator().manual_seed(0)))
    q = quantisable(small_rec(alphabet).eval(), lines)
    file = export_int8(q, tmp_path/'rec.onnx', lines, 'rec', alphabet)
    assert open_onnx(file)[1]['character']==alphabet.chars

# ---- networks in which a fold, a size or a name would do harm

class Twice(nn.Module):
    "One convolution, a norm for each of its uses"
    def __init__(self):
        super().__init__()
        self.c,self.b1,self.b2 = nn.Conv2d(3, 3, 3, padding=1),nn.BatchNorm2d(3),nn.BatchNorm2d(3)
    def forward(self, x): return self.b2(self.c(self.b1(self.c(x)).relu()))

class SharedNorm(Twice):
    def __init__(self):
        super().__init__()
        self.d = nn.Conv2d(3, 3, 1)
    def forward(self, x): return self.b1(self.d(self.b1(self.c(x)).relu()))

class Around(Twice):
    "What the convolution gives goes past the norm too"
    def forward(self, x):
        y = self.c(x)
        return self.b1(y).relu()+y

class InPlace(Twice):
    def forward(self, x): return self.b1(self.c(x).relu_())

class Activates(nn.BatchNorm2d):
    def forward(self, x): return super().forward(x).relu()

class OwnNorm(Twice):
    def __init__(self):
        super().__init__()
        self.b1 = Activates(3)
    def forward(self, x): return self.b1(self.c(x))

class ByName(Twice):
    def forward(self, x): return self.b1(input=self.c(x))

class OfTheBatch(Twice):
    def __init__(self):
        super().__init__()
        self.b1 = nn.BatchNorm2d(3, track_running_stats=False)
    def forward(self, x): return self.b1(self.c(x))

class Dicts(Twice):
    def forward(self, x): return dict(a=self.b1(self.c(x)), more=(self.b2(self.c(x)),))

def drawn(make, seed=0):
    "A network with norms of odd statistics"
    torch.manual_seed(seed)
    net = make()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(.2, 3)
            nn.init.uniform_(m.weight, .3, 2)
            nn.init.normal_(m.bias)
    return net.eval()

def answers(net, x):
    with torch.no_grad(): o = net(x)
    return torch.cat([o['a'], *o['more']]) if isinstance(o, dict) else o

@pytest.mark.parametrize('make', [Twice, SharedNorm, Around, InPlace, OwnNorm, ByName, OfTheBatch, Dicts], ids=lambda o: o.__name__)
def test_a_norm_that_cannot_be_folded_stays(make):
    net,x = drawn(make),pictures()[0]
    student = switch(quantisable(net, pictures()), False)
    torch.testing.assert_close(answers(student, x), answers(net, x), rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for p in student.parameters())
    assert isinstance(student.b1, nn.Identity)==(make is ByName)

def test_biases_of_folds_learn(net):
    student = quantisable(net, pictures())
    student(pictures()[0]).square().mean().backward()
    assert student.stem[0].bias.grad.abs().sum()>0

def test_a_second_time(net):
    "On other, louder pictures"
    x,louder = pictures()[0],[20*o*torch.linspace(.05, 1, 3).view(3,1,1) for o in pictures(seed=5)]
    student = switch(quantisable(net, pictures()), False)
    was = student(x)
    equalise(student, louder)
    torch.testing.assert_close(switch(student, False)(x), was, rtol=1e-4, atol=1e-4)
    again = quantisable(student, louder)
    torch.testing.assert_close(switch(again, False)(x), was, rtol=1e-4, atol=1e-4)

def test_tied_weights_keep_their_function():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    net[2].weight = net[0].weight
    x = torch.randn(16, 8)*torch.logspace(-1, 1.3, 8)
    torch.testing.assert_close(switch(quantisable(net, [x]), False)(x), net(x), rtol=1e-4, atol=1e-4)

def test_a_shared_convolution_in_a_file(tmp_path):
    net = drawn(Twice)
    student = quantisable(net, pictures())
    export_int8(student, tmp_path/'t.onnx', pictures(), shape=(3,16,16))

@pytest.mark.parametrize('equal', [True, False])
def test_a_checkpoint_of_other_pictures(net, equal):
    one,other = quantisable(net, pictures()),quantisable(net, [9*o for o in pictures(seed=3)], equal=equal)
    other.load_state_dict(one.state_dict())
    x = pictures()[1]
    torch.testing.assert_close(other(x), one(x))

def test_what_cannot_be_compared_or_is_not_there(net, tmp_path):
    student = quantisable(net, pictures())
    with pytest.raises(UserError, match='harms: no pictures'): harms(student, net, [])
    dicts = drawn(Dicts)
    with pytest.raises(UserError, match='the teacher gives a dict'): harms(quantisable(dicts, pictures()), dicts, pictures())
    with pytest.raises(UserError, match='no pictures on which'): export_int8(student, tmp_path/'a.onnx', [])
    with pytest.raises(UserError, match="no layer 'stm'.*stem.0"): quantisable(net, pictures(), leave=['stm'])
    assert not list(tmp_path.iterdir())
