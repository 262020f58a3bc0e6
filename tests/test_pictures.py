"Pictures of every kind come in one way: turned, on paper, of any depth, page by page; and bad ones are named"
import io, sys
from pathlib import Path
import cv2, numpy as np, pytest
from PIL import Image
from distillbook.core import UserError
from distillbook.data.operations import DecodeImage
from distillbook.data.pictures import *
from distillbook.data.render import draw_line, font_files

INK = 255-draw_line('Pronghorn', font_files('dejavu')[2])
BGR = np.repeat(INK[...,None], 3, 2)
LINE = Image.fromarray(INK)

def packed(im, kind, **kwargs):
    out = io.BytesIO()
    im.save(out, kind, **kwargs)
    return out.getvalue()

def encoded(array, suffix): return cv2.imencode(suffix, array)[1].tobytes()

T = Image.Transpose
UNDONE = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}

@pytest.mark.parametrize('kind', ['jpeg','png','webp','tiff'])
@pytest.mark.parametrize('mode', ['RGB','RGBA','L'])
def test_orientation(kind, mode):
    "Stored in each of the eight ways, with a note which: the same upright picture"
    if kind=='jpeg' and mode=='RGBA': return
    im = Image.merge('RGBA', [Image.new('L', LINE.size, 0)]*3+[Image.fromarray(255-INK)]) if mode=='RGBA' else LINE.convert(mode)
    for orientation,method in UNDONE.items():
        exif = Image.Exif()
        exif[274] = orientation
        data = packed(im if method is None else im.transpose(method), kind, exif=exif, **(dict(lossless=True) if kind=='webp' else {}))
        got = picture_from(data)
        assert got.shape==BGR.shape and np.abs(got.astype(int)-BGR).mean()<(3 if kind=='jpeg' else .01), orientation
        assert picture_size(data)==BGR.shape[1::-1]
        assert kind=='tiff' or picture_from(data, turn=False).shape[:2]==(INK.T if orientation>4 else INK).shape

DEEP = BGR.astype(np.uint16)*257
CLEAR = np.dstack([0*BGR, 255-INK])
KINDS = {
    'png 16 grey': encoded(DEEP[...,0], '.png'), 'png 16 colours': encoded(DEEP, '.png'), 'png 16 clear': encoded(CLEAR.astype(np.uint16)*257, '.png'),
    'tiff 16 grey': encoded(DEEP[...,0], '.tiff'), 'tiff 16 colours': encoded(DEEP, '.tiff'), 'tiff 12 of 16': packed(Image.fromarray((INK.astype(np.uint16)*16+15).clip(0, 4095)), 'tiff'),
    'tiff float 0..1': packed(Image.fromarray(INK/np.float32(255)), 'tiff'), 'tiff float 0..255': packed(Image.fromarray(INK.astype(np.float32)), 'tiff'), 'tiff float colours': encoded(BGR/np.float32(255), '.tiff'),
    'tiff 32 bit': packed(Image.fromarray(INK.astype(np.int32)*257), 'tiff'), 'cmyk tiff': packed(LINE.convert('CMYK'), 'tiff'), 'cmyk jpeg': packed(LINE.convert('CMYK'), 'jpeg', quality=95),
    'palette gif': packed(LINE.convert('P'), 'gif'), 'palette png': packed(LINE.convert('P'), 'png'), 'LA png': packed(Image.merge('LA', [Image.new('L', LINE.size, 0), Image.fromarray(255-INK)]), 'png'),
    'clear png': encoded(CLEAR, '.png'), 'clear webp': encoded(CLEAR, '.webp'), 'clear tiff': packed(Image.fromarray(np.dstack([CLEAR[...,:3], CLEAR[...,3]]), 'RGBA'), 'tiff'),
    'bmp': encoded(BGR, '.bmp'), 'ppm': encoded(BGR, '.ppm'), 'png': encoded(BGR, '.png'), 'grey png': encoded(INK, '.png'), 'jpeg': encoded(BGR, '.jpg'), 'avif': packed(LINE.convert('RGB'), 'avif', quality=95)}

@pytest.mark.parametrize('kind', KINDS)
def test_any_kind(kind):
    lossy = any(o in kind for o in ('jpeg','avif','webp'))
    for im in (picture_from(KINDS[kind]), DecodeImage('BGR')(dict(image=KINDS[kind]), None)['image']):
        assert im.dtype==np.uint8 and im.shape==BGR.shape and np.abs(im.astype(int)-BGR).max()<=(60 if lossy else 1), kind
    assert picture_from(KINDS[kind], grey=True).shape==INK.shape

@pytest.mark.parametrize('kind', [dict(mode='1', format='png'), dict(mode='1', format='tiff', compression='group4')])
def test_one_bit(kind):
    im = picture_from(packed(LINE.convert(kind.pop('mode'), dither=0), kind.pop('format'), **kind))
    assert set(np.unique(im))=={0,255} and ((im[...,0]>127)==(INK>127)).all()

def test_transparency():
    "White paper for dark letters, black for light ones, whatever colour the nothing has"
    for colour,paper in ((0,255), (60,255), (255,0), (200,0)):
        for hidden in (0,255):
            im = np.dstack([np.where(INK[...,None]<255, colour, hidden).astype(np.uint8).repeat(3, 2), 255-INK])
            got = picture_from(encoded(im, '.png'))
            assert got[0,0].tolist()==[paper]*3 and abs(int(got[INK<10].mean())-colour)<9
    photo = np.dstack([BGR, np.full_like(INK, 255)])
    photo[:4,:4,3] = 0 # Rounded corners
    assert (picture_from(encoded(photo, '.png'))==BGR).all()
    key = Image.fromarray(INK).convert('P')
    assert picture_from(packed(key, 'png', transparency=255))[0,0].tolist()==[255]*3

