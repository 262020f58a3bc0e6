"Label files and LMDB as PaddleOCR has them, operations from a config, broken lines, and batches that do not depend on who makes them"
import cv2, json, logging, multiprocessing, numpy as np, os, pickle, pytest, random, signal, string, subprocess, sys, time, torch
from pathlib import Path
from distillbook.core import UserError
from distillbook.data import loader
from distillbook.rec.render import fit_line
from distillbook.config.data import make_operations
from distillbook.config.registry import OPERATIONS, made_for
from distillbook.rec.operations import RecResizeImg
from distillbook.data.lists import LMDBFile, label_files, line_table, lmdb_lines
from distillbook.data.loader import SampleDL, collate, sample_dls
from distillbook.data.operations import DecodeImage, KeepKeys
from distillbook.data.sets import SampleSet

targets = np.load(Path(__file__).parent/'golden'/'targets_rec.npz')
KEYS = ['image', 'label_ctc', 'label_sar', 'length', 'valid_ratio']
TRAIN = [dict(DecodeImage=dict(img_mode='BGR', channel_first=False)), dict(RecConAug=dict(prob=.5, ext_data_num=2, image_shape=[48,320,3], max_text_length=25)),
    dict(RecAug=None), dict(MultiLabelEncode=None), dict(RecResizeImg=dict(image_shape=[3,48,320])), dict(KeepKeys=dict(keep_keys=KEYS))]
EVAL = [TRAIN[0], *TRAIN[3:]]
GLOBAL = dict(max_text_length=25, character_dict_path=None, use_space_char=True, infer_mode=False, epoch_num=3)

def png(w=100, h=32, seed=0): return cv2.imencode('.png', np.random.default_rng(seed).integers(0, 256, (h,w,3), dtype=np.uint8))[1].tobytes()

def words(n, seed=0):
    rng = random.Random(seed)
    return [''.join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(n)]

@pytest.fixture
def folder(tmp_path):
    "40 pictures of differing widths and their list"
    for i in range(40): (tmp_path/f'{i}.png').write_bytes(png(20+i*7%150, seed=i))
    (tmp_path/'list.txt').write_text(''.join(f'{i}.png\t{w}\n' for i,w in enumerate(words(40))))
    return tmp_path

def lines(folder, name='list.txt', transforms=TRAIN, seed=1, train=True, **kwargs):
    ops,keys = make_operations(transforms, GLOBAL)
    return SampleSet(label_files(folder/name, folder, seed=seed, **kwargs), ops, keys, seed=seed, train=train, ext_op_transform_idx=1)

def same(a, b): return len(a)==len(b) and all(len(p)==len(q) and all(torch.equal(x, y) for x,y in zip(p, q)) for p,q in zip(a, b))


# label files

@pytest.mark.parametrize('data,want', [(b'', []), (b'\n', []), (b'a', ['a']), (b'a\n', ['a']), (b'a\r\n\r\nb', ['a','b']), (b'\xef\xbb\xbfa\nb\r', ['a','b']),
    (b'\xef\xbb\xbf', []), (b'\n\na\n\n', ['a']), (b'\r\n', []), (b'a\rb\n', ['a\rb'])])
def test_line_table(data, want):
    table = line_table(data)
    assert [data[a:b].decode() for _,a,b in table] == want
    assert [n for n,_,_ in table] == [i for i,o in enumerate(data.replace(b'\xef\xbb\xbf', b'').replace(b'\r\n', b'\n').split(b'\n'), 1) if o not in (b'', b'\r')]

def test_label_file(tmp_path, caplog):
    (tmp_path/'a b.png').write_bytes(b'A'); (tmp_path/'é.png').write_bytes(b'E')
    (tmp_path/'l.txt').write_bytes('\ufeffa b.png\t two words \r\n\r\né.png\tthree\tcolumns\r\né.png\t\r\na b.png\tlast'.encode())
    source = label_files(tmp_path/'l.txt', tmp_path)
    assert [(o['label'], o['image']) for o in source] == [(' two words ', b'A'), ('three', b'E'), ('', b'E'), ('last', b'A')]
    assert source[1]['where'] == f"{tmp_path/'l.txt'}:3: {tmp_path/'é.png'}" and source[1]['path'] == str(tmp_path/'é.png')
    assert caplog.messages == [f"{tmp_path/'l.txt'}: 1 lines have more than two columns, line 3 first; the second is taken as the text"]

@pytest.mark.parametrize('delimiter', [' ', ',', '::', '→'])
def test_delimiter(tmp_path, delimiter):
    (tmp_path/'a.png').write_bytes(b'A')
    (tmp_path/'l.txt').write_text(f'a.png{delimiter}word\n', encoding='utf-8')
    assert label_files(tmp_path/'l.txt', tmp_path, delimiter=delimiter)[0]['label'] == 'word'

def test_absolute_paths_and_many_pictures(tmp_path):
    for c in 'abc': (tmp_path/f'{c}.png').write_bytes(c.encode())
    (tmp_path/'l.txt').write_text(f'{tmp_path}/a.png\tone\n["b.png", "c.png"]\ttwo\n[b.png\tthree\n[]\tfour\n')
    source = label_files(tmp_path/'l.txt', tmp_path)
    assert source[0]['image'] == b'a' and source[1]['image'] == b'b'
    drawn = [source.read(1, np.random.default_rng(i))['image'] for i in range(40)]
    assert set(drawn) == {b'b', b'c'} and 8 < drawn.count(b'c') < 32
    for i,name in ((2, '[b.png'), (3, '[]')):
        with pytest.raises(UserError, match='No such file') as e: source[i]
        assert f"l.txt:{i+1}: {tmp_path/name}" in str(e.value)

