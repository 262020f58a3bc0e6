"The networks of PP-OCRv4 against PaddleOCR's own numbers (golden/README.md says how they were made)"
import copy, json
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn

from distillbook.backbones import PPHGNet_small, PPLCNetV3
from distillbook.cache import folded
from distillbook.core import UserError
from distillbook.layers import paddle_batchnorm
from distillbook.optim import own_l2
from distillbook.rec.neck import EncoderWithSVTR, SequenceEncoder
from distillbook.rec.nets import CTCHead, MultiHead, RecModel
from distillbook.rec.nrtr import NRTRHead
from distillbook.rec.svtrnet import DropPath, SVTRNet
from distillbook.reparam import RepLayer, calibrate, fuse
from distillbook.schedules import own_lr
from distillbook.use.weights import load_paddle
from golden_cases import close, ours, part
from weights_formula import fill4

GOLDEN = Path(__file__).parent/'golden'
Z = np.load(GOLDEN/'modules_v4_rec.npz')


def meta(case): return json.loads(str(Z[f'{case}|meta']))

def multi_head(m):
    kw = {name: dict(sections) for h in m['head_list'] for name,sections in h.items()}
    neck = dict(kw['CTCHead']['Neck'])
    del neck['name']
    neck = SequenceEncoder(EncoderWithSVTR(m['in_channels'], **neck))
    ctc = CTCHead(neck.out_channels, m['out_channels_list']['CTCLabelDecode'], **kw['CTCHead']['Head'])
    nrtr = NRTRHead(m['in_channels'], m['out_channels_list']['NRTRLabelDecode'], use_pos=m.get('use_pos', False), **kw['NRTRHead'])
    return MultiHead(neck, ctc, use_pool=m.get('use_pool', False), gtc_head=nrtr)

def transformer(kwargs):
    head = NRTRHead(1, kwargs['out_channels'], kwargs['d_model'], kwargs['max_len'], kwargs['num_decoder_layers'])
    head.before = None
    return head

def made(m):
    cls,kw = m['cls'],m.get('kwargs', {})
    if cls in ('PPLCNetV3','PPHGNet_small','SVTRNet'): return dict(PPLCNetV3=PPLCNetV3, PPHGNet_small=PPHGNet_small, SVTRNet=SVTRNet)[cls](**kw)
    if cls=='SequenceEncoder': return SequenceEncoder(EncoderWithSVTR(m['in_channels'], **kw))
    return multi_head(m) if cls=='MultiHead' else transformer(kw)

def shapes_of(case):
    stem = case.rpartition('/')[0]
    return next(s for mode in ('eval','train') if f'{stem}/{mode}|meta' in Z.files and isinstance(s := meta(f'{stem}/{mode}').get('shapes'), dict))

def net_of(case):
    "A network with the weights of a case, its names and shapes checked by loading, and without chance"
    m = meta(case)
    net = made(m)
    arrays = {k: net.get_buffer(k).numpy() if k.endswith('.pe') else fill4(m.get('prefix', '')+k, s) for k,s in shapes_of(case).items()}
    load_paddle(net, arrays)
    for o in net.modules():
        if isinstance(o, (nn.Dropout,DropPath)): o.p = 0.
    return paddle_batchnorm(net).train(m['mode']=='train')

def inputs(case):
    stem = case.rpartition('/')[0]
    where = next(c for mode in ('eval','train') if f'{(c := f"{stem}/{mode}")}|in|x0' in Z.files)
    targets = [torch.from_numpy(Z[k]) for k in sorted(Z.files) if k.startswith(f'{where}|in|targets')]
    return torch.from_numpy(Z[f'{where}|in|x0']),targets

def named_outputs(y):
    if isinstance(y, dict): return {f'y.{k}': v for k,v in y.items()}
    return {f'y{i}': o for i,o in enumerate(y)} if isinstance(y, (list,tuple)) else dict(y=y)

def answer(net, x, targets):
    if isinstance(net, NRTRHead): return net(x, targets) if targets else net(x)
    return net(x, targets) if targets else net(x)

