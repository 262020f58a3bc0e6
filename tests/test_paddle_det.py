"Whole detection configurations against PaddleOCR's own numbers"
import json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from fastai.basics import Callback, CancelValidException
from fastai.data.core import DataLoaders
from torch import nn
from distillbook.config import build_loss, build_model, load_config
from distillbook.checkpoint import load_file
from distillbook.core import UserError
from distillbook.det.render import write_pages
from distillbook.learner import distill_learner
from distillbook.config import build_optimizer, build_terms, lr_schedule
from distillbook.schedules import FollowSchedule
from distillbook.use.weights import load_paddle
from golden_cases import Same, Watch
from test_paddle import load, near, paddle_names
from test_cli import inside
from weights_formula import fill

CONFIGS = Path(__file__).parents[1]/'configs'/'det'
MAPS = ('threshold_map','threshold_mask','shrink_map','shrink_mask')
SMALL = dict(cml=['Architecture.Models.Teacher.Backbone.layers=18', 'Architecture.Models.Teacher.Neck.out_channels=64', 'Optimizer.regularizer.factor=0.005'],
    dml=[f'Architecture.Models.{n}.{k}' for n in ('Student','Student2') for k in ('Backbone.layers=18','Neck.out_channels=64')])

# What was measured, rounded up. cml, Momentum: 3e-6. Two ResNets with LKPAN and their 9x9 kernels round more: 5e-5. Adam divides by the size of gradients, tiny ones too: 5e-5 and 1.2e-3, the latter in the DML term at the fourth step
BOUND = {('cml','Momentum'): 1e-5, ('dml','Momentum'): 1e-4, ('cml','Adam'): 1e-4, ('dml','Adam'): 3e-3}

def in_training(net):
    "PaddleOCR's frozen teacher: its batch norms use the batch's statistics and move their own, which a frozen net of ours refuses"
    def train(mode=True): return nn.Module.train(net, True)
    net.train = train
    net.eval = train
    return net.train()


class NoValidation(Callback):
    "In it the teacher that is held in training mode would move its statistics"
    def before_validate(self): raise CancelValidException

@pytest.mark.parametrize('optimizer', ['Momentum','Adam'])
@pytest.mark.parametrize('which', ['cml','dml'])
def test_e2e_four_steps(which, optimizer):
    z = load('e2e_det')
    meta,names = json.loads(str(z[f'{which}|{optimizer}|meta'])),json.loads(str(z[f'{which}|Adam|meta']))
    cfg = load_config(CONFIGS/f'ppocrv3_{which}.yml', [*SMALL[which], 'Optimizer.lr.warmup_epoch=1'])
    o = cfg['Optimizer']
    if optimizer=='Momentum': o = dict(name='Momentum', momentum=0.9, lr=o['lr'], regularizer=o['regularizer'])
    model = build_model(cfg)
    ours = {n: k for n,_,k in paddle_names(model)}
    assert set(ours)==set(names['param_names'])
    load_paddle(model, {n: fill(n, s) for n,s,_ in paddle_names(model)})
    if which=='cml': in_training(model['Teacher'])
    batch = tuple(torch.from_numpy(z[f'batch|in|{k}']) for k in ('image',*MAPS))
    terms,n = build_terms(cfg),len(batch[0])
    for t in terms: t.weight *= n # PaddleOCR's total is a vector [N], of which it back-propagates the sum
    dl = Same(batch, 2)
    learn = distill_learner(DataLoaders(dl, Same(batch, 1)), model, terms, opt_func=(made := build_optimizer(o))['opt_func'], groups=made['groups'],
        cbs=[FollowSchedule(lr_schedule(o['lr'], meta['epochs'], 2)), *made['cbs'], NoValidation(), watch := Watch()])
    first = {}
    def keep(opt):
        if not first: first.update({k: p.grad.clone() for k,p in model.named_parameters() if p.grad is not None})
    learn.create_opt()
    step = type(watch).before_step
    watch.before_step = lambda: (keep(None), step(watch))
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    near(watch.lrs, meta['lrs'])
    if optimizer=='Adam':
        for net in model.names: # Our float64 is 9e-6 from Paddle's shrink maps and 1.1e-5 from its threshold maps, and from ours as much; the binary map has k = 50 times their difference
            maps = watch.first[net]['maps'].detach()
            assert maps.shape[1]==(1 if net in model.brief else 3) # Of CML's teacher nobody reads more than the first
            for c,rel in zip(range(maps.shape[1]), (3e-5, 3e-5, 3e-4)): near(maps[:1,c,::2,::2], z[f'{which}|Adam|out|step0_{net}.maps'][:,c], rel)
    logged = {k: v for k,v in meta['trajectory'].items() if not k.endswith('_cbn')}
    assert [k for k in watch.rows[0] if k!='loss']==[k for k in meta['loss_order'] if k in logged and k!='loss']
    for k,want in logged.items():
        got = [r[k]/n for r in watch.rows]
        near(got[:2], want[:2])
        near(got, want, BOUND[which,optimizer])
    assert {ours[k] for k in meta['gradnorm_step0']}==set(watch.norms)
    top = max(meta['gradnorm_step0'].values())
    for k,v in meta['gradnorm_step0'].items(): assert abs(watch.norms[ours[k]]-v) <= (1e-4 if which=='cml' else 3e-3)*v + 1e-6*top, k # in the ResNets our float32 is 1.7e-3 from our float64, Paddle's 3e-4
    some = np.concatenate([np.pad(g := first[ours[k]].flatten()[:8].numpy(), (0, 8-len(g))) for k in names['grad_names']])
    near(some, z[f'{which}|{optimizer}|out|grad_first8_concat'], 1e-4 if which=='cml' else 3e-3)
    model.train()
    with torch.no_grad():
        for _ in range(40): model(batch[0])
        if which=='cml': [m.__dict__.pop(k) for m in [model['Teacher']] for k in ('train','eval')]
        preds = model.eval()(batch[0])
    for net in model.names:
        assert list(preds[net])==['maps']
        near(preds[net]['maps'][:,:,::2,::2], z[f'{which}|{optimizer}|out|eval_{net}'], {('cml','Momentum'): 2e-3}.get((which,optimizer), 5e-2))