@pytest.mark.parametrize('line,says', [(b'a.png no tab', r"l.txt:2: no '\\t' between path and text"), (b'a.png\t\xff\xfe', 'l.txt:2: not UTF-8'), (b'b.png\tx', 'l.txt:2: .*b.png: No such file'),
    (b'\tx', 'l.txt:2: .*: Is a directory'), (b'a\0.png\tx', 'l.txt:2: .*: embedded null byte')])
def test_broken_line(tmp_path, line, says):
    (tmp_path/'a.png').write_bytes(b'A')
    (tmp_path/'l.txt').write_bytes(b'a.png\tone\n' + line + b'\n')
    source = label_files(tmp_path/'l.txt', tmp_path)
    assert len(source)==2 and source[0]['label']=='one'
    with pytest.raises(UserError, match=says): source[1]

@pytest.mark.parametrize('content,says', [(b'', 'l.txt: no lines'), (b'\r\n\n', 'l.txt: no lines'), ('a\tb'.encode('utf-16'), 'l.txt: this is UTF-16'),
    (b'a.png word\nb.png two\n', r"no line has the delimiter '\\t'; the first is 'a.png word'"), (None, 'l.txt: No such file')])
def test_label_file_that_is_none(tmp_path, content, says):
    if content is not None: (tmp_path/'l.txt').write_bytes(content)
    with pytest.raises(UserError, match=says): label_files(tmp_path/'l.txt', tmp_path)

@pytest.mark.parametrize('kwargs,says', [(dict(ratio_list=[1,1,1]), 'ratio_list has 3 numbers for 2 label files'), (dict(ratio_list=[1,1.5]), 'ratio_list: 1.5 is not a number from 0 to 1'),
    (dict(ratio_list=[1,'x']), "ratio_list: 'x'"), (dict(ratio_list=0.), 'leaves no lines'), (dict(data_dir='nowhere/at/all'), 'nowhere/at/all: no such folder')])
def test_label_files_bad_arguments(folder, kwargs, says):
    with pytest.raises(UserError, match=says): label_files([folder/'list.txt']*2, **{'data_dir': folder, **kwargs})
    with pytest.raises(UserError, match='no label files'): label_files([], folder)

def test_ratio_list(folder):
    (folder/'short.txt').write_text('0.png\tzero\n1.png\tone\n2.png\ttwo\n')
    source = label_files([folder/'list.txt', folder/'short.txt'], folder, ratio_list=[.3, .5], seed=4)
    seen,labels = [],words(40)
    for epoch in range(60):
        source.set_epoch(epoch)
        got = [source[i]['label'] for i in range(len(source))]
        assert len(source)==14 and len(set(source.rows))==14   # round(.3*40) + round(.5*3), Python's round
        assert set(got[:12]) <= set(labels) and set(got[12:]) <= {'zero','one','two'}
        seen.append(tuple(source.rows))
    assert len(set(seen))>50 and {i for o in seen for i in o} == set(range(43))
    again = label_files([folder/'list.txt', folder/'short.txt'], folder, ratio_list=[.3, .5], seed=4)
    assert tuple(again.rows)==seen[0]
    again.set_epoch(7)
    assert tuple(again.rows)==seen[7]
    assert tuple(label_files([folder/'list.txt', folder/'short.txt'], folder, ratio_list=[.3, .5], seed=5).rows)!=seen[0]
    whole = label_files([folder/'list.txt', folder/'short.txt'], folder, ratio_list=[1, 0])
    assert [whole[i]['label'] for i in range(len(whole))] == labels

def test_a_million_lines(tmp_path):
    "A list costs about the bytes of its file again"
    f = tmp_path/'l.txt'
    f.write_text(''.join(f'pictures/{i//1000:04d}/{i:07d}.jpg\tword{i%1000}\n' for i in range(1_000_000)))
    source = label_files(f, tmp_path)
    assert len(source)==1_000_000
    assert len(source.data[0])+source.table.nbytes+source.rows.nbytes < 90e6
    with pytest.raises(UserError, match=r'l.txt:765433: .*pictures/0765/0765432.jpg: No such file'): source[765432]
    assert len(next(iter(loader.batch_order(SampleSet(source, [], ['image']), 128, True, True, False))))==128


# LMDB

def write_lmdb(path, pairs, n=None, **extra):
    lmdb = pytest.importorskip('lmdb')
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=2**24) as env, env.begin(write=True) as t:
        for i,(image,label) in enumerate(pairs, 1):
            if image is not None: t.put(f'image-{i:09d}'.encode(), image)
            if label is not None: t.put(f'label-{i:09d}'.encode(), label)
        if n!='none': t.put(b'num-samples', str(len(pairs) if n is None else n).encode())

@pytest.fixture
def stored(folder):
    source = label_files(folder/'list.txt', folder)
    for name,part in (('db/a/x', range(13)), ('db/b', range(13, 40))): write_lmdb(folder/name, [(source[i]['image'], source[i]['label'].encode()) for i in part])
    return folder

def test_lmdb(stored):
    source,want = lmdb_lines(stored/'db'),label_files(stored/'list.txt', stored)
    assert len(source)==40
    for i in range(40): assert (source[i]['image'], source[i]['label']) == (want[i]['image'], want[i]['label'])
    assert source[0]['path'].endswith('db/a/x: image-000000001') and source[39]['path'].endswith('db/b: image-000000027')
    assert len(lmdb_lines(stored/'db'/'b'))==27
    with pytest.raises(IndexError): source[40]
    with pytest.raises(IndexError): source[-1]
    again = pickle.loads(pickle.dumps(source))
    assert again[20]['label']==want[20]['label']

