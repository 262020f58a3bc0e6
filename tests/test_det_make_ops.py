"PaddleOCR's lists of operations for detection, from YAML"
import cv2, json, numpy as np, pytest, yaml
from distillbook.core import UserError
from distillbook.data.lists import label_files
from distillbook.data.sets import SampleSet
from distillbook.det.operations import IGNORE, OPS, make_ops
from distillbook.det.render import write_pages

NORM = dict(NormalizeImage=dict(scale='1./255.', mean=[.485,.456,.406], std=[.229,.224,.225], order='hwc'))
HEAD = [dict(DecodeImage=dict(img_mode='BGR', channel_first=False)), dict(DetLabelEncode=None)]
TRAIN = [*HEAD, dict(CopyPaste=None), dict(IaaAugment=dict(augmenter_args=[dict(type='Fliplr', args=dict(p=.5)), dict(type='Affine', args=dict(rotate=[-10,10])), dict(type='Resize', args=dict(size=[.5,3]))])),
    dict(EastRandomCropData=dict(size=[96,96], max_tries=50, keep_ratio=True)), dict(MakeBorderMap=dict(shrink_ratio=.4, thresh_min=.3, thresh_max=.7)), dict(MakeShrinkMap=dict(shrink_ratio=.4, min_text_size=8)), NORM, dict(ToCHWImage=None),
    dict(KeepKeys=dict(keep_keys=['image','threshold_map','threshold_mask','shrink_map','shrink_mask']))]
EVAL = [*HEAD, dict(DetResizeForTest=None), NORM, dict(ToCHWImage=None), dict(KeepKeys=dict(keep_keys=['image','shape','polys','ignore_tags']))]

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('pages')
    write_pages(path, 5, seed=3, height=96, width=128, illegible=.3)
    return path

def pages(folder, transforms=TRAIN, **kwargs): return SampleSet(label_files(folder/'label.txt', folder), *make_ops(transforms, dict(epoch_num=3, use_gpu=True)), **kwargs)

def test_paddles_training_list(folder):
    said = []
    ops,keys = make_ops(TRAIN, dict(epoch_num=3), warn=said.append)
    assert not said and [type(o).__name__ for o in ops]==[next(iter(o)) for o in TRAIN[:-1]] and keys==TRAIN[-1]['KeepKeys']['keep_keys']
    image,*maps = pages(folder)[0]
    assert image.shape==(3,96,96) and image.dtype==np.float32 and all(o.shape==(96,96) and o.dtype==np.float32 for o in maps)
    assert maps[2].any() and maps[0].max()>.5 and set(np.unique(maps[3]))<={0.,1.}

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
    image,shape,polys,tags = pages(folder, yaml.safe_load(text), train=False)[0]
    assert image.shape==(3,64,96) and shape.tolist()[:2]==[96,128] and len(polys)==len(tags)

@pytest.mark.parametrize('transforms,message', [
    ([dict(EastRandomCrop=None)], r"transforms\[0\].EastRandomCrop: no operation 'EastRandomCrop'; did you mean 'EastRandomCropData'"), ([dict(MakeShrinkMap=dict(min_size=8))], "no setting 'min_size'"), ([dict(ToCHWImage=dict(a=1))], "no setting 'a'"),
    ([dict(DetLabelEncode=dict(a=1))], "no setting 'a'"), ([dict(IaaAugment=dict(augmenter_args=[dict(type='Flip')]))], r"transforms\[0\].IaaAugment: augmenter_args\[0\]: no type 'Flip'"), ([dict(NormalizeImage=dict(scale='os.getcwd()'))], 'NormalizeImage: scale: a number or a fraction'),
    (HEAD, 'the last operation is KeepKeys'), ([dict(RecResizeImg=dict(image_shape=[3,48,320]))], "no operation 'RecResizeImg'")])
def test_lists_that_will_not_do(transforms, message):
    with pytest.raises(UserError, match=message): make_ops(transforms)

def test_the_table_has_paddles_names():
    assert {'DecodeImage','KeepKeys','DetLabelEncode','CopyPaste','IaaAugment','EastRandomCropData','MakeBorderMap','MakeShrinkMap','NormalizeImage','ToCHWImage','DetResizeForTest','ColorJitter'} <= set(OPS)
    assert set(IGNORE)=={'*','###'}
