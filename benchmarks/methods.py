"""Which loss? Every method of distillation on one problem, with one budget, against a twin that has the labels only.

    python -m benchmarks.methods [--labels 200] [--seeds 0 1 2 3 4] [--epochs 12] [--only kd rkd ...] [--threads 1] [--out FOLDER]

scikit-learn's digits, 8 by 8 pixels: 1,000 to learn from, 200 to choose by, 597 to measure on. A teacher of 58,474 weights saw the labels of all
1,000, students of 1,228 weights have those of `--labels`; where a loss wants a label and there is none, it gets the teacher's. All students of a seed begin with the same weights and see the same batches; they are trained side by side in one learner, where none touches
another. A term's weight is that at which its first gradient is as long as that of the labels; with `--choose` .1, 1 or 10 times that, whichever
is best on the 200 pictures with two seeds that are not in the table. What a step costs is measured for each method by itself, in CPU time of one thread.
Each seed's numbers are written when it ends, and a seed whose numbers are there is not run again. `methods.json` holds all of them;
copied to `benchmarks/results`, it is what the chapter shows."""
import argparse, copy, json, sys, time
from collections import OrderedDict
from functools import cache, partial
from pathlib import Path
import torch
from fastai.basics import Callback, CancelValidException, DataLoader, DataLoaders, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from benchmarks.quickstart import machine
from distillbook.core import write_beside
from distillbook.features import cwd, ofd, ofd_margin, pkd, pyramid
from distillbook.learned import CRD, CTKD, Ensemble, Generation, Orthogonal, ReviewKD, VID
from distillbook.learner import distill_learner
from distillbook.logits import kd_ensemble, mlkd, nkd, ttm, uskd, wsl, wttm
from distillbook.losses import attention_transfer, cosine, cross_entropy, dist, distance, dkd, kd
from distillbook.nets import Nets, Projector
from distillbook.relations import itrd, pkt, rkd, sp
from distillbook.terms import Term, Terms

LEARN,CHOOSE = slice(0, 1000),slice(1000, 1200)
FACTORS = (.1, 1., 10.)
TUNING_SEEDS = (100, 101)

@cache
def digits():
    "Pictures and labels, in the order of the file"
    found = load_digits()
    return torch.tensor(found.images/16, dtype=torch.float32)[:,None],torch.tensor(found.target)

def loaders(seed, labels, bs=50):
    "Picture, label (-100: none), number"
    set_seed(seed)
    x,y = digits()
    known = torch.full((1000,), -100)
    some = torch.randperm(1000)[:labels]
    known[some] = y[some]
    data = TensorDataset(x[LEARN], known, torch.arange(1000))
    dls = DataLoaders(DataLoader(data, bs=bs, shuffle=True, drop_last=True), DataLoader(data, bs=bs))
    for dl in dls: dl.n_inp = 1
    return dls

# ---- networks

def conv(ni, nf, stride=1): return nn.Sequential(nn.Conv2d(ni, nf, 3, stride, padding=1, bias=False), nn.BatchNorm2d(nf), nn.ReLU())
def head(nf): return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4*nf, 10))
def net(nf, *convs): return nn.Sequential(OrderedDict(body=nn.Sequential(*convs), head=head(nf)))
def big(): return net(64, conv(1, 32), conv(32, 64, 2), conv(64, 64))
def tiny(): return net(12, conv(1, 6, 2), conv(6, 12))

class WithWeak(nn.Module):
    "A student with a weak head on its first layer"
    def __init__(self, student):
        super().__init__()
        self.student,self.weak = student,head(6)
    def forward(self, x):
        first = self.student.body[0](x)
        return dict(logits=self.student.head(self.student.body[1](first)), weak=self.weak(first))

class Quiet(Callback):
    "No validation"
    def before_validate(self): raise CancelValidException

def fit(nets, terms, dls, epochs, frozen=()):
    learn = distill_learner(dls, nets, terms, frozen=frozen, cbs=Quiet(), lr=1e-2)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs)
    return learn

@cache
def teachers():
    "Three, alike but for their first weights; the first teaches where one is wanted"
    found = {}
    for i,name in enumerate(('Teacher','Teacher2','Teacher3')):
        set_seed(50+i)
        found[name] = big()
        fit({name: found[name]}, [Term(cross_entropy, name, targets=[0])], loaders(50+i, 1000), 10)
    return found

# ---- methods

def of_labels(fn, **kw):
    "A method on the logits that wants the label too, or else the teacher's"
    def or_guess(student, teacher, targets): return fn(student, teacher, torch.where(targets>=0, targets, teacher.argmax(-1)), **kw)
    return lambda s: Term(or_guess, s, 'Teacher', targets=[0])

