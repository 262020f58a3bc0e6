"`distillbook check`: every refusal of a file at once, with file and line; a row for each of many files; its exit status"
import json, re
from pathlib import Path
import pytest, torch, yaml
from torch import nn
from typer.testing import CliRunner
from distillbook.cli import app
from distillbook.config import build_terms, load_config
from distillbook.config.assembly import check_teachers
from distillbook.config.checker import missing_files, refusals, report, without_numbers
from distillbook.config.files import read_config, shipped_configs
from distillbook.config.values import Refusals, Section, Trying
from distillbook.core import UserError

CML = (shipped_configs()/'det'/'ppocrv3_cml.yml').read_text()
REC = (shipped_configs()/'rec'/'ppocrv3_distillation.yml').read_text()

def write(folder, text, name='my.yml'):
    (folder/name).write_text(text)
    return folder/name

def changed(text, *pairs):
    for right,wrong in pairs:
        assert right in text, right
        text = text.replace(right, wrong)
    return text

def line_of(text, words): return next(i for i,l in enumerate(text.splitlines(), 1) if words in l)

def run(*args):
    r = CliRunner().invoke(app, [str(a) for a in args], prog_name='distillbook')
    if r.exception and not isinstance(r.exception, SystemExit): raise r.exception
    return r


# %% together
def test_trying_goes_on():
    trying = Trying()
    for i in range(3):
        with trying():
            if i!=1: raise UserError(f'number {i}')
    with pytest.raises(Refusals, match=r'number 0 \(and 1 more\)') as e: trying.done()
    assert [str(o) for o in e.value.each]==['number 0','number 2']
    outer = Trying()
    with outer(): raise e.value
    with outer(): raise UserError('one more')
    assert len(outer.each)==3

def test_one_refusal_is_itself_and_other_errors_are_not_caught():
    trying = Trying()
    with trying(): raise UserError('alone')
    with pytest.raises(UserError, match='^alone$') as e: trying.done()
    assert not isinstance(e.value, Refusals) and Trying().done() is None
    with pytest.raises(KeyError), Trying()(): raise KeyError('x')


# %% every part of a file
WRONG = [('epoch_num', 'epochs'), ('name: DistillationModel', 'name: DistilationModel')]

def test_each_part_is_tried(tmp_path):
    text = changed(CML, ('eval_batch_step: [0, 400]', 'eval_batch_step: often'), ('save_epoch_step: 100', 'save_epoch_step: 0'), ('name: Cosine', 'name: Cosin'), ('factor: 5.0e-05', 'factor: much'),
        ('model_name: large', 'model_name: huge'), ('layers: 50', 'layer: 50'), ('name: RSEFPN, out_channels: 96, shortcut: true', 'name: RSEFPN, out_channel: 96, shortcut: true'), ('kernel_list: [7, 2, 2]', 'kernel_list: [8, 2, 2]'),
        ('maps_name: thrink_maps', 'maps_name: thrinkmaps'), ('model_name_list: [Student, Student2]', 'model_name_list: [Student, Student3]'), ('unclip_ratio', 'unclip_ration'), ('main_indicator: hmean', 'main_indicator: mean'),
        ('EastRandomCropData: {size: [960, 960], max_tries: 50', 'EastRandomCropData: {size: [960, 960], max_trys: 50'), ('MakeShrinkMap', 'MakeShrinkMaps'), ('batch_size_per_card: 8', 'batch_size_per_card: none'), ('num_workers: 2', 'num_worker: 2'))
    file = write(tmp_path, text)
    found = refusals(read_config(file))
    keys = [e.spot[2] for e in found]
    wanted = ['Global.eval_batch_step', 'Global.save_epoch_step', 'Optimizer.lr.name', 'Optimizer.regularizer.factor', 'Architecture.Models.Student.Backbone', 'Architecture.Models.Student2.Backbone', 'Architecture.Models.Teacher.Backbone.layer', 'Architecture.Models.Student.Neck.out_channel',
        'Architecture.Models.Student2.Neck.out_channel', 'Architecture.Models.Teacher.Head', 'Loss.loss_config_list.1.DistillationDMLLoss', 'Loss.loss_config_list.2.DistillationDBLoss.model_name_list', 'PostProcess.unclip_ration', 'Metric.main_indicator',
        'Train.dataset.transforms.4.EastRandomCropData.max_trys', 'Train.dataset.transforms.6.MakeShrinkMaps', 'Train.loader.batch_size_per_card', 'Eval.loader.num_worker']
    assert [w for w in wanted if not any(k.startswith(w) for k in keys)]==[], [str(e) for e in found]
    lines = [e.spot[1] for e in found]
    assert lines==sorted(lines) and all(str(e).startswith(f'{file}:{e.spot[1]}: {e.spot[2]}: ') for e in found)
    assert next(e.spot[1] for e in found if 'max_trys' in e.spot[2])==line_of(text, 'max_trys')
    assert len({str(e) for e in found})==len(found)

