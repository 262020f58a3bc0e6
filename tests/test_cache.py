"A teacher's answers on disk: torn, shared, of another kind; and a training that cannot tell the difference"
import copy, json, pickle, random
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.basics import Callback, DataLoader, DataLoaders, set_seed
from fastai.callback.all import ProgressCallback
from torch import nn
from torch.utils.data import TensorDataset

from distillbook.cache import Answers, CachedNet, digest, flat, joined
from distillbook.core import UserError
from distillbook.learner import distill_learner
from distillbook.losses import distance, kd
from distillbook.terms import Term

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings('ignore')
class Counting(nn.Sequential):
    asked = 0
    def forward(self, x):
        self.asked += len(x)
        return super().forward(x)

@pytest.fixture
def x(): return torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
@pytest.fixture
def net():
    torch.manual_seed(0)
    return Counting(nn.Linear(4,5), nn.ReLU(), nn.Linear(5,3)).eval()
def rows(n, width=3, seed=0): return np.random.default_rng(seed).standard_normal((n, width), dtype='f4')
def kept(ks, vs): return {k: {'': v} for k,v in zip(ks, vs)}
def found(a): return {k: a.get(k)[''] for k in [*a.offsets]}
def keys(n, start=0): return [digest(torch.tensor([float(i)])) for i in range(start, start+n)]

# ---- keys

def test_keys_tell_numbers_shape_and_type_apart():
    a = torch.arange(4.)
    others = [a+1, a.view(2,2), a.view(1,4), a.double(), a.int(), a.half(), a.bool(), torch.zeros(4), torch.zeros(0), torch.zeros(0,4), torch.tensor(0.)]
    assert len({digest(o) for o in [a, *others]})==1+len(others) and all(len(digest(o))==16 for o in others)
    assert digest(a)==digest(a.clone())==digest(torch.stack([a,a],1)[:,0])==digest(a.clone().requires_grad_())
    assert digest(a)!=digest(a.view(torch.int32))

def test_a_key_for_bfloat16(): assert len(digest(torch.zeros(4, dtype=torch.bfloat16)))==16

# ---- the file