def test_pages(tmp_path, caplog):
    second = Image.new('L', (30,20), 9)
    LINE.save(tmp_path/'two.tif', save_all=True, append_images=[second])
    (tmp_path/'half.tif').write_bytes((tmp_path/'two.tif').read_bytes()[:300])
    LINE.save(tmp_path/'one.tif')
    LINE.save(tmp_path/'film.gif', save_all=True, append_images=[second.resize(LINE.size)])
    names = [p.name for p in image_paths([tmp_path])]
    assert names==['film.gif', 'half.tif', 'one.tif', 'two.tif#page=1', 'two.tif#page=2']
    assert (read_picture(tmp_path/'two.tif#page=1')==BGR).all() and read_picture(tmp_path/'two.tif#page=2').shape==(20,30,3)
    assert [p.name for p in image_paths([f'{tmp_path}/two.tif#page=2'])]==['two.tif#page=2']
    with pytest.raises(UserError, match='two.tif#page=7: there is no page 7: the file has 2'): read_picture(tmp_path/'two.tif#page=7')
    with caplog.at_level('INFO', 'distillbook'): assert read_picture(tmp_path/'film.gif').shape==BGR.shape
    assert 'film.gif: 2 pictures one after another; the first is taken' in caplog.text
    (tmp_path/'odd#page=1.png').write_bytes(encoded(BGR, '.png'))
    assert (read_picture(tmp_path/'odd#page=1.png')==BGR).all()

def test_pdf(tmp_path, monkeypatch):
    LINE.convert('RGB').save(tmp_path/'a.pdf', save_all=True, append_images=[LINE.convert('RGB').rotate(180)], resolution=200)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, 'pypdfium2', None)
        with pytest.raises(UserError, match=r'a.pdf: a PDF; reading one needs the package pypdfium2: pip install distillbook\[pictures\]'): read_picture(tmp_path/'a.pdf')
        assert [p.name for p in image_paths([tmp_path/'a.pdf'])]==['a.pdf']
    pytest.importorskip('pypdfium2')
    pages = [read_picture(p) for p in image_paths([tmp_path])]
    assert len(pages)==2 and all(np.abs(np.subtract(o.shape, BGR.shape)).max()<=1 for o in pages)
    assert np.abs(cv2.resize(pages[0], INK.shape[::-1]).astype(int)-BGR).mean()<12
    (tmp_path/'b.pdf').write_bytes(b'%PDF-1.7 and no more')
    with pytest.raises(UserError, match='b.pdf: a PDF that cannot be opened'): read_picture(tmp_path/'b.pdf')

def test_heic(tmp_path, monkeypatch):
    (tmp_path/'a.heic').write_bytes(b'\0\0\0\x18ftypheic'+bytes(40))
    with monkeypatch.context() as m:
        m.setitem(sys.modules, 'pillow_heif', None)
        with pytest.raises(UserError, match='a.heic: a HEIC picture; reading one needs the package pillow-heif'): read_picture(tmp_path/'a.heic')
    pytest.importorskip('pillow_heif').register_heif_opener()
    with pytest.raises(UserError, match='a.heic: not a picture that can be read'): read_picture(tmp_path/'a.heic')
    got = picture_from(packed(LINE.convert('RGB'), 'heif', quality=95))
    assert got.shape==BGR.shape and np.abs(got.astype(int)-BGR).mean()<5

@pytest.mark.parametrize('data', [b'', b'hello', b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n', b'GIF89a', b'II*\0', b'RIFF\0\0\0\0WEBP', encoded(BGR, '.png')[:60], packed(LINE, 'tiff')[:200], packed(LINE.convert('P'), 'gif')[:30], bytes(1000)])
def test_no_pictures(data, capfd):
    with pytest.raises(UserError, match='picture|empty'): picture_from(data)
    assert page_count(data)==1 and capfd.readouterr()==('', '')

def test_each_picture(tmp_path):
    (tmp_path/'a.png').write_bytes(encoded(BGR, '.png')); (tmp_path/'b.png').write_bytes(b'no'); (tmp_path/'c.png').write_bytes(encoded(BGR, '.png'))
    paths = image_paths([tmp_path, tmp_path/'a.png'])
    done,faults = each_picture(paths, lambda p: read_picture(p).shape)
    assert [(p.name, s) for p,s in done]==[(n, BGR.shape) for n in ('a.png','c.png','a.png')] and [p.name for p in faults]==['b.png'] and 'b.png' in faults[paths[1]]
    with pytest.raises(UserError, match='b.png: not a picture'): each_picture([tmp_path/'b.png'], read_picture)
    assert each_picture([], read_picture)==([], {})

def test_drawing_paths(tmp_path):
    paths = [tmp_path/o for o in ('a.png','a.jpg','x/a.png','y/a.png','a.tif#page=1','a.tif#page=2','b.png','a.png')]
    (tmp_path/'a.tif').write_bytes(b'')
    to = drawing_paths(paths, tmp_path/'out')
    assert len({*to.values()})==7 and all(p.parent==tmp_path/'out' and p.suffix=='.png' for p in to.values())
    assert to[paths[0]].name=='a.png' and to[paths[6]].name=='b.png' and to[paths[4]].name=='a_page1.png'
    assert not {*drawing_paths(paths, tmp_path).values()} & {*paths}
