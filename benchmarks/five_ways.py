"""One small recogniser trained in five ways on the same rendered words, with several seeds.

    python -m benchmarks.five_ways [--seeds 0 1 2] [--epochs 6] [--threads 1] [--out FOLDER]

The ways: labels alone; mutual learning (PaddleOCR's DML) of two and of three networks; DML with the distance between the feature maps besides;
the frozen, released PP-OCRv3 recogniser as teacher. Words, pictures and steps are the same for all; a seed sets the first weights (the student's are the
same in all five ways) and the order of the words. Each run's numbers are written when it ends, and a run whose numbers are there is not run again.
At the end `five_ways.json` and `five_ways.png` are written beside them; copied to `benchmarks/results`, they are what the chapter shows."""
import argparse, json, sys, time
from functools import cache, partial
from pathlib import Path
from statistics import mean
import matplotlib.pyplot as plt, torch
from fastai.basics import OptimWrapper, set_seed
from benchmarks.quickstart import machine
from distillbook.core import write_beside
from distillbook.data.render import font_files, make_words
from distillbook.learner import distill_learner
from distillbook.losses import distance, dml_paddle, kd
from distillbook.nets import Nets
from distillbook.rec.decode import CTCDecoder, RecMetric
from distillbook.rec.labels import Alphabet
from distillbook.rec.losses import ctc_loss
from distillbook.rec.nets import PlainStudent
from distillbook.rec.render import WordData, WordDL, rendered_set, word_dls
from distillbook.terms import Term
from distillbook.use.evaluation import NetMetrics, evaluate
from distillbook.use.teachers import released_teacher

WAYS = ['labels', 'dml2', 'dml3', 'dml2+distance', 'frozen teacher']
SETS = dict(valid=(500,'dejavu'), held_out=(1000,'dejavu'), unseen_font=(1000,'roboto')) # Words that no network trains on
BS,LR = 128,8e-3
alphabet = Alphabet('0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz')

def word_sets(folder, train):
    "Rendered words: `train` to learn from, and `SETS`"
    sizes = dict(train=(train,'dejavu'), **SETS)
    words,sets = make_words(sum(n for n,_ in sizes.values())),{}
    for i,(name,(n,family)) in enumerate(sizes.items()):
        sets[name] = rendered_set(folder, name, words[:n], font_files(family), i)
        words = words[n:]
    return sets

def ready_teacher(folder, sets):
    "PP-OCRv3, asked about all words before a clock runs"
    teacher = released_teacher('PP-OCRv3_rec', 'rec', alphabet, folder).as_exported() # The logits alone
    for name in ('train','valid'):
        for x,*_ in WordDL(WordData(sets[name], alphabet), bs=BS): teacher(x)
    return teacher

def terms(way):
    "Networks besides the student, and the terms"
    others = dict(labels=[], dml3=['Student2','Student3']).get(way, ['Teacher'] if way=='frozen teacher' else ['Student2'])
    ts = [Term(ctc_loss, n, name=f'ctc_{n}') for n in ['Student', *others] if n!='Teacher']
    if way=='frozen teacher': ts.append(Term(partial(kd, T=1.), 'Student', 'Teacher', weight=20.))
    elif way!='labels': ts += [Term(dml_paddle, 'Student', n) for n in others]
    if 'distance' in way: ts.append(Term(distance, 'Student.backbone.stages', 'Student2.backbone.stages'))
    return others,ts

def student(channels=(16,32,64,128)):
    return PlainStudent(len(alphabet), channels).to(memory_format=torch.channels_last)

def measured(nets, lines):
    "How many words each network reads exactly, and how near it comes"
    decode = CTCDecoder(alphabet)
    def decoded(outs, labels): return {n: decode(o, labels) for n,o in outs.items()}
    numbers = evaluate(Nets(nets), WordDL(WordData(lines, alphabet), bs=2*BS), decoded, NetMetrics(lambda: RecMetric(alphabet)))
    return {n: dict(exact=numbers[f'{n}_acc'], ned=numbers[f'{n}_norm_edit_dis']) for n in nets}

