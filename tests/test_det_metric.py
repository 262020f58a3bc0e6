"The metric of detectors against the rules written out pair by pair, and at its edges"
import numpy as np, pytest, shapely, torch
from types import SimpleNamespace
from shapely.geometry import Polygon

from distillbook.core import UserError
from distillbook.det.losses import db_loss
from distillbook.det.metric import DetMetric, match_boxes
from distillbook.det.geometry import valid_polygons
from distillbook.learner import distill_learner
from distillbook.terms import Term

def box(x0, y0, x1, y1): return [[x0,y0], [x1,y0], [x1,y1], [x0,y1]]

def by_the_rules(words, ignore, boxes, iou=.5, part=.5):
    "Matched, boxes that count, words that count: each pair looked at by itself"
    usable = lambda p: len(p)>2 and np.isfinite(np.asarray(p, float)).all() and Polygon(p).is_valid
    words = [(Polygon(p),skip) for p,skip in zip(words, ignore) if usable(p)]
    boxes = [Polygon(p) for p in boxes if usable(p)]
    out = [any(skip and w.intersection(b).area/b.area > part for w,skip in words) for b in boxes]
    used,matched = set(),0
    for w,skip in words:
        for i,b in enumerate(boxes):
            if skip or out[i] or i in used: continue
            if w.intersection(b).area/w.union(b).area > iou:
                used.add(i)
                matched += 1
                break
    return matched,out.count(False),sum(not skip for _,skip in words)

def counts(words, ignore, boxes, **kw):
    m = DetMetric(**kw)
    m.add([dict(points=boxes)], (None, None, [words], [ignore]))
    return m.matched,m.n_boxes,m.n_words

def quads(rng, n, size=100):
    "Slanted, some of them crossed or flat"
    centre,half = rng.uniform(0, size, (n,1,2)),rng.uniform(3, 15, (n,1,2))
    a = rng.uniform(-.6, .6, n)
    turn = np.stack([np.cos(a), -np.sin(a), np.sin(a), np.cos(a)], -1).reshape(n, 2, 2)
    q = (np.array(box(-1,-1,1,1))*half) @ turn + centre
    for i in range(n):
        if i%7==5: q[i,[0,1]] = q[i,[1,0]]
        if i%7==6: q[i,2] = q[i,1]
    return q

@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('crowd', (30, 120))
def test_the_rules_written_out(seed, crowd):
    "In a crowd words overlap, and it matters who comes first"
    rng = np.random.default_rng(seed)
    words = quads(rng, rng.integers(0, 25), crowd)
    boxes = np.concatenate([words + rng.normal(0, 1.5, words.shape), quads(rng, 6, crowd), words[:5]])[rng.permutation(len(words)+6+len(words[:5]))].round().astype('i4')
    ignore = rng.random(len(words)) < .3
    assert counts(words, ignore, boxes)==by_the_rules(words, ignore, boxes)
    assert counts(words, ignore, boxes, iou=.7, area_precision=.2)==by_the_rules(words, ignore, boxes, .7, .2)

def test_the_cases_are_not_trivial():
    totals = np.zeros(3)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        words = quads(rng, 20, 30)
        boxes = words + rng.normal(0, 1.5, words.shape)
        t = valid_polygons(words)[0]
        touching = shapely.area(shapely.intersection(t[:,None], t)).astype(bool).sum() - len(t)
        totals += [touching, *counts(words, np.arange(20)%4==0, boxes)[:2]]
    assert (totals > 100).all()

# ---- one rule each

W = box(0,0,60,20)
@pytest.mark.parametrize('b,right', [(W, 1), (box(0,0,60,40), 0), (box(0,0,60,39), 1), (box(0,0,30,20), 0), (box(0,0,31,20), 1), (box(60,0,120,20), 0)])
def test_more_than_half(b, right): assert counts([W], [False], [b])==(right, 1, 1)

