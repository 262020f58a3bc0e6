"Recorded and compiled steps: the same numbers as plain ones, whatever stands in the networks and around them; and what falls back says so"
import copy, logging, pickle
from functools import partial
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.basics import DataLoader, DataLoaders, set_seed
from distillbook import graphs
from distillbook.graphs import Launches, Runner, blocks, compile_blocks, record_net
from distillbook.layers import conv_bn
from distillbook.learner import distill_learner
from distillbook.losses import distance, kd
from distillbook.nets import Nets, Targets
from distillbook.rec.labels import Alphabet, SARClasses
from distillbook.rec.losses import Walks, _torchs_ctc, ctc_loss
from distillbook.rec.sar import sar_loss
from distillbook.terms import Term, Terms
from small_nets import small_det, small_rec


def net(h=6):
    return nn.Sequential(conv_bn(1, h), conv_bn(h, h, groups=h), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(.3), nn.Linear(4*h, 5))

def pair(): return [Term(F.cross_entropy, 'Student'), Term(kd, 'Student', 'Teacher'), Term(distance, 'Student.0', 'Teacher.1.act')]

def steps(runner, opt=partial(torch.optim.SGD, lr=.05, momentum=.9), n=20, set_to_none=True, parts=1, precision=None, sizes=(8,)):
    "Losses and weights after n steps"
    set_seed(0)
    nets = Nets(dict(Teacher=net(), Student=net()), frozen=['Teacher'])
    terms = Terms(nets, pair())
    x,y = torch.randn(16,1,8,8),torch.randint(5, (16,))
    terms.connect((x[:8],), (y[:8],))
    nets.train().runner = runner
    opt,losses = opt([p for p in nets.parameters() if p.requires_grad]),[]
    set_seed(1)
    for i in range(n):
        m = sizes[i%len(sizes)]
        for j in range(parts):
            o = torch.randperm(16)[:m]
            with torch.autocast('cpu', precision or torch.bfloat16, enabled=precision is not None): outs = nets(x[o])
            loss = terms(outs, y[o])
            loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=set_to_none)
        losses.append(loss.item())
    return losses,nets

@pytest.mark.parametrize('how', [{}, dict(set_to_none=False), dict(parts=2), dict(set_to_none=False, parts=2), dict(opt=partial(torch.optim.Adam, lr=1e-2)), dict(precision=torch.bfloat16)], ids=str)
def test_same_numbers(how):
    "Dropout, BatchNorm, taps with a projector, gradients set to None, zeroed in place, or added up: all as in plain steps"
    runner = Runner(record_net)
    (a,was),(b,now) = steps(None, **how),steps(runner, **how)
    assert len(runner.kept)==1 and set(next(iter(runner.kept.values())).graphed)=={'Teacher','Student'} and not runner.said
    assert a==pytest.approx(b, rel=1e-5, abs=1e-6)
    for k,v in was.state_dict().items(): assert torch.allclose(v, now.state_dict()[k], atol=1e-5), k

def test_shapes():
    "Two kinds of batches are recorded; a third runs plainly, and that is said once"
    runner = Runner(record_net, warm=1)
    (a,_),(b,_) = steps(None, sizes=(8,6,4), n=12),steps(runner, sizes=(8,6,4), n=12)
    assert a==pytest.approx(b, rel=1e-5) and len(runner.kept)==2 and len(runner.said)==1 and 'more than 2 shapes' in [*runner.said][0]

def test_compiled():
    runner = Runner(record_net, compiled=partial(compile_blocks, backend='aot_eager'))
    (a,_),(b,now) = steps(None, n=8),steps(runner, n=8)
    assert a==pytest.approx(b, rel=1e-5) and runner.gave_up is None
    assert len(runner.blocks.parts)==2 # Two of the four are tapped
    runner.close()
    assert all(getattr(m, '_compiled_call_impl', None) is None for m in now.modules())

def test_compiler_fails(caplog):
    "No compiler: the steps are plain, and one line says why"
    def broken(gm, inputs): raise RuntimeError('no compiler here')
    caplog.set_level(logging.INFO, 'distillbook')
    runner = Runner(compiled=partial(compile_blocks, backend=broken))
    (a,_),(b,now) = steps(None, n=3),steps(runner, n=3)
    assert a==b and 'no compiler here' in caplog.text and caplog.text.count('not compiled')==1
    assert all(getattr(m, '_compiled_call_impl', None) is None for m in now.modules())

def test_moved_weights():
    "Weights that lie elsewhere now are not those of the recording"
    nets = Nets(dict(A=net())).train()
    nets.runner = Runner(record_net, warm=0)
    x = torch.randn(4,1,8,8)
    nets['A'][4].p = 0.
    nets(x)
    with torch.no_grad(): nets['A'][5].weight.data = nets['A'][5].weight.data*0
    out = nets(x)['A']
    assert torch.equal(out, nets['A'][5].bias.expand_as(out))