def test_lmdb_bad(tmp_path):
    with pytest.raises(UserError, match='no LMDB'): lmdb_lines(tmp_path)
    with pytest.raises(UserError, match='nowhere: no LMDB'): lmdb_lines(tmp_path/'nowhere')
    write_lmdb(tmp_path/'a', [(b'1', b'one')], n='none')
    with pytest.raises(UserError, match='a: no key num-samples'): lmdb_lines(tmp_path/'a')
    write_lmdb(tmp_path/'b', [(b'1', b'one')], n='many')
    with pytest.raises(UserError, match="b: b'many' for num-samples"): lmdb_lines(tmp_path/'b')
    write_lmdb(tmp_path/'c', [(None, b'x'), (b'2', None), (b'3', b'\xff'), (b'4', b'four')], n=5)
    source = lmdb_lines(tmp_path/'c')
    for i,why in enumerate(['picture is missing', 'label is missing', 'label is not UTF-8', None, 'picture is missing']):
        if why:
            with pytest.raises(UserError, match=f'image-{i+1:09d}: {why}'): source[i]
    assert source[3]['label']=='four'
    (tmp_path/'d').mkdir(); (tmp_path/'d'/'data.mdb').write_bytes(b'nothing of the kind'*999)
    with pytest.raises(UserError, match='d: '): lmdb_lines(tmp_path/'d')

@pytest.mark.parametrize('n,most', [(0,10), (1,10), (7,5000), (400,60), (400,9000), (3000,20)])
def test_lmdb_page_by_page(n, most, tmp_path):
    "What LMDB's own library reads, for trees of one to four levels, small values and large, keys of all lengths; after deletions too"
    lmdb = pytest.importorskip('lmdb')
    rng = np.random.default_rng(n+most)
    keys = [*{rng.bytes(int(rng.integers(1, 200))) for _ in range(n)}]
    with lmdb.open(str(tmp_path), map_size=2**26) as env:
        for part in (keys[::2], keys[1::2]):
            with env.begin(write=True) as t:
                for k in part: t.put(k, rng.bytes(int(rng.integers(0, most))))
        with env.begin(write=True) as t:
            for k in keys[::5]: t.delete(k)
        file = LMDBFile(tmp_path)
        with env.begin() as t:
            for k in [*keys, b'', b'\0', b'\xff'*511, *(k[:-1] for k in keys[:50])]: assert file.get(k)==(t.get(k) if k else None)
    assert n<400 or file.meta.depth>1

