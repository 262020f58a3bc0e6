"The released PP-OCRv6: equal to onnxruntime, every weight of the files used, and trained; exported again"
import copy, json
import numpy as np, pytest, torch
from distillbook.config import build_model, load_config
from distillbook.config.networks import DICTIONARIES, characters
from distillbook.core import UserError
from distillbook.data.render import font_files, make_words
from distillbook.det.losses import db_focal
from distillbook.det.nets import DBHead, DetModel
from distillbook.det.replk import RepLKPAN
from distillbook.det.render import render_page
from distillbook.lcnetv4 import PPLCNetV4
from distillbook.rec.labels import Alphabet
from distillbook.rec.losses import ctc_loss
from distillbook.rec.nets import ppocrv6_rec
from distillbook.reparam import fuse
from distillbook.use.export import export_onnx, inference_net, open_onnx
from distillbook.use.fused import load_fused, made_pictures, used_in_order
from distillbook.use.released import TEACHERS, teacher_file
from distillbook.use.teachers import load_teacher, onnx_session
from distillbook.use.weights import load_weights

V6 = [k for k in TEACHERS if k.startswith('PP-OCRv6')]

@pytest.fixture(scope='module')
def nets():
    "Each loaded once; whoever trains one takes a copy"
    loaded = {k: load_teacher(k) for k in V6}
    return {k: o[0] if isinstance(o, tuple) else o for k,o in loaded.items()}

def pages(n=1):
    words,made = make_words(100),[]
    for seed in range(n):
        page,*_ = render_page(np.random.default_rng(seed+2), 160, 256, words, font_files('dejavu'), size=(14,40))
        made.append(((torch.tensor(page)/255-torch.tensor([.485,.456,.406]))/torch.tensor([.229,.224,.225])).permute(2,0,1).float())
    return torch.stack(made)

def answer(net, x):
    y = net(x)
    return y['maps'] if isinstance(y, dict) else y.softmax(-1)

@pytest.mark.parametrize('name', V6)
def test_says_what_onnxruntime_says(nets, name):
    net,session = nets[name],onnx_session(teacher_file(name), 1)
    x = pages(2) if TEACHERS[name].task=='det' else made_pictures(net)[:4]
    want = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad(): got = answer(net, x).numpy()
    assert want.max()>.9 and np.abs(got-want).max()<1e-4
    if TEACHERS[name].task=='rec': assert (got.argmax(-1)==want.argmax(-1)).all()

@pytest.mark.parametrize('name', V6)
def test_every_weight_is_used_and_every_parameter_learns(nets, name):
    net = copy.deepcopy(nets[name])
    of_file = sum(a.size for _,a in used_in_order(teacher_file(name)))
    one = fuse(copy.deepcopy(net))
    own = {k: v for k,v in one.state_dict().items() if not k.endswith('num_batches_tracked')}
    norms = [k.removesuffix('running_var') for k,v in own.items() if k.endswith('running_var')]
    in_file = {k for k in norms if not ('backbone' in k and name!='PP-OCRv6_tiny_rec' or k.startswith('head.binarize') or 'backbone.blocks' in k)}
    n = sum(v.numel() for k,v in own.items() if not any(k.startswith(o) for o in norms) or any(k.startswith(o) for o in in_file))
    folded = [k for k in norms if k not in in_file]
    n += sum(own[f'{k}bias'].numel() for k in folded if k!='head.binarize.conv_bn2.') # The transposed convolution has a bias of its own
    assert n==of_file
    x = pages() if TEACHERS[name].task=='det' else made_pictures(net)[:2]
    if TEACHERS[name].task=='det': loss = net.train()(x)['maps'].square().mean()
    else: loss = ctc_loss(net.train()(x), torch.tensor([[5,6,7],[8,9,0]]), torch.tensor([3,2]))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())

def test_into_a_configuration_with_guides_and_auxiliary_heads(caplog):
    "The rest begins anew, and the log says what; a few steps move the loss"
    torch.manual_seed(0)
    with caplog.at_level('INFO'): net = build_model(load_config('det/ppocrv6', ['Global.pretrained_model=PP-OCRv6_tiny_det', 'Architecture.Backbone.model_size=tiny',
        'Architecture.Neck={name: RepLKFPN, out_channels: 64, dilated_kernel_size: 5}', 'Architecture.Head.aux_in_channels=64']))
    assert 'which has nothing for head.thresh, head.aux_binarize_p4' in caplog.text
    x,maps = pages(),[torch.full((1,160,256), v) for v in (.3, 1., 0., 1.)]
    opt,losses = torch.optim.Adam(net.parameters(), 1e-3),[]
    for _ in range(3):
        out = net.train()(x)
        assert set(out)=={'maps','aux_maps_p4','aux_maps_p3','aux_maps_p2'}
        loss = sum(db_focal(o, *maps) for o in out.values())
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1]<losses[0]

def test_a_file_of_another_network(tmp_path):
    with pytest.raises(UserError, match='does not fit: conv2d_'): load_fused(ppocrv6_rec(37), teacher_file('PP-OCRv6_tiny_rec'))
    net = ppocrv6_rec(6906, model_size='tiny')
    before = {k: v.clone() for k,v in net.state_dict().items()}
    with pytest.raises(UserError, match='does not fit'): load_weights(net, teacher_file('PP-OCRv6_rec'))
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

@pytest.mark.parametrize('file,name,n', [('ppocrv6_dict.txt', 'PP-OCRv6_rec', 18709), ('ppocrv6_tiny_dict.txt', 'PP-OCRv6_tiny_rec', 6905)])
def test_dictionaries_of_the_released(file, name, n):
    "PaddleOCR's dictionary is not here, and the released recogniser has the same characters"
    assert DICTIONARIES[file]==name
    chars = characters(dict(Global=dict(character_dict_path=f'ppocr/utils/dict/{file}', use_space_char=True)))
    assert chars==Alphabet.from_onnx(teacher_file(name)).chars and len(chars)==n and chars[-1]==' '

@pytest.mark.parametrize('name', V6)
def test_exported_again(nets, name, tmp_path):
    "What leaves has no branches, and says the same"
    task = TEACHERS[name].task
    chars = Alphabet.from_onnx(teacher_file(name)) if task=='rec' else None
    path = export_onnx(nets[name], tmp_path/'net.onnx', task=task, **(dict(alphabet=chars) if chars else dict(shape=(3,None,None))))
    session,_ = open_onnx(path, 1)
    x = pages() if task=='det' else made_pictures(nets[name])[:2]
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad(): assert np.abs(answer(nets[name], x).numpy()-got).max()<1e-4
    assert path.stat().st_size < 1.1*TEACHERS[name].size+2e5

def test_the_neck_of_the_medium_detector_is_exported(tmp_path):
    "Nobody has released its weights in a wheel, and it leaves all the same"
    torch.manual_seed(0)
    backbone = PPLCNetV4('tiny', det=True)
    net = DetModel(backbone, RepLKPAN(backbone.out_channels, 16, intracl=True), DBHead(16, aux_in_channels=16)).eval()
    session,_ = open_onnx(export_onnx(net, tmp_path/'net.onnx', task='det', shape=(3,None,None)), 1)
    got = session.run(None, {session.get_inputs()[0].name: pages().numpy()})[0]
    assert got.shape==(1,1,160,256) # Its numbers were compared when it was written
    assert not any('dil_' in k or 'aux_' in k for k in inference_net(net, 'det').state_dict())
