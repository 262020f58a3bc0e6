"Augmentations of pages: polygons that move with the picture, windows that cut no word, words pasted where there is room, settings that will not do"
import copy, cv2, math, numpy as np, pickle, pytest
from distillbook.core import UserError
from distillbook.det.augment import (ColorJitter, CopyPaste, EastRandomCropData, IaaAugment, about_centre, affine, number_range, brighten, by_axis, contrast, free_cuts, fit_points, fliplr, flipud,
    warp_page, reach_into, paste_word, are_quads, resize, free_place, saturate, turn_hue, turned_box, choose_window)

r = np.random.default_rng
H,W = 200,300

def painted(polys, h=H, w=W, fine=8):
    im = np.zeros((h*fine, w*fine), np.uint8)
    for o in polys: cv2.fillPoly(im, [np.round(o*fine-.5).astype(np.int32)], 255)
    return np.repeat(cv2.resize(im, (w,h), interpolation=cv2.INTER_AREA)[...,None], 3, axis=2)

def agreement(image, polys):
    a,b = image[...,0]>127,painted(polys, *image.shape[:2])[...,0]>127
    return (a&b).sum()/max(1, (a|b).sum())

def box(x, y, w, h, angle=0):
    a = math.radians(angle)
    return np.float32([x,y]) + np.float32([[-w,-h],[w,-h],[w,h],[-w,h]])/2 @ np.float32([[math.cos(a),math.sin(a)],[-math.sin(a),math.cos(a)]])

POLYS = np.stack([box(70, 50, 90, 30, 8), box(210, 70, 100, 26, -12), box(150, 150, 120, 40, 3)])

def sample(polys=POLYS, ignore=(), h=H, w=W, **kwargs):
    n = len(polys)
    return dict(image=painted(polys, h, w), polys=np.asarray(polys, np.float32), texts=[f'w{i}' for i in range(n)], ignore_tags=np.array([i in ignore for i in range(n)], bool), **kwargs)

def in_step(o): return len(o['polys'])==len(o['texts'])==len(o['ignore_tags']) and o['ignore_tags'].dtype==bool and o['polys'].dtype==np.float32

def frozen(o):
    "A copy, to see afterwards that nothing was changed in place"
    return {k: copy.deepcopy(v) for k,v in o.items() if k!='ext_data'}

def unchanged(o, before): return all(np.array_equal(o[k], v) for k,v in before.items())


# flips, affine maps, zooms

MOVES = dict(fliplr=(fliplr, {}), flipud=(flipud, {}), rotate=(affine, dict(rotate=[-30,30])), shear=(affine, dict(shear=[-20,20])), scale=(affine, dict(scale=[.6,1.4])), per_axis=(affine, dict(scale=dict(x=[.7,1.2], y=.9))),
    shift=(affine, dict(translate_percent=[-.2,.2], translate_px=[-5,5])), all=(affine, dict(rotate=[-10,10], shear=5, scale=[.8,1.2], translate_px=dict(x=[-9,9]))), zoom=(resize, dict(size=[.5,3])))

@pytest.mark.parametrize('name', MOVES)
@pytest.mark.parametrize('seed', range(5))
def test_polygons_move_with_the_picture(name, seed):
    f,kwargs = MOVES[name]
    image,polys = f(painted(POLYS), POLYS, r(seed), **kwargs)
    assert polys.dtype==np.float32 and polys.shape==POLYS.shape and image.dtype==np.uint8
    assert agreement(image, polys) > .97 > agreement(image, polys+2)

def test_an_exact_half_pixel():
    im = np.zeros((1,10,3), np.uint8)
    im[:,4:8] = 255
    poly = np.float32([[[4,0],[8,0],[8,1],[4,1]]])
    flipped,p = fliplr(im, poly, r(0))
    assert np.flatnonzero(flipped[0,:,0]).tolist()==[2,3,4,5] and (p[0,:,0].min(), p[0,:,0].max())==(2,6)
    shifted,p = warp_page(im, poly, about_centre(1, 10, shift=(1,0)))
    assert np.flatnonzero(shifted[0,:,0]).tolist()==[5,6,7,8] and (p[0,:,0].min(), p[0,:,0].max())==(5,9)

