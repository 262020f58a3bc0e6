"PP-OCRv5, SVTRv2 and RepSVTR as their users have them: configurations that train, and released weights that train"
import copy, json, logging
from pathlib import Path
import cv2, numpy as np, pytest, torch
from torch import nn
from distillbook.config import build_model, experiment, load_config
from distillbook.config.networks import characters, say_once
from distillbook.core import UserError
from distillbook.data.render import font_files, make_words
from distillbook.det.losses import db_parts
from distillbook.det.nets import DetModel
from distillbook.det.render import render_page
from distillbook.rec.nets import ppocrv4_rec
from distillbook.rec.render import fit_line, render_word
from distillbook.reparam import fuse
from distillbook.use.fused import load_fused, used_in_order
from distillbook.use.released import TEACHERS, teacher_file
from distillbook.use.teachers import load_teacher, onnx_session
from distillbook.use.training import train
from distillbook.use.weights import load_weights
from golden_cases import learns
from test_paddle_det import overrides, pages
from test_v4_rec import words

CONFIGS = Path(__file__).parents[1]/'configs'


# %% configurations
CTC = "CTCHead: {Neck: {name: svtr, dims: 8, depth: 1, hidden_dims: 16, kernel_size: [1, 3], use_guide: true}, Head: {fc_decay: 0.00001}}"
HEADS = f"[{{{CTC}}}, {{NRTRHead: {{nrtr_dim: 32, num_decoder_layers: 1, max_text_length: 25}}}}]"
BACKBONES = dict(
    server='{name: PPHGNetV2_B4, text_rec: true, scale: 0.0625}',
    SVTRv2='{name: SVTRv2, dims: [8,16,24], depths: [1,2,1], num_heads: [2,2,4], sub_k: [[2,1],[2,1],[-1,-1]], local_k: [[5,5],[5,5],[-1,-1]], mixer: [[Conv],[Conv,Global],[Global]], use_pool: true}')

def small_run(words, out):
    "Lines, sizes and steps such that an epoch takes seconds"
    data = [f'{side}.dataset.{k}={v}' for side in ('Train','Eval') for k,v in (('data_dir', words), ('label_file_list', f'[{words}/lines.txt]'))]
    return [f'Global.save_model_dir={out}', 'Global.use_gpu=false', 'Global.epoch_num=1', 'Global.character_dict_path=', 'Global.use_space_char=false', *data, 'Train.sampler.scales=[[64,32],[64,48]]', 'Train.sampler.first_bs=4',
        *[f'{side}.loader.{k}' for side in ('Train','Eval') for k in ('batch_size_per_card=4','num_workers=0')], 'Eval.dataset.transforms.2.RecResizeImg.image_shape=[3,48,64]']

def test_a_recogniser_trains(words, tmp_path):
    cfg = load_config(CONFIGS/'rec'/'ppocrv5.yml', [*small_run(words, tmp_path), 'Global.pretrained_model=', f'Architecture.Backbone={BACKBONES["server"]}', f'Architecture.Head.head_list={HEADS}'])
    exp = experiment(cfg)
    before = copy.deepcopy(dict(exp.nets.named_parameters()))
    learn = train(exp)
    losses = torch.stack(list(learn.term_recorder.steps))
    assert len(losses)>=2 and losses.isfinite().all() and (tmp_path/'latest.pth').exists() and json.loads((tmp_path/'summary.json').read_text())
    still = {k for k,p in learn.model.named_parameters() if torch.equal(p, before[k])}
    assert {k.removeprefix('Model.') for k in still}==({f'backbone.{k}' for k in ('last_conv.weight','fc.weight','fc.bias')})

