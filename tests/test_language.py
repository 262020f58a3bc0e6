"What this book adds to PaddleOCR's files: `Term`, dotted paths, networks by name and `init`, data that is made, several evaluation sets, `WithoutTeacher`"
import copy, json
from pathlib import Path
import pytest, torch
from distillbook import losses
from distillbook.config import build_decoder, build_evals, build_loss, build_metric, build_model, build_set, build_terms, experiment, load_config, ready_networks
from distillbook.config.data import eval_sides
from distillbook.config.assembly import usable
from distillbook.config.losses import target_places
from distillbook.config.registry import LOSSES
from distillbook.core import UserError
from distillbook.rec.losses import ctc_loss
from distillbook.use.released import TeacherUnavailable
from distillbook.use.training import evaluate_sets, learner, train
from test_cli import TINY

NET = 'Architecture.Models.Student.'

def said(f):
    "The one line of the `UserError` that `f` ends in"
    with pytest.raises(UserError) as e: f()
    assert '\n' not in str(e.value)
    return str(e.value)

@pytest.fixture
def load(tmp_path):
    "The README's configuration, tiny, in which two students stand for teacher and student, with other terms and further changes"
    def load(*terms, more=()):
        models = '{Student: {return_all_feats: true, Backbone: {name: PlainBackbone, channels: [8, 8, 8, 8]}, Neck: {name: SequenceEncoder, encoder_type: reshape}, Head: {name: CTCHead, fc_decay: 0}}, Teacher: {return_all_feats: true, Backbone: {name: PlainBackbone, channels: [8, 8, 12, 16]}, Neck: {name: SequenceEncoder, encoder_type: reshape}, Head: {name: CTCHead, fc_decay: 0}}}'
        listed = ', '.join(f'{{Term: {t}}}' for t in terms) or '{Term: {loss: kd, on: [Student.head_out, Teacher.head_out]}}'
        small = [o for o in TINY if 'Models' not in o]
        return load_config('quickstart', [f'Architecture={{Models: {models}}}', f'Loss.loss_config_list=[{listed}]', 'PostProcess.model_name=[Student, Teacher]', *small, f'Global.save_model_dir={tmp_path}/run', 'WithoutTeacher=', *more])
    return load

def one_term(cfg):
    term, = build_terms(cfg)
    return term


# %% Term
@pytest.fixture(scope='module')
def outputs():
    "Logits of two networks, and a batch whose targets are labels and lengths"
    torch.manual_seed(0)
    a,b = torch.randn(4,20,63),torch.randn(4,20,63)
    label,length = torch.randint(1, 63, (4,20)),torch.tensor([3,5,1,7])
    return a,b,[torch.randn(4,3,48,160),label,length]

BOTH = '[Student.head_out, Teacher.head_out]'
PAIRS = [('kd', ''), ('kd', 'T: 3.0'), ('dml', ''), ('dist', ''), ('distance', ''), ('distance', 'mode: l1'), ('cosine', ''), ('attention_transfer', ''), ('kl_paddle', ''), ('dml_paddle', 'act: softmax'), ('ctc_dkd', 'targets: [label]'), ('ctc_logits_kd', '')]

@pytest.mark.parametrize('loss,keys', PAIRS)
def test_any_loss_of_the_library_by_name(loss, keys, load, outputs):
    "It gives what the function gives"
    a,b,batch = outputs
    if loss=='attention_transfer': a,b = (o[...,None].mT.reshape(4,63,1,20) for o in (a,b))
    cfg = load(f"{{loss: {loss}, on: {BOTH}{', '+keys if keys else ''}}}")
    given = {k: v if not v.replace('.','').isdigit() else float(v) for k,v in [keys.split(': ')] if k!='targets'} if keys else {}
    total = build_loss(cfg)(dict(Student=dict(head_out=a), Teacher=dict(head_out=b)), batch)
    names = list(__import__('inspect').signature(LOSSES[loss]).parameters)[2:]
    targets = [batch[1]] if 'targets' in names else [batch[1+['label','length'].index(n)] for n in names if n in ('label','length')]
    assert torch.allclose(total, LOSSES[loss](a, b, *targets, **given)) and total.ndim==0
    assert one_term(cfg).name==f'{loss}_Student_Teacher'

def test_dkd_with_its_targets(load, outputs):
    a,b,batch = outputs
    got = build_loss(load(f'{{loss: dkd, on: {BOTH}, targets: [label], beta: 2, T: 1}}'))(dict(Student=dict(head_out=a), Teacher=dict(head_out=b)), batch)
    assert torch.allclose(got, losses.dkd(a, b, batch[1], beta=2., T=1.))

