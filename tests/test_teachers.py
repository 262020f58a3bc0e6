"Teachers that are not ours: run by onnxruntime, normalised their own way, or no networks at all"
import copy, pickle
import numpy as np, onnxruntime as ort, pytest, torch
from torch import nn
from distillbook.cache import CachedNet
from distillbook.checkpoint import state_hash
from distillbook.core import UserError
from distillbook.det.render import render_page
from distillbook.losses import kd
from distillbook.nets import Nets
from distillbook.rec.render import normalise, render_words
from distillbook.rec.decode import ctc_decode
from distillbook.rec.labels import Alphabet
from distillbook.rec.nets import RecModel, Sliced
from distillbook.det.nets import DetModel
from distillbook.use.released import TEACHERS, teacher_file
from distillbook.use.teachers import *
from distillbook.data.render import font_files, make_words

WORDS = render_words(['Pronghorn', '80517', 'LIMIT', 'quite'], font_files('dejavu'), noise=False)
X = normalise(WORDS.images, WORDS.widths)

@pytest.mark.parametrize('name', [k for k,t in TEACHERS.items() if t.task=='rec'])
def test_recognisers_read(name):
    net,alphabet = load_teacher(name)
    with torch.no_grad(): y = net(X)
    assert y.shape[-1]==len(alphabet) and [t.strip() for t,_ in ctc_decode(y, alphabet)]==WORDS.words
    assert isinstance(net, RecModel if TEACHERS[name].trains else OnnxNet) and not net.training
    probs = ort.InferenceSession(teacher_file(name)).run(None, {'x': X.numpy()})[0]
    np.testing.assert_allclose(y.softmax(-1).numpy(), probs, atol=1e-4 if 'v5' in name else 1e-5)
    letters = Alphabet('0123456789LIMTProngh')
    cut = Sliced(net, letters.columns_in(alphabet))
    with torch.no_grad(): assert [t.strip() for t,_ in ctc_decode(cut(X), letters)][1:3]==['80517','LIMIT']

@pytest.mark.parametrize('name', [k for k,t in TEACHERS.items() if t.task=='det' and 'server' not in k and 'seal' not in k])
def test_detectors_find(name):
    image,polys,_ = render_page(np.random.default_rng(18), 192, 256, make_words(100), font_files('dejavu'), words_max=5, size=(18,36), tilt=4, illegible=0)
    x = torch.tensor((image/255-[.485,.456,.406])/[.229,.224,.225]).permute(2,0,1)[None].float()
    net = load_teacher(name)
    with torch.no_grad(): maps = net(x)['maps']
    assert maps.shape==(1,1,192,256) and isinstance(net, DetModel if TEACHERS[name].trains else OnnxNet)
    centres = polys.mean(1).round().astype(int)
    assert len(centres) and np.mean([maps[0,0,y,x]>.3 for x,y in centres])>.7

def test_onnx_net_is_frozen_and_can_be_copied():
    net = OnnxNet('PP-OCRv3_rec', threads=1)
    assert not list(net.parameters()) and list(net.state_dict())==['_extra_state']
    y = net(X[:1])
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))): assert torch.equal(other(X[:1]), y)
    assert y.isfinite().all() and not y.requires_grad
    nets = Nets(dict(Teacher=net, Student=nn.Linear(2, 2)), ['Teacher']).train()
    assert not nets['Teacher'].training
    with pytest.raises(UserError, match='put its name into `frozen`'): copy.deepcopy(net).train()(X[:1])
    with pytest.raises(UserError, match='cannot run it on pictures'): net(torch.zeros(1,5,48,48))

def test_its_state_says_which_file_it_is():
    one,same,other = OnnxNet('PP-OCRv3_rec'),OnnxNet('PP-OCRv3_rec'),OnnxNet('PP-OCRv3_det')
    assert state_hash(one)==state_hash(same)!=state_hash(other)
    same.load_state_dict(one.state_dict())
    with pytest.raises(UserError, match='is not the file that the state is of'): other.load_state_dict(one.state_dict())

def test_gradients_pass_it_by():
    net,student = OnnxNet('PP-OCRv3_rec'),torch.randn(4,20,6625,requires_grad=True)
    kd(student, net(X), T=1.).backward()
    assert student.grad.abs().sum()>0