def test_svtrv2_teaches_repsvtr(words, tmp_path, caplog):
    "By the name that PaddleOCR's file has for it, and no code of PaddleOCR's"
    models = 'Architecture.Models'
    small = [f'{models}.Teacher.Backbone={BACKBONES["SVTRv2"]}', f'{models}.Student.Backbone={{name: repvit_svtr}}', *[f'{models}.{n}.Head.head_list={HEADS}' for n in ('Teacher','Student')]]
    path = CONFIGS/'rec'/'svtrv2_distillation.yml'
    with pytest.raises(UserError, match='this network is frozen and teaches, but has no weights'): experiment(load_config(path, [*small_run(words, tmp_path), *small]))
    say_once.cache_clear()
    with caplog.at_level(logging.INFO, 'distillbook'): exp = experiment(load_config(path, [*small_run(words, tmp_path), *small, f'{models}.Teacher.pretrained=none']))
    assert sum('repvit_svtr is what RepSVTR was called' in r.getMessage() for r in caplog.records)==1
    before = copy.deepcopy(exp.nets['Teacher'].state_dict())
    learn = train(exp)
    assert [str(t.name) for t in exp.terms]==['dkd_0','loss_ctc_Student_0','loss_nrtr_Student_0','ctc_logits_0']
    assert torch.stack(list(learn.term_recorder.steps)).isfinite().all() and all(torch.equal(v, before[k]) for k,v in learn.model['Teacher'].state_dict().items())
    spared = [h['weight_decay'] if 'weight_decay' in h else h.get('wd') for h in learn.opt.opt.param_groups]
    assert {round(o, 3) for o in spared}=={0.,.05}

def test_a_detector_trains(pages, tmp_path):
    which = 'ppocrv5_server'
    o = [*overrides(pages, tmp_path/'run', which), 'Architecture.Backbone.scale=0.0625', 'Architecture.Neck.out_channels=32', 'Train.loader.batch_size_per_card=6', 'Global.epoch_num=1']
    exp = experiment(load_config(CONFIGS/'det'/f'{which}.yml', o))
    assert 'loss_cbn' in [t.name for t in exp.terms]
    learn = train(exp)
    assert learn.summary and (tmp_path/'run/best_accuracy.pth').exists() and torch.stack(list(learn.term_recorder.steps)).isfinite().all()


# %% released weights
@pytest.fixture(scope='module')
def released():
    "Lines, and what onnxruntime makes of them"
    file,rng = teacher_file('PP-OCRv5_rec'),np.random.default_rng(3)
    lines = [render_word(o, font_files('dejavu')[i%4], rng, noise=False) for i,o in enumerate(make_words(3, 5))]
    x = torch.from_numpy(np.stack([fit_line(np.repeat(o[...,None], 3, 2), 48, 320) for o in lines]))
    session = onnx_session(file)
    return file,x,torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

def unused(file, net):
    "Parameters and statistics of the fused network that the file has nothing for"
    state = fuse(copy.deepcopy(net)).state_dict()
    return sum(v.numel() for k,v in state.items() if not k.endswith('num_batches_tracked'))-sum(w.size for _,w in used_in_order(file))

@pytest.mark.parametrize('fused', [True,False])
def test_the_released_recogniser_is_a_network_that_trains(released, fused):
    "Fused and with branches: every weight of the file, onnxruntime's answers, in training mode too where it was calibrated, and a loss that falls"
    file,x,want = released
    net = load_fused(ppocrv4_rec(18385, fused=fused), file, pictures=x)
    assert unused(file, net)==0
    for m in net.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    with torch.no_grad():
        assert (net.eval()(x).softmax(-1)-want).abs().max()<1e-4
        assert fused or (net.train()(x).softmax(-1)-want).abs().max()<1e-2
    learns(net, x, want.argmax(-1)+1) # The class behind the right one: something to learn

def test_released_weights_by_name(released, caplog):
    file,x,want = released
    assert TEACHERS['PP-OCRv5_rec'].trains and TEACHERS['PP-OCRv5_det'].trains
    net,alphabet = load_teacher('PP-OCRv5_rec', return_all_feats=True)
    with torch.no_grad(): out = net(x)
    assert (out['head_out']['ctc'].softmax(-1)-want).abs().max()<1e-4 and out['backbone_out'].shape==(3,480,1,40) and len(alphabet)==18385
    with pytest.raises(UserError, match=r'does not fit: linear_\d+.w_0 is \[18385, 120\] in the file'): load_weights(ppocrv4_rec(37, fused=True), file)
    with caplog.at_level(logging.INFO, 'distillbook'): model = build_model(load_config(CONFIGS/'rec'/'ppocrv5.yml', ['Architecture.Head.head_list.1.NRTRHead.nrtr_dim=32', 'Architecture.Head.head_list.1.NRTRHead.num_decoder_layers=1']))
    assert 'which has nothing for head.before_gtc, head.gtc_head' in caplog.text
    with torch.no_grad(): assert (model.eval()(x)-want).abs().max()<1e-4

