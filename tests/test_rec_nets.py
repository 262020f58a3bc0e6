"The networks of distillbook.rec.backbone, neck and nets against PaddleOCR's own numbers (golden/README.md says how they were made)"
import copy, json, sys
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn

from distillbook.core import UserError
from distillbook.rec.backbone import *
from distillbook.rec.neck import *
from distillbook.rec.nets import *
from distillbook.rec.sar import SARHead
from distillbook.layers import *
from distillbook.use.released import teacher_file
from distillbook.use.weights import load_onnx, load_paddle
from weights_formula import fill

GOLDEN = Path(__file__).parent/'golden'
ALIAS = {'_mean': 'running_mean', '_variance': 'running_var'}

def ours(name):
    "PaddleOCR's name of a parameter or buffer -> the name in our state_dict"
    head,_,leaf = name.rpartition('.')
    return f'{head}.{ALIAS.get(leaf, leaf)}'

ENCODERS = dict(svtr=EncoderWithSVTR, rnn=EncoderWithRNN)

def encoder(kind, in_channels, **kwargs):
    return SequenceEncoder(out_channels=in_channels) if kind=='reshape' else SequenceEncoder(ENCODERS[kind](in_channels, **kwargs))

def multi_head(in_channels, classes, listed):
    "A `MultiHead` as PaddleOCR lists its heads"
    kw = {name: sections for h in listed for name,sections in h.items()}
    neck = dict(kw['CTCHead']['Neck'])
    neck = encoder(neck.pop('name'), in_channels, **neck)
    ctc = CTCHead(neck.out_channels, classes['CTCLabelDecode'], **kw['CTCHead'].get('Head', {}))
    others = dict(sar_head=SARHead(in_channels, classes['SARLabelDecode'], **kw['SARHead'])) if 'SARHead' in kw else {}
    return MultiHead(neck, ctc, **others)

class Case:
    "One golden case: inputs, outputs, and a net with the weights that gave them"
    def __init__(self, file, name):
        self.z,self.name = np.load(GOLDEN/file),name
        self.meta = json.loads(str(self.z[f'{name}|meta']))
        self.x = torch.from_numpy(self.z[f'{name}|in|x0'])
        self.targets = [torch.from_numpy(self.z[k]) for k in sorted(self.z.files) if k.startswith(f'{name}|in|targets')]
    def weights(self):
        if self.meta['weights']=='formula': return {k: fill(k, s) for k,s in self.meta['shapes'].items()}
        stem = self.name.split('/')[0]
        return {k: self.z[f'{stem}|w|{k}'] for k in self.meta['shapes'] if '.cell.' not in k}
    def net(self):
        m = self.meta
        if m['cls']=='MobileNetV1Enhance': net = MobileNetV1Enhance(**m['kwargs'])
        elif m['cls']=='SequenceEncoder': net = encoder(m['encoder_type'], m['in_channels'], **m['kwargs'])
        elif m['cls']=='MultiHead': net = multi_head(m['in_channels'], m['out_channels_list'], m['head_list'])
        else: net = CTCHead(m['in_channels'], m['out_channels'], **m['kwargs'])
        return paddle_batchnorm(load_paddle(net, self.weights())).train(m['mode']=='train')
    def __call__(self, net, x): return net(x, self.targets) if self.targets else net(x)
    def outs(self, y):
        "Name and value of all outputs, ours and theirs"
        found = dict(y=y) if isinstance(y, torch.Tensor) else {f'y{i}': o for i,o in enumerate(y)} if isinstance(y, tuple) else {f'y.{k}': o for k,o in y.items()}
        assert list(found)==list(self.meta['out_shapes'])
        return [(o, self.z[f'{self.name}|out|{k}']) for k,o in found.items()]

SMALL,FULL = 'modules_small_rec.npz','modules_rec_full.npz'
EVAL = [(SMALL, 'MobileNetV1Enhance_s.0625/eval'), (SMALL, 'SVTRneck_small/eval'), (SMALL, 'SVTRneck_small_noguide_k13/eval'),
    (FULL, 'MobileNetV1Enhance_s.5_pool22/eval'), (FULL, 'MobileNetV1Enhance_s.5_pool_default32/eval'),
    (FULL, 'MobileNetV1Enhance_s.5_maxpool/eval'), (FULL, 'SVTRneck_full/eval')]
