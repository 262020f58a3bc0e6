"Augmentations: PaddleOCR 2.10's own code where chance is taken out of it (recorded in augment_rec.npz), and what must hold for every draw"
import cv2, hashlib, numpy as np, os, pytest, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
from distillbook.rec import augment
from distillbook.rec.augment import (RecAug, RecConAug, blur, crop, distort, distorted, flow, handles, hsv, jitter, knots, mls, noise,
    perspective, reverse, stretch, stretched, tia, tilted, warp)

golden = np.load(Path(__file__).parent/'golden'/'augment_rec.npz')
LINE = golden['line']
rng = np.random.default_rng
OPS = dict(tia=tia, crop=crop, blur=blur, hsv=hsv, jitter=jitter, noise=noise, reverse=reverse)
PROBS = dict(tia='tia_prob', crop='crop_prob', blur='blur_prob', hsv='hsv_aug_prob', jitter='jitter_prob', noise='noise_prob', reverse='reverse_prob')
ALL = OPS | dict(distort=distort, stretch=stretch, perspective=perspective)
SHAPES = [(1,1), (1,9), (9,1), (2,2), (5,3), (11,11), (20,20), (20,400), (300,40), (48,100), (48,101), (48,320)]

def grey(h, w): return np.repeat(rng([h, w]).integers(100, 256, (h, w, 1)).astype(np.uint8), 3, axis=2)
def diff(a, b): return np.abs(a.astype(int)-b)
def only(name, prob=1.): return RecAug(**{p: prob*(k==name) for k,p in PROBS.items()})

# PaddleOCR

def their_hats(n, grid):
    "PaddleOCR's: the last cell of a row or column is one pixel longer than it is"
    k = knots(n, grid)
    at = np.where((k == n-1) & ((n-1)%grid > 0), n, k)
    return np.stack([np.interp(np.arange(n), at, e) for e in np.eye(len(k))])

@pytest.mark.parametrize('shape', ['48x320', '33x101', '120x230'])
@pytest.mark.parametrize('name', ['distort', 'stretch', 'perspective'])
def test_warp_equals_paddle(monkeypatch, shape, name):
    "Shifts to 0.003 pixels (theirs adds in float32). Pictures to half a level (theirs cuts fractions off, OpenCV rounds, and OpenCV 4 goes in steps of 1/32 pixel) once their last cell is put in; without it, to 2.5"
    im = golden[f'{shape}|in']
    src,dst,shift,picture = [golden[f'{shape}|{name}|{k}'] for k in ('src','dst','shift','picture')]
    h,w = im.shape[:2]
    f = flow(h, w, src, dst) - np.arange(w) - 1j*np.arange(h)[:,None]
    np.testing.assert_allclose(f[np.ix_(knots(h, 100), knots(w, 100))], shift, rtol=0, atol=3e-3)
    ours = warp(im, src, dst)
    monkeypatch.setattr(augment, 'hats', their_hats)
    same = diff(warp(im, src, dst), picture)
    assert same.mean() < .5 and same.max() <= (4 if cv2.__version__ < '5' else 1)
    assert diff(ours, picture).mean() < 2.5
    if name!='stretch': assert abs(shift).max() > 5 and diff(im, picture).mean() > 8

def test_pixels_equal_paddle():
    assert diff(blur(LINE, rng(0)), golden['blur']).max() == 0
    for k in ('+0.0007','-0.0007'):
        assert diff(hsv(LINE, SimpleNamespace(uniform=lambda lo,hi: float(k))), golden[f'hsv|{k}']).max() == 0
    z = np.random.RandomState(3).normal(0, .1**.5, LINE.shape)/.1**.5
    assert (noise(LINE, SimpleNamespace(standard_normal=lambda shape,dtype: z.astype(dtype))) == golden['noise']).mean() > .9999
    y,x,c = np.ogrid[:420,:760,:3]
    big = ((y*7+x*3+c*50+(x*y)%11)%256).astype(np.uint8)
    got = jitter(big, SimpleNamespace(random=lambda: .9))
    assert (got != big).any() and hashlib.sha256(got.tobytes()).hexdigest() == str(golden['jitter|sha'])

