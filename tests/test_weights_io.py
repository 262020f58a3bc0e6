"Weights of every kind of file in and out: prefixes, strictness, runs, a student into the plain configuration"
import json, os, pickle, subprocess, sys
from collections import OrderedDict
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from distillbook.checkpoint import save_file
from distillbook.config import build_model, load_config
from distillbook.core import UserError
from distillbook.det.nets import DBHead, ppocrv3_det, server_det
from distillbook.nets import Nets
from distillbook.config.networks import load_into
from distillbook.rec.nets import PlainStudent
from distillbook.use.weights import *

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent/'golden'

def net(seed=0):
    torch.manual_seed(seed)
    n = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(4, 3)))
    n(torch.randn(4,3,6,6))
    return n

def same(a, b): return [k for k,v in a.state_dict().items() if not k.endswith('num_batches_tracked') and not torch.equal(v, b.state_dict()[k])]

def model(*names): return Nets({n: net(i+1) for i,n in enumerate(names)})

@pytest.fixture(params=['.pdparams', '.pth', '.pt', '.safetensors'])
def suffix(request): return request.param

def test_one_net(suffix, tmp_path):
    save_weights(net(), tmp_path/f'a{suffix}')
    other = net(5)
    fit = load_weights(other, tmp_path/f'a{suffix}')
    assert same(net(), other)==[] and not any(fit[1:]) and len(fit.loaded)>=8
    load_weights(other := net(6), tmp_path/'a')
    assert same(net(), other)==[] and os.listdir(tmp_path)==[f'a{suffix}']

def test_whole_model_and_one_of_it(suffix, tmp_path):
    m = model('Teacher', 'Student')
    save_weights(m, tmp_path/f'm{suffix}')
    again = model('Teacher', 'Student')
    for p in again.parameters(): p.data.zero_()
    load_weights(again, tmp_path/f'm{suffix}')
    assert same(m, again)==[]
    load_weights(alone := net(9), tmp_path/f'm{suffix}', net='Student')
    assert same(m['Student'], alone)==[]
    other = model('A', 'Student')
    load_weights(other, tmp_path/f'm{suffix}', net='Student')
    assert same(m['Student'], other['Student'])==[] and same(m['Teacher'], other['A'])==[] # `A` has the seed of `Teacher`, and was left alone
    with pytest.raises(UserError, match=r"3 missing|8 missing|7 missing"): load_weights(net(), tmp_path/f'm{suffix}')
    with pytest.raises(UserError, match=r"'(Teacher|Student)' or '(Teacher|Student)' have the right names"): load_weights(net(), tmp_path/f'm{suffix}')
    with pytest.raises(UserError, match="no net 'Studnet'; did you mean 'Student'"): load_weights(net(), tmp_path/f'm{suffix}', net='Studnet')

def test_prefixes(suffix, tmp_path):
    "One network with its name before it, into one without; and the other way round"
    save_weights(model('Student'), tmp_path/f'p{suffix}')
    load_weights(alone := net(7), tmp_path/f'p{suffix}')
    assert same(net(1), alone)==[]
    save_weights(net(3), tmp_path/f'q{suffix}')
    load_weights(m := model('Student'), tmp_path/f'q{suffix}')
    assert same(net(3), m['Student'])==[]
    two = model('Teacher', 'Student')
    with pytest.raises(UserError, match="whose names lack the 'Teacher' or 'Student' before them: net='Teacher'"): load_weights(two, tmp_path/f'q{suffix}')
    load_weights(two, tmp_path/f'q{suffix}', net='Student')
    assert same(net(3), two['Student'])==[] and same(net(1), two['Teacher'])==[]

