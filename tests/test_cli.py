"The command as a user runs it: the README's run in small, its files and numbers, what is done with it afterwards, its errors, and its ends by ctrl-C, SIGTERM, SIGKILL, NaN and a full disk"
import csv, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import cv2, pytest, torch, yaml
from typer.testing import CliRunner
from distillbook.checkpoint import load_file
from distillbook.cli import app
from distillbook.rec.render import RenderedLines
from distillbook.use.weights import read_weights

CMD = [sys.executable, '-c', 'from distillbook.cli import app; app(prog_name="distillbook")']
ENV = {k: v for k,v in os.environ.items() if k not in ('PYTHONWARNINGS','RANK','WORLD_SIZE')} | {'OMP_NUM_THREADS': '1'} # As in a clean shell
NETS,SETS = ['Teacher','Student','Twin'],['watched','held_out','unseen_font']
CHANNELS = [f'{part}Architecture.Models.{net}.Backbone.channels=[8,8,8,8]' for part,net in (('','Student'), ('WithoutTeacher.','Student'), ('WithoutTeacher.','Student2'))]
WORDS = ['Train.dataset.words=96', 'Train.loader.batch_size_per_card=16', *(f'Eval.{s}.dataset.words=16' for s in SETS)]
TINY = [*CHANNELS, *WORDS, 'Global.epoch_num=2', 'Global.threads=1', 'Global.eval_batch_step=[0,2]', 'Global.print_batch_step=2'] # Two epochs of six steps

def tiny_run(folder, *more): return ['train', '-c', 'quickstart', '-o', *TINY, f'Global.save_model_dir={folder}', *more]

def distillbook(*args, env=None, **kwargs):
    "A command in a process of its own"
    return subprocess.run([*CMD, *map(str, args)], capture_output=True, text=True, env={**ENV, **(env or {})}, timeout=300, **kwargs)

def inside(*args):
    "A command in this process, which is quicker"
    r = CliRunner().invoke(app, [str(a) for a in args], prog_name='distillbook')
    if r.exception and not isinstance(r.exception, SystemExit): raise r.exception
    return subprocess.CompletedProcess(args, r.exit_code, r.stdout, r.stderr)

def fails(r, *says, status=2, after_log=False):
    "One clear line on the error stream, and the status; `after_log`: lines of the run may stand before it"
    lines = r.stderr.strip().splitlines()
    assert r.returncode==status, r.stderr
    assert lines[-1].startswith('distillbook: ') and (after_log or len(lines)==1), r.stderr
    assert 'Traceback' not in r.stderr and sum(l.startswith('distillbook: ') for l in lines)==1, r.stderr
    for s in says: assert s in lines[-1], lines[-1]

def rows_of(run):
    "metrics.csv without what tells the time"
    return [{k: v for k,v in row.items() if k!='seconds'} for row in csv.DictReader((run/'metrics.csv').open())]

def same_state(a, b): return list(a)==list(b) and all(torch.equal(v, b[k]) for k,v in a.items())

def until(condition, process, seconds=120):
    end = time.time()+seconds
    while not condition():
        assert process.poll() is None and time.time()<end, process.communicate()
        time.sleep(.02)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "The README's command in small, and what it said"
    folder = tmp_path_factory.mktemp('cli')
    r = distillbook(*tiny_run(folder/'run'), cwd=folder)
    assert r.returncode==0, r.stderr
    return folder/'run',r

@pytest.fixture
def begun(tiny, tmp_path):
    "A run's folder that has the teacher's answers already"
    shutil.copytree(tiny[0]/'answers', tmp_path/'run/answers')
    return tmp_path/'run'

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Three words as files, and what they say"
    folder,lines = tmp_path_factory.mktemp('pictures'),RenderedLines(words=3, skip=20000)
    for i in range(3): cv2.imwrite(str(folder/f'{i}.png'), lines.picture(i))
    return folder,lines.words


# %% what a run leaves
def test_files(tiny):
    files = {'config.yml','train.log','metrics.csv','summary.json','curves.png','latest.pth','best_accuracy.pth','answers','digits_and_letters.txt',*(f'pictures_{s}.png' for s in SETS)}
    assert {o.name for o in tiny[0].iterdir()}==files
    for name in files:
        if name.endswith('.png'): assert cv2.imread(str(tiny[0]/name)).std()>5
    assert (tiny[0]/'answers/PP-OCRv3_rec.bin').stat().st_size>1000