def test_a_mistake_does_not_hide_one_that_is_read_with_it(tmp_path):
    "Without a number of epochs the schedule is tried all the same"
    found = [str(e) for e in refusals(read_config(write(tmp_path, changed(CML, ('epoch_num: 500', 'epochs: 500'), ('warmup_epoch: 2', 'warmup_epoch: soon')))))]
    assert [any(w in e for e in found) for w in ("no key 'epochs'", 'how many epochs?', "a number from 0 is wanted, not 'soon'")]==[True]*3 and len(found)==3, found

def test_a_recogniser_too(tmp_path):
    text = changed(REC, ('scale: 0.5', 'scale: half'), ('hidden_dims: 120', 'hiden_dims: 120'), ('enc_dim: 512', 'enc_dims: 512'), ('use_log: true', 'use_logs: true'), ('RecConAug', 'RecConAugs'))
    keys = ' '.join(e.spot[2] for e in refusals(read_config(write(tmp_path, text))))
    assert all(k in keys for k in ('Backbone', 'hiden_dims', 'use_logs', 'RecConAugs')), keys

NECK = dict(name='svtr', dims=120, depth=2, hidden_dims=120, kernel_size=[1,3], use_guide=True)
PAIR = dict(weight=1., key='head_out', multi_head=True, dis_head='gtc')
ROWS = 'Loss','loss_config_list'
LISTS = { # Where something is put, in a file of ours; what; and the keys of all that is then refused
    'heads': ('rec/ppocrv4', ('Architecture','Head','head_list'), [dict(CTCHead=dict(Neck={**NECK, 'dept': 2, 'dim': 3}, Head=dict(fc_decays=1))), dict(NRTRHead=dict(nrtr_dims=384)), dict(SARHeads={}), 'SARHead'],
        ['0.CTCHead.Neck.dept', '0.CTCHead.Neck.dim', '0.CTCHead.Head.fc_decays', '1.NRTRHead.nrtr_dims', '2.SARHeads', '3']),
    'a head beside others': ('rec/ppocrv4', ('Architecture','Head'), dict(name='MultiHead', use_poll=True, use_pos='ofte', head_list=[dict(CTCHead=dict(Neck=NECK)), dict(NRTRHead=dict(nrtr_dim=33))]), ['use_poll', 'use_pos', 'head_list.1.NRTRHead']),
    'no CTC': ('rec/ppocrv4', ('Architecture','Head','head_list'), [dict(NRTRHead={})], ['']),
    'networks of a row': ('rec/ppocrv4_distillation', (*ROWS,1,'DistillationCTCLoss','model_name_list'), ['Student','Studen','Teachr'], ['', '']),
    'pairs and keys of a row': ('rec/ppocrv4_distillation', (*ROWS,0,'DistillationDKDLoss'), dict(PAIR, model_name_pairs=[['Studen','Teacher'],['Student','Teachr']], alphas=1., weight='much', beta='two'), ['model_name_pairs', 'model_name_pairs', 'alphas', 'weight', 'beta']),
    'rows': ('rec/ppocrv4_distillation', ROWS, [dict(DistillationDKDLos=PAIR), 3, dict(DistillCTCLogits=dict(PAIR, weight=None)), dict(Term=dict(loss='kdd', on=['Student.head_out','Techer.head_out']))], ['0.DistillationDKDLos', '1', '2.DistillCTCLogits', '3.Term.loss', '3.Term.on']),
    'losses that learn': ('rec/ppocrv4_distillation', ROWS, [dict(Term=dict(loss='CRD', on=['Student.backbone','Teacher.backbone'], n=100)), dict(Term=dict(loss='CRD', on=['Student.backbone','Teacher.backbone'], m=100)), dict(Term=dict(loss='ReviewKD', on=['Student.backbone']))],
        ['0.Term', '1.Term.m', '1.Term', '1.Term', '2.Term.on']),
    'maps': ('det/ppocrv4_cml', (*ROWS,1,'DistillationDMLLoss','maps_name'), ['thrink_map','binary_map','binary_maps'], ['', '']),
    'decoded networks': ('det/ppocrv4_cml', ('PostProcess','model_name'), ['Studen','Teacher','Tutor'], ['', '']),
    'operations': ('det/ppocrv4_cml', ('Train','dataset','transforms'), [dict(DecodeImages={}), dict(MakeShrinkMap=dict(shrink_ratio='much', min_text_size='small', ratios=3)), dict(KeepKeys=dict(keep_keys=['image']))], ['0.DecodeImages', '1.MakeShrinkMap.ratios']),
    'settings of an operation': ('det/ppocrv4_cml', ('Train','dataset','transforms',5,'MakeShrinkMap'), dict(shrink_ratio='much', min_text_size='small'), ['shrink_ratio', 'min_text_size']),
    'sets of Eval': ('det/ppocrv4_cml', ('Eval',), {'one': 3, 'two!': dict(dataset={}), 'three': dict(loader={})}, ['one', 'two!', 'three']),
    'rates': ('det/ppocrv4_cml', ('Optimizer',), dict(name='Adam', clip_norm='short', regularizer=dict(name='L3'), lr=dict(name='Piecewise', decay_epochs=[10,5], values=[.1,-1,'x'], warmup_epoch='soon')), ['clip_norm', 'regularizer.name', 'lr.values.1', 'lr.values.2', 'lr.warmup_epoch']),
    'names of networks': ('det/ppocrv4_cml', ('Architecture','Models'), {'a.b': {}, 'c/d': {}}, ['', '']),
    'flags of networks': ('det/ppocrv4_cml', ('Architecture','Models'), {n: dict(freeze_params='yes', bf16='no', pretrained='PP-OCRv3_det') for n in 'ab'}, ['a.freeze_params', 'b.freeze_params', 'a.bf16', 'b.bf16']),
    'a run': ('det/ppocrv4_cml', ('Global',), dict(epoch_num=1, use_gpu='yes', compile='no', use_amp=True, amp_dtype='float8', accept=3, eval_batch_step='often', average_with_start='half'), ['use_gpu', 'compile', 'amp_dtype', 'accept', 'eval_batch_step', 'average_with_start']),
    'a height': ('rec/ppocrv3', ('Train','dataset','transforms'), [dict(DecodeImage={}), dict(MultiLabelEncode=None), dict(RecResizeImg=dict(image_shape=[3,96,320])), dict(KeepKeys=dict(keep_keys=['image','label_ctc','label_sar','length','valid_ratio']))], ['']),
}

