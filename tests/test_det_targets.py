"Targets of a page: PaddleOCR's own maps, and polygons that nobody expects"
import json, sys
from pathlib import Path
import cv2, numpy as np, pytest
from distillbook.config.data import make_operations
from distillbook.core import UserError
from distillbook.det.targets import MakeBorderMap, MakeShrinkMap, border_targets, inside_page, shift_distance, shrink_polygon, shrink_targets, usable_polygons
from distillbook.det.geometry import area_length, offset_polygon
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.targets import loop_border, loop_shrink, words

Z = np.load(Path(__file__).parent/'golden'/'targets_det.npz')
CASES = sorted({k.split('|')[0] for k in Z if '|in|polys' in k})

@pytest.mark.parametrize('case', CASES)
def test_golden(case):
    meta = json.loads(str(Z[f'{case}|meta']))
    polys = Z[f'{case}|in|polys']
    tags = Z[f'{case}|in|ignore_tags'] if f'{case}|in|ignore_tags' in Z else np.zeros(len(polys), bool)
    r,lo,hi,least = (meta.get(k, d) for k,d in (('shrink_ratio',.4),('thresh_min',.3),('thresh_max',.7),('min_text_size',8)))
    sample = dict(image=np.zeros((meta['H'], meta['W'], 3), np.uint8), polys=polys.copy(), ignore_tags=tags.copy())
    for op in (MakeBorderMap(r, lo, hi), MakeShrinkMap(least, r)): sample = op(sample)
    for k in ('threshold_map','threshold_mask','shrink_map','shrink_mask'):
        assert sample[k].dtype==np.float32
        np.testing.assert_allclose(sample[k], Z[f'{case}|out|{k}'], rtol=0, atol=1e-5, err_msg=k)
    if f'{case}|out|ignore_after' in Z:
        assert sample['ignore_tags'].tolist()==Z[f'{case}|out|ignore_after'].tolist()
        inside,_,_ = inside_page(usable_polygons(polys, tags)[0], meta['H'], meta['W'])
        assert np.array_equal(inside, Z[f'{case}|out|polys_after'])
    assert np.array_equal(polys, Z[f'{case}|in|polys'])

ODD = dict(sliver=[[100,100],[140,100],[140,100.4],[100,100.4]], bow=[[10,10],[60,50],[60,10],[10,50]], outside=[[-90,-90],[-20,-90],[-20,-40],[-90,-40]], point=[[5,5]]*4, line=[[5,5],[50,5],[90,5],[5,5]],
    nan=[[10,10],[np.nan,10],[60,50],[10,50]], inf=[[10,10],[np.inf,10],[60,50],[10,50]], far=[[1e12,1e12],[2e12,1e12],[2e12,2e12],[1e12,2e12]], huge=[[-1e9,-1e9],[1e9,-1e9],[1e9,1e9],[-1e9,1e9]], two=[[1,1],[5,5]], none=np.zeros((0,2)),
    twice=[[10,10],[60,10],[60,10],[60,50],[10,50],[10,50]])

@pytest.mark.parametrize('name', ODD)
@pytest.mark.parametrize('h,w', [(128,160), (1,1), (32,33)])
def test_odd_polygons(name, h, w):
    for polys in ([ODD[name]], [ODD[name], [[2,2],[30,2],[30,25],[2,25]]]):
        s,m,i = shrink_targets(polys, [False]*len(polys), h, w)
        t,b = border_targets(polys, [False]*len(polys), h, w)
        for o in (s,m,t,b): assert o.shape==(h,w) and np.isfinite(o).all()
        assert set(np.unique(s)) <= {0.,1.}
        assert t.min()>=np.float32(.3)-1e-6 and t.max()<=np.float32(.7)+1e-6
        if name in ('sliver','outside','point','line','nan','inf','far','two','none'): assert i[0] and (h<100 or not s[:,60:].any())
        if len(polys)==2 and h==128: assert s.any() and not i[1]

def test_no_words():
    for polys in ([], np.zeros((0,4,2), np.float32)):
        s,m,i = shrink_targets(polys, [], 8, 9)
        t,b = border_targets(polys, [], 8, 9)
        assert not s.any() and m.all() and len(i)==0 and not b.any() and np.allclose(t, .3)

def test_a_word_that_does_not_count():
    box = np.float32([[20,20],[80,20],[80,50],[20,50]])
    s,m,i = shrink_targets([box], [True], 100, 100)
    assert not s.any() and i[0] and (m==0).sum()==61*31
    t,b = border_targets([box], [True], 100, 100)
    assert not b.any()

