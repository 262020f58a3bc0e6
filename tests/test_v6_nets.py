"The networks of PP-OCRv6 against PaddleOCR's own numbers (golden/README.md says how they were made), and its losses"
import copy, json
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn

from distillbook.backbones import PPLCNetV3
from distillbook.config import build_loss
from distillbook.config.networks import build_det, build_rec
from distillbook.core import UserError
from distillbook.det.losses import dice_focal, masked_focal
from distillbook.det.nets import DBHead, V6_NECKS, ppocrv6_det
from distillbook.det.replk import COMPANIONS, DilatedReparamBlock, RepLKFPN, RepLKPAN
from distillbook.layers import FixedBatchNorm1d, PaddleBatchNorm1d, keep_statistics, paddle_batchnorm
from distillbook.lcnetv4 import PPLCNetV4, RepDW
from distillbook.optim import own_l2
from distillbook.rec.lightsvtr import LightSVTR
from distillbook.rec.neck import EncoderWithRNN, EncoderWithSVTR, SequenceEncoder
from distillbook.rec.nets import CTCHead, ppocrv6_rec
from distillbook.reparam import Branched, calibrate, fuse
from distillbook.schedules import own_lr
from distillbook.use.weights import load_paddle
from test_paddle import paddle_names
from golden_cases import close, part
from weights_formula import fill, fill4

GOLDEN = Path(__file__).parent/'golden'
Z = np.load(GOLDEN/'modules_v6.npz')
MODES = 'eval','train'
STEMS = [*dict.fromkeys(k.partition('|')[0].rpartition('/')[0] for k in Z.files if k.endswith(('/eval|meta','/train|meta')))]
TARGETS = ('threshold_map','threshold_mask','shrink_map','shrink_mask')

def meta(case): return json.loads(str(Z[f'{case}|meta']))
def first_of(stem): return next(m for m in (meta(f'{stem}/{mode}') for mode in MODES if f'{stem}/{mode}|meta' in Z.files) if isinstance(m['shapes'], dict))

class Levels(nn.Module):
    "A head whose input is what a neck gives in training, part by part; its name in the golden file is h"
    def __init__(self, head):
        super().__init__()
        self.h = head
    def forward(self, fuse, p4, p3, p2): return self.h(dict(fuse=fuse, aux_p4=p4, aux_p3=p3, aux_p2=p2) if self.training else fuse)

def made(m):
    cls,kw = m.get('cls'),m.get('kwargs', {})
    if cls is None: return whole(m['Architecture'])
    if cls=='SequenceEncoder': return SequenceEncoder(LightSVTR(m['in_channels'], **kw))
    if cls=='CTCHead': return CTCHead(m['in_channels'], m['out_channels'], **kw)
    if cls=='DBHead': return Levels(DBHead(m['in_channels'], **kw))
    if cls=='DilatedReparamBlock': return DilatedReparamBlock(*(kw[k] for k in ('channels','kernel_size')) if 'kernel_size' in kw else kw.values())
    return dict(PPLCNetV4=PPLCNetV4, RepLKFPN=RepLKFPN, RepLKPAN=RepLKPAN)[cls](**{k: m[k] for k in ('in_channels',) if k in m}, **kw)

def whole(arch):
    "A network of a configuration, with as many classes as the case says"
    arch = {k: copy.deepcopy(v) for k,v in arch.items() if k not in ('Transform',)}
    if arch['model_type']=='det': return build_det(arch)
    n = arch['Head'].pop('out_channels_list')['CTCLabelDecode']
    return build_rec(arch, [chr(97+i) for i in range(n-1)])

def net_of(stem):
    "A network with the weights of a case, its names and shapes checked by loading, and without chance"
    m = first_of(stem)
    net = paddle_batchnorm(made(m))
    assert {n: list(s) for n,s,_ in paddle_names(net) if not n.endswith('.pe')}=={k: s for k,s in m['shapes'].items() if not k.endswith('.pe')}
    buffers = dict(net.named_buffers())
    load_paddle(net, {k: buffers[k].numpy() if k.endswith('.pe') else fill4(m.get('prefix', '')+k, s) for k,s in m['shapes'].items()})
    for o in net.modules():
        if isinstance(o, nn.Dropout): o.p = 0.
    return net

