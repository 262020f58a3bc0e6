"""CIFAR-10 or CIFAR-100 from files in its own format, Python's or the binary one: a ResNet32x4 teaches a ResNet8x4, the papers' favourite pair.

All 50,000 pictures have a label (`--labels`: fewer), 10,000 are measured on, there are none to choose by. Pictures are shifted by up to four pixels and turned round; one cycle of SGD
takes the place of the papers' 240 epochs in steps, with as many epochs as `--minutes` have room for unless `--epochs` says how many. `paper` beside our numbers is the accuracy that authors give for CIFAR-100, see papers.csv."""
import csv, pickle, time
from functools import cache, partial
from pathlib import Path
import numpy as np, torch
from fastai.basics import Callback, DataLoaders, SGD, set_seed
from torch import nn
from benchmarks.methods.common import fit, kept_net, on, place
from distillbook.core import UserError, write_beside
from distillbook.features import cwd, ofd, ofd_margin, pkd, pyramid
from distillbook.learned import CRD, CTKD, Ensemble, Generation, Orthogonal, Reused, ReviewKD, VID
from distillbook.logits import mlkd, nkd, ttm, wsl, wttm
from distillbook.losses import attention_transfer, cosine, cross_entropy, dist, distance, dkd, kd
from distillbook.nets import Projector
from distillbook.relations import itrd, pkt, rkd, sp
from distillbook.terms import Term
from distillbook.use.weights import read_pickle

EPOCHS,LABELS,BS,LR,MOST = None,None,128,.1,240
FIT = dict(opt_func=partial(SGD, decouple_wd=False), wd=5e-4)
MEASURED = 'pictures named rightly'
where = dict(data=None, device='cpu', epochs=0) # The teacher's epochs are as many as the students'

# ---- files

PARTS = dict(learn=['data_batch_1','data_batch_2','data_batch_3','data_batch_4','data_batch_5'], test=['test_batch']), dict(learn=['train'], test=['test'])
BIN = {'data_batch_1': 1, 'train': 2} # Bytes of labels before each picture; the last is the one that counts

def read_cifar(folder):
    "{part: (pictures uint8 [n,3,32,32], labels [n])} of CIFAR-10 or CIFAR-100, whichever lies in the folder or in the one that its archive makes"
    tried = [p for sub in ('', 'cifar-10-batches-py', 'cifar-100-python', 'cifar-10-batches-bin', 'cifar-100-binary') if (p := Path(folder)/sub).is_dir()]
    for at in tried:
        for parts in PARTS:
            first = parts['learn'][0]
            for ending,read in (('', read_python), ('.bin', partial(read_binary, BIN[first]))):
                if (at/f'{first}{ending}').is_file(): return {k: _joined([read(at/f'{n}{ending}') for n in names]) for k,names in parts.items()}
    raise UserError(f"{folder}: neither data_batch_1 (CIFAR-10) nor train (CIFAR-100), with or without .bin, is in it; --data names the folder of CIFAR's own files")

def _joined(pairs): return tuple(torch.from_numpy(np.concatenate(o)) for o in zip(*pairs))

def read_python(path):
    "A pickle of CIFAR's: an array and lists; nothing in it is run"
    found = {k.decode() if isinstance(k, bytes) else k: v for k,v in read_pickle(path).items()}
    labels = found.get('fine_labels', found.get('labels'))
    if labels is None or 'data' not in found: raise UserError(f"{path}: no data and labels in it, but {', '.join(map(str, found))}")
    return _checked(path, np.asarray(found['data'], np.uint8), np.asarray(labels, np.int64))

def read_binary(before, path):
    raw = np.fromfile(path, np.uint8)
    if raw.size%(before+3072): raise UserError(f"{path}: {raw.size} bytes are no whole number of pictures of {before+3072}")
    rows = raw.reshape(-1, before+3072)
    return _checked(path, rows[:,before:], rows[:,before-1].astype(np.int64))

def _checked(path, data, labels):
    if data.size!=3072*len(labels): raise UserError(f"{path}: {data.size} numbers for {len(labels)} pictures of 3 x 32 x 32")
    return data.reshape(-1, 3, 32, 32),labels

@cache
def pictures(part):
    "Pictures [n,3,32,32], normalised, and labels, on the device"
    found = read_cifar(where['data'])
    x = found['learn'][0].float()/255
    mean,std = [f(x, (0,2,3)).view(3, 1, 1) for f in (torch.mean, torch.std)]
    x,y = found['test' if part=='choose' else part]
    return ((x.float()/255-mean)/std).to(where['device']),y.to(where['device'])

def classes(): return int(pictures('learn')[1].max())+1

