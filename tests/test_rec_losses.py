"The losses of recognisers against PaddleOCR's values and gradients, against formulas written out in numpy, and at their edges"
import numpy as np, pytest, torch, torch.nn.functional as F
from functools import partial
from pathlib import Path
from scipy.special import log_softmax, softmax
from torch.autograd import gradcheck

from distillbook.core import UserError
from distillbook.losses import dkd, dml_paddle, kl_paddle
from distillbook.rec.losses import ctc_dkd, ctc_logits_kd, ctc_loss, gtc_dkd, gtc_kl, kl_eps, log_bag, negate_blank, next_chars, nrtr_loss

GOLDEN = Path(__file__).parent/'golden'
golden,basic = np.load(GOLDEN/'losses_rec.npz'),np.load(GOLDEN/'losses_basic.npz')

def near(got, want, rtol=1e-5):
    "Equal to `rtol` of the largest element"
    got,want = [np.asarray(o.detach() if isinstance(o, torch.Tensor) else o, dtype='f8') for o in (got, want)]
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol*np.abs(want).max())

def paddle(npz, case, f, *names, out='loss', scale=1):
    "`f` of a case's inputs gives its value, and its gradients once multiplied by `scale`"
    xs = [torch.from_numpy(npz[f'{case}|in|{o}']) for o in names]
    learn = {n: x.requires_grad_() for n,x in zip(names, xs) if f'{case}|grad|{n}' in npz.files}
    loss = f(*xs)
    near(loss, npz[f'{case}|out|{out}'].mean())
    for n,g in zip(learn, torch.autograd.grad(loss, list(learn.values()))): near(g*scale, npz[f'{case}|grad|{n}'])

def check(case, names=('predicts','label','length'), loss='loss', focal=False):
    x,y,n = (torch.from_numpy(golden[f'{case}|in|{o}']) for o in names)
    x.requires_grad_()
    got = ctc_loss(x, y, n, focal=focal)
    got.backward()
    np.testing.assert_allclose(got.item(), golden[f'{case}|out|{loss}'], rtol=1e-5)
    want = golden[f'{case}|grad|{names[0]}']
    np.testing.assert_allclose(x.grad, want, rtol=1e-5, atol=1e-5*np.abs(want).max())
    return x

def test_paddle(): check('CTCLoss_focal=False')
def test_paddle_focal(): check('CTCLoss_focal=True', focal=True)
def test_paddle_multi_loss(): check('MultiLoss_CTC_SAR_1.0_1.0', ('ctc','label_ctc','length'), 'CTCLoss')

def test_paddle_infeasible_sample():
    x = check('CTCLoss_infeasible_sample')
    assert x.grad[0].eq(0).all() and x.grad[1].ne(0).any()

@pytest.mark.parametrize('net', ['S','T'])
def test_paddle_distillation(net):
    name = {'S':'Student_0','T':'Teacher_1'}[net]
    x,y,n = (torch.from_numpy(golden[f'CombinedLoss_rec_v3|in|{o}']) for o in (f'ctc{net}','label_ctc','length'))
    np.testing.assert_allclose(ctc_loss(x, y, n), golden[f'CombinedLoss_rec_v3|out|loss_ctc_{name}'], rtol=1e-5)

def test_focal_where_it_matters():
    "PaddleOCR's cases have p near 0, where focal is 1: here are samples whose p is not"
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, requires_grad=True)
    ctc_loss(x, torch.tensor([[1],[2]]), torch.tensor([1,1]), focal=True).backward()
    z = x.detach().double().requires_grad_()
    p = z.softmax(-1)
    prob = torch.stack([p[i,0,c]*p[i,1,c] + p[i,0,c]*p[i,1,0] + p[i,0,0]*p[i,1,c] for i,c in enumerate((1,2))])
    want = -prob.log()*(1-prob)**2
    want.mean().backward()
    got = ctc_loss(x.detach(), torch.tensor([[1],[2]]), torch.tensor([1,1]), focal=True)
    torch.testing.assert_close(got.double(), want.mean().detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad.double(), z.grad, rtol=1e-5, atol=1e-6)
    assert (want < -.95*prob.log()).all()

