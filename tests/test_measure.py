"Measuring needs little: no training sections, no weights of ours, no short labels; and says what it left out"
import json
import cv2, numpy as np, pytest
from distillbook.config import build_loss, load_config
from distillbook.config.assembly import experiment, ready_networks
from distillbook.core import UserError
from distillbook.data.render import draw_line, font_files
from distillbook.rec.labels import Alphabet
from distillbook.use import evaluation
from distillbook.use.training import evaluate_sets, train
from distillbook.use.released import teacher_file
import torch
from test_cli import fails, inside

WORDS = 'Pronghorn 80517 LIMIT quite 31 Zebra 7714 oak MAPLE 5'.split()

@pytest.fixture(scope='module')
def words(tmp_path_factory):
    "Ten words in files, with their list"
    folder = tmp_path_factory.mktemp('words')
    for i,w in enumerate(WORDS): cv2.imwrite(str(folder/f'{i}.png'), 255-draw_line(w, font_files('dejavu')[2]))
    (folder/'list.txt').write_text(''.join(f'{i}.png\t{w}\n' for i,w in enumerate(WORDS)))
    (folder/'chars.txt').write_text('\n'.join('0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'))
    return folder

NETS = 'Global: {use_gpu: false, character_dict_path: %s/chars.txt, max_text_length: %d}\n' \
    'Architecture: {model_type: rec, Models: {%s}}\n' \
    'PostProcess: {name: DistillationCTCLabelDecode, model_name: [%s], key: head_out}\n' \
    'Metric: {name: DistillationMetric, base_metric_name: RecMetric, key: %s}\n' \
    'Eval:\n  dataset: {name: SimpleDataSet, data_dir: %s, label_file_list: [%s/list.txt], transforms: [DecodeImage: {img_mode: BGR}, CTCLabelEncode: , RecResizeImg: {image_shape: [3, 48, 320]}, KeepKeys: {keep_keys: [image, label, length]}]}\n' \
    '  loader: {batch_size_per_card: 5, num_workers: 0}\n'

def written(words, path, names, length=25, folder=None):
    nets = ', '.join(f'N{i}: {{pretrained: {n}, freeze_params: true}}' for i,n in enumerate(names))
    keys = ', '.join(f'N{i}' for i in range(len(names)))
    path.write_text(NETS % (words, length, nets, keys, 'N0', folder or words, folder or words))
    return path

@pytest.mark.parametrize('name', ['PP-OCRv3_rec', 'PP-OCRv4_rec', 'PP-OCRv5_rec', 'PP-OCRv6_rec'])
def test_released_networks_alone(words, tmp_path, name):
    "With only networks that onnxruntime runs there are no parameters to be asked; and no Loss, Optimizer, Train or epoch_num is wanted"
    config = written(words, tmp_path/'c.yml', [name])
    r = inside('eval', '-c', config, '--json')
    assert r.returncode==0, r.stderr
    assert json.loads(r.stdout)['acc']>.89
    r = inside('predict', '-c', config, words/'0.png', words/'1.png', '--json')
    assert r.returncode==0 and [o['N0']['label'] for o in json.loads(r.stdout)]==WORDS[:2], r.stderr

def test_a_released_detector_alone(words, tmp_path):
    (tmp_path/'d.yml').write_text('Global: {use_gpu: false}\nArchitecture: {model_type: det, Models: {N0: {pretrained: PP-OCRv4_det, freeze_params: true}}}\n'
        'PostProcess: {name: DistillationDBPostProcess, model_name: [N0]}\nMetric: {name: DistillationMetric, base_metric_name: DetMetric, key: N0}\n'
        'Eval:\n  dataset: {name: RenderedPages, pages: 2, height: 192, width: 256, words_max: 4, transforms: [DetLabelEncode: , DetResizeForTest: , NormalizeImage: {order: hwc}, ToCHWImage: , KeepKeys: {keep_keys: [image, shape, polys, ignore_tags]}]}\n'
        '  loader: {batch_size_per_card: 1, num_workers: 0}\n')
    r = inside('eval', '-c', tmp_path/'d.yml', '--json')
    assert r.returncode==0 and json.loads(r.stdout)['hmean']>.3, r.stderr

def test_long_labels_are_measured(words, tmp_path):
    "`max_text_length` is of rows to train on"
    got = evaluate_sets(ready_networks(load_config(written(words, tmp_path/'c.yml', ['PP-OCRv3_rec'], length=4)), evals=True))['eval']
    assert got['acc']>.89 and 'refused' not in got

def test_refused_lines_stand_beside_the_accuracy(words, tmp_path):
    "Seven of ten lines cannot be used"
    for o in words.iterdir(): (tmp_path/o.name).write_bytes(o.read_bytes() if o.name[0] not in '3456789' else b'no')
    config = written(words, tmp_path/'c.yml', ['PP-OCRv3_rec'], folder=tmp_path)
    got = evaluate_sets(ready_networks(load_config(config), evals=True))['eval']
    assert (got['lines'],got['refused'])==(10,7) and got['acc']>.99
    r = inside('eval', '-c', config)
    assert 'refused' in r.stdout and '7 of 10 lines could not be used' in r.stderr

