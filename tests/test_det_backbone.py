"The networks of distillbook.det.backbone against PaddleOCR's own numbers (golden/README.md says how they were made)"
import json, math
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn

from distillbook.core import UserError
from distillbook.det.backbone import *
from distillbook.config.registry import build
from distillbook.config.values import Config, Section
from distillbook.layers import paddle_batchnorm
from distillbook.use.weights import load_paddle
from weights_formula import fill

GOLDEN = Path(__file__).parent/'golden'
ALIAS = {'_mean': 'running_mean', '_variance': 'running_var'}

def ours(name):
    "PaddleOCR's name of a parameter or buffer -> the name in our state_dict"
    head,_,leaf = name.rpartition('.')
    return f'{head}.{ALIAS.get(leaf, leaf)}'

def entries(net): return {k: list(v.shape) for k,v in net.state_dict().items() if not k.endswith('num_batches_tracked')}

def close(a, b, rel=1e-5): np.testing.assert_allclose(a, b, rtol=0, atol=rel*np.abs(b).max())

class Case:
    "One golden case: the page, a net with the weights that were used, and every 7th number of its maps and of the page's gradient"
    def __init__(self, name):
        self.z,self.name = np.load(GOLDEN/'modules_det_backbones.npz'),name
        self.meta = json.loads(str(self.z[f'{name}|meta']))
        self.x = torch.from_numpy(self.z['odd' if 'odd' in name else 'x'])
    def get(self, key): return self.z[f'{self.name}|{key}']
    def plain(self): return BACKBONES[self.meta['cls']](**self.meta['kwargs'])
    def net(self):
        net = load_paddle(self.plain(), {k: fill(k, s) for k,s in self.meta['shapes'].items()})
        return paddle_batchnorm(net).train(self.meta['mode']=='train')
    def check(self, maps, rel):
        assert {f'y{i}': list(m.shape) for i,m in enumerate(maps)}==self.meta['out_shapes']
        found = [i for i in range(4) if f'{self.name}|out|y{i}' in self.z.files]
        assert 3 in found
        for i in found: close(maps[i].detach().flatten()[::7].numpy(), self.get(f'out|y{i}'), rel[i])

CASES = [k.removesuffix('|meta') for k in np.load(GOLDEN/'modules_det_backbones.npz').files if k.endswith('|meta')]
EVAL,TRAIN = ([c for c in CASES if c.endswith(o)] for o in ('/eval', '/train'))

def test_all_cases(): assert (len(EVAL),len(TRAIN))==(8, 2)

@pytest.mark.parametrize('name', EVAL)
def test_eval(name):
    c = Case(name)
    with torch.no_grad(): c.check(c.net()(c.x), [1e-5]*4)

# A batch norm over the 4 values of a channel of the coarsest map (one page of 64x64) divides by what may be nearly nothing: there float32
# is good for 5e-4 only. `test_train_is_right` shows that this is rounding
ROUGH = {'MobileNetV3_large_.5_disable_se=True/train': ([1e-5, 1e-5, 2e-5, 1e-3], 2e-3), 'ResNet_vd_18/train': ([1e-5, 1e-5, 1e-5, 2e-4], 5e-4)}

def probe(maps):
    "The scalar whose gradients the goldens hold"
    return sum((y * torch.arange(y.numel(), dtype=torch.double).mul(0.37).cos().to(y.dtype).reshape(y.shape)).sum() for y in maps)

@pytest.mark.parametrize('name', TRAIN)
def test_train(name):
    c,(rel,rel_grad) = Case(name),ROUGH[name]
    net,x = c.net(),c.x.clone().requires_grad_()
    maps = net(x)
    c.check(maps, rel)
    probe(maps).backward()
    close(x.grad.flatten()[::7].numpy(), c.get('grad|x0'), rel_grad)
    big = max(c.meta['gradnorm'].values())
    assert c.meta['gradnorm'].keys()=={k for k in c.meta['shapes'] if not k.endswith(tuple(ALIAS))}
    for k,want in c.meta['gradnorm'].items():
        got = net.get_parameter(ours(k)).grad.norm().item()
        assert abs(got-want) <= rel_grad*(want + 1e-3*big), (k, got, want)
    after = [k.split('|')[-1] for k in c.z.files if k.startswith(f'{name}|bn_after|')]
    assert len(after)>=8
    for k in after: close(net.state_dict()[ours(k)].numpy(), c.get(f'bn_after|{k}'), 5e-5)