def test_empty_labels():
    "A batch of nothing but empty labels crashes PaddleOCR; here it is a loss like any other"
    x = torch.randn(2, 5, 4, requires_grad=True)
    loss = ctc_loss(x, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    loss.backward()
    torch.testing.assert_close(loss.detach(), -x.detach().log_softmax(-1)[...,0].sum(-1).mean())
    assert x.grad.isfinite().all()

def test_padding_is_not_read():
    x,n = torch.randn(2, 8, 5),torch.tensor([2,1])
    y = torch.tensor([[1,2,0,0],[3,0,0,0]])
    z = torch.tensor([[1,2,4,4],[3,3,3,3]])
    assert ctc_loss(x, y, n) == ctc_loss(x, z, n)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_float32_whatever_the_autocast(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 40, 500)*5).to(dtype)
    y,n = torch.randint(1, 500, (2,12)),torch.tensor([12,9])
    with torch.autocast('cpu', dtype=dtype): got = ctc_loss(x, y, n)
    assert got.dtype == torch.float32 and torch.equal(got, ctc_loss(x.float(), y, n))
    torch.testing.assert_close(got.double(), torch.nn.functional.ctc_loss(x.double().log_softmax(-1).transpose(0,1), y, torch.tensor([40,40]), n, reduction='none').mean(), rtol=1e-5, atol=0)

def test_the_last_of_a_net_s_outputs():
    "PaddleOCR takes the last of a tuple; here whoever calls the loss does"
    paddle(golden, 'CTCLoss_tuple_input', lambda feat,x,y,n: ctc_loss((feat, x)[-1], y, n), 'feat', 'predicts', 'label', 'length')

