"The commands around training, as a user runs them one after the other: data out of nothing, a run, networks taken out, exported, read, compared"
import json
from pathlib import Path
import cv2, numpy as np, pytest, torch, yaml
from distillbook.config import build_model, load_config
from distillbook.use.export import open_onnx
from distillbook.use.weights import load_weights, read_weights
from test_cli import fails, inside as distillbook # A command in this process (test_cli.py has a shell's)

ROOT = Path(__file__).parents[1]
NETS = [f'Architecture.Models.{n}.{k}' for n in ('Teacher','Student') for k in ('Backbone.scale=0.0625', 'Head.head_list.1.SARHead.enc_dim=16', 'Head.head_list.1.SARHead.d_k=16')]

def overrides(folder, *more):
    data = [f'{s}.{k}' for s,f in (('Train','train.txt'),('Eval','val.txt')) for k in (f'dataset.data_dir={folder}/words', f'dataset.label_file_list=[{folder}/words/{f}]', 'loader.batch_size_per_card=8', 'loader.num_workers=0')]
    return [*data, 'Global.character_dict_path=', 'Global.epoch_num=1', *more]

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A folder with rendered words and a run on them"
    folder = tmp_path_factory.mktemp('io')
    r = distillbook('render', 'rec', '-o', folder/'words', '-n', 24, '--val', 8)
    assert r.returncode==0 and 'Train.dataset.data_dir' in r.stdout, r.stderr
    r = distillbook('train', '-c', ROOT/'configs/rec/ppocrv3_distillation.yml', '-o', *NETS, *overrides(folder, f'Global.save_model_dir={folder}/run'))
    assert r.returncode==0, r.stderr
    return folder

def test_render(run, tmp_path):
    lines = (run/'words/train.txt').read_text().splitlines()
    assert len(lines)==24 and len((run/'words/val.txt').read_text().splitlines())==8 and all((run/'words'/l.split('\t')[0]).exists() for l in lines)
    fails(distillbook('render', 'rec', '-o', run/'words'), 'is there already')
    fails(distillbook('render', 'dte', '-o', tmp_path/'x'), "did you mean 'det'")
    fails(distillbook('render', 'det', '-o', tmp_path/'x', '--fonts', 'comic'), 'comic')
    assert not list(tmp_path.iterdir())
    assert distillbook('render', 'det', '-o', tmp_path/'pages', '-n', 2, '--val', 1).returncode==0
    assert len(json.loads((tmp_path/'pages/train.txt').read_text().splitlines()[0].split('\t')[1])[0]['points'])==4

def test_summary(run, tmp_path):
    r = distillbook('summary', '-c', ROOT/'configs/rec/ppocrv3_distillation.yml', '-o', *NETS, *overrides(run), '--json', '--draw', tmp_path/'s.png')
    found = json.loads(r.stdout)
    assert [n['role'] for n in found['nets']]==['learns and teaches']*2 and len(found['terms'])==7 and all(n['MACs']>1e6 for n in found['nets'])
    assert cv2.imread(str(tmp_path/'s.png')).std()>5
    assert 'Student, Teacher' in distillbook('summary', '--run', run/'run').stdout
    fails(distillbook('summary', '--run', run/'run', '--draw', tmp_path/'s.gif'), '.png')
    fails(distillbook('summary'), '-c FILE or --run FOLDER')

def test_lr_find(run, tmp_path):
    r = distillbook('lr-find', '-c', ROOT/'configs/rec/ppocrv3_distillation.yml', '-o', *NETS, *overrides(run, f'Global.save_model_dir={tmp_path}/never'), '--json', '--steps', 20, '--draw', tmp_path/'l.png')
    rates = json.loads(r.stdout)
    assert set(rates)=={'valley','steep','minimum'} and all(1e-8<v<=1 for v in rates.values()) and [p.name for p in tmp_path.iterdir()]==['l.png']

