"""A small student that reads codes learns another font, or other letters: which way is best, and what does it forget?

    python -m benchmarks.finetune_students [--seeds 0 1 2] [--threads 1] [--out FOLDER]

The released PP-OCRv3 teaches it codes of digits and capitals in the DejaVu fonts. Then 480 words of Roboto, 30 steps; and 720 words with small letters
too, 45 steps. At the end `finetune_students.json` is written; copied to `benchmarks/results`, it is what the chapter on fine-tuning shows."""
import argparse, copy, json, sys, tempfile
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, torch
from torch import nn
from fastai.basics import OptimWrapper, set_seed
from benchmarks.quickstart import machine
from distillbook.cache import CachedNet
from distillbook.checkpoint import Checkpoint
from distillbook.core import write_beside
from distillbook.data.render import font_files
from distillbook.learner import distill_learner
from distillbook.losses import kd
from distillbook.rec.decode import RecMetric, ctc_decode
from distillbook.rec.labels import Alphabet
from distillbook.rec.losses import ctc_loss
from distillbook.rec.nets import PlainStudent, Sliced
from distillbook.rec.render import normalise, render_words, word_dls
from distillbook.terms import Term
from distillbook.use.finetune import remap_classes
from distillbook.use.teachers import load_teacher
from distillbook.use.weights import extract

A = Alphabet('0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ')
B = Alphabet('0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz')
labels = Term(ctc_loss, 'Student')
taught = Term(partial(kd, T=1.), 'Student', 'Teacher', weight=20.)

def codes(n, seed, chars=A.chars, family='dejavu'):
    rng = np.random.default_rng(seed)
    return render_words([''.join(rng.choice(chars, rng.integers(3, 8))) for _ in range(n)], font_files(family), seed=seed)

def fit(nets, terms, train, valid, alphabet, epochs, lr, seed, cbs=()):
    set_seed(seed)
    frozen,adamw = [n for n in nets if n=='Teacher'],partial(OptimWrapper, opt=torch.optim.AdamW)
    learn = distill_learner(word_dls(train, valid, 48, alphabet, seed), nets, terms, frozen=frozen,
        metrics=RecMetric(alphabet), opt_func=adamw, cbs=list(cbs), monitor='Student_acc')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    return learn

def student(alphabet=A): return PlainStudent(len(alphabet), (16,24,32,48)).to(memory_format=torch.channels_last)

def right(net, lines, alphabet=A):
    "Exact accuracy"
    net,texts = net.eval(),[]
    for i in range(0, len(lines), 60):
        x = normalise(lines.images[i:i+60], lines.widths[i:i+60])
        with torch.no_grad(): texts += [text for text,_ in ctc_decode(net(x), alphabet)]
    return sum(t==w for t,w in zip(texts, lines.words))/len(lines)

def start(folder, words=2400, epochs=6):
    "The teacher, and a student that has learned from it"
    net,its = load_teacher('PP-OCRv3_rec')
    teacher = CachedNet(Sliced(net, A.columns_in(its)), folder/'answers.bin', 'PP-OCRv3').eval()
    fit(dict(Teacher=teacher, Student=student()), [labels, taught], codes(words, 0), codes(48, 9), A, epochs, 8e-3, 0, [Checkpoint(folder/'run')])
    begin = student()
    begin.load_state_dict(extract(folder/'run', 'Student'))
    return teacher,begin

def ways(teacher, begin, seed, test, old):
    "Another font: with the teacher, alone, from nothing"
    train,watch = codes(480, 100+seed, family='roboto'),codes(48, 9)
    def run(net, terms, **teacher): return fit(dict(**teacher, Student=net), terms, train, watch, A, 3, 3e-3, seed).net('Student')
    nets = {'with its teacher': run(copy.deepcopy(begin), [labels, taught], Teacher=teacher),
        'alone': run(copy.deepcopy(begin), [labels]), 'from nothing': run(student(), [labels])}
    return [dict(way=k, Roboto=right(n, test), DejaVu=right(n, old)) for k,n in nets.items()]

def last_layer_anew(begin):
    net = copy.deepcopy(begin)
    net.fc = nn.Linear(net.fc.in_features, len(B))
    return net

def letters(begin, seed, test, old):
    "Other letters: classes re-mapped, the last layer thrown away, from nothing"
    train,watch = codes(720, 200+seed, B.chars),codes(48, 9)
    set_seed(seed)
    starts = {'re-mapped, random': remap_classes(begin, A, B), 're-mapped, mean': remap_classes(begin, A, B, 'mean'),
        'last layer anew': last_layer_anew(begin), 'from nothing': student(B)}
    nets = {k: fit(dict(Student=n), [labels], train, watch, B, 3, 3e-3, seed).net('Student') for k,n in starts.items()}
    return [{'way': k, 'new words': right(n, test, B), 'old words': right(n, old, B)} for k,n in nets.items()]

def spread(rows):
    "Mean, lowest and highest of each way"
    table = pd.DataFrame(rows).groupby('way').agg(['mean','min','max']).round(3)
    return {way: {k: row[k].tolist() for k in table.columns.levels[0]} for way,row in table.iterrows()}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--out', type=Path, default=Path('runs/finetune_students'))
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    old = codes(240, 1)
    with tempfile.TemporaryDirectory() as d: teacher,begin = start(Path(d))
    new,mixed = codes(240, 2, family='roboto'),codes(240, 3, B.chars)
    result = dict(command=' '.join(['python -m benchmarks.finetune_students', *sys.argv[1:]]), machine=machine(), seeds=a.seeds,
        before=dict(DejaVu=round(right(begin, old), 3), Roboto=round(right(begin, new), 3)),
        font=spread([r for s in a.seeds for r in ways(teacher, begin, s, new, old)]),
        letters=spread([r for s in a.seeds for r in letters(begin, s, mixed, old)]))
    a.out.mkdir(parents=True, exist_ok=True)
    with write_beside(a.out/'finetune_students.json') as tmp: tmp.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))

if __name__=='__main__': main()
