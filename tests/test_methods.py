"The catalogue of distillation: each loss against its formula written out in numpy, its gradients, its row in a configuration, and those that learn in a run"
import copy, inspect, itertools, math
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from scipy.special import log_softmax, softmax
from scipy.stats import norm as normal
from torch import nn
from torch.autograd import gradcheck

from distillbook.balance import Pull, Ratio, RunningMean, Uncertainty
from distillbook.config.losses import build_loss, build_terms
from distillbook.config.registry import LOSSES, PROJECTORS, WEIGHTS
from distillbook.core import UserError
from distillbook.features import _on_places, attention_of, cwd, fgd, ofd, ofd_margin, pkd, pyramid, weighted_distance
from distillbook.learned import CRD, CTKD, Ensemble, Generation, Orthogonal, Reused, ReviewKD, VID
from distillbook.logits import correlations, ensemble, kd_ensemble, mlkd, nkd, ttm, uskd, wsl, wttm
from distillbook.losses import attention_transfer, cosine, dist, distance, dkd, dml, kd, standardised
from distillbook.nets import Nets
from distillbook.rec.frames import by_character, ctc_aligned, ctc_kd, ctc_nbest, ctc_pseudo, dctc, nbest, own_alignment, readings
from distillbook.rec.losses import Walks, ctc_loss
from distillbook.rec.nrtr import attention_kl
from distillbook.rec.sar import SARHead
from distillbook.relations import angles, distances, itrd, itrd_correlation, itrd_mutual, pkt, rkd, rkd_angle, rkd_distance, sp
from distillbook.terms import Term, Terms

torch.set_num_threads(1)
Y = torch.tensor([0,4,2,1,1,3])
EACH = range(6)

def randn(*shape, seed=0, scale=1.): return scale*torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def logits(): return randn(6, 5, seed=1, scale=2.),randn(6, 5, seed=2, scale=2.)
def numpys(*xs): return [x.detach().numpy() for x in xs]
def close(got, want, rtol=1e-8): np.testing.assert_allclose(np.asarray(got.detach() if isinstance(got, torch.Tensor) else got), want, rtol=rtol, atol=rtol*np.abs(want).max())
def np_kl(p, q): return (p*(np.log(p)-np.log(q))).sum(-1)

# ---- logits

def np_standard(z): return (z-z.mean(-1, keepdims=True))/(z.std(-1, ddof=1, keepdims=True)+1e-7)

@pytest.mark.parametrize('name', ('kd','dml','dist','dkd','nkd','wsl','ttm','wttm','mlkd_rows'))
def test_standardise_is_the_loss_of_standardised_logits(name):
    f = dict(kd=kd, dml=dml, dist=dist, ttm=ttm, wttm=wttm, mlkd_rows=partial(mlkd, batch=0., classes=0.),
        **{g.__name__: partial(g, targets=Y) for g in (dkd, nkd, wsl)})[name]
    s,t = logits()
    close(f(s, t, standardise=True), f(*[torch.tensor(np_standard(o.numpy())) for o in (s, t)]).item())
    close(f(7*s+3, t/2, standardise=True), f(s, t, standardise=True).item(), 1e-6)

def test_standardise_of_padding_has_a_gradient():
    s = torch.zeros(2,3,5, requires_grad=True)
    kd(s, randn(2,3,5).float(), mask=torch.tensor([[1,0,1]]*2), standardise=True).backward()
    assert s.grad.isfinite().all()

