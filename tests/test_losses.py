"The losses between networks against PaddleOCR's own numbers, against formulas written out in numpy and scipy, and at their limits"
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from scipy.special import rel_entr, softmax
from torch.autograd import gradcheck

from distillbook.core import UserError
from distillbook.losses import attention, attention_transfer, cosine, dist, distance, dkd, dml, dml_paddle, kd, kl, kl_paddle, kljs, upcast

GOLDEN = Path(__file__).parent/'golden'
BASIC,REC = np.load(GOLDEN/'losses_basic.npz'),np.load(GOLDEN/'losses_rec.npz')
LABELS = torch.tensor([[0,4,2], [1,1,3]])

LOGITS = dict(kd=kd, dml=dml, dml_symmetric=partial(dml, symmetric=True), dml_paddle=dml_paddle, dml_paddle_maps=partial(dml_paddle, act='sigmoid', use_log=False),
              dkd=lambda s,t: dkd(s, t, LABELS), dkd_both=lambda s,t: dkd(s, t, LABELS, detach=False), dist=dist,
              kl_paddle=kl_paddle, kl_masked=lambda s,t: kl_paddle(s, t, mask=LABELS!=4))
# kljs is of probabilities: here of the logits' sigmoids
MAPS = {f'kljs_{m}': lambda a,b,m=m: kljs(*[o.sigmoid() for o in upcast(a, b)], m) for m in ('kl','js')}
DISTANCES = {m: partial(distance, mode=m) for m in ('l1','l2','smooth_l1')}
SAME = LOGITS | DISTANCES | MAPS | dict(cosine=cosine)
ALL = SAME | dict(attention_transfer=lambda a,b: attention_transfer(a[None], b[None]))
each = lambda losses: pytest.mark.parametrize('f', losses.values(), ids=losses)

def logits(seed, dtype=torch.float64, scale=2.): return (scale*torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)

def close(got, want, rtol=1e-5):
    "Equal to `rtol` of the largest element"
    got,want = [np.asarray(o.detach() if isinstance(o, torch.Tensor) else o, dtype='f8') for o in (got, want)]
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol*np.abs(want).max())

def arrays(npz, case, *names, kind='in'): return [torch.tensor(npz[f'{case}|{kind}|{n}']) for n in names]

def with_grads(f, *xs):
    xs = [x.clone().requires_grad_() for x in xs]
    loss = f(*xs)
    return loss, *torch.autograd.grad(loss, xs, allow_unused=True)

# ---- PaddleOCR 2.10's own values and gradients

@pytest.mark.parametrize('use_log', (True, False))
@pytest.mark.parametrize('act', (None, 'softmax', 'sigmoid'))
def test_dml_paddle_is_paddleocrs(act, use_log):
    case = f'DMLLoss_act={act}_use_log={use_log}'
    loss,ga,gb = with_grads(partial(dml_paddle, act=act, use_log=use_log), *arrays(BASIC, case, 'out1', 'out2'))
    want = BASIC[f'{case}|out|loss']  # one number per picture without the log, whose sum was differentiated
    close(loss, want.mean())
    for g,n in ((ga,'out1'),(gb,'out2')): close(g, BASIC[f'{case}|grad|{n}']/want.size)

@pytest.mark.parametrize('reduction', ('mean', 'sum', 'none'))
@pytest.mark.parametrize('mode', ('kl', 'js'))
def test_kljs_is_paddleocrs(mode, reduction):
    case = f'KLJSLoss_{mode}_{reduction}'
    xs = [x.requires_grad_() for x in arrays(BASIC, case, 'p1', 'p2')]
    loss,want = kljs(*xs, mode, reduction),BASIC[f'{case}|out|loss']
    if reduction!='none': assert loss.shape==() and want.shape==(3,)  # one number per picture, whose sum was differentiated
    close(loss, want if reduction=='none' else want.mean())
    for g,n in zip(torch.autograd.grad(loss.sum(), xs), ('p1','p2')): close(g, BASIC[f'{case}|grad|{n}'] / (1 if reduction=='none' else 3))

