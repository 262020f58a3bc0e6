"""Short rendered numbers of three to five digits, 24 by 64 pixels, read by CTC and measured on a font that nobody has seen.

2,000 lines in DejaVu to learn from, 300 of them (`--labels`) with a label, of which there are as many in each batch as of the others; 300 lines in
Roboto to choose by, 1,000 to measure on. A label is the whole text. Where a loss wants a label and there is none, it gets what the teacher reads, and where it wants
a class for each frame, the teacher's."""
import random
from functools import cache, partial
import torch
from fastai.basics import DataLoaders, set_seed
from torch import nn
from benchmarks.methods.common import Batches, Told, fit, kept_net, on
from distillbook.data.render import font_files
from distillbook.features import cwd, ofd, ofd_margin, pkd, pyramid
from distillbook.learned import CRD, CTKD, Ensemble, Generation, Orthogonal, ReviewKD, VID
from distillbook.logits import mlkd, nkd, ttm, wsl, wttm
from distillbook.losses import attention_transfer, cosine, dist, distance, dkd, dml_paddle, kd
from distillbook.nets import Projector
from distillbook.rec.decode import ctc_decode
from distillbook.rec.frames import ctc_aligned, ctc_kd, ctc_pseudo, dctc, readings
from distillbook.rec.labels import Alphabet, encode_batch
from distillbook.rec.losses import ctc_dkd, ctc_each, ctc_logits_kd
from distillbook.rec.render import render_words
from distillbook.relations import itrd, pkt, rkd, sp
from distillbook.terms import Term

EPOCHS,LABELS,N,BS,LR = [4],300,2000,50,1e-2
ALPHABET,H,W,LONGEST = Alphabet('0123456789'),24,64,5
TESTS = 300,1000 # Lines to choose by, and to measure on
MEASURED = 'lines of an unseen font read without a mistake'

# ---- data

def numbers(n, seed):
    "Different numbers"
    rng,found = random.Random(seed),{}
    while len(found)<n: found[''.join(rng.choice('0123456789') for _ in range(rng.randint(3, LONGEST)))] = None
    return list(found)

@cache
def lines(part):
    "Pictures [n,1,24,64], labels, lengths, words"
    words = numbers(N+sum(TESTS), 0)
    words = dict(learn=words[:N], choose=words[N:N+TESTS[0]], test=words[N+TESTS[0]:])[part]
    drawn = render_words(words, font_files('dejavu' if part=='learn' else 'roboto'), len(part), H, W)
    return (torch.from_numpy(drawn.images).float()[:,None]/127.5-1,*encode_batch(words, ALPHABET, LONGEST),words)

def dls(seed, labels):
    x,y,n,_ = lines('learn')
    g = torch.Generator().manual_seed(seed)
    data = Batches((x, y, n), lambda ts: [torch.zeros_like(t) for t in ts], torch.randperm(N, generator=g)[:labels], BS, seed)
    return DataLoaders(data, data)

def batch():
    "Fifty lines with their labels"
    x,y,n,_ = lines('learn')
    return x[:BS],(y[:BS], n[:BS], torch.arange(BS))

# ---- networks

def conv(ni, nf, stride): return nn.Sequential(nn.Conv2d(ni, nf, 3, stride, padding=1, bias=False), nn.BatchNorm2d(nf), nn.ReLU())

class Reader(nn.Module):
    "Lines [N,1,24,64] to logits [N,16,11], and the maps on the way"
    def __init__(self, a, b, c, d):
        super().__init__()
        self.low,self.mid,self.high = conv(1, a, 2),conv(a, b, 2),conv(b, c, (2,1))
        self.fold = nn.Sequential(nn.Conv2d(c, d, 3, padding=(0,1), bias=False), nn.BatchNorm2d(d))
        self.fc = nn.Linear(d, len(ALPHABET))
    def forward(self, x):
        mid = self.mid(self.low(x))
        high = self.high(mid)
        before = self.fold(high)
        last = before.relu()
        return dict(logits=self.fc(last.squeeze(2).mT), last=last, before=before, high=high, mid=mid)

def first(): return Reader(8, 16, 24, 32)
def student(method, net): return net
def layers(net): return [p for n,p in net.named_parameters() if not n.startswith('fc')]

TEACHERS,TEACHER_EPOCHS = ('Teacher',),30

