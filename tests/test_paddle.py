"Whole configurations against PaddleOCR's own numbers"
import json
from pathlib import Path
import numpy as np, pytest, torch
from fastai.data.core import DataLoaders
from torch import nn
from distillbook.config import build_decoder, build_loss, build_metric, build_model, load_config
from distillbook.learner import distill_learner
from distillbook.config import build_optimizer, build_terms, lr_schedule
from distillbook.schedules import FollowSchedule
from distillbook.use.weights import load_paddle
from golden_cases import Same, Watch
from weights_formula import fill

GOLDEN = Path(__file__).parent/'golden'
CONFIGS = Path(__file__).parents[1]/'configs'/'rec'


def load(name, *cases):
    with np.load(GOLDEN/f'{name}.npz') as z: return {k: z[k] for k in z.files}

def near(a, b, rel=1e-5): np.testing.assert_allclose(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64), rtol=0, atol=rel*max(np.abs(np.asarray(b, dtype=np.float64)).max(), 1e-12))


@pytest.fixture(autouse=True)
def here(monkeypatch): monkeypatch.chdir(Path(__file__).parents[1])


def small(path='ppocrv3_distillation.yml', *overrides):
    "The configuration of golden/e2e_rec: no dropout, a small SAR head, digits and small letters"
    cfg = load_config(CONFIGS/path, ['Global.character_dict_path=', 'Optimizer.lr={name: Piecewise, decay_epochs: [1], values: [0.001, 0.0001], warmup_epoch: 0}', 'Optimizer.regularizer.factor=3.0e-3', *overrides])
    for net in cfg['Architecture']['Models'].values():
        ctc,sar = net['Head']['head_list']
        ctc['CTCHead']['Neck'].update(drop_rate=0., attn_drop_rate=0.)
        sar['SARHead'].update(enc_dim=64, d_k=64, enc_drop_rnn=0., pred_dropout=0.)
    return cfg


def paddle_names(model):
    "PaddleOCR's name and shape of everything in a model, and ours"
    for k,v in model.state_dict().items():
        if k.endswith('num_batches_tracked'): continue
        module,_,leaf = k.rpartition('.')
        flat = isinstance(model.get_submodule(module), nn.Linear) and v.ndim==2
        yield f"{module}.{dict(running_mean='_mean', running_var='_variance').get(leaf, leaf)}", tuple(v.shape[::-1] if flat else v.shape), k


def get_at(o, path):
    for p in path.split('.'): o = o[p]
    return o


# %% the whole model, four steps
@pytest.mark.parametrize('optimizer', ['Adam', 'Momentum'])
def test_e2e_four_steps(optimizer):
    z = load('e2e_rec')
    meta = json.loads(str(z[f'{optimizer}|meta']))
    cfg = small()
    if optimizer=='Momentum': cfg['Optimizer'] = dict(name='Momentum', momentum=0.9, lr=cfg['Optimizer']['lr'], regularizer=cfg['Optimizer']['regularizer'])
    model,o = build_model(cfg),cfg['Optimizer']
    names = list(paddle_names(model))
    assert {n for n,*_ in names}==set(meta['param_names'])
    load_paddle(model, {n: fill(n, s) for n,s,_ in names})
    batch = tuple(torch.from_numpy(z[f'batch|in|{k}']) for k in json.loads(str(z['batch|meta']))['order'])
    dl = Same(batch, 2)
    learn = distill_learner(DataLoaders(dl, Same(batch, 1)), model, build_terms(cfg), opt_func=(made := build_optimizer(o))['opt_func'], groups=made['groups'],
        cbs=[FollowSchedule(lr_schedule(o['lr'], 3, 2)), *made['cbs'], watch := Watch()])
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    near(watch.lrs, meta['lrs'])
    for name,path in (('backbone_out',)*2, ('neck_out',)*2, ('head_out.ctc',)*2, ('head_out.ctc_neck',)*2, ('head_out.sar',)*2):
        for net in ('Teacher','Student'):
            if optimizer=='Adam': near(get_at(watch.first, f'{net}.{path}').detach()[:2], z[f'Adam|out|step0_{net}.{name}'], 3e-5)
    # Adam divides by the size of the gradient, so that rounding in tiny gradients moves weights: first weights changed by 1e-7 of themselves change the later dml terms by 1e-3 (measured), the others by 1e-4
    for k,want in meta['trajectory'].items():
        got = [r[k] for r in watch.rows]
        near(got[:1], want[:1])
        near(got, want, 2e-5 if optimizer=='Momentum' else 2e-3 if 'dml' in k else 3e-4)
    ours = {k: n for n,_,k in names}
    assert {ours[k] for k in watch.norms}==set(meta['gradnorm_step0'])
    top = max(meta['gradnorm_step0'].values())
    for k,v in watch.norms.items(): assert abs(v-meta['gradnorm_step0'][ours[k]]) <= 1e-4*meta['gradnorm_step0'][ours[k]] + 1e-6*top, k
    with torch.no_grad():
        for _ in range(40): model.train()(batch[0], data=batch[1:])
        preds = model.eval()(batch[0])
    assert set(preds['Student'])=={'head_out'}
    for net in ('Teacher','Student'): near(preds[net]['head_out'], z[f'{optimizer}|out|eval_{net}'], 1e-4 if optimizer=='Momentum' else 2e-3)
    decoded,metric = build_decoder(cfg)(preds, batch[1]),build_metric(cfg)
    metric(decoded, batch)
    if optimizer=='Adam': return
    for net,(reads,labels) in meta['post'].items():
        assert [[t for t,_ in decoded[net][i]] for i in (0,1)]==[[t for t,_ in reads],[t for t,_ in labels]]
        near([c for _,c in decoded[net][0]], [c for _,c in reads], 1e-4)
    got = metric.get_metric()
    assert list(got)==list(meta['metric'])
    for k,v in got.items(): assert abs(v-meta['metric'][k])<1e-6