@pytest.mark.parametrize('odd', (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize('f', (kd, dml, dist, dkd, nkd, wsl, ttm, wttm, mlkd, kd_ensemble), ids=lambda f: f.__name__)
def test_standardised_padding_may_hold_anything(f, odd):
    mask = torch.tensor([[1,1,0],[1,0,1]])
    s,t = randn(2,3,5, seed=1),randn(2,3,5, seed=2)
    key = dict(targets=torch.tensor([[1,4,-100],[0,-100,2]])) if f in (dkd, nkd, wsl) else dict(mask=mask)
    want = f(s, t, **key, standardise=True)
    for o in (s, t): o[mask==0] = odd
    s.requires_grad_()
    got = f(s, t, **key, standardise=True)
    got.backward()
    close(got, want.item())
    assert s.grad.isfinite().all() and s.grad.abs().sum()>0

@pytest.mark.parametrize('T,gamma', ((1.,1.5), (3.,.7)))
def test_nkd_written_out(T, gamma):
    s,t = numpys(*logits())
    total = 0
    for i in EACH:
        y,rest = Y[i].item(),[c for c in range(5) if c!=Y[i]]
        total -= softmax(t[i])[y]*log_softmax(s[i])[y]
        total -= gamma*T**2*(softmax(t[i,rest]/T)*log_softmax(s[i,rest]/T)).sum()
    close(nkd(*logits(), Y, gamma, T), total/6)

def test_wsl_written_out():
    s,t = numpys(*logits())
    total = 0
    for i in EACH:
        w = 1-np.exp(-log_softmax(s[i])[Y[i]]/(log_softmax(t[i])[Y[i]]-1e-7))
        total -= w*(softmax(t[i]/2)*log_softmax(s[i]/2)).sum()
    close(wsl(*logits(), Y), 4*total/6)

def test_ttm_and_wttm_written_out():
    s,t = numpys(*logits())
    power = softmax(t, -1)**.2
    U = power.sum(-1, keepdims=True)
    each = np_kl(power/U, softmax(s, -1))
    close(ttm(*logits(), T=5.), each.mean())
    close(wttm(*logits(), T=5.), (U[:,0]*each).mean())

def test_mlkd_written_out():
    s,t = logits()
    total = 0
    for T in (2.,4.):
        q,p = [softmax(o.numpy()/T, -1) for o in (s, t)]
        total += 3*T**2*np_kl(p, q).mean() + .5*((q@q.T-p@p.T)**2).sum()/6 + 2*((q.T@q-p.T@p)**2).sum()/5
    close(mlkd(s, t, (2.,4.), 3., .5, 2.), total)
    some = torch.tensor([1,1,0,1,0,1])
    close(mlkd(s, t, mask=some), mlkd(s[some==1], t[some==1]).item())

def test_uskd_written_out():
    s,w = numpys(*logits())
    q,v = softmax(s, -1),softmax(w, -1)
    total = 0
    for i in EACH:
        y,rest = Y[i].item(),[c for c in range(5) if c!=Y[i]]
        sure = q[EACH,Y]**2
        total -= (sure[i]+1-sure.mean())*np.log(q[i,y])
        marks = q[i]/(1-q[i,y]+1e-6) + v[i]/(1-v[i,y]+1e-6)
        z = np.array([1/(1+(marks>marks[c]).sum()) for c in rest])
        total -= .1*(z/z.sum()*log_softmax(s[i,rest])).sum()
        total -= .005*(.9*np.log(v[i,y]) + .1*np.log(v[i]).mean())
    close(uskd(*logits(), Y), total/6)

def test_ensembles():
    s,t = logits()
    u = randn(6, 5, seed=9)
    p = (3*softmax(t.numpy()/2, -1) + softmax(u.numpy()/2, -1))/4
    close(kd_ensemble(s, t, u, weights=[3,1], T=2.), 4*np_kl(p, softmax(s.numpy()/2, -1)).mean(), 1e-6)
    close(kd_ensemble(s, t, t, T=3., standardise=True), kd(s, t, T=3., standardise=True).item(), 1e-6)
    for weights in ([1], [1,-1], [0,0]):
        with pytest.raises(UserError, match='a weight of 0 or more'): ensemble(s, t, weights=weights)

def test_an_ensemble_wants_to_know_where_the_classes_are_as_kd_does():
    s,t,u = [randn(2,5,3,4, seed=i) for i in EACH[:3]]
    for f in (kd, kd_ensemble):
        with pytest.raises(UserError, match=f'{f.__name__}: which axis'): f(s, t)
    mask = torch.tensor([1,0,1,1]).expand(2,3,4)
    last = [o.movedim(1, -1) for o in (s, t, u)]
    close(kd_ensemble(s, t, u, dim=1, mask=mask, weights=[1,3]), kd_ensemble(*[o.flatten(1,2) for o in last], mask=mask.flatten(1), weights=[1,3]).item())
    close(kd_ensemble(s, t, dim=1), kd(s, t, dim=1).item())
    with pytest.raises(UserError, match='kd_ensemble wants two outputs of the same shape'): kd_ensemble(s, t, u[:1], dim=1)
    with pytest.raises(UserError, match='each of 0 teachers'): kd_ensemble(s)

@pytest.mark.parametrize('f', (kd, dml, dist, dkd, nkd, wsl, ttm, wttm, mlkd, kd_ensemble, uskd), ids=lambda f: f.__name__)
def test_one_class_is_no_question(f):
    "A softmax of one number is 1 whatever it is: the loss of a map [N,1,H,W] would be 0 for any two"
    x,key = randn(4,1),dict(targets=torch.zeros(4, dtype=torch.long)) if f in (dkd, nkd, wsl, uskd) else {}
    with pytest.raises(UserError, match='one class has the probability 1 always'): f(x, x+1, **key)

# ---- relations

FEATURES = randn(7, 4, seed=3),randn(7, 6, seed=4)

def np_distances(x):
    d = np.array([[np.linalg.norm(a-b) for b in x] for a in x])
    return d/d[~np.eye(len(x), dtype=bool)].mean()

def np_huber(d): return np.where(np.abs(d)<1, d**2/2, np.abs(d)-.5).mean()

def test_relations_written_out():
    a,b = numpys(*FEATURES)
    def rows(x): return (x@x.T)/np.linalg.norm(x@x.T, axis=1, keepdims=True)
    close(sp(*FEATURES), ((rows(a)-rows(b))**2).sum()/49)
    close(rkd_distance(*FEATURES), np_huber(np_distances(a)-np_distances(b)), 1e-6)
    def at(x, i, j, k):
        u,v = x[j]-x[i],x[k]-x[i]
        n = np.linalg.norm(u)*np.linalg.norm(v)
        return u@v/n if n else 0.
    def np_angles(x): return np.array([at(x, *o) for o in itertools.product(range(7), repeat=3)])
    close(rkd_angle(*FEATURES), np_huber(np_angles(a)-np_angles(b)), 1e-6)
    close(rkd(*FEATURES, 2., 3.), 2*rkd_distance(*FEATURES).item()+3*rkd_angle(*FEATURES).item())
    def cond(x):
        u = x/np.linalg.norm(x, axis=1, keepdims=True)
        k = (u@u.T+1)/2
        return k/k.sum(1, keepdims=True)
    close(pkt(*FEATURES), (cond(b)*np.log(cond(b)/cond(a))).mean(), 1e-5)

def test_itrd_written_out():
    a,b = numpys(randn(9, 4, seed=3), randn(9, 4, seed=4))
    c = np.array([((x-x.mean())/x.std(ddof=1)*(z-z.mean())/z.std(ddof=1)).sum()/9 for x,z in zip(a.T, b.T)])
    close(itrd_correlation(torch.tensor(a), torch.tensor(b)), np.log2((np.abs(c-1)**2.02).sum()))
    def gram(x): return (u := x/np.linalg.norm(x, axis=1, keepdims=True))@u.T
    gs,both = gram(a),gram(a)*gram(b)
    close(itrd_mutual(torch.tensor(a), torch.tensor(b)), ((gs/9)**2).sum()-((both/np.trace(both))**2).sum())

@pytest.mark.parametrize('value', (0., 1.))
@pytest.mark.parametrize('f', (sp, rkd, rkd_distance, rkd_angle, pkt, itrd_mutual, itrd_correlation, itrd, pkd), ids=lambda f: f.__name__)
def test_one_picture_has_no_relations(f, value):
    "The last batch of an epoch may be one picture: 0, with a way back for the gradient"
    x = torch.full((1,4), value, requires_grad=True)
    loss = f(x, torch.randn(1,4))
    loss.backward()
    assert x.grad.isfinite().all() and (loss==0 or f is sp and value==0) # To sp nothing is like itself

@pytest.mark.parametrize('f', (sp, rkd, pkt, itrd_mutual), ids=lambda f: f.__name__)
def test_relations_of_any_width_flatten(f):
    a,b = FEATURES
    close(f(a.view(7,2,2), b.view(7,3,2,1)), f(a, b).item())
    with pytest.raises(UserError, match='features of one batch'): f(a, b[:3])

@pytest.mark.parametrize('f', (sp, rkd, pkt, itrd_mutual, itrd_correlation), ids=lambda f: f.__name__)
def test_two_equal_pictures_have_gradients(f):
    x = torch.ones(4, 5)
    x[0] = 2
    x.requires_grad_()
    f(x, torch.randn(4, 5)).backward()
    assert x.grad.isfinite().all()

# ---- features

MAPS = randn(3, 4, 5, 6, seed=5),randn(3, 4, 5, 6, seed=6)

def test_cwd_and_pkd_written_out():
    s,t = numpys(*MAPS)
    want = [16*np_kl(softmax(t[n,c].ravel()/4), softmax(s[n,c].ravel()/4)) for n in range(3) for c in range(4)]
    close(cwd(*MAPS), np.mean(want))
    def standard(x): return (x-x.mean((0,2,3), keepdims=True))/(x.std((0,2,3), ddof=1, keepdims=True)+1e-6)
    close(pkd(*MAPS), ((standard(s)-standard(t))**2).mean()/2)
    close(cwd(*[o.flatten(2).mT for o in MAPS]), cwd(*MAPS).item())
    close(pkd(*[o.flatten(2).mT for o in MAPS]), pkd(*MAPS).item())

def test_one_place_has_no_pattern():
    "cwd and attention_transfer would be 0 for any two, and pkd divides by a deviation of one number"
    for a,b in [(torch.randn(3,4), torch.randn(3,4)), (torch.randn(3,1,4), torch.randn(3,1,4)), (torch.randn(3,4,1,1), torch.randn(3,4,1,1))]:
        with pytest.raises(UserError, match='has one place'): cwd(a, b)
        assert pkd(a, b)>0 and pkd(a[:1], b[:1])==0
    with pytest.raises(UserError, match='here is one'): attention_transfer(torch.randn(3,4,1,1), torch.randn(3,5,6,6))
    assert cwd(torch.randn(3,4,1,2), torch.randn(3,4,1,2))>0

def test_small_masks_are_means():
    "A line of text one pixel wide does not fall between the places of a small map"
    mask = torch.zeros(2,64,64)
    mask[:,:,20] = 1
    assert (_on_places(mask, torch.zeros(2,3,8,8))==torch.eye(8)[2]/8).all()
    s,t = randn(2,3,8,8),randn(2,3,8,8, seed=1)
    want = torch.zeros(2,8,8)
    want[:,:,2] = 1/8
    close(fgd(s, t, mask, alpha=1., beta=0., gamma=0.), fgd(s, t, want, alpha=1., beta=0., gamma=0.).item())
    close(weighted_distance(s, t, mask), (s-t)[...,2].square().mean().item())

def test_ofd_written_out():
    s,t = numpys(*MAPS)
    margin = np.array([-.5,-1.,0.,-.2])
    total = 0
    for i in np.ndindex(s.shape):
        a,b,m = s[i],t[i],margin[i[1]]
        if b>0: total += (a-b)**2
        elif b>m: total += (a-b)**2*(a>b)
        else: total += (a-m)**2*(a>m)
    close(ofd(*MAPS, torch.tensor(margin), 'sum'), total/3)
    close(ofd(*MAPS, torch.tensor(margin)), total/s.size)

@pytest.mark.parametrize('gamma,beta', ((1.,0.), (2.,1.), (-.5,-1.), (1.,4.)))
def test_the_margin_is_the_mean_below_zero(gamma, beta):
    bn = nn.BatchNorm2d(1)
    with torch.no_grad(): bn.weight[:],bn.bias[:] = gamma,beta
    g = abs(gamma)
    want = normal.expect(lambda z: z, loc=beta, scale=g, ub=0.)/normal.cdf(-beta/g) if beta/g<3.09 else -3*g
    close(ofd_margin(bn), want, 1e-4)

def test_weighted_distance_and_pyramid_written_out():
    s,t = numpys(*MAPS)
    w = np.abs(np.random.default_rng(0).standard_normal((3,5,6)))
    close(weighted_distance(*MAPS, torch.tensor(w)), (w*((s-t)**2).mean(1)).sum()/w.sum())
    two = torch.stack([torch.tensor(w), torch.tensor(w)/2], 1)
    close(weighted_distance(*MAPS, two), (w*((s-t)**2).mean(1)).sum()/w.sum())
    a,b = randn(2,3,8,8, seed=1),randn(2,3,8,8, seed=2)
    d = (a-b).numpy()
    def pooled(k): return d.reshape(2,3,k,8//k,k,8//k).mean((3,5))
    want = [(d**2).mean(), *((pooled(k)**2).mean() for k in (4,2,1))]
    close(pyramid(a, b), np.dot(want, [1,.5,.25,.125])/1.875)
    with pytest.raises(UserError, match='weights of places'): weighted_distance(*MAPS, torch.ones(2,5,6))

def test_fgd_written_out():
    s,t = numpys(*MAPS)
    mask = np.zeros((3,5,6))
    mask[:,1:3,2:4] = .25
    def attention(x):
        places = np.stack([softmax((np.abs(x[n]).mean(0)/.5).ravel()).reshape(5,6)*30 for n in range(3)])
        return places,4*softmax(np.abs(x).mean((2,3))/.5, -1)
    (ps,cs),(pt,ct) = attention(s),attention(t)
    back = (mask==0)/(mask==0).sum((1,2), keepdims=True)
    each = pt[:,None]*ct[:,:,None,None]*(s-t)**2
    want = .1*(mask[:,None]*each).sum() + .2*(back[:,None]*each).sum() + .3*(np.abs(ps-pt).sum()+np.abs(cs-ct).sum())
    close(fgd(*MAPS, torch.tensor(mask), alpha=.1, beta=.2, gamma=.3), want/3)
    for a,axes in zip(attention_of(MAPS[0]), ((1,2),(1,))): close(a.mean(axes), np.ones(3))

# ---- gradients of all of them, and other types

PAIRS = dict(nkd=partial(nkd, targets=Y), wsl_T=lambda s,t: wsl(s, t, Y), ttm=ttm, wttm=wttm, mlkd=mlkd, kd_standardised=partial(kd, standardise=True), ensemble=lambda s,t: kd_ensemble(s, t, t.flip(0)))
VECTORS = dict(sp=sp, rkd=rkd, pkt=pkt, itrd_correlation=itrd_correlation, itrd_mutual=itrd_mutual)
DENSE = dict(cwd=cwd, pkd=pkd, ofd=ofd, pyramid=pyramid, weighted=lambda s,t: weighted_distance(s, t, t.abs()), fgd=lambda s,t: fgd(s, t, (t[:,0]>0).double()))
CASES = [(k, f, 'logits') for k,f in PAIRS.items()] + [(k, f, 'vectors') for k,f in VECTORS.items()] + [(k, f, 'maps') for k,f in DENSE.items()]
def inputs(kind): return dict(logits=logits(), vectors=(randn(6,4,seed=7), randn(6,4,seed=8)), maps=[o[:2,:3,:4,:4] for o in MAPS])[kind]

@pytest.mark.parametrize('name,f,kind', [c for c in CASES if c[0]!='wsl_T'], ids=[c[0] for c in CASES if c[0]!='wsl_T']) # wsl has a weight without gradient
def test_gradients(name, f, kind):
    s,t = inputs(kind)
    assert gradcheck(lambda s: f(s, t), s.clone().requires_grad_(), atol=1e-4)

@pytest.mark.parametrize('name,f,kind', CASES, ids=[c[0] for c in CASES])
def test_half_precision_is_computed_in_float32(name, f, kind):
    s,t = [o.half() for o in inputs(kind)]
    loss = f(s.clone().requires_grad_(), t)
    assert loss.dtype==torch.float32 and loss.ndim==0
    close(loss, f(s.float(), t.float()).item(), 1e-5)

@pytest.mark.parametrize('name,f', [c[:2] for c in CASES if c[2]!='vectors'], ids=[c[0] for c in CASES if c[2]!='vectors'])
def test_the_teacher_is_detached(name, f):
    if name=='pyramid': return # Which compares two maps alike
    s,t = [o.clone().requires_grad_() for o in inputs('logits' if name in PAIRS else 'maps')]
    f(s, t).backward()
    assert t.grad is None and s.grad.abs().sum()>0

# ---- losses that learn

def two(): return Nets(dict(Teacher=mlp(12), Student=mlp(5)), frozen=['Teacher'])
def mlp(h): return nn.Sequential(nn.Linear(8, h), nn.ReLU(), nn.Linear(h, 5))
def connected(nets, terms, x, *y):
    loss = Terms(nets, terms)
    loss.connect((x,), y)
    return loss
X,NUMBERS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)),torch.arange(6)

def test_vid_written_out():
    vid = VID((6,4), (6,3), variance=2.).double()
    s,t = randn(6,4),randn(6,3, seed=1)
    mean = vid.mean(s).detach().numpy()
    close(vid(s, t), (((mean-t.numpy())**2)/2 + np.log(2.)).mean()/2)
    maps = VID((2,4,6,6), (2,3,3,3))
    assert maps(torch.randn(2,4,6,6), torch.randn(2,3,3,3)).ndim==0 and VID((2,9,4), (2,5,3))(torch.randn(2,9,4), torch.randn(2,5,3)).ndim==0

def test_crd_written_out():
    torch.manual_seed(0)
    crd = CRD((3,4), (3,5), n=10, dim=6, negatives=2, T=.5).double()
    s,t,i,others = randn(3,4),randn(3,5, seed=1),torch.tensor([7,0,3]),torch.tensor([[1,2],[3,3],[9,0]])
    def unit(x): return x/np.linalg.norm(x, axis=-1, keepdims=True)
    es,et = unit(crd.embed_s(s).detach().numpy()),unit(crd.embed_t(t).detach().numpy())
    ms,mt = crd.memory_s.numpy().copy(),crd.memory_t.numpy().copy()
    of = np.concatenate([i[:,None], others], 1)
    total = 0
    for e,m in ((es, mt), (et, ms)):
        h = np.exp((m[of]*e[:,None]).sum(-1)/.5)
        h = h/(h.mean()*10)
        total -= (np.log(h[:,0]/(h[:,0]+.2+1e-7)).sum() + np.log(.2/(h[:,1:]+.2+1e-7)).sum())/3
    close(crd(s, t, i, others), total)
    ms[i] = unit(.5*ms[i]+.5*es)
    close(crd.memory_s, ms)
    before = crd.memory_t.clone()
    crd.eval()(s, t, i, others)
    assert torch.equal(before, crd.memory_t)
    for odd in (10, -1):
        with pytest.raises(UserError, match=f'picture number {odd}, and n=10 says that the training set has the numbers 0 to 9'): crd(s, t, torch.tensor([1,2,odd]))
    for wrong in (torch.tensor([1,2]), torch.tensor([1.,2.,3.])):
        with pytest.raises(UserError, match='3 whole numbers for a batch of 3'): crd(s, t, wrong)

def test_crd_is_for_training_only():
    "In validation the numbers are those of other pictures"
    nets = two()
    loss = connected(nets, [Term(partial(CRD, n=6, dim=4, negatives=3), 'Student.1', 'Teacher.1', targets=[0], name='crd'), Term(kd, 'Student', 'Teacher', name='kd')], X, NUMBERS)
    assert loss.train_only=={'crd'}
    before = copy.deepcopy(nets.state_dict())
    loss(nets.eval()(X), NUMBERS+100)
    assert list(loss.parts)==['kd'] and all(torch.equal(v, before[k]) for k,v in nets.state_dict().items())
    loss(nets.train()(X), NUMBERS)
    assert list(loss.parts)==['crd','kd']

def test_a_memory_is_of_one_rank(monkeypatch):
    "Refused before the first step, on any of several ranks"
    from fastai.basics import DataLoader, DataLoaders
    from torch.utils.data import TensorDataset
    import distillbook.devices as devices
    from distillbook.learner import distill_learner
    data = TensorDataset(X, NUMBERS)
    dls = DataLoaders(DataLoader(data, bs=6), DataLoader(data, bs=6))
    def learner(*terms): return distill_learner(dls, dict(Teacher=mlp(12), Student=mlp(5)), list(terms), frozen='Teacher', cbs=devices.Ranks(None))
    monkeypatch.setattr(devices, 'num_distrib', lambda: 2)
    learn = learner(Term(kd, 'Student', 'Teacher'), Term(partial(CRD, n=6, dim=4, negatives=3), 'Student.1', 'Teacher.1', targets=[0], name='crd'))
    with learn.no_bar(), pytest.raises(UserError, match="term 'crd' keeps a memory of all pictures, and each rank would have another one: train with one rank"): learn.fit(1)
    with learner(Term(kd, 'Student', 'Teacher')).no_bar() as other, pytest.raises(AttributeError): other.fit(1) # Comes as far as the group of ranks, of which there is none

def test_reviewkd_of_one_layer_and_odd_numbers():
    review = ReviewKD((2,4,6,6), (2,8,3,3)).eval()
    s,t = torch.randn(2,4,6,6),torch.randn(2,8,3,3)
    f = review.fusions[0]
    want = pyramid(f.widen(F.interpolate(f.narrow(s), (3,3), mode='nearest')), t)
    close(review(s, t), want.item(), 1e-5)
    with pytest.raises(UserError, match='as many layers'): ReviewKD((2,4), (2,4), (2,4))

def test_reviewkd_of_sequences_is_that_of_maps_of_one_row():
    s,t = torch.randn(2,7,4),torch.randn(2,5,6)
    torch.manual_seed(0)
    a = ReviewKD(s.shape, t.shape)
    torch.manual_seed(0)
    b = ReviewKD((2,4,1,7), (2,6,1,5))
    close(a(s, t), b(s.mT[:,:,None], t.mT[:,:,None]).item(), 1e-5)
    nets = Nets(dict(Teacher=nn.Linear(3,6), Student=nn.Linear(3,4)), frozen=['Teacher'])
    loss = connected(nets, [Term(ReviewKD, 'Student', 'Teacher')], torch.randn(2,7,3))
    assert loss(nets(torch.randn(2,7,3))).isfinite()

def test_ctkd_goes_against_the_student():
    s,t = randn(8,5, scale=3.),randn(8,5, seed=1, scale=3.)
    loss = CTKD(ramp=1).double()
    close(loss(s, t), kd(s, t, loss.temperature().item()).item())
    loss(s, t).backward()
    theta = loss.theta.detach().requires_grad_()
    kd(s, t, 1+20*theta.sigmoid()).backward()
    close(loss.theta.grad, -theta.grad.item())
    assert loss.steps==2 and CTKD(ramp=9).eval()(s.float(), t.float())>0

@pytest.mark.parametrize('projector', (Ensemble, Orthogonal, partial(Orthogonal, learn=True)), ids=['ensemble','fixed','learned'])
@pytest.mark.parametrize('src,dst', [((3,4),(3,4)), ((3,7,4),(3,5,6)), ((3,4,6,6),(3,9,3,3))], ids=['vectors','tokens','maps'])
def test_projectors(projector, src, dst):
    p = projector(src, dst)
    out = p(torch.randn(src), torch.empty(dst))
    assert list(out.shape)==list(dst)
    if projector is Orthogonal: assert not [o for o in p.parameters() if o.requires_grad]
    else: assert [o for o in p.parameters() if o.requires_grad]

@pytest.mark.parametrize('learn', (False, True))
def test_orthogonal_keeps_angles(learn):
    p,x = Orthogonal((9,4), (9,7), learn=learn),torch.randn(9,4)
    y = p(x, torch.empty(9,7)).detach()
    close(y@y.T, (x@x.T).numpy(), 1e-4)

def test_generation_hides_a_part_in_training_only():
    g = Generation((2,3,8,8), (2,3,8,8), masked=1.)
    x = torch.randn(2,3,8,8)
    close(g(x, x), g(0*x, x).detach().numpy(), 1e-5)
    assert not torch.allclose(g.eval()(x, x), g(0*x, x))
    with pytest.raises(UserError, match='makes maps'): Generation((2,3), (2,3))

def test_reused_trains_all_but_the_teachers_head():
    net = Reused(nn.Conv2d(1,4,3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8,3)), (2,4,8,8), (2,8,4,4)).train()
    out = net(torch.randn(2,1,10,10))
    assert out['features'].shape==(2,8,4,4) and out['logits'].shape==(2,3) and not net.head.training
    assert not [p for p in net.head.parameters() if p.requires_grad] and net.head[2].num_batches_tracked==0

