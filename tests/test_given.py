"What `train` and `eval` say at their start of what they were given, and what they refuse: frozen networks that nobody loaded, a finished run, another run, a second training in one folder"
import json, os, shutil, signal, subprocess, sys
from pathlib import Path
import cv2, numpy as np, pytest, torch, yaml
from distillbook.checkpoint import load_file, save_file
from distillbook.config import build_set, experiment, load_config, ready_networks
from distillbook.core import UserError
from distillbook.rec.decode import CTCDecoder, turned_round
from distillbook.rec.labels import Alphabet
from distillbook.use.given import frames_wanted, look_over, sentences
from distillbook.use.training import train
from test_cli import CMD, ENV, fails, inside, until

NET = '{return_all_feats: true, Backbone: {name: PlainBackbone, channels: [8, 8, 8, 8]}, Neck: {name: SequenceEncoder, encoder_type: reshape}, Head: {name: CTCHead}}'
YAML = f'''
Global: {{epoch_num: 1, save_model_dir: run, max_text_length: 25, use_gpu: false, print_batch_step: 2, eval_batch_step: [0, 2], character_dict_path: letters.txt, threads: 1}}
Architecture: {{model_type: rec, Models: {{Teacher: {NET}, Student: {NET}}}}}
Loss: {{name: CombinedLoss, loss_config_list: [{{DistillationCTCLoss: {{weight: 1.0, model_name_list: [Teacher, Student], key: head_out}}}}, {{Term: {{loss: kd, on: [Student.head_out, Teacher.head_out]}}}}]}}
Optimizer: {{name: Adam, lr: {{learning_rate: 0.001}}}}
PostProcess: {{name: DistillationCTCLabelDecode, model_name: [Student, Teacher], key: head_out}}
Metric: {{name: DistillationMetric, base_metric_name: RecMetric, key: Student, main_indicator: acc}}
Train:
  dataset: &set
    name: SimpleDataSet
    data_dir: data
    label_file_list: [data/train.txt]
    transforms: [DecodeImage: {{img_mode: BGR}}, CTCLabelEncode: , RecResizeImg: {{image_shape: [3, 48, 96]}}, KeepKeys: {{keep_keys: [image, label, length]}}]
  loader: {{shuffle: true, batch_size_per_card: 2, num_workers: 0}}
Eval:
  dataset: {{<<: *set, label_file_list: [data/val.txt]}}
  loader: {{batch_size_per_card: 2, shuffle: false}}
'''
TEXTS = ['ab', 'abc-12', 'cafe', 'aaaaaaaaaaa', '', 'bad'] # A character that is not there; more frames than twelve; nothing

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with six lines of which two are left out, and a configuration of two small networks"
    d = tmp_path_factory.mktemp('given')
    (d/'data').mkdir()
    (d/'letters.txt').write_text('\n'.join('abcdef12')+'\n')
    for i in range(6): cv2.imwrite(str(d/f'data/{i}.png'), np.full((48,96,3), 40*i, np.uint8))
    (d/'data/train.txt').write_text(''.join(f'{i}.png\t{t}\n' for i,t in enumerate(TEXTS)))
    (d/'data/val.txt').write_text('0.png\tab\n1.png\tabc-12\n2.png\té-ö\n')
    (d/'given.yml').write_text(YAML)
    return d

@pytest.fixture
def inhome(home, monkeypatch):
    monkeypatch.chdir(home)
    return home

@pytest.fixture(scope='module')
def run(home):
    "A run of one epoch, and what it said"
    was = os.getcwd()
    os.chdir(home)
    try: r = inside('train', '-c', 'given.yml')
    finally: os.chdir(was)
    assert r.returncode==0, r.stderr
    return home/'run',r


# %% the start
def test_start_block(run):
    folder,r = run
    for text in (r.stderr, (folder/'train.log').read_text()):
        for says in ("weights: Teacher new (seed 1024), Student new (seed 1024)", 'Train: 6 lines, 4 used; left out: ', '1 whose label is empty (data/train.txt:5', "1 that want more than the 12 frames of a picture (data/train.txt:4",
            "'aaaaaaaaaaa' wants 21", "Train: 1 labels have characters that the dictionary lacks, and are taught without them: '-' 1 times (data/train.txt:2", 'Eval: 2 labels have characters that the dictionary lacks, and can never be read right', 'Eval: 3 lines, 3 used'):
            assert says in text, (says, text)

