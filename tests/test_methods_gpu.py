"The catalogue of distillation on a GPU, a pretended one where there is none: the numbers of the CPU, and everything that learns where the networks are"
from functools import partial
import numpy as np, pytest, torch
from torch import nn

from distillbook.balance import Pull, Ratio, Uncertainty
from distillbook.learned import CRD, CTKD, Ensemble, Orthogonal, ReviewKD, VID
from distillbook.losses import cosine, distance
from distillbook.nets import Nets
from distillbook.rec.frames import ctc_aligned, ctc_kd, ctc_pseudo, dctc
from distillbook.terms import Term, Terms
from test_methods import CASES, LABEL, LENGTH, X, NUMBERS, Scaled, inputs, line, mlp

TEXT = dict(ctc_kd=ctc_kd, ctc_aligned=lambda s,t: ctc_aligned(s, t, LABEL.to(s.device), LENGTH.to(s.device)), dctc=lambda s,t: dctc(s, LABEL.to(s.device), LENGTH.to(s.device)), ctc_pseudo=partial(ctc_pseudo, least=0.))
BESIDE = {'nkd','wsl_T'} # Their targets are on the CPU in these cases
ALL = [(k, f, partial(inputs, kind)) for k,f,kind in CASES if k not in BESIDE] + [(k, f, lambda: (line(), line(1))) for k,f in TEXT.items()]

@pytest.fixture(scope='module', autouse=True)
def machine(gpu): return gpu

@pytest.mark.parametrize('name,f,make', ALL, ids=[k for k,*_ in ALL])
def test_the_numbers_of_the_cpu(name, f, make):
    s,t = [o.float() for o in make()]
    a,b = s.clone().requires_grad_(),s.cuda().requires_grad_()
    here,there = f(a, t),f(b, t.cuda())
    here.backward()
    there.backward()
    assert there.is_cuda and b.grad.is_cuda
    np.testing.assert_allclose(there.detach().cpu().numpy(), here.detach().numpy(), rtol=1e-4)
    np.testing.assert_allclose(b.grad.cpu().numpy(), a.grad.numpy(), rtol=1e-3, atol=1e-4*a.grad.abs().max().item())

def test_what_learns_is_where_the_networks_are():
    nets = Nets(dict(Teacher=mlp(12), Student=mlp(5)), frozen=['Teacher']).to('cuda')
    hidden = ('Student.1','Teacher.1')
    terms = [Term(VID, *hidden, weight=Ratio()), Term(partial(CRD, n=6, dim=4, negatives=3), *hidden, targets=[0], weight=Pull()), Term(ReviewKD, 'Student.0', 'Student.1', 'Teacher.0', 'Teacher.1'),
        Term(CTKD, 'Student', 'Teacher', weight=Uncertainty()), Term(cosine, *hidden, projector=Ensemble), Term(distance, *hidden, projector=partial(Orthogonal, learn=True), name='turned'),
        Term(partial(Scaled(), by=2.), 'Student', 'Teacher', name='object')]
    loss,x,y = Terms(nets, terms),X.cuda(),NUMBERS.cuda()
    loss.connect((x,), (y,))
    for _ in range(2): loss(nets(x), y).backward()
    kept = nets._modules['_projectors']
    assert all(p.is_cuda for p in [*kept.parameters(), *kept.buffers()]) and all(p.grad.is_cuda for p in kept.parameters() if p.requires_grad)
