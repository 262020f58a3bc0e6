"Necks, head and whole detectors of distillbook.det against PaddleOCR's own numbers (golden/README.md says how they were made)"
import copy, json, sys
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn

from distillbook.core import UserError
from distillbook.det.backbone import BACKBONES
from distillbook.det.neck import *
from distillbook.det.nets import *
from distillbook.layers import paddle_batchnorm
from distillbook.nets import Nets
from weights_formula import fill

GOLDEN = Path(__file__).parent/'golden'
ALIAS = {'_mean': 'running_mean', '_variance': 'running_var'}
SMALL,FULL = 'modules_small_det.npz','modules_det_necks_full.npz'
IN = (4, 6, 8, 10)

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

def ours(name):
    "PaddleOCR's name of a parameter or buffer -> the name in our state_dict"
    head,_,leaf = name.rpartition('.')
    return f'{head}.{ALIAS.get(leaf, leaf)}'

def entries(net): return {k: v for k,v in net.state_dict().items() if not k.endswith('num_batches_tracked')}

class Case:
    "One golden case: inputs, output, and a net with the weights that gave it"
    def __init__(self, file, name):
        self.z,self.name = np.load(GOLDEN/file),name
        self.meta = json.loads(str(self.z[f'{name}|meta']))
        self.xs = [torch.from_numpy(self.z[k]) for k in sorted(self.z.files) if k.startswith(f'{name}|in|')]
        self.want, = [self.z[k] for k in self.z.files if k.startswith(f'{name}|out|')]
    def net(self):
        m = self.meta
        net = (NECKS | dict(DBHead=DBHead))[m['cls']](m['in_channels'], **m['kwargs'])
        assert {k: list(v.shape) for k,v in entries(net).items()}=={ours(k): s for k,s in m['shapes'].items()}
        assert list(entries(net))==[ours(k) for k in m['shapes']]
        net.load_state_dict({ours(k): torch.from_numpy(fill(k, s)) for k,s in m['shapes'].items()}, strict=False)
        return paddle_batchnorm(net).train(m['mode']=='train')
    def __call__(self, net, xs): return net(xs[0])['maps'] if self.meta['cls']=='DBHead' else net(xs)

EVAL = [(SMALL, 'DBHead_k322/eval'), (SMALL, 'LKPAN_lite/eval'), (FULL, 'LKPAN_256/eval'), (FULL, 'DBHead_256_k722/eval')]
TRAIN = [(SMALL, f'{o}/train') for o in ('DBHead_k322', 'DBHead_k722', 'DBFPN_small', 'RSEFPN_small', 'RSEFPN_small_noshortcut', 'LKPAN_small', 'LKPAN_lite')] + [
    (FULL, 'RSEFPN_96/train'), (FULL, 'DBHead_256_k722/train')]

def close(a, b, rel=1e-5): np.testing.assert_allclose(a, b, rtol=0, atol=rel*np.abs(b).max())

@pytest.mark.parametrize('file,name', EVAL)
def test_eval(file, name):
    c = Case(file, name)
    with torch.no_grad(): close(c(c.net(), c.xs).numpy(), c.want)

def probe(y):
    "The scalar whose gradients the goldens hold"
    return (y * torch.arange(y.numel(), dtype=torch.double).mul(0.37).cos().to(y.dtype).reshape(y.shape)).sum()

@pytest.mark.parametrize('file,name', TRAIN)
def test_train(file, name):
    c = Case(file, name)
    net,xs = c.net(),[x.requires_grad_() for x in c.xs]
    y = c(net, xs)
    close(y.detach().numpy(), c.want, 5e-5 if 'k722' in name else 1e-5)  # the binary map: k=50 times the rounding of sums of 12544 products
    probe(y).backward()
    for i,x in enumerate(xs): close(x.grad.numpy(), c.z[f'{name}|grad|x{i}'], 5e-5 if 'k722' in name else 1e-5)
    big = max(c.meta['gradnorm'].values())
    assert set(c.meta['gradnorm'])=={k for k,_ in net.named_parameters()}
    for k,want in c.meta['gradnorm'].items():
        assert abs(net.get_parameter(k).grad.norm().item()-want) <= 1e-5*(want+big), k
    after = [k.split('|')[-1] for k in c.z.files if k.startswith(f'{name}|bn_after|')]
    assert bool(after)==any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    for k in after: close(entries(net)[ours(k)].numpy(), c.z[f'{name}|bn_after|{k}'])

# Whole nets of the unmodified configs

def student(**kwargs):
    "The student of ch_PP-OCRv3_det_cml.yml"
    return dict(pretrained=None, model_type='det', algorithm='DB', Transform=None, Backbone=dict(name='MobileNetV3', scale=0.5, model_name='large', disable_se=True),
        Neck=dict(name='RSEFPN', out_channels=96, shortcut=True), Head=dict(name='DBHead', k=50)) | kwargs

