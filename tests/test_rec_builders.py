"The builders of distillbook.rec.nets, neck and backbone: what they say to whoever mistyped. The registry of distillbook.config takes their place"
import copy, sys, types
import pytest, torch
from torch import nn

from distillbook.core import UserError
from distillbook.rec.backbone import *
from distillbook.rec.neck import *
from distillbook.rec.nets import *

CHINESE,DIGITS = dict(CTCLabelDecode=6625, SARLabelDecode=6627),dict(CTCLabelDecode=37, SARLabelDecode=39)

def v3(**kwargs):
    "One net of ch_PP-OCRv3_rec_distillation.yml, release 2.10"
    return dict(pretrained=None, freeze_params=False, return_all_feats=True, model_type='rec', algorithm='SVTR_LCNet', Transform=None,
        Backbone=dict(name='MobileNetV1Enhance', scale=0.5, last_conv_stride=[1, 2], last_pool_type='avg', last_pool_kernel_size=[2, 2]),
        Head=dict(name='MultiHead', head_list=[
            dict(CTCHead=dict(Neck=dict(name='svtr', dims=64, depth=2, hidden_dims=120, use_guide=True), Head=dict(fc_decay=1e-5))),
            dict(SARHead=dict(enc_dim=512, max_text_length=25))])) | kwargs

def small(**kwargs):
    "The same, small enough for many tests; golden/tiny_distill.pdparams holds the weights of two"
    return v3(Backbone=dict(v3()['Backbone'], scale=0.0625), Head=dict(name='MultiHead', head_list=[
        dict(CTCHead=dict(Neck=dict(name='svtr', dims=8, depth=1, hidden_dims=16, use_guide=True, num_heads=4, drop_rate=0., attn_drop_rate=0.), Head=dict(fc_decay=1e-5))),
        dict(SARHead=dict(enc_dim=16, d_k=12, max_text_length=25, enc_drop_rnn=0., pred_dropout=0.))])) | kwargs

def v2(**kwargs):
    "One net of ch_PP-OCRv2_rec_distillation.yml"
    return v3(algorithm='CRNN', Backbone=dict(name='MobileNetV1Enhance', scale=0.5), Neck=dict(name='SequenceEncoder', encoder_type='rnn', hidden_size=64),
        Head=dict(name='CTCHead', mid_channels=96, fc_decay=2e-5)) | kwargs

def test_arch_is_left_as_it_was():
    for arch in (v3(), v2()):
        before = copy.deepcopy(arch)
        build_rec(arch, CHINESE)
        assert arch==before

def test_2_6_has_no_kernel_size():
    backbone = v3()['Backbone']
    del backbone['last_pool_kernel_size']
    assert build_rec(v3(Backbone=backbone, algorithm='SVTR'), CHINESE).backbone.pool.kernel_size==(3, 2)

def heads(*l): return dict(name='MultiHead', head_list=list(l))
NECK = dict(name='svtr')
WRONG = {
    'key': (v3(Bakbone=1), "M.S: no key 'Bakbone'; did you mean 'Backbone'?"),
    'transform': (v3(Transform=dict(name='TPS')), 'M.S.Transform'),
    'no head': (v3(Head=None), 'M.S: there is no Head'),
    'no name': (v3(Backbone=dict(scale=0.5)), "M.S.Backbone: wants a 'name'"),
    'backbone': (v3(Backbone=dict(name='MobileNetV1Enhanced')), "M.S.Backbone: no backbone 'MobileNetV1Enhanced'; did you mean 'MobileNetV1Enhance'?"),
    'other backbone': (v3(Backbone=dict(name='PPLCNetV3')), "M.S.Backbone: no backbone 'PPLCNetV3'; there are: MobileNetV1Enhance, timm.NAME"),
    'argument': (v3(Backbone=dict(name='MobileNetV1Enhance', scales=1)), "M.S.Backbone: no argument of MobileNetV1Enhance 'scales'; did you mean 'scale'?"),
    'value': (v3(Backbone=dict(name='MobileNetV1Enhance', scale='half')), 'M.S.Backbone: MobileNetV1Enhance cannot be made of'),
    'pool': (v3(Backbone=dict(name='MobileNetV1Enhance', last_pool_type='average')), "M.S.Backbone: no last_pool_type 'average'"),
    'neck': (v2(Neck=dict(name='SequenceEncode', encoder_type='rnn')), "M.S.Neck: no neck 'SequenceEncode'; did you mean 'SequenceEncoder'?"),
    'encoder': (v2(Neck=dict(name='SequenceEncoder', encoder_type='svtr2')), "M.S.Neck: no encoder_type 'svtr2'; did you mean 'svtr'?"),
    'no encoder': (v2(Neck=dict(name='SequenceEncoder')), "M.S.Neck: wants a 'encoder_type'"),
    'heads': (v2(Neck=dict(name='SequenceEncoder', encoder_type='svtr', num_heads=7)), 'M.S.Neck: 7 heads do not divide 120 channels'),
    'encoder argument': (v2(Neck=dict(name='SequenceEncoder', encoder_type='rnn', hidden=4)), "did you mean 'hidden_size'?"),
    'encoder value': (v2(Neck=dict(name='SequenceEncoder', encoder_type='rnn', hidden_size=0)), 'M.S.Neck'),
    'reshape argument': (v2(Neck=dict(name='SequenceEncoder', encoder_type='reshape', hidden_size=4)), "takes no arguments"),
    'head': (v2(Head=dict(name='CTCHed')), "M.S.Head: no head 'CTCHed'; did you mean 'CTCHead'?"),
    'head argument': (v2(Head=dict(name='CTCHead', fc_decai=1)), "did you mean 'fc_decay'?"),
    'head given': (v2(Head=dict(name='CTCHead', in_channels=1)), "no argument of CTCHead 'in_channels'"),
    'list': (v3(Head=dict(name='MultiHead', head_list='CTCHead')), 'M.S.Head.head_list: wants a list of heads'),
    'two in one': (v3(Head=heads(dict(CTCHead=dict(Neck=NECK), SARHead={}))), 'M.S.Head.head_list: wants a list of heads'),
    'multi argument': (v3(Head=dict(heads(), use_pool=True)), "no argument of MultiHead 'use_pool'"),
    'no ctc': (v3(Head=heads(dict(SARHead={}))), 'there is no CTCHead among SARHead'),
    'nrtr': (v3(Head=heads(dict(CTCHead=dict(Neck=NECK)), dict(NRTRHead={}))), "M.S.Head.head_list: no head 'NRTRHead'; did you mean 'SARHead'"),
    'ctc key': (v3(Head=heads(dict(CTCHead=dict(Nekc=NECK)))), "M.S.Head.head_list.0.CTCHead: no key 'Nekc'; did you mean 'Neck'?"),
    'ctc neck': (v3(Head=heads(dict(CTCHead=dict(Neck=dict(name='svtr', dim=1))))), "M.S.Head.head_list.0.CTCHead.Neck: no argument of EncoderWithSVTR 'dim'; did you mean 'dims'?"),
    'sar argument': (v3(Head=heads(dict(CTCHead=dict(Neck=NECK)), dict(SARHead=dict(enc_dims=1)))), "M.S.Head.head_list.1.SARHead: no argument of SARHead 'enc_dims'; did you mean 'enc_dim'?"),
}

