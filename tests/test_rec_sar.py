"SARHead and sar_loss against PaddleOCR's own numbers (golden/README.md says how they were made), and at their edges"
import json
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn

from distillbook.core import UserError
from distillbook.rec.sar import SARHead, sar_loss, valid_columns
from weights_formula import fill

GOLDEN = Path(__file__).parent/'golden'
modules,losses = (np.load(GOLDEN/f) for f in ('modules_sar.npz', 'losses_rec.npz'))

def close(a, b, rel=1e-5): np.testing.assert_allclose(a, b, rtol=0, atol=rel*np.abs(b).max())

def case(name):
    "A head with the weights of a golden case, its inputs, its output and what else is known"
    meta = json.loads(str(modules[f'{name}|meta']))
    net = SARHead(meta['in_channels'], meta['out_channels'], **meta['kwargs']).train(meta['mode']=='train')
    stem = name.split('/')[0].removesuffix('_notargets')
    for k,p in (own := dict(net.named_parameters())).items():
        w = fill(k, meta['shapes'][k]) if meta['weights']=='formula' else modules[f'{stem}|w|{k}']
        linear = isinstance(net.get_submodule(k.rpartition('.')[0]), nn.Linear) and w.ndim==2
        with torch.no_grad(): p.copy_(torch.from_numpy(w.T if linear else w))
    assert own.keys() == {k for k in meta['shapes'] if '.cell' not in k}
    x,*targets = [torch.from_numpy(modules[k]) for o in ('x0','targets0','targets1','targets2') if (k := f'{name}|in|{o}') in modules.files]
    return net, x, targets or None, modules[f'{name}|out|y'], meta

@pytest.mark.parametrize('name', ['SARHead', 'SARHead_notargets', 'SARHead_bi_gru_noconcat', 'SARHead_full'])
def test_eval(name):
    net,x,targets,want,_ = case(f'{name}/eval')
    with torch.no_grad(): close(net(x, targets).numpy(), want)

@pytest.mark.parametrize('name', ['SARHead', 'SARHead_bi_gru_noconcat', 'SARHead_full'])
def test_train(name):
    net,x,targets,want,meta = case(f'{name}/train')
    x.requires_grad_()
    y = net(x, targets)
    close(y.detach().numpy(), want)
    (y * torch.arange(y.numel()).double().mul(0.37).cos().float().reshape(y.shape)).sum().backward()
    close(x.grad.numpy(), modules[f'{name}/train|grad|x0'])
    norms = {k: p.grad.double().norm().item() for k,p in net.named_parameters()}
    top = max(meta['gradnorm'].values())
    for k,n in meta['gradnorm'].items():
        if '.cell' not in k: np.testing.assert_allclose(norms[k], n, rtol=1e-5, atol=1e-6*top, err_msg=k)

@pytest.mark.parametrize('name,ignore', [('SARLoss_ignore=7', 7), ('SARLoss_default_ignore92', 92), ('SARLoss_all_ignored', 7)])
def test_loss(name, ignore):
    x,y = (torch.from_numpy(losses[f'{name}|in|{o}']) for o in ('predicts','label'))
    loss = sar_loss(x.requires_grad_(), y, ignore)
    loss.backward()
    np.testing.assert_allclose(loss.item(), losses[f'{name}|out|loss'], rtol=1e-5)
    want = losses[f'{name}|grad|predicts']
    np.testing.assert_allclose(x.grad.numpy(), want, rtol=1e-5, atol=1e-5*np.abs(want).max())

@pytest.mark.parametrize('weights', ['1.0_1.0', '0.5_2.0'])
def test_loss_in_multi_loss(weights):
    name = f'MultiLoss_CTC_SAR_{weights}'
    w = float(weights.split('_')[1])
    x,y = (torch.from_numpy(losses[f'{name}|in|{o}']) for o in ('sar','label_sar'))
    loss = w*sar_loss(x.requires_grad_(), y, 7)
    loss.backward()
    np.testing.assert_allclose(loss.item(), losses[f'{name}|out|SARLoss'], rtol=1e-5)
    close(x.grad.numpy(), losses[f'{name}|grad|sar'])

KW = dict(enc_dim=16, d_k=12, max_text_length=6, enc_drop_rnn=0., pred_dropout=0.)

def batch(n=3, seed=0):
    "A map, and targets with the start in front, as the decoder gets them"
    torch.manual_seed(seed)
    labels = torch.randint(0, 9, (n,7))
    labels[:,0] = 9
    return torch.randn(n, 8, 2, 9), [labels, torch.full((n,), 6), torch.linspace(1, .3, n).double()]

