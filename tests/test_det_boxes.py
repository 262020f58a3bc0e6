"Boxes from maps: PaddleOCR's own, to the last bit, and maps that nobody expects"
import json
from pathlib import Path
import cv2, numpy as np, pytest, torch
from distillbook.config import build_decoder
from distillbook.core import UserError
from benchmarks.boxes import batch_of, loop, same
from distillbook.det.boxes import DBPostProcess, draw_boxes, mean_inside, order_corners, outlines, rectangles, unclip_distance
from distillbook.det.geometry import offset_polygon, to_shapely

Z = np.load(Path(__file__).parent/'golden'/'post_det.npz')
MAPS = Z['maps|in|maps_u8'].astype(np.float32)/np.float32(255)
SOURCE = np.array([(320,384),(160,192),(203,411),(160,192),(160,192),(480,288)], float) # heights and widths of the pictures
SHAPES = np.concatenate([SOURCE, [160,192]/SOURCE], 1)
CASES = [k[:-5] for k in Z if k.startswith('DB_') and k.endswith('|meta')]
NOISE,CV2 = 3,json.loads(str(Z['maps|meta']))['cv2'] # This map's boxes depend on the version of OpenCV

@pytest.mark.parametrize('case', CASES)
def test_golden(case):
    meta = {k: v for k,v in json.loads(str(Z[f'{case}|meta'])).items() if k not in ('counts','keep64')}
    got = DBPostProcess(**meta)(torch.from_numpy(MAPS)[:,None], SHAPES)
    assert len(got)==6
    for i,o in enumerate(got):
        if i==NOISE and not cv2.__version__.startswith(CV2): continue
        if meta.get('box_type')=='poly':
            assert [len(p) for p in o['points']]==Z[f'{case}|out|b{i}_len'].tolist()
            if len(o['points']): assert np.array_equal(np.concatenate(o['points']), Z[f'{case}|out|b{i}_flat'])
        else: assert np.array_equal(o['points'].reshape(-1,4,2), Z[f'{case}|out|b{i}'].reshape(-1,4,2))
        if f'{case}|out|s{i}' in Z: assert np.array_equal(o['scores'], Z[f'{case}|out|s{i}'])

@pytest.mark.parametrize('i', range(4))
def test_primitives(i):
    "One rectangle grown, and the rectangle around it"
    box = Z[f'primitives|out|box{i}']
    for ratio in (1.5, 2.):
        grown = offset_polygon(box, unclip_distance(box[None], ratio)[0])
        assert len(grown)==1 and np.array_equal(grown[0], Z[f'primitives|out|unclip{i}_{ratio}'])
    side = float(Z[f'primitives|out|mini{i}_sside'])
    assert np.array_equal(rectangles(grown, side)[0][0], Z[f'primitives|out|mini{i}'])
    assert not len(rectangles(grown, side+1e-9)[0])

def blobs(seed, n=3, side=160):
    "Maps of shapes that no word has"
    noise = np.random.default_rng(seed).normal(size=(n,1,side,side)).astype(np.float32)
    return np.stack([cv2.GaussianBlur(o[0], (0,0), 2+seed%4) for o in noise])[:,None]*(4+seed)+.3

@pytest.mark.parametrize('seed', (0,1,4,5))
@pytest.mark.parametrize('kwargs', [{}, dict(score_mode='slow'), dict(use_dilation=True), dict(box_type='poly'), dict(max_candidates=5), dict(unclip_ratio=0.)], ids=str)
def test_as_a_loop_over_boxes(seed, kwargs):
    "Blobs with holes, at the edges, one pixel wide, with scores above 1 and below 0; and words"
    kwargs = dict(box_thresh=.5, unclip_ratio=1.5) | kwargs
    maps,shapes = blobs(seed),np.tile([333.,487,160/333,160/487], (3,1))
    got = DBPostProcess(**kwargs)(maps, shapes)
    assert same(got, loop(maps, shapes, **kwargs)) and sum(len(o['points']) for o in got)>2
    maps,shapes = batch_of(2, 20, 200, seed)
    got = DBPostProcess(**kwargs)(maps, shapes)
    assert same(got, loop(maps, shapes, **kwargs)) and sum(len(o['points']) for o in got)>4

def test_the_comparison_can_fail():
    maps,shapes = batch_of(1, 20, 200)
    assert not same(DBPostProcess(box_thresh=.6)(maps, shapes), loop(maps, shapes, box_thresh=.6, unclip_ratio=1.9))

def test_nan_inside_a_word():
    "The word with a pixel that is no number is left out, its neighbour is not"
    m = np.zeros((1,1,64,96), np.float32)
    m[0,0,5:20,5:80] = m[0,0,40:55,5:80] = .9
    m[0,0,10,20] = np.nan
    for kind in ('quad','poly'):
        got, = DBPostProcess(box_type=kind)(m, [[64,96,1,1]])
        assert len(got['points'])==1 and got['points'][0][:,1].min()>20

@pytest.mark.parametrize('poly,want', [([[0,0],[3,0],[3,1],[0,1]], .5), ([[-9,-9],[-5,-9],[-5,-5]], 0.), ([[50,0],[60,0],[60,5]], 0.), ([[1,1],[1,1],[1,1]], 1.)])
def test_mean_inside(poly, want):
    assert mean_inside(np.float32([[0,0,0,0],[1,1,1,1],[0,0,0,0]]), np.int32(poly))==want

def test_there_is_something_to_compare(): assert len(CASES)==25 and sum(len(Z[k]) for k in Z if '|out|b' in k and '|out|b3' not in k)>50