@cache
def teacher(name):
    set_seed(50)
    return kept_net(name, Reader(24, 48, 96, 128), lambda net: fit({name: net}, [lesson(name)], dls(50, N), TEACHER_EPOCHS, lr=3e-3))

@cache
def told(name): return Told(teacher(name), lines('learn')[0])

# ---- terms

def ctc_of_labelled(logits, labels, length):
    "CTC of the lines that have a label"
    has = length>0
    return (ctc_each(logits, labels, length)*has).sum()/has.sum().clamp(min=1)

def lesson(net, method=''): return Term(ctc_of_labelled, f'{net}.logits', targets=[0,1], name=f'labels {net}')

def self_taught(logits, labels, length):
    "`dctc` of the lines that have a label"
    has = length>0
    return dctc(logits[has], labels[has], length[has]) if has.any() else 0.*logits.sum()

def by_frames(fn, **kw):
    "A loss that wants a class for each frame: the teacher's"
    def of_frames(student, teacher): return fn(student, teacher, teacher.argmax(-1), **kw)
    return on(of_frames, 'logits', 'logits')

def or_read(student, teacher, labels, length):
    "Labels, or what the teacher reads"
    own,n,_ = readings(teacher)
    own,has = own[:,:labels.shape[1]],length>0
    return torch.where(has[:,None], labels, own),torch.where(has, length, n.clamp(max=labels.shape[1]))

def aligned(student, teacher, labels, length): return ctc_aligned(student, teacher, *or_read(student, teacher, labels, length))
def paddles_dkd(student, teacher, labels, length): return ctc_dkd(student, teacher, or_read(student, teacher, labels, length)[0])

def before_relu(s): return Term(partial(ofd, margin=ofd_margin(teacher('Teacher').fold[1])), f'{s}.before', 'Teacher.before')
def review(s): return Term(ReviewKD, f'{s}.high', f'{s}.last', 'Teacher.high', 'Teacher.last')

LOGITS,LAST = ('logits','logits'),('last','last')
METHODS = dict(
    kd=on(kd, *LOGITS), kd_T1=on(partial(kd, T=1.), *LOGITS), kd_standardised=on(partial(kd, T=2., standardise=True), *LOGITS), dkd=by_frames(dkd), nkd=by_frames(nkd), wsl=by_frames(wsl),
    dist=on(dist, *LOGITS), ttm=on(ttm, *LOGITS), wttm=on(wttm, *LOGITS), mlkd=on(mlkd, *LOGITS), CTKD=on(partial(CTKD, ramp=250), *LOGITS), dml_paddle=on(dml_paddle, *LOGITS),
    ctc_kd=on(ctc_kd, *LOGITS), ctc_kd_no_blanks=on(partial(ctc_kd, blank=0.), *LOGITS),
    ctc_aligned=on(aligned, *LOGITS, targets=[0,1]), ctc_pseudo=on(ctc_pseudo, *LOGITS), ctc_logits_kd=on(ctc_logits_kd, *LOGITS), ctc_dkd=on(paddles_dkd, *LOGITS, targets=[0,1]),
    dctc=lambda s: Term(self_taught, f'{s}.logits', targets=[0,1]),
    hint=on(distance, *LAST), hint_mlp=on(distance, *LAST, projector=partial(Projector, hidden=64)), hint_ensemble=on(cosine, *LAST, projector=Ensemble),
    hint_orthogonal=on(distance, *LAST, projector=Orthogonal), cosine=on(cosine, *LAST), attention=on(attention_transfer, 'high', 'high'), sp=on(sp, *LAST), rkd=on(rkd, *LAST),
    pkt=on(pkt, *LAST), itrd=on(itrd, *LAST), cwd=on(cwd, *LAST), pkd=on(pkd, *LAST), ofd=before_relu, pyramid=on(pyramid, 'high', 'high'),
    generation=on(distance, *LAST, projector=Generation), VID=on(VID, *LAST), CRD=on(partial(CRD, n=N, dim=64, negatives=256), *LAST, targets=[2]), ReviewKD=review)
NO_TEACHER = {'dctc'}
ALONE = {} # Besides the twin, students that have labels only

# ---- how good they are

@torch.no_grad()
def score(net, part):
    "Lines read without a mistake"
    x,_,_,words = lines(part)
    read = [t for o in x.split(500) for t,_ in ctc_decode(net.eval()(o)['logits'], ALPHABET)]
    return sum(a==b for a,b in zip(read, words))/len(words)
