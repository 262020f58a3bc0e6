"Rendered words, batches of them, and lines read from files: PaddleOCR's own resizing, and input that will not do"
import cv2, json, numpy as np, os, pytest, string, torch
from pathlib import Path
from distillbook.core import UserError
from distillbook.rec import render as data
from distillbook.rec.render import (RenderedLines, spelled_words, make_words, font_files, draw_line, render_word, render_words, rendered_set, normalise, Lines, WordDL, WordData,
    word_dls, fit_line, read_image)
from distillbook.data.pictures import image_paths
from distillbook.rec.labels import Alphabet

targets = np.load(Path(__file__).parent/'golden'/'targets_rec.npz')
alphabet = Alphabet(string.digits+string.ascii_letters)
WORDS = make_words(40, seed=3)

def test_words_are_the_same_everywhere():
    "These words were written down once; another Python or another system must give them too"
    assert make_words(10, seed=1) == ['vor', 'Rorcee', 'smolca', 'Tren', 'glu', 'kair', 'plee', 'hoatplo', '70704', 'STRA']

def test_words():
    words = make_words(3000, seed=0)
    assert len({o.lower() for o in words}) == 3000
    assert all(3 <= len(o) <= 9 and o.isascii() and o.isalnum() for o in words)
    assert max(len(o) + sum(a==b for a,b in zip(o, o[1:])) for o in words) <= 160//8   # CTC needs a blank between equal letters
    shares = [np.mean([f(o) for o in words]) for f in (str.islower, str.istitle, str.isdigit)]
    assert all(abs(s-w) < .06 for s,w in zip(shares, (.40, .20, .13))), shares
    more = make_words(500, seed=5, exclude=[o.upper() for o in words])
    assert not {o.lower() for o in more} & {o.lower() for o in words}

def test_font_files():
    d,r = font_files('dejavu'),font_files('roboto')
    assert (len(d), len(r)) == (12, 10) and all(o.exists() for o in d+r) and not set(d) & set(r)
    with pytest.raises(UserError, match="'arial'.*'dejavu'"): font_files('arial')

def test_no_font_lacks_a_letter():
    "Where a font lacks a letter it draws a box, the same for all that it lacks"
    for font in font_files('dejavu')+font_files('roboto'):
        ink = {draw_line(c, font).tobytes() for c in alphabet.chars}
        assert len(ink) == 62, font

@pytest.mark.parametrize('noise', [True, False])
def test_render_word(noise):
    font = font_files('dejavu')[0]
    for i,word in enumerate(WORDS + ['iii', 'WWWWWWWWW']):
        im,again = [render_word(word, font, np.random.default_rng(i), noise=noise) for _ in range(2)]
        assert im.dtype==np.uint8 and im.shape[0]==48 and 20 < im.shape[1] <= 160
        assert (im == again).all() and im.std() > 8

def test_ink_stays_inside():
    "Whatever the corners do, no line is cut off at its ends: hardly any ink in the first and the last column"
    for i,word in enumerate(WORDS):
        rng = np.random.default_rng(i)
        full = data.place_ink(draw_line(word, font_files('dejavu')[i%12]), rng)
        edge = np.concatenate([full[:,0], full[:,-1]])
        assert (edge > 128).mean() < .15 and full.max() > 200, word

def test_lines_do_not_depend_on_one_another():
    fonts = font_files('dejavu')
    a,b = render_words(WORDS, fonts, seed=1),render_words(WORDS[:7], fonts, seed=1)
    assert (a.images[:7] == b.images).all() and (a.widths[:7] == b.widths).all()
    assert (render_words(WORDS[:7], fonts, seed=2).images != b.images).any()
    assert all((im[:,w:] == 0).all() for im,w in zip(a.images, a.widths))

@pytest.fixture
def rendered(tmp_path):
    "Counts the words that are rendered beyond the eight of the probe"
    counts,real = [],data.render_words
    def counting(words, *args, **kwargs):
        counts.append(len(words))
        return real(words, *args, **kwargs)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(data, 'render_words', counting)
        yield lambda *args, **kwargs: (counts.clear(), rendered_set(tmp_path, 'a', *args, **kwargs), counts==[8,len(WORDS)])[1:]

