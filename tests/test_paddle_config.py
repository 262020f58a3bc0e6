"PaddleOCR's configurations as users bring them: with mistakes, with overrides, killed and resumed"
import copy, json, logging, os, pickle, re, signal, subprocess, sys, time
from pathlib import Path
import cv2, numpy as np, pytest, torch, yaml
from distillbook.checkpoint import load_file, save_file
from distillbook.config import build_decoder, build_dls, build_learner, build_loss, build_metric, build_model, experiment, load_config, ready_networks
from distillbook.core import UserError
from distillbook.config import DistillationModel
from distillbook.rec.render import font_files, make_words, render_words
from distillbook.use.training import evaluate_sets, train
from distillbook.use.weights import read_pdparams
from test_cli import inside

CONFIGS = Path(__file__).parents[1]/'configs'/'rec'
V3,PLAIN,V2,THREE = (CONFIGS/f'{n}.yml' for n in ('ppocrv3_distillation','ppocrv3','ppocrv2_distillation','ppocrv3_distillation_3nets'))
CMD = [sys.executable, '-c', 'from distillbook.cli import app; app(prog_name="distillbook")']
ENV = {k: v for k,v in os.environ.items() if k!='PYTHONWARNINGS'} | {'OMP_NUM_THREADS': '1'}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Twenty rendered words as a label file names them"
    d = tmp_path_factory.mktemp('words')
    (d/'img').mkdir()
    lines,rows = render_words(make_words(20, 0), font_files('dejavu'), 0),[]
    for i,(im,w,t) in enumerate(zip(lines.images, lines.widths, lines.words)):
        cv2.imwrite(str(d/'img'/f'{i}.png'), im[:,:w])
        rows.append(f'img/{i}.png\t{t}\n')
    (d/'train.txt').write_text(''.join(rows[:16]))
    (d/'val.txt').write_text(''.join(rows[16:]))
    return d

NECK = '{name: svtr, dims: 8, depth: 1, hidden_dims: 16, use_guide: true}'

def small(path, data, out, *more):
    "Overrides that make a configuration's networks tiny, and give it the words"
    cfg = yaml.safe_load(path.read_text())
    o = ['Global.character_dict_path=', 'Global.use_gpu=false', f'Global.save_model_dir={out}', 'Global.epoch_num=1', 'Global.print_batch_step=1']
    for n in [f'Models.{n}.' for n in cfg['Architecture'].get('Models', ())] or ['']:
        a = f'Architecture.{n}'
        o += [f'{a}Backbone.scale=0.125']
        if path!=V2: o += [f'{a}Head.head_list.0.CTCHead.Neck={NECK}', f'{a}Head.head_list.1.SARHead={{enc_dim: 16, d_k: 16, max_text_length: 25}}']
        else: o += [f'{a}Neck.hidden_size=8', f'{a}Head.mid_channels=8']
    for side,file in (('Train','train'),('Eval','val')):
        d = f'{side}.dataset'
        ops = cfg[side]['dataset']['transforms']
        i = next(i for i,op in enumerate(ops) if 'RecResizeImg' in op)
        h = ops[i]['RecResizeImg']['image_shape'][1]
        o += [f'{d}.data_dir={data}', f'{d}.label_file_list=[{data}/{file}.txt]', f'{d}.transforms.{i}.RecResizeImg.image_shape=[3, {h}, 160]', f'{side}.loader.batch_size_per_card=4', f'{side}.loader.num_workers=0']
    return [*o, *more]

def loaded(path, data, out, *more): return load_config(path, small(path, data, out, *more))

def at(o, path):
    for k in path: o = o[int(k) if isinstance(o, list) else k]
    return o

def written(cfg, path):
    path.write_text(yaml.safe_dump(json.loads(json.dumps(cfg)), sort_keys=False))
    return path

def fit(cfg, n=1):
    torch.set_num_threads(1)
    learn = build_learner(cfg)
    learn.fit(n)
    return learn

def same(a, b):
    assert list(a)==list(b)
    return [k for k in a if not torch.equal(a[k], b[k])]


# %% mistakes
NET = 'Architecture.Models.Student.'
CTC,SAR = f'{NET}Head.head_list.0.CTCHead',f'{NET}Head.head_list.1.SARHead'
LOSS = 'Loss.loss_config_list.'