@pytest.mark.parametrize('fused', [True,False])
def test_the_released_detector_says_what_onnxruntime_says_and_trains(fused):
    path = teacher_file('PP-OCRv5_det')
    torch.manual_seed(0)
    net = build_model(load_config(CONFIGS/'det'/'ppocrv4_mobile.yml', [f'Architecture.Backbone.fused={fused}', 'Global.pretrained_model=PP-OCRv5_det']))
    session,said = onnx_session(path, 1),make_words(100)
    page,*_ = render_page(np.random.default_rng(2), 160, 256, said, font_files('dejavu'), size=(14,40))
    x = ((torch.tensor(page)/255-torch.tensor([.485,.456,.406]))/torch.tensor([.229,.224,.225])).permute(2,0,1)[None].float()
    want = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad(): got = net.eval()(x)['maps']
    assert want.max()>.9 and np.abs(got.numpy()-want).max()<1e-4
    asleep = sum(p.numel() for k,p in net.named_parameters() if k in UNUSED)
    assert unused(path, nn.ModuleList([net.backbone, net.neck, net.head.binarize]))==asleep
    loss = sum(db_parts(net.train()(x)['maps'], *[torch.full(x.shape[:1]+x.shape[2:], v) for v in (.3, 1., 1., 1.)]).values())
    loss.backward()
    assert loss.isfinite() and {k for k,p in net.named_parameters() if p.grad is None}==UNUSED and all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)

UNUSED = {f'backbone.blocks{s}.0.dw_conv.act.lab.{k}' for s in (3,4,5,6) for k in ('scale','bias')} # Behind a stride of 2 there is no activation, in PaddleOCR either


def a_seal(n):
    "Red letters on the upper half of a circle, on white [n,n,3]"
    strip = render_word('PRONGHORN SEAL', font_files('dejavu')[0], np.random.default_rng(0), n//8, n*8//5, noise=False)
    y,x = np.mgrid[:n,:n].astype(np.float32)-n/2
    along,up = (np.arctan2(y, x)+np.pi)/np.pi*.9*strip.shape[1],.39*n-np.hypot(x, y)
    ink = cv2.remap(strip, along.astype(np.float32), up.astype(np.float32), cv2.INTER_LINEAR, borderValue=255)
    page = np.full((n,n,3), 255, np.uint8)
    page[(ink<128) & (y<0)] = 200,40,40
    return cv2.circle(page, (n//2,n//2), n*3//7, (200,40,40), n//64)

def test_a_detector_of_seals_is_that_of_pages():
    net,session = load_teacher('PP-OCRv4_seal_det'),onnx_session(teacher_file('PP-OCRv4_seal_det'), 1)
    x = ((torch.tensor(a_seal(384))/255-torch.tensor([.485,.456,.406]))/torch.tensor([.229,.224,.225])).permute(2,0,1)[None].float()
    with torch.no_grad(): got = net(x)['maps'].numpy()
    want = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert isinstance(net, DetModel) and want.max()>.9 and np.abs(got-want).max()<1e-4


# %% dictionaries
def test_the_dictionary_comes_from_the_released_recogniser(tmp_path, caplog):
    say_once.cache_clear()
    named = dict(Global=dict(character_dict_path='./ppocr/utils/dict/ppocrv5_dict.txt', use_space_char=True))
    with caplog.at_level(logging.INFO, 'distillbook'): found = characters(named)
    assert len(found)==18384 and found[-1]==' ' and 'its characters are taken from the released PP-OCRv5_rec' in caplog.text
    assert found==characters(dict(Global=dict(character_dict_path='PP-OCRv5_rec', use_space_char=True)))
    own = tmp_path/'ppocrv5_dict.txt'
    own.write_text('a\nb\n')
    assert characters(dict(Global=dict(character_dict_path=str(own))))==['a','b']
