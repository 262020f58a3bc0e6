"The command as a user runs it: the whole run in small, its files, its errors, and its ends by ctrl-C, SIGTERM and NaN."
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import cv2, numpy as np, pytest, torch
from distillbook.checkpoint import load_file

CMD = [sys.executable, '-c', 'from distillbook.cli import app; app(prog_name="distillbook")']
ENV = {k: v for k, v in os.environ.items() if k != 'PYTHONWARNINGS'} | {'OMP_NUM_THREADS': '1'}   # as in a clean shell
TINY = '''
Global: {{save_model_dir: {run}, epoch_num: 2, threads: 1}}
Architecture: {{Models: {{Student: {{channels: [8, 8, 8, 8]}}}}}}
Train: {{dataset: {{words: 96}}, loader: {{batch_size_per_card: 16}}}}
Eval: {{dataset: {{valid: 16, heldout: 16, unseen: 16}}}}
'''


def distillbook(*args, env=None, **kw):
    return subprocess.run([*CMD, *map(str, args)], capture_output=True, text=True, env={**ENV, **(env or {})}, timeout=300, **kw)


def fails(r, *says, status=2):
    "One clear line on the error stream, and the status"
    lines = r.stderr.strip().splitlines()
    assert r.returncode == status, r.stderr
    assert len(lines) == 1 and lines[0].startswith('distillbook: '), r.stderr
    for s in says: assert s in lines[0], lines[0]


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A configuration, and the run that it gave"
    folder = tmp_path_factory.mktemp('cli')
    (folder/'tiny.yml').write_text(TINY.format(run=folder/'run'))
    r = distillbook('train', '-c', folder/'tiny.yml')
    assert r.returncode == 0, r.stderr
    return folder, r


def test_the_run_leaves_its_files(tiny):
    folder, r = tiny
    assert {'config.yml', 'metrics.csv', 'summary.json', 'curves.png', 'reads.png', 'best.pth', 'last.pth', 'words'} == {o.name for o in (folder/'run').iterdir()}
    s = json.loads((folder/'run/summary.json').read_text())
    for net in ('Teacher', 'Student', 'Twin'):
        assert set(s[net]) == {'params', 'ms_per_image', 'heldout', 'unseen_font'}
        assert all(set(s[net][k]) == {'exact', 'ned'} for k in ('heldout', 'unseen_font'))
    assert s['Teacher']['heldout']['exact'] > 0.8 and s['Student']['params'] == s['Twin']['params']
    assert {'render', 'teacher', 'answers', 'train', 'judge'} <= set(s['seconds'])
    rows = (folder/'run/metrics.csv').read_text().splitlines()
    assert len(rows) == 3 and 'Student_acc' in rows[0] and 'train_kd_Student_Teacher' in rows[0]
    assert load_file(folder/'run/best.pth')['net'] == 'Student' and load_file(folder/'run/last.pth')['epoch'] == 1
    assert cv2.imread(str(folder/'run/reads.png')).std() > 5 and cv2.imread(str(folder/'run/curves.png')).std() > 5


def test_the_run_tells_what_happens(tiny):
    out = tiny[1].stdout
    assert re.search(r'epoch +train +valid +Teacher', out) and len(re.findall(r'^ +[12] +\d+\.\d+', out, flags=re.M)) == 2
    assert 'Teacher' in out and 'Twin' in out and 'distillbook predict --run' in out


def test_run_again_uses_what_is_there_and_gives_the_same(tiny):
    folder, _ = tiny
    kept = {f: (folder/'run/words'/f).stat().st_mtime_ns for f in ('train.npz', 'answers.bin')}
    before = load_file(folder/'run/last.pth')['model'], json.loads((folder/'run/summary.json').read_text())
    env = dict(PIP_INDEX_URL='http://127.0.0.1:9/', PIP_NO_INDEX='1')   # the teacher is here, so nobody asks pip
    assert distillbook('train', '-c', folder/'run/config.yml', env=env).returncode == 0
    after = load_file(folder/'run/last.pth')['model'], json.loads((folder/'run/summary.json').read_text())
    assert kept == {f: (folder/'run/words'/f).stat().st_mtime_ns for f in kept}
    assert all(torch.equal(v, before[0][k]) for k, v in after[0].items())
    assert {n: after[1][n]['heldout'] for n in ('Student', 'Twin')} == {n: before[1][n]['heldout'] for n in ('Student', 'Twin')}