NAMES = { # A spot, what stands there instead of a name, and what the message must have
    'Global.epoch_num': ('epochs_num', 'Global.epochs_num', "'epoch_num'"), 'Optimizer': ('Optimiser', 'Optimiser', "'Optimizer'"),
    f'{NET}freeze_params': ('freeze_param', f'{NET}freeze_param', "'freeze_params'"), f'{NET}Backbone.scale': ('scales', 'Student', 'Backbone', "'scale'"), 'Architecture.Models': ('Model', 'Architecture.Model', "'Models'"),
    f'{NET}Head.head_list': ('heads_list', 'Student', "'head_list'"), CTC: ('CTCHeads', 'Student', 'head_list', "'CTCHead'"), f'{CTC}.Neck': ('Neckk', 'Student', 'CTCHead', "'Neck'"), f'{CTC}.Neck.dims': ('dim', 'Student', 'Neck', "'dims'"),
    f'{CTC}.Head.fc_decay': ('fc_decays', 'Student', 'CTCHead', "'fc_decay'"), f'{SAR}.enc_dim': ('enc_dims', 'Student', 'SARHead', "'enc_dim'"),
    LOSS+'0.DistillationDMLLoss': ('DistillationDMLoss', LOSS+'0', "'DistillationDMLLoss'"), LOSS+'0.DistillationDMLLoss.use_log': ('uselog', LOSS+'0.DistillationDMLLoss.uselog', "'use_log'"), LOSS+'3.DistillationCTCLoss.model_name_list': ('model_names_list', LOSS+'3', "'model_name_list'"),
    'Loss.loss_config_list': ('loss_configs', 'Loss.loss_configs', "'loss_config_list'"), 'PostProcess.model_name': ('model_names', 'PostProcess.model_names', "'model_name'"), 'Metric.main_indicator': ('main_indicators', 'Metric.main_indicators', "'main_indicator'"),
    'Optimizer.lr.decay_epochs': ('decay_epoch', 'Optimizer.lr', "'decay_epochs'"), 'Optimizer.regularizer.factor': ('factors', 'Optimizer.regularizer', "'factor'"), 'Optimizer.regularizer': ('regulariser', 'Optimizer', "'regularizer'"),
    'Train.dataset.label_file_list': ('label_file_lists', 'Train.dataset.label_file_lists', "'label_file_list'"), 'Train.dataset.transforms.2.RecAug': ('RecAugs', 'Train.dataset', 'transforms', "'RecAug'"), 'Train.dataset.transforms.1.RecConAug.prob': ('probs', 'Train.dataset', 'RecConAug', "'prob'"),
    'Train.loader.num_workers': ('num_worker', 'Train.loader.num_worker', "'num_workers'"), 'Train.loader': ('loaders', 'Train.loaders', "'loader'"), 'Train': ('Trains', 'Trains', "'Train'"),
}
VALUES = [ # A spot, what stands there, and what the message must have
    (f'{NET}Backbone.name', 'MobileNetV1Enhanced', 'Student', 'Backbone', "'MobileNetV1Enhance'"), (f'{NET}Backbone.name', 'timm.nosuch', 'Student', 'timm'), (f'{NET}Backbone.name', 'nowhere.Net', 'Student', 'nowhere'), (f'{NET}Head.name', 'MultiHed', 'Student', "'MultiHead'"),
    (f'{CTC}.Neck.name', 'svt', 'Student', 'Neck', "'svtr'"), (f'{CTC}.Neck.dims', 'many', 'Student', 'Neck'), (f'{NET}Backbone.scale', 'half', 'Student', 'Backbone'), (f'{NET}Transform', {'name': 'TPS'}, 'Student', 'Transform'),
    ('Architecture.name', 'DistilationModel', 'Architecture.name', "'DistillationModel'"), ('Architecture.model_type', 'dett', 'Architecture.model_type', "'det'"),
    ('Loss.name', 'CombinedLos', 'Loss.name', "'CombinedLoss'"), (LOSS+'0.DistillationDMLLoss.model_name_pairs', [['Student','Techer']], LOSS+'0.DistillationDMLLoss', "'Techer'", "'Teacher'"), (LOSS+'3.DistillationCTCLoss.model_name_list', ['Studnt'], LOSS+'3', "'Student'"),
    (LOSS+'0.DistillationDMLLoss.weight', 'heavy', LOSS+'0', 'weight', 'heavy'), (LOSS+'0.DistillationDMLLoss.weight', None, LOSS+'0', 'weight'), (LOSS+'0.DistillationDMLLoss.dis_head', 'gtc', 'gtc'), (LOSS+'2.DistillationDistanceLoss.key', 'bakbone_out', 'bakbone_out', "backbone_out"), (LOSS+'2.DistillationDistanceLoss.mode', 'l3', 'l3', 'l2'),
    (LOSS+'0.DistillationDMLLoss.act', 'softmx', 'softm'),
    ('PostProcess.name', 'DistillationCTCLabelDecoder', 'PostProcess', "'DistillationCTCLabelDecode'"), ('PostProcess.model_name', ['Studnt'], 'PostProcess.model_name', "'Student'"), ('Metric.name', 'DistilationMetric', 'Metric', "'DistillationMetric'"), ('Metric.base_metric_name', 'RecMetrics', 'Metric', "'RecMetric'"),
    ('Metric.main_indicator', 'accuracy', 'Metric.main_indicator', 'acc'), ('Metric.key', 'Studnt', 'Metric.key', "'Student'"),
    ('Optimizer.name', 'Adm', 'Optimizer', "'Adam'"), ('Optimizer.lr.name', 'Picewise', 'Optimizer.lr', "'Piecewise'"), ('Optimizer.lr.values', ['fast','slow'], 'Optimizer.lr.values', 'fast'), ('Optimizer.lr.values', [], 'Optimizer.lr.values'), ('Optimizer.regularizer.name', 'L3', 'Optimizer.regularizer', 'L2'), ('Optimizer.regularizer.factor', 'small', 'Optimizer.regularizer.factor', 'small'),
    ('Optimizer.beta1', 'x', 'Optimizer.beta1'), ('Optimizer.beta3', .9, 'Optimizer', "'beta1'"), ('Optimizer.clip_norm', -1, 'Optimizer.clip_norm'),
    ('Train.dataset.name', 'SimpleDataset', 'Train.dataset.name', "'SimpleDataSet'"), ('Train.dataset.data_dir', 'nowhere/at/all', 'Train.dataset.data_dir', 'nowhere/at/all'), ('Eval.dataset.data_dir', 'nowhere', 'Eval.dataset.data_dir'), ('Train.dataset.label_file_list', ['nowhere.txt'], 'Train.dataset.label_file_list', 'nowhere.txt'),
    ('Train.dataset.label_file_list', [], 'Train.dataset.label_file_list'), ('Train.dataset.ratio_list', [.5,.5], 'Train.dataset', 'ratio_list'), ('Train.dataset.ratio_list', 'half', 'Train.dataset', 'ratio_list'), ('Train.dataset.ratio_list', [2.], 'ratio_list'),
    ('Train.dataset.transforms', [], 'Train.dataset', 'KeepKeys'), ('Train.dataset.transforms', None, 'Train.dataset', 'transforms'), ('Train.dataset.transforms', 'RecAug', 'Train.dataset', 'transforms'), ('Train.dataset.transforms.5.KeepKeys.keep_keys', ['label_ctc','image'], 'keep_keys', 'image'),
    ('Train.dataset.transforms.5.KeepKeys.keep_keys', ['image','label_ctcs','label_sar','length','valid_ratio'], 'keep_keys', "label_ctc"), ('Train.dataset.transforms.5.KeepKeys.keep_keys', [['image']], 'keep_keys'), ('Train.dataset.transforms.5.KeepKeys.keep_keys', 1.5, 'keep_keys'), ('Train.dataset.transforms.4.RecResizeImg.image_shape', [3,'48',320], 'image_shape'), ('Train.dataset.transforms.4.RecResizeImg.image_shape', 48, 'image_shape'),
    ('Train.loader.batch_size_per_card', 0, 'Train.loader', 'batch_size_per_card'), ('Train.loader.batch_size_per_card', '4', 'Train.loader', 'batch_size_per_card'), ('Train.loader.batch_size_per_card', 64, 'Train', '64'), ('Train.loader.num_workers', 'two', 'Train.loader', 'num_workers'),
    ('Global.character_dict_path', 'nowhere/dict.txt', 'Global.character_dict_path', 'nowhere/dict.txt'), ('Global.character_dict_path', [], 'Global.character_dict_path'), ('Global.pretrained_model', 'nowhere/best', 'Global.pretrained_model', 'nowhere/best'), ('Global.checkpoints', 'nowhere/latest', 'Global.checkpoints', 'nowhere/latest'),
    (f'{NET}pretrained', 'nowhere/student', 'Architecture.Models.Student', 'nowhere/student'), (f'{NET}pretrained', 'https://example.org/a.pdparams', 'Architecture.Models.Student', 'https'), ('Global.eval_batch_step', [0], 'Global.eval_batch_step'), ('Global.eval_batch_step', 0, 'Global.eval_batch_step'), ('Global.epoch_num', 'ten', 'epoch_num'), ('Global.epoch_num', None, 'epoch_num'),
    ('Global.epoch_num', 0, 'epoch_num'), ('Global.save_model_dir', [1], 'Global.save_model_dir'), ('Global.max_text_length', {}, 'max_text_length'), ('Global.print_batch_step', 0, 'print_batch_step'), ('Global.save_epoch_step', 'often', 'save_epoch_step'), ('Global.log_smooth_window', 0, 'log_smooth_window'), ('Global.seed', 'x', 'seed'),
    *[(spot, value, spot.split('.')[0]) for spot in ('Global','Architecture','Architecture.Models','Loss','Optimizer','Train','Train.dataset','Train.loader') for value in (None, [], 5, 'abc', [{'a': None}])],
    *[(spot, value, spot.split('.')[0]) for spot in ('PostProcess','Metric','Eval','Eval.dataset','Optimizer.lr','Optimizer.regularizer',f'{NET[:-1]}',f'{NET}Backbone',f'{NET}Head',f'{NET}Head.head_list',CTC,SAR,f'{CTC}.Neck',f'{CTC}.Head','Loss.loss_config_list',LOSS+'0',LOSS+'0.DistillationDMLLoss',
        LOSS+'0.DistillationDMLLoss.model_name_pairs', LOSS+'3.DistillationCTCLoss.model_name_list') for value in (5, 'abc', [[]], [{'a': 1}])],
]