HEADS_EVAL = [(SMALL, f'{o}/eval') for o in ('CTCHead', 'CTCHead_mid', 'MultiHead')]
TRAIN = [(SMALL, 'MobileNetV1Enhance_s.0625/train'), (SMALL, 'SVTRneck_small/train'), (SMALL, 'SVTRneck_small_noguide_k13/train'),
    (SMALL, 'CTCHead/train'), (SMALL, 'CTCHead_mid/train'), (SMALL, 'MultiHead/train'),
    (FULL, 'MobileNetV1Enhance_s.5_pool22/train'), (FULL, 'SVTRneck_full_nodrop/train')]

def close(a, b, rel=1e-5): np.testing.assert_allclose(a, b, rtol=0, atol=rel*np.abs(b).max())

@pytest.mark.parametrize('file,name', EVAL)
def test_eval(file, name):
    c = Case(file, name)
    with torch.no_grad(): (y,want), = c.outs(c(c.net(), c.x))
    close(y.numpy(), want)

@pytest.mark.parametrize('file,name', HEADS_EVAL)
def test_heads_give_logits_in_eval(file, name):
    "PaddleOCR's heads give probabilities in eval mode; ours give logits, of which `RecModel` takes the softmax"
    c = Case(file, name)
    net = c.net()
    with torch.no_grad():
        (y,want), = c.outs(c(net, c.x))
        close(y.softmax(-1).numpy(), want)
        close(RecModel(nn.Identity(), None, net).eval()(c.x).numpy(), want)

def probe(y):
    "The scalar whose gradients the goldens hold"
    return (y * torch.arange(y.numel(), dtype=torch.double).mul(0.37).cos().to(y.dtype).reshape(y.shape)).sum()

@pytest.mark.parametrize('file,name', TRAIN)
def test_train(file, name):
    c = Case(file, name)
    net = c.net()
    x = c.x.clone().requires_grad_()
    outs = c.outs(c(net, x))
    for y,want in outs: close(y.detach().numpy(), want)
    sum(probe(y) for y,_ in outs).backward()

    if c.meta['grad_x_none'][0]: assert x.grad is None
    else: close(x.grad.numpy(), c.z[f'{name}|grad|x0'], 3e-5 if 'Mobile' in name else 1e-5)  # 27 batch norms: Paddle's float32 is 1.3e-5 from float64, ours 2.0e-5
    big = max(c.meta['gradnorm'].values())
    for k,want in c.meta['gradnorm'].items():
        got = net.get_parameter(ours(k)).grad.norm().item()
        assert abs(got-want) <= 1e-5*want + 1e-5*big, (k, got, want)

    after = [k.split('|')[-1] for k in c.z.files if k.startswith(f'{name}|bn_after|')]
    assert bool(after) == any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    for k in after: close(net.state_dict()[ours(k)].numpy(), c.z[f'{name}|bn_after|{k}'])

@pytest.mark.parametrize('file,name', EVAL+TRAIN+HEADS_EVAL)
def test_own_regularizers_of_modules(file, name):
    c = Case(file, name)
    assert own_l2(c.net())=={ours(k): v for k,v in c.meta['regularizer_coeff'].items() if v is not None}

def own_l2(net):
    "Parameters whose module has a decay of its own, with that"
    return {f'{path}.{k}' if path else k: m.own_l2 for path,m in net.named_modules() if hasattr(m, 'own_l2') for k,_ in m.named_parameters(recurse=False)}

# The whole model of the unmodified distillation config

SCALE = dict(last_conv_stride=[1, 2], last_pool_type='avg', last_pool_kernel_size=[2, 2])
HEADS = [dict(CTCHead=dict(Neck=dict(name='svtr', dims=64, depth=2, hidden_dims=120, use_guide=True), Head=dict(fc_decay=1e-5))),
    dict(SARHead=dict(enc_dim=512, max_text_length=25))]
