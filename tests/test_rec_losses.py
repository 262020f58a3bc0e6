"CTC against PaddleOCR's values and gradients, and at its edges"
import numpy as np, pytest, torch
from pathlib import Path
from distillbook.rec.losses import ctc_loss

golden = np.load(Path(__file__).parent/'golden'/'losses_rec.npz')

def check(case, names=('predicts','label','length'), loss='loss', focal=False):
    x,y,n = (torch.from_numpy(golden[f'{case}|in|{o}']) for o in names)
    x.requires_grad_()
    got = ctc_loss(x, y, n, focal=focal)
    got.backward()
    np.testing.assert_allclose(got.item(), golden[f'{case}|out|{loss}'], rtol=1e-5)
    want = golden[f'{case}|grad|{names[0]}']
    np.testing.assert_allclose(x.grad, want, rtol=1e-5, atol=1e-5*np.abs(want).max())
    return x

def test_paddle(): check('CTCLoss_focal=False')
def test_paddle_focal(): check('CTCLoss_focal=True', focal=True)
def test_paddle_multi_loss(): check('MultiLoss_CTC_SAR_1.0_1.0', ('ctc','label_ctc','length'), 'CTCLoss')

def test_paddle_infeasible_sample():
    x = check('CTCLoss_infeasible_sample')
    assert x.grad[0].eq(0).all() and x.grad[1].ne(0).any()

@pytest.mark.parametrize('net', ['S','T'])
def test_paddle_distillation(net):
    name = {'S':'Student_0','T':'Teacher_1'}[net]
    x,y,n = (torch.from_numpy(golden[f'CombinedLoss_rec_v3|in|{o}']) for o in (f'ctc{net}','label_ctc','length'))
    np.testing.assert_allclose(ctc_loss(x, y, n), golden[f'CombinedLoss_rec_v3|out|loss_ctc_{name}'], rtol=1e-5)

def test_focal_where_it_matters():
    "PaddleOCR's cases have p near 0, where focal is 1: here are samples whose p is not"
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, requires_grad=True)
    ctc_loss(x, torch.tensor([[1],[2]]), torch.tensor([1,1]), focal=True).backward()
    z = x.detach().double().requires_grad_()
    p = z.softmax(-1)
    prob = torch.stack([p[i,0,c]*p[i,1,c] + p[i,0,c]*p[i,1,0] + p[i,0,0]*p[i,1,c] for i,c in enumerate((1,2))])
    want = -prob.log()*(1-prob)**2
    want.mean().backward()
    got = ctc_loss(x.detach(), torch.tensor([[1],[2]]), torch.tensor([1,1]), focal=True)
    torch.testing.assert_close(got.double(), want.mean().detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad.double(), z.grad, rtol=1e-5, atol=1e-6)
    assert (want < -.95*prob.log()).all()

def test_empty_labels():
    "A batch of nothing but empty labels crashes PaddleOCR; here it is a loss like any other"
    x = torch.randn(2, 5, 4, requires_grad=True)
    loss = ctc_loss(x, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    loss.backward()
    torch.testing.assert_close(loss.detach(), -x.detach().log_softmax(-1)[...,0].sum(-1).mean())
    assert x.grad.isfinite().all()

def test_padding_is_not_read():
    x,n = torch.randn(2, 8, 5),torch.tensor([2,1])
    y = torch.tensor([[1,2,0,0],[3,0,0,0]])
    z = torch.tensor([[1,2,4,4],[3,3,3,3]])
    assert ctc_loss(x, y, n) == ctc_loss(x, z, n)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_float32_whatever_the_autocast(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 40, 500)*5).to(dtype)
    y,n = torch.randint(1, 500, (2,12)),torch.tensor([12,9])
    with torch.autocast('cpu', dtype=dtype): got = ctc_loss(x, y, n)
    assert got.dtype == torch.float32 and torch.equal(got, ctc_loss(x.float(), y, n))
    torch.testing.assert_close(got.double(), torch.nn.functional.ctc_loss(x.double().log_softmax(-1).transpose(0,1), y, torch.tensor([40,40]), n, reduction='none').mean(), rtol=1e-5, atol=0)