@pytest.mark.parametrize('name', TRAIN)
def test_train_is_right(name):
    "Between Paddle's float32 and float64 lies as much as between ours and float64, to a factor of 4"
    c = Case(name)
    truth = c.net().double()(c.x.double())[3].detach().flatten()[::7].numpy()
    mine = c.net()(c.x)[3].detach().flatten()[::7].numpy()
    theirs = np.abs(c.get('out|y3')-truth).max()
    assert 1e-5*np.abs(truth).max() < theirs and np.abs(mine-truth).max() < 4*theirs

@pytest.mark.parametrize('name', CASES)
def test_names_and_order(name):
    c = Case(name)
    net = c.plain()
    assert entries(net)=={ours(k): s for k,s in c.meta['shapes'].items()}
    assert list(entries(net))==[ours(k) for k in c.meta['shapes']]
    assert net.out_channels==[s[1] for s in c.meta['out_shapes'].values()]
    assert not any(hasattr(m, 'own_l2') for m in net.modules())

def test_names_of_the_cml_config():
    rows = json.loads((GOLDEN/'params_det_cml.json').read_text())['rows']
    for name,net in (('Student', MobileNetV3(scale=.5, model_name='large', disable_se=True)), ('Teacher', ResNet_vd(in_channels=3, layers=50))):
        prefix = f'{name}.backbone.'
        assert entries(net)=={ours(k.removeprefix(prefix)): s for k,s,*_ in rows if k.startswith(prefix)}

def test_names_of_the_deep_ones():
    "Caffe's names: where letters would not last, b is followed by numbers"
    names = lambda net, s: [k for k,_ in net.named_children() if k.startswith(s)]
    assert names(ResNet(layers=34), 'res4')==[f'res4{c}' for c in 'abcdef']
    assert names(ResNet(layers=101), 'res4')==['res4a', *(f'res4b{i}' for i in range(1, 23))]
    assert names(ResNet(layers=152), 'res3')==[f'res3{c}' for c in 'abcdefgh']
    assert names(ResNet_vd(layers=152), 'bb_2')==[f'bb_2_{i}' for i in range(36)]

def tiny(name): return BACKBONES[name](**dict(ResNet_vd=dict(layers=18), ResNet=dict(layers=18), MobileNetV3=dict(scale=.35), PlainBackbone=dict(channels=(4,6,8,10)))[name])

@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('size', [(64, 96), (70, 58), (33, 1), (1, 1)])
def test_any_size(name, size):
    "Every map has half the size of the one before, rounded up, whatever the page's"
    net = tiny(name).eval()
    with torch.no_grad(): maps = net(torch.randn(1, 3, *size))
    assert [tuple(m.shape) for m in maps]==[(1, c, *(math.ceil(n/s) for n in size)) for c,s in zip(net.out_channels, (4, 8, 16, 32))]

@pytest.mark.parametrize('name', BACKBONES)
def test_every_weight_matters(name):
    "Each parameter gets a gradient, from one channel in as from three"
    torch.manual_seed(0)
    net = type(tiny(name))(in_channels=1, **dict(ResNet_vd=dict(layers=18), ResNet=dict(layers=18), MobileNetV3=dict(scale=.35, model_name='small'), PlainBackbone={})[name])
    probe(net(torch.randn(2, 1, 64, 64))).backward()
    assert [k for k,p in net.named_parameters() if p.grad is None or not p.grad.abs().sum()>0]==[]

def test_pool_of_the_shortcut():
    "The mean of what is there, at an odd edge as well"
    pool = pooled_short(1, 1, 2).pool
    assert pool(torch.arange(9.).reshape(1, 1, 3, 3)).flatten().tolist()==[2, 3.5, 6.5, 8]
    assert [k for k,_ in pooled_short(1, 1, 1).named_children()]==['_conv', '_batch_norm', 'act']

