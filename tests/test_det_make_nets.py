"Detectors from a config's section"
import sys, types
import pytest, torch
from torch import nn

from distillbook.core import UserError
from distillbook.det.nets import build_det, other_backbone

def student(**kwargs):
    "The student of ch_PP-OCRv3_det_cml.yml"
    return dict(pretrained=None, model_type='det', algorithm='DB', Transform=None, Backbone=dict(name='MobileNetV3', scale=0.5, model_name='large', disable_se=True),
        Neck=dict(name='RSEFPN', out_channels=96, shortcut=True), Head=dict(name='DBHead', k=50)) | kwargs

def teacher(**kwargs):
    "Its teacher; the nets of ch_PP-OCRv3_det_dml.yml are the same"
    return dict(freeze_params=True, return_all_feats=False, model_type='det', algorithm='DB', Backbone=dict(name='ResNet_vd', in_channels=3, layers=50),
        Neck=dict(name='LKPAN', out_channels=256), Head=dict(name='DBHead', kernel_list=[7, 2, 2], k=50)) | kwargs

def small(**kwargs): return student(Backbone=dict(name='PlainBackbone', channels=[4, 4, 8, 8]), Neck=dict(name='DBFPN', out_channels=16)) | kwargs

def picture(n=2, h=64, w=96): return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(0))

# What a stranger may do wrong

def backbone(name, **kwargs): return small(Backbone=dict(name=name, **kwargs))

WRONG = {
    'nothing': (None, "M.S: names and values are wanted, not None"),
    'list': ([1], "M.S: names and values are wanted"),
    'key': (small(Bakbone=1), "M.S: no key 'Bakbone'; did you mean 'Backbone'?"),
    'transform': (small(Transform=dict(name='TPS')), 'M.S.Transform'),
    'no head': (small(Head=None), 'M.S: there is no Head'),
    'no neck': ({k: v for k,v in small().items() if k!='Neck'}, 'M.S: there is no Neck'),
    'no name': (small(Neck=dict(out_channels=16)), "M.S.Neck: wants a 'name'"),
    'text': (small(Neck='DBFPN'), "M.S.Neck: wants a 'name'"),
    'backbone': (backbone('ResNet_vb'), "M.S.Backbone: no backbone 'ResNet_vb'; did you mean 'ResNet_vd'"),
    'v4 student': (backbone('PPLCNetV3', scale=0.75, det=True), "M.S.Backbone: no backbone 'PPLCNetV3'; there are: ResNet_vd, "),
    'v4 teacher': (backbone('PPHGNet_small', det=True), "M.S.Backbone: no backbone 'PPHGNet_small'"),
    'backbone argument': (backbone('ResNet_vd', layer=18), "M.S.Backbone: no argument of ResNet_vd 'layer'; did you mean 'layers'?"),
    'backbone value': (backbone('ResNet_vd', layers=19), "M.S.Backbone: no number of layers 19"),
    'neck': (small(Neck=dict(name='RSEFNP')), "M.S.Neck: no neck 'RSEFNP'; did you mean 'RSEFPN'"),
    'neck argument': (small(Neck=dict(name='RSEFPN', out_channels=16, shortcuts=True)), "did you mean 'shortcut'?"),
    'v4 neck': (small(Neck=dict(name='LKPAN', out_channels=16, intracl=True)), "M.S.Neck: no argument of LKPAN 'intracl'"),
    'neck without channels': (small(Neck=dict(name='LKPAN')), 'M.S.Neck: LKPAN cannot be made of'),
    'odd channels': (small(Neck=dict(name='DBFPN', out_channels=98)), 'M.S.Neck: out_channels: a multiple of 4 is wanted'),
    'no channels': (small(Neck=dict(name='DBFPN', out_channels=0)), 'a multiple of 4 is wanted'),
    'channels as text': (small(Neck=dict(name='DBFPN', out_channels='96')), "a multiple of 4 is wanted, a quarter for each map, not '96'"),
    'mode': (small(Neck=dict(name='LKPAN', out_channels=16, mode='huge')), "M.S.Neck: no mode 'huge'; there are: large, lite"),
    'mode is a number': (small(Neck=dict(name='LKPAN', out_channels=16, mode=9)), "M.S.Neck: no mode 9"),
    'head': (small(Head=dict(name='PFHeadLocal')), "M.S.Head: no head 'PFHeadLocal'"),
    'head argument': (small(Head=dict(name='DBHead', kernel=[3, 2, 2])), "M.S.Head: no argument of DBHead 'kernel'; did you mean 'kernel_list'?"),
    'head given': (small(Head=dict(name='DBHead', in_channels=16)), "no argument of DBHead 'in_channels'"),
    'two kernels': (small(Head=dict(name='DBHead', kernel_list=[3, 2])), 'M.S.Head: kernel_list: an odd number, 2 and 2 are wanted'),
    'even kernel': (small(Head=dict(name='DBHead', kernel_list=[4, 2, 2])), 'M.S.Head: kernel_list'),
    'wrong enlargement': (small(Head=dict(name='DBHead', kernel_list=[3, 3, 2])), 'M.S.Head: kernel_list'),
    'one kernel': (small(Head=dict(name='DBHead', kernel_list=3)), 'M.S.Head: kernel_list'),
    'k': (small(Head=dict(name='DBHead', k='steep')), 'M.S.Head: DBHead cannot be made of'),
}