def test_the_library_never_does_that():
    "A frozen teacher keeps its statistics, bit for bit, while a batch is trained on"
    z = load('e2e_det')
    model = build_model(load_config(CONFIGS/'ppocrv3_cml.yml', SMALL['cml']))
    before = {k: v.clone() for k,v in model['Teacher'].state_dict().items()}
    out = model.train()(torch.from_numpy(z['batch|in|image']))
    assert out['Teacher']['maps'].shape==out['Student']['maps'].shape==(2,3,96,128)
    assert not out['Teacher']['maps'].requires_grad and out['Student']['maps'].requires_grad
    assert all(torch.equal(v, before[k]) for k,v in model['Teacher'].state_dict().items())


# %% losses
def loss_cfg(entries, nets=('Student','Student2','Teacher')):
    return dict(Global={}, Architecture=dict(model_type='det', Models={n: {} for n in nets}), Loss=dict(name='CombinedLoss', loss_config_list=entries))

@pytest.mark.parametrize('case', ['CombinedLoss_det_cml', 'CombinedLoss_det_dml'])
def test_combined_losses(case):
    z = load('losses_det')
    def given(k): return torch.from_numpy(z[f'{case}|in|{k}'] if f'{case}|in|{k}' in z else z[f'in|{k}'])
    leaves = {k: given(k) for k in ('S','U','T',*MAPS)}
    preds = {n: dict(maps=leaves[k].requires_grad_()) for n,k in (('Student','S'),('Student2','U'),('Teacher','T'))}
    loss = build_loss(load_config(CONFIGS/f'ppocrv3_{case[-3:]}.yml'))
    total = loss(preds, [None, *[leaves[k] for k in MAPS]])
    names = [k.split('|')[-1] for k in z if k.startswith(f'{case}|out|') and not k.endswith(('|loss','_cbn'))]
    assert set(loss.parts)==set(names) and total.ndim==0
    for k in names: near(loss.parts[k], z[f'{case}|out|{k}'].mean())
    near(total.detach(), z[f'{case}|out|loss'].mean())
    (len(leaves['S'])*total).backward() # PaddleOCR back-propagates the sum of a vector [N]
    for k in 'SUT': near(0*leaves[k].detach() if leaves[k].grad is None else leaves[k].grad, z[f'{case}|grad|{k}'] if f'{case}|grad|{k}' in z else 0*leaves[k].detach())

