"Sources that make their pictures instead of reading them, on the way from sample to batch"
import cv2, numpy as np, pickle, pytest, torch
from distillbook.core import UserError
from distillbook.data.kept import fixed_ops, keep_pictures
from distillbook.data.lists import read_sample
from distillbook.data.loader import SampleDL, batch_order
from distillbook.data.operations import DecodeImage
from distillbook.data.pictures import decode, is_pixels, picture_size
from distillbook.data.render import make_words
from distillbook.data.sets import SampleSet, check_cacheable
from distillbook.data.shards import shard_lines, write_shards
from distillbook.rec.augment import RecAug, RecConAug
from distillbook.rec.operations import RecResizeImg

class Made:
    "Noise of differing widths: a source"
    def __init__(self, n=40, seed=0): self.n,self.seed,self.read_with_picture = n,seed,0
    def __len__(self): return self.n
    def read(self, i, rng=None, picture=True):
        line = dict(where=f'made {i}', path=f'made/{i}', label='abc')
        if not picture: return line
        self.read_with_picture += 1
        own = np.random.default_rng([self.seed, i])
        return {**line, 'image': own.integers(0, 256, (32, 30+i*7%150, 3), dtype=np.uint8)}

class Named(Made):
    "One that says what its pictures depend on"
    def fingerprint(self): return f'{self.n} {self.seed}'

class Chancy(Named):
    "One that draws from the generator that it is handed"
    def read(self, i, rng=None, picture=True):
        line = super().read(i, rng, picture)
        if picture and rng is not None: line['image'] = line['image']+rng.integers(0, 2, dtype=np.uint8)
        return line

KEYS = ['image','valid_ratio']
RESIZE = RecResizeImg([3,48,320])
def made_set(source, ops=(DecodeImage('BGR'), RESIZE), **kw): return SampleSet(source, ops, KEYS, seed=1, **kw)
def as_files(source): return [{**read_sample(source, i), 'image': cv2.imencode('.png', read_sample(source, i)['image'])[1].tobytes()} for i in range(len(source))]
def same(a, b): return len(a)==len(b) and all(torch.equal(x, y) for p,q in zip(a, b) for x,y in zip(p, q))

@pytest.mark.parametrize('settings', [dict(img_mode='BGR'), dict(img_mode='RGB'), dict(img_mode='GRAY'), dict(img_mode='RGB', channel_first=True)])
def test_decode_image_gives_for_an_array_what_it_gives_for_its_png(settings):
    image = Made().read(3)['image']
    before,op = image.copy(),DecodeImage(**settings)
    got,want = (op({'image': o, 'x': 1}, None) for o in (image, cv2.imencode('.png', image)[1].tobytes()))
    apart = np.abs(got['image'].astype(int)-want['image']).max()
    assert apart <= (settings['img_mode']=='GRAY') # libpng rounds grey otherwise than OpenCV does
    assert got['image'].shape==want['image'].shape and got['image'].flags.c_contiguous and got['x']==1
    assert np.array_equal(image, before)
    if settings==dict(img_mode='BGR'): assert got['image'] is image

@pytest.mark.parametrize('image', [np.zeros((4,4), np.uint8), np.zeros((4,4,3), np.float32), np.zeros(0, np.uint8)])
def test_decode_image_refuses_other_arrays(image):
    with pytest.raises(UserError, match=r'a picture that is made is uint8 \[h,w,3\], not '): DecodeImage()({'image': image}, None)

@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('buckets', [False, True])
def test_batches_are_those_of_files(workers, buckets):
    ops = [DecodeImage('BGR'), RecConAug(prob=.5, image_shape=[48,320,3]), RecAug(), RESIZE]
    a,b = (SampleDL(made_set(o, ops, ext_op_transform_idx=1), bs=8, shuffle=True, buckets=buckets, num_workers=n) for o,n in ((Made(), workers), (as_files(Made()), 0)))
    assert same(list(a), list(b)) and same(list(a), list(b))
    a.set_epoch(0, skip=3); b.set_epoch(0, skip=3)
    assert same(list(a), list(b))

def test_decode_image_is_not_needed():
    a,b = (made_set(Made(), ops) for ops in ([DecodeImage('BGR'), RESIZE], [RESIZE]))
    assert all(np.array_equal(x, y) for i in range(40) for x,y in zip(a[i], b[i]))