def test_one_by_one_is_as_the_batch():
    post = DBPostProcess(box_thresh=.5)
    whole = post(MAPS[:,None], SHAPES)
    for i in range(6):
        one, = post(dict(maps=MAPS[i:i+1,None]), SHAPES[i:i+1])
        assert np.array_equal(one['points'], whole[i]['points']) and np.array_equal(one['scores'], whole[i]['scores'])

def test_of_three_maps_the_first():
    maps = torch.from_numpy(MAPS)[:,None]
    three = torch.cat([maps, 1-maps, maps*0], 1)
    for a,b in zip(DBPostProcess()(three, SHAPES), DBPostProcess()(maps, SHAPES)): assert np.array_equal(a['points'], b['points'])

def test_padding_is_not_looked_at():
    m = np.zeros((1,1,64,96), np.float32)
    m[0,0,10:30,10:60] = .9
    alone, = DBPostProcess()(m, [[64,96,1,1]])
    padded = np.full((1,1,96,128), .95, np.float32)
    padded[0,0,:64,:96] = m
    got, = DBPostProcess()(padded, [[64,96,1,1]])
    assert np.array_equal(alone['points'], got['points']) and len(got['points'])==1

def test_scaling_back():
    m = np.zeros((1,1,64,96), np.float32)
    m[0,0,20:40,20:60] = .9
    (a,),(b,) = DBPostProcess()(m, [[64,96,1,1]]),DBPostProcess()(m, [[128,192,.5,.5]])
    assert np.abs(2*a['points']-b['points']).max()<=1

@pytest.mark.parametrize('value', [0., 1., np.nan, -np.inf])
@pytest.mark.parametrize('kind', ['quad','poly'])
def test_flat_maps(value, kind):
    for hw in ((32,32),(1,1),(2,3)):
        got, = DBPostProcess(box_type=kind)(np.full((1,1,*hw), value, np.float32), [[*hw,1,1]])
        assert len(got['points'])==len(got['scores'])<=1

def test_a_speck_is_no_word():
    m = np.zeros((1,1,32,32), np.float32)
    m[0,0,5,5] = 1
    assert not len(DBPostProcess(box_thresh=0.)(m, [[32,32,1,1]])[0]['points'])

def test_types_and_geometry():
    m = torch.from_numpy(MAPS)[:,None]
    got = DBPostProcess(box_thresh=.5)(m.half(), torch.from_numpy(SHAPES))
    assert got[0]['points'].dtype==np.int32
    geometry = to_shapely(got[0]['points'])
    assert len(geometry)==len(got[0]['points']) and all(g.area>0 for g in geometry)
    assert len(to_shapely([]))==0
    with pytest.raises(UserError, match='three corners'): to_shapely([[[0,0],[1,1]]])

def test_corner_order():
    square = np.float32([[0,0],[10,0],[10,5],[0,5]])
    for k in range(4): assert order_corners(np.roll(square, k, 0)[None])[0].tolist()==square.tolist()

def test_the_old_word_for_polygons():
    a,b = DBPostProcess(use_polygon=True)(MAPS[:,None], SHAPES),DBPostProcess(box_type='poly')(MAPS[:,None], SHAPES)
    assert all(len(x['points'])==len(y['points']) for x,y in zip(a, b))

@pytest.mark.parametrize('kw,says', [(dict(score_mode='quick'), 'fast'), (dict(box_type='quads'), 'quad'), (dict(thresh='0.3'), "thresh .* not '0.3'"), (dict(unclip_ratio=-1), 'unclip_ratio'), (dict(unclip_ratio=np.nan), 'unclip_ratio'), (dict(max_candidates=1.5), 'whole number'), (dict(box_thresh=None), 'box_thresh')])
def test_mistakes(kw, says):
    with pytest.raises(UserError, match=says): DBPostProcess(**kw)

def test_wrong_shapes():
    for maps,shapes in ((MAPS, SHAPES), (MAPS[:,None], SHAPES[:2]), (MAPS[:,None], SHAPES*0)):
        with pytest.raises(UserError): DBPostProcess()(maps, shapes)
    with pytest.raises(UserError, match="no entry 'maps'; did you mean 'map'"): DBPostProcess()(dict(map=MAPS), SHAPES)

def test_drawing():
    im = np.zeros((40,60,3), np.uint8)
    out = draw_boxes(im, dict(A=[np.array([[5,5],[30,5],[30,20],[5,20]])], B=[]))
    assert out.any() and not im.any() and out.shape==im.shape

def test_from_a_configuration():
    cfg = dict(Global={}, Architecture=dict(model_type='det', Models=dict(Student={}, Student2={})), PostProcess=dict(name='DistillationDBPostProcess', model_name=['Student','Student2'], key='head_out', thresh=.3, box_thresh=.6, unclip_ratio=1.5))
    maps = dict(maps=torch.from_numpy(MAPS)[:,None])
    got = build_decoder(cfg)(dict(Student=maps, Student2=maps), SHAPES)
    assert list(got)==['Student','Student2']
    want = Z['DB_quad_fast_dil0_0.3_0.6_1.5|out|b0']
    for net in got: assert np.array_equal(got[net][0]['points'], want)

def test_the_decoder_takes_the_output_as_it_is():
    assert DBPostProcess.head is None
    with pytest.raises(UserError, match='shapes .* are wanted, not None'): DBPostProcess()(np.zeros((1,1,32,32), np.float32))
