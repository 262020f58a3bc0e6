"Pages to find words on: the same from one seed, words inside and apart, ink where the polygons say, files that PaddleOCR's readers would take"
import cv2, json, numpy as np, pytest
from pathlib import Path
from shapely.geometry import Polygon
from distillbook.core import UserError
from distillbook.det import render as pages
from distillbook.det.render import TEXTURES, RenderedPages, are_apart, placed_corners, place_word, ink_colour, placement, render_page, show_page, small_word, texture, write_pages, write_word
from distillbook.data.render import font_files, make_words

WORDS,DEJAVU,ROBOTO = make_words(300, seed=1),font_files('dejavu'),font_files('roboto')
def page(seed, height=256, width=256, words=WORDS, fonts=DEJAVU, **kwargs): return render_page(np.random.default_rng(seed), height, width, words, fonts, **kwargs)

def test_the_same_everywhere():
    "This page was written down once; another machine must give it too, to a pixel of a word's ink and a grey level of the mean"
    im,polys,texts = page([1, 5])
    assert texts == ['Dour', 'DROALL', '75A5ZJ', 'Ste', '###', '###', 'Weandcro']
    np.testing.assert_allclose(polys[:,0], [[23.6,125], [56,50.6], [127.2,18], [10,106.2], [104.3,154.4], [160.2,187.2], [114.1,120.5]], atol=1.5)
    np.testing.assert_allclose(im.mean((0,1)), [192.4, 143.3, 179.9], atol=1)

def test_depends_on_nothing_else():
    np.random.seed(0)
    a = page(3)
    np.random.seed(1)
    b,c = page(3),page(4)
    assert (a[0]==b[0]).all() and (a[1]==b[1]).all() and a[2]==b[2]
    assert (a[0]!=c[0]).any()

@pytest.mark.parametrize('hw', [(256,256), (128,320), (33,500), (301,97)])
def test_inside_and_apart(hw):
    n = 0
    for i in range(25):
        im,polys,texts = page([i, *hw], *hw)
        assert im.shape==(*hw,3) and im.dtype==np.uint8 and polys.dtype==np.float32 and polys.shape==(len(texts),4,2)
        assert (polys>=1).all() and (polys<=[hw[1]-2, hw[0]-2]).all()
        shapes = [Polygon(p) for p in polys]
        assert all(s.is_valid and s.exterior.is_ccw for s in shapes)   # clockwise on the screen, where y points down
        assert all(a.distance(b)>2 for j,a in enumerate(shapes) for b in shapes[:j])
        n += len(texts)
    assert n>=10

def test_spread():
    "Sizes on a logarithmic scale, both polarities, some illegible, every texture, at most so many words"
    got = [page([7, i], illegible=.2, words_max=5) for i in range(60)]
    heights = np.concatenate([np.linalg.norm(p[:,3]-p[:,0], axis=1) for _,p,_ in got])
    angles = np.concatenate([np.degrees(np.arctan2(*(p[:,1]-p[:,0]).T[::-1])) for _,p,_ in got])
    texts = sum((t for *_,t in got), [])
    assert heights.min()<12<24<heights.max()<60
    assert angles.min()<-15 and angles.max()>15 and np.abs(angles).max()<25+4*5
    assert .08<np.mean([t=='###' for t in texts])<.35 and set(texts)-{'###'} <= set(WORDS)
    assert max(len(t) for *_,t in got)==5 and min(len(t) for *_,t in got)==1

def test_polarity():
    rng = np.random.default_rng(0)
    steps = np.array([ink_colour(rng, np.array([120.]*3), (40, 100)).mean()-120 for _ in range(400)])
    assert .4<(steps>0).mean()<.6 and 30<np.abs(steps).min() and np.abs(steps).max()<121
    for level,sign in ((5., 1), (250., -1)):
        assert all(sign*(ink_colour(rng, np.array([level]*3), (60, 100)).mean()-level)>0 for _ in range(50))