def test_summary_of_a_run(tiny):
    got = json.loads((tiny[0]/'summary.json').read_text())
    assert set(got)=={'networks','best','seconds','samples','given','machine'} and list(got['networks'])==NETS
    for net,row in got['networks'].items():
        assert set(row)=={'parameters','ms_per_image','frozen','weights',*SETS} and row['frozen']==(net=='Teacher')
        assert all(set(row[s])=={'acc','norm_edit_dis'} for s in SETS)
    teacher,student,twin = (got['networks'][n] for n in NETS)
    assert teacher['held_out']['acc']>.8 and student['parameters']==twin['parameters']<teacher['parameters']
    assert teacher['weights']=='PP-OCRv3_rec' and twin['weights']=='as Student'
    assert set(got['best'])=={'indicator','value','epoch','step'} and got['best']['indicator']=='acc' and got['best']['value']==student['watched']['acc']
    assert set(got['seconds'])=={'networks','data','train','evaluate','pictures'} and all(v>=0 for v in got['seconds'].values())
    assert got['samples']==dict(train=96, watched=16, held_out=16, unseen_font=16)
    assert set(got['machine'])=={'device','threads','torch','distillbook'} and got['machine']['threads']==1

def test_speed_is_that_of_the_network_and_not_of_its_kept_answers(tiny):
    "The teacher has 500 times as many numbers as the tiny student"
    ms = {n: o['ms_per_image'] for n,o in json.loads((tiny[0]/'summary.json').read_text())['networks'].items()}
    assert ms['Teacher']>4*ms['Student']

def test_evaluations_in_a_table_a_file_and_a_log(tiny):
    run,r = tiny
    rows = rows_of(run)
    assert [int(o['step']) for o in rows]==[2,4,6,8,10,12] and [int(o['epoch']) for o in rows]==[1,1,1,2,2,2]
    assert {'step','epoch','loss','acc','norm_edit_dis',*(f'{n}_{k}' for n in ('Teacher','Twin') for k in ('acc','norm_edit_dis'))}==set(rows[0])
    head = next(l for l in r.stdout.splitlines() if 'epoch' in l and 'step' in l)
    assert head.split()==['epoch','step','loss','acc','Teacher_acc','Twin_acc','seconds'] and len(re.findall(r'^ +[12] +\d+ +\d+\.\d{3} ', r.stdout, re.M))==6
    log = (run/'train.log').read_text()
    assert 'train with 3 networks (Teacher frozen, Student, Twin), 96 lines, 6 steps an epoch, on cpu' in log and log.count('cur metric, acc: ')==6
    assert re.search(r'epoch: \[2/2\], global_step: 12, lr: [\d.]+, loss_ctc_Student_0: [\d.]+, loss_ctc_Twin_1: [\d.]+, kd_Student_Teacher: [\d.]+, loss: [\d.]+, .*eta: 0:00:00', log)

def test_what_is_said_at_the_end(tiny):
    out = tiny[1].stdout.replace('\n', ' ')
    for word in (*NETS, 'parameters'[:6], 'Seconds: networks ', 'Everything is in', 'distillbook predict --run'): assert word in out
    assert 'Warning' not in tiny[1].stderr and 'Traceback' not in tiny[1].stderr, tiny[1].stderr

def test_states(tiny):
    "The frozen teacher is in no file; its name and a hash are"
    best,last = (load_file(tiny[0]/f'{n}.pth') for n in ('best_accuracy','latest'))
    for state in (best, last):
        assert {k.partition('.')[0] for k in state['model']}=={'Student','Twin'} and list(state['frozen'])==['Teacher']
    assert last['epoch']==1 and best['indicator']=='acc' and {'acc','Teacher_acc','Twin_acc'}<=set(best['metrics'])

def test_saved_configuration_is_the_run(tiny):
    cfg = yaml.safe_load((tiny[0]/'config.yml').read_text())
    assert cfg['Global']['epoch_num']==2 and list(cfg['Architecture']['Models'])==NETS and list(cfg['Eval'])==SETS
    assert cfg['Architecture']['Models']['Student']['Backbone']['channels']==[8]*4