def inputs(stem):
    where = next(c for mode in MODES if any(k.startswith(f'{(c := f"{stem}/{mode}")}|in|') for k in Z.files))
    keys = sorted(k for k in Z.files if k.startswith(f'{where}|in|'))
    return [torch.from_numpy(Z[k]) for k in keys if '|in|x' in k],[torch.from_numpy(Z[k]) for k in keys if '|in|data' in k]

def outputs(net, xs, data, mode):
    is_neck = isinstance(net, (RepLKFPN,RepLKPAN))
    y = net(xs) if is_neck else net(*xs, tuple(data)) if data and mode=='train' else net(*xs)
    while isinstance(y, dict) and 'head_out' in y: y = y['head_out']
    if isinstance(net, CTCHead) and mode=='eval': y = y.softmax(-1)
    if isinstance(y, dict): return {f'y.{k}': v for k,v in y.items()}
    return {f'y{i}': o for i,o in enumerate(y)} if isinstance(y, (list,tuple)) else dict(y=y)

# In evaluation 1e-5 of the largest number, but where a steep sigmoid or a softmax of random weights stands behind
ROUGH = dict(v6_tiny_det_narrow=1e-4)

@pytest.mark.parametrize('stem', STEMS)
def test_equals_paddle(stem):
    net = net_of(stem)
    if f'{stem}/eval|meta' in Z.files: check_eval(stem, net.eval())
    if f'{stem}/train|meta' in Z.files: check_train(stem, net.train())

def check_eval(stem, net):
    m,(xs,data) = meta(f'{stem}/eval'),inputs(stem)
    with torch.no_grad(): outs = outputs(net, xs, data, 'eval')
    assert {k: list(v.shape) for k,v in outs.items()}==m['out_shapes']
    for k,v in outs.items(): close(part(m, k, v.numpy()), Z[f'{stem}/eval|out|{k}'], ROUGH.get(stem, 1e-5))

def probe(y): return (y * torch.arange(y.numel(), dtype=torch.double).mul(.37).cos().to(y.dtype).reshape(y.shape)).sum()

def check_train(stem, net):
    case = f'{stem}/train'
    m,(xs,data) = meta(case),inputs(stem)
    for x in xs: x.requires_grad_()
    outs,floor = outputs(net, xs, data, 'train'),m['noise_floor']
    for k,shape in m['out_shapes'].items():
        assert list(outs[k].shape)==shape
        if f'{case}|out|{k}' in Z.files: close(part(m, k, outs[k].detach().numpy()), Z[f'{case}|out|{k}'], max(1e-4, 10*floor['out'].get(k, 0)))
    sum(probe(v) for k,v in outs.items() if k in m['out_shapes']).backward()
    for i,x in enumerate(xs):
        if m['grad_x_none'][i]: assert x.grad is None
        elif f'{case}|grad|x{i}' in Z.files: close(part(m, f'x{i}', x.grad.numpy(), 'stored_grad_part'), Z[f'{case}|grad|x{i}'], max(1e-4, 10*floor['grad'].get(f'x{i}', 0)))
    ours = {n: k for n,_,k in paddle_names(net)}
    top,tolerance = max(v for v in m['gradnorm'].values() if v is not None),max(1e-4, 10*floor['gradnorm_max_rel'])
    for k,want in m['gradnorm'].items():
        got = net.get_parameter(ours[k]).grad
        if want is None: assert got is None, k
        else: assert abs(got.norm().item()-want) <= tolerance*want + 1e-5*top, (k, want, got.norm())
    state = net.state_dict()
    for k in [k for k in Z.files if k.startswith(f'{case}|bn_after|')]: close(state[ours[k.split('|')[-1]]], Z[k], max(1e-4, 10*max(floor['out'].values())))
    for k,want in m.get('bn_after_norms', {}).items(): assert state[ours[k]].norm().item()==pytest.approx(want, rel=2e-3), k