EVAL = [k[:-5] for k in Z.files if k.endswith('/eval|meta') and 'decode' not in k]
TRAIN = [k[:-5] for k in Z.files if k.endswith('/train|meta')]


@pytest.mark.parametrize('stem', dict.fromkeys(k.rpartition('/')[0] for k in EVAL+TRAIN))
def test_equals_paddle(stem):
    net = net_of(next(k for k in EVAL+TRAIN if k.startswith(f'{stem}/')))
    if f'{stem}/eval' in EVAL: check_eval(f'{stem}/eval', net.eval())
    if f'{stem}/train' in TRAIN: check_train(f'{stem}/train', net.train())

def check_eval(case, net):
    x,targets = inputs(case)
    with torch.no_grad(): y = answer(net, x, targets)
    if isinstance(net, MultiHead): y = y.softmax(-1)
    outs = named_outputs(y)
    assert {k: list(v.shape) for k,v in outs.items()}==meta(case)['out_shapes']
    for k,v in outs.items(): close(part(meta(case), k, v.numpy()), Z[f'{case}|out|{k}'], 1e-5)


def probe(y): return (y * torch.arange(y.numel(), dtype=torch.double).mul(0.37).cos().to(y.dtype).reshape(y.shape)).sum()

def check_train(case, net):
    (x,targets),m = inputs(case),meta(case)
    if isinstance(net, SVTRNet): net.last_drop = 0.
    x.requires_grad_()
    outs,floor = named_outputs(answer(net, x, targets)),m['noise_floor']
    for k,v in outs.items(): close(part(m, k, v.detach().numpy()), Z[f'{case}|out|{k}'], max(1e-4, 10*floor['out'][k]))
    sum(probe(v) for v in outs.values()).backward()
    if m['grad_x_none'][0]: assert x.grad is None
    else: close(part(m, 'x0', x.grad.numpy(), 'stored_grad_part'), Z[f'{case}|grad|x0'], max(1e-4, 10*floor['grad']['x0']))
    top,tolerance = max(v for v in m['gradnorm'].values() if v is not None),max(1e-4, 10*floor['gradnorm_max_rel'])
    for k,want in m['gradnorm'].items():
        got = net.get_parameter(ours(k)).grad
        if want is None: assert got is None, k
        else: assert abs(got.norm().item()-want) <= tolerance*want + 1e-5*top, (k, want)
    state = net.state_dict()
    for k in [k for k in Z.files if k.startswith(f'{case}|bn_after|')]: close(state[ours(k.split('|')[-1])], Z[k], max(1e-4, 10*floor['out'][next(iter(outs))]))
    for k,want in m.get('bn_after_norms', {}).items(): assert state[ours(k)].norm().item()==pytest.approx(want, rel=2e-3), k


@pytest.mark.parametrize('case', ['PPLCNetV3_rec_.25','PPLCNetV3_det_.25'])
def test_fused(case):
    "One kernel for each layer: PaddleOCR's kernels, and the answers of the branches"
    net,(x,_) = net_of(f'{case}/eval'),inputs(f'{case}/eval')
    one = fuse(copy.deepcopy(net))
    state = one.state_dict()
    for k in [k for k in Z.files if k.startswith(f'{case}/deploy|w|')]: close(state[k.split('|')[-1]], Z[k], 1e-5)
    norms = meta(f'{case}/deploy')['fused_norms']
    assert {k for k in state if 'reparam_conv' in k}==set(norms)
    for k,want in norms.items(): assert state[k].norm().item()==pytest.approx(want, rel=1e-4)
    with torch.no_grad(): a,b,c = (named_outputs(o(x)) for o in (net, one, folded(net)))
    for k in a: close(b[k], a[k].numpy(), 1e-5), close(c[k], a[k].numpy(), 1e-5)
    type(net)(**meta(f'{case}/eval')['kwargs'], fused=True).load_state_dict(state)