@pytest.mark.parametrize('focal', (False, True))
@pytest.mark.parametrize('scale', (1., -1.))
@pytest.mark.parametrize('dtype', (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_extreme_ctc_is_finite(focal, scale, dtype):
    x = (scale*1e4*F.one_hot(torch.arange(24).reshape(2, 12) % 5, 5)).to(dtype).requires_grad_()
    loss = ctc_loss(x, torch.tensor([[4,4,1],[2,0,0]]), torch.tensor([3,1]), focal=focal)
    loss.backward()
    assert loss.isfinite() and loss>=0 and x.grad.isfinite().all()

def test_nothing_but_infeasible_samples():
    x = torch.randn(2, 2, 4, requires_grad=True)
    loss = ctc_loss(x, torch.tensor([[1,1,0],[1,2,3]]), torch.tensor([2,3]))
    loss.backward()
    assert loss==0 and x.grad.eq(0).all()

# ---- the logits of CTC heads

@pytest.mark.parametrize('mode', ('log', 'mean', 'meanlog', 'sum'))
def test_paddle_ctc_logits(mode):
    "'sum' is one number per line in PaddleOCR, whose sum was differentiated"
    paddle(basic, f'KLCTCLogits_{mode}', partial(ctc_logits_kd, mode=mode), 'stu', 'tea', scale=3 if mode=='sum' else 1)

def test_paddle_ctc_dkd():
    r,case = np.random.RandomState(11),'CTCDKDLoss'
    a,b = [torch.from_numpy(r.standard_normal((2, 3, 11465)).astype('f4')) for _ in range(2)]
    loss = ctc_dkd(a.requires_grad_(), b, torch.from_numpy(basic[f'{case}|in|target']))
    loss.backward()
    near(loss, basic[f'{case}|out|loss'])
    near(a.grad[...,:64], basic[f'{case}|grad|stu_first64'])

def lines(seed, dtype=torch.float64, scale=2.): return (scale*torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)

TARGETS = torch.tensor([[3,3,0],[5,1,2]])
KD = {m: partial(ctc_logits_kd, mode=m) for m in ('log','mean','meanlog','sum')} | dict(ctc_dkd=lambda a,b: ctc_dkd(a, b, TARGETS),
    ctcdkd=lambda a,b: ctc_dkd(negate_blank(a), negate_blank(b), TARGETS))
kds = pytest.mark.parametrize('f', KD.values(), ids=KD)

def np_kl_eps(a, b): return (b*np.log((b+1e-6)/(a+1e-6)+1e-6)).sum(-1)

def np_bags(*xs, negate=True):
    for x in xs:
        x = x.numpy().copy()
        if negate: x[...,0] *= -1
        yield softmax(x/.5, -1).mean(1)

def test_the_bags_written_out():
    a,b = lines(0),lines(1)
    p,q = np_bags(a, b)
    near(log_bag(negate_blank(a)).exp(), p, 1e-10)
    near(ctc_logits_kd(a, b), np_kl_eps(p, q).mean(), 1e-10)
    near(ctc_logits_kd(a, b, 'meanlog'), ((q*np.log((q+1e-10)/p)).mean() + (p*np.log((p+1e-10)/q)).mean())/2, 1e-10)
    p,q = [4*o for o in np_bags(a, b, negate=False)]
    near(ctc_logits_kd(a, b, 'sum'), ((q*(np.log(q+1e-6)-np.log(p))).sum(-1)/2).mean(), 1e-10)
    near(ctc_logits_kd(a, b, 'log'), dml_paddle(a, b)/4, 1e-10)

def test_ctc_dkd_written_out():
    a,b = lines(0),lines(1)
    label,rest = 0,0
    for n,classes in enumerate(({3}, {1,2,5})):
        others = [c for c in range(6) if c not in classes]
        p,q = [softmax(o[n].numpy()/.7, -1).mean(0) for o in (a, b)]
        split = lambda o: np.array([o[list(classes)].sum(), o[others].sum()])
        label += np_kl_eps(split(p), split(q))
        rest += np_kl_eps(*[softmax(o[n].numpy()[:,others]/.7, -1).mean(0) for o in (a, b)])
    near(ctc_dkd(a, b, TARGETS, alpha=.3, beta=2., T=.7), (.3*label + 2*rest)/2, 1e-10)

def test_ctc_dkd_of_empty_labels():
    a,b = lines(0),lines(1)
    none = torch.zeros(2, 3, dtype=torch.long)
    near(ctc_dkd(a, b, none, alpha=0.), kl_eps(*[torch.tensor(o) for o in np_bags(a, b, negate=False)]), 1e-10)
    assert ctc_dkd(a, b, none, beta=0.).abs() < 1e-5

@pytest.mark.parametrize('mode', ('mean', 'meanlog', 'sum'))
def test_a_bag_has_no_order_and_a_frame_has(mode):
    a,b = lines(0),lines(1)
    order = torch.tensor([2,0,3,1])
    near(ctc_logits_kd(a[:,order], b, mode), ctc_logits_kd(a, b, mode), 1e-10)
    assert (ctc_logits_kd(a[:,order], b, 'log') - ctc_logits_kd(a, b, 'log')).abs() > .01

@kds
def test_ctc_kd_moves_both(f):
    a,b = lines(0).requires_grad_(),lines(1).requires_grad_()
    assert gradcheck(f, (a, b))
    for g in torch.autograd.grad(f(a, b), (a, b)): assert g.abs().max() > 1e-3

@kds
def test_ctc_kd_of_equals_is_nothing(f):
    a = lines(0)
    assert f(a, a.clone()).abs() < 2e-5 and f(lines(1), a) > .005

def test_wide_bags_in_float32():
    a,b = [20*torch.randn(2, 40, 6625, generator=torch.Generator().manual_seed(i)) for i in (0,1)]
    for m in ('log','mean','meanlog','sum'): near(ctc_logits_kd(a, b, m), ctc_logits_kd(a.double(), b.double(), m), 1e-4)

# ---- decoders that write one character after another

@pytest.mark.parametrize('smoothing', (True, False))
def test_paddle_nrtr(smoothing):
    paddle(golden, f'NRTRLoss_smoothing={smoothing}', partial(nrtr_loss, smoothing=smoothing), 'pred', 'label')

@pytest.mark.parametrize('smoothing', (True, False))
def test_paddle_ce(smoothing):
    "Without smoothing PaddleOCR's CELoss learns to write padding"
    paddle(golden, f'CELoss_nrtr_smoothing={smoothing}', partial(nrtr_loss, smoothing=smoothing, ignore_padding=smoothing), 'pred', 'label')

ROWS = torch.tensor([[2,4,5,3,0],[2,1,3,0,0]])
NRTR = {f'{s},{i}': partial(nrtr_loss, smoothing=s, ignore_padding=i) for s in (True,False) for i in (True,False)}

@pytest.mark.parametrize('smoothing', (True, False))
@pytest.mark.parametrize('ignore', (True, False))
def test_nrtr_written_out(smoothing, ignore):
    x,y = lines(0),ROWS[:,1:].numpy()
    eps = .1 if smoothing else 0
    target = np.where(np.arange(6)==y[...,None], 1-eps, eps/5)
    each = -(target*log_softmax(x.numpy(), -1)).sum(-1)
    near(nrtr_loss(x, ROWS, smoothing, ignore), each[y!=0].mean() if ignore else each.mean(), 1e-10)

def test_a_decoder_of_fewer_steps_is_told_its_own():
    x = lines(0)
    assert torch.equal(next_chars(x[:,:3], ROWS), ROWS[:,1:4])
    near(nrtr_loss(x[:,:3], ROWS), nrtr_loss(x[:,:3], ROWS[:,:4]), 1e-10)

def test_labels_that_are_too_short_are_refused():
    with pytest.raises(UserError, match='4 steps of a decoder need labels of 5 columns or more, not 4'): nrtr_loss(lines(0), ROWS[:,:4])

@pytest.mark.parametrize('f', NRTR.values(), ids=NRTR)
def test_nothing_but_padding_is_finite(f):
    x,none = lines(0).requires_grad_(),torch.zeros(2, 5, dtype=torch.long)
    loss = f(x, none)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    if f.keywords['ignore_padding']: assert loss==0 and x.grad.eq(0).all()

# ---- PaddleOCR's sums of them

def test_paddle_multi_loss_with_nrtr():
    paddle(golden, 'MultiLoss_CTC_NRTR', lambda c,g,yc,yg,n: ctc_loss(c, yc, n) + nrtr_loss(g, yg), 'ctc', 'gtc', 'label_ctc', 'label_gtc', 'length')

def test_paddle_kl_div_of_decoders():
    paddle(golden, 'DistillationKLDivLoss_gtc', lambda s,t,y: kl_paddle(s, t, mask=next_chars(s, y)!=0), 'gtcS', 'gtcT', 'label_gtc')
    paddle(golden, 'DistillationKLDivLoss_gtc', gtc_kl, 'gtcS', 'gtcT', 'label_gtc')

def test_gtc_dkd_is_dkd_of_the_next_characters():
    a,b = lines(0),lines(1).requires_grad_()
    for kw in ({}, dict(alpha=1., beta=2.), dict(alpha=.5)):
        assert torch.equal(gtc_dkd(a, b, ROWS, **kw), dkd(a, b, next_chars(a, ROWS), **dict(alpha=1., beta=1.)|kw, T=1., detach=False))
    gtc_dkd(a, b, ROWS).backward()
    assert b.grad.abs().sum() > 0
    with pytest.raises(UserError, match='labels of 5 columns'): gtc_dkd(a, b, ROWS[:,:4])

def test_the_losses_of_a_pp_ocrv4_config():
    def v4(ctcS, ctcT, gtcS, gtcT, label_ctc, label_gtc, length):
        parts = dict(dkd_0=.1*gtc_dkd(gtcS, gtcT, label_gtc, alpha=1., beta=2.), loss_ctc_Student_0=ctc_loss(ctcS, label_ctc, length),
            loss_nrtr_Student_0=nrtr_loss(gtcS, label_gtc, smoothing=False, ignore_padding=False), ctc_logits_0=ctc_logits_kd(ctcS, ctcT))
        for k,v in parts.items(): near(v, golden[f'CombinedLoss_rec_v4|out|{k}'])
        return sum(parts.values())
    paddle(golden, 'CombinedLoss_rec_v4', v4, 'ctcS', 'ctcT', 'gtcS', 'gtcT', 'label_ctc', 'label_gtc', 'length')

# ---- what holds for all of them

ALL = KD | {k: lambda a,b,f=f: f(a, ROWS) for k,f in NRTR.items()}
each = pytest.mark.parametrize('f', ALL.values(), ids=ALL)

@each
@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16), ids=str)
def test_half_inputs_are_computed_in_float32(f, dtype):
    a,b = lines(0, dtype),lines(1, dtype)
    want = f(a.float(), b.float())
    assert f(a, b)==want and f(a, b).dtype==torch.float32
    with torch.autocast('cpu', torch.bfloat16): assert f(a, b)==want
    with torch.autocast('cpu', torch.bfloat16): assert f(a.float(), b.float())==want

