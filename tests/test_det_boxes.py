"Boxes from maps: PaddleOCR's own, to the last bit, and maps that nobody expects"
import json
from pathlib import Path
import numpy as np, pytest, torch
from distillbook.config import build_decoder
from distillbook.core import UserError
from distillbook.det.boxes import DBPostProcess, draw_boxes, find_quads, order_corners, outlines, to_shapely

Z = np.load(Path(__file__).parent/'golden'/'post_det.npz')
MAPS = Z['maps|in|maps_u8'].astype(np.float32)/np.float32(255)
SOURCE = np.array([(320,384),(160,192),(203,411),(160,192),(160,192),(480,288)], float) # heights and widths of the pictures
SHAPES = np.concatenate([SOURCE, [160,192]/SOURCE], 1)
CASES = [k[:-5] for k in Z if k.startswith('DB_') and k.endswith('|meta')]
NOISE = 3 # Depends on the version of OpenCV

@pytest.mark.parametrize('case', CASES)
def test_golden(case):
    meta = {k: v for k,v in json.loads(str(Z[f'{case}|meta'])).items() if k not in ('counts','keep64')}
    got = DBPostProcess(**meta)(torch.from_numpy(MAPS)[:,None], SHAPES)
    assert len(got)==6
    for i,o in enumerate(got):
        if i==NOISE: continue
        if meta.get('box_type')=='poly':
            assert [len(p) for p in o['points']]==Z[f'{case}|out|b{i}_len'].tolist()
            if len(o['points']): assert np.array_equal(np.concatenate(o['points']), Z[f'{case}|out|b{i}_flat'])
        else: assert np.array_equal(o['points'].reshape(-1,4,2), Z[f'{case}|out|b{i}'].reshape(-1,4,2))
        if f'{case}|out|s{i}' in Z: assert np.array_equal(o['scores'], Z[f'{case}|out|s{i}'])

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

@pytest.mark.parametrize('kw,says', [(dict(score_mode='quick'), 'fast'), (dict(box_type='quads'), 'quad')])
def test_mistakes(kw, says):
    with pytest.raises(UserError, match=says): DBPostProcess(**kw)

def test_wrong_shapes():
    for maps,shapes in ((MAPS, SHAPES), (MAPS[:,None], SHAPES[:2]), (MAPS[:,None], SHAPES*0)):
        with pytest.raises(UserError): DBPostProcess()(maps, shapes)

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