def test_start_block_in_the_summary(run):
    given = json.loads((run[0]/'summary.json').read_text())['given']
    assert set(given)=={'Train','Eval'} and given['Train']['used']==4 and given['Train']['lost']['-']['count']==1 and given['Eval']['cut']==2

def test_lines_that_want_more_frames_are_left_out_of_training(run):
    assert 'the label wants 21 frames of CTC, and the network has 12 for a picture' in (run[0]/'train.log').read_text()
    assert frames_wanted('Mississippi')==14 and frames_wanted('a'*23)==45 and frames_wanted('')==0

def test_eval_says_it_too(run, inhome):
    r = inside('eval', '--run', 'run', '--json')
    assert r.returncode==0 and 'Eval: 3 lines, 3 used' in r.stderr and set(json.loads(r.stdout))>={'acc','Teacher_acc'}

def test_accuracy_is_of_the_whole_label(inhome):
    "A network that writes all that the dictionary lets it write is right in one line of three"
    cfg = load_config('given.yml')
    held = build_set(cfg, 'Eval')
    alphabet = Alphabet('abcdef12')
    decode = CTCDecoder(alphabet)
    rows = [held[i] for i in range(3)]
    said = []
    for image,label,length in rows:
        frames = torch.zeros(1, 12, 9)
        frames[0,torch.arange(12),torch.cat([torch.as_tensor([c for c in label if c<9]), torch.zeros(12)]).long()[:12]] = 9.
        reads,truths = decode(frames, torch.as_tensor(label)[None])
        said.append((reads[0][0], truths[0][0]))
    assert said==[('ab','ab'), ('abc12','abc12\ufffd'), ('','\ufffd'*3)]
    taught = build_set(load_config('given.yml', ['Train.dataset.label_file_list=[data/val.txt]']), 'Train')
    assert max(taught[1][1])<=8 # Nothing of it in training

def test_cases_of_others():
    "The cases that were reported: `-`, capitals and accents that a dictionary lacks; more frames than there are; corners line by line"
    found = [o.split('\t')[1] for o in '0.png\tabc-12\n1.png\t123A\n2.png\tcafé'.split('\n')]
    from distillbook.rec.labels import ctc_label
    letters = Alphabet('abcdefghijklmnopqrstuvwxyz')
    assert [letters.decode(ctc_label(t, letters, 25, whole=True)[0]).count('\ufffd') for t in (found[0], found[2])]==[3,1]
    abc = Alphabet('ABC')
    assert abc.decode(ctc_label('123A', abc, 25)[0])=='A' and abc.decode(ctc_label('123A', abc, 25, whole=True)[0])=='A'+3*'\ufffd'

def test_pictures_that_are_not_there(home, tmp_path):
    (tmp_path/'train.txt').write_text(''.join(f'{i}.png\tab\n' for i in (0,1,77,78)))
    cfg = load_config(home/'given.yml', [f'Global.character_dict_path={home}/letters.txt', f'Train.dataset.data_dir={home}/data', f'Train.dataset.label_file_list=[{tmp_path}/train.txt]'])
    found = look_over(build_set(cfg, 'Train'))
    assert found['used']==2 and found['left_out']['whose picture is not there']['count']==2 and 'train.txt:3' in next(iter(sentences('Train', found)))


# %% pages
@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    d = tmp_path_factory.mktemp('pages')
    cv2.imwrite(str(d/'0.png'), np.full((96,96,3), 255, np.uint8))
    tie,quad = [[10,10],[70,10],[10,40],[70,40]],[[10,50],[70,50],[70,80],[10,80]]
    rows = [[dict(transcription='one', points=tie), dict(transcription='two', points=quad)], [], [dict(transcription='###', points=quad), dict(transcription='far', points=[[200,5],[240,5],[240,40],[200,40]])]]
    (d/'label.txt').write_text(''.join(f'0.png\t{json.dumps(o)}\n' for o in rows))
    return d

def det_config(pages, *more):
    sides = [f'{s}.dataset.{k}={v}' for s in ('Train','Eval') for k,v in (('data_dir', pages), ('label_file_list', f'[{pages}/label.txt]'))]
    return load_config('det/ppocrv3_cml', [*sides, 'Train.dataset.ratio_list=1.0', *more])