def test_cut_anywhere(tmp_path):
    f = tmp_path/'a.bin'
    a,ks,vs = Answers(f, 'A'),keys(4),rows(4)
    for k,v in zip(ks, vs): a.add(kept([k], [v]))
    whole = f.read_bytes()
    head = len(a.first_line)
    item, = {(len(whole)-head)/4}
    for n in range(len(whole)+1):
        f.write_bytes(whole[:n])
        a = Answers(f, 'A')
        left = max(0, int((n-head)//item))
        assert {*a.offsets}=={*ks[:left]} and all((a.get(k)['']==v).all() for k,v in zip(ks[:left], vs))
        assert f.read_bytes()==whole[:n] # Looking changes nothing
        a.add(kept(ks[left:] or keys(1,99), vs[left:] if left<4 else rows(1)))
        again = Answers(f, 'A')
        assert all((again.get(k)['']==v).all() for k,v in zip(ks, vs)) and {*again.offsets}=={*a.offsets}

def test_about_another_teacher(tmp_path):
    f = tmp_path/'a.bin'
    Answers(f, 'A').add(kept(keys(2), rows(2)))
    b = Answers(f, 'B')
    assert not len(b) and len(Answers(f, 'A'))==2
    b.add(kept(keys(1), rows(1, width=7)))
    assert not len(Answers(f, 'A')) and len(Answers(f, 'B'))==1

def test_begun_anew_by_another_while_in_use(tmp_path):
    f = tmp_path/'a.bin'
    a = Answers(f, 'A')
    a.add(kept(keys(9), rows(9)))
    b = Answers(f, 'B')
    b.add(kept(keys(5, 50), rows(5, width=8)))
    assert all(a.get(k) is None for k in keys(9)) and not len(a)
    a.add(kept(keys(3), rows(3)))
    assert len(Answers(f, 'A'))==3 and all(b.get(k) is None for k in keys(5, 50))
    assert found(a).keys()=={*keys(3)} and all((a.get(k)['']==v).all() for k,v in zip(keys(3), rows(3)))

def test_the_file_is_taken_away_while_in_use(tmp_path):
    f = tmp_path/'a.bin'
    a = Answers(f, 'A')
    a.add(kept(keys(2), rows(2)))
    f.unlink()
    assert a.get(keys(1)[0]) is None
    a.add(kept(keys(2), rows(2)))
    assert len(Answers(f, 'A'))==2 and (a.get(keys(1)[0])['']==rows(2)[0]).all()

def test_a_file_of_the_former_format_is_begun_anew(tmp_path):
    f = tmp_path/'a.bin'
    f.write_bytes(Answers.mark+b'{"about": "A", "dtype": "<f4", "shape": [3]}\n'+b'0'*28)
    a = Answers(f, 'A')
    a.add(kept(keys(1), rows(1)))
    assert len(Answers(f, 'A'))==1

@pytest.mark.parametrize('content', [b'[]\n', b'1\n', b'"about"\n', b'{"about": 1}\n', b'{}\n', b'\xff\xfe\n', b'\n'])
def test_a_file_with_a_strange_head(content, tmp_path):
    f = tmp_path/'a.bin'
    f.write_bytes(content+b'0'*100)
    with pytest.raises(UserError, match='left as it is'): Answers(f)
    f.write_bytes(Answers.mark+content+b'0'*100)
    with pytest.raises(UserError, match='left as it is'): Answers(f)

def test_a_file_of_another_kind_is_not_overwritten(tmp_path):
    f = tmp_path/'weights.pth'
    torch.save(dict(w=torch.zeros(3)), f)
    was = f.read_bytes()
    with pytest.raises(UserError): Answers(f, 'A').add(kept(keys(1), rows(1)))
    assert f.read_bytes()==was

@pytest.mark.parametrize('shape', ((), (3,), (2,3), (0,)))
@pytest.mark.parametrize('kind', ('f4','f8','i8','f2'))
def test_answers_of_every_shape_and_type(shape, kind, tmp_path):
    a,v = Answers(tmp_path/'a.bin'),np.full(shape, 7, kind)
    a.add({k: {'maps': v, 'b.c': v+1} for k in keys(2)})
    for k in keys(2):
        got = Answers(tmp_path/'a.bin').get(k)
        assert [(n, o.shape, o.dtype) for n,o in got.items()]==[('maps', shape, v.dtype), ('b.c', shape, v.dtype)]
        assert (got['maps']==7).all() and (got['b.c']==8).all()

def test_shapes_may_differ_and_order_of_memory_does_not_count(tmp_path):
    a,v = Answers(tmp_path/'a.bin'),np.arange(6, dtype='f4').reshape(2,3)
    a.add(kept(keys(3), (v, v.T, v[:,::2])))
    for k,o in zip(keys(3), (v, v.T, v[:,::2])): assert (Answers(tmp_path/'a.bin').get(k)['']==o).all()

def test_only_places_are_held_in_memory(tmp_path):
    a = Answers(tmp_path/'a.bin')
    a.add(kept(keys(2), rows(2, width=10000)))
    assert len(pickle.dumps(a))<1000 and (copy.deepcopy(a).get(keys(1)[0])['']==a.get(keys(1)[0])['']).all()

def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'plain').write_text('')
    with pytest.raises(UserError, match='could not be written'): Answers(tmp_path/'plain'/'a.bin').add(kept(keys(1), rows(1)))

def test_bits_that_flipped_in_a_record(tmp_path):
    "A damaged record is a lost one, or at worst one of other numbers; never an error"
    f = tmp_path/'a.bin'
    a = Answers(f, 'A')
    a.add(kept(keys(2), rows(2)))
    whole,rng = f.read_bytes(),random.Random(0)
    for _ in range(200):
        i = rng.randrange(len(a.first_line), len(whole))
        f.write_bytes(whole[:i]+bytes([whole[i]^(1<<rng.randrange(8))])+whole[i+1:])
        b = Answers(f, 'A')
        for k in keys(2): assert (o := b.get(k)) is None or isinstance(o, dict)
        b.add(kept(keys(1, 7), rows(1)))
        assert (Answers(f, 'A').get(keys(1, 7)[0])['']==rows(1)).all() or len(Answers(f, 'A'))<3

# ---- answers as dicts

@pytest.mark.parametrize('answer', (torch.ones(2,3), dict(maps=torch.ones(2,1,4,4)), dict(a=dict(b=torch.ones(2), c=dict(d=torch.zeros(2,1))), e=torch.ones(2,2))))
def test_taken_apart_and_joined(answer):
    def same(a, b): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a) if isinstance(a, dict) else torch.equal(a, b)
    assert same(joined({k: torch.from_numpy(v) for k,v in flat(answer).items()}), answer)

