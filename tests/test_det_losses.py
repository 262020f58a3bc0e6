"The losses of detectors against PaddleOCR's values and gradients, against loops written out in numpy, and at their edges"
import cv2, numpy as np, pytest, torch, torch.nn.functional as F
from functools import partial
from pathlib import Path
from torch.autograd import grad, gradcheck

from distillbook.core import UserError
from distillbook.det.losses import (MAPS, balance_loss, db_binary, db_loss, db_parts, db_shrink, db_threshold, dice_loss, dila_db, dilate, dml_maps, hardest,
    masked_l1, pixel_bce)
from distillbook.learner import distill_learner
from distillbook.nets import Nets
from distillbook.terms import Term, Terms

golden = np.load(Path(__file__).parent/'golden'/'losses_det.npz')
MAINS = ('DiceLoss', 'MaskL1Loss', 'BCELoss', 'CrossEntropy', 'Euclidean')
TARGETS = ('threshold_map', 'threshold_mask', 'shrink_map', 'shrink_mask')

def near(got, want, rtol=1e-5):
    "Equal to `rtol` of the largest element"
    got,want = [np.asarray(o.detach() if isinstance(o, torch.Tensor) else o, dtype='f8') for o in (got, want)]
    np.testing.assert_allclose(got, want.reshape(got.shape), rtol=rtol, atol=rtol*np.abs(want).max())

def given(case, name):
    "An input of a case, which the file has once if most cases share it"
    k = f'{case}|in|{name}'
    return torch.from_numpy(golden[k if k in golden.files else f'in|{name}'])

def wanted(case, kind, name):
    "An output or a gradient of a case; the file leaves out gradients of zero"
    k = f'{case}|{kind}|{name}'
    return golden[k] if k in golden.files else np.zeros(given(case, name).shape)

def paddle(case, f, learn, *names, out='loss', scale=1):
    "`f` of a case's inputs gives its value, and the gradients to `learn` once multiplied by `scale`"
    learn = learn.split()
    xs = {n: given(case, n).requires_grad_(n in learn) for n in (*learn, *names)}
    loss = f(*xs.values())
    assert loss.shape==()
    near(loss, wanted(case, 'out', out).mean())
    for n,g in zip(learn, grad(loss, [xs[n] for n in learn], allow_unused=True)):
        near((torch.zeros_like(xs[n]) if g is None else g)*scale, wanted(case, 'grad', n))

# ---- PaddleOCR's numbers

@pytest.mark.parametrize('case,kw', {
    'DiceLoss_bal=True': {}, 'DiceLoss_bal=False': dict(balance=False), 'DiceLoss_no_positive': {},
    'MaskL1Loss_bal=True': dict(main='MaskL1Loss'), 'MaskL1Loss_bal=False': dict(main='MaskL1Loss', balance=False),
    'BCELoss_bal=True': dict(main='BCELoss'), 'BCELoss_ohem_active': dict(main='BCELoss'), 'BCELoss_ratio2.5': dict(main='BCELoss', ratio=2.5),
    'BCELoss_no_positive': dict(main='BCELoss'), 'BCELoss_extreme_probs': dict(main='BCELoss')}.items())
def test_paddle_balance(case, kw): paddle(f'BalanceLoss_{case}', partial(balance_loss, **kw), 'pred', 'gt', 'mask')

def test_paddle_bce_of_each_pixel():
    "Without balance PaddleOCR hands on one loss a pixel, whose sum was differentiated; ours is the mean of those that count"
    case = 'BalanceLoss_BCELoss_bal=False'
    p,y,m = [given(case, n) for n in ('pred','gt','mask')]
    each = pixel_bce(p.requires_grad_(), y)
    near(each, golden[f'{case}|out|loss'])
    near(grad(each.sum(), p)[0], golden[f'{case}|grad|pred'])
    near(balance_loss(p, y, m, 'BCELoss', balance=False), (golden[f'{case}|out|loss']*m.numpy()).sum()/m.sum())

@pytest.mark.parametrize('case', ('MaskL1Loss', 'MaskL1Loss_empty_mask'))
def test_paddle_masked_l1(case): paddle(case, masked_l1, 'pred', 'gt', 'mask')