def test_pages(pages):
    found = look_over(build_set(det_config(pages), 'Train'))
    assert (found['lines'], found['used'], found['words'])==(3,3,4)
    assert {k: o['count'] for k,o in found['nothing'].items()}=={'that nobody could read': 1, 'off the page': 1}
    assert found['ordered']['corners']['count']==1 and found['negatives']['without words']['count']==1
    said = ' '.join(sentences('Train', found))
    assert '1 had their corners put in order' in said and '1 pages without words, which are negatives' in said

def test_a_page_without_words_is_trained_on_and_measured(pages):
    "Its maps are empty and count everywhere; a box that is found on it is wrong"
    cfg = det_config(pages)
    cfg['Train']['dataset']['transforms'] = [o for o in cfg['Train']['dataset']['transforms'] if 'CopyPaste' not in o] # It would paste words of another page
    lines = build_set(cfg, 'Train')
    image,threshold,mask,shrink,shrink_mask = lines[1]
    assert image.shape[0]==3 and not shrink.any() and shrink_mask.all() and not mask.any() and not lines.faults
    held = build_set(det_config(pages), 'Eval')
    from distillbook.det.metric import DetMetric
    metric,box = DetMetric(),np.float32([[[1,1],[20,1],[20,20],[1,20]]])
    image,shape,polys,ignore = held[1]
    metric.add([dict(points=box, scores=np.ones(1))], (None, shape[None], [polys], [ignore]))
    metric.add([dict(points=np.float32([[[10,10],[70,10],[70,40],[10,40]], [[10,50],[70,50],[70,80],[10,80]]]), scores=np.ones(2))], (None, *(o[None] if i==0 else [o] for i,o in enumerate(held[0][1:]))))
    assert metric.value['recall']==1 and metric.value['precision']==pytest.approx(2/3)


# %% networks
def test_a_frozen_network_that_nobody_loaded_does_not_teach(inhome):
    frozen = ['Architecture.Models.Teacher.freeze_params=true', 'Loss.loss_config_list.0.DistillationCTCLoss.model_name_list=[Student]', 'Global.save_model_dir=never']
    fails(inside('train', '-c', 'given.yml', '-o', *frozen), 'given.yml:3: Architecture.Models.Teacher.pretrained', 'this network is frozen and teaches, but has no weights', '-o Architecture.Models.Teacher.pretrained=none')
    exp = experiment(load_config('given.yml', [*frozen, 'Architecture.Models.Teacher.pretrained=none']))
    assert 'Teacher' in exp.nets.frozen and exp.sources['Teacher'].startswith('new')

def test_a_frozen_copy_of_what_nobody_loaded_does_not_teach(inhome, tmp_path):
    "`init` is no weights, if those of the other network are new; chains of it are followed"
    changes = ['Loss.loss_config_list.0.DistillationCTCLoss.model_name_list=[Student]', 'Global.save_model_dir=never']
    (inhome/'copies.yml').write_text(YAML.replace(f'Teacher: {NET}, Student: {NET}', f'Student: {NET}, Third: {{init: Student}}, Teacher: {{init: Third, freeze_params: true}}'))
    with pytest.raises(UserError, match='Architecture.Models.Teacher.pretrained: this network is frozen and teaches, but has no weights: -o Architecture.Models.Student.pretrained=FILE'): experiment(load_config('copies.yml', changes))
    from distillbook.use.weights import save_weights
    save_weights(experiment(load_config('given.yml')).nets['Student'], tmp_path/'s.pth')
    assert 'Teacher' in experiment(load_config('copies.yml', [*changes, f'Architecture.Models.Student.pretrained={tmp_path}/s.pth'])).nets.frozen

def test_a_network_that_no_term_teaches_is_told_of(inhome, caplog):
    change = ['Loss.loss_config_list=[{DistillationCTCLoss: {weight: 1.0, model_name_list: [Student], key: head_out}}]', 'Global.save_model_dir=untaught']
    with caplog.at_level('WARNING', 'distillbook'): train(experiment(load_config('given.yml', change)))
    assert sum('Teacher: no term teaches this network' in o.message for o in caplog.records)==1

def test_an_address_that_leads_nowhere_has_its_place(inhome):
    fails(inside('train', '-c', 'given.yml', '-o', 'Global.save_model_dir=never', 'Loss.loss_config_list.1.Term.on=[Student.haed_out, Teacher.head_out]'), 'given.yml:4: Loss.loss_config_list.1.Term.on: ', "no output or module 'Student.haed_out'", after_log=True)