@pytest.mark.parametrize('what', WRONG)
def test_wrong_arch(what):
    arch,contains = WRONG[what]
    with pytest.raises(UserError) as e: build_det(arch, 'M.S')
    assert contains in str(e.value) and '\n' not in str(e.value) and str(e.value).startswith('M.S')

# Backbones that are not ours

class Mine(nn.Module):
    def __init__(self, width=4, first=4):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, width, first, first), *[nn.Conv2d(width, width, 2, 2) for _ in range(3)]])
        self.out_channels = [width]*4
    def forward(self, x): return [x := c(x) for c in self.convs]

class One(nn.Module): out_channels = 16

@pytest.fixture
def mine(monkeypatch):
    m = types.ModuleType('my_nets')
    m.Mine,m.One,m.run = Mine,One,lambda: pytest.fail('called')
    monkeypatch.setitem(sys.modules, 'my_nets', m)

def test_own_backbone(mine):
    net = build_det(backbone('my_nets.Mine', width=8))
    assert net(picture())['maps'].shape==(2, 3, 64, 96) and net.backbone.out_channels==[8]*4

def test_own_backbone_at_other_strides(mine):
    with pytest.raises(UserError, match=r'maps are \[\(32, 48\), .* strides 4, 8, 16 and 32: \[\(16, 24\)'): build_det(backbone('my_nets.Mine', first=2))(picture())

def test_timm():
    pytest.importorskip('timm')
    net = build_det(backbone('timm.resnet18', pretrained=False))
    assert net.backbone.out_channels==[64, 128, 256, 512] and net(picture())['maps'].shape==(2, 3, 64, 96)
    net(picture())['maps'].sum().backward()
    assert net.backbone.body.conv1.weight.grad is not None
    assert build_det(backbone('timm.mobilenetv3_small_100', in_channels=1)).eval()(picture()[:,:1])['maps'].shape==(2, 1, 64, 96)

@pytest.mark.parametrize('name,kwargs,contains', [
    ('my_nets.Mime', {}, "no class in my_nets 'Mime'; did you mean 'Mine'"),
    ('no_such_nets.Mine', {}, "B: no backbone 'no_such_nets.Mine'"),
    ('.Mine', {}, "B: no backbone '.Mine'"),
    ('my_nets.One', {}, 'B: my_nets.One must say in `out_channels`'),
    ('my_nets.run', {}, 'B: my_nets.run is no class of networks'),
    ('os.system', dict(command='false'), 'B: os.system is no class of networks'),
    ('my_nets.Mine', dict(wide=4), "B: no argument of Mine 'wide'; did you mean 'width'?"),
    ('timm.resnet81', {}, "B: no network in timm 'resnet81'; did you mean"),
    ('timm.resnet18', dict(out_indices=(0, 1)), 'B: timm.resnet18 must say in `out_channels`'),
    ('timm.resnet18', dict(no_such_thing=1), 'B: TimmMaps cannot be made of'),
    ('timm.vit_tiny_patch16_224', {}, 'no map for every 4 pixels'),
])
def test_wrong_backbone(mine, name, kwargs, contains):
    if name.startswith('timm'): pytest.importorskip('timm')
    with pytest.raises(UserError) as e: other_backbone(name, 'B', **kwargs)
    assert contains in str(e.value) and '\n' not in str(e.value)

def test_timm_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(UserError, match='pip install timm'): other_backbone('timm.resnet18')