@pytest.mark.parametrize('what', LISTS)
def test_every_list_is_gone_through(what):
    file,path,value,keys = LISTS[what]
    config = read_config(file)
    *above,last = path
    inner = config
    for k in above: inner = inner[k]
    inner[last] = value
    found = [e.spot[2] for e in refusals(config)]
    begins = '.'.join(map(str, path))
    wanted = [f'{begins}.{k}' if k else begins for k in keys]
    assert [k for k in wanted if found.count(k)<wanted.count(k)]==[], (found, [str(e) for e in refusals(config)])

SIZES = {'a number': ('det/ppocrv3_cml', 'size: [960, 960]', 'size: 640', ['Train.dataset.transforms.4.EastRandomCropData']), 'three': ('det/ppocrv3_cml', 'size: [960, 960]', 'size: [640, 640, 3]', ['Train.dataset.transforms.4.EastRandomCropData']),
    'a height': ('rec/ppocrv3', '&shape [3, 48, 320]', '&shape 48', ['Train.dataset.transforms.4.RecResizeImg.image_shape', 'Eval.dataset.transforms.2.RecResizeImg.image_shape'])}
@pytest.mark.parametrize('what', SIZES)
def test_a_size_that_is_none_is_said_once(tmp_path, what):
    "It is read by the operation, and by what asks how large the pictures are"
    name,old,new,keys = SIZES[what]
    text = Path(read_config(name).path).read_text(encoding='utf-8')
    found = refusals(read_config(write(tmp_path, changed(text, (old, new)))))
    assert [e.spot[2] for e in found]==keys, list(map(str, found))