def test_buckets_go_by_the_arrays():
    data = made_set(Made())
    idxs = np.arange(40)
    np.testing.assert_allclose(data.aspect_ratios(idxs), (30+idxs*7%150)/32)
    for b in batch_order(data, 8, False, False, True): assert (np.diff(data.aspect_ratios(b))>=0).all()
    drawn = data.source.read_with_picture
    list(batch_order(data, 8, True, False, True))
    assert data.source.read_with_picture==drawn

def test_answers_about_made_pictures_can_be_kept():
    check_cacheable(made_set(Made()))
    check_cacheable(made_set(Chancy(), variants=2))
    with pytest.raises(UserError, match='chance makes new pictures'): check_cacheable(made_set(Chancy()))
    with pytest.raises(UserError, match='chance makes new pictures'): check_cacheable(made_set(Made(), [RecAug(), RESIZE]))

@pytest.mark.parametrize('ops', [[DecodeImage('BGR'), RESIZE], [DecodeImage('RGB'), RESIZE], [RESIZE], [RecAug(), RESIZE]])
def test_made_pictures_can_be_kept(tmp_path, ops):
    plain,kept = made_set(Named(), ops),made_set(Named(), ops, keep=tmp_path)
    for epoch in range(2):
        for o in (plain, kept): o.set_epoch(epoch)
        assert all(np.array_equal(x, y) for i in range(40) for x,y in zip(plain[i], kept[i]))
    path,drawn = kept.kept.path,kept.source.read_with_picture
    kept[0]
    assert kept.source.read_with_picture==drawn and len(kept.kept)==40
    assert made_set(Named(), ops, keep=tmp_path).kept.path==path and made_set(Named(seed=1), ops, keep=tmp_path).kept.path!=path

def test_made_pictures_that_cannot_be_kept(tmp_path):
    with pytest.raises(UserError, match='keep: only the lines of label files and LMDB folders can be kept, and those of a source with a fingerprint'): made_set(Made(), keep=tmp_path)
    with pytest.raises(UserError, match='of which chance takes one'): made_set(Chancy(), keep=tmp_path)
    with pytest.raises(UserError, match='keep_gb'): made_set(Named(), keep=tmp_path, keep_gb=1e-6)
    assert not list(tmp_path.iterdir())

def test_a_source_that_changes_with_the_epoch(tmp_path):
    class Changing(Named):
        def set_epoch(self, epoch): self.seed = epoch
        def read(self, i, rng=None, picture=True):
            line = super().read(i, rng, picture)
            return {**line, 'image': np.repeat(line['image'], 1+self.seed, 1)} if picture else line
    data = made_set(Changing())
    first = data.aspect_ratios(np.arange(4)).copy()
    data.set_epoch(1)
    assert np.array_equal(data.aspect_ratios(np.arange(4)), 2*first)
    with pytest.raises(UserError, match='others in each epoch'): made_set(Changing(), keep=tmp_path)

def test_only_fixed_operations_count():
    assert fixed_ops(Named(), [RESIZE])==[]
    lines = as_files(Made(2))
    with pytest.raises(UserError, match='there is no operation, such as DecodeImage'): fixed_ops(lines, [])
    with pytest.raises(UserError, match='made/0: RecResizeImg fails; are the operations in the right order'): fixed_ops(lines, [RESIZE, DecodeImage()])
    def refuse(sample, rng): return None
    assert [type(o) for o in fixed_ops(lines, [DecodeImage(), refuse, RESIZE])]==[DecodeImage]

def test_a_made_source_that_refuses(caplog):
    class Broken(Made):
        def read(self, i, rng=None, picture=True):
            if i%10==3: raise UserError(f'made {i}: no such word')
            return super().read(i, rng, picture)
    dl = SampleDL(made_set(Broken(), train=False), bs=8)
    assert sum(len(x) for x,_ in dl)==36 and len(dl.faults)==4 and 'made 13: no such word' in caplog.messages
    assert made_set(Broken()).aspect_ratios(np.array([3]))==0

def test_refused_without_a_word():
    def op(sample, rng): raise UserError('')
    data = made_set(Made(), [op, RESIZE], train=False)
    assert data.fetch(5, faults := []) is None and faults==['made 5: ']

def test_made_pictures_in_shards(tmp_path):
    write_shards(Made(7), tmp_path, per=3)
    source = shard_lines(tmp_path)
    assert source.counts.tolist()==[3,3,1]
    for i in range(7):
        assert np.array_equal(decode(source[i]['image']), Made().read(i)['image']) and source[i]['path']==f'made/{i}'
        assert source.read(i, picture=False)=={k: v for k,v in source[i].items() if k!='image'}