def teacher(**kwargs):
    "Its teacher; the nets of ch_PP-OCRv3_det_dml.yml are the same"
    return dict(freeze_params=True, return_all_feats=False, model_type='det', algorithm='DB', Backbone=dict(name='ResNet_vd', in_channels=3, layers=50),
        Neck=dict(name='LKPAN', out_channels=256), Head=dict(name='DBHead', kernel_list=[7, 2, 2], k=50)) | kwargs

def made(arch):
    "The detector of such a section, every part made by its class"
    kinds = BACKBONES | NECKS | dict(DBHead=DBHead)
    def part(key, *channels):
        settings = dict(arch[key])
        return kinds[settings.pop('name')](*channels, **settings)
    backbone = part('Backbone')
    neck = part('Neck', backbone.out_channels)
    return DetModel(backbone, neck, part('Head', neck.out_channels), arch.get('return_all_feats', False))

def small(**kwargs): return student(Backbone=dict(name='PlainBackbone', channels=[4, 4, 8, 8]), Neck=dict(name='DBFPN', out_channels=16)) | kwargs

def test_params_det():
    "Names, order and shapes of the whole distillation model, and what trains"
    rows = json.loads((GOLDEN/'params_det_cml.json').read_text())['rows']
    nets = Nets(dict(Student=made(student()), Student2=made(student()), Teacher=made(teacher())), frozen=['Teacher'])
    assert [(k, list(v.shape)) for k,v in entries(nets).items()]==[(ours(k), s) for k,s,*_ in rows]
    assert {k for k,p in nets.named_parameters() if p.requires_grad}=={ours(k) for k,_,_,trainable,_ in rows if trainable}
    assert not [k for k,*_,l2 in rows if l2 is not None] and not [k for k,m in nets.named_modules() if hasattr(m, 'own_l2')]

@pytest.mark.parametrize('arch,n', [
    (student(), 603_418), (teacher(), 32_895_970),
    (student(Neck=dict(name='DBFPN', out_channels=96)), 583_234),                                                               # PP-OCRv2's student
    (teacher(Backbone=dict(name='ResNet_vd', layers=18), Neck=dict(name='DBFPN', out_channels=256), Head=dict(name='DBHead', k=50)), 12_364_386),  # its teacher
    (teacher(Backbone=dict(name='ResNet', in_channels=3, layers=50), pretrained='./best_accuracy', Transform=None), 32_876_738)])  # the guide's
def test_configs(arch, n):
    before = copy.deepcopy(arch)
    assert sum(p.numel() for p in made(arch).parameters())==n and arch==before

def test_released_nets_are_parts_of_these():
    "`ppocrv3_det` and `server_det` have the names of PaddleOCR's nets without the threshold branch"
    server = teacher(Backbone=dict(name='ResNet_vd', layers=18), Neck=dict(name='DBFPN', out_channels=256), Head=dict(name='DBHead'))
    for net,arch in ((ppocrv3_det(), student()), (server_det(), server)):
        whole = made(arch).state_dict()
        assert list(net.state_dict())==[k for k in whole if not k.startswith('head.thresh.')]
        assert all(v.shape==whole[k].shape for k,v in net.state_dict().items())

# What comes out, and when

def picture(n=2, h=64, w=96): return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('make', [lambda: made(student()), lambda: made(small()), plain_det], ids=['student', 'small', 'plain'])
def test_maps(make):
    net,x = make(),picture()
    maps = net(x)
    assert list(maps)==['maps'] and maps['maps'].shape==(2, 3, 64, 96)
    p,t,b = maps['maps'].detach().unbind(1)
    assert all(0 <= m.min() and m.max() <= 1 for m in (p, t, b))
    torch.testing.assert_close(b, 1/(1+torch.exp(-50*(p-t))), atol=1e-5, rtol=0)
    net.eval()
    with torch.no_grad(): one,three = net(x)['maps'],net(x, whole=True)['maps']
    assert one.shape==(2, 1, 64, 96) and three.shape==(2, 3, 64, 96) and torch.equal(one[:,0], three[:,0])
    assert net.train()(x, whole=False)['maps'].shape==(2, 1, 64, 96)

def test_k():
    head = DBHead(8, k=3)
    p,t,b = head(torch.randn(1, 8, 4, 4))['maps'].unbind(1)
    torch.testing.assert_close(b, torch.sigmoid(3*(p-t)))

def test_without_thresh():
    head = DBHead(8, thresh=False)
    assert not [k for k in head.state_dict() if 'thresh' in k]
    for mode in (True, False):
        for whole in (True, False, None): assert head.train(mode)(torch.randn(2, 8, 4, 4), whole=whole)['maps'].shape==(2, 1, 16, 16)