SMALL_HEADS = [dict(CTCHead=dict(Neck=dict(name='svtr', dims=8, depth=1, hidden_dims=16, use_guide=True, num_heads=4, drop_rate=0., attn_drop_rate=0.), Head=dict(fc_decay=1e-5))),
    dict(SARHead=dict(enc_dim=16, d_k=12, max_text_length=25, enc_drop_rnn=0., pred_dropout=0.))]

def v3(classes, scale=0.5, heads=HEADS):
    "One net of ch_PP-OCRv3_rec_distillation.yml, release 2.10"
    backbone = MobileNetV1Enhance(scale, **SCALE)
    return RecModel(backbone, None, multi_head(backbone.out_channels, classes, heads), return_all_feats=True)

def small(classes, backbone=None, heads=SMALL_HEADS):
    "The same, small enough for many tests"
    backbone = backbone or MobileNetV1Enhance(0.0625, **SCALE)
    return RecModel(backbone, None, multi_head(backbone.out_channels, classes, heads), return_all_feats=True)

def v2(classes):
    "One net of ch_PP-OCRv2_rec_distillation.yml"
    neck = encoder('rnn', 512, hidden_size=64)
    return RecModel(MobileNetV1Enhance(0.5), neck, CTCHead(128, classes['CTCLabelDecode'], mid_channels=96, fc_decay=2e-5), return_all_feats=True)

CHINESE,DIGITS = dict(CTCLabelDecode=6625, SARLabelDecode=6627),dict(CTCLabelDecode=37, SARLabelDecode=39)

def test_params_rec():
    "Names, order, shapes and own regularizers of the whole distillation model"
    rows = json.loads((GOLDEN/'params_rec.json').read_text())['rows']
    nets = nn.ModuleDict({n: v3(CHINESE) for n in ('Teacher', 'Student')})
    arrays = {k: np.broadcast_to(np.float32(i), s) for i,(k,s,*_) in enumerate(rows)}
    load_paddle(nets, arrays)
    number = {k: i for i,(k,*_) in enumerate(rows)}
    state = {k: v for k,v in nets.state_dict().items() if not k.endswith('num_batches_tracked')}
    taken = [k for k,*_ in rows if '.cell.' not in k]
    assert list(state)==[ours(k) for k in taken] and len(rows)-len(taken)==32
    for k in taken:
        v = state[ours(k)]
        assert v[-1].unique().tolist()==[0 if k.endswith('embedding.weight') else number[k]], k
    assert own_l2(nets)=={ours(k): l2 for k,_,_,_,l2 in rows if l2 is not None}
    assert {k for k,_ in nets.named_parameters()}=={ours(k) for k,_,_,trainable,_ in rows if trainable}
    assert sum(p.numel() for p in nets['Student'].parameters() if p.requires_grad)/1e6==pytest.approx(27.5, abs=0.1)

def test_reading_net_is_a_part_of_it():
    "`ppocrv3_rec` has the names of the model without its SAR head"
    whole = v3(CHINESE).state_dict()
    assert list(ppocrv3_rec().state_dict())==[k for k in whole if '.sar_head.' not in k]

def batch(n=2, width=64, classes=37):
    torch.manual_seed(0)
    label = torch.zeros(n, 25, dtype=torch.long)
    label[:,:3] = torch.randint(1, classes-1, (n, 3))
    sar = torch.full((n, 25), classes+1)
    sar[:,:5] = torch.tensor([classes, 1, 2, 3, classes])
    return torch.randn(n, 3, 48, width), (label, sar, torch.full((n,), 3), torch.tensor([1., 0.5]*n, dtype=torch.double)[:n])

def test_outputs_of_the_whole():
    x,targets = batch()
    net = small(DIGITS)
    out = net(x, targets)
    assert list(out)==['backbone_out', 'neck_out', 'head_out'] and list(out['head_out'])==['ctc', 'ctc_neck', 'sar']
    assert out['backbone_out'].shape==(2, 64, 1, 8) and out['neck_out'].shape==(2, 8, 8) and out['neck_out'] is out['head_out']['ctc_neck']
    assert out['head_out']['ctc'].shape==(2, 8, 37) and out['head_out']['sar'].shape==(2, 25, 38)
    net.eval()
    with torch.no_grad():
        probs = net(x)
        assert list(probs)==['head_out'] and probs['head_out'].shape==(2, 8, 37)
        torch.testing.assert_close(probs['head_out'].sum(-1), torch.ones(2, 8))
        assert torch.equal(net(x, targets)['head_out'], probs['head_out'])
        net.return_all_feats = False
        assert torch.equal(net(x), probs['head_out'])
    assert list(net.train()(x, targets))==['ctc', 'ctc_neck', 'sar']
    with pytest.raises(UserError, match='SARHead wants targets'): net(x)

