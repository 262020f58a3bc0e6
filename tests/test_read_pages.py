"Whole pages: nothing is lost at the edges of sizes, columns are read down, and drawings show what was read"
import json
import cv2, numpy as np, onnxruntime as ort, pytest, torch
from PIL import Image
from distillbook.data.render import draw_line, font_files
from distillbook.det.boxes import DBPostProcess
from distillbook.rec.decode import ctc_decode
from distillbook.use import ocr
from distillbook.use.ocr import *
from distillbook.use.ocr import OcrModel, can_be_read, on_a_sheet, page_map
from distillbook.use.released import teacher_file
from test_cli import fails, inside

@pytest.fixture(scope='module')
def reader(): return Reader(threads=1)

def page_of(words, shape, gap=70, x=30, size=1.):
    "A white page with a word in each row"
    page = np.full((*shape,3), 255, np.uint8)
    for i,w in enumerate(words):
        ink = cv2.resize(draw_line(w, font_files('dejavu')[3]), None, fx=size, fy=size, interpolation=cv2.INTER_AREA)
        y = 20+gap*i
        page[y:y+ink.shape[0],x:x+ink.shape[1]] -= ink[...,None]
    return page

def texts(lines): return [l.text for l in lines]

# Padding

class Recorder(OcrModel):
    "A recogniser that notes how wide its batches are"
    def run(self, x):
        self.seen.append(x.shape)
        return super().run(x)

