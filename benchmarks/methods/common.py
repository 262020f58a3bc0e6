"What the problems of `benchmarks.methods` have in common: how a method is written down, how students are trained, how a teacher is asked only once"
import json, time
from pathlib import Path
import numpy as np, torch
from fastai.basics import Callback, CancelValidException
from torch import nn
from distillbook.core import write_beside
from distillbook.learner import distill_learner
from distillbook.nets import Nets, mapped
from distillbook.terms import Term

def on(fn, student='', teacher='', **term):
    "A method on outputs or inner layers of a student and of the teacher, as a function of the student's name"
    def at(net, layer): return f'{net}.{layer}' if layer else net
    return lambda s: Term(fn, at(s, student), at('Teacher', teacher), **term)

class Quiet(Callback):
    "No validation"
    def before_validate(self): raise CancelValidException

def fit(nets, terms, dls, epochs, frozen=(), lr=1e-2, cbs=(), **kwargs):
    "One cycle of training without validation, in bfloat16 on a GPU; the learner"
    learn = distill_learner(dls, nets, terms, frozen=frozen, cbs=[Quiet(), *cbs], lr=lr, **kwargs)
    if str(getattr(dls, 'device', 'cpu')).startswith('cuda'): learn.to_bf16()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs)
    return learn

class Batches:
    "Batches of which half have a label, in an order that a seed and the epoch give; the last target is the number of each picture"
    n_inp = 1
    def __init__(self, tensors, hidden, labelled, bs, seed):
        "`hidden`: from targets to those of pictures without a label; `labelled`: numbers of those with one"
        (self.x,*self.targets),self.bs,self.seed,self.epoch = tensors,bs,seed,0
        self.labelled,n = np.asarray(labelled),len(self.x)
        self.others = np.setdiff1d(np.arange(n), self.labelled)
        without = hidden(self.targets)
        known = torch.zeros(n, dtype=torch.bool)
        known[self.labelled] = True
        def one(y, none): return torch.where(known.view(-1, *[1]*(y.ndim-1)), y, none)
        self.targets = [*map(one, self.targets, without), torch.arange(n)]
        self.half = self.bs//2 if len(self.others) else self.bs

    def __len__(self): return len(self.others)//(self.bs-self.half) if len(self.others) else len(self.x)//self.bs
    def set_epoch(self, epoch, skip=0): self.epoch = epoch
    def __iter__(self):
        rng,n = np.random.default_rng([self.seed, self.epoch]),len(self)
        def some(pool, k):
            rounds = -(-n*k//len(pool)) if k else 0
            return np.concatenate([rng.permutation(pool) for _ in range(rounds)])[:n*k].reshape(n, k) if k else np.empty((n, 0), int)
        for idx in np.concatenate([some(self.labelled, self.half), some(self.others, self.bs-self.half)], 1):
            yield self.x[idx],*(y[idx] for y in self.targets)

class Told(nn.Module):
    "What a frozen network said of all pictures to learn from, outputs and some inner layers, looked up by their numbers"
    def __init__(self, net, x, bs=50, **inner):
        super().__init__()
        nets = Nets(dict(Teacher=net), frozen=['Teacher']).train()
        nets.tapped = [f'Teacher.{path}' for path in inner.values()]
        def ask(part): return nets(part)['Teacher'] | {k: nets.taps[f'Teacher.{path}'] for k,path in inner.items()}
        with torch.no_grad(): self.answers = mapped(lambda *os: torch.cat(os), *map(ask, x.split(bs)))
    def forward(self, x, targets): return mapped(lambda o: o[targets[-1]], self.answers)

# ---- what is made once

def kept(path, make, about=None):
    "What a file holds that was made of the same, or what is made and written into it, with the processor time that it took"
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get('about', '')!=about:
        start,made = time.process_time(),make()
        found = dict(about=about, cpu_seconds=round(time.process_time()-start, 1), made=made)
        with write_beside(path) as tmp: tmp.write_text(json.dumps(found, indent=1))
    return found

place = dict(folder=None) # Where trained teachers are kept; None: nowhere

def kept_net(name, net, train):
    "A network with the weights in a file, or trained, and its weights written"
    path = place['folder'] and Path(place['folder'])/f'{name}.pth'
    if path and path.exists(): net.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(net)
        if path:
            with write_beside(path) as tmp: torch.save(net.state_dict(), tmp)
    return net.eval()