def test_smaller_than_eight_pixels():
    thin = np.float32([[10,10],[90,10],[90,17],[10,17]])
    s,m,i = shrink_targets([thin], [False], 100, 100)
    assert i[0] and not s.any() and not m[12,40]
    s,m,i = shrink_targets([thin], [False], 100, 100, min_size=5)
    assert not i[0] and s.any() and m.all()

def test_distance_and_shift():
    box = np.float32([[0,0],[40,0],[40,20],[0,20]])
    assert shift_distance([box])==pytest.approx(800*.84/120)
    assert shift_distance([box], 1.)==0
    assert np.ptp(offset_polygon(box, -5)[0], 0).tolist()==[30,10]
    assert offset_polygon(box, -30)==[]
    assert len(shrink_polygon(box[::-1]))==1

def test_as_operations():
    names = [dict(MakeBorderMap=dict(shrink_ratio=.4, thresh_min=.3, thresh_max=.7)), dict(MakeShrinkMap=dict(shrink_ratio=.4, min_text_size=8)), dict(KeepKeys=dict(keep_keys=['image','shrink_map']))]
    ops,keys = make_operations(names)
    assert [type(o).__name__ for o in ops]==['MakeBorderMap','MakeShrinkMap'] and keys==['image','shrink_map']
    for op in (MakeBorderMap, MakeShrinkMap):
        with pytest.raises(UserError, match='between 0 and 1'): op(shrink_ratio=1.5)

# Against the loop of benchmarks/targets.py, PaddleOCR's algorithm polygon by polygon

def same_as_loop(polys, ignore, h, w, atol=1e-5):
    polys = [np.asarray(p, np.float32) for p in polys]
    with np.errstate(all='ignore'): want = (*loop_border(polys, ignore, h, w), *loop_shrink(polys, ignore, h, w))
    got = (*border_targets(polys, ignore, h, w), *shrink_targets(polys, ignore, h, w))
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=atol)
    for a,b in zip(got[1:], want[1:]): assert np.array_equal(a, b)
    return got

@pytest.mark.parametrize('n,side', [(1,64), (12,320), (60,320), (40,640)])
def test_pages_of_words(n, side):
    polys,ignore = words(n, side, np.random.default_rng(n)),np.random.default_rng(0).random(n)<.2
    same_as_loop(polys, ignore, side, side)

@pytest.mark.parametrize('digits', [0,1])
def test_corners_on_pixels(digits):
    "Pixels that lie on a corner, on an edge, or see an edge at exactly a right angle"
    for seed in range(6):
        polys = [p for p in words(30, 320, np.random.default_rng([seed, 4])).round(digits) if p.min(0).max()<300 and p.max(0).min()>20]
        if seed%2: polys = [np.concatenate([p, p[-1:]]) for p in polys]
        same_as_loop(polys, [False]*len(polys), 320, 320)

def test_whole_numbers_have_ties():
    "Halves of pixels are rounded alike: the offsets must be equal to the last bit"
    for w in range(8, 120, 13):
        for h in range(8, 60, 7): same_as_loop([[[10,10],[10+w,10],[10+w,10+h],[10,10+h]]], [False], 90, 150)

def test_any_corners():
    "Stars, bows and knots of three to twelve corners, inside and outside of the page, some corners named twice; where edges cross, ramps may be a hundredth of a pixel wide, and rounding shows in them"
    rng,seen = np.random.default_rng(3),0
    for i in range(150):
        p = rng.uniform(-30, 130, (rng.integers(3, 13), 2))
        if i%3==0: p = p.round()
        if i%5==0: p = np.concatenate([p, p[-1:]])
        if i%2: p = cv2.convexHull(p.astype(np.float32))[:,0]
        grown = offset_polygon(np.float32(p), shift_distance(np.float32([p]))[0])
        if grown and ((grown[0].min(0)>(109,99)) | (grown[0].max(0)<0)).any(): continue
        seen += (same_as_loop([p], [False], 100, 110, 1e-5 if i%2 else 1e-4)[0]>.65).any()
    assert seen > 75

def test_holes_are_paddles():
    "One pixel where a corner is named twice, and single pixels of an outline where float32 makes a square negative"
    box = np.float32([[20,20],[80,20],[80,60],[20,60]])
    twice = same_as_loop([np.concatenate([box, box[-1:]])], [False], 100, 100)[0]
    once = same_as_loop([box], [False], 100, 100)[0]
    assert np.argwhere(twice!=once).tolist()==[[60,20]] and twice[60,20]==np.float32(.3) and once[60,20]>.699
    polys = words(60, 320, np.random.default_rng(60))
    t,_ = border_targets(polys, [False]*60, 320, 320)
    edge = np.concatenate([np.linspace(p[i], p[i-1], 200) for p in polys for i in range(4)]).round().astype(int)
    edge = np.unique(edge[((edge>0) & (edge<319)).all(1)], axis=0)
    holes = (t[edge[:,1],edge[:,0]]<.5).sum()
    assert 5 < holes < len(edge)/20

