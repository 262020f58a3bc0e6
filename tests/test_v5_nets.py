"The networks of PP-OCRv5, SVTRv2 and RepSVTR against PaddleOCR's own numbers (golden/README.md says how they were made)"
import copy, json
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn

from distillbook.config import build_model
from distillbook.config.networks import build_det
from distillbook.core import UserError
from distillbook.det.nets import DetModel
from distillbook.hgnetv2 import PPHGNetV2_B4
from distillbook.layers import paddle_batchnorm
from distillbook.optim import own_l2
from distillbook.rec.labels import Alphabet
from distillbook.rec.neck import EncoderWithSVTR, SequenceEncoder
from distillbook.rec.nets import CTCHead, MultiHead, RecModel
from distillbook.rec.nrtr import NRTRHead
from distillbook.rec.svtrnet import DropPath
from distillbook.rec.svtrv2 import LastColumns, SVTRv2
from distillbook.repvit import RepSVTR, RepSVTR_det, RepViT
from distillbook.reparam import fuse
from distillbook.schedules import own_lr
from distillbook.use.export import export_onnx
from distillbook.use.weights import load_paddle
from distillbook.backbones import PPLCNetV3
from golden_cases import close, ours, part
from weights_formula import fill4

GOLDEN = Path(__file__).parent/'golden'
Z = np.load(GOLDEN/'modules_v5.npz')


def meta(case): return json.loads(str(Z[f'{case}|meta']))

def reader(m):
    "PP-OCRv5's small recogniser, whose heads have the classes of a case"
    arch = m['Architecture']
    parts,classes = {k: v for h in arch['Head']['head_list'] for k,v in h.items()},arch['Head']['out_channels_list']
    backbone = PPLCNetV3(arch['Backbone']['scale'])
    neck = {k: v for k,v in parts['CTCHead']['Neck'].items() if k!='name'}
    neck = SequenceEncoder(EncoderWithSVTR(backbone.out_channels, **neck))
    ctc = CTCHead(neck.out_channels, classes['CTCLabelDecode'], **parts['CTCHead']['Head'])
    gtc = NRTRHead(backbone.out_channels, classes['NRTRLabelDecode'], **parts['NRTRHead'])
    return RecModel(backbone, None, MultiHead(neck, ctc, gtc_head=gtc))

MAKE = dict(PPHGNetV2_B4=PPHGNetV2_B4, SVTRv2=SVTRv2, RepSVTR=RepSVTR, RepSVTR_det=RepSVTR_det, RepViT=RepViT)

def made(m):
    if 'Architecture' not in m: return MAKE[m['cls']](**m['kwargs'])
    return build_det(m['Architecture']) if m['Architecture']['model_type']=='det' else reader(m)

def stem_of(case): return case.rpartition('/')[0]

def of_first(case, key):
    "What stands in the first of a case's modes"
    for mode in ('eval','train'):
        if f'{stem_of(case)}/{mode}|meta' in Z.files and isinstance(v := meta(f'{stem_of(case)}/{mode}').get(key), dict): return v

def net_of(case):
    "A network with the weights of a case, its names and shapes checked by loading, and without chance"
    m,shapes = meta(case),of_first(case, 'shapes')
    net = made(m)
    load_paddle(net, {k: net.get_buffer(k).numpy() if k.endswith('.pe') else fill4(k, s) for k,s in shapes.items()})
    for o in net.modules():
        if isinstance(o, (nn.Dropout,DropPath)): o.p = 0.
    return paddle_batchnorm(net)

def inputs(case):
    where = next(c for mode in ('eval','train') if f'{(c := f"{stem_of(case)}/{mode}")}|in|x0' in Z.files)
    return torch.from_numpy(Z[f'{where}|in|x0']),[torch.from_numpy(Z[k]) for k in sorted(Z.files) if k.startswith(f'{where}|in|data')]

def named_outputs(net, y):
    if isinstance(net, SVTRv2) and net.last_stage: y = y.squeeze(2).transpose(1, 2) # PaddleOCR's has no rows there
    if isinstance(y, dict): return {f'y.{k}': v for k,v in y.items()}
    return {f'y{i}': o for i,o in enumerate(y)} if isinstance(y, (list,tuple)) else dict(y=y)