def on(fn, student='', teacher='', kw={}, **term):
    "A method on outputs or inner layers"
    def at(net, layer): return f'{net}.{layer}' if layer else net
    return lambda s: Term(partial(fn, **kw) if kw else fn, at(s, student), at('Teacher', teacher), **term)

def before_relu(s): return Term(partial(ofd, margin=ofd_margin(teachers()['Teacher'].body[2][1])), f'{s}.body.1.1', 'Teacher.body.2.1')
def review(s): return Term(ReviewKD, f'{s}.body.0', f'{s}.body.1', 'Teacher.body.1', 'Teacher.body.2')
def from_three(s): return Term(kd_ensemble, s, 'Teacher', 'Teacher2', 'Teacher3')
def itself(s): return Term(partial(uskd, mu=.05), f'{s}.logits', f'{s}.weak', targets=[0])

BODY = ('body', 'body')
METHODS = dict(
    kd=on(kd), kd_standardised=on(kd, kw=dict(T=2., standardise=True)), dkd=of_labels(dkd), nkd=of_labels(nkd), wsl=of_labels(wsl),
    dist=on(dist), ttm=on(ttm), wttm=on(wttm), mlkd=on(mlkd), mlkd_standardised=on(mlkd, kw=dict(standardise=True)), CTKD=on(partial(CTKD, ramp=100)),
    three_teachers=from_three, uskd=itself,
    hint=on(distance, *BODY), hint_mlp=on(distance, *BODY, projector=partial(Projector, hidden=64)), hint_ensemble=on(cosine, *BODY, projector=Ensemble),
    hint_orthogonal=on(distance, *BODY, projector=Orthogonal), cosine=on(cosine, *BODY), attention=on(attention_transfer, *BODY), sp=on(sp, *BODY), rkd=on(rkd, *BODY),
    pkt=on(pkt, *BODY), itrd=on(itrd, *BODY), cwd=on(cwd, *BODY), pkd=on(pkd, *BODY), ofd=before_relu, pyramid=on(pyramid, *BODY),
    generation=on(distance, *BODY, projector=Generation), VID=on(VID, *BODY), CRD=on(partial(CRD, n=1000, dim=64, negatives=256), *BODY, targets=[1]),
    ReviewKD=review)
SELF = {'uskd', 'label_smoothing'}

def student(method, first):
    "A student for a method, with the first weights of all"
    own = copy.deepcopy(first)
    return WithWeak(own) if method=='uskd' else own

def labels(method, name, smoothing=0.):
    out = f'{name}.logits' if method=='uskd' else name
    return Term(partial(cross_entropy, label_smoothing=smoothing), out, targets=[0], name=f'labels {name}')

def taught(method, name, weight):
    "The term of a method"
    t = METHODS[method](name)
    t.name,t.named,t.weight,t.recipe = f'{method} {name}',True,weight,(t.recipe[0],weight)
    return t

def needed(methods): return teachers() if 'three_teachers' in methods else {'Teacher': teachers()['Teacher']}

# ---- weights

def first_gradients(methods):
    "How long the first gradient of each method is on the student, in units of that of the labels"
    set_seed(99)
    first,(x,y) = tiny(),digits()
    x,y,i = x[:50],y[:50],torch.arange(50)
    res = {}
    for m in methods:
        own = student(m, first)
        nets = Nets({**needed([m]), 'S': own}, frozen=list(needed([m])))
        terms = Terms(nets, [labels(m, 'S'), taught(m, 'S', 1.)])
        terms.connect((x,), (y, i))
        params = list((own.student if m=='uskd' else own).body.parameters())
        lengths = []
        for t in terms.terms:
            ins,named = terms.inputs(t, nets.train()(x), (y, i))
            grads = torch.autograd.grad(terms.value_of(t, terms.projected(t, ins), named, (y, i)), params, allow_unused=True)
            lengths.append(sum(g.square().sum() for g in grads if g is not None).sqrt().item())
        res[m] = lengths[1]/lengths[0]
    return res

@torch.no_grad()
def right(net, part):
    "Accuracy on a part of the digits"
    x,y = digits()
    out = net.eval()(x[part])
    return ((out['logits'] if isinstance(out, dict) else out).argmax(1)==y[part]).float().mean().item()

def side_by_side(students, seed, epochs, known):
    "{name: (method, weight)} trained in one learner; the networks"
    dls = loaders(seed, known)
    first,given = tiny(),needed([m for m,_ in students.values()])
    nets = {'Alone': copy.deepcopy(first), 'label_smoothing': copy.deepcopy(first)} | {n: student(m, first) for n,(m,_) in students.items()}
    terms = [labels('', 'Alone'), labels('', 'label_smoothing', .1)]
    terms += [t for n,(m,w) in students.items() for t in (labels(m, n), taught(m, n, w))]
    learn = fit({**given, **nets}, terms, dls, epochs, list(given))
    return {n: learn.net(n) for n in nets}

