"Detection's label lines, colours, sizes for evaluation, and the way from a page to a batch"
import cv2, json, logging, math, numpy as np, pytest, torch, yaml
from distillbook.config.data import make_operations
from distillbook.config.registry import OPERATIONS
from distillbook.core import UserError
from distillbook.det.operations import IGNORE, DetLabelEncode, DetResizeForTest, NormalizeImage, ToCHWImage, fit_size, fraction, read_points
from distillbook.det.augment import CopyPaste, EastRandomCropData, IaaAugment
from distillbook.det.render import RenderedPages, write_pages
from distillbook.det.targets import MakeBorderMap, MakeShrinkMap
from distillbook.data.operations import DecodeImage
from distillbook.data.lists import label_files
from distillbook.data.loader import SampleDL
from distillbook.data.sets import SampleSet

BOX = [[10,10],[60,12],[60,30],[10,28]]
def word(text='a', points=BOX, **kwargs): return dict(transcription=text, points=points, **kwargs)
def encode(words): return DetLabelEncode()(dict(label=json.dumps(words), path='x'))


# labels

def test_label():
    o = encode([word('a'), word('###'), word('*'), word('**'), word('', difficult=1)])
    assert o['texts']==['a','###','*','**',''] and o['ignore_tags'].tolist()==[False,True,True,False,False] and o['ignore_tags'].dtype==bool
    assert o['polys'].dtype==np.float32 and o['polys'].shape==(5,4,2) and (o['polys']==np.float32(BOX)).all() and o['path']=='x'

def test_label_with_unequal_polygons():
    o = encode([word(), word(points=[[0,0],[5,0],[5.5,5.25]]), word(points=[[i,i*i] for i in range(7)])])
    assert o['polys'].shape==(3,7,2)
    assert o['polys'][0].tolist()==BOX+[BOX[-1]]*3 and o['polys'][1].tolist()==[[0,0],[5,0]]+[[5.5,5.25]]*5
    assert [cv2.contourArea(p) for p in o['polys'][:2]]==[cv2.contourArea(np.float32(BOX)), cv2.contourArea(o['polys'][1,:3])]

def test_label_without_its_own_sample_changed():
    s = dict(label=json.dumps([word()]))
    DetLabelEncode()(s, np.random.default_rng(0))
    assert list(s)==['label']

@pytest.mark.parametrize('text,message', [
    ('', 'not JSON'), ('sale', 'not JSON'), ('[{"transcription": "a"', 'not JSON'), ('['*100000, 'not JSON'), ('{}', 'not a list'), ('3', 'not a list'), ('null', 'not a list'),
    ('[3]', 'word 1 is not a dict'), ('[null]', 'word 1 is not a dict'), (json.dumps([word(), dict(transcription='a')]), "word 2 has no 'points'"), (json.dumps([dict(points=BOX)]), "word 1 has no 'transcription'"),
    (json.dumps([word(3)]), 'transcription is not text: 3'), (json.dumps([word(None)]), 'transcription is not text')])
def test_labels_that_will_not_do(text, message):
    with pytest.raises(UserError, match=message): DetLabelEncode()(dict(label=text))

@pytest.mark.parametrize('points,message', [
    (None, 'pairs'), (3, 'pairs'), ([], 'pairs'), ([1,2,3,4], 'pairs'), ([[1,2,3]]*4, 'pairs'), ([[1,2],[3]], 'pairs'), ([[1,2],[3,None],[4,5]], 'pairs'), ([['1','2']]*4, 'pairs'), ({'x': 1}, 'pairs'), ('abcd', 'pairs'),
    ([[True,False]]*4, 'pairs'), ([[10**400,1]]*4, 'pairs'), ([[1,2]], 'three or more'), ([[1,2],[3,4]], 'three or more'), ([[1,2],[3,float('nan')],[5,6]], 'finite'), ([[1,2],[3,math.inf],[5,6]], 'finite'), ([[1,2],[3,1e39],[5,6]], 'finite')])
def test_points_that_will_not_do(points, message):
    with pytest.raises(UserError, match='word 3: points.*'+message): encode([word(), word(), word(points=points)])

def test_points():
    assert read_points([[1,2],[3.5,4],[5,6]]).tolist()==[[1,2],[3.5,4],[5,6]]
    assert read_points([[-5,1e9]]*3).shape==(3,2)


# colours