@each
@pytest.mark.parametrize('pattern', ('opposite', 'one against none', 'all huge', 'all tiny'))
@pytest.mark.parametrize('dtype', (torch.float32, torch.float16), ids=str)
def test_extremes_are_finite(f, pattern, dtype):
    sign = torch.where(torch.arange(6) % 2 > 0, 1., -1.).expand(2,4,6)
    a,b = {'opposite': (1e4*sign, -1e4*sign), 'one against none': (1e4*sign, 0*sign), 'all huge': (0*sign+1e4, sign), 'all tiny': (0*sign-1e4, sign)}[pattern]
    for x,y in ((a,b), (b,a)):
        x,y = [o.to(dtype).clone().requires_grad_() for o in (x, y)]
        loss = f(x, y)
        assert loss.isfinite()
        for g in torch.autograd.grad(loss, (x, y), allow_unused=True): assert g is None or g.isfinite().all()

@each
def test_nothing_is_read_back_from_the_device(f, monkeypatch):
    for n in ('TARGETS', 'ROWS'): monkeypatch.setitem(globals(), n, globals()[n].to('meta'))
    loss = f(lines(0).to('meta'), lines(1).to('meta'))  # a meta tensor holds no numbers: reading one raises
    assert loss.shape==() and loss.is_meta

@kds
def test_shapes_that_differ_are_refused(f):
    with pytest.raises(UserError, match='same shape'): f(lines(0), lines(1)[:,:3])

def test_a_slip_in_a_mode_is_told_the_near_match():
    with pytest.raises(UserError, match="ctc_logits_kd: no mode 'meanlgo'; did you mean 'meanlog'"): ctc_logits_kd(lines(0), lines(1), 'meanlgo')