def test_lmdb_spoilt_inside_its_pages(stored, tmp_path):
    "Every byte of the pages in use set to another: a value that was there, or one line; LMDB's library ends the process on some of them"
    whole = (stored/'db/a/x/data.mdb').read_bytes()
    sound,said = lmdb_lines(stored/'db/a/x'),0
    (tmp_path/'spoilt').mkdir()
    rng = np.random.default_rng(0)
    for at in rng.choice(len(whole)//4096, 150)*4096+rng.choice([*range(32), *range(4000,4096)], 150):
        data = bytearray(whole)
        data[at] = (data[at]+int(rng.choice([1,128,255])))%256
        (tmp_path/'spoilt/data.mdb').write_bytes(data)
        os.utime(tmp_path/'spoilt/data.mdb', ns=(0, int(at)))
        try:
            lines = lmdb_lines(tmp_path/'spoilt')
            for i in range(min(13, len(lines))): lines[i]
        except UserError as e: said += 'spoilt' in str(e)
    assert said>5 and len(sound)==13

@pytest.mark.parametrize('workers', [0, 2])
def test_lmdb_loader(stored, workers):
    "Used in this process before workers fork, and by two loaders at once"
    ops,keys = make_operations(TRAIN, GLOBAL)
    a,b = (SampleDL(SampleSet(o, ops, keys, seed=1, ext_op_transform_idx=1), bs=8, shuffle=True, num_workers=n)
           for o,n in ((lmdb_lines(stored/'db'), workers), (label_files(stored/'list.txt', stored), 0)))
    a.dataset[3]
    assert same(list(a), list(b))
    assert same([o for pair in zip(a, a) for o in pair[:1]], list(b))


# operations

@pytest.mark.parametrize('case', sorted(k.split('|')[0] for k in targets.files if k.startswith('RecResizeImg') and k.endswith('|meta')))
def test_rec_resize_img_equals_paddle(case):
    meta,im = json.loads(str(targets[f'{case}|meta'])),targets[f'{case[:15].rsplit("_", 1)[0]}_train|in|img']
    out = RecResizeImg(meta['image_shape'], **meta['kwargs'])({'image': im}, None)
    got = out['image']
    assert list(got.shape)==meta['out_shape'] and got.dtype==np.float32
    assert out['valid_ratio']==meta['valid_ratio']
    np.testing.assert_allclose(got.mean(), targets[f'{case}|out|mean'], atol=1e-6)
    assert np.abs((got[:,::4,::4]*.5+.5)*255 - targets[f'{case}|out|image_u'].astype(int)).max() <= 1

def test_rec_resize_img_modes():
    im = {'image': np.full((20,200,3), 200, np.uint8)}
    assert RecResizeImg([3,48,160], eval_mode=True)(im, None)['image'].shape==(3,48,480)
    assert RecResizeImg([3,48,160], eval_mode=True, padding=False)(im, None)['image'].shape==(3,48,480)
    assert RecResizeImg([3,48,160], infer_mode=True)(im, None)['image'].shape==(3,48,480)
    assert RecResizeImg([3,48,160], infer_mode=True, character_dict_path=None)(im, None)['image'].shape==(3,48,160)
    with pytest.raises(UserError, match=r'\[1, 32, 100\]'): RecResizeImg([1,32,100])

def test_decode_image():
    im = np.random.default_rng(0).integers(0, 256, (9,7,3), dtype=np.uint8)
    data = cv2.imencode('.png', im)[1].tobytes()
    got = {k: DecodeImage(**k2)({'image': data, 'x': 1}, None)['image'] for k,k2 in dict(rgb={}, bgr=dict(img_mode='BGR'), gray=dict(img_mode='GRAY'), first=dict(img_mode='BGR', channel_first=True)).items()}
    assert (got['bgr']==im).all() and (got['rgb']==im[...,::-1]).all() and (got['first']==im.transpose(2,0,1)).all()
    assert got['gray'].shape==im.shape and (got['gray']==cv2.imdecode(np.frombuffer(data, np.uint8), 0)[...,None]).all()
    assert all(o.flags.c_contiguous for o in got.values())
    with pytest.raises(UserError, match="no img_mode 'GREY'; did you mean 'GRAY'"): DecodeImage('GREY')

@pytest.mark.parametrize('data,says', [(b'', 'the picture is empty'), (b'hello', 'not a picture'), (png()[:20], 'not a picture')])
def test_decode_image_bad(capfd, data, says):
    with pytest.raises(UserError, match=says): DecodeImage()({'image': data}, None)
    assert capfd.readouterr()==('','')

def test_rotated_pictures(tmp_path):
    "As a telephone stores them"
    from PIL import Image
    im = Image.new('RGB', (60,20)); exif = im.getexif(); exif[0x112] = 6
    im.save(tmp_path/'a.jpg', exif=exif)
    data = (tmp_path/'a.jpg').read_bytes()
    assert DecodeImage()({'image': data}, None)['image'].shape==(60,20,3)
    assert DecodeImage(ignore_orientation=True)({'image': data}, None)['image'].shape==(20,60,3)

@pytest.mark.parametrize('name,keys', [('CTCLabelEncode', ('label','length')), ('SARLabelEncode', ('label','length')), ('MultiLabelEncode', ('label_ctc','label_sar','length'))])
@pytest.mark.parametrize('alphabet', ['default', 'keys_v1_space', 'keys_v1_nospace_len10'])
def test_encoders_equal_paddle(name, keys, alphabet):
    case = f'{name}_{alphabet}'
    if f'{case}|meta' not in targets.files: pytest.skip('not recorded')
    meta = json.loads(str(targets[f'{case}|meta']))
    kwargs = dict(max_text_length=10 if 'len10' in alphabet else 25, use_space_char=alphabet=='keys_v1_space',
        character_dict_path=None if alphabet=='default' else str(Path(__file__).parent/'golden'/'ppocr_keys_v1.txt'))
    op,texts,n = OPERATIONS[name](**kwargs),meta['texts'],0
    for i,text in enumerate(texts):
        if f'{case}|out|t{i}_{keys[0]}' in targets.files:
            out = op({'label': text}, None)
            for k in keys: np.testing.assert_array_equal(out[k], targets[f'{case}|out|t{i}_{k}'])
            n += 1
        else:
            with pytest.raises(UserError): op({'label': text}, None)
    assert n>3

class Mine:
    "An operation of somebody's own"
    def __init__(self, gain, epoch_num=0): self.gain,self.epoch_num = gain,epoch_num
    def __call__(self, sample, rng): return None if sample['label']=='none' else sample

@made_for('operation')
def hungry(**kwargs): return kwargs

@pytest.fixture(autouse=True)
def ours(monkeypatch): monkeypatch.setattr('distillbook.config.registry.TRUSTED', {__name__})

def test_make_operations():
    ops,keys = make_operations(TRAIN, GLOBAL)
    assert keys==KEYS and [type(o).__name__ for o in ops]==['DecodeImage', 'RecConAug', 'RecAug', 'MultiLabelEncode', 'RecResizeImg']
    assert ops[0].mode=='BGR' and ops[1].ext_data_num==2 and ops[3].max_len==25 and ops[3].lower
    (mine,kw),_ = make_operations([{f'{__name__}.Mine': dict(gain=2)}, {f'{__name__}.hungry': dict(x=1)}, TRAIN[-1]], GLOBAL)
    assert (mine.gain, mine.epoch_num)==(2, 3) and kw=={'x': 1, **GLOBAL}

def test_make_operations_leaves_the_config_alone():
    before = json.dumps([TRAIN, GLOBAL])
    make_operations(TRAIN, GLOBAL)
    assert json.dumps([TRAIN, GLOBAL])==before

def test_make_operations_says_what_has_no_effect(caplog):
    with caplog.at_level(logging.INFO, 'distillbook'):
        ops,_ = make_operations([dict(RecAug=dict(use_tia=True, aug_prob=.4)), dict(RecConAug=dict(max_text_length=40, infer_mode=True)), TRAIN[-1]], GLOBAL)
    assert caplog.messages==['Train.dataset.transforms.0.RecAug.use_tia: has no effect, as in PaddleOCR', 'Train.dataset.transforms.0.RecAug.aug_prob: has no effect, as in PaddleOCR',
        'Train.dataset.transforms.1.RecConAug.infer_mode: has no effect, as in PaddleOCR',
        'Train.dataset.transforms.1.RecConAug.max_text_length: 40 gives way to 25 in Global, as in PaddleOCR']
    assert {(o.name, o.levelname) for o in caplog.records}=={('distillbook', 'INFO')}
    assert ops[1].max_text_length==25

@pytest.mark.parametrize('transforms,says', [
    (dict(RecAug=None), ': a list of operations'), (None, ': a list of operations'), (['RecAug'], r".0: one operation with its settings is wanted, as in '- RecAug:'; not 'RecAug'"), ([dict(a=1, b=2)], r'.0: one operation'),
    ([dict(RecAugg=None)], r".0.RecAugg: no operation 'RecAugg'; did you mean 'RecAug'"), ([TRAIN[0], {3: None}], '.1.3: no operation 3'), *(([dict(RecAug=v)], f'.0.RecAug: names and values are wanted, not {said}') for v,said in (([1],r'\[1\]'), (3,'3'), ('tia',"'tia'"))),
    ([dict(RecAug=dict(tia_prb=1))], r".0.RecAug.tia_prb: no setting 'tia_prb'; did you mean 'tia_prob'"), ([dict(RecAug=dict(tia_prob='often'))], r".0.RecAug.tia_prob: a number is wanted, not 'often'"), ([dict(RecResizeImg=None)], r'.0.RecResizeImg: .*needs image_shape'),
    ([dict(RecResizeImg=dict(image_shape=5))], r'.0.RecResizeImg.image_shape: a list is wanted, not 5'), ([dict(RecResizeImg=dict(image_shape=[48,320]))], r'.0.RecResizeImg: image_shape: .*not \[48, 320\]'),
    ([dict(DecodeImage=dict(img_mode='GBR'))], r".0.DecodeImage: no img_mode 'GBR'"), ([TRAIN[2]], ': the last operation is KeepKeys'), ([], ': the last operation is KeepKeys'),
    ([dict(KeepKeys=dict(keep_keys=['length', 'image']))], ": keep_keys begins with 'image'"), ([dict(KeepKeys=None)], '.0.KeepKeys: .*needs keep_keys'), ([{'no.such.Op': None}], r".0.no.such.Op: no.such.Op is code outside of distillbook"),
    ([{f'{__name__}.Mime': None}], rf".0.{__name__}.Mime: no class or function in {__name__} 'Mime'; did you mean .*'Mine'"), ([{f'{__name__}.Mine': None}], rf'.0.{__name__}.Mine: .*needs gain'),
    ([{f'{__name__}.Mine': dict(gian=1)}], rf".0.{__name__}.Mine.gian: no setting 'gian'; did you mean 'gain'"), ([{f'{__name__}.KEYS': None}], rf'.0.{__name__}.KEYS: {__name__}.KEYS is no class and no function'),
    ([dict(CTCLabelEncode=dict(character_dict_path='no.txt'))], r'.0.CTCLabelEncode: no.txt: No such file')])
def test_make_operations_errors(transforms, says):
    with pytest.raises(UserError, match='^Train.dataset.transforms'+says): make_operations(transforms, dict(max_text_length=25))


# samples

def test_sample(folder):
    data = lines(folder, transforms=EVAL, train=False)
    image,ctc,sar,length,ratio = data[3]
    assert (image.dtype, image.shape, ctc.dtype, ctc.shape, sar.shape, length.dtype, length.shape, ratio.dtype, ratio.shape) == (np.float32, (3,48,320), np.int64, (25,), (25,), np.int64, (), np.float64, ())
    im = cv2.imread(str(folder/'3.png'))
    np.testing.assert_array_equal(image, fit_line(im, 48, 320))
    assert length==len(words(40)[3]) and ratio==np.ceil(48*im.shape[1]/32)/320
    assert len(list(data))==40
    with pytest.raises(IndexError): data[40]

def test_chance_is_a_function_of_seed_epoch_and_index(folder):
    a,b = lines(folder),lines(folder)
    first = [a[i] for i in (5, 3, 5)]
    np.testing.assert_array_equal(first[0][0], first[2][0])
    np.testing.assert_array_equal(b[3][0], first[1][0])
    a.set_epoch(1)
    assert a[5][0].tobytes()!=first[0][0].tobytes()
    a.set_epoch(0)
    assert a[5][0].tobytes()==first[0][0].tobytes()
    assert lines(folder, seed=2)[5][0].tobytes()!=first[0][0].tobytes()
    dl = SampleDL(a, bs=8, shuffle=True)
    np.random.seed(0); random.seed(0); torch.manual_seed(0)
    state = np.random.get_state()[1].tobytes(),random.getstate(),torch.get_rng_state().numpy().tobytes()
    list(dl)
    assert state==(np.random.get_state()[1].tobytes(),random.getstate(),torch.get_rng_state().numpy().tobytes())

class Spy:
    "Notes what it is given"
    ext_data_num = 3
    def __init__(self): self.seen = []
    def __call__(self, sample, rng): self.seen.append(sample); return sample

@pytest.mark.parametrize('idx', [0, 1, 2])
def test_ext_data(folder, idx):
    spy = Spy()
    double = lambda s,rng: {**s, 'label': s['label']*2}
    data = SampleSet(label_files(folder/'list.txt', folder), [DecodeImage('BGR'), double, spy], ['image'], ext_op_transform_idx=idx)
    for i in range(20): data[i]
    ext = [o for s in spy.seen for o in s['ext_data']]
    assert len(ext)==60 and len({o['path'] for o in ext})>20
    names = words(40)
    for o in ext:
        name = names[int(Path(o['path']).stem)]
        assert o['label']==(name*2 if idx==2 else name) and isinstance(o['image'], np.ndarray if idx else bytes) and 'ext_data' not in o

BAD = ['nowhere.png\tlost', 'text.png\ttext', 'empty.png\tempty', '3.png no tab', '4.png\t', '5.png\t'+'long'*9, '6.png\tÄÖÜ']
WHY = ['list.txt:11: .*nowhere.png: No such file', 'list.txt:12: .*text.png: not a picture', 'list.txt:13: .*empty.png: the picture is empty', r"list.txt:14: no '\\t'",
    "list.txt:15: .*4.png: label '': empty", "list.txt:16: .*5.png: label 'long.*: longer than", "list.txt:17: .*6.png: label 'ÄÖÜ': no character of it"]

@pytest.fixture
def broken(folder):
    (folder/'text.png').write_text('hello'); (folder/'empty.png').write_bytes(b'')
    (folder/'list.txt').write_text('\n'.join([f'{i}.png\t{w}' for i,w in enumerate(words(10))]+BAD), encoding='utf-8')
    return folder

def check_faults(faults):
    "`faults` are the seven broken lines"
    import re
    assert len(faults)==7 and all(sum(bool(re.search(w, o)) for o in faults)==1 for w in WHY), faults

@pytest.mark.parametrize('workers', [0, 2])
def test_broken_lines_in_training(broken, workers, caplog):
    bend = [TRAIN[0], *TRAIN[2:]]   # without RecConAug, which would join a line of an empty label to another
    dl = SampleDL(lines(broken, transforms=bend), bs=4, shuffle=True, num_workers=workers)
    a = list(dl)
    assert [len(o[0]) for o in a]==[4,4,4,4,1]
    check_faults(dl.faults)
    assert sorted(caplog.messages)==sorted(dl.faults) and all(o.name=='distillbook' and o.levelname=='WARNING' for o in caplog.records)
    times = sum(dl.faults.values())
    list(dl)
    assert len(dl.faults)==7 and sum(dl.faults.values())>times and len(caplog.messages)==7
    again = SampleDL(lines(broken, transforms=bend), bs=4, shuffle=True, num_workers=2-workers)
    assert same(a, list(again)) and times==sum(again.faults.values())

@pytest.mark.parametrize('workers', [0, 2])
def test_broken_lines_in_evaluation(broken, workers):
    "PaddleOCR evaluates the next line twice; here a broken line is missing, and every other is there once"
    dl = SampleDL(lines(broken, transforms=EVAL, train=False), bs=4, num_workers=workers)
    for _ in range(2):
        batches = list(dl)
        assert [len(o[0]) for o in batches]==[4,4,2]   # the fourth batch is broken throughout, and so is the last
        texts = [''.join(chr(ord('a')+c-11) for c in row[:n]) for b in batches for row,n in zip(b[1].tolist(), b[3].tolist())]
        assert texts==words(10)
    check_faults(dl.faults)
    assert set(dl.faults.values())=={2}
    data = lines(broken, transforms=EVAL, train=False)
    with pytest.raises(UserError, match=WHY[0]): data[10]
    faults = []
    assert data.fetch(10, faults) is None and len(faults)==1 and data.fetch(9, faults) and len(faults)==1

def test_replacements_are_drawn_evenly(broken):
    data = lines(broken, transforms=EVAL)
    got = []
    for e in range(150):
        data.set_epoch(e)
        got.append(data[10][1].tobytes())
    counts = np.unique(got, return_counts=True)[1]
    assert len(counts)==10 and counts.max() < 40

@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('train', [True, False])
def test_everything_is_broken(broken, workers, train):
    (broken/'list.txt').write_text('\n'.join(f'gone{i}.png\tx' for i in range(9)))
    dl = SampleDL(lines(broken, train=train, transforms=TRAIN if train else EVAL), bs=4, num_workers=workers)
    with pytest.raises(UserError, match='1000 lines drawn one after another cannot be used; the last: .*gone' if train else 'none of 9 lines can be used; the last: .*gone') as e: list(dl)
    assert '\n' not in str(e.value)
    assert len(dl.faults)==9

def test_ext_data_that_is_broken(broken):
    (broken/'list.txt').write_text('1.png\tone\n'+'\n'.join(f'gone{i}.png\tx' for i in range(3)))
    dl = SampleDL(lines(broken), bs=1)
    assert len(list(dl))==4 and len(dl.faults)==3

def test_own_operation_that_refuses(folder):
    (folder/'list.txt').write_text('0.png\tnone\n1.png\tone\n')
    ops,keys = make_operations([{f'{__name__}.Mine': dict(gain=1)}, *EVAL], GLOBAL)
    dl = SampleDL(SampleSet(label_files(folder/'list.txt', folder), ops, keys, train=False), bs=2)
    assert [len(o[0]) for o in dl]==[1] and [o.endswith('0.png: refused by Mine') for o in dl.faults]==[True]

@pytest.mark.parametrize('workers', [0, 2])
def test_own_operation_with_a_fault_of_its_own(folder, workers):
    "An error in somebody's code is not a broken line; the processes end with it, though its traceback holds on to them"
    def op(sample, rng): return sample['nothing']
    with pytest.raises(KeyError, match='nothing') as held: list(SampleDL(SampleSet(label_files(folder/'list.txt', folder), [op], ['image']), bs=2, num_workers=workers))
    assert held.tb and not multiprocessing.active_children()

def test_opencv_errors_are_faults(folder):
    def op(sample, rng): return cv2.resize(np.zeros((0,0,3), np.uint8), (3,3))
    data = SampleSet(label_files(folder/'list.txt', folder), [op], ['image'], train=False)
    data.fetch(0, faults := [])
    assert '0.png: OpenCV: ' in faults[0] and '\n' not in faults[0]

@pytest.mark.parametrize('ops,keys,says', [(EVAL, ['image','label_sra'], "keep_keys: no value 'label_sra'; did you mean 'label_sar'"), ([EVAL[0], EVAL[2]], ['image','label'], "keep_keys: 'label' is not of numbers"),
    (EVAL[:1], ['image'], 'pictures of different heights')])
@pytest.mark.parametrize('workers', [0, 1])
def test_samples_that_make_no_batch(folder, ops, keys, says, workers):
    (folder/'1.png').write_bytes(png(50, 20))
    dl = SampleDL(SampleSet(label_files(folder/'list.txt', folder), make_operations([*ops, TRAIN[-1]] if ops is not EVAL else ops, GLOBAL)[0], keys), bs=4, num_workers=workers)
    with pytest.raises(UserError, match=says) as e: list(dl)
    assert '\n' not in str(e.value)

def test_a_list_of_dicts_is_a_source(folder):
    source = [dict(path=f'{i}', image=png(30+i), label='abc') for i in range(5)]
    ops,keys = make_operations(EVAL, GLOBAL)
    assert [o[0].shape for o in SampleDL(SampleSet(source, ops, keys), bs=5)]==[(5,3,48,320)]

def test_seed():
    with pytest.raises(UserError, match='seed -1'): SampleSet([], [], ['image'], seed=-1)


# batches

@pytest.mark.parametrize('buckets', [False, True])
@pytest.mark.parametrize('shuffle', [False, True])
def test_workers_make_no_difference(folder, buckets, shuffle, monkeypatch):
    monkeypatch.setattr(loader, 'POOL', 2)
    def epochs(n):
        dl = SampleDL(lines(folder, ratio_list=.9), bs=5, shuffle=shuffle, num_workers=n, buckets=buckets)
        return [list(dl) for _ in range(2)]
    a,b,c = epochs(0),epochs(2),epochs(3)
    assert all(same(x, y) and same(x, z) for x,y,z in zip(a, b, c)) and not same(*a)

def seen(dl): return [tuple(o.tolist()) for *_,o in dl]

@pytest.mark.parametrize('buckets', [False, True])
@pytest.mark.parametrize('drop_last', [False, True])
def test_every_line_once(folder, buckets, drop_last, monkeypatch):
    monkeypatch.setattr(loader, 'POOL', 2)
    data = lines(folder)
    orders = []
    for e in range(3):
        data.set_epoch(e)
        batches = list(loader.batch_order(data, 7, True, drop_last, buckets))
        assert sorted(map(len, batches))==([7]*5 if drop_last else [5]+[7]*5)
        flat = np.concatenate(batches).tolist()
        assert len(set(flat))==len(flat)==(35 if drop_last else 40)
        orders.append(flat)
    assert orders[0]!=orders[1]!=orders[2]
    assert np.concatenate(list(loader.batch_order(data, 7, False, False, False))).tolist()==list(range(40))

@pytest.mark.parametrize('buckets', [False, True])
@pytest.mark.parametrize('workers', [0, 2])
def test_resume_inside_an_epoch(folder, buckets, workers, monkeypatch):
    monkeypatch.setattr(loader, 'POOL', 3)
    dl = SampleDL(lines(folder), bs=4, shuffle=True, buckets=buckets)
    dl.set_epoch(5)
    whole = list(dl)
    assert len(whole)==len(dl)==10
    for skip in (0, 1, 3, 4, 9, 10):
        other = SampleDL(lines(folder), bs=4, shuffle=True, buckets=buckets, num_workers=workers)
        other.set_epoch(5, skip=skip)
        assert same(list(other), whole[skip:])
        assert other.dataset.epoch==6 and other.skip==0

def test_epochs(folder):
    dl = SampleDL(lines(folder), bs=8, shuffle=True)
    first = dl.one_batch()
    assert same([first], [dl.one_batch()])          # a look at a batch does not use the epoch up
    a = list(dl)
    assert same(a[:1], [first])
    b = list(dl)
    assert not same(a, b)
    dl.set_epoch(0)
    assert same(a, list(dl))
    valid = SampleDL(lines(folder, train=False), bs=8)
    a = list(valid)
    valid.set_epoch(3)
    assert same(a, list(valid)) and valid.dataset.epoch==0

def test_order_is_not_that_of_the_samples_chance(folder):
    "numpy pads seeds with zeros: [seed, epoch] would be the generator of line 0"
    data = lines(folder)
    order = np.concatenate(list(loader.batch_order(data, 40, True, False, False)))
    assert order.tolist()!=np.random.default_rng([1, 0]).permutation(40).tolist()

def test_buckets(folder):
    plain,bucketed = (SampleDL(lines(folder, transforms=EVAL), bs=4, shuffle=True, buckets=o) for o in (False, True))
    assert bucketed.padding==0
    a,b = {},{}
    for dl,found in ((plain, a), (bucketed, b)):
        for im,ctc,_,_,ratio in dl:
            assert im.shape[3]%8==0 and im.is_contiguous()
            ink = (ratio*im.shape[3]).round().long()
            if found is b: assert im.shape[3]-8 < ink.max() <= im.shape[3]
            for x,y,n in zip(im, ctc, ink.tolist()):
                found[y.numpy().tobytes()] = x[...,:n].numpy()
                assert (x[...,n:]==0).all()
    assert a.keys()==b.keys() and all((a[k]==b[k]).all() for k in a)
    assert bucketed.padding < .12 < .4 < plain.padding

def test_collate_of_different_widths():
    "As RecResizeImg makes them in inference: padded to the widest"
    samples = [dict(image=np.full((3,48,w), 1, np.float32), valid_ratio=r) for w,r in ((160,.5), (240,1.), (160,1.))]
    (x,r),(ink,columns) = collate(samples, KeepKeys(['image', 'valid_ratio']))
    assert x.shape==(3,3,48,240) and r.tolist()==[80/240, 1., 160/240] and (ink, columns)==(480, 720)
    assert (x[0,...,160:]==0).all() and (x[2,...,:160]==1).all()
    (x,r),_ = collate(samples[:1], KeepKeys(['image', 'valid_ratio']), crop=True)
    assert x.shape==(1,3,48,80) and r.tolist()==[1.]
    (x,),_ = collate([dict(image=np.zeros((3,48,50), np.float32))], KeepKeys(['image']))
    assert x.shape==(1,3,48,50)

def test_batches_of_pp_ocrv2(folder):
    transforms = [EVAL[0], dict(CTCLabelEncode=None), dict(RecResizeImg=dict(image_shape=[3,32,320])), dict(KeepKeys=dict(keep_keys=['image','label','length']))]
    for buckets in (False, True):
        x,y,n = SampleDL(lines(folder, transforms=transforms), bs=4, buckets=buckets).one_batch()
        assert x.shape[:3]==(4,3,32) and (x.shape[3]==320)!=buckets and y.shape==(4,25) and n.shape==(4,) and {y.dtype, n.dtype}=={torch.int64}

def test_sample_dls(folder):
    from fastai.basics import Learner, SGD
    import fastai.callback.progress
    dls = sample_dls(SampleDL(lines(folder), bs=8, shuffle=True, drop_last=True), SampleDL(lines(folder, train=False), bs=16), device='cpu')
    assert dls.n_inp==1 and dls.train.device==torch.device('cpu') and (len(dls.train), len(dls.valid))==(5, 3)
    learn = Learner(dls, torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 1)), loss_func=lambda p,*y: (p[:,0]-y[-1].float()).pow(2).mean(), opt_func=SGD)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    assert dls.train.dataset.epoch==2
    new = dls.train.new(shuffle=False, drop_last=False, buckets=True)
    assert isinstance(new, SampleDL) and new.buckets and new.bs==8 and not new.shuffle
    with pytest.raises(UserError, match='40 lines, fewer than one batch of 41'): SampleDL(lines(folder), bs=41, drop_last=True)