def test_predict(tiny, tmp_path):
    folder, _ = tiny
    with np.load(folder/'run/words/heldout.npz') as z: images = z['images'][:3]
    for i, im in enumerate(images): cv2.imwrite(str(tmp_path/f'{i}.png'), im)
    r = distillbook('predict', '--run', folder/'run', '--json', tmp_path, tmp_path/'0.png', f'{tmp_path}/[12].png')
    rows = json.loads(r.stdout)
    assert [Path(o['image']).name for o in rows] == ['0.png', '1.png', '2.png', '0.png', '1.png', '2.png']
    assert all(set(o) == {'image', 'text', 'confidence'} and 0 <= o['confidence'] <= 1 for o in rows) and rows[:3] == rows[3:]
    assert 'confidence' in distillbook('predict', '--run', folder/'run', tmp_path/'0.png').stdout


def test_no_teacher_then_two_students(tiny, tmp_path):
    r = distillbook('train', '-c', tiny[0]/'tiny.yml', '-o', f'Global.save_model_dir={tmp_path}/run', 'Global.epoch_num=1', env=dict(DISTILLBOOK_CACHE=str(tmp_path/'cache'), PIP_NO_INDEX='1'))
    assert r.returncode == 0, r.stderr
    assert len([l for l in r.stdout.splitlines() if 'No teacher' in l and 'DML' in l]) == 1
    s = json.loads((tmp_path/'run/summary.json').read_text())
    assert {'Student', 'Student2', 'Twin'} <= set(s) and 'Teacher' not in s
    assert 'train_dml_Student_Student2' in (tmp_path/'run/metrics.csv').read_text()


@pytest.fixture
def cfg(tiny, tmp_path):
    "The tiny configuration with a run's folder of its own, that has the words and answers already"
    shutil.copytree(tiny[0]/'run/words', tmp_path/'run/words')
    (tmp_path/'tiny.yml').write_text(TINY.format(run=tmp_path/'run'))
    return tmp_path/'tiny.yml'


@pytest.mark.parametrize('override,says', [
    ('Architecture.Models.Teacher.pretrained=PP-OCRv3_rek', ["no teacher 'PP-OCRv3_rek'", "'PP-OCRv3_rec'"]),
    ('Architecture.Models.Teacher.pretrained=none.onnx', ['none.onnx', 'no such file']),
    ('Architecture.Models.Teacher.pretrained=broken.onnx', ['broken.onnx', 'not an ONNX file']),
    ('Global.alphabet=abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ☃', ['☃']),
    ('Global.alphabet=ab', ['Global.alphabet: only']),
    ('Global.monitor=Student_accuracy', ["no monitor 'Student_accuracy'", "'Student_acc'"]),
    ('Train.dataset.fonts=comic', ["'comic'", 'dejavu']),
    ('Optimizer.learning_rate=1', ["no key 'learning_rate'"]),
])
def test_bad_values(cfg, override, says):
    (cfg.parent/'broken.onnx').write_bytes(b'half a file')
    r = distillbook('train', '-c', cfg, '-o', override, cwd=cfg.parent)
    fails(r, *says)


def test_wrong_architecture(cfg):
    import onnx
    from onnx import TensorProto, helper
    node = helper.make_node('Relu', ['x'], ['y'])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in 'xy']
    model = helper.make_model(helper.make_graph([node], 'g', ends[:1], ends[1:]))
    onnx.save(model, cfg.parent/'other.onnx')
    fails(distillbook('train', '-c', cfg, '-o', f'Architecture.Models.Teacher.pretrained={cfg.parent}/other.onnx'), 'other.onnx')