@pytest.mark.parametrize('suffix', ['safetensors', 'pth', 'pdparams'])
def test_extract(run, suffix, tmp_path):
    r = distillbook('extract', run/'run', '--net', 'Student', '-o', tmp_path/f's.{suffix}')
    assert r.returncode==0, r.stderr
    cfg = load_config(ROOT/'configs/rec/ppocrv3.yml', ['Global.character_dict_path=', 'Architecture.Backbone.scale=0.0625', 'Architecture.Head.head_list.1.SARHead.enc_dim=16', 'Architecture.Head.head_list.1.SARHead.d_k=16'])
    net = build_model(cfg)
    assert not any(load_weights(net, tmp_path/f's.{suffix}')[1:])
    want = {k.removeprefix('Student.'): v for k,v in read_weights(run/'run').items() if k.startswith('Student.')}
    assert all(torch.equal(v, want[k]) for k,v in net.state_dict().items() if not k.endswith('num_batches_tracked'))

def test_extract_mistakes(run, tmp_path):
    fails(distillbook('extract', run/'run', '--net', 'Studnet', '-o', tmp_path/'s.pth'), "did you mean 'Student'")
    fails(distillbook('extract', run/'run', '-o', tmp_path/'s.bin'), '.safetensors')
    fails(distillbook('extract', tmp_path/'none', '-o', tmp_path/'s.pth'), 'there is no')
    assert not list(tmp_path.iterdir())