@pytest.mark.parametrize('angle', [0, 13, -40, 90, 180])
def test_ink_is_where_the_polygon_says(angle):
    "The rotated ink fills its polygon to each of the four sides, and none is outside of it"
    for word,size in (('Hamburg', 30), ('egg', 14), ('8', 40)):
        ink = small_word(word, DEJAVU[2], size)
        assert ink[0].max()>0 and ink[-1].max()>0 and ink[:,0].max()>0 and ink[:,-1].max()>0
        M = placement(*ink.shape, 128, 120, angle)
        poly = placed_corners(*ink.shape, M)
        ys,xs = np.nonzero(cv2.warpAffine(ink, M, (256, 256))>100)
        inner = np.linalg.solve(M[:,:2], (np.stack([xs, ys])-M[:,2:]))
        assert (inner.min(1)>-1.2).all() and (inner.max(1)<[ink.shape[1]+.2, ink.shape[0]+.2]).all()
        assert (inner.min(1)<[3, 3]).all() and (inner.max(1)>[ink.shape[1]-4, ink.shape[0]-4]).all()
        np.testing.assert_allclose(Polygon(poly).area, ink.size, rtol=1e-9)
        np.testing.assert_allclose(poly.mean(0), [128, 120], atol=1e-9)

def test_words_are_written_inside_their_polygons():
    "What a page's words change lies in their polygons, blurred words aside"
    for i in range(6):
        rng = np.random.default_rng(i)
        paper = np.full((128, 200, 3), 100, np.float32)
        ink = small_word(WORDS[i], ROBOTO[i], 24)
        M,poly = place_word(rng, ink.shape, 128, 200, 20, [], 3)
        before = paper.copy()
        write_word(paper, ink, M, rng, (60, 100))
        inside = np.zeros((128, 200), np.uint8)
        cv2.fillPoly(inside, [np.round(poly).astype(np.int32)], 1)
        change = np.abs(paper-before).max(2)
        assert change.max()>40 and change[cv2.dilate(inside, np.ones((5,5), np.uint8))==0].max()==0

def test_are_apart_is_exact():
    rng = np.random.default_rng(0)
    for _ in range(300):
        a,b = [placed_corners(*rng.integers(4, 30, 2), placement(10, 10, *rng.uniform(0, 60, 2), rng.uniform(0, 360))) for _ in range(2)]
        assert are_apart(a, b) == (not Polygon(a).intersects(Polygon(b)))
        assert are_apart(a, b, 5) <= (Polygon(a).distance(Polygon(b))>5)

@pytest.mark.parametrize('kind', TEXTURES)
def test_textures(kind):
    for hw in ((32,32), (33,200), (256,256)):
        im = texture(np.random.default_rng(1), *hw, kind)
        assert im.shape==(*hw,3) and im.dtype==np.float32 and np.isfinite(im).all() and im.std()>0
        assert -80<im.min() and im.max()<335
    assert page(1, kind=kind)[0].std()>3

def test_no_room():
    "A word that fits nowhere is left out; a page may stay empty"
    im,polys,texts = page(0, 32, 32, words=['Wwwwwwwww'], size=(39, 40))
    assert polys.shape==(0,4,2) and texts==[] and im.shape==(32,32,3)

@pytest.mark.parametrize('kwargs,says', [(dict(words=[]), 'needs words and fonts'), (dict(fonts=[]), 'needs words and fonts'), (dict(height=31), 'at least 32 x 32 pixels, not 31 x 256'),
    (dict(kind='cloud'), "no texture 'cloud'; did you mean 'clouds'"), (dict(words_max=0), 'words_max=0'), (dict(size=(0, 10)), r'size=\(0, 10\)'), (dict(words=[' ']), "' ' has no ink")])
def test_bad_input(kwargs, says):
    with pytest.raises(UserError, match=says): page(0, **kwargs)

def read(folder):
    rows = [o.split('\t') for o in (folder/'label.txt').read_text(encoding='utf-8').splitlines()]
    return [(cv2.imread(str(folder/p)), json.loads(o)) for p,o in rows]