def test_joined_equals_paddle():
    more = [dict(image=golden['33x101|in'][:,:60], label='brown'), dict(image=LINE[:,100:220], label='fox')]
    out = RecConAug(1., (48,320,3), 25, 2)(dict(image=LINE[:,:90], label='The q', ext_data=more), rng(0))
    assert out['label'] == str(golden['con|label']) == 'The qbrownfox'
    assert diff(out['image'], golden['con']).max() <= 1

def test_amounts_are_whole_pixels_as_theirs():
    assert all((int(c*(1/3)), int(c*.8), int(c*.5)) == (c//3, c*4//5, c//2) for c in range(5000))

@pytest.mark.parametrize('w', [20, 100, 320, 757])
@pytest.mark.parametrize('segments', [3, 4, 5, 6])
def test_ranges_of_the_moves(w, segments):
    "Every move stays in PaddleOCR's range, and over many draws comes to both of its ends"
    pts,cut = handles(48, w, segments),w//segments
    t,s = cut//3,cut*4//5
    assert pts[:,1:-1].real.tolist() == [[cut*i for i in range(1, segments)]]*2 and (pts[:,-1].real == w).all()
    moves = np.stack([distorted(pts, rng(i))-pts for i in range(2000)])
    corners = moves[:,:,[0,-1]]*1
    inward = np.stack([corners.real*[1,-1], corners.imag*np.array([[1],[-1]])])
    inner = np.stack([moves[:,:,1:-1].real, moves[:,:,1:-1].imag]) + t/2
    for m in (inward, inner):
        assert m.min() == 0 and m.max() == max(t, 1)-1 and (m == m.round()).all()
    pairs = np.stack([stretched(pts, rng(i))-pts for i in range(2000)])
    assert (pairs[:,0] == pairs[:,1]).all() and (pairs.imag == 0).all() and (pairs[:,:,[0,-1]] == 0).all()
    assert (pairs.real[:,:,1:-1].min(), pairs.real[:,:,1:-1].max()) == (-s/2, s/2-1)
    tilts = np.stack([tilted(handles(48, w, 1), rng(i))-handles(48, w, 1) for i in range(500)])
    assert (tilts.real == 0).all() and (tilts.imag[:,0].min(), tilts.imag[:,0].max()) == (0, 23) and (tilts.imag[:,1].min(), tilts.imag[:,1].max()) == (-23, 0)

# Moving least squares

def by_hand(v, src, dst):
    "The weighted regression, solved as a linear system in real numbers"
    A,b = [],[]
    for q,p in zip(src.ravel(), dst.ravel()):
        k = 1/abs(p-v)
        A += [[k*p.real, -k*p.imag, k, 0], [k*p.imag, k*p.real, 0, k]]
        b += [k*q.real, k*q.imag]
    c,s,x,y = np.linalg.lstsq(np.array(A), np.array(b), rcond=None)[0]
    return (c+1j*s)*v + x+1j*y

def test_mls_is_the_regression():
    src = handles(48, 320, 4)
    dst = distorted(src, rng(0))
    at = np.array([3+7j, 100+0j, 200+40j, 319+47j])
    np.testing.assert_allclose(mls(at, src, dst), [by_hand(v, src, dst) for v in at], atol=1e-6)

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('segments', [1, 3, 6])
def test_points_that_stay_leave_the_picture(shape, segments):
    im,pts = grey(*shape),handles(*shape, segments)
    f = flow(*shape, pts, pts)
    assert abs(f - np.arange(shape[1]) - 1j*np.arange(shape[0])[:,None]).max() < 1e-9
    assert diff(warp(im, pts, pts), im).max() == 0

def test_a_fine_net_follows_the_points():
    pts = handles(48, 320, 4)
    to = stretched(pts, rng(1))
    for q,p in zip(pts[0,1:-1], to[0,1:-1]):
        x = round(p.real)
        assert abs(flow(48, 320, pts, to, grid=1)[0,x].real - q.real) < 1.5
    assert abs(flow(48, 320, pts, to, grid=1) - flow(48, 320, pts, to)).max() > 5

# Every operation, every shape

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', ALL)
def test_shapes_and_range(name, shape):
    im = grey(*shape)
    before = im.copy()
    for i in range(8):
        out = ALL[name](im, rng(i))
        assert out.dtype == np.uint8 and out.ndim == 3 and out.shape[1:] == (shape[1], 3) and 1 <= out.shape[0] <= shape[0]
        if name=='crop': assert shape[0]-8 <= out.shape[0] and (out.shape[0] < shape[0]) == (min(shape) >= 20)
        else: assert out.shape == im.shape
        if name not in ('reverse','hsv','noise'): assert out.min() >= im.min() and out.max() <= im.max()   # no colour comes from outside
    assert (im == before).all()

@pytest.mark.parametrize('shape', SHAPES)
def test_whole_recaug_on_every_shape(shape):
    for i in range(40):
        out = RecAug()(dict(image=grey(*shape), label='x', path='p'), rng(i))
        assert out['image'].dtype == np.uint8 and min(out['image'].shape) >= 1 and (out['label'], out['path']) == ('x', 'p')

@pytest.mark.parametrize('name', ALL)
def test_changes_when_asked(name):
    "jitter does nothing to a line at PaddleOCR's amount, and that is held fast here too"
    f = dict(jitter=lambda im,r: jitter(im, r, .5), hsv=lambda im,r: hsv(im, r, .5), noise=lambda im,r: noise(im, r, 20)).get(name, ALL[name])
    outs = [f(LINE, rng(i)) for i in range(20)]
    assert np.mean([o.shape != LINE.shape or (o != LINE).any() for o in outs]) > (.8 if name=='jitter' else .99)
    if name=='jitter': assert all((jitter(LINE, rng(i)) == LINE).all() for i in range(50))

def test_small_pictures_are_not_bent_or_cut():
    "As in PaddleOCR 2.10; in 2.6 the perspective was outside of the condition, and failed on a picture one pixel high"
    for shape in [(1,1), (19,400), (300,19)]:
        im = grey(*shape)
        assert all((f(im, rng(i)) == im).all() for f in (tia, crop) for i in range(20))
    assert any((tia(grey(20, 20), rng(i)) != grey(20, 20)).any() for i in range(20))

def test_crop_takes_rows_from_one_side():
    y = np.arange(48, dtype=np.uint8)[:,None,None].repeat(60, 1).repeat(3, 2)
    cuts = [(o[0,0,0], 47-o[-1,0,0]) for o in (crop(y, rng(i)) for i in range(1000))]
    assert {min(c) for c in cuts} == {0} and {max(c) for c in cuts} == set(range(1, 9))
    assert abs(np.mean([a > 0 for a,_ in cuts]) - .5) < 4*.5/1000**.5

def test_hsv_does_not_wrap():
    bright = np.full((30, 30, 3), 250, np.uint8)
    assert hsv(bright, SimpleNamespace(uniform=lambda lo,hi: hi), .5).min() == 255
    assert noise(bright, rng(0), 50).mean() > 200

def test_jitter_moves_down_and_right():
    im = np.zeros((40, 60, 3), np.uint8)
    im[10,20] = 255
    out = jitter(im, SimpleNamespace(random=lambda: .999), .2)
    assert np.argwhere(out[...,0]).tolist() == [[16,26]]

def test_reverse_twice(): assert (reverse(reverse(LINE, rng(0)), rng(0)) == LINE).all()

# RecAug

@pytest.mark.parametrize('name', PROBS)
@pytest.mark.parametrize('prob', [0., .1, .4, 1.])
def test_probabilities(monkeypatch, name, prob):
    "4 standard errors; each operation by its own parameter and by no other"
    called = []
    monkeypatch.setattr(augment, name, lambda im, rng: called.append(1) or im)
    aug,n = only(name, prob),2000
    for i in range(n): aug(dict(image=LINE[:4,:4]), rng(i))
    assert abs(len(called)/n - prob) <= 4*(prob*(1-prob)/n)**.5

def test_order_and_independence(monkeypatch):
    calls = []
    for k in OPS: monkeypatch.setattr(augment, k, lambda im, rng, k=k: calls[-1].append(k) or im)
    aug,n = RecAug(),3000
    for i in range(n):
        calls.append([])
        aug(dict(image=LINE[:4,:4]), rng(i))
    assert all(c == [k for k in OPS if k in c] for c in calls)
    on = np.array([[k in c for k in OPS] for c in calls])
    assert np.abs(on.mean(0)-.4).max() < 4*(.24/n)**.5
    assert np.abs(np.corrcoef(on.T)-np.eye(len(OPS))).max() < 5/n**.5

def test_the_sample_is_left_alone():
    sample = dict(image=LINE.copy(), label='x')
    for i in range(30): RecAug()(sample, rng(i))
    assert (sample['image'] == LINE).all() and list(sample) == ['image','label']

def digest():
    out = [RecAug()(dict(image=LINE), rng([7, i]))['image'] for i in range(40)]
    return hashlib.sha256(b''.join(o.tobytes() for o in out)).hexdigest()

@pytest.mark.parametrize('threads', ['1', '4'])
def test_same_state_same_picture_in_another_process(threads):
    "And whatever numpy's and Python's own generators have done, and however many threads numpy has"
    code = "import random, numpy as np, test_rec_augment as t; random.seed(1); np.random.seed(2); print(t.digest())"
    env = os.environ | dict(OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads, PYTHONWARNINGS='ignore')
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=Path(__file__).parent)
    assert r.returncode == 0, r.stderr
    assert r.stdout.split()[-1] == digest()

def test_global_generators_are_not_touched():
    import random
    np.random.seed(0); random.seed(0)
    before = np.random.get_state()[1].tolist(),random.getstate()
    for i in range(20): RecAug()(dict(image=LINE), rng(i))
    RecConAug(1.)(dict(image=LINE, label='', ext_data=[dict(image=LINE, label='')]), rng(0))
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before

# RecConAug

def piece(label, w=40, level=None): return dict(image=np.full((48, w, 3), level or 10*len(label), np.uint8), label=label)
def join(first, *more, **kw): return RecConAug(**dict(prob=1., image_shape=(48,320,3), ext_data_num=len(more)) | kw)({**first, 'ext_data': list(more)}, rng(0))

def test_text_and_pictures_in_order():
    out = join(piece('a', level=50), piece('b', level=100), piece('c', level=150))
    assert out['label'] == 'abc' and out['image'].shape == (48, 120, 3) and 'ext_data' not in out
    assert out['image'][0,::40,0].tolist() == [50,100,150]

def test_length_limit():
    assert join(piece('a'*20), piece('b'*5), piece('c'))['label'] == 'a'*20+'b'*5
    assert join(piece('a'*20), piece('b'*6), piece('c'))['label'] == 'a'*20, 'it stops at the first that does not fit'
    assert join(piece('a'*20), piece('b'*6), max_text_length=26)['label'] == 'a'*20+'b'*6

def test_width_limit():
    assert join(piece('a', 160), piece('b', 160))['image'].shape == (48, 320, 3)
    assert join(piece('a', 160), piece('b', 161))['label'] == 'a'
    assert join(piece('a', 160), piece('b', 161), piece('c', 10))['label'] == 'a'
    assert join(piece('a', 160), piece('b', 50), image_shape=(48,200,3))['label'] == 'a'

def test_lines_of_other_heights():
    small,tall = dict(image=grey(20, 30), label='s'),dict(image=grey(300, 1), label='t')
    out = join(small, tall)
    assert out['label'] == 'st' and out['image'].shape == (48, 72+1, 3) and out['image'].dtype == np.uint8

def test_joining_happens_as_often_as_asked():
    n,first = 3000,{**piece('a'), 'ext_data': [piece('b')]}
    con = RecConAug(image_shape=(48,320,3))
    labels = [con(first, rng(i))['label'] for i in range(n)]
    assert abs(labels.count('ab')/n - .5) < 4*.5/n**.5 and set(labels) == {'a','ab'}
    assert first['label'] == 'a' and first['ext_data'][0]['label'] == 'b'
    assert {RecConAug(prob=0.)(first, rng(i))['label'] for i in range(200)} == {'a'}

def test_defaults_are_paddles():
    con = RecConAug()
    assert (con.prob, con.height, con.ratio, con.max_text_length, con.ext_data_num) == (.5, 32, 10, 25, 1)
    assert RecConAug(1.)(piece('a'), rng(0)) .keys() == piece('a').keys()

def test_what_is_kept_for_a_size_cannot_be_changed():
    for kept in (knots(320, 100), augment.hats(320, 100)):
        with pytest.raises(ValueError, match='read-only'): kept[1] = 7