def test_a_worker_that_is_killed(folder):
    def op(sample, rng): os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(UserError, match='a process that reads lines has ended: DataLoader worker'): list(SampleDL(SampleSet(label_files(folder/'list.txt', folder), [op], ['image']), bs=4, num_workers=1))

PROGRAM = '''
import sys, hashlib, time
from pathlib import Path
from distillbook.config.data import make_operations
from distillbook.data.lists import label_files
from distillbook.data.loader import SampleDL
from distillbook.data.sets import SampleSet
folder,skip,slow = Path(sys.argv[1]),int(sys.argv[2]),float(sys.argv[3])
ops,keys = make_operations([dict(DecodeImage=dict(img_mode='BGR')), dict(RecAug=None), dict(CTCLabelEncode=None), dict(RecResizeImg=dict(image_shape=[3,48,320])), dict(KeepKeys=dict(keep_keys=['image','label','length']))], dict(max_text_length=25))
dl = SampleDL(SampleSet(label_files(folder/'list.txt', folder), ops, keys, seed=3), bs=4, shuffle=True, num_workers=2)
dl.set_epoch(2, skip=skip)
for b in dl:
    print(hashlib.sha1(b''.join(o.numpy().tobytes() for o in b)).hexdigest(), flush=True)
    time.sleep(slow)
'''