def answer(net, x, data): return named_outputs(net, net(x, data) if data else net(x))

CASES = [k[:-5] for k in Z.files if k.endswith('|meta') and not k.endswith('/deploy|meta')]

def test_all_cases():
    assert {stem_of(c) for c in CASES}=={'PPHGNetV2_B4_rec','PPHGNetV2_B4_det','SVTRv2_pool','SVTRv2_laststage_pos','SVTRv2_feat2d','RepSVTR','RepSVTR_det','RepViT_tiny','v5_mobile_rec_small','v5_mobile_det_small'}

@pytest.mark.parametrize('stem', dict.fromkeys(stem_of(c) for c in CASES))
def test_equals_paddle(stem):
    net = net_of(next(c for c in CASES if stem_of(c)==stem))
    if f'{stem}/eval' in CASES: check_eval(f'{stem}/eval', net.eval())
    if f'{stem}/train' in CASES: check_train(f'{stem}/train', net.train())

def check_eval(case, net):
    x,data = inputs(case)
    with torch.no_grad(): outs = answer(net, x, data)
    assert {k: list(v.shape) for k,v in outs.items()}==meta(case)['out_shapes']
    for k,v in outs.items(): close(part(meta(case), k, v.numpy()), Z[f'{case}|out|{k}'], 2e-5)

def probe(y): return (y * torch.arange(y.numel(), dtype=torch.double).mul(0.37).cos().to(y.dtype).reshape(y.shape)).sum()

def check_train(case, net):
    (x,data),m = inputs(case),meta(case)
    for o in net.modules():
        if isinstance(o, LastColumns): o.drop = 0.
    x.requires_grad_()
    outs,floor = answer(net, x, data),m['noise_floor']
    for k,v in outs.items():
        if f'{case}|out|{k}' in Z.files: close(part(m, k, v.detach().numpy()), Z[f'{case}|out|{k}'], max(1e-4, 10*floor['out'][k]))
    sum(probe(v) for v in outs.values()).backward()
    close(part(m, 'x0', x.grad.numpy(), 'stored_grad_part'), Z[f'{case}|grad|x0'], max(1e-4, 10*floor['grad']['x0']))
    top,tolerance = max(v for v in m['gradnorm'].values() if v is not None),max(1e-4, 10*floor['gradnorm_max_rel'])
    for k,want in m['gradnorm'].items():
        got = net.get_parameter(ours(k)).grad
        if want is None: assert got is None, k
        else: assert abs(got.norm().item()-want) <= tolerance*want + 1e-5*top, (k, want)
    state = net.state_dict()
    for k in [k for k in Z.files if k.startswith(f'{case}|bn_after|')]: close(state[ours(k.split('|')[-1])], Z[k], max(1e-4, 10*max(floor['out'].values())))
    for k,want in m.get('bn_after_norms', {}).items(): assert state[ours(k)].norm().item()==pytest.approx(want, rel=2e-3), k

def test_a_fused_detector():
    case = 'v5_mobile_det_small'
    net,(x,_) = net_of(f'{case}/eval').eval(),inputs(f'{case}/eval')
    with torch.no_grad(): before,after = net(x)['maps'],fuse(net)(x)['maps']
    close(after, before.numpy(), 1e-4)
    close(after, Z[f'{case}/deploy|out|y.maps'], 1e-4)
    state,norms = net.state_dict(),meta(f'{case}/deploy')['fused_norms']
    for k in [k for k in Z.files if k.startswith(f'{case}/deploy|w|')]: close(state[k.split('|')[-1]], Z[k], 1e-5)
    for k,want in norms.items(): assert state[k].norm().item()==pytest.approx(want, rel=1e-4)


# %% names
def rows_of(name): return json.loads((GOLDEN/f'params_{name}.json').read_text())['rows']