def test_a_loss_that_learns_is_made_trained_and_saved():
    nets = two()
    loss = connected(nets, [Term(VID, 'Student.1', 'Teacher.1'), Term(partial(CRD, n=6, dim=4, negatives=3), 'Student.1', 'Teacher.1', targets=[0])], X, NUMBERS)
    kept = nets._modules['_projectors']._modules
    assert list(kept)==['VID_Student_Teacher loss','CRD_Student_Teacher loss']
    assert kept['CRD_Student_Teacher loss'].z_s==-1 # Trying it has left no trace
    loss(nets(X), NUMBERS).backward()
    assert all(p.grad is not None for p in nets._modules['_projectors'].parameters())
    assert kept['CRD_Student_Teacher loss'].z_s>0
    other = two()
    connected(other, loss.terms, X, NUMBERS)
    assert other.load_state_dict(nets.state_dict()) and other._modules['_projectors']._modules['VID_Student_Teacher loss'] is not kept['VID_Student_Teacher loss']

def test_an_object_with_parameters_is_copied():
    class Scaled(nn.Module):
        def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.ones(()))
        def forward(self, a, b): return self.scale*(a-b).square().mean()
    own = Scaled()
    nets,other = two(),two()
    terms = [Term(own, 'Student', 'Teacher', name='own')]
    for n in (nets, other): connected(n, terms, X)
    a,b = [n._modules['_projectors']._modules['own loss'] for n in (nets, other)]
    assert a is not own and a is not b
    with pytest.raises(UserError, match='Terms.connect'): Terms(two(), terms)(two()(X))