def test_targets_by_the_names_of_the_arguments(load, outputs):
    a,b,batch = outputs
    cfg = load('{loss: ctc_loss, on: Student.head_out, focal: true, name: mine, weight: 2}')
    term = one_term(cfg)
    assert term.name=='mine' and term.weight==2. and term.targets==[0,1] and target_places(cfg)['length']==1
    assert torch.allclose(build_loss(cfg)(dict(Student=dict(head_out=a)), batch), 2*ctc_loss(a, *batch[1:], focal=True))

def test_targets_by_name(load, outputs):
    a,b,batch = outputs
    cfg = load('{loss: torch.nn.functional.cross_entropy, on: Student.neck_out, targets: [length]}')
    assert one_term(cfg).targets==[1]
    got = build_loss(cfg)(dict(Student=dict(neck_out=a[:,0])), batch)
    assert torch.allclose(got, torch.nn.functional.cross_entropy(a[:,0], batch[2]))

@pytest.mark.parametrize('weight,start,middle,end', [('0.5', .5, .5, .5), ('5e-1', .5, .5, .5), ('0', 0, 0, 0), ('{name: Cosine, start: 1.0, end: 0.0}', 1, .5, 0), ('{name: Linear, start: 0, end: 4}', 0, 2, 4), ('{name: Exponential, start: 1.0, end: 0.01}', 1, .1, .01), ('{name: fastai.callback.schedule.SchedLin, start: 1.0, end: 3.0}', 1, 2, 3)])
def test_weights(weight, start, middle, end, load):
    term = one_term(load(f'{{loss: kd, on: {BOTH}, weight: {weight}}}'))
    assert [term.weight_at(p) for p in (0., .5, 1.)]==pytest.approx([start, middle, end])

def test_a_weight_follows_its_schedule_while_training(load):
    learn = learner(experiment(load(f'{{loss: kd, on: {BOTH}, weight: {{name: Linear, start: 1.0, end: 0.0}}}}', '{loss: ctc_loss, on: Student.head_out}')))
    seen = []
    term = learn.loss_func.terms[0]
    fn = term.weight_at
    term.weight_at = lambda p: seen.append(float(p)) or fn(p)
    learn.fit(1)
    assert seen[0]==0 and sorted(seen)==seen and .5<seen[-1]<=1

def test_inner_modules_have_projectors(load):
    "Of two widths: what is compared is made alike by a convolution that learns too"
    exp = experiment(load('{loss: distance, on: [Student.backbone.stages.2, Teacher.backbone.stages.2], weight: 0.1}', '{loss: ctc_loss, on: Student.head_out}'))
    learn = learner(exp)
    keys = [k for k in learn.model.state_dict() if k.startswith('_projectors.')]
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    assert [before[k].shape[:2] for k in keys if k.endswith('weight')]==[(16,8)]
    learn.fit(1)
    assert all(not torch.equal(before[k], v) for k,v in learn.model.state_dict().items() if k in keys)

def test_terms_of_one_name_are_told_apart(load): assert [t.name for t in build_terms(load(*[f'{{loss: kd, on: {BOTH}}}']*3))]==['kd_Student_Teacher','kd_Student_Teacher_2','kd_Student_Teacher_3']

def test_paddles_rows_and_ours_stand_side_by_side():
    cfg = load_config('rec/ppocrv3_distillation', ['Loss.loss_config_list.0={Term: {loss: kd, on: [Student.head_out.ctc, Teacher.head_out.ctc], T: 4.0}}'])
    terms = build_terms(cfg)
    assert [t.name for t in terms][:2]==['kd_Student_Teacher','dml_sar_0'] and terms[0].addresses==('Student.head_out.ctc','Teacher.head_out.ctc')