@pytest.mark.parametrize('alive', [0.,.1])
@pytest.mark.parametrize('kwargs', [dict(ni=6, nf=6), dict(ni=6, nf=6, ks=5, groups=6), dict(ni=6, nf=8, ks=1), dict(ni=6, nf=6, stride=(2,1)), dict(ni=4, nf=4, stride=2, branches=1)])
def test_from_one_kernel_to_branches(kwargs, alive):
    "FACTS 11, recipes A and B, and the calibration after them"
    torch.manual_seed(0)
    fused,layer = RepLayer(**kwargs, fused=True).eval(),RepLayer(**kwargs)
    for p in fused.lab.parameters(): nn.init.normal_(p)
    layer.spread(fused.reparam_conv.weight, fused.reparam_conv.bias, alive)
    layer.lab.load_state_dict(fused.lab.state_dict())
    layer.act.load_state_dict(fused.act.state_dict())
    x = torch.randn(8, kwargs['ni'], 6, 10)+1
    with torch.no_grad():
        want = fused(x)
        close(layer.eval()(x), want.numpy(), 1e-5)
        assert (copy.deepcopy(layer).train()(x)-want).abs().max() > .05*want.abs().max()
        calibrate(layer.train(), x)
        assert layer.training
        close(layer.eval()(x), want.numpy(), 1e-5)
        close(layer.train()(x), want.numpy(), 1e-4)
    gammas = {k: v for k,v in layer.named_parameters() if k.endswith(('bn.weight','identity.weight'))}
    layer.train()(x).square().sum().backward()
    assert all(p.grad.abs().sum()>0 for k,p in gammas.items())


def test_layers_that_are_none():
    with pytest.raises(UserError, match='odd kernel'): RepLayer(4, 4, 2)
    with pytest.raises(UserError, match='one is wanted'): RepLayer(4, 4, branches=0)
    with pytest.raises(UserError, match='six rates'): PPLCNetV3(.25, lr_mult_list=[1.])
    with pytest.raises(UserError, match='above 0'): PPLCNetV3(0)
    with pytest.raises(UserError, match='for each of 3 blocks'): SVTRNet([48,64], depth=[1,1,1], mixer=['Conv'])
    with pytest.raises(UserError, match="did you mean 'Global'"): SVTRNet([48,64], depth=[1,1,1], mixer=['Conv','Conv','global'])
    with pytest.raises(UserError, match='steps of 16'): SVTRNet([40,64])
    with pytest.raises(UserError, match='80 columns'): NRTRHead(8, 14, 32, use_pos=True).eval()(torch.zeros(1, 8, 1, 81))


def rates(net):
    names = {p: k for k,p in net.named_parameters()}
    return {names[p]: f for p,f in own_lr(net).items() if f!=1.}

def test_rates():
    m = meta('PPLCNetV3_rec_lrmult/eval')
    got = rates(PPLCNetV3(**m['kwargs']))
    count = {}
    for f in got.values(): count[f'{round(f, 6)}'] = count.get(f'{round(f, 6)}', 0)+1
    assert count=={k: int(v.split()[0]) for k,v in m['lr_mult'].items()}


def whole(backbone, dims, in_channels, classes=6625, **multi):
    neck = SequenceEncoder(EncoderWithSVTR(in_channels, dims=120, depth=2, hidden_dims=120, use_guide=True, kernel_size=(1,3)))
    nrtr = NRTRHead(in_channels, classes+3, nrtr_dim=384)
    return RecModel(backbone, None, MultiHead(neck, CTCHead(120, classes, fc_decay=1e-5), gtc_head=nrtr), return_all_feats=True)

TEACHER = dict(img_size=[48,320], out_char_num=40, out_channels=192, mixer=['Conv']*6+['Global']*6, local_mixer=[[5,5]]*3)

