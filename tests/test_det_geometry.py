"The geometry of words: areas, edges moved, overlaps, and polygons that nobody expects"
import ast
from pathlib import Path
import numpy as np, pytest, torch
from shapely.geometry import Polygon

import distillbook.det
from distillbook.core import UserError
from distillbook.det.geometry import area_length, as_corners, offset_polygon, overlaps, to_shapely, valid_polygons, well_formed

def box(x0, y0, x1, y1): return [[x0,y0], [x1,y0], [x1,y1], [x0,y1]]
SQUARE = box(0, 0, 10, 10)
ODD = dict(none=[], point=[[1,1]], two=[[0,0],[5,5]], nan=[[0,0],[9,0],[9,np.nan]], inf=[[0,0],[9,0],[9,np.inf],[0,9]])

@pytest.mark.parametrize('form', [list, np.array, lambda p: np.array(p, 'i4'), lambda p: torch.tensor(p, dtype=torch.float32), lambda p: torch.tensor(p, dtype=torch.float32, requires_grad=True)])
def test_corners_of_every_kind(form):
    got, = as_corners([form(SQUARE)])
    assert got.dtype==np.float64 and got.tolist()==SQUARE
    assert as_corners([form(SQUARE)], np.float32)[0].dtype==np.float32

def test_a_whole_array_is_a_list():
    quads = np.float32([SQUARE, box(5,5,6,7)])
    assert all(np.array_equal(a, b) for a,b in zip(as_corners(quads), as_corners(torch.from_numpy(quads)))) and as_corners(quads[:0])==[]

def test_well_formed():
    assert not well_formed(as_corners(ODD.values())).any()
    mixed = [SQUARE, *ODD.values(), SQUARE[:3]]
    assert well_formed(as_corners(mixed)).tolist()==[True, *[False]*len(ODD), True]
    for empty in ([], [[]], [[],[]]): assert well_formed(as_corners(empty)).tolist()==[False]*len(empty)

def test_areas_and_lengths_are_shapelys():
    rng = np.random.default_rng(0)
    polys = [rng.uniform(0, 50, (k,2)) for k in (3,4,5,9)]
    area,length = area_length(polys)
    assert np.allclose(area, [Polygon(p).area for p in polys]) and np.allclose(length, [Polygon(p).length for p in polys])
    assert [o.shape for o in area_length([])]==[(0,),(0,)]
    assert area_length([[[5,5]]*4])[0].tolist()==[0]

def test_too_few_corners():
    with pytest.raises(UserError, match='three corners or more, not 2'): to_shapely([SQUARE, [[0,0],[1,1]]])

def test_edges_moved():
    assert np.ptp(offset_polygon(np.float32(SQUARE), -2)[0], 0).tolist()==[6,6]
    assert np.ptp(offset_polygon(SQUARE, 3)[0], 0).tolist()==[16,16]
    assert offset_polygon(SQUARE, -6)==[] and offset_polygon([[5,5]]*4, -1)==[]
    bell = [[0,0],[40,0],[40,18],[80,18],[80,0],[120,0],[120,50],[80,50],[80,32],[40,32],[40,50],[0,50]]
    assert len(offset_polygon(bell, -8))==2 and all(o.dtype==np.int32 and o.shape[1]==2 for o in offset_polygon(bell, -8))
    assert np.array_equal(offset_polygon(np.float32(SQUARE)+.9, 1)[0], offset_polygon(SQUARE, 1)[0]) # fractions are cut off

def test_valid_polygons():
    crossed = [[0,0],[9,9],[9,0],[0,9]]
    polygons,places = valid_polygons([crossed, SQUARE, *ODD.values(), [[0,0],[5,5],[9,9],[2,2]], SQUARE+SQUARE[-1:]])
    assert places.tolist()==[1, 3+len(ODD)] and [p.area for p in polygons]==[100,100]
    assert [len(o) for o in valid_polygons([])]==[0,0]==[len(o) for o in valid_polygons([crossed])]

@pytest.mark.parametrize('seed', range(5))
def test_overlaps_are_those_of_all_pairs(seed):
    rng = np.random.default_rng(seed)
    a,b = (valid_polygons([box(x, y, x+w, y+h) for x,y,w,h in rng.uniform(1, 30, (n,4))])[0] for n in (12,15))
    i,j,shared,iou = overlaps(a, b)
    assert list(zip(i, j))==sorted(zip(i, j))
    found = {(k,m): (s,u) for k,m,s,u in zip(i.tolist(), j.tolist(), shared, iou)}
    for k,p in enumerate(a):
        for m,q in enumerate(b):
            both = p.intersection(q).area
            assert np.allclose(found.get((k,m), (0,0)), (both, both/p.union(q).area))

def test_overlaps_of_nothing():
    some = valid_polygons([SQUARE])[0]
    for a,b in ((some[:0], some), (some, some[:0]), (some[:0], some[:0])): assert [len(o) for o in overlaps(a, b)]==[0]*4

# ---- the folder

MODULES = sorted(Path(distillbook.det.__file__).parent.glob('*.py'))

@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_det_knows_nothing_of_configs_and_shadows_no_builtin(path):
    import builtins
    tree,names = ast.parse(path.read_text()),set(dir(builtins))
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom): assert not (n.module or '').startswith(('rec','use','config','distillbook.rec','distillbook.use','distillbook.config')), ast.unparse(n)
        stored = n.id if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) else n.arg if isinstance(n, ast.arg) else n.name if isinstance(n, (ast.FunctionDef,ast.ClassDef)) else None
        assert stored not in names or stored.startswith('__'), stored