@pytest.fixture(scope='module')
def tree(data, tmp_path_factory):
    "ppocrv3_distillation.yml made small, as plain values"
    return json.loads(json.dumps(loaded(V3, data, tmp_path_factory.mktemp('out'))))

def refused(cfg, file, *says):
    "Loading or building ends in one line that says what is wrong"
    written(cfg, file)
    with pytest.raises(UserError) as e:
        build_learner(load_config(file))
    m = str(e.value)
    assert '\n' not in m and len(m)<700, m
    for s in says: assert s in m, f'{s} is not in: {m}'
    return m

@pytest.mark.parametrize('spot', NAMES)
def test_misspelt_keys(spot, tree, tmp_path):
    cfg,(*path,last),(wrong,*says) = copy.deepcopy(tree),spot.split('.'),NAMES[spot]
    node = at(cfg, path)
    for k in list(node): node[wrong if k==last else k] = node.pop(k)
    m = refused(cfg, file := tmp_path/'mine.yml', *says)
    assert re.match(rf'{re.escape(str(file))}:\d+: ', m), m

@pytest.mark.parametrize('i', range(len(VALUES)), ids=lambda i: f'{VALUES[i][0]}={VALUES[i][1]}')
def test_wrong_values(i, tree, tmp_path):
    spot,value,*says = VALUES[i]
    cfg,(*path,last) = copy.deepcopy(tree),spot.split('.')
    node = at(cfg, path)
    node[int(last) if isinstance(node, list) else last] = value
    refused(cfg, tmp_path/'mine.yml', *says)