@pytest.mark.parametrize('mode', ('l1', 'l2', 'smooth_l1'))
@pytest.mark.parametrize('reduction', ('mean', 'sum'))
def test_distance_is_paddleocrs(mode, reduction):
    case = f'DistanceLoss_{mode}' + ('_sum' if reduction=='sum' else '')
    loss,gx,gy = with_grads(partial(distance, mode=mode, reduction=reduction), *arrays(BASIC, case, 'x', 'y'))
    close(loss, BASIC[f'{case}|out|loss'])
    for g,n in ((gx,'x'),(gy,'y')): close(g, BASIC[f'{case}|grad|{n}'])

def test_paddles_smooth_l1_with_a_delta():
    case = 'DistanceLoss_smooth_l1_delta.5'
    loss,gx,gy = with_grads(partial(distance, mode='smooth_l1', delta=.5), *arrays(BASIC, case, 'x', 'y'))
    close(loss, BASIC[f'{case}|out|loss'])
    for g,n in ((gx,'x'),(gy,'y')): close(g, BASIC[f'{case}|grad|{n}'])

@pytest.mark.parametrize('T,alpha,beta', ((1.,1.,1.), (1.,1.,2.), (2.,.5,4.)))
def test_dkd_is_paddleocrs(T, alpha, beta):
    case = f'DKDLoss_T{T}_a{alpha}_b{beta}'
    s,t,y = arrays(BASIC, case, 'logits_s', 'logits_t', 'target')
    loss,gs,gt = with_grads(lambda s,t: dkd(s, t, y.view(3,5), alpha, beta, T, detach=False), s, t)
    close(loss, BASIC[f'{case}|out|loss'])
    for g,n in ((gs,'s'),(gt,'t')): close(g, BASIC[f'{case}|grad|logits_{n}'])
    detached,g,none = with_grads(lambda s,t: dkd(s, t, y.view(3,5), alpha, beta, T), s, t)
    assert detached==loss and torch.equal(g, gs) and none is None

def test_kl_paddle_is_paddleocrs():
    case = 'KLDivLoss_nomask'
    loss,gs,gt = with_grads(kl_paddle, *arrays(BASIC, case, 'logits_s', 'logits_t'))
    close(loss, BASIC[f'{case}|out|loss'])
    for g,n in ((gs,'s'),(gt,'t')): close(g, BASIC[f'{case}|grad|logits_{n}'])

def test_a_masked_kl_paddle_is_paddleocrs():
    case = 'KLDivLoss_mask'
    s,t,m = arrays(BASIC, case, 'logits_s', 'logits_t', 'mask')
    loss,gs,gt = with_grads(partial(kl_paddle, mask=m.view(3,5)), s, t)
    close(loss, BASIC[f'{case}|out|loss'])
    for g,n in ((gs,'s'),(gt,'t')): close(g, BASIC[f'{case}|grad|logits_{n}'])

def test_the_losses_of_a_pp_ocrv3_config():
    case = 'CombinedLoss_rec_v3'
    inp,out = [lambda *names, kind=k: arrays(REC, case, *names, kind=kind) for k in ('in', 'out')]
    close(dml_paddle(*inp('ctcS','ctcT')), out('dml_ctc_0')[0])
    close(0.5*dml_paddle(*inp('sarS','sarT')), out('dml_sar_0')[0])
    loss,gs,gt = with_grads(distance, *inp('bbS','bbT'))
    close(loss, out('loss_distance_l2_Student_Teacher_0')[0])
    for g,n in ((gs,'bbS'),(gt,'bbT')): close(g, arrays(REC, case, n, kind='grad')[0])

def test_paddleocrs_probabilities_end_at_1e_10():
    a,b = torch.tensor([[1e4,0.]]),torch.tensor([[0.,1e4]])
    close(dml_paddle(a, b), -np.log(1e-10))
    assert dml_paddle(torch.tensor([[1.,0.]]), torch.tensor([[.5,.5]]), act=None)==torch.inf  # it is the activation that adds them

def test_a_flat_pair_without_the_log():
    case = 'DistillationDMLLoss_flat_pair_nolog'
    loss,gs,gt = with_grads(partial(dml_paddle, use_log=False), *arrays(REC, case, 'ctcS', 'ctcT'))
    close(loss, REC[f'{case}|out|loss'].mean())
    for g,n in ((gs,'ctcS'),(gt,'ctcT')): close(g, REC[f'{case}|grad|{n}']/3)

