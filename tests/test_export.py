"Exported files: the same numbers, the right words in them, read by others; and what cannot be exported"
import copy, json
from pathlib import Path
import cv2, numpy as np, onnx, pytest, torch
from torch import nn
from distillbook.config import build_model, load_config
from distillbook.config.networks import characters
from distillbook.core import UserError
from distillbook.det.nets import plain_det
from distillbook.det.render import render_page
from distillbook.use.export import *
from distillbook.rec.render import normalise, render_words
from distillbook.rec.labels import Alphabet
from distillbook.rec.nets import PlainStudent, Sliced, ppocrv3_rec
from distillbook.use.teachers import OnnxNet, load_teacher
from distillbook.use.results import Trained
from distillbook.data.render import font_files, make_words
from small_nets import small_det, small_rec

AB = Alphabet('0123456789abcdefghijklmnopqrstuvwxyz')

def lively(net, seed=0):
    "A net whose answers depend on the picture: running statistics and last layers that are not at their beginning"
    torch.manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .1); m.running_var.uniform_(.5, 1.5)
        if isinstance(m, nn.Linear): m.weight.data *= 3
    return net.eval()

RECS = dict(heads=lambda: small_rec(AB), plain=lambda: PlainStudent(37, (8,8,8,16)), sliced=lambda: Sliced(PlainStudent(50, (8,8,8,16)), range(37)), v3=lambda: ppocrv3_rec(37, return_all_feats=True))