def test_not_a_configuration(tmp_path):
    for text in ('- 1\n- 2', 'Global: [', 'Global: {a: *b}', '', 'just words'):
        (tmp_path/'a.yml').write_text(text)
        if text:
            with pytest.raises(UserError, match='a.yml'): load_config(tmp_path/'a.yml')
    with pytest.raises(UserError, match='nowhere.yml'): load_config(tmp_path/'nowhere.yml')

def test_of_two_equal_keys_the_last_counts(tree, tmp_path):
    text = written(tree, tmp_path/'a.yml').read_text().replace('  epoch_num: 1\n', '  epoch_num: 7\n  epoch_num: 3\n')
    (tmp_path/'a.yml').write_text(text)
    assert load_config(tmp_path/'a.yml')['Global']['epoch_num']==3

def test_a_number_written_as_text(data, tmp_path):
    "`1e-3` is text in YAML, and PaddleOCR's users write it"
    cfg = loaded(V3, data, tmp_path, 'Optimizer.lr={name: Const, learning_rate: 1e-3}', 'Loss.loss_config_list.0.DistillationDMLLoss.weight=1e-1', 'Optimizer.regularizer.factor=3e-5')
    assert cfg['Optimizer']['lr']['learning_rate']=='1e-3'
    learn = fit(cfg)
    assert learn.opt.hypers[0]['lr']==1e-3 and learn.term_recorder.terms.terms[0].weight==.1

def test_ignored_keys_are_said_once(data, tmp_path, caplog):
    with caplog.at_level(logging.INFO, 'distillbook'):
        logging.getLogger('distillbook').propagate = True
        cfg = loaded(V3, data, tmp_path, 'Global.distributed=true', 'Global.use_visualdl=false', 'Train.loader.use_shared_memory=false')
        fit(cfg)
    said = [r.getMessage() for r in caplog.records if 'of no effect' in r.getMessage()]
    assert len(said)==1
    for k in ('Global.distributed','Global.use_visualdl','Train.loader.use_shared_memory'): assert k in said[0]