def test_strict(suffix, tmp_path):
    state = {k: v for k,v in net().state_dict().items() if k!='conv.bias'} | {'fc.weight': torch.zeros(5,4), 'more': torch.zeros(2)}
    if suffix!='.pdparams': save_weights(state, tmp_path/f's{suffix}')
    else: (tmp_path/'s.pdparams').write_bytes(pickle.dumps({k.replace('running_mean', '_mean').replace('running_var', '_variance'): v.numpy().T if k=='fc.weight' else v.numpy() for k,v in state.items() if 'num_' not in k}))
    n = net(4)
    with pytest.raises(UserError) as e: load_weights(n, tmp_path/f's{suffix}')
    assert '(1 missing, 1 unexpected, 1 of another shape)' in str(e.value) and 'fc.weight is [5, 4] in the file, [3, 4] in the net' in str(e.value) and f's{suffix}' in str(e.value)
    assert same(net(4), n)==[]
    fit = load_weights(n, tmp_path/f's{suffix}', strict=False)
    assert (fit.missing, fit.unexpected, fit.shapes)==(['conv.bias'], ['more'], ['fc.weight'])
    assert torch.equal(n.conv.weight, net().conv.weight) and torch.equal(n.fc.weight, net(4).fc.weight) and torch.equal(n.conv.bias, net(4).conv.bias)

def test_between_kinds(tmp_path):
    save_weights(net(), tmp_path/'a.pdparams')
    arrays = read_weights(tmp_path/'a.pdparams')
    assert arrays['fc.weight'].shape==(4,3) and 'norm._mean' in arrays
    with pytest.raises(UserError, match='like=NET'): save_weights(arrays, tmp_path/'b.pth')
    with pytest.raises(UserError, match='like=NET'): save_weights(net().state_dict(), tmp_path/'b.pdparams')
    save_weights(arrays, tmp_path/'b.pth', like=net())
    load_weights(other := net(8), tmp_path/'b.pth')
    assert same(net(), other)==[] and not (tmp_path/'b.pdparams').exists()
    with pytest.raises(UserError, match='ends with'): save_weights(net(), tmp_path/'c.bin')

def test_recurrent_layers_have_both_names(tmp_path):
    n = nn.ModuleDict(dict(rnn=nn.LSTM(3, 4, 2, bidirectional=True), one=nn.LSTM(3, 4, 2)))
    save_weights(n, tmp_path/'r.pdparams')
    arrays = read_pdparams(tmp_path/'r.pdparams')
    assert np.array_equal(arrays['rnn.1.cell_bw.weight_hh'], arrays['rnn.weight_hh_l1_reverse']) and np.array_equal(arrays['one.0.cell.bias_ih'], arrays['one.bias_ih_l0']) and len(arrays)==2*(16+8)
    other = nn.ModuleDict(dict(rnn=nn.LSTM(3, 4, 2, bidirectional=True), one=nn.LSTM(3, 4, 2)))
    assert not any(load_weights(other, tmp_path/'r.pdparams')[1:]) and all(torch.equal(v, other.state_dict()[k]) for k,v in n.state_dict().items())

