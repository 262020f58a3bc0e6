"""PP-OCRv4's recognition distillation at a size for two cores: labels alone, then with each of its losses.

    python -m benchmarks.ppocrv4 [--seeds 0 1 2] [--ways WAY...] [--epochs 8] [--threads 1] [--out FOLDER]

A small student with PP-OCRv4's two heads (CTC behind NRTR, `use_guide`) reads rendered numbers of three to six digits. The teacher is a wider network of
the same kind, trained first on 4000 lines; the students get 1600 of them. Lines and steps are the same for all ways; a seed sets the first weights, the
same in all ways, and the order. Each run's numbers are written when it ends, and a run whose numbers are there is not run again. At the end
`ppocrv4.json` and `ppocrv4_lines.png` are written beside them; copied to `benchmarks/results`, they are what the chapter shows."""
import argparse, json, sys, time
from functools import partial
from pathlib import Path
from statistics import mean, stdev
import numpy as np, torch
from PIL import Image
from fastai.basics import Callback, CancelValidException, OptimWrapper, set_seed
from fastai.data.core import DataLoaders
from benchmarks.guide import classes, numbers
from benchmarks.quickstart import machine
from distillbook.core import write_beside
from distillbook.learner import distill_learner
from distillbook.rec.backbone import PlainBackbone
from distillbook.rec.decode import ctc_decode
from distillbook.rec.losses import ctc_logits_kd, ctc_loss, gtc_dkd, gtc_kl, nrtr_loss
from distillbook.rec.neck import EncoderWithSVTR, SequenceEncoder
from distillbook.rec.nets import CTCHead, MultiHead, RecModel
from distillbook.rec.nrtr import NRTRHead
from distillbook.terms import Term

BS,MOST,LINES,HELD,TEACHER_LINES,TEACHER_EPOCHS = 32,8,1600,1000,4000,8
ROWS = ('label_ctc','label_gtc','length') # What a batch holds beside the pictures

# ---- networks

def net(channels=(12,24,48,64), dims=48, nrtr=64):
    "A small backbone with PP-OCRv4's neck and heads: CTC's gradient stops at its neck"
    n = channels[-1]
    svtr = EncoderWithSVTR(n, dims=dims, depth=1, hidden_dims=dims, use_guide=True, kernel_size=(1,3))
    guide = NRTRHead(n, len(classes), nrtr, MOST, 2)
    return RecModel(PlainBackbone(channels), None, MultiHead(SequenceEncoder(svtr), CTCHead(dims, len(classes.alphabet)), gtc_head=guide))

def wide(): return net((20,40,80,112), 64)

# ---- ways

def terms(way):
    "The losses of PP-OCRv4's file: all of them are `v4`"
    labels = [Term(ctc_loss, 'Student.ctc', targets=[0,2], name='ctc'),
        Term(partial(nrtr_loss, smoothing=False, ignore_padding=False), 'Student.gtc', targets=[1], name='nrtr')]
    pair = lambda head: (f'Student.{head}', f'Teacher.{head}')
    dkd = Term(partial(gtc_dkd, alpha=1., beta=2.), *pair('gtc'), targets=[1], weight=.1, name='dkd')
    logits = Term(ctc_logits_kd, *pair('ctc'), name='ctc_logits')
    kl = Term(gtc_kl, *pair('gtc'), targets=[1], name='kl')
    return labels + {'labels': [], '+ DKD': [dkd], '+ CTC logits': [logits], '+ KL': [kl], 'v4': [dkd,logits]}[way]

WAYS = ['labels', '+ DKD', '+ CTC logits', '+ KL', 'v4']

# ---- data

class Batches:
    "Lines in an order that a seed says, another one in each epoch"
    n_inp = 1
    def __init__(self, data, seed=0): self.data,self.epoch,self.seed = data,0,seed
    def __len__(self): return len(self.data[0])//BS
    def one_batch(self): return self.batch(torch.arange(BS))
    def batch(self, i): return (self.data[0][i], *(self.data[1][k][i] for k in ROWS))
    def __iter__(self):
        order = torch.randperm(len(self.data[0]), generator=torch.Generator().manual_seed(1000*self.seed+self.epoch))
        self.epoch += 1
        for i in range(len(self)): yield self.batch(order[i*BS:(i+1)*BS])

def first(data, n): return data[0][:n],{k: v[:n] for k,v in data[1].items()},data[2][:n]

# ---- runs

class Curve(Callback):
    "How many held-out numbers the CTC head reads, after each epoch"
    def __init__(self, held): self.held,self.values = held,[]
    def before_validate(self):
        self.values.append(accuracy(self.model['Student'], self.held))
        raise CancelValidException()

@torch.no_grad()
def accuracy(model, held):
    model.eval()
    probs = torch.cat([model(x) for x in held[0].split(100)])
    return mean(a==b for (a,_),b in zip(ctc_decode(probs, classes.alphabet, probs=True), held[2]))

def fit(nets, frozen, ts, data, held, seed, epochs, lr):
    "A learner after one cycle, and its curve"
    dls = DataLoaders(Batches(data, seed), Batches(data))
    opt = partial(OptimWrapper, opt=torch.optim.AdamW, betas=(.9,.99))
    learn = distill_learner(dls, nets, ts, frozen=frozen, opt_func=opt, lr=lr, wd=.01, cbs=[curve := Curve(held)])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs)
    return learn,curve.values