def test_write_pages(tmp_path):
    labels = write_pages(tmp_path/'a', 4, seed=2, height=160, width=200, words=WORDS, fonts=ROBOTO, illegible=.5)
    assert labels==tmp_path/'a'/'label.txt' and sorted(o.name for o in (tmp_path/'a').iterdir())==['images', 'label.txt']
    assert sorted(o.name for o in (tmp_path/'a'/'images').iterdir())==[f'{i:05}.png' for i in range(4)]
    for i,(im,marks) in enumerate(read(tmp_path/'a')):
        want,polys,texts = page([2, i], 160, 200, fonts=ROBOTO, illegible=.5)
        assert (im==want).all() and [o['transcription'] for o in marks]==texts
        np.testing.assert_allclose(np.array([o['points'] for o in marks]).reshape(-1, 4, 2), polys, atol=.0051)
    more = read((write_pages(tmp_path/'b', 2, seed=2, height=160, width=200, words=WORDS, fonts=ROBOTO, illegible=.5)).parent)
    assert all((a==b).all() and m==n for (a,m),(b,n) in zip(read(tmp_path/'a'), more))

def test_write_pages_none(tmp_path):
    assert write_pages(tmp_path/'none', 0).read_text()==''

def test_no_label_file_before_the_pictures(tmp_path, monkeypatch):
    "Interrupted, a folder has no label file, and nothing half written"
    real,calls = pages.render_page,[]
    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls)==3: raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(pages, 'render_page', stop)
    with pytest.raises(KeyboardInterrupt): write_pages(tmp_path, 4, words=WORDS)
    assert not (tmp_path/'label.txt').exists() and sorted(o.name for o in (tmp_path/'images').iterdir())==['00000.png', '00001.png']

def test_write_pages_where_a_file_is(tmp_path):
    (tmp_path/'file').write_text('here')
    with pytest.raises(UserError, match='could not be written'): write_pages(tmp_path/'file', 1, words=WORDS)

def test_show_page():
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    im,polys,texts = page(2)
    ax = show_page(im, polys, labels=texts)
    assert len(ax.patches)==len(polys) and [o.get_text() for o in ax.texts]==texts
    np.testing.assert_allclose(ax.patches[0].get_xy()[:4], polys[0])
    ax = show_page(im[...,0], [np.arange(10).reshape(5,2)**2, [1,2,3,5,5,6]], color=['red','blue'])
    assert [len(p.get_xy())-1 for p in ax.patches]==[5,3] and matplotlib.colors.to_hex(ax.patches[1].get_edgecolor())=='#0000ff'
    assert not show_page(im).patches
    plt.close('all')

# ---- pages as a source

def test_pages_as_a_source():
    "The same in another order, another process and another epoch; `skip` goes on where another source ends"
    import pickle
    a = RenderedPages(4, seed=3, height=96, width=128, words_max=6)
    b = pickle.loads(pickle.dumps(a))
    for i in (3,0,2,1):
        x,y = a.read(i),b.read(i, np.random.default_rng(i))
        assert (x['image']==y['image']).all() and x['label']==y['label'] and x['where']==y['where']
        assert x['image'].shape==(96,128,3) and x['image'].dtype==np.uint8
        assert a.read(i, picture=False)=={k: v for k,v in x.items() if k!='image'}
    c = RenderedPages(2, seed=3, skip=2, height=96, width=128, words_max=6)
    assert [o['label'] for o in c]==[a[2]['label'], a[3]['label']] and len(a)==4
    assert len({o['path'] for o in [*a, *c]})==4 and a.fingerprint()==b.fingerprint()!=c.fingerprint()

def test_pages_as_a_source_are_read_by_the_label_operation():
    from distillbook.det.operations import DetLabelEncode
    page = RenderedPages(1, fonts='roboto', height=160, width=200).read(0)
    words = DetLabelEncode()(page)
    assert len(words['polys'])==len(words['texts'])==len(json.loads(page['label']))>0

@pytest.mark.parametrize('kwargs,says', [(dict(pages=0), 'pages: a whole number from 1 is wanted, not 0'), (dict(skip=-1), 'skip'), (dict(height=31), 'height'), (dict(seed=1.5), 'seed'),
    (dict(fonts='arial'), "no font family 'arial'"), (dict(fonts=[]), 'fonts: the list is empty'), (dict(words_max=True), 'words_max')])
def test_pages_that_cannot_be(kwargs, says):
    with pytest.raises(UserError, match=says): RenderedPages(**kwargs)