def test_paddle_dice():
    paddle('DiceLoss', dice_loss, 'pred', 'gt', 'mask')
    paddle('DiceLoss_weights', dice_loss, 'pred', 'gt', 'mask', 'weights')

@pytest.mark.parametrize('case,kw', {'default': {}, 'main_loss_type=BCELoss': dict(main='BCELoss'),
    'balance_loss=False_main_loss_type=DiceLoss_alpha=1_beta=2': dict(balance=False, alpha=1, beta=2),
    'main_loss_type=BCELoss_ohem_ratio=1_alpha=3_beta=7': dict(main='BCELoss', ohem_ratio=1, alpha=3, beta=7)}.items())
def test_paddle_db(case, kw):
    case = f'DBLoss_{case}'
    paddle(case, partial(db_loss, **kw), 'maps', *TARGETS)
    for k,v in db_parts(*(given(case, n) for n in ('maps', *TARGETS)), **kw).items(): near(v, golden[f'{case}|out|loss_{k}'])

@pytest.mark.parametrize('name', ('thrink_maps', 'threshold_maps', 'binary_maps'))
def test_paddle_dml(name):
    "One number a page in PaddleOCR, whose sum was differentiated"
    paddle(f'DistillationDMLLoss_det_{name}', partial(dml_maps, maps_name=name), 'S U', scale=2)

def test_paddle_dml_with_logarithms():
    paddle('DistillationDMLLoss_det_sigmoid_log', partial(dml_maps, act='sigmoid', use_log=True), 'S U')

def test_paddle_two_pairs():
    paddle('DistillationDMLLoss_det_two_pairs', lambda s,u,t: dml_maps(s, u) + dml_maps(s, t), 'S U T', scale=2)

def dila2(s, u, t, *targets): return dila_db(s, t, targets[3]) + dila_db(u, t, targets[3])
def db2(s, u, *targets): return db_loss(s, *targets) + db_loss(u, *targets)

def test_paddle_db_of_two(): paddle('DistillationDBLoss', db2, 'S U', *TARGETS)

def test_paddle_dilated_db():
    case = 'DistillationDilaDBLoss'
    paddle(case, dila2, 'S U T', *TARGETS)
    for n,k in zip('SU', ('Student','Student2')):
        near(dila_db(given(case, n), given(case, 'T'), given(case, 'shrink_mask')), golden[f'{case}|out|dila_dbloss_{k}_Teacher'])
    near(dilate((given(case, 'T')[:,0]>.3).float()), golden[f'{case}|out|dilated_teacher'], 0)

def test_paddle_cml_is_a_sum_of_these():
    "The total is one number a page in PaddleOCR, whose sum was differentiated, so that all but DML counted as often as there are pages"
    paddle('CombinedLoss_det_cml', lambda s,u,t,*y: dila2(s, u, t, *y) + dml_maps(s, u) + db2(s, u, *y), 'S U T', *TARGETS, scale=2)
    paddle('CombinedLoss_det_dml', lambda s,u,*y: dml_maps(s, u) + db2(s, u, *y), 'S U', *TARGETS, scale=2)

# ---- written out

def maps(seed, *shape, dtype=torch.float64): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
def page(seed=0, dtype=torch.float64):
    "Three maps, and their four targets"
    m = maps(seed, 2, 3, 7, 9, dtype=dtype)
    return m,[maps(seed+1, 2, 7, 9, dtype=dtype), *[(maps(seed+i, 2, 7, 9)>.6).to(dtype) for i in (2,3)], (maps(seed+4, 2, 7, 9)>.2).to(dtype)]

def np_balance(p, y, m, each, ratio, eps=1e-6):
    "Pixel by pixel, as PaddleOCR counts"
    cells = list(zip(*(o.flatten().tolist() for o in (each, y, m))))
    pos = [e for e,y,m in cells if y and m]
    neg = sorted((e for e,y,m in cells if not y and m), reverse=True)[:int(len(pos)*ratio)]
    return (sum(pos)+sum(neg)) / (len(pos)+len(neg)+eps)