OUT = 'Student.head_out'
def test_a_network_that_gives_only_its_head():
    loss = build_loss(dict(Loss=dict(name='CombinedLoss', loss_config_list=[dict(DistillationDMLLoss=dict(weight=1., act='softmax', model_name_pairs=[['Student','Teacher']], key='head_out'))])))
    with pytest.raises(UserError, match=f"no output '{OUT}'.*with return_all_feats: true Student gives its head_out"): loss(dict(Student=torch.zeros(1,2,3), Teacher=torch.zeros(1,2,3)), ())

def test_hint_while_training(tmp_path):
    cfg = load_config('quickstart', ['Train.dataset.words=16', 'Train.loader.batch_size_per_card=8', 'Architecture.Models.Student.return_all_feats=false', 'Architecture.Models.Teacher.cache=false', f'Global.save_model_dir={tmp_path}', 'Global.use_gpu=false', 'Architecture.Models.Twin.init=Student'])
    with pytest.raises(UserError, match='return_all_feats: true'): train(experiment(cfg))

def test_normalise_names_order(words, tmp_path):
    config = (tmp_path/'d.yml')
    config.write_text('Global: {use_gpu: false}\nArchitecture: {model_type: det, Models: {N0: {pretrained: PP-OCRv4_det, freeze_params: true}}}\n'
        'PostProcess: {name: DistillationDBPostProcess, model_name: [N0]}\nMetric: {name: DistillationMetric, base_metric_name: DetMetric, key: N0}\n'
        'Eval:\n  dataset: {name: RenderedPages, pages: 1, height: 64, width: 96, transforms: [DetLabelEncode: , DetResizeForTest: , NormalizeImage: , ToCHWImage: , KeepKeys: {keep_keys: [image, shape, polys, ignore_tags]}]}\n'
        '  loader: {batch_size_per_card: 1, num_workers: 0}\n')
    fails(inside('eval', '-c', config), 'order: hwc is right here', after_log=True)

def test_a_released_recogniser_gets_a_guide_head(caplog):
    "PP-OCRv3 was trained with SAR beside CTC, and released without"
    from distillbook.config import build_model
    cfg = load_config('rec/ppocrv3', ['Global.pretrained_model=PP-OCRv3_rec'])
    with caplog.at_level('INFO', 'distillbook'): net = build_model(cfg)
    assert 'a released recogniser, which has no guide head; sar_head begins anew' in caplog.text
    from distillbook.use.teachers import load_teacher
    x = torch.randn(1, 3, 48, 160)
    released,alphabet = load_teacher('PP-OCRv3_rec')
    with torch.no_grad(): assert torch.allclose(net.eval()(x), released(x).softmax(-1), atol=1e-6)
    assert net.head.sar_head is not None and len(alphabet)==6625

UNLABELLED = ['Train.dataset.name=PictureFolder', 'Train.loader.batch_size_per_card=5', 'Global.use_gpu=false', 'Global.epoch_num=2', 'Global.eval_batch_step=[0, 2]', 'Architecture.Models.Teacher.cache=false',
    'Eval.watched.dataset.words=8', 'Eval.held_out.dataset.words=8', 'Eval.unseen_font.dataset.words=8', 'Architecture.Models.Student.Backbone.channels=[4, 4, 4, 8]']

def test_pictures_without_labels(words, tmp_path, caplog):
    "The teacher's answers alone"
    cfg = load_config('quickstart', [*UNLABELLED, f'Train.dataset={{name: PictureFolder, data_dir: {words}, transforms: [DecodeImage: {{img_mode: BGR}}, CTCLabelEncode: , RecResizeImg: {{image_shape: [3, 48, 160]}}, KeepKeys: {{keep_keys: [image, label, length]}}]}}', f'Global.save_model_dir={tmp_path}'])
    with caplog.at_level('INFO', 'distillbook'): learn = train(experiment(cfg))
    assert 'Train.dataset has no labels' in caplog.text and [t.name for t in learn.loss_func.terms]==['kd_Student_Teacher']
    parts = learn.parts()
    assert len(parts)==4 and parts.iloc[-1,0]<parts.iloc[0,0] and learn.summary['samples']['train']==10
    alone = load_config('quickstart', [*UNLABELLED, f'Train.dataset={dict(cfg["Train"]["dataset"])}', 'Loss.loss_config_list=[DistillationCTCLoss: {weight: 1.0, model_name_list: [Student, Twin], key: head_out}]', f'Global.save_model_dir={tmp_path}'])
    with pytest.raises(UserError, match='Train.dataset has no labels, so a frozen teacher has to teach'): experiment(alone)

def test_the_quickest_turn_counts(monkeypatch):
    "The networks take turns; each costs what this clock says, and the first turn is left out"
    now,costs = [0.], dict(slow=iter([.1, 3., 2., 4.]), quick=iter([9., 1., 5., .5]))
    class Net(torch.nn.Module):
        def __init__(self, name): super().__init__(); self.name = name
        def forward(self, x): now[0] += next(costs[self.name])
    monkeypatch.setattr(evaluation.time, 'perf_counter', lambda: now[0])
    assert evaluation.ms_per_image(dict(slow=Net('slow'), quick=Net('quick')), torch.zeros(4, 1), rounds=3, most=99) == dict(slow=500., quick=125.)