def test_rendered_set(rendered, tmp_path):
    fonts = font_files('dejavu')
    first,anew = rendered(WORDS, fonts, 1)
    assert anew and [o.name for o in tmp_path.iterdir()] == ['a.npz']
    same,anew = rendered(WORDS, fonts, 1)
    assert not anew
    assert (same.images == first.images).all() and (same.widths == first.widths).all() and same.words == first.words
    for args,kwargs in [((WORDS, fonts, 2), {}), ((WORDS[:-1]+['other'], fonts, 2), {}), ((WORDS, fonts[:3], 2), {}), ((WORDS, fonts, 2), dict(noise=False)), ((WORDS, fonts, 2), dict(width=120))]:
        got,anew = rendered(*args, **kwargs)
        assert anew and got.words == args[0] and not rendered(*args, **kwargs)[1]

def test_rendered_set_sees_a_changed_renderer(rendered, monkeypatch):
    fonts = font_files('dejavu')
    rendered(WORDS, fonts, 1)
    monkeypatch.setattr(data, 'blur_and_noise', lambda im, rng: im)
    assert rendered(WORDS, fonts, 1)[1] and not rendered(WORDS, fonts, 1)[1]

@pytest.mark.parametrize('damage', [lambda b: b'', lambda b: b[:len(b)//2], lambda b: b'not an archive', lambda b: b[:5000]+bytes(200)+b[5200:]], ids=['empty', 'half', 'text', 'zeroed'])
def test_rendered_set_damaged(rendered, tmp_path, damage):
    fonts = font_files('dejavu')
    first,_ = rendered(WORDS, fonts, 1)
    f = tmp_path/'a.npz'
    f.write_bytes(damage(f.read_bytes()))
    again,anew = rendered(WORDS, fonts, 1)
    assert anew and (again.images == first.images).all()

def test_rendered_set_full_disk(tmp_path, monkeypatch):
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(np, 'savez', full)
    with pytest.raises(UserError, match='a.npz could not be written: No space left'): rendered_set(tmp_path, 'a', WORDS[:9], font_files('dejavu'))
    assert not list(tmp_path.iterdir())

def test_normalise():
    im = np.random.default_rng(0).integers(0, 256, (3,48,160), dtype=np.uint8)
    x = normalise(im, [160, 50, 1])
    want = (im.astype(np.float32)/255-.5)/.5
    assert x.dtype==torch.float32 and x.shape==(3,3,48,160) and x.is_contiguous()
    np.testing.assert_allclose(x[0,2], want[0], atol=1e-6)
    np.testing.assert_allclose(x[1,0,:,:50], want[1,:,:50], atol=1e-6)
    assert (x[1,:,:,50:]==0).all() and (x[2,:,:,1:]==0).all() and (normalise(im)[1]!=0).all()

def test_word_dls():
    train,valid = render_words(WORDS, font_files('dejavu')),render_words(WORDS[:9], font_files('roboto'))
    dls = word_dls(train, valid, 8, alphabet, seed=1, device='cpu')
    assert dls.n_inp==1 and len(dls.train)==5 and len(dls.valid)==1
    def words(dl): return [alphabet.decode(y.tolist()) for _,ys,_ in dl for y in ys]
    assert words(dls.valid) == WORDS[:9]
    first,second = words(dls.train),words(dls.train)
    assert sorted(first) == sorted(second) == sorted(WORDS) and first != second
    torch.manual_seed(5); np.random.seed(5)
    again = word_dls(train, valid, 8, alphabet, seed=1, device='cpu')
    assert words(again.train) == first and words(word_dls(train, valid, 8, alphabet, seed=2, device='cpu').train) != first
    x,y,n = dls.valid.one_batch()
    i = WORDS.index(alphabet.decode(y[3].tolist()))
    assert torch.equal(x[3], normalise(valid.images[i:i+1], valid.widths[i:i+1])[0]) and n.tolist() == [len(o) for o in WORDS[:9]]
    ordered = dls.train.new(shuffle=False, drop_last=False)
    assert isinstance(ordered, WordDL) and words(ordered) == WORDS

def test_word_dls_last_batch():
    lines = render_words(WORDS[:10], font_files('dejavu'))
    dls = word_dls(lines, lines, 4, alphabet, device='cpu')
    assert [len(x) for x,_,_ in dls.train] == [4,4] and [len(x) for x,_,_ in dls.valid] == [8,2]
    with pytest.raises(UserError, match='10 lines for training, fewer than one batch of 11'): word_dls(lines, lines, 11, alphabet)

def test_word_dls_alphabet():
    lines = render_words(['abc', 'de5'], font_files('dejavu'))
    with pytest.raises(UserError, match="'de5'.*'5'"): WordData(lines, Alphabet(string.ascii_letters))

@pytest.mark.parametrize('i', range(4))
@pytest.mark.parametrize('mode', ['train', 'infer_mode=True'])
def test_fit_line_equals_paddle(i, mode):
    "PaddleOCR squeezes long lines in training and lets them grow in prediction; its outputs are recorded at every fourth pixel"
    meta = json.loads(str(targets[f'RecResizeImg_{i}_{mode}|meta']))
    got = fit_line(targets[f'RecResizeImg_{i}_train|in|img'], 48, 160, grow=mode!='train')
    assert list(got.shape) == meta['out_shape'] and got.dtype==np.float32
    np.testing.assert_allclose(got.mean(), targets[f'RecResizeImg_{i}_{mode}|out|mean'], atol=1e-6)
    want = targets[f'RecResizeImg_{i}_{mode}|out|image_u'].astype(int)
    assert np.abs((got[:,::4,::4]*.5+.5)*255 - want).max() <= 1

def test_read_image(tmp_path):
    im = np.random.default_rng(0).integers(0, 256, (48,100,3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path/'a b.png'), im)
    x = read_image(tmp_path/'a b.png')
    np.testing.assert_allclose(x[:,:,:100], (im.transpose(2,0,1)/255-.5)/.5, atol=1e-6)   # BGR, as OpenCV has it
    assert (x[:,:,100:] == 0).all()

@pytest.mark.parametrize('name,content,says', [('empty.png', b'', 'file is empty'), ('text.jpg', b'hello', 'not a picture'), ('half.png', None, 'not a picture')])
def test_read_image_bad(tmp_path, capfd, name, content, says):
    if content is None: content = cv2.imencode('.png', np.zeros((48,100,3), np.uint8))[1].tobytes()[:20]
    (tmp_path/name).write_bytes(content)
    with pytest.raises(UserError, match=f'{name}: .*{says}'): read_image(tmp_path/name)
    assert capfd.readouterr() == ('', '')

def test_read_image_missing(tmp_path):
    with pytest.raises(UserError, match='no.png: No such file'): read_image(tmp_path/'no.png')
    with pytest.raises(UserError, match=tmp_path.name): read_image(tmp_path)

def test_image_paths(tmp_path):
    for n in ('b.png', 'a.JPG', 'note.txt', 'x[1].png'): (tmp_path/n).write_bytes(b'x')
    (tmp_path/'none').mkdir()
    names = lambda *args: [o.name for o in image_paths(args)]
    assert names(tmp_path) == ['a.JPG', 'b.png', 'x[1].png']
    assert names(tmp_path/'note.txt', tmp_path/'b.png') == ['note.txt', 'b.png']
    assert names(f'{tmp_path}/*.png') == ['b.png', 'x[1].png']
    assert names(tmp_path/'x[1].png') == ['x[1].png']
    with pytest.raises(UserError, match='none: no pictures in this folder'): image_paths([tmp_path/'none'])
    with pytest.raises(UserError, match='no such file, and no file matches'): image_paths([tmp_path/'b.png', tmp_path/'*.webp'])

# A source of rendered lines

def same(a, b): return a.keys()==b.keys() and all(np.array_equal(a[k], b[k]) for k in a)

def test_rendered_lines():
    a,b = RenderedLines(words=30, seed=4),RenderedLines(words=30, seed=4)
    lines = [a.read(i) for i in range(len(a))]
    assert len(a)==30 and [o['label'] for o in lines]==a.words==make_words(30, 4)
    for i in (29, 3, 3): assert same(b.read(i), lines[i]) and same(a[i], lines[i])
    im = lines[0]['image']
    assert im.dtype==np.uint8 and im.ndim==3 and im.shape[0]==48 and im.shape[2]==3 and 20<im.shape[1]<=160 and (im[...,0]==im[...,2]).all()
    assert len({o['image'].shape[1] for o in lines})>5 and len({o['path'] for o in lines})==30
    assert list(a.read(0, picture=False))==['where','path','label'] and same(a.read(0, np.random.default_rng(1)), lines[0])
    for i in (-1, 30):
        with pytest.raises(IndexError): a.read(i)
    assert not (RenderedLines(words=1, seed=5).read(0)['label']==a.words[0])

def test_rendered_lines_go_on_where_others_end():
    whole = RenderedLines(words=40, seed=2)
    parts = [RenderedLines(words=25, seed=2),RenderedLines(words=15, seed=2, skip=25)]
    both = [o.read(i) for o in parts for i in range(len(o))]
    assert all(same(whole.read(i), o) for i,o in enumerate(both)) and len(set(whole.words))==40

@pytest.mark.parametrize('characters', ['0123456789', list('abcdefghijklmnopqrstuvwxyz'), list(string.digits+string.ascii_letters)])
def test_rendered_lines_can_be_spelled(characters):
    words = RenderedLines(words=60, seed=1, characters=characters).words
    assert len(set(words))==60 and set(''.join(words))<=set(characters)
    assert RenderedLines(words=20, seed=1, skip=40, characters=characters).words==words[40:]==spelled_words(60, 1, characters)[40:]

def test_rendered_lines_in_other_processes():
    "A copy has no pictures in it, and draws the same"
    import pickle
    a = RenderedLines(words=20, seed=6, noise=False)
    lines = [a.read(i) for i in range(20)]
    data = pickle.dumps(a)
    b = pickle.loads(data)
    assert len(data)<20_000 and all(same(b.read(i), o) for i,o in enumerate(lines))

def test_rendered_lines_are_drawn_once(monkeypatch):
    drawn = []
    monkeypatch.setattr(data, 'render_word', lambda text,*args,**kwargs: drawn.append(text) or np.zeros((48, 40), np.uint8))
    a = RenderedLines(words=5)
    for _ in range(3): [a.read(i) for i in range(5)]
    assert drawn==a.words
    monkeypatch.setattr(data, 'KEEP_LINES', 2)
    b = RenderedLines(words=5)
    for _ in range(2): [b.read(i) for i in range(5)]
    assert len(drawn)==5+5+3

def test_fingerprint_of_rendered_lines():
    kinds = [{}, dict(words=9), dict(seed=1), dict(skip=1), dict(fonts='roboto'), dict(noise=False), dict(width=100), dict(characters='0123456789')]
    prints = [RenderedLines(**dict(words=10)|kw).fingerprint() for kw in kinds]
    assert len(set(prints))==len(kinds) and prints[0]==RenderedLines(words=10).fingerprint()

@pytest.mark.parametrize('kw,says', [(dict(words=0), 'words: a whole number from 1'), (dict(skip=-1), 'skip: '), (dict(seed=.5), 'seed: '), (dict(width='160'), 'width: '),
    (dict(fonts='arial'), "no font family 'arial'"), (dict(characters='!'), "characters: of .* invented words only 0 can be spelled with '!'")])
def test_wrong_rendered_lines(kw, says):
    with pytest.raises(UserError, match=says): RenderedLines(**dict(words=10)|kw)

def test_rendered_lines_make_batches():
    from distillbook.data.loader import SampleDL
    from distillbook.data.sets import SampleSet
    from distillbook.rec.operations import CTCLabelEncode, RecResizeImg
    ops = [CTCLabelEncode(25, None, lower=True), RecResizeImg([3,48,160])]
    lines = SampleSet(RenderedLines(words=12, seed=1), ops, ['image','label','length'])
    x,y,n = next(iter(SampleDL(lines, bs=12)))
    assert x.shape==(12,3,48,160) and n.tolist()==[len(o) for o in RenderedLines(words=12, seed=1).words]