def ready_teacher(folder, data, held):
    "The teacher, trained once"
    path,teacher = folder/'teacher.pth',wide()
    if not path.exists():
        set_seed(100)
        teacher = wide()
        fit(dict(Student=teacher), [], terms('labels'), data, held, 100, TEACHER_EPOCHS, 3e-3)
        torch.save(teacher.state_dict(), path)
    teacher.load_state_dict(torch.load(path, weights_only=True))
    return teacher.eval()

def run(way, seed, epochs, teacher, data, held):
    "Numbers of one run, and the student"
    set_seed(seed)
    nets,ts = dict(Student=net()),terms(way)
    if len(ts)>2: nets['Teacher'] = teacher
    start = time.process_time()
    learn,curve = fit(nets, [n for n in nets if n=='Teacher'], ts, data, held, seed, epochs, 4e-3)
    parts = learn.parts().tail(50).mean().round(4).to_dict()
    return dict(way=way, seed=seed, epochs=epochs, curve=curve, seconds=round(time.process_time()-start), terms=parts),nets['Student']

# ---- what the chapter shows

@torch.no_grad()
def heads(model, lines):
    "What the NRTR head answers at each character, having been shown those before it"
    x,labels,_ = lines
    return model.eval()(x, tuple(labels[k] for k in ROWS), whole=True)['gtc']

def halves(model, asked, lines):
    "The two parts of DKD between a student and what the teacher answered"
    given = heads(model, lines),asked,lines[1]['label_gtc']
    return {k: round(gtc_dkd(*given, **w).item(), 4) for k,w in dict(target=dict(alpha=1., beta=0.), rest=dict(alpha=0., beta=1.)).items()}

def compared(teacher, students, held, n=3):
    "The NRTR head's answers to the lines of which the teacher is least sure, among those that it reads"
    rows = heads(teacher, held)
    right = held[1]['label_gtc'][:,1:rows.shape[1]+1]
    sure = rows.softmax(-1).gather(-1, right[...,None])[...,0].where(right!=0, 1.).amin(1)
    reads = (rows.argmax(-1)==right).logical_or(right==0).all(1)
    i = sure.where(reads, 1.).topk(n, largest=False).indices
    lines = held[0][i],{k: v[i] for k,v in held[1].items()},[held[2][j] for j in i.tolist()]
    answers = {name: heads(m, lines).round(decimals=3).tolist() for name,m in dict(Teacher=teacher, **students).items()}
    return dict(texts=lines[2], label_gtc=lines[1]['label_gtc'].tolist(), answers=answers),lines[0]

def save_lines(x, path):
    "Pictures under one another"
    Image.fromarray(((torch.cat(list(x[:,0]))+1)*127.5).round().byte().numpy()).save(path)

def row(way, runs):
    "A way as a row of the chapter's table: at the end, and what it is over labels alone, seed by seed"
    at_end = {r['seed']: r['curve'][-1] for r in runs if r['way']==way}
    base = {r['seed']: r['curve'][-1] for r in runs if r['way']=='labels'}
    gains = [v-base[s] for s,v in at_end.items() if s in base]
    error = stdev(gains)/len(gains)**.5 if len(gains)>1 else 0.
    return dict(way=way, at_end=list(at_end.values()), mean=round(mean(at_end.values()), 4), gain=round(mean(gains), 4), error=round(error, 4),
        seconds=round(mean(r['seconds'] for r in runs if r['way']==way)))

def main():
    p = argparse.ArgumentParser(prog='python -m benchmarks.ppocrv4', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    p.add_argument('--ways', nargs='+', default=WAYS, choices=WAYS)
    p.add_argument('--epochs', type=int, default=8)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--out', type=Path, default=Path('runs/ppocrv4'))
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    data,held = numbers(TEACHER_LINES, 0),numbers(HELD, 1)
    teacher,runs,students = ready_teacher(a.out, data, held),[],{}
    asked = heads(teacher, held)
    for seed,way in [(s,w) for s in a.seeds for w in a.ways]:
        path = a.out/f"{way.replace(' ', '_')}_{seed}_{a.epochs}"
        if not path.with_suffix('.json').exists():
            got,student = run(way, seed, a.epochs, teacher, first(data, LINES), held)
            torch.save(student.state_dict(), path.with_suffix('.pth'))
            with write_beside(path.with_suffix('.json')) as tmp: tmp.write_text(json.dumps(got))
        student = net()
        student.load_state_dict(torch.load(path.with_suffix('.pth'), weights_only=True))
        runs.append(got := json.loads(path.with_suffix('.json').read_text()) | dict(halves=halves(student, asked, held)))
        if seed==a.seeds[0] and way in ('labels','v4'): students[way] = student
        print(f"{way:13} seed {seed}, {a.epochs} epochs: {got['curve'][-1]:.3f}; {got['seconds']} s", flush=True)
    shown,pictures = compared(teacher, students, held)
    save_lines(pictures, a.out/'ppocrv4_lines.png')
    count = {n: sum(o.numel() for o in m.parameters()) for n,m in dict(Teacher=teacher, Student=net()).items()}
    result = dict(command=' '.join(['python -m benchmarks.ppocrv4', *sys.argv[1:]]), machine=machine(), threads=a.threads, lines=LINES, held=HELD, parameters=count,
        teacher=accuracy(teacher, held), epochs=a.epochs, rows=[row(w, runs) for w in a.ways], runs=runs, heads=shown)
    with write_beside(a.out/'ppocrv4.json') as tmp: tmp.write_text(json.dumps(result, indent=1))

if __name__=='__main__': main()