# ---- the formulas, written out

def np_kl(p, q): return rel_entr(p, q).sum(-1)

@pytest.mark.parametrize('T', (1., 4., 20.))
def test_kd_is_the_divergence_of_softened_answers(T):
    s,t = logits(0),logits(1)
    want = T**2 * np_kl(softmax(t/T, -1), softmax(s/T, -1)).mean()
    close(kd(s, t, T), want, 1e-10)
    close(kd(s.flatten(0,1), t.flatten(0,1), T), want, 1e-10)
    close(kd(s.float(), t.float(), T), want)

def test_kl_counts_what_the_mask_says():
    s,t = logits(0),logits(1)
    m = torch.tensor([[True,False,True], [False,False,True]])
    want = np_kl(softmax(t, -1), softmax(s, -1))
    close(kl(t, s, m), want[m.numpy()].mean(), 1e-10)
    close(kl(t, s), want.mean(), 1e-10)
    close(kl_paddle(s, t), want.sum()/2, 1e-10)
    close(kl_paddle(s, t, m), want[m.numpy()].mean(), 1e-10)
    close(kl_paddle(s[0], t[0]), want[0].mean(), 1e-10)

def test_nothing_but_padding_costs_nothing():
    none = torch.zeros(2, 3, dtype=torch.bool)
    loss,gs,gt = with_grads(partial(kl_paddle, mask=none), logits(0), logits(1))
    assert loss==0 and gs.eq(0).all() and gt.eq(0).all()

@pytest.mark.parametrize('mode', ('kl', 'js'))
def test_kljs_written_out(mode):
    p,q = [logits(i).sigmoid().numpy() for i in (0,1)]
    m = (p+q)/2
    want = rel_entr(p, q) + rel_entr(q, p) if mode=='kl' else rel_entr(p, m) + rel_entr(q, m)
    p,q = map(torch.tensor, (p, q))
    close(kljs(p, q, mode, 'none'), want/2, 1e-3)  # without the small constants
    close(kljs(p, q, mode), want.mean()/2, 1e-3)
    close(kljs(p, q, mode, 'sum'), want.sum()/4, 1e-3)
    close(kljs(q, p, mode), kljs(p, q, mode), 1e-10)