# %% losses
P = dict(S='Student', T='Teacher', U='Student2')

def preds_of(z, case, grad=True):
    "The nets' dict of a golden case, and its tensors"
    leaves = {k.split('|')[-1]: torch.from_numpy(v).requires_grad_(v.dtype.kind=='f' and 'ratio' not in k) for k,v in z.items() if k.startswith(f'{case}|in|')}
    preds = {name: {} for c,name in P.items() if any(k.endswith(c) for k in leaves)}
    for k,v in leaves.items():
        head,net = k[:-1],P.get(k[-1])
        if head=='bb': preds[net]['backbone_out'] = v
        elif head in ('ctc','sar','gtc'): preds[net].setdefault('head_out', {})[head] = v
    return preds,leaves

def loss_cfg(entries, nets):
    return dict(Global={}, Architecture=dict(Models={n: dict(Head=dict(name='MultiHead')) for n in nets}), Loss=dict(name='CombinedLoss', loss_config_list=entries))

@pytest.mark.parametrize('case', ['CombinedLoss_rec_v3', 'CombinedLoss_rec_3nets', 'CombinedLoss_rec_v4', 'DistillationKLDivLoss_gtc', 'DistillationDMLLoss_flat_pair_nolog'])
def test_combined_losses(case):
    z = load('losses_rec')
    meta = json.loads(str(z[f'{case}|meta']))
    entries = meta.get('loss_config_list') or [{case.partition('_')[0]: dict(weight=1., key='head_out', multi_head=True, model_name_pairs=['Student','Teacher'], dis_head='gtc' if 'gtc' in case else 'ctc',
        **(dict(act='softmax', use_log=False) if 'nolog' in case else {}))}]
    preds,leaves = preds_of(z, case)
    loss = build_loss(loss_cfg(entries, preds))
    order = ['label_ctc', 'label_gtc' if 'label_gtc' in leaves else 'label_sar', 'length', 'valid_ratio']
    total = loss(preds, [torch.zeros(3,3,48,96), *[leaves.get(k) for k in order]])
    assert total.ndim==0
    names = [k for k in meta['out_order'] if k!='loss']
    assert list(loss.parts)==names and not any(p.requires_grad for p in loss.parts.values())
    for k in names: near(loss.parts[k], z[f'{case}|out|{k}'].mean())
    near(total.detach(), z[f'{case}|out|loss'].mean())
    n = z[f'{case}|out|loss'].size # PaddleOCR's total may be a vector [N], of which it back-propagates the sum
    (n*total).backward()
    for k,v in leaves.items():
        if f'{case}|grad|{k}' in z: near(0*v.detach() if v.grad is None else v.grad, z[f'{case}|grad|{k}'])

@pytest.mark.parametrize('case,heads', [('MultiLoss_CTC_SAR_1.0_1.0', ['CTCLoss','SARLoss']), ('MultiLoss_CTC_SAR_0.5_2.0', ['CTCLoss','SARLoss']), ('MultiLoss_CTC_NRTR', ['CTCLoss','NRTRLoss'])])
def test_multi_loss(case, heads):
    z = load('losses_rec')
    meta = json.loads(str(z[f'{case}|meta']))
    leaves = {k.split('|')[-1]: torch.from_numpy(v).requires_grad_('|ctc' in k or '|sar' in k or '|gtc' in k) for k,v in z.items() if k.startswith(f'{case}|in|')}
    listed = [{'CTCLoss': None}, {heads[1]: dict(ignore_index=meta['ignore_index']) if 'ignore_index' in meta else None}]
    cfg = dict(Global={}, Architecture=dict(Head=dict(name='MultiHead')), Loss=dict(name='MultiLoss', loss_config_list=listed, weight_1=meta.get('weight_1', 1.), weight_2=meta.get('weight_2', 1.)))
    loss = build_loss(cfg)
    second = 'gtc' if 'NRTR' in case else 'sar'
    total = loss(dict(ctc=leaves['ctc'], **{second: leaves[second]}), [None, leaves['label_ctc'], leaves[f'label_{second}'], leaves['length'], leaves['valid_ratio']])
    assert list(loss.parts)==heads
    for k in [*heads, 'loss']: near((loss.parts.get(k, total)).detach(), z[f'{case}|out|{k}'])
    total.backward()
    for k in ('ctc',second): near(leaves[k].grad, z[f'{case}|grad|{k}'])

def test_decoder_golden():
    z = load('post_rec')
    preds,label = torch.from_numpy(z['CTC_default_dict|in|preds']),torch.from_numpy(z['CTC_default_dict|in|label'])
    want = json.loads(str(z['DistillationCTC|meta']))['result']
    cfg = dict(Global={}, PostProcess=dict(name='DistillationCTCLabelDecode', model_name=['Student','Teacher'], key='head_out', multi_head=True))
    got = build_decoder(cfg)(dict(Student=dict(head_out=dict(ctc=preds)), Teacher=dict(head_out=preds.flip(0))), label)
    for net in want:
        for a,b in zip(got[net], want[net]):
            assert [t for t,_ in a]==[t for t,_ in b]
            near([c for _,c in a], [c for _,c in b])