def test_messages_have_no_names_of_ours():
    for change,says in (('Loss.loss_config_list.0.DistillationCTCLoss.wieght2=1', 'no key of DistillationCTCLoss'), ('Loss.loss_config_list.0.DistillationCTCLoss.kee=1', 'no key of DistillationCTCLoss')):
        with pytest.raises(UserError, match=says): experiment(load_config('quickstart', [change]))


# %% going on
def test_a_finished_run_says_so(run, inhome):
    go_on = ['train', '-c', 'run/config.yml', '-o', 'Global.checkpoints=run/latest']
    fails(inside(*go_on), 'latest.pth: 1 of 1 epochs done; to go on, raise Global.epoch_num', after_log=True)
    assert (run[0]/'summary.json').exists()

@pytest.mark.parametrize('change,says,name', [('Train.dataset.seed=7', 'the seed of the data was 1024 and is now 7', 'seed'), ('Train.loader.shuffle=false', 'the shuffling was True and is now False', 'shuffle'), ('Optimizer.lr.learning_rate=0.002', 'the learning rate of step 0 was 0.001 and is now 0.002', 'rate'), ('Loss.loss_config_list.1.Term.weight=3', 'the weight of kd_Student_Teacher was 1 and is now 3', 'weight'), ('Metric.main_indicator=norm_edit_dis', 'the indicator was acc and is now norm_edit_dis', 'indicator')])
def test_what_is_another_is_told_and_asked_for(run, inhome, change, says, name):
    go_on = ['Global.checkpoints=run/latest', 'Global.epoch_num=2', 'Global.save_model_dir=gone_on', change]
    with pytest.raises(UserError) as e: train(experiment(load_config('given.yml', go_on)))
    assert says in str(e.value) and f'if that is meant, say so: -o Global.accept=[{name}]' in str(e.value)
    if name!='rate': return
    train(experiment(load_config('given.yml', [*go_on, f'Global.accept=[{name}]'])))
    assert load_file('gone_on/latest.pth')['epoch']==1
    with pytest.raises(UserError, match="did you mean 'rate'"): train(experiment(load_config('given.yml', [*go_on, 'Global.accept=[rat]'])))

@pytest.mark.parametrize('key,value', [('epoch','x'), ('batch',10**9), ('best','high'), ('counters',None), ('random',5), ('recorded',{}), ('opt',[]), ('grads','none'), ('setup',3), ('train_iter',-5), ('frozen',[1])])
def test_odd_values_in_a_sound_state(run, inhome, tmp_path, key, value):
    state = load_file('run/latest.pth')
    if value is None: del state[key]
    else: state[key] = value
    save_file(state, tmp_path/'odd.pth')
    cfg = load_config('given.yml', [f'Global.checkpoints={tmp_path}/odd', 'Global.epoch_num=2', f'Global.save_model_dir={tmp_path}/run'])
    with pytest.raises(UserError, match='odd.pth|the state'): train(experiment(cfg))