@pytest.mark.parametrize('row,says', [
    ('{on: [Student.head_out]}', ['Term.loss', 'no loss None']), ('{loss: kld, on: [Student]}', ['Loss.loss_config_list.0.Term.loss', "did you mean 'kd'"]), ('{loss: kd}', ['Term.on', 'a list of names']), ('{loss: kd, on: []}', ['Term: kd needs student and teacher']), ('{loss: kd, on: 5}', ['Term.on', 'a list of names']),
    ('{loss: kd, on: [Student.head_out]}', ['Loss.loss_config_list.0.Term', 'kd']), (f'{{loss: kd, on: [Studnt.head_out, Teacher.head_out]}}', ['Term.on', "no net 'Studnt'; did you mean 'Student'?"]), (f'{{loss: kd, on: {BOTH}, t: 2}}', ['Term.t', 'T']), (f'{{loss: kd, on: {BOTH}, T: hot}}', ['Term.T', 'a number is wanted']),
    (f'{{loss: kd, on: {BOTH}, weight: heavy}}', ['Term.weight', 'a number is wanted']), (f'{{loss: kd, on: {BOTH}, weight: {{name: Cosin, start: 1, end: 0}}}}', ['Term.weight.name', "'Cosine'"]), (f'{{loss: kd, on: {BOTH}, weight: {{name: Cosine, start: 1}}}}', ['Term.weight', 'Cosine needs end']),
    (f'{{loss: kd, on: {BOTH}, weight: {{start: 1, end: 0}}}}', ['Term.weight.name']), ('{loss: ctc_loss, on: Student.head_out, targets: [labl, length]}', ['Loss.loss_config_list.0.Term', 'the batch has no labl']), (f'{{loss: kd, on: {BOTH}, name: [a]}}', ['Term.name', 'text'])])
def test_mistakes_in_terms(row, says, load):
    m = said(lambda: build_terms(load(row)))
    for s in says: assert s in m, m


# %% networks
def test_init_begins_with_the_same_weights_and_goes_its_own_way(load, tmp_path):
    models = 'Architecture.Models.Twin={init: Student}'
    model = build_model(load(more=[models]))
    assert model.names==['Student','Teacher','Twin']
    a,b = model['Student'].state_dict(),model['Twin'].state_dict()
    assert all(torch.equal(v, b[k]) for k,v in a.items()) and not {id(p) for p in model['Student'].parameters()} & {id(p) for p in model['Twin'].parameters()}
    other = build_model(load(more=['Architecture.Models.Twin={init: Student, return_all_feats: false, Backbone: {name: PlainBackbone, channels: [8, 8, 8, 8]}, Neck: {name: SequenceEncoder, encoder_type: reshape}, Head: {name: CTCHead, fc_decay: 0}}']))
    assert all(torch.equal(v, other['Twin'].state_dict()[k]) for k,v in other['Student'].state_dict().items())
    frozen = build_model(load(more=['Architecture.Models.Twin={init: Student, freeze_params: true}']))
    assert list(frozen.frozen)==['Twin']

@pytest.mark.parametrize('twin,says', [('{init: Studnt}', ["Twin.init: no net before this one 'Studnt'; did you mean 'Student'?"]), ('{init: Twin}', ["no net before this one 'Twin'"]), ('{init: Student, pretrained: a.pth}', ['Twin.init: either init or pretrained']), ('{init: Student, Bckbone: 1}', ["'Bckbone'"]), ('{init: 5}', ['Twin.init: text is wanted']),
    ('{init: Student, Backbone: {name: PlainBackbone, channels: [8, 8, 8, 9]}, Neck: {name: SequenceEncoder, encoder_type: reshape}, Head: {name: CTCHead}}', ['Twin.init', 'Student is of another shape']), ('{}', ['Twin', 'a Backbone and a Head']), ('{pretrained: PP-OCRv3_rec}', ['Twin', 'freeze_params: true']), ('{pretrained: PP-OCRv3_rec, freeze_params: true, scale: 1}', ['scale']), ('{pretrained: PP-OCRv3_det, freeze_params: true}', ['Twin.pretrained', 'a detector'])])
def test_mistakes_in_networks_by_name(twin, says, load):
    m = said(lambda: build_model(load(more=[f'Architecture.Models.Twin={twin}'])))
    for s in says: assert s in m, m


# %% data that is made, several sets
def test_rendered_lines(load):
    cfg = load()
    train,held = build_set(cfg, 'Train'),build_set(cfg, 'Eval', 'held_out')
    assert (len(train), len(held))==(96,16) and train[0][0].shape==(3,48,160) and set(train.source.words).isdisjoint(held.source.words)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a,b in zip(train[3], build_set(cfg, 'Train')[3]))
    assert set(''.join(train.source.words))<=set('0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ')
    other = build_set(load(more=['Train.dataset.seed=5']), 'Train')
    assert other.source.words!=train.source.words