class Scaled(nn.Module):
    "With a parameter, a buffer or both"
    def __init__(self, learns=True, remembers=True):
        super().__init__()
        if learns: self.scale = nn.Parameter(torch.ones(()))
        if remembers: self.register_buffer('seen', torch.zeros(()))
    def forward(self, a, b, by=1.):
        if hasattr(self, 'seen') and self.training: self.seen += 1
        return by*getattr(self, 'scale', 1.)*(a-b).square().mean()

@pytest.mark.parametrize('learns,remembers', ((True,False), (False,True), (True,True)), ids=['learns','remembers','both'])
@pytest.mark.parametrize('wrap', (lambda o: o, lambda o: partial(o, by=2.), lambda o: partial(partial(o, by=3.), by=2.)), ids=['itself','partial','partial twice'])
def test_what_an_object_has_goes_beside_the_projectors(wrap, learns, remembers):
    "Parameters are trained, buffers saved; a partial of the object as well"
    own = Scaled(learns, remembers)
    nets = two()
    loss = connected(nets, [Term(wrap(own), 'Student', 'Teacher', name='own')], X)
    kept = nets._modules['_projectors']._modules['own loss']
    assert kept is not own and set(kept.state_dict())==set(own.state_dict())
    value = loss(nets.train()(X))
    outs = nets(X)
    close(value, ((outs['Student']-outs['Teacher']).square().mean()*(1. if wrap(own) is own else 2.)).item(), 1e-6)
    value.backward()
    assert not learns or kept.scale.grad is not None and own.scale.grad is None
    assert not remembers or kept.seen==1 and own.seen==0