def test_whole_in_eval_is_for_frozen_teachers():
    "All outputs of training, from a net whose batch norms stand still"
    x,targets = batch()
    net = small(DIGITS).eval()
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad(): out,again,probs = net(x, targets, whole=True),net(x, targets, whole=True),net(x)
    assert list(out['head_out'])==['ctc', 'ctc_neck', 'sar'] and out['head_out']['sar'].shape==(2, 25, 38)
    assert torch.equal(out['head_out']['sar'], again['head_out']['sar']) and torch.equal(out['head_out']['ctc'].softmax(-1), probs['head_out'])
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert torch.equal(net.train()(x, targets, whole=False)['head_out'].sum(-1).round(), torch.ones(2, 8))

def test_outputs_of_v2():
    net = v2(DIGITS)
    out = net(torch.randn(2, 3, 32, 320))
    assert {k: tuple(v.shape) for k,v in out.items()}==dict(backbone_out=(2, 512, 1, 80), neck_out=(2, 80, 128), head_out=(2, 80, 37))
    with torch.no_grad(): torch.testing.assert_close(net.eval()(torch.randn(2, 3, 32, 320))['head_out'].sum(-1), torch.ones(2, 80))
    assert own_l2(net.head)=={f'fc{i}.{k}': 2e-5 for i in (1, 2) for k in ('weight', 'bias')}
    names = {f'encoder.lstm.{w}_{g}_l{l}{d}' for w in ('weight', 'bias') for g in ('ih', 'hh') for l in (0, 1) for d in ('', '_reverse')}
    assert {k for k,_ in net.neck.named_parameters()}==names
    with pytest.raises(UserError, match='2 rows high'): net(torch.randn(2, 3, 64, 320))

def test_lstm_weights_under_two_names():
    "Paddle stores those of both directions twice; the second names are left out"
    neck = encoder('rnn', 8, hidden_size=4)
    arrays = {k: np.full(p.shape, i, 'float32') for i,(k,p) in enumerate(neck.named_parameters())}
    twice = arrays | {f'encoder.lstm.{l}.cell_{d}.weight_ih': arrays[f'encoder.lstm.weight_ih_l{l}'] for l in (0, 1) for d in ('fw', 'bw')}
    load_paddle(neck, twice)
    assert all((p==i).all() for i,p in enumerate(neck.parameters()))

def test_sar_alone():
    x,targets = batch()
    net = RecModel(MobileNetV1Enhance(0.0625, **SCALE), None, SARHead(64, 39, enc_dim=16, d_k=12, max_text_length=5), return_all_feats=True)
    assert net(x, targets[1:])['head_out'].shape==(2, 25, 38)
    with torch.no_grad(): torch.testing.assert_close(net.eval()(x)['head_out'].sum(-1), torch.ones(2, 5))

def test_gradients_as_use_guide_wants():
    "CTC trains its neck and head, SAR the backbone"
    x,targets = batch()
    net = small(DIGITS)
    reached = lambda: {k.split('.')[0] if k.startswith('backbone') else k.split('.')[1] for k,p in net.named_parameters() if p.grad is not None}
    net(x, targets)['head_out']['ctc'].logsumexp(-1).sum().backward()
    assert reached()=={'ctc_encoder', 'ctc_head'}
    net.zero_grad()
    net(x, targets)['head_out']['sar'].logsumexp(-1).sum().backward()
    assert reached()=={'backbone', 'sar_head'}

def test_heads_without_sections():
    "CTC alone among the heads, with its own decay where nothing is said"
    net = small(DIGITS, heads=[dict(CTCHead=dict(Neck=dict(name='svtr')))])
    assert list(net(torch.randn(2, 3, 48, 64))['head_out'])==['ctc', 'ctc_neck'] and own_l2(net.head)=={'ctc_head.fc.weight': 4e-4, 'ctc_head.fc.bias': 4e-4}