PIXEL = dict(BCELoss=lambda p,y: F.binary_cross_entropy(p, y, reduction='none'), CrossEntropy=lambda p,y: -torch.where(y>0, p, 1-p).log(), Euclidean=lambda p,y: (p-y)**2)

@pytest.mark.parametrize('main', PIXEL)
@pytest.mark.parametrize('ratio', (0, .5, 1, 2.4, 3, 1000))
def test_the_hardest_written_out(main, ratio):
    m,(_,_,y,mask) = page()
    p = m[:,0].requires_grad_()
    got = balance_loss(p, y, mask, main, ratio=ratio)
    near(got, np_balance(p, y, mask, PIXEL[main](p, y), ratio), 1e-9)
    assert gradcheck(lambda p: balance_loss(p, y, mask, main, ratio=ratio), (p,))

@pytest.mark.parametrize('main', PIXEL)
def test_without_balance_all_that_count(main):
    m,(_,_,y,mask) = page()
    near(balance_loss(m[:,0], y, mask, main, balance=False, ratio=1, eps=0), PIXEL[main](m[:,0], y)[mask>0].mean(), 1e-10)

@pytest.mark.parametrize('main', ('DiceLoss', 'MaskL1Loss'))
def test_a_loss_of_the_whole_has_no_hardest_pixels(main):
    m,(_,_,y,mask) = page()
    whole = dict(DiceLoss=dice_loss, MaskL1Loss=masked_l1)[main](m[:,0], y, mask)
    near(balance_loss(m[:,0], y, mask, main, balance=False), whole, 0)
    near(balance_loss(m[:,0], y, mask, main, ratio=1), whole)

def test_dice_and_l1_written_out():
    m,(t,tm,y,mask) = page()
    p,on = m[:,0],mask>0
    near(dice_loss(p, y, mask, eps=0), 1 - 2*p[on & (y>0)].sum()/(p[on].sum()+y[on].sum()), 1e-12)
    near(masked_l1(m[:,1], t, tm, eps=0), (m[:,1]-t)[tm>0].abs().mean(), 1e-12)
    w = torch.where(y>0, 3., 1.).double()
    near(dice_loss(p, y, mask, w, eps=0), 1 - 2*(p*w)[on & (y>0)].sum()/((p*w)[on].sum()+(y*w)[on].sum()), 1e-12)

@pytest.mark.parametrize('kw', ({}, dict(alpha=2.), dict(beta=.5), dict(main='BCELoss'), dict(main='BCELoss', ohem_ratio=1), dict(main='Euclidean', balance=False), dict(eps=3.)), ids=str)
def test_each_setting_reaches_its_loss(kw):
    m,(t,tm,y,ym) = page()
    o = dict(alpha=5, beta=10, main='DiceLoss', balance=True, ohem_ratio=3, eps=1e-6) | kw
    want = dict(shrink_maps=o['alpha']*balance_loss(m[:,0], y, ym, o['main'], o['balance'], o['ohem_ratio'], o['eps']),
                threshold_maps=o['beta']*masked_l1(m[:,1], t, tm, o['eps']), binary_maps=dice_loss(m[:,2], y, ym, eps=o['eps']))
    got = db_parts(m, t, tm, y, ym, **kw)
    assert got['threshold_maps']==db_threshold(m, t, tm, o['beta'], o['eps']) and got['binary_maps']==db_binary(m, y, ym, o['eps'])
    assert db_shrink(m[:,:1], y, ym, **{k: v for k,v in kw.items() if k!='beta'})==got['shrink_maps']
    assert got==want and db_loss(m, t, tm, y, ym, **kw)==sum(want.values())
    teacher = page(7)[0]
    seen = dilate((teacher[:,0]>.3).double())
    assert dila_db(m, teacher, ym, **kw) == o['alpha']*balance_loss(m[:,0], seen, ym, o['main'], o['balance'], o['ohem_ratio'], o['eps']) + dice_loss(m[:,2], seen, ym, eps=o['eps'])
    if kw:
        assert db_loss(m, t, tm, y, ym, **kw) != db_loss(m, t, tm, y, ym)
        assert (dila_db(m, teacher, ym, **kw) != dila_db(m, teacher, ym)) == ('beta' not in kw)