@pytest.mark.parametrize('mode', ('kl', 'js'))
@pytest.mark.parametrize('dtype', (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_kljs_of_zeros_and_ones(mode, dtype):
    a,b = torch.tensor([[0.,1.,0.,1.]], dtype=dtype),torch.tensor([[1.,0.,0.,1.]], dtype=dtype)
    loss,ga,gb = with_grads(partial(kljs, mode=mode), a, b)
    assert loss.isfinite() and loss>0 and ga.isfinite().all() and gb.isfinite().all() and loss.dtype==torch.float32
    a,b = [logits(i).sigmoid().to(dtype) for i in (0,1)]
    with torch.autocast('cpu', torch.bfloat16): assert kljs(a, b, mode)==kljs(a.float(), b.float(), mode)

def test_dml_has_a_direction_unless_symmetric():
    a,b = logits(0),logits(1)
    p,q = softmax(a, -1),softmax(b, -1)
    ab,ba = np_kl(q, p).mean(),np_kl(p, q).mean()
    assert abs(ab-ba) > .1
    close(dml(a, b), ab, 1e-10)
    close(dml(b, a), ba, 1e-10)
    close(dml(a, b, symmetric=True), (ab+ba)/2, 1e-10)

def test_symmetric_dml_is_paddleocrs_over_the_frames():
    a,b = logits(0),logits(1)
    for got,want in zip(with_grads(partial(dml, symmetric=True), a, b), with_grads(dml_paddle, a, b)): close(3*got, want, 1e-6)

def test_dkd_written_out():
    s,t,T,alpha,beta = logits(0),logits(1),3.,.7,5.
    total = 0
    for i,j in np.ndindex(2, 3):
        p,q = softmax(t[i,j]/T),softmax(s[i,j]/T)
        y = LABELS[i,j].item()
        others = [c for c in range(5) if c!=y]
        total += alpha * np_kl(np.array([p[y], 1-p[y]]), np.array([q[y], 1-q[y]]))
        total += beta * np_kl(p[others]/p[others].sum(), q[others]/q[others].sum())
    close(dkd(s, t, LABELS, alpha, beta, T), T**2*total/6, 1e-10)

def test_dist_written_out():
    s,t,T,beta,gamma = logits(0),logits(1),2.,.5,3.
    p,q = [softmax(o.flatten(0,1)/T, -1) for o in (t, s)]
    rows = np.mean([1 - np.corrcoef(p[n], q[n])[0,1] for n in range(6)])
    cols = np.mean([1 - np.corrcoef(p[:,c], q[:,c])[0,1] for c in range(5)])
    close(dist(s, t, beta, gamma, T), T**2*(beta*rows + gamma*cols), 1e-10)

def test_dist_ignores_shift_and_scale_of_probabilities():
    s,t = logits(0),logits(1)
    moved = (s.softmax(-1)/2 + .1).log()
    close(dist(moved, t), dist(s, t), 1e-10)
    assert (kd(moved, t) - kd(s, t)).abs() > .1

def test_dist_of_one_position_has_no_columns():
    s,t = logits(0)[:1,:1],logits(1)[:1,:1]
    close(dist(s, t), 1 - np.corrcoef(softmax(s[0,0], -1), softmax(t[0,0], -1))[0,1], 1e-10)

def test_dist_at_the_width_of_ppocr():
    t = 10*torch.randn(50, 6625, generator=torch.Generator().manual_seed(0))
    assert dist(t, t)==0
    loss,g = with_grads(lambda s: dist(s, t), t/2)
    assert 0 < loss < 2 and g.isfinite().all() and g.abs().max() > 0

@pytest.mark.parametrize('dtype', (torch.float32, torch.float64), ids=['float32','float64'])
@pytest.mark.parametrize('spread', (.01, .1, 3.))
def test_dist_of_many_classes_is_the_formula(spread, dtype):
    "A network that has learned nothing gives 6,625 classes 1.5e-4 each; a bound of 1e-4 on the length of a column would halve it"
    s,t = [spread*torch.randn(6, 6625, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0,1)]
    q,p = [softmax(o.numpy(), -1) for o in (s, t)]
    q,p = [o-o.mean(0) for o in (q, p)]
    want = 1-((q*p).sum(0)/np.linalg.norm(q, axis=0)/np.linalg.norm(p, axis=0)).mean()
    close(dist(s.to(dtype), t.to(dtype), beta=0.), want, 1e-3 if dtype==torch.float32 else 1e-9)

def test_dist_is_that_of_its_authors_where_theirs_is_well_conditioned():
    "They add 1e-8 to the product of the two lengths; of ten classes that is nothing"
    def theirs(a, b): # Their formula, over rows
        a,b = [o-o.mean(1, keepdim=True) for o in (a, b)]
        return 1 - ((a*b).sum(1) / (a.norm(dim=1)*b.norm(dim=1) + 1e-8)).mean()
    s,t = [torch.randn(16, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0,1)]
    def whole(s): return theirs(s.softmax(1), t.softmax(1)) + theirs(s.softmax(1).T, t.softmax(1).T)
    (a,ga),(b,gb) = with_grads(lambda s: dist(s, t), s),with_grads(whole, s)
    close(a, b.item(), 1e-5)
    torch.testing.assert_close(ga, gb, rtol=1e-4, atol=1e-8)

def test_dist_of_an_even_answer_has_a_bounded_gradient():
    for C in (5, 6625):
        _,g = with_grads(lambda s: dist(s, torch.randn(6, C, generator=torch.Generator().manual_seed(0))), torch.zeros(6, C))
        assert g.isfinite().all() and g.abs().max()<1e4

def test_cosine_written_out():
    a,b = np.random.RandomState(0).randn(2, 2, 3, 4, 5)
    cos = lambda x,y: x@y/np.sqrt((x@x)*(y@y))
    pictures = np.mean([1 - cos(a[n,:,i,j], b[n,:,i,j]) for n,i,j in np.ndindex(2, 4, 5)])
    lines = np.mean([1 - cos(a[0,i,j], b[0,i,j]) for i,j in np.ndindex(3, 4)])
    a,b = torch.tensor(a),torch.tensor(b)
    close(cosine(a, b), pictures, 1e-10)
    close(cosine(a[0], b[0]), lines, 1e-10)
    close(cosine(a[0].flatten(0,1), b[0].flatten(0,1)), lines, 1e-10)
    close(cosine(3*a, b), cosine(a, b), 1e-10)
    close(cosine(a, -a), 2, 1e-10)

def test_attention_transfer_written_out():
    r = np.random.RandomState(0)
    a,b = r.randn(2, 3, 4, 5),r.randn(2, 7, 4, 5)
    total = 0
    for n in range(2):
        qa,qb = [sum(channel**2 for channel in o[n]) for o in (a, b)]
        total += np.sum((qa/np.linalg.norm(qa) - qb/np.linalg.norm(qb))**2)
    a,b = torch.tensor(a),torch.tensor(b)
    close(attention_transfer(a, b), total/2, 1e-10)
    close(attention_transfer(a, b), attention_transfer(b, a), 1e-10)
    for by in (9, 1e-3): close(attention_transfer(by*a[:,[2,0,1]], b), attention_transfer(a, b), 1e-10)

def test_attention_maps_of_two_sizes_meet_at_the_smaller():
    fine = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    pooled = lambda h,w: F.avg_pool2d(attention(fine), (h,w)).sqrt()[:,None]  # one channel whose square is the mean of each block
    assert attention_transfer(fine, pooled(2,3)) < 1e-6
    assert attention_transfer(fine, pooled(2,3).flip(-1)) > .01
    high,wide = pooled(1,3),pooled(2,1)  # [8,4] and [4,12] meet at [4,4]
    assert attention_transfer(high, wide) < 1e-6

# ---- what holds for all of them

@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('dtype', (torch.float64, torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_equal_outputs_cost_nothing(name, dtype):
    a = logits(0, dtype)
    loss,ga,gb = with_grads(ALL[name], a, a.clone())
    assert loss.abs() < 1e-5 if name.startswith(('dml_paddle', 'kljs')) else loss==0  # PaddleOCR's small constants stand inside the logarithm
    for g in (ga, gb): assert g is None or g.abs().max() < 1e-3

@each(ALL)
def test_different_outputs_cost_something(f): assert f(logits(0), logits(1)) > .01

MOVES_BOTH = {'dml_symmetric', 'dml_paddle', 'dml_paddle_maps', 'dkd_both', 'kl_paddle', 'kl_masked', 'kljs_kl', 'kljs_js', 'l1', 'l2', 'smooth_l1', 'cosine', 'attention_transfer'}

@pytest.mark.parametrize('name', ALL)
def test_gradients_flow_only_where_they_should(name):
    loss,ga,gb = with_grads(ALL[name], logits(0), logits(1))
    assert ga.abs().max() > 1e-3
    assert gb.abs().max() > 1e-3 if name in MOVES_BOTH else gb is None

@pytest.mark.parametrize('name', ALL)
def test_gradients_are_the_derivatives(name):
    a,b = logits(0).requires_grad_(),logits(1)
    assert gradcheck(ALL[name], (a, b.requires_grad_() if name in MOVES_BOTH else b))

@each(ALL)
@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16), ids=str)
def test_half_inputs_are_computed_in_float32(f, dtype):
    a,b = logits(0, dtype),logits(1, dtype)
    want = f(a.float(), b.float())
    assert f(a, b)==want and f(a, b).dtype==torch.float32
    with torch.autocast('cpu', torch.bfloat16): assert f(a, b)==want
    with torch.autocast('cpu', torch.bfloat16): assert f(a.float(), b.float())==want
    assert f(a.double(), b.double()).dtype==torch.float64

@each(ALL)
@pytest.mark.parametrize('pattern', ('opposite', 'one against none', 'all huge', 'all tiny', 'zeros'))
@pytest.mark.parametrize('dtype', (torch.float32, torch.float16), ids=str)
def test_extremes_are_finite(f, pattern, dtype):
    sign = torch.where(torch.arange(5) % 2 > 0, 1., -1.).expand(2,3,5)
    a,b = {'opposite': (1e4*sign, -1e4*sign), 'one against none': (1e4*sign, 0*sign), 'all huge': (0*sign+1e4, sign), 'all tiny': (0*sign-1e4, sign), 'zeros': (0*sign, sign)}[pattern]
    a,b = a.to(dtype),b.to(dtype)
    for x,y in ((a,b), (b,a)):
        loss,gx,gy = with_grads(f, x.clone(), y.clone())
        assert loss.isfinite() and loss >= 0
        for g in (gx, gy): assert g is None or g.isfinite().all()

@each(LOGITS)
def test_the_number_does_not_depend_on_the_batch_size(f, monkeypatch):
    a,b = logits(0),logits(1)
    one = f(a, b)
    monkeypatch.setitem(globals(), 'LABELS', torch.cat([LABELS]*4))
    close(f(torch.cat([a]*4), torch.cat([b]*4)), one, 1e-10)

@pytest.mark.parametrize('name', [n for n in LOGITS if not n.startswith(('dml_paddle', 'kl_paddle'))])
def test_frames_and_pictures_are_positions_alike(name, monkeypatch):
    a,b = logits(0),logits(1)
    lines = ALL[name](a, b)
    monkeypatch.setitem(globals(), 'LABELS', LABELS.flatten())
    close(ALL[name](a.flatten(0,1), b.flatten(0,1)), lines, 1e-10)

@each(ALL)
def test_nothing_is_read_back_from_the_device(f, monkeypatch):
    monkeypatch.setitem(globals(), 'LABELS', LABELS.to('meta'))
    loss = f(logits(0).to('meta'), logits(1).to('meta'))  # a meta tensor holds no numbers: reading one raises
    assert loss.shape==() and loss.is_meta

def test_shapes_say_what_the_framework_may_give():
    assert [f.shapes for f in (kd, dml, dml_paddle, kl_paddle, kljs, dkd, dist)]==['same']*7
    assert attention_transfer.shapes=='any'
    assert not hasattr(distance, 'shapes') and not hasattr(cosine, 'shapes')

# ---- bad input

@each(SAME)
@pytest.mark.parametrize('shape', ((2,3,6), (2,1,5), (3,5)))
def test_shapes_that_differ_are_refused_even_where_they_would_broadcast(f, shape):
    with pytest.raises(UserError, match=r'same shape, not \[2, 3, 5\] and \[' + ', '.join(map(str, shape))): f(logits(0), torch.zeros(shape))

@pytest.mark.parametrize('targets', (torch.zeros(2, dtype=torch.long), torch.zeros(6, dtype=torch.long), torch.zeros(2,3,5, dtype=torch.long)), ids=lambda t: str(list(t.shape)))
def test_dkd_wants_a_class_for_each_position(targets):
    with pytest.raises(UserError, match=r'dkd wants a class for each position, \[2, 3\], not targets of shape'): dkd(logits(0), logits(1), targets)

@pytest.mark.parametrize('a,b', (((2,3,5), (2,3,5)), ((2,3,4,5), (2,12,5)), ((1,3,4,5), (2,3,4,5))))
def test_attention_transfer_wants_pictures_of_one_batch(a, b):
    with pytest.raises(UserError, match='attention_transfer wants features'): attention_transfer(torch.zeros(a), torch.zeros(b))

def test_a_slip_in_a_name_is_told_the_near_match():
    a = logits(0)
    with pytest.raises(UserError, match="distance: no mode 'smoothl1'; did you mean 'smooth_l1'"): distance(a, a, 'smoothl1')
    with pytest.raises(UserError, match="distance: no mode 'huber'; there are: l2, l1, smooth_l1"): distance(a, a, 'huber')
    with pytest.raises(UserError, match="dml_paddle: no act 'sofmax'; did you mean 'softmax'"): dml_paddle(a, a, act='sofmax')
    with pytest.raises(UserError, match="distance: no reduction 'none'"): distance(a, a, reduction='none')
    with pytest.raises(UserError, match="kljs: no mode 'sj'"): kljs(a, a, 'sj')
    with pytest.raises(UserError, match="kljs: no reduction 'maen'; did you mean 'mean'"): kljs(a, a, reduction='maen')