def test_bad_pictures(tiny, tmp_path):
    run = tiny[0]/'run'
    (tmp_path/'text.png').write_text('not a picture')
    (tmp_path/'empty').mkdir()
    fails(distillbook('predict', '--run', run, tmp_path/'text.png'), 'text.png')
    fails(distillbook('predict', '--run', run, tmp_path/'empty'), 'empty')
    fails(distillbook('predict', '--run', run, tmp_path/'none.png'), 'none.png')
    fails(distillbook('predict', '--run', tmp_path, tmp_path/'text.png'), 'no config.yml')


def test_a_run_that_is_not_whole(tiny, tmp_path):
    shutil.copytree(tiny[0]/'run', tmp_path/'run')
    fails(distillbook('predict', '--run', tmp_path/'run', tmp_path/'a.png'), 'a.png')
    (tmp_path/'run/best.pth').write_bytes((tmp_path/'run/best.pth').read_bytes()[:1000])
    fails(distillbook('predict', '--run', tmp_path/'run', tmp_path/'a.png'), 'best.pth', 'not a readable checkpoint')
    (tmp_path/'run/best.pth').unlink()
    fails(distillbook('predict', '--run', tmp_path/'run', tmp_path/'a.png'), 'there is no')


def test_nan_stops_and_keeps_the_last_good(cfg):
    assert distillbook('train', '-c', cfg).returncode == 0
    good = (cfg.parent/'run/last.pth').read_bytes()
    r = distillbook('train', '-c', cfg, '-o', 'Optimizer.lr=1.0e+17')
    fails(r, "term 'ctc_Student' gave", 'at step', 'epoch')
    assert (cfg.parent/'run/last.pth').read_bytes() == good


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_signals_keep_a_checkpoint(cfg, sig):
    p = subprocess.Popen([*CMD, 'train', '-c', str(cfg), '-o', 'Global.epoch_num=500'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    last = cfg.parent/'run/last.pth'
    end = time.time()+120
    while not last.exists() and time.time() < end: time.sleep(0.05)
    p.send_signal(sig)
    out, err = p.communicate(timeout=60)
    fails(subprocess.CompletedProcess(p.args, p.returncode, out, err), f'stopped by {sig.name}', 'last.pth', status=130)
    state = load_file(last)
    assert state['epoch'] >= 0 and all(v.isfinite().all() for v in state['model'].values() if v.is_floating_point())


def test_kill_leaves_whole_files(cfg):
    "SIGKILL at an arbitrary moment: what is there can be read"
    p = subprocess.Popen([*CMD, 'train', '-c', str(cfg), '-o', 'Global.epoch_num=500'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)
    last = cfg.parent/'run/last.pth'
    end = time.time()+120
    while not last.exists() and time.time() < end: time.sleep(0.05)
    time.sleep(0.4)
    p.kill()
    p.wait()
    assert load_file(last)['epoch'] >= 0 and load_file(cfg.parent/'run/best.pth')['net'] == 'Student'
    assert distillbook('train', '-c', cfg).returncode == 0


def test_full_disk(cfg):
    "No file may grow beyond 1 kB: one line, and the old checkpoint stays"
    last = cfg.parent/'run/last.pth'
    last.write_bytes(b'old')
    code = 'import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); from distillbook.cli import app; app(prog_name="distillbook")'
    r = subprocess.run([*CMD[:-1], code, 'train', '-c', str(cfg)], capture_output=True, text=True, env=ENV, timeout=300)
    fails(r, 'could not be written')
    assert last.read_bytes() == b'old'


def test_teachers_and_help():
    rows = json.loads(distillbook('teachers', '--json').stdout)
    assert rows[0]['name'] == 'PP-OCRv3_rec' and rows[0]['licence'] == 'Apache-2.0'
    assert 'PP-OCRv3_rec' in distillbook('teachers').stdout
    r = distillbook('train', '--help')
    assert r.returncode == 0 and '-o' in r.stdout and 'Example' in r.stdout
    assert distillbook('trian').returncode == 2