def test_nothing_is_said_twice_of_what_depends_on_it(tmp_path):
    "A network that begins with one that was refused is not refused for that"
    text = CML.replace('Student2: *student', 'Student2: {init: Student}').replace('model_name: large', 'model_name: huge')
    assert ['Student2' in str(e) for e in refusals(read_config(write(tmp_path, text)))]==[False]

@pytest.mark.parametrize('text,says', [('', 'Architecture'), ('Global: 3', 'Architecture'), ('Architecture: {Models: [1]}', 'networks with names'), ('a: [', 'not YAML'), ('[1]', 'a section is wanted'), (CML.replace('Optimizer:', 'Optimzer:'), "did you mean 'Optimizer'"),
    (CML.replace('loss_config_list:', 'loss_config_lists:'), 'loss_config_lists'), (CML.replace('transforms: [DecodeImage', 'transforms: 3\n    transform: [DecodeImage'), 'a list of operations'), (CML.replace('Backbone: {name: ResNet_vd, in_channels: 3, layers: 50}', 'Backbone: 7'), 'Backbone'),
    (REC.replace('transforms: [', 'transforms: 3\n    transform: ['), 'a list of operations')])
def test_odd_files(tmp_path, text, says):
    row = report(write(tmp_path, text))
    assert any(says in o['message'] for o in row['refusals']), row
    assert all('\n' not in o['message'] for o in row['refusals'])

def test_what_comes_along_is_accepted_without_its_files():
    for p in sorted(shipped_configs().rglob('*.yml')): assert report(p)['refusals']==[], p
    assert list(missing_files(read_config('det/ppocrv3_cml')))==[f'{s}.dataset.{k}' for s in ('Train','Eval') for k in ('data_dir','label_file_list')]

def test_teachers_without_weights_are_said_and_not_refused(tmp_path):
    "What is to be written is that which `train` asks for, and can be pasted"
    for name in ('rec/ppocrv4_distillation','det/ppocrv4_cml'):
        row = report(name)
        assert row['refusals']==[] and list(row['weights'])==['Teacher']
        options = re.findall('-o (\\S+?),? ', row['weights']['Teacher']+' ')
        assert options==[f'Architecture.Models.Teacher.pretrained={v}' for v in ('FILE','none')]
        assert report(name, options[1:])['weights']=={}
        assert report(name, ['Global.pretrained_model=some'])['weights']=={} and list(report(name, ['Architecture.Models.Teacher.pretrained=some/file'])['weights'])==['Teacher']
        config = load_config(name)
        with pytest.raises(UserError) as e: check_teachers(config, build_terms(config))
        assert all(f'-o {o}' in str(e.value) for o in options) and str(e.value).startswith(f'{config.path}:')
        assert check_teachers(load_config(name, options[1:]), build_terms(config)) is None
    models = dict(Architecture={**config['Architecture'], 'Models': {k: {**v, 'freeze_params': True} for k,v in config['Architecture']['Models'].items()}})
    with pytest.raises(Refusals) as e: check_teachers(config.copy_with(**models), build_terms(config))
    assert len(e.value.each)==3
    spaced = Section({'Models': {'Big Teacher': {}}}, 'Models', 'Big Teacher')
    assert spaced.option('pretrained', 'none')=="-o 'Models.Big Teacher.pretrained=none'"

def test_nothing_is_fetched_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.setattr('distillbook.use.released.pip_download', lambda *_: pytest.fail('a download'))
    monkeypatch.setenv('DISTILLBOOK_CACHE', str(tmp_path/'cache'))
    monkeypatch.chdir(tmp_path)
    assert report('quickstart')['refusals']==[] and report('rec/ppocrv3_distillation')['refusals']==[]
    assert list(tmp_path.iterdir())==[]