@pytest.mark.parametrize('answer,where', ((None, 'NoneType'), ([torch.ones(1)], 'list'), ({}, 'dict'), (dict(maps=(1,)), 'tuple at maps'), (dict(a=dict(b='x')), 'str at a.b')))
def test_answers_that_cannot_be_kept(answer, where):
    with pytest.raises(UserError, match=where): flat(answer)

# ---- the net

def test_two_nets_on_one_file(net, x, tmp_path):
    a,b = (CachedNet(net, tmp_path/'c.bin', 'n').eval() for _ in range(2))
    want = net(x).detach()
    for c,part in ((a, slice(0,4)), (b, slice(2,8)), (a, slice(6,12)), (b, slice(0,12))): torch.testing.assert_close(c(x[part]), want[part])
    later = CachedNet(net, tmp_path/'c.bin', 'n').eval()
    torch.testing.assert_close(later(x), want)
    assert len(later.answers)==12

def test_two_nets_on_one_new_file_lose_nothing(net, x, tmp_path):
    a,b = (CachedNet(net, tmp_path/'c.bin', 'n').eval() for _ in range(2))
    a(x[:6]), b(x[6:])
    assert len(Answers(tmp_path/'c.bin', 'n'))==12

def test_the_same_picture_twice_in_a_batch(net, x, tmp_path):
    c = CachedNet(net, tmp_path/'c.bin').eval()
    twice = x[[0,1,0,2,2,0]]
    torch.testing.assert_close(c(twice), net(twice).detach())
    torch.testing.assert_close(CachedNet(net, tmp_path/'c.bin').eval()(twice), net(twice).detach())

def test_the_same_picture_twice_in_a_batch_is_asked_once(net, x, tmp_path):
    c = CachedNet(net, tmp_path/'c.bin').eval()
    net.asked = 0
    c(x[[0,1,0,2,2,0]])
    assert net.asked==3

def test_refuses_training(net, x, tmp_path):
    c = CachedNet(net, tmp_path/'c.bin')
    with pytest.raises(UserError, match='frozen'): c.train()(x)
    assert not c.eval()(x).requires_grad

def test_not_frozen_in_a_learner(net, tmp_path):
    with pytest.raises(UserError, match='frozen'): made(CachedNet(net, tmp_path/'c.bin'), frozen=())

def made(teacher, frozen='Teacher', terms=None):
    set_seed(0)
    x = torch.randn(64,4)
    ds = TensorDataset(x, (x[:,0]>0).long())
    student = nn.Sequential(nn.Linear(4,6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6,3))
    learn = distill_learner(DataLoaders(DataLoader(ds, bs=16, shuffle=True), DataLoader(ds, bs=32)), dict(Teacher=teacher, Student=student), terms or [Term(F.cross_entropy,'Student'), Term(kd,'Student','Teacher')], frozen=frozen)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = lambda *_: None
    return learn