def config_of(name, tmp_path):
    "The part of a published file that the networks are made of"
    ctc = dict(Neck=dict(name='svtr', dims=120, depth=2, hidden_dims=120, kernel_size=[1,3], use_guide=True), Head=dict(fc_decay=1e-5))
    def rec(backbone, width=120, **nrtr):
        neck = dict(ctc['Neck'], dims=width, hidden_dims=width)
        heads = [dict(CTCHead=dict(Neck=neck, Head=ctc['Head'])), dict(NRTRHead=dict(nrtr_dim=384, max_text_length=25, **nrtr))]
        return dict(model_type='rec', Backbone=backbone, Head=dict(name='MultiHead', head_list=heads))
    def det(backbone, neck, head): return dict(model_type='det', Backbone=backbone, Neck=neck, Head=head)
    teacher = dict(name='SVTRv2', use_pos_embed=False, dims=[128,256,384], depths=[6,6,6], num_heads=[4,8,12], mixer=[['Conv']*6, ['Conv']*2+['Global']*4, ['Global']*6],
        local_k=[[5,5],[5,5],[-1,-1]], sub_k=[[2,1],[2,1],[-1,-1]], last_stage=False, use_pool=True)
    return dict(
        v5_mobile_rec=lambda: rec(dict(name='PPLCNetV3', scale=.95)), v5_server_rec=lambda: rec(dict(name='PPHGNetV2_B4', text_rec=True)),
        v5_mobile_det=lambda: det(dict(name='PPLCNetV3', scale=.75, det=True), dict(name='RSEFPN', out_channels=96, shortcut=True), dict(name='DBHead', k=50, fix_nan=True)),
        v5_server_det=lambda: det(dict(name='PPHGNetV2_B4', det=True), dict(name='LKPAN', out_channels=256, intracl=True), dict(name='PFHeadLocal', k=50, mode='large')),
        svtrv2_rec_distillation=lambda: dict(model_type='rec', name='DistillationModel', Models=dict(Teacher=dict(rec(teacher, 256, num_decoder_layers=2), freeze_params=True, return_all_feats=True),
            Student=dict(rec(dict(name='RepSVTR'), 256, num_decoder_layers=2), return_all_feats=True))))[name]()

@pytest.mark.parametrize('name', ['v5_mobile_rec','v5_server_rec','v5_mobile_det','v5_server_det','svtrv2_rec_distillation'])
def test_params(name, tmp_path):
    "Names, order, shapes, own decay and own rates of the unmodified configurations"
    keys = tmp_path/'keys.txt'
    keys.write_text(''.join(f'{chr(0x4e00+i)}\n' for i in range(6623 if 'svtr' in name else 18383)), encoding='utf-8')
    cfg = dict(Global=dict(character_dict_path=str(keys), use_space_char=True), Architecture=config_of(name, tmp_path))
    with torch.device('meta'): net = build_model(cfg)
    linear = {k for k,m in net.named_modules() if isinstance(m, nn.Linear)}
    state = {k: list(v.shape) for k,v in net.state_dict().items() if not k.endswith('num_batches_tracked')}
    state = {k: v[::-1] if k.rpartition('.')[0] in linear else v for k,v in state.items()}
    rows = rows_of(name)
    want = [(ours(k), s) for k,s,*_ in rows]
    assert list(state.items())==want if 'det' not in name else state==dict(want) # Of `IntraCL` we make the layers in another order
    params,decay,rate = dict(net.named_parameters()),own_l2(net),own_lr(net)
    assert {k for k,p in params.items() if p.requires_grad}=={ours(k) for k,_,trainable,*_ in rows if trainable}
    for k,_,trainable,l2,lr in rows:
        if not trainable: continue
        p = params[ours(k)]
        assert decay.get(p)==l2 and rate.get(p, 1.)==pytest.approx(lr), k