def test_its_answers_can_be_kept(tmp_path):
    net = CachedNet(OnnxNet('PP-OCRv3_det'), tmp_path/'a.bin', 'det').eval()
    x = torch.randn(2,3,64,64)
    first = net(x)['maps']
    net.net.forward = lambda *a: pytest.fail('asked again')
    assert torch.equal(net(x)['maps'], first) and torch.equal(net(x.flip(0))['maps'], first.flip(0))

@pytest.mark.parametrize('bad,says', [('PP-OCRv5_rek', "did you mean 'PP-OCRv5_rec'"), ('none.onnx', 'no such file')])
def test_no_such_teacher(bad, says):
    with pytest.raises(UserError, match=says): OnnxNet(bad)

def test_files_that_are_none(tmp_path):
    (tmp_path/'x.onnx').write_bytes(b'half a file')
    with pytest.raises(UserError, match='x.onnx'): OnnxNet(tmp_path/'x.onnx')
    with pytest.raises(UserError, match='x.onnx'): load_teacher(tmp_path/'x.onnx')

@pytest.mark.parametrize('swap', [False, True])
def test_own_input(swap):
    raw = torch.rand(2,3,6,8)
    mean,std = torch.tensor([.1,.2,.3])[:,None,None],torch.tensor([.5,.6,.7])[:,None,None]
    want = (raw-mean)/std
    got = OwnInput(nn.Identity(), mean.flatten().tolist(), std.flatten().tolist(), (.4,.5,.6), (.2,.3,.4), swap)((raw-torch.tensor([.4,.5,.6])[:,None,None])/torch.tensor([.2,.3,.4])[:,None,None])
    torch.testing.assert_close(got, want.flip(1) if swap else want)

def test_own_input_of_another_size():
    net = OwnInput(nn.Identity(), size=(4,5))
    assert net(torch.zeros(1,3,8,9)).shape==(1,3,4,5) and torch.allclose(OwnInput(nn.Identity(), (.5,)*3, (.5,)*3, size=(4,4))(torch.ones(1,3,8,8)), torch.ones(1,3,4,4))

def test_a_function():
    asked = FunctionNet(lambda a: a.reshape(len(a), -1)[:,:2]*2)
    assert torch.equal(asked(torch.ones(3,1,2,2)), torch.full((3,2), 2.)) and not asked.training
    with pytest.raises(UserError, match='cannot learn'): FunctionNet(lambda a: a).train()(torch.ones(1,1))

LETTERS = Alphabet('0123456789LIMTProngh')

@pytest.mark.parametrize('name', ['PP-OCRv3_rec', 'PP-OCRv5_rec'])
def test_a_released_reader_speaks_of_the_runs_classes(name):
    reader = released_teacher(name, 'rec', LETTERS)
    with torch.no_grad(): probs,logits = reader(X)['head_out'],reader(X, whole=True)['head_out']['ctc']
    assert probs.shape[-1]==len(LETTERS) and not reader.training
    torch.testing.assert_close(probs, logits.softmax(-1))
    net,its = load_teacher(name)
    with torch.no_grad(): torch.testing.assert_close(reader.as_exported()(X), net(X)[...,LETTERS.columns_in(its)])
    assert [t.strip() for t,_ in ctc_decode(probs, LETTERS, probs=True)][1:3]==['80517','LIMIT']

def test_a_released_teacher_with_its_answers_kept(tmp_path):
    reader = released_teacher('PP-OCRv5_rec', 'rec', LETTERS, answers=tmp_path)
    first = reader(X)['head_out']
    assert [p.name for p in tmp_path.glob('*.bin')]==['PP-OCRv5_rec.bin']
    reader.net.net.forward = lambda *a: pytest.fail('asked again')
    assert torch.equal(reader(X)['head_out'], first)
    other = released_teacher('PP-OCRv5_rec', 'rec', Alphabet('abc'), answers=tmp_path)
    assert other(X)['head_out'].shape==(*first.shape[:2],4) # Not the answers for another alphabet

def test_a_released_detector_as_teacher():
    det = released_teacher('PP-OCRv3_det', 'det')
    with torch.no_grad(): assert det(torch.zeros(1,3,32,32))['maps'].shape==(1,1,32,32) and not det.training
    with pytest.raises(UserError, match='wanted is a recogniser'): released_teacher('PP-OCRv3_det', 'rec', LETTERS)
