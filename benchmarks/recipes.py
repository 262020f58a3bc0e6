"""Three recipes that need no new function, on scikit-learn's digits, five seeds: a foundation teacher, self-distillation over depth, Noisy Student.

    python -m benchmarks.recipes [--seeds 0 1 2 3 4] [--only foundation depth noisy] [--threads 1] [--out FOLDER]

1,200 pictures to learn from, in the order of the file, 597 others to measure on; 50, 200 or 100 of them have a label, as each recipe says. The chapter
"Recipes" imports the networks and terms from here and shows `recipes.json`, which is written after each seed."""
import argparse, copy, json, sys, time
from functools import cache, partial
from pathlib import Path
import torch, torch.nn.functional as F
from fastai.basics import Callback, CancelValidException, DataLoader, DataLoaders, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from benchmarks.quickstart import machine
from distillbook.core import write_beside
from distillbook.learner import distill_learner
from distillbook.losses import cosine, cross_entropy, distance, kd
from distillbook.nets import Projector
from distillbook.terms import Term

@cache
def digits():
    found = load_digits()
    return torch.tensor(found.images/16, dtype=torch.float32)[:,None],torch.tensor(found.target)

def loaders(labels, seed, only=False, bs=50):
    "The pictures to learn from, of which `labels` have one (others -100); `only`: those alone"
    x,y = digits()
    some = torch.randperm(1200, generator=torch.Generator().manual_seed(seed))[:labels]
    known = torch.full((1200,), -100)
    known[some] = y[some]
    data = TensorDataset(x[some], y[some]) if only else TensorDataset(x[:1200], known)
    return DataLoaders(DataLoader(data, bs=min(bs, labels) if only else bs, shuffle=True, drop_last=True), DataLoader(data, bs=bs))

class Quiet(Callback):
    "No validation"
    def before_validate(self): raise CancelValidException

def fit(nets, terms, dls, steps, frozen=(), lr=1e-2):
    learn = distill_learner(dls, nets, terms, frozen=frozen, cbs=Quiet(), lr=lr)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(max(1, round(steps/len(dls.train))))

@torch.no_grad()
def right(net, output=None):
    "Accuracy on the pictures that are kept"
    x,y = digits()
    out = net.eval()(x[1200:])
    if isinstance(out, dict): out = out[output or 'logits']
    return round((out.argmax(-1)==y[1200:]).float().mean().item(), 4)

def conv(ni, nf, stride=1): return nn.Sequential(nn.Conv2d(ni, nf, 3, stride, padding=1, bias=False), nn.BatchNorm2d(nf), nn.ReLU())
def head(nf): return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4*nf, 10))

# ---- a foundation teacher

class ViT(nn.Module):
    "A small vision transformer: patches of 2x2 and a class token"
    def __init__(self, n=48, depth=3):
        super().__init__()
        self.patches = nn.Conv2d(1, n, 2, 2)
        self.first,self.places = nn.Parameter(torch.zeros(1,1,n)),nn.Parameter(.02*torch.randn(1,17,n))
        layer = nn.TransformerEncoderLayer(n, 4, 2*n, dropout=0., activation='gelu', batch_first=True, norm_first=True)
        self.blocks,self.norm,self.head = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False),nn.LayerNorm(n),nn.Linear(n, 10)

    def forward(self, x): # [N,1,8,8]
        tokens = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.first.expand(len(x), -1, -1), tokens], 1) + self.places
        tokens = self.norm(self.blocks(tokens))
        return dict(tokens=tokens, logits=self.head(tokens[:,0]))

@cache
def foundation():
    "A transformer that has seen all labels"
    set_seed(50)
    net = ViT()
    fit(dict(Teacher=net), [Term(cross_entropy, 'Teacher.logits')], loaders(1200, 0), 960, lr=2e-3)
    return net.eval()

def cnn(): return nn.Sequential(nn.Sequential(conv(1, 8, 2), conv(8, 16)), head(16))
def class_token(student, tokens): return cosine(student[:,0], tokens[:,0])
def places(student, tokens): return cosine(student[:,1:], tokens[:,1:])

def learn_features(net, terms, seed, steps=480):
    "Pictures without labels"
    set_seed(seed)
    fit(dict(Teacher=foundation(), Student=net), terms, loaders(0, seed), steps, ['Teacher'])
    return net

def on_tokens(fn): return Term(fn, 'Student.0', 'Teacher.tokens', projector=Projector)
FEATURES = {'class token': [on_tokens(class_token)], 'places': [on_tokens(places)], 'both': [on_tokens(class_token), on_tokens(places)]}

def run_foundation(seed, labels=50):
    set_seed(seed)
    first = cnn()
    def tuned(net, steps=240, lr=1e-2):
        set_seed(seed)
        fit(dict(Student=net), [Term(cross_entropy, 'Student')], loaders(labels, seed, True), steps, lr=lr)
        return right(net)
    found = {'from nothing': tuned(copy.deepcopy(first)), 'from nothing, three times as long': tuned(copy.deepcopy(first), 720)}
    for k,terms in FEATURES.items(): found[k] = tuned(learn_features(copy.deepcopy(first), terms, seed))
    return found