@pytest.mark.parametrize('decay', [-1e-5, float('nan'), float('inf'), 1e19])
def test_wrong_decay(decay):
    with pytest.raises(UserError, match='fc_decay: a number from 0'): CTCHead(8, 5, fc_decay=decay)

# Heads of somebody else's

class Length(nn.Module):
    "Says how many characters there are, and whether it was given targets"
    output,classes = 'length',list
    def __init__(self, ni, n=26):
        super().__init__()
        self.fc,self.seen = nn.Linear(ni, n),[]
    def forward(self, x, targets):
        self.seen.append(targets)
        return self.fc(x.mean((2,3)))

class Modes(nn.Module):
    "Asks for `whole` alone"
    output,gives_probs = 'modes',True
    def forward(self, x, whole=None): return dict(whole=whole)

class Silent(nn.Module):
    "Asks for nothing"
    output = 'silent'
    def forward(self, x): return x.amax((2,3))

def test_other_heads_in_a_multi_head():
    x,targets = batch()
    net = small(DIGITS)
    length = Length(64)
    net.head = MultiHead(net.head.ctc_encoder, net.head.ctc_head, length_head=length, sar_head=net.head.sar_head, silent_head=Silent(), modes_head=Modes())
    out = net.train()(x, targets)['head_out']
    assert list(out)==['ctc', 'ctc_neck', 'length', 'sar', 'silent', 'modes'] and out['length'].shape==(2, 26) and out['sar'].shape==(2, 25, 38)
    assert len(length.seen)==1 and all(a is b for a,b in zip(length.seen[0], targets[1:], strict=True)) and out['modes']==dict(whole=True)
    assert 'head.length_head.fc.weight' in net.state_dict()
    net.eval()
    with torch.no_grad():
        assert net(x)['head_out'].shape==(2, 8, 37) and len(length.seen)==1
        assert list(net(x, whole=True)['head_out'])==['ctc', 'ctc_neck', 'silent', 'modes']
        assert list(net(x, targets, whole=True)['head_out'])==list(out)
    net.head.sar_head = None
    assert list(net.train()(x, targets)['head_out'])==['ctc', 'ctc_neck', 'length', 'silent', 'modes']

def test_another_head_alone():
    x,targets = batch()
    net = RecModel(PlainBackbone((8, 8, 8, 8)), None, Length(8))
    assert net(x, targets).shape==(2, 26) and net.head.seen[0] is targets
    torch.testing.assert_close(net.eval()(x, targets).sum(-1), torch.ones(2))
    net = RecModel(PlainBackbone((8, 8, 8, 8)), None, Modes())
    assert net(x)==dict(whole=True) and net.eval()(x, targets)==dict(whole=False) and net(x, whole=True)==dict(whole=True)

def test_logits_in_both_modes():
    "With `probs=False` training, evaluation and `whole` all give the same"
    x,targets = batch()
    net = small(DIGITS).eval()
    with torch.no_grad(): probs = net(x)['head_out']
    net.probs = False
    with torch.no_grad():
        for whole in (None, True, False):
            assert list(net(x, targets, whole)['head_out'])==['ctc', 'ctc_neck', 'sar'] and list(net(x, whole=whole)['head_out'])==['ctc', 'ctc_neck']
            torch.testing.assert_close(net(x, whole=whole)['head_out']['ctc'].softmax(-1), probs)
        net.return_all_feats = False
        for whole in (None, True, False): torch.testing.assert_close(net(x, whole=whole).softmax(-1), probs)
    assert net.train()(x, targets).shape==(2, 8, 37)

def test_a_map_for_a_sequence_head():
    "`PlainBackbone`, a neck that only turns the map, and a CTC head: `PlainStudent` from its parts"
    student = PlainStudent(37, (8, 8, 8, 16))
    net = RecModel(student.backbone, encoder('reshape', 16), CTCHead(16, 37), probs=False)
    net.head.fc = student.fc
    x = torch.randn(2, 3, 48, 64)
    with torch.no_grad(): assert torch.equal(net.eval()(x), student.eval()(x))

# Necks