@pytest.mark.parametrize('value,want', [('1./255.', 1/255), ('1/255', 1/255), (' 1 / 4 ', .25), ('0.5', .5), (2, 2.), (.25, .25), ('-1/2', -.5), ('1e-3', .001), (np.float32(.5), .5)])
def test_fraction(value, want): assert fraction(value, 'scale')==want

@pytest.mark.parametrize('value', ['1/0', '1//2', '1/2/3', '', 'a', '1/', '/2', 'nan', 'inf', '1/inf/1', None, True, [1], {}, 'exit()', '1+1', '(1/2)', 10**400])
def test_fractions_that_are_none(value):
    with pytest.raises(UserError, match='scale: a number or a fraction'): fraction(value, 'scale')

def test_nothing_is_evaluated(tmp_path):
    with pytest.raises(UserError): NormalizeImage(scale=f'open({str(tmp_path/"x")!r}, "w")/1')
    assert not (tmp_path/'x').exists()

def formula(im, scale, mean, std): return (im.astype(np.float32)*np.float32(scale)-np.float32(mean))/np.float32(std)

@pytest.mark.parametrize('kwargs', [{}, dict(scale='1./255.', mean=[.485,.456,.406], std=[.229,.224,.225]), dict(scale=1, mean=[123,117,104], std=[58,57,57]), dict(scale=None, mean=None, std=None)])
def test_normalize(kwargs):
    im = np.random.default_rng(0).integers(0, 256, (9,7,3), dtype=np.uint8)
    scale,mean,std = (kwargs.get(k) or d for k,d in (('scale',1/255),('mean',[.485,.456,.406]),('std',[.229,.224,.225])))
    want = formula(im, 1/255 if isinstance(scale, str) else scale, mean, std)
    sample = dict(image=im)
    got = NormalizeImage(**kwargs, order='hwc')(sample)['image']
    assert got.dtype==np.float32 and np.array_equal(got, want) and sample['image'] is im
    assert np.array_equal(NormalizeImage(**kwargs, order='hwc')(dict(image=im.astype(np.float32)))['image'], want)
    assert np.array_equal(NormalizeImage(**kwargs)(dict(image=im.transpose(2,0,1)))['image'], want.transpose(2,0,1))

@pytest.mark.parametrize('kwargs,message', [(dict(order='hcw'), "no order 'hcw'; did you mean"), (dict(mean=.5), 'mean: three numbers'), (dict(std=[1,2]), 'std: three numbers'), (dict(std=[1,0,1]), 'zero'), (dict(mean=['a',1,1]), 'mean: a number'), (dict(scale='x'), 'scale: ')])
def test_normalize_settings_that_will_not_do(kwargs, message):
    with pytest.raises(UserError, match=message): NormalizeImage(**kwargs)

def test_to_chw():
    im = np.arange(24).reshape(2,4,3)
    out = ToCHWImage()(dict(image=im, a=1))
    assert out['a']==1 and out['image'].flags.c_contiguous and np.array_equal(out['image'][2], im[...,2])


# sizes, worked out by hand from PaddleOCR's rules: source (h, w), settings, wanted (h, w)

SIZES = [
    ((720,1280), {}, (736,1312)), ((1280,720), {}, (1312,736)), ((736,736), {}, (736,736)), ((735,735), {}, (736,736)), ((1000,1500), {}, (992,1504)), ((48,48), {}, (736,736)), ((300,400), {}, (736,992)),
    ((720,1280), dict(limit_side_len=960), (960,1696)), ((720,1280), dict(limit_side_len=960, limit_type='max'), (544,960)), ((500,400), dict(limit_side_len=960, limit_type='max'), (512,384)), ((2000,10), dict(limit_side_len=960, limit_type='max'), (960,32)),
    ((500,400), dict(limit_side_len=960, limit_type='resize_long'), (960,768)), ((2000,1000), dict(limit_side_len=960, limit_type='resize_long'), (960,480)), ((80,80), dict(limit_side_len=80, limit_type='max'), (64,64)), ((112,112), dict(limit_side_len=112, limit_type='min'), (128,128)), ((45,45), dict(limit_side_len=10, limit_type='max'), (32,32)),
    ((720,1280), dict(image_shape=[736,1280]), (736,1280)), ((10,2000), dict(image_shape=[736,1280]), (736,1280)), ((720,1280), dict(image_shape=[736,1280], keep_ratio=True), (736,1312)), ((100,100), dict(image_shape=[640,32], keep_ratio=True), (640,640)), ((100,101), dict(image_shape=[640,32], keep_ratio=True), (640,672)),
    ((720,1280), dict(resize_long=960), (640,1024)), ((1280,720), dict(resize_long=960), (1024,640)), ((500,500), dict(resize_long=1024), (1024,1024)), ((10,1000), dict(resize_long=512), (128,512)), ((500,500), dict(resize_long=1025), (1152,1152)),
    ((720,1280), dict(image_shape=[64,96], limit_side_len=960, resize_long=960), (64,96)), ((720,1280), dict(limit_side_len=960, limit_type='max', resize_long=512), (544,960))]