# %% overrides
def test_overrides(data, tmp_path):
    cfg = load_config(V3, ['Global.epoch_num=3', 'Global.save_res_path=out/a=b.txt', 'Global.pretrained_model=', 'Global.eval_batch_step=[0, 5]', 'Optimizer.lr.warmup_epoch=0', 'Optimizer.clip_norm=5.0', 'Train.loader={batch_size_per_card: 2}',
        'Loss.loss_config_list.1.DistillationDMLLoss.weight=0.25', 'Train.dataset.transforms.5.KeepKeys.keep_keys.0=image', 'Train.dataset.ratio_list=[0.5]', 'Metric={key: Teacher}'])
    g = cfg['Global']
    assert g['epoch_num']==3 and g['save_res_path']=='out/a=b.txt' and g['pretrained_model'] is None and g['eval_batch_step']==[0,5] and g['use_space_char'] is True
    assert cfg['Optimizer']['clip_norm']==5. and cfg['Optimizer']['lr']['warmup_epoch']==0 and cfg['Optimizer']['lr']['name']=='Piecewise'
    assert cfg['Loss']['loss_config_list'][1]['DistillationDMLLoss']['weight']==.25 and cfg['Loss']['loss_config_list'][0]['DistillationDMLLoss']['weight']==1.
    assert cfg['Metric']['key']=='Teacher' and cfg['Metric']['name']=='DistillationMetric' and cfg['Train']['dataset']['ratio_list']==[.5]

def test_an_override_changes_one_place_though_the_file_has_an_anchor(data, tmp_path):
    cfg = load_config(V3, ['Architecture.Models.Teacher.Backbone.scale=0.25', 'Architecture.Models.Teacher.freeze_params=true', 'Train.dataset.transforms.4.RecResizeImg.image_shape.2=160', 'Loss.loss_config_list.0.DistillationDMLLoss.model_name_pairs=[[Teacher, Student]]',
        'Loss.loss_config_list.3.DistillationCTCLoss.model_name_list=[Student]', 'Train.dataset.transforms.5.KeepKeys.keep_keys=[image]'])
    t,s = (cfg['Architecture']['Models'][n] for n in ('Teacher','Student'))
    assert t['Backbone']['scale']==.25 and s['Backbone']['scale']==.5 and t['freeze_params'] and not s['freeze_params']
    assert cfg['Eval']['dataset']['transforms'][2]['RecResizeImg']['image_shape']==[3,48,320] and len(cfg['Eval']['dataset']['transforms'][3]['KeepKeys']['keep_keys'])==5
    entries = [list(o.values())[0] for o in cfg['Loss']['loss_config_list']]
    assert entries[1]['model_name_pairs']==[['Student','Teacher']] and entries[4]['model_name_list']==['Student','Teacher']

@pytest.mark.parametrize('o,says', [('Global.epochs=1', "'epoch_num'"), ('Globl.epoch_num=1', "'Global'"), ('Global', 'Global.seed=1'), ('Global.a.b=1', "'a'"), ('Loss.loss_config_list.9.X.weight=1', "'9'"), ('Global.epoch_num=[', 'YAML'),
    ('Architecture.Models.Studnt.freeze_params=true', "'Student'"), ('Optimizer.lr.name.x=1', 'x'), ('Loss.loss_config_list.0=5', 'loss_config_list'), ('Loss.loss_config_list.x=1', 'x'), ('Metric.key=Studnt', "'Student'")])
def test_wrong_overrides(o, says):
    with pytest.raises(UserError) as e: load_config(V3, [o])
    assert says in str(e.value) and '\n' not in str(e.value)


# %% networks
def batch_of(dl): return next(iter(dl))

@pytest.mark.parametrize('path', [V3, THREE])
def test_outputs_of_the_networks(path, data, tmp_path):
    cfg = loaded(path, data, tmp_path)
    model,batch = build_model(cfg),batch_of(build_dls(cfg).train)
    names = list(cfg['Architecture']['Models'])
    assert isinstance(model, DistillationModel) and [k for k,_ in model.named_children()]==names
    x,n = batch[0].cpu(),len(batch[0])
    out = model.train()(x, data=batch[1:])
    assert list(out)==names
    for o in out.values():
        shapes = {k: tuple(v.shape) if torch.is_tensor(v) else {i: tuple(t.shape) for i,t in v.items()} for k,v in o.items()}
        assert list(o)==['backbone_out','neck_out','head_out'] and list(o['head_out'])==['ctc','ctc_neck','sar']
        assert shapes['backbone_out'][2:]==(1,20) and shapes['neck_out']==(n,20,8) and shapes['head_out']==dict(ctc=(n,20,37), ctc_neck=(n,20,8), sar=(n,25,38))
        assert not torch.allclose(o['head_out']['ctc'].sum(-1), torch.ones(n,20))
    model.eval()
    with torch.no_grad(): plain,told = model(x),model(x, data=batch[1:])
    assert list(plain)==names
    for o,p in zip(plain.values(), told.values()):
        assert list(o)==['head_out'] and o['head_out'].shape==(n,20,37) and torch.equal(o['head_out'], p['head_out'])
        assert torch.allclose(o['head_out'].sum(-1), torch.ones(n,20), atol=1e-5)
    cfg = loaded(path, data, tmp_path, *[f'Architecture.Models.{n}.return_all_feats=false' for n in names])
    with torch.no_grad(): plain = build_model(cfg).eval()(x)
    assert all(torch.is_tensor(o) and o.shape==(n,20,37) for o in plain.values())