def test_turns():
    "A forward pass between another and its way back would spoil it"
    nets = Nets(dict(A=net())).train()
    nets.runner = Runner(record_net, warm=0)
    first = nets(torch.randn(4,1,8,8))['A'].sum()
    nets(torch.randn(4,1,8,8))
    with pytest.raises(RuntimeError, match='ran again'): first.backward()

class OnHost(nn.Module):
    on_host = True
    def forward(self, x): return torch.from_numpy(x.detach().numpy().mean((1,2,3))[:,None]*0+1).expand(-1,5)*1.

@pytest.mark.parametrize('why', ['host', 'hook', 'gradient', 'broken'])
def test_falls_back(why, caplog):
    "What cannot be recorded runs as it did, and is said once"
    caplog.set_level(logging.INFO, 'distillbook')
    set_seed(0)
    nets = Nets(dict(Teacher=OnHost() if why=='host' else net(), Student=net()), frozen=['Teacher']).train()
    def no_luck(nets, name, xb, targets):
        if name=='Student': raise RuntimeError('cannot be recorded\nand more')
        return record_net(nets, name, xb, targets)
    nets.runner = Runner(no_luck if why=='broken' else record_net, warm=1)
    if why=='hook': nets['Student'][0].register_forward_hook(lambda *_: None)
    plain = copy.deepcopy(nets)
    assert plain.runner is None
    for i in range(4):
        x = torch.randn(4,1,8,8, requires_grad=why=='gradient')
        torch.manual_seed(i)
        a = nets(x)
        torch.manual_seed(i)
        b = plain(x)
        for n in a: assert torch.allclose(a[n], b[n], atol=1e-6), n
    said = [r.getMessage() for r in caplog.records if 'not recorded' in r.getMessage()]
    assert len(said)==1 and dict(host='on the host', hook='hooks', gradient='gradient of a picture', broken='cannot be recorded')[why] in said[0]
    if why in ('host','broken'): assert [len(r.graphed) for r in nets.runner.kept.values()]==[1]

def rec_pair():
    alphabet = Alphabet([*'abcdef'])
    set_seed(0)
    nets = Nets(dict(Teacher=small_rec(alphabet), Student=small_rec(alphabet)))
    sar = partial(sar_loss, ignore_index=len(SARClasses(alphabet.chars))-1)
    terms = [Term(ctc_loss, f'{n}.head_out.ctc', targets=[0,2], name=f'ctc_{n}') for n in nets.names]
    terms += [Term(sar, f'{n}.head_out.sar', targets=[1], name=f'sar_{n}') for n in nets.names]
    x,k = torch.randn(3,3,48,64),torch.tensor([2,3,1])
    ctc,sar_label = torch.randint(1, 6, (3,25)),torch.full((3,25), len(SARClasses(alphabet.chars))-1)
    sar_label[:,:4] = torch.randint(0, 6, (3,4))
    return nets,terms,x,(ctc, sar_label, k, torch.ones(3))

def test_with_targets():
    "Heads that are given the labels, LSTMs and attention are recorded with them"
    losses = []
    for runner in (None, Runner(record_net, warm=1)):
        nets,terms,x,yb = rec_pair()
        terms = Terms(nets.train(), terms)
        nets.runner = runner
        opt,row = torch.optim.Adam(nets.parameters(), 1e-3),[]
        for i in range(4):
            torch.manual_seed(i)
            loss = terms(nets(x+i/10, Targets(yb)), *yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            row.append(loss.item())
        losses.append(row)
    assert [*runner.kept.values()][0].graphed.keys()=={'Teacher','Student'}
    assert losses[0]==pytest.approx(losses[1], rel=1e-5)

def dls(): return DataLoaders(*[DataLoader([(torch.randn(1,8,8), i%5) for i in range(n)], bs=8) for n in (32,8)])

def test_learner():
    "The callback gives the runner and takes it away; evaluations and files never see it"
    learned = []
    for record in (None, record_net):
        set_seed(0)
        learn = distill_learner(dls(), dict(Teacher=net(), Student=net()), pair(), frozen='Teacher')
        learn.quick_steps.record = record
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
        assert learn.model.runner is None and pickle.loads(pickle.dumps(learn.model)).runner is None
        learned.append(learn.parts().values)
    assert learned[0]==pytest.approx(learned[1], rel=1e-5)

def test_plain_where_there_is_no_gpu():
    learn = distill_learner(dls(), dict(A=net()), [Term(F.cross_entropy, 'A')])
    assert learn.quick_steps._made(torch.device('cpu')) is None
    learn = distill_learner(dls(), dict(A=net()), [Term(F.cross_entropy, 'A')], compile=True)
    made = learn.quick_steps._made(torch.device('cpu'))
    assert made.record is None and made.compiled is compile_blocks
    made = learn.quick_steps._made(torch.device('cuda'))
    assert made.record is graphs.cuda_record and made.streams

def test_blocks():
    det,rec = small_det(),small_rec(Alphabet([*'ab']))
    assert {type(b).__name__ for b in blocks(det.backbone)}=={'MobileBlock','Sequential'} and len(blocks(rec.backbone))==14
    assert blocks(nn.Linear(2,2))==[]

def test_launches():
    "Views are not counted, what is changed in place is"
    x = torch.randn(3,4)
    with Launches() as seen: x.T[0].view(3).add_(1)
    assert dict(seen.counts)=={'add_':1} and seen.total==1

@pytest.mark.parametrize('seed', range(3))
def test_ctc(seed):
    "The same loss and gradient as PyTorch's, also where nothing can be written, and under autocast"
    g = torch.Generator().manual_seed(seed)
    x = (4*torch.randn(7,9,12,generator=g)).requires_grad_()
    y,n = torch.randint(1, 12, (7,6), generator=g),torch.tensor([0,1,2,3,5,6,6])
    y[3],y[6] = 4,4 # As often in a row as nine frames cannot write
    y[torch.arange(6)>=n[:,None]] = -1 if seed else 3 # Padded with anything
    a,b = Walks.apply(x, y, n),_torchs_ctc(x, y.clamp(min=0), n)
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5) and a[6]==0
    ga,gb = [torch.autograd.grad((o*torch.arange(1,8)).sum(), x)[0] for o in (a, b)]
    assert torch.allclose(ga, gb, rtol=1e-4, atol=1e-4)