def make_cifar(folder, n, tests, classes=100, seed=0):
    "Pictures made up, in CIFAR-100's own format: a soft pattern for each class under noise. For machines that have no CIFAR, to try the program and the time it takes"
    rng,d = np.random.default_rng(seed),Path(folder)/'cifar-100-python'
    d.mkdir(parents=True, exist_ok=True)
    patterns = rng.normal(128, 40, (classes,3,8,8)).repeat(4, 2).repeat(4, 3)
    for part,k in (('train', n), ('test', tests)):
        y = rng.permutation(np.arange(k)%classes)
        x = np.clip(patterns[y]+rng.normal(0, 60, (k,3,32,32)), 0, 255).astype(np.uint8).reshape(k, 3072)
        with write_beside(d/part) as tmp: tmp.write_bytes(pickle.dumps({b'data': x, b'fine_labels': y.tolist()}, protocol=2))

class Crops:
    "Shuffled batches of picture, label (-100: none) and number; each picture shifted and perhaps turned round"
    n_inp = 1
    def __init__(self, seed, labels, bs, steps=None):
        self.x,self.y = pictures('learn')
        self.n,self.seed,self.epoch,self.bs = len(self.x),seed,0,min(bs, len(self.x))
        self.steps = min(steps or self.n, self.n//self.bs)
        if labels and labels<self.n:
            some = torch.randperm(self.n, generator=torch.Generator().manual_seed(seed))[labels:]
            self.y = self.y.index_fill(0, some.to(self.y.device), -100)
    def to(self, device): pass # They are there
    def __len__(self): return self.steps
    def set_epoch(self, epoch, skip=0): self.epoch = epoch
    def __iter__(self):
        g = torch.Generator().manual_seed(1000*self.seed+self.epoch)
        for i in torch.randperm(self.n, generator=g)[:self.n//self.bs*self.bs].view(-1, self.bs)[:self.steps]:
            dy,dx,turn = (torch.randint(k, (self.bs,1,1), generator=g) for k in (9, 9, 2))
            row,col = torch.arange(32)[:,None]+dy,torch.arange(32)+dx
            col = torch.where(turn>0, col.flip(2), col)
            i,row,col = (o.to(self.x.device) for o in (i, row, col))
            padded = nn.functional.pad(self.x[i], (4,4,4,4))
            yield padded[torch.arange(self.bs, device=i.device)[:,None,None,None],torch.arange(3, device=i.device)[:,None,None],row[:,None],col[:,None]],self.y[i],i

def dls(seed, labels, steps=None):
    data = Crops(seed, labels, BS, steps)
    return DataLoaders(data, data, device=where['device'])

def batch():
    x,y = pictures('learn')
    return x[:BS],(y[:BS], torch.arange(len(x[:BS]), device=x.device))

# ---- how many epochs there is time for

class Clock(Callback):
    "When each step had ended, on the device too"
    order = 90
    def __init__(self): self.ends = []
    def after_batch(self):
        if where['device']!='cpu': torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

def timed(train, steps):
    "Seconds of a step, and what a run takes besides; of a run of so many"
    clock,start = Clock(),time.perf_counter()
    train(dls(0, None, steps), [clock])
    took = np.diff([start, *clock.ends])
    a_step = float(np.median(took[len(took)//2:]))
    return a_step,max(time.perf_counter()-start-len(clock.ends)*a_step, 0)

def epochs_for(minutes, seeds, students, steps=14):
    "How many epochs of teacher and students fit into some minutes; `students(dls, cbs)` trains those of one seed"
    begun,folder,of_one = time.perf_counter(),place['folder'],len(Crops(0, None, BS))
    place['folder'],where['epochs'] = None,0
    try:
        each,more = timed(students, steps)
        teacher_s,_ = timed(lambda dls, cbs: fit({'Teacher': ResNet(DEPTHS['teacher'], WIDTHS)}, [lesson('Teacher')], dls, 1, lr=1e-6, cbs=cbs, **FIT), steps)
    finally:
        place['folder'] = folder
        teacher.cache_clear()
    scored = .15*of_one*each # A fifth as many pictures are measured on, forwards only, in float32
    left = .95*60*minutes-(time.perf_counter()-begun)-seeds*(scored+more)-2*more-20*each
    an_epoch = of_one*(seeds*each+teacher_s)
    if left<an_epoch: raise UserError(f"an epoch of everything with {seeds} seed{'s'*(seeds!=1)} takes {an_epoch/60:.1f} minutes here, of {minutes:g} there are {max(left, 0)/60:.1f} left: "
        "--minutes gives more, --seeds and --only ask for less")
    return min(int(left/an_epoch), MOST)

# ---- networks

def conv_norm(ni, nf, stride=1): return nn.Conv2d(ni, nf, 3, stride, padding=1, bias=False),nn.BatchNorm2d(nf)

class Block(nn.Module):
    "Two convolutions and what came in; `before` the last ReLU"
    def __init__(self, ni, nf, stride):
        super().__init__()
        self.convs = nn.Sequential(*conv_norm(ni, nf, stride), nn.ReLU(), *conv_norm(nf, nf))
        self.short = nn.Identity() if ni==nf and stride==1 else nn.Sequential(nn.Conv2d(ni, nf, 1, stride, bias=False), nn.BatchNorm2d(nf))
        self.before = nn.Identity()
    def forward(self, x): return self.before(self.convs(x)+self.short(x)).relu()

class Trunk(nn.Module):
    "Pictures to the last of three maps"
    def __init__(self, depth, widths):
        super().__init__()
        n,(a,*rest) = (depth-2)//6,widths
        self.stem = nn.Sequential(*conv_norm(3, a), nn.ReLU())
        self.stages = nn.Sequential(*[nn.Sequential(Block(ni, nf, stride), *[Block(nf, nf, 1) for _ in range(n-1)]) for ni,nf,stride in zip((a, *rest), rest, (1,2,2))])
    def forward(self, x): return self.stages(self.stem(x))

class ResNet(nn.Module):
    "ResNets for CIFAR, `depth` x4: three stages of (depth-2)/6 blocks"
    def __init__(self, depth, widths):
        super().__init__()
        self.body = Trunk(depth, widths)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes()))
        for m in self.modules():
            if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
    def forward(self, x): return dict(logits=self.head(self.body(x)))

WIDTHS,DEPTHS = (32,64,128,256),dict(teacher=32, student=8)
def first(): return ResNet(DEPTHS['student'], WIDTHS)
def student(method, net):
    if method!='SimKD': return net
    shape = (1,WIDTHS[-1],8,8)
    return Reused(net.body, teacher('Teacher').head, shape, shape)
def layers(net): return list(net.body.parameters())

TEACHERS = ('Teacher',)

@cache
def teacher(name):
    set_seed(50)
    def train(net):
        if where['epochs']: fit({name: net}, [lesson(name)], dls(50, None), where['epochs'], lr=LR, **FIT)
    return kept_net(f'{name}x{where["epochs"]}', ResNet(DEPTHS['teacher'], WIDTHS), train).to(where['device'])

told = teacher # It is asked as it goes: every picture is another each time

# ---- methods

def lesson(net, method='', smoothing=0.): return Term(partial(cross_entropy, label_smoothing=smoothing), f'{net}.logits', targets=[0], name=f'labels {net}')

def of_labels(fn, **kw):
    def or_guess(student, teacher, targets): return fn(student, teacher, torch.where(targets>=0, targets, teacher.argmax(-1)), **kw)
    return on(or_guess, *LOGITS, targets=[0])

def before_relu(s):
    last = [m for m in teacher('Teacher').modules() if isinstance(m, Block)][-1]
    path = f'body.stages.2.{len(teacher("Teacher").body.stages[2])-1}.before'
    return Term(partial(ofd, margin=margin_of(last)), f'{s}.body.stages.2.0.before', f'Teacher.{path}')

def margin_of(block): return ofd_margin(block.convs[4]).to(where['device'])
def review(s): return Term(ReviewKD, *(f'{n}.body.stages.{i}' for n in (s, 'Teacher') for i in range(3)))
def crd(s): return on(partial(CRD, n=len(pictures('learn')[0]), dim=128, negatives=4096), *BODY, targets=[1])(s)
def reused(s): return Term(distance, f'{s}.features', 'Teacher.body')

LOGITS,BODY = ('logits','logits'),('body','body')
METHODS = dict(
    kd=on(kd, *LOGITS), kd_standardised=on(partial(kd, T=2., standardise=True), *LOGITS), dkd=of_labels(dkd), nkd=of_labels(nkd), wsl=of_labels(wsl), dist=on(dist, *LOGITS), ttm=on(ttm, *LOGITS),
    wttm=on(wttm, *LOGITS), mlkd=on(mlkd, *LOGITS), mlkd_standardised=on(partial(mlkd, standardise=True), *LOGITS), CTKD=on(partial(CTKD, ramp=2000), *LOGITS),
    hint=on(distance, *BODY, projector=Projector), hint_mlp=on(distance, *BODY, projector=partial(Projector, hidden=256)), hint_ensemble=on(cosine, *BODY, projector=Ensemble),
    hint_orthogonal=on(distance, *BODY, projector=Orthogonal), cosine=on(cosine, *BODY), attention=on(attention_transfer, *BODY), sp=on(sp, *BODY), rkd=on(rkd, *BODY), pkt=on(pkt, *BODY),
    itrd=on(itrd, *BODY), cwd=on(cwd, *BODY), pkd=on(pkd, *BODY), ofd=before_relu, pyramid=on(pyramid, *BODY), generation=on(distance, *BODY, projector=Generation), VID=on(VID, *BODY),
    CRD=crd, ReviewKD=review, SimKD=reused)
NO_TEACHER,ALONE = set(),dict(label_smoothing=partial(lesson, smoothing=.1))

def papers():
    "{method: accuracy} of the papers"
    with open(Path(__file__).with_name('papers.csv'), newline='') as f: return {row['method']: float(row['accuracy']) for row in csv.DictReader(f)}

# ---- how good they are

@torch.no_grad()
def score(net, part):
    x,y = pictures(part)
    net = net.to(x.device).eval()
    return sum((net(a)['logits'].argmax(1)==b).sum().item() for a,b in zip(x.split(1000), y.split(1000)))/len(x)