def test_turning_right_round_gives_back_the_picture():
    im = r(0).integers(0, 256, (40,40,3), dtype=np.uint8)
    for angle,want in ((90, np.rot90(im, -1)), (180, np.rot90(im, 2)), (-90, np.rot90(im)), (360, im)):
        got,p = warp_page(im, np.float32([[[0,0],[10,0],[10,5]]]), about_centre(40, 40, angle))
        assert np.abs(got.astype(int)-want).max() <= 1
        if angle==90: assert np.allclose(p, [[[40,0],[40,10],[35,10]]], atol=1e-4)

def test_twice_flipped_is_nothing():
    for f in (fliplr, flipud):
        image,polys = f(*f(painted(POLYS), POLYS, r(0)), r(0))
        assert np.array_equal(image, painted(POLYS)) and np.allclose(polys, POLYS, atol=1e-4)

def test_probability():
    flips = [fliplr(painted(POLYS), POLYS, r(i), p=.3)[1] is not POLYS for i in range(400)]
    assert abs(np.mean(flips)-.3) < .08
    assert fliplr(painted(POLYS), POLYS, r(0), p=0)[1] is POLYS

def test_a_zoom_keeps_proportions_and_never_vanishes():
    for seed in range(10):
        image,polys = resize(np.zeros((100,200,3), np.uint8), POLYS, r(seed), [.5,3])
        assert abs(image.shape[1]/image.shape[0]-2) < .05 and 50<=image.shape[0]<=300
    image,polys = resize(np.zeros((1,7,3), np.uint8), POLYS, r(0), .1)
    assert image.shape==(1,1,3) and np.allclose(polys[...,1], POLYS[...,1])

@pytest.mark.parametrize('f', [fliplr, flipud, affine, lambda *a: resize(*a, 1.5)])
@pytest.mark.parametrize('polys', [np.zeros((0,4,2), np.float32), np.float32([[[0,0],[1,0],[1,1],[0,1]]]), np.float32([[[5,5]]*7])])
def test_one_pixel_and_no_words(f, polys):
    image,out = f(np.zeros((1,1,3), np.uint8), polys, r(0))
    assert out.shape==polys.shape and np.isfinite(out).all() and image.ndim==3

def test_draws_per_axis():
    a = by_axis([1,2], 'scale', r(0))
    assert a[0]==a[1]
    b = by_axis(dict(x=[1,2]), 'scale', r(0), rest=7.)
    assert 1<=b[0]<=2 and b[1]==7
    with pytest.raises(UserError, match="scale: no axis 'z'"): by_axis(dict(z=1), 'scale', r(0))


# IaaAugment

def test_iaa_default_is_paddles():
    a,b = IaaAugment(),IaaAugment([dict(type='Fliplr', args=dict(p=.5)), dict(type='Affine', args=dict(rotate=[-10,10])), dict(type='Resize', args=dict(size=[.5,3]))])
    for i in range(5): assert np.array_equal(a(sample(), r(i))['image'], b(sample(), r(i))['image'])
    sizes = {a(sample(), r(i))['image'].shape[:2] for i in range(10)}
    assert len(sizes)==10 and all(H*.5-1<=h<=H*3+1 for h,_ in sizes)

def test_iaa_is_a_function_of_the_generator():
    op,o = IaaAugment(),sample(ignore=[1])
    before = frozen(o)
    a,b = op(o, r(3)),op(o, r(3))
    assert np.array_equal(a['image'], b['image']) and np.array_equal(a['polys'], b['polys']) and in_step(a) and a['texts']==o['texts']
    assert unchanged(o, before)
    assert not np.array_equal(a['polys'], op(o, r(4))['polys'])
    again = pickle.loads(pickle.dumps(op))(o, r(3))
    assert np.array_equal(a['image'], again['image'])

def test_iaa_order_and_nothing():
    o = sample()
    assert np.array_equal(IaaAugment([])(o, r(0))['image'], o['image'])
    steps = [dict(type='Resize', args=dict(size=2)), dict(type='Affine', args=dict(translate_px=dict(x=10)))]
    a,b = IaaAugment(steps)(o, r(0))['polys'],IaaAugment(steps[::-1])(o, r(0))['polys']
    assert np.allclose(a[...,0], POLYS[...,0]*2+10, atol=1e-3) and np.allclose(b[...,0], (POLYS[...,0]+10)*2, atol=1e-3)