def test_run_again_gives_the_same_and_asks_nobody(tiny):
    "From its own config.yml, into its own folder; the teacher is here and its answers are kept, so pip is not asked"
    run,answers = tiny[0],tiny[0]/'answers/PP-OCRv3_rec.bin'
    before = answers.read_bytes(),load_file(run/'latest.pth')['model'],rows_of(run),json.loads((run/'summary.json').read_text())
    r = distillbook('train', '-c', run/'config.yml', env=dict(PIP_INDEX_URL='http://127.0.0.1:9/', PIP_NO_INDEX='1'))
    assert r.returncode==0, r.stderr
    after = answers.read_bytes(),load_file(run/'latest.pth')['model'],rows_of(run),json.loads((run/'summary.json').read_text())
    assert before[0]==after[0] and same_state(before[1], after[1]) and before[2]==after[2]
    assert all(before[3]['networks'][n][s]==after[3]['networks'][n][s] for n in NETS for s in SETS)


# %% what is done with a run
def test_predict(tiny, pictures):
    folder,words = pictures
    r = distillbook('predict', '--run', tiny[0], '--json', folder, folder/'0.png', f'{folder}/[12].png')
    assert r.returncode==0, r.stderr
    rows = json.loads(r.stdout)
    assert [Path(o['image']).name for o in rows]==['0.png','1.png','2.png']*2 and rows[:3]==rows[3:]
    assert all(set(o)=={'image',*NETS} and all(set(o[n])=={'label','score'} and 0<=o[n]['score']<=1 for n in NETS) for o in rows)
    assert sum(o['Teacher']['label']==w for o,w in zip(rows, words))>=2
    shown = inside('predict', '--run', tiny[0], folder/'0.png').stdout
    assert all(o in shown for o in ('confidence','network',*NETS))

def test_eval(tiny):
    r = inside('eval', '--run', tiny[0], '--json')
    got = json.loads(r.stdout)
    summary = json.loads((tiny[0]/'summary.json').read_text())['networks']
    assert list(got)==SETS
    for s in SETS:
        assert set(got[s])=={'acc','norm_edit_dis','fps',*(f'{n}_{k}' for n in ('Teacher','Twin') for k in ('acc','norm_edit_dis'))}
        for net,row in summary.items():
            for k,v in row[s].items(): assert got[s][k if net=='Student' else f'{net}_{k}']==pytest.approx(v, abs=1e-9)
    assert all(s in inside('eval', '--run', tiny[0]).stdout for s in SETS)

def test_a_teacher_is_the_same_with_kept_answers_and_without(tiny):
    got,want = (json.loads(inside('eval', '--run', tiny[0], '-o', f'Architecture.Models.Teacher.cache={c}', '--json').stdout) for c in ('false','true'))
    for s in SETS: assert {k: v for k,v in got[s].items() if k!='fps'}==pytest.approx({k: v for k,v in want[s].items() if k!='fps'}, abs=1e-9)

def test_the_same_by_configuration_and_weights(tiny, pictures):
    "PaddleOCR's way: -c and Global.pretrained_model"
    args = ['-c', tiny[0]/'config.yml', '-o', f'Global.pretrained_model={tiny[0]}/best_accuracy']
    got,want = (json.loads(inside(*o, '--json').stdout) for o in (['eval', *args], ['eval', '--run', tiny[0]]))
    for s in SETS: assert {k: v for k,v in got[s].items() if k!='fps'}=={k: v for k,v in want[s].items() if k!='fps'}
    a,b = (json.loads(inside('predict', *o, pictures[0]/'0.png', '--json').stdout) for o in (args, ['--run', tiny[0]]))
    assert a==b

def test_export(tiny, tmp_path):
    r = inside('export', '--run', tiny[0], '--out', tmp_path, '--json')
    assert [Path(o).name for o in json.loads(r.stdout)]==['Student.onnx'] and (tmp_path/'Student.md').exists(), r.stderr
    names = [Path(o).name for o in json.loads(inside('export', '--run', tiny[0], '--net', 'all', '--out', tmp_path, '--json').stdout)]
    assert names==['Student.onnx','Twin.onnx'] # The teacher's file is there already
    fails(inside('export', '--run', tiny[0], '--net', 'Teacher', '--out', tmp_path), 'answers are kept')