def test_the_same_training_as_without(net, tmp_path):
    def trained(teacher):
        learn = made(teacher)
        learn.fit_one_cycle(3, 1e-2)
        return learn.net('Student').state_dict(),learn.parts()
    runs = [trained(t) for t in (net, CachedNet(net, tmp_path/'c.bin', 'n'), CachedNet(net, tmp_path/'c.bin', 'n'))]
    net.asked = 0
    runs.append(trained(CachedNet(net, tmp_path/'c.bin', 'n')))
    assert net.asked==0
    for s,p in runs[1:]:
        for k,v in s.items(): torch.testing.assert_close(v, runs[0][0][k], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(p, runs[0][1], rtol=1e-4)

def test_the_teachers_weights_are_in_the_state_under_its_name(net, tmp_path):
    learn = made(CachedNet(net, tmp_path/'c.bin'))
    assert 'Teacher.net.0.weight' in learn.model.state_dict()

def test_a_tap_inside_a_cached_teacher_is_refused_clearly(net, tmp_path):
    with pytest.raises(UserError, match=r'Teacher\.net\.1 did not run in this batch: the answers of the network are kept'):
        made(CachedNet(net, tmp_path/'c.bin'), terms=[Term(distance,'Student.2','Teacher.net.1')])


def test_several_processes_add_to_one_file(tmp_path):
    "Ranks of one job write the same file at once: every record is whole, and none is there twice"
    import subprocess, sys
    code = """
import sys, numpy as np
from distillbook.cache import Answers
a,who = Answers(sys.argv[1], 'x'),int(sys.argv[2])
for i in range(40): a.add({bytes([k, who if k%2 else 9]*8): {'': np.full(1000, k, np.float32)} for k in (2*i, 2*i+1)})
"""
    jobs = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'a.bin'), str(w)]) for w in range(3)]
    assert [p.wait(timeout=120) for p in jobs]==[0]*3
    a = Answers(tmp_path/'a.bin', 'x')
    assert not a.scan() and len(a)==40+3*40
    assert all((a.get(k)['']==k[0]).all() and a.get(k)[''].shape==(1000,) for k in list(a.offsets))
    assert (tmp_path/'a.bin').stat().st_size < len(a)*4100+200

# ---- the alarm: answers that are kept in vain

class Noisy(torch.utils.data.Dataset):
    "Pictures with noise that repeats itself after `variants` epochs, or never"
    def __init__(self, noise=True, variants=None, n=32): self.x,self.noise,self.variants,self.epoch = torch.randn(n,4),noise,variants,0
    def __len__(self): return len(self.x)
    def __getitem__(self, i):
        e = self.epoch%self.variants if self.variants else self.epoch
        return self.x[i]+(torch.randn(4, generator=torch.Generator().manual_seed(1000*e+i)) if self.noise else 0.),(self.x[i,0]>0).long()

class NextEpoch(Callback):
    def after_train(self): self.dls.train.dataset.epoch += 1

class EvalInside(Callback):
    "Evaluates in the middle of an epoch, as PaddleOCR's eval_batch_step wants it"
    def after_batch(self):
        if self.training and self.iter==1:
            self.learn.model.eval()
            self.learn.model(self.dls.valid.one_batch()[0])
            self.learn.model.train()

def watched(teacher, data, cbs=()):
    student = nn.Sequential(nn.Linear(4,6), nn.Linear(6,3))
    dls = DataLoaders(DataLoader(data, bs=8, shuffle=True), DataLoader(Noisy(False), bs=32))
    learn = distill_learner(dls, dict(Teacher=teacher, Student=student), [Term(kd,'Student','Teacher')], frozen='Teacher', cbs=[NextEpoch(), EvalInside(), *cbs])
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = lambda *_: None
    return learn