def test_three_networks(data, tmp_path):
    cfg = loaded(THREE, data, tmp_path, 'Global.cal_metric_during_train=true')
    learn = fit(cfg)
    assert list(learn.model.names)==list(cfg['Architecture']['Models']) and len(learn.model.names)==3
    got = learn.eval_every.rows[-1]
    assert {'acc','Teacher_acc','Student2_acc'} <= set(got)
    names = set(learn.loss_func.parts)
    assert {'loss_ctc_Student_0','loss_sar_Student_0','dml_ctc_0'} <= names and all(torch.isfinite(v) for v in learn.loss_func.parts.values())

def test_frozen_teacher_stays_as_it_is(data, tmp_path):
    cfg = loaded(V3, data, tmp_path, 'Architecture.Models.Teacher.freeze_params=true', 'Architecture.Models.Teacher.pretrained=none', 'Optimizer.lr={name: Const, learning_rate: 0.01}')
    torch.set_num_threads(1)
    learn = build_learner(cfg)
    was = {k: v.clone() for k,v in learn.model.state_dict().items()}
    learn.fit(1)
    moved = {k for k in was if not torch.equal(was[k], learn.model.state_dict()[k])}
    assert moved and not any(k.startswith('Teacher.') for k in moved)
    for k,p in learn.model.named_parameters():
        if k.startswith('Student.'): assert k in moved or not p.requires_grad, k
    assert {k.split('.')[-1] for k in moved}>={'running_mean','running_var'}
    assert list(learn.loss_func.parts)==['dml_ctc_0','dml_sar_0','loss_distance_l2_Student_Teacher_0','loss_ctc_Student_0','loss_ctc_Teacher_1','loss_sar_Student_0','loss_sar_Teacher_1']

def pdparams(net, path):
    "The file that PaddleOCR would have written of a network"
    res = {}
    for k,v in net.state_dict().items():
        if k.endswith('num_batches_tracked'): continue
        module,_,leaf = k.rpartition('.')
        linear = isinstance(net.get_submodule(module), torch.nn.Linear) and v.ndim==2
        res[f"{module}.{dict(running_mean='_mean', running_var='_variance').get(leaf, leaf)}"] = (v.T if linear else v).contiguous().numpy()
    path.write_bytes(pickle.dumps({**res, 'StructuredToParameterName@@': {k: k for k in res}}, protocol=2))

@pytest.mark.parametrize('suffix', ['.pth','.pdparams',''])
def test_pretrained(suffix, data, tmp_path):
    torch.manual_seed(7)
    net = build_model(loaded(V3, data, tmp_path))['Student']
    save_file(net.state_dict(), tmp_path/'a.pth')
    pdparams(net, tmp_path/'a.pdparams')
    if not suffix: (tmp_path/'a.pth').unlink()
    torch.manual_seed(8)
    model = build_model(loaded(V3, data, tmp_path, f'Architecture.Models.Teacher.pretrained={tmp_path}/a{suffix}'))
    assert same(net.state_dict(), model['Teacher'].state_dict())==[] and same(net.state_dict(), model['Student'].state_dict())
    save_file(model.state_dict(), tmp_path/'both.pth')
    both = build_model(loaded(V3, data, tmp_path, f'Global.pretrained_model={tmp_path}/both'))
    assert same(model.state_dict(), both.state_dict())==[]

def test_weights_that_do_not_fit(data, tmp_path):
    net = build_model(loaded(V3, data, tmp_path))['Student']
    state = net.state_dict()
    wide = dict(state) | {'head.ctc_head.fc.bias': torch.zeros(99)}
    for given,says in ((dict(list(state.items())[1:]), '1 missing'), ({**state, 'more': torch.zeros(1)}, 'more'), (wide, 'ctc_head.fc.bias'), ({}, 'missing'), ([1,2], 'not'), ({k: 'x' for k in state}, '')):
        save_file(given, tmp_path/'b.pth')
        with pytest.raises(UserError) as e: build_model(loaded(V3, data, tmp_path, f'Architecture.Models.Teacher.pretrained={tmp_path}/b.pth'))
        assert 'Architecture.Models.Teacher' in str(e.value) and 'b.pth' in str(e.value) and says in str(e.value) and '\n' not in str(e.value), str(e.value)
    for name in ('c.pth','c.pdparams','c.onnx'):
        (tmp_path/name).write_bytes(b'no weights at all')
        with pytest.raises(UserError, match='c\\.'): build_model(loaded(V3, data, tmp_path, f'Architecture.Models.Teacher.pretrained={tmp_path}/{name}'))


# %% data
def trained(path, data, out, *more):
    learn = fit(loaded(path, data, out, *more))
    return {k: v.clone() for k,v in learn.model.state_dict().items()}