@pytest.mark.parametrize('name', ['PP-OCRv3_rec', 'PP-OCRv6_rec'])
def test_short_lines_are_padded_as_by_paddleocr(name):
    "To 320 columns at least, as a plain script does; the same probabilities"
    rec = Recorder(name, 'rec', threads=1)
    rec.seen = []
    line = np.repeat(255-draw_line('BURGER', font_files('dejavu')[3])[...,None], 3, 2)
    got = read_lines([line, line], rec)
    assert rec.seen==[(1,3,48,320)]*2
    h,w = line.shape[:2]
    rw = -(-48*w//h)
    x = np.zeros((1,3,48,320), np.float32)
    x[0,:,:,:rw] = (cv2.resize(line, (rw,48)).transpose(2,0,1)/np.float32(255)-np.float32(.5))/np.float32(.5)
    probs = ort.InferenceSession(teacher_file(name)).run(None, {rec_input(name): x})[0]
    (text,confidence), = ctc_decode(torch.from_numpy(probs), rec.alphabet, probs=True)
    assert got[0][0]==text.strip()=='BURGER' and abs(got[0][1]-confidence)<1e-4
    rec.seen.clear()
    read_lines([np.repeat(line, 9, 1)], rec)
    assert rec.seen[0][3]>320

def rec_input(name): return ort.InferenceSession(teacher_file(name)).get_inputs()[0].name

def test_a_file_says_how_wide_it_was_trained(tmp_path):
    from distillbook.rec.labels import Alphabet
    from distillbook.rec.nets import PlainStudent
    from distillbook.use.export import export_trained
    from distillbook.use.results import Trained
    trained = Trained(dict(Student=PlainStudent(11, (8,8,8,8))), 'rec', Alphabet('0123456789'), (3,48,None), (.5,.5,.5), (.5,.5,.5), {}, {}, 160)
    file, = export_trained(trained, 'Student', 'onnx', tmp_path)
    rec = Recorder(file, 'rec', threads=1)
    rec.seen = []
    read_lines([np.full((48,30,3), 255, np.uint8)], rec)
    assert rec.least==160 and rec.seen==[(1,3,48,160)] and OcrModel('PP-OCRv3_rec', 'rec').least==320

# Order

def box(x, y, w=40, h=20, lean=0.):
    c,s = np.cos(np.radians(lean)),np.sin(np.radians(lean))
    return np.array([[0,0],[w,0],[w,h],[0,h]])@np.array([[c,s],[-s,c]])+[x,y]

def in_order(boxes):
    boxes = np.array(boxes, np.float32)
    for seed in range(4):
        p = np.random.default_rng(seed).permutation(len(boxes))
        assert [int(p[i]) for i in order_boxes(boxes[p])]==list(range(len(boxes)))

@pytest.mark.parametrize('lean', [-14, -9, 9, 14])
def test_order_of_an_address_that_leans(lean):
    "Three lines 24 pixels high that lean otherwise than the page reach over 41 and more; by their corners they are one row"
    in_order([box(300, y, 600, 24) for y in (0,40,80)] + [box(60, 300+30*i, w, 24, lean) for i,w in enumerate((160,150,90))])

def test_order_of_two_columns():
    left,right = [box(0, 60+30*i, w) for i,w in enumerate((300,290,300,280,160))],[box(350, 68+30*i, w) for i,w in enumerate((300,300,290,120))]
    in_order([*left, *right])
    in_order([box(0, 0, 650, 40), *left, *right, box(0, 240, 640), box(0, 270, 600)]) # A heading, and a foot of two lines
    turned = np.array([box(0, 0, 650, 40), *left, *right])@np.array([[np.cos(.1), np.sin(.1)], [-np.sin(.1), np.cos(.1)]])
    in_order(turned)

def test_order_of_three_columns_and_of_words():
    column = [[box(x, 30*i, 200) for i in range(4)] for x in (0,240,480)]
    in_order(sum(column, []))
    words = [[box(x+60*k, 30*i, 50) for i in range(4) for k in range(5)] for x in (0,350)]
    in_order(sum(words, []))

def test_order_of_a_receipt_and_of_a_table():
    "Articles and prices are read across, and so are the cells of a table"
    in_order([o for i,(a,b) in enumerate(zip((200,150,240,180,90), (60,70,60,70,80))) for o in (box(0, 30*i, a), box(500-b, 30*i, b))])
    in_order([box(100*k, 30*i, 60) for i in range(6) for k in range(4)])

# Sizes

class Dark:
    "A detector that finds what is dark, pixel by pixel"
    size = None,None
    def __init__(self): self.seen = []
    def prepare(self, im): return im.transpose(2,0,1).astype(np.float32)/255
    def run(self, x):
        self.seen.append(x.shape[2:])
        return (x.mean(1, keepdims=True)<.5).astype(np.float32)

@pytest.mark.parametrize('h,w', [(64,5000), (5000,96), (2100,2500), (300,400)])
def test_pieces_make_the_whole(h, w):
    x = np.random.default_rng(0).random((3,32*(h//32),32*(w//32))).astype(np.float32)
    det = Dark()
    assert (page_map(x, det)==Dark().run(x[None])).all() and max(max(o) for o in det.seen)<=2048 and (len(det.seen)>1)==(max(h, w)>2048)

@pytest.mark.parametrize('shape', [(60,9000), (9000,60), (900,9000), (800,6000), (4000,3000)])
def test_marks_are_where_they_are(shape):
    "On a page of any shape, to the pixel or two"
    page = np.full((*shape,3), 255, np.uint8)
    long = int(np.argmax(shape))
    spots = []
    for at in np.linspace(30, shape[long]-130, 9).astype(int):
        y,x = (12,at) if long else (at,12)
        page[y:y+30,x:x+30] = 0
        spots.append((x+15, y+15))
    found = find_lines(page, Dark(), DBPostProcess(thresh=.3, box_thresh=.5, unclip_ratio=.01, max_candidates=10**5))
    centres = found.mean(1)
    assert len(found)==9 and all(np.abs(centres-s).max(1).min()<3 for s in spots)

def test_long_pages_are_read_to_their_end(reader):
    "A till receipt of 5000 pixels with small print: brought down to 2000 it reads coffe, Mik, Quater"
    words = (['coffee','bread','Milk','SUGAR','Quarter']*5)[:24]
    assert texts(reader(page_of(words, (4900,740), gap=200, size=.3)))==words

def test_strips(reader, tmp_path):
    "A picture that is one line: found, and read as it is by itself"
    line = np.repeat(255-draw_line('Jackdaws love my big sphinx of quartz and wizards', font_files('dejavu')[3])[...,None], 3, 2)
    for strip in (line[8:-8], line[:,:150], line[14:-14,8:120], line[8:-8,:600], cv2.resize(line, None, fx=.5, fy=.5)):
        (whole,_), = read_lines([strip], reader.rec)
        assert [t.replace(' ', '') for t in texts(reader(np.ascontiguousarray(strip)))]==[whole.replace(' ', '')]
    upright = reader(np.ascontiguousarray(np.rot90(line[8:-8,:600], -1)))
    assert [t.replace(' ', '') for t in texts(upright)]==['Jackdawslovemybigsphinx']
    sheet,(x,y) = on_a_sheet(line[8:-8])
    assert sheet.shape[1]==line.shape[1] and (sheet[y:y+40]==line[8:-8]).all()
    assert on_a_sheet(page_of(['a'], (300,400)))[1]==(0,0)

# Turned pages

@pytest.fixture(scope='module')
def turning(): return Reader(threads=1, turned=True)

@pytest.mark.parametrize('k', range(4))
def test_turned_pages(k, turning):
    "Read as the upright one is, with the boxes where the lines are on the page as it came"
    page = page_of(['Marigold','Pronghorn','Quarter','lantern'], (320,420))
    came = np.ascontiguousarray(np.rot90(page, k))
    lines = turning(came)
    assert texts(lines)==['Marigold','Pronghorn','Quarter','lantern']
    for l in lines: assert read_lines([crop_line(came, l.box)], turning.rec)[0][0]==l.text or k%2 # A tall box is turned by `crop_line` one way only
    h,w = came.shape[:2]
    assert all((l.box>=0).all() and (l.box<=[w,h]).all() for l in lines)
    ink = np.array([[(came[...,0]<128)[int(y),int(x)] for x,y in (l.box.mean(0)+[d,e] for d in range(-12,13) for e in range(-12,13))] for l in lines])
    assert ink.any(1).all()

def test_a_line_that_stands_on_its_head(turning):
    page = page_of(['Marigold','Pronghorn','Quarter','lantern'], (320,420))
    page[90:146] = np.rot90(page[90:146], 2)
    assert texts(turning(page))==['Marigold','Pronghorn','Quarter','lantern']
    assert turning(np.full((100,200,3), 255, np.uint8))==[]

# Drawings

def test_leaning_lines_are_drawn_in_their_boxes():
    lines = [Line(np.float32(box(40, 60+34*i, 420, 26, 12)), 'eleven leaning lines of letters', .9) for i in range(4)]
    drawn = draw_page(np.full((360,560,3), 255, np.uint8), lines)[:,560:]
    ink = drawn[...,0]<128
    inside = np.zeros(ink.shape, np.uint8)
    for l in lines: cv2.fillPoly(inside, [np.round(l.box).astype(int)], 1)
    assert ink.sum()>500 and (ink & (inside==0)).sum()==0
    per_line = [ink[cv2.fillPoly(np.zeros(ink.shape, np.uint8), [np.round(l.box).astype(int)], 1)>0].sum() for l in lines]
    assert max(per_line)<1.2*min(per_line)

def test_chinese_is_drawn_or_missed_aloud(monkeypatch, caplog, tmp_path):
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    line = [Line(np.float32(box(10, 10, 100, 40)), '中中', .9)]
    page = np.full((60,120,3), 255, np.uint8)
    ocr._fonts_here.cache_clear(); ocr.font_with.cache_clear()
    monkeypatch.setattr(ocr, 'findSystemFonts', lambda: [])
    with caplog.at_level('WARNING', 'distillbook'): draw_page(page, line)
    assert 'no font of this machine has 中: drawn as empty boxes' in caplog.text
    pen = TTGlyphPen(None)
    pen.moveTo((100,0)); pen.lineTo((100,900)); pen.lineTo((900,900)); pen.lineTo((900,0)); pen.closePath()
    f = FontBuilder(1000)
    f.setupGlyphOrder(['.notdef','zhong'])
    f.setupCharacterMap({ord('中'): 'zhong'})
    f.setupGlyf({'.notdef': TTGlyphPen(None).glyph(), 'zhong': pen.glyph()})
    f.setupHorizontalMetrics({'.notdef': (1000,0), 'zhong': (1000,100)})
    f.setupHorizontalHeader(ascent=900, descent=-100)
    f.setupNameTable(dict(familyName='Test Han', styleName='Regular'))
    f.setupOS2(); f.setupPost(); f.save(tmp_path/'TestHan.ttf')
    caplog.clear(); ocr._fonts_here.cache_clear(); ocr.font_with.cache_clear()
    monkeypatch.setattr(ocr, 'findSystemFonts', lambda: [str(tmp_path/'TestHan.ttf')])
    drawn = draw_page(page, line)[:,120:]
    assert not caplog.text and (drawn<128).mean()>.1 # Two full squares, as our glyph is one
    ocr._fonts_here.cache_clear(); ocr.font_with.cache_clear()

# The command

def test_a_folder_with_broken_pictures(tmp_path):
    "It is read to its end: the good come out, the bad are named, the status says so, and no drawing takes another's place"
    page = page_of(['Hello', 'World77'], (200,400))
    for name in ('a.png','a.jpg','c.png'): cv2.imwrite(str(tmp_path/name), page)
    (tmp_path/'b.png').write_bytes(b'no picture')
    Image.fromarray(page).save(tmp_path/'d.tif', save_all=True, append_images=[Image.fromarray(page_of(['Zebra'], (200,400)))])
    r = inside('read', tmp_path, '--json', '--draw', tmp_path)
    rows = json.loads(r.stdout)
    assert r.returncode==1 and [o['image'].rpartition('/')[2] for o in rows]==['a.jpg','a.png','c.png','d.tif#page=1','d.tif#page=2']
    assert [[l['text'] for l in o['lines']] for o in rows]==[['Hello','World77']]*4+[['Zebra']]
    said = r.stderr.strip().splitlines()
    assert len(said)==2 and 'b.png: not a picture' in said[0] and '1 of 6 pictures could not be used' in said[1]
    assert (cv2.imread(str(tmp_path/'a.png'))==page).all() and len(list(tmp_path.glob('*_*.png')))+len(list(tmp_path.glob('d*.png')))>=5
    fails(inside('read', tmp_path/'b.png'), 'b.png: not a picture')

@pytest.mark.parametrize('shape', [(3,3000), (3000,3), (3,30000), (5,1280), (1,1)], ids=str)
def test_a_ruled_line_is_nothing_to_read(shape, reader, monkeypatch):
    "Nothing that would be enormous for a network is given to one"
    seen,run = [],OcrModel.run
    monkeypatch.setattr(OcrModel, 'run', lambda self, x: (seen.append(x.size), run(self, x))[1])
    assert reader(np.full((*shape,3), 200, np.uint8))==[] and max(seen, default=0)<=3*2048*2048

def test_a_line_too_long_to_be_read_is_told_of(caplog):
    boxes = np.float32([[[0,0],[6000,0],[6000,20],[0,20]], [[0,0],[200,0],[200,20],[0,20]]])
    with caplog.at_level('WARNING', 'distillbook'): assert can_be_read(boxes).tolist()==[False,True]
    assert '1 lines are over 256 times as long as high' in caplog.text