@pytest.mark.parametrize('name', ['mobile_rec','server_rec','rec_distillation_repaired'])
def test_params(name):
    "Names, order, shapes, own decay and own rates of the unmodified configurations"
    rows = json.loads((GOLDEN/f'params_v4_{name}.json').read_text())['rows']
    with torch.device('meta'):
        nets = dict(mobile_rec=lambda: whole(PPLCNetV3(.95), 120, 480), server_rec=lambda: whole(PPHGNet_small(), 120, 1024),
            rec_distillation_repaired=lambda: nn.ModuleDict(dict(Teacher=whole(SVTRNet(**TEACHER), 120, 192), Student=whole(PPLCNetV3(.95), 120, 480))))[name]()
    linear = {k for k,m in nets.named_modules() if isinstance(m, nn.Linear)}
    state = {k: list(v.shape) for k,v in nets.state_dict().items() if not k.endswith('num_batches_tracked')}
    state = {k: v[::-1] if k.rpartition('.')[0] in linear else v for k,v in state.items()}
    assert list(state.items())==[(ours(k), s) for k,s,*_ in rows]
    params,frozen = dict(nets.named_parameters()),'Teacher.'
    assert {k for k in params if not k.startswith(frozen)}=={ours(k) for k,_,trainable,*_ in rows if trainable}
    decay,rate = own_l2(nets),own_lr(nets)
    for k,_,trainable,l2,lr in rows:
        if not trainable: continue
        p = params[ours(k)]
        assert decay.get(p)==l2 and rate.get(p, 1.)==pytest.approx(lr), k


# %% NRTR
def test_nrtr_writes_what_paddle_writes():
    case = 'NRTR_Transformer_decode/eval'
    net,(x,_) = net_of(case),inputs(case)
    probs,maps = net.write(x)
    ids,best = torch.from_numpy(Z[f'{case}|out|y0']),Z[f'{case}|out|y1']
    assert torch.equal(probs.argmax(-1), ids[:,1:1+probs.shape[1]])
    close(probs.amax(-1).detach(), best[:,1:1+probs.shape[1]], 1e-5)
    assert maps.shape==(2, probs.shape[1], 11) and torch.allclose(maps.sum(-1), torch.ones(2, probs.shape[1]))

def test_kept_keys_are_the_same_as_none():
    torch.manual_seed(0)
    head = NRTRHead(8, 14, 64, 12, 2, use_pos=True).eval()
    x = torch.randn(3, 8, 1, 20)
    with torch.no_grad():
        probs = head(x)
        said = torch.cat([torch.full((3,1), 2), probs.argmax(-1)], 1)
        logits,_ = head.teach(head.before(x), said, torch.full((3,), said.shape[1]-2))
    torch.testing.assert_close(logits.softmax(-1), probs, rtol=0, atol=1e-5)

def test_heads_beside_one_another():
    "In training all, in evaluation CTC, and all for a frozen teacher that is asked for it"
    torch.manual_seed(0)
    neck = SequenceEncoder(EncoderWithSVTR(32, 12, 1, 16, True, 4))
    head = MultiHead(neck, CTCHead(12, 11), gtc_head=NRTRHead(32, 14, 32, 8, 1))
    net = RecModel(PPLCNetV3(.0625), None, head, return_all_feats=True)
    x = torch.randn(2, 3, 48, 320)
    targets = (torch.ones(2, 8, dtype=torch.long), torch.tensor([[2,5,6,3,0,0,0,0],[2,5,3,0,0,0,0,0]]), torch.tensor([2,1]), torch.ones(2))
    out = net(x, targets)
    assert {k: tuple(v.shape) for k,v in out['head_out'].items()}==dict(ctc=(2,40,11), ctc_neck=(2,40,12), gtc=(2,3,15))
    net.eval()
    assert list(net(x))==['head_out'] and net(x)['head_out'].shape==(2,40,11)
    again = net(x, targets, whole=True)
    assert list(again['head_out'])==['ctc','ctc_neck','gtc']
    with pytest.raises(UserError, match='NRTRHead wants targets'): net.train()(x)

def test_a_student_loses_its_guide_on_the_way_out():
    from distillbook.use.export import inference_net
    net = whole(PPLCNetV3(.125), 120, 64, 37).eval()
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        want = net(x)['head_out']
        out = inference_net(net, 'rec')
        torch.testing.assert_close(out(x), want, rtol=0, atol=1e-6)
    names = out.state_dict()
    assert not any('gtc' in k or 'conv_kxk' in k for k in names) and any('reparam_conv' in k for k in names)
    assert any('conv_kxk' in k for k in net.state_dict()) and net.head.gtc_head is not None