def test_evaluation_leaves_the_threshold_branch_out():
    head,ran = DBHead(8),[]
    head.thresh.register_forward_hook(lambda *_: ran.append(1))
    head.eval()(torch.randn(1, 8, 4, 4))
    assert not ran
    head.train()(torch.randn(1, 8, 4, 4))
    assert ran

def test_frozen_teacher_gives_all_maps_in_training_and_stands_still():
    nets = Nets(dict(Student=made(small()), Teacher=made(small())), frozen=['Teacher'])
    before,x = copy.deepcopy(nets['Teacher'].state_dict()),picture()
    outs = nets.train()(x)
    assert outs['Teacher']['maps'].shape==outs['Student']['maps'].shape==(2, 3, 64, 96) and not outs['Teacher']['maps'].requires_grad
    assert all(torch.equal(v, before[k]) for k,v in nets['Teacher'].state_dict().items())
    assert nets.eval()(x)['Teacher']['maps'].shape==(2, 1, 64, 96)

def test_all_feats():
    net,x = made(small(return_all_feats=True)),picture()
    out = net(x)
    assert list(out)==['backbone_out', 'neck_out', 'maps'] and out['maps'].shape==(2, 3, 64, 96) and out['neck_out'].shape==(2, 16, 16, 24)
    assert [tuple(m.shape[1:]) for m in out['backbone_out']]==[(4, 16, 24), (4, 8, 12), (8, 4, 6), (8, 2, 3)]
    assert list(net.eval()(x))==['maps'] and list(net(x, whole=True))==['backbone_out', 'neck_out', 'maps']

@pytest.mark.parametrize('arch', [student(), small(Neck=dict(name='LKPAN', out_channels=16)), small(Neck=dict(name='LKPAN', out_channels=16, mode='Lite')),
    small(Neck=dict(name='RSEFPN', out_channels=16, shortcut=False))], ids=['student', 'large', 'lite', 'gates alone'])
def test_a_step_reaches_every_parameter(arch):
    net = made(arch)
    net(picture())['maps'].square().sum().backward()
    assert not [k for k,p in net.named_parameters() if p.grad is None]

@pytest.mark.parametrize('h,w,better', [(100, 64, '128 x 64'), (64, 33, '64 x 64'), (31, 1, '32 x 32'), (0, 32, '32 x 32')])
def test_sides_that_are_no_multiples_of_32(h, w, better):
    with pytest.raises(UserError, match=f'multiples of 32, not {h} x {w}: {better} would do'): made(small())(torch.zeros(1, 3, h, w))

@pytest.mark.parametrize('h,w', [(32, 32), (32, 160), (96, 32)])
def test_smallest_pictures(h, w):
    with torch.no_grad(): assert made(small()).eval()(torch.zeros(1, 3, h, w))['maps'].shape==(1, 1, h, w)

# Necks