def test_what_cannot_be_a_loss():
    with pytest.raises(UserError, match=r"nn.MSELoss\(\)"): Term(nn.MSELoss, 'A', 'B')
    with pytest.raises(UserError, match='is made by Terms.connect'): Terms(two(), Term(VID, 'Student', 'Teacher'))(two()(X))

# ---- balance

def test_ratio_is_one_on_average():
    w = Ratio(2., momentum=.5)
    close(w(torch.tensor(8.)), 2.)
    close(w(torch.tensor(2.)), 2*2/4) # The mean of 8 and 2, the newer twice as much
    close(w.eval()(torch.tensor([4.,8.])), [2.,4.])

def test_pull_has_the_norm_that_is_asked_for():
    z = torch.randn(4, 3, requires_grad=True)
    w = Pull(.5)
    g, = torch.autograd.grad(w(1000*z.square().mean(), z), z)
    close(g.norm(), .5, 1e-5)
    assert w.eval()(torch.tensor(1.), z.detach()).isfinite()
    with pytest.raises(UserError, match='a tensor'): w.train()(z.mean(), dict(a=z))

@pytest.mark.parametrize('odd', (math.inf, -math.inf, math.nan))
def test_one_infinite_value_is_no_mean(odd):
    "Half precision overflows now and then; the weight of the next step must be a number, and that of before"
    mean = RunningMean(.5)
    for v in (2., odd, 4.): mean.add(torch.tensor(v))
    close(mean(), (2*.25+4*.5)/.75, 1e-6)
    for w in (Ratio(), Pull()):
        z = torch.ones(3, requires_grad=True)
        for by in (1., odd, 1.): last = w((by*z).sum(), z)
        assert last.isfinite() and last>0

def test_pull_is_at_the_student_before_its_projector():
    torch.manual_seed(0)
    nets = two()
    loss = connected(nets, [Term(distance, 'Student.1', 'Teacher.1', weight=Pull(3.), name='hint')], X)
    assert 'hint' in nets._modules['_projectors']._modules
    outs = nets(X)
    total = loss(outs)
    g, = torch.autograd.grad(total, nets.find('Student.1', outs))
    close(g.norm(), 3., 1e-4)

@pytest.mark.parametrize('weight,says', [(lambda pct: 1/(1-pct), 'fails at 100% of training: ZeroDivisionError'), (lambda: 1., 'fails at 0% of training: TypeError'), (lambda pct: torch.ones(2), r'at 0% of training it makes a tensor of shape \[2\]'),
    (lambda pct: None, 'fails at 0% of training'), (Pull(), 'has to be a tensor')], ids=['at the end','no progress','two numbers','nothing','no tensor'])