def test_export(run, tmp_path):
    r = distillbook('export', '--run', run/'run', '--net', 'all', '--out', tmp_path, '--json')
    assert [Path(p).name for p in json.loads(r.stdout)]==['Teacher.onnx', 'Student.onnx'], r.stderr
    session,about = open_onnx(tmp_path/'Student.onnx')
    assert about['character']==list('0123456789abcdefghijklmnopqrstuvwxyz') and 'acc' in about['metrics'] and (tmp_path/'Student.md').exists()
    seen = json.loads(distillbook('predict', '--run', run/'run', '--json', run/'words/images/000003.png').stdout)[0]
    line = cv2.imread(str(run/'words/images/000003.png'))
    w = -(-48*line.shape[1]//line.shape[0])
    x = np.zeros((1,3,48,320), np.float32)
    x[0,:,:,:min(w,320)] = (cv2.resize(line, (min(w,320),48)).transpose(2,0,1)/255-.5)/.5
    best = session.run(None, dict(x=x))[0][0].argmax(-1)
    text = ''.join(about['character'][i-1] for j,i in enumerate(best) if i and (not j or best[j-1]!=i))
    assert text==seen['Student']['label']
    assert distillbook('export', '--run', run/'run', '--net', 'Student,Teacher', '--ensemble', 'outputs', '--out', tmp_path).returncode==0 and (tmp_path/'Ensemble.onnx').exists()
    fails(distillbook('export', '--run', run/'run', '--to', 'onx'), "did you mean 'onnx'")
    fails(distillbook('export', '--run', run/'run', '--net', 'Studnet'), "did you mean 'Student'")
    fails(distillbook('export', '--run', tmp_path), 'no config.yml')

def test_read(run, tmp_path):
    r = distillbook('render', 'det', '-o', tmp_path/'pages', '-n', 1, '--val', 1)
    page = tmp_path/'pages/images/00000.png'
    rows = json.loads(distillbook('read', page, '--json', '--draw', tmp_path/'d.png').stdout)
    truth = [o['transcription'] for o in json.loads((tmp_path/'pages/train.txt').read_text().split('\t')[1])]
    assert len({l['text'] for l in rows[0]['lines']} & set(truth))>=len(truth)/2 and cv2.imread(str(tmp_path/'d.png')).shape[1]==2*640
    assert distillbook('read', tmp_path/'pages/images', '--draw', tmp_path/'drawn').returncode==0 and len(list((tmp_path/'drawn').iterdir()))==2
    (tmp_path/'bad.png').write_text('no picture')
    fails(distillbook('read', tmp_path/'bad.png'), 'bad.png')
    fails(distillbook('read', page, '--rec', 'PP-OCRv3_det'), 'not a recogniser')

def test_compare(run, tmp_path):
    rows = json.loads(distillbook('compare', run/'run', run/'run', '--json').stdout)
    assert len(rows)==2 and rows[0]['run']=='run' and 'acc' in rows[0] and rows[0]['step']==3
    assert distillbook('compare', run/'run', '--draw', tmp_path/'c.png').returncode==0 and (tmp_path/'c.png').exists()
    fails(distillbook('compare', tmp_path), 'no config.yml')

def test_eval_and_fine_tuning_on_another_alphabet(run, tmp_path):
    got = json.loads(distillbook('eval', '--run', run/'run', '--json').stdout)
    assert {'acc', 'Teacher_acc'}<=set(got)
    distillbook('extract', run/'run', '-o', tmp_path/'s.pdparams')
    (tmp_path/'old.txt').write_text('\n'.join('0123456789abcdefghijklmnopqrstuvwxyz'))
    (tmp_path/'new.txt').write_text('\n'.join('0123456789abcdefghijklmnopqrstuvwxyzABC'))
    one = ['Architecture.Backbone.scale=0.0625', 'Architecture.Head.head_list.1.SARHead.enc_dim=16', 'Architecture.Head.head_list.1.SARHead.d_k=16']
    args = ['train', '-c', ROOT/'configs/rec/ppocrv3.yml', '-o', *one, *overrides(run), f'Global.character_dict_path={tmp_path}/new.txt', 'Global.use_space_char=false', f'Global.pretrained_model={tmp_path}/s.pdparams', f'Global.save_model_dir={tmp_path}/run']
    r = distillbook(*args)
    assert r.returncode==2 and 'of another shape' in r.stderr
    r = distillbook(*args, f'Global.pretrained_dict_path={tmp_path}/old.txt')
    assert r.returncode==0 and 'of 39 characters, 36 were known' in r.stderr, r.stderr

def test_a_released_teacher_by_name(run, tmp_path):
    "PP-OCRv3 needs no layers in the file; its answers are kept only where pictures come again"
    cfg = yaml.safe_load((ROOT/'configs/rec/ppocrv3_distillation.yml').read_text())
    cfg['Architecture']['Models']['Teacher'] = dict(pretrained='PP-OCRv3_rec', freeze_params=True, cache=True)
    pair = dict(act='softmax', use_log=True, model_name_pairs=[['Student','Teacher']], key='head_out', multi_head=True, dis_head='ctc', name='dml_ctc', weight=1.)
    own = dict(model_name_list=['Student'], key='head_out', multi_head=True, weight=1.)
    cfg['Loss']['loss_config_list'] = [dict(DistillationDMLLoss=pair), dict(DistillationCTCLoss=own), dict(DistillationSARLoss=own)]
    (tmp_path/'t.yml').write_text(yaml.safe_dump(cfg))
    args = ['train', '-c', tmp_path/'t.yml', '-o', *[o for o in NETS if 'Student' in o], *overrides(run, f'Global.save_model_dir={tmp_path}/run')]
    r = distillbook(*args)
    assert r.returncode==2 and 'variants' in r.stderr
    r = distillbook(*args, 'Train.dataset.variants=1')
    assert r.returncode==0 and (tmp_path/'run/answers/PP-OCRv3_rec.bin').stat().st_size>1000, r.stderr
    assert json.loads(distillbook('eval', '--run', tmp_path/'run', '--json').stdout)['Teacher_acc']>.3

@pytest.mark.parametrize('command', 'train eval predict export extract read render lr-find summary compare teachers'.split())
def test_help(command):
    r = distillbook(command, '--help')
    assert r.returncode==0 and ('Example' in r.stdout or command=='teachers') and len(r.stdout.splitlines())>5