def test_settings_count_and_a_list_of_maps_does_too():
    "Both are thrown away by PaddleOCR, the second with a loss of zero"
    torch.manual_seed(0)
    preds = {n: dict(maps=torch.rand(2,3,16,20)) for n in ('Student','Student2','Teacher')}
    batch = [None, torch.rand(2,16,20), torch.ones(2,16,20), (torch.rand(2,16,20)>.7).float(), torch.ones(2,16,20)]
    def parts(**entry):
        loss = build_loss(loss_cfg([entry]))
        loss(preds, batch)
        return {k: v.item() for k,v in loss.parts.items()}
    one = parts(DistillationDBLoss=dict(weight=1., model_name_list=['Student']))
    ten = parts(DistillationDBLoss=dict(weight=1., model_name_list=['Student'], alpha=50, beta=1))
    assert list(one)==[f'db_Student_loss_{k}_maps' for k in ('shrink','threshold','binary')]
    assert ten['db_Student_loss_shrink_maps']==pytest.approx(10*one['db_Student_loss_shrink_maps'], rel=1e-5)
    assert ten['db_Student_loss_threshold_maps']==pytest.approx(one['db_Student_loss_threshold_maps']/10, rel=1e-5)
    pair = dict(weight=1., model_name_pairs=['Student','Student2'], key='maps')
    both = parts(DistillationDMLLoss=dict(pair, maps_name=['thrink_maps','binary_maps']))
    assert list(both)==['dml_thrink_maps_0','dml_binary_maps_0'] and min(both.values())>0
    assert parts(DistillationDMLLoss=dict(pair, maps_name='shrink_maps'))['dml_shrink_maps_0']==both['dml_thrink_maps_0']

@pytest.mark.parametrize('entry,says', [
    (dict(DistillationDMLLoss=dict(weight=1., model_name_pairs=['Student','Student2'], maps_name='thrink_map')), "thrink_maps"),
    (dict(DistillationDBLoss=dict(weight=1., model_name_list=['Studnt'])), "'Student'"),
    (dict(DistillationDBLoss=dict(weight=1., model_name_list=['Student'], main_loss_type='Dice')), "'DiceLoss'"),
    (dict(DistillationDilaDBLoss=dict(weight=1., model_name_pairs=[['Student','Teacher']], alpha='five')), 'alpha'),
    (dict(DistillationDilaDBLos=dict(weight=1.)), "'DistillationDilaDBLoss'")])
def test_mistakes(entry, says):
    with pytest.raises(UserError) as e: build_loss(loss_cfg([entry]))
    assert says in str(e.value) and str(e.value).startswith('Loss')

@pytest.mark.parametrize('which', ['cml','dml'])
def test_parameters_of_the_whole_configurations(which):
    "Names and shapes of everything in PaddleOCR's state"
    rows = json.loads((Path(__file__).parent/'golden'/f'params_det_{which}.json').read_text())['rows']
    model = build_model(load_config(CONFIGS/f'ppocrv3_{which}.yml'))
    assert {n: list(s) for n,s,_ in paddle_names(model)}=={r[0]: r[1] for r in rows}
    trains = {k for k,p in model.named_parameters() if p.requires_grad}
    assert {k for n,_,k in paddle_names(model) if k in trains}=={k for n,_,k in paddle_names(model) for r in [{r[0]: r[3] for r in rows}] if r[n]}


# %% as a user has it: label files, a run, its best state, pictures with boxes
@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    d = tmp_path_factory.mktemp('pages')
    write_pages(d, 6, 5, height=160, width=192)
    with open(d/'label.txt', 'a') as f: f.write('images/none.png\t[{"transcription": "a", "points": [[1,1],[9,1],[9,9],[1,9]]}]\nimages/00000.png\tnot JSON\n')
    return d