def test_reshape():
    neck = encoder('reshape', 6)
    x = torch.randn(2, 6, 1, 5)
    assert torch.equal(neck(x), x[:,:,0].transpose(1,2)) and neck.out_channels==6 and not neck.state_dict()

def test_rnn_is_an_lstm_in_both_directions():
    neck = encoder('rnn', 6, hidden_size=4)
    x = torch.randn(2, 6, 1, 5)
    y = neck(x)
    assert y.shape==(2, 5, 8) and neck.out_channels==8
    assert torch.equal(y, neck.encoder.lstm(x[:,:,0].transpose(1,2))[0])
    assert encoder('rnn', 6).out_channels==96

# Backbones that are not ours

def test_timm():
    net = small(DIGITS, TimmBackbone('resnet18'))
    x,targets = batch()
    out = net(x, targets)
    assert out['backbone_out'].shape==(2, 128, 1, 8) and out['head_out']['ctc'].shape==(2, 8, 37)
    out['head_out']['sar'].sum().backward()
    assert net.backbone.body.conv1.weight.grad is not None
    maps = net.backbone.eval().body(x)[-1]
    torch.testing.assert_close(net.backbone(x)[:,:,0], maps.mean(2))

def test_timm_by_index(): assert TimmBackbone('resnet18', out_indices=(1,))(torch.zeros(1, 3, 48, 64)).shape==(1, 64, 1, 16)

def test_timm_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(UserError, match='pip install timm'): TimmBackbone('resnet18')

@pytest.mark.parametrize('name,contains', [('resnet81', "no network in timm 'resnet81'; did you mean"), ('vit_tiny_patch16_224', 'choose one by out_indices')])
def test_wrong_timm(name, contains):
    with pytest.raises(UserError) as e: TimmBackbone(name)
    assert contains in str(e.value) and '\n' not in str(e.value)

class Mine(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv,self.out_channels = nn.Conv2d(3, width, (48, 8), (48, 8)),width
    def forward(self, x): return self.conv(x)

def test_own_backbone():
    net = RecModel(Mine(4), encoder('rnn', 4), CTCHead(96, 37), return_all_feats=True)
    assert net(torch.randn(2, 3, 48, 64))['head_out'].shape==(2, 8, 37)

# Batch norm

def test_paddle_batchnorm():
    x,a = torch.randn(3, 4, 2, 5),nn.BatchNorm2d(4, momentum=0.3)
    b = paddle_batchnorm(copy.deepcopy(a))
    assert type(b) is PaddleBatchNorm2d and type(a) is nn.BatchNorm2d
    for _ in range(3): assert torch.equal(a(x), b(x))
    v = torch.ones(4)
    for _ in range(3): v = 0.7*v + 0.3*x.var((0,2,3), correction=0)
    torch.testing.assert_close(b.running_var, v)
    assert torch.equal(a.running_mean, b.running_mean)
    before = b.running_var.clone()
    b.eval()(x)
    assert torch.equal(b.running_var, before) and list(a.state_dict())==list(b.state_dict())

def test_paddle_batchnorm_leaves_the_rest():
    net = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.BatchNorm2d(2, momentum=None), nn.BatchNorm1d(2), nn.BatchNorm2d(2))
    net[3].own_l2 = 0.
    assert paddle_batchnorm(net) is net and [type(m) for m in net]==[nn.BatchNorm2d, nn.BatchNorm2d, PaddleBatchNorm1d, PaddleBatchNorm2d] and net[3].own_l2==0
    paddle_batchnorm(net)
    net[0](torch.randn(2, 2, 3, 3))

def test_released_weights_fit_paddle_batchnorm():
    a,b = (load_onnx(net, teacher_file('PP-OCRv3_rec')).eval() for net in (ppocrv3_rec(), paddle_batchnorm(ppocrv3_rec())))
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad(): assert torch.equal(a(x), b(x))

# Shapes, parts, what a stranger may do wrong

NETS = dict(ppocrv3=lambda: ppocrv3_rec(63), plain=lambda: PlainStudent(63))