def maps(n=1, h=8, w=16): return [torch.randn(n, c, 4*h//s, 4*w//s) for c,s in zip(IN, (4, 8, 16, 32))]

@pytest.mark.parametrize('neck', [DBFPN(IN, 16), RSEFPN(IN, 16), RSEFPN(IN, 16, shortcut=False), LKPAN(IN, 16), LKPAN(IN, 16, 'lite')])
def test_necks(neck):
    assert neck.out_channels==16 and neck(maps(2, 16, 24)).shape==(2, 16, 16, 24)
    xs = maps(1, 8, 8)
    assert neck.eval()(tuple(xs)).equal(neck(xs))

def test_top_down_and_stack_by_hand():
    xs = [torch.full((1, 1, 8//2**i, 8//2**i), 10.**i) for i in range(4)]
    assert [m.unique().tolist() for m in top_down(xs)]==[[1111], [1110], [1100], [1000]] and [m.shape for m in top_down(xs)]==[m.shape for m in xs]
    xs[3][:] = torch.tensor([7.])
    xs[2][0,0] = torch.tensor([[1., 2.], [3., 4.]])
    y = stack_maps(xs)
    assert y.shape==(1, 4, 8, 8) and y[0,0].unique().tolist()==[7] and y[0,3].unique().tolist()==[1]
    assert torch.equal(y[0,1], torch.tensor([[1., 2.], [3., 4.]]).repeat_interleave(4, 0).repeat_interleave(4, 1))

def test_lkpan_goes_down_and_up():
    "A point of the finest map reaches every part of what comes out, and so does one of the coarsest"
    neck = LKPAN(IN, 16)
    for i in (0, 3):
        xs = [m.requires_grad_() for m in maps(1, 16, 16)]
        for q in range(4):
            g, = torch.autograd.grad(neck(xs)[0,4*q:4*q+4].square().sum(), xs[i], retain_graph=True)
            assert g.abs().sum() > 0
    g = torch.autograd.grad(DBFPN(IN, 16)(xs)[:,:4].sum(), xs[0], allow_unused=True)
    assert g==(None,) or not g[0].any()

# Initial weights

def uniform(t, limit): assert 0.9*limit < t.abs().max() <= limit and abs(t.std().item()*3**0.5/limit - 1) < 0.15

@pytest.mark.parametrize('neck', [DBFPN(IN, 128), RSEFPN(IN, 128), LKPAN(IN, 64)])
def test_initial_weights_of_necks(neck):
    "PaddleOCR's KaimingUniform; the gates' convolutions are normal"
    for k,m in neck.named_modules():
        if not isinstance(m, nn.Conv2d) or m.weight.numel()<500: continue
        fan = m.weight[0].numel()
        if 'se_block' in k: assert abs(m.weight.std().item()/(2/fan)**0.5 - 1) < 0.15 and not m.bias.any()
        else: uniform(m.weight, (6/fan)**0.5)

def test_initial_weights_of_head():
    head = DBHead(256, kernel_list=[7, 2, 2])
    for b in (head.binarize, head.thresh):
        assert abs(b.conv1.weight.std().item()/(2/(256*49))**0.5 - 1) < 0.05 and b.conv1.bias is None
        uniform(b.conv2.weight, (6/(64*4))**0.5)
        uniform(b.conv2.bias, 64**-0.5)
        for bn in (b.conv_bn1, b.conv_bn2): assert (bn.weight==1).all() and (bn.bias==1e-4).all()
    assert not torch.equal(head.binarize.conv1.weight, head.thresh.conv1.weight)

def test_initial_weights_of_lite():
    "Paddle counts the channels that a depthwise convolution does not read"
    m = LKPAN(IN, 64, 'lite').inp_conv[0]
    assert abs(m.conv1.weight.std().item()/(2/(64*81))**0.5 - 1) < 0.1 and abs(m.conv2.weight.std().item()/(2/64)**0.5 - 1) < 0.1

# What a stranger may do wrong

@pytest.mark.parametrize('ns', [(4, 6, 8), 16, None])
def test_a_neck_wants_four_maps(ns):
    with pytest.raises(UserError, match='reads four maps'): DBFPN(ns, 16)

@pytest.mark.parametrize('n', [98, 0, '96', 2, None])
@pytest.mark.parametrize('neck', [DBFPN, RSEFPN, LKPAN])
def test_a_neck_gives_a_quarter_from_each_map(neck, n):
    with pytest.raises(UserError, match='out_channels: a multiple of 4 is wanted'): neck(IN, n)

@pytest.mark.parametrize('mode', ['huge', 9, None])
def test_modes_of_lkpan(mode):
    with pytest.raises(UserError, match=f'no mode {mode!r}; there are: large, lite'): LKPAN(IN, 16, mode)

@pytest.mark.parametrize('kernels', [[3, 2], [4, 2, 2], [3, 3, 2], 3, None, [3, 2, '2']])
def test_kernels_of_the_head(kernels):
    with pytest.raises(UserError, match='kernel_list: an odd number, 2 and 2 are wanted'): DBHead(16, kernel_list=kernels)

# Backbones that are not ours

class Mine(nn.Module):
    def __init__(self, width=4, first=4):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, width, first, first), *[nn.Conv2d(width, width, 2, 2) for _ in range(3)]])
        self.out_channels = [width]*4
    def forward(self, x): return [x := c(x) for c in self.convs]

def with_own(backbone): return DetModel(backbone, DBFPN(backbone.out_channels, 16), DBHead(16))

def test_own_backbone():
    net = with_own(Mine(8))
    assert net(picture())['maps'].shape==(2, 3, 64, 96) and net.backbone.out_channels==[8]*4

def test_own_backbone_at_other_strides():
    with pytest.raises(UserError, match=r'maps are \[\(32, 48\), .* strides 4, 8, 16 and 32: \[\(16, 24\)'): with_own(Mine(first=2))(picture())

def test_timm():
    pytest.importorskip('timm')
    net = with_own(TimmMaps('resnet18', pretrained=False))
    assert net.backbone.out_channels==[64, 128, 256, 512] and net(picture())['maps'].shape==(2, 3, 64, 96)
    net(picture())['maps'].sum().backward()
    assert net.backbone.body.conv1.weight.grad is not None
    assert with_own(TimmMaps('mobilenetv3_small_100', in_channels=1)).eval()(picture()[:,:1])['maps'].shape==(2, 1, 64, 96)

@pytest.mark.parametrize('name,contains', [('resnet81', "no network in timm 'resnet81'; did you mean"), ('vit_tiny_patch16_224', 'no map for every 4 pixels')])
def test_wrong_timm(name, contains):
    pytest.importorskip('timm')
    with pytest.raises(UserError, match=contains): TimmMaps(name)

def test_timm_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(UserError, match='pip install timm'): TimmMaps('resnet18')