def test_pictures():
    image = Made().read(1)['image']
    assert is_pixels(image) and not is_pixels(image[0]) and not is_pixels(b'')
    assert picture_size(image)==picture_size(cv2.imencode('.jpg', image)[1].tobytes())==image.shape[1::-1]
    for bad in (b'', b'no picture', np.zeros((2,2))):
        with pytest.raises(UserError, match='not a picture'): picture_size(bad)

def test_words_skipped_are_not_shared():
    "What `skip` of the rendered sets rests on"
    words = make_words(300, seed=5)
    assert words[:200]==make_words(200, seed=5) and not {o.lower() for o in words[:200]} & {o.lower() for o in words[200:]}

# ---- others for an operation

class Counted:
    "Pictures of one grey each, of which some cannot be had; `read` says which were asked for"
    def __init__(self, n, broken=()): self.n,self.broken,self.asked = n,set(broken),[]
    def __len__(self): return self.n
    def read(self, i, rng=None, picture=True):
        self.asked.append(i)
        if i in self.broken: raise UserError(f'picture {i} is broken')
        return dict(where=f'{i}', path=f'{i}', label=f'{i}', image=np.full((4,4,3), i, np.uint8))

class Looks:
    "Joins the labels of the first `n` of three others"
    ext_data_num = 3
    def __init__(self, n): self.n = n
    def __call__(self, sample, rng): return {**sample, 'label': '+'.join(o['label'] for o in (sample, *sample['ext_data'][:self.n]))}

def label(data, i, faults=None): return data.fetch(i, [] if faults is None else faults)['label']

def looked(n, **kw):
    source = Counted(20, **kw)
    return source,SampleSet(source, [Looks(n)], ['image','label'], seed=1, ext_op_transform_idx=0)

def test_others_are_read_when_looked_at():
    "And which they are depends on nobody's looking"
    labels = {}
    for n in (0, 1, 3):
        source,data = looked(n)
        labels[n] = [label(data, i) for i in range(20)]
        assert len(source.asked)==20*(n+1)
    assert all(c.startswith(f'{b}+') and b.startswith(f'{a}+') for a,b,c in zip(*labels.values()))
    again = looked(3)[1]
    assert [label(again, i) for i in range(20)]==labels[3]

def test_others_behave_as_a_list():
    data = looked(3)[1]
    others = data._others(3, np.random.default_rng(0), [])
    assert len(others)==3 and others[-1] is others[2] and others[np.int64(0)] is others[0] and [o is p for o,p in zip(others[1:], others)]==[False,False]
    assert [o['label'] for o in pickle.loads(pickle.dumps(others))]==[o['label'] for o in others] and others[0] in others
    with pytest.raises(IndexError): others[3]

class Later:
    "Looks at the others that an operation before it has left, or does without"
    def __init__(self, catch): self.catch = catch
    def __call__(self, sample, rng):
        try: sample['ext_data'][0]
        except UserError:
            if not self.catch: raise
        return sample

class Leaves:
    ext_data_num = 1
    def __call__(self, sample, rng): return sample

@pytest.mark.parametrize('catch', [False, True])
def test_others_of_which_there_are_none(catch):
    "The error comes from whichever operation looks, if that lets it pass"
    class Never(Counted):
        def read(self, i, rng=None, picture=True): return super().read(i) if not self.asked else super().read(7)
    data = SampleSet(Never(20, broken=[7]), [Leaves(), Later(catch)], ['image','label'], seed=1, ext_op_transform_idx=0)
    if catch: assert label(data, 0)=='0'
    else:
        with pytest.raises(UserError, match='1000 lines drawn'): label(data, 0)
    assert len(data.source.asked)==1001

def test_broken_others():
    "Are replaced by others; where there are none, that is the error, and it does not take a thousand times a thousand"
    source,data = looked(3, broken={2,5,9})
    faults = []
    assert not {2,5,9} & {int(o) for i in range(20) for o in label(data, i, faults).split('+')}
    assert set(faults)=={f'picture {i} is broken' for i in (2,5,9)}
    data = looked(1)[1]
    class Never(Counted):
        def read(self, i, rng=None, picture=True): return super().read(i) if not self.asked else super().read(7)
    data.source = Never(20, broken=[7])
    with pytest.raises(UserError, match='1000 lines drawn'): label(data, 0)
    assert len(data.source.asked)==1001
