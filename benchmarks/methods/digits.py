"""scikit-learn's digits, 8 by 8 pixels: 1,000 to learn from, 200 to choose by, 597 to measure on.

A teacher of 58,474 weights saw the labels of all 1,000, students of 1,228 weights have those of 200 (`--labels`); where a loss wants a label and
there is none, it gets the teacher's."""
from collections import OrderedDict
from functools import cache, partial
import torch
from fastai.basics import DataLoader, DataLoaders, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from benchmarks.methods.common import fit, kept_net, on
from distillbook.features import cwd, ofd, ofd_margin, pkd, pyramid
from distillbook.learned import CRD, CTKD, Ensemble, Generation, Orthogonal, Reused, ReviewKD, VID
from distillbook.logits import kd_ensemble, mlkd, nkd, ttm, uskd, wsl, wttm
from distillbook.losses import attention_transfer, cosine, cross_entropy, dist, distance, dkd, kd
from distillbook.nets import Projector
from distillbook.relations import itrd, pkt, rkd, sp
from distillbook.terms import Term

EPOCHS,LABELS,LR = [12, 36],200,1e-2
LEARN,PARTS = slice(0, 1000),dict(choose=slice(1000, 1200), test=slice(1200, None))
MEASURED = 'pictures named rightly'

@cache
def digits():
    "Pictures and labels, in the order of the file"
    found = load_digits()
    return torch.tensor(found.images/16, dtype=torch.float32)[:,None],torch.tensor(found.target)

def dls(seed, labels, bs=50):
    "Picture, label (-100: none), number"
    set_seed(seed)
    x,y = digits()
    known = torch.full((1000,), -100)
    some = torch.randperm(1000)[:labels]
    known[some] = y[some]
    data = TensorDataset(x[LEARN], known, torch.arange(1000))
    made = DataLoaders(DataLoader(data, bs=bs, shuffle=True, drop_last=True), DataLoader(data, bs=bs))
    for dl in made: dl.n_inp = 1
    return made

def batch():
    "Fifty pictures with their labels"
    x,y = digits()
    return x[:50],(y[:50], torch.arange(50))

# ---- networks

def conv(ni, nf, stride=1): return nn.Sequential(nn.Conv2d(ni, nf, 3, stride, padding=1, bias=False), nn.BatchNorm2d(nf), nn.ReLU())
def head(nf): return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4*nf, 10))
def net(nf, *convs): return nn.Sequential(OrderedDict(body=nn.Sequential(*convs), head=head(nf)))
def big(): return net(64, conv(1, 32), conv(32, 64, 2), conv(64, 64))
def first(): return net(12, conv(1, 6, 2), conv(6, 12))

class WithWeak(nn.Module):
    "A student with a weak head on its first layer"
    def __init__(self, student):
        super().__init__()
        self.student,self.weak = student,head(6)
    def forward(self, x):
        first = self.student.body[0](x)
        return dict(logits=self.student.head(self.student.body[1](first)), weak=self.weak(first))

def student(method, net):
    if method=='SimKD': return Reused(net.body, teacher('Teacher').head, (1,12,4,4), (1,64,4,4))
    return WithWeak(net) if method=='uskd' else net
def layers(net): return list((net.student if isinstance(net, WithWeak) else net).body.parameters())

TEACHERS = ('Teacher','Teacher2','Teacher3') # Alike but for their first weights; the first teaches where one is wanted

@cache
def teacher(name):
    seed = 50+TEACHERS.index(name)
    set_seed(seed)
    return kept_net(name, big(), lambda net: fit({name: net}, [lesson(name)], dls(seed, 1000), 10))

told = teacher # It is asked as it goes

# ---- methods

def lesson(net, method='', smoothing=0.):
    out = f'{net}.logits' if method in ('uskd','SimKD') else net
    return Term(partial(cross_entropy, label_smoothing=smoothing), out, targets=[0], name=f'labels {net}')

def of_labels(fn, **kw):
    "A method on the logits that wants the label too, or else the teacher's"
    def or_guess(student, teacher, targets): return fn(student, teacher, torch.where(targets>=0, targets, teacher.argmax(-1)), **kw)
    return lambda s: Term(or_guess, s, 'Teacher', targets=[0])

def before_relu(s): return Term(partial(ofd, margin=ofd_margin(teacher('Teacher').body[2][1])), f'{s}.body.1.1', 'Teacher.body.2.1')
def review(s): return Term(ReviewKD, f'{s}.body.0', f'{s}.body.1', 'Teacher.body.1', 'Teacher.body.2')
def reused(s): return Term(distance, f'{s}.features', 'Teacher.body')
def from_three(s): return Term(kd_ensemble, s, 'Teacher', 'Teacher2', 'Teacher3')
def itself(s): return Term(partial(uskd, mu=.05), f'{s}.logits', f'{s}.weak', targets=[0])

BODY = ('body', 'body')
METHODS = dict(
    kd=on(kd), kd_standardised=on(partial(kd, T=2., standardise=True)), dkd=of_labels(dkd), nkd=of_labels(nkd), wsl=of_labels(wsl),
    dist=on(dist), ttm=on(ttm), wttm=on(wttm), mlkd=on(mlkd), mlkd_standardised=on(partial(mlkd, standardise=True)), CTKD=on(partial(CTKD, ramp=100)),
    three_teachers=from_three, uskd=itself,
    hint=on(distance, *BODY), hint_mlp=on(distance, *BODY, projector=partial(Projector, hidden=64)), hint_ensemble=on(cosine, *BODY, projector=Ensemble),
    hint_orthogonal=on(distance, *BODY, projector=Orthogonal), cosine=on(cosine, *BODY), attention=on(attention_transfer, *BODY), sp=on(sp, *BODY), rkd=on(rkd, *BODY),
    pkt=on(pkt, *BODY), itrd=on(itrd, *BODY), cwd=on(cwd, *BODY), pkd=on(pkd, *BODY), ofd=before_relu, pyramid=on(pyramid, *BODY),
    generation=on(distance, *BODY, projector=Generation), VID=on(VID, *BODY), CRD=on(partial(CRD, n=1000, dim=64, negatives=256), *BODY, targets=[1]),
    ReviewKD=review, SimKD=reused)
NO_TEACHER = {'uskd'}
ALONE = dict(label_smoothing=partial(lesson, smoothing=.1)) # Besides the twin, students that have labels only

# ---- how good they are

@torch.no_grad()
def score(net, part):
    "Accuracy on a part of the digits"
    x,y = digits()
    out = net.eval()(x[PARTS[part]])
    return ((out['logits'] if isinstance(out, dict) else out).argmax(1)==y[PARTS[part]]).float().mean().item()