def test_workers_change_nothing(data, tmp_path):
    a,b = (trained(V3, data, tmp_path/str(n), f'Train.loader.num_workers={n}', f'Eval.loader.num_workers={n}', 'Optimizer.lr.warmup_epoch=0') for n in (0,2))
    assert same(a, b)==[]

@pytest.mark.parametrize('path', [V2, PLAIN])
def test_other_configurations(path, data, tmp_path):
    cfg = loaded(path, data, tmp_path/'run', 'Optimizer.lr.warmup_epoch=0')
    learn = train(experiment(cfg))
    parts = learn.loss_func.parts
    assert set(parts)==({'CTCLoss','SARLoss'} if path==PLAIN else {'loss_ctc_Student_0','loss_ctc_Teacher_1','dml_0','loss_distance_l2_Student_Teacher_0'})
    cfg['Global']['pretrained_model'] = str(tmp_path/'run'/'best_accuracy')
    got = evaluate_sets(ready_networks(cfg, evals=True))['eval']
    assert set(got)==({'acc','norm_edit_dis','fps'} | ({'Teacher_acc','Teacher_norm_edit_dis'} if path==V2 else set()))
    model,batch = build_model(cfg),batch_of(build_dls(cfg).train)
    loss = build_loss(cfg)
    total = loss(model.train()(batch[0]) if path==V2 else model.train()(batch[0], batch[1:]), batch)
    assert total.ndim==0 and torch.isclose(total.detach(), sum(loss.parts.values())) and not any(v.requires_grad for v in loss.parts.values())
    if path==PLAIN: assert torch.is_tensor(model.eval()(batch[0])) or set(model.eval()(batch[0]))=={'head_out'}

def test_lmdb_gives_what_the_label_file_gives(data, tmp_path):
    lmdb = pytest.importorskip('lmdb')
    rows = [l.split('\t') for l in (data/'train.txt').read_text().splitlines()]
    with lmdb.open(str(tmp_path/'db'), map_size=2**24) as env, env.begin(write=True) as t:
        t.put(b'num-samples', str(len(rows)).encode())
        for i,(p,text) in enumerate(rows, 1):
            t.put(f'image-{i:09d}'.encode(), (data/p).read_bytes())
            t.put(f'label-{i:09d}'.encode(), text.encode())
    a = build_dls(loaded(V3, data, tmp_path)).train
    b = build_dls(loaded(V3, data, tmp_path, 'Train.dataset.name=LMDBDataSet', f'Train.dataset.data_dir={tmp_path}/db', 'Train.dataset.label_file_list=')).train
    for x,y in zip(a, b): assert all(torch.equal(i, j) for i,j in zip(x, y))
    learn = fit(loaded(V3, data, tmp_path, 'Train.dataset.name=LMDBDataSet', f'Train.dataset.data_dir={tmp_path}/db', 'Train.loader.num_workers=2'))
    assert len(learn.dls.train)==4

def test_ratio_list(data, tmp_path):
    two = f'Train.dataset.label_file_list=[{data}/train.txt, {data}/val.txt]'
    assert len(build_dls(loaded(V3, data, tmp_path, two)).train_ds)==20
    dls = build_dls(loaded(V3, data, tmp_path, two, 'Train.dataset.ratio_list=[0.5, 1.0]'))
    assert len(dls.train_ds)==12 and len(dls.train)==3
    assert len(build_dls(loaded(V3, data, tmp_path, two, 'Train.dataset.ratio_list=0.5')).train_ds)==10

def test_broken_lines_are_replaced_and_counted(data, tmp_path, caplog):
    (data/'broken.txt').write_text((data/'train.txt').read_text() + 'img/none.png\tabc\n' + f'img/1.png\t{"x"*40}\n' + 'train.txt\tabc\n')
    logging.getLogger('distillbook').propagate = True
    with caplog.at_level(logging.INFO, 'distillbook'): train(experiment(loaded(V3, data, tmp_path, f'Train.dataset.label_file_list=[{data}/broken.txt]', 'Train.loader.num_workers=2', 'Train.loader.batch_size_per_card=19')))
    end = [r.getMessage() for r in caplog.records if 'could not be used' in r.getMessage()]
    assert len(end)==1 and '3 of 19 lines' in end[0] and 'none.png' in end[0]


# %% the command
def distillbook(*args, **kw): return subprocess.run([*CMD, *map(str, args)], capture_output=True, text=True, env=ENV, timeout=300, **kw)

@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    "A run of three epochs from the command line, never disturbed"
    d = tmp_path_factory.mktemp('whole')
    args = ['-c', V3, '-o', *small(V3, data, d/'run'), *LONG]
    r = distillbook('train', *args)
    assert r.returncode==0, r.stderr
    return d/'run',r