@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks for processes in /proc')
def test_killed_and_taken_up(folder):
    "SIGKILL in mid-epoch: no worker stays behind, and the rest of the epoch comes as it would have"
    run = lambda *args: [sys.executable, '-c', PROGRAM, str(folder), *map(str, args)]
    whole = subprocess.run(run(0, 0), capture_output=True, text=True, check=True).stdout.split()
    p = subprocess.Popen(run(0, .2), stdout=subprocess.PIPE, text=True)
    first = [p.stdout.readline().strip() for _ in range(3)]
    stats = [(int(o.name), o) for o in Path('/proc').iterdir() if o.name.isdigit()]
    def parent(o):
        try: return int((o/'stat').read_text().rsplit(')', 1)[1].split()[1])
        except OSError: return -1
    children = [pid for pid,o in stats if parent(o)==p.pid]
    assert len(children)==2
    p.kill(); p.wait()
    rest = subprocess.run(run(3, 0), capture_output=True, text=True, check=True).stdout.split()
    assert first==whole[:3] and rest==whole[3:] and len(whole)==10
    def alive(pid):
        try: return (Path('/proc')/str(pid)/'stat').read_text().rsplit(')', 1)[1].split()[0]!='Z'
        except OSError: return False
    end = time.time()+20
    while any(map(alive, children)) and time.time()<end: time.sleep(.2)
    assert not any(map(alive, children))

@pytest.mark.skipif(not hasattr(signal, 'pthread_sigmask'), reason='no signals that wait')
def test_a_signal_before_a_process_is_ready(folder, monkeypatch):
    "`timeout` signals all processes of a command; one that has only just begun lives on as the others do"
    from torch.utils.data._utils import signal_handling
    ready = signal_handling._set_worker_signal_handlers
    def begun():
        os.kill(os.getpid(), signal.SIGTERM)
        ready()
    def small(sample, rng): return {**sample, 'image': np.zeros((4,4,3), np.uint8)}
    lines = SampleSet(label_files(folder/'list.txt', folder), [small], ['image'])
    want = [b for b in SampleDL(lines, bs=2)]
    monkeypatch.setattr(signal_handling, '_set_worker_signal_handlers', begun)
    assert len([b for b in SampleDL(lines, bs=2, num_workers=2)])==len(want)>0
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