@pytest.mark.parametrize('src,kwargs,want', SIZES)
def test_resize(src, kwargs, want):
    polys = np.float32([BOX])
    sample = dict(image=np.zeros((*src, 3), np.uint8), polys=polys)
    out = DetResizeForTest(**kwargs)(sample)
    assert out['image'].shape==(*want,3) and sample['image'].shape[:2]==src and out['polys'] is polys
    assert out['shape'].dtype==np.float32 and np.allclose(out['shape'], [*src, want[0]/src[0], want[1]/src[1]], rtol=1e-6)

@pytest.mark.parametrize('src', [(1,1), (10,20), (31,32), (60,3), (3,60)])
def test_tiny_pictures_are_padded(src):
    padded = max(32, src[0]),max(32, src[1])
    out = DetResizeForTest(limit_side_len=64)(dict(image=np.full((*src,3), 255, np.uint8)))
    h,w = fit_size(*padded, limit_side_len=64)
    assert out['image'].shape==(h,w,3) and np.allclose(out['shape'], [*src, h/padded[0], w/padded[1]])
    assert abs((out['image'][:,0,0]>127).sum()-src[0]*out['shape'][2])<=1 and abs((out['image'][0,:,0]>127).sum()-src[1]*out['shape'][3])<=1

def test_not_so_tiny_pictures_are_not_padded():
    out = DetResizeForTest(limit_side_len=64)(dict(image=np.full((4,60,3), 255, np.uint8)))
    assert (out['image']==255).all() and out['image'].shape==(64,960,3)

@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('kwargs', [{}, dict(limit_side_len=320, limit_type='max'), dict(resize_long=320), dict(image_shape=[320,64], keep_ratio=True)])
def test_every_size_is_a_multiple_of_32(seed, kwargs):
    h,w = np.exp(np.random.default_rng(seed).uniform(0, 7, 2)).astype(int).tolist()
    nh,nw = fit_size(max(h, 1), max(w, 1), **kwargs)
    assert nh>=32 and nw>=32 and nh%32==0 and nw%32==0

def test_a_picture_too_large_is_refused():
    with pytest.raises(UserError, match='4 x 100000 pixels would become 736 x'): DetResizeForTest()(dict(image=np.zeros((100000,4,3), np.uint8)))

@pytest.mark.parametrize('kwargs,message', [(dict(limit_type='mim'), "no limit_type 'mim'; did you mean 'min'"), (dict(image_shape=736), 'image_shape: '), (dict(image_shape=[3,736,1280]), 'image_shape: '), (dict(image_shape=[720,1280]), 'multiples of 32'), (dict(image_shape=[736.,1280]), 'image_shape: '),
    (dict(limit_side_len='960'), 'limit_side_len: '), (dict(limit_side_len=0), 'limit_side_len: '), (dict(resize_long=-1), 'resize_long: '), (dict(limit_side_len=float('nan')), 'limit_side_len: ')])
def test_resize_settings_that_will_not_do(kwargs, message):
    with pytest.raises(UserError, match=message): DetResizeForTest(**kwargs)

def test_settings_without_effect_are_named(caplog):
    with caplog.at_level(logging.WARNING, 'distillbook'): DetResizeForTest(limit_type='max')
    assert 'limit_type has no effect' in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, 'distillbook'):
        DetResizeForTest(image_shape=[32,32], keep_ratio=True)
        DetResizeForTest(limit_side_len=960, limit_type='max')
        DetResizeForTest()
    assert not caplog.text


# from page to batch