def test_gate_is_the_steep_one():
    se = SE(8)
    with torch.no_grad():
        for c in (se.conv1, se.conv2): c.weight.zero_()
        se.conv2.bias.copy_(torch.tensor([-9, -2.5, -1, 0, 1, 2, 2.5, 9.]))
        assert se(torch.ones(1, 8, 2, 2))[0,:,0,0].tolist()==pytest.approx([0, 0, .3, .5, .7, .9, 1, 1])

def test_gates():
    gates = lambda net: [p for p,m in net.named_modules() if isinstance(m, SE)]
    assert gates(MobileNetV3(disable_se=True))==[] and gates(MobileNetV3(model_name='small', disable_se=True))==[]
    assert len(gates(MobileNetV3()))==8 and len(gates(MobileNetV3(model_name='small')))==9

@pytest.mark.parametrize('scale,channels', [(.35, [8, 16, 40, 336]), (.5, [16, 24, 56, 480]), (.75, [24, 32, 88, 720]), (1., [24, 40, 112, 960]), (1.25, [32, 48, 144, 1200])])
def test_scales(scale, channels): assert MobileNetV3(scale=scale).out_channels==channels

def test_initial_values_are_paddles():
    "Normal, of variance 2 / (kernel x channels in), where all channels count even if a filter reads one"
    torch.manual_seed(0)
    for net in (ResNet_vd(layers=18), ResNet(layers=18), MobileNetV3(scale=1.)):
        for path,m in net.named_modules():
            if isinstance(m, nn.Conv2d):
                std,n = (2/(m.in_channels*m.kernel_size[0]*m.kernel_size[1]))**.5,m.weight.numel()
                assert abs(m.weight.std().item()/std-1) < 5/n**.5, path
                assert abs(m.weight.mean().item()) < 5*std/n**.5, path
                assert m.bias is None or not m.bias.any()
            if isinstance(m, nn.BatchNorm2d): assert (m.weight==1).all() and not m.bias.any()

WHOLE,LIST = 'a whole number is wanted','channels: a list is wanted'
BAD = [(ResNet_vd, dict(layers=20), "no number of layers 20; there are: 18, 34"), (ResNet, dict(layers=[18]), f"layers: {WHOLE}, not [18]"),
    (ResNet, dict(layers='50'), f"layers: {WHOLE}, not '50'"), (ResNet_vd, dict(layers=None), f'layers: {WHOLE}, not None'),
    (ResNet_vd, dict(layer=18), "no key of ResNet_vd 'layer'; did you mean 'layers'?"), (ResNet_vd, dict(in_channels='3'), f"in_channels: {WHOLE}, not '3'"),
    (MobileNetV3, dict(model_name='lagre'), "no model_name 'lagre'; did you mean 'large'?"), (MobileNetV3, dict(model_name=['large']), 'model_name: text is wanted'),
    *[(MobileNetV3, dict(scale=s), 'scale: a number above 0 is wanted') for s in (0, -.5)],
    *[(MobileNetV3, dict(scale=s), 'scale: a number is wanted') for s in (math.nan, math.inf, True, 'half', None, 1e300)],
    *[(PlainBackbone, dict(channels=c), LIST) for c in (None, 16, '1234')], (PlainBackbone, dict(channels=(16, 32)), 'channels: four numbers are wanted'),
    (PlainBackbone, dict(channels=(16, 32, 'x', 64)), 'PlainBackbone cannot be made')]

@pytest.mark.parametrize('cls,kwargs,says', BAD)
def test_bad_arguments(cls, kwargs, says):
    config = Config(dict(Backbone=kwargs))
    config.path = 'my.yml'
    with pytest.raises(UserError) as e: build(cls, Section(config, 'Backbone'))
    assert str(e.value).startswith('my.yml: Backbone') and says in str(e.value) and '\n' not in str(e.value)

def test_numbers_that_yaml_leaves_as_text():
    config = Config(dict(Backbone=dict(scale='5e-1')))
    assert build(MobileNetV3, Section(config, 'Backbone')).out_channels==MobileNetV3(scale=.5).out_channels

def test_channels_of_plain_backbone():
    net = PlainBackbone(channels=[8, 8, 12, 20])
    assert net.out_channels==[8, 8, 12, 20] and [m.shape[1] for m in net(torch.randn(2, 3, 64, 64))]==net.out_channels