def test_a_weight_is_tried_when_terms_are_connected(weight, says):
    class Dict(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(8, 5)
        def forward(self, x): return dict(a=self.lin(x))
    term = Term(lambda o: o['a'].mean(), 'Student', weight=weight, name='own')
    with pytest.raises(UserError, match=says): connected(Nets(dict(Student=Dict())).train(), [term], X)

@pytest.mark.parametrize('weight', (Ratio, partial(Pull, 2.), Uncertainty), ids=['Ratio','Pull','Uncertainty'])
def test_a_weight_is_no_class(weight):
    with pytest.raises(UserError, match=r"weight is made before it is given: weight=\w+\(\)"): Term(kd, 'Student', 'Teacher', weight=weight)

def test_trying_leaves_no_trace_in_a_weight():
    nets = two()
    loss = connected(nets, [Term(kd, 'Student', 'Teacher', weight=Ratio(), name='kd')], X)
    assert loss.terms[0].weight.mean.seen==0

def test_uncertainty_and_its_price():
    w = Uncertainty(.25)
    close(w(torch.tensor(8.)), 2+np.log(4), 1e-6)
    with pytest.raises(UserError, match='above 0'): Uncertainty(0.)

@pytest.mark.parametrize('weight', (Ratio, Pull, Uncertainty), ids=lambda w: w.__name__)
def test_balances_in_a_learner(weight):
    from fastai.basics import DataLoader, DataLoaders
    from torch.utils.data import TensorDataset
    from distillbook.learner import distill_learner
    data = TensorDataset(X.repeat(4,1), Y.repeat(4))
    dls = DataLoaders(DataLoader(data, bs=6), DataLoader(data, bs=12))
    pattern = weight()
    learn = distill_learner(dls, dict(Teacher=mlp(12), Student=mlp(5)), [Term(F.cross_entropy, 'Student'), Term(kd, 'Student', 'Teacher', weight=pattern, name='kd')], frozen='Teacher')
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    moved = [k for k,v in learn.model.state_dict().items() if 'kd weight' in k and not torch.equal(v, before[k])]
    assert moved and all(torch.equal(a, b) for a,b in zip(pattern.state_dict().values(), weight().state_dict().values()))
    with learn.no_bar(): learn.get_preds(with_loss=True)

def test_the_teacher_is_asked_about_the_mixed_picture():
    "Function matching: with MixUp the networks get mixed pictures, teachers too"
    from fastai.basics import DataLoader, DataLoaders
    from fastai.callback.all import MixUp
    from torch.utils.data import TensorDataset
    from distillbook.learner import distill_learner
    data,seen = TensorDataset(X.repeat(4,1), Y.repeat(4)),[]
    dls = DataLoaders(DataLoader(data, bs=6), DataLoader(data, bs=12))
    def watch(a, b):
        if torch.is_grad_enabled(): seen.append((a.detach(), b))
        return kd(a, b)
    teacher,given = mlp(12),[]
    teacher.register_forward_pre_hook(lambda m,x: given.append(x[0]))
    learn = distill_learner(dls, dict(Teacher=teacher, Student=mlp(5)), [Term(watch, 'Student', 'Teacher')], frozen='Teacher', cbs=MixUp(.9))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    plain = {tuple(r.tolist()) for r in X}
    assert any(tuple(r.tolist()) not in plain for x in given for r in x) and all(s.shape==t.shape for s,t in seen)

# ---- text

def line(seed=0, N=3, T=9, C=5): return randn(N, T, C, seed=seed, scale=2.)
LABEL,LENGTH = torch.tensor([[1,2,2],[3,0,0],[4,1,0]]),torch.tensor([3,1,2])

def test_ctc_kd_written_out():
    s,t = line(),line(1)
    w = np.where(t.numpy().argmax(-1)==0, .3, 1.)
    each = np_kl(softmax(t.numpy()/2, -1), softmax(s.numpy()/2, -1))
    close(ctc_kd(s, t, T=2., blank=.3), 4*(w*each).sum()/w.sum())
    with pytest.raises(UserError, match='0 or more'): ctc_kd(s, t, blank=-1.)

def walks_of(label, T):
    "All paths that are read as a label"
    for path in itertools.product(range(5), repeat=T):
        if [c for c,_ in itertools.groupby(path) if c]==label: yield path

def test_alignments_by_trying_every_path():
    z,T = line(3, 2, 5)[...,:5],5
    label,length = torch.tensor([[1,2],[3,3]]),torch.tensor([2,2])
    found,there = by_character(z, label, length)
    classes,possible = own_alignment(z, label, length)
    assert there.all() and possible.all()
    for n,text in enumerate(([1,2],[3,3])):
        p = softmax(z[n].numpy(), -1)
        paths = [(o, np.prod(p[range(T),o])) for o in walks_of(text, T)]
        total = sum(v for _,v in paths)
        share = np.zeros((T,5))
        at = np.zeros((T,2))
        for o,v in paths:
            k = -1
            for t,c in enumerate(o):
                share[t,c] += v/total
                if c and (t==0 or o[t-1]!=c): k += 1
                if c: at[t,k] += v/total
        assert classes[n].tolist()==(share/p).argmax(-1).tolist()
        close(found[n], (at/at.sum(0)).T@z[n].numpy(), 1e-6)
        want = -sum(np.log(p[t,c]) for t,c in enumerate((share/p).argmax(-1)))
        close(dctc(z[n:n+1], label[n:n+1], length[n:n+1]), want, 1e-6)

def test_ctc_aligned_ignores_where():
    s,t = line().float(),line(1).float()
    def np_bag(z): return [o.numpy() for o in by_character(z, LABEL, LENGTH)]
    (a,there),(b,_) = np_bag(s),np_bag(t)
    close(ctc_aligned(s, t, LABEL, LENGTH, T=2.), 4*np_kl(softmax(b/2, -1), softmax(a/2, -1))[there].mean(), 1e-5)
    too_long = torch.tensor([[1]*9]),torch.tensor([9])
    assert ctc_aligned(s[:1,:4], t[:1,:4], *too_long)==0 and dctc(s[:1,:4], *too_long)==0
    s.requires_grad_()
    ctc_aligned(s, t, LABEL, LENGTH).backward()
    assert s.grad.isfinite().all() and s.grad.abs().sum()>0

def test_dctc_of_a_line_of_which_ctc_is_sure():
    "CTC is 0 where all the probability is on the label; dctc still asks for one alignment, and only a line that cannot be written is left out"
    z = torch.tensor([[[0.,0.],[-99.,99.]]])
    label,one = torch.tensor([[1]]),torch.tensor([1])
    assert ctc_loss(z, label, one).abs()<1e-6
    close(dctc(z, label, one), np.log(2), 1e-5)
    certain = torch.full((1,4,5), -99.)
    for t,c in enumerate([1,0,2,2]): certain[0,t,c] = 99.
    classes,possible = own_alignment(certain, torch.tensor([[1,2]]), torch.tensor([2]))
    assert classes.tolist()==[[1,0,2,2]] and possible.all() and dctc(certain, torch.tensor([[1,2]]), torch.tensor([2]))==0
    z = torch.full((2,3,5), 0.)
    z[:,:,4] = -math.inf
    z.requires_grad_()
    loss = dctc(z, torch.tensor([[4,0],[1,1]]), torch.tensor([1,2])) # The first has no probability, the second just fits
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all() and z.grad[0].abs().sum()==0<z.grad[1].abs().sum()

def test_readings_and_pseudo_labels():
    z = torch.full((2,6,5), -4.)
    for t,c in enumerate([1,1,0,1,2,0]): z[0,t,c] = 4
    z[1,:,0] = 4
    label,length,sure = readings(z)
    assert label[0,:3].tolist()==[1,1,2] and length.tolist()==[3,0] and label[0,3:].sum()==0
    close(sure, [softmax([4.,*[-4.]*4])[0], 0.], 1e-6)
    s = line(5, 2, 6).float()
    want = ctc_loss(s[:1], torch.tensor([[1,1,2]]), torch.tensor([3]))*sure[0]/2
    close(ctc_pseudo(s, z), want.item(), 1e-5)
    assert ctc_pseudo(s, z, least=1.1)==0

def every_reading(logp):
    "All that a line can be read as, by summing over all walks, the most probable first"
    total = {}
    for walk in itertools.product(range(logp.shape[1]), repeat=len(logp)):
        text = tuple(c for c,_ in itertools.groupby(walk) if c)
        total[text] = total.get(text, 0.) + math.exp(sum(row[c] for row,c in zip(logp.tolist(), walk)))
    return sorted(total.items(), key=lambda o: -o[1])

@pytest.mark.parametrize('T,C', ((5,3), (6,4)))
def test_best_readings_are_those_of_all_walks(T, C):
    z = randn(3, T, C, seed=T, scale=1.5)
    labels,length,logp = nbest(z, 5, beam=400, letters=C)
    for i in range(3):
        want = every_reading(z[i].log_softmax(-1))[:5]
        assert [tuple(o[:k].tolist()) for o,k in zip(labels[i], length[i])]==[text for text,_ in want]
        close(logp[i].exp(), [p for _,p in want], 1e-6)

@pytest.mark.parametrize('temperature', (1.,.25))
def test_nbest_is_ctc_weighted_by_the_teachers_probabilities(temperature):
    t,s,want = randn(2, 5, 4, seed=1, scale=1.5),randn(2, 6, 4, seed=2, scale=1.5),0.
    for i in range(2):
        best = every_reading(t[i].log_softmax(-1))[:3]
        weights = np.array([p for _,p in best])**(1/temperature)
        said = dict(every_reading(s[i].log_softmax(-1)))
        want -= sum(w*math.log(said[text]) for w,(text,_) in zip(weights/weights.sum(), best))/2
    s.requires_grad_()
    loss = ctc_nbest(s, t, n=3, T=temperature, beam=300, letters=4)
    close(loss, want, 1e-5)
    loss.backward()
    assert s.grad.isfinite().all() and s.grad.abs().sum()>0

def test_nbest_with_fewer_readings_than_asked_for():
    labels,length,logp = nbest(randn(1, 1, 3), 4) # One frame can say nothing, 1 or 2
    assert logp[0].isfinite().tolist()==[True]*3+[False] and length[0,:3].sort().values.tolist()==[0,1,1]
    assert ctc_nbest(randn(1, 2, 3), randn(1, 1, 3), n=4).isfinite()
    with pytest.raises(UserError, match='one reading or more'): ctc_nbest(randn(1, 2, 3), randn(1, 1, 3), n=0)

def test_another_alphabet_is_refused():
    "PyTorch's CTC on a CPU reads memory of others for a class that the logits do not have"
    for f in (ctc_pseudo, ctc_nbest, lambda s,t: ctc_aligned(s, t, LABEL, LENGTH)):
        for t in (line(1, C=10), line(1, N=2)):
            with pytest.raises(UserError, match=r'logits \[N,T,C\] of the same lines and classes, not \[3, 9, 5\]'): f(line(), t)
    for odd in (5, 9, -1):
        label = torch.tensor([[1,odd,2],[3,0,0],[4,1,0]])
        for f in (ctc_loss, dctc):
            with pytest.raises(UserError, match=f'a label has the class {odd}, and the logits have 5 classes'): f(line().float(), label, LENGTH)
        close(ctc_loss(line().float(), label, torch.tensor([1,1,2])), ctc_loss(line().float(), LABEL, torch.tensor([1,1,2])).item()) # Behind its end a label may hold anything

@pytest.mark.parametrize('f', (lambda s,t: ctc_aligned(s, t, LABEL, LENGTH), lambda s,t: dctc(s, LABEL, LENGTH), ctc_kd, lambda s,t: ctc_pseudo(s, t, least=0.), ctc_nbest), ids=['aligned','dctc','kd','pseudo','nbest'])
def test_ctc_losses_of_bfloat16(f):
    s,t = [o.bfloat16() for o in (line(), line(1))]
    close(f(s, t), f(s.float(), t.float()).item(), 1e-5)

# ---- in configurations

def row(**keys): return dict(Loss=dict(name='CombinedLoss', loss_config_list=[dict(Term=dict(on=['Student.head_out','Teacher.head_out']) | keys)]))

ROWS = {'nkd': dict(targets=['label']), 'ttm': dict(T=2.), 'wttm': dict(standardise=True), 'mlkd': dict(temperatures=[1.,2.]), 'kd': dict(standardise=True), 'sp': {}, 'rkd': dict(angle=0.), 'pkt': {}, 'itrd': dict(alpha=1.5),
    'cwd': dict(T=1.), 'pkd': {}, 'pyramid': dict(levels=[1]), 'ctc_kd': dict(blank=0.), 'ctc_pseudo': dict(least=.1), 'ctc_nbest': dict(n=2), 'ctc_aligned': {}}
@pytest.mark.parametrize('loss', ROWS)
def test_rows(loss):
    keys = {k: v for k,v in ROWS[loss].items() if k!='targets'}
    a,b = line(0).float(),line(1).float()
    batch = [None, torch.randint(5, (3,9)) if loss=='nkd' else LABEL, LENGTH]
    got = build_loss(row(loss=loss, **ROWS[loss]))(dict(Student=dict(head_out=a), Teacher=dict(head_out=b)), batch)
    targets = dict(nkd=batch[1:2], ctc_aligned=batch[1:]).get(loss, [])
    close(got, LOSSES[loss](a, b, *targets, **keys).item(), 1e-6)

def test_three_teachers_in_a_row():
    cfg = row(loss='kd_ensemble', weights=[2,1], T=2.)
    cfg['Loss']['loss_config_list'][0]['Term']['on'] = ['Student','A','B']
    s,a,b = line(0),line(1),line(2)
    close(build_loss(cfg)(dict(Student=s, A=a, B=b), [None]), kd_ensemble(s, a, b, weights=[2,1], T=2.).item())

def test_classes_weights_and_projectors_in_rows():
    term, = build_terms(row(loss='CRD', n=50, dim=8, targets=['length'], weight=dict(name='Ratio', weight=.5)))
    assert term.fn.func is CRD and term.fn.keywords==dict(n=50, dim=8) and term.targets==[1] and isinstance(term.weight, Ratio) and term.weight.weight==.5
    term, = build_terms(row(loss='distance', projector=dict(name='Ensemble', n=2)))
    assert term.projector.func is Ensemble and term.projector.keywords==dict(n=2) and term.fn is distance
    assert build_terms(row(loss='distance', projector='Orthogonal'))[0].projector is Orthogonal
    assert build_terms(row(loss='distance', projector=False))[0].projector is False
    for keys,says in [(dict(loss='CRD', n=50, dims=8), "no key of CRD 'dims'; did you mean 'dim'"), (dict(loss='CRD'), 'CRD needs n'), (dict(loss='distance', projector='Orthogonl'), "did you mean 'Orthogonal'"),
            (dict(loss='distance', projector=dict(name='Ensemble', m=2)), "no key of Ensemble 'm'"), (dict(loss='kd', weight=dict(name='Ratio', momentum='much')), 'a number is wanted'), (dict(loss='ctc_kds'), "did you mean 'ctc_kd'")]:
        with pytest.raises(UserError, match=says.replace('(', r'\(')): build_terms(row(**keys))

TOO_LITTLE = {'CRD': (dict(n=50), 'CRD needs index: '), 'ReviewKD': (dict(on=['Student.backbone']), 'as many layers of the teacher as of the student, not 1 in all'), 'CTKD': (dict(on=['Student.head_out']), 'CTKD needs teacher: '), 'VID': (dict(on=['Student.backbone']), 'VID needs teacher')}
@pytest.mark.parametrize('loss', TOO_LITTLE)
def test_what_would_be_called_with_too_little_is_refused_where_it_is_written(loss):
    keys,says = TOO_LITTLE[loss]
    with pytest.raises(UserError, match=says): build_terms(row(loss=loss, **keys))
    if loss=='ReviewKD':
        with pytest.raises(UserError, match='not 3 in all'): build_terms(row(loss=loss, on=['Student.a','Student.b','Teacher.a']))

def test_tables_hold_what_can_be_called():
    assert {'nkd','uskd','wsl','ttm','wttm','mlkd','kd_ensemble','rkd','sp','pkt','itrd','cwd','pkd','ofd','weighted_distance','fgd','pyramid','VID','CRD','ReviewKD','CTKD','ctc_kd','ctc_aligned','dctc','ctc_pseudo','ctc_nbest'}<=set(LOSSES)
    assert {'Ratio','Pull','Uncertainty'}<=set(WEIGHTS) and {'Projector','Ensemble','Orthogonal','Generation'}<=set(PROJECTORS)
    for entry in PROJECTORS.values(): assert list(inspect.signature(entry).parameters)[:2]==['src','dst']

@pytest.mark.parametrize('C,letters', [(2,8), (2,1), (5,1), (3,2)])
def test_each_reading_stands_once(C, letters):
    "Where there are fewer readings than are wanted, too"
    for seed in range(6):
        logits = randn(3,5,C, seed=seed, scale=2.)
        labels,length,logp = nbest(logits, 6, 8, letters)
        for text,n,p,line in zip(labels, length, logp, logits):
            there = [tuple(o[:k].tolist()) for o,k,v in zip(text, n, p) if v>-math.inf]
            assert len(set(there))==len(there)>0 and p.exp().sum()<=1+1e-9
            whole = {t: -ctc_loss(line[None].float(), torch.tensor([t or (0,)]), torch.tensor([len(t)])).item() for t in there}
            assert all(v<=whole[t]+1e-4 for t,v in zip(there, p.tolist()))

def test_readings_that_cannot_be_asked_for():
    for n,letters,C in ((0,8,5), (2,0,5), (2,8,1)):
        with pytest.raises(UserError, match='nbest: n and letters'): nbest(randn(2,4,C), n, letters=letters)
    with pytest.raises(UserError, match='a temperature above 0'): ctc_nbest(line(), line(1), T=0.)

# ---- where a writer looks

def test_attention_kl_written_out():
    s,t = [randn(3,4,6, seed=i).softmax(-1) for i in (1,2)]
    length = torch.tensor([1,3,0])
    want = np.mean([(t[n,l]*(t[n,l]/s[n,l]).log()).sum().item() for n,k in enumerate(length) for l in range(k+1)])
    close(attention_kl(s, t, length), want)
    close(attention_kl(s, t), np.mean([(t[n,l]*(t[n,l]/s[n,l]).log()).sum().item() for n in range(3) for l in range(4)]))
    close(attention_kl(*[o.unflatten(2, (2,3)) for o in (s, t)], length), want)
    t[:,:,0] = 0 # A column at which nobody looks
    s.requires_grad_()
    attention_kl(s, t/t.sum(-1, keepdim=True), length).backward()
    assert s.grad.isfinite().all() and s.grad[0,2:].eq(0).all()
    with torch.no_grad(): s[0,2:],t[0,2:] = math.nan,math.inf # Nor do rows that do not count
    assert attention_kl(s, t/t.sum(-1, keepdim=True), length).isfinite()
    with pytest.raises(UserError, match='attention_kl wants two outputs of the same shape'): attention_kl(s, t[:,:2])

def test_sar_is_taught_where_to_look_by_kd():
    "The scores of the map stand in a layer of their own"
    torch.manual_seed(0)
    class Reader(SARHead):
        def forward(self, x, labels): return super().forward(x, [labels, torch.ones(len(x))], whole=True)
    nets = Nets(dict(Teacher=Reader(8, 13, max_text_length=6), Student=Reader(8, 13, max_text_length=6)), ['Teacher'])
    labels = torch.tensor([[11,1,2,3,12,12],[11,4,12,12,12,12]])
    batch = (torch.randn(2,8,2,7), labels)
    terms = Terms(nets, [Term(partial(kd, T=1., dim=2), 'Student.decoder.conv1x1_2', 'Teacher.decoder.conv1x1_2')])
    terms.connect(batch, (labels,))
    loss = terms(nets.train()(*batch), labels)
    loss.backward()
    scores = [nets.taps[f'{n}.decoder.conv1x1_2'] for n in ('Student','Teacher')]
    assert scores[0].shape[2:]==(14,1)
    p,q = [o[...,0].softmax(-1) for o in scores]
    close(loss, (q*(q/p).log()).sum(-1).mean().item(), 1e-5)
    assert nets['Student'].decoder.conv3x3_1.weight.grad.abs().sum()>0