def norm(): return NormalizeImage(scale='1./255.', mean=[.485,.456,.406], std=[.229,.224,.225], order='hwc')
def train_ops():
    steps = [dict(type='Fliplr', args=dict(p=.5)), dict(type='Affine', args=dict(rotate=[-10,10])), dict(type='Resize', args=dict(size=[.5,3]))]
    return [DecodeImage('BGR'), DetLabelEncode(), CopyPaste(), IaaAugment(steps), EastRandomCropData([96,96], max_tries=50), MakeBorderMap(), MakeShrinkMap(), norm(), ToCHWImage()]
def eval_ops(**size): return [DecodeImage('BGR'), DetLabelEncode(), DetResizeForTest(**size), norm(), ToCHWImage()]
TRAIN_KEYS,EVAL_KEYS = ['image','threshold_map','threshold_mask','shrink_map','shrink_mask'],['image','shape','polys','ignore_tags']

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('pages')
    write_pages(path, 5, seed=3, height=96, width=128, illegible=.3)
    return path

def pages(folder, **kwargs): return SampleSet(label_files(folder/'label.txt', folder), train_ops(), TRAIN_KEYS, **kwargs)

def test_a_training_sample(folder):
    image,*maps = pages(folder)[0]
    assert image.shape==(3,96,96) and image.dtype==np.float32 and all(o.shape==(96,96) and o.dtype==np.float32 for o in maps)
    assert maps[2].any() and maps[0].max()>.5 and set(np.unique(maps[3]))<={0.,1.}

def test_drawn_pages_take_the_same_way():
    got = SampleSet(RenderedPages(3, height=96, width=128), train_ops(), TRAIN_KEYS, seed=1)
    assert [o.shape for o in got[1]]==[(3,96,96), *[(96,96)]*4] and not got.faults
    whole = SampleSet(RenderedPages(3, height=96, width=128), eval_ops(limit_side_len=96), EVAL_KEYS, train=False)
    assert whole[0][0].shape==(3,96,128) and whole[0][1].tolist()==[96,128,1,1]

def test_an_epoch_repeats_itself_whatever_the_workers(folder):
    def run(epoch, n):
        dl = SampleDL(pages(folder, seed=5), bs=2, shuffle=True, num_workers=n)
        dl.set_epoch(epoch)
        return list(dl)
    a,b,c = run(1, 0),run(1, 2),run(2, 0)
    assert len(a)==3 and all(torch.equal(x, y) for p,q in zip(a, b) for x,y in zip(p, q))
    assert not torch.equal(a[0][0], c[0][0])

def test_evaluation_batches_of_different_sizes(tmp_path, folder):
    rows = []
    for i,(h,w) in enumerate([(100,200),(150,100),(20,20)]):
        cv2.imwrite(str(tmp_path/f'{i}.png'), np.full((h,w,3), 255, np.uint8))
        rows.append(f'{i}.png\t'+json.dumps([word('###'), *[word()]*i]))
    (tmp_path/'label.txt').write_text('\n'.join(rows))
    image,shape,polys,tags = next(iter(SampleDL(SampleSet(label_files(tmp_path/'label.txt', tmp_path), eval_ops(limit_side_len=64), EVAL_KEYS, train=False), bs=3)))
    assert image.shape==(3,3,160,192) and shape.shape==(3,4)
    assert [tuple(o.shape) for o in polys]==[(1,4,2),(2,4,2),(3,4,2)] and [o.tolist() for o in tags]==[[True],[True,False],[True,False,False]]
    for im,(sh,sw,rh,rw) in zip(image, shape.tolist()): assert (im[:,round(sh*rh)-1,round(sw*rw)-1]>.2).all()
    assert not image[0,:,96:].any() and not image[1,:,:,96:].any()

def test_broken_labels_are_named_and_replaced(folder, tmp_path):
    good = (folder/'label.txt').read_text().splitlines()[0]
    picture = good.split('\t')[0]
    (tmp_path/'label.txt').write_text(f'{good}\n{picture}\t{{}}\n{picture}\t[{{"points": [[1,2]]}}]\n{picture}\tnothing\n')
    lines = SampleSet(label_files(tmp_path/'label.txt', folder), train_ops(), TRAIN_KEYS, seed=1)
    assert len([lines[i] for i in range(4)])==4
    said = ' '.join(lines.faults)
    for o in ('the label is not a list of words', "word 1 has no 'transcription'", 'the label is not JSON', 'label.txt:3'): assert o in said


# PaddleOCR's lists of operations