def test_extract(tiny, tmp_path):
    r = inside('extract', tiny[0], '--net', 'Twin', '-o', tmp_path/'t.safetensors')
    assert r.returncode==0, r.stderr
    want = {k.removeprefix('Twin.'): v for k,v in load_file(tiny[0]/'best_accuracy.pth')['model'].items() if k.startswith('Twin.')}
    got = read_weights(tmp_path/'t.safetensors')
    assert set(got)==set(want) and all(torch.equal(v, want[k]) for k,v in got.items())
    assert inside('extract', tiny[0], '-o', tmp_path/'s.pdparams').returncode==0
    fails(inside('extract', tiny[0], '--net', 'Teacher', '-o', tmp_path/'x.pth'), 'Teacher')

def test_summary(tiny, tmp_path):
    r = distillbook('summary', '-c', 'quickstart', '--json', '--draw', tmp_path/'s.png', cwd=tmp_path) # By name, in an empty folder
    assert r.returncode==0, r.stderr
    got = json.loads(r.stdout)
    assert [o['net'] for o in got['nets']]==NETS and [o['role'] for o in got['nets']]==['teaches (frozen)','learns','learns'] and len(got['terms'])==3
    assert cv2.imread(str(tmp_path/'s.png')).std()>5 and [o.name for o in tmp_path.iterdir()]==['s.png']
    assert all(n in inside('summary', '--run', tiny[0]).stdout for n in NETS)

def test_lr_find(begun):
    args = ['lr-find', *tiny_run(begun)[1:], '--steps', 12]
    rates = json.loads(inside(*args, '--json', '--draw', begun.parent/'l.png').stdout)
    assert set(rates)=={'valley','steep','minimum'} and all(1e-8<v<=1 for v in rates.values())
    assert (begun.parent/'l.png').exists() and [o.name for o in begun.iterdir()]==['answers']

def test_compare(tiny, tmp_path):
    rows = json.loads(inside('compare', tiny[0], tiny[0], '--json').stdout)
    assert len(rows)==2 and rows[0]['run']=='run' and rows[0]['step']==12 and {'acc','Twin_acc'}<=set(rows[0])
    assert inside('compare', tiny[0], '--draw', tmp_path/'c.png').returncode==0 and (tmp_path/'c.png').exists()


# %% other ways to run
def test_no_teacher_then_two_students(tmp_path):
    r = distillbook(*tiny_run(tmp_path/'run', 'Global.epoch_num=1', 'Global.eval_batch_step=6'), env=dict(DISTILLBOOK_CACHE=str(tmp_path/'cache'), PIP_NO_INDEX='1'))
    assert r.returncode==0, r.stderr
    said = [l for l in r.stderr.splitlines() if 'No teacher' in l]
    assert len(said)==1 and 'mutual learning (DML)' in said[0] and 'rapidocr-onnxruntime' in said[0]
    got = json.loads((tmp_path/'run/summary.json').read_text())['networks']
    assert list(got)==['Student','Student2','Twin'] and not any(o['frozen'] for o in got.values())
    assert 'dml_Student_Student2: ' in (tmp_path/'run/train.log').read_text()
    assert yaml.safe_load((tmp_path/'run/config.yml').read_text())['Loss']['loss_config_list'][1]['Term']['loss']=='dml'
    assert set(json.loads(inside('eval', '--run', tmp_path/'run', '--json').stdout))==set(SETS) # And it can be used without the teacher

def test_bf16_and_tensorboard(begun):
    pytest.importorskip('tensorboard')
    r = distillbook(*tiny_run(begun, 'Global.epoch_num=1', 'Global.use_tensorboard=true'), '--amp', 'bf16')
    assert r.returncode==0, r.stderr
    assert load_file(begun/'latest.pth')['setup']['the precision']=='bf16' and json.loads((begun/'summary.json').read_text())['samples']['train']==96
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(begun/'tensorboard'))
    events.Reload()
    tags = set(events.Tags()['scalars'])
    assert {'terms/kd_Student_Teacher','terms/loss_ctc_Twin_1','eval/acc','eval/Twin_acc'}<=tags, tags
    assert len(events.Scalars('terms/kd_Student_Teacher'))==6 and [e.step for e in events.Scalars('eval/acc')]==[2,4,6]

