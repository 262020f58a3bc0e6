"Classifiers of pictures of ten classes, of which a few have a label: what digits.py and mnist.py have in common"
from collections import OrderedDict
from functools import partial
import torch
from fastai.basics import DataLoader, DataLoaders, set_seed
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

def conv(ni, nf, stride=1): return nn.Sequential(nn.Conv2d(ni, nf, 3, stride, padding=1, bias=False), nn.BatchNorm2d(nf), nn.ReLU())
def head(nf, side): return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(nf*(side//2)**2, 10))
def net(*convs, nf, side): return nn.Sequential(OrderedDict(body=nn.Sequential(*convs), head=head(nf, side)))

class WithWeak(nn.Module):
    "A student with a weak head on its first layer"
    def __init__(self, student, weak):
        super().__init__()
        self.student,self.weak = student,weak
    def forward(self, x):
        first = self.student.body[0](x)
        return dict(logits=self.student.head(self.student.body[1](first)), weak=self.weak(first))

def lesson(net, method='', smoothing=0.):
    out = f'{net}.logits' if method in ('uskd','SimKD') else net
    return Term(partial(cross_entropy, label_smoothing=smoothing), out, targets=[0], name=f'labels {net}')

def of_labels(fn, **kw):
    "A method on the logits that wants the label too, or else the teacher's"
    def or_guess(student, teacher, targets): return fn(student, teacher, torch.where(targets>=0, targets, teacher.argmax(-1)), **kw)
    return lambda s: Term(or_guess, s, 'Teacher', targets=[0])

def review(s): return Term(ReviewKD, f'{s}.body.0', f'{s}.body.1', 'Teacher.body.1', 'Teacher.body.2')
def reused(s): return Term(distance, f'{s}.features', 'Teacher.body')
def from_three(s): return Term(kd_ensemble, s, 'Teacher', 'Teacher2', 'Teacher3')
def itself(s): return Term(partial(uskd, mu=.05), f'{s}.logits', f'{s}.weak', targets=[0])

class Classifier:
    "A problem of `benchmarks.methods`; teachers have three convolutions, of which the first and the second have strides, students two"
    MEASURED,LR = 'pictures named rightly',1e-2
    TEACHERS = ('Teacher','Teacher2','Teacher3') # Alike but for their first weights; the first teaches where one is wanted
    NO_TEACHER = {'uskd'}
    ALONE = dict(label_smoothing=partial(lesson, smoothing=.1)) # Besides the twin, students that have labels only

    def __init__(self,
        doc, # What it is
        pictures, # Without arguments, gives pictures [n,1,side,side] and labels
        learn:int, choose:int, # How many to learn from and to choose by; the others are measured on
        labels:int, epochs:list,
        big, small, # Widths of the teacher's convolutions, and of a student's
        strides, # Of the teacher's three convolutions and of the student's two
        sides, # Of the student's maps after its first convolution and its second
    ):
        self.__doc__,self.made,self.n,self.LABELS,self.EPOCHS = doc,pictures,learn,labels,epochs
        self.PARTS = dict(choose=slice(learn, learn+choose), test=slice(learn+choose, None))
        self.widths,self.strides,self.sides = (big,small),strides,sides
        self.teachers,self.METHODS = {},self.methods()

    def dls(self, seed, labels, bs=50):
        "Picture, label (-100: none), number"
        set_seed(seed)
        (x,y),n = self.made(),self.n
        known = torch.full((n,), -100)
        some = torch.randperm(n)[:labels]
        known[some] = y[some]
        data = TensorDataset(x[:n], known, torch.arange(n))
        made = DataLoaders(DataLoader(data, bs=bs, shuffle=True, drop_last=True), DataLoader(data, bs=bs))
        for dl in made: dl.n_inp = 1
        return made

    def batch(self):
        "Fifty pictures with their labels"
        x,y = self.made()
        return x[:50],(y[:50], torch.arange(50))

    # ---- networks

    def of_widths(self, widths, strides): return net(*map(conv, (1, *widths), widths, strides), nf=widths[-1], side=self.sides[-1])
    def big(self): return self.of_widths(self.widths[0], self.strides[0])
    def first(self): return self.of_widths(self.widths[1], self.strides[1])

    def student(self, method, net):
        (*_,theirs),(weak,own) = self.widths
        shapes = [(1,nf,self.sides[-1],self.sides[-1]) for nf in (own, theirs)]
        if method=='SimKD': return Reused(net.body, self.teacher('Teacher').head, *shapes)
        return WithWeak(net, head(weak, self.sides[0])) if method=='uskd' else net

    def layers(self, net): return list((net.student if isinstance(net, WithWeak) else net).body.parameters())

    def teacher(self, name):
        if name not in self.teachers:
            seed = 50+self.TEACHERS.index(name)
            set_seed(seed)
            self.teachers[name] = kept_net(name, self.big(), lambda net: fit({name: net}, [lesson(name)], self.dls(seed, self.n), 10))
        return self.teachers[name]

    told = teacher # It is asked as it goes
    lesson = staticmethod(lesson)

    # ---- methods

    def before_relu(self, s): return Term(partial(ofd, margin=ofd_margin(self.teacher('Teacher').body[2][1])), f'{s}.body.1.1', 'Teacher.body.2.1')

    def methods(self):
        body = ('body', 'body')
        return dict(
            kd=on(kd), kd_standardised=on(partial(kd, T=2., standardise=True)), dkd=of_labels(dkd), nkd=of_labels(nkd), wsl=of_labels(wsl),
            dist=on(dist), ttm=on(ttm), wttm=on(wttm), mlkd=on(mlkd), mlkd_standardised=on(partial(mlkd, standardise=True)), CTKD=on(partial(CTKD, ramp=100)),
            three_teachers=from_three, uskd=itself,
            hint=on(distance, *body), hint_mlp=on(distance, *body, projector=partial(Projector, hidden=64)), hint_ensemble=on(cosine, *body, projector=Ensemble),
            hint_orthogonal=on(distance, *body, projector=Orthogonal), cosine=on(cosine, *body), attention=on(attention_transfer, *body), sp=on(sp, *body), rkd=on(rkd, *body),
            pkt=on(pkt, *body), itrd=on(itrd, *body), cwd=on(cwd, *body), pkd=on(pkd, *body), ofd=self.before_relu, pyramid=on(pyramid, *body),
            generation=on(distance, *body, projector=Generation), VID=on(VID, *body), CRD=on(partial(CRD, n=self.n, dim=64, negatives=256), *body, targets=[1]),
            ReviewKD=review, SimKD=reused)

    # ---- how good they are

    @torch.no_grad()
    def score(self, net, part):
        "Accuracy on a part"
        x,y = (o[self.PARTS[part]] for o in self.made())
        out = net.eval()(x)
        return ((out['logits'] if isinstance(out, dict) else out).argmax(1)==y).float().mean().item()