@pytest.mark.parametrize('b,counted', [(box(0,0,10,10), 0), (box(30,0,90,20), 1), (box(29,0,89,20), 0), (box(0,0,60,200), 1)])
def test_more_than_half_of_a_box_in_a_word_that_does_not_count(b, counted): assert counts([W], [True], [b])==(0, counted, 0)

def test_two_halves_in_two_words_are_not_one_whole():
    "As in PaddleOCR each word that does not count is asked by itself"
    assert counts([box(0,0,10,10), box(10,0,20,10)], [True,True], [box(5,0,15,10)])==(0, 1, 0)

def test_a_word_that_does_not_count_may_take_a_box_from_one_that_does():
    assert counts([W, W], [False,True], [W])==(0, 0, 1)

def test_one_box_one_word():
    assert counts([W], [False], [W]*3)==(1, 3, 1) and counts([W]*3, [False]*3, [W])==(1, 1, 3)

def test_order():
    words,wide,left = [box(0,0,100,20), box(20,0,120,20)],box(10,0,110,20),box(-10,0,70,20)
    assert counts(words, [False]*2, [wide,left])[0]==1 and counts(words, [False]*2, [left,wide])[0]==2
    assert match_boxes(valid_polygons(words)[0], valid_polygons([left,wide])[0], np.zeros(2, bool))[0].tolist()==[[0,0],[1,1]]

def test_around_the_clock_or_against_it():
    assert counts([W], [False], [W[::-1]])==counts([W[2:]+W[:2]], [False], [W])==(1, 1, 1)

BAD = dict(empty=[], point=[[1,1]], two=[[0,0],[5,5]], line=[[0,0],[5,5],[9,9],[2,2]], same=[[3,3]]*4, crossed=[[0,0],[9,9],[9,0],[0,9]], nan=[[0,0],[9,0],[9,np.nan],[0,9]], inf=[[0,0],[9,0],[9,np.inf],[0,9]])
@pytest.mark.parametrize('p', BAD.values(), ids=BAD)
def test_what_encloses_nothing_is_left_out(p):
    assert counts([p, W], [False,False], [p, W, p])==(1, 1, 1)
    assert counts([p, W], [True,False], [W])==(1, 1, 1) and counts([p], [False], [p])==(0, 0, 0)

def test_ignore_tags_stay_with_their_words():
    "Also when one before them is left out"
    assert counts([BAD['crossed'], W, box(0,50,60,70)], [True,False,True], [W, box(0,50,60,70)])==(1, 1, 1)

def test_corners_given_twice():
    "As PaddleOCR pads polygons of fewer corners"
    p = [[0,0],[30,-5],[60,0],[60,20],[30,25],[0,20]]
    assert counts([p+[p[-1]]*4], [False], [p])==counts([p], [False], [[p[0]]+p])==(1, 1, 1)

def test_polygons_of_any_number_of_corners_and_kind():
    tri,pent = [[0,0],[20,0],[10,20]],[[50,0],[70,0],[80,10],[70,20],[50,20]]
    for form in (list, np.array, lambda p: torch.tensor(p, dtype=torch.float32), lambda p: np.array(p, 'i4')):
        assert counts([form(o) for o in (tri,pent)], [False]*2, [form(o) for o in (pent,tri)])==(2, 2, 2)
    assert counts(torch.zeros(0,4,2), torch.zeros(0, dtype=torch.bool), np.zeros((0,4,2), 'i4'))==(0, 0, 0)

# ---- the numbers

def test_totals_over_pages():
    m = DetMetric()
    pages = [([W], [False], [W, box(0,50,60,70)]), ([W, box(0,50,60,70), box(0,90,60,99)], [False,False,True], [W]), ([], [], [])]
    for words,tags,boxes in pages: m.add([dict(points=boxes)], (None, None, [words], [tags]))
    assert m.value == dict(precision=2/3, recall=2/3, hmean=pytest.approx(2/3))
    one = DetMetric()
    one.add([dict(points=b) for *_,b in pages], (None, None, [w for w,*_ in pages], [t for _,t,_ in pages]))
    assert one.value==m.value
    m.reset()
    assert m.value==dict(precision=0, recall=0, hmean=0)