def test_losses_in_float32():
    "CTC and SAR compute in float32 whatever comes in and whatever the autocast"
    x = torch.randn(2,9,12).bfloat16()
    y,n = torch.randint(1, 12, (2,4)),torch.tensor([3,4])
    sar = torch.randint(0, 11, (2,9))
    with torch.autocast('cpu', torch.bfloat16):
        got = [ctc_loss(x, y, n), Walks.apply(x.float(), y, n).mean(), sar_loss(x, sar, 11)]
    right = [ctc_loss(x.float(), y, n), ctc_loss(x.float(), y, n), sar_loss(x.float(), sar, 11)]
    for a,b in zip(got, right): assert a.dtype==torch.float32 and torch.allclose(a, b, rtol=1e-6)

def test_brief_teacher():
    "A teacher of whom terms read one map is asked for one; the losses are the same, also when another term wants all"
    from distillbook.det.losses import db_loss, dila_db, dml_maps
    set_seed(0)
    nets = Nets(dict(Student=small_det(), Teacher=small_det()), frozen=['Teacher']).train()
    x,y = torch.randn(2,3,64,64),[(torch.rand(2,64,64)>.5).float() for _ in range(4)]
    own = [Term(dila_db, 'Student.maps', 'Teacher.maps', targets=[3]), Term(db_loss, 'Student.maps')]
    terms = Terms(nets, own)
    before = terms(nets(x), *y)
    nets.train()
    terms.connect((x,), y)
    assert nets.brief=={'Teacher'} and nets.train()(x)['Teacher']['maps'].shape==(2,1,64,64)
    set_seed(0)
    again = Nets(dict(Student=small_det(), Teacher=small_det()), frozen=['Teacher']).train()
    terms = Terms(again, own)
    terms.connect((x,), y)
    assert torch.equal(terms(again.train()(x), *y), before)
    more = Terms(again, [*own, Term(dml_maps, 'Student.maps', 'Teacher.maps')])
    more.connect((x,), y)
    assert again.brief==set() and again.train()(x)['Teacher']['maps'].shape==(2,3,64,64)
    again.brief = {'Teacher'}
    again.unfreeze('Teacher')
    assert again(x)['Teacher']['maps'].shape==(2,3,64,64)

def wide_net(): return nn.Sequential(nn.Conv2d(1, 4, 1), conv_bn(4, 4, 5, groups=4), conv_bn(4, 4, 5, (2,1), groups=4), conv_bn(4, 4, 5, (1,2), groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

@pytest.mark.parametrize('bf16', [False, True])
def test_wide_depthwise(bf16):
    "In a fit on a CPU wide depthwise convolutions get their gradients by pairs; 20 steps end at the same weights, and the layers are as they were"
    from distillbook.depthwise import Depthwise
    from distillbook.precision import CPUBfloat16
    learned,kinds = [],[]
    for compile in (False, None):
        set_seed(0)
        data = DataLoaders(*[DataLoader([(torch.randn(1,8,8), i%5) for i in range(n)], bs=8) for n in (80,8)])
        learn = distill_learner(data, dict(A=wide_net().to(memory_format=torch.channels_last)), [Term(F.cross_entropy, 'A')], compile=compile, cbs=CPUBfloat16() if bf16 else None)
        seen = set()
        learn.net('A')[1]._conv.register_forward_hook(lambda m,*_: seen.add(type(m)))
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
        learned.append(torch.cat([p.flatten() for p in learn.model.parameters()]))
        kinds.append((Depthwise in seen, {type(m) for m in learn.model.modules()} & {Depthwise}))
    assert kinds==[(False, set()), (True, set())]
    assert torch.allclose(*learned, atol=2e-2 if bf16 else 1e-5)