@pytest.mark.parametrize('stem', [s for s in STEMS if f'{s}/deploy|meta' in Z.files])
def test_fused(stem):
    "One kernel for each layer of branches: PaddleOCR's kernels, and the answers of the branches"
    net,(xs,data) = net_of(stem).eval(),inputs(stem)
    one = fuse(copy.deepcopy(net))
    assert not any(isinstance(o, Branched) and not o.fused for o in one.modules())
    assert all(isinstance(o, Branched) for o in net.modules() if isinstance(o, (RepDW,DilatedReparamBlock)))
    state,m = one.state_dict(),meta(f'{stem}/deploy')
    for k in [k for k in Z.files if k.startswith(f'{stem}/deploy|w|')]:
        name = k.split('|')[-1].replace('lk_origin.', 'reparam_conv.')
        if 'reparam_conv' in name: close(state[name], Z[k], 1e-5) # In Paddle plain convolutions are one with their batch norms as well
    reparam = {k: v for k,v in m['fused_norms'].items() if 'rep_dw.reparam_conv' in k}
    if reparam: assert {k for k in state if 'rep_dw.reparam_conv' in k}==set(reparam)
    for k,want in reparam.items(): assert state[k].norm().item()==pytest.approx(want, rel=1e-4)
    with torch.no_grad(): a,b = outputs(net, xs, data, 'eval'),outputs(one, xs, data, 'eval')
    for k in a: close(b[k], a[k].numpy(), 1e-4 if stem in ROUGH else 2e-5)