def run(way, seed, epochs, sets, teacher):
    "Numbers of one run"
    set_seed(seed)
    others,ts = terms(way)
    nets = {n: student() for n in ['Student', *others] if n!='Teacher'}
    frozen = dict(Teacher=teacher) if 'Teacher' in others else {}
    dls = word_dls(sets['train'], sets['valid'], BS, alphabet, seed)
    opt_func = partial(OptimWrapper, opt=torch.optim.AdamW, betas=(.9,.99))
    learn = distill_learner(dls, nets|frozen, ts, frozen=list(frozen), metrics=RecMetric(alphabet), opt_func=opt_func, lr=LR, wd=.01)
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs)
    seconds = round(time.perf_counter()-start, 1)
    scores = {s: measured(nets, sets[s]) for s in ('held_out','unseen_font')}
    parts = learn.parts().tail(50).mean().round(4).to_dict()
    return dict(way=way, seed=seed, epochs=epochs, steps=epochs*len(dls.train), seconds=seconds, threads=torch.get_num_threads(),
        scores=scores, valid=learn.table()['Student_acc'].tolist(), terms=parts)

# ---- what the chapter shows

def spread(values): return dict(mean=round(mean(values), 4), lowest=round(min(values), 4), highest=round(max(values), 4))

def row(way, runs):
    "A way as a row of the chapter's table"
    own = [r for r in runs if r['way']==way]
    sets = {s: spread([r['scores'][s]['Student']['exact'] for r in own]) for s in ('held_out','unseen_font')}
    return dict(way=way, seeds=len(own), **sets, seconds=round(mean(r['seconds'] for r in own)))

def draw(runs, path):
    "The student after each epoch, and at the end"
    fig,(a,b) = plt.subplots(1, 2, figsize=(12,3.6), dpi=80)
    ways = [w for w in WAYS if any(r['way']==w for r in runs)]
    for i,way in enumerate(ways):
        own = [r for r in runs if r['way']==way]
        for k,r in enumerate(own): a.plot(range(1, len(r['valid'])+1), r['valid'], color=f'C{i}', lw=1, label=None if k else way)
        for j,s in enumerate(('held_out','unseen_font')):
            values = [r['scores'][s]['Student']['exact'] for r in own]
            b.scatter([i+.25*j-.12]*len(own), values, color=f'C{i}', marker='os'[j], facecolor='white' if j else None)
    a.set(xlabel='epoch', ylabel='exact accuracy, 500 words', title='student, each seed a line')
    a.legend(fontsize=8)
    b.set(xticks=range(len(ways)), xticklabels=ways, title='at the end: held-out words (filled), unseen font (open)')
    b.tick_params(axis='x', labelsize=8)
    b.grid(axis='y', alpha=.3)
    fig.tight_layout()
    fig.savefig(path)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--ways', nargs='+', default=WAYS, choices=WAYS)
    p.add_argument('--epochs', type=int, default=6)
    p.add_argument('--words', type=int, default=10000)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--out', type=Path, default=Path('runs/five_ways'))
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    @cache
    def sets(): return word_sets(a.out, a.words)
    @cache
    def teacher(): return ready_teacher(a.out, sets())
    runs = []
    for seed in a.seeds:
        for way in a.ways:
            path = a.out/f'{way.replace(" ", "_")}_{seed}_{a.epochs}.json'
            if not path.exists():
                got = run(way, seed, a.epochs, sets(), teacher() if way=='frozen teacher' else None)
                with write_beside(path) as tmp: tmp.write_text(json.dumps(got))
            runs.append(got := json.loads(path.read_text()))
            exact = {s: round(o['Student']['exact'], 3) for s,o in got['scores'].items()}
            print(f"{way:15} seed {seed}: student {exact}; {got['seconds']:.0f} s", flush=True)
    command = ' '.join(['python -m benchmarks.five_ways', *sys.argv[1:]])
    result = dict(command=command, machine=machine(), epochs=a.epochs, words=a.words, rows=[row(w, runs) for w in a.ways])
    with write_beside(a.out/'five_ways.json') as tmp: tmp.write_text(json.dumps(result, indent=1))
    draw(runs, a.out/'five_ways.png')

if __name__=='__main__': main()