@pytest.mark.parametrize('args,message', [
    ('Fliplr', 'augmenter_args: a list is wanted'), (dict(type='Fliplr'), 'a list is wanted'), (['Fliplr'], 'a type and its args are wanted'), ([['Fliplr', .5]], 'a type and its args are wanted'),
    ([dict(args={})], 'a type and its args are wanted'), ([dict(type=['Fliplr'])], 'no type'), ([dict(type='Flipplr')], "did you mean 'Fliplr'"), ([dict(type='Fliplr', args=[.5])], 'args are names and values'),
    ([dict(type='Fliplr', args=dict(prob=.5))], "no setting 'prob'"), ([dict(type='Fliplr', args=dict(p='half'))], 'p: a number'), ([dict(type='Fliplr', args=dict(p=-1))], 'p: a number'),
    ([dict(type='Resize')], 'needs size'), ([dict(type='Resize', args=dict(size=0))], 'size: a number'), ([dict(type='Resize', args=dict(size=[1,2,3]))], 'size: a number'), ([dict(type='Resize', args=dict(size=[2,1]))], 'size: a number'),
    ([dict(type='Resize', args=dict(size=float('nan')))], 'size: a number'), ([dict(type='Affine', args=dict(rotate='10'))], 'rotate: a number'), ([dict(type='Affine', args=dict(scale=dict(x='a')))], 'scale: x: a number'),
    ([dict(type='Fliplr'), dict(type='Affine', args=dict(rotat=1))], r"augmenter_args\[1\]: Affine: no setting 'rotat'; did you mean 'rotate'"), ([None], 'a type and its args are wanted'), ([dict(type='Fliplr', args={1: 2})], 'no setting 1'),
    ([dict(type='Affine', args=dict(rng=1))], "no setting 'rng'")])
def test_iaa_settings_that_will_not_do(args, message):
    with pytest.raises(UserError, match=message): IaaAugment(args)


# windows

def brute_cuts(low, high, n): return [x for x in range(n+1) if x in (0, n) or not any(a<x<b for a,b in zip(low, high))]

@pytest.mark.parametrize('seed', range(30))
def test_cuts_are_exactly_the_free_places(seed):
    rng = r(seed)
    n,k = int(rng.integers(1, 60)),int(rng.integers(0, 6))
    low = rng.uniform(-10, n+5, k)
    high = low+rng.uniform(0, 20, k)
    if seed%2: low,high = np.round(low),np.round(high)
    runs = free_cuts(low, high, n)
    assert [int(x) for o in runs for x in o]==brute_cuts(low, high, n)
    assert all((np.diff(o)==1).all() for o in runs) and all(b[0]-a[-1]>1 for a,b in zip(runs, runs[1:]))

def test_cuts_of_odd_words():
    assert [o.tolist() for o in free_cuts(np.array([]), np.array([]), 3)]==[[0,1,2,3]]
    assert [o.tolist() for o in free_cuts(np.array([-1e30]), np.array([1e30]), 3)]==[[0],[3]]
    assert [o.tolist() for o in free_cuts(np.array([1e30]), np.array([2e30]), 3)]==[[0,1,2,3]]
    assert [o.tolist() for o in free_cuts(np.array([2.]), np.array([2.]), 4)]==[[0,1,2,3,4]]

def wholly(polys, x0, y0, x1, y1): return (polys.min(1)>=(x0,y0)).all(1) & (polys.max(1)<=(x1,y1)).all(1)

@pytest.mark.parametrize('seed', range(40))
def test_windows_sever_no_word(seed):
    rng = r(seed)
    h,w = rng.integers(20, 400, 2).tolist()
    polys = np.stack([box(*rng.uniform(-20, (w+20,h+20)), *rng.uniform(2, (60,30)), rng.uniform(0, 360)) for _ in range(rng.integers(1, 9))])
    for _ in range(20):
        x0,y0,x1,y1 = choose_window(polys, h, w, rng)
        assert 0<=x0<x1<=w and 0<=y0<y1<=h
        if (x0,y0,x1,y1)==(0,0,w,h): continue
        assert x1-x0>=.1*w and y1-y0>=.1*h and reach_into(polys, x0, y0, x1, y1).any()
        inside = np.stack([np.clip(polys[...,0], 0, w), np.clip(polys[...,1], 0, h)], -1)
        touched = reach_into(inside, x0, y0, x1, y1)
        assert (wholly(inside, x0, y0, x1, y1) | ~touched).all()