def test_one_training_in_a_folder(run, inhome, tmp_path):
    child = subprocess.Popen([sys.executable, '-c', f'import fcntl,sys,time; f=open({str(tmp_path/"train.log")!r},"a+"); fcntl.lockf(f, fcntl.LOCK_EX); print("locked", flush=True); time.sleep(100)'], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline()=='locked\n'
        with pytest.raises(UserError, match='another training is running in this folder'): train(experiment(load_config('given.yml', [f'Global.save_model_dir={tmp_path}'])))
    finally:
        child.kill()
        child.wait()

def test_a_stale_best_state_is_put_aside(run, inhome, tmp_path):
    shutil.copytree(run[0], tmp_path/'run')
    old = load_file(tmp_path/'run/best_accuracy.pth')
    train(experiment(load_config('given.yml', [f'Global.save_model_dir={tmp_path}/run', 'Global.seed=5'])))
    new,aside = (load_file(tmp_path/f'run/{n}.pth')['model'] for n in ('best_accuracy','earlier_best_accuracy'))
    assert all(torch.equal(v, aside[k]) for k,v in old['model'].items()) and not all(torch.equal(v, new[k]) for k,v in aside.items())

def test_a_folder_that_was_deleted_is_no_success(run, inhome, tmp_path):
    from fastai.basics import Callback
    class Delete(Callback):
        def after_epoch(self): shutil.rmtree(tmp_path/'run')
    exp = experiment(load_config('given.yml', [f'Global.save_model_dir={tmp_path}/run']))
    exp.cbs = [*exp.cbs, Delete()]
    with pytest.raises(UserError, match='files of this run were deleted while it trained'): train(exp)

def test_a_left_over_folder_does_not_stop_saving(tmp_path):
    (tmp_path/'.state.x.pth').mkdir()
    os.utime(tmp_path/'.state.x.pth', (0,0))
    save_file(dict(a=1), tmp_path/'state.pth')
    assert load_file(tmp_path/'state.pth')==dict(a=1)


# %% a run's folder
def test_a_run_from_any_directory(run, tmp_path, monkeypatch):
    "Also after the dictionary and the configuration have gone, and after the folder was moved"
    shutil.copytree(run[0], tmp_path/'moved')
    monkeypatch.chdir(tmp_path)
    assert (run[0]/'letters.txt').read_text().split()==list('abcdef12')
    r = inside('eval', '--run', 'moved', '--json')
    assert r.returncode==0, r.stderr
    saved = yaml.safe_load((run[0]/'config.yml').read_text())
    assert saved['Global']['character_dict_path']=='letters.txt' and Path(saved['Train']['dataset']['data_dir']).is_absolute() and all(Path(o).is_absolute() for o in saved['Eval']['dataset']['label_file_list'])
    cv2.imwrite('a.png', np.zeros((48,96,3), np.uint8))
    assert inside('predict', '--run', 'moved', 'a.png').returncode==0


def test_paths_of_what_a_run_makes_are_whole(inhome, tmp_path):
    "A folder of kept pictures is not there yet when the configuration is written down"
    run = train(experiment(load_config('given.yml', [f'Global.save_model_dir={tmp_path}/run', 'Train.dataset.keep=kept_pictures']))).checkpoint.folder
    assert yaml.safe_load((run/'config.yml').read_text())['Train']['dataset']['keep']==str(inhome/'kept_pictures') and (inhome/'kept_pictures').is_dir()

def test_a_run_reads_from_the_right_wherever_its_dictionary_lies(home, tmp_path):
    "PaddleOCR's rule looks at the whole path of the dictionary, and a run has a copy of it"
    from distillbook.config import build_decoder
    from distillbook.config.assembly import run_settings
    (tmp_path/'arabic').mkdir()
    (tmp_path/'arabic/letters.txt').write_text('א\nב\nג\n', encoding='utf-8')
    cfg = one_net(home, f'Global.character_dict_path={tmp_path}/arabic/letters.txt')
    saved = run_settings(cfg).config
    assert saved['Global']['character_dict_path']=='letters.txt' and saved['PostProcess']['reverse'] is True
    (tmp_path/'run').mkdir()
    (tmp_path/'run/config.yml').write_text(yaml.safe_dump(saved))
    (tmp_path/'run/letters.txt').write_text('א\nב\nג\n', encoding='utf-8')
    assert build_decoder(load_config(tmp_path/'run/config.yml'))(torch.eye(4)[torch.tensor([[1,2,3]])])[0][0]=='גבא'
    assert 'reverse' not in run_settings(one_net(home)).config['PostProcess']

def test_where_weights_come_from_when_a_run_goes_on(run, inhome, tmp_path):
    "The frozen teacher is in no checkpoint: its weights come from its own file"
    frozen = ['Architecture.Models.Teacher.freeze_params=true', 'Architecture.Models.Teacher.pretrained=teacher.pth', 'Loss.loss_config_list.0.DistillationCTCLoss.model_name_list=[Student]', f'Global.save_model_dir={tmp_path}/run']
    from distillbook.use.weights import extract, save_weights
    save_weights(extract(run[0], 'Teacher'), inhome/'teacher.pth')
    train(experiment(load_config('given.yml', frozen)))
    again = experiment(load_config('given.yml', [*frozen, f'Global.checkpoints={tmp_path}/run/latest', 'Global.epoch_num=2']))
    assert again.sources==dict(Teacher='teacher.pth', Student=f'{tmp_path}/run/latest')

@pytest.mark.parametrize('folder', ['/dev/null/x', '/proc/nowhere', 'x'*300, 'letters.txt'])
def test_a_run_that_cannot_be_kept(folder, inhome):
    with pytest.raises(UserError, match='a run cannot be kept here: '): train(experiment(load_config('given.yml', [f'Global.save_model_dir={folder}'])))

@pytest.mark.parametrize('key', ['Global.character_dict_path', 'Train.dataset.label_file_list', 'Global.pretrained_model', 'Global.checkpoints'])
@pytest.mark.parametrize('place', ['/dev/zero', 'pipe'])
def test_what_is_no_file(key, place, inhome):
    if not os.path.exists('pipe'): os.mkfifo('pipe')
    value = f'[{place}]' if key.endswith('list') else place
    fails(inside('train', '-c', 'given.yml', '-o', f'{key}={value}', 'Global.save_model_dir=never'), place, after_log=True)
    fails(inside('train', '-c', place), 'not a file, but a device or a pipe')

# %% what helps
def one_net(home, *more):
    "The configuration of a student without a name"
    values = yaml.safe_load(YAML) | dict(Architecture=dict(model_type='rec', **yaml.safe_load(NET)), Loss=dict(name='CTCLoss'), PostProcess=dict(name='CTCLabelDecode'), Metric=dict(name='RecMetric'))
    (home/'one.yml').write_text(yaml.safe_dump(values))
    return load_config(home/'one.yml', [f'Global.character_dict_path={home}/letters.txt', *more])

def test_two_networks_into_one(run, inhome, tmp_path):
    with pytest.raises(UserError, match='distillbook extract .*best_accuracy.pth --net (Teacher|Student) -o (Teacher|Student).safetensors'): ready_networks(one_net(inhome, 'Global.pretrained_model=run/best_accuracy'))

def test_weights_for_another_dictionary(run, inhome, tmp_path):
    (tmp_path/'more.txt').write_text('\n'.join('abcdef123456')+'\n')
    with pytest.raises(UserError, match='weights for another dictionary.*Global.pretrained_dict_path'): experiment(load_config('given.yml', [f'Global.character_dict_path={tmp_path}/more.txt', 'Global.pretrained_model=run/best_accuracy']))

def test_weights_alone_are_no_state(run, inhome):
    with pytest.raises(UserError, match='Global.pretrained_model'): train(experiment(load_config('given.yml', ['Global.checkpoints=run/best_accuracy', 'Global.save_model_dir=never'])))

WRAPPED = dict(plain=lambda s: s, state_dict=lambda s: dict(epoch=3, state_dict=s), model_state_dict=lambda s: dict(model_state_dict=s, optimizer_state_dict={}), torchdistill=lambda s: dict(model=s, best_value=.5, optimizer={}), timm=lambda s: dict(arch='x', epoch=1, state_dict=s, state_dict_ema=s),
    parallel=lambda s: {f'module.{k}': v for k,v in s.items()}, mean=lambda s: dict(n_averaged=torch.tensor(3), **{f'module.{k}': v for k,v in s.items()}), mmengine=lambda s: dict(meta={}, state_dict=s, message_hub={}, ema_state_dict=dict(steps=torch.tensor(1), **{f'module.{k}': v for k,v in s.items()})),
    lightning=lambda s: {'pytorch-lightning_version': '2.0', 'state_dict': {f'model.{k}': v for k,v in s.items()}}, compiled=lambda s: {f'_orig_mod.{k}': v for k,v in s.items()}, both=lambda s: dict(model={f'module._orig_mod.{k}': v for k,v in s.items()}))

@pytest.mark.parametrize('how', WRAPPED)
def test_foreign_wrappers(how, inhome, tmp_path):
    from distillbook.config import build_model
    model = build_model(one_net(inhome))
    state = {k: v+1 if v.is_floating_point() else v for k,v in model.state_dict().items()}
    torch.save(WRAPPED[how](state), tmp_path/'theirs.pth')
    got = build_model(one_net(inhome, f'Global.pretrained_model={tmp_path}/theirs')).state_dict()
    assert all(torch.equal(v, got[k]) for k,v in state.items())

def test_a_wrapper_that_nobody_knows_is_named(inhome, tmp_path):
    from distillbook.config import build_model
    torch.save(dict(wibble=dict(a=torch.zeros(1))), tmp_path/'theirs.pth')
    with pytest.raises(UserError, match="a dict under 'wibble'"): build_model(one_net(inhome, f'Global.pretrained_model={tmp_path}/theirs'))


# %% from the right
def test_text_turned_round_as_paddleocr_does():
    "PaddleOCR's rule: every character by itself, but for runs of Latin letters, digits and what stands in numbers"
    assert turned_round('دعب 25.5% ABC مالس')=='سلام 25.5% ABC بعد' and turned_round('abc 1')=='abc 1' and turned_round('')=='' and turned_round('אב-1')=='-1בא'

@pytest.mark.parametrize('name,key,says', [('arabic_dict.txt', '', 'גבא'), ('letters.txt', '', 'אבג'), ('letters.txt', 'true', 'גבא'), ('arabic_dict.txt', 'false', 'אבג')])
def test_reading_from_the_right(name, key, says, home, tmp_path):
    from distillbook.config import build_decoder
    (tmp_path/name).write_text('א\nב\nג\n', encoding='utf-8')
    more = [f'PostProcess.reverse={key}'] if key else []
    decode = build_decoder(one_net(home, f'Global.character_dict_path={tmp_path/name}', *more))
    ids = torch.tensor([[1,2,3]])
    reads,truths = decode(torch.eye(4)[ids], ids)
    assert reads[0][0]==truths[0][0]==says

def test_heights_that_a_backbone_can_take():
    change = ['Global.character_dict_path=', 'Architecture.Models.Teacher.Backbone.scale=0.125', 'Architecture.Models.Student.Backbone.scale=0.125']
    from distillbook.config.assembly import check_heights
    from distillbook.config.networks import build_networks
    cfg = load_config('rec/ppocrv3_distillation', change)
    for o in cfg['Train']['dataset']['transforms']:
        if 'RecResizeImg' in o: o['RecResizeImg']['image_shape'] = [3,320,320]
    with pytest.raises(UserError, match=r'the backbone of \w+ makes no line of pictures \d+ pixels high; RecResizeImg.image_shape can be \[3, \d+, width\] .of the heights tried: (\d+, )*48'): check_heights(cfg, build_networks(cfg))

def test_a_signal_to_all_processes_saves_the_state(home, tmp_path):
    "As `timeout 60 distillbook train` sends it: the processes that read lines live until the batch is done"
    args = ['train', '-c', 'given.yml', '-o', f'Global.save_model_dir={tmp_path}/run', 'Global.epoch_num=100000', 'Train.loader.num_workers=2', 'Global.eval_batch_step=[0,1000000]']
    p = subprocess.Popen([*CMD, *args], cwd=home, env=ENV, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until(lambda: (tmp_path/'run/train.log').exists() and 'global_step: 4,' in (tmp_path/'run/train.log').read_text(), p)
    os.killpg(p.pid, signal.SIGTERM)
    said = p.communicate(timeout=120)[1]
    assert p.returncode==130 and 'stopped by SIGTERM' in said and 'Traceback' not in said, said[-2000:]
    assert load_file(tmp_path/'run/latest.pth')['epoch']>=1

def test_a_small_file_that_claims_four_gigabytes(tmp_path):
    "A part of 104 bytes says that it has 4 GB, and OpenCV would make room for them"
    import struct, zlib
    from distillbook.data.pictures import picture_from
    def part(kind, data, size=None): return struct.pack('>I', len(data) if size is None else size)+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    head = b'\x89PNG\r\n\x1a\n'+part(b'IHDR', struct.pack('>IIBBBBB', 4, 4, 8, 2, 0, 0, 0))
    lie = head+part(b'tEXt', b'x'*20, 0xfffffff0)+part(b'IEND', b'')
    with pytest.raises(UserError): picture_from(lie)
    assert picture_from(head+part(b'IDAT', zlib.compress(bytes(52)))+part(b'IEND', b'')).shape==(4,4,3)
    os.mkfifo(tmp_path/'fifo')
    from distillbook.data.pictures import read_picture
    for o in (tmp_path/'fifo', '/dev/zero'):
        with pytest.raises(UserError, match='not a file, but a device or a pipe'): read_picture(o)

def test_a_card_says_nothing_of_where_it_was_made():
    from distillbook.use.export import _code, _escaped, _yaml
    said = _yaml(dict(Global=dict(save_model_dir='/home/me/secret/run', pretrained_model='..\\mine\\x.pth', data='./train_data')))
    assert '/home' not in said and 'secret' not in said and '.../run' in said and './train_data' in said
    assert _escaped('<b>a|b</b> [x](javascript:1)\x1b[31m')=='&lt;b&gt;a\\|b&lt;/b&gt; [x\\](javascript:1)\\\\x1b[31m' and _code('yaml', 'a\n```\nb').startswith('````yaml\n')