def overrides(d, out, which):
    "A configuration made small, on six pages and two broken lines"
    cfg = load_config(CONFIGS/f'{which}.yml')
    at = lambda side, op: next(i for i,o in enumerate(cfg[side]['dataset']['transforms']) if op in o)
    o = ['Global.epoch_num=2', 'Global.use_gpu=false', f'Global.save_model_dir={out}', 'Global.print_batch_step=1', f'Train.dataset.transforms.{at("Train","EastRandomCropData")}.EastRandomCropData.size=[64, 64]',
        f'Eval.dataset.transforms.{at("Eval","DetResizeForTest")}.DetResizeForTest={{limit_side_len: 96, limit_type: max}}', 'Train.loader.batch_size_per_card=2', 'Eval.loader.batch_size_per_card=3', f'Global.save_res_path={out}/found.txt']
    for s in ('Train','Eval'): o += [f'{s}.dataset.data_dir={d}', f'{s}.dataset.label_file_list=[{d}/label.txt]', f'{s}.loader.num_workers=0']
    for n,m in cfg['Architecture'].get('Models', {}).items():
        if m.get('freeze_params'): o.append(f'Architecture.Models.{n}.pretrained=none')
        elif m.get('pretrained'): o.append(f'Architecture.Models.{n}.pretrained=')
        if m['Backbone']['name']=='ResNet_vd': o += [f'Architecture.Models.{n}.Backbone.layers=18', f'Architecture.Models.{n}.Neck.out_channels=16']
    return o

def cli(*args):
    r = subprocess.run([sys.executable, '-c', 'from distillbook.cli import app; app(prog_name="distillbook")', *map(str, args)], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert 'Traceback' not in r.stderr, r.stderr
    return r

@pytest.mark.parametrize('which', ['ppocrv3_cml', 'ppocrv3_student', 'plain_cml'])
def test_train_eval_predict(which, pages, tmp_path):
    out = tmp_path/'run'
    o = overrides(pages, out, which)
    run = cli if which=='ppocrv3_cml' else inside
    r = run('train', '-c', CONFIGS/f'{which}.yml', '-o', *o)
    assert r.returncode==0, r.stderr
    assert {'config.yml','train.log','latest.pth','best_accuracy.pth'} <= {p.name for p in out.iterdir()}
    log = (out/'train.log').read_text()
    assert 'hmean' in log and 'none.png' in log and 'not JSON' in log
    assert 'loss_shrink_maps: ' in log
    r = inside('eval', '--run', out, '--json')
    got = json.loads(r.stdout)
    assert {'precision','recall','hmean','fps'} <= set(got) and 0<=got['hmean']<=1
    kept = load_file(out/'best_accuracy.pth')['metrics']
    assert got['hmean']==pytest.approx(kept['hmean'], abs=1e-6)
    r = inside('predict', '--run', out, '--json', pages/'images'/'00001.png', '-o', 'PostProcess.box_thresh=0.0', '-o', 'PostProcess.thresh=0.0')
    assert r.returncode==0, r.stderr
    (row,) = json.loads(r.stdout)
    nets = [k for k in row if k!='image']
    assert nets==(['boxes'] if which=='ppocrv3_student' else load_config(out/'config.yml')['PostProcess']['model_name'])
    for n in nets:
        drawn = out/('det_results' if n=='boxes' else f'det_results_{n}')/'00001.png'
        assert drawn.exists()
        for box in row[n]: assert len(box['points'])==4 and box['transcription']=='' and 0<=box['score']<=1
    r = inside('predict', '-c', out/'config.yml', '-o', f'Global.pretrained_model={out}/latest', '-o', f'Global.infer_img={pages}/images')
    assert r.returncode==0 and len((out/'found.txt').read_text().splitlines())==6, r.stderr
    r = run('train', '-c', out/'config.yml', '-o', 'Global.epoch_num=3', f'Global.checkpoints={out}/latest', 'Global.accept=[rate]')
    assert r.returncode==0 and 'epoch: [3/3]' in r.stderr, r.stderr

def test_a_teacher_without_a_threshold_branch_comes_back(pages, tmp_path, monkeypatch):
    "What a released file does not hold is not looked for in the run's own states"
    from distillbook.config import networks
    cfg = load_config(CONFIGS/'plain_cml.yml')
    bare = networks.as_released(cfg['Architecture']['Models']['Teacher'])
    assert bare['Head']['thresh'] is False and 'thresh' not in cfg['Architecture']['Models']['Teacher']['Head']
    assert networks.as_released(dict(bare, freeze_params=False, Head=dict(name='DBHead')))['Head']==dict(name='DBHead')
    model = networks.build_networks(cfg, load=())
    assert not [k for k in model.state_dict() if k.startswith('Teacher.head.thresh')]
    out = model.train()(torch.zeros(1,3,64,64))
    assert out['Teacher']['maps'].shape==(1,1,64,64) and out['Student']['maps'].shape==(1,3,64,64)
    terms = build_terms(cfg)
    assert build_loss(cfg)(out, [None, *[torch.zeros(1,64,64)]*4]).isfinite() and len(terms)==9