@pytest.mark.parametrize('make', NETS.values(), ids=NETS)
@pytest.mark.parametrize('width', [8, 64, 160, 328])
def test_one_vote_for_eight_pixels(make, width):
    with torch.no_grad(): assert make().eval()(torch.zeros(2, 3, 48, width)).shape==(2, width//8, 63)

@pytest.mark.parametrize('make', NETS.values(), ids=NETS)
def test_a_step_reaches_what_it_should(make):
    "Every parameter gets a gradient from the logits: where CTC is alone, nothing is stopped before the backbone"
    net = make().train()
    net(torch.randn(2, 3, 48, 64)).square().sum().backward()
    assert [k for k,p in net.named_parameters() if p.grad is None]==[]

def test_all_feats():
    net,x = ppocrv3_rec(63, return_all_feats=True).eval(),torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        outs = net(x)
        net.return_all_feats = False
        assert torch.equal(net(x), outs['head_out']['ctc'])
    assert list(outs)==['backbone_out', 'neck_out', 'head_out'] and list(outs['head_out'])==['ctc', 'ctc_neck'] and outs['head_out']['ctc_neck'] is outs['neck_out']
    assert outs['backbone_out'].shape==(2, 512, 1, 8) and outs['neck_out'].shape==(2, 8, 64)

@pytest.mark.parametrize('height', [64, 96])
@pytest.mark.parametrize('make', NETS.values(), ids=NETS)
def test_wrong_height(make, height):
    net = make().eval()
    with pytest.raises(UserError, match='48 pixels high'): net(torch.zeros(1, 3, height, 64))

def test_sliced():
    net,x,columns = ppocrv3_rec(63).eval(),torch.randn(2, 3, 48, 64),torch.tensor([0, 5, 2, 62])
    few = Sliced(net, columns).eval()
    with torch.no_grad():
        assert torch.equal(few(x), net(x)[..., [0, 5, 2, 62]])
        net.return_all_feats = True
        whole,part = net(x),few(x)
    assert torch.equal(part['head_out']['ctc'], whole['head_out']['ctc'][..., columns])
    assert torch.equal(part['neck_out'], whole['neck_out'])
    assert [k for k,_ in few.named_buffers() if k=='columns'] and sum(1 for _ in few.parameters())==sum(1 for _ in net.parameters())

def test_small_enough():
    assert sum(p.numel() for p in PlainStudent(63).parameters()) == 513_519
    assert sum(p.numel() for p in ppocrv3_rec().parameters())==2_639_665

def test_student_wants_four_channels():
    for channels in ((8, 8, 8), (8, 8, 8, 0), (8, 8, 8, 8.), 8, 'abcd', None):
        with pytest.raises(UserError, match='four channels'): PlainBackbone(channels)
    with pytest.raises(UserError, match='four channels'): PlainStudent(63, (8, 8, 8))
    assert PlainBackbone([8, 8, 8, 16])(torch.zeros(2, 3, 48, 80)).shape==(2, 16, 1, 10)

@pytest.mark.parametrize('kw', [dict(last_conv_stride=0), dict(last_conv_stride=[1]), dict(last_conv_stride=[1, 2, 3]), dict(last_conv_stride='1'), dict(last_pool_type='avg', last_pool_kernel_size=[2, -2])], ids=str)
def test_wrong_strides(kw):
    with pytest.raises(UserError, match='a whole number from 1 is wanted, or two of them'): MobileNetV1Enhance(**kw)

def test_initial_weights():
    "PaddleOCR's: convolutions sqrt(2/fan_in), the neck's linear layers 0.02, the head uniform within 1/sqrt(fan_in)"
    torch.manual_seed(0)
    net = ppocrv3_rec()
    for k,m in net.named_modules():
        if isinstance(m, nn.Conv2d):
            w = m.weight
            assert abs(w.std().item()/(2/w[0].numel())**0.5 - 1) < 0.15, k
            assert m.bias is None or not m.bias.any()
        if isinstance(m, nn.Linear) and 'ctc_encoder' in k: assert abs(m.weight.std().item()/0.02 - 1) < 0.05 and not m.bias.any()
    fc = net.head.ctc_head.fc
    for t in (fc.weight, fc.bias): assert 0.99/8 < t.abs().max() <= 1/8 and abs(t.std().item()*8*3**0.5 - 1) < 0.05