# %% what they refuse
def test_networks_that_are_none():
    with pytest.raises(UserError, match='one is wanted'): PPHGNetV2_B4(det=True, text_rec=True)
    with pytest.raises(UserError, match='five rates'): PPHGNetV2_B4(det=True, lr_mult_list=[1.])
    with pytest.raises(UserError, match='from 1/16'): PPHGNetV2_B4(det=True, scale=.01)
    with pytest.raises(UserError, match='one value for each of 3 stages'): SVTRv2(dims=[16,32])
    with pytest.raises(UserError, match='one for each block'): SVTRv2(mixer=[['Conv']]*3)
    with pytest.raises(UserError, match='2 heads do not divide 63'): SVTRv2(dims=[63,128,256])
    with pytest.raises(UserError, match='two odd numbers'): SVTRv2(local_k=[[4,4]]*3)
    with pytest.raises(UserError, match='places are known for 32 x 64 pixels, not for 48 x 64'): SVTRv2(use_pos_embed=True, max_sz=[32,64])(torch.zeros(2, 3, 48, 64))
    with pytest.raises(UserError, match='for each block, not'): RepViT([[3, 4, 16, 0, 0, 1]])

def test_what_svtrv2_is_told_it_does():
    "PaddleOCR's class does not read these three keys"
    net = SVTRv2(local_k=[[3,7],[3,7],[5,5]], drop_rate=.25, attn_drop_rate=.5)
    assert {tuple(m.kernel_size) for m in net.stages.modules() if isinstance(m, nn.Conv2d) and m.groups>1}=={(3,7)}
    assert {m.p for m in net.stages.modules() if isinstance(m, nn.Dropout)}=={.25,.5}


# %% out of the house
SMALL_SVTR = dict(dims=(16,24,32), depths=(1,2,1), num_heads=(2,4,4), mixer=(('Conv',), ('Conv','Global'), ('Global',)), sub_k=((2,1),(2,1),(1,1)), use_pool=True)
LITTLE = [(3, 2, 16, 1, 0, 1), (3, 2, 24, 0, 1, (2,1)), (3, 2, 24, 1, 1, 1), (3, 2, 32, 1, 1, (2,1))]
READERS = dict(PPHGNetV2_B4=lambda: PPHGNetV2_B4(text_rec=True, scale=.0625), SVTRv2=lambda: SVTRv2(**SMALL_SVTR), RepSVTR=lambda: RepViT(LITTLE))
FINDERS = dict(PPHGNetV2_B4=lambda: PPHGNetV2_B4(det=True, scale=.0625), RepSVTR_det=lambda: RepViT([(3, 2, 8, 1, 0, 1), (3, 2, 16, 0, 1, 2), (3, 2, 16, 1, 1, 2), (3, 2, 24, 0, 1, 2)], [1,2,3,4]))

def awake(net, *part):
    "With batch norms that do something, and numbers of a size that ONNX's can be compared with"
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = 1.
    with torch.no_grad(): (part[0] if part else net).train()(torch.randn(8, 3, 128, 128))
    return net.eval()

@pytest.mark.parametrize('name', READERS)
def test_readers_become_onnx(name, tmp_path):
    "Of any width and batch; the file's numbers are compared by the export itself"
    backbone = READERS[name]()
    neck = SequenceEncoder(EncoderWithSVTR(backbone.out_channels, 8, 1, 16, True, 4))
    net = awake(RecModel(backbone, None, MultiHead(neck, CTCHead(8, 11), gtc_head=NRTRHead(backbone.out_channels, 14, 32, 8, 1)), return_all_feats=True), backbone)
    assert export_onnx(net, tmp_path/'x.onnx', 'rec', Alphabet('0123456789')).stat().st_size

@pytest.mark.parametrize('name', FINDERS)
def test_finders_become_onnx(name, tmp_path):
    from distillbook.det.neck import RSEFPN
    from distillbook.det.nets import DBHead
    backbone = FINDERS[name]()
    net = awake(DetModel(backbone, RSEFPN(backbone.out_channels, 16), DBHead(16)))
    assert export_onnx(net, tmp_path/'x.onnx', 'det', shape=(3,None,None)).stat().st_size

def test_branches_become_one_kernel():
    net = awake(RepViT(LITTLE))
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad(): before,after = net(x),fuse(copy.deepcopy(net))(x)
    close(after, before.numpy(), 1e-5)
    names = fuse(net).state_dict()
    assert not any('conv1' in k for k in names) and sum('reparam_conv.weight' in k for k in names)==2