def test_windows_reach_every_word_and_every_size():
    met,sizes = np.zeros(3, int),[]
    for i in range(300):
        o = choose_window(POLYS, H, W, r(i))
        met += reach_into(POLYS, *o)
        sizes.append((o[2]-o[0])*(o[3]-o[1])/(H*W))
    assert met.min()>60 and met.max()<300 and min(sizes)<.25 and max(sizes)>.75

def test_no_words_no_tries_and_one_pixel():
    assert choose_window(POLYS[:0], H, W, r(0))==(0,0,W,H)
    assert choose_window(POLYS, H, W, r(0), tries=0)==(0,0,W,H)
    assert choose_window(POLYS, 1, 1, r(0))==(0,0,1,1)
    assert choose_window(POLYS+1000, H, W, r(0))==(0,0,W,H)

@pytest.mark.parametrize('keep_ratio', [True, False])
@pytest.mark.parametrize('seed', range(8))
def test_crop(seed, keep_ratio):
    o = sample(ignore=[2], path='a.jpg')
    before = frozen(o)
    out = EastRandomCropData([160,128], keep_ratio=keep_ratio)(o, r(seed))
    assert out['image'].shape==(128,160,3) and out['image'].dtype==np.uint8 and in_step(out) and out['path']=='a.jpg' and unchanged(o, before)
    assert out['texts'] and all((t=='w2')==i for t,i in zip(out['texts'], out['ignore_tags']))
    care = out['polys'][~out['ignore_tags']]
    assert care.min()>=-1e-3 and (care.max((0,1))<=np.array([160,128])+1e-3).all()
    out = EastRandomCropData([160,128], keep_ratio=keep_ratio)(sample(), r(seed))
    assert agreement(out['image'], out['polys']) > .95 > agreement(out['image'], out['polys']+2)

def test_crop_keeps_proportions():
    for i in range(10):
        out = EastRandomCropData([300,100])(sample(), r(i))
        for p,t in zip(out['polys'], out['texts']):
            old = POLYS[int(t[1])]
            ratio = np.linalg.norm(p[1]-p[0])/np.linalg.norm(p[3]-p[0]),np.linalg.norm(old[1]-old[0])/np.linalg.norm(old[3]-old[0])
            assert abs(ratio[0]/ratio[1]-1) < .05

def test_crop_of_ignored_words_only_is_the_whole_page():
    out = EastRandomCropData([W,H])(sample(ignore=[0,1,2]), r(0))
    assert np.array_equal(out['image'], painted(POLYS)) and np.allclose(out['polys'], POLYS)

def test_crop_without_words():
    out = EastRandomCropData([64,64])(sample(POLYS[:0]), r(0))
    assert out['polys'].shape==(0,4,2) and out['texts']==[] and out['image'].shape==(64,64,3)

@pytest.mark.parametrize('h,w', [(1,1), (1,5000), (5000,1), (3,2)])
def test_crop_of_odd_pictures(h, w):
    for keep in (True, False):
        out = EastRandomCropData([64,32], keep_ratio=keep)(sample(np.float32([[[0,0],[w,0],[w,h],[0,h]]]), h=h, w=w), r(0))
        assert out['image'].shape==(32,64,3) and len(out['polys'])==1 and np.isfinite(out['polys']).all()

@pytest.mark.parametrize('kwargs,message', [(dict(size=960), 'size: '), (dict(size=[960]), 'size: '), (dict(size=[0,960]), 'size: '), (dict(size=['960',960]), 'size: '), (dict(max_tries='x'), 'max_tries: '), (dict(min_crop_side_ratio='x'), 'min_crop_side_ratio: ')])
def test_crop_settings_that_will_not_do(kwargs, message):
    with pytest.raises(UserError, match=message): EastRandomCropData(**kwargs)


# pasting