@pytest.fixture
def alarms(caplog):
    with caplog.at_level('WARNING', 'distillbook'): yield lambda: sum('kept in vain' in r.message for r in caplog.records)

def test_noise_is_told_once(net, alarms, tmp_path):
    learn = watched(CachedNet(net, tmp_path/'c.bin'), Noisy())
    learn.fit(1, 1e-2)
    assert alarms()==0
    learn.fit(1, 1e-2)
    assert alarms()==1
    learn.fit(3, 1e-2)
    assert alarms()==1

def test_fixed_pictures_raise_no_alarm(net, alarms, tmp_path):
    for _ in range(2): watched(CachedNet(net, tmp_path/'c.bin'), Noisy(False)).fit(3, 1e-2)
    assert alarms()==0

def test_a_second_learner_with_new_pictures_raises_no_false_alarm(net, alarms, tmp_path):
    "The answers kept meet a fixed set that nobody has seen"
    teacher = CachedNet(net, tmp_path/'c.bin')
    for _ in range(3): watched(teacher, Noisy(False)).fit(2, 1e-2)
    assert alarms()==0 and len(teacher.answers)==3*32+32*3

def test_a_new_set_in_the_same_learner_raises_no_false_alarm(net, alarms, tmp_path):
    learn = watched(CachedNet(net, tmp_path/'c.bin'), Noisy(False))
    learn.fit(3, 1e-2)
    learn.dls = DataLoaders(DataLoader(Noisy(False), bs=8), learn.dls.valid)
    learn.fit(3, 1e-2)
    assert alarms()==0
    learn.dls = DataLoaders(DataLoader(Noisy(), bs=8), learn.dls.valid)
    learn.fit(3, 1e-2)
    assert alarms()==1

def test_a_true_alarm_of_a_second_learner_is_not_swallowed(net, alarms, tmp_path):
    teacher = CachedNet(net, tmp_path/'c.bin')
    for i in range(3):
        watched(teacher, Noisy()).fit(3, 1e-2)
        assert alarms()==i+1

def test_two_learners_in_turns(net, alarms, tmp_path):
    teacher = CachedNet(net, tmp_path/'c.bin')
    fixed,noisy = watched(teacher, Noisy(False)),watched(teacher, Noisy())
    for i in range(3):
        fixed.fit(1, 1e-2), noisy.fit(1, 1e-2)
        assert alarms()==int(i>0)

@pytest.mark.parametrize('variants,n_epoch,want', [(2,4,0), (3,7,0), (1,3,0), (None,2,1)])
def test_a_set_that_repeats_its_chance(variants, n_epoch, want, net, alarms, tmp_path):
    watched(CachedNet(net, tmp_path/'c.bin'), Noisy(variants=variants)).fit(n_epoch, 1e-2)
    assert alarms()==want

def test_one_of_two_teachers_is_asked_in_vain(net, alarms, tmp_path):
    class Drawing(nn.Module):
        "It adds noise of its own before it asks"
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x): return self.net(x+torch.rand(1))
    student = nn.Sequential(nn.Linear(4,3))
    dls = DataLoaders(DataLoader(Noisy(False), bs=8), DataLoader(Noisy(False), bs=32))
    nets = dict(T=CachedNet(net, tmp_path/'c.bin'), U=Drawing(CachedNet(net, tmp_path/'d.bin')), Student=student)
    learn = distill_learner(dls, nets, [Term(kd,'Student','T'), Term(kd,'Student','U')], frozen=['T','U'])
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    assert alarms()==1

def test_the_rate_finder_is_no_epoch(net, alarms, tmp_path):
    learn = watched(CachedNet(net, tmp_path/'c.bin'), Noisy(False))
    for _ in range(3): learn.lr_find(num_it=12, show_plot=False)
    learn.fit(1, 1e-2)
    assert alarms()==0

def test_a_learner_without_a_cache_watches_none(net): assert not any(cb.name=='watch_cache' for cb in made(net).cbs)