def test_a_doubled_corner_of_another_word_stays_drawn():
    box = np.float32([[20,20],[80,20],[80,60],[20,60]])
    t = same_as_loop([np.concatenate([box, box[-1:]]), box], [False,False], 100, 100)[0]
    assert t[60,20] > .699

def test_different_numbers_of_corners_in_one_page():
    rng = np.random.default_rng(1)
    polys = [cv2.convexHull(rng.uniform(0, 60, (k,2)).astype(np.float32)+rng.integers(0, 100, 2).astype(np.float32))[:,0] for k in (3,4,5,14,30)]
    assert len({len(p) for p in polys}) > 2
    apart = [border_targets([p], [False], 160, 160)[0] for p in polys]
    together = same_as_loop(polys, [False]*5, 160, 160)[0]
    assert np.array_equal(np.max(apart, 0), together)
    assert np.array_equal(border_targets([p.tolist() for p in polys], [0]*5, 160, 160)[0], together)

def test_nothing_outside_of_its_own_box():
    p = np.float32([[50.3,40.1],[91.2,44.7],[90.6,58.2],[49.8,54.4]])
    t,m = border_targets([p], [False], 128, 160)
    (x0,y0),(x1,y1) = (f(offset_polygon(p, shift_distance([p])[0])[0], 0) for f in (np.min, np.max))
    t[y0:y1+1,x0:x1+1],m[y0:y1+1,x0:x1+1] = .3,0
    assert (t==np.float32(.3)).all() and not m.any()

@pytest.mark.parametrize('at', [(20,112), (20,-60), (120,20), (-90,20), (20,104)])
def test_a_word_beside_the_page_draws_nothing(at):
    "PaddleOCR draws a row or column of another place of its box at the page's border, or fails"
    word = [np.float32([[0,0],[60,0],[60,40],[0,40]])+np.float32(at)]
    t,m = border_targets(word, [False], 100, 110)
    beside = (offset_polygon(word[0], shift_distance(word)[0])[0].min(0)>(109,99)).any() or (offset_polygon(word[0], shift_distance(word)[0])[0].max(0)<0).any()
    assert beside == (not m.any()) == bool((t==np.float32(.3)).all())

def test_other_ramps():
    p = [np.float32([[20,20],[80,20],[80,60],[20,60]])]
    t,_ = border_targets(p, [False], 100, 100, ratio=.6, low=.1, high=.95)
    assert t.min()==np.float32(.1) and t[20,50]==pytest.approx(.95, abs=1e-5)
    reach = shift_distance(p, .6)[0]
    assert t[20-4,50]==pytest.approx(.95-.85*4/reach, abs=1e-5)
    flat,_ = border_targets(p, [False], 100, 100, low=.4, high=.4)
    assert np.allclose(flat, .4)

def test_page_that_paddle_fails_on():
    label = json.loads(json.loads(str(Z['flat_crash|meta']))['label'])
    polys = np.float32([o['points'] for o in label])
    with pytest.raises(IndexError): loop_border(polys, [False], 128, 160)
    s,m,i = shrink_targets(polys, [False], 128, 160)
    t,b = border_targets(polys, [False], 128, 160)
    assert i.tolist()==[True] and not s.any() and not b.any() and (t==np.float32(.3)).all()
    assert np.argwhere(m==0).tolist()==[[100,x] for x in range(100, 141)]

def test_measures():
    area,length = area_length([[[0,0],[3,0],[3,4]], [[0,0],[10,0],[10,2],[0,2]]])
    assert area.tolist()==[6,20] and length.tolist()==[12,24]
    assert shift_distance([[[5,5]]*4]).tolist()==[0] and shift_distance([]).tolist()==[]

def test_told_what_is_wrong():
    box = [[0,0],[9,0],[9,9],[0,9]]
    for f in (border_targets, shrink_targets):
        with pytest.raises(UserError, match='2 polygons and 1'): f([box,box], [False], 20, 20)
    for kw in (dict(shrink_ratio='a'), dict(shrink_ratio=0), dict(shrink_ratio=None), dict(thresh_min='0.3'), dict(thresh_max=float('nan')), dict(thresh_min=.8)):
        with pytest.raises(UserError, match=next(iter(kw))): MakeBorderMap(**kw)
    for kw in (dict(shrink_ratio=1), dict(shrink_ratio=[.4]), dict(min_text_size='8'), dict(min_text_size=True)):
        with pytest.raises(UserError, match=next(iter(kw))): MakeShrinkMap(**kw)