@pytest.mark.parametrize('shape', ((1,1), (1,5), (2,2), (17,23), (64,48)))
def test_dilation_is_that_of_opencv(shape):
    x = (maps(1, 3, *shape)>.8).float()
    for got,o in zip(dilate(x), x): np.testing.assert_array_equal(got, cv2.dilate(o.numpy().astype('u1'), np.ones((2,2), 'u1')))

def test_the_teacher_s_threshold_is_strict():
    m,y = page()
    t = torch.full((2,1,7,9), .3)
    y = y[3]
    assert dila_db(m, t, y) == dila_db(m, torch.zeros(2,1,7,9), y) != dila_db(m, t+1e-6, y) == dila_db(m, t, y, thresh=.29)

def test_a_teacher_of_one_map_is_enough_and_learns_nothing():
    m,y = page()
    t = page(7)[0].requires_grad_()
    loss = dila_db(m.requires_grad_(), t, y[3])
    assert loss==dila_db(m, t[:,:1], y[3])
    gm,gt = grad(loss, (m, t), allow_unused=True)
    assert gt is None and gm[:,0].any() and gm[:,2].any() and not gm[:,1].any()

def test_db_gradients_are_right():
    m,y = page()
    assert gradcheck(lambda m: db_loss(m, *y), (m.requires_grad_(),)) and gradcheck(lambda m: db_loss(m, *y, main='BCELoss'), (m,))

@pytest.mark.parametrize('name', MAPS)
def test_dml_moves_both_in_one_map(name):
    a,b = page()[0].requires_grad_(),page(7)[0].requires_grad_()
    assert gradcheck(partial(dml_maps, maps_name=name), (a, b))
    assert dml_maps(a, b, name)==dml_maps(b, a, name)>.01 and dml_maps(a, a.detach(), name).abs()<1e-5
    for g in grad(dml_maps(a, b, name), (a, b)): assert [bool(o.any()) for o in g.unbind(1)] == [i==MAPS[name] for i in range(3)]

def test_dml_is_the_mean_over_pages():
    a,b = page()[0],page(7)[0]
    near(dml_maps(a, b), sum(dml_maps(a[i:i+1], b[i:i+1]) for i in (0,1))/2, 1e-12)

# ---- at the edges

@pytest.mark.parametrize('main', MAINS)
def test_no_text_anywhere(main):
    p = maps(0, 2, 7, 9, dtype=torch.float32).requires_grad_()
    loss = balance_loss(p, torch.zeros_like(p), torch.ones_like(p), main)
    assert loss==0 and not grad(loss, p)[0].any()

@pytest.mark.parametrize('main', MAINS)
@pytest.mark.parametrize('balance', (True, False))
def test_nothing_counts(main, balance):
    m,y = page(dtype=torch.float32)
    y = [o*0 if i in (1,3) else o for i,o in enumerate(y)]
    loss = db_loss(m.requires_grad_(), *y, main=main, balance=balance)
    g, = grad(loss, m)
    assert loss.isfinite() and not g.any()
    loss = dila_db(m, page(7)[0].float(), y[3], main=main, balance=balance)
    assert loss.isfinite() and not grad(loss, m)[0].any()

@pytest.mark.parametrize('main', MAINS)
def test_nothing_but_text(main):
    "No negatives to choose from"
    p = maps(0, 2, 7, 9, dtype=torch.float32).requires_grad_()
    loss = balance_loss(p, torch.ones_like(p), torch.ones_like(p), main)
    assert loss.isfinite() and grad(loss, p)[0].isfinite().all() and grad(balance_loss(p, torch.ones_like(p), torch.ones_like(p), main), p)[0].lt(0).all()