@pytest.mark.parametrize('alive', [0.,.1])
@pytest.mark.parametrize('make', [lambda: RepDW(6), lambda: RepDW(6, 5), *[lambda ks=ks: DilatedReparamBlock(6, ks) for ks in COMPANIONS]], ids=['RepDW3','RepDW5',*[f'Dilated{ks}' for ks in COMPANIONS]])
def test_from_one_kernel_to_branches(make, alive):
    "FACTS 11, recipes A and B, and the calibration after them"
    torch.manual_seed(0)
    layer = make()
    ks = layer.shape[2]
    kernel,bias,x = torch.randn(6, 1, ks, ks),torch.randn(6),torch.randn(8, 6, 16, 20)+1
    layer.spread(kernel, bias, alive)
    with torch.no_grad():
        want = nn.functional.conv2d(x, kernel, bias, padding=ks//2, groups=6)
        close(layer.eval()(x), want.numpy(), 2e-5)
        assert (copy.deepcopy(layer).train()(x)-want).abs().max() > .05*want.abs().max()
        calibrate(layer.train(), x)
        close(layer.eval()(x), want.numpy(), 2e-5)
        close(layer.train()(x), want.numpy(), 1e-4)
    layer.train()(x).square().sum().backward()
    assert all(p.grad.abs().sum()>0 for k,p in layer.named_parameters() if k.endswith('bn.weight'))

def test_norms_of_sequences():
    "A batch norm of a sequence has Paddle's biased variance too, and keeps its statistics if it is to"
    head = paddle_batchnorm(CTCHead(12, 11, use_guide=True))
    assert {type(m) for m in head.modules() if isinstance(m, nn.BatchNorm1d)}=={PaddleBatchNorm1d}
    keep_statistics(head).train()
    norms = [m for m in head.modules() if isinstance(m, nn.BatchNorm1d)]
    assert {type(m) for m in norms}=={FixedBatchNorm1d} and not any(m.training for m in norms)

def test_layers_that_are_none():
    with pytest.raises(UserError, match="did you mean 'tiny'"): PPLCNetV4('tini')
    with pytest.raises(UserError, match='5, 7 or 9'): RepLKFPN([4,6,8,10], 16, 11)
    with pytest.raises(UserError, match='odd number of columns'): LightSVTR(24, 16, local_kernel=6)


# %% names, shapes, decay and rates
def rec_arch(size):
    neck = dict(tiny=dict(name='reshape'), small=dict(name='lightsvtr', dims=120, depth=2, mlp_ratio=2., local_kernel=7), medium=dict(name='lightsvtr', dims=192, depth=2, mlp_ratio=4., local_kernel=7, use_guide=False))[size]
    head = dict(fc_decay=1e-5, **(dict(mid_channels=80, use_guide=True) if size=='tiny' else {}))
    heads = [dict(CTCHead=dict(Neck=neck, Head=head)), dict(NRTRHead=dict(nrtr_dim=512 if size=='medium' else 384, max_text_length=25))]
    return dict(model_type='rec', algorithm='SVTR_LCNet', Backbone=dict(name='PPLCNetV4', model_size=size), Head=dict(name='MultiHead', head_list=heads))

def det_arch(size):
    neck = dict(tiny=dict(name='RepLKFPN', out_channels=64, dilated_kernel_size=5, shortcut=True), small=dict(name='RepLKFPN', out_channels=96, dilated_kernel_size=7, shortcut=True),
        medium=dict(name='RepLKPAN', out_channels=256, intracl=True))[size]
    return dict(model_type='det', algorithm='DB', Backbone=dict(name='PPLCNetV4', det=True, model_size=size), Neck=neck, Head=dict(name='DBHead', k=50, fix_nan=True, aux_in_channels=neck['out_channels']))

@pytest.mark.parametrize('size', ['tiny','small','medium'])
@pytest.mark.parametrize('task', ['rec','det'])
def test_params(task, size):
    "Names, order, shapes, own decay and own rates of the unmodified configurations"
    rows = json.loads((GOLDEN/f'params_v6_{size}_{task}.json').read_text())['rows']
    with torch.device('meta'):
        n = 6905 if size=='tiny' else 18709
        net = build_det(det_arch(size)) if task=='det' else build_rec(rec_arch(size), [chr(0x4e00+i) for i in range(n)])
    names = {n: (list(s), k) for n,s,k in paddle_names(net)}
    ours,theirs = [(n, s) for n,(s,_) in names.items()],[(k, s) for k,s,*_ in rows]
    assert ours==theirs if 'incl' not in str(theirs) else sorted(ours)==sorted(theirs)
    params,decay,rate = dict(net.named_parameters()),own_l2(net),own_lr(net)
    assert set(params)=={names[k][1] for k,_,trainable,*_ in rows if trainable}
    for k,_,trainable,l2,lr in rows:
        if not trainable: continue
        p = params[names[k][1]]
        assert decay.get(p)==l2 and rate.get(p, 1.)==pytest.approx(lr), k

def test_what_is_made_in_python_is_what_a_file_makes():
    with torch.device('meta'):
        for size in V6_NECKS:
            rec,det = ppocrv6_rec(12, model_size=size),ppocrv6_det(size)
            of_file = build_rec(rec_arch(size), list('abcdefghijk')),build_det(det_arch(size))
            for mine,theirs in zip((rec, det), of_file):
                own = {k: v.shape for k,v in theirs.state_dict().items()}
                assert all(own[k]==v.shape for k,v in mine.state_dict().items())


# %% losses
def given(case, names): return [torch.from_numpy(Z[f'{case}|in|{k}']) for k in names]

@pytest.mark.parametrize('case', [k.partition('|')[0] for k in Z.files if k.partition('|')[0].startswith(('MaskedFocalLoss','DiceFocalLoss')) and k.endswith('|meta')])
def test_focal_losses(case):
    kw = meta(case)['kwargs']
    pred,gt,mask = given(case, ('pred','gt','mask'))
    loss = (dice_focal if case.startswith('Dice') else masked_focal)(pred.requires_grad_(), gt, mask, **kw)
    close(loss.detach(), Z[f'{case}|out|loss'], 1e-5)
    loss.backward()
    smooth = pred.detach()!=.5 # There Paddle's logit is 0, at the kink of its formula for cross-entropy, and its gradient is wrong
    close(pred.grad[smooth], Z[f'{case}|grad|pred'][smooth.numpy()], 1e-4)

@pytest.mark.parametrize('case', ['DBLoss_v6_aux','DBLoss_v6_noaux'])
def test_the_loss_of_a_configuration(case):
    "Terms in PaddleOCR's order; those of auxiliary heads have their weight in the log, where PaddleOCR has it in the sum alone"
    kw = meta(case)['kwargs']
    aux = [k for k in ('aux_maps_p4','aux_maps_p3','aux_maps_p2') if f'{case}|in|{k}' in Z.files]
    outs = {k: v.requires_grad_() for k,v in zip(['maps',*aux], given(case, ['maps',*aux]))}
    head = dict(name='DBHead', **(dict(aux_in_channels=16) if aux else {}))
    cfg = dict(Global={}, Architecture=dict(model_type='det', Backbone={}, Head=head), Loss=dict(name='DBLoss', **kw))
    loss = build_loss(cfg)
    total = loss(dict(Model=outs), [None, *given(case, TARGETS)])
    logged = [k.split('|')[-1] for k in Z.files if k.startswith(f'{case}|out|loss_') and not k.endswith('_cbn')]
    assert list(loss.parts)==logged
    for k,v in loss.parts.items(): close(v, Z[f'{case}|out|{k}']*kw.get(f"aux_weight_{k[-2:]}" if 'aux' in k else '', 1), 1e-5)
    close(total.detach(), Z[f'{case}|out|loss'].sum(), 1e-5)
    total.backward()
    for k,v in outs.items():
        smooth = v.detach()!=.5
        close(v.grad[smooth], Z[f'{case}|grad|{k}'][smooth.numpy()], 1e-4)

def test_losses_that_are_none():
    def cfg(head, **loss): return dict(Global={}, Architecture=dict(model_type='det', Backbone={}, Head=head), Loss=dict(name='DBLoss', **loss))
    with pytest.raises(UserError, match="did you mean 'DiceFocalLoss'"): build_loss(cfg(dict(name='DBHead'), main_loss_type='DiceFocusLoss'))
    with pytest.raises(UserError, match='looks twice'): build_loss(cfg(dict(name='PFHeadLocal'), main_loss_type='DiceFocalLoss'))
    names = [t.name for t in build_loss(cfg(dict(name='DBHead'), main_loss_type='DiceFocalLoss', aux_weight_p4=.2)).terms]
    assert names==['loss_shrink_maps','loss_threshold_maps','loss_binary_maps'] # No head, no term
    names = [t.name for t in build_loss(cfg(dict(name='DBHead', aux_in_channels=8), aux_weight_p4=.2)).terms]
    assert names[-1]=='loss_aux_maps_p4'


# %% PP-OCRv4 at its full size
O = np.load(GOLDEN/'modules_v4_optional.npz')

@pytest.mark.parametrize('case', [k[:-5] for k in O.files if k.endswith('|meta')])
def test_full_size_of_v4(case):
    m = json.loads(str(O[f'{case}|meta']))
    net = PPLCNetV3(**m['kwargs'])
    load_paddle(net, {k: fill(m.get('prefix', '')+k, s) for k,s in m['shapes'].items()})
    with torch.no_grad(): y = net.eval()(torch.from_numpy(O[f'{case}|in|x0']))
    outs = {f'y{i}': o for i,o in enumerate(y)} if isinstance(y, list) else dict(y=y)
    for k,v in outs.items(): close(part(m, k, v.numpy()), O[f'{case}|out|{k}'], 2e-5)


# %% a batch of one
@pytest.mark.parametrize('make', [lambda: LightSVTR(24, 16, 1, num_heads=4), lambda: EncoderWithSVTR(24, 16, 1, 16, num_heads=4), lambda: EncoderWithRNN(24, 8)], ids=['LightSVTR','EncoderWithSVTR','EncoderWithRNN'])
def test_one_line_teaches_half_of_what_it_does_twice(make):
    "PyTorch's batch norm computes wrong gradients on a processor where a batch of one comes with odd strides"
    torch.manual_seed(0)
    net,x,w = SequenceEncoder(make()).eval().double(),torch.randn(1, 24, 1, 41).double(),torch.randn(1, 41, 16).double()
    def gradients(n):
        net.zero_grad()
        (net(x.repeat(n, 1, 1, 1))*w).sum().backward()
        return [p.grad.clone() for p in net.parameters()]
    for one,two in zip(gradients(1), gradients(2)): torch.testing.assert_close(2*one, two)