@pytest.mark.parametrize('words,tags,boxes', [([], [], []), ([], [], [W]), ([W], [False], []), ([W], [True], []), ([W], [True], [W])])
def test_nothing_to_divide_by(words, tags, boxes):
    m = DetMetric()
    m.add([dict(points=boxes)], (None, None, [words], [tags]))
    assert m.value==dict(precision=0, recall=0, hmean=0)

def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match='boxes of 1, words of 2'): DetMetric().add([dict(points=[])], (None, None, [[W],[W]], [[False],[False]]))
    with pytest.raises(UserError, match='a page of 1 words has 2 ignore_tags'): counts([W], [False,True], [])

# ---- in a learner

def fake(pred, *yb): return SimpleNamespace(pred=pred, yb=yb)
SHAPES = torch.tensor([[64.,64,1,1], [64,64,1,1]])

def blocks(*at):
    m = torch.zeros(2,1,64,64)
    for n,x0,y0,x1,y1 in at: m[n,0,y0:y1,x0:x1] = 1
    return m

@pytest.mark.parametrize('wrap', (lambda m: m, lambda m: dict(maps=m), lambda m: dict(maps=m.expand(-1,3,-1,-1)), lambda m: dict(maps=m.bfloat16())))
def test_it_decodes(wrap):
    words = [[box(4,4,44,24)], [box(4,40,44,60)]]
    m = DetMetric()
    m.accumulate(fake(wrap(blocks((0,11,11,37,17), (1,11,47,37,53))), SHAPES, [torch.tensor(w, dtype=torch.float32) for w in words], [torch.zeros(1, dtype=torch.bool)]*2))
    assert m.value==dict(precision=1, recall=1, hmean=1)

def test_a_decoder_of_its_own():
    m = DetMetric(decode=lambda maps,shapes: [dict(points=[box(*row.tolist())]) for row in maps])
    m.accumulate(fake(torch.tensor([[0,0,60,20],[0,0,9,9]]), SHAPES, [[W],[W]], [[False],[False]]))
    assert m.value['precision']==.5

def test_a_batch_of_maps_has_nothing_to_count():
    m = DetMetric()
    m.accumulate(fake(blocks(), *torch.rand(4,2,64,64)))
    with pytest.raises(UserError, match='validation batches with the targets .shape, polys, ignore_tags.'): m.value
    m.reset()
    assert m.value['hmean']==0

class Detector(torch.nn.Module):
    def __init__(self, maps):
        super().__init__()
        self.p = torch.nn.Parameter(maps)
    def forward(self, x): return dict(maps=(self.p*20-10).sigmoid().expand(-1, 3 if self.training else 1, -1, -1))

def test_columns_of_a_learner():
    from fastai.data.core import DataLoaders
    train = (torch.rand(2,3,64,64), *torch.rand(4,2,64,64).round())
    valid = (torch.rand(2,3,64,64), SHAPES, [torch.tensor([box(4,4,44,24)], dtype=torch.float32), torch.zeros(0,4,2)], [torch.tensor([False]), torch.zeros(0, dtype=torch.bool)])
    dls = DataLoaders([train], [valid, valid], device='cpu')
    dls.n_inp = 1
    nets = dict(Good=Detector(blocks((0,11,11,37,17))), Loud=Detector(blocks((0,11,11,37,17), (1,11,40,37,46))))
    learn = distill_learner(dls, nets, [Term(db_loss, 'Good.maps'), Term(db_loss, 'Loud.maps')], metrics=DetMetric(), monitor='Good_hmean')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    got = learn.table().iloc[0]
    assert got[['Good_precision','Good_recall','Good_hmean']].tolist()==[1, 1, 1]
    assert got[['Loud_precision','Loud_recall']].tolist()==[.5, 1] and got['Loud_hmean']==pytest.approx(2/3)