# ---- over depth

class Deep(nn.Module):
    "Three stages, a head on each; the last is the network's own"
    def __init__(self, n=(6,12,24)):
        super().__init__()
        self.stages = nn.ModuleList([conv(1, n[0], 2), conv(n[0], n[1]), conv(n[1], n[2])])
        self.to_last = nn.ModuleList(nn.Conv2d(k, n[2], 1) for k in n[:2])
        self.heads = nn.ModuleList(head(n[2]) for _ in n)

    def forward(self, x):
        maps = []
        for stage in self.stages: maps.append(stage(maps[-1] if maps else x))
        maps[:2] = [layer(m).relu() for layer,m in zip(self.to_last, maps)]
        first,second,last = [h(m) for h,m in zip(self.heads, maps)]
        return dict(first=first, second=second, logits=last, maps1=maps[0], maps2=maps[1], maps3=maps[2])

def hint(early, last): return distance(early, last.detach())

DEEP = [Term(cross_entropy, f'Net.{k}', name=f'labels_{k}') for k in ('first','second')]
BYOT = DEEP + [Term(partial(kd, T=3.), f'Net.{k}', 'Net.logits', weight=.1, name=f'kd_{k}') for k in ('first','second')]
BYOT = BYOT + [Term(hint, f'Net.maps{i}', 'Net.maps3', weight=.03, name=f'hint_{i}') for i in (1,2)]

def run_depth(seed, labels=200):
    set_seed(seed)
    first,found = Deep(),{}
    for k,terms in {'labels': [], 'a head on each': DEEP, 'each taught by the last': BYOT}.items():
        net = copy.deepcopy(first)
        set_seed(seed)
        fit(dict(Net=net), [Term(cross_entropy, 'Net.logits', name='labels'), *terms], loaders(labels, seed, True), 400)
        found[k] = {o: right(net, o) for o in ('logits','second','first')}
    return found

# ---- Noisy Student

class Noisy(nn.Module):
    "A network whose pictures are disturbed in training: moved by a pixel, scaled, covered in part"
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x): return self.net(self.disturbed(x) if self.training else x)
    def disturbed(self, x):
        n = len(x)
        dx,dy = torch.randint(-1, 2, (2,n))
        moved = torch.stack([o.roll((i,j), (1,2)) for o,i,j in zip(x, dx.tolist(), dy.tolist())])
        x = moved*(.7+.6*torch.rand(n,1,1,1)) + .1*torch.randn_like(x)
        return x*(F.interpolate(torch.rand(n,1,4,4), 8)>.1)

def run_noisy(seed, labels=100, generations=2):
    set_seed(seed)
    first = nn.Sequential(nn.Sequential(conv(1, 16, 2), conv(16, 32)), nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(.2), nn.Linear(128, 10)))
    def alone(net):
        set_seed(seed)
        fit(dict(Student=net), [Term(cross_entropy, 'Student')], loaders(labels, seed, True), 300)
        return net
    def taught(net, teacher):
        set_seed(seed)
        terms = [Term(partial(kd, T=1.), 'Student', 'Teacher')]
        fit(dict(Teacher=teacher, Student=net), terms, loaders(labels, seed), 600, ['Teacher'])
        return net
    plain,noisy = alone(copy.deepcopy(first)),alone(Noisy(copy.deepcopy(first)))
    found = {'labels': right(plain), 'labels, noisy': right(noisy)}
    for k,make in {'student': lambda: copy.deepcopy(first), 'noisy student': lambda: Noisy(copy.deepcopy(first))}.items():
        teacher = plain if k=='student' else noisy
        for g in range(1, generations+1):
            teacher = taught(make(), teacher.eval())
            found[f'{k}, generation {g}'] = right(teacher)
    return found

RECIPES = dict(foundation=run_foundation, depth=run_depth, noisy=run_noisy)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4])
    p.add_argument('--only', nargs='+', default=list(RECIPES), choices=list(RECIPES))
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--out', type=Path, default=Path('runs/recipes'))
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    file,result = a.out/'recipes.json',dict(runs={}, cpu_seconds={})
    if file.exists(): result = json.loads(file.read_text())
    result |= dict(command=' '.join(['python -m benchmarks.recipes', *sys.argv[1:]]), machine=machine())
    for name in a.only:
        runs = result['runs'].setdefault(name, {})
        if name=='foundation': result['teacher'] = right(foundation())
        for seed in a.seeds:
            if str(seed) in runs: continue
            start = time.process_time()
            runs[str(seed)] = RECIPES[name](seed)
            result['cpu_seconds'][name] = round(result['cpu_seconds'].get(name, 0)+time.process_time()-start, 1)
            with write_beside(file) as tmp: tmp.write_text(json.dumps(result, indent=1))
            print(name, seed, runs[str(seed)], flush=True)

if __name__=='__main__': main()