LONG = ['Global.epoch_num=3', 'Global.save_epoch_step=2', 'Global.eval_batch_step=[0, 3]', 'Train.loader.num_workers=2', 'Train.loader.batch_size_per_card=2', 'Optimizer.lr={name: Cosine, learning_rate: 0.002, warmup_epoch: 1}']

def test_train_leaves_its_files(whole):
    run,r = whole
    assert {o.name for o in run.iterdir()}=={'config.yml','train.log','latest.pth','best_accuracy.pth','iter_epoch_2.pth','metrics.csv','summary.json','curves.png','pictures_eval.png'}
    log = (run/'train.log').read_text()
    assert re.search(r'epoch: \[3/3\], global_step: 24, lr: [\d.]+, .*dml_ctc_0: .*loss_sar_Teacher_1: .*loss: .*eta: 0:00:00', log) and 'best metric, acc: ' in log
    cfg = load_config(run/'config.yml')
    assert cfg['Global']['epoch_num']==3 and list(cfg['Architecture']['Models'])==['Teacher','Student']
    assert 'distillbook predict --run' in r.stdout.replace('\n', ' ')

def test_eval_and_predict(whole, data, tmp_path):
    run,_ = whole
    r = inside('eval', '--run', run, '--json')
    got = json.loads(r.stdout)
    kept = load_file(run/'best_accuracy.pth')['metrics']
    assert all(abs(got[k]-kept[k])<1e-9 for k in ('acc','norm_edit_dis','Teacher_acc','Teacher_norm_edit_dis'))
    r = inside('predict', '--run', run, data/'img'/'1.png', data/'img'/'2.png', '--json')
    rows = json.loads(r.stdout)
    assert [Path(o['image']).name for o in rows]==['1.png','2.png'] and set(rows[0])=={'image','Student','Teacher'} and set(rows[0]['Student'])=={'label','score'}
    r = inside('predict', '-c', run/'config.yml', '-o', f'Global.pretrained_model={run}/best_accuracy', f"Global.infer_img={data/'img'/'1.png'}", f'Global.save_res_path={tmp_path}/reads.txt', '--json')
    path,_,said = (tmp_path/'reads.txt').read_text().strip().partition('\t')
    assert json.loads(said)==dict(Student=rows[0]['Student'], Teacher=rows[0]['Teacher']) and path==str(data/'img'/'1.png')

@pytest.mark.parametrize('args,says', [(['train','-c',V3,'-o','Global.epochs=1'], 'epoch_num'), (['eval','-c',V3,'-o','Global.character_dict_path='], 'pretrained_model')])
def test_mistakes_on_the_command_line(args, says):
    r = inside(*args)
    assert r.returncode==2 and 'Traceback' not in r.stderr and says in r.stderr.strip().splitlines()[-1], r.stderr

def killed_in_epoch_2(args, run):
    "Start a run, and kill the process when its log has step 11 of 24; at most three tries"
    for _ in range(3):
        p = subprocess.Popen([*CMD, 'train', *map(str, args)], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while p.poll() is None and not ((run/'train.log').exists() and 'global_step: 11,' in (run/'train.log').read_text()): time.sleep(.002)
        p.kill()
        if p.wait()==-signal.SIGKILL and (state := load_file(run/'latest.pth'))['epoch']==1 and state['batch'] is not None: return state
        for o in run.iterdir(): o.unlink()
    raise AssertionError('the run was never killed in the midst of epoch 2')

def test_killed_and_resumed_equals_never_killed(whole, data, tmp_path):
    run = tmp_path/'run'
    args = ['-c', V3, '-o', *small(V3, data, run), *LONG]
    state = killed_in_epoch_2(args, run)
    assert state['best'] is not None
    r = distillbook('train', *args, f'Global.checkpoints={run}/latest')
    assert r.returncode==0, r.stderr
    steps = [int(o) for o in re.findall(r'global_step: (\d+)', r.stderr)]
    assert steps==list(range(8+state['batch']+2, 25))
    a,b = (load_file(d/'latest.pth') for d in (whole[0],run))
    assert same(a['model'], b['model'])==[] and a['best']==b['best'] and a['train_iter']==b['train_iter']==24
    assert same(*(load_file(d/'best_accuracy.pth')['model'] for d in (whole[0],run)))==[]

def test_best_is_not_forgotten_by_a_resumed_run(whole, data, tmp_path):
    state = load_file(whole[0]/'iter_epoch_2.pth')
    state['best'] = 2.
    save_file(state, tmp_path/'latest.pth')
    learn = train(experiment(loaded(V3, data, tmp_path/'run', *LONG, f'Global.checkpoints={tmp_path}/latest')))
    assert learn.checkpoint.best==2. and not (tmp_path/'run'/'best_accuracy.pth').exists()
    assert learn.summary['best'] is None and learn.summary['networks']['Student']['eval'] # no state was the best: the last one is measured