def other(n=10, ignore=()): return sample(np.stack([box(40+60*(i%4), 30+50*(i//4), 36, 12, 9*i) for i in range(n)]), ignore)

@pytest.mark.parametrize('n,ratio,want', [(10,.2,2), (3,.2,1), (1,.2,1), (10,.55,5), (10,0,1), (10,9.,10)])
def test_as_many_words_as_said(n, ratio, want):
    o = {**sample(), 'ext_data': [other(n)]}
    before,ext = frozen(o),frozen(o['ext_data'][0])
    out = CopyPaste(ratio, limit_paste=False)(o, r(0))
    assert len(out['polys'])==3+want and in_step(out) and 'ext_data' not in out and unchanged(o, before) and unchanged(o['ext_data'][0], ext)
    assert out['texts'][:3]==o['texts'] and np.array_equal(out['polys'][:3], POLYS) and len(set(out['texts'][3:]))==want

def test_at_most_thirty():
    many = sample(np.stack([box(10+14*(i%20), 6+8*(i//20), 10, 5) for i in range(300)]))
    assert len(CopyPaste(.5, limit_paste=False)({**sample(), 'ext_data': [many]}, r(0))['polys'])==33

@pytest.mark.parametrize('seed', range(8))
def test_pasted_words_overlap_nothing_and_lie_inside(seed):
    out = CopyPaste(1.)({**sample(), 'ext_data': [other(12)]}, r(seed))
    low,high = out['polys'].min(1),out['polys'].max(1)
    assert len(low)>3 and low.min()>=-1e-3 and (high.max(0)<=np.array([W,H])+1e-3).all()
    for i in range(3, len(low)): assert not reach_into(out['polys'][:i], *low[i], *high[i]).any()
    assert (out['image']==painted(POLYS))[painted(POLYS)>0].all()

@pytest.mark.parametrize('seed', range(8))
def test_pasted_polygons_are_where_the_words_are(seed):
    dark = {**sample(POLYS[:0]), 'image': np.zeros((H,W,3), np.uint8), 'ext_data': [other(12)]}
    out = CopyPaste(1.)(dark, r(seed))
    assert len(out['polys'])>3 and agreement(out['image'], out['polys']) > .95
    sides = [sorted(np.linalg.norm(p-np.roll(p, -1, 0), axis=1)) for p in out['polys']]
    assert np.allclose(sides, [12,12,36,36], atol=.01)

def test_a_word_in_perspective_becomes_a_rectangle():
    quad = np.float32([[20,30],[120,20],[110,60],[25,50]])
    page = sample(quad[None])
    image = np.zeros((H,W,3), np.uint8)
    target = turned_box(quad, 30)+np.float32([60,20])
    paste_word(image, page['image'], quad, target)
    assert agreement(image, target[None]) > .97
    a,b = target[1]-target[0],target[3]-target[0]
    assert abs(a@b)<1e-2 and abs(np.linalg.norm(a)-np.linalg.norm(quad[1]-quad[0]))<1e-3 and abs(math.degrees(math.atan2(a[1], a[0]))-30)<1e-3

def test_pasting_shows_what_it_took():
    page = dict(other(1), image=r(0).integers(0, 256, (H,W,3), dtype=np.uint8))
    quad = np.float32([[20,30],[60,30],[60,50],[20,50]])
    image = np.zeros((H,W,3), np.uint8)
    paste_word(image, page['image'], quad, quad+np.float32([100,50]))
    assert np.array_equal(image[81:99,121:159], page['image'][31:49,21:59]) and not image[:79].any() and not image[101:].any()

def test_ignored_words_and_odd_polygons_are_not_pasted():
    page = other(6, ignore=[0,1,2,3])
    for i in range(5): assert set(CopyPaste(1., False)({**sample(), 'ext_data': [page]}, r(i))['texts'][3:])=={'w4','w5'}
    bow,dot,line = box(50, 50, 30, 20)[[0,2,1,3]],np.float32([[9,9]]*4),np.float32([[5,5],[20,5],[40,5],[60,5]])
    odd = sample(np.stack([bow, dot, line]))
    out = CopyPaste(1.)({**sample(), 'ext_data': [odd]}, r(0))
    assert len(out['polys'])==3 and in_step(out)
    assert CopyPaste(1.)({**sample(), 'ext_data': [sample(POLYS[:0])]}, r(0))['texts']==['w0','w1','w2']

def test_polygons_of_other_lengths():
    seven = fit_points(POLYS, 7)
    seven[2,4:] = [[150,180],[120,175],[100,165]]
    assert are_quads(seven).tolist()==[True,True,False]
    out = CopyPaste(1., False)({**sample(), 'ext_data': [sample(seven)]}, r(0))
    assert out['polys'].shape==(5,4,2) and set(out['texts'][3:])=={'w0','w1'}
    out = CopyPaste(1., False)({**sample(seven), 'ext_data': [other(2)]}, r(0))
    assert out['polys'].shape==(5,7,2) and (out['polys'][3:,4:]==out['polys'][3:,3:4]).all() and in_step(out)
    tri = POLYS[:,:3]
    assert not are_quads(tri).any()
    assert CopyPaste(1., False)({**sample(tri), 'ext_data': [other(2)]}, r(0))['polys'].shape==(5,4,2)

def test_no_room():
    full = sample(np.float32([[[0,0],[W,0],[W,H],[0,H]]]))
    assert len(CopyPaste(1.)({**full, 'ext_data': [other()]}, r(0))['polys'])==1
    small = sample(POLYS[:0], h=5, w=5)
    assert len(CopyPaste(1., False)({**small, 'ext_data': [other()]}, r(0))['polys'])==0
    assert free_place(POLYS, (W+1,5), H, W, r(0)) is None and free_place(POLYS, (1e30,5), H, W, r(0)) is None
    x,y = free_place(POLYS[:0], (W,H), H, W, r(0))
    assert (x,y)==(0,0)

def test_pasting_is_a_function_of_the_generator():
    o = {**sample(), 'ext_data': [other()]}
    a,b,c = [CopyPaste(1.)(o, r(i)) for i in (1,1,2)]
    assert np.array_equal(a['image'], b['image']) and np.array_equal(a['polys'], b['polys']) and not np.array_equal(a['image'], c['image'])
    with pytest.raises(UserError, match='objects_paste_ratio'): CopyPaste('many')


# colours

def test_colours():
    im = r(0).integers(0, 256, (20,30,3), dtype=np.uint8)
    grey = cv2.cvtColor(im, cv2.COLOR_BGR2GRAY)
    assert np.array_equal(brighten(im, 1.), im) and np.array_equal(contrast(im, 1.), im) and np.array_equal(saturate(im, 1.), im)
    assert not brighten(im, 0.).any() and np.abs(brighten(im, 1.5)-np.clip(im*1.5, 0, 255)).max()<=1
    assert (saturate(im, 0.)==grey[...,None]).all() and np.ptp(contrast(im, 0.))==0 and abs(contrast(im, 0.).mean()-grey.mean())<.51
    low = contrast(im, 1.7).astype(float)
    assert np.abs(low-np.clip(grey.mean()+(im-grey.mean())*1.7, 0, 255)).max()<1
    red = np.full((2,2,3), (0,0,200), np.uint8)
    assert np.abs(turn_hue(red, 1/3).astype(int)-[0,200,0]).max()<=6 and np.abs(turn_hue(red, -1/3).astype(int)-[200,0,0]).max()<=6

def test_jitter():
    o = dict(sample(), image=r(0).integers(0, 256, (40,30,3), dtype=np.uint8))
    before = frozen(o)
    assert np.array_equal(ColorJitter()(o, r(0))['image'], o['image'])
    for kwargs in (dict(brightness=.4), dict(contrast=.4), dict(saturation=.4), dict(hue=.2), dict(brightness=3, contrast=3, saturation=3, hue=.5)):
        op = ColorJitter(**kwargs)
        a,b,c = [op(o, r(i)) for i in (5,5,6)]
        assert np.array_equal(a['image'], b['image']) and not np.array_equal(a['image'], c['image']) and a['image'].dtype==np.uint8
        assert a['polys'] is o['polys'] and unchanged(o, before)
    grey = dict(image=np.full((4,4,3), 100, np.uint8))
    means = [ColorJitter(brightness=.3)(grey, r(i))['image'].mean() for i in range(300)]
    assert 70<=min(means)<75 and 125<max(means)<=130

@pytest.mark.parametrize('kwargs', [dict(brightness=-1), dict(contrast='a'), dict(hue=.6), dict(saturation=float('nan')), dict(hue=[.1,.2])])
def test_jitter_settings_that_will_not_do(kwargs):
    with pytest.raises(UserError, match=next(iter(kwargs))): ColorJitter(**kwargs)

def test_between():
    assert number_range(3, 'a')==(3,3) and number_range([1,2], 'a')==(1,2)
    for bad in (None, [1], 'a', [2,1], [0,math.inf], {}, [None,1]):
        with pytest.raises(UserError, match='a: a number or'): number_range(bad, 'a')