@pytest.mark.parametrize('name,damage', [(n, d) for n in ('a.pth', 'a.safetensors', 'a.pdparams') for d in ('half', 'empty', 'text', 'flipped')])
def test_damaged(name, damage, tmp_path):
    save_weights(net(), tmp_path/name)
    data = (tmp_path/name).read_bytes()
    (tmp_path/name).write_bytes(dict(half=data[:len(data)//2], empty=b'', text=b'weights', flipped=b'\xff'*8+data[8:])[damage])
    before = net(3)
    with pytest.raises(UserError, match=name) as e: load_weights(n := net(3), tmp_path/name)
    assert '\n' not in str(e.value) and same(before, n)==[]

def test_a_pth_that_calls_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    class Call:
        def __reduce__(self): return os.mkdir, ('here',)
    torch.save({'w': Call()}, 'x.pth')
    with pytest.raises(UserError, match='x.pth'): read_weights('x.pth')
    assert os.listdir()==['x.pth']
    torch.load('x.pth', weights_only=False)
    assert 'here' in os.listdir()

@pytest.mark.parametrize('kept,says', [([1,2], 'a list'), ({'w': 'x'}, "a str under 'w'"), ({'model': [1]}, "a list under 'model'")])
def test_no_weights(kept, says, tmp_path):
    save_file(kept, tmp_path/'x.pth')
    with pytest.raises(UserError, match=says): read_weights(tmp_path/'x.pth')

def test_where_files_are(tmp_path):
    with pytest.raises(UserError, match='there is no'): weights_file(tmp_path/'none')
    with pytest.raises(UserError, match='no weights here'): weights_file(tmp_path)
    save_weights(net(), tmp_path/'latest.pth')
    assert weights_file(tmp_path).name=='latest.pth'
    save_weights(net(), tmp_path/'best_accuracy.pth')
    assert weights_file(tmp_path).name=='best_accuracy.pth'
    with pytest.raises(UserError, match='has best_accuracy.pth'): weights_file(tmp_path/'best_acuracy')
    assert weights_file('PP-OCRv3_rec').suffix=='.onnx'

def test_extract(suffix, tmp_path):
    m = model('Teacher', 'Student', 'Student2')
    save_weights(m, tmp_path/f'best_accuracy{suffix}')
    got = extract(tmp_path, 'Student')
    assert not any(k.startswith('Student') for k in got)
    save_weights(got, tmp_path/f'student{suffix}')
    load_weights(alone := net(9), tmp_path/f'student{suffix}')
    assert same(m['Student'], alone)==[]
    with pytest.raises(UserError, match="no net 'Pupil'; there are: .*Student2"): extract(tmp_path, 'Pupil')

def test_extract_from_a_best_network(tmp_path):
    save_file(dict(model=net().state_dict(), net='Student', monitor='Student_acc', value=.5, epoch=1), tmp_path/'best.pth')
    assert extract(tmp_path, 'Student').keys()==net().state_dict().keys()

@pytest.mark.parametrize('many,one', [('rec/ppocrv3_distillation.yml', 'rec/ppocrv3.yml'), ('det/ppocrv3_cml.yml', 'det/ppocrv3_student.yml')])
@pytest.mark.parametrize('kind', ['.pdparams', '.safetensors'])
def test_the_student_fits_the_plain_configuration(many, one, kind, tmp_path):
    "Exactly its keys, at full size; with Paddle's aliases of recurrent weights as Paddle has them"
    cfg = load_config(ROOT/'configs'/many, ['Global.character_dict_path='] if 'rec' in many else [])
    for m in cfg['Architecture']['Models'].values(): m['pretrained'] = None
    m = build_model(cfg)
    save_weights(m['Student'], tmp_path/f's{kind}') if kind=='.pdparams' else save_weights({f'{n}.{k}': v for n in m.names for k,v in m[n].state_dict().items()}, tmp_path/f'whole{kind}')
    if kind!='.pdparams': save_weights(extract(tmp_path/f'whole{kind}', 'Student'), tmp_path/f's{kind}')
    plain = build_model(load_config(ROOT/'configs'/one, ['Global.character_dict_path='] if 'rec' in one else []) | {})
    fit = load_weights(plain, tmp_path/f's{kind}')
    assert not any(fit[1:]) and same(m['Student'], plain)==[]
    known = {o[0].removeprefix('Student.') for o in json.loads((GOLDEN/('params_rec.json' if 'rec' in one else 'params_det_cml.json')).read_text())['rows'] if o[0].startswith('Student.')}
    assert len(known)>100
    if kind=='.pdparams': assert set(read_pdparams(tmp_path/f's{kind}'))==known

def test_other_files_of_paddles():
    assert read_pickle(GOLDEN/'tiny_nested.pdparams')['epoch']==3

def test_load_into_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match='fetch the file first'): load_into(net(), 'https://example.com/a.pdparams')
    with pytest.raises(UserError, match='to do without'): load_into(net(), tmp_path/'none')

# Checkpoints without frozen networks

@pytest.fixture
def run(tmp_path):
    "A run's checkpoint: a student, and of its frozen teacher the hash"
    m = model('Teacher', 'Student')
    state = {k: v for k,v in m.state_dict().items() if k.startswith('Student.')}
    save_file(dict(model=state, frozen=dict(Teacher='0123abcd'), epoch=3), tmp_path/'latest.pth')
    return m

FROZEN = 'Teacher was frozen in that run, so the file has only its hash; its weights are where they came from'

def test_a_frozen_network_may_be_absent(run, tmp_path):
    other = Nets(dict(Teacher=net(7), Student=net(8)), frozen=['Teacher'])
    fit = load_weights(other, tmp_path)
    assert not any(fit[1:]) and same(run['Student'], other['Student'])==[] and same(net(7), other['Teacher'])==[]
    load_weights(alone := net(9), tmp_path)
    assert same(run['Student'], alone)==[]
    load_weights(alone := net(9), tmp_path, net='Student')
    assert same(run['Student'], alone)==[]

def test_a_network_that_was_not_frozen_may_not_be_absent(run, tmp_path):
    other = model('Teacher', 'Student', 'Third')
    before = model('Teacher', 'Student', 'Third')
    with pytest.raises(UserError, match=r'Third\..*not in the file') as e: load_weights(other, tmp_path)
    assert 'Teacher.' not in str(e.value) and same(before, other)==[]

def test_only_a_hash_of_the_frozen(run, tmp_path):
    for ask in (lambda: extract(tmp_path, 'Teacher'), lambda: load_weights(net(), tmp_path, net='Teacher'), lambda: load_weights(model('Teacher', 'Student'), tmp_path, net='Teacher')):
        with pytest.raises(UserError, match=FROZEN): ask()
    assert extract(tmp_path, 'Student').keys()==net().state_dict().keys()
    with pytest.raises(UserError, match="no net 'Studnet'; did you mean 'Student'"): extract(tmp_path, 'Studnet')

def test_the_frozen_of_a_best_network(tmp_path):
    "The best file holds one network; the last has no more of the teacher. In a run of old the last has it"
    m = model('Teacher', 'Student')
    student = {k: v for k,v in m.state_dict().items() if k.startswith('Student.')}
    save_file(dict(model=m['Student'].state_dict(), net='Student', frozen=dict(Teacher='01')), tmp_path/'best.pth')
    save_file(dict(model=student, frozen=dict(Teacher='01')), tmp_path/'last.pth')
    with pytest.raises(UserError, match=FROZEN): extract(tmp_path, 'Teacher')
    save_file(dict(model=m.state_dict()), tmp_path/'last.pth')
    assert extract(tmp_path, 'Teacher').keys()==net().state_dict().keys()
    save_file(dict(model={}, net='Teacher', frozen=dict(Teacher='01')), tmp_path/'best.pth')
    with pytest.raises(UserError, match=FROZEN): extract(tmp_path/'best.pth', 'Teacher')

@pytest.mark.parametrize('url', ['https://example.com/a.pdparams', 'http://example.com/a'])
def test_a_url_is_no_file(url):
    with pytest.raises(UserError, match='fetch the file first, and give its path'): load_weights(net(), url)

def test_a_released_detector_with_a_threshold_branch():
    det = ppocrv3_det()
    det.head = DBHead(det.neck.out_channels)
    fit = load_weights(det, 'PP-OCRv3_det')
    p,t = det.head.binarize,det.head.thresh
    assert not any(fit[1:]) and torch.equal(p.conv1.weight, t.conv1.weight) and torch.equal(p.conv_bn2.running_var, t.conv_bn2.running_var)
    assert p.conv1.weight is not t.conv1.weight and not torch.equal(p.conv3.weight, t.conv3.weight)
    assert list(det.state_dict())==list(ppocrv3_det().state_dict())+[f'head.thresh.{k}' for k in t.state_dict()]

def test_a_released_detector_that_does_not_fit_leaves_the_branch():
    det = server_det()
    det.head = DBHead(det.neck.out_channels)
    before = {k: v.clone() for k,v in det.state_dict().items()}
    with pytest.raises(UserError, match='does not fit DetModel'): load_weights(det, 'PP-OCRv3_det')
    assert before.keys()==det.state_dict().keys() and all(torch.equal(v, before[k]) for k,v in det.state_dict().items())

def test_light_imports():
    "No ONNX and no OpenCV until a file needs them"
    heavy = "[m for m in ('onnx','onnxruntime','cv2') if m in sys.modules]"
    for module in ('released', 'weights'):
        r = subprocess.run([sys.executable, '-c', f'import sys, distillbook.use.{module}; print({heavy})'], capture_output=True, text=True)
        assert r.returncode==0 and r.stdout.strip()=='[]', (module, r.stdout, r.stderr[-300:])