@pytest.mark.parametrize('what', WRONG)
def test_wrong_arch(what):
    arch,contains = WRONG[what]
    with pytest.raises(UserError) as e: build_rec(arch, DIGITS, 'M.S')
    assert contains in str(e.value) and '\n' not in str(e.value) and str(e.value).startswith('M.S')

def test_classes_that_are_not_known():
    with pytest.raises(UserError, match='SARHead wants the number of classes of SARLabelDecode'): build_rec(v3(), dict(CTCLabelDecode=37))

def test_heads_without_sections():
    "A head may have nothing beneath it, and CTCHead no Head"
    net = build_rec(small(Head=heads(dict(CTCHead=dict(Neck=NECK)))), DIGITS)
    assert list(net(torch.randn(2, 3, 48, 64))['head_out'])==['ctc', 'ctc_neck'] and net.head.ctc_head.fc.own_l2==4e-4

class Mine(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv,self.out_channels = nn.Conv2d(3, width, (48, 8), (48, 8)),width
    def forward(self, x): return self.conv(x)

class Mute(nn.Module): "Has no `out_channels`"

@pytest.fixture
def mine(monkeypatch):
    m = types.ModuleType('my_nets')
    m.Mine,m.Mute,m.run = Mine,Mute,lambda: pytest.fail('called')
    monkeypatch.setitem(sys.modules, 'my_nets', m)

def test_own_backbone(mine):
    net = build_rec(v2(Backbone=dict(name='my_nets.Mine', width=4)), DIGITS)
    assert net(torch.randn(2, 3, 48, 64))['head_out'].shape==(2, 8, 37) and net.backbone.out_channels==4

@pytest.mark.parametrize('name,kwargs,contains', [
    ('my_nets.Mime', {}, "no class in my_nets 'Mime'; did you mean 'Mine'"),
    ('no_such_nets.Mine', {}, "B: no backbone 'no_such_nets.Mine'"),
    ('.Mine', {}, "B: no backbone '.Mine'"),
    ('my_nets.Mute', {}, 'B: my_nets.Mute must say in `out_channels`'),
    ('my_nets.run', {}, 'B: my_nets.run is no class of networks'),
    ('os.system', dict(command='false'), 'B: os.system is no class of networks'),
    ('my_nets.Mine', dict(wide=4), "B: no argument of Mine 'wide'; did you mean 'width'?"),
    ('timm.resnet81', {}, "B: no network in timm 'resnet81'; did you mean"),
    ('timm.resnet18', dict(out_indices=(9,)), 'B: TimmBackbone cannot be made of'),
    ('timm.resnet18', dict(no_such_thing=1), 'B: TimmBackbone cannot be made of'),
    ('timm.vit_tiny_patch16_224', {}, 'choose one by out_indices'),
])
def test_wrong_backbone(mine, name, kwargs, contains):
    with pytest.raises(UserError) as e: other_backbone(name, 'B', **kwargs)
    assert contains in str(e.value) and '\n' not in str(e.value)