@pytest.mark.parametrize('main', MAINS)
@pytest.mark.parametrize('dtype', (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_sure_and_wrong_is_finite(main, dtype):
    "The sigmoid in float32, as PaddleOCR's slope at 0 and 1 is 1e12, which float16 cannot hold"
    x = (1e4*(torch.arange(63).reshape(1,7,9)%2 - .5)).to(dtype).requires_grad_()
    y = (x<0).float()
    loss = balance_loss(x.float().sigmoid(), y, torch.ones_like(y), main)
    assert loss.isfinite() and grad(loss, x)[0].isfinite().all()

def test_more_text_than_float16_can_count():
    "70 000 pixels of text: float16 ends at 65 504"
    p,y = torch.full((1,700,200), .5, dtype=torch.float16),torch.zeros(1,700,200)
    y[:,:350] = 1
    near(dice_loss(p, y.half(), torch.ones_like(p)), .5)
    near(balance_loss(p, y.half(), torch.ones_like(p), 'BCELoss'), np.log(2))

def test_a_map_of_one_pixel():
    m = torch.tensor([.2,.5,.9]).reshape(1,3,1,1).requires_grad_()
    y = [torch.ones(1,1,1)]*4
    near(db_loss(m, *y, main='BCELoss'), -5*np.log(.2) + 10*.5 + 1-2*.9/1.9)
    assert grad(dila_db(m, m, y[3]), m)[0].isfinite().all()

def test_nan_stays_nan():
    "So that the learner can say which term it was; `F.binary_cross_entropy` would stop with an assertion on the device"
    m,y = page(dtype=torch.float32)
    m[0,0,3,3] = float('nan')
    for main in MAINS: assert db_loss(m, *y, main=main).isnan()

@pytest.mark.parametrize('ties', (torch.zeros(40), torch.ones(40), torch.arange(40)//5%3))
def test_ties_among_the_hardest(ties):
    for n in (0, 1, 7, 40, 99): near(hardest(ties.float(), torch.tensor(float(n))), sum(sorted(ties.tolist())[::-1][:n]))

FNS = {f'db {m}': partial(db_loss, main=m) for m in MAINS} | {f'dila {m}': lambda a,*y,m=m: dila_db(a, a.flip(0), y[3], main=m) for m in MAINS} | dict(
    unbalanced=partial(db_loss, main='BCELoss', balance=False), dml=lambda a,*y: dml_maps(a, a.flip(0)), dml_log=lambda a,*y: dml_maps(a, a.flip(0), act='sigmoid', use_log=True))
each = pytest.mark.parametrize('f', FNS.values(), ids=FNS)

@each
@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16), ids=str)
def test_half_inputs_are_computed_in_float32(f, dtype):
    m,y = page(dtype=dtype)
    want = f(m.float(), *(o.float() for o in y))
    assert f(m, *y)==want and f(m, *y).dtype==torch.float32
    with torch.autocast('cpu', torch.bfloat16): assert f(m, *y)==f(m.float(), *(o.float() for o in y))==want

@each
def test_nothing_is_read_back_from_the_device(f):
    m,y = page()
    loss = f(m.to('meta'), *(o.to('meta') for o in y))  # a meta tensor holds no numbers: reading one raises
    assert loss.shape==() and loss.is_meta

@pytest.mark.parametrize('dtype', (torch.bool, torch.uint8, torch.float64))
def test_masks_of_any_type(dtype):
    m,(t,tm,y,ym) = page(dtype=torch.float32)
    near(db_loss(m, t, tm.to(dtype), y.to(dtype), ym.to(dtype)), db_loss(m, t, tm, y, ym), 1e-6)

# ---- what is refused

def test_shapes_that_would_broadcast_are_refused():
    m,y = page()
    for f in (dice_loss, masked_l1, balance_loss):
        with pytest.raises(UserError, match=r'wants maps of the same shape, not \[2, 7, 9\] and \[2, 1, 7, 9\]'): f(m[:,0], y[2][:,None], y[3])
    with pytest.raises(UserError, match='same shape'): dice_loss(m[:,0], y[2], y[3], weights=torch.ones(()))
    with pytest.raises(UserError, match='same shape'): dila_db(m, page()[0][...,:4], y[3])

def test_maps_that_are_not_there_are_refused():
    m,y = page()
    for f in (lambda: db_loss(m[:,:1], *y), lambda: dila_db(m[:,:1], m, y[3]), lambda: dml_maps(m[:,:1], m[:,:1], 'binary_maps'), lambda: db_loss(m[:,0], *y)):
        with pytest.raises(UserError, match='in maps of shape .* while it trains'): f()

@pytest.mark.parametrize('name', ('shrnk_maps', ['thrink_maps'], None, 0))
def test_other_names_are_refused(name):
    "PaddleOCR gives a loss of 0 for them"
    m,_ = page()
    with pytest.raises(UserError, match='dml_maps: no map'): dml_maps(m, m, name)
    if name=='shrnk_maps':
        with pytest.raises(UserError, match="did you mean 'shrink_maps'"): dml_maps(m, m, name)

def test_a_slip_in_the_main_loss_is_told_the_near_match():
    m,y = page()
    with pytest.raises(UserError, match="balance_loss: no main loss 'DicLoss'; did you mean 'DiceLoss'"): db_loss(m, *y, main='DicLoss')

# ---- under terms

class Maps(torch.nn.Module):
    def __init__(self, n): 
        super().__init__()
        self.conv = torch.nn.Conv2d(3, n, 3, padding=1)
    def forward(self, x): return dict(maps=self.conv(x).sigmoid())

def cml(frozen=('Teacher',)):
    torch.manual_seed(0)
    nets = Nets(dict(Student=Maps(3), Student2=Maps(3), Teacher=Maps(1)), frozen)
    return nets,Terms(nets, [Term(dila_db, 'Student.maps', 'Teacher.maps', targets=[3]), Term(partial(dila_db, alpha=1), 'Student2.maps', 'Teacher.maps', targets=[3]),
        Term(dml_maps, 'Student.maps', 'Student2.maps'), Term(db_loss, 'Student.maps'), Term(partial(db_loss, main='BCELoss'), 'Student2.maps', weight=.5)])

def test_cml_in_five_terms():
    nets,terms = cml()
    x,(_,y) = torch.rand(2,3,7,9),page(dtype=torch.float32)
    terms.connect((x,), y)
    assert '_projectors' not in nets._modules
    outs = nets.train()(x)
    s,u,t = [outs[k]['maps'] for k in ('Student','Student2','Teacher')]
    want = dila_db(s, t, y[3]) + dila_db(u, t, y[3], alpha=1) + dml_maps(s, u) + db_loss(s, *y) + .5*db_loss(u, *y, main='BCELoss')
    got = terms(outs, *y)
    near(got, want, 1e-6)
    got.backward()
    assert all(p.grad is not None and p.grad.any() for n in ('Student','Student2') for p in nets[n].parameters())
    assert all(p.grad is None for p in nets['Teacher'].parameters())

def test_all_are_for_training_only():
    for f in (db_loss, db_shrink, db_threshold, db_binary, dila_db, dml_maps): assert f.train_only is True

def test_the_parts_as_terms_of_their_own_add_up():
    nets,_ = cml()
    terms = Terms(nets, [Term(db_shrink, 'Student.maps', targets=[2,3]), Term(db_threshold, 'Student.maps', targets=[0,1]), Term(db_binary, 'Student.maps', targets=[2,3])])
    x,(_,y) = torch.rand(2,3,7,9),page(dtype=torch.float32)
    terms.connect((x,), y)
    outs = nets.train()(x)
    near(terms(outs, *y), db_loss(outs['Student']['maps'], *y), 1e-6)
    near(list(terms.parts.values()), [v.item() for v in db_parts(outs['Student']['maps'], *y).values()], 1e-6)

def test_a_few_steps_bring_the_terms_down():
    from fastai.data.core import DataLoaders
    _,y = page(dtype=torch.float32)
    torch.manual_seed(0)
    x = torch.randn(2,3,7,9)
    dl = [(x, *y)]*30
    nets,_ = cml()
    dls = DataLoaders(dl, dl, device='cpu')
    dls.n_inp = 1
    learn = distill_learner(dls, nets, [Term(dila_db, 'Student.maps', 'Teacher.maps', targets=[3]), Term(dml_maps, 'Student.maps', 'Student2.maps'),
        Term(db_loss, 'Student.maps'), Term(db_loss, 'Student2.maps')])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    parts = learn.parts().drop(columns='dml_maps_Student_Student2')  # two fresh nets agree, knowing nothing
    assert (parts.iloc[-1] < .8*parts.iloc[0]).all()