def chosen(methods, epochs, known):
    "The best weight of each method on the pictures that are kept for choosing; without labels to try it with, as long as the labels'"
    unit = first_gradients(methods)
    if not known: return {m: dict(factor=1., weight=1/unit[m]) for m in methods}
    tries = {f'{m} {i}': (m, f/unit[m]) for m in methods for i,f in enumerate(FACTORS)}
    found = [side_by_side(tries, seed, epochs, known) for seed in TUNING_SEEDS]
    score = {n: sum(right(nets[n], CHOOSE) for nets in found)/len(found) for n in tries}
    of = {m: {f: score[f'{m} {i}'] for i,f in enumerate(FACTORS)} for m in methods}
    best = {m: max(FACTORS, key=lambda f: (of[m][f], f==1)) for m in methods}
    return {m: dict(factor=best[m], weight=best[m]/unit[m], tried={f'{f:g}': round(v, 4) for f,v in of[m].items()}) for m in methods}

# ---- what a step costs

def step_times(methods, n=15):
    "Median CPU seconds of a step with one student, labels and a method; of labels alone under ''"
    x,y = digits()
    batch,numbers = (x[:50], y[:50]),torch.arange(50)
    def median(m):
        set_seed(0)
        given = needed([m]) if m and m not in SELF else {}
        nets = Nets({**given, 'S': student(m, tiny())}, frozen=list(given))
        terms = Terms(nets, [labels(m, 'S'), *([taught(m, 'S', 1.)] if m in METHODS else [])])
        terms.connect((batch[0],), (batch[1], numbers))
        opt,times = torch.optim.Adam([p for p in nets.parameters() if p.requires_grad], 1e-3),[]
        for _ in range(n):
            start = time.process_time()
            opt.zero_grad()
            terms(nets.train()(batch[0]), batch[1], numbers).backward()
            opt.step()
            times.append(time.process_time()-start)
        return sorted(times)[n//2]
    return {m: median(m) for m in ('', *methods)}

def kept(path, make):
    "What a file holds, or what is made and written into it"
    if not path.exists():
        start,made = time.process_time(),make()
        with write_beside(path) as tmp: tmp.write_text(json.dumps(dict(cpu_seconds=round(time.process_time()-start), made=made), indent=1))
    return json.loads(path.read_text())

def main():
    ap = argparse.ArgumentParser(prog='python -m benchmarks.methods', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--labels', type=int, default=200, help='Pictures with a label, of 1000')
    ap.add_argument('--choose', action='store_true', help='Choose each weight out of three (minutes more)')
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1,2,3,4])
    ap.add_argument('--epochs', type=int, default=12)
    ap.add_argument('--longer', type=int, default=0, help='Measure once more with so many times the epochs; 0: not')
    ap.add_argument('--longer-only', nargs='+', choices=METHODS, help='Methods of that; default: all')
    ap.add_argument('--only', nargs='+', choices=METHODS, default=list(METHODS))
    ap.add_argument('--threads', type=int, default=1)
    ap.add_argument('--out', type=Path, default=Path('runs/methods'))
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    costs = kept(a.out/'costs.json', lambda: step_times(a.only))
    weights = kept(a.out/'weights.json', lambda: chosen(a.only, a.epochs, a.labels if a.choose else 0))
    def measured(seed, epochs, methods):
        students = {m: (m, weights['made'][m]['weight']) for m in methods}
        return {n: right(net, slice(1200, None)) for n,net in side_by_side(students, seed, epochs, a.labels).items()}
    said = ['FOLDER' if o==str(a.out) else o for o in sys.argv[1:]]
    res = dict(command=' '.join(['python -m benchmarks.methods', *said]), machine=machine(), torch=torch.__version__, labels=a.labels, epochs=a.epochs)
    res |= dict(costs=costs['made'], weights=weights['made'], runs={}, cpu_seconds={'choosing weights': weights['cpu_seconds']})
    res['teacher'] = right(teachers()['Teacher'], slice(1200, None))
    for times in ([1, a.longer] if a.longer else [1]):
        methods = a.only if times==1 else a.longer_only or a.only
        for seed in a.seeds:
            got = kept(a.out/f'seed{seed}x{times}.json', lambda: measured(seed, a.epochs*times, methods))
            res['runs'].setdefault(f'{a.epochs*times}', {})[f'{seed}'] = {k: round(v, 4) for k,v in got['made'].items()}
            res['cpu_seconds'][f'seed {seed}, {a.epochs*times} epochs'] = got['cpu_seconds']
            print(seed, a.epochs*times, {k: round(v-got['made']['Alone'], 3) for k,v in got['made'].items()}, flush=True)
        with write_beside(a.out/'methods.json') as tmp: tmp.write_text(json.dumps(res, indent=1))

if __name__=='__main__': main()