def test_files_that_are_there_are_not_missing(tmp_path):
    (tmp_path/'data').mkdir()
    write(tmp_path, 'a\nb\n', 'letters.txt'), write(tmp_path, 'x.png\ta\n', 'data/train.txt'), write(tmp_path, '', 'best.pth')
    cfg = read_config(write(tmp_path, REC), ['Global.character_dict_path=letters.txt', f'Global.pretrained_model={tmp_path}/best', f'Train.dataset.data_dir={tmp_path}/data', f'Train.dataset.label_file_list=[{tmp_path}/data/train.txt, {tmp_path}/none.txt]'])
    missing = missing_files(cfg)
    assert missing['Train.dataset.label_file_list']==[f'{tmp_path}/none.txt'] and not {'Global.character_dict_path','Global.pretrained_model','Train.dataset.data_dir'} & set(missing)

class Counting(nn.Module):
    "A backbone that wants real numbers"
    out_channels = [8,8,8,8]
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.size = float(self.conv.weight.abs().sum().item())

def test_a_class_that_wants_numbers_gets_them(tmp_path, monkeypatch):
    monkeypatch.setattr('distillbook.config.registry.TRUSTED', {'test_checker'})
    text = CML.replace('{name: MobileNetV3, scale: 0.5, model_name: large, disable_se: true}', '{name: test_checker.Counting}')
    assert refusals(read_config(write(tmp_path, text)))==[]
    assert without_numbers(lambda: nn.Linear(2, 3)).weight.is_meta


# %% loading
def test_loading_names_the_first_and_counts_the_rest(tmp_path):
    file = write(tmp_path, changed(CML, ('epoch_num', 'epochs'), ('save_epoch_step', 'save_epoch_steps')))
    with pytest.raises(UserError) as e: load_config(file)
    assert "no key 'epochs'; did you mean 'epoch_num'? (and 1 more)" in str(e.value)


# %% the command
def test_command(tmp_path):
    good,bad = write(tmp_path, CML, 'good.yml'),write(tmp_path, changed(CML, ('epoch_num', 'epochs'), ('RSEFPN', 'RSEFPM')), 'bad.yml')
    r = run('check', good)
    assert r.exit_code==0 and r.stdout.strip().endswith('good.yml: accepted') and 'not here: Train.dataset.data_dir' in r.stdout
    r = run('check', 'det/ppocrv4_cml')
    assert r.exit_code==0 and 'Teacher is frozen, teaches, and has no weights: -o Architecture.Models.Teacher.pretrained=FILE, or -o Architecture.Models.Teacher.pretrained=none' in r.stdout
    r = run('check', 'det/ppocrv4_cml', 'det/ppocrv3_cml')
    assert r.exit_code==0 and '2 of 2 accepted' in r.stdout and r.stdout.count('Teacher is frozen')==1 and 'weights wanted' in r.stdout
    r = run('check', bad)
    assert r.exit_code==1 and sum(l.startswith(f'{bad}:') for l in r.stdout.splitlines())>=4 and r.stdout.strip().endswith('refusals')
    r = run('check', tmp_path, tmp_path/'none.yml')
    assert r.exit_code==1 and '1 of 3 accepted' in r.stdout and 'none.yml cannot be read' in r.stdout
    rows = json.loads(run('check', good, bad, '--json').stdout)
    assert [len(o['refusals'])>0 for o in rows]==[False,True] and {'line','key','message'}==set(rows[1]['refusals'][0])
    assert run('check', good, '-o', 'Global.epoch_num=0').exit_code==1
    (tmp_path/'empty').mkdir()
    r = run('check', tmp_path/'empty')
    assert r.exit_code==2 and 'no .yml or .yaml in this folder' in r.stderr

@pytest.mark.parametrize('change,says', [('Global=5', 'a section Global is wanted'), ('Architecture=', 'a section Architecture is wanted'), ('Architecture=7', 'a section Architecture is wanted'), ('Architecture.Models=3', 'networks with names are wanted'), ('Train.dataset.transforms.3.RecResizeImg.image_shape=5', 'image_shape'), ('Train.dataset.transforms.3.RecResizeImg.image_shape=[3,[4],64]', 'image_shape'), ('Train=7', 'Train')])
def test_what_is_no_section_is_a_refusal(change, says):
    "Where everything else would be built of it, nothing else is tried"
    found = report('rec/ppocrv3_distillation', [change])['refusals']
    assert any(says in o['message'] for o in found), found