@pytest.mark.parametrize('kw', [{}, dict(dec_bi_rnn=True), dict(enc_bi_rnn=True), dict(dec_gru=True), dict(pred_concat=False), dict(dec_bi_rnn=True, dec_gru=True)], ids=str)
def test_reading_is_training_run_again_for_each_character(kw):
    "What PaddleOCR does: the whole row anew for each character, with start in all places not yet written"
    x,targets = batch()
    head = SARHead(8, 11, **KW|kw)
    with torch.no_grad():
        probs,maps = head.eval().read(x, targets)
        head.train()
        row = torch.full((3,6), 9)
        for i in range(6):
            p = head(x, [row, targets[-1]])[:,i].softmax(-1)
            torch.testing.assert_close(probs[:,i], p, rtol=1e-5, atol=1e-6)
            if i<5: row[:,i+1] = p.argmax(-1)
    torch.testing.assert_close(maps.sum((2,3)), torch.ones(3, 6))

def test_no_answer_sees_its_label_or_a_later_one():
    x,targets = batch()
    head = SARHead(8, 11, **KW).train()
    before = head(x, targets)
    for i in range(7):
        labels = targets[0].clone()
        labels[:,i] = (labels[:,i]+1) % 9
        after = head(x, [labels, targets[-1]])
        assert torch.equal(after[:,:i], before[:,:i]) and not torch.equal(after[:,i], before[:,i])

@pytest.mark.parametrize('mode', [True, False])
def test_padding_is_not_looked_at(mode):
    "But for the keys: their 3x3 convolution sees one column of it, as in PaddleOCR"
    x,targets = batch()
    head = SARHead(8, 11, **KW).train(mode)
    other = x.clone()
    for i,r in enumerate(targets[-1].tolist()): other[i,:,:,int(np.ceil(9*r))+1:] = 1e3
    assert torch.equal(head(x, targets), head(other, targets))

def test_valid_columns():
    assert valid_columns(torch.tensor([1., .999, .5, 1e-9, 0., 1.1], dtype=torch.float64), 6, 40).tolist() == [40, 40, 20, 1, 1, 40]
    assert valid_columns(torch.tensor([.6, .7, .3], dtype=torch.float64), 3, 10).tolist() == [6, 7, 3]

def test_pad_is_zero_whatever_its_row_holds():
    x,targets = batch()
    head = SARHead(8, 11, **KW).train()
    targets[0][:,4:] = 10
    before = head(x, targets)
    with torch.no_grad(): head.decoder.embedding.weight[10] = 7.
    after = head(x, targets)
    assert torch.equal(before, after)
    after.sum().backward()
    assert head.decoder.embedding.weight.grad[10].eq(0).all()

def test_pred_dropout_drops_logits_in_training_only():
    x,targets = batch(64)
    head = SARHead(8, 11, **KW|dict(pred_dropout=.1))
    share = (head(x, targets)==0).float().mean().item()
    assert .08 < share < .12
    assert (head.eval()(x, targets)>0).all()

def test_init():
    head = SARHead(64, 99, enc_dim=64, d_k=64)
    d = head.decoder
    assert d.embedding.weight[98].eq(0).all() and d.conv3x3_1.bias.eq(0).all() and d.prediction.bias.eq(0).all()
    assert abs(d.conv3x3_1.weight.std().item() / (2/(64*9))**.5 - 1) < .05
    for w in (d.prediction.weight, d.embedding.weight):
        assert .95 < w.abs().max().item() / (6/sum(w.shape))**.5 <= 1
    assert .95 < d.rnn_decoder.weight_hh_l1.abs().max().item()*8 <= 1

def test_training_without_labels():
    with pytest.raises(UserError, match='wants targets'): SARHead(8, 11, **KW).train()(torch.randn(1, 8, 2, 9))

def test_nothing_waits_for_the_device():
    "On the meta device a look at a number is an error"
    x,targets = batch()
    head = SARHead(8, 11, **KW).to('meta')
    x,targets = x.to('meta'),[t.to('meta') for t in targets]
    y = head.train()(x, targets)
    assert y.shape == (3,7,10) and sar_loss(y, targets[0], 10).shape == ()
    assert head.eval()(x, targets).shape == (3,6,10)

@pytest.mark.parametrize('mode', [True, False])
def test_autocast(mode):
    x,targets = batch()
    head = SARHead(8, 11, **KW).train(mode)
    want = head(x, targets)
    with torch.autocast('cpu', dtype=torch.bfloat16): got = head(x, targets)
    torch.testing.assert_close(got[:,0].float(), want[:,0], rtol=.05, atol=.05)
    got.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())

def test_loss_in_float32_whatever_the_autocast():
    torch.manual_seed(0)
    x,y = (torch.randn(2, 6, 500)*9).bfloat16(),torch.randint(0, 500, (2,6))
    with torch.autocast('cpu', dtype=torch.bfloat16): got = sar_loss(x, y, 500)
    assert got.dtype == torch.float32 and got == sar_loss(x.float(), y, 500)

def test_loss_all_ignored_has_zero_gradient():
    x = torch.randn(2, 6, 8, requires_grad=True)
    loss = sar_loss(x, torch.full((2,6), 8), 8)
    loss.backward()
    assert loss == 0 and x.grad.eq(0).all()