NORM = dict(NormalizeImage=dict(scale='1./255.', mean=[.485,.456,.406], std=[.229,.224,.225], order='hwc'))
HEAD = [dict(DecodeImage=dict(img_mode='BGR', channel_first=False)), dict(DetLabelEncode=None)]
TRAIN = [*HEAD, dict(CopyPaste=None), dict(IaaAugment=dict(augmenter_args=[dict(type='Fliplr', args=dict(p=.5)), dict(type='Affine', args=dict(rotate=[-10,10])), dict(type='Resize', args=dict(size=[.5,3]))])),
    dict(EastRandomCropData=dict(size=[96,96], max_tries=50, keep_ratio=True)), dict(MakeBorderMap=dict(shrink_ratio=.4, thresh_min=.3, thresh_max=.7)), dict(MakeShrinkMap=dict(shrink_ratio=.4, min_text_size=8)), NORM, dict(ToCHWImage=None),
    dict(KeepKeys=dict(keep_keys=TRAIN_KEYS))]

def test_paddles_training_list(folder, caplog):
    "The same samples as from operations that were made by hand; and nothing to be told"
    with caplog.at_level(logging.INFO, 'distillbook'): ops,keys = make_operations(TRAIN, dict(epoch_num=3, use_gpu=True))
    assert not caplog.messages and [type(o).__name__ for o in ops]==[next(iter(o)) for o in TRAIN[:-1]] and keys==TRAIN_KEYS
    read,made = SampleSet(label_files(folder/'label.txt', folder), ops, keys, seed=1),pages(folder, seed=1)
    for i in range(5): assert all(np.array_equal(a, b) for a,b in zip(read[i], made[i], strict=True))

def test_yaml_that_is_like_paddles(folder):
    text = '''
- DecodeImage: {img_mode: BGR, channel_first: False}
- DetLabelEncode:
- DetResizeForTest:
    limit_side_len: 96
    limit_type: max
- NormalizeImage:
    scale: 1./255.
    mean: [0.485, 0.456, 0.406]
    std: [0.229, 0.224, 0.225]
    order: 'hwc'
- ToCHWImage:
- KeepKeys:
    keep_keys: ['image', 'shape', 'polys', 'ignore_tags']
'''
    ops,keys = make_operations(yaml.safe_load(text), dict(epoch_num=3, use_gpu=True))
    image,shape,polys,tags = SampleSet(label_files(folder/'label.txt', folder), ops, keys, train=False)[0]
    assert image.shape==(3,64,96) and shape.tolist()[:2]==[96,128] and len(polys)==len(tags)

@pytest.mark.parametrize('transforms,message', [
    ([dict(EastRandomCrop=None)], ".0.EastRandomCrop: no operation 'EastRandomCrop'; did you mean 'EastRandomCropData'"), ([dict(MakeShrinkMap=dict(min_size=8))], ".0.MakeShrinkMap.min_size: no setting 'min_size'"), ([dict(ToCHWImage=dict(a=1))], ".0.ToCHWImage.a: no setting 'a'"),
    ([dict(DetLabelEncode=dict(a=1))], ".0.DetLabelEncode.a: no setting 'a'"), ([*HEAD, dict(IaaAugment=dict(augmenter_args=[dict(type='Flip')]))], r".2.IaaAugment: augmenter_args\[0\]: no type 'Flip'"), ([dict(NormalizeImage=dict(scale='os.getcwd()'))], '.0.NormalizeImage: scale: a number or a fraction'),
    (HEAD, ': the last operation is KeepKeys'), ([dict(RecResizeImage=dict(image_shape=[3,48,320]))], ".0.RecResizeImage: no operation 'RecResizeImage'; did you mean 'RecResizeImg'"),
    ([dict(DetResizeForTest=dict(limit_side_len='a'))], r".0.DetResizeForTest.*limit_side_len: .*not 'a'"), ([dict(MakeBorderMap=dict(thresh_min='low'))], ".0.MakeBorderMap.thresh_min: a number is wanted, not 'low'")])
def test_lists_that_will_not_do(transforms, message):
    with pytest.raises(UserError, match='^Train.dataset.transforms'+message): make_operations(transforms)

def test_the_table_has_paddles_names():
    assert {'DecodeImage','KeepKeys','DetLabelEncode','CopyPaste','IaaAugment','EastRandomCropData','MakeBorderMap','MakeShrinkMap','NormalizeImage','ToCHWImage','DetResizeForTest','ColorJitter'} <= set(OPERATIONS)
    assert set(IGNORE)=={'*','###'}