def test_rendered_pages(tmp_path):
    cfg = load_config('det/ppocrv3_cml', ['Train.dataset.name=RenderedPages', 'Train.dataset.data_dir=', 'Train.dataset.label_file_list=', 'Train.dataset.ratio_list='])
    del cfg['Train']['dataset']['data_dir'], cfg['Train']['dataset']['label_file_list'], cfg['Train']['dataset']['ratio_list']
    cfg['Train']['dataset'].update(pages=3, height=256, width=320)
    pages = build_set(cfg, 'Train')
    image,*maps = pages[0]
    assert len(pages)==3 and image.shape==(3,960,960) and len(maps)==4 and all(m.shape==(960,960) for m in maps)

def test_several_sets_are_each_measured(load, tmp_path):
    cfg = load(more=['Eval={watched: {dataset: {name: RenderedLines, words: 5, skip: 1, fonts: dejavu, transforms: [CTCLabelEncode: , RecResizeImg: {image_shape: [3, 48, 160]}, KeepKeys: {keep_keys: [image, label, length]}]}, loader: {batch_size_per_card: 2}}}', 'Global.epoch_num=1'])
    assert list(eval_sides(cfg))==['watched','held_out','unseen_font']
    exp = experiment(cfg)
    assert exp.dls.valid is exp.evals['watched'] and [len(dl.dataset) for dl in exp.evals.values()]==[5,16,16]
    train(exp)
    summary = json.loads((tmp_path/'run/summary.json').read_text())
    assert summary['samples']==dict(train=96, watched=5, held_out=16, unseen_font=16) and all((tmp_path/f'run/pictures_{s}.png').exists() for s in exp.evals)
    cfg['Global']['pretrained_model'] = str(tmp_path/'run/best_accuracy')
    got = evaluate_sets(ready_networks(cfg, evals=True))
    assert all(got[s]['Teacher_acc']==pytest.approx(summary['networks']['Teacher'][s]['acc']) for s in exp.evals)

def test_one_set_without_a_name_is_called_eval():
    cfg = load_config('rec/ppocrv3_distillation')
    assert eval_sides(cfg)==dict(eval=('Eval',))


# %% no teacher
@pytest.fixture
def no_teacher(monkeypatch):
    from distillbook.use import released
    def unavailable(*_): raise TeacherUnavailable('rapidocr-onnxruntime 1.2.13 cannot be downloaded; pip says: no')
    monkeypatch.setattr(released, '_is_right', lambda *_: False)
    monkeypatch.setattr(released, 'pip_download', unavailable)

def test_without_teacher(no_teacher, caplog):
    cfg = load_config('quickstart', TINY)
    with caplog.at_level('WARNING', 'distillbook'): other = usable(cfg)
    assert len(caplog.records)==1 and 'No teacher (rapidocr-onnxruntime' in caplog.text and 'mutual learning (DML)' in caplog.text
    assert list(other['Architecture']['Models'])==['Student','Student2','Twin'] and 'WithoutTeacher' not in other and other.path==cfg.path
    assert [t.name for t in build_terms(other)]==['loss_ctc_Student_0','loss_ctc_Student2_1','loss_ctc_Twin_2','dml_Student_Student2','dml_Student2_Student']
    model = build_model(other)
    a,b,twin = (model[n].state_dict() for n in ('Student','Student2','Twin'))
    assert any(not torch.equal(v, b[k]) for k,v in a.items()) and all(torch.equal(v, twin[k]) for k,v in a.items())

def test_with_a_teacher_that_section_is_not_used():
    other = usable(load_config('quickstart', TINY))
    assert list(other['Architecture']['Models'])==['Teacher','Student','Twin'] and 'WithoutTeacher' not in other

def test_no_teacher_and_nothing_in_its_place(no_teacher):
    assert 'cannot be downloaded' in said(lambda: build_model(usable(load_config('quickstart', [*TINY, 'WithoutTeacher=']))))

@pytest.mark.parametrize('change,says', [('WithoutTeacher=5', 'WithoutTeacher'), ('WithoutTeacher.Loss.name=CombinedLos', "quickstart.yml:63: Loss.name: no loss 'CombinedLos'"), ('WithoutTeacher.Loss.loss_config_list.1.Term.weight=heavy', 'Term.weight'), ('WithoutTeacher.Loss.loss_config_list.1.Trem={}', 'loss_config_list.1'), ('WithoutTeacher.PostProcess.model_name=[Student, Teacher]', "no net 'Teacher'"), ('WithoutTeacher.Globl={}', "'Globl'"), ('WithoutTeacher.Architecture.Models.Student.Bckbone={}', "'Bckbone'")])
def test_what_takes_its_place_is_checked_at_once(change, says):
    "Not on the day on which there is no network"
    assert says in said(lambda: load_config('quickstart', [*TINY, change]))