def test_two_ranks(begun):
    "Both read and keep the teacher's answers; one writes the rest"
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'distillbook.cli']
    (begun/'answers/PP-OCRv3_rec.bin').unlink()
    r = subprocess.run([*launch, *tiny_run(begun, 'Global.epoch_num=1', 'Global.eval_batch_step=3', 'Train.loader.batch_size_per_card=16')], capture_output=True, text=True, env=ENV, timeout=300)
    assert r.returncode==0, r.stderr
    assert r.stdout.count('Everything is in')==1 and 'and 1 other ranks' in r.stderr and r.stderr.count('cur metric')==1
    got = json.loads((begun/'summary.json').read_text())
    assert list(got['networks'])==NETS and got['best']['step']==3 and got['samples']['train']==96
    assert load_file(begun/'latest.pth')['setup']['the number of ranks']==2

@pytest.mark.parametrize('sig', [signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_resumed_equals_never_stopped(tiny, begun, sig):
    p = subprocess.Popen([*CMD, *tiny_run(begun)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    until((begun/'latest.pth').exists, p)
    p.send_signal(sig)
    out,err = p.communicate(timeout=60)
    if sig==signal.SIGTERM: fails(subprocess.CompletedProcess(p.args, p.returncode, out, err), 'stopped by SIGTERM', 'latest.pth', status=130, after_log=True)
    else: assert p.returncode==-signal.SIGKILL
    state = load_file(begun/'latest.pth') # Whole, whenever the process ended
    assert state['train_iter']<12 and all(v.isfinite().all() for v in state['model'].values() if v.is_floating_point())
    r = distillbook(*tiny_run(begun, f'Global.checkpoints={begun}/latest'))
    assert r.returncode==0, r.stderr
    a,b = (load_file(run/'latest.pth') for run in (tiny[0],begun))
    assert same_state(a['model'], b['model']) and rows_of(tiny[0])==rows_of(begun)

def test_resume_wants_the_state_of_this_run(tiny, begun):
    fails(inside(*tiny_run(begun, f'Global.checkpoints={tiny[0]}/nothing')), 'Global.checkpoints', 'there is no')
    fails(inside(*tiny_run(begun, f'Global.checkpoints={tiny[0]}/best_accuracy')), 'does not hold the state of a run', after_log=True)
    fails(inside(*tiny_run(begun, f'Global.checkpoints={tiny[0]}/latest', 'Architecture.Models.Student.Backbone.channels=[8,8,8,16]', 'Global.epoch_num=3')), 'another run', after_log=True)


# %% mistakes
def test_one_line_of_a_real_process(tmp_path): fails(distillbook('train', '-c', 'quickstart', '-o', 'Global.epochs_num=1', cwd=tmp_path), "quickstart.yml", "'epoch_num'")

@pytest.mark.parametrize('override,says', [
    ('Architecture.Models.Teacher.pretrained=PP-OCRv3_rek', ['Architecture.Models.Teacher.pretrained', "no teacher 'PP-OCRv3_rek'", "'PP-OCRv3_rec'"]),
    ('Architecture.Models.Teacher.pretrained=none.onnx', ['none.onnx', 'no such file']),
    ('Architecture.Models.Teacher.pretrained={folder}/broken.onnx', ['broken.onnx', 'not an ONNX file']),
    ('Architecture.Models.Teacher.pretrained={folder}/other.onnx', ['other.onnx']),
    ('Architecture.Models.Teacher.freeze_params=false', ['freeze_params: true']),
    ('Architecture.Models.Twin.init=Studnt', ["no net before this one 'Studnt'", "'Student'"]),
    ('Global.character_dict_path={folder}/snow.txt', ['☃']),
    ('Global.character_dict_path={folder}/ab.txt', ['Train.dataset', 'characters']),
    ('Metric.main_indicator=accuracy', ["no indicator 'accuracy'", 'acc']),
    ('Train.dataset.fonts=comic', ["'comic'", 'dejavu']),
    ('Train.dataset.words=8', ['16']),
    ('Eval.held_out.dataset.words=many', ['Eval.held_out.dataset.words', 'a whole number']),
    ('Optimizer.lr.max_rl=1', ["'max_rl'", "'max_lr'"]),
    ('Loss.loss_config_list.1.Term.loss=kld', ["no loss 'kld'", "'kd'"]),
    ('Loss.loss_config_list.1.Term.on=[Student.head_out, Teacher.head_out.ctx]', ["'Teacher.head_out.ctc'"]),
])
def test_bad_values(begun, override, says):
    folder = begun.parent
    (folder/'broken.onnx').write_bytes(b'half a file')
    (folder/'snow.txt').write_text('\n'.join('abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ☃'))
    (folder/'ab.txt').write_text('a\nb\n')
    _other_network(folder/'other.onnx')
    fails(inside(*tiny_run(begun, override.format(folder=folder))), *says)
    assert not (begun/'latest.pth').exists()

def _other_network(path):
    import onnx
    from onnx import TensorProto, helper
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1,3]) for n in 'xy']
    onnx.save(helper.make_model(helper.make_graph([helper.make_node('Relu', ['x'], ['y'])], 'g', ends[:1], ends[1:])), path)

def test_bad_pictures(tiny, tmp_path):
    run = tiny[0]
    (tmp_path/'text.png').write_text('not a picture')
    (tmp_path/'empty').mkdir()
    fails(inside('predict', '--run', run, tmp_path/'text.png'), 'text.png')
    fails(inside('predict', '--run', run, tmp_path/'empty'), 'empty')
    fails(inside('predict', '--run', run, tmp_path/'none.png'), 'none.png')
    fails(inside('predict', '--run', tmp_path, tmp_path/'text.png'), 'no config.yml')

def test_a_run_that_is_not_whole(tiny, tmp_path, pictures):
    shutil.copytree(tiny[0], tmp_path/'run')
    run,picture = tmp_path/'run',pictures[0]/'0.png'
    (run/'best_accuracy.pth').write_bytes((run/'best_accuracy.pth').read_bytes()[:1000])
    for command in (['predict', '--run', run, picture], ['eval', '--run', run], ['extract', run, '-o', tmp_path/'x.pth']):
        fails(inside(*command), 'best_accuracy.pth', 'not a readable checkpoint')
    (run/'best_accuracy.pth').unlink()
    assert inside('predict', '--run', run, picture).returncode==0 # With the latest state
    (run/'latest.pth').unlink()
    fails(inside('predict', '--run', run, picture), 'has no weights yet')


# %% sudden ends
@pytest.mark.parametrize('every,says', [(100, ["term 'loss_ctc_Student_0' gave", 'at step 3 (epoch 1 of 2']), (2, ['is NaN after step 2 (epoch 1 of 2)', 'is not written anew'])])
def test_nan_stops_and_keeps_the_last_good(tiny, begun, every, says):
    "Whether a log line sees it first, or the next state that would be saved"
    for name in ('latest.pth','best_accuracy.pth'): shutil.copy(tiny[0]/name, begun/name)
    before = {n: (begun/n).read_bytes() for n in ('latest.pth','best_accuracy.pth')}
    r = inside(*tiny_run(begun, 'Optimizer.lr.max_lr=1.0e+17', f'Global.eval_batch_step=[0,{every}]', 'Global.print_batch_step=4'))
    fails(r, *says, after_log=True)
    assert (begun/'latest.pth').read_bytes()==before['latest.pth'] and (begun/'earlier_best_accuracy.pth').read_bytes()==before['best_accuracy.pth']

def test_ctrl_c(begun):
    p = subprocess.Popen([*CMD, *tiny_run(begun, 'Global.epoch_num=500')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    until((begun/'latest.pth').exists, p)
    p.send_signal(signal.SIGINT)
    out,err = p.communicate(timeout=60)
    fails(subprocess.CompletedProcess(p.args, p.returncode, out, err), 'stopped by SIGINT', 'latest.pth', status=130, after_log=True)
    assert load_file(begun/'latest.pth')['epoch']>=0 and load_file(begun/'best_accuracy.pth')['indicator']=='acc'

def test_full_disk(begun):
    "No file may grow beyond 20 kB: one line, and the old state stays"
    (begun/'latest.pth').write_bytes(b'old')
    limit = 'import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); '
    r = subprocess.run([*CMD[:-1], limit+CMD[-1], *tiny_run(begun)], capture_output=True, text=True, env=ENV, timeout=300)
    fails(r, 'could not be written', after_log=True)
    assert (begun/'latest.pth').read_bytes()==b'old'


def test_teachers_and_help():
    rows = json.loads(inside('teachers', '--json').stdout)
    assert rows[0]['name']=='PP-OCRv3_rec' and rows[0]['licence']=='Apache-2.0'
    assert 'PP-OCRv3_rec' in inside('teachers').stdout
    r = distillbook('train', '--help')
    assert r.returncode==0 and '-o' in r.stdout and 'Example' in r.stdout
    assert inside('trian').returncode==2