@pytest.mark.parametrize('name', RECS)
def test_recognisers(name, tmp_path):
    torch.manual_seed(1)
    net = lively(RECS[name]())
    before = {k: v.clone() for k,v in net.state_dict().items()}
    path = export_onnx(net, tmp_path/'r.onnx', 'rec', AB, about=dict(net='R', metrics=dict(acc=.5)))
    session,about = open_onnx(path)
    assert (about['character'], about['shape'], about['task'], about['net'], about['metrics'])==(AB.chars, [3,48,None], 'rec', 'R', dict(acc=.5))
    assert Alphabet.from_onnx(path).chars==AB.chars
    for n,w in ((1,64), (3,320), (2,416)):
        x = torch.randn(n, 3, 48, w)
        with torch.no_grad(): y = net(x)
        while isinstance(y, dict): y = y.get('head_out', y.get('ctc'))
        want = y if name=='heads' else y.softmax(-1)
        got = session.run(None, dict(x=x.numpy()))[0]
        assert got.shape[0]==n and np.abs(got-want.numpy()).max()<1e-5
        np.testing.assert_allclose(got.sum(-1), 1, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and not net.training

SVTR = '{name: SVTRNet, img_size: [48,64], embed_dim: [16,24,32], depth: [1,2,1], num_heads: [2,2,2], mixer: [Conv,Conv,Local,Global], out_char_num: 16, out_channels: 16}'

def test_recognisers_of_ppocrv4(tmp_path):
    "Batches and widths stay free where they are; SVTRNet has one size"
    heads = [f'Architecture.Models.{n}.Head.head_list.{o}' for n in ('Teacher','Student') for o in ('0.CTCHead.Neck.dims=8', '0.CTCHead.Neck.depth=1', '0.CTCHead.Neck.hidden_dims=16', '1.NRTRHead.nrtr_dim=32', '1.NRTRHead.num_decoder_layers=1')]
    config = load_config('rec/ppocrv4_distillation', [*heads, f'Architecture.Models.Teacher.Backbone={SVTR}', 'Architecture.Models.Teacher.pretrained=', 'Architecture.Models.Student.Backbone.scale=0.0625'])
    model,alphabet = build_model(config),Alphabet(characters(config))
    for name,shape,sizes in (('Student', (3,48,None), ((1,48,64),(3,48,320))), ('Teacher', (3,48,64), ((1,48,64),(3,48,64))), ('Student', (3,32,None), ((1,32,64),))):
        net = model[name].eval()
        session,_ = open_onnx(export_onnx(net, tmp_path/'r.onnx', 'rec', alphabet, shape=shape))
        for size in sizes:
            x = torch.randn(size[0], 3, *size[1:])
            with torch.no_grad(): want = net(x)
            while isinstance(want, dict): want = want.get('head_out', want.get('ctc'))
            got = session.run(None, dict(x=x.numpy()))[0]
            assert got.shape[0]==size[0] and np.abs(got-want.numpy()).max()<1e-5

def test_nothing_that_only_trains_is_in_the_file(tmp_path):
    net = small_rec(AB)
    path = export_onnx(net, tmp_path/'r.onnx', 'rec', AB)
    ops = {n.op_type for n in onnx.load(path).graph.node}
    assert 'LSTM' not in ops and 'Softmax' in ops
    assert open_onnx(path)[1]['parameters']==sum(p.numel() for k,p in net.named_parameters() if 'sar_head' not in k)<sum(p.numel() for p in net.parameters())
    det = export_onnx(small_det(), tmp_path/'d.onnx', 'det', shape=(3,None,None))
    assert sum(n.op_type=='ConvTranspose' for n in onnx.load(det).graph.node)==2

@pytest.mark.parametrize('make', [small_det, plain_det, lambda: load_teacher('PP-OCRv3_det'), lambda: load_teacher('PP-OCRv4_det')], ids=['small', 'plain', 'v3', 'v4'])
def test_detectors(make, tmp_path):
    net = make().eval()
    session,_ = open_onnx(export_onnx(net, tmp_path/'d.onnx', 'det', shape=(3,None,None)))
    image,*_ = render_page(np.random.default_rng(0), 160, 224, make_words(50), font_files('dejavu'))
    for x in (torch.randn(2,3,64,96), torch.tensor((image/255-[.485,.456,.406])/[.229,.224,.225]).permute(2,0,1)[None].float()):
        with torch.no_grad(): want = net(x)['maps'].numpy()
        assert np.abs(session.run(None, dict(x=x.numpy()))[0]-want).max()<1e-4  # A page's edges are steep

def test_torch_program(tmp_path):
    net = lively(small_rec(AB))
    extra = {'about.json': ''}
    program = torch.export.load(export_torch(net, tmp_path/'r.pt2', 'rec', AB), extra_files=extra).module()
    assert json.loads(extra['about.json'])['character'].split('\n')==AB.chars
    for n,w in ((1,64), (4,352)):
        x = torch.randn(n, 3, 48, w)
        with torch.no_grad(): assert (program(x)-net(x)['head_out']).abs().max()<1e-5
    assert '2' in model_card(tmp_path/'r.pt2').read_text()

def test_any_network(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    session,about = open_onnx(export_onnx(net, tmp_path/'n.onnx', shape=(3,32,32)))
    x = torch.randn(5,3,32,32)
    with torch.no_grad(): np.testing.assert_allclose(session.run(None, dict(x=x.numpy()))[0], net(x).numpy(), atol=1e-5)
    assert about['task'] is None and 'network' in model_card(tmp_path/'n.onnx').read_text()

def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr('distillbook.use.export._differ', lambda *a: 1e-3)
    with pytest.raises(UserError, match='differ'): export_onnx(PlainStudent(37, (8,8,8,8)), tmp_path/'r.onnx', 'rec', AB)
    assert not list(tmp_path.iterdir())

class Waves(nn.Module):
    "What ONNX has no word for"
    def __init__(self): super().__init__(); self.fc = nn.Linear(8, 37)
    def forward(self, x): return self.fc(torch.linalg.eigvals(x[:,0,:8,:8]).abs()[:,None])

class OneSize(nn.Module):
    "Right for the batch that it is traced with, and for no other"
    def __init__(self): super().__init__(); self.fc = nn.Linear(8, 37)
    def forward(self, x): return self.fc(x[:,:1,0,:8].unflatten(0, (len(x.tolist()),)))

@pytest.mark.parametrize('net,says', [(Waves(), 'PyTorch cannot write this network as ONNX'), (OneSize(), 'onnxruntime cannot run it on pictures')])
def test_what_onnx_cannot_say_is_one_line(net, says, tmp_path):
    with pytest.raises(UserError, match=says): export_onnx(net, tmp_path/'w.onnx', 'rec', AB)
    assert not list(tmp_path.iterdir())

def test_mistakes(tmp_path):
    net = PlainStudent(37, (8,8,8,8))
    with pytest.raises(UserError, match='with its alphabet'): export_onnx(net, tmp_path/'r.onnx', 'rec')
    with pytest.raises(UserError, match="no task 'rek'; did you mean 'rec'"): export_onnx(net, tmp_path/'r.onnx', 'rek')
    with pytest.raises(UserError, match='its file is there already'): export_onnx(OnnxNet('PP-OCRv3_rec'), tmp_path/'r.onnx', 'rec', AB)
    with pytest.raises(UserError, match='onnxruntime cannot run it'): open_onnx(__file__)
    with pytest.raises(UserError, match='no networks'): Ensemble([])
    with pytest.raises(UserError, match='have no mean'): mean_weights([net, PlainStudent(36, (8,8,8,8))])

def test_ensembles(tmp_path):
    nets = {n: lively(PlainStudent(37, (8,8,8,8)), i) for i,n in enumerate('abc')}
    x = torch.randn(2,3,48,96)
    with torch.no_grad():
        want = torch.stack([n(x).softmax(-1) for n in nets.values()]).mean(0)
        assert torch.allclose(Ensemble(nets, 'rec')(x), want, atol=1e-6)
        same = mean_weights([nets['a'], copy.deepcopy(nets['a'])])
        assert torch.allclose(same(x), nets['a'](x), atol=1e-6)
    got = open_onnx(export_onnx(Ensemble(nets, 'rec'), tmp_path/'e.onnx', 'rec', AB))[0].run(None, dict(x=x.numpy()))[0]
    assert np.abs(got-want.numpy()).max()<1e-5

def test_int8(tmp_path):
    train = render_words(make_words(16), font_files('dejavu'))
    path = export_onnx(lively(PlainStudent(37, (8,16,16,16))), tmp_path/'r.onnx', 'rec', AB)
    small = quantise(path, [normalise(train.images[:8], train.widths[:8])], tmp_path/'q.onnx')
    session,about = open_onnx(small)
    assert about['character']==AB.chars and '8 pictures' in about['quantised']
    assert any(n.op_type=='QuantizeLinear' for n in onnx.load(small).graph.node)
    assert session.run(None, dict(x=normalise(train.images[8:], train.widths[8:]).numpy()))[0].shape==(8,20,37)
    with pytest.raises(UserError, match='without pictures'): quantise(path, [], tmp_path/'x.onnx')
    assert not (tmp_path/'x.onnx').exists()

def test_runs(tmp_path):
    nets = dict(Teacher=PlainStudent(37, (8,8,8,8)), Student=PlainStudent(37, (8,8,8,8)), Student2=PlainStudent(37, (8,8,8,8)))
    ready = Trained({n: m.eval() for n,m in nets.items()}, 'rec', AB, (3,48,None), (.5,)*3, (.5,)*3, dict(acc=.9, Student2_acc=.8, Teacher_acc=.7), dict(Global=dict(seed=1)))
    made = export_trained(ready, 'all', 'onnx', tmp_path)
    assert [open_onnx(p)[1]['metrics'] for p in made]==[dict(Teacher_acc=.7), dict(acc=.9), dict(Student2_acc=.8)]
    assert 'seed: 1' in (tmp_path/'Student.md').read_text() and 'rapidocr' in (tmp_path/'Student.md').read_text()
    with pytest.raises(UserError, match="no net 'Studnet'; did you mean 'Student'"): export_trained(ready, 'Studnet', 'onnx', tmp_path)

@pytest.fixture(scope='module')
def rapid(tmp_path_factory):
    "The real rapidocr with our exports of the released nets"
    from rapidocr import RapidOCR
    folder = tmp_path_factory.mktemp('rapid')
    rec,alphabet = load_teacher('PP-OCRv3_rec')
    export_onnx(rec, folder/'rec.onnx', 'rec', alphabet)
    export_onnx(load_teacher('PP-OCRv3_det'), folder/'det.onnx', 'det', shape=(3,None,None), mean=(.485,.456,.406), std=(.229,.224,.225))
    return RapidOCR(params={'Det.model_path': str(folder/'det.onnx'), 'Rec.model_path': str(folder/'rec.onnx'), 'Det.mean': [.485,.456,.406], 'Det.std': [.229,.224,.225], 'Global.use_cls': False, 'Global.log_level': 'error'})

def test_rapidocr_reads_a_page_with_our_files(rapid):
    image,_,texts = render_page(np.random.default_rng(18), 360, 480, make_words(200, seed=5), font_files('dejavu'), words_max=14, size=(14,44), tilt=8, illegible=0)
    read = rapid(image).txts
    assert len(texts)==13 and len(set(texts) & set(read))>=12

def test_rapidocr_reads_with_a_student_of_few_letters(tmp_path):
    "Its alphabet is that of the file, not rapidocr's own"
    from rapidocr import RapidOCR
    rec,its = load_teacher('PP-OCRv3_rec')
    digits = Alphabet('0123456789')
    path = export_onnx(Sliced(rec, digits.columns_in(its)), tmp_path/'digits.onnx', 'rec', digits)
    ocr = RapidOCR(params={'Rec.model_path': str(path), 'Global.use_det': False, 'Global.use_cls': False, 'Global.log_level': 'error'})
    lines = render_words(['90431', '77205', '3168'], font_files('dejavu'), noise=False)
    read = [ocr(np.ascontiguousarray(np.repeat(im[:,:w,None], 3, 2)), use_det=False, use_cls=False, use_rec=True).txts[0] for im,w in zip(lines.images, lines.widths)]
    assert read==['90431', '77205', '3168']
